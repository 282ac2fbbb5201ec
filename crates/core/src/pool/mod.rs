//! Page-aligned pinned buffers out of one anonymous mapping.
//!
//! A [`HostBuffer`] belongs to exactly one of: the pool, a read in flight, a copy in flight. Ownership moves with it,
//! and dropping it gives it back. The memory is touched and pinned in steps, by whoever first needs a buffer of a
//! step, so that the first buffer is there at once and reader threads share the work. A small pool is a staging ring,
//! a large one is a cache: same type. While nobody holds a [`Hold`], a pool can be unpinned, since a pin keeps the
//! device's context; whoever copies out of a step then pins it again.

mod memory;
mod text;

use std::any::Any;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

pub(crate) use memory::{HostMemory, ask_for_huge_pages};
pub(crate) use text::SharedText;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::PAGE_BYTES;
use crate::releases;

/// The most that is pinned in one go, in bytes; some drivers refuse registrations of 2 GiB.
const MAX_STEP: usize = 1 << 30;

/// A pool of equal pinned buffers.
#[derive(Debug, Clone)]
pub struct BufferPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    memory: HostMemory,
    buffer_len: usize,
    buffers: usize,
    buffers_per_step: usize,
    state: Mutex<State>,
    /// Told when a step is ready, or its pin was changed.
    prepared: Condvar,
    pinned: AtomicU64,
}

/// Whether a step is pinned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Pin {
    #[default]
    Plain,
    /// A thread pins or unpins it; others wait.
    Changing,
    Pinned,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<usize>,
    /// Steps that somebody has taken on to prepare.
    claimed_steps: usize,
    /// Of those, steps that are not ready yet.
    preparing: usize,
    /// Threads that prepare one step after the other. Who needs a buffer waits for their next step instead of taking one on: one
    /// that has to be pinned keeps a reader from reading.
    preparers: usize,
    steps: Vec<Pin>,
    /// The device that pins, for all contexts. None while nothing is pinned: no device was given, or the pool was unpinned.
    device: Option<Device>,
    /// Users that copy out of the memory: while there are some, nothing is unpinned.
    holds: usize,
    /// The driver refused, and is not asked again before the pool was unpinned.
    gave_up: bool,
    /// The last refusal, until a pin after it succeeded: what is told outlives the unpinning.
    refused: Option<String>,
}

impl BufferPool {
    /// A pool of `buffers` buffers of `buffer_len` bytes (a multiple of 4096), prepared `step_len` bytes at a time.
    ///
    /// Nothing is touched or pinned yet. With a device that needs it, memory is pinned when it is prepared; without one it
    /// is plain memory, which the loads of a cache may pin later. Where the driver or a limit refuses, the buffers are
    /// plain memory too, and [`BufferPool::refusal`] says why.
    pub fn new(buffer_len: usize, buffers: usize, step_len: usize, device: Option<&Device>) -> Result<BufferPool> {
        let page = PAGE_BYTES;
        if buffer_len == 0 || !buffer_len.is_multiple_of(page) || buffer_len > MAX_STEP {
            return Err(Error::Invalid(format!(
                "a buffer of {buffer_len} bytes is not a multiple of 4096 up to 1 GiB"
            )));
        }
        let len = buffer_len.checked_mul(buffers).filter(|&len| isize::try_from(len).is_ok());
        let len = len.ok_or_else(|| Error::Invalid("the pool does not fit the address space".into()))?;
        let memory = HostMemory::map(len).map_err(Error::io("map memory for buffers", "anonymous memory".as_ref()))?;
        let buffers_per_step = (step_len.min(MAX_STEP) / buffer_len).max(1);
        let device = device.filter(|device| device.needs_pinning()).cloned();
        let steps = vec![Pin::Plain; buffers.div_ceil(buffers_per_step)];
        let shared = Shared {
            memory,
            buffer_len,
            buffers,
            buffers_per_step,
            state: Mutex::new(State { steps, device, ..State::default() }),
            prepared: Condvar::new(),
            pinned: AtomicU64::new(0),
        };
        Ok(BufferPool { shared: Arc::new(shared) })
    }

    /// Asks for memory of a NUMA node for all buffers that are not prepared yet; without an effect on what they hold, and
    /// where the node is full, on where they are.
    pub(crate) fn prefer_node(&self, node: u32) -> std::io::Result<()> {
        self.shared.memory.prefer_node(node)
    }

