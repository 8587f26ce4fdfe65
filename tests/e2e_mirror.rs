//! The mirror against a real PostgreSQL and a real API server: the rows are what the objects say, whatever happened to the database,
//! the controller and the connection between.

#![allow(missing_docs)]
// Helpers outside of #[test] functions may fail a test as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
#[path = "e2e_controller/fixture.rs"]
mod fixture;
#[path = "e2e_mirror/postgres.rs"]
mod postgres;
mod proxy;
mod relay;

use std::time::Duration;

use berth::api::{AGENT, BotContainer, BotSnapshot, BotSnapshotSpec};
use fixture::{Cluster, Controller, eventually};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use postgres::Database;
use relay::{Mode, Relay};
use serde_json::{Value, json};

const BOT_ID: &str = "7c6b1d0e-8f0c-4d7e-9a55-0f6a3d1f2b11";

/// All that happens here, with the mirror on a database of its own.
struct Scene {
    cluster: Cluster,
    database: Database,
}

impl Scene {
    async fn new() -> Self {
        Self { cluster: Cluster::turn().await, database: Database::new().await }
    }

    async fn controller(&self) -> Controller {
        self.controller_at(self.database.port(), 600).await
    }

    async fn controller_at(&self, port: u16, resync: u64) -> Controller {
        let (url, resync) = (self.database.url(port), resync.to_string());
        self.cluster.controller_with(&["--database-url", &url, "--database-resync-seconds", &resync]).await
    }

    /// A bound bot.
    async fn bot(&self, name: &str, spec: Value) -> BotContainer {
        self.cluster.bot(name, spec).await;
        self.cluster.bound(name).await;
        self.cluster.bots().get(name).await.unwrap()
    }

    /// What the agent says of a bot, with these things that happened, numbered from 1.
    async fn says(&self, name: &str, phase: &str, happened: &[&str]) {
        self.says_more(
            name,
            phase,
            happened.iter().enumerate().map(|(i, type_)| transition(i as i64 + 1, type_)).collect(),
            "",
        )
        .await;
    }

    async fn says_more(&self, name: &str, phase: &str, transitions: Vec<Value>, message: &str) {
        let running = if phase == "Running" { "True" } else { "False" };
        let condition = |type_: &str, status: &str, reason: &str| {
            json!({"type": type_, "status": status, "reason": reason, "message": message,
                "lastTransitionTime": "2026-11-24T00:00:00Z"})
        };
        let removed = if phase == "Terminating" { "Removed" } else { "Running" };
        let body = json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
            "metadata": {"name": name, "namespace": self.cluster.namespace},
            "status": {
                "phase": phase, "observedGeneration": 1, "containerId": "berth-1", "restartCount": 2,
                "image": {"reference": "docker.io/library/busybox:1.36", "digest": "sha256:00"},
                "task": {"pid": 42, "startedAt": "2026-11-24T10:00:00Z"},
                "network": {"ip": "10.208.3.7", "ips": ["10.208.3.7"]},
                "conditions": [condition("Ready", running, "AsAsked"), condition("Running", running, removed)],
                "transitions": transitions,
            },
        });
        let done =
            self.cluster.bots().patch_status(name, &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await;
        done.unwrap();
    }

    fn snapshots(&self) -> Api<BotSnapshot> {
        Api::namespaced(self.cluster.client.clone(), &self.cluster.namespace)
    }

    /// A version, ready.
    async fn snapshot(&self, bot: &str, name: &str, display_name: Option<&str>) -> BotSnapshot {
        let spec = BotSnapshotSpec { display_name: display_name.map(str::to_owned), ..BotSnapshotSpec::of(bot) };
        let made = self.snapshots().create(&PostParams::default(), &BotSnapshot::new(name, spec)).await.unwrap();
        let numbered = eventually("a number", Duration::from_secs(20), || async {
            let snapshot = self.snapshots().get(name).await.map_err(|e| e.to_string())?;
            let status = snapshot.status.clone().unwrap_or_default();
            status.version.map(|_| snapshot).ok_or(format!("{status:?}"))
        })
        .await;
        let body = json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotSnapshot",
            "metadata": {"name": name, "namespace": self.cluster.namespace},
            "status": {
                "phase": "Ready", "runtimeName": format!("berth-v-{}", made.uid().unwrap()), "parent": "sha256:11",
                "snapshotter": "overlayfs", "taken": "Live", "frozenMillis": 12, "sizeBytes": 1024, "files": 3,
                "takenAt": "2026-11-24T11:00:00Z", "readyAt": "2026-11-24T11:00:01Z",
                "image": {"reference": "docker.io/library/busybox:1.36", "digest": "sha256:00"},
                "conditions": [{"type": "Ready", "status": "True", "reason": "SnapshotReady", "message": "",
                    "lastTransitionTime": "2026-11-24T11:00:01Z"}],
            },
        });
        self.snapshots().patch_status(name, &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await.unwrap();
        numbered
    }

    async fn delete(&self, name: &str) {
        self.cluster.bots().delete(name, &DeleteParams::default()).await.unwrap();
    }

    /// Deletes it, and it is gone at once, whoever held it.
    async fn vanish(&self, name: &str) {
        self.delete(name).await;
        let none = json!({"metadata": {"finalizers": null}});
        let _ = self.cluster.bots().patch(name, &PatchParams::default(), &Patch::Merge(&none)).await;
    }

    async fn delete_snapshot(&self, name: &str) {
        let _ = self.snapshots().delete(name, &DeleteParams::default()).await.unwrap();
        let none = json!({"metadata": {"finalizers": null}});
        let _ = self.snapshots().patch(name, &PatchParams::default(), &Patch::Merge(&none)).await;
    }

    /// Rows of all four tables and what tells whether one was written anew, for a comparison.
    async fn picture(&self) -> Vec<String> {
        let mut all = Vec::new();
        for table in ["containers", "snapshots", "container_versions", "lifecycle_events"] {
            all.extend(
                self.database
                    .texts(&format!("SELECT '{table} ' || xmin || ' ' || t::text FROM {table} t ORDER BY id"))
                    .await,
            );
        }
        all
    }
}

