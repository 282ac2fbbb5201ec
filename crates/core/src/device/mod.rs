//! Where tensors go: a CUDA device, or the host. The host device is the oracle of the CUDA one.
//!
//! A copy owns its source: `copy` takes the filled buffer and gives a [`Pending`], which gives it back when
//! the device has read it. So no buffer can be refilled too early.

mod cuda;
mod error;
mod host;
mod ipc;
mod link;
mod memory_file;
mod mover;
mod stream;
mod sums;

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use error::DeviceError;
pub use ipc::{SharedBlock, SharedMemory, format_uuid, parse_uuid};
pub use link::LinkPeak;
pub use memory_file::MemoryFile;
pub use mover::Mover;
pub(crate) use stream::{Parcel, Pending, Stream, Summing, copy, stream_of};
pub(crate) use sums::{BackendSums, Part, Run, gaps, summed_by};

use crate::error::{Error, Result};
use crate::plan::PieceCopy;

/// A device. Clones are the same device.
#[derive(Clone)]
pub struct Device(Arc<dyn Backend>);

/// What a kind of device does. Addresses are the device's own.
pub(crate) trait Backend: Send + Sync + fmt::Debug {
    /// `host` or `cuda:0`.
    fn id(&self) -> String;
    /// What it is, for people.
    fn description(&self) -> String;
    /// Whether its memory is host memory that a read may fill.
    fn is_host(&self) -> bool;
    /// What tells its link from others: the card and its place; `None` for the host.
    fn link(&self) -> Result<Option<String>, DeviceError>;
    /// Its PCI address, such as `0000:B1:00.0`; `None` for the host, or where the driver does not tell.
    fn pci_address(&self) -> Option<String> {
        None
    }
    /// What tells it from others in every process; `None` for the host.
    fn uuid(&self) -> Result<Option<[u8; 16]>, DeviceError> {
        Ok(None)
    }
    /// The allocation that holds an address, as other processes may open it.
    fn export(&self, _addr: u64) -> Result<ipc::Exported, DeviceError> {
        let reason = "such memory has no handle".into();
        Err(DeviceError::NotShareable { device: self.id(), reason })
    }
    /// Opens another process's allocation. Also gives its length.
    fn open_shared(&self, _handle: &[u8; ipc::HANDLE_LEN]) -> Result<(Box<dyn Memory>, u64), DeviceError> {
        let reason = "handles are for memory of CUDA devices".into();
        Err(DeviceError::NotOpened { device: self.id(), reason })
    }
    /// Free and total bytes; `None` where that is not known.
    fn memory(&self) -> Result<Option<(u64, u64)>, DeviceError>;
    /// Memory aligned to 256 bytes and more.
    fn alloc(&self, len: usize) -> Result<Box<dyn Memory>, DeviceError>;
    /// A queue of copies that run in order.
    fn stream(&self) -> Result<Box<dyn BackendStream>, DeviceError>;
    /// Makes it ready to take checksums of what is copied to it. Whether it is of a kind that does; an error where it cannot.
    fn prepare_sums(&self) -> Result<bool, DeviceError> {
        Ok(false)
    }
    /// Pins host memory for every context.
    ///
    /// # Safety
    /// The range stays mapped until `unpin`.
    unsafe fn pin(&self, ptr: *mut u8, len: usize, read_only: bool) -> Result<(), DeviceError>;
    /// Unpins what was pinned at this address; waits for copies out of it.
    ///
    /// # Safety
    /// The range is mapped.
    unsafe fn unpin(&self, ptr: *mut u8);
    /// Copies device memory to the host and waits.
    ///
    /// # Safety
    /// The range belongs to a live allocation of this device.
    unsafe fn read_back(&self, addr: u64, out: &mut [u8]) -> Result<(), DeviceError>;
}

/// An allocation, freed when dropped.
pub(crate) trait Memory: Send + Sync + fmt::Debug {
    fn addr(&self) -> u64;
}

