//! The CUDA path over the test double of the driver, whose copies are late: what is given back too early shows.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

mod cache;
#[path = "../common/mod.rs"]
mod common;
mod devices;
mod prepare;
mod sums;

use std::time::{Duration, Instant};

use common::{Made, every_dtype, refuse_syscall, write_safetensors};
use cuda::Driver;
use sllm_core::{Checkpoint, Control, ConvertOptions, Device, Dtype, EngineChoice, ErrorKind, Loader, convert};

const ENGINES: [EngineChoice; 4] = [EngineChoice::Auto, EngineChoice::Uring, EngineChoice::Pread, EngineChoice::Mapped];

struct Model {
    _dir: tempfile::TempDir,
    source: std::path::PathBuf,
    store: std::path::PathBuf,
    tensors: Vec<Made>,
}

/// Every dtype and 40 MB of large tensors, so that every lane refills its buffers.
fn model() -> Model {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    let store = dir.path().join("store");
    let mut tensors = every_dtype();
    tensors.extend((0..5).map(|i| Made::new(&format!("large.{i}"), Dtype::BF16, &[4_000_000 + i])));
    write_safetensors(&source, &tensors, None);
    convert(&Checkpoint::open(&source).unwrap(), &store, &ConvertOptions::new()).unwrap();
    Model { _dir: dir, source, store, tensors }
}

/// Waits until what loads registered is released, which happens after them.
fn released(driver: &Driver) {
    let begun = Instant::now();
    while driver.registered_now() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "memory is still pinned");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The double. What an earlier test's loads registered is released by now.
fn driver() -> Driver {
    let driver = Driver::load();
    released(&driver);
    driver.reset();
    driver
}

/// Everything that a load took is given back.
fn assert_nothing_left(driver: &Driver) {
    released(driver);
    assert_eq!(driver.device_bytes_now(0), 0, "device memory is still allocated");
    assert_eq!((driver.get("streams"), driver.get("events")), (0, 0), "streams or events are left");
}

#[test]
fn every_engine_and_layout_gives_the_bytes_of_the_source() {
    let driver = driver();
    driver.set_delay(Duration::from_millis(2));
    let model = model();
    for path in [&model.source, &model.store] {
        let checkpoint = Checkpoint::open(path).unwrap();
        for engine in ENGINES {
            for verify in [false, checkpoint.sums().is_some()] {
                let device = Device::cuda(0).unwrap();
                // A ring far smaller than the model.
                let loader = Loader::builder().device(device).engine(engine).verify(verify).pinned_bytes(8 << 20);
                let loaded = loader.build().unwrap().load(&checkpoint).unwrap();
                // Checksums come back to memory that is not, each device's by one copy, and one is tried. So is reading back, below.
                assert_eq!(
                    driver.pageable_copies(),
                    2 * u64::from(verify),
                    "{engine} copied from memory that is not pinned"
                );
                for tensor in &model.tensors {
                    let bytes = loaded.tensor(&tensor.name).unwrap().to_vec().unwrap();
                    assert!(bytes == tensor.bytes, "{:?} by {engine}", tensor.name);
                }
                drop(loaded);
                assert_nothing_left(&driver);
                driver.reset();
                driver.set_delay(Duration::from_millis(2));
            }
        }
    }
}

#[test]
fn loads_that_follow_one_another_leave_one_ring_behind_at_most() {
    const RING: u64 = 8 << 20;
    let driver = driver();
    let model = model();
    let checkpoint = Checkpoint::open(&model.source).unwrap();
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Pread).pinned_bytes(RING);
    let loader = loader.build().unwrap();
    for allowed in [u64::MAX, RING] {
        // With room for one ring alone, a load's is pinned when the one before has gone.
        driver.set_registered_total(allowed);
        for _ in 0..20 {
            let loaded = loader.load(&checkpoint).unwrap();
            let report = loaded.report();
            assert!(report.pinned_bytes > RING / 2 && report.pinned_bytes <= RING, "{}", report.pinned_bytes);
            assert!(!report.notes.iter().any(|note| note.contains("not pinned")), "{:?}", report.notes);
        }
        assert!(driver.registered_peak() <= 2 * RING, "{}", driver.registered_peak());
    }
    assert_nothing_left(&driver);
}

