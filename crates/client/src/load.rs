//! One stream of the server's `Load`: a checkpoint's session.
//!
//! # Memory that the server writes to
//! The blocks of a load may be somebody else's, who takes them back when the load has failed. So a failure is not told
//! before the server has stopped writing to them. What stops it:
//!
//! - Its own failure: it waits for its copies and then ends the stream with the reason. When that is here, all is over.
//! - A `Cancel`, which [`Load::settle`] sends after a failure of ours or a cancel of the caller's; the server waits for
//!   its copies and ends the stream, for which is waited.
//! - A batch's deadline, which the server checks before each copy. It counts from when it begins with the batch, which may be
//!   later than here: so a deadline that has passed here says nothing, and the stream's end is waited for all the same.
//! - The end of the server's process, by which the system takes its mappings away. What the device still has of its
//!   copies is over in milliseconds; after a lost connection [`AFTER_LOSS`] is waited for that.
//!
//! A server that is stopped (SIGSTOP) or starved does none of this. For it is waited [`SETTLE`], and then it is given up,
//! so that nobody waits for minutes: when it wakes, it finds the stream reset, and the only bytes that it may yet write
//! are those of the copies that it had issued. A loader that goes on from files writes the same bytes to the same places.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sllm_core::{Block, Control, SharedBlock};
use sllm_proto::store as pb;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response};

use crate::client::StoreClient;
use crate::error::{Error, Result};
use crate::events::Events;

const WHAT: &str = "load the model";
/// How much longer than a batch's deadline its end is waited for: the way there and back, and a copy in flight.
pub(crate) const LATE: Duration = Duration::from_secs(2);
/// How long is waited for a server to stop that was asked to.
const SETTLE: Duration = Duration::from_secs(10);
/// How long a dead server's copies may still be on their way.
const AFTER_LOSS: Duration = Duration::from_millis(100);

/// Memory that the server has, which stays ours until it let go of it.
type Kept = Arc<Mutex<Vec<Block>>>;

/// A stream, opened for one checkpoint.
#[derive(Debug)]
pub(crate) struct Load {
    /// `None` once our side is closed.
    requests: Option<UnboundedSender<pb::LoadRequest>>,
    events: Events<pb::LoadEvent>,
    kept: Kept,
    /// Blocks attached.
    blocks: u32,
    /// Blocks of allocations of GPUs, by handle and number: memory that was freed and made again may have the handle of the
    /// first.
    allocations: HashMap<([u8; 64], u64), u32>,
    /// How long each batch may take that was sent and is not done, and its bytes.
    under_way: VecDeque<(Duration, u64)>,
    /// Until when the first of them must be done.
    deadline: Instant,
    /// When our side was closed.
    stopped: Option<Instant>,
    lost: bool,
}

/// A batch's time as the server is told it, to whom 0 says that there is no end.
fn timeout_ms(limit: Duration) -> u32 {
    u32::try_from(limit.as_millis()).unwrap_or(u32::MAX).max(1)
}

/// How far a batch has come.
pub(crate) enum Step {
    /// Bytes done of it.
    Progress(u64),
    /// It has arrived.
    Done(pb::Done),
}

impl Load {
    /// Opens a stream for a model whose files, as they are here, are told to the server.
    pub(crate) fn open(client: &StoreClient, open: pb::Open, control: &Control) -> Result<Load> {
        let limit = client.call_limit();
        let until = Instant::now() + limit;
        let (requests, receiver) = unbounded_channel();
        let first = pb::LoadRequest { kind: Some(pb::load_request::Kind::Open(open)) };
        // The receiver is here.
        let _ = requests.send(first);
        let mut request = Request::new(UnboundedReceiverStream::new(receiver));
        client.show_token(&mut request);
        let mut rpc = client.rpc();
        let start = async move {
            rpc.load(request).await.map(Response::into_inner).map_err(|status| Error::of(WHAT, limit, &status))
        };
        let stream = client.runtime().run(WHAT, limit, start)?;
        let kept = Kept::default();
        let events = Events::read(client.runtime(), stream, Arc::clone(&kept))?;
        let requests = Some(requests);
        let (blocks, allocations, under_way, lost) = (0, HashMap::new(), VecDeque::new(), false);
        let (deadline, stopped) = (until, None);
        let mut load = Load { requests, events, kept, blocks, allocations, under_way, deadline, stopped, lost };
        match load.next((limit, until), control)? {
            pb::load_event::Kind::Opened(_) => Ok(load),
            other => Err(Error::Protocol(format!("{other:?} before a model was opened"))),
        }
    }

    /// The number that the next attached block will have.
    pub(crate) fn next_block(&self) -> u32 {
        self.blocks
    }

