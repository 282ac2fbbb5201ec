//! What a load moved, how, why so, and how fast.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::lane::LaneTimes;
use crate::checkpoint::Checkpoint;
use crate::control::gb_per_s;
use crate::device::Device;
use crate::plan::LoadPlan;
use crate::read::choose::Share;

/// The report of one load. Times are seconds, rates GB/s (1e9 bytes).
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct LoadReport {
    /// The checkpoint's path.
    pub path: String,
    /// Its layout: `store`, `safetensors` or `original`.
    pub layout: &'static str,
    /// Devices, such as `cuda:0`.
    pub devices: Vec<String>,
    /// Their descriptions, such as the card's name.
    pub device_names: Vec<String>,
    /// Bytes that arrived on devices.
    pub bytes: u64,
    /// Bytes that were read from files: more where ranges were rounded to pages or chunks were verified.
    pub read_bytes: u64,
    /// Tensors.
    pub tensors: u64,
    /// Reads.
    pub pieces: u64,
    /// Copies to devices.
    pub copies: u64,
    /// Whether checksums were compared.
    pub verified: bool,
    /// From the start of planning to the last byte on its device.
    pub seconds: f64,
    /// Of that, planning and asking what is cached.
    pub plan_s: f64,
    /// Allocating device memory; 0 where the caller did.
    pub alloc_s: f64,
    /// Reading and copying, which overlap.
    pub move_s: f64,
    /// Staging memory that was pinned.
    pub pinned_bytes: u64,
    /// The stage that held the load back: `read`, `copy`, `verify` or `pin`.
    pub limit: &'static str,
    /// What each engine did.
    pub engines: Vec<EngineReport>,
    /// What did not work and was done in another way.
    pub notes: Vec<String>,
}

/// One engine's share of a load.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct EngineReport {
    /// `uring`, `pread` or `mapped`.
    pub engine: &'static str,
    /// Whether it passed the page cache.
    pub direct: bool,
    /// Why it was chosen.
    pub reason: String,
    /// Bytes that it read.
    pub bytes: u64,
    /// Its threads.
    pub threads: usize,
    /// From its first thread's start to its last one's end.
    pub seconds: f64,
    /// Parts of its threads' time, 0 to 1: reading.
    pub reading: f64,
    /// Waiting for copies.
    pub waiting: f64,
    /// Issuing copies; on the host device, copying.
    pub copying: f64,
    /// Taking checksums.
    pub verifying: f64,
    /// Making and pinning buffers.
    pub pinning: f64,
}

impl EngineReport {
    /// Adds what the engine did in a later load; parts of time count by its seconds, and the larger load tells why.
    fn add(&mut self, next: EngineReport) {
        let seconds = (self.seconds + next.seconds).max(f64::MIN_POSITIVE);
        let mean = |a: f64, b: f64| (a * self.seconds + b * next.seconds) / seconds;
        *self = EngineReport {
            reading: mean(self.reading, next.reading),
            waiting: mean(self.waiting, next.waiting),
            copying: mean(self.copying, next.copying),
            verifying: mean(self.verifying, next.verifying),
            pinning: mean(self.pinning, next.pinning),
            engine: self.engine,
            direct: self.direct,
            bytes: self.bytes + next.bytes,
            threads: self.threads.max(next.threads),
            seconds: self.seconds + next.seconds,
            reason: if next.bytes > self.bytes { next.reason } else { std::mem::take(&mut self.reason) },
        };
    }

    /// GB/s of its reads.
    pub fn gb_per_s(&self) -> f64 {
        gb_per_s(self.bytes, self.seconds)
    }
}

/// What the threads of the engine that took longest did most.
fn limit(engines: &[EngineReport]) -> &'static str {
    let slowest = engines.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    slowest.map_or("read", |e| {
        let parts = [("read", e.reading), ("copy", e.waiting + e.copying), ("verify", e.verifying), ("pin", e.pinning)];
        parts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("read", |part| part.0)
    })
}

