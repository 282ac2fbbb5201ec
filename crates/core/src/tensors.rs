//! The tensors of a checkpoint, in the parts that several threads found them in: to put tens of thousands together in one place
//! takes as long as to find them.

use std::cmp::Ordering;
use std::iter::{Flatten, FusedIterator};
use std::ops::Index;
use std::slice;
use std::sync::OnceLock;

use crate::tensor::TensorInfo;

/// A list of tensors, each known by its place in it.
#[derive(Debug, Clone, Default)]
pub struct Tensors {
    /// None of them empty.
    parts: Vec<Vec<TensorInfo>>,
    /// Places of the first tensor after each part.
    ends: Vec<usize>,
    /// Places by ascending name, once they were asked for.
    by_name: OnceLock<Vec<usize>>,
}

/// Tensors in the order of their list.
#[derive(Debug, Clone)]
pub struct Iter<'a> {
    left: usize,
    tensors: Flatten<slice::Iter<'a, Vec<TensorInfo>>>,
}

impl Tensors {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or_default()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> Iter<'_> {
        Iter { left: self.len(), tensors: self.parts.iter().flatten() }
    }

    /// The tensor of a place; `None` where there is none.
    pub fn get(&self, place: usize) -> Option<&TensorInfo> {
        let part = self.ends.partition_point(|&end| end <= place);
        self.parts.get(part)?.get(place - self.start(part))
    }

    /// Places of all, by ascending name.
    pub fn by_name(&self) -> &[usize] {
        self.by_name.get_or_init(|| {
            let mut places: Vec<usize> = (0..self.len()).collect();
            // Stable, which makes use of files that are sorted each.
            places.sort_by(|&a, &b| self[a].name.cmp(&self[b].name));
            places
        })
    }

    /// The place of the tensor of this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        let by_name = self.by_name();
        let at = by_name.binary_search_by(|&place| self[place].name.as_str().cmp(name)).ok()?;
        Some(by_name[at])
    }

    /// The first tensor.
    pub fn first(&self) -> Option<&TensorInfo> {
        self.parts.first()?.first()
    }

    /// The last tensor.
    pub fn last(&self) -> Option<&TensorInfo> {
        self.parts.last()?.last()
    }

    /// Adds tensors at the end.
    pub(crate) fn push_part(&mut self, part: Vec<TensorInfo>) {
        if !part.is_empty() {
            self.by_name.take();
            self.ends.push(self.len() + part.len());
            self.parts.push(part);
        }
    }

    /// Adds another list's tensors at the end.
    pub(crate) fn append(&mut self, other: Tensors) {
        other.parts.into_iter().for_each(|part| self.push_part(part));
    }

    /// All of them, to be changed.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut TensorInfo> {
        self.by_name.take();
        self.parts.iter_mut().flatten()
    }

    /// Puts them in order, equal ones as they were.
    pub(crate) fn sort_by(&mut self, order: impl FnMut(&TensorInfo, &TensorInfo) -> Ordering) {
        let mut all = Vec::with_capacity(self.len());
        self.parts.drain(..).for_each(|mut part| all.append(&mut part));
        self.ends.clear();
        all.sort_by(order);
        self.push_part(all);
    }

    /// Place of the first tensor for which `is_before` does not hold, in a list that has those for which it holds first.
    pub(crate) fn partition_point(&self, is_before: impl Fn(&TensorInfo) -> bool) -> usize {
        let part = self.parts.partition_point(|part| part.last().is_some_and(&is_before));
        self.start(part) + self.parts.get(part).map_or(0, |part| part.partition_point(is_before))
    }

    /// Place of a part's first tensor.
    fn start(&self, part: usize) -> usize {
        part.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or_default()
    }
}

impl From<Vec<TensorInfo>> for Tensors {
    fn from(part: Vec<TensorInfo>) -> Self {
        let mut tensors = Tensors::default();
        tensors.push_part(part);
        tensors
    }
}

impl Index<usize> for Tensors {
    type Output = TensorInfo;

    /// The tensor of a place; panics where there is none, as slices do.
    fn index(&self, place: usize) -> &TensorInfo {
        let Some(tensor) = self.get(place) else { panic!("there is no tensor {place} of {}", self.len()) };
        tensor
    }
}

impl<'a> IntoIterator for &'a Tensors {
    type Item = &'a TensorInfo;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl<'a> Iterator for Iter<'a> {
    type Item = &'a TensorInfo;

