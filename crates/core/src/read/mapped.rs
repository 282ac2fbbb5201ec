//! Pages of the page cache, copied in place: no staging, no copy by the processor.
//!
//! A file is mapped in windows, each registered with the device for reading and kept until the load is over; releasing
//! them as one goes is slower, and nobody waits for it afterwards. The processor never reads the pages: a file that is
//! cut off would kill it with SIGBUS. The device reads pages that the registration holds; the host device reads through
//! the kernel.

use std::os::fd::AsFd;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::pread::Pace;
use super::{Filled, Pread, Queue, ReadEngine, Sink};
use crate::checkpoint::DataFile;
use crate::device::{Device, DeviceError};
use crate::error::{Error, Result};
use crate::plan::Piece;
use crate::releases;

/// Bytes of one window; a multiple of every piece length that is a power of two up to it.
pub const WINDOW: u64 = 128 << 20;

/// A mapped and, for a device that needs it, registered range of a file.
#[derive(Debug)]
struct Window {
    ptr: *mut u8,
    len: usize,
    /// First byte in the file.
    offset: u64,
    registered: Option<Device>,
}

// SAFETY: the mapping is read-only and belongs to this value; its address may be used from any thread.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    fn open(file: &DataFile, offset: u64, len: u64, device: &Device) -> Result<Window> {
        let now = file.current_len().map_err(Error::io("inspect", file.path()))?;
        if offset + len > now {
            return Err(Error::Truncated { path: file.path().to_owned(), offset, len, end: now });
        }
        let bytes = usize::try_from(len).map_err(|_| Error::Invalid("a window does not fit the memory".into()))?;
        let failed = |e: rustix::io::Errno| Error::io("map", file.path())(e.into());
        // SAFETY: a new mapping at an address that the system chooses touches no memory of others.
        let ptr =
            unsafe { mmap(ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, file.buffered().as_fd(), offset) }
                .map_err(failed)?;
        let mut window = Window { ptr: ptr.cast(), len: bytes, offset, registered: None };
        if device.needs_pinning() {
            // SAFETY: the window stays mapped until it is dropped, which unpins it first.
            let pin = || unsafe { device.pin(window.ptr, bytes.next_multiple_of(4096), true) };
            releases::pin_beside(pin)?;
            window.registered = Some(device.clone());
        } else {
            // SAFETY: the range is the mapping just made; the advice changes no contents.
            let _ = unsafe { madvise(ptr, bytes, Advice::WillNeed) };
        }
        Ok(window)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Some(device) = &self.registered {
            // SAFETY: pinned by `open` and still mapped.
            unsafe { device.unpin(self.ptr) };
        }
        // SAFETY: mapped by `open` with this length; every range of it holds the window, so that none is left.
        let _ = unsafe { munmap(self.ptr.cast(), self.len) };
    }
}

/// A part of a window.
#[derive(Debug)]
pub(crate) struct MappedRange {
    window: Arc<Window>,
    at: usize,
    len: usize,
}

impl MappedRange {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn ptr(&self) -> *const u8 {
        self.window.ptr.wrapping_add(self.at)
    }
}

/// The engine of the page cache's pages.
pub(crate) struct Mapped {
    device: Device,
    /// Windows stay registered until the load is over.
    windows: Mutex<Vec<Arc<Window>>>,
    /// A lane whose window is refused, such as for want of memory that may be pinned, reads by `pread`.
    or_pread: bool,
}

impl Mapped {
    /// An engine whose windows are registered with the first of these devices that needs it; that holds for all.
    pub(crate) fn new(devices: &[Device], or_pread: bool) -> Mapped {
        let device = devices.iter().find(|device| device.needs_pinning()).or(devices.first()).cloned();
        Mapped { device: device.unwrap_or_else(Device::host), windows: Mutex::default(), or_pread }
    }

    /// Maps and registers a range of a file, as loads do; an error where that cannot be.
    pub(super) fn probe(&self, file: &DataFile, offset: u64, len: u64) -> Result<()> {
        self.keep(Window::open(file, offset, len, &self.device)?);
        Ok(())
    }

    fn keep(&self, window: Window) -> Arc<Window> {
        let window = Arc::new(window);
        self.windows.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&window));
        window
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let windows = std::mem::take(self.windows.get_mut().unwrap_or_else(PoisonError::into_inner));
        if self.device.needs_pinning() && !windows.is_empty() {
            releases::release(windows, usize::MAX);
        }
    }
}

/// The window that a piece lies in.
fn window_of(piece: &Piece) -> (usize, u64) {
    (piece.file, piece.offset / WINDOW)
}

impl ReadEngine for Mapped {
    fn run(&self, files: &[DataFile], queue: &Queue<'_>, sink: &mut dyn Sink) -> Result<()> {
        while let Some(run) = queue.next_run(window_of) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            sink.check()?;
            let file = &files[first.file];
            let window = match Window::open(file, first.offset, last.offset + last.len - first.offset, &self.device) {
                Err(e) if self.or_pread && !matches!(e, Error::Truncated { .. }) => {
                    sink.note(format!("a reader thread reads by pread: {e}"));
                    let pread = Pread { direct: false, pace: Pace::Free, faults: None };
                    run.iter().try_for_each(|piece| pread.read(files, piece, sink))?;
                    return pread.run(files, queue, sink);
                }
                window => self.keep(window?),
            };
            for piece in run {
                // Both differences are below the window's length, which fits usize.
                let at = usize::try_from(piece.offset - window.offset).unwrap_or(window.len);
                let len = usize::try_from(piece.len).unwrap_or(0).min(window.len - at);
                let range = MappedRange { window: Arc::clone(&window), at, len };
                sink.filled(piece, Filled::Mapped(range)).map_err(|e| pages_gone(file, piece, e))?;
            }
        }
        Ok(())
    }
}

/// Pages that went away are a file that was cut off.
fn pages_gone(file: &DataFile, piece: &Piece, error: Error) -> Error {
    match (error, file.current_len()) {
        (Error::Device(DeviceError::PagesGone), Ok(end)) if end < piece.offset + piece.len => {
            Error::Truncated { path: file.path().to_owned(), offset: piece.offset, len: piece.len, end }
        }
        (error, _) => error,
    }
}
