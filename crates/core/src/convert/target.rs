//! The directory that is being made: written beside its final place, and put there whole.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, RenameFlags, StatxAttributes, StatxFlags, flock, renameat_with, statx};
use rustix::io::Errno;

use super::journal::{Finished, JOURNAL_NAME, Journal};
use super::layout::TargetFile;
use crate::error::{Error, ErrorKind, Result};
use crate::format::manifest::{MANIFEST_NAME, is_manifest};

/// End of a partial directory's name; it begins with a dot and the target's name.
pub(crate) const PARTIAL_SUFFIX: &str = ".sllm-partial";

/// End of the name that an old store has while it is replaced, where the file system cannot exchange two directories, and of one
/// that cannot be removed.
const OLD_SUFFIX: &str = ".sllm-old";

/// How many old stores may lie there that cannot be removed, as a network file system keeps files that are still open.
const MAX_OLD: usize = 10;

/// What an interrupted conversion or export to `target` left, for the next run to go on from; `None` where there is nothing.
pub fn interrupted(target: &Path) -> Option<PathBuf> {
    let dir = target.parent()?.join(beside(target.file_name()?, PARTIAL_SUFFIX));
    dir.join(JOURNAL_NAME).is_file().then_some(dir)
}

/// The name of what lies beside a target for a while.
fn beside(name: &OsStr, suffix: &str) -> OsString {
    let mut beside = OsString::from(".");
    beside.push(name);
    beside.push(suffix);
    beside
}

/// Where a directory is to appear.
#[derive(Debug)]
pub(crate) struct Target {
    path: PathBuf,
    parent: PathBuf,
    name: OsString,
    overwrite: bool,
}

impl Target {
    /// Checks that a directory may be made at `path`, out of what lies at `source`. Changes nothing.
    pub(crate) fn check(path: &Path, source: Option<&Path>, overwrite: bool) -> Result<Target> {
        let Some(name) = path.file_name() else {
            return Err(Error::Invalid(format!("{} does not name a directory to be made", path.display())));
        };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let open_parent = |parent: &Path| fs::read_dir(parent).and_then(|_| parent.canonicalize());
        let parent = open_parent(parent).map_err(Error::io("open the parent directory", parent))?;
        let target = Target { path: parent.join(name), parent, name: name.to_owned(), overwrite };
        if let Some(source) = source {
            let source = source.canonicalize().map_err(Error::io("inspect", source))?;
            if target.path.starts_with(&source) || source.starts_with(&target.path) {
                let reason = format!("{} and its source {} lie in each other", path.display(), source.display());
                return Err(Error::Invalid(reason));
            }
        }
        target.check_free()?;
        Ok(target)
    }

