//! The services: what clients ask, checked and handed on.

mod storage;
mod store;

pub(crate) use storage::StorageRpc;
pub(crate) use store::StoreRpc;
