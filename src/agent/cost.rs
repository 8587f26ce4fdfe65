//! What a change of each spec field costs: one table, read by the plan (through the hash), the docs and the tests.

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::api::BotContainerSpec;

/// What a change of a field costs the bot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// Nothing at all happens to the process.
    Nothing,
    /// Applied to the running process.
    Live,
    /// The process starts again on the same layer, with the same address.
    Restart,
    /// A new layer on the new image, the data carried over.
    NewLayer,
    /// The API server refuses the change, always or once the bot is placed.
    Refused,
}

/// Every field of BotContainer's spec, by its name in JSON, with what a change of it costs.
pub const FIELDS: &[(&str, Cost)] = &[
    ("args", Cost::Restart),
    ("botId", Cost::Refused),
    ("command", Cost::Restart),
    ("data", Cost::Refused),
    ("deletionPolicy", Cost::Nothing),
    ("dnsConfig", Cost::Restart),
    ("dnsPolicy", Cost::Restart),
    ("env", Cost::Restart),
    ("envFrom", Cost::Restart),
    ("files", Cost::Restart),
    ("image", Cost::NewLayer),
    ("imagePullPolicy", Cost::Nothing),
    ("imagePullSecrets", Cost::Nothing),
    ("network", Cost::Restart),
    ("nodeName", Cost::Refused),
    ("nodeSelector", Cost::Refused),
    ("operatingMode", Cost::Live),
    ("resources", Cost::Live),
    ("restartPolicy", Cost::Nothing),
    ("restartedAt", Cost::Restart),
    ("restoreFrom", Cost::Refused),
    ("restorePolicy", Cost::Nothing),
    ("rollback", Cost::Nothing),
    ("runtimeClassName", Cost::Refused),
    ("securityContext", Cost::Restart),
    ("skills", Cost::Nothing),
    ("snapshotPolicy", Cost::Nothing),
    ("snapshotter", Cost::Refused),
    ("terminationGracePeriodSeconds", Cost::Nothing),
    ("timezone", Cost::Restart),
    ("tolerations", Cost::Refused),
    ("workingDir", Cost::Restart),
];

/// Hash of all that needs a restart of the process when it changes. References to Secrets count, their values do not:
/// no Secret value enters a hash. Nor does `restartedAt`: only a new value of it restarts, and to take it away is none.
pub fn restart_hash(spec: &BotContainerSpec) -> String {
    let mut hash = Sha256::new();
    // A spec that came from JSON goes back to JSON; serde_json's maps are sorted, so the text is canonical.
    if let Ok(Value::Object(fields)) = serde_json::to_value(spec) {
        for (name, _) in FIELDS.iter().filter(|(name, cost)| *cost == Cost::Restart && *name != "restartedAt") {
            if let Some(value) = fields.get(*name) {
                hash.update(name.as_bytes());
                hash.update(b"=");
                hash.update(value.to_string().as_bytes());
                hash.update(b"\n");
            }
        }
    }
    let digest = hash.finalize();
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::BotContainer;
    use kube::CustomResourceExt;
    use std::collections::BTreeSet;

    fn spec(json: Value) -> BotContainerSpec {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_table_has_every_field_once() {
        let crd = serde_json::to_value(BotContainer::crd()).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
        let schema: BTreeSet<&str> = schema.as_object().unwrap().keys().map(String::as_str).collect();
        let table: BTreeSet<&str> = FIELDS.iter().map(|(name, _)| *name).collect();
        assert_eq!(table, schema);
        assert_eq!(table.len(), FIELDS.len(), "a field stands twice in the table");
    }

    #[test]
    fn only_what_needs_a_restart_changes_the_hash() {
        let base = spec(serde_json::json!({"image": "nginx"}));
        let hash = restart_hash(&base);
        for same in [
            serde_json::json!({"image": "nginx:2"}),
            serde_json::json!({"image": "nginx", "operatingMode": "Paused"}),
            serde_json::json!({"image": "nginx", "resources": {"limits": {"cpu": "1"}}}),
            serde_json::json!({"image": "nginx", "deletionPolicy": "Retain"}),
            serde_json::json!({"image": "nginx", "restartedAt": "2026-11-24T10:00:00Z"}),
        ] {
            assert_eq!(restart_hash(&spec(same.clone())), hash, "{same}");
        }
        for other in [
            serde_json::json!({"image": "nginx", "command": ["x"]}),
            serde_json::json!({"image": "nginx", "args": ["x"]}),
            serde_json::json!({"image": "nginx", "env": [{"name": "A", "value": "b"}]}),
            serde_json::json!({"image": "nginx", "network": {"mode": "Host"}}),
        ] {
            assert_ne!(restart_hash(&spec(other.clone())), hash, "{other}");
        }
    }
}
