//! A checkpoint's streams to the server, and the staging memory that it has by them.

use std::collections::VecDeque;
use std::time::Duration;

use sllm_core::{Block, Control, Device, DeviceError, Progress, Segment};
use sllm_proto::store as pb;

use crate::client::StoreClient;
use crate::cut::{Cutter, MESSAGE_SEGMENTS, Part, message};
use crate::error::{Error, Result};
use crate::load::{Load, Step};
use crate::remote::{Moved, RemoteOptions};
use crate::staging::{Made, Staging, attach_device};

/// Staging memories of a device, each with a stream of its own. The server moves the batches of several streams at once,
/// so that starting one, and copying it out of here, costs nothing while others move.
const LANES: usize = 4;
/// Bytes that a server moves in a millisecond at least, the slowest disk included.
const SLOWEST: u64 = 100_000;

/// What a checkpoint's load needs of a server, kept from batch to batch.
#[derive(Debug)]
pub(crate) struct Session {
    open: pb::Open,
    /// Streams; the first one moves what the server can write to itself.
    loads: Vec<Load>,
    staging: Vec<(Device, Vec<Staging>)>,
}

/// How a block is reached.
#[derive(Clone, Copy)]
enum Route {
    /// By the server itself: as a part of its block.
    Direct { block: u32, base: u64 },
    /// By staging memory of its device.
    Staged,
}

/// Whether a load's report, as JSON, says that checksums were compared.
fn is_verified(report: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct Report {
        verified: bool,
    }
    serde_json::from_str::<Report>(report).is_ok_and(|report| report.verified)
}

/// How long a batch of so many bytes may take.
fn limit(patience: Duration, len: u64) -> Duration {
    patience.saturating_add(Duration::from_millis(len / SLOWEST))
}

/// Bytes done, of all.
struct Meter<'a> {
    control: &'a Control,
    done: u64,
    total: u64,
}

impl Meter<'_> {
    fn tell(&self, more: u64) {
        self.control.tell(Progress { done: (self.done + more).min(self.total), total: self.total });
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // All at once, so that waiting for their ends is not longer than for one.
        self.loads.iter_mut().for_each(Load::stop);
    }
}

impl Session {
    pub(crate) fn open(client: &StoreClient, open: pb::Open, control: &Control) -> Result<Session> {
        let load = Load::open(client, open.clone(), control)?;
        Ok(Session { open, loads: vec![load], staging: Vec::new() })
    }

    /// Whether it is for this checkpoint.
    pub(crate) fn is_of(&self, open: &pb::Open) -> bool {
        self.open == *open
    }

