//! What can go wrong between asking for a bot's network and having it.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use super::cidr::Cidr;
use crate::api::condition::Reason;

/// A step of the network that failed. Its text tells the step; the cause is its source.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// An option that no network can be made with.
    #[error("the bridge can't be called {name:?}: use letters, digits, '-', '_' and '.', at most 15")]
    BadBridgeName {
        /// The name as given.
        name: String,
    },
    /// A directory of ours can't be made or read.
    #[error("can't {doing} {}", .path.display())]
    Storage {
        /// What was tried, for example `write`.
        doing: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The network namespace can't be made, looked at or removed.
    #[error("can't {doing} the network namespace {}", .path.display())]
    Namespace {
        /// What was tried.
        doing: &'static str,
        /// Where it is mounted.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// An interface of the host can't be made, looked at or changed.
    #[error("can't {doing} the interface {name}")]
    Interface {
        /// What was tried.
        doing: &'static str,
        /// Its name.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// An interface of the bridge's name exists that is no bridge.
    #[error("the interface {name} is a {kind}, not a bridge; remove it, or give the agent another bridge name")]
    NotABridge {
        /// Its name.
        name: String,
        /// What it is.
        kind: String,
    },
    /// A kernel setting can't be written.
    #[error("can't write the kernel setting {}", .path.display())]
    Setting {
        /// Its file under /proc/sys.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The plugin failed.
    #[error("the network of {id} can't be set up or taken down")]
    Plugin {
        /// The bot's container.
        id: String,
        /// What the plugin did.
        source: PluginError,
    },
    /// All addresses are in use.
    #[error("{id} gets no address: all {room} of {cidr} are in use; delete bots or give the node a larger CIDR")]
    AddressesExhausted {
        /// The bot's container.
        id: String,
        /// The node's network.
        cidr: Cidr,
        /// How many bots it has room for.
        room: u32,
        /// The plugin's refusal.
        source: PluginError,
    },
    /// The plugin said that it made an interface which the host does not have.
    #[error("the bridge plugin says that it made {name} for {id}, but the host has no such port of {bridge}")]
    NoSuchPort {
        /// The bot's container.
        id: String,
        /// The interface's name.
        name: String,
        /// The bridge.
        bridge: String,
    },
    /// `nft` can't be run, or the kernel's answer not be had.
    #[error("can't change the packet rules (table {table})")]
    Rules {
        /// The table.
        table: String,
        /// Why not.
        source: io::Error,
    },
    /// `nft` refused the rules.
    #[error("nft refused the packet rules (table {table}): {words}")]
    RulesRefused {
        /// The table.
        table: String,
        /// What it said.
        words: String,
    },
    /// `nft` did not end.
    #[error("nft did not load the packet rules (table {table}) within {deadline:?} and was killed")]
    RulesTimedOut {
        /// The table.
        table: String,
        /// How long it had.
        deadline: Duration,
    },
    /// No CIDR is known yet, so there are no rules that a bot could be let in by.
    #[error("the node has no CIDR for its bots yet")]
    NoCidr,
    /// The operation ended without saying how: the agent is stopping.
    #[error("the network operation on {id} was cut off")]
    CutOff {
        /// The bot's container.
        id: String,
        /// How it ended.
        source: tokio::task::JoinError,
    },
}

impl NetworkError {
    /// The condition's reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::AddressesExhausted { .. } => Reason::AddressesExhausted,
            Self::NoCidr => Reason::NodeNotConfigured,
            Self::Storage { .. } => Reason::StorageFailed,
            Self::BadBridgeName { .. }
            | Self::Namespace { .. }
            | Self::Interface { .. }
            | Self::NotABridge { .. }
            | Self::Setting { .. }
            | Self::Plugin { .. }
            | Self::NoSuchPort { .. }
            | Self::Rules { .. }
            | Self::RulesRefused { .. }
            | Self::RulesTimedOut { .. }
            | Self::CutOff { .. } => Reason::NetworkFailed,
        }
    }

    /// Whether trying again can help without anyone editing an object or restarting the agent.
    pub fn retryable(&self) -> bool {
        match self {
            // A flag of the agent's own.
            Self::BadBridgeName { .. } => false,
            // Other bots go, the controller gives a CIDR.
            Self::AddressesExhausted { .. } | Self::NoCidr => true,
            // The node's operator can mend it (install the plugin, free the disk, remove the interface) and no object
            // changes then.
            Self::Storage { .. }
            | Self::Namespace { .. }
            | Self::Interface { .. }
            | Self::NotABridge { .. }
            | Self::Setting { .. }
            | Self::Plugin { .. }
            | Self::NoSuchPort { .. }
            | Self::Rules { .. }
            | Self::RulesRefused { .. }
            | Self::RulesTimedOut { .. }
            | Self::CutOff { .. } => true,
        }
    }
}

/// How a CNI plugin failed.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// No directory has it.
    #[error("the CNI plugin {plugin} is missing: looked in {directories:?}; install the CNI plugins")]
    Missing {
        /// Its name.
        plugin: &'static str,
        /// Where it was looked for.
        directories: Vec<PathBuf>,
    },
    /// It could not be started.
    #[error("can't run {} {call}", .program.display())]
    NotRun {
        /// The plugin.
        program: PathBuf,
        /// ADD or DEL.
        call: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// It said no.
    #[error("{} {call}: {words} (code {code})", .program.display())]
    Refused {
        /// The plugin.
        program: PathBuf,
        /// ADD or DEL.
        call: &'static str,
        /// The code of its error (CNI spec, "Error").
        code: u32,
        /// Its words.
        words: String,
    },
    /// It ended badly without a CNI error.
    #[error("{} {call} ended with {status}: {words}", .program.display())]
    Died {
        /// The plugin.
        program: PathBuf,
        /// ADD or DEL.
        call: &'static str,
        /// Exit code or signal.
        status: ExitStatus,
        /// Its words.
        words: String,
    },
    /// It did not end.
    #[error("{} {call} did not end within {deadline:?} and was killed", .program.display())]
    TimedOut {
        /// The plugin.
        program: PathBuf,
        /// ADD or DEL.
        call: &'static str,
        /// How long it had.
        deadline: Duration,
    },
    /// It ended well, but what it printed is no result.
    #[error("the CNI plugin {plugin} printed garbage ({why}): {words}")]
    Garbage {
        /// Its name.
        plugin: &'static str,
        /// What was wrong.
        why: String,
        /// What it printed.
        words: String,
    },
}
