//! Loads that go on by themselves, and how they ended for whoever asks.

use tokio::sync::watch;
use tonic::Status;

use crate::jobs::{Stop, Why};

/// How a load ended, once it has.
type Outcome = Option<Result<(), Status>>;

/// A load that nobody need wait for. Clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct Background {
    stop: Stop,
    outcome: watch::Receiver<Outcome>,
}

/// Tells how a load ended. One that is dropped without that went with the server.
#[derive(Debug)]
pub(crate) struct Ending(watch::Sender<Outcome>);

impl Ending {
    pub(crate) fn tell(self, result: Result<(), Status>) {
        // Whoever asked for it may be gone.
        self.0.send_replace(Some(result));
    }
}

impl Background {
    /// A load that begins, which this stops.
    pub(crate) fn new(stop: Stop) -> (Ending, Background) {
        let (told, outcome) = watch::channel(None);
        (Ending(told), Background { stop, outcome })
    }

    pub(crate) fn stop(&self, why: Why) {
        self.stop.stop(why);
    }

    pub(crate) fn is_running(&self) -> bool {
        self.outcome.borrow().is_none() && self.outcome.has_changed().is_ok()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) -> Result<(), Status> {
        let mut outcome = self.outcome.clone();
        match outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
            Ok(Some(result)) => result,
            _ => Err(Why::ShuttingDown.status()),
        }
    }
}
