//! From the first install to the last trace taken off.

use std::path::Path;
use std::process::Command;

use berth::api::bot_container::Phase;
use berth::api::{BotNode, NODES_NAMESPACE, SYSTEM_NAMESPACE};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Node, Pod, Secret};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::common::{self, run, wait_for};
use crate::installed::{Installed, LONG, NODE, pid};

fn loggers() -> Vec<u32> {
    let mut found: Vec<u32> = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let cgroup = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if comm.trim_end() == "berth-logger" && cgroup.contains(":/berth/logger\n") {
            found.push(pid);
        }
    }
    found.sort_unstable();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chart_is_installed_upgraded_and_taken_off() {
    let berth = Installed::on(&[NODE]).await;
    let client = berth.client.clone();

    // The version before, as far as there is one: the same chart under another number.
    let packaged = tempfile::tempdir().unwrap();
    let to = packaged.path().to_str().unwrap();
    berth.helm(&["package", "charts/berth", "--version", "0.0.9", "--destination", to]);
    berth.release(&["install", "--create-namespace"], &format!("{to}/berth-0.0.9.tgz"), &[]);
    let nodes = Api::<BotNode>::all(client.clone());
    berth.takes_bots(NODE).await;

    // A bot, with a Secret that only the node's account may read.
    let metadata = ObjectMeta { name: Some("bot".to_owned()), ..ObjectMeta::default() };
    let secret = Secret { metadata, string_data: Some([("token".into(), "open".into())].into()), ..Secret::default() };
    Api::<Secret>::default_namespaced(client.clone()).create(&PostParams::default(), &secret).await.unwrap();
    let token = json!({"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "bot", "key": "token"}}});
    let spec = json!({"env": [{"name": "BOT_NAME", "value": "web"}, token], "resources": {"requests": {"cpu": "10m"}}});
    berth.apply("web", spec).await;
    let web = berth.ready("web").await;
    assert!(berth.page(&web).await.contains("I am web, started 1 time(s)"));
    let environ = std::fs::read(format!("/proc/{}/environ", pid(&web))).unwrap();
    assert!(String::from_utf8_lossy(&environ).contains("TOKEN=open"));
    // Where kubelet neither counts nor kills it.
    let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", pid(&web))).unwrap();
    assert!(cgroup.lines().all(|line| !line.contains("kubelet") && !line.contains("kubepods")), "{cgroup}");

    // A snapshot while it runs, and back.
    let snapshot = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotSnapshot", "metadata": {"name": "web-1"},
        "spec": {"botContainerName": "web"}});
    let snapshots: Api<berth::api::BotSnapshot> = Api::default_namespaced(client.clone());
    snapshots.create(&PostParams::default(), &serde_json::from_value(snapshot).unwrap()).await.unwrap();
    wait_for("the snapshot Ready", LONG, || async {
        let seen = snapshots.get("web-1").await.map_err(|error| error.to_string())?;
        match seen.status.as_ref().and_then(|status| status.phase) {
            Some(berth::api::bot_snapshot::SnapshotPhase::Ready) => Ok(()),
            phase => Err(format!("{phase:?}")),
        }
    })
    .await;
    let rollback = json!({"spec": {"rollback": {"id": "one", "snapshotName": "web-1"}}});
    berth.bots().patch("web", &PatchParams::default(), &Patch::Merge(&rollback)).await.unwrap();
    let web = berth
        .until("web", "rolled back", |bot| {
            let status = bot.status.as_ref();
            status.and_then(|s| s.rollback.as_ref()).is_some_and(|done| done.id == "one" && done.completed_at.is_some())
                && status.and_then(|s| s.phase) == Some(Phase::Running)
        })
        .await;
    assert!(berth.page(&web).await.contains("started 2 time(s)"));
    let (before, logging) = (pid(&web), loggers());
    assert!(!logging.is_empty());

    // The agent is rolled, by an upgrade to the chart of today with another value; the bot and its logger notice nothing.
    let agents = Api::<DaemonSet>::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let generation = agents.get("berth-agent").await.unwrap().metadata.generation;
    let old: Vec<String> = berth.pods("agent").await.iter().map(ResourceExt::name_any).collect();
    berth.release(&["upgrade"], "charts/berth", &["--set", "agent.maxBots=20", "--set", "log.format=text"]);
    assert!(agents.get("berth-agent").await.unwrap().metadata.generation > generation);
    wait_for("another agent", LONG, || async {
        let pods = berth.pods("agent").await;
        let names: Vec<String> = pods.iter().map(ResourceExt::name_any).collect();
        if names.iter().all(|name| !old.contains(name)) && !names.is_empty() {
            Ok(())
        } else {
            Err(format!("{names:?}"))
        }
    })
    .await;
    wait_for("the new value in status", LONG, || async {
        let node = nodes.get(NODE).await.map_err(|error| error.to_string())?;
        let capacity = node.status.map(|status| status.capacity).unwrap_or_default();
        match capacity.get("bots") {
            Some(bots) if bots.0 == "20" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let web = berth.ready("web").await;
    assert_eq!((pid(&web), loggers()), (before, logging.clone()));
    berth.apply("second", json!({})).await;
    berth.ready("second").await;

    // What bots ask for, all together, is what the scheduler sees of them.
    let holders = Api::<Pod>::namespaced(client.clone(), NODES_NAMESPACE);
    let asks = |pod: &Pod| {
        let resources = pod.spec.as_ref().and_then(|spec| spec.containers[0].resources.clone()).unwrap_or_default();
        resources.requests.unwrap_or_default().get("cpu").map(|cpu| cpu.0.clone()).unwrap_or_default()
    };
    let holder = wait_for("the holder runs", LONG, || async {
        let pod = holders.get(NODE).await.map_err(|error| error.to_string())?;
        let phase = pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
        if phase == "Running" && asks(&pod) == "10m" {
            Ok(pod)
        } else {
            Err(format!("{phase}, asks for {}", asks(&pod)))
        }
    })
    .await;
    berth.apply("large", json!({"resources": {"requests": {"cpu": "250m"}}})).await;
    berth.ready("large").await;
    wait_for("the holder resized in place", LONG, || async {
        let pod = holders.get(NODE).await.map_err(|error| error.to_string())?;
        let status = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref()?.first().cloned());
        let given = status.and_then(|status| status.resources?.requests?.get("cpu").map(|cpu| cpu.0.clone()));
        let same = pod.uid() == holder.uid() && asks(&pod) == "260m" && given.as_deref() == Some("260m");
        if same { Ok(()) } else { Err(format!("{:?} asks for {}, has {given:?}", pod.uid(), asks(&pod))) }
    })
    .await;

    // A drain stops the bots, and waits until they have stopped; an uncordon starts them again.
    let kubectl = |words: &[&str]| run(berth.cluster.command(berth.cluster.dir().join("bin/kubectl")).args(words));
    kubectl(&["cordon", NODE]);
    berth.apply("late", json!({})).await;
    berth
        .until("late", "not placed", |bot| {
            let status = bot.status.as_ref();
            let scheduled = status.and_then(|s| s.conditions.iter().find(|c| c.type_ == "Scheduled"));
            scheduled.is_some_and(|scheduled| scheduled.status == "False")
        })
        .await;
    assert_eq!(pid(&berth.ready("web").await), before, "a cordon stops nothing");
    kubectl(&[
        "drain",
        NODE,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--pod-selector",
        "app.kubernetes.io/component=holder",
        "--timeout",
        "120s",
    ]);
    for name in ["web", "second", "large"] {
        let bot = berth.bots().get(name).await.unwrap();
        let status = bot.status.as_ref().unwrap();
        let ready = status.conditions.iter().find(|c| c.type_ == "Ready").unwrap();
        assert_eq!(
            (status.phase, ready.reason.as_str()),
            (Some(Phase::Stopped), "NodeDraining"),
            "{}",
            common::summary(&bot)
        );
        assert!(status.task.is_none());
    }
    assert!(!Path::new(&format!("/proc/{before}/exe")).exists(), "its process");
    kubectl(&["uncordon", NODE]);
    let web = berth.ready("web").await;
    assert!(berth.page(&web).await.contains("started 3 time(s)"), "files are kept");
    berth.ready("late").await;
    wait_for("another holder", LONG, || async {
        let pod = holders.get(NODE).await.map_err(|error| error.to_string())?;
        if pod.uid() != holder.uid() { Ok(()) } else { Err("the old one".to_owned()) }
    })
    .await;
    for name in ["large", "late"] {
        berth.bots().delete(name, &DeleteParams::default()).await.unwrap();
    }
    let (before, logging) = (pid(&web), loggers());

    // The controller is killed, all of its Pods at once; bots are placed again when one is back.
    let pods = Api::<Pod>::namespaced(client.clone(), SYSTEM_NAMESPACE);
    for pod in berth.pods("controller").await {
        let params = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        pods.delete(&pod.name_any(), &params).await.unwrap();
    }
    berth.apply("third", json!({})).await;
    berth.ready("third").await;

    // kubelet is killed and comes back.
    let kubelet = berth.cluster.pid("kubelet");
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(kubelet.cast_signed()).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    berth.cluster.up_again();
    assert_ne!(berth.cluster.pid("kubelet"), kubelet);
    berth.apply("fourth", json!({})).await;
    berth.ready("fourth").await;
    let web = berth.ready("web").await;
    assert_eq!((pid(&web), loggers()), (before, logging));

    // Taken off, with what is declared kept: bots run on, and are found again by the next one.
    berth.helm(&["uninstall", "berth", "--wait"]);
    wait_for("no agent", LONG, || async {
        let pods = berth.pods("agent").await;
        if pods.is_empty() { Ok(()) } else { Err(format!("{} Pods", pods.len())) }
    })
    .await;
    assert!(berth.bots().get("web").await.is_ok(), "objects are kept");
    assert!(berth.page(&web).await.contains("started 3 time(s)"), "the bot runs on");
    berth.release(&["install"], "charts/berth", &[]);
    let again = berth.ready("web").await;
    assert_eq!(pid(&again), before);
    assert!(Api::<Deployment>::namespaced(client.clone(), SYSTEM_NAMESPACE).get("berth-controller").await.is_ok());

    // For good, in the order of the README.
    let cleanup = |more: &[&str]| {
        let mut command = Command::new(common::BERTH);
        command.args([
            "node-cleanup",
            "--node-name",
            NODE,
            "--containerd-address",
            berth.cluster.env("CONTAINERD_ADDRESS"),
        ]);
        command.args(more).env("PATH", std::env::var_os("PATH").unwrap());
        command
    };
    let refused = cleanup(&["--yes"]).output().unwrap();
    assert!(!refused.status.success(), "an agent runs");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("an agent runs on this node"), "{refused:?}");
    for name in ["second", "third", "fourth"] {
        berth.bots().delete(name, &DeleteParams::default()).await.unwrap();
    }
    wait_for("three bots gone", LONG, || async {
        let left = berth.bots().list(&ListParams::default()).await.unwrap().items.len();
        if left == 1 { Ok(()) } else { Err(format!("{left} bots")) }
    })
    .await;
    // One is forgotten, and its node is taken off all the same.
    berth.helm(&["uninstall", "berth", "--wait"]);
    wait_for("no agent", LONG, || async {
        let pods = berth.pods("agent").await;
        if pods.is_empty() { Ok(()) } else { Err(format!("{} Pods", pods.len())) }
    })
    .await;
    let said = run(&mut cleanup(&[]));
    assert!(said.contains("1 tasks") && said.contains("nothing was removed"), "{said}");
    assert!(Path::new("/var/lib/berth").exists() && berth.page(&again).await.contains("I am web"));
    let said = run(&mut cleanup(&["--yes"]));
    assert!(said.contains("all of this is gone"), "{said}");
    assert!(!Path::new(&format!("/proc/{before}/exe")).exists(), "its process");
    assert_eq!(loggers(), Vec::<u32>::new());
    for path in ["/run/berth", "/var/lib/berth", "/var/log/berth", "/sys/class/net/berth0"] {
        assert!(!Path::new(path).exists(), "{path}");
    }
    for entry in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        assert!(!entry.path().join("berth").exists(), "{:?}", entry.path());
    }
    let tables = run(Command::new("nft").args(["list", "tables"]));
    assert!(!tables.contains("bots-on-berth0"), "{tables}");
    assert!(!berth.cluster.ctr("default", ["namespaces", "list", "-q"]).lines().any(|line| line == "berth"));
    let said = run(&mut cleanup(&["--yes"]));
    assert!(said.contains("0 tasks"), "safe twice: {said}");
    // kubelet's own are untouched.
    assert!(Api::<Node>::all(client.clone()).get(NODE).await.is_ok());
    assert!(berth.cluster.ctr("k8s.io", ["images", "list", "-q"]).contains("berth/berth"));

    // Where nothing is to be kept the uninstall takes bots and versions along: all, or it fails and takes nothing off.
    let all = ["--set", "crds.keep=false", "--set", "crds.deleteTimeoutSeconds=15"];
    berth.release(&["install"], "charts/berth", &all);
    // The one that was forgotten is declared still.
    let web = berth.ready("web").await;
    berth.apply("retained", json!({"deletionPolicy": "Retain"})).await;
    let processes = [pid(&web), pid(&berth.ready("retained").await)];
    let held = |finalizers: serde_json::Value| {
        let patch = json!({"metadata": {"finalizers": finalizers}});
        let snapshots = snapshots.clone();
        async move { snapshots.patch("web-1", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap() }
    };
    held(json!(["berth.dev/snapshot", "example.org/somebody"])).await;
    let said = berth.helm_refuses(&["uninstall", "berth", "--wait"]);
    assert!(said.contains("berth-delete-all"), "{said}");
    let says: Vec<String> = berth.pods("delete-all").await.iter().map(|pod| format!("{:?}", pod.status)).collect();
    assert!(
        says.iter().any(|status| status.contains("left after 15 s: 0 bots and 1 versions: default/web-1")),
        "{says:?}"
    );
    assert_eq!(berth.pods("agent").await.len(), 1, "the agent is there still, and the rest with it");
    assert!(Api::<Deployment>::namespaced(client.clone(), SYSTEM_NAMESPACE).get("berth-controller").await.is_ok());
    held(json!([])).await;
    berth.helm(&["uninstall", "berth", "--wait"]);
    let left = kubectl(&["get", "crd,clusterrole,clusterrolebinding,namespace", "-o", "name"]);
    let of_berth: Vec<&str> = left.lines().filter(|line| line.contains("berth")).collect();
    assert_eq!(of_berth, ["namespace/berth-system"], "what `--create-namespace` made is not of the chart");
    for pid in processes {
        assert!(!Path::new(&format!("/proc/{pid}/exe")).exists(), "a bot's process");
    }
    run(&mut cleanup(&["--yes"]));
}
