//! Nodes: their objects, heartbeats, and what state follows from these.

use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::{BotNode, BotSnapshot};
use crate::controller::Key;
use crate::controller::node::{Heartbeat, NodeState, candidate, state};
use crate::controller::world::{World, newer};

impl World {
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

    pub(super) fn node_changed(&mut self, name: String, now: Instant) -> Vec<Key> {
        let mut keys = vec![Key::Node(name.clone())];
        keys.extend(self.holders.is_some().then(|| Key::Holder(name.clone())));
        keys.extend(self.refresh(&name, now));
        keys
    }

    /// Sees a node anew as the placement does; wakes those who wait when it looks different.
    pub(super) fn refresh(&mut self, name: &str, now: Instant) -> Option<Key> {
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

    pub(super) fn refresh_expired(&mut self, now: Instant) {
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

    pub(super) fn state(&self, name: &str, now: Instant) -> NodeState {
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
}
