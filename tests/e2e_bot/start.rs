//! apply -> Running.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::{Duration, Instant};

use berth::api::bot_container::Phase;
use berth::api::condition::ConditionType;
use berth::api::{BotRecord, BotSnapshot, BotSnapshotSpec, FINALIZER, SNAPSHOT_FINALIZER};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, PostParams};

use crate::common::{Cluster, Controller, Namespace, SOON, bot, run, summary, wait_for};
use crate::stage::{Stage, environment, ip, life, moment, page, pid, says, status, uid};

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_runs_answers_on_its_ip_and_says_so() {
    let stage = Stage::set("runs").await;
    let web = stage.runs(bot("web").limit("memory", "64Mi")).await;
    assert!(page(&web).await.starts_with("I am web, started 1 time"), "{}", page(&web).await);

    let said = status(&web);
    assert_eq!(said.node_name.as_deref(), Some(stage.agent.node()));
    assert_eq!(said.bot_id.as_deref(), Some(&*uid(&web)));
    assert_eq!(said.container_id.as_deref(), Some(&*format!("berth-{}", uid(&web))));
    assert_eq!(said.restart_count, Some(0));
    assert_eq!((said.kept, said.last_termination.as_ref()), (None, None));
    let image = said.image.as_ref().unwrap();
    assert_eq!(image.reference, stage.cluster.image());
    assert!(image.digest.as_ref().unwrap().starts_with("sha256:"));
    assert_eq!(said.network.as_ref().unwrap().ips, [ip(&web)]);
    assert_eq!(said.resources.as_ref().unwrap().limits["memory"].0, "64Mi");
    life(pid(&web));
    for (type_, reason) in [
        (ConditionType::Ready, "AsAsked"),
        (ConditionType::Running, "Running"),
        (ConditionType::Scheduled, "Scheduled"),
        (ConditionType::ImageReady, "ImageReady"),
        (ConditionType::NetworkReady, "NetworkReady"),
    ] {
        assert_eq!(says(&web, type_), Some(("True", reason)), "{type_:?}: {}", summary(&web));
    }
    assert_eq!(said.conditions.len(), 5, "{}", summary(&web));
    // The binding speaks of no generation: it is made once.
    let mut spoken = said.conditions.iter().filter(|c| c.type_ != "Scheduled");
    assert!(spoken.all(|c| c.observed_generation == Some(1)), "{:?}", said.conditions);
    let happened: Vec<&str> = said.transitions.iter().map(|t| t.type_.as_str()).collect();
    assert_eq!(happened, ["scheduled", "pulled", "created", "started"]);
    assert_eq!(web.finalizers(), [FINALIZER]);

    // As people and tools ask.
    let namespace = stage.ns.name();
    stage.cluster.kubectl(["wait", "-n", namespace, "bot/web", "--for=condition=Ready", "--timeout=5s"]);
    let table = stage.cluster.kubectl(["get", "bots", "-n", namespace]);
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["NAME", "PHASE", "READY", "NODE", "IP", "IMAGE", "VERSION", "RESTARTS", "AGE"]);
    let image = stage.cluster.image();
    assert_eq!(words[1][..6], ["web", "Running", "True", stage.agent.node(), &ip(&web), &image]);
    // What containerd's own tool sees, by the name that status gives.
    assert!(stage.agent.ctr(["tasks", "list"]).contains(&format!("berth-{}", uid(&web))));
}
/// What charts/berth/templates/finalizers.yaml adds, beside what is there, once.
#[tokio::test(flavor = "multi_thread")]
async fn bots_and_snapshots_have_their_finalizers_from_birth() {
    let cluster = Cluster::shared();
    let ns = Namespace::create(cluster, "birth").await;
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let snapshots = Api::<BotSnapshot>::namespaced(ns.client(), ns.name());
    for (given, others) in [(None, vec![]), (Some(vec![]), vec![]), (Some(vec!["a.b/c"]), vec!["a.b/c"])] {
        let given: Option<Vec<String>> = given.map(|all| all.into_iter().map(str::to_owned).collect());
        let mut web = bot("web").build(cluster);
        web.metadata.finalizers = given.clone();
        let made = ns.bots().create(&dry, &web).await.unwrap();
        assert_eq!(made.finalizers(), [&others[..], &[FINALIZER]].concat());
        // As a backup has it that is restored.
        web.metadata.finalizers = made.metadata.finalizers.clone();
        assert_eq!(ns.bots().create(&dry, &web).await.unwrap().finalizers(), made.finalizers());

        let mut kept = BotSnapshot::new("kept", BotSnapshotSpec::of("web"));
        kept.metadata.finalizers = given;
        let made = snapshots.create(&dry, &kept).await.unwrap();
        assert_eq!(made.finalizers(), [&others[..], &[SNAPSHOT_FINALIZER]].concat());
    }
}

