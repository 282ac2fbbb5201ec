//! The safetensors header: 8 bytes of length, then JSON, then the tensors' bytes without holes.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};

use super::Text;
use super::scan::{Piece, Scanner};
use crate::dtype::Dtype;
use crate::error::FormatError;
use crate::pool::SharedText;
use crate::tensor::{Shape, TensorInfo, TensorName};
use crate::tensors::Tensors;

/// safetensors' own limit on the JSON's length (`MAX_HEADER_SIZE` in its source).
pub(crate) const MAX_HEADER_LEN: u64 = 100_000_000;

/// Key of what is no tensor: a file's metadata.
pub(crate) const METADATA: &str = "__metadata__";

/// Bytes that a tensor takes in a header: its name of 20 bytes or more, and 70 for the rest.
const ENTRY_LEN: usize = 90;

/// Bytes of the length field before the JSON.
pub(crate) const LENGTH_FIELD: u64 = 8;

/// A header, or a piece of one. Each tensor is checked by itself, and none beside the others yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Header {
    pub(crate) tensors: Vec<TensorInfo>,
    /// Some tensor does not follow the one before it.
    pub(crate) is_out_of_line: bool,
    /// `Some(None)` where it is there and null, which is allowed, once.
    pub(crate) metadata: Option<Option<BTreeMap<String, String>>>,
}

impl Header {
    fn push(&mut self, tensor: TensorInfo) {
        self.is_out_of_line |= self.tensors.last().is_some_and(|before| !follows(before, &tensor));
        self.tensors.push(tensor);
    }
}

/// The file that a header is of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OfFile<'a> {
    pub(crate) path: &'a Path,
    /// Its place among a checkpoint's.
    pub(crate) number: usize,
    /// Bytes of the header's JSON.
    pub(crate) json_len: u64,
}

#[derive(Deserialize)]
struct RawTensor<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// Reads the entries of a header as tensors.
struct Reader<'a> {
    file: OfFile<'a>,
    text: &'a Arc<SharedText>,
    /// The first tensor that is none.
    fault: &'a mut Option<FormatError>,
}

impl OfFile<'_> {
    /// The first byte after the header.
    fn data_start(&self) -> u64 {
        LENGTH_FIELD + self.json_len
    }
}

impl Reader<'_> {
    fn checked(&self, name: Cow<'_, str>, raw: RawTensor<'_>) -> Result<TensorInfo, FormatError> {
        let fail = |reason: String| FormatError::new(self.file.path, reason).tensor(&name);
        let dtype = Dtype::from_name(&raw.dtype).ok_or_else(|| fail(format!("unknown dtype {:?}", raw.dtype)))?;
        let expected = dtype.byte_len(&raw.shape).map_err(|why| fail(why.to_owned()))?;
        let (start, end) = raw.data_offsets;
        let len =
            end.checked_sub(start).ok_or_else(|| fail(format!("its data_offsets [{start}, {end}] run backwards")))?;
        let offset = self
            .file
            .data_start()
            .checked_add(start)
            .filter(|offset| offset.checked_add(len).is_some())
            .ok_or_else(|| fail(format!("its data_offsets [{start}, {end}] overflow 64 bits")))?;
        if len != expected {
            let reason = format!("its {len} bytes are not the {expected} of {dtype} {:?}", raw.shape);
            return Err(fail(reason).at(offset));
        }
        let name = TensorName::read_from(self.text, name);
        let file = self.file.number;
        Ok(TensorInfo { name, dtype, shape: raw.shape, strides: None, file, offset, len, shard: file })
    }

    /// A header with room for as many tensors as most headers of this length have, and no more than twice as many: memory
    /// that grows is moved, of which every processor has to be told.
    fn header(&self) -> Header {
        Header { tensors: Vec::with_capacity(self.text.len() / ENTRY_LEN), ..Header::default() }
    }

    fn scanned(&self, piece: &Piece) -> Option<Header> {
        let mut header = self.header();
        let mut scanner = Scanner::new(self.text);
        if piece.is_first {
            scanner.pass(b'{')?;
        }
        scanner.items_in(piece, b'}', |scanner| {
            let name = scanner.key()?;
            if name == METADATA {
                return header.metadata.replace(scanner.value()?).is_none().then_some(());
            }
            scanner.pass(b'{')?;
            scanner.pass_key("dtype")?;
            let dtype = scanner.string()?.into();
            scanner.pass(b',')?;
            scanner.pass_key("shape")?;
            scanner.pass(b'[')?;
            let mut shape = Shape::default();
            scanner.items(b']', |scanner| scanner.number().map(|dim| shape.push(dim)))?;
            scanner.pass(b',')?;
            scanner.pass_key("data_offsets")?;
            scanner.pass(b'[')?;
            let start = scanner.number()?;
            scanner.pass(b',')?;
            let data_offsets = (start, scanner.number()?);
            scanner.pass(b']')?;
            scanner.pass(b'}')?;
            header.push(self.checked(name.into(), RawTensor { dtype, shape, data_offsets }).ok()?);
            Some(())
        })?;
        scanner.is_at_end().then_some(header)
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Header;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = self.header();
        while let Some(Text(name)) = map.next_key()? {
            if name != METADATA {
                match self.checked(name, map.next_value()?) {
                    Ok(tensor) => header.push(tensor),
                    Err(error) => _ = self.fault.get_or_insert(error),
                }
            } else if header.metadata.replace(map.next_value()?).is_some() {
                return Err(A::Error::custom("__metadata__ occurs twice"));
            }
        }
        Ok(header)
    }
}

