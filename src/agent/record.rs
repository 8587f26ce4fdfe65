//! What the agent writes onto a bot's container in containerd, so that it needs no memory of its own.
//!
//! It lies in the container's extension [`Record::EXTENSION`] as JSON. The number of an attempt and that it was started
//! are written *before* the process starts: an attempt whose task is gone then counts as ended, and is not run twice
//! where the restart policy says so.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::desired::{Alive, Keep, Target};
use super::observe::Layer;
use super::skills::Skills;
use super::version::Version;

/// The agent's note on a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The BotContainer, by uid first: a name alone says nothing.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The botId in force when the container was made.
    pub bot_id: String,
    /// Hash of what the container's OCI spec was made from.
    pub hash: String,
    /// The last `spec.restartedAt` that was obeyed, or was there when the container was made.
    #[serde(default)]
    pub restarted_at: Option<String>,
    /// The last `spec.rollback.id` that counts as done: the one that was there when the container was made.
    #[serde(default)]
    pub rollback: Option<String>,
    /// The last rollback that was done, with what came of it. `rollback` may be an id that only counts as done.
    #[serde(default)]
    pub rolled: Option<Rolled>,
    /// A layer that is made beside, for a rollback to come.
    #[serde(default)]
    pub aside: Option<Aside>,
    /// The layer that a rollback replaced, until it is kept as a version or removed.
    #[serde(default)]
    pub replaced: Option<Replaced>,
    /// The limits that the task was given, in their canonical text.
    pub limits: String,
    /// The skills as we wrote them last; the bot may have changed them since.
    #[serde(default)]
    pub skills: Skills,
    /// Normalised reference of the image that the layer stands on.
    pub image: String,
    /// Digest that it was resolved to.
    pub digest: String,
    /// Snapshotter of the layer.
    pub snapshotter: String,
    /// Key of the writable layer.
    pub layer: String,
    /// The image's stop signal, TERM where it names none.
    pub stop_signal: u32,
    /// The attempt for which the OCI spec was written, 0 for none: Secrets are read anew for each.
    pub spec_for: u64,
    /// Number of the last attempt begun, 0 when there was none.
    pub attempt: u64,
    /// Where that attempt stands.
    pub life: Life,
    /// When that attempt was last to be stopped at our wish: the grace period counts from here.
    pub stop_ordered: Option<Timestamp>,
    /// The stop signal went out after that order. Noted after it: an agent that dies between the two sends it again.
    #[serde(default)]
    pub stop_sent: bool,
    /// When KILL was last sent to it.
    pub kill_ordered: Option<Timestamp>,
    /// Attempts in a row that ended by themselves; decides the back-off.
    pub failures: u32,
    /// Starts after an attempt that ended by itself.
    pub restarts: u64,
    /// The last end, also while a newer attempt runs.
    pub last: Option<Ending>,
}

/// A rollback that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rolled {
    /// Its id.
    pub id: String,
    /// The version gone back to.
    pub version: i64,
    /// The version that what it replaced becomes.
    pub replaced_by: Option<i64>,
    /// When.
    pub at: Timestamp,
}

/// A layer made beside the one in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Aside {
    /// Its key.
    pub layer: String,
    /// What it is for.
    pub for_: AsideFor,
    /// Whether it is whole.
    pub complete: bool,
}

/// What a layer is made beside for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum AsideFor {
    /// A rollback.
    #[serde(rename_all = "camelCase")]
    Rollback {
        /// Its id.
        id: String,
        /// The BotSnapshot that the layer is a copy of, by uid.
        snapshot: String,
    },
    /// Another image.
    #[serde(rename_all = "camelCase")]
    Image {
        /// Its normalised reference.
        image: String,
        /// Its digest.
        digest: String,
        /// The committed snapshot that the layer stands on.
        chain_id: String,
    },
}

/// A layer that was replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replaced {
    /// Its key.
    pub layer: String,
    /// The image that it stands on.
    pub image: String,
    /// Its digest.
    pub digest: String,
    /// When it was replaced: it holds this instant.
    pub at: Timestamp,
    /// The version that it becomes; `None`: it goes, once the bot runs on the other.
    pub keep: Option<Version>,
}

