//! Berth: declared AI bots on Kubernetes, run directly on containerd.
//!
//! ```text
//! main.rs ── controller/   placement, finalizers, BotRecords, node loss           (cluster-wide, leader-elected)
//!        └── agent/        observe -> plan -> step, for the bots of one node      (DaemonSet)
//!                ├── containerd/  the gRPC way to containerd
//!                ├── image/       references, registries, pull, unpack, collection
//!                ├── oci/         image config + spec -> OCI runtime spec         (pure)
//!                ├── layer/       exact copies of a bot's layer, made while the bot writes
//!                ├── network/     network namespaces, CNI, nftables, resolv.conf
//!                └── output/      the logger that lives beside the shim
//! api/        the objects, their conditions and CRDs: the single source
//! client      the way to the API server, with a limit on each answer
//! telemetry   logs, metrics, health
//! delete_all  every bot and version of a cluster, before Berth is taken off it
//! ```

pub mod agent;
pub mod api;
pub mod client;
pub mod containerd;
pub mod controller;
pub mod delete_all;
pub mod image;
pub mod layer;
pub mod network;
pub mod oci;
pub mod output;
pub mod telemetry;
