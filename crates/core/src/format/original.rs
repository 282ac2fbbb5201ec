//! `tensor_index.json`, the original ServerlessLLM index: `{name: [offset, bytes, shape, strides, "torch.dtype"]}`.
//!
//! Offsets run over the concatenation of all data files.

use std::path::Path;

use serde::Deserialize;

use super::{Entries, repeated};
use crate::dtype::Dtype;
use crate::error::FormatError;

/// File name of the index in a model directory.
pub(crate) const INDEX_NAME: &str = "tensor_index.json";

/// The largest offset into a data file's concatenation that is believed: 2^62 bytes.
const MAX_OFFSET: u64 = 1 << 62;

#[derive(Deserialize)]
struct RawEntry(u64, u64, Vec<u64>, Vec<u64>, String);

/// One tensor of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// `None` where the elements are contiguous.
    pub(crate) strides: Option<Vec<u64>>,
    /// Over the concatenation of all data files.
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Strides, in elements, of a contiguous tensor.
pub(crate) fn contiguous_strides(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i].max(1));
    }
    strides
}

/// Whether strides are those of a contiguous tensor. That of a dimension of one element, or of none, is never taken.
pub(crate) fn are_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut steps = shape.iter().zip(strides).zip(contiguous_strides(shape));
    shape.len() == strides.len()
        && (shape.contains(&0) || steps.all(|((&dim, &step), dense)| dim == 1 || step == dense))
}

/// Bytes from a tensor's first element to the end of its last one.
pub(crate) fn strided_len(dtype: Dtype, shape: &[u64], strides: &[u64]) -> Result<u64, &'static str> {
    if shape.len() != strides.len() {
        return Err("it has not as many strides as dimensions");
    }
    dtype.byte_len(shape)?; // also where elements share a place
    if shape.contains(&0) {
        return Ok(0);
    }
    let mut last: u64 = 0;
    for (&dim, &stride) in shape.iter().zip(strides) {
        let reach = (dim - 1).checked_mul(stride).ok_or("its strides overflow 64 bits")?;
        last = last.checked_add(reach).ok_or("its strides overflow 64 bits")?;
    }
    let elements = last.checked_add(1).ok_or("its strides overflow 64 bits")?;
    dtype.byte_len(&[elements])
}

/// Parses and checks the index; whether the data files hold its tensors is the caller's question.
pub(crate) fn parse(path: &Path, json: &[u8]) -> Result<Vec<IndexEntry>, FormatError> {
    let raw: Entries<String, RawEntry> =
        serde_json::from_slice(json).map_err(|e| FormatError::new(path, format!("it is not a valid index: {e}")))?;
    if let Some(name) = repeated(raw.0.iter().map(|(name, _)| name.as_str())) {
        return Err(FormatError::new(path, "the name occurs twice").tensor(name));
    }
    let mut entries = Vec::with_capacity(raw.0.len());
    for (name, RawEntry(offset, len, mut shape, mut strides, dtype_name)) in raw.0 {
        let fail = |reason: String| FormatError::new(path, reason).tensor(&name).at(offset);
        let dtype = Dtype::from_torch_name(&dtype_name).ok_or_else(|| fail(format!("unknown dtype {dtype_name:?}")))?;
        if offset.checked_add(len).is_none_or(|end| end > MAX_OFFSET) {
            return Err(fail(format!("offset {offset} and length {len} overflow")));
        }
        if dtype == Dtype::F4 {
            if !are_contiguous(&shape, &strides) {
                return Err(fail("it has strides, and elements of 4 bits in pairs".into()));
            }
            // torch counts pairs, safetensors counts elements.
            if let Some(last) = shape.last_mut() {
                *last = last.checked_mul(2).ok_or_else(|| fail("its shape overflows 64 bits".into()))?;
            }
            strides = contiguous_strides(&shape);
        }
        let strides = (!are_contiguous(&shape, &strides)).then_some(strides);
        match &strides {
            None => {
                let expected = dtype.byte_len(&shape).map_err(|why| fail(why.to_owned()))?;
                // The original stores whole storages: a contiguous view of a larger one has bytes to spare.
                if expected > len {
                    return Err(fail(format!("its {len} bytes are fewer than the {expected} of {dtype} {shape:?}")));
                }
                entries.push(IndexEntry { name, dtype, shape, strides: None, offset, len: expected });
            }
            Some(steps) => {
                let expected = strided_len(dtype, &shape, steps).map_err(|why| fail(why.to_owned()))?;
                if expected > len {
                    return Err(fail(format!("its strides reach byte {expected} of {len}")));
                }
                entries.push(IndexEntry { name, dtype, shape, strides, offset, len });
            }
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_the_original_writes_them() {
        let json = br#"{"a": [0, 8, [2, 2], [2, 1], "torch.float16"], "t": [8, 8, [2, 2], [1, 2], "torch.float16"], "s": [16, 4, [], [], "torch.float32"]}"#;
        let entries = parse(Path::new("i"), json).unwrap();
        assert_eq!(entries[0].strides, None);
        assert_eq!(entries[1].strides, Some(vec![1, 2]));
        assert_eq!((entries[2].dtype, entries[2].len), (Dtype::F32, 4));
    }

    #[test]
    fn strides_of_one_element_or_none_do_not_count() {
        for (entry, shape, len) in [
            (r#"[0, 8, [1, 4], [1, 1], "torch.float16"]"#, vec![1, 4], 8),
            (r#"[0, 8, [4, 1], [1, 7], "torch.float16"]"#, vec![4, 1], 8),
            (r#"[0, 12, [2, 1, 3], [3, 99, 1], "torch.float16"]"#, vec![2, 1, 3], 12),
            (r#"[0, 0, [0, 4], [1, 1], "torch.float16"]"#, vec![0, 4], 0),
            (r#"[0, 4, [1, 4], [9, 1], "torch.float4_e2m1fn_x2"]"#, vec![1, 8], 4),
        ] {
            let entries = parse(Path::new("i"), format!(r#"{{"w": {entry}}}"#).as_bytes()).unwrap();
            assert_eq!((&entries[0].strides, &entries[0].shape, entries[0].len), (&None, &shape, len), "{entry}");
        }
    }

    #[test]
    fn every_fault_is_named() {
        for (entry, expected) in [
            (r#"[0, 4, [1], [1], "torch.float7"]"#, "unknown dtype"),
            (r#"[0, 4, [2], [1], "torch.float32"]"#, "fewer than the 8"),
            (r#"[0, 8, [2, 2], [1, 2], "torch.float32"]"#, "its strides reach byte 16 of 8"),
            (r#"[0, 8, [2, 2], [1], "torch.uint8"]"#, "strides as dimensions"),
            (r#"[0, 8, [4294967296, 4294967296], [0, 0], "torch.uint8"]"#, "overflows"),
            (r#"[0, 8, [2, 4], [1, 2], "torch.float4_e2m1fn_x2"]"#, "it has strides"),
            (r#"[0, 8, [8], [], "torch.uint8"]"#, "strides as dimensions"),
            (r#"[0, 8, [1], [], "torch.uint8"]"#, "strides as dimensions"),
            (r#"[18446744073709551615, 8, [8], [1], "torch.uint8"]"#, "overflow"),
            (r#"[-1, 8, [8], [1], "torch.uint8"]"#, "not a valid index"),
            (r#"[0, 8, [8], [1]]"#, "not a valid index"),
        ] {
            let json = format!(r#"{{"w": {entry}}}"#);
            let message = parse(Path::new("i"), json.as_bytes()).unwrap_err().to_string();
            assert!(message.contains(expected), "{entry}: {message}");
        }
    }
}
