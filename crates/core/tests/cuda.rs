//! The CUDA path over the test double of the driver, whose copies are late: what is given back too early shows.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Made, every_dtype, refuse_syscall, write_safetensors, write_sharded};
use cuda::Driver;
use sllm_core::{
    Cache, Checkpoint, Control, ConvertOptions, Device, DeviceError, Dtype, EngineChoice, Error, ErrorKind, LinkPeak,
    Loader, convert,
};

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

/// Waits until file pages that a load registered are released, which happens after it.
fn released(driver: &Driver) {
    let begun = Instant::now();
    while driver.registered_now() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "file pages are still registered");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Everything that a load took is given back.
fn assert_nothing_left(driver: &Driver) {
    assert_eq!(driver.registered_now(), 0, "memory is still pinned");
    assert_eq!(driver.device_bytes_now(0), 0, "device memory is still allocated");
    assert_eq!((driver.get("streams"), driver.get("events")), (0, 0), "streams or events are left");
}

/// Everything that a load by this engine took is given back.
fn assert_nothing_left_by(engine: EngineChoice, driver: &Driver) {
    if engine == EngineChoice::Mapped {
        released(driver);
    }
    assert_nothing_left(driver);
}

#[test]
fn every_engine_and_layout_gives_the_bytes_of_the_source() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(2));
    let model = model();
    for path in [&model.source, &model.store] {
        let checkpoint = Checkpoint::open(path).unwrap();
        for engine in ENGINES {
            for verify in [false, checkpoint.sums().is_some() && engine != EngineChoice::Mapped] {
                let device = Device::cuda(0).unwrap();
                // A ring far smaller than the model.
                let loader = Loader::builder().device(device).engine(engine).verify(verify).pinned_bytes(8 << 20);
                let loaded = loader.build().unwrap().load(&checkpoint).unwrap();
                // Reading back, below, is pageable.
                assert_eq!(driver.pageable_copies(), 0, "{engine} copied from memory that is not pinned");
                for tensor in &model.tensors {
                    let bytes = loaded.tensor(&tensor.name).unwrap().to_vec().unwrap();
                    assert!(bytes == tensor.bytes, "{:?} by {engine}", tensor.name);
                }
                drop(loaded);
                assert_nothing_left_by(engine, &driver);
                driver.reset();
                driver.set_delay(Duration::from_millis(2));
            }
        }
    }
}

#[test]
fn calls_grow_with_bytes_and_not_with_tensors() {
    let driver = Driver::load();
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
            assert!(report.pieces <= 6, "{}", report.pieces);
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
    let driver = Driver::load();
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
        assert_nothing_left_by(engine, &driver);
    }
}

#[test]
fn nothing_that_waits_is_issued_once_a_load_was_stopped() {
    let driver = Driver::load();
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
    assert_nothing_left_by(EngineChoice::Mapped, &driver);
}

#[test]
fn pieces_of_a_device_wait_for_no_other_device() {
    let driver = Driver::load();
    driver.set_devices(2);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // A file a device, so that no piece is of both: five pieces of 3 MiB, of which three wait, and then one.
    let first = [Made::new("a", Dtype::U8, &[14 << 20])];
    let second = [Made::new("b", Dtype::U8, &[1 << 20])];
    write_sharded(dir.path(), &[("1.safetensors", &first), ("2.safetensors", &second)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    driver.set_delay(Duration::from_secs(5));
    // The lane waits for its first copy when the deadline passes.
    let control = Control::new().until(Instant::now() + Duration::from_secs(3));
    let devices = vec![Device::cuda(0).unwrap(), Device::cuda(1).unwrap()];
    let loader = Loader::builder().devices(devices).engine(EngineChoice::Mapped).threads(1).control(control);
    let placed = |info: &sllm_core::TensorInfo| usize::from(info.name == "b");
    let loaded = loader.build().unwrap().load_placed(&checkpoint, &sllm_core::Filter::all(), placed);
    loaded.unwrap_err();
    assert_eq!((driver.get("copies_h2d"), driver.count("cuMemcpyBatchAsync")), (3, 0));
    assert!((6 << 20..=7 << 20).contains(&driver.bytes_h2d()), "{} bytes", driver.bytes_h2d());
    assert_nothing_left_by(EngineChoice::Mapped, &driver);
}

#[test]
fn a_disk_is_read_into_few_buffers() {
    let driver = Driver::load();
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
    let driver = Driver::load();
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
fn too_little_device_memory_is_said_before_anything_moves() {
    let driver = Driver::load();
    driver.set_memory(30 << 20);
    let model = model();
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).build().unwrap();
    let error = loader.load(&Checkpoint::open(&model.source).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeviceMemory);
    assert!(matches!(error, Error::Device(DeviceError::OutOfMemory { need, free, .. }) if need > free));
    assert_eq!((driver.bytes_h2d(), driver.registered_peak()), (0, 0));
    assert_nothing_left(&driver);
}

#[test]
fn a_failure_of_any_driver_call_is_an_error_and_leaks_nothing() {
    let driver = Driver::load();
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
            drop(loader);
            driver.reset();
            assert_nothing_left_by(engine, &driver);
        }
    }
}

