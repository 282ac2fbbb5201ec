//! Opening Hugging Face safetensors: one file, several, or several with an index.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::contents::{SAFETENSORS, names_in};
use super::store::read_small;
use super::{Checkpoint, DataFile, Layout, Origin, Parts, Shard, TensorInfo, hub, is_there};
use crate::error::{Error, FormatError, Result};
use crate::format::hf_index::{self, INDEX_NAME};
use crate::format::manifest::MAX_MANIFEST_LEN;
use crate::format::safetensors::{Header, LENGTH_FIELD, MAX_HEADER_LEN, json_len, parse};
use crate::read::choose::MAX_LANES;
use crate::threads;

/// The one shard's name where there is no index.
const SINGLE_NAME: &str = "model.safetensors";

/// Bytes of JSON that one thread parses before another is worth starting: 1 ms.
const PARSED_BY_ONE: u64 = 512 << 10;

/// Names of a directory's safetensors files, sorted; only `model.safetensors` where there is one.
fn file_names(dir: &Path) -> Result<Vec<String>> {
    let found = names_in(dir, |name| name.ends_with(SAFETENSORS)).map_err(Error::io("list", dir))?;
    // Left out, its tensors would be missing and nobody be told.
    let not_utf8 = |name| FormatError::new(&dir.join(name), "the name of a weight file must be UTF-8: rename it");
    let names = found.into_iter().map(|name| name.into_string().map_err(not_utf8));
    let mut names = names.collect::<Result<Vec<String>, _>>()?;
    if names.iter().any(|name| name == SINGLE_NAME) {
        names = vec![SINGLE_NAME.to_owned()];
    }
    Ok(names)
}

pub(super) fn open_file(path: &Path) -> Result<Checkpoint> {
    let name = path.file_name().map_or_else(|| SINGLE_NAME.into(), |name| name.to_string_lossy().into_owned());
    let file = DataFile::open(path, &name, true)?;
    assemble(path, vec![file], None)
}

/// Opens files that somebody else found; `root` is where they were looked for.
pub(super) fn open_files(root: &Path, paths: &[PathBuf]) -> Result<Checkpoint> {
    let open = |path: &PathBuf| {
        let name = path.strip_prefix(root).unwrap_or(path);
        DataFile::open(path, &name.to_string_lossy(), true)
    };
    assemble(root, paths.iter().map(open).collect::<Result<_>>()?, None)
}

/// Opens a directory by its index, or all its safetensors files where there is none; `None` where it has neither.
pub(super) fn open_dir(dir: &Path) -> Result<Option<Checkpoint>> {
    let index_path = dir.join(INDEX_NAME);
    if is_there(&index_path)? {
        return open_indexed(dir, &index_path).map(Some);
    }
    let names = file_names(dir)?;
    if names.is_empty() {
        return Ok(None);
    }
    let files = names.iter().map(|name| open_inside(dir, name)).collect::<Result<_>>()?;
    assemble(dir, files, None).map(Some)
}

fn open_indexed(dir: &Path, index_path: &Path) -> Result<Checkpoint> {
    let index_file = open_inside(dir, INDEX_NAME)?;
    let json = read_small(&index_file, MAX_MANIFEST_LEN)?;
    let index = hf_index::parse(index_path, &json)?;
    let mut files = Vec::with_capacity(index.shards.len());
    for shard in &index.shards {
        files.push(open_inside(dir, shard).map_err(|e| match e {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                FormatError::new(index_path, format!("it names shard {shard:?}, which is not there")).into()
            }
            e => e,
        })?);
    }
    let checkpoint = assemble(dir, files, Some(index.metadata))?;
    let files: HashMap<&str, usize> = checkpoint.tensors().iter().map(|t| (t.name.as_str(), t.file)).collect();
    for (name, shard) in &index.weight_map {
        if files.get(&**name) != Some(shard) {
            let shard = &index.shards[*shard];
            let reason = format!("the index says that it is in {shard:?}, but it is not");
            return Err(FormatError::new(index_path, reason).tensor(name).into());
        }
    }
    Ok(checkpoint)
}

