//! Looks at a layer by descriptors only: each name is resolved once, in the directory that is held open, and never followed.
//!
//! What is walked may be changed by a bot at any moment, so nothing here is an error that a bot can make: what vanished or became
//! something else is left out, and a later round sees what it is then.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, openat, statat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

/// What stat(2) says of a path, as far as a copy repeats or needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of a device.
    pub rdev: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes on disk.
    pub on_disk: u64,
    /// Device and number of the inode.
    pub dev: u64,
    /// See `dev`.
    pub ino: u64,
    /// Names that the inode has.
    pub links: u64,
    /// Seconds and nanoseconds.
    pub atime: (i64, i64),
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Seconds and nanoseconds.
    pub ctime: (i64, i64),
}

/// Device and number: what tells an inode from all others.
pub type Inode = (u64, u64);

impl Facts {
    /// What tells its inode from all others.
    pub fn inode(&self) -> Inode {
        (self.dev, self.ino)
    }

    fn of(stat: &rustix::fs::Stat) -> Self {
        Self {
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: stat.st_rdev,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            on_disk: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512),
            dev: stat.st_dev,
            ino: stat.st_ino,
            links: stat.st_nlink,
            atime: (stat.st_atime, i64::try_from(stat.st_atime_nsec).unwrap_or(0)),
            mtime: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            ctime: (stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or(0)),
        }
    }

    /// Its type.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }

    /// Whether it is overlayfs's mark for a path of a lower layer that is gone.
    pub fn is_whiteout(&self) -> bool {
        self.kind() == FileType::CharacterDevice && self.rdev == 0
    }
}

/// A name in a directory.
#[derive(Debug)]
pub struct Entry {
    /// Its last component.
    pub name: CString,
    /// What it is.
    pub facts: Facts,
    /// Which of [`Tree::dirs`] it is, if it is a directory.
    pub dir: Option<u32>,
}

/// A directory and what is in it.
#[derive(Debug, Default)]
pub struct Directory {
    /// Which of [`Tree::dirs`] it lies in, and which of its entries it is; `None` for the root.
    pub parent: Option<u32>,
    /// Its last component; empty for the root.
    pub name: CString,
    /// Sorted by name.
    pub entries: Vec<Entry>,
}

/// All that is below a directory, at the time of a walk.
#[derive(Debug)]
pub struct Tree {
    /// The root.
    pub root: Facts,
    /// The root first; each after the one that it lies in.
    pub dirs: Vec<Directory>,
}

impl Tree {
    /// Path of a directory relative to the root; empty for the root.
    pub fn path(&self, dir: u32) -> Vec<u8> {
        let names: Vec<_> = self.way(dir).into_iter().map(CStr::to_bytes).collect();
        names.join(&b'/')
    }

    /// Opens a directory name by name from the root, for descriptors are few and trees are deep. The error is of the first name that
    /// is no directory any more.
    pub fn open(&self, root: BorrowedFd<'_>, dir: u32) -> rustix::io::Result<OwnedFd> {
        let mut fd = open_dir(root, c".")?;
        for name in self.way(dir) {
            fd = open_dir(fd.as_fd(), name)?;
        }
        Ok(fd)
    }

    /// The names from the root to a directory.
    fn way(&self, dir: u32) -> Vec<&CStr> {
        let mut names = Vec::new();
        let mut at = dir;
        while let Some(directory) = self.dirs.get(at as usize)
            && let Some(parent) = directory.parent
        {
            names.push(directory.name.as_c_str());
            at = parent;
        }
        names.reverse();
        names
    }
}

/// Opens a directory that is not a link.
pub fn open_dir(at: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Opens the root of a layer: the path is containerd's, not the bot's.
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty())
        .map_err(|error| io::Error::new(io::Error::from(error).kind(), format!("{}: {error}", path.display())))
}

/// What a descriptor is of.
pub fn facts_of(fd: BorrowedFd<'_>) -> io::Result<Facts> {
    Ok(Facts::of(&rustix::fs::fstat(fd)?))
}

struct Todo {
    parent: Arc<OwnedFd>,
    name: CString,
    number: u32,
    above: u32,
}

