//! Places where the agent can be made to die, so that tests can cut off each step before and after each thing it does.
//!
//! `BERTH_FAILPOINT=stop.signal.before` kills the agent with SIGKILL when it first comes there, `stop.signal.before:3` the
//! third time. Only debug builds read it: a release build only tells how long each effect took, in trace lines of this module
//! (`BERTH_LOG_FILTER=info,berth=trace`), which is where the time of a slow step is looked for.
//! `tests/e2e_faults.rs` walks [`Effect::ALL`] and fails for a point that was never reached.

use std::fmt;
use std::future::Future;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// What arms a point.
pub const VARIABLE: &str = "BERTH_FAILPOINT";

macro_rules! effects {
    ($($variant:ident = $name:literal,)*) => {
        /// Something that the agent changes outside of itself, named `STEP.what`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "the names say it")]
        pub enum Effect { $($variant,)* }

        impl Effect {
            /// All of them, in the order of a bot's way up and down.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

effects! {
    PreparePull = "prepare.pull",
    PrepareSnapshot = "prepare.snapshot",
    PrepareNamespace = "prepare.namespace",
    PrepareNetwork = "prepare.network",
    PrepareOutput = "prepare.output",
    WriteFiles = "write_container.files",
    WriteContainer = "write_container.container",
    CreateConnect = "create_task.connect",
    CreateOutput = "create_task.output",
    CreateTask = "create_task.create",
    StartNote = "start_attempt.note",
    StartStart = "start_attempt.start",
    StartNoteRefused = "start_attempt.note_refused",
    StartDeleteRefused = "start_attempt.delete_refused",
    Pause = "pause.pause",
    Resume = "resume.resume",
    LimitsUpdate = "update_limits.update",
    LimitsNote = "update_limits.note",
    SkillsWrite = "write_skills.write",
    SkillsNote = "write_skills.note",
    StopNote = "stop.note",
    StopSignal = "stop.signal",
    StopResume = "stop.resume",
    StopNoteSent = "stop.note_sent",
    KillNote = "kill.note",
    KillSignal = "kill.signal",
    ReapNote = "reap.note",
    ReapDelete = "reap.delete",
    ReapNoteOutput = "reap.note_output",
    PutAwayDelete = "put_away.delete",
    PutAwayRest = "put_away.rest",
    LostNote = "record_lost.note",
    SettleNote = "settle_end.note",
    RemoveNetwork = "remove.network",
    RemoveOutput = "remove.output",
    RemoveLayer = "remove.layer",
    RemoveLogs = "remove_container.logs",
    RemoveFiles = "remove_container.files",
    RemoveSpare = "remove_container.spare",
    RemoveContainer = "remove_container.container",
    AsideNote = "copy_aside.note",
    AsideCopy = "copy_aside.copy",
    AsideNoteDone = "copy_aside.note_done",
    PullAsideNote = "pull_aside.note",
    CarryPrepare = "carry_data.prepare",
    CarryCopy = "carry_data.copy",
    CarryNote = "carry_data.note",
    SwitchBackNote = "switch_back.note",
    AsideRemove = "drop_aside.remove",
    AsideForget = "drop_aside.note",
    SwitchNote = "switch_layer.note",
    ReplacedTaken = "settle_replaced.taken",
    ReplacedHold = "settle_replaced.hold",
    ReplacedCommit = "settle_replaced.commit",
    ReplacedRemove = "settle_replaced.remove",
    ReplacedNote = "settle_replaced.note",
    PreserveTaken = "preserve.taken",
    PreserveHold = "preserve.hold",
    PreserveCommit = "preserve.commit",
    RestoreCopy = "prepare.restore",
    SnapshotPrepare = "snapshot_take.prepare",
    SnapshotCopy = "snapshot_take.copy",
    SnapshotFreeze = "snapshot_take.freeze",
    SnapshotHold = "snapshot_take.hold",
    SnapshotCommit = "snapshot_take.commit",
    ExportLayer = "snapshot_export.layer",
    ExportImage = "snapshot_export.image",
    AdoptCopy = "snapshot_adopt.copy",
    AdoptCommit = "snapshot_adopt.commit",
    AdoptDrop = "snapshot_adopt.drop",
    SnapshotRemoveCopy = "snapshot_remove.copy",
    SnapshotRemove = "snapshot_remove.version",
    SnapshotStatus = "snapshot.status",
    StatusWrite = "status.write",
    StatusEvent = "status.event",
}

/// Before the effect, or after it was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Nothing of it has happened.
    Before,
    /// It was answered, well or not, and nothing was made of the answer.
    After,
}

/// Where the agent can be made to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Around what.
    pub effect: Effect,
    /// On which side of it.
    pub side: Side,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Before => "before",
            Side::After => "after",
        };
        write!(f, "{}.{side}", self.effect.name())
    }
}

