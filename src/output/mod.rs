//! Output of bots: from the task's stdio into files, whoever else is alive.
//!
//! ```text
//! bot ── pipe ── runc shim ── FIFO ─┐                            ┌─ /var/log/berth/NAMESPACE_NAME_UID/0.log, 0.log.1 …
//! bot ── pipe ── runc shim ── FIFO ─┴─ drainer (epoll, `drain`) ─┴─ /run/berth/io/ID/dropped   (`log_file`)
//!                                        │ ▲ socketpair (`pair`): each makes the other anew
//!                                        ▼ │
//!                                       keeper
//! agent ── Output ── /run/berth/logger.sock (`control`): open, flush, close
//! ```
//!
//! - The shim opens each FIFO for writing *and* for reading, the drainer too: nobody gets SIGPIPE, nobody sees an end of file,
//!   and what is in a FIFO survives the drainer's death.
//! - One pair of processes drains all bots of a node (`docs/decisions/output.md` says why not a pair a bot). It is not the
//!   agent's child: it goes on while the agent is away, and ends when there is neither a bot nor an agent.
//! - The disk is the truth: a folder `RUN_DIR/io/ID` with two FIFOs and `owner` is a bot to drain. [`Output`] holds nothing but the
//!   way to the logger, so any agent can go on where another died.
//! - `record` (bytes to records and back) and `dir_name` are pure.

mod cgroup;
mod control;
mod dir_name;
mod drain;
mod log_file;
pub mod pair;
mod record;

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{self, AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

pub use self::cgroup::enter as enter_cgroup;
pub use self::dir_name::BotDirName;
pub use self::record::{MAX_TEXT, Stream};

use self::control::{MAX_LINE, Request};
use self::log_file::{Bounds, CURRENT};
use self::pair::Settings;
use crate::api::condition::Reason;
use crate::api::ids::{BotUid, ContainerId};

/// Longest that one request to the logger may take. It answers within a millisecond unless a disk hangs.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);
/// Longest that a logger may take to start.
const START_DEADLINE: Duration = Duration::from_secs(5);
/// Longest that [`Output::ensure`] tries in all.
const ENSURE_DEADLINE: Duration = Duration::from_secs(10);
/// Longest that the last output is waited for; a status is not held up for a log.
const LAST_OUTPUT_DEADLINE: Duration = Duration::from_millis(500);
/// Between two tries while another logger starts or ends.
const RETRY: Duration = Duration::from_millis(2);

/// Where and how output is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputOptions {
    /// Folder with one folder of logs a bot.
    pub log_root: PathBuf,
    /// Folder, on tmpfs, with the FIFOs, the logger's socket and its lock. At most 90 bytes, for a socket's path is short.
    pub run_dir: PathBuf,
    /// Bytes of one log file.
    pub max_file_bytes: u64,
    /// Log files of one bot, the current one included.
    pub max_files: u32,
    /// The cgroup that the logger moves itself to, from the root of each hierarchy, such as `/berth/logger`. `None` leaves it in
    /// the agent's, with which it would end.
    pub cgroup: Option<String>,
    /// The program `berth`.
    pub program: PathBuf,
}

impl Default for OutputOptions {
    fn default() -> Self {
        Self {
            log_root: "/var/log/berth".into(),
            run_dir: "/run/berth".into(),
            max_file_bytes: 10 << 20,
            max_files: 5,
            cgroup: Some("/berth/logger".to_owned()),
            // Our own file, also when another was put in its place meanwhile.
            program: "/proc/self/exe".into(),
        }
    }
}

/// The FIFOs for a task's stdio.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pipes {
    /// For `CreateTaskRequest.stdout`.
    pub stdout: PathBuf,
    /// For `CreateTaskRequest.stderr`.
    pub stderr: PathBuf,
}

