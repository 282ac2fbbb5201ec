//! Reading by io_uring: many reads in flight from one thread.
//!
//! The ring is told of files and pool buffers when they are first used ([`Registered`]), so that the kernel need not
//! look up a buffer's pages and the file again at each read. Where that is refused, reads go on without it. Parts of a
//! destination are used once and are somebody else's memory: they are never registered.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use super::depth::Depth;
use super::pread::Pace;
use super::transfer::Transfer;
use super::{Faults, Filled, Pread, Queue, ReadEngine, Room, Sink, inject, reads_direct};
use crate::checkpoint::DataFile;
use crate::error::{Error, Result};
use crate::plan::Piece;
use crate::pool::{HostBuffer, Keep};

/// Refused submissions in a row that are taken before the load is given up.
const MAX_REFUSALS: u32 = 100_000;
/// io_uring_enter: wait for answers.
const ENTER_GETEVENTS: u32 = 1;

/// The engine for disks: a lane keeps `depth` reads in flight.
pub(crate) struct Uring {
    /// Whether to pass the page cache.
    pub(crate) direct: bool,
    /// Reads in flight a lane at most.
    pub(crate) depth: usize,
    /// How many reads all lanes have in flight; as many as fit where it is not given.
    pub(crate) governed: Option<Governed>,
    /// A lane whose ring is refused, such as for want of descriptors, reads by `pread`.
    pub(crate) or_pread: bool,
    pub(crate) faults: Option<Faults>,
    /// What a test puts in place of the system's answer to registering.
    pub(crate) unregistered: Option<Errno>,
    /// Rings that lanes may still open, where a test says so.
    pub(crate) rings: Option<Arc<AtomicUsize>>,
}

/// Lanes that have so many reads in flight together as a disk wants.
pub(crate) struct Governed {
    depth: Arc<Depth>,
    /// Lanes that have begun.
    lanes: AtomicUsize,
}

impl Governed {
    pub(crate) fn new(depth: Arc<Depth>) -> Governed {
        Governed { depth, lanes: AtomicUsize::new(0) }
    }

    /// Reads that each lane may have in flight.
    fn reads(&self) -> usize {
        self.depth.reads().div_ceil(self.lanes.load(Ordering::Relaxed).max(1))
    }
}

/// One read in flight. Its buffer is the kernel's until the answer is there.
struct Flight<'a> {
    piece: &'a Piece,
    room: Room,
    transfer: Transfer,
}

/// Reads in flight, and the ring they are in. Dropping it waits for them: the kernel writes to their buffers.
struct InFlight<'a> {
    ring: IoUring,
    /// Dropped after the ring: see [`Registered`].
    registered: Registered,
    slots: Vec<Option<Flight<'a>>>,
    free: Vec<usize>,
}

/// What the ring was told of beforehand, by place in its two tables.
///
/// A registration is of pages, found by address once. It must not outlive the mapping at that address: a later mapping
/// at the same place would be read into the pages of the old one. So each entry keeps its pool's mapping until the ring
/// is gone. Nothing else needs it to end earlier: it gives the kernel no right to write, only a read that was started
/// does, and until its answer the buffer is in its slot. A buffer that was given back may come to another lane, whose
/// ring registers it too, or be copied from and filled again; its pages stay the same, since a pool's mapping is never
/// discarded, remapped or protected while it lives. Files are held by the ring itself.
struct Registered {
    /// Address, length and mapping of each buffer in the table.
    buffers: Vec<(usize, usize, Keep)>,
    /// Places of the buffer table; 0 before it is made.
    room: usize,
    /// The places `2 * file + direct` of the file table that are filled; empty before it is made.
    files: Vec<bool>,
    /// Why nothing more is registered.
    refused: Option<Errno>,
}

/// A ring, or why the system has none for us.
fn open_ring(depth: usize) -> Result<IoUring> {
    let entries = u32::try_from(depth.clamp(1, 1024)).unwrap_or(1024).next_power_of_two();
    // One thread submits and reaps; the kernel then need not interrupt it. Kernels before 6.1 do not know the flags.
    let ring = match IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().build(entries),
        answer => answer,
    };
    ring.map_err(refused)
}

