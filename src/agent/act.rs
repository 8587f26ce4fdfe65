//! Does one [`Step`]; decides nothing. What is wanted was settled by the plan: here is only how it is done.
//!
//! ```text
//! up.rs       layer, network, container, task; what a running bot is given
//! down.rs     signals, ends, removal
//! replace.rs  another layer in the place of the bot's own
//! error.rs    why a step failed
//! ```

mod down;
mod error;
mod replace;
mod up;

use std::collections::HashMap;
use std::sync::Arc;

use containerd_client::services::v1::{Container as ContainerdContainer, PauseTaskRequest, UpdateContainerRequest};
use prost_types::{Any, FieldMask};
use tonic::Code;

use crate::api::ids::ContainerId;
use crate::containerd::{CallContext as _, CallFailed, Containerd};
use crate::image::Images;
use crate::network::{Cidr, Network, Owner};
use crate::output::{BotDirName, Output};

use super::account::Account;
use super::bundle::Bundle;
use super::desired::{Alive, Desired, Goal};
use super::failpoint::{Effect, around};
use super::moves::Moves;
use super::observe::Observed;
use super::record::Record;
use super::shim::Shims;
use super::step::Step;
use super::version::Versions;

pub use error::StepError;

/// Most of a process's last output that is kept with its end. Bytes.
const LAST_OUTPUT: usize = 2048;

/// Does steps.
#[derive(Clone)]
pub struct Actor {
    /// The way to containerd.
    pub containerd: Containerd,
    /// The images.
    pub images: Images,
    /// The network.
    pub network: Network,
    /// The output.
    pub output: Output,
    /// Reads Secrets and ConfigMaps.
    pub account: Arc<Account>,
    /// Makes OCI specs and the files to be mounted.
    pub bundle: Bundle,
    /// What is left of tasks.
    pub shims: Shims,
    /// Keeps runc from waiting for the kernel.
    pub moves: Moves,
    /// The versions of this node.
    pub versions: Versions,
    /// The snapshotters that may have a layer of a bot.
    pub snapshotters: Vec<String>,
}

/// What a step works on.
pub struct Work<'a> {
    /// What is asked.
    pub desired: &'a Desired,
    /// The object, for what the downward API needs; `None` for an orphan.
    pub bot: Option<&'a crate::api::BotContainer>,
    /// What was seen before the step.
    pub observed: &'a Observed,
    /// Addresses of this node's bots, once known.
    pub cidr: Option<&'a Cidr>,
    /// Whether containerd may still be putting away a task of the bot whose creation was cut off.
    pub leftovers: bool,
    /// Whether containerd has had its time to put away what is left of a task.
    pub overdue: bool,
    /// How often this step failed in a row before.
    pub failures: u32,
}

impl Work<'_> {
    pub(super) fn id(&self) -> &ContainerId {
        &self.desired.id
    }

    pub(super) fn record(&self) -> Option<&Record> {
        self.observed.record()
    }

    pub(super) fn alive(&self) -> Result<&Alive, StepError> {
        match &self.desired.goal {
            Goal::Alive(alive) => Ok(alive),
            _ => Err(StepError::Changed("the bot is not to be alive")),
        }
    }

    fn owner(&self) -> Owner {
        Owner {
            namespace: self.desired.namespace.clone(),
            name: self.desired.name.clone(),
            uid: self.desired.uid.to_string(),
        }
    }

    fn logs(&self) -> BotDirName {
        BotDirName::new(&self.desired.namespace, &self.desired.name, &self.desired.uid)
    }
}

impl Actor {
    /// Does one step.
    pub async fn act(&self, step: Step, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        match step {
            Step::Prepare(parts) => self.prepare(parts, work).await,
            Step::WriteContainer => self.write_container(work).await,
            Step::CreateTask { connect } => self.create(connect, work).await,
            Step::StartAttempt => self.start_attempt(work).await,
            Step::Pause => {
                let request = self.containerd.request(PauseTaskRequest { container_id: id.to_string() });
                let answer = around(Effect::Pause, self.containerd.tasks().pause(request)).await;
                answer.call("pause task", id.as_str()).map_err(StepError::Runtime)
            }
            Step::Resume => around(Effect::Resume, self.resume(id)).await,
            Step::UpdateLimits => self.update_limits(work).await,
            Step::WriteSkills => self.write_skills(work).await,
            Step::Stop => self.stop(work).await,
            Step::Kill => self.kill(work).await,
            Step::Reap => self.reap(work).await,
            Step::PutAway => self.put_away(work).await,
            Step::RecordLost => self.record_lost(work).await,
            Step::SettleEnd => match work.record() {
                Some(record) => around(Effect::SettleNote, self.note(id, &record.settled())).await,
                None => Ok(()),
            },
            Step::CopyAside => self.copy_aside(work).await,
            Step::DropAside => self.drop_aside(work).await,
            Step::PullAside => self.pull_aside(work).await,
            Step::CarryData => self.carry_data(work).await,
            Step::SwitchBack => self.switch_back(work).await,
            Step::SwitchLayer => self.switch_layer(work).await,
            Step::SettleReplaced => self.settle_replaced(work).await,
            Step::Preserve => self.preserve(work).await,
            Step::Remove(parts) => self.remove(parts, work).await,
            Step::RemoveContainer => self.remove_container(id).await,
        }
    }

    /// Writes the agent's note onto the container.
    pub(super) async fn note(&self, id: &ContainerId, record: &Record) -> Result<(), StepError> {
        let container = ContainerdContainer {
            id: id.to_string(),
            extensions: HashMap::from([(Record::EXTENSION.to_owned(), record_value(record))]),
            ..ContainerdContainer::default()
        };
        let paths = vec![format!("extensions.{}", Record::EXTENSION)];
        let request = UpdateContainerRequest { container: Some(container), update_mask: Some(FieldMask { paths }) };
        let answer = self.containerd.containers().update(self.containerd.request(request)).await;
        answer.call("update container", id.as_str()).map(|_| ()).map_err(StepError::Runtime)
    }
}

/// Whether an error is the runtime's own answer about this container, rather than a sign that it was not reached, was
/// too slow, is going down, or has no room on its disk: a bot that runs once must not end on what passes.
fn is_answer(error: &CallFailed) -> bool {
    !error.is_unavailable()
        && !error.is_storage()
        && !matches!(
            error.status.code(),
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::ResourceExhausted | Code::NotFound
        )
}

fn record_value(record: &Record) -> Any {
    // A struct of strings, numbers and options always has a JSON text.
    let value = serde_json::to_vec(record).unwrap_or_default();
    Any { type_url: Record::TYPE_URL.to_owned(), value }
}
