//! BotSnapshots of this node: taken, read back, removed. One task a snapshot, and in it the agent's loop once more: look, plan,
//! do one step, look again.
//!
//! ```text
//!   plan.rs     Wanted + Found -> Take | Describe | Verify | Export | Clear | Remove | Wait | Fail | Settled    (pure)
//!   mod.rs      looks, does the step with the node's versions (../version.rs) and copiers (src/layer)
//!   status.rs   what is said of it                                                                     (pure)
//!   sweep.rs    versions that nobody owns
//! ```
//!
//! A take, from its bot's side: nothing, then a freeze of milliseconds, then nothing. Only from before the freeze until the thaw is
//! the snapshot inside the bot's gate (../gate.rs); its loop goes on beside all the rest. The copier freezes and thaws, in a
//! process that outlives the agent just long enough to thaw.

pub mod plan;
pub mod status;
pub mod sweep;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::runtime::events::EventType;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::api::bot_snapshot::{Export, SnapshotPhase, Taken as TakenState};
use crate::api::condition::{Reason, chain};
use crate::api::ids::BotUid;
use crate::api::{BotContainer, BotSnapshot};
use crate::containerd::LeaseId;
use crate::image::{ExportError, LayerBlob};
use crate::layer::{Hold, Job, Said};
use containerd_client::services::v1::snapshots::Info as SnapshotInfo;

use super::desired::{Keep, Rollback, desired};
use super::failpoint::{Effect, around};
use super::labels;
use super::observe::{Layer, Observed, Task};
use super::record::Record;
use super::run::{Nudge, Shared, Trigger, instant, jittered};
use super::version::{Exported, Taken, Version, VersionError, intact};

use plan::{Bot, Found, Next, Step, Wanted, plan};
use status::{Verdict, report};

/// A settled snapshot is looked at again after this.
const RESYNC: Duration = Duration::from_secs(600);

/// Back-off of a failing step: doubles from the first to the second.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// See [`RETRY_FIRST`].
const RETRY_MOST: Duration = Duration::from_secs(60);

/// How often is looked whether a bot that is to be stopped for a snapshot is.
const STOPPED_YET: Duration = Duration::from_millis(20);

/// How many snapshots of a node are copied or read at once: more would only share the same disk.
pub const AT_ONCE: usize = 2;

/// The snapshots of this node.
pub struct Snapshots {
    /// The objects bound to this node.
    pub store: Store<BotSnapshot>,
    /// How many are copied or read at once.
    pub copies: Semaphore,
    /// Where a frozen bot is noted as long as it is frozen.
    pub debts: PathBuf,
}

/// All loops, by uid.
#[derive(Default)]
pub struct Takers {
    triggers: HashMap<String, (BotUid, Arc<Trigger>)>,
    tasks: JoinSet<String>,
}

impl Takers {
    /// Wakes a snapshot's loop, and starts it where there is none. One that the controller has not given its number yet, or a
    /// bot, is left alone.
    pub fn wake(&mut self, shared: &Arc<Shared>, snapshot: &BotSnapshot, reason: &'static str) {
        let Some(wanted) = Wanted::of(snapshot) else { return };
        let uid = wanted.version.uid.clone();
        if let Some((_, trigger)) = self.triggers.get(&uid) {
            trigger.wake(reason);
            return;
        }
        let trigger = Arc::new(Trigger::default());
        trigger.wake(reason);
        self.triggers.insert(uid.clone(), (wanted.bot, trigger.clone()));
        let (namespace, name) = (wanted.version.namespace, wanted.version.name);
        let taker = Taker {
            shared: shared.clone(),
            uid,
            namespace,
            name,
            trigger,
            written: None,
            failures: 0,
            error: None,
            retry_at: None,
            failed: None,
            not_exported: None,
        };
        self.tasks.spawn(async move {
            let uid = taker.uid.clone();
            taker.run().await;
            uid
        });
    }

    /// Wakes the loops of a bot's snapshots.
    pub fn wake_of(&self, bot: &BotUid, reason: &'static str) {
        for (_, trigger) in self.triggers.values().filter(|(of, _)| of == bot) {
            trigger.wake(reason);
        }
    }

    /// The uids that have a loop.
    pub fn uids(&self) -> BTreeSet<String> {
        self.triggers.keys().cloned().collect()
    }

    /// Wakes all loops.
    pub fn wake_all(&self, reason: &'static str) {
        for (_, trigger) in self.triggers.values() {
            trigger.wake(reason);
        }
    }

