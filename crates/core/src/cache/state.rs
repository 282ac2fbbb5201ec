//! What is where: for every file its chunks, and which chunk goes when room is needed. No I/O, no waiting.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Chunk;
use crate::checkpoint::Stamp;

/// A chunk's place in a file.
#[derive(Debug, Default)]
pub(super) enum Slot {
    /// Not in the cache.
    #[default]
    Absent,
    /// One load has taken on to read it.
    Filling,
    /// There. While only this holds it, it can be evicted.
    Present(Arc<Chunk>),
}

/// One file, known by what it was when it was opened: a file that was written to is another one.
#[derive(Debug)]
struct Entry {
    /// Its place in its checkpoint; of files used at one time the last one goes first.
    order: usize,
    slots: Vec<Slot>,
    present: usize,
    /// No chunk from this place on is present.
    end: usize,
    /// Bytes that are present.
    len: u64,
    used: Instant,
    /// Loads that run.
    loads: usize,
    /// Paths of the checkpoints that keep it: several may share a file.
    pinners: BTreeSet<PathBuf>,
    group: Option<String>,
}

/// Checkpoints that share a limit. Pinned files do not count.
#[derive(Debug, Default)]
struct Group {
    /// Chunks that may be present.
    limit: usize,
    present: usize,
}

impl Entry {
    /// Chunks that count for its group.
    fn counted(&self) -> usize {
        if self.is_pinned() { 0 } else { self.present }
    }

    fn is_pinned(&self) -> bool {
        !self.pinners.is_empty()
    }
}

/// All files of a cache.
#[derive(Debug, Default)]
pub(super) struct State {
    files: HashMap<Stamp, Entry>,
    groups: HashMap<String, Group>,
    /// Chunks that are present.
    pub(super) present: usize,
    /// Bytes of them.
    pub(super) len: u64,
    pub(super) evictions: u64,
}

/// What a load finds at a place.
#[derive(Debug)]
pub(super) enum Found {
    Present(Arc<Chunk>),
    /// Another load reads it.
    Busy,
    /// Nobody had it: the caller reads it now.
    Claimed,
}

/// A file as a load sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileRef {
    pub(super) stamp: Stamp,
    pub(super) order: usize,
    /// Chunks in all.
    pub(super) chunks: usize,
}

impl State {
    fn entry(&mut self, file: &FileRef) -> &mut Entry {
        let entry = self.files.entry(file.stamp).or_insert_with(|| Entry {
            order: file.order,
            slots: Vec::new(),
            present: 0,
            end: 0,
            len: 0,
            used: Instant::now(),
            loads: 0,
            pinners: BTreeSet::new(),
            group: None,
        });
        if entry.slots.len() < file.chunks {
            entry.slots.resize_with(file.chunks, Slot::default);
        }
        entry
    }

    /// A load of these files begins.
    pub(super) fn begin(&mut self, files: &[FileRef]) {
        for file in files {
            let entry = self.entry(file);
            entry.loads += 1;
            entry.used = Instant::now();
        }
    }

    /// A load of these files is over. Gives what a limit that was set meanwhile does not allow.
    pub(super) fn end(&mut self, files: &[FileRef]) -> Vec<Arc<Chunk>> {
        let mut dropped = Vec::new();
        for file in files {
            let Some(entry) = self.files.get_mut(&file.stamp) else { continue };
            entry.loads = entry.loads.saturating_sub(1);
            entry.used = Instant::now();
            if let Some(group) = entry.group.clone() {
                self.shrink(&group, 0, &mut dropped);
            }
            self.forget_if_empty(&file.stamp);
        }
        dropped
    }

    fn forget_if_empty(&mut self, stamp: &Stamp) {
        let is_idle = |entry: &Entry| entry.present == 0 && entry.loads == 0 && !entry.is_pinned();
        if self.files.get(stamp).is_some_and(is_idle) {
            self.files.remove(stamp);
        }
    }

    /// What is at a place; an absent chunk is the caller's to read.
    pub(super) fn find(&mut self, file: &FileRef, chunk: usize) -> Found {
        let Some(slot) = self.entry(file).slots.get_mut(chunk) else { return Found::Claimed };
        match slot {
            Slot::Present(chunk) => Found::Present(Arc::clone(chunk)),
            Slot::Filling => Found::Busy,
            Slot::Absent => {
                *slot = Slot::Filling;
                Found::Claimed
            }
        }
    }

    /// Whether a chunk is being read.
    pub(super) fn is_filling(&self, file: &FileRef, chunk: usize) -> bool {
        let slot = self.files.get(&file.stamp).and_then(|entry| entry.slots.get(chunk));
        matches!(slot, Some(Slot::Filling))
    }

    /// Takes out chunks of a group until `more` would not pass its limit; whether there is that room now.
    pub(super) fn shrink(&mut self, name: &str, more: usize, dropped: &mut Vec<Arc<Chunk>>) -> bool {
        while self.groups.get(name).is_some_and(|group| group.present + more > group.limit) {
            match self.evict(&[], Some(name)) {
                Some(chunk) => dropped.push(chunk),
                None => return false,
            }
        }
        true
    }

