//! Where bots' cgroups are, on cgroup v1, v2 and the hybrid of both, and what the kernel says there.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::api::ids::{BotUid, ContainerId};

/// Which cgroup hierarchy the runtime uses. A hybrid counts as v1: the controllers are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy a controller.
    V1,
    /// One hierarchy for all.
    V2,
}

/// Bots' cgroups: `PARENT/CONTAINER-ID`.
#[derive(Clone, Debug)]
pub struct Cgroups {
    version: Version,
    parent: String,
}

/// Where hierarchies are mounted.
pub(super) const ROOT: &str = "/sys/fs/cgroup";

/// How often the processes of a cgroup are looked for and killed.
const KILL_ROUNDS: u32 = 3;

/// The parent of bots' cgroups can't be made or limited.
#[derive(Debug, thiserror::Error)]
#[error("can't write {path}; is this cgroup hierarchy mounted, and writable for the agent?")]
pub struct CgroupError {
    path: PathBuf,
    source: std::io::Error,
}

impl Cgroups {
    /// Finds out which hierarchy this machine has. `parent` is absolute within it, for example `/berth`.
    pub fn detect(parent: &str) -> Self {
        let version = if Path::new(ROOT).join("cgroup.controllers").exists() { Version::V2 } else { Version::V1 };
        Self { version, parent: format!("/{}", parent.trim_matches('/')) }
    }

    /// The hierarchy.
    pub fn version(&self) -> Version {
        self.version
    }

    /// How BotNode names it: v1, v2 or hybrid.
    pub fn describe(&self) -> &'static str {
        match self.version {
            Version::V2 => "v2",
            Version::V1 if Path::new(ROOT).join("unified").exists() => "hybrid",
            Version::V1 => "v1",
        }
    }

    /// The OCI spec's `linux.cgroupsPath` of a bot.
    pub fn path(&self, id: &ContainerId) -> String {
        format!("{}/{id}", self.parent)
    }

    /// Makes the parent of all bots' cgroups, limited to what bots may use in all, so that not even bots without limits of
    /// their own take the machine from kubelet. `cpu_millis` are thousandths of a CPU, `memory` bytes.
    ///
    /// # Errors
    /// When the kernel refuses: the hierarchy is not mounted, or is not ours to write.
    pub fn ensure_parent(&self, cpu_millis: i64, memory: i64) -> Result<(), CgroupError> {
        const PERIOD: i64 = 100_000;
        let quota = cpu_millis.saturating_mul(PERIOD) / 1000;
        let limits = match self.version {
            Version::V1 => vec![
                ("memory", "memory.limit_in_bytes", memory.to_string()),
                ("cpu", "cpu.cfs_period_us", PERIOD.to_string()),
                ("cpu", "cpu.cfs_quota_us", quota.to_string()),
            ],
            Version::V2 => vec![("", "memory.max", memory.to_string()), ("", "cpu.max", format!("{quota} {PERIOD}"))],
        };
        for (controller, file, value) in limits {
            let dir = Path::new(ROOT).join(controller).join(self.parent.trim_start_matches('/'));
            let failed = |path: &Path| {
                let path = path.to_owned();
                move |source| CgroupError { path, source }
            };
            std::fs::create_dir_all(&dir).map_err(failed(&dir))?;
            let path = dir.join(file);
            std::fs::write(&path, value).map_err(failed(&path))?;
        }
        Ok(())
    }

    /// Whether the kernel killed a process of the bot for memory since its cgroup was made. The cgroup outlives the
    /// process until the task is deleted, so an exit that nobody watched can still be explained.
    pub async fn oom_killed(&self, id: &ContainerId) -> bool {
        let file = match self.version {
            Version::V1 => self.file("memory", id, "memory.oom_control"),
            Version::V2 => self.file("", id, "memory.events"),
        };
        // No such file: the cgroup is gone, and nothing can be said; the exit code then speaks alone.
        let text = tokio::fs::read_to_string(file).await.unwrap_or_default();
        oom_kills(&text) > 0
    }

    /// The parent of bots' cgroups in each hierarchy.
    fn parents(&self) -> Vec<PathBuf> {
        let below = |root: &Path| root.join(self.parent.trim_start_matches('/'));
        match self.version {
            Version::V2 => vec![below(Path::new(ROOT))],
            Version::V1 => {
                let hierarchies = std::fs::read_dir(ROOT).into_iter().flatten().flatten();
                // `cpu` is often a link to `cpu,cpuacct`.
                let own = hierarchies.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
                own.map(|entry| below(&entry.path())).collect()
            }
        }
    }

    /// Where a bot's cgroups are, whether or not they are there.
    pub fn dirs(&self, id: &ContainerId) -> Vec<PathBuf> {
        self.parents().into_iter().map(|parent| parent.join(id.as_str())).collect()
    }

    /// Every bot that has cgroups below the parent, in whichever hierarchy, and no process in them.
    pub fn list_empty(&self) -> BTreeSet<BotUid> {
        let entries = self.parents().into_iter().flat_map(|parent| std::fs::read_dir(parent).into_iter().flatten());
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut found: BTreeSet<BotUid> = names.filter_map(|name| ContainerId::uid_of(&name)).collect();
        let groups = |uid: &BotUid| self.dirs(&uid.container_id()).into_iter().flat_map(|dir| tree(&dir));
        found.retain(|uid| groups(uid).all(|group| procs(&group).is_empty()));
        found
    }

    /// Kills every process in a bot's cgroups, and waits a moment until they are gone. Blocks.
    pub fn kill(&self, id: &ContainerId) {
        // One that is forked meanwhile is found by the next round.
        for _ in 0..KILL_ROUNDS {
            if self.version == Version::V1 {
                // A frozen process does not die of KILL there (runc #3134).
                let _ = std::fs::write(self.file("freezer", id, "freezer.state"), "THAWED");
            }
            let groups: Vec<PathBuf> = self.dirs(id).into_iter().flat_map(|dir| tree(&dir)).collect();
            if !kill_and_wait(&groups) {
                return;
            }
        }
    }

    /// Kills every process below the parent, helpers of the agent among them, then removes the parent with all below it. Blocks.
    ///
    /// # Errors
    /// When something is left.
    pub fn clear(&self) -> Result<(), CgroupError> {
        for parent in self.parents().into_iter().filter(|parent| parent.exists()) {
            for group in tree(&parent) {
                // A frozen process does not die of KILL on v1 (runc #3134); the file is not there on v2.
                let _ = std::fs::write(group.join("freezer.state"), "THAWED");
            }
            for _ in 0..KILL_ROUNDS {
                if !kill_and_wait(&tree(&parent)) {
                    break;
                }
            }
            for group in tree(&parent) {
                std::fs::remove_dir(&group).map_err(|source| CgroupError { path: group.clone(), source })?;
            }
        }
        Ok(())
    }

    /// Removes a bot's cgroups where no process is in them: the kernel sees to that. Blocks.
    pub fn remove(&self, id: &ContainerId) {
        for group in self.dirs(id).into_iter().flat_map(|dir| tree(&dir)) {
            let _ = std::fs::remove_dir(group);
        }
    }

    /// The cgroup that freezes a bot, whether or not it is there.
    pub fn freezers(&self, id: &ContainerId) -> Vec<PathBuf> {
        vec![match self.version {
            Version::V1 => self.file("freezer", id, ""),
            Version::V2 => self.file("", id, ""),
        }]
    }

    fn file(&self, controller: &str, id: &ContainerId, name: &str) -> PathBuf {
        Path::new(ROOT).join(controller).join(self.path(id).trim_start_matches('/')).join(name)
    }
}

