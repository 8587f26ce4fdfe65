//! containerd, network and output -> [`Observed`]. Decides nothing.

use std::net::IpAddr;
use std::path::PathBuf;

use containerd_client::services::v1::GetContainerRequest;
use containerd_client::services::v1::GetRequest as GetTaskRequest;
use containerd_client::services::v1::snapshots::{Info, StatSnapshotRequest};
use containerd_client::types::v1::Status as TaskState;
use jiff::Timestamp;

use crate::api::ids::{BotUid, ContainerId};
use crate::containerd::{CallContext, CallFailed, Containerd};
use crate::network::{Network, NetworkError, NetworkState};
use crate::output::{Output as OutputDriver, OutputError};

use super::cgroup::Cgroups;
use super::labels;
use super::record::Record;
use super::shim::Shims;
use super::version::is_filling;

/// What is really there of one bot. Every fact of a status comes out of here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its container in containerd.
    pub container: Container,
    /// Its process.
    pub task: Task,
    /// Its writable layer.
    pub layer: Option<Layer>,
    /// Its network namespace and addresses.
    pub network: Attached,
    /// FIFOs and logger.
    pub output: Output,
    /// Whether the files to be mounted into it were written since the node started.
    pub files: bool,
}

impl Observed {
    /// The agent's note, where the container is the bot's and bears one.
    pub fn record(&self) -> Option<&Record> {
        match &self.container {
            Container::Ours(record) => Some(record),
            Container::Absent | Container::Foreign { .. } | Container::Garbled { .. } => None,
        }
    }
}

/// What containerd has under the bot's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Container {
    /// Nothing.
    Absent,
    /// The bot's container, with the agent's note on it.
    Ours(Box<Record>),
    /// It bears the bot's id and label, but no note that can be read: somebody's hand. What is the bot's is known, and
    /// goes with it; whether it may run again is not, so nothing is started.
    Garbled {
        /// What is wrong with the note.
        why: String,
    },
    /// Something that Berth did not make, or made for another: never touched.
    Foreign {
        /// What makes it foreign.
        why: String,
    },
}

/// What containerd says of the bot's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// No task.
    Absent,
    /// Made, not started.
    Created,
    /// Runs.
    Running {
        /// Process id on the node.
        pid: u32,
    },
    /// Frozen.
    Paused {
        /// Process id on the node.
        pid: u32,
    },
    /// Ended, not yet reaped.
    Stopped {
        /// Exit code.
        code: u32,
        /// When.
        at: Timestamp,
        /// Whether the kernel killed a process of the bot for memory.
        oom: bool,
    },
    /// containerd does not know: its shim is gone or does not answer.
    Unknown,
    /// containerd has none, and yet there is something of one: a creation or deletion was cut off, or is being put away.
    /// There may be a process in it.
    Leftover,
}

/// A writable layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its key in containerd.
    pub key: String,
    /// The committed snapshot that it stands on.
    pub parent: String,
    /// Normalised reference of the image below.
    pub image: String,
    /// Digest that it was resolved to.
    pub digest: String,
    /// When it was made.
    pub created_at: Option<Timestamp>,
    /// Number of the version that it was made from, if of one.
    pub version: Option<i64>,
    /// It is being filled from a version: what is in it is nothing yet.
    pub filling: bool,
}

/// How far the network is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attached {
    /// Nothing of it.
    Absent,
    /// Some of it: made anew before the next start.
    Partial,
    /// All of it.
    Ready {
        /// The bot's addresses; none with `network.mode: None`.
        ips: Vec<IpAddr>,
    },
}

/// How far the output's way is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Nothing of it.
    Absent,
    /// FIFOs without a logger that drains them.
    Undrained,
    /// FIFOs and logger.
    Drained,
}

