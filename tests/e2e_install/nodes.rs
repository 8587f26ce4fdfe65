//! Two nodes, each with a kubelet, a containerd and a machine of its own.

use std::path::Path;

use berth::api::bot_container::Phase;
use berth::api::condition::{ConditionType, find};
use berth::api::{BotContainer, BotNode, NODES_NAMESPACE, SYSTEM_NAMESPACE};
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt as _};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::common::{self, refused_or_invalid, token_request, wait_for};
use crate::installed::{Installed, LONG, NODE, pid};

/// Its machine is a set of namespaces (hack/machine).
const SECOND: &str = "node-2";

impl Installed {
    /// As the agent in the Pod on the second node: with the token that kubelet gave it.
    async fn agent_of_second(&self) -> Client {
        let pods = self.pods("agent").await;
        let here = |pod: &&Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(SECOND);
        let uid = pods.iter().find(here).unwrap().uid().unwrap();
        let machine = format!("/proc/{}/root", self.cluster.pid("second-machine"));
        let below = format!("kubelet/root/pods/{uid}/volumes/kubernetes.io~projected");
        let volumes = Path::new(&machine).join(self.cluster.dir().strip_prefix("/").unwrap()).join(below);
        let volume = std::fs::read_dir(&volumes).unwrap().flatten().next().unwrap();
        self.cluster.client_with(&std::fs::read_to_string(volume.path().join("token")).unwrap()).await
    }

    async fn unknown(&self, name: &str) {
        self.until(name, "Unknown", |bot| {
            let ready = bot.status.as_ref().and_then(|status| find(&status.conditions, ConditionType::Ready));
            ready.is_some_and(|ready| ready.status == "Unknown" && ready.reason == "NodeUnreachable")
        })
        .await;
    }

