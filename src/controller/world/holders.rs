//! Holder Pods, as seen, and when one is made or resized again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::api::BotNode;
use crate::controller::world::World;
use crate::controller::{Key, Name, holder};

impl World {
    /// The holder of a bot's node.
    pub(super) fn holder_key(&self, bot: &Name) -> Option<Key> {
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
}