    /// Waits until a loop ended, and forgets it. Pending for ever while there is none. An error is a loop's panic: a bug.
    pub async fn reap(&mut self) -> Result<(), tokio::task::JoinError> {
        match self.tasks.join_next().await {
            Some(ended) => {
                self.triggers.remove(&ended?);
                Ok(())
            }
            None => std::future::pending().await,
        }
    }

    /// Waits until all loops have ended.
    pub async fn join(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// A step ended without being done.
#[derive(Debug, thiserror::Error)]
enum StepFailed {
    #[error(transparent)]
    Version(#[from] VersionError),
    #[error("no OCI image can be made of the version")]
    Export(#[from] ExportError),
    #[error("the bot can't be looked at")]
    Observe(#[from] super::observe::ObserveFailed),
    /// The bot's layer was replaced meanwhile: what was copied is of the old one.
    #[error("{0}; it is taken again")]
    Changed(&'static str),
    /// Something that counts more came in between.
    #[error("broken off")]
    Quit,
}

impl StepFailed {
    /// The condition's reason.
    fn reason(&self) -> Reason {
        match self {
            Self::Version(error) => error.reason(),
            Self::Export(_) => Reason::ExportFailed,
            Self::Observe(_) | Self::Changed(_) | Self::Quit => Reason::RuntimeFailed,
        }
    }

    /// Whether trying again can help.
    fn retryable(&self) -> bool {
        match self {
            Self::Version(error) => error.retryable(),
            // A registry, a hand, a disk with room: what is missing may come back.
            Self::Export(_) | Self::Observe(_) | Self::Changed(_) | Self::Quit => true,
        }
    }
}

impl From<crate::containerd::CallFailed> for StepFailed {
    fn from(error: crate::containerd::CallFailed) -> Self {
        Self::Version(error.into())
    }
}

impl From<crate::layer::CopierError> for StepFailed {
    fn from(error: crate::layer::CopierError) -> Self {
        Self::Version(error.into())
    }
}

struct Taker {
    shared: Arc<Shared>,
    uid: String,
    namespace: String,
    name: String,
    trigger: Arc<Trigger>,
    /// The newest object that a write of ours gave back.
    written: Option<Arc<BotSnapshot>>,
    failures: u32,
    /// The last error of a step that is tried again.
    error: Option<String>,
    /// When that is.
    retry_at: Option<Instant>,
    /// A failure that is final, until the object says so itself.
    failed: Option<(Reason, String, bool)>,
    /// Why there is no OCI image of it yet, where that is known.
    not_exported: Option<(Reason, String)>,
}

/// How a pass ended.
enum Pass {
    Wait(Option<Instant>),
    Over,
}

impl Taker {
    async fn run(mut self) {
        let mut wake_at = Some(Instant::now());
        loop {
            let resync = Instant::now() + jittered(RESYNC);
            tokio::select! {
                // Cancelled by nothing but the end of the agent; a trigger that comes meanwhile stays noted.
                () = self.trigger.notified() => {}
                () = sleep_until(wake_at.unwrap_or(resync).min(resync)) => self.trigger.note("timer"),
                () = self.shared.stop.cancelled() => return,
            }
            let reasons = self.trigger.take();
            tracing::debug!(snapshot = %self.name, namespace = %self.namespace, ?reasons, "looking");
            wake_at = match self.pass().await {
                Pass::Wait(at) => at,
                Pass::Over => return,
            };
        }
    }

    /// Steps until there is nothing to do now.
    async fn pass(&mut self) -> Pass {
        loop {
            if self.shared.stop.is_cancelled() {
                return Pass::Wait(None);
            }
            // An object that is not seen any more was let go by the controller, after we said that nothing is left.
            let Some(snapshot) = self.current() else { return Pass::Over };
            let Some(mut wanted) = Wanted::of(&snapshot) else { return Pass::Wait(None) };
            // It would be the same again.
            wanted.export &=
                !matches!(self.not_exported, Some((Reason::ExportUnsupported | Reason::SnapshotsUnsupported, _)));
            // A bot that is not seen yet is not gone. Everybody is woken once all are seen.
            if !self.shared.listed.both() {
                return Pass::Wait(None);
            }
            let (found, observed) = match self.look(&wanted).await {
                Ok(found) => found,
                Err(error) => {
                    // Nothing is known, so nothing is claimed and nothing is done.
                    tracing::warn!(snapshot = %self.name, namespace = %self.namespace, error = %chain(&error), "can't look");
                    return Pass::Wait(Some(Instant::now() + jittered(RETRY_FIRST * 2)));
                }
            };
            // Whoever wakes it meanwhile, our own write among them: it is tried again when its time has come.
            if let Some(at) = self.retry_at.filter(|at| *at > Instant::now() && !wanted.deleted) {
                return Pass::Wait(Some(at));
            }
            self.retry_at = None;
            let next = match &self.failed {
                Some((reason, message, _)) if !wanted.deleted && wanted.phase != SnapshotPhase::Failed => {
                    Next::Fail { reason: *reason, message: message.clone() }
                }
                _ => plan(&wanted, &found, self.error.as_deref(), Timestamp::now()),
            };
            let told = match next {
                Next::Do(step) => match self.step(step, &snapshot, &wanted, &observed).await {
                    Ok(()) => {
                        self.failures = 0;
                        self.error = None;
                        self.not_exported = None;
                        let over = matches!(step, Step::Verify | Step::Export | Step::DropOrphan);
                        if !over || self.tell(&snapshot, Verdict::ready()).await {
                            continue;
                        }
                        false
                    }
                    Err(StepFailed::Quit) => continue,
                    Err(error) => {
                        let final_ = !error.retryable();
                        let reason = error.reason();
                        let text = chain(&error);
                        self.shared.metrics.error(reason);
                        tracing::warn!(
                            snapshot = %self.name, namespace = %self.namespace, step = step.name(), %reason,
                            attempts = self.failures + 1, error = text, "step failed"
                        );
                        if step == Step::Export && reason != Reason::SnapshotCorrupt {
                            // The version is whole all the same.
                            self.not_exported = Some((reason, text.clone()));
                            if final_ {
                                self.tell(&snapshot, Verdict::ready()).await;
                                continue;
                            }
                        } else if final_ {
                            self.failed = Some((reason, text, reason == Reason::SnapshotCorrupt));
                            continue;
                        }
                        self.failures += 1;
                        self.error = Some(text.clone());
                        match step {
                            Step::Clear => {}
                            Step::Export | Step::DropOrphan => drop(self.tell(&snapshot, Verdict::ready()).await),
                            _ => drop(self.tell(&snapshot, Verdict::new(step.phase(), reason, text)).await),
                        }
                        let wait = RETRY_FIRST.saturating_mul(1 << (self.failures - 1).min(8)).min(RETRY_MOST);
                        let at = (Instant::now() + jittered(wait)).min(instant(wanted.deadline).max(Instant::now()));
                        self.retry_at = Some(at);
                        return Pass::Wait(Some(at));
                    }
                },
                Next::Wait { message, until } => {
                    let verdict = Verdict::new(SnapshotPhase::Pending, Reason::WaitingForBot, message);
                    if self.tell(&snapshot, verdict).await {
                        return Pass::Wait(until.map(instant));
                    }
                    false
                }
                Next::Fail { reason, message } => {
                    let corrupt = self.failed.as_ref().is_some_and(|(_, _, corrupt)| *corrupt);
                    let verdict = Verdict {
                        verified: corrupt.then_some(false),
                        ..Verdict::new(SnapshotPhase::Failed, reason, message.clone())
                    };
                    let told = self.tell(&snapshot, verdict).await;
                    if told {
                        self.shared.publisher.snapshot_event(&snapshot, EventType::Warning, reason, message).await;
                    }
                    told
                }
                // An edit that changes nothing for the version is seen all the same, which kstatus waits for, and what the controller
                // said while this node was away is taken back.
                Next::Settled => match snapshot.status.as_ref() {
                    Some(_) if wanted.phase == SnapshotPhase::Ready && self.knows() => {
                        self.tell(&snapshot, Verdict::ready()).await
                    }
                    Some(said) if said.observed_generation != snapshot.metadata.generation => {
                        self.tell(&snapshot, Verdict::of(said)).await
                    }
                    _ => true,
                },
                Next::Removed => {
                    let message = "nothing of the version is left that only its object would free";
                    self.tell(&snapshot, Verdict::new(SnapshotPhase::Deleting, Reason::Removed, message)).await
                }
            };
            return Pass::Wait((!told).then(|| Instant::now() + jittered(RETRY_FIRST)));
        }
    }

    /// The object as this node may know it: the newer of the watch's and our own last write.
    fn current(&self) -> Option<Arc<BotSnapshot>> {
        let key = ObjectRef::new(&self.name).within(&self.namespace);
        let seen = self.shared.snapshots.store.get(&key)?;
        if seen.metadata.uid.as_ref() != Some(&self.uid) {
            return None;
        }
        let version =
            |snapshot: &BotSnapshot| snapshot.metadata.resource_version.as_deref().and_then(|v| v.parse().ok());
        match &self.written {
            Some(written) if version(written) > version(&seen).or(Some(0_u64)) => Some(written.clone()),
            _ => Some(seen),
        }
    }

    /// Whether the facts of its taking are there: where they are lost, what was said of them stands.
    fn knows(&self) -> bool {
        self.shared.actor.versions.taken(&self.uid).is_some()
    }

    async fn look(&self, wanted: &Wanted) -> Result<(Found, Option<Observed>), StepFailed> {
        let versions = &self.shared.actor.versions;
        let object = self.shared.bots.find(|bot| bot.metadata.uid.as_deref() == Some(wanted.bot.as_str()));
        let observed = match object.is_some() {
            true => Some(self.shared.observer.observe(&wanted.bot, &self.shared.default_snapshotter, None).await?),
            false => None,
        };
        let snapshotter = self.snapshotter(observed.as_ref());
        let (name, copy) = (labels::version(&self.uid), labels::copy(&self.uid));
        let (committed, copy) = tokio::join!(versions.stat(&snapshotter, &name), versions.stat(&snapshotter, &copy));
        let (committed, copy) = (committed?, copy?);
        // Who may have it is told by the bot's uid, which the controller alone gives a snapshot.
        let orphan = match wanted.in_place && observed.is_none() {
            true => versions.stat(&snapshotter, &labels::version(wanted.bot.as_str())).await?,
            false => None,
        };
        let orphan = orphan.filter(|info| info.labels.contains_key(labels::ORPHANED));
        // One that was released belongs to its forks now.
        let committed = committed.filter(|info| !info.labels.contains_key(labels::RELEASED));
        let whole =
            observed.as_ref().is_some_and(|o| o.record().is_some() && o.layer.as_ref().is_some_and(|l| !l.filling));
        let bot = match (&observed, whole) {
            (None, _) => Bot::Gone,
            (Some(observed), _) if object.is_some_and(|bot| self.lets_go(&bot, observed)) => Bot::LetsGo,
            (Some(_), false) => Bot::NoLayer,
            (Some(_), true) => Bot::Layer,
        };
        let image = versions.taken(&self.uid).and_then(|taken| taken.exported).filter(|_| wanted.export);
        let exported = match &image {
            Some(image) => self.shared.actor.images.has_image(&name, &image.digest).await?,
            None => false,
        };
        let found = Found {
            exported,
            orphan: orphan.is_some(),
            committed: committed.is_some(),
            copy: copy.is_some(),
            manifest: versions.manifest(&self.uid).exists(),
            folder: versions.has_folder(&self.uid),
            bot,
        };
        Ok((found, observed))
    }

    /// Whether the bot's loop is about to make this version of a layer: of what a rollback replaced or will, or of the last one.
    fn lets_go(&self, bot: &BotContainer, observed: &Observed) -> bool {
        let shared = &self.shared;
        let is_it = |version: &Version| version.uid == self.uid;
        let Ok(desired) = desired(bot, &shared.default_snapshotter, &shared.snapshots.store.state(), false) else {
            return false;
        };
        let record = observed.record();
        let replaced = record.and_then(|record| record.replaced.as_ref()?.keep.as_ref()).is_some_and(is_it);
        let asked = match &desired.rollback {
            Some(Rollback::To(target)) if record.is_some_and(|r| r.rollback.as_ref() != Some(&target.id)) => {
                &target.keep
            }
            _ => &Keep::No,
        };
        let last = desired.preserve.as_ref().is_some_and(is_it) && observed.layer.is_some();
        replaced || last || matches!(asked, Keep::As(version) if is_it(version))
    }

    /// Where the version is or will be.
    fn snapshotter(&self, observed: Option<&Observed>) -> String {
        let taken = self.shared.actor.versions.taken(&self.uid).map(|taken| taken.snapshotter);
        let said = || self.current().and_then(|s| s.status.as_ref().and_then(|s| s.snapshotter.clone()));
        let bots = || observed.and_then(Observed::record).map(|record| record.snapshotter.clone());
        taken.or_else(said).or_else(bots).unwrap_or_else(|| self.shared.default_snapshotter.clone())
    }

    /// Does one step. It is broken off, at a place where nothing is owed, when the object is being deleted, its deadline is over,
    /// or the agent is to end.
    async fn step(
        &mut self,
        step: Step,
        snapshot: &Arc<BotSnapshot>,
        wanted: &Wanted,
        observed: &Option<Observed>,
    ) -> Result<(), StepFailed> {
        let shared = self.shared.clone();
        let begins = match step {
            Step::Take => Some((Reason::Copying, "the bot's layer is being copied while it runs")),
            Step::Adopt => Some((Reason::Copying, "what the bot left is being copied")),
            Step::Describe | Step::Verify => {
                Some((Reason::Committing, "the version is committed, and is being read back"))
            }
            Step::Export | Step::DropOrphan | Step::Clear | Step::Remove => None,
        };
        if step == Step::Export && self.not_exported.is_none() {
            let message = "the version is being written as an OCI image into the node's content store";
            self.not_exported = Some((Reason::Exporting, message.to_owned()));
            self.tell(snapshot, Verdict::ready()).await;
        }
        // A step that failed says why, until it is done.
        if let Some((reason, message)) = begins.filter(|_| self.error.is_none()) {
            self.tell(snapshot, Verdict::new(step.phase(), reason, message)).await;
        }
        let quit = shared.stop.child_token();
        let act = async {
            let began = Instant::now();
            let done = match step {
                Step::Take => self.take(wanted, observed.as_ref(), &quit).await,
                Step::Describe => self.describe(wanted, &quit).await,
                Step::Verify => self.verify(wanted, &quit).await,
                Step::Export => self.export(wanted, &quit).await,
                Step::Adopt => self.adopt(wanted, &quit).await,
                Step::DropOrphan => self.drop_orphan(wanted).await,
                Step::Clear => self.clear(observed.as_ref()).await,
                Step::Remove => self.remove(observed.as_ref()).await,
            };
            shared.metrics.named_step(step.name(), began.elapsed(), done.is_ok());
            done
        };
        let mut act = std::pin::pin!(act);
        let late = matches!(step, Step::Take);
        loop {
            tokio::select! {
                done = &mut act => return done,
                () = self.trigger.notified() => {
                    let deleted = self.current().is_none_or(|s| s.metadata.deletion_timestamp.is_some());
                    if deleted && !wanted.deleted {
                        self.trigger.note("deleted");
                        quit.cancel();
                    }
                }
                () = sleep_until(instant(wanted.deadline)), if late && !quit.is_cancelled() => quit.cancel(),
            }
        }
    }

    /// Copies the bot's layer and commits the copy.
    async fn take(
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
        held: &mut Option<super::gate::Hold>,
        quit: &CancellationToken,
    ) -> Result<(super::gate::Inside, Hold, TakenState), StepFailed> {
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
    async fn describe(&self, wanted: &Wanted, quit: &CancellationToken) -> Result<(), StepFailed> {
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
    async fn verify(&self, wanted: &Wanted, quit: &CancellationToken) -> Result<(), StepFailed> {
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
    async fn export(&self, wanted: &Wanted, quit: &CancellationToken) -> Result<(), StepFailed> {
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
    async fn adopt(&self, wanted: &Wanted, quit: &CancellationToken) -> Result<(), StepFailed> {
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

    async fn drop_orphan(&self, wanted: &Wanted) -> Result<(), StepFailed> {
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
            taken_at: info.created_at.as_ref().and_then(super::observe::timestamp).unwrap_or_else(Timestamp::now),
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

    async fn clear(&self, observed: Option<&Observed>) -> Result<(), StepFailed> {
        let snapshotter = self.snapshotter(observed);
        Ok(self.shared.actor.versions.remove(&snapshotter, &labels::copy(&self.uid)).await?)
    }

    async fn remove(&self, observed: Option<&Observed>) -> Result<(), StepFailed> {
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

    /// Brings the object's status up to what is so; whether it is.
    async fn tell(&mut self, snapshot: &Arc<BotSnapshot>, mut verdict: Verdict) -> bool {
        let asked = snapshot.spec.export == Export::OCI && verdict.phase == SnapshotPhase::Ready;
        verdict.not_exported = self.not_exported.clone().filter(|_| asked);
        let live = self.current().unwrap_or_else(|| snapshot.clone());
        let taken = self.shared.actor.versions.taken(&self.uid);
        let name = labels::version(&self.uid);
        let generation = snapshot.metadata.generation;
        let status = report(generation, &name, &verdict, taken.as_ref(), live.status.as_ref(), Timestamp::now());
        match self.shared.publisher.snapshot_status(&live, &status).await {
            Ok(Some(newest)) => self.written = Some(Arc::new(newest)),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(snapshot = %self.name, namespace = %self.namespace, error = %chain(&error), "status not written");
                self.written = None;
                return false;
            }
        }
        true
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
