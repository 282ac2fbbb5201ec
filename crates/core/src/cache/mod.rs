//! Chunks of files in pinned memory, kept from one load to the next and shared by all of them.
//!
//! A [`Cache`] is a [`BufferPool`] whose buffers hold chunks of files. A load that is given one
//! ([`crate::LoaderBuilder::cache`]) copies out of the chunks that are there, and reads the others into it: the buffer
//! that is filled is the chunk that stays. Of two loads that want a chunk one reads it and the other waits.
//!
//! Nothing is freed under a copy: a chunk is an `Arc`, a copy in flight holds one, and evicting only takes the cache's.
//! Files are known by what they were when they were opened (device, inode, length, time of the last change), not by
//! their names: a file that was written to is another one, and two checkpoints that share a file share its chunks.

mod state;
mod usage;

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use state::{FileRef, Found, State};
pub use usage::CacheUsage;

use crate::checkpoint::{Checkpoint, DataFile};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::plan::Piece;
use crate::pool::{BufferPool, Hold, HostBuffer};
use crate::read::bounce::Bounce;

/// Bytes that are touched and pinned in one go: the first buffer is there soon, and few calls pin all.
const STEP_LEN: usize = 64 << 20;
/// Chunks of a checkpoint: 256 TiB of 16 MiB each.
const MOST_CHUNKS: usize = 1 << 24;
/// How long a load waits before it looks again, whatever it was told.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Chunks of files in one pool of pinned memory. Clones are the same cache.
#[derive(Debug, Clone)]
pub struct Cache {
    shared: Arc<Shared>,
    /// What loads by this handle belong to.
    group: Option<Arc<Group>>,
}

/// Checkpoints that share a limit.
#[derive(Debug)]
struct Group {
    name: String,
    /// Chunks that they may have together.
    limit: usize,
}

#[derive(Debug)]
struct Shared {
    pool: BufferPool,
    /// What reads past the page cache go by.
    bounce: Arc<Bounce>,
    state: Mutex<State>,
    /// Told when a chunk arrived, was given up, or is used no more.
    changed: Condvar,
    waiting: AtomicUsize,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// A chunk's bytes.
#[derive(Debug)]
pub(crate) struct Chunk {
    buffer: HostBuffer,
    len: usize,
    /// Once somebody wanted to compare them.
    sums: OnceLock<Sums>,
}

/// The checksums of a chunk's bytes, which is whole chunks of a store.
#[derive(Debug)]
pub(crate) struct Sums {
    /// Bytes of a chunk of the store.
    pub(crate) chunk_len: u64,
    /// One after another.
    pub(crate) of_chunks: Vec<u64>,
}

impl Chunk {
    fn len(&self) -> usize {
        self.len
    }
}

/// A chunk in use: it stays as it is while this lives.
#[derive(Debug)]
pub(crate) struct CachedChunk {
    chunk: Option<Arc<Chunk>>,
    cache: Cache,
}

impl CachedChunk {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.chunk.as_ref().map_or(&[], |chunk| &chunk.buffer.as_slice()[..chunk.len])
    }

    /// Whether its memory is pinned.
    pub(crate) fn is_pinned(&self) -> bool {
        self.chunk.as_ref().is_some_and(|chunk| chunk.buffer.is_pinned())
    }

    /// The checksums of its bytes in chunks of this length; taken by `sum` where they are not known.
    pub(crate) fn sums(&self, chunk_len: u64, sum: impl Fn(&[u8]) -> Sums) -> Cow<'_, [u64]> {
        let Some(chunk) = &self.chunk else { return Cow::default() };
        let known = chunk.sums.get_or_init(|| sum(self.bytes()));
        // Stores of different chunks may share a file.
        if known.chunk_len == chunk_len { Cow::from(&known.of_chunks) } else { Cow::from(sum(self.bytes()).of_chunks) }
    }
}

impl Drop for CachedChunk {
    fn drop(&mut self) {
        drop(self.chunk.take());
        self.cache.tell();
    }
}

