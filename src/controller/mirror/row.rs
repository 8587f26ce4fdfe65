//! Which rows the objects of one bot are. Pure: the same objects give the same rows, whenever and by whomever they are looked at,
//! so that an empty database and one that was away for a week end up alike.
//!
//! A bot is a namespace and a botId; it outlives its BotContainer while versions of it are kept, and so does its row in `containers`.

use std::borrow::Cow;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::api::bot_container::{DataSpec, OperatingMode, Phase};
use crate::api::bot_snapshot::{SnapshotPhase, SnapshotSource, Taken};
use crate::api::{BotContainer, BotSnapshot, resource_version};

use super::super::Name;

/// What a hash is made with besides the rows. Counts up when rows of the same content have to be written anew.
const EPOCH: &str = "1";

/// One entry of `status.transitions`, as small as it can be kept: there are 32 of them a bot.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// Counts up from 1 in an object.
    pub seq: i64,
    /// The word for what happened.
    pub type_: Cow<'static, str>,
    /// When.
    pub at: Timestamp,
    /// Exit code of an `exited`.
    pub exit_code: Option<i64>,
    /// The version that it was about.
    pub version: Option<i64>,
    /// What a person wants to know.
    pub message: Option<Box<str>>,
}

/// Words that are kept once, not once a bot.
const WORDS: [&str; 12] = [
    "scheduled",
    "pulled",
    "restored",
    "created",
    "started",
    "exited",
    "oom_killed",
    "version_rollback",
    "paused",
    "resumed",
    "stopped",
    "deleted",
];

/// What the mirror needs of a BotContainer and nobody else in the controller does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tail {
    /// When the object was last written, by its managed fields.
    pub updated_at: Option<Timestamp>,
    /// When a process was last started.
    pub started_at: Option<Timestamp>,
    /// When a process last ended.
    pub stopped_at: Option<Timestamp>,
    /// Whether its layer stays on the node without an object.
    pub orphaned: bool,
    /// The last that happened, by `seq`.
    pub moments: Box<[Moment]>,
}

impl Tail {
    /// Of a BotContainer as the API server has it.
    pub fn of(bot: &BotContainer) -> Self {
        let status = bot.status.as_ref();
        let mut moments: Vec<Moment> = status
            .map(|status| status.transitions.as_slice())
            .unwrap_or_default()
            .iter()
            .map(|t| Moment {
                seq: t.seq,
                type_: WORDS
                    .iter()
                    .find(|word| **word == t.type_)
                    .map_or_else(|| Cow::Owned(t.type_.clone()), |w| Cow::Borrowed(*w)),
                at: t.at.0,
                exit_code: t.exit_code,
                version: t.version,
                message: t.message.clone().map(String::into_boxed_str),
            })
            .collect();
        moments.sort_by_key(|moment| moment.seq);
        moments.dedup_by_key(|moment| moment.seq);
        let happened = |types: &[&str]| moments.iter().filter(|m| types.contains(&&*m.type_)).map(|m| m.at).max();
        let last = status.and_then(|status| status.last_termination.as_ref());
        let task = status.and_then(|status| status.task.as_ref());
        let time = |time: Option<&Time>| time.map(|time| time.0);
        Self {
            updated_at: updated(&bot.metadata),
            started_at: [
                time(task.map(|t| &t.started_at)),
                time(last.and_then(|l| l.started_at.as_ref())),
                happened(&["started"]),
            ]
            .into_iter()
            .flatten()
            .max(),
            stopped_at: [
                time(last.and_then(|l| l.finished_at.as_ref())),
                happened(&["exited", "oom_killed", "stopped"]),
            ]
            .into_iter()
            .flatten()
            .max(),
            orphaned: status.and_then(|status| status.orphaned).unwrap_or(false),
            moments: moments.into(),
        }
    }
}

/// When an object was last written: by its managed fields, else by its creation.
fn updated(metadata: &ObjectMeta) -> Option<Timestamp> {
    let managed = metadata.managed_fields.iter().flatten().filter_map(|entry| entry.time.as_ref());
    managed.chain(&metadata.creation_timestamp).map(|time| time.0).max()
}

