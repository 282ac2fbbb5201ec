//! Pieces that are in the cache, or that another load is reading into it.

use super::{Filled, Pread, Queue, ReadEngine, Sink};
use crate::checkpoint::DataFile;
use crate::error::Result;

/// Hands over chunks of the cache. What was evicted meanwhile, or given up by the load that read it, is read by `pread`.
pub(crate) struct Cached {
    pub(crate) pread: Pread,
}

impl ReadEngine for Cached {
    fn run(&self, files: &[DataFile], queue: &Queue<'_>, sink: &mut dyn Sink) -> Result<()> {
        while let Some(piece) = queue.next() {
            sink.check()?;
            match sink.cached(piece)? {
                Some(chunk) => sink.filled(piece, Filled::Cached(chunk))?,
                None => self.pread.read(files, piece, sink)?,
            }
        }
        Ok(())
    }
}