/// A queue of copies.
pub(crate) trait BackendStream: Send + Sync + fmt::Debug {
    /// Issues copies out of host memory, or out of the device's own. They may be done in any order.
    ///
    /// # Safety
    /// Source rows and destination rows lie in live memory, which stays so, the source unchanged, until the work
    /// issued so far is done.
    unsafe fn copy(&self, copies: &[StreamCopy]) -> Result<(), DeviceError>;
    /// A mark after the work issued so far.
    fn mark(&self) -> Result<Box<dyn Mark>, DeviceError>;
    /// What takes checksums of what it brings; `None` where the device never does.
    fn sums(&self) -> Result<Option<Box<dyn BackendSums>>, DeviceError> {
        Ok(None)
    }
    /// Waits for all work.
    fn synchronize(&self) -> Result<(), DeviceError>;
}

/// A point in a stream's work.
pub(crate) trait Mark: Send + Sync + fmt::Debug {
    fn is_done(&self) -> bool;
    fn wait(&self) -> Result<(), DeviceError>;
}

/// A copy with its addresses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamCopy {
    source: Source,
    /// Address of the first row on the device.
    dst: u64,
    /// Its rows; offsets are in the addresses already.
    rows: PieceCopy,
}

/// Where a copy's bytes are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    /// Memory that the processor may read.
    Buffer(*const u8),
    /// The same, pinned.
    Pinned(*const u8),
    /// Pages of a file. They may be cut off, so that only the device or the kernel may read them.
    FilePages(*const u8),
    /// Memory of the device that is copied to.
    Device(u64),
}

impl Device {
    pub(crate) fn new(backend: impl Backend + 'static) -> Device {
        Device(Arc::new(backend))
    }

    /// The host's memory.
    pub fn host() -> Device {
        Device::new(host::Host::new("/"))
    }

    /// The CUDA device of this ordinal, by its primary context, which torch uses too.
    pub fn cuda(ordinal: usize) -> Result<Device> {
        Ok(Device::new(cuda::Cuda::open(ordinal)?))
    }

    /// Number of CUDA devices; 0 without a driver, and where it fails.
    pub fn cuda_count() -> usize {
        cuda::count().unwrap_or(0)
    }

    /// Number of CUDA devices; 0 without a driver. An error where there is a driver that fails, as one that is not ready yet.
    pub fn try_cuda_count() -> Result<usize> {
        match cuda::count() {
            Err(DeviceError::NoDriver | DeviceError::NoSuchDevice { .. }) => Ok(0),
            count => Ok(count?),
        }
    }

    /// The first CUDA device if there is one, else the host; and the error of a driver that is there and fails, for which
    /// it is the host.
    pub fn auto() -> Result<(Device, Option<Error>)> {
        match Device::try_cuda_count() {
            Ok(0) => Ok((Device::host(), None)),
            Ok(_) => Ok((Device::cuda(0)?, None)),
            Err(error) => Ok((Device::host(), Some(error))),
        }
    }

    /// `host` or `cpu`, `cuda`, `cuda:1`, or `auto`: see [`Device::auto`], which also tells of a driver that fails.
    pub fn parse(name: &str) -> Result<Device> {
        match name {
            "host" | "cpu" => Ok(Device::host()),
            "cuda" => Device::cuda(0),
            "auto" => Ok(Device::auto()?.0),
            _ => {
                let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
                let wrong = || Error::Invalid(format!("{name:?} is not a device: give host, cuda, cuda:N or auto"));
                Device::cuda(ordinal.ok_or_else(wrong)?)
            }
        }
    }

    /// `host` or `cuda:0`.
    pub fn id(&self) -> String {
        self.0.id()
    }

    /// What it is, such as the card's name.
    pub fn description(&self) -> String {
        self.0.description()
    }

    /// Whether its memory is host memory.
    pub fn is_host(&self) -> bool {
        self.0.is_host()
    }

    /// Free and total memory in bytes; `None` where that is not known.
    pub fn memory(&self) -> Result<Option<(u64, u64)>> {
        Ok(self.0.memory()?)
    }