#[test]
fn calls_grow_with_bytes_and_not_with_tensors() {
    let driver = driver();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut calls = Vec::new();
    for count in [8u64, 8000] {
        let path = dir.path().join(format!("{count}.safetensors"));
        let tensors: Vec<Made> =
            (0..count).map(|i| Made::new(&format!("t{i:05}"), Dtype::U8, &[16_384_000 / count])).collect();
        write_safetensors(&path, &tensors, None);
        let checkpoint = Checkpoint::open(&path).unwrap();
        for engine in [EngineChoice::Pread, EngineChoice::Uring, EngineChoice::Mapped] {
            driver.reset();
            let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(engine).direct(Some(false));
            let loaded = loader.build().unwrap().load(&checkpoint).unwrap();
            let report = loaded.report();
            assert_eq!(report.copies, report.pieces, "{engine}: one copy a piece");
            assert!(report.pieces <= 9, "{}", report.pieces);
            assert_eq!(driver.get("copies_h2d"), report.pieces, "{engine}");
            assert!(
                driver.count("cuMemcpyHtoDAsync") + driver.count("cuMemcpyBatchAsync") <= report.pieces,
                "{engine}"
            );
            assert!(driver.count("cuEventCreate") <= report.pieces, "events are made once and used again");
            calls.push((driver.count("cuMemcpy2DAsync"), driver.count("cuMemAlloc")));
        }
    }
    assert!(calls.iter().all(|&calls| calls == (0, 1)), "{calls:?}: 1000 times as many tensors cost more calls");
}

#[test]
fn pieces_that_wait_for_a_busy_device_are_issued_together() {
    let driver = driver();
    let model = model();
    let checkpoint = Checkpoint::open(&model.store).unwrap();
    for engine in [EngineChoice::Pread, EngineChoice::Mapped] {
        driver.reset();
        driver.set_delay(Duration::from_millis(20));
        let loader = || {
            let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(engine).direct(Some(false));
            loader.threads(if engine == EngineChoice::Mapped { 1 } else { 8 }).build().unwrap()
        };
        let loaded = loader().load(&checkpoint).unwrap();
        for tensor in &model.tensors {
            assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
        }
        let (copies, batches) = (driver.get("copies_h2d"), driver.count("cuMemcpyBatchAsync"));
        let (singles, marks) = (driver.count("cuMemcpyHtoDAsync"), driver.count("cuEventRecord"));
        assert_eq!(copies, loaded.report().copies, "{engine}");
        assert!(batches > 0 && singles + 2 * batches <= copies, "{engine}: {copies} copies, {singles} alone");
        assert_eq!(marks, singles + batches, "{engine}: one event a batch");
        drop(loaded);

        driver.reset();
        driver.set_delay(Duration::from_millis(20));
        driver.fail("cuMemcpyBatchAsync", 1, 999);
        let error = loader().load(&checkpoint).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device, "{engine}: {error}");
        driver.reset();
        assert_nothing_left(&driver);
    }
}

#[test]
fn nothing_that_waits_is_issued_once_a_load_was_stopped() {
    let driver = driver();
    let model = model();
    let checkpoint = Checkpoint::open(&model.store).unwrap();
    let loader = || Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Mapped).threads(1);
    let pieces = loader().build().unwrap().load(&checkpoint).unwrap().report().pieces;
    assert!(pieces > 2 && (pieces - 2) % 8 != 0, "{pieces} pieces: two at once, batches of eight, and some that wait");
    driver.reset();
    // The deadline passes while the lane waits for its first copy.
    driver.set_delay(Duration::from_secs(2));
    let control = Control::new().until(Instant::now() + Duration::from_secs(1));
    loader().control(control).build().unwrap().load(&checkpoint).unwrap_err();
    assert_eq!(driver.get("copies_h2d"), pieces - (pieces - 2) % 8);
    assert_nothing_left(&driver);
}

#[test]
fn a_disk_is_read_into_few_buffers() {
    let driver = driver();
    let model = model();
    let checkpoint = Checkpoint::open(&model.store).unwrap();
    for engine in [EngineChoice::Pread, EngineChoice::Uring] {
        driver.reset();
        let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(engine).direct(Some(true));
        let loaded = loader.build().unwrap().load(&checkpoint).unwrap();
        for tensor in &model.tensors {
            assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
        }
        let report = loaded.report();
        assert!(report.pieces >= report.read_bytes >> 20, "{engine}: pieces of 1 MiB, not {}", report.pieces);
        assert!(report.pinned_bytes <= 40 << 20, "{engine}: {} bytes pinned", report.pinned_bytes);
    }
}

#[test]
fn memory_that_is_not_pinned_is_in_no_batch() {
    let driver = driver();
    driver.set_registered_total(4096);
    let model = model();
    let checkpoint = Checkpoint::open(&model.store).unwrap();
    driver.set_delay(Duration::from_millis(5));
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Pread).threads(8);
    let loaded = loader.build().unwrap().load(&checkpoint).unwrap();
    assert_eq!(driver.count("cuMemcpyBatchAsync"), 0);
    assert_eq!(driver.pageable_copies(), loaded.report().copies);
    for tensor in &model.tensors {
        assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
    }
}

