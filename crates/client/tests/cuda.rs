//! Loads to GPU memory over the double of the driver, by a server in another process, which is this binary again.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{TestServer, model};
use cuda::Driver;
use cudarc::driver::{result, sys};
use sllm_client::{ClientOptions, Error, Refusal, RemoteOptions, StoreClient, StoreRemote};
use sllm_core::{Block, Control, Device, Loader, Segment, SharedBlock};
use sllm_server::{Address, Config, Server};
use test_support::Other;

/// Set in the servers that these tests start.
const SERVER: &str = "SLLM_TEST_SERVER";

/// A server in a process of its own.
struct Served {
    process: Other,
    address: String,
}

impl Served {
    /// The one that does what a script says.
    fn start() -> Served {
        Served::of("script", &[])
    }

    /// The real one, for models below a directory.
    fn real(models: &Path, settings: &[(&str, &str)]) -> Served {
        Served::of(models.to_str().unwrap(), settings)
    }

    fn of(what: &str, settings: &[(&str, &str)]) -> Served {
        let mut process = Other::start("server", |command| {
            command.env(SERVER, what).envs(settings.iter().copied()).env("FAKE_CUDA_DEVICES", "2");
            command.env("LD_LIBRARY_PATH", Driver::find().parent().unwrap());
        });
        let address = process.answer("address");
        Served { process, address }
    }

    /// How many blocks were attached.
    fn attached(&mut self) -> usize {
        self.process.tell("attached");
        self.process.answer("attached").parse().unwrap()
    }

    fn remote(&self) -> StoreRemote {
        let client = StoreClient::connect(&ClientOptions::new().address(self.address.clone())).unwrap();
        StoreRemote::new(client, RemoteOptions::new().staging_bytes(4 << 20))
    }
}

/// Not a test of its own: the other process.
#[test]
fn server() {
    let Ok(what) = std::env::var(SERVER) else { return };
    if what != "script" {
        return real_server(Path::new(&what));
    }
    let server = TestServer::start();
    println!("address: {}", server.address);
    for line in std::io::stdin().lines() {
        assert_eq!(line.unwrap(), "attached");
        println!("attached: {}", server.log().attached);
    }
}

fn real_server(models: &Path) {
    let mut config = Config::new(models);
    config.listen = vec![Address::Unix(models.join("socket"))];
    config.pool_len = 64 << 20;
    config.chunk_len = 4 << 20;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let server = Server::bind(config).unwrap();
        println!("address: {}", server.addresses()[0]);
        server.run(std::future::pending()).await.unwrap();
    });
}

/// Memory of a device, all zero, and what is in it.
struct Gpu {
    device: Device,
    ordinal: i32,
}

impl Gpu {
    fn new(ordinal: i32) -> Gpu {
        Gpu { device: Device::cuda(ordinal as usize).unwrap(), ordinal }
    }

    fn enter(&self) {
        // SAFETY: the device exists; the context is kept until the process ends.
        unsafe { result::ctx::set_current(result::primary_ctx::retain(self.ordinal).unwrap()).unwrap() };
    }

    fn alloc(&self, len: u64) -> Block {
        let block = Block::alloc(&self.device, len).unwrap();
        self.enter();
        // SAFETY: the block has so many bytes.
        unsafe { sys::cuMemsetD8_v2(block.addr(), 0, len as usize) }.result().unwrap();
        block
    }

    fn bytes(&self, block: &Block) -> Vec<u8> {
        self.enter();
        let mut bytes = vec![0; block.len() as usize];
        // SAFETY: the block is allocated and has so many bytes.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, block.addr()) }.unwrap();
        bytes
    }
}

#[test]
fn exported_memory_is_filled_in_place_and_each_allocation_is_attached_once() {
    let driver = Driver::load();
    let mut other = Served::start();
    let model = model(6_000_000);
    let (segments, lens) = model.segments();
    let gpu = Gpu::new(0);
    // Two blocks in one allocation, as torch gives memory out.
    let whole = gpu.alloc(1000 + lens[0] + 24 + lens[1]);
    // SAFETY: inside `whole`, which is kept.
    let blocks = unsafe {
        [
            Block::from_raw(&gpu.device, whole.addr() + 1000, lens[0]),
            Block::from_raw(&gpu.device, whole.addr() + 1000 + lens[0] + 24, lens[1]),
        ]
    };
    let remote = other.remote();
    for _ in 0..2 {
        let moved = remote.fill(&model.checkpoint, &segments, &blocks, &Control::new()).unwrap();
        assert_eq!((moved.staged, moved.batches), (0, 1));
    }
    assert_eq!(other.attached(), 1);
    let mut expected = vec![0; 1000];
    let parts = model.expected(&segments, &lens);
    expected.extend(&parts[0]);
    expected.extend([0; 24]);
    expected.extend(&parts[1]);
    assert!(gpu.bytes(&whole) == expected);
    assert_eq!(driver.count("cuMemcpyDtoDAsync"), 0);
}

