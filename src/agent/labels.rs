//! Names and labels of everything that the agent makes in containerd. A name is computed from the bot's uid, so that it
//! is found again after a crash; a label says whose it is to whoever looks with `ctr`.

use std::collections::HashMap;

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
/// Keeps the collector away, whatever else happens to the object's lease or container.
pub const GC_ROOT: &str = "containerd.io/gc.root";

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

/// Key of a bot's first writable layer.
pub fn first_layer(id: &ContainerId) -> String {
    format!("{id}.1")
}
