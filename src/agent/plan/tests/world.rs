//! A node with one bot on it, in memory. Each step has the effects that `act.rs` has, one after another in its order, and
//! can be cut off before any of them, as `kill -9` of the agent does.
//!
//! It watches what no plan can see: how often a process really ran, whether it was asked before it was killed, whether
//! anybody but a deletion took its layer.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::agent::desired::{Alive, Desired, Goal, Keep, Rollback, Target, desired};
use crate::agent::labels::next_layer;
use crate::agent::observe::{Attached, Container, Layer, Observed, Output, Task};
use crate::agent::plan::{KILL_AGAIN, Next, State, plan};
use crate::agent::record::{Aside, AsideFor, BACKOFF_MAX, Ending, Life, Record};
use crate::agent::step::{Parts, Step};
use crate::agent::version::Version;
use crate::api::BotContainer;
use crate::api::bot_container::{DeletionPolicy, NetworkMode, RestartPolicy};
use crate::api::bot_snapshot::{SnapshotPhase, SnapshotSource, automatic_name, image_change_cause};
use crate::api::condition::Reason;

pub const UID: &str = "2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11";
/// Most steps that the longest way takes: down from a paused process, and up again from nothing.
const STEPS: usize = 60;
/// Most waits on one way.
const WAITS: usize = 12;

/// What the object asks for, in the words that matter to the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    pub mode: Mode,
    pub env: u8,
    pub cpu: u8,
    pub skill: u8,
    /// Second of `restartedAt`, 0 for none.
    pub restarted: u8,
    pub image: u8,
    pub policy: RestartPolicy,
    pub grace: i64,
    pub network: NetworkMode,
    pub address_in_env: bool,
    /// Number of the version to go back to, which also names the rollback; 0 for none.
    pub rollback: u8,
    pub keep: Kept,
}

/// What is to become of the layer that a rollback replaces, or of that of a deleted bot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    No,
    Awaited,
    As,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Running,
    Paused,
    Stopped,
    /// The image's name is none.
    Refused,
    /// Has a deletionTimestamp.
    Gone,
    /// The same, under `deletionPolicy: Retain`.
    Retained,
}

impl Default for Ask {
    fn default() -> Self {
        Self {
            mode: Mode::Running,
            env: 0,
            cpu: 0,
            skill: 0,
            restarted: 0,
            image: 0,
            policy: RestartPolicy::Always,
            grace: 10,
            network: NetworkMode::Bridge,
            address_in_env: false,
            rollback: 0,
            keep: Kept::As,
        }
    }
}

/// A version of the bot.
pub fn version(uid: String, number: i64) -> Version {
    Version { name: uid.clone(), uid, namespace: "team-a".into(), bot_id: "web".into(), number, orphan: false }
}

impl Ask {
    pub fn bot(self) -> BotContainer {
        let mode = match self.mode {
            Mode::Paused => "Paused",
            Mode::Stopped => "Stopped",
            Mode::Running | Mode::Refused | Mode::Gone | Mode::Retained => "Running",
        };
        let image = match self.mode {
            Mode::Refused => "No Image".to_owned(),
            _ => format!("registry.example/bot:{}", self.image),
        };
        let mut env = vec![json!({"name": "N", "value": self.env.to_string()})];
        if self.address_in_env {
            env.push(json!({"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}));
        }
        let mut bot: BotContainer = serde_json::from_value(json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
            "metadata": {"name": "web", "namespace": "team-a", "uid": UID, "generation": 1},
            "spec": {
                "image": image, "env": env, "operatingMode": mode, "restartPolicy": self.policy,
                "terminationGracePeriodSeconds": self.grace, "network": {"mode": self.network},
                "skills": [{"name": "search", "content": self.skill.to_string()}],
                "resources": {"limits": {"cpu": self.cpu.to_string()}},
            },
        }))
        .unwrap();
        if self.restarted > 0 {
            bot.spec.restarted_at =
                Some(crate::api::condition::api_time(Timestamp::from_second(self.restarted.into()).unwrap()));
        }
        if self.mode == Mode::Retained {
            bot.spec.deletion_policy = DeletionPolicy::Retain;
        }
        if matches!(self.mode, Mode::Gone | Mode::Retained) {
            bot.metadata.deletion_timestamp = Some(crate::api::condition::api_time(Timestamp::UNIX_EPOCH));
        }
        bot
    }

    pub fn desired(self) -> Desired {
        let mut desired = desired(&self.bot(), "overlayfs", &[], false).unwrap();
        let number = i64::from(self.rollback);
        if self.rollback > 0 {
            desired.rollback = Some(Rollback::To(Box::new(Target {
                id: format!("r{number}"),
                version: version(format!("v{number}"), number),
                keep: match self.keep {
                    Kept::No => Keep::No,
                    Kept::Awaited => Keep::Awaited,
                    Kept::As => Keep::As(version(format!("by-r{number}"), 100 + number)),
                },
            })));
        }
        if self.keep == Kept::As {
            // Whatever layer it moves from, and to whatever image.
            let names = (0..8).flat_map(|image| (1..40).map(move |layer| (image, layer))).map(|(image, layer)| {
                let cause =
                    image_change_cause(&format!("registry.example/bot:{image}"), &format!("berth-{UID}.{layer}"));
                automatic_name("web", UID, SnapshotSource::PreImageChange, &cause)
            });
            static NAMES: std::sync::OnceLock<Vec<(String, SnapshotPhase)>> = std::sync::OnceLock::new();
            let ready = || names.map(|name| (name, SnapshotPhase::Ready)).collect();
            desired.before_image.clone_from(NAMES.get_or_init(ready));
        }
        if self.mode == Mode::Retained && self.keep == Kept::As {
            desired.preserve = Some(version("last".into(), 200));
        }
        desired
    }

    /// The same, alive: for the hash, limits and image that a record may have.
    pub fn alive(self) -> Alive {
        match (Self { mode: Mode::Running, ..self }).desired().goal {
            Goal::Alive(alive) => *alive,
            other => panic!("{other:?}"),
        }
    }
}

/// How the bot's process and the machine behave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Habits {
    /// The process ends when it gets TERM.
    pub heeds_term: bool,
    /// So many KILLs show no effect yet: uninterruptible sleep.
    pub shrugs: u8,
    /// A frozen process answers no KILL (cgroup v1).
    pub freezer_v1: bool,
    /// runc can't make the task: a bad working directory.
    pub refuses_create: bool,
    /// runc can't start the process: no such command.
    pub refuses_start: bool,
}

