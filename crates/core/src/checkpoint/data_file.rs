//! One open data file of a checkpoint.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::error::{Error, FormatError, Result};

/// What a file was when it was looked at; other bytes have another stamp. Anybody may set the time of change (mtime), and
/// an inode is used again for a new file: so the time of the last change of status (ctime), which nobody sets, counts too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Stamp {
    len: u64,
    device: u64,
    inode: u64,
    modified: (i64, i64),
    status_changed: (i64, i64),
}

impl Stamp {
    /// Bytes, and seconds and nanoseconds of the last change: what a faithful copy of the file has too.
    pub(crate) fn len_and_modified(&self) -> (u64, (i64, i64)) {
        (self.len, self.modified)
    }

    pub(crate) fn of(metadata: &Metadata) -> Stamp {
        Stamp {
            len: metadata.len(),
            device: metadata.dev(),
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            status_changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A data file, open for buffered reading and, on demand, for direct reading.
#[derive(Debug)]
pub struct DataFile {
    path: PathBuf,
    name: String,
    stamp: Stamp,
    buffered: File,
    /// The descriptor past the page cache, or how the file system refuses one.
    direct: OnceLock<Result<File, rustix::io::Errno>>,
}

impl DataFile {
    /// Opens a regular file. With `follow` false, a link in the last place of the path is refused.
    pub(crate) fn open(path: &Path, name: &str, follow: bool) -> Result<DataFile> {
        let follow = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | follow;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
            rustix::io::Errno::LOOP => FormatError::new(path, "it is a link, which a store does not have").into(),
            e => Error::io("open", path)(e.into()),
        })?;
        let buffered = File::from(fd);
        let metadata = buffered.metadata().map_err(Error::io("inspect", path))?;
        if !metadata.is_file() {
            return Err(FormatError::new(path, "it is not a regular file").into());
        }
        // Only the opening must not wait (for a pipe); older kernels answer a read with EAGAIN where this is set.
        rustix::fs::fcntl_setfl(&buffered, OFlags::empty()).map_err(|e| Error::io("open", path)(e.into()))?;
        Ok(DataFile {
            path: path.to_owned(),
            name: name.to_owned(),
            stamp: Stamp::of(&metadata),
            buffered,
            direct: OnceLock::new(),
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name in the checkpoint's directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.stamp.len
    }

    /// Its last change before it was opened, in seconds and nanoseconds since 1970.
    pub fn modified(&self) -> (i64, i64) {
        self.stamp.modified
    }

    /// Its last change of status (of bytes, times, rights or names) before it was opened, in seconds and nanoseconds since
    /// 1970. Unlike [`DataFile::modified`] it cannot be set.
    pub fn status_changed(&self) -> (i64, i64) {
        self.stamp.status_changed
    }

    /// Device and inode: no two files of a machine have the same ones at one time.
    pub fn inode(&self) -> (u64, u64) {
        (self.stamp.device, self.stamp.inode)
    }

    /// Whether its path still leads to the file that was opened, and that was not written to since.
    pub(crate) fn is_current(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|metadata| Stamp::of(&metadata) == self.stamp)
    }

    /// Whether it had no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The descriptor for reads through the page cache.
    pub(crate) fn buffered(&self) -> &File {
        &self.buffered
    }

    /// The descriptor for reads past the page cache, or why there is none now.
    pub(crate) fn direct(&self) -> Result<&File, rustix::io::Errno> {
        self.direct_by(|| {
            // Through /proc the very file that was checked is opened again, whatever its path names now.
            let this = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.buffered));
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
            let fd: OwnedFd = rustix::fs::open(this, flags, Mode::empty())?;
            Ok(File::from(fd))
        })
    }

