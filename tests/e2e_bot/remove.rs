//! Deletion, orphans, strangers.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use berth::api::BotSnapshot;
use berth::api::bot_container::{DeletionPolicy, Phase};
use berth::api::bot_snapshot::SnapshotPhase;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::common::{BotBuilder, SOON, bot, summary, wait_for};
use crate::stage::{DEAF, Stage, alive, life, message, moment, page, pid, read_in, uid};

#[tokio::test(flavor = "multi_thread")]
async fn deletion_gives_the_grace_period_then_kills_and_leaves_nothing() {
    let stage = Stage::set("delete").await;
    let before = stage.warmed().await;

    // One that ends on TERM is gone long before its grace period is over.
    let polite = stage.runs(bot("polite").grace(60)).await;
    page(&polite).await;
    let start = Instant::now();
    stage.ns.delete("polite", SOON).await;
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert!(!alive(pid(&polite)));

    // One that does not is killed after it, and not before.
    let deaf = stage.runs(bot("deaf").sh(DEAF).grace(8)).await;
    read_in(&deaf, "/data/begun").await;
    let start = Instant::now();
    stage.ns.bots().delete("deaf", &DeleteParams::default()).await.unwrap();
    assert_eq!(read_in(&deaf, "/data/heard").await.trim(), "TERM", "told once");
    let going = stage.ns.until("deaf", "Terminating", SOON, |bot| said_phase(bot) == Some(Phase::Terminating)).await;
    assert!(alive(pid(&deaf)), "{}", summary(&going));
    wait_for("deaf gone", SOON, || async {
        match stage.ns.bots().get_opt("deaf").await.unwrap() {
            None => Ok(()),
            Some(bot) => Err(summary(&bot)),
        }
    })
    .await;
    let took = start.elapsed();
    assert!((Duration::from_secs(8)..Duration::from_secs(24)).contains(&took), "{took:?}");
    assert!(!alive(pid(&deaf)));

    // Paused, stopped, waiting for its next try, without grace, and one with children that hold on to its output.
    for bot in [
        bot("paused"),
        bot("stopped").stopped(),
        bot("crashes").sh("exit 1"),
        bot("hasty").sh(DEAF).grace(0),
        bot("family").sh("sleep 1000000 & sleep 1000000 & trap 'exit 0' TERM; wait"),
    ] {
        stage.apply(bot).await;
    }
    stage.ns.ready("paused", SOON).await;
    stage.edited("paused", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    stage.ns.phase("crashes", Phase::BackOff, SOON).await;
    for name in ["stopped", "hasty", "family"] {
        stage.ns.ready(name, SOON).await;
    }
    // One that ran and was stopped: its process and network are gone already, its log is not.
    stage.runs(bot("retired")).await;
    stage.edited("retired", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    let start = Instant::now();
    for name in ["paused", "stopped", "crashes", "hasty", "family", "retired"] {
        stage.ns.delete(name, SOON).await;
    }
    println!("six deletions took {:?}", start.elapsed());
    stage.agent.nothing_left_since(&before, SOON).await;
    assert_eq!(std::fs::read_dir(stage.agent.env("BERTH_LOG_DIR")).unwrap().count(), 0, "logs are left");
}

fn said_phase(bot: &berth::api::BotContainer) -> Option<Phase> {
    bot.status.as_ref().and_then(|status| status.phase)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_in_the_middle_of_a_start_leaves_nothing() {
    let stage = Stage::set("early").await;
    let before = stage.warmed().await;
    for i in 0..8u64 {
        let name = format!("web-{i}");
        stage.apply(bot(&name)).await;
        moment(Duration::from_millis(i * 70)).await;
        stage.ns.delete(&name, SOON).await;
    }
    stage.agent.nothing_left_since(&before, SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_name_at_once_is_another_bot() {
    let stage = Stage::set("same").await;
    let before = stage.warmed().await;
    let mut last = stage.runs(bot("web")).await;
    for _ in 0..5 {
        page(&last).await;
        stage.ns.bots().delete("web", &DeleteParams::default()).await.unwrap();
        // As soon as the name is free, and not a moment later.
        wait_for("the name", SOON, || async {
            match stage
                .ns
                .bots()
                .create(&Default::default(), &bot("web").on(stage.agent.node()).build(stage.cluster))
                .await
            {
                Ok(_) => Ok(()),
                Err(e) => Err(e.to_string()),
            }
        })
        .await;
        let next = stage.ns.ready("web", SOON).await;
        assert_ne!(uid(&next), uid(&last));
        assert!(page(&next).await.starts_with("I am web, started 1 time"), "it has the old one's files");
        assert!(!alive(pid(&last)), "two bots of one name");
        last = next;
    }
    assert_eq!(stage.agent.leaks().count("tasks"), 1);
    stage.ns.delete("web", SOON).await;
    stage.agent.nothing_left_since(&before, SOON).await;
}

/// Takes the finalizer away and deletes, as someone in a hurry does. The controller may put it back in between.
async fn strip(stage: &Stage, name: &str) {
    let none = json!({"metadata": {"finalizers": null}});
    stage.ns.bots().delete(name, &DeleteParams::default()).await.unwrap();
    wait_for("the object gone", SOON, || async {
        let _ = stage.ns.bots().patch(name, &PatchParams::default(), &Patch::Merge(&none)).await;
        match stage.ns.bots().get_opt(name).await.unwrap() {
            None => Ok(()),
            Some(bot) => Err(summary(&bot)),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_object_owns_is_removed_after_the_grace_and_nothing_else() {
    let mut stage = Stage::set_with("orphan", &[("BERTH_ORPHAN_GRACE_SECONDS", "3")]).await;
    let before = stage.warmed().await;
    let owned = stage.runs(bot("owned")).await;
    let owned_life = life(pid(&owned));
    let with_owned = stage.agent.leaks();

    // While the agent is away, so that it can't have seen the deletion: it sees only that nobody owns what is there.
    stage.runs(bot("orphan")).await;
    stage.runs(bot("deaf").sh(DEAF).grace(3)).await;
    stage.ready(bot("parked")).await;
    stage.edited("parked", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    stage.agent.kill_9();
    for name in ["orphan", "deaf", "parked"] {
        strip(&stage, name).await;
    }
    stage.agent.start_again(&[]).await;
    stage.agent.nothing_left_since(&with_owned, Duration::from_secs(90)).await;

    // With the agent there.
    let orphan = stage.runs(bot("orphan")).await;
    strip(&stage, "orphan").await;
    wait_for("the orphan's process gone", SOON, || async {
        if alive(pid(&orphan)) { Err("it lives".to_owned()) } else { Ok(()) }
    })
    .await;
    stage.agent.nothing_left_since(&with_owned, Duration::from_secs(90)).await;
    assert_eq!(life(pid(&owned)), owned_life, "a bot that has an object is not touched");
    stage.ns.delete("owned", SOON).await;
    stage.agent.nothing_left_since(&before, SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_container_is_told_and_never_touched() {
    let stage = Stage::set_with("foreign", &[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    let stopped = stage.ready(bot("web").stopped()).await;
    let id = format!("berth-{}", uid(&stopped));
    // The stranger takes the bot's id, and another one a name that only looks like a bot's.
    let image = stage.cluster.image();
    stage.agent.ctr(["images", "pull", "--plain-http", &image]);
    let other = "berth-00000000-0000-4000-8000-000000000000";
    for id in [&id, other] {
        stage.agent.ctr(["run", "--detach", &image, id, "/bin/sleep", "1000000"]);
    }
    // containerd lists tasks in no order.
    let tasks = || -> BTreeSet<String> { stage.agent.ctr(["tasks", "list"]).lines().map(str::to_owned).collect() };
    let strangers = tasks();
    stage.edit("web", json!({"operatingMode": "Running"})).await;
    let failed = stage.says("web", Phase::Failed, "ForeignContainer").await;
    assert!(message(&failed, berth::api::condition::ConditionType::Ready).contains(&id), "{}", summary(&failed));
    moment(Duration::from_secs(5)).await;
    assert_eq!(tasks(), strangers, "a stranger was touched");

    // The stranger leaves, by hand: the bot goes on, by itself or at the next edit.
    stage.agent.ctr(["tasks", "delete", "--force", &id]);
    stage.agent.ctr(["containers", "delete", &id]);
    stage.edit("web", json!({"restartedAt": "2026-11-24T10:00:00Z"})).await;
    let web = stage.ns.ready("web", SOON).await;
    page(&web).await;
    stage.ns.delete("web", SOON).await;
    let left = stage.agent.ctr(["tasks", "list"]);
    assert!(left.contains(other) && !left.contains(&id), "{left}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_outsider_breaks_is_made_good() {
    let stage = Stage::set("broken").await;
    let web = stage.runs(bot("web")).await;
    page(&web).await;
    let id = format!("berth-{}", uid(&web));
    // The task is killed and deleted behind our back. Where the agent sees the end sooner and deletes it first, `ctr` fails;
    // that the process ended is seen below.
    let outsider = |args: &[&str]| {
        let mut ctr = stage.cluster.command("ctr");
        ctr.args(["--namespace", stage.agent.env("BERTH_CONTAINERD_NAMESPACE")]).args(args).output().unwrap();
    };
    outsider(&["tasks", "delete", "--force", &id]);
    let again = stage
        .ns
        .until("web", "running again", SOON, |bot| {
            said_phase(bot) == Some(Phase::Running) && pid_of(bot) != pid_of(&web)
        })
        .await;
    assert!(page(&again).await.contains("started 2 time"), "{}", summary(&again));
    // Frozen and thawed from outside.
    stage.agent.ctr(["tasks", "pause", &id]);
    wait_for("thawed", SOON, || async {
        let tasks = stage.agent.ctr(["tasks", "list"]);
        if tasks.contains("RUNNING") { Ok(()) } else { Err(tasks) }
    })
    .await;
    let again = stage.ns.ready("web", SOON).await;
    page(&again).await;
    // Task and container gone: made anew, on the same layer.
    outsider(&["tasks", "delete", "--force", &id]);
    stage.agent.ctr(["containers", "delete", "--keep-snapshot", &id]);
    let anew = stage
        .ns
        .until("web", "made anew", SOON, |bot| said_phase(bot) == Some(Phase::Running) && pid_of(bot) != pid_of(&again))
        .await;
    assert!(page(&anew).await.starts_with("I am web, started"), "{}", summary(&anew));
}

fn pid_of(bot: &berth::api::BotContainer) -> Option<i64> {
    bot.status.as_ref()?.task.as_ref().map(|task| task.pid)
}

/// `deletionPolicy: Retain` promises the files, and they were removed like any others.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_retained_becomes_a_version_and_what_never_ran_leaves_nothing() {
    let stage = Stage::set("retain").await;
    let before = stage.warmed().await;
    let keep = |bot: BotBuilder| bot.with(|spec| spec.deletion_policy = DeletionPolicy::Retain);
    let web = stage.runs(keep(bot("web"))).await;
    stage.ready(keep(bot("idle").stopped())).await;
    for name in ["web", "idle"] {
        stage.ns.delete(name, SOON).await;
    }
    assert!(!alive(pid(&web)));
    let snapshots: kube::Api<BotSnapshot> = stage.ns.api();
    let kept = wait_for("one version Ready", SOON, || async {
        let all = snapshots.list(&Default::default()).await.unwrap().items;
        let ready = |s: &BotSnapshot| s.status.as_ref().is_some_and(|s| s.phase == Some(SnapshotPhase::Ready));
        match all.as_slice() {
            [one] if ready(one) => Ok(one.clone()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(kept.spec.bot_container_name, "web");
    let left = stage.agent.leaks();
    let counts = ["tasks", "addresses", "containers", "snapshots"].map(|name| left.count(name) - before.count(name));
    assert_eq!(counts, [0, 0, 0, 1], "{left:?}");
    snapshots.delete(kept.metadata.name.as_ref().unwrap(), &DeleteParams::default()).await.unwrap();
    stage.agent.nothing_left_since(&before, SOON).await;
}
