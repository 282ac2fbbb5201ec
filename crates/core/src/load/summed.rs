//! Checksums that devices take of what was copied to them: whether they do, and what is made of what they find.

use std::fmt::Display;

use super::Loader;
use super::chunks::Chunks;
use super::lane::Outcome;
use super::staging::Staging;
use crate::checkpoint::Checkpoint;
use crate::crc;
use crate::device::{Block, Device, DeviceError, Summing, summed_by};
use crate::error::{Error, Result};
use crate::plan::{LoadPlan, Piece};
use crate::verify::sum_of;

/// Bytes of a wrong chunk that are read again at once.
const READ_LEN: usize = 1 << 20;

impl Loader {
    /// The chunks of a plan, and which of them devices sum up.
    pub(super) fn chunks(
        &self,
        plan: &LoadPlan,
        blocks: &[Block],
        (chunk_len, piece_len): (u64, u64),
        staging: &mut Staging,
        outcome: &Outcome,
    ) -> Chunks {
        let refused = |device: &Device, why: &dyn Display| {
            outcome.note(format!("the processor takes checksums, not {}: {why}", device.id()));
        };
        let its = |block: &Block| self.devices.iter().position(|device| device.same_as(block.device()));
        let places: Vec<Option<usize>> = blocks.iter().map(its).collect();
        let is_able = |(place, device): (usize, &Device)| {
            let able = if places.contains(&Some(place)) { device.prepare_sums() } else { Ok(false) };
            able.unwrap_or_else(|why| {
                refused(device, &why);
                false
            })
        };
        let able: Vec<bool> = self.devices.iter().enumerate().map(is_able).collect();
        let devices: Vec<Option<usize>> = places.iter().map(|place| place.filter(|&place| able[place])).collect();
        let mut chunks = Chunks::new(chunk_len, piece_len, plan.pieces(), |pieces| {
            let by = |piece: &Piece| summed_by(piece.len, plan.copies(piece), blocks, &devices);
            let (first, rest) = pieces.split_first()?;
            by(first).filter(|first| rest.iter().all(|piece| by(piece) == Some(*first)))
        });
        for (place, device) in self.devices.iter().enumerate() {
            if chunks.are_for(place)
                && let Err(why) = staging.begin_sums(self, place, chunks.len())
            {
                refused(device, &why);
                chunks.leave(place);
            }
        }
        chunks
    }

    /// Whether devices take checksums.
    pub(super) fn devices_sum_up(&self) -> bool {
        self.devices.iter().all(|device| device.prepare_sums().unwrap_or(false))
    }
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
                remainders.push((chunk.device, summing.remainders(chunk.device)?));
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
