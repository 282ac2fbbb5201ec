//! Exported functions by which a test sets up the driver that it loaded.
//!
//! They work in any process, by `dlsym` or `ctypes`, and need neither `cuInit` nor a context.

use crate::engine::wait_for;
use crate::settings::Fault;
use crate::state::{self, lock};
use std::ffi::{CStr, c_char};

/// The text of a C string, empty for null.
///
/// # Safety
/// `text` is null or ends in a NUL.
unsafe fn text<'a>(text: *const c_char) -> std::borrow::Cow<'a, str> {
    if text.is_null() {
        return "".into();
    }
    // SAFETY: the caller's duty.
    unsafe { CStr::from_ptr(text) }.to_string_lossy()
}

/// Waits for work in flight, then sets all back to the defaults. The environment no longer counts.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_reset() {
    let state = lock();
    let in_flight: Vec<_> = state.streams.keys().map(|handle| state.last(*handle)).collect();
    wait_for(state, &in_flight).reset();
}

/// Sets `devices`, `memory`, `delay_us`, `bandwidth`, `lose_after`, `register_limit`, `registered_total`, `no_ipc` or
/// `spoil_after`.
/// Returns 0, or 1 if there is no such setting.
///
/// # Safety
/// `name` is null or ends in a NUL.
#[unsafe(no_mangle)]
unsafe extern "C" fn fake_cuda_set(name: *const c_char, value: u64) -> u32 {
    let mut state = lock();
    // SAFETY: the caller's duty.
    let name = unsafe { text(name) };
    if name == "lose_after" {
        state.counters.submitted = 0;
    }
    u32::from(!state.settings.set(&name, value))
}

/// Lets the nth call from now of a symbol fail once.
///
/// # Safety
/// `symbol` is null or ends in a NUL.
#[unsafe(no_mangle)]
unsafe extern "C" fn fake_cuda_fail(symbol: *const c_char, nth: u64, code: u32) {
    // SAFETY: the caller's duty.
    let fault = Fault::new(&unsafe { text(symbol) }, nth, code);
    lock().faults.push(fault);
}

/// Calls of a symbol since the last reset, failed ones too. A name without version means any version.
///
/// # Safety
/// `symbol` is null or ends in a NUL.
#[unsafe(no_mangle)]
unsafe extern "C" fn fake_cuda_count(symbol: *const c_char) -> u64 {
    // SAFETY: the caller's duty.
    lock().count(&unsafe { text(symbol) })
}

/// A counter by its name, that of the report. `device` matters to `device_bytes` and `device_bytes_peak` only.
/// Returns `u64::MAX` if there is no such counter.
///
/// # Safety
/// `name` is null or ends in a NUL.
#[unsafe(no_mangle)]
unsafe extern "C" fn fake_cuda_get(name: *const c_char, device: u32) -> u64 {
    let state = lock();
    // SAFETY: the caller's duty.
    let name = unsafe { text(name) };
    let of_device = i32::try_from(device).ok().and_then(|ordinal| state.devices.get(&ordinal));
    match &*name {
        "device_bytes" => of_device.map_or(0, |device| device.used),
        "device_bytes_peak" => of_device.map_or(0, |device| device.peak),
        name => counters(&state).into_iter().find(|(other, _)| *other == name).map_or(u64::MAX, |(_, value)| value),
    }
}

/// All counters that are not of one device, with their names.
pub(crate) fn counters(state: &state::State) -> Vec<(&'static str, u64)> {
    let counters = &state.counters;
    vec![
        ("bytes_h2d", counters.bytes[0]),
        ("bytes_d2h", counters.bytes[1]),
        ("bytes_d2d", counters.bytes[2]),
        ("copies_h2d", counters.copies[0]),
        ("copies_d2h", counters.copies[1]),
        ("copies_d2d", counters.copies[2]),
        ("pageable_copies", counters.pageable_copies),
        ("pageable_bytes", counters.pageable_bytes),
        ("registered", state.registered),
        ("registered_peak", counters.registered_peak),
        ("waits_on_free", counters.waits_on_free),
        ("waits_on_unregister", counters.waits_on_unregister),
        ("contexts", state.contexts_now()),
        ("streams", state.streams_now()),
        ("events", state.events.len() as u64),
        ("imports", state.imports_now()),
        ("abandoned_device_bytes", counters.abandoned_device_bytes),
        ("abandoned_imports", counters.abandoned_imports),
        ("abandoned_registered_bytes", counters.abandoned_registered_bytes),
        ("abandoned_streams", counters.abandoned_streams),
        ("abandoned_events", counters.abandoned_events),
    ]
}