    /// Its PCI address, such as `0000:B1:00.0`; `None` for the host, or where it is not known.
    pub(crate) fn pci_address(&self) -> Option<String> {
        self.0.pci_address()
    }

    pub(crate) fn needs_pinning(&self) -> bool {
        !self.is_host()
    }

    pub(crate) fn stream(&self) -> Result<Stream> {
        Ok(Stream { stream: self.0.stream()?, sums: None, device: self.clone() })
    }

    /// Makes it ready to take checksums of what is copied to it, the first time. Whether it is of a kind that does; an error
    /// where it cannot.
    pub(crate) fn prepare_sums(&self) -> Result<bool, DeviceError> {
        self.0.prepare_sums()
    }

    /// Pins host memory.
    ///
    /// # Safety
    /// The range stays mapped until `unpin`.
    pub(crate) unsafe fn pin(&self, ptr: *mut u8, len: usize, read_only: bool) -> Result<(), DeviceError> {
        // SAFETY: the caller's word.
        unsafe { self.0.pin(ptr, len, read_only) }
    }

    /// Unpins what was pinned at this address.
    ///
    /// # Safety
    /// The range is mapped.
    pub(crate) unsafe fn unpin(&self, ptr: *mut u8) {
        // SAFETY: the caller's word.
        unsafe { self.0.unpin(ptr) }
    }

    pub(crate) fn same_as(&self, other: &Device) -> bool {
        // Most are clones, which need no names.
        Arc::ptr_eq(&self.0, &other.0) || self.id() == other.id()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.id())
    }
}

/// A block of device memory. Clones are the same block; the last one frees it, if it is ours.
#[derive(Clone, Debug)]
pub struct Block {
    device: Device,
    addr: u64,
    len: u64,
    memory: Option<Arc<dyn Memory>>,
    loading: Arc<AtomicBool>,
}

