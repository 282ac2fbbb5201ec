//! The files of a model directory that are not weights: configuration, tokenizer, licence.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::journal::JOURNAL_NAME;
use super::layout::TargetFile;
use super::target::PARTIAL_SUFFIX;
use crate::checkpoint::ensure_inside;
use crate::error::{Error, FormatError, Result};
use crate::format::hf_index;
use crate::format::manifest::MANIFEST_NAME;
use crate::format::original;

/// Extensions of weight files, in whatever framework's format.
const WEIGHT_EXTENSIONS: [&str; 13] =
    ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "onnx_data", "ot", "tflite"];

/// Directories that belong to tools, not to the model.
const TOOL_DIRECTORIES: [&str; 2] = [".git", ".cache"];

/// What is written besides weights and side files: into a store, into an export, and for a while.
const ADDED: [&str; 4] = [MANIFEST_NAME, original::INDEX_NAME, hf_index::INDEX_NAME, JOURNAL_NAME];

/// What is to be copied.
#[derive(Debug)]
pub(crate) struct SideFiles {
    root: PathBuf,
    /// Paths below `root`, sorted.
    files: Vec<PathBuf>,
    /// Their bytes.
    pub(crate) len: u64,
    /// Weight files that are not part of the checkpoint, and what cannot be copied.
    pub(crate) skipped: Vec<PathBuf>,
}

impl SideFiles {
    pub(crate) fn none(root: &Path) -> SideFiles {
        SideFiles { root: root.to_owned(), files: Vec::new(), len: 0, skipped: Vec::new() }
    }

    /// Lists the files of a model directory. `is_shard` says which paths hold the checkpoint itself.
    ///
    /// A link is followed only as one of a shard is: within the directory, or to the blobs of a Hugging Face cache.
    pub(crate) fn list(root: &Path, is_shard: impl Fn(&Path) -> bool) -> Result<SideFiles> {
        let mut found = SideFiles::none(root);
        found.walk(Path::new(""), &is_shard)?;
        found.files.sort_unstable();
        found.skipped.sort_unstable();
        Ok(found)
    }

    fn walk(&mut self, below: &Path, is_shard: &dyn Fn(&Path) -> bool) -> Result<()> {
        let dir = self.root.join(below);
        for entry in fs::read_dir(&dir).map_err(Error::io("list", &dir))? {
            let entry = entry.map_err(Error::io("list", &dir))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(Error::io("inspect", &path))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let relative = below.join(entry.file_name());
            let at_top = below.as_os_str().is_empty();
            if is_shard(&relative) || (at_top && is_reserved(&name)) || name.ends_with(".safetensors.index.json") {
                continue;
            }
            if kind.is_dir() {
                if !TOOL_DIRECTORIES.contains(&&*name) && !name.ends_with(PARTIAL_SUFFIX) {
                    self.walk(&relative, is_shard)?;
                }
                continue;
            }
            if is_weight(&name) {
                self.skipped.push(relative);
                continue;
            }
            if kind.is_symlink() {
                ensure_inside(&self.root, &path)?;
            }
            let metadata = fs::metadata(&path).map_err(Error::io("inspect", &path))?;
            if metadata.is_file() {
                self.len = self.len.saturating_add(metadata.len());
                self.files.push(relative);
            } else {
                self.skipped.push(relative);
            }
        }
        Ok(())
    }

    pub(crate) fn count(&self) -> usize {
        self.files.len()
    }

    /// An error where one of these files, of `files` and of those that a writer adds would have another's name, or lie below
    /// it.
    pub(crate) fn check_beside(&self, files: &[TargetFile<'_>]) -> Result<()> {
        let written = files.iter().map(|file| Path::new(&file.name)).chain(ADDED.map(Path::new));
        let mut paths: Vec<&Path> = written.chain(self.files.iter().map(PathBuf::as_path)).collect();
        // Sorted by their parts, a path comes right before those below it.
        paths.sort_unstable();
        match paths.windows(2).find(|pair| pair[1].starts_with(pair[0])) {
            Some(pair) => {
                let reason = format!("{:?} cannot be written: {:?} is to be another file", pair[1], pair[0]);
                Err(FormatError::new(&self.root, reason).into())
            }
            None => Ok(()),
        }
    }

    /// Copies the files into a directory that has none of them, and syncs each.
    pub(crate) fn copy_to(&self, dir: &Path) -> Result<()> {
        for relative in &self.files {
            let (from, to) = (self.root.join(relative), dir.join(relative));
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
            }
            let mut source = File::open(&from).map_err(Error::io("open", &from))?;
            if !source.metadata().is_ok_and(|metadata| metadata.is_file()) {
                return Err(FormatError::new(&from, "it is no longer a regular file").into());
            }
            let mut copy = File::create_new(&to).map_err(Error::io("create", &to))?;
            std::io::copy(&mut source, &mut copy).map_err(|e| match e.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::io("write", &to)(e),
                _ => Error::io("copy", &from)(e),
            })?;
            copy.sync_all().map_err(Error::io("sync", &to))?;
        }
        Ok(())
    }
}

/// Names that a writer gives a meaning to.
fn is_reserved(name: &str) -> bool {
    ADDED.contains(&name)
}

/// Whether a file holds weights, by its name.
fn is_weight(name: &str) -> bool {
    let extension = Path::new(name).extension().map(|e| e.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| WEIGHT_EXTENSIONS.contains(&&*extension))
        || name.ends_with(".bin.index.json")
        || name.starts_with("tensor.data_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_told_by_their_names() {
        for name in
            ["model.safetensors", "pytorch_model-1-of-2.bin", "pytorch_model.bin.index.json", "tf_model.h5", "A.PTH"]
        {
            assert!(is_weight(name), "{name}");
        }
        for name in ["config.json", "tokenizer.model", "merges.txt", "README.md", "LICENSE", "model.py"] {
            assert!(!is_weight(name), "{name}");
        }
    }
}