/// Opens a file of a model directory.
fn open_inside(dir: &Path, name: &str) -> Result<DataFile> {
    let path = dir.join(name);
    ensure_inside(dir, &path)?;
    DataFile::open(&path, name, true)
}

/// Whether a file of a model directory lies in it: a link may lead only into the same directory or, in the Hugging Face
/// cache, to the blobs of the same repository.
pub(crate) fn ensure_inside(dir: &Path, path: &Path) -> Result<()> {
    let real = path.canonicalize().map_err(Error::io("inspect", path))?;
    let real_dir = dir.canonicalize().map_err(Error::io("inspect", dir))?;
    let allowed = real.starts_with(&real_dir)
        || hub::blobs_of_snapshot(&real_dir).is_some_and(|blobs: PathBuf| real.starts_with(blobs));
    if !allowed {
        let reason = format!(
            "it is a link out of its directory, to {}; copy the file or open its own directory",
            real.display()
        );
        return Err(FormatError::new(path, reason).into());
    }
    Ok(())
}

fn assemble(root: &Path, files: Vec<DataFile>, index: Option<serde_json::Value>) -> Result<Checkpoint> {
    let headers = read_headers(&files)?;
    let mut tensors = Vec::with_capacity(headers.iter().map(|header| header.tensors.len()).sum());
    let mut shards = Vec::with_capacity(files.len());
    for (k, (file, header)) in files.iter().zip(headers).enumerate() {
        shards.push(Shard { name: file.name().to_owned(), metadata: header.metadata });
        tensors.extend(header.tensors.into_iter().map(|t| TensorInfo {
            name: t.name,
            dtype: t.dtype,
            shape: t.shape,
            strides: None,
            file: k,
            offset: t.offset,
            len: t.len,
            shard: k,
        }));
    }
    Checkpoint::from_parts(Parts {
        root: root.to_owned(),
        layout: Layout::Safetensors,
        told_by: root.to_owned(),
        files,
        tensors,
        sums: None,
        identity: None,
        origin: Origin { layout: Layout::Safetensors.name().into(), shards, index, seen: None },
    })
}

/// The headers of files; where they are long, threads share the files, each with the text of one at a time. The first file's
/// error counts.
fn read_headers(files: &[DataFile]) -> Result<Vec<Header>> {
    let mut headers: Vec<Option<Result<Header>>> = files.iter().map(|_| None).collect();
    let worth = files.iter().map(claimed_len).sum::<u64>() / PARSED_BY_ONE;
    let most = files.len().min(threads::processors()).min(MAX_LANES);
    let threads = usize::try_from(worth).map_or(most, |worth| worth.min(most));
    threads::share(threads, "sllm-open", files.iter().zip(&mut headers), |(file, header)| {
        *header = Some(read_header(file));
    });
    headers.into_iter().flatten().collect() // there is one of each file
}

/// What a file claims to be the length of its header's JSON, no more than may be. Nothing is checked yet.
fn claimed_len(file: &DataFile) -> u64 {
    let mut field = [0; 8];
    file.read_exact_at(&mut field, 0).map_or(0, |()| u64::from_le_bytes(field).min(MAX_HEADER_LEN))
}

fn read_header(file: &DataFile) -> Result<Header> {
    if file.len() < LENGTH_FIELD {
        let reason = format!("it has {} bytes: too short for a safetensors file", file.len());
        return Err(FormatError::new(file.path(), reason).into());
    }
    let mut field = [0; 8];
    file.read_exact_at(&mut field, 0)?;
    // At most MAX_HEADER_LEN, which fits usize.
    let len = usize::try_from(json_len(file.path(), field, file.len())?).unwrap_or(0);
    let mut json = vec![0; len];
    file.read_exact_at(&mut json, LENGTH_FIELD)?;
    Ok(parse(file.path(), &json, file.len())?)
}
