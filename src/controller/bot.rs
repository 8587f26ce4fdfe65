//! One bot: fetch, plan, apply. `decide` is pure; `reconcile` reads as that sentence; `apply` asks nothing of what is
//! wanted, only how to do what it was told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch};
use kube::{Resource as _, ResourceExt as _};

use crate::api::bot_container::RestoredFrom;
use crate::api::condition::{ConditionType, Reason, find};
use crate::api::{BotContainer, BotRecord, FINALIZER, NODE_LEASE_NAMESPACE};

use super::access;
use super::error::Error;
use super::event::Note;
use super::node::{NodeState, OUT_OF_SERVICE};
use super::record::{self, Hold, bot_id};
use super::snapshot::{self, Cause, Ensured, Restore};
use super::status::{Claim, Wanted, claimed, patch};
use super::{Context, Name, Next, describe, finalizer};

/// A message that alone changed is written at most this often: what is free on a node changes with every other bot.
const REPHRASE: Duration = Duration::from_secs(30);

/// After the agent took a claim back, it is left alone for so long in the same outage, even if its Lease stays away: two
/// writers that disagree must not fill the API server.
const RECLAIM: Duration = Duration::from_secs(40);

/// What a decision is made from.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// The bot.
    pub bot: &'a BotContainer,
    /// How it stands to the record of its botId.
    pub hold: Hold,
    /// How it is with the node that has its layer, if one has.
    pub home: Option<NodeState>,
    /// What it is to start from, where it is not placed yet.
    pub restore: Restore,
    /// The last rollback that its record counts as done.
    pub rolled_back: Option<&'a str>,
}

/// What to do about a bot. Each is safe to be cut off anywhere and decided again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing.
    Rest,
    /// Say why it is not placed. Cut off: nothing is left behind.
    Wait {
        /// Unschedulable or BotIdInUse.
        reason: Reason,
        /// For people.
        message: String,
    },
    /// Take the botId and add the finalizer, side by side; then bind. Cut off before the bind: the record names the
    /// node, and the next pass binds to that one. Cut off after a bind beside: the next pass makes the record of what is bound.
    Place {
        /// Where to.
        node: String,
        /// The record has to be made or changed first.
        take: bool,
        /// The finalizer is missing.
        finalizer: bool,
        /// Bind it beside: nothing that is still to be written can forbid it.
        beside: bool,
        /// The version that it starts from.
        restore: Option<RestoredFrom>,
    },
    /// Keep a bound bot's record, finalizer and status right.
    Keep {
        /// Where it is.
        node: String,
        /// The record has to be made or changed.
        take: bool,
        /// The finalizer is missing.
        finalizer: bool,
        /// What is said in the agent's place.
        claim: Claim,
    },
    /// Give up the botId, then remove the finalizer. Cut off in between: the next pass does the rest.
    LetGo {
        /// It holds its botId.
        release: bool,
        /// What is lost with its node, if that is gone.
        lost: Option<String>,
    },
}

/// The node that a bot is bound to, by its status.
pub fn bound_to(bot: &BotContainer) -> Option<&str> {
    bot.status.as_ref().and_then(|s| s.node_name.as_deref()).filter(|n| !n.is_empty())
}

/// The node that has, or may have, something of a bot: the one it is bound to, or, where its status was lost, the one
/// that its record names. A record is written before the bind, so this may be a node that never heard of the bot; that
/// can't be told, and to bind it elsewhere might run it twice.
pub fn home<'a>(bot: &'a BotContainer, hold: &'a Hold) -> Option<&'a str> {
    bound_to(bot).or(match hold {
        Hold::Mine(node) => node.as_deref(),
        Hold::None | Hold::Free(_) | Hold::Other(_) => None,
    })
}

