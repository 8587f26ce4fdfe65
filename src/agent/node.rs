//! The agent's own BotNode and its Lease: what this node has, and that somebody looks after it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use containerd_client::services::v1::PluginsRequest;
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::NodeAddress;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, ObjectMeta};
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::api::bot_node::{NodeVersions, OrphanedLayer};
use crate::api::condition::{Reason, api_time, chain};
use crate::api::{AGENT, BotNode, BotNodeStatus, NODE_LEASE_NAMESPACE, resource_version};
use crate::containerd::{CallContext, CallFailed, Containerd};
use crate::network::Cidr;

use super::disk::Room;
use super::floor;
use super::metrics::Metrics;

/// The Lease is renewed so often, and counts for four times as long, as kubelet's.
pub const RENEW_EVERY: Duration = Duration::from_secs(10);
/// See [`RENEW_EVERY`]. Seconds.
pub const LEASE_SECONDS: i32 = 40;

/// How often a write of the BotNode's status is computed anew in a row, when somebody else wrote in between.
const CONFLICTS: usize = 3;

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// Name of the node, the BotNode and the Lease.
    pub name: String,
    /// This process, among all that ever were the node's agent.
    pub instance: String,
    /// What bots may use in all.
    pub capacity: BTreeMap<String, Quantity>,
    /// Where the node is reached.
    pub addresses: Vec<NodeAddress>,
    /// RuntimeClass handlers that it can run.
    pub runtime_handlers: Vec<String>,
    /// v1, v2 or hybrid.
    pub cgroup: String,
    /// Version of runc.
    pub runc: String,
}

/// Something about the node's own objects failed.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A write or read of the API server failed.
    #[error("can't {what} of node {node}")]
    Api {
        /// What was tried.
        what: &'static str,
        /// Whose.
        node: String,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// containerd could not be asked.
    #[error("can't ask containerd about node {node}")]
    Containerd {
        /// Which node.
        node: String,
        /// Why not.
        source: CallFailed,
    },
}

/// Keeps BotNode and Lease of one node.
pub struct Registration {
    client: Client,
    containerd: Containerd,
    facts: NodeFacts,
    room: watch::Receiver<Option<Room>>,
    orphans: watch::Receiver<Option<Vec<OrphanedLayer>>>,
    metrics: Metrics,
    /// The newest resourceVersion of our Lease.
    renewed: AtomicI64,
    /// How often a watch broke.
    broke: watch::Sender<u64>,
    /// How often the cluster went back, or may have.
    went_back: watch::Sender<u64>,
}

impl Registration {
    /// Of the node that `facts` speak of; `room` tells of its disk, `orphans` of layers that have no object, once these were looked at.
    pub fn new(
        client: Client,
        containerd: Containerd,
        facts: NodeFacts,
        room: watch::Receiver<Option<Room>>,
        orphans: watch::Receiver<Option<Vec<OrphanedLayer>>>,
        metrics: Metrics,
    ) -> Self {
        let (renewed, (broke, _), (went_back, _)) = (AtomicI64::new(0), watch::channel(0), watch::channel(0));
        Self { client, containerd, facts, room, orphans, metrics, renewed, broke, went_back }
    }

    /// Changes when the cluster was restored from a backup, or may have been: a watch goes on from a version that is not yet again,
    /// or is another's, and tells nothing of what changed by that. Whoever watches has to begin anew.
    pub fn went_back(&self) -> watch::Receiver<u64> {
        self.went_back.subscribe()
    }

    /// Takes in that a watch broke. No cluster is restored without that, and our Lease tells of it only where we renewed it since the
    /// backup, so watches are not trusted to go on: with the next renewal they begin anew, which costs a list of our own bots.
    pub fn watch_broke(&self) {
        self.broke.send_modify(|times| *times += 1);
    }

    /// Takes in our Lease as it is now; nobody but us writes it, so its version only ever grows.
    fn saw_lease(&self, lease: &Lease) {
        let version = resource_version(&lease.metadata).unwrap_or(0);
        if version < self.renewed.swap(version, Ordering::Relaxed) {
            tracing::warn!("the cluster was restored from a backup: what was seen of it is read anew");
            self.went_back.send_modify(|times| *times += 1);
        }
    }

    fn api_failed(&self, what: &'static str) -> impl Fn(kube::Error) -> NodeError {
        let node = self.facts.name.clone();
        move |source| NodeError::Api { what, node: node.clone(), source: Box::new(source) }
    }

