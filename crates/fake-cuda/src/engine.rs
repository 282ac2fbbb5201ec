//! Streams: queues of operations, each served by one thread.
//!
//! An operation is due some time after it was asked for. Only then does it read its source. Operations of one
//! stream run in order. With a bandwidth set, the copies of a device in one direction also take turns.

use crate::codes::{self, Code};
use crate::state::{FIRST_HANDLE, Guard, Place, State, lock, notify, wait};
use std::collections::VecDeque;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD`: both mean the default stream here.
const SPECIAL_STREAMS: [usize; 3] = [0, 1, 2];
/// Default streams of the devices have these handles.
const DEFAULT_STREAMS: usize = 0x8000;

/// A queue of operations.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) device: i32,
    /// Does not wait for the default stream, nor the default stream for it.
    pub(crate) non_blocking: bool,
    /// Ends when its queue is empty.
    pub(crate) destroyed: bool,
    queue: VecDeque<Operation>,
    issued: u64,
    done: u64,
}

#[derive(Debug)]
struct Operation {
    number: u64,
    due: Instant,
    /// When it ends, known once it may begin.
    end: Option<Instant>,
    /// Operations of other streams that come first.
    after: Vec<(usize, u64)>,
    work: Work,
    /// Address ranges in use until it is done.
    spans: Vec<(usize, usize)>,
}

/// What an operation does.
#[derive(Debug)]
pub(crate) enum Work {
    /// Nothing: it only takes its place in the order.
    Nothing,
    Copy(Copy),
    Fill {
        address: usize,
        len: usize,
        value: u8,
    },
    /// Notes the time in an event.
    Stamp(usize),
    /// Adds checksums.
    Sum(Vec<Rows>),
}

/// Rows of a message on the device, and where its checksum is.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) address: usize,
    pub(crate) pitch: usize,
    pub(crate) width: usize,
    pub(crate) height: usize,
    /// Bytes of the message after them.
    pub(crate) after: u64,
    pub(crate) sum: usize,
}

/// The polynomial of CRC-64/NVME, reflected.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// What each value of a byte leaves when eight bits are divided.
static REMAINDERS: LazyLock<[u64; 256]> = LazyLock::new(|| {
    std::array::from_fn(|byte| {
        (0..8).fold(byte as u64, |rest, _| if rest & 1 == 1 { rest >> 1 ^ POLYNOMIAL } else { rest >> 1 })
    })
});

impl Rows {
    /// Adds to the sum what the rows leave when the message, of which all else is zeros, is divided by the polynomial.
    fn add(&self) {
        let divide = |rest: u64, byte: u8| rest >> 8 ^ REMAINDERS[usize::from(rest.to_le_bytes()[0] ^ byte)];
        let mut rest = 0;
        for row in 0..self.height {
            let row = with_exposed_provenance::<u8>(self.address + row * self.pitch);
            // SAFETY: the call checked that the rows lie in device memory, and freeing it waits for this operation.
            rest = (0..self.width).fold(rest, |rest, at| divide(rest, unsafe { row.add(at).read_volatile() }));
        }
        rest = (0..self.after).fold(rest, |rest, _| divide(rest, 0));
        let sum = with_exposed_provenance_mut::<u64>(self.sum);
        // SAFETY: as above, of eight bytes at a multiple of eight; a device's sums are added by one stream's operations.
        unsafe { sum.write(sum.read() ^ rest) };
    }
}

/// Rows of bytes to move.
#[derive(Debug)]
pub(crate) struct Copy {
    pub(crate) from: Side,
    pub(crate) to: Side,
    pub(crate) width: usize,
    pub(crate) height: usize,
    /// A copy of a pageable source, made at the call, rows without gaps.
    pub(crate) staged: Option<Vec<u8>>,
    pub(crate) direction: Direction,
    /// Whether this copy loses the device.
    pub(crate) loses: bool,
}

/// One end of a copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Side {
    pub(crate) address: usize,
    pub(crate) pitch: usize,
    pub(crate) place: Place,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    HostToDevice = 0,
    DeviceToHost = 1,
    DeviceToDevice = 2,
}

/// Bytes from the first of a piece to its last.
pub(crate) fn extent(width: usize, height: usize, pitch: usize) -> Option<usize> {
    match (width, height) {
        (0, _) | (_, 0) => Some(0),
        _ => (height - 1).checked_mul(pitch)?.checked_add(width),
    }
}

/// Copies rows.
///
/// # Safety
/// Both pieces are mapped, and the destination is writable.
pub(crate) unsafe fn copy_rows(from: (usize, usize), to: (usize, usize), width: usize, height: usize) {
    for row in 0..height {
        let source = with_exposed_provenance::<u8>(from.0 + row * from.1);
        let target = with_exposed_provenance_mut::<u8>(to.0 + row * to.1);
        // SAFETY: the caller vouches for both pieces; `copy` allows them to overlap.
        unsafe { std::ptr::copy(source, target, width) };
    }
}

impl Copy {
    pub(crate) fn bytes(&self) -> u64 {
        (self.width as u64) * (self.height as u64)
    }

    fn run(&self) {
        let from = match &self.staged {
            Some(bytes) => (bytes.as_ptr().expose_provenance(), self.width),
            None => (self.from.address, self.from.pitch),
        };
        // SAFETY: the call checked device ranges and registered ranges, and freeing or unregistering either waits
        // for this operation. Of a pageable destination the caller vouches for, as with the real driver.
        unsafe { copy_rows(from, (self.to.address, self.to.pitch), self.width, self.height) };
    }
}

impl Copy {
    /// Changes a bit of the middle row's beginning, at its destination.
    fn spoil(&self) {
        let middle = with_exposed_provenance_mut::<u8>(self.to.address + self.height / 2 * self.to.pitch);
        // SAFETY: as in `run`.
        unsafe { middle.write(middle.read() ^ 1) };
    }
}

impl Stream {
    pub(crate) fn new(device: i32, non_blocking: bool) -> Self {
        Self { device, non_blocking, destroyed: false, queue: VecDeque::new(), issued: 0, done: 0 }
    }
}

impl State {
    /// Makes a stream and its thread.
    pub(crate) fn create_stream(&mut self, device: i32, non_blocking: bool) -> Result<usize, Code> {
        let handle = self.new_handle();
        self.start_stream(handle, device, non_blocking)?;
        Ok(handle)
    }

    fn start_stream(&mut self, handle: usize, device: i32, non_blocking: bool) -> Result<(), Code> {
        self.streams.insert(handle, Stream::new(device, non_blocking));
        let thread = std::thread::Builder::new().name("fake-cuda".to_owned()).stack_size(256 << 10);
        if thread.spawn(move || serve(handle)).is_err() {
            self.streams.remove(&handle);
            return Err(codes::OPERATING_SYSTEM);
        }
        Ok(())
    }

    /// The stream that a caller's handle means. Handles of destroyed streams are refused.
    pub(crate) fn resolve_stream(&mut self, handle: usize, device: i32) -> Result<usize, Code> {
        let handle = if SPECIAL_STREAMS.contains(&handle) {
            let index = usize::try_from(device).map_err(|_| codes::INVALID_CONTEXT)?;
            let default = DEFAULT_STREAMS + index * 16;
            if !self.streams.contains_key(&default) {
                self.start_stream(default, device, false)?;
            }
            default
        } else {
            handle
        };
        match self.streams.get(&handle) {
            Some(stream) if !stream.destroyed => Ok(handle),
            _ => Err(codes::INVALID_HANDLE),
        }
    }

    /// Puts an operation at the end of a stream. Returns its number.
    pub(crate) fn submit(
        &mut self,
        handle: usize,
        work: Work,
        spans: Vec<(usize, usize)>,
        mut after: Vec<(usize, u64)>,
    ) -> Result<u64, Code> {
        let stream = self.streams.get(&handle).ok_or(codes::INVALID_HANDLE)?;
        let device = stream.device;
        if !stream.non_blocking {
            // The default stream and the blocking ones wait for each other.
            let default = handle < FIRST_HANDLE;
            let others = self.streams.iter().filter(|(other, stream)| {
                **other != handle
                    && stream.device == device
                    && !stream.non_blocking
                    && (default || **other < FIRST_HANDLE)
            });
            after.extend(others.filter(|(_, s)| s.done < s.issued).map(|(other, s)| (*other, s.issued)));
        }
        let now = Instant::now();
        let late = matches!(work, Work::Copy(_) | Work::Fill { .. });
        let due = if late { now + self.settings.delay } else { now };
        let stream = self.streams.get_mut(&handle).ok_or(codes::INVALID_HANDLE)?;
        stream.issued += 1;
        let number = stream.issued;
        stream.queue.push_back(Operation { number, due, end: None, after, work, spans });
        notify();
        Ok(number)
    }

    /// Whether an operation is done. Those of streams that are gone are.
    pub(crate) fn reached(&self, (handle, number): (usize, u64)) -> bool {
        self.streams.get(&handle).is_none_or(|stream| stream.done >= number)
    }

    /// The last operation asked of a stream.
    pub(crate) fn last(&self, handle: usize) -> (usize, u64) {
        (handle, self.streams.get(&handle).map_or(0, |stream| stream.issued))
    }

    /// The last operations of all streams of a device.
    pub(crate) fn last_of_device(&self, device: i32) -> Vec<(usize, u64)> {
        let streams = self.streams.iter().filter(|(_, stream)| stream.device == device);
        streams.map(|(handle, stream)| (*handle, stream.issued)).collect()
    }

    /// Operations in flight that use an address range.
    pub(crate) fn in_flight(&self, start: usize, len: usize) -> Vec<(usize, u64)> {
        let mut found = Vec::new();
        for (handle, stream) in &self.streams {
            let uses = |operation: &&Operation| {
                operation.spans.iter().any(|(other, other_len)| *other < start + len && start < other + other_len)
            };
            found.extend(stream.queue.iter().rev().find(uses).map(|operation| (*handle, operation.number)));
        }
        found
    }

    /// When the operation at the head of a queue ends. It takes its turn at the copy engine.
    fn schedule(&mut self, handle: usize) -> Instant {
        let bandwidth = self.settings.bandwidth;
        let (Some(stream), now) = (self.streams.get_mut(&handle), Instant::now()) else {
            return Instant::now();
        };
        let device = stream.device;
        let Some(operation) = stream.queue.front_mut() else {
            return now;
        };
        if let Some(end) = operation.end {
            return end;
        }
        let mut end = operation.due;
        if let (Work::Copy(copy), true) = (&operation.work, bandwidth > 0) {
            let engine = &mut self.devices.entry(device).or_default().engine_free[copy.direction as usize];
            #[expect(clippy::cast_precision_loss, reason = "a duration")]
            let takes = Duration::from_secs_f64(copy.bytes() as f64 / bandwidth as f64);
            end = end.max(now).max(engine.unwrap_or(now)) + takes;
            *engine = Some(end);
        }
        operation.end = Some(end);
        end
    }
}

/// Waits for operations.
pub(crate) fn wait_for(mut state: Guard, operations: &[(usize, u64)]) -> Guard {
    while !operations.iter().all(|operation| state.reached(*operation)) {
        state = wait(state);
    }
    state
}

/// The thread of a stream.
fn serve(handle: usize) {
    let mut state = lock();
    loop {
        let Some(stream) = state.streams.get(&handle) else {
            return;
        };
        let device = stream.device;
        let Some(operation) = stream.queue.front() else {
            if stream.destroyed {
                state.streams.remove(&handle);
                notify();
                return;
            }
            state = wait(state);
            continue;
        };
        if !operation.after.iter().all(|other| state.reached(*other)) {
            state = wait(state);
            continue;
        }
        let end = state.schedule(handle);
        let now = Instant::now();
        if now < end {
            drop(state);
            std::thread::sleep(end - now);
            state = lock();
            continue;
        }
        state = run_head(state, handle, device);
    }
}

/// Runs the operation at the head of a queue, without the lock, and takes it off.
fn run_head(mut state: Guard, handle: usize, device: i32) -> Guard {
    let head = state.streams.get_mut(&handle).and_then(|stream| stream.queue.front_mut());
    let Some(operation) = head else { return state };
    let number = operation.number;
    // It stays in the queue while it runs, so that its ranges count as in use.
    let work = std::mem::replace(&mut operation.work, Work::Nothing);
    if let Work::Copy(Copy { loses: true, .. }) = work {
        state.devices.entry(device).or_default().lost = true;
    }
    let lost = state.check_alive(device).is_err();
    let spoils = state.counters.copies[Direction::HostToDevice as usize] == state.settings.spoil_after;
    drop(state);
    if !lost {
        match &work {
            Work::Copy(copy) => {
                copy.run();
                if spoils && copy.direction == Direction::HostToDevice {
                    copy.spoil();
                }
            }
            Work::Fill { address, len, value } => {
                // SAFETY: the call checked that the range lies in one allocation, and freeing waits for this.
                unsafe { with_exposed_provenance_mut::<u8>(*address).write_bytes(*value, *len) };
            }
            Work::Sum(rows) => rows.iter().for_each(Rows::add),
            Work::Nothing | Work::Stamp(_) => {}
        }
    }
    let mut state = lock();
    match work {
        Work::Copy(copy) if !lost => {
            state.counters.copies[copy.direction as usize] += 1;
            state.counters.bytes[copy.direction as usize] += copy.bytes();
        }
        Work::Stamp(event) => {
            // An event that was recorded again meanwhile waits for that later record.
            let event = state.events.get_mut(&event);
            if let Some(event) = event.filter(|event| event.recorded == Some((handle, number))) {
                event.stamp = Some(Instant::now());
            }
        }
        _ => {}
    }
    if let Some(stream) = state.streams.get_mut(&handle)
        && let Some(operation) = stream.queue.pop_front()
    {
        stream.done = operation.number;
    }
    notify();
    state
}
