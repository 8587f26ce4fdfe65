//! Secrets and ConfigMaps that a bot's spec names: what its agent reads, and all that it may read.

use std::collections::BTreeSet;

use super::BotContainerSpec;

/// What kind of object is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A Secret.
    Secret,
    /// A ConfigMap.
    ConfigMap,
}

/// Kind and name, in the bot's namespace.
pub type Reference = (Kind, String);

impl BotContainerSpec {
    /// Every object that the process needs, each once. Pull secrets are not among them: they are for the pull alone.
    pub fn references(&self) -> BTreeSet<Reference> {
        let mut names = BTreeSet::new();
        for variable in &self.env {
            let Some(from) = &variable.value_from else { continue };
            names.extend(from.secret_key_ref.as_ref().map(|key| (Kind::Secret, key.name.clone())));
            names.extend(from.config_map_key_ref.as_ref().map(|key| (Kind::ConfigMap, key.name.clone())));
        }
        for from in &self.env_from {
            names.extend(from.secret_ref.as_ref().map(|secret| (Kind::Secret, secret.name.clone())));
            names.extend(from.config_map_ref.as_ref().map(|map| (Kind::ConfigMap, map.name.clone())));
        }
        for file in &self.files {
            names.extend(file.secret_key_ref.as_ref().map(|key| (Kind::Secret, key.name.clone())));
            names.extend(file.config_map_key_ref.as_ref().map(|key| (Kind::ConfigMap, key.name.clone())));
        }
        // Of a required name an empty one says nothing.
        names.retain(|(_, name)| !name.is_empty());
        names
    }

    /// The Secrets that a pull of the image needs.
    pub fn pull_secrets(&self) -> BTreeSet<Reference> {
        let names = self.image_pull_secrets.iter().map(|secret| (Kind::Secret, secret.name.clone()));
        names.filter(|(_, name)| !name.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_object_is_named_once_and_pull_secrets_apart() {
        let spec: BotContainerSpec = serde_json::from_value(serde_json::json!({
            "image": "nginx",
            "imagePullSecrets": [{"name": "registry"}, {}],
            "env": [
                {"name": "A", "valueFrom": {"secretKeyRef": {"name": "bot", "key": "a"}}},
                {"name": "B", "valueFrom": {"secretKeyRef": {"name": "bot", "key": "b"}}},
                {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            ],
            "envFrom": [{"configMapRef": {"name": "common"}}],
            "files": [{"path": "/etc/x", "secretKeyRef": {"name": "other", "key": "x"}}],
        }))
        .unwrap();
        let of = |kind, name: &str| (kind, name.to_owned());
        let references = [of(Kind::Secret, "bot"), of(Kind::Secret, "other"), of(Kind::ConfigMap, "common")];
        assert_eq!(spec.references(), references.into());
        assert_eq!(spec.pull_secrets(), [of(Kind::Secret, "registry")].into());
    }
}
