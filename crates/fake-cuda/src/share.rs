//! Device memory that another process opens.
//!
//! Memory that is exported moves into a memory file, which the handle tells by its name among the files that the exporter
//! has open. So nothing is left when the exporter is killed: a handle of a process that is gone leads nowhere.
//!
//! A handle tells no more than process, address and length, as if the driver had forgotten what it freed: memory that is
//! freed and made again has the same one. Who has the old memory open gets that when it opens the handle again.

use crate::codes::{self, Code};
use crate::mapping::{Mapping, PAGE};
use crate::state::{Allocation, Holder, State};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes of a handle.
pub(crate) const HANDLE_LEN: usize = 64;
/// What every handle begins with.
const MAGIC: [u8; 8] = *b"fakeipc2";

/// What a handle tells: which memory of which process, and what must be true of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Handle {
    pid: u64,
    /// When the process started, since process numbers are used again.
    started: u64,
    address: u64,
    len: u64,
    uuid: [u8; 16],
}

impl Handle {
    /// Magic, process, its start, address, length, UUID and a checksum, without gaps.
    fn encode(&self) -> [u8; HANDLE_LEN] {
        let mut bytes = [0; HANDLE_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.pid.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.started.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.address.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.len.to_le_bytes());
        bytes[40..56].copy_from_slice(&self.uuid);
        let sum = checksum(&bytes[..56]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None` for bytes that [`Self::encode`] does not make.
    fn decode(bytes: &[u8; HANDLE_LEN]) -> Option<Self> {
        let long = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if bytes[..8] != MAGIC || long(56)? != checksum(&bytes[..56]) {
            return None;
        }
        let uuid = bytes[40..56].try_into().ok()?;
        Some(Self { pid: long(8)?, started: long(16)?, address: long(24)?, len: long(32)?, uuid })
    }

    /// Opens the file that it means.
    fn open(&self) -> Result<File, Code> {
        let process = format!("/proc/{}", self.pid);
        if start_of(Path::new(&process)) != Some(self.started) {
            return Err(codes::MAP_FAILED);
        }
        let len = self.len.checked_next_multiple_of(PAGE as u64);
        let target = format!("/memfd:{} (deleted)", name_of(self.address));
        let files = std::fs::read_dir(format!("{process}/fd")).map_err(|_| codes::MAP_FAILED)?;
        // Asked before it is opened: opening something else could have effects.
        let is_meant = |path: &Path| std::fs::read_link(path).is_ok_and(|link| link == Path::new(&target));
        let path = files.flatten().map(|entry| entry.path()).find(|path| is_meant(path)).ok_or(codes::MAP_FAILED)?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let file = file.map_err(|_| codes::MAP_FAILED)?;
        let data = file.metadata().map_err(|_| codes::MAP_FAILED)?;
        if data.is_file() && Some(data.len()) == len { Ok(file) } else { Err(codes::MAP_FAILED) }
    }
}

/// What the memory file of the allocation at this address is called.
fn name_of(address: u64) -> String {
    format!("fake-cuda-{address:x}")
}

/// When a process started, in ticks since the system did.
fn start_of(process: &Path) -> Option<u64> {
    let stat = std::fs::read_to_string(process.join("stat")).ok()?;
    // The name, which may have spaces and brackets, ends with the last bracket; the start is the 20th field after it.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
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
        if exported.is_none() {
            let name = CString::new(name_of(start as u64)).map_err(|_| codes::UNKNOWN)?;
            *exported = Some(allocation.mapping.share(&name).map_err(|_| codes::OUT_OF_MEMORY)?);
        }
        let started = start_of(Path::new("/proc/self")).ok_or(codes::OPERATING_SYSTEM)?;
        let (pid, address, len) = (u64::from(std::process::id()), start as u64, allocation.len as u64);
        Ok(Handle { pid, started, address, len, uuid }.encode())
    }

    /// Maps what a handle means. One that is open gives what is open, whatever it means by now.
    pub(crate) fn import(&mut self, device: i32, bytes: &[u8; HANDLE_LEN]) -> Result<usize, Code> {
        let handle = Handle::decode(bytes).ok_or(codes::INVALID_VALUE)?;
        if handle.pid == u64::from(std::process::id()) {
            return Err(codes::INVALID_CONTEXT);
        }
        if handle.uuid != uuid(device)? {
            return Err(codes::INVALID_DEVICE);
        }
        for (start, allocation) in &mut self.allocations {
            if let Holder::Another { handle, opened } = &mut allocation.holder
                && handle == bytes
            {
                *opened += 1;
                return Ok(*start);
            }
        }
        let file = handle.open()?;
        let len = usize::try_from(handle.len).map_err(|_| codes::INVALID_VALUE)?;
        let mapping = Mapping::shared(&file, len).map_err(|_| codes::MAP_FAILED)?;
        let (start, id) = (mapping.address(), self.new_id());
        let holder = Holder::Another { handle: *bytes, opened: 1 };
        self.allocations.insert(start, Allocation { len, device, id, mapping, holder });
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
        let handle = Handle { pid: 7, started: 8, address: 9, len: 11, uuid: uuid(12).unwrap() };
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
