//! The host as a device: copies are done when they return.

use std::path::PathBuf;

use super::{Backend, BackendStream, DeviceError, Mark, Memory, Source, StreamCopy};
use crate::pool::HostMemory;
use crate::prefetch::memory;

#[derive(Debug)]
pub(super) struct Host {
    /// Where `/proc` and `/sys` are.
    root: PathBuf,
}

impl Host {
    pub(super) fn new(root: impl Into<PathBuf>) -> Host {
        Host { root: root.into() }
    }
}

impl Memory for HostMemory {
    fn addr(&self) -> u64 {
        self.ptr().as_ptr() as u64
    }
}

impl Backend for Host {
    fn id(&self) -> String {
        "host".into()
    }

    fn description(&self) -> String {
        "host memory".into()
    }

    fn is_host(&self) -> bool {
        true
    }

    fn link(&self) -> Result<Option<String>, DeviceError> {
        Ok(None)
    }

    fn memory(&self) -> Result<Option<(u64, u64)>, DeviceError> {
        Ok(memory(&self.root))
    }

    fn alloc(&self, len: usize) -> Result<Box<dyn Memory>, DeviceError> {
        match HostMemory::map(len) {
            Ok(memory) => Ok(Box::new(memory)),
            Err(_) => Err(DeviceError::OutOfMemory { device: self.id(), need: len as u64, free: 0 }),
        }
    }

    fn stream(&self) -> Result<Box<dyn BackendStream>, DeviceError> {
        Ok(Box::new(HostStream))
    }

    unsafe fn pin(&self, _ptr: *mut u8, _len: usize, _read_only: bool) -> Result<(), DeviceError> {
        Ok(())
    }

    unsafe fn unpin(&self, _ptr: *mut u8) {}

    unsafe fn read_back(&self, addr: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: the caller's word that the range is allocated; `out` is borrowed uniquely, so it is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(addr as *const u8, out.as_mut_ptr(), out.len()) };
        Ok(())
    }
}

#[derive(Debug)]
struct HostStream;

#[derive(Debug)]
struct Done;

impl BackendStream for HostStream {
    unsafe fn copy(&self, copies: &[StreamCopy]) -> Result<(), DeviceError> {
        // SAFETY: the caller's word.
        copies.iter().try_for_each(|copy| unsafe { copy_rows(copy) })
    }

    fn mark(&self) -> Result<Box<dyn Mark>, DeviceError> {
        Ok(Box::new(Done))
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Mark for Done {
    fn is_done(&self) -> bool {
        true
    }

    fn wait(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Copies the rows of one copy.
///
/// # Safety
/// As [`BackendStream::copy`].
unsafe fn copy_rows(StreamCopy { source, dst, rows }: &StreamCopy) -> Result<(), DeviceError> {
    let fits = |n: u64| usize::try_from(n).map_err(|_| DeviceError::OutOfBounds);
    let (row_len, src_pitch, dst_pitch) = (fits(rows.row_len)?, fits(rows.src_pitch)?, fits(rows.dst_pitch)?);
    let dst = fits(*dst)? as *mut u8;
    let (src, of_file) = match *source {
        Source::Buffer(src) | Source::Pinned(src) => (src, false),
        Source::Device(addr) => (fits(addr)? as *const u8, false),
        Source::FilePages(src) => (src, true),
    };
    for row in 0..fits(rows.rows)? {
        // SAFETY: rows lie in live memory by the caller's word.
        let (from, to) = unsafe { (src.add(row * src_pitch), dst.add(row * dst_pitch)) };
        if of_file {
            // SAFETY: as above, and the kernel checks the source pages.
            unsafe { copy_file_pages(from, to, row_len)? };
        } else {
            // SAFETY: as above; source and destination are different allocations.
            unsafe { std::ptr::copy_nonoverlapping(from, to, row_len) };
        }
    }
    Ok(())
}

/// Copies mapped file pages through the kernel, which answers EFAULT where the processor would get SIGBUS because the
/// file was cut off.
///
/// # Safety
/// `dst..dst+len` is writable memory of the caller's; `src..src+len` is mapped.
unsafe fn copy_file_pages(src: *const u8, dst: *mut u8, len: usize) -> Result<(), DeviceError> {
    let mut done = 0;
    while done < len {
        // SAFETY: both ranges are the caller's, and `done` stays below `len`.
        let (from, to) = unsafe { (src.add(done), dst.add(done)) };
        let local = libc::iovec { iov_base: to.cast(), iov_len: len - done };
        let remote = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: len - done };
        // SAFETY: the vectors are alive for the call and describe this process's own memory.
        let n = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        match usize::try_from(n) {
            Ok(n) if n > 0 => done += n,
            _ => {
                let error = std::io::Error::last_os_error();
                let gone = n == 0 || error.raw_os_error() == Some(libc::EFAULT);
                return Err(if gone { DeviceError::PagesGone } else { DeviceError::PagesRefused(error.to_string()) });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::device::Device;
    use crate::{Checkpoint, Error, Loader};

    #[test]
    fn a_load_that_its_control_group_has_no_room_for_is_refused_before_it_begins() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, group) = (dir.path().join("proc/self"), dir.path().join("sys/fs/cgroup"));
        fs::create_dir_all(&proc).unwrap();
        fs::create_dir_all(&group).unwrap();
        fs::write(dir.path().join("proc/meminfo"), "MemTotal: 1000 kB\nMemAvailable: 900 kB\n").unwrap();
        let path = dir.path().join("model.safetensors");
        let bytes = test_support::noise(1, 100_000);
        fs::write(&path, test_support::safetensors(test_support::header(100_000), &bytes)).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let device = Device::new(Host::new(dir.path()));
        let loader = Loader::builder().device(device.clone()).build().unwrap();
        loader.load(&checkpoint).unwrap();

        fs::write(proc.join("cgroup"), "0::/\n").unwrap();
        fs::write(group.join("memory.max"), "200000\n").unwrap();
        fs::write(group.join("memory.current"), "150000\n").unwrap();
        assert_eq!(device.memory().unwrap(), Some((50_000, 1000 << 10)));
        let error = loader.load(&checkpoint).unwrap_err();
        assert!(matches!(error, Error::Device(DeviceError::OutOfMemory { free: 50_000, .. })), "{error}");
    }
}
