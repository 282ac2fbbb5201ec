//! Opening our own store.

use std::path::Path;

use super::{Checkpoint, ChunkSums, DataFile, Layout, Origin, Parts, TensorInfo};
use crate::error::{FormatError, Result};
use crate::format::manifest::{MANIFEST_NAME, MAX_MANIFEST_LEN, Manifest, data_file_name};

pub(super) fn open(dir: &Path) -> Result<Checkpoint> {
    let manifest_path = dir.join(MANIFEST_NAME);
    let json = read_small(&DataFile::open(&manifest_path, MANIFEST_NAME, false)?, MAX_MANIFEST_LEN)?;
    let manifest = Manifest::parse(&manifest_path, &json)?;

    let mut files = Vec::with_capacity(manifest.files.len());
    for (k, entry) in manifest.files.iter().enumerate() {
        let name = data_file_name(k);
        let file = DataFile::open(&dir.join(&name), &name, false)?;
        if file.len() != entry.len {
            let reason = format!("it has {} bytes, but the manifest says {}", file.len(), entry.len);
            return Err(FormatError::new(file.path(), reason).at(file.len().min(entry.len)).into());
        }
        files.push(file);
    }
    let origin = Origin::from(&manifest);
    let sums = ChunkSums {
        chunk_len: manifest.chunk_len,
        files: manifest.files.into_iter().map(|file| file.crc64.0).collect(),
    };
    let tensors = manifest.tensors.into_iter().map(|t| TensorInfo {
        name: t.name,
        dtype: t.dtype,
        shape: t.shape,
        strides: t.strides,
        file: t.file,
        offset: t.offset,
        len: t.len,
        shard: t.shard,
    });
    Checkpoint::from_parts(Parts {
        root: dir.to_owned(),
        layout: Layout::Store,
        files,
        tensors: tensors.collect(),
        sums: Some(sums),
        identity: Some(manifest.identity),
        origin,
        told_by: manifest_path,
    })
}

/// A whole file of at most `limit` bytes.
pub(super) fn read_small(file: &DataFile, limit: u64) -> Result<Vec<u8>> {
    let len = usize::try_from(file.len()).ok().filter(|_| file.len() <= limit).ok_or_else(|| {
        FormatError::new(file.path(), format!("it has {} bytes, more than the {limit} that are read", file.len()))
    })?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
