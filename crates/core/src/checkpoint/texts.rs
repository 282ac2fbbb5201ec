//! JSON texts of files, read and scanned in pieces by several threads: a checkpoint of tens of thousands of tensors is opened
//! before the first byte of them moves.

use std::ops::Range;
use std::sync::Arc;

use super::DataFile;
use crate::format::PAGE;
use crate::format::scan::{Piece, next_item};
use crate::pool::{BufferPool, SharedText};
use crate::read::choose::MAX_LANES;
use crate::threads;

/// Bytes of a piece, about: half a millisecond.
pub(super) const PIECE: u64 = 256 << 10;

/// Bytes after a piece in which its last item ends, if the text is to be scanned at all.
const MARGIN: u64 = 4 << 10;

/// Bytes of texts that are worth buffers: half a huge page.
const IN_BUFFERS: u64 = 1 << 20;

/// Bytes of buffers that one thread makes be there: a huge page.
const STEP_LEN: usize = 2 << 20;

/// What one piece of a text takes.
pub(super) type Task<'a> = Box<dyn FnOnce() + Send + 'a>;

/// A JSON text in a file, and what was found in its pieces.
pub(super) struct JsonText<'a, T> {
    pieces: Pieces<'a>,
    found: Vec<Option<T>>,
}

/// A text that is cut in so many pieces.
#[derive(Clone)]
struct Pieces<'a> {
    file: &'a DataFile,
    place: Range<u64>,
    /// The byte with which the items of its list end.
    item_end: u8,
    count: usize,
}

impl<'a, T: Send> JsonText<'a, T> {
    /// A text that is cut in pieces of `piece_len` bytes or more.
    pub(super) fn new(file: &'a DataFile, place: Range<u64>, item_end: u8, piece_len: u64) -> Self {
        let count = usize::try_from((place.end - place.start) / piece_len).unwrap_or(usize::MAX).max(1);
        let pieces = Pieces { file, place, item_end, count };
        JsonText { pieces, found: std::iter::repeat_with(|| None).take(count).collect() }
    }

    /// How many pieces it has, and the most bytes that are read for one.
    pub(super) fn pieces(&self) -> (usize, u64) {
        let Pieces { place, count, .. } = &self.pieces;
        let margin = if *count > 1 { MARGIN } else { 0 };
        (*count, (place.end - place.start).div_ceil(*count as u64) + margin)
    }

    /// A task for each piece, which is read into a buffer if there is one that is worth it.
    pub(super) fn tasks<'t>(
        &'t mut self,
        buffers: Option<&'t BufferPool>,
        scan: impl Fn(&Piece) -> Option<T> + Copy + Send + 't,
    ) -> impl Iterator<Item = Task<'t>> {
        let (_, longest) = self.pieces();
        let buffers = buffers.filter(|buffers| is_worth(buffers.buffer_len(), longest));
        let pieces = &self.pieces;
        self.found.iter_mut().enumerate().map(move |(number, found)| -> Task<'t> {
            Box::new(move || *found = pieces.read(number, buffers).and_then(|piece| scan(&piece)))
        })
    }

    /// What was found in each piece; `None` where one has another form than most, or an error.
    pub(super) fn into_found(self) -> Option<Vec<T>> {
        self.found.into_iter().collect()
    }
}

/// Threads for what is worth so many. Most checkpoints open sooner than a system tells how many processors there are.
pub(super) fn threads_for(worth: usize) -> usize {
    if worth < 2 { 1 } else { worth.min(threads::processors()).min(MAX_LANES) }
}

/// Threads that texts of `len` bytes in all are worth.
fn threads_for_len(len: u64) -> usize {
    threads_for(usize::try_from(len / PIECE).unwrap_or(usize::MAX))
}

/// Bytes of the pieces of texts of `len` bytes in all: a few for each thread, since some take longer than others.
pub(super) fn piece_len(len: u64) -> u64 {
    (len / (2 * threads_for_len(len) as u64)).max(PIECE)
}

