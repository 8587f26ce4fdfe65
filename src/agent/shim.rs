//! What is left of a task that containerd does not know: shim, bundle, runc's container, cgroups.
//!
//! containerd's own names of tasks are made to be used once. A bot's is used at each of its starts, so what is left of one
//! is in the way of the next, for ever. A creation that is cut off leaves (seen with 1.6.20, and read in its source):
//!
//! - When the client dies, containerd forgets the task at once and then waits, 5 s a call, for a shim that is still in
//!   the middle of `runc create`. What runc makes after that is nobody's: no `delete` works without the bundle, and runc
//!   refuses to make another container of that id while it has a record of one.
//! - When containerd dies, its shims see the connection break and kill `runc create`: cgroups without a container of
//!   runc's, or a container that was never started. containerd that is back knows the shim, but finds no task in it; or
//!   it can't put the bundle away, since `containerd-shim-* delete` wants a file that is written later.
//! - When containerd dies while a bundle is removed, the bundle stays under its hidden name, and every later removal of a
//!   bundle of that id fails on it.
//!
//! A bot's loop sees bundle, record and cgroups at each look ([`Shims::left`]), and takes no step before they are put away: so what
//! is noted as ended has ended, no start meets an earlier one, and a bot that is said to be removed is. A shim alone is in
//! nobody's way, since the next creation takes it for its own; it goes with the bot. What is left of bots that have no loop
//! is found by the sweeper ([`Shims::list`]).
//!
//! Of a bundle only containerd's own files are removed, never what is mounted in it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use containerd_client::services::v1::GetRequest as GetTaskRequest;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::UnmountFlags;
use rustix::process::Signal;
use tokio::time::Instant;

use crate::api::condition::{chain, cut};
use crate::api::ids::{BotUid, ContainerId};
use crate::containerd::{CallContext as _, CallFailed, Containerd};

use super::cgroup::{Cgroups, descriptor};
use super::observe::Task;

/// How long containerd may take to put away itself what was half made when its client went: it waits 5 s for a shim, up to
/// three times. A creation of the same id must not come in between, and so neither must we.
pub const LEFTOVERS: Duration = Duration::from_secs(15);

/// How long containerd may take to put away itself what a shim leaves that it sees end.
const SHIM_ENDED: Duration = Duration::from_secs(7);

/// How long a killed shim may take to be gone.
const GONE_SECONDS: i64 = 2;

/// How long a shim's delete command may take.
const DELETE: Duration = Duration::from_secs(10);

/// Where the runc shim keeps runc's records, a folder a containerd namespace. The shim has it built in.
const RUNC: &str = "/run/containerd/runc";

/// What is left of a task is not put away.
#[derive(Debug, thiserror::Error)]
pub enum PutAwayFailed {
    /// containerd did not say whether it has a task.
    #[error("can't ask whether containerd has a task")]
    Containerd(#[from] CallFailed),
    /// What can't be read is not empty.
    #[error("can't look at the machine's processes in /proc")]
    Processes(#[source] io::Error),
    /// It is still there.
    #[error(
        "what is left of an earlier task of {id} can't be put away: {path} stays; look for what holds it, for example with fuser"
    )]
    Stays {
        /// The container's id.
        id: ContainerId,
        /// A bundle, record or cgroup of it.
        path: PathBuf,
    },
}

/// What tasks leave in one containerd's namespace.
#[derive(Clone, Debug)]
pub struct Shims {
    containerd: Containerd,
    /// containerd's socket, as we see it.
    address: PathBuf,
    namespace: String,
    /// Where containerd has the bundles of that namespace: a directory a task.
    bundles: PathBuf,
    cgroups: Cgroups,
}

impl Shims {
    /// `address` is containerd's socket, `state` its state directory, `namespace` ours in it.
    pub fn new(containerd: Containerd, address: &Path, state: &Path, namespace: &str, cgroups: Cgroups) -> Self {
        let bundles = state.join("io.containerd.runtime.v2.task").join(namespace);
        Self { containerd, address: address.to_owned(), namespace: namespace.to_owned(), bundles, cgroups }
    }

