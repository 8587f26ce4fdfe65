//! The node agent: everything on its node, for the bots that are bound to it.
//!
//! ```text
//!            API watch      containerd events      timer
//!                 \               |                /            triggers: they carry no news
//!                  v              v               v
//! run.rs      one loop a bot, side by side, bounded ─────────────────────────────────────┐
//!                  │                                                                     │
//!  desired.rs  BotContainer ──> Desired      observe.rs  containerd, CNI, disk ──> Observed
//!                  │                                        │                            │
//!                  └───────────> plan.rs <──────────────────┘                            │
//!                      plan(desired, observed, now) -> Step | Settled       (pure)       │
//!                                   │                                                    │
//!                    ┌──────────────┴─────────────┐                                      │
//!                act.rs does the step        status.rs says what is (pure)               │
//!                    │    └ bundle.rs        publish.rs writes it, if it differs         │
//!                    └───────────────── look again ──────────────────────────────────────┘
//!
//! record.rs  what is noted on the container, so that the agent needs no memory of its own
//! step.rs    the steps: what each leaves behind when it is cut off
//! cost.rs    what a change of each spec field costs             skills.rs  spec.skills -> files in the bot's data
//! begin.rs   what all else stands on                                        events.rs containerd's event stream
//! node.rs    BotNode and Lease          sweep.rs   what nobody owns          disk.rs   unused images, disk pressure
//! floor.rs   which runtimes are too old, or let bots out                     lineage.rs what the layer stands on
//! snapshot/  BotSnapshots: the same loop once more              version.rs  versions in containerd     gate.rs   who may touch a bot now
//! diff.rs    containerd's own diff, where a layer has no directory                                    moves.rs  quick moves between cgroups
//! shim.rs    what is left of tasks that containerd lost         failpoint.rs   where tests make the agent die
//! ```
//!
//! Who owns what: a bot's loop alone touches what bears its uid; the sweeper touches only uids that have no loop. The
//! agent keeps nothing in memory that a restart would miss: containerd, the API and the disk hold all of it.

pub mod account;
pub mod act;
pub mod args;
mod begin;
pub mod bundle;
pub mod cgroup;
pub mod cleanup;
pub mod cost;
pub mod desired;
pub mod diff;
pub mod disk;
mod events;
pub mod failpoint;
pub mod floor;
pub mod gate;
pub mod host;
pub mod labels;
pub mod lineage;
pub mod metrics;
pub mod moves;
pub mod node;
pub mod observe;
pub mod plan;
pub mod publish;
pub mod record;
pub mod references;
pub mod root;
pub mod run;
pub mod shim;
pub mod signal;
pub mod skills;
pub mod snapshot;
pub mod status;
pub mod step;
pub mod sweep;
pub mod version;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use containerd_client::services::v1::ListTasksRequest;
use containerd_client::types::v1::{Process, Status as TaskState};
use futures::StreamExt as _;
use kube::Api;
use kube::runtime::reflector::store;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use args::AgentArgs;

use crate::api::condition::{Reason, chain};
use crate::api::ids::BotUid;
use crate::api::{BotContainer, BotSnapshot};
use crate::containerd::{CallContext as _, CallFailed, Containerd};
use crate::image::Images;
use crate::layer::{self, Copiers};
use crate::network::Network;
use crate::output::Output;
use crate::telemetry::Health;

use account::Account;
use act::Actor;
use begin::{ensure_namespace, lock_host, prepare_directories, until_done};
use bundle::Bundle;
use cgroup::Cgroups;
use events::{Heard, follow_events};
use host::Host;
use metrics::Metrics;
use moves::Moves;
use node::{NodeFacts, Registration};
use observe::Observer;
use publish::Publisher;
use run::{Bot, Listed, Loops, Nudge, Shared};
use shim::Shims;
use snapshot::sweep::VersionSweeper;
use snapshot::{Snapshots, Takers};
use sweep::Sweeper;
use version::Versions;

/// How many steps of all bots are under way at once.
const STEPS_AT_ONCE: usize = 16;

/// How long after a deletion, a start of the agent or a death of containerd something may still come to be that nobody owns.
const STIRRED: Duration = Duration::from_secs(60);

