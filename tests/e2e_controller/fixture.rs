//! A real etcd and kube-apiserver on free loopback ports, real controllers, and agents played through the API.
//!
//! One control plane serves all tests of this file; since the controller looks at the whole cluster, tests take turns
//! (`Cluster::turn`) and each leaves the cluster empty for the next. The servers die with the test process.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use berth::api::{
    AGENT, BotContainer, BotNode, BotRecord, BotSnapshot, FINALIZER, NODE_LEASE_NAMESPACE, SYSTEM_NAMESPACE,
};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{CustomResourceDefinition, JSONSchemaProps};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use serde_json::{Value, json};

use crate::proxy::Proxy;

/// Seconds; short, so that a node's loss need not be waited for long.
pub const NODE_LEASE: i32 = 3;

struct Servers {
    kubeconfig: PathBuf,
    root: PathBuf,
    etcd: Vec<String>,
    apiserver: Vec<String>,
    pids: Mutex<Vec<u32>>,
}

static SERVERS: OnceLock<Arc<Servers>> = OnceLock::new();
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A free port at the moment of asking.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn assets() -> PathBuf {
    if let Some(dir) = std::env::var_os("KUBEBUILDER_ASSETS") {
        return dir.into();
    }
    let cache = PathBuf::from(std::env::var_os("HOME").expect("HOME is not set")).join(".cache/berth/control-plane");
    let mut found: Vec<_> = std::fs::read_dir(&cache)
        .unwrap_or_else(|e| panic!("no control plane in {}: {e}; set KUBEBUILDER_ASSETS", cache.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.join("kube-apiserver").exists() && dir.join("etcd").exists())
        .collect();
    found.sort();
    found.pop().expect("no control plane was built")
}

/// Starts a server that dies with this process; its pid.
fn spawn(root: &Path, name: &str, program: &Path, args: &[String]) -> u32 {
    let log = std::fs::File::options().create(true).append(true).open(root.join(format!("{name}.log"))).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program).args(args);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let (sender, started) = std::sync::mpsc::channel();
    // The signal comes at the death of the thread that forked, so that one stays.
    std::thread::spawn(move || {
        let mut child = command.spawn().expect("setpriv is missing");
        sender.send(child.id()).unwrap();
        let _ = child.wait();
        loop {
            std::thread::park();
        }
    });
    started.recv().unwrap()
}

fn start_servers(name: &str) -> Arc<Servers> {
    // What the run before left is gone.
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", env!("CARGO_CRATE_NAME")));
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir_all(&root).unwrap();
    let (etcd, peer, port) = (free_port(), free_port(), free_port());
    let dir = |name: &str| root.join(name).display().to_string();
    let etcd_args = vec![
        format!("--data-dir={}", dir("etcd")),
        format!("--listen-client-urls=http://127.0.0.1:{etcd}"),
        format!("--advertise-client-urls=http://127.0.0.1:{etcd}"),
        format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
        "--log-level=error".into(),
    ];
    let made = Command::new("openssl").args(["genrsa", "-out", &dir("sa.key"), "2048"]).output().unwrap();
    assert!(made.status.success(), "openssl: {made:?}");
    std::fs::write(root.join("tokens.csv"), "admin-token,admin,admin,system:masters\n").unwrap();
    let apiserver_args = vec![
        format!("--etcd-servers=http://127.0.0.1:{etcd}"),
        "--bind-address=127.0.0.1".into(),
        "--endpoint-reconciler-type=none".into(),
        format!("--secure-port={port}"),
        format!("--cert-dir={}", dir("certs")),
        format!("--token-auth-file={}", dir("tokens.csv")),
        format!("--service-account-key-file={}", dir("sa.key")),
        format!("--service-account-signing-key-file={}", dir("sa.key")),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        "--service-cluster-ip-range=10.0.0.0/24".into(),
        "--authorization-mode=RBAC".into(),
        "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition".into(),
    ];
    let kubeconfig = root.join("kubeconfig");
    std::fs::write(
        &kubeconfig,
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {
                "server": format!("https://127.0.0.1:{port}"), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "c", "user": {"token": "admin-token"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        })
        .to_string(),
    )
    .unwrap();
    let servers = Servers { kubeconfig, root, etcd: etcd_args, apiserver: apiserver_args, pids: Mutex::default() };
    servers.start();
    Arc::new(servers)
}

