//! What the controller knows: the objects as last seen, by a watch or in the answer to its own write, and what follows
//! from them (which bot sits where, what each node carries). No IO; time is an argument. Here are bots and what is asked of all;
//! a file each have the other kinds: `records`, `nodes`, `holders`, `grants`, and `rows` for the mirror.
//!
//! An object replaces an older one of the same uid only: resourceVersions of one kind are comparable (KEP-5504, stable
//! in Kubernetes 1.35), so an answer to our own write is never taken back by a watch that is behind. Every change
//! returns the keys that should be looked at.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::ResourceExt;

use crate::api::bot_container::RestorePolicy;
use crate::api::reference::Reference;
use crate::api::{BotContainer, BotNode, BotRecord, BotSnapshot, resource_version};

use super::access::{self, Granted};
use super::bot::{bound_to, home};
use super::holder;
use super::mirror::{self, Changed, LastWords, Tail};
use super::node::{Heartbeat, NodeState};
use super::place::{Amount, Ask, Candidate, Load, explain, place, requests};
use super::record::{Hold, bot_id, hold};
use super::snapshot::{Adopted, Restore, newest, usable};
use super::{Key, Name};

mod grants;
mod holders;
mod nodes;
mod records;
mod rows;

/// Where a bot sits in the accounts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seat {
    node: String,
    amount: Amount,
}

/// See the module.
#[derive(Default)]
pub struct World {
    bots: HashMap<Name, Arc<BotContainer>>,
    /// BotContainers by namespace and botId.
    by_id: HashMap<Name, BTreeSet<String>>,
    unbound: BTreeSet<Name>,
    /// Decided, not yet seen in the API.
    reserved: HashMap<Name, String>,
    seats: HashMap<Name, Seat>,
    /// The Secrets and ConfigMaps that bots name, of those that name any.
    named: HashMap<Name, BTreeSet<Reference>>,
    /// What accounts of nodes may read, by namespace and node.
    granted: HashMap<Name, Granted>,
    /// The nodes that have an account.
    accounts: HashSet<String>,
    by_node: HashMap<String, BTreeSet<Name>>,
    load: Load,
    records: HashMap<Name, Arc<BotRecord>>,
    /// Since when neither bot nor snapshot of a record is there.
    vanished: HashMap<Name, Instant>,
    snapshots: HashMap<Name, Arc<BotSnapshot>>,
    /// BotSnapshots by namespace and botId.
    kept: HashMap<Name, BTreeSet<String>>,
    /// BotSnapshots without a number by the BotContainer that they name.
    asked: HashMap<Name, BTreeSet<String>>,
    bot_nodes: HashMap<String, Arc<BotNode>>,
    nodes: HashMap<String, Arc<Node>>,
    beats: HashMap<String, Heartbeat>,
    /// The state of each node with a heartbeat, as its bots were last told.
    told: HashMap<String, NodeState>,
    candidates: BTreeMap<String, Candidate>,
    classes: HashMap<String, RuntimeClass>,
    rephrased: HashMap<Name, Instant>,
    /// Which outage a bot was last claimed for, in words, and when.
    claims: HashMap<Name, (String, Instant)>,
    /// The same of snapshots: once in an outage.
    snapshot_claims: HashMap<Name, String>,
    /// Holder Pods by node, where there are such.
    holders: Option<HashMap<String, holder::Seen>>,
    /// Since when a holder should ask for something else.
    resizes: HashMap<String, Instant>,
    /// Until when no holder is made, since kubelet refused the last one.
    refusals: HashMap<String, Instant>,
    /// Where there is a mirror: what it needs of the bots besides, and whose rows wait.
    mirrored: Option<Mirrored>,
}

#[derive(Default)]
struct Mirrored {
    tails: HashMap<Name, Arc<Tail>>,
    changed: Changed,
}

/// A bot as its reconcile needs it.
pub struct SeenBot {
    /// The bot.
    pub bot: Arc<BotContainer>,
    /// The record of its botId.
    pub record: Option<Arc<BotRecord>>,
    /// How it stands to that.
    pub hold: Hold,
    /// How it is with the node that has its layer, if one has.
    pub home: Option<NodeState>,
    /// What it is to start from, where it is not placed yet.
    pub restore: Restore,
}

/// A snapshot as its reconcile needs it.
pub struct SeenSnapshot {
    /// The snapshot.
    pub snapshot: Arc<BotSnapshot>,
    /// The bot that it names.
    pub bot: Option<Arc<BotContainer>>,
    /// The record of that bot's botId.
    pub record: Option<Arc<BotRecord>>,
    /// How the bot stands to that.
    pub hold: Option<Hold>,
    /// How it is with the snapshot's node, if it has one; else with that of the bot.
    pub node: Option<NodeState>,
    /// What a bot left without an object, where this is to be made of that.
    pub adopts: Option<Adopted>,
}