/// What to do about a bot. `place` chooses a node, on the one that has the layer only where that is given, or says why
/// none fits; it is asked only when one is needed.
pub fn decide(view: &View<'_>, place: impl FnOnce(Option<&str>) -> Result<String, String>) -> Plan {
    let View { bot, hold, home: state, restore, rolled_back } = view;
    let finalizer = !bot.finalizers().iter().any(|f| f == FINALIZER);
    let home = home(bot, hold);
    if bot.metadata.deletion_timestamp.is_some() {
        if finalizer {
            return Plan::Rest;
        }
        let release = matches!(hold, Hold::Mine(_));
        return match (home, state) {
            (None, _) => Plan::LetGo { release, lost: None },
            (Some(_), _) if removed(bot) => Plan::LetGo { release, lost: None },
            (Some(_), Some(NodeState::Gone(why))) => Plan::LetGo { release, lost: Some(why.clone()) },
            (Some(node), state) => {
                Plan::Keep { node: node.to_owned(), take: false, finalizer: false, claim: claim(state.as_ref()) }
            }
        };
    }
    if let Some(node) = bound_to(bot) {
        let take = match hold {
            Hold::None | Hold::Free(_) => true,
            Hold::Mine(recorded) => {
                let done = bot.status.as_ref().and_then(|s| s.rollback.as_ref()).map(|done| done.id.as_str());
                recorded.as_deref() != Some(node) || done.is_some() && done != *rolled_back
            }
            // It runs, and so may the other: to take the botId away would not stop either.
            Hold::Other(_) => false,
        };
        return Plan::Keep { node: node.to_owned(), take, finalizer, claim: claim(state.as_ref()) };
    }
    let layer = match hold {
        Hold::Mine(Some(node)) => {
            // Decided by a pass that was cut off: the version, if any, is the one that led there.
            let restore = match restore {
                Restore::From { from, node: there } if there == node => Some(from.clone()),
                _ => None,
            };
            return Plan::Place { node: node.clone(), take: false, finalizer, beside: false, restore };
        }
        Hold::Other(holder) => {
            return Plan::Wait {
                reason: Reason::BotIdInUse,
                message: format!(
                    "botId {} is held by BotContainer {holder}; this one goes on when that is gone",
                    bot_id(bot)
                ),
            };
        }
        // What a gone node had is lost: there is nothing to go back to.
        Hold::Free(Some(_)) if matches!(state, Some(NodeState::Gone(_))) => None,
        Hold::Free(node) => node.as_deref(),
        Hold::None | Hold::Mine(None) => None,
    };
    let (layer, restore) = match restore {
        Restore::Nothing => (layer, None),
        Restore::From { from, node } => (Some(node.as_str()), Some(from.clone())),
        Restore::Wait { reason, message } => return Plan::Wait { reason: *reason, message: message.clone() },
    };
    match place(layer) {
        Ok(node) => {
            // Its own uid is a botId that no other bot has, unless it was given it on purpose.
            let beside = !finalizer && bot.spec.bot_id.is_none() && *hold == Hold::None;
            Plan::Place { node, take: true, finalizer, beside, restore }
        }
        Err(why) => {
            let message = match layer {
                Some(node) if restore.is_some() => format!("the version to start from is on {node}: {why}"),
                Some(node) => format!("the layer of botId {} is on {node}: {why}", bot_id(bot)),
                None => why,
            };
            Plan::Wait { reason: Reason::Unschedulable, message }
        }
    }
}

/// Whether the agent said that nothing of the bot is left on its node.
fn removed(bot: &BotContainer) -> bool {
    let conditions = bot.status.as_ref().map_or(&[][..], |s| &s.conditions);
    find(conditions, ConditionType::Running)
        .is_some_and(|c| c.status == "False" && c.reason == Reason::Removed.as_str())
}

fn claim(state: Option<&NodeState>) -> Claim {
    match state {
        None | Some(NodeState::Alive) => Claim::Keep,
        Some(NodeState::Lost(why)) => Claim::Unknown { reason: Reason::NodeUnreachable, message: why.clone() },
        Some(NodeState::Gone(why)) => Claim::Unknown { reason: Reason::NodeGone, message: why.clone() },
    }
}

/// Fetch, plan, apply.
pub async fn reconcile(context: &Context, name: &Name) -> Result<Next, Error> {
    let now = Instant::now();
    let (bot, record, plan) = {
        let mut world = context.world();
        let Some(seen) = world.view(name, now) else { return Ok(Next::Done) };
        let (bot, record) = (seen.bot, seen.record);
        let rolled_back = record.as_deref().and_then(|record| record.spec.last_rollback_id.as_deref());
        let view = View { bot: &bot, hold: seen.hold, home: seen.home, restore: seen.restore, rolled_back };
        let plan = decide(&view, |layer| world.place(name, &bot, layer, now));
        // What was decided counts from now on, before the watch brings it back.
        world.reserve(
            name,
            &bot,
            match &plan {
                Plan::Place { node, .. } => Some(node),
                _ => None,
            },
        );
        (bot, record, plan)
    };
    tracing::debug!(?plan, "decided");
    apply(context, name, bot, record, plan, now).await
}

