//! Checksums of what lies in the device's memory, by a kernel (`kernels/sums.cu`).

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crc_fast::crc64_nvme;
use cudarc::driver::sys;

use super::stream::{Events, Queue};
use super::{Context, CudaMemory, driver_version};
use crate::crc;
use crate::device::{BackendSums, DeviceError, Run};

/// A kernel that was compiled for an architecture, and for later ones of its generation.
struct Binary {
    /// The generation, and the first of its architectures: 8.0.
    major: c_int,
    minor: c_int,
    code: &'static [u8],
}

/// A constant of these bytes at a place where the driver may read words.
macro_rules! binary {
    ($major:literal, $minor:literal, $path:literal) => {{
        #[repr(C, align(64))]
        struct Aligned<T>(T);
        static CODE: &Aligned<[u8; include_bytes!($path).len()]> = &Aligned(*include_bytes!($path));
        Binary { major: $major, minor: $minor, code: &CODE.0 }
    }};
}

fn binaries() -> [Binary; 5] {
    [
        binary!(7, 5, "../../../kernels/sums.sm_75.cubin"),
        binary!(8, 0, "../../../kernels/sums.sm_80.cubin"),
        binary!(9, 0, "../../../kernels/sums.sm_90.cubin"),
        binary!(10, 0, "../../../kernels/sums.sm_100.cubin"),
        binary!(12, 0, "../../../kernels/sums.sm_120.cubin"),
    ]
}

const TABLES: &CStr = c"sllm_tables";
const SUMS: &CStr = c"sllm_sums";
/// Blocks and threads that fill the tables.
const TABLE_BLOCKS: c_uint = 8;
/// Threads of a block, words of a block's tile, and runs of a launch, as in `sums.cu`.
const THREADS: c_uint = 256;
const TILE: u32 = 8192;
const RUNS: usize = 96;
/// Words that are worth a launch: 64 MiB.
const WORTH_A_LAUNCH: u64 = 8 << 20;
/// Slots that memory is made for at least.
const LEAST_SLOTS: usize = 8192;
/// The first version of the driver that has libraries. While one is loaded no other call waits, as with modules.
const LIBRARIES_SINCE: i32 = 12_000;

/// The kernel in one context. The library is unloaded with the context.
#[derive(Debug)]
pub(super) struct Kernel {
    library: sys::CUlibrary,
    sums: sys::CUfunction,
}

// SAFETY: libraries and functions of the driver may be used in any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above, several at once.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Loads the kernel into a context, which takes less than a millisecond, and tries it.
    pub(super) fn load(context: &Arc<Context>) -> Result<Kernel, DeviceError> {
        let unable = |why: &str| DeviceError::NoSums { device: context.id(), reason: why.into() };
        if driver_version() < LIBRARIES_SINCE {
            return Err(unable("its driver is older than CUDA 12.0"));
        }
        let (major, minor) = context.architecture()?;
        let fits = |binary: &Binary| binary.major == major && binary.minor <= minor;
        let none = || unable(&format!("there is no kernel for its architecture, {major}.{minor}"));
        let binary = binaries().into_iter().find(fits).ok_or_else(none)?;
        let _current = context.enter()?;
        let mut library = ptr::null_mut();
        let (code, none, no_values) = (binary.code.as_ptr().cast(), ptr::null_mut(), ptr::null_mut());
        let (nothing, of_nothing) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the code is whole and constant, there are no options, and the driver writes one handle.
        let code = unsafe { sys::cuLibraryLoadData(&mut library, code, none, no_values, 0, nothing, of_nothing, 0) };
        context.check("load a kernel", code)?;
        let mut kernel = Kernel { library, sums: ptr::null_mut() };
        let ready = kernel.ready(context).and_then(|()| kernel.try_out(context));
        if let Err(error) = ready {
            kernel.unload();
            return Err(error);
        }
        Ok(kernel)
    }

    /// Finds its functions, and fills its tables. The context is current.
    fn ready(&mut self, context: &Arc<Context>) -> Result<(), DeviceError> {
        let tables = function(context, self.library, TABLES)?;
        self.sums = function(context, self.library, SUMS)?;
        let queue = Queue::new(context)?;
        // SAFETY: the kernel takes nothing, and writes to the tables of its library only.
        unsafe { launch(context, tables, TABLE_BLOCKS, &queue, &mut [])? };
        queue.synchronize()
    }

    /// Has it sum up known bytes: a wrong sum would make good loads fail. The context is current.
    fn try_out(&self, context: &Arc<Context>) -> Result<(), DeviceError> {
        const WORDS: u32 = TILE + TILE / 8; // a tile, and a part of one
        const LEN: usize = 8 * WORDS as usize;
        const BYTE: u8 = 0x5a;
        let (memory, queue) = (CudaMemory::alloc(context, 8 + LEN)?, Queue::new(context)?);
        for (addr, value, len) in [(memory.addr, 0, 8), (memory.addr + 8, BYTE, LEN)] {
            // SAFETY: the memory has so many bytes, and is freed after the queue's work.
            context.check("fill memory", unsafe { sys::cuMemsetD8Async(addr, value, len, queue.handle()) })?;
        }
        let run = Run { addr: memory.addr + 8, pitch: 0, row: WORDS, words: WORDS, after: 0, slot: 0 };
        // SAFETY: the run and the slot are in the memory.
        unsafe { self.sum(context, &queue, memory.addr, &[run])? };
        let mut sum = 0;
        // SAFETY: the memory has a slot.
        unsafe { fetch(context, &queue, memory.addr, std::slice::from_mut(&mut sum))? };
        if crc::of_zeros(LEN as u64) ^ sum != crc64_nvme(&vec![BYTE; LEN]) {
            let reason = "its kernel gives a wrong checksum of known bytes".into();
            return Err(DeviceError::NoSums { device: context.id(), reason });
        }
        Ok(())
    }

    /// Launches it for all of these runs. The context is current.
    ///
    /// # Safety
    /// The runs, and the slots that they name of those at `sums`, lie in live memory, which stays so until it is done.
    unsafe fn sum(&self, context: &Context, queue: &Queue, mut sums: u64, mut runs: &[Run]) -> Result<(), DeviceError> {
        while !runs.is_empty() {
            let (mut taken, tiles) = KernelRuns::new(runs);
            let mut arguments = [(&raw mut sums).cast(), (&raw mut taken).cast()];
            // SAFETY: the arguments are those of `sllm_sums`; the caller's word for the memory.
            unsafe { launch(context, self.sums, tiles, queue, &mut arguments)? };
            runs = &runs[taken.count as usize..];
        }
        Ok(())
    }

    /// Its context is current, and nothing of it runs.
    pub(super) fn unload(&self) {
        // SAFETY: loaded once, unloaded once.
        let _ = unsafe { sys::cuLibraryUnload(self.library) };
    }
}