fn refused(e: io::Error) -> Error {
    Error::Engine { engine: "uring", reason: format!("io_uring is refused: {e}") }
}

impl Uring {
    /// Whether a ring can be had here.
    pub(crate) fn probe() -> Result<()> {
        open_ring(1).map(drop)
    }

    /// A lane's ring.
    fn open(&self) -> Result<IoUring> {
        let take =
            |left: &AtomicUsize| left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        match self.rings.as_deref().map(take) {
            Some(Err(_)) => Err(refused(Errno::MFILE.into())),
            _ => open_ring(self.depth),
        }
    }
}

impl ReadEngine for Uring {
    fn run(&self, files: &[DataFile], queue: &Queue<'_>, sink: &mut dyn Sink) -> Result<()> {
        let ring = match self.open() {
            Err(e) if self.or_pread => {
                sink.note(format!("a reader thread reads by pread: {e}"));
                let pread = Pread { direct: self.direct, pace: Pace::Free, faults: self.faults.clone() };
                return pread.run(files, queue, sink);
            }
            ring => ring?,
        };
        let (slots, free) = ((0..self.depth).map(|_| None).collect(), (0..self.depth).rev().collect());
        let refused = self.unregistered;
        let registered = Registered { buffers: Vec::new(), room: 0, files: Vec::new(), refused };
        let mut flights = InFlight { ring, registered, slots, free };
        let mut queue_empty = false;
        if let Some(governed) = &self.governed {
            governed.lanes.fetch_add(1, Ordering::Relaxed);
        }
        loop {
            let most = self.governed.as_ref().map_or(self.depth, Governed::reads);
            if self.governed.is_some() {
                sink.need(most + 1);
            }
            while !queue_empty && flights.len() < most.min(self.depth) && (flights.is_empty() || sink.has_room()) {
                let Some(piece) = queue.next() else {
                    queue_empty = true;
                    break;
                };
                let mut room = sink.room(piece)?;
                let file = &files[piece.file];
                let direct = reads_direct(self.direct, file, sink);
                let buffer = room.buffer.as_mut_slice();
                let transfer = Transfer::new(room.offset, room.len, direct, buffer.as_ptr().addr(), buffer.len());
                flights.start(files, Flight { piece, room, transfer })?;
            }
            if flights.is_empty() {
                return Ok(());
            }
            if let Some(errno) = flights.registered.refused {
                sink.note(format!("io_uring reads without registered buffers or files: {errno}"));
            }
            flights.wait().map_err(|e| Error::io("wait for io_uring", files[0].path())(e))?;
            while let Some((slot, answer)) = flights.reap() {
                let Some(mut flight) = flights.take(slot) else { continue };
                let file = &files[flight.piece.file];
                let offset = flight.transfer.request().offset;
                let answer = inject(self.faults.as_ref(), file, offset, answer);
                if flight.transfer.answer(file, answer)? {
                    if let Some(governed) = &self.governed {
                        governed.depth.done(flight.piece.len);
                    }
                    sink.filled(flight.piece, Filled::Buffer(flight.room.buffer))?;
                } else {
                    flights.start(files, flight)?;
                }
            }
            sink.check()?;
        }
    }
}

impl Registered {
    /// The place of a file in the ring's table of `room` files, registered now if it is not; `None` where it cannot be.
    fn file(&mut self, ring: &IoUring, room: usize, place: usize, fd: RawFd) -> Option<u32> {
        let at = u32::try_from(place).ok()?;
        if self.files.is_empty() {
            let made = |room| ring.submitter().register_files_sparse(room);
            self.attempt(|| made(u32::try_from(room).map_err(io::Error::other)?))?;
            self.files = vec![false; room];
        }
        if !*self.files.get(place)? {
            self.attempt(|| ring.submitter().register_files_update(at, &[fd]).map(drop))?;
            self.files[place] = true;
        }
        Some(at)
    }