/// All that is there of one bot.
#[derive(Clone, Debug, Default)]
pub struct Bot {
    /// The BotContainer that holds the botId.
    pub container: Option<(Arc<BotContainer>, Arc<Tail>)>,
    /// The uids of all BotContainers with this botId.
    pub alive: Vec<Uuid>,
    /// Its BotSnapshots.
    pub snapshots: Vec<Arc<BotSnapshot>>,
}

/// A row of `containers`. Fields are its columns.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ContainerRow {
    id: Uuid,
    bot_id: Uuid,
    container_id: String,
    container_name: String,
    image: String,
    status: &'static str,
    namespace: String,
    auto_start: bool,
    container_path: String,
    created_at: Timestamp,
    updated_at: Timestamp,
    last_started_at: Option<Timestamp>,
    last_stopped_at: Option<Timestamp>,
    pub(super) object_uid: Option<Uuid>,
    object_namespace: String,
    object_name: String,
    object_bot_id: String,
    runtime_container_id: Option<String>,
    node_name: Option<String>,
    image_digest: Option<String>,
    phase: Option<Phase>,
    ip: Option<String>,
    restart_count: i64,
    last_version: Option<i64>,
    current_version: Option<i64>,
    conditions: Vec<Condition>,
    generation: Option<i64>,
    observed_generation: Option<i64>,
    pub(super) resource_version: Option<i64>,
    snapshot_count: usize,
    first_seq: i64,
    pub(super) last_seq: i64,
    pub(super) children_hash: i64,
    pub(super) hash: i64,
}

/// A row of `snapshots`. Fields are its columns.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SnapshotRow {
    id: Uuid,
    container_id: String,
    runtime_snapshot_name: String,
    display_name: String,
    parent_runtime_snapshot_name: Option<String>,
    snapshotter: String,
    source: &'static str,
    created_at: Timestamp,
    object_namespace: String,
    object_name: String,
    node_name: Option<String>,
    image: Option<String>,
    image_digest: Option<String>,
    digest: Option<String>,
    size_bytes: Option<i64>,
    files: Option<i64>,
    frozen_millis: Option<i64>,
    taken: Option<Taken>,
    ready_at: Option<Timestamp>,
    conditions: Vec<Condition>,
    generation: Option<i64>,
    resource_version: Option<i64>,
    hash: i64,
}

/// A row of `container_versions`. Fields are its columns.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VersionRow {
    pub(super) id: Uuid,
    container_id: String,
    pub(super) snapshot_id: Uuid,
    version: i32,
    created_at: Timestamp,
}

/// A row of `lifecycle_events`. Fields are its columns.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EventRow {
    /// Computed from all that tells it from others: the object, its number, what happened and when.
    pub id: Uuid,
    /// The bot.
    pub container_id: String,
    /// What happened.
    pub event_type: String,
    /// More of it.
    pub payload: Value,
    /// When.
    pub created_at: Timestamp,
    /// The object that tells of it.
    pub object_uid: Uuid,
    /// Its number in that object.
    pub seq: i64,
    /// The last number that it stands for: another one only where it says that some were lost.
    pub last_seq: i64,
}

impl EventRow {
    fn new(container_id: &str, object_uid: Uuid, seq: i64, type_: &str, at: Timestamp, payload: Value) -> Self {
        Self {
            id: derive(&format!("event {object_uid} {seq} {type_} {at}")),
            container_id: container_id.to_owned(),
            event_type: type_.to_owned(),
            payload,
            created_at: at,
            object_uid,
            seq,
            last_seq: seq,
        }
    }

    /// That nobody saw what had the numbers `first` to `last`.
    pub fn lost(container_id: &str, object_uid: Uuid, first: i64, last: i64, at: Timestamp) -> Self {
        let payload = json!({"count": last - first + 1, "firstSeq": first, "lastSeq": last});
        Self { last_seq: last, ..Self::new(container_id, object_uid, first, "lost", at, payload) }
    }

