//! What is counted, and how it is shown to those who watch.

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tonic::Code;

/// What a load is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Into the pool.
    Pool,
    /// Into a client's host memory.
    Host,
    /// Into a client's GPU memory.
    Cuda,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Pool => "pool",
            Kind::Host => "host",
            Kind::Cuda => "cuda",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    kind: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct From {
    source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

/// Counts that grow as loads run.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    ended: Family<Ended, Counter>,
    bytes: Family<From, Counter>,
    seconds: Family<OfKind, Histogram, fn() -> Histogram>,
}

/// What is so at a moment.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moment {
    pub(crate) capacity: u64,
    pub(crate) resident: u64,
    pub(crate) pinned: u64,
    pub(crate) page_locked: u64,
    pub(crate) pin_refused: bool,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) evictions: u64,
    pub(crate) queued: u64,
    pub(crate) running: u64,
    pub(crate) clients: u64,
    pub(crate) models: u64,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        // From 10 ms, as a small adapter takes, to 80 s, as a large cold model does.
        let buckets: fn() -> Histogram = || Histogram::new(exponential_buckets(0.01, 2.0, 14));
        Metrics { ended: Family::default(), bytes: Family::default(), seconds: Family::new_with_constructor(buckets) }
    }

    /// A load ended, well or with this code.
    pub(crate) fn ended(&self, kind: Kind, code: Option<Code>, seconds: f64) {
        let kind = kind.name();
        self.ended.get_or_create(&Ended { kind, outcome: code.map_or("ok", outcome) }).inc();
        self.seconds.get_or_create(&OfKind { kind }).observe(seconds);
    }

    /// A load read so many bytes, some of them out of the pool.
    pub(crate) fn moved(&self, from_pool: u64, from_files: u64) {
        self.bytes.get_or_create(&From { source: "pool" }).inc_by(from_pool);
        self.bytes.get_or_create(&From { source: "files" }).inc_by(from_files);
    }

    /// All of it as text.
    pub(crate) fn text(&self, now: &Moment) -> String {
        let mut registry = Registry::with_prefix("sllm");
        let pool = Family::<State, prometheus_client::metrics::gauge::Gauge>::default();
        for (state, bytes) in [
            ("capacity", now.capacity),
            ("resident", now.resident),
            ("pinned", now.pinned),
            ("page_locked", now.page_locked),
        ] {
            pool.get_or_create(&State { state }).set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
        registry.register_with_unit("pool", "Memory of the pool by state", Unit::Bytes, pool);
        registry.register("pool_hits", "Chunks that were in the pool", ConstCounter::new(now.hits));
        registry.register("pool_misses", "Chunks that were read from files", ConstCounter::new(now.misses));
        registry.register("pool_evictions", "Chunks that made room for others", ConstCounter::new(now.evictions));
        registry.register("loads", "Loads that ended", self.ended.clone());
        registry.register_with_unit("load", "Time of loads", Unit::Seconds, self.seconds.clone());
        registry.register_with_unit("read", "Bytes read for loads by source", Unit::Bytes, self.bytes.clone());
        let gauge = |value: u64| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register("pool_pin_refused", "Whether the last page-lock was refused", gauge(now.pin_refused.into()));
        registry.register("loads_queued", "Loads that wait", gauge(now.queued));
        registry.register("loads_running", "Loads that run", gauge(now.running));
        registry.register("clients", "Connections of clients", gauge(now.clients));
        registry.register("models", "Models that are open", gauge(now.models));
        let mut out = String::new();
        match text::encode(&mut out, &registry) {
            Ok(()) => out,
            // Writing to a string does not fail.
            Err(_) => String::new(),
        }
    }
}

/// The name of a code as a label.
fn outcome(code: Code) -> &'static str {
    match code {
        Code::Cancelled => "cancelled",
        Code::InvalidArgument => "invalid",
        Code::NotFound => "not_found",
        Code::PermissionDenied => "permission",
        Code::ResourceExhausted => "exhausted",
        Code::FailedPrecondition => "changed",
        Code::DeadlineExceeded => "deadline",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "corrupt",
        _ => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_told_by_name_and_label() {
        let metrics = Metrics::new();
        metrics.ended(Kind::Cuda, None, 0.3);
        metrics.ended(Kind::Cuda, Some(Code::DataLoss), 0.3);
        metrics.moved(7, 5);
        let text = metrics.text(&Moment { resident: 3, hits: 2, ..Moment::default() });
        for line in [
            "sllm_pool_bytes{state=\"resident\"} 3",
            "sllm_pool_pin_refused 0",
            "sllm_pool_hits_total 2",
            "sllm_loads_total{kind=\"cuda\",outcome=\"ok\"} 1",
            "sllm_loads_total{kind=\"cuda\",outcome=\"corrupt\"} 1",
            "sllm_read_bytes_total{source=\"pool\"} 7",
            "sllm_load_seconds_count{kind=\"cuda\"} 2",
            "sllm_clients 0",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
    }
}
