//! The chain image layers -> ... -> active layer, as containerd reports it.
//!
//! What a snapshot stands on never changes, so a layer's chain is asked for once, beside the steps of the start: no start
//! waits for it.

use containerd_client::services::v1::snapshots::{Kind, StatSnapshotRequest};
use tokio::task::JoinHandle;

use crate::api::bot_container::LineageEntry;
use crate::api::condition::{api_time, chain};
use crate::containerd::{CallContext as _, CallFailed, Containerd};

use super::labels;
use super::observe::timestamp;

/// As many as a status takes. containerd itself makes no chain that long: overlayfs takes 500 lower directories, images 127.
const MOST: usize = 256;

/// The lineage of one bot's layer.
#[derive(Debug, Default)]
pub struct Lineage {
    /// Key of the layer that it is of.
    layer: String,
    entries: Vec<LineageEntry>,
    asked: Option<JoinHandle<Result<Vec<LineageEntry>, CallFailed>>>,
}

impl Lineage {
    /// Begins to ask for the lineage of a layer, if it is not known or asked for.
    pub fn follow(&mut self, containerd: &Containerd, snapshotter: &str, layer: &str) {
        if self.layer == layer {
            return;
        }
        let (containerd, snapshotter, key) = (containerd.clone(), snapshotter.to_owned(), layer.to_owned());
        let asked = tokio::spawn(async move { read(&containerd, &snapshotter, key).await });
        *self = Self { layer: layer.to_owned(), entries: Vec::new(), asked: Some(asked) };
    }

    /// What stands below `layer`, from the image's first layer to the active one; `None` where containerd did not say: it is
    /// asked again at the next look.
    pub async fn of(&mut self, layer: &str) -> Option<&[LineageEntry]> {
        if self.layer != layer {
            return None;
        }
        if let Some(asked) = self.asked.take() {
            match asked.await {
                Ok(Ok(entries)) => self.entries = entries,
                Ok(Err(error)) => {
                    tracing::warn!(layer, error = %chain(&error), "the layer's lineage is not known");
                    self.layer.clear();
                    return None;
                }
                // The runtime is going down.
                Err(_) => return None,
            }
        }
        Some(&self.entries)
    }
}

async fn read(containerd: &Containerd, snapshotter: &str, mut key: String) -> Result<Vec<LineageEntry>, CallFailed> {
    let mut entries = Vec::new();
    while !key.is_empty() && entries.len() < MOST {
        let request = containerd.request(StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.clone() });
        let answer = containerd.snapshots().stat(request).await.call("stat snapshot", &key)?;
        let info = answer.info.unwrap_or_default();
        let kind = match info.kind() {
            Kind::Active => "Active",
            Kind::View => "View",
            Kind::Committed | Kind::Unknown => "Committed",
        };
        let created_at = info.created_at.as_ref().and_then(timestamp).map(api_time);
        let parent = Some(info.parent).filter(|parent| !parent.is_empty());
        let name = std::mem::replace(&mut key, parent.clone().unwrap_or_default());
        // Of a version, its own number; of an active layer, that of the version that it was made from.
        let version = info.labels.get(labels::VERSION).and_then(|number| number.parse().ok());
        entries.push(LineageEntry { name, parent, kind: kind.to_owned(), version, created_at });
    }
    entries.reverse();
    Ok(entries)
}
