//! A checkpoint, and a server that does what a test's script says.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};
use sllm_client::{ClientOptions, RemoteOptions, StoreClient, StoreRemote};
use sllm_core::{Block, Checkpoint, Device, Loader, MemoryFile, Segment, SharedMemory};
use sllm_proto::store as pb;
use sllm_proto::store::store_server::{Store, StoreServer};
use sllm_proto::{MAX_MESSAGE_LEN, PASS_MEMORY, TICKET_LEN};
use tempfile::TempDir;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

/// Bytes that look random and have no zeros.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    test_support::noise(seed, len).into_iter().map(|byte| byte | 1).collect()
}

/// A checkpoint of one tensor in one file.
pub(crate) struct Model {
    pub(crate) dir: TempDir,
    pub(crate) path: PathBuf,
    pub(crate) checkpoint: Checkpoint,
    /// The whole file.
    pub(crate) bytes: Vec<u8>,
}

pub(crate) fn model(len: usize) -> Model {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model");
    std::fs::create_dir(&path).unwrap();
    let bytes = test_support::safetensors(test_support::header(len as u64), &noise(len as u64, len));
    std::fs::write(path.join("model.safetensors"), &bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    Model { dir, path, checkpoint, bytes }
}

impl Model {
    /// Segments of one and two dimensions for two blocks of these lengths, together most of the file.
    pub(crate) fn segments(&self) -> (Vec<Segment>, [u64; 2]) {
        let len = self.bytes.len() as u64;
        let (rows, row_len) = (1000, len / 4000);
        let two = Segment {
            file: 0,
            offset: len / 2,
            row_len,
            rows,
            src_pitch: row_len * 2,
            block: 1,
            dst_offset: 3,
            dst_pitch: row_len + 1,
        };
        let segments = vec![
            Segment::contiguous(0, len / 4, len / 4, 0, 100_000), // not in the file's order
            two,
            Segment::contiguous(0, 0, 100_000, 0, 0),
        ];
        (segments, [100_000 + len / 4 + 50, 3 + rows * (row_len + 1)])
    }

    /// What blocks of these lengths, all zero before, hold when these segments have arrived.
    pub(crate) fn expected(&self, segments: &[Segment], lens: &[u64]) -> Vec<Vec<u8>> {
        let mut blocks: Vec<Vec<u8>> = lens.iter().map(|&len| vec![0; len as usize]).collect();
        for segment in segments {
            for row in 0..segment.rows {
                let from = (segment.offset + row * segment.src_pitch) as usize;
                let to = (segment.dst_offset + row * segment.dst_pitch) as usize;
                let len = segment.row_len as usize;
                blocks[segment.block][to..to + len].copy_from_slice(&self.bytes[from..from + len]);
            }
        }
        blocks
    }
}

/// A block of host memory, and the way to look at it.
pub(crate) fn host_block(len: u64) -> (Block, File) {
    let memory = MemoryFile::new(len).unwrap();
    let file = File::from(std::os::fd::AsFd::as_fd(&memory).try_clone_to_owned().unwrap());
    (memory.block(0, len).unwrap(), file)
}

pub(crate) fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// How a load goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Fault {
    #[default]
    None,
    /// Refuses the model at once.
    Refuse,
    /// Refuses the second batch.
    RefuseSecond,
    /// Never ends the second batch, nor writes anything for it, and hears nothing.
    Silent,
    /// The server is gone in the middle of the second batch.
    Die,
    /// Tells of fewer bytes than were wanted.
    Short,
    /// Tells that a batch is done before the model was opened.
    Unopened,
    /// Ends the stream in good order in the middle.
    End,
    /// Writes rows slowly, until its client cancels; then takes its time for one last row.
    Slow,
}

/// What a server saw and did.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) opens: Vec<pb::Open>,
    pub(crate) attached: usize,
    /// Segments of each batch.
    pub(crate) batches: Vec<usize>,
    pub(crate) timeouts: Vec<u32>,
    /// Streams that ended.
    pub(crate) ended: usize,
    pub(crate) tokens: Vec<String>,
}

#[derive(Default)]
struct Shared {
    fault: Mutex<Fault>,
    log: Mutex<Log>,
    tickets: Mutex<HashMap<Vec<u8>, File>>,
    /// Rows under way of a slow load.
    writing: AtomicBool,
    rows: AtomicU64,
    die: tokio::sync::Notify,
}

