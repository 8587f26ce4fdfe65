//! The steps of a snapshot: does one, and decides nothing. Each is safe to be cut off anywhere (plan.rs says what is left then).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::snapshots::Info as SnapshotInfo;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::api::BotSnapshot;
use crate::api::bot_snapshot::Taken as TakenState;
use crate::containerd::LeaseId;
use crate::image::LayerBlob;
use crate::layer::{Hold, Job, Said};

use super::super::failpoint::{Effect, around};
use super::super::gate;
use super::super::labels;
use super::super::observe::{self, Layer, Observed, Task};
use super::super::record::Record;
use super::super::run::Nudge;
use super::super::version::{Exported, Taken, VersionError, intact};
use super::plan::Wanted;
use super::{StepFailed, Taker};

/// How often is looked whether a bot that is to be stopped for a snapshot is.
const STOPPED_YET: Duration = Duration::from_millis(20);

impl Taker {
    /// Copies the bot's layer and commits the copy.
    pub(super) async fn take(
        &self,
        wanted: &Wanted,
        observed: Option<&Observed>,
        quit: &CancellationToken,
    ) -> Result<(), StepFailed> {
        let shared = &self.shared;
        let versions = &shared.actor.versions;
        let record = observed.and_then(Observed::record).ok_or(StepFailed::Changed("the bot has no container"))?;
        let layer = observed.and_then(|o| o.layer.as_ref()).ok_or(StepFailed::Changed("the bot has no layer"))?;
        let snapshotter = &record.snapshotter;
        let _turn = unless(quit, shared.snapshots.copies.acquire()).await?;
        let copy_key = labels::copy(&self.uid);
        versions.make_folder(&self.uid)?;
        versions.remove(snapshotter, &copy_key).await?;
        let source = versions.active_dirs(snapshotter, &layer.key).await;
        let prepare =
            versions.prepare(snapshotter, &copy_key, &layer.parent, wanted.version.labels(&layer.image, &layer.digest));
        around(Effect::SnapshotPrepare, prepare).await?;
        let source = match source {
            Err(VersionError::NoDirectory { .. }) => return self.take_by_diff(wanted, record, layer, quit).await,
            found => found?,
        };
        let dest = versions.active_dirs(snapshotter, &copy_key).await?;
        let job = Job::Take {
            source: source.own,
            stage: dest.stage(),
            dest: dest.own,
            manifest: versions.manifest(&self.uid),
            cgroup: shared.cgroups.freezers(&wanted.bot.container_id()),
            debt: shared.snapshots.debts.join(wanted.bot.container_id().as_str()),
            max_freeze_millis: wanted.max_freeze_millis,
            before: self.before(wanted),
            lower: dest.lower,
        };
        let mut copy = around(Effect::SnapshotCopy, versions.copiers().start(&job)).await?;
        let mut held = None;
        let mut instant_taken: Option<(Timestamp, u64, TakenState)> = None;
        let summary = loop {
            match unless(quit, copy.next()).await?? {
                Said::Precopied { rounds, files, bytes } => {
                    tracing::debug!(snapshot = %self.name, rounds, files, bytes, "copied ahead");
                    let (inside, hold, taken) = self.still(wanted, &layer.key, &mut held, quit).await?;
                    around(Effect::SnapshotFreeze, copy.go(hold)).await?;
                    // Not to be broken off: the bot is frozen, for as long as its freeze may last at most.
                    match copy.next().await? {
                        Said::Taken { at, frozen_millis } => {
                            drop(inside);
                            instant_taken = Some((at, frozen_millis, taken));
                            if held.take().is_some() {
                                shared.nudge(Nudge::Bot(wanted.bot.clone())).await;
                            }
                            tracing::info!(snapshot = %self.name, namespace = %self.namespace, frozen_millis, "taken");
                        }
                        Said::TooMuch { .. } | Said::Precopied { .. } | Said::Still => drop(inside),
                        Said::Done(summary) => break summary,
                        Said::Failed(failure) => return Err(VersionError::Failed(failure).into()),
                    }
                }
                Said::Done(summary) => break summary,
                Said::Failed(failure) => return Err(VersionError::Failed(failure).into()),
                Said::Taken { .. } | Said::TooMuch { .. } | Said::Still => {}
            }
        };
        let (taken_at, frozen_millis, state) =
            instant_taken.ok_or(StepFailed::Changed("the copier ended before it took anything"))?;
        let taken = Taken::of(&wanted.version, snapshotter, layer, taken_at, frozen_millis, state);
        self.commit(Effect::SnapshotCommit, &taken.described(summary)).await
    }

