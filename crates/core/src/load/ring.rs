//! The ring of pinned buffers that a load is staged by. It may be pinned before the load begins to move: the driver
//! pins one step after the other, and what else it is asked for, such as copies, waits meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use super::Loader;
use super::staging::divide;
use crate::error::Result;
use crate::numa::Node;
use crate::pool::BufferPool;
use crate::threads::processors;

/// Threads that pin a ring ahead: while the driver pins for one, the others touch the next steps, which takes longer.
const THREADS: usize = 3;

/// What a ring is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    pub(super) buffer_len: usize,
    pub(super) buffers: usize,
    /// Buffers that each lane takes.
    pub(super) per_lane: usize,
}

impl Form {
    /// The form for so many lanes, of buffers of `piece_len` bytes, which have at most `limit` in all.
    pub(super) fn of_lanes(lanes: usize, per_lane: usize, piece_len: u64, limit: u64) -> Option<Form> {
        let buffers = usize::try_from(limit / piece_len).ok()?.max(1);
        let (lanes, per_lane) = divide(buffers, lanes, per_lane);
        Some(Form { buffer_len: usize::try_from(piece_len).ok()?, buffers: lanes * per_lane, per_lane })
    }

    pub(super) fn len(self) -> u64 {
        (self.buffer_len as u64).saturating_mul(self.buffers as u64)
    }
}

/// Buffers, and the threads that prepare them, if any.
#[derive(Debug)]
pub(super) struct Ring {
    /// Before the pool: threads end before it goes.
    threads: Threads,
    pub(super) pool: BufferPool,
    /// Why memory of a NUMA node was not asked for, where it should have been.
    pub(super) refusal: Option<String>,
}

impl Ring {
    /// A ring in memory of `node`, for the loader's devices. Nothing is touched or pinned yet.
    pub(super) fn new(loader: &Loader, node: Option<Node>, form: Form) -> Result<Ring> {
        // Each lane prepares and pins its own buffers, one at a time, while others read already.
        let step = form.buffer_len * form.per_lane.clamp(1, 2);
        let pinning = loader.devices.iter().find(|device| device.needs_pinning());
        let pool = BufferPool::new(form.buffer_len, form.buffers, step, pinning)?;
        let refusal = node.map(|node| node.number()).and_then(|node| {
            let e = pool.prefer_node(node).err()?;
            Some(format!("staging memory is not asked for on NUMA node {node}: {e}"))
        });
        Ok(Ring { threads: Threads::default(), pool, refusal })
    }

    /// Prepares and pins all of it by threads of its own; loads may use it meanwhile.
    pub(super) fn prepare(&mut self) {
        for _ in 0..THREADS.min(processors()) {
            let (pool, stopped) = (self.pool.clone(), Arc::clone(&self.threads.stopped));
            let work = move || pool.prepare_while(|| !stopped.load(Ordering::Relaxed));
            // What no thread can be had for, lanes prepare.
            self.threads.started.extend(Builder::new().name("sllm-pin".into()).spawn(work));
        }
    }

    /// Whether it has the buffers that are wanted.
    pub(super) fn fits(&self, form: Form) -> bool {
        self.pool.buffer_len() == form.buffer_len && self.pool.buffers() >= form.buffers
    }

    /// Gives its memory back, in the background where it can be.
    pub(super) fn release(self) {
        drop(self.threads);
        self.pool.release();
    }
}

/// Threads that prepare a ring, until they are dropped.
#[derive(Debug, Default)]
struct Threads {
    stopped: Arc<AtomicBool>,
    started: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // They do not panic.
        self.started.drain(..).for_each(|thread| drop(thread.join()));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::PoisonError;

    use cuda::Driver;
    use test_support::{header, noise, safetensors};

    use super::*;
    use crate::{Checkpoint, Device, EngineChoice};

    const LEN: usize = 20 << 20;

    #[test]
    fn what_a_load_cannot_use_goes_and_both_take_no_more_than_is_allowed() {
        let driver = Driver::load();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let bytes = noise(1, LEN);
        fs::write(&path, safetensors(header(LEN as u64), &bytes)).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let device = Device::cuda(0).unwrap();
        for limit in [8 << 20, 32 << 20] {
            let builder = Loader::builder().device(device.clone()).engine(EngineChoice::Pread).pinned_bytes(limit);
            let loader = builder.build().unwrap();
            let other = Form { buffer_len: 1 << 20, buffers: 8, per_lane: 1 };
            let mut ring = Ring::new(&loader, None, other).unwrap();
            ring.prepare();
            *loader.prepared.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring);
            driver.reset();
            let loaded = loader.load(&checkpoint).unwrap();
            assert!(loaded.tensor(&checkpoint.tensors()[0].name).unwrap().to_vec().unwrap() == bytes);
            assert!(driver.registered_peak() > 0 && driver.registered_peak() <= limit, "{}", driver.registered_peak());
            assert!(loader.prepared.lock().unwrap_or_else(PoisonError::into_inner).is_none());
        }
    }
}
