//! Small buffers that direct reads go through on their way to large memory.
//!
//! A virtual disk whose host copies every byte is a third slower into memory that its processor's cache does not hold
//! (`docs/benchmarks.md`, "Disk"), and a cache of checkpoints is such memory. So its chunks are read a step at a time
//! into buffers that are used again and again, the last one first, and copied from there.

use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::Sink;
use super::depth::{Depth, MOST_READS};
use super::transfer::Request;
use crate::checkpoint::DataFile;
use crate::error::{Error, Result};
use crate::pool::{BufferPool, HostBuffer};

/// Bytes of a buffer, and of a read.
const STEP_LEN: usize = 1 << 20;
/// A lane that waits for a buffer looks so often whether its load was stopped.
const LOOK: Duration = Duration::from_millis(20);

/// Buffers for as many reads as the disk wants, shared by all loads of a cache.
#[derive(Debug)]
pub(crate) struct Bounce {
    depth: Depth,
    pool: BufferPool,
}

/// A buffer of them, and leave to read.
pub(crate) struct Pass<'a> {
    bounce: &'a Bounce,
    buffer: HostBuffer,
}

impl Bounce {
    /// Buffers that get their memory when they are first used.
    pub(crate) fn new() -> Result<Arc<Bounce>> {
        let pool = BufferPool::new(STEP_LEN, MOST_READS, STEP_LEN, None)?;
        Ok(Arc::new(Bounce { depth: Depth::default(), pool }))
    }

    /// Waits for leave to read; an error when the load was stopped.
    pub(crate) fn pass(&self, sink: &dyn Sink) -> Result<Pass<'_>> {
        while !self.depth.enter(LOOK) {
            sink.check()?;
        }
        match self.pool.try_acquire() {
            Some(buffer) => Ok(Pass { bounce: self, buffer }),
            // There is one for each that has leave.
            None => {
                self.depth.leave();
                Err(Error::Invalid("more reads than buffers for them".into()))
            }
        }
    }
}

impl Pass<'_> {
    /// Whether it may be used for a further read; else it should be dropped, since the disk wants fewer reads at once.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.bounce.depth.is_crowded()
    }

    /// Reads a step of a request into its place in `memory`.
    pub(crate) fn read(&mut self, file: &DataFile, request: Request, memory: &mut [u8]) -> Result<usize, Errno> {
        let buffer = self.buffer.as_mut_slice();
        let len = request.len.min(buffer.len());
        let got = rustix::io::pread(file.descriptor(request.direct), &mut buffer[..len], request.offset)?;
        self.bounce.depth.done(got as u64);
        memory[request.at..request.at + got].copy_from_slice(&buffer[..got]);
        Ok(got)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.bounce.depth.leave();
    }
}
