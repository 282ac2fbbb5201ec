//! What a load stages by, kept from one batch of a session to the next: pinning it again would cost more than a batch.

use std::sync::Arc;

use super::Loader;
use super::lane::Buffers;
use crate::cache::Use;
use crate::device::{Device, Stream};
use crate::error::{Error, Result};
use crate::pool::BufferPool;
use crate::read::choose::Share;
use crate::read::depth::Depth;

/// Streams, one a device, and the ring of buffers.
#[derive(Debug, Default)]
pub(super) struct Staging {
    pool: Option<BufferPool>,
    streams: Vec<Stream>,
    /// What was found out about the disk.
    pub(super) depth: Arc<Depth>,
    /// Something had to be read from a disk: pieces stay short, since a ring of other buffers would have to be pinned.
    pub(super) is_cold: bool,
}

impl Staging {
    /// A stream for each of the loader's devices, and buffers of `piece_len` bytes: those of a cache, or a pool that
    /// holds the shares' buffers. Shares get fewer lanes and buffers where the loader's limit, or the cache, is small.
    pub(super) fn fit<'a>(
        &'a mut self,
        loader: &Loader,
        cache: Option<&'a Use>,
        piece_len: u64,
        shares: &mut [Share<'_>],
    ) -> Result<(Buffers<'a>, &'a [Stream])> {
        if self.streams.is_empty() {
            self.streams = loader.devices.iter().map(Device::stream).collect::<Result<_>>()?;
        }
        let too_large = || Error::Invalid(format!("a piece of {piece_len} bytes does not fit the memory"));
        let buffer_len = usize::try_from(piece_len).map_err(|_| too_large())?;
        let ring = usize::try_from(loader.pinned_len / piece_len).unwrap_or(usize::MAX);
        let most = cache.map_or(ring, |cache| cache.chunks() / 2).max(1);
        let staged = shares.iter().filter(|share| share.buffers_per_lane > 0).count();
        for share in shares.iter_mut().filter(|share| share.buffers_per_lane > 0) {
            let mine = (most / staged).max(1);
            share.lanes = share.lanes.min(mine);
            share.buffers_per_lane = share.buffers_per_lane.min(mine / share.lanes);
        }
        if let Some(cache) = cache {
            return Ok((Buffers::Cache(cache), &self.streams));
        }
        let buffers = shares.iter().map(|share| share.lanes * share.buffers_per_lane).sum();
        let per_lane = shares.iter().map(|share| share.buffers_per_lane).max().unwrap_or(0);
        let fits = |pool: &BufferPool| pool.buffer_len() == buffer_len && pool.buffers() >= buffers;
        let pool = match self.pool.take().filter(fits) {
            Some(pool) => pool,
            None => {
                // Each lane prepares and pins its own buffers, one at a time, while others read already.
                let step = buffer_len * per_lane.clamp(1, 2);
                BufferPool::new(buffer_len, buffers, step, loader.devices.iter().find(|d| d.needs_pinning()))?
            }
        };
        Ok((Buffers::Ring(self.pool.insert(pool)), &self.streams))
    }
}
