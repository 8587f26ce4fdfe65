//! Which scheduled snapshots go. Pure.
//!
//! Only what a schedule made is ever removed: never what a person asked for, what a rollback replaced, what an image change or a
//! deletion left. The newest `keepLast` that are Ready stay, and the newest that failed, for people to see why.

use crate::api::bot_snapshot::{SnapshotPhase, SnapshotSource};

/// A snapshot, as far as this looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// Who asked for it.
    pub source: SnapshotSource,
    /// Where it stands.
    pub phase: SnapshotPhase,
    /// Its number; 0 where it has none.
    pub version: i64,
    /// A rollback or a bot that is yet to start names it.
    pub in_use: bool,
}

/// The names of those that go.
pub fn surplus(snapshots: &[Kept], keep_last: usize) -> Vec<String> {
    let mut surplus = Vec::new();
    for (phase, keep) in [(SnapshotPhase::Ready, keep_last.max(1)), (SnapshotPhase::Failed, 1)] {
        let mut of_phase: Vec<&Kept> =
            snapshots.iter().filter(|s| s.source == SnapshotSource::Scheduled && s.phase == phase).collect();
        of_phase.sort_by(|a, b| (b.version, &b.name).cmp(&(a.version, &a.name)));
        surplus.extend(of_phase.into_iter().skip(keep).filter(|s| !s.in_use).map(|s| s.name.clone()));
    }
    surplus.sort_unstable();
    surplus
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::select;

    fn any_kept() -> impl Strategy<Value = Kept> {
        let sources = vec![
            SnapshotSource::Manual,
            SnapshotSource::Preserved,
            SnapshotSource::Rollback,
            SnapshotSource::PreImageChange,
            SnapshotSource::Scheduled,
            SnapshotSource::Scheduled,
            SnapshotSource::Scheduled,
        ];
        let phases = vec![SnapshotPhase::Ready, SnapshotPhase::Ready, SnapshotPhase::Copying, SnapshotPhase::Failed];
        (select(sources), select(phases), any::<bool>()).prop_map(|(source, phase, in_use)| Kept {
            name: String::new(),
            source,
            phase,
            version: 0,
            in_use,
        })
    }

    proptest! {
        #[test]
        fn only_old_scheduled_ones_go(mut all in prop::collection::vec(any_kept(), 0..40), keep in 0..9_usize, turn in any::<usize>()) {
            for (n, kept) in all.iter_mut().enumerate() {
                (kept.version, kept.name) = (n as i64 + 1, format!("s{n:02}"));
            }
            let gone = surplus(&all, keep);
            let is_gone = |kept: &&Kept| gone.contains(&kept.name);
            for kept in all.iter().filter(is_gone) {
                prop_assert!(kept.source == SnapshotSource::Scheduled && !kept.in_use, "{kept:?}");
                prop_assert!(matches!(kept.phase, SnapshotPhase::Ready | SnapshotPhase::Failed), "{kept:?}");
            }
            let ready: Vec<&Kept> = all
                .iter()
                .filter(|k| k.source == SnapshotSource::Scheduled && k.phase == SnapshotPhase::Ready)
                .collect();
            let newest = ready.len().saturating_sub(keep.max(1));
            prop_assert!(ready[newest..].iter().all(|kept| !is_gone(kept)), "one of the newest goes");
            prop_assert!(ready[..newest].iter().all(|kept| kept.in_use || is_gone(kept)), "a surplus one stays");
            // Whatever the order, and nothing more when it is done.
            let mut turned = all.clone();
            turned.rotate_left(turn % all.len().max(1));
            prop_assert_eq!(&surplus(&turned, keep), &gone);
            all.retain(|kept| !gone.contains(&kept.name));
            prop_assert!(surplus(&all, keep).is_empty());
        }
    }
}
