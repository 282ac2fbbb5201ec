//! Everything the driver remembers, behind one lock.

use crate::codes::{self, Code};
use crate::engine::Stream;
use crate::mapping::{Mapping, PAGE};
use crate::settings::{self, Fault, Settings};
use crate::share::HANDLE_LEN;
use std::alloc::{Layout, dealloc};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The byte that fills device memory nobody has written yet.
pub const POISON: u8 = 0xA5;

/// Device memory is counted in pieces of this size, which are the driver's.
const DEVICE_ALIGN: usize = 512;
/// Addresses of freed memory that are kept for memory of the same length.
const MAX_FREED: usize = 64;
/// `CU_MEMHOSTREGISTER_READ_ONLY`.
pub(crate) const READ_ONLY: u32 = 0x08;
/// Handles of streams and events begin here, above those of contexts and default streams.
pub(crate) const FIRST_HANDLE: usize = 0x10_0000;

static STATE: Mutex<State> = Mutex::new(State::new());
static CHANGED: Condvar = Condvar::new();
/// The process that called `cuInit`, 0 before.
static OWNER: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// Devices whose primary contexts are on this thread's stack, the current one last. -1 stands for none.
    pub(crate) static CONTEXTS: RefCell<Vec<i32>> = const { RefCell::new(Vec::new()) };
}

pub(crate) type Guard = MutexGuard<'static, State>;

/// Locks the state.
pub(crate) fn lock() -> Guard {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives up the lock until something changed.
pub(crate) fn wait(guard: Guard) -> Guard {
    CHANGED.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Wakes everyone who waits.
pub(crate) fn notify() {
    CHANGED.notify_all();
}

/// Whether this process is a child of the one that called `cuInit`.
pub(crate) fn forked() -> bool {
    let owner = OWNER.load(Ordering::Acquire);
    owner != 0 && owner != std::process::id()
}

/// Makes this process the owner.
pub(crate) fn own() {
    OWNER.store(std::process::id(), Ordering::Release);
}

/// Begins a call: counts it, and fails it if a fault is due or `cuInit` was not called.
pub(crate) fn enter(symbol: &'static str) -> Result<Guard, Code> {
    let state = enter_uninitialised(symbol)?;
    if state.initialised { Ok(state) } else { Err(codes::NOT_INITIALIZED) }
}

/// As [`enter`], for the calls that are allowed before `cuInit`.
pub(crate) fn enter_uninitialised(symbol: &'static str) -> Result<Guard, Code> {
    // A lock that another thread held while forking stays locked for ever: ask before locking.
    if forked() {
        return Err(codes::NOT_INITIALIZED);
    }
    let mut state = lock();
    *state.calls.entry(symbol).or_default() += 1;
    match settings::due_fault(&mut state.faults, symbol) {
        Some(code) => Err(code),
        None => Ok(state),
    }
}

/// As [`enter`], for calls that need a current context. Also returns its device.
pub(crate) fn enter_context(symbol: &'static str) -> Result<(Guard, i32), Code> {
    let (state, device) = enter_freeing(symbol)?;
    state.check_alive(device)?;
    Ok((state, device))
}

/// As [`enter_context`], for calls that free something: a lost device does not stop them.
pub(crate) fn enter_freeing(symbol: &'static str) -> Result<(Guard, i32), Code> {
    let state = enter(symbol)?;
    let device = current().ok_or(codes::INVALID_CONTEXT)?;
    if state.devices.get(&device).is_none_or(|device| device.retained == 0) {
        return Err(codes::CONTEXT_IS_DESTROYED);
    }
    Ok((state, device))
}

/// The device of this thread's current context.
pub(crate) fn current() -> Option<i32> {
    CONTEXTS.with_borrow(|contexts| contexts.last().copied().filter(|device| *device >= 0))
}

/// What a device has done and holds.
#[derive(Debug, Default)]
pub(crate) struct Device {
    /// Holders of the primary context.
    pub(crate) retained: u32,
    /// Whether every call fails.
    pub(crate) lost: bool,
    pub(crate) used: u64,
    pub(crate) peak: u64,
    /// When the copy engine of each direction is free again.
    pub(crate) engine_free: [Option<Instant>; 3],
}

/// A piece of device memory.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) len: usize,
    pub(crate) device: i32,
    /// `CU_POINTER_ATTRIBUTE_BUFFER_ID`, which no other allocation of the process has or had.
    pub(crate) id: u64,
    pub(crate) mapping: Mapping,
    pub(crate) holder: Holder,
}

/// Whose device memory it is.
#[derive(Debug)]
pub(crate) enum Holder {
    /// This process allocated it. The file is there once it was exported.
    Ours { exported: Option<File> },
    /// Another process did, and exported it by this handle; here it is open so many times.
    Another { handle: [u8; HANDLE_LEN], opened: u64 },
}

impl Allocation {
    /// Bytes that count against the device. Another process's memory counts there.
    fn counted(&self) -> u64 {
        match self.holder {
            Holder::Ours { .. } => self.len.next_multiple_of(DEVICE_ALIGN) as u64,
            Holder::Another { .. } => 0,
        }
    }
}

/// A piece of pinned host memory.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) len: usize,
    pub(crate) flags: u32,
    pub(crate) device: i32,
    /// Set if the driver allocated it.
    pub(crate) owned: Option<Layout>,
}