    /// That an object is gone whose own last word did not arrive.
    pub fn deleted(container_id: &str, object_uid: Uuid, seq: i64, at: Timestamp) -> Self {
        let payload = json!({"message": "found to be gone"});
        let row = Self::new(container_id, object_uid, seq, "deleted", at, payload);
        // Without the time: found again after a lost answer it is the same event.
        Self { id: derive(&format!("event {object_uid} {seq} deleted")), ..row }
    }

    /// What a BotContainer tells, oldest first.
    pub fn told(container_id: &str, object_uid: Uuid, moments: &[Moment]) -> Vec<Self> {
        let row = |moment: &Moment| {
            let mut payload = serde_json::Map::new();
            if let Some(code) = moment.exit_code {
                payload.insert("exitCode".into(), code.into());
            }
            if let Some(version) = moment.version {
                payload.insert("version".into(), version.into());
            }
            if let Some(message) = &moment.message {
                payload.insert("message".into(), message.as_ref().into());
            }
            Self::new(container_id, object_uid, moment.seq, &moment.type_, moment.at, payload.into())
        };
        moments.iter().map(row).collect()
    }
}

/// The rows of a bot.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// The bot's own.
    pub container: ContainerRow,
    /// Its versions.
    pub snapshots: Vec<SnapshotRow>,
    /// Their numbers, in the order of `snapshots`.
    pub versions: Vec<VersionRow>,
    /// That they were made.
    pub snapshot_events: Vec<EventRow>,
    /// What its BotContainer tells.
    pub events: Vec<EventRow>,
}

impl Rows {
    /// Of a bot; `None` when nothing of it is there.
    pub fn of(name: &Name, bot: &Bot) -> Option<Self> {
        let id = container_id(name);
        let mut made: Vec<_> = bot.snapshots.iter().filter_map(|snapshot| version(&id, snapshot)).collect();
        made.sort_by_key(|(snapshot, version, _)| (version.version, snapshot.id));
        // Two of one number can't be, but by hand: the table takes one of them.
        made.dedup_by_key(|(_, version, _)| version.version);
        let mut snapshots = Vec::new();
        let mut versions = Vec::new();
        let mut snapshot_events = Vec::new();
        for (snapshot, version, events) in made {
            snapshots.push(snapshot);
            versions.push(version);
            snapshot_events.extend(events);
        }
        let (mut container, events) = match &bot.container {
            Some((object, tail)) => {
                let uid = uid_of(&object.metadata);
                (living(name, object, uid, tail), EventRow::told(&id, uid, &tail.moments))
            }
            None => {
                let newest = bot.snapshots.iter().filter(|s| is_kept(s)).max_by_key(|s| s.status.as_ref()?.version)?;
                let first = bot.snapshots.iter().filter_map(|s| s.creation_timestamp()).map(|t| t.0).min();
                (kept(name, newest, first.unwrap_or_default()), Vec::new())
            }
        };
        container.snapshot_count = snapshots.len();
        container.first_seq = events.first().map_or(1, |event| event.seq);
        container.last_seq = events.last().map_or(0, |event| event.seq);
        container.children_hash = hash(&(&snapshots, &versions, &snapshot_events));
        container.hash = hash(&(&container, &events));
        Some(Self { container, snapshots, versions, snapshot_events, events })
    }
}

/// The last row of a BotContainer that is gone, and what it told.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Which it was.
    pub uid: Uuid,
    /// Its row.
    pub row: ContainerRow,
    /// What it told, oldest first.
    pub events: Vec<EventRow>,
    /// Whether its layer stays on its node without an object.
    pub orphaned: bool,
}

impl Ended {
    /// Of a bot's BotContainer, as it was seen last.
    pub fn of(name: &Name, uid: Uuid, object: &BotContainer, tail: &Tail) -> Self {
        let mut row = living(name, object, uid, tail);
        row.hash = hash(&row);
        let events = EventRow::told(&row.container_id, uid, &tail.moments);
        Self { uid, row, events, orphaned: tail.orphaned }
    }
}

/// The `container_id` of a bot. Neither part may have a dot in it.
pub fn container_id(bot: &Name) -> String {
    format!("{}.{}", bot.namespace, bot.name)
}

