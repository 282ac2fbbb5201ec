//! The pool: made when it is first needed, unpinned when no GPU is used.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sllm_core::{Cache, Checkpoint, Device, Result};

use crate::config::Quota;

/// Threads that touch and pin the pool's memory: more of them do not make the kernel faster.
const PREPARING: usize = 8;

/// The memory that keeps models.
#[derive(Debug)]
pub(crate) struct Pool {
    chunk_len: u64,
    len: u64,
    quotas: Vec<Quota>,
    made: OnceLock<Made>,
    making: Mutex<()>,
    logged: Arc<Logged>,
}

#[derive(Debug)]
struct Made {
    cache: Cache,
    at: Instant,
}

/// The refusal to pin that the log has.
#[derive(Debug, Default)]
struct Logged(Mutex<Option<String>>);

impl Logged {
    /// Logs a refusal that is new, or that there is none any more; whether there was anything to log.
    fn tell(&self, now: Option<String>) -> bool {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *logged == now {
            return false;
        }
        match &now {
            Some(refusal) => tracing::warn!(%refusal, "the pool cannot be page-locked: copies to GPUs are slower"),
            None => tracing::info!("the pool can be page-locked again"),
        }
        *logged = now;
        true
    }
}

impl Pool {
    pub(crate) fn new(chunk_len: u64, len: u64, mut quotas: Vec<Quota>) -> Pool {
        // Of several prefixes the longest is meant.
        quotas.sort_by_key(|quota| std::cmp::Reverse(quota.prefix.len()));
        Pool { chunk_len, len, quotas, made: OnceLock::new(), making: Mutex::default(), logged: Arc::default() }
    }

    /// What was made of it, if it was.
    pub(crate) fn made(&self) -> Option<&Cache> {
        self.made.get().map(|made| &made.cache)
    }

    /// The cache, which the first call makes. Blocks.
    pub(crate) fn cache(&self) -> Result<&Cache> {
        if let Some(cache) = self.made() {
            return Ok(cache);
        }
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cache) = self.made() {
            return Ok(cache);
        }
        // Memory that one device's driver has pinned is pinned for all. Where there is none, loads to the host need no
        // pins, and the first load to a device pins by that one.
        let device = first_device();
        let pins_by = device.as_ref().ok().and_then(Option::as_ref);
        let cache = Cache::new(self.chunk_len, self.len, pins_by)?;
        if let Err(refusal) = &device {
            cache.refuse(refusal.chain());
            self.logged.tell(cache.usage().refusal);
        }
        if pins_by.is_some() {
            let (preparing, logged) = (cache.clone(), Arc::clone(&self.logged));
            let threads = std::thread::available_parallelism().map_or(1, usize::from).min(PREPARING);
            let work = move || {
                preparing.prepare(threads);
                let usage = preparing.usage();
                tracing::info!(page_locked = usage.page_locked, capacity = usage.capacity, "the pool is prepared");
                logged.tell(usage.refusal);
            };
            if let Err(error) = std::thread::Builder::new().name("pool".into()).spawn(work) {
                // Loads pin what they need.
                tracing::warn!(%error, "the pool is not prepared in the background");
            }
        }
        Ok(&self.made.get_or_init(|| Made { cache, at: Instant::now() }).cache)
    }

    /// Logs a refusal to pin, of whichever load, and its end.
    pub(crate) fn log_refusal(&self) {
        if let Some(cache) = self.made() {
            self.logged.tell(cache.usage().refusal);
        }
    }

    /// Unpins its memory, and so lets go of the context that pins it, unless it was made not so long ago or a load uses
    /// it. Only while no GPU is open. Blocks.
    pub(crate) fn sweep(&self, idle: Duration) {
        let Some(made) = self.made.get().filter(|made| made.at.elapsed() >= idle) else { return };
        let was_locked = made.cache.usage().page_locked > 0;
        if made.cache.unpin_memory() && was_locked {
            tracing::info!("the pool is not page-locked any more, since GPUs are idle; loads to them lock it again");
        }
    }

    /// The cache for loads of a model, within its group's limit. Blocks.
    pub(crate) fn cache_for(&self, name: &str) -> Result<Cache> {
        let cache = self.cache()?;
        let quota = self.quotas.iter().find(|quota| name.starts_with(&quota.prefix));
        Ok(quota.map_or_else(|| cache.clone(), |quota| cache.limited(&quota.prefix, quota.len)))
    }

    /// Bytes of a checkpoint that are resident.
    pub(crate) fn resident_len(&self, checkpoint: &Checkpoint) -> u64 {
        self.made().map_or(0, |cache| cache.resident_len(checkpoint))
    }

    /// Whether a checkpoint is kept.
    pub(crate) fn is_pinned(&self, checkpoint: &Checkpoint) -> bool {
        self.made().is_some_and(|cache| cache.is_pinned(checkpoint))
    }

    /// Drops a checkpoint; gives its bytes.
    pub(crate) fn evict(&self, checkpoint: &Checkpoint) -> u64 {
        self.made().map_or(0, |cache| cache.evict(checkpoint))
    }
}

/// The first GPU that can be opened; `None` where there is none. The error is that of the first one, or the driver's.
fn first_device() -> Result<Option<Device>> {
    let mut refusal = None;
    for ordinal in 0..Device::try_cuda_count()? {
        match Device::cuda(ordinal) {
            Ok(device) => return Ok(Some(device)),
            Err(error) => drop(refusal.get_or_insert(error)),
        }
    }
    refusal.map_or(Ok(None), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_logged_once_and_its_end_too() {
        let logged = Logged::default();
        let told = [None, Some("a"), Some("a"), Some("b"), None, None, Some("b")];
        let told = told.map(|now| logged.tell(now.map(str::to_owned)));
        assert_eq!(told, [false, true, false, true, true, false, true]);
    }
}
