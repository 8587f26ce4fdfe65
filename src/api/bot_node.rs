//! BotNode: what one agent says of its node.

#![allow(clippy::duplicated_attributes, reason = "two printer columns may be of one type")]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::NodeAddress;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What one agent says of its node. Cluster-scoped, named as the node.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "BotNode",
    status = "BotNodeStatus",
    shortname = "bnode",
    category = "berth",
    derive = "PartialEq",
    doc = "What one agent says of its node. Cluster-scoped, named as the node.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "CIDR", type_ = "string", json_path = ".spec.botCIDR"),
    printcolumn(name = "Containerd", type_ = "string", json_path = ".status.versions.containerd"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct BotNodeSpec {
    /// Addresses of this node's bots, one CIDR a node, given by the controller.
    #[serde(default, rename = "botCIDR", skip_serializing_if = "Option::is_none")]
    pub bot_cidr: Option<String>,
    /// No new bots are placed here while set.
    #[serde(default)]
    pub unschedulable: bool,
    /// Bots of this node are stopped, and no new ones placed here, while set: by the controller, when the node's holder Pod is evicted
    /// (`kubectl drain`), until the node is uncordoned.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drain: bool,
    /// Layers of `status.orphans` that become versions in a namespace. `kubectl berth adopt` writes it, and the controller takes out
    /// what is done. Whoever may write it may read every orphan of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopt: Vec<Adoption>,
}

/// A layer that becomes a version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Adoption {
    /// Name of the layer in `status.orphans`.
    pub orphan: String,
    /// The namespace that gets it.
    pub namespace: String,
    /// Name of the BotSnapshot that is made there.
    pub snapshot_name: String,
}

/// What the agent observed of its node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BotNodeStatus {
    /// Versions of what runs there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub versions: Option<NodeVersions>,
    /// containerd's snapshotters that work.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshotters: Vec<String>,
    /// RuntimeClass handlers that this node can run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runtime_handlers: Vec<String>,
    /// What bots may use in all: `cpu`, `memory`, `bots`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub capacity: BTreeMap<String, Quantity>,
    /// What the placement may give out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub allocatable: BTreeMap<String, Quantity>,
    /// Where the node is reached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<NodeAddress>,
    /// Layers that bots under `deletionPolicy: Retain` left when their namespace was deleted, the oldest first; 256 at most are
    /// told. Each is removed when it expires.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orphans: Vec<OrphanedLayer>,
    /// Ready, RuntimeSupported, DiskPressure.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// What a bot left in a namespace that was deleted: a version without an object.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrphanedLayer {
    /// Name in containerd.
    pub name: String,
    /// The namespace that was deleted.
    pub namespace: String,
    /// Name of the BotContainer.
    pub bot_container_name: String,
    /// Its uid.
    pub bot_uid: String,
    /// The bot.
    pub bot_id: String,
    /// Normalised reference of the image that it stands on.
    pub image: String,
    /// The version that it would have been.
    pub version: i64,
    /// When the bot left it.
    pub left_at: Time,
    /// When it is removed.
    pub expires_at: Time,
}

/// Versions of what runs on a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeVersions {
    /// The agent.
    pub berth: String,
    /// containerd.
    pub containerd: String,
    /// runc.
    pub runc: String,
    /// The kernel.
    pub kernel: String,
    /// v1, v2 or hybrid.
    pub cgroup: String,
}
