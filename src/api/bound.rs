//! How long, how many, how large: one line for each string, list and map of the schemas.
//!
//! The API server itself refuses what is beyond a bound, names the field and says the limit. A walker test proves that no
//! string, list or map of any kind is left without one: etcd takes objects up to 1.5 MiB, and what the CEL rules may cost
//! is computed from these numbers before a CRD is accepted. Where a Pod has a limit of its own it is that one.
//!
//! What is bounded item by item but could be too much in all (`env`, `args`, `files`, `skills`) has a CEL rule for its sum
//! in [`super::rule`].

use super::rule::Kind;

/// The limits of one field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Characters of a string.
    Text(i64),
    /// Items of a list, and how server-side apply merges it.
    List(i64, Merge),
    /// Entries of a map; each manager owns its own entries.
    Map(i64),
    /// Entries of a map that is replaced as a whole.
    Whole(i64),
    /// An object that is replaced as a whole, as core types have it for a reference.
    Reference,
    /// A time in RFC 3339 that our own types can read: the format alone lets in a comma, picoseconds and the year 9999 at
    /// an offset, and one object that can't be read stops every watch of its kind.
    Time,
    /// The same where people write it: a CEL rule says so in better words than a pattern's.
    TimeText,
    /// Smallest and largest number.
    Number(i64, i64),
}

/// The longest time: 9 digits after the seconds, an offset, and some to spare.
pub const TIME_LENGTH: i64 = 40;

/// RFC 3339 in capitals, to the nanosecond, up to the year 8999. RE2.
pub const TIME: &str = "^[0-8][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$";

/// How server-side apply merges a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// As a whole.
    Atomic,
    /// Entry by entry, told apart by this field: the same key twice is refused.
    By(&'static str),
}

/// A field and its limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// The kind that has the field.
    pub kind: Kind,
    /// Path in the schema: `[]` goes to a list's item, `{}` to a map's value.
    pub at: &'static str,
    /// Its limits.
    pub limit: Limit,
}

use Kind::{BotContainer as Bot, BotNode as Node, BotRecord as Record, BotSnapshot as Snap};
use Limit::{List, Map, Number, Reference, Text, Time, TimeText, Whole};
use Merge::{Atomic, By};

/// A DNS label: RFC 1123.
const LABEL: Limit = Text(63);
/// A DNS subdomain, as object names are: RFC 1123.
const NAME: Limit = Text(253);
/// An image reference. Distribution allows 255 for the name, 128 for the tag, 71 for a sha256 and more for others.
const IMAGE: Limit = Text(512);
/// A path; Linux takes 4,095 bytes, and nothing sensible needs as much.
const PATH: Limit = Text(1024);
/// One word: a version, a kind, an address.
const WORD: Limit = Text(128);
/// A quantity where it is text; it may be a number too.
const QUANTITY: Limit = Text(64);
/// A qualified name: a DNS subdomain, a slash, 63 characters.
const QUALIFIED: Limit = Text(317);
/// One argument or value. Linux takes 128 KiB for each.
const VALUE: Limit = Text(32_768);

const fn bound(kind: Kind, at: &'static str, limit: Limit) -> Bound {
    Bound { kind, at, limit }
}

