//! What the agent says of a snapshot. Pure. The agent's field manager owns all of the status but `botId`, `botUid`, `version`,
//! `source` and `nodeName`, which are the controller's.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::api::BotSnapshotStatus;
use crate::api::bot_container::ImageStatus;
use crate::api::bot_snapshot::SnapshotPhase;
use crate::api::condition::{ConditionType, Reason, api_time, condition, find};

use super::super::version::Taken;

/// What is to be said besides the facts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// One word for people.
    pub phase: SnapshotPhase,
    /// Reason of `Ready`.
    pub reason: Reason,
    /// Message of `Ready`.
    pub message: String,
    /// Whether what was committed is what was copied, once that is known.
    pub verified: Option<bool>,
    /// Why there is no OCI image of it, where one was asked for.
    pub not_exported: Option<(Reason, String)>,
}

impl Verdict {
    /// It is on its way, or failed.
    pub fn new(phase: SnapshotPhase, reason: Reason, message: impl Into<String>) -> Self {
        Self { phase, reason, message: message.into(), verified: None, not_exported: None }
    }

    /// What is said of it already.
    pub fn of(live: &BotSnapshotStatus) -> Self {
        let said = |type_| find(&live.conditions, type_);
        let reason = said(ConditionType::Ready).and_then(|c| Reason::parse(&c.reason)).unwrap_or(Reason::SnapshotReady);
        let message = said(ConditionType::Ready).map(|c| c.message.clone()).unwrap_or_default();
        let verified = said(ConditionType::Verified).map(|c| c.status != "False");
        Self { verified, ..Self::new(live.phase.unwrap_or_default(), reason, message) }
    }

    /// It is there, and was read back.
    pub fn ready() -> Self {
        let message = "the version is there; it was read back and is what was copied";
        Self { verified: Some(true), ..Self::new(SnapshotPhase::Ready, Reason::SnapshotReady, message) }
    }
}

/// The status to apply. `live` is the one on the object now: what was said of the version once stays said.
pub fn report(
    generation: Option<i64>,
    runtime_name: &str,
    verdict: &Verdict,
    taken: Option<&Taken>,
    live: Option<&BotSnapshotStatus>,
    now: Timestamp,
) -> BotSnapshotStatus {
    let old = live.map(|live| live.conditions.as_slice()).unwrap_or_default();
    let ready = verdict.phase == SnapshotPhase::Ready;
    let number = |number: Option<u64>| number.map(|number| i64::try_from(number).unwrap_or(i64::MAX));
    let image = taken.and_then(|taken| taken.exported.as_ref()).filter(|_| ready && verdict.not_exported.is_none());
    let mut status = BotSnapshotStatus {
        observed_generation: generation,
        phase: Some(verdict.phase),
        runtime_name: ready.then(|| runtime_name.to_owned()),
        parent: taken.map(|taken| taken.parent.clone()),
        snapshotter: taken.map(|taken| taken.snapshotter.clone()),
        image: taken.map(|taken| ImageStatus { reference: taken.image.clone(), digest: Some(taken.digest.clone()) }),
        taken: taken.map(|taken| taken.taken),
        frozen_millis: taken.and_then(|taken| number(Some(taken.frozen_millis))),
        size_bytes: taken.and_then(|taken| number(taken.size_bytes)),
        files: taken.and_then(|taken| number(taken.files)),
        changes: taken.and_then(|taken| taken.changes.clone()),
        taken_at: taken.map(|taken| api_time(taken.taken_at)),
        digest: image.map(|image| image.digest.clone()),
        export_bytes: image.and_then(|image| number(Some(image.bytes))),
        ready_at: ready.then(|| live.and_then(|live| live.ready_at.clone()).unwrap_or_else(|| api_time(now))),
        ..BotSnapshotStatus::default()
    };
    let mut say = |type_, value, reason, message: &str| {
        let new = condition(type_, value, reason, message, api_time(now));
        let since = find(old, type_).filter(|old| old.status == new.status).map(|old| old.last_transition_time.clone());
        status.conditions.push(Condition {
            last_transition_time: since.unwrap_or(api_time(now)),
            observed_generation: generation,
            ..new
        });
    };
    say(ConditionType::Ready, Some(ready), verdict.reason, &verdict.message);
    match verdict.verified {
        Some(true) if taken.is_some_and(|taken| taken.by_diff) => say(
            ConditionType::Verified,
            None,
            Reason::MadeByDiff,
            "containerd's own diff made it, for the snapshotter has no directory of a layer's own; it was read back, but could not be \
             compared with what the bot had",
        ),
        Some(true) => say(
            ConditionType::Verified,
            Some(true),
            Reason::Verified,
            "what was committed was read back and is what was copied",
        ),
        Some(false) => say(ConditionType::Verified, Some(false), verdict.reason, &verdict.message),
        None => {}
    }
    match (image, &verdict.not_exported) {
        (Some(image), _) => {
            let message = format!("an OCI image, manifest {}, is in the node's content store", image.digest);
            say(ConditionType::Exported, Some(true), Reason::Exported, &message);
        }
        (None, Some((reason, message))) => say(ConditionType::Exported, Some(false), *reason, message),
        (None, None) => {}
    }
    match verdict.phase {
        SnapshotPhase::Ready | SnapshotPhase::Deleting => {}
        SnapshotPhase::Failed => say(ConditionType::Stalled, Some(true), verdict.reason, &verdict.message),
        _ => say(ConditionType::Reconciling, Some(true), verdict.reason, &verdict.message),
    }
    status
}

