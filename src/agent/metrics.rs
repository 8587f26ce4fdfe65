//! What the agent counts.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::api::condition::Reason;

use super::step::Step;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Why {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Call {
    call: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Done {
    step: &'static str,
    ok: &'static str,
}

/// The agent's metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    passes: Family<Why, Counter>,
    errors: Family<Why, Counter>,
    api_errors: Family<Call, Counter>,
    steps: Family<Done, Histogram>,
    /// Bots that have a loop.
    pub bots: Gauge,
}

impl Metrics {
    /// Registers all under the prefix `berth_agent`.
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("berth_agent");
        let buckets = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let metrics = Self {
            passes: Family::default(),
            errors: Family::default(),
            api_errors: Family::default(),
            steps: Family::new_with_constructor(buckets),
            bots: Gauge::default(),
        };
        registry.register("passes", "Looks at a bot, by why it was looked at", metrics.passes.clone());
        registry.register("errors", "Failures, by reason", metrics.errors.clone());
        registry.register("api_errors", "Calls of the API server that failed, by what for", metrics.api_errors.clone());
        registry.register("step_seconds", "Time that steps took", metrics.steps.clone());
        registry.register("bots", "Bots that the agent looks after", metrics.bots.clone());
        metrics
    }

    /// A look, and why.
    pub fn pass(&self, reason: &'static str) {
        self.passes.get_or_create(&Why { reason }).inc();
    }

    /// A failure.
    pub fn error(&self, reason: Reason) {
        self.errors.get_or_create(&Why { reason: reason.as_str() }).inc();
    }

    /// A call of the API server that failed: `status`, `event`, `node`, `list`, `watch`, `watch node`. It is tried again.
    pub fn api_error(&self, call: &'static str) {
        self.api_errors.get_or_create(&Call { call }).inc();
    }

    /// A step of a bot that was done.
    pub fn step(&self, step: Step, took: Duration, ok: bool) {
        self.named_step(step.name(), took, ok);
    }

    /// A step that was done, by its name.
    pub fn named_step(&self, step: &'static str, took: Duration, ok: bool) {
        let done = Done { step, ok: if ok { "true" } else { "false" } };
        self.steps.get_or_create(&done).observe(took.as_secs_f64());
    }
}
