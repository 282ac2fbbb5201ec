//! Checksums of what lies in the device's memory, by a kernel (`kernels/sums.cu`).

use std::ffi::{CStr, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys;

use super::stream::{Events, Queue};
use super::{Context, CudaMemory, check, driver_version};
use crate::device::{BackendSums, DeviceError, Run, SumsState};
use crate::releases;

/// What the driver compiles for its device.
const SOURCE: &str = concat!(include_str!("../../../kernels/sums.ptx"), "\0");
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
/// The first version of the driver that has libraries. To load one takes 40 to 140 ms where the driver has to compile it,
/// and no other call waits for that, as with modules.
const LIBRARIES_SINCE: i32 = 12_000;

/// A kernel in one context.
#[derive(Debug, Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's functions may be launched from any thread.
unsafe impl Send for Function {}
// SAFETY: as above, several at once.
unsafe impl Sync for Function {}

/// A library of the driver's, which is never unloaded.
#[derive(Debug, Clone, Copy)]
struct Library(sys::CUlibrary);

// SAFETY: a library belongs to no context, and may be asked for its kernels from any thread.
unsafe impl Send for Library {}
// SAFETY: as above, several at once.
unsafe impl Sync for Library {}

/// A context's kernel.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    asked_for: AtomicBool,
    found: OnceLock<Result<Function, DeviceError>>,
}

impl Kernel {
    pub(super) fn state(&self) -> SumsState {
        match self.found.get() {
            None if self.asked_for.load(Ordering::Relaxed) => SumsState::Preparing,
            None => SumsState::Unready,
            Some(Err(error)) => SumsState::Refused(error.to_string()),
            Some(Ok(_)) => SumsState::Ready,
        }
    }

    /// Loads a context's kernel in the background, the first time.
    pub(super) fn prepare(context: &Arc<Context>) {
        if !context.kernel.asked_for.swap(true, Ordering::Relaxed) {
            let context = Arc::clone(context);
            releases::in_background("sllm-kernel", usize::MAX, move || {
                let _ = context.kernel.found.set(load(&context));
            });
        }
    }
}

/// Loads the kernel, and fills its tables.
fn load(context: &Arc<Context>) -> Result<Function, DeviceError> {
    let current = context.enter()?;
    let library = library(context)?;
    let tables = function(context, library, TABLES)?;
    let sums = function(context, library, SUMS)?;
    drop(current);
    let queue = Queue::new(context)?;
    let _current = context.enter()?;
    // SAFETY: the kernel takes nothing, and writes to the tables of its library only.
    unsafe { launch(context, tables, TABLE_BLOCKS, &queue, &mut [])? };
    queue.synchronize()?;
    Ok(sums)
}

/// The process's library; every context has its own code and tables of it. A context is current.
fn library(context: &Context) -> Result<Library, DeviceError> {
    static LIBRARY: OnceLock<Result<Library, DeviceError>> = OnceLock::new();
    if driver_version() < LIBRARIES_SINCE {
        return Err(DeviceError::OldDriver { device: context.id() });
    }
    let load = || {
        let (mut library, no_options, no_values) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        let (no_library_options, no_library_values) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the source ends by zero, there are no options, and the driver writes one handle.
        let code = unsafe {
            let source = SOURCE.as_ptr().cast();
            sys::cuLibraryLoadData(
                &mut library,
                source,
                no_options,
                no_values,
                0,
                no_library_options,
                no_library_values,
                0,
            )
        };
        check("cuda", "load a library", code).map(|()| Library(library))
    };
    LIBRARY.get_or_init(load).clone()
}

/// A function of the library. The context is current.
fn function(context: &Context, library: Library, name: &CStr) -> Result<Function, DeviceError> {
    let (mut kernel, mut function) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the library stays loaded; the driver writes one handle.
    let code = unsafe { sys::cuLibraryGetKernel(&mut kernel, library.0, name.as_ptr()) };
    context.check("find a kernel", code)?;
    // SAFETY: the kernel is the library's; a context is current; the driver writes one handle.
    context.check("load a kernel", unsafe { sys::cuKernelGetFunction(&mut function, kernel) })?;
    Ok(Function(function))
}

