//! Anonymous host memory in huge pages where the system has them.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::format::PAGE_BYTES;

/// NUMA nodes that the kernel may have at most.
const NODES: usize = 1024;
/// Bits of a word of the kernel's sets.
const WORD_BITS: usize = libc::c_ulong::BITS as usize;

/// Bytes of a huge page, on most systems.
const HUGE_PAGE: usize = 2 << 20;

/// A mapping of memory that is in no file system, zeroed, page-aligned: a private anonymous one, which asks for huge
/// pages, since those pin ten times faster, or one of a memory file.
#[derive(Debug)]
pub(crate) struct HostMemory {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, and its address may be used from any thread.
unsafe impl Send for HostMemory {}
// SAFETY: sharing it gives only its address and length; what is written there is the business of those who do.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Maps `len` bytes, or somewhat more, without touching them. No memory is used until then.
    pub(crate) fn map(len: usize) -> io::Result<HostMemory> {
        if len == 0 {
            return Ok(HostMemory { ptr: NonNull::dangling(), len });
        }
        // The kernel aligns to huge pages only what is so long.
        let rounded = if len < HUGE_PAGE / 4 { None } else { len.checked_next_multiple_of(HUGE_PAGE) };
        let len = rounded.unwrap_or(len);
        // SAFETY: a new private mapping at an address that the system chooses touches no memory of others.
        let ptr = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        ask_for_huge_pages(ptr.addr(), len);
        let ptr = NonNull::new(ptr.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(HostMemory { ptr, len })
    }

    /// Maps a memory file of `len` bytes, which other processes may map too.
    pub(crate) fn map_shared(file: impl AsFd, len: usize) -> io::Result<HostMemory> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the system chooses touches no memory of others.
        let ptr = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0) }?;
        let ptr = NonNull::new(ptr.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(HostMemory { ptr, len })
    }

    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Asks for pages of a NUMA node, and for those of others where it has none left. Pages that were touched before stay
    /// where they are.
    pub(crate) fn prefer_node(&self, node: u32) -> io::Result<()> {
        let mut mask = [0; NODES / WORD_BITS];
        let place = node as usize;
        *mask.get_mut(place / WORD_BITS).ok_or(io::ErrorKind::InvalidInput)? =
            (1 as libc::c_ulong) << (place % WORD_BITS);
        if self.len == 0 {
            return Ok(());
        }
        // The kernel takes one off the number of bits.
        let (mode, bits, flags) = (libc::MPOL_PREFERRED as libc::c_long, NODES as libc::c_ulong + 1, 0 as libc::c_long);
        // SAFETY: the policy of a mapping of our own changes no contents, only where pages come from that are not there yet;
        // the kernel reads as many words as `mask` has.
        let code =
            unsafe { libc::syscall(libc::SYS_mbind, self.ptr.as_ptr(), self.len, mode, mask.as_ptr(), bits, flags) };
        if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Makes the pages of a range be there, by writing a zero to each.
    ///
    /// # Safety
    /// `offset + len` is inside the mapping, and nothing reads or writes the range meanwhile.
    pub(crate) unsafe fn touch(&self, offset: usize, len: usize) {
        for at in (offset..offset + len).step_by(4096) {
            // SAFETY: inside the mapping and used by nobody else, by the caller's word.
            unsafe { self.ptr.add(at).write_volatile(0) };
        }
    }
}

/// Asks for huge pages where memory is not touched yet; filling it is then several times faster, since each first touch
/// of a page is a fault. A refusal, or a range that is not mapped, costs only speed.
pub(crate) fn ask_for_huge_pages(addr: usize, len: usize) {
    let Some(start) = addr.checked_next_multiple_of(PAGE_BYTES) else { return };
    let end = addr.saturating_add(len) / PAGE_BYTES * PAGE_BYTES;
    if start < end {
        // SAFETY: the advice changes no contents, only how pages of the range come to be; others are not concerned.
        let _ = unsafe { madvise(std::ptr::without_provenance_mut(start), end - start, Advice::LinuxHugepage) };
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping was made by `map` with this length, and its owner is going.
            let _ = unsafe { munmap(self.ptr.as_ptr().cast(), self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn pages_are_asked_for_on_a_node_and_a_refusal_leaves_the_memory_as_it_is() {
        let len = 4 << 20;
        let memory = HostMemory::map(len).unwrap();
        match memory.prefer_node(0) {
            Ok(()) => {
                let addr = format!("{:x} ", memory.ptr().as_ptr().addr());
                // Where the kernel shows policies, it shows this one.
                let maps = fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
                if let Some(line) = maps.lines().find(|line| line.starts_with(&addr)) {
                    assert!(line.contains("prefer:0"), "{line}");
                }
            }
            // A container without the right, or a kernel without nodes.
            Err(e) => assert!([libc::EPERM, libc::ENOSYS, libc::EINVAL].contains(&e.raw_os_error().unwrap()), "{e}"),
        }
        for node in [1023, 1024, u32::MAX] {
            memory.prefer_node(node).unwrap_err();
        }
        // SAFETY: the whole of the mapping, which nobody else uses.
        unsafe { memory.touch(0, len) };
        HostMemory::map(0).unwrap().prefer_node(0).unwrap();
    }
}
