//! The source that a store was converted from, where it is still at hand. Copying a model to another place gives its files
//! other inodes and times of status: only lengths and times of change are compared.

use std::path::Path;

use super::data_file::Stamp;
use super::{Checkpoint, DataFile};
use crate::error::{FormatError, Result};
use crate::format::hf_index::is_plain_relative;
use crate::format::manifest::{Seen, SeenFile};

/// A source's files as they were when they were opened; `None` where their directory has no name that can be written.
pub(crate) fn seen(root: &Path, files: &[DataFile]) -> Option<Seen> {
    // A single file may be a link: the directory is that of the name it was opened by.
    let dir = if root.is_dir() { root } else { root.parent()? };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let dir = dir.canonicalize().ok()?;
    let file = |file: &DataFile| {
        let (len, modified) = file.stamp().len_and_modified();
        SeenFile { name: file.name().to_owned(), len, modified }
    };
    Some(Seen { path: dir.to_str()?.to_owned(), files: files.iter().map(file).collect() })
}

impl Checkpoint {
    /// An error where the files that this store was converted from are still in their place, and were changed since: the
    /// store then holds other weights than they do. Nothing is said of a source that is not there, or not known.
    pub fn check_source(&self) -> Result<()> {
        let Some(seen) = &self.origin().seen else { return Ok(()) };
        let dir = Path::new(&seen.path);
        for file in seen.files.iter().filter(|file| is_plain_relative(&file.name)) {
            let path = dir.join(&file.name);
            let Ok(metadata) = path.metadata() else { continue };
            if Stamp::of(&metadata).len_and_modified() != (file.len, file.modified) {
                let store = self.path().display();
                let reason =
                    format!("it was changed after {store} was converted from it: convert it again (--overwrite)");
                return Err(FormatError::new(&path, reason).into());
            }
        }
        Ok(())
    }
}
