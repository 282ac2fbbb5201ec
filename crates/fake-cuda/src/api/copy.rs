//! Copies and fills.

use super::call;
use crate::codes::{self, Code};
use crate::engine::{Copy, Direction, Side, Work, copy_rows, extent, wait_for};
use crate::state::{Place, State, enter_context};
use std::ffi::{c_uchar, c_uint};

/// `CU_DEVICE_ATTRIBUTE_MAX_PITCH`.
const MAX_PITCH: usize = 0x7fff_ffff;

/// What a caller says of one end of a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host,
    Device,
    /// The driver looks where the address lies.
    Any,
}

/// One end of a copy, as asked for.
#[derive(Clone, Copy)]
struct End {
    kind: Kind,
    address: usize,
    pitch: usize,
}

impl End {
    fn new(kind: Kind, address: u64) -> Result<Self, Code> {
        let address = usize::try_from(address).map_err(|_| codes::INVALID_VALUE)?;
        Ok(Self { kind, address, pitch: 0 })
    }

    fn check(self, state: &State, width: usize, height: usize) -> Result<Side, Code> {
        let len = extent(width, height, self.pitch).ok_or(codes::INVALID_VALUE)?;
        let place = state.place(self.address, len)?;
        if self.kind != Kind::Any && (self.kind == Kind::Device) != matches!(place, Place::Device(_)) {
            return Err(codes::INVALID_VALUE);
        }
        Ok(Side { address: self.address, pitch: self.pitch, place })
    }
}

/// What `cuMemcpy2D` takes: `CUDA_MEMCPY2D`.
#[repr(C)]
struct Copy2D {
    src_x: usize,
    src_y: usize,
    src_type: c_uint,
    src_host: usize,
    src_device: u64,
    src_array: usize,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_type: c_uint,
    dst_host: usize,
    dst_device: u64,
    dst_array: usize,
    dst_pitch: usize,
    width: usize,
    height: usize,
}

/// The end that a 2-D description means.
fn end_2d(kind: c_uint, host: usize, device: u64, at: (usize, usize), pitch: usize, row: usize) -> Result<End, Code> {
    let mut end = match kind {
        1 => End::new(Kind::Host, host as u64)?,
        2 => End::new(Kind::Device, device)?,
        4 => End::new(Kind::Any, device)?,
        3 => return Err(codes::NOT_SUPPORTED),
        _ => return Err(codes::INVALID_VALUE),
    };
    let (x, y) = at;
    let used = x.checked_add(row).ok_or(codes::INVALID_VALUE)?;
    if pitch > MAX_PITCH || (pitch < used && pitch != 0) {
        return Err(codes::INVALID_VALUE);
    }
    // No pitch means rows without gaps.
    end.pitch = if pitch == 0 { used } else { pitch };
    let offset = y.checked_mul(end.pitch).and_then(|rows| rows.checked_add(x));
    end.address = offset.and_then(|offset| end.address.checked_add(offset)).ok_or(codes::INVALID_VALUE)?;
    Ok(end)
}

/// Checks a copy, puts it into its stream (none means the default one, and waiting for it), and stages a pageable
/// source.
///
/// # Safety
/// A host range that is not registered must be mapped.
unsafe fn copy(
    symbol: &'static str,
    ends: impl FnOnce() -> Result<(End, End), Code>,
    (width, height): (usize, usize),
    stream: Option<usize>,
) -> Code {
    call(|| {
        let (mut state, device) = enter_context(symbol)?;
        let stream_handle = state.resolve_stream(stream.unwrap_or(0), device)?;
        let device = state.streams[&stream_handle].device;
        if width == 0 || height == 0 {
            return Ok(());
        }
        // SAFETY: the caller's duty.
        let (number, place) = unsafe { submit(&mut state, stream_handle, ends()?, (width, height))? };
        // To pageable memory the driver returns only when the bytes are there.
        if stream.is_none() || place == Place::Pageable {
            return wait_for(state, &[(stream_handle, number)]).check_alive(device);
        }
        Ok(())
    })
}

