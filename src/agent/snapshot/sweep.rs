//! Finds versions that nobody owns, by the rule of [`super::super::sweep`]: never because they were not listed once.
//!
//! ```text
//! released (its object is gone, forks stood on it), and nothing stands on it any more    -> removed
//! left by a bot of a namespace that was deleted, and its time is over                  -> removed; told until then
//! a view of a look that was cut off, and never done again                             -> removed after hours
//! no loop, not on a complete list that is younger, not found by its name; a grace time on -> removed as a deleted one is
//! ```

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use containerd_client::services::v1::snapshots::{Info, Kind};
use jiff::{SignedDuration, Timestamp};
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::api::BotSnapshot;
use crate::api::bot_node::OrphanedLayer;
use crate::api::condition::{api_time, chain};

use super::super::labels;
use super::super::sweep::SweepFailed;
use super::super::version::Versions;

/// Looks for versions that nobody owns.
pub struct VersionSweeper {
    client: Client,
    versions: Versions,
    /// Where there may be versions and layers.
    pub snapshotters: Vec<String>,
    /// How long what has no object is left alone after it was first found.
    pub grace: Duration,
    /// How long a layer stays that a bot left without an object.
    retention: Duration,
    since: BTreeMap<String, Instant>,
    orphans: watch::Sender<Option<Vec<OrphanedLayer>>>,
}

/// What is left of a version.
#[derive(Clone, Debug, Default)]
struct Stray {
    namespace: String,
    name: String,
    /// Snapshotter and key of what containerd has of it.
    layers: Vec<(String, String)>,
}

/// Longer than any look takes.
const STALE: SignedDuration = SignedDuration::from_hours(3);

/// As many orphans as a BotNode tells.
const TOLD: usize = 256;

/// Whether a view is of a look that nobody can be at any more: it is made for hours at most, and removed by the same look done again.
fn is_stale_view(info: &Info, now: Timestamp) -> bool {
    let made = info.created_at.as_ref().and_then(super::super::observe::timestamp);
    info.kind == Kind::View as i32
        && info.name.starts_with("berth-")
        && made.is_some_and(|made| now.duration_since(made) > STALE)
}

/// What a version's labels say of one without an object. A time that can't be read counts as now, so that it stays.
fn orphan(info: &Info, retention: Duration) -> OrphanedLayer {
    let label = |key| info.labels.get(key).cloned().unwrap_or_default();
    let left_at = label(labels::ORPHANED).parse().unwrap_or_else(|_| Timestamp::now());
    OrphanedLayer {
        name: info.name.clone(),
        namespace: label(labels::NAMESPACE),
        bot_container_name: label(labels::SNAPSHOT),
        bot_uid: label(labels::SNAPSHOT_UID),
        bot_id: label(labels::BOT_ID),
        image: label(labels::IMAGE),
        version: label(labels::VERSION).parse().unwrap_or(1),
        left_at: api_time(left_at),
        expires_at: api_time(left_at.saturating_add(retention).unwrap_or(Timestamp::MAX)),
    }
}

impl VersionSweeper {
    /// `grace` is how long a version without an object is left alone after it was first found, `retention` how long one that was left
    /// so on purpose; these are told by `orphans`.
    pub fn new(
        client: Client,
        versions: Versions,
        snapshotters: Vec<String>,
        grace: Duration,
        retention: Duration,
        orphans: watch::Sender<Option<Vec<OrphanedLayer>>>,
    ) -> Self {
        Self { client, versions, snapshotters, grace, retention, since: BTreeMap::new(), orphans }
    }

