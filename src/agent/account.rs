//! The account of this node, by which Secrets and ConfigMaps are read.
//!
//! The agent's own token reads none of them. It may do one thing about that: ask for a token of the ServiceAccount that is named as
//! its node, in the namespace `berth-nodes`; an admission policy compares that name with the node that the agent's token is bound
//! to. The controller lets this account get what bots of this node name, and nothing else (`src/controller/access.rs`).

use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::config::AuthInfo;
use kube::{Api, Client, Config};
use tokio::sync::Mutex;

use crate::api::NODES_NAMESPACE;

/// How long a token is asked for. The policy allows an hour.
const LIFETIME: Duration = Duration::from_secs(3600);

/// When the next one is asked for.
const RENEW: Duration = Duration::from_secs(45 * 60);

/// There is no token of the node's account.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// The API server gave none.
    #[error(
        "no token of ServiceAccount {NODES_NAMESPACE}/{node}; the controller makes that account, and this agent's own token must be bound to Node {node}"
    )]
    Token {
        /// The node.
        node: String,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// What it gave can't be used.
    #[error("no client with a token of ServiceAccount {NODES_NAMESPACE}/{node}")]
    Client {
        /// The node.
        node: String,
        /// Why not.
        source: anyhow::Error,
    },
}

/// Asks for tokens, and keeps one as long as it is good.
pub struct Account {
    node: String,
    own: Client,
    config: Config,
    kept: Mutex<Option<(Client, Instant)>>,
}

impl Account {
    /// Of `node`. `own` is the agent's client, `config` how it reaches the API server. Asks for nothing yet.
    pub fn new(node: String, own: Client, mut config: Config) -> Self {
        config.auth_info = AuthInfo::default();
        Self { node, own, config, kept: Mutex::new(None) }
    }

    /// A client that acts as the account.
    pub async fn client(&self) -> Result<Client, AccountError> {
        // Held over the call: others wait for the same token.
        let mut kept = self.kept.lock().await;
        if let Some((client, until)) = &*kept
            && Instant::now() < *until
        {
            return Ok(client.clone());
        }
        let until = Instant::now() + RENEW;
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                expiration_seconds: Some(LIFETIME.as_secs().cast_signed()),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Node".to_owned()),
                    name: Some(self.node.clone()),
                    uid: None,
                }),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.own.clone(), NODES_NAMESPACE);
        let made = api.create_token_request(&self.node, &PostParams::default(), &request).await;
        let made = made.map_err(|source| AccountError::Token { node: self.node.clone(), source: Box::new(source) })?;
        let mut config = self.config.clone();
        config.auth_info.token = made.status.and_then(|status| status.token).map(Into::into);
        let client =
            crate::client::client(config).map_err(|source| AccountError::Client { node: self.node.clone(), source })?;
        *kept = Some((client.clone(), until));
        Ok(client)
    }

    /// The token was refused: the next call asks for another.
    pub async fn forget(&self) {
        *self.kept.lock().await = None;
    }
}
