//! Copies between blocks of one device: out of memory that another process filled, to where the bytes belong.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::stream::check_rows;
use super::{Block, Device, DeviceError, Source, Stream, StreamCopy};
use crate::error::{Error, Result};
use crate::plan::{PieceCopy, Segment, check_destinations};

/// Threads that copy on the host: one does not fill the memory's bandwidth.
const THREADS: usize = 4;
/// Bytes of a part that one thread copies, on the host.
const PART_LEN: u64 = 2 << 20;

/// Copies between blocks of one device.
#[derive(Debug)]
pub struct Mover {
    stream: Stream,
    device: Device,
}

impl Mover {
    /// A queue of copies of its own on this device.
    pub fn new(device: &Device) -> Result<Mover> {
        Ok(Mover { stream: device.stream()?, device: device.clone() })
    }

    /// Copies rows of `source` to `blocks`, all of this device, and waits until they are there.
    ///
    /// No two copies may go to the same place. `blocks` must be such as a load may fill: nobody uses them meanwhile,
    /// which is so where a load was given them.
    pub fn copy(&self, source: &Block, blocks: &[Block], copies: &[PieceCopy]) -> Result<()> {
        for copy in copies {
            let block = blocks.get(copy.block).ok_or(DeviceError::OutOfBounds)?;
            if !block.device().same_as(&self.device) || !source.device().same_as(&self.device) {
                return Err(Error::Invalid("a copy would leave its device".into()));
            }
            check_rows(copy, source.len(), block.len())?;
            if copy.rows > 1 && copy.dst_pitch < copy.row_len {
                return Err(Error::Invalid(format!("the rows of {copy:?} overlap")));
            }
            if block.addr() < source.addr() + source.len() && source.addr() < block.addr() + block.len() {
                return Err(Error::Invalid("a copy would write where it reads".into()));
            }
        }
        // Threads copy at once.
        check_destinations(&copies.iter().map(segment_of).collect::<Vec<_>>())?;
        let issue = |copy: &PieceCopy| -> Result<(), DeviceError> {
            let from = Source::Device(source.addr() + copy.src_offset);
            let to = blocks.get(copy.block).ok_or(DeviceError::OutOfBounds)?.addr() + copy.dst_offset;
            // SAFETY: `check_rows` found all rows inside both blocks, which live until the copies were waited for,
            // below; destinations lie apart, and the blocks are the caller's load's alone.
            unsafe { self.stream.stream.copy(&[StreamCopy { source: from, dst: to, rows: *copy }]) }
        };
        let issued = if self.device.is_host() { on_threads(copies, &issue) } else { copies.iter().try_for_each(issue) };
        // Also after an error, for what was issued before it.
        let done = self.stream.synchronize();
        Ok(issued.and(done)?)
    }
}

fn segment_of(copy: &PieceCopy) -> Segment {
    let PieceCopy { src_offset, row_len, rows, src_pitch, block, dst_offset, dst_pitch } = *copy;
    Segment { file: 0, offset: src_offset, row_len, rows, src_pitch, block, dst_offset, dst_pitch }
}

