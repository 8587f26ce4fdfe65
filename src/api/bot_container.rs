//! BotContainer: desired and observed state of one bot's container.

#![allow(clippy::duplicated_attributes, reason = "two printer columns may be of one type")]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    EnvFromSource, EnvVar, LocalObjectReference, PodDNSConfig, SecurityContext, Toleration,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A bot's container: what should run, and what was observed of it.
#[derive(CustomResource, Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "BotContainer",
    namespaced,
    status = "BotContainerStatus",
    shortname = "bot",
    shortname = "bots",
    category = "berth",
    derive = "PartialEq",
    doc = "A bot's container: what should run, and what was observed of it.",
    selectable = ".status.nodeName",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.nodeName"),
    printcolumn(name = "IP", type_ = "string", json_path = ".status.network.ip"),
    printcolumn(name = "Image", type_ = "string", json_path = ".spec.image"),
    printcolumn(name = "Version", type_ = "integer", json_path = ".status.currentVersion"),
    printcolumn(name = "Restarts", type_ = "integer", json_path = ".status.restartCount"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct BotContainerSpec {
    /// Identity of the bot in its namespace, a DNS label. Outlives this object: kept snapshots belong to it.
    /// Immutable. Default: the uid of this object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bot_id: Option<String>,

    /// The OCI image to run, for example `docker.io/library/node:22`.
    pub image: String,

    /// When the image is pulled. Default: `Always` for the tag `latest`, else `IfNotPresent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<ImagePullPolicy>,

    /// Secrets of type `kubernetes.io/dockerconfigjson` in this namespace, tried in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<LocalObjectReference>,

    /// Replaces the image's entrypoint. `$(NAME)` is expanded from `env`, as in a Pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,

    /// Replaces the image's arguments. `$(NAME)` is expanded from `env`, as in a Pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,

    /// Absolute path. Default: the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,

    /// Environment of the process, as in a Pod's container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,

    /// ConfigMaps and Secrets whose keys become environment variables, as in a Pod's container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env_from: Vec<EnvFromSource>,

    /// Whether the bot runs, is frozen with its memory kept, or is stopped with its files kept.
    #[serde(default)]
    pub operating_mode: OperatingMode,

    /// What happens when the process ends by itself, as in a Pod.
    #[serde(default)]
    pub restart_policy: RestartPolicy,

    /// Seconds between TERM and KILL.
    #[serde(default = "default_grace_period")]
    #[schemars(range(min = 0, max = 86400))]
    pub termination_grace_period_seconds: i64,

    /// A new value restarts the process once, as `kubectl rollout restart` does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarted_at: Option<Time>,

    /// Name of a RuntimeClass: its handler runs the bot, its scheduling limits the placement. Immutable once placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_class_name: Option<String>,

    /// The containerd snapshotter of the writable layer. Immutable. Default: the node's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshotter: Option<String>,

    /// What the placement counts and what the cgroup limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<BotResources>,

    /// As in a Pod's container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security_context: Option<SecurityContext>,

    /// Place the bot on this node only. Immutable once placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,

    /// Place the bot on a node with these labels only. Immutable once placed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that the placement ignores, as in a Pod. Immutable once placed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,

    /// How the bot is connected.
    #[serde(default)]
    pub network: NetworkSpec,

    /// Where resolv.conf comes from, as in a Pod.
    #[serde(default)]
    pub dns_policy: DnsPolicy,

    /// Added to what `dnsPolicy` gives, as in a Pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_config: Option<PodDNSConfig>,

    /// A name of the tz database, for example `Europe/Berlin`. Default: what the image has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timezone: Option<String>,

    /// The directory that is the bot's data: carried over an image change. Immutable.
    #[serde(default)]
    pub data: DataSpec,

    /// What happens to the bot's data when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,

    /// Start from this version; from another bot's it is a fork. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_from: Option<RestoreFrom>,

    /// Whether a new object goes on from what the same botId left behind in this namespace.
    #[serde(default)]
    pub restore_policy: RestorePolicy,

    /// Go back to a version. A new `id` repeats it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<RollbackSpec>,

    /// Automatic snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_policy: Option<SnapshotPolicy>,

    /// Each becomes `/data/.skills/NAME/SKILL.md`. Together at most 256 KiB.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skills: Vec<Skill>,

    /// Files mounted into the container from a tmpfs: never part of a layer or snapshot. The `content` of all together is
    /// at most 128 KiB; a Secret or ConfigMap may hold more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileSpec>,
}

fn default_grace_period() -> i64 {
    10
}

macro_rules! choice {
    ($(#[$m:meta])* $name:ident { $(#[$d:meta])* $first:ident $(, $(#[$v:meta])* $rest:ident)* $(,)? }) => {
        $(#[$m])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
        pub enum $name {
            $(#[$d])* #[default] $first,
            $($(#[$v])* $rest,)*
        }
    };
}
pub(crate) use choice;

// The variants of a `choice!` carry plain comments: a doc comment would turn schemars' `enum` into a `oneOf`, which is
// not a structural schema.
choice! {
    /// When the image is pulled.
    #[allow(missing_docs)]
    ImagePullPolicy { IfNotPresent, Always, Never }
}
choice! {
    /// Running: the process runs. Paused: frozen, memory kept. Stopped: no process, files kept.
    #[allow(missing_docs)]
    OperatingMode { Running, Paused, Stopped }
}
choice! {
    /// What happens when the process ends by itself.
    #[allow(missing_docs)]
    RestartPolicy { Always, OnFailure, Never }
}
choice! {
    /// Bridge: an IP of the node's bot CIDR. Host: the node's network. None: loopback only.
    #[allow(missing_docs)]
    NetworkMode { Bridge, Host, None }
}
choice! {
    /// Where resolv.conf comes from.
    #[allow(missing_docs)]
    DnsPolicy { ClusterFirst, ClusterFirstWithHostNet, Default, None }
}
choice! {
    /// Delete: data and snapshots go with the object. Retain: a last snapshot is taken, and all are kept.
    #[allow(missing_docs)]
    DeletionPolicy { Delete, Retain }
}
choice! {
    /// Latest: go on from the newest kept version of the same botId. Never: start from the image.
    #[allow(missing_docs)]
    RestorePolicy { Latest, Never }
}

/// What the placement counts and what the cgroup limits. Keys: `cpu`, `memory`; limits also `pids`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BotResources {
    /// Reserved on the node at placement. Default: the limits.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, Quantity>,
    /// Enforced by the cgroup. A change is applied to the running process.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, Quantity>,
}

/// How the bot is connected.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NetworkSpec {
    /// Bridge, Host or None. Immutable once placed.
    #[serde(default)]
    pub mode: NetworkMode,
    /// A DNS label. Default: the name of this object, cut to 63 characters. With mode Host the node's counts, as in a Pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
}

/// Where the bot's data lives.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DataSpec {
    /// Absolute path, not `/` and not under `/proc`, `/sys` or `/dev`. Immutable.
    #[serde(default = "default_data_path")]
    pub path: String,
}

fn default_data_path() -> String {
    "/data".to_owned()
}

impl Default for DataSpec {
    fn default() -> Self {
        Self { path: default_data_path() }
    }
}

/// The version to start from.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoreFrom {
    /// Name of a BotSnapshot in this namespace.
    pub snapshot_name: String,
}

/// The version to go back to: exactly one of `toVersion` and `snapshotName`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RollbackSpec {
    /// Names this rollback; a new value runs it again, the same never twice.
    pub id: String,
    /// A version number of this bot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub to_version: Option<i64>,
    /// Name of a BotSnapshot of this bot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_name: Option<String>,
    /// Whether what is replaced becomes a version first.
    #[serde(default = "yes")]
    pub keep_replaced: bool,
}

fn yes() -> bool {
    true
}

/// Automatic snapshots.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotPolicy {
    /// Five cron fields: minute, hour, day of month, month, day of week; `*`, lists, ranges, steps and English names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// A name of the tz database. Default: Etc/UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// How many scheduled snapshots are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub keep_last: Option<i64>,
    /// Take one before the image changes.
    #[serde(default = "yes")]
    pub before_image_change: bool,
    /// No scheduled snapshots while set.
    #[serde(default)]
    pub suspend: bool,
}

