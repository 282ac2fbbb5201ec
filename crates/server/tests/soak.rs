//! Clients that come, go and die at random, over host memory and the double of the driver: whatever they do, what arrives
//! is what lay on the disk, nothing hangs, the pool keeps to its size, and in the end nothing is left behind.
//!
//! `SLLM_SOAK_SECONDS` sets how long (300 at most; a few seconds without it), `SLLM_SOAK_SEED` the choices, which a failure
//! tells.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

mod common;
#[path = "common/gpu.rs"]
mod gpu;
#[path = "soak/world.rs"]
mod world;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::session::{Loading, all_of, contents, open_message, ticket};
use common::{SEALED, Served, named_memory};
use cuda::Driver;
use gpu::Owner;
use sllm_proto::storage::{
    ClearMemRequest, ConfirmModelRequest, DeviceType, LoadModelRequest, MemCopyChunk, MemCopyChunkList, MemCopyHandle,
    MemCopyHandleList, RegisterModelRequest, UnloadModelRequest,
};
use sllm_proto::store::load_event::Kind as Event;
use sllm_proto::store::load_request::Kind as Asked;
use sllm_proto::store::{
    Attach, Batch, Cancel, CudaMemory, EvictRequest, ListRequest, PinRequest, PreloadRequest, Segment, StatusRequest,
    UnpinRequest, attach,
};
use tonic::{Code, Status};
use world::{MODELS, Model, Random, World};

const HOST_CLIENTS: u64 = 8;
const GPU_CLIENTS: u64 = 4;
/// Operations of a client where no time is set.
const OPERATIONS: u64 = 15;
const POOL_LEN: u64 = 32 << 20;
const LOADS_AT_ONCE: usize = 6;
/// What takes longer hangs.
const HUNG: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(5);
/// The name of all memory that clients pass.
const MEMORY: &str = "soak-memory";

/// Not a test of its own: a process with memory on a GPU.
#[test]
fn owner() {
    gpu::own();
}

#[test]
fn clients_that_come_and_go_get_their_bytes_and_leave_nothing() {
    let seed = std::env::var("SLLM_SOAK_SEED").map_or(1, |seed| seed.parse().expect("SLLM_SOAK_SEED is a number"));
    let seconds = std::env::var("SLLM_SOAK_SECONDS").ok();
    let seconds = seconds.map(|seconds| seconds.parse::<u64>().expect("SLLM_SOAK_SECONDS is a number").min(300));
    println!("SLLM_SOAK_SEED={seed}");
    let driver = Driver::load();
    driver.set_devices(2);
    driver.set_delay(Duration::from_micros(200));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(soak(seed, seconds.map(Duration::from_secs), &driver));
}

async fn soak(seed: u64, time: Option<Duration>, driver: &Driver) {
    let served = Served::start(world::fill, |config| {
        config.pool_len = POOL_LEN;
        config.chunk_len = 4 << 20;
        config.max_loads = LOADS_AT_ONCE;
        config.drain = Duration::from_secs(5);
        // Contexts and pins go and come whenever the server looks.
        config.gpu_idle = Duration::ZERO;
    });
    let world = Arc::new(World::new(served, time.map(|time| Instant::now() + time)));

    // All that is made once: the pool, contexts, threads.
    run_clients(&world, seed, Some(3)).await;
    let before = rest(&world, driver).await;
    run_clients(&world, seed.wrapping_add(1), time.is_none().then_some(OPERATIONS)).await;
    let after = rest(&world, driver).await;
    println!("{world}, descriptors {} and {}", before.descriptors.len(), after.descriptors.len());
    assert!(after.descriptors.len() <= before.descriptors.len(), "descriptors: {before:#?} became {after:#?}");
    assert!(after.memory_files <= before.memory_files, "mappings: {before:#?} became {after:#?}");
    assert_eq!(after.registered, before.registered, "memory that the driver has pinned");
    assert!(world.count_of("compared") > 0 && world.count_of("killed") > 0, "{world}");

    for model in MODELS {
        load_whole(&world, &world.models[model], 0, End::Well).await.unwrap();
    }
    let world = Arc::into_inner(world).expect("a client still runs");
    tokio::time::timeout(HUNG, world.served.stop()).await.expect("the server does not stop");
}

