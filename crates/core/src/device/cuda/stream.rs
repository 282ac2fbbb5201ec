//! Queues of copies, and the events that mark their ends.

use std::ffi::c_uint;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

use super::sums::CudaSums;
use super::{Context, driver_version};
use crate::device::{BackendStream, BackendSums, DeviceError, Mark, Source, StreamCopy};

/// Largest pitch that the driver's two-dimensional copy takes, in bytes (CU_DEVICE_ATTRIBUTE_MAX_PITCH).
const MAX_PITCH: u64 = (1 << 31) - 1;
/// cuEventCreate: no timing, which makes events cheap; block instead of spinning.
const EVENT_DISABLE_TIMING: c_uint = 0x02;
const EVENT_BLOCKING_SYNC: c_uint = 0x01;
/// cuStreamCreate: does not wait for the default stream.
const STREAM_NON_BLOCKING: c_uint = 0x01;
/// The first version of the driver that has `cuMemcpyBatchAsync`.
const BATCHES_SINCE: i32 = 12_080;

/// A stream of the driver.
#[derive(Debug)]
pub(super) struct Queue {
    context: Arc<Context>,
    stream: sys::CUstream,
}

// SAFETY: the driver's stream calls may come from any thread.
unsafe impl Send for Queue {}
// SAFETY: as above, several at once.
unsafe impl Sync for Queue {}

impl Queue {
    pub(super) fn new(context: &Arc<Context>) -> Result<Queue, DeviceError> {
        let _current = context.enter()?;
        let mut stream = ptr::null_mut();
        // SAFETY: a context is current; destroyed in `drop`.
        context.check("make a stream", unsafe { sys::cuStreamCreate(&mut stream, STREAM_NON_BLOCKING) })?;
        Ok(Queue { context: Arc::clone(context), stream })
    }

    pub(super) fn handle(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes what is issued from now on wait for what another queue has to do by now. The context is current.
    pub(super) fn wait_for(&self, other: &Queue, events: &Arc<Events>) -> Result<(), DeviceError> {
        let mark = CudaMark::new(events, other)?;
        // SAFETY: both handles are live. The event may be recorded anew: this call waits for its last record.
        self.context.check("wait for a stream", unsafe { sys::cuStreamWaitEvent(self.stream, mark.event.0, 0) })
    }

    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        let _current = self.context.enter()?;
        // SAFETY: the stream is live.
        self.context.check("wait for its copies", unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: made by `new`, destroyed once.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
    }
}

#[derive(Debug)]
pub(super) struct CudaStream {
    context: Arc<Context>,
    queue: Arc<Queue>,
    events: Arc<Events>,
}

impl CudaStream {
    pub(super) fn new(context: &Arc<Context>, blocking: bool) -> Result<CudaStream, DeviceError> {
        let queue = Arc::new(Queue::new(context)?);
        let events = Events { context: Arc::clone(context), blocking, spare: Mutex::default() };
        Ok(CudaStream { context: Arc::clone(context), queue, events: Arc::new(events) })
    }

    /// Issues one copy. Its context is current.
    ///
    /// # Safety
    /// As [`BackendStream::copy`].
    unsafe fn copy_rows(&self, StreamCopy { source, dst, rows: copy }: &StreamCopy) -> Result<(), DeviceError> {
        let (src, src_device) = match *source {
            Source::Buffer(src) | Source::Pinned(src) | Source::FilePages(src) => (src, None),
            Source::Device(addr) => (ptr::null(), Some(addr)),
        };
        let fits = |n: u64| usize::try_from(n).map_err(|_| DeviceError::OutOfBounds);
        let (rows, row_len) = (fits(copy.rows)?, fits(copy.row_len)?);
        let (src_pitch, dst_pitch) = (fits(copy.src_pitch)?, fits(copy.dst_pitch)?);
        if rows > 1 && copy.src_pitch.max(copy.dst_pitch) <= MAX_PITCH {
            let rectangle = sys::CUDA_MEMCPY2D {
                srcXInBytes: 0,
                srcY: 0,
                srcMemoryType: match src_device {
                    None => sys::CUmemorytype::CU_MEMORYTYPE_HOST,
                    Some(_) => sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
                },
                srcHost: src.cast(),
                srcDevice: src_device.unwrap_or(0),
                srcArray: ptr::null_mut(),
                srcPitch: src_pitch,
                dstXInBytes: 0,
                dstY: 0,
                dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
                dstHost: ptr::null_mut(),
                dstDevice: *dst,
                dstArray: ptr::null_mut(),
                dstPitch: dst_pitch,
                WidthInBytes: row_len,
                Height: rows,
            };
            // SAFETY: all rows lie in live memory until the work is done, by the caller's word.
            let code = unsafe { sys::cuMemcpy2DAsync_v2(&rectangle, self.queue.stream) };
            return self.context.check("copy rows", code);
        }
        for row in 0..rows {
            let to = *dst + (row * dst_pitch) as u64;
            // SAFETY: as above; row `row` begins a pitch after the one before.
            let code = unsafe {
                match src_device {
                    None => sys::cuMemcpyHtoDAsync_v2(to, src.add(row * src_pitch).cast(), row_len, self.queue.stream),
                    Some(from) => {
                        sys::cuMemcpyDtoDAsync_v2(to, from + (row * src_pitch) as u64, row_len, self.queue.stream)
                    }
                }
            };
            self.context.check("copy", code)?;
        }
        Ok(())
    }

