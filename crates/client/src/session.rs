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

/// What one fill is about, and how far it is.
struct Fill<'a> {
    client: &'a StoreClient,
    options: &'a RemoteOptions,
    blocks: &'a [Block],
    control: &'a Control,
    /// Bytes wanted.
    total: u64,
    moved: Moved,
}

impl Fill<'_> {
    /// Tells how far it is, `more` bytes of the batch that is under way included.
    fn tell(&self, more: u64) {
        let done = self.moved.bytes.saturating_add(more).min(self.total);
        self.control.tell(Progress { done, total: self.total });
    }

    /// How long a batch of so many bytes may take.
    fn limit(&self, len: u64) -> Duration {
        self.options.patience.saturating_add(Duration::from_millis(len / SLOWEST))
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
        let total = segments.iter().map(Segment::len).sum();
        let mut fill = Fill { client, options, blocks, control, total, moved: Moved::default() };
        let (direct, staged) = self.split(segments, blocks, options.direct_len)?;

        // All at once: the server goes from one to the next without a round trip.
        let mut direct = direct.into_iter().peekable();
        while direct.peek().is_some() {
            let batch: Vec<pb::Segment> = direct.by_ref().take(MESSAGE_SEGMENTS).collect();
            let len = batch.iter().map(|segment| segment.rows * segment.row_len).sum();
            self.loads[0].batch(batch, len, fill.limit(len))?;
        }
        for (device, segments) in staged {
            self.fill_staged(&mut fill, &device, segments)?;
        }
        self.wait(0, &mut fill)?;
        Ok(fill.moved)
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
                let attach = || attach_device(device, &shared, 0, shared.base_len);
                let block = self.loads[0].attach_once(&shared, attach)?;
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
    fn make_lane(&mut self, fill: &Fill<'_>, place: usize, lane: usize, len: u64) -> Result<bool> {
        let (device, made) = &self.staging[place];
        if made.get(lane).is_some_and(|made| made.asked >= len) {
            return Ok(true);
        }
        if self.loads.len() <= lane {
            self.loads.push(Load::open(fill.client, self.open.clone(), fill.control)?);
        }
        let first = lane == 0;
        let made = Staging::make(fill.client, device, self.loads[lane].next_block(), len, first);
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
    fn fill_staged(&mut self, fill: &mut Fill<'_>, device: &Device, segments: Vec<Segment>) -> Result<()> {
        let wanted: u64 = segments.iter().map(Segment::len).sum();
        let place = self.place_of(device);
        let (mut lanes, len) = Staging::lanes(wanted, fill.options.staging_len, LANES);
        let mut cutter = Cutter::new(segments);
        let mut sent: VecDeque<(usize, Part)> = VecDeque::new();
        let (mut next, mut cut) = (0, 0);
        loop {
            while sent.len() < lanes && cut < wanted {
                // Made when its turn comes, while the server fills those before it.
                if !self.make_lane(fill, place, next, len)? {
                    (lanes, next) = (next, 0);
                    continue;
                }
                let staging = &self.staging[place].1[next];
                let Some(mut part) = cutter.part(staging.block, 0, staging.len) else { break };
                let segments = std::mem::take(&mut part.segments);
                self.loads[next].batch(segments, part.len, fill.limit(part.len))?;
                cut += part.len;
                sent.push_back((next, part));
                next = (next + 1) % lanes;
            }
            let Some((lane, part)) = sent.pop_front() else { break };
            self.wait(lane, fill)?;
            self.staging[place].1[lane].move_out(&part, fill.blocks)?;
            fill.moved.staged += part.len;
        }
        if cut != wanted {
            return Err(Error::NotPassed(format!("{cut} of {wanted} bytes fit the staging memory")));
        }
        Ok(())
    }

    /// Waits until all that a stream was given has arrived.
    fn wait(&mut self, load: usize, fill: &mut Fill<'_>) -> Result<()> {
        let load = &mut self.loads[load];
        while !load.is_done() {
            match load.step(fill.control)? {
                Step::Progress(done) => fill.tell(done),
                Step::Done(done) => {
                    fill.moved.bytes += done.bytes;
                    fill.moved.from_pool += done.from_pool;
                    fill.moved.from_files += done.from_files;
                    fill.moved.batches += 1;
                    fill.moved.verified += u64::from(is_verified(&done.report));
                    fill.tell(0);
                }
            }
        }
        Ok(())
    }
}
