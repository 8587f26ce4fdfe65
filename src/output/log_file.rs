//! One bot's log on disk: `LOG_ROOT/NAMESPACE_NAME_UID/0.log`, before it `0.log.1` (newer) … `0.log.N` (older).
//!
//! Bounded: before the current file would grow beyond its limit it is renamed to `.1`, the others move up by one, and the oldest is
//! removed *first*, so that at no moment there is more than `max_files` × `max_file_bytes`. Each rename is atomic, and
//! when we are killed between two of them there is a gap in the numbers, which the next rotation closes; no record is lost.
//!
//! Never in the way: whatever the disk answers (full, quota, read-only, I/O error, directory gone), [`LogFile::append`] returns, and
//! what could not be written is dropped and counted in [`Drops`], on tmpfs so that the count outlives us and a full disk. When the disk
//! takes writes again, the first record says how much is missing.
//!
//! Whole: only whole records are in the file. A write that was cut short (by ENOSPC, or by our death: the kernel stops copying
//! when a fatal signal is pending) is cut back to the end of the last whole record.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use super::dir_name::BotDirName;
use super::record::{self, MAX_RECORD, Stamp, Stream, Tag};

/// Name of the current file; `*.log` is what collectors look for in `/var/log/pods`.
pub const CURRENT: &str = "0.log";

/// How long a disk that refused is left alone, so that a flood into a full disk costs no system call per read.
const RETRY: Duration = Duration::from_millis(200);

/// How often it is looked whether someone removed the file under us.
const CHECK: Duration = Duration::from_secs(1);

/// The bounds of one bot's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of one file. At least a record of the largest size is always allowed.
    pub max_file_bytes: u64,
    /// Files in all, the current one included; at least 1.
    pub max_files: u32,
}

/// The log of one bot, open for writing.
#[derive(Debug)]
pub struct LogFile {
    root: PathBuf,
    name: BotDirName,
    bounds: Bounds,
    open: Option<Open>,
    drops: Drops,
    retry_at: Option<Instant>,
    check_at: Option<Instant>,
}

#[derive(Debug)]
struct Open {
    dir: OwnedFd,
    file: OwnedFd,
    /// End of the last whole record.
    size: u64,
    /// The file goes on behind `size`, with half a record.
    torn: bool,
}

impl LogFile {
    /// Nothing is opened yet: the first append does it, and if it can't, drops.
    pub fn new(root: PathBuf, name: BotDirName, bounds: Bounds, drops: Drops) -> Self {
        Self { root, name, bounds, open: None, drops, retry_at: None, check_at: None }
    }

    /// What was dropped so far.
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    /// Appends whole records. Does not fail: what can't be written is dropped and counted.
    pub fn append(&mut self, now: Instant, stamp: &Stamp, records: &[u8]) {
        if records.is_empty() {
            return;
        }
        if self.retry_at.is_some_and(|at| now < at) {
            self.drops.add(record::payload(records));
            return;
        }
        if let Err((errno, lost)) = self.settle(now, stamp).map_err(|e| (e, records)).and_then(|()| self.write(records))
        {
            self.drops.add(record::payload(lost));
            self.drops.cause = Some(errno);
            self.retry_at = Some(now + RETRY);
        }
    }

    /// Tries to say in the log what was dropped; true when nothing is left to be said.
    pub fn settle_drops(&mut self, now: Instant, stamp: &Stamp) -> bool {
        if self.drops.untold == 0 {
            return true;
        }
        if self.retry_at.is_some_and(|at| now < at) {
            return false;
        }
        if let Err(errno) = self.settle(now, stamp) {
            self.drops.cause = Some(errno);
            self.retry_at = Some(now + RETRY);
        }
        self.drops.untold == 0
    }

