//! Secrets and ConfigMaps that a bot's spec names: read at each start, never kept, never logged.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, Client};

use crate::api::BotContainerSpec;

/// What kind of object a reference is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A Secret.
    Secret,
    /// A ConfigMap.
    ConfigMap,
}

/// The data of the objects that a spec names; an object that does not exist has no entry.
#[derive(Clone, Default)]
pub struct References {
    data: BTreeMap<(Kind, String), BTreeMap<String, Vec<u8>>>,
}

/// An object that a spec names could not be read.
#[derive(Debug, thiserror::Error)]
#[error("can't read {kind:?} {namespace}/{name}, which the bot's spec names")]
pub struct ReadFailed {
    kind: Kind,
    namespace: String,
    name: String,
    source: Box<kube::Error>,
}

impl References {
    /// Reads all that `spec` names, each object once.
    pub async fn read(client: &Client, namespace: &str, spec: &BotContainerSpec) -> Result<Self, ReadFailed> {
        Self::fetch(client, namespace, names(spec)).await
    }

    /// Reads the Secrets that `spec.imagePullSecrets` names.
    pub async fn read_pull_secrets(
        client: &Client,
        namespace: &str,
        spec: &BotContainerSpec,
    ) -> Result<Self, ReadFailed> {
        let names = spec.image_pull_secrets.iter().map(|secret| (Kind::Secret, secret.name.clone())).collect();
        Self::fetch(client, namespace, names).await
    }

    async fn fetch(client: &Client, namespace: &str, names: BTreeSet<(Kind, String)>) -> Result<Self, ReadFailed> {
        let mut data = BTreeMap::new();
        for (kind, name) in names {
            let failed = |source| ReadFailed {
                kind,
                namespace: namespace.to_owned(),
                name: name.clone(),
                source: Box::new(source),
            };
            let found = match kind {
                Kind::Secret => {
                    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
                    api.get_opt(&name).await.map_err(failed)?.map(|secret| {
                        secret.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect()
                    })
                }
                Kind::ConfigMap => {
                    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
                    api.get_opt(&name).await.map_err(failed)?.map(|map| {
                        let text =
                            map.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.into_bytes()));
                        let binary = map.binary_data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0));
                        text.chain(binary).collect()
                    })
                }
            };
            if let Some(found) = found {
                data.insert((kind, name), found);
            }
        }
        Ok(Self { data })
    }

    /// The data of one object; `None` when it does not exist.
    pub fn get(&self, kind: Kind, name: &str) -> Option<&BTreeMap<String, Vec<u8>>> {
        self.data.get(&(kind, name.to_owned()))
    }
}

/// Every object that the process needs. Pull secrets are not among them: they are for the pull alone.
fn names(spec: &BotContainerSpec) -> BTreeSet<(Kind, String)> {
    let mut names = BTreeSet::new();
    for variable in &spec.env {
        let Some(from) = &variable.value_from else { continue };
        names.extend(from.secret_key_ref.as_ref().map(|key| (Kind::Secret, key.name.clone())));
        names.extend(from.config_map_key_ref.as_ref().map(|key| (Kind::ConfigMap, key.name.clone())));
    }
    for from in &spec.env_from {
        names.extend(from.secret_ref.as_ref().map(|secret| (Kind::Secret, secret.name.clone())));
        names.extend(from.config_map_ref.as_ref().map(|map| (Kind::ConfigMap, map.name.clone())));
    }
    for file in &spec.files {
        names.extend(file.secret_key_ref.as_ref().map(|key| (Kind::Secret, key.name.clone())));
        names.extend(file.config_map_key_ref.as_ref().map(|key| (Kind::ConfigMap, key.name.clone())));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_object_is_named_once_and_pull_secrets_are_not() {
        let spec: BotContainerSpec = serde_json::from_value(serde_json::json!({
            "image": "nginx",
            "imagePullSecrets": [{"name": "registry"}],
            "env": [
                {"name": "A", "valueFrom": {"secretKeyRef": {"name": "bot", "key": "a"}}},
                {"name": "B", "valueFrom": {"secretKeyRef": {"name": "bot", "key": "b"}}},
                {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            ],
            "envFrom": [{"configMapRef": {"name": "common"}}],
            "files": [{"path": "/etc/x", "secretKeyRef": {"name": "other", "key": "x"}}],
        }))
        .unwrap();
        let names: Vec<_> = names(&spec).into_iter().collect();
        assert_eq!(
            names,
            [
                (Kind::Secret, "bot".to_owned()),
                (Kind::Secret, "other".to_owned()),
                (Kind::ConfigMap, "common".to_owned())
            ]
        );
    }
}