    /// A bundle, runc's record or a cgroup of that id: what is left of a task, where containerd has none. Cheap.
    pub fn left(&self, id: &ContainerId) -> Option<PathBuf> {
        let there = |path: &PathBuf| fs::symlink_metadata(path).is_ok();
        let files = self.bundles(id).into_iter().chain([self.runc(id)]);
        files.chain(self.cgroups.dirs(id)).find(there)
    }

    /// runc's record of a container. runc refuses to make another of that id.
    fn runc(&self, id: &ContainerId) -> PathBuf {
        Path::new(RUNC).join(&self.namespace).join(id.as_str())
    }

    /// Ends what is left of a container whose shim is gone, whatever runc knows of it. Blocks.
    fn end_container(&self, id: &ContainerId) {
        self.cgroups.kill(id);
        self.cgroups.remove(id);
        let _ = fs::remove_dir_all(self.runc(id));
    }

    /// Every bot that has a shim or a bundle, whether or not containerd has its task, or an empty cgroup. Whose a process is
    /// that has only its cgroup can't be told: another agent of this machine may have the same parent.
    pub async fn list(&self) -> io::Result<BTreeSet<BotUid>> {
        let this = self.clone();
        let look = move || {
            let mut found: BTreeSet<BotUid> =
                this.processes()?.into_iter().filter_map(|(_, id)| ContainerId::uid_of(&id)).collect();
            match fs::read_dir(&this.bundles) {
                Ok(entries) => {
                    let names = entries
                        .collect::<io::Result<Vec<_>>>()?
                        .into_iter()
                        .filter_map(|e| e.file_name().into_string().ok());
                    found.extend(names.filter_map(|name| ContainerId::uid_of(name.strip_prefix('.').unwrap_or(&name))));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            found.extend(this.cgroups.list_empty());
            Ok(found)
        };
        tokio::task::spawn_blocking(look).await.map_err(io::Error::other)?
    }

    /// Removes what nobody can be using: the empty cgroups of a task whose bundle is gone. That is all that can be done
    /// while containerd may be at it itself.
    pub async fn tidy(&self, id: &ContainerId) -> Result<(), PutAwayFailed> {
        let (this, id) = (self.clone(), id.clone());
        let tidy = move || {
            if this.bundles(&id).iter().all(|bundle| fs::symlink_metadata(bundle).is_err()) {
                this.cgroups.remove(&id);
            }
        };
        tokio::task::spawn_blocking(tidy).await.map_err(|error| PutAwayFailed::Processes(io::Error::other(error)))
    }

    /// Puts away what is left of a task, where containerd has had its time to do it (see [`Patience`]) and has no task of
    /// that id: shims, and once there is none, runc's container, whatever process is in its cgroups, cgroups, bundle. The
    /// end of a shim is seen by containerd, which may know it, and begins to put away the rest itself: it gets its time again.
    /// `ours` says that the bot is this node's for sure; else only a bundle of our containerd's says so.
    pub async fn put_away(&self, id: &ContainerId, ours: bool) -> Result<(), PutAwayFailed> {
        if self.has_task(id).await? || self.end_shims(id).await.map_err(PutAwayFailed::Processes)? {
            return Ok(());
        }
        tracing::warn!(%id, left = ?self.left(id), "putting away what is left of a task that containerd does not know");
        let bundles = self.bundles(id);
        let ours = ours || bundles.iter().any(|bundle| fs::symlink_metadata(bundle).is_ok());
        for bundle in &bundles {
            self.delete_container(bundle, id).await;
        }
        let (this, id) = (self.clone(), id.clone());
        let rest = move || {
            if ours {
                this.end_container(&id);
            } else {
                this.cgroups.remove(&id);
            }
            for bundle in bundles {
                match remove_bundle(&bundle) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(bundle = %bundle.display(), error = %chain(&error), "a bundle stays");
                    }
                    _ => {}
                }
            }
            match this.left(&id) {
                Some(path) => Err(PutAwayFailed::Stays { id, path }),
                None => Ok(()),
            }
        };
        tokio::task::spawn_blocking(rest).await.map_err(|error| PutAwayFailed::Processes(io::Error::other(error)))?
    }

    /// Ends shims that bear the id of a bot of which nothing else is left.
    pub async fn end_idle(&self, id: &ContainerId) -> Result<(), PutAwayFailed> {
        if self.has_task(id).await? {
            // Somebody else's, who took our name.
            return Ok(());
        }
        self.end_shims(id).await.map(|_| ()).map_err(PutAwayFailed::Processes)
    }

