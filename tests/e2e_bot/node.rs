//! What a node says of itself, and what it takes.

use std::collections::BTreeMap;
use std::time::Duration;

use berth::api::bot_container::Phase;
use berth::api::condition::ConditionType;
use berth::api::{BotContainer, BotNode, NODE_LEASE_NAMESPACE};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;

use crate::common::{SOON, bot, summary, wait_for};
use crate::stage::{Stage, alive, life, message, moment, page, pid, says, status};

async fn bot_node(stage: &Stage) -> BotNode {
    Api::<BotNode>::all(stage.ns.client()).get(stage.agent.node()).await.unwrap()
}

/// A condition's (status, reason).
fn of(node: &BotNode, type_: &str) -> Option<(String, String)> {
    let conditions = &node.status.as_ref()?.conditions;
    conditions.iter().find(|c| c.type_ == type_).map(|c| (c.status.clone(), c.reason.clone()))
}

/// Waits until the BotNode says so.
async fn node_says(stage: &Stage, type_: &str, status: &str, reason: &str) -> BotNode {
    wait_for(format!("{type_}={status} {reason} of {}", stage.agent.node()), SOON, || async {
        let node = bot_node(stage).await;
        match of(&node, type_) {
            Some((s, r)) if (s.as_str(), r.as_str()) == (status, reason) => Ok(node),
            _ => Err(format!("{:?}", node.status)),
        }
    })
    .await
}

