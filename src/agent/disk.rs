//! The node's disk: images that nobody uses go before it is full, and the BotNode says when it nearly is.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::PluginsRequest;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::condition::{Reason, chain};
use crate::containerd::{CallContext, CallFailed, Containerd};
use crate::image::{CollectionPolicy, FsUsage, InUse};

use super::desired::{Goal, desired};
use super::run::Shared;

/// How often images are looked through, as by kubelet's image collector.
const EVERY: Duration = Duration::from_secs(300);

/// How often the disk is measured, which costs one system call: a bot fills a disk within seconds.
const MEASURE: Duration = Duration::from_secs(10);

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
        Self { free_percent: 100u64.saturating_sub(usage.percent()), pressure_percent }
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
        let looked = look(&shared, &containerd, &options, &room).await;
        if let Err(error) = &looked {
            shared.metrics.error(Reason::StorageFailed);
            tracing::warn!(error, "the disk was not looked at, and no image collected; tried again");
        }
        let until = Instant::now() + super::run::jittered(EVERY);
        loop {
            tokio::select! {
                () = tokio::time::sleep(super::run::jittered(MEASURE)) => {}
                () = stop.cancelled() => return,
            }
            let news = match &looked {
                Ok((path, then)) => FsUsage::of(path).is_ok_and(|now| options.tells(now, *then)),
                // containerd was away, most often.
                Err(_) => true,
            };
            if news || Instant::now() >= until {
                break;
            }
        }
    }
}

impl DiskOptions {
    /// Whether something is to be done about the disk that was not so before.
    fn tells(&self, now: FsUsage, then: FsUsage) -> bool {
        let pressed = |usage| Room::of(usage, self.pressure_percent).is_pressed();
        let full = |usage: FsUsage| usage.percent() > u64::from(self.images.high_percent);
        pressed(now) != pressed(then) || (full(now) && !full(then))
    }
}

/// Gives what was measured at last, and where.
async fn look(
    shared: &Shared,
    containerd: &Containerd,
    options: &DiskOptions,
    room: &watch::Sender<Option<Room>>,
) -> Result<(PathBuf, FsUsage), String> {
    let path = snapshots_root(containerd, &shared.default_snapshotter).await.map_err(|error| chain(&error))?;
    let Some(path) = path else {
        return Err(format!(
            "containerd does not say where the snapshotter {} keeps its data",
            shared.default_snapshotter
        ));
    };
    let measure = || -> Result<FsUsage, String> {
        let usage = FsUsage::of(&path).map_err(|error| chain(&error))?;
        let now = Room::of(usage, options.pressure_percent);
        room.send_if_modified(|old| {
            let changed = old.is_none_or(|old| old.is_pressed() != now.is_pressed());
            *old = Some(now);
            changed
        });
        Ok(usage)
    };
    // Told first: on a disk that is really full containerd may not even be able to remove an image.
    measure()?;
    // An image that a bot is about to use must not go in between.
    let mut in_use = HashSet::new();
    for bot in shared.bots.state() {
        if let Ok(wanted) = desired(&bot, &shared.default_snapshotter, &[], false)
            && let Goal::Alive(alive) = wanted.goal
        {
            in_use.insert(alive.image.to_string());
        }
        in_use.extend(bot.status.as_ref().and_then(|s| s.image.as_ref()).and_then(|image| image.digest.clone()));
    }
    // What is started from a version needs the config of the image that it stands on.
    let kept = shared.snapshots.store.state();
    in_use.extend(kept.iter().filter_map(|s| s.status.as_ref()?.image.as_ref()?.digest.clone()));
    let in_use = InUse(in_use);
    let collected =
        shared.actor.images.collect(&options.images, &path, &in_use).await.map_err(|error| chain(&error))?;
    if !collected.removed.is_empty() {
        tracing::info!(
            images = ?collected.removed, before = collected.before_percent, after = collected.after_percent,
            "unused images were removed, for the disk's sake"
        );
    }
    let usage = measure()?;
    Ok((path, usage))
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
        let usage = |available| FsUsage { capacity: 1000, available, ..FsUsage::default() };
        let room = |available| Room::of(usage(available), 12);
        assert!(!room(500).is_pressed());
        assert!(!room(120).is_pressed());
        assert!(room(119).is_pressed());
        assert!(room(0).is_pressed());
        assert!(!Room::of(FsUsage::default(), 12).is_pressed());
        let files = |inodes_available| FsUsage { inodes: 1000, inodes_available, ..usage(1000) };
        assert!(!Room::of(files(120), 12).is_pressed());
        assert!(Room::of(files(119), 12).is_pressed(), "a disk without inodes is as full as one without bytes");
    }

    #[test]
    fn images_are_looked_through_at_once_when_the_disk_becomes_full_and_not_while_it_stays_so() {
        let options = DiskOptions { images: CollectionPolicy::default(), pressure_percent: 12 };
        let usage = |used: u64| FsUsage { capacity: 100, available: 100 - used, ..FsUsage::default() };
        for (then, now, tells) in [
            (50, 60, false),
            (50, 86, true),
            (86, 87, false),
            (87, 89, true),
            (89, 99, false),
            (99, 87, true),
            (87, 10, false),
        ] {
            assert_eq!(options.tells(usage(now), usage(then)), tells, "{then} -> {now}");
        }
    }
}
