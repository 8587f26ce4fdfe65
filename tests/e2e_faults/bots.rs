//! Bots that behave badly: their trouble stays their own.

use std::time::Duration;

use berth::api::bot_container::{Phase, RestartPolicy};

use crate::common::{SOON, wait_for};
use crate::scene::{Scene, counting, diarist};

/// Harm done: the logs of a bot that was stopped before it was deleted stayed until the sweeper took them for an orphan's.
#[tokio::test]
async fn the_logs_of_a_bot_deleted_while_stopped_go_with_it() {
    let scene = Scene::new("logs").await;
    let talks = || diarist("talks", "echo hello; trap 'exit 0' TERM; sleep 100000 & wait");
    scene.apply(talks()).await;
    scene.phase("talks", Phase::Running).await;
    assert!(!scene.files().is_empty(), "there is something to remove");
    scene.apply(talks().stopped()).await;
    scene.phase("talks", Phase::Stopped).await;
    scene.ns.delete("talks", Duration::from_secs(10)).await;
    wait_for("no file left", Duration::from_secs(5), || async {
        let left = scene.files();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    scene.end().await;
}

/// Bots that do their worst at once; a calm one beside them does not notice, and a new one starts as ever.
#[tokio::test]
async fn bots_that_behave_badly_are_their_own_trouble() {
    let scene = Scene::new("bad").await;
    let calm = scene.apply(counting("calm")).await;
    scene.phase("calm", Phase::Running).await;
    let pid = scene.pid("calm").await;

    let ends = scene.apply(diarist("ends-at-once", "exit 1")).await;
    scene.apply(diarist("ends-soon", "usleep 10000; exit 7").restart(RestartPolicy::OnFailure)).await;
    scene.apply(diarist("ends-well", "exit 0").restart(RestartPolicy::Never)).await;
    scene.apply(diarist("forks", "while :; do sleep 1000 & done").limit("pids", "40")).await;
    scene.apply(diarist("deaf", "trap '' TERM; while :; do sleep 1000; done").grace(2)).await;
    scene.apply(diarist("floods", "yes a line of output that nobody will ever want to read")).await;
    scene.apply(diarist("eats", "tail /dev/zero").limit("memory", "32Mi").restart(RestartPolicy::Never)).await;

    scene.phase("ends-well", Phase::Succeeded).await;
    // The first restart comes at once, the second after ten seconds.
    for name in ["ends-at-once", "ends-soon"] {
        let seen = scene.phase(name, Phase::BackOff).await;
        let last = seen.status.unwrap().last_termination.unwrap();
        assert_eq!(last.exit_code, if name == "ends-soon" { 7 } else { 1 }, "{last:?}");
    }
    let starts = scene.diary(&ends).starts;
    assert!((2..=4).contains(&starts), "a crash loop is slowed down: {starts} starts");
    let seen = scene.phase("eats", Phase::Failed).await;
    assert_eq!(seen.status.unwrap().last_termination.unwrap().reason, "OOMKilled");
    for name in ["forks", "deaf", "floods"] {
        scene
            .ns
            .until(name, "started", SOON, |bot| bot.status.as_ref().is_some_and(|s| s.container_id.is_some()))
            .await;
    }

    scene.apply(counting("late")).await;
    scene.phase("late", Phase::Running).await;
    assert_eq!(scene.pid("calm").await, pid);
    scene.diary(&calm).assert_starts(1, "calm");

    let floods = scene.ns.bots().get("floods").await.unwrap();
    let uid = floods.metadata.uid.unwrap();
    let logs = scene.files().into_iter().find(|path| path.to_string_lossy().ends_with(&format!("floods_{uid}")));
    let bytes: u64 =
        std::fs::read_dir(logs.unwrap()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!((1..=5 * (10 << 20) + (1 << 20)).contains(&bytes), "its log is bounded: {bytes} bytes");

    // All of them go: in their grace period and little more.
    for name in ["forks", "deaf", "floods"] {
        scene.ns.delete(name, Duration::from_secs(30)).await;
    }
    scene.end().await;
}

/// Harm done: sixteen bots with an image that hung had all the turns of the node, and nobody else was started, stopped or
/// deleted for a minute at a time.
#[tokio::test]
async fn bots_that_wait_for_a_registry_that_hangs_hold_up_no_others() {
    let scene = Scene::new("turns").await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let leaves = scene.apply(counting("leaves")).await;
    scene.phase("leaves", Phase::Running).await;
    for n in 0..40 {
        // Each another image, so that no two share a pull.
        let image = format!("{}/berth/bot-{n}:1", silent.local_addr().unwrap());
        scene.apply(counting(&format!("waits-{n}")).image(&image)).await;
    }
    for n in 0..40 {
        scene.phase(&format!("waits-{n}"), Phase::Starting).await;
    }
    let good = scene.apply(counting("good")).await;
    scene.ns.phase("good", Phase::Running, Duration::from_secs(30)).await;
    scene.started(&good, 1).await;
    scene.apply(counting("leaves").stopped()).await;
    scene.ns.phase("leaves", Phase::Stopped, Duration::from_secs(30)).await;
    scene.diary(&leaves).assert_starts(1, "leaves");
    scene.end().await;
}

/// A million names cost an inode each, and the collector removes them after the bot is gone.
#[tokio::test]
async fn a_bot_with_very_many_files_is_stopped_started_and_deleted_as_any() {
    let scene = Scene::new("files").await;
    let script = "mkdir -p /data/many; cd /data/many; for d in $(seq 200); do mkdir $d; (cd $d; touch $(seq 500)); done; \
                  echo done >/data/done; trap 'exit 0' TERM; sleep 100000 & wait";
    let hoard = scene.apply(diarist("hoard", script).with(|spec| spec.termination_grace_period_seconds = 60)).await;
    let calm = scene.apply(counting("calm")).await;
    scene.phase("hoard", Phase::Running).await;
    let done = scene.layer(&hoard).join("data/done");
    wait_for("a hundred thousand files", SOON * 2, || async {
        if done.exists() { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    scene.apply(diarist("hoard", script).stopped()).await;
    scene.phase("hoard", Phase::Stopped).await;
    scene.ns.delete("hoard", SOON).await;
    scene.phase("calm", Phase::Running).await;
    scene.diary(&calm).assert_starts(1, "calm");
    scene.end().await;
}
