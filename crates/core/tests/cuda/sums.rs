//! Checksums that the device takes of what has arrived there. The double divides bytes by the polynomial itself, and copies are
//! late: a checksum that is taken too early is wrong.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sllm_core::{
    Block, Checkpoint, Control, Device, EngineChoice, Error, ErrorKind, Filter, LoadReport, Loader, Segment,
};

use super::{assert_nothing_left, driver, model};

/// A device that has loaded once, and has its kernel.
fn ready(store: &Checkpoint) -> Device {
    let device = Device::cuda(0).unwrap();
    load(&device, store, EngineChoice::Mapped).unwrap();
    device
}

fn load(device: &Device, store: &Checkpoint, engine: EngineChoice) -> Result<sllm_core::Loaded, Error> {
    let loader = Loader::builder().device(device.clone()).engine(engine).verify(true).pinned_bytes(8 << 20);
    loader.build().unwrap().load(store)
}

/// Whether the device took all checksums.
fn by_device(report: &LoadReport) -> bool {
    assert!(report.verified);
    report.device_verified_bytes == report.read_bytes
}

#[test]
fn every_engine_leaves_checksums_to_the_device() {
    let driver = driver();
    driver.set_delay(Duration::from_millis(3));
    let model = model();
    let store = Checkpoint::open(&model.store).unwrap();
    let device = ready(&store);
    for engine in [EngineChoice::Mapped, EngineChoice::Pread, EngineChoice::Uring, EngineChoice::Auto] {
        let before = driver.count("cuLaunchKernel");
        let loaded = load(&device, &store, engine).unwrap();
        assert!(by_device(loaded.report()), "{engine}: {:?}", loaded.report());
        assert_eq!(driver.count("cuLaunchKernel"), before + 1, "{engine}: one for 64 MiB");
        for tensor in &model.tensors {
            assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
        }
    }
    drop(device);
    assert_nothing_left(&driver);
}

#[test]
fn a_device_that_refuses_leaves_them_to_the_processor() {
    let driver = driver();
    let model = model();
    let store = Checkpoint::open(&model.store).unwrap();
    (1..=20).for_each(|nth| driver.fail("cuKernelGetFunction", nth, 218));
    let device = Device::cuda(0).unwrap();
    let error = load(&device, &store, EngineChoice::Mapped).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let loaded = load(&device, &store, EngineChoice::Pread).unwrap();
    let report = loaded.report();
    assert_eq!((report.verified, report.device_verified_bytes), (true, 0));
    let told = |note: &String| note.starts_with("the processor takes checksums, not cuda:0: ");
    assert!(report.notes.iter().any(told), "{:?}", report.notes);
    driver.reset();
    assert!(by_device(load(&device, &store, EngineChoice::Pread).unwrap().report()), "what failed is tried again");
}

#[test]
fn a_device_without_room_for_checksums_leaves_them_to_the_processor() {
    let driver = driver();
    let model = model();
    let store = Checkpoint::open(&model.store).unwrap();
    let device = ready(&store);
    // The tensors have their memory, and the checksums get none.
    driver.fail("cuMemAlloc", 2, 2);
    let loaded = load(&device, &store, EngineChoice::Auto).unwrap();
    let report = loaded.report();
    assert_eq!((report.verified, report.device_verified_bytes), (true, 0));
    assert!(
        report.notes.iter().any(|note| note.starts_with("the processor takes checksums, not cuda:0: ")),
        "{:?}",
        report.notes
    );
    for tensor in &model.tensors {
        assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
    }
    assert!(by_device(load(&device, &store, EngineChoice::Auto).unwrap().report()), "there is room again");
}

#[test]
fn each_of_several_devices_takes_the_checksums_of_its_own() {
    let driver = driver();
    driver.set_devices(2);
    driver.set_delay(Duration::from_millis(3));
    let model = model();
    let store = Checkpoint::open(&model.store).unwrap();
    let devices: Vec<Device> = (0..2).map(|ordinal| Device::cuda(ordinal).unwrap()).collect();
    let load = |place: fn(&str) -> usize| {
        let builder = Loader::builder().devices(devices.clone()).verify(true).engine(EngineChoice::Pread);
        let loader = builder.build().unwrap();
        loader.load_placed(&store, &Filter::all(), |tensor| place(&tensor.name))
    };
    for device in &devices {
        self::load(device, &store, EngineChoice::Mapped).unwrap();
    }
    let apart = |name: &str| usize::from(name >= "large.2");
    let loaded = load(apart).unwrap();
    let report = loaded.report();
    // A chunk that both have a part of is the processor's.
    assert!(report.verified && report.device_verified_bytes < report.read_bytes);
    assert!(report.read_bytes - report.device_verified_bytes <= 3 * (4 << 20), "{report:?}");
    for tensor in &model.tensors {
        assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
    }
    let file = OpenOptions::new().read(true).write(true).open(model.store.join("tensor.data_0")).unwrap();
    for offset in [5_000_001, file.metadata().unwrap().len() - 5_000_000] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
        match load(apart).unwrap_err() {
            Error::Corrupt(fault) => assert_eq!(fault.chunk, offset / (4 << 20)),
            error => panic!("{error}"),
        }
        file.write_all_at(&byte, offset).unwrap();
    }
}

