//! The harness: a real API server, a real containerd, and Berth's parts as processes.
//!
//! ```text
//! Cluster::shared()  one control plane, containerd and registry for the whole run; started by `make test`, else by the
//!    |               first test that asks (then it stays for the next run; `make test-down` removes it)
//!    |-- Namespace   one a test: its bots; tells what it knows when the test fails; deleted at the end
//!    |-- Agent       a node of its own (token, containerd namespace, bridge, cgroup), `kill -9` and back
//!    '-- Controller  the one that all tests share, or a replica of a test's own
//! ```
//!
//! Bind the parts before the namespace, so that the namespace is dropped first and its bots are taken down by an agent
//! that still runs:
//!
//! ```ignore
//! let cluster = Cluster::shared();
//! Controller::shared(cluster);
//! let agent = Agent::start(cluster, "crash").await;
//! let ns = Namespace::create(cluster, "crash").await;
//! ns.apply(bot("web").on(agent.node())).await;
//! ```
//!
//! `BERTH_KEEP=1` keeps what a test made, for a look.

// Each test binary uses a part of this.
#![allow(dead_code)]
// Helpers of tests may panic as tests do; clippy's allowance stops at `#[test]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use berth::api::bot_container::{OperatingMode, Phase, RestartPolicy};
use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::condition::{ConditionType, find};
use berth::api::{BotContainer, BotContainerSpec, BotSnapshot};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{EnvVar, Namespace as KubeNamespace};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The binary under test.
pub const BERTH: &str = env!("CARGO_BIN_EXE_berth");

/// How long a thing may take that is known to take a second or two. Generous: CI has two slow cores.
pub const SOON: Duration = Duration::from_secs(60);

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A few characters that no other run has, for names.
fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    format!("{:x}{:x}", (time << 16 | u64::from(std::process::id() & 0xffff)) & 0xfff_ffff_ffff, {
        NEXT.fetch_add(1, Ordering::Relaxed)
    })
}

/// Runs a command to its end; a failure is the test's, with all that the command said.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = both(&output);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Asks until the answer is `Ok`. The `Err` says what was seen; the last one is in the panic when `limit` has passed.
#[track_caller]
pub fn wait_for<T, F, A>(what: impl fmt::Display, limit: Duration, ask: F) -> impl Future<Output = T>
where
    F: FnMut() -> A,
    A: Future<Output = Result<T, String>>,
{
    wait_at(Location::caller(), what.to_string(), limit, ask)
}

