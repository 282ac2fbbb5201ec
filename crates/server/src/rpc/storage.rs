//! The original's service.

use std::collections::HashMap;
use std::sync::Arc;

use sllm_core::{Segment, parse_uuid};
use sllm_proto::storage::storage_server::Storage;
use sllm_proto::storage::{
    ClearMemRequest, ClearMemResponse, ConfirmModelRequest, ConfirmModelResponse, DeviceType, GetServerConfigRequest,
    GetServerConfigResponse, LoadModelRequest, LoadModelResponse, MemCopyChunk, MemCopyChunkList, MemCopyHandle,
    MemCopyHandleList, RegisterModelRequest, RegisterModelResponse, UnloadModelRequest, UnloadModelResponse,
};
use tonic::{Code, Request, Response, Status};

use super::held::Held;
use super::segments;
use crate::background::Ending;
use crate::devices::OpenDevice;
use crate::fault::{invalid, refused};
use crate::imports::Handle;
use crate::jobs::{Job, Stop, Why};
use crate::metrics::Kind;
use crate::models::{InUse, Model};
use crate::preload::{self, Want};
use crate::replicas;
use crate::room::Taken;
use crate::store::{Store, blocking};

/// `storage.Storage`.
pub(crate) struct StorageRpc(pub(crate) Arc<Store>);

type Answer<T> = Result<Response<T>, Status>;

/// Where to; what no version of the original has is refused.
fn target(device_type: i32) -> Result<DeviceType, Status> {
    match DeviceType::try_from(device_type) {
        Ok(DeviceType::Disk) => Err(Status::unimplemented("models are not written to the disk")),
        Ok(target) => Ok(target),
        Err(_) => Err(invalid(format!("there is no device type {device_type}"))),
    }
}

#[tonic::async_trait]
impl Storage for StorageRpc {
    async fn load_model_async(&self, request: Request<LoadModelRequest>) -> Answer<LoadModelResponse> {
        let LoadModelRequest { model_path, replica_uuid, chunks, handles, target_device_type } = request.into_inner();
        match target(target_device_type)? {
            DeviceType::Gpu => {
                replicas::check_name(&replica_uuid)?;
                let model = self.0.open(&model_path).await?;
                load_to_gpus(&self.0, &model, &replica_uuid, chunks, handles).await?;
            }
            _ => {
                let model = self.0.open(&model_path).await?;
                if self.0.jobs.is_closed() {
                    return Err(Why::ShuttingDown.status());
                }
                preload::start(&self.0, &model, Want::Keep);
            }
        }
        Ok(Response::new(LoadModelResponse { model_path }))
    }

    async fn confirm_model(&self, request: Request<ConfirmModelRequest>) -> Answer<ConfirmModelResponse> {
        let ConfirmModelRequest { model_path, replica_uuid, target_device_type } = request.into_inner();
        let target = target(target_device_type)?;
        let unknown = || refused(Code::NotFound, format!("no load of {model_path:?} was asked for"));
        if target == DeviceType::Gpu {
            // What became of a replica is known also when its model was forgotten.
            self.0.replicas.ended(&self.0.name(&model_path).await?, &replica_uuid).await?;
        } else {
            let model = self.0.known(&model_path).await?.ok_or_else(unknown)?;
            model.preloads.last().ok_or_else(unknown)?.ended().await?;
        }
        Ok(Response::new(ConfirmModelResponse { model_path, code: 0 }))
    }

    async fn unload_model(&self, request: Request<UnloadModelRequest>) -> Answer<UnloadModelResponse> {
        let UnloadModelRequest { model_path, replica_uuid, target_device_type } = request.into_inner();
        let target = target(target_device_type)?;
        let absent = || refused(Code::NotFound, format!("{model_path:?} is not in memory"));
        if target == DeviceType::Gpu {
            if !self.0.replicas.release(&self.0.name(&model_path).await?, &replica_uuid).await {
                return Err(refused(Code::NotFound, format!("{model_path:?} has no replica {replica_uuid:?}")));
            }
        } else {
            let model = self.0.known(&model_path).await?.ok_or_else(absent)?;
            let preload = model.preloads.last();
            if let Some(preload) = &preload {
                preload.stop(Why::Unloaded);
                // How it ended was for those who asked for it.
                let _ = preload.ended().await;
                model.preloads.clear(preload);
            }
            let store = Arc::clone(&self.0);
            if blocking(move || store.pool.evict(&model.checkpoint)).await? == 0 && preload.is_none() {
                return Err(absent());
            }
        }
        Ok(Response::new(UnloadModelResponse { model_path, code: 0 }))
    }

    async fn clear_mem(&self, _: Request<ClearMemRequest>) -> Answer<ClearMemResponse> {
        let store = Arc::clone(&self.0);
        let clear = move || {
            let bytes = store.pool.made().map_or(0, sllm_core::Cache::clear);
            store.models.forget();
            bytes
        };
        let bytes = blocking(clear).await?;
        tracing::info!(bytes, "cleared");
        Ok(Response::new(ClearMemResponse {}))
    }

