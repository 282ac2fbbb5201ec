//! Connections of clients: which of them speak gRPC, and which pass memory.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recv, recvmsg, send};
use sllm_proto::{PASS_MEMORY, TICKET_LEN};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tonic::transport::server::Connected;

use crate::listen::Listener;
use crate::memory::{Ticket, Tickets};

/// How long a client may take to say the first word: one that says nothing keeps a descriptor.
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
            Listener::Unix(listener, _file) => {
                let listener = tokio::net::UnixListener::from_std(listener)?;
                loop {
                    if let Some((stream, _)) = taken(listener.accept().await).await {
                        tokio::spawn(self.clone().receive_unix(stream));
                    }
                }
            }
            Listener::Tcp(listener, _) => {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                loop {
                    if let Some((stream, _)) = taken(listener.accept().await).await {
                        tokio::spawn(self.clone().receive_tcp(stream));
                    }
                }
            }
        }
    }

    /// Waits for the first word. What is said is for gRPC to hear.
    async fn receive_tcp(self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        // A client that says nothing, or goes, is of no interest.
        if let Ok(Ok(1..)) = tokio::time::timeout(self.first_word, stream.peek(&mut [0])).await {
            self.give(Io::Tcp(stream)).await;
        }
    }

    /// Hears the first word, which says what the connection is for.
    async fn receive_unix(self, stream: UnixStream) {
        let mut word = [0; PASS_MEMORY.len()];
        let first = tokio::time::timeout(self.first_word, peek(&stream, &mut word)).await;
        // A client that says nothing, or goes, is of no interest.
        let Ok(Ok(len @ 1..)) = first else { return };
        // gRPC begins with other bytes: the first one tells.
        if !PASS_MEMORY.starts_with(&word[..len]) {
            return self.give(Io::Unix(stream)).await;
        }
        let passed = tokio::time::timeout(PASSING, receive_memory(&stream)).await;
        let taken = match passed {
            Ok(Ok((ticket, file))) => self.tickets.pass(ticket, &file),
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err(format!("the memory did not come within {} seconds", PASSING.as_secs())),
        };
        if let Err(reason) = &taken {
            tracing::warn!(%reason, "memory of a client was refused");
        }
        let answer = taken.err().unwrap_or_else(|| "\0".into());
        // A client that does not wait for the answer does not get it.
        let sending = stream.async_io(Interest::WRITABLE, || {
            Ok(send(&stream, answer.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
        });
        let _ = tokio::time::timeout(PASSING, sending).await;
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

/// Looks at the first bytes without taking them; 0 where the client is gone.
async fn peek(stream: &UnixStream, word: &mut [u8]) -> io::Result<usize> {
    stream.async_io(Interest::READABLE, || Ok(recv(stream, &mut *word, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0)).await
}

/// Receives what `PASS_MEMORY` begins: a ticket and a descriptor.
async fn receive_memory(stream: &UnixStream) -> Result<(Ticket, OwnedFd), String> {
    const LEN: usize = PASS_MEMORY.len() + TICKET_LEN;
    let mut bytes = [0; LEN];
    let mut len = 0;
    let mut file = None;
    while len < LEN {
        let received = stream.async_io(Interest::READABLE, || receive(stream, &mut bytes[len..])).await;
        let received = received.map_err(|e| format!("the memory cannot be received: {e}"))?;
        if received.len == 0 {
            return Err("the connection ended within the ticket".into());
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
    /// Whether more descriptors came than one.
    cut: bool,
}

fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(stream, &mut [io::IoSliceMut::new(bytes)], &mut ancillary, flags)?;
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
        match self.io {
            Io::Unix(_) => Peer::Unix,
            Io::Tcp(_) => Peer::Tcp,
        }
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

    use super::*;
    use crate::listen::bind_tcp;

    #[tokio::test]
    async fn a_client_by_tcp_that_says_nothing_is_hung_up_on_and_one_that_speaks_is_heard() {
        let (grpc, mut taken) = mpsc::channel(8);
        let (tickets, clients) = (Arc::default(), Arc::default());
        let first_word = Duration::from_millis(50);
        let (tcp, address) = bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = Listener::Tcp(tcp, address);
        let accepting = tokio::spawn(Reception { grpc, tickets, clients, first_word }.accept(listener));
        let hung_up = tokio::task::spawn_blocking(move || {
            let mut silent = std::net::TcpStream::connect(address).unwrap();
            silent.read(&mut [0]).map(|len| len == 0)
        });
        tokio::select! {
            hung_up = hung_up => assert!(hung_up.unwrap().unwrap()),
            _ = taken.recv() => panic!("it said nothing, and is served"),
        }
        // Its word may come too late on a slow machine: then it tries again.
        loop {
            let mut speaking = std::net::TcpStream::connect(address).unwrap();
            speaking.write_all(b"P").unwrap();
            if tokio::time::timeout(first_word * 2, taken.recv()).await.is_ok() {
                break;
            }
        }
        accepting.abort();
    }
}
