//! `model.safetensors.index.json`: which shard holds which tensor.

use std::borrow::Cow;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{Entries, Text, repeated};
use crate::error::FormatError;

/// File name of the index in a model directory.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct RawIndex<'a> {
    #[serde(default)]
    metadata: Value,
    #[serde(borrow)]
    weight_map: Entries<Text<'a>, Text<'a>>,
}

/// A checked index.
#[derive(Debug)]
pub(crate) struct HfIndex<'a> {
    /// Its `metadata` object, kept for export.
    pub(crate) metadata: Value,
    /// Tensor name to place in `shards`.
    pub(crate) weight_map: Vec<(Cow<'a, str>, usize)>,
    /// Names of the shards, relative to the directory, sorted.
    pub(crate) shards: Vec<String>,
}

/// Parses the index; `path` is only named in errors.
pub(crate) fn parse<'a>(path: &Path, json: &'a [u8]) -> Result<HfIndex<'a>, FormatError> {
    let raw: RawIndex<'_> =
        serde_json::from_slice(json).map_err(|e| FormatError::new(path, format!("it is not a valid index: {e}")))?;
    let entries = raw.weight_map.0;
    if let Some(name) = repeated(entries.iter().map(|(name, _)| &*name.0)) {
        return Err(FormatError::new(path, "the name occurs twice in weight_map").tensor(name));
    }
    let mut shards: Vec<&str> = entries.iter().map(|(_, shard)| &*shard.0).collect();
    shards.dedup(); // neighbours are mostly in one shard, so that little is left to sort
    shards.sort_unstable();
    shards.dedup();
    let shards: Vec<String> = shards.into_iter().map(str::to_owned).collect();
    let mut place = usize::MAX; // of the shard before
    let placed = |(Text(name), Text(shard)): (Text<'a>, Text<'a>)| {
        if shards.get(place).is_none_or(|before| *before != shard) {
            if !is_plain_relative(&shard) {
                let reason =
                    format!("its shard {shard:?} is not a path inside the model directory, or has needless parts");
                return Err(FormatError::new(path, reason).tensor(&name));
            }
            // Every shard was put into `shards` above.
            place = shards.binary_search_by(|other| other.as_str().cmp(&shard)).unwrap_or_default();
        }
        Ok((name, place))
    };
    let weight_map = entries.into_iter().map(placed).collect::<Result<_, _>>()?; // in the entries' memory
    Ok(HfIndex { metadata: raw.metadata, weight_map, shards })
}

/// Whether a path names something below its directory in the one way that it can be written: without `..`, `.`, a root or
/// an empty part. So two that differ name two things.
pub(crate) fn is_plain_relative(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
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
        for shard in
            ["../x", "/etc/passwd", "a/../../b", "", ".", "a\\u0000b", "a//b", "a/./b", "./a", "a/", "a/.", "/", "a/.."]
        {
            let json = format!(r#"{{"weight_map":{{"w":"{shard}"}}}}"#);
            let error = parse(Path::new("i"), json.as_bytes()).unwrap_err();
            assert_eq!(error.tensor.as_deref(), Some("w"), "{shard}");
        }
        let second = br#"{"weight_map":{"w":"a","v":"a","u":"../x","t":"../x"}}"#;
        assert_eq!(parse(Path::new("i"), second).unwrap_err().tensor.as_deref(), Some("u"));
        for twice in [r#"{"w":"a","w":"b"}"#, r#"{"w":"a","v":"a","x":"b","\u0077":"a"}"#] {
            let json = format!(r#"{{"weight_map":{twice}}}"#);
            let error = parse(Path::new("i"), json.as_bytes()).unwrap_err();
            assert!(error.reason.contains("twice"));
            assert_eq!(error.tensor.as_deref(), Some("w"));
        }
    }

    #[test]
    fn escapes_are_read() {
        let json = br#"{"weight_map":{"a\n\u00e9":"1.safetensors","b":"\u0031.safetensors","c":"\u0032.safetensors"}}"#;
        let index = parse(Path::new("i"), json).unwrap();
        assert_eq!(index.shards, ["1.safetensors", "2.safetensors"]);
        assert_eq!(index.weight_map, [("a\n\u{e9}".into(), 0), ("b".into(), 0), ("c".into(), 1)]);
    }
}