async fn apply(
    context: &Context,
    name: &Name,
    bot: Arc<BotContainer>,
    record: Option<Arc<BotRecord>>,
    plan: Plan,
    now: Instant,
) -> Result<Next, Error> {
    match plan {
        Plan::Rest => Ok(Next::Resync),
        Plan::Wait { reason, message } => wait(context, name, &bot, reason, message, now).await,
        Plan::Place { node, take, finalizer, beside, restore } => {
            // What it may read is granted before its agent hears of it.
            let granting = async {
                let at = Name { namespace: name.namespace.clone(), name: node.clone() };
                if context.world().names_any(name) { access::reconcile(context, &at).await.map(drop) } else { Ok(()) }
            };
            let preparing = prepare(context, &bot, record.as_deref(), take.then_some(&*node), finalizer);
            let last_version = record.as_deref().map_or(0, |record| record.spec.last_version);
            if beside {
                granting.await?;
                let binding = bind(context, name, &bot, &node, last_version, restore);
                let (prepared, bound) = tokio::join!(preparing, binding);
                prepared?;
                bound?;
            } else {
                let (granted, bot) = tokio::join!(granting, preparing);
                let bot = bot?;
                granted?;
                bind(context, name, &bot, &node, last_version, restore).await?;
            }
            Ok(Next::Resync)
        }
        Plan::Keep { node, take, finalizer, claim } => {
            let bot = prepare(context, &bot, record.as_deref(), take.then_some(&*node), finalizer).await?;
            let news = match &claim {
                Claim::Unknown { reason, message } if !claimed(&bot) => Some((*reason, message.clone())),
                _ => None,
            };
            if let Some((_, words)) = &news
                && let Some(at) = context.world().claim_at(name, words, now, RECLAIM)
            {
                return Ok(Next::At(at));
            }
            let last_version = record.as_deref().map_or(0, |record| record.spec.last_version);
            let bound = |claim, orphaned| {
                let (node, bot_id) = (node.clone(), bot_id(&bot));
                Wanted::Bound { node, bot_id, claim, restored_from: None, last_version, orphaned }
            };
            let written = say(context, &bot, &bound(claim, false), "status").await?;
            if let (true, Some((reason, message))) = (written, news) {
                context.world().claimed(name, message.clone(), now);
                context.events.send(Note::warning(bot.object_ref(&()), reason, "Watch", message.clone(), message));
            }
            if let Some(cause) = Cause::awaited(&bot) {
                let ensured = snapshot::ensure(context, &bot, &cause).await?;
                // A namespace that is being deleted stays so. What was just written brings the bot back here.
                if (ensured, &cause, written) == (Ensured::NamespaceEnds, &Cause::Preserved, false) {
                    say(context, &bot, &bound(Claim::Keep, true), "leaving the layer on its node").await?;
                }
            }
            match record {
                Some(record) => snapshot::keep_policy(context, name, &bot, &record).await,
                None => Ok(Next::Resync),
            }
        }
        Plan::LetGo { release, lost } => {
            if let (Some(_), Some(node)) = (&lost, bound_to(&bot)) {
                ensure_lost(context, node).await?;
            }
            if let (true, Some(record)) = (release, record) {
                record::release(context, &record, bot.spec.deletion_policy).await?;
            }
            if let Some(why) = lost {
                let text = format!("{why}; the bot's writable layer and what only that node had of it are lost");
                context.events.send(Note::warning(
                    bot.object_ref(&()),
                    Reason::FinalizerReleased,
                    "Release",
                    text,
                    bot.uid().unwrap_or_default(),
                ));
            }
            finalizer::remove(context, &*bot, FINALIZER).await?;
            Ok(Next::Done)
        }
    }
}

