//! Leftovers of tasks whose creation was cut off: shims, bundles and cgroups that containerd does not know any more.
//!
//! containerd's own names of tasks are made to be used once. A bot's is used at each of its starts, so what is left of one
//! is in the way of the next, for ever (all seen with 1.6.20):
//!
//! - Who kills a client of containerd in the middle of a creation makes containerd kill `containerd-shim-* start`, which
//!   may have made the shim already and not yet said where it listens. Nobody ends that shim, and the next creation
//!   finds its socket and takes it for its own.
//! - Who kills containerd then leaves a bundle that it can't put away when it is back: `containerd-shim-* delete` wants a
//!   file that is written later. The next creation fails, since the bundle's directory is there. Or it leaves a shim with
//!   a container that is made and not started, which containerd gives up when it is back and finds the shim busy.
//!
//! [`Shims::clear`] removes what is in the way of one bot, [`Strays`] what is in nobody's way. What containerd says it does
//! not know is put away, whole: nobody could stop it any more, and the bot's next attempt would run beside it. A shim of a
//! task that containerd knows, or is not sure of, is let be, unless it has neither child nor task. Of a bundle only
//! containerd's own files are removed, never what is mounted in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::{GetRequest as GetTaskRequest, ListTasksRequest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::Instant;

use crate::api::condition::{chain, cut};
use crate::api::ids::ContainerId;
use crate::containerd::{CallContext as _, CallFailed, Containerd};

use super::cgroup::Cgroups;

/// How long a shim may be without a process, and a bundle without a task: one that is being made is so too.
const GRACE: Duration = Duration::from_secs(30);

/// How long a killed shim may take to be gone.
const GONE_SECONDS: i64 = 2;

/// How long a shim's delete command may take.
const DELETE: Duration = Duration::from_secs(10);

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
    /// containerd's socket, as we see it.
    address: PathBuf,
    namespace: String,
    /// Where containerd has the bundles of that namespace: a directory a task.
    bundles: PathBuf,
}

impl Shims {
    /// `address` is containerd's socket, `state` its state directory, `namespace` ours in it.
    pub fn new(containerd: Containerd, address: &Path, state: &Path, namespace: &str) -> Self {
        let bundles = state.join("io.containerd.runtime.v2.task").join(namespace);
        Self { containerd, address: address.to_owned(), namespace: namespace.to_owned(), bundles }
    }

    /// Removes what is left of a creation before `since`, where containerd has no task of that id. Says whether there was
    /// anything.
    pub async fn clear(&self, id: &ContainerId, since: SystemTime) -> Result<bool, CallFailed> {
        if self.has_task(id.as_str()).await? {
            return Ok(false);
        }
        let of_bot = |seen: &Seen| seen.shim_of.as_deref() == Some(id.as_str());
        let mut cleared = false;
        for seen in self.processes().await.iter().filter(|seen| of_bot(seen) && began(seen.process) < since) {
            cleared |= self.end(seen.process, id.as_str()).await;
        }
        // A shim that is there still needs its bundle.
        if !self.processes().await.iter().any(of_bot) {
            cleared |= self.remove_bundle(id.as_str(), since);
        }
        Ok(cleared)
    }