    fn next(&mut self) -> Option<&'a TensorInfo> {
        let tensor = self.tensors.next()?;
        self.left -= 1;
        Some(tensor)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }

    fn fold<B, F: FnMut(B, &'a TensorInfo) -> B>(self, start: B, each: F) -> B {
        self.tensors.fold(start, each)
    }
}

impl ExactSizeIterator for Iter<'_> {}
impl FusedIterator for Iter<'_> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::tensor::{Shape, TensorName};

    fn tensor(offset: u64) -> TensorInfo {
        TensorInfo {
            name: TensorName::own(format!("w{offset}")),
            dtype: Dtype::U8,
            shape: Shape::default(),
            strides: None,
            file: 0,
            offset,
            len: 1,
            shard: 0,
        }
    }

    /// A list of tensors at 0, 1 and so on, in parts of these lengths.
    fn list(lens: &[usize]) -> Tensors {
        let mut tensors = Tensors::default();
        let mut next = 0..;
        lens.iter().for_each(|&len| tensors.push_part(next.by_ref().take(len).map(tensor).collect()));
        tensors
    }

    #[test]
    fn parts_are_one_list() {
        for lens in [&[][..], &[0], &[1], &[3], &[1, 2], &[0, 2, 0, 0, 1, 3, 0]] {
            let (tensors, len) = (list(lens), lens.iter().sum::<usize>());
            assert_eq!((tensors.len(), tensors.is_empty(), tensors.iter().len()), (len, len == 0, len));
            let offsets: Vec<u64> = tensors.iter().map(|tensor| tensor.offset).collect();
            assert_eq!(offsets, (0..len as u64).collect::<Vec<_>>(), "{lens:?}");
            for place in 0..len {
                assert!(tensors[place].offset == place as u64 && tensors.get(place) == Some(&tensors[place]));
            }
            assert_eq!((tensors.get(len), tensors.get(usize::MAX)), (None, None));
            assert_eq!(tensors.first(), tensors.get(0));
            assert_eq!(tensors.last(), len.checked_sub(1).map(|last| &tensors[last]));
            for first in 0..=len as u64 {
                assert_eq!(tensors.partition_point(|tensor| tensor.offset < first) as u64, first, "{lens:?}");
            }
            let mut left = tensors.iter();
            (0..len).rev().for_each(|after| assert_eq!((left.next().is_some(), left.len()), (true, after)));
            assert_eq!(left.next(), None);
        }
    }

    #[test]
    fn lists_are_joined_and_sorted() {
        let mut tensors = list(&[2, 3]);
        tensors.append(Tensors::default());
        tensors.append(list(&[1, 4]));
        let offsets = |tensors: &Tensors| tensors.iter().map(|tensor| tensor.offset).collect::<Vec<_>>();
        assert_eq!(offsets(&tensors), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]);
        tensors.iter_mut().enumerate().for_each(|(place, tensor)| tensor.file = place);
        tensors.sort_by(|a, b| b.offset.cmp(&a.offset));
        assert_eq!(offsets(&tensors), [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]);
        assert_eq!(tensors.iter().map(|tensor| tensor.file).collect::<Vec<_>>(), [4, 9, 3, 8, 2, 7, 1, 6, 0, 5]);
        assert_eq!((tensors.len(), tensors[9].offset), (10, 0));
    }

    #[test]
    fn tensors_are_found_by_name_after_every_change() {
        let mut tensors = list(&[12, 3]);
        let is_found = |tensors: &Tensors| {
            let mut names: Vec<_> = tensors.by_name().iter().map(|&place| tensors[place].name.to_string()).collect();
            let found = |tensor: &TensorInfo| tensors.position(&tensor.name).map(|place| tensors[place].offset);
            assert!(tensors.iter().all(|tensor| found(tensor) == Some(tensor.offset)) && names.is_sorted());
            names.dedup();
            assert_eq!(names.len(), tensors.len());
        };
        is_found(&tensors);
        assert_eq!((tensors.position("w2"), tensors.position("w15"), tensors.position("")), (Some(2), None, None));
        tensors.append([tensor(15)].to_vec().into());
        is_found(&tensors);
        tensors.sort_by(|a, b| b.offset.cmp(&a.offset));
        is_found(&tensors);
        assert_eq!(tensors.position("w15"), Some(0));
        tensors.iter_mut().for_each(|tensor| tensor.name = TensorName::own(format!("v{}", tensor.offset)));
        is_found(&tensors);
        assert_eq!(tensors.position("w15"), None);
    }
}
