//! Primary contexts, and the stack of current ones.

use super::{call, put};
use crate::codes::{self, Code};
use crate::engine::wait_for;
use crate::state::{CONTEXTS, current, enter, enter_context};
use std::ffi::{c_int, c_uint};

/// The handle of the first device's primary context, and the distance to the next.
const FIRST: usize = 0x1000;
const STEP: usize = 16;

/// The handle of a device's primary context.
pub(super) fn handle_of(device: i32) -> usize {
    usize::try_from(device).map_or(0, |index| FIRST + index * STEP)
}

/// The device of a context, -1 for null.
fn device_of(context: usize) -> Result<i32, Code> {
    if context == 0 {
        return Ok(-1);
    }
    let offset = context.checked_sub(FIRST).filter(|offset| offset % STEP == 0);
    let index = offset.and_then(|offset| i32::try_from(offset / STEP).ok());
    index.filter(|index| *index < 64).ok_or(codes::INVALID_CONTEXT)
}

/// # Safety
/// `context` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Code {
    call(|| {
        let mut state = enter("cuDevicePrimaryCtxRetain")?;
        state.device(device)?;
        state.check_alive(device)?;
        // SAFETY: the caller's duty.
        unsafe { put(context, handle_of(device))? };
        state.device(device)?.retained += 1;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Code {
    call(|| {
        let mut state = enter("cuDevicePrimaryCtxRelease_v2")?;
        let retained = &mut state.device(device)?.retained;
        *retained = retained.checked_sub(1).ok_or(codes::INVALID_CONTEXT)?;
        if *retained == 0 {
            let last = state.last_of_device(device);
            let mut state = wait_for(state, &last);
            state.destroy_context(device);
        }
        Ok(())
    })
}

/// # Safety
/// `flags` and `active` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) -> Code {
    call(|| {
        let mut state = enter("cuDevicePrimaryCtxGetState")?;
        let retained = state.device(device)?.retained;
        // SAFETY: the caller's duty.
        unsafe {
            put(flags, 0)?;
            put(active, c_int::from(retained > 0))
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, _flags: c_uint) -> Code {
    call(|| enter("cuDevicePrimaryCtxSetFlags_v2")?.device(device).map(drop))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: usize) -> Code {
    call(|| {
        let _state = enter("cuCtxSetCurrent")?;
        let device = device_of(context)?;
        CONTEXTS.with_borrow_mut(|contexts| {
            contexts.pop();
            if device >= 0 {
                contexts.push(device);
            }
        });
        Ok(())
    })
}

/// # Safety
/// `context` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> Code {
    call(|| {
        let _state = enter("cuCtxGetCurrent")?;
        // SAFETY: the caller's duty.
        unsafe { put(context, current().map_or(0, handle_of)) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPushCurrent_v2(context: usize) -> Code {
    call(|| {
        let _state = enter("cuCtxPushCurrent_v2")?;
        let device = device_of(context)?;
        CONTEXTS.with_borrow_mut(|contexts| contexts.push(device));
        Ok(())
    })
}

/// # Safety
/// `context` is null or may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut usize) -> Code {
    call(|| {
        let _state = enter("cuCtxPopCurrent_v2")?;
        let device = CONTEXTS.with_borrow_mut(Vec::pop).ok_or(codes::INVALID_CONTEXT)?;
        if context.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's duty.
        unsafe { put(context, handle_of(device)) }
    })
}

/// # Safety
/// `device` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> Code {
    call(|| {
        let _state = enter("cuCtxGetDevice")?;
        let ordinal = current().ok_or(codes::INVALID_CONTEXT)?;
        // SAFETY: the caller's duty.
        unsafe { put(device, ordinal) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Code {
    call(|| {
        let (state, device) = enter_context("cuCtxSynchronize")?;
        let last = state.last_of_device(device);
        wait_for(state, &last).check_alive(device)
    })
}

/// # Safety
/// Both may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> Code {
    call(|| {
        let _state = enter_context("cuCtxGetStreamPriorityRange")?;
        // SAFETY: the caller's duty.
        unsafe {
            put(least, 0)?;
            put(greatest, -5)
        }
    })
}
