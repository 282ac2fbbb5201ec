//! A load that grows while it runs.
//!
//! An engine that slices weights itself tells what it wants tensor by tensor. What has been told waits in a batch; a
//! thread takes the batch and moves it while the next one gathers. So the disk and the link work while the engine
//! still plans, and few batches carry a whole model.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{LoadReport, Loader, Staging};
use crate::checkpoint::Checkpoint;
use crate::control::{Cancel, Progress};
use crate::device::Block;
use crate::error::{Error, Result};
use crate::plan::{Segment, destinations_meet};

/// Bytes that a batch should have: fewer are not worth starting the readers for.
const BATCH_LEN: u64 = 128 << 20;
/// The same where a remote moves it: it is asked once a batch.
const REMOTE_BATCH_LEN: u64 = 512 << 20;

/// A load to which segments are added while it runs. Make one by [`Loader::session`].
///
/// What was added later is written later: two segments may go to the same place. Dropping a session stops it; no byte
/// is written after that.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    /// Lengths of the checkpoint's files.
    files: Vec<u64>,
    cancel: Cancel,
    started: Instant,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    batch_len: u64,
    /// Bytes read by the batches that are done, and by the one that moves.
    read_before: AtomicU64,
    read_now: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Waiting; the last one is still open.
    batches: VecDeque<Batch>,
    moving: bool,
    /// Batches that were moved.
    moved: u64,
    /// Someone waits until so many were moved: these move, however little they have.
    wanted: u64,
    closed: bool,
    /// The worker is gone.
    ended: bool,
    failed: bool,
    error: Option<Error>,
    report: Option<LoadReport>,
}

#[derive(Debug, Default)]
struct Batch {
    segments: Vec<Segment>,
    blocks: Vec<Block>,
    /// Places of blocks by their address; several devices may have the same. Those of one device lie apart.
    places: BTreeMap<u64, Vec<usize>>,
    /// By block.
    taken: Vec<Taken>,
    len: u64,
}

/// The segments of a batch that go to one block. No two of them begin at one place.
#[derive(Debug, Default)]
struct Taken {
    by_start: BTreeMap<u64, Segment>,
    /// The furthest end, and the most bytes from a segment's start to its end.
    end: u64,
    longest: u64,
}

impl Taken {
    /// Takes a segment; `false` where it writes what another one writes.
    fn add(&mut self, segment: Segment) -> bool {
        let (start, end) = (segment.dst_offset, segment.dst_end());
        // Most come in ascending order. Those that begin further before cannot reach it.
        let meets = |(_, other): (&u64, &Segment)| destinations_meet(other, &segment);
        if start < self.end && self.by_start.range(start.saturating_sub(self.longest)..end).any(meets) {
            return false;
        }
        self.end = self.end.max(end);
        self.longest = self.longest.max(end - start);
        self.by_start.insert(start, segment);
        true
    }
}

impl Batch {
    /// The place of a block, which is added where it is new; `None` where it shares bytes with another one.
    fn place_of(&mut self, block: &Block) -> Option<usize> {
        let is_near = |&&place: &&usize| self.blocks[place].device().same_as(block.device());
        let end = block.addr().saturating_add(block.len());
        // Of those that begin before its end the last one is the only one that can reach it.
        let mut before = self.places.range(..end).rev().flat_map(|(_, places)| places);
        if let Some(&place) = before.find(is_near) {
            let other = &self.blocks[place];
            if other.is_same_as(block) {
                return Some(place);
            }
            if other.addr().saturating_add(other.len()) > block.addr() {
                return None;
            }
        }
        let place = self.blocks.len();
        self.places.entry(block.addr()).or_default().push(place);
        self.blocks.push(block.clone());
        self.taken.push(Taken::default());
        Some(place)
    }

    /// Adds a segment; `false` where it writes what another one of the batch writes, or may.
    fn add(&mut self, block: &Block, segment: Segment) -> bool {
        let Some(place) = self.place_of(block) else { return false };
        let segment = Segment { block: place, ..segment };
        if !self.taken[place].add(segment) {
            return false;
        }
        self.segments.push(segment);
        self.len = self.len.saturating_add(segment.len());
        true
    }
}

impl State {
    /// Whether the first batch is to be moved now, where none moves.
    fn is_ready(&self, batch_len: u64) -> bool {
        let Some(first) = self.batches.front() else { return false };
        self.moved < self.wanted || self.closed || self.batches.len() > 1 || first.len >= batch_len
    }