#[derive(Default)]
struct Queue {
    todo: Vec<Todo>,
    busy: usize,
}

/// Looks at everything below `root`, with so many threads. `late` ends it early, and then there is no tree.
pub fn walk(root: BorrowedFd<'_>, threads: usize, late: &(dyn Fn() -> bool + Sync)) -> io::Result<Option<Tree>> {
    let facts = facts_of(root)?;
    let numbers = AtomicU32::new(1);
    let stop = AtomicBool::new(false);
    let first = Todo {
        parent: Arc::new(openat(root, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?),
        name: c".".to_owned(),
        number: 0,
        above: 0,
    };
    let queue = (Mutex::new(Queue { todo: vec![first], busy: 0 }), Condvar::new());
    let work = || -> io::Result<Vec<(u32, Directory)>> {
        let mut found = Vec::new();
        loop {
            let todo = {
                let mut state = queue.0.lock().unwrap_or_else(PoisonError::into_inner);
                loop {
                    if stop.load(Ordering::Relaxed) {
                        return Ok(found);
                    }
                    // The newest first: so few directories are open at once, however wide the tree is.
                    if let Some(todo) = state.todo.pop() {
                        state.busy += 1;
                        break todo;
                    }
                    if state.busy == 0 {
                        queue.1.notify_all();
                        return Ok(found);
                    }
                    state = queue.1.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let looked = look(&todo, facts.dev, &numbers);
            let mut state = queue.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.busy -= 1;
            match looked {
                Ok((entries, below)) => {
                    state.todo.extend(below);
                    let parent = (todo.number > 0).then_some(todo.above);
                    let name = if todo.number > 0 { todo.name } else { CString::default() };
                    found.push((todo.number, Directory { parent, name, entries }));
                }
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    queue.1.notify_all();
                    return Err(error);
                }
            }
            if late() {
                stop.store(true, Ordering::Relaxed);
            }
            drop(state);
            queue.1.notify_all();
        }
    };
    let parts: Vec<io::Result<Vec<(u32, Directory)>>> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut parts = vec![work()];
        let died = || Err(io::Error::other("a thread of the walk died"));
        parts.extend(others.into_iter().map(|thread| thread.join().unwrap_or_else(|_| died())));
        parts
    });
    let mut dirs: Vec<Directory> = Vec::new();
    dirs.resize_with(numbers.load(Ordering::Relaxed) as usize, Directory::default);
    for part in parts {
        for (number, directory) in part? {
            if let Some(place) = dirs.get_mut(number as usize) {
                *place = directory;
            }
        }
    }
    if stop.load(Ordering::Relaxed) {
        return Ok(None);
    }
    Ok(Some(Tree { root: facts, dirs }))
}

/// What is in one directory, and the directories among it.
fn look(todo: &Todo, dev: u64, numbers: &AtomicU32) -> io::Result<(Vec<Entry>, Vec<Todo>)> {
    let fd = match open_dir(todo.parent.as_fd(), &todo.name) {
        Ok(fd) => fd,
        // Gone, or something else by now.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok((Vec::new(), Vec::new())),
        Err(error) => return Err(error.into()),
    };
    let mut entries = Vec::new();
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => entries.push(Entry { name: name.to_owned(), facts: Facts::of(&stat), dir: None }),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let fd = Arc::new(fd);
    let mut below = Vec::new();
    for entry in &mut entries {
        // Another file system in a layer is none of it: nobody but the host can have mounted it there.
        if entry.facts.kind() == FileType::Directory && entry.facts.dev == dev {
            let number = numbers.fetch_add(1, Ordering::Relaxed);
            entry.dir = Some(number);
            below.push(Todo { parent: fd.clone(), name: entry.name.clone(), number, above: todo.number });
        }
    }
    Ok((entries, below))
}

/// Names and values.
pub type Xattrs = BTreeMap<CString, Vec<u8>>;

/// What can't be told by stat(2): read once, and kept as long as the rule of `take.rs` allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// All of them that root sees.
    pub xattrs: Xattrs,
    /// Of a symbolic link.
    pub target: Option<CString>,
    /// Of a regular file: [`Hasher`]'s digest.
    pub digest: Option<[u8; 32]>,
}

