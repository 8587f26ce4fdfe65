//! containerd, the API server, shims and the whole node go away and come back.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use berth::api::bot_container::{Kept, OperatingMode, Phase, RestartPolicy};
use berth::api::condition::{ConditionType, Reason, find};
use kube::api::{Patch, PatchParams};

use crate::common::{SOON, run, wait_for};
use crate::scene::{Scene, counting, diarist, id};

pub fn kill(signal: &str, pid: u32) {
    run(Command::new("kill").args([signal, &pid.to_string()]));
}

/// Pids of shims that name this in their arguments: a container or a namespace of containerd.
fn shims(of: &str) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let shim = exe.file_name().is_some_and(|name| name.to_string_lossy().starts_with("containerd-shim"));
        let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        shim && cmdline.split(|&byte| byte == 0).any(|word| word == of.as_bytes())
    })
    .collect()
}

impl Scene {
    pub async fn pid(&self, name: &str) -> i64 {
        self.ns.bots().get(name).await.unwrap().status.unwrap().task.unwrap().pid
    }

    /// Makes the agent look at a bot now.
    pub async fn touch(&self, name: &str) {
        let now = jiff::Timestamp::now().to_string();
        let patch = serde_json::json!({"metadata": {"annotations": {"look": now}}});
        self.ns.bots().patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    }
}

#[tokio::test]
async fn containerd_away_touches_no_bot_and_changes_are_made_when_it_is_back() {
    let scene = Scene::alone("runtime").await;
    let steady = scene.apply(counting("steady")).await;
    let frozen = scene.apply(counting("frozen")).await;
    scene.apply(counting("leaves")).await;
    for name in ["steady", "frozen", "leaves"] {
        scene.phase(name, Phase::Running).await;
    }
    scene.apply(counting("frozen").paused()).await;
    scene.phase("frozen", Phase::Paused).await;
    let pids = (scene.pid("steady").await, scene.pid("frozen").await);

    kill("-KILL", scene.cluster.pid("containerd"));
    scene.apply(counting("frozen")).await;
    scene.apply(counting("leaves").stopped()).await;
    scene.apply(counting("new")).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(Path::new(&format!("/proc/{}", pids.0)).exists(), "it runs on");
    scene.cluster.up_again();

    scene.phase("frozen", Phase::Running).await;
    scene.phase("leaves", Phase::Stopped).await;
    scene.phase("new", Phase::Running).await;
    scene.phase("steady", Phase::Running).await;
    assert_eq!((scene.pid("steady").await, scene.pid("frozen").await), pids);
    scene.diary(&steady).assert_starts(1, "steady");
    scene.diary(&frozen).assert_starts(1, "frozen");
    scene.end().await;
}