/// How often is looked whether a bot was left frozen.
const DEBTS: Duration = Duration::from_secs(2);

/// How often is looked in a drain whether all bots have stopped.
const DRAINED: Duration = Duration::from_millis(500);

/// How often is looked for it then.
const SWEEP_STIRRED: Duration = Duration::from_secs(20);

/// Runs the agent until `stop`; bots run on after it.
pub async fn run(args: AgentArgs, host: Host, stop: CancellationToken) -> anyhow::Result<()> {
    let Host { pod, mut machine } = host;
    let args = match &pod {
        Some(pod) => args.of_pod(pod),
        None => args,
    };
    let mut registry = prometheus_client::registry::Registry::default();
    let metrics = Metrics::register(&mut registry);
    let health = Health::new(registry);
    let mut tasks = tokio::task::JoinSet::new();
    if let Some(address) = args.health_address {
        let (health, stop) = (health.clone(), stop.clone());
        tasks.spawn(async move { health.serve(address, stop).await.context("the health endpoint ended") });
    }

    if args.cluster_dns.is_empty() {
        tracing::warn!(
            "no --cluster-dns: bots whose dnsPolicy is ClusterFirst get the node's own DNS, and find no Service by name"
        );
    }
    let image_options = args.image_options()?;
    let prepare = || prepare_directories(&args).map_err(|error| (Reason::StorageFailed, error));
    let Some(lock_file) = until_done(&metrics, &stop, async || prepare()).await else { return Ok(()) };
    let _lock = tokio::select! {
        lock = lock_host(lock_file) => lock?,
        () = stop.cancelled() => return Ok(()),
    };
    let clear = || root::remove_leftovers(&args.mnt_dir()).context("leftovers of an earlier agent can't be removed");
    let clear = async || clear().map_err(|error| (Reason::StorageFailed, error));
    if until_done(&metrics, &stop, clear).await.is_none() {
        return Ok(());
    }

    let config = match pod.as_ref().and_then(|pod| pod.config.clone()) {
        Some(config) => config,
        None => crate::client::config().await?,
    };
    let client = crate::client::client(config.clone())?;
    let account = Arc::new(Account::new(args.node_name.clone(), client.clone(), config));
    let containerd = Containerd::new(&args.containerd_address, &args.containerd_namespace)?;
    ensure_namespace(&containerd, &stop).await;
    let snapshotters = until_done(&metrics, &stop, async || {
        let failed = |error: CallFailed| (Reason::RuntimeUnavailable, anyhow::Error::new(error));
        node::snapshotters(&containerd).await.map_err(failed)
    });
    let Some(mut snapshotters) = snapshotters.await else { return Ok(()) };
    // Also where it does not work now: it may have layers of bots.
    if !snapshotters.contains(&args.snapshotter) {
        snapshotters.push(args.snapshotter.clone());
    }

    machine.default_pids_limit = Some(args.default_pids_limit);
    let cgroups = Cgroups::detect(&args.cgroup_parent);
    let (cpu, memory) = args
        .cgroup_limits(machine.memory_bytes)
        .context("--capacity-cpu or --capacity-memory is no quantity; use for example 4 or 500m, and 8Gi")?;
    if let Err(error) = cgroups.ensure_parent(cpu, memory) {
        // Bots run without it, each within its own limits.
        tracing::error!(error = %chain(&error), "bots are not limited to the node's capacity in all");
    }
    let runtimes = args.runtimes();
    let facts = NodeFacts {
        name: args.node_name.clone(),
        instance: format!("{}_{}", args.node_name, uuid_like()),
        capacity: args.capacity(machine.memory_bytes),
        addresses: args.addresses(),
        runtime_handlers: runtimes.keys().cloned().collect(),
        cgroup: cgroups.describe().to_owned(),
        runc: args::runc_version().await,
    };
    let network = until_done(&metrics, &stop, async || match Network::new(args.network_options()) {
        Err(error) if error.retryable() => {
            Err((error.reason(), anyhow::Error::new(error).context("the network of bots can't be used")))
        }
        done => Ok(done),
    });
    let Some(network) = network.await else { return Ok(()) };
    let network = network.context("the network of bots can't be used")?;
    let output = Output::new(args.output_options());
    let attached = until_done(&metrics, &stop, async || {
        let failed = |error: crate::output::OutputError| {
            (error.reason(), anyhow::Error::new(error).context("the logger of bots' output can't be started"))
        };
        output.attach().await.map_err(failed)
    });
    if attached.await.is_none() {
        return Ok(());
    }
    let images = Images::new(containerd.clone(), image_options);
    if let Err(error) = images.clear_interrupted().await {
        tracing::warn!(error = %chain(&error), "what earlier pulls left half-made is not cleared; it ends by itself");
    }
    let bundle_options = args.bundle_options(&facts, runtimes);
    let files_dir = bundle_options.files_dir.clone();
    let shims = Shims::new(
        containerd.clone(),
        &args.containerd_address,
        &args.containerd_state(),
        &args.containerd_namespace,
        cgroups.clone(),
    );
    let bundle = Bundle::new(bundle_options, machine, cgroups.clone(), client.clone());
    let (room_sender, room) = watch::channel(None);
    let (orphans_sender, orphans) = watch::channel(None);
    let registration = Registration::new(client.clone(), containerd.clone(), facts, room, orphans, metrics.clone());
    let registration = Arc::new(registration);

    // The rules of the network follow the node's CIDR.
    let (cidr_sender, cidr) = watch::channel(None);
    let (draining_sender, draining) = watch::channel(None);
    let (ready_sender, mut ready) = watch::channel(false);
    {
        let (registration, stop) = (registration.clone(), stop.clone());
        tasks.spawn(async move {
            registration.keep(ready_sender, stop).await;
            Ok(())
        });
    }
    {
        let (registration, stop) = (registration.clone(), stop.clone());
        tasks.spawn(async move {
            registration.follow(cidr_sender, draining_sender, stop).await;
            Ok(())
        });
    }
    {
        let (network, cidr, stop) = (network.clone(), cidr.clone(), stop.clone());
        tasks.spawn(async move {
            keep_rules(network, cidr, stop).await;
            Ok(())
        });
    }

    // What an agent before this one owes: a bot that it had frozen for a snapshot, and no copier left to thaw it.
    let debts = args.debts_dir();
    settle_debts(&debts, &metrics);
    let copiers = Copiers::new(args.program(), Some(args.helpers_cgroup()));
    let versions = Versions::new(containerd.clone(), copiers, args.snapshots_dir(), args.mnt_dir());
    let (bots, mut writer) = store::<BotContainer>();
    let (snapshots, mut snapshot_writer) = store::<BotSnapshot>();
    let (nudges, mut nudged) = mpsc::channel::<Nudge>(256);
    let shared = Arc::new(Shared {
        observer: Observer::new(
            containerd.clone(),
            network.clone(),
            output.clone(),
            cgroups.clone(),
            shims.clone(),
            files_dir,
        ),
        actor: Actor {
            containerd: containerd.clone(),
            images,
            network: network.clone(),
            output: output.clone(),
            account,
            bundle,
            shims: shims.clone(),
            moves: Moves::new(cgroups.version()),
            versions,
            snapshotters: snapshotters.clone(),
        },
        publisher: Publisher::new(client.clone(), args.node_name.clone(), metrics.clone()),
        bots: bots.clone(),
        snapshots: Snapshots {
            store: snapshots.clone(),
            copies: Semaphore::new(snapshot::AT_ONCE),
            debts: debts.clone(),
        },
        listed: Listed::default(),
        gates: Arc::default(),
        cgroups,
        nudges,
        cidr: cidr.clone(),
        draining: draining.clone(),
        went_back: registration.went_back(),
        default_snapshotter: args.snapshotter.clone(),
        began: Instant::now(),
        steps: Semaphore::new(STEPS_AT_ONCE),
        metrics: metrics.clone(),
        stop: stop.clone(),
    });
    {
        let (shared, containerd, stop) = (shared.clone(), containerd.clone(), stop.clone());
        let options = args.disk_options();
        tasks.spawn(async move {
            disk::keep(shared, containerd, options, room_sender, stop).await;
            Ok(())
        });
    }
    {
        let (output, stop) = (output.clone(), stop.clone());
        tasks.spawn(async move {
            keep_logger(output, stop).await;
            Ok(())
        });
    }
    {
        let (containerd, draining, health, stop) = (containerd.clone(), draining.clone(), health.clone(), stop.clone());
        tasks.spawn(async move {
            tell_drained(containerd, draining, health, stop).await;
            Ok(())
        });
    }
    let (event_sender, mut events) = mpsc::channel::<Heard>(1024);
    {
        let (containerd, stop) = (containerd.clone(), stop.clone());
        tasks.spawn(async move {
            follow_events(containerd, event_sender, stop).await;
            Ok(())
        });
    }

    let selector = format!("status.nodeName={}", args.node_name);
    let config = watcher::Config::default().fields(&selector);
    let api: Api<BotContainer> = Api::all(client.clone());
    let begin_bots = || watcher(api.clone(), config.clone()).default_backoff();
    let mut objects = std::pin::pin!(begin_bots());
    let snapshot_api: Api<BotSnapshot> = Api::all(client.clone());
    let begin_snapshots = || watcher(snapshot_api.clone(), config.clone()).default_backoff();
    let mut versions_seen = std::pin::pin!(begin_snapshots());
    let mut loops = Loops::default();
    let mut takers = Takers::default();
    let mut debts_at = tokio::time::interval(DEBTS);
    debts_at.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let versions = shared.actor.versions.clone();
    let (grace, retention) = (args.orphan_grace(), args.orphan_retention);
    let versions = VersionSweeper::new(client.clone(), versions, snapshotters, grace, retention, orphans_sender);
    let mut sweeper = Some(Sweeper::new(client, containerd, network, output, shims, versions));
    let mut sweeping = tokio::task::JoinSet::new();
    let mut sweep_at = Instant::now() + Duration::from_secs(5);
    let mut calm_at = Instant::now() + STIRRED;
    let (mut cidr_seen, mut draining_seen) = (cidr, draining);
    let mut went_back = registration.went_back();
    let ended = loop {
        tokio::select! {
            // Nothing is lost by not polling it: a watch keeps its place.
            event = objects.next() => match event {
                Some(Ok(event)) => {
                    writer.apply_watcher_event(&event);
                    match &event {
                        Event::Apply(bot) => wake(&mut loops, &shared, bot, "object changed"),
                        // Not gone for sure: an unbound bot arrives so as well. Its loop looks, the sweeper decides.
                        Event::Delete(bot) => {
                            wake(&mut loops, &shared, bot, "object left");
                            sweep_at = sweep_at.min(Instant::now() + Duration::from_secs(2));
                            calm_at = Instant::now() + STIRRED;
                        }
                        Event::Init | Event::InitApply(_) => {}
                        Event::InitDone => {
                            shared.listed.bots.store(true, Ordering::Relaxed);
                            health.set_ready(*ready.borrow());
                            for bot in bots.state() {
                                wake(&mut loops, &shared, &bot, "list");
                            }
                            loops.wake_all("list");
                            takers.wake_all("list of bots");
                        }
                    }
                    metrics.bots.set(i64::try_from(loops.len()).unwrap_or(i64::MAX));
                }
                Some(Err(error)) => {
                    metrics.api_error("watch");
                    registration.watch_broke();
                    tracing::warn!(error = %chain(&error), "the watch of BotContainers failed; it is made anew");
                }
                None => break Err(anyhow::anyhow!("the watch of BotContainers ended")),
            },
            event = versions_seen.next() => match event {
                Some(Ok(event)) => {
                    snapshot_writer.apply_watcher_event(&event);
                    match &event {
                        Event::Apply(snapshot) | Event::Delete(snapshot) => {
                            takers.wake(&shared, snapshot, "object changed");
                            wake_bot_of(&loops, snapshot);
                            if let Event::Delete(_) = &event {
                                sweep_at = sweep_at.min(Instant::now() + Duration::from_secs(2));
                                calm_at = Instant::now() + STIRRED;
                            }
                        }
                        Event::Init | Event::InitApply(_) => {}
                        Event::InitDone => {
                            shared.listed.snapshots.store(true, Ordering::Relaxed);
                            for snapshot in snapshots.state() {
                                takers.wake(&shared, &snapshot, "list");
                            }
                            takers.wake_all("list");
                            loops.wake_all("list of snapshots");
                        }
                    }
                }
                Some(Err(error)) => {
                    metrics.api_error("watch");
                    registration.watch_broke();
                    tracing::warn!(error = %chain(&error), "the watch of BotSnapshots failed; it is made anew");
                }
                None => break Err(anyhow::anyhow!("the watch of BotSnapshots ended")),
            },
            // Sent by loops of ours; nothing is lost by not polling it.
            Some(nudge) = nudged.recv() => match nudge {
                Nudge::Bot(uid) => loops.wake_uid(&uid, "snapshot"),
                Nudge::Snapshots(uid) => takers.wake_of(&uid, "bot"),
                Nudge::Sweep => sweep_at = sweep_at.min(Instant::now()),
            },
            // A copier and its guardian may both have been killed in the middle of a freeze.
            _ = debts_at.tick() => settle_debts(&debts, &metrics),
            Some(heard) = events.recv() => match heard {
                Heard::Task(uid) => {
                    loops.wake_uid(&uid, "containerd event");
                    takers.wake_of(&uid, "containerd event");
                }
                // It tells of nothing that it finds when it starts, and its death cuts off whatever it was at.
                Heard::Back => {
                    loops.wake_all("containerd is back");
                    takers.wake_all("containerd is back");
                    sweep_at = sweep_at.min(Instant::now() + Duration::from_secs(2));
                    calm_at = Instant::now() + STIRRED;
                }
            },
            Ok(()) = cidr_seen.changed() => loops.wake_all("node CIDR"),
            // Their stores are filled anew by the lists that a watch begins with.
            Ok(()) = went_back.changed() => {
                objects.set(begin_bots());
                versions_seen.set(begin_snapshots());
            }
            Ok(()) = draining_seen.changed() => loops.wake_all("drain"),
            Ok(()) = ready.changed() => {
                health.set_ready(shared.listed.bots.load(Ordering::Relaxed) && *ready.borrow());
            }
            ended = loops.reap() => if let Err(error) = ended {
                break Err(anyhow::Error::new(error).context("a bot's loop ended by a bug"));
            },
            ended = takers.reap() => if let Err(error) = ended {
                break Err(anyhow::Error::new(error).context("a snapshot's loop ended by a bug"));
            },
            // Beside the loops, so that no bot waits for it; a sweep only looks, and its orphans get loops of their own.
            () = tokio::time::sleep_until(sweep_at), if shared.listed.both() && sweeper.is_some() => {
                if let Some(mut idle) = sweeper.take() {
                    let (tended, snapshots) = (loops.uids(), takers.uids());
                    sweeping.spawn(async move {
                        let found = idle.sweep(&tended, &snapshots).await;
                        (idle, found)
                    });
                }
            }
            Some(swept) = sweeping.join_next() => match swept {
                Ok((idle, found)) => {
                    sweeper = Some(idle);
                    let wait = match found {
                        Ok(found) => {
                            for orphan in found.orphans {
                                loops.take_down(&shared, orphan);
                            }
                            found.wait
                        }
                        Err(error) => {
                            if let sweep::SweepFailed::Api(_) = error {
                                metrics.api_error("list");
                            }
                            tracing::warn!(error = %chain(&error), "nothing was swept");
                            Duration::from_secs(10)
                        }
                    };
                    let now = Instant::now();
                    sweep_at = now + if now < calm_at { wait.min(SWEEP_STIRRED) } else { wait };
                }
                Err(error) => break Err(anyhow::Error::new(error).context("the sweep ended by a bug")),
            },
            Some(ended) = tasks.join_next() => match ended {
                Ok(Ok(())) if stop.is_cancelled() => {}
                Ok(Ok(())) => break Err(anyhow::anyhow!("a part of the agent ended by itself")),
                Ok(Err(error)) => break Err(error),
                Err(error) => break Err(anyhow::Error::new(error).context("a part of the agent ended by a bug")),
            },
            () = stop.cancelled() => break Ok(()),
        }
    };
    health.set_ready(false);
    stop.cancel();
    // Every loop ends after the step under way; nobody reads what they send each other any more.
    drop(nudged);
    loops.join().await;
    takers.join().await;
    if ended.is_ok()
        && let Err(error) = registration.leave().await
    {
        tracing::warn!(error = %chain(&error), "the BotNode still says Ready; its Lease runs out by itself");
    }
    while tasks.join_next().await.is_some() {}
    ended
}

