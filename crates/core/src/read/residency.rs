//! What of a file is in the page cache: `cachestat`, else `mincore`. Both tell who owns the file or may write to it; others
//! can try to read.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::fstatfs;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::checkpoint::DataFile;
use crate::format::{PAGE, PAGE_BYTES};

/// The system call's number, the same on all architectures; libc does not name it everywhere.
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Bytes at each end of a range that stand for the whole: asking costs time for every page, 0.1 s for 16 GB.
const SAMPLE: u64 = 16 << 10;

/// Whether a range is cached, by its two ends; `None` where the system does not say.
pub(crate) fn is_cached(file: &DataFile, offset: u64, len: u64) -> Option<bool> {
    let sample = SAMPLE.min(len);
    let whole = |at: u64| cached_len(file, at, sample).map(|cached| cached >= sample);
    Some(whole(offset)? && whole(offset + len - sample)?)
}

/// The same of a place in a sample: where the system does not say, by a read that does not wait for a disk. What is not there
/// may be read ahead by that, so that it is not for all of a file.
pub(crate) fn is_sample_cached(file: &DataFile, offset: u64, len: u64) -> Option<bool> {
    is_cached(file, offset, len).or_else(|| is_read_at_once(file, offset))
}

fn is_read_at_once(file: &DataFile, offset: u64) -> Option<bool> {
    let mut byte = [0];
    match preadv2(file.buffered(), &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT) {
        Ok(1) => Some(true),
        Err(Errno::AGAIN) => Some(false),
        // The file's end, or a file system that has no such reads.
        _ => None,
    }
}

/// Bytes of a range that are cached, to whole pages; `None` where the system does not say.
fn cached_len(file: &DataFile, offset: u64, len: u64) -> Option<u64> {
    if len == 0 {
        return Some(0);
    }
    // The pages of a file of overlayfs, as of a container's image, belong to a file below it: cachestat sees none of them.
    let known = cachestat(file, offset, len).filter(|&cached| cached > 0 || !is_on_overlay(file));
    known.or_else(|| mincore(file, offset, len))
}

fn is_on_overlay(file: &DataFile) -> bool {
    fstatfs(file.buffered()).is_ok_and(|of| of.f_type == libc::OVERLAYFS_SUPER_MAGIC)
}

fn cachestat(file: &DataFile, offset: u64, len: u64) -> Option<u64> {
    let range = CachestatRange { offset, len };
    let mut stat = Cachestat::default();
    // SAFETY: both structures are as the kernel defines them and live for the call.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.buffered().as_raw_fd(), &range, &mut stat, 0) };
    (result == 0).then(|| stat.cached.saturating_mul(PAGE).min(len.next_multiple_of(PAGE)))
}

fn mincore(file: &DataFile, offset: u64, len: u64) -> Option<u64> {
    let start = offset / PAGE * PAGE;
    let bytes = usize::try_from(offset.checked_add(len)? - start).ok()?;
    let resident = resident_pages(file, start, bytes)?;
    // Of a file that is somebody else's, and that we may not write to, the system says that all pages are there: also
    // those past its end, however large the units of its last pages are.
    if resident == bytes.div_ceil(PAGE_BYTES)
        && resident_pages(file, file.len().checked_next_multiple_of(1 << 30)?, 1)? > 0
    {
        return None;
    }
    Some(resident as u64 * PAGE)
}

