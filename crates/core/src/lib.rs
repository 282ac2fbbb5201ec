//! Checkpoint store and loader for large models.

mod checkpoint;
mod control;
mod convert;
mod device;
mod dtype;
mod error;
mod export;
mod format;
mod plan;
mod verify;

pub use checkpoint::{Checkpoint, ChunkSums, DataFile, Layout, OpenOptions, TensorInfo};
pub use control::{Cancel, Control, Progress};
pub use convert::{ConvertOptions, ConvertReport, MemoryTensor, convert, save};
pub use device::DeviceError;
pub use dtype::Dtype;
pub use error::{CorruptChunk, Error, ErrorKind, FormatError, Result};
pub use export::{ExportOptions, ExportReport, export};
pub use format::PAGE;
pub use plan::{BlockSpec, Filter, LoadPlan, Piece, PieceCopy, Placed, Placement, PlanOptions, Segment};
pub use verify::{VerifyOptions, VerifyReport, verify};
