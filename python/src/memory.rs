//! Memory that Python objects own, by address.

use std::slice;

use sllm_core::{Error, Result};

/// Bytes that a NumPy array or a torch tensor owns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostBytes {
    address: usize,
    len: usize,
}

impl HostBytes {
    /// `len` bytes at `address`.
    pub(crate) fn new(address: u64, len: u64) -> Result<Self> {
        let bad = |_| Error::Invalid(format!("{len} bytes at {address:#x} are not in this address space"));
        let (address, len) = (usize::try_from(address).map_err(bad)?, usize::try_from(len).map_err(bad)?);
        let end = address.checked_add(len).filter(|_| isize::try_from(len).is_ok() && (address != 0 || len == 0));
        match end {
            Some(_) => Ok(HostBytes { address, len }),
            None => Err(Error::Invalid(format!("{len} bytes at {address:#x} are not in this address space"))),
        }
    }

    /// The bytes.
    ///
    /// # Safety
    /// They must be readable, and stay alive and unchanged for `'a`.
    pub(crate) unsafe fn as_slice<'a>(self) -> &'a [u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: not null, and no longer than `isize::MAX` (checked in `new`); the caller vouches for the rest.
        unsafe { slice::from_raw_parts(std::ptr::with_exposed_provenance(self.address), self.len) }
    }
}