/// Runs all clients to their end, and watches the pool.
async fn run_clients(world: &Arc<World>, seed: u64, operations: Option<u64>) {
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..HOST_CLIENTS + GPU_CLIENTS {
        let (world, random) = (Arc::clone(world), Random::new(seed, number));
        clients.spawn(run_client(world, random, number, operations));
    }
    let watch = tokio::spawn(watch(Arc::clone(world)));
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    let _ = watch.await;
}

/// Looks at the pool all the time.
async fn watch(world: Arc<World>) {
    let mut client = world.served.store().await;
    loop {
        let status = client.status(StatusRequest {}).await.unwrap().into_inner();
        let pool = status.pool.unwrap();
        assert_eq!(pool.capacity, POOL_LEN);
        assert!(pool.resident <= POOL_LEN && pool.pinned <= POOL_LEN - pool.chunk_len, "{pool:?}");
        assert!(pool.page_locked <= POOL_LEN, "{pool:?}");
        assert!(status.jobs.len() <= LOADS_AT_ONCE, "{:?}", status.jobs);
        assert!(status.jobs.iter().all(|job| job.done <= job.total), "{:?}", status.jobs);
        tokio::time::sleep(PAUSE).await;
    }
}

/// What a process at rest has.
#[derive(Debug)]
struct Left {
    descriptors: Vec<String>,
    memory_files: usize,
    registered: u64,
}

/// Waits until nothing is under way any more, empties the pool, and counts what is left.
async fn rest(world: &World, driver: &Driver) -> Left {
    let quiet = async {
        {
            let mut store = world.served.store().await;
            for model in store.list(ListRequest {}).await.unwrap().into_inner().models {
                store.unpin(UnpinRequest { model: model.name }).await.unwrap();
            }
            let idle = |status: &sllm_proto::store::StatusResponse| status.jobs.is_empty() && status.clients == 1;
            while !idle(&store.status(StatusRequest {}).await.unwrap().into_inner()) {
                tokio::time::sleep(PAUSE).await;
            }
        }
        let mut storage = world.served.storage().await;
        storage.clear_mem(ClearMemRequest {}).await.unwrap();
        drop(storage);
        while driver.get("imports") > 0 || mappings(MEMORY) > 0 {
            tokio::time::sleep(PAUSE).await;
        }
    };
    let quiet = tokio::time::timeout(HUNG, quiet).await;
    let left = format!("{} handles and {} mappings are open", driver.get("imports"), mappings(MEMORY));
    quiet.unwrap_or_else(|_| panic!("something does not end: {left}"));

    let mut store = world.served.store().await;
    let status = store.status(StatusRequest {}).await.unwrap().into_inner();
    let pool = status.pool.unwrap();
    assert_eq!((pool.resident, pool.pinned), (0, 0), "the pool was cleared");
    assert!(store.list(ListRequest {}).await.unwrap().into_inner().models.is_empty(), "models are forgotten");
    drop(store);
    // Connections end a little later than their clients do.
    let mut left = count(driver);
    for _ in 0..200 {
        tokio::time::sleep(PAUSE).await;
        let now = count(driver);
        if now.descriptors.len() < left.descriptors.len() {
            left = now;
        }
    }
    left
}

fn count(driver: &Driver) -> Left {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let mut descriptors: Vec<String> =
        links.filter_map(|link| Some(std::fs::read_link(link.ok()?.path()).ok()?.display().to_string())).collect();
    descriptors.sort_unstable();
    Left { descriptors, memory_files: mappings("memfd:"), registered: driver.registered_now() }
}

fn mappings(name: &str) -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains(name)).count()
}

