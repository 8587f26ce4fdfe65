//! Triggers, concurrency, back-off. One task a bot, and in it one loop: look, plan, do one step, look again.
//!
//! A trigger carries no news: API watch, containerd event and timer only wake a bot's loop and say why, for logs and
//! metrics. The loop reads the newest object, asks the world, and goes on until there is nothing to do.
//!
//! The clock is read here and nowhere else.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use kube::runtime::events::EventType;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::api::BotContainer;
use crate::api::bot_container::DeletionPolicy;
use crate::api::condition::{ConditionType, Reason, chain, find};
use crate::api::ids::BotUid;
use crate::network::Cidr;

use super::act::{Actor, StepError, Work};
use super::cgroup::Cgroups;
use super::desired::{Desired, Goal, Unusable, desired};
use super::gate::Gates;
use super::lineage::Lineage;
use super::metrics::Metrics;
use super::observe::{Observed, Observer};
use super::plan::{Next, State, plan};
use super::publish::{Publisher, Written};
use super::shim::{LEFTOVERS, Patience};
use super::snapshot::Snapshots;
use super::status::{Trouble, is_image, report};
use super::step::Step;
use super::sweep::Orphan;

/// How long a bot may be on its way before its status says so: most starts and stops are over by then, those of a burst too, and a
/// status that holds for a moment is a write too many. On an API server that is busy such writes are what slows down the next bot.
const TELL_AFTER: Duration = Duration::from_secs(3);
/// How often at most it is told where else the bot has come on that way.
const TELL_AGAIN: Duration = Duration::from_secs(5);

/// A settled bot is looked at again after this, whatever happens: a lost event costs time, never truth.
const RESYNC: Duration = Duration::from_secs(300);

/// Back-off of a failing step: doubles from the first to the second.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// See [`RETRY_FIRST`].
const RETRY_MOST: Duration = Duration::from_secs(300);

/// How soon a bot is looked at again of whose task something is left: containerd tells nobody when it has put it away.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The most where a person mends something that nobody tells us of (a missing ConfigMap, an image to be loaded) and a try
/// costs little: kubelet looks about as often.
const RETRY_LOCAL_MOST: Duration = Duration::from_secs(30);

/// Back-off of a status that can't be written: doubles from the first to the second. Two writers of one object meet now
/// and then, and need no more than another look; an API server that refuses is not to be asked all the time.
const REWRITE_FIRST: Duration = Duration::from_millis(250);
/// See [`REWRITE_FIRST`].
const REWRITE_MOST: Duration = Duration::from_secs(30);

/// How long a step may keep its turn. One that takes longer waits for a registry, a plugin or a shim that may hang, and
/// goes on without: all the turns of a node must not be with those.
const TURN: Duration = Duration::from_secs(5);

/// A plan that asks for the same step so often without an error makes no progress: it is slowed down and told.
const SAME_STEP: u32 = 8;

/// Everything that the bots' loops share.
pub struct Shared {
    /// Looks.
    pub observer: Observer,
    /// Does.
    pub actor: Actor,
    /// Tells the API server.
    pub publisher: Publisher,
    /// The objects bound to this node.
    pub bots: Store<BotContainer>,
    /// The snapshots of this node.
    pub snapshots: Snapshots,
    /// Whether all bots and snapshots of this node were seen.
    pub listed: Listed,
    /// Who may touch a bot's process now.
    pub gates: Arc<Gates>,
    /// Where bots' cgroups are.
    pub cgroups: Cgroups,
    /// The way to the loops of others.
    pub nudges: mpsc::Sender<Nudge>,
    /// Addresses of this node's bots.
    pub cidr: tokio::sync::watch::Receiver<Option<Cidr>>,
    /// Whether the node is being drained; `None` before its BotNode was seen, when no bot may be started.
    pub draining: tokio::sync::watch::Receiver<Option<bool>>,
    /// How often the cluster was restored from a backup while this agent ran, or may have been.
    pub went_back: tokio::sync::watch::Receiver<u64>,
    /// The node's snapshotter.
    pub default_snapshotter: String,
    /// When the agent began.
    pub began: Instant,
    /// How many steps may be under way at once.
    pub steps: Semaphore,
    /// Counts.
    pub metrics: Metrics,
    /// Ends all loops after the step under way.
    pub stop: CancellationToken,
}

