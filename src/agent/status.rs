//! What the agent says of a bot: (desired, observed, next, trouble) -> `BotContainerStatus`. Pure.
//!
//! Every fact comes out of `Observed`; `Desired` serves only to judge `Ready`. The agent's field manager owns all of the
//! status but `nodeName`, `botId`, `restoredFrom`, `lastVersion` and the condition `Scheduled`, which are the controller's.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::api::bot_container::{
    BotContainerStatus, BotResources, ImageStatus, Kept, NetworkMode, NetworkStatus, Phase, RollbackStatus, TaskStatus,
    Termination, Transition,
};
use crate::api::condition::{ConditionType, Reason, api_time, condition, find};

use super::desired::{Desired, Goal, Rollback};
use super::observe::{Attached, Container, Observed, Task};
use super::plan::{Next, State, before_image_name};
use super::record::{Life, Record};
use super::step::Step;

/// A step that failed, until it succeeds or is not wanted any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The step.
    pub step: Step,
    /// The condition's reason.
    pub reason: Reason,
    /// The error with its causes.
    pub message: String,
    /// Whether trying again can help.
    pub retryable: bool,
}

/// How many transitions a status keeps.
const TRANSITIONS: usize = 32;

/// What is to be said about `Ready`, and the phase that goes with it.
struct Verdict {
    phase: Phase,
    ready: Option<bool>,
    reason: Reason,
    message: String,
    stalled: bool,
}

impl Verdict {
    fn ready(phase: Phase, reason: Reason, message: &str) -> Self {
        Self { phase, ready: Some(true), reason, message: message.to_owned(), stalled: false }
    }

    fn working(phase: Phase, reason: Reason, message: impl Into<String>) -> Self {
        Self { phase, ready: Some(false), reason, message: message.into(), stalled: false }
    }

    fn stalled(phase: Phase, reason: Reason, message: impl Into<String>) -> Self {
        Self { phase, ready: Some(false), reason, message: message.into(), stalled: true }
    }
}

