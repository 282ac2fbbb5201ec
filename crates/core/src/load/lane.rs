//! One reader thread's end of a load: its buffers, its copies in flight, its verification.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crc_fast::{CrcAlgorithm, Digest, crc64_nvme};

use super::chunks::Chunks;
use super::outbox::{Outbox, Receipt};
use crate::cache::{CachedChunk, Sums, Use};
use crate::checkpoint::Checkpoint;
use crate::control::Meter;
use crate::crc;
use crate::device::{self, Block, Device, Part};
use crate::error::{Error, Result};
use crate::format::PAGE;
use crate::plan::{LoadPlan, Piece, PieceCopy};
use crate::pool::{BufferPool, HostBuffer};
use crate::read::{Filled, Room, Sink};
use crate::verify::sum_of;

/// Copies of mapped pages that a lane leaves in flight; they hold no buffer.
pub const MAPPED_IN_FLIGHT: usize = 64;

/// Bytes of a piece that is verified that are read in one go: they are in the processor's nearest large cache when their
/// checksum is taken.
const VERIFY_STEP: usize = 512 << 10;

/// What all lanes of a load share.
pub(super) struct Shared<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) plan: &'a LoadPlan,
    /// Where checksums are compared: the chunks of the plan. A piece is copied before its chunk is known to be good;
    /// the load fails where one is not.
    pub(super) chunks: Option<Chunks>,
    /// In a cache, every piece is a whole chunk, and its checksum is compared at once.
    pub(super) verify: bool,
    pub(super) buffers: Buffers<'a>,
    pub(super) outbox: Outbox<'a>,
    /// The first of the devices that memory has to be pinned for.
    pub(super) pinning: Option<&'a Device>,
    pub(super) blocks: Arc<[Block]>,
    pub(super) meter: Meter<'a>,
    pub(super) outcome: Outcome,
}

/// Where a load's buffers come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Buffers<'a> {
    /// A ring: each lane takes its own, and fills them again and again.
    Ring(&'a BufferPool),
    /// A cache: what is filled stays.
    Cache(&'a Use),
}

/// How a load goes: whether it was stopped, why, and what its report should say.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    stopped: AtomicBool,
    error: Mutex<Option<Error>>,
    notes: Mutex<Vec<String>>,
}

impl Outcome {
    /// Stops all lanes; the first error is the load's.
    pub(super) fn stop(&self, error: Error) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// The first error, if any.
    pub(super) fn result(&self) -> Result<()> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    /// Something for the report, once however many lanes say it.
    pub(super) fn note(&self, note: String) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if !notes.contains(&note) {
            notes.push(note);
        }
    }

    pub(super) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Where a lane's time went.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LaneTimes {
    pub(super) total: Duration,
    /// Waiting for copies, so that a buffer comes free.
    pub(super) copy_wait: Duration,
    pub(super) verify: Duration,
    /// Making and pinning buffers.
    pub(super) prepare: Duration,
    /// Issuing copies; on the host device, copying.
    pub(super) copy: Duration,
}

/// One lane.
pub(super) struct Lane<'a> {
    shared: &'a Shared<'a>,
    /// Buffers that it may still take.
    quota: usize,
    /// Buffers that it may have.
    most: usize,
    /// Buffers that it needs. With as many it waits for a copy before it takes another.
    needed: usize,
    /// Its engine passes the page cache, so that a destination must be aligned to be read into.
    direct: bool,
    spare: Vec<HostBuffer>,
    in_flight: VecDeque<Receipt<'a>>,
    /// The checksum of as much as has come of the piece for which room was asked last, where the lane takes it.
    sum: Digest,
    sums_up: bool,
    started: Instant,
    times: LaneTimes,
}

impl<'a> Lane<'a> {
    pub(super) fn new(shared: &'a Shared<'a>, quota: usize, direct: bool) -> Self {
        let (spare, in_flight) = (Vec::new(), VecDeque::new());
        let (started, times) = (Instant::now(), LaneTimes::default());
        let sum = Digest::new(CrcAlgorithm::Crc64Nvme);
        let (most, needed, sums_up) = (quota, usize::MAX, false);
        Lane { shared, quota, most, needed, direct, spare, in_flight, sum, sums_up, started, times }
    }