#[test]
fn memory_that_cannot_be_pinned_is_used_unpinned_and_noted() {
    let driver = Driver::load();
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
    let driver = Driver::load();
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
    let driver = Driver::load();
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
    let driver = Driver::load();
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
fn tensors_go_to_the_devices_that_they_are_placed_on() {
    let driver = Driver::load();
    driver.set_devices(2);
    let model = model();
    let checkpoint = Checkpoint::open(&model.store).unwrap();
    let devices = vec![Device::cuda(0).unwrap(), Device::cuda(1).unwrap(), Device::host()];
    for engine in [EngineChoice::Pread, EngineChoice::Uring] {
        let loader = Loader::builder().devices(devices.clone()).engine(engine).build().unwrap();
        let place = |info: &sllm_core::TensorInfo| info.name.len() % 3;
        let loaded = loader.load_placed(&checkpoint, &sllm_core::Filter::all(), place).unwrap();
        for tensor in &model.tensors {
            let view = loaded.tensor(&tensor.name).unwrap();
            assert_eq!(view.device().id(), devices[tensor.name.len() % 3].id());
            assert!(view.to_vec().unwrap() == tensor.bytes, "{:?} by {engine}", tensor.name);
        }
    }
}

#[test]
fn a_links_peak_is_measured_once_and_then_remembered() {
    let driver = Driver::load();
    driver.set_devices(2);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = dir.path().join("made/links.json");
    let device = Device::cuda(0).unwrap();
    let copies = || driver.get("copies_h2d");
    let peak = |device: &Device, seen: f64| LinkPeak::remembered(device, seen, &file).unwrap().unwrap();

    let first = peak(&device, 0.0);
    let measuring = copies();
    assert!(measuring >= 16 && first.gb_per_s > 0.0, "{measuring} copies, {first:?}");
    assert_eq!(driver.pageable_copies(), 0);
    assert_nothing_left(&driver);
    assert_eq!(peak(&device, 0.0), first);
    assert_eq!(peak(&device, first.gb_per_s), first, "what was seen is not more than the peak");
    assert_eq!(copies(), measuring, "it was measured again");

    // Another card is another link; both are remembered.
    let second = peak(&Device::cuda(1).unwrap(), 0.0);
    let both = copies();
    assert!(both > measuring);
    assert_eq!((peak(&device, 0.0), peak(&Device::cuda(1).unwrap(), 0.0)), (first, second));
    assert_eq!(copies(), both);

    // A link that carried more than its peak was measured while others used it.
    driver.reset();
    assert!(peak(&device, first.gb_per_s * 1.01).gb_per_s >= first.gb_per_s * 1.01);
    assert!(copies() > 0);
    // What it carried, it can carry, whatever measuring says.
    assert_eq!(peak(&device, 1e6).gb_per_s.to_bits(), 1e6f64.to_bits());
    assert!(peak(&device, 0.0).gb_per_s < 1e6, "only what was measured is remembered");

    // Nothing but what was written, and not too old or to come, is believed.
    let good = std::fs::read_to_string(&file).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json: serde_json::Value = serde_json::from_str(&good).unwrap();
        json["links"].as_object_mut().unwrap().values_mut().for_each(change);
        json.to_string()
    };
    let bad = [
        String::new(),
        good[..good.len() / 2].into(),
        good.replace("\"version\":1", "\"version\":2"),
        with(&|link| link["gb_per_s"] = (-1.0).into()),
        with(&|link| link["gb_per_s"] = 0.0.into()),
        with(&|link| link["gb_per_s"] = "fast".into()),
        with(&|link| link["measured_at"] = (now - 31 * 24 * 3600).into()),
        with(&|link| link["measured_at"] = (now + 3600).into()),
        good.replace("0000:01:00.0", "0000:09:00.0"),
    ];
    for bad in bad {
        assert_ne!(bad, good);
        std::fs::write(&file, &bad).unwrap();
        driver.reset();
        let anew = peak(&device, 0.0);
        let measured = copies();
        assert!(measured > 0, "{bad} was believed");
        assert_eq!((peak(&device, 0.0), copies()), (anew, measured), "{bad} was not written anew");
    }
    assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "something besides the file is left");

    // Where nothing can be written, it is measured each time.
    driver.reset();
    let nowhere = std::path::Path::new("/proc/sllm/links.json");
    assert!(LinkPeak::remembered(&device, 0.0, nowhere).unwrap().is_some() && copies() > 0);
    // And where nothing can be pinned, it is not known.
    driver.set_registered_total(4096);
    let unknown = LinkPeak::remembered(&device, 0.0, nowhere).unwrap_err();
    assert!(unknown.to_string().contains("the link of cuda:0"), "{unknown}");
    assert_nothing_left(&driver);
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let driver = Driver::load();
    driver.set_devices(1);
    let error = Device::cuda(7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.to_string().contains("cuda:7"), "{error}");
}

