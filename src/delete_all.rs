//! `berth delete-all`: every bot and every version of a cluster goes, in the order in which they can.
//!
//! ```text
//! bots first                    their agents end and remove them; one with `deletionPolicy: Retain` leaves a version by that
//! then versions                 once there is no bot that one could still come of
//! then nothing is left          and what served them, agents and CRDs, may go too
//! ```
//!
//! It is what the chart runs before it is uninstalled with `crds.keep=false`: finalizers of bots that are still there then would wait
//! for agents that are gone.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::{StreamExt as _, stream};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Api, DeleteParams, ListParams, Preconditions};
use kube::runtime::reflector::store;
use kube::runtime::reflector::store::Writer;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::api::condition::{ConditionType, chain, find};
use crate::api::{BotContainer, BotSnapshot};

/// How often is looked what has come and what is left to be asked for.
const LOOK: Duration = Duration::from_secs(1);

/// How often is said what is left.
const SAY: u32 = 10;

/// How many deletions are asked for side by side.
const AT_ONCE: usize = 16;

/// How many objects a message names.
const NAMED: usize = 5;

/// What was typed.
#[derive(Clone, Debug, clap::Args)]
pub struct DeleteAllArgs {
    /// Do it. What bots wrote is lost, and so are their versions.
    #[arg(long)]
    pub yes: bool,

    /// After how many seconds to give up. What was asked for by then is deleted all the same, later.
    #[arg(long, value_name = "SECONDS", default_value_t = 270, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout_seconds: u64,
}

/// Says how much there is, and with `--yes` deletes it and waits until it is gone.
///
/// # Errors
/// When the API server can't be reached, or something is left at the end: the message names what, and where it stands.
pub async fn run(args: DeleteAllArgs, stop: CancellationToken) -> anyhow::Result<()> {
    let client = crate::client::client(crate::client::config().await?)?;
    if args.yes { delete(client, Duration::from_secs(args.timeout_seconds), stop).await } else { count(client).await }
}

async fn count(client: Client) -> anyhow::Result<()> {
    let all = ListParams::default();
    let bots =
        Api::<BotContainer>::all(client.clone()).list_metadata(&all).await.context("can't list BotContainers")?;
    let versions = Api::<BotSnapshot>::all(client).list_metadata(&all).await.context("can't list BotSnapshots")?;
    let (bots, versions) = (bots.items.len(), versions.items.len());
    let said = format!("{bots} bots and {versions} versions; nothing was deleted, with --yes all of them are\n");
    std::io::Write::write_all(&mut std::io::stdout(), said.as_bytes())?;
    Ok(())
}

async fn delete(client: Client, timeout: Duration, stop: CancellationToken) -> anyhow::Result<()> {
    let (bots, mut bots_writer) = store::<BotContainer>();
    let (versions, mut versions_writer) = store::<BotSnapshot>();
    let all = watcher::Config::default;
    let mut bots_seen = pin!(watcher(Api::<BotContainer>::all(client.clone()), all()).default_backoff());
    let mut versions_seen = pin!(watcher(Api::<BotSnapshot>::all(client.clone()), all()).default_backoff());
    let mut listed = (false, false);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut deadline = pin!(tokio::time::sleep(timeout));
    let mut refused = None;
    let mut looks = 0;
    loop {
        // Nothing is lost by an arm that is not taken: the streams keep what they have, and the rest is times.
        tokio::select! {
            event = bots_seen.next() => refused = take(event, &mut bots_writer, &mut listed.0)?.or(refused),
            event = versions_seen.next() => refused = take(event, &mut versions_writer, &mut listed.1)?.or(refused),
            _ = look.tick(), if listed == (true, true) => {
                let left = Left { bots: bots.state(), versions: versions.state() };
                if left.is_nothing() {
                    tracing::info!("there is no bot and no version any more");
                    return Ok(());
                }
                if looks % SAY == 0 {
                    tracing::info!(%left, "deleting");
                }
                looks += 1;
                refused = left.ask(&client).await;
            }
            () = &mut deadline => {
                anyhow::ensure!(listed == (true, true), "bots and versions can't be listed: {}", refused.unwrap_or_default());
                let left = Left { bots: bots.state(), versions: versions.state() };
                let refused = refused.map(|why| format!(" (the last refusal: {why})")).unwrap_or_default();
                anyhow::bail!(
                    "left after {} s: {left}{refused}; see to what holds them, and do this again. Of a node that is gone for good, \
                     delete the Node object or taint it node.kubernetes.io/out-of-service",
                    timeout.as_secs()
                );
            }
            () = stop.cancelled() => anyhow::bail!("told to stop before all was gone; do this again"),
        }
    }
}

