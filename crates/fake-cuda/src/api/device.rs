//! Initialisation and devices.

use super::{call, put};
use crate::codes::{self, Code};
use crate::state::{self, enter, enter_uninitialised};
use crate::{report, settings, share};
use std::ffi::{c_char, c_int, c_uint};

/// CUDA 13.0.
const VERSION: c_int = 13_000;

/// The text is cut to the caller's buffer and always ends in a NUL.
///
/// # Safety
/// `target` has `len` bytes.
unsafe fn put_text(target: *mut c_char, len: c_int, text: &str) -> Result<(), Code> {
    let room = usize::try_from(len).ok().filter(|room| *room > 0 && !target.is_null()).ok_or(codes::INVALID_VALUE)?;
    let taken = text.len().min(room - 1);
    // SAFETY: `taken + 1` is at most the buffer's length.
    unsafe {
        target.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), taken);
        target.add(taken).write(0);
    }
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> Code {
    call(|| {
        let mut state = enter_uninitialised("cuInit")?;
        if !state.configured {
            state.configured = true;
            state.settings.read_environment();
            state.faults = settings::faults_of_environment();
            // The first call is counted before the faults are known.
            if let Some(code) = settings::due_fault(&mut state.faults, "cuInit") {
                return Err(code);
            }
        }
        if flags != 0 {
            return Err(codes::INVALID_VALUE);
        }
        if state.settings.devices == 0 {
            return Err(codes::NO_DEVICE);
        }
        if !state.initialised {
            state.initialised = true;
            state::own();
            state.report = report::path_of_environment();
            if state.report.is_some() {
                report::write_at_exit();
            }
        }
        Ok(())
    })
}

/// # Safety
/// `version` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    call(|| {
        let _state = enter_uninitialised("cuDriverGetVersion")?;
        // SAFETY: the caller's duty.
        unsafe { put(version, VERSION) }
    })
}

/// # Safety
/// `count` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
    call(|| {
        let state = enter("cuDeviceGetCount")?;
        let devices = c_int::try_from(state.settings.devices).map_err(|_| codes::UNKNOWN)?;
        // SAFETY: the caller's duty.
        unsafe { put(count, devices) }
    })
}

/// # Safety
/// `device` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    call(|| {
        enter("cuDeviceGet")?.device(ordinal)?;
        // SAFETY: the caller's duty.
        unsafe { put(device, ordinal) }
    })
}

/// # Safety
/// `name` has `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> Code {
    call(|| {
        enter("cuDeviceGetName")?.device(device)?;
        // SAFETY: the caller's duty.
        unsafe { put_text(name, len, "Fake CUDA Device") }
    })
}

/// # Safety
/// `uuid` has 16 bytes.
unsafe fn get_uuid(symbol: &'static str, uuid: *mut [u8; 16], device: c_int) -> Code {
    call(|| {
        enter(symbol)?.device(device)?;
        // SAFETY: the caller's duty.
        unsafe { put(uuid, share::uuid(device)?) }
    })
}

/// # Safety
/// `uuid` has 16 bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) -> Code {
    // SAFETY: the caller's duty.
    unsafe { get_uuid("cuDeviceGetUuid", uuid, device) }
}

/// # Safety
/// `uuid` has 16 bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> Code {
    // SAFETY: the caller's duty.
    unsafe { get_uuid("cuDeviceGetUuid_v2", uuid, device) }
}

/// # Safety
/// `bytes` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> Code {
    call(|| {
        let mut state = enter("cuDeviceTotalMem_v2")?;
        state.device(device)?;
        let memory = usize::try_from(state.settings.memory).map_err(|_| codes::UNKNOWN)?;
        // SAFETY: the caller's duty.
        unsafe { put(bytes, memory) }
    })
}

/// # Safety
/// `value` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) -> Code {
    call(|| {
        enter("cuDeviceGetAttribute")?.device(device)?;
        let found = attribute_value(attribute, device).ok_or(codes::INVALID_VALUE)?;
        // SAFETY: the caller's duty.
        unsafe { put(value, found) }
    })
}

/// The numbers of an H100 where a caller may ask for them, 0 for all that is not supported.
fn attribute_value(attribute: c_uint, device: c_int) -> Option<c_int> {
    Some(match attribute {
        1..=3 => 1024,                    // threads of a block
        4 => 64,                          // block's depth
        5 | 11 => c_int::MAX,             // grid's width, pitch of a copy
        6 | 7 => 65_535,                  // grid's height and depth
        8 => 49_152,                      // shared memory of a block
        9 => 65_536,                      // constant memory
        10 => 32,                         // warp size
        12 | 82 => 65_536,                // registers
        13 => 1_980_000,                  // clock, kHz
        14 => 512,                        // texture alignment
        16 => 132,                        // multiprocessors
        15 | 19 | 31 | 32 | 41 | 78 => 1, // overlap, maps host memory, concurrent kernels, ECC, unified addressing, priorities
        33 => device + 1,                 // PCI bus
        36 => 2_619_000,                  // memory clock, kHz
        37 => 5120,                       // memory bus, bits
        38 => 52_428_800,                 // L2 cache
        39 => 2048,                       // threads of a multiprocessor
        40 => 3,                          // copy engines
        75 => 9,                          // compute capability
        91 | 99 | 113 => 1, // registered host pointers work as they are, registration, read-only registration
        120.. if attribute >= 162 => return None,
        0 => return None,
        _ => 0,
    })
}

/// # Safety
/// `text` has `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetPCIBusId(text: *mut c_char, len: c_int, device: c_int) -> Code {
    call(|| {
        enter("cuDeviceGetPCIBusId")?.device(device)?;
        // SAFETY: the caller's duty.
        unsafe { put_text(text, len, &format!("0000:{:02X}:00.0", device + 1)) }
    })
}
