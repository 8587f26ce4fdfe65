//! Shims that containerd does not know: processes that nobody else would ever end.
//!
//! Who kills a client of containerd in the middle of a task's creation makes containerd kill `containerd-shim-* start`,
//! which may have made the shim already and not yet said where it listens (seen with 1.6.20). Such a shim has no process
//! of a bot and waits for ever for someone to call it.
//!
//! A shim is stray when it is of our containerd and namespace, its id is a bot's, it has no child, and no task of
//! containerd's has it for its parent. It is ended when a later look, a grace time on, says the same of the same process.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use containerd_client::services::v1::ListTasksRequest;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::Instant;

use crate::api::ids::ContainerId;
use crate::containerd::{CallContext as _, CallFailed, Containerd};

/// How long a shim may be without a process of its own: one that is just being made has none yet.
const GRACE: Duration = Duration::from_secs(30);

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

/// Looks for stray shims and ends them.
#[derive(Debug)]
pub struct Shims {
    containerd: Containerd,
    /// containerd's socket, as its shims are told.
    address: String,
    namespace: String,
    since: BTreeMap<Process, Instant>,
}

impl Shims {
    /// `address` is containerd's socket, `namespace` ours in it.
    pub fn new(containerd: Containerd, address: &Path, namespace: &str) -> Self {
        let address = address.to_string_lossy().into_owned();
        Self { containerd, address, namespace: namespace.to_owned(), since: BTreeMap::new() }
    }

    /// One look: ends what was stray before, a grace time ago. Gives when to look again for what is stray now.
    pub async fn sweep(&mut self) -> Result<Option<Duration>, CallFailed> {
        let seen = self.processes();
        // Asked after the shims were found: a task that has come since is one of another shim, or none of them is stray.
        let request = self.containerd.request(ListTasksRequest::default());
        let tasks = self.containerd.tasks().list(request).await.call("list", "tasks")?.tasks;
        let strays = strays(&seen, &tasks.iter().map(|task| task.pid).collect());
        let now = Instant::now();
        self.since.retain(|process, _| strays.contains_key(process));
        let mut wait = None;
        for (process, id) in strays {
            let age = now.duration_since(*self.since.entry(process).or_insert(now));
            if age >= GRACE {
                self.end(process, &id);
            } else {
                wait = Some(wait.unwrap_or(GRACE).min(GRACE - age + Duration::from_millis(100)));
            }
        }
        Ok(wait)
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

    /// Through a descriptor of the process: the number may be another's by the time of the signal.
    fn end(&self, process: Process, id: &str) {
        let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else { return };
        let Ok(descriptor) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return };
        let still = self.look(process.pid).is_some_and(|seen| seen.process == process && seen.shim_of.is_some());
        if still && rustix::process::pidfd_send_signal(&descriptor, Signal::KILL).is_ok() {
            tracing::warn!(pid = process.pid, %id, "ended a shim without a process, which containerd does not know");
        }
    }
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
    fn stat_is_read_behind_any_name() {
        let own = stat(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(own.0, std::os::unix::process::parent_id());
        assert!(own.1 > 0);
        let odd = "7 (a) b (c) S 42 7 7 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 12345 0";
        assert_eq!(stat(odd), Some((42, 12345)));
        assert_eq!(stat("garbage"), None);
    }
}
