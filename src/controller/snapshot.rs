//! BotSnapshots: who they are of, their numbers, where they are made, and when they are let go.
//!
//! ```text
//! no such bot, bot not placed      wait, with the reason; failed when its deadline is over
//! bot placed                       finalizer -> number, noted in the BotRecord -> number and node in its own status
//! given                            its node's agent takes it: nothing to do
//! given, and its node is lost      Ready is Unknown; failed when its deadline is over and it was not Ready
//! being deleted                    let go when its agent says Removed, or when it never had a node, or that is gone
//! ```
//!
//! A number is given once: the record names the snapshot that it was given to in the same write, and no other number is
//! given before that snapshot says its own or is gone. So a controller that dies between the two writes leaves no gap, and a
//! write whose answer was lost is found done.
//!
//! The controller makes snapshots itself too, when an agent waits for one ([`Cause`]): each under a name that is computed
//! from the bot and the cause, so that none is made twice.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, DeleteParams, ListParams, Patch, PostParams, Preconditions};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use crate::api::bot_container::{DeletionPolicy, RestoredFrom};
use crate::api::bot_record::Given;
use crate::api::bot_snapshot::{BotSnapshotSpec, SnapshotPhase, SnapshotSource, automatic_name, image_change_cause};
use crate::api::condition::{ConditionType, Reason, condition, find};
use crate::api::{
    BotContainer, BotRecord, BotSnapshot, BotSnapshotStatus, CONTROLLER, SNAPSHOT_FINALIZER, SOURCE_LABEL,
};

use crate::image::Reference;

use super::bot::bound_to;
use super::error::Error;
use super::event::Note;
use super::node::NodeState;
use super::record::{Hold, bot_id};
use super::schedule::Schedule;
use super::world::SeenSnapshot;
use super::{Context, Name, Next, describe, finalizer};

/// Annotation of a BotSnapshot that the controller made: what of, in words that tell it from others of its source.
const CAUSE: &str = "berth.dev/cause";

/// Why the controller makes a snapshot by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// What a rollback of this id replaces.
    Rollback(String),
    /// The last one of a bot that is deleted under `deletionPolicy: Retain`.
    Preserved,
    /// Before the bot moves from this layer to this image.
    ImageChange {
        /// `spec.image`.
        image: String,
        /// The layer's name in containerd.
        layer: String,
    },
    /// Due at this time.
    Scheduled(Timestamp),
}

impl Cause {
    /// The source that such a snapshot has.
    pub fn source(&self) -> SnapshotSource {
        match self {
            Self::Rollback(_) => SnapshotSource::Rollback,
            Self::Preserved => SnapshotSource::Preserved,
            Self::ImageChange { .. } => SnapshotSource::PreImageChange,
            Self::Scheduled(_) => SnapshotSource::Scheduled,
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Rollback(id) => id.clone(),
            Self::Preserved => String::new(),
            Self::ImageChange { image, layer } => image_change_cause(image, layer),
            Self::Scheduled(at) => at.to_string(),
        }
    }

    /// What a bot's agent waits for: it says so, and the spec says why.
    pub fn awaited(bot: &BotContainer) -> Option<Self> {
        let status = bot.status.as_ref()?;
        find(&status.conditions, ConditionType::Ready).filter(|c| c.reason == Reason::WaitingForSnapshot.as_str())?;
        if bot.metadata.deletion_timestamp.is_some() {
            return (bot.spec.deletion_policy == DeletionPolicy::Retain).then_some(Self::Preserved);
        }
        let done = status.rollback.as_ref().map(|done| &done.id);
        match bot.spec.rollback.as_ref().filter(|asked| Some(&asked.id) != done) {
            Some(asked) => asked.keep_replaced.then(|| Self::Rollback(asked.id.clone())),
            None => {
                let wanted = Reference::parse(&bot.spec.image).ok()?.to_string();
                status.image.as_ref().filter(|image| image.reference != wanted)?;
                let layer = &status.lineage.last()?.name;
                Some(Self::ImageChange { image: bot.spec.image.clone(), layer: layer.clone() })
            }
        }
    }
}

