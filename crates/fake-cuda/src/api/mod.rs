//! The functions of the driver, by the headings of its manual.
//!
//! Handles are plain numbers here: they have the size of the pointers in the driver's header.

mod context;
mod copy;
mod device;
mod error;
mod ipc;
mod kernel;
mod memory;
mod stream;

use crate::codes::{self, Code};

/// Turns the result of a call into its code.
fn call(body: impl FnOnce() -> Result<(), Code>) -> Code {
    body().err().unwrap_or(codes::SUCCESS)
}

/// Writes a result to where the caller wants it.
///
/// # Safety
/// `target` is null or may be written.
unsafe fn put<T>(target: *mut T, value: T) -> Result<(), Code> {
    if target.is_null() {
        return Err(codes::INVALID_VALUE);
    }
    // SAFETY: it is not null, and the caller vouches for the rest.
    unsafe { target.write(value) };
    Ok(())
}
