//! Loads by a store server.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sllm_core::{Block, Checkpoint, Control, Device, DeviceError, Progress, Remote, RemoteReport, Segment};
use sllm_proto::store as pb;

use crate::client::{ClientOptions, StoreClient};
use crate::cut::{Cutter, MESSAGE_SEGMENTS, Part, message};
use crate::error::{Error, Result};
use crate::load::{Load, Step};
use crate::staging::{Made, Staging, attach_device};

/// Staging memory at most, unless asked otherwise: two halves, each large enough that a round trip does not matter.
const STAGING_LEN: u64 = 128 << 20;
/// How long a batch may take at least, unless asked otherwise: the server may have others to serve first.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that a server moves in a millisecond at least, the slowest disk included.
const SLOWEST: u64 = 100_000;
/// How long a stream is kept for the next batch of its checkpoint. It has the memory of its load open, which the load's
/// owner may want to free.
const LINGER: Duration = Duration::from_millis(500);
/// Streams kept.
const MAX_IDLE: usize = 4;

/// How a server's loads are made.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    model: Option<String>,
    staging_len: u64,
    patience: Duration,
    linger: Duration,
}

impl RemoteOptions {
    /// The defaults: a checkpoint is named by its path, staging memory has 128 MiB, a batch 60 seconds and more.
    pub fn new() -> RemoteOptions {
        RemoteOptions { model: None, staging_len: STAGING_LEN, patience: PATIENCE, linger: LINGER }
    }

    /// What the server calls the checkpoint; `None`: by its path, which must be the same for the server.
    pub fn model(mut self, model: impl Into<Option<String>>) -> RemoteOptions {
        self.model = model.into();
        self
    }

    /// Staging memory at most, in bytes, for what the server cannot write to; 4 MiB are taken at least.
    pub fn staging_bytes(mut self, len: u64) -> RemoteOptions {
        self.staging_len = len;
        self
    }

    /// How long a stream is kept after a batch, for the next one of its checkpoint; half a second unless given. The
    /// server has the load's memory open as long.
    pub fn linger(mut self, linger: Duration) -> RemoteOptions {
        self.linger = linger;
        self
    }

    /// How long a batch may take, and a second more for each 100 MB.
    pub fn patience(mut self, patience: Duration) -> RemoteOptions {
        self.patience = patience;
        self
    }
}

impl Default for RemoteOptions {
    fn default() -> RemoteOptions {
        RemoteOptions::new()
    }
}

/// Has a store server fill the blocks of loads.
#[derive(Debug)]
pub struct StoreRemote {
    options: RemoteOptions,
    idle: Arc<Idle>,
    /// How to connect, at the first load.
    at: ClientOptions,
    client: Mutex<Option<StoreClient>>,
}

/// What a server moved.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Moved {
    /// Bytes that were wanted.
    pub bytes: u64,
    /// Of the bytes that were read for them, those that were in the server's pool.
    pub from_pool: u64,
    /// And those that were not.
    pub from_files: u64,
    /// Bytes that went by staging memory, and were copied once more.
    pub staged: u64,
    /// Batches that the server was given.
    pub batches: u64,
    /// Those of which the server says that it compared the checksums of what it read.
    pub verified: u64,
    /// Seconds in which the server moved them, by its clock.
    pub seconds: f64,
}

impl Remote for StoreRemote {
    fn fill(
        &self,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        blocks: &[Block],
        control: &Control,
    ) -> sllm_core::Result<RemoteReport> {
        let moved = self.fill(checkpoint, segments, blocks, control)?;
        let by = self
            .client()
            .map_or_else(|_| "the store server".into(), |client| format!("the store server at {}", client.address()));
        Ok(RemoteReport {
            by,
            from_memory: moved.from_pool,
            from_files: moved.from_files,
            verified: moved.verified == moved.batches,
            seconds: moved.seconds,
            notes: Vec::new(),
        })
    }
}