    /// Creates the BotNode where there is none.
    pub async fn ensure(&self) -> Result<BotNode, NodeError> {
        let api: Api<BotNode> = Api::all(self.client.clone());
        let name = &self.facts.name;
        if let Some(node) = api.get_opt(name).await.map_err(self.api_failed("read the BotNode"))? {
            return Ok(node);
        }
        let node = BotNode::new(name, Default::default());
        match api.create(&PostParams { field_manager: Some(AGENT.to_owned()), ..PostParams::default() }, &node).await {
            Ok(node) => Ok(node),
            // Somebody was quicker, or our own first try was applied and its answer lost.
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                api.get(name).await.map_err(self.api_failed("read the BotNode"))
            }
            Err(error) => Err(self.api_failed("create the BotNode")(error)),
        }
    }

    /// What the node is like now, seen from here.
    async fn observe(&self, node: &BotNode) -> Result<BotNodeStatus, NodeError> {
        let live = node.status.as_ref();
        let failed = |source| NodeError::Containerd { node: self.facts.name.clone(), source };
        let version = self.containerd.version().version(self.containerd.request(())).await;
        let version = version.call("get version of", "containerd").map_err(failed)?.version;
        let versions = NodeVersions {
            berth: env!("CARGO_PKG_VERSION").to_owned(),
            containerd: version,
            runc: self.facts.runc.clone(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cgroup: self.facts.cgroup.clone(),
        };
        let snapshotters = snapshotters(&self.containerd).await.map_err(failed)?;
        let mut conditions = vec![
            node_condition(live, "Ready", true, Reason::AgentReady, "the agent serves its node"),
            match floor::judge(&versions.containerd, &versions.runc) {
                Ok(note) => node_condition(live, "RuntimeSupported", true, Reason::Supported, &note),
                Err(why) => node_condition(live, "RuntimeSupported", false, Reason::Unsupported, &why),
            },
        ];
        // Not said before it was measured. The numbers change all the time, so they are no part of the message.
        if let Some(room) = *self.room.borrow() {
            let (reason, message) = match room.is_pressed() {
                true => (Reason::DiskPressure, "the file system below containerd's snapshots is nearly full"),
                false => (Reason::DiskOk, "the file system below containerd's snapshots has room"),
            };
            conditions.push(node_condition(live, "DiskPressure", room.is_pressed(), reason, message));
        }
        if node.spec.drain {
            let message = "bots are stopped, and none is placed here, until the node is uncordoned";
            conditions.push(node_condition(live, "NodeDraining", true, Reason::NodeDraining, message));
        }
        Ok(BotNodeStatus {
            versions: Some(versions),
            snapshotters,
            runtime_handlers: self.facts.runtime_handlers.clone(),
            capacity: self.facts.capacity.clone(),
            allocatable: self.facts.capacity.clone(),
            addresses: self.facts.addresses.clone(),
            // Nobody has looked yet: what an agent before this one said stands.
            orphans: match &*self.orphans.borrow() {
                Some(orphans) => orphans.clone(),
                None => live.map(|live| live.orphans.clone()).unwrap_or_default(),
            },
            conditions,
        })
    }

    /// Brings the BotNode's status up to what is there. Writes only a difference.
    async fn publish(&self) -> Result<(), NodeError> {
        // The controller writes the CIDR at about the same time as we write the first status.
        let mut tries = 0;
        loop {
            tries += 1;
            let live = self.ensure().await?;
            let status = self.observe(&live).await?;
            if live.status.as_ref() == Some(&status) {
                return Ok(());
            }
            match self.apply(&live, &status).await {
                Err(NodeError::Api { source, .. })
                    if tries < CONFLICTS && matches!(&*source, kube::Error::Api(s) if s.is_conflict()) => {}
                done => return done,
            }
        }
    }

    async fn apply(&self, live: &BotNode, status: &BotNodeStatus) -> Result<(), NodeError> {
        let api: Api<BotNode> = Api::all(self.client.clone());
        let patch = json!({
            "apiVersion": BotNode::api_version(&()),
            "kind": BotNode::kind(&()),
            "metadata": {
                "name": self.facts.name,
                "uid": live.metadata.uid,
                "resourceVersion": live.metadata.resource_version,
            },
            "status": status,
        });
        let params = PatchParams::apply(AGENT).force();
        let done = api.patch_status(&self.facts.name, &params, &Patch::Apply(&patch)).await;
        done.map(|_| ()).map_err(self.api_failed("write the status of the BotNode"))
    }

    /// Says that the node has no agent for now. Its bots run on.
    pub async fn leave(&self) -> Result<(), NodeError> {
        let live = self.ensure().await?;
        let mut status = live.status.clone().unwrap_or_default();
        let ready = node_condition(
            live.status.as_ref(),
            "Ready",
            false,
            Reason::AgentStopping,
            "the agent was stopped; its bots run on",
        );
        status.conditions.retain(|condition| condition.type_ != "Ready");
        status.conditions.insert(0, ready);
        self.apply(&live, &status).await
    }

    async fn renew(&self) -> Result<(), NodeError> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), NODE_LEASE_NAMESPACE);
        let name = &self.facts.name;
        let now = MicroTime(Timestamp::now());
        let spec = |acquired: Option<MicroTime>| LeaseSpec {
            holder_identity: Some(self.facts.instance.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            acquire_time: acquired.or_else(|| Some(now.clone())),
            renew_time: Some(now.clone()),
            ..LeaseSpec::default()
        };
        match api.get_opt(name).await.map_err(self.api_failed("read the Lease"))? {
            Some(mut lease) => {
                self.saw_lease(&lease);
                let mine = lease.spec.as_ref().filter(|old| old.holder_identity.as_ref() == Some(&self.facts.instance));
                lease.spec = Some(spec(mine.and_then(|old| old.acquire_time.clone())));
                let done = api.replace(name, &PostParams::default(), &lease).await;
                done.map(|lease| self.saw_lease(&lease)).map_err(self.api_failed("renew the Lease"))
            }
            None => {
                let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
                let lease = Lease { metadata, spec: Some(spec(None)) };
                // One that was deleted and is made anew has a newer version, unless the cluster went back.
                let done = api.create(&PostParams::default(), &lease).await;
                done.map(|lease| self.saw_lease(&lease)).map_err(self.api_failed("create the Lease"))
            }
        }
    }

    /// Keeps BotNode and Lease until `stop`. A failure is logged and tried again: the controller notices a Lease that
    /// runs out, and bots run on.
    pub async fn keep(&self, ready: watch::Sender<bool>, stop: CancellationToken) {
        let (mut room, mut orphans) = (self.room.clone(), self.orphans.clone());
        let mut settled = 0;
        loop {
            let so_often = *self.broke.borrow();
            // The status first: a fresh Lease says that what the BotNode claims holds.
            let done = match self.publish().await {
                Ok(()) => self.renew().await,
                Err(error) => Err(error),
            };
            let wait = match done {
                Ok(()) => {
                    ready.send_replace(true);
                    if so_often != std::mem::replace(&mut settled, so_often) {
                        self.went_back.send_modify(|times| *times += 1);
                    }
                    RENEW_EVERY
                }
                Err(error) => {
                    if let NodeError::Api { .. } = error {
                        self.metrics.api_error("node");
                    }
                    tracing::warn!(error = %chain(&error), "BotNode or Lease not kept; tried again");
                    RENEW_EVERY / 10
                }
            };
            tokio::select! {
                () = tokio::time::sleep(super::run::jittered(wait)) => {}
                // A disk that fills up is told at once.
                Ok(()) = room.changed() => {}
                Ok(()) = orphans.changed() => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Follows what the controller says of this node, its CIDR and whether it is being drained, until `stop`.
    pub async fn follow(
        &self,
        cidr: watch::Sender<Option<Cidr>>,
        draining: watch::Sender<Option<bool>>,
        stop: CancellationToken,
    ) {
        let api: Api<BotNode> = Api::all(self.client.clone());
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.facts.name));
        let begin = || watcher(api.clone(), config.clone()).default_backoff().applied_objects();
        let mut nodes = std::pin::pin!(begin());
        let mut went_back = self.went_back();
        loop {
            let node = tokio::select! {
                node = nodes.next() => node,
                // The sender is ours, and lives as long.
                _ = went_back.changed() => {
                    nodes.set(begin());
                    continue;
                }
                () = stop.cancelled() => return,
            };
            match node {
                Some(Ok(node)) => {
                    draining.send_if_modified(|old| old.replace(node.spec.drain) != Some(node.spec.drain));
                    let Some(text) = &node.spec.bot_cidr else { continue };
                    match Cidr::parse(text) {
                        Ok(new) => {
                            cidr.send_if_modified(|old| {
                                let changed = *old != Some(new);
                                *old = Some(new);
                                changed
                            });
                        }
                        Err(error) => tracing::error!(error = %chain(&error), "BotNode's spec.botCIDR can't be used"),
                    }
                }
                Some(Err(error)) => {
                    self.watch_broke();
                    self.metrics.api_error("watch node");
                    tracing::warn!(error = %chain(&error), "the watch of the BotNode failed");
                }
                None => return,
            }
        }
    }
}

/// The snapshotters that work, sorted.
pub async fn snapshotters(containerd: &Containerd) -> Result<Vec<String>, CallFailed> {
    let request = PluginsRequest { filters: vec!["type==io.containerd.snapshotter.v1".to_owned()] };
    let answer = containerd.introspection().plugins(containerd.request(request)).await;
    let plugins = answer.call("list plugins of", "containerd")?.plugins;
    let mut found: Vec<String> =
        plugins.into_iter().filter(|plugin| plugin.init_err.is_none()).map(|plugin| plugin.id).collect();
    found.sort();
    Ok(found)
}

fn node_condition(live: Option<&BotNodeStatus>, type_: &str, status: bool, reason: Reason, message: &str) -> Condition {
    let status = if status { "True" } else { "False" };
    let old = live.and_then(|live| live.conditions.iter().find(|c| c.type_ == type_));
    let since = old.filter(|old| old.status == status).map(|old| old.last_transition_time.clone());
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.as_str().to_owned(),
        message: message.to_owned(),
        last_transition_time: since.unwrap_or_else(|| api_time(Timestamp::now())),
        observed_generation: None,
    }
}
