//! A disk that is really full, out of inodes or read-only: nothing half-made counts, each cause has its reason, what runs
//! runs on, and with room again everything goes on by itself.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use berth::api::bot_container::{Phase, RestartPolicy};
use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::condition::{ConditionType, Reason, find};
use berth::api::{BotContainer, BotNode, BotSnapshot, BotSnapshotSpec};
use kube::Api;
use rustix::fs::FallocateFlags;

use crate::common::{Agent, BotBuilder, Cluster, Controller, Namespace, SOON, run, summary, wait_for};
use crate::scene::{Diary, counting, id};

/// What a disk has too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scarce {
    Bytes,
    Inodes,
}

/// A small file system that a test fills. Unmounted when dropped.
struct Disk {
    at: PathBuf,
}

impl Disk {
    /// ext4 on a loop device.
    fn ext4(image: &Path, at: &Path, bytes: u64, inodes: u64) -> Self {
        fs::create_dir_all(at).unwrap();
        fs::File::create(image).unwrap().set_len(bytes).unwrap();
        // Nothing is set apart for root, which all of us are.
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0", "-N", &inodes.to_string()]).arg(image));
        run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(at));
        Self { at: at.to_owned() }
    }

    fn tmpfs(at: &Path, bytes: u64, inodes: u64) -> Self {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={bytes},nr_inodes={inodes},mode=0755");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at));
        Self { at: at.to_owned() }
    }

    /// Takes all that is left.
    fn fill(&self, scarce: Scarce) {
        let dir = self.at.join("filler");
        fs::create_dir_all(&dir).unwrap();
        match scarce {
            Scarce::Bytes => {
                let file = fs::File::create(dir.join("file")).unwrap();
                let (mut size, mut end) = (1 << 20, 0);
                while size >= 4096 {
                    match rustix::fs::fallocate(file.as_fd(), FallocateFlags::empty(), end, size) {
                        Ok(()) => end += size,
                        Err(_) => size /= 2,
                    }
                }
            }
            Scarce::Inodes => {
                let made = (0..).take_while(|n| fs::File::create(dir.join(n.to_string())).is_ok()).count();
                assert!(made > 0, "there was nothing to take");
            }
        }
        let more = fs::create_dir(self.at.join("one-more"));
        if scarce == Scarce::Inodes {
            assert!(more.is_err(), "it is not full");
        }
        let _ = fs::remove_dir(self.at.join("one-more"));
    }

    fn room(&self) {
        fs::remove_dir_all(self.at.join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if !mounts.contains(&format!(" {} ", self.at.display())) {
            return;
        }
        let done = Command::new("umount").arg("--lazy").arg(&self.at).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} is still mounted", self.at.display());
        }
    }
}

/// A containerd of a test's own, with its root on a disk of its own. Killed when dropped.
struct OwnContainerd {
    child: Child,
    socket: PathBuf,
}