/// containerd forgot the tasks, nobody could stop their processes any more, and the next attempts ran beside them.
#[tokio::test]
async fn a_process_that_containerd_lost_is_ended_before_its_end_is_noted_and_another_starts() {
    let scene = Scene::alone("lost").await;
    let again = scene.apply(counting("again")).await;
    let once = scene.apply(counting("once").restart(RestartPolicy::Never)).await;
    let gone = scene.apply(counting("gone")).await;
    let bots = [("again", &again), ("once", &once), ("gone", &gone)];
    let mut pids = Vec::new();
    for (name, bot) in bots {
        scene.phase(name, Phase::Running).await;
        scene.started(bot, 1).await;
        pids.push(scene.pid(name).await);
    }
    // It finds tasks by their bundles, and only when it starts.
    kill("-KILL", scene.cluster.pid("containerd"));
    let (bundles, aside) = (scene.bundles(), scene.bundles().with_extension("aside"));
    std::fs::rename(&bundles, &aside).unwrap();
    scene.cluster.up_again();
    let _ = std::fs::remove_dir(&bundles);
    std::fs::rename(&aside, &bundles).unwrap();
    for pid in &pids {
        assert!(Path::new(&format!("/proc/{pid}")).exists(), "it runs on, and containerd does not know it");
    }
    scene.ns.bots().delete("gone", &kube::api::DeleteParams::default()).await.unwrap();

    scene.started(&again, 2).await;
    scene.phase("again", Phase::Running).await;
    scene.diary(&again).assert_starts(2, "again");
    let seen = scene.phase("once", Phase::Failed).await;
    assert_eq!(seen.status.unwrap().last_termination.unwrap().reason, "TaskLost");
    scene.diary(&once).assert_starts(1, "once");
    wait_for("the deleted one gone", SOON, || async {
        match scene.ns.bots().get_opt("gone").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    for pid in pids {
        // Whoever inherits a dead process may take his time to reap it.
        assert!(!Path::new(&format!("/proc/{pid}/exe")).exists(), "{pid} lives on");
    }
    scene.end().await;
}

/// A containerd that answers nothing for a while, and a shim that does: neither costs a bot, and one bot's shim costs no
/// other.
#[tokio::test]
async fn a_containerd_and_a_shim_that_hang_cost_no_bot() {
    let scene = Scene::alone("hang").await;
    let steady = scene.apply(counting("steady")).await;
    let stuck = scene.apply(counting("stuck")).await;
    for (name, bot) in [("steady", &steady), ("stuck", &stuck)] {
        scene.phase(name, Phase::Running).await;
        scene.started(bot, 1).await;
    }
    let pid = scene.pid("steady").await;
    let shim = shims(&id(&stuck))[0];
    kill("-STOP", shim);
    scene.apply(counting("stuck").stopped()).await;
    scene.touch("stuck").await;
    let other = scene.apply(counting("other")).await;
    scene.phase("other", Phase::Running).await;
    scene.started(&other, 1).await;
    kill("-CONT", shim);
    scene.phase("stuck", Phase::Stopped).await;
    scene.diary(&stuck).assert_starts(1, "stuck");

    kill("-STOP", scene.cluster.pid("containerd"));
    scene.apply(counting("stuck")).await;
    scene.apply(counting("other").stopped()).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(Path::new(&format!("/proc/{pid}")).exists(), "it runs on");
    kill("-CONT", scene.cluster.pid("containerd"));
    scene.phase("other", Phase::Stopped).await;
    scene.phase("stuck", Phase::Running).await;
    scene.started(&stuck, 2).await;
    scene.diary(&stuck).assert_starts(2, "stuck");
    scene.diary(&steady).assert_starts(1, "steady");
    scene.end().await;
}

/// runc refused to make a container of that id again, and a bot that was to run once never ran.
#[tokio::test]
async fn a_record_of_runcs_that_a_cut_off_creation_left_is_no_end_of_a_bot() {
    let scene = Scene::new("record").await;
    let once = counting("once").restart(RestartPolicy::Never);
    let bot = scene.apply(once.clone().stopped()).await;
    scene.phase("once", Phase::Stopped).await;
    std::fs::create_dir_all(scene.runc(&bot)).unwrap();
    scene.apply(once).await;
    scene.phase("once", Phase::Running).await;
    scene.started(&bot, 1).await;
    scene.diary(&bot).assert_starts(1, "once");
    scene.end().await;
}

/// A node without an API server: what runs, runs on, what ends is started again, nothing is removed.
async fn api_away(name: &str, stop: impl FnOnce(&Scene), back: impl FnOnce(&Scene)) {
    let mut scene = Scene::alone(name).await;
    let steady = scene.apply(counting("steady")).await;
    let ends = "while ! [ -e /data/end ]; do usleep 50000; done; rm /data/end; exit 1";
    let restarts = scene.apply(diarist("restarts", ends)).await;
    scene.phase("steady", Phase::Running).await;
    scene.phase("restarts", Phase::Running).await;
    let (pid, other) = (scene.pid("steady").await, scene.pid("restarts").await);

    stop(&scene);
    std::fs::write(format!("/proc/{other}/root/data/end"), "").unwrap();
    scene.started(&restarts, 2).await;
    // Another agent knows of no object at all, and of bots that run.
    scene.agent.kill_9();
    scene.agent.spawn_again(&[("BERTH_ORPHAN_GRACE_SECONDS", "1")]);
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(Path::new(&format!("/proc/{pid}")).exists(), "it runs on");
    back(&scene);

    scene.apply(counting("steady").paused()).await;
    scene.phase("steady", Phase::Paused).await;
    scene.diary(&steady).assert_starts(1, "steady");
    scene
        .ns
        .until("restarts", "restarted once", SOON, |bot| {
            bot.status.as_ref().is_some_and(|s| s.restart_count == Some(1) && s.phase == Some(Phase::Running))
        })
        .await;
    scene.diary(&restarts).assert_starts(2, "restarts");
    scene.end().await;
}

#[tokio::test]
async fn an_api_server_that_hangs_costs_no_bot() {
    let stop = |scene: &Scene| kill("-STOP", scene.cluster.pid("kube-apiserver"));
    api_away("hangs", stop, |scene| kill("-CONT", scene.cluster.pid("kube-apiserver"))).await;
}

#[tokio::test]
async fn an_api_server_that_dies_costs_no_bot() {
    let stop = |scene: &Scene| kill("-KILL", scene.cluster.pid("kube-apiserver"));
    api_away("dies", stop, |scene| scene.cluster.up_again()).await;
}

#[tokio::test]
async fn a_killed_shim_counts_as_an_end_and_the_restart_policy_decides() {
    let scene = Scene::new("shim").await;
    let again = scene.apply(counting("again")).await;
    let once = scene.apply(counting("once").restart(RestartPolicy::Never)).await;
    for (name, bot) in [("again", &again), ("once", &once)] {
        scene.phase(name, Phase::Running).await;
        scene.started(bot, 1).await;
        let found = shims(&id(bot));
        assert_eq!(found.len(), 1, "shims of {name}: {found:?}");
        kill("-KILL", found[0]);
    }
    scene.started(&again, 2).await;
    let seen = scene
        .ns
        .until("again", "restarted", SOON, |bot| {
            bot.status.as_ref().is_some_and(|s| s.restart_count == Some(1) && s.phase == Some(Phase::Running))
        })
        .await;
    assert!(seen.status.unwrap().last_termination.is_some());
    scene.phase("once", Phase::Failed).await;
    scene.diary(&again).assert_starts(2, "again");
    scene.diary(&once).assert_starts(1, "once");
    scene.end().await;
}

#[tokio::test]
async fn a_paused_bot_whose_shim_is_killed_keeps_its_files_and_says_that_its_memory_is_lost() {
    let scene = Scene::new("frozen-shim").await;
    let bot = scene.apply(counting("frozen")).await;
    scene.phase("frozen", Phase::Running).await;
    scene.started(&bot, 1).await;
    scene.apply(counting("frozen").paused()).await;
    scene.phase("frozen", Phase::Paused).await;
    let pid = scene.pid("frozen").await;
    kill("-KILL", shims(&id(&bot))[0]);
    let seen = scene
        .ns
        .until("frozen", "Paused without memory", SOON, |bot| {
            bot.status.as_ref().is_some_and(|s| s.phase == Some(Phase::Paused) && s.kept == Some(Kept::Files))
        })
        .await;
    let status = seen.status.unwrap();
    let ready = find(&status.conditions, ConditionType::Ready).unwrap();
    assert_eq!(ready.reason, Reason::MemoryLost.as_str(), "{ready:?}");
    wait_for("its process gone", SOON, || async {
        if Path::new(&format!("/proc/{pid}/exe")).exists() { Err(pid.to_string()) } else { Ok(()) }
    })
    .await;
    scene.apply(counting("frozen").mode(OperatingMode::Running)).await;
    scene.phase("frozen", Phase::Running).await;
    scene.started(&bot, 2).await;
    scene.diary(&bot).assert_starts(2, "resumed");
    scene.end().await;
}

impl Scene {
    /// What a reboot takes: every process of containerd and of the node, and all that lies on /run.
    fn reboot(&mut self) {
        self.agent.kill_9();
        kill("-KILL", self.cluster.pid("containerd"));
        let address = self.cluster.env("CONTAINERD_ADDRESS");
        for shim in shims(address) {
            kill("-KILL", shim);
        }
        let run_dir = self.agent.env("BERTH_RUN_DIR").to_owned();
        let parent = self.agent.env("BERTH_CGROUP_PARENT").to_owned();
        let state = self.cluster.dir().join("containerd/state");
        let namespace = self.agent.env("BERTH_CONTAINERD_NAMESPACE").to_owned();
        let script = r#"
            for group in /sys/fs/cgroup/freezer"$PARENT"/*/; do
              [ -e "$group/freezer.state" ] && echo THAWED >"$group/freezer.state"
            done
            for round in 1 2 3 4 5; do
              find /sys/fs/cgroup/*"$PARENT" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u | while read -r pid; do
                kill -KILL "$pid" 2>/dev/null || true
              done
              sleep 0.1
            done
            for pid in $(grep -lszF "$RUN_DIR" /proc/[0-9]*/cmdline | cut -d/ -f3); do
              case $(readlink "/proc/$pid/exe") in */berth*) kill -KILL "$pid" || true ;; esac
            done
            awk -v a="$RUN_DIR/" -v b="$STATE/" 'index($5, a) == 1 || index($5, b) == 1 { print $5 }' /proc/self/mountinfo |
              sort -r | while read -r mount; do umount --lazy "$mount"; done
            rm -rf --one-file-system "$RUN_DIR" "$STATE" "/run/containerd/runc/$NAMESPACE"
            ip link delete "$BRIDGE" 2>/dev/null || true
            find /sys/fs/cgroup/*"$PARENT" -depth -type d -exec rmdir {} + 2>/dev/null || true
        "#;
        run(Command::new("bash")
            .args(["-c", script])
            .env("PARENT", parent)
            .env("RUN_DIR", run_dir)
            .env("STATE", state)
            .env("NAMESPACE", namespace)
            .env("BRIDGE", self.agent.env("BERTH_BRIDGE_NAME")));
        self.cluster.up_again();
    }
}

#[tokio::test]
async fn after_a_reboot_each_bot_is_what_its_policy_and_its_files_say() {
    let mut scene = Scene::alone("reboot").await;
    let always = scene.apply(counting("always")).await;
    let never = scene.apply(counting("never").restart(RestartPolicy::Never)).await;
    let frozen = scene.apply(counting("frozen")).await;
    let stopped = scene.apply(counting("stopped")).await;
    for (name, bot) in [("always", &always), ("never", &never), ("frozen", &frozen), ("stopped", &stopped)] {
        scene.phase(name, Phase::Running).await;
        scene.started(bot, 1).await;
    }
    scene.apply(counting("frozen").paused()).await;
    scene.apply(counting("stopped").stopped()).await;
    scene.phase("frozen", Phase::Paused).await;
    scene.phase("stopped", Phase::Stopped).await;

    scene.reboot();
    scene.agent.start_again(&[]).await;

    scene.started(&always, 2).await;
    scene.phase("always", Phase::Running).await;
    scene.diary(&always).assert_starts(2, "always");
    let seen = scene.phase("never", Phase::Failed).await;
    assert_eq!(seen.status.unwrap().last_termination.unwrap().reason, "TaskLost");
    scene.diary(&never).assert_starts(1, "never");
    let seen = scene
        .ns
        .until("frozen", "Paused without memory", SOON, |bot| {
            bot.status.as_ref().is_some_and(|s| s.phase == Some(Phase::Paused) && s.kept == Some(Kept::Files))
        })
        .await;
    let conditions = seen.status.unwrap().conditions;
    assert_eq!(find(&conditions, ConditionType::Ready).unwrap().reason, Reason::MemoryLost.as_str());
    scene.diary(&frozen).assert_starts(1, "frozen");
    scene.touch("stopped").await;
    scene.phase("stopped", Phase::Stopped).await;
    scene.diary(&stopped).assert_starts(1, "stopped");

    // And all of them go on.
    scene.apply(counting("frozen")).await;
    scene.apply(counting("stopped")).await;
    for (name, bot) in [("frozen", &frozen), ("stopped", &stopped)] {
        scene.phase(name, Phase::Running).await;
        scene.started(bot, 2).await;
        scene.diary(bot).assert_starts(2, name);
    }
    scene.end().await;
}
