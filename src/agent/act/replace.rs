//! Another layer in the place of a bot's own: of a version, on another image, or none any more.
//!
//! ```text
//! rollback       CopyAside ................ SwitchLayer   SettleReplaced: kept as a version, or removed
//! other image    PullAside    CarryData     SwitchLayer   SettleReplaced, or SwitchBack
//! deletion       Preserve: the layer becomes the last version
//! ```
//!
//! What is made beside is noted on the container before it is made, and switched to by one write of that note: whenever it is cut
//! off, the bot is on the old layer or on the new one.

use jiff::Timestamp;

use crate::layer::Job;

use super::super::desired::{Rollback, Target};
use super::super::failpoint::{Effect, around};
use super::super::labels;
use super::super::observe;
use super::super::record::{Aside, AsideFor, Record};
use super::super::version::{Taken, Version, VersionError, is_filling};
use super::{Actor, StepError, Work};

impl Actor {
    fn target<'w>(&self, work: &'w Work<'_>) -> Result<&'w Target, StepError> {
        match &work.desired.rollback {
            Some(Rollback::To(target)) => Ok(target),
            _ => Err(StepError::Changed("no rollback is asked for")),
        }
    }

    pub(super) async fn copy_aside(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let target = self.target(work)?;
        let key = labels::next_layer(id, &record.layer);
        let for_ = AsideFor::Rollback { id: target.id.clone(), snapshot: target.version.uid.clone() };
        let aside = Aside { layer: key.clone(), for_, complete: false };
        let noted = Record { aside: Some(aside.clone()), ..record.clone() };
        if noted != *record {
            around(Effect::AsideNote, self.note(id, &noted)).await?;
        }
        let name = target.version.runtime_name();
        let info = self.versions.stat(&record.snapshotter, &name).await.map_err(StepError::Runtime)?;
        let info = info.ok_or(StepError::Version(VersionError::Missing { name }))?;
        let of = |label: &str| info.labels.get(label).map_or("", String::as_str);
        let mut labels = labels::layer(work.desired, of(labels::IMAGE), of(labels::IMAGE_DIGEST));
        labels.insert(labels::VERSION.to_owned(), target.version.number.to_string());
        let copy = self.versions.copy_out(&record.snapshotter, &target.version.uid, &key, labels);
        around(Effect::AsideCopy, copy).await.map_err(StepError::Version)?;
        let whole = Record { aside: Some(Aside { complete: true, ..aside }), ..record.clone() };
        around(Effect::AsideNoteDone, self.note(id, &whole)).await
    }

    pub(super) async fn drop_aside(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let Some(aside) = &record.aside else { return Ok(()) };
        let remove = self.versions.remove(&record.snapshotter, &aside.layer);
        around(Effect::AsideRemove, remove).await.map_err(StepError::Runtime)?;
        around(Effect::AsideForget, self.note(id, &Record { aside: None, ..record.clone() })).await
    }

    pub(super) async fn pull_aside(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let image = self.image(work.alive()?, work.desired).await?;
        let aside = Aside {
            layer: labels::next_layer(id, &record.layer),
            for_: AsideFor::Image { image: image.reference, digest: image.digest, chain_id: image.chain_id },
            complete: false,
        };
        around(Effect::PullAsideNote, self.note(id, &Record { aside: Some(aside), ..record.clone() })).await
    }

    pub(super) async fn carry_data(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let alive = work.alive()?;
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let old = work.observed.layer.as_ref().ok_or(StepError::Changed("the bot has no layer"))?;
        let Some(Aside { layer: key, for_: AsideFor::Image { image, digest, chain_id }, .. }) = &record.aside else {
            return Err(StepError::Changed("no image was pulled for another layer"));
        };
        let snapshotter = &record.snapshotter;
        let runtime = StepError::Runtime;
        self.versions.remove(snapshotter, key).await.map_err(runtime)?;
        let mut labels = labels::layer(work.desired, image, digest);
        labels.insert(labels::FILLING.to_owned(), old.key.clone());
        let prepare = self.versions.prepare(snapshotter, key, chain_id, labels);
        match around(Effect::CarryPrepare, prepare).await {
            // The image was collected meanwhile, which nothing stood on: it is pulled again.
            Err(error) if error.is_not_found() => {
                self.note(id, &Record { aside: None, ..record.clone() }).await?;
                return Err(StepError::Changed("the image is not there any more"));
            }
            done => done.map_err(runtime)?,
        }
        // Open until the copier has ended, which reads and writes through them.
        let (dirs, whole) = match self.versions.active_dirs(snapshotter, key).await {
            Err(VersionError::NoDirectory { .. }) => {
                let mounts = self.versions.mounts(snapshotter, key).await.map_err(runtime)?;
                let (dirs, root) = self.versions.open_tree(&mounts, key).await.map_err(StepError::Version)?;
                (dirs, Some(root))
            }
            found => (found.map_err(StepError::Version)?, None),
        };
        let mounts = self.versions.mounts(snapshotter, &old.key).await.map_err(runtime)?;
        let (source, root) = self.versions.open_tree(&mounts, &old.key).await.map_err(StepError::Version)?;
        let job = Job::Carry {
            source: source.own,
            path: alive.spec.data.path.trim_start_matches('/').into(),
            // Below a directory of the layer's own the stage is beside it; a whole tree has no place beside.
            stage: if whole.is_some() { dirs.own.join(".berth-stage") } else { dirs.stage() },
            dest: dirs.own,
            lower: dirs.lower,
            whole: whole.is_some(),
        };
        around(Effect::CarryCopy, self.versions.run(&job)).await.map_err(StepError::Version)?;
        drop((root, whole));
        self.versions.label(snapshotter, key, labels::FILLING, "").await.map_err(runtime)?;
        let aside = record.aside.clone().map(|aside| Aside { complete: true, ..aside });
        around(Effect::CarryNote, self.note(id, &Record { aside, ..record.clone() })).await
    }

