//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::scan::{Piece, Scanner};
use super::{Entries, Text, repeated};
use crate::error::FormatError;
use crate::tensor::TensorName;

/// File name of the index in a model directory.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";

/// Bytes that a tensor takes in an index: its name of 20 bytes or more, and its file's.
const ENTRY_LEN: usize = 60;

#[derive(Deserialize)]
struct RawIndex<'a> {
    #[serde(default)]
    metadata: Value,
    #[serde(borrow)]
    weight_map: Entries<Text<'a>, Text<'a>>,
}

/// What stands in an index, or in a piece of one.
#[derive(Debug, Default)]
pub(crate) struct Part {
    metadata: Option<Value>,
    /// Tensor name, and the number of its shard in this part.
    entries: Vec<(TensorName, usize)>,
    /// Some name does not come after the one before it.
    is_unsorted: bool,
    /// Numbers of the shards by name.
    numbers: HashMap<String, usize>,
    /// Places of the shards, by their numbers, among all that the index names; once these are known.
    places: Vec<usize>,
    /// The last shard, and its number: that of the next entry, mostly.
    last: (String, usize),
}

impl Part {
    fn add(&mut self, name: TensorName, shard: &str) {
        if self.entries.is_empty() || self.last.0 != shard {
            let next = self.numbers.len();
            self.last = (shard.to_owned(), *self.numbers.entry(shard.to_owned()).or_insert(next));
        }
        self.is_unsorted |= self.entries.last().is_some_and(|(before, _)| *before >= name);
        self.entries.push((name, self.last.1));
    }

    /// Tensor name and the place of its shard, of every entry.
    fn entries(&self) -> impl Iterator<Item = (&TensorName, usize)> + Clone {
        self.entries.iter().map(|(name, number)| (name, self.places[*number]))
    }

    /// Takes the value that comes next as the metadata, of which there may be one.
    fn take_metadata(&mut self, scanner: &mut Scanner<'_>) -> Option<()> {
        self.metadata.replace(scanner.value()?).is_none().then_some(())
    }
}

/// An index whose shards are checked; its names may repeat.
#[derive(Debug)]
pub(crate) struct HfIndex {
    /// Its `metadata` object, kept for export.
    pub(crate) metadata: Value,
    /// Names of the shards, relative to the directory, sorted.
    pub(crate) shards: Vec<String>,
    parts: Vec<Part>,
}

impl HfIndex {
    /// Puts together what the pieces of an index have, and checks it; `path` is only named in errors.
    pub(crate) fn of(path: &Path, mut parts: Vec<Part>) -> Result<HfIndex, FormatError> {
        let fail = |reason: &str| FormatError::new(path, reason);
        let mut metadata = parts.iter_mut().filter_map(|part| part.metadata.take());
        let (metadata, second) = (metadata.next().unwrap_or_default(), metadata.next());
        if second.is_some() {
            return Err(fail("its metadata occurs twice"));
        }
        let mut shards: Vec<String> = parts.iter().flat_map(|part| part.numbers.keys()).cloned().collect();
        shards.sort_unstable();
        shards.dedup();
        for part in &mut parts {
            part.places = vec![0; part.numbers.len()];
            for (shard, number) in &part.numbers {
                part.places[*number] = shards.binary_search(shard).unwrap_or_default(); // it is there
            }
        }
        let index = HfIndex { metadata, shards, parts };
        if !index.shards.iter().all(|shard| is_plain_relative(shard))
            && let Some((name, shard)) = index.weight_map().find(|(_, shard)| !is_plain_relative(&index.shards[*shard]))
        {
            let shard = &index.shards[shard];
            let reason = format!("its shard {shard:?} is not a path inside the model directory, or has needless parts");
            return Err(fail(&reason).tensor(name));
        }
        Ok(index)
    }

    /// Entries.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.entries.len()).sum()
    }

    /// Whether every name comes after the one before it, as in most; in each part, whoever scanned it has seen that.
    pub(crate) fn is_sorted(&self) -> bool {
        let ends = self.parts.iter().filter_map(|part| Some((part.entries.first()?, part.entries.last()?)));
        !self.parts.iter().any(|part| part.is_unsorted) && ends.is_sorted_by(|(_, (a, _)), ((b, _), _)| a < b)
    }

    /// The first name that occurs a second time.
    pub(crate) fn repeated(&self) -> Option<&str> {
        repeated(self.weight_map().map(|(name, _)| name.as_str()))
    }

    /// Tensor name and place in `shards` of every entry, in the order in which they are written.
    pub(crate) fn weight_map(&self) -> impl Iterator<Item = (&TensorName, usize)> + Clone {
        self.parts.iter().flat_map(Part::entries)
    }
}

