//! `model.safetensors.index.json`: which shard holds which tensor.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::scan::Scanner;
use super::{Text, repeated};
use crate::error::FormatError;

/// File name of the index in a model directory.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";

/// Bytes that a tensor takes in an index: its name of 20 bytes or more, and its file's.
const ENTRY_LEN: usize = 60;

#[derive(Deserialize)]
struct RawIndex<'a> {
    #[serde(default)]
    metadata: Value,
    #[serde(borrow)]
    weight_map: WeightMap<'a>,
}

/// The index's `weight_map` as it is written.
#[derive(Default)]
struct WeightMap<'a> {
    /// Tensor name to place in `shards`.
    entries: Vec<(Cow<'a, str>, usize)>,
    /// Names of the shards, and the first entry of each, in the order of these.
    shards: Vec<(Cow<'a, str>, usize)>,
    /// Places in `shards` by name.
    places: HashMap<Cow<'a, str>, usize>,
    /// Place of the shard of the last entry.
    last: usize,
}

impl<'a> WeightMap<'a> {
    fn add(&mut self, name: Cow<'a, str>, shard: Cow<'a, str>) {
        // Neighbours are mostly in one shard.
        if self.shards.get(self.last).is_none_or(|(before, _)| *before != shard) {
            let next = self.shards.len();
            self.last = *self.places.entry(shard.clone()).or_insert(next);
            if self.last == next {
                self.shards.push((shard, self.entries.len()));
            }
        }
        self.entries.push((name, self.last));
    }
}

impl<'a> RawIndex<'a> {
    /// The index by a scan; `None` where it has another form than most, or an error.
    fn scanned(json: &'a [u8]) -> Option<RawIndex<'a>> {
        let mut scanner = Scanner::new(str::from_utf8(json).ok()?);
        let (mut metadata, mut weight_map) = (None, None);
        scanner.pass(b'{')?;
        scanner.items(b'}', |scanner| match scanner.key()? {
            "metadata" => metadata.replace(scanner.value()?).is_none().then_some(()),
            "weight_map" => {
                scanner.pass(b'{')?;
                let mut map = WeightMap { entries: Vec::with_capacity(json.len() / ENTRY_LEN), ..WeightMap::default() };
                scanner.items(b'}', |scanner| {
                    let name = scanner.key()?;
                    scanner.string().map(|shard| map.add(name.into(), shard.into()))
                })?;
                weight_map.replace(map).is_none().then_some(())
            }
            _ => None,
        })?;
        let metadata = metadata.unwrap_or_default();
        weight_map.filter(|_| scanner.is_at_end()).map(|weight_map| RawIndex { metadata, weight_map })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for WeightMap<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor;

        impl<'de> Visitor<'de> for MapVisitor {
            type Value = WeightMap<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap<'de>, A::Error> {
                let mut weight_map = WeightMap::default();
                while let Some((Text(name), Text(shard))) = map.next_entry()? {
                    weight_map.add(name, shard);
                }
                Ok(weight_map)
            }
        }

        deserializer.deserialize_map(MapVisitor)
    }
}

/// A checked index.
#[derive(Debug)]
pub(crate) struct HfIndex<'a> {
    /// Its `metadata` object, kept for export.
    pub(crate) metadata: Value,
    /// Tensor name to place in `shards`; no name twice.
    pub(crate) weight_map: Vec<(Cow<'a, str>, usize)>,
    /// Names of the shards, relative to the directory, sorted.
    pub(crate) shards: Vec<String>,
}

/// Parses the index; `path` is only named in errors.
pub(crate) fn parse<'a>(path: &Path, json: &'a [u8]) -> Result<HfIndex<'a>, FormatError> {
    let raw = match RawIndex::scanned(json) {
        Some(raw) => raw,
        None => {
            serde_json::from_slice(json).map_err(|e| FormatError::new(path, format!("it is not a valid index: {e}")))?
        }
    };
    let WeightMap { entries: mut weight_map, shards, .. } = raw.weight_map;
    if let Some(name) = repeated(weight_map.iter().map(|(name, _)| &**name)) {
        return Err(FormatError::new(path, "the name occurs twice in weight_map").tensor(name));
    }
    if let Some((shard, first)) = shards.iter().find(|(shard, _)| !is_plain_relative(shard)) {
        let reason = format!("its shard {shard:?} is not a path inside the model directory, or has needless parts");
        let name = weight_map.get(*first).map_or("", |(name, _)| name);
        return Err(FormatError::new(path, reason).tensor(name));
    }
    let mut order: Vec<usize> = (0..shards.len()).collect();
    order.sort_unstable_by_key(|&place| &shards[place].0);
    let mut ranks = vec![0; shards.len()];
    order.iter().enumerate().for_each(|(rank, &place)| ranks[place] = rank);
    weight_map.iter_mut().for_each(|(_, place)| *place = ranks[*place]);
    let shards = order.into_iter().map(|place| shards[place].0.to_string()).collect();
    Ok(HfIndex { metadata: raw.metadata, weight_map, shards })
}

/// Whether a path names something below its directory in the one way that it can be written: without `..`, `.`, a root or
/// an empty part. So two that differ name two things.
pub(crate) fn is_plain_relative(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::super::scan::tests::changed;
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
    fn a_scan_gives_what_parsing_gives_or_nothing() {
        let forms = [
            r#"{"metadata":{"total_size":3},"weight_map":{"a":"2.s","é":"1.s","c":"2.s"}} "#,
            "{\n  \"weight_map\": {\n    \"a\": \"1.s\", \"a\": \"1.s\"\n  }, \"metadata\": null\n}",
            r#"{"weight_map":{}}"#,
        ];
        let mut scanned = 0;
        for json in forms.iter().flat_map(|form| changed(form)) {
            let Some(index) = RawIndex::scanned(json.as_bytes()) else { continue };
            let parsed: RawIndex<'_> = serde_json::from_str(&json).unwrap();
            assert_eq!(index.metadata, parsed.metadata, "{json}");
            assert_eq!(index.weight_map.entries, parsed.weight_map.entries, "{json}");
            assert_eq!(index.weight_map.shards, parsed.weight_map.shards, "{json}");
            scanned += 1;
        }
        assert!(scanned > 500, "{scanned}");
    }

    #[test]
    fn escapes_are_read() {
        let json = br#"{"weight_map":{"a\n\u00e9":"1.safetensors","b":"\u0031.safetensors","c":"\u0032.safetensors"}}"#;
        let index = parse(Path::new("i"), json).unwrap();
        assert_eq!(index.shards, ["1.safetensors", "2.safetensors"]);
        assert_eq!(index.weight_map, [("a\n\u{e9}".into(), 0), ("b".into(), 0), ("c".into(), 1)]);
    }
}
