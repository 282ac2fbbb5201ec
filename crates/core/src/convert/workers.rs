//! Threads that share numbered work, and the buffers they use.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::as_index;
use crate::error::{Error, Result};
use crate::format::PAGE;

/// A page-aligned buffer, as direct writes need it.
#[derive(Debug)]
pub(crate) struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl PageBuffer {
    pub(crate) fn new(len: u64) -> PageBuffer {
        let bytes = vec![0; as_index(len + PAGE)];
        let start = bytes.as_ptr().align_offset(as_index(PAGE));
        PageBuffer { bytes, start }
    }

    /// Its first `len` bytes.
    pub(crate) fn get(&mut self, len: u64) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + as_index(len)]
    }
}

/// Calls `work` once for every number below `count`, on several threads that each own a buffer of `buffer_len` bytes.
/// The first error stops all of them and is returned.
pub(crate) fn for_each(
    threads: usize,
    count: u64,
    buffer_len: u64,
    work: impl Fn(u64, &mut PageBuffer) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicU64::new(0);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let threads = threads.clamp(1, as_index(count.clamp(1, 1024)));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buffer = PageBuffer::new(buffer_len);
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    if let Err(e) = work(number, &mut buffer) {
                        // Nobody takes a further number; below `count` + 1024 there is no wrap-around.
                        next.store(count, Ordering::Relaxed);
                        failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
                    }
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(e) => Err(e),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_worked_once() {
        let seen = Mutex::new(Vec::new());
        for_each(3, 100, 4096, |number, buffer| {
            assert_eq!(buffer.get(1).as_ptr().addr() % 4096, 0);
            seen.lock().unwrap().push(number);
            Ok(())
        })
        .unwrap();
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_error_stops_all() {
        let worked = AtomicU64::new(0);
        let result = for_each(2, 1_000_000, 1, |number, _| {
            worked.fetch_add(1, Ordering::Relaxed);
            if number >= 10 { Err(Error::Cancelled) } else { Ok(()) }
        });
        assert!(matches!(result, Err(Error::Cancelled)));
        assert!(worked.into_inner() < 1000);
    }
}
