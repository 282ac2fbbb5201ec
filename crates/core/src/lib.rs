//! Checkpoint store and loader for large models.

mod checkpoint;
mod control;
mod device;
mod dtype;
mod error;
mod format;
mod plan;

pub use checkpoint::{Checkpoint, ChunkSums, DataFile, Layout, OpenOptions, TensorInfo};
pub use control::{Cancel, Control, Progress};
pub use device::DeviceError;
pub use dtype::Dtype;
pub use error::{CorruptChunk, Error, ErrorKind, FormatError, Result};
pub use format::PAGE;
pub use plan::{BlockSpec, Filter, LoadPlan, Piece, PieceCopy, Placed, Placement, PlanOptions, Segment};
