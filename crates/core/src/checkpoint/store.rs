//! Opening our own store.

use std::ops::Deref;
use std::path::Path;

use super::{Checkpoint, ChunkSums, DataFile, Layout, Parts};
use crate::error::{Error, FormatError, Result};
use crate::format::PAGE_BYTES;
use crate::format::manifest::{MANIFEST_NAME, MAX_MANIFEST_LEN, Manifest, data_file_name};
use crate::pool::{BufferPool, HostBuffer};
use crate::tensor::{TensorInfo, TensorName};

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
    let sums = ChunkSums {
        chunk_len: manifest.chunk_len,
        files: manifest.files.into_iter().map(|file| file.crc64.0).collect(),
    };
    let names = TensorName::of_all(manifest.tensors.iter().map(|t| t.name.as_str()));
    let tensors: Vec<TensorInfo> = manifest
        .tensors
        .iter()
        .zip(names)
        .map(|(t, name)| TensorInfo {
            name,
            dtype: t.dtype,
            shape: t.shape[..].into(),
            strides: t.strides.as_deref().map(|strides| Box::new(strides.into())),
            file: t.file,
            offset: t.offset,
            len: t.len,
            shard: t.shard,
        })
        .collect();
    Checkpoint::from_parts(Parts {
        root: dir.to_owned(),
        layout: Layout::Store,
        files,
        tensors: tensors.into(),
        names_differ: false,
        are_in_line: false,
        sums: Some(sums),
        identity: Some(manifest.identity),
        origin: manifest.source,
        told_by: manifest_path,
    })
}

/// The bytes of a small file, in a huge page where the system has them: a long index has hundreds of pages otherwise, and the
/// system takes longer to give each than it takes to read it.
pub(super) struct Bytes {
    buffer: HostBuffer,
    len: usize,
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.as_slice().get(..self.len).unwrap_or_default() // the buffer is as long
    }
}

/// A whole file of at most `limit` bytes.
pub(super) fn read_small(file: &DataFile, limit: u64) -> Result<Bytes> {
    let len = usize::try_from(file.len()).ok().filter(|_| file.len() <= limit).ok_or_else(|| {
        FormatError::new(file.path(), format!("it has {} bytes, more than the {limit} that are read", file.len()))
    })?;
    let buffer_len = len.max(1).next_multiple_of(PAGE_BYTES);
    let buffer = BufferPool::new(buffer_len, 1, buffer_len, None)?.try_acquire();
    let mut buffer = buffer.ok_or_else(|| Error::Invalid("there is no buffer for a file's bytes".into()))?;
    file.read_exact_at(buffer.as_mut_slice().get_mut(..len).unwrap_or_default(), 0)?;
    Ok(Bytes { buffer, len })
}