    /// All processes of the second machine end at once; what it has on its disk stays.
    async fn second_loses_power(&self) {
        let machine = self.cluster.pid("second-machine");
        kill_process(Pid::from_raw(machine.cast_signed()).unwrap(), Signal::KILL).unwrap();
        wait_for("the second machine off", LONG, || async {
            let left = common::marked(self.cluster.dir(), "second-machine");
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }
}

fn node_of(bot: &BotContainer) -> &str {
    bot.status.as_ref().and_then(|status| status.node_name.as_deref()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_node_is_used_drained_loses_power_and_is_lost() {
    let berth = Installed::on(&[NODE, SECOND]).await;
    berth.release(&["install", "--create-namespace"], "charts/berth", &[]);
    berth.takes_bots(NODE).await;
    berth.takes_bots(SECOND).await;

    // Spread, each on its machine, with its own address there.
    for name in ["a", "b", "c", "d"] {
        berth.apply(name, json!({})).await;
    }
    let mut bots = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let bot = berth.ready(name).await;
        assert!(berth.page(&bot).await.contains(&format!("I am {name}, started 1 time(s)")));
        bots.push(bot);
    }
    let (here, there): (Vec<_>, Vec<_>) = bots.iter().partition(|bot| node_of(bot) == NODE);
    assert_eq!((here.len(), there.len()), (2, 2), "{:?}", bots.iter().map(node_of).collect::<Vec<_>>());
    let (ours, theirs, doomed) = (here[0].name_any(), there[0].name_any(), there[1].name_any());
    let before = pid(here[0]);
    let cidr = async |node: &str| Api::<BotNode>::all(berth.client.clone()).get(node).await.unwrap().spec.bot_cidr;
    assert_ne!(cidr(NODE).await, cidr(SECOND).await);

    // What the agent there has is worth nothing here. Dry runs: the agents go on with their own.
    let thief = berth.agent_of_second().await;
    let body = json!({"status": {"phase": "Failed"}});
    let dry = PatchParams { dry_run: true, ..PatchParams::default() };
    let as_thief = Api::<BotContainer>::default_namespaced(thief.clone());
    refused_or_invalid("a bot of the other node", as_thief.patch_status(&ours, &dry, &Patch::Merge(&body)).await);
    as_thief.patch_status(&theirs, &dry, &Patch::Merge(&body)).await.unwrap();
    let nodes = Api::<BotNode>::all(thief.clone());
    let body = json!({"status": {"runtimeHandlers": ["stolen"]}});
    refused_or_invalid("the other BotNode", nodes.patch_status(NODE, &dry, &Patch::Merge(&body)).await);
    nodes.patch_status(SECOND, &dry, &Patch::Merge(&body)).await.unwrap();
    let asked = token_request(Some(SECOND), 3600);
    let accounts = Api::<ServiceAccount>::namespaced(thief, NODES_NAMESPACE);
    refused_or_invalid(
        "a token of the other node's account",
        accounts.create_token_request(NODE, &PostParams::default(), &asked).await,
    );
    accounts.create_token_request(SECOND, &PostParams::default(), &asked).await.unwrap();

    // A drain of one node, with whatever else is on it, stops the bots there and no others.
    let kubectl = |words: &[&str]| berth.cluster.kubectl(words.iter().copied());
    kubectl(&["drain", SECOND, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout", "120s"]);
    for name in [&theirs, &doomed] {
        let bot = berth.bots().get(name).await.unwrap();
        let status = bot.status.as_ref().unwrap();
        let ready = find(&status.conditions, ConditionType::Ready).unwrap();
        let seen = (status.phase, ready.reason.as_str(), status.task.is_none());
        assert_eq!(seen, (Some(Phase::Stopped), "NodeDraining", true), "{}", common::summary(&bot));
    }
    berth.apply("e", json!({})).await;
    assert_eq!(node_of(&berth.ready("e").await), NODE);
    assert_eq!(pid(&berth.ready(&ours).await), before);
    kubectl(&["uncordon", SECOND]);
    for name in [&theirs, &doomed] {
        assert!(berth.page(&berth.ready(name).await).await.contains("started 2 time(s)"), "files are kept");
    }

    // It loses power. Nobody knows of its bots, nothing is started in their place, and what else there is goes on.
    berth.second_loses_power().await;
    for name in [&theirs, &doomed] {
        berth.unknown(name).await;
    }
    berth.bots().delete(&doomed, &DeleteParams::default()).await.unwrap();
    berth.apply("f", json!({})).await;
    assert_eq!(node_of(&berth.ready("f").await), NODE);
    assert_eq!(pid(&berth.ready(&ours).await), before);
    assert!(berth.bots().get(&doomed).await.unwrap().metadata.deletion_timestamp.is_some(), "it waits for its node");

    // It is back, with its disk: what was asked meanwhile is done, and bots go on with their files.
    berth.cluster.up_again();
    berth.takes_bots(SECOND).await;
    let back = berth.ready(&theirs).await;
    assert_eq!(node_of(&back), SECOND);
    assert!(berth.page(&back).await.contains("started 3 time(s)"), "files are kept");
    berth.gone(&doomed).await;

    // It is lost for good, and its Node deleted: what hung on it is let go, and told to be lost.
    berth.second_loses_power().await;
    berth.unknown(&theirs).await;
    let uid = back.uid().unwrap();
    berth.bots().delete(&theirs, &DeleteParams::default()).await.unwrap();
    Api::<Node>::all(berth.client.clone()).delete(SECOND, &DeleteParams::default()).await.unwrap();
    berth.gone(&theirs).await;
    wait_for("an Event that tells what is lost", LONG, || async {
        let events = Api::<Event>::default_namespaced(berth.client.clone()).list(&ListParams::default()).await.unwrap();
        let told = events.iter().find(|event| {
            event.reason.as_deref() == Some("FinalizerReleased")
                && event.regarding.as_ref().and_then(|of| of.uid.as_deref()) == Some(&uid)
        });
        told.map(|_| ()).ok_or_else(|| format!("{} others", events.items.len()))
    })
    .await;
    let pods = Api::<Pod>::namespaced(berth.client.clone(), SYSTEM_NAMESPACE);
    wait_for("no Pod of Berth's on the lost node", LONG, || async {
        let left = pods.list(&ListParams::default().fields(&format!("spec.nodeName={SECOND}"))).await.unwrap().items;
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{:?}", left.iter().map(|pod| pod.name_any()).collect::<Vec<_>>()))
        }
    })
    .await;
    assert_eq!(pid(&berth.ready(&ours).await), before);
    berth.apply("g", json!({})).await;
    assert_eq!(node_of(&berth.ready("g").await), NODE);
}