async fn run_client(world: Arc<World>, mut random: Random, number: u64, operations: Option<u64>) {
    let mut gpu = (number >= HOST_CLIENTS).then(|| Gpu::start(&world, number));
    let mut done = 0;
    while operations.map_or_else(|| world.is_time_left(), |most| done < most) {
        let model = &world.models[random.one_of(&MODELS)];
        let choice = random.below(100);
        let what = format!("client {number}, operation {done} ({choice}) on {}", model.name);
        let operation = async {
            match &mut gpu {
                Some(gpu) => gpu_operation(&world, &mut random, choice, model, gpu).await,
                None => host_operation(&world, &mut random, choice, model).await,
            }
        };
        match tokio::time::timeout(HUNG, operation).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => panic!("{what}: {error:?}"),
            Err(_) => panic!("{what} hangs"),
        }
        done += 1;
    }
}

/// How a load ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Well,
    /// The client goes, with its connection, after so many events.
    Killed(u64),
    /// The client takes it back after so many events.
    Cancelled(u64),
    /// It has so many milliseconds.
    Late(u32),
}

async fn host_operation(world: &World, random: &mut Random, choice: u64, model: &Model) -> Result<(), Status> {
    match choice {
        0..40 => load_whole(world, model, random.below(3), End::Well).await,
        40..55 => load_whole(world, model, random.below(3), End::Killed(random.below(4))).await,
        55..62 => load_whole(world, model, random.below(3), End::Cancelled(random.below(4))).await,
        62..67 => load_whole(world, model, random.below(3), End::Late(1 + random.below(5) as u32)).await,
        67..72 => load_rows(world, random, model).await,
        72..77 => nonsense(world, random, model).await,
        _ => housekeeping(world, random, choice, model).await,
    }
}

/// Loads all of a model, `again` times more on the same stream.
async fn load_whole(world: &World, model: &Model, again: u64, end: End) -> Result<(), Status> {
    let version = model.version();
    let open = open_message(model.name, &model.path);
    let segments = all_of(&open);
    let opened = Loading::open(&mut world.served.store().await, open).await;
    let Some((mut loading, opened)) = model.unless_replaced(version, opened)? else { return Ok(()) };
    let file = named_memory(MEMORY, opened.total, SEALED);
    loading.attach_host(&world.served.socket(), ticket(), &file).await;
    // Only when this is done is the memory the stream's, and not somebody's who may yet come for it.
    loading.batch(Vec::new()).await;
    if model.unless_replaced(version, loading.done().await)?.is_none() {
        return Ok(());
    }
    for _ in 0..=again {
        let timeout_ms = if let End::Late(ms) = end { ms } else { 0 };
        loading.ask(Asked::Batch(Batch { segments: segments.clone(), timeout_ms })).await;
    }
    match end {
        End::Killed(events) => {
            see(&mut loading, events, again + 1).await;
            world.count("killed");
            return Ok(());
        }
        End::Cancelled(events) => {
            see(&mut loading, events, again + 1).await;
            loading.ask(Asked::Cancel(Cancel {})).await;
            loop {
                match loading.from.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Err(Status::internal("a cancelled stream ended well")),
                    Err(status) if status.code() == Code::Cancelled => break,
                    Err(status) => return model.unless_replaced(version, Err::<(), _>(status)).map(drop),
                }
            }
            return stays(world, &file).await;
        }
        _ => {}
    }
    for _ in 0..=again {
        let done = match loading.done().await {
            Err(status) if status.code() == Code::DeadlineExceeded && matches!(end, End::Late(_)) => {
                return stays(world, &file).await;
            }
            done => model.unless_replaced(version, done)?,
        };
        let Some(done) = done else { return Ok(()) };
        if done.bytes != opened.total || done.from_pool + done.from_files != opened.total {
            return Err(Status::internal(format!("{done:?} of {}", opened.total)));
        }
        world.compare(model, version, &contents(&file), 0)?;
    }
    Ok(())
}

