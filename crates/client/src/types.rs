//! What a server tells of itself.

use serde::Serialize;
use sllm_proto::store as pb;

/// A model that the server knows of.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Model {
    /// Its path below the server's storage path.
    pub name: String,
    /// `store`, `safetensors` or `original`.
    pub layout: String,
    /// Bytes of its data files.
    pub len: u64,
    /// Bytes of them that are in the pool.
    pub resident: u64,
    /// Whether they stay there.
    pub pinned: bool,
    /// Loads of it that run.
    pub loads: u32,
    /// Seconds since it was last loaded.
    pub idle_s: f64,
}

/// What the server does.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// Its version.
    pub version: String,
    /// Where its models lie.
    pub storage_path: String,
    /// Seconds since its start.
    pub uptime_s: f64,
    /// Its memory.
    pub pool: Pool,
    /// Loads that run.
    pub jobs: Vec<Job>,
    /// Loads since the start that ended well.
    pub loads_done: u64,
    /// Those that failed, or were stopped.
    pub loads_failed: u64,
    /// Clients that are connected.
    pub clients: u32,
}

/// The server's pool of pinned memory, in bytes, except where said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Pool {
    /// All of it.
    pub capacity: u64,
    /// Of one chunk.
    pub chunk_len: u64,
    /// Those that hold parts of models.
    pub resident: u64,
    /// Those of models that are not to be evicted.
    pub pinned: u64,
    /// Those that the driver has pinned for copies.
    pub page_locked: u64,
    /// Why not all are, where something refused it: the last refusal, until memory was page-locked again.
    pub refusal: Option<String>,
    /// Chunks that were there when they were wanted.
    pub hits: u64,
    /// Chunks that were not.
    pub misses: u64,
    /// Chunks that had to go for others.
    pub evictions: u64,
}

/// A load that runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Job {
    /// Its model.
    pub model: String,
    /// Where to: `pool`, `cuda:0`, `host`.
    pub target: String,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Seconds since it began.
    pub seconds: f64,
}

impl From<pb::Model> for Model {
    fn from(model: pb::Model) -> Model {
        let pb::Model { name, layout, len, resident, pinned, loads, idle_s } = model;
        Model { name, layout, len, resident, pinned, loads, idle_s }
    }
}

impl From<pb::StatusResponse> for Status {
    fn from(status: pb::StatusResponse) -> Status {
        let pb::StatusResponse { version, storage_path, uptime_s, pool, jobs, loads_done, loads_failed, clients } =
            status;
        let pool = pool.map(Pool::from).unwrap_or_default();
        let jobs = jobs.into_iter().map(Job::from).collect();
        Status { version, storage_path, uptime_s, pool, jobs, loads_done, loads_failed, clients }
    }
}

impl From<pb::Pool> for Pool {
    fn from(pool: pb::Pool) -> Pool {
        let pb::Pool { capacity, chunk_len, resident, pinned, page_locked, refusal, hits, misses, evictions } = pool;
        let refusal = (!refusal.is_empty()).then_some(refusal);
        Pool { capacity, chunk_len, resident, pinned, page_locked, refusal, hits, misses, evictions }
    }
}

impl From<pb::Job> for Job {
    fn from(job: pb::Job) -> Job {
        let pb::Job { model, target, done, total, seconds } = job;
        Job { model, target, done, total, seconds }
    }
}
