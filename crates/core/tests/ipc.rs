//! Loads into the memory of another process, over the test double of the driver. The other process is this binary again.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

mod common;

use std::time::Duration;

use common::{Made, every_dtype, write_safetensors};
use cuda::Driver;
use cudarc::driver::{result, sys};
use sllm_core::{
    Block, Checkpoint, Device, DeviceError, EngineChoice, Error, ErrorKind, Loader, Placement, SharedBlock,
    SharedMemory, format_uuid,
};
use test_support::{Other, hex, unhex};

/// Set in the exporters that these tests start: the ordinal of the device.
const EXPORTER: &str = "SLLM_TEST_EXPORTER";
/// The exporter's allocation, and the part of it that is the block.
const WHOLE: u64 = 4 << 20;
const OFFSET: u64 = 1 << 20;
const LEN: u64 = 2 << 20;
/// What the exporter fills its allocation with.
const UNTOUCHED: u8 = 0x5C;

/// A process that has exported a block.
struct Exporter {
    process: Other,
    shared: SharedBlock,
    uuid: String,
}

impl Exporter {
    fn start(device: usize) -> Exporter {
        let mut process = Other::start("exporter", |command| {
            command.env(EXPORTER, device.to_string()).env("FAKE_CUDA_DEVICES", "2");
            command.env("LD_LIBRARY_PATH", Driver::find().parent().unwrap());
        });
        let uuid = process.answer("uuid");
        let numbers: Vec<u64> = process.answer("block").split(' ').map(|number| number.parse().unwrap()).collect();
        let handle = unhex(&process.answer("handle")).try_into().unwrap();
        let [base_len, offset, len, buffer_id] = numbers[..] else { panic!("{numbers:?}") };
        let shared = SharedBlock { handle, base_len, offset, len, buffer_id: Some(buffer_id) };
        Exporter { process, shared, uuid }
    }

    /// All bytes of its allocation, as it sees them.
    fn bytes(&mut self) -> Vec<u8> {
        self.process.tell("read");
        unhex(&self.process.answer("bytes"))
    }
}

/// Makes the device's primary context current for the driver's own calls.
fn enter(ordinal: i32) {
    // SAFETY: the device exists; the context is kept until the process ends.
    unsafe { result::ctx::set_current(result::primary_ctx::retain(ordinal).unwrap()).unwrap() };
}

/// Not a test of its own: the other process.
#[test]
fn exporter() {
    let Ok(ordinal) = std::env::var(EXPORTER) else { return };
    let device = Device::cuda(ordinal.parse().unwrap()).unwrap();
    let memory = Block::alloc(&device, WHOLE).unwrap();
    enter(ordinal.parse().unwrap());
    // SAFETY: the block has so many bytes.
    unsafe { sys::cuMemsetD8_v2(memory.addr(), UNTOUCHED, WHOLE as usize) }.result().unwrap();
    // As torch's allocator gives memory out.
    // SAFETY: inside `memory`, which is kept.
    let block = unsafe { Block::from_raw(&device, memory.addr() + OFFSET, LEN) };
    let shared = block.export().unwrap();
    println!("uuid: {}", format_uuid(&device.uuid().unwrap().unwrap()));
    println!("block: {} {} {} {}", shared.base_len, shared.offset, shared.len, shared.buffer_id.unwrap());
    println!("handle: {}", hex(&shared.handle));
    for line in std::io::stdin().lines() {
        assert_eq!(line.unwrap(), "read");
        let mut bytes = vec![0; WHOLE as usize];
        // SAFETY: the driver checks the range.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, memory.addr()) }.unwrap();
        println!("bytes: {}", hex(&bytes));
    }
}

fn device_error(result: Result<impl Sized, Error>) -> DeviceError {
    match result.err() {
        Some(Error::Device(error)) => error,
        other => panic!("{other:?} is not a device's error"),
    }
}

