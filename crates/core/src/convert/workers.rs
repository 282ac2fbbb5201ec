//! Threads that share numbered work, and the buffers they use.

use super::layout::as_index;
use crate::error::Result;
use crate::format::PAGE;
use crate::threads::try_share;

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

/// Calls `work` once for every number below `count`, on several threads that each own a buffer of `buffer_len` bytes: this
/// one, and as many others as the system gives. The first error stops all of them and is returned.
pub(crate) fn for_each(
    threads: usize,
    count: u64,
    buffer_len: u64,
    work: impl Fn(u64, &mut PageBuffer) -> Result<()> + Sync,
) -> Result<()> {
    let threads = usize::try_from(count).map_or(threads, |count| threads.min(count));
    try_share(threads, "sllm-work", 0..count, || PageBuffer::new(buffer_len), |buffer, number| work(number, buffer))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

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
}
