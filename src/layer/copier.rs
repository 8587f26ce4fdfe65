//! The copier as processes: a worker that does one job, and a guardian that thaws when anybody is gone.
//!
//! ```text
//! agent ──── stdin, stdout ──── guardian ── fork ── worker      the worker has both pipes too
//!                                  └──── socketpair ────┘        its end of file is the other's death
//! ```
//!
//! - The agent's end closes stdin: the guardian kills the worker, and thaws what is noted as frozen.
//! - The worker's end, however it ends, closes the socket: the guardian thaws.
//! - The guardian's end closes the socket: the worker thaws and ends.
//! - Both are in a session and a cgroup of their own, so that nothing that ends the agent ends them with it.

use std::collections::HashMap;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Gid, Mode, OFlags, ResolveFlags, Uid, XattrFlags, mkdirat, openat2};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, Resource, Signal};

use super::assemble::assemble;
use super::changes::{Lower, changes};
use super::freezer::{Debt, settle};
use super::job::{Failure, FailureKind, Hold, Job, Said, Summary, Written};
use super::manifest::Manifest;
use super::take::{MORE, Take, Then, is_complete, then};

/// The hidden subcommand of `berth`.
pub const SUBCOMMAND: &str = "copier";

/// What `/proc/PID/comm` says of both.
const PROCESS_NAME: &std::ffi::CStr = c"berth-copier";

/// Bytes that are written at once.
const CHUNK: usize = 256 * 1024;

/// Differences that are told in words.
const WORDS: usize = 20;

/// For tests, in debug builds: so many milliseconds pass in the middle of each freeze.
#[cfg(debug_assertions)]
const SLOW_FREEZE: &str = "BERTH_COPIER_SLOW_FREEZE_MILLIS";

/// The hidden subcommand `berth copier [CGROUP]`, with the job as the first line of standard input.
pub fn main(mut arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let cgroup = arguments.next().and_then(|cgroup| cgroup.into_string().ok());
    let mut input = BufReader::new(io::stdin());
    let mut line = String::new();
    let job = input.read_line(&mut line).ok().and_then(|_| serde_json::from_str::<Job>(&line).ok());
    let Some(job) = job else {
        let _ = writeln!(io::stderr(), "berth copier is started by the agent, with a job on standard input");
        return ExitCode::from(2);
    };
    if let Err(error) = detach(cgroup.as_deref()) {
        say(&Said::Failed(Failure::of("can't begin", &error)));
        return ExitCode::FAILURE;
    }
    let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (ours, theirs) = match pair {
        Ok(pair) => pair,
        Err(error) => {
            say(&Said::Failed(Failure::of("can't begin", &error.into())));
            return ExitCode::FAILURE;
        }
    };
    // SAFETY: this process has one thread, so the copy is whole.
    match unsafe { libc::fork() } {
        -1 => {
            say(&Said::Failed(Failure::of("can't begin", &io::Error::last_os_error())));
            ExitCode::FAILURE
        }
        0 => {
            drop(ours);
            work(&job, input, theirs)
        }
        worker => {
            drop(theirs);
            guard(&job, worker, &ours)
        }
    }
}

fn detach(cgroup: Option<&str>) -> io::Result<()> {
    rustix::process::setsid()?;
    std::env::set_current_dir("/")?;
    // SAFETY: closes what was inherited beyond the three; nothing of ours is open yet.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    let _ = rustix::thread::set_name(PROCESS_NAME);
    rustix::process::umask(Mode::empty());
    if let Some(cgroup) = cgroup
        && let Err(error) = crate::output::enter_cgroup(cgroup)
    {
        // Better in the wrong cgroup than no snapshot at all; a freeze ends with its guardian all the same.
        let _ = writeln!(io::stderr(), "can't enter the cgroup {cgroup}: {error}");
    }
    // When memory is short a bot is to go, not whoever has it frozen. Lowering needs a right; without it we stay as we are.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-999");
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let _ = rustix::process::setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit });
    Ok(())
}