/// A step did not come to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// The agent was killed.
    CutOff,
    /// containerd, network or output said no.
    Failed(&'static str),
}

type Done = Result<(), Ended>;

/// One side effect of the steps that work side by side.
#[derive(Clone, Copy, Debug)]
enum Effect {
    Layer,
    HalfNetwork,
    Loopback,
    Addresses,
    Pipes,
    Logger,
    Create,
}

#[derive(Debug)]
pub struct World {
    pub observed: Observed,
    pub now: Timestamp,
    pub habits: Habits,
    /// What containerd hides behind `Unknown`; `None` behind it: the shim is dead.
    pub hidden: Option<Task>,
    /// The agent dies after so many more effects.
    pub cut_after: Option<u8>,
    /// Decides how the effects of side-by-side work interleave.
    pub order: u64,
    /// Steps and waits so far, for whoever reads a failure.
    pub trace: Vec<String>,
    /// How often a process ran.
    pub ran: u32,
    /// The attempt that ran last.
    ran_as: u64,
    /// The process has got TERM.
    termed: bool,
    /// KILL waits for the thaw.
    doomed: bool,
    /// Under `restartPolicy: Never`, whether there is a reason to begin one more attempt. Who changes the policy between an
    /// attempt's mark and its start does not take it back.
    may_run_again: bool,
    /// Whether everything came to be by the rules: not so when a test drew the state from a hat.
    lawful: bool,
    /// An outsider has removed a layer of the bot.
    robbed: bool,
    /// Layers of the bot beside the one that the record names.
    spare: BTreeMap<String, Layer>,
    /// Versions that were made of its layers, by uid, with the layer that each was.
    versions: BTreeMap<String, String>,
}

pub fn nothing() -> Observed {
    Observed {
        container: Container::Absent,
        task: Task::Absent,
        layer: None,
        network: Attached::Absent,
        output: Output::Absent,
        files: false,
    }
}

pub fn layer(image: u8) -> Layer {
    Layer {
        key: format!("berth-{UID}.1"),
        parent: "sha256:chain".into(),
        image: format!("registry.example/bot:{image}"),
        digest: format!("sha256:{image}"),
        created_at: None,
        version: None,
        filling: false,
    }
}

pub fn connected() -> Attached {
    Attached::Ready { ips: vec!["10.208.3.7".parse().unwrap()] }
}

impl World {
    pub fn new(now: Timestamp, habits: Habits) -> Self {
        Self {
            observed: nothing(),
            now,
            habits,
            hidden: None,
            cut_after: None,
            order: 0,
            trace: Vec::new(),
            ran: 0,
            ran_as: 0,
            termed: false,
            doomed: false,
            may_run_again: true,
            lawful: true,
            robbed: false,
            spare: BTreeMap::new(),
            versions: BTreeMap::new(),
        }
    }

    /// A world that is just so, however it came to be.
    pub fn drawn(observed: Observed, now: Timestamp, habits: Habits) -> Self {
        Self { observed, lawful: false, ..Self::new(now, habits) }
    }

    pub fn record(&self) -> Option<&Record> {
        match &self.observed.container {
            Container::Ours(record) => Some(record),
            _ => None,
        }
    }

    // --- looking ---