impl Servers {
    fn start(&self) {
        let assets = assets();
        let etcd = spawn(&self.root, "etcd", &assets.join("etcd"), &self.etcd);
        let apiserver = spawn(&self.root, "kube-apiserver", &assets.join("kube-apiserver"), &self.apiserver);
        *self.pids.lock().unwrap() = vec![apiserver, etcd];
    }

    /// Kills both, as a machine that fails does; which they were.
    fn kill(&self) -> Vec<u32> {
        let pids: Vec<u32> = self.pids.lock().unwrap().drain(..).collect();
        for pid in &pids {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
        pids
    }

    /// Kills both and waits until they are gone.
    async fn end(&self) {
        for pid in self.kill() {
            eventually("the end of a server", Duration::from_secs(20), || async move {
                let gone = !Path::new(&format!("/proc/{pid}/fd/0")).exists();
                gone.then_some(()).ok_or(format!("{pid} lives"))
            })
            .await;
        }
    }
}

/// Waits for a state and says what was last seen.
pub async fn eventually<T, F>(what: &str, limit: Duration, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let start = Instant::now();
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) if start.elapsed() > limit => panic!("{what}: not within {limit:?}; last seen: {seen}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// A turn on the shared control plane, in a namespace of its own.
pub struct Cluster {
    pub client: Client,
    pub namespace: String,
    leader: String,
    servers: Arc<Servers>,
    _turn: tokio::sync::MutexGuard<'static, ()>,
}

impl Cluster {
    pub async fn turn() -> Self {
        let turn = TURN.lock().await;
        Self::on(SERVERS.get_or_init(|| start_servers("controller")).clone(), turn).await
    }

    /// A turn on a control plane of its own.
    #[allow(dead_code, reason = "not every suite needs it")]
    pub async fn own(name: &str) -> Self {
        let turn = TURN.lock().await;
        Self::on(start_servers(name), turn).await
    }

    /// Keeps what etcd has now under a name.
    #[allow(dead_code, reason = "not every suite needs it")]
    pub async fn back_up(&self, name: &str) {
        self.servers.end().await;
        self.copy("etcd", name);
        self.servers.start();
        self.serves().await;
    }

    /// Makes etcd what it was when it was kept under that name.
    #[allow(dead_code, reason = "not every suite needs it")]
    pub async fn restore(&self, name: &str) {
        self.servers.end().await;
        std::fs::remove_dir_all(self.servers.root.join("etcd")).unwrap();
        self.copy(name, "etcd");
        self.servers.start();
        self.serves().await;
    }

    fn copy(&self, from: &str, to: &str) {
        let done =
            Command::new("cp").arg("-a").arg(self.servers.root.join(from)).arg(self.servers.root.join(to)).status();
        assert!(done.unwrap().success());
    }

    async fn serves(&self) {
        eventually("kube-apiserver", Duration::from_secs(60), || async {
            let bots = self.client.request_text(http_get("/apis/berth.dev/v1alpha1/botcontainers")).await;
            bots.map(drop).map_err(|e| {
                let log = std::fs::read_to_string(self.servers.root.join("kube-apiserver.log")).unwrap_or_default();
                format!("{e}; its log ends: {}", &log[log.len().saturating_sub(2000)..])
            })
        })
        .await;
    }

    async fn on(servers: Arc<Servers>, turn: tokio::sync::MutexGuard<'static, ()>) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = Kubeconfig::read_from(&servers.kubeconfig).unwrap();
        let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap();
        let client = Client::try_from(config).unwrap();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let this = Self {
            client,
            namespace: format!("test-{number}"),
            leader: format!("test-{number}"),
            servers,
            _turn: turn,
        };
        eventually("kube-apiserver", Duration::from_secs(60), || async {
            let request = http_get("/readyz");
            this.client.request_text(request).await.map(drop).map_err(|e| {
                let log = std::fs::read_to_string(this.servers.root.join("kube-apiserver.log")).unwrap_or_default();
                format!("{e}; its log ends: {}", &log[log.len().saturating_sub(2000)..])
            })
        })
        .await;
        this.ensure_crds().await;
        for name in [SYSTEM_NAMESPACE, NODE_LEASE_NAMESPACE, &this.namespace] {
            let api: Api<Namespace> = Api::all(this.client.clone());
            let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            api.patch(name, &PatchParams::apply("test"), &Patch::Apply(&body)).await.unwrap();
        }
        this.clear().await;
        this
    }

    async fn ensure_crds(&self) {
        let api: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        for mut crd in berth::api::crd::all() {
            for version in &mut crd.spec.versions {
                let schema = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut()).unwrap();
                conditions_are_a_map(schema);
            }
            let name = crd.name_any();
            api.patch(&name, &PatchParams::apply("test").force(), &Patch::Apply(&crd)).await.unwrap();
            eventually(&name, Duration::from_secs(20), || async {
                let live = api.get(&name).await.map_err(|e| e.to_string())?;
                let conditions = live.status.and_then(|s| s.conditions).unwrap_or_default();
                let served = conditions.iter().any(|c| c.type_ == "Established" && c.status == "True");
                served.then_some(()).ok_or(format!("{conditions:?}"))
            })
            .await;
        }
    }

    /// Takes away all bots, records, nodes and heartbeats of the test before.
    async fn clear(&self) {
        let bots: Api<BotContainer> = Api::all(self.client.clone());
        for bot in bots.list(&ListParams::default()).await.unwrap() {
            let api = self.bots_in(&bot.namespace().unwrap());
            let _ = api.delete(&bot.name_any(), &DeleteParams::default()).await;
            let none = json!({"metadata": {"finalizers": null}});
            let _ = api.patch(&bot.name_any(), &PatchParams::default(), &Patch::Merge(&none)).await;
        }
        let snapshots: Api<BotSnapshot> = Api::all(self.client.clone());
        for snapshot in snapshots.list(&ListParams::default()).await.unwrap() {
            let api: Api<BotSnapshot> = Api::namespaced(self.client.clone(), &snapshot.namespace().unwrap());
            let _ = api.delete(&snapshot.name_any(), &DeleteParams::default()).await;
            let none = json!({"metadata": {"finalizers": null}});
            let _ = api.patch(&snapshot.name_any(), &PatchParams::default(), &Patch::Merge(&none)).await;
        }
        let records: Api<BotRecord> = Api::all(self.client.clone());
        for record in records.list(&ListParams::default()).await.unwrap() {
            let api: Api<BotRecord> = Api::namespaced(self.client.clone(), &record.namespace().unwrap());
            let _ = api.delete(&record.name_any(), &DeleteParams::default()).await;
        }
        let (all, any) = (ListParams::default(), DeleteParams::default());
        self.bot_nodes().delete_collection(&any, &all).await.unwrap();
        self.nodes().delete_collection(&any, &all).await.unwrap();
        self.leases().delete_collection(&any, &all).await.unwrap();
    }

    pub fn bots(&self) -> Api<BotContainer> {
        self.bots_in(&self.namespace)
    }

    fn bots_in(&self, namespace: &str) -> Api<BotContainer> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub fn records(&self) -> Api<BotRecord> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn bot_nodes(&self) -> Api<BotNode> {
        Api::all(self.client.clone())
    }

    pub fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    pub fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), NODE_LEASE_NAMESPACE)
    }

    pub fn leader_lease(&self) -> (Api<Lease>, &str) {
        (Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE), &self.leader)
    }

    /// A proxy in front of the API server.
    pub async fn proxy(&self) -> Proxy {
        Proxy::start(&self.servers.kubeconfig).await
    }

    /// Starts a controller; it is killed when dropped.
    pub async fn controller(&self) -> Controller {
        self.start(&self.servers.kubeconfig, &[]).await
    }

    /// One with more arguments.
    #[allow(dead_code, reason = "not every suite needs it")]
    pub async fn controller_with(&self, arguments: &[&str]) -> Controller {
        self.start(&self.servers.kubeconfig, arguments).await
    }

    /// One that speaks to the API server through a proxy.
    pub async fn controller_through(&self, proxy: &Proxy) -> Controller {
        self.start(Path::new(proxy.kubeconfig()), &[]).await
    }

    async fn start(&self, kubeconfig: &Path, arguments: &[&str]) -> Controller {
        let servers = &self.servers;
        let port = free_port();
        let log = servers.root.join(format!("{}-{port}.log", self.leader));
        let file = std::fs::File::create(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_berth"))
            .args(["controller", "--log-filter", "info,berth=debug", "--cluster-cidr", "10.208.0.0/20"])
            .args(["--leader-name", &self.leader, "--health-address", &format!("127.0.0.1:{port}")])
            .args(["--leader-lease-seconds", "3", "--leader-renew-seconds", "2", "--leader-retry-seconds", "1"])
            .args(arguments)
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        let controller = Controller { child, log, port };
        eventually("a controller that has its lists", Duration::from_secs(20), || async {
            let log = controller.log();
            log.contains("all lists are done").then_some(()).ok_or(log)
        })
        .await;
        controller
    }

    /// Plays the agent of a node: BotNode, Lease and heartbeat.
    pub async fn agent(&self, name: &str, allocatable: Value) -> Agent {
        let agent = Agent { cluster: self.client.clone(), name: name.to_owned(), beat: None };
        let body =
            json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotNode", "metadata": {"name": name}, "spec": {}});
        self.bot_nodes().patch(name, &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await.unwrap();
        let mut agent = agent.alive().await;
        agent.report(allocatable).await;
        agent
    }

    /// Applies a bot; `spec` adds to a minimal one.
    pub async fn bot(&self, name: &str, spec: Value) -> BotContainer {
        self.bot_with(false, name, spec).await
    }

    /// With its finalizer from birth, as charts/berth/templates/finalizers.yaml has it, or not: this cluster is without that policy, as
    /// an API server that has none.
    pub async fn bot_with(&self, finalizer: bool, name: &str, spec: Value) -> BotContainer {
        let mut bot = bot(name, spec);
        bot.metadata.finalizers = finalizer.then(|| vec![FINALIZER.to_owned()]);
        self.bots().create(&PostParams::default(), &bot).await.unwrap()
    }

    /// Waits until a bot has its record.
    pub async fn recorded(&self, bot: &BotContainer) -> BotRecord {
        let name = bot.spec.bot_id.clone().or_else(|| bot.uid()).unwrap();
        eventually(&format!("the record {name}"), Duration::from_secs(40), || async {
            let record = self.records().get(&name).await.map_err(|e| e.to_string())?;
            let mine = record.spec.holder.as_ref().is_some_and(|holder| Some(&holder.uid) == bot.uid().as_ref());
            mine.then(|| record.clone()).ok_or_else(|| format!("{record:?}"))
        })
        .await
    }

    /// Waits until a bot is bound; on which node.
    pub async fn bound(&self, name: &str) -> String {
        eventually(&format!("{name} bound"), Duration::from_secs(15), || async {
            let bot = self.bots().get(name).await.map_err(|e| e.to_string())?;
            bot.status.as_ref().and_then(|s| s.node_name.clone()).ok_or_else(|| show(&bot))
        })
        .await
    }

    /// Waits until a condition of a bot has this status and reason; its message.
    pub async fn condition(&self, name: &str, type_: &str, status: &str, reason: &str) -> String {
        eventually(&format!("{name} {type_}={status} {reason}"), Duration::from_secs(20), || async {
            let bot = self.bots().get(name).await.map_err(|e| e.to_string())?;
            let conditions = bot.status.as_ref().map_or(&[][..], |s| &s.conditions);
            let found = conditions.iter().find(|c| c.type_ == type_ && c.status == status && c.reason == reason);
            found.map(|c| c.message.clone()).ok_or_else(|| show(&bot))
        })
        .await
    }

    /// Waits until a bot is gone.
    pub async fn gone(&self, name: &str) {
        eventually(&format!("{name} gone"), Duration::from_secs(20), || async {
            match self.bots().get_opt(name).await.map_err(|e| e.to_string())? {
                None => Ok(()),
                Some(bot) => Err(show(&bot)),
            }
        })
        .await;
    }

    /// How often the API server took a write of a resource so far: successful ones, read from its own metrics.
    pub async fn writes(&self, group: &str, resources: &[&str]) -> u64 {
        let text = self.client.request_text(http_get("/metrics")).await.unwrap();
        let mut sum = 0.0;
        for line in text.lines().filter(|l| l.starts_with("apiserver_request_total{")) {
            let has = |key: &str, value: &str| line.contains(&format!("{key}=\"{value}\""));
            let write = ["POST", "PUT", "PATCH", "APPLY", "DELETE"].iter().any(|verb| has("verb", verb));
            let done = line.contains("code=\"20");
            if write && done && has("group", group) && resources.iter().any(|r| has("resource", r)) {
                sum += line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
            }
        }
        sum as u64
    }

    /// What the agent says of a bot, by force.
    pub async fn agent_says(&self, name: &str, phase: &str, conditions: Value) {
        let body = json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
            "metadata": {"name": name, "namespace": self.namespace},
            "status": {"phase": phase, "observedGeneration": 1, "conditions": conditions},
        });
        self.bots().patch_status(name, &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await.unwrap();
    }

    /// The agent says that a bot runs.
    pub async fn agent_says_running(&self, name: &str) {
        let conditions = json!([said("Ready", "True", "AsAsked"), said("Running", "True", "Running")]);
        self.agent_says(name, "Running", conditions).await;
    }

    /// The agent says that nothing of a bot is left.
    pub async fn agent_says_removed(&self, name: &str) {
        let conditions = json!([said("Ready", "False", "Terminating"), said("Running", "False", "Removed")]);
        self.agent_says(name, "Terminating", conditions).await;
    }

    /// Events of a reason about an object.
    pub async fn events(&self, namespace: &str, about: &str, reason: &str) -> Vec<String> {
        let api: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(self.client.clone(), namespace);
        let all = api.list(&ListParams::default()).await.unwrap();
        all.into_iter()
            .filter(|e| e.reason.as_deref() == Some(reason))
            .filter(|e| e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(about))
            .map(|e| e.note.unwrap_or_default())
            .collect()
    }
}

