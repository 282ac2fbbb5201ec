//! What all services of a server share.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use sllm_core::{CacheUsage, Control, Error, LoadReport, Loader, LoaderBuilder, Result};
use tonic::{Code, Status};

use crate::config::Config;
use crate::devices::Devices;
use crate::fault::refused;
use crate::imports::Imports;
use crate::jobs::Jobs;
use crate::memory::Tickets;
use crate::metrics::{Metrics, Moment};
use crate::models::{Model, Models};
use crate::pool::Pool;
use crate::preload::{self, Want};
use crate::replicas::Replicas;
use crate::room::Room;

/// Bytes of memory for what clients want moved, as their messages say it.
const ROOM: usize = 512 << 20;
/// Blocks at most that the sessions of all clients have attached.
const MAX_BLOCKS: usize = 1 << 20;

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
    pub(crate) pool: Arc<Pool>,
    pub(crate) models: Models,
    pub(crate) devices: Devices,
    pub(crate) imports: Arc<Imports>,
    pub(crate) replicas: Replicas,
    /// Bytes of memory for what clients want moved.
    pub(crate) room: Room,
    /// Blocks that clients attach.
    pub(crate) blocks: Room,
    metrics: Metrics,
}

impl Store {
    pub(crate) fn new(config: Config) -> Result<Store> {
        let path = &config.storage_path;
        let root = path.canonicalize().map_err(|source| Error::Io {
            what: "find the storage path (--storage-path names another)",
            path: path.clone(),
            source,
        })?;
        if !root.is_dir() {
            return Err(Error::Invalid(format!("{} is no directory: --storage-path takes one", path.display())));
        }
        let metrics = Metrics::new();
        let pool = Arc::new(Pool::new(config.chunk_len, config.pool_len, config.quotas.clone()));
        Ok(Store {
            models: Models::new(root.clone(), Arc::clone(&pool)),
            pool,
            devices: Devices::default(),
            imports: Arc::default(),
            replicas: Replicas::default(),
            room: Room::new(ROOM),
            blocks: Room::new(MAX_BLOCKS),
            root,
            since: Instant::now(),
            clients: Arc::default(),
            tickets: Arc::default(),
            jobs: Arc::new(Jobs::new(config.max_loads, metrics.clone())),
            metrics,
            config,
        })
    }

    /// The model of this name, which loads may use.
    pub(crate) async fn open(self: &Arc<Self>, name: &str) -> Result<Arc<Model>, Status> {
        let model = self.open_any(name).await?;
        if self.config.registration_required && !model.is_registered() {
            let reason = format!("{} is not registered, and the server loads registered models only", model.name);
            return Err(refused(Code::FailedPrecondition, reason));
        }
        Ok(model)
    }

    /// The model of this name, registered or not.
    pub(crate) async fn open_any(self: &Arc<Self>, name: &str) -> Result<Arc<Model>, Status> {
        let (store, name) = (Arc::clone(self), name.to_owned());
        blocking(move || store.models.open(&name)).await?
    }

    /// What a model is called that is asked for so, open or not.
    pub(crate) async fn name(self: &Arc<Self>, asked: &str) -> Result<String, Status> {
        let (store, asked) = (Arc::clone(self), asked.to_owned());
        blocking(move || store.models.name(&asked)).await?
    }

    /// The model of this name, if something was done with it.
    pub(crate) async fn known(self: &Arc<Self>, name: &str) -> Result<Option<Arc<Model>>, Status> {
        let (store, name) = (Arc::clone(self), name.to_owned());
        blocking(move || store.models.get(&name)).await?
    }

    /// A loader of a model through the pool. Blocks.
    pub(crate) fn loader(&self, model: &Model, control: Control) -> Result<LoaderBuilder> {
        let verify = self.config.verify && model.checkpoint.sums().is_some();
        let cache = self.pool.cache_for(&model.name)?;
        Ok(Loader::builder().cache(cache).verify(verify).threads(self.config.threads).control(control))
    }

    /// Counts what a load read.
    pub(crate) fn count(&self, report: &LoadReport) {
        self.metrics.moved(report.cached_bytes, report.read_bytes.saturating_sub(report.cached_bytes));
    }

    /// Counts what a load read, and logs it.
    pub(crate) fn tell(&self, model: &Model, report: &LoadReport) {
        self.count(report);
        // What is only read into the pool goes to no device.
        let target = if report.devices.is_empty() { "pool".to_owned() } else { report.devices.join(",") };
        let model = &model.name;
        let (bytes, from_pool, seconds) = (report.read_bytes, report.cached_bytes, report.seconds);
        tracing::info!(%model, %target, bytes, from_pool, seconds, "loaded");
        for note in &report.notes {
            tracing::warn!(%model, %note, "a load found another way");
        }
    }

    /// Lets loads use a model where only registered ones may be loaded.
    pub(crate) fn register(&self, model: &Arc<Model>) {
        model.register();
        self.models.keep(model).register();
    }

