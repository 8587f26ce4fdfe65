//! Where bots' cgroups are, on cgroup v1, v2 and the hybrid of both, and what the kernel says there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::api::ids::ContainerId;

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

const ROOT: &str = "/sys/fs/cgroup";

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

    /// Every container that has a cgroup below the parent, in whichever hierarchy.
    pub fn list(&self) -> BTreeSet<ContainerId> {
        let entries = self.parents().into_iter().flat_map(|parent| std::fs::read_dir(parent).into_iter().flatten());
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| Some(ContainerId::uid_of(&name)?.container_id())).collect()
    }

    /// Removes the cgroups of a container, where no process is in them: the kernel sees to that.
    pub fn remove_empty(&self, id: &ContainerId) {
        for parent in self.parents() {
            let _ = std::fs::remove_dir(parent.join(id.as_str()));
        }
    }

    fn file(&self, controller: &str, id: &ContainerId, name: &str) -> PathBuf {
        Path::new(ROOT).join(controller).join(self.path(id).trim_start_matches('/')).join(name)
    }
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

    #[test]
    fn the_counter_is_read_from_both_hierarchies() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), 3);
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n"), 1);
        assert_eq!(oom_kills(""), 0);
        assert_eq!(oom_kills("oom_kill garbage"), 0);
    }
}
