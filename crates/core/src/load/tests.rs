//! Loads where the system gives less than was asked for.

use std::fs;
use std::sync::atomic::AtomicUsize;

use test_support::{header, noise, safetensors};

use super::*;

const LEN: usize = 12 << 20;

/// Loads a file past the page cache by two threads, of which so many get a ring, and compares its bytes.
fn load_by_rings(engine: EngineChoice, rings: usize) -> Result<LoadReport> {
    // Where the build directory is, files can be read directly.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = noise(1, LEN);
    fs::write(&path, safetensors(header(LEN as u64), &bytes)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut loader = Loader::builder().engine(engine).direct(Some(true)).threads(2).build().unwrap();
    loader.wishes.rings = Some(Arc::new(AtomicUsize::new(rings)));
    let loaded = loader.load(&checkpoint)?;
    let name = &checkpoint.tensors()[0].name;
    assert!(loaded.tensor(name).unwrap().to_vec().unwrap() == bytes);
    Ok(loaded.report().clone())
}

#[test]
fn a_lane_without_a_ring_reads_by_pread_unless_io_uring_was_asked_for() {
    for rings in [0, 1, 2] {
        let report = load_by_rings(EngineChoice::Auto, rings).unwrap();
        let noted = report.notes.iter().filter(|note| note.contains("reads by pread")).count();
        assert_eq!((report.engines[0].engine, noted), ("uring", usize::from(rings < 2)), "{report}");
    }
    load_by_rings(EngineChoice::Uring, 2).unwrap();
    let error = load_by_rings(EngineChoice::Uring, 1).unwrap_err();
    assert!(matches!(error, Error::Engine { engine: "uring", .. }), "{error}");
}