#[test]
fn a_checkpoint_is_loaded_into_another_processs_memory() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(2));
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.safetensors");
    let tensors: Vec<Made> = every_dtype().into_iter().filter(|made| made.bytes.len() < 100_000).collect();
    write_safetensors(&path, &tensors, None);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let placement = Placement::new(&checkpoint, 0..checkpoint.tensors().len(), |_| 0).unwrap();
    let len = placement.blocks[0].len;
    assert!(len > 1000 && len < LEN);

    for engine in [EngineChoice::Pread, EngineChoice::Uring] {
        let mut exporter = Exporter::start(0);
        let shared = exporter.shared.clone();
        assert_eq!((shared.base_len, shared.offset, shared.len), (WHOLE, OFFSET, LEN));
        let device = Device::cuda(0).unwrap();
        assert_eq!(format_uuid(&device.uuid().unwrap().unwrap()), exporter.uuid);
        let memory = SharedMemory::open(&device, &shared.handle).unwrap();
        assert_eq!(memory.len(), WHOLE);
        let block = memory.block(shared.offset, shared.len).unwrap();
        // The block alone keeps the memory open.
        drop(memory);
        assert_eq!(driver.get("imports"), 1);
        let loader = Loader::builder().device(device).engine(engine).build().unwrap();
        loader.fill(&checkpoint, &placement, vec![block]).unwrap();
        assert_eq!(driver.get("imports"), 0, "it is closed with its last block");
        assert_eq!(driver.device_bytes_peak(0), 0, "nothing was allocated here");

        let bytes = exporter.bytes();
        let (before, rest) = bytes.split_at(OFFSET as usize);
        let (inside, after) = rest.split_at(LEN as usize);
        for placed in &placement.tensors {
            let info = &checkpoint.tensors()[placed.tensor];
            let made = tensors.iter().find(|made| info.name == made.name.as_str()).unwrap();
            let start = placed.offset as usize;
            assert!(inside[start..start + made.bytes.len()] == made.bytes, "{:?} by {engine}", made.name);
        }
        let untouched = [before, &inside[len as usize..], after].concat();
        assert!(untouched.iter().all(|byte| *byte == UNTOUCHED), "bytes outside the block were written");
    }
}

#[test]
fn clones_and_blocks_share_one_opening() {
    let driver = Driver::load();
    let exporter = Exporter::start(0);
    let memory = SharedMemory::open(&Device::cuda(0).unwrap(), &exporter.shared.handle).unwrap();
    let (clone, block) = (memory.clone(), memory.block(256, 1).unwrap());
    assert_eq!((driver.count("cuIpcOpenMemHandle"), block.len()), (1, 1));
    drop(memory);
    drop(clone);
    assert_eq!((driver.get("imports"), driver.count("cuIpcCloseMemHandle")), (1, 0));
    drop(block);
    assert_eq!((driver.get("imports"), driver.count("cuIpcCloseMemHandle")), (0, 1));
    // Its context was kept as long, and no longer.
    let mut active = 1;
    // SAFETY: the driver writes two numbers.
    unsafe { sys::cuDevicePrimaryCtxGetState(0, &mut 0, &mut active) }.result().unwrap();
    assert_eq!(active, 0);
}

#[test]
fn a_block_outside_the_memory_is_refused() {
    let _driver = Driver::load();
    let exporter = Exporter::start(0);
    let memory = SharedMemory::open(&Device::cuda(0).unwrap(), &exporter.shared.handle).unwrap();
    for (offset, len) in [(0, WHOLE + 1), (WHOLE, 1), (1, WHOLE), (u64::MAX, 1), (1, u64::MAX), (WHOLE + 1, 0)] {
        let error = device_error(memory.block(offset, len));
        assert_eq!(error, DeviceError::OutsideShared { device: "cuda:0".into(), offset, len, whole: WHOLE });
    }
    for (offset, len) in [(0, WHOLE), (WHOLE - 1, 1), (WHOLE, 0)] {
        assert_eq!(memory.block(offset, len).unwrap().len(), len);
    }
}

#[test]
fn a_handle_that_leads_nowhere_is_an_error() {
    let driver = Driver::load();
    driver.set_devices(2);
    let mut exporter = Exporter::start(0);
    let device = Device::cuda(0).unwrap();
    let good = exporter.shared.handle;
    let mut cut = good;
    cut[32..].fill(0);
    let own = Block::alloc(&device, 100).unwrap().export().unwrap().handle;
    let refused = |device: &Device, handle: &[u8; 64]| {
        let error = device_error(SharedMemory::open(device, handle));
        assert!(matches!(error, DeviceError::NotOpened { .. }), "{error}");
        error.to_string()
    };
    for handle in [[0; 64], [0xFF; 64], cut, own] {
        refused(&device, &handle);
    }
    assert!(refused(&Device::cuda(1).unwrap(), &good).contains("cuda:1"));
    let opened = SharedMemory::open(&device, &good).unwrap();
    exporter.process.kill();
    drop(opened);
    refused(&device, &good);
    assert_eq!(driver.get("imports"), 0);
}

