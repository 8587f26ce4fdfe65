//! `plan(wanted, found, now)`: what comes next for one BotSnapshot. Pure.
//!
//! ```text
//! being deleted      Remove                                                            -> Removed
//! Ready, Failed      as it is; a version that is gone from containerd                  -> Fail(SnapshotLost)
//! Ready, to travel   Export, unless it was
//! made in place      (what a rollback replaced, the last of a deleted bot) its bot's loop commits it: wait
//!                    Describe -> Verify                                                -> Ready
//! adopted            what a bot of a deleted namespace left: Adopt -> Verify           -> Ready, DropOrphan
//! copied             wait for the bot's layer; past the deadline                       -> Fail
//!                    Take (copy, freeze, copy the rest, thaw, commit) -> Verify        -> Ready
//! ```

use jiff::Timestamp;

use crate::api::BotSnapshot;
use crate::api::bot_snapshot::{Consistency, Export, SnapshotPhase, SnapshotSource};
use crate::api::condition::Reason;
use crate::api::ids::BotUid;

use super::super::version::Version;

/// What a BotSnapshot asks of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The version that it is.
    pub version: Version,
    /// The bot that it is of.
    pub bot: BotUid,
    /// Whether it is made by committing the bot's own layer, rather than of a copy.
    pub in_place: bool,
    /// Whether the bot has to be stopped for it.
    pub stopped: bool,
    /// Longest freeze. Milliseconds.
    pub max_freeze_millis: u64,
    /// When it fails, if it is not committed by then.
    pub deadline: Timestamp,
    /// Whether the object is being deleted.
    pub deleted: bool,
    /// What its status says.
    pub phase: SnapshotPhase,
    /// Whether an OCI image is to be made of it.
    pub export: bool,
}

impl Wanted {
    /// Reads what an object asks for; `None` for one that the controller has not given its number yet.
    pub fn of(snapshot: &BotSnapshot) -> Option<Self> {
        let (meta, spec, status) = (&snapshot.metadata, &snapshot.spec, snapshot.status.as_ref()?);
        let source = status.source.unwrap_or_default();
        let created = meta.creation_timestamp.as_ref()?.0;
        let limit = std::time::Duration::from_secs(spec.failure_deadline_seconds.max(0).unsigned_abs());
        Some(Self {
            version: Version {
                uid: meta.uid.clone()?,
                name: meta.name.clone()?,
                namespace: meta.namespace.clone()?,
                bot_id: status.bot_id.clone()?,
                number: status.version?,
                orphan: false,
            },
            bot: BotUid::parse(status.bot_uid.as_deref()?).ok()?,
            in_place: is_in_place(source),
            stopped: spec.consistency == Consistency::Stopped,
            max_freeze_millis: spec.max_freeze_millis.max(1).unsigned_abs(),
            deadline: created.saturating_add(limit).unwrap_or(Timestamp::MAX),
            deleted: meta.deletion_timestamp.is_some(),
            phase: status.phase.unwrap_or_default(),
            export: spec.export == Export::OCI,
        })
    }
}

/// Whether versions of this source are the bot's own layer, committed where it is: nothing is copied, and nothing is lost.
pub fn is_in_place(source: SnapshotSource) -> bool {
    matches!(source, SnapshotSource::Rollback | SnapshotSource::Preserved)
}

/// What is there of a version on this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The committed layer.
    pub committed: bool,
    /// A copy that is not committed.
    pub copy: bool,
    /// Its manifest.
    pub manifest: bool,
    /// Anything of it beside containerd.
    pub folder: bool,
    /// The OCI image that was made of it, whole.
    pub exported: bool,
    /// A layer that its bot left without an object, in a namespace that was deleted.
    pub orphan: bool,
    /// Its bot.
    pub bot: Bot,
}

/// How it is with the bot of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bot {
    /// No such object is bound to this node.
    #[default]
    Gone,
    /// It has no container on a whole layer yet.
    NoLayer,
    /// It has.
    Layer,
    /// It has, and is about to let go of one that becomes this version.
    LetsGo,
}

