//! A session is compared with an oracle that copies every segment at once, in the order in which they were added.

use std::fs;

use proptest::prelude::*;
use test_support::{header, noise, safetensors};

use super::*;
use crate::device::Device;

const FILE_LEN: u64 = 200_000;
const BLOCK_LEN: u64 = 100_000;
const BLOCKS: usize = 3;

struct Bench {
    _dir: tempfile::TempDir,
    checkpoint: Arc<Checkpoint>,
    /// The data file, header and all.
    bytes: Vec<u8>,
    blocks: Vec<Block>,
    expected: Vec<Vec<u8>>,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = safetensors(header(FILE_LEN), &noise(1, usize::try_from(FILE_LEN).unwrap()));
    fs::write(&path, &bytes).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
    let blocks: Vec<Block> = (0..BLOCKS).map(|_| Block::alloc(&Device::host(), BLOCK_LEN).unwrap()).collect();
    let expected = blocks.iter().map(contents).collect();
    Bench { _dir: dir, checkpoint, bytes, blocks, expected }
}

fn contents(block: &Block) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(block.len()).unwrap()];
    block.read(0, &mut bytes).unwrap();
    bytes
}

impl Bench {
    fn expect(&mut self, block: usize, segment: &Segment) {
        for row in 0..segment.rows {
            let at = |start: u64, pitch: u64| usize::try_from(start + row * pitch).unwrap();
            let (from, to) = (at(segment.offset, segment.src_pitch), at(segment.dst_offset, segment.dst_pitch));
            let len = usize::try_from(segment.row_len).unwrap();
            self.expected[block][to..to + len].copy_from_slice(&self.bytes[from..from + len]);
        }
    }
}

