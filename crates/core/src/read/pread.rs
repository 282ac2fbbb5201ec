//! Reading by `pread`, one piece at a time a lane.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::bounce::Bounce;
use super::depth::Depth;
use super::transfer::Transfer;
use super::{Faults, Filled, Queue, ReadEngine, Sink, inject, reads_direct};
use crate::checkpoint::DataFile;
use crate::error::Result;
use crate::plan::Piece;

/// A lane that waits for its turn looks so often whether it was stopped.
const TURN: Duration = Duration::from_millis(20);

/// The portable engine, and the oracle of the others.
pub(crate) struct Pread {
    /// Whether to pass the page cache.
    pub(crate) direct: bool,
    pub(crate) pace: Pace,
    pub(crate) faults: Option<Faults>,
}

/// How many reads there are at once.
pub(crate) enum Pace {
    /// One a lane.
    Free,
    /// As many as a disk wants, each lane's into buffers of its own.
    Turns(Turns),
    /// As many as a disk wants, through small buffers.
    Bounce(Arc<Bounce>),
}

/// The lanes that read at once: the first ones, as many as a disk wants. The others wait.
pub(crate) struct Turns {
    depth: Arc<Depth>,
    lanes: AtomicUsize,
    /// Nothing is left to read.
    over: AtomicBool,
}

impl Turns {
    pub(crate) fn new(depth: Arc<Depth>) -> Turns {
        Turns { depth, lanes: AtomicUsize::new(0), over: AtomicBool::new(false) }
    }
}

impl ReadEngine for Pread {
    fn run(&self, files: &[DataFile], queue: &Queue<'_>, sink: &mut dyn Sink) -> Result<()> {
        let Pace::Turns(Turns { depth, lanes, over }) = &self.pace else {
            while let Some(piece) = queue.next() {
                self.read(files, piece, sink)?;
            }
            return Ok(());
        };
        let number = lanes.fetch_add(1, Ordering::Relaxed);
        while !over.load(Ordering::Relaxed) {
            sink.check()?;
            if depth.wait(number, TURN, over) {
                let Some(piece) = queue.next() else {
                    depth.end(over);
                    break;
                };
                self.read(files, piece, sink)?;
                depth.done(piece.len);
            }
        }
        Ok(())
    }
}

impl Pread {
    /// Reads one piece.
    pub(super) fn read(&self, files: &[DataFile], piece: &Piece, sink: &mut dyn Sink) -> Result<()> {
        let mut room = sink.room(piece)?;
        self.fill(&files[piece.file], room.buffer.as_mut_slice(), room.offset, room.len, sink)?;
        sink.filled(piece, Filled::Buffer(room.buffer))
    }

    fn fill(&self, file: &DataFile, buf: &mut [u8], offset: u64, len: usize, sink: &mut dyn Sink) -> Result<()> {
        let direct = reads_direct(self.direct, file, sink);
        let mut transfer = Transfer::new(offset, len, direct, buf.as_ptr().addr(), buf.len());
        let mut ticket = None;
        loop {
            let mut request = transfer.request();
            if !request.direct {
                request.len = request.len.min(sink.step());
            }
            let answer = match &self.pace {
                Pace::Bounce(bounce) if request.direct => {
                    let ticket = *ticket.get_or_insert_with(|| bounce.ticket());
                    bounce.read(ticket, file, request, buf, sink)?
                }
                _ => {
                    let room = &mut buf[request.at..request.at + request.len];
                    rustix::io::pread(file.descriptor(request.direct), room, request.offset)
                }
            };
            let answer = inject(self.faults.as_ref(), file, request.offset, answer);
            if transfer.answer(file, answer)? {
                return Ok(());
            }
            sink.check()?;
            // A direct read may bring bytes again that were there already.
            if !request.direct {
                sink.arrived(&buf[..transfer.done()]);
            }
        }
    }
}
