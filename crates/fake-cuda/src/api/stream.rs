//! Streams and events.

use super::{call, put};
use crate::codes::{self, Code};
use crate::engine::{Work, wait_for};
use crate::state::{Event, enter_context, enter_freeing};
use std::ffi::{c_int, c_uint};

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_BLOCKING_SYNC`, `CU_EVENT_DISABLE_TIMING` and `CU_EVENT_INTERPROCESS`.
const EVENT_FLAGS: c_uint = 7;
const DISABLE_TIMING: c_uint = 2;

/// # Safety
/// `stream` may be written.
unsafe fn create(symbol: &'static str, stream: *mut usize, flags: c_uint) -> Code {
    call(|| {
        let (mut state, device) = enter_context(symbol)?;
        if flags & !NON_BLOCKING != 0 || stream.is_null() {
            return Err(codes::INVALID_VALUE);
        }
        let handle = state.create_stream(device, flags & NON_BLOCKING != 0)?;
        // SAFETY: the caller's duty.
        unsafe { put(stream, handle) }
    })
}

/// # Safety
/// `stream` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut usize, flags: c_uint) -> Code {
    // SAFETY: the caller's duty.
    unsafe { create("cuStreamCreate", stream, flags) }
}

/// # Safety
/// `stream` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreateWithPriority(stream: *mut usize, flags: c_uint, _priority: c_int) -> Code {
    // SAFETY: the caller's duty.
    unsafe { create("cuStreamCreateWithPriority", stream, flags) }
}

/// Returns at once; the stream ends when its work is done.
#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: usize) -> Code {
    call(|| {
        let (mut state, _) = enter_freeing("cuStreamDestroy_v2")?;
        let found = state.streams.get_mut(&stream).filter(|found| !found.destroyed).ok_or(codes::INVALID_HANDLE)?;
        found.destroyed = true;
        let device = found.device;
        crate::state::notify();
        state.check_alive(device)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: usize) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuStreamSynchronize")?;
        let stream = state.resolve_stream(stream, device)?;
        let device = state.streams[&stream].device;
        let last = state.last(stream);
        wait_for(state, &[last]).check_alive(device)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: usize) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuStreamQuery")?;
        let stream = state.resolve_stream(stream, device)?;
        state.check_alive(state.streams[&stream].device)?;
        if state.reached(state.last(stream)) { Ok(()) } else { Err(codes::NOT_READY) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuStreamWaitEvent")?;
        let stream = state.resolve_stream(stream, device)?;
        let recorded = state.events.get(&event).ok_or(codes::INVALID_HANDLE)?.recorded;
        if let Some(operation) = recorded {
            state.submit(stream, Work::Nothing, Vec::new(), vec![operation])?;
        }
        Ok(())
    })
}

/// Nothing can be captured, so nothing is.
///
/// # Safety
/// `status` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamIsCapturing(stream: usize, status: *mut c_int) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuStreamIsCapturing")?;
        state.resolve_stream(stream, device)?;
        // SAFETY: the caller's duty.
        unsafe { put(status, 0) }
    })
}

/// # Safety
/// `event` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut usize, flags: c_uint) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuEventCreate")?;
        if flags & !EVENT_FLAGS != 0 || event.is_null() {
            return Err(codes::INVALID_VALUE);
        }
        let handle = state.new_handle();
        let timed = flags & DISABLE_TIMING == 0;
        state.events.insert(handle, Event { device, timed, recorded: None, stamp: None });
        // SAFETY: the caller's duty.
        unsafe { put(event, handle) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: usize) -> Code {
    call(|| {
        let (mut state, _) = enter_freeing("cuEventDestroy_v2")?;
        let event = state.events.remove(&event).ok_or(codes::INVALID_HANDLE)?;
        state.check_alive(event.device)
    })
}

fn record(symbol: &'static str, event: usize, stream: usize) -> Code {
    call(|| {
        let (mut state, device) = enter_context(symbol)?;
        let stream = state.resolve_stream(stream, device)?;
        let device = state.streams[&stream].device;
        if state.events.get(&event).is_none_or(|event| event.device != device) {
            return Err(codes::INVALID_HANDLE);
        }
        let number = state.submit(stream, Work::Stamp(event), Vec::new(), Vec::new())?;
        if let Some(event) = state.events.get_mut(&event) {
            event.recorded = Some((stream, number));
            event.stamp = None;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: usize, stream: usize) -> Code {
    record("cuEventRecord", event, stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecordWithFlags(event: usize, stream: usize, _flags: c_uint) -> Code {
    record("cuEventRecordWithFlags", event, stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: usize) -> Code {
    call(|| {
        let (state, _) = enter_context("cuEventQuery")?;
        let event = state.events.get(&event).ok_or(codes::INVALID_HANDLE)?;
        state.check_alive(event.device)?;
        let done = event.recorded.is_none_or(|operation| state.reached(operation));
        if done { Ok(()) } else { Err(codes::NOT_READY) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: usize) -> Code {
    call(|| {
        let (state, _) = enter_context("cuEventSynchronize")?;
        let event = state.events.get(&event).ok_or(codes::INVALID_HANDLE)?;
        let (device, recorded) = (event.device, event.recorded);
        wait_for(state, recorded.as_slice()).check_alive(device)
    })
}

/// # Safety
/// `milliseconds` may be written.
unsafe fn elapsed(symbol: &'static str, milliseconds: *mut f32, start: usize, end: usize) -> Code {
    call(|| {
        let (state, _) = enter_context(symbol)?;
        let find = |event| state.events.get(event).filter(|event| event.timed && event.recorded.is_some());
        let (Some(start), Some(end)) = (find(&start), find(&end)) else {
            return Err(codes::INVALID_HANDLE);
        };
        let (Some(start), Some(end)) = (start.stamp, end.stamp) else {
            return Err(codes::NOT_READY);
        };
        let seconds = match end.checked_duration_since(start) {
            Some(forward) => forward.as_secs_f32(),
            None => -(start - end).as_secs_f32(),
        };
        // SAFETY: the caller's duty.
        unsafe { put(milliseconds, seconds * 1e3) }
    })
}

/// # Safety
/// `milliseconds` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) -> Code {
    // SAFETY: the caller's duty.
    unsafe { elapsed("cuEventElapsedTime", milliseconds, start, end) }
}

/// # Safety
/// `milliseconds` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize) -> Code {
    // SAFETY: the caller's duty.
    unsafe { elapsed("cuEventElapsedTime_v2", milliseconds, start, end) }
}
