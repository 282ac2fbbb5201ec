//! The list of finished chunks in a partial directory, by which an interrupted conversion goes on.
//!
//! A header line names what is written, by a fingerprint; then a line a chunk: file, chunk, CRC-64/NVME. Lines may be
//! lost or torn by a crash: a chunk without a good line is written again, and one with a line is checked again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::layout::{Bytes, TargetFile};
use crate::checkpoint::DataFile;
use crate::error::{Error, Result};
use crate::format::manifest::CHUNK_LEN;

/// File name of the journal in a partial directory.
pub(crate) const JOURNAL_NAME: &str = ".sllm-journal";

/// Bytes of a journal at most: the lines of 40 TB and more.
const MAX_LEN: u64 = 256 << 20;

/// Checksums of finished chunks, by file and chunk number.
pub(crate) type Finished = HashMap<(usize, u64), u64>;

/// Identifies what is to be written and the state of the files that it is read from.
pub(crate) fn fingerprint(sources: &[DataFile], files: &[TargetFile<'_>]) -> String {
    let mut hash = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    field(format!("sllm-journal of chunks of {CHUNK_LEN}").as_bytes());
    for source in sources {
        field(source.path().as_os_str().as_encoded_bytes());
        field(format!("{:?}", source.stamp()).as_bytes());
    }
    for file in files {
        field(file.name.as_bytes());
        field(&file.len.to_le_bytes());
        for extent in &file.extents {
            field(&extent.offset.to_le_bytes());
            field(&extent.len.to_le_bytes());
            match extent.bytes {
                Bytes::File(source, offset) => {
                    field(source.path().as_os_str().as_encoded_bytes());
                    field(&offset.to_le_bytes());
                }
                Bytes::Memory(bytes) => field(bytes),
            }
        }
    }
    hash.finalize().to_hex().to_string()
}

/// An open journal.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
}

impl Journal {
    fn header(fingerprint: &str) -> String {
        format!("sllm-journal 1 {fingerprint}\n")
    }

    /// Opens the journal of a directory and gives the chunks it lists; `None` where there is none of this fingerprint, or
    /// none that a conversion can have written.
    pub(crate) fn resume(dir: &Path, fingerprint: &str) -> Result<Option<(Journal, Finished)>> {
        let path = dir.join(JOURNAL_NAME);
        let mut options = OpenOptions::new();
        options.read(true).append(true).custom_flags(libc::O_NOFOLLOW);
        let Ok(mut file) = options.open(&path) else { return Ok(None) };
        let found = file.metadata().map_err(Error::io("inspect", &path))?;
        if !found.is_file() || found.len() > MAX_LEN {
            return Ok(None);
        }
        let mut text = Vec::new();
        (&mut file).take(found.len()).read_to_end(&mut text).map_err(Error::io("read", &path))?;
        let Some(lines) = text.strip_prefix(Self::header(fingerprint).as_bytes()) else { return Ok(None) };
        // What follows the last line end is torn; new lines must not join it.
        let whole = lines.iter().rposition(|&b| b == b'\n').map_or(0, |last| last + 1);
        file.set_len((text.len() - lines.len() + whole) as u64).map_err(Error::io("shorten", &path))?;
        let finished = lines[..whole].split(|&b| b == b'\n').filter_map(parse_line).collect();
        Ok(Some((Journal { file }, finished)))
    }

    /// Begins a journal in a directory that has none.
    pub(crate) fn create(dir: &Path, fingerprint: &str) -> Result<Journal> {
        let path = dir.join(JOURNAL_NAME);
        let mut file =
            OpenOptions::new().append(true).create_new(true).open(&path).map_err(Error::io("create", &path))?;
        file.write_all(Self::header(fingerprint).as_bytes()).map_err(Error::io("write", &path))?;
        Ok(Journal { file })
    }

    /// Notes a finished chunk. Lines of several threads do not mix: each is one appending write.
    pub(crate) fn add(&self, dir: &Path, file: usize, chunk: u64, crc: u64) -> Result<()> {
        let line = format!("{file} {chunk} {crc:016x}\n");
        (&self.file).write_all(line.as_bytes()).map_err(|e| Error::io("write", &dir.join(JOURNAL_NAME))(e))
    }
}

fn parse_line(line: &[u8]) -> Option<((usize, u64), u64)> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let place = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let crc = words.next().filter(|word| word.len() == 16)?;
    let crc = u64::from_str_radix(crc, 16).ok()?;
    words.next().is_none().then_some((place, crc))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_torn_line_is_forgotten_and_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(dir.path(), "f").unwrap();
        journal.add(dir.path(), 0, 1, 0xab).unwrap();
        (&journal.file).write_all(b"x y z\n0 2 00000000").unwrap();
        let (journal, finished) = Journal::resume(dir.path(), "f").unwrap().unwrap();
        assert_eq!(finished, Finished::from([((0, 1), 0xab)]));
        journal.add(dir.path(), 3, 4, 5).unwrap();
        let (_, finished) = Journal::resume(dir.path(), "f").unwrap().unwrap();
        assert_eq!(finished, Finished::from([((0, 1), 0xab), ((3, 4), 5)]));
    }

    #[test]
    fn a_journal_that_no_conversion_wrote_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(dir.path(), "f").unwrap();
        assert!(Journal::resume(dir.path(), "f").unwrap().is_some());
        // A hole: its bytes would be read as a torn line, and cut off.
        journal.file.set_len(MAX_LEN + 1).unwrap();
        assert!(Journal::resume(dir.path(), "f").unwrap().is_none());
        let path = dir.path().join(JOURNAL_NAME);
        std::fs::remove_file(&path).unwrap();
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(Journal::resume(dir.path(), "f").unwrap().is_none());
    }

    #[test]
    fn another_fingerprint_or_a_torn_header_is_not_resumed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Journal::resume(dir.path(), "f").unwrap().is_none());
        Journal::create(dir.path(), "f").unwrap();
        assert!(Journal::resume(dir.path(), "g").unwrap().is_none());
        std::fs::write(dir.path().join(JOURNAL_NAME), "sllm-journal 1 f").unwrap();
        assert!(Journal::resume(dir.path(), "f").unwrap().is_none());
    }
}