/// Puts a copy of at least one byte into a stream. Returns its number there, and where its destination is.
///
/// # Safety
/// A host range that is not registered must be mapped.
unsafe fn submit(
    state: &mut State,
    stream: usize,
    (to, from): (End, End),
    (width, height): (usize, usize),
) -> Result<(u64, Place), Code> {
    let to = to.check(state, width, height)?;
    let from = from.check(state, width, height)?;
    let direction = match (from.place, to.place) {
        (Place::Device(_), Place::Device(_)) => Direction::DeviceToDevice,
        (_, Place::Device(_)) => Direction::HostToDevice,
        (Place::Device(_), Place::Pinned { read_only: true }) => {
            return Err(codes::INVALID_VALUE);
        }
        (Place::Device(_), _) => Direction::DeviceToHost,
        // The driver copies from host to host as well; nothing here needs it.
        _ => return Err(codes::NOT_SUPPORTED),
    };
    let len = width.checked_mul(height).ok_or(codes::INVALID_VALUE)?;
    let mut staged = None;
    let mut spans = Vec::with_capacity(2);
    if from.place == Place::Pageable {
        let mut bytes = vec![0u8; len];
        let target = (bytes.as_mut_ptr().expose_provenance(), width);
        // SAFETY: the caller vouches for the source, and the vector has room for all rows.
        unsafe { copy_rows((from.address, from.pitch), target, width, height) };
        staged = Some(bytes);
    } else {
        spans.push((from.address, extent(width, height, from.pitch).unwrap_or(len)));
    }
    spans.push((to.address, extent(width, height, to.pitch).unwrap_or(len)));
    if from.place == Place::Pageable || to.place == Place::Pageable {
        state.counters.pageable_copies += 1;
        state.counters.pageable_bytes += len as u64;
    }
    let loses = state.counters.submitted >= state.settings.lose_after;
    state.counters.submitted += 1;
    let work = Work::Copy(Copy { from, to, width, height, staged, direction, loses });
    let number = state.submit(stream, work, spans, Vec::new())?;
    Ok((number, to.place))
}

/// Makes one exported function of a flat copy: its name, then the kinds of destination and source.
macro_rules! flat {
    ($name:ident, $to:ident: $to_type:ty, $from:ident: $from_type:ty) => {
        /// # Safety
        /// A host range that is not registered must be mapped.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(to: $to_type, from: $from_type, len: usize) -> Code {
            let ends = || Ok((End::new(Kind::$to, to as u64)?, End::new(Kind::$from, from as u64)?));
            // SAFETY: the caller's duty.
            unsafe { copy(stringify!($name), ends, (len, 1), None) }
        }
    };
    (async $name:ident, $to:ident: $to_type:ty, $from:ident: $from_type:ty) => {
        /// # Safety
        /// A host range that is not registered must be mapped.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(to: $to_type, from: $from_type, len: usize, stream: usize) -> Code {
            let ends = || Ok((End::new(Kind::$to, to as u64)?, End::new(Kind::$from, from as u64)?));
            // SAFETY: the caller's duty.
            unsafe { copy(stringify!($name), ends, (len, 1), Some(stream)) }
        }
    };
}

flat!(cuMemcpyHtoD_v2, Device: u64, Host: usize);
flat!(cuMemcpyDtoH_v2, Host: usize, Device: u64);
flat!(cuMemcpyDtoD_v2, Device: u64, Device: u64);
flat!(cuMemcpy, Any: u64, Any: u64);
flat!(async cuMemcpyHtoDAsync_v2, Device: u64, Host: usize);
flat!(async cuMemcpyDtoHAsync_v2, Host: usize, Device: u64);
flat!(async cuMemcpyDtoDAsync_v2, Device: u64, Device: u64);
flat!(async cuMemcpyAsync, Any: u64, Any: u64);

/// # Safety
/// `description` may be read, and unregistered host ranges in it are mapped.
unsafe fn copy_2d(symbol: &'static str, description: *const Copy2D, stream: Option<usize>) -> Code {
    // SAFETY: the caller's duty.
    let Some(d) = (unsafe { description.as_ref() }) else {
        return codes::INVALID_VALUE;
    };
    let ends = || {
        let to = end_2d(d.dst_type, d.dst_host, d.dst_device, (d.dst_x, d.dst_y), d.dst_pitch, d.width)?;
        let from = end_2d(d.src_type, d.src_host, d.src_device, (d.src_x, d.src_y), d.src_pitch, d.width)?;
        Ok((to, from))
    };
    // SAFETY: the caller's duty.
    unsafe { copy(symbol, ends, (d.width, d.height), stream) }
}

