//! The agent dies before and after each thing that it does, and another goes on.
//!
//! For each point: what leads to it happens while no agent runs; one that is armed starts, and dies there; one that is
//! not starts, and what the object says is reached, with the process having run as often as it should and no more.

use berth::agent::failpoint::{Effect, Point, VARIABLE};
use berth::api::BotContainer;
use berth::api::bot_container::{OperatingMode, Phase, RestartPolicy};
use berth::api::condition::{ConditionType, find};
use kube::api::{DeleteParams, Patch, PatchParams};

use crate::common::{BotBuilder, SOON, wait_for};
use crate::scene::{Scene, counting, diarist, id};

/// A point that is not reached by then is not on the way.
const DIES: std::time::Duration = std::time::Duration::from_secs(25);

const OFF: (&str, &str) = (VARIABLE, "");

/// What leads to an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A new bot.
    Up,
    /// A new bot whose environment tells its address, so that its network comes before its container.
    Addressed,
    /// A new bot whose image is not on the node.
    Pulled,
    /// A new bot whose program is not in its image.
    Unstartable,
    /// Running -> Paused.
    Paused,
    /// Paused -> Running.
    Resumed,
    /// Running, with other limits.
    Limited,
    /// Running, with a skill.
    Skilled,
    /// Running, with another environment.
    Changed,
    /// Paused -> Stopped.
    StoppedFrozen,
    /// Running -> Stopped.
    Stopped,
    /// Running -> Stopped, and it ignores TERM.
    Stubborn,
    /// It ended by itself, and is not to run again.
    Ended,
    /// Its task was removed by somebody, and it is not to run again.
    Lost,
    /// The same, and what containerd has on the disk of a task is left.
    Left,
    /// It had ended by itself, then Stopped.
    Settled,
    /// Deleted while running.
    Deleted,
    /// Its object went without its agent having done anything.
    Orphaned,
}

fn way(effect: Effect) -> Way {
    match effect {
        Effect::PreparePull => Way::Pulled,
        Effect::PrepareLease
        | Effect::PrepareHold
        | Effect::PrepareSnapshot
        | Effect::PrepareNamespace
        | Effect::PrepareOutput
        | Effect::WriteFiles
        | Effect::WriteContainer
        | Effect::CreateConnect
        | Effect::CreateOutput
        | Effect::CreateTask
        | Effect::StartNote
        | Effect::StartStart
        | Effect::StatusWrite
        | Effect::StatusEvent => Way::Up,
        Effect::PrepareNetwork => Way::Addressed,
        Effect::StartNoteRefused | Effect::StartDeleteRefused => Way::Unstartable,
        Effect::Pause => Way::Paused,
        Effect::Resume => Way::Resumed,
        Effect::LimitsUpdate | Effect::LimitsNote => Way::Limited,
        Effect::SkillsWrite | Effect::SkillsNote => Way::Skilled,
        Effect::StopNote | Effect::StopSignal | Effect::StopNoteSent | Effect::ReapNote | Effect::ReapDelete => {
            Way::Changed
        }
        Effect::StopResume => Way::StoppedFrozen,
        Effect::KillNote | Effect::KillSignal => Way::Stubborn,
        Effect::ReapNoteOutput => Way::Ended,
        Effect::PutAwayDelete | Effect::PutAwayRest => Way::Left,
        Effect::LostNote => Way::Lost,
        Effect::SettleNote => Way::Settled,
        Effect::RemoveNetwork | Effect::RemoveOutput => Way::Stopped,
        Effect::RemoveLayer | Effect::RemoveFiles | Effect::RemoveLease | Effect::RemoveContainer => Way::Deleted,
        Effect::RemoveLogs => Way::Orphaned,
    }
}