/// An event, and what it waits for.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) device: i32,
    pub(crate) timed: bool,
    /// The operation that completes it: stream and number.
    pub(crate) recorded: Option<(usize, u64)>,
    pub(crate) stamp: Option<Instant>,
}

/// Where an address range lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Device(i32),
    Pinned { read_only: bool },
    Pageable,
}

/// What was moved and what was waited for.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Copies asked for, for the loss of the device.
    pub(crate) submitted: u64,
    /// Copies done: host to device, device to host, device to device.
    pub(crate) copies: [u64; 3],
    pub(crate) bytes: [u64; 3],
    pub(crate) pageable_copies: u64,
    pub(crate) pageable_bytes: u64,
    pub(crate) registered_peak: u64,
    /// Frees and unregistrations that had to wait for a copy in flight.
    pub(crate) waits_on_free: u64,
    pub(crate) waits_on_unregister: u64,
    /// What was left when the last holder released a primary context.
    pub(crate) abandoned_device_bytes: u64,
    pub(crate) abandoned_imports: u64,
    pub(crate) abandoned_registered_bytes: u64,
    pub(crate) abandoned_streams: u64,
    pub(crate) abandoned_events: u64,
}

impl Counters {
    const fn new() -> Self {
        Self {
            submitted: 0,
            copies: [0; 3],
            bytes: [0; 3],
            pageable_copies: 0,
            pageable_bytes: 0,
            registered_peak: 0,
            waits_on_free: 0,
            waits_on_unregister: 0,
            abandoned_device_bytes: 0,
            abandoned_imports: 0,
            abandoned_registered_bytes: 0,
            abandoned_streams: 0,
            abandoned_events: 0,
        }
    }
}

/// The whole state of the driver.
pub(crate) struct State {
    pub(crate) initialised: bool,
    /// Whether the settings come from the environment or a test already.
    pub(crate) configured: bool,
    pub(crate) report: Option<String>,
    pub(crate) settings: Settings,
    pub(crate) faults: Vec<Fault>,
    pub(crate) calls: BTreeMap<&'static str, u64>,
    pub(crate) counters: Counters,
    pub(crate) devices: BTreeMap<i32, Device>,
    pub(crate) allocations: BTreeMap<usize, Allocation>,
    /// Where memory was that is freed, the last one at the end.
    freed: Vec<Mapping>,
    pub(crate) registrations: BTreeMap<usize, Registration>,
    pub(crate) registered: u64,
    pub(crate) streams: BTreeMap<usize, Stream>,
    pub(crate) events: BTreeMap<usize, Event>,
    next_handle: usize,
    next_id: u64,
}

impl State {
    const fn new() -> Self {
        Self {
            initialised: false,
            configured: false,
            report: None,
            settings: Settings::new(),
            faults: Vec::new(),
            calls: BTreeMap::new(),
            counters: Counters::new(),
            devices: BTreeMap::new(),
            allocations: BTreeMap::new(),
            freed: Vec::new(),
            registrations: BTreeMap::new(),
            registered: 0,
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            next_handle: FIRST_HANDLE,
            next_id: 0,
        }
    }