/// Whom a change of a snapshot may concern: a rollback waits for what it replaces, a deletion for the last version.
fn wake_bot_of(loops: &Loops, snapshot: &BotSnapshot) {
    let uid = snapshot.status.as_ref().and_then(|status| BotUid::parse(status.bot_uid.as_deref()?).ok());
    if let Some(uid) = uid {
        loops.wake_uid(&uid, "snapshot");
    }
}

/// Thaws bots that somebody froze who is not there any more.
fn settle_debts(dir: &Path, metrics: &Metrics) {
    match layer::settle_debts(dir) {
        Ok(thawed) => {
            for id in thawed {
                metrics.error(Reason::Thawed);
                tracing::warn!(id, "a bot that a snapshot had frozen was thawed: its copier was killed");
            }
        }
        Err(error) => tracing::error!(dir = %dir.display(), %error, "can't see whether a bot was left frozen"),
    }
}

fn wake(loops: &mut Loops, shared: &Arc<Shared>, bot: &BotContainer, reason: &'static str) {
    let meta = &bot.metadata;
    match BotUid::parse(meta.uid.as_deref().unwrap_or_default()) {
        Ok(uid) => {
            let namespace = meta.namespace.clone().unwrap_or_default();
            let name = meta.name.clone().unwrap_or_default();
            loops.wake(shared, &Bot { uid, namespace, name }, reason);
        }
        Err(error) => tracing::error!(%error, name = meta.name, "a BotContainer without a usable uid is skipped"),
    }
}

