//! Where each tensor of a checkpoint goes when a whole model, or a part of it, is loaded into blocks of its own.

use glob::Pattern;

use super::Segment;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::format::PAGE;
use crate::format::manifest::LARGE_TENSOR;
use crate::tensor::TensorInfo;

/// Alignment of a tensor in its block, in bytes: what a CUDA allocation gives and kernels expect.
const ALIGN: u64 = 256;

/// Which tensors of a checkpoint are wanted, by name or glob (`*`, `?`, `[abc]`).
#[derive(Debug, Clone, Default)]
pub struct Filter {
    patterns: Vec<Pattern>,
}

impl Filter {
    /// All tensors.
    pub fn all() -> Filter {
        Filter::default()
    }

    /// The tensors that match any of these names or globs.
    pub fn globs<I: IntoIterator<Item = S>, S: AsRef<str>>(patterns: I) -> Result<Filter> {
        let parse = |pattern: S| {
            let pattern = pattern.as_ref();
            Pattern::new(pattern).map_err(|e| Error::Invalid(format!("{pattern:?} is not a glob: {e}")))
        };
        let patterns: Vec<Pattern> = patterns.into_iter().map(parse).collect::<Result<_>>()?;
        if patterns.is_empty() {
            return Err(Error::Invalid("no tensor is asked for: the list of globs is empty".into()));
        }
        Ok(Filter { patterns })
    }

    /// Places in [`Checkpoint::tensors`] of the wanted ones. A glob that matches none is an error.
    pub fn select(&self, checkpoint: &Checkpoint) -> Result<Vec<usize>> {
        if self.patterns.is_empty() {
            return Ok((0..checkpoint.tensors().len()).collect());
        }
        let mut used = vec![false; self.patterns.len()];
        let mut selected = Vec::new();
        for (i, tensor) in checkpoint.tensors().iter().enumerate() {
            let mut wanted = false;
            for (pattern, used) in self.patterns.iter().zip(&mut used) {
                // A name may hold brackets or stars itself, so that it is also tried as it stands.
                if tensor.name == pattern.as_str() || pattern.matches(&tensor.name) {
                    (wanted, *used) = (true, true);
                }
            }
            if wanted {
                selected.push(i);
            }
        }
        match self.patterns.iter().zip(used).find(|(_, used)| !used) {
            Some((pattern, _)) => {
                Err(Error::NoSuchTensor { name: pattern.as_str().to_owned(), path: checkpoint.path().to_owned() })
            }
            None => Ok(selected),
        }
    }
}

/// One block of device memory that a placement needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSpec {
    /// Place of the device in the loader's list.
    pub device: usize,
    /// Bytes.
    pub len: u64,
}

/// One tensor's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Place in [`Checkpoint::tensors`].
    pub tensor: usize,
    /// Place in [`Placement::blocks`].
    pub block: usize,
    /// First byte in the block, a multiple of 256; 0 for a tensor of no bytes.
    pub offset: u64,
}

/// One block a device, and every wanted tensor's place in it.
///
/// Tensors keep the distances that they have in their file where those are small and keep the alignment, so that many
/// tensors are one copy. Tied tensors share a place.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    /// The blocks, one for each device that gets a tensor.
    pub blocks: Vec<BlockSpec>,
    /// The tensors, in the order of their files.
    pub tensors: Vec<Placed>,
    /// The bytes to be moved.
    pub segments: Vec<Segment>,
}

/// The end of what has been placed in a block.
struct Cursor {
    block: usize,
    end: u64,
    /// Place in `segments` of the one that ends there, which may be lengthened.
    segment: usize,
}

/// Where a tensor that begins a segment goes: the first free place at a multiple of [`ALIGN`], and, for a large one
/// whose file place allows it, as far into a page as in the file, so that host memory can be read into directly.
fn start_of(tensor: &TensorInfo, free: u64) -> Option<u64> {
    let skew = tensor.offset % PAGE;
    if skew.is_multiple_of(ALIGN) && tensor.len >= LARGE_TENSOR {
        let page = free.saturating_sub(skew).checked_next_multiple_of(PAGE)?;
        return page.checked_add(skew);
    }
    free.checked_next_multiple_of(ALIGN)
}