/// Takes the data of a file of so many bytes, and gives its digest.
pub type Sink<'a> = &'a mut dyn FnMut(&File, u64) -> io::Result<[u8; 32]>;

/// Reads what a name is: `sink` gets the data of a regular file. `None` where it is not any more what `facts` says.
pub fn read(
    dir: BorrowedFd<'_>,
    name: &CStr,
    facts: &Facts,
    cold: bool,
    sink: Option<Sink<'_>>,
) -> io::Result<Option<(Facts, Content)>> {
    // O_PATH opens nothing: a device or a pipe is not touched by being looked at.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let now = facts_of(fd.as_fd())?;
    if (now.ino, now.dev, now.kind()) != (facts.ino, facts.dev, facts.kind()) {
        return Ok(None);
    }
    let mut content = Content { xattrs: xattrs(fd.as_fd())?, ..Content::default() };
    match now.kind() {
        FileType::Symlink => content.target = Some(rustix::fs::readlinkat(&fd, c"", Vec::new())?),
        FileType::RegularFile => {
            // The inode is known to be a regular file, and stays the one that is opened.
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOATIME;
            let file = File::from(openat(CWD, magic(fd.as_fd()).as_str(), flags, Mode::empty())?);
            if cold {
                // So that the disk is asked, and not what is still in memory.
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            }
            content.digest = Some(match sink {
                Some(sink) => sink(&file, now.size)?,
                None => digest(&file, now.size)?,
            });
        }
        _ => {}
    }
    Ok(Some((now, content)))
}

/// The way to the very thing that a descriptor is of.
fn magic(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// All extended attributes of what a descriptor is of, also of links and devices.
pub fn xattrs(fd: BorrowedFd<'_>) -> io::Result<Xattrs> {
    let path = magic(fd);
    let mut names = vec![0_u8; 1024];
    let length = loop {
        match rustix::fs::listxattr(path.as_str(), &mut names[..]) {
            Ok(length) => break length,
            Err(Errno::RANGE) => names.resize(names.len() * 4, 0),
            // A file system without any.
            Err(Errno::OPNOTSUPP) => return Ok(Xattrs::new()),
            Err(error) => return Err(error.into()),
        }
    };
    let mut found = Xattrs::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let Ok(name) = CString::new(name) else { continue };
        // The mounted overlay's own number: two overlays with one would be told to be the same file system.
        if name.as_c_str() == c"trusted.overlay.uuid" {
            continue;
        }
        let mut value = vec![0_u8; 256];
        loop {
            match rustix::fs::getxattr(path.as_str(), name.as_c_str(), &mut value[..]) {
                Ok(length) => {
                    value.truncate(length);
                    found.insert(name, value);
                    break;
                }
                Err(Errno::RANGE) => value.resize(value.len() * 16, 0),
                // Removed meanwhile.
                Err(Errno::NODATA) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(found)
}

/// Bytes of a block that is hashed.
pub const BLOCK: usize = 4096;
const ZEROS: [u8; BLOCK] = [0; BLOCK];
/// Bytes that are read at once: whole blocks.
const CHUNK: usize = 64 * BLOCK;

/// The digest of a file's contents: SHA-256 of its size and of each block of 4 KiB that is not all zeros, with its number. So a hole
/// and zeros that were written are the same contents, and a hole of a terabyte costs nothing.
pub struct Hasher(Sha256);

impl Hasher {
    /// Of a file of so many bytes.
    pub fn new() -> Self {
        Self(Sha256::new())
    }

    /// Takes what lies at `offset`, a multiple of [`BLOCK`].
    pub fn take(&mut self, offset: u64, data: &[u8]) {
        for (index, block) in data.chunks(BLOCK).enumerate() {
            if *block != ZEROS[..block.len()] {
                let number = offset / BLOCK as u64 + index as u64;
                self.0.update(number.to_le_bytes());
                self.0.update(block);
            }
        }
    }

    /// The digest of a file of so many bytes.
    pub fn end(mut self, size: u64) -> [u8; 32] {
        self.0.update(size.to_le_bytes());
        self.0.finalize().into()
    }
}

/// Reads the data of a file, hole by hole, in chunks that begin at a multiple of [`BLOCK`]; gives the file's size as read.
///
/// A file that grows meanwhile is read up to what it was; one that shrinks, up to what it is.
pub fn data(file: &File, size: u64, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<u64> {
    let mut buffer = vec![0_u8; CHUNK];
    let mut at = 0_u64;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(size),
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            // A file system that knows no holes.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error.into()),
        };
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(size),
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => size,
            Err(error) => return Err(error.into()),
        };
        // Whole blocks: what is before the data in its first block is a hole, which reads as zeros.
        at = start - start % BLOCK as u64;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            let mut filled = 0;
            while filled < wanted {
                let place = buffer.get_mut(filled..wanted).unwrap_or_default();
                match file.read_at(place, at + filled as u64)? {
                    0 => break,
                    n => filled += n,
                }
            }
            each(at, buffer.get(..filled).unwrap_or_default())?;
            at += filled as u64;
            if filled < wanted {
                return Ok(at);
            }
        }
    }
    Ok(size)
}

