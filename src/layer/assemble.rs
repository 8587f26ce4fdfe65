//! Makes the tree of what was held: every name, every fact. Nobody else writes there yet.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, linkat, lsetxattr, mkdirat,
    mknodat, renameat, symlinkat, utimensat,
};

use super::take::{Known, Stage, Take};
use super::tree::{Entry, Facts, Inode, Tree, open_dir};

/// Makes in `dest`, an empty directory, what `tree` says, of what `take` has read.
pub fn assemble(tree: &Tree, take: &mut Take, dest: BorrowedFd<'_>) -> io::Result<()> {
    // What a snapshotter put there is not the bot's.
    let mut linked = HashMap::new();
    directory(tree, 0, take, dest, &mut linked)?;
    let root = missing(take.known(tree.root.inode()))?.clone();
    dress(dest, c".", &tree.root, &root)
}

/// Everything below a directory; an explicit stack, for trees may be deeper than ours.
fn directory(
    tree: &Tree,
    number: u32,
    take: &mut Take,
    dest: BorrowedFd<'_>,
    linked: &mut HashMap<Inode, u64>,
) -> io::Result<()> {
    struct Level {
        fd: OwnedFd,
        number: u32,
        next: usize,
    }
    let mut levels = vec![Level { fd: open_dir(dest, c".")?, number, next: 0 }];
    while let Some(level) = levels.last_mut() {
        let entries =
            tree.dirs.get(level.number as usize).map(|directory| directory.entries.as_slice()).unwrap_or_default();
        let Some(entry) = entries.get(level.next) else {
            levels.pop();
            // What was made in it moved its times: they come last.
            if let Some(above) = levels.last() {
                let entries = tree.dirs.get(above.number as usize).map(|d| d.entries.as_slice()).unwrap_or_default();
                if let Some(made) = above.next.checked_sub(1).and_then(|n| entries.get(n)) {
                    let known = missing(take.known(made.facts.inode()))?.clone();
                    dress(above.fd.as_fd(), &made.name, &made.facts, &known)?;
                }
            }
            continue;
        };
        level.next += 1;
        match entry.dir {
            Some(number) => {
                mkdirat(&level.fd, &entry.name, Mode::RWXU)?;
                let fd = open_dir(level.fd.as_fd(), &entry.name)?;
                levels.push(Level { fd, number, next: 0 });
            }
            None => file(entry, level.fd.as_fd(), take, linked)?,
        }
    }
    Ok(())
}

fn file(entry: &Entry, dir: BorrowedFd<'_>, take: &mut Take, linked: &mut HashMap<Inode, u64>) -> io::Result<()> {
    let facts = &entry.facts;
    if facts.kind() == FileType::Directory {
        // Another file system, mounted into the layer by the host.
        return Err(io::Error::other(format!("{:?} is on another file system than the layer", entry.name)));
    }
    let known = missing(take.known(facts.inode()))?.clone();
    if facts.links < 2 {
        make(dir, &entry.name, facts, &known, take)?;
        return dress(dir, &entry.name, facts, &known);
    }
    // One of several names: it is made in the stage, once, and linked from there.
    let number = match linked.get(&facts.inode()) {
        Some(number) => *number,
        None => {
            let stage = take.stage();
            let number = stage.number();
            let (name, fd) = (Stage::name(number), open_dir(stage.dir(), c".")?);
            make(fd.as_fd(), &name, facts, &known, take)?;
            dress(fd.as_fd(), &name, facts, &known)?;
            linked.insert(facts.inode(), number);
            number
        }
    };
    linkat(take.stage().dir(), Stage::name(number), dir, &entry.name, AtFlags::empty())?;
    Ok(())
}

fn make(dir: BorrowedFd<'_>, name: &CStr, facts: &Facts, known: &Known, take: &mut Take) -> io::Result<()> {
    match facts.kind() {
        FileType::RegularFile => {
            let number = known.staged.ok_or_else(|| io::Error::other(format!("{name:?} was not copied")))?;
            renameat(take.stage().dir(), Stage::name(number), dir, name)?;
        }
        FileType::Symlink => symlinkat(known.content.target.as_deref().unwrap_or(c"."), dir, name)?,
        // Devices, whiteouts among them, pipes, sockets.
        kind => mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, facts.rdev)?,
    }
    Ok(())
}

/// Owner, mode, attributes and times, in the order in which none undoes another: a change of owner takes set-uid bits and
/// capabilities away, and all of them move ctime only.
fn dress(dir: BorrowedFd<'_>, name: &CStr, facts: &Facts, known: &Known) -> io::Result<()> {
    let link = facts.kind() == FileType::Symlink;
    chownat(dir, name, Some(Uid::from_raw(facts.uid)), Some(Gid::from_raw(facts.gid)), AtFlags::SYMLINK_NOFOLLOW)?;
    if !link {
        // Nobody but us is there to put a link in its place.
        chmodat(dir, name, Mode::from_raw_mode(facts.mode), AtFlags::empty())?;
    }
    if !known.content.xattrs.is_empty() {
        let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.to_bytes());
        for (attribute, value) in &known.content.xattrs {
            lsetxattr(path.as_slice(), attribute.as_c_str(), value, XattrFlags::empty()).map_err(|error| {
                let kind = io::Error::from(error).kind();
                io::Error::new(kind, format!("can't set {attribute:?} of {name:?}: {error}"))
            })?;
        }
    }
    let time = |(seconds, nanos): (i64, i64)| Timespec { tv_sec: seconds, tv_nsec: nanos as _ };
    let times = Timestamps { last_access: time(facts.atime), last_modification: time(facts.mtime) };
    utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

fn missing(known: Option<&Known>) -> io::Result<&Known> {
    known.ok_or_else(|| io::Error::other("a file of the layer was not read"))
}
