//! A descriptor of a layer's root directory, while no process uses the layer.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

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
/// directory. `name` is where it is mounted for a moment: nobody else's at the same time.
pub fn open(mounts: &[Mount], mnt_dir: &Path, name: &str) -> Result<OwnedFd, MountFailed> {
    let target = mnt_dir.join(name);
    let failed = |what| {
        let path = target.clone();
        move |source: Errno| MountFailed::Kernel { what, path, source: source.into() }
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
        let (from, data) = relative(&data).unwrap_or_else(|| (PathBuf::from("/"), data));
        let data = CString::new(data).map_err(|_| MountFailed::Unknown("a NUL in the options".into()))?;
        mount_from(&from, mount, &target, flags, &data).map_err(failed("mount a layer on"))?;
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

/// mount(2) takes a page of options, NUL included, and cuts off what is longer without a word (mount(2), "data").
const OPTIONS_MOST: usize = 4096;

/// Options that are too long for mount(2), with their lower directories relative to the directory that all of them are in:
/// an image of 60 layers has that many.
fn relative(data: &str) -> Option<(PathBuf, String)> {
    if data.len() < OPTIONS_MOST {
        return None;
    }
    let lower = data.split(',').find_map(|option| option.strip_prefix("lowerdir="))?;
    let first = lower.split(':').next().map(Path::new)?;
    let common = first.ancestors().find(|dir| lower.split(':').all(|path| Path::new(path).starts_with(dir)))?;
    let short: Vec<&str> =
        lower.split(':').filter_map(|path| Path::new(path).strip_prefix(common).ok()?.to_str()).collect();
    let data = data.replace(&format!("lowerdir={lower}"), &format!("lowerdir={}", short.join(":")));
    (data.len() < OPTIONS_MOST).then(|| (common.to_owned(), data))
}

/// mount(2) in a thread with a working directory of its own.
fn mount_from(from: &Path, mount: &Mount, target: &Path, flags: MountFlags, data: &CStr) -> Result<(), Errno> {
    if from == Path::new("/") {
        return rustix::mount::mount(mount.source.as_str(), target, mount.r#type.as_str(), flags, Some(data));
    }
    let mounting = || {
        // SAFETY: only FILES is unsafe to unshare; this takes a working directory for this thread alone.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS)? };
        rustix::process::chdir(from)?;
        rustix::mount::mount(mount.source.as_str(), target, mount.r#type.as_str(), flags, Some(data))
    };
    std::thread::scope(|scope| scope.spawn(mounting).join().unwrap_or(Err(Errno::IO)))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn open_overlay(layers: usize) -> String {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: String| dir.path().join("a-folder-with-a-name-of-some-length").join(name);
        let lower: Vec<PathBuf> = (0..layers).map(|n| at(format!("{n}/fs"))).collect();
        for path in lower.iter().chain(&[at("upper".into()), at("work".into())]) {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(lower.last().unwrap().join("file"), "of the lowest").unwrap();
        let lower: Vec<&str> = lower.iter().map(|path| path.to_str().unwrap()).collect();
        let options = [
            format!("workdir={}", at("work".into()).display()),
            format!("upperdir={}", at("upper".into()).display()),
            format!("lowerdir={}", lower.join(":")),
        ];
        let mount =
            Mount { r#type: "overlay".into(), source: "overlay".into(), options: options.into(), ..Mount::default() };
        let root = open(&[mount], &dir.path().join("mnt"), "a-bot").unwrap();
        let before = std::env::current_dir().unwrap();
        let file = crate::oci::rootfs::read_file(std::os::fd::AsFd::as_fd(&root), "/file", 100).unwrap().unwrap();
        assert_eq!(std::env::current_dir().unwrap(), before);
        assert_eq!(fs::read_dir(dir.path().join("mnt")).unwrap().count(), 0, "a mount is left in the tree");
        String::from_utf8(file).unwrap()
    }

    /// Harm done: the options of an image with some sixty layers were cut off in the middle, and its bots never started.
    #[test]
    fn a_layer_on_a_hundred_others_is_opened() {
        assert_eq!(open_overlay(2), "of the lowest");
        assert_eq!(open_overlay(125), "of the lowest");
    }

    #[test]
    fn short_options_stay_as_they_are() {
        assert_eq!(relative("lowerdir=/a/1/fs:/a/2/fs,upperdir=/a/3/fs"), None);
        let many: Vec<String> = (0..400).map(|n| format!("/var/lib/{n}/fs")).collect();
        let (from, data) = relative(&format!("index=off,lowerdir={},workdir=/w", many.join(":"))).unwrap();
        assert_eq!(from, Path::new("/var/lib"));
        assert!(data.starts_with("index=off,lowerdir=0/fs:1/fs:") && data.ends_with(":399/fs,workdir=/w"), "{data}");
    }
}