/// One step. Each is idempotent, and safe to be cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Copy the bot's layer, and commit the copy. Cut off: a copy that is not committed, which the next begins with removing;
    /// the bot is thawed (`src/layer/freezer.rs`).
    Take,
    /// Read a layer that was committed in place, and write its manifest. Cut off: no manifest.
    Describe,
    /// Read the committed layer back against its manifest. Cut off: done again.
    Verify,
    /// Make an OCI image of the version. Cut off: what is written of it is held by the version's lease, and gone on with.
    Export,
    /// Copy what a bot left without an object, and commit the copy. Cut off: a copy that is not committed, which the next begins with
    /// removing; what was left is as it was.
    Adopt,
    /// Free what was adopted: it is this version now. Cut off: done again.
    DropOrphan,
    /// Remove a copy that nothing will be made of.
    Clear,
    /// Free the version's bytes, or leave them to the forks that stand on it. Cut off: the rest is found by name.
    Remove,
}

impl Step {
    /// For logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Take => "snapshot_take",
            Self::Describe => "snapshot_describe",
            Self::Verify => "snapshot_verify",
            Self::Export => "snapshot_export",
            Self::Adopt => "snapshot_adopt",
            Self::DropOrphan => "snapshot_drop_orphan",
            Self::Clear => "snapshot_clear",
            Self::Remove => "snapshot_remove",
        }
    }

    /// The phase of a snapshot whose step this is.
    pub fn phase(self) -> SnapshotPhase {
        match self {
            Self::Take | Self::Adopt => SnapshotPhase::Copying,
            Self::Describe | Self::Verify => SnapshotPhase::Committing,
            Self::Export | Self::DropOrphan => SnapshotPhase::Ready,
            Self::Clear | Self::Remove => SnapshotPhase::Deleting,
        }
    }
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Do this, then look again.
    Do(Step),
    /// Nothing now.
    Wait {
        /// For what.
        message: &'static str,
        /// Look again then.
        until: Option<Timestamp>,
    },
    /// It will not become a version, or is none any more.
    Fail {
        /// Why, in a word.
        reason: Reason,
        /// Why.
        message: String,
    },
    /// As its status says.
    Settled,
    /// Nothing of it is left that only its object would free.
    Removed,
}

