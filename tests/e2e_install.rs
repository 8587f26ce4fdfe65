//! Berth as people install it: the image, the chart by a real helm, Pods on real kubelets.
//!
//! ```text
//! life.rs    installed, used, upgraded, drained, killed part by part, taken off
//! nodes.rs   two nodes: placement, what one's token is worth on the other, drain, a node that loses power, one that is lost
//! ```

#![allow(missing_docs)]
// Helpers of tests may panic as tests do; clippy's allowance stops at `#[test]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

#[path = "e2e_install/installed.rs"]
mod installed;

#[path = "e2e_install/life.rs"]
mod life;
#[path = "e2e_install/nodes.rs"]
mod nodes;
