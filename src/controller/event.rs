//! Events (`events.k8s.io/v1`): told aside, so that no reconcile waits for one, and dropped, counted, when too many wait.
//!
//! An Event's name is computed from what it tells, so one that is sent twice is there once.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, PostParams};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::api::CONTROLLER;
use crate::api::condition::{MAX_MESSAGE, Reason, cut};

use super::metrics::Metrics;

/// How many may wait to be sent.
const WAITING: usize = 1024;

/// How long one may take.
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

/// One thing to tell.
#[derive(Clone, Debug)]
pub struct Note {
    regarding: ObjectReference,
    warning: bool,
    reason: Reason,
    action: &'static str,
    text: String,
    /// What makes it another Event than the last of this reason: a node, a resourceVersion.
    once: String,
}

impl Note {
    /// Something that went as it should.
    pub fn normal(
        regarding: ObjectReference,
        reason: Reason,
        action: &'static str,
        text: String,
        once: String,
    ) -> Self {
        Self { regarding, warning: false, reason, action, text, once }
    }

    /// Something that a person should look at.
    pub fn warning(
        regarding: ObjectReference,
        reason: Reason,
        action: &'static str,
        text: String,
        once: String,
    ) -> Self {
        Self { warning: true, ..Self::normal(regarding, reason, action, text, once) }
    }

    fn event(&self, instance: &str, now: Timestamp) -> Event {
        let object = self.regarding.name.clone().unwrap_or_default();
        let mut hash = Sha256::new();
        for part in [self.regarding.uid.as_deref().unwrap_or_default(), self.reason.as_str(), &self.once] {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        let digest: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Event {
            metadata: ObjectMeta {
                // An object's name may have 253 characters, and so may the Event's.
                name: Some(format!(
                    "{}.{digest}",
                    object.chars().take(230).collect::<String>().trim_end_matches(['.', '-'])
                )),
                namespace: Some(self.regarding.namespace.clone().unwrap_or_else(|| "default".to_owned())),
                ..ObjectMeta::default()
            },
            action: Some(self.action.to_owned()),
            reason: Some(self.reason.as_str().to_owned()),
            note: Some(cut(&self.text, MAX_MESSAGE)),
            type_: Some(if self.warning { "Warning" } else { "Normal" }.to_owned()),
            regarding: Some(self.regarding.clone()),
            event_time: Some(MicroTime(now)),
            reporting_controller: Some(format!("berth.dev/{CONTROLLER}")),
            reporting_instance: Some(instance.chars().take(128).collect()),
            ..Event::default()
        }
    }
}

/// Where Events are handed in.
#[derive(Clone)]
pub struct Events {
    sender: mpsc::Sender<Note>,
    metrics: Metrics,
}

impl Events {
    /// The way in, and what `publish` takes from.
    pub fn new(metrics: Metrics) -> (Self, mpsc::Receiver<Note>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self { sender, metrics }, receiver)
    }

    /// Hands one in; never waits.
    pub fn send(&self, note: Note) {
        if let Err(error) = self.sender.try_send(note) {
            self.metrics.event_dropped();
            tracing::debug!(%error, "an Event was dropped");
        }
    }
}

/// Sends what is handed in, until `stop`; then what waits already.
pub async fn publish(
    client: Client,
    instance: String,
    mut notes: mpsc::Receiver<Note>,
    metrics: Metrics,
    stop: CancellationToken,
) {
    loop {
        let note = tokio::select! {
            // Cancel-safe: recv loses nothing.
            note = notes.recv() => match note { Some(note) => note, None => return },
            () = stop.cancelled() => match notes.try_recv() { Ok(note) => note, Err(_) => return },
        };
        let event = note.event(&instance, Timestamp::now());
        let api: Api<Event> = Api::namespaced(client.clone(), event.metadata.namespace.as_deref().unwrap_or("default"));
        match tokio::time::timeout(DEADLINE, api.create(&PostParams::default(), &event)).await {
            Ok(Ok(_)) => {}
            // It is there already, or its namespace is going: both as good as told.
            Ok(Err(kube::Error::Api(status))) if status.code == 409 || status.code == 404 => {}
            Ok(Err(error)) => {
                metrics.event_dropped();
                tracing::debug!(error = &error as &dyn std::error::Error, "an Event could not be written");
            }
            Err(_) => metrics.event_dropped(),
        }
    }
}