    /// Keeps a model in the pool, or lets it be evicted; gives what is known by its name now. Blocks.
    pub(crate) fn set_pinned(&self, model: &Arc<Model>, pinned: bool) -> Result<Arc<Model>> {
        if !pinned {
            if let Some(cache) = self.pool.made() {
                cache.unpin(&model.checkpoint);
            }
            return Ok(Arc::clone(model));
        }
        let cache = self.pool.cache()?;
        let mut model = Arc::clone(model);
        loop {
            cache.pin(&model.checkpoint)?;
            // Where it was opened anew meanwhile, that is to be pinned; the pin of what it was before goes.
            let now = self.models.keep(&model);
            if Arc::ptr_eq(&now, &model) {
                return Ok(model);
            }
            model = now;
        }
    }

    /// Reads the models into the pool that the configuration names.
    pub(crate) async fn preload(self: Arc<Self>) {
        let Config { preload, pin, .. } = &self.config;
        for (name, pinned) in pin.iter().map(|name| (name, true)).chain(preload.iter().map(|name| (name, false))) {
            let started = async {
                let model = self.open_any(name).await?;
                self.register(&model);
                if pinned {
                    let (store, model) = (Arc::clone(&self), Arc::clone(&model));
                    let pin = move || store.set_pinned(&model, true).map_err(|e| crate::fault::status(&e));
                    drop(blocking(pin).await??);
                }
                Ok::<_, Status>(preload::start(&self, &model, Want::Keep))
            };
            // A load that fails says so itself.
            if let Err(error) = started.await {
                tracing::error!(model = %name, error = error.message(), "cannot be preloaded");
            }
        }
    }

    /// Lets go of what waited or lay idle too long. Blocks.
    pub(crate) fn sweep(&self) {
        self.tickets.sweep();
        self.replicas.sweep();
        if let (Some(ttl), Some(cache)) = (self.config.ttl, self.pool.made()) {
            let bytes = cache.evict_idle(ttl);
            if bytes > 0 {
                tracing::info!(bytes, "dropped what was not used");
            }
        }
        self.models.sweep();
        self.pool.log_refusal();
        if self.devices.sweep(self.config.gpu_idle) {
            self.pool.sweep(self.config.gpu_idle);
        }
    }

    /// What the pool holds; before it is made, nothing of its size.
    pub(crate) fn usage(&self) -> CacheUsage {
        self.pool.made().map(sllm_core::Cache::usage).unwrap_or_else(|| {
            let mut usage = CacheUsage::default();
            usage.capacity = self.config.pool_len / self.config.chunk_len * self.config.chunk_len;
            usage.chunk_len = self.config.chunk_len;
            usage
        })
    }

    /// What those who watch read.
    pub(crate) fn metrics_text(&self) -> String {
        let usage = self.usage();
        let now = Moment {
            capacity: usage.capacity,
            resident: usage.resident,
            pinned: usage.pinned,
            page_locked: usage.page_locked,
            pin_refused: usage.refusal.is_some(),
            hits: usage.hits,
            misses: usage.misses,
            evictions: usage.evictions,
            queued: self.jobs.queued() as u64,
            running: self.jobs.running().len() as u64,
            clients: u64::from(self.clients.load(Ordering::Relaxed)),
            models: self.models.all().len() as u64,
        };
        self.metrics.text(&now)
    }
}

/// Runs what may block on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Status::internal(format!("the request failed by a bug: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_of_the_files_that_are_there_now() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m/model.safetensors");
        std::fs::create_dir(dir.path().join("m")).unwrap();
        let write = |bytes: &[u8]| {
            std::fs::write(&file, test_support::safetensors(test_support::header(bytes.len() as u64), bytes)).unwrap();
        };
        write(&[1, 2]);
        let config = Config { pool_len: 8 << 20, chunk_len: 4 << 20, ..Config::new(dir.path()) };
        let store = Store::new(config).unwrap();
        let old = store.models.open("m").unwrap();
        write(&[1, 2, 3]);
        let new = store.models.open("m").unwrap();
        assert!(!Arc::ptr_eq(&old, &new));
        let pinned = store.set_pinned(&old, true).unwrap();
        assert!(Arc::ptr_eq(&pinned, &new));
        assert_eq!([&old, &new].map(|model| store.pool.is_pinned(&model.checkpoint)), [false, true]);
    }

    #[test]
    fn what_is_pinned_registered_or_preloaded_is_known_also_where_it_was_forgotten_since_it_was_opened() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = test_support::safetensors(test_support::header(2), &[1, 2]);
        std::fs::create_dir(dir.path().join("m")).unwrap();
        std::fs::write(dir.path().join("m/model.safetensors"), bytes).unwrap();
        let config = Config { pool_len: 8 << 20, chunk_len: 4 << 20, ..Config::new(dir.path()) };
        let store = Arc::new(Store::new(config).unwrap());
        let known = || store.models.get("m").unwrap();
        let opened_and_forgotten = || {
            let model = store.models.open("m").unwrap();
            store.models.forget();
            assert!(known().is_none());
            model
        };
        store.set_pinned(&opened_and_forgotten(), true).unwrap();
        store.models.forget();
        let model = known().expect("nobody could unpin it");
        store.set_pinned(&model, false).unwrap();

        let model = opened_and_forgotten();
        store.models.open("m").unwrap();
        store.register(&model);
        assert!(known().unwrap().is_registered());

        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let preload = preload::start(&store, &opened_and_forgotten(), Want::Keep);
            assert!(known().expect("nobody could ask how it ends").preloads.last().is_some());
            preload.ended().await.unwrap();
        });
    }
}