/// The old statuses. `running` is what may be used now; nobody is told so on hearsay.
pub fn status(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending | Phase::Starting => "created",
        Phase::Running => "running",
        Phase::Paused | Phase::Stopping | Phase::Stopped | Phase::Succeeded | Phase::Terminating => "stopped",
        Phase::BackOff | Phase::Failed | Phase::Unknown => "error",
    }
}

fn living(name: &Name, bot: &BotContainer, uid: Uuid, tail: &Tail) -> ContainerRow {
    let status = bot.status.clone().unwrap_or_default();
    let phase = status.phase.unwrap_or(Phase::Pending);
    let created = bot.creation_timestamp().map(|time| time.0).unwrap_or_default();
    let image = status.image.as_ref();
    ContainerRow {
        image: bot.spec.image.clone(),
        status: self::status(phase),
        auto_start: bot.spec.operating_mode == OperatingMode::Running,
        container_path: bot.spec.data.path.clone(),
        updated_at: tail.updated_at.unwrap_or(created),
        last_started_at: tail.started_at,
        last_stopped_at: tail.stopped_at,
        object_uid: Some(uid),
        runtime_container_id: status.container_id,
        node_name: status.node_name,
        image_digest: image.and_then(|image| image.digest.clone()),
        phase: Some(phase),
        ip: status.network.and_then(|network| network.ip),
        restart_count: status.restart_count.unwrap_or(0),
        last_version: status.last_version,
        current_version: status.current_version,
        conditions: status.conditions,
        generation: bot.metadata.generation,
        observed_generation: status.observed_generation,
        resource_version: resource_version(&bot.metadata),
        ..blank(name, &bot.name_any(), created)
    }
}

/// Of a bot of which only versions are left.
fn kept(name: &Name, newest: &BotSnapshot, created: Timestamp) -> ContainerRow {
    let status = newest.status.clone().unwrap_or_default();
    let image = status.image.unwrap_or_default();
    ContainerRow {
        image: image.reference,
        image_digest: image.digest,
        updated_at: status.ready_at.map_or(created, |time| time.0),
        node_name: status.node_name,
        last_version: status.version,
        ..blank(name, &newest.spec.bot_container_name, created)
    }
}

fn blank(name: &Name, object: &str, created: Timestamp) -> ContainerRow {
    let container_id = container_id(name);
    ContainerRow {
        id: derive(&format!("container {container_id}")),
        bot_id: Uuid::parse_str(&name.name).unwrap_or_else(|_| derive(&format!("bot {container_id}"))),
        container_id,
        container_name: object.to_owned(),
        image: String::new(),
        status: "stopped",
        namespace: name.namespace.clone(),
        auto_start: false,
        container_path: DataSpec::default().path,
        created_at: created,
        updated_at: created,
        last_started_at: None,
        last_stopped_at: None,
        object_uid: None,
        object_namespace: name.namespace.clone(),
        object_name: object.to_owned(),
        object_bot_id: name.name.clone(),
        runtime_container_id: None,
        node_name: None,
        image_digest: None,
        phase: None,
        ip: None,
        restart_count: 0,
        last_version: None,
        current_version: None,
        conditions: Vec::new(),
        generation: None,
        observed_generation: None,
        resource_version: None,
        snapshot_count: 0,
        first_seq: 1,
        last_seq: 0,
        children_hash: 0,
        hash: 0,
    }
}

/// Whether a snapshot is a version that can be used.
fn is_kept(snapshot: &BotSnapshot) -> bool {
    snapshot.status.as_ref().is_some_and(|status| {
        status.phase == Some(SnapshotPhase::Ready) && status.version.is_some() && status.runtime_name.is_some()
    })
}

