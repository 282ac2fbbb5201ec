//! The original's replicas: loads into GPUs that are told of later.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tonic::{Code, Status};

use crate::background::{Background, Ending};
use crate::fault::{invalid, refused};
use crate::jobs::{Stop, Why};

/// How long the end of a replica's load is remembered.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Replicas at most.
const MAX_REPLICAS: usize = 4096;
/// Bytes of a replica's name at most.
const MAX_NAME: usize = 256;

/// A model's name and a replica's.
type Key = (String, String);

#[derive(Debug)]
struct Replica {
    load: Background,
    /// When it was last seen to run.
    since: Instant,
}

/// All replicas that are remembered.
#[derive(Debug, Default)]
pub(crate) struct Replicas(Mutex<HashMap<Key, Replica>>);

impl Replicas {
    /// Remembers a replica whose load begins; gives what is told of its end.
    pub(crate) fn begin(&self, model: &str, replica: &str, stop: Stop) -> Result<Ending, Status> {
        let (ending, load) = Background::new(stop);
        let mut all = self.lock();
        let key = (model.to_owned(), replica.to_owned());
        if all.get(&key).is_some_and(|replica| replica.load.is_running()) {
            return Err(refused(
                Code::AlreadyExists,
                format!("replica {replica:?} of {model} is being loaded already"),
            ));
        }
        if all.len() >= MAX_REPLICAS {
            let oldest =
                all.iter().filter(|(_, replica)| !replica.load.is_running()).min_by_key(|(_, replica)| replica.since);
            let oldest = oldest.map(|(key, _)| key.clone());
            match oldest {
                Some(oldest) => drop(all.remove(&oldest)),
                None => return Err(Status::resource_exhausted("too many replicas are being loaded: try again later")),
            }
        }
        all.insert(key, Replica { load, since: Instant::now() });
        Ok(ending)
    }

    /// Waits for the end of a replica's load.
    pub(crate) async fn ended(&self, model: &str, replica: &str) -> Result<(), Status> {
        let missing = || refused(Code::NotFound, format!("no load of a replica {replica:?} of {model} was asked for"));
        let load = self.lock().get(&(model.to_owned(), replica.to_owned())).map(|found| found.load.clone());
        load.ok_or_else(missing)?.ended().await
    }

    /// Stops a replica's load, waits for its end and forgets it. `false` where there is none.
    pub(crate) async fn release(&self, model: &str, replica: &str) -> bool {
        let Some(found) = self.lock().remove(&(model.to_owned(), replica.to_owned())) else { return false };
        found.load.stop(Why::Unloaded);
        // How it ended was for those who asked for it.
        let _ = found.load.ended().await;
        true
    }

    /// Forgets loads that ended long ago.
    pub(crate) fn sweep(&self) {
        self.lock().retain(|_, replica| {
            if replica.load.is_running() {
                replica.since = Instant::now();
            }
            replica.since.elapsed() < REMEMBERED
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Replica>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this can be a replica's name.
pub(crate) fn check_name(replica: &str) -> Result<(), Status> {
    match replica.len() {
        0 => Err(invalid("the replica's UUID is empty")),
        1..=MAX_NAME => Ok(()),
        _ => Err(invalid(format!("the replica's UUID is longer than {MAX_NAME} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_stay_bounded_and_running_ones_are_not_forgotten() {
        let replicas = Replicas::default();
        let first = replicas.begin("m", "first", Stop::new()).unwrap();
        let begun: Vec<_> =
            (1..MAX_REPLICAS).map(|i| replicas.begin("m", &i.to_string(), Stop::new()).unwrap()).collect();
        assert_eq!(replicas.begin("m", "more", Stop::new()).unwrap_err().code(), Code::ResourceExhausted);
        assert_eq!(replicas.begin("m", "first", Stop::new()).unwrap_err().code(), Code::AlreadyExists);
        begun.into_iter().for_each(|ending| ending.tell(Ok(())));
        let more = replicas.begin("m", "more", Stop::new()).unwrap();
        assert_eq!(replicas.lock().len(), MAX_REPLICAS);
        assert!(replicas.lock().contains_key(&("m".into(), "first".into())));
        drop((first, more));
    }

    #[tokio::test]
    async fn the_end_of_a_load_is_told_to_all_who_ask_and_an_unknown_replica_at_once() {
        let replicas = Replicas::default();
        assert_eq!(replicas.ended("m", "r").await.unwrap_err().code(), Code::NotFound);
        replicas.begin("m", "r", Stop::new()).unwrap().tell(Err(Status::data_loss("rot")));
        for _ in 0..2 {
            assert_eq!(replicas.ended("m", "r").await.unwrap_err().code(), Code::DataLoss);
        }
        // A task that is gone without a word does not leave anybody waiting.
        drop(replicas.begin("m", "r", Stop::new()).unwrap());
        assert_eq!(replicas.ended("m", "r").await.unwrap_err().code(), Code::Unavailable);
        assert!(replicas.release("m", "r").await);
        assert!(!replicas.release("m", "r").await);
    }
}
