//! Loads: how many run at once, how far they are, how they are stopped, and how they end.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use sllm_core::{Cancel, Control, Progress};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::{Code, Status};

use crate::fault;
use crate::metrics::{Kind, Metrics};

/// Loads that wait at most.
const MAX_QUEUE: usize = 1024;

/// Why a load is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// Nobody waits for it any more.
    ClientGone,
    /// Its deadline has passed.
    Late,
    /// Its model is unloaded.
    Unloaded,
    /// The server stops.
    ShuttingDown,
}

impl Why {
    pub(crate) fn status(self) -> Status {
        match self {
            Why::ClientGone => Status::cancelled("the load was cancelled: its client is gone"),
            Why::Late => Status::deadline_exceeded("the load did not end by its deadline, or did not begin by then"),
            Why::Unloaded => Status::cancelled("the load was cancelled: its model was unloaded"),
            Why::ShuttingDown => Status::unavailable("the server is shutting down"),
        }
    }
}

/// A switch that stops loads, running or waiting. Clones are the same switch.
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    cancel: Cancel,
    why: Arc<watch::Sender<Option<Why>>>,
}

impl Stop {
    pub(crate) fn new() -> Stop {
        Stop { cancel: Cancel::new(), why: Arc::new(watch::Sender::new(None)) }
    }

    /// Stops; the first reason stays.
    pub(crate) fn stop(&self, why: Why) {
        self.why.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(why);
            first
        });
        self.cancel.cancel();
    }

    fn why(&self) -> Option<Why> {
        *self.why.borrow()
    }

    /// Waits until it is stopped.
    pub(crate) async fn stopped(&self) -> Why {
        let mut why = self.why.subscribe();
        // The sender is ours.
        let why = why.wait_for(Option::is_some).await.ok().and_then(|why| *why);
        why.unwrap_or(Why::ClientGone)
    }
}

/// Stops a load whose caller is dropped before the load's end.
struct StopOnDrop<'a>(&'a Stop);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop(Why::ClientGone);
    }
}

/// What a load is, for those who watch.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// The model's name.
    pub(crate) model: String,
    /// `pool`, `cuda:0` or `host`.
    pub(crate) target: String,
    pub(crate) kind: Kind,
    pub(crate) stop: Stop,
    pub(crate) progress: Arc<watch::Sender<Progress>>,
}

impl Job {
    pub(crate) fn new(model: &str, target: String, kind: Kind, stop: Stop) -> Job {
        let progress = Arc::new(watch::Sender::new(Progress { done: 0, total: 0 }));
        Job { model: model.to_owned(), target, kind, stop, progress }
    }
}

/// A load that runs.
#[derive(Debug, Clone)]
pub(crate) struct Running {
    pub(crate) job: Job,
    pub(crate) since: Instant,
}

/// All loads.
#[derive(Debug)]
pub(crate) struct Jobs {
    permits: Arc<Semaphore>,
    closed: watch::Sender<bool>,
    queued: AtomicUsize,
    next: AtomicU64,
    running: watch::Sender<BTreeMap<u64, Running>>,
    metrics: Metrics,
    pub(crate) done: AtomicU64,
    pub(crate) failed: AtomicU64,
}

impl Jobs {
    pub(crate) fn new(at_once: usize, metrics: Metrics) -> Jobs {
        Jobs {
            permits: Arc::new(Semaphore::new(at_once)),
            closed: watch::Sender::new(false),
            queued: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            running: watch::Sender::default(),
            metrics,
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Runs a load on a thread that may block, once one of the places is free. Where the caller is dropped, the load
    /// stops.
    pub(crate) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        job: Job,
        work: impl FnOnce(Control) -> Result<T, sllm_core::Error> + Send + 'static,
    ) -> Result<T, Status> {
        let stop = job.stop.clone();
        let (permit, place) = match self.admit(&job).await {
            Ok(admitted) => admitted,
            Err(status) => {
                // It may hold memory of a GPU, which the driver closes. Whoever is told of the refusal has it back.
                let _ = tokio::task::spawn_blocking(move || drop(work)).await;
                return Err(status);
            }
        };
        let _stop = StopOnDrop(&stop);
        let jobs = Arc::clone(self);
        let thread = tokio::task::spawn_blocking(move || {
            let started = Instant::now();
            let progress = Arc::clone(&job.progress);
            let control = Control::new()
                .cancelled_by(job.stop.cancel.clone())
                .on_progress(move |now| _ = progress.send_replace(now));
            // What the work holds is dropped by a panic: nobody sees it half-done.
            let result = match catch_unwind(AssertUnwindSafe(|| work(control))) {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(error)) => Err(told(&job.stop, &error)),
                Err(panic) => Err(Status::internal(format!("the load failed by a bug: {}", panic_text(&*panic)))),
            };
            jobs.count(&job, started, result.as_ref().err());
            drop((place, permit));
            result
        });
        thread.await.unwrap_or_else(|e| Err(Status::internal(format!("the load's thread is gone: {e}"))))
    }

