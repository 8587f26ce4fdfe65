//! Looking into a bot's root file system, which is hostile, through descriptors.
//!
//! Every path is resolved once, by `openat2`, with the bot's root as its root and without magic links, and acted on
//! through the descriptor that this gave (FAULTS.md, rules 7 to 9). Nothing here blocks on what an image may hold: a
//! FIFO or a device is looked at with `O_PATH` and refused, never opened.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use crate::api::condition::Reason;

/// What was found in a bot's root that can't be worked with, or how the look failed.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The path can't name something below a root.
    #[error("{path:?} is no path that can be used here: it must be absolute, at most 4095 bytes, without .. and NUL")]
    BadPath {
        /// As it was given.
        path: String,
    },
    /// A link, file or device stands where only a directory is safe.
    #[error(
        "the image has a {found} at {path} where only a directory is safe; use an image in which it is a directory, or another path"
    )]
    NotADirectory {
        /// Path in the bot's root.
        path: String,
        /// What is there.
        found: &'static str,
    },
    /// A link, directory or device stands where a file is read.
    #[error("the image has a {found} at {path} where only a regular file is read; use an image in which it is one")]
    NotAFile {
        /// Path in the bot's root.
        path: String,
        /// What is there.
        found: &'static str,
    },
    /// A file is larger than we are willing to read.
    #[error("{path} in the image has more than {limit} bytes; make it smaller")]
    TooLarge {
        /// Path in the bot's root.
        path: String,
        /// Most bytes that are read.
        limit: u64,
    },
    /// Links lead round in a circle, or there are too many.
    #[error("{path} in the image leads through too many links; use an image in which it does not")]
    TooManyLinks {
        /// Path in the bot's root.
        path: String,
    },
    /// The path leads to where the kernel shows processes and descriptors.
    #[error(
        "{path} leads to {leads_to}, below /proc or /dev, where it could reach descriptors of the host; use another directory"
    )]
    LeadsOut {
        /// Path in the bot's root.
        path: String,
        /// Where its links lead.
        leads_to: String,
    },
    /// The kernel refused a call.
    #[error("{call} {path} in the bot's root")]
    Io {
        /// What was tried.
        call: &'static str,
        /// Path in the bot's root.
        path: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl RootError {
    /// The reason for condition and Event.
    pub fn reason(&self) -> Reason {
        match self {
            Self::BadPath { .. }
            | Self::NotADirectory { .. }
            | Self::NotAFile { .. }
            | Self::TooLarge { .. }
            | Self::TooManyLinks { .. }
            | Self::LeadsOut { .. } => Reason::InvalidSpec,
            Self::Io { .. } => Reason::StorageFailed,
        }
    }

    /// Whether trying again, with nothing edited, can help.
    pub fn retryable(&self) -> bool {
        match self {
            // What stands in the layer stays there until the image or the path is changed.
            Self::BadPath { .. }
            | Self::NotADirectory { .. }
            | Self::NotAFile { .. }
            | Self::TooLarge { .. }
            | Self::TooManyLinks { .. }
            | Self::LeadsOut { .. } => false,
            // A full disk is emptied, a lost one comes back.
            Self::Io { .. } => true,
        }
    }

    /// Whether it speaks of this path or of one above it.
    pub fn is_on(&self, path: &str) -> bool {
        match self {
            Self::BadPath { path: here } => *here == shown(path),
            Self::NotADirectory { path: here, .. }
            | Self::NotAFile { path: here, .. }
            | Self::TooLarge { path: here, .. }
            | Self::TooManyLinks { path: here }
            | Self::LeadsOut { path: here, .. }
            | Self::Io { path: here, .. } => {
                path.strip_prefix(here.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }

    fn io(call: &'static str, path: &str, errno: Errno) -> Self {
        Self::Io { call, path: path.to_owned(), source: errno.into() }
    }
}

/// Directories that the runtime mounts over. Were one a link, the mount would land where the link leads.
const MOUNTED_OVER: [&str; 3] = ["/dev", "/proc", "/sys"];

/// Refuses a root whose `/dev`, `/proc`, `/sys` or data path is there and is no directory, or is reached through a link.
/// What is missing is fine: it is made before the start.
pub fn check_root(root: BorrowedFd, data: &str) -> Result<(), RootError> {
    for path in MOUNTED_OVER.into_iter().chain([data]) {
        let mut at = None;
        for step in Steps::of(path)? {
            let parent = at.as_ref().map_or(root, AsFd::as_fd);
            match enter(parent, &step)? {
                Some(directory) => at = Some(directory),
                None => break,
            }
        }
    }
    Ok(())
}

/// Makes a directory and those above it, without following a link. The new one gets owner and mode as given, those above
/// it root and 0755; one that is there already is left as it is. Cut off in the middle, it can be called again: the
/// directory appears under its name only once owner and mode are right.
pub fn ensure_directory(root: BorrowedFd, path: &str, uid: u32, gid: u32, mode: u32) -> Result<(), RootError> {
    let steps = Steps::of(path)?;
    let last = steps.len().saturating_sub(1);
    let mut at: Option<OwnedFd> = None;
    for (i, step) in steps.into_iter().enumerate() {
        let parent = at.as_ref().map_or(root, AsFd::as_fd);
        let (uid, gid, mode) = if i == last { (uid, gid, mode) } else { (0, 0, 0o755) };
        let directory = match enter(parent, &step)? {
            Some(directory) => directory,
            None => make(parent, &step, uid, gid, mode)?,
        };
        at = Some(directory);
    }
    Ok(())
}

/// Refuses a working directory whose links lead below `/proc` or `/dev`. The runtime enters it while descriptors of the
/// host are still open (CVE-2024-21626), and only what is mounted there later decides what it is.
pub fn check_working_directory(root: BorrowedFd, path: &str) -> Result<(), RootError> {
    /// As many as the kernel follows.
    const MAX_LINKS: usize = 40;
    let mut todo: Vec<OsString> = names_reversed(Path::new(path));
    let mut reached: Vec<OsString> = Vec::new();
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == ".." {
            reached.pop();
            continue;
        }
        reached.push(name);
        if reached.first().is_some_and(|top| top == "proc" || top == "dev") {
            reached.extend(todo.into_iter().rev());
            let leads_to = format!("/{}", reached.join(&OsString::from("/")).to_string_lossy());
            return Err(RootError::LeadsOut { path: path.to_owned(), leads_to });
        }
        let here = reached.join(&OsString::from("/"));
        let target = match open(root, Path::new(&here), OFlags::PATH | OFlags::NOFOLLOW, ResolveFlags::IN_ROOT) {
            Ok(entry) if kind_of(&entry, path)? == FileType::Symlink => {
                rustix::fs::readlinkat(&entry, "", Vec::new()).map_err(|e| RootError::io("read link", path, e))?
            }
            // The runtime makes what is missing, where it is missing; what is no directory fails at the start.
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(Errno::LOOP) => return Err(RootError::TooManyLinks { path: path.to_owned() }),
            Err(e) => return Err(RootError::io("open", path, e)),
        };
        links += 1;
        if links > MAX_LINKS {
            return Err(RootError::TooManyLinks { path: path.to_owned() });
        }
        let target = OsString::from_vec(target.into_bytes());
        reached.pop();
        if target.as_bytes().starts_with(b"/") {
            reached.clear();
        }
        todo.extend(names_reversed(Path::new(&target)));
    }
    Ok(())
}

fn names_reversed(path: &Path) -> Vec<OsString> {
    let mut names: Vec<OsString> = path
        .components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect();
    names.reverse();
    names
}

/// Reads a regular file below `root`, links being followed inside it only; `None` when it is not there. `path` may be
/// relative: it then starts at `root` too.
pub fn read_file(root: BorrowedFd, path: &str, limit: u64) -> Result<Option<Vec<u8>>, RootError> {
    let entry = match open(root, Path::new(path), OFlags::PATH, ResolveFlags::IN_ROOT) {
        Ok(entry) => entry,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(Errno::LOOP) => return Err(RootError::TooManyLinks { path: path.to_owned() }),
        Err(Errno::INVAL | Errno::NAMETOOLONG) => return Err(RootError::BadPath { path: shown(path) }),
        Err(e) => return Err(RootError::io("open", path, e)),
    };
    let kind = kind_of(&entry, path)?;
    if kind != FileType::RegularFile {
        return Err(RootError::NotAFile { path: path.to_owned(), found: name_of(kind) });
    }
    // An O_PATH descriptor can't be read; its name in /proc leads to the very same file, whatever `path` is by now.
    let name = format!("/proc/self/fd/{}", entry.as_raw_fd());
    let file =
        rustix::fs::open(name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
            .map_err(|e| RootError::io("open", path, e))?;
    let mut bytes = Vec::new();
    File::from(file).take(limit + 1).read_to_end(&mut bytes).map_err(|source| RootError::Io {
        call: "read",
        path: path.to_owned(),
        source,
    })?;
    if bytes.len() as u64 > limit {
        return Err(RootError::TooLarge { path: path.to_owned(), limit });
    }
    Ok(Some(bytes))
}

/// Opens the directory at `path`, no link being followed on the way; `None` when it is not there.
pub fn open_directory(root: BorrowedFd, path: &str) -> Result<Option<OwnedFd>, RootError> {
    let mut at: Option<OwnedFd> = None;
    for step in Steps::of(path)? {
        let parent = at.as_ref().map_or(root, AsFd::as_fd);
        match enter(parent, &step)? {
            Some(directory) => at = Some(directory),
            None => return Ok(None),
        }
    }
    at.map_or_else(
        || root.try_clone_to_owned().map_err(|source| RootError::Io { call: "open", path: path.to_owned(), source }),
        Ok,
    )
    .map(Some)
}

/// Puts a file of that name into `directory`, whole or not at all, in the place of a file that is there: a link there is
/// replaced, not followed, and a directory there refused. `shown` is the file's path for messages.
pub fn put_file(
    directory: BorrowedFd,
    name: &str,
    shown: &str,
    content: &[u8],
    owner: (u32, u32),
) -> Result<(), RootError> {
    const PASSING: &str = ".berth-new-file";
    let io = |call: &'static str| move |errno: Errno| RootError::io(call, shown, errno);
    match rustix::fs::unlinkat(directory, PASSING, AtFlags::empty()) {
        // Left behind by an attempt that was cut off.
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(RootError::io("remove what was left while making", shown, e)),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, PASSING, flags, Mode::from_raw_mode(0o600)).map_err(io("make"))?;
    let (uid, gid) = (rustix::fs::Uid::from_raw(owner.0), rustix::fs::Gid::from_raw(owner.1));
    rustix::fs::fchown(&file, Some(uid), Some(gid)).map_err(io("give an owner to"))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644)).map_err(io("set the mode of"))?;
    let mut file = File::from(file);
    let written =
        file.write_all(content).map_err(|source| RootError::Io { call: "write", path: shown.to_owned(), source });
    let named = written.and_then(|()| rustix::fs::renameat(directory, PASSING, directory, name).map_err(io("name")));
    if named.is_err() {
        // What can't be put is not left either; the next attempt removes what stays.
        let _ = rustix::fs::unlinkat(directory, PASSING, AtFlags::empty());
    }
    named
}

/// One name of a path, with the path up to it for messages.
struct Step {
    name: String,
    path: String,
}

struct Steps;

impl Steps {
    fn of(path: &str) -> Result<Vec<Step>, RootError> {
        let bad = || RootError::BadPath { path: shown(path) };
        if !path.starts_with('/') || path.len() > 4095 || path.contains('\0') {
            return Err(bad());
        }
        let mut so_far = String::new();
        let mut steps = Vec::new();
        for name in path.split('/').filter(|name| !name.is_empty() && *name != ".") {
            if name == ".." || name.len() > 255 {
                return Err(bad());
            }
            so_far.push('/');
            so_far.push_str(name);
            steps.push(Step { name: name.to_owned(), path: so_far.clone() });
        }
        Ok(steps)
    }
}

fn shown(path: &str) -> String {
    crate::api::condition::cut(path, 200)
}

/// Opens the directory of that name, itself, not what a link leads to; `None` when nothing is there.
fn enter(parent: BorrowedFd, step: &Step) -> Result<Option<OwnedFd>, RootError> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let entry = match open(parent, Path::new(&step.name), OFlags::PATH | OFlags::NOFOLLOW, resolve) {
        Ok(entry) => entry,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(RootError::NotADirectory { path: step.path.clone(), found: "link" }),
        Err(e) => return Err(RootError::io("open", &step.path, e)),
    };
    match kind_of(&entry, &step.path)? {
        FileType::Directory => Ok(Some(entry)),
        other => Err(RootError::NotADirectory { path: step.path.clone(), found: name_of(other) }),
    }
}

/// Makes a directory under a passing name, gives it owner and mode, then its name.
fn make(parent: BorrowedFd, step: &Step, uid: u32, gid: u32, mode: u32) -> Result<OwnedFd, RootError> {
    const PASSING: &str = ".berth-new-directory";
    let io = |call: &'static str| move |errno: Errno| RootError::io(call, &step.path, errno);
    match rustix::fs::mkdirat(parent, PASSING, Mode::RWXU) {
        Err(Errno::EXIST) => {
            // Left behind by an attempt that was cut off, so it is empty.
            rustix::fs::unlinkat(parent, PASSING, AtFlags::REMOVEDIR)
                .map_err(io("remove what was left while making"))?;
            rustix::fs::mkdirat(parent, PASSING, Mode::RWXU).map_err(io("make"))?;
        }
        made => made.map_err(io("make"))?,
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let directory = open(parent, Path::new(PASSING), flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
        .map_err(io("open"))?;
    let (owner, group) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
    rustix::fs::fchown(&directory, Some(owner), Some(group)).map_err(io("give an owner to"))?;
    rustix::fs::fchmod(&directory, Mode::from_raw_mode(mode)).map_err(io("set the mode of"))?;
    rustix::fs::renameat_with(parent, PASSING, parent, &step.name, RenameFlags::NOREPLACE).map_err(io("name"))?;
    Ok(directory)
}

/// `openat2` that never follows magic links, and tries again where the kernel says that a rename got in the way.
fn open(at: BorrowedFd, path: &Path, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
    const TRIES: usize = 32;
    let mut result = Err(Errno::AGAIN);
    for _ in 0..TRIES {
        let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
        result = rustix::fs::openat2(at, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
        if !matches!(result, Err(Errno::AGAIN | Errno::INTR)) {
            break;
        }
    }
    result
}

fn kind_of(entry: &OwnedFd, path: &str) -> Result<FileType, RootError> {
    let stat = rustix::fs::fstat(entry).map_err(|e| RootError::io("stat", path, e))?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "link",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        _ => "thing of unknown kind",
    }
}

#[cfg(test)]
mod tests;
