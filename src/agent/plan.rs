//! `plan(desired, observed, now)`: the next step, or that nothing is to be done. Pure.
//!
//! ```text
//! gone      task live? -> Stop .. Kill -> Reap -> Remove(layer, network, output) -> RemoveContainer -> Settled(Removed)
//! retained  as gone where there is no layer, else
//!           task live? -> Stop .. Kill -> Reap -> Remove(network, output)                           -> Settled(Retained)
//!           its version is given? -> Preserve, and then as gone
//! held      task live? -> Stop .. Kill -> Reap                                                      -> Settled(Held)
//! image     settled otherwise? -> PullAside; the snapshot before it is there? -> Stop .. Kill -> Reap -> CarryData -> SwitchLayer
//!           and then as before; SettleReplaced once it runs, SwitchBack where the image is set back before that
//! rollback  settled otherwise? -> CopyAside; what it replaces has its number? -> Stop .. Kill -> Reap -> SwitchLayer
//!           -> SettleReplaced, and then as before
//! stopped   task live? -> Stop .. Kill -> Reap -> Remove(network, output)                           -> Settled(Stopped)
//! all       something left of a task that containerd does not know? -> PutAway
//! alive     an end to note? -> Reap / RecordLost
//!           task live, spec changed -> Stop .. Kill -> Reap
//!           no task: may it start? -> Prepare(missing parts) -> WriteContainer -> CreateTask -> StartAttempt
//!                                                                                                   -> Settled(Running)
//! refused   an end to note? an order to carry out? a logger to mend? else as it is                  -> Settled(Refused)
//! ```
//!
//! Take down before building up: no way leads to `StartAttempt` while a task of the bot is there that was begun, or what
//! is left of one (invariant 2), none to `RecordLost` while something of it may live, and none to removing a layer but from a goal of `Gone` (invariant 1).

use std::time::Duration;

use jiff::Timestamp;

use crate::api::bot_container::{Kept, NetworkMode, RestartPolicy};
use crate::api::bot_snapshot::{SnapshotPhase, SnapshotSource, automatic_name, image_change_cause};

use super::desired::{Alive, Desired, Goal, Keep, Refusal, Rollback, Target};
use super::observe::{Attached, Container, Observed, Output, Task};
use super::record::{Aside, AsideFor, Life, Record, backoff};
use super::step::{Parts, Step};

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Do this, then look again.
    Do(Step),
    /// Nothing to do now.
    Settled {
        /// Where the bot stands.
        state: State,
        /// Look again then, even if nothing happens.
        until: Option<Timestamp>,
    },
}

/// Where a bot stands while there is nothing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing of it is left.
    Removed,
    /// It is deleted, and its layer is kept until it can become a version.
    Retained,
    /// It has no process, for a snapshot.
    Held,
    /// It waits for the version that a rollback makes of what it replaces.
    WaitingForSnapshot,
    /// It runs as asked.
    Running,
    /// It is frozen, or was made without being started, as asked.
    Paused {
        /// What is kept of it.
        kept: Kept,
        /// It was frozen, and its memory is gone since (reboot).
        memory_lost: bool,
    },
    /// Frozen, and a change waits for the restart that it needs.
    RestartPending,
    /// No process, as asked.
    Stopped,
    /// TERM was sent.
    Stopping,
    /// Ended by itself with 0, and is not to be restarted.
    Completed,
    /// Ended by itself otherwise, and is not to be restarted.
    Failed,
    /// Ended by itself, and is restarted later.
    BackOff,
    /// The spec can't be run here.
    Refused(Refusal),
    /// containerd has something under the bot's id that is not Berth's.
    Foreign {
        /// What makes it foreign.
        why: String,
    },
    /// The image was changed, and what has to come first failed.
    ImageChange,
}

impl Next {
    fn settled(state: State) -> Self {
        Self::Settled { state, until: None }
    }
}

