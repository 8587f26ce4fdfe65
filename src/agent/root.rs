//! A descriptor of a layer's root directory, while no process uses the layer.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::api::ids::ContainerId;

/// A layer could not be mounted or opened.
#[derive(Debug, thiserror::Error)]
pub enum MountFailed {
    /// The kernel refused.
    #[error("can't {what} {path}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The snapshotter gave mounts that we don't know how to make.
    #[error("the snapshotter's mounts can't be used: {0}")]
    Unknown(String),
}

/// Mounts a layer, opens its root, and takes the mount out of the tree again: it lives as long as the descriptor, so that
/// nothing is left behind by a crash. The layer must not be in use: overlayfs forbids a second mount of an upper
/// directory.
pub fn open(mounts: &[Mount], mnt_dir: &Path, id: &ContainerId) -> Result<OwnedFd, MountFailed> {
    let target = mnt_dir.join(id.as_str());
    let failed = |what| {
        let path = target.clone();
        move |source: rustix::io::Errno| MountFailed::Kernel { what, path, source: source.into() }
    };
    fs::create_dir_all(&target).map_err(|source| MountFailed::Kernel {
        what: "create",
        path: target.clone(),
        source,
    })?;
    let [mount] = mounts else {
        return Err(MountFailed::Unknown(format!("{} mounts where one is expected", mounts.len())));
    };
    let (flags, data) = options(&mount.options);
    if mount.r#type == "bind" {
        rustix::mount::mount_bind(mount.source.as_str(), &target).map_err(failed("bind-mount a layer on"))?;
    } else {
        let data = std::ffi::CString::new(data).map_err(|_| MountFailed::Unknown("a NUL in the options".into()))?;
        rustix::mount::mount(mount.source.as_str(), &target, mount.r#type.as_str(), flags, Some(data.as_c_str()))
            .map_err(failed("mount a layer on"))?;
    }
    let root = rustix::fs::open(&target, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    // Detached at once. A crash between the mount and this leaves a mount, which `remove_leftovers` finds.
    let detached = rustix::mount::unmount(&target, UnmountFlags::DETACH);
    let root = root.map_err(failed("open the layer at"))?;
    detached.map_err(failed("unmount the layer from"))?;
    // Best effort: an empty directory is no leak worth failing for, and the next bot start removes it.
    let _ = fs::remove_dir(&target);
    Ok(root)
}

/// Opens the root directory that a process sees.
pub fn of_process(pid: u32) -> Result<OwnedFd, MountFailed> {
    let path = PathBuf::from(format!("/proc/{pid}/root"));
    rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|source| MountFailed::Kernel { what: "open the root of the process at", path, source: source.into() })
}

/// Takes away what a crash left below `mnt_dir`. For the agent's start, when no layer is being opened.
pub fn remove_leftovers(mnt_dir: &Path) -> Result<(), MountFailed> {
    let entries = match fs::read_dir(mnt_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(MountFailed::Kernel { what: "read", path: mnt_dir.to_owned(), source }),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        // EINVAL says that nothing is mounted there any more.
        while rustix::mount::unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
        fs::remove_dir(&path).map_err(|source| MountFailed::Kernel { what: "remove", path, source })?;
    }
    Ok(())
}

/// fstab-like options as flags and what is left for the file system.
fn options(options: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" | "rbind" | "bind" => {}
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            other => data.push(other),
        }
    }
    // Nothing of a bot's tree is ever run or used as a device through this mount.
    flags |= MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    (flags, data.join(","))
}
