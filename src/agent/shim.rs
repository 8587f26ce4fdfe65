//! Leftovers of tasks whose creation was cut off: shims and bundles that containerd does not know any more.
//!
//! containerd's own names of tasks are made to be used once. A bot's is used at each of its starts, so what is left of one
//! is in the way of the next, for ever (all seen with 1.6.20):
//!
//! - Who kills a client of containerd in the middle of a creation makes containerd kill `containerd-shim-* start`, which
//!   may have made the shim already and not yet said where it listens. Nobody ends that shim, and the next creation
//!   finds its socket and takes it for its own.
//! - Who kills containerd then leaves a bundle that it can't put away when it is back: `containerd-shim-* delete` wants a
//!   file that is written later. The next creation fails, since the bundle's directory is there.
//!
//! [`Shims::clear`] removes what is in the way of one bot, [`Strays`] what is in nobody's way. Neither touches a shim that
//! has a child, a task's parent, or anything but containerd's files of a bundle: never what is mounted in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::{GetRequest as GetTaskRequest, ListTasksRequest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::Instant;

use crate::api::condition::chain;
use crate::api::ids::ContainerId;
use crate::containerd::{CallContext as _, CallFailed, Containerd};

/// How long a shim may be without a process, and a bundle without a task: one that is being made is so too.
const GRACE: Duration = Duration::from_secs(30);

/// How long a killed shim may take to be gone.
const GONE: Duration = Duration::from_secs(2);

/// A process, told from a later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    pid: u32,
    /// Clock ticks since the machine's start (proc(5), `stat`).
    started: u64,
}

/// A process as `/proc` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    process: Process,
    parent: u32,
    /// Of a shim of ours: the id of its container.
    shim_of: Option<String>,
}

/// The shims and bundles of one containerd's namespace.
#[derive(Clone, Debug)]
pub struct Shims {
    containerd: Containerd,
    /// containerd's socket, as its shims are told.
    address: String,
    namespace: String,
    /// Where containerd has the bundles of that namespace: a directory a task.
    bundles: PathBuf,
}

impl Shims {
    /// `address` is containerd's socket, `state` its state directory, `namespace` ours in it.
    pub fn new(containerd: Containerd, address: &Path, state: &Path, namespace: &str) -> Self {
        let address = address.to_string_lossy().into_owned();
        let bundles = state.join("io.containerd.runtime.v2.task").join(namespace);
        Self { containerd, address, namespace: namespace.to_owned(), bundles }
    }

    /// Removes what is left of a creation before `since`, where containerd has no task of that id. Says whether there was
    /// anything.
    pub async fn clear(&self, id: &ContainerId, since: SystemTime) -> Result<bool, CallFailed> {
        if self.has_task(id).await? {
            return Ok(false);
        }
        let (this, name) = (self.clone(), id.to_string());
        let cleared = tokio::task::spawn_blocking(move || {
            let seen = this.processes();
            let shims = strays(&seen, &BTreeSet::new());
            let mut cleared = false;
            for (process, _) in shims.into_iter().filter(|(process, of)| *of == name && began(*process) < since) {
                cleared |= this.end(process, &name);
            }
            // A shim that is there still, with a process or too young, needs its bundle.
            if !this.processes().iter().any(|seen| seen.shim_of.as_deref() == Some(&name)) {
                cleared |= this.remove_bundle(&name, since);
            }
            cleared
        });
        Ok(cleared.await.unwrap_or(false))
    }

    /// Whether containerd has a task of that id that it can find.
    pub async fn has_task(&self, id: &ContainerId) -> Result<bool, CallFailed> {
        let get = GetTaskRequest { container_id: id.to_string(), exec_id: String::new() };
        match self.containerd.tasks().get(self.containerd.request(get)).await.call("get task", id.as_str()) {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn processes(&self) -> Vec<Seen> {
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(|pid| self.look(pid)).collect()
    }

    /// `None` for a process that is gone meanwhile.
    fn look(&self, pid: u32) -> Option<Seen> {
        let (parent, started) = stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let shim_of = shim_of(&command, &self.namespace, &self.address);
        Some(Seen { process: Process { pid, started }, parent, shim_of })
    }

    /// Kills a shim and waits until it is gone. Through a descriptor: the number may be another's by the time of the signal.
    fn end(&self, process: Process, id: &str) -> bool {
        let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else { return false };
        let Ok(descriptor) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return false };
        let still = self.look(process.pid).is_some_and(|seen| seen.process == process && seen.shim_of.is_some());
        if !still || rustix::process::pidfd_send_signal(&descriptor, Signal::KILL).is_err() {
            return false;
        }
        let limit = Timespec { tv_sec: i64::try_from(GONE.as_secs()).unwrap_or(1), tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&limit));
        tracing::warn!(pid = process.pid, %id, "ended a shim without a process, which containerd does not know");
        true
    }

