//! BotSnapshots of this node: taken, read back, removed. One task a snapshot, and in it the agent's loop once more: look, plan,
//! do one step, look again.
//!
//! ```text
//!   plan.rs     Wanted + Found -> Take | Describe | Verify | Export | Adopt | DropOrphan | Clear | Remove | Wait | Fail | Settled    (pure)
//!   mod.rs      looks, has the step done, tells of it
//!   act.rs      does one step, with the node's versions (../version.rs) and copiers (src/layer)
//!   status.rs   what is said of it                                                                     (pure)
//!   sweep.rs    versions that nobody owns
//! ```
//!
//! A take, from its bot's side: nothing, then a freeze of milliseconds, then nothing. Only from before the freeze until the thaw is
//! the snapshot inside the bot's gate (../gate.rs); its loop goes on beside all the rest. The copier freezes and thaws, in a
//! process that outlives the agent just long enough to thaw.

mod act;
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

use crate::api::bot_snapshot::{Export, SnapshotPhase};
use crate::api::condition::{Reason, chain};
use crate::api::ids::BotUid;
use crate::api::{BotContainer, BotSnapshot};
use crate::image::ExportError;

use super::desired::{Keep, Rollback, desired};
use super::labels;
use super::observe::Observed;
use super::publish::Written;
use super::run::{Shared, Trigger, instant, jittered};
use super::version::{Version, VersionError};

use plan::{Bot, Found, Next, Step, Wanted, plan};
use status::{Verdict, report};

/// A settled snapshot is looked at again after this.
const RESYNC: Duration = Duration::from_secs(600);

/// Back-off of a failing step: doubles from the first to the second.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// See [`RETRY_FIRST`].
const RETRY_MOST: Duration = Duration::from_secs(60);

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
    written: Option<Written<BotSnapshot>>,
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
        Some(Written::or(self.written.as_ref(), seen, self.shared.era()))
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
            Ok(Some(newest)) => self.written = Some(Written { object: Arc::new(newest), era: self.shared.era() }),
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