impl Cache {
    /// A cache of `len` bytes (rounded down) in chunks of `chunk_len` (a multiple of 4096 up to 1 GiB, and of the chunks
    /// of stores that are to be verified). Memory is touched and pinned when it is needed, or by [`Cache::prepare`];
    /// `device` is the one by which it is pinned, for all. Without it, loads to a device that needs it pin what they copy.
    pub fn new(chunk_len: u64, len: u64, device: Option<&Device>) -> Result<Cache> {
        let too_large = || Error::Invalid(format!("a cache of {len} bytes does not fit the address space"));
        let chunk = usize::try_from(chunk_len).map_err(|_| too_large())?;
        let chunks = usize::try_from(len.checked_div(chunk_len).unwrap_or(0)).map_err(|_| too_large())?;
        if chunks < 2 {
            return Err(Error::Invalid(format!("a cache of {len} bytes has no room for two chunks of {chunk_len}")));
        }
        let shared = Shared {
            pool: BufferPool::new(chunk, chunks, STEP_LEN, device)?,
            bounce: Bounce::new()?,
            state: Mutex::default(),
            changed: Condvar::new(),
            waiting: AtomicUsize::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        };
        Ok(Cache { shared: Arc::new(shared), group: None })
    }

    /// Touches and pins all of its memory, by so many threads. Loads can run meanwhile.
    pub fn prepare(&self, threads: usize) {
        self.shared.pool.prepare_all(threads);
    }

    /// Says why it was made without a device that pins, as its [`CacheUsage::refusal`] until a load has pinned.
    pub fn refuse(&self, reason: String) {
        self.shared.pool.refuse(reason);
    }

    /// Unpins all of its memory, and lets the device go by which that was pinned; what is resident stays. `false` where
    /// there was no such device, or a load uses it or its memory is prepared. From then on only loads to a device that needs
    /// it pin, what they copy; [`Cache::prepare`] does not.
    pub fn unpin_memory(&self) -> bool {
        self.shared.pool.unpin()
    }

    pub(crate) fn bounce(&self) -> &Arc<Bounce> {
        &self.shared.bounce
    }

    /// Bytes of a chunk.
    pub fn chunk_len(&self) -> u64 {
        self.shared.pool.buffer_len() as u64
    }

    /// What it holds and how it was used.
    pub fn usage(&self) -> CacheUsage {
        let pool = &self.shared.pool;
        let chunk_len = self.chunk_len();
        let state = self.lock();
        CacheUsage {
            capacity: pool.buffers() as u64 * chunk_len,
            chunk_len,
            resident: state.len,
            occupied: state.present as u64 * chunk_len,
            pinned: state.pinned_len(),
            page_locked: pool.pinned_len(),
            refusal: pool.refusal(),
            hits: self.shared.hits.load(Ordering::Relaxed),
            misses: self.shared.misses.load(Ordering::Relaxed),
            evictions: state.evictions,
        }
    }

    /// Bytes of a checkpoint's files that are resident.
    pub fn resident_len(&self, checkpoint: &Checkpoint) -> u64 {
        let files = self.files(checkpoint);
        let state = self.lock();
        files.iter().map(|file| state.file_len(&file.stamp)).sum()
    }

    /// Whether a checkpoint's chunks are kept for it; whether they are for others, which share its files, is another thing.
    pub fn is_pinned(&self, checkpoint: &Checkpoint) -> bool {
        let files = self.files(checkpoint);
        let state = self.lock();
        files.iter().any(|file| state.is_pinned_by(&file.stamp, checkpoint.path()))
    }

    /// Keeps a checkpoint's chunks, those that are there and those that come, instead of what was kept for another opening
    /// of its path. An error where too little would be left for others; nothing is changed then.
    pub fn pin(&self, checkpoint: &Checkpoint) -> Result<()> {
        let (files, pinner) = (self.files(checkpoint), checkpoint.path());
        let chunks = self.shared.pool.buffers();
        let left = (chunks / 8).clamp(1, 64);
        let mut state = self.lock();
        let by_others = state.chunks_pinned_by_others(pinner);
        let new =
            files.iter().filter(|file| !by_others.contains_key(&file.stamp)).map(|file| file.chunks).sum::<usize>();
        let pinned = by_others.values().sum::<usize>();
        if pinned.saturating_add(new) > chunks - left {
            let len = |chunks: usize| chunks as u64 * self.chunk_len();
            return Err(Error::Invalid(format!(
                "{} cannot be pinned: it takes {} bytes of the cache, {} are pinned already, and {} must stay free of {}",
                checkpoint.path().display(),
                len(new),
                len(pinned),
                len(left),
                len(chunks)
            )));
        }
        let before = state.pinned_by(pinner).into_iter().filter(|stamp| files.iter().all(|file| file.stamp != *stamp));
        let dropped: Vec<_> = before.flat_map(|stamp| state.unpin(&stamp, pinner)).collect();
        files.iter().for_each(|file| state.pin(file, pinner));
        self.let_go(state, dropped);
        Ok(())
    }