async fn wait_at<T, F, A>(caller: &Location<'_>, what: String, limit: Duration, mut ask: F) -> T
where
    F: FnMut() -> A,
    A: Future<Output = Result<T, String>>,
{
    let start = Instant::now();
    let mut seen = "nothing: the first look did not come back".to_owned();
    loop {
        // A look that hangs is as late as one that fails.
        let left = limit.saturating_sub(start.elapsed());
        match tokio::time::timeout(left.max(Duration::from_millis(1)), ask()).await {
            Ok(Ok(value)) => return value,
            Ok(Err(last)) => seen = last,
            Err(_) => {}
        }
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}, asked at {caller}; last seen: {seen}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

// ---- Cluster --------------------------------------------------------------------------------------------------------

/// A cluster of `hack/cluster`.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    env: BTreeMap<String, String>,
    temporary: bool,
}

impl Cluster {
    /// The one of this run.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(|| {
            let dir = match std::env::var_os("BERTH_TEST_CLUSTER") {
                Some(env) => PathBuf::from(env).parent().expect("BERTH_TEST_CLUSTER names an env file").to_owned(),
                None => repository().join("target/test-cluster"),
            };
            let cluster = Self::up(dir, &[], false);
            run(Command::new(repository().join("images/demo-bot/push")).arg(cluster.image()));
            cluster
        })
    }

    /// One of a test's own, in a temporary folder; removed at the end.
    pub fn own() -> Self {
        // Short: sockets lie in it.
        Self::up(std::env::temp_dir().join(format!("berth-{}", unique())), &[], true)
    }

    /// One of a test's own with kubelets, a scheduler and all of Kubernetes' controllers, and nothing of Berth's.
    pub fn with_kubelets(nodes: &[&str]) -> Self {
        let options: Vec<&str> = nodes.iter().flat_map(|node| ["--kubelet", node]).collect();
        Self::up(std::env::temp_dir().join(format!("berth-{}", unique())), &options, true)
    }

    fn up(dir: PathBuf, options: &[&str], temporary: bool) -> Self {
        run(hack_cluster("up", &dir).args(["--berth", BERTH]).args(options));
        let env = read_env(&dir.join("env"));
        Self { dir, env, temporary }
    }

    /// Starts again whichever part died.
    pub fn up_again(&self) {
        run(hack_cluster("up", &self.dir).args(["--berth", BERTH]));
    }

    /// Keeps what etcd holds, as a backup of it would. A cluster of a test's own.
    pub async fn back_up(&self) {
        self.stop_servers().await;
        run(Command::new("cp").arg("--archive").arg(self.dir.join("etcd")).arg(self.dir.join("etcd.kept")));
        self.up_again();
    }

    /// Back to the backup; all that came after it never was.
    pub async fn restore(&self) {
        self.stop_servers().await;
        std::fs::remove_dir_all(self.dir.join("etcd")).unwrap();
        std::fs::rename(self.dir.join("etcd.kept"), self.dir.join("etcd")).unwrap();
        self.up_again();
    }

    async fn stop_servers(&self) {
        for part in ["kube-apiserver", "etcd"] {
            let pid = self.pid(part);
            kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
            wait_for(format!("{part} gone"), SOON, || async {
                let lives = Path::new(&format!("/proc/{pid}/exe")).exists();
                if lives { Err(format!("{pid} lives")) } else { Ok(()) }
            })
            .await;
        }
    }

    /// Stops and removes everything.
    pub fn down(&self) {
        run(&mut hack_cluster("down", &self.dir));
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A value of the env file.
    #[track_caller]
    pub fn env(&self, name: &str) -> &str {
        self.env.get(name).unwrap_or_else(|| panic!("{}/env has no {name}", self.dir.display()))
    }

    /// The demo's bot, in this cluster's registry: serves its name on port 8080, counts its starts in `/data/starts`.
    pub fn image(&self) -> String {
        format!("{}/berth/demo-bot:1", self.env("BERTH_REGISTRY"))
    }

    /// Pid of a part, from its pid file.
    #[track_caller]
    pub fn pid(&self, part: &str) -> u32 {
        let path = self.dir.join(format!("run/{part}.pid"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.trim().parse().unwrap_or_else(|e| panic!("{}: {text:?}: {e}", path.display()))
    }

    /// The administrator's client. One a test: a client belongs to the runtime that it was made in.
    pub async fn client(&self) -> kube::Client {
        client(Path::new(self.env("KUBECONFIG"))).await
    }

    /// A command with the cluster's env, as a person has it who sourced the file.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, value) in &self.env {
            if name != "PATH" {
                command.env(name, value);
            }
        }
        command
    }

    /// `kubectl`, as administrator; its output.
    #[track_caller]
    pub fn kubectl<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> String {
        run(self.command(self.dir.join("bin/kubectl")).args(args))
    }

    /// `ctr` in a namespace of the cluster's containerd; its output.
    #[track_caller]
    pub fn ctr<'a>(&self, namespace: &str, args: impl IntoIterator<Item = &'a str>) -> String {
        run(self.command("ctr").args(["--namespace", namespace]).args(args))
    }

    /// What bots left on the machine, in all nodes of this cluster.
    #[track_caller]
    pub fn leaks(&self) -> Leaks {
        Leaks::parse(&run(&mut self.command(repository().join("hack/leaks"))))
    }

    /// The client of whoever has this token.
    pub async fn client_with(&self, token: &str) -> kube::Client {
        let mut config = config(Path::new(self.env("KUBECONFIG"))).await;
        config.auth_info = AuthInfo { token: Some(token.to_owned().into()), ..AuthInfo::default() };
        kube::Client::try_from(config).unwrap()
    }

    /// An account's client, from a kubeconfig below the cluster's folder.
    pub async fn client_of(&self, kubeconfig: &str) -> kube::Client {
        client(&self.dir.join(kubeconfig)).await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.temporary && !keep() && self.dir.exists() {
            let output = hack_cluster("down", &self.dir).output();
            if !std::thread::panicking() {
                let output = output.unwrap();
                assert!(output.status.success(), "hack/cluster down: {}", both(&output));
            }
        }
    }
}