/// A server on a Unix socket.
pub(crate) struct TestServer {
    shared: Arc<Shared>,
    pub(crate) address: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    _dir: TempDir,
}

impl TestServer {
    pub(crate) fn start() -> TestServer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let shared = Arc::new(Shared::default());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let mine = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    () = serve(Arc::clone(&mine), listener) => {}
                    () = mine.die.notified() => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        let address = format!("unix:{}", path.display());
        TestServer { shared, address, stop: Some(stop), thread: Some(thread), _dir: dir }
    }

    pub(crate) fn fault(&self, fault: Fault) {
        *self.shared.fault.lock().unwrap() = fault;
    }

    pub(crate) fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.shared.log.lock().unwrap()
    }

    /// Ends all of its connections.
    pub(crate) fn die(&self) {
        self.shared.die.notify_one();
    }

    /// Whether a row is being written.
    pub(crate) fn is_writing(&self) -> bool {
        self.shared.writing.load(Ordering::SeqCst)
    }

    /// Rows of slow loads that were written.
    pub(crate) fn rows(&self) -> u64 {
        self.shared.rows.load(Ordering::SeqCst)
    }

    pub(crate) fn client(&self) -> StoreClient {
        StoreClient::connect(&ClientOptions::new().address(self.address.clone())).unwrap()
    }

    /// Loads by this server, with the smallest staging memory.
    pub(crate) fn remote(&self) -> StoreRemote {
        StoreRemote::new(self.client(), RemoteOptions::new().staging_bytes(4 << 20))
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(shared: Arc<Shared>, listener: std::os::unix::net::UnixListener) {
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    let (sender, receiver) = mpsc::channel::<io::Result<UnixStream>>(16);
    let service = StoreServer::new(Rpc(Arc::clone(&shared)))
        .max_decoding_message_size(MAX_MESSAGE_LEN)
        .max_encoding_message_size(MAX_MESSAGE_LEN);
    let accept = async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let (shared, sender) = (Arc::clone(&shared), sender.clone());
            tokio::spawn(async move {
                let mut word = [0; 8];
                let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
                let peeked = stream.async_io(Interest::READABLE, || Ok(recv(&stream, &mut word, flags)?.0)).await;
                match peeked {
                    Ok(8) if word == PASS_MEMORY => receive(&shared, &stream).await,
                    _ => drop(sender.send(Ok(stream)).await),
                }
            });
        }
    };
    let grpc =
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(ReceiverStream::new(receiver));
    tokio::select! {
        () = accept => {}
        _ = grpc => {}
    }
}

/// Takes a ticket and the memory file that comes with it.
async fn receive(shared: &Shared, stream: &UnixStream) {
    let mut bytes = [0; PASS_MEMORY.len() + TICKET_LEN];
    let receive = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags)?;
        let mut files = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        Ok(files.next().and_then(|mut files| files.next()))
    };
    let file: Option<OwnedFd> = stream.async_io(Interest::READABLE, receive).await.unwrap();
    let file = File::from(file.expect("no descriptor came"));
    let seals = rustix::fs::fcntl_get_seals(&file).unwrap();
    // The length is fixed, and the server can add a seal.
    assert_eq!(seals, rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW);
    shared.tickets.lock().unwrap().insert(bytes[PASS_MEMORY.len()..].to_vec(), file);
    stream.writable().await.unwrap();
    stream.try_write(&[0]).unwrap();
}

struct Rpc(Arc<Shared>);

type Events = mpsc::Sender<Result<pb::LoadEvent, Status>>;

fn event(kind: pb::load_event::Kind) -> Result<pb::LoadEvent, Status> {
    Ok(pb::LoadEvent { kind: Some(kind) })
}

#[tonic::async_trait]
impl Store for Rpc {
    type LoadStream = ReceiverStream<Result<pb::LoadEvent, Status>>;
    type PreloadStream = ReceiverStream<Result<pb::PreloadEvent, Status>>;