/// Waits until a bot is Pending with these words about the node.
async fn pending(stage: &Stage, name: &str, why: &str) -> BotContainer {
    let unplaced = stage.ns.until(name, format!("Pending: {why}"), SOON, |bot| {
        bot.status.as_ref().is_some_and(|s| s.phase == Some(Phase::Pending))
            && says(bot, ConditionType::Ready) == Some(("False", "Unschedulable"))
            && message(bot, ConditionType::Ready).contains(why)
    });
    let bot = unplaced.await;
    assert_eq!(status(&bot).node_name, None, "{}", summary(&bot));
    bot
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_tells_what_it_is_and_whether_somebody_looks_after_it() {
    let mut stage = Stage::set("tells").await;
    let name = stage.agent.node().to_owned();
    // The disk is looked at a moment after the start, and the CIDR is the controller's to give.
    let node = wait_for("what is known of the disk, a CIDR, Ready", SOON, || async {
        let node = bot_node(&stage).await;
        let ready = of(&node, "Ready") == Some(("True".to_owned(), "AgentReady".to_owned()));
        let complete = ready && node.spec.bot_cidr.is_some() && of(&node, "DiskPressure").is_some();
        if complete { Ok(node) } else { Err(format!("{:?} {:?}", node.spec, node.status)) }
    })
    .await;
    let said = node.status.as_ref().unwrap();
    let versions = said.versions.as_ref().unwrap();
    assert_eq!(versions.berth, env!("CARGO_PKG_VERSION"));
    let theirs = stage.agent.ctr(["version"]);
    assert!(theirs.contains(&versions.containerd), "{} of {theirs}", versions.containerd);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(versions.kernel, kernel.trim());
    assert!(!versions.runc.is_empty() && versions.runc != "unknown", "{versions:?}");
    assert!(["v1", "v2", "hybrid"].contains(&versions.cgroup.as_str()), "{versions:?}");
    for snapshotter in ["overlayfs", "native"] {
        assert!(said.snapshotters.iter().any(|s| s == snapshotter), "{:?}", said.snapshotters);
    }
    assert_eq!(said.runtime_handlers, ["runc"]);
    let keys: Vec<&str> = said.capacity.keys().map(String::as_str).collect();
    assert_eq!(keys, ["bots", "cpu", "memory"]);
    assert_eq!(said.capacity["bots"].0, "200");
    assert_eq!(said.allocatable, said.capacity);
    assert!(said.addresses.iter().any(|a| a.type_ == "Hostname"), "{:?}", said.addresses);
    assert_eq!(of(&node, "RuntimeSupported"), Some(("True".to_owned(), "Supported".to_owned())));
    let cidr = node.spec.bot_cidr.clone().unwrap();
    let owner = &node.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!((owner.kind.as_str(), owner.name.as_str()), ("Node", name.as_str()));

    let table = stage.cluster.kubectl(["get", "bnode", &name]);
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["NAME", "READY", "CIDR", "CONTAINERD", "AGE"]);
    assert_eq!(words[1][..4], [name.as_str(), "True", &cidr, &versions.containerd]);

    let lease = Api::<Lease>::namespaced(stage.ns.client(), NODE_LEASE_NAMESPACE).get(&name).await.unwrap();
    let lease = lease.spec.unwrap();
    assert!(lease.holder_identity.unwrap().starts_with(&name));
    assert_eq!(lease.lease_duration_seconds, Some(40));

    assert_eq!(stage.agent.get("/healthz").await.unwrap().0, 200);
    let (code, metrics) = stage.agent.get("/metrics").await.unwrap();
    assert!(code == 200 && metrics.contains("berth_agent_bots 0"), "{code}: {metrics}");

    // An agent that is stopped in order says so at once; nobody waits for its Lease.
    stage.agent.stop().await;
    assert_eq!(of(&bot_node(&stage).await, "Ready"), Some(("False".to_owned(), "AgentStopping".to_owned())));
    stage.apply(bot("web")).await;
    pending(&stage, "web", "AgentStopping").await;
    stage.agent.start_again(&[]).await;
    let back = node_says(&stage, "Ready", "True", "AgentReady").await;
    assert_eq!(back.spec.bot_cidr, Some(cidr), "a node keeps its CIDR");
    page(&stage.ns.ready("web", SOON).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_of_a_node_is_idle_until_the_first_is_gone() {
    let mut stage = Stage::set("twin").await;
    let web = stage.runs(bot("web")).await;
    let process = life(pid(&web));
    let twin = stage.agent.twin();
    wait_for("the second agent's first word", SOON, || twin.get("/healthz")).await;
    // Both are asked for the same; one does it.
    for i in 0..4 {
        stage.runs(bot(&format!("more-{i}"))).await;
    }
    let (code, why) = twin.get("/readyz").await.unwrap();
    assert_ne!(code, 200, "the second agent says that it serves: {why}");
    let left = stage.agent.leaks();
    assert_eq!((left.count("tasks"), left.count("containers")), (5, 5), "{left:?}");

    stage.agent.kill_9();
    wait_for("the second agent to take over", SOON, || async {
        match twin.get("/readyz").await? {
            (200, _) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let edited = json!({"env": [{"name": "BOT_NAME", "value": "edited"}]});
    let more = stage.edited("more-0", edited, Phase::Running).await;
    assert!(page(&more).await.starts_with("I am edited, started 2 time"), "{}", summary(&more));
    assert_eq!(life(pid(&web)), process, "a bot that nobody changed is not touched");
    drop(twin);
    stage.agent.start_again(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_has_in_all_bounds_its_bots() {
    let stage = Stage::set_with(
        "capacity",
        &[("BERTH_MAX_BOTS", "2"), ("BERTH_CAPACITY_MEMORY", "256Mi"), ("BERTH_CAPACITY_CPU", "1500m")],
    )
    .await;
    let said = bot_node(&stage).await.status.unwrap();
    let has = |key: &str| said.allocatable[key].0.as_str();
    assert_eq!((has("bots"), has("memory"), has("cpu")), ("2", "256Mi", "1500m"));

    stage.runs(bot("first").limit("memory", "200Mi")).await;
    stage.apply(bot("large").limit("memory", "100Mi")).await;
    pending(&stage, "large", "insufficient memory (asks 100Mi, free 56Mi)").await;
    stage.runs(bot("second")).await;
    stage.apply(bot("third")).await;
    pending(&stage, "third", "full (takes 2 bots)").await;
    stage.ns.delete("second", SOON).await;
    stage.ns.ready("third", SOON).await;
    stage.ns.delete("first", SOON).await;
    stage.ns.ready("large", SOON).await;

    // Whatever their limits say, all of them together have no more: their parent is bounded.
    let parent = format!("/sys/fs/cgroup/memory{}/memory.limit_in_bytes", stage.agent.env("BERTH_CGROUP_PARENT"));
    let bound = std::fs::read_to_string(&parent).unwrap_or_else(|e| panic!("{parent}: {e}"));
    assert_eq!(bound.trim(), (256u64 << 20).to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_disk_is_nearly_full_takes_no_new_bots() {
    let mut stage = Stage::set_with("pressed", &[("BERTH_DISK_PRESSURE_PERCENT", "0")]).await;
    node_says(&stage, "DiskPressure", "False", "DiskOk").await;
    let old = stage.runs(bot("old")).await;
    // No disk has all of its room free.
    stage.agent.stop().await;
    stage.agent.start_again(&[("BERTH_DISK_PRESSURE_PERCENT", "100")]).await;
    node_says(&stage, "DiskPressure", "True", "DiskPressure").await;
    stage.apply(bot("new")).await;
    pending(&stage, "new", "not ready (DiskPressure is True)").await;
    assert!(alive(pid(&old)), "what runs, runs on");
    stage.edited("old", json!({"env": []}), Phase::Running).await;
    stage.agent.stop().await;
    stage.agent.start_again(&[("BERTH_DISK_PRESSURE_PERCENT", "0")]).await;
    stage.ns.ready("new", SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_class_is_waited_for_and_its_handler_must_be_there() {
    let stage = Stage::set("class").await;
    let classes = Api::<RuntimeClass>::all(stage.ns.client());
    // Cluster-scoped: named as the namespace, which no other test has.
    let name = stage.ns.name().to_owned();
    let create = async |handler: &str| {
        let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
        let class = RuntimeClass { metadata, handler: handler.to_owned(), ..RuntimeClass::default() };
        classes.create(&PostParams::default(), &class).await.unwrap();
    };
    let class = name.clone();
    stage.apply(bot("web").with(|spec| spec.runtime_class_name = Some(class))).await;
    pending(&stage, "web", &format!("there is no RuntimeClass {name}")).await;
    create("nowhere").await;
    pending(&stage, "web", "no runtime handler nowhere").await;
    // A class's handler can't be changed.
    classes.delete(&name, &DeleteParams::default()).await.unwrap();
    create("runc").await;
    page(&stage.ns.ready("web", SOON).await).await;
    // Whoever is placed stays and runs on without its class, but its next start waits for it.
    let before = stage.ns.ready("web", SOON).await;
    classes.delete(&name, &DeleteParams::default()).await.unwrap();
    moment(Duration::from_millis(500)).await;
    assert_eq!(stage.ns.ready("web", SOON).await.status, before.status);
    stage.edit("web", json!({"restartedAt": "2026-11-24T10:00:00Z"})).await;
    let waits = stage.says("web", Phase::BackOff, "InvalidSpec").await;
    let why = message(&waits, ConditionType::Ready);
    assert!(why.contains("spec.runtimeClassName") && why.contains(&name), "{why}");
    create("runc").await;
    page(&stage.ns.phase("web", Phase::Running, SOON).await).await;
    classes.delete(&name, &DeleteParams::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_goes_where_its_selector_and_tolerations_let_it() {
    let stage = Stage::set("selects").await;
    let node = stage.agent.node().to_owned();
    let kubectl = |args: &[&str]| stage.cluster.kubectl(args.iter().copied());
    kubectl(&["taint", "node", &node, "only=bots:NoSchedule"]);
    kubectl(&["label", "node", &node, &format!("zone={node}")]);
    let zone = BTreeMap::from([("zone".to_owned(), node.clone())]);
    let select = |bot: crate::common::BotBuilder| bot.with(|spec| spec.node_selector = zone.clone());
    stage.ns.apply(select(bot("kept-out"))).await;
    pending(&stage, "kept-out", &format!("{node}: taint only=bots:NoSchedule")).await;
    let tolerant = select(bot("tolerant")).with(|spec| {
        spec.tolerations = serde_json::from_value(json!([{"key": "only", "operator": "Exists"}])).unwrap();
    });
    stage.ns.apply(tolerant).await;
    let tolerant = stage.ns.ready("tolerant", SOON).await;
    assert_eq!(status(&tolerant).node_name.as_deref(), Some(node.as_str()));
    kubectl(&["taint", "node", &node, "only-"]);
    stage.ns.ready("kept-out", SOON).await;
}
