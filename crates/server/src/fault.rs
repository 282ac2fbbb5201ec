//! Errors as clients are told them.

use sllm_core::{Error, ErrorKind};
use tonic::{Code, Status};

/// Bytes of a message at most as it is sent: it goes into a header, which clients limit to 8 KiB or so, and in which most that
/// are no letters take three.
const MAX_MESSAGE: usize = 6000;

/// The status of an error: its whole chain in one message.
pub(crate) fn status(error: &Error) -> Status {
    let code = match error.kind() {
        // Its files are not those that the client opened any more.
        _ if matches!(error, Error::Changed { .. } | Error::Truncated { .. }) => Code::FailedPrecondition,
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
    let mut sent = 0;
    let end = message.char_indices().find_map(|(at, char)| {
        sent += if char.is_ascii_alphanumeric() { 1 } else { 3 * char.len_utf8() };
        (sent > MAX_MESSAGE).then_some(at)
    });
    if let Some(end) = end {
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
        for (long, kept) in [("ü", 1000), ("\n", 2000), ("x", MAX_MESSAGE)] {
            let status = refused(Code::NotFound, long.repeat(2 * MAX_MESSAGE));
            assert_eq!(status.message(), long.repeat(kept) + "...");
            let headers = status.into_http::<()>().headers().clone();
            let sent: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            assert!(sent < 8 << 10, "{sent}");
        }
        let whole = "x".repeat(MAX_MESSAGE);
        assert_eq!(refused(Code::NotFound, whole.clone()).message(), whole);
    }

    #[test]
    fn files_that_changed_are_told_from_invalid_ones_and_from_failures() {
        let path = std::path::PathBuf::from("/m");
        let truncated = Error::Truncated { path: path.clone(), offset: 0, len: 2, end: 1 };
        for (error, code) in [
            (Error::Changed { path }, Code::FailedPrecondition),
            (truncated, Code::FailedPrecondition),
            (Error::Invalid("no".into()), Code::InvalidArgument),
        ] {
            assert_eq!(status(&error).code(), code, "{error}");
        }
    }

    #[test]
    fn the_whole_chain_is_told() {
        let source = std::io::Error::other("the disk is on fire");
        let told = status(&Error::Io { what: "read", path: "/m".into(), source });
        assert_eq!((told.code(), told.message()), (Code::Internal, "/m: cannot read: the disk is on fire"));
    }
}