    /// Gives up reading a chunk.
    pub(super) fn unclaim(&mut self, file: &FileRef, chunk: usize) {
        if let Some(slot @ Slot::Filling) = self.files.get_mut(&file.stamp).and_then(|e| e.slots.get_mut(chunk)) {
            *slot = Slot::Absent;
        }
    }

    /// Puts a chunk that was read in its place. Where its group's limit leaves no room, others of the group go, or this
    /// one does not stay; what went is returned, to be dropped by the caller.
    pub(super) fn put(&mut self, file: &FileRef, place: usize, chunk: &Arc<Chunk>) -> Vec<Arc<Chunk>> {
        let entry = self.entry(file);
        let group = entry.group.clone().filter(|_| !entry.is_pinned());
        let mut dropped = Vec::new();
        if let Some(name) = &group
            && !self.shrink(name, 1, &mut dropped)
        {
            self.unclaim(file, place);
            return dropped;
        }
        let entry = self.entry(file);
        let Some(slot) = entry.slots.get_mut(place) else { return dropped };
        if matches!(slot, Slot::Present(_)) {
            return dropped;
        }
        *slot = Slot::Present(Arc::clone(chunk));
        entry.present += 1;
        entry.end = entry.end.max(place + 1);
        entry.len += chunk.len() as u64;
        self.present += 1;
        self.len += chunk.len() as u64;
        if let Some(group) = group.and_then(|name| self.groups.get_mut(&name)) {
            group.present += 1;
        }
        dropped
    }

    /// Takes out the chunk that is worth least to keep, of those that nobody uses: of files that are not being loaded
    /// the one used longest ago; then of `mine`; then of other loads. The end of a model goes before its beginning, so
    /// that a load that comes back finds a run of it, and a model larger than the cache keeps what fits.
    pub(super) fn evict(&mut self, mine: &[FileRef], group: Option<&str>) -> Option<Arc<Chunk>> {
        let is_mine = |stamp: &Stamp| mine.iter().any(|file| file.stamp == *stamp);
        let in_group = |entry: &Entry| group.is_none() || entry.group.as_deref() == group;
        let open = |entry: &Entry| entry.present > 0 && !entry.is_pinned() && in_group(entry);
        let mut victims: Vec<(u8, Instant, usize, Stamp)> = Vec::new();
        for (stamp, entry) in self.files.iter().filter(|(_, entry)| open(entry)) {
            let class = match (is_mine(stamp), entry.loads) {
                (true, _) => 1,
                (false, 0) => 0,
                (false, _) => 2,
            };
            victims.push((class, entry.used, usize::MAX - entry.order, *stamp));
        }
        // Files of one load have nearly one time: by order where both are being loaded.
        victims.sort_unstable_by_key(|&(class, used, order, _)| (class, (class == 0).then_some(used), order, used));
        for (.., stamp) in victims {
            if let Some(chunk) = self.evict_of(&stamp) {
                self.evictions += 1;
                self.forget_if_empty(&stamp);
                return Some(chunk);
            }
        }
        None
    }

    /// Takes out the last chunk of a file that nobody uses.
    fn evict_of(&mut self, stamp: &Stamp) -> Option<Arc<Chunk>> {
        let entry = self.files.get_mut(stamp)?;
        while entry.end > 0 && !matches!(entry.slots[entry.end - 1], Slot::Present(_)) {
            entry.end -= 1;
        }
        let unused = |slot: &Slot| matches!(slot, Slot::Present(chunk) if Arc::strong_count(chunk) == 1);
        let place = entry.slots[..entry.end].iter().rposition(unused)?;
        self.take(stamp, place)
    }

    /// Takes a chunk out, whoever uses it.
    fn take(&mut self, stamp: &Stamp, place: usize) -> Option<Arc<Chunk>> {
        let entry = self.files.get_mut(stamp)?;
        let slot = entry.slots.get_mut(place).filter(|slot| matches!(slot, Slot::Present(_)))?;
        let Slot::Present(chunk) = std::mem::take(slot) else { return None };
        let len = chunk.len() as u64;
        entry.present -= 1;
        entry.len -= len;
        self.present -= 1;
        self.len -= len;
        let counts = entry.group.as_ref().filter(|_| !entry.is_pinned());
        if let Some(group) = counts.and_then(|name| self.groups.get_mut(name)) {
            group.present = group.present.saturating_sub(1);
        }
        Some(chunk)
    }

    /// Takes a chunk out of its place, if it is there.
    pub(super) fn remove_chunk(&mut self, stamp: &Stamp, place: usize, chunk: &Arc<Chunk>) -> Option<Arc<Chunk>> {
        let slot = self.files.get(stamp)?.slots.get(place)?;
        if !matches!(slot, Slot::Present(there) if Arc::ptr_eq(there, chunk)) {
            return None;
        }
        self.evictions += 1;
        self.take(stamp, place)
    }

