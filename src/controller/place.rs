//! Which node a bot goes to. Pure: no client, no clock; every tie has an order.
//!
//! ```text
//! BotContainer + RuntimeClass ── Ask::new ──> Ask ─┐
//! BotNode + Node + Lease ───────> Candidate ───────┼── place ──> node, or for each node why not
//! what is bound or reserved ────> Load ────────────┘
//! ```
//!
//! Hard rules first (the first that fails is the node's reason), then the fewest untolerated `PreferNoSchedule` taints,
//! then the least loaded after the bot is there (its fullest resource counts), then the fewest bots, then the name.
//! Where it errs: it looks at one bot at a time, so a large bot may wait while small ones fill the gaps, as with Pods.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use k8s_openapi::api::core::v1::{Taint, Toleration};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::api::{BotContainer, BotContainerSpec};

use super::quantity::{NotAQuantity, milli, show_bytes, show_cpu, units};

/// What a bot asks for, or a node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Thousandths of a processor.
    pub cpu_milli: i128,
    /// Bytes.
    pub memory: i128,
    /// Bots.
    pub bots: i128,
}

impl std::ops::AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.cpu_milli += other.cpu_milli;
        self.memory += other.memory;
        self.bots += other.bots;
    }
}

impl std::ops::SubAssign for Amount {
    fn sub_assign(&mut self, other: Self) {
        self.cpu_milli -= other.cpu_milli;
        self.memory -= other.memory;
        self.bots -= other.bots;
    }
}

/// What is bound to or reserved on each node, by its name.
pub type Load = HashMap<String, Amount>;

/// A quantity of an object that can't be counted, with its field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {source}")]
pub struct BadAmount {
    field: String,
    source: NotAQuantity,
}

fn amount_of(
    map: &BTreeMap<String, Quantity>,
    key: &str,
    field: &str,
    count: fn(&Quantity) -> Result<i128, NotAQuantity>,
) -> Result<Option<i128>, BadAmount> {
    match map.get(key) {
        None => Ok(None),
        Some(q) => count(q).map(Some).map_err(|source| BadAmount { field: format!("{field}.{key}"), source }),
    }
}

/// What a bot takes of its node: requests, each defaulting to its limit as in a Pod, and one of the node's bots.
pub fn requests(spec: &BotContainerSpec) -> Result<Amount, BadAmount> {
    let none = BTreeMap::new();
    let (requests, limits) = spec.resources.as_ref().map_or((&none, &none), |r| (&r.requests, &r.limits));
    let one = |key, count| match amount_of(requests, key, "spec.resources.requests", count)? {
        Some(asked) => Ok(asked),
        None => Ok(amount_of(limits, key, "spec.resources.limits", count)?.unwrap_or(0)),
    };
    Ok(Amount { cpu_milli: one("cpu", milli)?, memory: one("memory", units)?, bots: 1 })
}

/// What a node may give out. What it does not name it does not have, as with Pods.
pub fn allocatable(of: &BTreeMap<String, Quantity>) -> Result<Amount, BadAmount> {
    const FIELD: &str = "status.allocatable";
    Ok(Amount {
        cpu_milli: amount_of(of, "cpu", FIELD, milli)?.unwrap_or(0),
        memory: amount_of(of, "memory", FIELD, units)?.unwrap_or(0),
        bots: amount_of(of, "bots", FIELD, units)?.unwrap_or(0),
    })
}

/// A node as the placement sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Why it takes no bots now, if so: no Lease, condition Ready not True …
    pub not_ready: Option<String>,
    /// BotNode.spec.unschedulable. No toleration helps.
    pub cordoned: bool,
    /// Of the Node of the same name where there is one, else of the BotNode.
    pub labels: BTreeMap<String, String>,
    /// Of the Node of the same name; `Node.spec.unschedulable` counts as its taint.
    pub taints: Vec<Taint>,
    /// RuntimeClass handlers.
    pub handlers: BTreeSet<String>,
    /// containerd's snapshotters.
    pub snapshotters: BTreeSet<String>,
    /// What it may give out in all.
    pub allocatable: Result<Amount, BadAmount>,
}

/// What a bot asks of a node; made once, then nothing about it can be wrong.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ask {
    node_name: Option<String>,
    selector: BTreeMap<String, String>,
    class_selector: BTreeMap<String, String>,
    tolerations: Vec<Toleration>,
    handler: Option<String>,
    snapshotter: Option<String>,
    amount: Amount,
}

/// Why a bot fits no node whatever the nodes are like.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unplaceable {
    /// A quantity of the spec can't be counted.
    #[error(transparent)]
    Amount(#[from] BadAmount),
    /// The RuntimeClass that it names is not there.
    #[error("there is no RuntimeClass {name}; create it or correct spec.runtimeClassName")]
    NoRuntimeClass {
        /// The name in the spec.
        name: String,
    },
}

