//! Which byte of which file is to hold what: pure data, no I/O.

use std::collections::HashMap;

use crate::checkpoint::DataFile;
use crate::error::Result;
use crate::format::PAGE;
use crate::format::manifest::{TensorEntry, data_file_name, tensor_align};

/// Where bytes to be written come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bytes<'a> {
    /// From this byte of a file on.
    File(&'a DataFile, u64),
    /// From memory, all of it.
    Memory(&'a [u8]),
}

impl Bytes<'_> {
    /// Fills `buf` with the bytes from place `at` on.
    pub(crate) fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        match self {
            Bytes::File(file, offset) => file.read_exact_at(buf, offset + at),
            Bytes::Memory(bytes) => {
                let at = as_index(at);
                buf.copy_from_slice(&bytes[at..at + buf.len()]);
                Ok(())
            }
        }
    }

    /// Equal for bytes that begin at the same place.
    fn origin(&self) -> (usize, u64) {
        match self {
            Bytes::File(file, offset) => (std::ptr::from_ref(*file).addr(), *offset),
            Bytes::Memory(bytes) => (bytes.as_ptr().addr(), 0),
        }
    }
}

/// A number that is known to be at most the length of something in memory.
pub(crate) fn as_index(number: u64) -> usize {
    usize::try_from(number).expect("it counts bytes in memory")
}

/// A run of bytes of a target file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent<'a> {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) bytes: Bytes<'a>,
}

/// A file to be written. What no extent covers is zero.
#[derive(Debug, Clone, Default)]
pub(crate) struct TargetFile<'a> {
    pub(crate) name: String,
    pub(crate) len: u64,
    /// By ascending offset, none empty, without overlap.
    pub(crate) extents: Vec<Extent<'a>>,
}

impl TargetFile<'_> {
    /// Fills `buf` with what is to stand from `offset` on.
    pub(crate) fn compose(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        let first = self.extents.partition_point(|extent| extent.offset + extent.len <= offset);
        for extent in self.extents[first..].iter().take_while(|extent| extent.offset < end) {
            let from = extent.offset.max(offset);
            let to = (extent.offset + extent.len).min(end);
            buf[as_index(at - offset)..as_index(from - offset)].fill(0);
            extent.bytes.read(from - extent.offset, &mut buf[as_index(from - offset)..as_index(to - offset)])?;
            at = to;
        }
        buf[as_index(at - offset)..].fill(0);
        Ok(())
    }
}