/// A skill of the bot.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Skill {
    /// Its directory's name, a DNS label.
    pub name: String,
    /// One line for the front matter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// More of the front matter.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Markdown.
    pub content: String,
}

/// A file mounted into the container: exactly one of `content`, `secretKeyRef` and `configMapKeyRef`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FileSpec {
    /// Absolute path in the container, not under `/proc`, `/sys` or `/dev`, not that of `data.path` and not in its `.skills`.
    pub path: String,
    /// Permission bits, in octal `0600` or decimal 384. Default: 0644.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 511))]
    pub mode: Option<i32>,
    /// The text itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// A key of a Secret in this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyRef>,
    /// A key of a ConfigMap in this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyRef>,
}

/// A key of a Secret or ConfigMap.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyRef {
    /// Name of the object.
    pub name: String,
    /// Key in its data.
    pub key: String,
    /// Whether the bot may start without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optional: Option<bool>,
}

/// What was observed of a bot. Written by controller and agent, each its own fields, never by users.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BotContainerStatus {
    /// The `metadata.generation` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for people; tools read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// The botId in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bot_id: Option<String>,
    /// The node that the bot is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The container's id in containerd's namespace `berth`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_id: Option<String>,
    /// The image that the writable layer stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageStatus>,
    /// The running process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskStatus>,
    /// How the process last ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_termination: Option<Termination>,
    /// Starts of the process after one that ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_count: Option<i64>,
    /// What is kept while Paused (MemoryAndFiles, Files) or Stopped (Files).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// The bot's addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkStatus>,
    /// Resources as the running task has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<BotResources>,
    /// Highest version number given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_version: Option<i64>,
    /// Version that the active layer was made from, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_version: Option<i64>,
    /// The last rollback done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<RollbackStatus>,
    /// The version that the bot starts from, chosen when it was bound: `spec.restoreFrom`, or what its botId left behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored_from: Option<RestoredFrom>,
    /// Said by the controller of a bot that is deleted under `Retain` with its namespace: no BotSnapshot can be made of its layer, so
    /// that stays on the node, listed in the BotNode's `status.orphans`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orphaned: Option<bool>,
    /// The chain image layers -> ... -> active layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lineage: Vec<LineageEntry>,
    /// The last 32 things that happened, for whoever was away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transitions: Vec<Transition>,
    /// Ready, Running, Scheduled, ImageReady, NetworkReady, Restored, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