    /// One look and one plan, with everything that must hold of any plan.
    pub fn look(&mut self, desired: &Desired) -> Next {
        let next = plan(desired, &self.observed, self.now);
        assert_eq!(next, plan(desired, &self.observed, self.now), "the plan is not a function");
        self.trace.push(format!("{next:?}"));
        match &desired.goal {
            Goal::Stopped { .. } => self.may_run_again = true,
            Goal::Alive(alive) if self.record().is_some_and(|r| !r.is_for(alive)) => self.may_run_again = true,
            _ => {}
        }
        if let (Some(Rollback::To(target)), Some(record)) = (&desired.rollback, self.record())
            && record.rollback.as_ref() != Some(&target.id)
        {
            // A bot that goes back begins anew there.
            self.may_run_again = true;
        }
        if let (Goal::Alive(alive), Some(record)) = (&desired.goal, self.record())
            && record.image != alive.image.to_string()
        {
            // And so does one on another image.
            self.may_run_again = true;
        }
        match &next {
            Next::Do(Step::Remove(parts)) if parts.layer => {
                assert!(
                    matches!(desired.goal, Goal::Gone { .. }),
                    "a layer goes while the bot or its files are to stay"
                );
            }
            Next::Do(Step::CreateTask { .. } | Step::StartAttempt) => {
                assert!(matches!(desired.goal, Goal::Alive(_)), "a start that nobody asked for");
                let unborn = matches!(self.observed.task, Task::Absent | Task::Created);
                assert!(unborn, "a start on top of {:?}", self.observed.task);
            }
            Next::Settled { state, until: Some(until) } => {
                let wait = until.duration_since(self.now);
                let most = match state {
                    State::BackOff => BACKOFF_MAX,
                    _ => grace(desired).max(SignedDuration::try_from(KILL_AGAIN).unwrap()),
                };
                assert!(wait.is_positive(), "{state:?} waits for what is over: {wait}");
                assert!(wait <= most, "{state:?} waits {wait}, at most {most} is allowed");
            }
            _ => {}
        }
        next
    }

    /// Looks and acts until nothing is to be done, as the loop does that nobody disturbs; time passes where it waits.
    pub fn settle(&mut self, desired: &Desired) -> State {
        self.cut_after = None;
        self.habits.refuses_create = false;
        self.habits.refuses_start = false;
        let (mut steps, mut waits) = (0, 0);
        loop {
            assert!(steps <= STEPS && waits <= WAITS, "no end after {steps} steps, {waits} waits: {:#?}", self.trace);
            match self.look(desired) {
                Next::Do(step) => {
                    steps += 1;
                    // A failed step is tried again; each failure of this world happens once.
                    let _ = self.act(step, desired);
                }
                Next::Settled { until: Some(until), .. } => {
                    waits += 1;
                    self.pass_until(until);
                }
                Next::Settled { state, until: None } => return state,
            }
        }
    }

    /// Whether a settled state is what the goal asks for.
    pub fn assert_right(&self, state: &State, desired: &Desired) {
        let Observed { container, task, layer, network, output, .. } = &self.observed;
        let record = self.record();
        let no_process = matches!(task, Task::Absent);
        let put_away = *network == Attached::Absent && *output == Output::Absent;
        let right = match (&desired.goal, container, state) {
            (Goal::Gone { .. }, Container::Foreign { .. }, State::Removed) => put_away && layer.is_none(),
            (Goal::Gone { .. }, container, State::Removed) => {
                put_away && no_process && layer.is_none() && *container == Container::Absent
            }
            (Goal::Retained { .. }, Container::Foreign { .. }, state) => {
                let waits = layer.is_some() && desired.preserve.is_none();
                put_away && *state == if waits { State::Retained } else { State::Removed }
            }
            (Goal::Retained { .. }, _, State::Retained) => {
                put_away && no_process && layer.is_some() && desired.preserve.is_none()
            }
            (Goal::Retained { .. }, container, State::Removed) => {
                put_away && no_process && layer.is_none() && *container == Container::Absent
            }
            (_, Container::Foreign { .. } | Container::Garbled { .. }, state) => matches!(state, State::Foreign { .. }),
            (Goal::Stopped { .. }, _, State::Stopped) => {
                put_away && no_process && record.is_none_or(|record| record.life == Life::Fresh)
            }
            (Goal::Stopped { .. }, _, State::WaitingForSnapshot) => put_away && no_process,
            (Goal::Refused { .. }, _, State::Refused(_)) => {
                // An end is noted, an order carried out; what runs, runs on.
                let seen_to = !matches!(task, Task::Stopped { .. } | Task::Unknown);
                record.is_none_or(|r| seen_to && (r.stop_ordered.is_none() || no_process || *task == Task::Created))
            }
            (Goal::Alive(alive), _, state) => {
                let Some(record) = record else { panic!("alive without a container: {state:?}") };
                let fresh = record.is_for(alive);
                let other_image = self.has_layer() && record.image != alive.image.to_string();
                match state {
                    State::Running => {
                        !alive.paused
                            && matches!(task, Task::Running { .. })
                            && fresh
                            && !other_image
                            && record.limits == alive.limits
                            && record.skills == alive.skills
                            && *output == Output::Drained
                    }
                    State::Paused { kept: crate::api::bot_container::Kept::MemoryAndFiles, .. } => {
                        alive.paused && fresh && matches!(task, Task::Paused { .. })
                    }
                    State::Paused { .. } => alive.paused && fresh && no_process,
                    State::RestartPending => {
                        let waits = !fresh || other_image || desired.rollback.is_some();
                        alive.paused && waits && matches!(task, Task::Paused { .. })
                    }
                    // Asked for in the place of what it was settled in.
                    State::WaitingForSnapshot => true,
                    State::Completed | State::Failed => {
                        let code = record.last.as_ref().map_or(0, |last| last.code);
                        put_away
                            && no_process
                            && !alive.paused
                            && (*state == State::Completed) == (code == 0)
                            && match alive.restart_policy {
                                RestartPolicy::Always => false,
                                RestartPolicy::OnFailure => code == 0,
                                RestartPolicy::Never => true,
                            }
                    }
                    State::ImageChange => false,
                    _ => false,
                }
            }
            _ => false,
        };
        let right = right && self.rolled_back(state, desired);
        assert!(right, "{state:?} is not what {:?} asks for: {:#?}\n{:#?}", desired.goal, self.observed, self.trace);
    }

