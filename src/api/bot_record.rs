//! BotRecord: what must outlive a BotContainer's status. Its name is the botId, so that creating it is the lock.

#![allow(clippy::duplicated_attributes, reason = "two printer columns may be of one type")]

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What outlives a BotContainer, one per botId and namespace. For machines: the controller keeps it.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "BotRecord",
    namespaced,
    shortname = "brec",
    category = "berth",
    derive = "PartialEq",
    doc = "What outlives a BotContainer, one per botId and namespace. For machines: the controller keeps it.",
    printcolumn(name = "Holder", type_ = "string", json_path = ".spec.holder.name"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "LastVersion", type_ = "integer", json_path = ".spec.lastVersion"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct BotRecordSpec {
    /// The botId; also the name of this object.
    pub bot_id: String,
    /// The BotContainer that may run as this bot now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// The node that has the bot's layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Highest version number ever given.
    #[serde(default)]
    pub last_version: i64,
    /// The BotSnapshot that was given that version. The next one is given when this one says so itself, or is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_given: Option<Given>,
    /// The last time of `spec.snapshotPolicy.schedule` that was seen to, or since when the schedule counts. RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scheduled: Option<String>,
    /// The last `spec.rollback.id` that counts as done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rollback_id: Option<String>,
}

/// The BotContainer that holds a botId.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// The BotSnapshot that a version was given to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Given {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}
