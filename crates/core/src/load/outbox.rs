//! Filled pieces of all lanes on their way to the devices.
//!
//! Between two copies the link rests for a moment (2.9 us on the host measured, a twentieth of what a piece takes); not
//! between copies of one batch. So while a device has work enough, pieces for it wait here and are issued together. Each
//! device has a line of its own: what waits for one holds up no other.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::device::{self, Block, DeviceError, Parcel, Part, Pending, Stream};
use crate::plan::PieceCopy;
use crate::read::Filled;

/// Pieces that are issued together at most: their buffers come back together.
pub const MAX_BATCH: usize = 8;
/// Batches that keep a device busy: one is copied while the next is there already.
pub const BUSY: usize = 2;
/// A piece of so many bytes or more is issued at once: the rest after it is a hundredth of its copy, and holding it back
/// costs more where loads are short, as the batches of a store server's clients are (`docs/benchmarks.md`).
const ALONE_LEN: u64 = 16 << 20;

/// Pieces of so many bytes that are issued together at most.
pub(super) fn most(piece_len: u64) -> usize {
    if piece_len < ALONE_LEN { MAX_BATCH } else { 1 }
}

/// Pieces of a batch at most where a load is to so many devices, `most` for one. Their batches together may hold back as
/// many buffers as those of one may: neighbours in a file often go to one device, and with more of them held back for
/// it, the readers have nothing to fill for the others. Two at least, which hide every second rest of the link.
pub fn batch_len(most: usize, devices: usize) -> usize {
    (most / devices.max(1)).max(most.min(2))
}

/// What lanes send copies by.
#[derive(Debug)]
pub(super) struct Outbox<'a> {
    streams: &'a [Stream],
    blocks: Arc<[Block]>,
    /// One a stream, so one a device.
    lines: Vec<Line<'a>>,
    /// By block: the line of its device.
    line_of: Vec<usize>,
}

/// The pieces of one device. A piece whose copies go to several is in the line of the first copy's.
#[derive(Debug)]
struct Line<'a> {
    /// Pieces that wait at most. The host copies when it is told to, in the thread that tells it.
    most: usize,
    batches: Mutex<Batches<'a>>,
}

#[derive(Debug, Default)]
struct Batches<'a> {
    /// The batch that pieces are added to.
    open: Arc<Batch<'a>>,
    /// Batches that the device may still be busy with, oldest first.
    issued: VecDeque<Arc<Batch<'a>>>,
}

#[derive(Debug, Default)]
struct Batch<'a> {
    parcels: Mutex<Vec<Parcel<'a>>>,
    pending: OnceLock<Result<Pending, DeviceError>>,
}

/// A piece that was sent. Its source comes back by [`Outbox::wait`].
#[derive(Debug)]
pub(super) struct Receipt<'a> {
    line: usize,
    batch: Arc<Batch<'a>>,
    place: usize,
}

impl<'a> Outbox<'a> {
    /// An outbox by these streams, one a device, to the blocks, for batches of `most` pieces where there is one device.
    pub(super) fn new(streams: &'a [Stream], blocks: Arc<[Block]>, most: usize) -> Self {
        // A block of no stream is an error of whoever issues copies to it.
        let line_of: Vec<usize> = blocks.iter().map(|block| device::stream_of(streams, block).unwrap_or(0)).collect();
        let is_host = |place: usize| streams[place].device().is_host();
        let devices = (0..streams.len()).filter(|place| line_of.contains(place) && !is_host(*place)).count();
        let of_line = |place| if is_host(place) { 1 } else { batch_len(most, devices) };
        let lines = (0..streams.len()).map(|place| Line { most: of_line(place), batches: Mutex::default() }).collect();
        Outbox { streams, blocks, lines, line_of }
    }

