//! Writing the data files of a partial directory, in parallel and chunk by chunk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use rustix::io::Errno;

use super::chunks::Chunks;
use super::journal::{Finished, Journal};
use super::layout::{TargetFile, as_index};
use super::workers::{PageBuffer, for_each};
use crate::control::WorkOptions;
use crate::error::{Error, Result};
use crate::format::PAGE;
use crate::format::manifest::{CHUNK_LEN, Checksums};

/// What was written.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// The checksums of each file's chunks.
    pub(crate) sums: Vec<Checksums>,
    /// Bytes that an earlier run had written.
    pub(crate) resumed: u64,
}

/// Writes `files` into `dir` and syncs them. Chunks in `finished` are only read back and checked.
pub(crate) fn write_files(
    dir: &Path,
    files: &[TargetFile<'_>],
    journal: Option<&Journal>,
    finished: &Finished,
    options: &WorkOptions,
) -> Result<Written> {
    options.control.check()?;
    let outputs = files.iter().map(|file| Output::create(dir, file)).collect::<Result<Vec<_>>>()?;
    let chunks = Chunks::new(CHUNK_LEN, files.iter().map(|file| file.len));
    let sums: Vec<AtomicU64> = (0..chunks.count()).map(|_| AtomicU64::new(0)).collect();
    let resumed = AtomicU64::new(0);
    let meter = options.control.meter(chunks.total_len());

    let one = |number: u64, buffer: &mut PageBuffer| {
        let chunk = chunks.get(number);
        let (file, output, offset) = (&files[chunk.file], &outputs[chunk.file], chunk.offset);
        let buf = buffer.get(chunk.len);
        let noted = finished.get(&(chunk.file, chunk.number)).copied();
        let kept = noted.is_some() && output.read(buf, offset).is_ok() && noted == Some(crc_fast::crc64_nvme(buf));
        let crc = if kept {
            resumed.fetch_add(buf.len() as u64, Ordering::Relaxed);
            noted.unwrap_or_default()
        } else {
            file.compose(offset, buf)?;
            output.write(buf, offset)?;
            let crc = crc_fast::crc64_nvme(buf);
            if let Some(journal) = journal {
                journal.add(dir, chunk.file, chunk.number, crc)?;
            }
            crc
        };
        sums[as_index(number)].store(crc, Ordering::Relaxed);
        meter.add(buf.len() as u64)
    };
    for_each(options.thread_count()?, chunks.count(), CHUNK_LEN, one)?;

    for output in &outputs {
        output.file.sync_all().map_err(Error::io("sync", &output.path))?;
    }
    let sums: Vec<u64> = sums.into_iter().map(AtomicU64::into_inner).collect();
    let sums = chunks.by_file(&sums).into_iter().map(Checksums).collect();
    Ok(Written { sums, resumed: resumed.into_inner() })
}

/// One file being written, past the page cache where the file system allows that: a conversion would push
/// everything else out of it, and the writes would wait for each other at the final sync.
#[derive(Debug)]
struct Output {
    path: PathBuf,
    file: File,
    direct: bool,
}

impl Output {
    /// Opens or creates the file and takes its disk space.
    fn create(dir: &Path, target: &TargetFile<'_>) -> Result<Output> {
        let path = dir.join(&target.name);
        if let Some(parent) = path.parent().filter(|&parent| parent != dir) {
            std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        let open = |flags: i32| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW | flags);
            options.open(&path)
        };
        let (file, direct) = match open(libc::O_DIRECT) {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (open(0).map_err(Error::io("create", &path))?, false),
            Err(e) => return Err(Error::io("create", &path)(e)),
        };
        file.set_len(target.len).map_err(Error::io("set the length of", &path))?;
        if target.len > 0 {
            match fallocate(&file, FallocateFlags::empty(), 0, target.len) {
                // Where it is not known, the space is taken as it is written.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::INTR) => {}
                Err(e) => return Err(Error::io("reserve space for", &path)(e.into())),
            }
        }
        Ok(Output { path, file, direct })
    }

    fn reopen(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&self.path)
    }

    /// How much of a buffer this file's descriptor can move.
    fn direct_part(&self, len: usize) -> usize {
        if self.direct { len - len % as_index(PAGE) } else { len }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (head, tail) = buf.split_at_mut(self.direct_part(buf.len()));
        self.file.read_exact_at(head, offset)?;
        if tail.is_empty() { Ok(()) } else { self.reopen()?.read_exact_at(tail, offset + head.len() as u64) }
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let (head, tail) = buf.split_at(self.direct_part(buf.len()));
        let written = match self.file.write_all_at(head, offset) {
            Ok(()) if tail.is_empty() => Ok(()),
            Ok(()) => self.reopen().and_then(|file| file.write_all_at(tail, offset + head.len() as u64)),
            // Some file systems let a file be opened for direct writes and then refuse them.
            Err(e) if self.direct && e.raw_os_error() == Some(libc::EINVAL) => {
                self.reopen().and_then(|file| file.write_all_at(buf, offset))
            }
            Err(e) => Err(e),
        };
        written.map_err(Error::io("write", &self.path))?;
        if !self.direct {
            // Starts the write-back of these pages now, so that the sync at the end has little left to do.
            let _ = fadvise(&self.file, offset, std::num::NonZeroU64::new(buf.len() as u64), Advice::DontNeed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_tails_and_unaligned_buffers_are_written_in_either_way() {
        let dir = tempfile::tempdir().unwrap();
        let target = TargetFile { name: "sub/f".into(), len: 3 * PAGE + 5, extents: Vec::new() };
        let wanted: Vec<u8> = (0..3 * PAGE + 5).map(|i| (i % 251).to_le_bytes()[0]).collect();
        for direct in [true, false] {
            let mut output = Output::create(dir.path(), &target).unwrap();
            output.direct &= direct;
            let file = if direct { &output.file } else { &output.reopen().unwrap() };
            output.file = file.try_clone().unwrap();
            // A buffer that does not begin at a page: where direct writes refuse it, the page cache takes it.
            for skew in [0, 1] {
                let mut buffer = PageBuffer::new(target.len + 1);
                let buf = &mut buffer.get(target.len + 1)[skew..][..wanted.len()];
                buf.copy_from_slice(&wanted);
                output.write(buf, 0).unwrap();
                assert_eq!(std::fs::read(dir.path().join("sub/f")).unwrap(), wanted, "direct: {direct}, skew: {skew}");
                output.write(&vec![0; wanted.len()], 0).unwrap();
            }
            let mut buffer = PageBuffer::new(target.len);
            let buf = buffer.get(target.len);
            output.write(&wanted, 0).unwrap();
            output.read(buf, 0).unwrap();
            assert_eq!(buf, wanted);
        }
    }
}