impl Shared {
    /// How often the cluster went back, or may have.
    pub fn era(&self) -> u64 {
        *self.went_back.borrow()
    }

    /// Wakes the loops of others, who have something to look at.
    pub async fn nudge(&self, whom: Nudge) {
        // Nobody listens any more only where the agent ends.
        let _ = self.nudges.send(whom).await;
    }
}

/// Whether the first lists of the API server are complete: what is not on an incomplete one is not gone (FAULTS.md, rule 1).
#[derive(Debug, Default)]
pub struct Listed {
    /// The bots.
    pub bots: AtomicBool,
    /// The snapshots.
    pub snapshots: AtomicBool,
}

impl Listed {
    /// Whether both are.
    pub fn both(&self) -> bool {
        self.bots.load(Ordering::Relaxed) && self.snapshots.load(Ordering::Relaxed)
    }
}

/// Whom to wake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nudge {
    /// A bot's loop.
    Bot(BotUid),
    /// The loops of a bot's snapshots.
    Snapshots(BotUid),
    /// The search for what nobody owns: there is something new, or less.
    Sweep,
}

/// Wakes one loop.
#[derive(Debug, Default)]
pub struct Trigger {
    notify: Notify,
    reasons: Mutex<Vec<&'static str>>,
}

impl Trigger {
    /// Wakes it, and says why.
    pub fn wake(&self, reason: &'static str) {
        self.note(reason);
        self.notify.notify_one();
    }

    /// Says why a pass comes that nobody has to be woken for.
    pub fn note(&self, reason: &'static str) {
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }

    /// Waits until it is woken. Cancel-safe: a wake that comes meanwhile stays noted.
    pub async fn notified(&self) {
        self.notify.notified().await;
    }