    /// Commits the copy that was taken.
    async fn commit(&self, effect: Effect, taken: &Taken) -> Result<(), StepFailed> {
        let versions = &self.shared.actor.versions;
        versions.note(&self.uid, taken)?;
        let (name, copy_key) = (taken.version.runtime_name(), labels::copy(&self.uid));
        let labels = taken.version.labels(&taken.image, &taken.digest);
        around(Effect::SnapshotHold, versions.hold(&name, &taken.digest)).await?;
        let commit = versions.commit(&taken.snapshotter, &copy_key, &name, labels);
        Ok(around(effect, commit).await?)
    }

    /// The same where the layer has no directory that could be copied ahead: containerd makes its diff under the freeze.
    async fn take_by_diff(
        &self,
        wanted: &Wanted,
        record: &Record,
        layer: &Layer,
        quit: &CancellationToken,
    ) -> Result<(), StepFailed> {
        const ODD: StepFailed = StepFailed::Changed("the copier did something else");
        let (shared, versions, snapshotter) = (&self.shared, &self.shared.actor.versions, &record.snapshotter);
        let (copy_key, id) = (labels::copy(&self.uid), wanted.bot.container_id());
        let job = Job::Still {
            cgroup: shared.cgroups.freezers(&id),
            debt: shared.snapshots.debts.join(id.as_str()),
            max_freeze_millis: wanted.max_freeze_millis,
        };
        let mut freezer = around(Effect::SnapshotCopy, versions.copiers().start(&job)).await?;
        let Said::Precopied { .. } = unless(quit, freezer.next()).await?? else { return Err(ODD) };
        let mut held = None;
        let (inside, hold, state) = self.still(wanted, &layer.key, &mut held, quit).await?;
        let mounts = versions.mounts(snapshotter, &layer.key).await?;
        let diff = |longest| versions.diff(snapshotter, &layer.parent, mounts, &copy_key, longest);
        let (taken_at, frozen_millis, diff) = match hold {
            Hold::Held => (Timestamp::now(), 0, unless(quit, diff(None)).await??),
            Hold::Freeze => {
                around(Effect::SnapshotFreeze, freezer.go(hold)).await?;
                match freezer.next().await? {
                    Said::Still => {}
                    Said::Failed(failure) => return Err(VersionError::Failed(failure).into()),
                    _ => return Err(ODD),
                }
                let diff = diff(Some(Duration::from_millis(wanted.max_freeze_millis))).await;
                // Whatever came of it: the bot is thawed, or was when it had been frozen for long enough, which the copier says, being
                // at its end then.
                let _ = freezer.go(hold).await;
                match freezer.next().await? {
                    Said::Taken { at, frozen_millis } => (at, frozen_millis, diff?),
                    Said::Failed(failure) => return Err(VersionError::Failed(failure).into()),
                    _ => return Err(ODD),
                }
            }
        };
        drop(inside);
        if held.take().is_some() {
            shared.nudge(Nudge::Bot(wanted.bot.clone())).await;
        }
        tracing::info!(snapshot = %self.name, namespace = %self.namespace, frozen_millis, "taken by containerd's diff");
        unless(quit, versions.apply(snapshotter, &copy_key, diff)).await??;
        let taken = Taken::of(&wanted.version, snapshotter, layer, taken_at, frozen_millis, state);
        self.commit(Effect::SnapshotCommit, &Taken { by_diff: true, ..taken }).await
    }

    /// Waits until the bot may be held still, and stays inside its gate.
    async fn still(
        &self,
        wanted: &Wanted,
        layer: &str,
        held: &mut Option<gate::Hold>,
        quit: &CancellationToken,
    ) -> Result<(gate::Inside, Hold, TakenState), StepFailed> {
        let shared = &self.shared;
        loop {
            let inside = unless(quit, shared.gates.enter(&wanted.bot)).await?;
            let observed = shared.observer.observe(&wanted.bot, &shared.default_snapshotter, None).await?;
            if observed.layer.as_ref().is_none_or(|now| now.key != layer) || observed.record().is_none() {
                return Err(StepFailed::Changed("the bot's layer was replaced while it was copied"));
            }
            match observed.task {
                Task::Running { .. } if wanted.stopped => {
                    if held.is_none() {
                        *held = Some(shared.gates.hold(&wanted.bot));
                        shared.nudge(Nudge::Bot(wanted.bot.clone())).await;
                    }
                }
                Task::Running { .. } => return Ok((inside, Hold::Freeze, TakenState::Live)),
                // Its memory is to be kept, so it is not stopped for a snapshot either.
                Task::Paused { .. } => return Ok((inside, Hold::Held, TakenState::Paused)),
                Task::Absent | Task::Created | Task::Stopped { .. } => {
                    return Ok((inside, Hold::Held, TakenState::Stopped));
                }
                // Something of it may live.
                Task::Unknown | Task::Leftover => {}
            }
            drop(inside);
            unless(quit, tokio::time::sleep(STOPPED_YET)).await?;
        }
    }