async fn client(kubeconfig: &Path) -> kube::Client {
    kube::Client::try_from(config(kubeconfig).await).unwrap()
}

async fn config(kubeconfig: &Path) -> kube::Config {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap()
}

/// `hack/cluster VERB DIR`.
pub fn hack_cluster(verb: &str, dir: &Path) -> Command {
    let mut command = Command::new(repository().join("hack/cluster"));
    command.arg(verb).arg(dir).stdin(Stdio::null());
    command
}

/// The program of a Go module in tools/, built once.
#[track_caller]
pub fn go_tool(name: &str) -> PathBuf {
    PathBuf::from(run(Command::new(repository().join("hack/go-tool")).arg(name)))
}

/// That the answer is 403, or 422 where what the API server says first is that no one may do that.
#[track_caller]
pub fn refused_or_invalid<T: std::fmt::Debug>(what: &str, answer: kube::Result<T>) {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 403 || status.code == 422 => {}
        other => panic!("{what}: expected 403 or 422, got {other:?}"),
    }
}

/// Asks for a token that is bound to a Node, and is good for so long.
pub fn token_request(node: Option<&str>, seconds: i64) -> TokenRequest {
    let bound = node.map(|node| BoundObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(node.to_owned()),
        uid: None,
    });
    let spec =
        TokenRequestSpec { expiration_seconds: Some(seconds), bound_object_ref: bound, ..TokenRequestSpec::default() };
    TokenRequest { spec: Some(spec), ..TokenRequest::default() }
}

/// Pids of a part and of all that it has started, by the mark that they have from it.
pub fn marked(dir: &Path, part: &str) -> Vec<u32> {
    let mark = format!("BERTH_PART={}:{part}", dir.display());
    let pids =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    })
    .collect()
}

fn keep() -> bool {
    std::env::var_os("BERTH_KEEP").is_some_and(|v| !v.is_empty())
}

