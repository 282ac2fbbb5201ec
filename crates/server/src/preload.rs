//! A model's way into the pool, asked for by whoever, once at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sllm_core::{LoadReport, Progress};
use tokio::sync::watch;
use tonic::Status;

use crate::jobs::{Job, Stop, Why};
use crate::metrics::Kind;
use crate::models::{InUse, Model};
use crate::store::Store;

/// How a preload ended, once it has.
type Outcome = Option<Result<(), Status>>;

/// A preload that runs, or the last one that ran.
#[derive(Debug, Clone)]
pub(crate) struct Preload {
    stop: Stop,
    outcome: watch::Receiver<Outcome>,
    progress: Arc<watch::Sender<Progress>>,
}

impl Preload {
    /// How far it is.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) -> Result<(), Status> {
        let mut outcome = self.outcome.clone();
        match outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
            Ok(Some(result)) => result,
            // Its task is gone, with the server.
            _ => Err(Why::ShuttingDown.status()),
        }
    }

    pub(crate) fn stop(&self, why: Why) {
        self.stop.stop(why);
    }

    fn is_running(&self) -> bool {
        self.outcome.borrow().is_none() && self.outcome.has_changed().is_ok()
    }
}

/// A model's preloads.
#[derive(Debug, Default)]
pub(crate) struct Preloads(Mutex<Option<Preload>>);

impl Preloads {
    /// The one that runs, or the last one.
    pub(crate) fn last(&self) -> Option<Preload> {
        self.lock().clone()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.lock().as_ref().is_some_and(Preload::is_running)
    }

    /// Forgets the last one.
    pub(crate) fn clear(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Preload>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts to read a model into the pool, or joins whoever does. `true` where it was started.
pub(crate) fn start(store: &Arc<Store>, model: &Arc<Model>) -> (Preload, bool) {
    let mut last = model.preloads.lock();
    if let Some(running) = last.as_ref().filter(|preload| preload.is_running()) {
        return (running.clone(), false);
    }
    let stop = Stop::new();
    let job = Job::new(&model.name, "pool".into(), Kind::Pool, stop.clone());
    let (told, outcome) = watch::channel(None);
    let preload = Preload { stop, outcome, progress: Arc::clone(&job.progress) };
    *last = Some(preload.clone());
    drop(last);
    let (store, model) = (Arc::clone(store), Arc::clone(model));
    tokio::spawn(async move {
        let result = fill(&store, &model, job).await;
        // Whoever asked for it may be gone; the model keeps the outcome.
        told.send_replace(Some(result.map(drop)));
    });
    (preload, true)
}

async fn fill(store: &Arc<Store>, model: &Arc<Model>, job: Job) -> Result<LoadReport, Status> {
    let (shared, model) = (Arc::clone(store), InUse::new(model));
    let run = store.jobs.run(job, move |control| {
        let loader = shared.loader(&model, control)?.build()?;
        let report = loader.fill_cache(&model.checkpoint)?;
        shared.tell(&model, &report);
        Ok(report)
    });
    run.await
}