/// The bot of a way, before anything happens to it. None of them may run twice where nobody asks for it.
fn base(way: Way, name: &str) -> BotBuilder {
    let bot = match way {
        Way::Stubborn => diarist(name, "trap '' TERM; sleep 100000 & wait; wait").grace(1),
        Way::Ended | Way::Settled => diarist(name, "echo last words; exit 3"),
        Way::Unstartable => counting(name).command(["/no/such/program"]),
        Way::Resumed | Way::StoppedFrozen => counting(name).paused(),
        Way::Addressed => counting(name).with(|spec| {
            let variable = serde_json::json!({"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}});
            spec.env.push(serde_json::from_value(variable).unwrap());
        }),
        _ => counting(name),
    };
    bot.restart(RestartPolicy::Never)
}

impl Scene {
    /// Brings a bot to where its way begins; the agent runs.
    async fn bring(&self, way: Way, name: &str) -> Option<BotContainer> {
        match way {
            Way::Up | Way::Addressed | Way::Unstartable => None,
            Way::Pulled => {
                for image in self.agent.ctr(["images", "list", "-q"]).lines() {
                    self.agent.ctr(["images", "remove", "--sync", image]);
                }
                None
            }
            Way::Resumed | Way::StoppedFrozen => {
                // Created Paused it would never have run.
                let bot = self.apply(base(way, name).mode(OperatingMode::Running)).await;
                self.phase(name, Phase::Running).await;
                self.started(&bot, 1).await;
                self.apply(base(way, name)).await;
                self.phase(name, Phase::Paused).await;
                Some(bot)
            }
            Way::Settled => {
                let bot = self.apply(base(way, name)).await;
                self.phase(name, Phase::Failed).await;
                Some(bot)
            }
            Way::Ended => {
                // It ends when it is told, which is when no agent looks.
                let bot = self.apply(diarist(name, ENDS_WHEN_TOLD).restart(RestartPolicy::Never)).await;
                self.phase(name, Phase::Running).await;
                self.started(&bot, 1).await;
                Some(bot)
            }
            _ => {
                let bot = self.apply(base(way, name)).await;
                self.phase(name, Phase::Running).await;
                self.started(&bot, 1).await;
                Some(bot)
            }
        }
    }

    /// What leads to the point; no agent runs.
    async fn lead(&self, way: Way, name: &str, bot: Option<&BotContainer>) -> BotContainer {
        let next = base(way, name);
        match way {
            Way::Up | Way::Addressed | Way::Pulled | Way::Unstartable => self.apply(next).await,
            Way::Paused => self.apply(next.paused()).await,
            Way::Resumed => self.apply(next.mode(OperatingMode::Running)).await,
            Way::Limited => self.apply(next.limit("pids", "77")).await,
            Way::Skilled => {
                let skill = serde_json::json!({"name": "search", "content": "# How to"});
                self.apply(next.with(|spec| spec.skills.push(serde_json::from_value(skill).unwrap()))).await
            }
            Way::Changed => self.apply(next.env("MORE", "1")).await,
            Way::Stopped | Way::StoppedFrozen | Way::Stubborn | Way::Settled => self.apply(next.stopped()).await,
            Way::Ended => {
                let bot = bot.unwrap();
                // Not into the layer's own directory: a mounted overlayfs does not look there again.
                let pid = self.ns.bots().get(name).await.unwrap().status.unwrap().task.unwrap().pid;
                std::fs::write(format!("/proc/{pid}/root/data/end"), "").unwrap();
                wait_for("its end", SOON, || async {
                    let tasks = self.agent.ctr(["tasks", "list"]);
                    if tasks.contains("STOPPED") { Ok(()) } else { Err(tasks) }
                })
                .await;
                bot.clone()
            }
            Way::Lost => {
                self.agent.ctr(["tasks", "delete", "--force", &id(bot.unwrap())]);
                bot.unwrap().clone()
            }
            Way::Left => {
                self.agent.ctr(["tasks", "delete", "--force", &id(bot.unwrap())]);
                // Half removed, and half made.
                for name in [format!(".{}", id(bot.unwrap())), id(bot.unwrap())] {
                    let bundle = self.bundles().join(name);
                    std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
                    std::fs::write(bundle.join("config.json"), "{}").unwrap();
                }
                // A record without a state is what `runc create` leaves that is killed.
                std::fs::create_dir_all(self.runc(bot.unwrap())).unwrap();
                bot.unwrap().clone()
            }
            Way::Deleted => {
                self.ns.bots().delete(name, &DeleteParams::default()).await.unwrap();
                bot.unwrap().clone()
            }
            Way::Orphaned => {
                let none = serde_json::json!({"metadata": {"finalizers": null}});
                self.ns.bots().delete(name, &DeleteParams::default()).await.unwrap();
                self.ns.bots().patch(name, &PatchParams::default(), &Patch::Merge(&none)).await.unwrap();
                bot.unwrap().clone()
            }
        }
    }

    /// What the object says is reached.
    async fn reached(&self, way: Way, name: &str, bot: &BotContainer, point: Point) {
        let starts = |n: usize| self.diary(bot).assert_starts(n, point);
        match way {
            Way::Up | Way::Addressed | Way::Pulled | Way::Resumed | Way::Limited | Way::Skilled => {
                let seen = self.phase(name, Phase::Running).await;
                self.started(bot, 1).await;
                starts(1);
                if way == Way::Limited {
                    let limits = seen.status.unwrap().resources.unwrap().limits;
                    assert_eq!(limits["pids"].0, "77", "{point}");
                } else if way == Way::Skilled {
                    let pid = seen.status.unwrap().task.unwrap().pid;
                    let file = format!("/proc/{pid}/root/data/.skills/search/SKILL.md");
                    wait_for(format!("{point}: the skill"), SOON, || async {
                        match std::fs::read_to_string(&file) {
                            Ok(text) if text.ends_with("# How to\n") => Ok(()),
                            other => Err(format!("{other:?}")),
                        }
                    })
                    .await;
                }
            }
            Way::Changed => {
                self.phase(name, Phase::Running).await;
                self.started(bot, 2).await;
                starts(2);
                assert!(self.diary(bot).farewells > 0, "{point}: it never heard TERM");
            }
            Way::Paused => {
                self.phase(name, Phase::Paused).await;
                starts(1);
            }
            Way::Stopped | Way::StoppedFrozen | Way::Stubborn | Way::Settled => {
                self.phase(name, Phase::Stopped).await;
                starts(1);
            }
            Way::Ended | Way::Lost | Way::Left | Way::Unstartable => {
                let bot = self.phase(name, Phase::Failed).await;
                let last = bot.status.as_ref().and_then(|s| s.last_termination.clone()).unwrap();
                let (reason, ran) = match way {
                    Way::Ended => ("Error", 1),
                    Way::Lost | Way::Left => ("TaskLost", 1),
                    _ => ("StartError", 0),
                };
                assert_eq!(last.reason, reason, "{point}: {last:?}");
                starts(ran);
                let conditions = &bot.status.as_ref().unwrap().conditions;
                let running = find(conditions, ConditionType::Running).unwrap();
                assert_eq!(running.status, "False", "{point}: {running:?}");
            }
            Way::Deleted | Way::Orphaned => {
                wait_for(format!("{point}: {name} gone"), SOON, || async {
                    match self.ns.bots().get_opt(name).await {
                        Ok(None) => Ok(()),
                        other => Err(format!("{other:?}")),
                    }
                })
                .await;
                self.nothing_left().await;
            }
        }
    }

    /// Dies at one point and goes on.
    async fn point(&mut self, point: Point) {
        let way = way(point.effect);
        let name = point.to_string().replace(['.', '_'], "-");
        let bot = self.bring(way, &name).await;
        self.agent.kill_9();
        let bot = self.lead(way, &name, bot.as_ref()).await;
        self.agent.spawn_again(&[(VARIABLE, &point.to_string())]);
        self.agent.killed(point, DIES).await;
        self.agent.start_again(&[OFF]).await;
        self.reached(way, &name, &bot, point).await;
        if !matches!(way, Way::Deleted | Way::Orphaned) {
            self.ns.delete(&name, SOON).await;
        }
        self.nothing_left().await;
    }
}

const ENDS_WHEN_TOLD: &str = "while ! [ -e /data/end ]; do usleep 20000; done; echo last words; exit 3";

const UP: &[Way] = &[Way::Up, Way::Addressed, Way::Pulled, Way::Unstartable];
const CHANGE: &[Way] = &[Way::Paused, Way::Resumed, Way::Limited, Way::Skilled, Way::Changed];
const END: &[Way] = &[Way::StoppedFrozen, Way::Stopped, Way::Stubborn, Way::Ended, Way::Lost, Way::Left, Way::Settled];
const DELETION: &[Way] = &[Way::Deleted, Way::Orphaned];

async fn points(name: &str, ways: &[Way]) {
    let mut scene = Scene::new_with(name, &[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    for point in Point::all().filter(|point| ways.contains(&way(point.effect))) {
        let began = std::time::Instant::now();
        scene.point(point).await;
        println!("{point}: {:?}", began.elapsed());
    }
    scene.end().await;
}

#[tokio::test]
async fn an_agent_killed_at_any_point_of_the_way_up_starts_the_bot_once() {
    points("up", UP).await;
}

#[tokio::test]
async fn an_agent_killed_at_any_point_of_a_change_makes_it_once() {
    points("change", CHANGE).await;
}

#[tokio::test]
async fn an_agent_killed_at_any_point_of_an_end_runs_nothing_twice() {
    points("end", END).await;
}

#[tokio::test]
async fn an_agent_killed_at_any_point_of_a_deletion_leaves_nothing() {
    points("deletion", DELETION).await;
}

#[test]
fn no_point_is_left_out() {
    let walked = [UP, CHANGE, END, DELETION].concat();
    for point in Point::all() {
        assert!(walked.contains(&way(point.effect)), "{point}");
    }
}
