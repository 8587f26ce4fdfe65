//! Which images go when the disk is nearly full. The rule is kubelet's (`pkg/kubelet/images/image_gc_manager.go`): above
//! the high mark, unused images are removed, the longest unused first, until the low mark is reached.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use containerd_client::services::v1::Image as ImageRecord;
use containerd_client::services::v1::snapshots::{Info as SnapshotInfo, Kind};

use super::error::ImageError;
use super::reference::Digest;
use super::store::OURS;
use super::{Inner, config, manifest};

/// When to remove images, and which may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectionPolicy {
    /// Nothing is removed while the file system is no fuller than this, in percent.
    pub high_percent: u8,
    /// Removal stops once it is no fuller than this, in percent.
    pub low_percent: u8,
    /// An image that was asked for, or first seen, less long ago than this stays.
    pub min_age: Duration,
    /// The snapshotters that bots of this node use.
    pub snapshotters: Vec<String>,
}

impl Default for CollectionPolicy {
    /// As kubelet: 85 %, 80 %, 2 minutes.
    fn default() -> Self {
        Self {
            high_percent: 85,
            low_percent: 80,
            min_age: Duration::from_secs(120),
            snapshotters: vec!["overlayfs".to_owned()],
        }
    }
}

/// What desired state needs beyond what runs: image digests, chain ids and references of this node's bots.
#[derive(Clone, Debug, Default)]
pub struct InUse(pub HashSet<String>);

/// How full a file system is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FsUsage {
    /// Its size in bytes.
    pub capacity: u64,
    /// What may still be written, in bytes.
    pub available: u64,
    /// How many files and folders it can hold; 0 where that is not fixed beforehand.
    pub inodes: u64,
    /// How many may still be made.
    pub inodes_available: u64,
}

impl FsUsage {
    /// Of the file system that a path is on.
    pub fn of(path: &Path) -> Result<Self, ImageError> {
        let stat = rustix::fs::statvfs(path)
            .map_err(|e| ImageError::DiskUsage { path: path.display().to_string(), source: Arc::new(e.into()) })?;
        Ok(Self {
            capacity: stat.f_blocks.saturating_mul(stat.f_frsize),
            available: stat.f_bavail.saturating_mul(stat.f_frsize),
            inodes: stat.f_files,
            inodes_available: stat.f_favail,
        })
    }

    /// How full it is in percent, rounded up as `df` does: in bytes or in inodes, whichever is more, since either ends
    /// all writing. An unreadable size counts as empty: nothing is removed on it.
    pub fn percent(self) -> u64 {
        let percent = |all: u64, left: u64| match all {
            0 => 0,
            all => {
                let used = u128::from(all.saturating_sub(left));
                u64::try_from((used * 100).div_ceil(u128::from(all))).unwrap_or(100)
            }
        };
        percent(self.capacity, self.available).max(percent(self.inodes, self.inodes_available))
    }
}

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// The names of image records that are gone.
    pub removed: Vec<String>,
    /// How full the file system was before, in percent.
    pub before_percent: u64,
    /// And after.
    pub after_percent: u64,
}

/// When each image was last asked for. In memory, as in kubelet: a mark in containerd would be a write at rest. An image
/// not known here counts as first seen now, so a new agent removes nothing of which it knows nothing.
#[derive(Default)]
pub(super) struct Uses(Mutex<HashMap<Digest, Instant>>);

impl Uses {
    pub fn touch(&self, digest: &Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(digest.clone(), Instant::now());
    }

    /// How long each of these was not asked for; forgets all others.
    fn ages(&self, digests: &BTreeSet<Digest>) -> HashMap<Digest, Duration> {
        let mut uses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        uses.retain(|digest, _| digests.contains(digest));
        let now = Instant::now();
        digests.iter().map(|d| (d.clone(), now.duration_since(*uses.entry(d.clone()).or_insert(now)))).collect()
    }
}

/// One image as the choice sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    digest: Digest,
    /// All names that mean this digest.
    names: Vec<String>,
    /// Its top snapshot, where its config could be read.
    chain_id: Option<Digest>,
    /// Whether every record of it is ours.
    ours: bool,
    unused_for: Duration,
}

