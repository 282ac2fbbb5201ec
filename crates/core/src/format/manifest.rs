//! `manifest.json`: what a store holds, where, and the checksums of its chunks (`docs/format.md`).

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PAGE;
use super::original::{contiguous_strides, strided_len};
use crate::dtype::Dtype;
use crate::error::FormatError;

/// File name of the manifest in a store.
pub(crate) const MANIFEST_NAME: &str = "manifest.json";
/// The largest manifest that is read, in bytes.
pub(crate) const MAX_MANIFEST_LEN: u64 = 1 << 30;
/// Bytes of one checksummed chunk, as written.
pub const CHUNK_LEN: u64 = 4 << 20;
/// A data file ends before it would pass this many bytes, as in the original.
pub(crate) const MAX_FILE_LEN: u64 = 10 << 30;
/// Tensors of this many bytes and more begin at a page.
pub(crate) const LARGE_TENSOR: u64 = 64 << 10;
/// Alignment of smaller tensors, in bytes.
pub(crate) const SMALL_ALIGN: u64 = 256;

const FORMAT: &str = "sllm-store";
const VERSION: u64 = 1;

/// Alignment of a tensor of `len` bytes in a store.
pub(crate) fn tensor_align(len: u64) -> u64 {
    if len >= LARGE_TENSOR { PAGE } else { SMALL_ALIGN }
}

/// Name of the data file number `k`.
pub(crate) fn data_file_name(k: usize) -> String {
    format!("tensor.data_{k}")
}

/// The manifest as it stands in the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: String,
    pub(crate) version: u64,
    pub(crate) created_by: String,
    pub(crate) identity: String,
    pub(crate) chunk_len: u64,
    pub(crate) source: Source,
    pub(crate) files: Vec<FileEntry>,
    pub(crate) tensors: Vec<TensorEntry>,
}

/// One data file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    pub(crate) name: String,
    pub(crate) len: u64,
    pub(crate) crc64: Checksums,
}

/// One tensor name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) strides: Option<Vec<u64>>,
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) shard: usize,
}

/// Where a checkpoint came from: what `export` needs to give the source back.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Source {
    pub(crate) layout: String,
    /// Its shards.
    pub(crate) files: Vec<SourceFile>,
    /// `metadata` of `model.safetensors.index.json`; `None` without an index.
    #[serde(default)]
    pub(crate) index: Option<Value>,
    /// Of a store: the files that it was converted from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seen: Option<Seen>,
}

/// The source's files as the conversion saw them, by which a later change shows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Their directory, absolute.
    pub(crate) path: String,
    pub(crate) files: Vec<SeenFile>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SeenFile {
    pub(crate) name: String,
    pub(crate) len: u64,
    /// Seconds and nanoseconds since 1970.
    pub(crate) modified: (i64, i64),
}

/// One shard of the source: its file name and its `__metadata__`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SourceFile {
    pub(crate) name: String,
    pub(crate) metadata: Option<BTreeMap<String, String>>,
}

/// CRC-64/NVME of every chunk of a file; 16 hexadecimal digits each in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Checksums(pub(crate) Vec<u64>);

impl Serialize for Checksums {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.0.iter().map(|crc| format!("{crc:016x}")).collect();
        serializer.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for Checksums {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let hex = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        let valid = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !valid || hex.len() % 16 != 0 {
            return Err(serde::de::Error::custom("a crc64 is not 16 lower-case hexadecimal digits a chunk"));
        }
        // 16 hexadecimal digits always fit 64 bits.
        let crc = |digits: &[u8]| {
            digits
                .iter()
                .fold(0u64, |crc, &b| crc << 4 | u64::from(if b.is_ascii_digit() { b - b'0' } else { b - b'a' + 10 }))
        };
        Ok(Checksums(hex.as_bytes().chunks_exact(16).map(crc).collect()))
    }
}

