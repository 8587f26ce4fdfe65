//! Network namespaces with a name: bind mounts of nsfs under `run_dir/netns`, as `ip netns` and CRI make them.
//!
//! A namespace lives as long as a process is in it or a mount holds it. The mount is what lets a bot's namespace outlive
//! the crash of its task. containerd's shim opens the path to put the task's process into it, in *its* mount namespace:
//! so the directory must be on a shared mount, or the bind mounts made here stay unseen there. On a host everything
//! below `/` is shared (systemd does that); where it is not, [`prepare`] makes the directory a shared mount. An agent in a
//! Pod has left the Pod's mount namespace for that of containerd before it comes here.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use super::netlink;

/// Which namespace it is: nsfs gives an inode number to each. Numbers are used again after a namespace is gone, and all
/// begin anew at boot, so one alone proves little; with the host interface's index and the boot's id it is proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

/// What is at a namespace's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mounted {
    Nothing,
    /// A file that is no namespace: left between creating the file and mounting on it, or unmounted by someone.
    PlainFile,
    Namespace(Identity),
}

/// Looks at a namespace's path.
pub(super) fn look(path: &Path) -> io::Result<Mounted> {
    let status = match rustix::fs::statfs(path) {
        Err(rustix::io::Errno::NOENT) => return Ok(Mounted::Nothing),
        status => status?,
    };
    // NSFS_MAGIC; the type of `f_type` differs between architectures.
    if status.f_type as u64 != libc::NSFS_MAGIC as u64 {
        return Ok(Mounted::PlainFile);
    }
    let meta = std::fs::metadata(path)?;
    Ok(Mounted::Namespace(Identity { device: meta.dev(), inode: meta.ino() }))
}

/// When what is at the path was made there.
pub(super) fn made_at(path: &Path) -> io::Result<SystemTime> {
    std::fs::metadata(path)?.modified()
}

/// Makes the directory, and makes it a shared mount unless it is on one.
pub(super) fn prepare(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    // /proc/self is the process's first thread, which may be in another mount namespace than this one.
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    let real = directory.canonicalize()?;
    if is_shared(&table, &real) {
        return Ok(());
    }
    if !is_mount_point(&table, &real) {
        mount_bind(&real, &real)?;
    }
    mount_change(&real, MountPropagationFlags::SHARED)?;
    Ok(())
}

/// The lines of a mount table (proc_pid_mountinfo(5)): mount point, and whether the mount is shared.
fn mounts(table: &[u8]) -> impl Iterator<Item = (PathBuf, bool)> + '_ {
    table.split(|b| *b == b'\n').filter_map(|line| {
        let mut fields = line.split(|b| *b == b' ');
        let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(4)?)));
        // After the options come optional fields, ended by a dash.
        let shared = fields.skip(1).take_while(|f| *f != b"-").any(|f| f.starts_with(b"shared:"));
        Some((point, shared))
    })
}

/// Space, tab, newline and backslash are written as octal in a mount table.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

/// Whether the mount that a path is on is shared. Of several on one point the last covers the others.
fn is_shared(table: &[u8], path: &Path) -> bool {
    mounts(table)
        .filter(|(point, _)| path.starts_with(point))
        .enumerate()
        .max_by_key(|(order, (point, _))| (point.components().count(), *order))
        .is_some_and(|(_, (_, shared))| shared)
}

fn is_mount_point(table: &[u8], path: &Path) -> bool {
    mounts(table).any(|(point, _)| point == path)
}

/// Makes a network namespace with its loopback up and mounts it at `path`. Blocks for about a millisecond.
///
/// Must run on a thread of its own that ends afterwards: the thread itself moves into the namespace, and nothing else
/// may ever run there.
fn create_here(path: &Path) -> io::Result<Identity> {
    // SAFETY: only FILES is unsafe to unshare; this takes a new network namespace for this thread alone.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)? };
    netlink::loopback_up()?;
    mount_bind("/proc/thread-self/ns/net", path)?;
    match look(path)? {
        Mounted::Namespace(identity) => Ok(identity),
        Mounted::Nothing | Mounted::PlainFile => Err(io::Error::other("the mount did not take")),
    }
}

/// Makes the file that a namespace is mounted on. Apart from [`create`], since a disk that is full says so here, and the
/// same word there means that the kernel takes no more namespaces or mounts. Fine when it is there.
pub(super) fn make_file(path: &Path) -> io::Result<()> {
    match std::fs::OpenOptions::new().write(true).create_new(true).open(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map(drop),
    }
}

/// Makes a network namespace with its loopback up and mounts it at `path`, where a file is.
pub(super) async fn create(path: PathBuf) -> io::Result<Identity> {
    let (done, made) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("netns".to_owned()).spawn(move || {
        // Nobody waiting is no error: what was made is found by its path.
        let _ = done.send(create_here(&path));
    })?;
    made.await.unwrap_or_else(|_| Err(io::Error::other("the thread that makes the namespace died")))
}

/// Unmounts and removes what is at `path`. Fine when nothing is. The namespace itself goes with its last process.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    // More than one mount may lie there, if a cut-off run mounted twice.
    loop {
        match unmount(path, UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(rustix::io::Errno::INVAL) => break,
            Err(e) => return Err(e.into()),
        }
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 8:1 / / rw shared:1 - ext4 /dev/sda rw\n\
        30 22 0:25 / /run rw,nosuid shared:5 master:2 - tmpfs tmpfs rw\n\
        31 30 0:26 / /run/private rw - tmpfs tmpfs rw\n\
        32 30 0:27 / /run/with\\040space rw shared:9 - tmpfs tmpfs rw\n\
        33 22 0:28 / /data rw shared:10 - tmpfs tmpfs rw\n\
        34 33 0:29 / /data rw - tmpfs tmpfs rw\n";

    #[test]
    fn a_mount_table_tells_whether_a_path_is_on_a_shared_mount() {
        for (path, shared, point) in [
            ("/run/berth/netns", true, false),
            ("/run/private/netns", false, false),
            ("/run/private", false, true),
            ("/run/with space", true, true),
            ("/running", true, false),
            ("/data/x", false, false),
        ] {
            assert_eq!(is_shared(TABLE, Path::new(path)), shared, "{path}");
            assert_eq!(is_mount_point(TABLE, Path::new(path)), point, "{path}");
        }
    }
}
