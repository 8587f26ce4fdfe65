//! The holder Pod of a node: while bots are bound to a node, one Pod there asks for what they ask for, all together. So the
//! scheduler and the autoscalers see what bots use, and whoever empties a node the usual way (`kubectl drain`, the eviction API)
//! comes upon it: its eviction is what drains the node of bots.
//!
//! ```text
//! bots come and go  ->  made, resized in place, removed
//! evicted           ->  BotNode.spec.drain: the agent stops the bots; the Pod ends when the agent says that all have stopped, or when its
//!                       grace is over
//! uncordoned        ->  the drain ends: bots start again, a new holder comes
//! ```
//!
//! It does nothing: `berth hold` waits, and on TERM for the agent's word, so that `kubectl drain` waits with it. (kubelet does not
//! cut short a stop that is under way, so nobody else could end it early.) The pure part is above.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PostParams};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use crate::api::condition::Reason;
use crate::api::{BotNode, CONTROLLER, NODES_NAMESPACE};

use super::error::Error;
use super::event::Note;
use super::place::Amount;
use super::quantity::{milli, units};
use super::{Context, Next, merge_params};

/// Labels of the Pods that the watch selects.
pub const SELECTOR: &str = "app.kubernetes.io/name=berth,app.kubernetes.io/component=holder";

/// The grace of deletions that are ours: no bot is left to be waited for. Seconds.
const GRACE: u32 = 1;

/// How long changes are gathered before the Pod is resized: every start of a bot would be another write.
const GATHER: Duration = Duration::from_secs(2);

/// How long a node is left alone whose kubelet refused the Pod.
const REFUSED: Duration = Duration::from_secs(60);

/// How holders are made; without it there are none.
#[derive(Clone, Debug)]
pub struct Holders {
    /// The image, which must have `/berth`.
    pub image: String,
    /// A PriorityClass; empty for none.
    pub priority_class: String,
    /// How long bots may take to stop in a drain. Seconds.
    pub drain_seconds: i64,
    /// Where agents serve /drained.
    pub agent_port: u16,
    /// A cordon drains as well.
    pub on_cordon: bool,
}

/// A holder as it was last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What it asks for.
    pub asks: Amount,
    /// Being deleted.
    pub ends: bool,
    /// By an eviction, preemption or taint (condition DisruptionTarget), not by a plain deletion or with its namespace.
    pub disrupted: bool,
    /// kubelet refused it, or it ended: why.
    pub failed: Option<String>,
}

impl Seen {
    /// Of a Pod.
    pub fn of(pod: &Pod) -> Self {
        let asked = pod.spec.as_ref().and_then(|spec| spec.containers.first()?.resources.as_ref()?.requests.as_ref());
        let quantity = |key: &str| asked.and_then(|asked| asked.get(key));
        let asks = Amount {
            cpu_milli: quantity("cpu").and_then(|cpu| milli(cpu).ok()).unwrap_or(0),
            memory: quantity("memory").and_then(|memory| units(memory).ok()).unwrap_or(0),
            bots: 0,
        };
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
        let over = matches!(phase, "Failed" | "Succeeded").then(|| {
            let status = pod.status.as_ref();
            let said = |text: Option<&String>| text.cloned().unwrap_or_default();
            format!(
                "{} {}",
                said(status.and_then(|s| s.reason.as_ref())),
                said(status.and_then(|s| s.message.as_ref()))
            )
        });
        let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let disrupted = conditions.any(|c| c.type_ == "DisruptionTarget" && c.status == "True");
        Self { asks, ends: pod.metadata.deletion_timestamp.is_some(), disrupted, failed: over }
    }

    /// Whether somebody wants its node empty.
    fn is_evicted(&self) -> bool {
        self.ends && self.disrupted
    }
}