/// Checks the length field: how many bytes of JSON follow it in a file of `file_len` bytes.
pub(crate) fn json_len(path: &Path, field: [u8; 8], file_len: u64) -> Result<u64, FormatError> {
    let len = u64::from_le_bytes(field);
    if len > MAX_HEADER_LEN {
        return Err(FormatError::new(
            path,
            format!("its header claims {len} bytes, more than the {MAX_HEADER_LEN} that safetensors allows"),
        ));
    }
    if len > file_len.saturating_sub(LENGTH_FIELD) {
        return Err(FormatError::new(
            path,
            format!(
                "its header claims {len} bytes, but the file has only {file_len}: it is truncated or not safetensors"
            ),
        ));
    }
    Ok(len)
}

/// The header, or a piece of it, by a scan; `None` where it has another form than most, or an error.
pub(crate) fn scan(file: OfFile<'_>, piece: &Piece) -> Option<Header> {
    Reader { file, text: &piece.text, fault: &mut None }.scanned(piece)
}

/// Parses a whole header, whatever its form.
pub(crate) fn parse(file: OfFile<'_>, json: Vec<u8>) -> Result<Header, FormatError> {
    let invalid = |e: serde_json::Error| {
        let error = FormatError::new(file.path, format!("its header is not valid: {e}"));
        if e.line() == 1 { error.at(LENGTH_FIELD + e.column() as u64) } else { error }
    };
    let text = String::from_utf8(json).map_err(|e| {
        let at = e.utf8_error().valid_up_to() as u64;
        FormatError::new(file.path, "its header is not valid: it is not UTF-8").at(LENGTH_FIELD + at)
    })?;
    let text = Arc::new(SharedText::from(text));
    let mut fault = None;
    let mut json = serde_json::Deserializer::from_str(&text);
    let reader = Reader { file, text: &text, fault: &mut fault };
    let header = reader.deserialize(&mut json).and_then(|header| json.end().map(|()| header)).map_err(invalid)?;
    fault.map_or(Ok(header), Err)
}

/// The order of a file's tensors: that of their places, of those without bytes that of their names.
fn order(a: &TensorInfo, b: &TensorInfo) -> Ordering {
    (a.offset, a.len, &a.name).cmp(&(b.offset, b.len, &b.name))
}

/// Whether a tensor comes after another in their file, and begins where that one ends.
fn follows(before: &TensorInfo, tensor: &TensorInfo) -> bool {
    before.offset + before.len == tensor.offset && order(before, tensor).is_le()
}

