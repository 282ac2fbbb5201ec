//! Connections of clients: which of them speak gRPC, and which pass memory.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recv, recvmsg, send};
use sllm_proto::{PASS_MEMORY, TICKET_LEN};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tonic::transport::server::Connected;

use crate::listen::Listener;
use crate::memory::{Ticket, Tickets};

/// What a client of gRPC says first (RFC 9113, 3.4). Whoever has said all of it is asked from time to time whether he is
/// still there; whoever has not would not be.
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a client may take to say the first word: one that says less keeps a descriptor.
pub(crate) const FIRST_WORD: Duration = Duration::from_secs(20);
/// How long the passing of memory may take.
const PASSING: Duration = Duration::from_secs(5);
/// How long to wait where no connection can be taken, as when descriptors run out.
const PAUSE: Duration = Duration::from_millis(50);

/// A client's connection.
pub(crate) struct Connection {
    io: Io,
    _counted: Counted,
}

enum Io {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// What a connection is for, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Grpc,
    PassMemory,
    /// Nothing that is known here.
    Other,
}

impl Word {
    /// `None` where more bytes must tell.
    fn of(bytes: &[u8], peer: Peer) -> Option<Word> {
        let words = [(&PREFACE[..], Word::Grpc), (&PASS_MEMORY[..], Word::PassMemory)];
        // Descriptors come by Unix sockets only.
        let mut words = words.into_iter().filter(|(_, word)| peer == Peer::Unix || *word == Word::Grpc);
        match words.find(|(whole, _)| whole.iter().zip(bytes).all(|(known, said)| known == said)) {
            Some((whole, word)) => (bytes.len() >= whole.len()).then_some(word),
            None => Some(Word::Other),
        }
    }
}

/// Whence a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A Unix socket, whose mode says who may connect.
    Unix,
    /// A TCP port, at which anybody may.
    Tcp,
}

/// One of the clients that are counted.
struct Counted(Arc<AtomicU32>);

impl Counted {
    fn new(clients: &Arc<AtomicU32>) -> Counted {
        clients.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(clients))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What connections are taken for.
#[derive(Clone)]
pub(crate) struct Reception {
    /// To whoever serves gRPC.
    pub(crate) grpc: mpsc::Sender<io::Result<Connection>>,
    /// Where passed memory waits.
    pub(crate) tickets: Arc<Tickets>,
    /// Clients that are connected.
    pub(crate) clients: Arc<AtomicU32>,
    /// How long a client may take to say its first word.
    pub(crate) first_word: Duration,
}

impl Reception {
    /// Takes connections as long as it is polled.
    pub(crate) async fn accept(self, listener: Listener) -> io::Result<()> {
        match listener {
            Listener::Unix(file, listener) => {
                let listener = tokio::net::UnixListener::from_std(listener)?;
                // Dropped before the listener, see there.
                let _file = file;
                loop {
                    if let Some((stream, _)) = taken(listener.accept().await).await {
                        tokio::spawn(self.clone().receive(Io::Unix(stream)));
                    }
                }
            }
            Listener::Tcp(listener, _) => {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                loop {
                    if let Some((stream, _)) = taken(listener.accept().await).await {
                        let _ = stream.set_nodelay(true);
                        tokio::spawn(self.clone().receive(Io::Tcp(stream)));
                    }
                }
            }
        }
    }

    /// Hears the first word, which says what the connection is for.
    async fn receive(self, io: Io) {
        // A client that says nothing, or nothing known, or goes, is of no interest.
        let Ok(Ok(word)) = tokio::time::timeout(self.first_word, io.first_word()).await else { return };
        match (word, io) {
            (Word::Grpc, io) => self.give(io).await,
            (Word::PassMemory, Io::Unix(stream)) => self.take_memory(stream).await,
            _ => {}
        }
    }

