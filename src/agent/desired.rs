//! BotContainer -> [`Desired`]: parsed once, so that nothing later can be wrong. The only place that may refuse.

use std::time::Duration;

use crate::api::BotContainer;
use crate::api::bot_container::{
    BotContainerSpec, DeletionPolicy, ImagePullPolicy, NetworkMode, OperatingMode, RestartPolicy,
};
use crate::api::condition::Reason;
use crate::api::ids::{BotUid, ContainerId};
use crate::image::Reference;

use super::cost;
use super::skills::{self, Skills};

/// What the objects ask of this node for one bot.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// The object's uid: the bot's name for everything on the node.
    pub uid: BotUid,
    /// Computed from the uid.
    pub id: ContainerId,
    /// The object's namespace.
    pub namespace: String,
    /// The object's name.
    pub name: String,
    /// The botId in force.
    pub bot_id: String,
    /// Snapshotter of the layer.
    pub snapshotter: String,
    /// Id of the rollback that is asked for, if one is.
    pub rollback: Option<String>,
    /// Whether snapshots are asked for by a schedule.
    pub scheduled: bool,
    /// What the object is to be.
    pub goal: Goal,
}

/// What the object is to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// Nothing of it is to be left. Needs no valid spec: deletion always works.
    Gone {
        /// Between TERM and KILL.
        grace: Duration,
    },
    /// Deleted under `deletionPolicy: Retain`: no process, and a layer, where there is one, stays until it is a version or the
    /// policy is another.
    Retained {
        /// Between TERM and KILL.
        grace: Duration,
    },
    /// No process; files kept.
    Stopped {
        /// Between TERM and KILL.
        grace: Duration,
    },
    /// A process, running or paused.
    Alive(Box<Alive>),
    /// The spec can't be run here. What runs, runs on.
    Refused {
        /// Between TERM and KILL, where a stop is under way already.
        grace: Duration,
        /// Why.
        refusal: Refusal,
    },
}

/// How a process is to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Alive {
    /// Frozen rather than running.
    pub paused: bool,
    /// What happens when it ends by itself.
    pub restart_policy: RestartPolicy,
    /// Between TERM and KILL.
    pub grace: Duration,
    /// Hash of all that needs a restart when it changes.
    pub hash: String,
    /// `spec.restartedAt` in its canonical text: a value other than the last one restarts once, none restarts nothing.
    pub restarted_at: Option<String>,
    /// Canonical text of the limits.
    pub limits: String,
    /// The image for the layer.
    pub image: Reference,
    /// When it is pulled.
    pub pull_policy: ImagePullPolicy,
    /// How it is connected.
    pub network: NetworkMode,
    /// Whether the environment tells the bot's address, so that it must be known before the container is written.
    pub address_in_env: bool,
    /// The skills in the bot's data.
    pub skills: Skills,
    /// The spec itself, for making the OCI spec.
    pub spec: BotContainerSpec,
}

/// Why a spec can't be run, for the condition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The condition's reason.
    pub reason: Reason,
    /// Which field, what is wrong with it, what is right.
    pub message: String,
}

/// An object that is none: the API server gave it no uid, name or namespace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("BotContainer {namespace}/{name} has no usable {field}; it is skipped")]
pub struct Unusable {
    namespace: String,
    name: String,
    field: &'static str,
}

/// Reads what one object asks for. `default_snapshotter` is the node's.
pub fn desired(bot: &BotContainer, default_snapshotter: &str) -> Result<Desired, Unusable> {
    let meta = &bot.metadata;
    let namespace = meta.namespace.clone().unwrap_or_default();
    let name = meta.name.clone().unwrap_or_default();
    let unusable = |field| Unusable { namespace: namespace.clone(), name: name.clone(), field };
    let uid = BotUid::parse(meta.uid.as_deref().unwrap_or_default()).map_err(|_| unusable("metadata.uid"))?;
    let spec = &bot.spec;
    let grace = Duration::from_secs(spec.termination_grace_period_seconds.max(0).unsigned_abs());
    let goal = if meta.deletion_timestamp.is_some() {
        match spec.deletion_policy {
            DeletionPolicy::Delete => Goal::Gone { grace },
            DeletionPolicy::Retain => Goal::Retained { grace },
        }
    } else if spec.operating_mode == OperatingMode::Stopped {
        Goal::Stopped { grace }
    } else {
        match alive(spec, grace) {
            Ok(alive) => Goal::Alive(Box::new(alive)),
            Err(refusal) => Goal::Refused { grace, refusal },
        }
    };
    let bot_id = bot
        .status
        .as_ref()
        .and_then(|status| status.bot_id.clone())
        .or_else(|| spec.bot_id.clone())
        .unwrap_or_else(|| uid.to_string());
    let snapshotter = spec.snapshotter.clone().unwrap_or_else(|| default_snapshotter.to_owned());
    let rollback = spec.rollback.as_ref().map(|rollback| rollback.id.clone());
    let scheduled = spec.snapshot_policy.as_ref().is_some_and(|policy| policy.schedule.is_some() && !policy.suspend);
    Ok(Desired { id: uid.container_id(), uid, namespace, name, bot_id, snapshotter, rollback, scheduled, goal })
}

fn alive(spec: &BotContainerSpec, grace: Duration) -> Result<Alive, Refusal> {
    let image = Reference::parse(&spec.image).map_err(|error| Refusal {
        reason: Reason::InvalidImageName,
        message: format!("spec.image: {}", crate::api::condition::chain(&error)),
    })?;
    if let Some(restore) = &spec.restore_from {
        return Err(Refusal {
            reason: Reason::SnapshotsUnsupported,
            message: format!(
                "spec.restoreFrom names the snapshot {:?}, but this Berth takes no snapshots yet; \
                 create the bot without restoreFrom",
                restore.snapshot_name
            ),
        });
    }
    Ok(Alive {
        paused: spec.operating_mode == OperatingMode::Paused,
        restart_policy: spec.restart_policy,
        grace,
        hash: cost::restart_hash(spec),
        restarted_at: spec.restarted_at.as_ref().map(|at| at.0.to_string()),
        limits: limits(spec),
        pull_policy: spec.image_pull_policy.unwrap_or_else(|| image.default_pull_policy()),
        image,
        network: spec.network.mode,
        address_in_env: spec.env.iter().any(|variable| {
            let field = variable.value_from.as_ref().and_then(|from| from.field_ref.as_ref());
            field.is_some_and(|field| field.field_path.starts_with("status.podIP"))
        }),
        skills: skills::wanted(&spec.skills),
        spec: spec.clone(),
    })
}

/// Canonical text of the resources: sorted keys, as JSON.
fn limits(spec: &BotContainerSpec) -> String {
    spec.resources.as_ref().and_then(|resources| serde_json::to_string(resources).ok()).unwrap_or_default()
}