/// The status to apply. `live` is the one on the object now: times of conditions and the transitions go on from it.
pub fn report(
    generation: Option<i64>,
    desired: &Desired,
    observed: &Observed,
    next: &Next,
    trouble: Option<&Trouble>,
    live: Option<&BotContainerStatus>,
    now: Timestamp,
) -> BotContainerStatus {
    let record = observed.record();
    let mut verdict = judge(desired, observed, record, next, trouble);
    if verdict.ready == Some(true)
        && let Some(why) = unserved(desired, record)
    {
        verdict = Verdict::stalled(verdict.phase, Reason::RollbackFailed, why);
    }
    let network = match &observed.network {
        Attached::Ready { ips } if !ips.is_empty() => Some(NetworkStatus {
            ip: ips.first().map(ToString::to_string),
            ips: ips.iter().map(ToString::to_string).collect(),
        }),
        _ => None,
    };
    let (pid, frozen) = match observed.task {
        Task::Running { pid } => (Some(pid), false),
        Task::Paused { pid } => (Some(pid), true),
        _ => (None, false),
    };
    let task = pid.zip(record).and_then(|(pid, record)| match record.life {
        Life::Started { at } => Some(TaskStatus { pid: i64::from(pid), started_at: api_time(at) }),
        Life::Fresh | Life::Ended => None,
    });
    let image = record
        .map(|record| (&record.image, &record.digest))
        .or_else(|| observed.layer.as_ref().map(|layer| (&layer.image, &layer.digest)))
        .map(|(reference, digest)| ImageStatus { reference: reference.clone(), digest: Some(digest.clone()) });
    let resources = task
        .as_ref()
        .and(record)
        .and_then(|record| serde_json::from_str::<BotResources>(&record.limits).ok())
        .map(|resources| BotResources { requests: Default::default(), limits: resources.limits })
        .filter(|resources| !resources.limits.is_empty());
    let kept = match (&verdict.phase, frozen) {
        (Phase::Paused, true) => Some(Kept::MemoryAndFiles),
        (Phase::Terminating, _) if matches!(next, Next::Settled { state: State::Retained, .. }) => Some(Kept::Files),
        (Phase::Paused | Phase::Stopped, _) => Some(Kept::Files),
        _ => None,
    };
    let gone = matches!(next, Next::Settled { state: State::Removed, .. });
    let mut status = BotContainerStatus {
        observed_generation: generation,
        phase: Some(verdict.phase),
        container_id: record.map(|_| desired.id.to_string()),
        image,
        task,
        last_termination: match record {
            Some(record) => record.last.as_ref().map(termination),
            // A container that is gone (deletion, or by a stranger's hand) must not take the last word with it.
            None => live.and_then(|live| live.last_termination.clone()),
        },
        restart_count: Some(match record {
            Some(record) => i64::try_from(record.restarts).unwrap_or(i64::MAX),
            None => live.and_then(|live| live.restart_count).unwrap_or(0),
        }),
        kept,
        network,
        resources,
        current_version: observed.layer.as_ref().and_then(|layer| layer.version),
        rollback: record.and_then(rolled_back),
        ..BotContainerStatus::default()
    };
    let old = live.map(|live| live.conditions.as_slice()).unwrap_or_default();
    let mut say = |type_, value, reason, message: &str| {
        // The time is that of the change of status, not of the look: the old one stays while the status does.
        let new = condition(type_, value, reason, message, api_time(now));
        let since = find(old, type_).filter(|old| old.status == new.status).map(|old| old.last_transition_time.clone());
        status.conditions.push(Condition {
            last_transition_time: since.unwrap_or(api_time(now)),
            observed_generation: generation,
            ..new
        });
    };
    say(ConditionType::Ready, verdict.ready, verdict.reason, &verdict.message);
    let (running, reason, message) = running(observed, record, gone);
    say(ConditionType::Running, running, reason, &message);
    if !gone {
        let (value, reason, message) = image_ready(desired, observed, trouble);
        say(ConditionType::ImageReady, value, reason, &message);
        let (value, reason, message) = network_ready(desired, observed, verdict.phase, trouble);
        say(ConditionType::NetworkReady, value, reason, &message);
    }
    if let Some((value, reason, message)) = restored(desired, observed, trouble).filter(|_| !gone) {
        say(ConditionType::Restored, value, reason, &message);
    }
    if verdict.ready == Some(false) {
        if verdict.stalled {
            say(ConditionType::Stalled, Some(true), verdict.reason, &verdict.message);
        } else {
            say(ConditionType::Reconciling, Some(true), verdict.reason, &verdict.message);
        }
    }
    status.transitions = transitions(live, &status, now);
    status
}

/// What is said of [`Task::Leftover`].
const LEFTOVER: &str = "containerd lost the task; what is left of it is being put away";

/// Why nobody can tell whether the process runs.
fn unclear(observed: &Observed, record: Option<&Record>) -> Option<&'static str> {
    match observed.task {
        Task::Unknown => Some("containerd does not know the state of the process"),
        // It may live on, though containerd lost it. What was never started does not run.
        Task::Leftover => record.filter(|record| matches!(record.life, Life::Started { .. })).map(|_| LEFTOVER),
        _ => None,
    }
}

/// How often the process ended, and of what; the longest part comes last, since it may be cut.
fn crash_loop(record: &Record) -> String {
    let (failures, wait) = (record.failures, super::record::backoff(record.failures).as_secs());
    let again = format!("it is started again {wait} s after its end");
    let Some(last) = &record.last else { return again };
    let words = last.message.lines().last().map_or(String::new(), |line| format!("; its last words: {line}"));
    match Reason::parse(&last.reason) {
        Some(Reason::StartError) => format!(
            "the process could not be started {failures} times in a row; it is tried again {wait} s after that: {}",
            last.message
        ),
        Some(reason @ (Reason::OOMKilled | Reason::TaskLost)) => format!(
            "the process ended by itself {failures} times in a row, last with exit code {} ({reason}); {again}{words}",
            last.code
        ),
        _ => format!(
            "the process ended by itself {failures} times in a row, last with exit code {}; {again}{words}",
            last.code
        ),
    }
}

/// The last rollback, with what came of it; of one that was there when the bot was made, only that it counts as done.
fn rolled_back(record: &Record) -> Option<RollbackStatus> {
    let id = record.rollback.clone()?;
    let done = record.rolled.as_ref().filter(|done| done.id == id);
    Some(RollbackStatus {
        id,
        version: done.map(|done| done.version),
        replaced_by_version: done.and_then(|done| done.replaced_by),
        completed_at: done.map(|done| api_time(done.at)),
    })
}