/// An index, or a piece of it, by a scan; `None` where it has another form than most, or an error.
pub(crate) fn scan(piece: &Piece) -> Option<Part> {
    let mut part = Part { entries: Vec::with_capacity(piece.text.len() / ENTRY_LEN), ..Part::default() };
    let mut scanner = Scanner::new(&piece.text);
    if piece.is_first {
        scanner.pass(b'{')?;
        let mut key = scanner.key()?;
        if key == "metadata" {
            part.take_metadata(&mut scanner)?;
            scanner.pass(b',')?;
            key = scanner.key()?;
        }
        if key != "weight_map" {
            return None;
        }
        scanner.pass(b'{')?;
    }
    scanner.items_in(piece, b'}', |scanner| {
        let name = TensorName::read_from(&piece.text, scanner.key()?.into());
        scanner.string().map(|shard| part.add(name, shard))
    })?;
    if piece.is_last {
        if scanner.has(b',') {
            scanner.pass_key("metadata")?;
            part.take_metadata(&mut scanner)?;
        }
        scanner.pass(b'}')?;
    }
    scanner.is_at_end().then_some(part)
}

/// Parses a whole index, whatever its form; `path` is only named in errors.
pub(crate) fn parse(path: &Path, json: &[u8]) -> Result<Part, FormatError> {
    let raw: RawIndex<'_> =
        serde_json::from_slice(json).map_err(|e| FormatError::new(path, format!("it is not a valid index: {e}")))?;
    let mut part = Part { metadata: Some(raw.metadata), ..Part::default() };
    let names = TensorName::of_all(raw.weight_map.0.iter().map(|(Text(name), _)| &**name));
    for (name, (_, Text(shard))) in names.zip(&raw.weight_map.0) {
        part.add(name, shard);
    }
    Ok(part)
}

/// Whether a path names something below its directory in the one way that it can be written: without `..`, `.`, a root or
/// an empty part. So two that differ name two things.
pub(crate) fn is_plain_relative(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::super::scan::tests::{changed, cuts};
    use super::*;

    #[test]
    fn shards_are_named_once_and_stay_inside() {
        let json = r#"{"metadata":{"total_size":3},"weight_map":{"a":"2.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#;
        let index = index_of(json).unwrap();
        assert_eq!(index.shards, ["1.safetensors", "2.safetensors"]);
        let entries: Vec<_> = index.weight_map().map(|(name, shard)| (name.as_str(), shard)).collect();
        assert_eq!(entries, [("a", 1), ("b", 0), ("c", 1)]);
        assert_eq!(index.metadata["total_size"], 3);
        for shard in
            ["../x", "/etc/passwd", "a/../../b", "", ".", "a\\u0000b", "a//b", "a/./b", "./a", "a/", "a/.", "/", "a/.."]
        {
            let json = format!(r#"{{"weight_map":{{"w":"{shard}"}}}}"#);
            let error = index_of(&json).unwrap_err();
            assert_eq!(error.tensor.as_deref(), Some("w"), "{shard}");
        }
        let second = r#"{"weight_map":{"w":"a","v":"a","u":"../x","t":"../x"}}"#;
        assert_eq!(index_of(second).unwrap_err().tensor.as_deref(), Some("u"));
        for twice in [r#"{"w":"a","w":"b"}"#, r#"{"w":"a","v":"a","x":"b","\u0077":"a"}"#] {
            let json = format!(r#"{{"weight_map":{twice}}}"#);
            assert_eq!(index_of(&json).unwrap().repeated(), Some("w"));
        }
    }

    fn told(index: &HfIndex) -> String {
        format!("{:?}", (&index.metadata, &index.shards, index.weight_map().collect::<Vec<_>>()))
    }

    fn index_of(json: &str) -> Result<HfIndex, FormatError> {
        HfIndex::of(Path::new("i"), vec![parse(Path::new("i"), json.as_bytes())?])
    }

    #[test]
    fn a_scan_gives_what_parsing_gives_or_nothing_wherever_a_text_is_cut() {
        let forms = [
            r#"{"metadata":{"total_size":3},"weight_map":{"a":"2.s","é":"1.s","c":"2.s"}} "#,
            "{\n  \"weight_map\": {\n    \"a\": \"1.s\", \"b\": \"1.s\"\n  }, \"metadata\": null\n}",
            r#"{"weight_map":{}}"#,
        ];
        let mut scanned = [0; 2];
        for json in forms.iter().flat_map(|form| changed(form)) {
            let parsed = index_of(&json).map(|index| told(&index));
            for pieces in cuts(&json, b'"') {
                let Some(parts) = pieces.iter().map(scan).collect::<Option<Vec<Part>>>() else { continue };
                let index = HfIndex::of(Path::new("i"), parts).map(|index| told(&index));
                assert_eq!(index.ok(), parsed.clone().ok(), "{json}");
                scanned[pieces.len() - 1] += 1;
            }
        }
        assert!(scanned.iter().all(|&scanned| scanned > 500), "{scanned:?}");
    }

    #[test]
    fn escapes_are_read() {
        let json = r#"{"weight_map":{"a\n\u00e9":"1.safetensors","b":"\u0031.safetensors","c":"\u0032.safetensors"}}"#;
        let index = index_of(json).unwrap();
        assert_eq!(index.shards, ["1.safetensors", "2.safetensors"]);
        let entries: Vec<_> = index.weight_map().map(|(name, shard)| (name.as_str(), shard)).collect();
        assert_eq!(entries, [("a\n\u{e9}", 0), ("b", 0), ("c", 1)]);
        // One text: memory for each name would be several times the index.
        assert!(entries.windows(2).all(|pair| pair[0].0.as_bytes().as_ptr_range().end == pair[1].0.as_ptr()));
    }
}