/// What to do next for one bot. Total: every pair has an answer.
pub fn plan(desired: &Desired, observed: &Observed, now: Timestamp) -> Next {
    let record = match &observed.container {
        // What we can't tell to be ours we neither stop nor remove; the rest of a deleted bot goes all the same.
        Container::Foreign { why } => {
            return match &desired.goal {
                Goal::Gone { .. } => remove_all(observed),
                Goal::Retained { .. } => retained(desired, observed),
                _ => Next::settled(State::Foreign { why: why.clone() }),
            };
        }
        // Whether it may run again its lost note can't tell any more.
        Container::Garbled { why } if !matches!(desired.goal, Goal::Gone { .. }) => {
            return Next::settled(State::Foreign { why: why.clone() });
        }
        Container::Ours(record) => Some(&**record),
        Container::Absent | Container::Garbled { .. } => None,
    };
    match &desired.goal {
        Goal::Gone { grace } => take_down(record, observed, *grace, now).unwrap_or_else(|| remove_all(observed)),
        Goal::Retained { grace } => {
            take_down(record, observed, *grace, now).unwrap_or_else(|| retained(desired, observed))
        }
        Goal::Stopped { grace } => {
            let next = take_down(record, observed, *grace, now).unwrap_or_else(|| stopped(record, observed));
            let down = || take_down(record, observed, *grace, now);
            replace_layer(desired, record, has_layer(observed), next, down)
        }
        Goal::Held { grace } => take_down(record, observed, *grace, now).unwrap_or_else(|| Next::settled(State::Held)),
        Goal::Refused { grace, refusal } => record
            .and_then(|record| leave_alone(record, observed, *grace, now))
            .unwrap_or_else(|| Next::settled(State::Refused(refusal.clone()))),
        Goal::Alive(alive) => {
            let next = keep_alive(alive, record, observed, now);
            // Its memory is kept for as long as it is to be frozen: a rollback waits as any change that takes a restart.
            let waits = alive.paused && matches!(observed.task, Task::Paused { .. });
            let down = || match waits {
                true => Some(Next::settled(State::RestartPending)),
                false => take_down(record, observed, alive.grace, now),
            };
            replace_layer(desired, record, has_layer(observed), next, down)
        }
    }
}

/// What is to take the place of the bot's layer.
enum Successor<'a> {
    /// A copy of a version.
    Version(&'a Target),
    /// A layer on another image, with the bot's data.
    Image(&'a Alive),
}

impl Successor<'_> {
    /// A layer that is gone has nothing to be carried over: the bot starts from the other image.
    fn of<'a>(desired: &'a Desired, record: &Record, has_layer: bool) -> Option<Successor<'a>> {
        match (&desired.rollback, &desired.goal) {
            (Some(Rollback::To(target)), _) if record.rollback.as_ref() != Some(&target.id) => {
                Some(Successor::Version(target))
            }
            (_, Goal::Alive(alive)) if has_layer && record.image != alive.image.to_string() => {
                Some(Successor::Image(alive))
            }
            _ => None,
        }
    }

    /// Whether a layer was made beside for it.
    fn is_made(&self, aside: &Aside) -> bool {
        match (self, &aside.for_) {
            (Self::Version(target), AsideFor::Rollback { id, snapshot }) => {
                (id, snapshot) == (&target.id, &target.version.uid)
            }
            (Self::Image(alive), AsideFor::Image { image, .. }) => *image == alive.image.to_string(),
            _ => false,
        }
    }

    /// What has to be there before the bot is stopped for it.
    fn snapshot(&self, desired: &Desired, record: &Record) -> Before {
        match self {
            Self::Version(target) if target.keep == Keep::Awaited => Before::Awaited,
            Self::Version(_) => Before::Enough,
            Self::Image(alive) => {
                if alive.spec.snapshot_policy.as_ref().is_some_and(|policy| !policy.before_image_change) {
                    return Before::Enough;
                }
                let name = before_image_name(desired, record, alive);
                match desired.before_image.iter().find(|(made, _)| *made == name) {
                    Some((_, SnapshotPhase::Ready)) => Before::Enough,
                    Some((_, SnapshotPhase::Failed)) => Before::Failed,
                    _ => Before::Awaited,
                }
            }
        }
    }
}

