//! What of a directory decides how it is opened.

use std::ffi::OsString;
use std::path::Path;

use super::Stamp;
use crate::format::{hf_index, manifest, original};

/// How names of safetensors files end.
pub(super) const SAFETENSORS: &[u8] = b".safetensors";
/// How names of data files begin in stores and in the original's layout.
const DATA_PREFIX: &[u8] = b"tensor.data_";

/// What a directory had when it was looked at, of what decides its layout and its data files. Other files, such as a
/// `README.md`, are not seen.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Contents {
    /// The files that tell of data files and tensors, by whichever link.
    telling: [Option<Stamp>; 3],
    /// Names of what may be data files, sorted; `None` where the directory cannot be listed.
    pub(super) data: Option<Vec<OsString>>,
}

impl Contents {
    pub(super) fn of(dir: &Path) -> Contents {
        let stamp = |name| std::fs::metadata(dir.join(name)).ok().map(|metadata| Stamp::of(&metadata));
        let telling = [manifest::MANIFEST_NAME, hf_index::INDEX_NAME, original::INDEX_NAME].map(stamp);
        let may_be_data = |name: &[u8]| name.ends_with(SAFETENSORS) || name.starts_with(DATA_PREFIX);
        Contents { telling, data: names_in(dir, may_be_data).ok() }
    }
}

/// Those names in a directory that are wanted, sorted.
pub(super) fn names_in(dir: &Path, is_wanted: impl Fn(&[u8]) -> bool) -> std::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        if is_wanted(name.as_encoded_bytes()) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use serde_json::json;
    use test_support::safetensors;

    use super::*;
    use crate::{Checkpoint, ConvertOptions, convert};

    fn model(dir: &Path, name: &str, tensor: &str) {
        let header = json!({ tensor: {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]} });
        fs::write(dir.join(name), safetensors(header.to_string(), &[1, 2, 3])).unwrap();
    }

    /// A directory of this name with one safetensors file.
    fn fresh(root: &Path, name: &str) -> PathBuf {
        let dir = root.join(name);
        fs::create_dir(&dir).unwrap();
        model(&dir, "model-1.safetensors", "one");
        dir
    }

    /// Whether a directory is opened anew after a change.
    fn is_seen(dir: &Path, change: impl FnOnce()) -> bool {
        let checkpoint = Checkpoint::open(dir).unwrap();
        assert!(checkpoint.is_current());
        change();
        let seen = !checkpoint.is_current();
        assert!(Checkpoint::open(dir).is_ok_and(|now| now.is_current()));
        seen
    }

    #[test]
    fn files_that_come_and_go_are_seen_and_others_are_not() {
        let root = tempfile::tempdir().unwrap();
        let dir = fresh(root.path(), "hf");
        assert!(!is_seen(&dir, || fs::write(dir.join("README.md"), "words").unwrap()));
        assert!(!is_seen(&dir, || fs::create_dir(dir.join("figures")).unwrap()));
        assert!(is_seen(&dir, || model(&dir, "model-2.safetensors", "two")));
        let index = |map| fs::write(dir.join(hf_index::INDEX_NAME), json!({ "weight_map": map }).to_string()).unwrap();
        assert!(is_seen(&dir, || index(json!({"one": "model-1.safetensors"}))));
        let both = json!({"one": "model-1.safetensors", "two": "model-2.safetensors"});
        assert!(is_seen(&dir, || index(both)));
        assert_eq!(Checkpoint::open(&dir).unwrap().files().len(), 2);
        assert!(is_seen(&dir, || fs::remove_file(dir.join(hf_index::INDEX_NAME)).unwrap()));
        assert!(is_seen(&dir, || fs::remove_file(dir.join("model-2.safetensors")).unwrap()));
        assert_eq!(Checkpoint::open(&dir).unwrap().files().len(), 1);
    }

    #[test]
    fn another_layout_and_another_manifest_are_seen() {
        let root = tempfile::tempdir().unwrap();
        let dir = fresh(root.path(), "hf");
        let store = root.path().join("store");
        convert(&Checkpoint::open(&dir).unwrap(), &store, &ConvertOptions::new()).unwrap();
        let json = fs::read_to_string(store.join(manifest::MANIFEST_NAME)).unwrap();
        assert!(is_seen(&store, || fs::write(store.join(manifest::MANIFEST_NAME), json + "\n").unwrap()));
        // Without it, a store is the original's layout.
        assert!(is_seen(&store, || fs::remove_file(store.join(manifest::MANIFEST_NAME)).unwrap()));
        assert!(is_seen(&store, || fs::write(store.join("tensor.data_1"), [1]).unwrap()));
        assert!(is_seen(&store, || model(&store, "model.safetensors", "one")));
        assert_eq!(Checkpoint::open(&store).unwrap().layout(), crate::Layout::Safetensors);
    }

    #[test]
    fn links_of_a_snapshot_are_seen_to_lead_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let (blobs, dir) = (root.path().join("blobs"), root.path().join("snapshots/commit"));
        fs::create_dir_all(&blobs).unwrap();
        fs::create_dir_all(&dir).unwrap();
        model(&blobs, "first", "one");
        model(&blobs, "second", "one");
        let link = |blob: &str, name: &str| {
            let _ = fs::remove_file(dir.join(name));
            std::os::unix::fs::symlink(format!("../../blobs/{blob}"), dir.join(name)).unwrap();
        };
        link("first", "model-1.safetensors");
        // The very same file by a new link.
        assert!(!is_seen(&dir, || link("first", "model-1.safetensors")));
        assert!(is_seen(&dir, || link("second", "model-1.safetensors")));
        let map = json!({"weight_map": {"one": "model-1.safetensors"}}).to_string();
        fs::write(blobs.join("index"), &map).unwrap();
        fs::write(blobs.join("other"), &map).unwrap();
        assert!(is_seen(&dir, || link("index", hf_index::INDEX_NAME)));
        assert!(is_seen(&dir, || link("other", hf_index::INDEX_NAME)));
    }

    #[test]
    fn one_file_has_no_directory_to_look_at() {
        let root = tempfile::tempdir().unwrap();
        let dir = fresh(root.path(), "hf");
        let file = Checkpoint::open(dir.join("model-1.safetensors")).unwrap();
        model(&dir, "model-2.safetensors", "two");
        assert!(file.is_current());
    }
}
