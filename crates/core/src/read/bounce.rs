//! Small buffers that direct reads go through on their way to large memory.
//!
//! A virtual disk whose host copies every byte is slower into memory that its processor's cache does not hold
//! (`docs/benchmarks.md`, "Disk"), and a cache of checkpoints is such memory. So its chunks are read a step at a time
//! into buffers that are used again and again, the last one first, and copied from there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SendError;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{mem, thread};

use super::depth::{Depth, MOST_READS};
use super::transfer::Transfer;
use super::{Faults, Sink, inject};
use crate::checkpoint::DataFile;
use crate::error::Result;
use crate::format::PAGE_BYTES;
use crate::pool::{BufferPool, HostBuffer, copy_past_caches};

/// Bytes of a buffer, and of a read; few in tests, whose pieces then take several.
const STEP_LEN: usize = if cfg!(test) { 16 << 10 } else { 1 << 20 };
/// Buffers: for all reads, and as many that are copied from. Only those that are needed get memory.
const BUFFERS: usize = 2 * MOST_READS;
/// A lane that waits for its turn looks so often whether its load was stopped.
const LOOK: Duration = Duration::from_millis(20);

/// The buffers, and as many reads as the disk wants, for all loads of a cache.
#[derive(Debug)]
pub(crate) struct Bounce {
    depth: Depth,
    pool: BufferPool,
    tickets: AtomicU64,
}

impl Bounce {
    pub(crate) fn new() -> Result<Arc<Bounce>> {
        let pool = BufferPool::new(STEP_LEN, BUFFERS, STEP_LEN, None)?;
        Ok(Arc::new(Bounce { depth: Depth::default(), pool, tickets: AtomicU64::new(0) }))
    }

    /// Reads what a transfer wants past the page cache to its places in `memory`; `false` where the rest is to be read
    /// otherwise. Of those that wait for their turn, whoever began first reads first, so that its chunk can be copied on
    /// while others are read.
    ///
    /// A thread beside it copies: this one reads on meanwhile, and the disk waits neither for it nor until a lane that slept
    /// has woken up.
    pub(crate) fn fill(
        &self,
        file: &DataFile,
        transfer: &mut Transfer,
        memory: &mut [u8],
        faults: Option<&Faults>,
        sink: &dyn Sink,
    ) -> Result<bool> {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        thread::scope(|scope| {
            let (filled, arrivals) = mpsc::channel();
            // Where no thread can be had there is no receiver either, and what is sent comes back.
            let _ = thread::Builder::new().name("sllm-copy".into()).spawn_scoped(scope, || {
                arrivals.into_iter().for_each(copy);
            });
            let mut rest = memory;
            loop {
                let request = transfer.request();
                if !request.direct {
                    return Ok(false);
                }
                while !self.depth.enter(ticket, LOOK) {
                    sink.check()?;
                }
                let len = request.len.min(STEP_LEN);
                let mut buffer = self.pool.try_acquire();
                // Where all buffers are copied from it reads to its place.
                let room = buffer.as_mut().map_or(&mut rest[..len], |buffer| &mut buffer.as_mut_slice()[..len]);
                let answer = rustix::io::pread(file.descriptor(true), room, request.offset);
                self.depth.leave(*answer.as_ref().unwrap_or(&0) as u64);
                let answer = inject(faults, file, request.offset, answer);
                if let Ok(got) = answer {
                    // The next request begins with the page that this one stopped in.
                    let whole = got / PAGE_BYTES * PAGE_BYTES;
                    let (place, others) = mem::take(&mut rest).split_at_mut(whole);
                    rest = others;
                    if let Some(buffer) = buffer {
                        rest[..got - whole].copy_from_slice(&buffer.as_slice()[whole..got]);
                        filled.send((buffer, place)).unwrap_or_else(|SendError(arrival)| copy(arrival));
                    }
                }
                if transfer.answer(file, answer)? {
                    return Ok(true);
                }
                sink.check()?;
            }
        })
    }
}