    /// Back to the defaults. What callers hold stays valid; counters begin again.
    pub(crate) fn reset(&mut self) {
        self.configured = true;
        self.settings = Settings::new();
        self.faults.clear();
        self.calls.clear();
        self.counters = Counters { registered_peak: self.registered, ..Counters::new() };
        for device in self.devices.values_mut() {
            device.lost = false;
            device.peak = device.used;
        }
    }

    /// A handle that no object had before.
    pub(crate) fn new_handle(&mut self) -> usize {
        self.next_handle += 16;
        self.next_handle
    }

    /// The number of an allocation, which none had before.
    pub(crate) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// The device of that ordinal, if it exists.
    pub(crate) fn device(&mut self, ordinal: i32) -> Result<&mut Device, Code> {
        match u64::try_from(ordinal) {
            Ok(index) if index < self.settings.devices => Ok(self.devices.entry(ordinal).or_default()),
            _ => Err(codes::INVALID_DEVICE),
        }
    }

    /// Fails if the device is lost.
    pub(crate) fn check_alive(&self, ordinal: i32) -> Result<(), Code> {
        match self.devices.get(&ordinal) {
            Some(device) if device.lost => Err(codes::ECC_UNCORRECTABLE),
            _ => Ok(()),
        }
    }

    /// Calls of a symbol, with or without its version.
    pub(crate) fn count(&self, name: &str) -> u64 {
        self.calls.iter().filter(|(symbol, _)| settings::same_symbol(name, symbol)).map(|(_, calls)| calls).sum()
    }

    /// Allocates poisoned device memory, where memory of its length was freed last.
    pub(crate) fn allocate(&mut self, ordinal: i32, len: usize) -> Result<usize, Code> {
        if len == 0 {
            return Err(codes::INVALID_VALUE);
        }
        let rounded = len.checked_next_multiple_of(DEVICE_ALIGN).ok_or(codes::OUT_OF_MEMORY)?;
        let limit = self.settings.memory;
        let device = self.devices.entry(ordinal).or_default();
        let used = device.used.checked_add(rounded as u64).filter(|used| *used <= limit);
        let used = used.ok_or(codes::OUT_OF_MEMORY)?;
        let mapping = match self.freed.iter().rposition(|freed| freed.fits(len)) {
            Some(at) => {
                let mapping = self.freed.remove(at);
                mapping.renew().map(|()| mapping)
            }
            None => Mapping::private(len),
        };
        let mapping = mapping.map_err(|_| codes::OUT_OF_MEMORY)?;
        mapping.fill(POISON);
        device.used = used;
        device.peak = device.peak.max(used);
        let (address, id) = (mapping.address(), self.new_id());
        let holder = Holder::Ours { exported: None };
        self.allocations.insert(address, Allocation { len, device: ordinal, id, mapping, holder });
        Ok(address)
    }

    /// Frees device memory that begins at `address`. No operation may use it any more.
    pub(crate) fn release(&mut self, address: usize) -> Result<(), Code> {
        let allocation = self.allocations.remove(&address).ok_or(codes::INVALID_VALUE)?;
        if let Some(device) = self.devices.get_mut(&allocation.device) {
            device.used -= allocation.counted();
        }
        if matches!(allocation.holder, Holder::Ours { .. }) && allocation.mapping.withdraw().is_ok() {
            if self.freed.len() == MAX_FREED {
                self.freed.remove(0);
            }
            self.freed.push(allocation.mapping);
        }
        Ok(())
    }

    /// Where the allocation that holds this address begins, and its length.
    pub(crate) fn allocation_of(&self, pointer: u64) -> Option<(usize, usize)> {
        let address = usize::try_from(pointer).ok()?;
        let (start, piece) = self.allocations.range(..=address).next_back()?;
        (address < start + piece.len).then_some((*start, piece.len))
    }

