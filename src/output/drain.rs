//! The drainer: one thread that moves bytes from the FIFOs of all bots into their logs.
//!
//! ```text
//! epoll ── FIFOs       at most 64 KiB a turn from each, so that a flood takes its share and no more
//!       ── logger.sock requests of the agent (`control`)
//!       ── twin        the other process of the pair died: make it anew (`pair`)
//! ```
//!
//! Every few seconds it looks whether a bot's FIFOs were unlinked behind its back, drains what is left and lets go.
//!
//! It keeps no state that is not on disk: which bots there are stands in `RUN_DIR/io`, so a drainer that follows a dead
//! one begins by reading that folder. What dies with a drainer is what it read and had not written: at most one read
//! (64 KiB) of one bot, and each stream's unfinished line (at most 16 KiB, held at most half a second).
//!
//! Memory is bounded whatever bots do: two buffers in all, and at most one unfinished line a stream.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::fs::{self, AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::control::{self, MAX_LINE, Request};
use super::dir_name::BotDirName;
use super::log_file::{Drops, LogFile};
use super::pair::{self, Forked, Settings};
use super::record::{self, MAX_RECORD, Splitter, Stamp, Stream};
use crate::api::ids::ContainerId;

/// The most that is read from one FIFO in one turn; a pipe holds as much unless told otherwise.
const READ: usize = 64 * 1024;
/// Records of one read are gathered to this size before they are written.
const GATHER: usize = 128 * 1024;
/// How long the rest of a line is waited for.
const PART_WAIT: Duration = Duration::from_millis(500);
/// The most that is drained from one FIFO at a flush: what a pipe can hold and more; an endless writer must not hold us.
const FLUSH: usize = 1024 * 1024;
/// How often it is looked for what nobody told, and after a failure to open something.
const SWEEP: Duration = Duration::from_secs(5);
const SWEEP_AFTER_FAILURE: Duration = Duration::from_secs(1);
/// How long a drainer without bots waits for the first word of the agent that started it.
const FIRST_WORD: Duration = Duration::from_secs(5);
/// How often, a millisecond apart, the lock is tried: of a predecessor that is dying, or that may be about to answer.
const LOCK_TRIES_AFTER_DEATH: u32 = 5000;
const LOCK_TRIES_FIRST: u32 = 20;
/// Connections at one time; more are closed at once, and the agent tries again.
const MAX_CONNECTIONS: usize = 256;

/// How a drainer ends.
#[derive(Debug)]
pub enum End {
    /// Nothing is left to drain, or it was asked to.
    Done,
    /// Another drainer holds the lock.
    Held,
    /// This is the forked copy, which is now the keeper; the socket leads to the drainer.
    Keeper(OwnedFd),
}

/// Drains until there is no bot and no agent left. `ready` is called once all is open, on the first start of a pair.
pub fn run(settings: &Settings, mut ready: Option<&mut dyn FnMut() -> io::Result<()>>) -> io::Result<End> {
    // The twin comes first when we follow a dead one: should we fail below, the next try is already there. On the first
    // start the agent waits for our answer and hears of a failure.
    let first = ready.is_some();
    let tries = if first { LOCK_TRIES_FIRST } else { LOCK_TRIES_AFTER_DEATH };
    let Some(lock) = take_lock(settings, tries)? else { return Ok(End::Held) };
    let mut twin = None;
    if !first {
        match pair::fork_twin() {
            Ok(Forked::Original(socket)) => twin = Some(socket),
            Ok(Forked::Twin(socket)) => return Ok(End::Keeper(socket)),
            // Out of processes or memory: the bots come first, the twin is made with a later sweep.
            Err(_) => {}
        }
    }
    let mut drainer = Drainer::start(settings, lock)?;
    match twin {
        Some(socket) => drainer.watch_twin(socket)?,
        None => {
            if let Some(keeper) = drainer.make_twin()? {
                return Ok(keeper);
            }
        }
    }
    if let Some(ready) = ready.take() {
        ready()?;
    }
    drainer.run()
}

/// Takes the lock that says "there is a drainer"; `None` when another has it.
fn take_lock(settings: &Settings, tries: u32) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let lock = fs::openat(CWD, settings.lock_path(), flags, Mode::from_raw_mode(0o600))?;
    for _ in 0..tries {
        match fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(lock)),
            // A killed process lets go of its socket to us a moment before its lock.
            Err(Errno::WOULDBLOCK) => pair::pause(Duration::from_millis(1)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(None)
}

