//! The three modes, and addresses that stay.

use std::fs::Permissions;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use berth::api::bot_container::{NetworkMode, Phase};
use berth::api::condition::ConditionType;
use serde_json::json;

use crate::common::{SOON, bot, get, summary, wait_for};
use crate::stage::{Stage, WAIT, ip, message, page, pid, read_in, says, status};

fn namespace_of(pid: &str) -> String {
    std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap().display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mode_connects_as_it_says() {
    let stage = Stage::set("modes").await;
    let host_port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let host = bot("host").env("PORT", &host_port.to_string()).with(|spec| spec.network.mode = NetworkMode::Host);
    let host = stage.runs(host).await;
    assert_eq!(namespace_of(&pid(&host).to_string()), namespace_of("self"));
    assert_eq!(says(&host, ConditionType::NetworkReady).unwrap().0, "True", "{}", summary(&host));
    let page_of_host = wait_for("the page on the node's port", SOON, || async {
        get((Ipv4Addr::LOCALHOST, host_port).into(), "/").await
    })
    .await;
    assert!(page_of_host.1.starts_with("I am host"), "{page_of_host:?}");
    let left = stage.agent.leaks();
    assert_eq!((left.count("netns"), left.count("addresses")), (0, 0), "{left:?}");

    let script = format!(
        "ls /sys/class/net >/data/links; httpd -p 8080 -h /data; \
        printf 'GET /links HTTP/1.0\\r\\n\\r\\n' | nc -w 3 127.0.0.1 8080 >/data/new; mv /data/new /data/loop; {WAIT}"
    );
    let none = stage.runs(bot("none").sh(&script).with(|spec| spec.network.mode = NetworkMode::None)).await;
    assert_eq!(read_in(&none, "/data/links").await.trim(), "lo");
    assert!(read_in(&none, "/data/loop").await.contains("200 OK"), "the loopback is up");
    assert_eq!(says(&none, ConditionType::NetworkReady), Some(("True", "NoNetwork")));
    assert_eq!(status(&none).network, None);
    assert_eq!(stage.agent.leaks().count("addresses"), 0);

    let bridge = stage.runs(bot("bridge")).await;
    page(&bridge).await;
    assert_ne!(namespace_of(&pid(&bridge).to_string()), namespace_of("self"));

    // All three stop and start again.
    for name in ["host", "none", "bridge"] {
        stage.edited(name, json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
        stage.edited(name, json!({"operatingMode": "Running"}), Phase::Running).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bots_of_a_namespace_reach_each_other_and_no_one_elses() {
    let stage = Stage::set("reach").await;
    let other = crate::common::Namespace::create(stage.cluster, "reach-other").await;
    let server = stage.runs(bot("server")).await;
    page(&server).await;
    // Not wget: with -T, Debian's static one dies of a segmentation fault before it reads its other arguments.
    let script = format!(
        "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {} 8080 >/data/new 2>/dev/null || echo refused >>/data/new; \
        mv /data/new /data/said; {WAIT}",
        ip(&server)
    );
    let friend = stage.runs(bot("friend").sh(&script)).await;
    let seen = read_in(&friend, "/data/said").await;
    assert!(
        seen.contains("I am server") && !seen.contains("refused"),
        "a bot of the same namespace does not get through: {seen}"
    );
    other.apply(bot("stranger").sh(&script).on(stage.agent.node())).await;
    let stranger = other.ready("stranger", SOON).await;
    let seen = read_in(&stranger, "/data/said").await;
    assert_eq!(seen.trim(), "refused", "a bot of another namespace got through: {seen}");
    other.delete("stranger", SOON).await;
}

/// The plugins are taken away, fail, and come back: told each time, with their own words, and mended without an edit.
#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_is_missing_or_fails_is_told_and_the_bot_starts_when_it_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    let mend = |name: &str| std::fs::copy(Path::new("/usr/lib/cni").join(name), place(name)).unwrap();
    for name in ["bridge", "loopback"] {
        mend(name);
    }
    let stage = Stage::set_with("plugins", &[("BERTH_CNI_BIN_DIR", dir.path().to_str().unwrap())]).await;
    stage.apply(bot("web")).await;
    let missing = stage.says("web", Phase::BackOff, "NetworkFailed").await;
    assert_eq!(says(&missing, ConditionType::NetworkReady), Some(("False", "NetworkFailed")), "{}", summary(&missing));
    let words = message(&missing, ConditionType::NetworkReady);
    assert!(words.contains("host-local") && words.contains(dir.path().to_str().unwrap()), "which, and where: {words}");
    assert_eq!(status(&missing).task, None);
    stage.told_once("web", "NetworkFailed").await;

    mend("host-local");
    let web = stage.ns.ready("web", SOON).await;
    page(&web).await;

    // What a broken plugin says is what people read; a running bot needs none.
    let broken = "#!/bin/sh\necho '{\"cniVersion\": \"1.0.0\", \"code\": 100, \"msg\": \"out of order\"}'; exit 1\n";
    std::fs::remove_file(place("bridge")).unwrap();
    std::fs::write(place("bridge"), broken).unwrap();
    std::fs::set_permissions(place("bridge"), Permissions::from_mode(0o755)).unwrap();
    stage.apply(bot("late")).await;
    let failed = stage.says("late", Phase::BackOff, "NetworkFailed").await;
    let words = message(&failed, ConditionType::NetworkReady);
    assert!(words.contains("out of order"), "{words}");
    page(&web).await;
    let again = stage.edited("web", json!({"restartedAt": "2026-11-24T10:00:00Z"}), Phase::Running).await;
    assert_eq!(ip(&again), ip(&web), "a restart calls no plugin");
    mend("bridge");
    page(&stage.ns.ready("late", SOON).await).await;
}
