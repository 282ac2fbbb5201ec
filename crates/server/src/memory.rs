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
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a ticket waits to be attached.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tickets that wait at most.
const MAX_WAITING: usize = 256;

/// Threads that take memory at once. A descriptor that hangs when it is closed keeps one of them, and no more.
pub(crate) const TAKEN_AT_ONCE: usize = 4;

/// Memory files that are mapped at most. The system lets a process have some 65,000 mappings, and one that has them all gets
/// no memory and no threads either.
const MAX_MAPPED: usize = 8192;

/// The file system of memory files with ordinary pages, as `fstatfs` tells it.
const TMPFS: u64 = 0x0102_1994;

/// The name that a client gives to memory that it passes.
pub(crate) type Ticket = [u8; TICKET_LEN];

/// Memory of a client, mapped here as long as this lives.
#[derive(Debug)]
pub(crate) struct Mapping {
    addr: u64,
    len: u64,
    _counted: Arc<()>,
}

impl Mapping {
    /// Maps a memory file. Its pages must be there and stay: one that is gone, or that cannot be had when it is first written
    /// to, would kill this process, and one that is had then would be charged to it. So from here on nobody takes them away.
    /// `counted` has a clone for each.
    fn new(file: &impl AsFd, counted: &Arc<()>) -> Result<Mapping, String> {
        check_seals(file)?;
        let strange = |e| format!("the memory file cannot be inspected: {}", io::Error::from(e));
        if u64::try_from(rustix::fs::fstatfs(file).map_err(strange)?.f_type) != Ok(TMPFS) {
            return Err("the memory file is of huge pages (MFD_HUGETLB): make it without".into());
        }
        let bytes = usize::try_from(rustix::fs::fstat(file).map_err(strange)?.st_size).ok();
        let bytes = bytes.filter(|&bytes| bytes > 0).ok_or("the memory file is empty")?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let addr = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, flags, file, 0) }
            .map_err(|e| format!("the memory file cannot be mapped for writing: {}", io::Error::from(e)))?;
        let mapping = Mapping { addr: addr as u64, len: bytes as u64, _counted: Arc::clone(counted) };
        // What is mapped for writing stays so; holes are punched no more.
        rustix::fs::fcntl_add_seals(file, SealFlags::FUTURE_WRITE).map_err(|e| {
            format!("the memory file cannot be sealed with F_SEAL_FUTURE_WRITE: {}", io::Error::from(e))
        })?;
        check_pages(file, mapping.len)?;
        Ok(mapping)
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

/// That its length is fixed, and that seals can be added.
fn check_seals(file: &impl AsFd) -> Result<(), String> {
    let seals = rustix::fs::fcntl_get_seals(file).map_err(|_| "the descriptor is not of a memory file (memfd)")?;
    for (seal, otherwise, name) in [(SealFlags::SHRINK, "shrink", "SHRINK"), (SealFlags::GROW, "grow", "GROW")] {
        if !seals.contains(seal) {
            return Err(format!("the memory file may {otherwise}: seal it with F_SEAL_{name}"));
        }
    }
    if seals.contains(SealFlags::FUTURE_WRITE) {
        return Err("the memory file was passed before (it has F_SEAL_FUTURE_WRITE): pass each once".into());
    }
    if seals.contains(SealFlags::SEAL) {
        return Err("the memory file takes no more seals (F_SEAL_SEAL), as those of clients of an older build: the server adds \
                    F_SEAL_FUTURE_WRITE"
            .into());
    }
    Ok(())
}

/// That a file of `len` bytes, whose seals keep it as it is, has no holes.
fn check_pages(file: &impl AsFd, len: u64) -> Result<(), String> {
    let strange = |e| format!("the memory file cannot be inspected: {}", io::Error::from(e));
    // Memory behind the end counts like memory within. To cut a file where it ends frees it.
    rustix::fs::ftruncate(file, len).map_err(strange)?;
    let held = u64::try_from(rustix::fs::fstat(file).map_err(strange)?.st_blocks).unwrap_or(0).saturating_mul(512);
    if held < len {
        return Err("the memory file has holes: take all of its memory by fallocate".into());
    }
    if held > len.next_multiple_of(rustix::param::page_size() as u64) {
        return Err("the memory file has memory behind its end: make it longer, or take less".into());
    }
    Ok(())
}

