//! Which bots' rows wait to be written, and since when: each at most once, the longest waiting first. A key carries no news: what is
//! written is what the world says then, so ten changes while the database is away are one write. No IO; time is an argument.
//!
//! The one thing that the world forgets and the rows must have is what a BotContainer said last before it was gone; a bounded number
//! of such last words is kept here.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Notify;
use uuid::Uuid;

use super::super::Name;
use super::row::Tail;
use crate::api::BotContainer;

/// How many last words are kept. Of a bot beyond that it is told that it was deleted, not what came before.
const LAST_WORDS: usize = 2048;

/// What a BotContainer said last.
#[derive(Clone, Debug)]
pub struct LastWords {
    /// The BotContainer, by uid.
    pub uid: Uuid,
    /// As it was seen last.
    pub object: Arc<BotContainer>,
    /// What it said.
    pub tail: Arc<Tail>,
}

/// See the module.
#[derive(Default)]
pub struct Changed {
    order: VecDeque<(Instant, Name)>,
    waiting: HashSet<Name>,
    last_words: HashMap<Name, Vec<LastWords>>,
    spoken: VecDeque<Name>,
    /// Since when what was taken and not yet written had waited.
    taken: Option<Instant>,
    /// Since when all rows have to be looked at.
    behind: Option<Instant>,
    /// What bots' rows hash to, until they change: all that is needed of those whose rows are right.
    hashes: HashMap<Name, i64>,
    bell: Arc<Notify>,
}

impl Changed {
    /// Rung when something waits. At most one waits for it.
    pub fn bell(&self) -> Arc<Notify> {
        self.bell.clone()
    }

    /// A bot's rows may be others now.
    pub fn mark(&mut self, bot: Name, now: Instant) {
        self.hashes.remove(&bot);
        if self.waiting.insert(bot.clone()) {
            self.order.push_back((now, bot));
            self.bell.notify_one();
        }
    }

    /// A BotContainer is gone, and said this last.
    pub fn gone(&mut self, bot: Name, words: LastWords, now: Instant) {
        self.spoken.push_back(bot.clone());
        self.last_words.entry(bot.clone()).or_default().push(words);
        while self.spoken.len() > LAST_WORDS {
            let oldest = self.spoken.pop_front();
            if let Some(oldest) = oldest
                && let Some(words) = self.last_words.get_mut(&oldest)
            {
                words.remove(0);
                if words.is_empty() {
                    self.last_words.remove(&oldest);
                }
            }
        }
        self.mark(bot, now);
    }

    /// What a bot's rows hash to, if that was reckoned since they last changed.
    pub fn hash(&self, bot: &Name) -> Option<i64> {
        self.hashes.get(bot).copied()
    }

    /// Keeps what a bot's rows hash to. To be called under the lock under which its objects were read.
    pub fn reckoned(&mut self, bot: &Name, hash: i64) {
        self.hashes.insert(bot.clone(), hash);
    }

    /// Takes those that wait longest, `most` at most. [`Changed::written`] or [`Changed::put_back`] comes next.
    pub fn take(&mut self, most: usize) -> Vec<(Instant, Name)> {
        let taken: Vec<_> = self.order.drain(..most.min(self.order.len())).collect();
        for (_, bot) in &taken {
            self.waiting.remove(bot);
        }
        self.taken = taken.first().map(|(since, _)| *since);
        taken
    }

    /// The last words of the BotContainers that a bot had, oldest first.
    pub fn last_words(&self, bot: &Name) -> Vec<LastWords> {
        self.last_words.get(bot).cloned().unwrap_or_default()
    }

    /// What was taken is written.
    pub fn written(&mut self) {
        self.taken = None;
    }

    /// The last words of a BotContainer are written.
    pub fn heard(&mut self, bot: &Name, uid: Uuid) {
        let Some(left) = self.last_words.get_mut(bot) else { return };
        let Some(at) = left.iter().position(|words| words.uid == uid) else { return };
        left.remove(at);
        if left.is_empty() {
            self.last_words.remove(bot);
        }
        if let Some(at) = self.spoken.iter().position(|name| name == bot) {
            self.spoken.remove(at);
        }
    }

