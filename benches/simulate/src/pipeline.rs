//! The pipeline: lanes that take pieces, read, verify and issue copies, in the order of the engines.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet, VecDeque};

use sllm_core::tuning::{MAPPED_IN_FLIGHT, batch_len};

use crate::host::Host;
use crate::model::Piece;
use crate::outbox::Outbox;
use crate::resource::{Serial, Shared};
use crate::way::{Engine, Way};

/// Where pieces are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    Cache,
    Disk,
}

/// One engine's work: its pieces are a queue that its lanes share.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    pub(crate) way: Way,
    pub(crate) from: From,
    pub(crate) pieces: Vec<Piece>,
    /// Added to the devices of the pieces: another process's devices.
    pub(crate) first_device: usize,
}

/// Seconds from the start of a load to its last byte on a device, everything released.
pub(crate) fn seconds(host: &Host, shares: &[Share]) -> f64 {
    let mut run = Run::new(host, shares);
    let moved = run.finish();
    let mapped = shares.iter().filter(|share| share.way.engine == Engine::Mapped);
    let registered: u64 = mapped.flat_map(|share| &share.pieces).map(|piece| piece.len).sum();
    host.setup + moved + registered as f64 / host.release
}

/// A place in time, ordered.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Time(f64);

impl Eq for Time {}

impl PartialOrd for Time {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Time {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// What a lane's thread does next, when it is woken.
#[derive(Debug, Clone, Copy)]
enum State {
    /// Takes a piece, or what came back from the disk.
    Next,
    /// Wants a buffer for a piece.
    Acquire(usize),
    /// Has pinned so many buffers, one for this piece.
    Pinned(usize, usize),
    /// Has a buffer: reads.
    Read(usize),
    /// Its bytes are there.
    Filled(usize),
    /// Verified: is sent.
    Send(usize),
    /// Issues what is due of the lines from this one on.
    Relieve(usize),
    /// Has issued this batch of its outbox.
    Issued(usize),
    /// Waits for its last copies.
    Drain,
    Done,
}

struct Lane {
    share: usize,
    state: State,
    /// Buffers that are free and its own; those that it may still take, and of these the pinned ones.
    spare: usize,
    quota: usize,
    pinned: usize,
    /// Batches of its pieces that were sent and did not come back, in order.
    sent: VecDeque<usize>,
    /// What it does once it has issued a batch.
    then: State,
    /// Reads in flight, and pieces that came back (io_uring).
    in_flight: usize,
    back: VecDeque<usize>,
    /// Waits for a read.
    idle: bool,
    /// Pieces of its window that are registered (mapped).
    window: VecDeque<usize>,
}

/// Who a timer wakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wake {
    Lane(usize),
    /// The lane and the piece of a read that the disk is done with.
    Read(usize, usize),
}

/// Something that many lanes use at a time.
#[derive(Debug, Clone, Copy)]
enum Resource {
    Memory = 0,
    Pin = 1,
    Register = 2,
}

struct Run<'a> {
    host: &'a Host,
    shares: &'a [Share],
    lanes: Vec<Lane>,
    /// Next piece of each share.
    next: Vec<usize>,
    resources: [Shared; 3],
    disk: Serial,
    links: Vec<Serial>,
    /// One a process, by its first device.
    outboxes: Vec<Outbox>,
    timers: BinaryHeap<Reverse<(Time, usize, Wake)>>,
    timer_count: usize,
    now: f64,
}

