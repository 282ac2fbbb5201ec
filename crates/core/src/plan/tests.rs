#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

use proptest::prelude::*;

use super::*;

/// The byte that the tests keep at a place of a file.
fn byte(file: usize, offset: u64) -> u8 {
    (offset.wrapping_mul(2_654_435_761).wrapping_add(file as u64 * 97) >> 13) as u8
}

/// Runs a plan over made files, and counts how often each byte of each block is written.
fn run(plan: &LoadPlan, blocks: &[u64]) -> (Vec<Vec<u8>>, Vec<Vec<u32>>) {
    let mut bytes: Vec<Vec<u8>> = blocks.iter().map(|&len| vec![0; len as usize]).collect();
    let mut writes: Vec<Vec<u32>> = blocks.iter().map(|&len| vec![0; len as usize]).collect();
    for piece in plan.pieces() {
        let buffer: Vec<u8> = (piece.offset..piece.offset + piece.len).map(|at| byte(piece.file, at)).collect();
        for copy in plan.copies(piece) {
            for row in 0..copy.rows {
                for i in 0..copy.row_len {
                    let dst = (copy.dst_offset + row * copy.dst_pitch + i) as usize;
                    bytes[copy.block][dst] = buffer[(copy.src_offset + row * copy.src_pitch + i) as usize];
                    writes[copy.block][dst] += 1;
                }
            }
        }
    }
    (bytes, writes)
}

