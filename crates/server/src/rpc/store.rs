//! Our own service.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use sllm_core::Progress;
use sllm_proto::store::store_server::Store as StoreService;
use sllm_proto::store::{
    EvictRequest, EvictResponse, Job, ListRequest, ListResponse, LoadEvent, LoadRequest, Model, PinRequest, Pool,
    PreloadEvent, PreloadRequest, StatusRequest, StatusResponse, UnpinRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::session;
use crate::fault::{self, refused};
use crate::jobs::Why;
use crate::models::Model as OpenModel;
use crate::preload::{self, Want};
use crate::store::{Store, blocking};

/// Events that wait for a slow client. Progress that finds no room is not told.
const EVENTS: usize = 16;

/// `sllm.v1.Store`.
pub(crate) struct StoreRpc(pub(crate) Arc<Store>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl StoreService for StoreRpc {
    type LoadStream = ReceiverStream<Result<LoadEvent, Status>>;
    type PreloadStream = ReceiverStream<Result<PreloadEvent, Status>>;

    async fn load(&self, request: Request<Streaming<LoadRequest>>) -> Answer<Self::LoadStream> {
        let (events, stream) = mpsc::channel(EVENTS);
        tokio::spawn(session::serve(Arc::clone(&self.0), request.into_inner(), events));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn preload(&self, request: Request<PreloadRequest>) -> Answer<Self::PreloadStream> {
        let PreloadRequest { model, pin } = request.into_inner();
        let model = self.0.open(&model).await?;
        if self.0.jobs.is_closed() {
            return Err(Why::ShuttingDown.status());
        }
        if pin {
            self.set_pinned(&model, true).await?;
        }
        let preload = preload::start(&self.0, &model, Want::Listen);
        let (events, stream) = mpsc::channel(EVENTS);
        tokio::spawn(async move {
            let mut progress = preload.progress();
            let tell = |now: Progress| Ok(PreloadEvent { done: now.done, total: now.total });
            let ended = preload.ended();
            tokio::pin!(ended);
            let result = loop {
                tokio::select! {
                    biased;
                    result = &mut ended => break result,
                    () = events.closed() => {
                        preload.leave();
                        return;
                    }
                    Ok(()) = progress.changed() => {
                        let now = *progress.borrow_and_update();
                        if now.done < now.total {
                            let _ = events.try_send(tell(now));
                        }
                    }
                }
            };
            let last = result.and_then(|()| tell(Progress { done: model.len, total: model.len }));
            let _ = events.send(last).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn list(&self, _: Request<ListRequest>) -> Answer<ListResponse> {
        let store = Arc::clone(&self.0);
        let models = blocking(move || store.models.all().iter().map(|model| describe(&store, model)).collect()).await?;
        Ok(Response::new(ListResponse { models }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Answer<StatusResponse> {
        let store = &self.0;
        let jobs = store.jobs.running().into_iter().map(|running| {
            let progress = *running.job.progress.borrow();
            Job {
                model: running.job.model,
                target: running.job.target,
                done: progress.done,
                total: progress.total,
                seconds: running.since.elapsed().as_secs_f64(),
            }
        });
        Ok(Response::new(StatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            storage_path: store.root.display().to_string(),
            uptime_s: store.since.elapsed().as_secs_f64(),
            pool: Some(pool(store)),
            jobs: jobs.collect(),
            loads_done: store.jobs.done.load(Ordering::Relaxed),
            loads_failed: store.jobs.failed.load(Ordering::Relaxed),
            clients: store.clients.load(Ordering::Relaxed),
        }))
    }

    async fn pin(&self, request: Request<PinRequest>) -> Answer<Model> {
        let model = self.0.open(&request.into_inner().model).await?;
        self.set_pinned(&model, true).await.map(Response::new)
    }

    async fn unpin(&self, request: Request<UnpinRequest>) -> Answer<Model> {
        let asked = request.into_inner().model;
        let model = self.0.known(&asked).await?.ok_or_else(|| unknown(&asked))?;
        self.set_pinned(&model, false).await.map(Response::new)
    }

    async fn evict(&self, request: Request<EvictRequest>) -> Answer<EvictResponse> {
        let asked = request.into_inner().model;
        let store = Arc::clone(&self.0);
        let bytes = if asked.is_empty() {
            blocking(move || store.pool.made().map_or(0, sllm_core::Cache::clear)).await?
        } else {
            let model = self.0.known(&asked).await?.ok_or_else(|| unknown(&asked))?;
            blocking(move || store.pool.evict(&model.checkpoint)).await?
        };
        Ok(Response::new(EvictResponse { bytes }))
    }
}

impl StoreRpc {
    async fn set_pinned(&self, model: &Arc<OpenModel>, pinned: bool) -> Result<Model, Status> {
        let (store, model) = (Arc::clone(&self.0), Arc::clone(model));
        let work = move || {
            let model = store.set_pinned(&model, pinned).map_err(|e| match &e {
                // The request is good; the pool has no room for it now.
                sllm_core::Error::Invalid(_) => refused(Code::ResourceExhausted, e.chain()),
                _ => fault::status(&e),
            })?;
            Ok(describe(&store, &model))
        };
        blocking(work).await?
    }
}

fn unknown(asked: &str) -> Status {
    refused(Code::NotFound, format!("nothing was done with {asked:?} yet"))
}

fn describe(store: &Store, model: &OpenModel) -> Model {
    Model {
        name: model.name.clone(),
        layout: model.checkpoint.layout().name().into(),
        len: model.len,
        resident: store.pool.resident_len(&model.checkpoint),
        pinned: store.pool.is_pinned(&model.checkpoint),
        loads: u32::try_from(store.jobs.running_of(&model.name)).unwrap_or(u32::MAX),
        idle_s: model.idle().as_secs_f64(),
    }
}

fn pool(store: &Store) -> Pool {
    let usage = store.usage();
    Pool {
        capacity: usage.capacity,
        chunk_len: usage.chunk_len,
        resident: usage.resident,
        pinned: usage.pinned,
        page_locked: usage.page_locked,
        refusal: usage.refusal.unwrap_or_default(),
        hits: usage.hits,
        misses: usage.misses,
        evictions: usage.evictions,
    }
}
