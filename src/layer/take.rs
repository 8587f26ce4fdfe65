//! Copies a layer while its bot writes: rounds of copying ahead, then the rest while the bot is held still.
//!
//! Files are copied by inode into a stage, so that what is renamed or linked is copied once, and nothing of the new tree exists until
//! all that it will hold is known.
//!
//! What may be kept of a copy ([`keeps`]): a store through `mmap` into a page that is dirty already moves neither mtime nor ctime,
//! so a file's ctime may be older than its copy and the copy still be wrong. After a `syncfs` every page is clean, and the next store
//! into it moves ctime. So a copy is kept only when it was begun after a `syncfs` had ended that was begun at T, and the file's
//! ctime is older than T. T is the coarse clock, which is what the kernel stamps with; on kernels from 6.13 on a stamp may be finer,
//! and is never older than the coarse clock.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::tree::{Content, Entry, Facts, Hasher, Inode, Tree, data, read, walk};

/// How often is copied ahead once more although the rest would fit, to make the freeze shorter.
const FINER: u32 = 2;
/// Another round is worth it when the last one had to copy more than this.
const FINE: u64 = 4 << 20;
/// How often is copied ahead once more because the rest would not fit.
pub const MORE: u32 = 3;

/// A moment at which a `syncfs` began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The coarse clock. Seconds and nanoseconds.
    pub at: (i64, i64),
    /// How much the wall clock was ahead of the monotonic one. Nanoseconds.
    pub ahead: i128,
}

/// More than this, and the clock was set back rather than slewed.
const SET_BACK: i128 = 2_000_000;

impl Mark {
    /// Now.
    pub fn now() -> Self {
        let nanos = |id| {
            let time = clock_gettime(id);
            i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
        };
        let coarse = clock_gettime(ClockId::RealtimeCoarse);
        let ahead = nanos(ClockId::Realtime) - nanos(ClockId::Monotonic);
        Self { at: (coarse.tv_sec, coarse.tv_nsec), ahead }
    }

    /// Whether the wall clock was set back since: then a change may bear a time from before it.
    pub fn is_void(&self, now: &Self) -> bool {
        now.ahead < self.ahead - SET_BACK
    }
}

/// Whether what was read of an inode, after the `syncfs` that began at `mark` had ended, is still what it is.
pub fn keeps(read: &Facts, mark: &Mark, now: &Facts) -> bool {
    (read.ino, read.dev, read.kind(), read.size, read.rdev) == (now.ino, now.dev, now.kind(), now.size, now.rdev)
        && now.ctime < mark.at
}

/// What comes after a round of copying ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Hold the bot still.
    Hold,
    /// Copy ahead once more.
    Again,
    /// It changes too fast.
    GiveUp,
}

/// Decides. `walked` and `copied` are the times that the last round took to look and to copy; the rest will take about as long.
pub fn then(rounds: u32, bytes: u64, walked: Duration, copied: Duration, most: Duration) -> Then {
    let rest = walked + copied;
    if rounds < 2 || (bytes > FINE && rounds < 2 + FINER) {
        return Then::Again;
    }
    match rest {
        rest if rest <= most.mul_f64(0.7) => Then::Hold,
        _ if rounds < 2 + MORE => Then::Again,
        rest if rest <= most => Then::Hold,
        _ => Then::GiveUp,
    }
}

/// What is known of an inode.
#[derive(Clone, Debug)]
pub struct Known {
    /// When it was read.
    pub facts: Facts,
    /// The `syncfs` before.
    mark: Mark,
    /// What it holds.
    pub content: Content,
    /// The copy of its data in the stage.
    pub staged: Option<u64>,
}

/// What a round did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Round {
    /// Files copied.
    pub files: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// To look at the tree.
    pub walked: Duration,
    /// To copy.
    pub copied: Duration,
}

/// Copies one layer.
pub struct Take {
    source: OwnedFd,
    stage: Stage,
    known: HashMap<Inode, Known>,
}

/// Where copies are kept until they are put in place.
pub struct Stage {
    dir: OwnedFd,
    next: u64,
    clones: bool,
}

impl Stage {
    /// An empty stage; what an earlier one left is removed.
    pub fn new(path: &Path) -> io::Result<Self> {
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::create_dir(path)?;
        Ok(Self { dir: super::tree::open_root(path)?, next: 0, clones: true })
    }

    /// Its directory.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Name of a copy.
    pub fn name(number: u64) -> std::ffi::CString {
        // Digits have no NUL.
        std::ffi::CString::new(number.to_string()).unwrap_or_default()
    }

    /// A number that no copy has.
    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn remove(&self, number: u64) {
        // One that stays goes with the stage.
        let _ = unlinkat(&self.dir, Self::name(number), AtFlags::empty());
    }