/// Copies sums to the host, after the queue's work. The context is current.
///
/// # Safety
/// The device has as many at this address.
unsafe fn fetch(context: &Context, queue: &Queue, addr: u64, sums: &mut [u64]) -> Result<(), DeviceError> {
    let (to, len) = (sums.as_mut_ptr().cast(), size_of_val(sums));
    // SAFETY: the caller's word; the driver writes `len` bytes of numbers, and is waited for.
    let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to, addr, len, queue.handle()) };
    let copied = context.check("copy checksums to the host", code);
    queue.synchronize().and(copied)
}

/// A function of the library. The context is current.
fn function(context: &Context, library: sys::CUlibrary, name: &CStr) -> Result<sys::CUfunction, DeviceError> {
    let (mut kernel, mut function) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the library stays loaded; the driver writes one handle.
    let code = unsafe { sys::cuLibraryGetKernel(&mut kernel, library, name.as_ptr()) };
    context.check("find a kernel", code)?;
    // SAFETY: the kernel is the library's; a context is current; the driver writes one handle.
    context.check("load a kernel", unsafe { sys::cuKernelGetFunction(&mut function, kernel) })?;
    Ok(function)
}

/// Launches blocks of a function. The context is current.
///
/// # Safety
/// `arguments` point to what the function takes, and what it reads and writes stays until it is done.
unsafe fn launch(
    context: &Context,
    function: sys::CUfunction,
    blocks: c_uint,
    queue: &Queue,
    arguments: &mut [*mut c_void],
) -> Result<(), DeviceError> {
    let (arguments, none) = (arguments.as_mut_ptr(), ptr::null_mut());
    // SAFETY: the caller's word; the driver copies the arguments during the call.
    let code =
        unsafe { sys::cuLaunchKernel(function, blocks, 1, 1, THREADS, 1, 1, 0, queue.handle(), arguments, none) };
    context.check("launch a kernel", code)
}

/// A run as the kernel takes it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct KernelRun {
    addr: u64,
    pitch: u64,
    row: u32,
    words: u32,
    after: u32,
    slot: u32,
    /// Tiles of the runs before it.
    tiles: u32,
    reserved: u32,
}

/// The runs of a launch as the kernel takes them.
#[repr(C)]
struct KernelRuns {
    count: u32,
    reserved: u32,
    runs: [KernelRun; RUNS],
}

