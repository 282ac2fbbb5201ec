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

/// Bytes of a message of our service at most. Decoded it takes up to 32 times as many: two bytes are enough for a part that
/// says nothing.
pub const MAX_MESSAGE_LEN: usize = 8 << 20;
/// Bytes of a message of the original's service at most, whose clients send all of a model at once: room for 200,000
/// tensors. Decoded it takes up to 16 times as many.
pub const MAX_ORIGINAL_LEN: usize = 16 << 20;

/// What a client writes first on the Unix socket to pass a memory file: this, and a ticket of 16 random bytes, with
/// the descriptor beside them. The server answers with one byte, 0, or with other bytes that say what is wrong, and
/// closes. A gRPC client begins with other bytes.
pub const PASS_MEMORY: [u8; 8] = *b"sllm-mem";
/// Bytes of a ticket.
pub const TICKET_LEN: usize = 16;
/// Bytes by which a client's process is told from all others, beside the number of an allocation of its.
pub const PROCESS_LEN: usize = 16;

/// A time of seconds and nanoseconds as nanoseconds, as [`store::Open`] has times of status. What passes 64 bits wraps,
/// at both ends alike.
pub fn nanoseconds((seconds, nanoseconds): (i64, i64)) -> i64 {
    seconds.wrapping_mul(1_000_000_000).wrapping_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use prost::Message;

    use super::*;

    /// Bytes of the longest messages when they are decoded.
    const DECODED: usize = 256 << 20;

    #[test]
    fn the_originals_request_for_200_000_tensors_is_within_the_limit() {
        let far = u64::MAX >> 8;
        let chunk = storage::MemCopyChunk { src_offset: far, size: far, dst_offset: far, handle_idx: 255 };
        let chunks = storage::MemCopyChunkList { chunks: vec![chunk; 200_000] };
        let chunks = HashMap::from([("x".repeat(36), chunks)]);
        let len = storage::LoadModelRequest { chunks, ..Default::default() }.encoded_len();
        assert!(len < MAX_ORIGINAL_LEN, "{len}");
    }

    #[test]
    fn parts_that_say_nothing_take_no_more_memory_than_is_said() {
        let parts = [
            (size_of::<store::Segment>(), MAX_MESSAGE_LEN),
            (size_of::<store::File>(), MAX_MESSAGE_LEN),
            (size_of::<storage::MemCopyChunk>(), MAX_ORIGINAL_LEN),
            (size_of::<storage::MemCopyHandle>(), MAX_ORIGINAL_LEN),
        ];
        let empty = store::Batch { segments: vec![store::Segment::default(); 100], timeout_ms: 0 };
        assert_eq!(empty.encoded_len(), 2 * 100);
        for (part, most) in parts {
            assert!(part * (most / 2) <= DECODED, "{part} {most}");
        }
    }
}
