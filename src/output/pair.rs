//! The logger as processes: two of them, each of which makes the other anew.
//!
//! ```text
//! agent ── exec `berth logger …` ── fork ─┐ (the first ends at once, so that nobody waits for us as for a child)
//!                                         └─ drainer ── fork ── keeper
//!                                               └── socketpair ──┘   one end each: its end of file is the other's death
//! ```
//!
//! - The keeper sleeps in one `read`. When it reads the end of file the drainer is dead: it becomes the drainer and forks a
//!   keeper. When the drainer sees it, it forks another keeper. So either may be killed at any time, agent or no agent.
//! - Who drains holds a lock on `RUN_DIR/logger.lock`, so there is never a second one, and a free lock means that there is none (the
//!   kernel frees it with the process; pids would be reused).
//! - Both are forks of one small process that ran no executor and no `clap`: what they don't write to is in memory once.
//! - They are in a session and a cgroup of their own and have no descriptors of the agent's.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::Resource;

use super::cgroup;
use super::control::PROTOCOL;
use super::drain::{self, End};
use super::log_file::Bounds;

/// The hidden subcommand of `berth`.
pub const SUBCOMMAND: &str = "logger";

/// What `/proc/PID/comm` says of both.
pub const PROCESS_NAME: &std::ffi::CStr = c"berth-logger";

/// What the process that the agent started says on its standard output when it is ready.
pub const READY: &str = "ready";
/// What it says when another pair holds the lock.
pub const HELD: &str = "held";

/// So many drainers in a row that died younger than this are followed at once; the next after a pause, so that a pair which
/// can't live does not take a CPU.
const INFANT: Duration = Duration::from_millis(10);
const INFANTS: u32 = 3;
const INFANT_PAUSE: Duration = Duration::from_millis(50);

/// What a pair is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where FIFOs, socket and lock are; on tmpfs.
    pub run_dir: PathBuf,
    /// Where logs are.
    pub log_root: PathBuf,
    /// Bounds of each bot's log.
    pub bounds: Bounds,
    /// The cgroup to be in, from the root of each hierarchy; `None`: that of the agent.
    pub cgroup: Option<String>,
}

impl Settings {
    /// Folder with one folder of FIFOs a bot.
    pub fn io_dir(&self) -> PathBuf {
        self.run_dir.join("io")
    }

    /// The lock whose holder drains.
    pub fn lock_path(&self) -> PathBuf {
        self.run_dir.join("logger.lock")
    }

    /// The socket that the drainer answers on.
    pub fn socket_path(&self) -> PathBuf {
        self.run_dir.join("logger.sock")
    }

    /// One line that differs when another build or other settings would behave differently.
    pub fn identity(&self) -> String {
        let Self { run_dir: _, log_root, bounds: Bounds { max_file_bytes, max_files }, cgroup } = self;
        let version = env!("CARGO_PKG_VERSION");
        format!("{PROTOCOL} {version} {log_root:?} {max_file_bytes} {max_files} {cgroup:?}")
    }

    /// The arguments after the subcommand; [`Settings::parse`] reads them.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = vec![
            self.run_dir.clone().into(),
            self.log_root.clone().into(),
            self.bounds.max_file_bytes.to_string().into(),
            self.bounds.max_files.to_string().into(),
        ];
        arguments.extend(self.cgroup.iter().map(OsString::from));
        arguments
    }

    /// Reads [`Settings::arguments`].
    pub fn parse(mut arguments: impl Iterator<Item = OsString>) -> Option<Self> {
        let settings = Self {
            run_dir: arguments.next()?.into(),
            log_root: arguments.next()?.into(),
            bounds: Bounds {
                max_file_bytes: arguments.next()?.to_str()?.parse().ok()?,
                max_files: arguments.next()?.to_str()?.parse().ok()?,
            },
            cgroup: arguments.next().map(|cgroup| cgroup.into_string().ok()).unwrap_or_default(),
        };
        arguments.next().is_none().then_some(settings)
    }
}

/// The hidden subcommand `berth logger`: to be called before anything allocates, with the arguments after the subcommand.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(settings) = Settings::parse(arguments) else {
        let _ = writeln!(io::stderr(), "berth logger is started by the agent, with arguments of its own");
        return ExitCode::from(2);
    };
    // SAFETY: this process has one thread, so the copy is whole.
    match unsafe { libc::fork() } {
        -1 => say(&format!("can't fork: {}", io::Error::last_os_error())),
        0 => match live(&settings) {
            Ok(said) => say(said),
            Err(error) => {
                say(&error.to_string());
                return ExitCode::FAILURE;
            }
        },
        _ => {}
    }
    ExitCode::SUCCESS
}

