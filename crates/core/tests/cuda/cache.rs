//! Loads by a cache of chunks.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sllm_core::{Cache, Checkpoint, Device, EngineChoice, Loader};

use super::{Model, assert_nothing_left, driver, model};

#[test]
fn a_cache_smaller_than_the_model_gives_no_chunk_away_while_a_copy_reads_it() {
    let driver = driver();
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
    let driver = driver();
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
    let driver = driver();
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
    let driver = driver();
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
    let driver = driver();
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

#[test]
fn a_copy_that_fails_ends_a_load_by_a_cache() {
    let driver = driver();
    let model = model();
    let checkpoint = Checkpoint::open(&model.source).unwrap();
    let device = Device::cuda(0).unwrap();
    // Chunks so short that copies wait for others, to be issued together.
    let cache = Cache::new(1 << 20, 16 << 20, Some(&device)).unwrap();
    cache.prepare(1);
    for engine in [EngineChoice::Uring, EngineChoice::Pread] {
        let builder = Loader::builder().device(device.clone()).engine(engine).direct(Some(false));
        let loader = builder.cache(cache.clone()).build().unwrap();
        let mut failed = 0;
        for (symbol, nth) in
            ["cuMemcpyHtoDAsync", "cuEventRecord"].into_iter().flat_map(|s| (1..8).map(move |n| (s, n)))
        {
            cache.clear();
            driver.reset();
            driver.set_delay(Duration::from_millis(1));
            driver.fail(symbol, nth, 999);
            let result = loader.load(&checkpoint);
            // How many calls there are depends on how busy the device is.
            let is_failed = driver.count(symbol) >= nth;
            assert_eq!(result.is_err(), is_failed, "{symbol} {nth} by {engine}");
            failed += usize::from(is_failed);
        }
        assert!(failed > 7, "{failed} by {engine}");
    }
    drop(cache);
    driver.reset();
    assert_nothing_left(&driver);
}