impl<'a> Run<'a> {
    fn new(host: &'a Host, shares: &'a [Share]) -> Run<'a> {
        let cached = || shares.iter().filter(|share| share.from == From::Cache);
        let rings: f64 = cached().map(|share| share.way.ring_len()).sum();
        // Ways of one load differ in nothing that matters here.
        let traffic = cached().map(|share| share.way.traffic(host, rings)).fold(1.0, f64::max);
        let devices =
            shares.iter().flat_map(|s| s.pieces.iter().flat_map(|p| &p.copies).map(|(d, _)| d + s.first_device));
        let links = vec![Serial::new(host.link, host.copy_overhead); devices.max().unwrap_or(0) + 1];
        let outbox = |first_device| {
            let mine = || shares.iter().filter(|share| share.first_device == first_device);
            // Ways of one load have one number of pieces a batch.
            let most = mine().map(|share| share.way.batch).max().unwrap_or(1);
            let copies = mine().flat_map(|share| share.pieces.iter().flat_map(|piece| &piece.copies));
            let devices: HashSet<usize> = copies.map(|(device, _)| *device).collect();
            Outbox::new(batch_len(most, devices.len()), links.len())
        };
        let outboxes = (0..links.len()).map(outbox).collect();
        let lanes = shares.iter().enumerate().flat_map(|(number, share)| {
            (0..share.way.lanes).map(move |_| Lane {
                share: number,
                state: State::Next,
                spare: 0,
                quota: share.way.buffers,
                pinned: 0,
                sent: VecDeque::new(),
                then: State::Next,
                in_flight: 0,
                back: VecDeque::new(),
                idle: false,
                window: VecDeque::new(),
            })
        });
        let resources = [
            Shared::new(host.read_each, host.memory / traffic),
            Shared::new(host.pin_each, host.pin_total),
            Shared::new(host.register, host.register),
        ];
        let lanes: Vec<Lane> = lanes.collect();
        let mut run = Run {
            host,
            shares,
            lanes,
            next: vec![0; shares.len()],
            resources,
            disk: Serial::new(host.disk, 0.0),
            links,
            outboxes,
            timers: BinaryHeap::new(),
            timer_count: 0,
            now: 0.0,
        };
        for lane in 0..run.lanes.len() {
            // One after another: were they started at once, they would all read and then all verify.
            run.wake_at(lane as f64 * host.spawn, Wake::Lane(lane));
        }
        run
    }

    fn wake_at(&mut self, time: f64, who: Wake) {
        self.timer_count += 1; // equal times in the order in which they were asked for
        self.timers.push(Reverse((Time(time), self.timer_count, who)));
    }

    /// Runs to the end; the seconds that it took.
    fn finish(&mut self) -> f64 {
        loop {
            let timer = self.timers.peek().map(|Reverse((time, _, _))| time.0);
            let ends = self.resources.iter().enumerate().filter_map(|(place, r)| Some((r.next_end()?, place)));
            let flow = ends.min_by(|a, b| a.0.total_cmp(&b.0));
            match (timer, flow) {
                (None, None) => return self.now,
                (timer, Some((end, place))) if timer.is_none_or(|time| end < time) => {
                    self.now = end;
                    let Some(who) = self.resources[place].end_first(end) else { continue };
                    self.step(who);
                }
                _ => {
                    let Some(Reverse((time, _, who))) = self.timers.pop() else { continue };
                    self.now = time.0;
                    match who {
                        Wake::Lane(lane) => self.step(lane),
                        Wake::Read(lane, piece) => self.came_back(lane, piece),
                    }
                }
            }
        }
    }

    /// A read of the disk is done.
    fn came_back(&mut self, lane: usize, piece: usize) {
        if let Engine::Uring { .. } = self.shares[self.lanes[lane].share].way.engine {
            self.lanes[lane].in_flight -= 1;
            self.lanes[lane].back.push_back(piece);
            if std::mem::take(&mut self.lanes[lane].idle) {
                self.step(lane);
            }
        } else {
            self.step(lane);
        }
    }

    /// Runs a lane's thread until it waits.
    fn step(&mut self, number: usize) {
        while let Some(state) = self.advance(number) {
            self.lanes[number].state = state;
        }
    }

    /// The lane's next state, or `None` when it waits to be woken in the one it has.
    fn advance(&mut self, number: usize) -> Option<State> {
        let share = &self.shares[self.lanes[number].share];
        match self.lanes[number].state {
            State::Next => self.take(number),
            State::Acquire(piece) => self.acquire(number, piece),
            State::Pinned(piece, buffers) => {
                self.lanes[number].pinned = buffers - 1;
                Some(State::Read(piece))
            }
            State::Read(piece) => self.read(number, piece),
            State::Filled(piece) if share.way.verify => {
                let verifying = share.pieces[piece].len as f64 / self.host.checksum;
                self.then_at(number, verifying, State::Send(piece))
            }
            State::Filled(piece) => Some(State::Send(piece)),
            State::Send(piece) => self.send(number, piece),
            State::Relieve(line) => match self.outboxes[share.first_device].idle(line, self.now) {
                Some((line, batch)) => self.issue(number, batch, State::Relieve(line + 1)),
                None => Some(State::Next),
            },
            State::Issued(batch) => {
                let (end, waiting) = self.outboxes[share.first_device].issue(batch, self.now, &mut self.links);
                for lane in waiting {
                    self.wake_at(end, Wake::Lane(lane));
                }
                Some(self.lanes[number].then)
            }
            State::Drain => match self.lanes[number].sent.front() {
                Some(&oldest) => self.retire(number, oldest, State::Drain),
                None => Some(State::Done),
            },
            State::Done => None,
        }
    }

    /// Sleeps, and goes on in another state.
    fn then_at(&mut self, number: usize, seconds: f64, state: State) -> Option<State> {
        self.lanes[number].state = state;
        self.wake_at(self.now + seconds, Wake::Lane(number));
        None
    }

    fn flow(&mut self, number: usize, resource: Resource, bytes: f64, state: State) -> Option<State> {
        self.lanes[number].state = state;
        self.resources[resource as usize].start(self.now, number, bytes);
        None
    }

    /// The next piece of a share's queue.
    fn pop(&mut self, share: usize) -> Option<usize> {
        let piece = self.next[share];
        (piece < self.shares[share].pieces.len()).then(|| {
            self.next[share] += 1;
            piece
        })
    }

    /// What the thread does when it is free.
    fn take(&mut self, number: usize) -> Option<State> {
        let (share, now) = (self.lanes[number].share, self.now);
        match self.shares[share].way.engine {
            Engine::Pread => Some(self.pop(share).map_or(State::Drain, State::Acquire)),
            Engine::Uring { depth } => {
                let lane = &mut self.lanes[number];
                if let Some(piece) = lane.back.pop_front() {
                    return Some(State::Filled(piece));
                }
                let in_flight = lane.in_flight;
                if in_flight < depth && self.next[share] < self.shares[share].pieces.len() {
                    let mut has_room = in_flight == 0 || lane.quota > 0 || lane.spare > 0;
                    if let (false, Some(&oldest)) = (has_room, lane.sent.front()) {
                        if let Some(batch) = self.outbox(number).overdue(oldest, now) {
                            return self.issue(number, batch, State::Next);
                        }
                        has_room = self.outbox(number).is_done(oldest, now);
                    }
                    if has_room && let Some(piece) = self.pop(share) {
                        return Some(State::Acquire(piece));
                    }
                }
                self.lanes[number].idle = in_flight > 0;
                (in_flight == 0).then_some(State::Drain)
            }
            Engine::Mapped => {
                if let Some(piece) = self.lanes[number].window.pop_front() {
                    return Some(State::Filled(piece));
                }
                let Some(first) = self.pop(share) else { return Some(State::Drain) };
                let pieces = &self.shares[share].pieces;
                let window = pieces[first].window;
                let mut bytes = pieces[first].len as f64;
                while pieces.get(self.next[share]).is_some_and(|piece| piece.window == window) {
                    bytes += pieces[self.next[share]].len as f64;
                    self.lanes[number].window.push_back(self.next[share]);
                    self.next[share] += 1;
                }
                self.flow(number, Resource::Register, bytes, State::Filled(first))
            }
        }
    }

    /// A buffer: a free one, that of the oldest copy if it is done, a new one, or that of the oldest copy.
    fn acquire(&mut self, number: usize, piece: usize) -> Option<State> {
        let (way, now) = (self.shares[self.lanes[number].share].way, self.now);
        if self.lanes[number].spare > 0 {
            self.lanes[number].spare -= 1;
            return Some(State::Read(piece));
        }
        let oldest = self.lanes[number].sent.front().copied();
        if let Some(oldest) = oldest
            && let Some(batch) = self.outbox(number).overdue(oldest, now)
        {
            return self.issue(number, batch, State::Acquire(piece));
        }
        let done = oldest.is_some_and(|batch| self.outbox(number).is_done(batch, now));
        let lane = &mut self.lanes[number];
        if lane.quota > 0 && !done {
            lane.quota -= 1;
            if lane.pinned > 0 {
                lane.pinned -= 1;
                return Some(State::Read(piece));
            }
            let buffers = way.buffers.min(2); // as many as the loader pins in a step
            return self.flow(
                number,
                Resource::Pin,
                (buffers as u64 * way.piece_len) as f64,
                State::Pinned(piece, buffers),
            );
        }
        self.retire(number, oldest?, State::Acquire(piece))
    }

    fn outbox(&mut self, number: usize) -> &mut Outbox {
        &mut self.outboxes[self.shares[self.lanes[number].share].first_device]
    }

    /// Sends a piece.
    fn send(&mut self, number: usize, piece: usize) -> Option<State> {
        let share = &self.shares[self.lanes[number].share];
        let sent = &self.lanes[number].sent;
        if let (Engine::Mapped, Some(&oldest), MAPPED_IN_FLIGHT..) = (share.way.engine, sent.front(), sent.len()) {
            return self.retire(number, oldest, State::Send(piece));
        }
        let copies = share.pieces[piece].copies.iter().map(|&(device, len)| (device + share.first_device, len));
        let batch = self.outbox(number).send(copies);
        self.lanes[number].sent.push_back(batch);
        if self.outbox(number).is_full(batch) {
            self.issue(number, batch, State::Next)
        } else {
            Some(State::Relieve(0))
        }
    }

    /// Issues an open batch, and goes on in another state.
    fn issue(&mut self, number: usize, batch: usize, then: State) -> Option<State> {
        let copies = self.outbox(number).take(batch);
        self.lanes[number].then = then;
        self.then_at(number, copies as f64 * self.host.copy_issue, State::Issued(batch))
    }

    /// Takes back the oldest piece, of this batch, or waits for it in the state in which it asks again.
    fn retire(&mut self, number: usize, batch: usize, again: State) -> Option<State> {
        let now = self.now;
        match self.outbox(number).end(batch) {
            Some(end) if end <= now => {
                let lane = &mut self.lanes[number];
                lane.sent.pop_front();
                lane.spare += 1;
                return Some(again);
            }
            Some(end) => self.wake_at(end, Wake::Lane(number)),
            None if self.outbox(number).is_open(batch) => return self.issue(number, batch, again),
            None => self.outbox(number).wait(batch, number),
        }
        self.lanes[number].state = again;
        None
    }

    fn read(&mut self, number: usize, piece: usize) -> Option<State> {
        let share = &self.shares[self.lanes[number].share];
        let bytes = share.pieces[piece].len as f64;
        if share.from == From::Cache {
            return self.flow(number, Resource::Memory, bytes, State::Filled(piece));
        }
        let end = self.disk.push(self.now, bytes) + self.host.disk_latency;
        self.wake_at(end, Wake::Read(number, piece));
        if let Engine::Uring { .. } = share.way.engine {
            self.lanes[number].in_flight += 1;
            return Some(State::Next);
        }
        self.lanes[number].state = State::Filled(piece);
        None
    }
}

#[cfg(test)]
mod tests;
