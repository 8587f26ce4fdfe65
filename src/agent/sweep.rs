//! Finds what nobody owns, and removes it by the rule of FAULTS.md: never because it was not listed once.
//!
//! ```text
//! containers, layers, leases of ours; network; output; what tasks leave -> uids that have something on this node
//!   less those that have a loop                             -> strangers
//!   less those that a complete list of BotContainers has    -> orphans, since when
//!   found again by a later complete list, a grace time on   -> taken down as a deleted bot is
//! ```
//!
//! Only what bears a bot's uid in its name or label, in containerd's namespace of ours, is looked at at all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::ListContainersRequest;
use jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::time::Instant;

use crate::api::BotContainer;
use crate::api::condition::{Reason, chain};
use crate::api::ids::{BotUid, ContainerId};
use crate::containerd::{CallContext, CallFailed, Containerd};
use crate::network::{Network, NetworkError};
use crate::output::{Output, OutputError};

use super::act::Work;
use super::desired::{Desired, Goal};
use super::labels;
use super::plan::{Next, State, plan};
use super::run::Shared;
use super::shim::{LEFTOVERS, Patience, Shims};
use super::snapshot::sweep::VersionSweeper;
use super::step::Step;

/// How often is looked.
pub const EVERY: Duration = Duration::from_secs(180);

/// KILL follows TERM after this, where no object says how long.
const GRACE: Duration = Duration::from_secs(10);