    /// Pins a host range.
    pub(crate) fn register(&mut self, address: usize, registration: Registration) -> Result<(), Code> {
        let len = registration.len;
        let end = address.checked_add(len).ok_or(codes::INVALID_VALUE)?;
        if address == 0 || len == 0 || len as u64 > self.settings.register_limit {
            return Err(codes::INVALID_VALUE);
        }
        let last_page = end.checked_next_multiple_of(PAGE).ok_or(codes::INVALID_VALUE)?;
        let below = self.registrations.range(..last_page).next_back();
        if below.is_some_and(|(start, other)| (start + other.len).next_multiple_of(PAGE) > address / PAGE * PAGE) {
            return Err(codes::HOST_MEMORY_ALREADY_REGISTERED);
        }
        let total = self.registered.checked_add(len as u64);
        let total = total.filter(|total| *total <= self.settings.registered_total).ok_or(codes::OUT_OF_MEMORY)?;
        self.registered = total;
        self.counters.registered_peak = self.counters.registered_peak.max(total);
        self.registrations.insert(address, registration);
        Ok(())
    }

    /// Unpins the range that begins at `address`, and frees it if the driver allocated it.
    pub(crate) fn unregister(&mut self, address: usize) -> Result<(), Code> {
        let registration = self.registrations.remove(&address).ok_or(codes::HOST_MEMORY_NOT_REGISTERED)?;
        self.registered -= registration.len as u64;
        if let Some(layout) = registration.owned {
            // SAFETY: the driver allocated it with this layout, and its entry is gone, so it is freed once.
            unsafe { dealloc(std::ptr::with_exposed_provenance_mut(address), layout) };
        }
        Ok(())
    }

    /// Says where a range lies. A range that is only partly inside an allocation or a registration is refused.
    pub(crate) fn place(&self, address: usize, len: usize) -> Result<Place, Code> {
        let end = address.checked_add(len).filter(|_| address != 0).ok_or(codes::INVALID_VALUE)?;
        // The last piece that begins before the end is the only one that can hold the range.
        if let Some((start, piece)) = self.allocations.range(..end.max(address + 1)).next_back() {
            let piece_end = start + piece.len;
            if *start <= address && end <= piece_end {
                return Ok(Place::Device(piece.device));
            }
            if address < piece_end {
                return Err(codes::INVALID_VALUE);
            }
        }
        if let Some((start, piece)) = self.registrations.range(..end.max(address + 1)).next_back() {
            let piece_end = start + piece.len;
            if *start <= address && end <= piece_end {
                return Ok(Place::Pinned { read_only: piece.flags & READ_ONLY != 0 });
            }
            if address < piece_end {
                return Err(codes::INVALID_VALUE);
            }
        }
        Ok(Place::Pageable)
    }

    /// Frees what a primary context still holds and counts it as abandoned. Nothing may be in flight.
    pub(crate) fn destroy_context(&mut self, ordinal: i32) {
        let of_device = |(address, device): (&usize, i32)| (device == ordinal).then_some(*address);
        let addresses: Vec<_> = self.allocations.iter().map(|(a, p)| (a, p.device)).filter_map(of_device).collect();
        for address in addresses {
            self.counters.abandoned_device_bytes += self.allocations[&address].counted();
            self.counters.abandoned_imports += self.opened(address).map_or(0, |(opened, _)| opened);
            let _ = self.release(address);
        }
        let addresses: Vec<_> = self.registrations.iter().map(|(a, p)| (a, p.device)).filter_map(of_device).collect();
        for address in addresses {
            self.counters.abandoned_registered_bytes += self.registrations[&address].len as u64;
            let _ = self.unregister(address);
        }
        let events = self.events.len();
        self.events.retain(|_, event| event.device != ordinal);
        self.counters.abandoned_events += (events - self.events.len()) as u64;
        // The default stream, whose handle is below, stays for the next context.
        for stream in self.streams.range_mut(FIRST_HANDLE..).map(|(_, stream)| stream) {
            if stream.device == ordinal && !stream.destroyed {
                stream.destroyed = true;
                self.counters.abandoned_streams += 1;
            }
        }
        notify();
    }

    /// Devices whose primary context somebody holds.
    pub(crate) fn contexts_now(&self) -> u64 {
        self.devices.values().filter(|device| device.retained > 0).count() as u64
    }

    /// Streams that callers made and did not destroy.
    pub(crate) fn streams_now(&self) -> u64 {
        self.streams.iter().filter(|(handle, stream)| **handle >= FIRST_HANDLE && !stream.destroyed).count() as u64
    }
}
