//! Loads: lanes of reader threads fill buffers, verify them, and copy them to devices.

mod chunks;
mod lane;
mod loaded;
mod outbox;
mod remote;
mod report;
mod ring;
mod session;
mod staging;
mod summed;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use chunks::Chunks;
pub use lane::MAPPED_IN_FLIGHT;
pub use loaded::{Loaded, TensorView};
pub use outbox::{BUSY, MAX_BATCH, batch_len};
pub use remote::{Remote, RemoteReport};
pub use report::{EngineReport, LoadReport};
pub use session::Session;

use crate::cache::{Cache, Split, Use};
use crate::checkpoint::{Checkpoint, ChunkSums, DataFile};
use crate::control::{Control, check_threads};
use crate::device::{Block, Claim, Device, DeviceError, Stream, Summing};
use crate::error::{Error, Result};
use crate::format::PAGE;
use crate::numa::{self, Node};
use crate::plan::{Filter, LoadPlan, Piece, Placement, PlanOptions, Segment};
use crate::read::choose::{self, Governor, Wishes, choose};
use crate::read::{EngineChoice, Queue};
use crate::tensor::TensorInfo;
use lane::{Buffers, Lane, Outcome, Shared};
use outbox::Outbox;
use remote::Helper;
use ring::{Form, Ring};
use staging::Staging;

/// Bytes of one piece, and of one staging buffer: enough for the link to come near its peak, and so few that the ring
/// stays in the processor's cache (`docs/benchmarks.md`).
pub const PIECE_LEN: u64 = 2 << 20;
/// The same where bytes come from a disk. A virtual disk whose host copies them is faster the less memory is read into
/// (`docs/benchmarks.md`, "Disk").
pub const COLD_PIECE_LEN: u64 = 1 << 20;
/// Pinned staging memory at most, unless asked otherwise.
pub const PINNED_LEN: u64 = 256 << 20;
/// Rings that a checkpoint must be as long as, for one to be worth pinning ahead.
const WORTH_PINNING: u64 = 4;

/// Loads checkpoints to devices. Make one by [`Loader::builder`].
#[derive(Clone)]
pub struct Loader {
    devices: Vec<Device>,
    wishes: Wishes,
    pinned_len: u64,
    cache: Option<Cache>,
    helper: Option<Arc<Helper>>,
    /// What was prepared for the next load, whichever clone of the loader it is of.
    prepared: Arc<Mutex<Option<Ring>>>,
    control: Control,
    /// Where the system tells of its nodes and devices.
    system: PathBuf,
}

/// Builds a [`Loader`].
#[derive(Clone)]
pub struct LoaderBuilder {
    loader: Loader,
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader").field("devices", &self.devices).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for LoaderBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoaderBuilder").field("loader", &self.loader).finish()
    }
}

impl LoaderBuilder {
    /// The one device to load to; the host unless given.
    pub fn device(self, device: Device) -> Self {
        self.devices(vec![device])
    }

    /// Several devices; placements name them by their place here.
    pub fn devices(mut self, devices: Vec<Device>) -> Self {
        self.loader.devices = devices;
        self
    }

    /// The engine that reads; chosen by what is cached unless given.
    pub fn engine(mut self, engine: EngineChoice) -> Self {
        self.loader.wishes.engine = engine;
        self
    }

    /// Whether reads pass the page cache; `None`: those of uncached bytes.
    pub fn direct(mut self, direct: Option<bool>) -> Self {
        self.loader.wishes.direct = direct;
        self
    }

    /// Compares every chunk's checksum while loading. Only stores have them.
    pub fn verify(mut self, verify: bool) -> Self {
        self.loader.wishes.verify = verify;
        self
    }

    /// Reader threads, 1 to 256; `None`: as the engine needs.
    pub fn threads(mut self, threads: impl Into<Option<usize>>) -> Self {
        self.loader.wishes.threads = threads.into();
        self
    }

    /// Pinned staging memory at most, in bytes; `None`: 256 MiB.
    pub fn pinned_bytes(mut self, len: impl Into<Option<u64>>) -> Self {
        self.loader.pinned_len = len.into().unwrap_or(PINNED_LEN);
        self
    }

    /// A cache, which the load goes through: chunks that are there are copied, the others are read into it. Nothing is
    /// staged then, and every chunk of which a byte is wanted is read whole.
    pub fn cache(mut self, cache: impl Into<Option<Cache>>) -> Self {
        self.loader.cache = cache.into();
        self.loader.wishes.caches = self.loader.cache.is_some();
        self
    }

