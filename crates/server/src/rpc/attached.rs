//! Memory that a client's session has attached.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sllm_core::Block;
use sllm_proto::PROCESS_LEN;
use sllm_proto::store::{Attach, CudaMemory, attach};
use tonic::Status;

use super::held::Held;
use crate::devices::{OpenDevice, Uuid};
use crate::fault::invalid;
use crate::imports::{Allocation, Handle, Hold};
use crate::memory::{Mapping, Ticket};
use crate::room::Taken;
use crate::store::{Store, blocking};

/// Blocks of a session at most.
const MAX_BLOCKS: usize = 1 << 16;

/// Memory of a client, as long as it is its.
#[derive(Default)]
pub(super) struct Attached {
    parts: Vec<(Part, Taken)>,
    mappings: HashMap<Ticket, Arc<Mapping>>,
    kept: HashMap<Memory, Hold>,
    devices: HashMap<Uuid, OpenDevice>,
    /// Time that the driver took to open memory of GPUs.
    pub(super) opening: Duration,
}

/// Memory of a GPU as a client names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Memory {
    handle: Handle,
    /// `None`: the handle may be another allocation's in the next batch.
    allocation: Option<Allocation>,
}

/// What a client calls a block.
enum Part {
    Host(Block),
    /// A range of memory that each batch opens, or finds open.
    Cuda(Memory, u64, u64),
}

/// Attaches memory. Whatever is refused, what was attached is let go on a thread that may block.
pub(super) async fn attach_memory(
    store: &Arc<Store>,
    mut attached: Attached,
    attach: Attach,
) -> Result<Attached, Status> {
    let store = Arc::clone(store);
    let work = move || {
        if attached.parts.len() >= MAX_BLOCKS {
            return Err(invalid(format!("a session has {MAX_BLOCKS} blocks at most")));
        }
        let full = || Status::resource_exhausted("the sessions of all clients have too many blocks: try again later");
        let place = store.blocks.try_take(1).ok_or_else(full)?;
        let part = match &attach.memory {
            Some(attach::Memory::Ticket(ticket)) => {
                attached.host_block(&store, ticket, attach.offset, attach.len).map(Part::Host)
            }
            Some(attach::Memory::Cuda(cuda)) => attached.cuda_part(&store, cuda, attach.offset, attach.len),
            None => Err(invalid("the memory to attach is missing")),
        };
        attached.parts.push((part?, place));
        Ok(attached)
    };
    blocking(work).await?
}

/// The blocks of these numbers, with their memory open.
pub(super) async fn hold(
    store: &Arc<Store>,
    mut attached: Attached,
    numbers: Vec<usize>,
) -> Result<(Attached, Held<Memory>), Status> {
    // Most is open still, and takes no call of the driver.
    if let Ok(held) = attached.hold(&numbers, |attached, memory| attached.kept(memory)) {
        return Ok((attached, held));
    }
    let store = Arc::clone(store);
    let open = move || {
        let held = attached.hold(&numbers, |attached, memory| {
            let hold = attached.open(&store, memory)?;
            if memory.allocation.is_some() {
                attached.kept.insert(memory, hold.keep());
            }
            Ok(hold)
        })?;
        attached.kept.retain(|memory, _| memory.allocation.is_some());
        Ok((attached, held))
    };
    blocking(open).await?
}

impl Attached {
    fn host_block(&mut self, store: &Store, ticket: &[u8], offset: u64, len: u64) -> Result<Block, Status> {
        let wrong = || invalid("no memory waits under this ticket: pass it first, over the same Unix socket");
        let ticket = Ticket::try_from(ticket).map_err(|_| wrong())?;
        let mapping = match self.mappings.get(&ticket) {
            Some(mapping) => mapping,
            None => {
                let mapping = store.tickets.take(&ticket).ok_or_else(wrong)?;
                self.mappings.entry(ticket).or_insert(mapping)
            }
        };
        let whole = mapping.len();
        let outside =
            || invalid(format!("{len} bytes from {offset} are not inside the {whole} bytes that were passed"));
        mapping.block(offset, len).ok_or_else(outside)
    }

    /// Opens the memory, so that a handle that leads nowhere is told at once, and keeps it open for the batches.
    fn cuda_part(&mut self, store: &Store, cuda: &CudaMemory, offset: u64, len: u64) -> Result<Part, Status> {
        let device = Uuid::try_from(&cuda.device[..]).map_err(|_| invalid("a device's UUID has 16 bytes"))?;
        let bytes = <[u8; 64]>::try_from(&cuda.handle[..]).map_err(|_| invalid("a CUDA IPC handle has 64 bytes"))?;
        let allocation = match cuda.buffer_id {
            Some(buffer_id) => {
                let wrong = |_| invalid(format!("a process is told by {PROCESS_LEN} bytes where a buffer is"));
                Some(Allocation { process: cuda.process[..].try_into().map_err(wrong)?, buffer_id })
            }
            None => None,
        };
        let memory = Memory { handle: Handle { device, bytes }, allocation };
        if allocation.is_none() {
            // What was attached by this handle before may be gone.
            self.kept.remove(&memory);
        }
        let hold = self.open(store, memory)?;
        hold.block(offset, len)?;
        self.kept.insert(memory, hold.keep());
        Ok(Part::Cuda(memory, offset, len))
    }

    fn open(&mut self, store: &Store, memory: Memory) -> Result<Hold, Status> {
        let uuid = memory.handle.device;
        let device = match self.devices.entry(uuid) {
            Entry::Occupied(device) => device.into_mut(),
            Entry::Vacant(place) => place.insert(store.devices.open(&uuid)?),
        };
        let opening = Instant::now();
        let hold = store.imports.open(device, &memory.handle, memory.allocation, self.kept.get(&memory))?;
        self.opening += opening.elapsed();
        Ok(hold)
    }

    /// Memory that is kept open. What is not told by its allocation is opened for each batch.
    fn kept(&self, memory: Memory) -> Result<Hold, Status> {
        let kept = self.kept.get(&memory).filter(|_| memory.allocation.is_some());
        kept.and_then(Hold::again).ok_or_else(|| invalid("the memory is not open"))
    }

    /// Blocks by their numbers, whose memory `open` holds.
    fn hold(
        &mut self,
        numbers: &[usize],
        open: impl Fn(&mut Attached, Memory) -> Result<Hold, Status>,
    ) -> Result<Held<Memory>, Status> {
        let mut held = Held::default();
        for &number in numbers {
            match self.parts.get(number) {
                Some((Part::Host(block), _)) => held.add(block.clone()),
                Some(&(Part::Cuda(memory, offset, len), _)) => {
                    held.add_of(memory, || open(self, memory), |hold| hold.block(offset, len))?;
                }
                None => return Err(invalid(format!("there is no block {number}"))),
            }
        }
        Ok(held)
    }

    /// Blocks that are attached.
    pub(super) fn blocks(&self) -> usize {
        self.parts.len()
    }

    /// Mappings of memory files, which stay as long as these do.
    pub(super) fn mappings(&self) -> Vec<Arc<Mapping>> {
        self.mappings.values().cloned().collect()
    }
}
