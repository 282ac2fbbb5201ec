//! Small buffers that direct reads go through on their way to large memory.
//!
//! A virtual disk whose host copies every byte is slower into memory that its processor's cache does not hold
//! (`docs/benchmarks.md`, "Disk"), and a cache of checkpoints is such memory. So its chunks are read a step at a time
//! into buffers that are used again and again, the last one first, and copied from there.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::Sink;
use super::depth::{Depth, MOST_READS};
use super::transfer::Request;
use crate::checkpoint::DataFile;
use crate::error::Result;
use crate::pool::BufferPool;

/// Bytes of a buffer, and of a read; few in tests, whose pieces then take several.
const STEP_LEN: usize = if cfg!(test) { 16 << 10 } else { 1 << 20 };
/// Buffers: for all reads, and as many that are copied from. Only those that are needed get memory.
const BUFFERS: usize = 2 * MOST_READS;
/// A lane that waits for its turn looks so often whether its load was stopped.
const LOOK: Duration = Duration::from_millis(20);

/// The buffers, and as many reads of each disk as it wants, for all loads of a cache.
#[derive(Debug)]
pub(crate) struct Bounce {
    /// By the number of the file system: whoever waits for a slow disk holds up no other.
    depths: Mutex<HashMap<u64, Arc<Depth>>>,
    pool: BufferPool,
    tickets: AtomicU64,
}

impl Bounce {
    pub(crate) fn new() -> Result<Arc<Bounce>> {
        let pool = BufferPool::new(STEP_LEN, BUFFERS, STEP_LEN, None)?;
        Ok(Arc::new(Bounce { depths: Mutex::default(), pool, tickets: AtomicU64::new(0) }))
    }

    /// A ticket for a chunk: of those that wait, the chunk that was begun first is read first, so that it can be copied
    /// on while others are read.
    pub(crate) fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::Relaxed)
    }

    /// Reads a step of a request into its place in `memory`, when it is the ticket's turn. The outer error says that the
    /// load was stopped.
    pub(crate) fn read(
        &self,
        ticket: u64,
        file: &DataFile,
        request: Request,
        memory: &mut [u8],
        sink: &dyn Sink,
    ) -> Result<Result<usize, Errno>> {
        let len = request.len.min(STEP_LEN);
        let place = &mut memory[request.at..request.at + len];
        let depth = self.depth(file);
        while !depth.enter(ticket, LOOK) {
            sink.check()?;
        }
        let mut buffer = self.pool.try_acquire();
        // So many lanes that all buffers are copied from: this one reads to its place.
        let room = buffer.as_mut().map_or(&mut *place, |buffer| &mut buffer.as_mut_slice()[..len]);
        let answer = rustix::io::pread(file.descriptor(request.direct), room, request.offset);
        depth.leave(*answer.as_ref().unwrap_or(&0) as u64);
        if let (Some(buffer), Ok(got)) = (&buffer, answer) {
            place[..got].copy_from_slice(&buffer.as_slice()[..got]);
        }
        Ok(answer)
    }

    fn depth(&self, file: &DataFile) -> Arc<Depth> {
        let (device, _) = file.inode();
        let mut depths = self.depths.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(depths.entry(device).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::plan::Piece;
    use crate::read::{Filled, Room};

    /// A load that was stopped: who waits is told.
    struct Stopped;

    impl Sink for Stopped {
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
            Err(Error::Cancelled)
        }
        fn note(&self, _note: String) {}
    }

    #[test]
    fn errors_give_the_turn_back_and_who_waits_is_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [7; 8192]).unwrap();
        let file = DataFile::open(&path, "f", true).unwrap();
        let bounce = Bounce::new().unwrap();
        let mut memory = [0; 8192];
        let mut read = |offset: u64| {
            let request = Request { offset, at: 4096, len: 4096, direct: false };
            bounce.read(bounce.ticket(), &file, request, &mut memory, &Stopped)
        };
        for _ in 0..2 * MOST_READS {
            assert_eq!(read(u64::MAX).unwrap(), Err(Errno::INVAL), "no such place");
        }
        assert_eq!(read(4096).unwrap(), Ok(4096));
        assert_eq!(memory[..4096], [0; 4096]);
        assert_eq!(memory[4096..], [7; 4096]);

        while bounce.depth(&file).enter(bounce.ticket(), Duration::ZERO) {}
        let request = Request { offset: 0, at: 0, len: 4096, direct: false };
        let stopped = bounce.read(bounce.ticket(), &file, request, &mut memory, &Stopped);
        assert!(matches!(stopped, Err(Error::Cancelled)));

        // Another disk does not wait for this one.
        let elsewhere = std::path::Path::new("/dev/shm");
        let Ok(other_dir) = tempfile::tempdir_in(elsewhere) else { return };
        let other = other_dir.path().join("f");
        std::fs::write(&other, [8; 4096]).unwrap();
        let other = DataFile::open(&other, "f", true).unwrap();
        if other.inode().0 != file.inode().0 {
            assert_eq!(bounce.read(bounce.ticket(), &other, request, &mut memory, &Stopped).unwrap(), Ok(4096));
            assert_eq!(memory[..4096], [8; 4096]);
        }
    }

    #[test]
    fn where_all_buffers_are_in_use_bytes_are_read_to_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [9; 4096]).unwrap();
        let file = DataFile::open(&path, "f", true).unwrap();
        let bounce = Bounce::new().unwrap();
        let _held: Vec<_> = std::iter::from_fn(|| bounce.pool.try_acquire()).collect();
        let mut memory = [0; 4096];
        let request = Request { offset: 0, at: 0, len: 4096, direct: false };
        assert_eq!(bounce.read(0, &file, request, &mut memory, &Stopped).unwrap(), Ok(4096));
        assert_eq!(memory, [9; 4096]);
    }
}
