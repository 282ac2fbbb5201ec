//! One suite that every engine passes: the bytes of the file, or an error that says why not.

#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;

use super::bounce::Bounce;
use super::pread::{Pace, Turns};
use super::*;
use crate::device::{self, Block, Device, Stream};
use crate::plan::{LoadPlan, PlanOptions, Segment};
use crate::pool::BufferPool;

const PIECE: u64 = 64 << 10;

/// Keeps what the engine hands over.
struct Collect {
    pool: BufferPool,
    streams: [Stream; 1],
    got: BTreeMap<(usize, u64), Vec<u8>>,
    beginning: Vec<u8>,
    notes: std::cell::RefCell<Vec<String>>,
}

impl Collect {
    fn new(buffers: usize) -> Collect {
        let pool = BufferPool::new(PIECE as usize, buffers, 1 << 20, None).unwrap();
        let streams = [Device::host().stream().unwrap()];
        Collect { pool, streams, got: BTreeMap::new(), beginning: Vec::new(), notes: Default::default() }
    }
}

impl Sink for Collect {
    fn room(&mut self, piece: &Piece) -> Result<Room> {
        let buffer = self.pool.try_acquire().expect("the engine holds more buffers than it gave back");
        self.beginning.clear();
        Ok(Room { buffer, offset: piece.offset, len: piece.len as usize })
    }

    fn has_room(&mut self) -> bool {
        self.pool.try_acquire().is_some()
    }

    fn step(&self) -> usize {
        5000
    }

    fn arrived(&mut self, beginning: &[u8]) {
        assert!(beginning.starts_with(&self.beginning));
        self.beginning = beginning.to_vec();
    }

    fn filled(&mut self, piece: &Piece, filled: Filled) -> Result<()> {
        let block = Block::alloc(&Device::host(), piece.len)?;
        let copy = crate::plan::PieceCopy {
            src_offset: 0,
            row_len: piece.len,
            rows: 1,
            src_pitch: piece.len,
            block: 0,
            dst_offset: 0,
            dst_pitch: piece.len,
        };
        let parcel = device::Parcel { source: filled, copies: &[copy], part: None };
        device::copy(&self.streams, &vec![block.clone()].into(), vec![parcel])?.wait(0)?;
        let mut bytes = vec![0; piece.len as usize];
        block.read(0, &mut bytes)?;
        assert!(bytes.starts_with(&self.beginning), "bytes changed after they were shown");
        assert!(self.got.insert((piece.file, piece.offset), bytes).is_none(), "a piece came twice");
        Ok(())
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn note(&self, note: String) {
        let mut notes = self.notes.borrow_mut();
        if !notes.contains(&note) {
            notes.push(note);
        }
    }
}

/// Every engine, with and without the page cache.
fn engines(faults: Option<&Faults>) -> Vec<(&'static str, Box<dyn ReadEngine>)> {
    let faults = || faults.cloned();
    let turns = Pace::Turns(Turns::new(Arc::default()));
    let bounced = Pace::Bounce(Bounce::new().unwrap());
    let mut engines: Vec<(&'static str, Box<dyn ReadEngine>)> = vec![
        ("pread", Box::new(Pread { direct: false, pace: Pace::Free, faults: faults() })),
        ("pread direct", Box::new(Pread { direct: true, pace: turns, faults: faults() })),
        ("pread direct bounced", Box::new(Pread { direct: true, pace: bounced, faults: faults() })),
    ];
    for (name, direct, depth, unregistered) in [
        ("uring", false, 4, None),
        ("uring direct", true, 4, None),
        ("uring depth 1", true, 1, None),
        ("uring unregistered", false, 4, Some(Errno::NOMEM)),
        ("uring direct unregistered", true, 4, Some(Errno::INVAL)),
    ] {
        let (governed, or_pread, rings) = (None, false, None);
        let engine = Uring { direct, depth, governed, or_pread, faults: faults(), unregistered, rings };
        engines.push((name, Box::new(engine)));
    }
    for (name, rings) in [("uring direct governed", None), ("uring direct without a ring", Some(Arc::default()))] {
        let governed = Some(uring::Governed::new(Arc::default()));
        let engine =
            Uring { direct: true, depth: 16, governed, or_pread: true, faults: faults(), unregistered: None, rings };
        engines.push((name, Box::new(engine)));
    }
    if faults().is_none() {
        engines.push(("mapped", Box::new(Mapped::new(&[Device::host()], false))));
    }
    engines
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 9) as u8).collect()
}