    pub(super) async fn switch_back(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let replaced = record.replaced.as_ref().ok_or(StepError::Changed("no layer was replaced"))?;
        let found = self.versions.stat(&record.snapshotter, &replaced.layer).await.map_err(StepError::Runtime)?;
        let Some(info) = found else {
            // By somebody's hand: the way forward is left.
            self.note(id, &Record { replaced: None, ..record.clone() }).await?;
            return Err(StepError::Changed("the layer that was replaced is gone"));
        };
        let back = record.moved(&observe::layer(info), Timestamp::now());
        around(Effect::SwitchBackNote, self.note(id, &back)).await
    }

    pub(super) async fn switch_layer(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let aside = record.aside.as_ref().ok_or(StepError::Changed("no layer was made beside"))?;
        let found = self.versions.stat(&record.snapshotter, &aside.layer).await.map_err(StepError::Runtime)?;
        let Some(info) = found.filter(|info| !is_filling(&info.labels)) else {
            // By somebody's hand: it is made again.
            self.note(id, &Record { aside: None, ..record.clone() }).await?;
            return Err(StepError::Changed("the layer that was made beside is gone"));
        };
        let (to, now) = (observe::layer(info), Timestamp::now());
        let switched = match &aside.for_ {
            AsideFor::Rollback { .. } => record.switched(&to, self.target(work)?, now),
            AsideFor::Image { .. } => record.moved(&to, now),
        };
        around(Effect::SwitchNote, self.note(id, &switched)).await
    }

    pub(super) async fn settle_replaced(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let Some(replaced) = &record.replaced else { return Ok(()) };
        let snapshotter = &record.snapshotter;
        match &replaced.keep {
            Some(version) => {
                let stands = Stands { image: &replaced.image, digest: &replaced.digest, at: replaced.at };
                let effects = [Effect::ReplacedTaken, Effect::ReplacedHold, Effect::ReplacedCommit];
                match self.commit_in_place(snapshotter, &replaced.layer, version, stands, effects).await {
                    // By somebody's hand. The bot must not wait for ever for what can't come back; its snapshot says so.
                    Err(StepError::Version(VersionError::Missing { name })) => {
                        tracing::error!(%id, name, version = version.name, "the layer that a rollback replaced is gone");
                    }
                    done => done?,
                }
            }
            None => {
                let remove = self.versions.remove(snapshotter, &replaced.layer);
                around(Effect::ReplacedRemove, remove).await.map_err(StepError::Runtime)?;
            }
        }
        around(Effect::ReplacedNote, self.note(id, &Record { replaced: None, ..record.clone() })).await
    }

    pub(super) async fn preserve(&self, work: &Work<'_>) -> Result<(), StepError> {
        let layer = work.observed.layer.as_ref().ok_or(StepError::Changed("the bot has no layer"))?;
        let version = work.desired.preserve.as_ref().ok_or(StepError::Changed("the version has no number"))?;
        let snapshotter = work.record().map_or(&work.desired.snapshotter, |record| &record.snapshotter);
        let stands = Stands { image: &layer.image, digest: &layer.digest, at: Timestamp::now() };
        let effects = [Effect::PreserveTaken, Effect::PreserveHold, Effect::PreserveCommit];
        self.commit_in_place(snapshotter, &layer.key, version, stands, effects).await
    }

    /// Commits a layer that no process uses any more. Safe twice; the facts are noted before, so that a version is never without.
    async fn commit_in_place(
        &self,
        snapshotter: &str,
        key: &str,
        version: &Version,
        stands: Stands<'_>,
        [note, hold, commit]: [Effect; 3],
    ) -> Result<(), StepError> {
        let Some(info) = self.versions.stat(snapshotter, key).await.map_err(StepError::Runtime)? else {
            let name = version.runtime_name();
            return match self.versions.stat(snapshotter, &name).await.map_err(StepError::Runtime)? {
                Some(_) => Ok(()),
                None => Err(StepError::Version(VersionError::Missing { name: key.to_owned() })),
            };
        };
        let taken = Taken {
            version: version.clone(),
            taken_at: stands.at,
            frozen_millis: 0,
            taken: crate::api::bot_snapshot::Taken::Stopped,
            parent: info.parent,
            snapshotter: snapshotter.to_owned(),
            image: stands.image.to_owned(),
            digest: stands.digest.to_owned(),
            size_bytes: None,
            files: None,
            changes: None,
            exported: None,
            by_diff: false,
        };
        around(note, async { self.versions.note(&version.uid, &taken) }).await.map_err(StepError::Version)?;
        let (name, labels) = (version.runtime_name(), version.labels(stands.image, stands.digest));
        around(hold, self.versions.hold(&name, stands.digest)).await.map_err(StepError::Runtime)?;
        let done = self.versions.commit(snapshotter, key, &name, labels);
        around(commit, done).await.map_err(StepError::Runtime)
    }
}

/// What a layer stands on, and when it was left.
#[derive(Clone, Copy)]
struct Stands<'a> {
    image: &'a str,
    digest: &'a str,
    at: Timestamp,
}
