//! What the process finds: files, Secrets, environment, user, host name, DNS, time zone, capabilities.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;

use berth::api::BotContainer;
use berth::api::bot_container::Phase;
use berth::api::condition::ConditionType;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{DeleteParams, ObjectMeta, PostParams};
use serde_json::{Value, json};

use crate::common::{BotBuilder, SOON, bot, summary};
use crate::stage::{Stage, WAIT, environment, ip, life, message, path_in, pid, read_in, says, status, uid};

/// A bot that runs a script to its end and then waits; what the script says is to be read with [`said`].
fn asks(name: &str, script: &str) -> BotBuilder {
    bot(name).sh(&format!("{{ {script}\n}} >/tmp/new 2>&1; mv /tmp/new /tmp/said; {WAIT}"))
}

async fn said(bot: &BotContainer) -> String {
    read_in(bot, "/tmp/said").await
}

/// More of a spec, as JSON.
fn with(bot: BotBuilder, more: Value) -> BotBuilder {
    bot.with(|spec| {
        let mut all = serde_json::to_value(&*spec).unwrap();
        for (key, value) in more.as_object().unwrap() {
            all[key] = value.clone();
        }
        *spec = serde_json::from_value(all).unwrap();
    })
}

async fn secret(stage: &Stage, name: &str, data: &[(&str, &str)]) {
    let data = data.iter().map(|&(key, value)| (key.to_owned(), ByteString(value.into())));
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let secret = Secret { metadata, data: Some(data.collect()), ..Secret::default() };
    stage.ns.api::<Secret>().create(&PostParams::default(), &secret).await.unwrap();
}

async fn config_map(stage: &Stage, name: &str, data: &[(&str, &str)]) {
    let data: BTreeMap<_, _> = data.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let map = ConfigMap { metadata, data: Some(data), ..ConfigMap::default() };
    stage.ns.api::<ConfigMap>().create(&PostParams::default(), &map).await.unwrap();
}

/// Where the bot's layer is written on the node's disk.
fn layer(bot: &BotContainer) -> PathBuf {
    let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", pid(bot))).unwrap();
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
    let upper = root.split([',', ' ']).find_map(|option| option.strip_prefix("upperdir="));
    PathBuf::from(upper.unwrap_or_else(|| panic!("no upperdir: {root}")))
}

