//! Checksums that devices take of what was copied to them: whether they do, and what is made of what they find.

use std::time::{Duration, Instant};

use super::Loader;
use super::chunks::Chunks;
use crate::checkpoint::Checkpoint;
use crate::crc;
use crate::device::{Block, Device, DeviceError, Summing, SumsState, summed_by};
use crate::error::{Error, Result};
use crate::plan::{LoadPlan, Piece};
use crate::read::EngineChoice;
use crate::read::choose::PREAD_CPUS;
use crate::threads::processors;
use crate::verify::sum_of;

/// Bytes of a checkpoint from which devices are made ready, which takes 40 to 140 ms where the driver has to compile the
/// kernel; the lanes take checksums until then.
const WORTH_PREPARING: u64 = 256 << 20;
/// Bytes of a load for which that is waited for where processors are so few that pages are copied in place, since the
/// processor takes no checksum of such pages.
const WORTH_WAITING: u64 = 4 << 30;
/// How long at most.
const WAIT: Duration = Duration::from_millis(250);
const POLL: Duration = Duration::from_micros(200);
/// Bytes of a wrong chunk that are read again at once.
const READ_LEN: usize = 1 << 20;

impl Loader {
    /// Begins to make devices ready to take checksums, where they are to be compared and the checkpoint is so large that it
    /// is worth that. A load that copies pages in place has no other way.
    pub(super) fn prepare_sums(&self, checkpoint: &Checkpoint) {
        let len = checkpoint.files().iter().map(|file| file.len()).fold(0, u64::saturating_add);
        let is_worth = len >= WORTH_PREPARING || self.wishes.engine == EngineChoice::Mapped;
        if is_worth && self.wishes.verify && self.cache.is_none() {
            self.devices.iter().for_each(|device| device.prepare_sums());
        }
    }

    /// Waits until devices are ready, or never will be, where that is worth it.
    pub(super) fn wait_for_sums(&self, len: u64) {
        let is_worth = match self.wishes.engine {
            EngineChoice::Auto => len >= WORTH_WAITING && processors() < PREAD_CPUS,
            EngineChoice::Mapped => true,
            EngineChoice::Pread | EngineChoice::Uring => false,
        };
        let begun = Instant::now();
        let is_unready = || self.devices.iter().any(|device| device.sums() == SumsState::Preparing);
        while is_worth && is_unready() && begun.elapsed() < WAIT {
            std::thread::sleep(POLL);
        }
    }

    /// The chunks of a plan, and which of them devices can sum up, now or soon.
    pub(super) fn chunks(&self, plan: &LoadPlan, blocks: &[Block], chunk_len: u64, piece_len: u64) -> Chunks {
        let able: Vec<bool> = self.devices.iter().map(|device| is_able(&device.sums())).collect();
        Chunks::new(chunk_len, piece_len, plan.pieces(), |pieces| {
            let by = |piece: &Piece| summed_by(piece.len, plan.copies(piece), blocks, &self.devices);
            let first = by(pieces.first()?).filter(|&place| able[place])?;
            pieces.iter().all(|piece| by(piece) == Some(first)).then_some(first)
        })
    }

    /// Whether devices take the checksums of the next load, or may be ready to when it begins.
    pub(super) fn devices_may_sum(&self) -> bool {
        self.devices.iter().all(|device| is_able(&device.sums()))
    }

    /// Whether the lanes have to take some of the checksums.
    pub(super) fn lanes_sum_up(&self, chunks: &Chunks) -> bool {
        !chunks.devices_can_all(|place| self.devices[place].sums() == SumsState::Ready)
    }

    /// Why a device does not take checksums that are to be compared, if one should.
    pub(super) fn sums_refusal(&self) -> Option<String> {
        self.devices.iter().filter(|_| self.wishes.verify).find_map(|device| match device.sums() {
            SumsState::Refused(why) => Some(format!("{} does not take checksums: {why}", device.id())),
            SumsState::Never | SumsState::Unready | SumsState::Preparing | SumsState::Ready => None,
        })
    }
}

fn is_able(state: &SumsState) -> bool {
    matches!(state, SumsState::Ready | SumsState::Preparing)
}

/// Compares the checksums that devices took, and gives the bytes that they took them of.
pub(super) fn compare(
    checkpoint: &Checkpoint,
    chunks: &Chunks,
    devices: &[Device],
    summing: &Summing<'_>,
) -> Result<u64> {
    let mut remainders: Vec<(usize, Vec<u64>)> = Vec::new();
    // Most chunks have one length.
    let mut of_zeros = (0, crc::of_zeros(0));
    let mut total = 0;
    for chunk in chunks.summed() {
        let known = remainders.iter().position(|(device, _)| *device == chunk.device);
        let place = match known {
            Some(place) => place,
            None => {
                remainders.push((chunk.device, summing.take(chunk.device)?));
                remainders.len() - 1
            }
        };
        if of_zeros.0 != chunk.len {
            of_zeros = (chunk.len, crc::of_zeros(chunk.len));
        }
        let remainder = remainders[place].1.get(chunk.slot).ok_or(DeviceError::OutOfBounds)?;
        let compared = checkpoint.check_chunk(chunk.file, chunk.number, of_zeros.1 ^ chunk.rest ^ remainder);
        compared.map_err(|error| explain(checkpoint, error, chunk.file, chunk.number, &devices[chunk.device]))?;
        total += chunk.len;
    }
    Ok(total)
}

/// Tells whether a chunk is wrong in its file, or has become so on the way to the device.
fn explain(checkpoint: &Checkpoint, error: Error, file: usize, number: u64, device: &Device) -> Error {
    let Error::Corrupt(fault) = error else { return error };
    match sum_of(&checkpoint.files()[file], fault.offset, fault.len, &mut vec![0; READ_LEN], |_| Ok(())) {
        Ok(sum) if sum == fault.expected => {
            DeviceError::Altered { device: device.id(), path: fault.path, chunk: number }.into()
        }
        Ok(_) => Error::Corrupt(fault),
        Err(error) => error,
    }
}
