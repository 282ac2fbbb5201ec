//! What a device refuses.

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
