//! The agent dies before and after each thing that it does, and another goes on.
//!
//! For each point: what leads to it happens while no agent runs; one that is armed starts, and dies there; one that is
//! not starts, and what the object says is reached, with the process having run as often as it should and no more.

use berth::agent::failpoint::{Effect, Point, VARIABLE};
use berth::api::bot_container::{DeletionPolicy, OperatingMode, Phase, RestartPolicy};
use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::condition::{ConditionType, find};
use berth::api::{BotContainer, BotNode, BotSnapshot, BotSnapshotSpec};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};

use crate::common::{BotBuilder, Namespace, SOON, wait_for};
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
    /// Running, with a BotSnapshot asked for.
    Snapshotted,
    /// A BotSnapshot that is Ready is deleted.
    SnapshotDeleted,
    /// Of a BotSnapshot that is Ready, an OCI image is asked for.
    Exported,
    /// Running, with a rollback asked for that keeps what it replaces.
    Rolled,
    /// The same, and what it replaces goes.
    RolledBare,
    /// A rollback that waits, since the bot is paused, is withdrawn.
    Withdrawn,
    /// Running, with another image.
    Moved,
    /// On another image on which it can't start, and back.
    MovedBack,
    /// Deleted under `Retain` while running.
    Retained,
    /// A new bot of a botId that left a version.
    Restored,
    /// What a bot left whose namespace was deleted is adopted.
    Adopted,
}

fn way(effect: Effect) -> Way {
    match effect {
        Effect::PreparePull => Way::Pulled,
        Effect::PrepareSnapshot
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
        Effect::RemoveLayer | Effect::RemoveFiles | Effect::RemoveSpare | Effect::RemoveContainer => Way::Deleted,
        Effect::AsideNote
        | Effect::AsideCopy
        | Effect::AsideNoteDone
        | Effect::SwitchNote
        | Effect::ReplacedTaken
        | Effect::ReplacedHold
        | Effect::ReplacedCommit
        | Effect::ReplacedNote => Way::Rolled,
        Effect::ReplacedRemove => Way::RolledBare,
        Effect::PullAsideNote | Effect::CarryPrepare | Effect::CarryCopy | Effect::CarryNote => Way::Moved,
        Effect::SwitchBackNote => Way::MovedBack,
        Effect::AsideRemove | Effect::AsideForget => Way::Withdrawn,
        Effect::PreserveTaken | Effect::PreserveHold | Effect::PreserveCommit => Way::Retained,
        Effect::RestoreCopy => Way::Restored,
        Effect::SnapshotPrepare
        | Effect::SnapshotCopy
        | Effect::SnapshotFreeze
        | Effect::SnapshotHold
        | Effect::SnapshotCommit
        | Effect::SnapshotStatus => Way::Snapshotted,
        Effect::AdoptCopy | Effect::AdoptCommit | Effect::AdoptDrop => Way::Adopted,
        Effect::ExportLayer | Effect::ExportImage => Way::Exported,
        Effect::SnapshotRemoveCopy | Effect::SnapshotRemove => Way::SnapshotDeleted,
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
        Way::Rolled | Way::RolledBare => rolled(counting(name), &version(name), way == Way::Rolled),
        Way::Retained | Way::Restored | Way::Adopted => {
            counting(name).id(name).with(|spec| spec.deletion_policy = DeletionPolicy::Retain)
        }
        _ => counting(name),
    };
    bot.restart(RestartPolicy::Never)
}

/// Name of the BotSnapshot of a bot.
fn version(name: &str) -> String {
    format!("{name}-v")
}

fn rolled(bot: BotBuilder, snapshot: &str, keep: bool) -> BotBuilder {
    let rollback = serde_json::json!({"id": "back", "snapshotName": snapshot, "keepReplaced": keep});
    bot.with(|spec| spec.rollback = Some(serde_json::from_value(rollback).unwrap()))
}

impl Scene {
    /// An image of the same contents as the demo's, under another name.
    fn other_image(&self) -> String {
        format!("{}/berth/other-{}:1", self.cluster.env("BERTH_REGISTRY"), self.ns.name())
    }

    async fn snapshot(&self, name: &str) {
        let snapshot = BotSnapshot::new(&version(name), BotSnapshotSpec::of(name));
        self.ns.api::<BotSnapshot>().create(&PostParams::default(), &snapshot).await.unwrap();
    }

    /// Waits until every BotSnapshot of the namespace is Ready, and there are so many.
    async fn versions(&self, count: usize, why: impl std::fmt::Display) -> Vec<BotSnapshot> {
        wait_for(format!("{why}: {count} versions Ready"), SOON, || async {
            let all = self.ns.api::<BotSnapshot>().list(&Default::default()).await.unwrap().items;
            let ready = |s: &BotSnapshot| s.status.as_ref().is_some_and(|s| s.phase == Some(SnapshotPhase::Ready));
            if all.len() == count && all.iter().all(ready) {
                return Ok(all);
            }
            Err(all.iter().map(|s| serde_json::to_string(&s.status).unwrap()).collect::<Vec<_>>().join(", "))
        })
        .await
    }

