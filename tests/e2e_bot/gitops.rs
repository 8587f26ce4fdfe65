//! What GitOps tools see: kstatus (the library itself) reads every state right, and an apply that is repeated changes nothing.

use std::io::Write as _;
use std::process::{Command, Stdio};

use berth::api::bot_container::{Phase, RestartPolicy};
use berth::api::bot_snapshot::SnapshotPhase;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::common::{SOON, bot, go_tool, wait_for};
use crate::stage::Stage;

/// `Current`, `InProgress`, `Failed`, `Terminating` …
fn kstatus(object: &impl serde::Serialize) -> String {
    let program = go_tool("kstatus");
    let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&serde_json::to_vec(object).unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    said.split('\t').next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn kstatus_reads_every_state_right() {
    let stage = Stage::set("kstatus").await;
    let node = stage.agent.node().to_owned();
    let on = |name: &str| bot(name).on(&node);
    let phase = async |name: &str, phase: Phase| stage.ns.phase(name, phase, SOON).await;

    stage.ns.apply(on("running")).await;
    stage.ns.ready("running", SOON).await;
    stage.ns.apply(on("stopped").stopped()).await;
    stage.ns.apply(on("paused").paused()).await;
    stage.ns.apply(on("done").sh("exit 0").restart(RestartPolicy::OnFailure)).await;
    stage.ns.apply(on("over").sh("exit 3").restart(RestartPolicy::Never)).await;
    stage.ns.apply(on("crashes").sh("exit 3")).await;
    stage.ns.apply(on("pulls").image(format!("{}/no/such:1", stage.cluster.env("BERTH_REGISTRY")))).await;
    stage.ns.apply(bot("nowhere").on("no-such-node")).await;
    for (name, what, wanted) in [
        ("running", Phase::Running, "Current"),
        ("stopped", Phase::Stopped, "Current"),
        ("paused", Phase::Paused, "Current"),
        ("done", Phase::Succeeded, "Current"),
        ("over", Phase::Failed, "Failed"),
        ("crashes", Phase::BackOff, "InProgress"),
        ("pulls", Phase::BackOff, "InProgress"),
        ("nowhere", Phase::Pending, "InProgress"),
    ] {
        let seen = phase(name, what).await;
        assert_eq!(kstatus(&seen), wanted, "{name}: {}", crate::common::summary(&seen));
    }
    // A change that nobody has acted on.
    let mut changed = stage.ns.bots().get("running").await.unwrap();
    changed.metadata.generation = changed.metadata.generation.map(|generation| generation + 1);
    assert_eq!(kstatus(&changed), "InProgress");
    // Its agent is away for longer than its Lease.
    let mut lost = stage.ns.bots().get("running").await.unwrap();
    let conditions = &mut lost.status.as_mut().unwrap().conditions;
    conditions.iter_mut().find(|c| c.type_ == "Ready").unwrap().status = "Unknown".to_owned();
    assert_eq!(kstatus(&lost), "InProgress");

    let snapshot = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotSnapshot", "metadata": {"name": "one"},
        "spec": {"botContainerName": "running"}});
    let patch = Patch::Apply(&snapshot);
    stage.ns.snapshots().patch("one", &PatchParams::apply("user"), &patch).await.unwrap();
    let seen = stage.ns.snapshot("one", SnapshotPhase::Ready).await;
    assert_eq!(kstatus(&seen), "Current");

    stage.ns.apply(on("slow").sh("trap '' TERM; while true; do sleep 1; done").grace(60)).await;
    stage.ns.ready("slow", SOON).await;
    stage.ns.bots().delete("slow", &DeleteParams::default()).await.unwrap();
    let seen = phase("slow", Phase::Terminating).await;
    assert_eq!(kstatus(&seen), "Terminating");
    // It need not be waited for.
    let quick = json!({"spec": {"terminationGracePeriodSeconds": 0}});
    stage.ns.bots().patch("slow", &PatchParams::default(), &Patch::Merge(&quick)).await.unwrap();
}

/// Drift would be a field that we write in what users declare, or a default that comes back as a difference.
#[tokio::test(flavor = "multi_thread")]
async fn an_apply_that_is_repeated_changes_nothing_and_shows_no_difference() {
    let stage = Stage::set("drift").await;
    let node = stage.agent.node();
    let manifest: Value = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
        "metadata": {"name": "web", "namespace": stage.ns.name(), "labels": {"app": "web"}},
        "spec": {
            "image": stage.cluster.image(), "nodeName": node,
            "env": [{"name": "A", "value": "1"}], "args": [], "operatingMode": "Running",
            "resources": {"limits": {"cpu": "0.5", "memory": "0.0625Gi"}},
            "snapshotPolicy": {"schedule": "0 3 * * *", "keepLast": 2},
            "securityContext": {"capabilities": {"drop": ["NET_RAW"]}},
            "skills": [{"name": "x", "description": "d", "content": "c"}],
            "files": [{"path": "/etc/x", "content": "y"}],
        },
    });
    let apply = async |manager: &str| {
        let params = PatchParams::apply(manager).force();
        stage.ns.bots().patch("web", &params, &Patch::Apply(&manifest)).await.unwrap()
    };
    apply("flux").await;
    let before = stage.ns.ready("web", SOON).await;
    // Its last status may still be on its way.
    let before = wait_for("web at rest", SOON, || async {
        let one = stage.ns.bots().get("web").await.map_err(|error| error.to_string())?;
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        let other = stage.ns.bots().get("web").await.map_err(|error| error.to_string())?;
        let same = one.metadata.resource_version == other.metadata.resource_version;
        if same {
            Ok(other)
        } else {
            Err(format!("{:?} after {:?}", other.metadata.resource_version, before.metadata.resource_version))
        }
    })
    .await;
    for manager in ["flux", "flux", "flux"] {
        let after = apply(manager).await;
        assert_eq!(after.metadata.resource_version, before.metadata.resource_version, "applied again by {manager}");
    }
    // Another manager that declares the same owns it too, and nothing else changes.
    let after = apply("argocd-controller").await;
    assert_eq!(after.metadata.generation, before.metadata.generation);
    assert_eq!(serde_json::to_value(&after.spec).unwrap(), serde_json::to_value(&before.spec).unwrap());
    assert_eq!(apply("argocd-controller").await.metadata.resource_version, after.metadata.resource_version);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.yaml");
    std::fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    let path = path.to_str().unwrap();
    // It fails where there is a difference.
    let diff = stage.cluster.kubectl(["diff", "--server-side", "--field-manager", "flux", "--filename", path]);
    assert_eq!(diff, "");
    // Client-side apply, as people do it.
    let other = manifest.to_string().replace("\"web\"", "\"plain\"");
    std::fs::write(path, other).unwrap();
    stage.cluster.kubectl(["apply", "--filename", path]);
    stage.ns.ready("plain", SOON).await;
    assert_eq!(stage.cluster.kubectl(["diff", "--filename", path]), "");
}
