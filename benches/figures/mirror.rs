//! What the mirror costs: 10,000 bots into an empty database and again into one that is right, how far it lags behind a stream of
//! changes, and the memory of a controller that has it.
//!
//! The bots are bound to a node that is played here, and so is what its agent says; PostgreSQL itself tells when a row was committed
//! (`track_commit_timestamp`) and how long a look at all rows took.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use berth::api::{AGENT, BotContainer, BotContainerSpec, BotNode, NODE_LEASE_NAMESPACE};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, PgConnection, Row as _};
use tokio::time::{Instant, sleep};

use crate::Place;
use crate::machine;
use crate::report::{Better, Figure, Samples};

/// Bots in the mirror.
const BOTS: usize = 10_000;
/// Looks at all rows that are right.
const LOOKS: usize = 5;
/// Changes a second, and for how long.
const RATE: u32 = 500;
const STREAM: Duration = Duration::from_secs(20);
/// Changes that go to etcd in one call: its JSON gateway would have a core for itself otherwise.
const TOGETHER: usize = 5;
/// Longer than anything takes that works.
const LIMIT: Duration = Duration::from_secs(600);
/// How many calls of the API server are under way.
const CALLS: usize = 32;
const NODE: &str = "played";

/// What it takes.
pub struct Mirror<'a> {
    place: &'a Place,
    bots: Api<BotContainer>,
    image: String,
    database: PgConnectOptions,
    url: String,
}

impl<'a> Mirror<'a> {
    pub fn new(place: &'a Place, namespace: &str) -> anyhow::Result<Self> {
        let url = std::env::var("BERTH_BENCH_DATABASE_URL")
            .context("BERTH_BENCH_DATABASE_URL is not set; run `make bench`")?;
        Ok(Self {
            place,
            bots: Api::namespaced(place.client.clone(), namespace),
            image: place.image.clone(),
            database: url.parse()?,
            url,
        })
    }