/// Who asked for a snapshot: what its label says, if its name proves that the controller made it of this bot; else a user.
pub fn source(snapshot: &BotSnapshot, bot: &BotContainer) -> SnapshotSource {
    let label = snapshot.labels().get(SOURCE_LABEL);
    let said = label.and_then(|text| serde_json::from_value::<SnapshotSource>(json!(text)).ok());
    let cause = snapshot.annotations().get(CAUSE).map_or("", String::as_str);
    said.filter(|said| {
        automatic_name(&bot.name_any(), &bot.uid().unwrap_or_default(), *said, cause) == snapshot.name_any()
    })
    .unwrap_or(SnapshotSource::Manual)
}

/// What a decision is made from.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// The snapshot.
    pub snapshot: &'a BotSnapshot,
    /// The bot that it names, if there is one.
    pub bot: Option<&'a BotContainer>,
    /// How that bot stands to the record of its botId.
    pub hold: Option<Hold>,
    /// How it is with the node that the snapshot is on, if it is on one; else with that of the bot.
    pub node: Option<NodeState>,
    /// What a bot left without an object, where this is to be made of that.
    pub adopts: Option<&'a Adopted>,
}

/// What a bot left on a node without an object, in a namespace that was deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// Where it is.
    pub node: String,
    /// Uid of the bot that left it; the agent finds it by that.
    pub bot_uid: String,
    /// The bot.
    pub bot_id: String,
    /// Name of its BotContainer.
    pub bot_name: String,
    /// The version that it would have been.
    pub version: i64,
}

/// What to do about a snapshot. Each is safe to be cut off anywhere and decided again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing.
    Rest,
    /// Say what it waits for, until its deadline.
    Wait {
        /// WaitingForBot or BotNotFound.
        reason: Reason,
        /// For people.
        message: String,
        /// When it fails.
        until: Timestamp,
    },
    /// It will never be made.
    Fail {
        /// Why, in a word.
        reason: Reason,
        /// Why.
        message: String,
    },
    /// Say in the agent's place that nobody knows how it is with it.
    Unknown {
        /// NodeUnreachable or NodeGone.
        reason: Reason,
        /// Names the node and since when.
        message: String,
        /// When it fails.
        until: Option<Timestamp>,
    },
    /// Give it its finalizer, its number and its node. Cut off: the record names it, so it gets the same number.
    Give {
        /// Where it is made.
        node: String,
        /// Who asked for it.
        source: SnapshotSource,
    },
    /// The same, for what is adopted.
    Adopt,
    /// Remove the finalizer.
    LetGo {
        /// What is lost with its node, if that is gone.
        lost: Option<String>,
    },
}

/// What to do about a snapshot.
pub fn decide(view: &View<'_>, now: Timestamp) -> Plan {
    let View { snapshot, bot, hold, node, adopts } = view;
    let none = BotSnapshotStatus::default();
    let status = snapshot.status.as_ref().unwrap_or(&none);
    if snapshot.metadata.deletion_timestamp.is_some() {
        if !snapshot.finalizers().iter().any(|f| f == SNAPSHOT_FINALIZER) {
            return Plan::Rest;
        }
        return match node {
            _ if status.node_name.is_none() => Plan::LetGo { lost: None },
            _ if removed(status) => Plan::LetGo { lost: None },
            Some(NodeState::Gone(why)) => Plan::LetGo { lost: Some(why.clone()) },
            Some(NodeState::Alive | NodeState::Lost(_)) | None => Plan::Rest,
        };
    }
    if status.phase == Some(SnapshotPhase::Failed)
        || status.version.is_some() && matches!(node, None | Some(NodeState::Alive))
    {
        return Plan::Rest;
    }
    let created = snapshot.creation_timestamp().map_or(now, |at| at.0);
    let until = created
        .saturating_add(std::time::Duration::from_secs(snapshot.spec.failure_deadline_seconds.max(0).unsigned_abs()));
    let until = until.unwrap_or(Timestamp::MAX);
    let name = &snapshot.spec.bot_container_name;
    // What the controller made for an agent that waits for it has no deadline: the bot's last version must not be given up.
    let source_ = status.source.or_else(|| bot.map(|bot| source(snapshot, bot)));
    let awaited = matches!(source_, Some(SnapshotSource::Preserved | SnapshotSource::Rollback));
    let until = if awaited { Timestamp::MAX } else { until };
    let wait = |reason, message: String| {
        if now < until {
            Plan::Wait { reason, message, until }
        } else {
            let reason = if reason == Reason::BotNotFound { reason } else { Reason::DeadlineExceeded };
            let limit = snapshot.spec.failure_deadline_seconds;
            Plan::Fail { reason, message: format!("{message}, and failureDeadlineSeconds ({limit}) are over") }
        }
    };
    let away = match node {
        Some(NodeState::Lost(why)) => Some((Reason::NodeUnreachable, why)),
        Some(NodeState::Gone(why)) => Some((Reason::NodeGone, why)),
        Some(NodeState::Alive) | None => None,
    };
    if status.version.is_some() {
        // Ready: nobody knows whether it still is, and no deadline ends that.
        let ready = status.phase == Some(SnapshotPhase::Ready);
        return match away {
            Some((reason, why)) if ready || now < until => {
                Plan::Unknown { reason, message: why.clone(), until: (!ready).then_some(until) }
            }
            Some((_, why)) => wait(Reason::NodeUnreachable, why.clone()),
            None => Plan::Rest,
        };
    }
    if adopts.is_some() {
        return Plan::Adopt;
    }
    let Some(bot) = bot else {
        return wait(Reason::BotNotFound, format!("there is no BotContainer {name} in this namespace"));
    };
    let source = source(snapshot, bot);
    if bot.metadata.deletion_timestamp.is_some() && source != SnapshotSource::Preserved {
        return Plan::Fail {
            reason: Reason::BotTerminating,
            message: format!("BotContainer {name} is being deleted; its deletionPolicy says what is kept of it"),
        };
    }
    if let Some((reason, why)) = away {
        return wait(reason, why.clone());
    }
    match (bound_to(bot), hold) {
        (Some(node), Some(Hold::Mine(_))) => Plan::Give { node: node.to_owned(), source },
        (Some(_), _) => wait(Reason::WaitingForBot, format!("BotContainer {name} has no BotRecord of its own yet")),
        (None, _) => wait(Reason::WaitingForBot, format!("BotContainer {name} is on no node yet, so it has no layer")),
    }
}

