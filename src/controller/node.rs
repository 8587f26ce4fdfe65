//! A node as the controller sees it: alive, lost or gone, and fit to take bots or not. The pure part is above, the
//! reconcile of a BotNode (its CIDR, its owner) below.
//!
//! Alive is judged as Kubernetes' node controller does: by when *we* saw the Lease's renewTime change, on our own
//! monotonic clock. Two clocks are never compared, so a clock that jumps loses no node. After a restart of the
//! controller each Lease has one full duration to be renewed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use crate::api::BotNode;
use crate::api::bot_node::Adoption;
use crate::api::condition::{Reason, chain};

use super::access;
use super::cidr::Block;
use super::error::Error;
use super::event::Note;
use super::place::{Candidate, allocatable};
use super::{Context, Key, Name, Next, snapshot};

/// Set by an administrator who has made sure that the node is off (KEP-2268).
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// What `Node.spec.unschedulable` counts as.
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// Of a Lease that does not say so itself.
const DEFAULT_DURATION: Duration = Duration::from_secs(40);

/// What we saw of a node's Lease.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    renewed: Option<Timestamp>,
    duration: Duration,
    /// When we saw `renewed` change, or first looked.
    seen: Instant,
    /// Whether a renewal came in before our eyes, so that the agent is known to have lived then.
    proven: bool,
}

impl Heartbeat {
    /// Of a node whose Lease we have not seen: it has one duration from now on.
    pub fn new(now: Instant) -> Self {
        Self { renewed: None, duration: DEFAULT_DURATION, seen: now, proven: false }
    }

    /// Takes in a Lease. `live`: it came by the watch, not by a list, so it was written just now.
    pub fn observe(&mut self, lease: &Lease, live: bool, now: Instant) {
        let spec = lease.spec.as_ref();
        let renewed = spec.and_then(|s| s.renew_time.as_ref()).map(|t| t.0);
        if let Some(seconds) = spec.and_then(|s| s.lease_duration_seconds) {
            self.duration = Duration::from_secs(u64::try_from(seconds).unwrap_or(0).clamp(1, 3600));
        }
        if renewed != self.renewed {
            // The first sight of an old Lease proves nothing; a change of what we knew does.
            self.proven = live || self.renewed.is_some();
            self.renewed = renewed;
            self.seen = now;
        }
    }

    /// The Lease is gone; how long it has been valid does not change by that.
    pub fn lease_deleted(&mut self) {
        self.renewed = None;
        self.proven = false;
    }

    /// From this instant on the node counts as lost.
    pub fn expires(&self) -> Instant {
        self.seen + self.duration
    }

    fn since(&self) -> String {
        match self.renewed {
            Some(at) => format!("its Lease was last renewed at {}", Time(at).0.strftime("%Y-%m-%dT%H:%M:%SZ")),
            None => "it has no Lease".to_owned(),
        }
    }

    /// Why the placement should not trust this heartbeat. `wall` is only ever used before the first renewal that we
    /// see: a Lease that looks old then gets no bots until it is renewed, at most one renewal later.
    fn doubt(&self, now: Instant, wall: Timestamp) -> Option<String> {
        let looks_old = || self.renewed.is_none_or(|at| wall.duration_since(at).unsigned_abs() > self.duration);
        (now >= self.expires() || self.renewed.is_none() || (!self.proven && looks_old())).then(|| self.since())
    }
}

/// How it is with the node of a bot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Its Lease is fresh.
    Alive,
    /// Its Lease ran out. What runs there is not known.
    Lost(String),
    /// It ran out, and an administrator said that it will not come back: what was only there is lost.
    Gone(String),
}

/// How it is with a node, from what is in the API and when its Lease was last renewed.
///
/// Gone needs both: the Lease ran out, and either the out-of-service taint, or no Node where there was one (the BotNode
/// names it as its owner, or went with it). An agent that lives is never overruled.
pub fn state(name: &str, bot_node: Option<&BotNode>, node: Option<&Node>, beat: &Heartbeat, now: Instant) -> NodeState {
    if now < beat.expires() {
        return NodeState::Alive;
    }
    let since = beat.since();
    let out_of_service = taints(node).iter().any(|t| t.key == OUT_OF_SERVICE);
    if out_of_service {
        return NodeState::Gone(format!("node {name} is out of service (taint {OUT_OF_SERVICE}); {since}"));
    }
    let had_node = bot_node.is_none_or(|b| b.owner_references().iter().any(|o| o.kind == "Node"));
    if node.is_none() && had_node {
        return NodeState::Gone(format!("node {name} was deleted; {since}"));
    }
    NodeState::Lost(format!("the agent of node {name} can't be reached: {since}"))
}

