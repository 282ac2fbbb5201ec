//! Memory of ours that the server fills, and out of which the bytes are copied to their places.

use sllm_core::{Block, Device, MemoryFile, Mover};
use sllm_proto::store as pb;

use crate::client::StoreClient;
use crate::cut::Part;
use crate::error::{Error, Result};
use crate::pass::pass;

/// Its bytes at least: a row that is not cut fits.
const MIN_LEN: u64 = 2 << 20;

/// Staging memory for blocks of one device that the server does not write to itself.
#[derive(Debug)]
pub(crate) struct Staging {
    /// All of it.
    memory: Block,
    mover: Mover,
    /// Its number among the server's blocks.
    pub(crate) block: u32,
    pub(crate) len: u64,
    /// Bytes that it was to have.
    pub(crate) asked: u64,
}

/// Staging memory, and how the server gets at it.
pub(crate) struct Made {
    pub(crate) staging: Staging,
    pub(crate) attach: pb::Attach,
    /// What must stay until the server has let go of it.
    pub(crate) memory: Block,
}

impl Staging {
    /// Bytes of each of `lanes` memories that have `all` together.
    pub(crate) fn most(all: u64, lanes: usize) -> u64 {
        (all / lanes as u64 / MIN_LEN * MIN_LEN).max(MIN_LEN)
    }

    /// Makes staging memory for `wanted` bytes, `most` at most; it will be the server's block `block`.
    pub(crate) fn make(client: &StoreClient, device: &Device, block: u32, wanted: u64, most: u64) -> Result<Made> {
        let asked = wanted.clamp(MIN_LEN, most).next_multiple_of(MIN_LEN);
        let (memory, attach, len) = if device.is_host() { of_host(client, asked)? } else { of_device(device, asked)? };
        let staging = Staging { memory: memory.clone(), mover: Mover::new(device)?, block, len, asked };
        Ok(Made { staging, attach, memory })
    }

    /// Copies a part that has arrived to where it belongs.
    pub(crate) fn move_out(&self, part: &Part, blocks: &[Block]) -> Result<()> {
        Ok(self.mover.copy(&self.memory, blocks, &part.copies)?)
    }
}

fn of_host(client: &StoreClient, len: u64) -> Result<(Block, pb::Attach, u64)> {
    let memory = MemoryFile::new(len)?;
    let ticket = pass(client, &memory)?;
    let attach = pb::Attach { len, offset: 0, memory: Some(pb::attach::Memory::Ticket(ticket.to_vec())) };
    Ok((memory.block(0, len)?, attach, len))
}

fn of_device(device: &Device, mut len: u64) -> Result<(Block, pb::Attach, u64)> {
    let memory = loop {
        match Block::alloc(device, len) {
            // An engine leaves little room; half as much does with more round trips.
            Err(sllm_core::Error::Device(e)) if e.is_out_of_memory() && len > MIN_LEN => {
                len = (len / 2).next_multiple_of(MIN_LEN);
            }
            result => break result?,
        }
    };
    let shared = memory.export()?;
    let attach = attach_device(device, &shared.handle, shared.offset, shared.len)?;
    Ok((memory, attach, len))
}

/// How the server gets at memory of a device.
pub(crate) fn attach_device(device: &Device, handle: &[u8], offset: u64, len: u64) -> Result<pb::Attach> {
    let no_uuid = || Error::NotPassed(format!("{} has no UUID by which the server finds it", device.id()));
    let uuid = device.uuid()?.ok_or_else(no_uuid)?;
    let memory = pb::CudaMemory { device: uuid.to_vec(), handle: handle.to_vec() };
    Ok(pb::Attach { len, offset, memory: Some(pb::attach::Memory::Cuda(memory)) })
}
