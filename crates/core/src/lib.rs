//! Checkpoint store and loader for large models.
//!
//! It turns a Hugging Face checkpoint into a chunked, aligned, checksummed store, and moves any checkpoint (store or
//! plain safetensors) to a GPU or to host memory.
//!
//! The way of the data: directory → [`Checkpoint`] → [`LoadPlan`] → a read engine fills a [`HostBuffer`] → a
//! [`Device`] copies it → tensors by name. Five nouns carry it:
//!
//! - [`Checkpoint`]: an opened model directory of any layout; its tensors and where their bytes lie.
//! - [`LoadPlan`]: pure data; which bytes of which files go where.
//! - read engines ([`EngineChoice`]): `uring`, `pread`, `mapped`.
//! - [`BufferPool`] and [`HostBuffer`]: pinned memory, each buffer owned by one holder.
//! - [`Device`]: CUDA or the host.
//!
//! [`Loader`] runs them, and a [`LoadReport`] says what was moved, by which engine and why, and how fast.
//!
//! ```
//! use sllm_core::{Checkpoint, ConvertOptions, Device, Loader, convert};
//!
//! # fn main() -> sllm_core::Result<()> {
//! # let dir = tempfile::tempdir().unwrap();
//! # let source = dir.path().join("model.safetensors");
//! # let json = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
//! # let mut file = (json.len() as u64).to_le_bytes().to_vec();
//! # file.extend(json);
//! # file.extend([1, 2, 3, 4, 5, 6, 7, 8]);
//! # std::fs::write(&source, file).unwrap();
//! # let store = dir.path().join("store");
//! convert(&Checkpoint::open(&source)?, &store, &ConvertOptions::new())?;
//!
//! let checkpoint = Checkpoint::open(&store)?;
//! let loader = Loader::builder().device(Device::host()).verify(true).build()?;
//! let loaded = loader.load(&checkpoint)?;
//! assert_eq!(loaded.tensor("w")?.to_vec()?, [1, 2, 3, 4, 5, 6, 7, 8]);
//! println!("{}", loaded.report());
//! # Ok(())
//! # }
//! ```

mod cache;
mod checkpoint;
mod control;
mod convert;
mod crc;
mod device;
mod dtype;
mod error;
mod export;
mod format;
mod load;
mod numa;
mod plan;
mod pool;
mod prefetch;
mod read;
mod releases;
mod size;
mod small_file;
mod tensor;
mod tensors;
mod threads;
mod verify;

pub use cache::{Cache, CacheUsage};
pub use checkpoint::{Checkpoint, ChunkSums, DataFile, Layout, OpenOptions};
pub use control::{Cancel, Control, Progress, WorkOptions};
pub use convert::{ConvertOptions, ConvertReport, MemoryTensor, convert, interrupted, save};
pub use device::{
    Block, Device, DeviceError, LinkPeak, MemoryFile, Mover, SharedBlock, SharedMemory, format_uuid, parse_uuid,
};
pub use dtype::Dtype;
pub use error::{CorruptChunk, Error, ErrorKind, FormatError, Result};
pub use export::{ExportReport, export};
pub use format::PAGE;
pub use load::{EngineReport, LoadReport, Loaded, Loader, LoaderBuilder, Remote, RemoteReport, Session, TensorView};
pub use plan::{BlockSpec, Filter, LoadPlan, Piece, PieceCopy, Placed, Placement, PlanOptions, Segment, Strided};
pub use pool::{BufferPool, HostBuffer};
pub use prefetch::{PrefetchEnd, PrefetchOptions, PrefetchReport, free_memory, prefetch};
pub use read::EngineChoice;
pub use size::parse_size;
pub use small_file::read_small_file;
pub use tensor::{Shape, TensorInfo, TensorName};
pub use tensors::Tensors;
pub use verify::{VerifyReport, verify};

/// The sizes that a load is cut by, which the simulation of the pipeline (`benches/simulate`) follows. No part of the
/// interface: they change with what is measured.
#[doc(hidden)]
pub mod tuning {
    pub use crate::format::manifest::CHUNK_LEN;
    pub use crate::load::{BUSY, COLD_PIECE_LEN, MAPPED_IN_FLIGHT, MAX_BATCH, PIECE_LEN, PINNED_LEN, batch_len};
    pub use crate::read::WINDOW;
    pub use crate::read::choose::{
        COLD_BUFFERS, MAX_LANES, PREAD_BUFFERS, PREAD_CPUS, URING_LANES, URING_SPARE, cached_lanes,
    };
    pub use crate::read::depth::MOST_READS;
}