/// Segments whose destinations follow one another in their blocks, with gaps; sources anywhere.
fn segments() -> impl Strategy<Value = (Vec<u64>, Vec<u64>, Vec<Segment>)> {
    let raw = (0..3usize, 0..200_000u64, 0..9_000u64, 1..40u64, 0..9_000u64, 0..2usize, 0..300u64, 0..300u64);
    proptest::collection::vec(raw, 0..20).prop_map(|raw| {
        let mut files = vec![0u64; 3];
        let mut blocks = vec![0u64; 2];
        let mut segments = Vec::new();
        for (file, offset, row_len, rows, src_gap, block, dst_gap, before) in raw {
            let (src_pitch, dst_pitch) = (row_len + src_gap, row_len + dst_gap);
            let dst_offset = blocks[block] + before;
            let segment = Segment { file, offset, row_len, rows, src_pitch, block, dst_offset, dst_pitch };
            blocks[block] = dst_offset + (rows - 1) * dst_pitch + row_len;
            files[file] = files[file].max(offset + (rows - 1) * src_pitch + row_len);
            segments.push(segment);
        }
        (files, blocks, segments)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_wanted_byte_arrives_once_and_reads_are_aligned(
        (files, blocks, segments) in segments(),
        pages in 1..20u64,
        max_gap in prop_oneof![Just(0u64), 1..70_000u64],
        chunk_pages in prop_oneof![Just(None), (1..30u64).prop_map(Some)],
    ) {
        let chunk_len = chunk_pages.map(|pages| pages * PAGE);
        let options = PlanOptions { piece_len: pages * PAGE, max_gap, chunk_len };
        let plan = LoadPlan::build(&files, &blocks, &segments, &options).unwrap();
        let (bytes, writes) = run(&plan, &blocks);
        let mut expected = writes.iter().map(|w| vec![0; w.len()]).collect::<Vec<Vec<u32>>>();
        for s in &segments {
            for row in 0..s.rows {
                for i in 0..s.row_len {
                    let dst = (s.dst_offset + row * s.dst_pitch + i) as usize;
                    expected[s.block][dst] += 1;
                    prop_assert_eq!(bytes[s.block][dst], byte(s.file, s.offset + row * s.src_pitch + i));
                }
            }
        }
        prop_assert_eq!(writes, expected);
        prop_assert_eq!(plan.wanted_len(), segments.iter().map(Segment::len).sum::<u64>());

        let mut end = (0, 0);
        for piece in plan.pieces() {
            prop_assert!((piece.file, piece.offset) >= end, "pieces overlap or run backwards");
            end = (piece.file, piece.offset + piece.len);
            prop_assert_eq!(piece.offset % PAGE, 0);
            prop_assert!(piece.len % PAGE == 0 || end.1 == files[piece.file]);
            prop_assert!(end.1 <= files[piece.file] && piece.len <= options.piece_len && piece.len > 0);
            prop_assert!(chunk_len.is_some() || !plan.copies(piece).is_empty());
        }
        if let Some(chunk_len) = chunk_len {
            let chunk_of = |piece: &Piece| (piece.file, piece.offset / chunk_len);
            for pieces in plan.pieces().chunk_by(|a, b| chunk_of(a) == chunk_of(b)) {
                let (file, number) = chunk_of(&pieces[0]);
                let mut at = number * chunk_len;
                let end = (at + chunk_len).min(files[file]);
                for piece in pieces {
                    prop_assert_eq!((piece.offset, piece.len), (at, options.piece_len.min(end - at)));
                    at += piece.len;
                }
                prop_assert_eq!(at, end, "a chunk is not read whole");
                prop_assert!(pieces.iter().any(|piece| !plan.copies(piece).is_empty()), "nobody wants this chunk");
            }
        }
    }
}

#[test]
fn neighbours_at_both_ends_are_one_copy() {
    let segments: Vec<Segment> = (0..1000).map(|i| Segment::contiguous(0, 4096 + i * 256, 256, 0, i * 256)).collect();
    let plan = LoadPlan::build(&[1 << 20], &[1 << 20], &segments, &PlanOptions::default()).unwrap();
    assert_eq!((plan.pieces().len(), plan.copy_count()), (1, 1));
}

#[test]
fn rows_cost_three_copies_a_piece_at_most() {
    let rows = Segment {
        file: 0,
        offset: 100,
        row_len: 1000,
        rows: 4000,
        src_pitch: 2000,
        block: 0,
        dst_offset: 0,
        dst_pitch: 1000,
    };
    let plan = LoadPlan::build(&[8 << 20], &[4_000_000], &[rows], &PlanOptions::default()).unwrap();
    assert_eq!(plan.pieces().len(), 2);
    assert!(plan.copy_count() <= 6, "{}", plan.copy_count());
}

#[test]
fn far_ranges_are_not_read_through() {
    let segments = [Segment::contiguous(0, 0, 10, 0, 0), Segment::contiguous(0, 1 << 20, 10, 0, 10)];
    let plan = LoadPlan::build(&[2 << 20], &[20], &segments, &PlanOptions::default()).unwrap();
    assert_eq!(plan.read_len(), 2 * PAGE);
    let rows = Segment {
        file: 0,
        offset: 0,
        row_len: 10,
        rows: 3,
        src_pitch: 512 << 10,
        block: 0,
        dst_offset: 0,
        dst_pitch: 10,
    };
    let plan = LoadPlan::build(&[2 << 20], &[30], &[rows], &PlanOptions::default()).unwrap();
    assert_eq!(plan.read_len(), 3 * PAGE);
}

#[test]
fn a_byte_has_one_source() {
    let build = |a: Segment, b: Segment| LoadPlan::build(&[1 << 20], &[10_000], &[a, b], &PlanOptions::default());
    let line = |offset, dst_offset| Segment::contiguous(0, offset, 100, 0, dst_offset);
    assert!(build(line(0, 0), line(5000, 100)).is_ok());
    assert!(build(line(0, 0), line(5000, 99)).is_err());
    assert!(build(line(0, 0), line(0, 0)).is_err());
    let rows = |offset, dst_offset, row_len| Segment {
        file: 0,
        offset,
        row_len,
        rows: 10,
        src_pitch: 500,
        block: 0,
        dst_offset,
        dst_pitch: 200,
    };
    assert!(build(rows(0, 0, 100), rows(100, 100, 100)).is_ok(), "two halves of each row");
    assert!(build(rows(0, 0, 101), rows(101, 100, 100)).is_err());
    assert!(build(rows(0, 150, 100), rows(100, 50, 100)).is_ok(), "columns that go round");
    assert!(build(rows(0, 150, 100), rows(100, 49, 102)).is_err());
    assert!(build(rows(0, 0, 100), line(9000, 300)).is_ok(), "a gap between rows");
    assert!(build(rows(0, 0, 100), line(9000, 250)).is_err());
}

#[test]
fn extreme_numbers_are_refused_and_do_not_overflow() {
    assert!(Segment { rows: 0, ..Segment::contiguous(0, 0, 1, 0, 0) }.check(&[10], &[10]).is_err());
    let segment = Segment::contiguous(0, u64::MAX - 1, 1, 0, 0);
    assert!(LoadPlan::build(&[u64::MAX], &[10], &[segment], &PlanOptions::default()).is_err());
    let last = Segment::contiguous(0, i64::MAX as u64 - 1, 1, 0, 0);
    let all = PlanOptions { max_gap: u64::MAX, ..PlanOptions::default() };
    let plan = LoadPlan::build(&[i64::MAX as u64], &[10], &[last], &all).unwrap();
    let piece = &plan.pieces()[0];
    assert_eq!((piece.offset + piece.len, plan.copies(piece)[0].row_len), (i64::MAX as u64, 1));
}

#[test]
fn what_does_not_fit_is_refused() {
    let good =
        Segment { file: 0, offset: 0, row_len: 10, rows: 2, src_pitch: 20, block: 0, dst_offset: 0, dst_pitch: 10 };
    let build = |s: Segment| LoadPlan::build(&[30], &[20], &[s], &PlanOptions::default());
    assert!(build(good).is_ok());
    for bad in [
        Segment { file: 1, ..good },
        Segment { block: 1, ..good },
        Segment { offset: 1, ..good },
        Segment { dst_offset: 1, ..good },
        Segment { src_pitch: 9, ..good },
        Segment { dst_pitch: 9, ..good },
        Segment { src_pitch: u64::MAX, ..good },
        Segment { rows: u64::MAX, ..good },
        Segment { row_len: u64::MAX, rows: 1, ..good },
        Segment { offset: u64::MAX, ..good },
    ] {
        assert!(build(bad).is_err(), "{bad:?}");
    }
    let unaligned = PlanOptions { piece_len: 5000, ..PlanOptions::default() };
    assert!(LoadPlan::build(&[30], &[20], &[good], &unaligned).is_err());
    for chunk_len in [0, 5000] {
        let unaligned = PlanOptions { chunk_len: Some(chunk_len), ..PlanOptions::default() };
        assert!(LoadPlan::build(&[30], &[20], &[good], &unaligned).is_err());
    }
}

#[test]
fn the_pieces_of_each_device_are_spread_over_the_whole() {
    let part = |n: u64, block: usize| Segment::contiguous(0, n * PAGE, PAGE, block, n * PAGE);
    // Of a file's nine pages the first six go to one device, by blocks 0 and 2, and the last three to another.
    let segments: Vec<Segment> =
        [0, 2, 0, 0, 2, 0, 1, 1, 1].into_iter().zip(0..).map(|(block, n)| part(n, block)).collect();
    let options = PlanOptions { piece_len: PAGE, ..PlanOptions::default() };
    let plan = LoadPlan::build(&[9 * PAGE], &[9 * PAGE; 3], &segments, &options).unwrap();
    let mut pieces: Vec<&Piece> = plan.pieces().iter().collect();
    plan.spread(&mut pieces, |block| block % 2);
    let pages = |pieces: &[&Piece]| pieces.iter().map(|piece| piece.offset / PAGE).collect::<Vec<_>>();
    assert_eq!(pages(&pieces), [0, 6, 1, 2, 7, 3, 4, 8, 5]);
    plan.spread(&mut pieces, |_| 0);
    assert_eq!(pages(&pieces), [0, 6, 1, 2, 7, 3, 4, 8, 5], "one device's stay as they are");
}