impl LoadReport {
    pub(super) fn new(
        checkpoint: &Checkpoint,
        devices: &[Device],
        plan: &LoadPlan,
        shares: &[Share<'_>],
        lanes: &[(usize, LaneTimes)],
    ) -> LoadReport {
        let engines: Vec<EngineReport> = shares
            .iter()
            .enumerate()
            .map(|(number, share)| {
                let mine = || lanes.iter().filter(|(n, _)| *n == number).map(|(_, times)| times);
                let sum = |part: fn(&LaneTimes) -> Duration| mine().map(part).sum::<Duration>().as_secs_f64();
                let total = sum(|t| t.total).max(f64::MIN_POSITIVE);
                let (waiting, copying) = (sum(|t| t.copy_wait) / total, sum(|t| t.copy) / total);
                let (verifying, pinning) = (sum(|t| t.verify) / total, sum(|t| t.prepare) / total);
                EngineReport {
                    engine: share.name,
                    direct: share.direct,
                    reason: share.reason.clone(),
                    bytes: share.pieces.iter().map(|piece| piece.len).sum(),
                    threads: share.lanes,
                    seconds: mine().map(|t| t.total).max().unwrap_or_default().as_secs_f64(),
                    reading: (1.0 - waiting - copying - verifying - pinning).max(0.0),
                    waiting,
                    copying,
                    verifying,
                    pinning,
                }
            })
            .collect();
        LoadReport {
            path: checkpoint.path().display().to_string(),
            layout: checkpoint.layout().name(),
            devices: devices.iter().map(Device::id).collect(),
            device_names: devices.iter().map(Device::description).collect(),
            bytes: plan.wanted_len(),
            read_bytes: plan.read_len(),
            tensors: 0,
            pieces: plan.pieces().len() as u64,
            copies: plan.copy_count() as u64,
            verified: false,
            seconds: 0.0,
            plan_s: 0.0,
            alloc_s: 0.0,
            move_s: 0.0,
            pinned_bytes: 0,
            limit: limit(&engines),
            engines,
            notes: Vec::new(),
        }
    }

    /// Adds a load of the same checkpoint that ran after this one.
    pub(super) fn add(&mut self, next: LoadReport) {
        self.bytes += next.bytes;
        self.read_bytes += next.read_bytes;
        self.tensors += next.tensors;
        self.pieces += next.pieces;
        self.copies += next.copies;
        self.seconds += next.seconds;
        self.plan_s += next.plan_s;
        self.alloc_s += next.alloc_s;
        self.move_s += next.move_s;
        self.pinned_bytes = self.pinned_bytes.max(next.pinned_bytes);
        for engine in next.engines {
            match self.engines.iter_mut().find(|e| (e.engine, e.direct) == (engine.engine, engine.direct)) {
                Some(same) => same.add(engine),
                None => self.engines.push(engine),
            }
        }
        self.limit = limit(&self.engines);
        for note in next.notes {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
    }

    /// Adds the seconds that allocating the blocks took, where that was not part of the load.
    pub fn add_alloc(&mut self, seconds: f64) {
        self.alloc_s += seconds;
        self.seconds += seconds;
    }

    /// GB/s of the whole load.
    pub fn gb_per_s(&self) -> f64 {
        gb_per_s(self.bytes, self.seconds)
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        writeln!(f, "loaded {} ({}) to {}", self.path, self.layout, self.devices.join(", "))?;
        writeln!(
            f,
            "  {:.3} GB, {} tensors in {:.3} s: {:.2} GB/s, limited by {}",
            gb(self.bytes),
            self.tensors,
            self.seconds,
            self.gb_per_s(),
            self.limit
        )?;
        writeln!(
            f,
            "  plan {:.4} s ({} reads, {} copies), allocate {:.4} s, read and copy {:.3} s ({:.2} GB/s){}",
            self.plan_s,
            self.pieces,
            self.copies,
            self.alloc_s,
            self.move_s,
            gb_per_s(self.bytes, self.move_s),
            if self.verified { ", verified" } else { "" }
        )?;
        for e in &self.engines {
            writeln!(
                f,
                "  {}{}: {:.3} GB by {} threads, {:.2} GB/s; {}",
                e.engine,
                if e.direct { " (direct)" } else { "" },
                gb(e.bytes),
                e.threads,
                e.gb_per_s(),
                e.reason
            )?;
            writeln!(
                f,
                "    threads' time: {:.0} % reading, {:.0} % waiting for copies, {:.0} % copying, {:.0} % verifying, {:.0} % pinning",
                e.reading * 100.0,
                e.waiting * 100.0,
                e.copying * 100.0,
                e.verifying * 100.0,
                e.pinning * 100.0
            )?;
        }
        if self.pinned_bytes > 0 {
            writeln!(f, "  pinned {:.1} MB of staging memory", self.pinned_bytes as f64 / 1e6)?;
        }
        for note in &self.notes {
            writeln!(f, "  note: {note}")?;
        }
        Ok(())
    }
}
