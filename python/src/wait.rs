//! Long calls: the work runs in a thread of its own, without the interpreter's lock, while the caller's thread waits,
//! tells the progress callback and looks for signals. Work that can be stopped has a `Control`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use sllm_core::{Cancel, Control};

use crate::error::{Raise, named};

/// How often the progress callback is called and signals are looked for.
const TICK: Duration = Duration::from_millis(50);

/// Work that cannot be stopped, in a thread of its own.
pub(crate) struct Call<T> {
    thread: JoinHandle<T>,
    /// Hangs up when the work has ended.
    ended: Receiver<()>,
}

impl<T: Send + 'static> Call<T> {
    pub(crate) fn start(py: Python<'_>, work: impl FnOnce() -> T + Send + 'static) -> PyResult<Call<T>> {
        let (end, ended) = sync_channel(1);
        let work = move || {
            // Dropped at the end of the work, also when it panics.
            let _end = end;
            work()
        };
        let thread = thread::Builder::new().name("sllm-call".into()).spawn(work).map_err(|e| no_thread(py, &e))?;
        Ok(Call { thread, ended })
    }

    /// Waits for it. If a signal's handler raises meanwhile (KeyboardInterrupt), that exception is raised at once, and the
    /// thread is left to end by itself.
    pub(crate) fn wait(self, py: Python<'_>) -> PyResult<T> {
        let Call { thread, mut ended } = self;
        loop {
            let receiver = &mut ended;
            if py.detach(move || receiver.recv_timeout(TICK)) != Err(RecvTimeoutError::Timeout) {
                break;
            }
            py.check_signals()?;
        }
        Ok(py.detach(|| thread.join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }
}

/// Runs `work`, which cannot be stopped, and waits for it as [`Call::wait`] does.
pub(crate) fn call<T, E>(py: Python<'_>, work: impl FnOnce() -> Result<T, E> + Send + 'static) -> PyResult<T>
where
    T: Send + 'static,
    E: Raise + Send + 'static,
{
    Call::start(py, work)?.wait(py)?.map_err(|e| e.raise(py))
}

/// A limit of processes refuses a thread.
fn no_thread(py: Python<'_>, error: &io::Error) -> PyErr {
    named(py, "ReadWriteError", &format!("cannot start a thread for the work: {error}"))
}

#[derive(Default)]
struct Bytes {
    done: AtomicU64,
    total: AtomicU64,
}

/// Runs `work` and waits for it.
///
/// `progress(done, total)` is called in the caller's thread, every 50 ms at most, and once more at the end. If it raises,
/// or a signal's handler does (KeyboardInterrupt), the work is cancelled, and that exception is raised when it has
/// stopped.
pub(crate) fn run<T: Send, E: Raise + Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(Control) -> Result<T, E> + Send,
) -> PyResult<T> {
    run_beside(py, progress, None, work)
}

/// The same, and takes the iterator `meanwhile` to its end in the caller's thread while the work runs. If a step of it
/// raises, the work is cancelled too.
pub(crate) fn run_beside<T: Send, E: Raise + Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    meanwhile: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(Control) -> Result<T, E> + Send,
) -> PyResult<T> {
    let mut steps = meanwhile.map(|meanwhile| meanwhile.try_iter()).transpose()?;
    let bytes = Arc::new(Bytes::default());
    let cancel = Cancel::new();
    let mut control = Control::new().cancelled_by(cancel.clone());
    if progress.is_some() {
        let bytes = Arc::clone(&bytes);
        control = control.on_progress(move |p| {
            bytes.total.store(p.total, Ordering::Relaxed);
            bytes.done.fetch_max(p.done, Ordering::Relaxed);
        });
    }
    let tell = |done: u64, total: u64| match progress {
        Some(progress) => progress.call1((done, total)).map(drop),
        None => Ok(()),
    };
    let result = thread::scope(|scope| {
        let (finished, mut wait) = sync_channel::<()>(1);
        let worker = move || {
            // Dropped at the end of the work, also when it panics.
            let _finished = finished;
            work(control)
        };
        let worker = thread::Builder::new()
            .name("sllm-call".into())
            .spawn_scoped(scope, worker)
            .map_err(|e| no_thread(py, &e))?;
        let (mut told, mut looked) = (None, Instant::now());
        let interrupted = loop {
            match steps.as_mut().and_then(Iterator::next) {
                Some(Ok(_)) => {}
                Some(Err(e)) => break Some(e),
                None => steps = None,
            }
            let (receiver, pause) = (&mut wait, if steps.is_some() { Duration::ZERO } else { TICK });
            let timeout = py.detach(move || receiver.recv_timeout(pause));
            if timeout != Err(RecvTimeoutError::Timeout) {
                break None;
            }
            if steps.is_some() && looked.elapsed() < TICK {
                continue;
            }
            looked = Instant::now();
            let now = (bytes.done.load(Ordering::Relaxed), bytes.total.load(Ordering::Relaxed));
            let news = now.1 > 0 && told != Some(now);
            told = Some(now);
            let outcome = py.check_signals().and_then(|()| if news { tell(now.0, now.1) } else { Ok(()) });
            if let Err(e) = outcome {
                break Some(e);
            }
        };
        if interrupted.is_some() {
            cancel.cancel();
        }
        let result = py.detach(|| worker.join());
        match (interrupted, result) {
            (Some(e), Ok(_)) => Err(e),
            (None, Ok(Ok(value))) => steps.into_iter().flatten().try_for_each(|step| step.map(drop)).map(|()| value),
            (None, Ok(Err(e))) => Err(e.raise(py)),
            (_, Err(panic)) => std::panic::resume_unwind(panic),
        }
    })?;
    let total = bytes.total.load(Ordering::Relaxed);
    if total > 0 {
        tell(total, total)?;
    }
    Ok(result)
}