/// A rollback that is asked for and can't be done: the bot is as it was, and must not be told to be as asked.
fn unserved(desired: &Desired, record: Option<&Record>) -> Option<String> {
    match (&desired.rollback, record) {
        (Some(Rollback::Impossible { id, why }), Some(record)) if record.rollback.as_ref() != Some(id) => {
            Some(why.clone())
        }
        _ => None,
    }
}

fn judge(
    desired: &Desired,
    observed: &Observed,
    record: Option<&Record>,
    next: &Next,
    trouble: Option<&Trouble>,
) -> Verdict {
    let live = matches!(observed.task, Task::Running { .. } | Task::Paused { .. });
    let ordered = record.is_some_and(|record| record.stop_ordered.is_some()) && live;
    if let Goal::Gone { .. } | Goal::Retained { .. } = desired.goal {
        return match (next, trouble) {
            (Next::Settled { state: State::Retained, .. }, _) => Verdict::working(
                Phase::Terminating,
                Reason::WaitingForSnapshot,
                "deletionPolicy is Retain: the bot's files become a version, which the controller gives its number first",
            ),
            (Next::Settled { state: State::Removed, .. }, _) => Verdict::working(
                Phase::Terminating,
                Reason::Removed,
                "nothing of the bot is left on its node; waiting for the controller",
            ),
            (_, Some(trouble)) => Verdict::working(Phase::Terminating, trouble.reason, &trouble.message),
            _ => Verdict::working(Phase::Terminating, Reason::Terminating, "the bot is being removed from its node"),
        };
    }
    if let Some(why) = unclear(observed, record) {
        let message = trouble.map_or(why, |trouble| &trouble.message);
        return Verdict { ready: None, ..Verdict::working(Phase::Unknown, Reason::RuntimeFailed, message) };
    }
    if let Some(trouble) = trouble {
        let phase = match observed.task {
            Task::Running { .. } if !ordered => Phase::Running,
            Task::Paused { .. } if !ordered => Phase::Paused,
            Task::Running { .. } | Task::Paused { .. } => Phase::Stopping,
            _ if !trouble.retryable => Phase::Failed,
            _ => Phase::BackOff,
        };
        return if phase == Phase::BackOff && is_pull(trouble.reason) {
            // As kubelet has it; the cause is the reason of ImageReady.
            Verdict::working(phase, Reason::ImagePullBackOff, format!("{}: {}", trouble.reason, trouble.message))
        } else if trouble.retryable {
            Verdict::working(phase, trouble.reason, &trouble.message)
        } else {
            Verdict::stalled(phase, trouble.reason, &trouble.message)
        };
    }
    // While the process is what it was, a refusal changes no phase: what runs, runs on.
    let phase_of_task = match observed.task {
        Task::Running { .. } => Phase::Running,
        Task::Paused { .. } => Phase::Paused,
        _ => Phase::Failed,
    };
    if let (Goal::Refused { refusal, .. }, Next::Do(Step::Reap | Step::PutAway | Step::RecordLost)) =
        (&desired.goal, next)
    {
        return Verdict::stalled(phase_of_task, refusal.reason, &refusal.message);
    }
    match next {
        Next::Do(step) => match step {
            Step::Stop | Step::Kill => {
                Verdict::working(Phase::Stopping, Reason::Stopping, "the process is being stopped")
            }
            Step::Pause => Verdict::working(Phase::Running, Reason::Pausing, "the process is being frozen"),
            Step::Resume if ordered => {
                Verdict::working(Phase::Stopping, Reason::Stopping, "the process is being stopped")
            }
            Step::Resume => Verdict::working(Phase::Paused, Reason::Resuming, "the process is being thawed"),
            Step::UpdateLimits => Verdict::working(
                phase_of_task,
                Reason::Starting,
                "the new limits are being given to the running process",
            ),
            Step::WriteSkills => {
                Verdict::working(phase_of_task, Reason::Starting, "the skills are being written into the bot's data")
            }
            Step::Reap
            | Step::PutAway
            | Step::RecordLost
            | Step::SettleEnd
            | Step::Remove(_)
            | Step::RemoveContainer
                if matches!(desired.goal, Goal::Stopped { .. }) =>
            {
                Verdict::working(Phase::Stopping, Reason::Stopping, "what the process used is being put away")
            }
            Step::PullAside => Verdict::working(
                phase_of_task_or_starting(observed),
                Reason::ChangingImage,
                "the image that the bot is to move to is being pulled",
            ),
            Step::CarryData => Verdict::working(
                Phase::Starting,
                Reason::ChangingImage,
                "the bot's data is being carried over to a layer on the other image",
            ),
            Step::SwitchBack => Verdict::working(
                Phase::Starting,
                Reason::ChangingImage,
                "the image was set back, and so is the bot's layer",
            ),
            Step::CopyAside | Step::DropAside | Step::SwitchLayer | Step::SettleReplaced => {
                let phase = match (observed.task, &desired.goal) {
                    (Task::Running { .. } | Task::Paused { .. }, _) => phase_of_task,
                    (_, Goal::Stopped { .. }) => Phase::Stopping,
                    _ => Phase::Starting,
                };
                let (reason, message) = match &desired.goal {
                    Goal::Alive(alive) if record.is_some_and(|record| record.image != alive.image.to_string()) => {
                        (Reason::ChangingImage, "the bot's layer is being replaced by one on the other image")
                    }
                    _ => (Reason::RollingBack, "the bot's layer is being replaced by the version of spec.rollback"),
                };
                Verdict::working(phase, reason, message)
            }
            Step::PutAway => Verdict::working(Phase::Starting, Reason::Starting, LEFTOVER),
            Step::Prepare(_) if live => {
                Verdict::working(phase_of_task, Reason::Starting, "the way of the bot's output is being mended")
            }
            Step::Prepare(parts) if parts.layer => {
                Verdict::working(Phase::Starting, Reason::Starting, "image, layer and network are being made")
            }
            _ => Verdict::working(Phase::Starting, Reason::Starting, "the process is being started"),
        },
        Next::Settled { state, .. } => match state {
            State::Removed | State::Retained => {
                Verdict::working(Phase::Terminating, Reason::Removed, "nothing of the bot is left")
            }
            State::Held => Verdict::working(
                Phase::Stopping,
                Reason::StoppedForSnapshot,
                "stopped for a BotSnapshot of consistency Stopped; it is started again once that is taken",
            ),
            State::WaitingForSnapshot => {
                let phase = match (observed.task, &desired.goal) {
                    (Task::Running { .. } | Task::Paused { .. }, _) => phase_of_task,
                    (_, Goal::Stopped { .. }) => Phase::Stopping,
                    _ => Phase::Starting,
                };
                let message = match &desired.rollback {
                    Some(Rollback::To(target)) if record.is_some_and(|r| r.rollback.as_ref() != Some(&target.id)) => {
                        "spec.rollback: what it replaces becomes a version first, which the controller gives its number"
                    }
                    _ => {
                        "spec.image: a version is made of the bot before it moves to another image \
                         (spec.snapshotPolicy.beforeImageChange)"
                    }
                };
                Verdict::working(phase, Reason::WaitingForSnapshot, message)
            }
            State::Running => Verdict::ready(Phase::Running, Reason::AsAsked, "the process runs as asked"),
            State::Paused { kept: Kept::MemoryAndFiles, .. } => {
                Verdict::ready(Phase::Paused, Reason::Paused, "frozen as asked; memory and files are kept")
            }
            State::Paused { memory_lost: true, .. } => Verdict::ready(
                Phase::Paused,
                Reason::MemoryLost,
                "paused as asked, but its process was lost (the node restarted, or its shim died): its files are kept, \
                 its memory is gone",
            ),
            State::Paused { .. } => {
                Verdict::ready(Phase::Paused, Reason::Paused, "made and not started, as asked; files are kept")
            }
            State::RestartPending => Verdict::working(
                Phase::Paused,
                Reason::RestartPending,
                "the change of the spec needs a restart, which waits while the bot is paused; \
                 set operatingMode to Running or Stopped",
            ),
            State::Stopped if desired.drained => Verdict::working(
                Phase::Stopped,
                Reason::NodeDraining,
                "the node is being drained: the bot was stopped, its files are kept; it is started again when the node is uncordoned",
            ),
            State::Stopped => Verdict::ready(Phase::Stopped, Reason::Stopped, "stopped as asked; files are kept"),
            State::Stopping => Verdict::working(
                Phase::Stopping,
                Reason::Stopping,
                "the stop signal was sent; KILL follows when terminationGracePeriodSeconds are over",
            ),
            State::Completed => {
                Verdict::ready(Phase::Succeeded, Reason::Completed, "the process ended with 0; restartPolicy ends here")
            }
            State::Failed => {
                let last = record.and_then(|record| record.last.as_ref());
                let reason = last.and_then(|last| Reason::parse(&last.reason)).unwrap_or(Reason::Error);
                let code = last.map_or(0, |last| last.code);
                Verdict::stalled(
                    Phase::Failed,
                    reason,
                    format!("the process ended with exit code {code}, and restartPolicy starts it no more"),
                )
            }
            State::BackOff => {
                Verdict::working(Phase::BackOff, Reason::CrashLoopBackOff, record.map_or_else(String::new, crash_loop))
            }
            State::Refused(refusal) => Verdict::stalled(phase_of_task, refusal.reason, &refusal.message),
            State::Foreign { why } => Verdict::stalled(
                match observed.container {
                    Container::Garbled { .. } => phase_of_task,
                    _ => Phase::Failed,
                },
                Reason::ForeignContainer,
                format!(
                    "containerd has a container {} that can't be told to be this bot's ({why}); remove it by hand",
                    desired.id
                ),
            ),
            State::ImageChange => {
                let name = match (&desired.goal, record) {
                    (Goal::Alive(alive), Some(record)) => before_image_name(desired, record, alive),
                    _ => String::new(),
                };
                Verdict::stalled(
                    phase_of_task,
                    Reason::ImageChangeFailed,
                    format!(
                        "the BotSnapshot {name}, which comes before the change of the image, failed; delete it to have another \
                         made, set spec.snapshotPolicy.beforeImageChange to false to do without, or set spec.image back"
                    ),
                )
            }
        },
    }
}