/// The assignments of an env file, which are `export NAME=VALUE` with nothing to expand but in PATH.
fn read_env(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let assignments = text.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
    assignments.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

// ---- Leaks ----------------------------------------------------------------------------------------------------------

/// What `hack/leaks` counted: containers, tasks, snapshots, leases, blobs, images, netns, veth, addresses, mounts,
/// shims, loggers, cgroups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaks(BTreeMap<String, u64>);

impl Leaks {
    #[track_caller]
    fn parse(text: &str) -> Self {
        let count = |line: &str| -> Option<(String, u64)> {
            let (name, count) = line.split_once(' ')?;
            Some((name.to_owned(), count.parse().ok()?))
        };
        Self(text.lines().map(|line| count(line).unwrap_or_else(|| panic!("hack/leaks printed {line:?}"))).collect())
    }

    /// One of the counts.
    #[track_caller]
    pub fn count(&self, name: &str) -> u64 {
        *self.0.get(name).unwrap_or_else(|| panic!("hack/leaks counts no {name}"))
    }

    /// What is more or less than before, for example `tasks 0 -> 1`; nothing when nothing is.
    pub fn since(&self, before: &Self) -> Result<(), String> {
        let differs: Vec<String> = self
            .0
            .iter()
            .filter(|(name, count)| before.0.get(*name) != Some(count))
            .map(|(name, count)| format!("{name} {} -> {count}", before.0.get(name).copied().unwrap_or_default()))
            .collect();
        if differs.is_empty() { Ok(()) } else { Err(differs.join(", ")) }
    }
}

// ---- Parts ----------------------------------------------------------------------------------------------------------

/// A subcommand of `berth` as a process, with its environment and its log.
#[derive(Debug)]
struct Part {
    name: String,
    subcommand: &'static str,
    env: BTreeMap<String, String>,
    log: PathBuf,
    health: SocketAddr,
    child: Option<Child>,
}

impl Part {
    fn new(name: String, subcommand: &'static str, mut env: BTreeMap<String, String>, dir: &Path) -> Self {
        // Free now; the part says so itself should somebody else be quicker.
        let health = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        env.insert("BERTH_HEALTH_ADDRESS".to_owned(), health.to_string());
        let filter = std::env::var("BERTH_LOG_FILTER").unwrap_or_else(|_| "info,berth=debug".to_owned());
        env.insert("BERTH_LOG_FILTER".to_owned(), filter);
        Self { log: dir.join(format!("{name}.log")), name, subcommand, env, health, child: None }
    }

    /// Starts the process and waits until `/readyz` says so.
    async fn start(&mut self) {
        self.spawn();
        let limit = Instant::now() + SOON;
        loop {
            let answer = get(self.health, "/readyz").await;
            if matches!(&answer, Ok((200, _))) {
                return;
            }
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().unwrap()) {
                self.child = None;
                panic!("{} ended before it was ready: {status}\n{}", self.name, tail(&self.log, 30));
            }
            assert!(Instant::now() < limit, "{} is not ready: {answer:?}\n{}", self.name, tail(&self.log, 30));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts the process.
    fn spawn(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = std::fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let child = Command::new(BERTH)
            .arg(self.subcommand)
            .envs(&self.env)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// Waits until it has died of KILL; `None` says that it lives on.
    async fn killed(&mut self, limit: Duration) -> Option<()> {
        let limit = Instant::now() + limit;
        loop {
            let child = self.child.as_mut().unwrap_or_else(|| panic!("{} does not run", self.name));
            if let Some(status) = child.try_wait().unwrap() {
                self.child = None;
                let signal = std::os::unix::process::ExitStatusExt::signal(&status);
                assert_eq!(signal, Some(9), "{} ended with {status}\n{}", self.name, tail(&self.log, 30));
                return Some(());
            }
            if Instant::now() > limit {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name)).id()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        // Our child and not waited for yet, so the pid is nobody else's.
        kill_process(pid, signal).unwrap();
    }

    fn kill_9(&mut self) {
        self.signal(Signal::KILL);
        self.child.take().unwrap().wait().unwrap();
    }

    /// TERM; it must end by itself and say that all was well.
    async fn stop(&mut self) {
        self.signal(Signal::TERM);
        let mut child = self.child.take().unwrap();
        let limit = Instant::now() + Duration::from_secs(30);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > limit {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{} did not end within 30 s after TERM\n{}", self.name, tail(&self.log, 30));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert!(status.success(), "{} ended with {status} after TERM\n{}", self.name, tail(&self.log, 30));
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An agent as a process, on a node of its own: Node object and bound token, containerd namespace, bridge, cgroup.
#[derive(Debug)]
pub struct Agent {
    cluster: &'static Cluster,
    node: String,
    part: Part,
}

impl Agent {
    /// Makes the node, starts the agent and waits until it is ready. The node's name begins with `name`.
    pub async fn start(cluster: &'static Cluster, name: &str) -> Self {
        Self::start_with(cluster, name, &[]).await
    }

    /// The same with more environment, for example a fail point.
    pub async fn start_with(cluster: &'static Cluster, name: &str, env: &[(&str, &str)]) -> Self {
        let mut agent = Self::prepare(cluster, name);
        agent.part.env.extend(env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())));
        agent.part.start().await;
        agent
    }

    /// Makes the node; the agent does not run yet.
    pub fn prepare(cluster: &'static Cluster, name: &str) -> Self {
        let node = format!("{name}-{}", unique());
        let file = run(hack_cluster("node", &cluster.dir).arg(&node).arg(format!("berth-{node}")));
        let file = Path::new(&file);
        let mut env = read_env(file);
        // How `hack/cluster down` finds it when this process is killed.
        env.insert("BERTH_PART".to_owned(), format!("{}:agent-{node}", cluster.dir.display()));
        let part = Part::new(format!("agent-{node}"), "agent", env, &cluster.dir.join("log"));
        Self { cluster, node, part }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// A value of the agent's environment, for example `BERTH_STATE_DIR`.
    #[track_caller]
    pub fn env(&self, name: &str) -> &str {
        self.part.env.get(name).unwrap_or_else(|| panic!("an agent has no {name}"))
    }

    /// The agent's pid.
    pub fn pid(&self) -> u32 {
        self.part.pid()
    }

    /// The agent's own client: what its token may do.
    pub async fn client(&self) -> kube::Client {
        client(Path::new(self.env("KUBECONFIG"))).await
    }

    /// How the agent reaches the API server.
    pub async fn config(&self) -> kube::Config {
        config(Path::new(self.env("KUBECONFIG"))).await
    }

    /// KILL, without a chance to tidy up.
    pub fn kill_9(&mut self) {
        self.part.kill_9();
    }

    /// TERM: it must end by itself, with success.
    pub async fn stop(&mut self) {
        self.part.stop().await;
    }

    /// Sends a signal, for example STOP and CONT.
    pub fn signal(&self, signal: Signal) {
        self.part.signal(signal);
    }

    /// Starts it again after `kill_9` or `stop`, with what `env` adds.
    pub async fn start_again(&mut self, env: &[(&str, &str)]) {
        self.part.env.extend(env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())));
        self.part.start().await;
    }

    /// Starts it again after `kill_9` or `stop`, with what `env` adds, and does not wait: it may die on its way.
    pub fn spawn_again(&mut self, env: &[(&str, &str)]) {
        self.part.env.extend(env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())));
        self.part.spawn();
    }

    /// Waits until it has died of KILL, for example at a fail point.
    pub async fn killed(&mut self, why: impl fmt::Display, limit: Duration) {
        let killed = self.part.killed(limit).await;
        assert!(killed.is_some(), "{}: it should have died of {why} within {limit:?}", self.part.name);
    }

    /// TERM and start.
    pub async fn restart(&mut self) {
        self.part.stop().await;
        self.part.start().await;
    }

    /// A second agent of this node, as after a node's DaemonSet was installed twice. It is started, and not waited for.
    pub fn twin(&self) -> Twin {
        let mut env = self.part.env.clone();
        env.insert("BERTH_PART".to_owned(), format!("{}:twin-{}", self.cluster.dir.display(), self.node));
        let mut part = Part::new(format!("twin-{}", self.node), "agent", env, &self.cluster.dir.join("log"));
        part.spawn();
        Twin { part }
    }

    /// `/healthz`, `/readyz` or `/metrics`: status and body.
    pub async fn get(&self, path: &str) -> Result<(u16, String), String> {
        get(self.part.health, path).await
    }

    /// `ctr` in this node's namespace.
    #[track_caller]
    pub fn ctr<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> String {
        self.cluster.ctr(self.env("BERTH_CONTAINERD_NAMESPACE"), args)
    }

    /// What bots left on this node.
    #[track_caller]
    pub fn leaks(&self) -> Leaks {
        Leaks::parse(&run(self.cluster.command(repository().join("hack/leaks")).arg(&self.node)))
    }

    /// Waits until the counts are those of `before`: what is removed goes a moment after the object.
    pub async fn nothing_left_since(&self, before: &Leaks, limit: Duration) {
        wait_for(format!("node {} as it was before", self.node), limit, || async { self.leaks().since(before) }).await;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "---- agent of {}, its last words ({}):\n{}",
                self.node,
                self.part.log.display(),
                tail(&self.part.log, 60)
            );
        }
        if keep() {
            // It goes on, for a look.
            self.part.child = None;
            return;
        }
        if self.part.child.is_some() {
            self.part.kill_9();
        }
        let output = hack_cluster("node-gone", &self.cluster.dir).arg(&self.node).output().unwrap();
        if !output.status.success() {
            eprintln!("node {} was not removed: {}", self.node, both(&output));
        }
    }
}

