//! `hack/cluster` and the accounts of `deploy/`: what the demo and all other tests stand on.

// Helpers of tests may panic as tests do; clippy's allowance stops at `#[test]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use berth::api::BotContainer;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};

use common::{Agent, Cluster, Namespace, SOON, bot, get, hack_cluster, run, wait_for};

const SERVERS: [&str; 5] = ["containerd", "etcd", "kube-apiserver", "kube-controller-manager", "registry"];

fn alive(pid: u32) -> bool {
    // A zombie has no program.
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

/// Processes whose environment or arguments name the folder.
fn processes_of(dir: &Path) -> Vec<String> {
    let dir = format!("{}/", dir.display());
    let mark = format!("BERTH_PART={}", dir.trim_end_matches('/'));
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let read = |file: &str| {
            String::from_utf8_lossy(&std::fs::read(entry.path().join(file)).unwrap_or_default()).replace('\0', " ")
        };
        let (cmdline, environ) = (read("cmdline"), read("environ"));
        if cmdline.contains(&dir) || environ.contains(&format!("{mark}:")) {
            found.push(cmdline);
        }
    }
    found
}

fn mounts_of(dir: &Path) -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().filter(|line| line.contains(&format!(" {}/", dir.display()))).map(str::to_owned).collect()
}

/// A container that sleeps, without a network.
fn sleeper(cluster: &Cluster, namespace: &str, name: &str) {
    run(Command::new("images/demo-bot/push").arg(cluster.image()));
    cluster.ctr(namespace, ["images", "pull", "--plain-http", &cluster.image()]);
    cluster.ctr(namespace, ["run", "--detach", &cluster.image(), name, "/bin/sleep", "100000"]);
}

#[test]
fn a_part_that_died_is_started_again_and_the_others_are_left_alone() {
    let cluster = Cluster::own();
    let mut before = SERVERS.map(|part| cluster.pid(part));

    cluster.up_again();
    assert_eq!(SERVERS.map(|part| cluster.pid(part)), before, "up again restarts nothing that runs");

    for (i, part) in SERVERS.iter().enumerate() {
        run(Command::new("kill").args(["-KILL", &before[i].to_string()]));
        let status = hack_cluster("status", cluster.dir()).output().unwrap();
        assert!(!status.status.success(), "status is a failure while {part} is dead");
        let said = String::from_utf8(status.stdout).unwrap();
        assert!(said.lines().any(|line| line == format!("{part} dead")), "{said}");

        cluster.up_again();
        let after = SERVERS.map(|part| cluster.pid(part));
        for (j, other) in SERVERS.iter().enumerate() {
            assert_eq!(after[j] == before[j], i != j, "{other} after the death of {part}");
        }
        before = after;
    }
    // Objects are still there, and the API server takes new ones.
    cluster.kubectl(["create", "namespace", "after"]);
    cluster.kubectl(["get", "botcontainers", "--namespace", "after"]);
    run(&mut hack_cluster("status", cluster.dir()));
}

#[test]
fn down_leaves_no_process_mount_port_or_folder_even_after_a_crash() {
    let cluster = Cluster::own();
    let registry = cluster.env("BERTH_REGISTRY").to_owned();
    let port: u16 = registry.rsplit_once(':').unwrap().1.parse().unwrap();
    sleeper(&cluster, "berth", "running");
    sleeper(&cluster, "berth", "frozen");
    sleeper(&cluster, "other", "elsewhere");
    cluster.ctr("berth", ["tasks", "pause", "frozen"]);
    let state = cluster.dir().join("containerd/state/io.containerd.runtime.v2.task");
    // containerd 1 writes the address alone, containerd 2 JSON that has it.
    let told = ["address", "bootstrap.json"].map(|file| std::fs::read_to_string(state.join("berth/frozen").join(file)));
    let told = told.into_iter().flatten().next().expect("where the shim listens");
    let shim = told.split("unix://").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let shim = Path::new(shim.trim_end()).to_owned();
    assert!(shim.exists() && !mounts_of(cluster.dir()).is_empty(), "there is something to take down");

    // What a test that was killed leaves: a part without a pid file.
    let mark = format!("{}:agent-left", cluster.dir().display());
    let mut left = Command::new("sleep").arg("1000").env("BERTH_PART", mark).stdin(Stdio::null()).spawn().unwrap();

    // The worst case: containerd is gone, its shims and a frozen task are not.
    run(Command::new("kill").args(["-KILL", &cluster.pid("containerd").to_string()]));
    cluster.down();

    assert!(!left.wait().unwrap().success(), "the part without a pid file was killed");
    assert_eq!(processes_of(cluster.dir()), Vec::<String>::new());
    assert_eq!(mounts_of(cluster.dir()), Vec::<String>::new());
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err(), "the registry still listens on {port}");
    assert!(!shim.exists(), "{} is left", shim.display());
    assert!(!cluster.dir().exists());
    // And once more, harmless.
    cluster.down();
}

