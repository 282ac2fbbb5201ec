//! Wrong calls are refused, limits hold, and failures come when asked for.

mod common;

use common::{Context, PAGE, Pages, code, read, stream, upload};
use cuda::Driver;
use cudarc::driver::{result, sys};
use std::time::Duration;

fn alloc(len: usize) -> Result<u64, result::DriverError> {
    // SAFETY: the tests read only what they wrote.
    unsafe { result::malloc_sync(len) }
}

fn free(address: u64) -> Result<(), result::DriverError> {
    // SAFETY: freeing waits for copies and refuses what is not allocated.
    unsafe { result::free_sync(address) }
}

#[test]
fn memory_runs_out_and_comes_back() {
    let driver = Driver::load();
    driver.set_memory(1 << 20);
    let _context = Context::new(0).unwrap();
    let first = alloc(1 << 19).unwrap();
    assert_eq!(result::mem_get_info().unwrap(), (1 << 19, 1 << 20));
    assert_eq!(code(alloc((1 << 19) + 1)), 2);
    let second = alloc(1 << 19).unwrap();
    assert_eq!(code(alloc(1)), 2);
    free(first).unwrap();
    free(second).unwrap();
    assert_eq!(code(free(second)), 1);
    assert_eq!(result::mem_get_info().unwrap(), (1 << 20, 1 << 20));
    assert_eq!(driver.count("cuMemAlloc_v2"), 4);
}

#[test]
fn the_nth_call_fails_once() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    driver.fail("cuMemAlloc", 2, 2);
    driver.fail("cuStreamCreate", 1, 999);
    let first = alloc(1).unwrap();
    assert_eq!(code(alloc(1)), 2);
    let third = alloc(1).unwrap();
    assert_eq!(code(result::stream::create(result::stream::StreamKind::NonBlocking)), 999);
    free(first).unwrap();
    free(third).unwrap();
    assert_eq!(driver.count("cuMemAlloc"), 3);
    assert_eq!(driver.count("cuStreamSynchronize"), 0);
}

#[test]
fn a_lost_device_shows_at_the_wait_and_stays_lost() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(10));
    let _context = Context::new(0).unwrap();
    let (stream, device, pages) = (stream(), alloc(PAGE).unwrap(), Pages::new(PAGE));
    pages.register(0, PAGE, 0).unwrap();
    driver.lose_after(1);
    upload(device, &pages, 0, PAGE, stream).unwrap();
    // SAFETY: the stream lives.
    unsafe { result::stream::synchronize(stream) }.unwrap();
    upload(device, &pages, 0, PAGE, stream).expect("accepted");
    // SAFETY: the stream lives.
    assert_eq!(code(unsafe { result::stream::synchronize(stream) }), 214);
    assert_eq!(code(alloc(1)), 214);
    assert_eq!(code(upload(device, &pages, 0, PAGE, stream)), 214);
    assert_eq!(code(Context::new(0)), 214);
    assert_eq!(driver.bytes_h2d(), PAGE as u64);
    // What is given back is given back all the same.
    assert_eq!(code(pages.unregister(0)), 214);
    assert_eq!(code(free(device)), 214);
    assert_eq!((driver.registered_now(), driver.device_bytes_now(0)), (0, 0));
    driver.reset();
    free(alloc(1).unwrap()).unwrap();
}

#[test]
fn a_copy_must_lie_in_one_registration() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let (stream, device, pages) = (stream(), alloc(4 * PAGE).unwrap(), Pages::new(4 * PAGE));
    pages.register(0, PAGE, 0).unwrap();
    pages.register(PAGE, PAGE, 0).unwrap();
    upload(device, &pages, 0, PAGE, stream).unwrap();
    upload(device, &pages, PAGE, PAGE, stream).unwrap();
    upload(device, &pages, 2 * PAGE, 2 * PAGE, stream).unwrap();
    assert_eq!(driver.pageable_copies(), 1);
    for (offset, what) in [(1, "into the next"), (PAGE + 1, "out of the last")] {
        assert_eq!(code(upload(device, &pages, offset, PAGE, stream)), 1, "{what}");
    }
    assert_eq!(code(upload(device, &pages, 0, 4 * PAGE, stream)), 1, "over both and out");
    assert_eq!(code(upload(device + 1, &pages, 0, PAGE, stream)), 0);
    assert_eq!(code(upload(device + 3 * PAGE as u64 + 1, &pages, 0, PAGE, stream)), 1, "behind the allocation");
    assert_eq!(code(upload(device - 1, &pages, 0, PAGE, stream)), 1, "before the allocation");
    assert_eq!(code(upload(pages.at as u64, &pages, 0, PAGE, stream)), 1, "to the host");
    pages.unregister(0).unwrap();
    pages.unregister(PAGE).unwrap();
    free(device).unwrap();
}