/// Successful writes that the API server counted, but for Leases: (those of Berth's objects, Events, all others).
async fn writes(client: &kube::Client) -> (u64, u64, Vec<(String, u64)>) {
    let request = axum::http::Request::get("/metrics").body(Vec::new()).unwrap();
    let text = client.request_text(request).await.unwrap();
    let (mut berth, mut events, mut others) = (0, 0, Vec::new());
    for line in text.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
        let of = |key: &str| {
            let value = line.split_once(&format!(",{key}=\"")).or_else(|| line.split_once(&format!("{{{key}=\"")));
            value.and_then(|(_, rest)| rest.split_once('"')).map_or("", |(value, _)| value)
        };
        let write = matches!(of("verb"), "POST" | "PUT" | "PATCH" | "APPLY" | "DELETE" | "DELETECOLLECTION");
        // Reviews and tokens are asked for by POST and stored nowhere.
        let asked = matches!(of("resource"), "tokenreviews" | "subjectaccessreviews") || of("subresource") == "token";
        if !write || asked || !of("code").starts_with('2') || of("resource") == "leases" {
            continue;
        }
        let count = line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64;
        match (of("group"), of("resource")) {
            ("berth.dev", _) => berth += count,
            (_, "events") => events += count,
            _ => others.push((line.rsplit_once(' ').unwrap().0.to_owned(), count)),
        }
    }
    assert!(berth > 0, "the API server counts nothing of ours");
    (berth, events, others)
}

/// One cluster that nothing else writes to, so that the API server's own counters are about these bots.
#[tokio::test(flavor = "multi_thread")]
async fn starts_write_little_two_hundred_at_once_run_and_at_rest_nothing_is_written() {
    let alone = Alone::start();
    Controller::shared(alone.cluster);
    let stage = Stage::on(alone.cluster, "alone", &[]).await;
    let before = stage.warmed().await;
    let client = stage.cluster.client().await;

    // One start: create, BotRecord, binding, status. The write that was just done is counted at once, but
    // Events come a moment later.
    let counted = writes(&client).await;
    stage.runs(bot("one")).await;
    moment(Duration::from_secs(2)).await;
    let after = writes(&client).await;
    println!("one start: {} writes, {} Events", after.0 - counted.0, after.1 - counted.1);
    assert!(after.0 - counted.0 <= 4, "{} writes of objects for one start", after.0 - counted.0);
    assert!(after.1 - counted.1 <= 3, "{} Events for one start", after.1 - counted.1);

    // As many in one file as a node takes by default.
    stage.ns.delete("one", SOON).await;
    let after = writes(&client).await;
    const MANY: usize = 200;
    let mut list = Vec::new();
    for i in 0..MANY {
        let mut bot = bot(&format!("many-{i}")).on(stage.agent.node()).build(stage.cluster);
        bot.metadata.namespace = Some(stage.ns.name().to_owned());
        list.push(serde_json::to_value(bot).unwrap());
    }
    let file = stage.cluster.dir().join("many.json");
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": list});
    std::fs::write(&file, serde_json::to_vec(&list).unwrap()).unwrap();
    let start = Instant::now();
    stage.cluster.kubectl(["apply", "-f", file.to_str().unwrap()]);
    let mut addresses = BTreeSet::new();
    for i in 0..MANY {
        let bot = stage.ns.ready(&format!("many-{i}"), Duration::from_secs(180)).await;
        assert!(page(&bot).await.starts_with(&format!("I am many-{i}, started 1 time")));
        assert!(addresses.insert(ip(&bot)), "{} is given twice", ip(&bot));
        assert_eq!(status(&bot).restart_count, Some(0), "{}", summary(&bot));
    }
    println!("{MANY} bots in {:?}", start.elapsed());
    let burst = writes(&client).await;
    println!(
        "each: {} writes, {} Events",
        (burst.0 - after.0) as f64 / MANY as f64,
        (burst.1 - after.1) as f64 / MANY as f64
    );
    assert!(burst.1 - after.1 <= 3 * MANY as u64, "{} Events for {MANY} starts", burst.1 - after.1);
    assert_eq!(stage.agent.leaks().count("tasks"), MANY as u64, "one task a bot");

    // At rest: what was just told has had its time.
    moment(Duration::from_secs(3)).await;
    let still = writes(&client).await;
    let mut events = stage.cluster.command("ctr").arg("events").stdout(Stdio::piped()).spawn().unwrap();
    moment(Duration::from_secs(20)).await;
    let later = writes(&client).await;
    assert_eq!(later, still, "a settled cluster is written to");
    events.kill().unwrap();
    let heard = events.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&heard.stdout), "", "containerd is written to at rest");

    stage.ns.bots().delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
    wait_for("all bots gone", Duration::from_secs(120), || async {
        let left = stage.ns.bots().list(&ListParams::default()).await.map_err(|e| e.to_string())?.items;
        if left.is_empty() { Ok(()) } else { Err(left.iter().map(summary).collect::<Vec<_>>().join("\n")) }
    })
    .await;
    stage.agent.nothing_left_since(&before, SOON).await;
    wait_for("all BotRecords gone", SOON, || async {
        match stage.ns.api::<BotRecord>().list(&ListParams::default()).await.unwrap().items.len() {
            0 => Ok(()),
            n => Err(format!("{n} are left")),
        }
    })
    .await;
}

