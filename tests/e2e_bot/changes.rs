//! What a change of each field costs, as API.md promises.

use berth::api::BotContainer;
use berth::api::bot_container::Phase;
use berth::api::condition::ConditionType;
use serde_json::{Value, json};

use crate::common::{SOON, bot, summary};
use crate::stage::{Stage, cgroup_file, environment, ip, life, message, path_in, pid, read_in, says, status};

/// Ends on TERM at once; says so in the layer, outside of the data.
const WAITS: &str = "trap 'echo TERM >>/ended; exit 0' TERM; echo x >>/begun; while :; do sleep 1000000 & wait; done";

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_a_restart_restarts_on_the_same_layer_with_the_same_address() {
    let stage = Stage::set("restart").await;
    let mut before = stage.runs(bot("web").sh(WAITS)).await;
    read_in(&before, "/begun").await;
    let address = ip(&before);
    std::fs::write(path_in(&before, "/root/written"), "by the bot").unwrap();
    std::fs::write(path_in(&before, "/data/written"), "by the bot").unwrap();

    let sh = |script: &str| json!(["/bin/sh", "-c", script]);
    let changes: Vec<(&str, Value)> = vec![
        ("env", json!({"env": [{"name": "MODE", "value": "prod"}]})),
        ("command", json!({"command": sh(&format!("true; {WAITS}"))})),
        ("args", json!({"args": ["one"]})),
        ("workingDir", json!({"workingDir": "/tmp"})),
        ("files", json!({"files": [{"path": "/etc/bot.toml", "content": "a = 1\n"}]})),
        ("securityContext", json!({"securityContext": {"capabilities": {"drop": ["NET_RAW"]}}})),
        ("timezone", json!({"timezone": "Etc/UTC"})),
        ("dnsPolicy", json!({"dnsPolicy": "Default"})),
        ("restartedAt", json!({"restartedAt": "2026-11-24T10:00:00Z"})),
        ("restartedAt again", json!({"restartedAt": "2026-11-24T10:00:01Z"})),
        ("env removed", json!({"env": null})),
    ];
    for (what, change) in changes {
        let after = stage.edited("web", change, Phase::Running).await;
        assert_ne!(life(pid(&after)), (pid(&before), String::new()), "{what}");
        assert_ne!(status(&after).task, status(&before).task, "{what} did not restart it: {}", summary(&after));
        assert_eq!(ip(&after), address, "{what} took its address");
        for file in ["/root/written", "/data/written"] {
            assert_eq!(read_in(&after, file).await, "by the bot", "{what} took its layer");
        }
        assert_eq!(status(&after).restart_count, Some(0), "{what}: {}", summary(&after));
        let last = status(&after).last_termination.as_ref().unwrap();
        assert_eq!(last.exit_code, 0, "{what}: it was asked to end, and did: {last:?}");
        before = after;
    }
    assert!(!environment(&before).await.contains("MODE="));
    assert_eq!(std::fs::read_link(format!("/proc/{}/cwd", pid(&before))).unwrap().to_str(), Some("/tmp"));
    assert_eq!(stage.agent.leaks().count("tasks"), 1);

    // The network's name is part of the spec as well.
    let renamed = stage.edited("web", json!({"network": {"hostname": "other"}}), Phase::Running).await;
    assert_eq!(read_in(&renamed, "/etc/hostname").await.trim(), "other");
    assert_eq!(ip(&renamed), address);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_costs_nothing_leaves_the_process_alone() {
    let stage = Stage::set("nothing").await;
    let before = stage.runs(bot("web").sh(WAITS)).await;
    let process = life(pid(&before));
    for (what, change) in [
        ("deletionPolicy", json!({"deletionPolicy": "Retain"})),
        ("deletionPolicy back", json!({"deletionPolicy": "Delete"})),
        ("snapshotPolicy", json!({"snapshotPolicy": {"schedule": "0 3 * * *"}})),
        ("skills", json!({"skills": [{"name": "search", "content": "# How to"}]})),
        ("rollback without effect", json!({"rollback": null})),
        ("terminationGracePeriodSeconds", json!({"terminationGracePeriodSeconds": 5})),
        ("restartPolicy", json!({"restartPolicy": "Never"})),
        ("imagePullPolicy", json!({"imagePullPolicy": "Always"})),
    ] {
        let after = stage.edited("web", change, Phase::Running).await;
        assert_eq!(life(pid(&after)), process, "{what}");
        assert_eq!(says(&after, ConditionType::Ready), Some(("True", "AsAsked")), "{what}: {}", summary(&after));
        assert_eq!(status(&after).task, status(&before).task, "{what}");
    }
    // Labels are not even a new generation.
    stage.cluster.kubectl(["label", "-n", stage.ns.name(), "bot/web", "team=a"]);
    let after = stage.ns.ready("web", SOON).await;
    assert_eq!(life(pid(&after)), process);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_reach_the_running_process() {
    let stage = Stage::set("limits").await;
    let web = bot("web").sh(WAITS).limit("memory", "64Mi").limit("cpu", "500m").limit("pids", "50");
    let before = stage.runs(web).await;
    let process = life(pid(&before));
    let limits = |bot: &BotContainer| {
        (
            cgroup_file(bot, "memory", "memory.limit_in_bytes").parse::<u64>().unwrap(),
            cgroup_file(bot, "cpu", "cpu.cfs_quota_us").parse::<i64>().unwrap(),
            cgroup_file(bot, "pids", "pids.max"),
        )
    };
    assert_eq!(limits(&before), (64 << 20, 50_000, "50".to_owned()));

    let change = json!({"resources": {"limits": {"memory": "128Mi", "cpu": "2", "pids": "70"}}});
    let after = stage.edited("web", change, Phase::Running).await;
    assert_eq!(limits(&after), (128 << 20, 200_000, "70".to_owned()), "more");
    assert_eq!(life(pid(&after)), process, "a live update touches no process");
    let said = &status(&after).resources.as_ref().unwrap().limits;
    assert_eq!((said["memory"].0.as_str(), said["cpu"].0.as_str()), ("128Mi", "2"));

    let change = json!({"resources": {"limits": {"memory": "32Mi", "cpu": "250m", "pids": "20"}}});
    let after = stage.edited("web", change, Phase::Running).await;
    assert_eq!(limits(&after), (32 << 20, 25_000, "20".to_owned()), "less");
    assert_eq!(life(pid(&after)), process);

    // Taken away: as without any.
    let free = stage.runs(bot("free").sh(WAITS)).await;
    let after = stage.edited("web", json!({"resources": null}), Phase::Running).await;
    assert_eq!(limits(&after), limits(&free), "none");
    assert_eq!(life(pid(&after)), process);
    assert_eq!(status(&after).resources, None);

    // While paused, and for the next process.
    stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    let change = json!({"resources": {"limits": {"memory": "48Mi"}}});
    let paused = stage.edited("web", change, Phase::Paused).await;
    assert_eq!(says(&paused, ConditionType::Ready).unwrap().0, "True", "{}", summary(&paused));
    assert_eq!(limits(&paused).0, 48 << 20);
    stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    let change = json!({"resources": {"limits": {"memory": "40Mi"}}, "operatingMode": "Running"});
    let again = stage.edited("web", change, Phase::Running).await;
    assert_eq!(limits(&again).0, 40 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_can_not_be_had_is_told_and_the_bot_runs_on_until_it_is_taken_back() {
    let stage = Stage::set("image").await;
    let before = stage.runs(bot("web").sh(WAITS)).await;
    let process = life(pid(&before));
    let other = stage.cluster.image().replace(":1", ":2");
    let after = {
        stage.edit("web", json!({"image": other})).await;
        stage.says("web", Phase::Running, "ImageNotFound").await
    };
    assert_eq!(life(pid(&after)), process);
    assert_eq!(says(&after, ConditionType::Reconciling).unwrap().0, "True");
    assert_eq!(status(&after).image.as_ref().unwrap().reference, stage.cluster.image(), "what runs is told");
    let back = stage.edited("web", json!({"image": stage.cluster.image()}), Phase::Running).await;
    assert_eq!(says(&back, ConditionType::Ready).unwrap().0, "True");
    assert_eq!(life(pid(&back)), process);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_fixed_is_refused() {
    let stage = Stage::set("fixed").await;
    stage.runs(bot("web").sh(WAITS)).await;
    for (field, change) in [
        ("botId", json!({"botId": "other"})),
        ("nodeName", json!({"nodeName": "elsewhere"})),
        ("snapshotter", json!({"snapshotter": "native"})),
        ("runtimeClassName", json!({"runtimeClassName": "gvisor"})),
        ("data", json!({"data": {"path": "/elsewhere"}})),
        ("network", json!({"network": {"mode": "Host"}})),
    ] {
        let patch = kube::api::Patch::Merge(json!({"spec": change}));
        let answer = stage.ns.bots().patch("web", &kube::api::PatchParams::default(), &patch).await;
        match answer {
            Err(kube::Error::Api(status)) if status.code == 422 && status.message.contains(field) => {}
            other => panic!("{field}: {other:?}"),
        }
    }
}

/// Skills are in the data before the process starts, come and go while it runs or is frozen, and belong to the bot.
#[tokio::test(flavor = "multi_thread")]
async fn skills_come_and_go_in_the_data_of_a_live_bot() {
    let stage = Stage::set("skills").await;
    let skill =
        |name: &str, content: &str| json!({"name": name, "description": "Search: the \"web\"", "content": content});
    let file = |bot: &BotContainer, name: &str| path_in(bot, &format!("/data/.skills/{name}/SKILL.md"));
    let seen = bot("web")
        .sh(&format!("cat /data/.skills/search/SKILL.md >/seen; {WAITS}"))
        .with(|spec| spec.skills.push(serde_json::from_value(skill("search", "# How to")).unwrap()))
        .with(|spec| spec.security_context = serde_json::from_value(json!({"runAsUser": 0})).unwrap());
    let before = stage.runs(seen).await;
    let text = "---\nname: \"search\"\ndescription: \"Search: the \\\"web\\\"\"\n---\n\n# How to\n";
    assert_eq!(read_in(&before, "/seen").await, text, "it is there before the process starts");

    // The bot edits one; another comes, and one is changed in the spec.
    std::fs::write(file(&before, "search"), "edited at run time").unwrap();
    stage.edited("web", json!({"skills": [skill("search", "# How to"), skill("mail", "one")]}), Phase::Running).await;
    assert!(std::fs::read_to_string(file(&before, "mail")).unwrap().ends_with("one\n"));
    assert_eq!(std::fs::read_to_string(file(&before, "search")).unwrap(), "edited at run time");
    stage.edited("web", json!({"operatingMode": "Paused"}), Phase::Paused).await;
    stage.edited("web", json!({"skills": [skill("mail", "two")]}), Phase::Paused).await;
    assert!(std::fs::read_to_string(file(&before, "mail")).unwrap().ends_with("two\n"), "also while it is frozen");
    let after = stage.edited("web", json!({"operatingMode": "Running", "skills": null}), Phase::Running).await;
    assert!(!file(&after, "mail").exists());
    assert_eq!(std::fs::read_to_string(file(&after, "search")).unwrap(), "edited at run time", "the bot's own now");
    assert_eq!(status(&after).task, status(&before).task, "skills restarted it: {}", summary(&after));

    // A link of the bot's own making is not followed, and said.
    let trap = tempfile::tempdir().unwrap();
    let skills = path_in(&after, "/data/.skills");
    std::fs::remove_dir_all(&skills).unwrap();
    std::os::unix::fs::symlink(trap.path(), &skills).unwrap();
    stage.edit("web", json!({"skills": [skill("search", "three")]})).await;
    let told = stage.says("web", Phase::Running, "SkillFailed").await;
    assert!(message(&told, ConditionType::Ready).contains("search"), "{}", summary(&told));
    assert_eq!(std::fs::read_dir(trap.path()).unwrap().count(), 0);
    std::fs::remove_file(&skills).unwrap();
    let mended = stage.says("web", Phase::Running, "AsAsked").await;
    assert!(std::fs::read_to_string(file(&mended, "search")).unwrap().ends_with("three\n"));
}

/// `restartedAt` and `rollback` that are there at creation count as done, and of `restartedAt` only a new value counts: to take
/// it away restarted the bot once more, so that a tool that prunes fields it did not write cost a restart.
#[tokio::test(flavor = "multi_thread")]
async fn orders_are_carried_out_once_and_only_new_ones() {
    let stage = Stage::set("orders").await;
    let made = bot("web").sh(WAITS).with(|spec| {
        spec.restarted_at = serde_json::from_value(json!("2026-11-24T10:00:00Z")).unwrap();
        spec.rollback = serde_json::from_value(json!({"id": "one", "toVersion": 3})).unwrap();
    });
    let first = stage.runs(made).await;
    let process = life(pid(&first));
    let happened = |bot: &BotContainer| status(bot).transitions.iter().map(|t| t.type_.clone()).collect::<Vec<_>>();
    assert_eq!(happened(&first), ["scheduled", "pulled", "created", "started"]);
    assert_eq!(status(&first).rollback.as_ref().unwrap().id, "one");
    for (what, at) in [
        ("taken away", Value::Null),
        ("set again", json!("2026-11-24T10:00:00Z")),
        ("the same in other words", json!("2026-11-24T11:00:00.0+01:00")),
    ] {
        let after = stage.edited("web", json!({"restartedAt": at}), Phase::Running).await;
        assert_eq!(life(pid(&after)), process, "{what}: {}", summary(&after));
        assert_eq!(says(&after, ConditionType::Ready), Some(("True", "AsAsked")), "{what}: {}", summary(&after));
    }
    let anew = stage.edited("web", json!({"restartedAt": "2026-11-24T10:00:01Z"}), Phase::Running).await;
    assert_ne!(status(&anew).task, status(&first).task, "{}", summary(&anew));
    let process = life(pid(&anew));

    // A new rollback to a version that there is not can't be done. That was passed over in silence.
    for phase in [Phase::Running, Phase::Stopped] {
        stage
            .edit("web", json!({"operatingMode": format!("{phase:?}"), "rollback": {"id": "two", "toVersion": 3}}))
            .await;
        let told = stage.says("web", phase, "RollbackFailed").await;
        let words = message(&told, ConditionType::Ready);
        assert!(words.contains("spec.rollback") && words.contains("two"), "{words}");
        assert_eq!(says(&told, ConditionType::Stalled).unwrap().0, "True");
        assert_eq!(status(&told).rollback.as_ref().unwrap().id, "one", "what was not done is not claimed");
        if phase == Phase::Running {
            assert_eq!(life(pid(&told)), process);
            stage.told_once("web", "RollbackFailed").await;
        }
        let mended = stage.edited("web", json!({"rollback": null}), phase).await;
        assert_eq!(says(&mended, ConditionType::Ready).unwrap().0, "True", "{}", summary(&mended));
    }
}