fn said(type_: &str, status: &str, reason: &str) -> Value {
    json!({"type": type_, "status": status, "reason": reason, "message": "", "lastTransitionTime": "2026-11-24T00:00:00Z"})
}

/// A bot; `spec` adds to a minimal one.
pub fn bot(name: &str, spec: Value) -> BotContainer {
    let mut all = json!({"image": "docker.io/library/busybox:1.36"});
    for (key, value) in spec.as_object().unwrap() {
        all[key] = value.clone();
    }
    let body =
        json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": name}, "spec": all});
    serde_json::from_value(body).unwrap()
}

/// What a person would look at first.
pub fn show(bot: &BotContainer) -> String {
    let meta = &bot.metadata;
    format!(
        "finalizers {:?}, deleted {:?}, status {}",
        meta.finalizers,
        meta.deletion_timestamp,
        serde_json::to_string(&bot.status).unwrap()
    )
}

fn http_get(path: &str) -> axum::http::Request<Vec<u8>> {
    axum::http::Request::get(path).body(Vec::new()).unwrap()
}

/// `x-kubernetes-list-type: map` on every list of conditions, where the schema does not say so yet.
fn conditions_are_a_map(schema: &mut JSONSchemaProps) {
    for (name, field) in schema.properties.iter_mut().flatten() {
        if name == "conditions" && field.x_kubernetes_list_type.is_none() {
            field.x_kubernetes_list_type = Some("map".into());
            field.x_kubernetes_list_map_keys = Some(vec!["type".into()]);
        }
        conditions_are_a_map(field);
    }
}

