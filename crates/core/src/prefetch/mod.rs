//! Reading a checkpoint into the page cache before a load wants it, without being in anybody's way.
//!
//! An engine imports and spawns for half a minute before it asks for the first weight. A prefetch uses that time: it
//! takes no more memory than is free, pauses while others read, and ends when a load of the checkpoint begins, which
//! then finds a part in the page cache and reads the rest in its own way.

mod pace;
mod room;

pub use room::free_memory;
pub(crate) use room::memory;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::control::{Control, gb_per_s};
use crate::convert::chunks::Chunks;
use crate::convert::workers::for_each;
use crate::error::Result;
use crate::read::residency::is_cached;
use pace::Pace;

/// Bytes that one thread reads in order, so that the pages come in large units.
const STRIPE_LEN: u64 = 32 << 20;
/// Bytes of one read: few enough that another's read does not wait long behind those of all threads.
const READ_LEN: u64 = 512 << 10;
/// Threads: enough to keep a disk busy with reads of this size.
const THREADS: usize = 4;
/// How often a paused thread looks again.
const NAP: Duration = Duration::from_millis(20);
/// How often it is asked whether a load has begun.
const ASK: Duration = Duration::from_millis(50);

/// How to prefetch.
#[derive(Debug, Clone)]
pub struct PrefetchOptions {
    limit: Option<u64>,
    yields: bool,
    control: Control,
}

impl Default for PrefetchOptions {
    fn default() -> Self {
        PrefetchOptions { limit: None, yields: true, control: Control::new() }
    }
}

impl PrefetchOptions {
    /// The defaults: what memory is free, giving way to others.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of page cache at most; `None`: nine tenths of what the system and the control group have left.
    pub fn limit(mut self, limit: impl Into<Option<u64>>) -> Self {
        self.limit = limit.into();
        self
    }

    /// Whether it pauses while others read from the disks.
    pub fn yields(mut self, yields: bool) -> Self {
        self.yields = yields;
        self
    }

    /// Progress callback and cancel flag.
    pub fn control(mut self, control: Control) -> Self {
        self.control = control;
        self
    }
}

/// Why a prefetch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PrefetchEnd {
    /// The whole checkpoint is in the page cache.
    Complete,
    /// A load of the checkpoint began.
    Loading,
    /// The limit was reached.
    Limit,
}

/// What a prefetch did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PrefetchReport {
    /// The checkpoint.
    pub path: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// Bytes that were in the page cache already, of those that were looked at.
    pub cached_bytes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Why it ended.
    pub end: PrefetchEnd,
    /// Seconds it took.
    pub seconds: f64,
    /// Of those, paused while others read.
    pub paused_s: f64,
    /// `read_bytes` by the seconds in which it was not paused, in 1e9 bytes a second.
    pub gb_per_s: f64,
}

struct Run<'a> {
    checkpoint: &'a Checkpoint,
    pace: Pace,
    limit: u64,
    /// Bytes read, and those and the cached ones together.
    read: AtomicU64,
    seen: AtomicU64,
    /// Why it has ended, and when it was last asked whether a load has begun.
    end: Mutex<(Option<PrefetchEnd>, Option<Instant>)>,
}

impl Run<'_> {
    /// Whether it has ended; looks from time to time whether a load began.
    fn has_ended(&self) -> bool {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if end.0.is_none() && end.1.is_none_or(|asked| asked.elapsed() >= ASK) {
            end.1 = Some(Instant::now());
            if self.checkpoint.is_being_loaded() {
                end.0 = Some(PrefetchEnd::Loading);
            }
        }
        end.0.is_some()
    }

    /// Takes bytes of the limit; `false`, and the end, where they do not fit.
    fn take(&self, len: u64) -> bool {
        let with = |seen: u64| seen.checked_add(len).filter(|&seen| seen <= self.limit);
        let fits = self.seen.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with).is_ok();
        if !fits {
            self.end.lock().unwrap_or_else(PoisonError::into_inner).0.get_or_insert(PrefetchEnd::Limit);
        }
        fits
    }
}