#[test]
fn memory_that_cannot_be_exported_is_filled_by_way_of_memory_that_can() {
    let driver = Driver::load();
    let mut other = Served::start();
    let model = model(12_000_000);
    let (segments, lens) = model.segments();
    let gpu = Gpu::new(0);
    let blocks: Vec<Block> = lens.iter().map(|&len| gpu.alloc(len)).collect();
    // Of the first block only; the second one is reached directly.
    driver.fail("cuIpcGetMemHandle", 1, 1);
    let remote = other.remote();
    let moved = remote.fill(&model.checkpoint, &segments, &blocks, &Control::new()).unwrap();
    let staged: u64 = segments.iter().filter(|segment| segment.block == 0).map(Segment::len).sum();
    assert_eq!(moved.staged, staged);
    for (block, expected) in blocks.iter().zip(model.expected(&segments, &lens)) {
        assert!(gpu.bytes(block) == expected);
    }
    assert_eq!(other.attached(), 2);
    // Both, in rows too.
    driver.fail("cuIpcGetMemHandle", 1, 1);
    driver.fail("cuIpcGetMemHandle", 2, 1);
    let blocks: Vec<Block> = lens.iter().map(|&len| gpu.alloc(len)).collect();
    let moved = other.remote().fill(&model.checkpoint, &segments, &blocks, &Control::new()).unwrap();
    assert_eq!(moved.staged, moved.bytes);
    for (block, expected) in blocks.iter().zip(model.expected(&segments, &lens)) {
        assert!(gpu.bytes(block) == expected);
    }
    assert!(driver.count("cuMemcpy2DAsync") > 0, "rows are copied as such");
}