#[test]
fn a_pid_that_is_somebody_elses_is_neither_believed_nor_killed() {
    let cluster = Cluster::own();
    let mut stranger = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
    let registry = cluster.pid("registry");
    run(Command::new("kill").args(["-KILL", &registry.to_string()]));
    std::fs::write(cluster.dir().join("run/registry.pid"), stranger.id().to_string()).unwrap();

    cluster.up_again();
    assert_ne!(cluster.pid("registry"), stranger.id(), "a registry was started");
    assert!(alive(stranger.id()));

    std::fs::write(cluster.dir().join("run/etcd.pid"), stranger.id().to_string()).unwrap();
    cluster.down();
    assert!(alive(stranger.id()));
    assert_eq!(processes_of(cluster.dir()), Vec::<String>::new(), "the real etcd was found by its mark");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn a_folder_that_is_no_cluster_is_not_touched() {
    let dir = std::env::temp_dir().join(format!("berth-foreign-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("thesis.txt"), "years of work").unwrap();
    for verb in ["up", "down"] {
        let output = hack_cluster(verb, &dir).output().unwrap();
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(dir.to_str().unwrap()), "{verb}: {said}");
    }
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[tokio::test]
async fn an_agents_token_is_its_nodes_and_dies_with_it() {
    let cluster = Cluster::shared();
    let agent = Agent::prepare(cluster, "token");
    let client = agent.client().await;
    let review = Api::<SelfSubjectReview>::all(client.clone())
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await
        .unwrap();
    let user = review.status.unwrap().user_info.unwrap();
    assert_eq!(user.username.as_deref(), Some("system:serviceaccount:berth-system:berth-agent"));
    let node = user.extra.unwrap().remove("authentication.kubernetes.io/node-name");
    assert_eq!(node, Some(vec![agent.node().to_owned()]));

    let nodes = Api::<Node>::all(cluster.client().await);
    nodes.delete(agent.node(), &DeleteParams::default()).await.unwrap();
    let bots = Api::<BotContainer>::all(client);
    // The API server remembers a good token for up to 10 s.
    wait_for("the token of a deleted Node refused", SOON, || async {
        match bots.list(&ListParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 401 => Ok(()),
            other => Err(format!("{:?}", other.map(|list| list.items.len()))),
        }
    })
    .await;
}

#[tokio::test]
async fn namespaces_end_and_owned_objects_go_with_their_owner() {
    let cluster = Cluster::shared();
    let ns = Namespace::create(cluster, "owners").await;
    let owner = ns.apply(bot("owner").on("nowhere")).await;
    let reference = OwnerReference {
        api_version: "berth.dev/v1alpha1".to_owned(),
        kind: "BotContainer".to_owned(),
        name: "owner".to_owned(),
        uid: owner.metadata.uid.clone().unwrap(),
        ..OwnerReference::default()
    };
    let metadata =
        ObjectMeta { name: Some("owned".to_owned()), owner_references: Some(vec![reference]), ..ObjectMeta::default() };
    let maps = ns.api::<ConfigMap>();
    maps.create(&PostParams::default(), &ConfigMap { metadata, ..ConfigMap::default() }).await.unwrap();
    // A controller that runs beside this test may have put its finalizer there; it is not what is tested here.
    let none = serde_json::json!({"metadata": {"finalizers": null}});
    ns.bots().delete("owner", &DeleteParams::default()).await.unwrap();
    let _ = ns.bots().patch("owner", &PatchParams::default(), &Patch::Merge(&none)).await;
    wait_for("the owned ConfigMap collected", SOON, || async {
        match maps.get_opt("owned").await {
            Ok(None) => Ok(()),
            other => Err(format!("{:?}", other.map(|map| map.map(|m| m.metadata.deletion_timestamp)))),
        }
    })
    .await;

    let namespaces = Api::<k8s_openapi::api::core::v1::Namespace>::all(ns.client());
    namespaces.delete(ns.name(), &DeleteParams::default()).await.unwrap();
    wait_for("the namespace gone", SOON, || async {
        match namespaces.get_opt(ns.name()).await {
            Ok(None) => Ok(()),
            other => Err(format!("{:?}", other.map(|ns| ns.and_then(|n| n.status)))),
        }
    })
    .await;
}

#[test]
fn leaks_are_counted_and_a_node_that_is_gone_leaves_none() {
    let cluster = Cluster::shared();
    let agent = Agent::prepare(cluster, "leaks");
    let before = agent.leaks();
    assert!(before.since(&before).is_ok());

    let namespace = agent.env("BERTH_CONTAINERD_NAMESPACE").to_owned();
    sleeper(cluster, &namespace, "one");
    let after = agent.leaks();
    for (name, count) in [("containers", 1), ("tasks", 1), ("shims", 1), ("images", 1), ("snapshots", 2), ("blobs", 3)]
    {
        assert_eq!(after.count(name) - before.count(name), count, "{name}: {after:?}");
    }
    assert!(after.since(&before).unwrap_err().contains("tasks 0 -> 1"));

    // What an agent makes besides: an address, a network namespace, a cgroup.
    let state = agent.env("BERTH_STATE_DIR");
    std::fs::create_dir_all(format!("{state}/networks/berth")).unwrap();
    std::fs::write(format!("{state}/networks/berth/10.1.2.3"), "one").unwrap();
    std::fs::write(format!("{state}/networks/berth/last_reserved_ip.0"), "10.1.2.3").unwrap();
    let netns = format!("{}/netns-one", agent.env("BERTH_RUN_DIR"));
    std::fs::write(&netns, "").unwrap();
    run(Command::new("unshare").arg(format!("--net={netns}")).arg("true"));
    let after = agent.leaks();
    assert_eq!((after.count("addresses"), after.count("netns")), (1, 1), "{after:?}");

    let dir = cluster.dir().join("nodes").join(agent.node());
    assert!(dir.exists());
    drop(agent);
    assert!(!dir.exists());
    assert!(mounts_of(&dir).is_empty());
    let left = cluster.ctr("default", ["namespaces", "list", "-q"]);
    assert!(!left.lines().any(|line| line == namespace), "{left}");
}

#[tokio::test]
async fn the_demos_bot_says_who_it_is_counts_its_starts_and_ends_on_term() {
    let cluster = Cluster::shared();
    let agent = Agent::prepare(cluster, "image");
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    agent.ctr(["images", "pull", "--plain-http", &cluster.image()]);
    let (image, port_env) = (cluster.image(), format!("PORT={port}"));
    agent.ctr(["run", "--detach", "--net-host", "--env", &port_env, "--env", "BOT_NAME=ada", &image, "ada"]);
    for start in 1..=2 {
        let page = wait_for("the bot's page", SOON, || async {
            match get((Ipv4Addr::LOCALHOST, port).into(), "/").await? {
                (200, page) => Ok(page),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        assert!(page.starts_with(&format!("I am ada, started {start} time")), "{page}");

        agent.ctr(["tasks", "kill", "--signal", "SIGTERM", "ada"]);
        wait_for("the end after TERM", SOON, || async {
            let tasks = agent.ctr(["tasks", "list"]);
            if tasks.contains("STOPPED") { Ok(()) } else { Err(tasks) }
        })
        .await;
        // It tells of success: 0, not 143.
        agent.ctr(["tasks", "delete", "ada"]);
        if start == 1 {
            agent.ctr(["tasks", "start", "--detach", "ada"]);
        }
    }
}

#[tokio::test]
#[should_panic(expected = "the moon: not within 100ms")]
async fn a_wait_that_runs_out_says_what_it_saw() {
    wait_for("the moon", Duration::from_millis(100), || async { Err::<(), _>("clouds".to_owned()) }).await;
}