    /// The file is open and there, and what was dropped is told.
    fn settle(&mut self, now: Instant, stamp: &Stamp) -> Result<(), Errno> {
        self.retry_at = None;
        if self.check_at.is_none_or(|at| now >= at) {
            self.check_at = Some(now + CHECK);
            // Someone cleaned up under us: go on in a new file rather than in one that nobody can see.
            if self.open.as_ref().is_some_and(|open| !matches!(fs::fstat(&open.file), Ok(stat) if stat.st_nlink > 0)) {
                self.open = None;
            }
        }
        if self.open.is_none() {
            self.open = Some(Open::at(&self.root, &self.name)?);
        }
        if self.drops.untold > 0 {
            let mut text = Vec::with_capacity(160);
            let _ = write!(text, "berth: dropped {} bytes of output", self.drops.untold);
            if let Some(errno) = self.drops.cause {
                let _ = write!(text, ": {}", std::io::Error::from(errno));
            }
            let mut note = Vec::with_capacity(256);
            record::write(&mut note, stamp, Stream::Stderr, Tag::Full, &text, &[]);
            self.write(&note).map_err(|(errno, _)| errno)?;
            self.drops.told();
        }
        Ok(())
    }

    /// Writes whole records, rotating where one would not fit. Gives back those that were not written.
    fn write<'r>(&mut self, mut records: &'r [u8]) -> Result<(), (Errno, &'r [u8])> {
        let bounds = self.bounds;
        let limit = bounds.max_file_bytes.max(MAX_RECORD as u64);
        while !records.is_empty() {
            let Some(open) = &mut self.open else { return Err((Errno::BADF, records)) };
            let fits = whole_records(records, limit.saturating_sub(open.size));
            if fits == 0 {
                match open.rotate(bounds.max_files) {
                    Ok(()) => continue,
                    Err(errno) => {
                        // Opened anew next time, by name: how far the rotation came is to be seen on the disk only.
                        self.open = None;
                        return Err((errno, records));
                    }
                }
            }
            let (written, failed) = open.write(&records[..fits]);
            records = &records[written..];
            if let Some(errno) = failed {
                if !matches!(errno, Errno::NOSPC | Errno::DQUOT) {
                    self.open = None;
                }
                return Err((errno, records));
            }
        }
        Ok(())
    }
}

/// The length of the longest run of whole records that fits into `room`.
fn whole_records(records: &[u8], room: u64) -> usize {
    let room = usize::try_from(room).unwrap_or(usize::MAX).min(records.len());
    records[..room].iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1)
}

impl Open {
    fn at(root: &Path, name: &BotDirName) -> Result<Self, Errno> {
        // The root itself is the administrator's and may be a link; what is below is ours and must not be.
        let root_flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::PATH;
        let root = match fs::openat(CWD, root, root_flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                std::fs::create_dir_all(root).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
                fs::openat(CWD, root, root_flags, Mode::empty())?
            }
            other => other?,
        };
        match fs::mkdirat(&root, name.as_str(), Mode::from_raw_mode(0o750)) {
            Err(Errno::EXIST) | Ok(()) => {}
            // A read-only or full disk may still hold the directory.
            Err(errno) if fs::statat(&root, name.as_str(), AtFlags::SYMLINK_NOFOLLOW).is_err() => return Err(errno),
            Err(_) => {}
        }
        let dir = fs::openat(
            &root,
            name.as_str(),
            OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY,
            Mode::empty(),
        )?;
        let (file, size) = open_current(&dir)?;
        Ok(Self { dir, file, size, torn: false })
    }

    /// How many bytes of whole records are in the file now, and what stopped the rest.
    fn write(&mut self, records: &[u8]) -> (usize, Option<Errno>) {
        if self.torn {
            match retry_on_intr(|| fs::ftruncate(&self.file, self.size)) {
                Ok(()) => self.torn = false,
                Err(errno) => return (0, Some(errno)),
            }
        }
        let mut done = 0;
        let failed = loop {
            if done == records.len() {
                break None;
            }
            match retry_on_intr(|| rustix::io::write(&self.file, &records[done..])) {
                Ok(0) => break Some(Errno::IO),
                Ok(n) => done += n,
                Err(errno) => break Some(errno),
            }
        };
        let whole = whole_records(&records[..done], u64::MAX);
        self.size += whole as u64;
        if whole < done {
            self.torn = retry_on_intr(|| fs::ftruncate(&self.file, self.size)).is_err();
        }
        (whole, failed)
    }

    /// Makes room in a new current file.
    fn rotate(&mut self, max_files: u32) -> Result<(), Errno> {
        if self.torn {
            retry_on_intr(|| fs::ftruncate(&self.file, self.size))?;
        }
        let old = max_files.saturating_sub(1);
        let name = |n: u32| if n == 0 { CURRENT.to_owned() } else { format!("{CURRENT}.{n}") };
        let is_there = |n: u32| match fs::statat(&self.dir, name(n), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno),
        };
        if old == 0 {
            fs::ftruncate(&self.file, 0)?;
            (self.size, self.torn) = (0, false);
            return Ok(());
        }
        // Up to the first gap only: one that an interrupted rotation left is closed, not moved on.
        let mut top = 1;
        while top < old && is_there(top)? {
            top += 1;
        }
        // First the oldest goes, then the others move: never a file too many.
        match fs::unlinkat(&self.dir, name(top), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
        for n in (0..top).rev() {
            match fs::renameat(&self.dir, name(n), &self.dir, name(n + 1)) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        // What a former, larger `max_files` left. Numbers are dense, so the first miss ends it.
        let mut beyond = old + 1;
        while fs::unlinkat(&self.dir, name(beyond), AtFlags::empty()).is_ok() {
            beyond += 1;
        }
        (self.file, self.size) = open_current(&self.dir)?;
        self.torn = false;
        Ok(())
    }
}

