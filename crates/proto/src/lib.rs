//! What the store server and its clients agree on: the RPCs, made of the files in `proto/`, and addresses.

mod address;

/// The original's service, `storage.Storage`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod storage {
    tonic::include_proto!("storage");
}

/// Our service, `sllm.v1.Store`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod store {
    tonic::include_proto!("sllm.v1");
}

pub use address::Address;

use std::ffi::OsString;
use std::path::PathBuf;

/// The environment's token, which a server wants of its TCP clients.
pub const TOKEN_VARIABLE: &str = "SLLM_STORE_TOKEN";

/// Bytes that are read of a file with a token.
pub const MAX_TOKEN_FILE: u64 = 64 << 10;

/// Where a server of `user` listens that was not told where, best first; `runtime` is `XDG_RUNTIME_DIR`. The server
/// takes the first whose directory it may write to, a client the first that is there.
pub fn default_sockets(runtime: Option<OsString>, user: u32) -> Vec<PathBuf> {
    const NAME: &str = "sllm-store.sock";
    let runtime = runtime.map(PathBuf::from).filter(|dir| dir.is_absolute());
    let dirs = runtime.into_iter().chain([PathBuf::from("/run")]).map(|dir| dir.join(NAME));
    dirs.chain([PathBuf::from(format!("/tmp/sllm-store-{user}.sock"))]).collect()
}

/// Bytes of a message at most: room for the segments of 200,000 tensors.
pub const MAX_MESSAGE_LEN: usize = 64 << 20;

/// What a client writes first on the Unix socket to pass a memory file: this, and a ticket of 16 random bytes, with
/// the descriptor beside them. The server answers with one byte, 0, or with other bytes that say what is wrong, and
/// closes. A gRPC client begins with other bytes.
pub const PASS_MEMORY: [u8; 8] = *b"sllm-mem";
/// Bytes of a ticket.
pub const TICKET_LEN: usize = 16;
/// Bytes by which a client's process is told from all others, beside the number of an allocation of its.
pub const PROCESS_LEN: usize = 16;