impl Placement {
    /// Places the selected tensors (places in [`Checkpoint::tensors`], ascending, each once); `device_of` gives each one's device (a place in the loader's list).
    pub fn new(
        checkpoint: &Checkpoint,
        selected: impl IntoIterator<Item = usize>,
        mut device_of: impl FnMut(&TensorInfo) -> usize,
    ) -> Result<Placement> {
        let selected = selected.into_iter();
        let mut tensors = checkpoint.tensors().iter().enumerate();
        let mut placement = Placement { tensors: Vec::with_capacity(selected.size_hint().0), ..Placement::default() };
        let mut cursors: Vec<(usize, Cursor)> = Vec::new();
        // Placed tensors of the same bytes, one a device.
        let mut tied: Vec<(usize, &TensorInfo, Placed)> = Vec::new();
        let too_large = || Error::Invalid("the tensors do not fit 64-bit addresses".into());
        for i in selected {
            let missing = || Error::Invalid(format!("there is no tensor number {i}, or it does not come after others"));
            let (_, tensor) = tensors.find(|(place, _)| *place == i).ok_or_else(missing)?;
            let device = device_of(tensor);
            tied.retain(|(_, other, _)| other.is_tied_with(tensor));
            if let Some((.., other)) = tied.iter().find(|(d, ..)| *d == device) {
                placement.tensors.push(Placed { tensor: i, ..*other });
                continue;
            }
            let at = match cursors.iter().position(|(d, _)| *d == device) {
                Some(at) => at,
                None => {
                    let block = placement.blocks.len();
                    placement.blocks.push(BlockSpec { device, len: 0 });
                    cursors.push((device, Cursor { block, end: 0, segment: usize::MAX }));
                    cursors.len() - 1
                }
            };
            let cursor = &mut cursors[at].1;
            if tensor.len == 0 {
                placement.tensors.push(Placed { tensor: i, block: cursor.block, offset: 0 });
                continue;
            }
            let last = placement.segments.get_mut(cursor.segment);
            let near = last.filter(|last| last.file == tensor.file).and_then(|last| {
                let gap = tensor.offset.checked_sub(last.offset + last.row_len).filter(|&gap| gap < PAGE)?;
                let offset = cursor.end.checked_add(gap).filter(|offset| offset % ALIGN == 0)?;
                Some((last, gap, offset))
            });
            let offset = match near {
                Some((last, gap, offset)) => {
                    let len = last.row_len + gap + tensor.len;
                    *last = Segment::contiguous(last.file, last.offset, len, last.block, last.dst_offset);
                    offset
                }
                None => {
                    let offset = start_of(tensor, cursor.end).ok_or_else(too_large)?;
                    cursor.segment = placement.segments.len();
                    let segment = Segment::contiguous(tensor.file, tensor.offset, tensor.len, cursor.block, offset);
                    placement.segments.push(segment);
                    offset
                }
            };
            cursor.end = offset.checked_add(tensor.len).ok_or_else(too_large)?;
            let placed = Placed { tensor: i, block: cursor.block, offset };
            placement.tensors.push(placed);
            tied.push((device, tensor, placed));
        }
        for (_, cursor) in cursors {
            placement.blocks[cursor.block].len = cursor.end;
        }
        Ok(placement)
    }

    /// Lengths of the blocks, in bytes.
    pub fn block_lens(&self) -> Vec<u64> {
        self.blocks.iter().map(|block| block.len).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_in_ascending_order_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let entry =
            |i: u64| format!(r#""{i}":{{"dtype":"U8","shape":[256],"data_offsets":[{},{}]}}"#, 256 * i, 256 * i + 256);
        let header = format!("{{{}}}", (0..4).map(entry).collect::<Vec<_>>().join(","));
        std::fs::write(&path, test_support::safetensors(header, &[7; 1024])).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let start = checkpoint.tensors()[0].offset;

        let placement = Placement::new(&checkpoint, [0, 2, 3], |_| 0).unwrap();
        let placed: Vec<_> = placement.tensors.iter().map(|placed| (placed.tensor, placed.offset)).collect();
        assert_eq!(placed, [(0, 0), (2, 512), (3, 768)], "near ones keep their distance");
        assert_eq!(placement.segments, [Segment::contiguous(0, start, 1024, 0, 0)]);
        assert!(Placement::new(&checkpoint, [], |_| 0).unwrap().tensors.is_empty());
        for (bad, told) in [(vec![1, 0], "number 0"), (vec![2, 2], "number 2"), (vec![0, 4], "number 4")] {
            let error = Placement::new(&checkpoint, bad, |_| 0).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
    }
}