/// Whether the snapshot is there that comes first.
enum Before {
    Enough,
    Awaited,
    Failed,
}

/// Name of the snapshot that is made before a bot moves to another image.
pub fn before_image_name(desired: &Desired, record: &Record, alive: &Alive) -> String {
    let cause = image_change_cause(&alive.spec.image, &record.layer);
    automatic_name(&desired.name, desired.uid.as_str(), SnapshotSource::PreImageChange, &cause)
}

/// What a rollback or another image makes of the step that would come without one; `down` leads to no task.
///
/// What can be made beside is made while the bot is as it was; only what is made, and whose snapshot is there, is worth a stop. From
/// then on all leads down, to the switch, and up again on the other layer.
fn replace_layer(
    desired: &Desired,
    record: Option<&Record>,
    has_layer: bool,
    next: Next,
    down: impl FnOnce() -> Option<Next>,
) -> Next {
    let Some(record) = record else { return next };
    let successor = Successor::of(desired, record, has_layer);
    // An end to be noted, an order to be carried out, something on its way up: first what is under way.
    let idle = matches!(&next, Next::Settled { state, .. } if *state != State::Stopping);
    let first = |before: Before, step: Step, down: &mut dyn FnMut() -> Option<Next>| match before {
        Before::Enough => down().unwrap_or(Next::Do(step)),
        _ if !idle => next.clone(),
        Before::Awaited => Next::settled(State::WaitingForSnapshot),
        Before::Failed => Next::settled(State::ImageChange),
    };
    let mut down = Some(down);
    let mut down = || down.take().and_then(|down| down());
    if let Some(replaced) = &record.replaced {
        if let Some(Successor::Image(alive)) = &successor
            && replaced.keep.is_none()
            && replaced.image == alive.image.to_string()
        {
            // Set back before the bot ran on the other image: its layer is where it was.
            let before = Successor::Image(alive).snapshot(desired, record);
            return first(before, Step::SwitchBack, &mut down);
        }
        // What is kept is kept at once: it takes no time. What goes, goes once the bot is on the other layer as it was asked, or
        // that one is to be replaced in turn.
        let settled = matches!(
            &next,
            Next::Settled { state: State::Running | State::Paused { .. } | State::Stopped | State::Completed, .. }
        );
        let over = replaced.keep.is_some() || settled || successor.is_some();
        return if over { Next::Do(Step::SettleReplaced) } else { next };
    }
    let Some(aside) = &record.aside else {
        return match successor {
            Some(Successor::Version(_)) if idle => Next::Do(Step::CopyAside),
            Some(Successor::Image(_)) if idle => Next::Do(Step::PullAside),
            _ => next,
        };
    };
    match successor {
        Some(successor) if successor.is_made(aside) => {
            let step = match (&successor, aside.complete) {
                (_, true) => Step::SwitchLayer,
                (Successor::Image(_), false) => Step::CarryData,
                (Successor::Version(_), false) => return if idle { Next::Do(Step::CopyAside) } else { next },
            };
            first(successor.snapshot(desired, record), step, &mut down)
        }
        _ if idle => Next::Do(Step::DropAside),
        _ => next,
    }
}

/// Neither up nor down: what ended is noted, what was ordered is carried out, and output is drained. `None` else.
fn leave_alone(record: &Record, observed: &Observed, grace: Duration, now: Timestamp) -> Option<Next> {
    match observed.task {
        Task::Stopped { .. } | Task::Unknown => Some(Next::Do(Step::Reap)),
        Task::Leftover => Some(Next::Do(Step::PutAway)),
        Task::Absent if matches!(record.life, Life::Started { .. }) => Some(Next::Do(Step::RecordLost)),
        Task::Absent | Task::Created => None,
        task if record.stop_ordered.is_some() => Some(stop(record, task, grace, now)),
        // A process that nobody drains stands still at its next write.
        _ if observed.output != Output::Drained => {
            Some(Next::Do(Step::Prepare(Parts { output: true, ..Parts::default() })))
        }
        _ => None,
    }
}