impl Ask {
    /// `class` is the RuntimeClass that the spec names, `None` where it names none or there is none of that name.
    /// Its overhead counts, its scheduling rules are added to the bot's own (KEP-585, KEP-688).
    pub fn new(bot: &BotContainer, class: Option<&RuntimeClass>) -> Result<Self, Unplaceable> {
        let spec = &bot.spec;
        let mut ask = Self {
            node_name: spec.node_name.clone(),
            selector: spec.node_selector.clone(),
            tolerations: spec.tolerations.clone(),
            snapshotter: spec.snapshotter.clone(),
            amount: requests(spec)?,
            ..Self::default()
        };
        match (&spec.runtime_class_name, class) {
            (None, _) => {}
            (Some(name), None) => return Err(Unplaceable::NoRuntimeClass { name: name.clone() }),
            (Some(_), Some(class)) => {
                ask.handler = Some(class.handler.clone());
                if let Some(scheduling) = &class.scheduling {
                    ask.class_selector = scheduling.node_selector.clone().unwrap_or_default();
                    ask.tolerations.extend(scheduling.tolerations.clone().unwrap_or_default());
                }
                if let Some(fixed) = class.overhead.as_ref().and_then(|o| o.pod_fixed.as_ref()) {
                    const FIELD: &str = "RuntimeClass overhead.podFixed";
                    ask.amount.cpu_milli += amount_of(fixed, "cpu", FIELD, milli)?.unwrap_or(0);
                    ask.amount.memory += amount_of(fixed, "memory", FIELD, units)?.unwrap_or(0);
                }
            }
        }
        Ok(ask)
    }

    /// The same bot, but for this node only: it has its layer.
    pub fn only_on(mut self, node: &str) -> Self {
        self.node_name = Some(node.to_owned());
        self
    }

    /// What it takes of its node.
    pub fn amount(&self) -> Amount {
        self.amount
    }
}

/// Why a bot can't go to a node. The text is stable: the same state gives the same words.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum WhyNot {
    NotReady(String),
    Cordoned,
    OtherNodeAsked { wanted: String },
    Label { key: String, wanted: String, has: Option<String> },
    Taint { key: String, value: String, effect: String },
    NoHandler { handler: String },
    NoSnapshotter { snapshotter: String, has: Vec<String> },
    Unreadable(String),
    Cpu { asks: i128, free: i128 },
    Memory { asks: i128, free: i128 },
    Bots { limit: i128 },
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReady(why) => write!(f, "not ready ({why})"),
            Self::Cordoned => f.write_str("BotNode is unschedulable"),
            Self::OtherNodeAsked { wanted } => write!(f, "not the node asked for ({wanted})"),
            Self::Label { key, wanted, has: Some(has) } => write!(f, "label {key}={has} (asks {wanted})"),
            Self::Label { key, wanted, has: None } => write!(f, "no label {key} (asks {wanted})"),
            Self::Taint { key, value, effect } if value.is_empty() => write!(f, "taint {key}:{effect}"),
            Self::Taint { key, value, effect } => write!(f, "taint {key}={value}:{effect}"),
            Self::NoHandler { handler } => write!(f, "no runtime handler {handler}"),
            Self::NoSnapshotter { snapshotter, has } => {
                write!(f, "no snapshotter {snapshotter} (has {})", has.join(", "))
            }
            Self::Unreadable(why) => write!(f, "its {why}"),
            Self::Cpu { asks, free } => {
                write!(f, "insufficient cpu (asks {}, free {})", show_cpu(*asks), show_cpu(*free))
            }
            Self::Memory { asks, free } => {
                write!(f, "insufficient memory (asks {}, free {})", show_bytes(*asks, true), show_bytes(*free, false))
            }
            Self::Bots { limit } => write!(f, "full (takes {limit} bots)"),
        }
    }
}

/// The node for a bot, or for each node, by name, why not.
pub fn place<'a>(
    ask: &Ask,
    nodes: impl IntoIterator<Item = &'a Candidate>,
    load: &Load,
) -> Result<String, Vec<(String, WhyNot)>> {
    let mut best: Option<(Rank<'_>, &Candidate)> = None;
    let mut refusals = Vec::new();
    for node in nodes {
        let used = load.get(&node.name).copied().unwrap_or_default();
        match fits(ask, node, used) {
            Err(why) => refusals.push((node.name.clone(), why)),
            Ok(rank) => {
                if best.as_ref().is_none_or(|(least, _)| rank < *least) {
                    best = Some((rank, node));
                }
            }
        }
    }
    match best {
        Some((_, node)) => Ok(node.name.clone()),
        None => {
            refusals.sort_by(|a, b| a.0.cmp(&b.0));
            Err(refusals)
        }
    }
}

/// The smaller the better, in this order.
type Rank<'a> = (usize, i128, i128, &'a str);

