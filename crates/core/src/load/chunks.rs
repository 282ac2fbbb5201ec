//! Checksums of chunks that arrive in pieces, in whatever order and by whatever lane.
//!
//! A chunk is longer than a piece may be if the staging ring is to stay in the processor's cache. So each piece's
//! checksum is taken while the piece is there, and who brings a chunk's last piece combines them: CRCs of neighbours
//! give the CRC of both. Or the device that a chunk goes to takes its checksum, once all has arrived (`summed.rs`).

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::crc;
use crate::device::Part;
use crate::format::PAGE;
use crate::plan::Piece;

/// The chunks of a plan.
#[derive(Debug)]
pub(crate) struct Chunks {
    chunk_len: u64,
    piece_len: u64,
    /// By file and number.
    chunks: Vec<Chunk>,
}

#[derive(Debug)]
struct Chunk {
    file: usize,
    number: u64,
    len: u64,
    /// Pieces that have not arrived.
    left: AtomicUsize,
    /// The checksum of each piece that has, where lanes take them.
    sums: Box<[AtomicU64]>,
    /// The place of the device that takes its checksum; `None`: the lanes do.
    device: Option<usize>,
    /// The remainder of what it does not see then.
    rest: AtomicU64,
}

/// A chunk whose bytes are all there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arrived {
    pub(super) file: usize,
    pub(super) number: u64,
    /// The CRC-64/NVME of its bytes.
    pub(super) sum: u64,
}

/// A chunk that a device sums up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Summed {
    pub(super) file: usize,
    pub(super) number: u64,
    pub(super) len: u64,
    pub(super) device: usize,
    pub(super) slot: usize,
    /// The remainder of what the device does not see.
    pub(super) rest: u64,
}

impl Chunks {
    /// The chunks of `pieces`, which are those of a plan made with these lengths: in order, and whole chunks. `device_of` a
    /// chunk's pieces is the place of the device that takes its checksum.
    pub(super) fn new(
        chunk_len: u64,
        piece_len: u64,
        pieces: &[Piece],
        device_of: impl Fn(&[Piece]) -> Option<usize>,
    ) -> Chunks {
        let of_one = |a: &Piece, b: &Piece| (a.file, a.offset / chunk_len) == (b.file, b.offset / chunk_len);
        let chunk = |pieces: &[Piece]| Chunk {
            file: pieces[0].file,
            number: pieces[0].offset / chunk_len,
            len: pieces.iter().map(|piece| piece.len).sum(),
            left: AtomicUsize::new(pieces.len()),
            sums: pieces.iter().map(|_| AtomicU64::new(0)).collect(),
            device: device_of(pieces),
            rest: AtomicU64::new(0),
        };
        Chunks { chunk_len, piece_len, chunks: pieces.chunk_by(of_one).map(chunk).collect() }
    }

    /// Number of chunks. Each has a slot.
    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether the device at this place takes some of the checksums.
    pub(super) fn are_for(&self, device: usize) -> bool {
        self.chunks.iter().any(|chunk| chunk.device == Some(device))
    }

    /// Leaves those to the lanes, before a piece comes.
    pub(super) fn leave(&mut self, device: usize) {
        let its = self.chunks.iter_mut().filter(|chunk| chunk.device == Some(device));
        its.for_each(|chunk| chunk.device = None);
    }

    /// A piece's part in a chunk that a device sums up.
    pub(super) fn part(&self, piece: &Piece) -> Option<Part> {
        let (slot, chunk) = self.find(piece)?;
        let to_end = (chunk.number * self.chunk_len + chunk.len).checked_sub(piece.offset)?;
        chunk.device.and(Some(Part { slot: u32::try_from(slot).ok()?, to_end }))
    }

