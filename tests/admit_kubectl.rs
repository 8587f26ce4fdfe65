//! What a person sees with kubectl: API.md's example, defaults, columns, short names, explain, strict validation.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is how a test fails")]

mod admit;

use std::process::Output;

use admit::cluster;
use berth::api::BotContainer;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

/// The example of API.md, all of it.
const EXAMPLE: &str = r##"
apiVersion: berth.dev/v1alpha1
kind: BotContainer
metadata: {name: web}
spec:
  botId: 7c6b1d0e-8f0c-4d7e-9a55-0f6a3d1f2b11
  image: docker.io/library/node:22
  imagePullPolicy: IfNotPresent
  imagePullSecrets: [{name: registry}]
  command: [node]
  args: [bot.js]
  workingDir: /data
  env:
  - {name: MODE, value: prod}
  - {name: TOKEN, valueFrom: {secretKeyRef: {name: bot, key: token}}}
  envFrom: [{configMapRef: {name: common}}]
  operatingMode: Running
  restartPolicy: Always
  terminationGracePeriodSeconds: 10
  restartedAt: "2026-11-24T10:00:00Z"
  runtimeClassName: gvisor
  snapshotter: overlayfs
  resources: {requests: {cpu: 100m, memory: 64Mi}, limits: {cpu: "1", memory: 512Mi, pids: "512"}}
  securityContext: {runAsUser: 1000, runAsNonRoot: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}
  nodeName: node-1
  network: {mode: Bridge, hostname: web}
  dnsPolicy: ClusterFirst
  timezone: Europe/Berlin
  data: {path: /data}
  deletionPolicy: Delete
  restoreFrom: {snapshotName: web-before}
  restorePolicy: Latest
  rollback: {id: "2026-11-24", toVersion: 3, keepReplaced: true}
  snapshotPolicy: {schedule: "0 3 * * *", timeZone: Etc/UTC, keepLast: 7, beforeImageChange: true, suspend: false}
  skills: [{name: web-search, description: Search the web, content: "# How to …"}]
  files: [{path: /etc/bot.toml, mode: 0600, secretKeyRef: {name: bot, key: toml}}]
"##;

