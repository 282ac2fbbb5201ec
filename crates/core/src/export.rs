//! Export: a checkpoint of any layout as the safetensors files that it came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::control::{WorkOptions, gb_per_s};
use crate::convert::layout::{Bytes, Extent, TargetFile};
use crate::convert::target::Target;
use crate::convert::{build, side_files_of};
use crate::error::{Error, FormatError, Result};
use crate::format::hf_index::{INDEX_NAME, is_plain_relative};
use crate::format::safetensors::{LENGTH_FIELD, MAX_HEADER_LEN, METADATA};
use crate::tensor::TensorInfo;

/// What an export did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ExportReport {
    /// The directory that was made.
    #[serde(serialize_with = "crate::error::lossy")]
    pub path: PathBuf,
    /// Tensors in it.
    pub tensors: usize,
    /// safetensors files in it.
    pub files: usize,
    /// Bytes of these files.
    pub bytes: u64,
    /// Bytes of these that an interrupted run had written before.
    pub resumed_bytes: u64,
    /// Other files copied (configuration, tokenizer, ...).
    pub other_files: usize,
    /// Files beside the checkpoint that were not copied: weights that are not part of it, and special files.
    #[serde(serialize_with = "crate::error::lossy_all")]
    pub skipped: Vec<PathBuf>,
    /// Seconds it took.
    pub seconds: f64,
    /// `bytes` by `seconds`, in 1e9 bytes a second.
    pub gb_per_s: f64,
}

/// Writes a checkpoint as safetensors files into `dir`, which is not there yet.
///
/// The files have the names, tensors and metadata of those that the checkpoint was converted from, and its index where
/// there was one; the other files of the model directory are copied. A checkpoint that did not come from safetensors
/// gives one `model.safetensors`. safetensors has no tied tensors: each name gets its bytes. As with
/// [`convert`](crate::convert()), `dir` appears as a whole, and an interrupted export goes on.
///
/// # Errors
/// [`Error::Invalid`] for a tensor with strides, or of the name `__metadata__`, which safetensors cannot hold;
/// [`Error::Exists`]; otherwise as [`convert`](crate::convert()).
pub fn export(store: &Checkpoint, dir: &Path, options: &WorkOptions) -> Result<ExportReport> {
    let start = Instant::now();
    let shards = plan_shards(store)?;
    let target = Target::check(dir, Some(store.path()), false)?;
    let side_files = side_files_of(store)?;
    let files: Vec<TargetFile<'_>> = shards.iter().map(|shard| shard.target_file(store)).collect();
    let built = build(&target, &files, Some(store), &side_files, options, |partial, _| match &store.origin().index {
        Some(metadata) => partial.write(INDEX_NAME, index_json(metadata, &shards).as_bytes()),
        None => Ok(()),
    })?;
    let bytes = files.iter().map(|file| file.len).sum();
    let seconds = start.elapsed().as_secs_f64();
    Ok(ExportReport {
        path: target.path().to_owned(),
        tensors: store.tensors().len(),
        files: files.len(),
        bytes,
        resumed_bytes: built.resumed,
        other_files: side_files.count(),
        skipped: side_files.skipped,
        seconds,
        gb_per_s: gb_per_s(bytes, seconds),
    })
}

/// One safetensors file to be written.
struct Shard<'a> {
    name: &'a str,
    /// The length field and the JSON.
    header: Vec<u8>,
    tensors: Vec<&'a TensorInfo>,
}

impl Shard<'_> {
    fn target_file<'a>(&'a self, store: &'a Checkpoint) -> TargetFile<'a> {
        let len = self.header.len() as u64;
        let mut file = TargetFile { name: self.name.to_owned(), len, extents: Vec::new() };
        file.extents.push(Extent { offset: 0, len, bytes: Bytes::Memory(&self.header) });
        for tensor in self.tensors.iter().filter(|tensor| tensor.len > 0) {
            let bytes = Bytes::File(&store.files()[tensor.file], tensor.offset);
            file.extents.push(Extent { offset: file.len, len: tensor.len, bytes });
            file.len += tensor.len;
        }
        file
    }
}

fn plan_shards(store: &Checkpoint) -> Result<Vec<Shard<'_>>> {
    let mut tensors: Vec<Vec<&TensorInfo>> = vec![Vec::new(); store.origin().files.len()];
    for tensor in store.tensors() {
        if tensor.strides.is_some() {
            let reason =
                format!("tensor {:?} has strides, which safetensors cannot hold: it is not exported", tensor.name);
            return Err(Error::Invalid(reason));
        }
        if tensor.name == METADATA {
            let reason =
                format!("tensor {METADATA:?} has the name that safetensors keeps for other uses: it is not exported");
            return Err(Error::Invalid(reason));
        }
        tensors[tensor.shard].push(tensor);
    }
    let mut shards = Vec::with_capacity(tensors.len());
    for (shard, tensors) in store.origin().files.iter().zip(tensors) {
        let name = shard.name.as_str();
        // Such names come out of a manifest. Whether they are free is asked before the writing.
        if !is_plain_relative(name) {
            let reason = format!("its source file {name:?} cannot be written: it is not a plain path in the directory");
            return Err(FormatError::new(store.path(), reason).into());
        }
        let header = header(shard.metadata.as_ref(), &tensors);
        if header.len() as u64 > MAX_HEADER_LEN + LENGTH_FIELD {
            let reason =
                format!("the header of {name:?} would pass the {MAX_HEADER_LEN} bytes that safetensors allows");
            return Err(Error::Invalid(reason));
        }
        shards.push(Shard { name, header, tensors });
    }
    Ok(shards)
}

/// A safetensors header, its tensors in the order of their bytes, padded so that these begin at a multiple of 8.
fn header(metadata: Option<&BTreeMap<String, String>>, tensors: &[&TensorInfo]) -> Vec<u8> {
    let mut json = String::from("{");
    let mut field = |name: &str, value: Value| {
        let comma = if json.len() > 1 { "," } else { "" };
        json.push_str(&format!("{comma}{}:{value}", Value::from(name)));
    };
    if let Some(metadata) = metadata {
        field(METADATA, json!(metadata));
    }
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.len;
        let value = json!({"dtype": tensor.dtype.name(), "shape": *tensor.shape, "data_offsets": [start, end]});
        field(&tensor.name, value);
    }
    json.push('}');
    while json.len() % 8 != 0 {
        json.push(' ');
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json.into_bytes());
    header
}

fn index_json(metadata: &Value, shards: &[Shard<'_>]) -> String {
    let entries = shards.iter().flat_map(|shard| shard.tensors.iter().map(|t| (t.name.to_string(), shard.name.into())));
    let weight_map: Map<String, Value> = entries.collect();
    let index = json!({"metadata": metadata, "weight_map": weight_map});
    format!("{index:#}\n")
}