struct Files {
    dir: tempfile::TempDir,
    files: Vec<DataFile>,
    contents: Vec<Vec<u8>>,
}

/// Files of these lengths, on a disk that reads directly where the build directory does.
fn files(lens: &[usize]) -> Files {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let contents: Vec<Vec<u8>> = lens.iter().map(|&len| bytes(len)).collect();
    let open = |(k, content): (usize, &Vec<u8>)| {
        let path = dir.path().join(k.to_string());
        std::fs::write(&path, content).unwrap();
        DataFile::open(&path, &k.to_string(), true).unwrap()
    };
    let files = contents.iter().enumerate().map(open).collect();
    Files { dir, files, contents }
}

fn plan(files: &[DataFile]) -> LoadPlan {
    let lens: Vec<u64> = files.iter().map(DataFile::len).collect();
    let wants: Vec<Segment> = lens.iter().enumerate().map(|(k, &len)| Segment::contiguous(k, 0, len, k, 0)).collect();
    LoadPlan::build(&lens, &lens, &wants, &PlanOptions { piece_len: PIECE, ..PlanOptions::default() }).unwrap()
}

/// Runs an engine over whole files; its notes, when every byte was right.
fn run(engine: &dyn ReadEngine, made: &Files) -> Result<Vec<String>> {
    let plan = plan(&made.files);
    let mut sink = Collect::new(8);
    let pieces: Vec<&Piece> = plan.pieces().iter().collect();
    let result = engine.run(&made.files, &Queue::new(&pieces), &mut sink);
    // Whatever happened, every buffer is back.
    assert_eq!(std::iter::from_fn(|| sink.pool.try_acquire()).collect::<Vec<_>>().len(), 8, "a buffer is lost");
    result?;
    assert_eq!(sink.got.len(), plan.pieces().len());
    for ((file, offset), got) in sink.got {
        let offset = offset as usize;
        assert!(got == made.contents[file][offset..offset + got.len()], "file {file} at {offset}");
    }
    Ok(sink.notes.take())
}