/// Whether the agent said that nothing of the snapshot is left that only its object would free.
fn removed(status: &BotSnapshotStatus) -> bool {
    find(&status.conditions, ConditionType::Ready)
        .is_some_and(|c| c.status == "False" && c.reason == Reason::Removed.as_str())
}

/// What a snapshot's number is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Number {
    /// It was given this one, and only has to be told.
    Has(i64),
    /// It gets this one.
    Gets(i64),
    /// Another was given one and does not say so yet: it comes first.
    After(Given),
}

/// The number of the snapshot `uid`. `highest` is the highest that is known from elsewhere; `untold` whether the one that
/// was given the last number is there and does not say it.
pub fn number(record: &BotRecord, uid: &str, highest: i64, untold: bool) -> Number {
    match &record.spec.last_given {
        Some(given) if given.uid == uid => Number::Has(record.spec.last_version),
        Some(given) if untold => Number::After(given.clone()),
        _ => Number::Gets(record.spec.last_version.max(highest).saturating_add(1)),
    }
}

/// What a bot that has no layer is to start from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restore {
    /// Its image.
    Nothing,
    /// A version, which is on that node.
    From {
        /// Which.
        from: RestoredFrom,
        /// Where.
        node: String,
    },
    /// Nothing yet.
    Wait {
        /// RestoreFailed where only an edit or another object helps, RestoreWaiting else.
        reason: Reason,
        /// For people.
        message: String,
    },
}

/// Whether a version can be started from: it is whole, and stays.
pub fn usable(name: &str, snapshot: Option<&BotSnapshot>) -> Restore {
    let failed = |message| Restore::Wait { reason: Reason::RestoreFailed, message };
    let waiting = |message| Restore::Wait { reason: Reason::RestoreWaiting, message };
    let Some(snapshot) = snapshot else {
        return failed(format!("there is no BotSnapshot {name} in this namespace; it is waited for"));
    };
    if snapshot.metadata.deletion_timestamp.is_some() {
        return failed(format!("the BotSnapshot {name} is being deleted; name another"));
    }
    let none = BotSnapshotStatus::default();
    let status = snapshot.status.as_ref().unwrap_or(&none);
    let phase = status.phase.unwrap_or_default();
    match (phase, &status.bot_id, status.version, &status.node_name) {
        (SnapshotPhase::Ready, Some(bot_id), Some(version), Some(node)) => Restore::From {
            from: RestoredFrom {
                snapshot_name: name.to_owned(),
                uid: snapshot.uid().unwrap_or_default(),
                bot_id: bot_id.clone(),
                version,
            },
            node: node.clone(),
        },
        (SnapshotPhase::Failed, ..) => failed(format!("the BotSnapshot {name} failed and holds nothing; name another")),
        _ => waiting(format!("the BotSnapshot {name} is not Ready yet: {phase:?}")),
    }
}