choice! {
    /// One word for people.
    #[allow(missing_docs)]
    Phase {
        Pending, Starting, Running, Paused, Stopping, Stopped, BackOff, Succeeded, Failed, Terminating, Unknown,
    }
}
choice! {
    /// What is kept while no process runs.
    #[allow(missing_docs)]
    Kept { Files, MemoryAndFiles }
}

/// The image in use.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageStatus {
    /// Normalised reference.
    pub reference: String,
    /// Digest that it was resolved to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// The running process.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TaskStatus {
    /// Its process id on the node.
    pub pid: i64,
    /// When it was started.
    pub started_at: Time,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Termination {
    /// Exit code; 128 + signal where a signal ended it.
    pub exit_code: i64,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i64>,
    /// Completed, Error, OOMKilled, StartError or TaskLost.
    pub reason: String,
    /// The last output, at most 2 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When the process was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
}

/// The bot's addresses.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NetworkStatus {
    /// The first of `ips`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// All addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<String>,
}

/// The last rollback done.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RollbackStatus {
    /// The `spec.rollback.id` that was done.
    pub id: String,
    /// The version gone back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<i64>,
    /// The version that what was replaced became.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced_by_version: Option<i64>,
    /// When it was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Time>,
}

/// The version that a bot starts from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoredFrom {
    /// Name of the BotSnapshot.
    pub snapshot_name: String,
    /// Its uid.
    pub uid: String,
    /// The bot that it belongs to: this one, or the one that this one is a fork of.
    pub bot_id: String,
    /// Its number.
    pub version: i64,
}

/// One layer below the bot.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LineageEntry {
    /// Name in containerd.
    pub name: String,
    /// Name of the layer below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Active, Committed or View.
    pub kind: String,
    /// The version that it is, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<i64>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Time>,
}

/// One thing that happened to the bot.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    /// Counts up from 1, without gaps.
    pub seq: i64,
    /// scheduled, pulled, restored, created, started, exited, oom_killed, version_rollback, paused, resumed, stopped or deleted;
    /// more may come.
    #[serde(rename = "type")]
    pub type_: String,
    /// When.
    pub at: Time,
    /// Exit code of an `exited`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// The version that it was about: of a `version_rollback` or a `restored`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<i64>,
    /// Anything that a person wants to know: the node of a `scheduled`, the image of a `pulled`, the id of a `version_rollback`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
