//! What all services of a server share.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use sllm_core::{Error, Result};

use crate::config::Config;
use crate::jobs::Jobs;
use crate::memory::Tickets;
use crate::metrics::{Metrics, Moment};

/// A server's state.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) config: Config,
    /// The storage path without links.
    pub(crate) root: PathBuf,
    pub(crate) since: Instant,
    pub(crate) clients: Arc<AtomicU32>,
    pub(crate) tickets: Arc<Tickets>,
    pub(crate) jobs: Arc<Jobs>,
    pub(crate) metrics: Metrics,
}

impl Store {
    pub(crate) fn new(config: Config) -> Result<Store> {
        let path = &config.storage_path;
        let root = path.canonicalize().map_err(|source| Error::Io {
            what: "find the storage path",
            path: path.clone(),
            source,
        })?;
        if !root.is_dir() {
            return Err(Error::Invalid(format!("{} is no directory: --storage-path takes one", path.display())));
        }
        let metrics = Metrics::new();
        Ok(Store {
            root,
            since: Instant::now(),
            clients: Arc::default(),
            tickets: Arc::default(),
            jobs: Arc::new(Jobs::new(config.max_loads, metrics.clone())),
            metrics,
            config,
        })
    }

    /// Lets go of what waited or lay idle too long. Blocks.
    pub(crate) fn sweep(&self) {
        self.tickets.sweep();
    }

    /// What those who watch read.
    pub(crate) fn metrics_text(&self) -> String {
        let now = Moment {
            queued: self.jobs.queued() as u64,
            running: self.jobs.running().len() as u64,
            clients: u64::from(self.clients.load(Ordering::Relaxed)),
            ..Moment::default()
        };
        self.metrics.text(&now)
    }
}
