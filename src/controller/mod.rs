//! The controller: placement, finalizers, BotRecords, CIDRs, node loss. Cluster-wide, leader-elected.
//!
//! ```text
//!            watches, one a kind (watch.rs)            every replica runs these and is warm
//!                 v
//!            world.rs     what was last seen, and what follows      <── answers to our own writes
//!                 v keys                                                        ^
//!            queue.rs     each key once at a time, back-off                     |
//!                 v                                                             |
//!   leader.rs ── workers   only while leading                                   |
//!                 ├── bot.rs     decide: Rest | Wait | Place | Keep | LetGo ────┤ all writes go through
//!                 │     ├── place.rs   which node, or for each why not          │ Context::write: leading, with
//!                 │     └── status.rs  what is applied; no difference, no write │ a deadline and a precondition
//!                 ├── record.rs  who holds a botId, where its layer is ─────────┤
//!                 ├── snapshot.rs  numbers, nodes and ends of versions ─────────┤
//!                 │     └── schedule.rs, retention.rs   when one is due, which go
//!                 ├── holder.rs  what bots ask for, as a Pod; drain ────────────┤
//!                 ├── access.rs  what a node's account may read ────────────────┤
//!                 └── node.rs    alive, lost or gone; CIDR (cidr.rs), owner ────┘
//!            finalizer.rs   of bots and of snapshots
//!            mirror/        rows in PostgreSQL, where there is one: follows the world, writes no object
//!            event.rs, metrics.rs, error.rs   what is told;   quantity.rs   500m, 2Gi
//! ```
//!
//! Writes from apply to bound, besides the user's: BotRecord and finalizer side by side, then the bind. Nothing depends
//! on having seen an event: keys carry no news, a new leader looks at everything, and every key comes back in time.

mod access;
mod bot;
mod cidr;
mod error;
mod event;
mod finalizer;
mod holder;
mod leader;
mod metrics;
mod mirror;
mod node;
mod place;
mod quantity;
mod queue;
mod record;
mod retention;
mod schedule;
mod snapshot;
mod status;
mod watch;
mod world;

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::api::{Api, PatchParams};
use kube::{Client, Resource, ResourceExt as _};
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::api::{
    BotContainer, BotNode, BotRecord, BotSnapshot, CONTROLLER, NODE_LEASE_NAMESPACE, NODES_NAMESPACE, SYSTEM_NAMESPACE,
    condition,
};
use crate::telemetry::Health;

use cidr::{Block, Pool};
use error::Error;
use event::Events;
use holder::Holders;
use leader::{Elector, Leadership, Times};
use metrics::Metrics;
use mirror::{DatabaseUrl, MaybeDatabaseUrl};
use queue::Queue;
use world::World;

/// How long one call of the API server may take.
const CALL: Duration = Duration::from_secs(10);

/// How long workers may go on after the stop.
const FINISH: Duration = Duration::from_secs(5);

/// A key comes back after this time, and up to half as much again, whatever happened or did not.
const RESYNC: Duration = Duration::from_secs(600);