fn say(words: &str) {
    let _ = writeln!(io::stdout(), "{words}");
}

/// Drains and keeps in turn until there is nothing left to drain. What is still to be said on standard output is returned.
fn live(settings: &Settings) -> io::Result<&'static str> {
    rustix::process::setsid()?;
    std::env::set_current_dir("/")?;
    // SAFETY: closes what was inherited beyond the three; nothing of ours is open yet.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    // SAFETY: children are reaped by the kernel: the drainer may be its keeper's parent or the other way round.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let _ = rustix::thread::set_name(PROCESS_NAME);
    // What the agent's own mask is must not decide who may read logs: files 0640, folders 0750.
    rustix::process::umask(Mode::from_raw_mode(0o027));
    let mut warning = None;
    if let Some(path) = &settings.cgroup
        && let Err(error) = cgroup::enter(path)
    {
        // Better in the wrong cgroup than no output at all.
        warning = Some(format!("can't enter the cgroup {path}: {error}"));
    }
    // When memory is short a bot is to go, not the output of all. Lowering needs a right; without it we stay as we are.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-999");
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let _ = rustix::process::setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit });

    let mut ready = || {
        let mut words = READY.to_owned();
        if let Some(warning) = &warning {
            words = format!("{words} {warning}");
        }
        say(&words);
        release_stdio()
    };
    let mut first: Option<&mut dyn FnMut() -> io::Result<()>> = Some(&mut ready);
    // Both are inherited by the keeper, who so knows how old its drainer is, and how many before it died young.
    let mut infants = 0;
    loop {
        let born = Instant::now();
        let is_first = first.is_some();
        let keeper = match drain::run(settings, first.take()) {
            Ok(End::Done) => return Ok(""),
            Ok(End::Held) => return Ok(if is_first { HELD } else { "" }),
            Ok(End::Keeper(drainer)) => drainer,
            Err(error) => return Err(error),
        };
        // The first keeper is forked before `ready` ran; it must not keep the agent waiting for the end of the pipe.
        release_stdio()?;
        match wait_for_end(keeper.as_fd()) {
            Watch::Dismissed => return Ok(""),
            Watch::Died => {}
        }
        infants = if born.elapsed() < INFANT { infants + 1 } else { 0 };
        if infants > INFANTS {
            pause(INFANT_PAUSE);
        }
    }
}

/// Standard input, output and error lead nowhere from now on.
fn release_stdio() -> io::Result<()> {
    let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    for standard in 0..=2 {
        // SAFETY: the three standard descriptors belong to nobody in this process but to std's handles, which hold only the number.
        if unsafe { libc::dup2(null.as_raw_fd(), standard) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Which side of a fork this is; the socket leads to the other.
#[derive(Debug)]
pub enum Forked {
    /// The process that forked.
    Original(OwnedFd),
    /// Its copy, to be the keeper: lets go of all that it inherited, and waits for the end.
    Twin(OwnedFd),
}

/// Makes the other process of the pair.
pub fn fork_twin() -> io::Result<Forked> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // SAFETY: this process has one thread, so the copy is whole.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Twin(theirs)),
        _ => Ok(Forked::Original(ours)),
    }
}

/// How the drainer ended, as its keeper sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    Dismissed,
    Died,
}

fn wait_for_end(drainer: BorrowedFd<'_>) -> Watch {
    let mut byte = [0];
    match rustix::io::retry_on_intr(|| rustix::io::read(drainer, &mut byte)) {
        Ok(1) => Watch::Dismissed,
        Ok(_) | Err(_) => Watch::Died,
    }
}

/// Tells the keeper that the end to come is no death.
pub fn dismiss(keeper: &OwnedFd) {
    let _ = rustix::io::retry_on_intr(|| rustix::io::write(keeper, b"."));
}

/// Waits. The pair has no executor that this could hold up.
pub fn pause(time: Duration) {
    let time = rustix::event::Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) as _ };
    let _ = rustix::event::poll(&mut [], Some(&time));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_the_command_line() {
        for cgroup in [None, Some("/berth/logger".to_owned())] {
            let settings = Settings {
                run_dir: "/run/berth".into(),
                log_root: "/var/log/berth".into(),
                bounds: Bounds { max_file_bytes: 10 << 20, max_files: 5 },
                cgroup,
            };
            assert_eq!(Settings::parse(settings.arguments().into_iter()), Some(settings.clone()));
            assert!(!settings.identity().contains('\n') && settings.identity().len() < 900);
        }
        assert_eq!(Settings::parse(["a", "b", "c", "d"].into_iter().map(OsString::from)), None);
    }
}