/// A second agent of one node; killed when dropped.
#[derive(Debug)]
pub struct Twin {
    part: Part,
}

impl Twin {
    /// `/healthz`, `/readyz` or `/metrics`: status and body.
    pub async fn get(&self, path: &str) -> Result<(u16, String), String> {
        get(self.part.health, path).await
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- {}, its last words:\n{}", self.part.name, tail(&self.part.log, 40));
        }
    }
}

/// A controller as a process.
#[derive(Debug)]
pub struct Controller {
    part: Part,
}

impl Controller {
    /// Sees to it that the cluster's own controller runs, from the binary under test.
    pub fn shared(cluster: &'static Cluster) {
        run(hack_cluster("up", &cluster.dir).args(["--berth", BERTH, "--controller"]));
    }

    /// Starts another replica.
    pub async fn start(cluster: &'static Cluster) -> Self {
        let mut env = read_env(&cluster.dir.join("controller/env"));
        let name = format!("controller-{}", unique());
        env.insert("BERTH_PART".to_owned(), format!("{}:{name}", cluster.dir.display()));
        let mut part = Part::new(name, "controller", env, &cluster.dir.join("log"));
        part.start().await;
        Self { part }
    }

    /// KILL, without a chance to tidy up.
    pub fn kill_9(&mut self) {
        self.part.kill_9();
    }