#[test]
fn failures_of_the_driver_are_errors_and_leave_nothing_open() {
    let driver = Driver::load();
    let exporter = Exporter::start(0);
    let device = Device::cuda(0).unwrap();
    let open = || SharedMemory::open(&device, &exporter.shared.handle);
    for (symbol, code) in [("cuIpcOpenMemHandle", 214), ("cuIpcOpenMemHandle", 999), ("cuMemGetAddressRange", 500)] {
        driver.fail(symbol, 1, code);
        let error = device_error(open());
        assert!(matches!(&error, DeviceError::Driver { code: found, .. } if *found == code), "{error}");
        assert_eq!(driver.get("imports"), 0, "{symbol}");
    }
    open().unwrap();
    let block = Block::alloc(&device, 100).unwrap();
    driver.fail("cuIpcGetMemHandle", 1, 214);
    let error = block.export().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.to_string().contains("CUDA_ERROR_ECC_UNCORRECTABLE"), "{error}");
    block.export().unwrap();
}

#[test]
fn an_allocation_is_told_from_the_one_that_was_at_its_place() {
    let driver = Driver::load();
    let device = Device::cuda(0).unwrap();
    let first = Block::alloc(&device, 5000).unwrap();
    // SAFETY: nothing is loaded into it.
    let part = unsafe { Block::from_raw(&device, first.addr() + 100, 50) };
    let [whole, part] = [&first, &part].map(|block| block.export().unwrap());
    assert!(whole.buffer_id.is_some() && whole.buffer_id == part.buffer_id);
    let addr = first.addr();
    drop(first);
    let second = Block::alloc(&device, 5000).unwrap();
    let again = second.export().unwrap();
    assert_eq!((second.addr(), again.handle), (addr, whole.handle));
    assert_ne!(again.buffer_id, whole.buffer_id);
    driver.fail("cuPointerGetAttribute", 1, 801);
    assert_eq!(second.export().unwrap(), SharedBlock { buffer_id: None, ..again });
}

#[test]
fn memory_that_cannot_be_exported_says_so() {
    let driver = Driver::load();
    let device = Device::cuda(0).unwrap();
    let block = Block::alloc(&device, 1000).unwrap();
    // SAFETY: nothing is loaded into them.
    let raw = |addr: u64, len: u64| unsafe { Block::from_raw(&device, addr, len) };
    let not_shareable = |block: &Block| {
        let error = device_error(block.export());
        assert!(matches!(error, DeviceError::NotShareable { .. }), "{error}");
    };
    let shared = raw(block.addr() + 10, 990).export().unwrap();
    assert_eq!((shared.base_len, shared.offset, shared.len), (1000, 10, 990));
    not_shareable(&raw(block.addr() + 10, 991));
    not_shareable(&raw(block.addr(), u64::MAX));
    not_shareable(&raw(0x10, 8));
    not_shareable(&Block::alloc(&device, 0).unwrap());
    driver.set_no_ipc(true);
    not_shareable(&block);
    driver.set_no_ipc(false);
    block.export().unwrap();
}

#[test]
fn a_device_is_found_by_its_uuid_and_no_other_is_touched() {
    let driver = Driver::load();
    driver.set_devices(3);
    let uuids: Vec<[u8; 16]> = (0..3).map(|at| Device::cuda(at).unwrap().uuid().unwrap().unwrap()).collect();
    assert!(uuids[0] != uuids[1] && uuids[1] != uuids[2]);
    let before = driver.count("cuDevicePrimaryCtxRetain");
    let device = Device::cuda_by_uuid(&uuids[2]).unwrap();
    assert_eq!((device.id().as_str(), device.uuid().unwrap()), ("cuda:2", Some(uuids[2])));
    assert_eq!(driver.count("cuDevicePrimaryCtxRetain"), before + 1);

    let unknown = [0xAB; 16];
    let error = device_error(Device::cuda_by_uuid(&unknown));
    assert_eq!(error, DeviceError::NoSuchUuid { uuid: format_uuid(&unknown), count: 3 });
    assert!(error.to_string().contains("abababab-abab-abab-abab-abababababab"), "{error}");
    assert_eq!(driver.count("cuDevicePrimaryCtxRetain"), before + 1);
}
