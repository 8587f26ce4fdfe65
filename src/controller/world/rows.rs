//! What the mirror needs: whose rows wait, and all that there is of a bot.

use std::time::Instant;

use kube::ResourceExt;

use crate::controller::bot::bound_to;
use crate::controller::mirror::Changed;
use crate::controller::world::World;
use crate::controller::{Name, mirror};

impl World {
    pub(super) fn rows_changed(&mut self, bot: &Name, now: Instant) {
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
}
