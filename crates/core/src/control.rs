//! How a caller watches and stops long work.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use crate::error::{Error, Result};

/// A flag by which another thread stops work. Clones are the same flag.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A flag that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the work to stop; it returns [`Error::Cancelled`] soon.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// How far work has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// A progress callback and cancel flags, given to every long operation.
///
/// The callback runs in worker threads, once a finished piece (a few MiB), and must be quick.
#[derive(Clone, Default)]
pub struct Control {
    cancels: Vec<Cancel>,
    deadline: Option<Instant>,
    progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
}

impl Control {
    /// No callback, never cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `progress` as bytes get done.
    pub fn on_progress(mut self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Stops when this flag is set, too.
    pub fn cancelled_by(mut self, cancel: Cancel) -> Self {
        self.cancels.push(cancel);
        self
    }

    /// Stops with [`Error::TimedOut`] at this moment, too: no copy is issued after it.
    pub fn until(mut self, deadline: Instant) -> Self {
        self.deadline = Some(self.deadline.map_or(deadline, |before| before.min(deadline)));
        self
    }

    /// An error when the work is to stop. Whoever does the work for a [`crate::Remote`] asks now and then.
    pub fn check(&self) -> Result<()> {
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Error::TimedOut);
        }
        self.cancels.iter().try_for_each(Cancel::check)
    }

    /// When it is out of time, if ever.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Calls the progress callback.
    pub fn tell(&self, progress: Progress) {
        if let Some(callback) = &self.progress {
            callback(progress);
        }
    }

    /// The same for a part of the work, with so many bytes before it and after it.
    pub(crate) fn part(&self, before: u64, after: u64) -> Control {
        let mut part = self.clone();
        if let Some(tell) = part.progress.take() {
            let whole = move |Progress { done, total }| {
                let (done, total) = (done.saturating_add(before), total.saturating_add(before).saturating_add(after));
                tell(Progress { done, total });
            };
            part.progress = Some(Arc::new(whole));
        }
        part
    }

    pub(crate) fn meter(&self, total: u64) -> Meter<'_> {
        Meter { control: self, done: AtomicU64::new(0), total }
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("cancels", &self.cancels).finish_non_exhaustive()
    }
}

/// Threads that convert, export and verify where the caller asks for no number. They wait for the disk more than they
/// compute, so that the number of processors does not matter (`docs/benchmarks.md`).
const DEFAULT_THREADS: usize = 8;

/// Threads at most, of any work: more than any disk or link needs, and few enough that each has its memory.
const MAX_THREADS: usize = 256;

/// The threads that a caller asks for, where they can be had.
pub(crate) fn check_threads(threads: usize) -> Result<usize> {
    let refused = || Error::Invalid(format!("{threads} threads are asked for: give 1 to {MAX_THREADS} threads"));
    if (1..=MAX_THREADS).contains(&threads) { Ok(threads) } else { Err(refused()) }
}

/// How long work on files runs: its threads, how it is watched and stopped.
#[derive(Debug, Clone, Default)]
pub struct WorkOptions {
    threads: Option<usize>,
    pub(crate) control: Control,
}

impl WorkOptions {
    /// The defaults: eight threads.
    pub fn new() -> Self {
        Self::default()
    }

    /// Threads, 1 to 256; `None`: eight.
    pub fn threads(mut self, threads: impl Into<Option<usize>>) -> Self {
        self.threads = threads.into();
        self
    }

    /// Progress callback and cancel flag.
    pub fn control(mut self, control: Control) -> Self {
        self.control = control;
        self
    }

    /// The number of threads; an error where it is none that can be.
    pub(crate) fn thread_count(&self) -> Result<usize> {
        check_threads(self.threads.unwrap_or(DEFAULT_THREADS))
    }
}

/// Bytes by seconds, in 1e9 bytes a second; 0 of no time.
pub(crate) fn gb_per_s(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { bytes as f64 / 1e9 / seconds } else { 0.0 }
}

/// Counts bytes done by several threads and tells the callback.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    control: &'a Control,
    done: AtomicU64,
    total: u64,
}

impl Meter<'_> {
    /// Adds finished bytes; an error when the work was cancelled.
    pub(crate) fn add(&self, bytes: u64) -> Result<()> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.control.tell(Progress { done: done.min(self.total), total: self.total });
        self.check()
    }

    /// An error when the work was cancelled.
    pub(crate) fn check(&self) -> Result<()> {
        self.control.check()
    }
}