/// Record and finalizer, side by side; gives the bot as it is after that.
async fn prepare(
    context: &Context,
    bot: &Arc<BotContainer>,
    record: Option<&BotRecord>,
    take: Option<&str>,
    finalize: bool,
) -> Result<Arc<BotContainer>, Error> {
    let holding = async {
        match take {
            Some(node) => record::take(context, bot, record, node).await,
            None => Ok(()),
        }
    };
    let finalizing = async {
        if !finalize {
            return Ok(bot.clone());
        }
        finalizer::add(context, &**bot, FINALIZER).await.map(|bot| context.keep(bot))
    };
    // Both to their end: neither is left half-done when the other fails.
    let (held, finalized) = tokio::join!(holding, finalizing);
    held?;
    finalized
}

async fn bind(
    context: &Context,
    name: &Name,
    bot: &BotContainer,
    node: &str,
    last_version: i64,
    restored_from: Option<RestoredFrom>,
) -> Result<(), Error> {
    let (bot_id, claim, orphaned) = (bot_id(bot), Claim::Keep, false);
    let wanted = Wanted::Bound { node: node.to_owned(), bot_id, claim, restored_from, last_version, orphaned };
    if say(context, bot, &wanted, "binding").await? {
        context.metrics.placed();
        tracing::info!(bot = %name, node, "bound");
        let text = format!("bound to node {node}");
        context.events.send(Note::normal(bot.object_ref(&()), Reason::Scheduled, "Bind", text, node.to_owned()));
    }
    Ok(())
}

/// Says in status what is wanted, if it does not say so already; whether it was written.
async fn say(context: &Context, bot: &BotContainer, wanted: &Wanted, step: &'static str) -> Result<bool, Error> {
    let Some(body) = patch(bot, wanted, &Time(Timestamp::now())) else { return Ok(false) };
    let api: Api<BotContainer> = Api::namespaced(context.client.clone(), &bot.namespace().unwrap_or_default());
    let (name, object) = (bot.name_any(), describe(bot));
    let written =
        context.write(step, &object, api.patch_status(&name, &super::apply_params(), &Patch::Apply(&body))).await?;
    context.keep(written);
    Ok(true)
}

async fn wait(
    context: &Context,
    name: &Name,
    bot: &BotContainer,
    reason: Reason,
    message: String,
    now: Instant,
) -> Result<Next, Error> {
    let status = bot.status.as_ref();
    let before = status.and_then(|s| find(&s.conditions, ConditionType::Scheduled));
    let news = before.is_none_or(|c| c.reason != reason.as_str());
    let same_spec = status.and_then(|s| s.observed_generation) == bot.metadata.generation;
    if !news
        && same_spec
        && before.is_some_and(|c| c.message != message)
        && let Some(at) = context.world().rephrase_at(name, now, REPHRASE)
    {
        return Ok(Next::At(at));
    }
    let wanted = Wanted::Pending { reason, message: message.clone() };
    if say(context, bot, &wanted, "status").await? {
        context.world().rephrased(name, now);
        if news {
            let once = format!("{reason} {}", bot.metadata.generation.unwrap_or(0));
            context.events.send(Note::warning(bot.object_ref(&()), reason, "Place", message, once));
        }
    }
    Ok(Next::Resync)
}

/// Before something is given up for lost the API server is asked itself: the caches may be behind.
async fn ensure_lost(context: &Context, node: &str) -> Result<(), Error> {
    const STEP: &str = "making sure of the loss";
    let leases: Api<Lease> = Api::namespaced(context.client.clone(), NODE_LEASE_NAMESPACE);
    let object = format!("Lease {NODE_LEASE_NAMESPACE}/{node}");
    if let Some(lease) = context.read(STEP, &object, leases.get_opt(node)).await? {
        let (wake, alive) = {
            let mut world = context.world();
            let wake = world.saw_lease(lease, false, Instant::now());
            (wake, world.is_alive(node, Instant::now()))
        };
        context.queue.add_all(wake, "live Lease");
        if alive {
            return Err(Error::StillThere { what: object });
        }
    }
    let nodes: Api<Node> = Api::all(context.client.clone());
    let object = format!("Node {node}");
    match context.read(STEP, &object, nodes.get_opt(node)).await? {
        Some(live) if !taints(&live) => Err(Error::StillThere { what: object }),
        _ => Ok(()),
    }
}

fn taints(node: &Node) -> bool {
    node.spec.iter().flat_map(|s| s.taints.iter().flatten()).any(|t| t.key == OUT_OF_SERVICE)
}

#[cfg(test)]
mod tests;
