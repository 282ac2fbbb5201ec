//! The pages behind device memory, which another process can map as well.

use std::ffi::{CStr, c_void};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{null_mut, with_exposed_provenance, with_exposed_provenance_mut};

/// Mappings are whole pages.
pub(crate) const PAGE: usize = 4096;

/// Whole pages of this process, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: usize,
    len: usize,
}

impl Mapping {
    /// At least `len` bytes that only this process sees.
    pub(crate) fn private(len: usize) -> io::Result<Self> {
        Self::new(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// At least `len` bytes of a file, which other processes see too.
    pub(crate) fn shared(file: &File, len: usize) -> io::Result<Self> {
        Self::new(len, libc::MAP_SHARED, file.as_raw_fd())
    }

    /// Whether it is as long as a mapping of so many bytes would be.
    pub(crate) fn fits(&self, len: usize) -> bool {
        len.checked_next_multiple_of(PAGE) == Some(self.len)
    }

    /// Gives the bytes back and keeps the addresses, which nobody may use until [`Self::renew`].
    pub(crate) fn withdraw(&self) -> io::Result<()> {
        self.replace(libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Fresh bytes, which only this process sees, at the same addresses.
    pub(crate) fn renew(&self) -> io::Result<()> {
        self.replace(libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Maps something else at the same addresses.
    fn replace(&self, rights: i32, flags: i32, file: i32) -> io::Result<()> {
        // SAFETY: it replaces exactly our own pages.
        let pointer = unsafe { libc::mmap(self.pointer(), self.len, rights, flags | libc::MAP_FIXED, file, 0) };
        if pointer == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn new(len: usize, flags: i32, file: i32) -> io::Result<Self> {
        let len = len.checked_next_multiple_of(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let pointer = unsafe { libc::mmap(null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, file, 0) };
        if pointer == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: pointer.expose_provenance(), len })
    }

    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// Fills all bytes.
    pub(crate) fn fill(&self, value: u8) {
        // SAFETY: the pages are ours and writable.
        unsafe { with_exposed_provenance_mut::<u8>(self.address).write_bytes(value, self.len) };
    }

    /// Moves the bytes into a memory file of this name, mapped at the same address. The file is gone with the last
    /// process that has it open or mapped. Nobody may use the bytes meanwhile.
    pub(crate) fn share(&self, name: &CStr) -> io::Result<File> {
        // SAFETY: the name ends in a NUL.
        let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and owned by nobody else.
        let mut file = unsafe { File::from_raw_fd(descriptor) };
        // SAFETY: the pages are ours, and nobody writes to them, by the caller's word.
        file.write_all(unsafe { std::slice::from_raw_parts(with_exposed_provenance(self.address), self.len) })?;
        self.replace(libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd())?;
        Ok(file)
    }

    fn pointer(&self) -> *mut c_void {
        with_exposed_provenance_mut(self.address)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped once.
        unsafe { libc::munmap(self.pointer(), self.len) };
    }
}
