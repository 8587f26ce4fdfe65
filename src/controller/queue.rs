//! The keyed queue: each key waits at most once, runs at most once at a time, and one asked for while it runs runs again.
//!
//! Triggers carry no news: whoever adds a key gives a word for the log, and the reconcile looks at the world.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::Key;

/// First and longest wait of a key that keeps failing.
const FIRST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_secs(60);

#[derive(Default)]
struct State {
    ready: VecDeque<Key>,
    /// Keys in `ready`, with the word of the first trigger.
    waiting: HashMap<Key, &'static str>,
    running: HashSet<Key>,
    /// Asked for while running.
    again: HashMap<Key, &'static str>,
    later: BTreeMap<(Instant, u64), Key>,
    due: HashMap<Key, (Instant, u64)>,
    number: u64,
    failures: HashMap<Key, u32>,
}

/// See the module.
#[derive(Default)]
pub struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change below leaves the state whole, so a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for keys now, in this order.
    pub fn add_all(&self, keys: impl IntoIterator<Item = Key>, why: &'static str) {
        let mut state = self.state();
        for key in keys {
            state.add(key, why);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Asks for a key at `at`, or earlier if it was asked for earlier.
    pub fn add_at(&self, key: Key, at: Instant) {
        let mut state = self.state();
        if state.due.get(&key).is_some_and(|(due, _)| *due <= at) {
            return;
        }
        state.forget_due(&key);
        state.number += 1;
        let place = (at, state.number);
        state.later.insert(place, key.clone());
        state.due.insert(key, place);
        drop(state);
        self.changed.notify_one();
    }

    /// Waits for the next key and marks it as running; the word says why it runs. Cancel-safe.
    pub async fn next(&self) -> (Key, &'static str) {
        loop {
            let wait = {
                let mut state = self.state();
                let now = Instant::now();
                while let Some(entry) = state.later.first_entry().filter(|e| e.key().0 <= now) {
                    let key = entry.remove();
                    state.due.remove(&key);
                    state.add(key, "time");
                }
                if let Some(key) = state.ready.pop_front() {
                    let why = state.waiting.remove(&key).unwrap_or("");
                    state.running.insert(key.clone());
                    if !state.ready.is_empty() {
                        // The next worker takes the next key.
                        self.changed.notify_one();
                    }
                    return (key, why);
                }
                state.later.first_key_value().map(|((at, _), _)| *at)
            };
            match wait {
                Some(at) => {
                    // Cancel-safe: whichever ends first, the state is looked at again.
                    let _ = tokio::time::timeout_at(at.into(), self.changed.notified()).await;
                }
                None => self.changed.notified().await,
            }
        }
    }

    /// A key is done: it may run again.
    pub fn done(&self, key: &Key) {
        let mut state = self.state();
        state.failures.remove(key);
        state.finish(key);
        drop(state);
        self.changed.notify_one();
    }

    /// A key failed: it runs again after a back-off that doubles to a minute, half of it at random. `seldom`: start at
    /// the long end, since a person has to act first.
    pub fn failed(&self, key: &Key, seldom: bool) -> Duration {
        let mut state = self.state();
        let failures = state.failures.entry(key.clone()).or_default();
        *failures = failures.saturating_add(1).max(if seldom { 10 } else { 0 });
        let full = FIRST.saturating_mul(1 << (*failures - 1).min(12)).min(LONGEST);
        let roll = RandomState::new().hash_one(key) % 1024;
        let wait = full / 2 + full.mul_f64(f64::from(u32::try_from(roll).unwrap_or(0)) / 2048.0);
        state.finish(key);
        drop(state);
        self.add_at(key.clone(), Instant::now() + wait);
        wait
    }

    /// How many keys wait to run now.
    pub fn depth(&self) -> usize {
        self.state().ready.len()
    }
}

impl State {
    fn add(&mut self, key: Key, why: &'static str) {
        if self.running.contains(&key) {
            self.again.entry(key).or_insert(why);
        } else if !self.waiting.contains_key(&key) {
            self.waiting.insert(key.clone(), why);
            self.ready.push_back(key);
        }
    }

    fn forget_due(&mut self, key: &Key) {
        if let Some(place) = self.due.remove(key) {
            self.later.remove(&place);
        }
    }

    fn finish(&mut self, key: &Key) {
        self.running.remove(key);
        if let Some(why) = self.again.remove(key) {
            self.add(key.clone(), why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::Node(name.to_owned())
    }

    async fn next(queue: &Queue) -> String {
        match tokio::time::timeout(Duration::from_secs(5), queue.next()).await.expect("nothing came").0 {
            Key::Node(name) => name,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_key_waits_once_and_runs_once_at_a_time() {
        let queue = Queue::default();
        queue.add_all([key("a"), key("b"), key("a")], "test");
        assert_eq!(next(&queue).await, "a");
        queue.add_all([key("a")], "test");
        assert_eq!(next(&queue).await, "b");
        assert_eq!(queue.depth(), 0, "a key that runs is not given out again");
        queue.done(&key("a"));
        assert_eq!(next(&queue).await, "a", "but what was asked for while it ran is not lost");
    }

    #[tokio::test]
    async fn later_comes_later_and_the_earlier_of_two_times_counts() {
        let queue = Queue::default();
        let now = Instant::now();
        queue.add_at(key("b"), now + Duration::from_millis(60));
        queue.add_at(key("a"), now + Duration::from_secs(3600));
        queue.add_at(key("a"), now + Duration::from_millis(20));
        queue.add_at(key("a"), now + Duration::from_secs(60));
        assert_eq!(next(&queue).await, "a");
        assert_eq!(next(&queue).await, "b");
        assert!(Instant::now() >= now + Duration::from_millis(60));
    }

    #[tokio::test]
    async fn every_waiting_worker_gets_its_key() {
        let queue = std::sync::Arc::new(Queue::default());
        let workers: Vec<_> = (0..8)
            .map(|_| {
                let queue = queue.clone();
                tokio::spawn(async move { next(&queue).await })
            })
            .collect();
        tokio::task::yield_now().await;
        queue.add_all((0..8).map(|i| key(&i.to_string())), "test");
        let mut got = Vec::new();
        for worker in workers {
            got.push(worker.await.unwrap());
        }
        got.sort();
        assert_eq!(got, ["0", "1", "2", "3", "4", "5", "6", "7"]);
    }

    #[test]
    fn back_off_grows_is_capped_and_never_nothing() {
        let queue = Queue::default();
        let mut longest = Duration::ZERO;
        for _ in 0..40 {
            let wait = queue.failed(&key("a"), false);
            assert!(wait >= FIRST / 2 && wait <= LONGEST, "{wait:?}");
            longest = longest.max(wait);
        }
        assert!(longest >= LONGEST / 2);
        queue.done(&key("a"));
        assert!(queue.failed(&key("a"), false) <= FIRST, "a success forgets the failures");
        assert!(queue.failed(&key("b"), true) >= Duration::from_secs(5), "what a person must mend is tried seldom");
    }
}