    /// Somebody who moves bytes in the loader's place. After its first failure the loader reads files, and the next
    /// report's notes say why.
    pub fn remote(mut self, remote: Box<dyn Remote>) -> Self {
        self.loader.helper = Some(Arc::new(Helper::new(remote)));
        self
    }

    /// A progress callback and a cancel flag.
    pub fn control(mut self, control: Control) -> Self {
        self.loader.control = control;
        self
    }

    /// Checks the settings.
    pub fn build(self) -> Result<Loader> {
        let Loader { devices, wishes, pinned_len, .. } = &self.loader;
        if devices.is_empty() || devices.len() > 64 {
            return Err(Error::Invalid(format!("{} devices are given; 1 to 64 can be", devices.len())));
        }
        wishes.threads.map(check_threads).transpose()?;
        if *pinned_len < PAGE {
            return Err(Error::Invalid(format!("{pinned_len} bytes of staging memory are fewer than a page")));
        }
        Ok(self.loader)
    }
}

impl Loader {
    /// A loader to the host, which a builder changes.
    pub fn builder() -> LoaderBuilder {
        let control = Control::new();
        let (devices, wishes) = (vec![Device::host()], Wishes::default());
        let system = numa::SYSTEM.into();
        let prepared = Arc::default();
        let loader =
            Loader { devices, wishes, pinned_len: PINNED_LEN, cache: None, helper: None, prepared, control, system };
        LoaderBuilder { loader }
    }

    /// Begins to pin the memory that the next load of a checkpoint will be staged by, in threads of its own, while the caller
    /// allocates what it loads to. Loads that allocate do it themselves.
    ///
    /// It is for bytes that the page cache has: of others, or of few, nothing is pinned. What no load takes is given back
    /// with the loader.
    pub fn prepare(&self, checkpoint: &Checkpoint) {
        let whole = |(file, data): (usize, &DataFile)| Segment::contiguous(file, 0, data.len(), 0, 0);
        let whole: Vec<Segment> = checkpoint.files().iter().enumerate().map(whole).collect();
        let Some(form) = self.worth_preparing(checkpoint, &whole) else { return };
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let is_there = prepared.as_ref().is_some_and(|ring| ring.fits(form));
        if !is_there && !choose::is_cold(checkpoint.files(), &whole, &self.wishes) {
            drop(prepared.take()); // both would be more than is allowed
            *prepared = self.prepared_ring(form);
        }
    }

    /// The form of the ring by which these segments are staged if they are cached; `None` where they are not, or are so few
    /// that each lane may as well pin what it needs.
    fn worth_preparing(&self, checkpoint: &Checkpoint, segments: &[Segment]) -> Option<Form> {
        if self.helper.is_some() || self.cache.is_some() {
            return None;
        }
        let wishes = Wishes { verify: self.wishes.verify && !self.devices_sum_up(), ..self.wishes.clone() };
        let (lanes, per_lane) = choose::staged_lanes(&self.devices, &wishes)?;
        let sums = self.sums(checkpoint).ok()?;
        let PlanOptions { piece_len, .. } = self.cut(sums, false);
        let form = Form::of_lanes(lanes, per_lane, piece_len, self.pinned_len)?;
        let len = segments.iter().map(Segment::len).fold(0, u64::saturating_add);
        (len / WORTH_PINNING >= form.len()).then_some(form)
    }

    /// A ring that is being pinned; where that fails, the load will say so.
    fn prepared_ring(&self, form: Form) -> Option<Ring> {
        let mut ring = Ring::new(self, Node::of(&self.system, &self.devices), form).ok()?;
        ring.prepare();
        Some(ring)
    }

    fn take_prepared(&self) -> Option<Ring> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Loads every tensor to the first device.
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<Loaded> {
        self.load_filtered(checkpoint, &Filter::all())
    }

    /// Loads the tensors that a filter wants to the first device.
    pub fn load_filtered(&self, checkpoint: &Checkpoint, filter: &Filter) -> Result<Loaded> {
        self.load_placed(checkpoint, filter, |_| 0)
    }

