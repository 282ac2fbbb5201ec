//! Names of result codes.

use super::{call, put};
use crate::codes::{self, Code};
use std::ffi::c_char;

/// # Safety
/// `name` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(error: Code, name: *mut *const c_char) -> Code {
    let found = codes::describe(error).map(|(name, _)| name.as_ptr());
    call(|| {
        // SAFETY: the caller's duty.
        unsafe { put(name, found.unwrap_or(std::ptr::null()))? };
        found.map(drop).ok_or(codes::INVALID_VALUE)
    })
}

/// # Safety
/// `text` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(error: Code, text: *mut *const c_char) -> Code {
    let found = codes::describe(error).map(|(_, text)| text.as_ptr());
    call(|| {
        // SAFETY: the caller's duty.
        unsafe { put(text, found.unwrap_or(std::ptr::null()))? };
        found.map(drop).ok_or(codes::INVALID_VALUE)
    })
}