    /// Lets a checkpoint's chunks be evicted again, by whatever opening of its path they were pinned, but for files that
    /// are pinned for others too.
    pub fn unpin(&self, checkpoint: &Checkpoint) {
        let pinner = checkpoint.path();
        let mut state = self.lock();
        let pinned = state.pinned_by(pinner);
        let dropped: Vec<_> = pinned.iter().flat_map(|stamp| state.unpin(stamp, pinner)).collect();
        self.let_go(state, dropped);
    }

    /// Puts another opening of a path in the place of one: a pin goes over, and what is resident stays, but for files that
    /// only the old one has. An error where there is no room for the pin, which is gone then.
    pub fn replace(&self, old: &Checkpoint, new: &Checkpoint) -> Result<()> {
        let pinned = if self.is_pinned(old) { self.pin(new) } else { Ok(()) };
        if pinned.is_err() {
            self.unpin(old);
        }
        let stays = |file: &DataFile| new.files().iter().any(|theirs| theirs.stamp() == file.stamp());
        self.evict_files(old, |file| !stays(file));
        pinned
    }

    /// Drops what is resident of a checkpoint's files that have changed on the disk since; gives the bytes. A pin stays.
    pub fn evict_changed(&self, checkpoint: &Checkpoint) -> u64 {
        self.evict_files(checkpoint, |file| !file.is_current())
    }

    /// Drops some of a checkpoint's files, but for those that others pin; gives the bytes.
    fn evict_files(&self, checkpoint: &Checkpoint, which: impl Fn(&DataFile) -> bool) -> u64 {
        let mut stamps: Vec<_> = checkpoint.files().iter().filter(|file| which(file)).map(DataFile::stamp).collect();
        self.remove(|state| {
            let by_others = state.chunks_pinned_by_others(checkpoint.path());
            stamps.retain(|stamp| !by_others.contains_key(stamp));
            stamps
        })
    }

    /// Drops what is resident of a checkpoint, pinned or not; gives the bytes. Memory that a copy reads is free after it.
    pub fn evict(&self, checkpoint: &Checkpoint) -> u64 {
        let stamps: Vec<_> = self.files(checkpoint).iter().map(|file| file.stamp).collect();
        self.remove(|_| stamps)
    }

    /// Drops everything; gives the bytes.
    pub fn clear(&self) -> u64 {
        self.remove(State::stamps)
    }

    /// Drops the files that were not used for so long and are not pinned; gives the bytes.
    pub fn evict_idle(&self, idle: Duration) -> u64 {
        self.remove(|state| state.idle(idle))
    }

    /// The same cache, for loads of checkpoints of a group, which may have at most `len` bytes together, pinned ones apart. A
    /// larger one streams through what is allowed. It holds from a load's beginning, for as long as something of the
    /// checkpoint is there; of several limits of a group the last one to begin counts.
    pub fn limited(&self, group: &str, len: u64) -> Cache {
        let limit = usize::try_from(len / self.chunk_len()).unwrap_or(usize::MAX);
        let group = Group { name: group.to_owned(), limit };
        Cache { shared: Arc::clone(&self.shared), group: Some(Arc::new(group)) }
    }

    fn remove(&self, which: impl FnOnce(&State) -> Vec<crate::checkpoint::Stamp>) -> u64 {
        let mut state = self.lock();
        let before = state.len;
        let stamps = which(&state);
        let dropped: Vec<_> = stamps.iter().flat_map(|stamp| state.remove(stamp)).collect();
        let freed = before - state.len;
        self.let_go(state, dropped);
        freed
    }