fn name_of(object: &impl ResourceExt) -> Name {
    Name { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
}

/// Whether `new` is newer than what is known of the same object, or of another of its name.
fn newer<K: ResourceExt>(known: Option<&Arc<K>>, new: &K) -> bool {
    let version = |object: &K| resource_version(object.meta());
    match known {
        None => true,
        Some(known) if known.uid() != new.uid() => {
            // Two uids of one name: the one made later is the one that is there.
            version(new) > version(known)
        }
        Some(known) => match (version(known), version(new)) {
            (Some(old), Some(new)) => new > old,
            _ => true,
        },
    }
}

impl World {
    /// Knows nothing yet. `mirrored`: there is a mirror, whose rows follow what is seen; `holding`: nodes have holder Pods.
    pub fn new(mirrored: bool, holding: bool) -> Self {
        let (mirrored, holders) = (mirrored.then(Mirrored::default), holding.then(HashMap::new));
        Self { mirrored, holders, ..Self::default() }
    }

    // --- bots

    /// A bot was seen.
    pub fn saw_bot(&mut self, mut bot: BotContainer, now: Instant) -> Vec<Key> {
        let name = name_of(&bot);
        let known = self.bots.get(&name);
        if !newer(known, &bot) {
            return Vec::new();
        }
        let mut keys = Vec::new();
        if known.is_some_and(|k| k.uid() != bot.uid()) {
            keys.extend(self.bot_gone(&name, None, now));
        }
        if let Some(mirrored) = &mut self.mirrored {
            mirrored.tails.insert(name.clone(), Arc::new(Tail::of(&bot)));
        }
        let named = match bot.metadata.deletion_timestamp {
            None => bot.spec.references().into_iter().chain(bot.spec.pull_secrets()).collect(),
            // It starts no more.
            Some(_) => BTreeSet::new(),
        };
        let renamed = self.named.get(&name).map_or(!named.is_empty(), |known| *known != named);
        let known = if named.is_empty() { self.named.remove(&name) } else { self.named.insert(name.clone(), named) };
        let had = self.seats.get(&name).map(|seat| seat.node.clone());
        strip(&mut bot);
        let id = Name { namespace: name.namespace.clone(), name: bot_id(&bot) };
        self.rows_changed(&id, now);
        self.by_id.entry(id).or_default().insert(name.name.clone());
        match bound_to(&bot) {
            Some(node) => {
                self.unbound.remove(&name);
                self.reserved.remove(&name);
                let node = node.to_owned();
                self.beats.entry(node.clone()).or_insert_with(|| {
                    keys.push(Key::Node(node));
                    Heartbeat::new(now)
                });
            }
            None => {
                self.unbound.insert(name.clone());
            }
        }
        self.bots.insert(name.clone(), Arc::new(bot));
        keys.push(Key::Bot(name.clone()));
        keys.extend(self.asked_of(&name));
        keys.extend(self.reseat(&name));
        keys.extend(self.holder_key(&name));
        let has = self.seats.get(&name).map(|seat| seat.node.clone());
        if (renamed || had != has) && (known.is_some() || self.named.contains_key(&name)) {
            let nodes: BTreeSet<String> = had.into_iter().chain(has).collect();
            keys.extend(
                nodes.into_iter().map(|node| Key::Access(Name { namespace: name.namespace.clone(), name: node })),
            );
        }
        keys
    }

    /// A bot is gone; with `uid`, only if it is that one.
    pub fn bot_gone(&mut self, name: &Name, uid: Option<&str>, now: Instant) -> Vec<Key> {
        if self.bots.get(name).is_none_or(|b| uid.is_some() && b.uid().as_deref() != uid) {
            return Vec::new();
        }
        let Some(bot) = self.bots.remove(name) else { return Vec::new() };
        let id = Name { namespace: name.namespace.clone(), name: bot_id(&bot) };
        if let Some(mirrored) = &mut self.mirrored
            && let Some(tail) = mirrored.tails.remove(name)
        {
            mirrored.changed.gone(
                id.clone(),
                LastWords { uid: mirror::uid_of(&bot.metadata), object: bot.clone(), tail },
                now,
            );
        }
        let mut keys = vec![Key::Record(id.clone())];
        keys.extend(self.asked_of(name));
        keys.extend(self.holder_key(name));
        if self.named.remove(name).is_some()
            && let Some(seat) = self.seats.get(name)
        {
            keys.push(Key::Access(Name { namespace: name.namespace.clone(), name: seat.node.clone() }));
        }
        if let Some(names) = self.by_id.get_mut(&id) {
            names.remove(&name.name);
            keys.extend(names.iter().map(|n| Key::Bot(Name { namespace: name.namespace.clone(), name: n.clone() })));
            if names.is_empty() {
                self.by_id.remove(&id);
            }
        }
        self.unbound.remove(name);
        self.reserved.remove(name);
        self.rephrased.remove(name);
        self.claims.remove(name);
        keys.extend(self.reseat(name));
        keys
    }

    /// Puts a bot's seat right in the accounts; wakes those who wait for room when some became free.
    fn reseat(&mut self, name: &Name) -> Option<Key> {
        let seat = self.bots.get(name).and_then(|bot| {
            let hold = self.hold(name, bot);
            let node = home(bot, &hold).map(str::to_owned).or_else(|| self.reserved.get(name).cloned())?;
            // What can't be counted was refused at placement; bound all the same, it is one bot.
            let fallback = || requests(&bot.spec).unwrap_or(Amount { bots: 1, ..Amount::default() });
            let amount = Ask::new(bot, self.class(bot)).map_or_else(|_| fallback(), |ask| ask.amount());
            Some(Seat { node, amount })
        });
        if self.seats.get(name) == seat.as_ref() {
            return None;
        }
        let freed = self.seats.remove(name).is_some_and(|old| {
            if let Some(load) = self.load.get_mut(&old.node) {
                *load -= old.amount;
            }
            if let Some(names) = self.by_node.get_mut(&old.node) {
                names.remove(name);
                if names.is_empty() {
                    self.by_node.remove(&old.node);
                    self.load.remove(&old.node);
                }
            }
            true
        });
        if let Some(seat) = seat {
            *self.load.entry(seat.node.clone()).or_default() += seat.amount;
            self.by_node.entry(seat.node.clone()).or_default().insert(name.clone());
            self.seats.insert(name.clone(), seat);
        }
        (freed && !self.unbound.is_empty()).then_some(Key::Pending)
    }

    fn class(&self, bot: &BotContainer) -> Option<&RuntimeClass> {
        self.classes.get(bot.spec.runtime_class_name.as_deref()?)
    }

    fn hold(&self, name: &Name, bot: &BotContainer) -> Hold {
        let id = Name { namespace: name.namespace.clone(), name: bot_id(bot) };
        let uid = bot.uid().unwrap_or_default();
        hold(&uid, self.records.get(&id).map(|r| &**r), |holder| {
            let holder_name = Name { namespace: name.namespace.clone(), name: holder.name.clone() };
            self.bots.get(&holder_name).is_some_and(|b| b.uid().as_deref() == Some(&holder.uid))
        })
    }

    /// A bot, its record, and how it stands to record, node and versions.
    pub fn view(&mut self, name: &Name, now: Instant) -> Option<SeenBot> {
        let bot = self.bots.get(name)?.clone();
        let id = Name { namespace: name.namespace.clone(), name: bot_id(&bot) };
        let hold = self.hold(name, &bot);
        let node = home(&bot, &hold).or(match &hold {
            Hold::Free(node) => node.as_deref(),
            _ => None,
        });
        let home = node.map(|node| self.state(node, now));
        let restore = if bound_to(&bot).is_none() { self.restore(&id, &bot) } else { Restore::Nothing };
        Some(SeenBot { bot, record: self.records.get(&id).cloned(), hold, home, restore })
    }

    /// What a bot that is not placed yet is to start from.
    fn restore(&self, id: &Name, bot: &BotContainer) -> Restore {
        let at = |name: &str| Name { namespace: id.namespace.clone(), name: name.to_owned() };
        if let Some(from) = &bot.spec.restore_from {
            let found = self.snapshots.get(&at(&from.snapshot_name)).map(|s| &**s);
            return match usable(&from.snapshot_name, found) {
                Restore::Wait { reason, message } => {
                    Restore::Wait { reason, message: format!("spec.restoreFrom: {message}") }
                }
                usable => usable,
            };
        }
        if bot.spec.restore_policy == RestorePolicy::Never {
            return Restore::Nothing;
        }
        newest(self.kept.get(id).into_iter().flatten().filter_map(|name| self.snapshots.get(&at(name)).map(|s| &**s)))
    }

    /// A snapshot, its bot and record, and how it is with its node.
    pub fn snapshot_view(&mut self, name: &Name, now: Instant) -> Option<SeenSnapshot> {
        let snapshot = self.snapshots.get(name)?.clone();
        let bot_name = Name { namespace: name.namespace.clone(), name: snapshot.spec.bot_container_name.clone() };
        let bot = self.bots.get(&bot_name).cloned();
        let hold = bot.as_deref().map(|bot| self.hold(&bot_name, bot));
        let id = bot.as_deref().map(|bot| Name { namespace: name.namespace.clone(), name: bot_id(bot) });
        let record = id.and_then(|id| self.records.get(&id).cloned());
        let node = snapshot.status.as_ref().and_then(|s| s.node_name.as_deref());
        let node = node.or_else(|| bot.as_deref().and_then(bound_to)).map(|node| self.state(node, now));
        Some(SeenSnapshot { snapshot, bot, record, hold, node, adopts: self.adopted(name) })
    }

    /// The node for a bot, or why none fits. A node decided on before is kept if it still fits.
    pub fn place(
        &mut self,
        name: &Name,
        bot: &BotContainer,
        layer: Option<&str>,
        now: Instant,
    ) -> Result<String, String> {
        let mut ask = Ask::new(bot, self.class(bot)).map_err(|bad| bad.to_string())?;
        if let Some(node) = layer {
            let elsewhere = bot.spec.node_name.as_deref().filter(|wanted| *wanted != node);
            if let Some(wanted) = elsewhere {
                return Err(format!("spec.nodeName asks for {wanted}, where it is not"));
            }
            ask = ask.only_on(node);
        }
        self.refresh_expired(now);
        let before = self.reserved.remove(name);
        let _ = self.reseat(name);
        if let Some(candidate) = before.as_ref().and_then(|node| self.candidates.get(node))
            && let Ok(node) = place(&ask, [candidate], &self.load)
        {
            return Ok(node);
        }
        place(&ask, self.candidates.values(), &self.load).map_err(|refusals| explain(&refusals, &ask))
    }

    /// Counts a bot on the node that was decided for it, or on none.
    pub fn reserve(&mut self, name: &Name, bot: &BotContainer, node: Option<&String>) {
        match node.filter(|_| bound_to(bot).is_none()) {
            Some(node) => self.reserved.insert(name.clone(), node.clone()),
            None => self.reserved.remove(name),
        };
        let _ = self.reseat(name);
    }

    /// Decides for all that wait, oldest first, so that room which became free goes to who waited longest; the bots to
    /// look at, in that order.
    pub fn place_waiting(&mut self, now: Instant) -> Vec<Key> {
        let mut waiting: Vec<_> =
            self.unbound.iter().filter_map(|n| Some((self.bots.get(n)?.clone(), n.clone()))).collect();
        waiting.sort_by(|(a, an), (b, bn)| (a.creation_timestamp(), an).cmp(&(b.creation_timestamp(), bn)));
        for (bot, name) in &waiting {
            let free = match self.hold(name, bot) {
                Hold::None | Hold::Free(None) | Hold::Mine(None) => true,
                // Bound to the node of its layer, by its own reconcile.
                Hold::Free(Some(_)) | Hold::Mine(Some(_)) | Hold::Other(_) => false,
            };
            let id = Name { namespace: name.namespace.clone(), name: bot_id(bot) };
            if free
                && bot.metadata.deletion_timestamp.is_none()
                // Placed where its version is, by its own reconcile as well.
                && self.restore(&id, bot) == Restore::Nothing
                && let Ok(node) = self.place(name, bot, None, now)
            {
                self.reserve(name, bot, Some(&node));
            }
        }
        waiting.into_iter().map(|(_, name)| Key::Bot(name)).collect()
    }

    /// When a message that alone changed may be written again; `None`: now.
    pub fn rephrase_at(&self, name: &Name, now: Instant, every: Duration) -> Option<Instant> {
        self.rephrased.get(name).map(|at| *at + every).filter(|at| *at > now)
    }

    /// A message was written.
    pub fn rephrased(&mut self, name: &Name, now: Instant) {
        self.rephrased.insert(name.clone(), now);
    }

    /// When a bot may be claimed again in these words, which name the outage; `None`: now.
    pub fn claim_at(&self, name: &Name, words: &str, now: Instant, every: Duration) -> Option<Instant> {
        let (said, at) = self.claims.get(name)?;
        (said == words).then(|| *at + every).filter(|at| *at > now)
    }

    /// A claim was written.
    pub fn claimed(&mut self, name: &Name, words: String, now: Instant) {
        self.claims.insert(name.clone(), (words, now));
    }

    /// Whether a snapshot was claimed in these words, which name the outage.
    pub fn has_claimed_snapshot(&self, name: &Name, words: &str) -> bool {
        self.snapshot_claims.get(name).is_some_and(|said| said == words)
    }

    /// A claim of a snapshot was written.
    pub fn claimed_snapshot(&mut self, name: &Name, words: String) {
        self.snapshot_claims.insert(name.clone(), words);
    }

    // --- all

    /// Everything, in the order in which a new leader should look at it.
    pub fn all(&self) -> Vec<Key> {
        let mut keys: Vec<Key> = self.beats.keys().cloned().map(Key::Node).collect();
        if let Some(holders) = &self.holders {
            let nodes: BTreeSet<&String> = self.by_node.keys().chain(holders.keys()).collect();
            keys.extend(nodes.into_iter().cloned().map(Key::Holder));
        }
        keys.push(Key::Pending);
        keys.extend(self.bots.keys().cloned().map(Key::Bot));
        keys.extend(self.records.keys().cloned().map(Key::Record));
        let named = self
            .named
            .keys()
            .filter_map(|bot| Some(Name { namespace: bot.namespace.clone(), name: self.seats.get(bot)?.node.clone() }));
        let access: BTreeSet<Name> = named.chain(self.granted.keys().cloned()).collect();
        keys.extend(access.into_iter().map(Key::Access));
        // In the order in which they were asked for: numbers follow it as far as they can.
        let mut snapshots: Vec<_> = self.snapshots.values().collect();
        snapshots.sort_by_key(|s| (s.creation_timestamp(), s.name_any()));
        keys.extend(snapshots.into_iter().map(|s| Key::Snapshot(name_of(&**s))));
        keys
    }

    /// How many bots are unbound, and how many BotNodes have no CIDR.
    pub fn waiting(&self) -> (usize, usize) {
        (self.unbound.len(), self.bot_nodes.values().filter(|n| n.spec.bot_cidr.is_none()).count())
    }

    /// Names of a kind, for the set difference after a list.
    pub fn bot_names(&self) -> Vec<Name> {
        self.bots.keys().cloned().collect()
    }

    /// As `bot_names`.
    pub fn holder_names(&self) -> Vec<Name> {
        self.holders.iter().flat_map(HashMap::keys).cloned().map(Name::cluster).collect()
    }

    /// Names of Roles, as `bot_names`.
    pub fn role_names(&self) -> Vec<Name> {
        self.granted.iter().filter(|(_, granted)| granted.role.is_some()).map(|(at, _)| access::object_of(at)).collect()
    }

    /// Names of RoleBindings, as `bot_names`.
    pub fn binding_names(&self) -> Vec<Name> {
        let bound = self.granted.iter().filter(|(_, granted)| granted.binding.is_some());
        bound.map(|(at, _)| access::object_of(at)).collect()
    }

    /// As `bot_names`.
    pub fn account_names(&self) -> Vec<Name> {
        self.accounts.iter().cloned().map(Name::cluster).collect()
    }

    /// As `bot_names`.
    pub fn record_names(&self) -> Vec<Name> {
        self.records.keys().cloned().collect()
    }

    /// As `bot_names`.
    pub fn snapshot_names(&self) -> Vec<Name> {
        self.snapshots.keys().cloned().collect()
    }

    /// As `bot_names`.
    pub fn bot_node_names(&self) -> Vec<Name> {
        self.bot_nodes.keys().cloned().map(Name::cluster).collect()
    }

    /// As `bot_names`.
    pub fn node_names(&self) -> Vec<Name> {
        self.nodes.keys().cloned().map(Name::cluster).collect()
    }

    /// As `bot_names`.
    pub fn class_names(&self) -> Vec<Name> {
        self.classes.keys().cloned().map(Name::cluster).collect()
    }

    /// As `bot_names`: those of which a Lease is known.
    pub fn lease_names(&self) -> Vec<Name> {
        self.beats.keys().cloned().map(Name::cluster).collect()
    }
}

/// Drops what the controller never reads, which is most of a bot: it writes by patches of single fields, so nothing is
/// lost, and 10,000 bots fit into little memory.
fn strip(bot: &mut BotContainer) {
    bot.metadata.managed_fields = None;
    bot.metadata.annotations = None;
    let spec = &mut bot.spec;
    spec.skills = Vec::new();
    spec.files = Vec::new();
    spec.env = Vec::new();
    spec.env_from = Vec::new();
    spec.command = Vec::new();
    spec.args = Vec::new();
    spec.security_context = None;
    spec.dns_config = None;
    if let Some(status) = &mut bot.status {
        status.transitions = Vec::new();
        // The last is the bot's own layer.
        status.lineage = status.lineage.pop().into_iter().collect();
        status.last_termination = None;
    }
}

#[cfg(test)]
mod tests;
