//! Agent and containerd go and come back: a running bot does not notice.

use std::process::Command;
use std::time::Duration;

use berth::api::bot_container::{Phase, RestartPolicy};
use berth::api::condition::ConditionType;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::common::{Controller, SOON, bot, run, summary, wait_for};
use crate::stage::{Stage, WAIT, alive, ip, life, moment, page, pid, says, status, well_said};
use crate::start::Alone;

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_goes_and_comes_and_bots_run_on() {
    let mut stage = Stage::set("agent").await;
    let web = stage.runs(bot("web")).await;
    let paused = stage.ready(bot("paused")).await;
    let paused = {
        drop(paused);
        stage.edited("paused", json!({"operatingMode": "Paused"}), Phase::Paused).await
    };
    let lives = || (life(pid(&web)), life(pid(&paused)));
    let (before, version) = (lives(), web.metadata.resource_version.clone());

    stage.agent.restart().await;
    moment(Duration::from_secs(2)).await;
    assert_eq!(lives(), before, "TERM and start");
    stage.agent.kill_9();
    assert_eq!(lives(), before, "KILL");
    page(&web).await;
    stage.agent.start_again(&[]).await;
    moment(Duration::from_secs(2)).await;
    assert_eq!(lives(), before, "KILL and start");
    let after = stage.ns.ready("web", SOON).await;
    assert_eq!(
        after.metadata.resource_version, version,
        "a restart of the agent writes nothing about what is as it was"
    );
    assert_eq!(status(&after), status(&web));

    // What happened meanwhile is found: an end, an edit, a deletion.
    stage.runs(bot("dies").sh(WAIT).restart(RestartPolicy::Never)).await;
    let dies = stage.ns.ready("dies", SOON).await;
    stage.runs(bot("leaves")).await;
    stage.agent.kill_9();
    kill_process(Pid::from_raw(i32::try_from(pid(&dies)).unwrap()).unwrap(), Signal::KILL).unwrap();
    stage.edit("web", json!({"env": [{"name": "BOT_NAME", "value": "edited"}]})).await;
    stage.ns.bots().delete("leaves", &kube::api::DeleteParams::default()).await.unwrap();
    stage.agent.start_again(&[]).await;
    let failed = stage.ns.phase("dies", Phase::Failed, SOON).await;
    let last = status(&failed).last_termination.as_ref().unwrap();
    assert_eq!((last.exit_code, last.signal), (137, Some(9)), "{last:?}");
    let edited = stage.ns.phase("web", Phase::Running, SOON).await;
    assert!(page(&edited).await.starts_with("I am edited, started 2 time"), "{}", summary(&edited));
    wait_for("the deleted bot gone", SOON, || async {
        match stage.ns.bots().get_opt("leaves").await {
            Ok(None) => Ok(()),
            other => Err(format!("{:?}", other.map(|bot| bot.map(|b| summary(&b))))),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_not_heard_of_is_unknown_and_its_bots_run_on() {
    let mut stage = Stage::set("silent").await;
    let web = stage.runs(bot("web")).await;
    stage.edited("web", json!({"terminationGracePeriodSeconds": 3}), Phase::Running).await;
    let process = life(pid(&web));
    stage.agent.kill_9();
    let unknown = stage
        .ns
        .until("web", "Unknown", Duration::from_secs(120), |bot| {
            bot.status.as_ref().is_some_and(|s| s.phase == Some(Phase::Unknown))
        })
        .await;
    for type_ in [ConditionType::Ready, ConditionType::Running] {
        assert_eq!(says(&unknown, type_), Some(("Unknown", "NodeUnreachable")), "{}", summary(&unknown));
    }
    assert_eq!(life(pid(&web)), process);
    assert_eq!(status(&unknown).node_name.as_deref(), Some(stage.agent.node()), "not started elsewhere");
    stage.agent.start_again(&[]).await;
    let back = stage.ns.ready("web", SOON).await;
    assert_eq!(status(&back).phase, Some(Phase::Running), "{}", summary(&back));
    assert_eq!(life(pid(&back)), process);
    well_said(&back);
    // And the two go on together.
    stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_is_killed_counts_as_an_end_and_never_runs_a_job_twice() {
    let stage = Stage::set("shim").await;
    let once = stage.runs(bot("once").sh(WAIT).restart(RestartPolicy::Never)).await;
    let web = stage.runs(bot("web")).await;
    page(&web).await;
    for bot in [&once, &web] {
        // The shim is the parent of process 1.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid(bot))).unwrap();
        let shim: i32 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(std::fs::read_link(format!("/proc/{shim}/exe")).unwrap().to_string_lossy().contains("shim"));
        kill_process(Pid::from_raw(shim).unwrap(), Signal::KILL).unwrap();
    }
    let failed = stage.ns.phase("once", Phase::Failed, SOON).await;
    assert_eq!(status(&failed).restart_count, Some(0));
    let again = stage
        .ns
        .until("web", "restarted", SOON, |bot| {
            bot.status.as_ref().is_some_and(|s| s.phase == Some(Phase::Running) && s.restart_count == Some(1))
        })
        .await;
    assert!(page(&again).await.contains("started 2 time"), "{}", page(&again).await);
    for bot in [&once, &web] {
        wait_for("the old process gone", SOON, || async {
            if alive(pid(bot)) { Err(format!("{} lives: two tasks of one bot", pid(bot))) } else { Ok(()) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_is_killed_and_comes_back_and_bots_run_on() {
    let alone = Alone::start();
    Controller::shared(alone.cluster);
    let stage = Stage::on(alone.cluster, "alone", &[]).await;
    let web = stage.runs(bot("web")).await;
    stage.runs(bot("frozen")).await;
    let frozen = stage.edited("frozen", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    let lives = || (life(pid(&web)), life(pid(&frozen)));
    let before = lives();

    for signal in ["-KILL", "-TERM"] {
        run(Command::new("kill").args([signal, &stage.cluster.pid("containerd").to_string()]));
        // Asked for while containerd is away: done when it is back.
        let name = format!("late{}", signal.to_lowercase());
        stage.apply(bot(&name)).await;
        moment(Duration::from_secs(2)).await;
        page(&web).await;
        assert_eq!(lives(), before, "{signal}");
        stage.cluster.up_again();
        let late = stage.ns.ready(&name, SOON).await;
        page(&late).await;
        assert_eq!(lives(), before, "{signal} and start");
        let after = stage.ns.ready("web", SOON).await;
        assert_eq!((pid(&after), ip(&after), status(&after).restart_count), (pid(&web), ip(&web), Some(0)));
    }
    // And what they were asked is still done.
    let resumed = stage.edited("frozen", json!({"operatingMode": "Running"}), Phase::Running).await;
    assert_eq!(life(pid(&resumed)), before.1);
    stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
}

/// A watch goes on from a version that is not yet again, and tells nothing; an answer to an own write looks newer than what is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_restored_from_yesterdays_backup_counts() {
    let alone = Alone::start();
    Controller::shared(alone.cluster);
    let stage = Stage::on(alone.cluster, "restored", &[]).await;
    stage.runs(bot("stops")).await;
    stage.ready(bot("starts").stopped()).await;
    alone.cluster.back_up().await;
    stage.runs(bot("stops")).await;
    stage.edited("stops", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    stage.edited("starts", json!({"operatingMode": "Running"}), Phase::Running).await;
    stage.runs(bot("never-was")).await;
    // Far enough for no version to be given again soon.
    for i in 0..30 {
        stage.ns.apply(bot("stops").on(stage.agent.node()).stopped().env("N", &i.to_string())).await;
    }
    alone.cluster.restore().await;
    // As it was yesterday.
    wait_for("yesterday's states", SOON, || async {
        let of = async |name: &str| {
            let bot = stage.ns.bots().get(name).await.map_err(|error| error.to_string())?;
            let status = bot.status.clone().unwrap_or_default();
            let task = status.task.as_ref().and_then(|task| u32::try_from(task.pid).ok());
            Ok::<_, String>((status.phase, task.is_some_and(alive), summary(&bot)))
        };
        let (stops, starts) = (of("stops").await?, of("starts").await?);
        let right = stops.0 == Some(Phase::Running) && stops.1 && starts.0 == Some(Phase::Stopped) && !starts.1;
        if right { Ok(()) } else { Err(format!("{} / {}", stops.2, starts.2)) }
    })
    .await;
    page(&stage.ns.ready("stops", SOON).await).await;
    // What was made since has no object any more: it is an orphan, and goes as one.
    wait_for("the bot that never was gone", SOON * 3, || async {
        let left = stage.agent.ctr(["tasks", "list", "-q"]);
        if left.lines().count() == 1 { Ok(()) } else { Err(left) }
    })
    .await;
}
