//! Loads where the system gives less than was asked for, and loads that others hold up.

use std::fs;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use cuda::Driver;
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

/// One lane, and a load that keeps its chunks, half of the first device's, until all others were taken.
#[test]
fn what_another_load_reads_is_waited_for_last_though_pieces_are_spread_over_devices() {
    const CHUNK: u64 = 8192;
    let driver = Driver::load();
    driver.set_devices(2);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let len = usize::try_from(20 * CHUNK).unwrap();
    let json = format!(
        r#"{{"a":{{"dtype":"U8","shape":[{len}],"data_offsets":[0,{len}]}},"b":{{"dtype":"U8","shape":[{len}],"data_offsets":[{len},{}]}}}}"#,
        2 * len
    );
    let bytes = noise(1, 2 * len);
    fs::write(&path, safetensors(&json, &bytes)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let cache = Cache::new(CHUNK, 100 * CHUNK, None).unwrap();
    let plan = LoadPlan::whole(&[checkpoint.files()[0].len()], CHUNK);

    let other = cache.begin(&checkpoint);
    let (busy, present): (Vec<_>, Vec<_>) =
        other.split(plan.pieces()).missing.into_iter().partition(|piece| piece.offset < 10 * CHUNK);
    for piece in &present {
        let mut buffer = other.try_buffer().unwrap();
        let piece_len = usize::try_from(piece.len).unwrap();
        checkpoint.files()[0].read_exact_at(&mut buffer.as_mut_slice()[..piece_len], piece.offset).unwrap();
        other.put(piece, buffer, None);
    }
    assert!(!busy.is_empty());
    let present_len: u64 = present.iter().map(|piece| piece.len).sum();
    let other = Mutex::new(Some(other));
    let give_up = move |progress: crate::Progress| {
        if progress.done == present_len {
            drop(other.lock().unwrap().take());
        }
    };
    let control = Control::new().on_progress(give_up).until(Instant::now() + Duration::from_secs(20));
    let devices = vec![Device::cuda(0).unwrap(), Device::cuda(1).unwrap()];
    let loader = Loader::builder().devices(devices).cache(cache).threads(1).control(control).build().unwrap();
    let loaded = loader.load_placed(&checkpoint, &Filter::all(), |info| usize::from(info.name == "b")).unwrap();
    assert_eq!(loaded.report().cached_bytes, present_len);
    assert!(loaded.tensor("a").unwrap().to_vec().unwrap() == bytes[..len]);
    assert!(loaded.tensor("b").unwrap().to_vec().unwrap() == bytes[len..]);
}
