//! Device memory that two processes share: one exports it, another opens it and loads into it.
//!
//! A handle says which memory on which card, not which card this is called here: devices are told by their UUIDs, since
//! two processes may number them differently (`CUDA_VISIBLE_DEVICES`).

use std::fmt::Write;
use std::sync::Arc;

use super::{Block, Device, DeviceError, Memory, cuda};
use crate::error::{Error, Result};

/// Bytes of the driver's handle.
pub(crate) const HANDLE_LEN: usize = 64;

/// Hexadecimal digits of each group of a UUID.
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

/// A block as another process may find it. Who has the handle can write to the whole allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedBlock {
    /// The driver's handle of the allocation that the block lies in.
    pub handle: [u8; HANDLE_LEN],
    /// Bytes of that allocation.
    pub base_len: u64,
    /// Where in it the block begins.
    pub offset: u64,
    /// Bytes of the block.
    pub len: u64,
    /// The driver's number of that allocation, which no other one of this process has or had; `None` where it tells none.
    ///
    /// An allocation that is freed and made again may have the address and the handle of the first: who keeps anything by
    /// a handle compares this too.
    pub buffer_id: Option<u64>,
}

/// An allocation as the driver knows it.
#[derive(Debug)]
pub(crate) struct Exported {
    pub(crate) handle: [u8; HANDLE_LEN],
    pub(crate) base: u64,
    pub(crate) base_len: u64,
    pub(crate) buffer_id: Option<u64>,
}

/// Another process's device memory, open here. The last clone or block closes it.
#[derive(Debug, Clone)]
pub struct SharedMemory {
    device: Device,
    memory: Arc<dyn Memory>,
    len: u64,
}

impl Device {
    /// The CUDA device with this UUID; makes no context on any other.
    pub fn cuda_by_uuid(uuid: &[u8; 16]) -> Result<Device> {
        let count = cuda::count()?;
        for ordinal in 0..count {
            if cuda::uuid_of(ordinal)? == *uuid {
                return Device::cuda(ordinal);
            }
        }
        Err(DeviceError::NoSuchUuid { uuid: format_uuid(uuid), count }.into())
    }

    /// Its UUID, the same in every process; `None` for the host.
    pub fn uuid(&self) -> Result<Option<[u8; 16]>> {
        Ok(self.0.uuid()?)
    }
}

impl Block {
    /// What another process needs to open the block; [`DeviceError::NotShareable`] if its memory has no handle.
    ///
    /// The memory must stay allocated until the other process has closed it. Memory of `cuMemCreate`, such as torch's
    /// expandable segments, has no handle.
    pub fn export(&self) -> Result<SharedBlock> {
        let refused = |reason: &str| DeviceError::NotShareable { device: self.device.id(), reason: reason.into() };
        if self.is_empty() {
            return Err(refused("the block is empty").into());
        }
        let found = self.device.0.export(self.addr)?;
        let offset = self.addr.checked_sub(found.base);
        let end = offset.and_then(|offset| offset.checked_add(self.len)).filter(|end| *end <= found.base_len);
        match (offset, end) {
            (Some(offset), Some(_)) => {
                let Exported { handle, base_len, buffer_id, .. } = found;
                Ok(SharedBlock { handle, base_len, offset, len: self.len, buffer_id })
            }
            _ => Err(refused("the block does not lie in one allocation").into()),
        }
    }
}

impl SharedMemory {
    /// Opens another process's memory by its handle; [`DeviceError::NotOpened`] if that leads nowhere.
    ///
    /// `device` is the one that the memory is on. Memory of a peer opens too, and copies to it take the longer way. While a
    /// handle is open, opening it again may give the same memory, also where the other process has freed that and made
    /// other memory with the same handle: close the first ([`SharedBlock::buffer_id`] tells).
    pub fn open(device: &Device, handle: &[u8; HANDLE_LEN]) -> Result<SharedMemory> {
        let (memory, len) = device.0.open_shared(handle)?;
        Ok(SharedMemory { device: device.clone(), memory: memory.into(), len })
    }