    /// TERM: it must end by itself, with success.
    pub async fn stop(&mut self) {
        self.part.stop().await;
    }

    /// Sends a signal, for example STOP and CONT.
    pub fn signal(&self, signal: Signal) {
        self.part.signal(signal);
    }

    /// Starts it again after `kill_9` or `stop`.
    pub async fn start_again(&mut self) {
        self.part.start().await;
    }

    /// `/healthz`, `/readyz` or `/metrics`: status and body.
    pub async fn get(&self, path: &str) -> Result<(u16, String), String> {
        get(self.part.health, path).await
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- {}, its last words:\n{}", self.part.name, tail(&self.part.log, 40));
        }
    }
}

/// GET over plain HTTP: status and body.
pub async fn get(address: SocketAddr, path: &str) -> Result<(u16, String), String> {
    let failed = |e: std::io::Error| format!("http://{address}{path}: {e}");
    let ask = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = match tokio::time::timeout(Duration::from_secs(5), ask).await {
        Ok(answer) => answer.map_err(failed)?,
        Err(_) => return Err(format!("http://{address}{path}: no answer in 5 s")),
    };
    let bad = || format!("http://{address}{path}: answered {answer:?}");
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(bad)?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(bad)?;
    Ok((status, body.to_owned()))
}

fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

// ---- Namespace ------------------------------------------------------------------------------------------------------

/// A namespace of one test.
pub struct Namespace {
    cluster: &'static Cluster,
    name: String,
    client: kube::Client,
}

