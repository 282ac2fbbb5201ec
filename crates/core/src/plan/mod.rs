//! Which byte ranges of which files go to which place of which device block. Pure data, no I/O.
//!
//! A [`Segment`] says what is wanted: bytes of a file, in rows, and where they go. [`LoadPlan::build`] turns segments
//! into [`Piece`]s: aligned reads of at most one staging buffer, each with the copies that empty it. A plan covers
//! every wanted byte once for each segment that wants it; nearby ranges share a read.

mod destinations;
mod placement;
mod strided;

use std::collections::BTreeMap;
use std::ops::Range;

pub(crate) use destinations::{check_destinations, destinations_meet};
pub use placement::{BlockSpec, Filter, Placed, Placement};
pub use strided::Strided;

use crate::error::{Error, Result};
use crate::format::PAGE;

/// A run of equal rows of a file, and where it goes. One row is a contiguous range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Place of the file in the checkpoint.
    pub file: usize,
    /// First byte of the first row in the file.
    pub offset: u64,
    /// Bytes of one row.
    pub row_len: u64,
    /// Number of rows.
    pub rows: u64,
    /// Bytes from one row's start to the next in the file; at least `row_len`.
    pub src_pitch: u64,
    /// Place of the destination block.
    pub block: usize,
    /// Where the first row goes in the block, in bytes.
    pub dst_offset: u64,
    /// Bytes from one row's start to the next in the block; at least `row_len`.
    pub dst_pitch: u64,
}

impl Segment {
    /// A contiguous range of `len` bytes.
    pub fn contiguous(file: usize, offset: u64, len: u64, block: usize, dst_offset: u64) -> Segment {
        Segment { file, offset, row_len: len, rows: 1, src_pitch: len, block, dst_offset, dst_pitch: len }
    }

    /// Bytes wanted.
    pub fn len(&self) -> u64 {
        self.rows.saturating_mul(self.row_len)
    }

    /// Whether nothing is wanted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many segments a plan makes of it: one, or one a row where rows lie so far apart in the file that each is read by
    /// itself; none where nothing is wanted.
    pub fn parts(&self, options: &PlanOptions) -> u64 {
        let is_scattered = self.rows > 1 && self.src_pitch.saturating_sub(self.row_len) >= options.max_gap;
        match self.is_empty() {
            true => 0,
            false if is_scattered => self.rows,
            false => 1,
        }
    }

    /// End of the last row in the file. Checked by `check`.
    fn end(&self) -> u64 {
        self.offset + (self.rows - 1) * self.src_pitch + self.row_len
    }

    /// End of the last row in the block.
    pub(crate) fn dst_end(&self) -> u64 {
        rows_end(self.dst_offset, self.rows, self.row_len, self.dst_pitch).unwrap_or(u64::MAX)
    }

    /// An error where it does not lie inside its file and its block, which have these lengths. It must not be empty.
    pub fn check(&self, files: &[u64], blocks: &[u64]) -> Result<()> {
        let fits = |start: u64, pitch: u64, limit: Option<&u64>| {
            rows_end(start, self.rows, self.row_len, pitch).zip(limit).is_some_and(|(end, &limit)| end <= limit)
        };
        if self.rows > 1 && (self.src_pitch < self.row_len || self.dst_pitch < self.row_len) {
            return Err(Error::Invalid(format!("the rows of {self:?} overlap")));
        }
        if self.rows.checked_mul(self.row_len).is_none() || !fits(self.offset, self.src_pitch, files.get(self.file)) {
            return Err(Error::Invalid(format!("{self:?} passes the end of its file")));
        }
        if !fits(self.dst_offset, self.dst_pitch, blocks.get(self.block)) {
            return Err(Error::Invalid(format!("{self:?} passes the end of its block")));
        }
        Ok(())
    }

    /// The `count` rows from row `first`, bytes `from..to` of each.
    fn part(&self, first: u64, count: u64, from: u64, to: u64) -> Segment {
        Segment {
            offset: self.offset + first * self.src_pitch + from,
            dst_offset: self.dst_offset + first * self.dst_pitch + from,
            row_len: to - from,
            rows: count,
            ..*self
        }
    }
}