    async fn register_model(&self, request: Request<RegisterModelRequest>) -> Answer<RegisterModelResponse> {
        let model_path = request.into_inner().model_path;
        let model = self.0.open_any(&model_path).await?;
        self.0.register(&model);
        let too_long = || Status::internal("the model is longer than the answer can say");
        let model_size = i64::try_from(model.len).map_err(|_| too_long())?;
        Ok(Response::new(RegisterModelResponse { model_path, model_size }))
    }

    async fn get_server_config(&self, _: Request<GetServerConfigRequest>) -> Answer<GetServerConfigResponse> {
        let signed = |len| i64::try_from(len).unwrap_or(i64::MAX);
        Ok(Response::new(GetServerConfigResponse {
            mem_pool_size: signed(self.0.config.pool_len),
            chunk_size: signed(self.0.config.chunk_len),
        }))
    }
}

/// What a load into GPUs needs, all of it checked. Memory is closed before its device.
#[derive(Default)]
struct Planned {
    segments: Vec<Segment>,
    held: Held<Handle>,
    devices: Vec<OpenDevice>,
}

/// Bytes of memory that a request takes.
fn weight(chunks: &HashMap<String, MemCopyChunkList>, handles: &HashMap<String, MemCopyHandleList>) -> usize {
    let chunks = chunks.values().map(|list| list.chunks.capacity() * size_of::<MemCopyChunk>());
    let handles = handles.values().map(|list| list.handles.capacity() * size_of::<MemCopyHandle>());
    chunks.chain(handles).sum()
}

/// Opens handles and checks numbers, then copies in the background.
async fn load_to_gpus(
    store: &Arc<Store>,
    model: &Arc<Model>,
    replica: &str,
    chunks: HashMap<String, MemCopyChunkList>,
    handles: HashMap<String, MemCopyHandleList>,
) -> Result<(), Status> {
    if store.jobs.is_closed() {
        return Err(Why::ShuttingDown.status());
    }
    if chunks.is_empty() {
        return Err(invalid("nothing is to be loaded: the request has no chunks"));
    }
    if chunks.len() != handles.len() {
        return Err(invalid(format!("chunks are for {} devices and handles for {}", chunks.len(), handles.len())));
    }
    let room = store.room.take(weight(&chunks, &handles)).await;
    let (store, model, replica) = (Arc::clone(store), Arc::clone(model), replica.to_owned());
    let begin = move || {
        let planned = plan(&store, &model, &chunks, &handles)?;
        let stop = Stop::new();
        // Where it is refused, the handles are closed on this thread.
        let ending = store.replicas.begin(&model.name, &replica, stop.clone())?;
        start(store, &model, planned, room, stop, ending);
        Ok(())
    };
    blocking(begin).await?
}

/// Copies in the background.
fn start(store: Arc<Store>, model: &Arc<Model>, planned: Planned, room: Option<Taken>, stop: Stop, ending: Ending) {
    let devices = segments::devices(planned.held.blocks());
    let job = Job::new(&model.name, segments::names(&devices), Kind::Cuda, stop);
    let model = InUse::new(model);
    tokio::spawn(async move {
        let shared = Arc::clone(&store);
        let run = store.jobs.run(job, move |control| {
            // Dropped in the other order. Handles are closed when the copies are done, on this thread.
            let Planned { devices: open, held, segments } = planned;
            let loader = shared.loader(&model, control)?.devices(devices).build()?;
            let report = held.load(|blocks| loader.fill_segments(&model.checkpoint, &segments, blocks))?;
            drop((open, room));
            shared.tell(&model, &report);
            Ok(())
        });
        ending.tell(run.await);
    });
}

fn plan(
    store: &Store,
    model: &Model,
    chunks: &HashMap<String, MemCopyChunkList>,
    handles: &HashMap<String, MemCopyHandleList>,
) -> Result<Planned, Status> {
    let files: Vec<u64> = model.checkpoint.files().iter().map(|file| file.len()).collect();
    let mut planned = Planned::default();
    for (text, list) in chunks {
        let missing = || invalid(format!("there are chunks for device {text:?}, and no handles"));
        let handles = &handles.get(text).ok_or_else(missing)?.handles;
        let uuid = parse_uuid(text).map_err(|e| refused(Code::NotFound, e.chain()))?;
        let first = planned.held.blocks().len();
        segments::add_chunks(&mut planned.segments, &list.chunks, &files, handles.len(), first)?;
        let device = store.devices.open(&uuid)?;
        for handle in handles {
            let bytes = handle.cuda_ipc_handle.as_slice();
            let wrong = || invalid(format!("a CUDA IPC handle has 64 bytes, not {}", bytes.len()));
            let handle = Handle { device: uuid, bytes: <[u8; 64]>::try_from(bytes).map_err(|_| wrong())? };
            // The original's clients do not tell which allocation it is: it is opened for this load alone.
            let open = || store.imports.open(&device, &handle, None, None);
            planned.held.add_of(handle, open, |hold| hold.block(0, hold.len()))?;
        }
        planned.devices.push(device);
    }
    let block_end = |segment: &Segment| planned.held.blocks()[segment.block].len();
    if let Some(outside) = planned.segments.iter().find(|s| s.dst_offset.saturating_add(s.row_len) > block_end(s)) {
        let len = block_end(outside);
        return Err(invalid(format!("{outside:?} passes the end of its memory, which has {len} bytes")));
    }
    Ok(planned)
}
