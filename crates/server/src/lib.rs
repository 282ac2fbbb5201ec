//! The store server: keeps checkpoints in pinned memory, and writes them into the memory of inference engines.
//!
//! [`Settings`] (flags, and a file) resolve to a [`Config`]; [`Server::bind`] listens by it and [`Server::run`] answers.
//! The way of a request: `connection` tells gRPC from passed memory, `rpc` checks what is asked, `models` opens the
//! checkpoint, `jobs` gives the load a place and a thread, and `sllm_core` moves the bytes.
//!
//! Nothing that may block runs on an asynchronous thread, and no lock is held while something is waited for.
#![deny(unsafe_code)]

mod background;
mod config;
mod connection;
mod devices;
mod fault;
mod imports;
mod jobs;
mod listen;
mod log;
#[allow(unsafe_code, reason = "mapping memory files")]
mod memory;
mod metrics;
mod models;
mod pool;
mod preload;
mod replicas;
mod room;
mod rpc;
mod scrape;
mod serve;
mod server;
mod store;
mod token;

pub use config::{Config, Quota, Settings, Size};
pub use listen::default_socket;
pub use log::{LogFormat, LogGuard, log_to_stderr};
pub use serve::serve;
pub use server::Server;
pub use sllm_proto::{Address, TOKEN_VARIABLE};
pub use token::Token;