/// Whether any file below holds the text.
fn holds(dir: &std::path::Path, text: &str) -> bool {
    let found = Command::new("grep").args(["-rqsF", text]).arg(dir).status().unwrap();
    assert!(found.code() == Some(0) || found.code() == Some(1), "grep: {found}");
    found.success()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_mounted_with_their_modes_and_never_in_the_layer() {
    let stage = Stage::set("files").await;
    const VALUE: &str = "s3cret-value-of-the-test";
    secret(&stage, "bot", &[("toml", VALUE)]).await;
    config_map(&stage, "common", &[("motd", "welcome")]).await;
    let files = json!({"files": [
        {"path": "/etc/bot.toml", "mode": 0o600, "secretKeyRef": {"name": "bot", "key": "toml"}},
        {"path": "/opt/deep/motd", "mode": 0o444, "configMapKeyRef": {"name": "common", "key": "motd"}},
        {"path": "/data/plain", "content": "as it is\n"},
        {"path": "/data/none", "configMapKeyRef": {"name": "none", "key": "x", "optional": true}},
    ]});
    let script =
        "for f in /etc/bot.toml /opt/deep/motd /data/plain; do stat -c '%n %a' $f; cat $f; echo; done; ls /data";
    let web = stage.runs(with(asks("web", script), files)).await;
    let seen = said(&web).await;
    for line in ["/etc/bot.toml 600", VALUE, "/opt/deep/motd 444", "welcome", "/data/plain 644", "as it is"] {
        assert!(seen.lines().any(|l| l == line), "{line:?} is missing: {seen}");
    }
    assert!(!seen.lines().any(|l| l == "none"), "{seen}");
    // The bot itself wrote the value into its layer here; take that away before looking.
    std::fs::remove_file(path_in(&web, "/tmp/said")).unwrap();
    assert!(!holds(&layer(&web), VALUE), "the Secret's value is in the layer");
    assert!(!holds(&layer(&web), "as it is"));
    let dir = stage.cluster.dir();
    for place in ["containerd/root/io.containerd.metadata.v1.bolt", "containerd/state", "log"] {
        assert!(!holds(&dir.join(place), VALUE), "the Secret's value is in {place}");
    }
    for place in ["BERTH_LOG_DIR", "BERTH_STATE_DIR"] {
        assert!(!holds(stage.agent.env(place).as_ref(), VALUE), "the Secret's value is in {place}");
    }
    stage.ns.delete("web", SOON).await;
    assert!(!holds(stage.agent.env("BERTH_RUN_DIR").as_ref(), VALUE), "the Secret's value is left in /run");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_that_is_not_root_can_read_its_files_and_write_its_data() {
    let stage = Stage::set("user").await;
    secret(&stage, "bot", &[("toml", "token = 1")]).await;
    // As in API.md's example. A data folder that the image has keeps the owner that it has there; this one is new.
    let spec = json!({
        "data": {"path": "/home/bot/data"},
        "securityContext": {"runAsUser": 1000, "runAsNonRoot": true, "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}},
        "files": [{"path": "/etc/bot.toml", "mode": 0o600, "secretKeyRef": {"name": "bot", "key": "toml"}}],
    });
    let script = "id -u; cat /etc/bot.toml; echo; echo mine >/home/bot/data/mine && cat /home/bot/data/mine; cat /proc/self/status";
    let web = stage.runs(with(asks("web", script), spec)).await;
    let seen = said(&web).await;
    for line in
        ["1000", "token = 1", "mine", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"]
    {
        assert!(seen.lines().any(|l| l == line), "{line:?} is missing: {seen}");
    }
    assert_eq!(std::fs::metadata(path_in(&web, "/home/bot/data/mine")).unwrap().uid(), 1000);
    assert_eq!(std::fs::metadata(path_in(&web, "/etc/bot.toml")).unwrap().permissions().mode() & 0o777, 0o600);

    // Root where root is refused: told, with the field, and mended by an edit.
    stage.apply(with(bot("root"), json!({"securityContext": {"runAsNonRoot": true}}))).await;
    let failed = stage.says("root", Phase::Failed, "InvalidSpec").await;
    assert!(message(&failed, ConditionType::Ready).contains("runAsNonRoot"), "{}", summary(&failed));
    assert_eq!(says(&failed, ConditionType::Stalled).unwrap().0, "True");
    stage.runs(with(asks("root", "id"), json!({"securityContext": {"runAsNonRoot": true, "runAsUser": 7}}))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn environment_comes_from_secrets_and_config_maps_and_waits_for_those_that_are_missing() {
    let stage = Stage::set("environ").await;
    config_map(&stage, "common", &[("COLOUR", "blue"), ("MODE", "overridden")]).await;
    let spec = json!({
        "env": [
            {"name": "MODE", "value": "prod"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "bot", "key": "token"}}},
            {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "none", "key": "x", "optional": true}}},
            {"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "BOTH", "value": "$(MODE)-$(WHO)"},
        ],
        "envFrom": [{"configMapRef": {"name": "common"}}],
    });
    stage.apply(with(asks("web", "env"), spec)).await;
    let waits = stage.says("web", Phase::BackOff, "ConfigNotFound").await;
    let words = message(&waits, ConditionType::Ready);
    assert!(words.contains("\"bot\"") && words.contains("spec.env[1]"), "which one, and where: {words}");
    stage.told_once("web", "ConfigNotFound").await;
    assert_eq!(stage.agent.leaks().count("tasks"), 0);

    // The Secret without the key, then with it.
    secret(&stage, "bot", &[("other", "x")]).await;
    let waits = stage.says("web", Phase::BackOff, "ConfigNotFound").await;
    assert!(message(&waits, ConditionType::Ready).contains("spec.env[1]"), "{}", summary(&waits));
    stage.ns.api::<Secret>().delete("bot", &DeleteParams::default()).await.unwrap();
    secret(&stage, "bot", &[("token", "first")]).await;
    let web = stage.ns.ready("web", SOON).await;
    let seen = said(&web).await;
    for line in ["MODE=prod", "TOKEN=first", "COLOUR=blue", "WHO=web", "BOTH=prod-web"] {
        assert!(seen.lines().any(|l| l == line), "{line:?} is missing: {seen}");
    }
    assert!(seen.lines().any(|l| l == format!("ADDRESS={}", ip(&web))), "{seen}");
    assert!(!seen.contains("NONE="), "{seen}");

    // A changed Secret touches nothing; it is read at the next start.
    let process = life(pid(&web));
    stage.ns.api::<Secret>().delete("bot", &DeleteParams::default()).await.unwrap();
    secret(&stage, "bot", &[("token", "second")]).await;
    assert_eq!(life(pid(&stage.ns.ready("web", SOON).await)), process);
    let web = stage.edited("web", json!({"restartedAt": "2026-11-24T10:00:00Z"}), Phase::Running).await;
    let environ = environment(&web).await;
    assert!(environ.contains("TOKEN=second"), "{environ:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn host_name_time_zone_and_dns_are_as_asked() {
    let node = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(node.path(), "nameserver 192.0.2.7\nsearch node.example\n").unwrap();
    let resolv_conf = node.path().to_str().unwrap();
    let env = [("BERTH_CLUSTER_DNS", "10.96.0.10"), ("BERTH_RESOLV_CONF", resolv_conf)];
    let stage = Stage::set_with("names", &env).await;
    let script = "hostname; cat /etc/hostname /etc/hosts; date +%Z; echo TZ=$TZ; cat /etc/resolv.conf";
    let plain = stage.runs(asks("plain", script)).await;
    let seen = said(&plain).await;
    assert_eq!(seen.lines().next(), Some("plain"), "{seen}");
    let entry = seen.lines().find(|l| l.starts_with(&ip(&plain))).unwrap_or_else(|| panic!("no own entry: {seen}"));
    assert!(entry.split_whitespace().any(|word| word == "plain"), "{seen}");
    assert!(seen.lines().any(|l| l == "UTC"), "{seen}");
    assert!(seen.lines().any(|l| l == "nameserver 10.96.0.10"), "ClusterFirst: {seen}");
    let search = format!("search {}.svc.cluster.local svc.cluster.local cluster.local", stage.ns.name());
    assert!(seen.lines().any(|l| l.starts_with(&search)), "{seen}");

    let asked = json!({
        "network": {"hostname": "ada"},
        "timezone": "Europe/Berlin",
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["192.0.2.53"], "searches": ["example.com"], "options": [{"name": "ndots", "value": "2"}]},
    });
    let asked = stage.runs(with(asks("asked", script), asked)).await;
    let seen = said(&asked).await;
    assert_eq!(seen.lines().next(), Some("ada"), "{seen}");
    // The image has no tz database of its own.
    assert!(seen.lines().any(|l| ["CET", "CEST"].contains(&l)), "{seen}");
    for line in ["TZ=Europe/Berlin", "nameserver 192.0.2.53", "search example.com", "options ndots:2"] {
        assert!(seen.lines().any(|l| l == line), "{line:?} is missing: {seen}");
    }
    assert_eq!(
        std::fs::read(path_in(&asked, "/etc/localtime")).unwrap(),
        std::fs::read("/usr/share/zoneinfo/Europe/Berlin").unwrap()
    );

    let default = stage.runs(with(asks("default", "cat /etc/resolv.conf"), json!({"dnsPolicy": "Default"}))).await;
    let seen = said(&default).await;
    for line in ["nameserver 192.0.2.7", "search node.example"] {
        assert!(seen.lines().any(|l| l == line), "the node's own, {line:?}, is missing: {seen}");
    }
    assert!(!seen.contains("10.96.0.10"), "{seen}");

    for name in ["leapseconds", "Europe/Atlantis"] {
        stage.apply(with(bot("lost"), json!({"timezone": name}))).await;
        let failed = stage.says("lost", Phase::Failed, "InvalidSpec").await;
        assert!(message(&failed, ConditionType::Ready).contains(name), "{}", summary(&failed));
    }
    let failed = stage.says("lost", Phase::Failed, "InvalidSpec").await;
    let words = message(&failed, ConditionType::Ready);
    assert!(words.contains("spec.timezone") && words.contains("Europe/Atlantis"), "{words}");
    let mended = stage.edited("lost", json!({"timezone": "Etc/UTC"}), Phase::Running).await;
    assert_eq!(says(&mended, ConditionType::Stalled), None);
    assert_eq!(status(&mended).restart_count, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_is_confined_as_ctr_confines_the_same_image() {
    let stage = Stage::set("confined").await;
    let web =
        stage.runs(asks("web", "cat /proc/self/status; echo --; cut -d' ' -f5,6 /proc/self/mountinfo | sort")).await;
    let ours = said(&web).await;
    let image = stage.cluster.image();
    let script = "cat /proc/self/status; echo --; cut -d' ' -f5,6 /proc/self/mountinfo | sort";
    let theirs = stage.agent.ctr(["run", "--rm", "--seccomp", &image, "peer", "/bin/sh", "-c", script]);
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(&format!("{name}:")));
        line.unwrap_or_else(|| panic!("no {name}: {text}")).to_owned()
    };
    for name in ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Seccomp"] {
        assert_eq!(field(&ours, name), field(&theirs, name));
    }
    assert_eq!(field(&ours, "Seccomp").split_whitespace().last(), Some("2"), "filtered");
    let mounts = |text: &str| -> Vec<String> {
        let (_, mounts) = text.split_once("--\n").unwrap();
        mounts.lines().map(str::to_owned).collect()
    };
    let (ours, theirs) = (mounts(&ours), mounts(&theirs));
    for mount in &theirs {
        // Ours are never less strict; what the other has is there.
        let place = mount.split(' ').next().unwrap();
        // ctr's own addition; a Pod has none.
        if place == "/run" {
            continue;
        }
        assert!(ours.iter().any(|m| m.split(' ').next() == Some(place)), "{place} is missing: {ours:#?}");
    }
    // And its cgroup is below the node's own parent, under its id.
    let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", pid(&web))).unwrap();
    let wanted = format!("{}/berth-{}", stage.agent.env("BERTH_CGROUP_PARENT"), uid(&web));
    assert!(cgroup.lines().any(|line| line.contains(":memory:") && line.ends_with(&wanted)), "{cgroup}");
}

/// What a bot's own env says of TZ went under `timezone`; a file at a place of ours ended as InvalidSpec; what the spec
/// mounts could be written, and filled the tmpfs that all bots' files are on.
#[tokio::test(flavor = "multi_thread")]
async fn the_specs_own_words_and_files_go_before_berths() {
    let stage = Stage::set("own").await;
    let spec = json!({
        "timezone": "Europe/Berlin",
        "env": [{"name": "TZ", "value": "Asia/Tokyo"}],
        "files": [
            {"path": "/etc/hosts", "content": "127.0.0.1 mine\n"},
            {"path": "/etc/bot.toml", "content": "a = 1\n"},
        ],
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"add": ["SYS_ADMIN"], "drop": ["net_raw"]}},
    });
    let script = "echo TZ=$TZ; cat /etc/hosts; echo more >>/etc/bot.toml; echo more >>/etc/hostname; cat /etc/hostname; cat /proc/self/status";
    let web = stage.runs(with(asks("web", script), spec)).await;
    let seen = said(&web).await;
    for line in ["TZ=Asia/Tokyo", "127.0.0.1 mine", "more", "NoNewPrivs:\t1", "CapEff:\t00000000a82405fb"] {
        assert!(seen.lines().any(|l| l == line), "{line:?} is missing: {seen}");
    }
    assert!(seen.contains("Read-only file system"), "{seen}");
    assert_eq!(std::fs::read_to_string(path_in(&web, "/etc/bot.toml")).unwrap(), "a = 1\n");
    // What it may write is on the disk of its layer, a folder of its own, and goes with it.
    let files = |dir| PathBuf::from(stage.agent.env(dir)).join("files").join(format!("berth-{}", uid(&web)));
    let (own, run) = (files("BERTH_STATE_DIR"), files("BERTH_RUN_DIR"));
    assert!(holds(&own, "more"));
    assert!(!holds(&run, "more"));
    // A file that leaves the spec does not stay on the node.
    assert!(holds(&run, "a = 1"));
    stage.edited("web", json!({"files": null}), Phase::Running).await;
    assert!(!holds(&run, "a = 1"));
    stage.ns.delete("web", SOON).await;
    assert!(!own.exists() && !run.exists());

    // As in a Pod: a read-only root takes Berth's own files along, and leaves the data.
    let spec = json!({"securityContext": {"readOnlyRootFilesystem": true}});
    let script = format!("for f in /etc/hosts /etc/resolv.conf /x /data/x; do echo x >>$f; done 2>/data/said; {WAIT}");
    let strict = stage.runs(with(bot("strict").sh(&script), spec)).await;
    let seen = read_in(&strict, "/data/said").await;
    assert_eq!(seen.matches("Read-only file system").count(), 3, "{seen}");
    assert_eq!(read_in(&strict, "/data/x").await, "x\n");
}