    /// The place of a buffer in the ring's table of `room` buffers, registered now if it is not; `None` where it cannot
    /// be.
    fn buffer(&mut self, ring: &IoUring, room: usize, buffer: &mut HostBuffer) -> Option<u16> {
        let keep = buffer.keep()?;
        let memory = buffer.as_mut_slice();
        let (addr, len) = (memory.as_ptr().addr(), memory.len());
        if let Some(place) = self.buffers.iter().position(|&(a, l, _)| (a, l) == (addr, len)) {
            return u16::try_from(place).ok();
        }
        if self.room == 0 {
            let made = |room| ring.submitter().register_buffers_sparse(room);
            self.attempt(|| made(u32::try_from(room).map_err(io::Error::other)?))?;
            self.room = room;
        }
        // A lane has a few more buffers than reads in flight. Any further one is read into by its address.
        let place = u16::try_from(self.buffers.len()).ok().filter(|&place| usize::from(place) < self.room)?;
        let vector = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: len };
        // SAFETY: the range is the buffer's, mapped and writable; `keep` holds the mapping until after the ring, which
        // is dropped before `self`.
        let told = || unsafe { ring.submitter().register_buffers_update(u32::from(place), &[vector], None) };
        self.attempt(told)?;
        self.buffers.push((addr, len, keep));
        Some(place)
    }

    /// Asks the system once; what it refuses (an old kernel, the limit of locked memory, a range over 1 GiB) is not
    /// asked for again.
    fn attempt(&mut self, ask: impl FnOnce() -> io::Result<()>) -> Option<()> {
        if self.refused.is_some() {
            return None;
        }
        let answer = ask();
        self.refused = answer.err().map(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL));
        self.refused.is_none().then_some(())
    }
}