/// The digest of a file's contents.
pub fn digest(file: &File, size: u64) -> io::Result<[u8; 32]> {
    let mut hasher = Hasher::new();
    let size = data(file, size, |offset, data| {
        hasher.take(offset, data);
        Ok(())
    })?;
    Ok(hasher.end(size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn zeros_and_holes_are_the_same_contents_and_nothing_else_is() {
        let make = |write: &dyn Fn(&mut File)| {
            let mut file = tempfile::tempfile().unwrap();
            write(&mut file);
            let size = file.metadata().unwrap().len();
            digest(&file, size).unwrap()
        };
        let hole = make(&|file| {
            file.set_len(1 << 20).unwrap();
            file.write_all_at(b"end", (1 << 20) + 5).unwrap();
        });
        let zeros = make(&|file| {
            file.write_all(&vec![0; 1 << 20]).unwrap();
            file.write_all_at(b"end", (1 << 20) + 5).unwrap();
        });
        assert_eq!(hole, zeros);
        let others: Vec<[u8; 32]> = vec![
            hole,
            make(&|file| file.write_all_at(b"end", (1 << 20) + 6).unwrap()),
            make(&|file| file.set_len((1 << 20) + 8).unwrap()),
            make(&|file| file.set_len((1 << 20) + 9).unwrap()),
            make(&|_| {}),
            make(&|file| file.write_all(b"end").unwrap()),
        ];
        for (n, one) in others.iter().enumerate() {
            assert!(others[n + 1..].iter().all(|other| other != one), "{n}");
        }
        let begin = std::time::Instant::now();
        make(&|file| file.set_len(1 << 42).unwrap());
        assert!(begin.elapsed().as_secs() < 5, "a hole is read");
    }

    #[test]
    fn a_walk_sees_all_and_follows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir_all(inside.join("a/b/c")).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("secret"), "x").unwrap();
        std::fs::write(inside.join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("a/link")).unwrap();
        for threads in [1, 4] {
            let tree = walk(open_root(&inside).unwrap().as_fd(), threads, &|| false).unwrap().unwrap();
            let mut paths: Vec<String> = Vec::new();
            for (number, directory) in tree.dirs.iter().enumerate() {
                let at = String::from_utf8(tree.path(u32::try_from(number).unwrap())).unwrap();
                assert!(directory.parent.is_none_or(|parent| parent < u32::try_from(number).unwrap()));
                paths.extend(directory.entries.iter().map(|e| format!("{at}/{}", e.name.to_str().unwrap())));
            }
            paths.sort();
            assert_eq!(
                paths,
                ["/a", "a/b", "a/b/c", "a/b/file", "a/link"].map(|p| if p == "/a" {
                    "/a".to_owned()
                } else {
                    p.to_owned()
                })
            );
        }
        assert!(walk(open_root(&inside).unwrap().as_fd(), 2, &|| true).unwrap().is_none());
    }
}