/// What is decided from.
#[derive(Clone, Debug)]
pub struct View {
    /// What bots on the node ask for; `None` without bots.
    pub wanted: Option<Amount>,
    /// The Pod.
    pub holder: Option<Seen>,
    /// There is a Node, so maybe a kubelet.
    pub has_node: bool,
    /// `Node.spec.unschedulable`.
    pub cordoned: bool,
    /// `BotNode.spec.drain`.
    pub drain: bool,
}

/// What to do. Each is safe to be cut off anywhere and decided again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing.
    Rest,
    /// Make the Pod.
    Create(Amount),
    /// Ask for this from now on.
    Resize(Amount),
    /// Remove it.
    Remove,
    /// Remove what kubelet refused, and try again later.
    Replace,
    /// Begin or end the drain.
    Drain(bool),
}

/// See the module.
pub fn decide(view: &View, on_cordon: bool) -> Plan {
    let View { wanted, holder, has_node, cordoned, drain } = view;
    let there = holder.as_ref().filter(|holder| !holder.ends);
    if !has_node {
        return if there.is_some() { Plan::Remove } else { Plan::Rest };
    }
    let evicted = holder.as_ref().is_some_and(Seen::is_evicted);
    if *drain {
        return match holder {
            Some(holder) if !(holder.ends || *cordoned && on_cordon) => Plan::Drain(false),
            None if !cordoned => Plan::Drain(false),
            _ => Plan::Rest,
        };
    }
    match (wanted, holder) {
        // Also when the last bot went in between: the Pod ends by the word that the node is drained.
        _ if evicted => Plan::Drain(true),
        (Some(_), _) if *cordoned && on_cordon => Plan::Drain(true),
        (None, _) if there.is_some() => Plan::Remove,
        (Some(wanted), None) => Plan::Create(*wanted),
        (Some(_), Some(Seen { failed: Some(_), ends: false, .. })) => Plan::Replace,
        (Some(wanted), Some(seen)) if !seen.ends && seen.asks != rounded(*wanted) => Plan::Resize(*wanted),
        _ => Plan::Rest,
    }
}

/// What the Pod asks for: never nothing, since a Pod that asks for nothing is the first to be evicted.
fn rounded(amount: Amount) -> Amount {
    Amount { cpu_milli: amount.cpu_milli.max(1), memory: amount.memory.max(4 << 20), bots: 0 }
}

fn requests(amount: Amount) -> serde_json::Value {
    let Amount { cpu_milli, memory, .. } = rounded(amount);
    json!({"cpu": format!("{cpu_milli}m"), "memory": memory.to_string()})
}

fn pod(bot_node: &BotNode, holders: &Holders, amount: Amount) -> serde_json::Value {
    let node = bot_node.name_any();
    let addresses = bot_node.status.iter().flat_map(|status| &status.addresses);
    let ip = addresses.filter(|address| address.type_ == "InternalIP").find_map(|address| address.address.parse().ok());
    let agent = ip.map(|ip: IpAddr| SocketAddr::new(ip, holders.agent_port).to_string());
    let arguments: Vec<String> = ["hold".to_owned()].into_iter().chain(agent).collect();
    let forever = |key: &str| json!({"key": key, "operator": "Exists", "effect": "NoExecute"});
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": node, "namespace": NODES_NAMESPACE,
            // `kubectl drain` evicts what has a controller, and asks for --force for what has none.
            "ownerReferences": [{
                "apiVersion": BotNode::api_version(&()), "kind": BotNode::kind(&()), "name": node, "uid": bot_node.uid(), "controller": true,
            }],
            "labels": {"app.kubernetes.io/name": "berth", "app.kubernetes.io/component": "holder", "app.kubernetes.io/managed-by": CONTROLLER},
            "annotations": {
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
                "berth.dev/what": "holds, for the scheduler, what the bots of this node ask for; evicting it drains the node of bots",
            },
        },
        "spec": {
            "nodeName": node,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": holders.drain_seconds,
            // A node that is away for a while is no drain; any other taint that evicts is one.
            "tolerations": [forever("node.kubernetes.io/not-ready"), forever("node.kubernetes.io/unreachable")],
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "hold", "image": holders.image, "args": arguments,
                "resources": {"requests": requests(amount)},
                "resizePolicy": [{"resourceName": "cpu", "restartPolicy": "NotRequired"}, {"resourceName": "memory", "restartPolicy": "NotRequired"}],
                "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    });
    if !holders.priority_class.is_empty() {
        pod["spec"]["priorityClassName"] = json!(holders.priority_class);
    }
    pod
}

