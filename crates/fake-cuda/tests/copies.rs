//! Copies arrive whole, in order and late.

mod common;

use common::{Context, PAGE, Pages, code, read, stream, upload};
use cuda::{Driver, POISON};
use cudarc::driver::{result, sys};
use std::time::{Duration, Instant};

fn alloc(len: usize) -> u64 {
    // SAFETY: the tests read only what they wrote, or the poison.
    unsafe { result::malloc_sync(len) }.unwrap()
}

fn free(address: u64) {
    // SAFETY: it comes from `alloc`, and freeing waits for copies.
    unsafe { result::free_sync(address) }.unwrap();
}

fn event() -> sys::CUevent {
    result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap()
}

#[test]
fn bytes_go_to_the_device_and_back() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let sent: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    let device = alloc(sent.len());
    assert_eq!(device % 512, 0);
    assert_eq!(read(device, 16), [POISON; 16]);
    // SAFETY: the driver checks the range.
    unsafe { result::memcpy_htod_sync(device, &sent) }.unwrap();
    assert!(read(device, sent.len()) == sent);
    assert_eq!(driver.bytes_h2d(), sent.len() as u64);
    assert_eq!(driver.bytes_d2h(), sent.len() as u64 + 16);
    assert_eq!(driver.device_bytes_now(0), 100_352);
    free(device);
    assert_eq!(driver.device_bytes_now(0), 0);
    assert_eq!(driver.device_bytes_peak(0), 100_352);
}

#[test]
fn a_pinned_buffer_reused_too_early_gives_the_wrong_bytes() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(200));
    let _context = Context::new(0).unwrap();
    let (stream, device, pages) = (stream(), alloc(PAGE), Pages::new(PAGE));
    pages.register(0, PAGE, 0).unwrap();
    pages.fill(1);
    upload(device, &pages, 0, PAGE, stream).unwrap();
    pages.fill(2);
    // SAFETY: the stream lives.
    unsafe { result::stream::synchronize(stream) }.unwrap();
    assert!(read(device, PAGE) == [2; PAGE]);
    pages.unregister(0).unwrap();
    free(device);
    assert_eq!(driver.pageable_copies(), 1, "the read");
}

#[test]
fn a_pinned_buffer_reused_after_its_event_gives_the_right_bytes() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(200));
    let _context = Context::new(0).unwrap();
    let (stream, device, pages, event) = (stream(), alloc(PAGE), Pages::new(PAGE), event());
    pages.register(0, PAGE, 0).unwrap();
    pages.fill(1);
    upload(device, &pages, 0, PAGE, stream).unwrap();
    // SAFETY: stream and event live.
    unsafe {
        result::event::record(event, stream).unwrap();
        assert_eq!(code(result::event::query(event)), 600);
        result::event::synchronize(event).unwrap();
        result::event::query(event).unwrap();
    }
    pages.fill(2);
    assert!(read(device, PAGE) == [1; PAGE]);
    pages.unregister(0).unwrap();
    free(device);
    // SAFETY: both live and are not used again.
    unsafe {
        result::event::destroy(event).unwrap();
        result::stream::destroy(stream).unwrap();
    }
    assert_eq!(driver.get("events"), 0);
}

#[test]
fn a_pageable_buffer_is_staged_at_the_call() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(200));
    let _context = Context::new(0).unwrap();
    let (stream, device, pages) = (stream(), alloc(PAGE), Pages::new(PAGE));
    pages.fill(1);
    upload(device, &pages, 0, PAGE, stream).unwrap();
    pages.fill(2);
    // SAFETY: the stream lives.
    unsafe { result::stream::synchronize(stream) }.unwrap();
    assert_eq!(driver.pageable_copies(), 1);
    assert!(read(device, PAGE) == [1; PAGE]);
    free(device);
}

