//! A model's way into the pool, asked for by whoever, once at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sllm_core::{LoadReport, Progress};
use tokio::sync::watch;
use tonic::Status;

use crate::background::Background;
use crate::jobs::{Job, Stop, Why};
use crate::metrics::Kind;
use crate::models::{InUse, Model};
use crate::store::Store;

/// A preload that runs, or the last one that ran.
#[derive(Debug, Clone)]
pub(crate) struct Preload {
    load: Background,
    progress: Arc<watch::Sender<Progress>>,
    wanted: Arc<Mutex<Wanted>>,
}

/// Who wants a preload to go on.
#[derive(Debug, Default)]
struct Wanted {
    /// Clients that listen to it.
    listeners: usize,
    /// Somebody wants it who does not listen.
    kept: bool,
    /// All are gone, and it was stopped.
    abandoned: bool,
}

impl Preload {
    /// How far it is.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) -> Result<(), Status> {
        self.load.ended().await
    }

    /// Stops it, whoever wants it; nobody joins it any more.
    pub(crate) fn stop(&self, why: Why) {
        self.wanted().abandoned = true;
        self.load.stop(why);
    }

    /// A client that listened is gone; the last one stops it, unless it is wanted by others.
    pub(crate) fn leave(&self) {
        let mut wanted = self.wanted();
        wanted.listeners = wanted.listeners.saturating_sub(1);
        if wanted.listeners == 0 && !wanted.kept {
            wanted.abandoned = true;
            self.load.stop(Why::ClientGone);
        }
    }

    /// Joins it; `false` where it was stopped already.
    fn join(&self, want: Want) -> bool {
        let mut wanted = self.wanted();
        match want {
            Want::Listen => wanted.listeners += 1,
            Want::Keep => wanted.kept = true,
        }
        !wanted.abandoned
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a preload is wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Want {
    /// As long as the caller listens, who then says that it leaves.
    Listen,
    /// Whoever goes.
    Keep,
}

/// A model's preloads. Clones are the same ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Preloads(Arc<Mutex<Option<Preload>>>);

impl Preloads {
    /// The one that runs, or the last one.
    pub(crate) fn last(&self) -> Option<Preload> {
        self.lock().clone()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.lock().as_ref().is_some_and(|last| last.load.is_running())
    }

    /// Forgets this one, if it is the last one.
    pub(crate) fn clear(&self, gone: &Preload) {
        let mut last = self.lock();
        if last.as_ref().is_some_and(|last| Arc::ptr_eq(&last.wanted, &gone.wanted)) {
            *last = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Preload>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts to read a model into the pool, or joins whoever does.
pub(crate) fn start(store: &Arc<Store>, model: &Arc<Model>, want: Want) -> Preload {
    let mut last = model.preloads.lock();
    if let Some(running) = last.as_ref().filter(|preload| preload.load.is_running() && preload.join(want)) {
        return running.clone();
    }
    let stop = Stop::new();
    let job = Job::new(&model.name, "pool".into(), Kind::Pool, stop.clone());
    let (ending, load) = Background::new(stop);
    let preload = Preload { load, progress: Arc::clone(&job.progress), wanted: Arc::default() };
    preload.join(want);
    *last = Some(preload.clone());
    drop(last);
    store.models.keep(model);
    let (store, model) = (Arc::clone(store), Arc::clone(model));
    tokio::spawn(async move {
        ending.tell(fill(&store, &model, job).await.map(drop));
    });
    preload
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preload_goes_on_while_anybody_wants_it() {
        let preload = || {
            let (ending, load) = Background::new(Stop::new());
            let progress = Arc::new(watch::Sender::new(Progress { done: 0, total: 0 }));
            (ending, Preload { load, progress, wanted: Arc::default() })
        };
        let (_ending, listened) = preload();
        assert!(listened.join(Want::Listen) && listened.join(Want::Listen));
        listened.leave();
        assert!(listened.join(Want::Listen), "the first one left, and another listens");
        listened.leave();
        listened.leave();
        assert!(!listened.join(Want::Keep), "the last one stopped it");
        let (_ending, kept) = preload();
        assert!(kept.join(Want::Listen) && kept.join(Want::Keep));
        kept.leave();
        assert!(kept.join(Want::Listen), "whoever does not listen still wants it");
    }
}