/// The newest version that a botId left behind. One that is still being made is waited for.
pub fn newest<'a>(snapshots: impl IntoIterator<Item = &'a BotSnapshot>) -> Restore {
    let number = |snapshot: &BotSnapshot| snapshot.status.as_ref().and_then(|s| s.version).unwrap_or(0);
    let failed = |snapshot: &BotSnapshot| {
        snapshot.status.as_ref().and_then(|s| s.phase) == Some(SnapshotPhase::Failed)
            || snapshot.metadata.deletion_timestamp.is_some()
    };
    match snapshots.into_iter().filter(|s| !failed(s)).max_by_key(|s| number(s)) {
        Some(newest) => usable(&newest.name_any(), Some(newest)),
        None => Restore::Nothing,
    }
}

/// Fetch, plan, apply.
pub async fn reconcile(context: &Context, name: &Name) -> Result<Next, Error> {
    let now = Timestamp::now();
    let Some(seen) = context.world().snapshot_view(name, std::time::Instant::now()) else { return Ok(Next::Done) };
    let SeenSnapshot { snapshot, bot, record, hold, node, adopts } = seen;
    let view = View { snapshot: &snapshot, bot: bot.as_deref(), hold, node, adopts: adopts.as_ref() };
    let plan = decide(&view, now);
    tracing::debug!(?plan, "decided");
    match plan {
        Plan::Rest => Ok(Next::Resync),
        Plan::Wait { reason, message, until } => {
            say(context, &snapshot, SnapshotPhase::Pending, reason, &message).await?;
            let wait = until.duration_since(now).try_into().unwrap_or_default();
            Ok(Next::At(std::time::Instant::now() + wait))
        }
        Plan::Unknown { reason, message, until } => {
            let again = match until {
                Some(until) => {
                    let wait = until.duration_since(now).try_into().unwrap_or_default();
                    Next::At(std::time::Instant::now() + wait)
                }
                None => Next::Resync,
            };
            unknown(context, name, &snapshot, reason, &message).await?;
            Ok(again)
        }
        Plan::Fail { reason, message } => {
            if say(context, &snapshot, SnapshotPhase::Failed, reason, &message).await? {
                let once = reason.as_str().to_owned();
                context.events.send(Note::warning(snapshot.object_ref(&()), reason, "Snapshot", message, once));
            }
            Ok(Next::Resync)
        }
        Plan::Give { node, source } => match (bot, record) {
            (Some(bot), Some(record)) => {
                let least = 1;
                let of = Of { bot_id: bot_id(&bot), bot_uid: bot.uid().unwrap_or_default(), node, source, least };
                give(context, name, &snapshot, &record, of).await
            }
            _ => Ok(Next::Resync),
        },
        Plan::Adopt => {
            let Some(Adopted { node, bot_uid, bot_id, version, .. }) = adopts else { return Ok(Next::Resync) };
            let record = super::record::ensure(context, &name.namespace, &bot_id).await?;
            let of = Of { bot_id, bot_uid, node, source: SnapshotSource::Preserved, least: version };
            give(context, name, &snapshot, &record, of).await
        }
        Plan::LetGo { lost } => {
            if let Some(why) = lost {
                let text = format!("{why}; the version is lost");
                let once = snapshot.uid().unwrap_or_default();
                let reason = Reason::FinalizerReleased;
                context.events.send(Note::warning(snapshot.object_ref(&()), reason, "Release", text, once));
            }
            finalizer::remove(context, &*snapshot, SNAPSHOT_FINALIZER).await?;
            Ok(Next::Done)
        }
    }
}

/// What a snapshot is of.
struct Of {
    bot_id: String,
    bot_uid: String,
    node: String,
    source: SnapshotSource,
    /// The lowest number that it may get.
    least: i64,
}