fn taints(node: Option<&Node>) -> &[Taint] {
    node.and_then(|n| n.spec.as_ref()).and_then(|s| s.taints.as_deref()).unwrap_or_default()
}

/// A node as the placement sees it.
pub fn candidate(
    bot_node: &BotNode,
    node: Option<&Node>,
    beat: Option<&Heartbeat>,
    now: Instant,
    wall: Timestamp,
) -> Candidate {
    let empty = Default::default();
    let status = bot_node.status.as_ref().unwrap_or(&empty);
    let ready = status.conditions.iter().find(|c| c.type_ == "Ready");
    let pressed = status.conditions.iter().any(|c| c.type_ == "DiskPressure" && c.status == "True");
    let not_ready = if bot_node.metadata.deletion_timestamp.is_some() {
        Some("its BotNode is being deleted".to_owned())
    } else {
        match (beat, ready) {
            (None, _) => Some("it has no Lease".to_owned()),
            (Some(beat), ready) => beat.doubt(now, wall).or_else(|| match ready {
                Some(c) if c.status == "True" => pressed.then(|| "DiskPressure is True".to_owned()),
                Some(c) => Some(format!("Ready is {}: {}", c.status, c.reason)),
                None => Some("its agent has not reported Ready".to_owned()),
            }),
        }
    };
    let mut taints = taints(node).to_vec();
    let unschedulable = node.and_then(|n| n.spec.as_ref()).and_then(|s| s.unschedulable).unwrap_or(false);
    if unschedulable && !taints.iter().any(|t| t.key == UNSCHEDULABLE) {
        taints.push(Taint { key: UNSCHEDULABLE.to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() });
    }
    Candidate {
        name: bot_node.name_any(),
        not_ready,
        cordoned: bot_node.spec.unschedulable || bot_node.spec.drain,
        labels: node.map_or_else(|| bot_node.labels().clone(), |n| n.labels().clone()),
        taints,
        handlers: status.runtime_handlers.iter().cloned().collect(),
        snapshotters: status.snapshotters.iter().cloned().collect(),
        allocatable: allocatable(&status.allocatable),
    }
}

/// The owner references that a BotNode should have, `None` where it has them.
fn owners(bot_node: &BotNode, node: Option<&Node>) -> Option<Vec<OwnerReference>> {
    let node = node?;
    let uid = node.uid()?;
    if bot_node.owner_references().iter().any(|o| o.kind == "Node" && o.uid == uid) {
        return None;
    }
    // A Node made again has another uid; the garbage collector would take the BotNode along with the old one.
    let mut all: Vec<_> = bot_node.owner_references().iter().filter(|o| o.kind != "Node").cloned().collect();
    all.push(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.name_any(),
        uid,
        ..OwnerReference::default()
    });
    Some(all)
}

/// Gives a BotNode its CIDR and its owner, and wakes the bots of a node whose state changed.
pub async fn reconcile(context: &Context, name: &str) -> Result<Next, Error> {
    let (bot_node, node, expires) = {
        let mut world = context.world();
        let (wake, expires) = world.look_at_node(name, Instant::now());
        context.queue.add_all(wake, "node state");
        // First of all: whatever fails below, a Lease that runs out is seen in time.
        if let Some(at) = expires {
            context.queue.add_at(Key::Node(name.to_owned()), at);
        }
        (world.bot_node(name), world.node(name), expires)
    };
    let Some(bot_node) = bot_node.filter(|b| b.metadata.deletion_timestamp.is_none()) else {
        return Ok(expires.map_or(Next::Done, Next::At));
    };
    let wanted_owners = owners(&bot_node, node.as_deref());
    if bot_node.spec.bot_cidr.is_none() || wanted_owners.is_some() {
        configure(context, name, bot_node.clone(), wanted_owners).await?;
    }
    adopt(context, &bot_node).await?;
    access::ensure_account(context, &bot_node).await?;
    Ok(expires.map_or(Next::Resync, Next::At))
}

