//! Names and labels of everything that the agent makes in containerd. A name is computed from the bot's uid, so that it
//! is found again after a crash; a label says whose it is to whoever looks with `ctr`.

use std::collections::HashMap;

use jiff::Timestamp;

use crate::api::ids::ContainerId;

use super::desired::Desired;

/// The BotContainer's uid.
pub const UID: &str = "berth.dev/uid";
/// The BotContainer's namespace.
pub const NAMESPACE: &str = "berth.dev/namespace";
/// The BotContainer's name.
pub const NAME: &str = "berth.dev/name";
/// The botId.
pub const BOT_ID: &str = "berth.dev/bot-id";
/// Hash of what a container's OCI spec was made from.
pub const SPEC_HASH: &str = "berth.dev/spec-hash";
/// On a layer: normalised reference of the image that it stands on.
pub const IMAGE: &str = "berth.dev/image";
/// On a layer: digest that the reference was resolved to.
pub const IMAGE_DIGEST: &str = "berth.dev/image-digest";
/// Keeps the collector away, whatever else happens to the object's container.
pub const GC_ROOT: &str = "containerd.io/gc.root";
/// On a layer: has the collector follow it to the content of its image, whose config is read at each start. It comes and goes with
/// the layer in one write, which a lease beside it would not.
pub const HOLDS: &str = "containerd.io/gc.ref.content.image";

/// containerd takes no label whose key and value have more bytes together.
const MAX_LABEL: usize = 4096;

/// Labels that say whose an object is.
pub fn owner(desired: &Desired) -> HashMap<String, String> {
    [(UID, desired.uid.as_str()), (NAMESPACE, &desired.namespace), (NAME, &desired.name), (BOT_ID, &desired.bot_id)]
        .into_iter()
        .filter(|(key, value)| key.len() + value.len() <= MAX_LABEL)
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// Labels of a bot's layer: whose it is, and which image it stands on. A root for the collector from its first moment on.
pub fn layer(desired: &Desired, image: &str, digest: &str) -> HashMap<String, String> {
    let now = Timestamp::now().to_string();
    let more = [(IMAGE, image), (IMAGE_DIGEST, digest), (HOLDS, digest), (GC_ROOT, &now)];
    let more = more.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
    owner(desired).into_iter().chain(more).collect()
}

/// On a layer: number of the version that it was made from.
pub const VERSION: &str = "berth.dev/version";
/// On a layer that is being filled: not to be started from. Empty: filled.
pub const FILLING: &str = "berth.dev/filling";
/// On a version: uid of its BotSnapshot.
pub const SNAPSHOT_UID: &str = "berth.dev/snapshot-uid";
/// On a version: name of its BotSnapshot.
pub const SNAPSHOT: &str = "berth.dev/snapshot";
/// On a version that never had a BotSnapshot, since its namespace was being deleted: when it was left. Its [`SNAPSHOT_UID`] is the
/// bot's.
pub const ORPHANED: &str = "berth.dev/orphaned";
/// On a version whose BotSnapshot is gone: forks stand on it.
pub const RELEASED: &str = "berth.dev/released";

/// Key of a bot's first writable layer.
pub fn first_layer(id: &ContainerId) -> String {
    format!("{id}.1")
}

/// Key of the layer that follows on `layer`, as a rollback makes one.
pub fn next_layer(id: &ContainerId, layer: &str) -> String {
    let number = layer_number(id, layer).unwrap_or(1);
    format!("{id}.{}", number.saturating_add(1))
}

/// Number of a bot's layer; `None` for a key that is not one of its layers.
pub fn layer_number(id: &ContainerId, key: &str) -> Option<u64> {
    key.strip_prefix(id.as_str())?.strip_prefix('.')?.parse().ok()
}

/// What every version's name in containerd begins with.
pub const VERSION_PREFIX: &str = "berth-v-";

/// Name in containerd of the version of a BotSnapshot, by uid.
pub fn version(snapshot_uid: &str) -> String {
    format!("{VERSION_PREFIX}{snapshot_uid}")
}

/// Key of the copy that becomes a version.
pub fn copy(snapshot_uid: &str) -> String {
    format!("{VERSION_PREFIX}{snapshot_uid}.copy")
}

/// Key of the view that a diff of a layer is made against.
pub fn below(key: &str) -> String {
    format!("{key}.below")
}