    /// The manifest of the version before, where it is on this node.
    fn before(&self, wanted: &Wanted) -> Option<PathBuf> {
        let versions = &self.shared.actor.versions;
        let of_bot = |s: &Arc<BotSnapshot>| {
            let (meta, status) = (&s.metadata, s.status.as_ref()?);
            let same = meta.namespace.as_deref() == Some(&self.namespace)
                && status.bot_id.as_deref() == Some(&wanted.version.bot_id);
            let number = status.version.filter(|number| same && *number < wanted.version.number)?;
            let path = versions.manifest(meta.uid.as_deref()?);
            path.exists().then_some((number, path))
        };
        self.shared
            .snapshots
            .store
            .state()
            .iter()
            .filter_map(of_bot)
            .max_by_key(|(number, _)| *number)
            .map(|(_, path)| path)
    }

    /// Writes the manifest of a layer that was committed in place.
    pub(super) async fn describe(&self, wanted: &Wanted, quit: &CancellationToken) -> Result<(), StepFailed> {
        let versions = &self.shared.actor.versions;
        let snapshotter = self.snapshotter(None);
        let name = wanted.version.runtime_name();
        let info =
            versions.stat(&snapshotter, &name).await?.ok_or_else(|| VersionError::Missing { name: name.clone() })?;
        let _turn = unless(quit, self.shared.snapshots.copies.acquire()).await?;
        versions.make_folder(&self.uid)?;
        let describe = versions.describe(&snapshotter, &name, &self.uid, self.before(wanted));
        let summary = unless(quit, describe).await??;
        let noted = versions.taken(&self.uid).unwrap_or_else(|| self.found(wanted, &info, &snapshotter));
        versions.note(&self.uid, &noted.described(summary))?;
        Ok(())
    }

    /// Reads the version back.
    pub(super) async fn verify(&self, wanted: &Wanted, quit: &CancellationToken) -> Result<(), StepFailed> {
        let versions = &self.shared.actor.versions;
        let name = wanted.version.runtime_name();
        let _turn = unless(quit, self.shared.snapshots.copies.acquire()).await?;
        let opened = versions.open_committed(&self.snapshotter(None), &name).await?;
        let (source, manifest) = (opened.dirs.own.clone(), versions.manifest(&self.uid));
        let job = Job::Verify { source, manifest, unpacked: false };
        let summary = unless(quit, versions.run(&job)).await??;
        versions.close(opened).await?;
        intact(&name, &summary)?;
        Ok(())
    }

    /// Makes an OCI image of the version: counts and hashes its tar, then writes it. So the blob is known before its first byte, is
    /// gone on with after a cut, and containerd finds out if it was not the same twice.
    pub(super) async fn export(&self, wanted: &Wanted, quit: &CancellationToken) -> Result<(), StepFailed> {
        let (versions, images) = (&self.shared.actor.versions, &self.shared.actor.images);
        let name = wanted.version.runtime_name();
        let missing = || VersionError::Missing { name: name.clone() };
        let taken = versions.taken(&self.uid).ok_or_else(missing)?;
        let lease = LeaseId::parse(&name).ok_or_else(missing)?;
        let _turn = unless(quit, self.shared.snapshots.copies.acquire()).await?;
        versions.hold(&name, &taken.digest).await?;
        let base = images.base(&lease, &taken.image, &taken.digest).await?;
        let opened = versions.open_committed(&taken.snapshotter, &name).await?;
        if opened.is_whole() {
            versions.close(opened).await?;
            let snapshotter = taken.snapshotter;
            return Err(VersionError::NoDirectory { snapshotter }.into());
        }
        let source = opened.dirs.own;
        let tar = |from| Job::Tar { source: source.clone(), manifest: versions.manifest(&self.uid), from };
        let written = unless(quit, versions.run(&tar(None))).await??.tar.ok_or_else(missing)?;
        let layer = LayerBlob::tar(&written.digest, written.size).ok_or_else(missing)?;
        if let Some(writer) = images.begin_layer(&lease, &layer).await? {
            let bytes = versions.copiers().stream(&tar(Some(writer.offset()))).await?;
            unless(quit, around(Effect::ExportLayer, writer.fill(images, bytes))).await??;
        }
        let digest = around(Effect::ExportImage, images.put_image(&lease, &name, &base, &layer)).await?;
        tracing::info!(snapshot = %self.name, namespace = %self.namespace, digest, bytes = written.size, "exported");
        let exported = Some(Exported { digest, bytes: written.size });
        Ok(versions.note(&self.uid, &Taken { exported, ..taken })?)
    }

