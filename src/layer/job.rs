//! What agent and copier say to each other: JSON, a line each.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::api::bot_snapshot::Changes;

/// What a copier is to do. The first line that it reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Job {
    /// Copy the layer of a bot that may run to an empty layer.
    Take {
        /// The layer's own directory.
        source: PathBuf,
        /// That of the new layer.
        dest: PathBuf,
        /// Where copies are kept until they are put in place; on the file system of `dest`. It is made, and removed.
        stage: PathBuf,
        /// Where the manifest is written.
        manifest: PathBuf,
        /// The cgroup that freezes the bot: one directory, of the freezer's hierarchy on cgroup v1.
        cgroup: Vec<PathBuf>,
        /// The file that says that the bot is frozen, as long as it is.
        debt: PathBuf,
        /// Longest freeze.
        max_freeze_millis: u64,
        /// Manifest of the version before.
        before: Option<PathBuf>,
        /// The layers below, the top one first.
        lower: Vec<PathBuf>,
    },
    /// Copy a layer that nobody changes to an empty layer.
    Clone {
        /// The layer's own directory.
        source: PathBuf,
        /// That of the new layer.
        dest: PathBuf,
        /// See `Take`.
        stage: PathBuf,
        /// What is copied must be what this says.
        manifest: Option<PathBuf>,
    },
    /// Copy one directory as a bot sees it, which has no process, to an empty layer on another image, in place of what that has there.
    Carry {
        /// The root of the bot's file system.
        source: PathBuf,
        /// The directory, relative to that.
        path: PathBuf,
        /// The new layer's own directory.
        dest: PathBuf,
        /// See `Take`.
        stage: PathBuf,
        /// The layers below the new one, the top one first.
        lower: Vec<PathBuf>,
        /// Whether `dest` has the files of the layers below as well, being no directory of the new layer's own.
        whole: bool,
    },
    /// Read a layer that nobody changes, and write its manifest.
    Describe {
        /// The layer's own directory.
        source: PathBuf,
        /// Where the manifest is written.
        manifest: PathBuf,
        /// Manifest of the version before.
        before: Option<PathBuf>,
        /// The layers below, the top one first.
        lower: Vec<PathBuf>,
    },
    /// Read a layer back against its manifest: every fact, every byte, from the disk.
    Verify {
        /// The layer's own directory.
        source: PathBuf,
        /// What it must be.
        manifest: PathBuf,
        /// Whether containerd's diff was unpacked to make it, which leaves directories the times of that, and others whole seconds.
        unpacked: bool,
    },
    /// Hold a bot still while another copies it: after [`Said::Precopied`] and its [`Hold`] it says [`Said::Still`], and ends the freeze
    /// at the next line that it reads, or when it has been long enough, which fails.
    Still {
        /// See `Take`.
        cgroup: Vec<PathBuf>,
        /// See `Take`.
        debt: PathBuf,
        /// Longest freeze.
        max_freeze_millis: u64,
    },
    /// Write a layer that nobody changes as an OCI layer: a tar.
    Tar {
        /// The layer's own directory.
        source: PathBuf,
        /// What it must be.
        manifest: PathBuf,
        /// `None`: only its size and digest are told. Else the tar itself from that byte on, and nothing but that, goes to standard
        /// output; one that ends early has not the size that was told.
        from: Option<u64>,
    },
}

/// How the bot is held still while the rest is copied. What `Take` waits for after [`Said::Precopied`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Hold {
    /// It runs: freeze it.
    Freeze,
    /// Nothing of it runs, and nothing will until it was taken: it is paused, or has no process.
    Held,
}

/// What a copier says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Said {
    /// So much is copied ahead that the rest fits into a freeze: waits for a [`Hold`].
    Precopied {
        /// Rounds so far.
        rounds: u32,
        /// Files copied in all of them.
        files: u64,
        /// Bytes copied in all of them.
        bytes: u64,
    },
    /// The rest did not fit into the longest freeze: the bot is thawed, another round is made, the next `Precopied` follows.
    TooMuch {
        /// What was copied of it.
        bytes: u64,
    },
    /// The bot is frozen.
    Still,
    /// One instant is held; the bot is thawed.
    Taken {
        /// Which.
        at: Timestamp,
        /// How long it was frozen: 0 where it was held by others.
        frozen_millis: u64,
    },
    /// All is done.
    Done(Summary),
    /// It can't be done.
    Failed(Failure),
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Paths that are no directories.
    pub files: u64,
    /// Size on disk, hard links once. Bytes.
    pub size_bytes: u64,
    /// Against the version before, where that was asked.
    pub changes: Option<Changes>,
    /// Where it is not what its manifest says: the first few.
    pub mismatches: Vec<String>,
    /// How many of these there are.
    pub mismatch_count: u64,
    /// What its tar would be, where that was asked.
    pub tar: Option<Written>,
}

/// Size and digest of what was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Written {
    /// Bytes.
    pub size: u64,
    /// SHA-256 of them: `sha256:…`.
    pub digest: String,
}

/// Why it can't be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// In a word.
    pub kind: FailureKind,
    /// For people.
    pub message: String,
}

impl Failure {
    /// What an error of the file system makes of a step.
    pub fn of(step: &str, error: &std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        let storage = matches!(error.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem)
            || error.raw_os_error() == Some(libc::EIO);
        let kind = if storage { FailureKind::Storage } else { FailureKind::Other };
        Self { kind, message: format!("{step}: {error}") }
    }
}

/// Why it can't be done, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FailureKind {
    /// The bot changes faster than it can be copied.
    TooManyChanges,
    /// A disk refused.
    Storage,
    /// The bot could not be frozen or thawed.
    Freezer,
    /// A layer is not what its manifest says.
    Mismatch,
    /// An OCI layer has no words for what it holds.
    Unsupported,
    /// The agent is gone.
    Aborted,
    /// Anything else.
    Other,
}