#[test]
fn registrations_have_limits() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let pages = Pages::new(4 * PAGE);
    driver.set_register_limit(2 * PAGE as u64);
    driver.set_registered_total(3 * PAGE as u64);
    assert_eq!(code(pages.register(0, 3 * PAGE, 0)), 1);
    pages.register(0, 2 * PAGE, 0).unwrap();
    assert_eq!(code(pages.register(PAGE, 2 * PAGE, 0)), 712);
    assert_eq!(code(pages.register(2 * PAGE, 2 * PAGE, 0)), 2);
    pages.register(2 * PAGE, PAGE, 0).unwrap();
    assert_eq!(driver.registered_now(), 3 * PAGE as u64);
    assert_eq!(code(pages.unregister(PAGE)), 713);
    pages.unregister(0).unwrap();
    pages.unregister(2 * PAGE).unwrap();
    assert_eq!(code(pages.unregister(0)), 713);
    assert_eq!((driver.registered_now(), driver.registered_peak()), (0, 3 * PAGE as u64));
    // Two pieces of one page cannot both be registered.
    pages.register(0, 100, 0).unwrap();
    assert_eq!(code(pages.register(200, 100, 0)), 712);
    pages.unregister(0).unwrap();
}

#[test]
fn read_only_pages_need_the_read_only_flag() {
    let _driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let pages = Pages::with_rights(PAGE, libc::PROT_READ);
    let (stream, device) = (stream(), alloc(PAGE).unwrap());
    assert_eq!(code(pages.register(0, PAGE, 0)), 1);
    pages.register(0, PAGE, sys::CU_MEMHOSTREGISTER_READ_ONLY).unwrap();
    upload(device, &pages, 0, PAGE, stream).unwrap();
    // SAFETY: the driver checks the ranges.
    let refused = unsafe { sys::cuMemcpyDtoHAsync_v2(pages.at.cast(), device, PAGE, stream) };
    assert_eq!(refused as u32, 1);
    // SAFETY: the stream lives. The read goes by another stream, which does not wait for this one.
    unsafe { result::stream::synchronize(stream) }.unwrap();
    assert!(read(device, PAGE) == [0; PAGE]);
    pages.unregister(0).unwrap();
    free(device).unwrap();
    // Nothing is mapped there.
    // SAFETY: the driver checks the range.
    let refused = unsafe { sys::cuMemHostRegister_v2(PAGE as *mut _, PAGE, 0) };
    assert_eq!(refused as u32, 1);
}

#[test]
fn calls_need_a_current_context() {
    let _driver = Driver::load();
    result::init().unwrap();
    // SAFETY: no context is a context.
    unsafe { result::ctx::set_current(std::ptr::null_mut()) }.unwrap();
    assert_eq!(code(alloc(1)), 201);
    assert_eq!(code(result::stream::create(result::stream::StreamKind::NonBlocking)), 201);
    let _context = Context::new(0).unwrap();
    free(alloc(1).unwrap()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(code(alloc(1)), 201)).join().unwrap();
    });
}

#[test]
fn a_context_that_nobody_holds_is_destroyed_with_what_it_held() {
    let driver = Driver::load();
    let context = Context::new(0).unwrap();
    let (device, event) = (alloc(1).unwrap(), result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap());
    drop(context);
    assert_eq!(driver.get("abandoned_device_bytes"), 512);
    assert_eq!(driver.get("abandoned_events"), 1);
    let _context = Context::new(0).unwrap();
    assert_eq!(code(free(device)), 1);
    // SAFETY: the driver refuses handles that are gone.
    assert_eq!(code(unsafe { result::event::query(event) }), 400);
}

#[test]
fn devices_can_be_many_or_none() {
    let driver = Driver::load();
    driver.set_devices(3);
    result::init().unwrap();
    assert_eq!(result::device::get_count().unwrap(), 3);
    assert_eq!(code(result::device::get(3)), 101);
    let (a, b) = (result::device::get(0).unwrap(), result::device::get(2).unwrap());
    assert_ne!(result::device::get_uuid(a).unwrap().bytes, result::device::get_uuid(b).unwrap().bytes);
    let _context = Context::new(2).unwrap();
    let device = alloc(512).unwrap();
    assert_eq!((driver.device_bytes_now(0), driver.device_bytes_now(2)), (0, 512));
    free(device).unwrap();
    driver.set_devices(0);
    assert_eq!(code(result::init()), 100);
}

#[test]
fn errors_have_names() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    driver.fail("cuMemAlloc_v2", 1, 700);
    let error = alloc(1).unwrap_err();
    assert_eq!(error.error_name().unwrap(), c"CUDA_ERROR_ILLEGAL_ADDRESS");
    assert_eq!(error.error_string().unwrap(), c"an illegal memory access was encountered");
}

#[test]
fn pointers_say_what_they_are() {
    let _driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let (device, pages) = (alloc(PAGE).unwrap(), Pages::new(2 * PAGE));
    pages.register(0, PAGE, 0).unwrap();
    let memory_type = |address: u64| {
        let mut kind = 0u32;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: the attribute has the size of `kind`.
        let result = unsafe { sys::cuPointerGetAttribute((&raw mut kind).cast(), attribute, address) };
        result.result().map(|()| kind)
    };
    assert_eq!(memory_type(device + 5).unwrap(), 2);
    assert_eq!(memory_type(pages.at as u64).unwrap(), 1);
    assert_eq!(code(memory_type(pages.at as u64 + PAGE as u64)), 1);
    pages.unregister(0).unwrap();
    free(device).unwrap();
}
