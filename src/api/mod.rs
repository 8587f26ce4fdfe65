//! The objects of `berth.dev/v1alpha1`, the single source of the CRDs in `crds/`.
//!
//! | file | what |
//! | --- | --- |
//! | `bot_container.rs` | desired and observed state of one bot's container |
//! | `bot_snapshot.rs` | one saved version of a bot's writable layer |
//! | `bot_record.rs` | what outlives a BotContainer, one per botId and namespace |
//! | `bot_node.rs` | what one agent says of its node |
//! | `condition.rs` | every condition type and reason, with what a user should do |
//! | `reference.rs` | the Secrets and ConfigMaps that a bot names |
//! | `ids.rs` | names and ids as types whose limits hold by construction |
//! | `crd.rs` | derives the CRDs from types and the two tables |
//! | `bound.rs` | table: how long, how many, how large |
//! | `rule.rs` | table: what CEL checks, in which words it refuses |
//!
//! `///` on the types is for users, `kubectl explain` prints it; `//` below it is for us.

pub mod bot_container;
pub mod bot_node;
pub mod bot_record;
pub mod bot_snapshot;
pub mod bound;
pub mod condition;
pub mod crd;
pub mod ids;
pub mod reference;
pub mod rule;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use bot_container::{BotContainer, BotContainerSpec, BotContainerStatus};
pub use bot_node::{BotNode, BotNodeSpec, BotNodeStatus};
pub use bot_record::{BotRecord, BotRecordSpec};
pub use bot_snapshot::{BotSnapshot, BotSnapshotSpec, BotSnapshotStatus};

/// An object's resourceVersion as a number: those of one kind are comparable (KEP-5504). Revisions of etcd, so never negative.
pub fn resource_version(metadata: &ObjectMeta) -> Option<i64> {
    metadata.resource_version.as_deref()?.parse().ok()
}

/// The API group of every Berth object.
pub const GROUP: &str = "berth.dev";

/// Held by the controller on a BotContainer until its node has nothing of it left.
pub const FINALIZER: &str = "berth.dev/bot";

/// Held by the controller on a BotSnapshot until its node has freed its bytes, or only forks hold them.
pub const SNAPSHOT_FINALIZER: &str = "berth.dev/snapshot";

/// Label of a BotSnapshot that the controller made: why, a [`bot_snapshot::SnapshotSource`].
pub const SOURCE_LABEL: &str = "berth.dev/source";

/// Namespace of the controller's leader Lease, unless a flag says otherwise.
pub const SYSTEM_NAMESPACE: &str = "berth-system";

/// Namespace of the agents' heartbeat Leases, one a node, named as the node.
pub const NODE_LEASE_NAMESPACE: &str = "berth-node-lease";

/// Namespace of the nodes' accounts, one a node, named as the node: it reads the Secrets and ConfigMaps that the node's bots name.
pub const NODES_NAMESPACE: &str = "berth-nodes";

/// Field manager of everything that the controller applies.
pub const CONTROLLER: &str = "berth-controller";

/// Field manager of everything that an agent applies.
pub const AGENT: &str = "berth-agent";