    fn has_layer(&self) -> bool {
        self.observed.layer.as_ref().is_some_and(|layer| !layer.filling)
    }

    /// Whether a rollback that is asked for is done, or is where it has to wait.
    fn rolled_back(&self, state: &State, desired: &Desired) -> bool {
        let Some(record) = self.record() else { return true };
        let asked = match &desired.rollback {
            Some(Rollback::To(target)) if record.rollback.as_ref() != Some(&target.id) => Some(target),
            _ => None,
        };
        let rolls = matches!(desired.goal, Goal::Alive(_) | Goal::Stopped { .. });
        let moves = match &desired.goal {
            Goal::Alive(alive) => self.has_layer() && record.image != alive.image.to_string(),
            _ => false,
        };
        match (state, asked) {
            (State::WaitingForSnapshot, Some(target)) => target.keep == Keep::Awaited,
            (State::WaitingForSnapshot, None) => moves && desired.before_image.is_empty(),
            (State::Running | State::Paused { .. } | State::Completed | State::Failed | State::BackOff, None)
                if moves =>
            {
                false
            }
            (State::RestartPending, _) => true,
            (_, Some(_)) if rolls => false,
            (State::Running | State::Paused { .. } | State::Stopped, None) => {
                record.aside.is_none() && record.replaced.is_none() && self.spare.is_empty()
            }
            _ => true,
        }
    }

    // --- doing: the effects of act.rs, in its order ---

    /// Does a step, up to where the agent dies.
    pub fn act(&mut self, step: Step, desired: &Desired) -> Done {
        let done = self.effects(step, desired);
        if let Err(ended) = &done {
            self.trace.push(format!("  {ended:?}"));
        }
        if self.lawful && self.record().is_some_and(|record| record.life == Life::Ended) {
            let live = matches!(self.observed.task, Task::Running { .. } | Task::Paused { .. })
                || matches!(self.hidden, Some(Task::Running { .. } | Task::Paused { .. }));
            assert!(!live, "the record says that it ended, and it lives: {:#?}", self.trace);
        }
        done
    }

    fn effects(&mut self, step: Step, desired: &Desired) -> Done {
        match step {
            Step::Prepare(parts) => self.prepare(parts, desired),
            Step::WriteContainer => self.write_container(desired),
            Step::CreateTask { connect } => self.create_task(connect, desired),
            Step::StartAttempt => self.start_attempt(desired),
            Step::Pause => match self.observed.task {
                Task::Running { pid } => {
                    self.may()?;
                    self.observed.task = Task::Paused { pid };
                    Ok(())
                }
                _ => Err(Ended::Failed("pause: not running")),
            },
            Step::Resume => self.resume(),
            Step::WriteSkills => {
                let skills = alive(desired)?.skills.clone();
                self.may()?;
                let record = self.ours()?;
                self.note(Record { skills, ..record })
            }
            Step::UpdateLimits => {
                let limits = alive(desired)?.limits.clone();
                self.may()?;
                let record = self.ours()?;
                self.note(Record { limits, ..record })
            }
            Step::Stop => self.stop(),
            Step::Kill => self.kill(),
            Step::Reap => self.reap(),
            Step::PutAway => {
                self.may()?;
                (self.observed.task, self.hidden) = (Task::Absent, None);
                Ok(())
            }
            Step::RecordLost => {
                let record = self.ours()?;
                let lost = self.lost();
                self.note(record.ended(lost))
            }
            Step::SettleEnd => {
                let record = self.ours()?;
                self.note(record.settled())
            }
            Step::CopyAside => self.copy_aside(desired),
            Step::PullAside => {
                let record = self.ours()?;
                let image = alive(desired)?.image.to_string();
                let aside = Aside {
                    layer: next_layer(&desired.id, &record.layer),
                    for_: AsideFor::Image { digest: format!("sha256:{image}"), image, chain_id: "sha256:chain".into() },
                    complete: false,
                };
                self.note(Record { aside: Some(aside), ..record })
            }
            Step::CarryData => self.carry_data(),
            Step::SwitchBack => {
                let record = self.ours()?;
                let replaced = record.replaced.clone().ok_or(Ended::Failed("nothing was replaced"))?;
                assert_eq!(self.observed.task, Task::Absent, "a layer is switched under a task");
                let Some(old) = self.spare.get(&replaced.layer).cloned() else {
                    assert!(!self.lawful || self.robbed, "the layer to go back to is gone: {:#?}", self.trace);
                    self.note(Record { replaced: None, ..record })?;
                    return Err(Ended::Failed("gone"));
                };
                self.note(record.moved(&old, self.now))?;
                self.spare.remove(&old.key);
                if let Some(left) = self.observed.layer.replace(old) {
                    self.spare.insert(left.key.clone(), left);
                }
                Ok(())
            }
            Step::DropAside => {
                let record = self.ours()?;
                let aside = record.aside.clone().ok_or(Ended::Failed("nothing beside"))?;
                self.may()?;
                self.spare.remove(&aside.layer);
                self.note(Record { aside: None, ..record })
            }
            Step::SwitchLayer => self.switch_layer(desired),
            Step::SettleReplaced => self.settle_replaced(),
            Step::Preserve => {
                let version = desired.preserve.clone().ok_or(Ended::Failed("no number"))?;
                assert!(matches!(desired.goal, Goal::Retained { .. }), "a layer is taken from a bot that stays");
                assert!(!self.lawful || self.observed.task == Task::Absent, "a layer is taken from under its process");
                self.may()?;
                if let Some(layer) = self.observed.layer.take() {
                    self.versions.insert(version.uid, layer.key);
                }
                Ok(())
            }
            Step::Remove(parts) => self.remove(parts),
            Step::RemoveContainer => {
                self.may()?;
                self.observed.files = false;
                self.may()?;
                self.spare.clear();
                self.may()?;
                assert!(
                    !matches!(self.observed.container, Container::Foreign { .. }),
                    "a foreign container is removed"
                );
                self.observed.container = Container::Absent;
                Ok(())
            }
        }
    }