/// Where the last attempt stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    /// None was begun, or the last end is settled: the next start asks no restart policy.
    #[default]
    Fresh,
    /// Marked as started; the process may or may not have come to run.
    Started {
        /// When it was marked.
        at: Timestamp,
    },
    /// Ended by itself: the restart policy decides.
    Ended,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ending {
    /// Exit code; 128 + signal where a signal ended it.
    pub code: u32,
    /// A word of [`crate::api::condition::Reason`]: Completed, Error, OOMKilled, StartError or TaskLost.
    pub reason: String,
    /// The last output, or why it could not start.
    pub message: String,
    /// When it was started; `None` when it never ran.
    pub started_at: Option<Timestamp>,
    /// When it ended, as far as known.
    pub finished_at: Timestamp,
    /// Whether we had asked for it.
    pub asked: bool,
}

impl Ending {
    /// The signal that ended the process, as far as a shell's convention tells.
    pub fn signal(&self) -> Option<u32> {
        (129..=128 + 64).contains(&self.code).then(|| self.code - 128)
    }
}

/// Back-off as kubelet has it: the first restart at once, then 10 s doubling to 5 min, forgotten after 10 min of running.
pub const BACKOFF_BASE: SignedDuration = SignedDuration::from_secs(10);
/// See [`BACKOFF_BASE`].
pub const BACKOFF_MAX: SignedDuration = SignedDuration::from_secs(300);
/// See [`BACKOFF_BASE`].
pub const BACKOFF_RESET: SignedDuration = SignedDuration::from_secs(600);

/// How long after its end an attempt is followed by the next, when `failures` in a row ended by themselves.
pub fn backoff(failures: u32) -> SignedDuration {
    match failures {
        0 | 1 => SignedDuration::ZERO,
        n => {
            let doublings = (n - 2).min(16);
            BACKOFF_BASE.checked_mul(1 << doublings).map_or(BACKOFF_MAX, |wait| wait.min(BACKOFF_MAX))
        }
    }
}

impl Record {
    /// Key of the container's extension.
    pub const EXTENSION: &'static str = "berth.dev/record";
    /// Type of the extension's value, a JSON text.
    pub const TYPE_URL: &'static str = "berth.dev/Record";

    /// The number of the attempt to come, when none is under way.
    pub fn next_attempt(&self) -> u64 {
        match self.life {
            Life::Started { .. } => self.attempt,
            Life::Fresh | Life::Ended => self.attempt.saturating_add(1),
        }
    }

    /// Whether a process of this container is what is asked, as far as only a restart could change it.
    pub fn is_for(&self, alive: &Alive) -> bool {
        self.hash == alive.hash && (alive.restarted_at.is_none() || alive.restarted_at == self.restarted_at)
    }

    /// Whether the container was made for this layer, and not for one that was there before.
    pub fn stands_on(&self, layer: &Layer) -> bool {
        (&self.layer, &self.image, &self.digest) == (&layer.key, &layer.image, &layer.digest)
    }

    /// The record after the next attempt was marked as started.
    pub fn started(&self, at: Timestamp) -> Self {
        if let Life::Started { .. } = self.life {
            return self.clone();
        }
        let restarts = self.restarts.saturating_add(u64::from(self.life == Life::Ended));
        Self {
            attempt: self.attempt.saturating_add(1),
            life: Life::Started { at },
            stop_ordered: None,
            stop_sent: false,
            kill_ordered: None,
            restarts,
            ..self.clone()
        }
    }

    /// The record after the attempt under way ended.
    pub fn ended(&self, mut ending: Ending) -> Self {
        if let Life::Started { at } = self.life {
            ending.started_at.get_or_insert(at);
        }
        ending.asked = self.stop_ordered.is_some();
        let (life, failures) = if ending.asked {
            (Life::Fresh, 0)
        } else {
            let ran = ending.started_at.map_or(SignedDuration::ZERO, |start| ending.finished_at.duration_since(start));
            (Life::Ended, if ran >= BACKOFF_RESET { 1 } else { self.failures.saturating_add(1) })
        };
        Self {
            life,
            failures,
            last: Some(ending),
            stop_ordered: None,
            stop_sent: false,
            kill_ordered: None,
            ..self.clone()
        }
    }

