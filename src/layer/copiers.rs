//! The agent's side: starts a copier, and talks with it.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Stdio;
use std::task::{Context, Poll};

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWriteExt as _, BufReader, Lines, ReadBuf};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::copier::SUBCOMMAND;
use super::job::{Hold, Job, Said};

/// A copier could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CopierError {
    /// The program could not be run.
    #[error("can't start the copier {}", .program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It ended in the middle, or the way to it broke.
    #[error("the copier ended in the middle of its work; was it killed?")]
    Died(#[source] Option<io::Error>),
    /// It said something that is none of its words.
    #[error("the copier said {line:?}")]
    Garbled {
        /// What it said.
        line: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Starts copiers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Copiers {
    program: PathBuf,
    cgroup: Option<String>,
}

/// A copier at work. Dropped, it ends: it thaws what it has frozen, and leaves no process.
#[derive(Debug)]
pub struct Copy {
    // Reaped in the background when this is dropped.
    _child: Child,
    input: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
}

impl Copiers {
    /// `program` is `berth`; `cgroup` where copiers go, from the root of each hierarchy: `None` leaves them in the agent's.
    pub fn new(program: PathBuf, cgroup: Option<String>) -> Self {
        Self { program, cgroup }
    }

    /// Starts a copier with a job.
    pub async fn start(&self, job: &Job) -> Result<Copy, CopierError> {
        let (child, input, output) = self.spawn()?;
        let mut copy = Copy { _child: child, input, said: BufReader::new(output).lines() };
        copy.tell(job).await?;
        Ok(copy)
    }

    /// Starts a copier with a job that gives bytes ([`Job::Tar`] from a byte on).
    pub async fn stream(&self, job: &Job) -> Result<Stream, CopierError> {
        let (child, mut input, output) = self.spawn()?;
        tell(&mut input, job).await?;
        Ok(Stream { _child: child, _input: input, output })
    }

    fn spawn(&self) -> Result<(Child, ChildStdin, ChildStdout), CopierError> {
        let failed = |source| CopierError::Start { program: self.program.clone(), source };
        let mut command = Command::new(&self.program);
        command.arg0("berth").arg(SUBCOMMAND).args(&self.cgroup);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(failed)?;
        let missing = || failed(io::Error::other("no pipe"));
        let input = child.stdin.take().ok_or_else(missing)?;
        let output = child.stdout.take().ok_or_else(missing)?;
        Ok((child, input, output))
    }
}

/// The bytes that a copier gives. Dropped, it ends.
#[derive(Debug)]
pub struct Stream {
    _child: Child,
    // Its end is the agent's.
    _input: ChildStdin,
    output: ChildStdout,
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_read(cx, to)
    }
}

async fn tell(input: &mut ChildStdin, what: &impl serde::Serialize) -> Result<(), CopierError> {
    let died = |error| CopierError::Died(Some(error));
    let mut line = serde_json::to_vec(what).map_err(|error| died(error.into()))?;
    line.push(b'\n');
    input.write_all(&line).await.map_err(died)?;
    input.flush().await.map_err(died)
}

impl Copy {
    /// What it says next. Cancel-safe: a line that is read in part stays.
    ///
    /// # Errors
    /// It is dead, or said nonsense: nothing it made may be used.
    pub async fn next(&mut self) -> Result<Said, CopierError> {
        match self.said.next_line().await {
            Ok(Some(line)) => serde_json::from_str(&line).map_err(|source| CopierError::Garbled { line, source }),
            Ok(None) => Err(CopierError::Died(None)),
            Err(error) => Err(CopierError::Died(Some(error))),
        }
    }

    /// Lets it go on after [`Said::Precopied`].
    pub async fn go(&mut self, hold: Hold) -> Result<(), CopierError> {
        self.tell(&hold).await
    }

    async fn tell(&mut self, what: &impl serde::Serialize) -> Result<(), CopierError> {
        tell(&mut self.input, what).await
    }
}
