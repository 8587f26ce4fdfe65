//! What each test here stands on: a node with its agent, a namespace, and questions to ask of a bot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use berth::api::BotContainer;
use berth::api::bot_container::{BotContainerStatus, Phase};
use berth::api::condition::{ConditionType, find};
use k8s_openapi::api::events::v1::Event;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::Value;

use crate::common::{Agent, BotBuilder, Cluster, Controller, Leaks, Namespace, SOON, bot, get, summary, wait_for};

/// A node and a namespace of a test's own on the shared cluster. The namespace comes first: it is dropped first, and its
/// bots are taken down by an agent that still runs.
pub struct Stage {
    pub ns: Namespace,
    pub agent: Agent,
    pub cluster: &'static Cluster,
}

impl Stage {
    pub async fn set(name: &str) -> Self {
        Self::set_with(name, &[]).await
    }

    /// The same with more environment for the agent.
    pub async fn set_with(name: &str, env: &[(&str, &str)]) -> Self {
        let cluster = Cluster::shared();
        Controller::shared(cluster);
        Self::on(cluster, name, env).await
    }

    /// The same on a cluster whose controller runs already.
    pub async fn on(cluster: &'static Cluster, name: &str, env: &[(&str, &str)]) -> Self {
        let agent = Agent::start_with(cluster, name, env).await;
        let ns = Namespace::create(cluster, name).await;
        Self { ns, agent, cluster }
    }

    /// Applies a bot that only fits on this stage's node.
    pub async fn apply(&self, bot: BotBuilder) -> BotContainer {
        self.ns.apply(bot.on(self.agent.node())).await
    }

    /// Applies a bot and waits until it is Ready, whatever it was asked to be.
    pub async fn ready(&self, bot: BotBuilder) -> BotContainer {
        let name = self.apply(bot).await.metadata.name.unwrap();
        let bot = self.ns.ready(&name, SOON).await;
        well_said(&bot);
        bot
    }

    /// Applies a bot and waits until it runs as asked.
    pub async fn runs(&self, bot: BotBuilder) -> BotContainer {
        let bot = self.ready(bot).await;
        assert_eq!(status(&bot).phase, Some(Phase::Running), "{}", summary(&bot));
        bot
    }

    /// Merges into a bot's spec, as `kubectl patch` does.
    pub async fn edit(&self, name: &str, spec: Value) -> BotContainer {
        let patch = serde_json::json!({"spec": spec});
        self.ns.bots().patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap()
    }

    /// Edits, and waits for a phase of the new spec.
    pub async fn edited(&self, name: &str, spec: Value, phase: Phase) -> BotContainer {
        self.edit(name, spec).await;
        let bot = self.ns.phase(name, phase, SOON).await;
        well_said(&bot);
        bot
    }

    /// Waits for a phase and a reason of `Ready`.
    #[track_caller]
    pub fn says(&self, name: &str, phase: Phase, reason: &str) -> impl Future<Output = BotContainer> {
        let wanted = reason.to_owned();
        let seen = self.ns.until(name, format!("{phase:?}, {reason}"), SOON, move |bot| {
            let Some(status) = &bot.status else { return false };
            status.observed_generation == bot.metadata.generation
                && status.phase == Some(phase)
                && find(&status.conditions, ConditionType::Ready).is_some_and(|c| c.reason == wanted)
        });
        async move {
            let bot = seen.await;
            well_said(&bot);
            bot
        }
    }

    /// Runs a bot of the demo's image once and removes it, so that the image is there, and counts.
    pub async fn warmed(&self) -> Leaks {
        self.runs(bot("warm")).await;
        self.ns.delete("warm", SOON).await;
        wait_for("the shim of the warm bot gone", SOON, || async {
            let left = self.agent.leaks();
            match (left.count("shims"), left.count("netns"), left.count("leases")) {
                (0, 0, 0) => Ok(()),
                _ => Err(format!("{left:?}")),
            }
        })
        .await;
        self.agent.leaks()
    }