/// Gives every tensor its place by the rules of `docs/format.md`, in the order given, and lists the data files.
///
/// Sets `file` and `offset` of each tensor. Tensors whose bytes begin at the same place and are equally long are
/// tied: they get one place.
pub(crate) fn place<'a>(tensors: &mut [TensorEntry], bytes: &[Bytes<'a>], max_file_len: u64) -> Vec<TargetFile<'a>> {
    let mut files: Vec<TargetFile<'a>> = Vec::new();
    let mut placed: HashMap<((usize, u64), u64), (usize, u64)> = HashMap::new();
    for (tensor, &bytes) in tensors.iter_mut().zip(bytes) {
        let len = tensor.len;
        if let Some(&place) = placed.get(&(bytes.origin(), len)) {
            (tensor.file, tensor.offset) = place;
            continue;
        }
        let align = tensor_align(len);
        let fits = |file: &TargetFile<'_>| file.len == 0 || file.len.next_multiple_of(align) + len <= max_file_len;
        if !files.last().is_some_and(fits) {
            files.push(TargetFile { name: data_file_name(files.len()), ..TargetFile::default() });
        }
        let k = files.len() - 1;
        let file = &mut files[k];
        (tensor.file, tensor.offset) = (k, file.len.next_multiple_of(align));
        if len > 0 {
            file.extents.push(Extent { offset: tensor.offset, len, bytes });
            file.len = tensor.offset + len;
            placed.insert((bytes.origin(), len), (tensor.file, tensor.offset));
        }
    }
    for file in &mut files {
        file.len = file.len.next_multiple_of(PAGE);
    }
    files
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dtype::Dtype;
    use crate::format::manifest::LARGE_TENSOR;

    fn entries(lens: &[u64]) -> Vec<TensorEntry> {
        let entry = |(i, &len): (usize, &u64)| TensorEntry {
            name: i.to_string(),
            dtype: Dtype::U8,
            shape: vec![len],
            strides: None,
            file: 0,
            offset: 0,
            len,
            shard: 0,
        };
        lens.iter().enumerate().map(entry).collect()
    }

    fn places(lens: &[u64], max_file_len: u64) -> (Vec<(usize, u64)>, Vec<u64>) {
        let memory = vec![7u8; as_index(lens.iter().sum())];
        let mut rest = memory.as_slice();
        let mut bytes = Vec::new();
        for &len in lens {
            let (one, others) = rest.split_at(as_index(len));
            bytes.push(Bytes::Memory(one));
            rest = others;
        }
        let mut tensors = entries(lens);
        let files = place(&mut tensors, &bytes, max_file_len);
        (tensors.iter().map(|t| (t.file, t.offset)).collect(), files.iter().map(|f| f.len).collect())
    }

    #[test]
    fn a_file_ends_before_it_would_pass_the_limit() {
        let (at, lens) = places(&[100, 300, 3000, 9000, 1], 4096);
        assert_eq!(at, [(0, 0), (0, 256), (0, 768), (1, 0), (2, 0)]);
        assert_eq!(lens, [4096, 12288, 4096]);
        assert_eq!(places(&[4096, 1], 4096).1, [4096, 4096]);
        assert_eq!(places(&[], 4096).1, [0; 0]);
        assert_eq!(places(&[0, 0], 4096), (vec![(0, 0), (0, 0)], vec![0]));
    }

    #[test]
    fn tied_tensors_get_one_place() {
        let memory = [1u8; 600];
        let mut tensors = entries(&[300, 600, 300, 0, 0]);
        let [whole, half, none] = [&memory[..], &memory[..300], &memory[..0]].map(Bytes::Memory);
        let files = place(&mut tensors, &[half, whole, half, none, none], 1 << 20);
        let at: Vec<_> = tensors.iter().map(|t| t.offset).collect();
        assert_eq!(at, [0, 512, 0, 1280, 1280]);
        assert_eq!(files[0].extents.len(), 2);
    }

    #[test]
    fn composed_chunks_are_the_tensors_with_zeros_between() {
        let memory: Vec<u8> = (1..=200).collect();
        let mut tensors = entries(&[100, 100]);
        let files = place(&mut tensors, &[Bytes::Memory(&memory[..100]), Bytes::Memory(&memory[100..])], 1 << 20);
        let mut expected = vec![0; 4096];
        expected[..100].copy_from_slice(&memory[..100]);
        expected[256..356].copy_from_slice(&memory[100..]);
        for chunk in [1, 50, 99, 100, 256, 300, 4096] {
            let mut whole = Vec::new();
            while whole.len() < 4096 {
                let mut buf = vec![0xee; chunk.min(4096 - whole.len())];
                files[0].compose(whole.len() as u64, &mut buf).unwrap();
                whole.extend(buf);
            }
            assert_eq!(whole, expected, "in chunks of {chunk}");
        }
    }

    proptest! {
        #[test]
        fn tensors_are_aligned_apart_and_inside_one_file(
            lens in prop::collection::vec(prop_oneof![0..5u64, 0..9000u64, 65_000..70_000u64], 0..40),
            pages in 1..40u64,
        ) {
            let limit = pages * PAGE;
            let (at, files) = places(&lens, limit);
            let mut end = (0, 0);
            for (&(file, offset), &len) in at.iter().zip(&lens) {
                prop_assert!((file, offset) >= end, "the order is kept and nothing overlaps");
                prop_assert_eq!(offset % if len >= LARGE_TENSOR { 4096 } else { 256 }, 0);
                prop_assert!(offset + len <= files[file]);
                prop_assert!(offset + len <= limit || offset == 0, "only a lone tensor passes the limit");
                end = (file, offset + len);
            }
            prop_assert!(files.iter().all(|len| len % PAGE == 0));
        }
    }
}