    /// Waits until the BotNode tells of so many layers without an object.
    async fn orphans(&self, count: usize, why: impl std::fmt::Display) {
        let nodes: Api<BotNode> = Api::all(self.ns.client());
        wait_for(format!("{why}: {count} orphans"), SOON, || async {
            let status = nodes.get(self.agent.node()).await.unwrap().status.unwrap_or_default();
            if status.orphans.len() == count { Ok(()) } else { Err(format!("{:?}", status.orphans)) }
        })
        .await;
    }

    /// Deletes what a bot left.
    async fn no_versions(&self) {
        let api = self.ns.api::<BotSnapshot>();
        for snapshot in api.list(&Default::default()).await.unwrap().items {
            // It may be going already.
            let _ = api.delete(snapshot.metadata.name.as_ref().unwrap(), &DeleteParams::default()).await;
        }
        self.versions(0, "all deleted").await;
    }

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
            Way::Snapshotted
            | Way::SnapshotDeleted
            | Way::Exported
            | Way::Rolled
            | Way::RolledBare
            | Way::Withdrawn => {
                let bot = self.apply(counting(name).restart(RestartPolicy::Never)).await;
                self.phase(name, Phase::Running).await;
                self.started(&bot, 1).await;
                if way != Way::Snapshotted {
                    self.snapshot(name).await;
                    self.versions(1, name).await;
                }
                if way == Way::Withdrawn {
                    let waits = rolled(base(way, name), &version(name), false).paused();
                    self.apply(waits).await;
                    self.ns
                        .until(name, "RestartPending", SOON, |bot| {
                            let conditions = bot.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
                            find(conditions, ConditionType::Ready).is_some_and(|c| c.reason == "RestartPending")
                        })
                        .await;
                }
                Some(bot)
            }
            Way::Moved | Way::MovedBack => {
                let bot = self.apply(base(way, name)).await;
                self.phase(name, Phase::Running).await;
                self.started(&bot, 1).await;
                if way == Way::MovedBack {
                    let next = base(way, name).image(self.other_image()).command(["/no/such/program"]);
                    self.apply(next).await;
                    self.phase(name, Phase::Failed).await;
                }
                Some(bot)
            }
            Way::Restored => {
                let bot = self.apply(base(way, name)).await;
                self.phase(name, Phase::Running).await;
                self.started(&bot, 1).await;
                self.ns.delete(name, SOON).await;
                self.versions(1, name).await;
                None
            }
            Way::Adopted => {
                let doomed = Namespace::create(self.cluster, "doomed").await;
                doomed.apply(base(way, name).on(self.agent.node())).await;
                let bot = doomed.ready(name, SOON).await;
                doomed.end().await;
                self.orphans(1, name).await;
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
            Way::Up
            | Way::Addressed
            | Way::Pulled
            | Way::Unstartable
            | Way::Rolled
            | Way::RolledBare
            | Way::Restored => self.apply(next).await,
            Way::Withdrawn => self.apply(next.paused()).await,
            Way::Moved => self.apply(next.image(self.other_image())).await,
            Way::MovedBack => self.apply(next).await,
            Way::Snapshotted => {
                self.snapshot(name).await;
                bot.unwrap().clone()
            }
            Way::SnapshotDeleted => {
                let api = self.ns.api::<BotSnapshot>();
                api.delete(&version(name), &DeleteParams::default()).await.unwrap();
                bot.unwrap().clone()
            }
            Way::Exported => {
                let patch = Patch::Merge(serde_json::json!({"spec": {"export": "OCI"}}));
                self.ns.api::<BotSnapshot>().patch(&version(name), &PatchParams::default(), &patch).await.unwrap();
                bot.unwrap().clone()
            }
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
            Way::Adopted => {
                let orphan = format!("berth-v-{}", bot.unwrap().metadata.uid.as_ref().unwrap());
                let entry =
                    serde_json::json!({"orphan": orphan, "namespace": self.ns.name(), "snapshotName": version(name)});
                let patch = Patch::Merge(serde_json::json!({"spec": {"adopt": [entry]}}));
                let nodes: Api<BotNode> = Api::all(self.ns.client());
                nodes.patch(self.agent.node(), &PatchParams::default(), &patch).await.unwrap();
                bot.unwrap().clone()
            }
            Way::Deleted | Way::Retained => {
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
            Way::Snapshotted => {
                self.versions(1, point).await;
                self.phase(name, Phase::Running).await;
                starts(1);
            }
            Way::Adopted => {
                self.versions(1, point).await;
                self.orphans(0, point).await;
            }
            Way::Exported => {
                let api = self.ns.api::<BotSnapshot>();
                let digest = wait_for(format!("{point}: an image"), SOON, || async {
                    let status = api.get(&version(name)).await.unwrap().status.unwrap();
                    let exported =
                        find(&status.conditions, ConditionType::Exported).is_some_and(|c| c.status == "True");
                    status.digest.clone().filter(|_| exported).ok_or(format!("{status:?}"))
                });
                let digest = digest.await;
                let blobs = self.agent.ctr(["content", "list", "-q"]);
                assert!(blobs.contains(&digest), "{point}: {digest} of {blobs}");
                self.phase(name, Phase::Running).await;
                starts(1);
            }
            Way::SnapshotDeleted => {
                self.versions(0, point).await;
                self.phase(name, Phase::Running).await;
                starts(1);
            }
            Way::Rolled | Way::RolledBare => {
                let bot = self.ns.ready(name, SOON).await;
                // The start that the version holds, and one after going back to it.
                self.started(&bot, 2).await;
                starts(2);
                assert_eq!(bot.status.as_ref().unwrap().rollback.as_ref().unwrap().version, Some(1), "{point}");
                self.versions(if way == Way::Rolled { 2 } else { 1 }, point).await;
            }
            Way::Moved | Way::MovedBack => {
                let seen = self.ns.ready(name, SOON).await;
                self.started(bot, 2).await;
                starts(2);
                let image = seen.status.unwrap().image.unwrap().reference;
                assert_eq!(image == self.other_image(), way == Way::Moved, "{point}: {image}");
                self.versions(if way == Way::Moved { 1 } else { 2 }, point).await;
            }
            Way::Withdrawn => {
                self.ns.ready(name, SOON).await;
                starts(1);
                wait_for(format!("{point}: no layer beside"), SOON, || async {
                    let left = self.agent.ctr(["snapshots", "list"]);
                    if left.contains(&format!("{}.2", id(bot))) { Err(left) } else { Ok(()) }
                })
                .await;
            }
            Way::Restored => {
                let bot = self.ns.ready(name, SOON).await;
                self.started(&bot, 2).await;
                starts(2);
            }
            Way::Retained => {
                wait_for(format!("{point}: {name} gone"), SOON, || async {
                    match self.ns.bots().get_opt(name).await {
                        Ok(None) => Ok(()),
                        other => Err(format!("{other:?}")),
                    }
                })
                .await;
                self.versions(1, point).await;
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
        if !matches!(way, Way::Deleted | Way::Orphaned | Way::Retained | Way::Adopted) {
            self.ns.delete(&name, SOON).await;
        }
        self.no_versions().await;
        self.nothing_left().await;
    }
}

const ENDS_WHEN_TOLD: &str = "while ! [ -e /data/end ]; do usleep 20000; done; echo last words; exit 3";

const UP: &[Way] = &[Way::Up, Way::Addressed, Way::Pulled, Way::Unstartable];
const CHANGE: &[Way] = &[Way::Paused, Way::Resumed, Way::Limited, Way::Skilled, Way::Changed];
const END: &[Way] = &[Way::StoppedFrozen, Way::Stopped, Way::Stubborn, Way::Ended, Way::Lost, Way::Left, Way::Settled];
const DELETION: &[Way] = &[Way::Deleted, Way::Orphaned];
const SNAPSHOT: &[Way] = &[Way::Snapshotted, Way::Exported, Way::SnapshotDeleted];
const ROLLBACK: &[Way] = &[Way::Rolled, Way::RolledBare, Way::Withdrawn];
const MOVE: &[Way] = &[Way::Moved, Way::MovedBack];
const KEPT: &[Way] = &[Way::Retained, Way::Restored, Way::Adopted];

async fn points(name: &str, ways: &[Way]) {
    let mut scene = Scene::new_with(name, &[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    if ways.contains(&Way::Moved) {
        scene.warm(&scene.other_image()).await;
    }
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

#[tokio::test]
async fn an_agent_killed_at_any_point_of_a_snapshot_makes_it_true_and_leaves_the_bot_alone() {
    points("snap", SNAPSHOT).await;
}

#[tokio::test]
async fn an_agent_killed_at_any_point_of_a_rollback_ends_on_the_old_layer_or_the_new_one() {
    points("roll", ROLLBACK).await;
}

#[tokio::test]
async fn an_agent_killed_at_any_point_of_a_change_of_the_image_carries_the_data_over() {
    points("move", MOVE).await;
}

#[tokio::test]
async fn an_agent_killed_at_any_point_of_keeping_and_restoring_loses_nothing() {
    points("kept", KEPT).await;
}

#[test]
fn no_point_is_left_out() {
    let walked = [UP, CHANGE, END, DELETION, SNAPSHOT, ROLLBACK, MOVE, KEPT].concat();
    for point in Point::all() {
        assert!(walked.contains(&way(point.effect)), "{point}");
    }
}