/// Fetch, decide, do.
pub async fn reconcile(context: &Context, node: &str) -> Result<Next, Error> {
    let Some(holders) = &context.holders else { return Ok(Next::Done) };
    let Some((view, bot_node)) = context.world().holder_view(node) else { return Ok(Next::Done) };
    let plan = decide(&view, holders.on_cordon);
    let api: Api<Pod> = Api::namespaced(context.client.clone(), NODES_NAMESPACE);
    let object = format!("Pod {NODES_NAMESPACE}/{node}");
    if plan != Plan::Rest {
        tracing::debug!(node, ?plan, "holder decided");
    }
    match plan {
        Plan::Rest => return Ok(Next::Resync),
        Plan::Create(amount) => {
            if let Some(at) = context.world().holder_again_at(node, Instant::now()) {
                return Ok(Next::At(at));
            }
            let made = serde_json::from_value(pod(&bot_node, holders, amount))
                .map_err(|error| Error::call("making", &*object, kube::Error::SerdeError(error)))?;
            match context.write("making", &object, api.create(&PostParams::default(), &made)).await {
                // Made before, by us or a leader before us.
                Err(error) if error.is_there_already() => {}
                done => drop(context.world().saw_holder(node, Seen::of(&done?))),
            }
        }
        Plan::Resize(amount) => {
            if let Some(at) = context.world().holder_resize_at(node, Instant::now(), GATHER) {
                return Ok(Next::At(at));
            }
            let body = json!({"spec": {"containers": [{"name": "hold", "resources": {"requests": requests(amount)}}]}});
            let (params, body) = (merge_params(), Patch::Strategic(&body));
            let resized = api.patch_subresource("resize", node, &params, &body);
            let resized = context.write("resizing", &object, resized).await?;
            context.world().saw_holder(node, Seen::of(&resized));
        }
        Plan::Remove => remove(context, &api, node, &object).await?,
        Plan::Replace => {
            let why = view.holder.and_then(|holder| holder.failed).unwrap_or_default();
            let text = format!(
                "the node's holder Pod does not stay, so the scheduler does not see what bots use: {}",
                why.trim()
            );
            context.metrics.holder_refused();
            context.events.send(Note::warning(bot_node.object_ref(&()), Reason::HolderRefused, "Hold", text, why));
            context.world().holder_failed(node, Instant::now() + REFUSED);
            remove(context, &api, node, &object).await?;
        }
        Plan::Drain(drain) => {
            let nodes: Api<BotNode> = Api::all(context.client.clone());
            let metadata = json!({"uid": bot_node.uid(), "resourceVersion": bot_node.resource_version()});
            let body = json!({"metadata": metadata, "spec": {"drain": drain}});
            let object = format!("BotNode {node}");
            let (params, body) = (merge_params(), Patch::Merge(&body));
            let written = nodes.patch(node, &params, &body);
            let written = context.write("drain", &object, written).await?;
            let text = if drain {
                "the node's holder Pod was evicted or the node cordoned: its bots are stopped, and none is placed here"
            } else {
                "the node is in use again: its bots are started"
            };
            tracing::info!(node, drain, "{text}");
            let once = written.resource_version().unwrap_or_default();
            context.events.send(Note::normal(
                written.object_ref(&()),
                Reason::NodeDraining,
                "Drain",
                text.to_owned(),
                once,
            ));
            let wake = context.world().saw_bot_node(written, Instant::now());
            context.queue.add_all(wake, "own write");
        }
    }
    Ok(Next::Resync)
}