/// Every bound. The walker test tells which field has none.
pub const BOUNDS: &[Bound] = &[
    // BotContainer: what is asked.
    bound(Bot, "spec.botId", LABEL),
    bound(Bot, "spec.image", IMAGE),
    bound(Bot, "spec.imagePullSecrets", List(16, By("name"))),
    bound(Bot, "spec.imagePullSecrets[]", Reference),
    bound(Bot, "spec.imagePullSecrets[].name", NAME),
    bound(Bot, "spec.command", List(256, Atomic)),
    bound(Bot, "spec.command[]", VALUE),
    bound(Bot, "spec.args", List(256, Atomic)),
    bound(Bot, "spec.args[]", VALUE),
    bound(Bot, "spec.workingDir", PATH),
    bound(Bot, "spec.env", List(256, By("name"))),
    bound(Bot, "spec.env[].name", Text(256)),
    bound(Bot, "spec.env[].value", VALUE),
    bound(Bot, "spec.env[].valueFrom.configMapKeyRef", Reference),
    bound(Bot, "spec.env[].valueFrom.configMapKeyRef.name", NAME),
    bound(Bot, "spec.env[].valueFrom.configMapKeyRef.key", NAME),
    bound(Bot, "spec.env[].valueFrom.secretKeyRef", Reference),
    bound(Bot, "spec.env[].valueFrom.secretKeyRef.name", NAME),
    bound(Bot, "spec.env[].valueFrom.secretKeyRef.key", NAME),
    bound(Bot, "spec.env[].valueFrom.fieldRef", Reference),
    bound(Bot, "spec.env[].valueFrom.fieldRef.apiVersion", WORD),
    bound(Bot, "spec.env[].valueFrom.fieldRef.fieldPath", Text(512)),
    bound(Bot, "spec.env[].valueFrom.fileKeyRef", Reference),
    bound(Bot, "spec.env[].valueFrom.fileKeyRef.key", NAME),
    bound(Bot, "spec.env[].valueFrom.fileKeyRef.path", PATH),
    bound(Bot, "spec.env[].valueFrom.fileKeyRef.volumeName", NAME),
    bound(Bot, "spec.env[].valueFrom.resourceFieldRef", Reference),
    bound(Bot, "spec.env[].valueFrom.resourceFieldRef.containerName", NAME),
    bound(Bot, "spec.env[].valueFrom.resourceFieldRef.resource", WORD),
    bound(Bot, "spec.env[].valueFrom.resourceFieldRef.divisor", QUANTITY),
    bound(Bot, "spec.envFrom", List(64, Atomic)),
    bound(Bot, "spec.envFrom[].prefix", Text(256)),
    bound(Bot, "spec.envFrom[].configMapRef.name", NAME),
    bound(Bot, "spec.envFrom[].secretRef.name", NAME),
    bound(Bot, "spec.terminationGracePeriodSeconds", Number(0, 86_400)),
    bound(Bot, "spec.restartedAt", TimeText),
    bound(Bot, "spec.runtimeClassName", NAME),
    bound(Bot, "spec.snapshotter", Text(76)),
    bound(Bot, "spec.resources.requests", Map(8)),
    bound(Bot, "spec.resources.requests{}", QUANTITY),
    bound(Bot, "spec.resources.limits", Map(8)),
    bound(Bot, "spec.resources.limits{}", QUANTITY),
    bound(Bot, "spec.securityContext.appArmorProfile.type", WORD),
    bound(Bot, "spec.securityContext.appArmorProfile.localhostProfile", Text(4095)),
    bound(Bot, "spec.securityContext.capabilities.add", List(64, Atomic)),
    bound(Bot, "spec.securityContext.capabilities.add[]", WORD),
    bound(Bot, "spec.securityContext.capabilities.drop", List(64, Atomic)),
    bound(Bot, "spec.securityContext.capabilities.drop[]", WORD),
    bound(Bot, "spec.securityContext.procMount", WORD),
    bound(Bot, "spec.securityContext.runAsUser", Number(0, 2_147_483_647)),
    bound(Bot, "spec.securityContext.runAsGroup", Number(0, 2_147_483_647)),
    bound(Bot, "spec.securityContext.seLinuxOptions.level", NAME),
    bound(Bot, "spec.securityContext.seLinuxOptions.role", NAME),
    bound(Bot, "spec.securityContext.seLinuxOptions.type", NAME),
    bound(Bot, "spec.securityContext.seLinuxOptions.user", NAME),
    bound(Bot, "spec.securityContext.seccompProfile.type", WORD),
    bound(Bot, "spec.securityContext.seccompProfile.localhostProfile", PATH),
    bound(Bot, "spec.securityContext.windowsOptions.gmsaCredentialSpec", NAME),
    bound(Bot, "spec.securityContext.windowsOptions.gmsaCredentialSpecName", NAME),
    bound(Bot, "spec.securityContext.windowsOptions.runAsUserName", NAME),
    bound(Bot, "spec.nodeName", NAME),
    bound(Bot, "spec.nodeSelector", Whole(64)),
    bound(Bot, "spec.nodeSelector{}", LABEL),
    bound(Bot, "spec.tolerations", List(64, Atomic)),
    bound(Bot, "spec.tolerations[].key", QUALIFIED),
    bound(Bot, "spec.tolerations[].operator", WORD),
    bound(Bot, "spec.tolerations[].value", LABEL),
    bound(Bot, "spec.tolerations[].effect", WORD),
    bound(Bot, "spec.network.hostname", LABEL),
    bound(Bot, "spec.dnsConfig.nameservers", List(3, Atomic)),
    bound(Bot, "spec.dnsConfig.nameservers[]", LABEL),
    bound(Bot, "spec.dnsConfig.searches", List(32, Atomic)),
    bound(Bot, "spec.dnsConfig.searches[]", Text(254)),
    bound(Bot, "spec.dnsConfig.options", List(32, Atomic)),
    bound(Bot, "spec.dnsConfig.options[].name", WORD),
    bound(Bot, "spec.dnsConfig.options[].value", WORD),
    bound(Bot, "spec.timezone", LABEL),
    bound(Bot, "spec.data.path", PATH),
    bound(Bot, "spec.restoreFrom.snapshotName", NAME),
    bound(Bot, "spec.rollback.id", NAME),
    bound(Bot, "spec.rollback.toVersion", Number(1, i64::MAX)),
    bound(Bot, "spec.rollback.snapshotName", NAME),
    bound(Bot, "spec.snapshotPolicy.schedule", Text(256)),
    bound(Bot, "spec.snapshotPolicy.timeZone", LABEL),
    bound(Bot, "spec.snapshotPolicy.keepLast", Number(1, 1000)),
    bound(Bot, "spec.skills", List(64, By("name"))),
    bound(Bot, "spec.skills[].name", LABEL),
    bound(Bot, "spec.skills[].description", Text(1024)),
    bound(Bot, "spec.skills[].metadata", Map(32)),
    bound(Bot, "spec.skills[].metadata{}", Text(1024)),
    bound(Bot, "spec.skills[].content", Text(131_072)),
    bound(Bot, "spec.files", List(64, By("path"))),
    bound(Bot, "spec.files[].path", PATH),
    bound(Bot, "spec.files[].mode", Number(0, 0o777)),
    bound(Bot, "spec.files[].content", Text(131_072)),
    bound(Bot, "spec.files[].secretKeyRef", Reference),
    bound(Bot, "spec.files[].secretKeyRef.name", NAME),
    bound(Bot, "spec.files[].secretKeyRef.key", NAME),
    bound(Bot, "spec.files[].configMapKeyRef", Reference),
    bound(Bot, "spec.files[].configMapKeyRef.name", NAME),
    bound(Bot, "spec.files[].configMapKeyRef.key", NAME),
    // BotContainer: what was observed.
    bound(Bot, "status.botId", LABEL),
    bound(Bot, "status.nodeName", NAME),
    bound(Bot, "status.containerId", WORD),
    bound(Bot, "status.image.reference", IMAGE),
    bound(Bot, "status.image.digest", Text(256)),
    bound(Bot, "status.task.startedAt", Time),
    bound(Bot, "status.lastTermination.reason", WORD),
    bound(Bot, "status.lastTermination.message", Text(4096)),
    bound(Bot, "status.lastTermination.startedAt", Time),
    bound(Bot, "status.lastTermination.finishedAt", Time),
    bound(Bot, "status.network.ip", LABEL),
    bound(Bot, "status.network.ips", List(16, Atomic)),
    bound(Bot, "status.network.ips[]", LABEL),
    bound(Bot, "status.resources.requests", Map(8)),
    bound(Bot, "status.resources.requests{}", QUANTITY),
    bound(Bot, "status.resources.limits", Map(8)),
    bound(Bot, "status.resources.limits{}", QUANTITY),
    bound(Bot, "status.rollback.id", NAME),
    bound(Bot, "status.rollback.completedAt", Time),
    bound(Bot, "status.restoredFrom.snapshotName", NAME),
    bound(Bot, "status.restoredFrom.uid", WORD),
    bound(Bot, "status.restoredFrom.botId", LABEL),
    bound(Bot, "status.lineage", List(256, Atomic)),
    bound(Bot, "status.lineage[].name", Text(256)),
    bound(Bot, "status.lineage[].parent", Text(256)),
    bound(Bot, "status.lineage[].kind", WORD),
    bound(Bot, "status.lineage[].createdAt", Time),
    // 32 are kept; while two managers own some, a few more must fit, or the second one's apply is refused.
    bound(Bot, "status.transitions", List(64, By("seq"))),
    bound(Bot, "status.transitions[].type", WORD),
    bound(Bot, "status.transitions[].at", Time),
    bound(Bot, "status.transitions[].message", Text(1024)),
    bound(Bot, "status.conditions", List(32, By("type"))),
    bound(Bot, "status.conditions[].type", Text(316)),
    bound(Bot, "status.conditions[].status", WORD),
    bound(Bot, "status.conditions[].reason", Text(1024)),
    bound(Bot, "status.conditions[].message", Text(32_768)),
    bound(Bot, "status.conditions[].lastTransitionTime", Time),
    // BotSnapshot.
    bound(Snap, "spec.botContainerName", NAME),
    bound(Snap, "spec.displayName", NAME),
    bound(Snap, "spec.maxFreezeMillis", Number(1, 60_000)),
    bound(Snap, "spec.failureDeadlineSeconds", Number(1, 86_400)),
    bound(Snap, "status.botId", LABEL),
    bound(Snap, "status.botUid", WORD),
    bound(Snap, "status.nodeName", NAME),
    bound(Snap, "status.runtimeName", Text(256)),
    bound(Snap, "status.parent", Text(256)),
    bound(Snap, "status.snapshotter", Text(76)),
    bound(Snap, "status.image.reference", IMAGE),
    bound(Snap, "status.image.digest", Text(256)),
    bound(Snap, "status.digest", Text(256)),
    bound(Snap, "status.changes.paths", List(100, Atomic)),
    bound(Snap, "status.changes.paths[].path", Text(4096)),
    bound(Snap, "status.takenAt", Time),
    bound(Snap, "status.readyAt", Time),
    bound(Snap, "status.conditions", List(32, By("type"))),
    bound(Snap, "status.conditions[].type", Text(316)),
    bound(Snap, "status.conditions[].status", WORD),
    bound(Snap, "status.conditions[].reason", Text(1024)),
    bound(Snap, "status.conditions[].message", Text(32_768)),
    bound(Snap, "status.conditions[].lastTransitionTime", Time),
    // BotRecord.
    bound(Record, "spec.botId", LABEL),
    bound(Record, "spec.holder", Reference),
    bound(Record, "spec.holder.name", NAME),
    bound(Record, "spec.holder.uid", WORD),
    bound(Record, "spec.nodeName", NAME),
    bound(Record, "spec.lastVersion", Number(0, i64::MAX)),
    bound(Record, "spec.lastGiven", Reference),
    bound(Record, "spec.lastGiven.name", NAME),
    bound(Record, "spec.lastGiven.uid", WORD),
    bound(Record, "spec.lastScheduled", WORD),
    bound(Record, "spec.lastRollbackId", NAME),
    // BotNode.
    bound(Node, "spec.botCIDR", LABEL),
    bound(Node, "status.versions.berth", WORD),
    bound(Node, "status.versions.containerd", WORD),
    bound(Node, "status.versions.runc", WORD),
    bound(Node, "status.versions.kernel", WORD),
    bound(Node, "status.versions.cgroup", WORD),
    bound(Node, "status.snapshotters", List(64, Atomic)),
    bound(Node, "status.snapshotters[]", Text(76)),
    bound(Node, "status.runtimeHandlers", List(64, Atomic)),
    bound(Node, "status.runtimeHandlers[]", NAME),
    bound(Node, "status.capacity", Map(64)),
    bound(Node, "status.capacity{}", QUANTITY),
    bound(Node, "status.allocatable", Map(64)),
    bound(Node, "status.allocatable{}", QUANTITY),
    bound(Node, "status.addresses", List(32, Atomic)),
    bound(Node, "status.addresses[].type", WORD),
    bound(Node, "status.addresses[].address", NAME),
    bound(Node, "spec.adopt", List(64, By("orphan"))),
    bound(Node, "spec.adopt[].orphan", WORD),
    bound(Node, "spec.adopt[].namespace", LABEL),
    bound(Node, "spec.adopt[].snapshotName", NAME),
    bound(Node, "status.orphans", List(256, Atomic)),
    bound(Node, "status.orphans[].name", WORD),
    bound(Node, "status.orphans[].namespace", LABEL),
    bound(Node, "status.orphans[].botContainerName", NAME),
    bound(Node, "status.orphans[].botUid", WORD),
    bound(Node, "status.orphans[].botId", LABEL),
    bound(Node, "status.orphans[].image", IMAGE),
    bound(Node, "status.orphans[].version", Number(1, i64::MAX)),
    bound(Node, "status.orphans[].leftAt", Time),
    bound(Node, "status.orphans[].expiresAt", Time),
    bound(Node, "status.conditions", List(32, By("type"))),
    bound(Node, "status.conditions[].type", Text(316)),
    bound(Node, "status.conditions[].status", WORD),
    bound(Node, "status.conditions[].reason", Text(1024)),
    bound(Node, "status.conditions[].message", Text(32_768)),
    bound(Node, "status.conditions[].lastTransitionTime", Time),
];
