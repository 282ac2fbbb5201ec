//! Tensors on a device.

use std::path::PathBuf;
use std::sync::Arc;

use super::LoadReport;
use crate::checkpoint::Checkpoint;
use crate::device::{Block, Device};
use crate::error::{Error, Result};
use crate::plan::Placed;
use crate::tensor::TensorInfo;
use crate::tensors::Tensors;

/// The tensors of a load. Dropping it frees their memory.
#[derive(Debug)]
pub struct Loaded {
    path: PathBuf,
    /// Those of the checkpoint.
    tensors: Arc<Tensors>,
    /// In the same order.
    placed: Vec<Placed>,
    blocks: Vec<Block>,
    report: LoadReport,
}

/// One tensor on a device.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    info: &'a TensorInfo,
    block: &'a Block,
    offset: u64,
}

impl Loaded {
    pub(super) fn new(checkpoint: &Checkpoint, placed: Vec<Placed>, blocks: Vec<Block>, report: LoadReport) -> Self {
        let (path, tensors) = (checkpoint.path().to_owned(), checkpoint.shared_tensors());
        Loaded { path, tensors, placed, blocks, report }
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let find = |place| self.placed.binary_search_by_key(&place, |placed| placed.tensor).ok();
        match self.tensors.position(name).and_then(find) {
            Some(at) => Ok(self.view(&self.placed[at])),
            None => Err(Error::NoSuchTensor { name: name.to_owned(), path: self.path.clone() }),
        }
    }

    /// All tensors, in the order of the checkpoint's.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.placed.iter().map(|placed| self.view(placed))
    }

    /// What was moved, how, and how fast.
    pub fn report(&self) -> &LoadReport {
        &self.report
    }

    fn view(&self, placed: &Placed) -> TensorView<'_> {
        let Placed { tensor, block, offset } = *placed;
        TensorView { info: &self.tensors[tensor], block: &self.blocks[block], offset }
    }
}

impl<'a> TensorView<'a> {
    /// Its name, dtype, shape and place in the checkpoint.
    pub fn info(&self) -> &'a TensorInfo {
        self.info
    }

    /// Its device.
    pub fn device(&self) -> &'a Device {
        self.block.device()
    }

    /// Its address on the device, a multiple of 256; valid as long as the [`Loaded`]. 0 for a tensor of no bytes.
    pub fn addr(&self) -> u64 {
        if self.info.len == 0 { 0 } else { self.block.addr() + self.offset }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.info.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.info.len == 0
    }

    /// Its bytes, copied to the host.
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let len = usize::try_from(self.info.len).map_err(|_| Error::Invalid("it does not fit the memory".into()))?;
        let mut bytes = vec![0; len];
        self.block.read(self.offset, &mut bytes)?;
        Ok(bytes)
    }
}
