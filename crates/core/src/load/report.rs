//! What a load moved, how, why so, and how fast.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::lane::LaneTimes;
use super::{Loader, RemoteReport};
use crate::checkpoint::Checkpoint;
use crate::control::gb_per_s;
use crate::device::{Device, LinkPeak};
use crate::plan::LoadPlan;
use crate::read::choose::{PINNED_MEMORY, Share};

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
    /// Of those, bytes that were in the cache, or that another load read into it.
    pub cached_bytes: u64,
    /// Tensors; 0 for a session, which is told of rows.
    pub tensors: u64,
    /// Reads.
    pub pieces: u64,
    /// Copies to devices.
    pub copies: u64,
    /// Whether checksums were compared.
    pub verified: bool,
    /// Of the bytes read, those of chunks whose checksums the devices took, of what had arrived there. The processor adds
    /// padding and odd ends, and takes the others.
    pub device_verified_bytes: u64,
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
    /// The NUMA node that the devices are at: staging memory was asked for there, and reader threads kept there, as far
    /// as notes say nothing else. `None` where the host has one node, or the devices are at no one that is known.
    pub numa_node: Option<u32>,
    /// The stage that held the load back: reading from the `disk` or the `page cache`, copying over the `link` (to the
    /// host: to `memory`), to `verify`, or to `pin`.
    pub limit: &'static str,
    /// The engine whose threads were held back.
    pub limit_engine: &'static str,
    /// The peak of the link, where [`LoadReport::add_link`] gave it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_gb_per_s: Option<f64>,
    /// The day on which that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_measured: Option<String>,
    /// The load's GB/s as a part of that, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_link: Option<f64>,
    /// What each engine did.
    pub engines: Vec<EngineReport>,
    /// Why a [`crate::Remote`] did not move the bytes, where it failed, in this load or before, and files were read.
    pub fell_back: Option<String>,
    /// What did not work and was done in another way.
    pub notes: Vec<String>,
}

/// One engine's share of a load.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct EngineReport {
    /// `uring`, `pread`, `mapped`, `cache`, or `server`.
    pub engine: &'static str,
    /// Whether it passed the page cache.
    pub direct: bool,
    /// Where its bytes were: `page cache`, `disk` or `pinned memory`.
    pub source: &'static str,
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
            source: if next.bytes > self.bytes { next.source } else { self.source },
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