    /// The record after the layer beside took the place of the one in use. The next start asks no restart policy, and waits for
    /// nothing.
    pub fn switched(&self, to: &Layer, target: &Target, at: Timestamp) -> Self {
        let keep = match &target.keep {
            Keep::As(version) => Some(version.clone()),
            Keep::No | Keep::Awaited => None,
        };
        let (image, digest) = (self.image.clone(), self.digest.clone());
        Self {
            layer: to.key.clone(),
            image: to.image.clone(),
            digest: to.digest.clone(),
            rollback: Some(target.id.clone()),
            rolled: Some(Rolled {
                id: target.id.clone(),
                version: target.version.number,
                replaced_by: keep.as_ref().map(|version| version.number),
                at,
            }),
            aside: None,
            replaced: Some(Replaced { layer: self.layer.clone(), image, digest, at, keep }),
            // The spec has the old layer in it.
            spec_for: 0,
            life: Life::Fresh,
            failures: 0,
            ..self.clone()
        }
    }

    /// The record after a layer on another image took the place of the one in use. `replaced` goes once the bot runs on it, or is
    /// gone back to where the image is set back before that.
    pub fn moved(&self, to: &Layer, at: Timestamp) -> Self {
        let (image, digest) = (self.image.clone(), self.digest.clone());
        Self {
            layer: to.key.clone(),
            image: to.image.clone(),
            digest: to.digest.clone(),
            aside: None,
            replaced: Some(Replaced { layer: self.layer.clone(), image, digest, at, keep: None }),
            spec_for: 0,
            life: Life::Fresh,
            failures: 0,
            ..self.clone()
        }
    }

    /// The record after an end by itself was settled: the next start asks no restart policy and waits for nothing.
    pub fn settled(&self) -> Self {
        Self { life: Life::Fresh, failures: 0, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn ending(code: u32, finished: i64) -> Ending {
        Ending {
            code,
            reason: "Error".into(),
            message: String::new(),
            started_at: None,
            finished_at: at(finished),
            asked: false,
        }
    }

    pub(crate) fn record() -> Record {
        Record {
            uid: "2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11".into(),
            namespace: "team-a".into(),
            name: "web".into(),
            bot_id: "web".into(),
            hash: "h1".into(),
            restarted_at: None,
            rollback: None,
            rolled: None,
            aside: None,
            replaced: None,
            limits: String::new(),
            skills: Skills::new(),
            image: "docker.io/library/nginx:latest".into(),
            digest: "sha256:0".into(),
            snapshotter: "overlayfs".into(),
            layer: "l1".into(),
            stop_signal: 15,
            spec_for: 1,
            attempt: 0,
            life: Life::Fresh,
            stop_ordered: None,
            stop_sent: false,
            kill_ordered: None,
            failures: 0,
            restarts: 0,
            last: None,
        }
    }

    #[test]
    fn backoff_is_kubelets() {
        let waits: Vec<i64> = (0..10).map(|n| backoff(n).as_secs()).collect();
        assert_eq!(waits, [0, 0, 10, 20, 40, 80, 160, 300, 300, 300]);
        assert_eq!(backoff(u32::MAX), BACKOFF_MAX);
    }

    #[test]
    fn a_crash_counts_a_stop_does_not() {
        let first = record().started(at(100));
        assert_eq!((first.attempt, first.restarts), (1, 0));
        let crashed = first.ended(ending(1, 101));
        assert_eq!((crashed.life, crashed.failures), (Life::Ended, 1));
        let second = crashed.started(at(102));
        assert_eq!((second.attempt, second.restarts), (2, 1));
        let stopped = Record { stop_ordered: Some(at(103)), ..second }.ended(ending(143, 104));
        assert_eq!((stopped.life, stopped.failures, stopped.restarts), (Life::Fresh, 0, 1));
        assert_eq!(stopped.started(at(105)).restarts, 1, "a start after a stop is no restart");
    }

    #[test]
    fn ten_minutes_of_running_forgive() {
        let old = Record { failures: 7, ..record() }.started(at(0));
        assert_eq!(old.ended(ending(1, 599)).failures, 8);
        assert_eq!(old.ended(ending(1, 600)).failures, 1);
    }

    #[test]
    fn marking_twice_marks_once() {
        let once = record().started(at(1));
        assert_eq!(once.started(at(2)), once);
    }
}