/// Nobody said what a bot's layer stands on.
#[tokio::test(flavor = "multi_thread")]
async fn the_lineage_is_told_from_the_images_first_layer_to_the_active_one() {
    let stage = Stage::set("lineage").await;
    let web = stage.runs(bot("web")).await;
    let lineage = &status(&web).lineage;
    let (active, below) = lineage.split_last().unwrap();
    assert_eq!((active.kind.as_str(), active.name.as_str()), ("Active", format!("berth-{}.1", uid(&web)).as_str()));
    let images = stage.agent.ctr(["snapshots", "list"]);
    let mut parent = None;
    for layer in below {
        assert_eq!((layer.kind.as_str(), layer.parent.as_ref()), ("Committed", parent));
        assert!(images.contains(&layer.name), "{images}");
        parent = Some(&layer.name);
    }
    assert!(parent.is_some() && active.parent.as_ref() == parent, "{lineage:?}");
    assert!(lineage.iter().all(|layer| layer.created_at.is_some()), "{lineage:?}");
    // A restart stands on the same.
    let after = stage.edited("web", json!({"restartedAt": "2026-11-24T10:00:00Z"}), Phase::Running).await;
    assert_eq!(&status(&after).lineage, lineage);
}

/// What no API server can know is told by the node: with the field, as a condition and an Event, and mended by an edit. A
/// spec that was refused before any step was told by no Event.
#[tokio::test(flavor = "multi_thread")]
async fn what_only_the_node_knows_is_told_with_its_field() {
    let stage = Stage::set("fields").await;
    let security = |more: Value| json!({"securityContext": more});
    let cases = [
        (json!({"data": {"path": "/bin/sh"}}), "InvalidSpec", "spec.data.path"),
        (json!({"workingDir": "/proc/self"}), "InvalidSpec", "spec.workingDir"),
        (json!({"timezone": "Europe/Atlantis"}), "InvalidSpec", "spec.timezone"),
        (security(json!({"runAsNonRoot": true})), "InvalidSpec", "spec.securityContext.runAsNonRoot"),
        (
            security(json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "no.json"}})),
            "InvalidSpec",
            "spec.securityContext.seccompProfile.localhostProfile",
        ),
        (
            security(json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": "no"}})),
            "InvalidSpec",
            "spec.securityContext.appArmorProfile",
        ),
        (
            json!({"files": [{"path": "/x", "configMapKeyRef": {"name": "none", "key": "k"}}]}),
            "ConfigNotFound",
            "spec.files[0].configMapKeyRef",
        ),
        (json!({"envFrom": [{"secretRef": {"name": "none"}}]}), "ConfigNotFound", "spec.envFrom[0]"),
        (json!({"restoreFrom": {"snapshotName": "none"}}), "RestoreFailed", "spec.restoreFrom"),
    ];
    for (i, (spec, ..)) in cases.iter().enumerate() {
        stage.apply(with(bot(&format!("b{i}")), spec.clone())).await;
    }
    for (i, (spec, reason, field)) in cases.into_iter().enumerate() {
        let name = format!("b{i}");
        let told = stage
            .ns
            .until(&name, reason, SOON, |bot| {
                bot.status.is_some() && says(bot, ConditionType::Ready) == Some(("False", reason))
            })
            .await;
        assert!(message(&told, ConditionType::Ready).contains(field), "{spec}: {}", summary(&told));
        stage.told_once(&name, reason).await;
        let undo: serde_json::Map<_, _> = spec.as_object().unwrap().keys().map(|k| (k.clone(), Value::Null)).collect();
        if !["data", "restoreFrom"].contains(&undo.keys().next().unwrap().as_str()) {
            stage.edited(&name, undo.into(), Phase::Running).await;
        }
    }
}
