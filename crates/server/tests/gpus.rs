//! Loads into the memory of other processes on GPUs, over the test double of the driver, whose copies are late.

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use std::collections::HashMap;
use std::time::Duration;

use common::session::{Loading, all_of, load, open_message, ticket};
use common::{SEALED, Served, memory, models};
use cuda::Driver;
use gpu::{Owner, UNTOUCHED};
use sllm_proto::storage::{
    ClearMemRequest, ConfirmModelRequest, DeviceType, LoadModelRequest, MemCopyChunk, MemCopyChunkList, MemCopyHandle,
    MemCopyHandleList, RegisterModelRequest, UnloadModelRequest,
};
use sllm_proto::store::load_request::Kind as Asked;
use sllm_proto::store::{Attach, Batch, CudaMemory, StatusRequest, attach};
use tonic::{Code, Status};

const LEN: usize = 9_000_123;
const PAUSE: Duration = Duration::from_millis(5);

/// Not a test of its own: the other process.
#[test]
fn owner() {
    gpu::own();
}

fn fill(models: &std::path::Path) {
    models::safetensors(models, "plain", 1, LEN);
    models::store(models, "store", 2, LEN);
    models::original(models, "vllm/original/rank_0", 3, [5_000_008, 4_000_000]);
}

fn to(device: DeviceType) -> i32 {
    device.into()
}

fn chunk(src_offset: u64, size: u64, dst_offset: u64) -> MemCopyChunk {
    MemCopyChunk { src_offset, size, dst_offset, handle_idx: 0 }
}

/// The original's request for one device.
fn request(model: &str, replica: &str, owner: &Owner, chunks: Vec<MemCopyChunk>) -> LoadModelRequest {
    let handle = MemCopyHandle { cuda_ipc_handle: owner.handle.clone() };
    LoadModelRequest {
        model_path: model.into(),
        replica_uuid: replica.into(),
        chunks: HashMap::from([(owner.uuid.clone(), MemCopyChunkList { chunks })]),
        handles: HashMap::from([(owner.uuid.clone(), MemCopyHandleList { handles: vec![handle] })]),
        target_device_type: to(DeviceType::Gpu),
    }
}

async fn confirm(served: &Served, model: &str, replica: &str, device: DeviceType) -> Result<(), Status> {
    let (model_path, replica_uuid) = (model.into(), replica.into());
    let request = ConfirmModelRequest { model_path, replica_uuid, target_device_type: to(device) };
    served.storage().await.confirm_model(request).await.map(drop)
}

async fn unload(served: &Served, model: &str, replica: &str, device: DeviceType) -> Result<(), Status> {
    let (model_path, replica_uuid) = (model.into(), replica.into());
    let request = UnloadModelRequest { model_path, replica_uuid, target_device_type: to(device) };
    served.storage().await.unload_model(request).await.map(drop)
}

async fn into_pool(served: &Served, model: &str) -> Result<(), Status> {
    let request = LoadModelRequest {
        model_path: model.into(),
        target_device_type: to(DeviceType::Cpu),
        ..LoadModelRequest::default()
    };
    served.storage().await.load_model_async(request).await.map(drop)
}