/// One read of a file into a staging buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Place of the file in the checkpoint.
    pub file: usize,
    /// First byte, a multiple of [`PAGE`].
    pub offset: u64,
    /// Bytes; a multiple of [`PAGE`] unless the file ends there. At most [`PlanOptions::piece_len`].
    pub len: u64,
    /// Its copies in [`LoadPlan::copies`].
    copies: Range<usize>,
}

/// One copy out of a staging buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceCopy {
    /// First byte in the staging buffer.
    pub src_offset: u64,
    /// Bytes of one row.
    pub row_len: u64,
    /// Number of rows.
    pub rows: u64,
    /// Bytes from row to row in the staging buffer.
    pub src_pitch: u64,
    /// Place of the destination block.
    pub block: usize,
    /// First byte in the block.
    pub dst_offset: u64,
    /// Bytes from row to row in the block.
    pub dst_pitch: u64,
}

impl PieceCopy {
    /// Bytes copied.
    pub fn len(&self) -> u64 {
        self.rows * self.row_len
    }

    /// Whether nothing is copied; a plan has no such copy.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How to cut a plan.
#[derive(Debug, Clone, Copy)]
pub struct PlanOptions {
    /// Bytes of one staging buffer; a multiple of [`PAGE`]. Pieces end at its multiples in each file, or in each chunk.
    pub piece_len: u64,
    /// Two wanted ranges less than this many bytes apart share a read.
    pub max_gap: u64,
    /// Bytes of one checksummed chunk, a multiple of [`PAGE`]: every touched one is read whole, so that its checksum can
    /// be taken, and some of its pieces may have no copies. `None`: only what is wanted is read.
    pub chunk_len: Option<u64>,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions { piece_len: 4 << 20, max_gap: 64 << 10, chunk_len: None }
    }
}

/// Reads and the copies that empty them.
#[derive(Debug, Clone, Default)]
pub struct LoadPlan {
    pieces: Vec<Piece>,
    copies: Vec<PieceCopy>,
    wanted: u64,
}

impl LoadPlan {
    /// Cuts segments into pieces. `files` and `blocks` are lengths in bytes; every segment must lie inside both.
    pub fn build(files: &[u64], blocks: &[u64], segments: &[Segment], options: &PlanOptions) -> Result<LoadPlan> {
        for len in [Some(options.piece_len), options.chunk_len].into_iter().flatten() {
            if len == 0 || !len.is_multiple_of(PAGE) {
                return Err(Error::Invalid(format!("a piece or chunk of {len} bytes is not a multiple of {PAGE}")));
            }
        }
        let cell_len = options.chunk_len.unwrap_or(options.piece_len);
        let segments = Self::segments(files, blocks, segments, options)?;
        // No overflow: destinations lie apart, in blocks whose lengths fit 63 bits.
        let wanted = segments.iter().fold(0u64, |sum, segment| sum.saturating_add(segment.len()));
        let mut plan = LoadPlan { wanted, ..LoadPlan::default() };

        // Segments that reach past the cell before, by index, and where that cell ended.
        let mut active: Vec<usize> = Vec::new();
        let mut reached = 0;
        let mut next = 0;
        while next < segments.len() || !active.is_empty() {
            let (file, start) = match active.first() {
                Some(&i) => (segments[i].file, reached),
                None => (segments[next].file, segments[next].offset),
            };
            let cell_start = start / cell_len * cell_len;
            let cell = cell_start..cell_start.saturating_add(cell_len).min(files[file]);
            while segments.get(next).is_some_and(|s| s.file == file && s.offset < cell.end) {
                active.push(next);
                next += 1;
            }
            let active_segments = || active.iter().map(|&i| &segments[i]);
            match options.chunk_len {
                Some(_) => plan.cut_chunk(file, cell.clone(), active_segments, options.piece_len),
                None => plan.cut_cell(file, &cell, active_segments(), options.max_gap),
            }
            active.retain(|&i| segments[i].end() > cell.end);
            reached = cell.end;
        }
        Ok(plan)
    }

