//! Loads: lanes of reader threads fill buffers, verify them, and copy them to devices.

mod lane;
mod loaded;
mod report;

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

pub use lane::MAPPED_IN_FLIGHT;
pub use loaded::{Loaded, TensorView};
pub use report::{EngineReport, LoadReport};

use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::control::Control;
use crate::device::{Block, Claim, Device, DeviceError, Stream};
use crate::error::{Error, Result};
use crate::format::PAGE;
use crate::plan::{Filter, LoadPlan, Placement, PlanOptions, Segment};
use crate::pool::BufferPool;
use crate::read::choose::{Share, Wishes, choose};
use crate::read::{EngineChoice, Queue};
use lane::{Lane, Outcome, Shared};

/// Bytes of one piece, and of one staging buffer: enough for the link to come near its peak, and so few that the ring
/// stays in the processor's cache (`docs/benchmarks.md`).
pub const PIECE_LEN: u64 = 3 << 20;
/// Reader threads at most.
const MAX_THREADS: usize = 256;
/// Pinned staging memory at most, unless asked otherwise.
pub const PINNED_LEN: u64 = 256 << 20;

/// Loads checkpoints to devices. Make one by [`Loader::builder`].
#[derive(Clone)]
pub struct Loader {
    devices: Vec<Device>,
    wishes: Wishes,
    pinned_len: u64,
    control: Control,
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

    /// Reader threads; `None`: as the engine needs.
    pub fn threads(mut self, threads: impl Into<Option<usize>>) -> Self {
        self.loader.wishes.threads = threads.into();
        self
    }