    /// A free buffer, or `None` when all are in use. Prepares a step where no prepared buffer is free, and waits for
    /// those that other threads are preparing.
    pub fn try_acquire(&self) -> Option<HostBuffer> {
        let shared = &self.shared;
        let mut state = shared.lock();
        loop {
            if let Some(index) = state.free.pop() {
                return Some(shared.buffer(index, self));
            }
            let is_left = state.claimed_steps * shared.buffers_per_step < shared.buffers;
            if is_left && state.preparers == 0 {
                drop(state);
                shared.prepare_next();
                state = shared.lock();
            } else if is_left || state.preparing > 0 {
                state = shared.prepared.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                return None;
            }
        }
    }

    /// Prepares every step, by this many threads.
    pub fn prepare_all(&self, threads: usize) {
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // Where no thread can be had, this one does the work below.
                let _ = std::thread::Builder::new().spawn_scoped(scope, || self.prepare_while(|| true));
            }
            self.prepare_while(|| true);
        });
    }

    /// Prepares one step after the other while some are left and `goes_on` says so.
    pub(crate) fn prepare_while(&self, goes_on: impl Fn() -> bool) {
        self.shared.lock().preparers += 1;
        while goes_on() && self.shared.prepare_next() {}
        self.shared.lock().preparers -= 1;
        self.shared.prepared.notify_all();
    }

    /// Keeps what is pinned so, until it is dropped.
    pub(crate) fn hold(&self) -> Hold {
        self.shared.lock().holds += 1;
        Hold { shared: Arc::clone(&self.shared) }
    }

    /// Unpins all memory, whose bytes stay, and lets the device go that pinned it; `false` where there is none, or
    /// somebody holds the pool or prepares it. [`Hold::pin`] pins again.
    pub(crate) fn unpin(&self) -> bool {
        let shared = &self.shared;
        let steps = shared.lock().steps.len();
        for step in 0..steps {
            let Some((device, mut state)) = shared.unused() else { return false };
            if state.steps[step] != Pin::Pinned {
                continue;
            }
            state.steps[step] = Pin::Changing;
            drop(state);
            let (_, offset, len) = shared.step(step);
            // SAFETY: the range is mapped, and was pinned at this address; nobody copies out of it, since there was
            // no hold when the step was taken on, and whoever has one by now waits for the step.
            unsafe { device.unpin(shared.memory.ptr().add(offset).as_ptr()) };
            shared.pinned.fetch_sub(len as u64, Ordering::Relaxed);
            shared.settle(step, Pin::Plain, |_| ());
        }
        let Some((device, mut state)) = shared.unused() else { return false };
        if state.steps.iter().any(|step| *step != Pin::Plain) {
            // Somebody came and went meanwhile.
            return false;
        }
        state.device = None;
        state.gave_up = false;
        drop(state);
        // With the last holder the context goes, which may take its time.
        drop(device);
        true
    }

    /// Gives a ring's memory back: in the background where it is pinned, but not that of several rings at once, so that
    /// loads that follow each other leave one behind at most.
    pub(crate) fn release(self) {
        if self.pinned_len() > 0 {
            releases::release(self, 1);
        }
    }

    /// Says why there is no device that pins, until one has pinned.
    pub(crate) fn refuse(&self, reason: String) {
        self.shared.lock().refused = Some(reason);
    }

    /// Bytes of one buffer.
    pub fn buffer_len(&self) -> usize {
        self.shared.buffer_len
    }

    /// Bytes of all buffers.
    pub(crate) fn len(&self) -> usize {
        self.shared.buffer_len * self.shared.buffers
    }

    /// Buffers in all.
    pub fn buffers(&self) -> usize {
        self.shared.buffers
    }

    /// Bytes pinned so far.
    pub fn pinned_len(&self) -> u64 {
        self.shared.pinned.load(Ordering::Relaxed)
    }

    /// Why memory is not pinned, where the driver or a limit refused it, or a device could not be opened: the last
    /// refusal, until a pin after it succeeded.
    pub fn refusal(&self) -> Option<String> {
        self.shared.lock().refused.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; the state is whole even if it did.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Touches and pins the next step and frees its buffers; `false` when every step is somebody's.
    fn prepare_next(&self) -> bool {
        let mut state = self.lock();
        let first = state.claimed_steps * self.buffers_per_step;
        if first >= self.buffers {
            return false;
        }
        let step = state.claimed_steps;
        state.claimed_steps += 1;
        state.preparing += 1;
        state.steps[step] = Pin::Changing;
        let device = state.device.clone().filter(|_| !state.gave_up);
        drop(state);
        let (buffers, offset, len) = self.step(step);
        // SAFETY: the step lies in the mapping; it was claimed under the lock by this thread alone, and none of its
        // buffers has been handed out.
        unsafe { self.memory.touch(offset, len) };
        match device {
            Some(device) => self.pin(step, &device),
            None => self.settle(step, Pin::Plain, |_| ()),
        }
        let mut state = self.lock();
        state.free.extend(buffers.rev());
        state.preparing -= 1;
        drop(state);
        self.prepared.notify_all();
        true
    }

    /// The buffers of a step, and where its bytes are in the mapping.
    fn step(&self, step: usize) -> (Range<usize>, usize, usize) {
        let first = step * self.buffers_per_step;
        let last = (first + self.buffers_per_step).min(self.buffers);
        (first..last, first * self.buffer_len, (last - first) * self.buffer_len)
    }

    /// Pins a step that the caller has taken on.
    fn pin(&self, step: usize, device: &Device) {
        let (_, offset, len) = self.step(step);
        // SAFETY: the range is mapped until the pool is dropped, which unpins it first.
        let pin = || unsafe { device.pin(self.memory.ptr().add(offset).as_ptr(), len, false) };
        match releases::pin_beside(pin) {
            Ok(()) => {
                self.pinned.fetch_add(len as u64, Ordering::Relaxed);
                // A pin that began before another was refused is no news of what came after.
                self.settle(step, Pin::Pinned, |state| {
                    if !state.gave_up {
                        state.refused = None;
                    }
                });
            }
            Err(e) => self.settle(step, Pin::Plain, |state| {
                (state.gave_up, state.refused) = (true, Some(e.to_string()));
            }),
        }
    }

    /// Ends a change of a step; `note` says how it went.
    fn settle(&self, step: usize, pin: Pin, note: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        state.steps[step] = pin;
        note(&mut state);
        drop(state);
        self.prepared.notify_all();
    }

    /// The device that pins, while nobody uses the pool.
    fn unused(&self) -> Option<(Device, MutexGuard<'_, State>)> {
        let state = self.lock();
        let is_used = state.holds > 0 || state.preparers > 0 || state.preparing > 0;
        state.device.clone().filter(|_| !is_used).map(|device| (device, state))
    }

    fn buffer(&self, index: usize, pool: &BufferPool) -> HostBuffer {
        // SAFETY: `index` is below the number of buffers, so that the address is inside the mapping.
        let ptr = unsafe { self.memory.ptr().add(index * self.buffer_len) };
        HostBuffer { ptr, len: self.buffer_len, home: Home::Pool { shared: Arc::clone(&pool.shared), index } }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let state = std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        let Some(device) = state.device else { return };
        for (step, pin) in state.steps.iter().enumerate() {
            if *pin == Pin::Pinned {
                let (_, offset, _) = self.step(step);
                // SAFETY: pinned by `pin` at this address; no buffer is left, since each holds this value.
                unsafe { device.unpin(self.memory.ptr().add(offset).as_ptr()) };
            }
        }
    }
}