    /// Messages of the Events of a reason about a bot, one for each time that it was told: a repetition is counted in
    /// the Event that is there.
    pub async fn events(&self, name: &str, reason: &str) -> Vec<String> {
        let all = self.ns.api::<Event>().list(&ListParams::default()).await.unwrap();
        let about = |event: &Event| event.regarding.as_ref().is_some_and(|r| r.name.as_deref() == Some(name));
        let found = all.items.into_iter().filter(|e| about(e) && e.reason.as_deref() == Some(reason));
        let times = |event: &Event| event.series.as_ref().map_or(1, |series| usize::try_from(series.count).unwrap());
        found.flat_map(|e| std::iter::repeat_n(e.note.clone().unwrap_or_default(), times(&e))).collect()
    }

    /// Waits for the Event of a reason, which comes a moment after the status; it must have been told once.
    #[track_caller]
    pub fn told_once(&self, name: &str, reason: &str) -> impl Future<Output = String> {
        wait_for(format!("an Event {reason} about {name}"), SOON, move || async move {
            match self.events(name, reason).await.as_slice() {
                [] => Err("none".to_owned()),
                [note] => Ok(note.clone()),
                more => panic!("{name}: {reason} was told {} times: {more:?}", more.len()),
            }
        })
    }
}

/// The status.
#[track_caller]
pub fn status(bot: &BotContainer) -> &BotContainerStatus {
    bot.status.as_ref().unwrap_or_else(|| panic!("no status"))
}

/// Process id of a bot's process 1.
#[track_caller]
pub fn pid(bot: &BotContainer) -> u32 {
    let task = status(bot).task.as_ref().unwrap_or_else(|| panic!("no task: {}", summary(bot)));
    u32::try_from(task.pid).unwrap()
}

/// Its address.
#[track_caller]
pub fn ip(bot: &BotContainer) -> String {
    let network = status(bot).network.as_ref().unwrap_or_else(|| panic!("no network: {}", summary(bot)));
    network.ip.clone().unwrap()
}

/// Its uid.
pub fn uid(bot: &BotContainer) -> String {
    bot.metadata.uid.clone().unwrap()
}

/// A condition's (status, reason).
#[track_caller]
pub fn says(bot: &BotContainer, type_: ConditionType) -> Option<(&str, &str)> {
    find(&status(bot).conditions, type_).map(|c| (c.status.as_str(), c.reason.as_str()))
}

/// A condition's message.
#[track_caller]
pub fn message(bot: &BotContainer, type_: ConditionType) -> &str {
    find(&status(bot).conditions, type_).map_or("", |c| c.message.as_str())
}

/// A path as a running bot sees it.
pub fn path_in(bot: &BotContainer, path: &str) -> PathBuf {
    Path::new(&format!("/proc/{}/root", pid(bot))).join(path.trim_start_matches('/'))
}

/// A file as a running bot sees it, once it is there: the bot may only just have begun.
pub async fn read_in(bot: &BotContainer, path: &str) -> String {
    let path = path_in(bot, path);
    wait_for(path.display(), SOON, || async {
        match std::fs::read_to_string(&path) {
            Ok(text) if !text.is_empty() => Ok(text),
            Ok(_) => Err("empty".to_owned()),
            Err(e) => Err(e.to_string()),
        }
    })
    .await
}