/// What to do next. `error` is the last error of a step that is being tried again.
pub fn plan(wanted: &Wanted, found: &Found, error: Option<&str>, now: Timestamp) -> Next {
    if wanted.deleted {
        let left = found.committed || found.copy || found.folder;
        return if left { Next::Do(Step::Remove) } else { Next::Removed };
    }
    match wanted.phase {
        SnapshotPhase::Ready if !found.committed => {
            return Next::Fail {
                reason: Reason::SnapshotLost,
                message: "the version is gone from containerd on its node: somebody removed it".to_owned(),
            };
        }
        // What it waited for may be asked for again, and what it was to be may have come to be all the same: a layer that was
        // committed in place is nowhere else.
        SnapshotPhase::Failed if wanted.in_place && (found.committed || found.orphan || found.bot == Bot::LetsGo) => {}
        SnapshotPhase::Failed if found.copy => return Next::Do(Step::Clear),
        SnapshotPhase::Ready if found.orphan => return Next::Do(Step::DropOrphan),
        SnapshotPhase::Ready if wanted.export && !found.exported => return Next::Do(Step::Export),
        SnapshotPhase::Ready | SnapshotPhase::Failed => return Next::Settled,
        _ => {}
    }
    if found.committed {
        return Next::Do(if found.manifest { Step::Verify } else { Step::Describe });
    }
    if wanted.in_place {
        let lost = |message: &str| Next::Fail { reason: Reason::SnapshotFailed, message: message.to_owned() };
        return match found.bot {
            Bot::Gone if found.orphan => Next::Do(Step::Adopt),
            Bot::Gone => lost("the bot is gone from the node, and left no layer to be kept"),
            Bot::NoLayer | Bot::Layer => lost(
                "what it was to be made for is not asked for any more, or the layer was removed by somebody's hand",
            ),
            Bot::LetsGo => {
                Next::Wait { message: "the bot's layer becomes this version once it has no process", until: None }
            }
        };
    }
    let waits = match found.bot {
        Bot::Gone => Some("the bot is bound to this node, and is not seen here yet"),
        Bot::NoLayer => Some("the bot has no layer yet: it was not started"),
        Bot::Layer | Bot::LetsGo => None,
    };
    if now >= wanted.deadline {
        let cause = waits.or(error).unwrap_or("it was not finished");
        let message = format!("spec.failureDeadlineSeconds are over: {cause}");
        return Next::Fail { reason: Reason::DeadlineExceeded, message };
    }
    match waits {
        Some(message) => Next::Wait { message, until: Some(wanted.deadline) },
        None => Next::Do(Step::Take),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn wanted() -> Wanted {
        Wanted {
            version: Version {
                uid: "su".into(),
                name: "before".into(),
                namespace: "team-a".into(),
                bot_id: "web".into(),
                number: 3,
                orphan: false,
            },
            bot: BotUid::parse("2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11").unwrap(),
            in_place: false,
            stopped: false,
            max_freeze_millis: 1000,
            deadline: at(300),
            deleted: false,
            phase: SnapshotPhase::Pending,
            export: false,
        }
    }

    fn all() -> impl Iterator<Item = Found> {
        (0..64).flat_map(|bits| {
            [Bot::Gone, Bot::NoLayer, Bot::Layer, Bot::LetsGo].map(|bot| Found {
                committed: bits & 1 != 0,
                copy: bits & 2 != 0,
                manifest: bits & 4 != 0,
                folder: bits & 8 != 0,
                exported: bits & 16 != 0,
                orphan: bits & 32 != 0,
                bot,
            })
        })
    }

    #[test]
    fn a_live_bot_is_copied_and_what_was_committed_is_read_back() {
        let found = Found { bot: Bot::Layer, ..Found::default() };
        assert_eq!(plan(&wanted(), &found, None, at(0)), Next::Do(Step::Take));
        assert_eq!(
            plan(&wanted(), &Found { copy: true, ..found }, None, at(0)),
            Next::Do(Step::Take),
            "cut off: again"
        );
        let committed = Found { committed: true, manifest: true, ..found };
        assert_eq!(plan(&wanted(), &committed, None, at(0)), Next::Do(Step::Verify));
        assert_eq!(plan(&wanted(), &committed, None, at(999)), Next::Do(Step::Verify), "what is made is no more late");
        assert_eq!(plan(&wanted(), &Found { bot: Bot::Gone, ..committed }, None, at(0)), Next::Do(Step::Verify));
    }

    #[test]
    fn what_is_not_there_in_time_fails_with_what_it_waited_for() {
        for (bot, error, words) in [
            (Bot::Gone, None, "not seen here"),
            (Bot::NoLayer, Some("x"), "no layer yet"),
            (Bot::Layer, Some("no space left"), "no space left"),
            (Bot::Layer, None, "not finished"),
        ] {
            let found = Found { bot, ..Found::default() };
            let Next::Fail { reason, message } = plan(&wanted(), &found, error, at(300)) else { panic!("{bot:?}") };
            assert!(reason == Reason::DeadlineExceeded && message.contains(words), "{message}");
            if bot != Bot::Layer {
                let Next::Wait { until, .. } = plan(&wanted(), &found, error, at(299)) else { panic!("{bot:?}") };
                assert_eq!(until, Some(at(300)));
            }
        }
    }

    #[test]
    fn what_a_deleted_bot_leaves_waits_for_no_deadline() {
        let kept = Wanted { in_place: true, ..wanted() };
        let found = Found { bot: Bot::LetsGo, ..Found::default() };
        assert!(matches!(plan(&kept, &found, None, at(9999)), Next::Wait { until: None, .. }));
        let kept_on = Found { bot: Bot::Layer, ..Found::default() };
        assert!(matches!(plan(&kept, &kept_on, None, at(0)), Next::Fail { reason: Reason::SnapshotFailed, .. }));
        let committed = Found { committed: true, ..Found::default() };
        assert_eq!(plan(&kept, &committed, None, at(9999)), Next::Do(Step::Describe), "though its bot is gone");
        assert!(matches!(
            plan(&kept, &Found::default(), None, at(0)),
            Next::Fail { reason: Reason::SnapshotFailed, .. }
        ));
    }

    #[test]
    fn a_layer_that_was_committed_in_place_is_a_version_though_it_was_given_up() {
        let failed = Wanted { in_place: true, phase: SnapshotPhase::Failed, ..wanted() };
        let committed = Found { committed: true, ..Found::default() };
        assert_eq!(plan(&failed, &committed, None, at(0)), Next::Do(Step::Describe));
        let again = Found { bot: Bot::LetsGo, ..Found::default() };
        assert!(matches!(plan(&failed, &again, None, at(0)), Next::Wait { .. }));
        assert_eq!(plan(&failed, &Found::default(), None, at(0)), Next::Settled);
    }

    #[test]
    fn a_deleted_snapshot_leaves_nothing_and_nothing_is_made_of_it() {
        for phase in [SnapshotPhase::Pending, SnapshotPhase::Copying, SnapshotPhase::Ready, SnapshotPhase::Failed] {
            let gone = Wanted { deleted: true, phase, ..wanted() };
            for found in all() {
                let left = found.committed || found.copy || found.folder;
                let next = if left { Next::Do(Step::Remove) } else { Next::Removed };
                assert_eq!(plan(&gone, &found, None, at(0)), next);
            }
        }
    }

    #[test]
    fn an_image_is_made_of_what_is_ready_and_of_nothing_else() {
        for phase in [SnapshotPhase::Pending, SnapshotPhase::Committing, SnapshotPhase::Failed, SnapshotPhase::Ready] {
            for found in all() {
                let wanted = Wanted { export: true, phase, ..wanted() };
                let due = phase == SnapshotPhase::Ready && found.committed && !found.orphan && !found.exported;
                assert_eq!(plan(&wanted, &found, None, at(0)) == Next::Do(Step::Export), due, "{phase:?} {found:?}");
                let gone = Wanted { deleted: true, ..wanted };
                assert_ne!(plan(&gone, &found, None, at(0)), Next::Do(Step::Export), "deletion wins");
            }
        }
    }

    #[test]
    fn what_was_left_without_an_object_is_copied_and_goes_once_the_copy_was_read_back() {
        let left = Found { orphan: true, ..Found::default() };
        let wanted = Wanted { in_place: true, ..wanted() };
        let next = |found: &Found, phase| plan(&Wanted { phase, ..wanted.clone() }, found, None, at(999));
        assert_eq!(next(&left, SnapshotPhase::Pending), Next::Do(Step::Adopt));
        assert_eq!(
            next(&Found { copy: true, ..left }, SnapshotPhase::Copying),
            Next::Do(Step::Adopt),
            "cut off: again"
        );
        assert_eq!(next(&left, SnapshotPhase::Failed), Next::Do(Step::Adopt), "what is there is not given up");
        let made = Found { committed: true, manifest: true, folder: true, ..left };
        assert_eq!(next(&made, SnapshotPhase::Committing), Next::Do(Step::Verify));
        assert_eq!(next(&made, SnapshotPhase::Ready), Next::Do(Step::DropOrphan));
        assert_eq!(next(&Found { orphan: false, ..made }, SnapshotPhase::Ready), Next::Settled);
    }

    #[test]
    fn what_is_over_is_left_alone_and_a_loss_is_told() {
        for found in all() {
            let failed = plan(&Wanted { phase: SnapshotPhase::Failed, ..wanted() }, &found, None, at(999));
            // The evidence stays: only what was never committed goes.
            assert_eq!(failed, if found.copy { Next::Do(Step::Clear) } else { Next::Settled });
            let ready = plan(&Wanted { phase: SnapshotPhase::Ready, ..wanted() }, &found, None, at(999));
            match ready {
                Next::Do(Step::DropOrphan) => assert!(found.committed && found.orphan),
                Next::Settled => assert!(found.committed && !found.orphan),
                Next::Fail { reason: Reason::SnapshotLost, .. } => assert!(!found.committed),
                other => panic!("{other:?}"),
            }
        }
    }
}
