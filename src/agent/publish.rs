//! Tells the API server: statuses by server-side apply, Events.

use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::api::condition::{MAX_MESSAGE, Reason, chain, cut};
use crate::api::{AGENT, BotContainer, BotContainerStatus, BotNode, BotSnapshot, BotSnapshotStatus, resource_version};

use super::failpoint::{Effect, around};
use super::metrics::Metrics;
use super::snapshot::status::says as snapshot_says;
use super::status::says;
use super::version::Version;

/// Writes statuses and Events of bots.
#[derive(Clone)]
pub struct Publisher {
    client: Client,
    recorder: Recorder,
    node: String,
    metrics: Metrics,
}

/// An object as our own last write left it.
#[derive(Clone, Debug)]
pub struct Written<K> {
    /// The answer to the write.
    pub object: Arc<K>,
    /// [`Registration::went_back`](super::node::Registration::went_back) at that time: an answer from before the cluster was restored is
    /// of a future that is no more.
    pub era: u64,
}

impl<K: Resource> Written<K> {
    /// The newer of what a watch has seen and what was written in this era. A version that is no number counts as oldest.
    pub fn or(written: Option<&Self>, seen: Arc<K>, era: u64) -> Arc<K> {
        let version = |object: &K| resource_version(object.meta()).unwrap_or(0);
        match written {
            Some(written) if written.era == era && version(&written.object) > version(&seen) => written.object.clone(),
            _ => seen,
        }
    }
}

/// A status could not be written.
#[derive(Debug, thiserror::Error)]
#[error("can't write the status of {kind} {namespace}/{name}")]
pub struct PublishFailed {
    kind: String,
    namespace: String,
    name: String,
    source: Box<kube::Error>,
}

impl Publisher {
    /// `node` names this agent in Events.
    pub fn new(client: Client, node: String, metrics: Metrics) -> Self {
        // The API server takes 128 characters; a node may have more.
        let instance = node.chars().take(128).collect();
        let reporter = Reporter { controller: format!("berth.dev/{AGENT}"), instance: Some(instance) };
        Self { recorder: Recorder::new(client.clone(), reporter), client, node, metrics }
    }

    /// Writes `status` where the live object says something else; gives back the object as it is then.
    ///
    /// The write carries uid and resourceVersion of the object that it was computed from: one that came too late is
    /// refused, and computed anew from what is there.
    pub async fn status(
        &self,
        live: &BotContainer,
        status: &BotContainerStatus,
    ) -> Result<Option<BotContainer>, PublishFailed> {
        if says(live.status.as_ref(), status) {
            return Ok(None);
        }
        self.apply(live, status, Effect::StatusWrite).await.map(Some)
    }

    /// Writes the status of a snapshot where the live object says something else; gives back the object as it is then.
    pub async fn snapshot_status(
        &self,
        live: &BotSnapshot,
        status: &BotSnapshotStatus,
    ) -> Result<Option<BotSnapshot>, PublishFailed> {
        if snapshot_says(live.status.as_ref(), status) {
            return Ok(None);
        }
        self.apply(live, status, Effect::SnapshotStatus).await.map(Some)
    }

    async fn apply<K>(&self, live: &K, status: &impl Serialize, effect: Effect) -> Result<K, PublishFailed>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let meta = live.meta();
        let (namespace, name) = (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
        let api: Api<K> = Api::namespaced(self.client.clone(), &namespace);
        let patch = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": meta.uid,
                "resourceVersion": meta.resource_version,
            },
            "status": status,
        });
        let params = PatchParams::apply(AGENT).force();
        around(effect, api.patch_status(&name, &params, &Patch::Apply(&patch))).await.map_err(|source| {
            self.metrics.api_error("status");
            PublishFailed { kind: K::kind(&()).into_owned(), namespace, name, source: Box::new(source) }
        })
    }

    /// Records an Event on a snapshot, as [`Self::event`] does on a bot.
    pub async fn snapshot_event(&self, snapshot: &BotSnapshot, type_: EventType, reason: Reason, note: String) {
        self.record(&snapshot.object_ref(&()), type_, reason, note).await;
    }

    /// Records an Event on a bot. One that can't be written is logged: Events are for people, and no truth hangs on them.
    pub async fn event(&self, bot: &BotContainer, type_: EventType, reason: Reason, note: String) {
        self.record(&bot.object_ref(&()), type_, reason, note).await;
    }

    /// Records an Event on the node of a layer that was left without an object: in its own namespace there can be none.
    pub async fn orphaned(&self, left: &Version) {
        let reference = BotNode::new(&self.node, Default::default()).object_ref(&());
        let note = format!(
            "the namespace {} is being deleted, so what its bot {} wrote stays on this node as {} for --orphan-retention; `kubectl \
             berth adopt` makes a version of it",
            left.namespace,
            left.name,
            left.runtime_name()
        );
        self.record(&reference, EventType::Warning, Reason::NamespaceTerminating, note).await;
    }

    async fn record(&self, reference: &ObjectReference, type_: EventType, reason: Reason, note: String) {
        let event = Event {
            type_,
            reason: reason.as_str().to_owned(),
            note: Some(cut(&note, MAX_MESSAGE)),
            action: reason.as_str().to_owned(),
            secondary: None,
        };
        if let Err(error) = around(Effect::StatusEvent, self.recorder.publish(&event, reference)).await {
            self.metrics.api_error("event");
            tracing::warn!(%reason, note, error = %chain(&error), "Event not written");
        }
    }
}