/// Towards no task. `None` once there is none and its end is noted.
fn take_down(record: Option<&Record>, observed: &Observed, grace: Duration, now: Timestamp) -> Option<Next> {
    let Some(record) = record else { return unexplained(observed.task) };
    match observed.task {
        Task::Absent if matches!(record.life, Life::Started { .. }) => Some(Next::Do(Step::RecordLost)),
        Task::Absent => None,
        Task::Leftover => Some(Next::Do(Step::PutAway)),
        Task::Stopped { .. } | Task::Unknown => Some(Next::Do(Step::Reap)),
        // Never ran: nothing to be polite to.
        Task::Created => Some(kill(record, now)),
        Task::Running { .. } | Task::Paused { .. } => Some(stop(record, observed.task, grace, now)),
    }
}

/// containerd shows no task without a container; one that it shows all the same is ended, since nobody knows what it is.
fn unexplained(task: Task) -> Option<Next> {
    match task {
        Task::Absent => None,
        Task::Leftover => Some(Next::Do(Step::PutAway)),
        Task::Stopped { .. } | Task::Unknown => Some(Next::Do(Step::Reap)),
        Task::Created | Task::Running { .. } | Task::Paused { .. } => Some(Next::Do(Step::Kill)),
    }
}

/// TERM, then KILL when the grace period is over.
fn stop(record: &Record, task: Task, grace: Duration, now: Timestamp) -> Next {
    // An order from the future means that the clock was set back. How long ago it was can't be told, and to reckon from
    // now at each look would put the end off for ever: it is given again, which notes a time of the new clock.
    let ordered = record.stop_ordered.filter(|at| record.stop_sent && *at <= now);
    let Some(ordered) = ordered else { return Next::Do(Step::Stop) };
    // A frozen process answers no signal, and on cgroup v1 not even KILL (runc #3134): it is thawed first.
    if matches!(task, Task::Paused { .. }) {
        return Next::Do(Step::Resume);
    }
    let deadline = ordered.saturating_add(grace).unwrap_or(Timestamp::MAX);
    if now < deadline {
        return Next::Settled { state: State::Stopping, until: Some(deadline) };
    }
    kill(record, now)
}

/// How long an ordered KILL may take to be seen before it is sent again.
pub const KILL_AGAIN: Duration = Duration::from_secs(2);

/// KILL, and again while it shows no effect: a process in uninterruptible sleep takes its time, and the agent may have
/// died between noting the order and sending it.
fn kill(record: &Record, now: Timestamp) -> Next {
    let again = record.kill_ordered.and_then(|at| at.checked_add(KILL_AGAIN).ok());
    match again {
        // A time further away than the wait itself means that the clock was set back.
        Some(again) if now < again && again <= now.saturating_add(KILL_AGAIN).unwrap_or(now) => {
            Next::Settled { state: State::Stopping, until: Some(again) }
        }
        _ => Next::Do(Step::Kill),
    }
}

fn stopped(record: Option<&Record>, observed: &Observed) -> Next {
    let unwanted = Parts {
        network: observed.network != Attached::Absent,
        output: observed.output != Output::Absent,
        ..Parts::default()
    };
    if unwanted.any() {
        return Next::Do(Step::Remove(unwanted));
    }
    match record {
        Some(record) if record.life == Life::Ended => Next::Do(Step::SettleEnd),
        _ => Next::settled(State::Stopped),
    }
}

