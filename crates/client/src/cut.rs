//! Cutting what a load wants: into messages that are not too long, and into parts that fit staging memory.

use sllm_core::{PieceCopy, Segment};
use sllm_proto::store as pb;

/// Segments of one message at most. Each takes 90 bytes at most, so that a message has fewer than
/// [`sllm_proto::MAX_MESSAGE_LEN`].
pub(crate) const MESSAGE_SEGMENTS: usize = 80_000;
/// Where a segment that follows nothing begins in staging memory.
const ALIGN: u64 = 256;
/// Rows of more bytes are cut where the memory ends, so that little of it stays empty.
const WHOLE_ROW: u64 = 1 << 20;

/// What fits staging memory: what the server writes there, and the copies that bring it to its places.
#[derive(Debug, Default)]
pub(crate) struct Part {
    pub(crate) segments: Vec<pb::Segment>,
    pub(crate) copies: Vec<PieceCopy>,
    /// Bytes wanted.
    pub(crate) len: u64,
}

/// Cuts segments into parts, in their order. They lie inside their files and blocks, and none is empty.
#[derive(Debug)]
pub(crate) struct Cutter {
    segments: Vec<Segment>,
    /// The first segment that is not cut, and how much of it is: rows, and bytes of the row after them.
    next: usize,
    row: u64,
    byte: u64,
}

impl Cutter {
    pub(crate) fn new(segments: Vec<Segment>) -> Cutter {
        Cutter { segments, next: 0, row: 0, byte: 0 }
    }

    /// The next part, for `room` bytes of staging memory from `base` on, which is block `block` of the server's;
    /// `None` when all is cut.
    pub(crate) fn part(&mut self, block: u32, base: u64, room: u64) -> Option<Part> {
        let mut part = Part::default();
        let mut used = 0;
        while part.segments.len() < MESSAGE_SEGMENTS && part.copies.len() < MESSAGE_SEGMENTS {
            let Some(&segment) = self.segments.get(self.next) else { break };
            let row_len = segment.row_len;
            let offset = segment.offset + self.row * segment.src_pitch + self.byte;
            let follows = part.segments.last().is_some_and(|last| {
                last.rows == 1
                    && (usize::try_from(last.file), last.offset + last.row_len) == (Ok(segment.file), offset)
                    && last.dst_offset + last.row_len == base + used
            });
            let at = if follows { used } else { used.next_multiple_of(ALIGN) };
            let left = room.saturating_sub(at);
            let rest = row_len - self.byte;
            let (rows, bytes) = if self.byte == 0 && row_len <= left {
                ((segment.rows - self.row).min(left / row_len), row_len)
            } else if rest <= left {
                (1, rest)
            } else if rest > WHOLE_ROW && left >= ALIGN {
                (1, left / ALIGN * ALIGN)
            } else {
                break;
            };
            let copy = PieceCopy {
                src_offset: base + at,
                row_len: bytes,
                rows,
                src_pitch: bytes,
                block: segment.block,
                dst_offset: segment.dst_offset + self.row * segment.dst_pitch + self.byte,
                dst_pitch: segment.dst_pitch,
            };
            part.add(block, segment.file, (offset, segment.src_pitch), copy, follows);
            used = at + rows * bytes;
            if self.byte + bytes == row_len {
                (self.row, self.byte) = (self.row + rows, 0);
            } else {
                self.byte += bytes;
            }
            if self.row == segment.rows {
                (self.next, self.row) = (self.next + 1, 0);
            }
        }
        (part.len > 0).then_some(part)
    }
}

impl Part {
    fn add(&mut self, block: u32, file: usize, (offset, pitch): (u64, u64), copy: PieceCopy, follows: bool) {
        self.len += copy.len();
        match self.segments.last_mut() {
            Some(last) if follows && copy.rows == 1 => last.row_len += copy.row_len,
            _ => self.segments.push(pb::Segment {
                // The checkpoint's files were counted when they were told to the server.
                file: u32::try_from(file).unwrap_or(u32::MAX),
                offset,
                row_len: copy.row_len,
                rows: copy.rows,
                src_pitch: if copy.rows > 1 { pitch } else { 0 },
                block,
                dst_offset: copy.src_offset,
                dst_pitch: if copy.rows > 1 { copy.row_len } else { 0 },
            }),
        }
        match self.copies.last_mut() {
            Some(last)
                if (last.rows, copy.rows, last.block) == (1, 1, copy.block)
                    && last.src_offset + last.row_len == copy.src_offset
                    && last.dst_offset + last.row_len == copy.dst_offset =>
            {
                last.row_len += copy.row_len;
                last.src_pitch = last.row_len;
                last.dst_pitch = last.row_len;
            }
            _ => self.copies.push(PieceCopy { dst_pitch: copy.dst_pitch.max(copy.row_len), ..copy }),
        }
    }
}

/// A segment as the server is told it: its block is the server's, in which the client's begins at `base`.
pub(crate) fn message(segment: &Segment, block: u32, base: u64) -> pb::Segment {
    let many = segment.rows > 1;
    pb::Segment {
        file: u32::try_from(segment.file).unwrap_or(u32::MAX),
        offset: segment.offset,
        row_len: segment.row_len,
        rows: segment.rows,
        src_pitch: if many { segment.src_pitch } else { 0 },
        block,
        dst_offset: base + segment.dst_offset,
        dst_pitch: if many { segment.dst_pitch } else { 0 },
    }
}

#[cfg(test)]
mod tests;
