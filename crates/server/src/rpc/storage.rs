//! The original's service.

use std::sync::Arc;

use sllm_proto::storage::storage_server::Storage;
use sllm_proto::storage::{
    ClearMemRequest, ClearMemResponse, ConfirmModelRequest, ConfirmModelResponse, GetServerConfigRequest,
    GetServerConfigResponse, LoadModelRequest, LoadModelResponse, RegisterModelRequest, RegisterModelResponse,
    UnloadModelRequest, UnloadModelResponse,
};
use tonic::{Request, Response, Status};

use crate::store::Store;

/// `storage.Storage`.
pub(crate) struct StorageRpc(pub(crate) Arc<Store>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Storage for StorageRpc {
    async fn load_model_async(&self, _request: Request<LoadModelRequest>) -> Answer<LoadModelResponse> {
        Err(Status::unimplemented("not yet"))
    }

    async fn confirm_model(&self, _request: Request<ConfirmModelRequest>) -> Answer<ConfirmModelResponse> {
        Err(Status::unimplemented("not yet"))
    }

    async fn unload_model(&self, _request: Request<UnloadModelRequest>) -> Answer<UnloadModelResponse> {
        Err(Status::unimplemented("not yet"))
    }

    async fn clear_mem(&self, _request: Request<ClearMemRequest>) -> Answer<ClearMemResponse> {
        Err(Status::unimplemented("not yet"))
    }

    async fn register_model(&self, _request: Request<RegisterModelRequest>) -> Answer<RegisterModelResponse> {
        Err(Status::unimplemented("not yet"))
    }

    async fn get_server_config(&self, _: Request<GetServerConfigRequest>) -> Answer<GetServerConfigResponse> {
        let signed = |len| i64::try_from(len).unwrap_or(i64::MAX);
        Ok(Response::new(GetServerConfigResponse {
            mem_pool_size: signed(self.0.config.pool_len),
            chunk_size: signed(self.0.config.chunk_len),
        }))
    }
}