/// Flags and environment of `berth controller`.
#[derive(Clone, Debug, clap::Args)]
pub struct ControllerArgs {
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, env = "BERTH_HEALTH_ADDRESS", value_name = "ADDRESS:PORT", default_value = "0.0.0.0:8080")]
    pub health_address: SocketAddr,

    /// The addresses of all bots; each node gets a block of it. IPv4. May be enlarged, never moved while bots run.
    #[arg(long, env = "BERTH_CLUSTER_CIDR", value_name = "CIDR", default_value = "10.208.0.0/12")]
    cluster_cidr: Block,

    /// Prefix length of a node's block: 24 gives a node 253 bots.
    #[arg(long, env = "BERTH_NODE_CIDR_MASK_SIZE", value_name = "BITS", default_value_t = 24)]
    pub node_cidr_mask_size: u8,

    /// How many objects are worked on side by side.
    #[arg(long, env = "BERTH_WORKERS", value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: u16,

    /// Namespace of the leader Lease.
    #[arg(long, env = "BERTH_LEADER_NAMESPACE", value_name = "NAMESPACE", default_value = SYSTEM_NAMESPACE)]
    pub leader_namespace: String,

    /// Name of the leader Lease.
    #[arg(long, env = "BERTH_LEADER_NAME", value_name = "NAME", default_value = CONTROLLER)]
    pub leader_name: String,

    /// For how many seconds other replicas leave the Lease alone when it is not renewed.
    #[arg(long, env = "BERTH_LEADER_LEASE_SECONDS", value_name = "SECONDS", default_value_t = 15)]
    pub leader_lease_seconds: u64,

    /// After how many seconds without a renewal the leader stops. Less than the Lease.
    #[arg(long, env = "BERTH_LEADER_RENEW_SECONDS", value_name = "SECONDS", default_value_t = 10)]
    pub leader_renew_seconds: u64,

    /// Seconds between two tries to take or renew the Lease. Less than the renewal.
    #[arg(long, env = "BERTH_LEADER_RETRY_SECONDS", value_name = "SECONDS", default_value_t = 2)]
    pub leader_retry_seconds: u64,

    /// Image of the nodes' holder Pods, Berth's own. While bots are bound to a Node, one such Pod there asks for what they ask for, so
    /// that the scheduler and autoscalers see it; evicting it drains the node of bots. Without it there are none.
    #[arg(long, env = "BERTH_HOLDER_IMAGE", value_name = "IMAGE")]
    pub holder_image: Option<String>,

    /// PriorityClass of holder Pods.
    #[arg(long, env = "BERTH_HOLDER_PRIORITY_CLASS", value_name = "NAME", default_value = "")]
    pub holder_priority_class: String,

    /// The port of agents' --health-address: a holder Pod asks its node's agent there whether all bots have stopped.
    #[arg(long, env = "BERTH_AGENT_PORT", value_name = "PORT", default_value_t = 10470)]
    pub agent_port: u16,

    /// How long a drain waits for bots to stop. Seconds.
    #[arg(long, env = "BERTH_DRAIN_SECONDS", value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u32).range(2..=86_400))]
    pub drain_seconds: u32,

    /// A cordon (`kubectl cordon`) alone drains a node of bots as well; else it only keeps new ones away.
    #[arg(long, env = "BERTH_DRAIN_ON_CORDON")]
    pub drain_on_cordon: bool,

    /// A PostgreSQL (13 or newer) that is to have rows for other programs to read, as
    /// postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=verify-full; TLS modes are libpq's. Without it there are none.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    database_url: Option<MaybeDatabaseUrl>,

    /// After how many seconds all rows are compared with the objects again, and those that somebody changed are repaired.
    #[arg(long, env = "BERTH_DATABASE_RESYNC_SECONDS", value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub database_resync_seconds: u64,
}

/// A namespaced object's name; of a cluster-scoped one, with an empty namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name {
    namespace: String,
    name: String,
}

impl Name {
    fn cluster(name: String) -> Self {
        Self { namespace: String::new(), name }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What a worker looks at.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Key {
    /// All bots that wait for a node.
    Pending,
    Bot(Name),
    Record(Name),
    Snapshot(Name),
    Node(String),
    /// What the account of a node may read in a namespace: that and the node.
    Access(Name),
    /// The holder Pod of a node.
    Holder(String),
}

impl Key {
    fn kind(&self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Bot(_) => "BotContainer",
            Self::Record(_) => "BotRecord",
            Self::Snapshot(_) => "BotSnapshot",
            Self::Node(_) => "BotNode",
            Self::Access(_) => "Access",
            Self::Holder(_) => "Holder",
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pending => f.write_str("pending bots"),
            Self::Bot(name) | Self::Record(name) | Self::Snapshot(name) | Self::Access(name) => {
                write!(f, "{} {name}", self.kind())
            }
            Self::Node(name) | Self::Holder(name) => write!(f, "{} {name}", self.kind()),
        }
    }
}

/// When a key is looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// When something wakes it.
    Done,
    /// Now and then.
    Resync,
    /// Then at the latest.
    At(Instant),
}

/// What every reconcile has at hand.
struct Context {
    client: Client,
    world: Mutex<World>,
    queue: Queue,
    leadership: Leadership,
    events: Events,
    metrics: Metrics,
    pool: Pool,
    /// Whoever gives out CIDRs.
    cidrs: tokio::sync::Mutex<()>,
    /// Which process this is.
    me: String,
    /// The leader Lease.
    lease: Name,
    /// How holder Pods are made.
    holders: Option<Holders>,
}