/// Pages that `mincore` says are there, of `bytes` bytes from `start` on, which begins a page.
fn resident_pages(file: &DataFile, start: u64, bytes: usize) -> Option<usize> {
    let mut pages = vec![0u8; bytes.div_ceil(PAGE_BYTES)];
    // SAFETY: a new mapping at an address that the system chooses; it is never read.
    let ptr =
        unsafe { mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, file.buffered().as_fd(), start) }
            .ok()?;
    // SAFETY: the range is the mapping just made; `pages` has a byte a page.
    let result = unsafe { libc::mincore(ptr, bytes, pages.as_mut_ptr()) };
    // SAFETY: mapped above, unmapped once.
    let _ = unsafe { munmap(ptr, bytes) };
    (result == 0).then(|| pages.iter().filter(|&&page| page & 1 == 1).count())
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// The directory where the process of the last test finds a file of 100,000 bytes below an overlay and in it.
    const ON_OVERLAY: &str = "SLLM_TEST_ON_OVERLAY";

    /// Runs as one who neither owns files of ours nor may write to them; `None` where that cannot be.
    pub(in crate::read) fn as_another<T: Send>(path: &Path, what: impl FnOnce() -> T + Send) -> Option<T> {
        let alone = || {
            // Of this thread alone.
            // SAFETY: takes a number.
            unsafe { libc::syscall(libc::SYS_setfsuid, 65_534) };
            File::options().write(true).open(path).is_err().then(what)
        };
        std::thread::scope(|scope| scope.spawn(alone).join().unwrap())
    }

    #[test]
    fn both_ways_see_a_file_that_was_just_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1u8; 100_000]).unwrap();
        let file = DataFile::open(&path, "f", true).unwrap();
        assert_eq!(mincore(&file, 0, 100_000), Some(25 * 4096));
        assert_eq!(mincore(&file, 8192, 4096), Some(4096));
        // Older kernels and sandboxes lack cachestat.
        assert!(matches!(cachestat(&file, 0, 100_000), None | Some(102_400)));
        assert_eq!(cached_len(&file, 0, 100_000), Some(102_400));
        assert_eq!(is_cached(&file, 0, 100_000), Some(true));
        assert_eq!(is_cached(&file, 4096, 1), Some(true));
    }

    #[test]
    fn of_files_that_others_own_nothing_is_known_rather_than_that_all_is_cached() {
        let path = Path::new("/etc/passwd");
        let file = DataFile::open(path, "passwd", true).unwrap();
        let asked = || (mincore(&file, 0, file.len()), is_cached(&file, 0, file.len()));
        let Some((by_mincore, answer)) = as_another(path, asked) else {
            eprintln!("skipped: the right to write everywhere cannot be laid down here");
            return;
        };
        assert_eq!(by_mincore, None);
        // Kernels that have had cachestat since before it asked for that right know.
        assert!(matches!(answer, None | Some(true)), "{answer:?}");
    }

    /// Not a test of its own: what runs where an overlay is mounted.
    #[test]
    fn on_overlay() {
        let Some(dir) = std::env::var_os(ON_OVERLAY) else { return };
        let open = |name| DataFile::open(&Path::new(&dir).join(name), "f", true).unwrap();
        let (below, file) = (open("lower/f"), open("merged/f"));
        assert!(is_on_overlay(&file) && !is_on_overlay(&below));
        let mut bytes = vec![0; 100_000];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(is_cached(&file, 0, 100_000), Some(true));
        rustix::fs::fadvise(file.buffered(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        // Where the file system obeys, none is left.
        assert_eq!(is_cached(&file, 0, 100_000), is_cached(&below, 0, 100_000));
        println!("seen through the overlay");
    }

    #[test]
    fn pages_of_files_below_an_overlay_are_seen() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for name in ["lower", "upper", "work", "merged"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let path = dir.path().join("lower/f");
        std::fs::write(&path, vec![1u8; 100_000]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        let script =
            "cd \"$0\" && mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged || exit 77
            exec \"$@\" --exact read::residency::tests::on_overlay --nocapture";
        let mut command = Command::new("unshare");
        command.args(["-r", "-m", "sh", "-c", script]).arg(dir.path()).arg(std::env::current_exe().unwrap());
        let output = command.env(ON_OVERLAY, dir.path()).output();
        let Some(output) = output.ok().filter(|output| output.status.success() || output.status.code() == Some(101))
        else {
            eprintln!("skipped: no overlay can be mounted here");
            return;
        };
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("seen through the overlay"), "{said}");
    }
}
