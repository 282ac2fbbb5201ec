//! Device memory, pinned host memory and what a pointer means.

use super::{call, put};
use crate::codes::{self, Code};
use crate::engine::wait_for;
use crate::mapping::PAGE;
use crate::state::{Guard, Holder, Place, READ_ONLY, Registration, enter, enter_context, enter_freeing};
use std::alloc::{Layout, alloc};
use std::ffi::{c_int, c_uint, c_void};

/// `CU_MEMHOSTREGISTER_PORTABLE`, `_DEVICEMAP` and `_READ_ONLY`. I/O memory is not supported.
const REGISTER_FLAGS: c_uint = 0x01 | 0x02 | READ_ONLY;
/// `CU_MEMHOSTALLOC_PORTABLE`, `_DEVICEMAP` and `_WRITECOMBINED`.
const ALLOC_FLAGS: c_uint = 0x01 | 0x02 | 0x04;

/// # Safety
/// `free` and `total` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuMemGetInfo_v2")?;
        let memory = state.settings.memory;
        let unused = memory.saturating_sub(state.device(device)?.used);
        let fit = |bytes: u64| usize::try_from(bytes).map_err(|_| codes::UNKNOWN);
        // SAFETY: the caller's duty.
        unsafe {
            put(free, fit(unused)?)?;
            put(total, fit(memory)?)
        }
    })
}

/// # Safety
/// `pointer` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(pointer: *mut u64, len: usize) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuMemAlloc_v2")?;
        if pointer.is_null() {
            return Err(codes::INVALID_VALUE);
        }
        let address = state.allocate(device, len)?;
        // SAFETY: the caller's duty.
        unsafe { put(pointer, address as u64) }
    })
}

/// Waits for copies in flight. Null is allowed.
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(pointer: u64) -> Code {
    call(|| {
        let (state, device) = enter_freeing("cuMemFree_v2")?;
        let address = usize::try_from(pointer).map_err(|_| codes::INVALID_VALUE)?;
        if address == 0 {
            return Ok(());
        }
        let allocation = state.allocations.get(&address).filter(|found| matches!(found.holder, Holder::Ours { .. }));
        let len = allocation.ok_or(codes::INVALID_VALUE)?.len;
        let in_flight = state.in_flight(address, len);
        let mut state = wait_for(state, &in_flight);
        state.counters.waits_on_free += u64::from(!in_flight.is_empty());
        state.release(address)?;
        state.check_alive(device)
    })
}

/// # Safety
/// Each is null or may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetAddressRange_v2(base: *mut u64, len: *mut usize, pointer: u64) -> Code {
    call(|| {
        let (state, _) = enter_context("cuMemGetAddressRange_v2")?;
        let (start, whole) = state.allocation_of(pointer).ok_or(codes::NOT_FOUND)?;
        // SAFETY: the caller's duty.
        unsafe {
            if !base.is_null() {
                put(base, start as u64)?;
            }
            if len.is_null() { Ok(()) } else { put(len, whole) }
        }
    })
}

/// Whether all of a range is mapped, and writable if asked. True if that cannot be told.
fn is_mapped(start: usize, end: usize, writable: bool) -> bool {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        return true;
    };
    let mut reached = start;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let bounds = words.next().and_then(|bounds| bounds.split_once('-'));
        let (Some((low, high)), Some(rights)) = (bounds, words.next()) else {
            continue;
        };
        let parse = |hex| usize::from_str_radix(hex, 16).unwrap_or(0);
        let (low, high) = (parse(low), parse(high));
        if high <= reached {
            continue;
        }
        if low > reached || !rights.starts_with('r') || (writable && !rights.starts_with("rw")) {
            return false;
        }
        reached = high;
        if reached >= end {
            return true;
        }
    }
    false
}

/// The range must be mapped, and writable unless it is registered for reading only.
#[unsafe(no_mangle)]
extern "C" fn cuMemHostRegister_v2(pointer: usize, len: usize, flags: c_uint) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuMemHostRegister_v2")?;
        if flags & !REGISTER_FLAGS != 0 || len == 0 {
            return Err(codes::INVALID_VALUE);
        }
        let end = pointer.checked_add(len).ok_or(codes::INVALID_VALUE)?;
        if !is_mapped(pointer, end, flags & READ_ONLY == 0) {
            return Err(codes::INVALID_VALUE);
        }
        state.register(pointer, Registration { len, flags, device, owned: None })
    })
}

/// Ends a registration once no copy uses it.
fn unregister(state: Guard, pointer: usize, owned: bool) -> Result<Guard, Code> {
    let registration = state.registrations.get(&pointer).filter(|found| found.owned.is_some() == owned);
    let missing = if owned { codes::INVALID_VALUE } else { codes::HOST_MEMORY_NOT_REGISTERED };
    let len = registration.ok_or(missing)?.len;
    let in_flight = state.in_flight(pointer, len);
    let mut state = wait_for(state, &in_flight);
    state.counters.waits_on_unregister += u64::from(!in_flight.is_empty());
    state.unregister(pointer)?;
    Ok(state)
}

