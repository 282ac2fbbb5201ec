//! The two directions of a client's stream.

use std::collections::VecDeque;
use std::future::Future;
use std::time::Instant;

use sllm_proto::store::load_event::Kind as Event;
use sllm_proto::store::load_request::Kind as Asked;
use sllm_proto::store::{Batch, File, LoadEvent, LoadRequest, Progress, Segment, attach};
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use crate::fault::invalid;
use crate::jobs::{Stop, Why};
use crate::room::{Room, Taken};
use crate::store::Store;

/// Bytes of memory for messages of a stream that are read while a batch is moved: one behind them may be a cancel. The
/// last one may pass it.
const MAX_AHEAD: usize = 64 << 20;

/// Events on their way to a client.
pub(crate) type Events = mpsc::Sender<Result<LoadEvent, Status>>;

/// What a client and its server tell each other.
pub(super) struct Talk {
    requests: Streaming<LoadRequest>,
    pub(super) events: Events,
    ahead: Ahead,
}

/// How a batch is stopped and watched.
pub(super) struct Course {
    pub(super) stop: Stop,
    pub(super) deadline: Option<Instant>,
    pub(super) progress: watch::Receiver<sllm_core::Progress>,
}

/// Messages that came while a batch was moved.
#[derive(Default)]
struct Ahead {
    messages: VecDeque<Early>,
    /// Bytes of memory that they take.
    len: usize,
}

/// A message that came early.
struct Early {
    /// `None` is the end.
    message: Option<LoadRequest>,
    /// Its memory; `None` where the server had no room.
    room: Option<Taken>,
}

impl Ahead {
    /// Whether one more may come. Behind one that the server has no room for, none does: so a stream has one at most.
    fn listens(&self) -> bool {
        let goes_on = |last: &Early| last.message.is_some() && last.room.is_some();
        self.len < MAX_AHEAD && self.messages.back().is_none_or(goes_on)
    }

    /// Keeps a message for later, for which room is taken if there is any.
    fn push(&mut self, message: Option<LoadRequest>, room: Option<&Room>) {
        self.len += weight(message.as_ref());
        self.messages.push_back(Early { message, room: None });
        self.take_room(room);
    }

    /// Takes room for the last message, if that has none.
    fn take_room(&mut self, room: Option<&Room>) {
        if let (Some(room), Some(last)) = (room, self.messages.back_mut().filter(|last| last.room.is_none())) {
            last.room = room.try_take(weight(last.message.as_ref()));
        }
    }

    fn pop(&mut self) -> Option<Early> {
        let early = self.messages.pop_front()?;
        self.len -= weight(early.message.as_ref());
        Some(early)
    }
}

/// Bytes of memory that a batch takes.
pub(super) fn weight_of(batch: &Batch) -> usize {
    batch.segments.capacity() * size_of::<Segment>()
}

/// Bytes of memory that a message takes, many times those that were sent.
fn weight(message: Option<&LoadRequest>) -> usize {
    let parts = match message.and_then(|message| message.kind.as_ref()) {
        None | Some(Asked::Cancel(_)) => 0,
        Some(Asked::Batch(batch)) => weight_of(batch),
        Some(Asked::Open(open)) => {
            let names = open.files.iter().map(|file| file.name.capacity());
            let times = open.status_changed_ns.capacity() * size_of::<i64>();
            open.model.capacity() + open.files.capacity() * size_of::<File>() + names.sum::<usize>() + times
        }
        Some(Asked::Attach(attach)) => match &attach.memory {
            None => 0,
            Some(attach::Memory::Ticket(ticket)) => ticket.capacity(),
            Some(attach::Memory::Cuda(cuda)) => {
                cuda.device.capacity() + cuda.handle.capacity() + cuda.process.capacity()
            }
        },
    };
    size_of::<LoadRequest>() + parts
}

pub(super) fn cancelled() -> Status {
    Status::cancelled("the client cancelled the load")
}

impl Talk {
    pub(super) fn new(requests: Streaming<LoadRequest>, events: Events) -> Talk {
        Talk { requests, events, ahead: Ahead::default() }
    }

    /// The next message, and its memory if that was taken; `None` when the client has no more or is gone.
    pub(super) async fn next(&mut self, store: &Store) -> Result<Option<(Asked, Option<Taken>)>, Status> {
        let Early { message, room } = match self.ahead.pop() {
            Some(early) => early,
            None => tokio::select! {
                message = self.requests.message() => Early { message: message?, room: None },
                () = self.events.closed() => return Ok(None),
                () = store.jobs.closed() => return Err(Why::ShuttingDown.status()),
            },
        };
        match message {
            None => Ok(None),
            Some(LoadRequest { kind: Some(kind) }) => Ok(Some((kind, room))),
            Some(LoadRequest { kind: None }) => Err(invalid("a message says nothing, or what a later version knows")),
        }
    }