    /// Waits for one of the places.
    async fn admit(self: &Arc<Self>, job: &Job) -> Result<(OwnedSemaphorePermit, Place), Status> {
        let permit = {
            let _queued = Queued::enter(self)?;
            tokio::select! {
                permit = Arc::clone(&self.permits).acquire_owned() => permit.map_err(|_| Why::ShuttingDown.status())?,
                why = job.stop.stopped() => return Err(why.status()),
            }
        };
        let place = Place::take(self, job.clone());
        // Whoever closes and then finds none running has seen the last one.
        if self.is_closed() {
            return Err(Why::ShuttingDown.status());
        }
        Ok((permit, place))
    }

    fn count(&self, job: &Job, started: Instant, error: Option<&Status>) {
        let (model, target, seconds) = (&job.model, &job.target, started.elapsed().as_secs_f64());
        match error {
            None => {
                self.done.fetch_add(1, Ordering::Relaxed);
                // A client may have a model moved in hundreds of batches: whoever asked for the whole tells of it.
                tracing::debug!(%model, %target, seconds, "a load ended");
            }
            Some(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%model, %target, seconds, error = error.message(), "a load failed");
            }
        }
        self.metrics.ended(job.kind, error.map(Status::code), seconds);
    }

    /// Loads that run, oldest first.
    pub(crate) fn running(&self) -> Vec<Running> {
        self.running.borrow().values().cloned().collect()
    }

    /// How many loads of a model run.
    pub(crate) fn running_of(&self, model: &str) -> usize {
        self.running.borrow().values().filter(|running| running.job.model == model).count()
    }

    /// Loads that wait for a place.
    pub(crate) fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    /// Starts no load any more. Those that wait fail.
    pub(crate) fn close(&self) {
        self.closed.send_replace(true);
        self.permits.close();
    }

    /// Waits until no load is started any more.
    pub(crate) async fn closed(&self) {
        // The sender is ours.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// Whether no load is started any more.
    pub(crate) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Waits until no load runs.
    pub(crate) async fn idle(&self) {
        // The sender is ours.
        let _ = self.running.subscribe().wait_for(BTreeMap::is_empty).await;
    }

    /// Stops all loads that run.
    pub(crate) fn stop_all(&self) {
        self.running().iter().for_each(|running| running.job.stop.stop(Why::ShuttingDown));
    }
}

/// The status of a load's error; of one that was stopped, why.
fn told(stop: &Stop, error: &sllm_core::Error) -> Status {
    match (fault::status(error), stop.why()) {
        (status, Some(why)) if status.code() == Code::Cancelled => why.status(),
        (status, _) => status,
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it panicked")
}

/// One of the loads that wait.
struct Queued<'a>(&'a AtomicUsize);

impl Queued<'_> {
    fn enter(jobs: &Jobs) -> Result<Queued<'_>, Status> {
        let queued = Queued(&jobs.queued);
        if jobs.queued.fetch_add(1, Ordering::Relaxed) >= MAX_QUEUE {
            return Err(Status::resource_exhausted(format!("{MAX_QUEUE} loads wait already: try again later")));
        }
        Ok(queued)
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A load's place among those that run, until it is over.
struct Place {
    jobs: Arc<Jobs>,
    number: u64,
}

impl Place {
    fn take(jobs: &Arc<Jobs>, job: Job) -> Place {
        let number = jobs.next.fetch_add(1, Ordering::Relaxed);
        let running = Running { job, since: Instant::now() };
        jobs.running.send_modify(|all| _ = all.insert(number, running));
        Place { jobs: Arc::clone(jobs), number }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.jobs.running.send_modify(|all| _ = all.remove(&self.number));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn jobs(at_once: usize) -> Arc<Jobs> {
        Arc::new(Jobs::new(at_once, Metrics::new()))
    }

    fn job(stop: &Stop) -> Job {
        Job::new("m", "host".into(), Kind::Host, stop.clone())
    }

    /// A load that runs until what comes with it is dropped.
    async fn running_load(jobs: &Arc<Jobs>) -> (mpsc::Sender<()>, tokio::task::JoinHandle<Result<bool, Status>>) {
        let (hold, held) = mpsc::channel();
        let load = tokio::spawn({
            let jobs = Arc::clone(jobs);
            async move { jobs.run(job(&Stop::new()), move |_| Ok(held.recv().is_err())).await }
        });
        while jobs.running().is_empty() {
            tokio::task::yield_now().await;
        }
        (hold, load)
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn a_panic_is_a_failed_load_and_the_next_load_runs() {
        runtime().block_on(async {
            let jobs = jobs(1);
            let failed =
                jobs.run(job(&Stop::new()), |_| -> sllm_core::Result<()> { panic!("the {} broke", "axle") }).await;
            let status = failed.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::Internal, "the load failed by a bug: the axle broke"));
            assert_eq!(jobs.run(job(&Stop::new()), |_| Ok(7)).await.unwrap(), 7);
            assert!(jobs.running().is_empty());
            assert_eq!((jobs.done.load(Ordering::Relaxed), jobs.failed.load(Ordering::Relaxed)), (1, 1));
        });
    }

