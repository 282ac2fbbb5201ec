//! Host memory that another process may map: a memory file, given to it by its descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::retry_on_intr;

use super::{Block, Device, Memory};
use crate::error::{Error, Result};
use crate::pool::HostMemory;

/// Bytes that are allocated at once: what was allocated is lost where a signal comes before all of it is.
const STEP: u64 = 4 << 20;

/// Memory of this process that others map too, by its descriptor. It can neither shrink nor grow, so that no process
/// that maps it can be killed by a page that is gone. More seals may be added: a process that is given it keeps its pages
/// from being punched out by `F_SEAL_FUTURE_WRITE`. The last clone or block unmaps it here.
#[derive(Debug, Clone)]
pub struct MemoryFile {
    file: Arc<OwnedFd>,
    memory: Arc<dyn Memory>,
    len: u64,
}

impl MemoryFile {
    /// Makes and maps one of `len` bytes, all zero. All of its memory is taken at once, so that it is charged to this process
    /// and not to the one that writes first, which a page that cannot be had would kill. An error where there is none.
    pub fn new(len: u64) -> Result<MemoryFile> {
        let fail = |what| move |e: rustix::io::Errno| Error::io(what, Path::new("a memory file"))(e.into());
        let bytes = usize::try_from(len).ok().filter(|&bytes| bytes > 0);
        let bytes = bytes.ok_or_else(|| Error::Invalid(format!("a memory file cannot have {len} bytes")))?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create(c"sllm-staging", flags).map_err(fail("make"))?;
        ftruncate(&file, len).map_err(fail("lengthen"))?;
        for at in (0..len).step_by(usize::try_from(STEP).unwrap_or(bytes)) {
            let step = || fallocate(&file, FallocateFlags::empty(), at, STEP.min(len - at));
            retry_on_intr(step).map_err(fail("take memory for"))?;
        }
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(fail("seal"))?;
        let memory = HostMemory::map_shared(&file, bytes).map_err(Error::io("map", Path::new("a memory file")))?;
        Ok(MemoryFile { file: Arc::new(file), memory: Arc::new(memory), len })
    }

    /// A part of it as a block, which keeps the memory mapped.
    ///
    /// Who has the descriptor may write to it at any time; that is for the two processes to agree on.
    pub fn block(&self, offset: u64, len: u64) -> Result<Block> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            let whole = self.len;
            return Err(Error::Invalid(format!("{len} bytes from {offset} are not inside a memory file of {whole}")));
        }
        Ok(Block {
            device: Device::host(),
            addr: self.memory.addr() + offset,
            len,
            memory: Some(Arc::clone(&self.memory)),
            loading: Arc::default(),
        })
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes, which none has.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_another_descriptor_writes_is_in_the_blocks() {
        let memory = MemoryFile::new(10_000).unwrap();
        let block = memory.block(4_000, 5).unwrap();
        let other = std::fs::File::from(memory.as_fd().try_clone_to_owned().unwrap());
        other.write_all_at(b"hello", 4_000).unwrap();
        drop(memory);
        let mut bytes = [0; 5];
        block.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
    }

    #[test]
    fn its_memory_is_taken_when_it_is_made() {
        for len in [1, 10_000, STEP, 2 * STEP + 1] {
            let memory = MemoryFile::new(len).unwrap();
            let seen = rustix::fs::fstat(memory.as_fd()).unwrap();
            assert_eq!(u64::try_from(seen.st_size).unwrap(), len);
            assert!(u64::try_from(seen.st_blocks).unwrap() * 512 >= len, "{len}");
        }
        let error = MemoryFile::new(1 << 63).unwrap_err();
        assert!(error.chain().contains("memory file"), "{}", error.chain());
    }

    #[test]
    fn its_length_is_fixed() {
        let memory = MemoryFile::new(8192).unwrap();
        let other = std::fs::File::from(memory.as_fd().try_clone_to_owned().unwrap());
        assert!(other.set_len(4096).is_err() && other.set_len(16_384).is_err());
        assert!(memory.block(8192, 1).is_err() && memory.block(u64::MAX, 2).is_err());
        assert!(memory.block(8192, 0).is_ok());
        assert!(MemoryFile::new(0).is_err());
    }
}
