//! Tensors on a device.

use super::LoadReport;
use crate::checkpoint::Checkpoint;
use crate::device::{Block, Device};
use crate::error::{Error, Result};
use crate::plan::Placement;
use crate::tensor::TensorInfo;

/// The tensors of a load. Dropping it frees their memory.
#[derive(Debug)]
pub struct Loaded {
    path: std::path::PathBuf,
    /// By ascending name.
    tensors: Vec<(TensorInfo, usize, u64)>,
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
    pub(super) fn new(checkpoint: &Checkpoint, placement: &Placement, blocks: Vec<Block>, report: LoadReport) -> Self {
        let tensor =
            |placed: &crate::plan::Placed| (checkpoint.tensors()[placed.tensor].clone(), placed.block, placed.offset);
        let mut tensors: Vec<_> = placement.tensors.iter().map(tensor).collect();
        tensors.sort_unstable_by(|a, b| a.0.name.cmp(&b.0.name));
        Loaded { path: checkpoint.path().to_owned(), tensors, blocks, report }
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        match self.tensors.binary_search_by(|(info, ..)| info.name.as_str().cmp(name)) {
            Ok(i) => Ok(self.view(&self.tensors[i])),
            Err(_) => Err(Error::NoSuchTensor { name: name.to_owned(), path: self.path.clone() }),
        }
    }

    /// All tensors, by ascending name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|tensor| self.view(tensor))
    }

    /// What was moved, how, and how fast.
    pub fn report(&self) -> &LoadReport {
        &self.report
    }

    fn view<'a>(&'a self, (info, block, offset): &'a (TensorInfo, usize, u64)) -> TensorView<'a> {
        TensorView { info, block: &self.blocks[*block], offset: *offset }
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