impl OwnContainerd {
    async fn start(cluster: &Cluster, at: &Path, root: &Path, mark: &str) -> Self {
        let (state, socket) = (at.join("c"), at.join("c.sock"));
        fs::create_dir_all(&state).unwrap();
        let config = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\nimports = []\ndisabled_plugins = [\
             \"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\", \
             \"io.containerd.podsandbox.controller.v1.podsandbox\", \"io.containerd.internal.v1.opt\", \
             \"io.containerd.nri.v1.nri\"]\n[grpc]\n  address = {socket:?}\n"
        );
        fs::write(at.join("c.toml"), config).unwrap();
        let log = fs::File::options().create(true).append(true).open(cluster.dir().join(format!("log/{mark}.log")));
        let log = log.unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(at.join("c.toml"))
            // How `hack/cluster down` finds it when this process is killed.
            .env("BERTH_PART", format!("{}:{mark}", cluster.dir().display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let own = Self { child, socket };
        wait_for("a containerd of the test's own", SOON, || async {
            let output = own.command("default", &["version"]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() { Ok(()) } else { Err(said) }
        })
        .await;
        own
    }

    fn command(&self, namespace: &str, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).args(["--namespace", namespace]).args(args);
        command
    }
}

impl Drop for OwnContainerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A node on small disks. Dropped in this order: bots, containerd, disks, and the agent with all that is left.
struct Small {
    ns: Namespace,
    containerd: Option<OwnContainerd>,
    disk: Disk,
    agent: Agent,
    cluster: &'static Cluster,
}

impl Small {
    async fn apply(&self, bot: BotBuilder) -> BotContainer {
        self.ns.apply(bot.on(self.agent.node())).await
    }

    #[track_caller]
    fn phase(&self, name: &str, phase: Phase) -> impl Future<Output = BotContainer> {
        self.ns.phase(name, phase, SOON * 2)
    }

    /// Waits for a reason of Ready.
    #[track_caller]
    fn says(&self, name: &str, reason: Reason) -> impl Future<Output = BotContainer> {
        self.ns.until(name, reason, SOON, move |bot| {
            let conditions = bot.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
            find(conditions, ConditionType::Ready).is_some_and(|ready| ready.reason == reason.as_str())
        })
    }

    async fn pressed(&self, wanted: &str) {
        let api: Api<BotNode> = Api::all(self.ns.client());
        wait_for(format!("DiskPressure {wanted}"), SOON, || async {
            let node = api.get(self.agent.node()).await.map_err(|e| e.to_string())?;
            let conditions = node.status.map(|status| status.conditions).unwrap_or_default();
            let found = conditions.iter().find(|c| c.type_ == "DiskPressure").map(|c| c.status.clone());
            if found.as_deref() == Some(wanted) { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    }

    async fn metric(&self, begins: &str) -> f64 {
        let (_, text) = self.agent.get("/metrics").await.unwrap();
        let found = text.lines().filter(|line| line.starts_with(begins));
        found.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    fn ctr(&self, args: &[&str]) -> String {
        let namespace = self.agent.env("BERTH_CONTAINERD_NAMESPACE");
        run(&mut self.containerd.as_ref().unwrap().command(namespace, args))
    }

    fn diary(&self, bot: &BotContainer) -> Diary {
        let key = format!("{}.1", id(bot));
        let mounts = self.ctr(&["snapshots", "mounts", "/nowhere", &key]);
        let upper = mounts.split_once("upperdir=").unwrap_or_else(|| panic!("{key}: {mounts}")).1;
        Diary::read(Path::new(upper.split([',', ' ']).next().unwrap()))
    }

    async fn started(&self, bot: &BotContainer, n: usize) {
        wait_for(format!("start {n} of {}", id(bot)), SOON, || async {
            let diary = self.diary(bot);
            if diary.starts >= n { Ok(()) } else { Err(format!("{diary:?}")) }
        })
        .await;
        assert_eq!(self.diary(bot).starts, n);
        self.diary(bot).assert_whole(id(bot));
    }
}

async fn began(agent: &Agent) -> bool {
    matches!(agent.get("/readyz").await, Ok((200, _)))
}

fn at(agent: &Agent) -> PathBuf {
    Path::new(agent.env("KUBECONFIG")).parent().unwrap().to_owned()
}

fn alive(pid: i64) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

fn pid(bot: &BotContainer) -> i64 {
    bot.status.as_ref().and_then(|s| s.task.as_ref()).unwrap_or_else(|| panic!("no task: {}", summary(bot))).pid
}

/// Pushes the demo's bot with another script, so that its layers are other ones.
fn push_another(image: &str, words: &str) {
    let dir = tempfile::tempdir().unwrap();
    for file in ["bot", "push"] {
        fs::copy(Path::new("images/demo-bot").join(file), dir.path().join(file)).unwrap();
    }
    let bot = dir.path().join("bot");
    let text = fs::read_to_string(&bot).unwrap().replace("I am", words);
    fs::write(&bot, text).unwrap();
    run(Command::new(dir.path().join("push")).arg(image));
}

/// Harm done: a bot with restartPolicy Never whose task could not be made for want of room counted as run and failed for
/// good; a node whose disk filled up said so only up to five minutes later, or not at all when containerd could not even
/// remove an image; without inodes it never did.
#[tokio::test]
async fn a_full_disk_below_containerd_is_told_and_all_goes_on_when_there_is_room() {
    let cluster = Cluster::shared();
    Controller::shared(cluster);
    let mut agent = Agent::prepare(cluster, "full");
    let dir = at(&agent);
    let disk = Disk::ext4(&dir.join("disk.img"), &dir.join("disk"), 48 << 20, 3000);
    let root = dir.join("disk/root");
    let mark = format!("containerd-{}", agent.node());
    let containerd = OwnContainerd::start(cluster, &dir, &root, &mark).await;
    let address = containerd.socket.to_str().unwrap().to_owned();
    let state = dir.join("c").to_str().unwrap().to_owned();
    agent
        .start_again(&[
            ("BERTH_CONTAINERD_ADDRESS", &address),
            ("BERTH_CONTAINERD_STATE", &state),
            ("BERTH_DISK_PRESSURE_PERCENT", "10"),
        ])
        .await;
    let ns = Namespace::create(cluster, "full").await;
    let small = Small { ns, containerd: Some(containerd), disk, agent, cluster };
    let steady = small.apply(counting("steady")).await;
    let process = pid(&small.phase("steady", Phase::Running).await);
    small.started(&steady, 1).await;
    let edited = small.apply(counting("edited")).await;
    small.phase("edited", Phase::Running).await;
    small.started(&edited, 1).await;
    small.pressed("False").await;

    for (round, scarce) in [Scarce::Bytes, Scarce::Inodes].into_iter().enumerate() {
        let named = |name: &str| format!("{name}-{round}");
        let image = format!("{}/berth/{}:{round}", small.cluster.env("BERTH_REGISTRY"), small.ns.name());
        push_another(&image, &format!("Round {round}, I am"));
        // Placed while the node is still taken for sound.
        small.apply(counting(&named("late")).stopped()).await;
        small.apply(counting(&named("once")).restart(RestartPolicy::Never).stopped()).await;
        small.apply(counting(&named("pulls")).image(&image).stopped()).await;
        for name in ["late", "once", "pulls"] {
            small.phase(&named(name), Phase::Stopped).await;
        }
        small.disk.fill(scarce);
        small.pressed("True").await;
        let failed = small.metric("berth_agent_errors_total{reason=\"StorageFailed\"}").await;
        let late = small.apply(counting(&named("late"))).await;
        let once = small.apply(counting(&named("once")).restart(RestartPolicy::Never)).await;
        let pulls = small.apply(counting(&named("pulls")).image(&image)).await;
        small.apply(counting("edited").env("ROUND", &round.to_string())).await;
        for name in ["late", "once", "pulls"] {
            let told = small.says(&named(name), Reason::StorageFailed).await;
            let ready = find(&told.status.as_ref().unwrap().conditions, ConditionType::Ready).unwrap().clone();
            assert!(ready.message.contains("no space left on device"), "{ready:?}");
            assert_eq!(told.status.unwrap().phase, Some(Phase::BackOff), "{ready:?}");
        }
        assert!(small.metric("berth_agent_errors_total{reason=\"StorageFailed\"}").await > failed);
        assert!(alive(process), "{scarce:?}: the steady bot ended");
        // A version is not half-made either, and is made once there is room.
        let version = named("version");
        let snapshots: Api<BotSnapshot> = small.ns.api();
        let asked = BotSnapshot::new(&version, BotSnapshotSpec::of("steady"));
        snapshots.create(&Default::default(), &asked).await.unwrap();
        let told = |snapshot: BotSnapshot| {
            let status = snapshot.status.unwrap_or_default();
            let ready = find(&status.conditions, ConditionType::Ready).cloned();
            (status.phase, ready.map(|c| c.reason).unwrap_or_default())
        };
        wait_for("the snapshot says that the disk is full", SOON, || async {
            match told(snapshots.get(&version).await.unwrap()) {
                (_, reason) if reason == "StorageFailed" => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        // It waits, rather than tries all the time.
        let steps = small.metric("berth_agent_step_seconds_count").await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let more = small.metric("berth_agent_step_seconds_count").await - steps;
        assert!(more < 40.0, "{more} steps in two seconds on a disk that stays full");

        small.disk.room();
        for (name, bot) in [("late", &late), ("once", &once), ("pulls", &pulls)] {
            small.phase(&named(name), Phase::Running).await;
            small.started(bot, 1).await;
        }
        wait_for("the snapshot Ready", SOON, || async {
            match told(snapshots.get(&version).await.unwrap()) {
                (Some(SnapshotPhase::Ready), _) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        let seen = small.phase("edited", Phase::Running).await;
        let environ = fs::read(format!("/proc/{}/environ", pid(&seen))).unwrap();
        assert!(String::from_utf8_lossy(&environ).contains(&format!("ROUND={round}")), "{scarce:?}: not edited");
        small.diary(&edited).assert_whole("edited");
        small.pressed("False").await;
        for name in ["late", "once", "pulls"] {
            small.ns.delete(&named(name), SOON).await;
        }
    }
    assert!(alive(process));
    small.started(&steady, 1).await;
    for name in ["steady", "edited"] {
        small.ns.delete(name, SOON).await;
    }
    wait_for("nothing of bots in containerd", SOON, || async {
        let left: Vec<String> = [["containers", "list", "-q"], ["tasks", "list", "-q"], ["leases", "list", "-q"]]
            .iter()
            .map(|what| small.ctr(what))
            .collect();
        if left.concat().is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

/// The agent's own folders: network records and addresses on one disk, FIFOs, mounted files and namespaces on another.
#[tokio::test]
async fn full_and_read_only_disks_below_the_agents_folders_are_told_and_mended() {
    let cluster = Cluster::shared();
    Controller::shared(cluster);
    let mut agent = Agent::prepare(cluster, "folders");
    let dir = at(&agent);
    let run_dir = Disk::tmpfs(&dir.join("run"), 2 << 20, 400);
    let state = Disk::ext4(&dir.join("state.img"), &dir.join("state"), 4 << 20, 256);
    // Not a letter can be written where the agent is to begin: it says so and waits, and an end would help nobody.
    run(Command::new("mount").args(["-o", "remount,ro"]).arg(&state.at));
    agent.spawn_again(&[]);
    let storage = "berth_agent_errors_total{reason=\"StorageFailed\"}";
    wait_for("a word of the disk", SOON, || async {
        let (_, metrics) = agent.get("/metrics").await?;
        let told = metrics.lines().any(|line| line.starts_with(storage));
        if told { Ok(()) } else { Err("not told".to_owned()) }
    })
    .await;
    assert!(!began(&agent).await, "ready on a disk that takes no letter");
    run(Command::new("mount").args(["-o", "remount,rw"]).arg(&state.at));
    wait_for("the agent at work", SOON, || async {
        if began(&agent).await { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;

    let ns = Namespace::create(cluster, "folders").await;
    let small = Small { ns, containerd: None, disk: state, agent, cluster };
    small.apply(counting("steady")).await;
    let process = pid(&small.phase("steady", Phase::Running).await);
    let cases: [(&str, &Disk, Option<Scarce>); 5] = [
        ("state-bytes", &small.disk, Some(Scarce::Bytes)),
        ("state-inodes", &small.disk, Some(Scarce::Inodes)),
        ("state-ro", &small.disk, None),
        ("run-bytes", &run_dir, Some(Scarce::Bytes)),
        ("run-inodes", &run_dir, Some(Scarce::Inodes)),
    ];
    for (name, disk, scarce) in cases {
        // The agent's lock is open for writing: only the folder of the records can become read-only.
        let records = small.disk.at.join("network");
        match scarce {
            Some(scarce) => disk.fill(scarce),
            None => {
                run(Command::new("mount").arg("--bind").arg(&records).arg(&records));
                run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(&records));
            }
        }
        let started = small.apply(counting(name).restart(RestartPolicy::Never)).await;
        let told = small.says(name, Reason::StorageFailed).await;
        let ready = find(&told.status.as_ref().unwrap().conditions, ConditionType::Ready).unwrap().clone();
        assert!(ready.message.contains("os error"), "{name}: {ready:?}");
        assert!(alive(process), "{name}: the steady bot ended");
        match scarce {
            Some(_) => disk.room(),
            None => drop(run(Command::new("umount").arg(&records))),
        }
        let seen = small.phase(name, Phase::Running).await;
        assert!(seen.status.unwrap().network.unwrap().ip.is_some());
        wait_for(format!("{name} at work"), SOON, || async {
            let key = format!("{}.1", id(&started));
            let mounts = small.agent.ctr(["snapshots", "mounts", "/nowhere", &key]);
            let upper = mounts.split_once("upperdir=").unwrap().1.split([',', ' ']).next().unwrap();
            let diary = Diary::read(Path::new(upper));
            if diary.starts == 1 { Ok(()) } else { Err(format!("{diary:?}")) }
        })
        .await;
        small.ns.delete(name, SOON).await;
    }
    assert!(alive(process));
    small.ns.delete("steady", SOON).await;
    let left: Vec<_> = ["network", "leases"].iter().flat_map(|dir| walk(&small.disk.at.join(dir))).collect();
    assert!(left.iter().all(|path| !path.contains("berth-")), "{left:?}");
}

/// Files below a folder, with the container's id that host-local notes in them.
fn walk(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(walk(&path)),
            false => {
                let text = fs::read_to_string(&path).unwrap_or_default();
                found.push(format!("{}: {}", path.display(), text.lines().next().unwrap_or_default()));
            }
        }
    }
    found
}
