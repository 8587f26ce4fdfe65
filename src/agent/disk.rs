//! The node's disk: images that nobody uses go before it is full, and the BotNode says when it nearly is.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::PluginsRequest;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api::condition::chain;
use crate::containerd::{CallContext, CallFailed, Containerd};
use crate::image::{CollectionPolicy, FsUsage, InUse};

use super::desired::{Goal, desired};
use super::run::Shared;

/// How often is looked, as kubelet's image collector.
const EVERY: Duration = Duration::from_secs(300);

/// When something is done about the disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// When which images go.
    pub images: CollectionPolicy,
    /// With less room than this, in percent, the node takes no new bots. By default 12: kubelet's `nodefs.available` is
    /// 10 %, and ours must speak first.
    pub pressure_percent: u64,
}

/// What the BotNode says of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Of the file system below containerd's snapshots, in percent, rounded down.
    pub free_percent: u64,
    /// The least that it is to be.
    pub pressure_percent: u64,
}

impl Room {
    fn of(usage: FsUsage, pressure_percent: u64) -> Self {
        // A size of nothing can't be judged; it counts as room.
        let free = u128::from(usage.available) * 100;
        Self {
            free_percent: free.checked_div(u128::from(usage.capacity)).map_or(100, |p| u64::try_from(p).unwrap_or(100)),
            pressure_percent,
        }
    }

    /// Whether the node takes no new bots for it.
    pub fn is_pressed(self) -> bool {
        self.free_percent < self.pressure_percent
    }
}

/// Collects images and measures the disk until `stop`.
pub async fn keep(
    shared: Arc<Shared>,
    containerd: Containerd,
    options: DiskOptions,
    room: watch::Sender<Option<Room>>,
    stop: CancellationToken,
) {
    // Which images are in use is known once all bots of this node are. A writer that is gone ends the agent anyway.
    tokio::select! {
        _ = shared.bots.wait_until_ready() => {}
        () = stop.cancelled() => return,
    }
    loop {
        if let Err(error) = look(&shared, &containerd, &options, &room).await {
            tracing::warn!(error = %error, "the disk was not looked at, and no image collected; tried again");
        }
        tokio::select! {
            () = tokio::time::sleep(super::run::jittered(EVERY)) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn look(
    shared: &Shared,
    containerd: &Containerd,
    options: &DiskOptions,
    room: &watch::Sender<Option<Room>>,
) -> Result<(), String> {
    let path = snapshots_root(containerd, &shared.default_snapshotter).await.map_err(|error| chain(&error))?;
    let Some(path) = path else {
        return Err(format!(
            "containerd does not say where the snapshotter {} keeps its data",
            shared.default_snapshotter
        ));
    };
    // An image that a bot is about to use must not go in between.
    let mut in_use = HashSet::new();
    for bot in shared.bots.state() {
        if let Ok(wanted) = desired(&bot, &shared.default_snapshotter)
            && let Goal::Alive(alive) = wanted.goal
        {
            in_use.insert(alive.image.to_string());
        }
        in_use.extend(bot.status.as_ref().and_then(|s| s.image.as_ref()).and_then(|image| image.digest.clone()));
    }
    let in_use = InUse(in_use);
    let collected =
        shared.actor.images.collect(&options.images, &path, &in_use).await.map_err(|error| chain(&error))?;
    if !collected.removed.is_empty() {
        tracing::info!(
            images = ?collected.removed, before = collected.before_percent, after = collected.after_percent,
            "unused images were removed, for the disk's sake"
        );
    }
    let usage = FsUsage::of(&path).map_err(|error| chain(&error))?;
    let now = Room::of(usage, options.pressure_percent);
    room.send_if_modified(|old| {
        let changed = old.is_none_or(|old| old.is_pressed() != now.is_pressed());
        *old = Some(now);
        changed
    });
    Ok(())
}

/// Where a snapshotter keeps its data, as containerd says.
async fn snapshots_root(containerd: &Containerd, snapshotter: &str) -> Result<Option<PathBuf>, CallFailed> {
    let filters = vec![format!("type==io.containerd.snapshotter.v1,id=={snapshotter}")];
    let answer = containerd.introspection().plugins(containerd.request(PluginsRequest { filters })).await;
    let plugins = answer.call("list plugins of", "containerd")?.plugins;
    Ok(plugins.into_iter().find_map(|mut plugin| plugin.exports.remove("root")).map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_begins_before_kubelets() {
        let room = |available| Room::of(FsUsage { capacity: 1000, available }, 12);
        assert!(!room(500).is_pressed());
        assert!(!room(120).is_pressed());
        assert!(room(119).is_pressed());
        assert!(room(0).is_pressed());
        assert!(!Room::of(FsUsage { capacity: 0, available: 0 }, 12).is_pressed());
    }
}