/// Launches blocks of a function. The context is current.
///
/// # Safety
/// `arguments` point to what the function takes, and what it reads and writes stays until it is done.
unsafe fn launch(
    context: &Context,
    function: Function,
    blocks: c_uint,
    queue: &Queue,
    arguments: &mut [*mut c_void],
) -> Result<(), DeviceError> {
    let (arguments, none) = (arguments.as_mut_ptr(), ptr::null_mut());
    // SAFETY: the caller's word; the driver copies the arguments during the call.
    let code =
        unsafe { sys::cuLaunchKernel(function.0, blocks, 1, 1, THREADS, 1, 1, 0, queue.handle(), arguments, none) };
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
    waiting: Mutex<Vec<Run>>,
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

    fn lock(&self) -> MutexGuard<'_, Vec<Run>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Launches the kernel for all of these runs, after what the stream has to do by now.
    ///
    /// # Safety
    /// As [`BackendSums::add`].
    unsafe fn launch(&self, mut runs: &[Run]) -> Result<(), DeviceError> {
        let function = self.context.kernel.found.get().ok_or(DeviceError::OutOfBounds)?.clone()?;
        let mut sums = self.memory.as_ref().ok_or(DeviceError::OutOfBounds)?.addr;
        let _current = self.context.enter()?;
        self.queue.wait_for(&self.copies, &self.events)?;
        while !runs.is_empty() {
            let (mut taken, tiles) = KernelRuns::new(runs);
            let mut arguments = [(&raw mut sums).cast(), (&raw mut taken).cast()];
            // SAFETY: the arguments are those of `sllm_sums`. It reads the runs, which stay by the caller's word, and
            // writes to slots, which `add` checked and `memory` has.
            unsafe { launch(&self.context, function, tiles, &self.queue, &mut arguments)? };
            runs = &runs[taken.count as usize..];
        }
        Ok(())
    }
}

impl BackendSums for CudaSums {
    fn begin(&mut self, slots: usize) -> Result<(), DeviceError> {
        self.stop();
        let current = self.context.enter()?;
        if self.room < slots {
            let room = slots.max(LEAST_SLOTS);
            self.memory = None;
            self.memory = Some(CudaMemory::alloc(&self.context, room.saturating_mul(size_of::<u64>()))?);
            self.room = room;
        }
        self.slots = slots;
        if let Some(memory) = &self.memory {
            let len = self.room * size_of::<u64>();
            // SAFETY: the memory has so many bytes, and is freed after the queue's work.
            let code = unsafe { sys::cuMemsetD8Async(memory.addr, 0, len, self.queue.handle()) };
            self.context.check("clear memory", code)?;
        }
        drop(current);
        Ok(())
    }

    unsafe fn add(&self, runs: &[Run]) -> Result<(), DeviceError> {
        if runs.iter().any(|run| run.slot as usize >= self.slots || run.row == 0) {
            return Err(DeviceError::OutOfBounds);
        }
        let mut waiting = self.lock();
        waiting.extend_from_slice(runs);
        if waiting.iter().map(|run| u64::from(run.words)).sum::<u64>() < WORTH_A_LAUNCH {
            return Ok(());
        }
        let runs = std::mem::take(&mut *waiting);
        drop(waiting);
        // SAFETY: the caller's word, and that of whoever added the others.
        unsafe { self.launch(&runs) }
    }

    fn take(&self) -> Result<Vec<u64>, DeviceError> {
        let runs = std::mem::take(&mut *self.lock());
        let mut sums = vec![0u64; self.slots];
        if !runs.is_empty() {
            // SAFETY: the word of whoever added them.
            unsafe { self.launch(&runs)? };
        }
        if let (Some(memory), false) = (&self.memory, sums.is_empty()) {
            let _current = self.context.enter()?;
            let (to, len) = (sums.as_mut_ptr().cast(), size_of_val(sums.as_slice()));
            // SAFETY: the memory has as many slots; the driver writes `len` bytes of numbers, and is waited for below.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to, memory.addr, len, self.queue.handle()) };
            let copied = self.context.check("copy checksums to the host", code);
            self.queue.synchronize().and(copied)?;
        }
        Ok(sums)
    }

    fn stop(&self) {
        self.lock().clear();
        // After an error of the device nothing more is read.
        let _ = self.queue.synchronize();
    }
}

impl Drop for CudaSums {
    fn drop(&mut self) {
        self.stop();
    }
}