/// Finalizer, number, node.
async fn give(
    context: &Context,
    name: &Name,
    snapshot: &BotSnapshot,
    record: &BotRecord,
    of: Of,
) -> Result<Next, Error> {
    let mut snapshot = snapshot.clone();
    if !snapshot.finalizers().iter().any(|f| f == SNAPSHOT_FINALIZER) {
        snapshot = finalizer::add(context, &snapshot, SNAPSHOT_FINALIZER).await?;
        keep(context, snapshot.clone());
    }
    let uid = snapshot.uid().unwrap_or_default();
    let api: Api<BotSnapshot> = Api::namespaced(context.client.clone(), &name.namespace);
    let untold = match record.spec.last_given.as_ref().filter(|given| given.uid != uid) {
        // Asked of the API server itself: a number must not be skipped or given twice for a cache that is behind.
        Some(given) => {
            let object = format!("BotSnapshot {}/{}", name.namespace, given.name);
            let live = context.read("looking for the last number", &object, api.get_opt(&given.name)).await?;
            live.is_some_and(|live| {
                live.uid().as_ref() == Some(&given.uid) && live.status.is_none_or(|status| status.version.is_none())
            })
        }
        None => false,
    };
    let highest = context.world().highest_version(&name.namespace, &of.bot_id).max(of.least.saturating_sub(1));
    let version = match number(record, &uid, highest, untold) {
        Number::Has(version) => version,
        Number::Gets(version) => {
            let given = Given { name: snapshot.name_any(), uid: uid.clone() };
            super::record::count(context, record, version, &given).await?;
            version
        }
        Number::After(given) => {
            let first = Name { namespace: name.namespace.clone(), name: given.name };
            context.queue.add_all([super::Key::Snapshot(first)], "number before");
            return Ok(Next::At(std::time::Instant::now() + std::time::Duration::from_millis(50)));
        }
    };
    let message = format!("waiting for the agent of {}", of.node);
    let mut status = told(&snapshot, SnapshotPhase::Pending, Reason::WaitingForBot, &message);
    status.bot_id = Some(of.bot_id);
    status.bot_uid = Some(of.bot_uid);
    status.version = Some(version);
    status.node_name = Some(of.node);
    status.source = Some(of.source);
    write(context, &snapshot, &status, "giving the version").await?;
    Ok(Next::Resync)
}

/// Whether a snapshot that an agent waits for is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ensured {
    /// It is.
    Is,
    /// It can't be: the namespace is being deleted.
    NamespaceEnds,
}

/// Makes the snapshot that a bot's agent waits for, if it is not there.
pub async fn ensure(context: &Context, bot: &BotContainer, cause: &Cause) -> Result<Ensured, Error> {
    let namespace = bot.namespace().unwrap_or_default();
    let (source, words) = (cause.source(), cause.words());
    let name = automatic_name(&bot.name_any(), &bot.uid().unwrap_or_default(), source, &words);
    // Also one that was given up: its agent takes it up again when it is asked for again. It is never made anew in its place, since
    // what is committed under its name would go with it.
    if context.world().has_snapshot(&Name { namespace: namespace.clone(), name: name.clone() }) {
        return Ok(Ensured::Is);
    }
    let spec = BotSnapshotSpec {
        display_name: Some(match cause {
            Cause::Rollback(id) => format!("replaced by rollback {id}"),
            Cause::Preserved => "kept at deletion".to_owned(),
            Cause::ImageChange { image, .. } => format!("before the change to {image}"),
            Cause::Scheduled(at) => format!("scheduled for {at}"),
        })
        .filter(|text| text.len() <= 253),
        ..BotSnapshotSpec::of(&bot.name_any())
    };
    let mut snapshot = made(&name, spec);
    snapshot.labels_mut().insert(SOURCE_LABEL.to_owned(), source.word());
    snapshot.annotations_mut().insert(CAUSE.to_owned(), words);
    let api: Api<BotSnapshot> = Api::namespaced(context.client.clone(), &namespace);
    let object = format!("BotSnapshot {namespace}/{name}");
    let params = PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() };
    match context.write("making", &object, api.create(&params, &snapshot)).await {
        Ok(made) => {
            keep(context, made);
            Ok(Ensured::Is)
        }
        // No Event can be made in it either: the agent tells of it on its BotNode.
        Err(Error::Forbidden { source, .. }) if is_ending(&source) => {
            tracing::warn!(snapshot = object, "the namespace is being deleted, so this can't be made");
            Ok(Ensured::NamespaceEnds)
        }
        // Made before, by us or a leader before us.
        Err(error) if error.is_there_already() => Ok(Ensured::Is),
        Err(error) => Err(error),
    }
}

