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
    /// Lanes take checksums, as those of builds did in which no device took them.
    pub(crate) verify: bool,
    /// Pieces that are issued together at most; 1 in builds that issued each at once.
    pub(crate) batch: usize,
}

impl Way {
    /// What the loader chooses for cached bytes (`read/choose.rs`) of so many devices, by rates that it would measure.
    pub(crate) fn cached(host: &Host, devices: usize) -> Way {
        let copying_is_faster = host.cpus as f64 * host.read_each >= host.register;
        if host.cpus >= tuning::PREAD_CPUS || copying_is_faster {
            Way::pread(tuning::cached_lanes(host.cpus, devices))
        } else {
            Way::mapped()
        }
    }

    /// Pages in place: one thread registers them.
    pub(crate) fn mapped() -> Way {
        Way { engine: Engine::Mapped, buffers: 0, ..Way::pread(1) }
    }

    /// What the loader chooses for uncached bytes.
    pub(crate) fn uncached() -> Way {
        let depth = tuning::MOST_READS / tuning::URING_LANES;
        let (engine, buffers) = (Engine::Uring { depth }, depth + tuning::URING_SPARE);
        Way { engine, buffers, piece_len: tuning::COLD_PIECE_LEN, ..Way::pread(tuning::URING_LANES) }
    }

    /// The same without io_uring.
    pub(crate) fn uncached_pread() -> Way {
        let (buffers, piece_len) = (tuning::COLD_BUFFERS, tuning::COLD_PIECE_LEN);
        Way { buffers, piece_len, ..Way::pread(tuning::MOST_READS) }
    }

    /// Threads with the buffers that the loader gives them.
    pub(crate) fn pread(lanes: usize) -> Way {
        let (piece_len, buffers, batch) = (tuning::PIECE_LEN, tuning::PREAD_BUFFERS, tuning::MAX_BATCH);
        Way { engine: Engine::Pread, lanes, buffers, piece_len, verify: false, batch }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_stays_in_the_staging_memory() {
        let mine = usize::try_from(tuning::PINNED_LEN / tuning::PIECE_LEN).unwrap();
        let way = Way::pread(2 * mine).fitted(1);
        assert_eq!((way.lanes, way.buffers), (mine / 2, 2));
        let way = Way::pread(tuning::MAX_LANES).fitted(mine / tuning::MAX_LANES);
        assert_eq!((way.lanes, way.buffers), (tuning::MAX_LANES, 1));
        assert!(way.ring_len() <= tuning::PINNED_LEN as f64);
        assert_eq!(Way::pread(2).fitted(2), Way::pread(2));
        assert_eq!(Way::pread(2 * mine).fitted(2).lanes, mine / 4);
    }
}
