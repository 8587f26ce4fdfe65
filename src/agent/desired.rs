//! BotContainer -> [`Desired`]: parsed once, so that nothing later can be wrong. The only place that may refuse.

use std::sync::Arc;
use std::time::Duration;

use crate::api::bot_container::{
    BotContainerSpec, DeletionPolicy, ImagePullPolicy, NetworkMode, OperatingMode, RestartPolicy, RestoredFrom,
    RollbackSpec,
};
use crate::api::bot_snapshot::{SnapshotPhase, SnapshotSource, automatic_name};
use crate::api::condition::Reason;
use crate::api::ids::{BotUid, ContainerId};
use crate::api::{BotContainer, BotSnapshot, BotSnapshotStatus};
use crate::image::Reference;

use super::cost;
use super::labels;
use super::skills::{self, Skills};
use super::version::Version;

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
    /// Key of the layer, as status has it: where no container tells.
    pub layer: Option<String>,
    /// The rollback that is asked for, if one is.
    pub rollback: Option<Rollback>,
    /// The snapshots that were made before this bot moved to another image.
    pub before_image: Vec<(String, SnapshotPhase)>,
    /// The version to start from, where there is no layer.
    pub restore: Option<RestoredFrom>,
    /// The version that a bot which is deleted under `Retain` becomes, once the controller has given it, or said that there can be no
    /// BotSnapshot of it.
    pub preserve: Option<Version>,
    /// What the object is to be.
    pub goal: Goal,
    /// Whether that is so because the node is being drained.
    pub drained: bool,
}

impl Desired {
    /// The same on a node that is being drained: no process, whatever is asked for; files kept.
    pub fn drained(mut self) -> Self {
        let grace = match &self.goal {
            Goal::Alive(alive) => alive.grace,
            Goal::Held { grace } | Goal::Refused { grace, .. } => *grace,
            Goal::Gone { .. } | Goal::Retained { .. } | Goal::Stopped { .. } => return self,
        };
        (self.goal, self.drained) = (Goal::Stopped { grace }, true);
        self
    }
}

/// A rollback that the spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rollback {
    /// It can't be done: there is no such version here, or none that fits. What runs, runs on.
    Impossible {
        /// Its id.
        id: String,
        /// Which field, what is wrong, what is right.
        why: String,
    },
    /// It can.
    To(Box<Target>),
}

impl Rollback {
    /// What names it.
    pub fn id(&self) -> &str {
        match self {
            Self::Impossible { id, .. } => id,
            Self::To(target) => &target.id,
        }
    }
}

/// Where a rollback leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Names the rollback.
    pub id: String,
    /// The version to go back to.
    pub version: Version,
    /// What becomes of the layer in use.
    pub keep: Keep,
}

/// What becomes of a layer that is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It goes.
    No,
    /// It becomes a version, which the controller has not given yet.
    Awaited,
    /// It becomes this version.
    As(Version),
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
    /// No process for a moment, since a snapshot of consistency Stopped is taken; all else is kept for the next start.
    Held {
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

/// Reads what one object asks for. `default_snapshotter` is the node's, `snapshots` are those of this node, `held` whether a
/// snapshot asks for no process.
pub fn desired(
    bot: &BotContainer,
    default_snapshotter: &str,
    snapshots: &[Arc<BotSnapshot>],
    held: bool,
) -> Result<Desired, Unusable> {
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
            Ok(_) if held => Goal::Held { grace },
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
    let of_bot = Versions { namespace: &namespace, bot_id: &bot_id, snapshots };
    let rollback = spec.rollback.as_ref().map(|asked| of_bot.rollback(asked, &name, &uid, &spec.image));
    let before_image = of_bot.before_image(&uid);
    let restore = bot.status.as_ref().and_then(|status| status.restored_from.clone());
    let preserved = matches!(goal, Goal::Retained { .. });
    let status = bot.status.as_ref();
    let orphan = || Version {
        uid: uid.to_string(),
        name: name.clone(),
        namespace: namespace.clone(),
        bot_id: bot_id.clone(),
        number: status.and_then(|status| status.last_version).unwrap_or(0).saturating_add(1),
        orphan: true,
    };
    let orphan = status.is_some_and(|status| status.orphaned == Some(true)).then(orphan);
    let preserve = of_bot.automatic(&name, &uid, SnapshotSource::Preserved, "").or(orphan).filter(|_| preserved);
    let id = uid.container_id();
    let active = status.and_then(|status| status.lineage.last()).filter(|entry| entry.kind == "Active");
    let layer = active.map(|entry| entry.name.clone()).filter(|name| labels::layer_number(&id, name).is_some());
    Ok(Desired {
        id,
        uid,
        namespace,
        name,
        bot_id,
        snapshotter,
        layer,
        rollback,
        before_image,
        restore,
        preserve,
        goal,
        drained: false,
    })
}

/// The versions of one bot on this node.
struct Versions<'a> {
    namespace: &'a str,
    bot_id: &'a str,
    snapshots: &'a [Arc<BotSnapshot>],
}

