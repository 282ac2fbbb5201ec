//! What the tests share: a context, and page-aligned host memory.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unreachable_pub, reason = "a module of several binaries")]

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::ffi::c_void;

pub const PAGE: usize = 4096;

/// The device's primary context, current on this thread while it lives.
pub struct Context(sys::CUdevice);

impl Context {
    pub fn new(ordinal: i32) -> Result<Self, DriverError> {
        result::init()?;
        let device = result::device::get(ordinal)?;
        // SAFETY: the device exists; `drop` releases it.
        let context = unsafe { result::primary_ctx::retain(device)? };
        // SAFETY: the context is retained.
        unsafe { result::ctx::set_current(context)? };
        Ok(Self(device))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `new`.
        unsafe {
            let _ = result::primary_ctx::release(self.0);
            let _ = sys::cuCtxSetCurrent(std::ptr::null_mut());
        }
    }
}

/// Anonymous pages, unmapped at the end.
pub struct Pages {
    pub at: *mut u8,
    pub len: usize,
}

impl Pages {
    pub fn new(len: usize) -> Self {
        Self::with_rights(len, libc::PROT_READ | libc::PROT_WRITE)
    }

    pub fn with_rights(len: usize, rights: i32) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self { at: at.cast(), len }
    }

    pub fn fill(&self, value: u8) {
        // SAFETY: the pages are writable; a copy that reads them meanwhile is what some tests are about.
        unsafe { self.at.write_bytes(value, self.len) };
    }

    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: the pages are readable and no copy into them is in flight.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }.to_vec()
    }

    pub fn register(&self, offset: usize, len: usize, flags: u32) -> Result<(), DriverError> {
        // SAFETY: the range is in the mapping, and tests unregister it before they unmap.
        unsafe { sys::cuMemHostRegister_v2(self.at.add(offset).cast(), len, flags) }.result()
    }

    pub fn unregister(&self, offset: usize) -> Result<(), DriverError> {
        // SAFETY: the driver refuses a range that is not registered.
        unsafe { sys::cuMemHostUnregister(self.at.add(offset).cast::<c_void>()) }.result()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `with_rights`, unmapped once.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// A stream that the default one does not wait for.
pub fn stream() -> sys::CUstream {
    result::stream::create(result::stream::StreamKind::NonBlocking).unwrap()
}

/// The bytes of device memory, by a synchronous copy.
pub fn read(device: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // SAFETY: the driver checks the range.
    unsafe { result::memcpy_dtoh_sync(&mut bytes, device) }.unwrap();
    bytes
}

/// Starts a copy of pages into device memory.
pub fn upload(device: u64, pages: &Pages, offset: usize, len: usize, stream: sys::CUstream) -> Result<(), DriverError> {
    // SAFETY: the driver checks registered ranges, and the pages outlive the copy.
    unsafe { sys::cuMemcpyHtoDAsync_v2(device, pages.at.add(offset).cast(), len, stream) }.result()
}

/// The number of an error.
pub fn code(result: Result<impl Sized, DriverError>) -> u32 {
    result.err().map_or(0, |error| error.0 as u32)
}