/// Streams that wait for more of their checkpoints.
#[derive(Debug, Default)]
struct Idle(Mutex<Vec<(Instant, Session)>>);

impl Idle {
    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, Session)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream for this checkpoint.
    fn take(&self, open: &pb::Open) -> Option<Session> {
        let mut idle = self.lock();
        let place = idle.iter().position(|(_, session)| session.open == *open && session.load.is_idle())?;
        Some(idle.swap_remove(place).1)
    }

    /// Ends the streams whose time is over.
    fn sweep(&self) {
        let now = Instant::now();
        let over: Vec<_> = self.lock().extract_if(.., |(until, _)| *until <= now).collect();
        // Outside the lock: nothing is under way, so that this waits for nobody, but device memory may go.
        drop(over);
    }
}

/// A stream, and the staging memory that the server has by it.
#[derive(Debug)]
struct Session {
    open: pb::Open,
    load: Load,
    staging: Vec<(Device, Staging)>,
}

/// How a block is reached.
enum Route {
    /// By the server itself: as a part of its block.
    Direct { block: u32, base: u64 },
    /// By staging memory of its device.
    Staged,
}

impl StoreRemote {
    /// Loads by this client's server.
    pub fn new(client: StoreClient, options: RemoteOptions) -> StoreRemote {
        StoreRemote { client: Mutex::new(Some(client)), ..StoreRemote::at(ClientOptions::new(), options) }
    }

    /// Loads by the server that is reached so. The first load connects: that no server answers is its failure.
    pub fn at(at: ClientOptions, options: RemoteOptions) -> StoreRemote {
        StoreRemote { options, idle: Arc::default(), at, client: Mutex::default() }
    }

    /// Its client; connects where it has none.
    pub fn client(&self) -> Result<StoreClient> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        match &*client {
            Some(client) => Ok(client.clone()),
            None => Ok(client.insert(StoreClient::connect(&self.at)?).clone()),
        }
    }

    /// Has segments of a checkpoint's files moved into blocks. After an error the server writes to none of them.
    pub fn fill(
        &self,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        blocks: &[Block],
        control: &Control,
    ) -> Result<Moved> {
        control.check()?;
        let client = self.client()?;
        let files: Vec<u64> = checkpoint.files().iter().map(|file| file.len()).collect();
        let lens: Vec<u64> = blocks.iter().map(Block::len).collect();
        let mut wanted: Vec<Segment> = segments.iter().filter(|segment| !segment.is_empty()).copied().collect();
        wanted.iter().try_for_each(|segment| segment.check(&files, &lens))?;
        // In the order of the files, so that the server finds together what lies together.
        wanted.sort_by_key(|segment| (segment.file, segment.offset));
        let open = self.open(checkpoint)?;
        let mut session = match self.idle.take(&open) {
            Some(session) => session,
            None => Session { load: Load::open(&client, open.clone(), control)?, open, staging: Vec::new() },
        };
        let moved = session.fill(&client, &self.options, wanted, blocks, control)?;
        self.keep(&client, session);
        Ok(moved)
    }

    /// The checkpoint and its files as the server is told them.
    fn open(&self, checkpoint: &Checkpoint) -> Result<pb::Open> {
        let path = checkpoint.path();
        let model = match &self.options.model {
            Some(model) => model.clone(),
            None => path_of(path)?,
        };
        let file = |file: &sllm_core::DataFile| {
            let (seconds, nanoseconds) = file.modified();
            pb::File {
                name: file.name().to_owned(),
                len: file.len(),
                modified_s: seconds,
                // The system's are below a thousand million.
                modified_ns: u32::try_from(nanoseconds).unwrap_or(u32::MAX),
            }
        };
        Ok(pb::Open { model, files: checkpoint.files().iter().map(file).collect() })
    }

    /// Keeps a stream for a moment.
    fn keep(&self, client: &StoreClient, session: Session) {
        let linger = self.options.linger;
        {
            let mut idle = self.idle.lock();
            if idle.len() >= MAX_IDLE || !session.load.is_idle() {
                return;
            }
            idle.push((Instant::now() + linger, session));
        }
        let idle = Arc::downgrade(&self.idle);
        let sweep = async move {
            tokio::time::sleep(linger).await;
            if let Some(idle) = idle.upgrade() {
                idle.sweep();
            }
        };
        if client.runtime().spawn(sweep).is_err() {
            self.idle.lock().clear();
        }
    }
}