    /// Counts a piece that a device sums up, but for bytes of this remainder.
    pub(super) fn arrive(&self, piece: &Piece, rest: u64) {
        if let Some((_, chunk)) = self.find(piece) {
            chunk.rest.fetch_xor(rest, Ordering::Relaxed);
            chunk.left.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The chunks that devices sum up.
    pub(super) fn summed(&self) -> impl Iterator<Item = Summed> {
        let by_device = |(slot, chunk): (usize, &Chunk)| {
            let (&Chunk { file, number, len, .. }, rest) = (chunk, chunk.rest.load(Ordering::Relaxed));
            Some(Summed { file, number, len, device: chunk.device?, slot, rest })
        };
        self.chunks.iter().enumerate().filter_map(by_device)
    }

    fn find(&self, piece: &Piece) -> Option<(usize, &Chunk)> {
        let key = (piece.file, piece.offset / self.chunk_len);
        let place = self.chunks.binary_search_by_key(&key, |chunk| (chunk.file, chunk.number)).ok()?;
        Some((place, &self.chunks[place]))
    }

    /// Bytes of a piece: equal parts of a chunk, none longer than `most`, which is whole pages.
    pub(crate) fn piece_len(chunk_len: u64, most: u64) -> u64 {
        chunk_len.div_ceil(chunk_len.div_ceil(most)).next_multiple_of(PAGE)
    }

    /// Takes a piece's checksum, which comes once; its chunk's where no other piece is missing.
    pub(super) fn take(&self, piece: &Piece, sum: u64) -> Option<Arrived> {
        let (_, chunk) = self.find(piece)?;
        let part = usize::try_from(piece.offset % self.chunk_len / self.piece_len).ok()?;
        chunk.sums.get(part)?.store(sum, Ordering::Relaxed);
        // Who takes the last piece sees the checksums of all, which were stored before their pieces were counted.
        let is_last = chunk.left.fetch_sub(1, Ordering::AcqRel) == 1;
        is_last.then(|| Arrived { file: chunk.file, number: chunk.number, sum: chunk.sum(self.piece_len) })
    }

    /// Whether all pieces have arrived, so that the checksum of every chunk that no device takes was given out.
    pub(super) fn all_arrived(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.left.load(Ordering::Acquire) == 0)
    }
}

impl Chunk {
    fn sum(&self, piece_len: u64) -> u64 {
        let last = self.sums.len() - 1;
        let last_len = self.len - last as u64 * piece_len;
        let mut sums = self.sums.iter().map(|sum| sum.load(Ordering::Relaxed)).enumerate();
        let first = sums.next().map_or(0, |(_, sum)| sum);
        sums.fold(first, |sum, (i, next)| crc::combine(sum, next, if i == last { last_len } else { piece_len }))
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made sizes are small")]
mod tests {
    use crc_fast::crc64_nvme;

    use super::*;
    use crate::plan::{LoadPlan, PlanOptions, Segment};

    /// Files of which every byte is wanted.
    fn plan(lens: &[u64], chunk_len: u64, piece_len: u64) -> LoadPlan {
        let wants = lens.iter().enumerate().map(|(file, &len)| Segment::contiguous(file, 0, len, file, 0));
        let options = PlanOptions { piece_len, chunk_len: Some(chunk_len), ..PlanOptions::default() };
        LoadPlan::build(lens, lens, &wants.collect::<Vec<_>>(), &options).unwrap()
    }

    #[test]
    fn pieces_in_any_order_give_the_checksum_of_their_chunk() {
        let lens = [1_000_003, 65_536, 1, 0, 200_000];
        let contents: Vec<Vec<u8>> =
            (2u64..).zip(lens).map(|(seed, len)| (0..len).map(|i| ((i * i * seed) >> 5) as u8).collect()).collect();
        for (chunk_len, piece_len) in [(65_536, 65_536), (65_536, 32_768), (65_536, 24_576), (40_960, 4096)] {
            let plan = plan(&lens, chunk_len, piece_len);
            for stride in [1, 7, 101] {
                let pieces = plan.pieces();
                assert_ne!(pieces.len() % 101, 0, "each stride must reach every piece");
                assert_ne!(pieces.len() % 7, 0);
                let chunks = Chunks::new(chunk_len, piece_len, pieces, |_| None);
                let bytes = |file: usize, from: u64, to: u64| &contents[file][from as usize..to as usize];
                assert!(!chunks.all_arrived());
                let mut arrived: Vec<Arrived> = (0..pieces.len())
                    .map(|i| &pieces[i * stride % pieces.len()])
                    .filter_map(|piece| {
                        let bytes = bytes(piece.file, piece.offset, piece.offset + piece.len);
                        chunks.take(piece, crc64_nvme(bytes))
                    })
                    .collect();
                assert!(chunks.all_arrived());
                arrived.sort_unstable_by_key(|chunk| (chunk.file, chunk.number));
                let expected: Vec<Arrived> = (0..lens.len())
                    .flat_map(|file| (0..lens[file].div_ceil(chunk_len)).map(move |number| (file, number)))
                    .map(|(file, number)| {
                        let from = number * chunk_len;
                        let sum = crc64_nvme(bytes(file, from, (from + chunk_len).min(lens[file])));
                        Arrived { file, number, sum }
                    })
                    .collect();
                assert_eq!(arrived, expected, "chunks of {chunk_len}, pieces of {piece_len}, stride {stride}");
            }
        }
    }

    #[test]
    fn a_chunk_is_the_lanes_or_one_devices() {
        let plan = plan(&[100_000], 40_960, 20_480);
        let pieces = plan.pieces();
        let device_of = |pieces: &[Piece]| [Some(6), Some(7), None][pieces[0].offset as usize / 40_960];
        let mut chunks = Chunks::new(40_960, 20_480, pieces, device_of);
        assert_eq!([5, 6, 7].map(|device| chunks.are_for(device)), [false, true, true]);
        chunks.leave(6);
        let parts: Vec<Option<Part>> = pieces.iter().map(|piece| chunks.part(piece)).collect();
        let of_device = [40_960, 20_480].map(|to_end| Some(Part { slot: 1, to_end }));
        assert_eq!(parts, [None, None, of_device[0], of_device[1], None]);
        chunks.arrive(&pieces[3], 5);
        chunks.arrive(&pieces[2], 3);
        let summed: Vec<Summed> = chunks.summed().collect();
        assert_eq!(summed, [Summed { file: 0, number: 1, len: 40_960, device: 7, slot: 1, rest: 6 }]);
        assert!(!chunks.all_arrived());
        assert_eq!([0, 1, 4].map(|piece| chunks.take(&pieces[piece], 0).is_some()), [false, true, true]);
        assert!(chunks.all_arrived());
    }

    #[test]
    fn pieces_are_equal_parts_of_a_chunk() {
        let of = |chunk_len, most| Chunks::piece_len(chunk_len, most);
        assert_eq!(of(4 << 20, 3 << 20), 2 << 20);
        assert_eq!(of(4 << 20, 4 << 20), 4 << 20);
        assert_eq!(of(1 << 30, 3 << 20), (1u64 << 30).div_ceil(342).next_multiple_of(PAGE));
        assert_eq!((of(PAGE, 3 << 20), of(4 << 20, PAGE)), (PAGE, PAGE));
        assert_eq!(of(3 * PAGE, 2 * PAGE), 2 * PAGE);
    }
}
