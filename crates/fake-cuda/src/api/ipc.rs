//! Memory of other processes.

use super::{call, put};
use crate::codes::{self, Code};
use crate::engine::wait_for;
use crate::share::HANDLE_LEN;
use crate::state::{enter_context, enter_freeing};
use std::ffi::c_uint;

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, the only value that the flags may have.
const LAZY_ENABLE_PEER_ACCESS: c_uint = 1;

/// `CUipcMemHandle`.
#[repr(C)]
struct MemHandle([u8; HANDLE_LEN]);

/// The handle is that of the whole allocation, wherever in it the pointer is. Waits for copies in flight there.
///
/// # Safety
/// `handle` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuIpcGetMemHandle(handle: *mut MemHandle, pointer: u64) -> Code {
    call(|| {
        let (mut state, _) = enter_context("cuIpcGetMemHandle")?;
        if handle.is_null() {
            return Err(codes::INVALID_VALUE);
        }
        let start = loop {
            let (start, len) = state.allocation_of(pointer).ok_or(codes::INVALID_VALUE)?;
            let in_flight = state.in_flight(start, len);
            if in_flight.is_empty() {
                break start;
            }
            // More may be asked for while this waits.
            state = wait_for(state, &in_flight);
        };
        let bytes = state.export(start)?;
        // SAFETY: the caller's duty.
        unsafe { put(handle, MemHandle(bytes)) }
    })
}

/// # Safety
/// `pointer` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuIpcOpenMemHandle_v2(pointer: *mut u64, handle: MemHandle, flags: c_uint) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuIpcOpenMemHandle_v2")?;
        if pointer.is_null() || flags != LAZY_ENABLE_PEER_ACCESS {
            return Err(codes::INVALID_VALUE);
        }
        let start = state.import(device, &handle.0)?;
        // SAFETY: the caller's duty.
        unsafe { put(pointer, start as u64) }
    })
}

/// The last close waits for copies in flight.
#[unsafe(no_mangle)]
extern "C" fn cuIpcCloseMemHandle(pointer: u64) -> Code {
    call(|| {
        let (mut state, device) = enter_freeing("cuIpcCloseMemHandle")?;
        let start = usize::try_from(pointer).map_err(|_| codes::INVALID_VALUE)?;
        let (opened, len) = state.opened(start).ok_or(codes::INVALID_VALUE)?;
        if opened == 1 {
            let in_flight = state.in_flight(start, len);
            state = wait_for(state, &in_flight);
            state.counters.waits_on_free += u64::from(!in_flight.is_empty());
        }
        state.close(start)?;
        state.check_alive(device)
    })
}
