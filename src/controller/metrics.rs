//! What the controller counts.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reconcile {
    kind: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    reason: &'static str,
}

/// Handles on all metrics of the controller; clones count into the same.
#[derive(Clone, Default)]
pub struct Metrics {
    reconciles: Family<Reconcile, Counter>,
    errors: Family<Why, Counter>,
    watch_errors: Family<Kind, Counter>,
    placements: Counter,
    holders_refused: Counter,
    events_dropped: Counter,
    pending: Gauge,
    depth: Gauge,
    leader: Gauge,
    cidrs_missing: Gauge,
    last_error: Gauge<f64, AtomicU64>,
    mirror_connected: Gauge,
    mirror_lag: Gauge<f64, AtomicU64>,
    mirror_waiting: Gauge,
    mirror_bots: Counter,
    mirror_looks: Counter,
    mirror_look: Gauge<f64, AtomicU64>,
    mirror_repairs: Counter,
    mirror_errors: Family<Why, Counter>,
}

impl Metrics {
    /// Registers all under `berth_controller_`.
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        let r = registry.sub_registry_with_prefix("berth_controller");
        r.register("reconciles", "Reconciles by kind and result", m.reconciles.clone());
        r.register("errors", "Failed reconciles by reason", m.errors.clone());
        r.register("watch_errors", "Watches that broke and were begun again, by kind", m.watch_errors.clone());
        r.register("placements", "Bots bound to a node", m.placements.clone());
        r.register(
            "holders_refused",
            "Holder Pods that a node refused, or that ended there",
            m.holders_refused.clone(),
        );
        r.register("events_dropped", "Events that could not be written", m.events_dropped.clone());
        r.register("pending_bots", "Bots that are bound to no node", m.pending.clone());
        r.register("queue_depth", "Objects waiting for a reconcile now", m.depth.clone());
        r.register("leader", "1 while this replica leads", m.leader.clone());
        r.register("nodes_without_cidr", "BotNodes that have no CIDR", m.cidrs_missing.clone());
        r.register("last_error_timestamp_seconds", "When a reconcile last failed", m.last_error.clone());
        r.register("mirror_connected", "1 while this replica writes rows to the database", m.mirror_connected.clone());
        r.register(
            "mirror_lag_seconds",
            "For how long the oldest change waits that has no row yet",
            m.mirror_lag.clone(),
        );
        r.register("mirror_waiting_bots", "Bots whose rows wait", m.mirror_waiting.clone());
        r.register("mirror_bots", "Bots whose rows were written", m.mirror_bots.clone());
        r.register("mirror_resyncs", "Looks at all rows", m.mirror_looks.clone());
        r.register("mirror_resync_seconds", "How long the last look at all rows took", m.mirror_look.clone());
        r.register("mirror_repairs", "Bots whose rows a look at all rows found wrong", m.mirror_repairs.clone());
        r.register(
            "mirror_errors",
            "Sessions with the database that failed, and bots that it refused, by reason",
            m.mirror_errors.clone(),
        );
        m
    }

    /// A reconcile came to its end. `error` is the error's label.
    pub fn reconciled(&self, kind: &'static str, error: Option<&'static str>) {
        let result = if error.is_some() { "error" } else { "ok" };
        self.reconciles.get_or_create(&Reconcile { kind, result }).inc();
        if let Some(reason) = error {
            self.errors.get_or_create(&Why { reason }).inc();
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            self.last_error.set(now.map_or(0.0, |d| d.as_secs_f64()));
        }
    }

    /// A watch broke.
    pub fn watch_failed(&self, kind: &'static str) {
        self.watch_errors.get_or_create(&Kind { kind }).inc();
    }

    /// A bot was bound.
    pub fn placed(&self) {
        self.placements.inc();
    }

    /// A node refused its holder Pod.
    pub fn holder_refused(&self) {
        self.holders_refused.inc();
    }

    /// An Event was not written.
    pub fn event_dropped(&self) {
        self.events_dropped.inc();
    }

    /// Whether this replica leads.
    pub fn leading(&self, yes: bool) {
        self.leader.set(i64::from(yes));
    }

    /// How many wait: bots for a node, objects for a reconcile, nodes for a CIDR.
    pub fn waiting(&self, bots: usize, objects: usize, nodes: usize) {
        self.pending.set(number(bots));
        self.depth.set(number(objects));
        self.cidrs_missing.set(number(nodes));
    }

    /// Whether the mirror has a session.
    pub fn mirror_connected(&self, yes: bool) {
        self.mirror_connected.set(i64::from(yes));
    }

    /// How far behind the mirror is, and how many bots wait.
    pub fn mirror_lags(&self, lag: std::time::Duration, waiting: usize) {
        self.mirror_lag.set(lag.as_secs_f64());
        self.mirror_waiting.set(number(waiting));
    }

    /// Bots' rows were written.
    pub fn mirror_wrote(&self, bots: usize) {
        self.mirror_bots.inc_by(u64::try_from(bots).unwrap_or(0));
    }

    /// All rows were looked at; those of so many bots were wrong.
    pub fn mirror_looked(&self, wrong: usize, took: std::time::Duration) {
        self.mirror_look.set(took.as_secs_f64());
        self.mirror_looks.inc();
        self.mirror_repairs.inc_by(u64::try_from(wrong).unwrap_or(0));
    }

    /// Rows could not be written.
    pub fn mirror_failed(&self, reason: &'static str) {
        self.mirror_errors.get_or_create(&Why { reason }).inc();
    }
}

fn number(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