/// While it lives, what a pool has pinned stays pinned.
#[derive(Debug)]
pub(crate) struct Hold {
    shared: Arc<Shared>,
}

impl Hold {
    /// Pins the step of a buffer of this pool, if it is not: by the device that pins the others, else by this one.
    /// Where that was refused, memory stays as it is.
    pub(crate) fn pin(&self, buffer: &HostBuffer, device: &Device) {
        let Home::Pool { shared, index } = &buffer.home else { return };
        if !device.needs_pinning() || !Arc::ptr_eq(shared, &self.shared) {
            return;
        }
        let step = index / shared.buffers_per_step;
        let mut state = shared.lock();
        while state.steps[step] == Pin::Changing {
            state = shared.prepared.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.steps[step] == Pin::Pinned || state.gave_up {
            return;
        }
        state.steps[step] = Pin::Changing;
        let device = state.device.get_or_insert_with(|| device.clone()).clone();
        drop(state);
        shared.pin(step, &device);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.lock().holds -= 1;
    }
}

/// One buffer, owned by whoever has it. Dropping it gives it back.
#[derive(Debug)]
pub struct HostBuffer {
    ptr: NonNull<u8>,
    len: usize,
    home: Home,
}

/// Keeps a pool's memory mapped, without being one of its buffers.
#[derive(Debug)]
pub(crate) struct Keep {
    _shared: Arc<Shared>,
}

#[derive(Debug)]
enum Home {
    Pool {
        shared: Arc<Shared>,
        index: usize,
    },
    /// A range of a destination in host memory, which this keeps alive.
    Loan {
        _owner: Arc<dyn Any + Send + Sync>,
    },
}

// SAFETY: a buffer is the only way to its memory, so that moving it to another thread moves the memory with it.
unsafe impl Send for HostBuffer {}
// SAFETY: a shared borrow only reads the memory; writing takes a unique one.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// A buffer over a part of a destination, so that a read fills it without staging.
    ///
    /// # Safety
    /// `ptr..ptr+len` is writable memory that `owner` keeps alive, and nothing else reads or writes it while the
    /// buffer lives.
    pub(crate) unsafe fn loan(ptr: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> HostBuffer {
        HostBuffer { ptr, len, home: Home::Loan { _owner: owner } }
    }

    /// A hold on the mapping that it is a part of: while it lasts, the buffer's address stays that of the same pages.
    /// `None` for a part of a destination, which is its owner's to free.
    pub(crate) fn keep(&self) -> Option<Keep> {
        match &self.home {
            Home::Pool { shared, .. } => Some(Keep { _shared: Arc::clone(shared) }),
            Home::Loan { .. } => None,
        }
    }

    /// Whether its memory is pinned.
    pub(crate) fn is_pinned(&self) -> bool {
        let Home::Pool { shared, index } = &self.home else { return false };
        shared.lock().steps.get(index / shared.buffers_per_step) == Some(&Pin::Pinned)
    }

    /// Whether it is a part of a destination, which needs no copy once it is filled.
    pub(crate) fn is_loan(&self) -> bool {
        matches!(self.home, Home::Loan { .. })
    }

    /// Its bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory is mapped and initialised (anonymous pages are zero), and owned by this value.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// Its bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the value is borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if let Home::Pool { shared, index } = &self.home {
            shared.lock().free.push(*index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_belongs_to_one_holder_and_comes_back() {
        let pool = BufferPool::new(8192, 3, 8192, None).unwrap();
        let mut held: Vec<HostBuffer> = (0..3).map(|_| pool.try_acquire().unwrap()).collect();
        assert!(pool.try_acquire().is_none());
        for (i, buffer) in (1..).zip(&mut held) {
            buffer.as_mut_slice().fill(i);
        }
        assert!((1..).zip(&held).all(|(i, buffer)| buffer.as_slice().iter().all(|&x| x == i)));
        held.pop();
        assert!(pool.try_acquire().is_some());
    }

    #[test]
    fn threads_prepare_a_pool_together() {
        let pool = BufferPool::new(4096, 100, 16384, None).unwrap();
        pool.prepare_all(4);
        let all: Vec<_> = std::iter::from_fn(|| pool.try_acquire()).collect();
        let mut places: Vec<_> = all.iter().map(|b| b.as_slice().as_ptr()).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 100);
    }

    #[test]
    fn a_buffer_that_another_thread_prepares_is_waited_for() {
        for _ in 0..50 {
            // One step holds every buffer: whoever does not prepare it must not be told that there is none.
            let pool = BufferPool::new(1 << 20, 8, 8 << 20, None).unwrap();
            std::thread::scope(|scope| {
                let take = || pool.try_acquire().expect("eight threads share eight buffers");
                let held: Vec<_> = (0..8).map(|_| scope.spawn(take)).collect();
                held.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
        }
    }

    #[test]
    fn buffers_are_there_while_the_pool_is_prepared() {
        for _ in 0..50 {
            let pool = BufferPool::new(4096, 64, 8192, None).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| pool.prepare_all(3));
                let take = || std::iter::from_fn(|| pool.try_acquire()).collect::<Vec<_>>();
                let held: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
                let held: usize = held.into_iter().map(|thread| thread.join().unwrap().len()).sum();
                // A thread that ends gives its buffers back, so that another may have had them too.
                assert!(held >= 64, "{held}");
            });
            assert_eq!(std::iter::from_fn(|| pool.try_acquire()).collect::<Vec<_>>().len(), 64);
        }
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(BufferPool::new(4095, 1, 1, None).is_err());
        assert!(BufferPool::new(0, 1, 1, None).is_err());
        assert!(BufferPool::new(1 << 30, usize::MAX / 2, 1, None).is_err());
        assert!(BufferPool::new(4096, 0, 1, None).unwrap().try_acquire().is_none());
    }
}