/// What can be seen of a bot's logger without asking it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoggerState {
    /// Whether a drainer lives.
    pub alive: bool,
    /// Whether the bot's FIFOs are there.
    pub pipes: bool,
    /// Bytes of the bot's output that were dropped since its FIFOs were made.
    pub dropped_bytes: u64,
    /// Those of them that its log does not tell yet, because the disk still refuses.
    pub untold_bytes: u64,
}

/// Something of Berth's output on disk, for the sweeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What it is.
    pub kind: FoundKind,
    /// The bot's uid.
    pub uid: BotUid,
    /// The folder.
    pub path: PathBuf,
    /// Time since the folder was last changed: since something in it was made, renamed or removed. Zero when the clock went back.
    pub age: Duration,
}

/// The two kinds of folders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FoundKind {
    /// FIFOs: goes with [`Output::remove`].
    Pipes,
    /// Logs: goes with [`Output::remove_logs`].
    Logs(BotDirName),
}

/// Why output could not be kept, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A file or folder of ours could not be made, removed or listed.
    #[error("can't {step} {}; see to the node's disk and to {}", .path.display(), .path.parent().unwrap_or(Path::new("/")).display())]
    Files {
        /// In words: make, remove, list.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Something else stands where a FIFO should.
    #[error("{} is there and is no FIFO; remove it", .0.display())]
    NotAPipe(PathBuf),
    /// The program could not be run.
    #[error("can't start the logger {}", .program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The logger ended at once, with words of its own.
    #[error("the logger of {} did not start: {words}", .run_dir.display())]
    NotStarted {
        /// Its run_dir.
        run_dir: PathBuf,
        /// What it said.
        words: String,
    },
    /// The logger refused a request.
    #[error("the logger of {} refused {request:?}: {words}", .run_dir.display())]
    Refused {
        /// Its run_dir.
        run_dir: PathBuf,
        /// What it was asked.
        request: String,
        /// Its answer.
        words: String,
    },
    /// The way to the logger broke.
    #[error("can't ask the logger at {} for {request:?}", .socket.display())]
    Ask {
        /// Its socket.
        socket: PathBuf,
        /// What it was asked.
        request: String,
        /// The cause.
        source: io::Error,
    },
    /// It lives (its lock is held) but does not answer: stopped, or in a disk that hangs.
    #[error("the logger at {} did not answer {request:?} within {after:?}; look whether its disk hangs", .socket.display())]
    Unresponsive {
        /// Its socket.
        socket: PathBuf,
        /// What it was asked.
        request: String,
        /// The deadline.
        after: Duration,
    },
}

impl OutputError {
    /// For conditions, Events and metrics.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Files { .. } | Self::NotAPipe(_) => Reason::StorageFailed,
            Self::Start { .. }
            | Self::NotStarted { .. }
            | Self::Refused { .. }
            | Self::Ask { .. }
            | Self::Unresponsive { .. } => Reason::RuntimeFailed,
        }
    }

    /// Whether trying again can help although nobody changes anything.
    pub fn retryable(&self) -> bool {
        match self {
            // Disks fill and empty, processes come and go.
            Self::Files { .. }
            | Self::Start { .. }
            | Self::NotStarted { .. }
            | Self::Refused { .. }
            | Self::Ask { .. }
            | Self::Unresponsive { .. } => true,
            // We don't remove what is not ours.
            Self::NotAPipe(_) => false,
        }
    }
}

/// The way to the node's logger. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Output {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    program: PathBuf,
    /// One start at a time.
    starting: Mutex<()>,
    /// Held open, so that the pair stays while this agent lives although there is no bot.
    attached: Mutex<Option<UnixStream>>,
}