/// The path by which the server, too, finds a checkpoint.
fn path_of(path: &Path) -> Result<String> {
    let io = |source| sllm_core::Error::Io { what: "resolve", path: path.to_owned(), source };
    let path = path.canonicalize().map_err(io)?;
    let text = path.to_str().ok_or_else(|| {
        sllm_core::Error::Invalid(format!("{} is not UTF-8: the store server cannot be told of it", path.display()))
    })?;
    Ok(text.to_owned())
}

/// What is of interest here of a load's report.
#[derive(Default, serde::Deserialize)]
struct Told {
    verified: bool,
    seconds: f64,
}

/// How long a batch of so many bytes may take.
fn limit(patience: Duration, len: u64) -> Duration {
    patience.saturating_add(Duration::from_millis(len / SLOWEST))
}

/// Bytes done, of all.
struct Meter<'a> {
    control: &'a Control,
    done: u64,
    total: u64,
}

impl Meter<'_> {
    fn tell(&self, more: u64) {
        self.control.tell(Progress { done: (self.done + more).min(self.total), total: self.total });
    }
}

impl Session {
    fn fill(
        &mut self,
        client: &StoreClient,
        options: &RemoteOptions,
        segments: Vec<Segment>,
        blocks: &[Block],
        control: &Control,
    ) -> Result<Moved> {
        let patience = options.patience;
        let total = segments.iter().map(Segment::len).sum();
        let mut meter = Meter { control, done: 0, total };
        let mut moved = Moved::default();
        let (direct, staged) = self.split(segments, blocks)?;

        // All at once: the server goes from one to the next without a round trip.
        let mut sent = VecDeque::new();
        let mut direct = direct.into_iter().peekable();
        while direct.peek().is_some() {
            let batch: Vec<pb::Segment> = direct.by_ref().take(MESSAGE_SEGMENTS).collect();
            let len = batch.iter().map(|segment| segment.rows * segment.row_len).sum();
            self.load.batch(batch, limit(patience, len))?;
            sent.push_back(len);
        }
        while let Some(len) = sent.pop_front() {
            self.wait(len, &mut meter, &mut moved)?;
        }
        for (device, segments) in staged {
            let at = self.staging_for(client, &device, segments.iter().map(Segment::len).sum(), options.staging_len)?;
            self.fill_staged(at, patience, segments, blocks, &mut meter, &mut moved)?;
        }
        Ok(moved)
    }

    /// Segments that the server can move to their places, and by device those that it cannot.
    #[allow(clippy::type_complexity, reason = "two lists")]
    fn split(
        &mut self,
        segments: Vec<Segment>,
        blocks: &[Block],
    ) -> Result<(Vec<pb::Segment>, Vec<(Device, Vec<Segment>)>)> {
        let mut routes: Vec<Option<Route>> = blocks.iter().map(|_| None).collect();
        let mut direct = Vec::new();
        let mut staged: Vec<(Device, Vec<Segment>)> = Vec::new();
        for segment in segments {
            // `Segment::check` found its block.
            let (Some(block), Some(route)) = (blocks.get(segment.block), routes.get_mut(segment.block)) else {
                continue;
            };
            let route = match route {
                Some(route) => route,
                none => none.insert(self.route(block)?),
            };
            match *route {
                Route::Direct { block, base } => direct.push(message(&segment, block, base)),
                Route::Staged => match staged.iter_mut().find(|(device, _)| device.id() == block.device().id()) {
                    Some((_, segments)) => segments.push(segment),
                    None => staged.push((block.device().clone(), vec![segment])),
                },
            }
        }
        Ok((direct, staged))
    }

