//! Device memory that another process opens.
//!
//! Memory that is exported moves into a memory file, whose place in `/proc` the handle tells. So nothing is left
//! when the exporter is killed: a handle of a process that is gone leads nowhere.

use crate::codes::{self, Code};
use crate::mapping::{Mapping, PAGE};
use crate::state::{Allocation, Holder, State};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

/// Bytes of a handle.
pub(crate) const HANDLE_LEN: usize = 64;
/// What every handle begins with.
const MAGIC: [u8; 8] = *b"fakeipc1";

/// What identifies a file among all that the kernel has: device and inode.
pub(crate) type FileId = (u64, u64);

/// What a handle tells: which file of which process, and what must be true of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Handle {
    pid: u32,
    descriptor: u32,
    file: FileId,
    len: u64,
    uuid: [u8; 16],
}

impl Handle {
    /// Magic, process, descriptor, device, inode, length, UUID and a checksum, without gaps.
    fn encode(&self) -> [u8; HANDLE_LEN] {
        let mut bytes = [0; HANDLE_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.pid.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.descriptor.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.file.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.file.1.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.len.to_le_bytes());
        bytes[40..56].copy_from_slice(&self.uuid);
        let sum = checksum(&bytes[..56]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None` for bytes that [`Self::encode`] does not make.
    fn decode(bytes: &[u8; HANDLE_LEN]) -> Option<Self> {
        let short = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let long = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if bytes[..8] != MAGIC || long(56)? != checksum(&bytes[..56]) {
            return None;
        }
        let uuid = bytes[40..56].try_into().ok()?;
        Some(Self { pid: short(8)?, descriptor: short(12)?, file: (long(16)?, long(24)?), len: long(32)?, uuid })
    }

    /// Opens the file that it means. Descriptors and process numbers are used again, so the file's identity decides.
    fn open(&self) -> Result<File, Code> {
        let path = format!("/proc/{}/fd/{}", self.pid, self.descriptor);
        let len = self.len.checked_next_multiple_of(PAGE as u64);
        let is_meant = |data: &std::fs::Metadata| data.is_file() && id(data) == self.file && Some(data.len()) == len;
        // Asked before it is opened too: opening something else could have effects.
        let before = std::fs::metadata(&path).map_err(|_| codes::MAP_FAILED)?;
        if !is_meant(&before) {
            return Err(codes::MAP_FAILED);
        }
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let file = file.map_err(|_| codes::MAP_FAILED)?;
        let data = file.metadata().map_err(|_| codes::MAP_FAILED)?;
        if is_meant(&data) { Ok(file) } else { Err(codes::MAP_FAILED) }
    }
}

fn id(data: &std::fs::Metadata) -> FileId {
    (data.dev(), data.ino())
}

/// FNV-1a. It tells bytes that were made up or cut from a handle.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// The UUID of a device, the same in all processes.
pub(crate) fn uuid(device: i32) -> Result<[u8; 16], Code> {
    let mut bytes = *b"fake-cuda-gpu-00";
    let index = u8::try_from(device).map_err(|_| codes::INVALID_DEVICE)?;
    bytes[14] += index / 10;
    bytes[15] += index % 10;
    Ok(bytes)
}

impl State {
    /// The handle of the allocation that begins at `start`. Nothing may be in flight there.
    pub(crate) fn export(&mut self, start: usize) -> Result<[u8; HANDLE_LEN], Code> {
        if self.settings.no_ipc {
            return Err(codes::INVALID_VALUE);
        }
        let allocation = self.allocations.get_mut(&start).ok_or(codes::INVALID_VALUE)?;
        let uuid = uuid(allocation.device)?;
        let Holder::Ours { exported } = &mut allocation.holder else {
            return Err(codes::INVALID_VALUE);
        };
        let file = match exported {
            Some(file) => file,
            None => exported.insert(allocation.mapping.share().map_err(|_| codes::OUT_OF_MEMORY)?),
        };
        let data = file.metadata().map_err(|_| codes::OPERATING_SYSTEM)?;
        let descriptor = u32::try_from(file.as_raw_fd()).map_err(|_| codes::OPERATING_SYSTEM)?;
        let (pid, len) = (std::process::id(), allocation.len as u64);
        Ok(Handle { pid, descriptor, file: id(&data), len, uuid }.encode())
    }

    /// Maps what a handle means. Opened again, it has the same address.
    pub(crate) fn import(&mut self, device: i32, handle: &[u8; HANDLE_LEN]) -> Result<usize, Code> {
        let handle = Handle::decode(handle).ok_or(codes::INVALID_VALUE)?;
        if handle.pid == std::process::id() {
            return Err(codes::INVALID_CONTEXT);
        }
        if handle.uuid != uuid(device)? {
            return Err(codes::INVALID_DEVICE);
        }
        for (start, allocation) in &mut self.allocations {
            if let Holder::Another { file, opened } = &mut allocation.holder
                && *file == handle.file
            {
                *opened += 1;
                return Ok(*start);
            }
        }
        let file = handle.open()?;
        let len = usize::try_from(handle.len).map_err(|_| codes::INVALID_VALUE)?;
        let mapping = Mapping::shared(&file, len).map_err(|_| codes::MAP_FAILED)?;
        let start = mapping.address();
        let holder = Holder::Another { file: handle.file, opened: 1 };
        self.allocations.insert(start, Allocation { len, device, mapping, holder });
        Ok(start)
    }

    /// How often the memory that begins at `start` is open, if it is another process's, and its length.
    pub(crate) fn opened(&self, start: usize) -> Option<(u64, usize)> {
        let allocation = self.allocations.get(&start)?;
        match allocation.holder {
            Holder::Another { opened, .. } => Some((opened, allocation.len)),
            Holder::Ours { .. } => None,
        }
    }

    /// Takes one opening back; the last one unmaps. No operation may use the memory then.
    pub(crate) fn close(&mut self, start: usize) -> Result<(), Code> {
        let allocation = self.allocations.get_mut(&start).ok_or(codes::INVALID_VALUE)?;
        let Holder::Another { opened, .. } = &mut allocation.holder else {
            return Err(codes::INVALID_VALUE);
        };
        *opened -= 1;
        if *opened == 0 {
            self.allocations.remove(&start);
        }
        Ok(())
    }

    /// Openings of other processes' memory that were not closed.
    pub(crate) fn imports_now(&self) -> u64 {
        self.allocations.keys().filter_map(|start| self.opened(*start)).map(|(opened, _)| opened).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_with_any_byte_changed_is_refused() {
        let handle = Handle { pid: 7, descriptor: 8, file: (9, 10), len: 11, uuid: uuid(12).unwrap() };
        let bytes = handle.encode();
        assert_eq!(Handle::decode(&bytes), Some(handle));
        for at in 0..HANDLE_LEN {
            let mut wrong = bytes;
            wrong[at] ^= 1;
            assert_eq!(Handle::decode(&wrong), None, "byte {at}");
        }
        assert_eq!(Handle::decode(&[0; HANDLE_LEN]), None);
    }
}