    /// The same by what opens it. Only success and the file system's refusal are remembered: descriptors that are short now
    /// are there later.
    fn direct_by(&self, open: impl FnOnce() -> Result<File, rustix::io::Errno>) -> Result<&File, rustix::io::Errno> {
        let known = match self.direct.get() {
            Some(known) => known,
            None => match open() {
                Err(e) if !matches!(e, rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => return Err(e),
                answer => self.direct.get_or_init(|| answer),
            },
        };
        known.as_ref().map_err(|&e| e)
    }

    /// Makes direct reads refused, as some file systems refuse to open for them.
    #[cfg(test)]
    pub(crate) fn refuse_direct(&mut self) {
        self.direct = OnceLock::from(Err(rustix::io::Errno::INVAL));
    }

    /// The descriptor to read by: the direct one where that is wanted and not refused.
    pub(crate) fn descriptor(&self, direct: bool) -> &File {
        if direct { self.direct().unwrap_or(&self.buffered) } else { &self.buffered }
    }

    /// Its length now, in bytes.
    pub(crate) fn current_len(&self) -> io::Result<u64> {
        Ok(self.buffered.metadata()?.len())
    }

    /// What it was when it was opened.
    pub(crate) fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// An error when the file is not as long as when it was opened, or was written to since.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let now = self.buffered.metadata().map_err(Error::io("inspect", &self.path))?;
        if now.len() < self.len() {
            return Err(Error::Truncated { path: self.path.clone(), offset: 0, len: self.len(), end: now.len() });
        }
        // New rights, or another name for the file, are no harm to who reads it.
        let now = Stamp { status_changed: self.stamp.status_changed, ..Stamp::of(&now) };
        if now != self.stamp {
            return Err(Error::Changed { path: self.path.clone() });
        }
        Ok(())
    }

    /// A lock that says that the file is being loaded, kept as long as the descriptor; `None` where that cannot be said.
    pub(crate) fn lock_for_load(&self) -> Option<File> {
        let file = self.another_description()?;
        try_lock(&file, FlockOperation::NonBlockingLockShared).ok().map(|()| file)
    }

    /// Whether some process on this host loads it.
    pub(crate) fn is_being_loaded(&self) -> bool {
        let Some(file) = self.another_description() else { return false };
        let answer = try_lock(&file, FlockOperation::NonBlockingLockExclusive);
        if answer.is_ok() {
            // A child that is forked just now has the descriptor too.
            let _ = rustix::fs::flock(&file, FlockOperation::Unlock);
        }
        // Some file systems refuse such a lock whatever is done with the file.
        answer == Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// The same file, opened once more: locks belong to an opening.
    fn another_description(&self) -> Option<File> {
        File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.buffered))).ok()
    }

    /// Fills `buf` from `offset`; a file that ends before is [`Error::Truncated`].
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            match rustix::io::pread(&self.buffered, &mut buf[done..], at) {
                Ok(0) => {
                    return Err(Error::Truncated { path: self.path.clone(), offset, len: buf.len() as u64, end: at });
                }
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(e) => return Err(Error::io("read", &self.path)(e.into())),
            }
        }
        Ok(())
    }
}

/// Tries to lock a file, three times: somebody who asks holds the lock for a moment.
fn try_lock(file: &File, operation: FlockOperation) -> Result<(), rustix::io::Errno> {
    let mut answer = rustix::fs::flock(file, operation);
    for _ in 1..3 {
        if answer != Err(rustix::io::Errno::WOULDBLOCK) {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
        answer = rustix::fs::flock(file, operation);
    }
    answer
}

impl AsFd for DataFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.buffered.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn only_the_file_systems_answer_about_direct_reads_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        let open = || DataFile::open(&path, "f", true).unwrap();
        let opened = || Ok(File::open(&path).unwrap());

        let file = open();
        for passing in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOENT] {
            assert_eq!(file.direct_by(|| Err(passing)).unwrap_err(), passing);
        }
        file.direct_by(opened).unwrap();
        file.direct_by(|| Err(Errno::MFILE)).unwrap();
        for lasting in [Errno::INVAL, Errno::OPNOTSUPP] {
            let file = open();
            assert_eq!(file.direct_by(|| Err(lasting)).unwrap_err(), lasting);
            assert_eq!(file.direct_by(opened).unwrap_err(), lasting);
        }
    }
}
