//! Exact copies of a bot's writable layer, made while the bot writes.
//!
//! ```text
//! agent ── copiers.rs ── pipes ── `berth copier` (copier.rs)
//!             Job, Hold >            guardian: thaws when the agent or the worker is gone
//!             < Said                 worker:   the job
//!                                      take.rs      rounds of copying ahead, the freeze, what may be kept of the copies
//!                                      tree.rs      looks at files by descriptors only; copies and hashes their data
//!                                      assemble.rs  makes the tree of what was held, with every fact
//!                                      manifest.rs  what is in a layer, and whether it still is
//!                                      changes.rs   two manifests -> what was added, modified, removed      (pure)
//!                                      tar.rs       a version as an OCI layer
//!                                      freezer.rs   the cgroup's freezer, and the note of a bot that is frozen
//! ```
//!
//! A layer is the upper directory of an overlay. Everything in it is hostile: no path is ever followed, nothing is opened that
//! is not known to be a regular file or a directory, and nothing is run or looked up inside. The freeze costs a walk of the tree
//! and the data that changed since the last round; all that is made of it is made after the thaw.

mod assemble;
mod changes;
pub mod copier;
mod copiers;
mod diff;
mod freezer;
mod job;
mod manifest;
mod take;
mod tar;
mod tree;

pub use copiers::{CopierError, Copiers, Copy, Stream};
pub use diff::diff;
pub use freezer::settle_debts;
pub use job::{Failure, FailureKind, Hold, Job, Said, Summary, Written};
