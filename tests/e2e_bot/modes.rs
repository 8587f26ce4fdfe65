//! Running, Paused, Stopped, and every change between them.

use std::time::Duration;

use berth::api::bot_container::{Kept, OperatingMode, Phase};
use berth::api::condition::ConditionType;
use serde_json::json;

use crate::common::{SOON, bot, summary, wait_for};
use crate::stage::{
    DEAF, Stage, alive, cgroup_file, environment, ip, life, message, page, path_in, pid, read_in, says, status,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_change_between_the_modes_is_made() {
    let stage = Stage::set("modes").await;
    let running = stage.runs(bot("web")).await;
    let (process, address) = (life(pid(&running)), ip(&running));
    page(&running).await;

    // Running -> Paused: frozen, memory kept.
    let paused = stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    assert_eq!(says(&paused, ConditionType::Ready), Some(("True", "Paused")));
    assert_eq!(says(&paused, ConditionType::Running), Some(("False", "Paused")));
    assert_eq!(status(&paused).kept, Some(Kept::MemoryAndFiles));
    assert_eq!(life(pid(&paused)), process);
    assert_eq!(cgroup_file(&paused, "freezer", "freezer.state"), "FROZEN");
    assert_eq!(ip(&paused), address);

    // Paused -> Running: the same process goes on.
    let resumed = stage.edited("web", json!({"operatingMode": "Running"}), Phase::Running).await;
    assert_eq!(life(pid(&resumed)), process);
    assert_eq!(cgroup_file(&resumed, "freezer", "freezer.state"), "THAWED");
    assert!(page(&resumed).await.contains("started 1 time"));
    assert_eq!((status(&resumed).kept, status(&resumed).restart_count), (None, Some(0)));

    // Running -> Stopped: no process, no address, files kept.
    let stopped = stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    assert_eq!(says(&stopped, ConditionType::Ready), Some(("True", "Stopped")));
    assert_eq!((&status(&stopped).task, status(&stopped).kept), (&None, Some(Kept::Files)));
    assert!(!alive(process.0));
    assert_eq!(status(&stopped).network, None);
    let left = stage.agent.leaks();
    assert_eq!((left.count("tasks"), left.count("netns"), left.count("addresses")), (0, 0, 0), "{left:?}");
    let last = status(&stopped).last_termination.as_ref().unwrap();
    assert_eq!((last.exit_code, last.signal), (0, None), "the demo's bot ends on TERM by itself: {last:?}");

    // Stopped -> Running: on the same files.
    let again = stage.edited("web", json!({"operatingMode": "Running"}), Phase::Running).await;
    assert!(page(&again).await.contains("started 2 time"), "{}", page(&again).await);
    assert_eq!(status(&again).restart_count, Some(0), "a start that was asked for is no restart");

    // Running -> Paused -> Stopped: a frozen process is thawed to hear TERM.
    let paused = stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    let frozen = pid(&paused);
    let stopped = stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    assert!(!alive(frozen));
    let last = status(&stopped).last_termination.as_ref().unwrap();
    assert_eq!(last.exit_code, 0, "it had its grace period: {last:?}");

    // Stopped -> Paused: nothing is started only to be frozen.
    let paused = stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    assert_eq!(says(&paused, ConditionType::Ready).unwrap().0, "True", "{}", summary(&paused));
    assert_eq!((&status(&paused).task, status(&paused).kept), (&None, Some(Kept::Files)));

    // Paused without a process -> Stopped -> Paused -> Running.
    stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    let again = stage.edited("web", json!({"operatingMode": "Running"}), Phase::Running).await;
    assert!(page(&again).await.contains("started 3 time"), "{}", page(&again).await);
    assert_eq!(status(&again).restart_count, Some(0));
    let happened: Vec<&str> = status(&again).transitions.iter().map(|t| t.type_.as_str()).collect();
    assert_eq!(happened[2..6], ["created", "started", "paused", "resumed"], "{happened:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_that_ignores_term_is_stopping_until_its_grace_is_over() {
    let stage = Stage::set("stopping").await;
    let deaf = stage.runs(bot("deaf").sh(DEAF).grace(8)).await;
    read_in(&deaf, "/data/begun").await;
    let stopping = stage.edited("deaf", json!({"operatingMode": "Stopped"}), Phase::Stopping).await;
    assert_eq!(says(&stopping, ConditionType::Ready), Some(("False", "Stopping")));
    assert_eq!(says(&stopping, ConditionType::Reconciling), Some(("True", "Stopping")));
    assert_eq!(
        says(&stopping, ConditionType::Running),
        Some(("True", "Running")),
        "it does run: {}",
        summary(&stopping)
    );
    assert_eq!(life(pid(&stopping)), life(pid(&deaf)));
    assert_eq!(read_in(&deaf, "/data/heard").await.trim(), "TERM");
    // What is asked meanwhile changes nothing about this end: the process was told to go, and another comes after it.
    let again = stage.edited("deaf", json!({"operatingMode": "Running"}), Phase::Running).await;
    assert_ne!(status(&again).task, status(&deaf).task);
    assert!(!alive(pid(&deaf)));
    assert_eq!(status(&again).restart_count, Some(0), "an end that was asked for: {}", summary(&again));
    let last = status(&again).last_termination.as_ref().unwrap();
    assert_eq!((last.exit_code, last.signal), (137, Some(9)), "TERM, and KILL after the grace: {last:?}");
    let lasted = last.finished_at.as_ref().unwrap().0.duration_since(last.started_at.as_ref().unwrap().0);
    assert!(lasted.as_secs() >= 7, "API times have whole seconds: {lasted}");
    // A frozen one has its grace as well.
    read_in(&again, "/data/begun").await;
    stage.edited("deaf", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    stage.edited("deaf", json!({"operatingMode": "Stopped"}), Phase::Stopping).await;
    let stopped = stage.ns.phase("deaf", Phase::Stopped, SOON).await;
    assert_eq!(says(&stopped, ConditionType::Ready), Some(("True", "Stopped")));
    assert_eq!(status(&stopped).last_termination.as_ref().unwrap().signal, Some(9));
}

#[tokio::test(flavor = "multi_thread")]
async fn created_paused_is_made_and_not_started() {
    let stage = Stage::set("cpaused").await;
    let paused = stage.ready(bot("web").paused()).await;
    assert_eq!(status(&paused).phase, Some(Phase::Paused));
    assert_eq!((&status(&paused).task, status(&paused).kept), (&None, Some(Kept::Files)));
    assert_eq!(says(&paused, ConditionType::ImageReady), Some(("True", "ImageReady")), "{}", summary(&paused));
    let left = stage.agent.leaks();
    assert_eq!((left.count("containers"), left.count("tasks")), (1, 0), "{left:?}");
    // A change of what it would run is no restart: there is nothing to restart.
    let paused = stage.edited("web", json!({"env": [{"name": "BOT_NAME", "value": "ada"}]}), Phase::Paused).await;
    assert_eq!(says(&paused, ConditionType::Ready).unwrap().0, "True", "{}", summary(&paused));
    let running = stage.edited("web", json!({"operatingMode": "Running"}), Phase::Running).await;
    assert!(page(&running).await.starts_with("I am ada, started 1 time"), "{}", page(&running).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn created_stopped_is_ready_with_nothing_made() {
    let stage = Stage::set("cstopped").await;
    let stopped = stage.ready(bot("web").stopped()).await;
    assert_eq!(status(&stopped).phase, Some(Phase::Stopped));
    assert_eq!((&status(&stopped).task, status(&stopped).kept), (&None, Some(Kept::Files)));
    let left = stage.agent.leaks();
    assert_eq!((left.count("tasks"), left.count("netns")), (0, 0), "{left:?}");
    let running = stage.edited("web", json!({"operatingMode": "Running"}), Phase::Running).await;
    assert!(page(&running).await.starts_with("I am web, started 1 time"));
    // One that never ran can be deleted as well.
    stage.ready(bot("never").stopped()).await;
    stage.ns.delete("never", SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_needs_a_restart_waits_while_paused() {
    let stage = Stage::set("pending").await;
    let running = stage.runs(bot("web")).await;
    page(&running).await;
    let process = life(pid(&running));
    stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;

    stage.apply(bot("web").paused().env("MODE", "new")).await;
    let waits = stage.says("web", Phase::Paused, "RestartPending").await;
    assert_eq!(says(&waits, ConditionType::Ready).unwrap().0, "False");
    assert_eq!(says(&waits, ConditionType::Reconciling).unwrap().0, "True");
    assert!(message(&waits, ConditionType::Ready).contains("operatingMode"), "says what to do");
    assert_eq!(life(pid(&waits)), process);
    assert_eq!(status(&waits).kept, Some(Kept::MemoryAndFiles));

    // Taken back: nothing waits any more.
    stage.apply(bot("web").paused()).await;
    let paused = stage.ns.ready("web", SOON).await;
    assert_eq!(life(pid(&paused)), process);

    // Asked again, and then let run: with the new environment, on the same files.
    stage.apply(bot("web").paused().env("MODE", "new")).await;
    stage.says("web", Phase::Paused, "RestartPending").await;
    stage.apply(bot("web").env("MODE", "new")).await;
    let running = stage.ns.ready("web", SOON).await;
    assert_ne!(life(pid(&running)), process);
    let environ = environment(&running).await;
    assert!(environ.contains("MODE=new"), "{environ:?}");
    assert!(page(&running).await.contains("started 2 time"));
}

#[tokio::test(flavor = "multi_thread")]
async fn modes_changed_in_a_hurry_end_where_the_last_one_says() {
    let stage = Stage::set("hurry").await;
    stage.runs(bot("web")).await;
    let modes = [OperatingMode::Paused, OperatingMode::Stopped, OperatingMode::Running];
    for i in 0..24 {
        stage.apply(bot("web").mode(modes[i % 3])).await;
        crate::stage::moment(Duration::from_millis(u64::try_from(i * 7 % 5).unwrap() * 40)).await;
    }
    let running = stage.ns.phase("web", Phase::Running, SOON).await;
    page(&running).await;
    assert_eq!(status(&running).restart_count, Some(0), "{}", summary(&running));
    for (mode, phase) in [(OperatingMode::Paused, Phase::Paused), (OperatingMode::Stopped, Phase::Stopped)] {
        for _ in 0..3 {
            stage.apply(bot("web")).await;
            stage.apply(bot("web").mode(mode)).await;
        }
        let bot = stage.ns.phase("web", phase, SOON).await;
        assert_eq!(says(&bot, ConditionType::Ready).unwrap().0, "True", "{}", summary(&bot));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_bot_does_nothing_and_keeps_its_memory() {
    let stage = Stage::set("frozen").await;
    // Counts in memory, and writes the count down: a process that was started anew would begin at 1.
    let count = "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i >/data/n.new; mv /data/n.new /data/n; usleep 20000; done";
    let running = stage.runs(bot("counter").sh(count)).await;
    let file = path_in(&running, "/data/n");
    let read = || std::fs::read_to_string(&file).ok().and_then(|n| n.trim().parse::<u64>().ok());
    wait_for("a count", SOON, || async { read().filter(|n| *n > 10).ok_or_else(|| format!("{:?}", read())) }).await;
    let paused = stage.edited("counter", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    let before = read();
    crate::stage::moment(Duration::from_millis(500)).await;
    assert_eq!(read(), before, "it went on while paused: {}", summary(&paused));
    stage.edited("counter", json!({"operatingMode": "Running"}), Phase::Running).await;
    let more = before.unwrap() + 10;
    wait_for("more", SOON, || async { read().filter(|n| *n > more).ok_or_else(|| format!("{:?}", read())) }).await;
}
