//! A client's session: what it opens, attaches and has moved, until its stream ends.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sllm_core::{Block, LoadReport};
use sllm_proto::store::load_event::Kind as Event;
use sllm_proto::store::load_request::Kind as Asked;
use sllm_proto::store::{
    Attach, Batch, CudaMemory, Done, File, LoadEvent, LoadRequest, Open, Opened, Progress, Segment, attach,
};
use sllm_proto::{PROCESS_LEN, nanoseconds};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

use super::segments;
use crate::devices::{OpenDevice, Uuid};
use crate::fault::{invalid, refused};
use crate::imports::{Allocation, Handle, Hold};
use crate::jobs::{Job, Stop, Why};
use crate::memory::{Mapping, Ticket};
use crate::metrics::Kind;
use crate::models::InUse;
use crate::store::Store;

/// Bytes of memory for messages that are read while a batch is moved: one behind them may be a cancel. The last one may
/// pass it.
const MAX_AHEAD: usize = 64 << 20;

/// Blocks of a session at most.
const MAX_BLOCKS: usize = 1 << 20;

/// Events on their way to a client.
pub(crate) type Events = mpsc::Sender<Result<LoadEvent, Status>>;

/// Talks with a client until one of the two has had enough.
pub(crate) async fn serve(store: Arc<Store>, requests: Streaming<LoadRequest>, events: Events) {
    let mut talk = Talk { requests, events, ahead: VecDeque::new(), ahead_len: 0 };
    let mut attached = Attached::default();
    let result = run(&store, &mut talk, &mut attached).await;
    // Closing a handle asks the driver, and unmapping the kernel. The client may free its memory once it is told.
    let _ = tokio::task::spawn_blocking(move || drop(attached)).await;
    if let Err(status) = result {
        // A client that is gone is not told.
        let _ = talk.events.send(Err(status)).await;
    }
}

async fn run(store: &Arc<Store>, talk: &mut Talk, attached: &mut Attached) -> Result<(), Status> {
    let model = match talk.next(store).await? {
        None => return Ok(()),
        Some(Asked::Open(open)) => open_model(store, open).await?,
        Some(_) => return Err(invalid("the first message of a stream opens a model")),
    };
    let Some((model, files)) = talk.opened(store, model).await else { return Ok(()) };
    let model = Arc::new(model);
    let mut moved = Moved {
        started: Instant::now(),
        model: Arc::clone(&model),
        batches: 0,
        bytes: 0,
        from_pool: 0,
        moving: 0.0,
        opening: Duration::ZERO,
    };
    loop {
        match talk.next(store).await? {
            None => return Ok(()),
            Some(Asked::Open(_)) => return Err(invalid("the stream has opened a model already")),
            Some(Asked::Attach(attach)) => *attached = attach_memory(store, std::mem::take(attached), attach).await?,
            Some(Asked::Cancel(_)) => return Err(cancelled()),
            Some(Asked::Batch(batch)) => {
                let Some(report) = move_batch(store, talk, attached, &model, &files, batch).await? else {
                    return Ok(());
                };
                moved.add(&report);
                moved.opening = attached.opening;
                if !talk.tell(Event::Done(done(&report))).await {
                    return Ok(());
                }
            }
        }
    }
}

/// What a session has moved, logged at its end.
struct Moved {
    started: Instant,
    model: Arc<InUse>,
    batches: u64,
    bytes: u64,
    from_pool: u64,
    /// Seconds in which batches were moved.
    moving: f64,
    /// Time that the driver took to open memory of GPUs.
    opening: Duration,
}

impl Moved {
    fn add(&mut self, report: &LoadReport) {
        self.moving += report.seconds;
        self.batches += 1;
        self.bytes += report.bytes;
        self.from_pool += report.cached_bytes;
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        let Moved { batches, bytes, from_pool, moving, .. } = *self;
        let opening = self.opening.as_secs_f64();
        let (model, seconds) = (&self.model.name, self.started.elapsed().as_secs_f64());
        tracing::info!(%model, batches, bytes, from_pool, opening, moving, seconds, "a session ended");
    }
}

/// The two directions of a stream.
struct Talk {
    requests: Streaming<LoadRequest>,
    events: Events,
    /// What came while a batch was moved, and its bytes; `None` is the end.
    ahead: VecDeque<Option<LoadRequest>>,
    ahead_len: usize,
}