    /// Refuses files of so many chunks that a list of them would not fit the memory: a file may claim any length, and be full of
    /// holes.
    pub(crate) fn check_len(&self, checkpoint: &Checkpoint) -> Result<()> {
        let chunks = self.files(checkpoint).iter().map(|file| file.chunks).fold(0, usize::saturating_add);
        if chunks <= MOST_CHUNKS {
            return Ok(());
        }
        let (path, len) = (checkpoint.path().display(), self.chunk_len());
        Err(Error::Invalid(format!(
            "{path} has {chunks} chunks of {len} bytes; a cache of such chunks takes {MOST_CHUNKS} of a checkpoint at most"
        )))
    }

    fn files(&self, checkpoint: &Checkpoint) -> Vec<FileRef> {
        let chunk_len = self.chunk_len();
        let chunks = |len: u64| usize::try_from(len.div_ceil(chunk_len)).unwrap_or(usize::MAX);
        let files = checkpoint.files().iter().enumerate();
        files.map(|(order, file)| FileRef { stamp: file.stamp(), order, chunks: chunks(file.len()) }).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unlocks, then frees what was dropped, and wakes loads that wait for room.
    fn let_go(&self, state: MutexGuard<'_, State>, dropped: Vec<Arc<Chunk>>) {
        drop(state);
        drop(dropped);
        self.tell();
    }

    /// Wakes loads that wait.
    fn tell(&self) {
        if self.shared.waiting.load(Ordering::SeqCst) > 0 {
            self.shared.changed.notify_all();
        }
    }

    /// A load's use of the cache.
    pub(crate) fn begin(&self, checkpoint: &Checkpoint) -> Use {
        let files = self.files(checkpoint);
        let mut dropped = Vec::new();
        let mut state = self.lock();
        state.begin(&files);
        if let Some(group) = &self.group {
            files.iter().for_each(|file| state.limit(file, &group.name, group.limit));
            state.shrink(&group.name, 0, &mut dropped);
        }
        self.let_go(state, dropped);
        let (claims, cached_len) = (Mutex::default(), AtomicU64::new(0));
        Use { cache: self.clone(), files, claims, cached_len, hold: self.shared.pool.hold() }
    }
}

/// One load's use of a cache: its files, and the chunks that it has taken on to read. What it has not read when it ends
/// is anybody's again.
#[derive(Debug)]
pub(crate) struct Use {
    cache: Cache,
    files: Vec<FileRef>,
    claims: Mutex<HashSet<(usize, usize)>>,
    cached_len: AtomicU64,
    hold: Hold,
}

/// The pieces of a load, by where their bytes are.
#[derive(Debug, Default)]
pub(crate) struct Split<'a> {
    /// In the cache.
    pub(crate) cached: Vec<&'a Piece>,
    /// Read by other loads just now: to be taken after those that are there, which may be evicted meanwhile.
    pub(crate) busy: Vec<&'a Piece>,
    /// This load's to read.
    pub(crate) missing: Vec<&'a Piece>,
}