/// Makes the snapshots that are to adopt what bots left on this node, and takes out the entries that are done: their layer is on no
/// list any more, since the agent made a version of it.
async fn adopt(context: &Context, bot_node: &BotNode) -> Result<(), Error> {
    let orphans = bot_node.status.as_ref().map(|status| status.orphans.as_slice()).unwrap_or_default();
    let (there, done): (Vec<&Adoption>, Vec<&Adoption>) =
        bot_node.spec.adopt.iter().partition(|entry| orphans.iter().any(|orphan| orphan.name == entry.orphan));
    let mut failed = Ok(());
    for Adoption { namespace, snapshot_name, orphan } in &there {
        let name = Name { namespace: namespace.clone(), name: snapshot_name.clone() };
        let Some(adopted) = context.world().adopted(&name) else { continue };
        if let Err(error) = snapshot::adopt(context, &name, &adopted).await {
            let note = format!("{orphan} can't become BotSnapshot {name}: {}", chain(&error));
            let reason = Reason::AdoptionFailed;
            context.events.send(Note::warning(bot_node.object_ref(&()), reason, "Adopt", note, name.to_string()));
            failed = failed.and(Err(error));
            continue;
        }
        context.queue.add_all([Key::Snapshot(name)], "adoption");
    }
    if done.is_empty() {
        return failed;
    }
    for Adoption { namespace, snapshot_name, orphan } in &done {
        let name = Name { namespace: namespace.clone(), name: snapshot_name.clone() };
        if !context.world().has_snapshot(&name) {
            let note =
                format!("{orphan} is not in status.orphans, so BotSnapshot {name} is not made; the entry is taken out");
            let (reason, once) = (Reason::AdoptionFailed, name.to_string());
            context.events.send(Note::warning(bot_node.object_ref(&()), reason, "Adopt", note, once));
        }
    }
    let api: Api<BotNode> = Api::all(context.client.clone());
    let (name, object) = (bot_node.name_any(), format!("BotNode {}", bot_node.name_any()));
    let metadata = json!({"uid": bot_node.uid(), "resourceVersion": bot_node.resource_version()});
    let body = json!({"metadata": metadata, "spec": {"adopt": there}});
    let (params, patch) = (super::merge_params(), kube::api::Patch::Merge(&body));
    let made = context.write("ending an adoption", &object, api.patch(&name, &params, &patch)).await?;
    let wake = context.world().saw_bot_node(made, Instant::now());
    context.queue.add_all(wake, "own write");
    failed
}

async fn configure(
    context: &Context,
    name: &str,
    bot_node: Arc<BotNode>,
    owners: Option<Vec<OwnerReference>>,
) -> Result<(), Error> {
    const STEP: &str = "configuration";
    let api: Api<BotNode> = Api::all(context.client.clone());
    let object = format!("BotNode {name}");
    // One at a time, and each from the live list: two nodes never get one block. A leader that was stopped between its
    // list and its write has lost the Lease by then, and `write` refuses.
    let _turn = context.cidrs.lock().await;
    let mut metadata = json!({"uid": bot_node.uid(), "resourceVersion": bot_node.resource_version()});
    if let Some(owners) = owners {
        metadata["ownerReferences"] = json!(owners);
    }
    let mut body = json!({"metadata": metadata});
    let mut given = None;
    if bot_node.spec.bot_cidr.is_none() {
        let all = context.read(STEP, &object, api.list(&ListParams::default())).await?;
        let taken: Vec<Block> =
            all.iter().filter_map(|n| n.spec.bot_cidr.as_deref()).filter_map(|text| text.parse().ok()).collect();
        match context.pool.assign(name, &taken) {
            Ok(block) => {
                body["spec"] = json!({"botCIDR": block.to_string()});
                given = Some(block);
            }
            Err(source) => {
                context.events.send(Note::warning(
                    bot_node.object_ref(&()),
                    Reason::CIDRExhausted,
                    "Configure",
                    source.to_string(),
                    bot_node.uid().unwrap_or_default(),
                ));
                return Err(Error::Exhausted { node: name.to_owned(), source });
            }
        }
    }
    let made =
        context.write(STEP, &object, api.patch(name, &super::merge_params(), &kube::api::Patch::Merge(&body))).await?;
    if let Some(block) = given {
        tracing::info!(node = name, cidr = %block, "BotNode got its CIDR");
        let once = made.uid().unwrap_or_default();
        context.events.send(Note::normal(
            made.object_ref(&()),
            Reason::CIDRAssigned,
            "Configure",
            format!("bots of {name} get addresses of {block}"),
            once,
        ));
    }
    let wake = context.world().saw_bot_node(made, Instant::now());
    context.queue.add_all(wake, "own write");
    Ok(())
}

#[cfg(test)]
mod tests;