struct Drainer<'s> {
    settings: &'s Settings,
    identity: String,
    epoll: OwnedFd,
    listener: OwnedFd,
    twin: Option<OwnedFd>,
    bots: Vec<Option<Bot>>,
    connections: Vec<Option<Connection>>,
    read_buffer: Vec<u8>,
    records: Vec<u8>,
    sweep_at: Instant,
    /// Since when there has been neither bot nor agent, and whether one was there before.
    lonely_until: Option<Instant>,
    /// Held for its lock; closing it lets go. Last, so that all else is let go before.
    _lock: OwnedFd,
}

struct Bot {
    id: ContainerId,
    sources: [Source; 2],
    log: LogFile,
}

struct Source {
    stream: Stream,
    fifo: OwnedFd,
    splitter: Splitter,
    /// When the held part is written although its line is not whole.
    part_at: Option<Instant>,
}

struct Connection {
    socket: OwnedFd,
    line: Vec<u8>,
}

/// What an epoll event is about, packed into its 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Listener,
    Twin,
    Fifo { bot: usize, source: usize },
    Connection(usize),
}

impl Token {
    fn pack(self) -> epoll::EventData {
        let (kind, index) = match self {
            Self::Listener => (0, 0),
            Self::Twin => (2, 0),
            Self::Fifo { bot, source } => (3, bot * 2 + source),
            Self::Connection(index) => (4, index),
        };
        epoll::EventData::new_u64(kind << 32 | index as u64)
    }

    fn unpack(data: epoll::EventData) -> Option<Self> {
        let index = (data.u64() & 0xffff_ffff) as usize;
        match data.u64() >> 32 {
            0 => Some(Self::Listener),
            2 => Some(Self::Twin),
            3 => Some(Self::Fifo { bot: index / 2, source: index % 2 }),
            4 => Some(Self::Connection(index)),
            _ => None,
        }
    }
}

impl<'s> Drainer<'s> {
    fn start(settings: &'s Settings, lock: OwnedFd) -> io::Result<Self> {
        std::fs::create_dir_all(settings.io_dir())?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let listener = listen(settings)?;
        epoll::add(&epoll, &listener, Token::Listener.pack(), epoll::EventFlags::IN)?;
        let now = Instant::now();
        let mut drainer = Self {
            settings,
            identity: settings.identity(),
            epoll,
            listener,
            twin: None,
            bots: Vec::new(),
            connections: Vec::new(),
            read_buffer: vec![0; READ],
            records: Vec::with_capacity(GATHER),
            sweep_at: now + SWEEP,
            lonely_until: Some(now + FIRST_WORD),
            _lock: lock,
        };
        drainer.scan(now);
        Ok(drainer)
    }

    fn watch_twin(&mut self, socket: OwnedFd) -> io::Result<()> {
        epoll::add(&self.epoll, &socket, Token::Twin.pack(), epoll::EventFlags::IN)?;
        self.twin = Some(socket);
        Ok(())
    }

    /// Forks the keeper. In the copy this gives what it is to become; its state is let go by returning it.
    fn make_twin(&mut self) -> io::Result<Option<End>> {
        match pair::fork_twin() {
            Ok(Forked::Original(socket)) => self.watch_twin(socket)?,
            Ok(Forked::Twin(socket)) => return Ok(Some(End::Keeper(socket))),
            // Out of processes or memory: tried again with the sweep.
            Err(_) => self.sweep_at = Instant::now() + SWEEP_AFTER_FAILURE,
        }
        Ok(None)
    }