    /// Copies the data of a file; gives its number, its digest and how many bytes were moved.
    fn copy(&mut self, from: &File, size: u64, late: &dyn Fn() -> bool) -> io::Result<(u64, [u8; 32], u64)> {
        let number = self.number();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let to = File::from(openat(&self.dir, Self::name(number), flags, Mode::RUSR | Mode::WUSR)?);
        if self.clones && size > 0 {
            match rustix::fs::ioctl_ficlone(&to, from) {
                Ok(()) => {
                    let size = to.metadata()?.len();
                    return Ok((number, super::tree::digest(&to, size)?, 0));
                }
                // Not between these two, and so between none.
                Err(_) => self.clones = false,
            }
        }
        let mut hasher = Hasher::new();
        let mut moved = 0_u64;
        let size = data(from, size, |offset, data| {
            if late() {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            hasher.take(offset, data);
            moved += data.len() as u64;
            to.write_all_at(data, offset)
        })?;
        to.set_len(size)?;
        Ok((number, hasher.end(size), moved))
    }
}

impl Take {
    /// Nothing is copied yet.
    pub fn new(source: &Path, stage: &Path) -> io::Result<Self> {
        Self::of(super::tree::open_root(source)?, stage)
    }

    /// The same of a directory that is open already.
    pub fn of(source: OwnedFd, stage: &Path) -> io::Result<Self> {
        Ok(Self { source, stage: Stage::new(stage)?, known: HashMap::new() })
    }

    /// Copies ahead what is new or may have changed, while the bot writes.
    pub fn ahead(&mut self) -> io::Result<Round> {
        let mark = Mark::now();
        rustix::fs::syncfs(&self.source)?;
        let began = Instant::now();
        let Some(tree) = walk(self.source.as_fd(), 1, &|| false)? else { return Ok(Round::default()) };
        let walked = began.elapsed();
        let round = self.read_all(&tree, mark, false, &|| false)?;
        // What has no name any more takes room only.
        let named: std::collections::HashSet<Inode> = inodes(&tree).collect();
        let stage = &self.stage;
        self.known.retain(|ino, known| {
            let keep = named.contains(ino);
            if !keep && let Some(number) = known.staged {
                stage.remove(number);
            }
            keep
        });
        Ok(Round { walked, ..round })
    }

