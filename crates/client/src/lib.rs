//! Client of the store server.
//!
//! [`StoreClient`] asks a server what it holds and tells it what to hold. [`StoreRemote`] lets it fill the blocks of a
//! load: straight into GPU memory that can be exported, else into staging memory of ours, from which the bytes are
//! copied to their places.
//!
//! Calls block, and each has a deadline. A client has one thread, on which its connection runs; it ends when the last
//! clone of the client is dropped. Nothing is global, so that a client can live in anybody's process.
//!
//! ```no_run
//! use sllm_client::{ClientOptions, StoreClient};
//!
//! # fn main() -> sllm_client::Result<()> {
//! let client = StoreClient::connect(&ClientOptions::new())?;
//! for model in client.list()? {
//!     println!("{}: {} of {} bytes in memory", model.name, model.resident, model.len);
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod address;
mod client;
mod cut;
mod error;
mod events;
mod load;
mod pass;
mod remote;
mod runtime;
mod session;
mod staging;
mod types;

pub use address::find_address;
pub use client::{ClientOptions, StoreClient};
pub use error::{Error, Refusal, Result};
pub use remote::{Moved, RemoteOptions, StoreRemote};
pub use sllm_proto::{Address, MAX_TOKEN_FILE};
pub use types::{Job, Model, Pool, Status};