/// Does the tasks of texts of `len` bytes in all, in as many threads as these are worth.
pub(super) fn share<'a>(len: u64, tasks: impl Iterator<Item = Task<'a>>) {
    let tasks: Vec<Task<'a>> = tasks.collect();
    threads::share(threads_for_len(len).min(tasks.len()), "sllm-open", tasks.into_iter(), |task| task());
}

/// Buffers for the pieces of texts of `len` bytes in all, if these are long: so they lie in huge pages. A system takes longer to
/// give the small pages for a text than to read it. Texts much shorter than the longest piece are not counted.
pub(super) fn buffers(len: u64, texts: impl Iterator<Item = (usize, u64)>) -> Option<BufferPool> {
    if len < IN_BUFFERS {
        return None;
    }
    let texts: Vec<_> = texts.collect();
    let longest = texts.iter().map(|(_, longest)| *longest).max()?;
    let buffer_len = usize::try_from(longest.next_multiple_of(PAGE)).ok()?;
    let count = texts.iter().filter(|(_, longest)| is_worth(buffer_len, *longest)).map(|(count, _)| count).sum();
    BufferPool::new(buffer_len, count, STEP_LEN, None).ok()
}

/// Whether a buffer of this length may hold a piece of `len` bytes: names keep all of it, as long as there is one.
fn is_worth(buffer_len: usize, len: u64) -> bool {
    buffer_len as u64 <= len.saturating_mul(2)
}