    async fn query(&self, sql: &str) -> anyhow::Result<Vec<sqlx::postgres::PgRow>> {
        let mut conn: PgConnection = self.database.connect().await?;
        Ok(sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).fetch_all(&mut conn).await?)
    }

    /// A controller that leads on its own Lease, beside the one that the cluster has.
    async fn controller(&self, mirror: bool) -> anyhow::Result<Controller> {
        let log = self.place.dir.join("mirror-controller.log");
        let mut command = Command::new(&self.place.binary);
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        command.args(["controller", "--leader-name", "bench-mirror", "--health-address", &format!("127.0.0.1:{port}")]);
        command.env_remove("DATABASE_URL");
        if mirror {
            command.args(["--database-url", &self.url, "--database-resync-seconds", "5"]);
        }
        let file = File::create(&log)?;
        let child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()?;
        let mut controller = Controller { child, log, port };
        controller.says("leading").await?;
        Ok(controller)
    }

    async fn make(&self) -> anyhow::Result<()> {
        crate::say(&format!("{BOTS} bots"));
        let nodes: Api<BotNode> = Api::all(self.place.client.clone());
        let params = PatchParams::apply(AGENT).force();
        let body =
            json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotNode", "metadata": {"name": NODE}, "spec": {}});
        nodes.patch(NODE, &params, &Patch::Apply(&body)).await?;
        beat(&self.place.client).await?;
        let room = json!({"cpu": "100000", "memory": "1000Ti", "bots": "100000"});
        let ready = json!({"type": "Ready", "status": "True", "reason": "AgentReady", "message": "", "lastTransitionTime": TIME});
        let body = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotNode", "metadata": {"name": NODE},
            "status": {"snapshotters": ["overlayfs"], "runtimeHandlers": ["runc"], "allocatable": room, "capacity": room,
                "conditions": [ready]}});
        nodes.patch_status(NODE, &params, &Patch::Apply(&body)).await?;
        let made = stream::iter(0..BOTS).map(|i| async move {
            let spec: BotContainerSpec = serde_json::from_value(json!({"image": self.image, "nodeName": NODE}))?;
            self.bots.create(&PostParams::default(), &BotContainer::new(&name(i), spec)).await?;
            anyhow::Ok(())
        });
        made.buffer_unordered(CALLS).try_collect::<Vec<_>>().await?;
        // Bound by the cluster's own controller.
        let began = Instant::now();
        loop {
            beat(&self.place.client).await?;
            let bound = self.query_bound().await?;
            if bound == BOTS {
                break;
            }
            anyhow::ensure!(began.elapsed() < LIMIT, "{bound} of {BOTS} bots are bound after {LIMIT:?}");
            sleep(Duration::from_secs(2)).await;
        }
        crate::say("what their agent says of them");
        let said = stream::iter(0..BOTS).map(|i| async move {
            let body = says(&name(i), 4);
            self.bots.patch_status(&name(i), &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await?;
            anyhow::Ok(())
        });
        said.buffer_unordered(CALLS).try_collect::<Vec<_>>().await?;
        beat(&self.place.client).await
    }

    async fn query_bound(&self) -> anyhow::Result<usize> {
        let params = ListParams::default().fields(&format!("status.nodeName={NODE}"));
        let listed = Api::<BotContainer>::all(self.place.client.clone()).list_metadata(&params).await?;
        Ok(listed.items.len())
    }

    async fn clear(&self) -> anyhow::Result<()> {
        let names = self.bots.list_metadata(&ListParams::default().fields(&format!("status.nodeName={NODE}"))).await?;
        let removed = stream::iter(names.items).map(|bot| async move {
            let name = bot.name_any();
            let none = json!({"metadata": {"finalizers": null}});
            self.bots.delete(&name, &DeleteParams::default()).await?;
            match self.bots.patch(&name, &PatchParams::default(), &Patch::Merge(&none)).await {
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
                done => done.map(drop),
            }
        });
        removed.buffer_unordered(CALLS).try_collect::<Vec<_>>().await?;
        Api::<BotNode>::all(self.place.client.clone()).delete(NODE, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Changes bots for a while; how far behind each row was, in milliseconds, and the rate that was kept.
    ///
    /// The changes are written into etcd: with two cores the API server itself takes a quarter of that rate, and what is measured is
    /// the way from its watch to the row. A watch of our own tells how much of it is the API server's.
    async fn stream(&self) -> anyhow::Result<Lags> {
        crate::say(&format!("{RATE} changes a second for {STREAM:?}"));
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let watching = tokio::spawn(watch(self.bots.clone(), seen.clone()));
        let etcd = Etcd::new()?;
        let count = (STREAM.as_secs_f64() * f64::from(RATE)) as usize;
        let before = stream::iter(0..count.min(BOTS)).map(|i| etcd.get(name(i)));
        let mut before: Vec<Value> = before.buffered(CALLS).try_collect().await?;
        let (began, period) = (Instant::now(), Duration::from_secs(1) / RATE);
        let together = u32::try_from(TOGETHER)?;
        let bodies = before.iter_mut().enumerate().map(|(i, bot)| {
            let seq = 5;
            bot["status"]["transitions"] = says(&name(i), seq)["status"]["transitions"].clone();
            let change = (bot["metadata"]["uid"].as_str().unwrap_or_default().to_owned(), seq);
            (change, Etcd::key(&name(i)), BASE64.encode(bot.to_string()))
        });
        let bodies: Vec<_> = bodies.collect();
        let changes = stream::iter(bodies.chunks(TOGETHER).enumerate()).map(|(n, some)| {
            let etcd = &etcd;
            async move {
                tokio::time::sleep_until(began + period * together * u32::try_from(n)?).await;
                etcd.put(some.iter().map(|(_, key, value)| (key, value))).await?;
                let now = SystemTime::now();
                anyhow::Ok(some.iter().map(|(change, ..)| (change.clone(), now)).collect::<Vec<_>>())
            }
        });
        let at: Vec<Vec<((String, i64), SystemTime)>> = changes.buffer_unordered(CALLS).try_collect().await?;
        let at: HashMap<(String, i64), SystemTime> = at.into_iter().flatten().collect();
        let rate = count as f64 / began.elapsed().as_secs_f64();
        let waited = Instant::now();
        loop {
            let sql = "SELECT object_uid::text, seq, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 FROM lifecycle_events WHERE seq > 4";
            let rows = self.query(sql).await?;
            if rows.len() >= at.len() {
                watching.abort();
                let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                // Written before the answer was here: no lag.
                let since = |when: Option<&SystemTime>, then: f64| {
                    let when = when?.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs_f64();
                    Some((then - when).max(0.0) * 1e3)
                };
                let lags = rows.iter().filter_map(|row| since(at.get(&(row.get(0), row.get(1))), row.get(2)));
                let watch = at.iter().filter_map(|(change, when)| {
                    let then = seen.get(change)?.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs_f64();
                    since(Some(when), then)
                });
                return Ok(Lags { rows: Samples::new(lags.collect())?, watch: Samples::new(watch.collect())?, rate });
            }
            anyhow::ensure!(waited.elapsed() < LIMIT, "{} of {} changes have no row", at.len() - rows.len(), at.len());
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// By a BotContainer's uid, and the number of what happened to it.
type Seen = HashMap<(String, i64), SystemTime>;

/// How far behind they are. Milliseconds.
struct Lags {
    /// The rows.
    rows: Samples,
    /// A watch of the API server.
    watch: Samples,
    /// Changes a second.
    rate: f64,
}

/// Notes when a watch tells of each change.
async fn watch(bots: Api<BotContainer>, seen: Arc<Mutex<Seen>>) {
    let mut events = watcher(bots, watcher::Config::default()).default_backoff().boxed();
    while let Some(event) = events.next().await {
        if let Ok(watcher::Event::Apply(bot)) = event
            && let Some(last) = bot.status.as_ref().and_then(|status| status.transitions.last())
        {
            let change = (bot.uid().unwrap_or_default(), last.seq);
            seen.lock().unwrap_or_else(PoisonError::into_inner).entry(change).or_insert_with(SystemTime::now);
        }
    }
}

/// The cluster's etcd, by its JSON gateway.
struct Etcd {
    client: reqwest::Client,
    url: String,
}

impl Etcd {
    fn new() -> anyhow::Result<Self> {
        let url = std::env::var("BERTH_ETCD").context("BERTH_ETCD is not set; run `make bench`")?;
        Ok(Self { client: reqwest::Client::new(), url })
    }

    fn key(bot: &str) -> String {
        BASE64.encode(format!("/registry/berth.dev/botcontainers/mirror/{bot}"))
    }

    async fn get(&self, bot: String) -> anyhow::Result<Value> {
        let request =
            self.client.post(format!("{}/v3/kv/range", self.url)).body(json!({"key": Self::key(&bot)}).to_string());
        let answer: Value = serde_json::from_slice(&request.send().await?.error_for_status()?.bytes().await?)?;
        let value = answer["kvs"][0]["value"].as_str().with_context(|| format!("etcd has no {bot}: {answer}"))?;
        Ok(serde_json::from_slice(&BASE64.decode(value)?)?)
    }

    /// Keys and values, as the gateway takes them.
    async fn put(&self, all: impl Iterator<Item = (&String, &String)>) -> anyhow::Result<()> {
        let puts: Vec<_> = all.map(|(key, value)| json!({"requestPut": {"key": key, "value": value}})).collect();
        let body = json!({"success": puts}).to_string();
        self.client.post(format!("{}/v3/kv/txn", self.url)).body(body).send().await?.error_for_status()?;
        Ok(())
    }
}

const TIME: &str = "2026-11-24T00:00:00Z";

fn name(i: usize) -> String {
    format!("mirrored-{i}")
}

/// What an agent says of a bot that runs, after so many things happened.
fn says(name: &str, seq: i64) -> Value {
    let condition = |type_: &str, status: &str, reason: &str| {
        json!({"type": type_, "status": status, "reason": reason, "message": "the process runs as asked",
            "lastTransitionTime": TIME, "observedGeneration": 1})
    };
    let types = ["scheduled", "pulled", "created", "started", "paused", "resumed"];
    let transitions: Vec<_> =
        (1..=seq).map(|n| json!({"seq": n, "type": types[(n as usize - 1) % types.len()], "at": TIME})).collect();
    json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": name},
        "status": {
            "phase": "Running", "observedGeneration": 1, "containerId": format!("berth-{name}"), "restartCount": 0,
            "image": {"reference": "docker.io/library/node:22", "digest": format!("sha256:{:064}", 1)},
            "task": {"pid": 4242, "startedAt": TIME}, "network": {"ip": "10.208.3.7", "ips": ["10.208.3.7"]},
            "conditions": [condition("Ready", "True", "AsAsked"), condition("Running", "True", "Running"),
                condition("ImageReady", "True", "ImageReady"), condition("NetworkReady", "True", "NetworkReady")],
            "transitions": transitions,
        },
    })
}

/// A heartbeat that lasts for the whole measurement.
async fn beat(client: &Client) -> anyhow::Result<()> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), NODE_LEASE_NAMESPACE);
    let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(k8s_openapi::jiff::Timestamp::now());
    let body = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": NODE},
        "spec": {"holderIdentity": NODE, "leaseDurationSeconds": 3600, "renewTime": now}});
    leases.patch(NODE, &PatchParams::apply(AGENT).force(), &Patch::Apply(&body)).await?;
    Ok(())
}

