//! The other peer: the same image as a Pod, by this kubelet, on this containerd.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::bots::Bots;
use super::report::{Better, Figure, Samples};
use super::server::Writes;
use super::{BURST, BURSTS, QUIET, SETTLE, WARM_UP, machine, names, samples, say};

/// Longer than anything takes that works.
const LIMIT: Duration = Duration::from_secs(300);

/// Starts of each side, one after another.
const STARTS: usize = 15;

/// Since when a Pod runs, and since when it is gone.
#[derive(Clone, Copy, Debug, Default)]
struct Sight {
    running: Option<Instant>,
    gone: Option<Instant>,
}

/// Pods of one namespace. Dropping it ends its watch.
struct Pods {
    api: Api<Pod>,
    image: String,
    sights: watch::Receiver<HashMap<String, Sight>>,
    _watch: tokio::task::JoinSet<()>,
}

impl Pods {
    fn watch(client: &Client, namespace: &str, image: &str) -> Self {
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let (sender, sights) = watch::channel(HashMap::<String, Sight>::new());
        let mut events = watcher::watcher(api.clone(), watcher::Config::default()).boxed();
        let mut task = tokio::task::JoinSet::new();
        task.spawn(async move {
            while let Some(event) = events.next().await {
                let now = Instant::now();
                let (pod, gone) = match event {
                    Ok(Event::Apply(pod) | Event::InitApply(pod)) => (pod, false),
                    Ok(Event::Delete(pod)) => (pod, true),
                    // What was missed shows as a wait that takes too long, and fails the run.
                    Ok(Event::Init | Event::InitDone) | Err(_) => continue,
                };
                let runs = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
                sender.send_modify(|all| {
                    let sight = all.entry(pod.metadata.name.unwrap_or_default()).or_default();
                    if runs {
                        sight.running.get_or_insert(now);
                    }
                    if gone {
                        sight.gone.get_or_insert(now);
                    }
                });
            }
        });
        Self { api, image: image.to_owned(), sights, _watch: task }
    }

    async fn start(&self, name: &str) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {
                "containers": [{"name": "bot", "image": self.image, "env": [{"name": "BOT_NAME", "value": name}]}],
                "automountServiceAccountToken": false, "enableServiceLinks": false,
            },
        });
        self.api.patch(name, &PatchParams::apply("bench"), &Patch::Apply(&pod)).await?;
        Ok(self.seen(name, "Running", |sight| sight.running).await? - began)
    }

    async fn delete(&self, name: &str) -> anyhow::Result<()> {
        self.api.delete(name, &DeleteParams::default().grace_period(0)).await?;
        self.seen(name, "gone", |sight| sight.gone).await.map(drop)
    }

    async fn seen(&self, name: &str, what: &str, of: fn(&Sight) -> Option<Instant>) -> anyhow::Result<Instant> {
        let mut sights = self.sights.clone();
        let found = sights.wait_for(|all| all.get(name).and_then(of).is_some());
        let found = tokio::time::timeout(LIMIT, found).await;
        let found = found.with_context(|| format!("Pod {name} is not {what} after {LIMIT:?}"))??;
        found.get(name).and_then(of).context("it was seen")
    }

    async fn burst(&self, names: &[String]) -> anyhow::Result<Duration> {
        let began = Instant::now();
        try_join_all(names.iter().map(|name| self.start(name))).await?;
        Ok(began.elapsed())
    }

    async fn clear(&self, names: &[String]) -> anyhow::Result<()> {
        try_join_all(names.iter().map(|name| self.delete(name))).await.map(drop)
    }
}

/// One after another and 40 at once, in turns; with what each costs in memory and writes.
pub async fn figures(client: &Client, bots: &Bots, namespace: &str, image: &str) -> anyhow::Result<Vec<Figure>> {
    let pods = Pods::watch(client, namespace, image);
    say("starts of bots and of Pods, one after another");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for i in 0..WARM_UP + STARTS {
        let name = format!("single-{i}");
        let bot = bots.start(&name).await?.running;
        sleep(SETTLE).await;
        bots.delete(&name).await?;
        sleep(SETTLE).await;
        let pod = pods.start(&name).await?;
        sleep(SETTLE).await;
        pods.delete(&name).await?;
        sleep(QUIET / 5).await;
        if i >= WARM_UP {
            ours.push(bot);
            theirs.push(pod);
        }
    }
    let (mut our_bursts, mut their_bursts) = (Vec::new(), Vec::new());
    let (mut memory, mut writes) = ([0.0; 2], [String::new(), String::new()]);
    for i in 0..BURSTS {
        say(&format!("burst {} of {BURSTS}, {BURST} bots, then {BURST} Pods", i + 1));
        let names = names(&format!("many-{i}"), BURST);
        let before = Writes::read(client).await?;
        our_bursts.push(BURST as f64 / bots.burst(&names).await?.as_secs_f64());
        sleep(QUIET).await;
        writes[0] = Writes::read(client).await?.since(&before).but_leases().describe(BURST);
        memory[0] = machine::shims("berth")? as f64 / 1e6 / BURST as f64;
        bots.clear(&names).await?;
        sleep(QUIET).await;
        let before = Writes::read(client).await?;
        their_bursts.push(BURST as f64 / pods.burst(&names).await?.as_secs_f64());
        sleep(QUIET).await;
        writes[1] = Writes::read(client).await?.since(&before).but_leases().describe(BURST);
        memory[1] = machine::shims("k8s.io")? as f64 / 1e6 / BURST as f64;
        pods.clear(&names).await?;
        sleep(QUIET * 2).await;
    }
    let peer = "the same image as a Pod";
    let [ours_mb, theirs_mb] = memory;
    Ok(vec![
        Figure::median("start_p50_vs_pod", "ms", Better::Lower, &samples(ours.into_iter())?)
            .beside(peer, &samples(theirs.into_iter())?)
            .target(0.5),
        Figure::median("start_burst_40_vs_pod", "1/s", Better::Higher, &Samples::new(our_bursts)?)
            .beside("40 such Pods", &Samples::new(their_bursts)?)
            .target(3.0)
            .note(format!("writes a start: {}; of a Pod: {}", writes[0], writes[1])),
        Figure::new("shim_memory_per_bot", "MB", Better::Lower, ours_mb)
            .beside(peer, &Samples::new(vec![theirs_mb])?)
            .note("PSS of shims and sandboxes of 40, each's share"),
    ])
}