/// The images that may go, in the order in which they go. Pure.
fn candidates(images: Vec<Candidate>, stood_on: &HashSet<String>, in_use: &InUse, min_age: Duration) -> Vec<Candidate> {
    let mut free: Vec<Candidate> = images
        .into_iter()
        .filter(|image| {
            let used = |text: &str| in_use.0.contains(text) || stood_on.contains(text);
            // What can't be read can't be shown to be unused: it is left to a person.
            let unused = image.chain_id.as_ref().is_some_and(|c| !used(c.as_str()))
                && !used(image.digest.as_str())
                && !image.names.iter().any(|n| in_use.0.contains(n));
            image.ours && unused && image.unused_for >= min_age
        })
        .collect();
    free.sort_by(|a, b| b.unused_for.cmp(&a.unused_for).then_with(|| a.digest.cmp(&b.digest)));
    free
}

/// Every snapshot that something stands on which is not itself a layer of an image: bots' layers, active or kept. Pure.
fn stood_on(snapshots: &[SnapshotInfo]) -> HashSet<String> {
    let parents: HashMap<&str, &str> = snapshots.iter().map(|s| (s.name.as_str(), s.parent.as_str())).collect();
    let is_image_layer =
        |s: &SnapshotInfo| s.kind == Kind::Committed as i32 && s.labels.get(OURS).is_some_and(|l| l == "layer");
    let is_extract = |s: &SnapshotInfo| s.labels.get(OURS).is_some_and(|l| l == "extract");
    let mut found = HashSet::new();
    for snapshot in snapshots.iter().filter(|s| !is_image_layer(s) && !is_extract(s)) {
        let mut at = snapshot.name.as_str();
        // Each name is walked through once, so a loop, which containerd can't make, would end too.
        while let Some(&parent) = parents.get(at) {
            if parent.is_empty() || !found.insert(parent.to_owned()) {
                break;
            }
            at = parent;
        }
    }
    found
}

impl Inner {
    pub(super) async fn collect(
        &self,
        policy: &CollectionPolicy,
        usage: &(dyn Fn() -> Result<FsUsage, ImageError> + Sync),
        in_use: &InUse,
    ) -> Result<Collected, ImageError> {
        let failed = |e| ImageError::RuntimeList(Arc::new(e));
        let before = usage()?.percent();
        let mut collected = Collected { before_percent: before, after_percent: before, ..Collected::default() };
        let images = self.known(self.store.records().await.map_err(failed)?).await?;
        if before <= u64::from(policy.high_percent) {
            return Ok(collected);
        }
        let mut stood = HashSet::new();
        for snapshotter in &policy.snapshotters {
            stood.extend(stood_on(&self.store.snapshots(snapshotter).await.map_err(failed)?));
        }
        for image in candidates(images, &stood, in_use, policy.min_age) {
            for (i, name) in image.names.iter().enumerate() {
                let last = i + 1 == image.names.len();
                self.store.remove_record(name, last).await.map_err(failed)?;
                collected.removed.push(name.clone());
            }
            collected.after_percent = usage()?.percent();
            if collected.after_percent <= u64::from(policy.low_percent) {
                break;
            }
        }
        Ok(collected)
    }

    /// Records grouped by what they mean, each with its age. Also how a new agent starts to count their ages.
    async fn known(&self, records: Vec<ImageRecord>) -> Result<Vec<Candidate>, ImageError> {
        let mut by_digest: BTreeMap<Digest, (Vec<String>, bool)> = BTreeMap::new();
        for record in records {
            let Some(digest) = record.target.as_ref().and_then(|t| Digest::parse(&t.digest)) else { continue };
            let (names, ours) = by_digest.entry(digest).or_insert((Vec::new(), true));
            *ours &= record.labels.contains_key(OURS);
            names.push(record.name);
        }
        let ages = self.uses.ages(&by_digest.keys().cloned().collect());
        let mut images = Vec::new();
        for (digest, (names, ours)) in by_digest {
            let chain_id = self.chain_id(&digest).await?;
            let unused_for = ages.get(&digest).copied().unwrap_or_default();
            images.push(Candidate { digest, names, chain_id, ours, unused_for });
        }
        Ok(images)
    }