/// What a process needs goes, the files stay. Without a layer there is nothing to keep.
fn retained(desired: &Desired, observed: &Observed) -> Next {
    let unwanted = Parts {
        network: observed.network != Attached::Absent,
        output: observed.output != Output::Absent,
        ..Parts::default()
    };
    match &observed.layer {
        None => remove_all(observed),
        // What it is to be filled with is a version already, and nothing else is in it.
        Some(layer) if layer.filling => remove_all(observed),
        // What a rollback replaced becomes the version that it is to be before the rest does.
        Some(_) if observed.record().is_some_and(|record| record.replaced.is_some()) => Next::Do(Step::SettleReplaced),
        Some(_) if unwanted.any() => Next::Do(Step::Remove(unwanted)),
        Some(_) if desired.preserve.is_some() => Next::Do(Step::Preserve),
        Some(_) => Next::settled(State::Retained),
    }
}

fn remove_all(observed: &Observed) -> Next {
    let left = Parts {
        layer: observed.layer.is_some(),
        network: observed.network != Attached::Absent,
        output: observed.output != Output::Absent,
        ..Parts::default()
    };
    if left.any() {
        return Next::Do(Step::Remove(left));
    }
    match observed.container {
        Container::Ours(_) | Container::Garbled { .. } => Next::Do(Step::RemoveContainer),
        Container::Absent | Container::Foreign { .. } => Next::settled(State::Removed),
    }
}

fn keep_alive(alive: &Alive, record: Option<&Record>, observed: &Observed, now: Timestamp) -> Next {
    let Some(record) = record else {
        return unexplained(observed.task).unwrap_or_else(|| build_up(alive, None, observed));
    };
    let changed = !record.is_for(alive);
    let image_changed = has_layer(observed) && record.image != alive.image.to_string();
    match observed.task {
        Task::Stopped { .. } | Task::Unknown => Next::Do(Step::Reap),
        Task::Leftover => Next::Do(Step::PutAway),
        Task::Absent => match record.life {
            Life::Started { .. } => Next::Do(Step::RecordLost),
            Life::Ended if changed => Next::Do(Step::SettleEnd),
            Life::Ended => ended(alive, record, observed, now),
            Life::Fresh if image_changed => Next::settled(State::ImageChange),
            Life::Fresh => build_up(alive, Some(record), observed),
        },
        Task::Created => {
            let stale = changed
                || record.spec_for != record.next_attempt()
                || observed.output != Output::Drained
                || (record.life == Life::Ended && !restarts(alive, record));
            if stale || alive.paused || record.stop_ordered.is_some() || !has_namespace(alive, observed) {
                // Made from what is no longer asked, in a namespace that has to go, or with nobody to drain it; it never
                // ran.
                kill(record, now)
            } else if !is_connected(alive, observed) {
                Next::Do(Step::CreateTask { connect: true })
            } else {
                Next::Do(Step::StartAttempt)
            }
        }
        task @ (Task::Running { .. } | Task::Paused { .. }) => {
            let frozen = matches!(task, Task::Paused { .. });
            if record.stop_ordered.is_some() {
                // An order once given is carried out: the process may be half-way down already.
                return stop(record, task, alive.grace, now);
            }
            // Never down for what can't come up again: a change of the image, which this agent can't do, holds up the
            // restart that another change needs.
            let restart = changed && !image_changed;
            if restart && frozen && alive.paused {
                return Next::settled(State::RestartPending);
            }
            if restart {
                return stop(record, task, alive.grace, now);
            }
            if observed.output != Output::Drained {
                return Next::Do(Step::Prepare(Parts { output: true, ..Parts::default() }));
            }
            if record.limits != alive.limits {
                return Next::Do(Step::UpdateLimits);
            }
            match (frozen, alive.paused) {
                (false, true) => Next::Do(Step::Pause),
                (true, false) => Next::Do(Step::Resume),
                _ if record.skills != alive.skills => Next::Do(Step::WriteSkills),
                _ if image_changed => Next::settled(State::ImageChange),
                (true, true) => Next::settled(State::Paused { kept: Kept::MemoryAndFiles, memory_lost: false }),
                (false, false) => Next::settled(State::Running),
            }
        }
    }
}

