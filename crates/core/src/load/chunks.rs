//! Checksums of chunks that arrive in pieces, in whatever order and by whatever lane.
//!
//! A chunk is longer than a piece may be if the staging ring is to stay in the processor's cache. So each piece's
//! checksum is taken while the piece is there, and who brings a chunk's last piece combines them: CRCs of neighbours
//! give the CRC of both.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

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
    /// Bytes of its last piece.
    last_len: u64,
    /// Pieces that have not arrived.
    left: AtomicUsize,
    /// The checksum of each piece that has.
    sums: Box<[AtomicU64]>,
}

/// A chunk whose bytes are all there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arrived {
    pub(super) file: usize,
    pub(super) number: u64,
    /// The CRC-64/NVME of its bytes.
    pub(super) sum: u64,
}

impl Chunks {
    /// The chunks of `pieces`, which are those of a plan made with these lengths: in order, and whole chunks.
    pub(super) fn new(chunk_len: u64, piece_len: u64, pieces: &[Piece]) -> Chunks {
        let of_one = |a: &Piece, b: &Piece| (a.file, a.offset / chunk_len) == (b.file, b.offset / chunk_len);
        let chunk = |pieces: &[Piece]| Chunk {
            file: pieces[0].file,
            number: pieces[0].offset / chunk_len,
            last_len: pieces[pieces.len() - 1].len,
            left: AtomicUsize::new(pieces.len()),
            sums: pieces.iter().map(|_| AtomicU64::new(0)).collect(),
        };
        Chunks { chunk_len, piece_len, chunks: pieces.chunk_by(of_one).map(chunk).collect() }
    }

    /// Bytes of a piece: equal parts of a chunk, none longer than `most`, which is whole pages.
    pub(crate) fn piece_len(chunk_len: u64, most: u64) -> u64 {
        chunk_len.div_ceil(chunk_len.div_ceil(most)).next_multiple_of(PAGE)
    }

    /// Takes a piece's checksum, which comes once; its chunk's where no other piece is missing.
    pub(super) fn take(&self, piece: &Piece, sum: u64) -> Option<Arrived> {
        let (file, number) = (piece.file, piece.offset / self.chunk_len);
        let place = self.chunks.binary_search_by_key(&(file, number), |chunk| (chunk.file, chunk.number)).ok()?;
        let chunk = &self.chunks[place];
        let part = usize::try_from(piece.offset % self.chunk_len / self.piece_len).ok()?;
        chunk.sums.get(part)?.store(sum, Ordering::Relaxed);
        // Who takes the last piece sees the checksums of all, which were stored before their pieces were counted.
        (chunk.left.fetch_sub(1, Ordering::AcqRel) == 1).then(|| Arrived {
            file,
            number,
            sum: chunk.sum(self.piece_len),
        })
    }

    /// Whether the checksum of every chunk was given out.
    pub(super) fn all_arrived(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.left.load(Ordering::Acquire) == 0)
    }
}

impl Chunk {
    fn sum(&self, piece_len: u64) -> u64 {
        let last = self.sums.len() - 1;
        let mut sums = self.sums.iter().map(|sum| sum.load(Ordering::Relaxed)).enumerate();
        let first = sums.next().map_or(0, |(_, sum)| sum);
        sums.fold(first, |sum, (i, next)| combine(sum, next, if i == last { self.last_len } else { piece_len }))
    }
}

/// The polynomial of CRC-64/NVME, highest power last (<https://reveng.sourceforge.io/crc-catalogue/>).
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;
/// The polynomials 1 and x^8.
const ONE: u64 = 1 << 63;
const BYTE: u64 = 1 << 55;

/// The checksum of bytes with checksum `a`, and after them `len` bytes with checksum `b`.
///
/// What follows multiplies what was before by x^8 for each byte. crc-fast has the same, by matrices, in 100 us: as much
/// as the checksum of a piece takes. This is 2 us.
fn combine(a: u64, b: u64, len: u64) -> u64 {
    let (mut shift, mut power, mut rest) = (ONE, BYTE, len);
    while rest > 0 {
        if rest & 1 == 1 {
            shift = multiply(shift, power);
        }
        power = multiply(power, power);
        rest >>= 1;
    }
    multiply(shift, a) ^ b
}

/// The product of two polynomials, modulo that of the checksum.
fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    for power in (0..64).rev() {
        product ^= b & (a >> power & 1).wrapping_neg();
        b = b >> 1 ^ POLYNOMIAL & (b & 1).wrapping_neg();
    }
    product
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
                let chunks = Chunks::new(chunk_len, piece_len, pieces);
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
    fn checksums_are_combined_as_the_library_combines_them() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        for at in [0, 1, 4096, 65_537, 99_999, 100_000] {
            let (a, b) = bytes.split_at(at);
            let len = b.len() as u64;
            let (a, b) = (crc64_nvme(a), crc64_nvme(b));
            assert_eq!(combine(a, b, len), crc64_nvme(&bytes));
        }
        for len in [1 << 21, (1 << 30) + 12_345, u64::MAX] {
            let of_library = crc_fast::checksum_combine(crc_fast::CrcAlgorithm::Crc64Nvme, 0xdead_beef, 7, len);
            assert_eq!(combine(0xdead_beef, 7, len), of_library);
        }
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
