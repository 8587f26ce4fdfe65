//! Who may touch a bot's process now: its loop, or a snapshot that is about to hold one instant of it.
//!
//! A bot that is frozen by a snapshot must not be paused, resumed, started or ended meanwhile, and none of these may be in the
//! middle when it is frozen. So the loop is inside the bot's gate for each step, and the snapshot from before the freeze until
//! the thaw, which is milliseconds. Nothing of it outlives the agent: a freeze thaws with its death (`src/layer/freezer.rs`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::api::ids::BotUid;

/// The gates of all bots of this node.
#[derive(Debug, Default)]
pub struct Gates {
    gates: Mutex<HashMap<BotUid, Arc<tokio::sync::Mutex<()>>>>,
    stopped: Mutex<HashMap<BotUid, u32>>,
}

/// Inside a bot's gate until it is dropped.
#[derive(Debug)]
pub struct Inside {
    _guard: OwnedMutexGuard<()>,
}

/// A bot is to have no process until it is dropped: a snapshot of consistency Stopped.
#[derive(Debug)]
pub struct Hold {
    gates: Arc<Gates>,
    uid: BotUid,
}

impl Gates {
    /// Waits until nobody else is inside the bot's gate.
    pub async fn enter(&self, uid: &BotUid) -> Inside {
        let gate = locked(&self.gates).entry(uid.clone()).or_default().clone();
        Inside { _guard: gate.lock_owned().await }
    }

    /// Asks the bot's loop to have no process of it.
    pub fn hold(self: &Arc<Self>, uid: &BotUid) -> Hold {
        *locked(&self.stopped).entry(uid.clone()).or_default() += 1;
        Hold { gates: self.clone(), uid: uid.clone() }
    }

    /// Whether a snapshot asks for no process.
    pub fn is_held(&self, uid: &BotUid) -> bool {
        locked(&self.stopped).contains_key(uid)
    }

    /// Forgets a bot that is gone.
    pub fn forget(&self, uid: &BotUid) {
        locked(&self.gates).remove(uid);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut stopped = locked(&self.gates.stopped);
        if let Some(holds) = stopped.get_mut(&self.uid) {
            *holds -= 1;
            if *holds == 0 {
                stopped.remove(&self.uid);
            }
        }
    }
}

/// Every change leaves the maps whole, so a panic elsewhere spoils nothing.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time_and_a_hold_ends_with_its_guard() {
        let gates = Arc::new(Gates::default());
        let uid = BotUid::parse("2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11").unwrap();
        let inside = gates.enter(&uid).await;
        assert!(futures::poll!(Box::pin(gates.enter(&uid))).is_pending());
        drop(inside);
        assert!(futures::poll!(Box::pin(gates.enter(&uid))).is_ready());

        let (one, two) = (gates.hold(&uid), gates.hold(&uid));
        drop(one);
        assert!(gates.is_held(&uid));
        drop(two);
        assert!(!gates.is_held(&uid));
    }
}
