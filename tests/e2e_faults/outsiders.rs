//! Somebody with `ctr`, `umount` and `kill`: what they break is restored or told, and no layer is lost by the collector.

use std::process::Command;
use std::time::Duration;

use berth::api::bot_container::{Phase, RestartPolicy};
use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::{BotContainer, BotSnapshot, BotSnapshotSpec};
use kube::api::{DeleteParams, PostParams};

use berth::api::condition::{ConditionType, Reason, find};
use berth::containerd::Containerd;

use crate::common::{SOON, run, wait_for};
use crate::scene::{Scene, counting, diarist, id};
use crate::servers::kill;

impl Scene {
    async fn running(&self, name: &str) -> BotContainer {
        let bot = self.apply(counting(name)).await;
        self.phase(name, Phase::Running).await;
        self.started(&bot, 1).await;
        bot
    }

    /// Runs again for the `n`th time, and nothing was lost.
    async fn again(&self, name: &str, bot: &BotContainer, n: usize) {
        self.started(bot, n).await;
        self.phase(name, Phase::Running).await;
        self.diary(bot).assert_starts(n, name);
    }
}

#[tokio::test]
async fn a_task_killed_by_hand_is_restarted_by_policy() {
    let scene = Scene::new("taskkill").await;
    let bot = scene.running("web").await;
    let once = scene.apply(counting("once").restart(RestartPolicy::Never)).await;
    scene.phase("once", Phase::Running).await;
    scene.started(&once, 1).await;
    scene.agent.ctr(["tasks", "kill", "--signal", "SIGKILL", &id(&bot)]);
    scene.agent.ctr(["tasks", "kill", "--signal", "SIGKILL", &id(&once)]);
    scene.again("web", &bot, 2).await;
    let seen = scene.phase("once", Phase::Failed).await;
    assert_eq!(seen.status.unwrap().last_termination.unwrap().exit_code, 137);
    scene.diary(&once).assert_starts(1, "once");
    scene.end().await;
}

#[tokio::test]
async fn a_task_removed_by_hand_is_restarted_by_policy() {
    let scene = Scene::new("taskrm").await;
    let bot = scene.running("web").await;
    let once = scene.apply(counting("once").restart(RestartPolicy::Never)).await;
    scene.phase("once", Phase::Running).await;
    scene.started(&once, 1).await;
    scene.agent.ctr(["tasks", "delete", "--force", &id(&bot)]);
    scene.agent.ctr(["tasks", "delete", "--force", &id(&once)]);
    scene.again("web", &bot, 2).await;
    scene.phase("once", Phase::Failed).await;
    scene.diary(&once).assert_starts(1, "once");
    scene.end().await;
}

#[tokio::test]
async fn a_task_paused_or_resumed_by_hand_is_set_right() {
    let scene = Scene::new("taskpause").await;
    let bot = scene.running("web").await;
    scene.agent.ctr(["tasks", "pause", &id(&bot)]);
    wait_for("it running again", SOON, || async {
        let tasks = scene.agent.ctr(["tasks", "list"]);
        if tasks.contains("RUNNING") { Ok(()) } else { Err(tasks) }
    })
    .await;
    scene.apply(counting("web").paused()).await;
    scene.phase("web", Phase::Paused).await;
    scene.agent.ctr(["tasks", "resume", &id(&bot)]);
    wait_for("it paused again", SOON, || async {
        let tasks = scene.agent.ctr(["tasks", "list"]);
        if tasks.contains("PAUSED") { Ok(()) } else { Err(tasks) }
    })
    .await;
    scene.diary(&bot).assert_starts(1, "web");
    scene.end().await;
}

#[tokio::test]
async fn a_container_removed_by_hand_is_made_anew_on_its_layer() {
    let scene = Scene::new("containerrm").await;
    let bot = scene.running("web").await;
    scene.apply(counting("web").stopped()).await;
    scene.phase("web", Phase::Stopped).await;
    scene.agent.ctr(["containers", "delete", "--keep-snapshot", &id(&bot)]);
    // The collector runs: nothing but our own label and lease keeps the layer.
    collect(&scene);
    scene.apply(counting("web")).await;
    scene.again("web", &bot, 2).await;
    scene.end().await;
}