fn segments() -> impl Strategy<Value = Vec<(usize, Segment, bool)>> {
    let one = (0..BLOCKS, 1u64..40, 1u64..600, 0u64..900, 0u64..900, any::<(u32, u32)>(), prop::bool::weighted(0.1));
    let segment = one.prop_map(|(block, rows, row_len, src_gap, dst_gap, (from, to), wait)| {
        let (src_pitch, dst_pitch) = (row_len + src_gap, row_len + dst_gap);
        let free = |len: u64, pitch: u64| len - ((rows - 1) * pitch + row_len);
        let offset = u64::from(from) % free(FILE_LEN, src_pitch);
        let dst_offset = u64::from(to) % free(BLOCK_LEN, dst_pitch);
        let segment = Segment { file: 0, offset, row_len, rows, src_pitch, block: 0, dst_offset, dst_pitch };
        (block, segment, wait)
    });
    prop::collection::vec(segment, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_was_added_later_is_written_later(added in segments()) {
        let mut bench = bench();
        let session = Loader::builder().threads(2).build().unwrap().session(Arc::clone(&bench.checkpoint)).unwrap();
        for (block, segment, wait) in &added {
            session.add(&bench.blocks[*block], [*segment]).unwrap();
            bench.expect(*block, segment);
            if *wait {
                session.wait().unwrap();
                prop_assert_eq!(&contents(&bench.blocks[*block]), &bench.expected[*block]);
            }
        }
        let wanted: u64 = added.iter().map(|(_, segment, _)| segment.len()).sum();
        let report = session.finish().unwrap();
        prop_assert_eq!(report.map_or(0, |report| report.bytes), wanted);
        for (block, expected) in bench.blocks.iter().zip(&bench.expected) {
            prop_assert_eq!(&contents(block), expected);
        }
    }
}

#[test]
fn batches_gather_while_one_moves() {
    let bench = bench();
    let session = Loader::builder().build().unwrap().session(Arc::clone(&bench.checkpoint)).unwrap();
    for i in 0..100 {
        session.add(&bench.blocks[0], [Segment::contiguous(0, 300 + i * 100, 100, 0, i * 100)]).unwrap();
    }
    // Nothing is moved for so few bytes until someone waits; then all of it is one read.
    assert_eq!(session.read_len(), 0);
    let report = session.finish().unwrap().unwrap();
    assert_eq!((report.pieces, report.bytes), (1, 10_000));
}

#[test]
fn each_of_several_waiters_waits_for_what_was_added_before() {
    let bench = bench();
    let session = Loader::builder().build().unwrap().session(Arc::clone(&bench.checkpoint)).unwrap();
    let segment = Segment::contiguous(0, 300, 100, 0, 0);
    for round in 0..100 {
        session.add(&bench.blocks[0], [segment]).unwrap();
        std::thread::scope(|scope| {
            let wait = || session.wait_for(Duration::from_secs(5)).unwrap();
            let waiters = [scope.spawn(wait), scope.spawn(wait)];
            assert!(wait());
            // Not theirs to wait for, if they wait already.
            session.add(&bench.blocks[0], [segment]).unwrap();
            for waiter in waiters {
                assert!(waiter.join().unwrap(), "a waiter of round {round} was forgotten");
            }
        });
    }
}

#[test]
fn a_wrong_segment_is_refused_and_the_session_goes_on() {
    let mut bench = bench();
    let session = Loader::builder().build().unwrap().session(Arc::clone(&bench.checkpoint)).unwrap();
    let good = Segment::contiguous(0, 300, 100, 0, 0);
    for wrong in [
        Segment { file: 1, ..good },
        Segment { offset: u64::MAX - 5, ..good },
        Segment { dst_offset: BLOCK_LEN - 99, ..good },
        Segment { rows: 2, dst_pitch: 0, ..good },
        Segment { rows: u64::MAX, ..good },
    ] {
        assert!(session.add(&bench.blocks[0], [wrong]).is_err(), "{wrong:?}");
    }
    session.add(&bench.blocks[0], [good]).unwrap();
    bench.expect(0, &good);
    session.finish().unwrap();
    assert_eq!(contents(&bench.blocks[0]), bench.expected[0]);
}

#[test]
fn an_error_is_told_once_and_ends_the_session() {
    let bench = bench();
    let session = Loader::builder().build().unwrap().session(Arc::clone(&bench.checkpoint)).unwrap();
    let file = fs::File::options().write(true).open(bench.checkpoint.files()[0].path()).unwrap();
    file.set_len(1000).unwrap();
    session.add(&bench.blocks[0], [Segment::contiguous(0, 50_000, 100, 0, 0)]).unwrap();
    assert!(matches!(session.wait(), Err(Error::Truncated { .. })));
    assert!(matches!(session.wait(), Err(Error::Invalid(_))));
    assert!(session.add(&bench.blocks[0], [Segment::contiguous(0, 0, 1, 0, 0)]).is_err());
}

#[test]
fn a_session_without_segments_has_no_report() {
    let bench = bench();
    let session = Loader::builder().build().unwrap().session(Arc::clone(&bench.checkpoint)).unwrap();
    assert!(session.finish().unwrap().is_none());
}

#[test]
fn a_dropped_session_writes_nothing_more() {
    let bench = bench();
    let session = Loader::builder().build().unwrap().session(Arc::clone(&bench.checkpoint)).unwrap();
    session.add(&bench.blocks[0], [Segment::contiguous(0, 300, 100, 0, 0)]).unwrap();
    drop(session);
    assert_eq!(contents(&bench.blocks[0]), bench.expected[0]);
}

/// One that is compared with all others takes minutes to add here.
#[test]
fn many_segments_in_descending_order_are_one_batch() {
    let block = Block::alloc(&Device::host(), 8 << 20).unwrap();
    let mut batch = Batch::default();
    let of = |number: u64| Segment::contiguous(0, 0, 16, 0, number * 16);
    assert!((0..1 << 19).rev().all(|number| batch.add(&block, of(number))));
    assert!(!batch.add(&block, of(7)) && !batch.add(&block, Segment::contiguous(0, 0, 2, 0, 15)));
    assert_eq!((batch.segments.len(), batch.len), (1 << 19, 8 << 20));
}

#[test]
fn blocks_that_share_bytes_are_written_in_turn() {
    let bench = bench();
    let memory = crate::MemoryFile::new(4096).unwrap();
    let session = Loader::builder().build().unwrap().session(Arc::clone(&bench.checkpoint)).unwrap();
    let mut expected = vec![0; 4096];
    // One in the middle of another, one with the same beginning, one inside, and one beside them.
    for (at, len, from) in [(0, 1000, 100), (500, 1000, 5000), (0, 600, 9000), (100, 50, 20_000), (2000, 7, 300)] {
        let block = memory.block(at, len).unwrap();
        session.add(&block, [Segment::contiguous(0, from, len, 0, 0)]).unwrap();
        let [at, len, from] = [at, len, from].map(|number| usize::try_from(number).unwrap());
        expected[at..at + len].copy_from_slice(&bench.bytes[from..from + len]);
    }
    session.finish().unwrap();
    assert!(contents(&memory.block(0, 4096).unwrap()) == expected);
}
