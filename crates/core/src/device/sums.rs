//! Checksums of chunks, taken on the device that they were copied to: bytes are compared where they are used, and the
//! processor, which a load with checksums keeps busy otherwise, has nothing to do.

use std::fmt;
use std::ops::Range;

use super::{Block, DeviceError};
use crate::plan::PieceCopy;

/// Bytes that a device sums up as one.
const WORD: u64 = 8;
/// Bytes of a copy at least, in the mean of a piece's: for each a block of the device's threads starts.
const MEAN_COPY: u64 = 4096;
/// Bytes of a piece at most that the device does not see, and in how many parts, each of which takes the processor 4 us; of a
/// piece with more it takes the checksum as a whole.
const MOST_OF_REST: u64 = 128 << 10;
const MOST_GAPS: usize = 16;

/// What takes checksums of what one stream brings.
pub(crate) trait BackendSums: Send + Sync + fmt::Debug {
    /// Begins anew, with so many slots.
    fn begin(&mut self, slots: usize) -> Result<(), DeviceError>;
    /// Adds to slots what these runs are worth, once what was issued to the stream so far is there.
    ///
    /// # Safety
    /// The runs lie in live memory, which stays so, and unchanged, until `take` or `stop` has returned.
    unsafe fn add(&self, runs: &[Run]) -> Result<(), DeviceError>;
    /// Waits for all that were added, and gives the remainder in each slot.
    fn take(&self) -> Result<Vec<u64>, DeviceError>;
    /// Waits for what goes on, and forgets the rest.
    fn stop(&self);
}

/// A run of rows that follow one another in a chunk, on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Address of the first row.
    pub(crate) addr: u64,
    /// Bytes from row to row.
    pub(crate) pitch: u64,
    /// Words of a row.
    pub(crate) row: u32,
    /// Words of all rows.
    pub(crate) words: u32,
    /// Bytes of the chunk after them.
    pub(crate) after: u32,
    /// The chunk's slot.
    pub(crate) slot: u32,
}

/// A piece's place in a chunk that its device sums up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// The chunk's slot.
    pub(crate) slot: u32,
    /// From the piece's first byte to the chunk's end.
    pub(crate) to_end: u64,
}

impl Part {
    /// The run that a copy of the piece to this address brings; of no words where it is shorter than one.
    pub(super) fn run(self, copy: &PieceCopy, addr: u64) -> Result<Run, DeviceError> {
        let fits = |n: u64| u32::try_from(n).map_err(|_| DeviceError::OutOfBounds);
        let len = copy.len() / WORD * WORD;
        let after = self.to_end.checked_sub(copy.src_offset).and_then(|rest| rest.checked_sub(len));
        Ok(Run {
            addr,
            pitch: copy.dst_pitch,
            row: fits(copy.row_len / WORD)?,
            words: fits(len / WORD)?,
            after: fits(after.ok_or(DeviceError::OutOfBounds)?)?,
            slot: self.slot,
        })
    }
}

/// The device that can sum up a piece of `len` bytes by what these copies leave there, but for little: see [`gaps`].
/// `devices` has that of each block, where it takes checksums.
pub(crate) fn summed_by(len: u64, copies: &[PieceCopy], blocks: &[Block], devices: &[Option<usize>]) -> Option<usize> {
    let device_of = |copy: &PieceCopy| devices.get(copy.block).copied().flatten();
    let device = device_of(copies.first()?)?;
    let is_word = |n: u64| n.is_multiple_of(WORD);
    let is_summable = |copy: &PieceCopy| {
        let in_rows = || copy.src_pitch == copy.row_len && is_word(copy.row_len) && is_word(copy.dst_pitch);
        let begins = blocks.get(copy.block).is_some_and(|block| is_word(block.addr() + copy.dst_offset));
        device_of(copy) == Some(device) && begins && (copy.rows == 1 || in_rows())
    };
    let is_once = |pair: &[PieceCopy]| pair[0].src_offset + pair[0].len() <= pair[1].src_offset;
    let are_long = copies.len() as u64 <= (len / MEAN_COPY).max(1);
    if !(are_long && copies.windows(2).all(is_once) && copies.iter().all(is_summable)) {
        return None;
    }
    let (count, rest) = gaps(len, copies).fold((0, 0), |(count, rest), gap| (count + 1, rest + gap.end - gap.start));
    (count <= MOST_GAPS && rest <= MOST_OF_REST).then_some(device)
}