/// The process as it is, or that there is to be one.
fn phase_of_task_or_starting(observed: &Observed) -> Phase {
    match observed.task {
        Task::Running { .. } => Phase::Running,
        Task::Paused { .. } => Phase::Paused,
        _ => Phase::Starting,
    }
}

fn running(observed: &Observed, record: Option<&Record>, gone: bool) -> (Option<bool>, Reason, String) {
    if gone {
        return (Some(false), Reason::Removed, "nothing of the bot is left on its node".into());
    }
    if let Container::Foreign { .. } = observed.container {
        // What runs in it is not the bot.
        return (Some(false), Reason::ForeignContainer, "the bot has no process of its own".into());
    }
    if let Some(why) = unclear(observed, record) {
        return (None, Reason::RuntimeFailed, why.into());
    }
    match observed.task {
        Task::Running { .. } => (Some(true), Reason::Running, "the process runs".into()),
        Task::Paused { .. } => (Some(false), Reason::Paused, "the process is frozen".into()),
        Task::Created => (Some(false), Reason::Starting, "the process is made, not started".into()),
        _ => match record.map(|record| (record, record.last.as_ref())) {
            Some((record, Some(last))) if record.life == Life::Ended => {
                let reason = Reason::parse(&last.reason).unwrap_or(Reason::Error);
                (Some(false), reason, format!("the process ended with exit code {}", last.code))
            }
            Some((_, Some(_))) => (Some(false), Reason::Stopped, "there is no process".into()),
            _ => (Some(false), Reason::Stopped, "no process was started yet".into()),
        },
    }
}