struct Controller {
    child: Child,
    log: PathBuf,
    port: u16,
}

impl Controller {
    async fn says(&mut self, words: &str) -> anyhow::Result<()> {
        let began = Instant::now();
        while !std::fs::read_to_string(&self.log)?.contains(words) {
            if let Some(ended) = self.child.try_wait()? {
                anyhow::bail!("the controller ended with {ended}; see {}", self.log.display());
            }
            anyhow::ensure!(
                began.elapsed() < LIMIT,
                "the controller has not said {words:?}; see {}",
                self.log.display()
            );
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// A number of its metrics.
    async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let text = reqwest::get(format!("http://127.0.0.1:{}/metrics", self.port)).await?.text().await?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("the controller has no {name}"))?.parse()?)
    }

    /// Milliseconds that the next look at all rows took, after so many.
    async fn look(&self, after: f64) -> anyhow::Result<f64> {
        let began = Instant::now();
        while self.metric("berth_controller_mirror_resyncs_total").await? <= after {
            anyhow::ensure!(began.elapsed() < LIMIT, "the mirror has not looked at all rows within {LIMIT:?}");
            sleep(Duration::from_millis(100)).await;
        }
        Ok(self.metric("berth_controller_mirror_resync_seconds").await? * 1e3)
    }

    /// Of the process, at rest. Megabytes.
    async fn megabytes(&self) -> anyhow::Result<f64> {
        sleep(Duration::from_secs(5)).await;
        Ok(machine::pss(self.child.id())? as f64 / 1e6)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // It gives its Lease back, so that the next need not wait.
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

/// All figures of the mirror.
pub async fn figures(mirror: &Mirror<'_>) -> anyhow::Result<Vec<Figure>> {
    mirror.make().await?;
    // One controller leads: the cluster's own has nothing to do any more, and would hear of every change as well.
    machine::end_part("controller").await?;
    crate::say("a controller without a mirror");
    let without = mirror.controller(false).await?.megabytes().await?;
    crate::say("all rows from nothing, then again");
    let controller = mirror.controller(true).await?;
    let first = controller.look(0.0).await?;
    let mut again = Vec::new();
    for n in 1..=LOOKS {
        again.push(controller.look(n as f64).await?);
    }
    let with = controller.megabytes().await?;
    drop(controller);
    let controller = mirror.controller(true).await?;
    let started = controller.look(0.0).await?;
    let lags = mirror.stream().await?;
    let busy = controller.megabytes().await?;
    drop(controller);
    mirror.clear().await?;
    let first = Samples::new(vec![first])?;
    Ok(vec![
        Figure::median("mirror_resync", "ms", Better::Lower, &first)
            .note(format!("{BOTS} bots and 4 events of each, into empty tables")),
        Figure::median("mirror_resync_unchanged", "ms", Better::Lower, &Samples::new(again)?)
            .beside("mirror_resync", &first)
            .target(0.05)
            .note(format!("every --database-resync-seconds; by a controller that was just started, which looks at all bots too, {started:.0} ms")),
        Figure::new("mirror_lag_p99", "ms", Better::Lower, lags.rows.percentile(99)).target(1000.0).note(format!(
            "{:.0} changes a second, from etcd's answer to the commit in PostgreSQL; p50 {:.0} ms; of it until a watch of the harness \
             was told: p50 {:.0}, p99 {:.0}",
            lags.rate,
            lags.rows.percentile(50),
            lags.watch.percentile(50),
            lags.watch.percentile(99)
        )),
        Figure::new("controller_rss_10k_bots", "MB", Better::Lower, with.max(busy)).target(150.0).note(format!(
            "PSS; without the mirror {without:.1}, with it {with:.1}, after the stream of changes {busy:.1}"
        )),
    ])
}
