//! The RPCs of the store server, made of the files in `proto/`.

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

/// Bytes of a message at most: room for the segments of 200,000 tensors.
pub const MAX_MESSAGE_LEN: usize = 64 << 20;

/// What a client writes first on the Unix socket to pass a memory file: this, and a ticket of 16 random bytes, with
/// the descriptor beside them. The server answers with one byte, 0, or with other bytes that say what is wrong, and
/// closes. A gRPC client begins with other bytes.
pub const PASS_MEMORY: [u8; 8] = *b"sllm-mem";
/// Bytes of a ticket.
pub const TICKET_LEN: usize = 16;
