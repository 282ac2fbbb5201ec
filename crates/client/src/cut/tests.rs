#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

use super::*;

/// Plays server and client: the blocks as they are when every part was moved.
fn moved(file: &[u8], segments: &[Segment], blocks: usize, block_len: usize, room: u64) -> (Vec<Vec<u8>>, usize) {
    let mut blocks = vec![vec![0u8; block_len]; blocks];
    let mut cutter = Cutter::new(segments.to_vec());
    let base = 1024;
    let mut parts = 0;
    while let Some(part) = cutter.part(7, base, room) {
        parts += 1;
        let mut staging = vec![0u8; (base + room) as usize];
        let mut written = 0;
        for segment in &part.segments {
            assert_eq!((segment.block, segment.file), (7, 0));
            assert!(segment.dst_offset >= base);
            for row in 0..segment.rows {
                let from = (segment.offset + row * segment.src_pitch) as usize;
                let to = (segment.dst_offset + row * segment.dst_pitch) as usize;
                let len = segment.row_len as usize;
                staging[to..to + len].copy_from_slice(&file[from..from + len]);
                written += segment.row_len;
            }
        }
        assert_eq!(written, part.len);
        for copy in &part.copies {
            for row in 0..copy.rows {
                let from = (copy.src_offset + row * copy.src_pitch) as usize;
                let to = (copy.dst_offset + row * copy.dst_pitch) as usize;
                let len = copy.row_len as usize;
                assert!(blocks[copy.block][to..to + len].iter().all(|&byte| byte == 0), "a byte is written twice");
                blocks[copy.block][to..to + len].copy_from_slice(&staging[from..from + len]);
            }
        }
    }
    (blocks, parts)
}

/// A file without zeros, so that what was not written shows.
fn file(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * i) >> 3) as u8 | 1).collect()
}

#[test]
fn parts_of_any_room_bring_every_byte_to_its_place_once() {
    let file = file(5 << 20);
    let rows = |offset, row_len, rows, src_pitch, block, dst_offset, dst_pitch| Segment {
        file: 0,
        offset,
        row_len,
        rows,
        src_pitch,
        block,
        dst_offset,
        dst_pitch,
    };
    let segments = [
        Segment::contiguous(0, 0, 1000, 0, 5),
        Segment::contiguous(0, 1000, 24, 0, 1005),   // continues at both ends
        Segment::contiguous(0, 1024, 3 << 20, 1, 0), // continues in the file alone, and is long
        rows(1500, 10, 400, 64, 0, 2000, 11),        // overlaps in the file
        rows(3 << 20, 100_000, 7, 110_000, 0, 20_000, 100_000), // dense there
        rows(4 << 20, 1, 1000, 3, 1, 3 << 20, 1),
    ];
    let (expected, parts) = moved(&file, &segments, 2, 4 << 20, 64 << 20);
    assert_eq!(parts, 1);
    for segment in &segments {
        for row in 0..segment.rows {
            let from = (segment.offset + row * segment.src_pitch) as usize;
            let to = (segment.dst_offset + row * segment.dst_pitch) as usize;
            let len = segment.row_len as usize;
            assert!(expected[segment.block][to..to + len] == file[from..from + len], "{segment:?}");
        }
    }
    let wanted: u64 = segments.iter().map(Segment::len).sum();
    let set = expected.iter().flatten().filter(|&&byte| byte != 0).count() as u64;
    assert_eq!(set, wanted);
    for room in [1 << 20, (1 << 20) + 777, 2_500_000, 5 << 20] {
        let (blocks, parts) = moved(&file, &segments, 2, 4 << 20, room);
        assert!(blocks == expected, "room of {room}");
        assert!(parts as u64 >= wanted / room && parts as u64 <= wanted / room * 2 + 2, "{parts} parts of {room}");
    }
}

#[test]
fn neighbours_in_the_file_are_one_segment_for_the_server() {
    let file = file(100_000);
    let segments: Vec<Segment> = (0..100).map(|i| Segment::contiguous(0, i * 1000, 1000, 0, (99 - i) * 1000)).collect();
    let part = Cutter::new(segments.clone()).part(0, 0, 1 << 20).unwrap();
    assert_eq!((part.segments.len(), part.copies.len(), part.len), (1, 100, 100_000));
    let (blocks, _) = moved(&file, &segments, 1, 100_000, 1 << 20);
    assert_eq!(blocks[0][..1000], file[99_000..]);
}

#[test]
fn a_part_has_no_more_segments_than_a_message_may() {
    let segments: Vec<Segment> =
        (0..MESSAGE_SEGMENTS as u64 + 10).map(|i| Segment::contiguous(0, i * 16, 8, 0, i * 8)).collect();
    let mut cutter = Cutter::new(segments);
    let first = cutter.part(0, 0, 1 << 40).unwrap();
    assert_eq!(first.segments.len(), MESSAGE_SEGMENTS);
    assert_eq!(cutter.part(0, 0, 1 << 40).unwrap().segments.len(), 10);
    assert!(cutter.part(0, 0, 1 << 40).is_none());
}

#[test]
fn the_longest_message_is_within_the_limit() {
    let long = pb::Segment {
        file: u32::MAX,
        offset: u64::MAX,
        row_len: u64::MAX,
        rows: u64::MAX,
        src_pitch: u64::MAX,
        block: u32::MAX,
        dst_offset: u64::MAX,
        dst_pitch: u64::MAX,
    };
    let len = prost::Message::encoded_len(&long) + 2;
    assert!(len <= 90, "{len}");
    assert!(len * MESSAGE_SEGMENTS + 100 < sllm_proto::MAX_MESSAGE_LEN);
}