fn version(container_id: &str, snapshot: &BotSnapshot) -> Option<(SnapshotRow, VersionRow, Vec<EventRow>)> {
    let status = snapshot.status.clone().filter(|_| is_kept(snapshot))?;
    let (number, runtime_name) = (status.version?, status.runtime_name?);
    let id = uid_of(&snapshot.metadata);
    let time = |time: Option<Time>| time.map(|time| time.0);
    let ready_at = time(status.ready_at);
    let created_at = time(status.taken_at).or(ready_at).or(time(snapshot.creation_timestamp())).unwrap_or_default();
    let source = status.source.unwrap_or_default();
    let image = status.image.unwrap_or_default();
    let mut row = SnapshotRow {
        id,
        container_id: container_id.to_owned(),
        runtime_snapshot_name: runtime_name,
        display_name: snapshot.spec.display_name.clone().unwrap_or_else(|| format!("Version {number}")),
        parent_runtime_snapshot_name: status.parent,
        snapshotter: status.snapshotter.unwrap_or_default(),
        source: source_word(source),
        created_at,
        object_namespace: snapshot.namespace().unwrap_or_default(),
        object_name: snapshot.name_any(),
        node_name: status.node_name,
        image: Some(image.reference).filter(|reference| !reference.is_empty()),
        image_digest: image.digest,
        digest: status.digest,
        size_bytes: status.size_bytes,
        files: status.files,
        frozen_millis: status.frozen_millis,
        taken: status.taken,
        ready_at,
        conditions: status.conditions,
        generation: snapshot.metadata.generation,
        resource_version: resource_version(&snapshot.metadata),
        hash: 0,
    };
    row.hash = hash(&row);
    let version = VersionRow {
        id: derive(&format!("version {id}")),
        container_id: container_id.to_owned(),
        snapshot_id: id,
        version: i32::try_from(number).unwrap_or(i32::MAX),
        created_at,
    };
    let payload = json!({"version": number, "source": row.source, "snapshotName": row.object_name, "displayName": row.display_name});
    let event = |seq, type_| EventRow::new(container_id, id, seq, type_, created_at, payload.clone());
    let mut events = vec![event(1, "snapshot_create")];
    if source == SnapshotSource::Preserved {
        events.push(event(2, "preserved"));
    }
    Some((row, version, events))
}

/// The old system's word for who asked for a snapshot, and its like for the causes that it did not have.
fn source_word(source: SnapshotSource) -> &'static str {
    match source {
        SnapshotSource::Manual => "manual",
        SnapshotSource::PreExec => "pre_exec",
        SnapshotSource::Rollback => "rollback",
        SnapshotSource::PreImageChange => "pre_image_change",
        SnapshotSource::Preserved => "preserved",
        SnapshotSource::Scheduled => "scheduled",
    }
}

/// An object's uid. The API server gives UUIDs; of anything else one is derived.
pub fn uid_of(metadata: &ObjectMeta) -> Uuid {
    let uid = metadata.uid.as_deref().unwrap_or_default();
    Uuid::parse_str(uid).unwrap_or_else(|_| derive(&format!("uid {uid}")))
}

/// A UUID that is always the same for the same words (RFC 9562, version 5).
fn derive(words: &str) -> Uuid {
    Uuid::new_v5(&Uuid::new_v5(&Uuid::NAMESPACE_DNS, b"berth.dev"), words.as_bytes())
}

fn hash(rows: &impl Serialize) -> i64 {
    let digest = Sha256::new_with_prefix(EPOCH).chain_update(to_json(rows)).finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    i64::from_be_bytes(first)
}

/// Rows as the JSON that PostgreSQL takes: it has no NUL, neither in `text` nor in `jsonb`; U+FFFD stands for it.
pub fn to_json(rows: &impl Serialize) -> String {
    fn clean(value: &mut Value) {
        match value {
            Value::String(text) => *text = text.replace('\0', "\u{fffd}"),
            Value::Array(items) => items.iter_mut().for_each(clean),
            Value::Object(fields) => fields.values_mut().for_each(clean),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    // Structs, strings and numbers: nothing that JSON can't say.
    let json = serde_json::to_string(rows).unwrap_or_default();
    if !json.contains("\\u0000") {
        return json;
    }
    let mut value: Value = serde_json::from_str(&json).unwrap_or_default();
    clean(&mut value);
    value.to_string()
}

#[cfg(test)]
mod tests;