    /// Tells the client; `false` where it is gone.
    pub(super) async fn tell(&self, event: Event) -> bool {
        self.events.send(Ok(LoadEvent { kind: Some(event) })).await.is_ok()
    }

    /// Tells the client how far a batch is, unless it is slow in hearing.
    fn tell_progress(&self, now: sllm_core::Progress) {
        let progress = Progress { done: now.done, total: now.total };
        let _ = self.events.try_send(Ok(LoadEvent { kind: Some(Event::Progress(progress)) }));
    }

    /// Goes on with a batch by `run` to its end, and hears the client meanwhile; `None` where that is gone. What comes
    /// early has `room`: none while the batch itself waits for room, since who waits for some has none.
    pub(super) async fn attend<T>(
        &mut self,
        course: &mut Course,
        room: Option<&Room>,
        run: impl Future<Output = Result<T, Status>>,
    ) -> Result<Option<T>, Status> {
        tokio::pin!(run);
        let Course { stop, deadline, progress } = course;
        self.ahead.take_room(room);
        // A load that runs looks itself, before each copy; one that waits for a place is told here.
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until((*deadline).into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(late);
        let mut is_late = false;
        loop {
            tokio::select! {
                biased;
                result = &mut run => return result.map(Some),
                () = &mut late, if !is_late => {
                    is_late = true;
                    stop.stop(Why::Late);
                }
                () = self.events.closed() => {
                    stop.stop(Why::ClientGone);
                    return run.await.map(|_| None);
                }
                message = self.requests.message(), if self.ahead.listens() => match message {
                    Ok(Some(LoadRequest { kind: Some(Asked::Cancel(_)) })) => {
                        stop.stop(Why::ClientGone);
                        let _ = run.await;
                        return Err(cancelled());
                    }
                    Ok(message) => self.ahead.push(message, room),
                    Err(broken) => {
                        stop.stop(Why::ClientGone);
                        let _ = run.await;
                        return Err(broken);
                    }
                },
                Ok(()) = progress.changed() => {
                    let now = *progress.borrow_and_update();
                    self.tell_progress(now);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use sllm_proto::store::{Attach, Open};

    use super::*;

    #[test]
    fn a_message_weighs_what_it_takes_in_memory() {
        // A thousand parts of two bytes each, which say nothing.
        let (segments, files) = (vec![Segment::default(); 1000], vec![File::default(); 1000]);
        let batch = Asked::Batch(Batch { segments, timeout_ms: 0 });
        let open = Asked::Open(Open { model: "m".repeat(100), files, status_changed_ns: Vec::new() });
        let attach = Asked::Attach(Attach { memory: Some(attach::Memory::Ticket(vec![1; 5000])), ..Attach::default() });
        for (kind, least) in
            [(batch, 1000 * size_of::<Segment>()), (open, 1000 * size_of::<File>() + 100), (attach, 5000)]
        {
            let sent = LoadRequest { kind: Some(kind) }.encode_to_vec();
            let message = LoadRequest::decode(&sent[..]).unwrap();
            let weight = weight(Some(&message));
            // A list grows by doubling.
            assert!((least..3 * least).contains(&weight), "{weight} for {least}, {} sent", sent.len());
        }
    }

    fn batch() -> LoadRequest {
        LoadRequest { kind: Some(Asked::Batch(Batch { segments: vec![Segment::default(); 1000], timeout_ms: 0 })) }
    }

    #[test]
    fn a_stream_reads_ahead_while_the_server_has_room_and_one_message_more() {
        let len = weight(Some(&batch()));
        let room = Room::new(2 * len);
        let (mut first, mut second) = (Ahead::default(), Ahead::default());
        let room = Some(&room);
        first.push(Some(batch()), room);
        first.push(Some(batch()), room);
        second.push(Some(batch()), room);
        assert_eq!([first.listens(), second.listens()], [true, false]);
        first.push(Some(batch()), room);
        assert!(!first.listens());

        // What goes makes room for what comes then.
        drop(first.pop());
        assert!(second.pop().is_some_and(|early| early.room.is_none()) && second.listens());
        second.push(Some(batch()), room);
        assert!(second.listens());
        assert_eq!((first.len, second.len), (2 * len, len));
    }

    #[test]
    fn what_comes_while_a_batch_waits_for_room_takes_none_before_the_batch_has_it() {
        let room = Room::new(1 << 20);
        let mut ahead = Ahead::default();
        ahead.push(Some(batch()), None);
        assert!(!ahead.listens() && room.try_take(1 << 20).is_some());
        ahead.take_room(Some(&room));
        assert!(ahead.listens() && room.try_take(1 << 20).is_none());
    }

    #[test]
    fn nothing_is_read_behind_the_end() {
        let mut ahead = Ahead::default();
        ahead.push(None, Some(&Room::new(1 << 20)));
        assert!(!ahead.listens());
    }
}