#[test]
fn a_failure_of_any_driver_call_is_an_error_and_leaks_nothing() {
    let driver = driver();
    let model = model();
    let checkpoint = Checkpoint::open(&model.store).unwrap();
    for engine in [EngineChoice::Uring, EngineChoice::Pread, EngineChoice::Mapped] {
        for (symbol, nth) in [
            ("cuMemAlloc", 1),
            ("cuStreamCreate", 1),
            ("cuMemcpyHtoDAsync", 1),
            ("cuEventCreate", 2),
            ("cuEventRecord", 3),
            ("cuEventSynchronize", 1),
            ("cuStreamSynchronize", 1),
        ] {
            driver.reset();
            let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(engine).pinned_bytes(8 << 20);
            let loader = loader.build().unwrap();
            driver.fail(symbol, nth, 999);
            let result = loader.load(&checkpoint);
            assert_eq!(result.err().map(|e| e.kind()), Some(ErrorKind::Device), "{symbol} {nth} by {engine}");
            driver.reset();
            assert_nothing_left(&driver);
            drop(loader); // what it prepared for the load went with the load
        }
    }
}

#[test]
fn memory_that_cannot_be_pinned_is_used_unpinned_and_noted() {
    let driver = driver();
    driver.set_registered_total(4096);
    let model = model();
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Pread).build().unwrap();
    let loaded = loader.load(&Checkpoint::open(&model.store).unwrap()).unwrap();
    for tensor in &model.tensors {
        assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
    }
    assert!(loaded.report().notes.iter().any(|note| note.contains("not pinned")), "{:?}", loaded.report().notes);
}

#[test]
fn buffers_that_io_uring_does_not_register_are_read_into_all_the_same() {
    let driver = driver();
    driver.set_delay(Duration::from_millis(2));
    let model = model();
    let load = move |refused: bool| {
        if refused {
            // As where the limit of locked memory is too low.
            refuse_syscall(libc::SYS_io_uring_register, libc::ENOMEM);
        }
        let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Uring);
        let loaded = loader.pinned_bytes(8 << 20).build().unwrap().load(&Checkpoint::open(&model.store).unwrap());
        let loaded = loaded.unwrap();
        for tensor in &model.tensors {
            assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
        }
        let notes = &loaded.report().notes;
        let said = notes.iter().filter(|note| note.contains("without registered buffers")).count();
        assert_eq!(said, usize::from(refused), "{notes:?}");
    };
    load(false);
    std::thread::spawn(move || load(true)).join().unwrap();
    assert_nothing_left(&driver);
}

#[test]
fn pages_that_cannot_be_registered_are_read_instead() {
    let driver = driver();
    let model = model();
    let checkpoint = Checkpoint::open(&model.source).unwrap();
    // The first registration is the one of file pages, where few processors make that the choice.
    driver.fail("cuMemHostRegister", 1, 801);
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).direct(Some(false)).build().unwrap();
    let loaded = loader.load(&checkpoint).unwrap();
    let report = loaded.report();
    assert_eq!(report.engines[0].engine, "pread", "{report}");
    for tensor in &model.tensors {
        assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
    }
    driver.fail("cuMemHostRegister", 1, 801);
    let forced = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Mapped).build().unwrap();
    assert_eq!(forced.load(&checkpoint).unwrap_err().kind(), ErrorKind::Device);
}

#[test]
fn pages_are_registered_once_those_of_the_load_before_are_released() {
    let driver = driver();
    let model = model();
    let checkpoint = Checkpoint::open(&model.source).unwrap();
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Mapped).build().unwrap();
    // Enough for one load.
    driver.set_registered_total(checkpoint.files()[0].len() + 4096);
    for _ in 0..20 {
        assert_eq!(loader.load(&checkpoint).unwrap().report().engines[0].engine, "mapped");
    }
    released(&driver);
    assert!(driver.registered_peak() <= checkpoint.files()[0].len() + 4096);
}

#[test]
fn pages_that_cannot_be_registered_under_way_are_read_unless_they_were_asked_for() {
    let driver = driver();
    // Windows of the first file and a part of another.
    let (dir, len) = (tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), 20_000_000);
    let tensors: Vec<Made> = (0..3).map(|i| Made::new(&format!("t{i}"), Dtype::U8, &[len + i])).collect();
    for (i, tensor) in tensors.iter().enumerate() {
        write_safetensors(&dir.path().join(format!("model-{i}.safetensors")), std::slice::from_ref(tensor), None);
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let loader = |engine| {
        let loader = Loader::builder().device(Device::cuda(0).unwrap()).direct(Some(false)).engine(engine);
        loader.build().unwrap()
    };
    driver.set_registered_total(2 * len + (8 << 20));
    let loaded = loader(EngineChoice::Auto).load(&checkpoint).unwrap();
    let report = loaded.report();
    for tensor in &tensors {
        assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
    }
    // Many processors copy out of the page cache from the beginning.
    let is_mapped = report.engines[0].engine == "mapped";
    assert_eq!(report.engines.len(), 1, "{report}");
    let said = report.notes.iter().any(|note| note.contains("reads by pread") && note.contains("OUT_OF_MEMORY"));
    assert_eq!(said, is_mapped, "{report}");
    drop(loaded);
    released(&driver);
    assert_nothing_left(&driver);
    let error = loader(EngineChoice::Mapped).load(&checkpoint).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device, "{error}");
    released(&driver);
    assert_nothing_left(&driver);
}
