//! Filled pieces of all lanes on their way to the devices.
//!
//! Between two copies the link rests for a moment (2.9 us on the host measured, a twentieth of what a piece takes); not
//! between copies of one batch. So while a device has work enough, pieces wait here and are issued together.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::device::{self, Block, Device, DeviceError, Parcel, Pending, Stream};
use crate::plan::PieceCopy;
use crate::read::Filled;

/// Pieces that are issued together at most: their buffers come back together.
pub const MAX_BATCH: usize = 8;
/// Batches that keep a device busy: one is copied while the next is there already.
pub const BUSY: usize = 2;

/// What lanes send copies by.
#[derive(Debug)]
pub(super) struct Outbox<'a> {
    streams: &'a [Stream],
    blocks: Arc<[Block]>,
    /// Pieces that wait at most. The host copies when it is told to, in the thread that tells it.
    most: usize,
    /// Batches that keep all devices of the load busy.
    busy: usize,
    line: Mutex<Line<'a>>,
}

#[derive(Debug, Default)]
struct Line<'a> {
    /// The batch that pieces are added to.
    open: Arc<Batch<'a>>,
    /// Batches that a device may still be busy with, oldest first.
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
    batch: Arc<Batch<'a>>,
    place: usize,
}

impl<'a> Outbox<'a> {
    /// An outbox to the devices that the blocks are of.
    pub(super) fn new(streams: &'a [Stream], blocks: Arc<[Block]>, devices: &[Device]) -> Self {
        let most = if devices.iter().any(Device::is_host) { 1 } else { MAX_BATCH };
        Outbox { streams, blocks, most, busy: BUSY * devices.len(), line: Mutex::default() }
    }

    /// Sends a piece. An error is that of copies issued just now.
    pub(super) fn send(&self, source: Filled, copies: &'a [PieceCopy]) -> Result<Receipt<'a>, DeviceError> {
        let mut line = self.lock();
        let batch = Arc::clone(&line.open);
        let place = {
            let mut parcels = batch.lock();
            parcels.push(Parcel { source, copies });
            parcels.len() - 1
        };
        let is_idle = self.is_idle(&mut line);
        if is_idle || place + 1 >= self.most {
            self.issue(line)?;
        }
        Ok(Receipt { batch, place })
    }

    /// Whether a piece's source was read. A piece that waits is issued where a device has too little to do.
    pub(super) fn is_done(&self, receipt: &Receipt<'a>) -> bool {
        if receipt.batch.pending.get().is_none() {
            let mut line = self.lock();
            if Arc::ptr_eq(&line.open, &receipt.batch) && self.is_idle(&mut line) {
                // An error stays in the batch, for `wait`.
                let _ = self.issue(line);
            }
        }
        receipt.batch.is_done()
    }

    /// Waits until a piece's source was read, and gives it back.
    pub(super) fn wait(&self, receipt: &Receipt<'a>) -> Result<Option<Filled>, DeviceError> {
        let line = self.lock();
        if Arc::ptr_eq(&line.open, &receipt.batch) {
            self.issue(line)?;
        } else {
            drop(line);
        }
        self.pending(&receipt.batch)?.wait(receipt.place)
    }

    /// Issues the open batch. The line is free again before the driver is called.
    fn issue(&self, mut line: MutexGuard<'_, Line<'a>>) -> Result<(), DeviceError> {
        let batch = std::mem::take(&mut line.open);
        line.issued.push_back(Arc::clone(&batch));
        drop(line);
        self.pending(&batch).map(drop)
    }

    /// A batch's copies, issued by whoever comes first. It is not open any more.
    fn pending<'b>(&self, batch: &'b Batch<'a>) -> Result<&'b Pending, DeviceError> {
        let issue = || device::copy(self.streams, &self.blocks, std::mem::take(&mut *batch.lock()));
        batch.pending.get_or_init(issue).as_ref().map_err(Clone::clone)
    }

    /// Whether the devices may run out of work. Forgets batches that are done.
    fn is_idle(&self, line: &mut Line<'a>) -> bool {
        while line.issued.front().is_some_and(|batch| batch.is_done()) {
            line.issued.pop_front();
        }
        line.issued.len() < self.busy
    }

    fn lock(&self) -> MutexGuard<'_, Line<'a>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> Batch<'a> {
    fn is_done(&self) -> bool {
        self.pending.get().is_some_and(|pending| pending.as_ref().map_or(true, Pending::is_done))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Parcel<'a>>> {
        self.parcels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
