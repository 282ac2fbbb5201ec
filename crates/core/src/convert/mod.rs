//! Conversion: a checkpoint of any layout, or tensors in memory, to a store (`docs/format.md`).
//!
//! [`layout`] says which byte goes where; [`writer`] composes and writes it chunk by chunk on several threads, so that
//! memory does not grow with the model; [`journal`] remembers finished chunks; [`target`] puts the whole directory
//! into its place at once; [`side_files`] are what a model directory holds besides weights.

pub(crate) mod chunks;
mod journal;
pub(crate) mod layout;
pub(crate) mod side_files;
pub(crate) mod target;
pub(crate) mod workers;
mod writer;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use crate::checkpoint::source::seen;
use crate::checkpoint::{Checkpoint, DataFile};
use crate::control::{Control, WorkOptions, gb_per_s};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::manifest::{
    FileEntry, MANIFEST_NAME, MAX_FILE_LEN, Manifest, Source, SourceFile, TensorEntry, data_file_name,
};
use crate::format::original::{self, are_contiguous, strided_len};
use crate::tensor::TensorInfo;
use crate::verify::verify_before;
use journal::fingerprint;
use layout::{Bytes, TargetFile, place};
use side_files::SideFiles;
pub use target::interrupted;
use target::{Partial, Target};
use writer::{Written, write_files};

/// How to convert, and to [`save`].
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions {
    overwrite: bool,
    work: WorkOptions,
}

impl ConvertOptions {
    /// The defaults: nothing is overwritten, eight threads.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces a store that stands at the target. Nothing but a store (or an empty directory) is ever replaced.
    pub fn overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Threads that read, check and write, 1 to 256; `None`: eight.
    pub fn threads(mut self, threads: impl Into<Option<usize>>) -> Self {
        self.work = self.work.threads(threads);
        self
    }

