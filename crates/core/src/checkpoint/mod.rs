//! An opened model directory: its tensors, and where their bytes lie in which file.
//!
//! Four layouts give one type: our store ([`Layout::Store`]), Hugging Face safetensors (one file, several with an
//! index, or a snapshot of the Hugging Face cache), and the original ServerlessLLM directory.

mod contents;
mod data_file;
mod hub;
mod original;
mod safetensors;
pub(crate) mod source;
mod store;
mod texts;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contents::Contents;

pub use data_file::DataFile;
pub(crate) use data_file::Stamp;
pub(crate) use safetensors::ensure_inside;

use crate::error::{CorruptChunk, Error, FormatError, Result};
use crate::format::manifest::Source;
use crate::tensor::TensorInfo;
use crate::tensors::Tensors;

/// How a checkpoint is laid out on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Layout {
    /// Our own store (`docs/format.md`).
    Store,
    /// One or more safetensors files.
    Safetensors,
    /// The directory that the original ServerlessLLM writes.
    Original,
}

impl Layout {
    /// The layout's name in reports and manifests.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Store => "store",
            Layout::Safetensors => "safetensors",
            Layout::Original => "original",
        }
    }
}

/// The checksums of a store's chunks.
#[derive(Debug, Clone)]
pub struct ChunkSums {
    /// Bytes of one chunk; a file's last chunk may be shorter.
    pub chunk_len: u64,
    /// CRC-64/NVME of every chunk, by file.
    pub(crate) files: Vec<Vec<u64>>,
}

impl ChunkSums {
    /// CRC-64/NVME of the chunk number `chunk` of a file; `None` where there is no such chunk.
    pub fn get(&self, file: usize, chunk: u64) -> Option<u64> {
        self.files.get(file)?.get(usize::try_from(chunk).ok()?).copied()
    }
}

/// How to open a checkpoint. `OpenOptions::new().revision("v2").open("org/model")`.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    revision: Option<String>,
    cache_dir: Option<PathBuf>,
}

impl OpenOptions {
    /// The defaults: revision `main`, the Hugging Face cache where the environment says it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// The branch, tag or commit of a repository in the Hugging Face cache. With a path on disk it is an error.
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// The Hugging Face cache to look in.
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cache_dir = Some(dir.into());
        self
    }

    /// Opens a directory, a safetensors file, or a repository id that the Hugging Face cache holds.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Checkpoint> {
        let path = path.as_ref();
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let snapshot = hub::resolve(path, self.revision.as_deref(), self.cache_dir.as_deref())?;
                return Checkpoint::open_dir(&snapshot);
            }
            Err(e) => return Err(Error::io("open", path)(e)),
        };
        if self.revision.is_some() {
            let path = path.display();
            return Err(Error::Invalid(format!(
                "{path} is a path on disk, which has no revisions: a revision (--revision) goes with a repository id"
            )));
        }
        if metadata.is_dir() { Checkpoint::open_dir(path) } else { safetensors::open_file(path) }
    }
}

/// An opened checkpoint. Its files stay open, so that a load reads what was checked.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    layout: Layout,
    files: Vec<DataFile>,
    tensors: Arc<Tensors>,
    sums: Option<ChunkSums>,
    identity: Option<String>,
    origin: Source,
    /// What its directory had; `None` where the caller chose the files.
    contents: Option<Contents>,
}

/// What a layout's module found, before the checks that all layouts share.
struct Parts {
    root: PathBuf,
    layout: Layout,
    files: Vec<DataFile>,
    tensors: Tensors,
    /// Each name is known to be there once.
    names_differ: bool,
    /// Tensors are known to be in order, and each to begin where the one before it in its file ends.
    are_in_line: bool,
    sums: Option<ChunkSums>,
    identity: Option<String>,
    origin: Source,
    /// The file that errors about names and places are told of.
    told_by: PathBuf,
}

impl Parts {
    /// Whether each name is there once.
    fn check_names(&self) -> Result<()> {
        if self.names_differ || self.tensors.iter().is_sorted_by(|a, b| a.name < b.name) {
            return Ok(());
        }
        for pair in self.tensors.by_name().windows(2) {
            let (a, b) = (&self.tensors[pair[0]], &self.tensors[pair[1]]);
            if a.name == b.name {
                let reason = match (self.files.get(a.file), self.files.get(b.file)) {
                    (Some(one), Some(two)) if a.file != b.file => {
                        format!("the tensor is in two files, {} and {}", one.name(), two.name())
                    }
                    (Some(file), _) => format!("the name occurs twice in {}", file.name()),
                    _ => "the name occurs twice".to_owned(),
                };
                return Err(FormatError::new(&self.told_by, reason).tensor(&a.name).into());
            }
        }
        Ok(())
    }