    /// Loads the tensors that a filter wants, each to the device whose place in the loader's list `device_of` gives.
    pub fn load_placed(
        &self,
        checkpoint: &Checkpoint,
        filter: &Filter,
        device_of: impl FnMut(&TensorInfo) -> usize,
    ) -> Result<Loaded> {
        let placement = Placement::new(checkpoint, filter.select(checkpoint)?, device_of)?;
        self.check_room(&placement)?;
        let mut staging = Staging::default();
        let devices = placement.blocks.iter().filter_map(|spec| self.devices.get(spec.device));
        self.stage(checkpoint, &placement.segments, devices, &mut staging);
        let started = Instant::now();
        let blocks = placement.blocks.iter().map(|spec| Block::alloc(self.device(spec.device)?, spec.len));
        let blocks = blocks.collect::<Result<Vec<Block>>>()?;
        let alloc_s = started.elapsed().as_secs_f64();
        let _lock = checkpoint.lock_for_load();
        let mut report = self.run(checkpoint, &placement.segments, blocks.clone(), &mut staging)?;
        report.add_alloc(alloc_s);
        report.tensors = placement.tensors.len() as u64;
        Ok(Loaded::new(checkpoint, placement.tensors, blocks, report))
    }

    /// Fills blocks that the caller allocated, one for each of the placement's, at least as long.
    pub fn fill(&self, checkpoint: &Checkpoint, placement: &Placement, blocks: Vec<Block>) -> Result<LoadReport> {
        let mut report = self.fill_segments(checkpoint, &placement.segments, blocks)?;
        report.tensors = placement.tensors.len() as u64;
        Ok(report)
    }

    /// Moves segments of the checkpoint's files into blocks.
    pub fn fill_segments(
        &self,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        blocks: Vec<Block>,
    ) -> Result<LoadReport> {
        let _lock = checkpoint.lock_for_load();
        self.run(checkpoint, segments, blocks, &mut Staging::default())
    }

    /// Reads all of a checkpoint's files into the loader's cache, and copies nothing.
    pub fn fill_cache(&self, checkpoint: &Checkpoint) -> Result<LoadReport> {
        let cache = self.cache.as_ref().ok_or_else(|| Error::Invalid("the loader has no cache to fill".into()))?;
        let files: Vec<u64> = checkpoint.files().iter().map(|file| file.len()).collect();
        let _lock = checkpoint.lock_for_load();
        let plan = |_: &PlanOptions| Ok(LoadPlan::whole(&files, cache.chunk_len()));
        self.execute(checkpoint, plan, Vec::new(), &mut Staging::default(), Instant::now())
    }

    /// Starts a load whose segments become known while it runs.
    pub fn session(&self, checkpoint: Arc<Checkpoint>) -> Result<Session> {
        Session::start(self.clone(), checkpoint)
    }

    /// Moves segments by staging that may have served before.
    fn run(
        &self,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        blocks: Vec<Block>,
        staging: &mut Staging,
    ) -> Result<LoadReport> {
        let started = Instant::now();
        let _claims = claim(&blocks)?;
        if let Some(helper) = &self.helper
            && let Some(report) = helper.fill(self, checkpoint, segments, &blocks)?
        {
            return Ok(report);
        }
        let files: Vec<u64> = checkpoint.files().iter().map(|file| file.len()).collect();
        let lens: Vec<u64> = blocks.iter().map(Block::len).collect();
        self.stage(checkpoint, segments, blocks.iter().map(Block::device), staging);
        let plan = |options: &PlanOptions| LoadPlan::build(&files, &lens, segments, options);
        self.execute(checkpoint, plan, blocks, staging, started)
    }

