//! Libraries and kernels: those by which the loader takes checksums, and no others. What they do is written down here once
//! more, so that a launch with wrong arguments, or before its bytes are there, gives wrong checksums as it would on a device.

use super::{call, put};
use crate::codes::{self, Code};
use crate::engine::{Rows, Work};
use crate::state::{Place, enter, enter_context};
use std::ffi::{CStr, c_char, c_uint, c_void};

const LIBRARY: usize = 0x9000;
/// Kernels are functions too.
const KERNELS: [(usize, &CStr); 2] = [(0x9010, c"sllm_tables"), (0x9020, c"sllm_sums")];
const TABLES: usize = KERNELS[0].0;
const SUMS: usize = KERNELS[1].0;
const THREADS: c_uint = 256;
/// Words of 8 bytes that a block sums up.
const TILE: u32 = 8192;
const RUNS: usize = 96;

/// Rows of memory, as `sllm_sums` takes them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Run {
    address: u64,
    pitch: u64,
    row: u32,
    words: u32,
    after: u32,
    slot: u32,
    tiles: u32,
    _reserved: u32,
}

#[repr(C)]
struct Runs {
    count: u32,
    _reserved: u32,
    runs: [Run; RUNS],
}

/// # Safety
/// `library` may be written, and `code` has the length of a magic number.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuLibraryLoadData(
    library: *mut usize,
    code: *const c_char,
    _jit_options: usize,
    _jit_values: usize,
    _jit_count: c_uint,
    _options: usize,
    _values: usize,
    _count: c_uint,
) -> Code {
    call(|| {
        drop(enter("cuLibraryLoadData")?);
        if code.is_null() {
            return Err(codes::INVALID_VALUE);
        }
        // SAFETY: the caller's duty.
        if unsafe { code.cast::<[u8; 4]>().read() } != *b"\x7fELF" {
            return Err(codes::NOT_SUPPORTED);
        }
        // SAFETY: the caller's duty.
        unsafe { put(library, LIBRARY) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuLibraryUnload(library: usize) -> Code {
    call(|| {
        drop(enter("cuLibraryUnload")?);
        if library == LIBRARY { Ok(()) } else { Err(codes::INVALID_HANDLE) }
    })
}

/// # Safety
/// `kernel` may be written, and `name` is text that ends by zero.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuLibraryGetKernel(kernel: *mut usize, library: usize, name: *const c_char) -> Code {
    call(|| {
        drop(enter("cuLibraryGetKernel")?);
        if library != LIBRARY || name.is_null() {
            return Err(codes::INVALID_HANDLE);
        }
        // SAFETY: the caller's duty.
        let name = unsafe { CStr::from_ptr(name) };
        let found = KERNELS.iter().find(|(_, known)| *known == name).ok_or(codes::NOT_FOUND)?;
        // SAFETY: the caller's duty.
        unsafe { put(kernel, found.0) }
    })
}

/// # Safety
/// `function` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuKernelGetFunction(function: *mut usize, kernel: usize) -> Code {
    call(|| {
        drop(enter_context("cuKernelGetFunction")?);
        if !KERNELS.iter().any(|(known, _)| *known == kernel) {
            return Err(codes::INVALID_HANDLE);
        }
        // SAFETY: the caller's duty.
        unsafe { put(function, kernel) }
    })
}

/// # Safety
/// `arguments` are those of the function, which this copies.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    blocks: c_uint,
    blocks_y: c_uint,
    blocks_z: c_uint,
    threads: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    _shared: c_uint,
    stream: usize,
    arguments: *const *const c_void,
    _extra: usize,
) -> Code {
    call(|| {
        let (mut state, device) = enter_context("cuLaunchKernel")?;
        let stream = state.resolve_stream(stream, device)?;
        if (blocks_y, blocks_z, threads, threads_y, threads_z) != (1, 1, THREADS, 1, 1) || blocks == 0 {
            return Err(codes::INVALID_VALUE);
        }
        if function == TABLES {
            // What it fills is not needed here.
            return if blocks == 8 { Ok(()) } else { Err(codes::INVALID_VALUE) };
        }
        if function != SUMS || arguments.is_null() {
            return Err(codes::INVALID_HANDLE);
        }
        // SAFETY: the caller's duty: a pointer to an address, and one to the runs.
        let (sums, runs) = unsafe { ((*arguments).cast::<u64>().read(), &*(*arguments.add(1)).cast::<Runs>()) };
        let runs = usize::try_from(runs.count).ok().and_then(|count| runs.runs.get(..count));
        let mut rows = Vec::new();
        let mut spans = Vec::new();
        let mut tiles = 0;
        for &Run { address, pitch, row, words, after, slot, tiles: before, .. } in runs.ok_or(codes::INVALID_VALUE)? {
            if row == 0 || words % row != 0 || before != tiles {
                return Err(codes::INVALID_VALUE);
            }
            tiles += words.div_ceil(TILE);
            let number = |n: u64| usize::try_from(n).map_err(|_| codes::INVALID_VALUE);
            let run = Rows {
                address: number(address)?,
                pitch: number(pitch)?,
                width: row as usize * 8,
                height: (words / row) as usize,
                after: u64::from(after),
                sum: number(sums)? + slot as usize * 8,
            };
            let len = (run.height.max(1) - 1) * run.pitch + run.width;
            for (address, len) in [(run.address, len), (run.sum, 8)] {
                // A device stops at an address that is none of its own, and at a word that is not aligned.
                if !matches!(state.place(address, len)?, Place::Device(_)) || address % 8 != 0 {
                    return Err(codes::INVALID_VALUE);
                }
                spans.push((address, len));
            }
            rows.push(run);
        }
        if tiles != blocks {
            return Err(codes::INVALID_VALUE);
        }
        state.submit(stream, Work::Sum(rows), spans, Vec::new())?;
        Ok(())
    })
}