/// Whether `live` already says what `wanted` does, as far as the agent's fields go.
pub fn says(live: Option<&BotSnapshotStatus>, wanted: &BotSnapshotStatus) -> bool {
    let Some(live) = live else { return false };
    let (mut own, mut wanted) = (live.clone(), wanted.clone());
    for status in [&mut own, &mut wanted] {
        status.bot_id = None;
        status.bot_uid = None;
        status.version = None;
        status.source = None;
        status.node_name = None;
        status.conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
    }
    own == wanted
}

#[cfg(test)]
mod tests {
    use super::super::super::version::Exported;
    use super::*;
    use crate::api::bot_snapshot::Taken as TakenState;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn taken() -> Taken {
        Taken {
            version: super::super::super::version::Version {
                uid: "su".into(),
                name: "before".into(),
                namespace: "team-a".into(),
                bot_id: "web".into(),
                number: 3,
                orphan: false,
            },
            taken_at: at(50),
            frozen_millis: 41,
            taken: TakenState::Live,
            parent: "sha256:1".into(),
            snapshotter: "overlayfs".into(),
            image: "docker.io/library/node:22".into(),
            digest: "sha256:2".into(),
            size_bytes: Some(1 << 20),
            files: Some(3),
            changes: None,
            exported: None,
            by_diff: false,
        }
    }

    #[test]
    fn a_version_that_is_ready_was_verified_and_keeps_its_times() {
        let first = report(Some(1), "berth-v-su", &Verdict::ready(), Some(&taken()), None, at(60));
        assert_eq!((first.ready_at.clone(), first.taken_at.clone()), (Some(api_time(at(60))), Some(api_time(at(50)))));
        assert_eq!((first.size_bytes, first.files, first.frozen_millis), (Some(1 << 20), Some(3), Some(41)));
        assert_eq!(first.runtime_name.as_deref(), Some("berth-v-su"));
        assert!(first.conditions.iter().all(|c| c.status == "True"), "{:?}", first.conditions);
        let again = report(Some(1), "berth-v-su", &Verdict::ready(), Some(&taken()), Some(&first), at(99));
        assert!(says(Some(&first), &again), "no difference, no write");
        let given = BotSnapshotStatus { version: Some(4), bot_id: Some("web".into()), ..first };
        assert!(says(Some(&given), &again), "what the controller says is none of ours");
    }

    #[test]
    fn an_image_is_told_once_it_is_there_and_why_it_is_not() {
        let waiting =
            Verdict { not_exported: Some((Reason::Exporting, "it is being made".to_owned())), ..Verdict::ready() };
        let first = report(Some(1), "v", &waiting, Some(&taken()), None, at(60));
        let said = |status: &BotSnapshotStatus| {
            find(&status.conditions, ConditionType::Exported).map(|c| (c.status.clone(), c.reason.clone()))
        };
        assert_eq!(said(&first), Some(("False".to_owned(), "Exporting".to_owned())));
        assert_eq!((first.phase, first.digest.clone()), (Some(SnapshotPhase::Ready), None));
        let image = Exported { digest: "sha256:9".to_owned(), bytes: 7 };
        let made = Taken { exported: Some(image), ..taken() };
        let then = report(Some(1), "v", &Verdict::ready(), Some(&made), Some(&first), at(61));
        assert_eq!(said(&then), Some(("True".to_owned(), "Exported".to_owned())));
        assert_eq!((then.digest.as_deref(), then.export_bytes), (Some("sha256:9"), Some(7)));
        let lost = report(Some(1), "v", &waiting, Some(&made), Some(&then), at(62));
        assert_eq!((said(&lost), lost.digest), (said(&first), None), "never claimed while it is not there");
    }

    #[test]
    fn what_is_said_already_is_said_again_for_a_newer_generation() {
        let corrupt = Verdict {
            verified: Some(false),
            ..Verdict::new(SnapshotPhase::Failed, Reason::SnapshotCorrupt, "other bytes")
        };
        for verdict in [Verdict::ready(), corrupt, Verdict::new(SnapshotPhase::Failed, Reason::SnapshotFailed, "no")] {
            let first = report(Some(1), "v", &verdict, Some(&taken()), None, at(60));
            assert_eq!(Verdict::of(&first), verdict);
            let again = report(Some(2), "v", &Verdict::of(&first), Some(&taken()), Some(&first), at(99));
            let same = BotSnapshotStatus { observed_generation: Some(1), ..again.clone() };
            assert!(
                again.observed_generation == Some(2) && same.phase == first.phase && same.ready_at == first.ready_at
            );
        }
    }

    #[test]
    fn kstatus_reads_every_phase() {
        for (phase, type_) in [
            (SnapshotPhase::Pending, Some("Reconciling")),
            (SnapshotPhase::Copying, Some("Reconciling")),
            (SnapshotPhase::Committing, Some("Reconciling")),
            (SnapshotPhase::Failed, Some("Stalled")),
            (SnapshotPhase::Deleting, None),
        ] {
            let status = report(Some(2), "v", &Verdict::new(phase, Reason::Copying, "words"), None, None, at(1));
            let ready = find(&status.conditions, ConditionType::Ready).unwrap();
            assert_eq!((ready.status.as_str(), status.observed_generation), ("False", Some(2)));
            let other = status.conditions.iter().find(|c| c.type_ != "Ready");
            assert_eq!(other.map(|c| c.type_.as_str()), type_, "{phase:?}");
            assert_eq!(status.runtime_name, None, "a name that nobody may use");
        }
    }
}
