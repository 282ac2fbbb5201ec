//! Rings that are pinned while the caller allocates what is loaded to.

use std::path::Path;
use std::time::{Duration, Instant};

use sllm_core::{Checkpoint, Device, EngineChoice, Loader, LoaderBuilder};

use super::{Model, assert_nothing_left, driver, model};
use cuda::Driver;

const PINNED: u64 = 5 << 20;
/// Two buffers of 2 MiB fit that.
const RING: u64 = 4 << 20;

fn builder() -> LoaderBuilder {
    let builder = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Pread);
    builder.direct(Some(false)).pinned_bytes(PINNED)
}

/// Prepares for what is at a path, and waits until so many bytes are pinned.
fn prepare(driver: &Driver, loader: &Loader, path: &Path, bytes: u64) {
    loader.prepare(&Checkpoint::open(path).unwrap());
    let begun = Instant::now();
    while driver.registered_now() < bytes {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} bytes are pinned", driver.registered_now());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Loads out of pinned memory, and compares every byte.
fn load(driver: &Driver, loader: &Loader, model: &Model, path: &Path) {
    let before = driver.get("pageable_bytes");
    let loaded = loader.load(&Checkpoint::open(path).unwrap()).unwrap();
    assert!(driver.get("pageable_bytes") - before < 4096, "no more than checksums");
    for tensor in &model.tensors {
        assert!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap() == tensor.bytes, "{:?}", tensor.name);
    }
}

#[test]
fn a_load_takes_what_was_pinned_before_and_pins_nothing_else() {
    let driver = driver();
    let model = model();
    for (path, verify) in [(&model.source, false), (&model.store, false), (&model.store, true)] {
        let loader = builder().verify(verify).build().unwrap();
        prepare(&driver, &loader, path, RING);
        let pinned = driver.count("cuMemHostRegister_v2");
        // What is prepared is of a loader and its clones.
        load(&driver, &loader.clone(), &model, path);
        assert_eq!(driver.count("cuMemHostRegister_v2"), pinned, "{path:?} {verify}");
        assert_eq!(driver.registered_peak(), RING);
        assert_nothing_left(&driver);
        load(&driver, &loader, &model, path);
        assert!(driver.count("cuMemHostRegister_v2") > pinned, "it is for one load");
        assert_nothing_left(&driver);
        driver.reset();
    }
}

#[test]
fn a_load_begins_while_its_ring_is_prepared() {
    let driver = driver();
    let model = model();
    for _ in 0..20 {
        let loader = builder().pinned_bytes(64 << 20).threads(8).build().unwrap();
        loader.prepare(&Checkpoint::open(&model.source).unwrap());
        load(&driver, &loader, &model, &model.source);
        assert_nothing_left(&driver);
    }
}

#[test]
fn nothing_is_pinned_where_it_is_not_worth_it_or_for_nobody() {
    let driver = driver();
    let model = model();
    let small = model.source.with_file_name("small.safetensors");
    std::fs::write(&small, test_support::safetensors(test_support::header(1 << 20), &vec![1; 1 << 20])).unwrap();
    let loader = builder().build().unwrap();
    loader.prepare(&Checkpoint::open(&small).unwrap());
    let all = [
        builder().engine(EngineChoice::Mapped),
        builder().engine(EngineChoice::Uring),
        builder().direct(Some(true)),
        builder().device(Device::host()),
    ];
    for builder in all {
        builder.build().unwrap().prepare(&Checkpoint::open(&model.source).unwrap());
    }
    assert_eq!(driver.count("cuMemHostRegister_v2"), 0);

    let loader = builder().build().unwrap();
    prepare(&driver, &loader, &model.source, RING);
    drop(loader);
    assert_eq!(driver.registered_now(), 0);
    assert_nothing_left(&driver);
}
