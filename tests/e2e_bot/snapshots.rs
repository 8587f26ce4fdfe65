//! BotSnapshots: taken of a bot in whatever state, numbered, read back, gone back to, kept and forked.

use std::path::PathBuf;
use std::process::Command;

use berth::api::bot_container::{DeletionPolicy, Phase, RestoreFrom, RestorePolicy};
use berth::api::bot_node::OrphanedLayer;
use berth::api::bot_snapshot::{ChangeKind, Consistency, Export, SnapshotPhase, SnapshotSource, Taken};
use berth::api::condition::{ConditionType, find};
use berth::api::{BotContainer, BotNode, BotRecord, BotSnapshot, BotSnapshotSpec, BotSnapshotStatus};
use berth::layer::{Copiers, Job, Said};
use k8s_openapi::api::events::v1::Event;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::common::{Namespace, SOON, bot, run, summary, wait_for};
use crate::images::push_another;
use crate::stage::{Stage, WAIT, life, message, page, path_in, pid, read_in, says, status, uid};

impl Stage {
    /// Asks for a live snapshot.
    async fn ask(&self, name: &str, of: &str) -> BotSnapshot {
        self.ask_for(name, BotSnapshotSpec::of(of)).await
    }

    async fn ask_for(&self, name: &str, spec: BotSnapshotSpec) -> BotSnapshot {
        self.ns.snapshots().create(&PostParams::default(), &BotSnapshot::new(name, spec)).await.unwrap()
    }

    /// Takes a snapshot, and waits until it is Ready.
    async fn taken(&self, name: &str, of: &str) -> BotSnapshot {
        self.ask(name, of).await;
        self.ns.snapshot(name, SnapshotPhase::Ready).await
    }

    /// Where the files of a version are that the layer itself has.
    fn files_of(&self, snapshot: &BotSnapshot) -> PathBuf {
        self.files_in(told(snapshot).runtime_name.as_deref().unwrap())
    }

    fn files_in(&self, name: &str) -> PathBuf {
        let key = format!("{name}.test");
        let mounts = self.agent.ctr(["snapshots", "view", "--mounts", "--target", "/x", &key, name]);
        // Nothing holds the view: containerd's collector may be quicker.
        let lower = mounts.split("lowerdir=").nth(1).unwrap_or_else(|| panic!("no lowerdir: {mounts}"));
        lower.split([':', ' ', ',']).next().unwrap().into()
    }
}

#[track_caller]
fn told(snapshot: &BotSnapshot) -> &BotSnapshotStatus {
    snapshot.status.as_ref().unwrap_or_else(|| panic!("no status"))
}

#[track_caller]
fn reason(snapshot: &BotSnapshot) -> (&str, &str, &str) {
    let ready = find(&told(snapshot).conditions, ConditionType::Ready).unwrap_or_else(|| panic!("no Ready"));
    (&ready.status, &ready.reason, &ready.message)
}