/// A block's right to be loaded into, given to one load at a time.
#[derive(Debug)]
pub(crate) struct Claim(Arc<AtomicBool>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Block {
    /// Allocates `len` bytes. Their contents are undefined.
    pub fn alloc(device: &Device, len: u64) -> Result<Block> {
        let bytes = usize::try_from(len).map_err(|_| Error::Invalid(format!("{len} bytes do not fit an address")))?;
        if bytes == 0 {
            return Ok(Block { device: device.clone(), addr: 0, len, memory: None, loading: Arc::default() });
        }
        let memory: Arc<dyn Memory> = device.0.alloc(bytes)?.into();
        Ok(Block { device: device.clone(), addr: memory.addr(), len, memory: Some(memory), loading: Arc::default() })
    }

    /// A block that somebody else allocated, such as torch.
    ///
    /// # Safety
    /// `addr..addr+len` is memory of `device` that stays allocated, and is not used, while a load into it runs.
    pub unsafe fn from_raw(device: &Device, addr: u64, len: u64) -> Block {
        if let (true, Ok(addr), Ok(len)) = (device.is_host(), usize::try_from(addr), usize::try_from(len)) {
            crate::pool::ask_for_huge_pages(addr, len);
        }
        Block { device: device.clone(), addr, len, memory: None, loading: Arc::default() }
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its address on the device.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes it for a load; `None` while another load has it.
    pub(crate) fn claim(&self) -> Option<Claim> {
        let taken = self.loading.swap(true, Ordering::Acquire);
        (!taken).then(|| Claim(Arc::clone(&self.loading)))
    }

    /// Whether two blocks are the same memory.
    pub(crate) fn is_same_as(&self, other: &Block) -> bool {
        (self.addr, self.len) == (other.addr, other.len) && self.device.same_as(&other.device)
    }

    /// Whether two of these blocks share a byte.
    pub(crate) fn any_overlap(blocks: &[Block]) -> bool {
        let place = |block: &Block| (block.device.id(), block.addr, block.addr.saturating_add(block.len));
        let mut places: Vec<_> = blocks.iter().filter(|block| !block.is_empty()).map(place).collect();
        places.sort_unstable();
        // Where two overlap, one of them overlaps its neighbour in this order.
        places.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2)
    }

    /// Copies a range of an allocated block to the host, and waits.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        if self.memory.is_none() || offset.checked_add(out.len() as u64).is_none_or(|end| end > self.len) {
            return Err(Error::Invalid("the range is not inside an allocated block".into()));
        }
        // SAFETY: the range was checked, and `memory` keeps it allocated.
        Ok(unsafe { self.device.0.read_back(self.addr + offset, out) }?)
    }

    /// A part of a block in host memory as a buffer that a read may fill. The plan gives every part out once.
    pub(crate) fn loan(&self, offset: u64, len: usize) -> Option<crate::pool::HostBuffer> {
        if !self.device.is_host() || offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return None;
        }
        let ptr = std::ptr::NonNull::new(usize::try_from(self.addr + offset).ok()? as *mut u8)?;
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(self.memory.clone());
        // SAFETY: inside the block, which `owner` or the caller of `from_raw` keeps; a plan's destinations do not
        // overlap, and nobody else writes to a block that is being loaded.
        Some(unsafe { crate::pool::HostBuffer::loan(ptr, len, owner) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that is only a name.
    #[derive(Debug)]
    struct Named(&'static str);

    impl Backend for Named {
        fn id(&self) -> String {
            self.0.into()
        }
        fn description(&self) -> String {
            self.0.into()
        }
        fn is_host(&self) -> bool {
            false
        }
        fn link(&self) -> Result<Option<String>, DeviceError> {
            Ok(None)
        }
        fn memory(&self) -> Result<Option<(u64, u64)>, DeviceError> {
            Ok(None)
        }
        fn alloc(&self, _len: usize) -> Result<Box<dyn Memory>, DeviceError> {
            Err(DeviceError::NoDriver)
        }
        fn stream(&self) -> Result<Box<dyn BackendStream>, DeviceError> {
            Err(DeviceError::NoDriver)
        }
        unsafe fn pin(&self, _ptr: *mut u8, _len: usize, _read_only: bool) -> Result<(), DeviceError> {
            Err(DeviceError::NoDriver)
        }
        unsafe fn unpin(&self, _ptr: *mut u8) {}
        unsafe fn read_back(&self, _addr: u64, _out: &mut [u8]) -> Result<(), DeviceError> {
            Err(DeviceError::NoDriver)
        }
    }

    #[test]
    fn blocks_overlap_where_they_share_a_byte_of_one_device() {
        let (a, b) = (Device::new(Named("a")), Device::new(Named("b")));
        let overlap = |blocks: &[(&Device, u64, u64)]| {
            let block = |&(device, addr, len): &(&Device, u64, u64)| {
                let (device, loading) = (device.clone(), Arc::default());
                Block { device, addr, len, memory: None, loading }
            };
            Block::any_overlap(&blocks.iter().map(block).collect::<Vec<_>>())
        };
        assert!(!overlap(&[]));
        assert!(!overlap(&[(&a, 10, 10), (&a, 0, 10), (&a, 20, 10)]), "neighbours");
        assert!(overlap(&[(&a, 10, 10), (&a, 0, 11)]));
        assert!(overlap(&[(&a, 0, 10), (&a, 0, 10)]), "the same");
        assert!(overlap(&[(&a, 50, 1), (&a, 0, 100), (&a, 99, 5)]), "one inside another");
        assert!(!overlap(&[(&a, 0, 10), (&b, 5, 10)]), "another device");
        assert!(overlap(&[(&b, 5, 1), (&a, 0, 10), (&b, 0, 10)]));
        assert!(!overlap(&[(&a, 0, 10), (&a, 5, 0), (&a, 0, 0)]), "what is empty shares nothing");
        assert!(overlap(&[(&a, u64::MAX - 1, 10), (&a, u64::MAX - 2, 2)]));
        let many: Vec<_> = (0..100_000).map(|i| (&a, i * 7919 % 100_000 * 16, 16)).collect();
        assert!(!overlap(&many));
        assert!(overlap(&[&many[..], &[(&a, 800_001, 1)]].concat()));
    }
}