/// Takes what a watch brought; why it broke, if it did, which it is made anew for.
fn take<K>(
    event: Option<Result<Event<K>, watcher::Error>>,
    writer: &mut Writer<K>,
    listed: &mut bool,
) -> anyhow::Result<Option<String>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let kind = K::kind(&());
    match event.with_context(|| format!("the watch of {kind}s ended"))? {
        Ok(event) => {
            *listed |= matches!(event, Event::InitDone);
            writer.apply_watcher_event(&event);
            Ok(None)
        }
        Err(error) => {
            tracing::warn!(%kind, error = %chain(&error), "the watch failed; it is made anew");
            Ok(Some(chain(&error)))
        }
    }
}

/// What is still there.
struct Left {
    bots: Vec<Arc<BotContainer>>,
    versions: Vec<Arc<BotSnapshot>>,
}

impl Left {
    fn is_nothing(&self) -> bool {
        self.bots.is_empty() && self.versions.is_empty()
    }

    /// Asks for the deletions whose turn it is; why one was refused, if one was. That one is asked for again at the next look.
    async fn ask(&self, client: &Client) -> Option<String> {
        match self.bots.is_empty() {
            false => delete_each(client, &self.bots).await,
            true => delete_each(client, &self.versions).await,
        }
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bots and {} versions", self.bots.len(), self.versions.len())?;
        let bots = self.bots.iter().map(|bot| {
            let status = bot.status.as_ref();
            let (node, conditions) =
                (status.and_then(|s| s.node_name.as_deref()), status.map_or(&[][..], |s| &s.conditions));
            describe(&**bot, node, conditions)
        });
        let versions = self.versions.iter().map(|version| {
            let status = version.status.as_ref();
            let (node, conditions) =
                (status.and_then(|s| s.node_name.as_deref()), status.map_or(&[][..], |s| &s.conditions));
            describe(&**version, node, conditions)
        });
        let named: Vec<String> = bots.chain(versions).take(NAMED).collect();
        let more = if self.bots.len() + self.versions.len() > NAMED { ", …" } else { "" };
        write!(f, ": {}{more}", named.join(", "))
    }
}

/// An object, where it is, and what it says of itself.
fn describe<K: ResourceExt>(object: &K, node: Option<&str>, conditions: &[Condition]) -> String {
    let namespace = object.namespace().unwrap_or_default();
    let at = node.map(|node| format!(" on {node}")).unwrap_or_default();
    let says = find(conditions, ConditionType::Ready)
        .map(|ready| format!(" ({}: {})", ready.reason, ready.message))
        .unwrap_or_default();
    format!("{namespace}/{}{at}{says}", object.name_any())
}

/// Asks for the deletion of those that nobody has asked for yet: of these very objects, not of others that take their names.
async fn delete_each<K>(client: &Client, objects: &[Arc<K>]) -> Option<String>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + fmt::Debug,
{
    let waiting = objects.iter().filter(|object| object.meta().deletion_timestamp.is_none());
    let asked = waiting.map(|object| async move {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        let preconditions = Preconditions { uid: object.uid(), ..Preconditions::default() };
        let params = DeleteParams::default().preconditions(preconditions);
        match Api::<K>::namespaced(client.clone(), &namespace).delete(&name, &params).await {
            Ok(_) => None,
            // Gone, or another by now: the watch tells.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => None,
            Err(error) => {
                let why = format!("{namespace}/{name}: {}", chain(&error));
                tracing::warn!(kind = %K::kind(&()), %why, "not deleted; asked for again");
                Some(why)
            }
        }
    });
    stream::iter(asked).buffer_unordered(AT_ONCE).filter_map(std::future::ready).collect::<Vec<_>>().await.pop()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_left_says_where_it_stands() {
        let bot = |name: &str, status: serde_json::Value| {
            let object = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
                "metadata": {"namespace": "team-a", "name": name}, "spec": {"image": "x"}, "status": status});
            Arc::new(serde_json::from_value::<BotContainer>(object).unwrap())
        };
        let ready = json!([{"type": "Ready", "status": "Unknown", "reason": "NodeLost", "message": "n is silent",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        let mut left = Left {
            bots: vec![bot("web", json!({"nodeName": "n", "conditions": ready})), bot("new", json!({}))],
            versions: Vec::new(),
        };
        assert_eq!(left.to_string(), "2 bots and 0 versions: team-a/web on n (NodeLost: n is silent), team-a/new");
        left.bots.extend((0..NAMED).map(|n| bot(&format!("b{n}"), json!({}))));
        assert!(left.to_string().ends_with("team-a/new, team-a/b0, team-a/b1, team-a/b2, …"), "{left}");
    }
}