    /// Issues copies of one row each out of pinned memory, by one call. Its context is current.
    ///
    /// # Safety
    /// As [`BackendStream::copy`].
    unsafe fn copy_batch(&self, batch: &mut Batch) -> Result<(), DeviceError> {
        let Batch { dsts, srcs, lens } = batch;
        let location = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
        let mut attributes = sys::CUmemcpyAttributes {
            srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: location,
            dstLocHint: location,
            flags: 0,
        };
        let (mut first, mut failed) = (0, 0);
        // SAFETY: three arrays of one length; one attribute, which counts from the first copy on; rows lie in live memory
        // until the work is done, by the caller's word.
        let code = unsafe {
            sys::cuMemcpyBatchAsync(
                dsts.as_mut_ptr(),
                srcs.as_mut_ptr(),
                lens.as_mut_ptr(),
                lens.len(),
                &mut attributes,
                &mut first,
                1,
                &mut failed,
                self.queue.stream,
            )
        };
        self.context.check("copy a batch", code)
    }
}

/// Copies for `cuMemcpyBatchAsync`.
#[derive(Debug, Default)]
struct Batch {
    dsts: Vec<sys::CUdeviceptr>,
    srcs: Vec<sys::CUdeviceptr>,
    lens: Vec<usize>,
}

impl Batch {
    /// Takes a copy on; `false` where it is none for a batch.
    fn add(&mut self, copy: &StreamCopy) -> bool {
        let (Source::Pinned(src) | Source::FilePages(src)) = copy.source else { return false };
        let (1, Ok(len)) = (copy.rows.rows, usize::try_from(copy.rows.row_len)) else { return false };
        self.dsts.push(copy.dst);
        self.srcs.push(src.expose_provenance() as u64);
        self.lens.push(len);
        true
    }
}

impl BackendStream for CudaStream {
    unsafe fn copy(&self, copies: &[StreamCopy]) -> Result<(), DeviceError> {
        let _current = self.context.enter()?;
        let mut batch = Batch::default();
        let batches = copies.len() > 1 && driver_version() >= BATCHES_SINCE;
        for copy in copies {
            if !(batches && batch.add(copy)) {
                // SAFETY: the caller's word.
                unsafe { self.copy_rows(copy)? };
            }
        }
        // SAFETY: the caller's word.
        if batch.lens.is_empty() { Ok(()) } else { unsafe { self.copy_batch(&mut batch) } }
    }

    fn mark(&self) -> Result<Box<dyn Mark>, DeviceError> {
        let _current = self.context.enter()?;
        Ok(Box::new(CudaMark::new(&self.events, &self.queue)?))
    }

    fn sums(&self) -> Result<Option<Box<dyn BackendSums>>, DeviceError> {
        Ok(Some(Box::new(CudaSums::new(&self.context, &self.queue, &self.events)?)))
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        self.queue.synchronize()
    }
}

/// An event of the driver.
#[derive(Debug, Clone, Copy)]
struct Event(sys::CUevent);

// SAFETY: an event may be recorded and waited for in any thread.
unsafe impl Send for Event {}
// SAFETY: as above, several at once.
unsafe impl Sync for Event {}

/// A stream's events, used again and again: making one takes a lock that the copies of all threads need.
#[derive(Debug)]
pub(super) struct Events {
    context: Arc<Context>,
    /// Waiting for them blocks the thread instead of spinning.
    blocking: bool,
    spare: Mutex<Vec<Event>>,
}

impl Events {
    /// An event that nobody uses. A context is current.
    fn take(&self) -> Result<Event, DeviceError> {
        if let Some(event) = self.lock().pop() {
            return Ok(event);
        }
        let flags = EVENT_DISABLE_TIMING | if self.blocking { EVENT_BLOCKING_SYNC } else { 0 };
        let mut event = ptr::null_mut();
        // SAFETY: a context is current; destroyed when `self` is dropped.
        self.context.check("make an event", unsafe { sys::cuEventCreate(&mut event, flags) })?;
        Ok(Event(event))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            for event in self.spare.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
                // SAFETY: made by `take`, destroyed once: each mark gave its event back and keeps `self`.
                let _ = unsafe { sys::cuEventDestroy_v2(event.0) };
            }
        }
    }
}

/// An event that was recorded.
#[derive(Debug)]
struct CudaMark {
    event: Event,
    events: Arc<Events>,
}

impl CudaMark {
    /// A mark after what a queue has to do. The context is current.
    fn new(events: &Arc<Events>, queue: &Queue) -> Result<CudaMark, DeviceError> {
        let mark = CudaMark { event: events.take()?, events: Arc::clone(events) };
        // SAFETY: both handles are live.
        queue.context.check("record an event", unsafe { sys::cuEventRecord(mark.event.0, queue.stream) })?;
        Ok(mark)
    }
}

impl Mark for CudaMark {
    fn is_done(&self) -> bool {
        let Ok(_current) = self.events.context.enter() else { return true };
        // SAFETY: the event is live. An error is found by `wait`.
        unsafe { sys::cuEventQuery(self.event.0) != sys::CUresult::CUDA_ERROR_NOT_READY }
    }

    fn wait(&self) -> Result<(), DeviceError> {
        let _current = self.events.context.enter()?;
        // SAFETY: the event is live.
        self.events.context.check("finish a copy", unsafe { sys::cuEventSynchronize(self.event.0) })
    }
}

impl Drop for CudaMark {
    fn drop(&mut self) {
        // Recording it anew is allowed whatever has become of it.
        self.events.lock().push(self.event);
    }
}
