//! A tensor of a checkpoint: its name, its shape, and the place of its bytes.
//!
//! A checkpoint may have tens of thousands. So their names are parts of one text, such as the header that they were read
//! from, and usual shapes are in place: memory for each would take longer than its parsing.

use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};

use crate::dtype::Dtype;
use crate::pool::SharedText;

/// One tensor and the place of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Its name, unique in the checkpoint.
    pub name: TensorName,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its dimensions; empty for a scalar.
    pub shape: Shape,
    /// Strides in elements; `None` where the elements are contiguous and row-major, as nearly always.
    pub strides: Option<Box<Shape>>,
    /// Place of its file in [`Checkpoint::files`](crate::Checkpoint::files).
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Place of the source shard it came from (for a safetensors checkpoint, its file).
    pub(crate) shard: usize,
}

impl TensorInfo {
    /// Whether two names stand for the same bytes (tied weights).
    pub fn is_tied_with(&self, other: &TensorInfo) -> bool {
        self.len > 0 && (self.file, self.offset, self.len) == (other.file, other.offset, other.len)
    }
}

/// A tensor's name: a text, which it may share with other names.
#[derive(Clone)]
pub struct TensorName {
    text: Arc<SharedText>,
    /// Numbers of 32 bits, since a checkpoint has many: no text that is read is longer than 1 GiB.
    start: u32,
    len: u32,
}

impl TensorName {
    /// The name as a `str`.
    pub fn as_str(&self) -> &str {
        let start = self.start as usize;
        // Always there: every constructor sees to it.
        self.text.get(start..start + self.len as usize).unwrap_or_default()
    }

    /// A name that was read out of `text`, of which it is a part unless it had escapes there.
    pub(crate) fn read_from(text: &Arc<SharedText>, name: Cow<'_, str>) -> TensorName {
        let start = name.as_ptr().addr().wrapping_sub(text.as_ptr().addr());
        let is_part = start.checked_add(name.len()).and_then(|end| text.get(start..end)).is_some();
        if is_part { TensorName::part(text, start, name.len()) } else { TensorName::own(name.into_owned()) }
    }

    /// A name that is a text by itself.
    pub(crate) fn own(name: String) -> TensorName {
        let len = name.len();
        TensorName::part(&Arc::new(name.into()), 0, len)
    }

    fn part(text: &Arc<SharedText>, start: usize, len: usize) -> TensorName {
        let [start, len] = [start, len].map(|number| u32::try_from(number).unwrap_or(u32::MAX));
        TensorName { text: Arc::clone(text), start, len }
    }

    /// Names that share one text.
    pub(crate) fn of_all<'a>(names: impl Iterator<Item = &'a str> + Clone) -> impl Iterator<Item = TensorName> {
        let text: Arc<SharedText> = Arc::new(names.clone().collect::<String>().into());
        names.scan(0, move |end, name| {
            let start = *end;
            *end += name.len();
            Some(TensorName::part(&text, start, name.len()))
        })
    }
}

impl Deref for TensorName {
    type Target = str;

    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Debug for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.as_str(), f)
    }
}

impl PartialEq for TensorName {
    fn eq(&self, other: &TensorName) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for TensorName {}

impl PartialEq<str> for TensorName {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for TensorName {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl PartialOrd for TensorName {
    fn partial_cmp(&self, other: &TensorName) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for TensorName {
    fn cmp(&self, other: &TensorName) -> std::cmp::Ordering {
        self.as_str().cmp(other.as_str())
    }
}

impl Hash for TensorName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

/// Dimensions that are kept in place.
const FEW: usize = 2;

/// A tensor's dimensions; no memory of its own where they are few.
#[derive(Clone)]
pub struct Shape(Dims);

#[derive(Clone)]
enum Dims {
    Few(u8, [u64; FEW]),
    #[expect(clippy::box_collection, reason = "few shapes are long, and each has a place in a long list")]
    Many(Box<Vec<u64>>),
}

impl Default for Shape {
    fn default() -> Self {
        Shape(Dims::Few(0, [0; FEW]))
    }
}

impl Shape {
    /// Adds an innermost dimension.
    pub(crate) fn push(&mut self, dim: u64) {
        match &mut self.0 {
            Dims::Few(len, dims) => match dims.get_mut(usize::from(*len)) {
                Some(place) => (*place, *len) = (dim, *len + 1),
                None => self.0 = Dims::Many(Box::new([&dims[..], &[dim]].concat())),
            },
            Dims::Many(dims) => dims.push(dim),
        }
    }
}

impl Deref for Shape {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        match &self.0 {
            Dims::Few(len, dims) => dims.get(..usize::from(*len)).unwrap_or_default(), // at most FEW
            Dims::Many(dims) => dims,
        }
    }
}

impl From<&[u64]> for Shape {
    fn from(dims: &[u64]) -> Self {
        let mut shape = Shape::default();
        dims.iter().for_each(|&dim| shape.push(dim));
        shape
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl PartialEq for Shape {
    fn eq(&self, other: &Shape) -> bool {
        **self == **other
    }
}

impl Eq for Shape {}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;

        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut dims: A) -> Result<Shape, A::Error> {
                let mut shape = Shape::default();
                while let Some(dim) = dims.next_element()? {
                    shape.push(dim);
                }
                Ok(shape)
            }
        }

        deserializer.deserialize_seq(ShapeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parts_of_the_text_they_were_read_from_unless_they_differ_from_it() {
        let text: Arc<SharedText> = Arc::new(String::from("{\"é\":1,\"b\\n\":2}").into());
        let part = TensorName::read_from(&text, Cow::Borrowed(&text[2..4]));
        assert!(part == "é" && Arc::ptr_eq(&part.text, &text));
        assert_eq!(TensorName::read_from(&text, Cow::Borrowed(&text[2..2])), "");
        for other in ["b\n", "é", "", "longer than the whole of the text"] {
            assert_eq!(TensorName::read_from(&text, Cow::Owned(other.into())), other);
            assert_eq!(TensorName::read_from(&text, Cow::Borrowed(other)), other);
        }
        let all = ["a", "", "é", "é"];
        let names: Vec<TensorName> = TensorName::of_all(all.into_iter()).collect();
        assert_eq!(names, all);
        assert!(names.iter().all(|name| Arc::ptr_eq(&name.text, &names[0].text)));
    }

    #[test]
    fn shapes_are_their_dimensions_however_many() {
        for len in 0..7 {
            let dims: Vec<u64> = (1..=len).map(|i| u64::MAX - i).collect();
            let read: Shape = serde_json::from_str(&format!("{dims:?}")).unwrap();
            assert!(*read == dims && read == Shape::from(&*dims) && format!("{read:?}") == format!("{dims:?}"));
        }
        for bad in ["[-1]", "[1,2,3,-4]", "[1.5]", "[18446744073709551616]", "{}", "[1,2,3,4,5", "[[]]"] {
            serde_json::from_str::<Shape>(bad).unwrap_err();
        }
    }
}