    /// Sends a piece, which may be a part of a chunk that its device sums up. An error is that of copies issued just now.
    pub(super) fn send(
        &self,
        source: Filled,
        copies: &'a [PieceCopy],
        part: Option<Part>,
    ) -> Result<Receipt<'a>, DeviceError> {
        let place_of = |copy: &PieceCopy| self.line_of.get(copy.block).copied().unwrap_or(0);
        let line = copies.first().map_or(0, place_of);
        let lines = copies.iter().filter_map(|copy| self.lines.get(place_of(copy)));
        let most = lines.map(|line| line.most).min().unwrap_or(1);
        let batches = self.line(line)?.lock();
        let batch = Arc::clone(&batches.open);
        let place = {
            let mut parcels = batch.lock();
            parcels.push(Parcel { source, copies, part });
            parcels.len() - 1
        };
        if place + 1 >= most {
            self.issue(batches)?;
        } else {
            drop(batches);
            self.issue_idle()?;
        }
        Ok(Receipt { line, batch, place })
    }

    /// Whether a piece's source was read. What waits is issued where a device has too little to do.
    pub(super) fn is_done(&self, receipt: &Receipt<'a>) -> bool {
        if receipt.batch.pending.get().is_none() {
            // An error stays in the batch, for `wait`.
            let _ = self.issue_idle();
        }
        receipt.batch.is_done()
    }

    /// Waits until a piece's source was read, and gives it back.
    pub(super) fn wait(&self, receipt: &Receipt<'a>) -> Result<Option<Filled>, DeviceError> {
        let batches = self.line(receipt.line)?.lock();
        if Arc::ptr_eq(&batches.open, &receipt.batch) {
            self.issue(batches)?;
        } else {
            drop(batches);
        }
        self.pending(&receipt.batch)?.wait(receipt.place)
    }

    fn line(&self, place: usize) -> Result<&Line<'a>, DeviceError> {
        self.lines.get(place).ok_or(DeviceError::OutOfBounds)
    }

    /// Issues what waits for devices that have too little to do. Whoever comes by sees to all of them: a lane whose oldest
    /// piece is of a busy device may be the only one that does.
    fn issue_idle(&self) -> Result<(), DeviceError> {
        for line in &self.lines {
            let mut batches = line.lock();
            if !batches.open.is_empty() && batches.are_few() {
                self.issue(batches)?;
            }
        }
        Ok(())
    }

    /// Issues the open batch of a line, which is free again before the driver is called.
    fn issue(&self, mut batches: MutexGuard<'_, Batches<'a>>) -> Result<(), DeviceError> {
        let batch = std::mem::take(&mut batches.open);
        // Where no piece waits, nobody else forgets what is done, and each keeps an event of the driver's.
        batches.forget_done();
        batches.issued.push_back(Arc::clone(&batch));
        drop(batches);
        self.pending(&batch).map(drop)
    }

    /// A batch's copies, issued by whoever comes first. It is not open any more.
    fn pending<'b>(&self, batch: &'b Batch<'a>) -> Result<&'b Pending, DeviceError> {
        let issue = || device::copy(self.streams, &self.blocks, std::mem::take(&mut *batch.lock()));
        batch.pending.get_or_init(issue).as_ref().map_err(Clone::clone)
    }
}

impl<'a> Line<'a> {
    fn lock(&self) -> MutexGuard<'_, Batches<'a>> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Batches<'_> {
    /// Whether the device may run out of work.
    fn are_few(&mut self) -> bool {
        self.forget_done();
        self.issued.len() < BUSY
    }

    fn forget_done(&mut self) {
        while self.issued.front().is_some_and(|batch| batch.is_done()) {
            self.issued.pop_front();
        }
    }
}

impl<'a> Batch<'a> {
    fn is_done(&self) -> bool {
        self.pending.get().is_some_and(|pending| pending.as_ref().map_or(true, Pending::is_done))
    }

    fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Parcel<'a>>> {
        self.parcels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cuda::Driver;

    use super::*;
    use crate::device::Device;
    use crate::load::PIECE_LEN;
    use crate::pool::BufferPool;

    const LEN: u64 = 4096;

    /// The copy of a whole piece to a block of its own.
    fn copy(block: usize) -> PieceCopy {
        PieceCopy { src_offset: 0, row_len: LEN, rows: 1, src_pitch: LEN, block, dst_offset: 0, dst_pitch: LEN }
    }

