//! What a device refuses.

use std::path::PathBuf;

/// A device that failed, refused, or is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver's library cannot be loaded.
    #[error("there is no CUDA driver (libcuda.so.1) here: install it, or load to the host")]
    NoDriver,
    /// No device of this ordinal.
    #[error("there is no device cuda:{ordinal}: {count} are visible (CUDA_VISIBLE_DEVICES)")]
    NoSuchDevice {
        /// The ordinal asked for.
        ordinal: usize,
        /// Devices visible.
        count: usize,
    },
    /// No visible device has this UUID.
    #[error("there is no device with the UUID {uuid}: {count} are visible (CUDA_VISIBLE_DEVICES)")]
    NoSuchUuid {
        /// The UUID asked for.
        uuid: String,
        /// Devices visible.
        count: usize,
    },
    /// Memory that cannot be given to another process, such as torch's expandable segments.
    #[error(
        "{device}: its memory cannot be shared with another process: {reason}. If it is torch's, turn expandable \
         segments off (PYTORCH_CUDA_ALLOC_CONF)"
    )]
    NotShareable {
        /// The device.
        device: String,
        /// Why not.
        reason: String,
    },
    /// A handle of another process's memory that leads nowhere.
    #[error(
        "{device}: another process's memory cannot be opened: {reason}. The process may have ended or freed it, or it \
         is memory of another device or of this process"
    )]
    NotOpened {
        /// The device.
        device: String,
        /// Why not.
        reason: String,
    },
    /// A block outside another process's memory.
    #[error("{device}: {len} bytes from {offset} are not inside the {whole} bytes that another process shares")]
    OutsideShared {
        /// The device.
        device: String,
        /// Where the block was to begin.
        offset: u64,
        /// Its bytes.
        len: u64,
        /// Bytes that are shared.
        whole: u64,
    },
    /// Too little memory, said before anything moves.
    #[error("{device}: {need} bytes are needed and {free} are free")]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes needed.
        need: u64,
        /// Bytes free.
        free: u64,
    },
    /// The driver refused a call.
    #[error("{device}: cannot {what}: {name} ({code})")]
    Driver {
        /// The device.
        device: String,
        /// What was tried.
        what: &'static str,
        /// The driver's name for it, such as `CUDA_ERROR_ECC_UNCORRECTABLE`.
        name: String,
        /// Its number.
        code: u32,
    },
    /// A device that takes no checksums.
    #[error("{device} takes no checksums: {reason}")]
    NoSums {
        /// The device.
        device: String,
        /// Why not.
        reason: String,
    },
    /// Bytes that are right in their file, and wrong on the device.
    #[error(
        "chunk {chunk} of {} is right in the file and has other bytes on {device}: they were changed in memory or on the \
         way. Load again; if it happens again, test memory and device", path.display()
    )]
    Altered {
        /// The device.
        device: String,
        /// The data file.
        path: PathBuf,
        /// The chunk's number in that file.
        chunk: u64,
    },
    /// The process was forked after CUDA was initialised.
    #[error("{device}: this process was forked after CUDA was initialised, which CUDA forbids: use spawn")]
    Forked {
        /// The device.
        device: String,
    },
    /// File pages that were registered are gone.
    #[error("file pages went away while they were copied")]
    PagesGone,
    /// The system refused to copy file pages.
    #[error("file pages cannot be copied: {0}")]
    PagesRefused(String),
    /// A copy outside its source or its block; nothing was copied.
    #[error("a copy lies outside its source or its block")]
    OutOfBounds,
}

impl DeviceError {
    /// Whether the device had too little memory.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, DeviceError::OutOfMemory { .. })
    }
}