    /// Takes memory on a thread that may block: a descriptor may be of anything, and closing it may take for ever.
    async fn take_memory(&self, stream: UnixStream) {
        let place = tokio::time::timeout(PASSING, self.tickets.place()).await;
        let (Ok(place), Ok(stream)) = (place, stream.into_std()) else {
            return tracing::warn!(
                "memory of a client was not taken: descriptors that others passed are not closed yet"
            );
        };
        let tickets = Arc::clone(&self.tickets);
        let taking = tokio::task::spawn_blocking(move || {
            let _place = place;
            take(&tickets, &stream);
        });
        // Nobody waits for it but the client.
        drop(taking);
    }

    async fn give(&self, io: Io) {
        let connection = Connection { io, _counted: Counted::new(&self.clients) };
        // Nobody takes it when the server stops.
        let _ = self.grpc.send(Ok(connection)).await;
    }
}

/// What was accepted; `None`, after a pause, where nothing could be.
async fn taken<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(taken) => Some(taken),
        Err(error) => {
            tracing::warn!(%error, "a connection cannot be taken");
            tokio::time::sleep(PAUSE).await;
            None
        }
    }
}

impl Io {
    fn peer(&self) -> Peer {
        match self {
            Io::Unix(_) => Peer::Unix,
            Io::Tcp(_) => Peer::Tcp,
        }
    }

    async fn readable(&self) -> io::Result<Ready> {
        match self {
            Io::Unix(stream) => stream.ready(Interest::READABLE).await,
            Io::Tcp(stream) => stream.ready(Interest::READABLE).await,
        }
    }

    /// Looks at the first bytes without taking them; `WouldBlock` where they are too few to tell.
    fn peek(&self) -> io::Result<Word> {
        let look = |fd: BorrowedFd<'_>| {
            let mut bytes = [0; PREFACE.len()];
            let (len, _) = recv(fd, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
            Word::of(&bytes[..len], self.peer()).ok_or(io::ErrorKind::WouldBlock.into())
        };
        match self {
            Io::Unix(stream) => stream.try_io(Interest::READABLE, || look(stream.as_fd())),
            Io::Tcp(stream) => stream.try_io(Interest::READABLE, || look(stream.as_fd())),
        }
    }

    /// Waits until the first bytes tell what the connection is for.
    async fn first_word(&self) -> io::Result<Word> {
        loop {
            let ready = self.readable().await?;
            match self.peek() {
                // The next bytes wake us, but none come after the end.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && !ready.is_read_closed() => {}
                told => return told,
            }
        }
    }
}

/// Takes memory, and tells the client. Blocks.
fn take(tickets: &Tickets, stream: &std::os::unix::net::UnixStream) {
    let passed = receive_memory(stream, Instant::now() + PASSING);
    let taken = passed.as_ref().map_err(Clone::clone).and_then(|(ticket, file)| tickets.pass(*ticket, file));
    if let Err(reason) = &taken {
        tracing::warn!(%reason, "memory of a client was refused");
    }
    let answer = taken.err().unwrap_or_else(|| "\0".into());
    // So little has room in a socket to which nothing was written. A client that is gone does not get it.
    let _ = send(stream, answer.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    let _ = stream.shutdown(std::net::Shutdown::Both);
    // Closed when the client knows: it may take for ever.
    drop(passed);
}

/// Receives what `PASS_MEMORY` begins: a ticket and a descriptor. Blocks.
fn receive_memory(stream: &std::os::unix::net::UnixStream, until: Instant) -> Result<(Ticket, OwnedFd), String> {
    const LEN: usize = PASS_MEMORY.len() + TICKET_LEN;
    let broken = |e: io::Error| match e.kind() {
        io::ErrorKind::WouldBlock => format!("the memory did not come within {} seconds", PASSING.as_secs()),
        _ => format!("the memory cannot be received: {e}"),
    };
    stream.set_nonblocking(false).map_err(broken)?;
    let mut bytes = [0; LEN];
    let mut len = 0;
    let mut file = None;
    while len < LEN {
        // Zero would be no limit.
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left)).map_err(broken)?;
        let received = retry_on_intr(|| receive(stream, &mut bytes[len..])).map_err(|e| broken(e.into()))?;
        if received.len == 0 {
            return Err("the connection ended within the ticket".into());
        }
        if received.cut && received.file.is_none() {
            return Err("the server has too many files open to take a descriptor: try again later".into());
        }
        if received.cut || (file.is_some() && received.file.is_some()) {
            return Err("pass one descriptor at a time".into());
        }
        file = file.or(received.file);
        len += received.len;
    }
    let (word, ticket) = bytes.split_at(PASS_MEMORY.len());
    match (word == PASS_MEMORY, Ticket::try_from(ticket), file) {
        (true, Ok(ticket), Some(file)) => Ok((ticket, file)),
        (true, _, None) => Err("no descriptor came with the ticket".into()),
        _ => Err("this is not how memory is passed".into()),
    }
}

