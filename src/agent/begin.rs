//! What all else of an agent stands on: its folders, the lock of its node, its namespace in containerd. Each is tried until it is there.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use containerd_client::services::v1::{CreateNamespaceRequest, Namespace};
use rustix::fs::FlockOperation;
use tokio_util::sync::CancellationToken;

use crate::api::condition::{Reason, chain};
use crate::containerd::{CallContext as _, Containerd};

use super::AgentArgs;
use super::metrics::Metrics;
use super::run;

/// Does what all else stands on, again and again until it is done: a disk that is full or read-only is mended, and an
/// agent that ends for it says no more than one that waits. `None` when the agent is to stop.
pub(super) async fn until_done<T>(
    metrics: &Metrics,
    stop: &CancellationToken,
    mut attempt: impl AsyncFnMut() -> Result<T, (Reason, anyhow::Error)>,
) -> Option<T> {
    let mut wait = Duration::from_secs(1);
    loop {
        match attempt().await {
            Ok(done) => return Some(done),
            Err((reason, error)) => {
                metrics.error(reason);
                tracing::error!(%reason, retry_in = ?wait, error = format!("{error:#}"), "the agent can't begin");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(run::jittered(wait)) => {}
            () = stop.cancelled() => return None,
        }
        wait = (wait * 2).min(Duration::from_secs(30));
    }
}

/// Makes the agent's folders; gives the file of its lock.
pub(super) fn prepare_directories(args: &AgentArgs) -> anyhow::Result<fs::File> {
    let dirs = [
        args.run_dir.clone(),
        args.state_dir.clone(),
        args.log_dir.clone(),
        args.mnt_dir(),
        args.files_dir(),
        args.debts_dir(),
        args.snapshots_dir(),
    ];
    for dir in dirs {
        fs::create_dir_all(&dir).with_context(|| format!("can't create {}", dir.display()))?;
    }
    ensure_tmpfs(&args.files_dir())?;
    let path = args.state_dir.join("agent.lock");
    fs::File::create(&path).with_context(|| format!("can't create {}", path.display()))
}

/// Secret values must not come onto a disk: where `/run` is none, a tmpfs is mounted.
fn ensure_tmpfs(dir: &Path) -> anyhow::Result<()> {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let found = rustix::fs::statfs(dir).with_context(|| format!("can't look at {}", dir.display()))?;
    if u64::try_from(found.f_type).is_ok_and(|magic| magic == TMPFS_MAGIC) {
        return Ok(());
    }
    let flags =
        rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV | rustix::mount::MountFlags::NOEXEC;
    rustix::mount::mount("berth", dir, "tmpfs", flags, Some(c"mode=0700"))
        .with_context(|| format!("can't mount a tmpfs on {}", dir.display()))
}

/// Waits until no other agent of this node runs. The lock goes with the process, however that ends.
pub(super) async fn lock_host(file: fs::File) -> anyhow::Result<fs::File> {
    let mut told = false;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                if !told {
                    tracing::warn!("another agent of this node runs; waiting until it ends");
                    told = true;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(error).context("can't lock agent.lock in the state directory"),
        }
    }
}

/// containerd makes a namespace by itself at the first use, but without it `ctr` and the sweeper see an error instead of
/// nothing. Waits for containerd where it is away.
pub(super) async fn ensure_namespace(containerd: &Containerd, stop: &CancellationToken) {
    loop {
        let name = containerd.namespace().to_owned();
        let request =
            CreateNamespaceRequest { namespace: Some(Namespace { name: name.clone(), ..Namespace::default() }) };
        match containerd.namespaces().create(containerd.request(request)).await.call("create namespace", name) {
            Ok(_) => return,
            Err(error) if error.is_already_exists() => return,
            Err(error) => tracing::warn!(
                error = %chain(&error), socket = %containerd.address().display(), "containerd can't be used; tried again"
            ),
        }
        tokio::select! {
            () = tokio::time::sleep(run::jittered(Duration::from_secs(2))) => {}
            () = stop.cancelled() => return,
        }
    }
}