    fn copy_aside(&mut self, desired: &Desired) -> Done {
        let record = self.ours()?;
        let Some(Rollback::To(target)) = &desired.rollback else { return Err(Ended::Failed("no rollback")) };
        let key = next_layer(&desired.id, &record.layer);
        let for_ = AsideFor::Rollback { id: target.id.clone(), snapshot: target.version.uid.clone() };
        let aside = Aside { layer: key.clone(), for_, complete: false };
        self.note(Record { aside: Some(aside.clone()), ..record.clone() })?;
        self.may()?;
        let like = self.observed.layer.clone().unwrap_or_else(|| layer(0));
        // What a version stands on is the image that is asked for: others are refused.
        let image = match &desired.goal {
            Goal::Alive(alive) => alive.image.to_string(),
            _ => like.image.clone(),
        };
        let made = Layer { key: key.clone(), image, version: Some(target.version.number), filling: true, ..like };
        self.spare.insert(key.clone(), made.clone());
        self.may()?;
        self.spare.insert(key, Layer { filling: false, ..made });
        self.note(Record { aside: Some(Aside { complete: true, ..aside }), ..record })
    }

    fn carry_data(&mut self) -> Done {
        let record = self.ours()?;
        let aside = record.aside.clone().ok_or(Ended::Failed("nothing beside"))?;
        let AsideFor::Image { image, digest, .. } = &aside.for_ else { return Err(Ended::Failed("not an image")) };
        assert_eq!(self.observed.task, Task::Absent, "data is carried from under a task");
        self.may()?;
        let (image, digest) = (image.clone(), digest.clone());
        let made = Layer { key: aside.layer.clone(), image, digest, filling: true, ..layer(0) };
        self.spare.insert(made.key.clone(), made.clone());
        self.may()?;
        if self.observed.layer.is_none() {
            return Err(Ended::Failed("no layer"));
        }
        self.spare.insert(made.key.clone(), Layer { filling: false, ..made });
        self.note(Record { aside: Some(Aside { complete: true, ..aside }), ..record })
    }

    fn switch_layer(&mut self, desired: &Desired) -> Done {
        let record = self.ours()?;
        let aside = record.aside.clone().ok_or(Ended::Failed("nothing beside"))?;
        let Some(new) = self.spare.get(&aside.layer).filter(|layer| !layer.filling).cloned() else {
            self.note(Record { aside: None, ..record })?;
            return Err(Ended::Failed("gone"));
        };
        assert_eq!(self.observed.task, Task::Absent, "a layer is switched under a task");
        assert!(record.replaced.is_none(), "a layer that was replaced is forgotten: {:#?}", self.trace);
        let switched = match (&aside.for_, &desired.rollback) {
            (AsideFor::Rollback { .. }, Some(Rollback::To(target))) => {
                assert_ne!(target.keep, Keep::Awaited, "what is replaced has no number to be kept under");
                record.switched(&new, target, self.now)
            }
            (AsideFor::Image { .. }, _) => record.moved(&new, self.now),
            _ => return Err(Ended::Failed("no rollback")),
        };
        self.note(switched)?;
        self.spare.remove(&new.key);
        if let Some(old) = self.observed.layer.replace(new) {
            self.spare.insert(old.key.clone(), old);
        }
        Ok(())
    }

    fn settle_replaced(&mut self) -> Done {
        let record = self.ours()?;
        let replaced = record.replaced.clone().ok_or(Ended::Failed("nothing was replaced"))?;
        self.may()?;
        let gone = self.spare.remove(&replaced.layer);
        if let Some(version) = &replaced.keep {
            let kept = gone.is_some() || self.versions.get(&version.uid) == Some(&replaced.layer);
            assert!(kept || !self.lawful || self.robbed, "what was to be kept is gone: {:#?}", self.trace);
            self.versions.insert(version.uid.clone(), replaced.layer);
        }
        self.note(Record { replaced: None, ..record })
    }