/// Opens the current file at the end of its last whole record.
fn open_current(dir: &OwnedFd) -> Result<(OwnedFd, u64), Errno> {
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = fs::openat(dir, CURRENT, flags, Mode::from_raw_mode(0o640))?;
    let stat = fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    // The record that our predecessor was killed in. None is longer than MAX_RECORD, so no more has to be read.
    let mut tail = vec![0; MAX_RECORD];
    let from = size.saturating_sub(MAX_RECORD as u64);
    let read = retry_on_intr(|| rustix::io::pread(&file, tail.as_mut_slice(), from))?;
    let whole = from + whole_records(&tail[..read], u64::MAX) as u64;
    if whole < size {
        retry_on_intr(|| fs::ftruncate(&file, whole))?;
    }
    Ok((file, whole))
}

/// What was dropped, in memory and in a file of two numbers: `untold total`, in bytes of the bot's output.
#[derive(Debug)]
pub struct Drops {
    file: Option<OwnedFd>,
    untold: u64,
    total: u64,
    cause: Option<Errno>,
}

impl Drops {
    /// Goes on counting where the file ends. Without a file (it can't be made) it counts in memory.
    pub fn open(dir: &OwnedFd, name: &str) -> Self {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = fs::openat(dir, name, flags, Mode::from_raw_mode(0o640)).ok();
        let mut bytes = [0; 64];
        let read = file.as_ref().and_then(|file| rustix::io::pread(file, &mut bytes, 0).ok()).unwrap_or(0);
        let (untold, total) = parse_drops(&bytes[..read]).unwrap_or((0, 0));
        Self { file, untold, total, cause: None }
    }

    /// Whether the log does not say yet all that was dropped.
    pub fn is_untold(&self) -> bool {
        self.untold > 0
    }

    fn add(&mut self, bytes: u64) {
        self.untold = self.untold.saturating_add(bytes);
        self.total = self.total.saturating_add(bytes);
        self.save();
    }

    fn told(&mut self) {
        (self.untold, self.cause) = (0, None);
        self.save();
    }

    fn save(&self) {
        // Fixed width, so that one write replaces it whole.
        if let Some(file) = &self.file {
            let mut bytes = [0; 42];
            let _ = writeln!(bytes.as_mut_slice(), "{:020} {:020}", self.untold, self.total);
            let _ = retry_on_intr(|| rustix::io::pwrite(file, &bytes, 0));
        }
    }
}

/// Reads the numbers `untold total` of a drops file.
pub fn parse_drops(bytes: &[u8]) -> Option<(u64, u64)> {
    let mut words = std::str::from_utf8(bytes).ok()?.split_ascii_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests;