/// Waits until the mirror has looked at all rows two times more.
async fn looked_twice(controller: &Controller) {
    let before = controller.metric("berth_controller_mirror_resyncs").await;
    eventually("two looks at all rows", Duration::from_secs(20), || async {
        let now = controller.metric("berth_controller_mirror_resyncs").await;
        if now >= before + 2.0 { Ok(()) } else { Err(format!("{now} after {before}")) }
    })
    .await;
}

fn transition(seq: i64, type_: &str) -> Value {
    let at = format!("2026-11-24T{:02}:{:02}:{:02}Z", 10 + seq / 3600, seq / 60 % 60, seq % 60);
    let mut transition = json!({"seq": seq, "type": type_, "at": at});
    if type_ == "exited" {
        transition["exitCode"] = json!(3);
    }
    transition
}

const EVENTS: &str = "SELECT event_type FROM lifecycle_events ORDER BY created_at, seq";
const NODE: &str = "node-1";

fn room() -> Value {
    json!({"cpu": "64", "memory": "64Gi", "bots": "1000"})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bots_rows_are_what_its_objects_say_from_its_first_to_its_last() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let controller = scene.controller().await;
    let _agent = cluster.agent(NODE, room()).await;
    let bot = scene.bot("web", json!({"botId": BOT_ID, "data": {"path": "/work"}})).await;
    let id = format!("{}.{BOT_ID}", cluster.namespace);
    database.gives("SELECT status FROM containers", &["created"]).await;
    assert_eq!(database.texts("SELECT container_id FROM containers").await, std::slice::from_ref(&id));

    scene.says("web", "Running", &["scheduled", "pulled", "created", "started"]).await;
    database.gives("SELECT status FROM containers", &["running"]).await;
    // The query of a program that never heard of Berth.
    let old = "SELECT concat_ws('|', bot_id, container_name, image, namespace, auto_start, container_path,
                      last_started_at AT TIME ZONE 'UTC', last_stopped_at) FROM containers";
    let wanted =
        format!("{BOT_ID}|web|docker.io/library/busybox:1.36|{}|t|/work|2026-11-24 10:00:04", cluster.namespace);
    assert_eq!(database.texts(old).await, [wanted]);
    let own = "SELECT concat_ws('|', object_uid, node_name, runtime_container_id, image_digest, ip, restart_count,
                      conditions -> 0 ->> 'type', generation) FROM containers";
    let uid = bot.uid().unwrap();
    assert_eq!(database.texts(own).await, [format!("{uid}|{NODE}|berth-1|sha256:00|10.208.3.7|2|Scheduled|1")]);
    let live = cluster.bots().get("web").await.unwrap();
    assert_eq!(database.texts("SELECT resource_version FROM containers").await, [live.resource_version().unwrap()]);

    let happened = ["scheduled", "pulled", "created", "started", "exited", "started"];
    scene.says("web", "Running", &happened).await;
    database.gives(EVENTS, &happened).await;
    assert_eq!(database.texts("SELECT payload ->> 'exitCode' FROM lifecycle_events WHERE seq = 5").await, ["3"]);

    scene.delete("web").await;
    let last = ["scheduled", "pulled", "created", "started", "exited", "started", "exited", "deleted"];
    scene.says("web", "Terminating", &last).await;
    cluster.gone("web").await;
    database.gives("SELECT count(*) FROM containers", &["0"]).await;
    assert!(database.texts(EVENTS).await.is_empty(), "no old query sees the dead");
    let events = "SELECT event_type FROM lifecycle_events_history ORDER BY created_at, seq";
    assert_eq!(database.texts(events).await, last);
    let history = "SELECT concat_ws('|', object_uid, container_id, retained, gone_at > now() - interval '1 minute') FROM containers_history";
    assert_eq!(database.texts(history).await, [format!("{uid}|{id}|f|t")]);
    assert_eq!(controller.metric("berth_controller_mirror_errors").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_outlive_their_bot_in_the_old_tables_and_then_go_with_it() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let _controller = scene.controller().await;
    let _agent = cluster.agent(NODE, room()).await;
    let bot = scene.bot("web", json!({"botId": "assistant", "deletionPolicy": "Delete"})).await;
    scene.says("web", "Running", &["scheduled", "pulled", "created", "started"]).await;
    let first = scene.snapshot("web", "one", None).await;
    scene.snapshot("web", "two", Some("before \"the\" upgrade 🚀")).await;
    let versions = "SELECT concat_ws('|', v.version, s.display_name, s.source, s.snapshotter, s.parent_runtime_snapshot_name,
                          s.runtime_snapshot_name = 'berth-v-' || s.id) FROM container_versions v JOIN snapshots s ON s.id = v.snapshot_id
                    JOIN containers c ON c.container_id = v.container_id AND s.container_id = c.container_id ORDER BY v.version";
    let wanted =
        ["1|Version 1|manual|overlayfs|sha256:11|t", "2|before \"the\" upgrade 🚀|manual|overlayfs|sha256:11|t"];
    database.gives(versions, &wanted).await;
    // A botId that is no UUID has one that is always the same.
    let derived = database.texts("SELECT bot_id FROM containers").await;
    assert_eq!(database.texts("SELECT id FROM snapshots WHERE object_name = 'one'").await, [first.uid().unwrap()]);

    // Only versions are left: their snapshots are those of somebody's `Retain`.
    scene.vanish("web").await;
    cluster.gone("web").await;
    database
        .gives(
            "SELECT concat_ws('|', status, container_name, object_uid IS NULL, auto_start) FROM containers",
            &["stopped|web|t|f"],
        )
        .await;
    assert_eq!(database.texts("SELECT bot_id FROM containers").await, derived);
    let gone = "SELECT concat_ws('|', object_uid, retained) FROM containers_history";
    assert_eq!(database.texts(gone).await, [format!("{}|t", bot.uid().unwrap())]);
    let told = ["scheduled", "pulled", "created", "started", "snapshot_create", "snapshot_create", "deleted"];
    assert_eq!(database.texts(EVENTS).await, told);

    // Somebody is this bot again: the same row, the same versions.
    scene.bot("again", json!({"botId": "assistant", "restorePolicy": "Never"})).await;
    database
        .gives(
            "SELECT concat_ws('|', status, container_name, object_uid IS NULL) FROM containers",
            &["created|again|f"],
        )
        .await;
    assert_eq!(database.texts("SELECT version FROM container_versions ORDER BY version").await, ["1", "2"]);
    scene.vanish("again").await;

    scene.delete_snapshot("one").await;
    database.gives("SELECT version FROM container_versions", &["2"]).await;
    database.gives("SELECT object_name FROM snapshots_history", &["one"]).await;
    scene.delete_snapshot("two").await;
    database.gives("SELECT count(*) FROM containers", &["0"]).await;
    for table in ["snapshots", "container_versions", "lifecycle_events"] {
        assert_eq!(database.texts(&format!("SELECT count(*) FROM {table}")).await, ["0"], "{table}");
    }
    assert_eq!(database.texts("SELECT version FROM container_versions_history ORDER BY version").await, ["1", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resync_repairs_what_anybody_changed_and_rewrites_nothing_else() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let controller = scene.controller_at(database.port(), 1).await;
    let _agent = cluster.agent(NODE, room()).await;
    for name in ["a", "b", "c"] {
        scene.bot(name, json!({})).await;
        scene.says(name, "Running", &["scheduled", "pulled", "created", "started"]).await;
        scene.snapshot(name, &format!("{name}-1"), None).await;
        scene.snapshot(name, &format!("{name}-2"), None).await;
    }
    database.gives("SELECT count(*) FROM container_versions", &["6"]).await;
    database.gives("SELECT count(*) FROM lifecycle_events", &["18"]).await;
    looked_twice(&controller).await;
    let right = scene.picture().await;
    looked_twice(&controller).await;
    assert_eq!(scene.picture().await, right, "rows that were right were rewritten");

    let content = |picture: &[String]| -> Vec<String> {
        // Without the transaction that wrote it, which is the last but for the row's own count.
        picture
            .iter()
            .map(|row| row.split_once(' ').unwrap().1.split_once(' ').unwrap().1.rsplit_once(',').unwrap().0.to_owned())
            .collect()
    };
    let a = "(SELECT container_id FROM containers WHERE object_name = 'a')";
    for spoiled in [
        "UPDATE containers SET status = 'error' WHERE object_name = 'a'".to_owned(),
        "UPDATE containers SET hash = 0 WHERE object_name = 'a'".to_owned(),
        "UPDATE containers SET id = gen_random_uuid() WHERE object_name = 'a'".to_owned(),
        // Changed and changed back: right again, but not known to be.
        "UPDATE containers SET image = image WHERE object_name = 'b'".to_owned(),
        "UPDATE snapshots SET display_name = 'mine' WHERE object_name = 'a-1'".to_owned(),
        "BEGIN; DELETE FROM container_versions WHERE version = 1; DELETE FROM snapshots WHERE object_name LIKE '%-1'; COMMIT".to_owned(),
        format!("BEGIN; UPDATE container_versions SET version = 3 - version WHERE container_id = {a}; COMMIT"),
        "DELETE FROM container_versions".to_owned(),
        format!("INSERT INTO container_versions SELECT gen_random_uuid(), container_id, snapshot_id, 90 + version, now() FROM container_versions WHERE container_id = {a}"),
        "INSERT INTO snapshots SELECT gen_random_uuid(), container_id, 'x', 'x', 'x', 'x', 'x', now(), 'x', 'x', NULL, NULL, NULL, NULL, 1, 1, 1, NULL, NULL, '[]', 1, 1, 0 FROM containers WHERE object_name = 'a'".to_owned(),
        "DELETE FROM lifecycle_events WHERE event_type = 'pulled'".to_owned(),
        "UPDATE lifecycle_events SET payload = '{\"mine\": 1}' WHERE event_type = 'started'".to_owned(),
        "UPDATE lifecycle_events SET seq = 70, last_seq = 70 WHERE event_type = 'created'".to_owned(),
        "UPDATE lifecycle_events SET container_id = 'x.y' WHERE event_type = 'created'".to_owned(),
        "DELETE FROM lifecycle_events WHERE event_type = 'snapshot_create'".to_owned(),
        "INSERT INTO lifecycle_events SELECT gen_random_uuid(), container_id, 'mine', '{}', now(), object_uid, 90, 90 FROM containers WHERE object_name = 'a'".to_owned(),
        "INSERT INTO containers SELECT gen_random_uuid(), bot_id, 'nobody.s', 'x', 'x', 'running', 'x', true, '/', now(), now(), NULL, NULL, NULL, 'x', 'x', 'x', NULL, NULL, NULL, NULL, NULL, 0, NULL, NULL, '[]', 1, 1, 1, 0, 1, 0, 0, 0 FROM containers LIMIT 1".to_owned(),
        "BEGIN; DELETE FROM container_versions; DELETE FROM snapshots; DELETE FROM containers; DELETE FROM lifecycle_events; COMMIT".to_owned(),
        "DELETE FROM berth_mirror".to_owned(),
    ] {
        database.run(&spoiled).await;
        eventually(&format!("the repair of {spoiled}"), Duration::from_secs(20), || async {
            let now = scene.picture().await;
            if content(&now) == content(&right) { Ok(()) } else { Err(format!("{now:#?}\nin place of {right:#?}")) }
        })
        .await;
    }
    looked_twice(&controller).await;
    let again = scene.picture().await;
    looked_twice(&controller).await;
    assert_eq!(scene.picture().await, again, "after the repairs all is quiet");
}

/// How many bots' worth of news the database must have missed before anybody is told: seconds.
async fn told(scene: &Scene, reason: &str) -> Vec<String> {
    let (_, lease) = scene.cluster.leader_lease();
    scene.cluster.events(berth::api::SYSTEM_NAMESPACE, lease, reason).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_costs_no_bot_and_what_it_missed_is_written_once() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let relay = Relay::start(database.port()).await;
    relay.set(Mode::Cut);
    let controller = scene.controller_at(relay.port(), 600).await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("web", json!({})).await;
    scene.says("web", "Running", &["scheduled", "pulled", "created", "started"]).await;
    eventually("an Event about the lag", Duration::from_secs(30), || async {
        let events = told(&scene, "MirrorLags").await;
        if events.is_empty() { Err("none".to_owned()) } else { Ok(events) }
    })
    .await;
    assert!(controller.metric("berth_controller_mirror_lag_seconds").await >= 10.0);
    assert_eq!(controller.metric("berth_controller_mirror_connected").await, 0.0);
    relay.set(Mode::Pass);
    database.gives("SELECT status FROM containers", &["running"]).await;
    eventually("that it caught up", Duration::from_secs(30), || async {
        let events = told(&scene, "MirrorCaughtUp").await;
        if events.len() == 1 { Ok(()) } else { Err(format!("{events:?}")) }
    })
    .await;
    assert_eq!(controller.metric("berth_controller_mirror_lag_seconds").await, 0.0);

    // In the middle of the work: cut, hung, slow, and with answers that do not arrive.
    let mut happened = vec!["scheduled", "pulled", "created", "started"];
    let slow = Mode::Slow(Duration::from_millis(300));
    for (i, mode) in [Mode::Cut, Mode::Hang, Mode::HangAnswers, slow].into_iter().enumerate() {
        relay.set(mode);
        happened.extend(["exited", "started"]);
        scene.says("web", "Running", &happened).await;
        scene.bot(&format!("other-{i}"), json!({})).await;
        if mode == slow {
            database.gives(EVENTS, &happened).await;
            relay.set(Mode::Pass);
        } else {
            // Nobody waits for the database: a bot is bound at once.
            eventually("that the mirror noticed", Duration::from_secs(60), || async {
                let up = controller.metric("berth_controller_mirror_connected").await;
                if up == 0.0 { Ok(()) } else { Err("it has a session".to_owned()) }
            })
            .await;
            relay.set(Mode::Pass);
            database.gives(EVENTS, &happened).await;
        }
        database.gives("SELECT count(*) FROM containers", &[&(i + 2).to_string()]).await;
        eventually("a session", Duration::from_secs(30), || async {
            let up = controller.metric("berth_controller_mirror_connected").await;
            if up == 1.0 { Ok(()) } else { Err("there is none".to_owned()) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_refuses_says_why_and_is_caught_up_with_by_itself() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let name = database.texts("SELECT current_database()").await.remove(0);
    // Somebody else's tables of these names.
    database.run("CREATE TABLE containers (mine int)").await;
    let controller = scene.controller().await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("web", json!({})).await;
    let failed = |reason: &'static str| {
        let controller = &controller;
        async move {
            let metric = format!("berth_controller_mirror_errors_total{{reason=\"{reason}\"}}");
            eventually(reason, Duration::from_secs(40), || async {
                if controller.metric(&metric).await > 0.0 { Ok(()) } else { Err("not said".to_owned()) }
            })
            .await;
        }
    };
    failed("Schema").await;
    assert_eq!(database.texts("SELECT count(*) FROM containers").await, ["0"], "another's table was touched");
    database.run("DROP TABLE containers").await;
    database.gives("SELECT object_name FROM containers", &["web"]).await;

    // Read-only: sessions that are open, too.
    database.run(&format!("ALTER DATABASE {name} SET default_transaction_read_only = on")).await;
    database
        .run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'berth-controller'")
        .await;
    scene.says("web", "Running", &["scheduled", "pulled", "created", "started"]).await;
    failed("ReadOnly").await;
    database.run(&format!("BEGIN READ WRITE; ALTER DATABASE {name} RESET default_transaction_read_only; COMMIT")).await;
    database.gives("SELECT status FROM containers", &["running"]).await;

    // Locked by somebody who forgot to commit.
    let mut other = database.connect().await;
    sqlx::raw_sql("BEGIN; LOCK TABLE containers").execute(&mut other).await.unwrap();
    scene.says("web", "Stopped", &["scheduled", "pulled", "created", "started", "stopped"]).await;
    failed("Busy").await;
    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    database.gives("SELECT status FROM containers", &["stopped"]).await;

    // A row that it does not take holds up no other.
    database.run("ALTER TABLE containers ADD CONSTRAINT mine CHECK (object_name <> 'bad')").await;
    scene.bot("bad", json!({})).await;
    scene.bot("good", json!({})).await;
    database.gives("SELECT object_name FROM containers ORDER BY 1", &["good", "web"]).await;
    failed("Data").await;
    assert!(!told(&scene, "MirrorRefused").await.is_empty());
    database.run("ALTER TABLE containers DROP CONSTRAINT mine").await;
    scene.says("bad", "Running", &["scheduled"]).await;
    database.gives("SELECT object_name FROM containers ORDER BY 1", &["bad", "good", "web"]).await;

    // The tables of a newer Berth.
    database.run("INSERT INTO berth_migrations (version, description, success, checksum, execution_time) VALUES (9999, 'later', true, '', 0); \
                  ALTER TABLE containers ADD COLUMN later text; ALTER TABLE containers_history ADD COLUMN later text").await;
    database
        .run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'berth-controller'")
        .await;
    scene.says("good", "Running", &["scheduled"]).await;
    database.gives("SELECT status FROM containers WHERE object_name = 'good'", &["running"]).await;
    scene.vanish("good").await;
    database.gives("SELECT object_name FROM containers_history", &["good"]).await;
}

/// A small disk of its own.
struct Disk(std::path::PathBuf);

impl Disk {
    fn new(size: &str) -> Self {
        let dir = postgres::root().join("disk");
        std::fs::create_dir_all(&dir).unwrap();
        let options = format!("size={size},mode=0755");
        let done =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &options, "berth-test"]).arg(&dir).status();
        assert!(done.unwrap().success());
        Self(dir)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_whose_disk_is_full_is_caught_up_with_when_it_has_room() {
    let disk = Disk::new("128m");
    let port = postgres::start(&disk.0.join("pg"), &["-c", "min_wal_size=32MB", "-c", "max_wal_size=48MB"]);
    let database = Database::of(port);
    drop(database.connect().await);
    let scene = Scene { cluster: Cluster::turn().await, database };
    let controller = scene.controller().await;
    let _agent = scene.cluster.agent(NODE, room()).await;
    scene.bot("web", json!({})).await;
    scene.database.gives("SELECT object_name FROM containers", &["web"]).await;
    let ballast = disk.0.join("ballast");
    let filled = std::process::Command::new("dd")
        .args(["if=/dev/zero", "bs=64k"])
        .arg(format!("of={}", ballast.display()))
        .output();
    assert!(!filled.unwrap().status.success(), "there was room for all of it");
    let message = "x".repeat(30_000);
    let failed = "berth_controller_mirror_errors";
    let mut seq = 0;
    eventually("that the disk is full", Duration::from_secs(60), || {
        seq += 1;
        let (scene, controller, message) = (&scene, &controller, format!("{seq} {message}"));
        async move {
            scene.says_more("web", "Running", vec![transition(1, "scheduled")], &message).await;
            if controller.metric(failed).await > 0.0 { Ok(()) } else { Err("it takes all".to_owned()) }
        }
    })
    .await;
    scene.bot("other", json!({})).await;
    std::fs::remove_file(&ballast).unwrap();
    scene.database.gives("SELECT object_name FROM containers ORDER BY 1", &["other", "web"]).await;
    let last = scene.cluster.bots().get("web").await.unwrap().resource_version().unwrap();
    scene.database.gives("SELECT resource_version FROM containers WHERE object_name = 'web'", &[&last]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_stopped_and_goes_on_writes_nothing_old() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let relay = Relay::start(database.port()).await;
    let first = scene.controller_at(relay.port(), 600).await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("web", json!({})).await;
    database.gives("SELECT status FROM containers", &["created"]).await;
    let second = scene.controller().await;
    // What the first one writes is on its way while it is stopped, and arrives when the second one has written.
    relay.set(Mode::Hang);
    scene.says("web", "Running", &["scheduled", "pulled", "created", "started"]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    first.signal("STOP");
    eventually("the second to lead", Duration::from_secs(20), || async {
        if second.led() { Ok(()) } else { Err("it waits".to_owned()) }
    })
    .await;
    scene.says("web", "Stopped", &["scheduled", "pulled", "created", "started", "stopped"]).await;
    database.gives("SELECT status FROM containers", &["stopped"]).await;
    let right = scene.picture().await;
    relay.set(Mode::Pass);
    tokio::time::sleep(Duration::from_millis(500)).await;
    first.signal("CONT");
    let (lease, name) = cluster.leader_lease();
    let holder = lease.get(name).await.unwrap().spec.unwrap().holder_identity;
    eventually("the first one to see that it leads no more", Duration::from_secs(20), || async {
        let log = first.log();
        if log.contains("leads no more") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_eq!(lease.get(name).await.unwrap().spec.unwrap().holder_identity, holder);
    assert_eq!(scene.picture().await, right);
    assert_eq!(database.texts("SELECT term FROM berth_mirror").await, ["2"]);
    // And it leads again when it is its turn.
    drop(second);
    scene.says("web", "Running", &["scheduled", "pulled", "created", "started", "stopped", "started"]).await;
    database.gives("SELECT status FROM containers", &["running"]).await;
    let happened = ["scheduled", "pulled", "created", "started", "stopped", "started"];
    database.gives(EVENTS, &happened).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_killed_between_write_and_answer_tells_everything_once() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let relay = Relay::start(database.port()).await;
    let mut controller = scene.controller_at(relay.port(), 600).await;
    let _agent = cluster.agent(NODE, room()).await;
    let mut happened = vec!["scheduled", "pulled", "created", "started"];
    scene.bot("web", json!({"deletionPolicy": "Delete"})).await;
    scene.says("web", "Running", &happened).await;
    database.gives(EVENTS, &happened).await;
    for _ in 0..3 {
        happened.extend(["exited", "started"]);
        relay.set(Mode::HangAnswers);
        scene.says("web", "Running", &happened).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        controller.signal("KILL");
        let _ = controller.ended().await;
        relay.set(Mode::Pass);
        controller = scene.controller_at(relay.port(), 600).await;
        database.gives(EVENTS, &happened).await;
    }
    // The bot goes while nobody looks: its end is told all the same, and once.
    controller.signal("KILL");
    let _ = controller.ended().await;
    scene.vanish("web").await;
    let events = "SELECT event_type FROM lifecycle_events_history ORDER BY seq";
    for _ in 0..2 {
        let _controller = scene.controller().await;
        happened.truncate(10);
        happened.push("deleted");
        database.gives(events, &happened).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_while_nobody_looked_is_counted() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let controller = scene.controller().await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("web", json!({})).await;
    let happened = |from: i64, to: i64| (from..=to).map(|seq| transition(seq, "started")).collect::<Vec<_>>();
    scene.says_more("web", "Running", happened(1, 5), "").await;
    database.gives("SELECT count(*) FROM lifecycle_events", &["5"]).await;
    drop(controller);
    // The agent forgets what is older than 32.
    scene.says_more("web", "Running", happened(41, 72), "").await;
    let _controller = scene.controller().await;
    database
        .gives(
            "SELECT payload FROM lifecycle_events WHERE event_type = 'lost'",
            &["{\"count\": 35, \"lastSeq\": 40, \"firstSeq\": 6}"],
        )
        .await;
    database.gives("SELECT count(*) FROM lifecycle_events", &["38"]).await;
    scene.says_more("web", "Running", happened(42, 73), "").await;
    database.gives("SELECT max(seq) FROM lifecycle_events", &["73"]).await;
    database.gives("SELECT count(*) FROM lifecycle_events", &["39"]).await;
    // From nothing: what is older than the object tells is lost as well.
    database.run("DELETE FROM lifecycle_events; DELETE FROM containers").await;
    drop(_controller);
    let _controller = scene.controller().await;
    database.gives("SELECT payload ->> 'count' FROM lifecycle_events WHERE event_type = 'lost'", &["41"]).await;
}

/// Order is that of the numbers; a time is what a clock said, and clocks of nodes are set back and start at 1970.
#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_jump_change_no_order_and_lose_nothing() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let controller = scene.controller().await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("web", json!({})).await;
    let times = [
        "2026-11-24T12:00:00Z",
        "2026-11-24T11:00:00Z",
        "8999-12-31T23:59:59Z",
        "1970-01-01T00:00:00Z",
        "0001-01-01T00:00:00Z",
    ];
    let happened = |to: usize| -> Vec<Value> {
        let at = |(i, at): (usize, &&str)| json!({"seq": i + 1, "type": "started", "at": at});
        times[..to].iter().enumerate().map(at).collect()
    };
    let told = "SELECT extract(year FROM created_at AT TIME ZONE 'UTC')::text FROM lifecycle_events ORDER BY seq";
    for to in 1..=times.len() {
        scene.says_more("web", "Running", happened(to), "").await;
        database.gives(told, &["2026", "2026", "8999", "1970", "1"][..to]).await;
    }
    // Whoever leads next has them as they are.
    let before = scene.picture().await;
    drop(controller);
    let controller = scene.controller_at(database.port(), 1).await;
    looked_twice(&controller).await;
    assert_eq!(scene.picture().await, before);
    // Its end comes last, though the controller's clock is behind the last that was told.
    scene.vanish("web").await;
    database.gives("SELECT event_type FROM lifecycle_events_history ORDER BY seq DESC LIMIT 1", &["deleted"]).await;
    database.gives("SELECT count(*) FROM lifecycle_events_history WHERE superseded", &["0"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_text_that_the_api_server_takes_has_a_row() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let controller = scene.controller().await;
    let _agent = cluster.agent(NODE, room()).await;
    for (i, text) in [
        "it's \"quoted\"",
        "a\0b",
        "🚀\u{202e}\u{feff}",
        "\\u0000 \\x",
        "'; DROP TABLE containers; --",
        &"🦀".repeat(8000),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("bot-{i}");
        scene.bot(&name, json!({})).await;
        scene.says_more(&name, "Running", vec![transition(1, "started")], text).await;
        let wanted = text.replace('\0', "\u{fffd}");
        let sql = format!(
            "SELECT c ->> 'message' FROM containers, jsonb_array_elements(conditions) c WHERE object_name = '{name}' AND c ->> 'type' = 'Ready'"
        );
        database.gives(&sql, &[&wanted]).await;
    }
    let long = format!("{{\"metadata\": {{\"annotations\": {{\"x\": \"{}\"}}}}}}", "y".repeat(200_000));
    let long: Value = serde_json::from_str(&long).unwrap();
    cluster.bots().patch("bot-0", &PatchParams::default(), &Patch::Merge(&long)).await.unwrap();
    let last = cluster.bots().get("bot-0").await.unwrap().resource_version().unwrap();
    database.gives("SELECT resource_version FROM containers WHERE object_name = 'bot-0'", &[&last]).await;
    assert_eq!(controller.metric("berth_controller_mirror_errors").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_right_is_told_and_the_tables_are_made_once_it_is_given() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    database.run("CREATE ROLE weak LOGIN").await;
    let url = database.url(database.port()).replace("berth@", "weak@");
    let controller = cluster.controller_with(&["--database-url", &url]).await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("web", json!({})).await;
    eventually("Denied", Duration::from_secs(20), || async {
        let denied = controller.metric("berth_controller_mirror_errors_total{reason=\"Denied\"}").await;
        if denied > 0.0 { Ok(()) } else { Err("not said".to_owned()) }
    })
    .await;
    database.run("GRANT CREATE ON SCHEMA public TO weak").await;
    database.gives("SELECT object_name FROM containers", &["web"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_trusted_only_with_the_certificate_that_was_asked_for() {
    let dir = postgres::root().join("tls");
    std::fs::create_dir_all(&dir).unwrap();
    let openssl = |arguments: &str| {
        let done = std::process::Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(&dir)
            .output()
            .unwrap();
        assert!(done.status.success(), "openssl {arguments}: {done:?}");
    };
    for name in ["right", "wrong"] {
        openssl(&format!(
            "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name} -keyout {name}.key -out {name}.crt"
        ));
    }
    openssl(
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
             -addext basicConstraints=critical,CA:FALSE -CA right.crt -CAkey right.key -keyout server.key -out server.crt",
    );
    // The server wants its key for itself alone, as whoever it runs as.
    let (key, crt) = (dir.join("pg/server.key"), dir.join("server.crt"));
    std::fs::create_dir_all(dir.join("pg")).unwrap();
    let installed = std::process::Command::new("install")
        .args(["-m", "0600", "-o", "postgres"])
        .arg(dir.join("server.key"))
        .arg(&key)
        .status();
    assert!(installed.unwrap().success());
    let (cert, key) = (format!("ssl_cert_file={}", crt.display()), format!("ssl_key_file={}", key.display()));
    let port = postgres::start(&dir.join("pg"), &["-c", "ssl=on", "-c", &cert, "-c", &key]);
    let database = Database::of(port);
    drop(database.connect().await);
    let scene = Scene { cluster: Cluster::turn().await, database };
    let _agent = scene.cluster.agent(NODE, room()).await;
    let url = |name: &str| {
        format!(
            "postgres://berth@localhost:{port}/berth?sslmode=verify-full&sslrootcert={}",
            dir.join(format!("{name}.crt")).display()
        )
    };
    {
        let controller = scene.cluster.controller_with(&["--database-url", &url("wrong")]).await;
        scene.bot("web", json!({})).await;
        eventually("Unreachable", Duration::from_secs(20), || async {
            let log = controller.log();
            if log.contains("reason=\"Unreachable\"") && log.contains("certificate") { Ok(()) } else { Err(log) }
        })
        .await;
    }
    let _controller = scene.cluster.controller_with(&["--database-url", &url("right")]).await;
    scene.database.gives("SELECT object_name FROM containers", &["web"]).await;
    let encrypted =
        "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'berth-controller'";
    assert_eq!(scene.database.texts(encrypted).await, ["true"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_query_in_the_documents_runs_and_finds_what_it_is_for() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let _controller = scene.controller().await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("web", json!({"botId": "web"})).await;
    scene.says("web", "Running", &["scheduled", "pulled", "created", "started"]).await;
    scene.snapshot("web", "one", None).await;
    scene.bot("ill", json!({})).await;
    scene.says("ill", "BackOff", &["scheduled", "pulled", "created", "started", "exited"]).await;
    scene.bot("gone", json!({"deletionPolicy": "Delete"})).await;
    database.gives("SELECT count(*) FROM containers", &["3"]).await;
    scene.delete("gone").await;
    scene.says("gone", "Terminating", &["scheduled", "deleted"]).await;
    database.gives("SELECT count(*) FROM containers_history", &["1"]).await;
    database.gives("SELECT count(*) FROM lifecycle_events", &["10"]).await;
    let mut found = 0;
    for document in ["README.md", "docs/mirror.md"] {
        let text = std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(document)).unwrap();
        for block in text.split("```sql").skip(1) {
            let query =
                block.split("```").next().unwrap().replace("default.web", &format!("{}.web", cluster.namespace));
            if query.trim_start().starts_with("SELECT") {
                let rows = database.texts(&format!("SELECT row(q.*) FROM ({query}) q")).await;
                assert!(!rows.is_empty(), "{document}: {query} finds nothing");
            } else {
                database.run(&query).await;
            }
            found += 1;
        }
    }
    assert!(found >= 6, "{found} queries only: the reading of the documents is broken");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_objects_with_one_bot_id_the_row_is_the_holders() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let controller = scene.controller_at(database.port(), 1).await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("one", json!({"botId": BOT_ID, "deletionPolicy": "Delete"})).await;
    scene.says("one", "Running", &["scheduled"]).await;
    cluster.bot("two", json!({"botId": BOT_ID})).await;
    cluster.condition("two", "Ready", "False", "BotIdInUse").await;
    looked_twice(&controller).await;
    assert_eq!(database.texts("SELECT concat_ws('|', object_name, status) FROM containers").await, ["one|running"]);
    assert!(database.texts("SELECT object_name FROM containers_history").await.is_empty());
    scene.delete("one").await;
    scene.says("one", "Terminating", &["scheduled", "deleted"]).await;
    cluster.gone("one").await;
    database.gives("SELECT object_name FROM containers", &["two"]).await;
    database.gives("SELECT object_name FROM containers_history", &["one"]).await;
}

/// What happened after the backup is of a future that is no more: rows are what the cluster says now, and nothing is lost or twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_restored_from_yesterdays_backup_counts() {
    for restarted in [false, true] {
        let name = if restarted { "restored-and-restarted" } else { "restored" };
        let scene = Scene { cluster: Cluster::own(name).await, database: Database::new().await };
        let (cluster, database) = (&scene.cluster, &scene.database);
        let mut controller = scene.controller().await;
        let agent = cluster.agent(NODE, room()).await;
        for bot in ["stays", "goes"] {
            scene.bot(bot, json!({"deletionPolicy": "Delete"})).await;
            scene.says(bot, "Running", &["scheduled", "pulled", "created", "started"]).await;
        }
        let kept = scene.snapshot("stays", "one", None).await;
        database.gives("SELECT count(*) FROM lifecycle_events", &["9"]).await;
        cluster.back_up("yesterday").await;

        scene.says("stays", "Paused", &["scheduled", "pulled", "created", "started", "paused"]).await;
        scene.snapshot("stays", "two", None).await;
        scene.delete("goes").await;
        scene.says("goes", "Terminating", &["scheduled", "pulled", "created", "started", "exited", "deleted"]).await;
        cluster.gone("goes").await;
        scene.bot("new", json!({})).await;
        // Far enough for no number to be given again soon.
        for i in 0..40 {
            scene.says_more("new", "Running", vec![transition(1, "scheduled")], &i.to_string()).await;
        }
        database.gives("SELECT object_name FROM containers ORDER BY 1", &["new", "stays"]).await;
        database.gives("SELECT object_name FROM snapshots ORDER BY 1", &["one", "two"]).await;
        let newest = cluster.bots().get("new").await.unwrap().resource_version().unwrap();
        database.gives("SELECT resource_version FROM containers WHERE object_name = 'new'", &[&newest]).await;
        if restarted {
            controller.signal("KILL");
            let _ = controller.ended().await;
        }

        cluster.restore("yesterday").await;
        if restarted {
            controller = scene.controller().await;
        }
        database.gives("SELECT object_name FROM containers ORDER BY 1", &["goes", "stays"]).await;
        database.gives("SELECT status FROM containers ORDER BY object_name", &["running", "running"]).await;
        assert_eq!(database.texts("SELECT id FROM snapshots").await, [kept.uid().unwrap()]);
        let told = "SELECT event_type FROM lifecycle_events e JOIN containers c USING (container_id) WHERE object_name = 'stays' AND e.object_uid = c.object_uid ORDER BY seq";
        database.gives(told, &["scheduled", "pulled", "created", "started"]).await;
        let superseded =
            "SELECT event_type FROM lifecycle_events_history WHERE superseded ORDER BY created_at, event_type";
        // What the future told is kept aside.
        database
            .gives(
                &superseded
                    .replace("event_type FROM", "count(*) > 0 FROM")
                    .replace(" ORDER BY created_at, event_type", ""),
                &["true"],
            )
            .await;
        // Numbers that are given again are other events.
        scene.says("stays", "Stopped", &["scheduled", "pulled", "created", "started", "stopped"]).await;
        database.gives(told, &["scheduled", "pulled", "created", "started", "stopped"]).await;
        assert_eq!(database.texts("SELECT count(*) FROM containers_history WHERE object_name = 'goes'").await, ["0"]);
        let twice = "SELECT count(*) FROM lifecycle_events JOIN lifecycle_events_history USING (id)";
        assert_eq!(database.texts(twice).await, ["0"]);
        drop((controller, agent));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bots_that_lived_and_went_while_the_database_was_away_are_in_the_history() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let relay = Relay::start(database.port()).await;
    let _controller = scene.controller_at(relay.port(), 600).await;
    let _agent = cluster.agent(NODE, room()).await;
    let delete = |name: &'static str, happened: &'static [&'static str]| {
        let scene = &scene;
        async move {
            scene.delete(name).await;
            scene.says(name, "Terminating", happened).await;
            scene.cluster.gone(name).await;
        }
    };
    scene.bot("first", json!({"botId": "web", "deletionPolicy": "Delete"})).await;
    scene.says("first", "Running", &["scheduled"]).await;
    database.gives("SELECT count(*) FROM lifecycle_events", &["1"]).await;
    relay.set(Mode::Cut);
    // The one that has a row goes, two more with its botId come and go, and one stays.
    delete("first", &["scheduled", "started", "deleted"]).await;
    scene.bot("second", json!({"botId": "web", "deletionPolicy": "Delete"})).await;
    delete("second", &["scheduled", "paused", "deleted"]).await;
    scene.bot("alone", json!({"botId": "other", "deletionPolicy": "Delete"})).await;
    delete("alone", &["scheduled", "deleted"]).await;
    scene.bot("third", json!({"botId": "web"})).await;
    scene.says("third", "Running", &["scheduled", "resumed"]).await;
    relay.set(Mode::Pass);
    database.gives("SELECT object_name FROM containers", &["third"]).await;
    database
        .gives(
            "SELECT concat_ws('|', object_name, status, phase, retained) FROM containers_history ORDER BY 1",
            &["alone|stopped|Terminating|f", "first|stopped|Terminating|f", "second|stopped|Terminating|f"],
        )
        .await;
    database.gives(EVENTS, &["scheduled", "resumed"]).await;
    let history = "SELECT concat_ws(' ', h.object_name, e.event_type) FROM lifecycle_events_history e JOIN containers_history h USING (object_uid)
                   ORDER BY h.object_name, e.seq";
    let wanted = [
        "alone scheduled",
        "alone deleted",
        "first scheduled",
        "first started",
        "first deleted",
        "second scheduled",
        "second paused",
        "second deleted",
    ];
    assert_eq!(database.texts(history).await, wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leads_next_tells_nothing_a_second_time() {
    let scene = Scene::new().await;
    let (cluster, database) = (&scene.cluster, &scene.database);
    let mut first = scene.controller().await;
    let second = scene.controller().await;
    let _agent = cluster.agent(NODE, room()).await;
    scene.bot("one", json!({"botId": "web", "deletionPolicy": "Delete"})).await;
    scene.says("one", "Running", &["scheduled", "started"]).await;
    database.gives("SELECT count(*) FROM lifecycle_events", &["2"]).await;
    scene.delete("one").await;
    scene.says("one", "Terminating", &["scheduled", "started", "deleted"]).await;
    cluster.gone("one").await;
    database.gives("SELECT count(*) FROM lifecycle_events_history", &["3"]).await;
    scene.bot("two", json!({"botId": "web"})).await;
    scene.says("two", "Running", &["scheduled"]).await;
    database.gives(EVENTS, &["scheduled"]).await;
    let before =
        (scene.picture().await, database.texts("SELECT t::text FROM lifecycle_events_history t ORDER BY id").await);
    first.signal("KILL");
    let _ = first.ended().await;
    database.gives("SELECT term FROM berth_mirror", &["2"]).await;
    eventually("the second one to have looked at all rows", Duration::from_secs(20), || async {
        let looks = second.metric("berth_controller_mirror_resyncs").await;
        if looks > 0.0 { Ok(()) } else { Err(second.log()) }
    })
    .await;
    let after =
        (scene.picture().await, database.texts("SELECT t::text FROM lifecycle_events_history t ORDER BY id").await);
    assert_eq!(after, before);
}