/// Whether the bot has what it was to start from; `None` for one that starts from its image.
fn restored(
    desired: &Desired,
    observed: &Observed,
    trouble: Option<&Trouble>,
) -> Option<(Option<bool>, Reason, String)> {
    let from = desired.restore.as_ref()?;
    let words = format!("version {} of bot {}, BotSnapshot {}", from.version, from.bot_id, from.snapshot_name);
    Some(match (&observed.layer, trouble) {
        (Some(layer), _) if !layer.filling => (Some(true), Reason::Restored, format!("the bot started from {words}")),
        (_, Some(trouble)) => (Some(false), trouble.reason, trouble.message.clone()),
        _ => (Some(false), Reason::RestoreWaiting, format!("the bot's layer is made from {words}")),
    })
}

fn image_ready(desired: &Desired, observed: &Observed, trouble: Option<&Trouble>) -> (Option<bool>, Reason, String) {
    if let Some(layer) = observed.layer.as_ref().filter(|layer| !layer.filling) {
        return (Some(true), Reason::ImageReady, format!("{} is {}", layer.image, layer.digest));
    }
    match trouble {
        Some(trouble) if is_image(trouble.reason) => (Some(false), trouble.reason, trouble.message.clone()),
        _ => match &desired.goal {
            Goal::Alive(alive) => (Some(false), Reason::Pulling, format!("{} is being pulled", alive.image)),
            Goal::Refused { refusal, .. } if is_image(refusal.reason) => {
                (Some(false), refusal.reason, refusal.message.clone())
            }
            _ => (Some(false), Reason::Stopped, "no image is needed while the bot has no layer and is stopped".into()),
        },
    }
}