#[test]
fn a_batch_is_copied_as_single_copies_are() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let (stream, device, pages) = (stream(), alloc(4 * PAGE), Pages::new(2 * PAGE));
    pages.register(0, 2 * PAGE, 0).unwrap();
    pages.fill(7);
    let location = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let order = sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    let attributes =
        sys::CUmemcpyAttributes { srcAccessOrder: order, srcLocHint: location, dstLocHint: location, flags: 0 };
    let batch = |to: &[u64], lens: &[usize], kinds: usize, stream| {
        let (mut to, mut lens, mut attributes) = (to.to_vec(), lens.to_vec(), attributes);
        let (mut from, mut first, mut failed) = (vec![pages.at.addr() as u64; to.len()], 0, usize::MAX);
        let (to, from, lens, count) = (to.as_mut_ptr(), from.as_mut_ptr(), lens.as_mut_ptr(), to.len());
        // SAFETY: arrays of one length; the driver checks the ranges, and the pages outlive the copies.
        let code = unsafe {
            sys::cuMemcpyBatchAsync(to, from, lens, count, &mut attributes, &mut first, kinds, &mut failed, stream)
        };
        (code as u32, failed)
    };
    assert_eq!(batch(&[device + PAGE as u64, device + 3 * PAGE as u64], &[PAGE, 100], 1, stream).0, 0);
    // SAFETY: the stream lives.
    unsafe { result::stream::synchronize(stream) }.unwrap();
    assert!(read(device + PAGE as u64, PAGE) == [7; PAGE]);
    assert!(read(device + 3 * PAGE as u64, 100) == [7; 100]);
    assert_eq!((driver.get("copies_h2d"), driver.count("cuMemcpyBatchAsync")), (2, 1));

    assert_eq!(batch(&[], &[], 1, stream).0, 1, "no copy");
    assert_eq!(batch(&[device], &[PAGE], 1, std::ptr::null_mut()).0, 1, "the default stream");
    assert_eq!(batch(&[device], &[PAGE], 2, stream).0, 1, "more kinds than copies");
    assert_eq!(
        batch(&[device, device + 4 * PAGE as u64], &[PAGE, 1], 1, stream),
        (801, 1),
        "a place that is no device's, and which"
    );
    // SAFETY: the stream lives.
    unsafe { result::stream::synchronize(stream) }.unwrap();
    pages.unregister(0).unwrap();
    free(device);
}

#[test]
fn events_order_copies_of_two_streams() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(5));
    let _context = Context::new(0).unwrap();
    let (first, second, event) = (stream(), stream(), event());
    let (a, b, pages) = (alloc(PAGE), alloc(PAGE), Pages::new(PAGE));
    pages.register(0, PAGE, 0).unwrap();
    pages.fill(7);
    // With a low bandwidth the first copy takes longer than the delay of the second.
    driver.set_bandwidth(100_000);
    let start = Instant::now();
    upload(a, &pages, 0, PAGE, first).unwrap();
    // SAFETY: all handles live, and the driver checks the ranges.
    unsafe {
        result::event::record(event, first).unwrap();
        result::stream::wait_event(second, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT).unwrap();
        result::memcpy_dtod_async(b, a, PAGE, second).unwrap();
        result::stream::synchronize(second).unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(80), "4096 bytes twice at 100 kB/s");
    driver.set_bandwidth(0);
    assert!(read(b, PAGE) == [7; PAGE]);
    pages.unregister(0).unwrap();
    free(a);
    free(b);
}

#[test]
fn freeing_and_unregistering_wait_for_copies_in_flight() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(20));
    let _context = Context::new(0).unwrap();
    let (stream, device, pages) = (stream(), alloc(PAGE), Pages::new(PAGE));
    pages.register(0, PAGE, 0).unwrap();
    let start = Instant::now();
    upload(device, &pages, 0, PAGE, stream).unwrap();
    pages.unregister(0).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert_eq!(driver.get("waits_on_unregister"), 1);
    upload(device, &pages, 0, PAGE, stream).unwrap();
    free(device);
    assert_eq!(driver.get("waits_on_free"), 1);
    assert_eq!(driver.bytes_h2d(), 2 * PAGE as u64);
}

fn copy_2d(pages: &Pages, device: u64, dst_pitch: usize) -> sys::CUDA_MEMCPY2D {
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 2,
        srcY: 1,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
        srcHost: pages.at.cast(),
        srcDevice: 0,
        srcArray: std::ptr::null_mut(),
        srcPitch: 10,
        dstXInBytes: 1,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: device,
        dstArray: std::ptr::null_mut(),
        dstPitch: dst_pitch,
        WidthInBytes: 3,
        Height: 4,
    }
}

