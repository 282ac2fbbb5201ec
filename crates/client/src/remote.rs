//! Loads by a store server.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sllm_core::{Block, Checkpoint, Control, Remote, RemoteReport, Segment};
use sllm_proto::{nanoseconds, store as pb};

use crate::client::{ClientOptions, LONGEST, StoreClient};
use crate::error::Result;
use crate::session::Session;

/// Staging memory at most, unless asked otherwise.
const STAGING_LEN: u64 = 256 << 20;
/// Allocations of a GPU up to this many bytes are opened by the server, unless asked otherwise. Opening takes 7 ms a GB
/// of an H100's memory, a third of the time in which it is filled (`docs/benchmarks.md`).
const DIRECT_LEN: u64 = 64 << 20;
/// How long a batch may take at least, unless asked otherwise: the server may have others to serve first.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a stream is kept for the next batch of its checkpoint. It has the memory of its load open, which the load's
/// owner may want to free.
const LINGER: Duration = Duration::from_millis(500);
/// Streams kept.
const MAX_IDLE: usize = 4;

/// How a server's loads are made.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    model: Option<String>,
    pub(crate) staging_len: u64,
    pub(crate) direct_len: u64,
    pub(crate) patience: Duration,
    linger: Duration,
}

impl RemoteOptions {
    /// The defaults: a checkpoint is named by its path, staging memory has 256 MiB, a batch 60 seconds and more.
    pub fn new() -> RemoteOptions {
        let (staging_len, direct_len) = (STAGING_LEN, DIRECT_LEN);
        RemoteOptions { model: None, staging_len, direct_len, patience: PATIENCE, linger: LINGER }
    }

    /// What the server calls the checkpoint; `None`: by its path, which must be the same for the server.
    pub fn model(mut self, model: impl Into<Option<String>>) -> RemoteOptions {
        self.model = model.into();
        self
    }

    /// Staging memory at most, in bytes, for what the server does not write to itself; 2 MiB are taken at least.
    pub fn staging_bytes(mut self, len: u64) -> RemoteOptions {
        self.staging_len = len;
        self
    }

    /// The server writes to allocations of a GPU up to this many bytes itself, 64 MiB unless given. Larger ones take it
    /// longer to open than their bytes take by staging memory.
    pub fn direct_bytes(mut self, len: u64) -> RemoteOptions {
        self.direct_len = len;
        self
    }

    /// How long a stream is kept after a batch, for the next one of its checkpoint; half a second unless given. The
    /// server has the load's memory open as long.
    pub fn linger(mut self, linger: Duration) -> RemoteOptions {
        self.linger = linger.min(LONGEST);
        self
    }

    /// How long a batch may take, and a second more for each 100 MB.
    pub fn patience(mut self, patience: Duration) -> RemoteOptions {
        self.patience = patience.min(LONGEST);
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
        let place = idle.iter().position(|(_, session)| session.is_of(open) && session.is_idle())?;
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
            None => Session::open(&client, open, control)?,
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
            let ((seconds, nanoseconds), (device, inode)) = (file.modified(), file.inode());
            pb::File {
                name: file.name().to_owned(),
                len: file.len(),
                modified_s: seconds,
                // The system's are below a thousand million.
                modified_ns: u32::try_from(nanoseconds).unwrap_or(u32::MAX),
                device,
                inode,
            }
        };
        let files = checkpoint.files();
        let status_changed_ns = files.iter().map(|file| nanoseconds(file.status_changed())).collect();
        Ok(pb::Open { model, files: files.iter().map(file).collect(), status_changed_ns })
    }

    /// Keeps a stream for a moment.
    fn keep(&self, client: &StoreClient, session: Session) {
        let linger = self.options.linger;
        {
            let mut idle = self.idle.lock();
            if idle.len() >= MAX_IDLE || !session.is_idle() {
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