impl Namespace {
    /// Makes one whose name begins with `name`.
    pub async fn create(cluster: &'static Cluster, name: &str) -> Self {
        let client = cluster.client().await;
        let name = format!("{name}-{}", unique());
        let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
        let namespace = KubeNamespace { metadata, ..KubeNamespace::default() };
        Api::<KubeNamespace>::all(client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
        Self { cluster, name, client }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Deletes it with all that is in it, and waits until it is gone.
    pub async fn end(&self) {
        let api: Api<KubeNamespace> = Api::all(self.client.clone());
        api.delete(&self.name, &DeleteParams::default()).await.unwrap();
        wait_for(format!("namespace {} gone", self.name), SOON * 2, || async {
            match api.get_opt(&self.name).await {
                Ok(None) => Ok(()),
                Ok(Some(left)) => Err(format!("{:?}", left.status)),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
    }

    /// The administrator's client.
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Objects of a kind in this namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.name)
    }

    /// The bots.
    pub fn bots(&self) -> Api<BotContainer> {
        self.api()
    }

    /// `kubectl apply` of a bot, server-side; without an image of its own it is the demo's.
    pub async fn apply(&self, bot: BotBuilder) -> BotContainer {
        self.try_apply(bot).await.unwrap()
    }

    /// The same where the API server may refuse it.
    pub async fn try_apply(&self, bot: BotBuilder) -> kube::Result<BotContainer> {
        let bot = bot.build(self.cluster);
        let name = bot.metadata.name.clone().unwrap();
        self.bots().patch(&name, &PatchParams::apply("berth-test").force(), &Patch::Apply(&bot)).await
    }

    /// Deletes a bot and waits until it is gone.
    pub async fn delete(&self, name: &str, limit: Duration) {
        let uid = match self.bots().get(name).await.unwrap().metadata.uid {
            Some(uid) => uid,
            None => panic!("{name} has no uid"),
        };
        self.bots().delete(name, &DeleteParams::default()).await.unwrap();
        wait_for(format!("{}/{name} gone", self.name), limit, || async {
            match self.bots().get_opt(name).await {
                Ok(Some(bot)) if bot.metadata.uid.as_ref() == Some(&uid) => Err(summary(&bot)),
                Ok(_) => Ok(()),
                Err(e) => Err(e.to_string()),
            }
        })
        .await;
    }

    /// Waits until `holds` is true of a bot; gives it as it was then.
    #[track_caller]
    pub fn until(
        &self,
        name: &str,
        what: impl fmt::Display,
        limit: Duration,
        holds: impl Fn(&BotContainer) -> bool,
    ) -> impl Future<Output = BotContainer> {
        let caller = Location::caller();
        let what = format!("{}/{name}: {what}", self.name);
        async move {
            let (bots, holds) = (&self.bots(), &holds);
            let ask = || async move {
                match bots.get_opt(name).await {
                    Ok(Some(bot)) if holds(&bot) => Ok(bot),
                    Ok(Some(bot)) => Err(summary(&bot)),
                    Ok(None) => Err("no such object".to_owned()),
                    Err(e) => Err(e.to_string()),
                }
            };
            wait_at(caller, what, limit, ask).await
        }
    }

    /// Waits for a phase, seen of the newest spec.
    #[track_caller]
    pub fn phase(&self, name: &str, phase: Phase, limit: Duration) -> impl Future<Output = BotContainer> {
        self.until(name, format!("phase {phase:?}"), limit, move |bot| {
            current(bot) && bot.status.as_ref().is_some_and(|s| s.phase == Some(phase))
        })
    }

    /// Waits for `Ready`, seen of the newest spec.
    #[track_caller]
    pub fn ready(&self, name: &str, limit: Duration) -> impl Future<Output = BotContainer> {
        self.until(name, "Ready", limit, |bot| {
            let conditions = bot.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
            current(bot) && find(conditions, ConditionType::Ready).is_some_and(|c| c.status == "True")
        })
    }

    /// The snapshots.
    pub fn snapshots(&self) -> Api<BotSnapshot> {
        self.api()
    }

    /// Waits for a phase of a snapshot.
    #[track_caller]
    pub fn snapshot(&self, name: &str, phase: SnapshotPhase) -> impl Future<Output = BotSnapshot> {
        let (api, name) = (self.snapshots(), name.to_owned());
        wait_for(format!("snapshot {}/{name}: {phase:?}", self.name), SOON, move || {
            let (api, name) = (api.clone(), name.clone());
            async move {
                match api.get_opt(&name).await {
                    Ok(Some(s)) if s.status.as_ref().and_then(|s| s.phase) == Some(phase) => Ok(s),
                    Ok(Some(s)) => Err(serde_json::to_string(&s.status).unwrap()),
                    Ok(None) => Err("no such object".to_owned()),
                    Err(e) => Err(e.to_string()),
                }
            }
        })
    }

    /// Waits until a snapshot is gone.
    pub async fn no_snapshot(&self, name: &str) {
        let api = self.snapshots();
        wait_for(format!("snapshot {}/{name} gone", self.name), SOON, || async {
            match api.get_opt(name).await {
                Ok(None) => Ok(()),
                Ok(Some(s)) => Err(serde_json::to_string(&s.status).unwrap()),
                Err(e) => Err(e.to_string()),
            }
        })
        .await;
    }

    /// What is known of this namespace, for a test that failed.
    fn explain(&self) -> String {
        let kubectl = self.cluster.dir.join("bin/kubectl");
        let show = |program: &Path, args: &[&str]| {
            let output = self.cluster.command(program).args(args).output();
            let said = output.map(|o| both(&o)).unwrap_or_else(|e| e.to_string());
            format!("---- {} {}\n{said}", program.display(), args.join(" "))
        };
        let conditions = concat!(
            r#"-ojsonpath={range .items[*]}{.metadata.name}: {.status.phase} on {.status.nodeName}{"\n"}"#,
            r#"{range .status.conditions[*]}  {.type}={.status} {.reason}: {.message}{"\n"}{end}{end}"#
        );
        let mut text = vec![
            show(&kubectl, &["get", "botcontainers", "-n", &self.name, conditions]),
            show(&kubectl, &["get", "events", "-n", &self.name, "--sort-by=.metadata.creationTimestamp"]),
        ];
        let namespaces = self.cluster.command("ctr").args(["namespaces", "list", "-q"]).output();
        let namespaces = namespaces.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        for namespace in namespaces.lines() {
            for what in [["tasks", "list"], ["snapshots", "tree"]] {
                text.push(show(Path::new("ctr"), &["-n", namespace, what[0], what[1]]));
            }
        }
        let controller = self.cluster.dir.join("log/controller.log");
        text.push(format!("---- {}\n{}", controller.display(), tail(&controller, 40)));
        text.join("\n")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.explain());
        }
        if keep() {
            eprintln!("kept: namespace {} of {}", self.name, self.cluster.dir.join("env").display());
            return;
        }
        let kubectl = |args: [&str; 4]| {
            let mut command = self.cluster.command(self.cluster.dir.join("bin/kubectl"));
            let output = command.args(["--namespace", &self.name]).args(args).output().unwrap();
            if !output.status.success() {
                eprintln!("namespace {}: {args:?}: {}", self.name, both(&output));
            }
        };
        // Waits for the bots, while their agent still runs, and for nothing else: the namespace's own deletion looks for
        // every kind of object that there is, which takes seconds.
        kubectl(["delete", "botcontainers", "--all", "--timeout=30s"]);
        kubectl(["delete", "namespace", &self.name, "--wait=false"]);
    }
}

/// Whether status speaks of the newest spec.
fn current(bot: &BotContainer) -> bool {
    bot.status.as_ref().is_some_and(|s| s.observed_generation == bot.metadata.generation)
}

/// A bot's state in a line, for the message of a wait that ran out.
pub fn summary(bot: &BotContainer) -> String {
    let Some(status) = &bot.status else { return "no status".to_owned() };
    let conditions = status.conditions.iter().map(|c| format!("{}={} {}: {}", c.type_, c.status, c.reason, c.message));
    format!(
        "phase {:?} on {:?}, generation {:?} of {:?}, {} restarts, deleted {:?}; {}",
        status.phase,
        status.node_name,
        status.observed_generation,
        bot.metadata.generation,
        status.restart_count.unwrap_or_default(),
        bot.metadata.deletion_timestamp.as_ref().map(|t| t.0),
        conditions.collect::<Vec<_>>().join("; ")
    )
}

// ---- Bots -----------------------------------------------------------------------------------------------------------

/// A BotContainer in the making: `bot("web").stopped().on("node-1")`.
#[derive(Clone, Debug)]
pub struct BotBuilder(BotContainer);

/// A bot of this name; of the demo's image unless it gets another.
pub fn bot(name: &str) -> BotBuilder {
    let spec: BotContainerSpec = serde_json::from_value(serde_json::json!({"image": ""})).unwrap();
    BotBuilder(BotContainer::new(name, spec)).env("BOT_NAME", name)
}

impl BotBuilder {
    /// Another image than the demo's.
    pub fn image(mut self, image: impl Into<String>) -> Self {
        self.0.spec.image = image.into();
        self
    }