    /// Takes out all chunks of a file.
    pub(super) fn remove(&mut self, stamp: &Stamp) -> Vec<Arc<Chunk>> {
        let places = self.files.get(stamp).map_or(0, |entry| entry.slots.len());
        let chunks: Vec<_> = (0..places).filter_map(|place| self.take(stamp, place)).collect();
        self.evictions += chunks.len() as u64;
        if let Some(entry) = self.files.get_mut(stamp) {
            entry.end = 0;
        }
        self.forget_if_empty(stamp);
        chunks
    }

    /// Files that nobody loads and that are not pinned, used last before so long.
    pub(super) fn idle(&self, idle: Duration) -> Vec<Stamp> {
        let now = Instant::now();
        let unused = |e: &Entry| e.present > 0 && e.loads == 0 && !e.is_pinned();
        let is_idle = |e: &Entry| unused(e) && now.saturating_duration_since(e.used) >= idle;
        self.files.iter().filter(|(_, entry)| is_idle(entry)).map(|(stamp, _)| *stamp).collect()
    }

    /// All files.
    pub(super) fn stamps(&self) -> Vec<Stamp> {
        self.files.keys().copied().collect()
    }

    /// Bytes of a file that are present.
    pub(super) fn file_len(&self, stamp: &Stamp) -> u64 {
        self.files.get(stamp).map_or(0, |entry| entry.len)
    }

    /// Whether the checkpoint of this path keeps a file.
    pub(super) fn is_pinned_by(&self, stamp: &Stamp, pinner: &Path) -> bool {
        self.files.get(stamp).is_some_and(|entry| entry.pinners.contains(pinner))
    }

    /// The files that the checkpoint of this path keeps.
    pub(super) fn pinned_by(&self, pinner: &Path) -> Vec<Stamp> {
        let kept = self.files.iter().filter(|(_, entry)| entry.pinners.contains(pinner));
        kept.map(|(stamp, _)| *stamp).collect()
    }

    /// Chunks, present or not, of the files that others than the checkpoint of this path keep.
    pub(super) fn chunks_pinned_by_others(&self, pinner: &Path) -> HashMap<Stamp, usize> {
        let by_others = |entry: &Entry| entry.pinners.iter().any(|other| other != pinner);
        let kept = self.files.iter().filter(|(_, entry)| by_others(entry));
        kept.map(|(stamp, entry)| (*stamp, entry.slots.len())).collect()
    }

    /// Bytes present of the files that are pinned.
    pub(super) fn pinned_len(&self) -> u64 {
        self.files.values().filter(|entry| entry.is_pinned()).map(|entry| entry.len).sum()
    }

    pub(super) fn pin(&mut self, file: &FileRef, pinner: &Path) {
        let entry = self.entry(file);
        let (counted, group) = (entry.counted(), entry.group.clone());
        entry.pinners.insert(pinner.to_owned());
        if let Some(group) = group.and_then(|name| self.groups.get_mut(&name)) {
            group.present = group.present.saturating_sub(counted);
        }
    }

    /// Lets a file be evicted again, if no other checkpoint keeps it. Gives what its group's limit does not allow now.
    pub(super) fn unpin(&mut self, stamp: &Stamp, pinner: &Path) -> Vec<Arc<Chunk>> {
        let mut dropped = Vec::new();
        if let Some(entry) = self.files.get_mut(stamp)
            && entry.pinners.remove(pinner)
            && !entry.is_pinned()
        {
            let (counted, name) = (entry.counted(), entry.group.clone());
            if let Some(name) = name {
                self.groups.entry(name.clone()).or_default().present += counted;
                self.shrink(&name, 0, &mut dropped);
            }
        }
        self.forget_if_empty(stamp);
        dropped
    }

    /// Puts a file in a group of which `limit` chunks may be present.
    pub(super) fn limit(&mut self, file: &FileRef, name: &str, limit: usize) {
        let entry = self.entry(file);
        let present = entry.counted();
        let before = entry.group.replace(name.to_owned());
        if let Some(group) = before.and_then(|name| self.groups.get_mut(&name)) {
            group.present = group.present.saturating_sub(present);
        }
        let group = self.groups.entry(name.to_owned()).or_default();
        group.limit = limit;
        group.present += present;
    }

    #[cfg(test)]
    pub(super) fn is_present(&self, file: &FileRef, chunk: usize) -> bool {
        matches!(self.files[&file.stamp].slots[chunk], Slot::Present(_))
    }

    /// Counts again what is counted, for tests.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let mut sum = 0;
        let mut groups: HashMap<&str, usize> = HashMap::new();
        for entry in self.files.values() {
            let present = |slot: &Slot| matches!(slot, Slot::Present(_));
            let count = entry.slots.iter().filter(|slot| present(slot)).count();
            assert_eq!(count, entry.present);
            assert!(!entry.slots[entry.end.min(entry.slots.len())..].iter().any(present));
            sum += count;
            if let Some(name) = &entry.group {
                *groups.entry(name).or_default() += if entry.is_pinned() { 0 } else { count };
            }
        }
        assert_eq!(sum, self.present);
        for (name, group) in &self.groups {
            assert_eq!(groups.get(name.as_str()).copied().unwrap_or_default(), group.present);
            assert!(group.present <= group.limit, "{} chunks in a group of {}", group.present, group.limit);
        }
    }
}