/// Harm done: the bot's layer was looked for under the name of its first one, and it began anew on its image.
#[tokio::test]
async fn a_container_removed_by_hand_after_a_rollback_is_made_anew_on_the_layer_in_use() {
    let scene = Scene::new("containerrm2").await;
    let bot = scene.running("web").await;
    let snapshots = scene.ns.snapshots();
    snapshots.create(&PostParams::default(), &BotSnapshot::new("v", BotSnapshotSpec::of("web"))).await.unwrap();
    scene.ns.snapshot("v", SnapshotPhase::Ready).await;
    let back = serde_json::json!({"id": "back", "snapshotName": "v", "keepReplaced": false});
    let rolled = || counting("web").with(|spec| spec.rollback = Some(serde_json::from_value(back.clone()).unwrap()));
    scene.apply(rolled()).await;
    scene.ns.until("web", "rolled back", SOON, |bot| bot.status.as_ref().is_some_and(|s| s.rollback.is_some())).await;
    // The start that the version holds, and the one after going back to it.
    scene.again("web", &bot, 2).await;
    scene.apply(rolled().stopped()).await;
    scene.phase("web", Phase::Stopped).await;
    scene.agent.ctr(["containers", "delete", "--keep-snapshot", &id(&bot)]);
    collect(&scene);
    scene.apply(rolled()).await;
    scene.again("web", &bot, 3).await;
    snapshots.delete("v", &DeleteParams::default()).await.unwrap();
    scene.ns.no_snapshot("v").await;
    scene.end().await;
}

#[tokio::test]
async fn a_layer_removed_by_hand_from_a_stopped_bot_is_made_anew() {
    let scene = Scene::new("snapshotrm").await;
    let bot = scene.running("web").await;
    scene.apply(counting("web").stopped()).await;
    scene.phase("web", Phase::Stopped).await;
    scene.agent.ctr(["snapshots", "remove", &format!("{}.1", id(&bot))]);
    scene.apply(counting("web")).await;
    // Until then there is no layer to read in.
    scene.phase("web", Phase::Running).await;
    scene.again("web", &bot, 1).await;
    scene.end().await;
}

/// Makes containerd's collector run, by a lease that is deleted synchronously.
fn collect(scene: &Scene) {
    let lease = scene.agent.ctr(["leases", "create"]);
    scene.agent.ctr(["leases", "delete", "--sync", lease.trim()]);
}