    /// Gives the server a block; `memory` is kept until it has let go of it.
    pub(crate) fn attach(&mut self, attach: pb::Attach, memory: Option<Block>) -> Result<u32> {
        let number = self.blocks;
        self.blocks = number.checked_add(1).ok_or_else(|| Error::NotPassed("too many blocks".into()))?;
        if let Some(memory) = memory {
            self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
        self.send(pb::load_request::Kind::Attach(attach))?;
        Ok(number)
    }

    /// Gives the server the allocation of a shared block once, and tells its number again afterwards. One that the driver
    /// has no number for is given every time.
    pub(crate) fn attach_once(
        &mut self,
        shared: &SharedBlock,
        attach: impl FnOnce() -> Result<pb::Attach>,
    ) -> Result<u32> {
        let key = shared.buffer_id.map(|id| (shared.handle, id));
        if let Some(&number) = key.and_then(|key| self.allocations.get(&key)) {
            return Ok(number);
        }
        let number = self.attach(attach()?, None)?;
        self.allocations.extend(key.map(|key| (key, number)));
        Ok(number)
    }

    /// Sends a batch of `len` bytes, which may take so long once those before it are done.
    pub(crate) fn batch(&mut self, segments: Vec<pb::Segment>, len: u64, limit: Duration) -> Result<()> {
        let timeout_ms = timeout_ms(limit);
        self.send(pb::load_request::Kind::Batch(pb::Batch { segments, timeout_ms }))?;
        if self.under_way.is_empty() {
            self.deadline = Instant::now() + limit;
        }
        self.under_way.push_back((limit, len));
        Ok(())
    }

    /// Waits for news of the first batch that is under way.
    pub(crate) fn step(&mut self, control: &Control) -> Result<Step> {
        let Some(&(limit, len)) = self.under_way.front() else {
            return Err(Error::Protocol("no batch is under way".into()));
        };
        match self.next((limit, self.deadline + LATE), control)? {
            pb::load_event::Kind::Progress(progress) => Ok(Step::Progress(progress.done.min(len))),
            pb::load_event::Kind::Done(done) => {
                self.under_way.pop_front();
                if done.bytes != len {
                    return Err(Error::Protocol(format!("{} bytes of a batch of {len} arrived", done.bytes)));
                }
                if let Some(&(next, _)) = self.under_way.front() {
                    self.deadline = Instant::now() + next;
                }
                Ok(Step::Done(done))
            }
            other => Err(Error::Protocol(format!("{other:?} in a load"))),
        }
    }

    fn send(&mut self, kind: pb::load_request::Kind) -> Result<()> {
        let sent = self.requests.as_ref().is_some_and(|to| to.send(pb::LoadRequest { kind: Some(kind) }).is_ok());
        // Where the stream is gone, its events say why.
        if sent { Ok(()) } else { self.next((LATE, Instant::now() + LATE), &Control::new()).and(Err(self.over())) }
    }

    fn over(&self) -> Error {
        Error::Lost { what: WHAT, reason: "the stream is over".into() }
    }

    fn next(&mut self, limit: (Duration, Instant), control: &Control) -> Result<pb::load_event::Kind> {
        match self.events.next(WHAT, limit, control) {
            Ok(Some(pb::LoadEvent { kind: Some(kind) })) => Ok(kind),
            Ok(Some(pb::LoadEvent { kind: None })) => Err(Error::Protocol("an event of a kind not known".into())),
            Ok(None) => Err(Error::Lost { what: WHAT, reason: "the server ended the stream".into() }),
            Err(e) => {
                self.lost |= matches!(e, Error::Lost { .. });
                Err(e)
            }
        }
    }

    /// Whether every batch that was sent has arrived.
    pub(crate) fn is_done(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Whether the server still has it, with nothing under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.requests.as_ref().is_some_and(|to| !to.is_closed()) && !self.events.ended && self.is_done()
    }

    /// Closes our side, and asks the server to stop what is under way; does not wait.
    pub(crate) fn stop(&mut self) {
        let Some(requests) = self.requests.take() else { return };
        self.stopped = Some(Instant::now());
        if !self.under_way.is_empty() {
            let cancel = pb::load_request::Kind::Cancel(pb::Cancel {});
            // Where the stream is over, it needs none.
            let _ = requests.send(pb::LoadRequest { kind: Some(cancel) });
        }
    }

    /// Ends the stream, and waits until the server writes no more; see above.
    fn settle(&mut self) {
        self.stop();
        let Some(stopped) = self.stopped.filter(|_| !self.under_way.is_empty()) else { return };
        let until = stopped + SETTLE;
        while !self.events.ended && Instant::now() < until {
            // What the server still says is of no interest but for its end.
            let _ = self.next((SETTLE, until), &Control::new());
        }
        if self.lost {
            std::thread::sleep(AFTER_LOSS);
        }
        if !self.events.ended {
            self.events.abort();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_has_a_deadline() {
        let told = [0, 999, 1_000, 60_000_999, u64::MAX].map(|micros| timeout_ms(Duration::from_micros(micros)));
        assert_eq!(told, [1, 1, 1, 60_000, u32::MAX]);
    }
}
