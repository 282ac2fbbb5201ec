//! The services: what clients ask, checked and handed on.

mod attached;
mod held;
mod segments;
mod session;
mod storage;
mod store;
mod talk;

pub(crate) use storage::StorageRpc;
pub(crate) use store::StoreRpc;