/// A cgroup and all below it, the deepest first.
fn tree(group: &Path) -> Vec<PathBuf> {
    let (mut open, mut found) = (vec![group.to_owned()], Vec::new());
    while let Some(group) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&group) else { continue };
        let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        open.extend(below.map(|entry| entry.path()));
        found.push(group);
    }
    found.reverse();
    found
}

/// Kills every process in these groups, and waits a moment for each; whether there was any.
fn kill_and_wait(groups: &[PathBuf]) -> bool {
    let killed: Vec<OwnedFd> = groups.iter().flat_map(|group| kill_in(group)).collect();
    for process in &killed {
        let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit));
    }
    !killed.is_empty()
}

/// Kills what is in one cgroup. Each process is asked for again once its descriptor is held: the number alone may be
/// another's by then.
fn kill_in(group: &Path) -> Vec<OwnedFd> {
    let held = procs(group).into_iter().filter_map(|pid| Some((pid, descriptor(pid)?))).collect::<Vec<_>>();
    let still = procs(group);
    let held = held.into_iter().filter(|(pid, _)| still.contains(pid)).map(|(_, process)| process);
    held.filter(|process| rustix::process::pidfd_send_signal(process, Signal::KILL).is_ok()).collect()
}

/// The processes in one cgroup.
fn procs(group: &Path) -> BTreeSet<u32> {
    let text = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|pid| pid.parse().ok()).collect()
}

/// A descriptor of a process; whoever gets one looks only then whether it is the right process.
pub(super) fn descriptor(pid: u32) -> Option<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// The counter `oom_kill` of `memory.oom_control` (v1) or `memory.events` (v2).
fn oom_kills(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == "oom_kill")
        .and_then(|(_, count)| count.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cgroups of a creation that was cut off stayed for ever, and so did a process that nobody could stop any more.
    #[test]
    fn what_is_in_a_bots_cgroups_is_killed_and_they_are_removed_and_no_others() {
        let cgroups = Cgroups::detect(&format!("/berth-test-{}", std::process::id()));
        let uid = |n: u8| BotUid::parse(&format!("0000000{n}-8f0c-4d7e-9a55-0f6a3d1f2b11")).unwrap();
        let (own, other, empty) = (uid(1).container_id(), uid(2).container_id(), uid(3).container_id());
        // One hierarchy is enough, where there are more.
        let at = |id: &ContainerId| match cgroups.version() {
            Version::V1 => cgroups.file("pids", id, ""),
            Version::V2 => cgroups.file("", id, ""),
        };
        let inside = |group: &Path| {
            std::fs::create_dir_all(group).unwrap();
            let child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
            std::fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
            child
        };
        let mut children = [inside(&at(&own)), inside(&at(&own).join("below")), inside(&at(&other))];
        std::fs::create_dir_all(at(&empty)).unwrap();
        assert_eq!(cgroups.list_empty(), BTreeSet::from([uid(3)]));
        cgroups.remove(&own);
        assert!(at(&own).exists(), "a cgroup with a process stays");

        cgroups.kill(&own);
        let ended: Vec<bool> = children.iter_mut().map(|child| child.try_wait().unwrap().is_some()).collect();
        assert_eq!(ended, [true, true, false]);
        cgroups.remove(&own);
        assert!(!at(&own).exists());

        children[2].kill().unwrap();
        children[2].wait().unwrap();
        for id in [&other, &empty] {
            cgroups.remove(id);
        }
        std::fs::remove_dir(at(&own).parent().unwrap()).unwrap();
    }

    #[test]
    fn the_counter_is_read_from_both_hierarchies() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), 3);
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n"), 1);
        assert_eq!(oom_kills(""), 0);
        assert_eq!(oom_kills("oom_kill garbage"), 0);
    }
}