#[test]
fn a_load_that_is_stopped_leaves_no_kernel_behind() {
    let driver = driver();
    let model = model();
    let store = Checkpoint::open(&model.store).unwrap();
    let device = ready(&store);
    driver.set_delay(Duration::from_millis(300));
    let control = Control::new().until(Instant::now() + Duration::from_millis(100));
    let loader = Loader::builder().device(device.clone()).engine(EngineChoice::Mapped).verify(true).control(control);
    let error = loader.build().unwrap().load(&store).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    drop(device);
    assert_nothing_left(&driver);
}

#[test]
fn a_chunk_that_is_wrong_in_its_file_is_found_on_the_device() {
    let driver = driver();
    let model = model();
    let device = ready(&Checkpoint::open(&model.store).unwrap());
    let file = OpenOptions::new().read(true).write(true).open(model.store.join("tensor.data_0")).unwrap();
    let len = file.metadata().unwrap().len();
    for offset in [0, 5_000_001, len - 5_000_000, len - 1] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
        let store = Checkpoint::open(&model.store).unwrap();
        for engine in [EngineChoice::Mapped, EngineChoice::Pread, EngineChoice::Uring] {
            match load(&device, &store, engine).unwrap_err() {
                Error::Corrupt(fault) => assert_eq!(fault.chunk, offset / (4 << 20), "{engine} at {offset}"),
                error => panic!("{engine} at {offset}: {error}"),
            }
        }
        file.write_all_at(&byte, offset).unwrap();
    }
    assert!(by_device(load(&device, &Checkpoint::open(&model.store).unwrap(), EngineChoice::Pread).unwrap().report()));
    drop(device);
    assert_nothing_left(&driver);
}

#[test]
fn bytes_that_change_on_their_way_are_told_from_those_of_a_wrong_file() {
    let driver = driver();
    let model = model();
    let store = Checkpoint::open(&model.store).unwrap();
    let device = ready(&store);
    driver.spoil_after(driver.get("copies_h2d") + 7);
    let error = load(&device, &store, EngineChoice::Pread).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    let text = error.to_string();
    assert!(text.contains("is right in the file and has other bytes on cuda:0"), "{text}");
    assert!(by_device(load(&device, &store, EngineChoice::Pread).unwrap().report()));
}

#[test]
fn rows_that_lie_apart_and_parts_of_chunks_are_verified_too() {
    let driver = driver();
    driver.set_delay(Duration::from_millis(3));
    let model = model();
    let store = Checkpoint::open(&model.store).unwrap();
    let device = ready(&store);
    let loader = Loader::builder().device(device.clone()).engine(EngineChoice::Pread).verify(true).build().unwrap();
    let len = store.files()[0].len();
    let fill = |segments: &[Segment]| {
        let block = Block::alloc(&device, 2 * len).unwrap();
        loader.fill_segments(&store, segments, vec![block]).unwrap()
    };
    // All of the file, as rows with room between them: the first chunk's rows of 4096 bytes, then longer ones.
    let (first, rest) = (4 << 20, len - (4 << 20));
    let rows = |offset: u64, row_len: u64, rows: u64| Segment {
        row_len,
        rows,
        src_pitch: row_len,
        dst_pitch: row_len + 64,
        ..Segment::contiguous(0, offset, row_len, 0, offset)
    };
    let tail = Segment::contiguous(0, first, rest, 0, first + first / 4);
    let report = fill(&[rows(0, 4096, first / 4096), tail]);
    assert!(by_device(&report), "{report:?}");

    // Half of every row of the first chunk: the processor takes that chunk's checksum, the device the others'.
    let half = Segment { src_pitch: 4096, ..rows(0, 2048, first / 4096) };
    let report = fill(&[half, tail]);
    assert_eq!(report.read_bytes - report.device_verified_bytes, first, "{report:?}");

    // With few processors only that chunk's pieces come into buffers; the others' pages are copied in place.
    let loader = Loader::builder().device(device.clone()).verify(true).build().unwrap();
    let block = Block::alloc(&device, 2 * len).unwrap();
    let report = loader.fill_segments(&store, &[half, tail], vec![block]).unwrap();
    assert_eq!(report.read_bytes - report.device_verified_bytes, first, "{report:?}");
    let engines: Vec<(&str, u64)> = report.engines.iter().map(|engine| (engine.engine, engine.bytes)).collect();
    if std::thread::available_parallelism().unwrap().get() < 8 {
        assert_eq!(engines, [("mapped", report.read_bytes - first), ("pread", first)]);
    } else {
        assert_eq!(engines, [("pread", report.read_bytes)]);
    }

    // A session's batches, one after another by one stream.
    let store = Arc::new(store);
    let session = loader.session(Arc::clone(&store)).unwrap();
    let block = Block::alloc(&device, len).unwrap();
    for at in 0..3 {
        let start = at * (8 << 20);
        session.add(&block, [Segment::contiguous(0, start, 8 << 20, 0, start)]).unwrap();
        session.wait().unwrap();
    }
    let report = session.finish().unwrap().unwrap();
    assert!(by_device(&report) && report.read_bytes == 24 << 20, "{report:?}");
}