async fn remove(context: &Context, api: &Api<Pod>, node: &str, object: &str) -> Result<(), Error> {
    let params = DeleteParams { grace_period_seconds: Some(GRACE), ..DeleteParams::default() };
    match context.write("removing", object, api.delete(node, &params)).await {
        Err(error) if error.is_gone() => Ok(()),
        done => done.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(cpu_milli: i128, memory: i128) -> Amount {
        Amount { cpu_milli, memory, bots: 0 }
    }

    fn view(wanted: Option<Amount>, holder: Option<Seen>) -> View {
        View { wanted, holder, has_node: true, cordoned: false, drain: false }
    }

    fn seen(asks: Amount) -> Seen {
        Seen { asks, ends: false, disrupted: false, failed: None }
    }

    fn ending(disrupted: bool) -> Seen {
        Seen { ends: true, disrupted, ..seen(amount(100, 64 << 20)) }
    }

    #[test]
    fn every_row_of_the_table() {
        let some = amount(100, 64 << 20);
        let (bots, none) = (Some(some), None);
        let drained = |holder, cordoned| View { drain: true, cordoned, ..view(bots, holder) };
        let rows = [
            ("no bots, no holder", view(none, None), Plan::Rest),
            ("the first bot", view(bots, None), Plan::Create(some)),
            ("as it should be", view(bots, Some(seen(some))), Plan::Rest),
            ("another bot", view(bots, Some(seen(amount(50, 1 << 20)))), Plan::Resize(some)),
            ("the last bot went", view(none, Some(seen(some))), Plan::Remove),
            ("and its Pod goes", view(none, Some(ending(false))), Plan::Rest),
            ("a bot came while our own removal is under way", view(bots, Some(ending(false))), Plan::Rest),
            ("deleted by hand, or with its namespace", view(bots, Some(ending(false))), Plan::Rest),
            ("evicted", view(bots, Some(ending(true))), Plan::Drain(true)),
            ("evicted with no bots left", view(none, Some(ending(true))), Plan::Drain(true)),
            ("draining", drained(Some(ending(true)), true), Plan::Rest),
            ("drained and cordoned", drained(None, true), Plan::Rest),
            ("uncordoned while it drains", drained(Some(ending(true)), false), Plan::Rest),
            ("uncordoned", drained(None, false), Plan::Drain(false)),
            (
                "refused by kubelet",
                view(bots, Some(Seen { failed: Some("OutOfcpu".into()), ..seen(some) })),
                Plan::Replace,
            ),
            ("no Node", View { has_node: false, ..view(bots, None) }, Plan::Rest),
            ("the Node went", View { has_node: false, ..view(bots, Some(seen(some))) }, Plan::Remove),
            ("cordoned alone", View { cordoned: true, ..view(bots, Some(seen(some))) }, Plan::Rest),
        ];
        for (what, view, plan) in rows {
            assert_eq!(decide(&view, false), plan, "{what}");
        }
        let cordoned = View { cordoned: true, ..view(bots, Some(seen(some))) };
        assert_eq!(decide(&cordoned, true), Plan::Drain(true));
        let stays = View { drain: true, ..cordoned };
        assert_eq!(decide(&stays, true), Plan::Rest);
        assert_eq!(decide(&View { cordoned: false, ..stays }, true), Plan::Drain(false));
    }

    #[test]
    fn a_pod_says_what_it_was_made_of() {
        let holders = Holders {
            image: "berth".into(),
            priority_class: String::new(),
            drain_seconds: 60,
            agent_port: 10470,
            on_cordon: false,
        };
        for wanted in [amount(0, 0), amount(1500, 3 << 30)] {
            let made: Pod =
                serde_json::from_value(pod(&BotNode::new("node-1", Default::default()), &holders, wanted)).unwrap();
            assert_eq!(Seen::of(&made), seen(rounded(wanted)));
        }
    }
}
