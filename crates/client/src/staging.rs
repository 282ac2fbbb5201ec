//! Memory of ours that the server fills, in two halves: while it fills one, the other is copied out.

use sllm_core::{Block, Device, MemoryFile, Mover};
use sllm_proto::store as pb;

use crate::client::StoreClient;
use crate::cut::Part;
use crate::error::{Error, Result};
use crate::pass::pass;

/// Bytes of a half at least: a row that is not cut fits.
const MIN_HALF: u64 = 2 << 20;

/// Staging memory for the blocks of one device that the server cannot write to itself.
#[derive(Debug)]
pub(crate) struct Staging {
    /// All of it.
    memory: Block,
    mover: Mover,
    /// Its number among the server's blocks.
    pub(crate) block: u32,
    pub(crate) half_len: u64,
}

/// Staging memory, and how the server gets at it.
pub(crate) struct Made {
    pub(crate) staging: Staging,
    pub(crate) attach: pb::Attach,
    /// What must stay until the server has let go of it.
    pub(crate) memory: Block,
}

impl Staging {
    /// Makes staging memory for `wanted` bytes, `most` at most; it will be the server's block `block`.
    pub(crate) fn make(client: &StoreClient, device: &Device, block: u32, wanted: u64, most: u64) -> Result<Made> {
        // More than one half is of use only where there is something to overlap.
        let half_len = wanted.min(most / 2).clamp(MIN_HALF, (most / 2).max(MIN_HALF)).next_multiple_of(MIN_HALF);
        let (memory, attach, half_len) =
            if device.is_host() { of_host(client, half_len)? } else { of_device(device, half_len)? };
        let staging = Staging { memory: memory.clone(), mover: Mover::new(device)?, block, half_len };
        Ok(Made { staging, attach, memory })
    }

    /// Where a half begins.
    pub(crate) fn base(&self, half: u8) -> u64 {
        u64::from(half) * self.half_len
    }

    /// Copies a part that has arrived to where it belongs.
    pub(crate) fn move_out(&self, part: &Part, blocks: &[Block]) -> Result<()> {
        Ok(self.mover.copy(&self.memory, blocks, &part.copies)?)
    }
}

fn of_host(client: &StoreClient, half_len: u64) -> Result<(Block, pb::Attach, u64)> {
    let len = 2 * half_len;
    let memory = MemoryFile::new(len)?;
    let ticket = pass(client, &memory)?;
    let attach = pb::Attach { len, offset: 0, memory: Some(pb::attach::Memory::Ticket(ticket.to_vec())) };
    Ok((memory.block(0, len)?, attach, half_len))
}

fn of_device(device: &Device, mut half_len: u64) -> Result<(Block, pb::Attach, u64)> {
    let memory = loop {
        match Block::alloc(device, 2 * half_len) {
            // An engine leaves little room; half as much does with more round trips.
            Err(sllm_core::Error::Device(e)) if e.is_out_of_memory() && half_len > MIN_HALF => half_len /= 2,
            result => break result?,
        }
    };
    let half_len = half_len / MIN_HALF * MIN_HALF;
    let shared = memory.export()?;
    let attach = attach_device(device, &shared.handle, shared.offset, shared.len)?;
    Ok((memory, attach, half_len))
}

/// How the server gets at memory of a device.
pub(crate) fn attach_device(device: &Device, handle: &[u8], offset: u64, len: u64) -> Result<pb::Attach> {
    let no_uuid = || Error::NotPassed(format!("{} has no UUID by which the server finds it", device.id()));
    let uuid = device.uuid()?.ok_or_else(no_uuid)?;
    let memory = pb::CudaMemory { device: uuid.to_vec(), handle: handle.to_vec() };
    Ok(pb::Attach { len, offset, memory: Some(pb::attach::Memory::Cuda(memory)) })
}