    /// A part of it as a block, which keeps the memory open.
    ///
    /// Nothing keeps the other process from using or freeing the memory; that is for the two to agree on.
    pub fn block(&self, offset: u64, len: u64) -> Result<Block> {
        let addr = self.memory.addr().checked_add(offset);
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        let Some(addr) = addr.filter(|_| inside) else {
            return Err(DeviceError::OutsideShared { device: self.device.id(), offset, len, whole: self.len }.into());
        };
        let memory = Some(Arc::clone(&self.memory));
        Ok(Block { device: self.device.clone(), addr, len, memory, loading: Arc::default() })
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of the whole allocation.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes, which no driver gives.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A UUID as `nvidia-smi` prints it, without its `GPU-`: lower-case digits in groups of 8, 4, 4, 4 and 12.
pub fn format_uuid(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in uuid.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}"); // a String takes all
    }
    text
}

/// Reads what [`format_uuid`] writes, with or without `GPU-`, in upper or lower case.
pub fn parse_uuid(text: &str) -> Result<[u8; 16]> {
    let wrong = || Error::Invalid(format!("{text:?} is not a device's UUID: give 8-4-4-4-12 hexadecimal digits"));
    let bare = match text.split_at_checked(4) {
        Some((prefix, rest)) if prefix.eq_ignore_ascii_case("GPU-") => rest,
        _ => text,
    };
    let mut groups = bare.split('-');
    let mut digits = Vec::with_capacity(32);
    for len in GROUPS {
        let group = groups.next().filter(|group| group.len() == len).ok_or_else(wrong)?;
        digits.extend(group.chars().map(|digit| digit.to_digit(16)));
    }
    let mut uuid = [0; 16];
    if groups.next().is_some() || digits.len() != 2 * uuid.len() {
        return Err(wrong());
    }
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        let value = pair.iter().try_fold(0, |value, digit| Some(value << 4 | (*digit)?));
        *byte = value.and_then(|value| u8::try_from(value).ok()).ok_or_else(wrong)?;
    }
    Ok(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] =
        [0x0f, 0x1e, 0x2d, 0x3c, 0x4b, 0x5a, 0x69, 0x78, 0x87, 0x96, 0xa5, 0xb4, 0xc3, 0xd2, 0xe1, 0xf0];

    #[test]
    fn a_uuid_is_read_as_it_is_written_in_any_case_with_or_without_its_prefix() {
        let text = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";
        assert_eq!(format_uuid(&UUID), text);
        for text in [text.to_owned(), format!("GPU-{text}"), format!("gpu-{text}"), text.to_uppercase()] {
            assert_eq!(parse_uuid(&text).unwrap(), UUID, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_uuid_is_refused() {
        let good = format_uuid(&UUID);
        let mut wrong = vec![String::new(), "GPU-".into(), "ünïcödé".into(), good.replace('-', "")];
        wrong.extend([format!("GPU-GPU-{good}"), format!("{good}-"), format!("-{good}"), format!("{good}0")]);
        wrong.extend([format!(" {good}"), format!("MIG-{good}"), good.replace('f', "g"), good.replace("0f", "+f")]);
        wrong.extend([good.replace("0f1e2d3c-", "0f1e2d3-c"), good.replace("0f", "é"), good[..35].into()]);
        for text in wrong {
            assert!(parse_uuid(&text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn host_memory_is_neither_exported_nor_opened() {
        let host = Device::host();
        assert_eq!(host.uuid().unwrap(), None);
        let exported = Block::alloc(&host, 100).unwrap().export().unwrap_err();
        assert!(matches!(exported, Error::Device(DeviceError::NotShareable { .. })), "{exported}");
        let opened = SharedMemory::open(&host, &[0; HANDLE_LEN]).unwrap_err();
        assert!(matches!(opened, Error::Device(DeviceError::NotOpened { .. })), "{opened}");
    }
}
