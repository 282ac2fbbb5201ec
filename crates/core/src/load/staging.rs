//! What a load stages by, kept from one batch of a session to the next: pinning it again would cost more than a batch.

use super::Loader;
use crate::device::{Device, Stream};
use crate::error::{Error, Result};
use crate::pool::BufferPool;
use crate::read::choose::Share;

/// Streams, one a device, and the ring of buffers.
#[derive(Debug, Default)]
pub(super) struct Staging {
    pool: Option<BufferPool>,
    streams: Vec<Stream>,
}

impl Staging {
    /// A stream for each of the loader's devices, and a pool that holds the shares' buffers of `piece_len` bytes. Shares get
    /// fewer lanes and buffers where the loader's limit is small.
    pub(super) fn fit(
        &mut self,
        loader: &Loader,
        piece_len: u64,
        shares: &mut [Share<'_>],
    ) -> Result<(&BufferPool, &[Stream])> {
        if self.streams.is_empty() {
            self.streams = loader.devices.iter().map(Device::stream).collect::<Result<_>>()?;
        }
        let too_large = || Error::Invalid(format!("a piece of {piece_len} bytes does not fit the memory"));
        let buffer_len = usize::try_from(piece_len).map_err(|_| too_large())?;
        let most = usize::try_from(loader.pinned_len / piece_len).unwrap_or(usize::MAX).max(1);
        let staged = shares.iter().filter(|share| share.buffers_per_lane > 0).count();
        for share in shares.iter_mut().filter(|share| share.buffers_per_lane > 0) {
            let mine = (most / staged).max(1);
            share.lanes = share.lanes.min(mine);
            share.buffers_per_lane = share.buffers_per_lane.min(mine / share.lanes);
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
        Ok((self.pool.insert(pool), &self.streams))
    }
}
