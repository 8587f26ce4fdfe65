//! Steps on the way up, and those of what runs.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::time::Duration;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::{
    Container as ContainerdContainer, CreateContainerRequest, CreateTaskRequest, GetRequest as GetTaskRequest,
    ResumeTaskRequest, StartRequest, UpdateContainerRequest, UpdateTaskRequest,
};
use containerd_client::types::v1::Status as TaskState;
use jiff::Timestamp;
use prost_types::{Any, FieldMask};

use crate::api::bot_container::{ImagePullPolicy, NetworkMode, RestoredFrom};
use crate::api::condition::{Reason, chain, cut};
use crate::api::ids::ContainerId;
use crate::containerd::{CallContext as _, CallFailed};
use crate::image::{Credentials, Image};

use super::super::bundle;
use super::super::desired::{Alive, Desired};
use super::super::failpoint::{Effect, around};
use super::super::labels;
use super::super::observe::Task;
use super::super::record::{Ending, Life, Record};
use super::super::references::{Kind, References};
use super::super::root;
use super::super::skills::{self, Skills};
use super::super::step::Parts;
use super::{Actor, LAST_OUTPUT, StepError, Work, is_answer, record_value};

/// Type of an OCI runtime spec in containerd.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// Type of OCI Linux resources in containerd.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// A refusal to create a task is believed after so many failures all the same.
const LEFTOVER_TRIES: u32 = 4;

/// Making a task starts a shim and runc and mounts the layer: on a busy node that takes its time.
const CREATE_DEADLINE: Duration = Duration::from_secs(120);

impl Actor {
    pub(super) async fn prepare(&self, parts: Parts, work: &Work<'_>) -> Result<(), StepError> {
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
    pub(in crate::agent) async fn image(&self, alive: &Alive, desired: &Desired) -> Result<Image, StepError> {
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

    pub(super) async fn write_container(&self, work: &Work<'_>) -> Result<(), StepError> {
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

    pub(super) async fn create(&self, connect: bool, work: &Work<'_>) -> Result<(), StepError> {
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

    pub(super) async fn start_attempt(&self, work: &Work<'_>) -> Result<(), StepError> {
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

    pub(super) async fn resume(&self, id: &ContainerId) -> Result<(), StepError> {
        let request = self.containerd.request(ResumeTaskRequest { container_id: id.to_string() });
        self.containerd.tasks().resume(request).await.call("resume task", id.as_str()).map_err(StepError::Runtime)
    }

    pub(super) async fn update_limits(&self, work: &Work<'_>) -> Result<(), StepError> {
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

    pub(super) async fn write_skills(&self, work: &Work<'_>) -> Result<(), StepError> {
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
}

/// What a restored layer stands on.
struct Start {
    digest: String,
}