impl Pieces<'_> {
    /// Reads a piece: from its first item to the first of the next.
    fn read(&self, number: usize, buffers: Option<&BufferPool>) -> Option<Piece> {
        let len = self.place.end - self.place.start;
        // At most `len`, so that there always is one.
        let cut = |number: usize| u64::try_from(u128::from(len) * number as u128 / self.count as u128).ok();
        let (from, to) = (cut(number)?, cut(number + 1)?);
        let (is_first, is_last) = (number == 0, number + 1 == self.count);
        let read_to = if is_last { len } else { (to + MARGIN).min(len) };
        let (read_len, to) = (usize::try_from(read_to - from).ok()?, usize::try_from(to - from).ok()?);
        let fill = |bytes: &mut [u8]| -> Option<Range<usize>> {
            self.file.read_exact_at(bytes, self.place.start + from).ok()?;
            let end = if is_last { bytes.len() } else { to + next_item(&bytes[to..], self.item_end)? };
            let start = if is_first { 0 } else { next_item(&bytes[..end], self.item_end)? };
            Some(start..end)
        };
        let text = match buffers.filter(|buffers| buffers.buffer_len() >= read_len).and_then(BufferPool::try_acquire) {
            Some(mut buffer) => {
                let range = fill(&mut buffer.as_mut_slice()[..read_len])?;
                SharedText::read(buffer, range)?
            }
            None => {
                let mut bytes = vec![0; read_len];
                let Range { start, end } = fill(&mut bytes)?;
                bytes.truncate(end);
                bytes.drain(..start);
                String::from_utf8(bytes).ok()?.into()
            }
        };
        Some(Piece { text: Arc::new(text), is_first, is_last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys of an object of numbers.
    fn keys(piece: &Piece) -> Option<Vec<String>> {
        let text = format!("{}{}", if piece.is_first { "" } else { "{" }, &**piece.text);
        let text = if piece.is_last { text } else { format!("{}}}", text.trim_end().strip_suffix(',')?) };
        let object: std::collections::BTreeMap<String, [u64; 1]> = serde_json::from_str(&text).ok()?;
        Some(object.into_keys().collect())
    }

    /// What is found in pieces, in buffers or without, as in both.
    fn found(entries: &[String], piece_len: u64) -> Option<Vec<Vec<String>>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let text = format!("{{{}}}\n", entries.join(",\n  "));
        std::fs::write(&path, format!("before{text}after")).unwrap();
        let file = DataFile::open(&path, "f", true).unwrap();
        let [in_buffers, without] = [IN_BUFFERS, 0].map(|len| {
            let mut text = JsonText::new(&file, 6..6 + text.len() as u64, b']', piece_len);
            let buffers = buffers(len, std::iter::once(text.pieces()));
            assert_eq!(buffers.is_some(), len > 0);
            share(1 << 20, text.tasks(buffers.as_ref(), keys));
            text.into_found()
        });
        assert_eq!(in_buffers, without);
        without
    }

    #[test]
    fn pieces_have_what_the_whole_has_wherever_it_is_cut() {
        let entries: Vec<String> = (0..100).map(|i| format!(r#""{i:03}é{}" : [ {i} ]"#, "x".repeat(i % 17))).collect();
        let whole = found(&entries, u64::MAX).unwrap().concat();
        assert_eq!(whole.len(), 100);
        for piece_len in 64..400 {
            let pieces = found(&entries, piece_len).unwrap();
            assert!(pieces.len() as u64 >= 3000 / 2 / piece_len, "{piece_len}");
            assert_eq!(pieces.concat(), whole, "{piece_len}");
        }
    }

    /// Reads texts of these lengths, cut for two processors, and keeps them: the bytes of the texts, those of the buffers, and how
    /// many buffers are left.
    fn read(lens: &[usize]) -> (usize, usize, usize) {
        let dir = tempfile::tempdir().unwrap();
        let file = |(number, &len): (usize, &usize)| {
            let path = dir.path().join(number.to_string());
            let entries: Vec<String> = (0..).map(|i| format!("\"{i:090}\":[{i}]")).take(len / 110).collect();
            let text = format!("{{{}}}", entries.join(","));
            std::fs::write(&path, text.clone() + &" ".repeat(len - text.len())).unwrap();
            DataFile::open(&path, "f", true).unwrap()
        };
        let files: Vec<DataFile> = lens.iter().enumerate().map(file).collect();
        let len = files.iter().map(DataFile::len).sum::<u64>();
        let piece_len = (len / 4).max(PIECE);
        let mut texts: Vec<_> = files.iter().map(|file| JsonText::new(file, 0..file.len(), b']', piece_len)).collect();
        let buffers = buffers(len, texts.iter().map(JsonText::pieces)).unwrap();
        share(len, texts.iter_mut().flat_map(|text| text.tasks(Some(&buffers), |piece| Some(Arc::clone(&piece.text)))));
        let kept: Vec<_> = texts.into_iter().map(|text| text.into_found().unwrap()).collect();
        assert_eq!(kept.iter().flatten().map(|text| text.len() as u64).sum::<u64>(), len);
        let left = std::iter::from_fn(|| buffers.try_acquire()).collect::<Vec<_>>().len();
        (usize::try_from(len).unwrap(), buffers.len(), left)
    }

    #[test]
    fn short_texts_beside_long_ones_take_no_long_buffers() {
        // An index and headers, as of a model of 671e9 parameters: only the index is worth a buffer.
        let lens = [&[8_900_000][..], &[74_000; 163]].concat();
        let index_len = 8_900_000_usize.next_multiple_of(4096);
        assert_eq!(read(&lens), (8_900_000 + 163 * 74_000, index_len, 0));
        // Where all are worth one, or none.
        assert_eq!(read(&[1_000_000; 2]), (2_000_000, 4 * 507_904, 0));
        assert_eq!(read(&[1100; 1000]), (1_100_000, 0, 0));
        for lens in [&[2_000_000, 1_000_000, 999_000, 500_000, 490_000, 1000][..], &[260_000; 8], &[2048; 600]] {
            let (len, in_buffers, left) = read(lens);
            assert!(in_buffers > 0 && in_buffers <= 2 * len && left == 0, "{lens:?}: {in_buffers}, {left} left");
        }
    }

    #[test]
    fn a_text_that_cannot_be_cut_is_not_found_in_pieces() {
        let long = [format!(r#""{}":[1]"#, "x".repeat(usize::try_from(2 * MARGIN).unwrap())), r#""y":[2]"#.to_owned()];
        assert_eq!(found(&long, u64::MAX).unwrap().concat().len(), 2);
        assert_eq!(found(&long, 1 << 10), None);
        // Looks like the end of an item, but is in a name.
        let odd: Vec<String> = (0..50).map(|i| format!(r#""{i}],":[1]"#)).collect();
        assert_eq!(found(&odd, u64::MAX).unwrap().concat().len(), 50);
        assert_eq!(found(&odd, 100), None);
    }
}
