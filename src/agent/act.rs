//! Does one [`Step`]; decides nothing. What is wanted was settled by the plan: here is only how it is done.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::snapshots::RemoveSnapshotRequest;
use containerd_client::services::v1::{
    Container as ContainerdContainer, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest,
    DeleteTaskRequest, GetRequest as GetTaskRequest, KillRequest, PauseTaskRequest, ResumeTaskRequest, StartRequest,
    UpdateContainerRequest, UpdateTaskRequest,
};
use containerd_client::types::v1::Status as TaskState;
use jiff::Timestamp;
use prost_types::{Any, FieldMask};
use tonic::Code;

use crate::api::bot_container::{ImagePullPolicy, NetworkMode, RestoredFrom};
use crate::api::condition::{Reason, chain, cut};
use crate::api::ids::ContainerId;
use crate::containerd::{CallContext, CallFailed, Containerd};
use crate::image::{Credentials, Image, ImageError, Images};
use crate::network::{Cidr, Network, NetworkError, Owner};
use crate::output::{BotDirName, Output, OutputError};

use super::account::Account;
use super::bundle::{self, Bundle, BundleError};
use super::desired::{Alive, Desired, Goal};
use super::failpoint::{Effect, around};
use super::labels;
use super::moves::Moves;
use super::observe::{Observed, Task};
use super::record::{Ending, Life, Record};
use super::references::{Kind, ReadFailed, References};
use super::root;
use super::shim::{PutAwayFailed, Shims};
use super::skills::{self, SkillFailed, Skills};
use super::step::{Parts, Step};
use super::version::{VersionError, Versions, layers_of};

/// Most of a process's last output that is kept with its end. Bytes.
const LAST_OUTPUT: usize = 2048;

/// Type of an OCI runtime spec in containerd.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// Type of OCI Linux resources in containerd.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