fn fits<'a>(ask: &Ask, node: &'a Candidate, used: Amount) -> Result<Rank<'a>, WhyNot> {
    if let Some(wanted) = ask.node_name.as_ref().filter(|wanted| **wanted != node.name) {
        return Err(WhyNot::OtherNodeAsked { wanted: wanted.clone() });
    }
    if let Some(why) = &node.not_ready {
        return Err(WhyNot::NotReady(why.clone()));
    }
    if node.cordoned {
        return Err(WhyNot::Cordoned);
    }
    for (key, wanted) in ask.selector.iter().chain(&ask.class_selector) {
        let has = node.labels.get(key);
        if has != Some(wanted) {
            return Err(WhyNot::Label { key: key.clone(), wanted: wanted.clone(), has: has.cloned() });
        }
    }
    let mut disliked = 0;
    for taint in node.taints.iter().filter(|t| !ask.tolerations.iter().any(|toleration| tolerates(toleration, t))) {
        match taint.effect.as_str() {
            "PreferNoSchedule" => disliked += 1,
            // An effect that we do not know keeps bots away rather than letting them in.
            _ => {
                return Err(WhyNot::Taint {
                    key: taint.key.clone(),
                    value: taint.value.clone().unwrap_or_default(),
                    effect: taint.effect.clone(),
                });
            }
        }
    }
    if let Some(handler) = ask.handler.as_ref().filter(|h| !node.handlers.contains(*h)) {
        return Err(WhyNot::NoHandler { handler: handler.clone() });
    }
    if let Some(snapshotter) = ask.snapshotter.as_ref().filter(|s| !node.snapshotters.contains(*s)) {
        let has = node.snapshotters.iter().cloned().collect();
        return Err(WhyNot::NoSnapshotter { snapshotter: snapshotter.clone(), has });
    }
    let has = node.allocatable.as_ref().map_err(|bad| WhyNot::Unreadable(bad.to_string()))?;
    let asks = ask.amount;
    // What was bound before a node shrank may be more than it has: free is never said to be less than nothing.
    let free = |has: i128, used: i128| (has - used).max(0);
    if used.bots + asks.bots > has.bots {
        return Err(WhyNot::Bots { limit: has.bots });
    }
    if asks.cpu_milli > free(has.cpu_milli, used.cpu_milli) {
        return Err(WhyNot::Cpu { asks: asks.cpu_milli, free: free(has.cpu_milli, used.cpu_milli) });
    }
    if asks.memory > free(has.memory, used.memory) {
        return Err(WhyNot::Memory { asks: asks.memory, free: free(has.memory, used.memory) });
    }
    // Parts in a million, so that the order is total and exact for any machine.
    let share = |has: i128, used: i128| if has > 0 { used.saturating_mul(1_000_000) / has } else { 0 };
    let fullest = share(has.cpu_milli, used.cpu_milli + asks.cpu_milli)
        .max(share(has.memory, used.memory + asks.memory))
        .max(share(has.bots, used.bots + asks.bots));
    Ok((disliked, fullest, used.bots, &node.name))
}

/// As Kubernetes' `Toleration.ToleratesTaint`, without the alpha operators `Lt` and `Gt` (KEP-5471): what we can't judge
/// is not tolerated.
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let empty = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
    if !empty(&toleration.effect) && toleration.effect.as_deref() != Some(&taint.effect) {
        return false;
    }
    if !empty(&toleration.key) && toleration.key.as_deref() != Some(&taint.key) {
        return false;
    }
    match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => {
            !empty(&toleration.key)
                && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        Some(_) => false,
    }
}

/// The message of a bot that fits nowhere: `0/2 nodes fit: node-1: insufficient memory (asks 2Gi, free 1Gi); …`.
pub fn explain(refusals: &[(String, WhyNot)], ask: &Ask) -> String {
    use fmt::Write as _;
    let mut text = match &ask.node_name {
        // All others refuse for the same reason; only that node's own is news.
        Some(wanted) => match refusals.iter().find(|(name, _)| name == wanted) {
            Some((name, why)) => return format!("{name}, the only node that may take it: {why}"),
            None => return format!("there is no BotNode {wanted}, the only node that may take it"),
        },
        None if refusals.is_empty() => return "there is no BotNode yet: no agent runs in this cluster".to_owned(),
        None => format!("0/{} nodes fit: ", refusals.len()),
    };
    for (i, (name, why)) in refusals.iter().enumerate() {
        let _ = write!(text, "{}{name}: {why}", if i == 0 { "" } else { "; " });
        if text.len() > crate::api::condition::MAX_MESSAGE {
            break;
        }
    }
    text
}

#[cfg(test)]
mod tests;
