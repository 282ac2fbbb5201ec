//! Text that was read into a buffer, so that it lies in huge pages, or that somebody made.

use std::ops::{Deref, Range};

use super::HostBuffer;

/// A text that stays as it is.
#[derive(Debug)]
pub(crate) struct SharedText(Memory);

#[derive(Debug)]
enum Memory {
    Own(String),
    /// A range of a buffer that is UTF-8.
    Buffer(HostBuffer, Range<usize>),
}

impl SharedText {
    /// The text that a range of a buffer is; `None` where it is none.
    pub(crate) fn read(buffer: HostBuffer, range: Range<usize>) -> Option<SharedText> {
        str::from_utf8(buffer.as_slice().get(range.clone())?).ok()?;
        Some(SharedText(Memory::Buffer(buffer, range)))
    }
}

impl From<String> for SharedText {
    fn from(text: String) -> Self {
        SharedText(Memory::Own(text))
    }
}

impl Deref for SharedText {
    type Target = str;

    fn deref(&self) -> &str {
        match &self.0 {
            Memory::Own(text) => text,
            Memory::Buffer(buffer, range) => {
                let bytes = buffer.as_slice().get(range.clone()).unwrap_or_default(); // always there: `read` saw to it
                // SAFETY: `read` saw that these bytes are UTF-8, and nobody could write to the buffer since.
                unsafe { str::from_utf8_unchecked(bytes) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::BufferPool;

    #[test]
    fn a_range_is_a_text_if_it_is_utf8() {
        let read = |range| {
            let mut buffer = BufferPool::new(4096, 1, 4096, None).unwrap().try_acquire().unwrap();
            buffer.as_mut_slice()[..8].copy_from_slice("aé\u{20ac}\0b".as_bytes());
            SharedText::read(buffer, range).map(|text| text.to_owned())
        };
        assert_eq!(read(0..8).as_deref(), Some("aé\u{20ac}\0b"));
        assert_eq!(read(1..6).as_deref(), Some("é\u{20ac}"));
        assert_eq!(read(3..3).as_deref(), Some(""));
        for none in [2..6, 0..2, 3..5, 4000..4097, 5000..5000] {
            assert_eq!(read(none.clone()), None, "{none:?}");
        }
        assert_eq!(&*SharedText::from("é".to_owned()), "é");
    }
}