    /// Sends pieces of these copies by an outbox to cuda:0 (block 0), cuda:1 (block 1) and the host (block 2).
    fn with_outbox<'a>(
        streams: &'a mut Vec<Stream>,
        most: usize,
        test: impl FnOnce(&Outbox<'a>, &dyn Fn(&'a [PieceCopy]) -> Receipt<'a>),
    ) {
        let devices = [Device::cuda(0).unwrap(), Device::cuda(1).unwrap(), Device::host()];
        *streams = devices.iter().map(|device| device.stream().unwrap()).collect();
        let blocks: Arc<[Block]> = devices.iter().map(|device| Block::alloc(device, LEN).unwrap()).collect();
        let pool = BufferPool::new(4096, 32, 1 << 20, Some(&devices[0])).unwrap();
        let outbox = Outbox::new(streams, blocks, most);
        test(&outbox, &|copies| outbox.send(Filled::Buffer(pool.try_acquire().unwrap()), copies, None).unwrap());
    }

    fn is_issued(receipt: &Receipt<'_>) -> bool {
        receipt.batch.pending.get().is_some()
    }

    #[test]
    fn a_device_waits_for_no_pieces_of_another() {
        let driver = Driver::load();
        driver.set_devices(2);
        driver.set_delay(Duration::from_secs(2));
        let (first, second, mut streams) = ([copy(0)], [copy(1)], Vec::new());
        with_outbox(&mut streams, MAX_BATCH, |outbox, send| {
            let busy: Vec<_> = (0..5).map(|_| send(&first)).collect();
            assert_eq!(busy.iter().filter(|piece| is_issued(piece)).count(), BUSY, "what a device has to do");
            let idle: Vec<_> = (0..3).map(|_| send(&second)).collect();
            assert_eq!(idle.iter().filter(|piece| is_issued(piece)).count(), BUSY, "and the other one");
            assert_eq!(driver.count("cuMemcpyBatchAsync"), 0);
            // Three wait for the first device; that they are waited for issues them together, and nothing of the other's.
            assert!(outbox.wait(&busy[4]).unwrap().is_some());
            assert!(busy.iter().all(is_issued));
            assert_eq!(driver.count("cuMemcpyBatchAsync"), 1);
        });
    }

    #[test]
    fn a_long_piece_is_issued_at_once() {
        assert_eq!([1, PIECE_LEN, ALONE_LEN - 1, ALONE_LEN, u64::MAX].map(most), [8, 8, 8, 1, 1]);
        let driver = Driver::load();
        driver.set_devices(2);
        driver.set_delay(Duration::from_secs(2));
        let (first, mut streams) = ([copy(0)], Vec::new());
        with_outbox(&mut streams, most(ALONE_LEN), |_, send| {
            let pieces: Vec<_> = (0..5).map(|_| send(&first)).collect();
            assert!(pieces.iter().all(is_issued));
            assert_eq!((driver.count("cuMemcpyBatchAsync"), driver.count("cuMemcpyHtoDAsync")), (0, 5));
        });
    }

    #[test]
    fn what_was_copied_is_forgotten_also_where_no_piece_waits() {
        let driver = Driver::load();
        driver.set_devices(2);
        let (device, host, mut streams) = ([copy(0)], [copy(2)], Vec::new());
        with_outbox(&mut streams, most(ALONE_LEN), |outbox, send| {
            let before = driver.count("cuEventCreate");
            for copies in [&device, &host] {
                for _ in 0..100 {
                    assert!(outbox.wait(&send(copies)).unwrap().is_some());
                }
            }
            let kept = outbox.lines.iter().map(|line| line.lock().issued.len());
            assert!(kept.max() <= Some(1), "each keeps an event of the driver's");
            assert!(driver.count("cuEventCreate") - before <= 2);
        });
    }

    #[test]
    fn batches_of_several_devices_hold_back_no_more_than_those_of_one() {
        assert_eq!([0, 1, 2, 3, 4, 8, 64].map(|devices| batch_len(MAX_BATCH, devices)), [8, 8, 4, 2, 2, 2, 2]);
        assert_eq!([1, 8].map(|devices| batch_len(1, devices)), [1, 1], "one is one");
        let driver = Driver::load();
        driver.set_devices(2);
        driver.set_delay(Duration::from_secs(2));
        let (first, mut streams) = ([copy(0)], Vec::new());
        with_outbox(&mut streams, MAX_BATCH, |_, send| {
            let pieces: Vec<_> = (0..7).map(|_| send(&first)).collect();
            assert_eq!(pieces.iter().filter(|piece| is_issued(piece)).count(), BUSY + 4);
            assert_eq!(driver.count("cuMemcpyBatchAsync"), 1);
        });
    }

    #[test]
    fn a_lane_that_asks_for_a_busy_devices_piece_issues_what_waits_for_an_idle_one() {
        let driver = Driver::load();
        driver.set_devices(2);
        let (first, second, mut streams) = ([copy(0)], [copy(1)], Vec::new());
        with_outbox(&mut streams, MAX_BATCH, |outbox, send| {
            driver.set_delay(Duration::from_secs(3));
            let busy: Vec<_> = (0..3).map(|_| send(&first)).collect();
            driver.set_delay(Duration::from_millis(500));
            let waiting = [send(&second), send(&second), send(&second)];
            assert!(!is_issued(&waiting[2]));
            outbox.streams[1].synchronize().unwrap();
            assert!(!outbox.is_done(&busy[2]) && !is_issued(&busy[2]), "the first device has two to do");
            assert!(is_issued(&waiting[2]), "the second has none");
        });
    }

    #[test]
    fn a_piece_of_several_devices_goes_with_its_first_and_one_of_the_host_at_once() {
        let driver = Driver::load();
        driver.set_devices(2);
        driver.set_delay(Duration::from_secs(2));
        let (first, both) = ([copy(0)], [copy(0), copy(1)]);
        let (host, last_to_host, mut streams) = ([copy(2)], [copy(0), copy(2)], Vec::new());
        with_outbox(&mut streams, MAX_BATCH, |outbox, send| {
            let alone = [send(&first), send(&first)];
            let together = [send(&both), send(&first)];
            assert!(alone.iter().all(is_issued) && !together.iter().any(is_issued));
            let of_host = [send(&host), send(&host), send(&host)];
            assert!(of_host.iter().all(|piece| is_issued(piece) && outbox.is_done(piece)));
            assert!(!together.iter().any(is_issued), "the host's pieces concern no other line");
            let mixed = send(&last_to_host);
            assert!(is_issued(&mixed) && together.iter().all(is_issued), "the host's copy does not wait");
            assert_eq!((driver.count("cuMemcpyBatchAsync"), driver.count("cuMemcpyHtoDAsync")), (1, 3));
            assert!(outbox.wait(&mixed).unwrap().is_some());
            outbox.streams[1].synchronize().unwrap();
            assert_eq!(driver.get("copies_h2d"), 6);
        });
    }
}