/// Waits for so many events, or for the end of all batches.
async fn see(loading: &mut Loading, events: u64, mut batches: u64) {
    for _ in 0..events {
        match loading.event().await {
            Ok(Event::Done(_)) => batches -= 1,
            Ok(_) => {}
            Err(_) => return,
        }
        if batches == 0 {
            return;
        }
    }
}

/// After a failure nothing more is written.
async fn stays(world: &World, file: &std::fs::File) -> Result<(), Status> {
    let then = contents(file);
    tokio::time::sleep(PAUSE).await;
    world.count("stopped");
    if contents(file) == then { Ok(()) } else { Err(Status::internal("memory was written to after the end")) }
}

/// Loads rows of a part of a model's first file.
async fn load_rows(world: &World, random: &mut Random, model: &Model) -> Result<(), Status> {
    let version = model.version();
    let open = open_message(model.name, &model.path);
    let len = open.files[0].len;
    let row_len = 1 + random.below(5000);
    let src_pitch = row_len + random.below(3000);
    let rows = 1 + random.below((len / src_pitch).min(200));
    let dst_pitch = row_len + random.below(100);
    let offset = random.below(len - (rows - 1) * src_pitch - row_len + 1);
    let opened = Loading::open(&mut world.served.store().await, open).await;
    let Some((mut loading, _)) = model.unless_replaced(version, opened)? else { return Ok(()) };
    let file = named_memory(MEMORY, rows * dst_pitch, SEALED);
    loading.attach_host(&world.served.socket(), ticket(), &file).await;
    let segment = Segment { offset, row_len, rows, src_pitch, dst_pitch, ..Segment::default() };
    loading.batch(vec![segment]).await;
    let done = loading.done().await;
    if model.unless_replaced(version, done)?.is_none() {
        return Ok(());
    }
    let loaded = contents(&file);
    for row in 0..rows {
        let at = (row * dst_pitch) as usize;
        world.compare(model, version, &loaded[at..at + row_len as usize], offset + row * src_pitch)?;
    }
    Ok(())
}

/// What cannot be is refused.
async fn nonsense(world: &World, random: &mut Random, model: &Model) -> Result<(), Status> {
    let version = model.version();
    let opened = Loading::open(&mut world.served.store().await, open_message(model.name, &model.path)).await;
    let Some((mut loading, opened)) = model.unless_replaced(version, opened)? else { return Ok(()) };
    match random.below(4) {
        0 => {
            let memory = Some(attach::Memory::Ticket(vec![0xaa; 16]));
            loading.ask(Asked::Attach(Attach { len: 1, offset: 0, memory })).await;
        }
        1 => {
            let (device, handle) = (b"fake-cuda-gpu-00".to_vec(), vec![7; 64]);
            let memory = Some(attach::Memory::Cuda(CudaMemory { device, handle, ..CudaMemory::default() }));
            loading.ask(Asked::Attach(Attach { len: 1, offset: 0, memory })).await;
        }
        2 => loading.batch(vec![Segment { offset: opened.total, row_len: 1, ..Segment::default() }]).await,
        _ => {
            let file = named_memory(MEMORY, 4096, SEALED);
            loading.attach_host(&world.served.socket(), ticket(), &file).await;
            loading.batch(vec![Segment { row_len: 4096, dst_offset: 1, ..Segment::default() }]).await;
        }
    }
    world.count("nonsense");
    match loading.error().await {
        status if status.code() == Code::InvalidArgument => Ok(()),
        status => Err(status),
    }
}

