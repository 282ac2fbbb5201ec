//! The one thread of a client, on which its connection runs.

use std::future::Future;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// How much longer than its deadline a call is waited for, should its own clock be late.
const GRACE: Duration = Duration::from_millis(500);

/// A thread that runs what callers wait for. It ends, and drops what still runs, when this is dropped.
///
/// Callers never enter the runtime: they may be threads of anybody's, also of another runtime, which must not be
/// entered twice.
#[derive(Debug)]
pub(crate) struct Runtime {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// After a fork the thread is not there, and nothing of it may be waited for.
    process: u32,
}

impl Runtime {
    pub(crate) fn start() -> Result<Runtime> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(Error::Thread)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let work = move || {
            // Also where the sender is dropped.
            let _ = runtime.block_on(stopped);
            // Finding a host's address takes as long as the system's resolver likes, on a thread of its own.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("sllm-client".into()).spawn(work).map_err(Error::Thread)?;
        Ok(Runtime { handle, stop: Some(stop), thread: Some(thread), process: std::process::id() })
    }

    /// An error in a process that was forked after this was made.
    pub(crate) fn check(&self) -> Result<()> {
        if self.process == std::process::id() { Ok(()) } else { Err(Error::Forked) }
    }

    /// Waits for `work`, so long at most.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        limit: Duration,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.check()?;
        let (answer, answered) = sync_channel(1);
        let task = self.handle.spawn(async move {
            let timed_out = |_| Err(Error::TimedOut { what, limit });
            let result = tokio::time::timeout(limit, work).await.unwrap_or_else(timed_out);
            // Nobody listens any more where the caller's own clock was faster.
            let _ = answer.try_send(result);
        });
        answered.recv_timeout(limit.saturating_add(GRACE)).unwrap_or_else(|e| {
            task.abort();
            match e {
                RecvTimeoutError::Timeout => Err(Error::TimedOut { what, limit }),
                RecvTimeoutError::Disconnected => Err(Error::Lost { what, reason: "the client's thread ended".into() }),
            }
        })
    }

    /// Runs `work` beside the caller.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> Result<tokio::task::AbortHandle> {
        self.check()?;
        Ok(self.handle.spawn(work).abort_handle())
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else { return };
        // The last clone of a client may be dropped by what runs here, and a fork has no such thread.
        if self.process == std::process::id() && thread.thread().id() != std::thread::current().id() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn the_end_of_a_client_does_not_wait_for_what_blocks() {
        let runtime = Runtime::start().unwrap();
        let (free, freed) = channel::<()>();
        let (tell, told) = channel();
        let blocks = move || {
            tell.send(true).unwrap();
            tell.send(freed.recv_timeout(Duration::from_secs(20)).is_ok()).unwrap();
        };
        let resolve = async move {
            let _ = tokio::task::spawn_blocking(blocks).await;
        };
        runtime.spawn(resolve).unwrap();
        assert!(told.recv().unwrap());
        drop(runtime);
        free.send(()).unwrap();
        assert!(told.recv().unwrap(), "it was waited for");
    }
}