    /// Waits for the lane's last copies.
    pub(super) fn finish(&mut self) -> Result<()> {
        while !self.in_flight.is_empty() {
            self.retire()?;
        }
        Ok(())
    }

    pub(super) fn times(&self) -> LaneTimes {
        LaneTimes { total: self.started.elapsed(), ..self.times }
    }

    /// Waits for the oldest copy and keeps its buffer.
    fn retire(&mut self) -> Result<()> {
        // To wait may issue what waits, and nothing is issued once the load was stopped.
        self.check()?;
        let Some(receipt) = self.in_flight.pop_front() else { return Ok(()) };
        let waiting = Instant::now();
        let source = self.shared.outbox.wait(&receipt)?;
        self.times.copy_wait += waiting.elapsed();
        match source {
            Some(Filled::Buffer(buffer)) => self.spare.push(buffer),
            // The chunk stays in the cache, so that the lane may take another buffer.
            Some(Filled::Cached(_)) => self.quota = self.most.min(self.quota + 1),
            Some(Filled::Mapped(_)) | None => {}
        }
        Ok(())
    }

    /// Whether its oldest copy is done, or the load was stopped, as `retire` says then.
    fn oldest_is_done(&self) -> bool {
        let is_done = |receipt| self.check().is_err() || self.shared.outbox.is_done(receipt);
        self.in_flight.front().is_some_and(is_done)
    }

    /// A buffer that is there without waiting for copies.
    fn try_buffer(&mut self) -> Option<HostBuffer> {
        if let Some(buffer) = self.spare.pop() {
            return Some(buffer);
        }
        if self.quota == 0 {
            return None;
        }
        let preparing = Instant::now();
        let buffer = match self.shared.buffers {
            Buffers::Ring(pool) => pool.try_acquire(),
            Buffers::Cache(cache) => cache.try_buffer(),
        };
        self.times.prepare += preparing.elapsed();
        self.quota -= usize::from(buffer.is_some());
        buffer
    }

    /// Whether it has as many buffers as it needs, none of them free.
    fn has_enough(&self) -> bool {
        self.spare.is_empty() && self.most - self.quota >= self.needed
    }

    fn take_buffer(&mut self) -> Result<HostBuffer> {
        loop {
            // A buffer that was used already is in the processor's cache.
            let waits = self.has_enough() && !self.in_flight.is_empty();
            if self.spare.is_empty() && (waits || self.oldest_is_done()) {
                self.retire()?;
                continue;
            }
            if let Some(buffer) = self.try_buffer() {
                return Ok(buffer);
            }
            match (self.in_flight.is_empty(), self.shared.buffers) {
                (false, _) => self.retire()?,
                (true, Buffers::Cache(cache)) if self.quota > 0 => {
                    self.check()?;
                    cache.wait_for_buffer();
                }
                // The ring holds every lane's quota.
                (true, _) => return Err(Error::Invalid("a lane has no buffer left".into())),
            }
        }
    }

    /// Brings a piece that was read into the cache, once its checksums were compared.
    fn cache(&mut self, cache: &Use, piece: &Piece, filled: Filled) -> Result<Filled> {
        let Filled::Buffer(buffer) = filled else { return Ok(filled) };
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(buffer.as_slice().len());
        let verifying = Instant::now();
        let sums = self.chunk_len().map(|chunk_len| sums_of(chunk_len, &buffer.as_slice()[..len]));
        sums.as_ref().map_or(Ok(()), |sums| self.compare(piece, sums.chunk_len, &sums.of_chunks))?;
        self.times.verify += verifying.elapsed();
        Ok(Filled::Cached(cache.put(piece, buffer, sums)))
    }

    /// Whether a chunk of the cache, which any load may have brought, has this store's checksums, where these are to be
    /// compared.
    fn is_good(&mut self, piece: &Piece, chunk: &CachedChunk) -> Result<bool> {
        let Some(chunk_len) = self.chunk_len() else { return Ok(true) };
        let verifying = Instant::now();
        let sums = chunk.sums(chunk_len, |bytes| sums_of(chunk_len, bytes));
        let answer = match self.compare(piece, chunk_len, &sums) {
            Err(Error::Corrupt(_)) => Ok(false),
            answer => answer.map(|()| true),
        };
        self.times.verify += verifying.elapsed();
        answer
    }

