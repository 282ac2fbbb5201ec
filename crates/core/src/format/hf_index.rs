//! `model.safetensors.index.json`: which shard holds which tensor.

use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::Value;

use super::Entries;
use crate::error::FormatError;

/// File name of the index in a model directory.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct RawIndex {
    #[serde(default)]
    metadata: Value,
    weight_map: Entries<String>,
}

/// A checked index.
#[derive(Debug)]
pub(crate) struct HfIndex {
    /// Its `metadata` object, kept for export.
    pub(crate) metadata: Value,
    /// Tensor name to place in `shards`.
    pub(crate) weight_map: Vec<(String, usize)>,
    /// Names of the shards, relative to the directory, sorted.
    pub(crate) shards: Vec<String>,
}

/// Parses the index; `path` is only named in errors.
pub(crate) fn parse(path: &Path, json: &[u8]) -> Result<HfIndex, FormatError> {
    let raw: RawIndex =
        serde_json::from_slice(json).map_err(|e| FormatError::new(path, format!("it is not a valid index: {e}")))?;
    if let Some(name) = raw.weight_map.repeated_key() {
        return Err(FormatError::new(path, "the name occurs twice in weight_map").tensor(name));
    }
    let mut shards: Vec<String> = raw.weight_map.0.iter().map(|(_, shard)| shard.clone()).collect();
    shards.sort_unstable();
    shards.dedup();
    let mut weight_map = Vec::with_capacity(raw.weight_map.0.len());
    for (name, shard) in raw.weight_map.0 {
        if !is_plain_relative(&shard) {
            let reason = format!("its shard {shard:?} is not a path inside the model directory");
            return Err(FormatError::new(path, reason).tensor(&name));
        }
        // Every shard was put into `shards` above.
        let place = shards.binary_search(&shard).unwrap_or_default();
        weight_map.push((name, place));
    }
    Ok(HfIndex { metadata: raw.metadata, weight_map, shards })
}

/// Whether a path names something below its directory, without `..`, a root or an empty part.
pub(crate) fn is_plain_relative(path: &str) -> bool {
    let mut components = Path::new(path).components().peekable();
    components.peek().is_some() && !path.contains('\0') && components.all(|c| matches!(c, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_named_once_and_stay_inside() {
        let json = r#"{"metadata":{"total_size":3},"weight_map":{"a":"2.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#;
        let index = parse(Path::new("i"), json.as_bytes()).unwrap();
        assert_eq!(index.shards, ["1.safetensors", "2.safetensors"]);
        assert_eq!(index.weight_map, [("a".into(), 1), ("b".into(), 0), ("c".into(), 1)]);
        assert_eq!(index.metadata["total_size"], 3);
        for shard in ["../x", "/etc/passwd", "a/../../b", "", ".", "a\\u0000b"] {
            let json = format!(r#"{{"weight_map":{{"w":"{shard}"}}}}"#);
            let error = parse(Path::new("i"), json.as_bytes()).unwrap_err();
            assert_eq!(error.tensor.as_deref(), Some("w"), "{shard}");
        }
        let twice = r#"{"weight_map":{"w":"a","w":"b"}}"#;
        assert!(parse(Path::new("i"), twice.as_bytes()).unwrap_err().reason.contains("twice"));
    }
}