    fn run(mut self) -> io::Result<End> {
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; 64];
        loop {
            let timeout = self.next_deadline(Instant::now());
            let timeout = rustix::event::Timespec {
                tv_sec: timeout.as_secs() as i64,
                tv_nsec: i64::from(timeout.subsec_nanos()) as _,
            };
            let events = match epoll::wait(&self.epoll, events.as_mut_slice(), Some(&timeout)) {
                Ok((events, _)) => events,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let now = Instant::now();
            let mut quit = false;
            for event in events.iter() {
                match Token::unpack(event.data) {
                    Some(Token::Fifo { bot, source }) => {
                        self.pump(bot, source, now);
                    }
                    Some(Token::Listener) => self.accept(),
                    Some(Token::Connection(index)) => {
                        quit |= self.serve(index, now) == Next::Quit;
                    }
                    Some(Token::Twin) => {
                        self.twin = None;
                        if let Some(keeper) = self.make_twin()? {
                            return Ok(keeper);
                        }
                    }
                    None => {}
                }
            }
            if quit {
                return self.quit(now);
            }
            self.timers(now);
            if now >= self.sweep_at {
                self.sweep(now);
                if self.twin.is_none()
                    && let Some(keeper) = self.make_twin()?
                {
                    return Ok(keeper);
                }
            }
            let lonely = self.bots.iter().all(Option::is_none) && self.connections.iter().all(Option::is_none);
            if !lonely {
                // From now on the end of the last of them is our end, at once.
                self.lonely_until = None;
            } else if self.lonely_until.is_none_or(|until| now >= until) {
                return self.quit(now);
            }
        }
    }

    /// Ends in good order.
    fn quit(mut self, now: Instant) -> io::Result<End> {
        for index in 0..self.bots.len() {
            self.finish(index, now);
        }
        if let Some(twin) = &self.twin {
            pair::dismiss(twin);
        }
        // Ours as long as we hold the lock.
        let _ = fs::unlinkat(CWD, self.settings.socket_path(), AtFlags::empty());
        Ok(End::Done)
    }

    /// How long nothing has to be done by the clock.
    fn next_deadline(&self, now: Instant) -> Duration {
        let mut at = self.sweep_at;
        if let Some(until) = self.lonely_until {
            at = at.min(until);
        }
        for bot in self.bots.iter().flatten() {
            for part_at in bot.sources.iter().filter_map(|source| source.part_at) {
                at = at.min(part_at);
            }
            if bot.log.drops().is_untold() {
                at = at.min(now + PART_WAIT);
            }
        }
        at.saturating_duration_since(now)
    }

    /// Parts whose rest did not come, and drops that the log does not tell yet.
    fn timers(&mut self, now: Instant) {
        for index in 0..self.bots.len() {
            let Some(bot) = &mut self.bots[index] else { continue };
            if bot.log.drops().is_untold() {
                bot.log.settle_drops(now, &stamp());
            }
            for source in &mut bot.sources {
                if source.part_at.is_some_and(|at| now >= at) {
                    source.flush(&mut bot.log, &mut self.records, now);
                }
            }
        }
    }

    /// One read of one FIFO; how many bytes it gave.
    fn pump(&mut self, bot: usize, source: usize, now: Instant) -> usize {
        let Some(Some(bot)) = self.bots.get_mut(bot) else { return 0 };
        bot.sources[source].pump(&mut bot.log, &mut self.read_buffer, &mut self.records, now)
    }

    /// What is in the bot's FIFOs now is in its log, unfinished lines too.
    fn flush(&mut self, index: usize, now: Instant) {
        for source in 0..2 {
            let mut drained = 0;
            while drained < FLUSH {
                match self.pump(index, source, now) {
                    0 => break,
                    n => drained += n,
                }
            }
        }
        if let Some(Some(bot)) = self.bots.get_mut(index) {
            for source in &mut bot.sources {
                source.flush(&mut bot.log, &mut self.records, now);
            }
            bot.log.settle_drops(now, &stamp());
        }
    }

    /// Lets go of a bot, after what it left is written.
    fn finish(&mut self, index: usize, now: Instant) {
        self.flush(index, now);
        if let Some(bot) = self.bots.get_mut(index).and_then(Option::take) {
            for source in &bot.sources {
                let _ = epoll::delete(&self.epoll, &source.fifo);
            }
        }
    }

    fn find(&self, id: &ContainerId) -> Option<usize> {
        self.bots.iter().position(|bot| bot.as_ref().is_some_and(|bot| &bot.id == id))
    }

    /// The folder with the bots' folders. By name each time: it may have been removed and made again.
    fn io_dir(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        Ok(fs::openat(CWD, self.settings.io_dir(), flags, Mode::empty())?)
    }