impl Manifest {
    /// A manifest with its identity computed. The caller has laid the tensors out by the format's rules.
    pub(crate) fn new(source: Source, files: Vec<FileEntry>, tensors: Vec<TensorEntry>) -> Manifest {
        let mut manifest = Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            created_by: concat!("sllm-core ", env!("CARGO_PKG_VERSION")).to_owned(),
            identity: String::new(),
            chunk_len: CHUNK_LEN,
            source,
            files,
            tensors,
        };
        manifest.identity = manifest.compute_identity();
        manifest
    }

    /// Parses and checks everything that needs no other file.
    pub(crate) fn parse(path: &Path, json: &[u8]) -> Result<Manifest, FormatError> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u64,
        }
        let not_json = |e| FormatError::new(path, format!("it is not a valid manifest: {e}"));
        let manifest: Manifest = match serde_json::from_slice(json) {
            Ok(manifest) => manifest,
            // A later version may differ anywhere: say so rather than name a key.
            Err(error) => match serde_json::from_slice::<Head>(json) {
                Ok(head) if head.format != FORMAT || head.version != VERSION => {
                    return Err(wrong_version(path, &head.format, head.version));
                }
                _ => return Err(not_json(error)),
            },
        };
        manifest.check(path)?;
        Ok(manifest)
    }

    fn check(&self, path: &Path) -> Result<(), FormatError> {
        if self.format != FORMAT || self.version != VERSION {
            return Err(wrong_version(path, &self.format, self.version));
        }
        if self.chunk_len == 0 || !self.chunk_len.is_multiple_of(PAGE) || self.chunk_len > 1 << 30 {
            let reason = format!("chunk_len {} is not a multiple of 4096 from 4096 to 1 GiB", self.chunk_len);
            return Err(FormatError::new(path, reason));
        }
        for (k, file) in self.files.iter().enumerate() {
            let fail = |reason: String| FormatError::new(path, format!("file {k}: {reason}"));
            if file.name != data_file_name(k) {
                return Err(fail(format!("its name is {:?}, not {:?}", file.name, data_file_name(k))));
            }
            if file.len % PAGE != 0 || file.len > 1 << 62 {
                return Err(fail(format!("its length {} is not a multiple of 4096 below 2^62", file.len)));
            }
            let chunks = file.len.div_ceil(self.chunk_len);
            if file.crc64.0.len() as u64 != chunks {
                return Err(fail(format!("it has {} checksums for {chunks} chunks", file.crc64.0.len())));
            }
        }
        for tensor in &self.tensors {
            self.check_tensor(tensor)
                .map_err(|reason| FormatError::new(path, reason).tensor(&tensor.name).at(tensor.offset))?;
        }
        let identity = self.compute_identity();
        if self.identity != identity {
            let reason = format!("its identity is {}, but its content gives {identity}: it was changed", self.identity);
            return Err(FormatError::new(path, reason));
        }
        Ok(())
    }

    fn check_tensor(&self, tensor: &TensorEntry) -> Result<(), String> {
        let TensorEntry { dtype, shape, offset, len, .. } = tensor;
        let expected = match &tensor.strides {
            None => dtype.byte_len(shape)?,
            Some(_) if *dtype == Dtype::F4 => return Err("it has strides, and elements of 4 bits in pairs".into()),
            // The original may keep a storage larger than its view: only the reach is checked.
            Some(strides) => strided_len(*dtype, shape, strides)?.max(*len),
        };
        if expected != *len {
            return Err(format!("its {len} bytes are not the {expected} of {dtype} {shape:?}"));
        }
        let file = self.files.get(tensor.file).ok_or_else(|| format!("there is no file {}", tensor.file))?;
        if tensor.shard >= self.source.files.len() {
            return Err(format!("there is no source shard {}", tensor.shard));
        }
        if offset.checked_add(*len).is_none_or(|end| end > file.len) {
            return Err(format!("its {len} bytes pass the end of {}, {} bytes long", file.name, file.len));
        }
        if offset % tensor_align(*len) != 0 {
            return Err(format!("its offset is not a multiple of {}", tensor_align(*len)));
        }
        Ok(())
    }

    fn compute_identity(&self) -> String {
        let mut hash = Hasher(blake3::Hasher::new());
        hash.string("sllm-store identity v1");
        hash.number(self.chunk_len);
        let mut tensors: Vec<&TensorEntry> = self.tensors.iter().collect();
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        hash.number(tensors.len() as u64);
        for tensor in tensors {
            hash.string(&tensor.name);
            hash.string(tensor.dtype.name());
            hash.list(&tensor.shape);
            hash.list(tensor.strides.as_deref().unwrap_or_default());
            for number in [tensor.file as u64, tensor.offset, tensor.len] {
                hash.number(number);
            }
        }
        hash.number(self.files.len() as u64);
        for file in &self.files {
            hash.number(file.len);
            hash.list(&file.crc64.0);
        }
        hash.0.finalize().to_hex().to_string()
    }

    /// The original's `tensor_index.json` of this store, without what torch has no form for.
    pub(crate) fn original_index(&self) -> String {
        let mut starts = Vec::with_capacity(self.files.len());
        let mut total = 0u64;
        for file in &self.files {
            starts.push(total);
            total += file.len;
        }
        let mut map = serde_json::Map::new();
        for tensor in &self.tensors {
            let mut shape = tensor.shape.clone();
            if let (Dtype::F4, Some(last)) = (tensor.dtype, shape.last_mut()) {
                // torch counts pairs: a half of one has no form there, and no stride counts elements.
                if !last.is_multiple_of(2) || tensor.strides.is_some() {
                    continue;
                }
                *last /= 2;
            }
            let strides = tensor.strides.clone().unwrap_or_else(|| contiguous_strides(&shape));
            let offset = starts.get(tensor.file).copied().unwrap_or_default() + tensor.offset;
            let dtype = format!("torch.{}", tensor.dtype.torch_name());
            map.insert(tensor.name.clone(), serde_json::json!([offset, tensor.len, shape, strides, dtype]));
        }
        Value::Object(map).to_string()
    }
}