fn stdout(output: Output) -> String {
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "kubectl failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn stderr(output: Output) -> String {
    assert!(!output.status.success(), "kubectl succeeded: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

fn get(kind: &str, name: &str) -> Value {
    serde_json::from_str(&stdout(cluster().kubectl(&["get", kind, name, "-o", "json"], ""))).unwrap()
}

fn header(arguments: &[&str]) -> Vec<String> {
    let text = stdout(cluster().kubectl(arguments, ""));
    text.lines().next().unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

fn bot(name: &str, spec: &str) -> String {
    format!("{{apiVersion: berth.dev/v1alpha1, kind: BotContainer, metadata: {{name: {name}}}, spec: {spec}}}")
}

#[tokio::test]
async fn the_example_is_accepted_and_printed_as_promised() {
    let cluster = cluster();
    stdout(cluster.kubectl(&["apply", "--validate=strict", "-f", "-"], EXAMPLE));
    let stored = get("bot", "web");
    // YAML's octal: 0600 is 384.
    assert_eq!(stored["spec"]["files"][0]["mode"], json!(0o600));
    serde_json::from_value::<BotContainer>(stored).unwrap();

    let status = json!({"status": {
        "phase": "Running", "nodeName": "node-1", "currentVersion": 3, "restartCount": 1, "network": {"ip": "10.208.3.7"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "AsAsked", "message": "", "lastTransitionTime": "2026-11-24T10:00:00Z"}],
    }});
    let api = cluster.objects("BotContainer").await;
    api.patch_status("web", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    let printed = stdout(cluster.kubectl(&["get", "bots", "web"], ""));
    let mut lines = printed.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    assert_eq!(lines.next().unwrap(), ["NAME", "PHASE", "READY", "NODE", "IP", "IMAGE", "VERSION", "RESTARTS", "AGE"]);
    let row = lines.next().unwrap();
    assert_eq!(row[..8], ["web", "Running", "True", "node-1", "10.208.3.7", "docker.io/library/node:22", "3", "1"]);
    // The binding is a selectable field: an agent sees its own only.
    let selected = |node: &str| {
        let selector = format!("--field-selector=status.nodeName={node}");
        stdout(cluster.kubectl(&["get", "bots", &selector, "-o", "name"], ""))
    };
    assert_eq!(selected("node-1").trim(), "botcontainer.berth.dev/web");
    assert_eq!(selected("node-2"), "");
}

#[test]
fn defaults_are_filled_in() {
    stdout(cluster().kubectl(&["apply", "-f", "-"], &bot("plain", "{image: busybox}")));
    let spec = get("botcontainer", "plain")["spec"].clone();
    assert_eq!(
        spec,
        json!({
            "image": "busybox", "operatingMode": "Running", "restartPolicy": "Always", "terminationGracePeriodSeconds": 10,
            "network": {"mode": "Bridge"}, "dnsPolicy": "ClusterFirst", "data": {"path": "/data"},
            "deletionPolicy": "Delete", "restorePolicy": "Latest",
        })
    );
    let nested = "{image: a, network: {hostname: b}, data: {}, rollback: {id: a, toVersion: 1}, snapshotPolicy: {}}";
    stdout(cluster().kubectl(&["apply", "-f", "-"], &bot("nested", nested)));
    let spec = get("botcontainer", "nested")["spec"].clone();
    assert_eq!(spec["network"], json!({"mode": "Bridge", "hostname": "b"}));
    assert_eq!(spec["data"], json!({"path": "/data"}));
    assert_eq!(spec["rollback"], json!({"id": "a", "toVersion": 1, "keepReplaced": true}));
    assert_eq!(spec["snapshotPolicy"], json!({"beforeImageChange": true, "suspend": false}));

    let snapshot =
        "{apiVersion: berth.dev/v1alpha1, kind: BotSnapshot, metadata: {name: plain}, spec: {botContainerName: web}}";
    stdout(cluster().kubectl(&["apply", "-f", "-"], snapshot));
    assert_eq!(
        get("botsnapshot", "plain")["spec"],
        json!({"botContainerName": "web", "consistency": "Live", "maxFreezeMillis": 1000, "failureDeadlineSeconds": 300, "export": "None"})
    );
}

/// As for a Pod, `field: null` is the same as no field.
#[test]
fn null_is_unset() {
    let nulls = "{image: a, botId: null, env: null, data: null, network: {mode: null}, rollback: null, resources: {limits: null}, imagePullPolicy: null}";
    stdout(cluster().kubectl(&["create", "-f", "-"], &bot("nulls", nulls)));
    let stored = get("bot", "nulls");
    for field in ["botId", "env", "rollback", "imagePullPolicy"] {
        assert_eq!(stored["spec"].get(field), None, "{field}");
    }
    assert_eq!(stored["spec"]["data"], json!({"path": "/data"}));
    assert_eq!(stored["spec"]["network"], json!({"mode": "Bridge"}));
    serde_json::from_value::<BotContainer>(stored).unwrap();
}

#[test]
fn names_columns_and_category_are_as_promised() {
    let cluster = cluster();
    let make =
        "{apiVersion: berth.dev/v1alpha1, kind: BotSnapshot, metadata: {name: columns}, spec: {botContainerName: web}}
---
{apiVersion: berth.dev/v1alpha1, kind: BotNode, metadata: {name: columns}, spec: {botCIDR: 10.208.3.0/24}}
---
{apiVersion: berth.dev/v1alpha1, kind: BotRecord, metadata: {name: columns}, spec: {botId: columns}}
---
{apiVersion: berth.dev/v1alpha1, kind: BotContainer, metadata: {name: columns}, spec: {image: a}}";
    stdout(cluster.kubectl(&["apply", "--validate=strict", "-f", "-"], make));
    for name in ["bsnap", "botsnapshot", "botsnapshots"] {
        let wanted = ["NAME", "BOT", "VERSION", "PHASE", "TAKEN", "FROZEN", "SIZE", "AGE"];
        assert_eq!(header(&["get", name]), wanted, "{name}");
    }
    assert_eq!(header(&["get", "bot"]), header(&["get", "botcontainers"]));
    assert_eq!(header(&["get", "bnode"]), ["NAME", "READY", "CIDR", "CONTAINERD", "AGE"]);
    assert_eq!(header(&["get", "brec"])[0], "NAME");
    let all = stdout(cluster.kubectl(&["get", "berth", "-o", "name"], ""));
    for kind in ["botcontainer", "botsnapshot", "botrecord", "botnode"] {
        assert!(all.contains(&format!("{kind}.berth.dev/columns")), "{kind} is not in the category berth: {all}");
    }
}

#[test]
fn explain_speaks_to_users() {
    let explain = |what: &str| stdout(cluster().kubectl(&["explain", what], ""));
    let spec = explain("bot.spec");
    assert!(spec.contains("-required-"), "image is required: {spec}");
    assert!(explain("bot.spec.botId").contains("Identity of the bot in its namespace"));
    assert!(explain("bot.spec.operatingMode").contains("ENUM:"));
    assert!(explain("bot.spec.env.valueFrom.secretKeyRef").contains("FIELD: secretKeyRef"));
    assert!(explain("bsnap.status.frozenMillis").contains("How long the bot was frozen"));
    assert!(explain("bnode.spec").contains("botCIDR"));
    // Comments for us are not for users.
    let all = stdout(cluster().kubectl(&["explain", "bot", "--recursive"], ""));
    assert!(!all.contains("choice!") && !all.contains("schemars"), "{all}");
}

#[test]
fn unknown_and_doubled_fields_are_refused() {
    let refused =
        |spec: &str| stderr(cluster().kubectl(&["apply", "--validate=strict", "-f", "-"], &bot("strict", spec)));
    assert!(refused("{image: a, botID: b}").contains("unknown field \"spec.botID\""));
    assert!(refused("{image: a, network: {hostName: b}}").contains("unknown field \"spec.network.hostName\""));
    assert!(refused("{image: a, env: [{name: A, valuefrom: {}}]}").contains("unknown field \"spec.env[0].valuefrom\""));
    let twice = refused("{image: a, env: [{name: A, value: b}, {name: A, value: c}]}");
    assert!(twice.contains("spec.env[1]: Duplicate value: {\"name\":\"A\"}"), "{twice}");
    let twice = refused("{image: a, files: [{path: /a, content: b}, {path: /a, content: c}]}");
    assert!(twice.contains("spec.files[1]: Duplicate value"), "{twice}");
    let twice = refused("{image: a, skills: [{name: a, content: b}, {name: a, content: c}]}");
    assert!(twice.contains("spec.skills[1]: Duplicate value"), "{twice}");
}

#[test]
fn types_and_choices_are_refused_with_what_is_right() {
    let refused = |spec: &str| stderr(cluster().kubectl(&["apply", "-f", "-"], &bot("typed", spec)));
    let mode = refused("{image: a, operatingMode: Asleep}");
    assert!(
        mode.contains(
            "spec.operatingMode: Unsupported value: \"Asleep\": supported values: \"Running\", \"Paused\", \"Stopped\""
        ),
        "{mode}"
    );
    assert!(refused("{}").contains("spec.image: Required value"));
    let time = refused("{image: a, restartedAt: yesterday}");
    assert!(time.contains("spec.restartedAt"), "{time}");
    let mode = refused("{image: a, files: [{path: /a, content: b, mode: 01000}]}");
    assert!(mode.contains("spec.files[0].mode") && mode.contains("511"), "{mode}");
    let mode = refused("{image: a, files: [{path: /a, content: b, mode: \"0600\"}]}");
    assert!(mode.contains("spec.files[0].mode") && mode.contains("integer"), "{mode}");
    let cpu = refused("{image: a, resources: {limits: {cpu: 0.5}}}");
    assert!(cpu.contains("spec.resources.limits"), "{cpu}");
}

/// What a refusal looks like as a whole, for a person.
#[test]
fn a_refusal_reads_well() {
    let refused = |spec: &str| stderr(cluster().kubectl(&["apply", "-f", "-"], &bot("words", spec)));
    let id = refused("{image: a, botId: My Bot}");
    let wanted = "The BotContainer \"words\" is invalid: spec.botId: Invalid value: \"My Bot\": must be a DNS label";
    assert!(id.starts_with(wanted), "{id}");
    let two = refused("{image: a, rollback: {id: a, toVersion: 1, snapshotName: b}}");
    let wanted = "spec.rollback: Invalid value: must have exactly one of toVersion and snapshotName, and has both";
    assert!(two.contains(wanted), "{two}");
}