/// The world could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ObserveFailed {
    /// containerd did not answer, or not as it should.
    #[error("can't look at the bot in containerd")]
    Containerd(#[from] CallFailed),
    /// The network's traces on disk can't be read.
    #[error("can't look at the bot's network")]
    Network(#[from] NetworkError),
    /// The output's traces on disk can't be read.
    #[error("can't look at the bot's output")]
    Output(#[from] OutputError),
}

/// Looks at one bot.
#[derive(Clone, Debug)]
pub struct Observer {
    containerd: Containerd,
    network: Network,
    output: OutputDriver,
    cgroups: Cgroups,
    shims: Shims,
    files_dir: PathBuf,
}

impl Observer {
    /// `files_dir` is where the files to be mounted into bots lie, a folder a bot.
    pub fn new(
        containerd: Containerd,
        network: Network,
        output: OutputDriver,
        cgroups: Cgroups,
        shims: Shims,
        files_dir: PathBuf,
    ) -> Self {
        Self { containerd, network, output, cgroups, shims, files_dir }
    }

    /// What is there of one bot now. `snapshotter` is where its layer is looked for while no container tells, `told` its key then, as
    /// the bot's status has it: after a rollback it is not the first one any more.
    pub async fn observe(
        &self,
        uid: &BotUid,
        snapshotter: &str,
        told: Option<&str>,
    ) -> Result<Observed, ObserveFailed> {
        let id = uid.container_id();
        let first = told.map_or_else(|| labels::first_layer(&id), str::to_owned);
        // Asked side by side: the layer is most often that one, so it is not waited for until the record tells.
        let (container, task, layer, network, output) = tokio::join!(
            self.container(uid, &id),
            self.task(&id),
            self.layer(snapshotter, &first),
            self.network.observe(&id),
            self.output.observe(&id),
        );
        let container = container?;
        let layer = match &container {
            Container::Ours(record) if record.layer != first || record.snapshotter != snapshotter => {
                self.layer(&record.snapshotter, &record.layer).await?
            }
            _ => layer?,
        };
        let files = tokio::fs::try_exists(self.files_dir.join(id.as_str()).join(COMPLETE)).await.unwrap_or(false);
        Ok(Observed {
            container,
            task: task?,
            layer,
            network: match network? {
                NetworkState::Absent => Attached::Absent,
                NetworkState::Partial { .. } => Attached::Partial,
                NetworkState::Attached(attachment) => Attached::Ready { ips: attachment.ips },
            },
            output: match output? {
                found if !found.pipes => Output::Absent,
                found if !found.alive => Output::Undrained,
                _ => Output::Drained,
            },
            files,
        })
    }

    async fn container(&self, uid: &BotUid, id: &ContainerId) -> Result<Container, CallFailed> {
        let request = self.containerd.request(GetContainerRequest { id: id.to_string() });
        match self.containerd.containers().get(request).await.call("get container", id.as_str()) {
            Ok(response) => Ok(response.container.map_or(Container::Absent, |found| whose(uid, &found))),
            Err(error) if error.is_not_found() => Ok(Container::Absent),
            Err(error) => Err(error),
        }
    }

    async fn task(&self, id: &ContainerId) -> Result<Task, CallFailed> {
        let request = self.containerd.request(GetTaskRequest { container_id: id.to_string(), exec_id: String::new() });
        let process = match self.containerd.tasks().get(request).await.call("get task", id.as_str()) {
            Ok(response) => response.process,
            // Looked for after containerd was asked: a task that it was still removing then is no leftover.
            Err(error) if error.is_not_found() => {
                return Ok(if self.shims.left(id).is_some() { Task::Leftover } else { Task::Absent });
            }
            Err(error) => return Err(error),
        };
        let Some(process) = process else { return Ok(Task::Unknown) };
        Ok(match process.status() {
            TaskState::Created => Task::Created,
            TaskState::Running | TaskState::Pausing => Task::Running { pid: process.pid },
            TaskState::Paused => Task::Paused { pid: process.pid },
            TaskState::Stopped => Task::Stopped {
                code: process.exit_status,
                at: process.exited_at.as_ref().and_then(timestamp).unwrap_or_else(Timestamp::now),
                oom: self.cgroups.oom_killed(id).await,
            },
            TaskState::Unknown => Task::Unknown,
        })
    }

    async fn layer(&self, snapshotter: &str, key: &str) -> Result<Option<Layer>, CallFailed> {
        let request =
            self.containerd.request(StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() });
        match self.containerd.snapshots().stat(request).await.call("stat snapshot", key) {
            Ok(response) => Ok(response.info.map(layer)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A layer as containerd tells of it.
pub fn layer(info: Info) -> Layer {
    Layer {
        image: info.labels.get(labels::IMAGE).cloned().unwrap_or_default(),
        digest: info.labels.get(labels::IMAGE_DIGEST).cloned().unwrap_or_default(),
        created_at: info.created_at.as_ref().and_then(timestamp),
        version: info.labels.get(labels::VERSION).and_then(|number| number.parse().ok()),
        filling: is_filling(&info.labels),
        key: info.name,
        parent: info.parent,
    }
}

/// Written last into a bot's folder of files: without it the folder is half-made.
pub const COMPLETE: &str = ".complete";

/// Whether a container of the bot's id is the bot's.
fn whose(uid: &BotUid, found: &containerd_client::services::v1::Container) -> Container {
    let labelled = found.labels.get(labels::UID).map(String::as_str) == Some(uid.as_str());
    let unreadable = |why: String| if labelled { Container::Garbled { why } } else { Container::Foreign { why } };
    let Some(note) = found.extensions.get(Record::EXTENSION) else {
        return unreadable(format!("it lacks the extension {}", Record::EXTENSION));
    };
    match serde_json::from_slice::<Record>(&note.value) {
        Ok(record) if record.uid == uid.as_str() => Container::Ours(Box::new(record)),
        Ok(record) => Container::Foreign { why: format!("its record says that it belongs to uid {}", record.uid) },
        Err(error) => unreadable(format!("its record can't be read: {error}")),
    }
}

/// A time of containerd's; `None` for one that is out of range or was never set (Go's zero time, year 1).
pub fn timestamp(at: &prost_types::Timestamp) -> Option<Timestamp> {
    Timestamp::new(at.seconds, at.nanos).ok().filter(|at| at.as_second() > 0)
}
