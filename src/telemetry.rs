//! Logs, metrics and health of each part.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to standard error. `filter` has the syntax of `RUST_LOG`, for example `info,berth=debug`.
pub fn init_logs(format: LogFormat, filter: &str) -> Result<(), BadFilter> {
    let filter = EnvFilter::try_new(filter).map_err(|source| BadFilter { filter: filter.to_owned(), source })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second call (in tests) keeps the first subscriber.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    Ok(())
}

/// A log filter that can't be parsed.
#[derive(Debug, thiserror::Error)]
#[error("log filter {filter:?} can't be parsed; use for example info or info,berth=debug")]
pub struct BadFilter {
    filter: String,
    source: tracing_subscriber::filter::ParseError,
}

/// What `/readyz`, `/drained` and `/metrics` answer from.
#[derive(Clone, Debug)]
pub struct Health {
    ready: Arc<AtomicBool>,
    drained: Arc<AtomicBool>,
    registry: Arc<Registry>,
}

impl Health {
    /// Not ready yet, with the metrics of `registry`.
    pub fn new(registry: Registry) -> Self {
        Self { ready: Arc::default(), drained: Arc::default(), registry: Arc::new(registry) }
    }

    /// Ready means: the first lists are done and work can be taken.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Drained means: the node is being drained, and no bot of it has a process. An agent alone ever is.
    pub fn set_drained(&self, drained: bool) {
        self.drained.store(drained, Ordering::Release);
    }

    /// Serves `/healthz`, `/readyz`, `/drained` and `/metrics` until `stop`.
    pub async fn serve(self, address: SocketAddr, stop: CancellationToken) -> Result<(), ServeFailed> {
        let router = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/drained", get(drained))
            .route("/metrics", get(metrics))
            .with_state(self);
        let failed = |source| ServeFailed { address, source };
        let listener = tokio::net::TcpListener::bind(address).await.map_err(failed)?;
        tracing::info!(address = %listener.local_addr().map_err(failed)?, "serving /healthz, /readyz and /metrics");
        axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await.map_err(failed)
    }
}

/// The health endpoint could not be served.
#[derive(Debug, thiserror::Error)]
#[error("can't serve health and metrics on {address}; free the port or set --health-address")]
pub struct ServeFailed {
    address: SocketAddr,
    source: std::io::Error,
}

async fn readyz(State(health): State<Health>) -> impl IntoResponse {
    if health.ready.load(Ordering::Acquire) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready: the first lists are not done\n")
    }
}

async fn drained(State(health): State<Health>) -> impl IntoResponse {
    if health.drained.load(Ordering::Acquire) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not drained: bots of this node are to run, or have not stopped\n")
    }
}

async fn metrics(State(health): State<Health>) -> impl IntoResponse {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &health.registry) {
        Ok(()) => (
            StatusCode::OK,
            [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")],
            text,
        )
            .into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics can't be encoded: {error}\n")).into_response()
        }
    }
}