    fn route(&mut self, block: &Block) -> Result<Route> {
        if block.device().is_host() {
            return Ok(Route::Staged);
        }
        match block.export() {
            Ok(shared) => {
                // The whole allocation, which many blocks may lie in: each is opened once.
                let device = block.device();
                let attach = || attach_device(device, &shared.handle, 0, shared.base_len);
                let block = self.load.attach_once(shared.handle.to_vec(), attach)?;
                Ok(Route::Direct { block, base: shared.offset })
            }
            Err(sllm_core::Error::Device(DeviceError::NotShareable { .. })) => Ok(Route::Staged),
            Err(e) => Err(e.into()),
        }
    }

    /// The place of staging memory for a device, made or made larger where that is of use.
    fn staging_for(&mut self, client: &StoreClient, device: &Device, wanted: u64, most: u64) -> Result<usize> {
        let place = self.staging.iter().position(|(of, _)| of.id() == device.id());
        if let Some(place) = place
            && self.staging[place].1.half_len >= wanted.min(most / 2)
        {
            return Ok(place);
        }
        let number = self.load.next_block();
        let Made { staging, attach, memory } = Staging::make(client, device, number, wanted, most)?;
        self.load.attach(attach, Some(memory))?;
        match place {
            Some(place) => self.staging[place].1 = staging,
            None => self.staging.push((device.clone(), staging)),
        }
        Ok(place.unwrap_or(self.staging.len() - 1))
    }

    /// Moves segments part by part: while the server fills one half of the staging memory, the other is copied out.
    fn fill_staged(
        &mut self,
        at: usize,
        patience: Duration,
        segments: Vec<Segment>,
        blocks: &[Block],
        meter: &mut Meter<'_>,
        moved: &mut Moved,
    ) -> Result<()> {
        let wanted: u64 = segments.iter().map(Segment::len).sum();
        let mut cutter = Cutter::new(segments);
        let mut sent: VecDeque<Part> = VecDeque::new();
        let (mut half, mut cut) = (0, 0);
        loop {
            while sent.len() < 2 {
                let staging = &self.staging[at].1;
                let Some(mut part) = cutter.part(staging.block, staging.base(half), staging.half_len) else { break };
                self.load.batch(std::mem::take(&mut part.segments), limit(patience, part.len))?;
                cut += part.len;
                sent.push_back(part);
                half = 1 - half;
            }
            let Some(part) = sent.pop_front() else { break };
            self.wait(part.len, meter, moved)?;
            self.staging[at].1.move_out(&part, blocks)?;
            moved.staged += part.len;
        }
        if cut != wanted {
            return Err(Error::NotPassed(format!("{cut} of {wanted} bytes fit the staging memory")));
        }
        Ok(())
    }

    /// Waits for the first batch that is under way, of `len` bytes.
    fn wait(&mut self, len: u64, meter: &mut Meter<'_>, moved: &mut Moved) -> Result<()> {
        loop {
            match self.load.step(meter.control)? {
                Step::Progress(done) => meter.tell(done.min(len)),
                Step::Done(done) if done.bytes == len => {
                    meter.done += len;
                    meter.tell(0);
                    moved.bytes += len;
                    moved.from_pool += done.from_pool;
                    moved.from_files += done.from_files;
                    moved.batches += 1;
                    // A report of another version may say less.
                    let told: Told = serde_json::from_str(&done.report).unwrap_or_default();
                    moved.verified += u64::from(told.verified);
                    moved.seconds += told.seconds;
                    return Ok(());
                }
                Step::Done(done) => {
                    return Err(Error::Protocol(format!("{} bytes of a batch of {len} arrived", done.bytes)));
                }
            }
        }
    }
}
