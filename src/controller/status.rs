//! What the controller applies to a bot's `/status`. Pure: `patch(old, wanted, now)`, no difference, no write.
//!
//! ```text
//! unbound   phase Pending, observedGeneration, Ready=False, Scheduled=False, Reconciling=True
//! bound     nodeName, botId, Scheduled=True                       the rest is the agent's, which force-applies
//! node lost nodeName, botId, Scheduled=True, and phase, Ready, Running as Unknown, until the agent owns them again
//! ```
//!
//! Server-side apply takes away what its manager applied before and leaves out now. Of a list-map entry that one manager
//! took by force and then left out, what the other still owns is a torso without its required fields, and every apply
//! that would leave it so is refused (422; seen on Kubernetes 1.37). Hence `Claim::Keep`: each claim of ours that still
//! stands is repeated, and one that the agent has overwritten is left out, for then the agent owns it whole.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::ResourceExt as _;
use serde_json::{Value, json};

use crate::api::bot_container::{Phase, RestoredFrom};
use crate::api::condition::{ConditionType, Reason, condition, find};
use crate::api::{BotContainer, BotContainerStatus};

/// What the controller says of a bot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Not placed, and why.
    Pending {
        /// Unschedulable, BotIdInUse …
        reason: Reason,
        /// For people.
        message: String,
    },
    /// Bound to a node.
    Bound {
        /// The node.
        node: String,
        /// The botId in force.
        bot_id: String,
        /// What is said in the agent's place.
        claim: Claim,
        /// The version that it starts from, where this is decided now; what was decided stays.
        restored_from: Option<RestoredFrom>,
        /// The highest version number given; 0 for none.
        last_version: i64,
        /// Whether its layer is to stay on the node without an object; what was decided stays.
        orphaned: bool,
    },
}

/// What the controller says in the agent's place of a bound bot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Nothing new. What was claimed and not yet taken back by the agent stands.
    Keep,
    /// Nobody knows how it is with the bot: phase, Ready and Running are Unknown.
    Unknown {
        /// NodeUnreachable or NodeGone.
        reason: Reason,
        /// Names the node and since when.
        message: String,
    },
}

/// Whether a condition is one that the controller put in the agent's place.
fn is_claim(condition: &Condition) -> bool {
    condition.status == "Unknown"
        && matches!(Reason::parse(&condition.reason), Some(Reason::NodeUnreachable | Reason::NodeGone))
}

/// Whether anything of a claim of ours still stands: the agent has not taken all of it back.
pub fn claimed(bot: &BotContainer) -> bool {
    let Some(status) = &bot.status else { return false };
    status.phase == Some(Phase::Unknown) || status.conditions.iter().any(is_claim)
}

/// The body of the server-side apply that makes `old`'s status say what is wanted; `None` where it does already, times
/// aside. It carries `old`'s uid and resourceVersion: what was computed from an older state is refused.
pub fn patch(old: &BotContainer, wanted: &Wanted, now: &Time) -> Option<Value> {
    let empty = BotContainerStatus::default();
    let live = old.status.as_ref().unwrap_or(&empty);
    let ours = ours(old, live, wanted, now);
    let same = |c: &Condition| {
        find_str(&live.conditions, &c.type_)
            .is_some_and(|l| l.status == c.status && l.reason == c.reason && l.message == c.message)
    };
    let settled = holds(&ours.phase, &live.phase)
        && holds(&ours.node_name, &live.node_name)
        && holds(&ours.bot_id, &live.bot_id)
        && holds(&ours.restored_from, &live.restored_from)
        && holds(&ours.last_version, &live.last_version)
        && holds(&ours.orphaned, &live.orphaned)
        && holds(&ours.observed_generation, &live.observed_generation)
        && ours.conditions.iter().all(same);
    if settled {
        return None;
    }
    Some(json!({
        "apiVersion": "berth.dev/v1alpha1",
        "kind": "BotContainer",
        "metadata": {
            "name": old.name_any(),
            "namespace": old.namespace(),
            "uid": old.uid(),
            "resourceVersion": old.resource_version(),
        },
        "status": ours,
    }))
}

fn holds<T: PartialEq>(ours: &Option<T>, live: &Option<T>) -> bool {
    ours.is_none() || ours == live
}

fn find_str<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == type_)
}

/// All that the controller owns of the status.
fn ours(old: &BotContainer, live: &BotContainerStatus, wanted: &Wanted, now: &Time) -> BotContainerStatus {
    let make = |type_, status, reason, message: &str| {
        let mut made = condition(type_, status, reason, message, now.clone());
        if let Some(before) = find(&live.conditions, type_).filter(|c| c.status == made.status) {
            made.last_transition_time = before.last_transition_time.clone();
        }
        made
    };
    match wanted {
        Wanted::Pending { reason, message } => BotContainerStatus {
            phase: Some(Phase::Pending),
            observed_generation: old.metadata.generation,
            conditions: vec![
                make(ConditionType::Ready, Some(false), *reason, message),
                make(ConditionType::Scheduled, Some(false), *reason, message),
                make(ConditionType::Reconciling, Some(true), *reason, message),
            ],
            ..BotContainerStatus::default()
        },
        Wanted::Bound { node, bot_id, claim, restored_from, last_version, orphaned } => {
            let mut status = BotContainerStatus {
                node_name: Some(node.clone()),
                bot_id: Some(bot_id.clone()),
                restored_from: live.restored_from.clone().or_else(|| restored_from.clone()),
                orphaned: live.orphaned.or(orphaned.then_some(true)),
                // It never decreases, whatever a cache says.
                last_version: live.last_version.max(Some(*last_version).filter(|version| *version > 0)),
                conditions: vec![make(
                    ConditionType::Scheduled,
                    Some(true),
                    Reason::Scheduled,
                    &format!("bound to {node}"),
                )],
                ..BotContainerStatus::default()
            };
            match claim {
                Claim::Unknown { reason, message } => {
                    status.phase = Some(Phase::Unknown);
                    for type_ in [ConditionType::Ready, ConditionType::Running] {
                        status.conditions.push(make(type_, None, *reason, message));
                    }
                }
                Claim::Keep => {
                    status.phase = live.phase.filter(|p| *p == Phase::Unknown);
                    for type_ in [ConditionType::Ready, ConditionType::Running] {
                        status.conditions.extend(find(&live.conditions, type_).filter(|c| is_claim(c)).cloned());
                    }
                }
            }
            status
        }
    }
}

#[cfg(test)]
mod tests;