    /// What was taken could not be written: it waits again, since when it did.
    pub fn put_back(&mut self, taken: Vec<(Instant, Name)>) {
        self.taken = None;
        for (since, bot) in taken.into_iter().rev() {
            if !self.waiting.insert(bot.clone())
                && let Some(at) = self.order.iter().position(|(_, name)| *name == bot)
            {
                // Changed again meanwhile: what it waits for is older than that.
                self.order.remove(at);
            }
            self.order.push_front((since, bot));
        }
        self.bell.notify_one();
    }

    /// All rows have to be looked at, since now unless since longer.
    pub fn fall_behind(&mut self, now: Instant) {
        let since = [Some(now), self.behind, self.since()].into_iter().flatten().min();
        self.behind = since;
    }

    /// All rows are looked at from here on: what waits is seen with them. The bots of which there are last words.
    pub fn begin_all(&mut self) -> Vec<Name> {
        self.order.clear();
        self.waiting.clear();
        self.last_words.keys().cloned().collect()
    }

    /// All rows were looked at.
    pub fn all_written(&mut self) {
        self.behind = None;
    }

    /// Since when the oldest waits that is not written yet.
    pub fn since(&self) -> Option<Instant> {
        let first = self.order.front().map(|(since, _)| *since);
        [self.behind, self.taken, first].into_iter().flatten().min()
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn bot(name: &str) -> Name {
        Name { namespace: "team-a".into(), name: name.into() }
    }

    fn names(taken: &[(Instant, Name)]) -> Vec<&str> {
        taken.iter().map(|(_, bot)| bot.name.as_str()).collect()
    }

    #[test]
    fn each_waits_once_and_the_longest_waiting_is_first() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut changed = Changed::default();
        for (name, second) in [("a", 0), ("b", 1), ("a", 2), ("c", 3)] {
            changed.mark(bot(name), at(second));
        }
        assert_eq!(changed.since(), Some(at(0)));
        let taken = changed.take(2);
        assert_eq!(names(&taken), ["a", "b"]);
        assert_eq!((changed.since(), changed.len()), (Some(at(0)), 1), "what is under way is not written yet");
        changed.mark(bot("b"), at(4));
        changed.put_back(taken);
        let again = changed.take(9);
        assert_eq!(names(&again), ["a", "b", "c"]);
        assert_eq!(again[1].0, at(1), "it waits since its first change");
        changed.written();
        assert_eq!((changed.since(), changed.len()), (None, 0));
    }

    #[test]
    fn falling_behind_is_since_the_oldest_that_waited() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut changed = Changed::default();
        changed.mark(bot("a"), at(1));
        changed.fall_behind(at(5));
        let _ = changed.begin_all();
        assert_eq!((changed.since(), changed.len()), (Some(at(1)), 0));
        changed.fall_behind(at(9));
        assert_eq!(changed.since(), Some(at(1)), "a second fall is no news");
        changed.all_written();
        assert_eq!(changed.since(), None);
    }

    #[test]
    fn last_words_are_kept_until_they_are_written_and_are_bounded() {
        let now = Instant::now();
        let mut changed = Changed::default();
        let object =
            Arc::new(BotContainer::new("web", serde_json::from_value(serde_json::json!({"image": "x"})).unwrap()));
        let words = |n: u128| LastWords { uid: Uuid::from_u128(n), object: object.clone(), tail: Arc::default() };
        changed.gone(bot("a"), words(1), now);
        changed.gone(bot("a"), words(2), now);
        changed.heard(&bot("a"), Uuid::from_u128(1));
        assert_eq!(changed.last_words(&bot("a")).iter().map(|w| w.uid.as_u128()).collect::<Vec<_>>(), [2]);
        for n in 0..2 * LAST_WORDS {
            changed.gone(bot(&format!("b{n}")), words(3), now);
        }
        assert_eq!((changed.last_words.len(), changed.spoken.len()), (LAST_WORDS, LAST_WORDS));
        assert!(changed.last_words(&bot("a")).is_empty());
    }
}