    /// Progress callback and cancel flag.
    pub fn control(mut self, control: Control) -> Self {
        self.work = self.work.control(control);
        self
    }
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ConvertReport {
    /// The store that was made.
    #[serde(serialize_with = "crate::error::lossy")]
    pub path: PathBuf,
    /// Its identity.
    pub identity: String,
    /// Tensor names in it.
    pub tensors: usize,
    /// Data files in it.
    pub files: usize,
    /// Bytes of the data files, padding included.
    pub bytes: u64,
    /// Bytes of these that an interrupted run had written before.
    pub resumed_bytes: u64,
    /// Other files copied (configuration, tokenizer, ...).
    pub other_files: usize,
    /// Files of the source that were not copied: weights that are not part of the checkpoint, and special files.
    #[serde(serialize_with = "crate::error::lossy_all")]
    pub skipped: Vec<PathBuf>,
    /// What is left of the store that was replaced, where it could not be removed.
    #[serde(serialize_with = "crate::error::lossy_if_any")]
    pub not_removed: Option<PathBuf>,
    /// Seconds it took.
    pub seconds: f64,
    /// `bytes` by `seconds`, in 1e9 bytes a second.
    pub gb_per_s: f64,
}

/// Converts a checkpoint to a store at `target`, a directory that is not there yet.
///
/// The store is written beside the target and renamed into place: whatever happens, `target` is what it was before or
/// the whole new store. An interrupted conversion of the same source goes on where it was. Memory does not grow with
/// the model.
///
/// # Errors
/// [`Error::Exists`] without [`ConvertOptions::overwrite`]; [`Error::NoSpace`] before anything is written;
/// [`Error::Invalid`] where the target lies in the source or is something else than a store; [`Error::Truncated`] and
/// [`Error::Io`] from the files; [`Error::Corrupt`] where the source is a store and a checksum is not right;
/// [`Error::Cancelled`].
pub fn convert(source: &Checkpoint, target: &Path, options: &ConvertOptions) -> Result<ConvertReport> {
    convert_in_files_of(MAX_FILE_LEN, source, target, options)
}

fn convert_in_files_of(
    max_file_len: u64,
    source: &Checkpoint,
    target: &Path,
    options: &ConvertOptions,
) -> Result<ConvertReport> {
    let entry = |tensor: &TensorInfo| TensorEntry {
        name: tensor.name.to_string(),
        dtype: tensor.dtype,
        shape: tensor.shape.to_vec(),
        strides: tensor.strides.as_deref().map(|strides| strides.to_vec()),
        file: 0,
        offset: 0,
        len: tensor.len,
        shard: tensor.shard,
    };
    let origin = source.origin();
    let content = Content {
        tensors: source.tensors().iter().map(entry).collect(),
        bytes: source.tensors().iter().map(|t| Bytes::File(&source.files()[t.file], t.offset)).collect(),
        source: Source {
            // An index without metadata is an index all the same.
            index: origin.index.clone().map(|value| if value.is_null() { serde_json::json!({}) } else { value }),
            // A copy of a store keeps where the store came from.
            seen: origin.seen.clone().or_else(|| seen(source.path(), source.files())),
            ..origin.clone()
        },
    };
    let to = Target::check(target, Some(source.path()), options.overwrite)?;
    let side_files = side_files_of(source)?;
    write_store(content, Some(source), &to, side_files, max_file_len, options)
}

/// The files beside a checkpoint's weights; none where it is a single file.
pub(crate) fn side_files_of(source: &Checkpoint) -> Result<SideFiles> {
    if !source.path().is_dir() {
        return Ok(SideFiles::none(source.path()));
    }
    let shards: HashSet<&Path> = source.files().iter().map(|file| Path::new(file.name())).collect();
    SideFiles::list(source.path(), |path| shards.contains(path))
}

/// A tensor in memory, to be saved.
#[derive(Debug, Clone, Copy)]
pub struct MemoryTensor<'a> {
    /// Its name, unique among those saved.
    pub name: &'a str,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its dimensions; empty for a scalar.
    pub shape: &'a [u64],
    /// Strides in elements; `None` where the elements are contiguous and row-major.
    pub strides: Option<&'a [u64]>,
    /// Its bytes, little-endian. Tensors with the very same slice are tied: it is stored once.
    pub bytes: &'a [u8],
}

/// Saves tensors in memory as a store at `target`. As [`convert`], but what was interrupted begins anew.
///
/// # Errors
/// As [`convert`]; [`Error::Invalid`] also where a name occurs twice, or a tensor's bytes are not those of its dtype and
/// shape.
pub fn save(tensors: &[MemoryTensor<'_>], target: &Path, options: &ConvertOptions) -> Result<ConvertReport> {
    let mut names = HashSet::new();
    if let Some(twice) = tensors.iter().find(|tensor| !names.insert(tensor.name)) {
        return Err(Error::Invalid(format!("two tensors have the name {:?}", twice.name)));
    }
    let shard = SourceFile { name: "model.safetensors".into(), metadata: None };
    let content = Content {
        tensors: tensors.iter().map(entry_of_memory).collect::<Result<_>>()?,
        bytes: tensors.iter().map(|tensor| Bytes::Memory(tensor.bytes)).collect(),
        source: Source { layout: "memory".into(), files: vec![shard], index: None, seen: None },
    };
    let to = Target::check(target, None, options.overwrite)?;
    write_store(content, None, &to, SideFiles::none(target), MAX_FILE_LEN, options)
}

fn entry_of_memory(tensor: &MemoryTensor<'_>) -> Result<TensorEntry> {
    let MemoryTensor { name, dtype, shape, bytes, .. } = *tensor;
    let len = bytes.len() as u64;
    let strides = tensor.strides.filter(|strides| !are_contiguous(shape, strides));
    let invalid = |reason: &str| Error::Invalid(format!("tensor {name:?}: {reason}"));
    match strides {
        None => {
            let expected = dtype.byte_len(shape).map_err(invalid)?;
            if expected != len {
                return Err(invalid(&format!("its {len} bytes are not the {expected} of {dtype} {shape:?}")));
            }
        }
        Some(_) if dtype == Dtype::F4 => return Err(invalid("it has strides, and elements of 4 bits in pairs")),
        Some(strides) => {
            let reach = strided_len(dtype, shape, strides).map_err(invalid)?;
            if reach > len {
                return Err(invalid(&format!("its strides reach byte {reach} of {len}")));
            }
        }
    }
    let strides = strides.map(<[u64]>::to_vec);
    Ok(TensorEntry { name: name.into(), dtype, shape: shape.to_vec(), strides, file: 0, offset: 0, len, shard: 0 })
}

/// What a store is to hold, before its tensors have their places.
struct Content<'a> {
    tensors: Vec<TensorEntry>,
    /// The bytes of each tensor.
    bytes: Vec<Bytes<'a>>,
    source: Source,
}

