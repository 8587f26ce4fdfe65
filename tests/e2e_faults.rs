//! Faults: whatever is killed, stopped, taken away or broken by hand, in the end the node is what the objects say.
//!
//! ```text
//! scene.rs      one node with its agent, a namespace, and the oracles: never two, data kept, nothing left
//! points.rs     the agent dies before and after each thing that it does
//! storm.rs      agent, containerd and API server die at random while bots change
//! servers.rs    containerd, API server, shims, the whole node
//! api.rs        the API server refuses, forgets, hangs and lies; a proxy stands between it and the agent
//! runtime.rs    each call of containerd fails, hangs or loses its answer; another proxy
//! disk.rs       the disk is full, read-only, out of inodes
//! network.rs    addresses that run out
//! bots.rs       bots that behave badly
//! objects.rs    people who edit, delete and create in a hurry
//! outsiders.rs  somebody with `ctr`, `umount` and `kill`
//! ```

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;
mod proxy;

#[path = "e2e_faults/api.rs"]
mod api;
#[path = "e2e_faults/bots.rs"]
mod bots;
#[path = "e2e_faults/disk.rs"]
mod disk;
#[path = "e2e_faults/network.rs"]
mod network;
#[path = "e2e_faults/objects.rs"]
mod objects;
#[path = "e2e_faults/outsiders.rs"]
mod outsiders;
#[path = "e2e_faults/points.rs"]
mod points;
#[path = "e2e_faults/runtime.rs"]
mod runtime;
#[path = "e2e_faults/scene.rs"]
mod scene;
#[path = "e2e_faults/servers.rs"]
mod servers;
#[path = "e2e_faults/snapshots.rs"]
mod snapshots;
#[path = "e2e_faults/storm.rs"]
mod storm;