/// Waits until the worker or the agent is gone, and leaves nobody frozen.
fn guard(job: &Job, worker: i32, socket: &OwnedFd) -> ExitCode {
    // The agent sees the worker's end by the end of its output, which so must be the worker's alone.
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        // SAFETY: standard output belongs to nobody in this process but to std's handle, which holds only the number.
        unsafe { libc::dup2(null.as_raw_fd(), 1) };
    }
    let stdin = io::stdin();
    loop {
        // Not for input, which is the worker's: only for the end, which is always told.
        let mut watched =
            [PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::empty()), PollFd::new(socket, PollFlags::IN)];
        match poll(&mut watched, None) {
            Ok(_) if watched.iter().any(|fd| !fd.revents().is_empty()) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    if let Some(pid) = Pid::from_raw(worker) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    }
    if let Job::Take { debt, .. } | Job::Still { debt, .. } = job {
        // Its lock went with the worker.
        if let Err(error) = settle(debt) {
            let _ = writeln!(io::stderr(), "can't thaw what {} says: {error}", debt.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// What is owed now, for whoever has to end in the middle.
type Owed = Arc<Mutex<Option<Debt>>>;

fn work(job: &Job, mut input: impl io::BufRead, guardian: OwnedFd) -> ExitCode {
    let owed = Owed::default();
    {
        let owed = owed.clone();
        std::thread::spawn(move || {
            let mut byte = [0];
            // Nothing is ever sent: this returns when the guardian is gone.
            let _ = rustix::io::retry_on_intr(|| rustix::io::read(&guardian, &mut byte));
            // Held to the end: nobody freezes after this.
            let mut owed = owed.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(debt) = owed.take() {
                let _ = debt.pay();
            }
            // SAFETY: ends the process at once; what is half-made is found by name.
            unsafe { libc::_exit(1) }
        });
    }
    let done = match job {
        Job::Take { .. } => take(job, &mut input, &owed),
        Job::Clone { source, dest, stage, manifest } => clone(source, dest, stage, manifest.as_deref()),
        Job::Carry { source, path, dest, stage, lower, whole } => carry(source, path, dest, stage, lower, *whole),
        Job::Still { cgroup, debt, max_freeze_millis } => still(cgroup, debt, *max_freeze_millis, &mut input, &owed),
        Job::Describe { source, manifest, before, lower } => describe(source, manifest, before.as_deref(), lower),
        Job::Verify { source, manifest, unpacked } => verify(source, manifest, *unpacked),
        Job::Tar { source, manifest, from: None } => {
            tar(source, manifest, 0, io::sink()).map(|written| Summary { tar: Some(written), ..Summary::default() })
        }
        Job::Tar { source, manifest, from: Some(from) } => return stream(source, manifest, *from),
    };
    match done {
        Ok(summary) => {
            say(&Said::Done(summary));
            ExitCode::SUCCESS
        }
        Err(error) => {
            if let Job::Take { stage, .. } | Job::Clone { stage, .. } | Job::Carry { stage, .. } = job {
                let _ = std::fs::remove_dir_all(stage);
            }
            say(&Said::Failed(error));
            ExitCode::FAILURE
        }
    }
}

fn say(said: &Said) {
    // What has been said can be written as JSON; nobody listens any more only when all of this ends.
    if let Ok(mut line) = serde_json::to_vec(said) {
        line.push(b'\n');
        let mut out = io::stdout();
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

/// Adds to an error what was being done.
fn at<T>(step: &str, path: &Path, done: io::Result<T>) -> Result<T, Failure> {
    done.map_err(|error| Failure::of(&format!("can't {step} {}", path.display()), &error))
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(16)
}

fn take(job: &Job, input: &mut impl io::BufRead, owed: &Owed) -> Result<Summary, Failure> {
    let Job::Take { source, dest, stage, manifest, cgroup, debt, max_freeze_millis, before, lower } = job else {
        return Err(Failure { kind: FailureKind::Other, message: "not a job to take".to_owned() });
    };
    let most = Duration::from_millis(*max_freeze_millis);
    let mut take = at("copy", source, Take::new(source, stage))?;
    let (mut rounds, mut files, mut bytes, mut too_much) = (0, 0, 0, 0);
    let tree = loop {
        let round = at("copy", source, take.ahead())?;
        rounds += 1;
        files += round.files;
        bytes += round.bytes;
        match then(rounds, round.bytes, round.walked, round.copied, most) {
            Then::Again => continue,
            Then::Hold => {}
            Then::GiveUp => {
                let rest = round.walked + round.copied;
                let message = format!(
                    "after {rounds} rounds of copying {} bytes were left, which would freeze the bot for {} ms; \
                     maxFreezeMillis is {max_freeze_millis}",
                    round.bytes,
                    rest.as_millis()
                );
                return Err(Failure { kind: FailureKind::TooManyChanges, message });
            }
        }
        say(&Said::Precopied { rounds, files, bytes });
        let mut line = String::new();
        let hold = match input.read_line(&mut line) {
            Ok(n) if n > 0 => serde_json::from_str::<Hold>(&line).ok(),
            _ => None,
        };
        let Some(hold) = hold else {
            return Err(Failure { kind: FailureKind::Aborted, message: "the agent is gone".to_owned() });
        };
        let began = Instant::now();
        let frozen = match hold {
            Hold::Held => None,
            Hold::Freeze => Some(freeze(debt, cgroup, began + most, owed)?),
        };
        let late = || frozen.is_some() && began.elapsed() >= most;
        let instant = Timestamp::now();
        #[cfg(debug_assertions)]
        if let Some(slow) = std::env::var(SLOW_FREEZE).ok().and_then(|text| text.parse().ok()) {
            crate::output::pair::pause(Duration::from_millis(slow));
        }
        let rest = take.rest(threads(), &late);
        let thawed = match frozen {
            Some(Frozen) => thaw(owed),
            None => Ok(()),
        };
        let frozen_millis = if hold == Hold::Freeze { began.elapsed().as_micros().div_ceil(1000) } else { 0 };
        thawed?;
        match at("copy", source, rest)? {
            Some(tree) => {
                let frozen_millis = u64::try_from(frozen_millis).unwrap_or(u64::MAX);
                say(&Said::Taken { at: instant, frozen_millis });
                break tree;
            }
            None => {
                too_much += 1;
                if too_much > MORE {
                    let message = format!(
                        "the rest could not be copied within maxFreezeMillis ({max_freeze_millis}), {too_much} times"
                    );
                    return Err(Failure { kind: FailureKind::TooManyChanges, message });
                }
                say(&Said::TooMuch { bytes: round.bytes });
            }
        }
    };
    if !is_complete(&tree, &take) {
        let message = "not all of the layer was copied: it changed while the bot was held".to_owned();
        return Err(Failure { kind: FailureKind::Other, message });
    }
    // What is noted is what was read of the bot; what was made of it is read back after the commit.
    let now = at("describe", source, Manifest::of(&tree, &take))?;
    let root = at("open", dest, super::tree::open_root(dest))?;
    at("fill", dest, assemble(&tree, &mut take, root.as_fd()))?;
    at("remove", stage, std::fs::remove_dir_all(stage))?;
    at("write", manifest, now.save(manifest))?;
    at("sync", dest, rustix::fs::syncfs(&root).map_err(io::Error::from))?;
    Ok(summary(&now, Some((before.as_deref(), lower))))
}

/// Holds the bot still until the agent says that it has what it wanted.
fn still(
    cgroup: &[PathBuf],
    debt: &Path,
    max_freeze_millis: u64,
    input: &mut impl io::BufRead,
    owed: &Owed,
) -> Result<Summary, Failure> {
    let gone = || Failure { kind: FailureKind::Aborted, message: "the agent is gone".to_owned() };
    say(&Said::Precopied { rounds: 0, files: 0, bytes: 0 });
    let mut line = String::new();
    if input.read_line(&mut line).unwrap_or(0) == 0 {
        return Err(gone());
    }
    let (began, most) = (Instant::now(), Duration::from_millis(max_freeze_millis));
    let Frozen = freeze(debt, cgroup, began + most, owed)?;
    let instant = Timestamp::now();
    say(&Said::Still);
    // The agent says no more than this line, so nothing of it is in the buffer.
    let left = most.saturating_sub(began.elapsed());
    let left = rustix::event::Timespec::try_from(left).ok();
    let stdin = io::stdin();
    let ended = poll(&mut [PollFd::new(&stdin, PollFlags::IN)], left.as_ref());
    thaw(owed)?;
    let frozen_millis = u64::try_from(began.elapsed().as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
    match ended {
        Ok(0) => {
            let message = format!(
                "containerd's diff was not done when the bot had been frozen for maxFreezeMillis ({max_freeze_millis})"
            );
            Err(Failure { kind: FailureKind::TooManyChanges, message })
        }
        Ok(_) if input.read_line(&mut line).unwrap_or(0) > 0 => {
            say(&Said::Taken { at: instant, frozen_millis });
            Ok(Summary::default())
        }
        _ => Err(gone()),
    }
}

/// The bot is frozen; the debt lies where the guardian's end is waited for.
struct Frozen;

fn freeze(debt: &Path, cgroup: &[PathBuf], deadline: Instant, owed: &Owed) -> Result<Frozen, Failure> {
    let failed = |step: &str, error: io::Error| Failure {
        kind: FailureKind::Freezer,
        message: format!("can't {step} the bot: {error}"),
    };
    let mut place = owed.lock().unwrap_or_else(PoisonError::into_inner);
    let debt = Debt::note(debt, cgroup).map_err(|error| failed("note the freeze of", error))?;
    let done = debt.freeze(deadline);
    *place = Some(debt);
    drop(place);
    if let Err(error) = done {
        thaw(owed)?;
        return Err(failed("freeze", error));
    }
    Ok(Frozen)
}

fn thaw(owed: &Owed) -> Result<(), Failure> {
    match owed.lock().unwrap_or_else(PoisonError::into_inner).take().map(Debt::pay) {
        Some(Err(error)) => {
            Err(Failure { kind: FailureKind::Freezer, message: format!("can't thaw the bot: {error}") })
        }
        Some(Ok(())) | None => Ok(()),
    }
}

fn clone(source: &Path, dest: &Path, stage: &Path, manifest: Option<&Path>) -> Result<Summary, Failure> {
    let mut take = at("copy", source, Take::new(source, stage))?;
    let Some(tree) = at("copy", source, take.rest(threads(), &|| false))? else {
        return Err(Failure { kind: FailureKind::Other, message: "the copy was broken off".to_owned() });
    };
    let now = at("describe", source, Manifest::of(&tree, &take))?;
    let mut done = summary(&now, None);
    if let Some(path) = manifest {
        let wanted = at("read", path, Manifest::load(path))?;
        (done.mismatches, done.mismatch_count) = now.differences(&wanted, WORDS);
        if done.mismatch_count > 0 {
            let _ = std::fs::remove_dir_all(stage);
            return Ok(done);
        }
    }
    let root = at("open", dest, super::tree::open_root(dest))?;
    at("fill", dest, assemble(&tree, &mut take, root.as_fd()))?;
    at("remove", stage, std::fs::remove_dir_all(stage))?;
    at("sync", dest, rustix::fs::syncfs(&root).map_err(io::Error::from))?;
    Ok(done)
}

fn carry(
    source: &Path,
    path: &Path,
    dest: &Path,
    stage: &Path,
    lower: &[PathBuf],
    whole: bool,
) -> Result<Summary, Failure> {
    let to = at("open", dest, super::tree::open_root(dest))?;
    let from = at("open", source, super::tree::open_root(source))?;
    // Below the bot's own root, and through no link: the directory is what spec.data says, or nothing.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    let data = match openat2(&from, path, flags, Mode::empty(), resolve) {
        Ok(data) => data,
        // It has none: then it has none on the other image either, but what that brings.
        Err(rustix::io::Errno::NOENT) => return Ok(Summary::default()),
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) => {
            let message = format!("the data path /{} is no directory any more, or lies behind a link", path.display());
            return Err(Failure { kind: FailureKind::Other, message });
        }
        Err(error) => return at("open", path, Err(error.into())),
    };
    let mut take = at("copy", path, Take::of(data, stage))?;
    let Some(tree) = at("copy", path, take.rest(threads(), &|| false))? else {
        return Err(Failure { kind: FailureKind::Other, message: "the copy was broken off".to_owned() });
    };
    let now = at("describe", path, Manifest::of(&tree, &take))?;
    if whole {
        at("empty", dest, remove_all(&to, path))?;
    }
    let inside = at("make", dest, make_way(&to, path, &Lower::open(lower)))?;
    at("fill", dest, assemble(&tree, &mut take, inside.as_fd()))?;
    // What the image has there is no part of the bot's data.
    if !whole {
        let opaque = rustix::fs::fsetxattr(&inside, c"trusted.overlay.opaque", b"y", XattrFlags::empty());
        at("mark", dest, opaque.map_err(io::Error::from))?;
    }
    at("remove", stage, std::fs::remove_dir_all(stage))?;
    at("sync", dest, rustix::fs::syncfs(&to).map_err(io::Error::from))?;
    // Read back what was made, as a version is.
    let made = at("read", dest, Manifest::read_at(inside, threads(), true))?;
    let made = made.without_root_attribute("trusted.overlay.opaque");
    let (mismatches, mismatch_count) = made.differences(&now, WORDS);
    if let Some(first) = mismatches.first() {
        let message = format!("what was carried over is not what it was, in {mismatch_count} places, first: {first}");
        return Err(Failure { kind: FailureKind::Mismatch, message });
    }
    Ok(summary(&now, None))
}

/// Removes all that a directory has in it, through no link; nothing where there is none.
fn remove_all(root: &OwnedFd, path: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    match openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(dir) => empty(&dir),
        Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn empty(dir: &OwnedFd) -> io::Result<()> {
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match rustix::fs::unlinkat(dir, name, rustix::fs::AtFlags::empty()) {
            Err(rustix::io::Errno::ISDIR) => {
                empty(&super::tree::open_dir(dir.as_fd(), name)?)?;
                rustix::fs::unlinkat(dir, name, rustix::fs::AtFlags::REMOVEDIR)?;
            }
            removed => removed?,
        }
    }
    Ok(())
}

/// Makes the directories down to `path` in an empty layer, each as the layers below have it, and opens the last.
fn make_way(root: &OwnedFd, path: &Path, lower: &Lower) -> io::Result<OwnedFd> {
    let mut fd = super::tree::open_dir(root.as_fd(), c".")?;
    let mut so_far = Vec::new();
    for name in path.components() {
        use std::os::unix::ffi::OsStrExt as _;
        let bytes = name.as_os_str().as_bytes();
        if !so_far.is_empty() {
            so_far.push(b'/');
        }
        so_far.extend_from_slice(bytes);
        let name = std::ffi::CString::new(bytes)?;
        match mkdirat(&fd, &name, Mode::RWXU) {
            // The image's own, in a layer that is whole: it stays as it is.
            Err(rustix::io::Errno::EXIST) => {
                fd = super::tree::open_dir(fd.as_fd(), &name)?;
                continue;
            }
            made => made?,
        }
        let next = super::tree::open_dir(fd.as_fd(), &name)?;
        let below = lower.find(&so_far);
        let mode = below.map_or(0o755, |below| below.mode & 0o7777);
        let owner = below.map_or((0, 0), |below| below.owner);
        rustix::fs::fchown(&next, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))?;
        rustix::fs::fchmod(&next, Mode::from_raw_mode(mode))?;
        fd = next;
    }
    Ok(fd)
}

fn describe(source: &Path, manifest: &Path, before: Option<&Path>, lower: &[PathBuf]) -> Result<Summary, Failure> {
    let root = at("open", source, super::tree::open_root(source))?;
    // It was the bot's a moment ago: on the disk first, then it is a version.
    at("sync", source, rustix::fs::syncfs(&root).map_err(io::Error::from))?;
    let now = at("read", source, Manifest::read_layer(source, threads(), false))?;
    at("write", manifest, now.save(manifest))?;
    Ok(summary(&now, Some((before, lower))))
}

fn verify(source: &Path, manifest: &Path, unpacked: bool) -> Result<Summary, Failure> {
    let mut wanted = at("read", manifest, Manifest::load(manifest))?;
    let now = at("read", source, Manifest::read_layer(source, threads(), true))?;
    if unpacked {
        let times: HashMap<&str, _> = now.items.iter().map(|item| (item.path.as_str(), item.mtime)).collect();
        for item in &mut wanted.items {
            let same = |is: &&(i64, i64)| item.kind() == FileType::Directory || is.0 == item.mtime.0;
            item.mtime = times.get(item.path.as_str()).filter(same).copied().unwrap_or(item.mtime);
        }
    }
    let (mismatches, mismatch_count) = now.differences(&wanted, WORDS);
    Ok(Summary { mismatches, mismatch_count, ..summary(&now, None) })
}

fn tar(source: &Path, manifest: &Path, from: u64, out: impl io::Write) -> Result<Written, Failure> {
    let wanted = at("read", manifest, Manifest::load(manifest))?;
    let root = at("open", source, super::tree::open_root(source))?;
    if from == 0 {
        // Holes become zeros: a bot must not fill its node's disk by a file that costs it nothing.
        let disk = at("measure", source, rustix::fs::fstatvfs(&root).map_err(io::Error::from))?;
        let free = disk.f_bavail.saturating_sub(disk.f_blocks / 20).saturating_mul(disk.f_frsize);
        let once = |item: &&super::manifest::Item| item.same.as_ref().is_none_or(|same| *same == item.path);
        let bytes = wanted.items.iter().filter(once).fold(0_u64, |sum, item| sum.saturating_add(item.size));
        if bytes > free {
            let message =
                format!("the tar would take {bytes} bytes, holes included; the node's disk has {free} to spare");
            return Err(Failure { kind: FailureKind::Storage, message });
        }
    }
    super::tar::write(root.as_fd(), &wanted, from, out)
}

/// Gives the tar itself; what goes wrong is said elsewhere, and seen by its not being whole.
fn stream(source: &Path, manifest: &Path, from: u64) -> ExitCode {
    let out = io::stdout().as_fd().try_clone_to_owned().map(std::fs::File::from);
    let out = out.map(|out| io::BufWriter::with_capacity(CHUNK, out)).map_err(|error| Failure::of("no output", &error));
    match out.and_then(|out| tar(source, manifest, from, out)) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{}", error.message);
            ExitCode::FAILURE
        }
    }
}

fn summary(now: &Manifest, against: Option<(Option<&Path>, &[PathBuf])>) -> Summary {
    let changes = against.map(|(before, lower)| {
        // One that can't be read is as one that is not there: then the changes are those against the image.
        let before = before.and_then(|path| Manifest::load(path).ok());
        let lower = Lower::open(lower);
        changes(before.as_ref(), now, |path| lower.find(path))
    });
    Summary { files: now.files(), size_bytes: now.on_disk, changes, ..Summary::default() }
}