    /// Why it was woken since the last time.
    pub fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.reasons.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Who a loop works for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bot {
    /// Its uid.
    pub uid: BotUid,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// All loops, by uid.
#[derive(Default)]
pub struct Loops {
    triggers: HashMap<BotUid, Arc<Trigger>>,
    tasks: JoinSet<BotUid>,
}

impl Loops {
    /// Wakes a bot's loop, and starts it where there is none.
    pub fn wake(&mut self, shared: &Arc<Shared>, bot: &Bot, reason: &'static str) {
        if let Some(trigger) = self.triggers.get(&bot.uid) {
            trigger.wake(reason);
            return;
        }
        let trigger = Arc::new(Trigger::default());
        trigger.wake(reason);
        self.triggers.insert(bot.uid.clone(), trigger.clone());
        let (shared, bot) = (shared.clone(), bot.clone());
        self.tasks.spawn(async move {
            let uid = bot.uid.clone();
            BotLoop::new(shared, bot, trigger).run().await;
            uid
        });
    }

    /// Takes down what no object owns. It counts as the uid's loop until it ends, so that nobody else touches it.
    pub fn take_down(&mut self, shared: &Arc<Shared>, orphan: Orphan) {
        if self.triggers.contains_key(&orphan.uid) {
            return;
        }
        self.triggers.insert(orphan.uid.clone(), Arc::default());
        let shared = shared.clone();
        self.tasks.spawn(async move {
            let uid = orphan.uid.clone();
            orphan.take_down(shared).await;
            uid
        });
    }

    /// The uids that have a loop.
    pub fn uids(&self) -> BTreeSet<BotUid> {
        self.triggers.keys().cloned().collect()
    }

    /// Wakes a loop that is there already.
    pub fn wake_uid(&self, uid: &BotUid, reason: &'static str) {
        if let Some(trigger) = self.triggers.get(uid) {
            trigger.wake(reason);
        }
    }

    /// Wakes all loops.
    pub fn wake_all(&self, reason: &'static str) {
        for trigger in self.triggers.values() {
            trigger.wake(reason);
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.triggers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.triggers.is_empty()
    }

    /// Waits until a loop ended, and forgets it. Pending for ever while there is none. An error is a loop's panic: a bug,
    /// and a bot without a loop, so that the agent had better end and be started again.
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

/// A step that failed, and when it is tried again. Other steps may come in between, such as those that clear away what
/// the failed one left: it has failed until it is done, or is not wanted any more.
struct Retry {
    trouble: Trouble,
    generation: Option<i64>,
    attempts: u32,
    at: Instant,
}

/// The way of a bot from one settled state to the next.
#[derive(Clone, Copy)]
struct Way {
    since: Instant,
    /// When its status is to say where it is.
    tell_at: Instant,
}

impl Way {
    fn begin() -> Self {
        let since = Instant::now();
        Self { since, tell_at: since + TELL_AFTER }
    }
}

struct BotLoop {
    shared: Arc<Shared>,
    bot: Bot,
    trigger: Arc<Trigger>,
    retry: Option<Retry>,
    /// Set while the bot is on one.
    way: Option<Way>,
    /// The newest object that a write of ours gave back.
    written: Option<Written<BotContainer>>,
    /// How often in a row its status could not be written.
    unwritten: u32,
    /// When that is tried again.
    rewrite_at: Option<Instant>,
    /// Until then containerd may still be putting away a task whose creation was cut off, by this agent or one before it.
    /// A guess that a restart widens, never a fact that it loses.
    leftovers_until: Instant,
    /// Of what is left of its task.
    patience: Patience,
    /// What the bot's layer stands on.
    lineage: Lineage,
}

/// How a pass ended.
enum Pass {
    /// Look again at a trigger, or then.
    Wait(Option<Instant>),
    /// Nothing of the bot is left here, and no object asks for it.
    Over,
}

impl BotLoop {
    fn new(shared: Arc<Shared>, bot: Bot, trigger: Arc<Trigger>) -> Self {
        let leftovers_until = shared.began + LEFTOVERS;
        Self {
            shared,
            bot,
            trigger,
            retry: None,
            way: None,
            written: None,
            unwritten: 0,
            rewrite_at: None,
            leftovers_until,
            patience: Patience::default(),
            lineage: Lineage::default(),
        }
    }

    async fn run(mut self) {
        let mut wake_at = Some(Instant::now());
        loop {
            let resync = Instant::now() + jittered(RESYNC);
            let until = [wake_at, self.rewrite_at.take()].into_iter().flatten().fold(resync, Instant::min);
            tokio::select! {
                // Cancelled by nothing but the end of the agent; a trigger that comes meanwhile stays noted.
                () = self.trigger.notified() => {}
                () = sleep_until(until) => self.trigger.note("timer"),
                () = self.shared.stop.cancelled() => return,
            }
            let reasons = self.trigger.take();
            for reason in &reasons {
                self.shared.metrics.pass(reason);
            }
            tracing::debug!(bot = %self.bot.name, namespace = %self.bot.namespace, uid = %self.bot.uid, ?reasons, "looking");
            wake_at = match self.pass().await {
                Pass::Wait(at) => at,
                Pass::Over => return,
            };
        }
    }

    /// Steps until there is nothing to do now.
    async fn pass(&mut self) -> Pass {
        let mut last: Option<(Step, u32)> = None;
        loop {
            if self.shared.stop.is_cancelled() {
                return Pass::Wait(None);
            }
            // No object bound to this node has this uid. That alone removes nothing: an unbound bot looks the same from
            // here (FAULTS.md, rule 1). Whether what is left of it is an orphan, the sweeper finds out.
            let Some(bot) = self.current() else {
                self.shared.gates.forget(&self.bot.uid);
                return Pass::Over;
            };
            // Which versions there are decides about these; everybody is woken once all are seen.
            let waits = bot.spec.rollback.is_some() || bot.spec.deletion_policy == DeletionPolicy::Retain;
            if waits && !self.shared.listed.snapshots.load(Ordering::Relaxed) {
                return Pass::Wait(None);
            }
            // Everybody is woken once it is known.
            if self.shared.draining.borrow().is_none() {
                return Pass::Wait(None);
            }
            let desired = match self.desired(&bot) {
                Ok(desired) => desired,
                Err(error) => {
                    tracing::error!(error = %chain(&error), "skipped");
                    return Pass::Wait(None);
                }
            };
            let looked = Instant::now();
            let observed = match self
                .shared
                .observer
                .observe(&self.bot.uid, &desired.snapshotter, desired.layer.as_deref())
                .await
            {
                Ok(observed) => {
                    tracing::trace!(bot = %self.bot.name, took = ?looked.elapsed(), "observed");
                    observed
                }
                Err(error) => {
                    // Nothing is known, so nothing is claimed and nothing is done.
                    tracing::warn!(bot = %self.bot.name, namespace = %self.bot.namespace, error = %chain(&error), "can't look");
                    self.shared.metrics.error(Reason::RuntimeUnavailable);
                    return Pass::Wait(Some(Instant::now() + jittered(RETRY_FIRST * 2)));
                }
            };
            self.patience.look(observed.task);
            if let Some(layer) = &observed.layer {
                let snapshotter = observed.record().map_or(&desired.snapshotter, |record| &record.snapshotter);
                self.lineage.follow(&self.shared.actor.containerd, snapshotter, &layer.key);
            }
            let next = plan(&desired, &observed, Timestamp::now());
            match &next {
                Next::Do(step) => {
                    if let Some(at) = self.must_wait(*step, &bot) {
                        self.tell(&bot, &desired, &observed, &next).await;
                        return Pass::Wait(Some(at));
                    }
                    let tell_at = self.way().tell_at;
                    match self.step(*step, &bot, &desired, &observed, &next).await {
                        // Nothing tells when containerd is done with it, so it is asked.
                        Ok(()) if *step == Step::PutAway => {
                            self.patience.done();
                            self.retry.take_if(|retry| retry.trouble.step == *step);
                            if tell_at < Instant::now() {
                                self.tell_of_way(&bot, &desired, &observed, &next).await;
                            }
                            return Pass::Wait(Some(Instant::now() + LOOK_AGAIN));
                        }
                        Ok(()) => {
                            let repeats = match last {
                                Some((before, n)) if before == *step => n + 1,
                                _ => 1,
                            };
                            last = Some((*step, repeats));
                            if matches!(step, Step::SettleReplaced | Step::Preserve) {
                                self.shared.nudge(Nudge::Snapshots(self.bot.uid.clone())).await;
                            }
                            if let (Step::Preserve, Some(left)) = (step, desired.preserve.as_ref().filter(|p| p.orphan))
                            {
                                self.shared.metrics.error(Reason::NamespaceTerminating);
                                self.shared.publisher.orphaned(left).await;
                                self.shared.nudge(Nudge::Sweep).await;
                            }
                            self.retry.take_if(|retry| retry.trouble.step == *step);
                            if repeats >= SAME_STEP {
                                let error =
                                    format!("the step {step} was done {repeats} times and the bot is as before");
                                self.failed(*step, Failure::no_progress(error), &bot);
                            }
                        }
                        Err(Failed::Aborted) => self.leftovers_until = Instant::now() + LEFTOVERS,
                        Err(Failed::Step(failure)) => {
                            if matches!(step, Step::CreateTask { .. }) {
                                self.leftovers_until = Instant::now() + LEFTOVERS;
                            }
                            self.failed(*step, failure, &bot);
                        }
                    }
                }
                Next::Settled { state, until } => {
                    // What no observation shows goes before it is said that nothing is left: the lease of a pull that
                    // failed, the logs of a bot that was stopped.
                    if *state == State::Removed
                        && let Err(error) = self.shared.actor.remove_rest(&desired.id).await
                    {
                        let step = Step::RemoveContainer;
                        self.failed(step, Failure::of(&error), &bot);
                        self.tell(&bot, &desired, &observed, &Next::Do(step)).await;
                        return Pass::Wait(self.retry.as_ref().map(|retry| retry.at));
                    }
                    let passing = matches!(state, State::Stopping);
                    if passing {
                        // No success: it may be on the way from a failed step to its next try, which stays failed.
                        // Most processes end at once: their status goes from Running to Stopped in one write.
                        let tell_at = self.way().tell_at;
                        if Instant::now() < tell_at {
                            return Pass::Wait(Some(until.map_or(tell_at, |until| tell_at.min(instant(until)))));
                        }
                    } else {
                        self.retry = None;
                        self.way = None;
                    }
                    self.tell(&bot, &desired, &observed, &next).await;
                    return Pass::Wait(until.map(instant));
                }
            }
        }
    }

    /// The object as this node may know it: the newer of the watch's and our own last write.
    fn current(&self) -> Option<Arc<BotContainer>> {
        let key = ObjectRef::new(&self.bot.name).within(&self.bot.namespace);
        let seen = self.shared.bots.get(&key)?;
        if seen.metadata.uid.as_deref() != Some(self.bot.uid.as_str()) {
            return None;
        }
        Some(Written::or(self.written.as_ref(), seen, self.shared.era()))
    }

    fn desired(&self, bot: &BotContainer) -> Result<Desired, Unusable> {
        let shared = &self.shared;
        let held = shared.gates.is_held(&self.bot.uid);
        let draining = shared.draining.borrow().unwrap_or(false);
        let desired = desired(bot, &shared.default_snapshotter, &shared.snapshots.store.state(), held)?;
        Ok(if draining { desired.drained() } else { desired })
    }

    fn must_wait(&mut self, step: Step, bot: &BotContainer) -> Option<Instant> {
        // An edit is a new situation, which is tried at once.
        self.retry.take_if(|retry| retry.generation != bot.metadata.generation);
        let retry = self.retry.as_ref().filter(|retry| retry.trouble.step == step)?;
        (Instant::now() < retry.at).then_some(retry.at)
    }

    fn failed(&mut self, step: Step, failure: Failure, bot: &BotContainer) {
        let Failure { reason, message, retryable, retry_after } = failure;
        let attempts = self.retry.as_ref().filter(|retry| retry.trouble.step == step).map_or(0, |r| r.attempts) + 1;
        let most = if retryable && local(reason) { RETRY_LOCAL_MOST } else { RETRY_MOST };
        let wait = RETRY_FIRST.saturating_mul(1 << (attempts - 1).min(16)).min(most);
        let wait = wait.max(retry_after.unwrap_or_default());
        tracing::warn!(
            bot = %self.bot.name, namespace = %self.bot.namespace, uid = %self.bot.uid, %step, %reason, attempts,
            retry_in = ?wait, error = %message, "step failed"
        );
        self.shared.metrics.error(reason);
        let generation = bot.metadata.generation;
        let trouble = Trouble { step, reason, message, retryable };
        self.retry = Some(Retry { trouble, generation, attempts, at: Instant::now() + jittered(wait) });
    }

    /// Does one step, and tells of it when it takes long. Ends early when the bot's goal changes while a `Prepare` is
    /// under way: a deletion does not wait for a pull.
    async fn step(
        &mut self,
        step: Step,
        bot: &Arc<BotContainer>,
        desired: &Desired,
        observed: &Observed,
        next: &Next,
    ) -> Result<(), Failed> {
        let way = *self.way();
        let cidr = *self.shared.cidr.borrow();
        let shared = self.shared.clone();
        let failures = self.retry.as_ref().filter(|retry| retry.trouble.step == step).map_or(0, |retry| retry.attempts);
        let leftovers = Instant::now() < self.leftovers_until;
        let overdue = self.patience.is_over();
        let work = Work { desired, bot: Some(bot), observed, cidr: cidr.as_ref(), leftovers, overdue, failures };
        let act = async {
            // A snapshot that holds the bot still is through in milliseconds.
            let _inside = shared.gates.enter(&desired.uid).await;
            // The semaphore is never closed; an error would only mean that nothing bounds the steps.
            let turn = shared.steps.acquire().await;
            let began = Instant::now();
            let mut act = std::pin::pin!(shared.actor.act(step, &work));
            let done = match tokio::time::timeout(TURN, &mut act).await {
                Ok(done) => done,
                Err(_) => {
                    drop(turn);
                    act.await
                }
            };
            shared.metrics.step(step, began.elapsed(), done.is_ok());
            done
        };
        tokio::pin!(act);
        let mut tell_at = way.tell_at;
        let abortable = matches!(step, Step::Prepare(_) | Step::CopyAside);
        loop {
            tokio::select! {
                done = &mut act => {
                    let took = way.since.elapsed();
                    tracing::debug!(bot = %self.bot.name, %step, ok = done.is_ok(), since_busy = ?took, "step");
                    return done.map_err(|error| Failed::Step(Failure::of(&error)));
                }
                // Dropping a Prepare in the middle is what its doc allows: what is half-made is found by name.
                () = self.trigger.notified(), if abortable => {
                    if self.goal_changed(desired) {
                        self.trigger.wake("goal changed");
                        return Err(Failed::Aborted);
                    }
                }
                () = sleep_until(tell_at) => tell_at = self.tell_of_way(bot, desired, observed, next).await,
            }
        }
    }

    fn goal_changed(&self, old: &Desired) -> bool {
        let Some(bot) = self.current() else { return true };
        match self.desired(&bot) {
            Ok(new) => match (&old.goal, &new.goal) {
                (Goal::Alive(old), Goal::Alive(new)) => old.image != new.image || old.network != new.network,
                (old, new) => std::mem::discriminant(old) != std::mem::discriminant(new),
            },
            Err(_) => true,
        }
    }

    /// The way that the bot is on; it begins now where it stood still.
    fn way(&mut self) -> &mut Way {
        self.way.get_or_insert_with(Way::begin)
    }

    /// Says where a bot is on its way; when that is to be said again.
    async fn tell_of_way(
        &mut self,
        bot: &Arc<BotContainer>,
        desired: &Desired,
        observed: &Observed,
        next: &Next,
    ) -> Instant {
        self.tell(bot, desired, observed, next).await;
        let again = Instant::now() + TELL_AGAIN;
        self.way().tell_at = again;
        again
    }

    /// Brings the object's status up to what was observed, and tells people of what they want to know.
    async fn tell(&mut self, bot: &Arc<BotContainer>, desired: &Desired, observed: &Observed, next: &Next) {
        // It is told while the step that failed is the one to be done; what comes in between is no trouble.
        let failed = self.retry.as_ref().filter(|retry| *next == Next::Do(retry.trouble.step));
        let trouble = failed.map(|retry| &retry.trouble);
        // The object may have moved on while a step was done; what was observed of the world holds all the same, but
        // its generation is that of the spec which was planned for.
        let live = self.current().unwrap_or_else(|| bot.clone());
        let generation = bot.metadata.generation;
        let mut status = report(generation, desired, observed, next, trouble, live.status.as_ref(), Timestamp::now());
        if let Some(layer) = &observed.layer {
            // While containerd does not say, what was said of the same layer holds.
            let said = live.status.as_ref().map(|status| &status.lineage);
            let said = said.filter(|said| said.last().is_some_and(|last| last.name == layer.key));
            status.lineage = match self.lineage.of(&layer.key).await {
                Some(entries) => entries.to_vec(),
                None => said.cloned().unwrap_or_default(),
            };
        }
        match self.shared.publisher.status(&live, &status).await {
            Ok(Some(newest)) => {
                self.unwritten = 0;
                for (kind, reason, note) in news(live.status.as_ref(), &status, trouble) {
                    if trouble.is_none() && kind == EventType::Warning {
                        self.shared.metrics.error(reason);
                    }
                    self.shared.publisher.event(&live, kind, reason, note).await;
                }
                self.written = Some(Written { object: Arc::new(newest), era: self.shared.era() });
            }
            Ok(None) => self.unwritten = 0,
            Err(error) => {
                let wait = REWRITE_FIRST.saturating_mul(1 << self.unwritten.min(16)).min(REWRITE_MOST);
                self.unwritten = self.unwritten.saturating_add(1);
                tracing::warn!(
                    bot = %self.bot.name, namespace = %self.bot.namespace, retry_in = ?wait, error = %chain(&error),
                    "status not written"
                );
                // The write may have been applied and its answer lost; a fresh look tells.
                self.written = None;
                self.rewrite_at = Some(Instant::now() + jittered(wait));
            }
        }
    }
}

/// Whether a step that failed so waits for something that is made by hand, here or in the API.
fn local(reason: Reason) -> bool {
    matches!(reason, Reason::ConfigNotFound | Reason::ErrImageNeverPull | Reason::InvalidSpec)
}

enum Failed {
    Aborted,
    Step(Failure),
}

/// Why a step failed, as far as the loop cares.
struct Failure {
    reason: Reason,
    message: String,
    retryable: bool,
    retry_after: Option<Duration>,
}

impl Failure {
    fn of(error: &StepError) -> Self {
        Self {
            reason: error.reason(),
            message: chain(error),
            retryable: error.retryable(),
            retry_after: error.retry_after(),
        }
    }

    fn no_progress(message: String) -> Self {
        Self { reason: Reason::RuntimeFailed, message, retryable: true, retry_after: None }
    }
}

/// What people are told by Events: at most one for a change.
fn news(
    old: Option<&crate::api::BotContainerStatus>,
    new: &crate::api::BotContainerStatus,
    trouble: Option<&Trouble>,
) -> Vec<(EventType, Reason, String)> {
    let mut news = Vec::new();
    let ended = |status: Option<&crate::api::BotContainerStatus>| status.and_then(|s| s.last_termination.clone());
    if let Some(last) = ended(Some(new)).filter(|last| ended(old).as_ref() != Some(last)) {
        let reason = Reason::parse(&last.reason).unwrap_or(Reason::Error);
        if reason != Reason::Completed {
            let note = match &last.message {
                Some(message) => format!("the process ended with exit code {}: {message}", last.exit_code),
                None => format!("the process ended with exit code {}", last.exit_code),
            };
            news.push((EventType::Warning, reason, note));
        }
    }
    let started = |status: Option<&crate::api::BotContainerStatus>| status.and_then(|s| s.task.clone());
    if let Some(task) = started(Some(new)).filter(|task| started(old).as_ref() != Some(task)) {
        let image = new.image.as_ref().map_or("", |image| image.reference.as_str());
        news.push((EventType::Normal, Reason::Started, format!("started {image} as process {}", task.pid)));
    }
    let wrong = match trouble {
        Some(trouble) => Some((trouble.reason, trouble.message.clone())),
        // What no step stumbled over and only an edit helps: a spec that is refused, an image that can't be changed. Not an
        // end that is final, which was told with its exit code.
        None => find(&new.conditions, ConditionType::Stalled)
            .and_then(|stalled| Some((Reason::parse(&stalled.reason)?, stalled.message.clone())))
            .filter(|(reason, _)| ended(Some(new)).is_none_or(|last| last.reason != reason.as_str())),
    };
    // A pull's cause stands in ImageReady, where Ready says that it is waited.
    let said = |reason: Reason| {
        let conditions = old.map_or(&[][..], |old| &old.conditions);
        let said = |type_| find(conditions, type_).is_some_and(|c| c.status != "True" && c.reason == reason.as_str());
        said(ConditionType::Ready) || is_image(reason) && said(ConditionType::ImageReady)
    };
    if let Some((reason, message)) = wrong
        && !said(reason)
    {
        news.push((EventType::Warning, reason, message));
    }
    news
}

/// The same wait, up to a tenth longer, so that many bots do not come at once.
pub fn jittered(wait: Duration) -> Duration {
    let mut byte = [0u8; 1];
    // Without randomness there is no jitter: all right.
    let _ = rustix::rand::getrandom(&mut byte, rustix::rand::GetRandomFlags::NONBLOCK);
    wait + wait.mul_f64(f64::from(byte[0]) / 2560.0)
}

/// When a time of the wall clock comes, by the monotonic clock.
pub fn instant(at: Timestamp) -> Instant {
    let wait = at.duration_since(Timestamp::now());
    Instant::now() + Duration::try_from(wait).unwrap_or_default()
}