    /// Drains a bot from now on.
    fn open(&mut self, id: &ContainerId, now: Instant) -> io::Result<()> {
        let io_dir = self.io_dir()?;
        if let Some(index) = self.find(id) {
            let known = self.bots[index].as_ref().is_some_and(|bot| {
                bot.sources.iter().all(|source| {
                    let path = format!("{id}/{}", source.stream.as_str());
                    let there = fs::statat(&io_dir, path, AtFlags::SYMLINK_NOFOLLOW);
                    matches!((there, fs::fstat(&source.fifo)), (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
                })
            });
            if known {
                return Ok(());
            }
            // Removed and made again under the same id.
            self.finish(index, now);
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = fs::openat(&io_dir, id.as_str(), flags, Mode::empty())?;
        let owner = read_owner(&dir)?;
        if &owner.uid().container_id() != id {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the file owner of {id} names {owner}")));
        }
        let source = |stream: Stream| -> io::Result<Source> {
            // For reading and writing: so it is never without a writer, and the end of one attempt is no end of file.
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fifo = fs::openat(&dir, stream.as_str(), flags, Mode::empty())?;
            if FileType::from_raw_mode(fs::fstat(&fifo)?.st_mode) != FileType::Fifo {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{id}/{} is no FIFO", stream.as_str())));
            }
            Ok(Source { stream, fifo, splitter: Splitter::default(), part_at: None })
        };
        let sources = [source(Stream::Stdout)?, source(Stream::Stderr)?];
        let drops = Drops::open(&dir, DROPS);
        let log = LogFile::new(self.settings.log_root.clone(), owner, self.settings.bounds, drops);
        let index = free_slot(&mut self.bots);
        for (number, source) in sources.iter().enumerate() {
            let token = Token::Fifo { bot: index, source: number };
            epoll::add(&self.epoll, &source.fifo, token.pack(), epoll::EventFlags::IN)?;
        }
        self.bots[index] = Some(Bot { id: id.clone(), sources, log });
        Ok(())
    }

    /// Opens all bots that stand in the folder.
    fn scan(&mut self, now: Instant) {
        let dir = match self.io_dir().and_then(|dir| Ok(Dir::read_from(dir)?)) {
            Ok(dir) => dir,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    self.sweep_at = now + SWEEP_AFTER_FAILURE;
                }
                return;
            }
        };
        for entry in dir.flatten() {
            let Some(uid) = entry.file_name().to_str().ok().and_then(ContainerId::uid_of) else { continue };
            match self.open(&uid.container_id(), now) {
                Ok(()) => {}
                // Half made by an agent that will ask for it when it is whole.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(_) => self.sweep_at = now + SWEEP_AFTER_FAILURE,
            }
        }
    }

    /// Looks for itself: bots whose FIFOs were unlinked go, those that were missed come.
    fn sweep(&mut self, now: Instant) {
        self.sweep_at = now + SWEEP;
        for index in 0..self.bots.len() {
            let unlinked = self.bots[index].as_ref().is_some_and(|bot| {
                bot.sources.iter().any(|source| !matches!(fs::fstat(&source.fifo), Ok(stat) if stat.st_nlink > 0))
            });
            if unlinked {
                self.finish(index, now);
            }
        }
        self.scan(now);
    }

    fn accept(&mut self) {
        while let Ok(socket) = net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            if self.connections.iter().flatten().count() >= MAX_CONNECTIONS {
                continue;
            }
            let index = free_slot(&mut self.connections);
            let token = Token::Connection(index).pack();
            if epoll::add(&self.epoll, &socket, token, epoll::EventFlags::IN).is_ok() {
                self.connections[index] = Some(Connection { socket, line: Vec::new() });
                self.lonely_until = None;
            }
        }
    }