/// What the runs of these copies leave of a piece of `len` bytes: what is not copied, and ends of copies that are no whole
/// words. The copies lie in order, none in another.
pub(crate) fn gaps(len: u64, copies: &[PieceCopy]) -> impl Iterator<Item = Range<u64>> {
    let ends = copies.iter().map(|copy| copy.src_offset + copy.len() / WORD * WORD);
    let starts = copies.iter().map(|copy| copy.src_offset);
    let gaps = std::iter::once(0).chain(ends).zip(starts.chain(std::iter::once(len)));
    gaps.map(|(start, end)| start..end).filter(|gap| gap.start != gap.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    const LEN: u64 = 1 << 20;

    fn copy(src_offset: u64, len: u64, block: usize, dst_offset: u64) -> PieceCopy {
        PieceCopy { src_offset, row_len: len, rows: 1, src_pitch: len, block, dst_offset, dst_pitch: len }
    }

    #[test]
    fn a_device_sums_up_what_is_all_there_in_whole_words() {
        let host = Device::host();
        let blocks = [LEN, 2 * LEN, LEN, LEN].map(|len| Block::alloc(&host, len).unwrap());
        let devices = [Some(0), Some(0), Some(1), None];
        let by = |copies: &[PieceCopy]| summed_by(LEN, copies, &blocks, &devices);
        assert_eq!(by(&[copy(0, LEN, 0, 0)]), Some(0));
        assert_eq!(by(&[copy(0, 8, 1, 800), copy(8, LEN - 8, 0, 0)]), Some(0), "in two blocks");
        let rows = PieceCopy { row_len: 1024, rows: 1024, src_pitch: 1024, dst_pitch: 2048, ..copy(0, 0, 1, 1024) };
        assert_eq!(by(&[rows]), Some(0), "rows that lie apart on the device");
        let apart = PieceCopy { row_len: 512, ..rows };
        assert_eq!(by(&[apart]), None, "rows that lie apart in the chunk");
        assert_eq!(by(&[]), None, "nothing is copied");
        assert_eq!(by(&[copy(7, LEN - 80, 0, 0)]), Some(0), "little is not copied");
        assert_eq!(by(&[copy(0, 1001, 0, 0), copy(1001, 99, 1, 0), copy(1200, LEN - 1200, 0, 1200)]), Some(0));
        assert_eq!(by(&[copy(0, LEN / 2, 0, 0)]), None, "much is not");
        assert_eq!(by(&[copy(0, LEN, 0, 0), copy(LEN - 8, 8, 1, 0)]), None, "some is copied twice");
        assert_eq!(by(&[copy(0, LEN - 8, 0, 0), copy(LEN - 16, 8, 1, 0)]), None);
        assert_eq!(by(&[copy(0, LEN, 1, 4)]), None, "no whole words there");
        let odd = [PieceCopy { dst_pitch: 2044, ..rows }, PieceCopy { row_len: 1023, src_pitch: 1023, ..rows }];
        assert_eq!(odd.map(|rows| by(&[rows])), [None, None]);
        let crumbs: Vec<PieceCopy> = (0..LEN / 8).map(|n| copy(8 * n, 8, 0, 8 * n)).collect();
        assert_eq!(by(&crumbs), None, "too many copies");
        let holes = |len: u64| (0..16).map(|n| copy(n * LEN / 16, LEN / 16 - len, 0, n * LEN / 16)).collect::<Vec<_>>();
        assert_eq!(
            [by(&holes(0)), by(&holes(256)), by(&holes(16_384))],
            [Some(0), Some(0), None],
            "too much is left out"
        );
        let eighteen: Vec<PieceCopy> = (0..18).map(|n| copy(n * 57_344, 57_000, 0, n * 57_344)).collect();
        assert_eq!(by(&eighteen), None, "in too many places");
        assert_eq!(by(&[copy(0, LEN, 2, 0)]), Some(1), "another device");
        assert_eq!(by(&[copy(0, 4096, 0, 0), copy(4096, LEN - 4096, 2, 0)]), None, "two devices");
        assert_eq!(by(&[copy(0, LEN, 3, 0)]), None, "a device that takes none");
        assert_eq!(by(&[copy(0, LEN, 7, 0)]), None, "no such block");
    }

    #[test]
    fn runs_and_gaps_are_all_of_a_piece() {
        let copies = [copy(7, 1001, 0, 0), copy(1008, 2000, 0, 0), copy(3100, 5, 0, 0), copy(4000, 96, 0, 0)];
        let found: Vec<Range<u64>> = gaps(4096, &copies).collect();
        assert_eq!(found, [0..7, 1007..1008, 3008..3100, 3100..4000]);
        assert!(gaps(100, &[copy(0, 96, 0, 0)]).eq(std::iter::once(96..100)));
        assert_eq!(gaps(96, &[copy(0, 96, 0, 0)]).count(), 0);
        assert!(gaps(96, &[]).eq(std::iter::once(0..96)));
    }

    #[test]
    fn a_run_knows_what_follows_it_in_its_chunk() {
        let rows = PieceCopy { rows: 4, row_len: 1024, src_pitch: 1024, dst_pitch: 4096, ..copy(512, 0, 0, 0) };
        let run = Part { slot: 3, to_end: 10_240 }.run(&rows, 77_000).unwrap();
        assert_eq!(run, Run { addr: 77_000, pitch: 4096, row: 128, words: 512, after: 10_240 - 512 - 4096, slot: 3 });
        assert!(Part { slot: 0, to_end: 4600 }.run(&rows, 0).is_err(), "it passes the chunk's end");
        assert!(Part { slot: 0, to_end: 1 << 40 }.run(&rows, 0).is_err());
    }
}
