//! Passing a memory file to the server, by its Unix socket.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::rand::{GetRandomFlags, getrandom};
use sllm_core::MemoryFile;
use sllm_proto::{Address, PASS_MEMORY, TICKET_LEN};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::client::StoreClient;
use crate::error::{Error, Result};

/// Bytes of a refusal at most.
const MAX_ANSWER: usize = 4096;

/// Passes a memory file, and gives the ticket by which it can be attached.
pub(crate) fn pass(client: &StoreClient, memory: &MemoryFile) -> Result<[u8; TICKET_LEN]> {
    let path = match client.address() {
        Address::Unix(path) => path.clone(),
        tcp => return Err(Error::MemoryOverTcp { address: tcp.to_string() }),
    };
    let ticket: [u8; TICKET_LEN] = random("a ticket")?;
    let memory = memory.clone();
    client.runtime().run("take memory", client.call_limit(), async move {
        match hand_over(path, memory, ticket).await {
            Ok(answer) if answer == [0] => Ok(ticket),
            Ok(answer) if answer.is_empty() => Err(Error::NotPassed("the server closed the connection".into())),
            Ok(answer) => Err(Error::NotPassed(String::from_utf8_lossy(&answer).into_owned())),
            Err(e) => Err(Error::NotPassed(e.to_string())),
        }
    })
}

/// Random bytes, by which the server knows what they are for.
pub(crate) fn random<const LEN: usize>(what: &str) -> Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(len) if len == LEN => Ok(bytes),
        Ok(_) => Err(Error::NotPassed(format!("the system gave too few random bytes for {what}"))),
        Err(e) => Err(Error::NotPassed(format!("the system gave no random bytes for {what}: {e}"))),
    }
}

/// Sends ticket and descriptor, and gives the server's answer.
async fn hand_over(path: PathBuf, memory: MemoryFile, ticket: [u8; TICKET_LEN]) -> io::Result<Vec<u8>> {
    let stream = UnixStream::connect(path).await?;
    let mut head = PASS_MEMORY.to_vec();
    head.extend(ticket);
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = [memory.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        Ok(sendmsg(&stream, &[IoSlice::new(&head)], &mut ancillary, SendFlags::NOSIGNAL)?)
    };
    // So few bytes go at once into a socket that nothing was sent to.
    if stream.async_io(Interest::WRITABLE, send).await? != head.len() {
        return Err(io::Error::other("the ticket was sent in part"));
    }
    let mut answer = Vec::new();
    let mut buffer = [0; MAX_ANSWER];
    while answer.len() < MAX_ANSWER {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => answer.extend(&buffer[..len]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(answer)
}