    /// Whether nothing stands at the target, or what stands there may be replaced.
    fn check_free(&self) -> Result<()> {
        let metadata = match self.path.symlink_metadata() {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io("inspect", &self.path)(e)),
        };
        if !self.overwrite {
            return Err(Error::Exists { path: self.path.clone() });
        }
        let path = self.path.display();
        if metadata.is_dir() && is_mount_point(&self.path) {
            let reason = "is a mount point, which cannot be replaced: give a directory below it";
            return Err(Error::Invalid(format!("{path} {reason}")));
        }
        let is_empty = || Ok(fs::read_dir(&self.path)?.next().is_none());
        let replaceable = metadata.is_dir()
            && (is_manifest(&self.path.join(MANIFEST_NAME)) || is_empty().map_err(Error::io("list", &self.path))?);
        if replaceable {
            return Ok(());
        }
        Err(Error::Invalid(format!("{path} is not a store (a directory with its manifest.json): it is not replaced")))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        self.parent.join(beside(&self.name, suffix))
    }

    /// The names of old stores.
    fn old_names(&self) -> impl Iterator<Item = PathBuf> {
        (0..MAX_OLD).map(|n| self.beside(&if n == 0 { OLD_SUFFIX.to_owned() } else { format!("{OLD_SUFFIX}-{n}") }))
    }

    /// Removes old stores that earlier runs left; what stays has its name.
    fn remove_old(&self) {
        self.old_names().for_each(|old| drop(fs::remove_dir_all(old)));
    }

    /// Gives an old store the first of their names that is free.
    fn set_aside(&self, dir: &Path) -> Result<PathBuf> {
        self.remove_old();
        let mut refused = None;
        for old in self.old_names() {
            match fs::rename(dir, &old) {
                Ok(()) => return Ok(old),
                Err(e) => refused = Some(e),
            }
        }
        Err(Error::io("rename", dir)(refused.unwrap_or_else(|| Errno::EXIST.into())))
    }

    /// Removes a store that was replaced. Where it cannot be removed, gives the path that it has then: that of the partial
    /// directory must be free for the next run.
    fn remove_replaced(&self, old: PathBuf) -> Option<PathBuf> {
        if fs::remove_dir_all(&old).is_ok() {
            self.remove_old();
            return None;
        }
        let left = self.set_aside(&old).unwrap_or(old);
        left.symlink_metadata().is_ok().then_some(left)
    }

    /// Makes and locks the partial directory, or takes up one that an earlier run with the same fingerprint left.
    ///
    /// Without a fingerprint nothing can be taken up. `extra` bytes are to be written besides `files`.
    pub(crate) fn begin(&self, fingerprint: Option<&str>, files: &[TargetFile<'_>], extra: u64) -> Result<Partial<'_>> {
        let dir = self.beside(PARTIAL_SUFFIX);
        self.check_space(&dir, files, extra)?;
        let lock = lock_dir(&dir)?;
        let mut partial =
            Partial { target: self, dir, _lock: lock, journal: None, finished: Finished::new(), published: false };
        let resumed = match fingerprint {
            Some(fingerprint) => Journal::resume(&partial.dir, fingerprint)?,
            None => None,
        };
        let keep: Vec<PathBuf> = match &resumed {
            Some(_) => {
                files.iter().map(|file| &*file.name).chain([JOURNAL_NAME]).map(|n| partial.dir.join(n)).collect()
            }
            None => Vec::new(),
        };
        clear(&partial.dir, &keep)?;
        if let Some((journal, finished)) = resumed {
            (partial.journal, partial.finished) = (Some(journal), finished);
        } else if let Some(fingerprint) = fingerprint {
            partial.journal = Some(Journal::create(&partial.dir, fingerprint)?);
        }
        Ok(partial)
    }

    fn check_space(&self, partial: &Path, files: &[TargetFile<'_>], extra: u64) -> Result<()> {
        let space = rustix::fs::statvfs(&self.parent)
            .map_err(|e| Error::io("ask for the free space of", &self.parent)(e.into()))?;
        // What lies in the partial directory is taken up or removed first.
        let own = disk_usage(partial);
        let need = files.iter().fold(extra, |sum, file| sum.saturating_add(file.len));
        let free = space.f_bavail.saturating_mul(space.f_frsize).saturating_add(own);
        // File systems without a size of their own (some FUSE ones) say 0 blocks in all.
        if space.f_blocks > 0 && need > free {
            return Err(Error::NoSpace { path: self.parent.clone(), need, free });
        }
        Ok(())
    }
}

/// A directory being written. It stays after a failure, so that the next run goes on, unless nothing could be taken up.
#[derive(Debug)]
pub(crate) struct Partial<'a> {
    target: &'a Target,
    dir: PathBuf,
    /// Held until the directory is in its place.
    _lock: Lock,
    pub(crate) journal: Option<Journal>,
    pub(crate) finished: Finished,
    /// Whether it was renamed to its target.
    published: bool,
}

impl Partial<'_> {
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes and syncs a small file.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let mut file = File::create_new(&path).map_err(Error::io("create", &path))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", &path))
    }

    /// Puts the directory, whose files are synced, into its place. Gives the path of the store that it replaced, where that cannot be
    /// removed.
    pub(crate) fn publish(&mut self) -> Result<Option<PathBuf>> {
        self.target.check_free()?;
        sync_dirs(&self.dir)?;
        let target = &self.target.path;
        let replaced = match renameat_with(CWD, &self.dir, CWD, target, RenameFlags::NOREPLACE) {
            Ok(()) => None,
            Err(Errno::EXIST) => Some(self.replace()?),
            Err(Errno::INVAL | Errno::NOSYS) if target.symlink_metadata().is_ok() => Some(self.replace()?),
            Err(Errno::INVAL | Errno::NOSYS) => {
                fs::rename(&self.dir, target).map_err(Error::io("rename the finished directory to", target))?;
                None
            }
            Err(e) => return Err(Error::io("rename the finished directory to", target)(e.into())),
        };
        self.published = true;
        sync_dir(&self.target.parent)?;
        // Up to here the next run could go on from it. One that stays in a store is read by nobody.
        let _ = fs::remove_file(target.join(JOURNAL_NAME));
        Ok(replaced.and_then(|(old, _lock)| self.target.remove_replaced(old)))
    }

    /// Exchanges the directory with the old one. Gives the path that this has then, and its lock.
    fn replace(&self) -> Result<(PathBuf, Lock)> {
        let target = &self.target.path;
        self.target.check_free()?;
        // The old directory gets the partial one's name: its lock keeps others off until it is gone.
        let lock = lock_dir(target)?;
        let mut old = self.dir.clone();
        match renameat_with(CWD, &self.dir, CWD, target, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOSYS) => {
                // No atomic exchange here: between these two the old one has another name.
                old = self.target.set_aside(target)?;
                if let Err(e) = fs::rename(&self.dir, target) {
                    let _ = fs::rename(&old, target);
                    return Err(Error::io("rename the finished directory to", target)(e));
                }
            }
            Err(Errno::XDEV) => {
                let reason = "it lies in a lower layer of an overlay, as in a container's image, where no directory can be \
                              renamed: remove it first, or give another target";
                return Err(Error::io("replace it", target)(std::io::Error::new(
                    std::io::ErrorKind::CrossesDevices,
                    reason,
                )));
            }
            Err(e) => return Err(Error::io("rename the finished directory to", target)(e.into())),
        }
        Ok((old, lock))
    }

    /// Leaves the directory for a later run; removes it where that could not take it up, or where the disk is full.
    pub(crate) fn abandon(&self, error: &Error) {
        let has_journal = self.journal.is_some() && self.dir.join(JOURNAL_NAME).is_file();
        // Once it was published, its name may be that of the old store, which is gone only when the new one is safe.
        if !self.published && (!has_journal || error.kind() == ErrorKind::NoSpace) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Whether something is mounted at a path; `false` where the system does not tell.
fn is_mount_point(path: &Path) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(CWD, path, flags, StatxFlags::empty())
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// A lock on a directory, until it is dropped.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // A child that is forked just now has the descriptor too.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Makes a directory where there is none, and locks it against other runs of this program.
fn lock_dir(dir: &Path) -> Result<Lock> {
    for _ in 0..100 {
        match fs::create_dir(dir) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(Error::io("create", dir)(e)),
            _ => {}
        }
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(dir) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io("open", dir)(e)),
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // Some network file systems do not lock directories; there the user must see to it.
            Ok(())
            | Err(Errno::BADF | Errno::ISDIR | Errno::NOLCK | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {}
            Err(Errno::WOULDBLOCK) => {
                let reason = format!("{}: another conversion to the same target is running", dir.display());
                return Err(Error::Invalid(reason));
            }
            Err(e) => return Err(Error::io("lock", dir)(e.into())),
        }
        let lock = Lock(file);
        // Another run may have put the directory in its place, or removed it, before it was locked.
        let held = lock.0.metadata().map_err(Error::io("inspect", dir))?;
        if dir.symlink_metadata().is_ok_and(|now| (now.dev(), now.ino()) == (held.dev(), held.ino())) {
            return Ok(lock);
        }
    }
    Err(Error::Invalid(format!("{}: other conversions to the same target are running", dir.display())))
}

/// Removes all that is below a directory but the files of these paths, and the directories that lead to them.
fn clear(dir: &Path, keep: &[PathBuf]) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io("inspect", &path))?;
        if kind.is_dir() && keep.iter().any(|kept| kept.starts_with(&path)) {
            clear(&path, keep)?;
        } else if !kind.is_file() || !keep.contains(&path) {
            let removed = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Bytes of disk that a directory's files take; 0 where there is none.
fn disk_usage(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let usage = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => disk_usage(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    };
    entries.flatten().map(usage).sum()
}

/// Syncs a directory and those below it.
fn sync_dirs(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            sync_dirs(&entry.path())?;
        }
    }
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(Error::io("sync", dir))
}