    /// Whether tensors, which are in order, have their bytes for themselves, but for tied ones.
    fn check_overlaps(&self) -> Result<()> {
        let mut last: Option<&TensorInfo> = None;
        for tensor in self.tensors.iter().filter(|t| t.len > 0) {
            if let Some(before) = last.filter(|before| before.file == tensor.file) {
                let shares_storage = self.layout == Layout::Original && before.offset == tensor.offset;
                if before.offset + before.len > tensor.offset && !tensor.is_tied_with(before) && !shares_storage {
                    let reason = format!("it overlaps tensor {:?}", before.name);
                    return Err(FormatError::new(&self.told_by, reason).tensor(&tensor.name).at(tensor.offset).into());
                }
            }
            last = Some(tensor);
        }
        Ok(())
    }
}

impl Checkpoint {
    /// Opens a directory, a safetensors file, or a repository id that the Hugging Face cache holds.
    ///
    /// Reads headers only. Every number in them is checked; an error names the file, the tensor and the offset.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
        OpenOptions::new().open(path)
    }

    /// Opens safetensors files that the caller chose, found below the directory `root`. They are one checkpoint.
    pub fn open_files(root: impl AsRef<Path>, files: &[PathBuf]) -> Result<Checkpoint> {
        safetensors::open_files(root.as_ref(), files)
    }

    fn open_dir(dir: &Path) -> Result<Checkpoint> {
        // Before it is opened: what comes meanwhile is seen as a change later.
        let contents = Contents::of(dir);
        let checkpoint = Checkpoint::open_layout(dir, &contents)?;
        Ok(Checkpoint { contents: Some(contents), ..checkpoint })
    }

    fn open_layout(dir: &Path, contents: &Contents) -> Result<Checkpoint> {
        use crate::format::{manifest, original as original_format};
        let has = |name: &str| is_there(&dir.join(name));
        if has(manifest::MANIFEST_NAME)? && has(original_format::INDEX_NAME)? {
            return store::open(dir);
        }
        if let Some(checkpoint) = safetensors::open_dir(dir, contents.data.as_deref())? {
            return Ok(checkpoint);
        }
        if has(original_format::INDEX_NAME)? {
            return original::open(dir);
        }
        let mut reason = "the directory has no manifest.json, no *.safetensors and no tensor_index.json".to_owned();
        if has(manifest::MANIFEST_NAME)? {
            reason = "the directory has a manifest.json, but no *.safetensors and no tensor_index.json: if it is a \
                      store, a part of it is missing; convert again"
                .to_owned();
        } else if has("rank_0")? {
            reason.push_str("; it holds one directory a rank: open rank_0");
        } else if has("pytorch_model.bin")? || has("pytorch_model.bin.index.json")? {
            reason.push_str("; it holds a pickled pytorch_model.bin: save it as safetensors first");
        }
        Err(Error::NotFound { path: dir.to_owned(), reason })
    }

    fn from_parts(mut parts: Parts) -> Result<Checkpoint> {
        if !parts.are_in_line
            && let Some(tensor) = parts.tensors.iter().find(|tensor| tensor.file >= parts.files.len())
        {
            let reason = format!("there is no data file {} for it", tensor.file);
            return Err(FormatError::new(&parts.told_by, reason).tensor(&tensor.name).at(tensor.offset).into());
        }
        // Whoever adds lengths up, each rounded to a page or not, need not look at the sums.
        let few = fit_63_bits(parts.files.iter().map(DataFile::len))
            && (parts.are_in_line || fit_63_bits(parts.tensors.iter().map(|tensor| tensor.len)));
        if !few {
            let reason = "the lengths of its files, or of its tensors, add up to 2^63 bytes or more";
            return Err(FormatError::new(&parts.told_by, reason).into());
        }
        if parts.are_in_line {
            parts.check_names()?;
        } else {
            parts.tensors.sort_by(|a, b| (a.file, a.offset, a.len, &a.name).cmp(&(b.file, b.offset, b.len, &b.name)));
            parts.check_names()?;
            parts.check_overlaps()?;
        }
        let Parts { root, layout, files, tensors, sums, identity, origin, .. } = parts;
        let tensors = Arc::new(tensors);
        Ok(Checkpoint { root, layout, files, tensors, sums, identity, origin, contents: None })
    }

    /// The directory (or the one file) that was opened.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// How it is laid out.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Its data files.
    pub fn files(&self) -> &[DataFile] {
        &self.files
    }

    /// Whether its files' paths still lead to the files that were opened, unchanged, and its directory tells of no others.
    pub fn is_current(&self) -> bool {
        self.files.iter().all(DataFile::is_current)
            && self.contents.as_ref().is_none_or(|contents| *contents == Contents::of(&self.root))
    }

    /// Whether both have the same files, unchanged, and the same checksums of them.
    pub fn has_files_of(&self, other: &Checkpoint) -> bool {
        let same = |(at, file): (usize, &DataFile)| {
            other.files.get(at).is_some_and(|theirs| theirs.name() == file.name() && theirs.stamp() == file.stamp())
                && self.sums_of(at) == other.sums_of(at)
        };
        self.files.len() == other.files.len() && self.files.iter().enumerate().all(same)
    }

    /// Bytes of a chunk and the checksums of a file's chunks, where it has some.
    pub(crate) fn sums_of(&self, file: usize) -> Option<(u64, &[u64])> {
        let sums = self.sums.as_ref()?;
        Some((sums.chunk_len, sums.files.get(file)?))
    }

    /// Its tensors, by file and offset.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The same, for whoever needs them longer than the checkpoint is there.
    pub(crate) fn shared_tensors(&self) -> Arc<Tensors> {
        Arc::clone(&self.tensors)
    }

    /// Its tensors by ascending name.
    pub fn tensors_by_name(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.by_name().iter().map(|&i| &self.tensors[i])
    }

    /// Place in [`Checkpoint::tensors`] of the tensor of this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.tensors.position(name)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        match self.position(name) {
            Some(i) => Ok(&self.tensors[i]),
            None => Err(Error::NoSuchTensor { name: name.to_owned(), path: self.root.clone() }),
        }
    }

    /// Bytes of all tensors, tied ones counted once.
    pub fn total_len(&self) -> u64 {
        let mut total = 0;
        let mut last: Option<&TensorInfo> = None;
        for tensor in self.tensors.iter() {
            if !last.is_some_and(|before| tensor.is_tied_with(before)) {
                total += tensor.len;
            }
            last = Some(tensor);
        }
        total
    }

    /// The checksums of a store's chunks; `None` for other layouts.
    pub fn sums(&self) -> Option<&ChunkSums> {
        self.sums.as_ref()
    }

    /// A store's identity, 64 hexadecimal digits; `None` for other layouts.
    pub fn identity(&self) -> Option<&str> {
        self.identity.as_deref()
    }

    /// Compares the checksum found of a chunk with the manifest's; [`Error::Corrupt`] names the tensors in it.
    pub(crate) fn check_chunk(&self, file: usize, chunk: u64, found: u64) -> Result<()> {
        let Some((sums, expected)) = self.sums.as_ref().and_then(|sums| Some((sums, sums.get(file, chunk)?))) else {
            return Err(Error::Invalid(format!("chunk {chunk} of data file {file} has no checksum")));
        };
        if found == expected {
            return Ok(());
        }
        let data = &self.files[file]; // it has checksums, so that it is there
        let offset = chunk * sums.chunk_len;
        let len = sums.chunk_len.min(data.len() - offset);
        let ends_after = |t: &TensorInfo| t.len > 0 && t.offset + t.len > offset;
        let is_inside = |t: &&TensorInfo| t.file == file && t.offset < offset + len && ends_after(t);
        let (path, tensors, more_tensors) = (data.path().to_owned(), Vec::new(), 0);
        let mut fault = CorruptChunk { path, chunk, offset, len, expected, found, tensors, more_tensors };
        self.tensors.iter().filter(is_inside).for_each(|tensor| fault.add_tensor(&tensor.name));
        Err(Error::Corrupt(Box::new(fault)))
    }

    /// Says to prefetches, as long as it is kept, that the checkpoint is being loaded.
    pub(crate) fn lock_for_load(&self) -> Option<File> {
        self.files.first()?.lock_for_load()
    }

    /// Whether some process on this host loads the checkpoint.
    pub(crate) fn is_being_loaded(&self) -> bool {
        self.files.first().is_some_and(DataFile::is_being_loaded)
    }

    /// What it was made of, kept so that it can be given back.
    pub(crate) fn origin(&self) -> &Source {
        &self.origin
    }
}

fn fit_63_bits(mut numbers: impl Iterator<Item = u64>) -> bool {
    numbers.try_fold(0, |sum: i64, number| sum.checked_add_unsigned(number)).is_some()
}

/// Whether something has this path, be it a link that leads nowhere: what is there and cannot be read must not pass for
/// what is not there.
fn is_there(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("inspect", path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_directory_lacks_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let told = || Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(told().contains("no manifest.json, no *.safetensors and no tensor_index.json"));
        std::fs::create_dir(dir.path().join("rank_0")).unwrap();
        assert!(told().contains("open rank_0"));
        std::fs::write(dir.path().join(crate::format::manifest::MANIFEST_NAME), "{}").unwrap();
        assert!(told().contains("a part of it is missing"));
    }

    #[test]
    fn sums_below_2_to_the_63_fit() {
        let half = 1 << 62;
        for (numbers, fit) in [
            (&[][..], true),
            (&[half, half - 1], true),
            (&[half, half], false),
            (&[half - 1, half - 1, 2], false),
            (&[u64::MAX], false),
            (&[u64::MAX, 1], false),
        ] {
            assert_eq!(fit_63_bits(numbers.iter().copied()), fit, "{numbers:?}");
        }
    }
}
