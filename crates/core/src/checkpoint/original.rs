//! Opening the original ServerlessLLM directory: `tensor_index.json` and `tensor.data_N`.

use std::path::Path;

use super::store::read_small;
use super::{Checkpoint, DataFile, Layout, Parts, is_there};
use crate::error::{FormatError, Result};
use crate::format::manifest::{MAX_MANIFEST_LEN, Source, SourceFile, data_file_name};
use crate::format::original::{INDEX_NAME, parse};
use crate::tensor::{TensorInfo, TensorName};

pub(super) fn open(dir: &Path) -> Result<Checkpoint> {
    let index_path = dir.join(INDEX_NAME);
    let entries = parse(&index_path, &read_small(&DataFile::open(&index_path, INDEX_NAME, false)?, MAX_MANIFEST_LEN)?)?;

    let mut files = Vec::new();
    // Where each file begins in the concatenation that offsets count over; then its end.
    let mut starts = vec![0u64];
    loop {
        let name = data_file_name(files.len());
        let path = dir.join(&name);
        if !is_there(&path)? {
            break;
        }
        let file = DataFile::open(&path, &name, false)?;
        let end =
            starts[files.len()].checked_add(file.len()).ok_or_else(|| FormatError::new(&path, "it is too long"))?;
        starts.push(end);
        files.push(file);
    }
    let total = starts[files.len()];

    let mut tensors = Vec::with_capacity(entries.len());
    for entry in entries {
        let fail = |reason: String| FormatError::new(&index_path, reason).tensor(&entry.name).at(entry.offset);
        let end = entry.offset + entry.len; // checked by `parse`
        if end > total {
            return Err(fail(format!(
                "it ends at byte {end}, but the {} data files end at {total}: their tail is lost, as the original's \
                 writer does with lengths that are not a multiple of the disk's block; save the model again",
                files.len()
            ))
            .into());
        }
        // The last file that begins at or before the tensor; an empty file holds none of it.
        let file = starts[..files.len()].partition_point(|&start| start <= entry.offset).saturating_sub(1);
        if entry.len > 0 && end > starts[file + 1] {
            return Err(fail(format!("it lies over the end of {}", files[file].name())).into());
        }
        tensors.push(TensorInfo {
            offset: entry.offset - starts.get(file).copied().unwrap_or_default(),
            name: TensorName::own(entry.name),
            dtype: entry.dtype,
            shape: entry.shape[..].into(),
            strides: entry.strides.as_deref().map(|strides| Box::new(strides.into())),
            file,
            len: entry.len,
            shard: 0,
        });
    }
    let shard = SourceFile { name: "model.safetensors".into(), metadata: None };
    Checkpoint::from_parts(Parts {
        root: dir.to_owned(),
        layout: Layout::Original,
        files,
        tensors: tensors.into(),
        names_differ: true,
        are_in_line: false,
        sums: None,
        identity: None,
        origin: Source { layout: "original".into(), files: vec![shard], index: None, seen: None },
        told_by: index_path,
    })
}