/// The sweep could not be done; nothing was removed.
#[derive(Debug, thiserror::Error)]
pub enum SweepFailed {
    /// containerd could not be asked.
    #[error("can't list what containerd has")]
    Containerd(#[from] CallFailed),
    /// The network's traces can't be listed.
    #[error("can't list the networks of bots")]
    Network(#[from] NetworkError),
    /// The output's traces can't be listed.
    #[error("can't list the outputs of bots")]
    Output(#[from] OutputError),
    /// Bundles or processes can't be listed.
    #[error("can't list what tasks left")]
    Tasks(#[source] std::io::Error),
    /// The API server gave no complete list.
    #[error("can't list the BotContainers")]
    Api(#[source] Box<kube::Error>),
}

/// Who something belongs to, as far as it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Owner {
    namespace: String,
    name: String,
    snapshotter: Option<String>,
}

/// Something on this node that no BotContainer owns.
#[derive(Debug)]
pub struct Orphan {
    /// The uid that it bears.
    pub uid: BotUid,
    owner: Owner,
}

/// What a look found.
#[derive(Debug)]
pub struct Found {
    /// Orphans whose grace time is over.
    pub orphans: Vec<Orphan>,
    /// When the next look is due.
    pub wait: Duration,
}

/// Looks for orphans.
pub struct Sweeper {
    client: Client,
    containerd: Containerd,
    network: Network,
    output: Output,
    shims: Shims,
    snapshotters: Vec<String>,
    versions: VersionSweeper,
    grace: Duration,
    since: BTreeMap<BotUid, Instant>,
}

impl Sweeper {
    /// Bots are looked for where versions are, and left alone for as long.
    pub fn new(
        client: Client,
        containerd: Containerd,
        network: Network,
        output: Output,
        shims: Shims,
        versions: VersionSweeper,
    ) -> Self {
        let (snapshotters, grace) = (versions.snapshotters.clone(), versions.grace);
        Self { client, containerd, network, output, shims, snapshotters, versions, grace, since: BTreeMap::new() }
    }

    /// One look; `tended` are the uids of bots and of snapshots that have a loop. Removes nothing but versions.
    pub async fn sweep(
        &mut self,
        tended: &BTreeSet<BotUid>,
        snapshots: &BTreeSet<String>,
    ) -> Result<Found, SweepFailed> {
        let versions = self.versions.sweep(snapshots, EVERY).await?;
        let found = self.bots(tended).await?;
        Ok(Found { wait: found.wait.min(versions), ..found })
    }

    async fn bots(&mut self, tended: &BTreeSet<BotUid>) -> Result<Found, SweepFailed> {
        let mut strangers = self.local().await?;
        strangers.retain(|uid, _| !tended.contains(uid));
        let mut found = Found { orphans: Vec::new(), wait: EVERY };
        if strangers.is_empty() {
            self.since.clear();
            return Ok(found);
        }
        // Taken after the strangers were found: what is on this list was there when they were.
        let known = self.known().await?;
        strangers.retain(|uid, _| !known.contains(uid));
        self.since.retain(|uid, _| strangers.contains_key(uid));
        let now = Instant::now();
        for (uid, owner) in strangers {
            let since = *self.since.entry(uid.clone()).or_insert(now);
            let age = now.duration_since(since);
            if age < self.grace {
                found.wait = found.wait.min(self.grace - age + Duration::from_millis(100));
            } else if self.lives(&uid, &owner).await? {
                tracing::warn!(%uid, namespace = owner.namespace, name = owner.name, "a list of the BotContainers lacked one");
                self.since.remove(&uid);
            } else {
                found.orphans.push(Orphan { uid, owner });
                // Whether it was really removed, the next look tells.
                found.wait = found.wait.min(Duration::from_secs(30));
            }
        }
        Ok(found)
    }

    /// Every uid that has something on this node.
    async fn local(&self) -> Result<BTreeMap<BotUid, Owner>, SweepFailed> {
        let mut found: BTreeMap<BotUid, Owner> = BTreeMap::new();
        let request = self.containerd.request(ListContainersRequest::default());
        let containers = self.containerd.containers().list(request).await.call("list", "containers")?.containers;
        for container in containers {
            let uid = ContainerId::uid_of(&container.id);
            let label = container.labels.get(labels::UID);
            // The id alone is no proof: a foreign container may bear any name.
            if let Some(uid) = uid.filter(|uid| label.map(String::as_str) == Some(uid.as_str())) {
                found.insert(uid, owner(&container.labels, Some(&container.snapshotter)));
            }
        }
        for snapshotter in &self.snapshotters {
            for info in self.containerd.list_snapshots(snapshotter, Vec::new()).await? {
                let uid = info.labels.get(labels::UID).and_then(|uid| BotUid::parse(uid).ok());
                // Only a bot's active layer: versions (committed) belong to BotSnapshots.
                if let Some(uid) = uid.filter(|uid| labels::layer_number(&uid.container_id(), &info.name).is_some()) {
                    found.entry(uid).or_insert_with(|| owner(&info.labels, Some(snapshotter)));
                }
            }
        }
        for network in self.network.list().await? {
            if let Some(uid) = ContainerId::uid_of(network.id.as_str()) {
                found.entry(uid).or_default();
            }
        }
        for output in self.output.list().await? {
            found.entry(output.uid).or_default();
        }
        for uid in self.shims.list().await.map_err(SweepFailed::Tasks)? {
            found.entry(uid).or_default();
        }
        Ok(found)
    }

    /// Asks for the object itself, by the name that is on what was found: a list may be cut short and not say so, and what
    /// is removed is gone. Lists alone decide where there is no name, which is where there is no layer either.
    async fn lives(&self, uid: &BotUid, owner: &Owner) -> Result<bool, SweepFailed> {
        if owner.namespace.is_empty() || owner.name.is_empty() {
            return Ok(false);
        }
        let api: Api<BotContainer> = Api::namespaced(self.client.clone(), &owner.namespace);
        let live = api.get_metadata_opt(&owner.name).await.map_err(|error| SweepFailed::Api(Box::new(error)))?;
        Ok(live.is_some_and(|live| live.metadata.uid.as_deref() == Some(uid.as_str())))
    }

    /// The uids of all BotContainers: a complete list, from etcd rather than from a cache that may be behind.
    async fn known(&self) -> Result<BTreeSet<BotUid>, SweepFailed> {
        let api: Api<BotContainer> = Api::all(self.client.clone());
        let mut known = BTreeSet::new();
        let mut params = ListParams::default().limit(500);
        loop {
            let page = api.list_metadata(&params).await.map_err(|error| SweepFailed::Api(Box::new(error)))?;
            known.extend(page.items.iter().filter_map(|bot| BotUid::parse(bot.metadata.uid.as_deref()?).ok()));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(known),
            }
        }
    }
}

impl Orphan {
    /// Takes an orphan down as a deleted bot is.
    pub async fn take_down(self, shared: Arc<Shared>) {
        let Self { uid, owner } = &self;
        tracing::warn!(%uid, namespace = owner.namespace, name = owner.name, "removing what no object owns");
        shared.metrics.error(Reason::Orphaned);
        if let Err(error) = self.steps(&shared).await {
            tracing::warn!(%uid, %error, "what no object owns is not removed yet; the next sweep goes on");
        }
    }

    async fn steps(&self, shared: &Shared) -> Result<(), String> {
        let Self { uid, owner } = self;
        let mut desired = Desired {
            uid: uid.clone(),
            id: uid.container_id(),
            namespace: owner.namespace.clone(),
            name: owner.name.clone(),
            bot_id: String::new(),
            snapshotter: owner.snapshotter.clone().unwrap_or_else(|| shared.default_snapshotter.clone()),
            layer: None,
            rollback: None,
            before_image: Vec::new(),
            restore: None,
            preserve: None,
            goal: Goal::Gone { grace: GRACE },
            drained: false,
        };
        let deadline = Instant::now() + GRACE * 3 + LEFTOVERS * 3;
        let mut patience = Patience::default();
        while Instant::now() < deadline {
            let observed = shared.observer.observe(uid, &desired.snapshotter, None).await.map_err(|e| chain(&e))?;
            if let Some(record) = observed.record() {
                desired.namespace.clone_from(&record.namespace);
                desired.name.clone_from(&record.name);
            }
            match plan(&desired, &observed, Timestamp::now()) {
                Next::Do(step) => {
                    patience.look(observed.task);
                    let work = Work {
                        desired: &desired,
                        bot: None,
                        observed: &observed,
                        cidr: None,
                        leftovers: false,
                        overdue: patience.is_over(),
                        failures: 0,
                    };
                    shared.actor.act(step, &work).await.map_err(|error| chain(&error))?;
                    if step == Step::PutAway {
                        patience.done();
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                }
                Next::Settled { state: State::Removed, .. } => {
                    // What is left may be an address, a lease, files or logs alone, which no observation shows.
                    shared.actor.network.remove(&desired.id).await.map_err(|error| chain(&error))?;
                    return shared.actor.remove_rest(&desired.id).await.map_err(|error| chain(&error));
                }
                Next::Settled { .. } => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        Err("its process does not end".to_owned())
    }
}

fn owner(labels: &std::collections::HashMap<String, String>, snapshotter: Option<&str>) -> Owner {
    let label = |key| labels.get(key).cloned().unwrap_or_default();
    Owner {
        namespace: label(labels::NAMESPACE),
        name: label(labels::NAME),
        snapshotter: snapshotter.filter(|name| !name.is_empty()).map(str::to_owned),
    }
}
