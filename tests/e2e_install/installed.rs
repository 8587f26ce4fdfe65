//! A cluster that Berth is installed on.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use berth::api::{BotContainer, BotNode, SYSTEM_NAMESPACE};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

use crate::common::{self, Cluster, SOON, go_tool, run, wait_for};

/// The node whose machine is this one.
pub const NODE: &str = "node-1";

/// The whole way may take this long on two slow cores; each step says which it is.
pub const LONG: Duration = Duration::from_secs(180);

/// A cluster with kubelets, and what installs Berth on it.
pub struct Installed {
    pub cluster: Cluster,
    pub client: Client,
    helm: PathBuf,
    registry: String,
    _alone: MutexGuard<'static, ()>,
}

impl Installed {
    /// With a kubelet for each of these nodes, on machines of their own but for the first. Berth's agents have fixed paths and
    /// cgroups on a machine, so there is one such cluster at a time.
    pub async fn on(nodes: &[&str]) -> Self {
        static ALONE: Mutex<()> = Mutex::const_new(());
        let alone = ALONE.lock().await;
        let helm = go_tool("helm");
        let cluster = Cluster::with_kubelets(nodes);
        let registry = cluster.env("BERTH_REGISTRY").to_owned();
        run(Command::new("images/berth/build").args(["--dev", "--push", &format!("{registry}/berth/berth:0.1.0")]));
        run(Command::new("images/demo-bot/push").arg(cluster.image()));
        let client = cluster.client().await;
        Self { cluster, client, helm, registry, _alone: alone }
    }

    /// Of the namespace that Berth is in.
    pub fn helm(&self, arguments: &[&str]) -> String {
        run(self.cluster.command(&self.helm).args(arguments).args(["--namespace", SYSTEM_NAMESPACE]))
    }

    /// The same, refused: what it says.
    pub fn helm_refuses(&self, arguments: &[&str]) -> String {
        let mut helm = self.cluster.command(&self.helm);
        let output = helm.args(arguments).args(["--namespace", SYSTEM_NAMESPACE]).output().unwrap();
        assert!(!output.status.success(), "helm {arguments:?} went through");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// `install` or `upgrade`, with what is different about this machine.
    pub fn release(&self, verb: &[&str], chart: &str, more: &[&str]) {
        let image = format!("image.repository={}/berth/berth", self.registry);
        let socket = format!("agent.containerd.address={}", self.cluster.env("CONTAINERD_ADDRESS"));
        let own = [
            "--set",
            &image,
            "--set",
            &socket,
            "--set",
            "agent.diskPressurePercent=1",
            "--set",
            "agent.imageGC.highPercent=100",
            "--wait",
            "--timeout",
            "120s",
        ];
        self.helm(&[verb, &["berth", chart], &own, more].concat());
    }

    /// Waits until the node takes bots.
    pub async fn takes_bots(&self, node: &str) {
        let nodes = Api::<BotNode>::all(self.client.clone());
        wait_for(format!("the BotNode {node} Ready"), LONG, || async {
            let node = nodes.get(node).await.map_err(|error| error.to_string())?;
            let conditions = node.status.map(|status| status.conditions).unwrap_or_default();
            let ready = conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True");
            if ready { Ok(()) } else { Err(format!("{conditions:?}")) }
        })
        .await;
        // The API server reads the schema of kinds that a MutatingAdmissionPolicy is for every 5 s, and answers 503 until then.
        let bot = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": "taken"},
            "spec": {"image": self.cluster.image()}});
        let bot = serde_json::from_value(bot).unwrap();
        let dry_run = PostParams { dry_run: true, ..PostParams::default() };
        wait_for("bots are taken", SOON, || async {
            self.bots().create(&dry_run, &bot).await.map(drop).map_err(|error| error.to_string())
        })
        .await;
    }

    pub fn bots(&self) -> Api<BotContainer> {
        Api::default_namespaced(self.client.clone())
    }

    pub async fn apply(&self, name: &str, spec: Value) {
        let mut body = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": name},
            "spec": {"image": self.cluster.image(), "env": [{"name": "BOT_NAME", "value": name}]}});
        for (key, value) in spec.as_object().unwrap() {
            body["spec"][key] = value.clone();
        }
        self.bots().patch(name, &PatchParams::apply("user").force(), &Patch::Apply(&body)).await.unwrap();
    }

    pub async fn until(&self, name: &str, what: &str, is_so: impl Fn(&BotContainer) -> bool) -> BotContainer {
        wait_for(format!("{name} {what}"), LONG, || async {
            match self.bots().get(name).await {
                Ok(bot) if is_so(&bot) => Ok(bot),
                Ok(bot) => Err(common::summary(&bot)),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    pub async fn ready(&self, name: &str) -> BotContainer {
        self.until(name, "Ready", |bot| {
            let status = bot.status.as_ref();
            let ready = status.and_then(|s| s.conditions.iter().find(|c| c.type_ == "Ready"));
            status.is_some_and(|s| s.observed_generation == bot.metadata.generation)
                && ready.is_some_and(|ready| ready.status == "True")
        })
        .await
    }

    /// What its own page says, which only the bot itself can. A bot's address is for its own machine.
    pub async fn page(&self, bot: &BotContainer) -> String {
        let status = bot.status.as_ref().expect("a status");
        let ip = status.network.as_ref().and_then(|network| network.ip.as_ref()).expect("an address");
        let url = format!("http://{ip}:8080");
        wait_for(url.clone(), SOON, || async {
            let mut command = match status.node_name.as_deref() {
                Some(NODE) => Command::new("curl"),
                _ => {
                    let mut there = Command::new("nsenter");
                    there.arg(format!("--net=/run/netns/{}", self.cluster.env("BERTH_SECOND_NETNS"))).arg("curl");
                    there
                }
            };
            let output = command.args(["-sSf", "--max-time", "5", &url]).output().unwrap();
            let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            if output.status.success() { Ok(said(&output.stdout)) } else { Err(said(&output.stderr)) }
        })
        .await
    }

    pub async fn gone(&self, name: &str) {
        wait_for(format!("{name} gone"), LONG, || async {
            match self.bots().get_opt(name).await.map_err(|error| error.to_string())? {
                None => Ok(()),
                Some(bot) => Err(common::summary(&bot)),
            }
        })
        .await;
    }

    pub async fn pods(&self, component: &str) -> Vec<Pod> {
        let params = ListParams::default().labels(&format!("app.kubernetes.io/component={component}"));
        Api::<Pod>::namespaced(self.client.clone(), SYSTEM_NAMESPACE).list(&params).await.unwrap().items
    }
}

/// Of the bot's process, as its own machine counts.
pub fn pid(bot: &BotContainer) -> u32 {
    let task = bot.status.as_ref().and_then(|status| status.task.as_ref()).expect("a task");
    u32::try_from(task.pid).unwrap()
}