/// A file's tensors, as the pieces of its header have them, in their order; checks that each begins where the one before it ends.
///
/// Rejects what safetensors rejects: overlaps, holes, and bytes after the last tensor.
pub(crate) fn in_line(file: OfFile<'_>, pieces: Vec<Header>, file_len: u64) -> Result<Tensors, FormatError> {
    let mut tensors = Tensors::default();
    let mut are_in_line = true;
    for piece in pieces {
        let ends = tensors.last().zip(piece.tensors.first());
        are_in_line &= !piece.is_out_of_line && ends.is_none_or(|(last, first)| follows(last, first));
        tensors.push_part(piece.tensors);
    }
    let start = tensors.first().map_or(file.data_start(), |first| first.offset);
    let end = tensors.last().map_or(file.data_start(), |last| last.offset + last.len);
    if !are_in_line || start != file.data_start() || end != file_len {
        tensors.sort_by(order);
        check_places(file, &tensors, file_len)?;
    }
    Ok(tensors)
}

/// The same of sorted tensors.
fn check_places(file: OfFile<'_>, tensors: &Tensors, file_len: u64) -> Result<(), FormatError> {
    let mut end = file.data_start();
    for tensor in tensors {
        if tensor.offset != end {
            let what = if tensor.offset < end { "overlaps the tensor before it" } else { "leaves a hole before it" };
            let reason = format!("{what}, which ends at byte {end}");
            return Err(FormatError::new(file.path, reason).tensor(&tensor.name).at(tensor.offset));
        }
        end += tensor.len;
        if end > file_len {
            let reason = format!("it ends at byte {end}, but the file has only {file_len}: it is truncated");
            return Err(FormatError::new(file.path, reason).tensor(&tensor.name).at(tensor.offset));
        }
    }
    if end != file_len {
        let reason = format!("{} bytes follow the last tensor, which no tensor names", file_len - end);
        return Err(FormatError::new(file.path, reason).at(end));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::scan::tests::{changed, cuts};
    use super::*;

    fn of(json: &str) -> OfFile<'static> {
        OfFile { path: Path::new("m.safetensors"), number: 0, json_len: json.len() as u64 }
    }

    fn parse_str(json: &str, data: u64) -> Result<Header, FormatError> {
        let mut header = parse(of(json), json.into())?;
        let metadata = header.metadata.take();
        let tensors = in_line(of(json), vec![header], LENGTH_FIELD + json.len() as u64 + data)?;
        Ok(Header { tensors: tensors.iter().cloned().collect(), metadata, ..Header::default() })
    }

    fn reason(json: &str, data: u64) -> String {
        parse_str(json, data).unwrap_err().to_string()
    }

    #[test]
    fn tensors_come_in_the_order_of_their_bytes() {
        let json = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"F32","shape":[2],"data_offsets":[2,10]},
            "a\n\u00e9":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},
            "z":{"dtype":"I8","shape":[0,7],"data_offsets":[10,10]}}"#;
        let header = parse_str(json, 10).unwrap();
        let start = LENGTH_FIELD + json.len() as u64;
        let seen: Vec<_> = header.tensors.iter().map(|t| (t.name.as_str(), t.offset - start, t.len)).collect();
        assert_eq!(seen, [("a\né", 0, 2), ("b", 2, 8), ("z", 10, 0)]);
        assert_eq!(header.metadata.unwrap().unwrap()["format"], "pt");
        assert_eq!(parse_str("{}", 0).unwrap(), Header::default());
        let null = r#"{"__metadata__":null}"#;
        assert_eq!(parse_str(null, 0).unwrap().metadata, Some(None));
        assert!(::safetensors::SafeTensors::deserialize(&test_support::safetensors(null, &[])).is_ok());
    }

    #[test]
    fn a_scan_gives_what_parsing_gives_or_nothing_wherever_a_text_is_cut() {
        let forms = [
            r#"{"__metadata__":{"format":"pt"},"é":{"dtype":"U8","shape":[2,1],"data_offsets":[0,2]},"b":{"dtype":"F4","shape":[0],"data_offsets":[2,2]}} "#,
            "{\"a\": {\"dtype\": \"I8\", \"shape\": [1, 1, 1, 10], \"data_offsets\": [0, 10]}, \n\"__metadata__\": {}}",
            r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"__metadata__":null}"#,
        ];
        let mut scanned = [0; 2];
        assert!(
            forms.iter().all(|form| cuts(form, b'}').last().is_some_and(|whole| scan(of(form), &whole[0]).is_some()))
        );
        for json in forms.iter().flat_map(|form| changed(form)) {
            let parsed = parse(of(&json), json.clone().into());
            for pieces in cuts(&json, b'}') {
                let Some(headers) = pieces.iter().map(|piece| scan(of(&json), piece)).collect::<Option<Vec<_>>>()
                else {
                    continue;
                };
                scanned[headers.len() - 1] += 1;
                let metadata: Vec<_> = headers.iter().filter_map(|header| header.metadata.clone()).collect();
                let tensors: Vec<_> = headers.into_iter().flat_map(|header| header.tensors).collect();
                assert_eq!(metadata.len() < 2, parsed.is_ok(), "{json}");
                if let Ok(parsed) = &parsed {
                    assert_eq!((&tensors, metadata.first()), (&parsed.tensors, parsed.metadata.as_ref()), "{json}");
                }
            }
        }
        assert!(scanned.iter().all(|&scanned| scanned > 500), "{scanned:?}");
        assert!(forms.iter().all(|form| parse_str(form, 2).is_ok() || parse_str(form, 10).is_ok()));
    }

    #[test]
    fn every_fault_is_named() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        for (json, data, expected) in [
            (one("F99", "[1]", "[0,4]"), 4, "unknown dtype \"F99\""),
            (one("F32", "[2]", "[0,4]"), 4, "its 4 bytes are not the 8 of F32 [2]"),
            (one("F32", "[2]", "[8,0]"), 8, "run backwards"),
            (one("F32", "[4294967296,4294967296]", "[0,8]"), 8, "overflows 64 bits"),
            (one("U8", "[2]", "[18446744073709551613,18446744073709551615]"), 8, "overflow 64 bits"),
            (one("F4", "[3]", "[0,2]"), 2, "whole bytes"),
            (one("F32", "[1]", "[4,8]"), 8, "leaves a hole"),
            (one("F32", "[2]", "[0,8]"), 7, "truncated"),
            (one("F32", "[1]", "[0,4]"), 5, "1 bytes follow"),
            (one("F32", "[-1]", "[0,4]"), 4, "not valid"),
            (one("F32", "[1]", "[0,4,8]"), 4, "not valid"),
            ("[]".into(), 0, "not valid"),
            ("{".into(), 0, "not valid"),
            (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "occurs twice"),
            (r#"{"__metadata__":null,"__metadata__":{}}"#.into(), 0, "occurs twice"),
            (r#"{"__metadata__":{"a":1}}"#.into(), 0, "not valid"),
        ] {
            let message = reason(&json, data);
            assert!(message.contains(expected), "{json}: {message}");
        }
        let overlap = r#"{"v":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
        assert!(reason(overlap, 3).contains("tensor \"w\""), "{}", reason(overlap, 3));
        assert!(reason(overlap, 3).contains("overlaps"));
    }

    #[test]
    fn the_length_field_is_checked_against_the_file_and_the_limit() {
        let path = Path::new("m");
        assert_eq!(json_len(path, 2u64.to_le_bytes(), 10), Ok(2));
        assert!(json_len(path, 3u64.to_le_bytes(), 10).is_err());
        assert!(json_len(path, 1u64.to_le_bytes(), 3).is_err());
        assert!(json_len(path, u64::MAX.to_le_bytes(), u64::MAX).is_err());
        assert!(json_len(path, (MAX_HEADER_LEN + 1).to_le_bytes(), u64::MAX).is_err());
    }
}