#[test]
fn a_two_dimensional_copy_takes_rows() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let (stream, device, pages) = (stream(), alloc(32), Pages::new(PAGE));
    pages.register(0, PAGE, 0).unwrap();
    for i in 0..=255u8 {
        // SAFETY: in the mapping, and no copy is in flight.
        unsafe { pages.at.add(i.into()).write(i) };
    }
    // SAFETY: the driver checks the ranges.
    unsafe {
        sys::cuMemcpy2DAsync_v2(&copy_2d(&pages, device, 8), stream).result().unwrap();
        result::stream::synchronize(stream).unwrap();
    }
    let mut wanted = [POISON; 32];
    for (row, first) in [12, 22, 32, 42].into_iter().enumerate() {
        wanted[row * 8 + 1..row * 8 + 4].copy_from_slice(&[first, first + 1, first + 2]);
    }
    assert_eq!(read(device, 32), wanted);
    assert_eq!(driver.bytes_h2d(), 12);
    // The last row would end behind the allocation; a pitch is too narrow; a pitch is over the device's limit.
    for pitch in [10, 3, 1 << 31] {
        // SAFETY: the driver checks the ranges.
        let refused = unsafe { sys::cuMemcpy2DAsync_v2(&copy_2d(&pages, device, pitch), stream) };
        assert_eq!(refused as u32, 1, "pitch {pitch}");
    }
    pages.unregister(0).unwrap();
    free(device);
}

#[test]
fn a_fill_writes_its_range_only() {
    let _driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let (stream, device) = (stream(), alloc(64));
    // SAFETY: the driver checks the range.
    unsafe {
        result::memset_d8_async(device + 8, 3, 16, stream).unwrap();
        result::stream::synchronize(stream).unwrap();
    }
    let mut wanted = [POISON; 64];
    wanted[8..24].fill(3);
    assert_eq!(read(device, 64), wanted);
    free(device);
}

#[test]
fn blocking_streams_and_the_default_one_wait_for_each_other() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(10));
    let _context = Context::new(0).unwrap();
    let (device, pages) = (alloc(PAGE), Pages::new(PAGE));
    let stream = result::stream::create(result::stream::StreamKind::Default).unwrap();
    pages.register(0, PAGE, 0).unwrap();
    pages.fill(4);
    driver.set_bandwidth(100_000);
    upload(device, &pages, 0, PAGE, stream).unwrap();
    // The synchronous read goes by the default stream, and by an engine of its own.
    assert_eq!(read(device, 16), [4; 16]);
    pages.unregister(0).unwrap();
    free(device);
}

#[test]
fn events_tell_the_time_between_them() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(10));
    let _context = Context::new(0).unwrap();
    let (stream, device, start, end) = (stream(), alloc(16), event(), event());
    // SAFETY: all handles live, and the driver checks the range.
    let milliseconds = unsafe {
        result::event::record(start, stream).unwrap();
        result::memset_d8_async(device, 0, 16, stream).unwrap();
        result::event::record(end, stream).unwrap();
        result::event::synchronize(end).unwrap();
        result::event::elapsed(start, end).unwrap()
    };
    assert!((5.0..1000.0).contains(&milliseconds), "{milliseconds} ms");
    free(device);
}

#[test]
fn cudarcs_safe_layer_works() {
    let driver = Driver::load();
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let sent: Vec<f32> = (0..1000u16).map(f32::from).collect();
    let device = stream.clone_htod(&sent).unwrap();
    assert_eq!(stream.clone_dtoh(&device).unwrap(), sent);
    drop((device, stream, context));
    assert_eq!(driver.device_bytes_now(0), 0);
    assert_eq!(driver.get("abandoned_device_bytes"), 0);
}

#[test]
fn many_threads_copy_at_once() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    std::thread::scope(|scope| {
        for thread in 1..=4u8 {
            scope.spawn(move || {
                let _context = Context::new(0).unwrap();
                let (stream, device, pages) = (stream(), alloc(8 * PAGE), Pages::new(PAGE));
                pages.register(0, PAGE, 0).unwrap();
                for slot in 0..8u8 {
                    pages.fill(thread * 10 + slot);
                    upload(device + u64::from(slot) * PAGE as u64, &pages, 0, PAGE, stream).unwrap();
                    // SAFETY: the stream lives.
                    unsafe { result::stream::synchronize(stream) }.unwrap();
                }
                let bytes = read(device, 8 * PAGE);
                for (slot, chunk) in (0..8u8).zip(bytes.chunks(PAGE)) {
                    assert!(chunk.iter().all(|byte| *byte == thread * 10 + slot));
                }
                pages.unregister(0).unwrap();
                free(device);
                // SAFETY: the stream lives and is not used again.
                unsafe { result::stream::destroy(stream) }.unwrap();
            });
        }
    });
    assert_eq!(driver.bytes_h2d(), 4 * 8 * PAGE as u64);
    assert_eq!((driver.registered_now(), driver.device_bytes_now(0), driver.get("streams")), (0, 0, 0));
}