    fn prepare(&mut self, parts: Parts, desired: &Desired) -> Done {
        let mut branches = Vec::new();
        if parts.layer {
            branches.push(vec![Effect::Layer]);
        }
        if parts.network {
            branches.push(self.connect(alive(desired)?));
        } else if parts.namespace && !matches!(self.observed.network, Attached::Ready { .. }) {
            branches.push(vec![Effect::HalfNetwork, Effect::Loopback]);
        }
        if parts.output {
            branches.push(vec![Effect::Pipes, Effect::Logger]);
        }
        self.side_by_side(branches, desired)
    }

    fn connect(&self, alive: &Alive) -> Vec<Effect> {
        let ready = matches!(self.observed.network, Attached::Ready { .. });
        let addressed = matches!(&self.observed.network, Attached::Ready { ips } if !ips.is_empty());
        match alive.network {
            NetworkMode::Host => vec![],
            NetworkMode::None if ready => vec![],
            NetworkMode::None => vec![Effect::HalfNetwork, Effect::Loopback],
            NetworkMode::Bridge if addressed => vec![],
            NetworkMode::Bridge => vec![Effect::HalfNetwork, Effect::Addresses],
        }
    }

    fn create_task(&mut self, connect: bool, desired: &Desired) -> Done {
        let mut branches = Vec::new();
        if connect {
            branches.push(self.connect(alive(desired)?));
        }
        let refused = self.habits.refuses_create && self.observed.task == Task::Absent;
        if self.observed.task == Task::Absent {
            branches.push(vec![Effect::Pipes, Effect::Logger]);
            if !refused {
                branches.last_mut().unwrap().push(Effect::Create);
            }
        }
        self.side_by_side(branches, desired)?;
        if refused { self.could_not_start() } else { Ok(()) }
    }

    fn side_by_side(&mut self, mut branches: Vec<Vec<Effect>>, desired: &Desired) -> Done {
        branches.retain(|branch| !branch.is_empty());
        let mut order = self.order;
        while !branches.is_empty() {
            let which = usize::try_from(order % branches.len() as u64).unwrap();
            order = order.rotate_right(3);
            let effect = branches[which].remove(0);
            branches.retain(|branch| !branch.is_empty());
            self.may()?;
            self.happen(effect, desired)?;
        }
        Ok(())
    }

    fn happen(&mut self, effect: Effect, desired: &Desired) -> Done {
        match effect {
            Effect::Layer => {
                let image = alive(desired)?.image.to_string();
                let digest = format!("sha256:{image}");
                let key = self.record().map_or_else(|| layer(0).key, |record| record.layer.clone());
                // Preparing a key that exists is no error and changes nothing.
                self.observed.layer.get_or_insert(Layer { image, digest, key, ..layer(0) });
            }
            Effect::HalfNetwork => self.observed.network = Attached::Partial,
            Effect::Loopback => self.observed.network = Attached::Ready { ips: vec![] },
            Effect::Addresses => self.observed.network = connected(),
            Effect::Pipes if self.observed.output == Output::Absent => self.observed.output = Output::Undrained,
            Effect::Pipes => {}
            Effect::Logger => self.observed.output = Output::Drained,
            Effect::Create => {
                assert_eq!(self.observed.task, Task::Absent, "two tasks");
                self.observed.task = Task::Created;
                (self.termed, self.doomed) = (false, false);
            }
        }
        Ok(())
    }

    fn write_container(&mut self, desired: &Desired) -> Done {
        let alive = alive(desired)?;
        let Some(layer) = self.observed.layer.clone() else { return Err(Ended::Failed("no layer")) };
        assert!(
            matches!(self.observed.container, Container::Ours(_) | Container::Absent),
            "a foreign container is written"
        );
        let old = self.record().cloned();
        self.may()?;
        self.observed.files = false;
        self.may()?;
        self.observed.files = true;
        let mut record = Record {
            uid: UID.into(),
            namespace: desired.namespace.clone(),
            name: desired.name.clone(),
            bot_id: desired.bot_id.clone(),
            hash: alive.hash.clone(),
            restarted_at: alive.restarted_at.clone().or_else(|| old.as_ref().and_then(|old| old.restarted_at.clone())),
            rollback: match &old {
                Some(old) => old.rollback.clone(),
                None => desired.rollback.as_ref().map(|asked| asked.id().to_owned()),
            },
            rolled: old.as_ref().and_then(|old| old.rolled.clone()),
            aside: old.as_ref().and_then(|old| old.aside.clone()),
            replaced: old.as_ref().and_then(|old| old.replaced.clone()),
            limits: alive.limits.clone(),
            skills: alive.skills.clone(),
            image: layer.image,
            digest: layer.digest,
            snapshotter: desired.snapshotter.clone(),
            layer: layer.key,
            stop_signal: 15,
            spec_for: 0,
            attempt: old.as_ref().map_or(0, |old| old.attempt),
            life: old.as_ref().map_or(Life::Fresh, |old| old.life),
            stop_ordered: None,
            stop_sent: false,
            kill_ordered: None,
            failures: old.as_ref().map_or(0, |old| old.failures),
            restarts: old.as_ref().map_or(0, |old| old.restarts),
            last: old.as_ref().and_then(|old| old.last.clone()),
        };
        record.spec_for = if alive.paused { 0 } else { record.next_attempt() };
        self.may()?;
        self.observed.container = Container::Ours(Box::new(record));
        Ok(())
    }