/// A cluster of one test's own, removed at its end.
pub struct Alone {
    pub cluster: &'static Cluster,
}

impl Alone {
    pub fn start() -> Self {
        // Agents and namespaces want one that lives as long as they may; this one is taken down by our own drop.
        let cluster: &'static Cluster = Box::leak(Box::new(Cluster::own()));
        run(std::process::Command::new("images/demo-bot/push").arg(cluster.image()));
        Self { cluster }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if std::env::var_os("BERTH_KEEP").is_none_or(|keep| keep.is_empty()) {
            self.cluster.down();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spec_changed_in_the_middle_of_a_start_wins() {
    let stage = Stage::set("midway").await;
    for i in 0..5 {
        let name = format!("web-{i}");
        stage.apply(bot(&name).env("GREETING", "first")).await;
        // At another point of the start each time.
        moment(Duration::from_millis(60 * i)).await;
        stage.apply(bot(&name).env("GREETING", "second")).await;
    }
    for i in 0..5 {
        let web = stage.ns.phase(&format!("web-{i}"), Phase::Running, SOON).await;
        let environ = environment(&web).await;
        assert!(environ.contains("GREETING=second"), "{i}: {environ:?}");
        assert_eq!(status(&web).restart_count, Some(0), "an edit is no restart: {}", summary(&web));
    }
    assert_eq!(stage.agent.leaks().count("tasks"), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_bot_of_a_bot_id_waits_until_the_first_is_gone() {
    let stage = Stage::set("twin").await;
    stage.runs(bot("first").id("ada")).await;
    stage.apply(bot("second").id("ada")).await;
    let second = stage.ns.until("second", "BotIdInUse", SOON, |bot| says_ready(bot) == Some("BotIdInUse")).await;
    assert_eq!(status(&second).phase, Some(Phase::Pending), "{}", summary(&second));
    assert_eq!(status(&second).node_name, None);
    let said = crate::stage::message(&second, ConditionType::Ready);
    assert!(said.contains("first"), "the holder is named: {said}");
    stage.ns.delete("first", SOON).await;
    let second = stage.ns.ready("second", SOON).await;
    assert!(page(&second).await.starts_with("I am second, started 1 time"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_that_fits_nowhere_is_pending_and_says_why() {
    let stage = Stage::set("nowhere").await;
    stage.ns.apply(bot("web").on("no-such-node")).await;
    let waits = stage.ns.until("web", "Pending", SOON, |bot| says_ready(bot) == Some("Unschedulable")).await;
    assert_eq!(status(&waits).phase, Some(Phase::Pending), "{}", summary(&waits));
    assert_eq!(says(&waits, ConditionType::Scheduled), Some(("False", "Unschedulable")));
    assert_eq!(says(&waits, ConditionType::Reconciling).map(|r| r.0), Some("True"), "{}", summary(&waits));
    let said = crate::stage::message(&waits, ConditionType::Ready);
    assert_eq!(said, "there is no BotNode no-such-node, the only node that may take it");
    // One that any node might take hears of each why it does not.
    let selector = [("zone".to_owned(), "mars".to_owned())];
    stage.ns.apply(bot("picky").with(|spec| spec.node_selector = selector.into_iter().collect())).await;
    let picky = stage.ns.until("picky", "Pending", SOON, |bot| says_ready(bot) == Some("Unschedulable")).await;
    let said = crate::stage::message(&picky, ConditionType::Ready);
    assert!(said.contains(&format!("{}: no label zone (asks mars)", stage.agent.node())), "each node's reason: {said}");
    stage.ns.delete("picky", SOON).await;
    assert_eq!(stage.agent.leaks().count("containers"), 0);
    // It is not placed yet, so it may be sent elsewhere; and one that never was placed goes at once.
    stage.ns.apply(bot("other").on("no-such-node")).await;
    stage.ns.delete("other", SOON).await;
    let web = stage.runs(bot("web")).await;
    page(&web).await;
}

fn says_ready(bot: &berth::api::BotContainer) -> Option<&str> {
    bot.status.as_ref()?;
    says(bot, ConditionType::Ready).map(|(_, reason)| reason)
}