impl Context {
    /// Never held across an await.
    fn world(&self) -> MutexGuard<'_, World> {
        // A panic under the lock may leave the accounts wrong, never the objects; the next leader begins afresh.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the answer to our own write, so that the next look does not work from an older state.
    fn keep(&self, bot: BotContainer) -> Arc<BotContainer> {
        let kept = Arc::new(bot.clone());
        let keys = self.world().saw_bot(bot, Instant::now());
        self.queue.add_all(keys.into_iter().filter(|k| !matches!(k, Key::Bot(_))), "own write");
        kept
    }

    /// A call that changes nothing, with a deadline.
    async fn read<T>(
        &self,
        step: &'static str,
        object: &str,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Error> {
        self.call(step, object, Instant::now() + CALL, call).await
    }

    /// A call that writes: only while this replica leads, and over before another can.
    async fn write<T>(
        &self,
        step: &'static str,
        object: &str,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Error> {
        let now = Instant::now();
        match self.leadership.write_until(now) {
            Some(until) => self.call(step, object, until.min(now + CALL), call).await,
            None => Err(Error::NotLeading { step, object: object.to_owned() }),
        }
    }

    async fn call<T>(
        &self,
        step: &'static str,
        object: &str,
        until: Instant,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout_at(until.into(), call).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(source)) => Err(Error::call(step, object, source)),
            Err(_) => Err(Error::Deadline { step, object: object.to_owned(), after: CALL }),
        }
    }
}

fn apply_params() -> PatchParams {
    PatchParams::apply(CONTROLLER).force()
}

/// Of which object a message or an error is.
fn describe<K: Resource<DynamicType = ()>>(object: &K) -> String {
    format!("{} {}/{}", K::kind(&()), object.namespace().unwrap_or_default(), object.name_any())
}

fn merge_params() -> PatchParams {
    PatchParams { field_manager: Some(CONTROLLER.to_owned()), ..PatchParams::default() }
}

/// Runs the controller until `stop`: watches, and leads whenever it can. The cluster is that of `KUBECONFIG`, or the one
/// it runs in. Ends early only when it can't begin, or when a task that must not end does.
pub async fn run(args: ControllerArgs, stop: CancellationToken) -> anyhow::Result<()> {
    while let End::WentBack = run_once(args.clone(), &stop).await? {
        tracing::warn!("begins anew: the cluster was restored from a backup");
    }
    Ok(())
}

/// How a run came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// As it was told to.
    Stopped,
    /// What was seen of the cluster is of no use any more.
    WentBack,
}

