//! BotSnapshot: one saved version of a bot's writable layer.

#![allow(clippy::duplicated_attributes, reason = "two printer columns may be of one type")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::bot_container::{ImageStatus, choice};

/// One saved version of a bot's writable layer; it needs no BotContainer to exist.
#[derive(CustomResource, Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "BotSnapshot",
    namespaced,
    status = "BotSnapshotStatus",
    shortname = "bsnap",
    category = "berth",
    derive = "PartialEq",
    doc = "One saved version of a bot's writable layer; it needs no BotContainer to exist.",
    selectable = ".status.nodeName",
    selectable = ".spec.botContainerName",
    printcolumn(name = "Bot", type_ = "string", json_path = ".spec.botContainerName"),
    printcolumn(name = "Version", type_ = "integer", json_path = ".status.version"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Taken", type_ = "date", json_path = ".status.takenAt"),
    printcolumn(name = "Frozen", type_ = "integer", json_path = ".status.frozenMillis"),
    printcolumn(name = "Size", type_ = "integer", json_path = ".status.sizeBytes"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct BotSnapshotSpec {
    /// Name of the BotContainer in this namespace.
    pub bot_container_name: String,
    /// Shown to people. Default: `Version N`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// Live: frozen for milliseconds. Stopped: stop, copy, start.
    #[serde(default)]
    pub consistency: Consistency,
    /// Live fails with TooManyChanges rather than freeze longer. Milliseconds.
    #[serde(default = "default_max_freeze")]
    #[schemars(range(min = 1, max = 60000))]
    pub max_freeze_millis: i64,
    /// Ends a snapshot that cannot finish. Seconds.
    #[serde(default = "default_failure_deadline")]
    #[schemars(range(min = 1, max = 86400))]
    pub failure_deadline_seconds: i64,
    /// OCI: also make a deterministic OCI layer and manifest. May change from None to OCI.
    #[serde(default)]
    pub export: Export,
}

impl BotSnapshotSpec {
    /// A live snapshot of a bot, with all that can be left out left out.
    pub fn of(bot: &str) -> Self {
        Self {
            bot_container_name: bot.to_owned(),
            display_name: None,
            consistency: Consistency::default(),
            max_freeze_millis: default_max_freeze(),
            failure_deadline_seconds: default_failure_deadline(),
            export: Export::default(),
        }
    }
}

fn default_max_freeze() -> i64 {
    1000
}

fn default_failure_deadline() -> i64 {
    300
}

choice! {
    /// How one instant is held.
    #[allow(missing_docs)]
    Consistency { Live, Stopped }
}
choice! {
    /// Whether an OCI layer is made.
    #[allow(missing_docs)]
    Export { None, OCI }
}
choice! {
    /// Where the snapshot stands.
    #[allow(missing_docs)]
    SnapshotPhase { Pending, Copying, Frozen, Committing, Ready, Failed, Deleting }
}
choice! {
    /// Who asked for the snapshot.
    #[allow(missing_docs)]
    SnapshotSource { Manual, PreExec, Rollback, PreImageChange, Preserved, Scheduled }
}
impl SnapshotSource {
    /// The word that the API has for it.
    pub fn word(self) -> String {
        serde_json::to_value(self).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// The name of the BotSnapshot that is made by itself of a bot: always the same one for the same cause, so that none is made
/// twice, and that whoever waits for it finds it. `cause` tells it from others of its source: the id of a rollback, a time.
pub fn automatic_name(bot: &str, uid: &str, source: SnapshotSource, cause: &str) -> String {
    let word = source.word();
    let hash = Sha256::digest(format!("{uid}\n{word}\n{cause}"));
    let hash: String = hash.iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    // A name has 253 characters at most; word and hash take 26 of them.
    let stem: String = bot.chars().take(220).collect();
    format!("{}-{}-{hash}", stem.trim_end_matches(['-', '.']), word.to_lowercase())
}

/// The cause of the snapshot that is made before a bot moves from its layer to another image.
pub fn image_change_cause(image: &str, layer: &str) -> String {
    format!("{image} in place of {layer}")
}

choice! {
    /// In which state the bot was.
    #[allow(missing_docs)]
    Taken { Live, Paused, Stopped }
}

/// What was observed of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BotSnapshotStatus {
    /// The `metadata.generation` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<SnapshotPhase>,
    /// The bot that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bot_id: Option<String>,
    /// The BotContainer that it is of, by uid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bot_uid: Option<String>,
    /// 1, 2, 3 … per bot, never reused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<i64>,
    /// Who asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SnapshotSource>,
    /// The node that has its bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The committed containerd snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_name: Option<String>,
    /// What it stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The snapshotter that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshotter: Option<String>,
    /// The image below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageStatus>,
    /// In which state the bot was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<Taken>,
    /// How long the bot was frozen. Milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_millis: Option<i64>,
    /// Size on disk. Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
    /// How many files it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<i64>,
    /// Digest of the OCI image's manifest in the node's content store, once made: `export: OCI`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// What the OCI image costs beside the version. Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export_bytes: Option<i64>,
    /// Against the version before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<Changes>,
    /// The instant that it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_at: Option<Time>,
    /// When it became Ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_at: Option<Time>,
    /// Ready, Verified, Exported.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// What changed against the version before.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Changes {
    /// Paths that were not there.
    pub added: i64,
    /// Paths that differ.
    pub modified: i64,
    /// Paths that are gone.
    pub removed: i64,
    /// Bytes of what was added and modified.
    pub bytes: i64,
    /// The first 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<ChangedPath>,
}

/// One changed path.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChangedPath {
    /// Path in the container.
    pub path: String,
    /// Added, Modified or Removed.
    pub change: ChangeKind,
}

choice! {
    /// How a path changed.
    #[allow(missing_docs)]
    ChangeKind { Added, Modified, Removed }
}