/// Operations on the pool and the disk.
async fn housekeeping(world: &World, random: &mut Random, choice: u64, model: &Model) -> Result<(), Status> {
    let (mut store, name) = (world.served.store().await, model.name.to_owned());
    let known = |result: Result<(), Status>| match result {
        // Nobody asked for it since all was cleared.
        Err(status) if status.code() == Code::NotFound => Ok(()),
        result => result,
    };
    match choice {
        77..82 => {
            let version = model.version();
            let mut events = store.preload(PreloadRequest { model: name, pin: false }).await?.into_inner();
            let leave_after = (random.below(3) == 0).then(|| random.below(3));
            let mut seen = 0;
            while leave_after.is_none_or(|most| seen < most) {
                match events.message().await {
                    Ok(Some(_)) => seen += 1,
                    Ok(None) => break,
                    // By the client of the original that unloads.
                    Err(status) if status.code() == Code::Cancelled && status.message().contains("unloaded") => break,
                    Err(status) => return model.unless_replaced(version, Err::<(), _>(status)).map(drop),
                }
            }
            world.count("preloaded");
            Ok(())
        }
        82..86 => known(store.evict(EvictRequest { model: name }).await.map(drop)),
        86..88 => store.evict(EvictRequest::default()).await.map(drop),
        88..90 => world.served.storage().await.clear_mem(ClearMemRequest {}).await.map(drop),
        90..93 => match store.pin(PinRequest { model: name }).await {
            // Something must be left for others.
            Err(status) if status.message().contains("cannot be pinned") => Ok(()),
            result => result.map(drop),
        },
        93..95 => known(store.unpin(UnpinRequest { model: name }).await.map(drop)),
        _ => {
            model.replace(random.below(u64::MAX));
            world.count("replaced");
            Ok(())
        }
    }
}

/// A process with memory on a GPU, which may be killed.
struct Gpu {
    owner: Owner,
    device: usize,
    scratch: PathBuf,
}

impl Gpu {
    fn start(world: &World, number: u64) -> Gpu {
        let scratch = world.served.dir.path().join(format!("owner-{number}"));
        std::fs::create_dir_all(&scratch).unwrap();
        let device = usize::from(number % 2 == 1);
        let owner = tokio::task::block_in_place(|| Owner::start(device, world::LARGEST + world::SHIFT));
        Gpu { owner, device, scratch }
    }

    fn bytes(&mut self) -> Vec<u8> {
        tokio::task::block_in_place(|| self.owner.bytes(&self.scratch))
    }

    /// Kills the process, in the middle of whatever is copied into its memory, and starts another one.
    fn kill(&mut self) {
        tokio::task::block_in_place(|| {
            self.owner.kill();
            self.owner = Owner::start(self.device, world::LARGEST + world::SHIFT);
        });
    }
}

async fn gpu_operation(
    world: &World,
    random: &mut Random,
    choice: u64,
    model: &Model,
    gpu: &mut Gpu,
) -> Result<(), Status> {
    // Not where the last load put it, so that bytes of that one are not taken for those of this.
    let shift = random.below(world::SHIFT);
    match choice {
        0..30 => gpu_session(world, model, gpu, shift, None).await,
        30..40 => gpu_session(world, model, gpu, shift, Some(random.below(4))).await,
        40..70 => replica(world, random, model, gpu, shift).await,
        70..77 => {
            let unload = UnloadModelRequest {
                model_path: model.name.into(),
                target_device_type: DeviceType::Cpu.into(),
                ..UnloadModelRequest::default()
            };
            match world.served.storage().await.unload_model(unload).await {
                Err(status) if status.code() == Code::NotFound => Ok(()),
                result => result.map(drop),
            }
        }
        _ => housekeeping(world, random, choice, model).await,
    }
}

/// Both halves of a segment.
fn in_two(whole: Segment) -> (Segment, Segment) {
    let half = whole.row_len / 2;
    let first = Segment { row_len: half, ..whole };
    let (offset, dst_offset) = (whole.offset + half, whole.dst_offset + half);
    (first, Segment { offset, dst_offset, row_len: whole.row_len - half, ..whole })
}