/// What the threads of the engine that took longest did most, and that engine; nothing held back a load of no bytes.
fn limit(engines: &[EngineReport], devices: &[String]) -> (&'static str, &'static str) {
    let copy = if devices.iter().all(|device| device == "host") { "memory" } else { "link" };
    let slowest = engines.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    slowest.map_or(("nothing", "none"), |e| {
        let parts = [(copy, e.waiting + e.copying), ("verify", e.verifying), ("pin", e.pinning)];
        let most = |a: (&'static str, f64), b: (&'static str, f64)| if b.1 > a.1 { b } else { a };
        (parts.into_iter().fold((e.source, e.reading), most).0, e.engine)
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
                    source: share.source,
                    reason: share.reason.clone(),
                    bytes: share.pieces.iter().map(|piece| piece.len).sum(),
                    threads: mine().count(),
                    seconds: mine().map(|t| t.total).max().unwrap_or_default().as_secs_f64(),
                    reading: (1.0 - waiting - copying - verifying - pinning).max(0.0),
                    waiting,
                    copying,
                    verifying,
                    pinning,
                }
            })
            .collect();
        let devices_named: Vec<String> = devices.iter().map(Device::id).collect();
        let (limit, limit_engine) = limit(&engines, &devices_named);
        LoadReport {
            path: checkpoint.path().display().to_string(),
            layout: checkpoint.layout().name(),
            devices: devices_named,
            device_names: devices.iter().map(Device::description).collect(),
            bytes: plan.wanted_len(),
            read_bytes: plan.read_len(),
            cached_bytes: 0,
            tensors: 0,
            pieces: plan.pieces().len() as u64,
            copies: plan.copy_count() as u64,
            verified: false,
            device_verified_bytes: 0,
            seconds: 0.0,
            plan_s: 0.0,
            alloc_s: 0.0,
            move_s: 0.0,
            pinned_bytes: 0,
            numa_node: None,
            limit,
            limit_engine,
            link_gb_per_s: None,
            link_measured: None,
            of_link: None,
            engines,
            fell_back: None,
            notes: Vec::new(),
        }
    }

    /// Of a load that a remote did.
    pub(super) fn of_remote(
        loader: &Loader,
        checkpoint: &Checkpoint,
        remote: RemoteReport,
        wanted: u64,
        segments: usize,
    ) -> LoadReport {
        let mut report = LoadReport::new(checkpoint, &loader.devices, &LoadPlan::default(), &[], &[]);
        report.bytes = wanted;
        report.read_bytes = remote.from_memory.saturating_add(remote.from_files);
        report.cached_bytes = remote.from_memory;
        report.copies = segments as u64;
        report.verified = remote.verified;
        let from_files = remote.from_files > 0;
        report.engines = vec![EngineReport {
            engine: "server",
            direct: false,
            source: if from_files { "disk" } else { PINNED_MEMORY },
            reason: remote.by,
            bytes: report.read_bytes,
            threads: 1,
            seconds: 0.0,
            reading: 0.0,
            waiting: 1.0,
            copying: 0.0,
            verifying: 0.0,
            pinning: 0.0,
        }];
        (report.limit, report.limit_engine) = limit(&report.engines, &report.devices);
        report
    }

    /// Adds a load of the same checkpoint that ran after this one.
    pub(super) fn add(&mut self, next: LoadReport) {
        for (id, name) in next.devices.into_iter().zip(next.device_names) {
            if !self.devices.contains(&id) {
                self.devices.push(id);
                self.device_names.push(name);
            }
        }
        self.bytes += next.bytes;
        self.read_bytes += next.read_bytes;
        self.cached_bytes += next.cached_bytes;
        self.tensors += next.tensors;
        self.pieces += next.pieces;
        self.copies += next.copies;
        self.device_verified_bytes += next.device_verified_bytes;
        self.seconds += next.seconds;
        self.plan_s += next.plan_s;
        self.alloc_s += next.alloc_s;
        self.move_s += next.move_s;
        self.pinned_bytes = self.pinned_bytes.max(next.pinned_bytes);
        self.numa_node = self.numa_node.or(next.numa_node);
        for engine in next.engines {
            match self.engines.iter_mut().find(|e| (e.engine, e.direct) == (engine.engine, engine.direct)) {
                Some(same) => same.add(engine),
                None => self.engines.push(engine),
            }
        }
        (self.limit, self.limit_engine) = limit(&self.engines, &self.devices);
        self.fell_back = self.fell_back.take().or(next.fell_back);
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

    /// Sets the load beside the peak of its device's link ([`Device::link_peak`]). The last thing added: time that is
    /// added afterwards does not count.
    pub fn add_link(&mut self, peak: &LinkPeak) {
        self.link_gb_per_s = Some(peak.gb_per_s);
        self.link_measured = Some(peak.date());
        self.of_link = (peak.gb_per_s > 0.0).then(|| self.gb_per_s() / peak.gb_per_s);
    }

    /// GB/s of the whole load.
    pub fn gb_per_s(&self) -> f64 {
        gb_per_s(self.bytes, self.seconds)
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        write!(f, "loaded {} ({})", self.path, self.layout)?;
        // Without bytes to move there is no device.
        if !self.devices.is_empty() {
            write!(f, " to {}", self.devices.join(", "))?;
        }
        writeln!(f)?;
        let (bytes, rate) = (gb(self.bytes), self.gb_per_s());
        // Of a session, which is told of rows, the number is not known.
        let tensors = if self.tensors > 0 { format!(", {} tensors", self.tensors) } else { String::new() };
        writeln!(f, "  {bytes:.3} GB{tensors} in {:.3} s", self.seconds)?;
        write!(f, "  limit: {}, {}, {rate:.2} GB/s", self.limit, self.limit_engine)?;
        if let (Some(peak), Some(day), Some(part)) = (self.link_gb_per_s, &self.link_measured, self.of_link) {
            write!(f, ", {:.0} % of this link ({peak:.1} GB/s, measured {day})", part * 100.0)?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "  plan {:.4} s ({} reads, {} copies), allocate {:.4} s, read and copy {:.3} s ({:.2} GB/s){}",
            self.plan_s,
            self.pieces,
            self.copies,
            self.alloc_s,
            self.move_s,
            gb_per_s(self.bytes, self.move_s),
            match (self.verified, self.device_verified_bytes * 100 / self.read_bytes.max(1)) {
                (false, _) => String::new(),
                (true, 0) => ", verified".into(),
                (true, 100..) => ", verified by the device".into(),
                (true, part) => format!(", verified, {part} % by the device"),
            }
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
        if let Some(node) = self.numa_node {
            writeln!(f, "  devices at NUMA node {node}")?;
        }
        for note in &self.notes {
            writeln!(f, "  note: {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(engine: &'static str, source: &'static str, seconds: f64, parts: [f64; 4]) -> EngineReport {
        let [reading, waiting, verifying, pinning] = parts;
        let (direct, reason) = (source == "disk", String::new());
        let (bytes, threads, copying) = (1, 1, 0.0);
        EngineReport {
            engine,
            direct,
            source,
            reason,
            bytes,
            threads,
            seconds,
            reading,
            waiting,
            copying,
            verifying,
            pinning,
        }
    }

    #[test]
    fn the_limit_is_what_the_slowest_engine_did_most() {
        let (host, card) = (["host".to_owned()], ["cuda:0".to_owned(), "host".to_owned()]);
        let cached = engine("pread", "page cache", 1.0, [0.6, 0.2, 0.1, 0.1]);
        let copying = engine("pread", "page cache", 1.0, [0.2, 0.6, 0.1, 0.1]);
        let uncached = engine("uring", "disk", 2.0, [0.9, 0.1, 0.0, 0.0]);
        assert_eq!(limit(std::slice::from_ref(&cached), &host), ("page cache", "pread"));
        assert_eq!(limit(&[cached.clone(), uncached], &host), ("disk", "uring"));
        assert_eq!(limit(std::slice::from_ref(&copying), &host), ("memory", "pread"));
        assert_eq!(limit(&[copying], &card), ("link", "pread"));
        assert_eq!(limit(&[engine("pread", "disk", 1.0, [0.1, 0.1, 0.5, 0.3])], &card), ("verify", "pread"));
        assert_eq!(limit(&[engine("pread", "disk", 1.0, [0.1, 0.1, 0.3, 0.5])], &card), ("pin", "pread"));
        assert_eq!(limit(&[], &card), ("nothing", "none"));
    }
}
