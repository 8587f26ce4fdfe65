//! What accounts of nodes may read: what bots name, and what is granted of it.

use std::collections::BTreeSet;

use k8s_openapi::api::rbac::v1::{Role, RoleBinding};

use crate::api::reference::Reference;
use crate::controller::access::Granted;
use crate::controller::world::{World, name_of};
use crate::controller::{Key, Name, access};

impl World {
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

    pub(super) fn grants(&mut self, name: &Name, change: impl FnOnce(&mut Granted)) -> Vec<Key> {
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
}