impl Versions<'_> {
    fn all(&self) -> impl Iterator<Item = (&BotSnapshot, Version)> {
        self.snapshots.iter().filter_map(|snapshot| {
            let (meta, status) = (&snapshot.metadata, snapshot.status.as_ref()?);
            let version = Version {
                uid: meta.uid.clone()?,
                name: meta.name.clone()?,
                namespace: meta.namespace.clone()?,
                bot_id: status.bot_id.clone()?,
                number: status.version?,
                orphan: false,
            };
            (version.namespace == self.namespace && version.bot_id == self.bot_id && meta.deletion_timestamp.is_none())
                .then_some((&**snapshot, version))
        })
    }

    /// The snapshot that the controller made for a cause, once it has its number and this node.
    fn automatic(&self, name: &str, uid: &BotUid, source: SnapshotSource, cause: &str) -> Option<Version> {
        let wanted = automatic_name(name, uid.as_str(), source, cause);
        let is_it = |snapshot: &BotSnapshot| {
            snapshot
                .status
                .as_ref()
                .is_some_and(|s| s.source == Some(source) && s.bot_uid.as_deref() == Some(uid.as_str()))
        };
        self.all().find(|(snapshot, version)| version.name == wanted && is_it(snapshot)).map(|(_, version)| version)
    }

    /// Names and phases of those that were made before the bot moved to another image.
    fn before_image(&self, uid: &BotUid) -> Vec<(String, SnapshotPhase)> {
        let of_it = |status: &&BotSnapshotStatus| {
            status.source == Some(SnapshotSource::PreImageChange) && status.bot_uid.as_deref() == Some(uid.as_str())
        };
        self.all()
            .filter_map(|(snapshot, version)| {
                let status = snapshot.status.as_ref().filter(of_it)?;
                Some((version.name, status.phase.unwrap_or_default()))
            })
            .collect()
    }

    fn rollback(&self, asked: &RollbackSpec, name: &str, uid: &BotUid, image: &str) -> Rollback {
        let id = asked.id.clone();
        match self.target(asked, image) {
            Err(why) => Rollback::Impossible { id, why: format!("spec.rollback {:?}: {why}", asked.id) },
            Ok(version) => {
                let kept = || self.automatic(name, uid, SnapshotSource::Rollback, &id);
                let keep = match asked.keep_replaced {
                    true => kept().map_or(Keep::Awaited, Keep::As),
                    false => Keep::No,
                };
                Rollback::To(Box::new(Target { id, version, keep }))
            }
        }
    }

    /// The version that a rollback names, or why it can't be gone back to.
    fn target(&self, asked: &RollbackSpec, image: &str) -> Result<Version, String> {
        let named = |version: &Version| match (asked.to_version, &asked.snapshot_name) {
            (Some(number), _) => version.number == number,
            (None, Some(name)) => version.name == *name,
            (None, None) => false,
        };
        let words = match (asked.to_version, &asked.snapshot_name) {
            (Some(number), _) => format!("version {number}"),
            (None, name) => format!("BotSnapshot {}", name.as_deref().unwrap_or_default()),
        };
        let ready = |snapshot: &BotSnapshot| {
            snapshot.status.as_ref().is_some_and(|status| status.phase == Some(SnapshotPhase::Ready))
        };
        let Some((snapshot, version)) = self.all().find(|(_, version)| named(version)) else {
            let mut numbers: Vec<i64> =
                self.all().filter(|(s, _)| ready(s)).map(|(_, version)| version.number).collect();
            numbers.sort_unstable();
            let there = match numbers.as_slice() {
                [] => "the bot has no version yet".to_owned(),
                [.., newest] => {
                    let all: Vec<String> = numbers.iter().rev().take(10).rev().map(i64::to_string).collect();
                    format!("the newest is {newest}; set spec.rollback.toVersion to one of {}", all.join(", "))
                }
            };
            return Err(format!("there is no {words} of this bot on its node; {there}"));
        };
        if !ready(snapshot) {
            let phase = snapshot.status.as_ref().and_then(|status| status.phase).unwrap_or_default();
            return Err(format!("{words} is not Ready: it is {phase:?}"));
        }
        let stands_on = snapshot.status.as_ref().and_then(|s| s.image.as_ref()).map(|image| image.reference.as_str());
        let wanted = Reference::parse(image).map(|image| image.to_string()).ok();
        if stands_on != wanted.as_deref() {
            let stands_on = stands_on.unwrap_or("no known image");
            return Err(format!("{words} stands on {stands_on}; set spec.image to that as well"));
        }
        Ok(version)
    }
}

fn alive(spec: &BotContainerSpec, grace: Duration) -> Result<Alive, Refusal> {
    let image = Reference::parse(&spec.image).map_err(|error| Refusal {
        reason: Reason::InvalidImageName,
        message: format!("spec.image: {}", crate::api::condition::chain(&error)),
    })?;
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