    /// The segments as a plan takes them: checked, in the order of the files, neighbours joined, none empty.
    pub(crate) fn segments(
        files: &[u64],
        blocks: &[u64],
        segments: &[Segment],
        options: &PlanOptions,
    ) -> Result<Vec<Segment>> {
        if let Some(len) = files.iter().chain(blocks).find(|&&len| i64::try_from(len).is_err()) {
            return Err(Error::Invalid(format!("a length of {len} bytes does not fit 63 bits")));
        }
        let segments = normalise(files, blocks, segments, options)?;
        check_destinations(&segments)?;
        Ok(segments)
    }

    /// Pieces of every byte of the files, with no copies.
    pub(crate) fn whole(files: &[u64], piece_len: u64) -> LoadPlan {
        let mut plan = LoadPlan::default();
        for (file, &len) in files.iter().enumerate() {
            let mut start = 0;
            while start < len {
                let read = start..start.saturating_add(piece_len).min(len);
                plan.push(file, &read, &[]);
                start = read.end;
            }
        }
        plan
    }

    /// Adds the pieces of one cell: the ranges that segments want in it, nearby ones joined.
    fn cut_cell<'a>(
        &mut self,
        file: usize,
        cell: &Range<u64>,
        segments: impl Iterator<Item = &'a Segment>,
        max_gap: u64,
    ) {
        let parts = clip_all(segments, cell);
        let mut rest = parts.as_slice();
        while let Some(first) = rest.first() {
            let mut end = first.end();
            let near = |end: u64, part: &Segment| part.offset / PAGE * PAGE < round_up(end.saturating_add(max_gap));
            let mut count = 1;
            while rest.get(count).is_some_and(|part| near(end, part)) {
                end = end.max(rest[count].end());
                count += 1;
            }
            let read = first.offset / PAGE * PAGE..round_up(end).min(cell.end);
            self.push(file, &read, &rest[..count]);
            rest = &rest[count..];
        }
    }

    /// Adds the pieces of one chunk, all of it, if a segment wants a byte of it.
    fn cut_chunk<'a, S: Iterator<Item = &'a Segment>>(
        &mut self,
        file: usize,
        chunk: Range<u64>,
        segments: impl Fn() -> S,
        piece_len: u64,
    ) {
        if clip_all(segments(), &chunk).is_empty() {
            return;
        }
        let mut start = chunk.start;
        while start < chunk.end {
            let read = start..start.saturating_add(piece_len).min(chunk.end);
            self.push(file, &read, &clip_all(segments(), &read));
            start = read.end;
        }
    }

    /// Adds a piece and the copies of its parts.
    fn push(&mut self, file: usize, read: &Range<u64>, parts: &[Segment]) {
        let first_copy = self.copies.len();
        self.copies.extend(parts.iter().map(|part| PieceCopy {
            src_offset: part.offset - read.start,
            row_len: part.row_len,
            rows: part.rows,
            src_pitch: part.src_pitch,
            block: part.block,
            dst_offset: part.dst_offset,
            dst_pitch: part.dst_pitch,
        }));
        let copies = first_copy..self.copies.len();
        self.pieces.push(Piece { file, offset: read.start, len: read.end - read.start, copies });
    }

    /// Its reads, by file and offset.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The copies of one of its pieces.
    pub fn copies(&self, piece: &Piece) -> &[PieceCopy] {
        self.copies.get(piece.copies.clone()).unwrap_or_default()
    }

    /// Orders pieces so that each target's come evenly over the whole, among themselves as they were. A piece's target is
    /// that of the block of its first copy.
    pub fn spread(&self, pieces: &mut Vec<&Piece>, target_of: impl Fn(usize) -> usize) {
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        let numbered = pieces.iter().map(|&piece| {
            let target = self.copies(piece).first().map_or(0, |copy| target_of(copy.block));
            let count = counts.entry(target).or_default();
            *count += 1;
            (target, *count, piece)
        });
        let mut numbered: Vec<(usize, usize, &Piece)> = numbered.collect();
        // Each target's pieces are as far from each other as if they lay in the middles of equal parts of a line.
        let place = |&(target, number, _): &(usize, usize, &Piece)| {
            (number as f64 - 0.5) / counts.get(&target).copied().unwrap_or(1) as f64
        };
        numbered.sort_by(|one, other| place(one).total_cmp(&place(other)));
        *pieces = numbered.into_iter().map(|(_, _, piece)| piece).collect();
    }

    /// Number of copies of all pieces.
    pub fn copy_count(&self) -> usize {
        self.copies.len()
    }

    /// Bytes that are copied to devices.
    pub fn wanted_len(&self) -> u64 {
        self.wanted
    }

    /// Bytes that are read from files.
    pub fn read_len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len).sum()
    }
}