const KILL: u32 = 9;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// containerd or runc refused.
    #[error("the runtime refused")]
    Runtime(#[source] CallFailed),
    /// The image can't be had.
    #[error("the image {image} can't be used")]
    Image {
        /// Its normalised reference.
        image: String,
        /// Why.
        source: ImageError,
    },
    /// `imagePullPolicy: Never`, and the image is not there.
    #[error("the image {image} is not on the node, and imagePullPolicy is Never; load it or change the policy")]
    NeverPull {
        /// Its normalised reference.
        image: String,
    },
    /// The image below the layer was taken from containerd by someone.
    #[error(
        "the image {image} ({digest}) that the bot's layer stands on is no longer whole in containerd; \
         pull it again with `ctr images pull {image}@{digest}`"
    )]
    ImageGone {
        /// Its normalised reference.
        image: String,
        /// Its digest.
        digest: String,
    },
    /// A pull secret can't be used.
    #[error("the pull secret {secret} can't be used: {why}")]
    PullSecret {
        /// Its name.
        secret: String,
        /// What is wrong with it.
        why: String,
    },
    /// The network can't be made or removed.
    #[error("the bot's network can't be set up or removed")]
    Network(#[source] NetworkError),
    /// The controller has not given the node a CIDR.
    #[error("the node has no CIDR for its bots yet; the controller gives it one")]
    NoCidr,
    /// FIFOs or logger can't be made or removed.
    #[error("the bot's output can't be set up or removed")]
    Output(#[source] OutputError),
    /// The OCI spec can't be made.
    #[error("the container can't be made")]
    Bundle(#[source] BundleError),
    /// A skill can't be written.
    #[error(transparent)]
    Skill(SkillFailed),
    /// What is left of an earlier task is in the way.
    #[error(transparent)]
    Leftover(PutAwayFailed),
    /// The version to start from can't be used.
    #[error("the bot can't start from BotSnapshot {snapshot}: {why}")]
    Restore {
        /// Its name.
        snapshot: String,
        /// Why.
        why: String,
    },
    /// A version can't be copied or made.
    #[error("a version can't be copied or made")]
    Version(#[source] VersionError),
    /// A Secret or ConfigMap can't be read.
    #[error("what the spec refers to can't be read")]
    References(#[source] ReadFailed),
    /// The world is not as the step needs it: it changed since the plan. The next look tells.
    #[error("{0}; it is looked at again")]
    Changed(&'static str),
}

impl StepError {
    /// The condition's reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Runtime(error) if error.is_unavailable() => Reason::RuntimeUnavailable,
            Self::Runtime(error) if error.is_storage() => Reason::StorageFailed,
            Self::Runtime(_) | Self::Leftover(_) | Self::Changed(_) => Reason::RuntimeFailed,
            Self::Image { source, .. } => source.reason(),
            Self::NeverPull { .. } => Reason::ErrImageNeverPull,
            Self::ImageGone { .. } => Reason::ImageCorrupt,
            Self::PullSecret { .. } => Reason::ImageAuthFailed,
            Self::Network(error) => error.reason(),
            Self::NoCidr => Reason::NodeNotConfigured,
            Self::Output(error) => error.reason(),
            Self::Bundle(error) => error.reason(),
            Self::Skill(_) => Reason::SkillFailed,
            Self::Restore { .. } => Reason::RestoreFailed,
            Self::Version(error) => error.reason(),
            Self::References(_) => Reason::ConfigUnreadable,
        }
    }

    /// How long the one that refused wants to be left alone, if it said so.
    pub fn retry_after(&self) -> Option<std::time::Duration> {
        match self {
            Self::Image { source, .. } => source.retry_after(),
            _ => None,
        }
    }

    /// Whether trying again can help without an edit of the bot.
    pub fn retryable(&self) -> bool {
        match self {
            // Away, busy, full: all of these pass.
            Self::Runtime(_)
            | Self::Leftover(_)
            | Self::Network(_)
            | Self::NoCidr
            | Self::Output(_)
            | Self::Changed(_) => true,
            Self::Image { source, .. } => source.retryable(),
            // An image can be loaded by hand, a Secret mended: neither touches the bot.
            Self::NeverPull { .. } | Self::ImageGone { .. } | Self::PullSecret { .. } | Self::References(_) => true,
            // The bot's own doing, which the bot may undo.
            Self::Skill(_) => true,
            // An edit of the image; a version that somebody brings back.
            Self::Restore { .. } => true,
            Self::Version(error) => error.retryable(),
            Self::Bundle(error) => error.retryable(),
        }
    }
}

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

    // --- up ---

    async fn prepare(&self, parts: Parts, work: &Work<'_>) -> Result<(), StepError> {
        let layer = async { if parts.layer { self.prepare_layer(work).await } else { Ok(()) } };
        let network = async {
            if parts.network {
                around(Effect::PrepareNetwork, self.connect(work)).await
            } else if parts.namespace {
                let owner = work.owner();
                let make = self.network.ensure_loopback_only(work.id(), &owner);
                around(Effect::PrepareNamespace, make).await.map(|_| ()).map_err(StepError::Network)
            } else {
                Ok(())
            }
        };
        let output = async {
            if !parts.output {
                return Ok(());
            }
            let pipes = around(Effect::PrepareOutput, self.output.ensure(work.id(), &work.logs())).await;
            pipes.map(|_| ()).map_err(StepError::Output)
        };
        // All three go to their end: what one of them made is found again, and the first error is told.
        let (layer, network, output) = tokio::join!(layer, network, output);
        layer.and(network).and(output)
    }

    async fn connect(&self, work: &Work<'_>) -> Result<(), StepError> {
        match work.alive()?.network {
            NetworkMode::Host => Ok(()),
            NetworkMode::None => self
                .network
                .ensure_loopback_only(work.id(), &work.owner())
                .await
                .map(|_| ())
                .map_err(StepError::Network),
            NetworkMode::Bridge => {
                let cidr = work.cidr.ok_or(StepError::NoCidr)?;
                self.network.ensure(work.id(), &work.owner(), cidr).await.map(|_| ()).map_err(StepError::Network)
            }
        }
    }

    async fn prepare_layer(&self, work: &Work<'_>) -> Result<(), StepError> {
        let alive = work.alive()?;
        let id = work.id();
        let snapshotter = &work.desired.snapshotter;
        let start = match &work.desired.restore {
            Some(restore) => Some((restore, self.start_of(restore, alive, work.desired).await?)),
            None => None,
        };
        let image = self.image(alive, work.desired).await?;
        // Where it is looked for: as the record has it, of a layer that is half-made or gone.
        let key = work.record().map_or_else(|| labels::first_layer(id), |record| record.layer.clone());
        let (parent, labels) = match start {
            None => (image.chain_id, labels::layer(work.desired, &image.reference, &image.digest)),
            Some((restore, start)) => {
                // It stands on what the version stands on, whatever the image's name has come to mean since.
                let mut labels = labels::layer(work.desired, &image.reference, &start.digest);
                labels.insert(labels::VERSION.to_owned(), restore.version.to_string());
                if restore.bot_id == work.desired.bot_id {
                    let copy = self.versions.copy_out(snapshotter, &restore.uid, &key, labels);
                    return around(Effect::RestoreCopy, copy).await.map_err(StepError::Version);
                }
                // A fork shares what it was forked from.
                (labels::version(&restore.uid), labels)
            }
        };
        match around(Effect::PrepareSnapshot, self.versions.prepare(snapshotter, &key, &parent, labels)).await {
            Err(error) if error.is_already_exists() => Ok(()),
            done => done.map_err(StepError::Runtime),
        }
    }

    /// What the version stands on that a bot is to start from.
    async fn start_of(&self, restore: &RestoredFrom, alive: &Alive, desired: &Desired) -> Result<Start, StepError> {
        let name = labels::version(&restore.uid);
        let failed = |why: String| StepError::Restore { snapshot: restore.snapshot_name.clone(), why };
        let info = self.versions.stat(&desired.snapshotter, &name).await.map_err(StepError::Runtime)?;
        let info = info.ok_or_else(|| failed(format!("{name} is not in containerd on its node")))?;
        let label = |key: &str| info.labels.get(key).cloned().unwrap_or_default();
        let (image, wanted) = (label(labels::IMAGE), alive.image.to_string());
        if image != wanted {
            return Err(failed(format!(
                "it stands on the image {image}, and spec.image is {wanted}; set spec.image to that"
            )));
        }
        Ok(Start { digest: label(labels::IMAGE_DIGEST) })
    }

    /// The image as the pull policy says.
    pub(super) async fn image(&self, alive: &Alive, desired: &Desired) -> Result<Image, StepError> {
        let failed = |source| StepError::Image { image: alive.image.to_string(), source };
        if alive.pull_policy != ImagePullPolicy::Always
            && let Some(image) = self.images.find(&alive.image, &desired.snapshotter).await.map_err(failed)?
        {
            return Ok(image);
        }
        if alive.pull_policy == ImagePullPolicy::Never {
            return Err(StepError::NeverPull { image: alive.image.to_string() });
        }
        let credentials = self.credentials(alive, &desired.namespace).await?;
        let pull = self.images.pull(&alive.image, &desired.snapshotter, &credentials);
        around(Effect::PreparePull, pull).await.map_err(failed)
    }

    async fn credentials(&self, alive: &Alive, namespace: &str) -> Result<Credentials, StepError> {
        let secrets = References::read_pull_secrets(&self.account, namespace, &alive.spec)
            .await
            .map_err(StepError::References)?;
        let mut credentials = Credentials::anonymous();
        for named in &alive.spec.image_pull_secrets {
            // As kubelet does: a pull secret that is missing is passed over, since the pull may work without it.
            let Some(data) = secrets.get(Kind::Secret, &named.name) else { continue };
            let unusable = |why: String| StepError::PullSecret { secret: named.name.clone(), why };
            let more = if let Some(bytes) = data.get(".dockerconfigjson") {
                Credentials::parse(bytes).map_err(|error| unusable(chain(&error)))?
            } else if let Some(bytes) = data.get(".dockercfg") {
                Credentials::parse_legacy(bytes).map_err(|error| unusable(chain(&error)))?
            } else {
                return Err(unusable("it has neither the key .dockerconfigjson nor .dockercfg".to_owned()));
            };
            credentials = credentials.and_then(more);
        }
        Ok(credentials)
    }

    async fn write_container(&self, work: &Work<'_>) -> Result<(), StepError> {
        let alive = work.alive()?;
        let id = work.id();
        let layer = work.observed.layer.as_ref().ok_or(StepError::Changed("the bot has no layer"))?;
        let old = work.record();
        let (references, mounts) = tokio::join!(
            References::read(&self.account, &work.desired.namespace, &alive.spec),
            self.versions.mounts(&work.desired.snapshotter, &layer.key),
        );
        let (references, mounts) = (references.map_err(StepError::References)?, mounts.map_err(StepError::Runtime)?);
        let image = self
            .images
            .run_config(&alive.image, &layer.digest, &work.desired.snapshotter)
            .await
            .map_err(|source| StepError::Image { image: layer.image.clone(), source })?
            .ok_or_else(|| StepError::ImageGone { image: layer.image.clone(), digest: layer.digest.clone() })?;
        let none = Skills::new();
        let input = bundle::Input {
            desired: work.desired,
            alive,
            bot: work.bot.ok_or(StepError::Changed("the bot has no object"))?,
            image: &image,
            references: &references,
            mounts: &mounts,
            network: &work.observed.network,
            noted: old.map_or(&none, |old| &old.skills),
        };
        let made = around(Effect::WriteFiles, self.bundle.make(&input)).await.map_err(StepError::Bundle)?;
        let mut record = Record {
            uid: work.desired.uid.to_string(),
            namespace: work.desired.namespace.clone(),
            name: work.desired.name.clone(),
            bot_id: work.desired.bot_id.clone(),
            hash: alive.hash.clone(),
            restarted_at: alive.restarted_at.clone().or_else(|| old.and_then(|old| old.restarted_at.clone())),
            // What is asked when the bot is made counts as done.
            rollback: match old {
                Some(old) => old.rollback.clone(),
                None => work.desired.rollback.as_ref().map(|asked| asked.id().to_owned()),
            },
            rolled: old.and_then(|old| old.rolled.clone()),
            aside: old.and_then(|old| old.aside.clone()),
            replaced: old.and_then(|old| old.replaced.clone()),
            limits: alive.limits.clone(),
            skills: made.skills,
            image: layer.image.clone(),
            digest: layer.digest.clone(),
            snapshotter: work.desired.snapshotter.clone(),
            layer: layer.key.clone(),
            stop_signal: made.stop_signal,
            spec_for: 0,
            attempt: old.map_or(0, |old| old.attempt),
            life: old.map_or(Life::Fresh, |old| old.life),
            stop_ordered: None,
            stop_sent: false,
            kill_ordered: None,
            failures: old.map_or(0, |old| old.failures),
            restarts: old.map_or(0, |old| old.restarts),
            last: old.and_then(|old| old.last.clone()),
        };
        // A paused bot is not about to start: what it refers to is read when it does.
        record.spec_for = if alive.paused { 0 } else { record.next_attempt() };
        let mut labels = labels::owner(work.desired);
        labels.insert(labels::SPEC_HASH.to_owned(), alive.hash.clone());
        let container = ContainerdContainer {
            id: id.to_string(),
            labels,
            image: layer.image.clone(),
            runtime: Some(Runtime { name: made.runtime, options: None }),
            spec: Some(Any { type_url: SPEC_TYPE.to_owned(), value: made.spec }),
            snapshotter: work.desired.snapshotter.clone(),
            snapshot_key: layer.key.clone(),
            extensions: HashMap::from([(Record::EXTENSION.to_owned(), record_value(&record))]),
            ..ContainerdContainer::default()
        };
        let mut containers = self.containerd.containers();
        let done = if old.is_some() {
            let paths = ["spec", "labels", "image", "snapshotkey"].map(str::to_owned).into_iter();
            let paths = paths.chain([format!("extensions.{}", Record::EXTENSION)]).collect();
            let request = UpdateContainerRequest { container: Some(container), update_mask: Some(FieldMask { paths }) };
            let answer = around(Effect::WriteContainer, containers.update(self.containerd.request(request))).await;
            answer.call("update container", id.as_str()).map(|_| ())
        } else {
            let request = CreateContainerRequest { container: Some(container) };
            let answer = around(Effect::WriteContainer, containers.create(self.containerd.request(request))).await;
            answer.call("create container", id.as_str()).map(|_| ())
        };
        done.map_err(StepError::Runtime)
    }

    async fn create(&self, connect: bool, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let connected =
            async { if connect { around(Effect::CreateConnect, self.connect(work)).await } else { Ok(()) } };
        let created = async {
            match work.observed.task {
                Task::Absent => self.create_task(id, record, work).await,
                _ => Ok(Ok(())),
            }
        };
        let (connected, created) = self.moves.quick(async { tokio::join!(connected, created) }).await;
        match (connected, created?) {
            (connected, Ok(())) => connected,
            // A network that failed takes its namespace along, and the creation under way with it: no fault of the bot's.
            (Err(failed), Err(_)) => Err(failed),
            (Ok(()), Err(refused)) => {
                // What is left of an earlier creation may refuse this one. A bot that is never to run again must not end on that.
                let leftovers = work.leftovers || self.shims.left(id).is_some();
                if work.failures < LEFTOVER_TRIES && leftovers {
                    return Err(StepError::Runtime(refused));
                }
                self.could_not_start(id, record, refused).await
            }
        }
    }

    async fn start_attempt(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let alive = work.alive()?;
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        self.bundle.tell_address(work.desired, alive, &work.observed.network).map_err(StepError::Bundle)?;
        let started = record.started(Timestamp::now());
        if started != *record {
            around(Effect::StartNote, self.note(id, &started)).await?;
        }
        let request = StartRequest { container_id: id.to_string(), exec_id: String::new() };
        let answer = around(Effect::StartStart, self.containerd.tasks().start(self.containerd.request(request))).await;
        match answer.call("start task", id.as_str()) {
            Ok(_) => Ok(()),
            Err(error) if is_answer(&error) => self.could_not_start(id, &started, error).await,
            Err(error) => Err(StepError::Runtime(error)),
        }
    }

    /// The inner error is the runtime's own word on this container; the outer one says nothing about it.
    async fn create_task(
        &self,
        id: &ContainerId,
        record: &Record,
        work: &Work<'_>,
    ) -> Result<Result<(), CallFailed>, StepError> {
        let logs = work.logs();
        let (mounts, pipes) = tokio::join!(
            self.versions.mounts(&record.snapshotter, &record.layer),
            around(Effect::CreateOutput, self.output.ensure(id, &logs)),
        );
        let (mounts, pipes) = (mounts.map_err(StepError::Runtime)?, pipes.map_err(StepError::Output)?);
        let request = CreateTaskRequest {
            container_id: id.to_string(),
            rootfs: mounts,
            stdout: pipes.stdout.to_string_lossy().into_owned(),
            stderr: pipes.stderr.to_string_lossy().into_owned(),
            ..CreateTaskRequest::default()
        };
        let mut request = self.containerd.request(request);
        request.set_timeout(CREATE_DEADLINE);
        let answer = around(Effect::CreateTask, self.containerd.tasks().create(request)).await;
        match answer.call("create task", id.as_str()) {
            Ok(_) => Ok(Ok(())),
            // There is one after all, or what is left of one: the next look tells.
            Err(error) if error.is_already_exists() => Ok(Ok(())),
            Err(error) if is_answer(&error) => Ok(Err(error)),
            Err(error) => Err(StepError::Runtime(error)),
        }
    }

    /// The attempt failed before a process ran: that is its end, and the restart policy decides.
    async fn could_not_start(&self, id: &ContainerId, record: &Record, why: CallFailed) -> Result<(), StepError> {
        let now = Timestamp::now();
        let ending = Ending {
            code: 128,
            reason: Reason::StartError.as_str().to_owned(),
            message: cut(&chain(&why), LAST_OUTPUT),
            started_at: None,
            finished_at: now,
            asked: false,
        };
        around(Effect::StartNoteRefused, self.note(id, &record.started(now).ended(ending))).await?;
        around(Effect::StartDeleteRefused, self.delete_task(id)).await
    }

    async fn resume(&self, id: &ContainerId) -> Result<(), StepError> {
        let request = self.containerd.request(ResumeTaskRequest { container_id: id.to_string() });
        self.containerd.tasks().resume(request).await.call("resume task", id.as_str()).map_err(StepError::Runtime)
    }

    async fn update_limits(&self, work: &Work<'_>) -> Result<(), StepError> {
        let alive = work.alive()?;
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let resources = self.bundle.resources(&alive.spec).map_err(StepError::Bundle)?;
        let request = UpdateTaskRequest {
            container_id: id.to_string(),
            resources: Some(Any { type_url: RESOURCES_TYPE.to_owned(), value: resources }),
            annotations: HashMap::new(),
        };
        let answer =
            around(Effect::LimitsUpdate, self.containerd.tasks().update(self.containerd.request(request))).await;
        answer.call("update task", id.as_str()).map_err(StepError::Runtime)?;
        let noted = Record { limits: alive.limits.clone(), ..record.clone() };
        around(Effect::LimitsNote, self.note(id, &noted)).await
    }

    async fn write_skills(&self, work: &Work<'_>) -> Result<(), StepError> {
        let alive = work.alive()?;
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let (Task::Running { pid } | Task::Paused { pid }) = work.observed.task else {
            return Err(StepError::Changed("the bot has no process"));
        };
        let root = root::of_process(pid).map_err(|source| StepError::Bundle(source.into()))?;
        // The number could be another process's by now. It is not, where containerd still has it for the bot's after its
        // root was opened.
        let request = self.containerd.request(GetTaskRequest { container_id: id.to_string(), exec_id: String::new() });
        let task = self.containerd.tasks().get(request).await.call("get task", id.as_str());
        let process = task.map_err(StepError::Runtime)?.process.unwrap_or_default();
        if process.pid != pid || !matches!(process.status(), TaskState::Running | TaskState::Paused) {
            return Err(StepError::Changed("the bot has another process"));
        }
        let (data, skills, noted) = (alive.spec.data.path.clone(), alive.spec.skills.clone(), record.skills.clone());
        let write = tokio::task::spawn_blocking(move || skills::write(root.as_fd(), &data, &skills, &noted));
        let (skills, failed) =
            around(Effect::SkillsWrite, write).await.map_err(|error| StepError::Bundle(error.into()))?;
        if skills != record.skills {
            around(Effect::SkillsNote, self.note(id, &Record { skills, ..record.clone() })).await?;
        }
        failed.map_or(Ok(()), |failed| Err(StepError::Skill(failed)))
    }

    // --- down ---

    async fn stop(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let order = Record { stop_ordered: Some(Timestamp::now()), stop_sent: false, ..record.clone() };
        around(Effect::StopNote, self.note(id, &order)).await?;
        around(Effect::StopSignal, self.signal(id, record.stop_signal, false)).await?;
        if let Task::Paused { .. } = work.observed.task {
            around(Effect::StopResume, self.resume(id)).await?;
        }
        around(Effect::StopNoteSent, self.note(id, &Record { stop_sent: true, ..order })).await
    }

    async fn kill(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        if let Some(record) = work.record() {
            let now = Timestamp::now();
            let order =
                Record { stop_ordered: record.stop_ordered.or(Some(now)), kill_ordered: Some(now), ..record.clone() };
            around(Effect::KillNote, self.note(id, &order)).await?;
        }
        around(Effect::KillSignal, self.signal(id, KILL, true)).await?;
        // On cgroup v1 a frozen process does not even die of KILL (runc #3134, #2105).
        if let Task::Paused { .. } = work.observed.task {
            match self.resume(id).await {
                Err(StepError::Runtime(error)) if is_answer(&error) => {}
                done => done?,
            }
        }
        Ok(())
    }

    async fn signal(&self, id: &ContainerId, signal: u32, all: bool) -> Result<(), StepError> {
        let request = KillRequest { container_id: id.to_string(), exec_id: String::new(), signal, all };
        match self.containerd.tasks().kill(self.containerd.request(request)).await.call("kill task", id.as_str()) {
            // It ended in between: the next look sees it.
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map_err(StepError::Runtime),
        }
    }

    async fn reap(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let Some(record) = work.record().filter(|record| matches!(record.life, Life::Started { .. })) else {
            return around(Effect::ReapDelete, self.delete_task(id)).await;
        };
        let ending = match work.observed.task {
            Task::Stopped { code, at, oom } => Ending {
                code,
                reason: exit_reason(code, oom).as_str().to_owned(),
                message: String::new(),
                started_at: None,
                finished_at: at,
                asked: false,
            },
            // A shim that does not answer says nothing of its process. One that is dead can be deleted, and then the
            // attempt has no task, which is an end; one that only hangs refuses, and nothing was claimed.
            _ => return self.delete_task(id).await,
        };
        let ended = record.ended(ending);
        around(Effect::ReapNote, self.note(id, &ended)).await?;
        around(Effect::ReapDelete, self.delete_task(id)).await?;
        around(Effect::ReapNoteOutput, self.note_last_output(work, record, ended)).await
    }

    async fn put_away(&self, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        // A shim that has no task yet, because containerd died in the middle, is put away for knowing none. Whatever the
        // answer: the next look tells.
        let delete = DeleteTaskRequest { container_id: id.to_string() };
        let _ = around(Effect::PutAwayDelete, self.containerd.tasks().delete(self.containerd.request(delete))).await;
        let ours = work.bot.is_some() || work.record().is_some() || work.observed.layer.is_some();
        let rest = async { if work.overdue { self.shims.put_away(id, ours).await } else { self.shims.tidy(id).await } };
        around(Effect::PutAwayRest, rest).await.map_err(StepError::Leftover)
    }

    async fn record_lost(&self, work: &Work<'_>) -> Result<(), StepError> {
        let record = work.record().ok_or(StepError::Changed("the bot has no container"))?;
        let ended = record.ended(lost());
        around(Effect::LostNote, self.note(work.id(), &ended)).await?;
        self.note_last_output(work, record, ended).await
    }

    /// Adds the last output to a noted end. Only after the task is deleted has its shim passed on all of it; cut off
    /// before, the end is noted without its last words.
    async fn note_last_output(&self, work: &Work<'_>, began: &Record, mut ended: Record) -> Result<(), StepError> {
        let Some(last) = ended.last.as_mut().filter(|last| !last.asked) else {
            // An unfinished last line is the end of this process's words, not the beginning of the next one's.
            let (output, id) = (self.output.clone(), work.id().clone());
            let _ = tokio::task::spawn_blocking(move || output.flush(&id)).await;
            return Ok(());
        };
        let since = match began.life {
            Life::Started { at } => Some(at),
            Life::Fresh | Life::Ended => None,
        };
        let (output, logs) = (self.output.clone(), work.logs());
        let read = tokio::task::spawn_blocking(move || output.last_output_since(&logs, since, LAST_OUTPUT)).await;
        match read {
            Ok(Ok(text)) if !text.is_empty() => last.message = text,
            // What can't be read is missed by people, not by the plan.
            Ok(_) | Err(_) => return Ok(()),
        }
        self.note(work.id(), &ended).await
    }

    async fn delete_task(&self, id: &ContainerId) -> Result<(), StepError> {
        let request = DeleteTaskRequest { container_id: id.to_string() };
        match self.containerd.tasks().delete(self.containerd.request(request)).await.call("delete task", id.as_str()) {
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map(|_| ()).map_err(StepError::Runtime),
        }
    }

    async fn remove(&self, parts: Parts, work: &Work<'_>) -> Result<(), StepError> {
        let id = work.id();
        let network = async {
            if !parts.network {
                return Ok(());
            }
            around(Effect::RemoveNetwork, self.network.remove(id)).await.map_err(StepError::Network)
        };
        let output = async {
            if !parts.output {
                return Ok(());
            }
            let keep_logs = !matches!(work.desired.goal, Goal::Gone { .. });
            around(Effect::RemoveOutput, self.output.remove(id, keep_logs)).await.map_err(StepError::Output)
        };
        let layer = async {
            let Some(layer) = work.observed.layer.as_ref().filter(|_| parts.layer) else { return Ok(()) };
            let snapshotter = work.record().map_or(&work.desired.snapshotter, |record| &record.snapshotter).clone();
            let request = RemoveSnapshotRequest { snapshotter, key: layer.key.clone() };
            let answer =
                around(Effect::RemoveLayer, self.containerd.snapshots().remove(self.containerd.request(request))).await;
            match answer.call("remove snapshot", &layer.key) {
                Err(error) if error.is_not_found() => Ok(()),
                done => done.map_err(StepError::Runtime),
            }
        };
        let (network, output, layer) = tokio::join!(network, output, layer);
        network.and(output).and(layer)
    }

    /// Removes what no observation shows: a shim without a task, logs of a bot that was stopped before, mounted files.
    /// Safe twice. The last thing before a bot is said to be removed: it looks through the machine's processes.
    pub async fn remove_rest(&self, id: &ContainerId) -> Result<(), StepError> {
        self.shims.end_idle(id).await.map_err(StepError::Leftover)?;
        self.remove_unseen(id).await
    }

    async fn remove_unseen(&self, id: &ContainerId) -> Result<(), StepError> {
        around(Effect::RemoveLogs, self.output.remove(id, false)).await.map_err(StepError::Output)?;
        around(Effect::RemoveFiles, self.bundle.remove_files(id)).await.map_err(StepError::Bundle)?;
        around(Effect::RemoveSpare, self.remove_spare(id)).await
    }

    /// Layers that were made beside, or replaced, and never settled.
    async fn remove_spare(&self, id: &ContainerId) -> Result<(), StepError> {
        let Some(uid) = ContainerId::uid_of(id.as_str()) else { return Ok(()) };
        for snapshotter in &self.snapshotters {
            let filter = format!("labels.\"{}\"=={uid}", labels::UID);
            let found = self.versions.list(snapshotter, filter).await.map_err(StepError::Runtime)?;
            for layer in layers_of(id, &found) {
                self.versions.remove(snapshotter, &layer.name).await.map_err(StepError::Runtime)?;
            }
        }
        Ok(())
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<(), StepError> {
        self.remove_unseen(id).await?;
        let request = DeleteContainerRequest { id: id.to_string() };
        let answer =
            around(Effect::RemoveContainer, self.containerd.containers().delete(self.containerd.request(request)))
                .await;
        match answer.call("delete container", id.as_str()) {
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map_err(StepError::Runtime),
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

/// What a restored layer stands on.
struct Start {
    digest: String,
}

/// A refusal to create a task is believed after so many failures all the same.
const LEFTOVER_TRIES: u32 = 4;

/// Making a task starts a shim and runc and mounts the layer: on a busy node that takes its time.
const CREATE_DEADLINE: std::time::Duration = std::time::Duration::from_secs(120);

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

fn lost() -> Ending {
    Ending {
        code: 137,
        reason: Reason::TaskLost.as_str().to_owned(),
        message: String::new(),
        started_at: None,
        finished_at: Timestamp::now(),
        asked: false,
    }
}

fn exit_reason(code: u32, oom: bool) -> Reason {
    match code {
        0 => Reason::Completed,
        _ if oom => Reason::OOMKilled,
        _ => Reason::Error,
    }
}
