//! A node of its own with bots that tell on themselves, and what must hold whatever happens to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use berth::api::BotContainer;
use berth::api::bot_container::Phase;
use berth::api::ids::BotUid;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::common::{Agent, BotBuilder, Cluster, Controller, Leaks, Namespace, SOON, bot, run, wait_for};
use crate::proxy::Proxy;

/// Held for reading by tests that need the servers, for writing by those that take them down.
static SERVERS: RwLock<()> = RwLock::const_new(());

/// Who else may run.
pub enum Servers {
    /// All servers are there.
    Up(#[expect(dead_code, reason = "held")] RwLockReadGuard<'static, ()>),
    /// This test takes them down; no other runs beside it.
    Mine(#[expect(dead_code, reason = "held")] RwLockWriteGuard<'static, ()>),
}

/// A node, its agent and a namespace. Fields are dropped in this order: bots before their agent.
pub struct Scene {
    pub watch: Watch,
    pub ns: Namespace,
    pub agent: Agent,
    pub cluster: &'static Cluster,
    before: Option<Leaks>,
    servers: Servers,
}

/// What nobody owns goes within the time that a test waits.
pub const QUICK_SWEEP: (&str, &str) = ("BERTH_ORPHAN_GRACE_SECONDS", "5");

impl Scene {
    /// One beside others.
    pub async fn new(name: &str) -> Self {
        Self::with(name, Servers::Up(SERVERS.read().await), &[]).await
    }

    /// One beside others, whose agent has more environment.
    pub async fn new_with(name: &str, env: &[(&str, &str)]) -> Self {
        Self::with(name, Servers::Up(SERVERS.read().await), env).await
    }

    /// One that has all servers for itself.
    pub async fn alone(name: &str) -> Self {
        Self::with(name, Servers::Mine(SERVERS.write().await), &[QUICK_SWEEP]).await
    }

    /// One beside others, whose agent speaks to the API server through a proxy.
    pub async fn behind(name: &str, env: &[(&str, &str)]) -> (Self, Proxy) {
        let agent = Agent::prepare(Cluster::shared(), name);
        let proxy = Proxy::start(Path::new(agent.env("KUBECONFIG"))).await;
        let env = [&[("KUBECONFIG", proxy.kubeconfig())], env].concat();
        (Self::prepared(name, agent, &env).await, proxy)
    }

    /// One beside others, with an agent that was prepared and not started.
    pub async fn prepared(name: &str, mut agent: Agent, env: &[(&str, &str)]) -> Self {
        let servers = Servers::Up(SERVERS.read().await);
        Controller::shared(Cluster::shared());
        agent.start_again(env).await;
        Self::of(name, servers, agent).await
    }

    async fn with(name: &str, servers: Servers, env: &[(&str, &str)]) -> Self {
        let cluster = Cluster::shared();
        Controller::shared(cluster);
        Self::of(name, servers, Agent::start_with(cluster, name, env).await).await
    }

    async fn of(name: &str, servers: Servers, agent: Agent) -> Self {
        let cluster = Cluster::shared();
        let ns = Namespace::create(cluster, name).await;
        let watch = Watch::start(agent.env("BERTH_CGROUP_PARENT"));
        let mut scene = Self { watch, ns, agent, cluster, before: None, servers };
        // The image is there from now on, and so is the logger.
        scene.apply(counting("warm")).await;
        scene.ns.ready("warm", SOON).await;
        scene.ns.delete("warm", SOON).await;
        scene.before = Some(scene.agent.leaks());
        scene
    }

    /// Pushes the demo's image under another name as well, has it on the node, and counts anew.
    pub async fn warm(&mut self, image: &str) {
        run(std::process::Command::new("images/demo-bot/push").arg(image));
        self.apply(counting("warm-too").image(image)).await;
        self.ns.ready("warm-too", SOON).await;
        self.ns.delete("warm-too", SOON).await;
        self.before = Some(self.agent.leaks());
    }

    /// Applies a bot on this node.
    pub async fn apply(&self, bot: BotBuilder) -> BotContainer {
        self.ns.apply(bot.on(self.agent.node())).await
    }

    /// Waits for a phase that the agent has told of the newest spec.
    #[track_caller]
    pub fn phase(&self, name: &str, phase: Phase) -> impl Future<Output = BotContainer> {
        self.ns.phase(name, phase, SOON)
    }

    /// Where containerd has the bundles of this node's tasks.
    pub fn bundles(&self) -> PathBuf {
        let state = Path::new(self.agent.env("BERTH_CONTAINERD_STATE")).join("io.containerd.runtime.v2.task");
        state.join(self.agent.env("BERTH_CONTAINERD_NAMESPACE"))
    }

    /// runc's record of a bot's container.
    pub fn runc(&self, bot: &BotContainer) -> PathBuf {
        Path::new("/run/containerd/runc").join(self.agent.env("BERTH_CONTAINERD_NAMESPACE")).join(id(bot))
    }

    /// The directory on the disk that holds what a bot wrote.
    #[track_caller]
    pub fn layer(&self, bot: &BotContainer) -> PathBuf {
        // A rollback puts another in the place of the first.
        let all = self.agent.ctr(["snapshots", "list"]);
        let numbers =
            all.lines().filter_map(|line| line.strip_prefix(&format!("{}.", id(bot)))?.split_whitespace().next());
        let newest = numbers.filter_map(|number| number.parse::<u64>().ok()).max().unwrap_or(1);
        let key = format!("{}.{newest}", id(bot));
        let mounts = self.agent.ctr(["snapshots", "mounts", "/nowhere", &key]);
        let upper = mounts.split_once("upperdir=").unwrap_or_else(|| panic!("{key}: {mounts}")).1;
        PathBuf::from(upper.split([',', ' ']).next().unwrap())
    }

    /// What a bot wrote about itself.
    #[track_caller]
    pub fn diary(&self, bot: &BotContainer) -> Diary {
        Diary::read(&self.layer(bot))
    }

    /// Waits until a bot has written of its `n`th start.
    pub async fn started(&self, bot: &BotContainer, n: usize) {
        let layer = self.layer(bot);
        wait_for(format!("start {n} of {}", id(bot)), SOON, || async {
            let diary = Diary::read(&layer);
            if diary.starts >= n { Ok(()) } else { Err(format!("{diary:?}")) }
        })
        .await;
    }

    /// A number of the agent's metrics: that of the lines which begin so, added up.
    pub async fn metric(&self, begins: &str) -> f64 {
        let (_, text) = self.agent.get("/metrics").await.unwrap();
        let found = text.lines().filter(|line| line.starts_with(begins));
        found.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    /// Deletes what is left and checks what must hold in the end.
    pub async fn end(self) {
        let bots = self.ns.bots().list(&Default::default()).await.unwrap();
        for bot in bots.items {
            self.ns.delete(bot.metadata.name.as_ref().unwrap(), SOON).await;
        }
        self.nothing_left().await;
        self.watch.never_two();
    }

    /// Waits until the node is as it was before the first bot.
    pub async fn nothing_left(&self) {
        self.agent.nothing_left_since(self.before.as_ref().unwrap(), SOON).await;
        wait_for("no file of a bot left", SOON, || async {
            let left = self.files();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }

    /// Folders of bots: logs, FIFOs, mounted files, network namespaces.
    pub fn files(&self) -> Vec<PathBuf> {
        let (run, log) = (Path::new(self.agent.env("BERTH_RUN_DIR")), Path::new(self.agent.env("BERTH_LOG_DIR")));
        let dirs = [log.to_owned(), run.join("io"), run.join("files"), run.join("netns"), run.join("mnt")];
        dirs.iter().flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten()).map(|e| e.path()).collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Servers::Mine(_) = self.servers {
            // Whatever the test took down, the next one finds.
            Controller::shared(self.cluster);
        }
    }
}

/// Id of a bot's container.
#[track_caller]
pub fn id(bot: &BotContainer) -> String {
    BotUid::parse(bot.metadata.uid.as_ref().unwrap()).unwrap().container_id().to_string()
}

/// Runs before whatever a bot does: notes each start.
const DIARY: &str = "[ -s /data/starts ] || echo born >>/data/born; echo start >>/data/starts; ";

/// A bot that counts its starts, waits, and ends well on TERM.
pub fn counting(name: &str) -> BotBuilder {
    diarist(name, "trap 'echo bye >>/data/byes; exit 0' TERM; sleep 100000 & wait")
}

/// A bot that counts its starts and goes on with a script.
pub fn diarist(name: &str, then: &str) -> BotBuilder {
    bot(name).sh(&format!("{DIARY}{then}"))
}

/// What a bot wrote about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diary {
    /// How often it was started.
    pub starts: usize,
    /// How often it found nothing of an earlier life. Once, unless data was lost.
    pub births: usize,
    /// How often it ended on TERM.
    pub farewells: usize,
}

impl Diary {
    pub fn read(layer: &Path) -> Self {
        let lines = |name: &str| fs::read_to_string(layer.join("data").join(name)).unwrap_or_default().lines().count();
        Self { starts: lines("starts"), births: lines("born"), farewells: lines("byes") }
    }

    /// Exactly so many starts, and no data lost.
    #[track_caller]
    pub fn assert_starts(&self, starts: usize, why: impl std::fmt::Display) {
        assert_eq!((self.starts, self.births), (starts, starts.min(1)), "{why}");
    }

    /// No data lost.
    #[track_caller]
    pub fn assert_whole(&self, why: impl std::fmt::Display) {
        assert_eq!(self.births, self.starts.min(1), "{why}: {self:?}");
    }
}

/// Looks all the time whether a bot has two first processes.
pub struct Watch {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Bots by their cgroup, and the first processes that each had.
    firsts: BTreeMap<String, BTreeSet<u32>>,
    two: Vec<String>,
}

impl Watch {
    fn start(parent: &str) -> Self {
        // Bots' cgroups bear their ids, whoever made them; a task that containerd forgot is there as well.
        let v1 = Path::new("/sys/fs/cgroup/pids");
        let root = if v1.exists() { v1 } else { Path::new("/sys/fs/cgroup") };
        let root = root.join(parent.trim_start_matches('/'));
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let thread = std::thread::spawn({
            let (stop, seen) = (stop.clone(), seen.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    look(&root, &mut seen.lock().unwrap());
                    std::thread::park_timeout(Duration::from_millis(10));
                }
            }
        });
        Self { stop, seen, thread: Some(thread) }
    }

    /// That no bot ever had two first processes at a time. A watch that saw none at all fails.
    #[track_caller]
    pub fn never_two(&self) {
        let seen = self.seen.lock().unwrap();
        assert!(!seen.firsts.is_empty(), "no process of any bot was seen");
        assert!(seen.two.is_empty(), "two at a time: {:?}", seen.two);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn look(root: &Path, seen: &mut Seen) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("berth-") {
            continue;
        }
        let procs = fs::read_to_string(entry.path().join("cgroup.procs")).unwrap_or_default();
        let firsts: Vec<u32> = procs.lines().filter_map(|pid| pid.parse().ok()).filter(|&pid| is_first(pid)).collect();
        if firsts.len() > 1 {
            seen.two.push(format!("{name}: {firsts:?}"));
        }
        if !firsts.is_empty() {
            seen.firsts.entry(name).or_default().extend(firsts);
        }
    }
}

/// Whether a process is alive, the first of its pid namespace, and past runc's own preparation.
fn is_first(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let inner = field("NSpid:").split_whitespace().collect::<Vec<_>>();
    let runc = field("Name:").starts_with("runc");
    inner.len() > 1 && inner.last() == Some(&"1") && !field("State:").starts_with(['Z', 'X']) && !runc
}