    fn start_attempt(&mut self, desired: &Desired) -> Done {
        let alive = alive(desired)?;
        let record = self.ours()?;
        let started = record.started(self.now);
        if started != record {
            let allowed = alive.restart_policy != RestartPolicy::Never || self.may_run_again;
            assert!(allowed || !self.lawful, "run twice under restartPolicy Never: {:#?}", self.trace);
            self.note(started)?;
            self.may_run_again = false;
        }
        if self.habits.refuses_start {
            return self.could_not_start();
        }
        self.may()?;
        assert_eq!(self.observed.task, Task::Created, "only what was created can be started");
        let Observed { network, output, layer, .. } = &self.observed;
        let networked = match alive.network {
            NetworkMode::Host => true,
            NetworkMode::None => matches!(network, Attached::Ready { .. }),
            NetworkMode::Bridge => *network == connected(),
        };
        assert!(networked, "the process comes before its network: {:#?}", self.trace);
        assert_eq!(*output, Output::Drained, "nobody drains the process");
        let record = self.ours()?;
        assert_eq!(record.hash, alive.hash, "an old spec is started");
        assert_eq!(record.spec_for, record.attempt, "a spec made for another attempt is started");
        if self.lawful {
            assert!(layer.is_some(), "a process without files");
            assert!(record.attempt > self.ran_as, "an attempt is run twice: {:#?}", self.trace);
        }
        self.ran_as = record.attempt;
        self.ran += 1;
        self.observed.task = Task::Running { pid: 1000 + self.ran };
        Ok(())
    }

    fn could_not_start(&mut self) -> Done {
        let record = self.ours()?;
        let ending = Ending { code: 128, reason: Reason::StartError.as_str().into(), ..self.lost() };
        self.note(record.started(self.now).ended(ending))?;
        self.delete_task()
    }

    fn resume(&mut self) -> Done {
        self.may()?;
        match self.observed.task {
            Task::Paused { .. } if self.doomed => self.observed.task = self.ended(137),
            Task::Paused { pid } => self.observed.task = Task::Running { pid },
            _ => return Err(Ended::Failed("resume: not paused")),
        }
        Ok(())
    }

    fn stop(&mut self) -> Done {
        let record = self.ours()?;
        let paused = matches!(self.observed.task, Task::Paused { .. });
        let order = Record { stop_ordered: Some(self.now), stop_sent: false, ..record };
        self.note(order.clone())?;
        self.may()?;
        self.termed = true;
        if paused {
            self.resume()?;
        }
        self.note(Record { stop_sent: true, ..order })
    }