/// Whether the file at `path` is the manifest of a store, of any version and in whatever state.
pub(crate) fn is_manifest(path: &Path) -> bool {
    #[derive(Deserialize)]
    struct Head {
        format: String,
    }
    let is_file = path.symlink_metadata().is_ok_and(|m| m.is_file() && m.len() <= MAX_MANIFEST_LEN);
    let json = if is_file { std::fs::read(path).unwrap_or_default() } else { Vec::new() };
    serde_json::from_slice(&json).is_ok_and(|head: Head| head.format == FORMAT)
}

fn wrong_version(path: &Path, format: &str, version: u64) -> FormatError {
    let reason = format!("it is {format:?} version {version}; this program reads {FORMAT:?} version {VERSION}");
    FormatError::new(path, reason)
}

struct Hasher(blake3::Hasher);

impl Hasher {
    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn string(&mut self, string: &str) {
        self.number(string.len() as u64);
        self.0.update(string.as_bytes());
    }

    fn list(&mut self, numbers: &[u64]) {
        self.number(numbers.len() as u64);
        for &number in numbers {
            self.number(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let tensor = |name: &str, offset, len: u64| TensorEntry {
            name: name.into(),
            dtype: Dtype::U8,
            shape: vec![len],
            strides: None,
            file: 0,
            offset,
            len,
            shard: 0,
        };
        let source = Source {
            layout: "safetensors".into(),
            files: vec![SourceFile { name: "model.safetensors".into(), metadata: None }],
            index: None,
            seen: None,
        };
        let files = vec![FileEntry { name: "tensor.data_0".into(), len: 73728, crc64: Checksums(vec![0xab]) }];
        Manifest::new(source, files, vec![tensor("a", 0, 65536), tensor("b", 65792, 10)])
    }

    fn reparse(change: impl FnOnce(&mut Value)) -> Result<Manifest, FormatError> {
        let mut json = serde_json::to_value(sample()).unwrap();
        change(&mut json);
        Manifest::parse(Path::new("manifest.json"), json.to_string().as_bytes())
    }

    #[test]
    fn a_manifest_comes_back_as_it_was() {
        let back = reparse(|_| ()).unwrap();
        assert_eq!(back.tensors, sample().tensors);
        assert_eq!(back.files[0].crc64, Checksums(vec![0xab]));
        assert_eq!(back.identity, sample().identity);
    }

    #[test]
    fn the_identity_depends_on_the_bytes() {
        let mut other = sample();
        other.files[0].crc64.0[0] ^= 1;
        assert_ne!(other.compute_identity(), sample().identity);
    }

    #[test]
    fn every_fault_is_named() {
        type Change = fn(&mut Value);
        let endless = |m: &mut Value| {
            m["tensors"][1]["shape"] = serde_json::json!([1u64 << 32, 1u64 << 32]);
            m["tensors"][1]["strides"] = serde_json::json!([0, 0]);
        };
        let in_pairs = |m: &mut Value| {
            m["tensors"][1]["dtype"] = "F4".into();
            m["tensors"][1]["shape"] = serde_json::json!([4, 4]);
            m["tensors"][1]["strides"] = serde_json::json!([1, 4]); // 8 of its 10 bytes
        };
        let cases: [(Change, &str); 16] = [
            (endless, "the product of its shape overflows"),
            (in_pairs, "it has strides, and elements of 4 bits in pairs"),
            (|m| m["version"] = 2.into(), "version 2"),
            (|m| m["format"] = "other".into(), "\"other\""),
            (|m| m["chunk_len"] = 4097.into(), "chunk_len"),
            (|m| m["chunk_len"] = 0.into(), "chunk_len"),
            (|m| m["files"][0]["name"] = "../x".into(), "its name is"),
            (|m| m["files"][0]["len"] = 4095.into(), "multiple of 4096"),
            (|m| m["files"][0]["crc64"] = "ab".into(), "16 lower-case"),
            (|m| m["files"][0]["crc64"] = "0".repeat(32).into(), "2 checksums for 1 chunks"),
            (|m| m["tensors"][0]["offset"] = 256.into(), "multiple of 4096"),
            (|m| m["tensors"][1]["offset"] = u64::MAX.into(), "pass the end"),
            (|m| m["tensors"][1]["len"] = 11.into(), "are not the 10"),
            (|m| m["tensors"][1]["file"] = 1.into(), "no file 1"),
            (|m| m["tensors"][1]["dtype"] = "F99".into(), "unknown variant"),
            (|m| m["tensors"][1]["name"] = "c".into(), "identity"),
        ];
        for (change, expected) in cases {
            let message = reparse(change).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn the_original_index_counts_over_all_files() {
        let mut manifest = sample();
        manifest.files.push(FileEntry { name: "tensor.data_1".into(), len: 4096, crc64: Checksums(vec![0]) });
        manifest.tensors[1].file = 1;
        manifest.tensors[1].offset = 256;
        let index: Value = serde_json::from_str(&manifest.original_index()).unwrap();
        assert_eq!(index["b"], serde_json::json!([73728 + 256, 10, [10], [1], "torch.uint8"]));

        let mut entry = |shape: &[u64], strides: Option<&[u64]>| {
            (manifest.tensors[1].dtype, manifest.tensors[1].shape) = (Dtype::F4, shape.to_vec());
            manifest.tensors[1].strides = strides.map(<[u64]>::to_vec);
            serde_json::from_str::<Value>(&manifest.original_index()).unwrap()["b"].take()
        };
        assert_eq!(
            entry(&[5, 4], None),
            serde_json::json!([73728 + 256, 10, [5, 2], [2, 1], "torch.float4_e2m1fn_x2"])
        );
        assert_eq!((entry(&[4, 5], None), entry(&[4, 5], Some(&[1, 4]))), (Value::Null, Value::Null));
    }
}
