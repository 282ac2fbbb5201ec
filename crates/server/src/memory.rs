//! Memory files of clients, mapped by tickets.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};
use sllm_core::{Block, Device};
use sllm_proto::TICKET_LEN;

/// How long a ticket waits to be attached.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tickets that wait at most.
const MAX_WAITING: usize = 256;

/// The name that a client gives to memory that it passes.
pub(crate) type Ticket = [u8; TICKET_LEN];

/// Memory of a client, mapped here as long as this lives.
#[derive(Debug)]
pub(crate) struct Mapping {
    addr: u64,
    len: u64,
}

impl Mapping {
    /// Maps a memory file. It must be sealed against shrinking: a page that is gone would kill whoever writes to it.
    pub(crate) fn new(file: &impl AsFd) -> Result<Mapping, String> {
        let seals = rustix::fs::fcntl_get_seals(file).map_err(|_| "the descriptor is not of a memory file (memfd)")?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err("the memory file may shrink: seal it with F_SEAL_SHRINK".into());
        }
        let len = rustix::fs::fstat(file).map_err(|e| format!("the memory file cannot be inspected: {e}"))?.st_size;
        let bytes = usize::try_from(len).ok().filter(|&len| len > 0).ok_or("the memory file is empty")?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let addr = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, flags, file, 0) }
            .map_err(|e| format!("the memory file cannot be mapped for writing: {}", io::Error::from(e)))?;
        Ok(Mapping { addr: addr as u64, len: bytes as u64 })
    }

    /// A part of it to load into; `None` where that is not inside. The caller keeps the mapping while a load runs.
    pub(crate) fn block(&self, offset: u64, len: u64) -> Option<Block> {
        let end = offset.checked_add(len)?;
        // SAFETY: the range is inside the mapping, which whoever holds the block keeps (`Session`). The client may
        // write there too, as any process may to memory it shares: then the bytes are what it made of them.
        (end <= self.len).then(|| unsafe { Block::from_raw(&Device::host(), self.addr + offset, len) })
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (Ok(addr), Ok(len)) = (usize::try_from(self.addr), usize::try_from(self.len)) else { return };
        // SAFETY: `new` mapped exactly this, and nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(addr as *mut _, len) };
    }
}

/// Memory that was passed and not yet attached.
#[derive(Debug, Default)]
pub(crate) struct Tickets {
    waiting: Mutex<HashMap<Ticket, (Instant, Arc<Mapping>)>>,
}

impl Tickets {
    /// Takes memory under a ticket.
    pub(crate) fn pass(&self, ticket: Ticket, file: &OwnedFd) -> Result<(), String> {
        let mapping = Arc::new(Mapping::new(file)?);
        let mut waiting = self.lock();
        waiting.retain(|_, (since, _)| since.elapsed() < PATIENCE);
        if waiting.len() >= MAX_WAITING {
            return Err(format!(
                "{MAX_WAITING} memory files wait to be attached: attach some, or try again in a minute"
            ));
        }
        match waiting.insert(ticket, (Instant::now(), mapping)) {
            None => Ok(()),
            Some(first) => {
                waiting.insert(ticket, first);
                Err("the ticket is taken: choose 16 random bytes".into())
            }
        }
    }

    /// Gives the memory of a ticket, once.
    pub(crate) fn take(&self, ticket: &Ticket) -> Option<Arc<Mapping>> {
        let (since, mapping) = self.lock().remove(ticket)?;
        (since.elapsed() < PATIENCE).then_some(mapping)
    }

    /// Lets go of what waited too long.
    pub(crate) fn sweep(&self) {
        self.lock().retain(|_, (since, _)| since.elapsed() < PATIENCE);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Ticket, (Instant, Arc<Mapping>)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