    fn kill(&mut self) -> Done {
        let paused = matches!(self.observed.task, Task::Paused { .. });
        if let Some(record) = self.record().cloned() {
            let stop_ordered = record.stop_ordered.or(Some(self.now));
            self.note(Record { stop_ordered, kill_ordered: Some(self.now), ..record })?;
        }
        self.may()?;
        let begun = matches!(self.observed.task, Task::Running { .. } | Task::Paused { .. });
        if self.lawful && begun {
            assert!(self.termed, "killed without having been asked: {:#?}", self.trace);
        }
        // An attempt that was marked and cut off before its start has not run.
        self.may_run_again |= self.observed.task == Task::Created;
        match self.observed.task {
            Task::Unknown => return Err(Ended::Failed("kill: no answer")),
            Task::Paused { .. } if self.habits.freezer_v1 => self.doomed = true,
            Task::Running { .. } | Task::Paused { .. } if self.habits.shrugs > 0 => self.habits.shrugs -= 1,
            Task::Created | Task::Running { .. } | Task::Paused { .. } => self.observed.task = self.ended(137),
            Task::Absent | Task::Leftover | Task::Stopped { .. } => {}
        }
        if paused {
            // What containerd answers to a thaw of what is dead already is passed over.
            match self.resume() {
                Err(Ended::CutOff) => return Err(Ended::CutOff),
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    fn reap(&mut self) -> Done {
        // Where containerd can't say, whether it ended is known only once the task can be deleted: then it is an attempt
        // without a task.
        let started = self.record().filter(|r| matches!(r.life, Life::Started { .. })).cloned();
        if let (Some(record), Task::Stopped { code, at, .. }) = (started, self.observed.task) {
            let ending = Ending { code, reason: "Error".into(), finished_at: at, ..self.lost() };
            self.note(record.ended(ending))?;
        }
        self.delete_task()
    }

    fn delete_task(&mut self) -> Done {
        self.may()?;
        match (self.observed.task, self.hidden.take()) {
            (Task::Unknown, Some(live)) => {
                self.observed.task = live;
                Err(Ended::Failed("delete: still running"))
            }
            (Task::Running { .. } | Task::Paused { .. }, _) => Err(Ended::Failed("delete: still running")),
            _ => {
                self.observed.task = Task::Absent;
                Ok(())
            }
        }
    }

    fn remove(&mut self, parts: Parts) -> Done {
        let mut parts: Vec<&str> = [("layer", parts.layer), ("network", parts.network), ("output", parts.output)]
            .into_iter()
            .filter_map(|(part, wanted)| wanted.then_some(part))
            .collect();
        let turn = usize::try_from(self.order % 3).unwrap();
        let len = parts.len().max(1);
        parts.rotate_left(turn % len);
        for part in parts {
            self.may()?;
            match part {
                "layer" => {
                    assert!(!self.lawful || self.observed.task == Task::Absent, "a layer goes from under its process");
                    self.observed.layer = None;
                }
                "network" => self.observed.network = Attached::Absent,
                _ => self.observed.output = Output::Absent,
            }
        }
        Ok(())
    }

    fn note(&mut self, record: Record) -> Done {
        self.may()?;
        match &mut self.observed.container {
            Container::Ours(old) => **old = record,
            _ => return Err(Ended::Failed("note: no container")),
        }
        Ok(())
    }

    fn ours(&self) -> Result<Record, Ended> {
        self.record().cloned().ok_or(Ended::Failed("no container"))
    }

    /// Before each effect: does the agent live on?
    fn may(&mut self) -> Done {
        match &mut self.cut_after {
            Some(0) => {
                self.cut_after = None;
                Err(Ended::CutOff)
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn lost(&self) -> Ending {
        Ending {
            code: 137,
            reason: Reason::TaskLost.as_str().into(),
            message: String::new(),
            started_at: None,
            finished_at: self.now,
            asked: false,
        }
    }

    fn ended(&self, code: u32) -> Task {
        Task::Stopped { code, at: self.now, oom: false }
    }

    // --- what happens by itself ---

    /// Time passes; a process that was asked to end does.
    pub fn pass_until(&mut self, then: Timestamp) {
        self.trace.push(format!("  {} passes", then.duration_since(self.now)));
        self.now = self.now.max(then);
        if self.habits.heeds_term && self.termed && matches!(self.observed.task, Task::Running { .. }) {
            self.observed.task = self.ended(143);
        }
    }

    /// The wall clock is set; no time passes.
    pub fn set_clock(&mut self, seconds: i64) {
        self.now = self.now.saturating_add(SignedDuration::from_secs(seconds)).unwrap();
    }

    /// The process ends by itself.
    pub fn exit(&mut self, code: u32, oom: bool) {
        let at = self.now;
        match (&mut self.observed.task, &mut self.hidden) {
            (Task::Unknown, Some(task @ Task::Running { .. })) => *task = Task::Stopped { code, at, oom },
            (task @ Task::Running { .. }, _) => *task = Task::Stopped { code, at, oom },
            _ => {}
        }
    }

    /// The shim dies: containerd forgets the task.
    pub fn shim_dies(&mut self) {
        (self.observed.task, self.hidden) = (Task::Absent, None);
    }

    /// containerd loses the task, and its process lives on: it died with what it knew, or its client in the middle.
    pub fn task_is_lost(&mut self) {
        match self.observed.task {
            Task::Absent | Task::Leftover => {}
            Task::Unknown => self.observed.task = Task::Leftover,
            _ => self.hidden = Some(std::mem::replace(&mut self.observed.task, Task::Leftover)),
        }
    }

    /// The shim does not answer for a while.
    pub fn shim_hangs(&mut self) {
        if !matches!(self.observed.task, Task::Absent | Task::Unknown | Task::Leftover) {
            self.hidden = Some(std::mem::replace(&mut self.observed.task, Task::Unknown));
        }
    }

    /// It answers again.
    pub fn shim_answers(&mut self) {
        if self.observed.task == Task::Unknown
            && let Some(task) = self.hidden.take()
        {
            self.observed.task = task;
        }
    }

    /// Processes and /run are gone, the disk is kept.
    pub fn reboot(&mut self) {
        self.shim_dies();
        (self.observed.network, self.observed.output, self.observed.files) = (Attached::Absent, Output::Absent, false);
    }

    /// Someone removes the layer that no process uses.
    pub fn outsider_removes_layer(&mut self) {
        if self.observed.task == Task::Absent {
            self.observed.layer = None;
            self.robbed = true;
        }
    }

    /// Someone removes the container that no process uses.
    pub fn outsider_removes_container(&mut self) {
        if self.observed.task == Task::Absent && self.record().is_some() {
            self.observed.container = Container::Absent;
            // Nobody knows of them any more; they go with the bot.
            self.spare.clear();
            self.may_run_again = true;
            self.ran_as = 0;
        }
    }
}

fn alive(desired: &Desired) -> Result<&Alive, Ended> {
    match &desired.goal {
        Goal::Alive(alive) => Ok(alive),
        _ => Err(Ended::Failed("not to be alive")),
    }
}

pub fn grace(desired: &Desired) -> SignedDuration {
    let grace = match &desired.goal {
        Goal::Gone { grace }
        | Goal::Retained { grace }
        | Goal::Held { grace }
        | Goal::Stopped { grace }
        | Goal::Refused { grace, .. } => *grace,
        Goal::Alive(alive) => alive.grace,
    };
    SignedDuration::try_from(grace).unwrap_or(SignedDuration::MAX)
}
