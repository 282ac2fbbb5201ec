//! Memory of clients on GPUs, open here once for all sessions and loads.
//!
//! A handle does not tell an allocation: one that is freed and made again may have the handle of the first. And a handle
//! that is open gives what is open when it is opened again, by whomever in this process: memory that may be gone. So an
//! open handle is used again only for the very allocation that it was opened for; else it is closed first, wherever it
//! was kept, and opened anew. Where a load copies to it, its end is waited for a moment, and then whoever comes is refused.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sllm_core::{Block, Error, SharedMemory};
use sllm_proto::PROCESS_LEN;
use tonic::{Code, Status};

use crate::devices::{OpenDevice, Uuid};
use crate::fault::{self, invalid, refused};

/// How long is waited for the end of a load that copies to memory of the same handle: it may have been stopped just now.
const PATIENCE: Duration = Duration::from_secs(2);

/// A CUDA IPC handle, and the device that it is opened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Handle {
    pub(crate) device: Uuid,
    pub(crate) bytes: [u8; 64],
}

/// Which allocation it is: the driver's number of it, in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Allocation {
    pub(crate) process: [u8; PROCESS_LEN],
    pub(crate) buffer_id: u64,
}

/// Memory as long as it is open.
#[derive(Debug)]
struct Open {
    memory: SharedMemory,
    /// Kept behind the memory, which is closed first.
    _device: OpenDevice,
    /// What it is, if that was told.
    allocation: Option<Allocation>,
    /// Tells it from what was open by its handle before.
    number: u64,
    /// Loads that copy to it, or are about to.
    users: usize,
    /// Sessions that may want it again.
    keepers: usize,
}

#[derive(Debug)]
enum Slot {
    /// A thread opens it, or closes it.
    Busy,
    Open(Open),
}

#[derive(Debug, Default)]
struct Table {
    slots: HashMap<Handle, Slot>,
    opened: u64,
}

/// All memory of clients that is open. Everything here may block, on the driver.
#[derive(Debug, Default)]
pub(crate) struct Imports {
    table: Mutex<Table>,
    changed: Condvar,
}

/// Keeps memory open: for copies, until this is dropped; or for later, until somebody else needs its handle.
#[derive(Debug)]
pub(crate) struct Hold {
    imports: Arc<Imports>,
    handle: Handle,
    number: u64,
    for_copies: bool,
}

/// A slot that is this thread's own. It is empty afterwards, also after a panic.
struct Busy<'a>(&'a Imports, &'a Handle);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut table = self.0.lock();
        if let Some(Slot::Busy) = table.slots.get(self.1) {
            table.slots.remove(self.1);
        }
        drop(table);
        self.0.changed.notify_all();
    }
}

