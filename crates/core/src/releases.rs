//! Releasing what a device had registered, file pages or a ring of buffers, after a load: that takes half as long as
//! registering, and whoever waits for the load has its bytes already.

use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::Builder;

use crate::device::DeviceError;

/// The process that released something first. A fork has the counter below as it was, maybe locked, and none of the threads.
static PROCESS: AtomicU32 = AtomicU32::new(0);
/// Releases that go on.
static GOING_ON: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

fn going_on() -> MutexGuard<'static, usize> {
    GOING_ON.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts one as long as it lives.
struct Counted;

impl Counted {
    /// One more, unless there are `most` already.
    fn new(most: usize) -> Option<Counted> {
        let mut going_on = going_on();
        (*going_on < most).then(|| {
            *going_on += 1;
            Counted
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        *going_on() -= 1;
        ENDED.notify_all();
    }
}

/// Drops `registered` in a thread of its own, or here if none can be had, or if `most` such threads are at work.
pub(crate) fn release<T: Send + 'static>(registered: T, most: usize) {
    static AT_EXIT: Once = Once::new();
    let id = process::id();
    if PROCESS.compare_exchange(0, id, Ordering::Relaxed, Ordering::Relaxed).is_err_and(|first| first != id) {
        return;
    }
    AT_EXIT.call_once(|| {
        // Handlers run in the reverse order: this one before those of the driver, which must not be called after them.
        // SAFETY: the handler takes nothing and does not unwind. Where it is refused nothing is waited for.
        let _ = unsafe { libc::atexit(at_exit) };
    });
    let Some(counted) = Counted::new(most) else { return };
    let work = move || {
        drop(registered);
        drop(counted);
    };
    // A thread that cannot be started drops what it was given.
    let _ = Builder::new().name("sllm-release".into()).spawn(work);
}

/// Waits for all that go on. Whether there ever were any, so that what was refused may be had now.
fn settle() -> bool {
    if PROCESS.load(Ordering::Relaxed) != process::id() {
        return false;
    }
    drop(ENDED.wait_while(going_on(), |going_on| *going_on > 0).unwrap_or_else(PoisonError::into_inner));
    true
}

/// Pins by `pin`; where that is refused, once more when what earlier loads had is gone. A system that has no such
/// registrations stays as it is.
pub(crate) fn pin_beside(pin: impl Fn() -> Result<(), DeviceError>) -> Result<(), DeviceError> {
    pin().or_else(|refusal| match refusal {
        DeviceError::Driver { ref name, .. } if name == "CUDA_ERROR_NOT_SUPPORTED" => Err(refusal),
        _ if settle() => pin(),
        _ => Err(refusal),
    })
}

extern "C" fn at_exit() {
    settle();
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Where the process of the second test leaves a file.
    const DIR: &str = "SLLM_TEST_RELEASES";

    /// Takes a while to drop, and leaves a file then.
    struct Slow(PathBuf);

    impl Drop for Slow {
        fn drop(&mut self) {
            thread::sleep(Duration::from_millis(200));
            std::fs::write(&self.0, []).unwrap();
        }
    }

    fn slow(dir: &Path) -> (Slow, PathBuf) {
        let path = dir.join("released");
        (Slow(path.clone()), path)
    }

    #[test]
    fn everybody_who_settles_finds_everything_released() {
        let dir = tempfile::tempdir().unwrap();
        let (slow, released) = slow(dir.path());
        release(slow, usize::MAX);
        let settle = || assert!(settle() && released.exists());
        thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(settle))));
    }

    #[test]
    fn no_more_than_most_are_released_beside_the_caller() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        /// Waits for a word when it is dropped.
        struct Waits(std::sync::mpsc::Receiver<()>);
        impl Drop for Waits {
            fn drop(&mut self) {
                let _ = self.0.recv();
            }
        }
        release(Waits(wait), usize::MAX);
        let here = std::sync::Arc::new(());
        release(std::sync::Arc::clone(&here), 1);
        assert_eq!(std::sync::Arc::strong_count(&here), 1, "the other one is not released yet");
        drop(go);
    }

    #[test]
    fn what_is_refused_is_asked_for_again_when_others_have_gone() {
        let refusal =
            |name: &str| DeviceError::Driver { device: "cuda:0".into(), what: "pin", name: name.into(), code: 1 };
        let dir = tempfile::tempdir().unwrap();
        let (slow, released) = slow(dir.path());
        release(slow, usize::MAX);
        let asked = std::cell::Cell::new(0);
        let pin = || {
            asked.set(asked.get() + 1);
            if released.exists() { Ok(()) } else { Err(refusal("CUDA_ERROR_OUT_OF_MEMORY")) }
        };
        pin_beside(pin).unwrap();
        assert_eq!(asked.get(), 2);
        let never = || {
            asked.set(asked.get() + 1);
            Err(refusal("CUDA_ERROR_NOT_SUPPORTED"))
        };
        pin_beside(never).unwrap_err();
        assert_eq!(asked.get(), 3);
    }

    /// Not a test of its own: the process that exits.
    #[test]
    fn exiting() {
        let Some(dir) = std::env::var_os(DIR) else { return };
        release(slow(Path::new(&dir)).0, 1);
        // Another one waits meanwhile, and takes nothing from whoever comes later.
        thread::spawn(settle);
        thread::sleep(Duration::from_millis(20));
        process::exit(0);
    }

    #[test]
    fn a_process_that_exits_waits() {
        let dir = tempfile::tempdir().unwrap();
        let args = ["--exact", "releases::tests::exiting"];
        let status = Command::new(std::env::current_exe().unwrap()).args(args).env(DIR, dir.path()).status().unwrap();
        assert!(status.success() && dir.path().join("released").exists());
    }
}
