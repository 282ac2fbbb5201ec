//! One file range on its way into a buffer: what to ask for next, and what an answer means.
//!
//! The engines differ in how they ask; what short reads, interruptions, refused direct reads and cut files mean is
//! decided here, once.

use rustix::io::Errno;

use crate::checkpoint::DataFile;
use crate::error::{Error, Result};
use crate::format::{PAGE, PAGE_BYTES};

/// Answers of EAGAIN in a row that are taken before the read is given up.
const MAX_AGAIN: u32 = 10_000;

/// A read of `len` bytes at `offset`, `done` of them there.
#[derive(Debug)]
pub(crate) struct Transfer {
    offset: u64,
    len: usize,
    done: usize,
    direct: bool,
    again: u32,
}

/// What to ask the system for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    /// Offset in the file.
    pub(crate) offset: u64,
    /// Place in the buffer.
    pub(crate) at: usize,
    /// Bytes; for a direct read rounded up to whole pages.
    pub(crate) len: usize,
    /// Whether to ask the descriptor that passes the page cache.
    pub(crate) direct: bool,
}

impl Transfer {
    /// A transfer into a buffer of `capacity` bytes at `addr`. It is direct if that is wanted and the place allows it.
    pub(crate) fn new(offset: u64, len: usize, direct: bool, addr: usize, capacity: usize) -> Transfer {
        let page = PAGE_BYTES;
        let aligned = offset.is_multiple_of(PAGE) && addr.is_multiple_of(page);
        let room = len.checked_next_multiple_of(page).is_some_and(|whole| whole <= capacity);
        Transfer { offset, len, done: 0, direct: direct && aligned && room, again: 0 }
    }

    /// What to ask for next.
    pub(crate) fn request(&self) -> Request {
        let page = PAGE_BYTES;
        let at = if self.direct { self.done / page * page } else { self.done };
        let end = if self.direct { self.len.next_multiple_of(page) } else { self.len };
        Request { offset: self.offset + at as u64, at, len: end - at, direct: self.direct }
    }

    /// Bytes that are there.
    pub(crate) fn done(&self) -> usize {
        self.done
    }

    /// Takes the answer to [`Transfer::request`]; `true` when every byte is there.
    pub(crate) fn answer(&mut self, file: &DataFile, answer: Result<usize, Errno>) -> Result<bool> {
        match answer {
            Ok(n) => {
                let reached = (self.request().at + n).min(self.len);
                if reached > self.done {
                    self.done = reached;
                    self.again = 0;
                } else if self.direct {
                    // A direct read that brings nothing new stopped inside a page: the rest comes by the cache.
                    self.direct = false;
                } else {
                    let end = self.offset + self.done as u64;
                    let end = file.current_len().map_or(end, |now| now.min(end));
                    return Err(Error::Truncated {
                        path: file.path().to_owned(),
                        offset: self.offset,
                        len: self.len as u64,
                        end,
                    });
                }
                Ok(self.done == self.len)
            }
            Err(Errno::INTR) => Ok(false),
            Err(Errno::AGAIN) if self.again < MAX_AGAIN => {
                self.again += 1;
                std::thread::yield_now();
                Ok(false)
            }
            // The file system does not read directly, or not at this alignment.
            Err(Errno::INVAL | Errno::OPNOTSUPP) if self.direct => {
                self.direct = false;
                Ok(false)
            }
            Err(errno) => {
                let at = self.offset + self.done as u64;
                let source = std::io::Error::from(errno);
                let source = std::io::Error::new(source.kind(), format!("at byte {at}: {source}"));
                Err(Error::Io { what: "read", path: file.path().to_owned(), source })
            }
        }
    }
}