/// Whether an attempt that ended by itself is followed by another.
fn restarts(alive: &Alive, record: &Record) -> bool {
    match alive.restart_policy {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => record.last.as_ref().is_some_and(|last| last.code != 0),
        RestartPolicy::Never => false,
    }
}

/// The last attempt ended by itself: the restart policy decides.
fn ended(alive: &Alive, record: &Record, observed: &Observed, now: Timestamp) -> Next {
    let code = record.last.as_ref().map_or(0, |last| last.code);
    if alive.paused {
        let memory_lost = record.last.as_ref().is_some_and(|last| last.reason == "TaskLost");
        return Next::settled(State::Paused { kept: Kept::Files, memory_lost });
    }
    if !restarts(alive, record) {
        // The network of a bot that will not run again is freed; its files and its record stay.
        let unwanted = Parts {
            network: observed.network != Attached::Absent,
            output: observed.output != Output::Absent,
            ..Parts::default()
        };
        if unwanted.any() {
            return Next::Do(Step::Remove(unwanted));
        }
        return Next::settled(if code == 0 { State::Completed } else { State::Failed });
    }
    let wait = backoff(record.failures);
    // An end in the future means that the clock was set back. To wait from now at each look would be to wait for ever:
    // one start comes early instead, and its end has a time of the new clock.
    let since = record.last.as_ref().map(|last| last.finished_at).filter(|at| *at <= now);
    if let Some(at) = since.and_then(|since| since.saturating_add(wait).ok())
        && now < at
    {
        return Next::Settled { state: State::BackOff, until: Some(at) };
    }
    if has_layer(observed) && record.image != alive.image.to_string() {
        return Next::settled(State::ImageChange);
    }
    build_up(alive, Some(record), observed)
}

/// Whether there is a layer with something of the bot's in it.
fn has_layer(observed: &Observed) -> bool {
    observed.layer.as_ref().is_some_and(|layer| !layer.filling)
}

/// Whether the network namespace is there that the process is to be in.
fn has_namespace(alive: &Alive, observed: &Observed) -> bool {
    alive.network == NetworkMode::Host || matches!(observed.network, Attached::Ready { .. })
}

/// Whether the network is all that was asked for.
fn is_connected(alive: &Alive, observed: &Observed) -> bool {
    match (alive.network, &observed.network) {
        (NetworkMode::Host, _) => true,
        (NetworkMode::None, network) => matches!(network, Attached::Ready { .. }),
        (NetworkMode::Bridge, network) => matches!(network, Attached::Ready { ips } if !ips.is_empty()),
    }
}

/// Towards a task, from none.
fn build_up(alive: &Alive, record: Option<&Record>, observed: &Observed) -> Next {
    // The namespace first: shim and runc need no more, and take longer than the addresses, which come beside them.
    let first = if alive.address_in_env { is_connected(alive, observed) } else { has_namespace(alive, observed) };
    let missing = Parts {
        layer: !has_layer(observed),
        namespace: !alive.paused && !first && !alive.address_in_env,
        network: !alive.paused && !first && alive.address_in_env,
        output: !alive.paused && observed.output != Output::Drained,
    };
    if missing.any() {
        return Next::Do(Step::Prepare(missing));
    }
    match record {
        // Created Paused: made, not started.
        Some(record) if alive.paused && record.is_for(alive) => {
            Next::settled(State::Paused { kept: Kept::Files, memory_lost: false })
        }
        Some(record)
            if record.is_for(alive)
                && record.limits == alive.limits
                && record.spec_for == record.next_attempt()
                && observed.layer.as_ref().is_some_and(|layer| record.stands_on(layer))
                && observed.files
                // An order to a task that never ran outlives it, and would kill the next one as well.
                && record.stop_ordered.is_none()
                && !alive.paused =>
        {
            Next::Do(Step::CreateTask { connect: !is_connected(alive, observed) })
        }
        _ => Next::Do(Step::WriteContainer),
    }
}

#[cfg(test)]
pub(super) mod tests;
