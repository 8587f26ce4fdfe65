//! Snapshots that are cut off: by the death of the agent, of containerd, of the bot, by a deadline, by a full disk.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth::api::bot_container::Phase;
use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::condition::{ConditionType, find};
use berth::api::{BotContainer, BotSnapshot, BotSnapshotSpec};
use kube::api::{DeleteParams, PostParams};

use crate::common::{SOON, wait_for};
use crate::scene::{Scene, counting, id};
use crate::servers::kill;

/// What a bot has to copy in these tests: enough that something can happen meanwhile.
const MUCH: usize = 400 << 20;

impl Scene {
    async fn ask_for(&self, name: &str, spec: BotSnapshotSpec) {
        self.ns.snapshots().create(&PostParams::default(), &BotSnapshot::new(name, spec)).await.unwrap();
    }

    /// A bot with much to copy.
    async fn heavy(&self, name: &str) -> BotContainer {
        let bot = self.apply(counting(name)).await;
        self.phase(name, Phase::Running).await;
        self.started(&bot, 1).await;
        let pid = self.pid(name).await;
        fs::write(format!("/proc/{pid}/root/data/much"), vec![7_u8; MUCH]).unwrap();
        bot
    }

    fn debts(&self) -> PathBuf {
        PathBuf::from(self.agent.env("BERTH_RUN_DIR")).join("frozen")
    }

    fn is_frozen(&self, bot: &BotContainer) -> bool {
        let parent = self.agent.env("BERTH_CGROUP_PARENT").trim_start_matches('/').to_owned();
        let v1 = PathBuf::from("/sys/fs/cgroup/freezer").join(&parent).join(id(bot)).join("freezer.state");
        match fs::read_to_string(v1) {
            Ok(state) => state.trim() != "THAWED",
            Err(_) => {
                let v2 = PathBuf::from("/sys/fs/cgroup").join(parent).join(id(bot)).join("cgroup.freeze");
                fs::read_to_string(v2).unwrap().trim() == "1"
            }
        }
    }

