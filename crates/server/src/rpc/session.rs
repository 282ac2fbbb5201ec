//! A client's session: what it opens, attaches and has moved, until its stream ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sllm_core::{Control, LoadReport, Progress};
use sllm_proto::nanoseconds;
use sllm_proto::store::load_event::Kind as Event;
use sllm_proto::store::load_request::Kind as Asked;
use sllm_proto::store::{Batch, Done, LoadRequest, Open, Opened};
use tokio::sync::watch;
use tonic::{Code, Status, Streaming};

use super::attached::{Attached, attach_memory, hold};
use super::segments;
use super::talk::{Course, Events, Talk, cancelled, weight_of};
use crate::fault::{invalid, refused};
use crate::jobs::{Job, Stop, Why};
use crate::metrics::Kind;
use crate::models::InUse;
use crate::room::Taken;
use crate::store::Store;

/// Talks with a client until one of the two has had enough.
pub(crate) async fn serve(store: Arc<Store>, requests: Streaming<LoadRequest>, events: Events) {
    let mut talk = Talk::new(requests, events);
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
    let (model, files) = match talk.next(store).await? {
        None => return Ok(()),
        Some((Asked::Open(open), _)) => open_model(store, open).await?,
        Some(_) => return Err(invalid("the first message of a stream opens a model")),
    };
    let opened = Opened { total: model.len, resident: store.pool.resident_len(&model.checkpoint) };
    if !talk.tell(Event::Opened(opened)).await {
        return Ok(());
    }
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
        let Some((asked, room)) = talk.next(store).await? else { return Ok(()) };
        match asked {
            Asked::Open(_) => return Err(invalid("the stream has opened a model already")),
            Asked::Attach(attach) => *attached = attach_memory(store, std::mem::take(attached), attach).await?,
            Asked::Cancel(_) => return Err(cancelled()),
            Asked::Batch(batch) => {
                let moving = move_batch(store, talk, attached, &model, &files, (batch, room));
                let Some(report) = moving.await? else { return Ok(()) };
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

/// Moves a batch, whose memory may have been taken already; `None` where its client is gone.
async fn move_batch(
    store: &Arc<Store>,
    talk: &mut Talk,
    attached: &mut Attached,
    model: &Arc<InUse>,
    files: &[usize],
    (batch, room): (Batch, Option<Taken>),
) -> Result<Option<LoadReport>, Status> {
    let deadline = (batch.timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(batch.timeout_ms.into()));
    let progress = Arc::new(watch::Sender::new(Progress { done: 0, total: 0 }));
    let stop = Stop::new();
    let mut course = Course { stop: stop.clone(), deadline, progress: progress.subscribe() };
    let room = match room {
        Some(room) => Some(room),
        None => room_for(store, talk, &mut course, &batch).await?,
    };
    let Some(room) = room else { return Ok(None) };
    let run = async {
        let _room = room;
        let (segments, numbers) = segments::of_batch(&batch.segments, files, attached.blocks())?;
        let (back, held) = hold(store, std::mem::take(attached), numbers).await?;
        *attached = back;
        let devices = segments::devices(held.blocks());
        let kind = if devices.iter().all(sllm_core::Device::is_host) { Kind::Host } else { Kind::Cuda };
        let job = Job { progress, ..Job::new(&model.name, segments::names(&devices), kind, stop.clone()) };
        // Whatever becomes of the session, its memory stays until nothing is copied any more.
        let mappings = attached.mappings();
        let (shared, model) = (Arc::clone(store), Arc::clone(model));
        let work = move |control: Control| {
            let control = deadline.into_iter().fold(control, |control, deadline| control.until(deadline));
            let loader = shared.loader(&model, control)?.devices(devices).build()?;
            let report = held.load(|blocks| loader.fill_segments(&model.checkpoint, &segments, blocks))?;
            drop(mappings);
            shared.count(&report);
            Ok(report)
        };
        store.jobs.run(job, work).await
    };
    talk.attend(&mut course, Some(&store.room), run).await
}

/// Waits until there is room for a batch; `None` where its client is gone.
async fn room_for(store: &Store, talk: &mut Talk, course: &mut Course, batch: &Batch) -> Result<Option<Taken>, Status> {
    let stop = course.stop.clone();
    let wait = async {
        tokio::select! {
            room = store.room.take(weight_of(batch)) => room.ok_or_else(|| Why::ShuttingDown.status()),
            why = stop.stopped() => Err(why.status()),
        }
    };
    talk.attend(course, None, wait).await
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