/// End of the last of rows that begin at `start`; `None` where there are none, or it does not fit 64 bits.
pub(crate) fn rows_end(start: u64, rows: u64, row_len: u64, pitch: u64) -> Option<u64> {
    rows.checked_sub(1)?.checked_mul(pitch)?.checked_add(row_len)?.checked_add(start)
}

fn round_up(offset: u64) -> u64 {
    offset.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

/// Checks, sorts and joins segments: empty ones go, rows too far apart become segments of their own, and neighbours
/// that are neighbours at both ends become one.
fn normalise(files: &[u64], blocks: &[u64], segments: &[Segment], options: &PlanOptions) -> Result<Vec<Segment>> {
    let mut sorted = Vec::with_capacity(segments.len());
    for segment in segments.iter().filter(|s| !s.is_empty()) {
        segment.check(files, blocks)?;
        let dense = segment.src_pitch == segment.row_len && segment.dst_pitch == segment.row_len;
        if segment.rows == 1 || dense {
            let Segment { file, offset, block, dst_offset, .. } = *segment;
            sorted.push(Segment::contiguous(file, offset, segment.len(), block, dst_offset));
        } else if segment.parts(options) > 1 {
            sorted.extend((0..segment.rows).map(|row| {
                let one = segment.part(row, 1, 0, segment.row_len);
                Segment::contiguous(one.file, one.offset, one.row_len, one.block, one.dst_offset)
            }));
        } else {
            sorted.push(*segment);
        }
    }
    sorted.sort_by_key(|s| (s.file, s.offset));
    let mut joined: Vec<Segment> = Vec::with_capacity(sorted.len());
    for segment in sorted {
        if let Some(last) = joined.last_mut() {
            let follows = (last.file, last.block) == (segment.file, segment.block)
                && last.offset + last.row_len == segment.offset
                && last.dst_offset + last.row_len == segment.dst_offset;
            if follows && last.rows == 1 && segment.rows == 1 {
                *last = Segment::contiguous(
                    last.file,
                    last.offset,
                    last.row_len + segment.row_len,
                    last.block,
                    last.dst_offset,
                );
                continue;
            }
        }
        joined.push(segment);
    }
    Ok(joined)
}

/// The parts of segments that lie in a range of their file, in its order.
fn clip_all<'a>(segments: impl Iterator<Item = &'a Segment>, range: &Range<u64>) -> Vec<Segment> {
    let mut parts = Vec::new();
    for segment in segments {
        clip(segment, range, &mut parts);
    }
    parts.sort_unstable_by_key(|part| part.offset);
    parts
}

/// Adds the parts of a segment that lie in a range of its file: at most a broken row, whole rows, a broken row.
fn clip(segment: &Segment, range: &Range<u64>, parts: &mut Vec<Segment>) {
    let row_start = |row: u64| segment.offset + row * segment.src_pitch;
    // Rows first..last have bytes in the range.
    let first = if range.start <= segment.offset {
        0
    } else {
        let row = (range.start - segment.offset) / segment.src_pitch;
        if row_start(row) + segment.row_len <= range.start { row + 1 } else { row }
    };
    let last = if range.end <= segment.offset {
        0
    } else {
        segment.rows.min((range.end - segment.offset).div_ceil(segment.src_pitch))
    };
    let broken = |row: u64| row_start(row) < range.start || row_start(row) + segment.row_len > range.end;
    let mut row = first;
    while row < last {
        if broken(row) {
            let from = range.start.saturating_sub(row_start(row));
            let to = segment.row_len.min(range.end - row_start(row));
            parts.push(segment.part(row, 1, from, to));
            row += 1;
        } else {
            let end = if broken(last - 1) { last - 1 } else { last };
            parts.push(segment.part(row, end - row, 0, segment.row_len));
            row = end;
        }
    }
}

#[cfg(test)]
mod tests;