impl<'a> InFlight<'a> {
    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Submits the next request of a flight.
    fn start(&mut self, files: &[DataFile], mut flight: Flight<'a>) -> Result<()> {
        let request = flight.transfer.request();
        let file = flight.piece.file;
        let fd = files[file].descriptor(request.direct).as_raw_fd();
        let table_file = self.registered.file(&self.ring, 2 * files.len(), 2 * file + usize::from(request.direct), fd);
        let table_buffer = self.registered.buffer(&self.ring, 2 * self.slots.len(), &mut flight.room.buffer);
        let room = &mut flight.room.buffer.as_mut_slice()[request.at..request.at + request.len];
        let len = u32::try_from(room.len()).map_err(|_| Error::Invalid("a piece is longer than 4 GiB".into()))?;
        // A ring has at least as many entries as there are slots, and every slot's answer is reaped before its next.
        let slot = self.free.pop().ok_or_else(|| Error::Invalid("more reads than slots".into()))?;
        let (to, at) = (room.as_mut_ptr(), request.offset);
        let entry = match (table_file, table_buffer) {
            (Some(file), Some(n)) => opcode::ReadFixed::new(types::Fixed(file), to, len, n).offset(at).build(),
            (None, Some(n)) => opcode::ReadFixed::new(types::Fd(fd), to, len, n).offset(at).build(),
            (Some(file), None) => opcode::Read::new(types::Fixed(file), to, len).offset(at).build(),
            (None, None) => opcode::Read::new(types::Fd(fd), to, len).offset(at).build(),
        };
        let entry = entry.user_data(slot as u64);
        // The flight lies in its slot from now on, so that a drop of `self` waits for the kernel.
        self.slots[slot] = Some(flight);
        // SAFETY: descriptor and buffer stay alive until the answer: the flight is in its slot, whose buffer does not
        // move, and the files outlive the run.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.take(slot);
            return Err(Error::Invalid("the io_uring is full".into()));
        }
        Ok(())
    }

    /// Submits what was started and waits for one answer.
    fn wait(&mut self) -> io::Result<()> {
        for _ in 0..MAX_REFUSALS {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => continue,
                // The kernel is short of memory for requests: the answers to those that it has make room.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => return Err(e),
            }
            let unsent = self.ring.submission().len();
            if unsent < self.len() {
                // SAFETY: submits nothing and passes no argument; it only waits for an answer.
                match unsafe { self.ring.submitter().enter::<()>(0, 1, ENTER_GETEVENTS, None) } {
                    Err(e) if e.raw_os_error() != Some(libc::EINTR) => return Err(e),
                    _ => return Ok(()),
                }
            }
            std::thread::yield_now();
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    /// An answer that is there: the slot and the result.
    fn reap(&mut self) -> Option<(usize, Result<usize, Errno>)> {
        let entry = self.ring.completion().next()?;
        let result = entry.result();
        let answer = usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result));
        Some((usize::try_from(entry.user_data()).unwrap_or(usize::MAX), answer))
    }

    /// Takes a flight that the kernel has answered.
    fn take(&mut self, slot: usize) -> Option<Flight<'a>> {
        let flight = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(flight)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        while !self.is_empty() {
            if self.wait().is_err() {
                // The kernel may still write to these buffers: better lost than given away.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while let Some((slot, _)) = self.reap() {
                self.take(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::BufferPool;

    #[test]
    fn pool_buffers_are_registered_once_each_and_parts_of_destinations_never() {
        let ring = open_ring(4).unwrap();
        let mut registered = Registered { buffers: Vec::new(), room: 0, files: Vec::new(), refused: None };
        let pool = BufferPool::new(8192, 3, 8192, None).unwrap();
        let mut held: Vec<HostBuffer> = (0..3).map(|_| pool.try_acquire().unwrap()).collect();
        let mut place = |buffer: &mut HostBuffer| registered.buffer(&ring, 2, buffer);
        assert_eq!((place(&mut held[1]), place(&mut held[0])), (Some(0), Some(1)));
        assert_eq!((place(&mut held[1]), place(&mut held[0])), (Some(0), Some(1)));
        assert_eq!(place(&mut held[2]), None, "the table has two places");
        let block = crate::device::Block::alloc(&crate::device::Device::host(), 8192).unwrap();
        assert_eq!(registered.buffer(&ring, 2, &mut block.loan(0, 8192).unwrap()), None);
        assert_eq!((registered.buffers.len(), registered.refused), (2, None));

        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(registered.file(&ring, 4, 3, file.as_raw_fd()), Some(3));
        assert_eq!(registered.file(&ring, 4, 4, file.as_raw_fd()), None);
        assert_eq!(registered.files, [false, false, false, true]);
    }

    #[test]
    fn a_read_names_the_buffer_and_the_file_that_the_ring_knows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [7; 8192]).unwrap();
        let files = [DataFile::open(&path, "f", true).unwrap()];
        let wants = [crate::plan::Segment::contiguous(0, 0, 8192, 0, 0)];
        let plan = crate::plan::LoadPlan::build(&[8192], &[8192], &wants, &Default::default()).unwrap();
        let pool = BufferPool::new(8192, 1, 8192, None).unwrap();
        let registered = Registered { buffers: Vec::new(), room: 0, files: Vec::new(), refused: None };
        let ring = open_ring(1).unwrap();
        let mut flights = InFlight { ring, registered, slots: vec![None], free: vec![0] };
        for _ in 0..2 {
            let room = Room { buffer: pool.try_acquire().unwrap(), offset: 0, len: 8192 };
            let transfer = Transfer::new(0, 8192, false, room.buffer.as_slice().as_ptr().addr(), 8192);
            flights.start(&files, Flight { piece: &plan.pieces()[0], room, transfer }).unwrap();
            flights.wait().unwrap();
            let (slot, answer) = flights.reap().unwrap();
            assert_eq!(answer, Ok(8192));
            assert_eq!(flights.take(slot).unwrap().room.buffer.as_slice(), [7; 8192]);
            let Registered { buffers, files, refused, .. } = &flights.registered;
            assert_eq!((buffers.len(), files.as_slice(), *refused), (1, &[true, false][..], None));
        }
    }

    #[test]
    fn what_is_refused_is_not_asked_for_again() {
        let ring = open_ring(1).unwrap();
        let mut registered = Registered { buffers: Vec::new(), room: 0, files: Vec::new(), refused: None };
        assert_eq!(registered.file(&ring, 2, 0, i32::MAX), None, "there is no such descriptor");
        assert_eq!(registered.refused, Some(Errno::BADF));
        let pool = BufferPool::new(4096, 1, 4096, None).unwrap();
        assert_eq!(registered.buffer(&ring, 2, &mut pool.try_acquire().unwrap()), None);
    }
}
