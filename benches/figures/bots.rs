//! Our side: bots, applied as people do and seen by a watch as people see them.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context as _;
use berth::api::bot_container::{OperatingMode, Phase};
use berth::api::{BotContainer, BotContainerSpec, FINALIZER};
use futures::StreamExt as _;
use futures::future::try_join_all;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

/// Longer than anything takes that works.
const LIMIT: Duration = Duration::from_secs(120);

/// One state of an object, and when the watch brought it.
#[derive(Clone, Debug)]
pub struct Sight {
    pub at: Instant,
    /// The phase, if it is that of the newest spec.
    pub phase: Option<Phase>,
    pub finalizer: bool,
    pub bound: bool,
    pub gone: bool,
}

/// Bots of one namespace. Dropping it ends its watch.
pub struct Bots {
    api: Api<BotContainer>,
    image: String,
    sights: watch::Receiver<HashMap<String, Vec<Sight>>>,
    _watch: tokio::task::JoinSet<()>,
}

/// When a start came to each of its stages.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// The API server answered the apply.
    pub applied: Duration,
    /// The finalizer is there.
    pub finalizer: Duration,
    /// A node is.
    pub bound: Duration,
    /// The phase is Running.
    pub running: Duration,
}

impl Bots {
    /// Watches `namespace`, where nobody else may make bots.
    pub async fn watch(client: &Client, namespace: &str, image: &str) -> anyhow::Result<Self> {
        let api: Api<BotContainer> = Api::namespaced(client.clone(), namespace);
        let (sender, sights) = watch::channel(HashMap::<String, Vec<Sight>>::new());
        let mut events = watcher::watcher(api.clone(), watcher::Config::default()).boxed();
        let (ready, listed) = tokio::sync::oneshot::channel();
        let mut ready = Some(ready);
        let mut task = tokio::task::JoinSet::new();
        task.spawn(async move {
            while let Some(event) = events.next().await {
                let at = Instant::now();
                let (bot, gone) = match event {
                    Ok(Event::Apply(bot) | Event::InitApply(bot)) => (bot, false),
                    Ok(Event::Delete(bot)) => (bot, true),
                    Ok(Event::InitDone) => {
                        if let Some(ready) = ready.take() {
                            // Nobody waits any more: the benchmark is over.
                            let _ = ready.send(());
                        }
                        continue;
                    }
                    // What was missed shows as a wait that takes too long, and fails the run.
                    Ok(Event::Init) | Err(_) => continue,
                };
                let sight = Sight::of(&bot, at, gone);
                sender.send_modify(|all| all.entry(bot.metadata.name.unwrap_or_default()).or_default().push(sight));
            }
        });
        tokio::time::timeout(LIMIT, listed).await.context("the watch of bots does not begin")??;
        Ok(Self { api, image: image.to_owned(), sights, _watch: task })
    }

    async fn apply(&self, name: &str, mode: OperatingMode) -> anyhow::Result<()> {
        let spec: BotContainerSpec = serde_json::from_value(json!({
            "image": self.image,
            "operatingMode": mode,
            "env": [{"name": "BOT_NAME", "value": name}],
        }))?;
        let bot = BotContainer::new(name, spec);
        self.api.patch(name, &PatchParams::apply("bench"), &Patch::Apply(&bot)).await?;
        Ok(())
    }

    /// Applies a new bot, and waits for Running.
    pub async fn start(&self, name: &str) -> anyhow::Result<Start> {
        let began = Instant::now();
        self.apply(name, OperatingMode::Running).await?;
        let applied = began.elapsed();
        let since = |sight: &Sight| sight.at - began;
        let running = self.first(name, began, "Running", |s| s.phase == Some(Phase::Running)).await?;
        let finalizer = self.first(name, began, "a finalizer", |s| s.finalizer).await?;
        let bound = self.first(name, began, "a node", |s| s.bound).await?;
        Ok(Start { applied, finalizer: since(&finalizer), bound: since(&bound), running: since(&running) })
    }

    /// Applies another `operatingMode`, and waits for its phase; how long that took.
    pub async fn change(&self, name: &str, mode: OperatingMode) -> anyhow::Result<Duration> {
        let wanted = match mode {
            OperatingMode::Running => Phase::Running,
            OperatingMode::Paused => Phase::Paused,
            OperatingMode::Stopped => Phase::Stopped,
        };
        let began = Instant::now();
        self.apply(name, mode).await?;
        let seen = self.first(name, began, &format!("{wanted:?}"), |s| s.phase == Some(wanted)).await?;
        Ok(seen.at - began)
    }

    /// Deletes it, and waits until the object is gone, and with it all that the bot had.
    pub async fn delete(&self, name: &str) -> anyhow::Result<Duration> {
        let began = Instant::now();
        self.api.delete(name, &DeleteParams::default()).await?;
        let seen = self.first(name, began, "gone", |s| s.gone).await?;
        Ok(seen.at - began)
    }

    /// Starts many at once; how long it took until the last of them ran.
    pub async fn burst(&self, names: &[String]) -> anyhow::Result<Duration> {
        let began = Instant::now();
        try_join_all(names.iter().map(|name| self.start(name))).await?;
        Ok(began.elapsed())
    }

    /// Deletes many at once.
    pub async fn clear(&self, names: &[String]) -> anyhow::Result<()> {
        try_join_all(names.iter().map(|name| self.delete(name))).await.map(drop)
    }

    /// The first sight of a bot from `after` on that is as wanted.
    async fn first(
        &self,
        name: &str,
        after: Instant,
        what: &str,
        wanted: impl Fn(&Sight) -> bool,
    ) -> anyhow::Result<Sight> {
        let mut sights = self.sights.clone();
        let find = |all: &HashMap<String, Vec<Sight>>| {
            all.get(name).and_then(|seen| seen.iter().find(|s| s.at >= after && wanted(s)).cloned())
        };
        let found = tokio::time::timeout(LIMIT, async {
            loop {
                let found = find(&sights.borrow_and_update());
                if let Some(found) = found {
                    return anyhow::Ok(found);
                }
                sights.changed().await.context("the watch of bots ended")?;
            }
        })
        .await;
        found.unwrap_or_else(|_| {
            let last = self.sights.borrow().get(name).and_then(|seen| seen.last().cloned());
            anyhow::bail!("bot {name} is not {what} after {LIMIT:?}; last seen: {last:?}")
        })
    }
}

impl Sight {
    fn of(bot: &BotContainer, at: Instant, gone: bool) -> Self {
        let status = bot.status.as_ref();
        let current = status.is_some_and(|status| status.observed_generation == bot.metadata.generation);
        Self {
            at,
            phase: status.filter(|_| current).and_then(|status| status.phase),
            finalizer: bot.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER),
            bound: status.and_then(|status| status.node_name.as_ref()).is_some(),
            gone,
        }
    }
}