/// Says whether the node is drained, by what containerd has: the node's holder Pod waits for it.
async fn tell_drained(
    containerd: Containerd,
    mut draining: watch::Receiver<Option<bool>>,
    health: Health,
    stop: CancellationToken,
) {
    loop {
        let wanted = *draining.borrow_and_update() == Some(true);
        let listed = match wanted {
            false => None,
            true => {
                let tasks = containerd.tasks().list(containerd.request(ListTasksRequest::default())).await;
                tasks
                    .call("list", "tasks")
                    .inspect_err(|error| tracing::warn!(error = %chain(error), "tasks are not counted"))
                    .ok()
            }
        };
        let ended = |task: &Process| task.status() == TaskState::Stopped;
        health.set_drained(listed.is_some_and(|listed| listed.tasks.iter().all(ended)));
        tokio::select! {
            () = tokio::time::sleep(DRAINED), if wanted => {}
            changed = draining.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

async fn keep_rules(
    network: Network,
    mut cidr: watch::Receiver<Option<crate::network::Cidr>>,
    stop: CancellationToken,
) {
    loop {
        let current = *cidr.borrow_and_update();
        let wait = match current {
            Some(cidr) => match network.ensure_rules(&cidr).await {
                Ok(()) => Duration::from_secs(120),
                Err(error) => {
                    tracing::error!(error = %chain(&error), "the network rules of bots are not in force; tried again");
                    Duration::from_secs(5)
                }
            },
            None => Duration::from_secs(3600),
        };
        tokio::select! {
            changed = cidr.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(run::jittered(wait)) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Heals the loggers where both of the pair were killed: a bot must not wait for its own next look to be drained again.
async fn keep_logger(output: Output, stop: CancellationToken) {
    loop {
        if let Err(error) = output.attach().await {
            tracing::warn!(error = %chain(&error), "the logger of bots' output is not there; tried again");
        }
        tokio::select! {
            () = tokio::time::sleep(run::jittered(Duration::from_secs(5))) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Eight random bytes in hex: tells this process from all others that were the node's agent.
fn uuid_like() -> String {
    let mut bytes = [0u8; 8];
    // Without randomness the name is less telling, and nothing hangs on it.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