/// A real controller process.
pub struct Controller {
    child: Child,
    log: PathBuf,
    port: u16,
}

impl Controller {
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn signal(&self, signal: &str) {
        let done = Command::new("kill").args([&format!("-{signal}"), &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    /// A number of its metrics: that of the lines which begin so, added up.
    pub async fn metric(&self, begins: &str) -> f64 {
        let text = reqwest::get(format!("http://127.0.0.1:{}/metrics", self.port)).await.unwrap().text().await.unwrap();
        let found = text.lines().filter(|line| line.starts_with(begins));
        found.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    /// Whether it has not ended.
    pub fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Whether it took the lead since it began.
    pub fn led(&self) -> bool {
        self.log().contains("leading")
    }

    /// Waits for the end; whether it was a good one.
    pub async fn ended(&mut self) -> bool {
        eventually("the controller's end", Duration::from_secs(15), || {
            let ended = self.child.try_wait().unwrap();
            async move { ended.map(|s| s.success()).ok_or_else(|| "it runs".to_owned()) }
        })
        .await
    }
}

/// Its own control plane goes with it.
impl Drop for Servers {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            eprintln!("--- {} ends:\n{}", self.log.display(), &log[log.len().saturating_sub(6000)..]);
        }
    }
}

/// An agent played through the API.
pub struct Agent {
    cluster: Client,
    pub name: String,
    beat: Option<tokio::task::JoinHandle<()>>,
}

impl Agent {
    /// Begins its heartbeat.
    pub async fn alive(mut self) -> Self {
        let api: Api<Lease> = Api::namespaced(self.cluster.clone(), NODE_LEASE_NAMESPACE);
        let name = self.name.clone();
        renew(&api, &name).await;
        self.beat = Some(tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(700)).await;
                renew(&api, &name).await;
            }
        }));
        self
    }

    /// Ends its heartbeat: the node is lost to us.
    pub fn die(&mut self) {
        if let Some(beat) = self.beat.take() {
            beat.abort();
        }
    }

    /// Reports the node Ready with what it may give out.
    pub async fn report(&mut self, allocatable: Value) {
        let api: Api<BotNode> = Api::all(self.cluster.clone());
        let body = json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotNode", "metadata": {"name": self.name},
            "status": {"snapshotters": ["overlayfs"], "runtimeHandlers": ["runc"], "allocatable": allocatable,
                "capacity": allocatable, "conditions": [said("Ready", "True", "AgentReady")]},
        });
        api.patch_status(&self.name, &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await.unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.die();
    }
}

async fn renew(api: &Api<Lease>, name: &str) {
    let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(k8s_openapi::jiff::Timestamp::now());
    let body = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": NODE_LEASE, "renewTime": now},
    });
    let _ = api.patch(name, &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await;
}

/// How many of a list are on each node.
pub fn count_by_node(bots: &[BotContainer]) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    for bot in bots {
        if let Some(node) = bot.status.as_ref().and_then(|s| s.node_name.clone()) {
            *all.entry(node).or_default() += 1;
        }
    }
    all
}