impl Imports {
    /// Opens memory to copy to it. What is open is used where it is the same allocation, or is what `kept` keeps.
    pub(crate) fn open(
        self: &Arc<Self>,
        device: &OpenDevice,
        handle: &Handle,
        allocation: Option<Allocation>,
        kept: Option<&Hold>,
    ) -> Result<Hold, Status> {
        let hold = |number| Hold { imports: Arc::clone(self), handle: *handle, number, for_copies: true };
        let until = Instant::now() + PATIENCE;
        let mut table = self.lock();
        let stale = loop {
            match table.slots.get_mut(handle) {
                None => break None,
                // Its thread waits for the driver only.
                Some(Slot::Busy) => table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner),
                Some(Slot::Open(open)) => {
                    let same = allocation.is_some() && open.allocation == allocation;
                    if same || kept.is_some_and(|kept| kept.number == open.number) {
                        open.users += 1;
                        return Ok(hold(open.number));
                    }
                    if open.users == 0 {
                        break table.slots.remove(handle);
                    }
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(refused(
                            Code::Aborted,
                            "another load copies to memory of this handle, and it is not said to be the same \
                             allocation: try again when that load has ended"
                                .into(),
                        ));
                    }
                    table = self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        };
        table.slots.insert(*handle, Slot::Busy);
        drop(table);
        let busy = Busy(self, handle);
        if stale.is_some() {
            tracing::debug!("a client's memory is opened anew: its handle may be another allocation's by now");
        }
        drop(stale);
        let memory = SharedMemory::open(device.device(), &handle.bytes).map_err(|e| fault_of(&e))?;
        let mut table = self.lock();
        table.opened += 1;
        let number = table.opened;
        let open = Open { memory, _device: device.clone(), allocation, number, users: 1, keepers: 0 };
        table.slots.insert(*handle, Slot::Open(open));
        drop(table);
        drop(busy);
        Ok(hold(number))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold {
    /// Runs with what is held; `None` where it was closed, since another allocation has its handle.
    fn with<T>(&self, what: impl FnOnce(&mut Open) -> T) -> Option<T> {
        match self.imports.lock().slots.get_mut(&self.handle) {
            Some(Slot::Open(open)) if open.number == self.number => Some(what(open)),
            _ => None,
        }
    }

    /// Holds it for copies, too, if it is still open.
    pub(crate) fn again(&self) -> Option<Hold> {
        let Hold { imports, handle, number, .. } = self;
        self.with(|open| open.users += 1)?;
        Some(Hold { imports: Arc::clone(imports), handle: *handle, number: *number, for_copies: true })
    }

    /// Keeps it open for later, too.
    pub(crate) fn keep(&self) -> Hold {
        let Hold { imports, handle, number, .. } = self;
        self.with(|open| open.keepers += 1);
        Hold { imports: Arc::clone(imports), handle: *handle, number: *number, for_copies: false }
    }

    /// Bytes of the whole.
    pub(crate) fn len(&self) -> u64 {
        self.with(|open| open.memory.len()).unwrap_or_default()
    }

    /// A part of it to copy to. It must be gone before this: a handle that something has open cannot be opened anew.
    pub(crate) fn block(&self, offset: u64, len: u64) -> Result<Block, Status> {
        let block = self.with(|open| open.memory.block(offset, len));
        block.ok_or_else(|| invalid("the memory is gone"))?.map_err(|e| fault_of(&e))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut table = self.imports.lock();
        let Some(Slot::Open(open)) = table.slots.get_mut(&self.handle) else { return };
        if open.number != self.number {
            return;
        }
        *(if self.for_copies { &mut open.users } else { &mut open.keepers }) -= 1;
        if open.users > 0 || open.keepers > 0 {
            self.imports.changed.notify_all();
            return;
        }
        let gone = table.slots.insert(self.handle, Slot::Busy);
        drop(table);
        // Nobody opens the handle before it is closed.
        let _busy = Busy(&self.imports, &self.handle);
        drop(gone);
    }
}

/// A handle that leads nowhere, or a range outside what it leads to, is the client's mistake.
fn fault_of(error: &Error) -> Status {
    use sllm_core::DeviceError;
    match error {
        Error::Device(DeviceError::NotOpened { .. } | DeviceError::OutsideShared { .. }) => invalid(error.chain()),
        _ => fault::status(error),
    }
}

#[cfg(test)]
mod tests {
    use cuda::Driver;
    use sllm_core::Device;
    use test_support::{Other, hex, unhex};

    use super::*;
    use crate::devices::Devices;

    /// Set in the process whose memory the tests open.
    const OWNER: &str = "SLLM_TEST_IMPORTS_OWNER";

    /// Not a test of its own: that process.
    #[test]
    fn owner() {
        if std::env::var(OWNER).is_err() {
            return;
        }
        let make = || {
            let memory = Block::alloc(&Device::cuda(0).unwrap(), 1000).unwrap();
            println!("handle: {}", hex(&memory.export().unwrap().handle));
            memory
        };
        let mut memory = make();
        for _ in std::io::stdin().lines() {
            drop(memory);
            memory = make();
        }
    }

    fn start() -> (Driver, OpenDevice, Other, Handle) {
        let driver = Driver::load();
        let uuid = Device::cuda(0).unwrap().uuid().unwrap().unwrap();
        let mut other = Other::start("imports::tests::owner", |command| {
            command.env(OWNER, "1").env("LD_LIBRARY_PATH", Driver::find().parent().unwrap());
        });
        let bytes = unhex(&other.answer("handle")).try_into().unwrap();
        (driver, Devices::default().open(&uuid).unwrap(), other, Handle { device: uuid, bytes })
    }

    fn allocation(buffer_id: u64) -> Option<Allocation> {
        Some(Allocation { process: [1; PROCESS_LEN], buffer_id })
    }

    #[test]
    fn what_is_copied_to_is_shared_where_it_is_the_same_and_is_never_closed() {
        let (driver, device, _other, handle) = start();
        let imports = Arc::new(Imports::default());
        let first = imports.open(&device, &handle, allocation(1), None).unwrap();
        let same = imports.open(&device, &handle, allocation(1), None).unwrap();
        assert_eq!((driver.get("imports"), first.len()), (1, 1000));
        let another_process = Some(Allocation { process: [2; PROCESS_LEN], buffer_id: 1 });
        for other in [allocation(2), another_process, None] {
            let refused = imports.open(&device, &handle, other, None).unwrap_err();
            assert_eq!(refused.code(), Code::Aborted, "{other:?}");
        }
        // What is not told is the same for whoever keeps it only.
        let kept = first.keep();
        drop(imports.open(&device, &handle, None, Some(&kept)).unwrap());
        drop((first, same));
        assert_eq!((driver.get("imports"), driver.count("cuIpcOpenMemHandle")), (1, 1), "it is kept");
        drop(kept);
        assert_eq!((driver.get("imports"), imports.lock().slots.len()), (0, 0));
    }

    #[test]
    fn the_end_of_a_load_is_waited_for_and_what_was_kept_is_closed_before_the_handle_is_opened_anew() {
        let (driver, device, mut other, handle) = start();
        let imports = Arc::new(Imports::default());
        let first = imports.open(&device, &handle, allocation(1), None).unwrap();
        let kept = first.keep();
        other.tell("remake");
        assert_eq!(unhex(&other.answer("handle")), handle.bytes);
        let second = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| imports.open(&device, &handle, None, None));
            drop(first);
            waiting.join().unwrap().unwrap()
        });
        // Opened as long as the first was, it would be that: the double maps a handle once.
        assert_eq!((driver.get("imports"), driver.count("cuIpcCloseMemHandle")), (1, 1));
        assert_eq!(kept.block(0, 1).unwrap_err().code(), Code::InvalidArgument, "it is gone");
        drop(kept);
        assert_eq!(driver.get("imports"), 1, "it closes nothing that it did not keep");
        assert!(second.block(1000, 1).is_err() && second.block(999, 1).is_ok());
        drop(second);
        assert_eq!(driver.get("imports"), 0);
    }

    #[test]
    fn a_handle_that_cannot_be_opened_leaves_nothing() {
        let (driver, device, _other, handle) = start();
        let imports = Arc::new(Imports::default());
        for code in [1, 999] {
            driver.fail("cuIpcOpenMemHandle", 1, code);
            let expected = if code == 1 { Code::InvalidArgument } else { Code::Internal };
            assert_eq!(imports.open(&device, &handle, None, None).unwrap_err().code(), expected);
            assert!(imports.lock().slots.is_empty());
        }
        drop(imports.open(&device, &handle, None, None).unwrap());
        assert!(imports.lock().slots.is_empty());
    }
}