struct Received {
    len: usize,
    file: Option<OwnedFd>,
    /// Whether more descriptors came than one, or than this process may have.
    cut: bool,
}

fn receive(stream: impl AsFd, bytes: &mut [u8]) -> rustix::io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(stream, &mut [io::IoSliceMut::new(bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let files = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let mut files = files.flatten();
    let file = files.next();
    let cut = files.next().is_some() || message.flags.contains(ReturnFlags::CTRUNC);
    Ok(Received { len: message.bytes, file, cut })
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.io.peer()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Io::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tcp(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, SocketAddr};

    use super::*;
    use crate::listen::{bind_tcp, bind_unix};
    use crate::memory::TAKEN_AT_ONCE;

    const HOUR: Duration = Duration::from_secs(3600);
    /// Far more than anything takes here that does not wait for ever.
    const LIMIT: Duration = Duration::from_secs(60);

    /// A reception at a port, and whom it gives to gRPC.
    fn reception(first_word: Duration) -> (SocketAddr, mpsc::Receiver<io::Result<Connection>>) {
        let (grpc, taken) = mpsc::channel(8);
        let (tcp, address) = bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let (tickets, clients) = (Arc::default(), Arc::default());
        tokio::spawn(Reception { grpc, tickets, clients, first_word }.accept(Listener::Tcp(tcp, address)));
        (address, taken)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_does_not_say_the_whole_word_in_time_is_hung_up_on() {
        let (address, taken) = reception(Duration::from_millis(50));
        for said in [&b""[..], b"P", &PREFACE[..23]] {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(said).unwrap();
            // Where it was not read what was said, the system tells of that.
            assert!(stream.read(&mut [0]).map_or_else(|e| e.kind() == io::ErrorKind::ConnectionReset, |len| len == 0));
        }
        assert!(taken.is_empty(), "who said too little is served");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_says_something_else_or_no_more_is_hung_up_on_at_once() {
        let (address, taken) = reception(HOUR);
        for said in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PRI * HTTP/1", &PASS_MEMORY, &PREFACE[..23]] {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(said).unwrap();
            if said == &PREFACE[..23] {
                stream.shutdown(Shutdown::Write).unwrap();
            }
            assert!(stream.read(&mut [0]).map_or_else(|e| e.kind() == io::ErrorKind::ConnectionReset, |len| len == 0));
        }
        assert!(taken.is_empty(), "who speaks no gRPC is served");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_says_the_whole_word_is_heard_also_bit_by_bit() {
        let (address, mut taken) = reception(HOUR);
        for cut in [0, 1, 23] {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            stream.set_nodelay(true).unwrap();
            stream.write_all(&PREFACE[..cut]).unwrap();
            // It may look at the first part by itself, or at both.
            tokio::time::sleep(Duration::from_millis(20)).await;
            stream.write_all(&PREFACE[cut..]).unwrap();
            tokio::time::timeout(LIMIT, taken.recv()).await.expect("it is not heard").unwrap().unwrap();
        }
    }

    #[test]
    fn who_passes_memory_to_a_server_with_too_many_open_files_is_told_so() {
        const ALONE: &str = "SLLM_TEST_NO_DESCRIPTORS";
        if std::env::var_os(ALONE).is_none() {
            // In a process of its own, whose limit is no other test's.
            let name = "connection::tests::who_passes_memory_to_a_server_with_too_many_open_files_is_told_so";
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            let output = alone.args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().unwrap();
            return assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        pass(&theirs, theirs.as_fd());
        let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        limit.current = Some(3);
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        let reason = receive_memory(&ours, Instant::now() + LIMIT).unwrap_err();
        assert!(reason.contains("too many files open"), "{reason}");
    }

    fn pass(stream: &std::os::unix::net::UnixStream, file: BorrowedFd<'_>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
        let (files, head) = ([file], [&PASS_MEMORY[..], &[7; TICKET_LEN]].concat());
        assert!(ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&files)));
        rustix::net::sendmsg(stream, &[io::IoSlice::new(&head)], &mut ancillary, SendFlags::empty()).unwrap();
    }

    /// A connection whose last descriptor takes an hour to close, and its peer, which ends that.
    fn lingering() -> (std::net::TcpStream, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        rustix::net::sockopt::set_socket_linger(&stream, Some(HOUR)).unwrap();
        stream.set_nonblocking(true).unwrap();
        // More than the peer takes, who reads nothing.
        while stream.write(&[0; 1 << 16]).is_ok() {}
        (stream, peer)
    }

    #[test]
    fn who_passes_what_cannot_be_closed_hinders_no_others() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("s");
            let (grpc, mut taken) = mpsc::channel(8);
            let tickets: Arc<Tickets> = Arc::default();
            let (clients, first_word) = (Arc::default(), HOUR);
            let reception = Reception { grpc, tickets: Arc::clone(&tickets), clients, first_word };
            tokio::spawn(reception.accept(bind_unix(&path).unwrap().unwrap()));
            let (streams, peers): (Vec<_>, Vec<_>) = (0..TAKEN_AT_ONCE).map(|_| lingering()).unzip();
            // Ours go before theirs are taken: the last one is the server's.
            let mut places = Vec::new();
            for _ in 0..TAKEN_AT_ONCE {
                places.push(tickets.place().await.unwrap());
            }
            let passing = streams.into_iter().map(|stream| {
                let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
                client.set_read_timeout(Some(LIMIT)).unwrap();
                pass(&client, stream.as_fd());
                client
            });
            let passing: Vec<_> = passing.collect();
            drop(places);
            for mut client in passing {
                let mut answer = String::new();
                client.read_to_string(&mut answer).unwrap();
                assert!(answer.contains("not of a memory file"), "{answer}");
            }
            let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
            client.write_all(&PREFACE).unwrap();
            tokio::time::timeout(LIMIT, taken.recv()).await.expect("it is not heard").unwrap().unwrap();
            // Their ends let go of it.
            drop(peers);
            tokio::time::timeout(LIMIT, tickets.place()).await.expect("nobody passes memory any more");
        });
    }

    #[test]
    fn the_first_bytes_tell_by_which_door_they_came() {
        for (said, unix, tcp) in [
            (&b""[..], None, None),
            (&PREFACE, Some(Word::Grpc), Some(Word::Grpc)),
            (&PREFACE[..23], None, None),
            (&PASS_MEMORY, Some(Word::PassMemory), Some(Word::Other)),
            (&PASS_MEMORY[..7], None, Some(Word::Other)),
            (b"sllm-mex", Some(Word::Other), Some(Word::Other)),
        ] {
            assert_eq!((Word::of(said, Peer::Unix), Word::of(said, Peer::Tcp)), (unix, tcp), "{said:?}");
        }
    }
}