    async fn load(&self, request: Request<Streaming<pb::LoadRequest>>) -> Result<Response<Self::LoadStream>, Status> {
        let (events, receiver) = mpsc::channel(16);
        let shared = Arc::clone(&self.0);
        tokio::spawn(async move {
            let result = load(&shared, request.into_inner(), &events).await;
            shared.log.lock().unwrap().ended += 1;
            if let Err(status) = result {
                let _ = events.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn preload(&self, request: Request<pb::PreloadRequest>) -> Result<Response<Self::PreloadStream>, Status> {
        let (events, receiver) = mpsc::channel(16);
        let model = request.into_inner().model;
        tokio::spawn(async move {
            for done in 0..=10 {
                if events.send(Ok(pb::PreloadEvent { done, total: 10 })).await.is_err() {
                    return;
                }
                match model.as_str() {
                    "broken" if done == 5 => return drop(events.send(Err(Status::data_loss("chunk 7"))).await),
                    "short" if done == 5 => return,
                    "slow" => tokio::time::sleep(Duration::from_secs(100)).await,
                    _ => {}
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn list(&self, request: Request<pb::ListRequest>) -> Result<Response<pb::ListResponse>, Status> {
        let token = request.metadata().get("authorization").map(|value| value.to_str().unwrap().to_owned());
        self.0.log.lock().unwrap().tokens.extend(token);
        let model = |i: u64| pb::Model { name: format!("{i:0100}"), len: i, pinned: i == 1, ..pb::Model::default() };
        // Longer than messages are without asking.
        Ok(Response::new(pb::ListResponse { models: (0..60_000).map(model).collect() }))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        tokio::time::sleep(Duration::from_secs(100)).await;
        Err(Status::internal("nobody waited so long"))
    }

    async fn pin(&self, request: Request<pb::PinRequest>) -> Result<Response<pb::Model>, Status> {
        let name = request.into_inner().model;
        Ok(Response::new(pb::Model { name, pinned: true, ..pb::Model::default() }))
    }

    async fn unpin(&self, _: Request<pb::UnpinRequest>) -> Result<Response<pb::Model>, Status> {
        Err(Status::not_found("there is no such model"))
    }

    async fn evict(&self, request: Request<pb::EvictRequest>) -> Result<Response<pb::EvictResponse>, Status> {
        let bytes = if request.into_inner().model.is_empty() { 1000 } else { 10 };
        Ok(Response::new(pb::EvictResponse { bytes }))
    }
}

/// Memory of a client.
enum Memory {
    File(File, u64),
    Device(Block),
}

/// A stream as the script has it.
async fn load(shared: &Shared, mut requests: Streaming<pb::LoadRequest>, events: &Events) -> Result<(), Status> {
    use pb::load_request::Kind;
    let fault = *shared.fault.lock().unwrap();
    let mut files: Vec<File> = Vec::new();
    let mut blocks: Vec<Memory> = Vec::new();
    let mut model = PathBuf::new();
    let mut batches = 0;
    while let Some(request) = requests.message().await? {
        match request.kind {
            Some(Kind::Open(open)) => {
                shared.log.lock().unwrap().opens.push(open.clone());
                if fault == Fault::Refuse {
                    return Err(Status::new(Code::FailedPrecondition, "model.safetensors has another length here"));
                }
                let file = |file: &pb::File| File::open(Path::new(&open.model).join(&file.name)).unwrap();
                files = open.files.iter().map(file).collect();
                model = PathBuf::from(&open.model);
                let first = match fault {
                    Fault::Unopened => pb::load_event::Kind::Done(pb::Done::default()),
                    _ => pb::load_event::Kind::Opened(pb::Opened { total: 0, resident: 0 }),
                };
                let _ = events.send(event(first)).await;
            }
            Some(Kind::Attach(pb::Attach { offset, memory: Some(pb::attach::Memory::Ticket(ticket)), .. })) => {
                let file = shared.tickets.lock().unwrap().remove(&ticket).expect("an unknown ticket");
                shared.log.lock().unwrap().attached += 1;
                blocks.push(Memory::File(file, offset));
            }
            Some(Kind::Attach(pb::Attach { len, offset, memory: Some(pb::attach::Memory::Cuda(cuda)) })) => {
                let device = Device::cuda_by_uuid(&cuda.device.try_into().unwrap()).unwrap();
                let opened = SharedMemory::open(&device, &cuda.handle.try_into().unwrap());
                let opened = opened.map_err(|e| Status::invalid_argument(e.chain()))?;
                shared.log.lock().unwrap().attached += 1;
                blocks.push(Memory::Device(opened.block(offset, len).unwrap()));
            }
            Some(Kind::Batch(batch)) => {
                batches += 1;
                {
                    let mut log = shared.log.lock().unwrap();
                    log.batches.push(batch.segments.len());
                    log.timeouts.push(batch.timeout_ms);
                }
                if batches == 2 {
                    match fault {
                        Fault::RefuseSecond => return Err(Status::internal("the disk is on fire")),
                        Fault::Silent => tokio::time::sleep(Duration::from_secs(1000)).await,
                        Fault::Die => {
                            shared.die.notify_one();
                            tokio::time::sleep(Duration::from_secs(1000)).await;
                        }
                        Fault::End => return Ok(()),
                        Fault::Slow => return slow(shared, requests, &blocks[0]).await,
                        _ => {}
                    }
                }
                let bytes = match blocks.first() {
                    Some(Memory::Device(_)) => load_to_devices(&model, &blocks, &batch.segments),
                    _ => write(&files, &blocks, &batch.segments),
                };
                let progress = pb::Progress { done: bytes / 2, total: bytes };
                let _ = events.send(event(pb::load_event::Kind::Progress(progress))).await;
                let bytes = if fault == Fault::Short { bytes - 1 } else { bytes };
                let done = pb::Done { bytes, from_pool: bytes, from_files: 0, report: String::new() };
                let _ = events.send(event(pb::load_event::Kind::Done(done))).await;
            }
            _ => return Err(Status::invalid_argument("what is this?")),
        }
    }
    Ok(())
}

/// Writes rows until the client cancels, and one more, late.
async fn slow(shared: &Shared, mut requests: Streaming<pb::LoadRequest>, memory: &Memory) -> Result<(), Status> {
    let Memory::File(memory, _) = memory else { panic!("only on the host") };
    shared.writing.store(true, Ordering::SeqCst);
    loop {
        let over = tokio::time::timeout(Duration::from_millis(10), requests.message()).await;
        memory.write_all_at(&[1; 64], 0).unwrap();
        shared.rows.fetch_add(1, Ordering::SeqCst);
        match over {
            Ok(Ok(Some(pb::LoadRequest { kind: Some(pb::load_request::Kind::Cancel(_)) }))) => break,
            Ok(Ok(None) | Err(_)) => panic!("the client went without a word"),
            _ => {}
        }
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    memory.write_all_at(&[1; 64], 0).unwrap();
    shared.rows.fetch_add(1, Ordering::SeqCst);
    shared.writing.store(false, Ordering::SeqCst);
    Err(Status::cancelled("cancelled"))
}

fn write(files: &[File], blocks: &[Memory], segments: &[pb::Segment]) -> u64 {
    let mut bytes = 0;
    for segment in segments {
        let Memory::File(memory, offset) = &blocks[segment.block as usize] else { panic!("only on the host") };
        let mut row = vec![0; segment.row_len as usize];
        for number in 0..segment.rows.max(1) {
            files[segment.file as usize].read_exact_at(&mut row, segment.offset + number * segment.src_pitch).unwrap();
            memory.write_all_at(&row, offset + segment.dst_offset + number * segment.dst_pitch).unwrap();
            bytes += segment.row_len;
        }
    }
    bytes
}

fn load_to_devices(model: &Path, blocks: &[Memory], segments: &[pb::Segment]) -> u64 {
    let blocks = blocks.iter().map(|memory| match memory {
        Memory::Device(block) => block.clone(),
        Memory::File(..) => panic!("only on devices"),
    });
    let blocks: Vec<Block> = blocks.collect();
    let segments = segments.iter().map(|segment| Segment {
        file: segment.file as usize,
        offset: segment.offset,
        row_len: segment.row_len,
        rows: segment.rows.max(1),
        src_pitch: segment.src_pitch,
        block: segment.block as usize,
        dst_offset: segment.dst_offset,
        dst_pitch: segment.dst_pitch,
    });
    let segments: Vec<Segment> = segments.collect();
    let mut devices: Vec<Device> = Vec::new();
    for block in &blocks {
        if devices.iter().all(|device| device.id() != block.device().id()) {
            devices.push(block.device().clone());
        }
    }
    let loader = Loader::builder().devices(devices).build().unwrap();
    loader.fill_segments(&Checkpoint::open(model).unwrap(), &segments, blocks).unwrap().bytes
}