/// Waits for copies in flight.
#[unsafe(no_mangle)]
extern "C" fn cuMemHostUnregister(pointer: usize) -> Code {
    call(|| {
        let (state, device) = enter_freeing("cuMemHostUnregister")?;
        unregister(state, pointer, false)?.check_alive(device)
    })
}

/// # Safety
/// `pointer` may be written.
unsafe fn alloc_host(symbol: &'static str, pointer: *mut usize, len: usize, flags: c_uint) -> Code {
    call(|| {
        let (mut state, device) = enter_context(symbol)?;
        if pointer.is_null() || len == 0 || flags & !ALLOC_FLAGS != 0 {
            return Err(codes::INVALID_VALUE);
        }
        let rounded = len.checked_next_multiple_of(PAGE).ok_or(codes::OUT_OF_MEMORY)?;
        let layout = Layout::from_size_align(rounded, PAGE).map_err(|_| codes::OUT_OF_MEMORY)?;
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return Err(codes::OUT_OF_MEMORY);
        }
        let address = memory.expose_provenance();
        let registered = state.register(address, Registration { len, flags: 0, device, owned: Some(layout) });
        if let Err(code) = registered {
            // SAFETY: it was just allocated with this layout and nobody else knows of it.
            unsafe { std::alloc::dealloc(memory, layout) };
            return Err(code);
        }
        // SAFETY: the caller's duty.
        unsafe { put(pointer, address) }
    })
}

/// # Safety
/// `pointer` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocHost_v2(pointer: *mut usize, len: usize) -> Code {
    // SAFETY: the caller's duty.
    unsafe { alloc_host("cuMemAllocHost_v2", pointer, len, 0) }
}

/// # Safety
/// `pointer` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(pointer: *mut usize, len: usize, flags: c_uint) -> Code {
    // SAFETY: the caller's duty.
    unsafe { alloc_host("cuMemHostAlloc", pointer, len, flags) }
}

/// Waits for copies in flight.
#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(pointer: usize) -> Code {
    call(|| {
        let (state, device) = enter_freeing("cuMemFreeHost")?;
        unregister(state, pointer, true)?.check_alive(device)
    })
}

/// Pinned memory has one address for host and device.
///
/// # Safety
/// `address` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostGetDevicePointer_v2(address: *mut u64, pointer: usize, _flags: c_uint) -> Code {
    call(|| {
        let (state, _) = enter_context("cuMemHostGetDevicePointer_v2")?;
        match state.place(pointer, 1)? {
            // SAFETY: the caller's duty.
            Place::Pinned { .. } => unsafe { put(address, pointer as u64) },
            _ => Err(codes::INVALID_VALUE),
        }
    })
}

/// Knows context, memory type, device and host pointer, buffer, managed, ordinal, range and mapped.
///
/// # Safety
/// `data` may be written and has the size of the attribute.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuPointerGetAttribute(data: *mut c_void, attribute: c_uint, pointer: u64) -> Code {
    call(|| {
        let state = enter("cuPointerGetAttribute")?;
        let address = usize::try_from(pointer).map_err(|_| codes::INVALID_VALUE)?;
        let in_device = match state.place(address, 1)? {
            Place::Device(_) => true,
            Place::Pinned { .. } => false,
            Place::Pageable => return Err(codes::INVALID_VALUE),
        };
        let (start, len, device, id) = if in_device {
            let found = state.allocations.range(..=address).next_back().ok_or(codes::UNKNOWN)?;
            (*found.0, found.1.len, found.1.device, Some(found.1.id))
        } else {
            let found = state.registrations.range(..=address).next_back().ok_or(codes::UNKNOWN)?;
            (*found.0, found.1.len, found.1.device, None)
        };
        // SAFETY: the caller's duty; each arm writes the type that the manual gives for its attribute.
        unsafe {
            match attribute {
                1 => put(data.cast::<usize>(), super::context::handle_of(device)),
                2 => put(data.cast::<c_uint>(), if in_device { 2 } else { 1 }),
                3 => put(data.cast::<u64>(), pointer),
                4 if in_device => Err(codes::INVALID_VALUE),
                4 => put(data.cast::<u64>(), pointer),
                7 => put(data.cast::<u64>(), id.ok_or(codes::NOT_SUPPORTED)?),
                8 => put(data.cast::<u8>(), 0),
                9 => put(data.cast::<c_int>(), device),
                11 => put(data.cast::<u64>(), start as u64),
                12 => put(data.cast::<usize>(), len),
                13 => put(data.cast::<u8>(), 1),
                _ => Err(codes::NOT_SUPPORTED),
            }
        }
    })
}
