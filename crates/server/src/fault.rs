//! Errors as clients are told them.

use sllm_core::{Error, ErrorKind};
use tonic::{Code, Status};

/// Bytes of a message at most: it goes into a header, which clients limit to 8 KiB or so.
const MAX_MESSAGE: usize = 4000;

/// The status of an error: its whole chain in one message.
pub(crate) fn status(error: &Error) -> Status {
    let code = match error.kind() {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Invalid | ErrorKind::Format => Code::InvalidArgument,
        ErrorKind::Permission => Code::PermissionDenied,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::NoSpace | ErrorKind::DeviceMemory => Code::ResourceExhausted,
        ErrorKind::Cancelled if matches!(error, Error::TimedOut) => Code::DeadlineExceeded,
        ErrorKind::Cancelled => Code::Cancelled,
        _ => Code::Internal,
    };
    Status::new(code, cut(error.chain()))
}

/// A status whose message may quote a client.
pub(crate) fn refused(code: Code, message: String) -> Status {
    Status::new(code, cut(message))
}

/// An argument that cannot be.
pub(crate) fn invalid(message: impl Into<String>) -> Status {
    refused(Code::InvalidArgument, message.into())
}

fn cut(mut message: String) -> String {
    if message.len() > MAX_MESSAGE {
        let end = (0..=MAX_MESSAGE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or_default();
        message.truncate(end);
        message.push_str("...");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_cut_between_characters() {
        let message = refused(Code::NotFound, "ü".repeat(MAX_MESSAGE)).message().to_owned();
        assert!(message.len() <= MAX_MESSAGE + 3 && message.ends_with("ü..."), "{}", message.len());
    }

    #[test]
    fn the_whole_chain_is_told() {
        let source = std::io::Error::other("the disk is on fire");
        let told = status(&Error::Io { what: "read", path: "/m".into(), source });
        assert_eq!((told.code(), told.message()), (Code::Internal, "/m: cannot read: the disk is on fire"));
    }
}