fn write_store(
    content: Content<'_>,
    from: Option<&Checkpoint>,
    target: &Target,
    side_files: SideFiles,
    max_file_len: u64,
    options: &ConvertOptions,
) -> Result<ConvertReport> {
    let start = Instant::now();
    let Content { mut tensors, bytes, source } = content;
    let files = place(&mut tensors, &bytes, max_file_len);
    // A store that could not be opened is not begun: what is kept of the source may be nested deeper than JSON is read.
    let kept = serde_json::to_vec(&Manifest::new(source.clone(), Vec::new(), Vec::new()));
    kept.and_then(|json| serde_json::from_slice::<Manifest>(&json)).map_err(|e| {
        Error::Invalid(format!("no store is made, since it could not be opened: its manifest would not be read: {e}"))
    })?;

    let mut identity = String::new();
    let finish = |partial: &Partial<'_>, written: &mut Written| {
        let sums = std::mem::take(&mut written.sums);
        let entry = |(k, (file, crc64)): (usize, (&TargetFile<'_>, _))| FileEntry {
            name: data_file_name(k),
            len: file.len,
            crc64,
        };
        let entries = files.iter().zip(sums).enumerate().map(entry).collect();
        let manifest = Manifest::new(source, entries, tensors);
        partial.write(original::INDEX_NAME, manifest.original_index().as_bytes())?;
        let json =
            serde_json::to_vec(&manifest).map_err(|e| Error::Invalid(format!("cannot write it as JSON: {e}")))?;
        partial.write(MANIFEST_NAME, &json)?;
        identity = manifest.identity;
        Ok(manifest.tensors.len())
    };
    let built = build(target, &files, from, &side_files, &options.work, finish)?;
    let bytes = files.iter().map(|file| file.len).sum();
    let seconds = start.elapsed().as_secs_f64();
    Ok(ConvertReport {
        path: target.path().to_owned(),
        identity,
        tensors: built.told,
        files: files.len(),
        bytes,
        resumed_bytes: built.resumed,
        other_files: side_files.count(),
        skipped: side_files.skipped,
        not_removed: built.not_removed,
        seconds,
        gb_per_s: gb_per_s(bytes, seconds),
    })
}

/// A directory that was written and is in its place.
pub(crate) struct Built<T> {
    /// Bytes that an earlier run had written.
    pub(crate) resumed: u64,
    /// What `finish` gave.
    pub(crate) told: T,
    not_removed: Option<PathBuf>,
}

