//! The way to the API server: no call waits for ever.
//!
//! kube's own client has no limit on an answer, and a server that is stopped or behind a cut network sends none, nor an
//! error: whoever asked it waits as long as TCP does, a quarter of an hour, and a bot's loop with it.

use std::time::Duration;

use anyhow::Context as _;
use kube::client::ClientBuilder;
use kube::{Client, Config};
use tower::timeout::TimeoutLayer;

/// How long the server may take to begin its answer, the client's own repetitions of 429, 503 and 504 included. A watch
/// begins its answer at once, and may then be silent for as long as nothing happens.
pub const ANSWER: Duration = Duration::from_secs(15);

/// How long a begun answer may bring nothing: twice as long as between two bookmarks of a watch.
const SILENCE: Duration = Duration::from_secs(120);

/// The way to the cluster of `KUBECONFIG`, or to the one that this process runs in.
pub async fn config() -> anyhow::Result<Config> {
    Config::infer().await.context("no way to a cluster; set KUBECONFIG, or run in a Pod")
}

/// A client. HTTP/1.1 alone is spoken, so a call that is given up takes its connection along, and the next one does not wait
/// on a dead one.
pub fn client(mut config: Config) -> anyhow::Result<Client> {
    config.read_timeout = Some(SILENCE);
    // What counts is the time since the question, not since the connection was last used.
    config.reset_reader_on_write = true;
    let builder = ClientBuilder::try_from(config).context("can't make a client of the cluster's configuration")?;
    Ok(builder.with_layer(&TimeoutLayer::new(ANSWER)).build())
}
