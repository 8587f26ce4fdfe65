//! What the controller knows: the objects as last seen, by a watch or in the answer to its own write, and what follows
//! from them (which bot sits where, what each node carries). No IO; time is an argument.
//!
//! An object replaces an older one of the same uid only: resourceVersions of one kind are comparable (KEP-5504, stable
//! in Kubernetes 1.35), so an answer to our own write is never taken back by a watch that is behind. Every change
//! returns the keys that should be looked at.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::bot_container::RestorePolicy;
use crate::api::bot_node::Adoption;
use crate::api::reference::Reference;
use crate::api::{BotContainer, BotNode, BotRecord, BotSnapshot, resource_version};

use super::access::{self, Granted};
use super::bot::{bound_to, home};
use super::holder;
use super::mirror::{self, Changed, LastWords, Tail};
use super::node::{Heartbeat, NodeState, candidate, state};
use super::place::{Amount, Ask, Candidate, Load, explain, place, requests};
use super::record::{Hold, bot_id, hold};
use super::retention::{Kept, surplus};
use super::snapshot::{Adopted, Restore, newest, usable};
use super::{Key, Name};

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

    // --- holder Pods

    /// The holder of a bot's node.
    fn holder_key(&self, bot: &Name) -> Option<Key> {
        self.holders.as_ref()?;
        self.seats.get(bot).map(|seat| Key::Holder(seat.node.clone()))
    }

    /// How it is with a node's holder.
    pub fn holder_view(&self, node: &str) -> Option<(holder::View, Arc<BotNode>)> {
        let bot_node = self.bot_nodes.get(node)?.clone();
        let spec = self.nodes.get(node).map(|node| node.spec.as_ref());
        let view = holder::View {
            wanted: self.load.get(node).filter(|load| load.bots > 0).copied(),
            holder: self.holders.as_ref()?.get(node).cloned(),
            has_node: spec.is_some(),
            cordoned: spec.flatten().and_then(|spec| spec.unschedulable).unwrap_or(false),
            drain: bot_node.spec.drain,
        };
        Some((view, bot_node))
    }

    /// A holder was seen.
    pub fn saw_holder(&mut self, node: &str, seen: holder::Seen) -> Vec<Key> {
        match &mut self.holders {
            Some(holders) if holders.get(node) != Some(&seen) => {
                holders.insert(node.to_owned(), seen);
                vec![Key::Holder(node.to_owned())]
            }
            _ => Vec::new(),
        }
    }

    /// A holder is gone.
    pub fn holder_gone(&mut self, node: &str) -> Vec<Key> {
        match self.holders.as_mut().and_then(|holders| holders.remove(node)) {
            Some(_) => vec![Key::Holder(node.to_owned())],
            None => Vec::new(),
        }
    }

    /// When a holder may be resized; `None`: now. Changes are gathered for so long.
    pub fn holder_resize_at(&mut self, node: &str, now: Instant, gather: Duration) -> Option<Instant> {
        let at = *self.resizes.entry(node.to_owned()).or_insert(now) + gather;
        if at > now {
            return Some(at);
        }
        self.resizes.remove(node);
        None
    }

    /// kubelet refused a holder: no other is made until then.
    pub fn holder_failed(&mut self, node: &str, until: Instant) {
        self.refusals.insert(node.to_owned(), until);
    }

    /// When a holder may be made again; `None`: now.
    pub fn holder_again_at(&self, node: &str, now: Instant) -> Option<Instant> {
        self.refusals.get(node).copied().filter(|until| *until > now)
    }

    // --- what accounts of nodes may read

    /// What bots of a namespace on a node name, decided ones among them, and what is granted of it.
    pub fn access(&self, at: &Name) -> (BTreeSet<Reference>, Granted) {
        let bots = self.by_node.get(&at.name).into_iter().flatten().filter(|bot| bot.namespace == at.namespace);
        let wanted = bots.filter_map(|bot| self.named.get(bot)).flatten().cloned().collect();
        (wanted, self.granted.get(at).cloned().unwrap_or_default())
    }

    /// Whether a bot names any Secret or ConfigMap.
    pub fn names_any(&self, bot: &Name) -> bool {
        self.named.contains_key(bot)
    }

    /// A Role of a node was seen.
    pub fn saw_role(&mut self, role: &Role) -> Vec<Key> {
        self.grants(&name_of(role), |granted| granted.role = Some(access::allowed(role)))
    }

    /// A Role of a node is gone.
    pub fn role_gone(&mut self, name: &Name) -> Vec<Key> {
        self.grants(name, |granted| granted.role = None)
    }

    /// A RoleBinding of a node was seen.
    pub fn saw_binding(&mut self, binding: &RoleBinding) -> Vec<Key> {
        let name = name_of(binding);
        let right = access::node_of(&name.name).is_some_and(|node| access::is_right(binding, node));
        self.grants(&name, |granted| granted.binding = Some(right))
    }

    /// A RoleBinding of a node is gone.
    pub fn binding_gone(&mut self, name: &Name) -> Vec<Key> {
        self.grants(name, |granted| granted.binding = None)
    }

    fn grants(&mut self, name: &Name, change: impl FnOnce(&mut Granted)) -> Vec<Key> {
        let Some(node) = access::node_of(&name.name) else { return Vec::new() };
        let at = Name { namespace: name.namespace.clone(), name: node.to_owned() };
        let granted = self.granted.entry(at.clone()).or_default();
        let before = granted.clone();
        change(granted);
        let changed = *granted != before;
        if *granted == Granted::default() {
            self.granted.remove(&at);
        }
        if changed { vec![Key::Access(at)] } else { Vec::new() }
    }

    /// An account of a node was seen.
    pub fn saw_account(&mut self, node: String) -> Vec<Key> {
        self.accounts.insert(node);
        Vec::new()
    }

    /// An account of a node is gone.
    pub fn account_gone(&mut self, node: &str) -> Vec<Key> {
        if self.accounts.remove(node) { vec![Key::Node(node.to_owned())] } else { Vec::new() }
    }

    /// Whether a node has its account.
    pub fn has_account(&self, node: &str) -> bool {
        self.accounts.contains(node)
    }

    // --- records and snapshots

    /// A record was seen.
    pub fn saw_record(&mut self, mut record: BotRecord, now: Instant) -> Vec<Key> {
        let name = name_of(&record);
        if !newer(self.records.get(&name), &record) {
            return Vec::new();
        }
        record.metadata.managed_fields = None;
        self.rows_changed(&name, now);
        self.records.insert(name.clone(), Arc::new(record));
        self.record_changed(name)
    }

    /// A record is gone; with `uid`, only if it is that one.
    pub fn record_gone(&mut self, name: &Name, uid: Option<&str>, now: Instant) -> Vec<Key> {
        if self.records.get(name).is_none_or(|r| uid.is_some() && r.uid().as_deref() != uid) {
            return Vec::new();
        }
        self.records.remove(name);
        self.vanished.remove(name);
        self.rows_changed(name, now);
        self.record_changed(name.clone())
    }

    fn record_changed(&mut self, id: Name) -> Vec<Key> {
        let bots: Vec<Name> = self
            .by_id
            .get(&id)
            .into_iter()
            .flatten()
            .map(|n| Name { namespace: id.namespace.clone(), name: n.clone() })
            .collect();
        let mut keys = Vec::new();
        for bot in &bots {
            keys.extend(self.reseat(bot));
        }
        keys.extend(bots.into_iter().map(Key::Bot));
        keys.push(Key::Record(id));
        keys
    }

    /// A record as last seen.
    pub fn record(&self, name: &Name) -> Option<Arc<BotRecord>> {
        self.records.get(name).cloned()
    }

    /// How many BotContainers have the botId of a record.
    pub fn bots_of(&self, record: &BotRecord) -> usize {
        self.by_id.get(&name_of(record)).map_or(0, BTreeSet::len)
    }

    /// Whether a snapshot of a record's botId was seen.
    pub fn has_snapshots(&self, record: &BotRecord) -> bool {
        self.kept.contains_key(&name_of(record))
    }

    /// Since when nothing of a record's bot is there.
    pub fn vanished(&mut self, name: &Name, is_so: bool, now: Instant) -> Instant {
        if is_so {
            *self.vanished.entry(name.clone()).or_insert(now)
        } else {
            self.vanished.remove(name);
            now
        }
    }

    /// A snapshot was seen.
    pub fn saw_snapshot(&mut self, mut snapshot: BotSnapshot, now: Instant) -> Vec<Key> {
        let name = name_of(&snapshot);
        let known = self.snapshots.get(&name);
        if !newer(known, &snapshot) {
            return Vec::new();
        }
        let usable = |snapshot: &BotSnapshot| snapshot.status.as_ref().map(|s| (s.phase, s.bot_id.clone(), s.version));
        let news = known.is_none_or(|known| {
            usable(known) != usable(&snapshot)
                || known.metadata.deletion_timestamp.is_some() != snapshot.metadata.deletion_timestamp.is_some()
        });
        self.forget_snapshot(&name, now);
        snapshot.metadata.managed_fields = None;
        let status = snapshot.status.get_or_insert_default();
        status.changes = None;
        let at = |text: &str| Name { namespace: name.namespace.clone(), name: text.to_owned() };
        match (&status.bot_id, status.version) {
            (Some(id), Some(_)) => {
                let id = at(id);
                self.rows_changed(&id, now);
                self.kept.entry(id).or_default().insert(name.name.clone())
            }
            _ => self.asked.entry(at(&snapshot.spec.bot_container_name)).or_default().insert(name.name.clone()),
        };
        let snapshot = Arc::new(snapshot);
        self.snapshots.insert(name.clone(), snapshot.clone());
        let mut keys = if news { self.concerned(&name, &snapshot) } else { Vec::new() };
        keys.push(Key::Snapshot(name));
        keys
    }

    /// A snapshot is gone; with `uid`, only if it is that one.
    pub fn snapshot_gone(&mut self, name: &Name, uid: Option<&str>, now: Instant) -> Vec<Key> {
        if self.snapshots.get(name).is_none_or(|s| uid.is_some() && s.uid().as_deref() != uid) {
            return Vec::new();
        }
        let Some(snapshot) = self.forget_snapshot(name, now) else { return Vec::new() };
        self.snapshot_claims.remove(name);
        self.concerned(name, &snapshot)
    }

    fn forget_snapshot(&mut self, name: &Name, now: Instant) -> Option<Arc<BotSnapshot>> {
        let snapshot = self.snapshots.remove(name)?;
        let id = snapshot.status.as_ref().and_then(|s| s.bot_id.clone()).unwrap_or_default();
        let at = |text: String| Name { namespace: name.namespace.clone(), name: text };
        self.rows_changed(&at(id.clone()), now);
        for (index, key) in [(&mut self.kept, id), (&mut self.asked, snapshot.spec.bot_container_name.clone())] {
            if let Entry::Occupied(mut names) = index.entry(at(key)) {
                names.get_mut().remove(&name.name);
                if names.get().is_empty() {
                    names.remove();
                }
            }
        }
        Some(snapshot)
    }

    /// Whom a change of a snapshot concerns: its record, its bot, and those that wait to start from it.
    fn concerned(&self, name: &Name, snapshot: &BotSnapshot) -> Vec<Key> {
        let at = |text: &str| Name { namespace: name.namespace.clone(), name: text.to_owned() };
        let mut keys = vec![Key::Bot(at(&snapshot.spec.bot_container_name))];
        if let Some(id) = snapshot.status.as_ref().and_then(|s| s.bot_id.as_deref()) {
            keys.push(Key::Record(at(id)));
            keys.extend(self.by_id.get(&at(id)).into_iter().flatten().map(|bot| Key::Bot(at(bot))));
        }
        let waits = |bot: &&Name| {
            let from = self.bots.get(*bot).and_then(|bot| bot.spec.restore_from.as_ref());
            bot.namespace == name.namespace && from.is_some_and(|from| from.snapshot_name == name.name)
        };
        keys.extend(self.unbound.iter().filter(waits).cloned().map(Key::Bot));
        keys.retain(|key| !matches!(key, Key::Bot(bot) if !self.bots.contains_key(bot)));
        keys
    }

    /// What a snapshot of that name is to adopt: an entry of a BotNode names it, and the layer is there.
    pub fn adopted(&self, name: &Name) -> Option<Adopted> {
        self.bot_nodes.values().find_map(|node| {
            let entry = |entry: &&Adoption| entry.namespace == name.namespace && entry.snapshot_name == name.name;
            let wanted = node.spec.adopt.iter().find(entry)?;
            let orphans = node.status.as_ref().map(|status| status.orphans.as_slice()).unwrap_or_default();
            let orphan = orphans.iter().find(|orphan| orphan.name == wanted.orphan)?;
            Some(Adopted {
                node: node.name_any(),
                bot_uid: orphan.bot_uid.clone(),
                bot_id: orphan.bot_id.clone(),
                bot_name: orphan.bot_container_name.clone(),
                version: orphan.version,
            })
        })
    }

    /// The snapshots without a number that name a bot.
    fn asked_of(&self, bot: &Name) -> Vec<Key> {
        let at = |name: &String| Name { namespace: bot.namespace.clone(), name: name.clone() };
        self.asked.get(bot).into_iter().flatten().map(|name| Key::Snapshot(at(name))).collect()
    }

    /// Whether a snapshot of that name was seen.
    pub fn has_snapshot(&self, name: &Name) -> bool {
        self.snapshots.contains_key(name)
    }

    /// The scheduled snapshots of a bot that are surplus.
    pub fn surplus(&self, namespace: &str, bot: &BotContainer, keep_last: usize) -> Vec<Arc<BotSnapshot>> {
        let at = |name: &str| Name { namespace: namespace.to_owned(), name: name.to_owned() };
        let all = self.kept.get(&at(&bot_id(bot))).into_iter().flatten();
        let all: Vec<_> = all.filter_map(|name| self.snapshots.get(&at(name))).collect();
        let starts = |name: &String| {
            let from = |bot: &Name| self.bots.get(bot).and_then(|bot| bot.spec.restore_from.as_ref());
            self.unbound
                .iter()
                .any(|bot| bot.namespace == namespace && from(bot).is_some_and(|f| f.snapshot_name == *name))
        };
        let goes_back = |name: &String, version: i64| {
            let asked = bot.spec.rollback.as_ref();
            asked.is_some_and(|to| to.snapshot_name.as_ref() == Some(name) || to.to_version == Some(version))
        };
        let kept: Vec<Kept> = all
            .iter()
            .filter(|s| s.metadata.deletion_timestamp.is_none())
            .map(|snapshot| {
                let status = snapshot.status.clone().unwrap_or_default();
                let (name, version) = (snapshot.name_any(), status.version.unwrap_or(0));
                Kept {
                    source: status.source.unwrap_or_default(),
                    phase: status.phase.unwrap_or_default(),
                    in_use: starts(&name) || goes_back(&name, version),
                    version,
                    name,
                }
            })
            .collect();
        let surplus = surplus(&kept, keep_last);
        all.into_iter().filter(|s| surplus.contains(&s.name_any())).cloned().collect()
    }

    /// The highest version that a bot was seen to have, by its snapshots and its own status; 0 without any.
    pub fn highest_version(&self, namespace: &str, bot_id: &str) -> i64 {
        let at = |name: &str| Name { namespace: namespace.to_owned(), name: name.to_owned() };
        let kept = self.kept.get(&at(bot_id)).into_iter().flatten();
        let kept = kept.filter_map(|name| self.snapshots.get(&at(name))?.status.as_ref()?.version);
        let bots = self.by_id.get(&at(bot_id)).into_iter().flatten();
        let told = bots.filter_map(|name| self.bots.get(&at(name))?.status.as_ref()?.last_version);
        kept.chain(told).max().unwrap_or(0)
    }

    // --- the mirror

    fn rows_changed(&mut self, bot: &Name, now: Instant) {
        if let Some(mirrored) = &mut self.mirrored
            && !bot.name.is_empty()
        {
            mirrored.changed.mark(bot.clone(), now);
        }
    }

    /// Whose rows wait; `None` where there is no mirror.
    pub fn changed(&mut self) -> Option<&mut Changed> {
        self.mirrored.as_mut().map(|mirrored| &mut mirrored.changed)
    }

    /// All bots: those that have a BotContainer, and those of which versions are kept.
    pub fn bot_ids(&self) -> Vec<Name> {
        let kept = self.kept.keys().filter(|id| !self.by_id.contains_key(id));
        self.by_id.keys().chain(kept).cloned().collect()
    }

    /// All that is there of a bot.
    pub fn rows_of(&self, id: &Name) -> mirror::Bot {
        let at = |name: &String| Name { namespace: id.namespace.clone(), name: name.clone() };
        let mut bots: Vec<_> = self
            .by_id
            .get(id)
            .into_iter()
            .flatten()
            .filter_map(|name| Some((at(name), self.bots.get(&at(name))?)))
            .collect();
        let holder =
            self.records.get(id).and_then(|record| record.spec.holder.as_ref().map(|holder| holder.uid.as_str()));
        // The one that is bound, until it is gone; else the holder, else the oldest.
        bots.sort_by_key(|(name, bot)| {
            (bound_to(bot).is_none(), bot.uid().as_deref() != holder, bot.creation_timestamp(), name.clone())
        });
        let tail = |name: &Name| self.mirrored.as_ref().and_then(|m| m.tails.get(name)).cloned().unwrap_or_default();
        let kept = self.kept.get(id).into_iter().flatten();
        mirror::Bot {
            container: bots.first().map(|(name, bot)| ((*bot).clone(), tail(name))),
            alive: bots.iter().map(|(_, bot)| mirror::uid_of(&bot.metadata)).collect(),
            snapshots: kept.filter_map(|name| self.snapshots.get(&at(name))).cloned().collect(),
        }
    }

    // --- nodes

    /// A BotNode was seen.
    pub fn saw_bot_node(&mut self, mut bot_node: BotNode, now: Instant) -> Vec<Key> {
        let name = bot_node.name_any();
        if !newer(self.bot_nodes.get(&name), &bot_node) {
            return Vec::new();
        }
        bot_node.metadata.managed_fields = None;
        self.beats.entry(name.clone()).or_insert_with(|| Heartbeat::new(now));
        self.bot_nodes.insert(name.clone(), Arc::new(bot_node));
        self.node_changed(name, now)
    }

    /// A BotNode is gone. Others may wait for its CIDR.
    pub fn bot_node_gone(&mut self, name: &str, now: Instant) -> Vec<Key> {
        self.bot_nodes.remove(name);
        let mut keys = self.node_changed(name.to_owned(), now);
        keys.extend(self.bot_nodes.values().filter(|n| n.spec.bot_cidr.is_none()).map(|n| Key::Node(n.name_any())));
        keys
    }

    /// A Node was seen.
    pub fn saw_node(&mut self, mut node: Node, now: Instant) -> Vec<Key> {
        let name = node.name_any();
        if !newer(self.nodes.get(&name), &node) {
            return Vec::new();
        }
        node.metadata.managed_fields = None;
        node.status = None;
        self.nodes.insert(name.clone(), Arc::new(node));
        self.node_changed(name, now)
    }

    /// A Node is gone.
    pub fn node_gone(&mut self, name: &str, now: Instant) -> Vec<Key> {
        self.nodes.remove(name);
        self.node_changed(name.to_owned(), now)
    }

    /// A Lease of an agent was seen; `live`: by the watch, not in a list.
    pub fn saw_lease(&mut self, lease: Lease, live: bool, now: Instant) -> Vec<Key> {
        let name = lease.name_any();
        self.beats.entry(name.clone()).or_insert_with(|| Heartbeat::new(now)).observe(&lease, live, now);
        // A renewal changes nothing but the time that the timer finds when it fires.
        let alive = matches!(self.told.get(&name), Some(NodeState::Alive));
        let mut keys: Vec<Key> = self.refresh(&name, now).into_iter().collect();
        if !alive {
            keys.push(Key::Node(name));
        }
        keys
    }

    /// A Lease of an agent is gone.
    pub fn lease_gone(&mut self, name: &str, now: Instant) -> Vec<Key> {
        if let Some(beat) = self.beats.get_mut(name) {
            beat.lease_deleted();
        }
        self.node_changed(name.to_owned(), now)
    }

    fn node_changed(&mut self, name: String, now: Instant) -> Vec<Key> {
        let mut keys = vec![Key::Node(name.clone())];
        keys.extend(self.holders.is_some().then(|| Key::Holder(name.clone())));
        keys.extend(self.refresh(&name, now));
        keys
    }

    /// Sees a node anew as the placement does; wakes those who wait when it looks different.
    fn refresh(&mut self, name: &str, now: Instant) -> Option<Key> {
        let fresh = self.bot_nodes.get(name).map(|bot_node| {
            let node = self.nodes.get(name).map(|n| &**n);
            candidate(bot_node, node, self.beats.get(name), now, Timestamp::now())
        });
        if self.candidates.get(name) == fresh.as_ref() {
            return None;
        }
        match fresh {
            Some(fresh) => self.candidates.insert(name.to_owned(), fresh),
            None => self.candidates.remove(name),
        };
        (!self.unbound.is_empty()).then_some(Key::Pending)
    }

    fn refresh_expired(&mut self, now: Instant) {
        let late: Vec<String> = self
            .candidates
            .values()
            .filter(|c| c.not_ready.is_none() && self.beats.get(&c.name).is_none_or(|b| now >= b.expires()))
            .map(|c| c.name.clone())
            .collect();
        for name in late {
            let _ = self.refresh(&name, now);
        }
    }

    fn state(&self, name: &str, now: Instant) -> NodeState {
        let bot_node = self.bot_nodes.get(name).map(|n| &**n);
        let node = self.nodes.get(name).map(|n| &**n);
        match self.beats.get(name) {
            Some(beat) => state(name, bot_node, node, beat, now),
            None => state(name, bot_node, node, &Heartbeat::new(now), now),
        }
    }

    /// Whether a node's Lease is fresh.
    pub fn is_alive(&self, name: &str, now: Instant) -> bool {
        self.state(name, now) == NodeState::Alive
    }

    /// Judges a node; wakes its bots when its state is another than they were told. Also when it has to be judged again.
    pub fn look_at_node(&mut self, name: &str, now: Instant) -> (Vec<Key>, Option<Instant>) {
        let mut keys: Vec<Key> = self.refresh(name, now).into_iter().collect();
        let used = self.bot_nodes.contains_key(name) || self.by_node.contains_key(name);
        let Some(beat) = self.beats.get(name).filter(|_| used) else {
            // Nobody needs it; its Lease, if it comes back, is a first sight again.
            self.beats.remove(name);
            self.told.remove(name);
            return (keys, None);
        };
        let expires = beat.expires();
        let state = self.state(name, now);
        let again = (state == NodeState::Alive).then_some(expires);
        if self.told.get(name) != Some(&state) {
            if state != NodeState::Alive {
                tracing::warn!(node = name, ?state, "node lost");
            }
            for bot in self.by_node.get(name).into_iter().flatten() {
                keys.push(Key::Bot(bot.clone()));
                keys.extend(self.asked_of(bot));
            }
            let on_it = |s: &BotSnapshot| s.status.as_ref().is_some_and(|s| s.node_name.as_deref() == Some(name));
            let on_it = self.snapshots.iter().filter(|(_, snapshot)| on_it(snapshot));
            keys.extend(on_it.map(|(snapshot, _)| Key::Snapshot(snapshot.clone())));
            self.told.insert(name.to_owned(), state);
        }
        (keys, again)
    }

    /// A BotNode as last seen.
    pub fn bot_node(&self, name: &str) -> Option<Arc<BotNode>> {
        self.bot_nodes.get(name).cloned()
    }

    /// A Node as last seen.
    pub fn node(&self, name: &str) -> Option<Arc<Node>> {
        self.nodes.get(name).cloned()
    }

    /// A RuntimeClass was seen.
    pub fn saw_class(&mut self, class: RuntimeClass) -> Vec<Key> {
        self.classes.insert(class.name_any(), class);
        vec![Key::Pending]
    }

    /// A RuntimeClass is gone.
    pub fn class_gone(&mut self, name: &str) -> Vec<Key> {
        self.classes.remove(name);
        vec![Key::Pending]
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