/// Whether a reason speaks of a pull that failed: not of an image that may not be pulled, or whose name is none.
fn is_pull(reason: Reason) -> bool {
    is_image(reason) && !matches!(reason, Reason::InvalidImageName | Reason::ErrImageNeverPull)
}

/// Whether a reason speaks of the image.
pub fn is_image(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::InvalidImageName
            | Reason::ErrImageNeverPull
            | Reason::ImageNotFound
            | Reason::ImageAuthFailed
            | Reason::RegistryUnavailable
            | Reason::ImageWrongPlatform
            | Reason::ImageCorrupt
            | Reason::ImageTooLarge
            | Reason::ImagePullBackOff
    )
}

fn network_ready(
    desired: &Desired,
    observed: &Observed,
    phase: Phase,
    trouble: Option<&Trouble>,
) -> (Option<bool>, Reason, String) {
    let mode = match &desired.goal {
        Goal::Alive(alive) => Some(alive.network),
        _ => None,
    };
    if mode == Some(NetworkMode::Host) {
        return (Some(true), Reason::NetworkReady, "the bot uses its node's network".into());
    }
    match &observed.network {
        Attached::Ready { ips } if ips.is_empty() && mode == Some(NetworkMode::None) => {
            (Some(true), Reason::NoNetwork, "network.mode None: loopback only".into())
        }
        Attached::Ready { ips } if !ips.is_empty() => {
            (Some(true), Reason::NetworkReady, "the bot's network is set up".into())
        }
        Attached::Absent | Attached::Partial | Attached::Ready { .. } => match trouble {
            Some(trouble)
                if matches!(
                    trouble.reason,
                    Reason::NetworkFailed | Reason::AddressesExhausted | Reason::NodeNotConfigured
                ) =>
            {
                (Some(false), trouble.reason, trouble.message.clone())
            }
            _ if matches!(
                phase,
                Phase::Stopped
                    | Phase::Stopping
                    | Phase::Succeeded
                    | Phase::Failed
                    | Phase::Paused
                    | Phase::Terminating
            ) && !matches!(observed.task, Task::Running { .. } | Task::Paused { .. }) =>
            {
                (Some(false), Reason::Stopped, "there is no process, so there is no network".into())
            }
            _ if matches!(observed.task, Task::Running { .. } | Task::Paused { .. }) => (
                Some(false),
                Reason::NetworkFailed,
                "the process runs, but its network is gone from the node; a new spec.restartedAt makes it anew".into(),
            ),
            _ => (Some(false), Reason::Starting, "the bot's network is not set up".into()),
        },
    }
}

fn termination(last: &super::record::Ending) -> Termination {
    Termination {
        exit_code: i64::from(last.code),
        signal: last.signal().map(i64::from),
        reason: last.reason.clone(),
        message: Some(last.message.clone()).filter(|message| !message.is_empty()),
        started_at: last.started_at.map(api_time),
        finished_at: Some(api_time(last.finished_at)),
    }
}