/// A load by our own service; where it is killed, after so many events, with its process.
async fn gpu_session(
    world: &World,
    model: &Model,
    gpu: &mut Gpu,
    shift: u64,
    killed: Option<u64>,
) -> Result<(), Status> {
    let version = model.version();
    let open = open_message(model.name, &model.path);
    let (first, second) = all_of(&open).into_iter().map(in_two).unzip();
    let opened = Loading::open(&mut world.served.store().await, open).await;
    let Some((mut loading, opened)) = model.unless_replaced(version, opened)? else { return Ok(()) };
    if shift.is_multiple_of(3) {
        tokio::task::block_in_place(|| gpu.owner.remake());
    }
    // Clients of both kinds.
    let memory = if shift.is_multiple_of(2) { gpu.owner.told() } else { gpu.owner.untold() };
    let memory = Some(attach::Memory::Cuda(memory));
    loading.ask(Asked::Attach(Attach { len: opened.total, offset: shift, memory })).await;
    loading.batch(first).await;
    loading.batch(second).await;
    if let Some(events) = killed {
        see(&mut loading, events, 2).await;
        gpu.kill();
        world.count("killed");
        return Ok(());
    }
    for _ in 0..2 {
        if model.unless_replaced(version, loading.done().await)?.is_none() {
            return Ok(());
        }
    }
    let at = shift as usize;
    let bytes = gpu.bytes();
    world.compare(model, version, &bytes[at..at + opened.total as usize], 0)
}

/// A load as the original's client makes it.
async fn replica(world: &World, random: &mut Random, model: &Model, gpu: &mut Gpu, shift: u64) -> Result<(), Status> {
    let version = model.version();
    let mut storage = world.served.storage().await;
    let (model_path, replica_uuid) = (model.name.to_owned(), format!("{:x}", random.below(u64::MAX)));
    let registered = storage.register_model(RegisterModelRequest { model_path: model_path.clone() }).await?;
    let len = u64::try_from(registered.into_inner().model_size).unwrap();
    if random.below(2) == 0 {
        let target_device_type = DeviceType::Cpu.into();
        let (model_path, rest) = (model_path.clone(), LoadModelRequest::default());
        storage.load_model_async(LoadModelRequest { model_path, target_device_type, ..rest }).await?;
    }
    let (uuid, cuda_ipc_handle) = (gpu.owner.uuid.clone(), gpu.owner.handle.clone());
    // The end first.
    let cut = random.below(len);
    let chunks = vec![
        MemCopyChunk { src_offset: cut, size: len - cut, dst_offset: shift + cut, handle_idx: 0 },
        MemCopyChunk { src_offset: 0, size: cut, dst_offset: shift, handle_idx: 0 },
    ];
    let handles = MemCopyHandleList { handles: vec![MemCopyHandle { cuda_ipc_handle }] };
    let request = LoadModelRequest {
        model_path: model_path.clone(),
        replica_uuid: replica_uuid.clone(),
        chunks: HashMap::from([(uuid.clone(), MemCopyChunkList { chunks })]),
        handles: HashMap::from([(uuid, handles)]),
        target_device_type: DeviceType::Gpu.into(),
    };
    let started = storage.load_model_async(request).await;
    if model.unless_replaced(version, started)?.is_none() {
        return Ok(());
    }
    let target_device_type = DeviceType::Gpu.into();
    let unload =
        UnloadModelRequest { model_path: model_path.clone(), replica_uuid: replica_uuid.clone(), target_device_type };
    if random.below(8) == 0 {
        // It is stopped, and nothing is written when the answer is here.
        let stopped = storage.unload_model(unload).await;
        if model.unless_replaced(version, stopped)?.is_none() {
            return Ok(());
        }
        let then = gpu.bytes();
        tokio::time::sleep(PAUSE).await;
        world.count("stopped");
        return if gpu.bytes() == then { Ok(()) } else { Err(Status::internal("memory was written to after the end")) };
    }
    let confirm = ConfirmModelRequest { model_path, replica_uuid, target_device_type };
    let confirmed = storage.confirm_model(confirm).await;
    if model.unless_replaced(version, confirmed)?.is_some() {
        let at = shift as usize;
        world.compare(model, version, &gpu.bytes()[at..at + len as usize], 0)?;
    }
    let released = storage.unload_model(unload).await;
    model.unless_replaced(version, released).map(drop)
}