    /// Whether containerd has a task of that id that it can find.
    pub async fn has_task(&self, id: &str) -> Result<bool, CallFailed> {
        let get = GetTaskRequest { container_id: id.to_owned(), exec_id: String::new() };
        match self.containerd.tasks().get(self.containerd.request(get)).await.call("get task", id) {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// All processes of the machine.
    async fn processes(&self) -> Vec<Seen> {
        let this = self.clone();
        let look = move || {
            let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
            let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
            pids.filter_map(|pid| this.look(pid)).collect()
        };
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }

    /// `None` for a process that is gone meanwhile.
    fn look(&self, pid: u32) -> Option<Seen> {
        let (parent, started) = stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // The same socket, by whatever path: another containerd of this machine may have our namespace too, and its processes
        // may stand in our /proc.
        let shim_of = shim_of(&command, &self.namespace)
            .filter(|(_, address)| same_file(&in_root_of(pid, address), &self.address))
            .map(|(id, _)| id);
        Some(Seen { process: Process { pid, started }, parent, shim_of })
    }

    /// Puts away a shim's container, kills the shim, and waits until it is gone. Through a descriptor: the number may be
    /// another's by the time of the signal.
    async fn end(&self, process: Process, id: &str) -> bool {
        let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else { return false };
        let Ok(descriptor) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return false };
        let program = fs::read_link(format!("/proc/{}/exe", process.pid));
        let still = self.look(process.pid).is_some_and(|seen| seen.process == process && seen.shim_of.is_some());
        let Ok(program) = program else { return false };
        if !still {
            return false;
        }
        // The file tells that there is a container: its processes, mounts and cgroups go with it.
        if self.bundles.join(id).join("runtime").exists() {
            self.delete_container(&program, id).await;
        }
        if rustix::process::pidfd_send_signal(&descriptor, Signal::KILL).is_err() {
            return false;
        }
        let gone = tokio::task::spawn_blocking(move || {
            let limit = Timespec { tv_sec: GONE_SECONDS, tv_nsec: 0 };
            poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&limit))
        });
        let _ = gone.await;
        tracing::warn!(pid = process.pid, %id, "ended a shim that containerd does not know");
        true
    }

    /// As containerd does for a shim that died (runtime v2's `delete` command).
    async fn delete_container(&self, program: &Path, id: &str) {
        let bundle = self.bundles.join(id);
        let mut command = tokio::process::Command::new(program);
        command.args(["-namespace", &self.namespace, "-id", id, "-address"]).arg(&self.address);
        command.arg("-bundle").arg(&bundle).arg("delete").current_dir(&bundle).stdin(Stdio::null()).kill_on_drop(true);
        match tokio::time::timeout(DELETE, command.output()).await {
            Ok(Ok(output)) if output.status.success() => {}
            Ok(Ok(output)) => {
                let said = String::from_utf8_lossy(&output.stderr);
                tracing::warn!(%id, status = %output.status, said = cut(&said, 500), "a container that containerd does not know is not put away");
            }
            Ok(Err(error)) => tracing::warn!(%id, error = %chain(&error), "can't run the shim's delete command"),
            Err(_) => tracing::warn!(%id, "the shim's delete command takes too long"),
        }
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

/// Looks for shims, bundles and cgroups that nobody needs, and ends those that an earlier look, a grace time ago, found as well.
#[derive(Debug)]
pub struct Strays {
    shims: Shims,
    cgroups: Cgroups,
    since: BTreeMap<Stray, Instant>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stray {
    Shim(Process),
    Bundle(String),
    Cgroup(ContainerId),
}

impl Strays {
    /// Of those shims and bots' cgroups.
    pub fn new(shims: Shims, cgroups: Cgroups) -> Self {
        Self { shims, cgroups, since: BTreeMap::new() }
    }

    /// One look. Gives when to look again for what is stray now.
    pub async fn sweep(&mut self) -> Result<Option<Duration>, CallFailed> {
        let shims = &self.shims;
        let seen = shims.processes().await;
        let bundles: Vec<String> = fs::read_dir(&shims.bundles)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| ContainerId::uid_of(name).is_some())
            .collect();
        let cgroups: BTreeMap<String, ContainerId> =
            self.cgroups.list().into_iter().map(|id| (id.to_string(), id)).collect();
        // Asked after these were found: a task that has come since is one of another shim, or none of them is stray.
        let request = shims.containerd.request(ListTasksRequest::default());
        let tasks = shims.containerd.tasks().list(request).await.call("list", "tasks")?.tasks;
        let pids = tasks.iter().map(|task| task.pid).collect();
        let shimmed: BTreeSet<&str> = seen.iter().filter_map(|seen| seen.shim_of.as_deref()).collect();
        // The list leaves out a task whose shim does not answer, and has one that lost its container, which nobody can kill or
        // delete: only what is asked for by its name tells.
        let mut unknown = BTreeSet::new();
        let named = bundles.iter().map(String::as_str).chain(cgroups.keys().map(String::as_str));
        for id in named.chain(shimmed.iter().copied()).collect::<BTreeSet<_>>() {
            if matches!(shims.has_task(id).await, Ok(false)) {
                unknown.insert(id);
            }
        }
        let mut found: BTreeMap<Stray, String> =
            strays(&seen, &pids, &unknown).into_iter().map(|(process, id)| (Stray::Shim(process), id)).collect();
        for bundle in bundles.iter().filter(|id| unknown.contains(id.as_str()) && !shimmed.contains(id.as_str())) {
            found.insert(Stray::Bundle(bundle.clone()), bundle.clone());
        }
        for id in cgroups.values().filter(|id| unknown.contains(id.as_str()) && !shimmed.contains(id.as_str())) {
            found.insert(Stray::Cgroup(id.clone()), id.to_string());
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
                Stray::Shim(process) => {
                    if shims.end(process, &id).await
                        && let Some(id) = cgroups.get(&id)
                    {
                        // What it left goes with it, and not a grace time later; a bot that lives keeps its own.
                        self.cgroups.remove_empty(id);
                    }
                }
                Stray::Cgroup(id) => self.cgroups.remove_empty(&id),
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

/// Shims of ours that nobody can need, each with the id of its container: those of `unknown` ids, and those that have
/// neither a child nor a task. `tasks` are the processes that containerd knows.
fn strays(seen: &[Seen], tasks: &BTreeSet<u32>, unknown: &BTreeSet<&str>) -> BTreeMap<Process, String> {
    let parents: BTreeSet<u32> = seen.iter().map(|seen| seen.parent).collect();
    // A task whose process is gone from /proc does not tell which shim is its own: then each may be.
    let unclear = tasks.iter().any(|task| !seen.iter().any(|seen| seen.process.pid == *task));
    let shims = seen.iter().filter_map(|seen| Some((seen.process, seen.shim_of.clone()?)));
    let idle = |process: &Process| !unclear && !parents.contains(&process.pid);
    shims.filter(|(process, id)| unknown.contains(id.as_str()) || idle(process)).collect()
}

/// Parent and start of a process, from `/proc/PID/stat`; the name in it may hold anything but ends at the last bracket.
fn stat(text: &str) -> Option<(u32, u64)> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.get(1)?.parse().ok()?, fields.get(19)?.parse().ok()?))
}

/// The container's id and containerd's socket, where a command line is that of a bot's shim in that namespace.
fn shim_of(command: &[u8], namespace: &str) -> Option<(String, String)> {
    let words: Vec<&str> =
        command.split(|byte| *byte == 0).map(|word| std::str::from_utf8(word).unwrap_or("")).collect();
    let program = Path::new(words.first()?).file_name()?.to_str()?;
    let value = |flag: &str| words.iter().position(|word| *word == flag).and_then(|at| words.get(at + 1)).copied();
    let ours = program.starts_with("containerd-shim-") && value("-namespace") == Some(namespace);
    let id = value("-id").filter(|id| ours && ContainerId::uid_of(id).is_some())?;
    Some((id.to_owned(), value("-address")?.to_owned()))
}

/// A path as a process sees it.
fn in_root_of(pid: u32, path: &str) -> PathBuf {
    Path::new(&format!("/proc/{pid}/root")).join(path.trim_start_matches('/'))
}

fn same_file(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    id(one).is_some_and(|one| id(other) == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "berth-2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11";

    #[test]
    fn only_a_shim_that_nobody_can_need_is_stray() {
        let process = |pid| Process { pid, started: 7 };
        let other = "berth-00000000-8f0c-4d7e-9a55-0f6a3d1f2b11";
        let shim = |pid, of: &str| Seen { process: process(pid), parent: 1, shim_of: Some(of.to_owned()) };
        let child = |pid, parent| Seen { process: process(pid), parent, shim_of: None };
        let seen = [shim(10, ID), child(11, 10), shim(20, ID), shim(30, other), child(31, 30), child(40, 1)];
        let pids = |tasks: &[u32], unknown: &[&str]| -> Vec<u32> {
            let (tasks, unknown) = (tasks.iter().copied().collect(), unknown.iter().copied().collect());
            strays(&seen, &tasks, &unknown).keys().map(|process| process.pid).collect()
        };
        assert_eq!(pids(&[11, 31], &[]), [20], "a second shim of a bot, without a process");
        assert_eq!(pids(&[11], &[]), [20], "not sure of the other's: let be");
        assert_eq!(pids(&[11], &[other]), [20, 30], "nobody could ever stop what it has made");
        assert_eq!(pids(&[11, 99], &[]), Vec::<u32>::new(), "a task without a process may be of any of them");
    }

    #[test]
    fn a_shim_is_told_by_its_command_line_and_containerds_socket() {
        let line = |namespace: &str, id: &str| {
            format!("/usr/bin/containerd-shim-runc-v2\0-namespace\0{namespace}\0-id\0{id}\0-address\0/run/c.sock\0")
                .into_bytes()
        };
        let told = |line: &[u8]| shim_of(line, "berth");
        assert_eq!(told(&line("berth", ID)), Some((ID.to_owned(), "/run/c.sock".to_owned())));
        for other in [
            line("k8s.io", ID),
            line("berth", "somebodys"),
            b"cat\0-namespace\0berth\0".to_vec(),
            b"".to_vec(),
            b"containerd-shim-runc-v2\0-namespace".to_vec(),
        ] {
            assert_eq!(told(&other), None, "{}", String::from_utf8_lossy(&other));
        }

        let dir = tempfile::tempdir().unwrap();
        let (socket, link, other) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        fs::write(&socket, "").unwrap();
        fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        let seen = in_root_of(std::process::id(), link.to_str().unwrap());
        assert!(same_file(&seen, &socket));
        assert!(!same_file(&seen, &other));
        assert!(!same_file(&dir.path().join("none"), &dir.path().join("none")), "what is not there is not the same");
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