/// Waits until the server has no memory of others open.
async fn all_closed(driver: &Driver) {
    while driver.get("imports") > 0 {
        tokio::time::sleep(PAUSE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_originals_client_gets_its_bytes_in_its_order_of_calls() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(2));
    let served = Served::start(fill, |_| ());
    for (at, model) in ["vllm/original/rank_0", "store", "plain"].into_iter().enumerate() {
        let source = models::bytes(&served.models().join(model));
        let len = source.len() as u64;
        let mut owner = Owner::start(0, len + 100);
        let register = RegisterModelRequest { model_path: model.into() };
        let registered = served.storage().await.register_model(register).await.unwrap().into_inner();
        assert_eq!(registered.model_size, i64::try_from(len).unwrap());
        into_pool(&served, model).await.unwrap();
        // Odd places, over the end of the first file, in another order than the files'.
        let chunks = vec![chunk(4_999_999, len - 4_999_999, 7), chunk(1, 4_000_000, len - 4_999_999 + 7)];
        let replica = format!("replica-{at}");
        served.storage().await.load_model_async(request(model, &replica, &owner, chunks)).await.unwrap();
        confirm(&served, model, &replica, DeviceType::Gpu).await.unwrap();
        confirm(&served, model, &replica, DeviceType::Gpu).await.unwrap();
        confirm(&served, model, "", DeviceType::Cpu).await.unwrap();
        let bytes = owner.bytes(served.dir.path());
        let mut expected = vec![UNTOUCHED; 7];
        expected.extend(&source[4_999_999..]);
        expected.extend(&source[1..4_000_001]);
        expected.resize(bytes.len(), UNTOUCHED);
        assert!(bytes == expected, "{model}");
        all_closed(&driver).await;
        unload(&served, model, &replica, DeviceType::Gpu).await.unwrap();
        assert_eq!(confirm(&served, model, &replica, DeviceType::Gpu).await.unwrap_err().code(), Code::NotFound);
        unload(&served, model, "", DeviceType::Cpu).await.unwrap();
        assert_eq!(unload(&served, model, "", DeviceType::Cpu).await.unwrap_err().code(), Code::NotFound);
    }
    assert_eq!(driver.pageable_copies(), driver.count("cuMemcpyDtoH"), "something was copied out of unpinned memory");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_cannot_be_is_refused_at_once_and_confirming_it_does_not_wait() {
    let driver = Driver::load();
    driver.set_devices(2);
    let served = Served::start(fill, |_| ());
    let owner = Owner::start(0, 1 << 20);
    let good = request("plain", "r", &owner, vec![chunk(0, 1000, 0)]);
    let len = models::bytes(&served.models().join("plain")).len() as u64;
    let with = |change: &dyn Fn(&mut LoadModelRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    let copying = |wrong: MemCopyChunk| with(&|r| r.chunks.values_mut().for_each(|list| list.chunks.push(wrong)));
    let handle = |bytes: Vec<u8>| {
        with(&|r| r.handles.values_mut().for_each(|list| list.handles[0].cuda_ipc_handle = bytes.clone()))
    };
    let device = |uuid: &str| {
        with(&|r| {
            r.chunks = r.chunks.drain().map(|(_, list)| (uuid.to_owned(), list)).collect();
            r.handles = r.handles.drain().map(|(_, list)| (uuid.to_owned(), list)).collect();
        })
    };
    let other = Owner::start(1, 1000).uuid.clone();
    for (request, code) in [
        (with(&|r| r.model_path.clear()), Code::InvalidArgument),
        (with(&|r| r.model_path = "missing".into()), Code::NotFound),
        (with(&|r| r.replica_uuid.clear()), Code::InvalidArgument),
        (with(&|r| r.replica_uuid = "x".repeat(1000)), Code::InvalidArgument),
        (with(&|r| r.target_device_type = 0), Code::Unimplemented),
        (with(&|r| r.target_device_type = 9), Code::InvalidArgument),
        (with(&|r| r.chunks.clear()), Code::InvalidArgument),
        (with(&|r| r.handles.clear()), Code::InvalidArgument),
        (with(&|r| r.handles.values_mut().for_each(|list| list.handles.clear())), Code::InvalidArgument),
        (with(&|r| drop(r.handles.insert("x".into(), MemCopyHandleList::default()))), Code::InvalidArgument),
        (copying(chunk(len, 1, 0)), Code::InvalidArgument),
        (copying(chunk(u64::MAX, u64::MAX, 0)), Code::InvalidArgument),
        (copying(chunk(2000, 1, 1 << 20)), Code::InvalidArgument),
        (copying(chunk(2000, 1, u64::MAX)), Code::InvalidArgument),
        (copying(MemCopyChunk { handle_idx: 1, ..chunk(2000, 1, 2000) }), Code::InvalidArgument),
        (handle(vec![0; 64]), Code::InvalidArgument),
        (handle(vec![0xff; 64]), Code::InvalidArgument),
        (handle(vec![]), Code::InvalidArgument),
        (handle(owner.handle[..63].to_vec()), Code::InvalidArgument),
        (device("abababab-abab-abab-abab-abababababab"), Code::NotFound),
        (device("no uuid"), Code::NotFound),
        // Memory of one GPU said to be another's.
        (device(&other), Code::InvalidArgument),
    ] {
        let told = format!("{request:?}");
        let error = served.storage().await.load_model_async(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{told}: {error}");
        assert!(!error.message().is_empty(), "{told}");
        assert_eq!(confirm(&served, "plain", "r", DeviceType::Gpu).await.unwrap_err().code(), Code::NotFound);
    }
    assert_eq!(confirm(&served, "missing", "r", DeviceType::Gpu).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(unload(&served, "plain", "r", DeviceType::Gpu).await.unwrap_err().code(), Code::NotFound);
    all_closed(&driver).await;
    served.storage().await.load_model_async(good).await.unwrap();
    confirm(&served, "plain", "r", DeviceType::Gpu).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_is_written_twice_is_told_by_confirming() {
    let _driver = Driver::load();
    let served = Served::start(fill, |_| ());
    let mut owner = Owner::start(0, 1 << 20);
    let twice = request("plain", "r", &owner, vec![chunk(0, 1000, 0), chunk(5000, 1000, 999)]);
    served.storage().await.load_model_async(twice).await.unwrap();
    let error = confirm(&served, "plain", "r", DeviceType::Gpu).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(owner.bytes(served.dir.path()).iter().all(|&byte| byte == UNTOUCHED));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_load_into_several_gpus_at_once() {
    let driver = Driver::load();
    driver.set_devices(2);
    driver.set_delay(Duration::from_millis(2));
    let served = Served::start(fill, |_| ());
    let path = served.models().join("store");
    let open = open_message("store", &path);
    let source = models::bytes(&path);
    let mut owners: Vec<Owner> = (0..4).map(|at| Owner::start(at % 2, source.len() as u64 + 64)).collect();
    let mut streams = Vec::new();
    for owner in &owners {
        let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
        let cuda = owner.told();
        // Two blocks of one memory.
        for (len, offset) in [(100, 0), (source.len() as u64, 64)] {
            loading.ask(Asked::Attach(Attach { len, offset, memory: Some(attach::Memory::Cuda(cuda.clone())) })).await;
        }
        let mut segments = all_of(&open);
        segments.iter_mut().for_each(|segment| segment.block = 1);
        loading.batch(segments).await;
        streams.push(loading);
    }
    for stream in &mut streams {
        assert_eq!(stream.done().await.unwrap().bytes, source.len() as u64);
    }
    for owner in &mut owners {
        let bytes = owner.bytes(served.dir.path());
        assert!(bytes[64..] == source && bytes[..64].iter().all(|&byte| byte == UNTOUCHED));
    }
    assert_eq!(driver.pageable_copies(), 0, "the pool is pinned for one GPU only");
    assert_eq!(driver.get("imports"), 4, "a stream keeps its memory open");
    drop(streams);
    all_closed(&driver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_holds_no_context_and_its_next_load_is_right() {
    let driver = Driver::load();
    driver.set_devices(2);
    let served = Served::start(fill, |config| config.gpu_idle = Duration::ZERO);
    let path = served.models().join("store");
    let (open, source) = (open_message("store", &path), models::bytes(&path));
    // The pool is pinned by the first GPU when it is made, then by the one that is loaded to.
    for device in [1, 0] {
        let mut owner = Owner::start(device, source.len() as u64);
        let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
        let cuda = owner.told();
        let memory = Some(attach::Memory::Cuda(cuda));
        loading.ask(Asked::Attach(Attach { len: source.len() as u64, offset: 0, memory })).await;
        loading.batch(all_of(&open)).await;
        loading.done().await.unwrap();
        assert!(owner.bytes(served.dir.path()) == source);
        assert!(driver.registered_now() > 0 && driver.get("contexts") > 0, "a session keeps what it uses");
        drop(loading);
        while driver.get("contexts") > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        assert_eq!(driver.registered_now(), 0);
        let pool = served.store().await.status(StatusRequest {}).await.unwrap().into_inner().pool.unwrap();
        assert!(pool.resident >= source.len() as u64 && pool.page_locked == 0, "{pool:?}");
    }
    assert_eq!(driver.pageable_copies(), 0, "something was copied out of unpinned memory");
    assert_eq!(driver.get("abandoned_registered_bytes"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_killed_in_the_middle_of_a_copy_hurts_nobody() {
    let driver = Driver::load();
    let served = Served::start(fill, |_| ());
    let source = models::bytes(&served.models().join("plain"));
    let open = open_message("plain", &served.models().join("plain"));
    load(&served, "plain").await.unwrap();
    // Some 90 ms a load.
    driver.set_bandwidth(100_000_000);
    for _ in 0..3 {
        let mut owner = Owner::start(0, source.len() as u64);
        let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
        let cuda = owner.told();
        let memory = Some(attach::Memory::Cuda(cuda));
        loading.ask(Asked::Attach(Attach { len: source.len() as u64, offset: 0, memory })).await;
        for _ in 0..20 {
            loading.batch(all_of(&open)).await;
        }
        while served.store().await.status(StatusRequest {}).await.unwrap().into_inner().jobs.is_empty() {
            tokio::time::sleep(PAUSE).await;
        }
        owner.kill();
        drop(loading);
        all_closed(&driver).await;

        // The original's client is not connected while its replica is loaded.
        let mut owner = Owner::start(0, source.len() as u64);
        let asked = request("plain", "r", &owner, vec![chunk(0, source.len() as u64, 0)]);
        served.storage().await.load_model_async(asked).await.unwrap();
        owner.kill();
        let _ = unload(&served, "plain", "r", DeviceType::Gpu).await;
        all_closed(&driver).await;
    }
    driver.set_bandwidth(0);
    let mut owner = Owner::start(0, source.len() as u64);
    let asked = request("plain", "last", &owner, vec![chunk(0, source.len() as u64, 0)]);
    served.storage().await.load_model_async(asked).await.unwrap();
    confirm(&served, "plain", "last", DeviceType::Gpu).await.unwrap();
    assert!(owner.bytes(served.dir.path()) == source);
}

fn attach(memory: CudaMemory, len: u64) -> Asked {
    Asked::Attach(Attach { len, offset: 0, memory: Some(attach::Memory::Cuda(memory)) })
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_open_from_batch_to_batch_only_where_it_is_known_to_be_the_same() {
    let driver = Driver::load();
    let served = Served::start(fill, |_| ());
    let path = served.models().join("store");
    let (open, source) = (open_message("store", &path), models::bytes(&path));
    let mut owner = Owner::start(0, source.len() as u64);
    for (told, after_each, opened_in_all) in [(true, 1, 1), (false, 0, 4)] {
        let before = driver.count("cuIpcOpenMemHandle");
        let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
        let memory = if told { owner.told() } else { owner.untold() };
        // Two blocks of one allocation.
        for _ in 0..2 {
            loading.ask(attach(memory.clone(), source.len() as u64)).await;
        }
        for block in [0, 1, 0] {
            let mut segments = all_of(&open);
            segments.iter_mut().for_each(|segment| segment.block = block);
            loading.batch(segments).await;
            loading.done().await.unwrap();
            assert_eq!(driver.get("imports"), after_each);
        }
        assert_eq!(driver.count("cuIpcOpenMemHandle") - before, opened_in_all);
        assert!(owner.bytes(served.dir.path()) == source);
        drop(loading);
        all_closed(&driver).await;
        owner.remake();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_was_made_again_is_written_to_and_not_what_another_session_has_open() {
    let driver = Driver::load();
    let served = Served::start(fill, |_| ());
    let path = served.models().join("store");
    let (open, source) = (open_message("store", &path), models::bytes(&path));
    let len = source.len() as u64;
    let mut owner = Owner::start(0, len);
    let stream = async |memory| {
        let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
        loading.ask(attach(memory, len)).await;
        loading.batch(all_of(&open)).await;
        loading.done().await.unwrap();
        loading
    };
    // Two that keep open what is freed then.
    let mut first = stream(owner.told()).await;
    let untold = &mut stream(owner.untold()).await;
    let second = stream(owner.told()).await;
    assert!(owner.bytes(served.dir.path()) == source);

    // On the same stream, by a block of its own.
    owner.remake();
    first.ask(attach(owner.told(), len)).await;
    let mut segments = all_of(&open);
    segments.iter_mut().for_each(|segment| segment.block = 1);
    first.batch(segments).await;
    first.done().await.unwrap();
    assert!(owner.bytes(served.dir.path()) == source, "the same stream");
    // By a stream whose client does not tell: the block that it has.
    owner.remake();
    untold.batch(all_of(&open)).await;
    untold.done().await.unwrap();
    assert!(owner.bytes(served.dir.path()) == source, "an older client");
    // The same, where no batch came between two attachments.
    let (mut untold_twice, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
    let opened = driver.count("cuIpcOpenMemHandle");
    untold_twice.ask(attach(owner.untold(), len)).await;
    while driver.count("cuIpcOpenMemHandle") == opened {
        tokio::time::sleep(PAUSE).await;
    }
    owner.remake();
    untold_twice.ask(attach(owner.untold(), len)).await;
    let mut segments = all_of(&open);
    segments.iter_mut().for_each(|segment| segment.block = 1);
    untold_twice.batch(segments).await;
    untold_twice.done().await.unwrap();
    assert!(owner.bytes(served.dir.path()) == source, "attached twice");
    // By the original's client, while others are kept.
    owner.remake();
    let kept = stream(owner.told()).await;
    owner.remake();
    let asked = request("store", "r", &owner, vec![chunk(0, len, 0)]);
    served.storage().await.load_model_async(asked).await.unwrap();
    confirm(&served, "store", "r", DeviceType::Gpu).await.unwrap();
    assert!(owner.bytes(served.dir.path()) == source, "the original's client");
    // By another process with the same numbers.
    let mut other = owner.told();
    other.process = vec![8; 16];
    let before = driver.count("cuIpcOpenMemHandle");
    let streams = [stream(owner.told()).await, stream(other).await];
    assert_eq!(driver.count("cuIpcOpenMemHandle"), before + 2);
    drop((first, second, kept, streams));
    all_closed(&driver).await;
    let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
    loading.ask(attach(CudaMemory { process: vec![7; 15], ..owner.told() }, len)).await;
    assert_eq!(loading.error().await.code(), Code::InvalidArgument, "half an identity");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_the_device_is_told_by_confirming_and_the_next_load_works() {
    let driver = Driver::load();
    let served = Served::start(fill, |_| ());
    load(&served, "plain").await.unwrap();
    let source = models::bytes(&served.models().join("plain"));
    let mut owner = Owner::start(0, source.len() as u64);
    let asked = || request("plain", "r", &owner, vec![chunk(0, source.len() as u64, 0)]);
    for symbol in ["cuMemcpyHtoDAsync", "cuStreamCreate"] {
        driver.fail(symbol, 1, 999);
        served.storage().await.load_model_async(asked()).await.unwrap();
        let error = confirm(&served, "plain", "r", DeviceType::Gpu).await.unwrap_err();
        assert_eq!(error.code(), Code::Internal, "{symbol}: {error}");
        all_closed(&driver).await;
    }
    served.storage().await.load_model_async(asked()).await.unwrap();
    confirm(&served, "plain", "r", DeviceType::Gpu).await.unwrap();
    assert!(owner.bytes(served.dir.path()) == source);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_cannot_be_pinned_is_used_all_the_same_and_said_until_it_can() {
    let driver = Driver::load();
    driver.set_registered_total(4096);
    let served = Served::start(fill, |config| config.gpu_idle = Duration::ZERO);
    let source = models::bytes(&served.models().join("plain"));
    let mut owner = Owner::start(0, source.len() as u64);
    let asked = request("plain", "r", &owner, vec![chunk(0, source.len() as u64, 0)]);
    let pool = async || served.store().await.status(StatusRequest {}).await.unwrap().into_inner().pool.unwrap();
    let mut load = async || {
        served.storage().await.load_model_async(asked.clone()).await.unwrap();
        confirm(&served, "plain", "r", DeviceType::Gpu).await.unwrap();
        assert!(owner.bytes(served.dir.path()) == source);
        pool().await
    };
    let refused = load().await;
    assert!(refused.page_locked < refused.resident && !refused.refusal.is_empty(), "{refused:?}");
    while driver.get("contexts") > 0 {
        tokio::time::sleep(PAUSE).await;
    }
    assert_eq!(pool().await.refusal, refused.refusal, "it was forgotten with the idle GPU");
    driver.set_registered_total(1 << 30);
    assert_eq!(load().await.refusal, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_cleared_unloaded_and_loaded_in_every_order() {
    let driver = Driver::load();
    driver.set_bandwidth(1_000_000_000);
    let served = Served::start(fill, |config| (config.pool_len, config.chunk_len) = (16 << 20, 4 << 20));
    let source = models::bytes(&served.models().join("store"));
    for round in 0..12 {
        let mut owner = Owner::start(0, source.len() as u64);
        let asked = request("store", "r", &owner, vec![chunk(0, source.len() as u64, 0)]);
        into_pool(&served, "store").await.unwrap();
        served.storage().await.load_model_async(asked).await.unwrap();
        if round % 3 != 0 {
            served.storage().await.clear_mem(ClearMemRequest {}).await.unwrap();
        }
        if round % 2 == 0 {
            let _ = unload(&served, "store", "", DeviceType::Cpu).await;
        }
        into_pool(&served, if round % 4 == 0 { "plain" } else { "store" }).await.unwrap();
        confirm(&served, "store", "r", DeviceType::Gpu).await.unwrap();
        assert!(owner.bytes(served.dir.path()) == source, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preload_that_fails_is_told_by_confirming_and_unloading_stops_one() {
    let _driver = Driver::load();
    let served = Served::start(fill, |_| ());
    assert_eq!(into_pool(&served, "missing").await.unwrap_err().code(), Code::NotFound);
    std::fs::create_dir(served.models().join("broken")).unwrap();
    std::fs::write(served.models().join("broken/model.safetensors"), b"short").unwrap();
    assert_eq!(into_pool(&served, "broken").await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(confirm(&served, "plain", "", DeviceType::Cpu).await.unwrap_err().code(), Code::NotFound);
    let data = served.models().join("store/tensor.data_0");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    into_pool(&served, "store").await.unwrap();
    for _ in 0..2 {
        assert_eq!(confirm(&served, "store", "", DeviceType::Cpu).await.unwrap_err().code(), Code::DataLoss);
    }
    served.storage().await.clear_mem(ClearMemRequest {}).await.unwrap();
    for _ in 0..5 {
        into_pool(&served, "plain").await.unwrap();
        unload(&served, "plain", "", DeviceType::Cpu).await.unwrap();
        assert_eq!(confirm(&served, "plain", "", DeviceType::Cpu).await.unwrap_err().code(), Code::NotFound);
        let pool = served.store().await.status(StatusRequest {}).await.unwrap().into_inner().pool.unwrap();
        assert_eq!(pool.resident, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_that_do_not_end_in_time_are_stopped_with_the_server() {
    let driver = Driver::load();
    let mut served = Served::start(fill, |config| config.drain = Duration::ZERO);
    load(&served, "plain").await.unwrap();
    driver.set_bandwidth(20_000_000);
    let open = open_message("plain", &served.models().join("plain"));
    let owner = Owner::start(0, LEN as u64 + 1000);
    let mut client = served.store().await;
    let (mut loading, opened) = Loading::open(&mut client, open.clone()).await.unwrap();
    let cuda = owner.told();
    let memory = Some(attach::Memory::Cuda(cuda));
    loading.ask(Asked::Attach(Attach { len: opened.total, offset: 0, memory })).await;
    for _ in 0..100 {
        loading.batch(all_of(&open)).await;
    }
    while client.status(StatusRequest {}).await.unwrap().into_inner().jobs.is_empty() {
        tokio::time::sleep(PAUSE).await;
    }
    served.signal();
    assert_eq!(loading.error().await.code(), Code::Unavailable);
    drop((loading, client));
    served.ended().await;
    all_closed(&driver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_waits_for_a_place_fails_by_its_deadline() {
    let driver = Driver::load();
    let served = Served::start(fill, |config| config.max_loads = 1);
    load(&served, "plain").await.unwrap();
    let len = LEN as u64;
    let owner = Owner::start(0, len);
    let open = open_message("store", &served.models().join("store"));
    let (mut loading, opened) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
    loading.attach_host(&served.socket(), ticket(), &memory(opened.total, SEALED)).await;
    // Some seconds, in which the only place is taken.
    driver.set_bandwidth(3_000_000);
    served.storage().await.load_model_async(request("plain", "r", &owner, vec![chunk(0, len, 0)])).await.unwrap();
    let jobs = async || served.store().await.status(StatusRequest {}).await.unwrap().into_inner().jobs;
    while jobs().await.is_empty() {
        tokio::time::sleep(PAUSE).await;
    }
    loading.ask(Asked::Batch(Batch { segments: all_of(&open), timeout_ms: 20 })).await;
    assert_eq!(loading.error().await.code(), Code::DeadlineExceeded);
    assert_eq!(jobs().await.len(), 1, "it waited for the load before it");
    driver.set_bandwidth(0);
    unload(&served, "plain", "r", DeviceType::Gpu).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_registered_models_are_loaded_where_that_is_asked_for() {
    let _driver = Driver::load();
    let served = Served::start(fill, |config| config.registration_required = true);
    assert_eq!(into_pool(&served, "plain").await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(load(&served, "plain").await.unwrap_err().code(), Code::FailedPrecondition);
    let register = || RegisterModelRequest { model_path: "plain".into() };
    served.storage().await.register_model(register()).await.unwrap();
    into_pool(&served, "plain").await.unwrap();
    confirm(&served, "plain", "", DeviceType::Cpu).await.unwrap();
    load(&served, "plain").await.unwrap();
    served.storage().await.clear_mem(ClearMemRequest {}).await.unwrap();
    assert_eq!(into_pool(&served, "plain").await.unwrap_err().code(), Code::FailedPrecondition);
    let missing = RegisterModelRequest { model_path: "missing".into() };
    assert_eq!(served.storage().await.register_model(missing).await.unwrap_err().code(), Code::NotFound);
}