    /// Pinned staging memory at most, in bytes; `None`: 256 MiB.
    pub fn pinned_bytes(mut self, len: impl Into<Option<u64>>) -> Self {
        self.loader.pinned_len = len.into().unwrap_or(PINNED_LEN);
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
        if wishes.threads.is_some_and(|threads| threads == 0 || threads > MAX_THREADS) {
            return Err(Error::Invalid(format!("a load runs in 1 to {MAX_THREADS} threads")));
        }
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
        let loader =
            Loader { devices: vec![Device::host()], wishes: Wishes::default(), pinned_len: PINNED_LEN, control };
        LoaderBuilder { loader }
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
        let placement = Placement::new(checkpoint, &filter.select(checkpoint)?, device_of)?;
        self.check_room(&placement)?;
        let started = Instant::now();
        let blocks = placement.blocks.iter().map(|spec| Block::alloc(self.device(spec.device)?, spec.len));
        let blocks = blocks.collect::<Result<Vec<Block>>>()?;
        let alloc_s = started.elapsed().as_secs_f64();
        let mut report = self.fill(checkpoint, &placement, blocks.clone())?;
        report.add_alloc(alloc_s);
        Ok(Loaded::new(checkpoint, &placement, blocks, report))
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
        let started = Instant::now();
        let _claims = claim(&blocks)?;
        let sums = match (self.wishes.verify, checkpoint.sums()) {
            (true, None) => {
                let layout = checkpoint.layout().name();
                let reason = format!("{layout} has no checksums to verify: convert it to a store first");
                return Err(Error::Invalid(reason));
            }
            (true, sums) => sums,
            (false, _) => None,
        };
        let files: Vec<u64> = checkpoint.files().iter().map(|file| file.len()).collect();
        let lens: Vec<u64> = blocks.iter().map(Block::len).collect();
        let options = PlanOptions {
            piece_len: sums.map_or_else(|| self.piece_len(), |sums| sums.chunk_len),
            whole_pieces: sums.is_some(),
            ..PlanOptions::default()
        };
        let plan = LoadPlan::build(&files, &lens, segments, &options)?;
        let shares = choose(checkpoint.files(), &plan, &self.devices, &self.wishes)?;
        let plan_s = started.elapsed().as_secs_f64();

        let (pool, shares) = self.staging(options.piece_len, shares)?;
        let streams: Vec<Stream> = self.devices.iter().map(Device::stream).collect::<Result<_>>()?;
        let meter = self.control.meter(plan.read_len());
        let outcome = Outcome::default();
        let blocks = blocks.into();
        let shared = Shared { checkpoint, plan: &plan, sums, pool: &pool, streams: &streams, blocks, meter, outcome };
        let queues: Vec<Queue<'_>> = shares.iter().map(|share| Queue::new(&share.pieces)).collect();
        let moving = Instant::now();
        let lanes = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for (number, (share, queue)) in shares.iter().zip(&queues).enumerate() {
                for _ in 0..share.lanes {
                    let (shared, lanes) = (&shared, &lanes);
                    let work = move || {
                        let mut lane = Lane::new(shared, share.buffers_per_lane, share.direct);
                        let files = checkpoint.files();
                        let result = share.engine.run(files, queue, &mut lane).and_then(|()| lane.finish());
                        if let Err(error) = result {
                            shared.outcome.stop(error);
                        }
                        let times = lane.times();
                        drop(lane);
                        lanes.lock().unwrap_or_else(PoisonError::into_inner).push((number, times));
                    };
                    if let Err(e) = std::thread::Builder::new().name(share.name.into()).spawn_scoped(scope, work) {
                        shared.outcome.stop(Error::io("start a reader thread for", checkpoint.path())(e));
                    }
                }
            }
        });
        let synced = streams.iter().try_for_each(Stream::synchronize);
        shared.outcome.result()?;
        synced?;
        let move_s = moving.elapsed().as_secs_f64();
        let mut read = plan.pieces().iter().map(|piece| piece.file).collect::<Vec<_>>();
        read.dedup(); // pieces are ordered by file
        read.iter().try_for_each(|&file| checkpoint.files()[file].check_unchanged())?;

        let lanes = lanes.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut report = LoadReport::new(checkpoint, &self.devices, &plan, &shares, &lanes);
        report.verified = sums.is_some();
        report.plan_s = plan_s;
        report.move_s = move_s;
        report.pinned_bytes = pool.pinned_len();
        report.notes = shared.outcome.into_notes();
        report.notes.extend(pool.refusal().map(|why| format!("staging memory is not pinned: {why}")));
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    fn device(&self, place: usize) -> Result<&Device> {
        let missing = || Error::Invalid(format!("the placement names device {place} of {}", self.devices.len()));
        self.devices.get(place).ok_or_else(missing)
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
    fn piece_len(&self) -> u64 {
        PIECE_LEN.min(self.pinned_len / 2 / PAGE * PAGE).max(PAGE)
    }

    /// The staging pool; shares get fewer lanes and buffers where it is small.
    fn staging<'a>(&self, piece_len: u64, mut shares: Vec<Share<'a>>) -> Result<(BufferPool, Vec<Share<'a>>)> {
        let too_large = || Error::Invalid(format!("a piece of {piece_len} bytes does not fit the memory"));
        let buffer_len = usize::try_from(piece_len).map_err(|_| too_large())?;
        let most = usize::try_from(self.pinned_len / piece_len).unwrap_or(usize::MAX).max(1);
        let staged = shares.iter().filter(|share| share.buffers_per_lane > 0).count();
        for share in shares.iter_mut().filter(|share| share.buffers_per_lane > 0) {
            let mine = (most / staged).max(1);
            share.lanes = share.lanes.min(mine);
            share.buffers_per_lane = share.buffers_per_lane.min(mine / share.lanes);
        }
        let buffers = shares.iter().map(|share| share.lanes * share.buffers_per_lane).sum();
        let per_lane = shares.iter().map(|share| share.buffers_per_lane).max().unwrap_or(0);
        // Each lane prepares and pins its own buffers, one at a time, while others read already.
        let step = buffer_len * per_lane.clamp(1, 2);
        let pool = BufferPool::new(buffer_len, buffers, step, self.devices.iter().find(|d| d.needs_pinning()))?;
        Ok((pool, shares))
    }
}

/// Takes blocks for one load, so that no byte has two writers.
fn claim(blocks: &[Block]) -> Result<Vec<Claim>> {
    for (i, a) in blocks.iter().enumerate() {
        if blocks[..i].iter().any(|b| a.overlaps(b)) {
            return Err(Error::Invalid("two of the blocks overlap".into()));
        }
    }
    let in_use = || Error::Invalid("a block is being loaded already".into());
    blocks.iter().map(|block| block.claim().ok_or_else(in_use)).collect()
}