/// Writes a whole directory beside its target and puts it there. `finish` writes what depends on the checksums.
///
/// `source` is what is read; with it an interrupted run is taken up again. Where it has checksums, they are compared before
/// anything is written: what is written gets checksums of its own, or none.
pub(crate) fn build<T>(
    target: &Target,
    files: &[TargetFile<'_>],
    source: Option<&Checkpoint>,
    side_files: &SideFiles,
    options: &WorkOptions,
    finish: impl FnOnce(&Partial<'_>, &mut Written) -> Result<T>,
) -> Result<Built<T>> {
    options.thread_count()?;
    side_files.check_beside(files)?;
    let len = files.iter().map(|file| file.len).sum();
    let read = match source.filter(|source| source.sums().is_some()) {
        Some(store) => verify_before(store, options, len)?,
        None => 0,
    };
    let options = options.clone().control(options.control.part(read, 0));
    let sources = source.map(Checkpoint::files);
    let fingerprint = sources.map(|sources| fingerprint(sources, files));
    let mut partial = target.begin(fingerprint.as_deref(), files, side_files.len)?;
    let work = || {
        let journal = partial.journal.as_ref();
        let mut written = write_files(partial.dir(), files, journal, &partial.finished, &options)?;
        sources.unwrap_or_default().iter().try_for_each(DataFile::check_unchanged)?;
        side_files.copy_to(partial.dir())?;
        let told = finish(&partial, &mut written)?;
        options.control.check()?;
        let not_removed = partial.publish()?;
        Ok(Built { resumed: written.resumed, told, not_removed })
    };
    work().inspect_err(|e| partial.abandon(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_could_not_be_opened_is_not_begun() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::create_dir(&source).unwrap();
        let header = r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        std::fs::write(source.join("1.safetensors"), test_support::safetensors(header, &[7])).unwrap();
        let convert_nested = |depth: usize| {
            let metadata = r#"{"a":"#.repeat(depth) + "1" + &"}".repeat(depth);
            let index = format!(r#"{{"metadata":{metadata},"weight_map":{{"w":"1.safetensors"}}}}"#);
            std::fs::write(source.join(crate::format::hf_index::INDEX_NAME), index).unwrap();
            convert(&Checkpoint::open(&source).unwrap(), &dir.path().join("store"), &ConvertOptions::new())
        };
        // The index may be nested so deep, and the manifest, which has it in two objects, not.
        let error = convert_nested(126).unwrap_err().to_string();
        assert!(error.contains("could not be opened") && error.contains("recursion limit"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something is left beside the source");
        convert_nested(100).unwrap();
        assert_eq!(Checkpoint::open(dir.path().join("store")).unwrap().tensors().len(), 1);
    }

    #[test]
    fn a_store_of_many_data_files_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let tensors: Vec<(String, Vec<u8>)> =
            (0..20u8).map(|i| (format!("t{i}"), vec![i + 1; 1000 + 7001 * usize::from(i)])).collect();
        let view = |(name, bytes): &'_ (String, Vec<u8>)| {
            let bytes = bytes.clone();
            (
                name.clone(),
                safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![bytes.len()], bytes.leak()).unwrap(),
            )
        };
        let path = dir.path().join("model.safetensors");
        safetensors::serialize_to_file(tensors.iter().map(view), None, &path).unwrap();
        let source = Checkpoint::open(&path).unwrap();
        let target = dir.path().join("store");
        let limit = 64 << 10;
        let report = convert_in_files_of(limit, &source, &target, &ConvertOptions::new()).unwrap();
        assert!(report.files > 5, "{report:?}");
        let store = Checkpoint::open(&target).unwrap();
        assert_eq!(store.identity(), Some(report.identity.as_str()));
        for file in store.files() {
            assert_eq!(file.len() % 4096, 0);
            let alone = store.tensors().iter().filter(|t| store.files()[t.file].name() == file.name()).count() == 1;
            assert!(file.len() <= limit || alone);
        }
        for (name, bytes) in &tensors {
            let tensor = store.tensor(name).unwrap();
            let mut read = vec![0; bytes.len()];
            store.files()[tensor.file].read_exact_at(&mut read, tensor.offset).unwrap();
            assert_eq!(&read, bytes, "{name}");
        }
    }
}