/// A snapshot that the controller makes.
fn made(name: &str, spec: BotSnapshotSpec) -> BotSnapshot {
    let mut snapshot = BotSnapshot::new(name, spec);
    // It has it from birth: one write less, and no moment in which it could go unseen.
    snapshot.metadata.finalizers = Some(vec![SNAPSHOT_FINALIZER.to_owned()]);
    snapshot
}

/// Makes the snapshot that is to adopt what a bot left, if it is not there.
pub async fn adopt(context: &Context, name: &Name, of: &Adopted) -> Result<(), Error> {
    if context.world().has_snapshot(name) {
        return Ok(());
    }
    let spec = BotSnapshotSpec { display_name: Some("adopted".to_owned()), ..BotSnapshotSpec::of(&of.bot_name) };
    let api: Api<BotSnapshot> = Api::namespaced(context.client.clone(), &name.namespace);
    let params = PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() };
    let object = format!("BotSnapshot {name}");
    match context.write("adopting", &object, api.create(&params, &made(&name.name, spec))).await {
        Ok(snapshot) => {
            keep(context, snapshot);
            Ok(())
        }
        Err(error) if error.is_there_already() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether the API server refused since the namespace is being deleted.
pub fn is_ending(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 403 && causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

/// What `spec.snapshotPolicy` asks for: makes the snapshot that is due, and removes those that are surplus.
pub async fn keep_policy(
    context: &Context,
    name: &Name,
    bot: &BotContainer,
    record: &BotRecord,
) -> Result<Next, Error> {
    let Some(policy) = bot.spec.snapshot_policy.as_ref().filter(|_| bot.metadata.deletion_timestamp.is_none()) else {
        return Ok(Next::Resync);
    };
    if let Some(keep_last) = policy.keep_last {
        let surplus = context.world().surplus(&name.namespace, bot, usize::try_from(keep_last).unwrap_or(1));
        for snapshot in surplus {
            delete(context, &snapshot).await?;
        }
    }
    let Some(text) = policy.schedule.as_deref().filter(|_| !policy.suspend) else { return Ok(Next::Resync) };
    let schedule = match Schedule::parse(text, policy.time_zone.as_deref()) {
        Ok(schedule) => schedule,
        Err(bad) => {
            // The API server let it through: a time zone that it does not know either, or 31 February.
            let note = format!("spec.snapshotPolicy: {bad}");
            let once = note.clone();
            context.events.send(Note::warning(bot.object_ref(&()), Reason::InvalidSpec, "Schedule", note, once));
            return Ok(Next::Resync);
        }
    };
    let now = Timestamp::now();
    let last = record.spec.last_scheduled.as_deref().and_then(|text| text.parse::<Timestamp>().ok());
    let Some(last) = last else {
        // It counts from here on: what would have been due before there was a schedule was not missed.
        super::record::scheduled(context, record, &now.to_string()).await?;
        return Ok(Next::Resync);
    };
    if let Some(due) = schedule.missed(last, now) {
        ensure(context, bot, &Cause::Scheduled(due)).await?;
        super::record::scheduled(context, record, &due.to_string()).await?;
        return Ok(Next::Resync);
    }
    let Some(next) = schedule.next_after(now) else { return Ok(Next::Resync) };
    let wait = std::time::Duration::try_from(next.duration_since(now)).unwrap_or_default();
    // A moment later, so that it is due then; at the latest with the next resync, for clocks are set.
    let wait = wait.min(super::RESYNC) + std::time::Duration::from_millis(20);
    Ok(Next::At(std::time::Instant::now() + wait))
}

/// Every BotSnapshot of a botId, by a complete list taken now.
pub async fn all_of(context: &Context, namespace: &str, bot_id: &str) -> Result<Vec<BotSnapshot>, Error> {
    let api: Api<BotSnapshot> = Api::namespaced(context.client.clone(), namespace);
    let mut page = ListParams::default().limit(500);
    let mut found = Vec::new();
    loop {
        let list = context.read("listing", &format!("BotSnapshots of {namespace}"), api.list(&page)).await?;
        let of_it = |s: &BotSnapshot| s.status.as_ref().and_then(|s| s.bot_id.as_deref()) == Some(bot_id);
        found.extend(list.items.into_iter().filter(of_it));
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(found),
        }
    }
}

/// Deletes a snapshot; by uid, so that another of its name is not meant.
pub async fn delete(context: &Context, snapshot: &BotSnapshot) -> Result<(), Error> {
    if snapshot.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let api: Api<BotSnapshot> = Api::namespaced(context.client.clone(), &snapshot.namespace().unwrap_or_default());
    let params = DeleteParams::default().preconditions(Preconditions { uid: snapshot.uid(), resource_version: None });
    match context.write("deletion", &describe(snapshot), api.delete(&snapshot.name_any(), &params)).await {
        Ok(_) => Ok(()),
        // It is gone, or another has its name.
        Err(Error::Conflict { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Says what it waits for or why it failed, if it does not say so already; whether it was written.
async fn say(
    context: &Context,
    snapshot: &BotSnapshot,
    phase: SnapshotPhase,
    reason: Reason,
    message: &str,
) -> Result<bool, Error> {
    let live = snapshot.status.as_ref();
    let said = live.and_then(|status| find(&status.conditions, ConditionType::Ready));
    if live.and_then(|status| status.phase) == Some(phase)
        && said.is_some_and(|c| c.reason == reason.as_str() && c.message == message)
    {
        return Ok(false);
    }
    write(context, snapshot, &told(snapshot, phase, reason, message), "status").await?;
    Ok(true)
}

/// Says in the agent's place that nobody knows how it is, once in an outage: an agent that is there after all says so again.
async fn unknown(
    context: &Context,
    name: &Name,
    snapshot: &BotSnapshot,
    reason: Reason,
    message: &str,
) -> Result<(), Error> {
    let status = snapshot.status.clone().unwrap_or_default();
    let said = find(&status.conditions, ConditionType::Ready);
    if said.is_some_and(|c| c.status == "Unknown" && c.reason == reason.as_str() && c.message == message)
        || context.world().has_claimed_snapshot(name, message)
    {
        return Ok(());
    }
    // Phase and generation are the agent's, and are as it left them.
    let (phase, generation) = (status.phase.unwrap_or_default(), status.observed_generation);
    let unknown = said_of(snapshot, phase, None, reason, message);
    write(context, snapshot, &BotSnapshotStatus { observed_generation: generation, ..unknown }, "status").await?;
    context.world().claimed_snapshot(name, message.to_owned());
    Ok(())
}

fn told(snapshot: &BotSnapshot, phase: SnapshotPhase, reason: Reason, message: &str) -> BotSnapshotStatus {
    said_of(snapshot, phase, Some(false), reason, message)
}

/// What the controller says of a snapshot: what it gave it once, which it repeats with each write, and how it is with it.
fn said_of(
    snapshot: &BotSnapshot,
    phase: SnapshotPhase,
    is_ready: Option<bool>,
    reason: Reason,
    message: &str,
) -> BotSnapshotStatus {
    let old = snapshot.status.clone().unwrap_or_default();
    let mut ready = condition(ConditionType::Ready, is_ready, reason, message, Time(Timestamp::now()));
    if let Some(before) = find(&old.conditions, ConditionType::Ready).filter(|c| c.status == ready.status) {
        ready.last_transition_time = before.last_transition_time.clone();
    }
    BotSnapshotStatus {
        observed_generation: snapshot.metadata.generation,
        phase: Some(phase),
        bot_id: old.bot_id,
        bot_uid: old.bot_uid,
        version: old.version,
        source: old.source,
        node_name: old.node_name,
        conditions: vec![ready],
        ..BotSnapshotStatus::default()
    }
}

async fn write(
    context: &Context,
    snapshot: &BotSnapshot,
    status: &BotSnapshotStatus,
    step: &'static str,
) -> Result<(), Error> {
    let body = json!({
        "apiVersion": "berth.dev/v1alpha1",
        "kind": "BotSnapshot",
        "metadata": {
            "name": snapshot.name_any(),
            "namespace": snapshot.namespace(),
            "uid": snapshot.uid(),
            "resourceVersion": snapshot.resource_version(),
        },
        "status": status,
    });
    let api: Api<BotSnapshot> = Api::namespaced(context.client.clone(), &snapshot.namespace().unwrap_or_default());
    let (name, params, patch) = (snapshot.name_any(), super::apply_params(), Patch::Apply(&body));
    let call = api.patch_status(&name, &params, &patch);
    keep(context, context.write(step, &describe(snapshot), call).await?);
    Ok(())
}

/// Keeps the answer to our own write.
fn keep(context: &Context, snapshot: BotSnapshot) {
    let keys = context.world().saw_snapshot(snapshot, std::time::Instant::now());
    context.queue.add_all(keys, "own write");
}

#[cfg(test)]
mod tests;
