//! What a cache holds.

use serde::Serialize;

/// What a cache holds and how it was used, in bytes except where said.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct CacheUsage {
    /// All that it can hold.
    pub capacity: u64,
    /// A chunk.
    pub chunk_len: u64,
    /// Bytes of files that it holds.
    pub resident: u64,
    /// Memory of the chunks that hold them.
    pub occupied: u64,
    /// Of `resident`, those that are not to be evicted.
    pub pinned: u64,
    /// Memory that the driver has pinned.
    pub page_locked: u64,
    /// Why memory is not pinned, where the driver or a limit refused it, or there was no device for it
    /// ([`crate::Cache::refuse`]): the last refusal, until memory was pinned after it.
    pub refusal: Option<String>,
    /// Chunks that loads wanted and found, or another load was reading.
    pub hits: u64,
    /// Chunks that loads wanted and had to read.
    pub misses: u64,
    /// Chunks that were dropped.
    pub evictions: u64,
}