    /// Replaces the entrypoint.
    pub fn command<'a>(mut self, command: impl IntoIterator<Item = &'a str>) -> Self {
        self.0.spec.command = command.into_iter().map(str::to_owned).collect();
        self
    }

    /// A shell script as its process 1.
    pub fn sh(self, script: &str) -> Self {
        self.command(["/bin/sh", "-c", script])
    }

    /// An environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        let value = Some(value.to_owned());
        self.0.spec.env.push(EnvVar { name: name.to_owned(), value, value_from: None });
        self
    }

    /// `operatingMode: Stopped`.
    pub fn stopped(self) -> Self {
        self.mode(OperatingMode::Stopped)
    }

    /// `operatingMode: Paused`.
    pub fn paused(self) -> Self {
        self.mode(OperatingMode::Paused)
    }

    /// Any `operatingMode`.
    pub fn mode(mut self, mode: OperatingMode) -> Self {
        self.0.spec.operating_mode = mode;
        self
    }

    /// Only on this node.
    pub fn on(mut self, node: &str) -> Self {
        self.0.spec.node_name = Some(node.to_owned());
        self
    }

    /// Under this identity.
    pub fn id(mut self, id: &str) -> Self {
        self.0.spec.bot_id = Some(id.to_owned());
        self
    }

    /// What happens when the process ends by itself.
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.0.spec.restart_policy = policy;
        self
    }

    /// Seconds between TERM and KILL.
    pub fn grace(mut self, seconds: i64) -> Self {
        self.0.spec.termination_grace_period_seconds = seconds;
        self
    }

    /// A limit: `cpu`, `memory` or `pids`.
    pub fn limit(mut self, name: &str, quantity: &str) -> Self {
        let resources = self.0.spec.resources.get_or_insert_default();
        resources.limits.insert(name.to_owned(), Quantity(quantity.to_owned()));
        self
    }

    /// Whatever has no word of its own here.
    pub fn with(mut self, change: impl FnOnce(&mut BotContainerSpec)) -> Self {
        change(&mut self.0.spec);
        self
    }

    /// The object.
    pub fn build(mut self, cluster: &Cluster) -> BotContainer {
        if self.0.spec.image.is_empty() {
            self.0.spec.image = cluster.image();
        }
        self.0
    }
}