impl Use {
    /// Takes on every piece that nobody has. Pieces are whole chunks.
    pub(crate) fn split<'a>(&self, pieces: &'a [Piece]) -> Split<'a> {
        let mut split = Split::default();
        let mut state = self.cache.lock();
        let mut claims = self.claims();
        for piece in pieces {
            let Some((file, chunk)) = self.place(piece) else { continue };
            match state.find(&self.files[file], chunk) {
                Found::Present(_) => split.cached.push(piece),
                Found::Busy => split.busy.push(piece),
                Found::Claimed => {
                    claims.insert((file, chunk));
                    split.missing.push(piece);
                }
            }
        }
        self.cache.shared.misses.fetch_add(split.missing.len() as u64, Ordering::Relaxed);
        split
    }

    /// Counts what became of a piece that was cached or busy: it may have been evicted, or given up, before its turn.
    pub(crate) fn count(&self, piece: &Piece, is_found: bool) {
        let shared = &self.cache.shared;
        if is_found {
            shared.hits.fetch_add(1, Ordering::Relaxed);
            self.cached_len.fetch_add(piece.len, Ordering::Relaxed);
        } else {
            shared.misses.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Bytes that this load found in the cache.
    pub(crate) fn cached_len(&self) -> u64 {
        self.cached_len.load(Ordering::Relaxed)
    }

    /// Chunks that the cache can hold.
    pub(crate) fn chunks(&self) -> usize {
        self.cache.shared.pool.buffers()
    }

    /// A piece's chunk; `None` where it is not there, and now this load's to read; an error of `wait` ends the waiting
    /// for another load that reads it.
    pub(crate) fn get(&self, piece: &Piece, mut wait: impl FnMut() -> Result<()>) -> Result<Option<CachedChunk>> {
        loop {
            let Some((file, chunk)) = self.place(piece) else { return Ok(None) };
            let found = self.cache.lock().find(&self.files[file], chunk);
            match found {
                Found::Present(chunk) => return Ok(Some(self.in_use(chunk))),
                Found::Claimed => {
                    self.claims().insert((file, chunk));
                    return Ok(None);
                }
                Found::Busy => {
                    wait()?;
                    self.wait_while(|state| state.is_filling(&self.files[file], chunk));
                }
            }
        }
    }

    /// A buffer for a chunk: a free one, or that of the chunk that is worth least. `None` where all are in use.
    pub(crate) fn try_buffer(&self) -> Option<HostBuffer> {
        if let Some(buffer) = self.cache.shared.pool.try_acquire() {
            return Some(buffer);
        }
        let evicted = self.cache.lock().evict(&self.files, None)?;
        // Nobody else has it: a chunk is only given out under the lock.
        Arc::into_inner(evicted).map(|chunk| chunk.buffer).or_else(|| self.cache.shared.pool.try_acquire())
    }

    /// Waits a little for a buffer to come free.
    pub(crate) fn wait_for_buffer(&self) {
        let mut first = true;
        self.wait_while(|_| std::mem::take(&mut first));
    }

    /// Waits while something holds, at most [`LOOK_AGAIN`].
    fn wait_while(&self, mut holds: impl FnMut(&mut State) -> bool) {
        let shared = &self.cache.shared;
        shared.waiting.fetch_add(1, Ordering::SeqCst);
        let state = self.cache.lock();
        let _ = shared.changed.wait_timeout_while(state, LOOK_AGAIN, |state| holds(state));
        shared.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Puts a piece that was read in its place; its bytes are the first of the buffer.
    pub(crate) fn put(&self, piece: &Piece, buffer: HostBuffer, sums: Option<Sums>) -> CachedChunk {
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(buffer.as_slice().len());
        let chunk = Arc::new(Chunk { buffer, len, sums: sums.map_or_else(OnceLock::new, OnceLock::from) });
        if let Some((file, place)) = self.place(piece)
            && self.claims().remove(&(file, place))
        {
            let dropped = self.cache.lock().put(&self.files[file], place, &chunk);
            drop(dropped);
            self.cache.tell();
        }
        self.in_use(chunk)
    }

    /// Sees to it that a chunk's memory is pinned before it is copied to this device, if it can be.
    pub(crate) fn pin_memory(&self, chunk: &CachedChunk, device: &Device) {
        if let Some(chunk) = &chunk.chunk {
            self.hold.pin(&chunk.buffer, device);
        }
    }

    /// Drops a piece's chunk whose bytes are wrong, if it is still this one. Whoever copies from it keeps it until then.
    pub(crate) fn forget_chunk(&self, piece: &Piece, wrong: CachedChunk) {
        if let (Some((file, place)), Some(chunk)) = (self.place(piece), &wrong.chunk) {
            let dropped = self.cache.lock().remove_chunk(&self.files[file].stamp, place, chunk);
            drop(dropped);
        }
    }

    /// Drops the chunks of a file that turned out to be another one.
    pub(crate) fn forget(&self, file: usize) {
        if let Some(file) = self.files.get(file) {
            self.cache.remove(|_| vec![file.stamp]);
        }
    }

    fn in_use(&self, chunk: Arc<Chunk>) -> CachedChunk {
        CachedChunk { chunk: Some(chunk), cache: self.cache.clone() }
    }

    fn place(&self, piece: &Piece) -> Option<(usize, usize)> {
        let chunk = usize::try_from(piece.offset / self.cache.chunk_len()).ok()?;
        self.files.get(piece.file).filter(|file| chunk < file.chunks).map(|_| (piece.file, chunk))
    }

    fn claims(&self) -> MutexGuard<'_, HashSet<(usize, usize)>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let claims = std::mem::take(&mut *self.claims());
        let mut state = self.cache.lock();
        for (file, chunk) in claims {
            state.unclaim(&self.files[file], chunk);
        }
        let dropped = state.end(&self.files);
        self.cache.let_go(state, dropped);
    }
}

#[cfg(test)]
mod tests;
