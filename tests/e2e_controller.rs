//! The controller against a real API server: each row of issue 4's "Controller", with the agent played through the API.

#![allow(missing_docs)]
// Helpers outside of #[test] functions may fail a test as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "e2e_controller/fixture.rs"]
mod fixture;
mod proxy;

use std::time::{Duration, Instant};

use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::{AGENT, BotSnapshot, BotSnapshotSpec, FINALIZER};
use fixture::{Cluster, bot, count_by_node, eventually, show};
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use proxy::Fault;
use serde_json::json;

const OBJECTS: &[&str] = &["botcontainers", "botrecords", "botnodes", "botsnapshots"];

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_is_bound_in_three_writes_at_most_and_one_event_and_then_all_is_quiet() {
    let cluster = Cluster::turn().await;
    let controller = cluster.controller().await;
    let _agent = cluster.agent("node-1", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    let warm = cluster.bot("warm", json!({})).await;
    assert_eq!(cluster.bound(&warm.name_any()).await, "node-1");
    eventually("the CIDR", Duration::from_secs(10), || async {
        let node = cluster.bot_nodes().get("node-1").await.map_err(|e| e.to_string())?;
        node.spec.bot_cidr.ok_or_else(|| "none".to_owned())
    })
    .await;

    let before = cluster.writes("berth.dev", OBJECTS).await;
    let made = cluster.bot("web", json!({"resources": {"limits": {"cpu": "1", "memory": "64Mi"}}})).await;
    cluster.bound("web").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = cluster.writes("berth.dev", OBJECTS).await;
    assert_eq!(after - before, 4, "create, BotRecord, finalizer, bind; the agent has one left");
    let held = cluster.bot_with(true, "held", json!({})).await;
    assert_eq!(cluster.bound("held").await, "node-1");
    cluster.recorded(&held).await;
    assert_eq!(cluster.writes("berth.dev", OBJECTS).await - after, 3, "create, BotRecord, bind");
    assert_eq!(cluster.events(&cluster.namespace, "web", "Scheduled").await, ["bound to node node-1"]);

    let uid = made.uid().unwrap();
    let web = cluster.bots().get("web").await.unwrap();
    assert_eq!(web.finalizers(), [FINALIZER]);
    let status = web.status.as_ref().unwrap();
    assert_eq!((status.phase, status.bot_id.as_deref()), (None, Some(&*uid)), "{}", show(&web));
    assert_eq!(status.conditions.len(), 1, "the agent owns the rest: {}", show(&web));
    let record = cluster.records().get(&uid).await.unwrap();
    assert_eq!(record.spec.node_name.as_deref(), Some("node-1"));
    assert_eq!(record.spec.holder.unwrap().uid, uid);

    cluster.agent_says_running("web").await;
    cluster.agent_says_running("warm").await;
    let settled = cluster.writes("berth.dev", OBJECTS).await;
    let told = cluster.writes("events.k8s.io", &["events"]).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(cluster.writes("berth.dev", OBJECTS).await, settled, "a settled cluster is written to");
    assert_eq!(cluster.writes("events.k8s.io", &["events"]).await, told);

    // Not asserted: a figure for the report.
    let mut took = Vec::new();
    for i in 0..20 {
        let start = Instant::now();
        cluster.bot(&format!("timed-{i}"), json!({})).await;
        let created = start.elapsed();
        cluster.bound(&format!("timed-{i}")).await;
        took.push((start.elapsed(), created));
    }
    took.sort();
    println!("create to bound: p50 {:?} (create alone {:?}), worst {:?}", took[10].0, took[10].1, took[19].0);
    drop(controller);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_that_fits_nowhere_says_why_for_each_node_and_goes_on_when_one_fits() {
    let cluster = Cluster::turn().await;
    let _controller = cluster.controller().await;
    cluster.bot("early", json!({})).await;
    cluster.condition("early", "Ready", "False", "Unschedulable").await;
    let mut first = cluster.agent("node-1", json!({"cpu": "4", "memory": "1Gi", "bots": "100"})).await;
    assert_eq!(cluster.bound("early").await, "node-1", "a node that comes is used");

    let tainted = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-2"},
        "spec": {"taints": [{"key": "only", "value": "gpu", "effect": "NoSchedule"}]}});
    cluster.nodes().patch("node-2", &PatchParams::apply("test"), &Patch::Apply(&tainted)).await.unwrap();
    let _second = cluster.agent("node-2", json!({"cpu": "4", "memory": "8Gi", "bots": "100"})).await;
    let owned = eventually("the owner", Duration::from_secs(10), || async {
        let node = cluster.bot_nodes().get("node-2").await.map_err(|e| e.to_string())?;
        node.owner_references().first().cloned().ok_or_else(|| "none".to_owned())
    })
    .await;
    assert_eq!((owned.kind.as_str(), owned.name.as_str()), ("Node", "node-2"));

    cluster.bot("big", json!({"resources": {"limits": {"memory": "2Gi"}}})).await;
    let said = cluster.condition("big", "Scheduled", "False", "Unschedulable").await;
    let wanted = "0/2 nodes fit: node-1: insufficient memory (asks 2Gi, free 1Gi); node-2: taint only=gpu:NoSchedule";
    assert_eq!(said, wanted);
    cluster.condition("big", "Reconciling", "True", "Unschedulable").await;
    let big = cluster.bots().get("big").await.unwrap();
    assert_eq!(big.status.as_ref().unwrap().observed_generation, Some(1));
    assert!(big.finalizers().is_empty(), "what is nowhere holds nothing");
    assert_eq!(cluster.events(&cluster.namespace, "big", "Unschedulable").await, [wanted]);

    let before = cluster.writes("berth.dev", OBJECTS).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(cluster.writes("berth.dev", OBJECTS).await, before, "a bot that waits is not written to");

    first.report(json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    assert_eq!(cluster.bound("big").await, "node-1");
    let big = cluster.bots().get("big").await.unwrap();
    let types: Vec<_> = big.status.as_ref().unwrap().conditions.iter().map(|c| c.type_.as_str()).collect();
    assert_eq!(types, ["Scheduled"], "what was said while it waited is gone");

    // An untolerated taint that goes, and room that another bot gives back.
    cluster.bot("selects", json!({"nodeName": "node-2"})).await;
    cluster.condition("selects", "Ready", "False", "Unschedulable").await;
    let clean = json!({"spec": {"taints": null}});
    cluster.nodes().patch("node-2", &PatchParams::default(), &Patch::Merge(&clean)).await.unwrap();
    assert_eq!(cluster.bound("selects").await, "node-2");
    cluster.bot("second", json!({"nodeName": "node-1", "resources": {"limits": {"memory": "3Gi"}}})).await;
    cluster.condition("second", "Ready", "False", "Unschedulable").await;
    cluster.bots().delete("big", &DeleteParams::default()).await.unwrap();
    cluster.agent_says_removed("big").await;
    assert_eq!(cluster.bound("second").await, "node-1");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_holds_a_bot_id_and_the_other_goes_on_after_it() {
    let cluster = Cluster::turn().await;
    let _controller = cluster.controller().await;
    let _agent = cluster.agent("node-1", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    cluster.bot("one", json!({"botId": "the-bot"})).await;
    cluster.bound("one").await;
    cluster.bot("two", json!({"botId": "the-bot", "rollback": {"id": "there", "toVersion": 1}})).await;
    let said = cluster.condition("two", "Ready", "False", "BotIdInUse").await;
    assert!(said.contains("BotContainer one"), "{said}");

    cluster.bots().delete("one", &DeleteParams::default()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let two = cluster.bots().get("two").await.unwrap();
    assert!(two.status.unwrap().node_name.is_none(), "the holder is not gone before its node says so");
    cluster.agent_says_removed("one").await;
    cluster.gone("one").await;
    cluster.bound("two").await;
    let record = cluster.records().get("the-bot").await.unwrap();
    assert_eq!(record.spec.holder.unwrap().name, "two");
    // Its rollback was there at creation, and would have been done later as a new one.
    assert_eq!(record.spec.last_rollback_id.as_deref(), Some("there"));

    // Both at once: exactly one is placed.
    let (a, b) = (bot("a", json!({"botId": "both"})), bot("b", json!({"botId": "both"})));
    let (bots, params) = (cluster.bots(), PostParams::default());
    let (a, b) = tokio::join!(bots.create(&params, &a), bots.create(&params, &b));
    a.unwrap();
    b.unwrap();
    eventually("one bound, one waiting", Duration::from_secs(10), || async {
        let mut nodes = Vec::new();
        for name in ["a", "b"] {
            nodes.push(cluster.bots().get(name).await.map_err(|e| e.to_string())?.status.and_then(|s| s.node_name));
        }
        let phase = |s: &Option<String>| s.is_some();
        (nodes.iter().filter(|n| phase(n)).count() == 1).then_some(()).ok_or(format!("{nodes:?}"))
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let all = cluster.bots().list(&ListParams::default()).await.unwrap();
    let placed = all
        .iter()
        .filter(|b| ["a", "b"].contains(&&*b.name_any()))
        .filter(|b| b.status.as_ref().is_some_and(|s| s.node_name.is_some()));
    assert_eq!(placed.count(), 1);

    // The last one gone, the record is too.
    cluster.bots().delete("two", &DeleteParams::default()).await.unwrap();
    cluster.agent_says_removed("two").await;
    cluster.gone("two").await;
    eventually("the record gone", Duration::from_secs(10), || async {
        let left = cluster.records().get_opt("the-bot").await.map_err(|e| e.to_string())?;
        left.map_or(Ok(()), |r| Err(format!("{:?}", r.spec)))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_controllers_leads_and_the_other_takes_over() {
    let cluster = Cluster::turn().await;
    let first = cluster.controller().await;
    let _agent = cluster.agent("node-1", json!({"cpu": "40", "memory": "4Gi", "bots": "1000"})).await;
    let (leases, name) = cluster.leader_lease();
    let holder = || async { leases.get(name).await.unwrap().spec.unwrap().holder_identity.unwrap() };
    cluster.bot("before", json!({})).await;
    cluster.bound("before").await;
    let before = holder().await;
    let mut second = cluster.controller().await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(holder().await, before, "a leader that lives is left alone");
    assert!(!second.led());

    first.signal("STOP");
    cluster.bot("stopped", json!({})).await;
    cluster.bound("stopped").await;
    let next = holder().await;
    assert_ne!(next, before);
    first.signal("CONT");
    for i in 0..20 {
        cluster.bot(&format!("after-{i}"), json!({})).await;
    }
    for i in 0..20 {
        cluster.bound(&format!("after-{i}")).await;
    }
    assert_eq!(holder().await, next, "the old leader takes nothing back");
    let records = cluster.records().list(&ListParams::default()).await.unwrap();
    assert_eq!(records.items.len(), 22);

    // An orderly end gives the Lease back; the other need not wait for it to run out.
    second.signal("TERM");
    assert!(second.ended().await, "SIGTERM is no failure");
    let start = Instant::now();
    cluster.bot("last", json!({})).await;
    cluster.bound("last").await;
    assert!(start.elapsed() < Duration::from_millis(2500), "{:?}", start.elapsed());

    let third = cluster.controller().await;
    drop(first); // kill -9
    cluster.bot("killed", json!({})).await;
    cluster.bound("killed").await;
    assert!(third.led());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_at_once_overcommit_nothing() {
    let cluster = Cluster::turn().await;
    let _controller = cluster.controller().await;
    let mut agents = Vec::new();
    for i in 1..=3 {
        agents.push(cluster.agent(&format!("node-{i}"), json!({"cpu": "6", "memory": "8Gi", "bots": "500"})).await);
    }
    let start = Instant::now();
    let bots = cluster.bots();
    let all = (0..200).map(|i| {
        let bots = bots.clone();
        async move {
            let bot = bot(&format!("b{i:03}"), json!({"resources": {"requests": {"cpu": "100m"}}}));
            bots.create(&PostParams::default(), &bot).await.unwrap();
        }
    });
    futures::future::join_all(all).await;
    let counts = eventually("180 bound, 20 waiting", Duration::from_secs(30), || async {
        let all = cluster.bots().list(&ListParams::default()).await.map_err(|e| e.to_string())?.items;
        let counts = count_by_node(&all);
        let told = all.iter().filter(|b| b.status.is_some()).count();
        (counts.values().sum::<usize>() == 180 && told == 200).then_some(counts.clone()).ok_or(format!("{counts:?}"))
    })
    .await;
    println!("200 bots decided in {:?}: {counts:?}", start.elapsed());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let all = cluster.bots().list(&ListParams::default()).await.unwrap().items;
    assert_eq!(count_by_node(&all).into_values().collect::<Vec<_>>(), [60, 60, 60]);

    // Room for one: the one that waited longest gets it.
    let mut waiting: Vec<_> = all.iter().filter(|b| b.status.as_ref().is_some_and(|s| s.node_name.is_none())).collect();
    waiting.sort_by_key(|b| (b.creation_timestamp(), b.name_any()));
    let placed = all.iter().find(|b| b.status.as_ref().is_some_and(|s| s.node_name.is_some())).unwrap();
    cluster.bots().delete(&placed.name_any(), &DeleteParams::default()).await.unwrap();
    cluster.agent_says_removed(&placed.name_any()).await;
    cluster.bound(&waiting[0].name_any()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bots_of_a_lost_node_are_unknown_until_its_agent_is_back() {
    let cluster = Cluster::turn().await;
    let _controller = cluster.controller().await;
    let mut lost = cluster.agent("node-1", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    cluster.bot("web", json!({})).await;
    cluster.bound("web").await;
    cluster.agent_says_running("web").await;
    let _other = cluster.agent("node-2", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    lost.die();
    let said = cluster.condition("web", "Ready", "Unknown", "NodeUnreachable").await;
    assert!(said.contains("node-1") && said.contains("last renewed at"), "{said}");
    cluster.condition("web", "Running", "Unknown", "NodeUnreachable").await;
    let web = cluster.bots().get("web").await.unwrap();
    let status = web.status.as_ref().unwrap();
    assert_eq!(serde_json::to_value(status.phase).unwrap(), "Unknown");
    assert_eq!(status.node_name.as_deref(), Some("node-1"), "never started elsewhere");
    let before = cluster.writes("berth.dev", OBJECTS).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(cluster.writes("berth.dev", OBJECTS).await, before, "said once");
    cluster.bot("elsewhere", json!({})).await;
    assert_eq!(cluster.bound("elsewhere").await, "node-2", "a lost node takes no bots");

    let back = lost.alive().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.condition("web", "Ready", "Unknown", "NodeUnreachable").await;
    let before = cluster.writes("berth.dev", OBJECTS).await;
    cluster.agent_says_running("web").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let web = cluster.bots().get("web").await.unwrap();
    assert_eq!(serde_json::to_value(web.status.as_ref().unwrap().phase).unwrap(), "Running", "{}", show(&web));
    assert_eq!(cluster.writes("berth.dev", OBJECTS).await - before, 1, "only the agent wrote");
    // And the agent goes on to change what the controller had taken.
    cluster.agent_says_removed("web").await;
    cluster.agent_says_running("web").await;

    // Lost again, and with the Lease object itself gone.
    drop(back);
    cluster.leases().delete("node-1", &DeleteParams::default()).await.unwrap();
    cluster.condition("web", "Ready", "Unknown", "NodeUnreachable").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_waits_for_the_agent_and_never_for_a_dead_node() {
    let cluster = Cluster::turn().await;
    let _controller = cluster.controller().await;
    cluster.bot("unbound", json!({})).await;
    cluster.condition("unbound", "Ready", "False", "Unschedulable").await;
    cluster.bots().delete("unbound", &DeleteParams::default()).await.unwrap();
    cluster.gone("unbound").await;

    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}});
    cluster.nodes().patch("node-1", &PatchParams::apply("test"), &Patch::Apply(&node)).await.unwrap();
    let mut agent = cluster.agent("node-1", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    for name in ["removed", "dead", "alive"] {
        cluster.bot(name, json!({"botId": name})).await;
        cluster.bound(name).await;
        cluster.agent_says_running(name).await;
    }
    cluster.bots().delete("removed", &DeleteParams::default()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(cluster.bots().get_opt("removed").await.unwrap().is_some(), "its node has something of it");
    cluster.agent_says_removed("removed").await;
    cluster.gone("removed").await;
    assert!(cluster.records().get_opt("removed").await.unwrap().is_none());

    agent.die();
    cluster.bots().delete("dead", &DeleteParams::default()).await.unwrap();
    cluster.condition("dead", "Ready", "Unknown", "NodeUnreachable").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(cluster.bots().get_opt("dead").await.unwrap().is_some(), "lost is not gone");
    let taint = json!({"spec": {"taints": [{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}]}});
    cluster.nodes().patch("node-1", &PatchParams::default(), &Patch::Merge(&taint)).await.unwrap();
    cluster.gone("dead").await;
    let told = eventually("the Event", Duration::from_secs(5), || async {
        let told = cluster.events(&cluster.namespace, "dead", "FinalizerReleased").await;
        told.first().cloned().ok_or_else(|| "none".to_owned())
    })
    .await;
    assert!(told.contains("node-1") && told.contains("lost"), "{told}");
    let clean = json!({"spec": {"taints": null}});
    cluster.nodes().patch("node-1", &PatchParams::default(), &Patch::Merge(&clean)).await.unwrap();

    let alive = cluster.bots().get("alive").await.unwrap();
    assert!(alive.metadata.deletion_timestamp.is_none() && alive.finalizers() == [FINALIZER], "{}", show(&alive));
    cluster.bots().delete("alive", &DeleteParams::default()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(cluster.bots().get_opt("alive").await.unwrap().is_some());
    cluster.nodes().delete("node-1", &DeleteParams::default()).await.unwrap();
    cluster.gone("alive").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_whose_status_was_lost_is_bound_to_the_node_that_has_its_layer() {
    let cluster = Cluster::turn().await;
    let controller = cluster.controller().await;
    let agent = cluster.agent("node-1", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    cluster.bot("web", json!({"botId": "web-id"})).await;
    cluster.bound("web").await;
    cluster.agent_says_running("web").await;
    let _emptier = cluster.agent("node-2", json!({"cpu": "400", "memory": "400Gi", "bots": "1000"})).await;

    // The status alone, with the controller away and here.
    drop(controller);
    let none = json!({"status": null});
    cluster.bots().patch_status("web", &PatchParams::default(), &Patch::Merge(&none)).await.unwrap();
    let _controller = cluster.controller().await;
    assert_eq!(cluster.bound("web").await, "node-1");
    cluster.agent_says_running("web").await;
    let none = json!({"status": {"nodeName": null}});
    cluster.bots().patch_status("web", &PatchParams::default(), &Patch::Merge(&none)).await.unwrap();
    assert_eq!(cluster.bound("web").await, "node-1");

    // The object itself, restored under another uid; its finalizer was stripped, so nobody cleaned up.
    let strip = json!({"metadata": {"finalizers": null}});
    cluster.bots().delete("web", &DeleteParams::default()).await.unwrap();
    cluster.bots().patch("web", &PatchParams::default(), &Patch::Merge(&strip)).await.unwrap();
    cluster.gone("web").await;
    cluster.bot("web", json!({"botId": "web-id"})).await;
    assert_eq!(cluster.bound("web").await, "node-1");
    let web = cluster.bots().get("web").await.unwrap();
    let record = cluster.records().get("web-id").await.unwrap();
    assert_eq!(record.spec.holder.map(|h| h.uid), web.uid());

    // What was taken away by hand comes back.
    cluster.bots().patch("web", &PatchParams::default(), &Patch::Merge(&strip)).await.unwrap();
    cluster.records().delete("web-id", &DeleteParams::default()).await.unwrap();
    eventually("finalizer and record", Duration::from_secs(10), || async {
        let web = cluster.bots().get("web").await.map_err(|e| e.to_string())?;
        let record = cluster.records().get_opt("web-id").await.map_err(|e| e.to_string())?;
        let back =
            web.finalizers() == [FINALIZER] && record.is_some_and(|r| r.spec.node_name.as_deref() == Some("node-1"));
        back.then_some(()).ok_or_else(|| show(&web))
    })
    .await;
    drop(agent);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_node_gets_a_cidr_of_its_own_until_none_is_left() {
    let cluster = Cluster::turn().await;
    let _controllers = (cluster.controller().await, cluster.controller().await);
    let api = cluster.bot_nodes();
    // /20 holds 16 blocks of /24.
    for i in 0..17 {
        let body = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotNode",
            "metadata": {"name": format!("n{i:02}")}, "spec": {}});
        api.patch(&format!("n{i:02}"), &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await.unwrap();
    }
    let given = || async {
        let all = api.list(&ListParams::default()).await.unwrap().items;
        all.into_iter().filter_map(|n| n.spec.bot_cidr.clone().map(|cidr| (cidr, n.name_any()))).collect::<Vec<_>>()
    };
    eventually("16 CIDRs", Duration::from_secs(20), || async {
        let given = given().await;
        (given.len() == 16).then_some(()).ok_or(format!("{given:?}"))
    })
    .await;
    let mut all = given().await;
    all.sort();
    all.dedup_by(|a, b| a.0 == b.0);
    assert_eq!(all.len(), 16, "two nodes have one CIDR: {all:?}");
    let names: Vec<_> = all.iter().map(|(_, name)| name.clone()).collect();
    let without = (0..17).map(|i| format!("n{i:02}")).find(|n| !names.contains(n)).unwrap();
    eventually("the Event", Duration::from_secs(5), || async {
        let told = cluster.events("default", &without, "CIDRExhausted").await;
        told.first().cloned().ok_or_else(|| "none".to_owned())
    })
    .await;
    api.delete(&names[0], &DeleteParams::default()).await.unwrap();
    eventually("the freed CIDR", Duration::from_secs(20), || async {
        let cidr = api.get(&without).await.map_err(|e| e.to_string())?.spec.bot_cidr;
        cidr.ok_or_else(|| "none".to_owned())
    })
    .await;
}

/// Every write of the controller refused, lost, in conflict or cut off: it is made in the end, once.
#[tokio::test(flavor = "multi_thread")]
async fn writes_that_are_refused_lost_or_cut_off_are_made_in_the_end_and_once() {
    let cluster = Cluster::turn().await;
    let proxy = cluster.proxy().await;
    let controller = cluster.controller_through(&proxy).await;
    use Fault::{Answer, Broken, Lost};
    let all = || [Answer(403), Lost, Answer(409), Broken, Answer(500), Answer(503)];
    // The one that is done all the same comes last: after it there may be nothing left to do.
    proxy.spoil_next("patch", "botnodes", [Answer(409), Answer(500), Lost]);
    let _agent = cluster.agent("node-1", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    eventually("the CIDR", Duration::from_secs(30), || async {
        let node = cluster.bot_nodes().get("node-1").await.map_err(|e| e.to_string())?;
        node.spec.bot_cidr.ok_or_else(|| "none".to_owned())
    })
    .await;
    let one_by_one =
        [("create", "botrecords"), ("patch", "botcontainers"), ("patch", "botcontainers/status"), ("create", "events")];
    // With the finalizer from birth record and bind go side by side.
    let beside = [("create", "botrecords"), ("patch", "botcontainers/status")];
    let all_writes = one_by_one.map(|write| (write, false)).into_iter().chain(beside.map(|write| (write, true)));
    for (i, ((verb, resource), held)) in all_writes.enumerate() {
        for (j, fault) in all().into_iter().enumerate() {
            let name = format!("bot-{i}-{j}");
            proxy.spoil_next(verb, resource, [fault]);
            let made = cluster.bot_with(held, &name, json!({})).await;
            // A refusal that only an edit can mend is asked again seldom: up to ten seconds later.
            let bound = eventually(&format!("{name} bound"), Duration::from_secs(40), || async {
                let bot = cluster.bots().get(&name).await.map_err(|e| e.to_string())?;
                bot.status.as_ref().and_then(|s| s.node_name.clone()).ok_or_else(|| show(&bot))
            })
            .await;
            assert_eq!(bound, "node-1");
            let bot = cluster.bots().get(&name).await.unwrap();
            assert_eq!(bot.finalizers(), [FINALIZER]);
            // It may come after the bind also where a first pass got no further than the finalizer.
            let record = cluster.recorded(&made).await;
            assert_eq!(record.spec.holder.map(|h| h.uid), made.uid());
            assert_eq!(record.spec.node_name.as_deref(), Some("node-1"));
        }
    }
    eventually("every fault come", Duration::from_secs(10), || async { proxy.spent() }).await;
    // And down again.
    for (j, fault) in all().into_iter().enumerate() {
        let name = format!("bot-0-{j}");
        proxy.spoil_next("delete", "botrecords", [fault.clone()]);
        proxy.spoil_next("patch", "botcontainers", [fault]);
        cluster.bots().delete(&name, &DeleteParams::default()).await.unwrap();
        cluster.agent_says_removed(&name).await;
        eventually(&format!("{name} gone"), Duration::from_secs(60), || async {
            match cluster.bots().get_opt(&name).await.map_err(|e| e.to_string())? {
                None => Ok(()),
                Some(bot) => Err(show(&bot)),
            }
        })
        .await;
    }
    let records = cluster.records().list(&ListParams::default()).await.unwrap();
    assert_eq!(records.items.len(), 5 * all().len(), "a record each, and none of those that are gone");
    drop(controller);
}

/// Rights taken away one by one and given back: the controller lives on, removes nothing, says so, and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_away_is_told_and_used_again_when_it_is_back() {
    let cluster = Cluster::turn().await;
    let proxy = cluster.proxy().await;
    let mut controller = cluster.controller_through(&proxy).await;
    let _agent = cluster.agent("node-1", json!({"cpu": "40", "memory": "4Gi", "bots": "100"})).await;
    cluster.bot("steady", json!({"botId": "steady"})).await;
    cluster.bound("steady").await;
    cluster.agent_says_running("steady").await;
    for kind in ["botcontainers", "botrecords", "botnodes", "nodes", "leases", "runtimeclasses", "botsnapshots"] {
        let told = controller.metric("berth_controller_watch_errors_total").await;
        for verb in ["list", "watch"] {
            proxy.spoil(verb, kind, Fault::Answer(403));
        }
        proxy.cut_watches();
        eventually(&format!("the loss of {kind} told"), Duration::from_secs(20), || async {
            let refused = proxy.calls("*", kind).iter().filter(|call| call.status == 403).count();
            let now = controller.metric("berth_controller_watch_errors_total").await;
            (refused >= 2 && now > told).then_some(()).ok_or_else(|| format!("{refused} refused, {told} -> {now}"))
        })
        .await;
        assert!(controller.lives(), "it ended without the right to {kind}");
        proxy.heal();
        let name = format!("after-{kind}");
        cluster.bot(&name, json!({})).await;
        eventually(&format!("{name} bound"), Duration::from_secs(60), || async {
            let bot = cluster.bots().get(&name).await.map_err(|e| e.to_string())?;
            bot.status.as_ref().and_then(|s| s.node_name.clone()).ok_or_else(|| show(&bot))
        })
        .await;
        let steady = cluster.bots().get("steady").await.unwrap();
        assert_eq!(steady.finalizers(), [FINALIZER]);
        assert!(cluster.records().get_opt("steady").await.unwrap().is_some(), "{kind}");
    }
    // Its own Lease: it leads no more, and leads again.
    proxy.spoil("update", "leases", Fault::Answer(403));
    eventually("the lead lost", Duration::from_secs(20), || async {
        controller.log().contains("leads no more").then_some(()).ok_or_else(|| "it leads".to_owned())
    })
    .await;
    proxy.heal();
    cluster.bot("last", json!({})).await;
    cluster.bound("last").await;
    assert!(controller.lives());
}

/// A leader that is stopped in the middle of a write, past its Lease: what it has sent arrives when another leads, and is
/// refused.
#[tokio::test(flavor = "multi_thread")]
async fn the_late_write_of_a_leader_that_was_is_refused() {
    let cluster = Cluster::turn().await;
    let proxy = cluster.proxy().await;
    let first = cluster.controller_through(&proxy).await;
    let _agent = cluster.agent("node-1", json!({"cpu": "40", "memory": "4Gi", "bots": "100"})).await;
    cluster.bot("before", json!({})).await;
    cluster.bound("before").await;
    let second = cluster.controller().await;
    for (verb, resource, from_birth) in [
        ("patch", "botcontainers/status", false),
        ("patch", "botcontainers", false),
        ("create", "botrecords", false),
        ("patch", "botcontainers/status", true),
        ("create", "botrecords", true),
    ] {
        let (go, held) = tokio::sync::watch::channel(false);
        proxy.spoil_next(verb, resource, [Fault::Held(held)]);
        let name = format!("{verb}-{}-{from_birth}", resource.replace('/', "-"));
        let bot = cluster.bot_with(from_birth, &name, json!({})).await;
        let sent = eventually("the write on its way", Duration::from_secs(15), || async {
            let calls = proxy.calls(verb, resource);
            let found = calls.iter().rposition(|call| call.status == 0);
            found.ok_or_else(|| format!("{calls:?}"))
        })
        .await;
        first.signal("STOP");
        // The other takes over when the Lease has run out, and does what the first had begun.
        assert_eq!(cluster.bound(&name).await, "node-1");
        let bound = cluster.bots().get(&name).await.unwrap();
        // Its finalizer may have been the first's, so that the other bound it beside: until the record is there the late one is the first.
        cluster.recorded(&bot).await;
        go.send(true).unwrap();
        let answer = eventually("its answer", Duration::from_secs(10), || async {
            let status = proxy.calls(verb, resource)[sent].status;
            (status != 0).then_some(status).ok_or_else(|| "none".to_owned())
        })
        .await;
        assert_eq!(answer, 409, "a late {verb} of {resource} was taken");
        first.signal("CONT");
        let now = cluster.bots().get(&name).await.unwrap();
        assert_eq!(now.metadata.resource_version, bound.metadata.resource_version, "{}", show(&now));
        assert_eq!(cluster.records().get(&bot.uid().unwrap()).await.unwrap().spec.holder.map(|h| h.uid), bot.uid());
        // The first leads again, for the next round.
        second.signal("STOP");
        let (leases, lease) = cluster.leader_lease();
        let other = leases.get(lease).await.unwrap().spec.unwrap().holder_identity;
        eventually("the first leading", Duration::from_secs(20), || async {
            let now = leases.get(lease).await.unwrap().spec.unwrap().holder_identity;
            (now != other).then_some(()).ok_or_else(|| format!("{now:?}"))
        })
        .await;
        second.signal("CONT");
    }
}

/// Numbers of versions that have been told, sorted.
async fn numbers(cluster: &Cluster) -> Vec<i64> {
    let snapshots: kube::Api<BotSnapshot> = kube::Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let all = snapshots.list(&ListParams::default()).await.unwrap().items;
    let mut told: Vec<i64> = all.iter().filter_map(|s| s.status.as_ref()?.version).collect();
    told.sort_unstable();
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_have_no_gap_and_no_twin_though_controllers_die_and_answers_are_lost() {
    use Fault::{Answer, Broken, Lost};
    let cluster = Cluster::turn().await;
    let proxy = cluster.proxy().await;
    let mut controller = cluster.controller_through(&proxy).await;
    let _agent = cluster.agent("node-1", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    cluster.bot("web", json!({})).await;
    cluster.bound("web").await;
    let snapshots: kube::Api<BotSnapshot> = kube::Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let ask = async |n: i64| {
        let snapshot = BotSnapshot::new(&format!("s{n}"), BotSnapshotSpec::of("web"));
        snapshots.create(&PostParams::default(), &snapshot).await.unwrap();
    };
    // The write that counts a number, the one that tells it, and the finalizer: each refused, done and unanswered, broken.
    for (n, (resource, fault)) in [
        ("botrecords", Lost),
        ("botrecords", Answer(500)),
        ("botrecords", Broken),
        ("botsnapshots/status", Lost),
        ("botsnapshots/status", Answer(409)),
        ("botsnapshots/status", Broken),
        ("botsnapshots", Lost),
    ]
    .into_iter()
    .enumerate()
    {
        let n = i64::try_from(n).unwrap() + 1;
        proxy.spoil_next("patch", resource, [fault.clone()]);
        ask(n).await;
        eventually(&format!("{n} numbers, {resource} {fault:?}"), Duration::from_secs(60), || async {
            let told = numbers(&cluster).await;
            if told.iter().copied().eq(1..=n) { Ok(()) } else { Err(format!("{told:?}")) }
        })
        .await;
    }
    // The controller is killed in the middle, four times over, and another goes on.
    for round in 0..4_i64 {
        let before = 7 + round * 5;
        for n in before + 1..=before + 5 {
            ask(n).await;
        }
        eventually("some are given", Duration::from_secs(60), || async {
            let told = numbers(&cluster).await.len();
            if told as i64 > before { Ok(()) } else { Err(format!("{told}")) }
        })
        .await;
        controller.signal("KILL");
        controller = cluster.controller_through(&proxy).await;
        eventually("all are given, without a gap", Duration::from_secs(60), || async {
            let told = numbers(&cluster).await;
            if told.iter().copied().eq(1..=before + 5) { Ok(()) } else { Err(format!("{told:?}")) }
        })
        .await;
    }
    let uid = cluster.bots().get("web").await.unwrap().uid().unwrap();
    assert_eq!(cluster.records().get(&uid).await.unwrap().spec.last_version, 27);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_version_on_a_lost_node_nobody_knows_and_what_is_on_its_way_ends_at_its_deadline() {
    let cluster = Cluster::turn().await;
    let _controller = cluster.controller().await;
    let mut agent = cluster.agent("node-1", json!({"cpu": "4", "memory": "4Gi", "bots": "100"})).await;
    cluster.bot("web", json!({})).await;
    cluster.bound("web").await;
    let snapshots: kube::Api<BotSnapshot> = kube::Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let ask = async |name: &str, seconds: i64| {
        let spec = BotSnapshotSpec { failure_deadline_seconds: seconds, ..BotSnapshotSpec::of("web") };
        snapshots.create(&PostParams::default(), &BotSnapshot::new(name, spec)).await.unwrap();
    };
    let ready = async |name: &str, status: &str, reason: &str| {
        eventually(&format!("{name}: Ready={status} {reason}"), Duration::from_secs(30), || async {
            let snapshot = snapshots.get(name).await.map_err(|e| e.to_string())?;
            let said = snapshot.status.unwrap_or_default();
            let found = said.conditions.iter().find(|c| c.type_ == "Ready");
            let is_it = found.is_some_and(|c| c.status == status && c.reason == reason);
            if is_it { Ok(said) } else { Err(format!("{said:?}")) }
        })
        .await
    };
    let agent_says = async |name: &str, phase: &str, status: &str, reason: &str| {
        let condition = json!({"type": "Ready", "status": status, "reason": reason, "message": "", "lastTransitionTime":
            "2026-11-24T00:00:00Z"});
        let body = json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotSnapshot",
            "metadata": {"name": name, "namespace": cluster.namespace},
            "status": {"phase": phase, "observedGeneration": 1, "sizeBytes": 7, "conditions": [condition]},
        });
        let params = PatchParams::apply(AGENT).force();
        snapshots.patch_status(name, &params, &Patch::Apply(&body)).await.unwrap();
    };
    for (name, seconds) in [("done", 300), ("under-way", 8)] {
        ask(name, seconds).await;
        ready(name, "False", "WaitingForBot").await;
    }
    agent_says("done", "Ready", "True", "SnapshotReady").await;
    agent_says("under-way", "Copying", "False", "Copying").await;
    agent.die();

    let said = ready("done", "Unknown", "NodeUnreachable").await;
    // The rest of what was said stands, and so does what was given.
    assert_eq!((said.version, said.size_bytes, said.phase), (Some(1), Some(7), Some(SnapshotPhase::Ready)));
    assert_eq!((said.bot_id.is_some(), said.node_name.as_deref()), (true, Some("node-1")));
    let said = ready("under-way", "False", "DeadlineExceeded").await;
    assert_eq!((said.version, said.phase), (Some(2), Some(SnapshotPhase::Failed)));
    // One that is asked for now gets no number: nobody is there to take it.
    ask("late", 1).await;
    let said = ready("late", "False", "DeadlineExceeded").await;
    assert_eq!((said.version, said.phase), (None, Some(SnapshotPhase::Failed)));

    // The agent takes it back, and nobody argues.
    let agent = agent.alive().await;
    agent_says("done", "Ready", "True", "SnapshotReady").await;
    ask("next", 300).await;
    assert_eq!(ready("next", "False", "WaitingForBot").await.version, Some(3));
    ready("done", "True", "SnapshotReady").await;
    drop(agent);
}