    /// Whether containerd has a task of that id that it can find.
    async fn has_task(&self, id: &ContainerId) -> Result<bool, CallFailed> {
        let get = GetTaskRequest { container_id: id.to_string(), exec_id: String::new() };
        match self.containerd.tasks().get(self.containerd.request(get)).await.call("get task", id.as_str()) {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Where a bundle of that id may be: containerd renames it before it removes it.
    fn bundles(&self, id: &ContainerId) -> [PathBuf; 2] {
        [self.bundles.join(id.as_str()), self.bundles.join(format!(".{id}"))]
    }

    /// All shims of ours: their process, and the id of their container.
    fn processes(&self) -> io::Result<Vec<(u32, String)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let pid = entry?.file_name().to_str().and_then(|name| name.parse().ok());
            found.extend(pid.and_then(|pid| Some((pid, self.shim_of(pid)?))));
        }
        Ok(found)
    }

    /// The id of a process's container, where it is a shim of ours. `None` for a process that is gone meanwhile.
    fn shim_of(&self, pid: u32) -> Option<String> {
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let (id, address) = shim_of(&command, &self.namespace)?;
        // The same socket, by whatever path: another containerd of this machine may have our namespace too, and its processes
        // may stand in our /proc.
        same_file(&in_root_of(pid, &address), &self.address).then_some(id)
    }

    /// Kills all shims of that id and waits until they are gone; whether there were any. Through a descriptor: the number may
    /// be another's by the time of the signal.
    async fn end_shims(&self, id: &ContainerId) -> io::Result<bool> {
        let (this, id) = (self.clone(), id.clone());
        let end = move || -> io::Result<bool> {
            let mut ended = false;
            let shims = this.processes()?.into_iter().filter(|(_, of)| of == id.as_str());
            for (pid, _) in shims {
                let Some(process) = descriptor(pid) else { continue };
                if this.shim_of(pid).as_deref() != Some(id.as_str()) {
                    continue;
                }
                if rustix::process::pidfd_send_signal(&process, Signal::KILL).is_ok() {
                    let limit = Timespec { tv_sec: GONE_SECONDS, tv_nsec: 0 };
                    let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit));
                    tracing::warn!(pid, %id, "ended a shim of a task that containerd does not know");
                    ended = true;
                }
            }
            if ended {
                // What a shim of ours was at is ours. containerd puts it away by its bundle, which may have gone before it
                // was made.
                this.end_container(&id);
            }
            Ok(ended)
        };
        tokio::task::spawn_blocking(end).await.map_err(io::Error::other)?
    }

    /// As containerd does for a shim that died (runtime v2's `delete` command), where its creation came so far that there
    /// can be a container: both files are there then.
    async fn delete_container(&self, bundle: &Path, id: &ContainerId) {
        let program = fs::read_to_string(bundle.join("shim-binary-path")).unwrap_or_default();
        if program.is_empty() || !bundle.join("runtime").exists() {
            return;
        }
        let mut command = tokio::process::Command::new(program);
        command.args(["-namespace", &self.namespace, "-id", id.as_str(), "-address"]).arg(&self.address);
        command.arg("-bundle").arg(bundle).arg("delete").current_dir(bundle).stdin(Stdio::null()).kill_on_drop(true);
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
}

/// How long containerd is left alone with what is left of a bot's task. Kept by whoever tends the bot, and lost with him:
/// then it takes longer.
#[derive(Debug, Default)]
pub struct Patience {
    until: Option<Instant>,
}

impl Patience {
    /// One look at the bot's task.
    pub fn look(&mut self, task: Task) {
        if task == Task::Leftover {
            self.until.get_or_insert(Instant::now() + LEFTOVERS);
        } else {
            self.until = None;
        }
    }

    /// Whether containerd has had its time.
    pub fn is_over(&self) -> bool {
        self.until.is_some_and(|until| until <= Instant::now())
    }

    /// Something was done about it. Where that ended shims, containerd may be at it again.
    pub fn done(&mut self) {
        if self.is_over() {
            self.until = Some(Instant::now() + SHIM_ENDED);
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
}
