//! A load by somebody else, such as a store server, tried before files are read.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{LoadReport, Loader};
use crate::checkpoint::Checkpoint;
use crate::control::Control;
use crate::device::Block;
use crate::error::Result;
use crate::plan::{LoadPlan, PlanOptions, Segment};

/// Somebody who moves bytes of a checkpoint in place of the loader.
pub trait Remote: Send + Sync + fmt::Debug {
    /// Moves segments of the checkpoint's files into blocks, one for each that segments name, and waits.
    ///
    /// After an error nothing more is written to the blocks: the loader then fills them from the files. Progress goes to
    /// `control`, and what it says of stopping is [`crate::Error::Cancelled`] or
    /// [`crate::Error::TimedOut`].
    fn fill(
        &self,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        blocks: &[Block],
        control: &Control,
    ) -> Result<RemoteReport>;
}

/// What a [`Remote`] did.
#[derive(Debug, Clone, Default)]
pub struct RemoteReport {
    /// Who did it, for reports, such as `the store server at unix:/run/sllm-store.sock`.
    pub by: String,
    /// Bytes that were already in its memory.
    pub from_memory: u64,
    /// Bytes that it read from files.
    pub from_files: u64,
    /// Whether checksums were compared when the bytes came from files.
    pub verified: bool,
}

/// A loader's remote, until it fails.
#[derive(Debug)]
pub(super) struct Helper {
    remote: Box<dyn Remote>,
    /// Why it failed: files are read from then on.
    failed: OnceLock<String>,
    /// Whether a report has noted that.
    noted: AtomicBool,
}

impl Helper {
    pub(super) fn new(remote: Box<dyn Remote>) -> Helper {
        Helper { remote, failed: OnceLock::new(), noted: AtomicBool::new(false) }
    }

    /// Tries to have the segments moved; `None` where files are to be read.
    pub(super) fn fill(
        &self,
        loader: &Loader,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        blocks: &[Block],
    ) -> Result<Option<LoadReport>> {
        if self.failed.get().is_some() {
            return Ok(None);
        }
        let started = Instant::now();
        let files: Vec<u64> = checkpoint.files().iter().map(|file| file.len()).collect();
        let lens: Vec<u64> = blocks.iter().map(Block::len).collect();
        // Checks every number, joins neighbours, and drops what is empty.
        let segments = LoadPlan::segments(&files, &lens, segments, &PlanOptions::default())?;
        if segments.is_empty() {
            return Ok(None);
        }
        let plan_s = started.elapsed().as_secs_f64();
        let result = self.remote.fill(checkpoint, &segments, blocks, &loader.control);
        // The caller's own stop is not the remote's failure.
        loader.control.check()?;
        match result {
            Ok(report) if loader.wishes.verify && !report.verified => {
                self.fail(format!("{} does not verify", report.by));
                Ok(None)
            }
            Ok(report) => {
                let wanted = segments.iter().map(Segment::len).sum();
                let mut report = LoadReport::of_remote(loader, checkpoint, report, wanted, segments.len());
                (report.plan_s, report.seconds) = (plan_s, started.elapsed().as_secs_f64());
                report.move_s = report.seconds - plan_s;
                if let Some(engine) = report.engines.first_mut() {
                    engine.seconds = report.move_s;
                }
                Ok(Some(report))
            }
            Err(error) => {
                self.fail(error.chain());
                Ok(None)
            }
        }
    }

    fn fail(&self, why: String) {
        // Of several failures at once the first counts.
        let _ = self.failed.set(why);
    }

    /// Why files are read, where it failed.
    pub(super) fn failure(&self) -> Option<String> {
        self.failed.get().cloned()
    }

    /// The same as a note, for one report.
    pub(super) fn note(&self) -> Option<String> {
        let why = self.failed.get().filter(|_| !self.noted.swap(true, Ordering::Relaxed))?;
        Some(format!("{why}; files are read"))
    }
}