impl Output {
    /// Does nothing yet.
    pub fn new(options: OutputOptions) -> Self {
        let OutputOptions { log_root, run_dir, max_file_bytes, max_files, cgroup, program } = options;
        let settings = Settings { run_dir, log_root, bounds: Bounds { max_file_bytes, max_files }, cgroup };
        let shared = Shared { settings, program, starting: Mutex::default(), attached: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    fn io_dir_of(&self, id: &ContainerId) -> PathBuf {
        self.settings().io_dir().join(id.as_str())
    }

    fn log_dir_of(&self, owner: &BotDirName) -> PathBuf {
        self.settings().log_root.join(owner.as_str())
    }

    /// For the agent's start: a pair lives from now on, of this build and with these settings, and stays until this value is
    /// dropped and the last bot is removed. So the first bot need not wait for one. Safe again; heals a pair that was killed.
    pub async fn attach(&self) -> Result<(), OutputError> {
        let mut attached = self.shared.attached.lock().await;
        if let Some(stream) = &mut *attached
            && ask_on(stream, &Request::Hello).await.is_ok()
        {
            return Ok(());
        }
        make_dir(&self.settings().io_dir())?;
        let (stream, _) = self.ask_or_start(&Request::Hello).await?;
        *attached = Some(stream);
        Ok(())
    }

    /// The FIFOs are there and open at the logger, which is made when there is none and replaced when it is of another build or has
    /// other settings. So a task that gets them never waits at `open`. Safe again; then it costs one question.
    pub async fn ensure(&self, id: &ContainerId, owner: &BotDirName) -> Result<Pipes, OutputError> {
        let pipes = make_pipes(&self.io_dir_of(id), owner)?;
        self.ask_or_start(&Request::Open(id.clone())).await?;
        Ok(pipes)
    }

    /// Whether a drainer lives, and what it dropped of this bot's. Asks nobody: the lock tells of its holder's life.
    pub async fn observe(&self, id: &ContainerId) -> Result<LoggerState, OutputError> {
        let path = self.settings().lock_path();
        let failed = |source: Errno| OutputError::Files { step: "look at", path: path.clone(), source: source.into() };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let alive = match fs::openat(CWD, &path, flags, Mode::empty()) {
            Err(Errno::NOENT) => false,
            Err(errno) => return Err(failed(errno)),
            Ok(lock) => match fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
                Ok(()) => false,
                Err(Errno::WOULDBLOCK) => true,
                Err(errno) => return Err(failed(errno)),
            },
        };
        let dir = self.io_dir_of(id);
        let is_pipe = |stream: Stream| {
            let there = fs::statat(CWD, dir.join(stream.as_str()), AtFlags::SYMLINK_NOFOLLOW);
            matches!(there, Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
        };
        let drops = std::fs::read(dir.join(drain::DROPS)).ok().and_then(|bytes| log_file::parse_drops(&bytes));
        let (untold_bytes, dropped_bytes) = drops.unwrap_or_default();
        let pipes = is_pipe(Stream::Stdout) && is_pipe(Stream::Stderr);
        Ok(LoggerState { alive, pipes, dropped_bytes, untold_bytes })
    }

    /// What the bot wrote is in its log, as far as the disk takes it; the FIFOs are gone; the logs are kept or gone too.
    /// Call it when the task is deleted (then its shim has passed on what the process wrote). Safe again.
    pub async fn remove(&self, id: &ContainerId, keep_logs: bool) -> Result<(), OutputError> {
        let dir = self.io_dir_of(id);
        let request = Request::Close(id.clone());
        if dir.exists() && keep_logs {
            // Also when the pair is dead: what is still in the FIFOs is output that someone may want.
            self.ask_or_start(&request).await?;
        } else {
            match self.ask(&request).await {
                Ok(_) | Err(Asked::Nobody) => {}
                Err(Asked::Failed(error)) => return Err(error),
            }
        }
        if !keep_logs && let Some(owner) = ContainerId::uid_of(id.as_str()) {
            for found in self.list().await? {
                if let FoundKind::Logs(name) = &found.kind
                    && found.uid == owner
                {
                    self.remove_logs(name).await?;
                }
            }
        }
        // Last, for it is what says that there is something to remove.
        remove_dir(dir).await
    }

    /// A bot's logs are gone. To be called when its FIFOs are. Safe again.
    pub async fn remove_logs(&self, owner: &BotDirName) -> Result<(), OutputError> {
        remove_dir(self.log_dir_of(owner)).await
    }

    /// All folders of FIFOs and of logs. What is not named as ours name theirs is not listed.
    pub async fn list(&self) -> Result<Vec<Found>, OutputError> {
        let (io_dir, log_root) = (self.settings().io_dir(), self.settings().log_root.clone());
        let now = SystemTime::now();
        blocking(move || {
            let mut found = list_dirs(&io_dir, now, |name| Some((FoundKind::Pipes, ContainerId::uid_of(name)?)))?;
            found.extend(list_dirs(&log_root, now, |name| {
                let name = BotDirName::parse(name)?;
                let uid = name.uid().clone();
                Some((FoundKind::Logs(name), uid))
            })?);
            Ok(found)
        })
        .await
    }

    /// The last output as text: both streams in order, at most `max_bytes`, for `status.lastTermination.message`.
    ///
    /// First asks the logger to write what is in the FIFOs, but waits no longer than half a second for it. To be called after the
    /// task is deleted: only then has the shim passed on all that the process wrote. Blocks; call it where that is allowed.
    pub fn last_output(&self, owner: &BotDirName, max_bytes: usize) -> io::Result<String> {
        self.last_output_since(owner, None, max_bytes)
    }

    /// The same, without what was logged before `since`: the output of the attempt that began then.
    pub fn last_output_since(
        &self,
        owner: &BotDirName,
        since: Option<jiff::Timestamp>,
        max_bytes: usize,
    ) -> io::Result<String> {
        // When the logger is away there still is what it wrote.
        let _ = self.flush(&owner.uid().container_id());
        // A record has at least one byte that counts, so this holds enough of them.
        let wanted = max_bytes.saturating_mul(record::HEADER + 1).saturating_add(record::MAX_RECORD);
        let mut tail = read_tail(&self.log_dir_of(owner), CURRENT, wanted)?;
        if tail.len() < wanted {
            let older = read_tail(&self.log_dir_of(owner), &format!("{CURRENT}.1"), wanted - tail.len())?;
            tail.splice(0..0, older);
        }
        Ok(record::text(&tail, since.map(record::Stamp::of).as_ref(), max_bytes))
    }

    /// What is in the bot's FIFOs is in its log after this, unfinished lines too. Asks without an executor: it blocks for half
    /// a second at most.
    pub fn flush(&self, id: &ContainerId) -> io::Result<()> {
        let mut stream = std::os::unix::net::UnixStream::connect(self.settings().socket_path())?;
        stream.set_read_timeout(Some(LAST_OUTPUT_DEADLINE))?;
        stream.set_write_timeout(Some(LAST_OUTPUT_DEADLINE))?;
        stream.write_all(Request::Flush(id.clone()).line().as_bytes())?;
        let mut line = String::new();
        io::BufReader::new(stream.take(MAX_LINE as u64)).read_line(&mut line)?;
        Ok(())
    }

    /// Asks; where nobody answers, or one of another build or with other settings, starts a pair and asks that.
    async fn ask_or_start(&self, request: &Request) -> Result<(UnixStream, String), OutputError> {
        let trying = async {
            let ours = self.settings().identity();
            loop {
                match self.ask(request).await {
                    Ok((stream, identity)) if identity == ours => return Ok((stream, identity)),
                    Ok((stream, identity)) => {
                        tracing::info!(
                            theirs = identity,
                            ours,
                            "replacing the logger by one of this build and settings"
                        );
                        drop(stream);
                        self.quit().await?;
                    }
                    Err(Asked::Nobody) => {}
                    Err(Asked::Failed(error)) => return Err(error),
                }
                self.start().await?;
            }
        };
        let unresponsive = || OutputError::Unresponsive {
            socket: self.settings().socket_path(),
            request: request.line().trim_end().to_owned(),
            after: ENSURE_DEADLINE,
        };
        tokio::time::timeout(ENSURE_DEADLINE, trying).await.unwrap_or_else(|_| Err(unresponsive()))
    }

    /// Asks the logger that is there; gives the connection and who answered.
    async fn ask(&self, request: &Request) -> Result<(UnixStream, String), Asked> {
        let socket = self.settings().socket_path();
        let words = || request.line().trim_end().to_owned();
        let asking = async {
            let mut stream = UnixStream::connect(&socket).await?;
            let answer = ask_on(&mut stream, request).await?;
            Ok((stream, answer))
        };
        match tokio::time::timeout(ANSWER_DEADLINE, asking).await {
            Err(_) => {
                Err(Asked::Failed(OutputError::Unresponsive { socket, request: words(), after: ANSWER_DEADLINE }))
            }
            Ok(Err(error)) if is_nobody(&error) => Err(Asked::Nobody),
            Ok(Err(source)) => Err(Asked::Failed(OutputError::Ask { socket, request: words(), source })),
            Ok(Ok((stream, answer))) => match control::parse_answer(&answer) {
                Some(Ok(identity)) => {
                    let identity = identity.to_owned();
                    Ok((stream, identity))
                }
                // One that does not know our words is of another build.
                None | Some(Err("not understood")) => Ok((stream, String::new())),
                Some(Err(refusal)) => Err(Asked::Failed(OutputError::Refused {
                    run_dir: self.settings().run_dir.clone(),
                    request: words(),
                    words: refusal.to_owned(),
                })),
            },
        }
    }

    /// The pair that is there ends, having drained what there is. The FIFOs stay, and the shims keep them open.
    async fn quit(&self) -> Result<(), OutputError> {
        match self.ask(&Request::Quit).await {
            // It answers by closing.
            Ok(_) | Err(Asked::Nobody) => Ok(()),
            Err(Asked::Failed(error)) => Err(error),
        }
    }

    /// Starts a pair, unless there is one: then it waits a moment, for that may be about to answer or to end.
    async fn start(&self) -> Result<(), OutputError> {
        let _one = self.shared.starting.lock().await;
        if let Ok((_, identity)) = self.ask(&Request::Hello).await
            && identity == self.settings().identity()
        {
            // Another task of ours was quicker.
            return Ok(());
        }
        let program = &self.shared.program;
        let failed = |source| OutputError::Start { program: program.clone(), source };
        let mut command = tokio::process::Command::new(program);
        command.arg0("berth").arg(pair::SUBCOMMAND).args(self.settings().arguments());
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let output = tokio::time::timeout(START_DEADLINE, command.kill_on_drop(true).output());
        let output = output.await.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
        let said = String::from_utf8_lossy(&output.stdout);
        let said = said.trim();
        if let Some(rest) = said.strip_prefix(pair::READY) {
            if !rest.is_empty() {
                tracing::warn!(warning = rest.trim(), "the logger started with a warning");
            }
            return Ok(());
        }
        if said == pair::HELD {
            tokio::time::sleep(RETRY).await;
            return Ok(());
        }
        let words = if said.is_empty() { output.status.to_string() } else { said.to_owned() };
        Err(OutputError::NotStarted { run_dir: self.settings().run_dir.clone(), words })
    }
}

/// Why a question had no answer.
enum Asked {
    /// There is no logger, or it ended while it was asked.
    Nobody,
    Failed(OutputError),
}

fn is_nobody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
    )
}

