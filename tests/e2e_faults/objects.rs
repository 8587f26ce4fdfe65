//! People who edit, delete and create in a hurry: what was asked last is what is there, and others do not notice.

use std::time::Duration;

use berth::api::bot_container::Phase;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;

use crate::common::{SOON, wait_for};
use crate::scene::{Scene, counting, diarist};

/// More than a thousand a minute, of every kind of cost.
#[tokio::test]
async fn a_hundred_edits_in_a_row_end_where_the_last_one_says() {
    let scene = Scene::new("edits").await;
    let calm = scene.apply(counting("calm")).await;
    let web = scene.apply(counting("web")).await;
    scene.phase("calm", Phase::Running).await;
    scene.phase("web", Phase::Running).await;
    let pid = scene.pid("calm").await;
    let began = std::time::Instant::now();
    for edit in 0..120 {
        let spec = match edit % 6 {
            0 => json!({"env": [{"name": "EDIT", "value": edit.to_string()}]}),
            1 => json!({"terminationGracePeriodSeconds": 5 + edit % 5}),
            2 => json!({"operatingMode": "Paused"}),
            3 => json!({"operatingMode": "Running"}),
            4 => json!({"resources": {"limits": {"pids": (100 + edit).to_string()}}}),
            _ => json!({"operatingMode": if edit % 4 == 1 { "Stopped" } else { "Running" }}),
        };
        let patch = Patch::Merge(json!({"spec": spec}));
        scene.ns.bots().patch("web", &PatchParams::default(), &patch).await.unwrap();
    }
    println!("120 edits in {:?}", began.elapsed());
    let last = json!({"operatingMode": "Running", "env": [{"name": "EDIT", "value": "last"}]});
    scene.ns.bots().patch("web", &PatchParams::default(), &Patch::Merge(json!({"spec": last}))).await.unwrap();
    let seen = scene.phase("web", Phase::Running).await;
    let pid_of_web = seen.status.unwrap().task.unwrap().pid;
    wait_for("its environment", SOON, || async {
        let environ = std::fs::read(format!("/proc/{pid_of_web}/environ")).map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&environ).into_owned();
        if text.contains("EDIT=last") { Ok(()) } else { Err(text) }
    })
    .await;
    scene.diary(&web).assert_whole("web");
    assert_eq!(scene.pid("calm").await, pid);
    scene.diary(&calm).assert_starts(1, "calm");
    scene.end().await;
}

#[tokio::test]
async fn two_hundred_bots_of_one_name_one_after_another_leave_the_last() {
    let scene = Scene::new("again").await;
    let calm = scene.apply(counting("calm")).await;
    scene.phase("calm", Phase::Running).await;
    for n in 0..200u64 {
        let bot = if n % 3 == 0 { counting("web").stopped() } else { counting("web") };
        scene.apply(bot).await;
        // Some come to run, some to be placed, some to nothing.
        tokio::time::sleep(Duration::from_millis(match n % 10 {
            0 => 400,
            1..=4 => n % 7 * 10,
            _ => 0,
        }))
        .await;
        scene.ns.delete("web", SOON).await;
    }
    let last = scene.apply(counting("web")).await;
    scene.phase("web", Phase::Running).await;
    scene.started(&last, 1).await;
    scene.diary(&last).assert_starts(1, "the last");
    scene.diary(&calm).assert_starts(1, "calm");
    scene.end().await;
}

/// Nothing can be created in a namespace that is being deleted, Events included; and its end waits for every bot.
#[tokio::test]
async fn a_namespace_deleted_with_bots_in_it_ends_and_leaves_nothing() {
    let scene = Scene::new("doomed").await;
    let inner = crate::common::Namespace::create(scene.cluster, "doomed-inner").await;
    let bots = inner.bots();
    for bot in [
        counting("runs"),
        counting("frozen"),
        counting("parked").stopped(),
        diarist("crashes", "exit 1"),
        diarist("deaf", "trap '' TERM; while :; do sleep 1000; done").grace(2),
        counting("starts"),
    ] {
        let bot = bot.on(scene.agent.node()).build(scene.cluster);
        bots.create(&PostParams::default(), &bot).await.unwrap();
    }
    let says = |name: &'static str, phase: Phase| {
        let bots = bots.clone();
        wait_for(format!("{name} {phase:?}"), SOON, move || {
            let bots = bots.clone();
            async move {
                let bot = bots.get(name).await.map_err(|e| e.to_string())?;
                let said = bot.status.as_ref().and_then(|status| status.phase);
                if said == Some(phase) { Ok(()) } else { Err(crate::common::summary(&bot)) }
            }
        })
    };
    says("frozen", Phase::Running).await;
    let pause = json!({"spec": {"operatingMode": "Paused"}});
    bots.patch("frozen", &PatchParams::default(), &Patch::Merge(&pause)).await.unwrap();
    says("frozen", Phase::Paused).await;
    says("runs", Phase::Running).await;
    says("crashes", Phase::BackOff).await;
    says("deaf", Phase::Running).await;
    let late = counting("late").on(scene.agent.node()).build(scene.cluster);
    bots.create(&PostParams::default(), &late).await.unwrap();
    inner.end().await;
    scene.end().await;
}