#[tokio::test]
async fn labels_changed_by_hand_lose_no_layer_and_nothing_is_left_in_the_end() {
    let mut scene = Scene::new_with("labels", &[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    let bot = scene.running("web").await;
    let (container, layer) = (id(&bot), format!("{}.1", id(&bot)));
    let stranger = "berth.dev/uid=00000000-0000-0000-0000-000000000000";
    scene.agent.ctr(["containers", "label", &container, stranger, "berth.dev/spec-hash=0"]);
    scene.agent.ctr(["snapshots", "label", &layer, stranger, "containerd.io/gc.root="]);
    collect(&scene);
    // A new agent sweeps within seconds.
    scene.agent.kill_9();
    scene.agent.start_again(&[]).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    scene.touch("web").await;
    scene.diary(&bot).assert_starts(1, "web");
    scene.agent.ctr(["tasks", "kill", "--signal", "SIGKILL", &container]);
    scene.again("web", &bot, 2).await;
    scene.end().await;
}

#[tokio::test]
async fn a_network_namespace_unmounted_by_hand_is_made_anew_at_the_next_start() {
    let scene = Scene::new("netns").await;
    let bot = scene.running("web").await;
    let netns = format!("{}/netns/{}", scene.agent.env("BERTH_RUN_DIR"), id(&bot));
    run(Command::new("umount").arg(&netns));
    scene.agent.ctr(["tasks", "kill", "--signal", "SIGKILL", &id(&bot)]);
    scene.again("web", &bot, 2).await;
    let seen = scene.ns.bots().get("web").await.unwrap();
    assert!(seen.status.unwrap().network.unwrap().ip.is_some());
    // Unmounted and never used again.
    run(Command::new("umount").arg(&netns));
    scene.end().await;
}

/// Pids of this node's loggers.
fn loggers(scene: &Scene) -> Vec<u32> {
    let run_dir = scene.agent.env("BERTH_RUN_DIR").to_owned();
    let pids =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<String> = cmdline.split(|&b| b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        words.iter().any(|word| word == "logger") && words.iter().any(|word| word.contains(&run_dir))
    })
    .collect()
}

#[tokio::test]
async fn killed_loggers_cost_no_bot_and_are_there_again() {
    let scene = Scene::new("logger").await;
    let talks = "n=0; while :; do n=$((n+1)); echo line $n; usleep 50000; done";
    let bot = scene.apply(diarist("talks", talks)).await;
    scene.phase("talks", Phase::Running).await;
    let pid = scene.pid("talks").await;
    // Its folder is made with its first line.
    let logs = scene.agent.env("BERTH_LOG_DIR").to_owned();
    let uid = bot.metadata.uid.clone().unwrap();
    let log = wait_for("its log", SOON, || async {
        let mut dirs = std::fs::read_dir(&logs).into_iter().flatten().flatten().map(|entry| entry.path());
        let log = dirs.find(|dir| dir.to_string_lossy().ends_with(&uid)).map(|dir| dir.join("0.log"));
        log.filter(|log| log.exists()).ok_or_else(|| format!("none in {logs}"))
    })
    .await;
    let size = || std::fs::metadata(&log).map(|meta| meta.len()).unwrap_or_default();
    let pair = loggers(&scene);
    assert!(!pair.is_empty(), "there is a logger");
    for logger in &pair {
        kill("-KILL", *logger);
    }
    scene.touch("talks").await;
    let before = size();
    wait_for("the log growing", SOON, || async {
        if size() > before { Ok(()) } else { Err(format!("{before} bytes, loggers {:?}", loggers(&scene))) }
    })
    .await;
    assert_eq!(scene.pid("talks").await, pid);
    scene.diary(&bot).assert_starts(1, "talks");
    scene.end().await;
}

#[tokio::test]
async fn what_is_not_berths_in_its_namespace_is_left_alone() {
    let mut scene = Scene::new_with("foreign", &[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    let image = scene.cluster.image();
    scene.agent.ctr(["images", "pull", "--plain-http", &image]);
    scene.agent.ctr(["run", "--detach", &image, "foreign", "/bin/sleep", "100000"]);
    scene.agent.kill_9();
    scene.agent.start_again(&[]).await;
    let bot = scene.running("web").await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let tasks = scene.agent.ctr(["tasks", "list"]);
    assert!(tasks.lines().any(|line| line.starts_with("foreign") && line.contains("RUNNING")), "{tasks}");
    scene.diary(&bot).assert_starts(1, "web");
    scene.agent.ctr(["tasks", "delete", "--force", "foreign"]);
    scene.agent.ctr(["containers", "delete", "foreign"]);
    scene.end().await;
}

/// Harm done: a bot whose note was written over was taken for a stranger for ever. Deleted, its object went and its
/// process ran on, which no sweep ever ended.
#[tokio::test]
async fn a_note_that_somebody_wrote_over_is_told_and_goes_with_its_bot() {
    let scene = Scene::new("garbled").await;
    let bot = scene.running("web").await;
    let mended = scene.running("mended").await;
    let pid = scene.pid("web").await;
    for bot in [&bot, &mended] {
        garble(&scene, &id(bot)).await;
    }
    for name in ["web", "mended"] {
        scene.touch(name).await;
        let seen = scene
            .ns
            .until(name, "told", SOON, |bot| {
                let conditions = bot.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
                find(conditions, ConditionType::Ready).is_some_and(|c| c.reason == Reason::ForeignContainer.as_str())
            })
            .await;
        assert_eq!(seen.status.unwrap().phase, Some(Phase::Running), "it runs all the same");
    }
    assert!(std::path::Path::new(&format!("/proc/{pid}/exe")).exists());
    // As the message says: removed by hand, it is made anew on its layer.
    scene.agent.ctr(["tasks", "delete", "--force", &id(&mended)]);
    scene.agent.ctr(["containers", "delete", "--keep-snapshot", &id(&mended)]);
    scene.touch("mended").await;
    scene.again("mended", &mended, 2).await;
    scene.ns.delete("web", SOON).await;
    scene.end().await;
}

/// Writes over the agent's note on a container, as a program does that knows containerd's API and not us.
async fn garble(scene: &Scene, id: &str) {
    use containerd_client::services::v1::{Container, UpdateContainerRequest};
    let address = std::path::Path::new(scene.agent.env("BERTH_CONTAINERD_ADDRESS"));
    let containerd = Containerd::new(address, scene.agent.env("BERTH_CONTAINERD_NAMESPACE")).unwrap();
    let note = prost_types::Any { type_url: "somebody/else".to_owned(), value: b"{\"uid\": ".to_vec() };
    let container = Container {
        id: id.to_owned(),
        extensions: [("berth.dev/record".to_owned(), note)].into(),
        ..Container::default()
    };
    let mask = prost_types::FieldMask { paths: vec!["extensions.berth.dev/record".to_owned()] };
    let request = UpdateContainerRequest { container: Some(container), update_mask: Some(mask) };
    containerd.containers().update(containerd.request(request)).await.unwrap();
}

/// The layer holds its parents and its image's content, whatever becomes of the image's name, and of leases.
#[tokio::test]
async fn images_and_leases_removed_by_hand_cost_no_bot_its_restart() {
    let scene = Scene::new("imagerm").await;
    let bot = scene.running("web").await;
    let stopped = scene.running("stopped").await;
    scene.apply(counting("stopped").stopped()).await;
    scene.phase("stopped", Phase::Stopped).await;
    for lease in scene.agent.ctr(["leases", "list", "-q"]).lines() {
        scene.agent.ctr(["leases", "delete", "--sync", lease]);
    }
    for image in scene.agent.ctr(["images", "list", "-q"]).lines() {
        scene.agent.ctr(["images", "remove", "--sync", image]);
    }
    collect(&scene);
    scene.agent.ctr(["tasks", "kill", "--signal", "SIGKILL", &id(&bot)]);
    scene.again("web", &bot, 2).await;
    scene.apply(counting("stopped")).await;
    scene.again("stopped", &stopped, 2).await;
    let new = scene.apply(counting("new")).await;
    scene.phase("new", Phase::Running).await;
    scene.started(&new, 1).await;
    scene.end().await;
}