    #[test]
    fn no_more_loads_run_at_once_than_were_allowed_and_waiting_ones_can_be_stopped() {
        runtime().block_on(async {
            let jobs = jobs(1);
            let (hold, first) = running_load(&jobs).await;
            let stop = Stop::new();
            let waiting = tokio::spawn({
                let (jobs, stop) = (Arc::clone(&jobs), stop.clone());
                async move { jobs.run(job(&stop), |_| Ok(())).await }
            });
            while jobs.queued() == 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(jobs.running().len(), 1);
            assert_eq!(["m", "n"].map(|model| jobs.running_of(model)), [1, 0], "one runs and one waits");
            stop.stop(Why::Unloaded);
            assert_eq!(waiting.await.unwrap().unwrap_err().code(), Code::Cancelled);
            drop(hold);
            assert!(first.await.unwrap().unwrap());
            jobs.close();
            let refused = jobs.run(job(&Stop::new()), |_| Ok(())).await;
            assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
        });
    }

    #[test]
    fn who_waits_for_the_last_load_waits_for_all_and_one_that_comes_then_is_refused() {
        runtime().block_on(async {
            let jobs = jobs(2);
            let (hold, load) = running_load(&jobs).await;
            jobs.close();
            let mut idle = std::pin::pin!(jobs.idle());
            let waits = std::future::poll_fn(|cx| std::task::Poll::Ready(idle.as_mut().poll(cx).is_pending()));
            assert!(waits.await, "a load runs");
            drop(hold);
            idle.await;
            assert_eq!(jobs.done.load(Ordering::Relaxed), 1, "it is counted before it is over");
            assert!(load.await.unwrap().unwrap());
            // It had its place when the last one was seen to end.
            let late = self::jobs(1);
            late.closed.send_replace(true);
            let refused = late.run(job(&Stop::new()), |_| Ok(())).await;
            assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
        });
    }

    #[test]
    fn a_queue_that_is_too_long_takes_no_more() {
        runtime().block_on(async {
            let jobs = jobs(1);
            jobs.queued.store(MAX_QUEUE, Ordering::Relaxed);
            let refused = jobs.run(job(&Stop::new()), |_| Ok(())).await;
            assert_eq!(refused.unwrap_err().code(), Code::ResourceExhausted);
            assert_eq!(jobs.queued(), MAX_QUEUE);
        });
    }

    /// Says on which thread it is dropped.
    struct Told(mpsc::Sender<std::thread::ThreadId>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(std::thread::current().id()).unwrap();
        }
    }

    #[test]
    fn what_a_refused_load_holds_is_dropped_on_a_thread_that_may_block() {
        runtime().block_on(async {
            let full = jobs(1);
            full.queued.store(MAX_QUEUE, Ordering::Relaxed);
            let closed = jobs(1);
            closed.close();
            let late = jobs(1);
            late.closed.send_replace(true);
            let stopped = Stop::new();
            stopped.stop(Why::Late);
            let none = jobs(0);
            for (jobs, stop) in [(full, Stop::new()), (closed, Stop::new()), (late, Stop::new()), (none, stopped)] {
                let (tell, told) = mpsc::channel();
                let held = Told(tell);
                jobs.run(job(&stop), move |_| Ok(held)).await.map(drop).unwrap_err();
                // On this one all runs that is asynchronous.
                assert_ne!(told.try_recv().expect("it is dropped before the refusal"), std::thread::current().id());
            }
        });
    }

    #[test]
    fn a_load_whose_caller_is_gone_is_stopped() {
        runtime().block_on(async {
            let jobs = jobs(1);
            let stop = Stop::new();
            let caller = tokio::spawn({
                let (jobs, stop) = (Arc::clone(&jobs), stop.clone());
                async move {
                    let cancel = stop.cancel.clone();
                    let work = move |_| {
                        while !cancel.is_cancelled() {
                            std::thread::yield_now();
                        }
                        Err::<(), _>(sllm_core::Error::Cancelled)
                    };
                    jobs.run(job(&stop), work).await
                }
            });
            while jobs.running().is_empty() {
                tokio::task::yield_now().await;
            }
            caller.abort();
            while !jobs.running().is_empty() {
                tokio::task::yield_now().await;
            }
            assert_eq!(stop.why(), Some(Why::ClientGone));
        });
    }
}
