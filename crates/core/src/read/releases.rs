//! Releasing file pages that a device had registered, after a load: that takes half as long as registering them, and
//! whoever waits for the load has its bytes already.

use std::process;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread::{Builder, JoinHandle};

struct Release {
    /// A fork has no threads of its parent.
    process: u32,
    thread: JoinHandle<()>,
}

/// Those that may still be going on.
static RELEASES: Mutex<Vec<Release>> = Mutex::new(Vec::new());

fn releases() -> MutexGuard<'static, Vec<Release>> {
    RELEASES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drops `registered` in a thread of its own, or here if none can be had.
pub(super) fn release<T: Send + 'static>(registered: T) {
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| {
        // Handlers run in the reverse order: this one before those of the driver, which must not be called after them.
        // SAFETY: the handler takes nothing and does not unwind. Where it is refused nothing is waited for.
        let _ = unsafe { libc::atexit(at_exit) };
    });
    let mut releases = releases();
    releases.retain(|release| !release.thread.is_finished());
    // A thread that cannot be started drops what it was given.
    if let Ok(thread) = Builder::new().name("sllm-release".into()).spawn(move || drop(registered)) {
        releases.push(Release { process: process::id(), thread });
    }
}

/// Waits for all that go on. Whether there were any.
pub(super) fn settle() -> bool {
    let mut releases = std::mem::take(&mut *releases());
    releases.retain(|release| release.process == process::id());
    let any = !releases.is_empty();
    for release in releases {
        // It is done, or it panicked: nothing is to be done about either.
        let _ = release.thread.join();
    }
    any
}

extern "C" fn at_exit() {
    settle();
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;

    /// Takes a while to drop.
    struct Slow(Arc<AtomicBool>);

    impl Drop for Slow {
        fn drop(&mut self) {
            std::thread::sleep(Duration::from_millis(50));
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn whoever_settles_finds_everything_released() {
        let released = Arc::new(AtomicBool::new(false));
        release(Slow(Arc::clone(&released)));
        assert!(settle());
        assert!(released.load(Ordering::SeqCst));
        assert!(!settle(), "nothing is left to wait for");
    }
}