/// One question and its answer, without the newline.
async fn ask_on(stream: &mut UnixStream, request: &Request) -> io::Result<String> {
    stream.write_all(request.line().as_bytes()).await?;
    let mut line = String::new();
    // Nothing follows an answer, so what the reader buffers is that answer and no more.
    tokio::io::BufReader::new(stream.take(MAX_LINE as u64)).read_line(&mut line).await?;
    match line.strip_suffix('\n') {
        Some(line) => Ok(line.to_owned()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn make_dir(path: &Path) -> Result<(), OutputError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| OutputError::Files { step: "make", path: path.to_owned(), source })
}

/// Makes folder, `owner` and both FIFOs; what is there already is kept. On tmpfs, so it does not wait for a disk.
fn make_pipes(dir: &Path, owner: &BotDirName) -> Result<Pipes, OutputError> {
    make_dir(dir)?;
    // First whose it is: the logger drains nothing that it can't place. By rename, so that it is never half there.
    let path = dir.join(drain::OWNER);
    if std::fs::read(&path).ok().as_deref() != Some(owner.as_str().as_bytes()) {
        let failed = |source| OutputError::Files { step: "write", path: path.clone(), source };
        let new = dir.join("owner.new");
        std::fs::write(&new, owner.as_str()).map_err(failed)?;
        std::fs::rename(&new, &path).map_err(failed)?;
    }
    let fifo = |stream: Stream| {
        let path = dir.join(stream.as_str());
        match fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0) {
            Ok(()) => return Ok(path),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(OutputError::Files { step: "make the FIFO", path, source: errno.into() }),
        }
        match fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo => Ok(path),
            Ok(_) => Err(OutputError::NotAPipe(path)),
            Err(errno) => Err(OutputError::Files { step: "look at", path, source: errno.into() }),
        }
    };
    Ok(Pipes { stdout: fifo(Stream::Stdout)?, stderr: fifo(Stream::Stderr)? })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OutputError> + Send + 'static,
) -> Result<T, OutputError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The executor ends; nobody will read this.
            Err(_) => Err(OutputError::Files {
                step: "finish with",
                path: PathBuf::from("/"),
                source: io::ErrorKind::Interrupted.into(),
            }),
        },
    }
}