    /// One look; `tended` are the BotSnapshots that have a loop, by uid. Says when the next look is due.
    pub async fn sweep(&mut self, tended: &BTreeSet<String>, every: Duration) -> Result<Duration, SweepFailed> {
        let mut strays: BTreeMap<String, Stray> = BTreeMap::new();
        let mut orphans: Vec<(String, OrphanedLayer)> = Vec::new();
        for snapshotter in &self.snapshotters {
            let all = self.versions.list(snapshotter, String::new()).await?;
            let stood_on: HashSet<&str> = all.iter().map(|info| info.parent.as_str()).collect();
            for info in &all {
                if is_stale_view(info, Timestamp::now()) {
                    tracing::info!(name = info.name, "a look at a layer that was cut off");
                    self.versions.remove(snapshotter, &info.name).await?;
                    continue;
                }
                let Some(uid) = info.labels.get(labels::SNAPSHOT_UID) else { continue };
                if info.name != labels::version(uid) && info.name != labels::copy(uid) {
                    continue;
                }
                if info.labels.contains_key(labels::ORPHANED) && !info.labels.contains_key(labels::RELEASED) {
                    orphans.push((snapshotter.clone(), orphan(info, self.retention)));
                    continue;
                }
                if info.labels.contains_key(labels::RELEASED) {
                    if !stood_on.contains(info.name.as_str()) {
                        tracing::info!(name = info.name, "the last fork that stood on this version is gone");
                        self.versions.release(snapshotter, &info.name).await?;
                    }
                } else if !tended.contains(uid) {
                    let label = |key| info.labels.get(key).cloned().unwrap_or_default();
                    let stray = strays.entry(uid.clone()).or_default();
                    (stray.namespace, stray.name) = (label(labels::NAMESPACE), label(labels::SNAPSHOT));
                    stray.layers.push((snapshotter.clone(), info.name.clone()));
                }
            }
        }
        let mut wait = self.keep_orphans(&mut orphans, every).await?;
        for uid in self.versions.folders().map_err(SweepFailed::Tasks)? {
            if !tended.contains(&uid) && !orphans.iter().any(|(_, orphan)| orphan.bot_uid == uid) {
                strays.entry(uid).or_default();
            }
        }
        if strays.is_empty() {
            self.since.clear();
            return Ok(wait);
        }
        // Taken after the strays were found: what is on this list was there when they were.
        let known = self.known().await?;
        strays.retain(|uid, _| !known.contains(uid));
        self.since.retain(|uid, _| strays.contains_key(uid));
        let now = Instant::now();
        for (uid, stray) in strays {
            let age = now.duration_since(*self.since.entry(uid.clone()).or_insert(now));
            if age < self.grace {
                wait = wait.min(self.grace - age + Duration::from_millis(100));
            } else if !self.lives(&uid, &stray).await? {
                tracing::warn!(
                    uid,
                    namespace = stray.namespace,
                    name = stray.name,
                    "removing a version that no object owns"
                );
                if let Err(error) = self.remove(&uid, &stray).await {
                    tracing::warn!(uid, error = %chain(&error), "it is not removed yet; the next sweep goes on");
                }
            }
        }
        Ok(wait)
    }

    /// Removes those whose time is over, and tells of the others. Says when the next look is due.
    async fn keep_orphans(
        &self,
        orphans: &mut Vec<(String, OrphanedLayer)>,
        every: Duration,
    ) -> Result<Duration, SweepFailed> {
        let now = Timestamp::now();
        let mut wait = every;
        for (snapshotter, orphan) in orphans.extract_if(.., |(_, orphan)| orphan.expires_at.0 <= now) {
            let OrphanedLayer { name, namespace, bot_container_name, .. } = &orphan;
            tracing::warn!(
                name,
                namespace,
                bot = bot_container_name,
                "nobody adopted what this bot left: it is removed"
            );
            self.versions.release(&snapshotter, name).await?;
            // What is left of it here alone is found as a stray.
            let _ = self.versions.forget(&orphan.bot_uid);
        }
        for (_, orphan) in &*orphans {
            let left = orphan.expires_at.0.duration_since(now);
            wait = wait.min(Duration::try_from(left).unwrap_or_default() + Duration::from_millis(100));
        }
        let mut told: Vec<OrphanedLayer> = orphans.iter().map(|(_, orphan)| orphan.clone()).collect();
        told.sort_by(|a, b| (&a.left_at.0, &a.name).cmp(&(&b.left_at.0, &b.name)));
        told.truncate(TOLD);
        self.orphans.send_if_modified(|before| {
            let news = before.as_ref() != Some(&told);
            *before = Some(told);
            news
        });
        Ok(wait)
    }

    async fn remove(&self, uid: &str, stray: &Stray) -> Result<(), super::super::version::VersionError> {
        for (snapshotter, key) in &stray.layers {
            self.versions.release(snapshotter, key).await?;
        }
        self.versions.forget(uid)
    }

    /// Asks for the object itself: a list may be cut short and not say so, and what is removed is gone.
    async fn lives(&self, uid: &str, stray: &Stray) -> Result<bool, SweepFailed> {
        if stray.namespace.is_empty() || stray.name.is_empty() {
            return Ok(false);
        }
        let api: Api<BotSnapshot> = Api::namespaced(self.client.clone(), &stray.namespace);
        let live = api.get_metadata_opt(&stray.name).await.map_err(|error| SweepFailed::Api(Box::new(error)))?;
        Ok(live.is_some_and(|live| live.metadata.uid.as_deref() == Some(uid)))
    }

    /// The uids of all BotSnapshots: a complete list, from etcd rather than from a cache that may be behind.
    async fn known(&self) -> Result<BTreeSet<String>, SweepFailed> {
        let api: Api<BotSnapshot> = Api::all(self.client.clone());
        let mut known = BTreeSet::new();
        let mut params = ListParams::default().limit(500);
        loop {
            let page = api.list_metadata(&params).await.map_err(|error| SweepFailed::Api(Box::new(error)))?;
            known.extend(page.items.into_iter().filter_map(|snapshot| snapshot.metadata.uid));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(known),
            }
        }
    }
}
