//! Secrets and ConfigMaps that a bot's spec names: read at each start, never kept, never logged.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;

pub use crate::api::reference::Kind;

use crate::api::BotContainerSpec;
use crate::api::reference::Reference;

use super::account::{Account, AccountError};

/// The data of the objects that a spec names; an object that does not exist has no entry.
#[derive(Clone, Default)]
pub struct References {
    data: BTreeMap<(Kind, String), BTreeMap<String, Vec<u8>>>,
}

/// An object that a spec names could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadFailed {
    /// The API server refused, or gave no answer.
    #[error("can't read {kind:?} {namespace}/{name}, which the bot's spec names")]
    Object {
        /// Of what kind it is.
        kind: Kind,
        /// Where it is.
        namespace: String,
        /// What it is called.
        name: String,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// There is nobody to read it as.
    #[error("can't read what the bot's spec names")]
    Account(#[from] AccountError),
}

/// How long the controller's grant may be on its way when a bot names something new: written, and learned by the API server.
const GRANTS: [Duration; 6] = [
    Duration::from_millis(20),
    Duration::from_millis(80),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

impl References {
    /// Reads all that `spec` names, each object once.
    pub async fn read(account: &Account, namespace: &str, spec: &BotContainerSpec) -> Result<Self, ReadFailed> {
        Self::fetch(account, namespace, spec.references()).await
    }

    /// Reads the Secrets that `spec.imagePullSecrets` names.
    pub async fn read_pull_secrets(
        account: &Account,
        namespace: &str,
        spec: &BotContainerSpec,
    ) -> Result<Self, ReadFailed> {
        Self::fetch(account, namespace, spec.pull_secrets()).await
    }

    async fn fetch(account: &Account, namespace: &str, names: BTreeSet<Reference>) -> Result<Self, ReadFailed> {
        let mut data = BTreeMap::new();
        for (kind, name) in names {
            let mut waits = GRANTS.iter();
            let found = loop {
                match get(account, kind, namespace, &name).await? {
                    Ok(found) => break found,
                    Err(source) => match waits.next() {
                        Some(wait) if is_forbidden(&source) => tokio::time::sleep(*wait).await,
                        _ => {
                            let (namespace, source) = (namespace.to_owned(), Box::new(source));
                            return Err(ReadFailed::Object { kind, namespace, name, source });
                        }
                    },
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

/// The data of one object; `None` when it does not exist.
async fn get(
    account: &Account,
    kind: Kind,
    namespace: &str,
    name: &str,
) -> Result<kube::Result<Option<BTreeMap<String, Vec<u8>>>>, AccountError> {
    let client = account.client().await?;
    let found = match kind {
        Kind::Secret => {
            let found = Api::<Secret>::namespaced(client, namespace).get_opt(name).await;
            found.map(|secret| {
                let data = secret?.data.unwrap_or_default();
                Some(data.into_iter().map(|(key, value)| (key, value.0)).collect())
            })
        }
        Kind::ConfigMap => {
            let found = Api::<ConfigMap>::namespaced(client, namespace).get_opt(name).await;
            found.map(|map| {
                let map = map?;
                let text = map.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.into_bytes()));
                let binary = map.binary_data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0));
                Some(text.chain(binary).collect())
            })
        }
    };
    if let Err(kube::Error::Api(status)) = &found
        && status.code == 401
    {
        account.forget().await;
    }
    Ok(found)
}

fn is_forbidden(error: &kube::Error) -> bool {
    // 401: the account's token ended before its time, with its Node or the server's key; the next one is asked for.
    matches!(error, kube::Error::Api(status) if status.code == 403 || status.code == 401)
}