/// # Safety
/// `description` may be read, and unregistered host ranges in it are mapped.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpy2D_v2(description: *const Copy2D) -> Code {
    // SAFETY: the caller's duty.
    unsafe { copy_2d("cuMemcpy2D_v2", description, None) }
}

/// # Safety
/// `description` may be read, and unregistered host ranges in it are mapped.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpy2DUnaligned_v2(description: *const Copy2D) -> Code {
    // SAFETY: the caller's duty.
    unsafe { copy_2d("cuMemcpy2DUnaligned_v2", description, None) }
}

/// # Safety
/// `description` may be read, and unregistered host ranges in it are mapped.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpy2DAsync_v2(description: *const Copy2D, stream: usize) -> Code {
    // SAFETY: the caller's duty.
    unsafe { copy_2d("cuMemcpy2DAsync_v2", description, Some(stream)) }
}

/// What `cuMemcpyBatchAsync` takes for a run of its copies: `CUmemcpyAttributes`.
#[repr(C)]
struct Attributes {
    order: c_uint,
    from: [c_uint; 2],
    to: [c_uint; 2],
    flags: c_uint,
}

/// The copies are made in order; the driver promises none. As the driver's first version of it, all copies have one
/// kind of attributes here. A pageable source is staged at once, which the driver does only where it is asked to.
///
/// # Safety
/// The first three pointers have `count` elements, the next two `attribute_count`; `failed` may be written. Host ranges
/// that are not registered are mapped.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyBatchAsync(
    to: *const u64,
    from: *const u64,
    lens: *const usize,
    count: usize,
    attributes: *const Attributes,
    attribute_starts: *const usize,
    attribute_count: usize,
    failed: *mut usize,
    stream: usize,
) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuMemcpyBatchAsync")?;
        // The default stream is refused.
        let default = stream <= 1;
        if default || count == 0 || attribute_count != 1 || failed.is_null() {
            return Err(codes::INVALID_VALUE);
        }
        if [to.is_null(), from.is_null(), lens.is_null(), attributes.is_null(), attribute_starts.is_null()]
            .contains(&true)
        {
            return Err(codes::INVALID_VALUE);
        }
        // SAFETY: the caller's duty.
        let (to, from, lens, attributes, first) = unsafe {
            let slice = std::slice::from_raw_parts::<u64>;
            let lens = std::slice::from_raw_parts(lens, count);
            (slice(to, count), slice(from, count), lens, &*attributes, *attribute_starts)
        };
        let Attributes { order, from: _, to: _, flags } = attributes;
        if first != 0 || !(1..=3).contains(order) || *flags > 1 {
            return Err(codes::INVALID_VALUE);
        }
        let stream = state.resolve_stream(stream, device)?;
        for (number, ((to, from), len)) in to.iter().zip(from).zip(lens).enumerate() {
            // SAFETY: the caller's duty.
            unsafe { failed.write(number) };
            let ends = (End::new(Kind::Any, *to)?, End::new(Kind::Any, *from)?);
            if *len == 0 {
                return Err(codes::INVALID_VALUE);
            }
            // SAFETY: the caller's duty.
            unsafe { submit(&mut state, stream, ends, (*len, 1))? };
        }
        Ok(())
    })
}

fn fill(symbol: &'static str, pointer: u64, value: u8, len: usize, stream: Option<usize>) -> Code {
    call(|| {
        let (mut state, device) = enter_context(symbol)?;
        let handle = state.resolve_stream(stream.unwrap_or(0), device)?;
        let device = state.streams[&handle].device;
        if len == 0 {
            return Ok(());
        }
        let address = End::new(Kind::Device, pointer)?.check(&state, len, 1)?.address;
        let number = state.submit(handle, Work::Fill { address, len, value }, vec![(address, len)], Vec::new())?;
        if stream.is_none() {
            return wait_for(state, &[(handle, number)]).check_alive(device);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(pointer: u64, value: c_uchar, len: usize) -> Code {
    fill("cuMemsetD8_v2", pointer, value, len, None)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(pointer: u64, value: c_uchar, len: usize, stream: usize) -> Code {
    fill("cuMemsetD8Async", pointer, value, len, Some(stream))
}
