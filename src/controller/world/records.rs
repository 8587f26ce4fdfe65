//! Records and snapshots, and what of them hangs on each other.

use std::collections::BTreeSet;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Instant;

use kube::ResourceExt;

use crate::api::bot_node::Adoption;
use crate::api::{BotContainer, BotRecord, BotSnapshot};
use crate::controller::record::bot_id;
use crate::controller::retention::{Kept, surplus};
use crate::controller::snapshot::Adopted;
use crate::controller::world::{World, name_of, newer};
use crate::controller::{Key, Name};

impl World {
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

    pub(super) fn record_changed(&mut self, id: Name) -> Vec<Key> {
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

    pub(super) fn forget_snapshot(&mut self, name: &Name, now: Instant) -> Option<Arc<BotSnapshot>> {
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
    pub(super) fn concerned(&self, name: &Name, snapshot: &BotSnapshot) -> Vec<Key> {
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
    pub(super) fn asked_of(&self, bot: &Name) -> Vec<Key> {
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
}
