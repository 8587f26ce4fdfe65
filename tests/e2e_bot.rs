//! A bot's whole way on a real cluster: API server, controller, agent, containerd, runc, registry.
//!
//! ```text
//! start.rs     apply -> Running: what it answers, what status says, how many writes; 40 at once; quiet at rest
//! modes.rs     Running, Paused, Stopped, and every change between them
//! ends.rs      the process ends by itself: restart policy, back-off, exit code, signal, last words
//! changes.rs   what a change of each field costs
//! inside.rs    what the process finds: files, Secrets, environment, user, host name, DNS, time zone, capabilities
//! images.rs    images that can't be had, and their repair
//! network.rs   the three modes, and addresses that stay
//! node.rs      what a node says of itself, and what it takes
//! output.rs    the log file
//! survive.rs   agent and containerd go and come back
//! remove.rs    deletion, orphans, strangers
//! gitops.rs    what Flux, Argo CD and kubectl diff see
//! ```

#![allow(missing_docs)]
// Helpers of tests may panic as tests do; clippy's allowance stops at `#[test]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

#[path = "e2e_bot/stage.rs"]
mod stage;

#[path = "e2e_bot/changes.rs"]
mod changes;
#[path = "e2e_bot/ends.rs"]
mod ends;
#[path = "e2e_bot/gitops.rs"]
mod gitops;
#[path = "e2e_bot/images.rs"]
mod images;
#[path = "e2e_bot/inside.rs"]
mod inside;
#[path = "e2e_bot/modes.rs"]
mod modes;
#[path = "e2e_bot/network.rs"]
mod network;
#[path = "e2e_bot/node.rs"]
mod node;
#[path = "e2e_bot/output.rs"]
mod output;
#[path = "e2e_bot/remove.rs"]
mod remove;
#[path = "e2e_bot/snapshots.rs"]
mod snapshots;
#[path = "e2e_bot/start.rs"]
mod start;
#[path = "e2e_bot/survive.rs"]
mod survive;