/// The environment of a bot's process 1. A started task is runc's own init for a moment, until it executes the bot.
pub async fn environment(bot: &BotContainer) -> String {
    let file = format!("/proc/{}/environ", pid(bot));
    wait_for(&file, SOON, || async {
        match std::fs::read_to_string(&file) {
            Ok(text) if !text.is_empty() && !text.contains("_LIBCONTAINER_") => Ok(text),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// The process and when it began, in the kernel's words: two processes are never equal in both.
#[track_caller]
pub fn life(pid: u32) -> (u32, String) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_else(|e| panic!("process {pid}: {e}"));
    // proc(5): the name in parentheses may hold anything; starttime is field 22, the 20th after it.
    let start = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
    (pid, start.to_owned())
}

/// Whether a process of this id is there and no zombie.
pub fn alive(pid: u32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

/// The demo's page of a bot.
pub async fn page(bot: &BotContainer) -> String {
    let address = format!("{}:8080", ip(bot)).parse().unwrap();
    wait_for(format!("the page of {}", ip(bot)), SOON, || async {
        match get(address, "/").await? {
            (200, page) => Ok(page),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// A file of the bot's cgroup. cgroup v1, and v2 where `controller` has no line of its own in /proc/PID/cgroup.
pub fn cgroup_file(bot: &BotContainer, controller: &str, file: &str) -> String {
    let lines = std::fs::read_to_string(format!("/proc/{}/cgroup", pid(bot))).unwrap();
    let found = lines.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers.split(',').any(|c| c == controller).then(|| path.to_owned())
    });
    let path = found.unwrap_or_else(|| panic!("{lines}: no {controller}"));
    let file = format!("/sys/fs/cgroup/{controller}{path}/{file}");
    std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{file}: {e}")).trim().to_owned()
}

/// What holds of every status that is not on its way: the phase table of API.md, and kstatus.
#[track_caller]
pub fn well_said(bot: &BotContainer) {
    let (status, said) = (status(bot), summary(bot));
    let ready = says(bot, ConditionType::Ready).unwrap_or_else(|| panic!("no Ready: {said}"));
    let reconciling = says(bot, ConditionType::Reconciling).is_some_and(|(status, _)| status == "True");
    let stalled = says(bot, ConditionType::Stalled).is_some_and(|(status, _)| status == "True");
    let wanted = match status.phase.unwrap_or_else(|| panic!("no phase: {said}")) {
        Phase::Running | Phase::Paused | Phase::Stopped => ready.0 == "True" || reconciling || stalled,
        Phase::Succeeded => ready == ("True", "Completed"),
        Phase::Starting | Phase::Stopping | Phase::Pending => ready.0 == "False" && reconciling,
        Phase::BackOff => ready.0 == "False" && reconciling && !stalled,
        Phase::Failed => ready.0 == "False" && (stalled || reconciling),
        Phase::Terminating => ready.0 == "False",
        Phase::Unknown => ready.0 == "Unknown",
    };
    assert!(wanted, "the phase table: {said}");
    assert!(ready.0 != "True" || !(reconciling || stalled), "kstatus: Ready, and yet at work: {said}");
    assert!(!(reconciling && stalled), "kstatus: {said}");
    assert_eq!(status.observed_generation, bot.metadata.generation, "{said}");
    for condition in &status.conditions {
        assert!(!condition.reason.is_empty() && !condition.message.is_empty(), "{condition:?}");
        assert!(condition.observed_generation <= bot.metadata.generation, "{condition:?}");
    }
    let running = says(bot, ConditionType::Running);
    if status.phase == Some(Phase::Running) {
        assert_eq!(running.map(|r| r.0), Some("True"), "{said}");
    } else if matches!(status.phase, Some(Phase::Stopped | Phase::Paused | Phase::BackOff | Phase::Succeeded)) {
        assert_eq!(running.map(|r| r.0), Some("False"), "{said}");
    }
    let seqs: Vec<i64> = status.transitions.iter().map(|t| t.seq).collect();
    assert!(seqs.windows(2).all(|pair| pair[1] == pair[0] + 1), "{:?}", status.transitions);
    assert!(seqs.len() <= 32);
}

/// The end of a script that has nothing more to do, and ends on TERM. Process 1 hears no signal that it has no handler
/// for: `sleep` in its place would cost the grace period at each stop.
pub const WAIT: &str = "trap 'exit 0' TERM; while :; do sleep 1000000 & wait; done";

/// Says that it heard TERM, and goes on.
pub const DEAF: &str = "trap 'echo TERM >>/data/heard' TERM; echo x >/data/begun; while :; do sleep 0.1; done";

/// The time that a thing that must not happen is given to happen: nothing can be waited for here.
pub async fn moment(length: Duration) {
    tokio::time::sleep(length).await;
}
