//! Filling host memory from file ranges.
//!
//! A [`ReadEngine`] is run by one thread, called a lane, until the queue is empty. It asks the lane's [`Sink`] for
//! room, fills it, and hands it over; the sink verifies and copies. Three engines: `uring` (io_uring, many reads in
//! flight a thread), `pread` (one read at a time a thread), and `mapped` (the page cache's own pages, copied in
//! place). All treat short reads, interruptions and cut files alike, in [`transfer`].

pub(crate) mod bounce;
mod cached;
pub(crate) mod choose;
pub(crate) mod depth;
mod mapped;
mod pread;
pub(crate) mod rates;
pub(crate) mod residency;
mod transfer;
mod uring;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) use cached::Cached;
pub use mapped::WINDOW;
pub(crate) use mapped::{Mapped, MappedRange};
pub(crate) use pread::Pread;
pub(crate) use uring::Uring;

use crate::cache::CachedChunk;
use crate::checkpoint::DataFile;
use crate::device::Source;
use crate::error::{Error, Result};
use crate::plan::Piece;
use crate::pool::HostBuffer;

/// Which engine reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum EngineChoice {
    /// What the page cache, the processors and the system allow.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// Threads that read one piece at a time.
    Pread,
    /// Pages of the page cache, copied in place.
    Mapped,
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineChoice::Auto => "auto",
            EngineChoice::Uring => "uring",
            EngineChoice::Pread => "pread",
            EngineChoice::Mapped => "mapped",
        })
    }
}

impl FromStr for EngineChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(EngineChoice::Auto),
            "uring" => Ok(EngineChoice::Uring),
            "pread" => Ok(EngineChoice::Pread),
            "mapped" => Ok(EngineChoice::Mapped),
            _ => Err(Error::Invalid(format!("{name:?} is not an engine: give auto, uring, pread or mapped"))),
        }
    }
}

/// Pieces to be read, taken by several lanes.
#[derive(Debug)]
pub(crate) struct Queue<'a> {
    pieces: &'a [&'a Piece],
    next: AtomicUsize,
}

impl<'a> Queue<'a> {
    pub(crate) fn new(pieces: &'a [&'a Piece]) -> Self {
        Queue { pieces, next: AtomicUsize::new(0) }
    }

    /// The next piece, for this lane alone.
    pub(crate) fn next(&self) -> Option<&'a Piece> {
        // The counter passes the end by at most one a lane.
        self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)).copied()
    }

    /// The next pieces of one kind, for this lane alone.
    pub(crate) fn next_run<K: PartialEq>(&self, kind: impl Fn(&Piece) -> K) -> Option<&[&'a Piece]> {
        let mut start = self.next.load(Ordering::Relaxed);
        loop {
            let rest = self.pieces.get(start..).filter(|rest| !rest.is_empty())?;
            let count = rest.iter().take_while(|piece| kind(piece) == kind(rest[0])).count();
            match self.next.compare_exchange_weak(start, start + count, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(&rest[..count]),
                Err(now) => start = now,
            }
        }
    }
}

/// Room for a piece: the engine fills the first `len` bytes of `buffer` from `offset` of the file.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) buffer: HostBuffer,
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

/// A piece's bytes.
#[derive(Debug)]
pub(crate) enum Filled {
    /// In a buffer.
    Buffer(HostBuffer),
    /// In mapped pages of its file.
    Mapped(MappedRange),
    /// In the cache.
    Cached(CachedChunk),
}

impl Filled {
    pub(crate) fn len(&self) -> usize {
        match self {
            Filled::Buffer(buffer) => buffer.as_slice().len(),
            Filled::Mapped(range) => range.len(),
            Filled::Cached(chunk) => chunk.bytes().len(),
        }
    }

    /// Whether it is a buffer whose memory is pinned.
    pub(crate) fn is_pinned(&self) -> bool {
        match self {
            Filled::Buffer(buffer) => buffer.is_pinned(),
            Filled::Mapped(_) => false,
            Filled::Cached(chunk) => chunk.is_pinned(),
        }
    }

    /// The address of a byte. `offset` is at most `len`.
    pub(crate) fn at(&self, offset: usize, is_pinned: bool) -> Source {
        let offset = offset.min(self.len());
        let bytes = match self {
            Filled::Mapped(range) => return Source::FilePages(range.ptr().wrapping_add(offset)),
            Filled::Buffer(buffer) => buffer.as_slice(),
            Filled::Cached(chunk) => chunk.bytes(),
        };
        let address = bytes[offset..].as_ptr();
        if is_pinned { Source::Pinned(address) } else { Source::Buffer(address) }
    }
}

/// What a lane does with filled pieces.
pub(crate) trait Sink {
    /// Room for a piece. Waits for the lane's oldest copy when all its buffers are in use; an error when the load
    /// was stopped.
    fn room(&mut self, piece: &Piece) -> Result<Room>;
    /// Whether `room` would not wait.
    fn has_room(&mut self) -> bool;
    /// The piece's chunk in the cache; `None` where it is not there: then the caller reads it. Waits for another load
    /// that reads it just now.
    fn cached(&mut self, _piece: &Piece) -> Result<Option<CachedChunk>> {
        Ok(None)
    }
    /// Bytes after which the sink wants to see what has come (`arrived`), for engines that read a piece in order.
    fn step(&self) -> usize {
        usize::MAX
    }
    /// Says how many buffers the engine needs by now. One that was used is in the processor's cache, so that a further one
    /// is worse than waiting for a copy.
    fn need(&mut self, _buffers: usize) {}
    /// Sees the beginning of the piece that `room` was asked for last, while it is in the processor's cache.
    fn arrived(&mut self, _beginning: &[u8]) {}
    /// Takes a filled piece: verifies it, issues its copies.
    fn filled(&mut self, piece: &Piece, filled: Filled) -> Result<()>;
    /// An error when the load was stopped.
    fn check(&self) -> Result<()>;
    /// Something that the report should say.
    fn note(&self, note: String);
}

/// A way to read.
pub(crate) trait ReadEngine: Send + Sync {
    /// Reads pieces of the queue until it is empty. One thread's work.
    fn run(&self, files: &[DataFile], queue: &Queue<'_>, sink: &mut dyn Sink) -> Result<()>;
}

/// Whether a file is to be read past the page cache: where that is wanted and not refused. A refusal is noted.
fn reads_direct(wanted: bool, file: &DataFile, sink: &dyn Sink) -> bool {
    let refusal = if wanted { file.direct().err() } else { None };
    if let Some(errno) = refusal {
        sink.note(format!("{} cannot be read directly ({errno}); read by the page cache", file.name()));
    }
    wanted && refusal.is_none()
}

/// A fault that a test puts in place of what the system answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum Fault {
    /// Only so many bytes came.
    Short(usize),
    /// The call failed.
    Errno(rustix::io::Errno),
}

/// Decides, for every result of the system, whether a fault takes its place.
pub(crate) type Faults = Arc<dyn Fn(&DataFile, u64, usize) -> Option<Fault> + Send + Sync>;

/// The result that the engine sees.
fn inject(
    faults: Option<&Faults>,
    file: &DataFile,
    offset: u64,
    result: Result<usize, rustix::io::Errno>,
) -> Result<usize, rustix::io::Errno> {
    let Some(fault) = faults.and_then(|faults| faults(file, offset, result.unwrap_or(0))) else { return result };
    match fault {
        Fault::Short(n) => result.map(|got| got.min(n)),
        Fault::Errno(errno) => Err(errno),
    }
}

#[cfg(test)]
mod conformance;
