//! What can go wrong between a client and its server, in the user's words.

use std::io;
use std::time::Duration;

use tonic::{Code, Status};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not an address.
    #[error("{address:?} is not the address of a store server: {reason}")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },

    /// Nobody answers.
    #[error("no store server answers at {address} ({reason}): start one by `sllm-store start`")]
    NotThere {
        /// Where it was looked for.
        address: String,
        /// What the system says.
        reason: String,
    },

    /// The server said no.
    #[error("the store server refused to {what}: {message}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Which kind of no.
        refusal: Refusal,
        /// The server's words.
        message: String,
    },

    /// The server answered too late, or not at all.
    #[error("the store server did not {what} within {} s", limit.as_secs_f64())]
    TimedOut {
        /// What was asked.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
    },

    /// The connection ended before the answer.
    #[error("the connection to the store server was lost before it could {what}: {reason}")]
    Lost {
        /// What was asked.
        what: &'static str,
        /// What the system says.
        reason: String,
    },

    /// The server's answer makes no sense.
    #[error("the store server answered what it must not: {0}; client and server may be of different versions")]
    Protocol(String),

    /// Host memory over TCP.
    #[error("a load to host memory needs the server's Unix socket: memory cannot be passed over TCP ({address})")]
    MemoryOverTcp {
        /// The server's address.
        address: String,
    },

    /// Memory that cannot be passed.
    #[error("memory cannot be passed to the store server: {0}")]
    NotPassed(String),

    /// A token that cannot be sent.
    #[error("a token has visible ASCII characters only: see --token-file and SLLM_STORE_TOKEN")]
    Token,

    /// The client's thread.
    #[error("the client's thread cannot be started")]
    Thread(#[source] io::Error),

    /// A client of the parent process.
    #[error("this process was forked after the client was made: make a client of its own")]
    Forked,

    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,

    /// This side's part of a load failed.
    #[error(transparent)]
    Core(sllm_core::Error),
}

/// Why a server says no.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// No such model or device.
    NotFound,
    /// A number or a name that cannot be.
    Invalid,
    /// The server's files are not those of the client, or changed while they were read.
    OtherFiles,
    /// Without a token, or with a wrong one.
    Denied,
    /// Too much to do, or too little room.
    Busy,
    /// Stored bytes are corrupt.
    Corrupt,
    /// An older server does not know how.
    Unknown,
    /// It tried and failed.
    Failed,
}

impl Error {
    /// The message with every cause after it, as one line.
    pub fn chain(&self) -> String {
        let source = std::error::Error::source(self);
        let causes = std::iter::successors(source, |cause| cause.source());
        causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"))
    }

    /// What a status means that answers this.
    pub(crate) fn of(what: &'static str, limit: Duration, status: &Status) -> Error {
        // Statuses that were made here, and not by the server, tell the error that they come from.
        if let Some(source) = std::error::Error::source(status) {
            return Error::Lost { what, reason: innermost(source) };
        }
        let refusal = match status.code() {
            Code::DeadlineExceeded => return Error::TimedOut { what, limit },
            Code::NotFound => Refusal::NotFound,
            Code::InvalidArgument | Code::OutOfRange => Refusal::Invalid,
            Code::FailedPrecondition => Refusal::OtherFiles,
            Code::PermissionDenied | Code::Unauthenticated => Refusal::Denied,
            Code::ResourceExhausted | Code::Unavailable => Refusal::Busy,
            Code::DataLoss => Refusal::Corrupt,
            Code::Unimplemented => Refusal::Unknown,
            _ => Refusal::Failed,
        };
        let message = match status.message() {
            "" => format!("{} ({:?})", status.code(), status.code()),
            message => message.to_owned(),
        };
        Error::Refused { what, refusal, message }
    }
}

/// The last error of a chain, which is the system's.
pub(crate) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source()).last().map_or_else(String::new, ToString::to_string)
}

impl From<sllm_core::Error> for Error {
    fn from(error: sllm_core::Error) -> Error {
        match error {
            sllm_core::Error::Cancelled => Error::Cancelled,
            error => Error::Core(error),
        }
    }
}

impl From<Error> for sllm_core::Error {
    fn from(error: Error) -> sllm_core::Error {
        match error {
            Error::Core(error) => error,
            Error::Cancelled => sllm_core::Error::Cancelled,
            error => sllm_core::Error::Invalid(error.chain()),
        }
    }
}