    /// Removes a bundle that was made before `since`.
    fn remove_bundle(&self, id: &str, since: SystemTime) -> bool {
        let bundle = self.bundles.join(id);
        let old = fs::symlink_metadata(&bundle).and_then(|meta| meta.modified()).is_ok_and(|made| made < since);
        if !old {
            return false;
        }
        match remove_bundle(&bundle) {
            Ok(()) => {
                tracing::warn!(bundle = %bundle.display(), "removed a bundle that containerd does not know");
                true
            }
            Err(error) => {
                tracing::warn!(bundle = %bundle.display(), error = %chain(&error), "a bundle that containerd does not know stays");
                false
            }
        }
    }
}

/// Removes the files of a bundle and its empty directories. What is mounted in it, a bot's layer, is unmounted and never
/// entered, and a directory that is not empty then stays, with an error.
fn remove_bundle(bundle: &Path) -> io::Result<()> {
    for entry in fs::read_dir(bundle)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            // EINVAL says that nothing is mounted there any more.
            while rustix::mount::unmount(entry.path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
            fs::remove_dir(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(bundle)
}

/// Looks for shims and bundles that nobody needs, and ends those that an earlier look, a grace time ago, found as well.
#[derive(Debug)]
pub struct Strays {
    shims: Shims,
    since: BTreeMap<Stray, Instant>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stray {
    Shim(Process),
    Bundle(String),
}

impl Strays {
    /// Of those shims.
    pub fn new(shims: Shims) -> Self {
        Self { shims, since: BTreeMap::new() }
    }

    /// One look. Gives when to look again for what is stray now.
    pub async fn sweep(&mut self) -> Result<Option<Duration>, CallFailed> {
        let shims = &self.shims;
        let seen = shims.processes();
        let bundles: Vec<String> = fs::read_dir(&shims.bundles)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| ContainerId::uid_of(name).is_some())
            .collect();
        // Asked after these were found: a task that has come since is one of another shim, or none of them is stray.
        let request = shims.containerd.request(ListTasksRequest::default());
        let tasks = shims.containerd.tasks().list(request).await.call("list", "tasks")?.tasks;
        let pids = tasks.iter().map(|task| task.pid).collect();
        let mut found: BTreeMap<Stray, String> =
            strays(&seen, &pids).into_iter().map(|(process, id)| (Stray::Shim(process), id)).collect();
        let known: BTreeSet<&str> = tasks.iter().map(|task| task.id.as_str()).collect();
        let shimmed: BTreeSet<&str> = seen.iter().filter_map(|seen| seen.shim_of.as_deref()).collect();
        for bundle in bundles {
            if !known.contains(bundle.as_str()) && !shimmed.contains(bundle.as_str()) {
                found.insert(Stray::Bundle(bundle.clone()), bundle);
            }
        }
        let now = Instant::now();
        self.since.retain(|stray, _| found.contains_key(stray));
        let mut wait = None;
        for (stray, id) in found {
            let age = now.duration_since(*self.since.entry(stray.clone()).or_insert(now));
            if age < GRACE {
                wait = Some(wait.unwrap_or(GRACE).min(GRACE - age + Duration::from_millis(100)));
                continue;
            }
            match stray {
                Stray::Shim(process) => drop(shims.end(process, &id)),
                Stray::Bundle(_) => {
                    let before = SystemTime::now().checked_sub(GRACE).unwrap_or(SystemTime::UNIX_EPOCH);
                    shims.remove_bundle(&id, before);
                }
            }
        }
        Ok(wait)
    }
}

/// When a process began, by the wall clock of now.
fn began(process: Process) -> SystemTime {
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let up = Duration::new(up.tv_sec.max(0).unsigned_abs(), u32::try_from(up.tv_nsec).unwrap_or(0));
    let started = Duration::from_millis(process.started.saturating_mul(1000) / ticks);
    SystemTime::now().checked_sub(up.saturating_sub(started)).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Shims of ours that have no child and are no task's parent, each with the id of its container.
fn strays(seen: &[Seen], tasks: &BTreeSet<u32>) -> BTreeMap<Process, String> {
    let parents: BTreeSet<u32> = seen.iter().map(|seen| seen.parent).collect();
    let of_tasks: BTreeSet<u32> =
        seen.iter().filter(|seen| tasks.contains(&seen.process.pid)).map(|seen| seen.parent).collect();
    // A task whose process is gone from /proc does not tell which shim is its own: then none of them is stray.
    let unclear = tasks.iter().any(|task| !seen.iter().any(|seen| seen.process.pid == *task));
    let shims = seen.iter().filter_map(|seen| Some((seen.process, seen.shim_of.clone()?)));
    let stray = |process: &Process| !unclear && !parents.contains(&process.pid) && !of_tasks.contains(&process.pid);
    shims.filter(|(process, _)| stray(process)).collect()
}

/// Parent and start of a process, from `/proc/PID/stat`; the name in it may hold anything but ends at the last bracket.
fn stat(text: &str) -> Option<(u32, u64)> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.get(1)?.parse().ok()?, fields.get(19)?.parse().ok()?))
}