/// Memory that was passed and not yet attached.
#[derive(Debug)]
pub(crate) struct Tickets {
    waiting: Mutex<HashMap<Ticket, (Instant, Arc<Mapping>)>>,
    /// All that are mapped, waiting or attached, have a clone.
    mapped: Arc<()>,
    places: Arc<Semaphore>,
}

impl Default for Tickets {
    fn default() -> Tickets {
        Tickets { waiting: Mutex::default(), mapped: Arc::default(), places: Arc::new(Semaphore::new(TAKEN_AT_ONCE)) }
    }
}

impl Tickets {
    /// Waits until memory may be taken, by a thread that has this until it has closed the descriptor.
    pub(crate) async fn place(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed.
        Arc::clone(&self.places).acquire_owned().await.ok()
    }

    /// Takes memory under a ticket. Blocks.
    pub(crate) fn pass(&self, ticket: Ticket, file: &OwnedFd) -> Result<(), String> {
        let mapping = Arc::new(Mapping::new(file, &self.mapped)?);
        let mut waiting = self.fresh();
        // One is ours.
        if Arc::strong_count(&self.mapped) > MAX_MAPPED + 1 {
            return Err(format!(
                "{MAX_MAPPED} memory files are attached already: try again when some loads have ended"
            ));
        }
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
        self.fresh().remove(ticket).map(|(_, mapping)| mapping)
    }

    /// Lets go of what waited too long.
    pub(crate) fn sweep(&self) {
        drop(self.fresh());
    }