#[test]
fn staging_memory_is_given_back_when_the_server_has_let_go_of_it() {
    let driver = Driver::load();
    let other = Served::start();
    let model = model(1000);
    let gpu = Gpu::new(0);
    let block = gpu.alloc(1000);
    let mine = driver.device_bytes_now(0);
    driver.fail("cuIpcGetMemHandle", 1, 1);
    let remote = other.remote();
    let segment = Segment::contiguous(0, 0, 1000, 0, 0);
    remote.fill(&model.checkpoint, &[segment], std::slice::from_ref(&block), &Control::new()).unwrap();
    assert!(driver.device_bytes_now(0) > mine);
    // While the client lives its stream is ended soon, and the memory goes then.
    while driver.device_bytes_now(0) > mine {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    drop((block, remote));
    assert_eq!((driver.device_bytes_now(0), driver.get("streams")), (0, 0));
}

#[test]
fn blocks_of_two_devices_and_the_host_are_filled_by_one_load() {
    let driver = Driver::load();
    driver.set_devices(2);
    let other = Served::start();
    let model = model(3_000_000);
    let gpus = [Gpu::new(0), Gpu::new(1)];
    let blocks = [gpus[0].alloc(1_000_000), gpus[1].alloc(1_000_000)];
    let segments = [Segment::contiguous(0, 0, 1_000_000, 1, 0), Segment::contiguous(0, 1_000_000, 1_000_000, 0, 0)];
    other.remote().fill(&model.checkpoint, &segments, &blocks, &Control::new()).unwrap();
    assert!(gpus[1].bytes(&blocks[1]) == model.bytes[..1_000_000]);
    assert!(gpus[0].bytes(&blocks[0]) == model.bytes[1_000_000..2_000_000]);
}

#[test]
fn a_server_that_cannot_open_the_memory_refuses() {
    let _driver = Driver::load();
    // In this process, which cannot open its own memory.
    let server = TestServer::start();
    let model = model(1000);
    let gpu = Gpu::new(0);
    let block = gpu.alloc(1000);
    let segment = Segment::contiguous(0, 0, 1000, 0, 0);
    let error = server.remote().fill(&model.checkpoint, &[segment], &[block], &Control::new()).unwrap_err();
    assert!(matches!(error, Error::Refused { refusal: Refusal::Invalid, .. }), "{error}");
}

#[test]
fn staging_memory_is_as_large_as_there_is_room() {
    let driver = Driver::load();
    let other = Served::start();
    let model = model(30 << 20);
    let gpu = Gpu::new(0);
    let block = gpu.alloc(30 << 20);
    driver.set_memory(driver.device_bytes_now(0) + (10 << 20));
    driver.fail("cuIpcGetMemHandle", 1, 1);
    let client = StoreClient::connect(&ClientOptions::new().address(other.address.clone())).unwrap();
    let remote = StoreRemote::new(client, RemoteOptions::new().staging_bytes(64 << 20));
    let segment = Segment::contiguous(0, 0, 30 << 20, 0, 0);
    let moved = remote.fill(&model.checkpoint, &[segment], std::slice::from_ref(&block), &Control::new()).unwrap();
    assert_eq!(moved.staged, 30 << 20);
    assert!(gpu.bytes(&block) == model.bytes[..30 << 20]);
}

#[test]
fn the_real_server_fills_exported_memory_and_memory_that_cannot_be() {
    let driver = Driver::load();
    let model = model(12_000_000);
    let other = Served::real(model.dir.path(), &[]);
    let (segments, lens) = model.segments();
    let gpu = Gpu::new(0);
    let remote = other.remote();
    for refused in [0, 1, 2] {
        for nth in 1..=refused {
            driver.fail("cuIpcGetMemHandle", nth, 1);
        }
        let blocks: Vec<Block> = lens.iter().map(|&len| gpu.alloc(len)).collect();
        let moved = remote.fill(&model.checkpoint, &segments, &blocks, &Control::new()).unwrap();
        assert_eq!((moved.staged == 0, moved.staged == moved.bytes), (refused == 0, refused == 2));
        for (block, expected) in blocks.iter().zip(model.expected(&segments, &lens)) {
            assert!(gpu.bytes(block) == expected);
        }
    }
}

#[test]
fn memory_that_is_freed_and_made_again_at_its_place_is_filled_and_not_what_was_there() {
    let _driver = Driver::load();
    let model = model(12_000_000);
    let other = Served::real(model.dir.path(), &[]);
    let gpu = Gpu::new(0);
    // A stream kept as long as the test, and one that is kept by another client meanwhile.
    let client = || StoreClient::connect(&ClientOptions::new().address(other.address.clone())).unwrap();
    let kept = || StoreRemote::new(client(), RemoteOptions::new().linger(Duration::from_secs(600)));
    let remotes = [kept(), kept()];
    let len = 3_000_000;
    let mut before: Option<(u64, SharedBlock)> = None;
    for round in 0..6 {
        let block = gpu.alloc(len);
        let shared = block.export().unwrap();
        if let Some((addr, last)) = &before {
            assert_eq!((block.addr(), shared.handle), (*addr, last.handle), "the double makes it elsewhere");
        }
        let start = round * 1_000_000;
        let segment = Segment::contiguous(0, start, len, 0, 0);
        let remote = &remotes[usize::try_from(round).unwrap() / 2 % 2];
        let moved = remote.fill(&model.checkpoint, &[segment], std::slice::from_ref(&block), &Control::new()).unwrap();
        assert_eq!(moved.staged, 0);
        let (start, end) = (start as usize, (start + len) as usize);
        assert!(gpu.bytes(&block) == model.bytes[start..end], "round {round}: the bytes went elsewhere");
        before = Some((block.addr(), shared));
    }
}

#[test]
fn a_server_that_is_killed_in_the_middle_is_noted_once_and_the_bytes_are_right() {
    let _driver = Driver::load();
    let model = model(40_000_000);
    // 20 MB a second.
    let other = Arc::new(Mutex::new(Served::real(model.dir.path(), &[("FAKE_CUDA_BANDWIDTH", "20000000")])));
    let gpu = Gpu::new(0);
    let remote = other.lock().unwrap().remote();
    let victim = Arc::clone(&other);
    let control = Control::new().on_progress(move |progress| {
        if progress.done > 0 && progress.done < progress.total {
            victim.lock().unwrap().process.kill();
        }
    });
    let loader =
        Loader::builder().device(gpu.device.clone()).remote(Box::new(remote)).control(control).build().unwrap();
    let loaded = loader.load(&model.checkpoint).unwrap();
    let report = loaded.report();
    assert_ne!(report.engines[0].engine, "server");
    assert_eq!(report.notes.len(), 1, "{:?}", report.notes);
    assert!(report.notes[0].contains("the connection to the store server was lost"), "{:?}", report.notes);
    assert!(model.bytes.ends_with(&loaded.tensor("w").unwrap().to_vec().unwrap()));
}
