//! A server in this process, and clients of it.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod models;
pub(crate) mod session;

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use sllm_proto::PASS_MEMORY;
use sllm_proto::storage::storage_client::StorageClient;
use sllm_proto::store::store_client::StoreClient;
use sllm_server::{Address, Config, Server};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

/// A server of a directory of its own.
pub(crate) struct Served {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) addresses: Vec<Address>,
    pub(crate) metrics: Option<std::net::SocketAddr>,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<sllm_core::Result<()>>,
}

/// The configuration of a server in a directory: models in `models`, a socket beside it, a small pool.
pub(crate) fn config(dir: &Path) -> Config {
    std::fs::create_dir_all(dir.join("models")).unwrap();
    let mut config = Config::new(dir.join("models"));
    config.listen = vec![Address::Unix(dir.join("s"))];
    config.pool_len = 64 << 20;
    config.chunk_len = 4 << 20;
    config
}

impl Served {
    /// Starts one, changed by `change`, in a directory that `fill` has filled.
    pub(crate) fn start(fill: impl FnOnce(&Path), change: impl FnOnce(&mut Config)) -> Served {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut config = config(dir.path());
        fill(&dir.path().join("models"));
        change(&mut config);
        Served::of(dir, config)
    }

    pub(crate) fn of(dir: tempfile::TempDir, config: Config) -> Served {
        let server = Server::bind(config).unwrap();
        let (addresses, metrics) = (server.addresses(), server.metrics_address());
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Served { dir, addresses, metrics, stop: Some(stop), running }
    }

    pub(crate) fn models(&self) -> PathBuf {
        self.dir.path().join("models")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub(crate) async fn channel(&self) -> Channel {
        let uri = format!("unix:{}", self.socket().display());
        Endpoint::from_shared(uri).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn storage(&self) -> StorageClient<Channel> {
        StorageClient::new(self.channel().await)
    }

    pub(crate) async fn store(&self) -> StoreClient<Channel> {
        StoreClient::new(self.channel().await).max_encoding_message_size(usize::MAX)
    }

    /// Asks it to stop.
    pub(crate) fn signal(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
    }

    /// Waits for its end.
    pub(crate) async fn ended(self) -> tempfile::TempDir {
        self.running.await.unwrap().unwrap();
        self.dir
    }

    /// Stops it and waits for its end.
    pub(crate) async fn stop(mut self) -> tempfile::TempDir {
        self.signal();
        self.ended().await
    }
}

/// The seals that the server wants of memory.
pub(crate) const SEALED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A memory file of `len` bytes, all of them 0xee.
pub(crate) fn memory(len: u64, seals: SealFlags) -> File {
    named_memory("test", len, seals)
}

/// The same, by a name that `/proc` shows.
pub(crate) fn named_memory(name: &str, len: u64, seals: SealFlags) -> File {
    use std::io::Write;
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let mut file = File::from(fd);
    file.write_all(&vec![0xee; usize::try_from(len).unwrap()]).unwrap();
    if !seals.is_empty() {
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    }
    file
}

/// Passes descriptors with these first bytes, and gives the server's answer.
pub(crate) fn send(socket: &Path, bytes: &[u8], files: &[&OwnedFd]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).unwrap();
    let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    }
    let sent = rustix::net::sendmsg(&stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

/// Passes a memory file under a ticket.
pub(crate) fn pass(socket: &Path, ticket: [u8; 16], file: &File) -> Result<(), String> {
    let fd = OwnedFd::from(file.try_clone().unwrap());
    match send(socket, &[&PASS_MEMORY[..], &ticket].concat(), &[&fd]).as_slice() {
        [0] => Ok(()),
        text => Err(String::from_utf8(text.to_vec()).unwrap()),
    }
}