/// Bytes of memory that a message takes, many times those that were sent.
fn weight(message: Option<&LoadRequest>) -> usize {
    let parts = match message.and_then(|message| message.kind.as_ref()) {
        None | Some(Asked::Cancel(_)) => 0,
        Some(Asked::Batch(batch)) => batch.segments.capacity() * size_of::<Segment>(),
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

fn cancelled() -> Status {
    Status::cancelled("the client cancelled the load")
}

impl Talk {
    /// The next message; `None` when the client has no more or is gone.
    async fn next(&mut self, store: &Store) -> Result<Option<Asked>, Status> {
        let message = match self.ahead.pop_front() {
            Some(message) => {
                self.ahead_len -= weight(message.as_ref());
                message
            }
            None => tokio::select! {
                message = self.requests.message() => message?,
                () = self.events.closed() => None,
                () = store.jobs.closed() => return Err(Why::ShuttingDown.status()),
            },
        };
        match message {
            None => Ok(None),
            Some(LoadRequest { kind: Some(kind) }) => Ok(Some(kind)),
            Some(LoadRequest { kind: None }) => Err(invalid("a message says nothing, or what a later version knows")),
        }
    }

    /// Whether a message that comes while a batch is moved has room.
    fn listens(&self) -> bool {
        self.ahead_len < MAX_AHEAD && !matches!(self.ahead.back(), Some(None))
    }

    /// Keeps a message for later.
    fn put_off(&mut self, message: Option<LoadRequest>) {
        self.ahead_len += weight(message.as_ref());
        self.ahead.push_back(message);
    }

    /// Tells the client; `false` where it is gone.
    async fn tell(&self, event: Event) -> bool {
        self.events.send(Ok(LoadEvent { kind: Some(event) })).await.is_ok()
    }

    /// Tells the client how far a batch is, unless it is slow in hearing.
    fn tell_progress(&self, now: sllm_core::Progress) {
        let progress = Progress { done: now.done, total: now.total };
        let _ = self.events.try_send(Ok(LoadEvent { kind: Some(Event::Progress(progress)) }));
    }

    async fn opened(&self, store: &Store, (model, files): (InUse, Vec<usize>)) -> Option<(InUse, Vec<usize>)> {
        let opened = Opened { total: model.len, resident: store.pool.resident_len(&model.checkpoint) };
        self.tell(Event::Opened(opened)).await.then_some((model, files))
    }
}

/// Opens a model whose files are those that the client sees. Gives the places of the client's files among ours.
async fn open_model(store: &Arc<Store>, open: Open) -> Result<(InUse, Vec<usize>), Status> {
    let model = store.open(&open.model).await?;
    let differs = |reason: String| refused(Code::FailedPrecondition, format!("{}: {reason}", model.name));
    let ours = model.checkpoint.files();
    let by_name: HashMap<&str, usize> = ours.iter().enumerate().map(|(at, file)| (file.name(), at)).collect();
    let mut places = Vec::with_capacity(open.files.len());
    for (place, theirs) in open.files.iter().enumerate() {
        let name = &theirs.name;
        let Some(&at) = by_name.get(name.as_str()) else {
            return Err(differs(format!("the server has no data file {name:?}")));
        };
        let mine = (ours[at].len(), ours[at].modified());
        let seen = (theirs.len, (theirs.modified_s, i64::from(theirs.modified_ns)));
        if mine != seen {
            return Err(differs(format!(
                "the server's {name} has {} bytes, last changed at {:?}; the client's has {}, at {:?}",
                mine.0, mine.1, seen.0, seen.1
            )));
        }
        // A copy, or another model with lengths and times that were set, as by an image's build.
        let (device, inode) = ours[at].inode();
        if theirs.device == device && theirs.inode != inode {
            return Err(differs(format!(
                "the server's {name} is another file than the client's ({inode} and {} of one device): by one path they \
                 see two directories",
                theirs.inode
            )));
        }
        // Bytes that were written over, and the time of change set back.
        let changed = nanoseconds(ours[at].status_changed());
        if let Some(seen) = open.status_changed_ns.get(place).filter(|&&seen| seen != changed) {
            return Err(differs(format!(
                "the server's {name} is not as the client opened it: its status was changed {changed} ns after 1970, that \
                 of the client's {seen}. It was written to, or got other rights or names: open it again"
            )));
        }
        places.push(at);
    }
    Ok((InUse::new(&model), places))
}

/// Memory of a client, as long as it is its.
#[derive(Default)]
struct Attached {
    parts: Vec<Part>,
    mappings: HashMap<Ticket, Arc<Mapping>>,
    kept: HashMap<Memory, Hold>,
    devices: HashMap<Uuid, OpenDevice>,
    /// Time that the driver took to open memory of GPUs.
    opening: Duration,
}

/// Memory of a GPU as a client names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Memory {
    handle: Handle,
    /// `None`: the handle may be another allocation's in the next batch.
    allocation: Option<Allocation>,
}

/// What a client calls a block.
enum Part {
    Host(Block),
    /// A range of memory that each batch opens, or finds open.
    Cuda(Memory, u64, u64),
}

/// The blocks of a batch, which go before what holds their memory open.
struct Held {
    blocks: Vec<Block>,
    holds: HashMap<Memory, Hold>,
}

async fn attach_memory(store: &Arc<Store>, mut attached: Attached, attach: Attach) -> Result<Attached, Status> {
    if attached.parts.len() >= MAX_BLOCKS {
        return Err(invalid(format!("a session has {MAX_BLOCKS} blocks at most")));
    }
    let store = Arc::clone(store);
    let work = move || {
        let part = match &attach.memory {
            Some(attach::Memory::Ticket(ticket)) => {
                attached.host_block(&store, ticket, attach.offset, attach.len).map(Part::Host)
            }
            Some(attach::Memory::Cuda(cuda)) => attached.cuda_part(&store, cuda, attach.offset, attach.len),
            None => Err(invalid("the memory to attach is missing")),
        };
        part.map(|part| {
            attached.parts.push(part);
            attached
        })
    };
    crate::store::blocking(work).await?
}

/// The blocks of these numbers, with their memory open.
async fn hold(store: &Arc<Store>, mut attached: Attached, numbers: Vec<usize>) -> Result<(Attached, Held), Status> {
    // Most is open still, and takes no call of the driver.
    if let Ok(held) = attached.hold(&numbers, |attached, memory| attached.kept(memory)) {
        return Ok((attached, held));
    }
    let store = Arc::clone(store);
    let open = move || {
        let held = attached.hold(&numbers, |attached, memory| {
            let hold = attached.open(&store, memory)?;
            if memory.allocation.is_some() {
                attached.kept.insert(memory, hold.keep());
            }
            Ok(hold)
        })?;
        attached.kept.retain(|memory, _| memory.allocation.is_some());
        Ok((attached, held))
    };
    crate::store::blocking(open).await?
}

impl Attached {
    fn host_block(&mut self, store: &Store, ticket: &[u8], offset: u64, len: u64) -> Result<Block, Status> {
        let wrong = || invalid("no memory waits under this ticket: pass it first, over the same Unix socket");
        let ticket = Ticket::try_from(ticket).map_err(|_| wrong())?;
        let mapping = match self.mappings.get(&ticket) {
            Some(mapping) => mapping,
            None => {
                let mapping = store.tickets.take(&ticket).ok_or_else(wrong)?;
                self.mappings.entry(ticket).or_insert(mapping)
            }
        };
        let whole = mapping.len();
        let outside =
            || invalid(format!("{len} bytes from {offset} are not inside the {whole} bytes that were passed"));
        mapping.block(offset, len).ok_or_else(outside)
    }

    /// Opens the memory, so that a handle that leads nowhere is told at once, and keeps it open for the batches.
    fn cuda_part(&mut self, store: &Store, cuda: &CudaMemory, offset: u64, len: u64) -> Result<Part, Status> {
        let device = Uuid::try_from(&cuda.device[..]).map_err(|_| invalid("a device's UUID has 16 bytes"))?;
        let bytes = <[u8; 64]>::try_from(&cuda.handle[..]).map_err(|_| invalid("a CUDA IPC handle has 64 bytes"))?;
        let allocation = match cuda.buffer_id {
            Some(buffer_id) => {
                let wrong = |_| invalid(format!("a process is told by {PROCESS_LEN} bytes where a buffer is"));
                Some(Allocation { process: cuda.process[..].try_into().map_err(wrong)?, buffer_id })
            }
            None => None,
        };
        let memory = Memory { handle: Handle { device, bytes }, allocation };
        if allocation.is_none() {
            // What was attached by this handle before may be gone.
            self.kept.remove(&memory);
        }
        let hold = self.open(store, memory)?;
        hold.block(offset, len)?;
        self.kept.insert(memory, hold.keep());
        Ok(Part::Cuda(memory, offset, len))
    }

    fn open(&mut self, store: &Store, memory: Memory) -> Result<Hold, Status> {
        let uuid = memory.handle.device;
        let device = match self.devices.entry(uuid) {
            Entry::Occupied(device) => device.into_mut(),
            Entry::Vacant(place) => place.insert(store.devices.open(&uuid)?),
        };
        let opening = Instant::now();
        let hold = store.imports.open(device, &memory.handle, memory.allocation, self.kept.get(&memory))?;
        self.opening += opening.elapsed();
        Ok(hold)
    }

    /// Memory that is kept open. What is not told by its allocation is opened for each batch.
    fn kept(&self, memory: Memory) -> Result<Hold, Status> {
        let kept = self.kept.get(&memory).filter(|_| memory.allocation.is_some());
        kept.and_then(Hold::again).ok_or_else(|| invalid("the memory is not open"))
    }

    /// Blocks by their numbers, whose memory `open` holds.
    fn hold(
        &mut self,
        numbers: &[usize],
        open: impl Fn(&mut Attached, Memory) -> Result<Hold, Status>,
    ) -> Result<Held, Status> {
        let mut held = Held { blocks: Vec::with_capacity(numbers.len()), holds: HashMap::new() };
        for &number in numbers {
            let (memory, offset, len) = match self.parts.get(number) {
                Some(Part::Cuda(memory, offset, len)) => (*memory, *offset, *len),
                Some(Part::Host(block)) => {
                    held.blocks.push(block.clone());
                    continue;
                }
                None => return Err(invalid(format!("there is no block {number}"))),
            };
            let hold = match held.holds.entry(memory) {
                Entry::Occupied(hold) => hold.into_mut(),
                Entry::Vacant(place) => place.insert(open(self, memory)?),
            };
            held.blocks.push(hold.block(offset, len)?);
        }
        Ok(held)
    }
}

/// Moves a batch; `None` where its client is gone.
async fn move_batch(
    store: &Arc<Store>,
    talk: &mut Talk,
    attached: &mut Attached,
    model: &Arc<InUse>,
    files: &[usize],
    batch: Batch,
) -> Result<Option<LoadReport>, Status> {
    let deadline = (batch.timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(batch.timeout_ms.into()));
    let (segments, numbers) = segments::of_batch(&batch.segments, files, attached.parts.len())?;
    let (back, held) = hold(store, std::mem::take(attached), numbers).await?;
    *attached = back;
    let devices = segments::devices(&held.blocks);
    let kind = if devices.iter().all(sllm_core::Device::is_host) { Kind::Host } else { Kind::Cuda };
    let stop = Stop::new();
    let job = Job::new(&model.name, segments::names(&devices), kind, stop.clone());
    let mut progress = job.progress.subscribe();

    // Whatever becomes of the session, its memory stays until nothing is copied any more.
    let mappings: Vec<Arc<Mapping>> = attached.mappings.values().cloned().collect();
    let (shared, model) = (Arc::clone(store), Arc::clone(model));
    let run = store.jobs.run(job, move |control| {
        let control = deadline.into_iter().fold(control, |control, deadline| control.until(deadline));
        // Dropped in the other order.
        let Held { holds, blocks } = held;
        let loader = shared.loader(&model, control)?.devices(devices).build()?;
        let report = loader.fill_segments(&model.checkpoint, &segments, blocks)?;
        drop((holds, mappings));
        shared.count(&report);
        Ok(report)
    });
    tokio::pin!(run);
    // A load that runs looks itself, before each copy; one that waits for a place is told here.
    let late = async {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
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
            () = talk.events.closed() => {
                stop.stop(Why::ClientGone);
                return run.await.map(|_| None);
            }
            message = talk.requests.message(), if talk.listens() => match message {
                Ok(Some(LoadRequest { kind: Some(Asked::Cancel(_)) })) => {
                    stop.stop(Why::ClientGone);
                    let _ = run.await;
                    return Err(cancelled());
                }
                Ok(message) => talk.put_off(message),
                Err(broken) => {
                    stop.stop(Why::ClientGone);
                    let _ = run.await;
                    return Err(broken);
                }
            },
            Ok(()) = progress.changed() => {
                let now = *progress.borrow_and_update();
                talk.tell_progress(now);
            }
        }
    }
}

fn done(report: &LoadReport) -> Done {
    Done {
        bytes: report.bytes,
        from_pool: report.cached_bytes,
        from_files: report.read_bytes.saturating_sub(report.cached_bytes),
        // A report of plain numbers and strings always has a JSON form.
        report: serde_json::to_string(report).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

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
}