impl Point {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let sides = |&effect| [Side::Before, Side::After].map(move |side| Self { effect, side });
        Effect::ALL.iter().flat_map(sides)
    }
}

/// Does what `effect` names, and tells how long it took; dies before or after it where that is armed.
pub async fn around<T>(effect: Effect, act: impl Future<Output = T>) -> T {
    reach(Point { effect, side: Side::Before });
    let began = Instant::now();
    let done = act.await;
    tracing::trace!(effect = effect.name(), took = ?began.elapsed(), "effect");
    reach(Point { effect, side: Side::After });
    done
}

fn reach(point: Point) {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    if !cfg!(debug_assertions) {
        return;
    }
    let armed = ARMED.get_or_init(|| {
        let text = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty())?;
        let armed = Armed::parse(&text);
        match &armed {
            Some(armed) => tracing::warn!(point = %armed.point, "armed: this agent kills itself there"),
            None => tracing::error!("{VARIABLE}={text} names no fail point; nothing is armed"),
        }
        armed
    });
    if armed.as_ref().is_some_and(|armed| armed.fires(point)) {
        tracing::warn!(%point, "killed by a fail point");
        // Not an exit: nobody may get a chance to tidy up.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

struct Armed {
    point: Point,
    /// How often it is passed before it fires.
    spare: AtomicU32,
}

impl Armed {
    /// `POINT`, or `POINT:N` for the N-th time.
    fn parse(text: &str) -> Option<Self> {
        let (name, nth) = match text.split_once(':') {
            Some((name, nth)) => (name, nth.parse().ok()?),
            None => (text, 1u32),
        };
        let point = Point::all().find(|point| point.to_string() == name)?;
        Some(Self { point, spare: AtomicU32::new(nth.checked_sub(1)?) })
    }

    fn fires(&self, point: Point) -> bool {
        let passed = |spare: u32| spare.checked_sub(1);
        // An error says that nothing was left to spare.
        point == self.point && self.spare.fetch_update(Ordering::Relaxed, Ordering::Relaxed, passed).is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_fires_at_its_nth_time_and_no_other_does() {
        let armed = Armed::parse("stop.signal.after:3").unwrap();
        let before = Point { effect: Effect::StopSignal, side: Side::Before };
        let after = Point { effect: Effect::StopSignal, side: Side::After };
        let fired: Vec<bool> = [after, before, after, before, after].map(|point| armed.fires(point)).to_vec();
        assert_eq!(fired, [false, false, false, false, true]);
        assert!(Armed::parse("pause.pause.before").unwrap().fires(Point { effect: Effect::Pause, side: Side::Before }));
        for wrong in ["", "stop.signal", "stop.signal.after:0", "stop.signal.after:x", "no.such.before"] {
            assert!(Armed::parse(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<String> = Point::all().map(|point| point.to_string()).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!((names.len(), count), (count, 2 * Effect::ALL.len()));
    }
}