/// What happened between two statuses, appended to what is there; the last 32 stay.
fn transitions(live: Option<&BotContainerStatus>, new: &BotContainerStatus, now: Timestamp) -> Vec<Transition> {
    let none = BotContainerStatus::default();
    let old = live.unwrap_or(&none);
    let mut list = old.transitions.clone();
    let mut seq = list.last().map_or(0, |last| last.seq);
    let begins = seq == 0;
    let mut add = |type_: &str, at: Timestamp, exit_code, version, message: Option<String>| {
        seq += 1;
        list.push(Transition { seq, type_: type_.to_owned(), at: api_time(at), exit_code, version, message });
    };
    let is_true =
        |status: &BotContainerStatus, type_| find(&status.conditions, type_).is_some_and(|c| c.status == "True");
    // The first word of the agent tells also what the controller did before it.
    if let Some(node) = old.node_name.as_ref().filter(|_| begins) {
        let since = find(&old.conditions, ConditionType::Scheduled).map_or(now, |c| c.last_transition_time.0);
        add("scheduled", since, None, None, Some(node.clone()));
    }
    let digest = |status: &BotContainerStatus| status.image.as_ref().and_then(|image| image.digest.clone());
    if let Some(image) = new.image.as_ref().filter(|_| digest(new).is_some() && digest(new) != digest(old)) {
        add("pulled", now, None, None, Some(image.reference.clone()));
    }
    if is_true(new, ConditionType::Restored) && !is_true(old, ConditionType::Restored) {
        add("restored", now, None, new.current_version, None);
    }
    if new.container_id.is_some() && old.container_id.is_none() {
        add("created", now, None, None, None);
    }
    // In the order in which they happen: an end belongs to the process before the one that runs now.
    let ended_anew = old.last_termination != new.last_termination;
    // A restart in place of the process that ran: there was an end, though in the same second as the one before.
    let replaced = old.task.is_some() && old.restart_count < new.restart_count;
    if let Some(last) = new.last_termination.as_ref().filter(|_| ended_anew || replaced) {
        let type_ = if last.reason == Reason::OOMKilled.as_str() { "oom_killed" } else { "exited" };
        let at = last.finished_at.as_ref().map_or(now, |at| at.0);
        add(type_, at, Some(last.exit_code), None, None);
    }
    let done = |status: &BotContainerStatus| {
        status.rollback.as_ref().and_then(|r| r.completed_at.as_ref().map(|_| r.id.clone()))
    };
    if let Some(rollback) = new.rollback.as_ref().filter(|_| done(new).is_some() && done(new) != done(old)) {
        let at = rollback.completed_at.as_ref().map_or(now, |at| at.0);
        add("version_rollback", at, None, rollback.version, Some(rollback.id.clone()));
    }
    // By pid too: a process may start, end and start again within the second that a time is told in.
    if let Some(task) = new.task.as_ref().filter(|_| old.task != new.task) {
        add("started", task.started_at.0, None, None, None);
    }
    match (old.phase, new.phase) {
        (Some(Phase::Paused), Some(Phase::Running)) if old.task == new.task => add("resumed", now, None, None, None),
        (was, Some(Phase::Paused)) if was != Some(Phase::Paused) => add("paused", now, None, None, None),
        (was, Some(Phase::Stopped)) if was != Some(Phase::Stopped) => add("stopped", now, None, None, None),
        _ => {}
    }
    let removed = |status: &BotContainerStatus| {
        find(&status.conditions, ConditionType::Running).is_some_and(|c| c.reason == Reason::Removed.as_str())
    };
    if removed(new) && !removed(old) {
        add("deleted", now, None, None, None);
    }
    let surplus = list.len().saturating_sub(TRANSITIONS);
    list.drain(..surplus);
    list
}

/// Whether `live` already says what `wanted` does, as far as the agent's fields go.
pub fn says(live: Option<&BotContainerStatus>, wanted: &BotContainerStatus) -> bool {
    let Some(live) = live else { return false };
    let scheduled = ConditionType::Scheduled.as_str();
    let mut own = BotContainerStatus {
        node_name: None,
        bot_id: None,
        restored_from: None,
        last_version: None,
        orphaned: None,
        ..live.clone()
    };
    own.conditions.retain(|c| c.type_ != scheduled);
    let mut wanted = wanted.clone();
    own.conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
    wanted.conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
    own == wanted
}

#[cfg(test)]
mod tests;
