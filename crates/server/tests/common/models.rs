//! Made models.

use std::fs;
use std::path::Path;

use sllm_core::{Checkpoint, ConvertOptions, convert};
pub(crate) use test_support::noise;

/// A safetensors model of one tensor in a directory of its own.
pub(crate) fn safetensors(models: &Path, name: &str, seed: u64, len: usize) {
    let file = test_support::safetensors(test_support::header(len as u64), &noise(seed, len));
    fs::create_dir_all(models.join(name)).unwrap();
    fs::write(models.join(name).join("model.safetensors"), file).unwrap();
}

/// A store, with checksums.
pub(crate) fn store(models: &Path, name: &str, seed: u64, len: usize) {
    let source = tempfile::tempdir_in(models).unwrap();
    safetensors(source.path(), "m", seed, len);
    let source = Checkpoint::open(source.path().join("m")).unwrap();
    fs::create_dir_all(models.join(name).parent().unwrap()).unwrap();
    convert(&source, &models.join(name), &ConvertOptions::new()).unwrap();
}

/// The original's layout, in two files.
pub(crate) fn original(models: &Path, name: &str, seed: u64, lens: [usize; 2]) {
    let dir = models.join(name);
    fs::create_dir_all(&dir).unwrap();
    let mut index = serde_json::Map::new();
    let mut offset = 0;
    for (at, len) in lens.into_iter().enumerate() {
        fs::write(dir.join(format!("tensor.data_{at}")), noise(seed + at as u64, len)).unwrap();
        index.insert(format!("t{at}"), serde_json::json!([offset, len, [len], [1], "torch.uint8"]));
        offset += len;
    }
    fs::write(dir.join("tensor_index.json"), serde_json::Value::from(index).to_string()).unwrap();
}

/// The bytes of a model's files, one after the other.
pub(crate) fn bytes(model: &Path) -> Vec<u8> {
    let checkpoint = Checkpoint::open(model).unwrap();
    checkpoint.files().iter().flat_map(|file| fs::read(file.path()).unwrap()).collect()
}