    /// Bytes of the store's chunks, where a cache's are to be compared with them.
    fn chunk_len(&self) -> Option<u64> {
        self.shared.checkpoint.sums().filter(|_| self.shared.verify).map(|sums| sums.chunk_len)
    }

    /// Compares the checksums of a piece, which is whole chunks of its store.
    fn compare(&self, piece: &Piece, chunk_len: u64, sums: &[u64]) -> Result<()> {
        let mut numbered = (piece.offset / chunk_len..).zip(sums);
        numbered.try_for_each(|(number, &sum)| self.shared.checkpoint.check_chunk(piece.file, number, sum))
    }

    /// A piece's part in a chunk that its device sums up.
    fn part(&self, piece: &Piece) -> Option<Part> {
        self.shared.chunks.as_ref()?.part(piece)
    }

    /// The remainder of the bytes of a piece that its device does not sum up.
    fn rest(&self, piece: &Piece, part: Part, filled: &Filled) -> Result<u64> {
        let mut rest = 0;
        for Range { start, end } in device::gaps(piece.len, self.shared.plan.copies(piece)) {
            let too_long = |_| Error::Invalid("a piece does not fit the memory".into());
            let (from, len) =
                (usize::try_from(start).map_err(too_long)?, usize::try_from(end - start).map_err(too_long)?);
            let sum = match filled {
                Filled::Buffer(buffer) => crc64_nvme(buffer.as_slice().get(from..from + len).unwrap_or_default()),
                // Mapped pages may go away, so that they are not looked at.
                Filled::Mapped(_) | Filled::Cached(_) => {
                    let file = &self.shared.checkpoint.files()[piece.file];
                    sum_of(file, piece.offset + start, end - start, &mut vec![0; len], |_| Ok(()))?
                }
            };
            rest ^= crc::remainder(sum, end - start, part.to_end - end);
        }
        Ok(rest)
    }

    /// The destination of a piece that lies in one run of host memory, where no checksum needs the rest of it.
    fn loan(&self, piece: &Piece) -> Option<Room> {
        let [copy] = self.shared.plan.copies(piece) else { return None };
        let PieceCopy { src_offset, row_len, rows: 1, block, dst_offset, .. } = *copy else { return None };
        if self.shared.chunks.is_some() && row_len != piece.len {
            return None;
        }
        let len = usize::try_from(row_len).ok()?;
        let block = self.shared.blocks.get(block)?;
        let aligned = |place: u64| place.is_multiple_of(PAGE);
        if self.direct && !(src_offset == 0 && aligned(row_len) && aligned(block.addr() + dst_offset)) {
            return None;
        }
        let buffer = block.loan(dst_offset, len)?;
        Some(Room { buffer, offset: piece.offset + src_offset, len })
    }
}

