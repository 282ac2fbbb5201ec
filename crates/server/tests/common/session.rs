//! A client of the server's own service.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sllm_core::Checkpoint;
use sllm_proto::store::load_event::Kind as Event;
use sllm_proto::store::load_request::Kind as Asked;
use sllm_proto::store::store_client::StoreClient;
use sllm_proto::store::{self, Attach, Batch, Done, LoadRequest, Open, Opened, Segment};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::{SEALED, memory, pass};

/// The message that opens a model which the client sees at a path.
pub(crate) fn open_message(name: &str, path: &Path) -> Open {
    let checkpoint = Checkpoint::open(path).unwrap();
    let files = checkpoint.files().iter().map(|file| store::File {
        name: file.name().into(),
        len: file.len(),
        modified_s: file.modified().0,
        modified_ns: u32::try_from(file.modified().1).unwrap(),
        device: file.inode().0,
        inode: file.inode().1,
    });
    let times = checkpoint.files().iter().map(|file| sllm_proto::nanoseconds(file.status_changed()));
    Open { model: name.into(), files: files.collect(), status_changed_ns: times.collect() }
}

/// One segment for each file, which puts them one after the other into block 0.
pub(crate) fn all_of(open: &Open) -> Vec<Segment> {
    let mut to = 0;
    let files = (0..).zip(&open.files).map(|(file, seen)| {
        let segment = Segment { file, row_len: seen.len, dst_offset: to, ..Default::default() };
        to += seen.len;
        segment
    });
    files.collect()
}

/// A stream of loads.
pub(crate) struct Loading {
    pub(crate) to: mpsc::Sender<LoadRequest>,
    pub(crate) from: Streaming<store::LoadEvent>,
}

impl Loading {
    pub(crate) async fn start(client: &mut StoreClient<Channel>) -> Loading {
        let (to, requests) = mpsc::channel(64);
        let from = client.load(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Loading { to, from }
    }

    /// Starts a stream and opens a model.
    pub(crate) async fn open(client: &mut StoreClient<Channel>, open: Open) -> Result<(Loading, Opened), Status> {
        let mut loading = Loading::start(client).await;
        loading.ask(Asked::Open(open)).await;
        match loading.event().await? {
            Event::Opened(opened) => Ok((loading, opened)),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn ask(&mut self, kind: Asked) {
        // A server that has ended the stream says why in its answer.
        let _ = self.to.send(LoadRequest { kind: Some(kind) }).await;
    }

    pub(crate) async fn event(&mut self) -> Result<Event, Status> {
        Ok(self.from.message().await?.expect("the stream ended").kind.unwrap())
    }

    /// Passes memory and attaches all of it.
    pub(crate) async fn attach_host(&mut self, socket: &Path, ticket: [u8; 16], file: &File) {
        let (path, passed) = (socket.to_owned(), file.try_clone().unwrap());
        tokio::task::spawn_blocking(move || pass(&path, ticket, &passed)).await.unwrap().unwrap();
        let (len, memory) = (file.metadata().unwrap().len(), Some(store::attach::Memory::Ticket(ticket.into())));
        self.ask(Asked::Attach(Attach { len, offset: 0, memory })).await;
    }

    pub(crate) async fn batch(&mut self, segments: Vec<Segment>) {
        self.ask(Asked::Batch(Batch { segments, timeout_ms: 0 })).await;
    }

    /// Waits for the end of a batch.
    pub(crate) async fn done(&mut self) -> Result<Done, Status> {
        loop {
            if let Event::Done(done) = self.event().await? {
                return Ok(done);
            }
        }
    }

    /// The error that ends the stream.
    pub(crate) async fn error(&mut self) -> Status {
        loop {
            match self.from.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended well"),
                Err(status) => return status,
            }
        }
    }
}

/// A ticket that nobody else has.
pub(crate) fn ticket() -> [u8; 16] {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut ticket = [0; 16];
    ticket[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    ticket
}

/// Loads all of a model's files into host memory: the bytes, and the end.
pub(crate) async fn load(served: &super::Served, name: &str) -> Result<(Vec<u8>, Done), Status> {
    let open = open_message(name, &served.models().join(name));
    let segments = all_of(&open);
    let (mut loading, opened) = Loading::open(&mut served.store().await, open).await?;
    let file = memory(opened.total, SEALED);
    loading.attach_host(&served.socket(), ticket(), &file).await;
    loading.batch(segments).await;
    let done = loading.done().await?;
    Ok((contents(&file), done))
}

/// What is in a memory file.
pub(crate) fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}
