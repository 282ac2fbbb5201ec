//! Our own service.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use sllm_proto::store::store_server::Store as StoreService;
use sllm_proto::store::{
    EvictRequest, EvictResponse, Job, ListRequest, ListResponse, LoadEvent, LoadRequest, Model, PinRequest, Pool,
    PreloadEvent, PreloadRequest, StatusRequest, StatusResponse, UnpinRequest,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::store::Store;

/// `sllm.v1.Store`.
pub(crate) struct StoreRpc(pub(crate) Arc<Store>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl StoreService for StoreRpc {
    type LoadStream = ReceiverStream<Result<LoadEvent, Status>>;
    type PreloadStream = ReceiverStream<Result<PreloadEvent, Status>>;

    async fn load(&self, _request: Request<Streaming<LoadRequest>>) -> Answer<Self::LoadStream> {
        Err(Status::unimplemented("not yet"))
    }

    async fn preload(&self, _request: Request<PreloadRequest>) -> Answer<Self::PreloadStream> {
        Err(Status::unimplemented("not yet"))
    }

    async fn list(&self, _: Request<ListRequest>) -> Answer<ListResponse> {
        Err(Status::unimplemented("not yet"))
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
            pool: Some(Pool::default()),
            jobs: jobs.collect(),
            loads_done: store.jobs.done.load(Ordering::Relaxed),
            loads_failed: store.jobs.failed.load(Ordering::Relaxed),
            clients: store.clients.load(Ordering::Relaxed),
        }))
    }

    async fn pin(&self, _request: Request<PinRequest>) -> Answer<Model> {
        Err(Status::unimplemented("not yet"))
    }

    async fn unpin(&self, _request: Request<UnpinRequest>) -> Answer<Model> {
        Err(Status::unimplemented("not yet"))
    }

    async fn evict(&self, _request: Request<EvictRequest>) -> Answer<EvictResponse> {
        Err(Status::unimplemented("not yet"))
    }
}