async fn remove_dir(path: PathBuf) -> Result<(), OutputError> {
    blocking(move || match std::fs::remove_dir_all(&path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(OutputError::Files { step: "remove", path, source }),
    })
    .await
}

fn list_dirs(
    root: &Path,
    now: SystemTime,
    ours: impl Fn(&str) -> Option<(FoundKind, BotUid)>,
) -> Result<Vec<Found>, OutputError> {
    let failed = |source| OutputError::Files { step: "list", path: root.to_owned(), source };
    let entries = match std::fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        // An incomplete list is not a list (FAULTS.md, rule 1).
        let entry = entry.map_err(failed)?;
        let Some((kind, uid)) = entry.file_name().to_str().and_then(&ours) else { continue };
        // Does not follow links: `DirEntry` looks at the entry itself.
        let meta = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(failed)?,
        };
        if meta.is_dir() {
            let changed = meta.modified().map_err(failed)?;
            let age = now.duration_since(changed).unwrap_or_default();
            found.push(Found { kind, uid, path: entry.path(), age });
        }
    }
    Ok(found)
}

/// The last `max` bytes of a log file, from the start of a record on; nothing when there is no such file.
fn read_tail(dir: &Path, name: &str, max: usize) -> io::Result<Vec<u8>> {
    let missing = |errno: Errno| if errno == Errno::NOENT { Ok(Vec::new()) } else { Err(io::Error::from(errno)) };
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let dir: OwnedFd = match fs::openat(CWD, dir, flags | OFlags::DIRECTORY, Mode::empty()) {
        Ok(dir) => dir,
        Err(errno) => return missing(errno),
    };
    let file = match fs::openat(&dir, name, flags | OFlags::RDONLY, Mode::empty()) {
        Ok(file) => std::fs::File::from(file),
        Err(errno) => return missing(errno),
    };
    let size = file.metadata()?.len();
    let from = size.saturating_sub(max as u64);
    let mut bytes = vec![0; usize::try_from(size - from).unwrap_or(max)];
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], from + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    if from > 0 {
        let start = bytes.iter().position(|&b| b == b'\n').map_or(bytes.len(), |at| at + 1);
        bytes.drain(..start);
    }
    Ok(bytes)
}