/// Copies what was read to its place.
fn copy((buffer, place): (HostBuffer, &mut [u8])) {
    copy_past_caches(place, &buffer.as_slice()[..place.len()]);
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::error::Error;
    use crate::plan::Piece;
    use crate::read::{Fault, Filled, Room};

    /// A load that goes on, or was stopped.
    struct Load {
        goes_on: bool,
    }

    impl Sink for Load {
        fn room(&mut self, _piece: &Piece) -> Result<Room> {
            Err(Error::Cancelled)
        }
        fn has_room(&mut self) -> bool {
            false
        }
        fn filled(&mut self, _piece: &Piece, _filled: Filled) -> Result<()> {
            Err(Error::Cancelled)
        }
        fn check(&self) -> Result<()> {
            if self.goes_on { Ok(()) } else { Err(Error::Cancelled) }
        }
        fn note(&self, _note: String) {}
    }

    const GOING: Load = Load { goes_on: true };

    /// Reads `memory.len()` bytes at `offset` of a file of 8 KiB, by a load that may be stopped.
    fn fill(bounce: &Bounce, offset: u64, memory: &mut [u8], faults: Option<&Faults>, sink: &dyn Sink) -> Result<bool> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [[7; 4096], [8; 4096]].concat()).unwrap();
        let file = DataFile::open(&path, "f", true).unwrap();
        let addr = memory.as_ptr().addr();
        let mut transfer = Transfer::new(offset, memory.len(), file.direct().is_ok(), addr, memory.len());
        bounce.fill(&file, &mut transfer, memory, faults, sink)
    }

    /// Memory of whole pages.
    fn pages(count: usize) -> HostBuffer {
        BufferPool::new(count * 4096, 1, count * 4096, None).unwrap().try_acquire().unwrap()
    }

    #[test]
    fn bytes_come_to_their_places_also_after_short_reads_and_where_all_buffers_are_in_use() {
        let bounce = Bounce::new().unwrap();
        let (mut memory, expected) = (pages(2), [[7; 4096], [8; 4096]].concat());
        // Half a page, then the rest of it, and so on.
        let short: Faults = Arc::new(|_, offset, _| offset.is_multiple_of(4096).then_some(Fault::Short(4096 + 2048)));
        for faults in [None, Some(&short)] {
            for held in [0, BUFFERS] {
                let _held: Vec<_> = (0..held).map(|_| bounce.pool.try_acquire().unwrap()).collect();
                memory.as_mut_slice().fill(0);
                assert!(fill(&bounce, 0, memory.as_mut_slice(), faults, &GOING).unwrap());
                assert!(memory.as_slice() == expected, "{held} buffers are held");
            }
        }
    }

    #[test]
    fn errors_give_the_turn_back_and_who_waits_is_stopped() {
        let bounce = Bounce::new().unwrap();
        let mut memory = pages(2);
        let broken: Faults = Arc::new(|_, _, _| Some(Fault::Errno(Errno::IO)));
        for _ in 0..2 * MOST_READS {
            fill(&bounce, 0, memory.as_mut_slice(), Some(&broken), &GOING).unwrap_err();
        }
        assert!(fill(&bounce, 0, memory.as_mut_slice(), None, &GOING).unwrap());

        let unsupported: Faults = Arc::new(|_, _, _| Some(Fault::Errno(Errno::INVAL)));
        assert!(
            !fill(&bounce, 0, memory.as_mut_slice(), Some(&unsupported), &GOING).unwrap(),
            "by the page cache, then"
        );

        while bounce.depth.enter(bounce.tickets.fetch_add(1, Ordering::Relaxed), Duration::ZERO) {}
        let stopped = fill(&bounce, 0, memory.as_mut_slice(), None, &Load { goes_on: false });
        assert!(matches!(stopped, Err(Error::Cancelled)));
    }
}