    /// Whether the server still has it, with nothing under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.loads.iter().all(Load::is_idle)
    }

    /// Has segments moved into blocks; they were checked against files and blocks.
    pub(crate) fn fill(
        &mut self,
        client: &StoreClient,
        options: &RemoteOptions,
        segments: Vec<Segment>,
        blocks: &[Block],
        control: &Control,
    ) -> Result<Moved> {
        let patience = options.patience;
        let total = segments.iter().map(Segment::len).sum();
        let mut meter = Meter { control, done: 0, total };
        let mut moved = Moved::default();
        let (direct, staged) = self.split(segments, blocks, options.direct_len)?;

        // All at once: the server goes from one to the next without a round trip.
        let mut sent = VecDeque::new();
        let mut direct = direct.into_iter().peekable();
        while direct.peek().is_some() {
            let batch: Vec<pb::Segment> = direct.by_ref().take(MESSAGE_SEGMENTS).collect();
            let len = batch.iter().map(|segment| segment.rows * segment.row_len).sum();
            self.loads[0].batch(batch, limit(patience, len))?;
            sent.push_back(len);
        }
        for (device, segments) in staged {
            self.fill_staged(client, options, &device, segments, blocks, &mut meter, &mut moved, &mut sent)?;
        }
        while let Some(len) = sent.pop_front() {
            self.wait(0, len, &mut meter, &mut moved)?;
        }
        Ok(moved)
    }

    /// Segments that the server can move to their places, and by device the others.
    #[allow(clippy::type_complexity, reason = "two lists")]
    fn split(
        &mut self,
        segments: Vec<Segment>,
        blocks: &[Block],
        direct_len: u64,
    ) -> Result<(Vec<pb::Segment>, Vec<(Device, Vec<Segment>)>)> {
        let mut routes: Vec<Option<Route>> = blocks.iter().map(|_| None).collect();
        let mut direct = Vec::new();
        let mut staged: Vec<(Device, Vec<Segment>)> = Vec::new();
        for segment in segments {
            // The segment was checked: its block is there.
            let (Some(block), Some(route)) = (blocks.get(segment.block), routes.get_mut(segment.block)) else {
                continue;
            };
            let route = match route {
                Some(route) => *route,
                none => *none.insert(self.route(block, direct_len)?),
            };
            match route {
                Route::Direct { block, base } => direct.push(message(&segment, block, base)),
                Route::Staged => match staged.iter_mut().find(|(device, _)| device.id() == block.device().id()) {
                    Some((_, segments)) => segments.push(segment),
                    None => staged.push((block.device().clone(), vec![segment])),
                },
            }
        }
        Ok((direct, staged))
    }

    fn route(&mut self, block: &Block, direct_len: u64) -> Result<Route> {
        if block.device().is_host() {
            return Ok(Route::Staged);
        }
        match block.export() {
            Ok(shared) if shared.base_len <= direct_len => {
                // The whole allocation, which many blocks may lie in: each is opened once.
                let device = block.device();
                let attach = || attach_device(device, &shared.handle, 0, shared.base_len);
                let block = self.loads[0].attach_once(shared.handle.to_vec(), attach)?;
                Ok(Route::Direct { block, base: shared.offset })
            }
            Ok(_) | Err(sllm_core::Error::Device(DeviceError::NotShareable { .. })) => Ok(Route::Staged),
            Err(e) => Err(e.into()),
        }
    }

    /// The place of a device among those that have staging memory.
    fn place_of(&mut self, device: &Device) -> usize {
        let place = self.staging.iter().position(|(of, _)| of.id() == device.id());
        place.unwrap_or_else(|| {
            self.staging.push((device.clone(), Vec::new()));
            self.staging.len() - 1
        })
    }

    /// Sees to a device's staging memory number `lane`, and to its stream. `false` where the device has no room for
    /// another one.
    fn make_lane(
        &mut self,
        client: &StoreClient,
        place: usize,
        lane: usize,
        len: u64,
        control: &Control,
    ) -> Result<bool> {
        let (device, made) = &self.staging[place];
        if made.get(lane).is_some_and(|made| made.asked >= len) {
            return Ok(true);
        }
        if self.loads.len() <= lane {
            self.loads.push(Load::open(client, self.open.clone(), control)?);
        }
        let first = lane == 0;
        let made = Staging::make(client, device, self.loads[lane].next_block(), len, first);
        let Made { staging, attach, memory } = match made {
            Err(Error::Core(sllm_core::Error::Device(e))) if e.is_out_of_memory() && !first => return Ok(false),
            made => made?,
        };
        self.loads[lane].attach(attach, Some(memory))?;
        match self.staging[place].1.get_mut(lane) {
            Some(old) => *old = staging,
            None => self.staging[place].1.push(staging),
        }
        Ok(true)
    }

    /// Moves segments part by part: while the server fills some staging memories, another is copied out.
    #[allow(clippy::too_many_arguments, reason = "what one fill carries along")]
    fn fill_staged(
        &mut self,
        client: &StoreClient,
        options: &RemoteOptions,
        device: &Device,
        segments: Vec<Segment>,
        blocks: &[Block],
        meter: &mut Meter<'_>,
        moved: &mut Moved,
        direct: &mut VecDeque<u64>,
    ) -> Result<()> {
        let wanted: u64 = segments.iter().map(Segment::len).sum();
        let place = self.place_of(device);
        let (mut lanes, len) = Staging::lanes(wanted, options.staging_len, LANES);
        let mut cutter = Cutter::new(segments);
        let mut sent: VecDeque<(usize, Part)> = VecDeque::new();
        let (mut next, mut cut) = (0, 0);
        loop {
            while sent.len() < lanes && cut < wanted {
                // Made when its turn comes, while the server fills those before it.
                if !self.make_lane(client, place, next, len, meter.control)? {
                    (lanes, next) = (next, 0);
                    continue;
                }
                let staging = &self.staging[place].1[next];
                let Some(mut part) = cutter.part(staging.block, 0, staging.len) else { break };
                self.loads[next].batch(std::mem::take(&mut part.segments), limit(options.patience, part.len))?;
                cut += part.len;
                sent.push_back((next, part));
                next = (next + 1) % lanes;
            }
            let Some((lane, part)) = sent.pop_front() else { break };
            if lane == 0 {
                // What the first stream was given before comes first.
                while let Some(len) = direct.pop_front() {
                    self.wait(0, len, meter, moved)?;
                }
            }
            self.wait(lane, part.len, meter, moved)?;
            self.staging[place].1[lane].move_out(&part, blocks)?;
            moved.staged += part.len;
        }
        if cut != wanted {
            return Err(Error::NotPassed(format!("{cut} of {wanted} bytes fit the staging memory")));
        }
        Ok(())
    }

    /// Waits for the first batch that a stream has under way, of `len` bytes.
    fn wait(&mut self, load: usize, len: u64, meter: &mut Meter<'_>, moved: &mut Moved) -> Result<()> {
        loop {
            match self.loads[load].step(meter.control)? {
                Step::Progress(done) => meter.tell(done.min(len)),
                Step::Done(done) if done.bytes == len => {
                    meter.done += len;
                    meter.tell(0);
                    moved.bytes += len;
                    moved.from_pool += done.from_pool;
                    moved.from_files += done.from_files;
                    moved.batches += 1;
                    moved.verified += u64::from(is_verified(&done.report));
                    return Ok(());
                }
                Step::Done(done) => {
                    return Err(Error::Protocol(format!("{} bytes of a batch of {len} arrived", done.bytes)));
                }
            }
        }
    }
}