    /// Makes the version of what a bot left without an object.
    pub(super) async fn adopt(&self, wanted: &Wanted, quit: &CancellationToken) -> Result<(), StepFailed> {
        let versions = &self.shared.actor.versions;
        let (left, snapshotter) = (wanted.bot.as_str(), self.snapshotter(None));
        let orphan = labels::version(left);
        let missing = || VersionError::Missing { name: orphan.clone() };
        let info = versions.stat(&snapshotter, &orphan).await?.ok_or_else(missing)?;
        let _turn = unless(quit, self.shared.snapshots.copies.acquire()).await?;
        // What it is, before it is copied: the copy is compared with that.
        if !versions.manifest(left).exists() {
            versions.make_folder(left)?;
            let summary = unless(quit, versions.describe(&snapshotter, &orphan, left, None)).await??;
            let noted = versions.taken(left).unwrap_or_else(|| self.found(wanted, &info, &snapshotter));
            versions.note(left, &noted.described(summary))?;
        }
        let taken = versions.taken(left).ok_or_else(missing)?;
        let copy_key = labels::copy(&self.uid);
        let labels = wanted.version.labels(&taken.image, &taken.digest);
        let copy = versions.copy_out(&snapshotter, left, &copy_key, labels);
        unless(quit, around(Effect::AdoptCopy, copy)).await??;
        versions.inherit(left, &self.uid)?;
        self.commit(Effect::AdoptCommit, &Taken { version: wanted.version.clone(), ..taken }).await
    }

    pub(super) async fn drop_orphan(&self, wanted: &Wanted) -> Result<(), StepFailed> {
        let versions = &self.shared.actor.versions;
        let (left, snapshotter) = (wanted.bot.as_str(), self.snapshotter(None));
        around(Effect::AdoptDrop, versions.release(&snapshotter, &labels::version(left))).await?;
        versions.forget(left)?;
        // So that the BotNode does not tell of it any more.
        self.shared.nudge(Nudge::Sweep).await;
        Ok(())
    }

    /// What containerd knows of a version that was committed in place, where what was noted of it is lost.
    fn found(&self, wanted: &Wanted, info: &SnapshotInfo, snapshotter: &str) -> Taken {
        let label = |key: &str| info.labels.get(key).cloned().unwrap_or_default();
        Taken {
            version: wanted.version.clone(),
            taken_at: info.created_at.as_ref().and_then(observe::timestamp).unwrap_or_else(Timestamp::now),
            frozen_millis: 0,
            taken: TakenState::Stopped,
            parent: info.parent.clone(),
            snapshotter: snapshotter.to_owned(),
            image: label(labels::IMAGE),
            digest: label(labels::IMAGE_DIGEST),
            size_bytes: None,
            files: None,
            changes: None,
            exported: None,
            by_diff: false,
        }
    }

    pub(super) async fn clear(&self, observed: Option<&Observed>) -> Result<(), StepFailed> {
        let snapshotter = self.snapshotter(observed);
        Ok(self.shared.actor.versions.remove(&snapshotter, &labels::copy(&self.uid)).await?)
    }

    pub(super) async fn remove(&self, observed: Option<&Observed>) -> Result<(), StepFailed> {
        let versions = &self.shared.actor.versions;
        let snapshotter = self.snapshotter(observed);
        let (name, copy) = (labels::version(&self.uid), labels::copy(&self.uid));
        // Of a diff that was cut off.
        versions.remove(&snapshotter, &labels::below(&copy)).await?;
        around(Effect::SnapshotRemoveCopy, versions.remove(&snapshotter, &copy)).await?;
        if !around(Effect::SnapshotRemove, versions.release(&snapshotter, &name)).await? {
            tracing::info!(snapshot = %self.name, namespace = %self.namespace, "its bytes go with the last fork that stands on it");
        }
        // Last: it says which snapshotter has the rest.
        Ok(versions.forget(&self.uid)?)
    }
}

/// What `work` gives, unless it is to be broken off first.
async fn unless<T>(quit: &CancellationToken, work: impl Future<Output = T>) -> Result<T, StepFailed> {
    tokio::select! {
        biased;
        () = quit.cancelled() => Err(StepFailed::Quit),
        done = work => Ok(done),
    }
}