    /// The top layer of an image, as far as what is here tells it.
    async fn chain_id(&self, digest: &Digest) -> Result<Option<Digest>, ImageError> {
        let failed = |e| ImageError::RuntimeList(Arc::new(e));
        let max = self.options.max_manifest_bytes;
        let mut digest = digest.clone();
        for _ in 0..4 {
            let Some(blob) = self.store.read(&digest, max).await.map_err(failed)? else { return Ok(None) };
            match manifest::parse(&blob.bytes, None) {
                Ok((manifest::Manifest::Image(image), _)) => {
                    let config = self.store.read(&image.config.digest, max).await.map_err(failed)?;
                    let config = config.and_then(|blob| config::parse(&blob.bytes).ok());
                    return Ok(config.and_then(|c| config::chain_ids(&c.diff_ids).pop()));
                }
                Ok((manifest::Manifest::Index(entries), _)) => match manifest::choose(&entries, &self.platform) {
                    Ok(chosen) => digest = chosen.digest.clone(),
                    Err(_) => return Ok(None),
                },
                Err(_) => return Ok(None),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str, minutes: u64) -> Candidate {
        Candidate {
            digest: Digest::of(name.as_bytes()),
            names: vec![name.to_owned()],
            chain_id: Some(Digest::of(format!("top of {name}").as_bytes())),
            ours: true,
            unused_for: Duration::from_secs(60 * minutes),
        }
    }

    fn names(images: Vec<Candidate>) -> Vec<String> {
        images.into_iter().flat_map(|i| i.names).collect()
    }

    #[test]
    fn the_longest_unused_go_first_and_the_used_never() {
        let min_age = Duration::from_secs(120);
        let unreadable = Candidate { chain_id: None, ..image("unreadable", 90) };
        let foreign = Candidate { ours: false, ..image("foreign", 90) };
        let all = vec![
            image("young", 1),
            image("old", 5),
            image("older", 50),
            image("by-digest", 60),
            image("by-chain", 70),
            image("by-name", 80),
            image("stood-on", 90),
            unreadable,
            foreign,
        ];
        let in_use = InUse(HashSet::from([
            Digest::of(b"by-digest").to_string(),
            Digest::of(b"top of by-chain").to_string(),
            "by-name".to_owned(),
        ]));
        let stood = HashSet::from([Digest::of(b"top of stood-on").to_string()]);
        assert_eq!(names(candidates(all, &stood, &in_use, min_age)), ["older", "old"]);
    }

    #[test]
    fn all_below_a_bots_layer_is_stood_on() {
        let snapshot = |name: &str, parent: &str, kind: Kind, label: &str| SnapshotInfo {
            name: name.to_owned(),
            parent: parent.to_owned(),
            kind: kind as i32,
            labels: [(OURS.to_owned(), label.to_owned())].into_iter().filter(|_| !label.is_empty()).collect(),
            ..SnapshotInfo::default()
        };
        let snapshots = [
            snapshot("a", "", Kind::Committed, "layer"),
            snapshot("b", "a", Kind::Committed, "layer"),
            snapshot("c", "b", Kind::Committed, "layer"),
            snapshot("other", "a", Kind::Committed, "layer"),
            snapshot("extract", "other", Kind::Active, "extract"),
            snapshot("version", "b", Kind::Committed, ""),
            snapshot("bot", "version", Kind::Active, ""),
        ];
        assert_eq!(stood_on(&snapshots), HashSet::from(["a", "b", "version"].map(str::to_owned)));
    }

    #[test]
    fn fullness_is_in_percent_rounded_up() {
        for (capacity, available, percent) in
            [(100, 15, 85), (1000, 149, 86), (0, 0, 0), (100, 200, 0), (u64::MAX, 0, 100)]
        {
            assert_eq!(FsUsage { capacity, available, ..FsUsage::default() }.percent(), percent);
        }
    }
}