    /// What waits, without what waited too long.
    fn fresh(&self) -> MutexGuard<'_, HashMap<Ticket, (Instant, Arc<Mapping>)>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (since, _)| since.elapsed() < PATIENCE);
        waiting
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};
    use sllm_core::PieceCopy;

    use super::*;

    const LEN: u64 = 4 << 20;

    fn sealed(flags: MemfdFlags, fill: impl FnOnce(&OwnedFd)) -> rustix::io::Result<OwnedFd> {
        let file = memfd_create(c"test", flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, LEN)?;
        fill(&file);
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        Ok(file)
    }

    /// One with all of its pages.
    fn whole() -> OwnedFd {
        let fill = |file: &OwnedFd| fallocate(file, FallocateFlags::empty(), 0, LEN).unwrap();
        sealed(MemfdFlags::empty(), fill).unwrap()
    }

    fn map(file: &OwnedFd) -> Result<Mapping, String> {
        Mapping::new(file, &Arc::default())
    }

    #[test]
    fn a_file_whose_pages_are_not_there_is_refused() {
        let punched = |file: &OwnedFd| {
            fallocate(file, FallocateFlags::empty(), 0, LEN).unwrap();
            fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 8192, 4096).unwrap();
        };
        let behind = |file: &OwnedFd| fallocate(file, FallocateFlags::KEEP_SIZE, LEN, LEN).unwrap();
        assert_eq!(map(&whole()).unwrap().len(), LEN);
        for fill in [&punched as &dyn Fn(&OwnedFd), &behind, &|_| ()] {
            let reason = map(&sealed(MemfdFlags::empty(), fill).unwrap()).unwrap_err();
            assert!(reason.contains("holes"), "{reason}");
        }
        // Not every kernel has huge pages.
        if let Ok(huge) = sealed(MemfdFlags::HUGETLB, |_| ()) {
            let reason = map(&huge).unwrap_err();
            assert!(reason.contains("huge pages"), "{reason}");
        }
    }

    #[test]
    fn nobody_takes_pages_of_a_mapped_file_away_and_who_has_it_mapped_writes_on() {
        let theirs = sllm_core::MemoryFile::new(LEN).unwrap();
        let file = theirs.as_fd().try_clone_to_owned().unwrap();
        rustix::io::pwrite(&file, b"word", 0).unwrap();
        let mapping = map(&file).unwrap();
        for flags in [FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, FallocateFlags::KEEP_SIZE] {
            assert_eq!(fallocate(&file, flags, 0, 2 * LEN), Err(rustix::io::Errno::PERM), "{flags:?}");
        }
        assert_eq!(ftruncate(&file, LEN - 1), Err(rustix::io::Errno::PERM));
        let mover = sllm_core::Mover::new(&Device::host()).unwrap();
        let of_ours = [0, 4096].map(|at| mapping.block(at, 4096).unwrap());
        let of_theirs = [0, 8192].map(|at| theirs.block(at, 4096).unwrap());
        for ([from, to], at) in [(of_ours, 4096), (of_theirs, 8192)] {
            let (rows, row_len, src_pitch, dst_pitch) = (1, 4, 4, 4);
            let copy = PieceCopy { src_offset: 0, row_len, rows, src_pitch, block: 0, dst_offset: 100, dst_pitch };
            mover.copy(&from, &[to], &[copy]).unwrap();
            let mut seen = [0; 4];
            rustix::io::pread(&file, &mut seen, at + 100).unwrap();
            assert_eq!(&seen, b"word");
        }
    }

    #[test]
    fn what_is_not_sealed_as_it_must_be_is_refused_with_the_seal() {
        let (fixed, page) = (SealFlags::SHRINK | SealFlags::GROW, 4096);
        for (seals, reason) in [
            (SealFlags::GROW, "F_SEAL_SHRINK"),
            (SealFlags::SHRINK, "F_SEAL_GROW"),
            (fixed | SealFlags::SEAL, "F_SEAL_SEAL"),
            (fixed | SealFlags::FUTURE_WRITE, "passed before"),
            (fixed | SealFlags::WRITE, "mapped for writing"),
        ] {
            let file = memfd_create(c"test", MemfdFlags::ALLOW_SEALING).unwrap();
            fallocate(&file, FallocateFlags::empty(), 0, page).unwrap();
            fcntl_add_seals(&file, seals).unwrap();
            let told = map(&file).unwrap_err();
            assert!(told.contains(reason), "{told}");
        }
        let file = whole();
        map(&file).unwrap();
        assert!(map(&file).unwrap_err().contains("passed before"));
    }

    #[test]
    fn only_so_many_files_are_mapped_that_the_process_can_go_on() {
        let page = || {
            let file = memfd_create(c"test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
            fallocate(&file, FallocateFlags::empty(), 0, 4096).unwrap();
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
            file
        };
        let tickets = Tickets::default();
        let attach = |ticket| tickets.pass(ticket, &page()).map(|()| tickets.take(&ticket).unwrap());
        let mut attached: Vec<_> = (0..MAX_MAPPED).map(|_| attach([1; TICKET_LEN]).unwrap()).collect();
        let reason = attach([1; TICKET_LEN]).unwrap_err();
        assert!(reason.contains("8192 memory files are attached already"), "{reason}");
        attached.pop();
        attach([1; TICKET_LEN]).unwrap();
    }

    #[test]
    fn a_ticket_that_waited_too_long_is_unknown_and_its_memory_is_let_go() {
        let tickets = Tickets::default();
        for (ticket, age) in [(1, Duration::ZERO), (2, PATIENCE), (3, PATIENCE)] {
            tickets.pass([ticket; TICKET_LEN], &whole()).unwrap();
            tickets.waiting.lock().unwrap().get_mut(&[ticket; TICKET_LEN]).unwrap().0 -= age;
        }
        assert!(tickets.take(&[2; TICKET_LEN]).is_none());
        assert_eq!(tickets.waiting.lock().unwrap().len(), 1);
        assert_eq!(tickets.take(&[1; TICKET_LEN]).unwrap().len(), LEN);
        assert!(tickets.take(&[1; TICKET_LEN]).is_none());
    }
}