/// Reads a checkpoint's files into the page cache, in their order.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) and [`Error::Truncated`](crate::Error::Truncated) where a file cannot be read;
/// [`Error::Cancelled`](crate::Error::Cancelled).
pub fn prefetch(checkpoint: &Checkpoint, options: &PrefetchOptions) -> Result<PrefetchReport> {
    let start = Instant::now();
    let stripes = Chunks::new(STRIPE_LEN, checkpoint.files().iter().map(|file| file.len()));
    let run = Run {
        checkpoint,
        pace: Pace::new(options.yields),
        limit: options.limit.or_else(room::available).unwrap_or(u64::MAX),
        read: AtomicU64::new(0),
        seen: AtomicU64::new(0),
        end: Mutex::new((None, None)),
    };
    let meter = options.control.meter(stripes.total_len());
    meter.check()?;
    for_each(THREADS, stripes.count(), READ_LEN, |number, buffer| {
        if run.has_ended() {
            return Ok(());
        }
        let stripe = stripes.get(number);
        let file = &checkpoint.files()[stripe.file];
        // Asked before the first read: after it the system reads ahead, for us.
        let reads = (0..stripe.len.div_ceil(READ_LEN)).map(|number| {
            let (offset, len) = (stripe.offset + number * READ_LEN, READ_LEN.min(stripe.len - number * READ_LEN));
            (offset, len, is_cached(file, offset, len) == Some(true))
        });
        for (offset, len, is_there) in reads.collect::<Vec<_>>() {
            while !is_there && !run.has_ended() && !run.pace.may_read(run.read.load(Ordering::Relaxed)) {
                std::thread::sleep(NAP);
                meter.check()?;
            }
            if run.has_ended() || !run.take(len) {
                break;
            }
            if !is_there {
                file.read_exact_at(buffer.get(len), offset)?;
                run.read.fetch_add(len, Ordering::Relaxed);
            }
            meter.add(len)?;
        }
        Ok(())
    })?;
    let (end, _) = run.end.into_inner().unwrap_or_else(PoisonError::into_inner);
    let read_bytes = run.read.into_inner();
    let (seconds, paused_s) = (start.elapsed().as_secs_f64(), run.pace.waited().as_secs_f64());
    Ok(PrefetchReport {
        path: checkpoint.path().display().to_string(),
        bytes: stripes.total_len(),
        cached_bytes: run.seen.into_inner().saturating_sub(read_bytes),
        read_bytes,
        end: end.unwrap_or(PrefetchEnd::Complete),
        seconds,
        paused_s,
        gb_per_s: gb_per_s(read_bytes, seconds - paused_s),
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use crate::load::Loader;

    const LEN: u64 = 70 << 20;

    /// A checkpoint of one large file, out of the page cache as far as the system obeys.
    fn uncached() -> (tempfile::TempDir, Checkpoint) {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("model.safetensors");
        let bytes = test_support::safetensors(test_support::header(LEN), &[]);
        fs::write(&path, &bytes).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes.len() as u64 + LEN).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        (dir, Checkpoint::open(&path).unwrap())
    }

    fn cached_reads(checkpoint: &Checkpoint) -> usize {
        let file = &checkpoint.files()[0];
        (0..file.len() / READ_LEN).filter(|i| is_cached(file, i * READ_LEN, READ_LEN) != Some(false)).count()
    }

    #[test]
    fn all_of_it_is_in_the_page_cache_afterwards() {
        let (_dir, checkpoint) = uncached();
        let report = prefetch(&checkpoint, &PrefetchOptions::new().yields(false)).unwrap();
        assert_eq!(report.end, PrefetchEnd::Complete);
        assert_eq!(report.cached_bytes + report.read_bytes, report.bytes);
        assert_eq!(report.bytes, checkpoint.files()[0].len());
        assert_eq!(cached_reads(&checkpoint), 140);
        let again = prefetch(&checkpoint, &PrefetchOptions::new().yields(false)).unwrap();
        assert_eq!((again.read_bytes, again.cached_bytes), (0, again.bytes));
    }

    #[test]
    fn it_reads_no_more_than_its_limit() {
        let (_dir, checkpoint) = uncached();
        for (limit, fits) in [(5 << 20, 5 << 20), ((5 << 20) + 1, 5 << 20), (READ_LEN - 1, 0)] {
            let report = prefetch(&checkpoint, &PrefetchOptions::new().limit(limit).yields(false)).unwrap();
            assert_eq!(report.end, PrefetchEnd::Limit);
            assert_eq!(report.cached_bytes + report.read_bytes, fits, "what did not fit was not looked at: {report:?}");
        }
    }

    #[test]
    fn it_ends_when_a_load_begins_and_not_for_loads_that_are_over() {
        let (_dir, checkpoint) = uncached();
        let loader = Loader::builder().build().unwrap();
        let session = loader.session(std::sync::Arc::new(Checkpoint::open(checkpoint.path()).unwrap())).unwrap();
        assert!(checkpoint.is_being_loaded());
        let run = || prefetch(&checkpoint, &PrefetchOptions::new().yields(false)).unwrap();
        let report = run();
        assert_eq!((report.end, report.read_bytes), (PrefetchEnd::Loading, 0));
        drop(session);
        assert!(!checkpoint.is_being_loaded());
        assert_eq!(run().end, PrefetchEnd::Complete);
    }

    #[test]
    fn a_cut_file_is_an_error() {
        let (_dir, checkpoint) = uncached();
        let file = File::options().write(true).open(checkpoint.path()).unwrap();
        file.set_len(1 << 20).unwrap();
        let result = prefetch(&checkpoint, &PrefetchOptions::new().yields(false));
        assert!(matches!(result, Err(crate::Error::Truncated { .. })), "{result:?}");
    }
}