async fn run_once(args: ControllerArgs, stop: &CancellationToken) -> anyhow::Result<End> {
    let pool = Pool::new(args.cluster_cidr, args.node_cidr_mask_size)?;
    let times = Times {
        lease: Duration::from_secs(args.leader_lease_seconds),
        renew_deadline: Duration::from_secs(args.leader_renew_seconds),
        retry: Duration::from_secs(args.leader_retry_seconds),
    }
    .check()?;
    let client = crate::client::client(crate::client::config().await?)?;
    let database = args.database_url.and_then(|MaybeDatabaseUrl(url)| url);

    let holders = args.holder_image.clone().filter(|image| !image.is_empty()).map(|image| Holders {
        image,
        priority_class: args.holder_priority_class.clone(),
        drain_seconds: i64::from(args.drain_seconds),
        agent_port: args.agent_port,
        on_cordon: args.drain_on_cordon,
    });

    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let health = Health::new(registry);
    let (events, notes) = Events::new(metrics.clone());
    let leadership = Leadership::new(times);
    let me = identity();
    let context = Arc::new(Context {
        client: client.clone(),
        world: Mutex::new(World::new(database.is_some(), holders.is_some())),
        queue: Queue::default(),
        leadership: leadership.clone(),
        events,
        metrics: metrics.clone(),
        pool,
        cidrs: tokio::sync::Mutex::default(),
        me: me.clone(),
        holders: holders.clone(),
        lease: Name { namespace: args.leader_namespace.clone(), name: args.leader_name.clone() },
    });

    // The end of any of these but by `stop` ends the process: a replica that is half alive helps nobody.
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let serving = health.clone().serve(args.health_address, stop.clone());
    tasks.spawn(async move { Ok(serving.await?) });
    let told = CancellationToken::new();
    let publisher = tokio::spawn(event::publish(client.clone(), me.clone(), notes, metrics, told.clone()));

    let (synced, mut lists) = tokio::sync::watch::channel(0_usize);
    let needed = {
        let all = |n: usize| n;
        let mut watches: JoinSet<()> = JoinSet::new();
        let ctx = || context.clone();
        watches.spawn(watch::watch::<BotContainer>(ctx(), Api::all(client.clone()), "BotContainer", synced.clone()));
        watches.spawn(watch::watch::<BotRecord>(ctx(), Api::all(client.clone()), "BotRecord", synced.clone()));
        watches.spawn(watch::watch::<BotSnapshot>(ctx(), Api::all(client.clone()), "BotSnapshot", synced.clone()));
        watches.spawn(watch::watch::<BotNode>(ctx(), Api::all(client.clone()), "BotNode", synced.clone()));
        watches.spawn(watch::watch::<Node>(ctx(), Api::all(client.clone()), "Node", synced.clone()));
        watches.spawn(watch::watch::<RuntimeClass>(ctx(), Api::all(client.clone()), "RuntimeClass", synced.clone()));
        let leases: Api<Lease> = Api::namespaced(client.clone(), NODE_LEASE_NAMESPACE);
        watches.spawn(watch::watch::<Lease>(ctx(), leases, "Lease", synced.clone()));
        watches.spawn(watch::watch::<Role>(ctx(), Api::all(client.clone()), "Role", synced.clone()));
        watches.spawn(watch::watch::<RoleBinding>(ctx(), Api::all(client.clone()), "RoleBinding", synced.clone()));
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NODES_NAMESPACE);
        watches.spawn(watch::watch::<ServiceAccount>(ctx(), accounts, "ServiceAccount", synced.clone()));
        if context.holders.is_some() {
            let pods: Api<Pod> = Api::namespaced(client.clone(), NODES_NAMESPACE);
            watches.spawn(watch::watch::<Pod>(ctx(), pods, "Pod", synced.clone()));
        }
        let needed = all(watches.len());
        tasks.spawn(async move {
            match watches.join_next().await {
                Some(Err(died)) => Err(died).context("a watch died"),
                _ => anyhow::bail!("a watch ended"),
            }
        });
        needed
    };

    let leases = Api::namespaced(client, &args.leader_namespace);
    let mut elector = Elector::new(leases, args.leader_name.clone(), me, leadership);
    let went_back = elector.went_back();
    let ended = tokio::select! {
        // Cancel-safe: a watch channel keeps its value.
        done = lists.wait_for(|n| *n >= needed) => done.map(drop).context("the watches ended"),
        Some(ended) = tasks.join_next() => unplanned(ended, stop),
        () = stop.cancelled() => Ok(()),
    };
    let ended = match ended {
        Ok(()) if !stop.is_cancelled() => {
            tracing::info!("all lists are done");
            health.set_ready(true);
            let crew = Crew {
                workers: usize::from(args.workers),
                database,
                resync: Duration::from_secs(args.database_resync_seconds),
            };
            lead(&context, &mut elector, &crew, &mut tasks, stop).await
        }
        other => other,
    };
    health.set_ready(false);
    elector.release().await;
    told.cancel();
    let _ = tokio::time::timeout(FINISH, publisher).await;
    tasks.shutdown().await;
    ended.map(|()| if stop.is_cancelled() || !went_back.is_cancelled() { End::Stopped } else { End::WentBack })
}

fn unplanned(
    ended: Result<anyhow::Result<()>, tokio::task::JoinError>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    match ended {
        _ if stop.is_cancelled() => Ok(()),
        Ok(Ok(())) => anyhow::bail!("a task ended that must not"),
        Ok(Err(error)) => Err(error),
        Err(died) => Err(died).context("a task died"),
    }
}

/// Another in each process: two that follow each other in one Pod must not take each other's Lease for their own.
fn identity() -> String {
    let host =
        std::env::var("POD_NAME").unwrap_or_else(|_| rustix::system::uname().nodename().to_string_lossy().into_owned());
    format!("{host}_{:016x}", RandomState::new().hash_one(std::process::id()))
}

/// Who works while this replica leads.
struct Crew {
    workers: usize,
    database: Option<DatabaseUrl>,
    /// Between two looks at all rows of the database.
    resync: Duration,
}

impl Crew {
    fn start(&self, context: &Arc<Context>, shift: &CancellationToken) -> JoinSet<()> {
        let mut crew: JoinSet<()> = (0..self.workers).map(|_| work(context.clone(), shift.clone())).collect();
        if let Some(url) = &self.database {
            crew.spawn(mirror::run(context.clone(), url.clone(), self.resync, shift.clone()));
        }
        crew
    }
}