    /// Looks whether bytes come from a disk; if not, begins to pin what they are staged by, while memory is allocated or a
    /// load is planned.
    fn stage<'a>(
        &self,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        devices: impl Iterator<Item = &'a Device>,
        staging: &mut Staging,
    ) {
        if self.stages(devices) && !staging.is_cold {
            staging.is_cold = choose::is_cold(checkpoint.files(), segments, &self.wishes);
            if !staging.is_cold {
                staging.prepare(self, || self.worth_preparing(checkpoint, segments));
            }
        }
    }

    /// The checksums to compare, if any.
    fn sums<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Option<&'a ChunkSums>> {
        let sums = match (self.wishes.verify, checkpoint.sums()) {
            (true, None) => {
                let layout = checkpoint.layout().name();
                let reason = format!("{layout} has no checksums to verify: convert it to a store first");
                return Err(Error::Invalid(reason));
            }
            (true, sums) => sums,
            (false, _) => None,
        };
        if let (Some(cache), Some(sums)) = (&self.cache, sums)
            && !cache.chunk_len().is_multiple_of(sums.chunk_len)
        {
            let (path, own, of_cache) = (checkpoint.path().display(), sums.chunk_len, cache.chunk_len());
            return Err(Error::Invalid(format!(
                "{path} has checksums of chunks of {own} bytes, which a cache of chunks of {of_cache} bytes cannot compare"
            )));
        }
        Ok(sums)
    }

    /// How a plan is cut: in chunks of the cache, in parts of chunks whose checksums are compared, or in pieces.
    fn cut(&self, sums: Option<&ChunkSums>, is_cold: bool) -> PlanOptions {
        let most = self.piece_len(if is_cold { COLD_PIECE_LEN } else { PIECE_LEN });
        let (piece_len, chunk_len) = match (&self.cache, sums) {
            (Some(cache), _) => (cache.chunk_len(), Some(cache.chunk_len())),
            (None, Some(sums)) => (Chunks::piece_len(sums.chunk_len, most), Some(sums.chunk_len)),
            (None, None) => (most, None),
        };
        PlanOptions { piece_len, chunk_len, ..PlanOptions::default() }
    }

    /// Moves what `plan` makes of how plans are cut.
    fn execute(
        &self,
        checkpoint: &Checkpoint,
        plan: impl FnOnce(&PlanOptions) -> Result<LoadPlan>,
        blocks: Vec<Block>,
        staging: &mut Staging,
        started: Instant,
    ) -> Result<LoadReport> {
        let sums = self.sums(checkpoint)?;
        self.cache.as_ref().map_or(Ok(()), |cache| cache.check_len(checkpoint))?;
        let options = self.cut(sums, staging.is_cold);
        let plan = plan(&options)?;
        let PlanOptions { piece_len, chunk_len, .. } = options;
        let blocks: Arc<[Block]> = blocks.into();
        let is_used = |device: &&Device| blocks.iter().any(|block| block.device().same_as(device));
        let devices: Vec<Device> = self.devices.iter().filter(is_used).cloned().collect();
        let cache = self.cache.as_ref().map(|cache| cache.begin(checkpoint));
        let Split { mut cached, mut busy, missing } = match &cache {
            Some(cache) => cache.split(plan.pieces()),
            None => Split { missing: plan.pieces().iter().collect(), ..Split::default() },
        };
        let outcome = Outcome::default();
        let chunks = chunk_len.filter(|_| cache.is_none());
        let chunks = chunks.map(|chunk_len| self.chunks(&plan, &blocks, (chunk_len, piece_len), staging, &outcome));
        let governor = match &self.cache {
            Some(cache) => Some(Governor::Bounce(cache.bounce())),
            None => self.stages(devices.iter()).then_some(Governor::Depth(&staging.depth)),
        };
        let sums_up = |piece: &Piece| chunks.as_ref().is_some_and(|chunks| chunks.part(piece).is_none());
        let mut shares =
            choose(checkpoint.files(), missing, &devices, &self.wishes, sums_up, governor, &staging.rates)?;
        if devices.len() > 1 {
            // In the order of the files one device's layers come before those of the next, and one link works at a time.
            let device_of =
                |block: usize| devices.iter().position(|device| device.same_as(blocks[block].device())).unwrap_or(0);
            let in_any_order = shares.iter_mut().filter(|share| share.any_order()).map(|share| &mut share.pieces);
            in_any_order.chain([&mut cached, &mut busy]).for_each(|pieces| plan.spread(pieces, device_of));
        }
        cached.append(&mut busy);
        if let Some(cache) = self.cache.as_ref().filter(|_| !cached.is_empty()) {
            shares.push(choose::cached(cached, &devices, &self.wishes, cache.bounce()));
        }
        let plan_s = started.elapsed().as_secs_f64();

        let node = if self.stages(devices.iter()) { staging.node(self) } else { None };
        let (buffers, streams) = staging.fit(self, node, cache.as_ref(), piece_len, &mut shares, &outcome)?;
        let meter = self.control.meter(plan.read_len());
        let verify = sums.is_some();
        let pinning = devices.iter().find(|device| device.needs_pinning());
        let outbox = Outbox::new(streams, Arc::clone(&blocks), outbox::most(piece_len));
        let shared =
            Shared { checkpoint, plan: &plan, chunks, verify, buffers, outbox, pinning, blocks, meter, outcome };
        let summing = Summing::new(streams);
        let queues: Vec<Queue<'_>> = shares.iter().map(|share| Queue::new(&share.pieces)).collect();
        let moving = Instant::now();
        let lanes = Mutex::new(Vec::new());
        let work = &|number: usize, node: Option<Node>| {
            let (share, queue) = (&shares[number], &queues[number]);
            let bound = node.map_or(Ok(()), |node| node.bind_thread(share.lanes));
            bound.unwrap_or_else(|why| shared.outcome.note(why));
            let mut lane = Lane::new(&shared, share.buffers_per_lane, share.direct);
            let result = share.engine.run(checkpoint.files(), queue, &mut lane).and_then(|()| lane.finish());
            if let Err(error) = result {
                shared.outcome.stop(error);
            }
            let times = lane.times();
            drop(lane);
            lanes.lock().unwrap_or_else(PoisonError::into_inner).push((number, times));
        };
        std::thread::scope(|scope| {
            let mut left = Vec::new();
            for (number, share) in shares.iter().enumerate() {
                let start = |_: &usize| {
                    let thread = std::thread::Builder::new().name(share.name.into());
                    let started = thread.spawn_scoped(scope, move || work(number, node));
                    started.inspect_err(|e| shared.outcome.note(format!("fewer threads read: {e}"))).is_ok()
                };
                if (0..share.lanes).take_while(start).count() == 0 {
                    left.push(number);
                }
            }
            // Where no thread can be had for a share, the caller's reads it, and stays where it is.
            left.into_iter().for_each(|number| work(number, None));
        });
        let synced = streams.iter().try_for_each(Stream::synchronize);
        shared.outcome.result()?;
        synced?;
        if shared.chunks.as_ref().is_some_and(|chunks| !chunks.all_arrived()) {
            return Err(Error::Invalid("a chunk came without its checksum being compared".into()));
        }
        let compare = |chunks| summed::compare(checkpoint, chunks, &self.devices, &summing);
        let by_devices = shared.chunks.as_ref().map_or(Ok(0), compare)?;
        let move_s = moving.elapsed().as_secs_f64();
        let mut read = plan.pieces().iter().map(|piece| piece.file).collect::<Vec<_>>();
        read.dedup(); // pieces are ordered by file
        for file in read {
            checkpoint.files()[file].check_unchanged().inspect_err(|_| {
                if let Some(cache) = &cache {
                    cache.forget(file);
                }
            })?;
        }

        let lanes = lanes.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut report = LoadReport::new(checkpoint, &devices, &plan, &shares, &lanes);
        report.verified = sums.is_some();
        report.device_verified_bytes = by_devices;
        report.plan_s = plan_s;
        report.move_s = move_s;
        report.cached_bytes = cache.as_ref().map_or(0, Use::cached_len);
        report.numa_node = node.map(|node| node.number());
        report.notes = shared.outcome.take_notes();
        if let Buffers::Ring(pool) = buffers {
            report.pinned_bytes = pool.pinned_len();
            report.notes.extend(pool.refusal().map(|why| format!("staging memory is not pinned: {why}")));
        }
        report.fell_back = self.helper.as_ref().and_then(|helper| helper.failure());
        report.notes.extend(self.helper.as_ref().and_then(|helper| helper.note()));
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    fn device(&self, place: usize) -> Result<&Device> {
        let missing = || Error::Invalid(format!("the placement names device {place} of {}", self.devices.len()));
        self.devices.get(place).ok_or_else(missing)
    }

    /// Whether bytes for these devices go through a ring of pinned buffers.
    fn stages<'a>(&self, mut devices: impl Iterator<Item = &'a Device>) -> bool {
        self.cache.is_none() && devices.any(Device::needs_pinning)
    }

    /// Says that a device has too little room before anything moves.
    fn check_room(&self, placement: &Placement) -> Result<()> {
        for spec in &placement.blocks {
            let device = self.device(spec.device)?;
            if let Some((free, _)) = device.memory()?
                && spec.len > free
            {
                return Err(DeviceError::OutOfMemory { device: device.id(), need: spec.len, free }.into());
            }
        }
        Ok(())
    }

    /// A piece fits the staging memory twice, so that reading and copying overlap.
    fn piece_len(&self, most: u64) -> u64 {
        most.min(self.pinned_len / 2 / PAGE * PAGE).max(PAGE)
    }
}

/// Takes blocks for one load, so that no byte has two writers.
fn claim(blocks: &[Block]) -> Result<Vec<Claim>> {
    if Block::any_overlap(blocks) {
        return Err(Error::Invalid("two of the blocks overlap".into()));
    }
    let in_use = || Error::Invalid("a block is being loaded already".into());
    blocks.iter().map(|block| block.claim().ok_or_else(in_use)).collect()
}

#[cfg(test)]
mod tests;
