//! The OCI runtime spec of a bot.
//!
//! ```text
//! image config ─┐
//! bot's spec ───┼── spec.rs ──> OCI runtime spec              (pure)
//!               │     ├── env.rs         envFrom, env, $(NAME), the image's environment
//!               │     ├── resources.rs   requests and limits as the cgroup's numbers, also for the live update
//!               │     │     └── quantity.rs
//!               │     ├── capability.rs  the default set, add, drop, ALL
//!               │     └── seccomp.rs     what RuntimeDefault allows, and why
//! bot's root ───┼── user.rs    who the process is: /etc/passwd and /etc/group of the image
//!               ├── rootfs.rs  what stands at /dev, /proc, /sys and the data path; making the data path
//! node ─────────┴── node.rs    what the kernel has, read once
//! ```
//!
//! In the order of use, for each start: [`rootfs::check_root`], [`rootfs::ensure_directory`] for the data path,
//! [`user::resolve_user`], [`env::resolve_env`], [`spec::runtime_spec`], [`rootfs::check_working_directory`] of its
//! `process.cwd`. The image and everything below the bot's root is hostile (FAULTS.md, rules 7 to 9).

pub mod capability;
pub mod env;
pub mod node;
pub mod quantity;
pub mod resources;
pub mod rootfs;
pub mod seccomp;
pub mod spec;
pub mod user;

pub use env::{EnvError, FieldContext, SourceData, SourceKind, resolve_env};
pub use node::NodeFacts;
pub use resources::linux_resources;
pub use rootfs::{RootError, check_root, check_working_directory, ensure_directory, open_directory, put_file};
pub use spec::{BindMount, NetworkNamespace, SpecError, SpecInput, runtime_spec};
pub use user::{User, UserError, resolve_user};