    /// Nothing of a version is left beside containerd.
    fn no_folder(&self) {
        let folders = PathBuf::from(self.agent.env("BERTH_STATE_DIR")).join("snapshots");
        let left: Vec<_> = fs::read_dir(folders).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[tokio::test]
async fn a_bot_frozen_for_an_agent_that_died_is_thawed_though_no_other_comes() {
    let mut scene = Scene::new_with("snap-dies", &[("BERTH_COPIER_SLOW_FREEZE_MILLIS", "60000")]).await;
    let bot = scene.apply(counting("web")).await;
    scene.phase("web", Phase::Running).await;
    scene.started(&bot, 1).await;
    let pid = scene.pid("web").await;
    let spec = BotSnapshotSpec { max_freeze_millis: 60_000, ..BotSnapshotSpec::of("web") };
    scene.ask_for("first", spec).await;
    wait_for("frozen", SOON, || async {
        let noted = fs::read_dir(scene.debts()).unwrap().count();
        if noted == 1 && scene.is_frozen(&bot) { Ok(()) } else { Err(format!("{noted} debts")) }
    })
    .await;
    scene.agent.kill_9();
    let died = Instant::now();
    wait_for("thawed", Duration::from_secs(5), || async {
        if scene.is_frozen(&bot) { Err("frozen".to_owned()) } else { Ok(()) }
    })
    .await;
    println!("thawed {:?} after the agent died", died.elapsed());
    assert!(died.elapsed() < Duration::from_secs(2), "{:?}", died.elapsed());
    assert_eq!(fs::read_dir(scene.debts()).unwrap().count(), 0);

    // The next agent takes it; the bot never knew.
    scene.agent.start_again(&[("BERTH_COPIER_SLOW_FREEZE_MILLIS", "0")]).await;
    let ready = scene.ns.snapshot("first", SnapshotPhase::Ready).await;
    assert_eq!(ready.status.unwrap().version, Some(1));
    assert_eq!(scene.pid("web").await, pid);
    scene.diary(&bot).assert_starts(1, "web");
    scene.end().await;
}

#[tokio::test]
async fn a_snapshot_that_is_cut_off_leaves_the_bot_alone_and_nothing_behind() {
    let scene = Scene::new_with("snap-cut", &[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    let bot = scene.heavy("web").await;
    let pid = scene.pid("web").await;

    // Deleted while it is copied.
    scene.ask_for("deleted", BotSnapshotSpec::of("web")).await;
    scene.ns.snapshot("deleted", SnapshotPhase::Copying).await;
    scene.ns.snapshots().delete("deleted", &DeleteParams::default()).await.unwrap();
    scene.ns.no_snapshot("deleted").await;
    scene.no_folder();

    // Too late: its deadline is over before it is copied.
    let spec = BotSnapshotSpec { failure_deadline_seconds: 1, ..BotSnapshotSpec::of("web") };
    fs::write(format!("/proc/{pid}/root/data/more"), vec![7_u8; MUCH]).unwrap();
    scene.ask_for("late", spec).await;
    let late = scene.ns.snapshot("late", SnapshotPhase::Failed).await;
    let ready = find(&late.status.as_ref().unwrap().conditions, ConditionType::Ready).unwrap().clone();
    assert_eq!(ready.reason, "DeadlineExceeded", "{ready:?}");
    wait_for("no copy left", SOON, || async {
        let left = scene.agent.ctr(["snapshots", "list"]);
        if left.contains(".copy") { Err(left) } else { Ok(()) }
    })
    .await;

    // The copier is killed: it is taken again.
    scene.ask_for("again", BotSnapshotSpec::of("web")).await;
    scene.ns.snapshot("again", SnapshotPhase::Copying).await;
    let copiers = std::process::Command::new("pkill").args(["-KILL", "-x", "berth-copier"]).status().unwrap();
    println!("copiers were killed: {}", copiers.success());
    let ready = scene.ns.snapshot("again", SnapshotPhase::Ready).await;
    assert_eq!(ready.status.unwrap().version, Some(3));
    assert!(!scene.is_frozen(&bot));
    assert_eq!(scene.pid("web").await, pid);
    scene.diary(&bot).assert_starts(1, "web");

    // The bot is deleted while it is copied, and takes its snapshots along.
    scene.ask_for("last", BotSnapshotSpec::of("web")).await;
    scene.ns.snapshot("last", SnapshotPhase::Copying).await;
    scene.ns.delete("web", SOON).await;
    for name in ["late", "again", "last"] {
        scene.ns.no_snapshot(name).await;
    }
    scene.end().await;
}

#[tokio::test]
async fn containerd_killed_in_the_middle_of_a_snapshot_costs_time_only() {
    let scene = Scene::alone("snap-runtime").await;
    let bot = scene.heavy("web").await;
    let pid = scene.pid("web").await;
    scene.ask_for("first", BotSnapshotSpec::of("web")).await;
    scene.ns.snapshot("first", SnapshotPhase::Copying).await;
    kill("-KILL", scene.cluster.pid("containerd"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!scene.is_frozen(&bot), "frozen though nothing can be made of it");
    scene.cluster.up_again();
    let ready = scene.ns.snapshot("first", SnapshotPhase::Ready).await;
    assert_eq!(ready.status.unwrap().version, Some(1));
    assert_eq!(scene.pid("web").await, pid);
    scene.diary(&bot).assert_starts(1, "web");
    scene.end().await;
}

/// A fork that is being made of a version, and a rollback to one, when that is deleted.
#[tokio::test]
async fn a_version_that_is_deleted_while_it_is_used_leaves_each_bot_on_one_layer() {
    let scene = Scene::new_with("snap-used", &[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    let bot = scene.heavy("web").await;
    scene.ask_for("used", BotSnapshotSpec::of("web")).await;
    scene.ns.snapshot("used", SnapshotPhase::Ready).await;
    let rollback = serde_json::json!({"id": "back", "snapshotName": "used"});
    let rolled = counting("web").with(|spec| spec.rollback = Some(serde_json::from_value(rollback).unwrap()));
    scene.apply(rolled).await;
    scene.ns.snapshots().delete("used", &DeleteParams::default()).await.unwrap();
    scene.ns.no_snapshot("used").await;
    // Either it was copied before that, or it can't be gone back to and says so. It runs in both, with all its data.
    let settled = scene
        .ns
        .until("web", "rolled back, or told that it can't be", SOON, |bot| {
            let status = bot.status.clone().unwrap_or_default();
            let ready = find(&status.conditions, ConditionType::Ready).cloned();
            status.phase == Some(Phase::Running)
                && ready.is_some_and(|c| c.status == "True" || c.reason == "RollbackFailed")
        })
        .await;
    println!("{:?}", settled.status.as_ref().and_then(|s| s.rollback.clone()));
    scene.diary(&bot).assert_whole("web");
    let pid = scene.pid("web").await;
    assert_eq!(fs::metadata(format!("/proc/{pid}/root/data/much")).unwrap().len(), MUCH as u64);
    scene.end().await;
}
