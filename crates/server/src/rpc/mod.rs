//! The services: what clients ask, checked and handed on.

mod segments;
mod session;
mod storage;
mod store;

pub(crate) use storage::StorageRpc;
pub(crate) use store::StoreRpc;
