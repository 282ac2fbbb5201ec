//! Memory of ours that the server fills, and out of which the bytes are copied to their places.

use std::sync::OnceLock;

use sllm_core::{Block, Device, MemoryFile, Mover, SharedBlock};
use sllm_proto::{PROCESS_LEN, store as pb};

use crate::client::StoreClient;
use crate::cut::Part;
use crate::error::{Error, Result};
use crate::pass::{pass, random};

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
    /// How many memories to make for `wanted` bytes, and the length of each, where `all` bytes may be taken and `most`
    /// memories. More than one is of use only where there is something to overlap.
    pub(crate) fn lanes(wanted: u64, all: u64, most: usize) -> (usize, u64) {
        let len = all / most as u64 / MIN_LEN * MIN_LEN;
        if len == 0 {
            return (1, MIN_LEN);
        }
        let lanes = usize::try_from(wanted.div_ceil(len)).unwrap_or(most).clamp(1, most);
        // Powers of two, so that those that were too short have together no more than the last one.
        (lanes, wanted.clamp(MIN_LEN, len).next_power_of_two().min(len))
    }

    /// Makes staging memory of `asked` bytes, or of fewer where the device has less and `shorter` does; it will be the
    /// server's block `block`.
    pub(crate) fn make(client: &StoreClient, device: &Device, block: u32, asked: u64, shorter: bool) -> Result<Made> {
        let (memory, attach, len) =
            if device.is_host() { of_host(client, asked)? } else { of_device(device, asked, shorter)? };
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

fn of_device(device: &Device, mut len: u64, shorter: bool) -> Result<(Block, pb::Attach, u64)> {
    let memory = loop {
        match Block::alloc(device, len) {
            // An engine leaves little room; half as much does with more round trips.
            Err(sllm_core::Error::Device(e)) if e.is_out_of_memory() && shorter && len > MIN_LEN => {
                len = (len / 2).next_multiple_of(MIN_LEN);
            }
            result => break result?,
        }
    };
    let shared = memory.export()?;
    let attach = attach_device(device, &shared, shared.offset, shared.len)?;
    Ok((memory, attach, len))
}

/// How the server gets at `len` bytes from `offset` of the allocation that a shared block lies in.
pub(crate) fn attach_device(device: &Device, shared: &SharedBlock, offset: u64, len: u64) -> Result<pb::Attach> {
    let no_uuid = || Error::NotPassed(format!("{} has no UUID by which the server finds it", device.id()));
    let uuid = device.uuid()?.ok_or_else(no_uuid)?;
    let process = process()?.to_vec();
    let (device, handle) = (uuid.to_vec(), shared.handle.to_vec());
    let memory = pb::CudaMemory { device, handle, buffer_id: shared.buffer_id, process };
    Ok(pb::Attach { len, offset, memory: Some(pb::attach::Memory::Cuda(memory)) })
}

/// What tells this process from all others, for the server. A fork needs none of its own: it cannot use the driver.
fn process() -> Result<[u8; PROCESS_LEN]> {
    static PROCESS: OnceLock<[u8; PROCESS_LEN]> = OnceLock::new();
    match PROCESS.get() {
        Some(process) => Ok(*process),
        None => random("a process").map(|process| *PROCESS.get_or_init(|| process)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memories_are_as_many_and_as_long_as_is_of_use() {
        let lanes = |wanted: u64, all: u64| Staging::lanes(wanted, all, 4);
        assert_eq!(lanes(1, 256 << 20), (1, MIN_LEN));
        assert_eq!(lanes(5 << 20, 256 << 20), (1, 8 << 20));
        assert_eq!(lanes(65 << 20, 256 << 20), (2, 64 << 20));
        assert_eq!(lanes(16 << 30, 256 << 20), (4, 64 << 20));
        assert_eq!(lanes(u64::MAX, 9 << 20), (4, 2 << 20));
        assert_eq!((lanes(16 << 30, 0), lanes(16 << 30, 4 << 20)), ((1, MIN_LEN), (1, MIN_LEN)));
    }
}
