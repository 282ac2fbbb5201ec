//! How a load is read: engines, lanes, buffers and pieces, as the code chooses them.

use sllm_core::tuning;

use crate::host::Host;

/// An engine that reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Threads, one read at a time each.
    Pread,
    /// So many reads in flight a lane.
    Uring { depth: usize },
    /// Pages of the page cache, registered and copied in place.
    Mapped,
}

/// One engine's part in a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) engine: Engine,
    pub(crate) lanes: usize,
    pub(crate) buffers: usize,
    pub(crate) piece_len: u64,
    pub(crate) verify: bool,
    /// Pieces that are issued together at most; 1 in builds that issued each at once.
    pub(crate) batch: usize,
}

impl Way {
    /// What the loader chooses for cached bytes (`read/choose.rs`) of so many devices, by rates that it would measure.
    pub(crate) fn cached(host: &Host, devices: usize, verify: bool) -> Way {
        let copying_is_faster = host.cpus as f64 * host.read_each >= host.register;
        if host.cpus >= tuning::PREAD_CPUS || verify || copying_is_faster {
            Way::pread(tuning::cached_lanes(host.cpus, devices), verify)
        } else {
            Way::mapped()
        }
    }

    /// Pages in place: one thread registers them, and there is no buffer to take checksums of.
    pub(crate) fn mapped() -> Way {
        let (piece_len, batch) = (piece_len(false), tuning::MAX_BATCH);
        Way { engine: Engine::Mapped, lanes: 1, buffers: 0, piece_len, verify: false, batch }
    }

    /// What the loader chooses for uncached bytes.
    pub(crate) fn uncached(verify: bool) -> Way {
        let depth = tuning::MOST_READS / tuning::URING_LANES;
        let buffers = depth + tuning::URING_SPARE;
        let (engine, lanes) = (Engine::Uring { depth }, tuning::URING_LANES);
        Way { engine, lanes, buffers, piece_len: cold_piece_len(verify), verify, batch: tuning::MAX_BATCH }
    }

    /// The same without io_uring.
    pub(crate) fn uncached_pread() -> Way {
        let (engine, lanes, buffers) = (Engine::Pread, tuning::MOST_READS, tuning::COLD_BUFFERS);
        Way { engine, lanes, buffers, piece_len: cold_piece_len(false), verify: false, batch: tuning::MAX_BATCH }
    }

    /// Threads with the buffers that the loader gives them.
    pub(crate) fn pread(lanes: usize, verify: bool) -> Way {
        let (engine, buffers) = (Engine::Pread, tuning::PREAD_BUFFERS);
        Way { engine, lanes, buffers, piece_len: piece_len(verify), verify, batch: tuning::MAX_BATCH }
    }

    /// Fewer lanes and buffers where the staging memory is small, as in `load/staging.rs`.
    pub(crate) fn fitted(self, staged: usize) -> Way {
        if self.buffers == 0 {
            return self;
        }
        let most = usize::try_from(tuning::PINNED_LEN / self.piece_len).unwrap_or(usize::MAX);
        let mine = (most / staged).max(1);
        let lanes = self.lanes.min((mine / self.buffers).max(tuning::MAX_LANES).min(mine));
        Way { lanes, buffers: self.buffers.min(mine / lanes), ..self }
    }

    /// Bytes of all its buffers.
    pub(crate) fn ring_len(&self) -> f64 {
        (self.lanes * self.buffers) as f64 * self.piece_len as f64
    }

    /// How often each byte that a thread reads passes the memory.
    ///
    /// With a ring in the cache only the page cache is read. Else the buffer's line is fetched, written back, and read by
    /// the device as well; and by the checksum.
    pub(crate) fn traffic(&self, host: &Host, rings: f64) -> f64 {
        if rings <= host.cache_len {
            1.0
        } else if self.verify {
            5.0
        } else {
            4.0
        }
    }
}

/// Bytes of a piece: an equal part of a chunk where checksums are taken.
pub(crate) fn piece_len(verify: bool) -> u64 {
    if verify { tuning::verified_piece_len(tuning::PIECE_LEN) } else { tuning::PIECE_LEN }
}

/// The same of one that a disk is read by.
fn cold_piece_len(verify: bool) -> u64 {
    if verify { tuning::verified_piece_len(tuning::COLD_PIECE_LEN) } else { tuning::COLD_PIECE_LEN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_stays_in_the_staging_memory() {
        let mine = usize::try_from(tuning::PINNED_LEN / tuning::PIECE_LEN).unwrap();
        let way = Way::pread(2 * mine, false).fitted(1);
        assert_eq!((way.lanes, way.buffers), (mine / 2, 2));
        let way = Way::pread(tuning::MAX_LANES, false).fitted(mine / tuning::MAX_LANES);
        assert_eq!((way.lanes, way.buffers), (tuning::MAX_LANES, 1));
        assert!(way.ring_len() <= tuning::PINNED_LEN as f64);
        assert_eq!(Way::pread(2, false).fitted(2), Way::pread(2, false));
        assert_eq!(Way::pread(2 * mine, false).fitted(2).lanes, mine / 4);
    }
}
