//! How fast cached bytes come in either way: by registering their pages, or by copying them out. What registering takes
//! depends on the size of the page cache's pages, which is the file system's and the kernel's, and on the host; so both are
//! tried on a sample.

use std::cell::OnceCell;
use std::time::Instant;

use super::mapped::Mapped;
use crate::checkpoint::DataFile;
use crate::error::Result;
use crate::plan::Piece;

/// Bytes that are registered at a time: a call takes 0.2 ms beside its pages.
const REGISTERED: u64 = 32 << 20;
/// Bytes that are copied at a time, and one after the other, as by a lane's two buffers.
const COPIED: usize = 2 << 20;
const COPIES: usize = 2;
/// Bytes of files for which the milliseconds of a sample are worth it.
const WORTH: u64 = 1 << 30;
/// One way is clearly faster.
const CLEARLY: f64 = 1.5;

/// Both rates, once they were measured.
#[derive(Debug, Default)]
pub(crate) struct Rates(OnceCell<Measured>);

/// Rates in bytes a second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// By one thread; several are no faster.
    pub(crate) registered: f64,
    /// By one thread.
    pub(crate) copied: f64,
}

impl Measured {
    /// How many times as fast so many processors copy as pages are registered.
    fn gain(&self, processors: usize) -> f64 {
        self.copied * processors as f64 / self.registered
    }

    /// Whether so many processors copy faster than pages are registered.
    pub(crate) fn copying_is_faster(&self, processors: usize) -> bool {
        self.gain(processors) >= 1.0
    }
}

impl Rates {
    /// Both rates, by a sample of these pieces unless they are known; `None` where too little is to be read. An error
    /// where pages cannot be registered.
    pub(crate) fn of(
        &self,
        mapped: &Mapped,
        files: &[DataFile],
        pieces: &[&Piece],
        processors: usize,
    ) -> Result<Option<Measured>> {
        if self.0.get().is_none()
            && files.iter().map(DataFile::len).sum::<u64>() >= WORTH
            && let Some(measured) = measure(mapped, files, pieces, processors)?
        {
            return Ok(Some(*self.0.get_or_init(|| measured)));
        }
        Ok(self.0.get().copied())
    }
}

/// The best of two places, since others may have the processor for a moment; of one, where that is clear enough.
fn measure(mapped: &Mapped, files: &[DataFile], pieces: &[&Piece], processors: usize) -> Result<Option<Measured>> {
    let rate = |len: u64, began: Instant| len as f64 / began.elapsed().as_secs_f64().max(1e-9);
    // Not zeros, for which memory would come only when it is read into.
    let mut buffer = vec![1; COPIED * COPIES];
    let mut best: Option<Measured> = None;
    for first in [0, pieces.len() / 2] {
        let Some((file, offset)) = pieces.get(first..).and_then(place) else { continue };
        let file = &files[file];
        let began = Instant::now();
        mapped.probe(file, offset, REGISTERED)?;
        let registered = rate(REGISTERED, began);
        let began = Instant::now();
        for (at, buffer) in (offset..).step_by(COPIED).zip(buffer.chunks_mut(COPIED)) {
            file.read_exact_at(buffer, at)?;
        }
        let copied = rate((COPIED * COPIES) as u64, began);
        let before = best.unwrap_or(Measured { registered, copied });
        let now = Measured { registered: registered.max(before.registered), copied: copied.max(before.copied) };
        best = Some(now);
        if !(1.0 / CLEARLY..CLEARLY).contains(&now.gain(processors)) {
            break;
        }
    }
    Ok(best)
}

/// The file and the offset of the first of these pieces, if as many bytes as are registered follow one another there.
fn place(pieces: &[&Piece]) -> Option<(usize, u64)> {
    let first = pieces.first()?;
    let mut end = first.offset;
    for piece in pieces.iter().take_while(|piece| piece.file == first.file) {
        if piece.offset != end || end - first.offset >= REGISTERED {
            break;
        }
        end += piece.len;
    }
    (end - first.offset >= REGISTERED).then_some((first.file, first.offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::plan::LoadPlan;

    #[test]
    fn many_processors_copy_faster_and_few_do_not() {
        // Pages of 4 KiB, and large ones, on an H100 host.
        let (small, large) =
            (Measured { registered: 12e9, copied: 4.2e9 }, Measured { registered: 30e9, copied: 4.8e9 });
        let faster = |rates: Measured| [2, 3, 4, 6, 7].map(|processors| rates.copying_is_faster(processors));
        assert_eq!(faster(small), [false, true, true, true, true]);
        assert_eq!(faster(large), [false, false, false, false, true]);
    }

    #[test]
    fn samples_lie_where_enough_bytes_follow_one_another() {
        let plan = LoadPlan::whole(&[5 << 20, 40 << 20], 2 << 20);
        let pieces: Vec<&Piece> = plan.pieces().iter().collect();
        assert_eq!(place(&pieces), None, "the file is too short");
        assert_eq!(place(&pieces[3..]), Some((1, 0)));
        assert_eq!(place(&pieces[7..]), Some((1, 8 << 20)), "the last 32 MiB");
        assert_eq!(place(&pieces[8..]), None);
        let mut torn = pieces[3..].to_vec();
        torn.remove(12);
        assert_eq!(place(&torn), None);
        assert_eq!(place(&[]), None);
    }

    #[test]
    fn what_is_large_is_measured_once_and_what_is_small_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str, len: u64| {
            let path = dir.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(len).unwrap();
            [DataFile::open(&path, "f", false).unwrap()]
        };
        let mapped = Mapped::new(&[Device::host()], false);
        let of = |rates: &Rates, files: &[DataFile]| {
            let plan = LoadPlan::whole(&[files[0].len()], 2 << 20);
            rates.of(&mapped, files, &plan.pieces().iter().take(16).collect::<Vec<_>>(), 2).unwrap()
        };
        let rates = Rates::default();
        assert!(of(&rates, &open("small", WORTH - 1)).is_none());
        let first = of(&rates, &open("large", WORTH)).unwrap();
        assert!(first.registered > 0.0 && first.copied > 0.0);
        let again = of(&rates, &open("small", WORTH - 1)).unwrap();
        assert_eq!((again.registered, again.copied), (first.registered, first.copied));
    }
}