#[test]
fn odd_lengths_are_read_to_the_last_byte() {
    let made = files(&[1, 4095, 4096, 4097, 65536, 65537, 1_000_003, 0, 300_000]);
    for (name, engine) in engines(None) {
        run(engine.as_ref(), &made).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn what_the_ring_is_not_told_of_is_said_once_and_nothing_else_is() {
    let made = files(&[3_000_001, 70_001]);
    for (name, engine) in engines(None) {
        let notes = run(engine.as_ref(), &made).unwrap_or_else(|e| panic!("{name}: {e}"));
        let said = notes.iter().filter(|note| note.contains("without registered")).count();
        assert_eq!(said, usize::from(name.contains("unregistered")), "{name}: {notes:?}");
    }
}

#[test]
fn a_file_system_without_direct_reads_is_read_by_the_cache_and_that_is_said() {
    let mut made = files(&[300_001]);
    made.files[0].refuse_direct();
    for (name, engine) in engines(None) {
        let notes = run(engine.as_ref(), &made).unwrap_or_else(|e| panic!("{name}: {e}"));
        let said = notes.iter().any(|note| note.contains("cannot be read directly"));
        assert_eq!(said, name.contains("direct") || name.contains("depth"), "{name}: {notes:?}");
    }
}

#[test]
fn short_reads_and_interruptions_lose_nothing() {
    let made = files(&[1_000_003, 70_001]);
    let calls = Arc::new(AtomicUsize::new(0));
    let kinds: [fn(usize, usize) -> Option<Fault>; 6] = [
        |call, _| call.is_multiple_of(2).then_some(Fault::Short(1)),
        |call, got| (call % 3 == 1).then_some(Fault::Short(got / 2)),
        |call, got| (call % 3 == 1).then_some(Fault::Short((got / 2).next_multiple_of(512))),
        |call, _| call.is_multiple_of(2).then_some(Fault::Errno(Errno::INTR)),
        |call, _| (call % 4 != 3).then_some(Fault::Errno(Errno::AGAIN)),
        |call, _| (call == 0).then_some(Fault::Errno(Errno::INVAL)), // direct reads refused at the first call
    ];
    for (kind, fault) in kinds.into_iter().enumerate() {
        let count = Arc::clone(&calls);
        let faults: Faults = Arc::new(move |_, _, got| fault(count.fetch_add(1, Ordering::Relaxed), got));
        for (name, engine) in engines(Some(&faults)) {
            if kind == 5 && !name.contains("direct") {
                continue; // EINVAL of a buffered read is an error
            }
            calls.store(0, Ordering::Relaxed);
            run(engine.as_ref(), &made).unwrap_or_else(|e| panic!("fault {kind}, {name}: {e}"));
            assert!(calls.load(Ordering::Relaxed) > 1, "no call was answered with a fault");
        }
    }
}

#[test]
fn a_disk_error_in_the_middle_is_an_error_with_its_place() {
    let made = files(&[1_000_003]);
    let faults: Faults = Arc::new(|_, offset, _| (offset >= 500_000).then_some(Fault::Errno(Errno::IO)));
    for (name, engine) in engines(Some(&faults)) {
        let error = run(engine.as_ref(), &made).unwrap_err();
        let Error::Io { source, path, .. } = &error else { panic!("{name}: {error}") };
        assert_eq!(path, made.files[0].path());
        assert!(source.to_string().contains("at byte 5"), "{name}: {source}");
    }
}

#[test]
fn endless_eagain_is_given_up() {
    let made = files(&[5000]);
    let faults: Faults = Arc::new(|_, _, _| Some(Fault::Errno(Errno::AGAIN)));
    for (name, engine) in engines(Some(&faults)) {
        assert!(matches!(run(engine.as_ref(), &made), Err(Error::Io { .. })), "{name}");
    }
}

#[test]
fn a_file_that_was_cut_off_is_an_error_and_no_signal() {
    for left in [0, 100, 4096, 500_000, 999_999] {
        let made = files(&[1_000_003]);
        let path = made.dir.path().join("0");
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(left).unwrap();
        for (name, engine) in engines(None) {
            let error = run(engine.as_ref(), &made).unwrap_err();
            assert!(matches!(error, Error::Truncated { end, .. } if end == left), "{name}: {error}");
        }
    }
}

#[test]
fn mapped_pages_that_are_cut_off_under_way_are_an_error() {
    let made = files(&[1_000_003]);
    let path = made.dir.path().join("0");
    struct Cut(Collect, std::path::PathBuf);
    impl Sink for Cut {
        fn room(&mut self, piece: &Piece) -> Result<Room> {
            self.0.room(piece)
        }
        fn has_room(&mut self) -> bool {
            true
        }
        fn filled(&mut self, piece: &Piece, filled: Filled) -> Result<()> {
            if piece.offset == PIECE {
                std::fs::OpenOptions::new().write(true).open(&self.1).unwrap().set_len(0).unwrap();
            }
            self.0.filled(piece, filled)
        }
        fn check(&self) -> Result<()> {
            Ok(())
        }
        fn note(&self, _note: String) {}
    }
    let plan = plan(&made.files);
    let pieces: Vec<&Piece> = plan.pieces().iter().collect();
    let queue = Queue::new(&pieces);
    let error =
        Mapped::new(&[Device::host()], false).run(&made.files, &queue, &mut Cut(Collect::new(1), path)).unwrap_err();
    assert!(matches!(error, Error::Truncated { end: 0, .. }), "{error}");
}