    /// Batches that were ever added to, the open one too.
    fn added(&self) -> u64 {
        self.moved + u64::from(self.moving) + self.batches.len() as u64
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch that is worth moving; `None` when the session is over.
    fn next(&self) -> Option<Batch> {
        let mut state = self.lock();
        loop {
            if state.is_ready(self.batch_len) {
                state.moving = true;
                return state.batches.pop_front();
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn moved(&self, result: Result<LoadReport>) {
        let mut state = self.lock();
        state.moving = false;
        state.moved += 1;
        match result {
            Ok(report) => match &mut state.report {
                Some(sum) => sum.add(report),
                None => state.report = Some(report),
            },
            Err(error) => {
                state.error = Some(error);
                state.failed = true;
                state.batches.clear();
            }
        }
        self.read_before.fetch_add(self.read_now.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        self.changed.notify_all();
    }
}

/// Tells those who wait that the worker is gone, also when it panicked.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl Session {
    pub(super) fn start(mut loader: Loader, checkpoint: Arc<Checkpoint>) -> Result<Session> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            batch_len: if loader.helper.is_some() { REMOTE_BATCH_LEN } else { BATCH_LEN },
            read_before: AtomicU64::new(0),
            read_now: AtomicU64::new(0),
        });
        let cancel = Cancel::new();
        let (outer, meter) = (loader.control.clone(), Arc::clone(&shared));
        let tell = move |progress: Progress| {
            meter.read_now.fetch_max(progress.done, Ordering::Relaxed);
            outer.tell(progress);
        };
        loader.control = loader.control.on_progress(tell).cancelled_by(cancel.clone());
        let files = checkpoint.files().iter().map(|file| file.len()).collect();
        // The first batch is still to gather.
        loader.prepare(&checkpoint);
        let (path, work) = (checkpoint.path().to_owned(), Arc::clone(&shared));
        let lock = checkpoint.lock_for_load();
        let work = move || {
            let end = End(&work);
            let _lock = lock;
            let mut staging = Staging::default();
            while let Some(batch) = end.0.next() {
                end.0.moved(loader.run(&checkpoint, &batch.segments, batch.blocks, &mut staging));
            }
        };
        let worker = std::thread::Builder::new().name("sllm-session".into()).spawn(work);
        let worker = worker.map_err(Error::io("start a session's thread for", &path))?;
        Ok(Session { shared, files, cancel, started: Instant::now(), worker: Some(worker) })
    }

    /// Adds segments that go to `block`, whose own `block` is not looked at. They move soon; [`Session::wait`] says
    /// when they have arrived. An error is that of bytes added before.
    pub fn add(&self, block: &Block, segments: impl IntoIterator<Item = Segment>) -> Result<()> {
        let mut state = self.shared.lock();
        check(&mut state)?;
        for segment in segments.into_iter().filter(|segment| !segment.is_empty()) {
            Segment { block: 0, ..segment }.check(&self.files, &[block.len()])?;
            if !state.batches.back_mut().is_some_and(|batch| batch.add(block, segment)) {
                let mut batch = Batch::default();
                batch.add(block, segment);
                state.batches.push_back(batch);
            }
        }
        if state.is_ready(self.shared.batch_len) && !state.moving {
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// Waits until all that was added before has arrived.
    pub fn wait(&self) -> Result<()> {
        while !self.wait_for(Duration::from_secs(3600))? {}
        Ok(())
    }

    /// Waits until all that was added before has arrived, or for so long; whether it has arrived. Several threads may wait,
    /// and none waits for what is added meanwhile.
    pub fn wait_for(&self, limit: Duration) -> Result<bool> {
        let mut state = self.shared.lock();
        let target = state.added();
        state.wanted = state.wanted.max(target);
        self.shared.changed.notify_all();
        let under_way = |s: &mut State| !s.failed && !s.ended && s.moved < target;
        let waited = self.shared.changed.wait_timeout_while(state, limit, under_way);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if under_way(&mut state) {
            return Ok(false);
        }
        check(&mut state).map(|()| true)
    }

    /// Bytes read so far.
    pub fn read_len(&self) -> u64 {
        let shared = &self.shared;
        shared.read_before.load(Ordering::Relaxed) + shared.read_now.load(Ordering::Relaxed)
    }

    /// A flag that stops the session.
    pub fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Waits for all, and reports; `None` where nothing was added. Staging memory is given back.
    pub fn finish(mut self) -> Result<Option<LoadReport>> {
        self.wait()?;
        self.close();
        let mut report = self.shared.lock().report.take();
        if let Some(report) = &mut report {
            report.seconds = self.started.elapsed().as_secs_f64();
        }
        Ok(report)
    }

    fn close(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(worker) = self.worker.take() {
            // A panic was told as an error by `check`.
            let _ = worker.join();
        }
    }
}

fn check(state: &mut State) -> Result<()> {
    match state.error.take() {
        Some(error) => Err(error),
        None if state.failed => Err(Error::Invalid("the session failed before".into())),
        None if state.ended => Err(Error::Invalid("the session's thread is gone".into())),
        None => Ok(()),
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.shared.lock().batches.clear();
        self.close();
    }
}

#[cfg(test)]
mod tests;