impl KernelRuns {
    /// As many of these runs as a launch takes, and their tiles.
    fn new(runs: &[Run]) -> (KernelRuns, u32) {
        let mut taken = KernelRuns { count: 0, reserved: 0, runs: [KernelRun::default(); RUNS] };
        let mut tiles = 0;
        for (place, &Run { addr, pitch, row, words, after, slot }) in taken.runs.iter_mut().zip(runs) {
            *place = KernelRun { addr, pitch, row, words, after, slot, tiles, reserved: 0 };
            tiles += words.div_ceil(TILE);
            taken.count += 1;
        }
        (taken, tiles)
    }
}

/// Takes checksums of what a stream brings, by a queue of its own: copies do not wait for it.
#[derive(Debug)]
pub(super) struct CudaSums {
    context: Arc<Context>,
    /// What brings the bytes.
    copies: Arc<Queue>,
    events: Arc<Events>,
    /// Dropped before the memory that it writes to.
    queue: Queue,
    memory: Option<CudaMemory>,
    /// Slots that the memory has, and those that are in use.
    room: usize,
    slots: usize,
    waiting: Mutex<Waiting>,
}

/// Runs that wait for a launch, and their words.
#[derive(Debug, Default)]
struct Waiting {
    runs: Vec<Run>,
    words: u64,
}

impl CudaSums {
    pub(super) fn new(
        context: &Arc<Context>,
        copies: &Arc<Queue>,
        events: &Arc<Events>,
    ) -> Result<CudaSums, DeviceError> {
        let (context, copies, events) = (Arc::clone(context), Arc::clone(copies), Arc::clone(events));
        let queue = Queue::new(&context)?;
        Ok(CudaSums { context, copies, events, queue, memory: None, room: 0, slots: 0, waiting: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Launches the kernel for all of these runs, after what the stream has to do by now.
    ///
    /// # Safety
    /// As [`BackendSums::add`].
    unsafe fn launch(&self, runs: &[Run]) -> Result<(), DeviceError> {
        let memory = self.memory.as_ref().ok_or(DeviceError::OutOfBounds)?;
        let _current = self.context.enter()?;
        self.queue.wait_for(&self.copies, &self.events)?;
        // SAFETY: the runs stay by the caller's word; `add` checked their slots, which `memory` has.
        unsafe { self.context.kernel()?.sum(&self.context, &self.queue, memory.addr, runs) }
    }
}

impl BackendSums for CudaSums {
    fn begin(&mut self, slots: usize) -> Result<(), DeviceError> {
        self.stop();
        let _current = self.context.enter()?;
        if self.room < slots {
            let room = slots.max(LEAST_SLOTS);
            (self.memory, self.room) = (None, 0);
            self.memory = Some(CudaMemory::alloc(&self.context, room.saturating_mul(size_of::<u64>()))?);
            self.room = room;
        }
        self.slots = slots;
        if let Some(memory) = &self.memory {
            let len = slots * size_of::<u64>();
            // SAFETY: the memory has as many bytes, and is freed after the queue's work.
            let code = unsafe { sys::cuMemsetD8Async(memory.addr, 0, len, self.queue.handle()) };
            self.context.check("clear memory", code)?;
        }
        Ok(())
    }

    unsafe fn add(&self, runs: &[Run]) -> Result<(), DeviceError> {
        if runs.iter().any(|run| run.slot as usize >= self.slots || run.row == 0) {
            return Err(DeviceError::OutOfBounds);
        }
        let mut waiting = self.lock();
        waiting.runs.extend_from_slice(runs);
        waiting.words += runs.iter().map(|run| u64::from(run.words)).sum::<u64>();
        if waiting.words < WORTH_A_LAUNCH {
            return Ok(());
        }
        let Waiting { runs, .. } = std::mem::take(&mut *waiting);
        drop(waiting);
        // SAFETY: the caller's word, and that of whoever added the others.
        unsafe { self.launch(&runs) }
    }

    fn take(&self) -> Result<Vec<u64>, DeviceError> {
        let Waiting { runs, .. } = std::mem::take(&mut *self.lock());
        let mut sums = vec![0u64; self.slots];
        if !runs.is_empty() {
            // SAFETY: the word of whoever added them.
            unsafe { self.launch(&runs)? };
        }
        if let (Some(memory), false) = (&self.memory, sums.is_empty()) {
            let _current = self.context.enter()?;
            // SAFETY: the memory has as many slots.
            unsafe { fetch(&self.context, &self.queue, memory.addr, &mut sums)? };
        }
        Ok(sums)
    }

    fn stop(&self) {
        *self.lock() = Waiting::default();
        // After an error of the device nothing more is read.
        let _ = self.queue.synchronize();
    }
}

impl Drop for CudaSums {
    fn drop(&mut self) {
        self.stop();
    }
}