#[test]
fn a_lost_device_is_an_error() {
    let driver = Driver::load();
    let model = model();
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Pread).build().unwrap();
    driver.lose_after(4);
    let error = loader.load(&Checkpoint::open(&model.store).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device, "{error}");
    driver.reset();
}

#[test]
fn a_cache_smaller_than_the_model_gives_no_chunk_away_while_a_copy_reads_it() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(2));
    let model = model();
    for (path, engine) in
        [(&model.source, EngineChoice::Uring), (&model.source, EngineChoice::Pread), (&model.store, EngineChoice::Auto)]
    {
        let checkpoint = Checkpoint::open(path).unwrap();
        let device = Device::cuda(0).unwrap();
        let cache = Cache::new(4 << 20, 20 << 20, Some(&device)).unwrap();
        let builder = Loader::builder().device(device).engine(engine).cache(cache.clone());
        let loader = builder.verify(checkpoint.sums().is_some()).build().unwrap();
        // The second load finds a part of the model; two at once fight for the chunks.
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..2 {
                        let loaded = loader.load(&checkpoint).unwrap();
                        for tensor in &model.tensors {
                            let bytes = loaded.tensor(&tensor.name).unwrap().to_vec().unwrap();
                            assert!(bytes == tensor.bytes, "{:?} by {engine}", tensor.name);
                        }
                    }
                });
            }
        });
        let usage = cache.usage();
        assert!(usage.occupied <= 20 << 20 && usage.page_locked == 20 << 20, "{usage:?}");
        drop((loader, cache));
        assert_nothing_left(&driver);
        driver.reset();
        driver.set_delay(Duration::from_millis(2));
    }
}

#[test]
fn what_is_resident_is_copied_without_a_read() {
    let driver = Driver::load();
    let model = model();
    let checkpoint = Checkpoint::open(&model.store).unwrap();
    let device = Device::cuda(0).unwrap();
    let cache = Cache::new(4 << 20, 64 << 20, Some(&device)).unwrap();
    let loader = Loader::builder().device(device).cache(cache.clone()).build().unwrap();
    loader.fill_cache(&checkpoint).unwrap();
    driver.reset();
    let loaded = loader.load(&checkpoint).unwrap();
    let report = loaded.report();
    assert_eq!((report.cached_bytes, cache.usage().hits), (report.read_bytes, report.pieces));
    assert_eq!((driver.count("cuMemHostRegister"), driver.get("copies_h2d")), (0, report.copies));
}

/// Loads by a cache and compares every byte.
fn load_and_compare(model: &Model, cache: &Cache, ordinal: usize) {
    let device = Device::cuda(ordinal).unwrap();
    let loader = Loader::builder().device(device).cache(cache.clone()).build().unwrap();
    let loaded = loader.load(&Checkpoint::open(&model.store).unwrap()).unwrap();
    for tensor in &model.tensors {
        assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
    }
}

