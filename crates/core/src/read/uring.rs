//! Reading by io_uring: many reads in flight from one thread.

use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use super::transfer::Transfer;
use super::{Faults, Filled, Queue, ReadEngine, Room, Sink, inject, reads_direct};
use crate::checkpoint::DataFile;
use crate::error::{Error, Result};
use crate::plan::Piece;

/// Refused submissions in a row that are taken before the load is given up.
const MAX_REFUSALS: u32 = 100_000;
/// io_uring_enter: wait for answers.
const ENTER_GETEVENTS: u32 = 1;

/// The engine for disks: a lane keeps `depth` reads in flight.
pub(crate) struct Uring {
    /// Whether to pass the page cache.
    pub(crate) direct: bool,
    /// Reads in flight a lane.
    pub(crate) depth: usize,
    pub(crate) faults: Option<Faults>,
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
    slots: Vec<Option<Flight<'a>>>,
    free: Vec<usize>,
}

/// A ring, or why the system has none for us.
fn open_ring(depth: usize) -> Result<IoUring> {
    let entries = u32::try_from(depth.clamp(1, 1024)).unwrap_or(1024).next_power_of_two();
    // One thread submits and reaps; the kernel then need not interrupt it. Older kernels refuse the flags.
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(entries)
        .or_else(|_| IoUring::builder().build(entries))
        .map_err(|e| Error::Engine { engine: "uring", reason: format!("io_uring is refused: {e}") })
}

impl Uring {
    /// Whether a ring can be had here.
    pub(crate) fn probe() -> Result<()> {
        open_ring(1).map(drop)
    }
}

impl ReadEngine for Uring {
    fn run(&self, files: &[DataFile], queue: &Queue<'_>, sink: &mut dyn Sink) -> Result<()> {
        let (slots, free) = ((0..self.depth).map(|_| None).collect(), (0..self.depth).rev().collect());
        let mut flights = InFlight { ring: open_ring(self.depth)?, slots, free };
        let mut queue_empty = false;
        loop {
            while !queue_empty && !flights.free.is_empty() && (flights.is_empty() || sink.has_room()) {
                let Some(piece) = queue.next() else {
                    queue_empty = true;
                    break;
                };
                let mut room = sink.room(piece)?;
                let file = &files[piece.file];
                let direct = reads_direct(self.direct, file, sink);
                let buffer = room.buffer.as_mut_slice();
                let transfer = Transfer::new(room.offset, room.len, direct, buffer.as_ptr().addr(), buffer.len());
                flights.start(file, Flight { piece, room, transfer })?;
            }
            if flights.is_empty() {
                return Ok(());
            }
            flights.wait().map_err(|e| Error::io("wait for io_uring", files[0].path())(e))?;
            while let Some((slot, answer)) = flights.reap() {
                let Some(mut flight) = flights.take(slot) else { continue };
                let file = &files[flight.piece.file];
                let offset = flight.transfer.request().offset;
                let answer = inject(self.faults.as_ref(), file, offset, answer);
                if flight.transfer.answer(file, answer)? {
                    sink.filled(flight.piece, Filled::Buffer(flight.room.buffer))?;
                } else {
                    flights.start(file, flight)?;
                }
            }
            sink.check()?;
        }
    }
}

impl<'a> InFlight<'a> {
    fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Submits the next request of a flight.
    fn start(&mut self, file: &DataFile, mut flight: Flight<'a>) -> Result<()> {
        let request = flight.transfer.request();
        let fd = file.descriptor(request.direct).as_raw_fd();
        let room = &mut flight.room.buffer.as_mut_slice()[request.at..request.at + request.len];
        let len = u32::try_from(room.len()).map_err(|_| Error::Invalid("a piece is longer than 4 GiB".into()))?;
        // A ring has at least as many entries as there are slots, and every slot's answer is reaped before its next.
        let slot = self.free.pop().ok_or_else(|| Error::Invalid("more reads than slots".into()))?;
        let entry = opcode::Read::new(types::Fd(fd), room.as_mut_ptr(), len)
            .offset(request.offset)
            .build()
            .user_data(slot as u64);
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
    fn wait(&mut self) -> std::io::Result<()> {
        for _ in 0..MAX_REFUSALS {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => continue,
                // The kernel is short of memory for requests: the answers to those that it has make room.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => return Err(e),
            }
            let unsent = self.ring.submission().len();
            if unsent < self.slots.len() - self.free.len() {
                // SAFETY: submits nothing and passes no argument; it only waits for an answer.
                match unsafe { self.ring.submitter().enter::<()>(0, 1, ENTER_GETEVENTS, None) } {
                    Err(e) if e.raw_os_error() != Some(libc::EINTR) => return Err(e),
                    _ => return Ok(()),
                }
            }
            std::thread::yield_now();
        }
        Err(std::io::Error::from_raw_os_error(libc::EAGAIN))
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