    /// Reads what a connection has and answers whole lines.
    fn serve(&mut self, index: usize, now: Instant) -> Next {
        let mut buffer = [0; MAX_LINE];
        let Some(Some(connection)) = self.connections.get_mut(index) else { return Next::GoOn };
        match retry_on_intr(|| rustix::io::read(&connection.socket, &mut buffer)) {
            Ok(n) if n > 0 && connection.line.len() + n <= MAX_LINE => connection.line.extend_from_slice(&buffer[..n]),
            Err(Errno::AGAIN) => return Next::GoOn,
            // The end, an error, or someone who talks too much.
            Ok(_) | Err(_) => {
                self.connections[index] = None;
                return Next::GoOn;
            }
        }
        while let Some(end) = self.connections[index].as_ref().and_then(|c| c.line.iter().position(|&b| b == b'\n')) {
            let line: Vec<u8> = match &mut self.connections[index] {
                Some(connection) => connection.line.drain(..=end).collect(),
                None => break,
            };
            let request = std::str::from_utf8(&line[..end]).ok().and_then(Request::parse);
            let done = match &request {
                Some(Request::Open(id)) => self.open(id, now).map_err(|error| format!("can't open {id}: {error}")),
                Some(Request::Flush(id)) => match self.find(id) {
                    Some(index) => {
                        self.flush(index, now);
                        Ok(())
                    }
                    None => Err(format!("{id} is not open")),
                },
                Some(Request::Close(id)) => {
                    if let Some(index) = self.find(id) {
                        self.finish(index, now);
                    }
                    Ok(())
                }
                Some(Request::Hello | Request::Quit) => Ok(()),
                None => Err("not understood".to_owned()),
            };
            if request == Some(Request::Quit) {
                // Answered by the end of the stream, once all is drained and the lock is free.
                return Next::Quit;
            }
            let answer = control::answer(&self.identity, &done);
            let sent = match &self.connections[index] {
                Some(connection) => rustix::io::write(&connection.socket, answer.as_bytes()),
                None => break,
            };
            // An agent that does not take its answers must not hold us up.
            if !matches!(sent, Ok(n) if n == answer.len()) {
                self.connections[index] = None;
            }
        }
        Next::GoOn
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Quit,
}

impl Source {
    fn pump(&mut self, log: &mut LogFile, buffer: &mut [u8], records: &mut Vec<u8>, now: Instant) -> usize {
        // Nothing there, or an error that a pipe does not have.
        let n = retry_on_intr(|| rustix::io::read(&self.fifo, &mut *buffer)).unwrap_or(0);
        if n == 0 {
            return 0;
        }
        let stamp = stamp();
        let stream = self.stream;
        let mut ended = false;
        records.clear();
        self.splitter.push(&buffer[..n], |tag, head, tail| {
            ended = true;
            record::write(records, &stamp, stream, tag, head, tail);
            // Never beyond what was allocated at the start.
            if records.len() + MAX_RECORD > GATHER {
                log.append(now, &stamp, records);
                records.clear();
            }
        });
        log.append(now, &stamp, records);
        self.part_at = match self.part_at {
            _ if !self.splitter.is_holding() => None,
            Some(at) if !ended => Some(at),
            _ => Some(now + PART_WAIT),
        };
        n
    }

    /// Writes the held part.
    fn flush(&mut self, log: &mut LogFile, records: &mut Vec<u8>, now: Instant) {
        let stamp = stamp();
        records.clear();
        self.splitter.flush(|tag, head, tail| record::write(records, &stamp, self.stream, tag, head, tail));
        log.append(now, &stamp, records);
        self.part_at = None;
    }
}

fn stamp() -> Stamp {
    Stamp::of(jiff::Timestamp::now())
}

/// File beside the FIFOs with the name of the log directory.
pub const OWNER: &str = "owner";
/// File beside the FIFOs with what was dropped (`log_file::parse_drops`).
pub const DROPS: &str = "dropped";

fn read_owner(dir: &OwnedFd) -> io::Result<BotDirName> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = fs::openat(dir, OWNER, flags, Mode::empty())?;
    let mut text = [0; 512];
    let n = retry_on_intr(|| rustix::io::read(&file, &mut text))?;
    std::str::from_utf8(&text[..n])
        .ok()
        .and_then(BotDirName::parse)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the file owner names no log directory"))
}

/// The socket that the agent talks to. Whoever calls holds the lock, so what is there is a dead one's.
fn listen(settings: &Settings) -> io::Result<OwnedFd> {
    let path = settings.socket_path();
    let address = SocketAddrUnix::new(&path)?;
    match fs::unlinkat(CWD, &path, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    net::bind(socket.as_fd(), &address)?;
    fs::chmodat(CWD, &path, Mode::from_raw_mode(0o600), AtFlags::empty())?;
    net::listen(&socket, 128)?;
    Ok(socket)
}

fn free_slot<T>(slots: &mut Vec<Option<T>>) -> usize {
    match slots.iter().position(Option::is_none) {
        Some(index) => index,
        None => {
            slots.push(None);
            slots.len() - 1
        }
    }
}
