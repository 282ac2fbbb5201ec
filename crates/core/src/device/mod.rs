//! Where tensors go.

/// A device that refused something.
#[derive(Debug, thiserror::Error)]
#[error("device")]
pub struct DeviceError;

impl DeviceError {
    /// Whether the device had too little memory.
    pub fn is_out_of_memory(&self) -> bool {
        false
    }
}