    /// Copies the rest, while nobody writes. `None` when `late` comes before it is done: nothing is lost by that.
    pub fn rest(&mut self, threads: usize, late: &(dyn Fn() -> bool + Sync)) -> io::Result<Option<Tree>> {
        let Some(tree) = walk(self.source.as_fd(), threads, late)? else { return Ok(None) };
        // What is read now is read of a bot that stands still: whatever the clock says, it is kept.
        let mark = Mark::now();
        match self.read_all(&tree, mark, true, late) {
            Ok(_) => Ok((!late()).then_some(tree)),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What was read of an inode.
    pub fn known(&self, ino: Inode) -> Option<&Known> {
        self.known.get(&ino)
    }

    /// The stage.
    pub fn stage(&mut self) -> &mut Stage {
        &mut self.stage
    }

    fn read_all(&mut self, tree: &Tree, mark: Mark, still: bool, late: &dyn Fn() -> bool) -> io::Result<Round> {
        let began = Instant::now();
        let now = Mark::now();
        let mut round = Round::default();
        let keep = |known: Option<&Known>, facts: &Facts| {
            known.is_some_and(|known| !known.mark.is_void(&now) && keeps(&known.facts, &known.mark, facts))
        };
        // The root itself.
        if !keep(self.known.get(&tree.root.inode()), &tree.root) {
            let content = Content { xattrs: super::tree::xattrs(self.source.as_fd())?, ..Content::default() };
            self.known.insert(tree.root.inode(), Known { facts: tree.root, mark, content, staged: None });
        }
        let mut seen = std::collections::HashSet::new();
        for (number, directory) in tree.dirs.iter().enumerate() {
            let wanted: Vec<&Entry> = directory
                .entries
                .iter()
                .filter(|entry| !keep(self.known.get(&entry.facts.inode()), &entry.facts))
                // Under the freeze an inode with several names is read once.
                .filter(|entry| entry.facts.links < 2 || entry.dir.is_some() || seen.insert(entry.facts.inode()))
                .collect();
            if wanted.is_empty() {
                continue;
            }
            let Some(dir) = self.open(tree, u32::try_from(number).unwrap_or(u32::MAX))? else {
                if still {
                    return Err(io::Error::other("a directory vanished from a layer that nobody writes to"));
                }
                continue;
            };
            for entry in wanted {
                if late() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                let mut copied = None;
                let stage = &mut self.stage;
                let mut sink = |file: &File, size: u64| {
                    let (number, digest, moved) = stage.copy(file, size, late)?;
                    copied = Some((number, moved));
                    Ok(digest)
                };
                let read = read(dir.as_fd(), &entry.name, &entry.facts, false, Some(&mut sink))?;
                let Some((facts, content)) = read else {
                    if still {
                        return Err(io::Error::other("a file vanished from a layer that nobody writes to"));
                    }
                    continue;
                };
                if let Some((_, moved)) = copied {
                    round.files += 1;
                    round.bytes += moved;
                }
                let known = Known { facts, mark, content, staged: copied.map(|(number, _)| number) };
                if let Some(number) = self.known.insert(facts.inode(), known).and_then(|old| old.staged) {
                    self.stage.remove(number);
                }
            }
        }
        round.copied = began.elapsed();
        Ok(round)
    }

    /// Opens a directory of the tree, name by name from the root. `None` where it is not there any more.
    fn open(&self, tree: &Tree, number: u32) -> io::Result<Option<OwnedFd>> {
        match tree.open(self.source.as_fd(), number) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn inodes(tree: &Tree) -> impl Iterator<Item = Inode> {
    let all = tree.dirs.iter().flat_map(|directory| directory.entries.iter().map(|entry| entry.facts.inode()));
    all.chain([tree.root.inode()])
}

/// Whether a tree has a file whose data is missing: a walk and a reading that did not see the same.
pub fn is_complete(tree: &Tree, take: &Take) -> bool {
    let there = |facts: &Facts| {
        take.known(facts.inode()).is_some_and(|known| {
            known.facts.kind() == facts.kind() && (facts.kind() != FileType::RegularFile || known.staged.is_some())
        })
    };
    there(&tree.root) && tree.dirs.iter().all(|directory| directory.entries.iter().all(|entry| there(&entry.facts)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(ctime: (i64, i64)) -> Facts {
        Facts {
            mode: 0o100_644,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 10,
            on_disk: 4096,
            dev: 1,
            ino: 7,
            links: 1,
            atime: (0, 0),
            mtime: (0, 0),
            ctime,
        }
    }

    #[test]
    fn a_copy_is_kept_only_when_every_change_since_would_show() {
        let mark = Mark { at: (100, 500), ahead: 0 };
        let read = facts((50, 0));
        assert!(keeps(&read, &mark, &facts((50, 0))));
        assert!(keeps(&read, &mark, &facts((100, 499))), "changed before the syncfs began, and read after it ended");
        // A store into a page that was dirty before the syncfs may bear the very time at which that began.
        assert!(!keeps(&read, &mark, &facts((100, 500))));
        assert!(!keeps(&read, &mark, &facts((101, 0))));
        // Whatever the time says.
        for changed in [
            Facts { ino: 8, ..facts((50, 0)) },
            Facts { dev: 2, ..facts((50, 0)) },
            Facts { size: 11, ..facts((50, 0)) },
            Facts { mode: 0o120_777, ..facts((50, 0)) },
            Facts { rdev: 5, ..facts((50, 0)) },
        ] {
            assert!(!keeps(&read, &mark, &changed), "{changed:?}");
        }
        assert!(!mark.is_void(&Mark { ahead: 0, ..mark }) && !mark.is_void(&Mark { ahead: 5_000_000_000, ..mark }));
        assert!(mark.is_void(&Mark { ahead: -5_000_000, ..mark }), "the clock was set back: times mean nothing");
    }

    #[test]
    fn the_bot_is_held_when_the_rest_fits_and_never_for_longer() {
        let ms = Duration::from_millis;
        for (rounds, bytes, rest, most, wanted) in [
            (1, 0, 0, 1000, Then::Again),
            (2, 0, 10, 1000, Then::Hold),
            (2, 100 << 20, 10, 1000, Then::Again),
            (4, 100 << 20, 10, 1000, Then::Hold),
            (2, 0, 900, 1000, Then::Again),
            (5, 0, 900, 1000, Then::Hold),
            (4, 0, 2000, 1000, Then::Again),
            (5, 0, 2000, 1000, Then::GiveUp),
            (9, 0, 1, 1, Then::Hold),
        ] {
            assert_eq!(
                then(rounds, bytes, ms(rest), ms(0), ms(most)),
                wanted,
                "{rounds} rounds, rest {rest} of {most} ms"
            );
        }
    }

    #[test]
    fn what_changes_between_rounds_is_copied_again_and_the_rest_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (source, stage) = (dir.path().join("source"), dir.path().join("stage"));
        std::fs::create_dir_all(source.join("sub")).unwrap();
        for n in 0..10 {
            std::fs::write(source.join(format!("sub/{n}")), n.to_string()).unwrap();
        }
        // Older than the tick of any clock.
        crate::output::pair::pause(Duration::from_millis(30));
        let mut take = Take::new(&source, &stage).unwrap();
        assert_eq!(take.ahead().unwrap().files, 10);
        assert_eq!(take.ahead().unwrap().files, 0);
        std::fs::write(source.join("sub/3"), "x").unwrap();
        std::fs::rename(source.join("sub/4"), source.join("elsewhere")).unwrap();
        std::fs::remove_file(source.join("sub/5")).unwrap();
        let again = take.ahead().unwrap();
        assert!((1..=2).contains(&again.files), "{again:?}");
        assert_eq!(std::fs::read_dir(&stage).unwrap().count(), 9, "a copy that nobody needs is kept");
        let tree = take.rest(2, &|| false).unwrap().unwrap();
        assert!(is_complete(&tree, &take));
        assert!(take.rest(2, &|| true).unwrap().is_none());
    }
}
