//! A stream of the server's answers, for a caller that blocks.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use sllm_core::Control;
use tokio::task::AbortHandle;
use tonic::{Status, Streaming};

use crate::error::{Error, Result};
use crate::runtime::Runtime;

/// How often a caller looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(20);

/// The server's answers in order. Dropping this does not end the stream, [`Events::abort`] does.
#[derive(Debug)]
pub(crate) struct Events<T> {
    received: Receiver<std::result::Result<T, Status>>,
    task: AbortHandle,
    /// No more will come.
    pub(crate) ended: bool,
}

impl<T: Send + 'static> Events<T> {
    /// Reads a stream to its end. `keep` is dropped after it.
    pub(crate) fn read(runtime: &Runtime, mut stream: Streaming<T>, keep: impl Send + 'static) -> Result<Events<T>> {
        let (sender, received) = channel();
        let task = runtime.spawn(async move {
            loop {
                match stream.message().await {
                    // Where nobody listens any more, the end is still waited for.
                    Ok(Some(event)) => drop(sender.send(Ok(event))),
                    Ok(None) => break,
                    Err(status) => {
                        let _ = sender.send(Err(status));
                        break;
                    }
                }
            }
            drop(stream);
            drop(keep);
        })?;
        Ok(Events { received, task, ended: false })
    }

    /// The next answer, `None` at the end. `limit` is what the caller was to wait in all, until `until`.
    pub(crate) fn next(
        &mut self,
        what: &'static str,
        (limit, until): (Duration, Instant),
        control: &Control,
    ) -> Result<Option<T>> {
        loop {
            control.check()?;
            let left = until.saturating_duration_since(Instant::now());
            match self.received.recv_timeout(left.min(LOOK)) {
                Ok(Ok(event)) => return Ok(Some(event)),
                Ok(Err(status)) => {
                    self.ended = true;
                    return Err(Error::of(what, limit, &status));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.ended = true;
                    return Ok(None);
                }
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Err(Error::TimedOut { what, limit }),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl<T> Events<T> {
    /// Gives the stream up at once.
    pub(crate) fn abort(&self) {
        self.task.abort();
    }
}