/// Writes a file into a running bot.
fn write_in(bot: &BotContainer, path: &str, text: &str) {
    let path = path_in(bot, path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_bot_is_snapshotted_without_being_ended() {
    let stage = Stage::set("snap-live").await;
    let bot = stage.runs(bot("web")).await;
    let began = life(pid(&bot));
    write_in(&bot, "/data/a/one", "1");
    write_in(&bot, "/etc/of-the-bot", "kept too");

    let first = stage.taken("first", "web").await;
    let s = told(&first);
    assert_eq!((s.version, s.source, s.taken), (Some(1), Some(SnapshotSource::Manual), Some(Taken::Live)));
    assert_eq!((s.bot_id.clone(), s.bot_uid.clone()), (Some(uid(&bot)), Some(uid(&bot))));
    assert_eq!(s.node_name.as_deref(), Some(stage.agent.node()));
    assert_eq!(s.image.as_ref().map(|i| &i.reference), status(&bot).image.as_ref().map(|i| &i.reference));
    assert!(s.frozen_millis.is_some_and(|ms| (0..1000).contains(&ms)), "{s:?}");
    assert!(s.size_bytes.is_some_and(|bytes| bytes > 0) && s.files.is_some_and(|n| n >= 2), "{s:?}");
    assert!(s.taken_at <= s.ready_at && s.taken_at.is_some());
    assert_eq!(find(&s.conditions, ConditionType::Verified).map(|c| c.status.as_str()), Some("True"));
    assert_eq!(life(pid(&bot)), began, "the bot was ended");
    let files = stage.files_of(&first);
    assert_eq!(std::fs::read_to_string(files.join("data/a/one")).unwrap(), "1");
    assert_eq!(std::fs::read_to_string(files.join("etc/of-the-bot")).unwrap(), "kept too");

    // The second holds what changed, says so, and does not stand on the first.
    write_in(&bot, "/data/a/one", "changed");
    write_in(&bot, "/data/b", "new");
    std::fs::remove_file(path_in(&bot, "/etc/of-the-bot")).unwrap();
    let second = stage.taken("second", "web").await;
    let (one, two) = (told(&first), told(&second));
    assert_eq!((two.version, &two.parent), (Some(2), &one.parent), "the chain grows");
    let changes = two.changes.clone().unwrap();
    let said = |path: &str| changes.paths.iter().find(|c| c.path == path).map(|c| c.change);
    assert_eq!(said("/data/a/one"), Some(ChangeKind::Modified), "{changes:?}");
    assert_eq!(said("/data/b"), Some(ChangeKind::Added), "{changes:?}");
    assert_eq!(said("/etc/of-the-bot"), Some(ChangeKind::Removed), "{changes:?}");
    assert_eq!(std::fs::read_to_string(files.join("data/a/one")).unwrap(), "1", "a version never changes");
    // All of it on the node, for people.
    let diff = Command::new(env!("CARGO_BIN_EXE_berth"))
        .args(["diff", &format!("{}/first", stage.ns.name()), &format!("{}/second", stage.ns.name())])
        .env("BERTH_STATE_DIR", stage.agent.env("BERTH_STATE_DIR"))
        .output()
        .unwrap();
    let told_all = String::from_utf8(diff.stdout).unwrap();
    assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stderr));
    for line in ["Modified /data/a/one\n", "Added    /data/b\n", "Removed  /etc/of-the-bot\n"] {
        assert!(told_all.contains(line), "{told_all}");
    }
    let bot = stage.ns.until("web", "lastVersion 2", SOON, |bot| status(bot).last_version == Some(2)).await;
    assert_eq!(status(&bot).current_version, None);
    assert_eq!(life(pid(&bot)), began);
    let debts = PathBuf::from(stage.agent.env("BERTH_RUN_DIR")).join("frozen");
    assert_eq!(std::fs::read_dir(debts).unwrap().count(), 0, "a freeze is noted that is over");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_are_given_once_and_never_again() {
    let stage = Stage::set("snap-versions").await;
    stage.runs(bot("web")).await;
    for n in 0..10 {
        stage.ask(&format!("s{n}"), "web").await;
    }
    let mut versions = Vec::new();
    for n in 0..10 {
        let ready = stage.ns.snapshot(&format!("s{n}"), SnapshotPhase::Ready).await;
        versions.push((told(&ready).version.unwrap(), ready.name_any()));
    }
    versions.sort_unstable();
    assert!(versions.iter().map(|(version, _)| *version).eq(1..=10), "{versions:?}");
    // Neither the newest nor any other number comes back.
    for (_, name) in &versions[8..] {
        stage.ns.snapshots().delete(name, &DeleteParams::default()).await.unwrap();
        stage.ns.no_snapshot(name).await;
    }
    assert_eq!(told(&stage.taken("next", "web").await).version, Some(11));
    let record: Api<BotRecord> = stage.ns.api();
    let records = record.list(&ListParams::default()).await.unwrap().items;
    assert_eq!(records.iter().map(|r| r.spec.last_version).collect::<Vec<_>>(), [11]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_is_snapshotted_in_whatever_state_it_is() {
    let stage = Stage::set("snap-states").await;
    stage.runs(bot("web")).await;
    let paused = stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    let frozen = stage.taken("paused", "web").await;
    assert_eq!((told(&frozen).taken, told(&frozen).frozen_millis), (Some(Taken::Paused), Some(0)));
    assert_eq!(life(pid(&paused)), life(pid(&stage.ns.ready("web", SOON).await)), "its memory was to be kept");
    stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    assert_eq!(told(&stage.taken("stopped", "web").await).taken, Some(Taken::Stopped));

    // Stop, copy, start: another process, the same address, no restart counted.
    let before = stage.edited("web", json!({"operatingMode": "Running"}), Phase::Running).await;
    let began = life(pid(&before));
    let spec = BotSnapshotSpec { consistency: Consistency::Stopped, ..BotSnapshotSpec::of("web") };
    stage.ask_for("cold", spec).await;
    let cold = stage.ns.snapshot("cold", SnapshotPhase::Ready).await;
    assert_eq!((told(&cold).taken, told(&cold).frozen_millis), (Some(Taken::Stopped), Some(0)));
    // So quick that its status never said that it was stopped.
    let another = |bot: &BotContainer| status(bot).task.is_some() && status(bot).task != status(&before).task;
    stage.ns.until("web", "another process", SOON, another).await;
    let after = stage.ns.ready("web", SOON).await;
    assert_ne!(began, life(pid(&after)));
    assert_eq!(status(&before).network, status(&after).network);
    assert_eq!(status(&after).restart_count, Some(0), "{}", summary(&after));

    // In back-off there is a layer as well.
    stage.apply(bot("crashes").sh("echo x >/data/x; exit 1")).await;
    stage.ns.phase("crashes", Phase::BackOff, SOON).await;
    assert_eq!(told(&stage.taken("crashed", "crashes").await).version, Some(1));

    // What never gets a bot, or a bot with a layer, fails when its time is over, and says of what.
    let short = |of: &str| BotSnapshotSpec { failure_deadline_seconds: 2, ..BotSnapshotSpec::of(of) };
    stage.apply(bot("unborn").image("127.0.0.1:1/none:1")).await;
    stage.ask_for("of-nobody", short("nobody")).await;
    stage.ask_for("of-unborn", short("unborn")).await;
    let failed = stage.ns.snapshot("of-nobody", SnapshotPhase::Failed).await;
    assert_eq!((reason(&failed).1, told(&failed).version), ("BotNotFound", None));
    let failed = stage.ns.snapshot("of-unborn", SnapshotPhase::Failed).await;
    assert_eq!(reason(&failed).1, "DeadlineExceeded");
    assert!(reason(&failed).2.contains("no layer"), "{:?}", reason(&failed));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_brings_the_files_back_and_keeps_what_it_replaces() {
    let stage = Stage::set("snap-rollback").await;
    let web = stage.runs(bot("web").sh(WAIT)).await;
    write_in(&web, "/data/state", "good");
    stage.taken("good", "web").await;
    write_in(&web, "/data/state", "bad");
    write_in(&web, "/data/more", "bad as well");
    let address = status(&web).network.clone();

    let bot = stage.edited("web", json!({"rollback": {"id": "monday", "toVersion": 1}}), Phase::Running).await;
    let bot = stage.ns.ready(&bot.name_any(), SOON).await;
    assert_eq!(read_in(&bot, "/data/state").await, "good");
    assert!(!path_in(&bot, "/data/more").exists());
    let done = status(&bot).rollback.clone().unwrap();
    assert_eq!((done.id.as_str(), done.version, done.replaced_by_version), ("monday", Some(1), Some(2)));
    assert!(done.completed_at.is_some());
    assert_eq!((status(&bot).current_version, &status(&bot).network), (Some(1), &address), "IP kept");
    let kept = stage.ns.snapshots().list(&ListParams::default()).await.unwrap().items;
    let kept = kept.iter().find(|s| told(s).version == Some(2)).unwrap();
    assert_eq!(told(kept).source, Some(SnapshotSource::Rollback));
    let kept = stage.ns.snapshot(&kept.name_any(), SnapshotPhase::Ready).await;
    assert_eq!(std::fs::read_to_string(stage.files_of(&kept).join("data/more")).unwrap(), "bad as well");

    // The same id is not done again, whatever else is edited; a new one repeats it, and forward is a rollback too.
    write_in(&bot, "/data/state", "newer");
    stage.edited("web", json!({"env": [{"name": "A", "value": "b"}]}), Phase::Running).await;
    let bot = stage.ns.ready("web", SOON).await;
    assert_eq!(read_in(&bot, "/data/state").await, "newer");
    let forward = json!({"rollback": {"id": "tuesday", "toVersion": null, "snapshotName": kept.name_any(), "keepReplaced": false}});
    stage.edit("web", forward).await;
    let bot = stage.ns.ready("web", SOON).await;
    assert_eq!(read_in(&bot, "/data/state").await, "bad");
    assert_eq!((status(&bot).last_version, status(&bot).current_version), (Some(2), Some(2)), "{}", summary(&bot));

    // A version that there is not leaves the bot as it is, and says what there is.
    let running = life(pid(&bot));
    stage.edit("web", json!({"rollback": {"id": "never", "toVersion": 7, "snapshotName": null}})).await;
    let bot = stage.says("web", Phase::Running, "RollbackFailed").await;
    assert!(message(&bot, ConditionType::Ready).contains("there is no version 7"), "{}", summary(&bot));
    assert!(message(&bot, ConditionType::Ready).contains("1, 2"), "{}", summary(&bot));
    assert_eq!(life(pid(&bot)), running);
    stage.edit("web", json!({"rollback": null})).await;
    stage.ns.ready("web", SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_bot_leaves_is_kept_and_found_again() {
    let stage = Stage::set("snap-retain").await;
    let before = stage.warmed().await;
    let retain = |name: &str| bot(name).id("the-bot").with(|spec| spec.deletion_policy = DeletionPolicy::Retain);
    let web = stage.runs(retain("web")).await;
    write_in(&web, "/data/state", "to be kept");
    stage.taken("by-hand", "web").await;
    write_in(&web, "/data/state", "to be kept at last");
    stage.ns.delete("web", SOON).await;
    let all = stage.ns.snapshots().list(&ListParams::default()).await.unwrap().items;
    let last = all.iter().find(|s| told(s).source == Some(SnapshotSource::Preserved)).expect("nothing was preserved");
    assert_eq!((told(last).version, told(last).bot_id.as_deref()), (Some(2), Some("the-bot")));
    let last = stage.ns.snapshot(&last.name_any(), SnapshotPhase::Ready).await;
    assert_eq!(find(&told(&last).conditions, ConditionType::Verified).map(|c| c.status.as_str()), Some("True"));

    // Another bot of that botId goes on from it, before its first process runs; numbers go on counting.
    let again = stage.runs(retain("again").sh(&format!("cp /data/state /data/seen; {WAIT}"))).await;
    assert_eq!(read_in(&again, "/data/seen").await, "to be kept at last");
    assert_eq!(says(&again, ConditionType::Restored), Some(("True", "Restored")));
    assert_eq!(status(&again).restored_from.as_ref().map(|from| from.version), Some(2));
    assert_eq!(status(&again).current_version, Some(2));
    assert_eq!(told(&stage.taken("third", "again").await).version, Some(3));
    stage.ns.delete("again", SOON).await;

    // Unless it is told not to.
    let fresh = stage.runs(retain("fresh").with(|spec| spec.restore_policy = RestorePolicy::Never)).await;
    assert!(!path_in(&fresh, "/data/state").exists());
    assert_eq!(status(&fresh).last_version, Some(4));
    // Deleted under Delete, it takes all that there is of the botId along.
    stage.edit("fresh", json!({"deletionPolicy": "Delete"})).await;
    stage.ns.delete("fresh", SOON).await;
    for snapshot in ["by-hand", "third", &last.name_any()] {
        stage.ns.no_snapshot(snapshot).await;
    }
    let records: Api<BotRecord> = stage.ns.api();
    wait_for("the BotRecord gone", SOON, || async {
        match records.get_opt("the-bot").await.unwrap() {
            None => Ok(()),
            Some(record) => Err(format!("{:?}", record.spec)),
        }
    })
    .await;
    stage.agent.nothing_left_since(&before, SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_starts_from_another_bots_version_and_holds_its_bytes() {
    let stage = Stage::set("snap-fork").await;
    let before = stage.warmed().await;
    let web = stage.runs(bot("web")).await;
    write_in(&web, "/data/state", "of web");
    let version = stage.taken("to-fork", "web").await;
    let fork =
        |name: &str| bot(name).with(|spec| spec.restore_from = Some(RestoreFrom { snapshot_name: "to-fork".into() }));
    // One that names a version which is not there yet waits for it.
    stage
        .apply(bot("early").with(|spec| spec.restore_from = Some(RestoreFrom { snapshot_name: "later".into() })))
        .await;
    let early = stage.says("early", Phase::Pending, "RestoreFailed").await;
    assert!(message(&early, ConditionType::Ready).contains("no BotSnapshot later"), "{}", summary(&early));
    for name in ["fork-a", "fork-b"] {
        let fork = stage.runs(fork(name)).await;
        assert_eq!(read_in(&fork, "/data/state").await, "of web");
        write_in(&fork, "/data/state", name);
        let lineage = &status(&fork).lineage;
        let below = lineage.iter().rev().nth(1).unwrap();
        assert_eq!(Some(&below.name), told(&version).runtime_name.as_ref(), "it shares the version: {lineage:?}");
        assert_eq!((below.version, status(&fork).last_version), (Some(1), None), "versions of its own");
    }
    assert_eq!(read_in(&web, "/data/state").await, "of web");
    stage.taken("later", "web").await;
    stage.ns.ready("early", SOON).await;

    // The object goes at once; the bytes with the last fork that stands on them.
    stage.ns.snapshots().delete("to-fork", &DeleteParams::default()).await.unwrap();
    stage.ns.no_snapshot("to-fork").await;
    let name = told(&version).runtime_name.clone().unwrap();
    assert!(stage.agent.ctr(["snapshots", "ls"]).contains(&name));
    let fork_a = stage.ns.bots().get("fork-a").await.unwrap();
    assert_eq!(read_in(&fork_a, "/data/state").await, "fork-a");
    for name in ["fork-a", "fork-b", "early", "web"] {
        stage.ns.delete(name, SOON).await;
    }
    stage.agent.nothing_left_since(&before, SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_takes_what_is_due_once_and_keeps_the_last() {
    let stage = Stage::set("snap-schedule").await;
    let policy = json!({"schedule": "*/5 * * * *", "timeZone": "Europe/Berlin", "keepLast": 2});
    let policy = serde_json::from_value(policy).unwrap();
    stage.runs(bot("web").with(|spec| spec.snapshot_policy = Some(policy))).await;
    stage.taken("by-hand", "web").await;
    let records: Api<BotRecord> = stage.ns.api();
    let record = wait_for("the schedule counts", SOON, || async {
        let all = records.list(&ListParams::default()).await.unwrap().items;
        all.into_iter().find(|r| r.spec.last_scheduled.is_some()).ok_or_else(|| "no lastScheduled".to_owned())
    })
    .await;
    let scheduled = || async {
        let all = stage.ns.snapshots().list(&ListParams::default()).await.unwrap().items;
        let mut all: Vec<_> = all
            .into_iter()
            .filter(|s| s.status.as_ref().is_some_and(|s| s.source == Some(SnapshotSource::Scheduled)))
            .collect();
        all.sort_by_key(|s| told(s).version);
        all
    };
    assert_eq!(scheduled().await.len(), 0, "what was due before there was a schedule was not missed");
    // As if the controller had been away for hours: what it missed is taken once. Three times over.
    for (round, hours) in [5, 4, 3].into_iter().enumerate() {
        let long_ago = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(hours);
        let patch = json!({"spec": {"lastScheduled": long_ago.to_string()}});
        let before = scheduled().await;
        records.patch(&record.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        if round > 0 {
            // The same time is due again, and was taken: nothing is made twice.
            wait_for("the schedule was seen to", SOON, || async {
                let now = records.get(&record.name_any()).await.unwrap().spec.last_scheduled;
                if now == Some(long_ago.to_string()) { Err(format!("{now:?}")) } else { Ok(()) }
            })
            .await;
            let names = |all: &[BotSnapshot]| all.iter().map(|s| s.name_any()).collect::<Vec<_>>();
            let after = scheduled().await;
            assert!(after.len() <= before.len() + 1, "{:?} {:?}", names(&before), names(&after));
            continue;
        }
        wait_for("one that was missed", SOON, || async {
            let all = scheduled().await;
            let ready = all.iter().filter(|s| told(s).phase == Some(SnapshotPhase::Ready)).count();
            if ready == 1 && all.len() == 1 { Ok(()) } else { Err(format!("{ready} of {}", all.len())) }
        })
        .await;
    }
    // More than are to be kept: the oldest goes, and what was taken by hand stays.
    stage.edit("web", json!({"snapshotPolicy": {"schedule": "* * * * *", "keepLast": 1}})).await;
    let long_ago = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(1);
    let patch = json!({"spec": {"lastScheduled": long_ago.to_string()}});
    let first = scheduled().await[0].name_any();
    records.patch(&record.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    stage.ns.no_snapshot(&first).await;
    stage.ns.snapshot("by-hand", SnapshotPhase::Ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_moves_to_another_image_with_its_data_and_back() {
    let stage = Stage::set("snap-image").await;
    let image = |tag: &str| format!("{}/berth/{}:{tag}", stage.cluster.env("BERTH_REGISTRY"), stage.ns.name());
    run(Command::new("images/demo-bot/push").arg(image("1")));
    push_another(&image("2"));
    let web = stage.runs(bot("web").image(image("1"))).await;
    assert!(page(&web).await.starts_with("I am web, started 1 time"));
    write_in(&web, "/data/deep/er/file", "data");
    write_in(&web, "/etc/of-the-bot", "not data");
    let plain = path_in(&web, "/data/deep/er/file");
    std::fs::set_permissions(&plain, std::os::unix::fs::PermissionsExt::from_mode(0o604)).unwrap();
    std::os::unix::fs::chown(&plain, Some(77), Some(88)).unwrap();
    let facts = |path: &PathBuf| {
        use std::os::unix::fs::MetadataExt as _;
        let meta = std::fs::metadata(path).unwrap();
        (meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec(), std::fs::read(path).unwrap())
    };
    let was = facts(&plain);

    stage.edit("web", json!({"image": image("2")})).await;
    let moved = stage.ns.ready("web", SOON).await;
    assert_eq!(status(&moved).phase, Some(Phase::Running), "{}", summary(&moved));
    assert_eq!(status(&moved).image.as_ref().map(|i| i.reference.clone()), Some(image("2")));
    assert!(page(&moved).await.starts_with("Also I am web, started 2 time"), "{}", page(&moved).await);
    assert_eq!(facts(&path_in(&moved, "/data/deep/er/file")), was);
    assert!(!path_in(&moved, "/etc/of-the-bot").exists(), "the layer is another");
    assert_eq!(status(&moved).network, status(&web).network, "IP kept");
    let all = stage.ns.snapshots().list(&ListParams::default()).await.unwrap().items;
    let [before] = all.as_slice() else { panic!("{all:?}") };
    assert_eq!((told(before).version, told(before).source), (Some(1), Some(SnapshotSource::PreImageChange)));
    let kept = stage.files_of(before);
    assert_eq!(std::fs::read_to_string(kept.join("etc/of-the-bot")).unwrap(), "not data");
    let id = status(&moved).container_id.clone().unwrap();
    let layers = stage.agent.ctr(["snapshots", "ls"]);
    assert!(!layers.contains(&format!("{id}.1")), "the old layer is left: {layers}");

    // An image that can't be had leaves the bot as it is.
    let running = life(pid(&moved));
    stage.edit("web", json!({"image": image("none")})).await;
    let told_so = stage.says("web", Phase::Running, "ImageNotFound").await;
    assert_eq!(life(pid(&told_so)), running, "{}", summary(&told_so));
    stage.edit("web", json!({"image": image("2")})).await;
    let bot = stage.ns.ready("web", SOON).await;
    assert_eq!(life(pid(&bot)), running);

    // One on which it can't start: its data is where it was, and comes back with the image.
    write_in(&bot, "/etc/of-the-second", "its own");
    stage.edit("web", json!({"image": image("1"), "command": ["/no/such/program"]})).await;
    stage.ns.phase("web", Phase::BackOff, SOON).await;
    stage.edit("web", json!({"image": image("2"), "command": null})).await;
    let back = stage.ns.ready("web", SOON).await;
    assert_eq!(facts(&path_in(&back, "/data/deep/er/file")), was);
    assert!(path_in(&back, "/etc/of-the-second").exists(), "the very layer that it left");
    assert!(page(&back).await.starts_with("Also I am web"));
}

/// Every fact of a layer, but those that overlayfs notes for itself, and the times of the root, which whoever unpacks it moves, and
/// of whiteouts, which tell nothing.
async fn facts(files: &std::path::Path) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let manifest = dir.path().join("manifest");
    let copiers = Copiers::new(env!("CARGO_BIN_EXE_berth").into(), None);
    let job = Job::Describe { source: files.into(), manifest: manifest.clone(), before: None, lower: vec![] };
    let mut copy = copiers.start(&job).await.unwrap();
    let said = copy.next().await.unwrap();
    assert!(matches!(said, Said::Done(_)), "{said:?}");
    let text = std::fs::read_to_string(manifest).unwrap();
    let line = |line: &str| {
        let mut fact: serde_json::Value = serde_json::from_str(line).unwrap();
        if let Some(attributes) = fact.get_mut("x").and_then(|x| x.as_object_mut()) {
            attributes.retain(|name, _| !name.starts_with("trusted.overlay.") || name.ends_with(".opaque"));
            if attributes.is_empty() {
                fact.as_object_mut().unwrap().remove("x");
            }
        }
        const WHITEOUT: u64 = 0o020_000;
        if fact["p"] == "" || (fact["m"] == WHITEOUT && fact.get("r").is_none()) {
            fact["t"] = json!(null);
        }
        fact.to_string()
    };
    text.lines().map(line).collect()
}

impl Stage {
    /// Waits for what is said of a snapshot's image.
    async fn exported(&self, name: &str, status: &str, reason: &str) -> BotSnapshotStatus {
        wait_for(format!("Exported={status} {reason} of {name}"), SOON, || async {
            let seen = self.ns.snapshots().get(name).await.unwrap();
            let Some(said) = seen.status else { return Err("no status".to_owned()) };
            match find(&said.conditions, ConditionType::Exported) {
                Some(c) if (c.status.as_str(), c.reason.as_str()) == (status, reason) => {
                    assert_eq!(said.observed_generation, seen.metadata.generation);
                    assert_eq!(said.phase, Some(SnapshotPhase::Ready), "a version is Ready with its image or without");
                    Ok(said)
                }
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_becomes_an_image_that_is_pushed_and_run_elsewhere() {
    let stage = Stage::set("snap-export").await;
    let bot = stage.runs(bot("web")).await;
    write_in(&bot, "/data/a/one", "1");
    let script = "cd /data && ln a/one a/same && ln -s ../nowhere a/link && mkfifo a/pipe && mkdir -m 1777 a/deep \
        && dd if=/dev/zero of=a/sparse bs=1 count=1 seek=1000000 && chown 12:34 a/sparse && : > a/old \
        && rm -rf /bin/env /root && mkdir /root && : > /root/tool && chmod 4755 /root/tool";
    let id = status(&bot).container_id.clone().unwrap();
    stage.agent.ctr(["tasks", "exec", "--exec-id", "x", &id, "/bin/sh", "-c", script]);
    // containerd unpacks no time before 1970.
    let at = rustix::fs::Timespec { tv_sec: 2, tv_nsec: 500_000_001 };
    let times = rustix::fs::Timestamps { last_access: at, last_modification: at };
    let flags = rustix::fs::AtFlags::empty();
    rustix::fs::utimensat(rustix::fs::CWD, path_in(&bot, "/data/a/old"), &times, flags).unwrap();
    let xattr = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(path_in(&bot, "/data/a/one"), c"user.mine", b"of\n\0the=bot", xattr).unwrap();

    stage.taken("first", "web").await;
    // Asked for afterwards, and at once.
    let patch = Patch::Merge(json!({"spec": {"export": "OCI", "displayName": "to travel"}}));
    stage.ns.snapshots().patch("first", &PatchParams::default(), &patch).await.unwrap();
    let first = stage.exported("first", "True", "Exported").await;
    stage.ask_for("second", BotSnapshotSpec { export: Export::OCI, ..BotSnapshotSpec::of("web") }).await;
    let second = stage.exported("second", "True", "Exported").await;
    assert!(first.digest.is_some() && first.export_bytes > Some(1_000_000), "{first:?}");
    assert_eq!((&first.digest, first.export_bytes), (&second.digest, second.export_bytes), "same contents, same image");
    let digest = first.digest.clone().unwrap();

    // Elsewhere it is what it was here.
    let image = format!("{}/berth/exported-{}:1", stage.cluster.env("BERTH_REGISTRY"), stage.ns.name());
    stage.agent.ctr(["images", "push", "--plain-http", &image, first.runtime_name.as_ref().unwrap()]);
    let twin = stage.runs(crate::common::bot("twin").image(&image)).await;
    assert_eq!(read_in(&twin, "/data/a/one").await, "1");
    let lineage = &status(&twin).lineage;
    let top = lineage.iter().find(|l| l.kind == "Active").and_then(|l| l.parent.clone()).unwrap();
    let (here, there) = (stage.files_of(&stage.ns.snapshots().get("first").await.unwrap()), stage.files_in(&top));
    assert_eq!(facts(&here).await, facts(&there).await);

    // The image goes with the last version that it was made of.
    let blobs = || stage.agent.ctr(["content", "list", "-q"]);
    for (name, there) in [("first", true), ("second", false)] {
        stage.ns.snapshots().delete(name, &DeleteParams::default()).await.unwrap();
        wait_for(format!("{name} gone"), SOON, || async {
            match stage.ns.snapshots().get_opt(name).await.unwrap() {
                None => Ok(()),
                Some(_) => Err("there".to_owned()),
            }
        })
        .await;
        // Pulled for the twin, it is held by the image's record.
        if !there {
            stage.ns.delete("twin", SOON).await;
            for pulled in stage.agent.ctr(["images", "list", "-q"]).lines().filter(|name| name.contains("exported-")) {
                stage.agent.ctr(["images", "remove", "--sync", pulled]);
            }
        }
        assert_eq!(blobs().contains(&digest), there, "{name}");
    }

    // What an OCI layer has no words for is said, and the version is one all the same.
    write_in(&bot, "/data/.wh.one", "no deletion");
    stage.ask_for("third", BotSnapshotSpec { export: Export::OCI, ..BotSnapshotSpec::of("web") }).await;
    let third = stage.exported("third", "False", "ExportUnsupported").await;
    let said = find(&third.conditions, ConditionType::Exported).unwrap();
    assert!(said.message.contains("/data/.wh.one") && third.digest.is_none(), "{said:?}");
}

impl Stage {
    /// What the BotNode tells of layers without an object, once that is as wanted.
    async fn orphans(&self, what: &str, wanted: impl Fn(&[OrphanedLayer]) -> bool) -> Vec<OrphanedLayer> {
        let api: Api<BotNode> = Api::all(self.ns.client());
        wait_for(format!("orphans: {what}"), SOON, || async {
            let node = api.get(self.agent.node()).await.unwrap();
            let orphans = node.status.map(|status| status.orphans).unwrap_or_default();
            if wanted(&orphans) { Ok(orphans) } else { Err(format!("{orphans:?}")) }
        })
        .await
    }

    /// Waits for an Event on the BotNode with these words.
    async fn node_event(&self, reason: &str, words: &str) {
        let events: Api<Event> = Api::namespaced(self.ns.client(), "default");
        wait_for(format!("an Event {reason} on the BotNode: {words}"), SOON, || async {
            let all = events.list(&ListParams::default()).await.unwrap().items;
            let is_it = |event: &Event| {
                event.reason.as_deref() == Some(reason) && event.note.as_ref().is_some_and(|note| note.contains(words))
            };
            if all.iter().any(is_it) { Ok(()) } else { Err(format!("{} others", all.len())) }
        })
        .await;
    }

    /// `kubectl berth` with the administrator's rights: whether it did what it was told, and what it said.
    fn kubectl_berth(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-berth"));
        let done = command.args(arguments).env("KUBECONFIG", self.cluster.env("KUBECONFIG")).output().unwrap();
        let said = if done.status.success() { done.stdout } else { done.stderr };
        (done.status.success(), String::from_utf8(said).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_bot_keeps_outlives_its_namespace_and_is_adopted_by_another() {
    let stage = Stage::set("snap-adopt").await;
    let doomed = Namespace::create(stage.cluster, "snap-doomed").await;
    let retained = |name: &str| {
        bot(name)
            .id(&format!("{name}-kept"))
            .on(stage.agent.node())
            .with(|s| s.deletion_policy = DeletionPolicy::Retain)
    };
    doomed.apply(retained("web")).await;
    doomed.apply(bot("other").on(stage.agent.node())).await;
    doomed.ready("other", SOON).await;
    let web = doomed.ready("web", SOON).await;
    write_in(&web, "/data/precious", "of the dead");
    doomed.end().await;

    let orphans = stage.orphans("one", |orphans| orphans.len() == 1).await;
    let left = &orphans[0];
    assert_eq!((left.namespace.as_str(), left.bot_container_name.as_str()), (doomed.name(), "web"));
    assert_eq!((left.bot_id.as_str(), left.bot_uid.as_str(), left.version), ("web-kept", uid(&web).as_str(), 1));
    assert_eq!(left.expires_at.0.duration_since(left.left_at.0).as_hours(), 7 * 24);
    stage.node_event("NamespaceTerminating", &left.name).await;

    // Nobody gets it by a name: not a bot of its botId, not a snapshot that says whose it is.
    let stranger = stage.runs(retained("web")).await;
    assert!(!path_in(&stranger, "/data/precious").exists());
    stage.ns.delete("web", SOON).await;
    for snapshot in stage.ns.snapshots().list(&ListParams::default()).await.unwrap().items {
        stage.ns.snapshots().delete(&snapshot.name_any(), &DeleteParams::default()).await.unwrap();
        stage.ns.no_snapshot(&snapshot.name_any()).await;
    }

    // An entry that names nothing is told, and taken out.
    let node: Api<BotNode> = Api::all(stage.ns.client());
    let entry = json!({"orphan": "berth-v-none", "namespace": stage.ns.name(), "snapshotName": "nothing"});
    let patch = Patch::Merge(json!({"spec": {"adopt": [entry]}}));
    node.patch(stage.agent.node(), &PatchParams::default(), &patch).await.unwrap();
    stage.node_event("AdoptionFailed", "berth-v-none is not in status.orphans").await;

    let (ok, table) = stage.kubectl_berth(&["adopt"]);
    assert!(ok && table.contains(&left.name) && table.contains(doomed.name()), "{table}");
    let (ok, said) = stage.kubectl_berth(&["-n", stage.ns.name(), "adopt", "berth-v-none"]);
    assert!(!ok && said.contains("no node has berth-v-none"), "{said}");
    let (ok, said) = stage.kubectl_berth(&["-n", "no-such-namespace", "adopt", &left.name]);
    assert!(!ok && said.contains("no namespace no-such-namespace"), "{said}");
    let (ok, said) = stage.kubectl_berth(&["-n", stage.ns.name(), "adopt", &left.name, "--as", "Bad_Name"]);
    assert!(!ok && said.contains("spec.adopt[0].snapshotName"), "{said}");
    let (ok, said) = stage.kubectl_berth(&["-n", stage.ns.name(), "adopt", &left.name, "--as", "found"]);
    assert!(ok && said.contains("version 1 of botId web-kept"), "{said}");
    let found = stage.ns.snapshot("found", SnapshotPhase::Ready).await;
    let said = told(&found);
    assert_eq!((said.version, said.source), (Some(1), Some(SnapshotSource::Preserved)));
    assert_eq!(find(&said.conditions, ConditionType::Verified).map(|c| c.status.as_str()), Some("True"));
    assert!(said.files > Some(1) && said.taken == Some(Taken::Stopped), "{said:?}");
    stage.orphans("none", <[OrphanedLayer]>::is_empty).await;
    wait_for("no entry that is done", SOON, || async {
        let spec = node.get(stage.agent.node()).await.unwrap().spec;
        if spec.adopt.is_empty() { Ok(()) } else { Err(format!("{:?}", spec.adopt)) }
    })
    .await;

    // It goes on from there, and its versions count on.
    let again = stage.runs(retained("web")).await;
    assert_eq!(read_in(&again, "/data/precious").await, "of the dead");
    assert_eq!(told(&stage.taken("next", "web").await).version, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_adopts_in_time_goes() {
    let stage = Stage::set_with("snap-expire", &[("BERTH_ORPHAN_RETENTION", "1s")]).await;
    let before = stage.warmed().await;
    let doomed = Namespace::create(stage.cluster, "snap-expired").await;
    doomed.apply(bot("web").on(stage.agent.node()).with(|s| s.deletion_policy = DeletionPolicy::Retain)).await;
    doomed.ready("web", SOON).await;
    doomed.end().await;
    stage.agent.nothing_left_since(&before, SOON).await;
    stage.orphans("none", <[OrphanedLayer]>::is_empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshotter_without_a_directory_of_a_layers_own_falls_back_to_containerds_diff() {
    let stage = Stage::set("snap-native").await;
    let before = stage.leaks_on("native").await;
    let native = |name: &str| bot(name).with(|spec| spec.snapshotter = Some("native".to_owned()));
    let web = stage.runs(native("web").id("the-bot").with(|s| s.deletion_policy = DeletionPolicy::Retain)).await;
    let began = life(pid(&web));
    write_in(&web, "/data/note", "first");
    std::fs::remove_file(path_in(&web, "/bin/env")).unwrap();

    let first = stage.taken("first", "web").await;
    let said = told(&first);
    assert_eq!((said.taken, said.snapshotter.as_deref()), (Some(Taken::Live), Some("native")));
    assert!(said.frozen_millis > Some(0) && said.files > Some(10), "{said:?}");
    let verified = find(&said.conditions, ConditionType::Verified).unwrap();
    assert_eq!((verified.status.as_str(), verified.reason.as_str()), ("Unknown", "MadeByDiff"));
    assert_eq!(life(pid(&web)), began, "the bot was ended");
    // One that would take too long leaves the bot alone.
    let spec = BotSnapshotSpec { max_freeze_millis: 1, ..BotSnapshotSpec::of("web") };
    stage.ask_for("hasty", spec).await;
    let hasty = stage.ns.snapshot("hasty", SnapshotPhase::Failed).await;
    assert_eq!(reason(&hasty).1, "TooManyChanges", "{:?}", reason(&hasty));
    stage.ns.snapshots().delete("hasty", &DeleteParams::default()).await.unwrap();
    stage.ns.no_snapshot("hasty").await;

    write_in(&web, "/data/note", "second");
    let second = stage.taken("second", "web").await;
    let changes = told(&second).changes.clone().unwrap();
    assert!(changes.paths.iter().any(|c| c.path == "/data/note" && c.change == ChangeKind::Modified), "{changes:?}");

    // Back, kept, forked, moved to another image: as everywhere.
    stage.edit("web", json!({"rollback": {"id": "back", "snapshotName": "first"}})).await;
    let back = stage.ns.until("web", "rolled back", SOON, |bot| status(bot).rollback.is_some()).await;
    let back = stage.ns.phase(&back.name_any(), Phase::Running, SOON).await;
    assert_eq!(read_in(&back, "/data/note").await, "first");
    assert!(!path_in(&back, "/bin/env").exists(), "what was deleted came back");
    let fork = native("fork").with(|spec| spec.restore_from = Some(RestoreFrom { snapshot_name: "second".to_owned() }));
    assert_eq!(read_in(&stage.runs(fork).await, "/data/note").await, "second");
    let another = format!("{}/berth/other-{}:1", stage.cluster.env("BERTH_REGISTRY"), stage.ns.name());
    push_another(&another);
    write_in(&back, "/data/a/deep", "kept");
    stage.edit("web", json!({"image": another})).await;
    let moved = stage
        .ns
        .until("web", "on another image", SOON, |bot| {
            status(bot).image.as_ref().is_some_and(|image| image.reference == another)
                && says(bot, ConditionType::Ready).is_some_and(|(ready, _)| ready == "True")
        })
        .await;
    assert_eq!(read_in(&moved, "/data/note").await, "first");
    assert_eq!(read_in(&moved, "/data/a/deep").await, "kept");
    assert!(path_in(&moved, "/bin/env").exists(), "the other image is not there");
    write_in(&moved, "/data/note", "last");
    stage.ns.delete("web", SOON).await;
    let again = native("again").id("the-bot").image(&another);
    assert_eq!(read_in(&stage.runs(again).await, "/data/note").await, "last");

    for name in ["again", "fork"] {
        stage.ns.delete(name, SOON).await;
    }
    for snapshot in stage.ns.snapshots().list(&ListParams::default()).await.unwrap().items {
        let _ = stage.ns.snapshots().delete(&snapshot.name_any(), &DeleteParams::default()).await;
        stage.ns.no_snapshot(&snapshot.name_any()).await;
    }
    wait_for("nothing left of them", SOON, || async {
        let left = stage.leaks_on("native").await;
        if left == before { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

impl Stage {
    /// Active layers and versions of a snapshotter, once no bot is there; image layers stay.
    async fn leaks_on(&self, snapshotter: &str) -> Vec<String> {
        let list = self.agent.ctr(["snapshots", "--snapshotter", snapshotter, "list"]);
        let names = list.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        let mut left: Vec<String> = names.filter(|name| !name.starts_with("sha256:")).map(str::to_owned).collect();
        left.sort();
        left
    }
}