#[test]
fn a_cache_that_was_unpinned_holds_no_context_and_loads_pin_what_they_copy() {
    let driver = Driver::load();
    driver.set_devices(2);
    driver.set_delay(Duration::from_millis(1));
    let model = model();
    // Two steps, of which the model takes the first.
    let cache = Cache::new(4 << 20, 128 << 20, Some(&Device::cuda(0).unwrap())).unwrap();
    cache.prepare(2);
    load_and_compare(&model, &cache, 0);
    let resident = cache.usage().resident;
    assert!(cache.unpin_memory() && !cache.unpin_memory(), "there is nothing left to unpin");
    assert_eq!((cache.usage().page_locked, cache.usage().resident), (0, resident));
    assert_eq!(driver.get("contexts"), 0);
    assert_nothing_left(&driver);
    assert_eq!((driver.get("abandoned_registered_bytes"), driver.get("waits_on_unregister")), (0, 0));

    // The host's loads need no pins.
    let host = Loader::builder().cache(cache.clone()).build().unwrap();
    host.load(&Checkpoint::open(&model.store).unwrap()).unwrap();
    assert_eq!((cache.usage().page_locked, driver.get("contexts")), (0, 0));
    // The context that pins is that of the device which is loaded to, and no other.
    let before = cache.usage().misses;
    load_and_compare(&model, &cache, 1);
    assert_eq!(cache.usage().misses, before, "it was resident");
    assert_eq!((cache.usage().page_locked, driver.registered_now()), (64 << 20, 64 << 20));
    assert_eq!((driver.get("contexts"), driver.device_bytes_peak(0) > 0), (1, true));
    assert_eq!(driver.pageable_copies(), driver.count("cuMemcpyDtoH"), "reading back is all that is pageable");
    assert!(cache.unpin_memory());
    assert_eq!((driver.get("contexts"), driver.registered_now()), (0, 0));
    drop(cache);
    assert_eq!(driver.get("contexts"), 0);
}

#[test]
fn a_pin_that_is_refused_after_unpinning_is_tried_again_after_the_next() {
    let driver = Driver::load();
    let model = model();
    let cache = Cache::new(4 << 20, 64 << 20, Some(&Device::cuda(0).unwrap())).unwrap();
    load_and_compare(&model, &cache, 0);
    assert!(cache.unpin_memory());
    driver.set_registered_total(4096);
    load_and_compare(&model, &cache, 0);
    let usage = cache.usage();
    assert!(usage.page_locked == 0 && usage.refusal.is_some(), "{usage:?}");
    driver.set_registered_total(1 << 30);
    let refusal = usage.refusal;
    assert!(cache.unpin_memory());
    assert_eq!((driver.get("contexts"), &cache.usage().refusal), (0, &refusal), "it is told until a pin succeeded");
    load_and_compare(&model, &cache, 0);
    let usage = cache.usage();
    assert!(usage.page_locked == 64 << 20 && usage.refusal.is_none(), "{usage:?}");
}

#[test]
fn nothing_is_unpinned_under_a_copy() {
    let driver = Driver::load();
    driver.set_devices(2);
    driver.set_delay(Duration::from_millis(1));
    let model = model();
    // Steps of one chunk each, of which the loads evict each other's.
    let cache = Cache::new(64 << 20, 192 << 20, Some(&Device::cuda(0).unwrap())).unwrap();
    let (unpinned, loads) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for ordinal in 0..2 {
            let (model, cache, unpinned, loads) = (&model, &cache, &unpinned, &loads);
            scope.spawn(move || {
                while unpinned.load(Ordering::Relaxed) < 10 {
                    load_and_compare(model, cache, ordinal);
                    assert!(loads.fetch_add(1, Ordering::Relaxed) < 10_000, "it is never unpinned");
                }
            });
        }
        scope.spawn(|| {
            while unpinned.load(Ordering::Relaxed) < 10 {
                unpinned.fetch_add(usize::from(cache.unpin_memory()), Ordering::Relaxed);
                std::thread::yield_now();
            }
        });
    });
    assert_eq!(driver.get("waits_on_unregister"), 0, "memory was unpinned under a copy");
    assert_eq!(driver.get("abandoned_registered_bytes"), 0, "a context went before what it had pinned");
    assert_eq!(driver.pageable_copies(), driver.count("cuMemcpyDtoH"), "something was copied out of unpinned memory");
    drop(cache);
    assert_eq!(driver.get("contexts"), 0);
    assert_nothing_left(&driver);
}