impl Sink for Lane<'_> {
    fn room(&mut self, piece: &Piece) -> Result<Room> {
        self.check()?;
        self.sum.reset();
        self.sums_up = self.shared.chunks.is_some() && self.part(piece).is_none();
        if matches!(self.shared.buffers, Buffers::Ring(_))
            && let Some(room) = self.loan(piece)
        {
            return Ok(room);
        }
        let len = usize::try_from(piece.len).map_err(|_| Error::Invalid("a piece does not fit the memory".into()))?;
        Ok(Room { buffer: self.take_buffer()?, offset: piece.offset, len })
    }

    fn has_room(&mut self) -> bool {
        if !self.spare.is_empty() {
            return true;
        }
        match self.shared.buffers {
            Buffers::Ring(_) => (self.quota > 0 && !self.has_enough()) || self.oldest_is_done(),
            // Others take buffers too, and the chunk of a copy that is done may stay: only a buffer that the lane has is
            // sure. One that waited for a buffer would keep those of its reads from everybody.
            Buffers::Cache(_) => {
                while self.oldest_is_done() {
                    if let Err(error) = self.retire() {
                        // Nobody else sees it; asking for room tells that the load was stopped.
                        self.shared.outcome.stop(error);
                        return true;
                    }
                }
                let buffer = self.try_buffer();
                self.spare.extend(buffer);
                !self.spare.is_empty()
            }
        }
    }

    fn cached(&mut self, piece: &Piece) -> Result<Option<CachedChunk>> {
        let Buffers::Cache(cache) = self.shared.buffers else { return Ok(None) };
        loop {
            let found = cache.get(piece, || {
                // Whoever reads the chunk may need the buffers that this lane's copies hold.
                self.finish()?;
                self.check()
            })?;
            match found {
                Some(chunk) if !self.is_good(piece, &chunk)? => {
                    // The file may be right: it is read again, by this lane or by who is faster.
                    self.note("chunks in the cache did not match their checksums, and were read again".into());
                    cache.forget_chunk(piece, chunk);
                }
                found => {
                    cache.count(piece, found.is_some());
                    return Ok(found);
                }
            }
        }
    }

    fn need(&mut self, buffers: usize) {
        if matches!(self.shared.buffers, Buffers::Ring(_)) {
            self.needed = buffers;
        }
    }

    fn step(&self) -> usize {
        if self.sums_up { VERIFY_STEP } else { usize::MAX }
    }

    fn arrived(&mut self, beginning: &[u8]) {
        if self.sums_up {
            let verifying = Instant::now();
            update(&mut self.sum, beginning);
            self.times.verify += verifying.elapsed();
        }
    }

    fn filled(&mut self, piece: &Piece, mut filled: Filled) -> Result<()> {
        if let Buffers::Cache(cache) = self.shared.buffers {
            filled = self.cache(cache, piece, filled)?;
            if let (Filled::Cached(chunk), Some(device)) = (&filled, self.shared.pinning) {
                let preparing = Instant::now();
                cache.pin_memory(chunk, device);
                self.times.prepare += preparing.elapsed();
            }
        }
        let part = self.part(piece);
        if let Filled::Buffer(buffer) = &filled {
            if let (Some(chunks), None) = (&self.shared.chunks, part) {
                let verifying = Instant::now();
                let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(buffer.as_slice().len());
                update(&mut self.sum, &buffer.as_slice()[..len]);
                let sum = self.sum.finalize_reset();
                if let Some(chunk) = chunks.take(piece, sum) {
                    self.shared.checkpoint.check_chunk(chunk.file, chunk.number, chunk.sum)?;
                }
                self.times.verify += verifying.elapsed();
            }
            if buffer.is_loan() {
                return self.shared.meter.add(piece.len);
            }
        } else if self.in_flight.len() >= MAPPED_IN_FLIGHT {
            self.retire()?;
        }
        // Nothing is written once the load was stopped.
        self.check()?;
        if let (Some(chunks), Some(part)) = (&self.shared.chunks, part) {
            let verifying = Instant::now();
            chunks.arrive(piece, self.rest(piece, part, &filled)?);
            self.times.verify += verifying.elapsed();
        }
        let copying = Instant::now();
        let receipt = self.shared.outbox.send(filled, self.shared.plan.copies(piece), part)?;
        self.times.copy += copying.elapsed();
        self.in_flight.push_back(receipt);
        self.shared.meter.add(piece.len)
    }

    fn check(&self) -> Result<()> {
        if self.shared.outcome.stopped.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        self.shared.meter.check()
    }

    fn note(&self, note: String) {
        self.shared.outcome.note(note);
    }
}

/// The checksums of bytes that are chunks of a store.
fn sums_of(chunk_len: u64, bytes: &[u8]) -> Sums {
    let chunks = bytes.chunks(usize::try_from(chunk_len).unwrap_or(usize::MAX));
    Sums { chunk_len, of_chunks: chunks.map(crc64_nvme).collect() }
}

/// Takes on what is new in `beginning`.
fn update(sum: &mut Digest, beginning: &[u8]) {
    let known = usize::try_from(sum.get_amount()).unwrap_or(usize::MAX);
    sum.update(beginning.get(known..).unwrap_or_default());
}
