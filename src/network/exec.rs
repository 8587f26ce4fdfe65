//! Runs a helper program to its end, or to its deadline.

use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// The most that is read of what a program prints, in bytes: a CNI result has about a thousand.
pub(super) const MAX_OUTPUT: u64 = 64 * 1024;

/// How a program ended and what it printed, each stream cut at [`MAX_OUTPUT`].
#[derive(Debug)]
pub(super) struct Ended {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

#[derive(Debug)]
pub(super) enum ExecError {
    /// It could not be started, or its end not be learned.
    Io(io::Error),
    /// It was still running, or something that it started still held its output, and was killed.
    TimedOut,
}

/// Runs `program` in a process group of its own with `input` as its standard input. At the deadline the whole group is
/// killed: plugins call plugins, and a grandchild would go on changing the network after we have cleaned up.
pub(super) async fn run(
    program: &Path,
    arguments: &[&str],
    environment: &[(&str, &std::ffi::OsStr)],
    input: &[u8],
    deadline: Duration,
) -> Result<Ended, ExecError> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        // Nothing of the agent's own environment is the plugin's business.
        .env_clear()
        .envs(environment.iter().copied())
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(ExecError::Io)?;
    let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());

    let work = async {
        let write = async {
            if let Some(mut stdin) = stdin {
                // A program that does not read its input tells why by its exit code, not by our broken pipe.
                let _ = stdin.write_all(input).await;
            }
        };
        let (_, stdout, stderr, status) = tokio::join!(write, read(stdout), read(stderr), child.wait());
        Ok(Ended { status: status?, stdout: stdout?, stderr: stderr? })
    };
    match tokio::time::timeout(deadline, work).await {
        Ok(ended) => ended.map_err(ExecError::Io),
        Err(_) => {
            if let Some(group) = group {
                // Gone already is what we want.
                let _ = kill_process_group(group, Signal::KILL);
            }
            // Reaps it. One that not even KILL ends at once (stuck in the kernel) is reaped by tokio later.
            let _ = tokio::time::timeout(Duration::from_secs(1), child.wait()).await;
            Err(ExecError::TimedOut)
        }
    }
}

async fn read(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(MAX_OUTPUT).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}