/// The container's id, where a command line is that of a bot's shim of that namespace and containerd.
fn shim_of(command: &[u8], namespace: &str, address: &str) -> Option<String> {
    let words: Vec<&str> =
        command.split(|byte| *byte == 0).map(|word| std::str::from_utf8(word).unwrap_or("")).collect();
    let program = Path::new(words.first()?).file_name()?.to_str()?;
    let value = |flag: &str| words.iter().position(|word| *word == flag).and_then(|at| words.get(at + 1)).copied();
    let ours = program.starts_with("containerd-shim-")
        && value("-namespace") == Some(namespace)
        && value("-address") == Some(address);
    let id = value("-id").filter(|id| ours && ContainerId::uid_of(id).is_some())?;
    Some(id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "berth-2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11";

    fn seen(pid: u32, parent: u32, shim: bool) -> Seen {
        Seen { process: Process { pid, started: 7 }, parent, shim_of: shim.then(|| ID.to_owned()) }
    }

    #[test]
    fn only_a_shim_that_nobody_can_need_is_stray() {
        let seen = [
            seen(10, 1, true),
            seen(11, 10, false),
            seen(20, 1, true),
            seen(30, 1, true),
            seen(31, 30, false),
            seen(40, 1, false),
        ];
        let pids = |tasks: &[u32]| -> Vec<u32> {
            strays(&seen, &tasks.iter().copied().collect()).keys().map(|process| process.pid).collect()
        };
        assert_eq!(pids(&[11]), [20], "30 has a child, though containerd does not know it");
        assert_eq!(pids(&[]), [20]);
        assert!(pids(&[11, 99]).is_empty(), "a task without a process may be of any of them");
    }

    #[test]
    fn a_shim_is_told_by_its_command_line() {
        let line = |namespace: &str, id: &str, address: &str| {
            format!("/usr/bin/containerd-shim-runc-v2\0-namespace\0{namespace}\0-id\0{id}\0-address\0{address}\0")
                .into_bytes()
        };
        let told = |line: &[u8]| shim_of(line, "berth", "/run/c.sock");
        assert_eq!(told(&line("berth", ID, "/run/c.sock")).as_deref(), Some(ID));
        for other in [
            line("k8s.io", ID, "/run/c.sock"),
            line("berth", ID, "/run/other.sock"),
            line("berth", "somebodys", "/run/c.sock"),
            b"cat\0-namespace\0berth\0".to_vec(),
            b"".to_vec(),
            b"containerd-shim-runc-v2\0-namespace".to_vec(),
        ] {
            assert_eq!(told(&other), None, "{}", String::from_utf8_lossy(&other));
        }
    }

    #[test]
    fn a_bundle_goes_and_what_is_mounted_in_it_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, layer) = (dir.path().join("bundle"), dir.path().join("layer"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::create_dir(&layer).unwrap();
        fs::write(bundle.join("config.json"), "{}").unwrap();
        fs::write(layer.join("data"), "of the bot").unwrap();
        std::os::unix::fs::symlink(&layer, bundle.join("work")).unwrap();
        rustix::mount::mount_bind(&layer, bundle.join("rootfs")).unwrap();
        remove_bundle(&bundle).unwrap();
        assert!(!bundle.exists());
        assert_eq!(fs::read_to_string(layer.join("data")).unwrap(), "of the bot");

        // Not mounted, and yet full: nothing that we know of, so it stays.
        fs::create_dir_all(bundle.join("rootfs/data")).unwrap();
        assert!(remove_bundle(&bundle).is_err());
        assert!(bundle.join("rootfs/data").exists());
    }

    #[test]
    fn a_process_began_when_it_began() {
        let (_, started) = stat(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        let began = began(Process { pid: 0, started });
        let age = SystemTime::now().duration_since(began).unwrap();
        assert!(age < Duration::from_secs(3600), "{age:?}");
    }

    #[test]
    fn stat_is_read_behind_any_name() {
        let own = stat(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(own.0, std::os::unix::process::parent_id());
        assert!(own.1 > 0);
        let odd = "7 (a) b (c) S 42 7 7 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 12345 0";
        assert_eq!(stat(odd), Some((42, 12345)));
        assert_eq!(stat("garbage"), None);
    }
}