/// Leads whenever it can, until `stop` or until a task ends that must not.
async fn lead(
    context: &Arc<Context>,
    elector: &mut Elector,
    crew: &Crew,
    tasks: &mut JoinSet<anyhow::Result<()>>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let went_back = elector.went_back();
    loop {
        tokio::select! {
            // Cancel-safe, as the Elector says.
            () = elector.acquire() => {}
            Some(ended) = tasks.join_next() => return unplanned(ended, stop),
            () = went_back.cancelled() => return Ok(()),
            () = stop.cancelled() => return Ok(()),
        }
        tracing::info!("leading");
        context.metrics.leading(true);
        context.queue.add_all(context.world().all(), "leading");
        let shift = CancellationToken::new();
        let mut crew = crew.start(context, &shift);
        let ended = tokio::select! {
            // Cancel-safe, as the Elector says.
            () = elector.hold() => None,
            Some(ended) = tasks.join_next() => Some(unplanned(ended, stop)),
            died = crew.join_next() => Some(Err(anyhow::anyhow!("a worker ended: {died:?}"))),
            () = went_back.cancelled() => Some(Ok(())),
            () = stop.cancelled() => Some(Ok(())),
        };
        // Whoever is in the middle of a reconcile ends it; without the Lease its writes are refused.
        shift.cancel();
        let drained = async { while crew.join_next().await.is_some() {} };
        if tokio::time::timeout(FINISH, drained).await.is_err() {
            tracing::warn!("workers were cut off");
        }
        crew.shutdown().await;
        context.metrics.leading(false);
        match ended {
            Some(ended) => return ended,
            None => tracing::warn!("leads no more"),
        }
    }
}

async fn work(context: Arc<Context>, shift: CancellationToken) {
    loop {
        let (key, why) = tokio::select! {
            biased;
            () = shift.cancelled() => return,
            // Cancel-safe: a key is taken in the same poll that gives it.
            next = context.queue.next() => next,
        };
        let span = tracing::debug_span!("reconcile", %key, why);
        // In a task of its own, so that a panic over one object stops no other.
        let ran = tokio::spawn({
            let (context, key) = (context.clone(), key.clone());
            async move { reconcile(&context, &key).await }.instrument(span)
        });
        let result = ran.await.unwrap_or_else(|_| Err(Error::Panicked { object: key.to_string() }));
        context.metrics.reconciled(key.kind(), result.as_ref().err().map(Error::label));
        match result {
            Ok(next) => {
                context.queue.done(&key);
                match next {
                    Next::Done => {}
                    Next::Resync => {
                        let roll = RandomState::new().hash_one(&key) % 1000;
                        let more = RESYNC.mul_f64(f64::from(u32::try_from(roll).unwrap_or(0)) / 2000.0);
                        context.queue.add_at(key, Instant::now() + RESYNC + more);
                    }
                    Next::At(at) => context.queue.add_at(key, at),
                }
            }
            Err(error) => {
                let wait = context.queue.failed(&key, !error.retryable());
                let text = condition::chain(&error);
                match &error {
                    // Part of daily life: two writers, one object.
                    Error::Conflict { .. } | Error::StillThere { .. } | Error::NotLeading { .. } => {
                        tracing::debug!(%key, why, reason = error.label(), ?wait, "{text}");
                    }
                    _ => tracing::warn!(%key, why, reason = error.label(), ?wait, "{text}"),
                }
            }
        }
        let (bots, nodes) = context.world().waiting();
        context.metrics.waiting(bots, context.queue.depth(), nodes);
    }
}

async fn reconcile(context: &Context, key: &Key) -> Result<Next, Error> {
    match key {
        Key::Pending => {
            let order = context.world().place_waiting(Instant::now());
            context.queue.add_all(order, "room");
            Ok(Next::Done)
        }
        Key::Bot(name) => bot::reconcile(context, name).await,
        Key::Record(name) => record::reconcile(context, name).await,
        Key::Snapshot(name) => snapshot::reconcile(context, name).await,
        Key::Node(name) => node::reconcile(context, name).await,
        Key::Holder(node) => holder::reconcile(context, node).await,
        Key::Access(at) => access::reconcile(context, at).await,
    }
}