/// Copies by several threads, each taking part by part.
fn on_threads(
    copies: &[PieceCopy],
    issue: &(impl Fn(&PieceCopy) -> Result<(), DeviceError> + Sync),
) -> Result<(), DeviceError> {
    let parts: Vec<PieceCopy> = copies.iter().flat_map(parts).collect();
    let len: u64 = copies.iter().map(PieceCopy::len).sum();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let wanted = usize::try_from(len.div_ceil(PART_LEN)).unwrap_or(THREADS);
    let threads = wanted.clamp(1, THREADS.min(processors));
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    // A thread takes many small parts at once, and few large ones.
    let run = (parts.len() / (threads * 16)).max(1);
    let work = || {
        loop {
            let at = next.fetch_add(run, Ordering::Relaxed);
            let Some(mine) = parts.get(at..(at + run).min(parts.len())).filter(|mine| !mine.is_empty()) else { return };
            if let Err(e) = mine.iter().try_for_each(issue) {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Where no thread can be had, this one copies all.
            let _ = std::thread::Builder::new().name("sllm-mover".into()).spawn_scoped(scope, work);
        }
        work();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// A copy in parts of about [`PART_LEN`] bytes: whole rows, or parts of one row.
fn parts(copy: &PieceCopy) -> Vec<PieceCopy> {
    if copy.len() <= PART_LEN {
        return vec![*copy];
    }
    let mut parts = Vec::new();
    if copy.row_len > PART_LEN {
        for row in 0..copy.rows {
            let mut from = 0;
            while from < copy.row_len {
                let row_len = PART_LEN.min(copy.row_len - from);
                parts.push(PieceCopy {
                    src_offset: copy.src_offset + row * copy.src_pitch + from,
                    dst_offset: copy.dst_offset + row * copy.dst_pitch + from,
                    row_len,
                    rows: 1,
                    ..*copy
                });
                from += row_len;
            }
        }
    } else {
        let step = PART_LEN / copy.row_len;
        let mut row = 0;
        while row < copy.rows {
            parts.push(PieceCopy {
                src_offset: copy.src_offset + row * copy.src_pitch,
                dst_offset: copy.dst_offset + row * copy.dst_pitch,
                rows: step.min(copy.rows - row),
                ..*copy
            });
            row += step;
        }
    }
    parts
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made sizes are small")]
mod tests {
    use super::*;
    use crate::MemoryFile;

    fn filled(len: u64) -> (Block, Vec<u8>) {
        let memory = MemoryFile::new(len).unwrap();
        let bytes: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(i) >> 5) as u8).collect();
        let file = std::fs::File::from(std::os::fd::AsFd::as_fd(&memory).try_clone_to_owned().unwrap());
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
        (memory.block(0, len).unwrap(), bytes)
    }

    fn read(block: &Block) -> Vec<u8> {
        let mut bytes = vec![0; block.len() as usize];
        block.read(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn rows_arrive_where_they_belong_and_nothing_else_is_written() {
        let (source, bytes) = filled(12 << 20);
        let host = Device::host();
        let blocks = [Block::alloc(&host, 9 << 20).unwrap(), Block::alloc(&host, 3 << 20).unwrap()];
        let copy = |src_offset, row_len, rows, src_pitch, block, dst_offset, dst_pitch| PieceCopy {
            src_offset,
            row_len,
            rows,
            src_pitch,
            block,
            dst_offset,
            dst_pitch,
        };
        let copies = [
            copy(3, 5_000_001, 1, 0, 0, 7, 0),           // one long row
            copy(6 << 20, 1000, 3000, 1000, 1, 5, 1024), // many short ones
            copy(6 << 20, 20, 3000, 1000, 1, 1005, 1024),
            copy(1, 1 << 21, 2, 5 << 20, 0, 5_000_008, 1 << 21), // two of the length of a part
        ];
        Mover::new(&host).unwrap().copy(&source, &blocks, &copies).unwrap();
        let mut expected = [vec![0; 9 << 20], vec![0; 3 << 20]];
        for copy in &copies {
            for row in 0..copy.rows {
                let (from, to) = (copy.src_offset + row * copy.src_pitch, copy.dst_offset + row * copy.dst_pitch);
                let row_len = copy.row_len as usize;
                expected[copy.block][to as usize..][..row_len].copy_from_slice(&bytes[from as usize..][..row_len]);
            }
        }
        assert!(blocks.iter().zip(expected).all(|(block, expected)| read(block) == expected));
    }

    #[test]
    fn what_lies_outside_or_meets_is_refused_and_nothing_is_copied() {
        let (source, _) = filled(100);
        let blocks = [Block::alloc(&Device::host(), 100).unwrap()];
        let mover = Mover::new(&Device::host()).unwrap();
        let good =
            PieceCopy { src_offset: 0, row_len: 10, rows: 2, src_pitch: 10, block: 0, dst_offset: 0, dst_pitch: 10 };
        for wrong in [
            PieceCopy { src_offset: 81, ..good },
            PieceCopy { dst_offset: 81, ..good },
            PieceCopy { dst_pitch: 91, ..good },
            PieceCopy { src_pitch: u64::MAX, ..good },
            PieceCopy { rows: u64::MAX, ..good },
            PieceCopy { block: 1, ..good },
            PieceCopy { dst_offset: 15, ..good },
            PieceCopy { dst_offset: 30, dst_pitch: 9, ..good },
        ] {
            assert!(mover.copy(&source, &blocks, &[good, wrong]).is_err(), "{wrong:?}");
        }
        let to_itself = mover.copy(&source, std::slice::from_ref(&source), &[PieceCopy { dst_offset: 50, ..good }]);
        assert!(to_itself.unwrap_err().to_string().contains("where it reads"));
        assert_eq!(read(&blocks[0]), [0; 100]);
        mover.copy(&source, &blocks, &[good, PieceCopy { dst_offset: 20, ..good }]).unwrap();
    }
}
