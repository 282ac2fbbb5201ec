//! What can go wrong, in the user's words.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::device::DeviceError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A checkpoint that cannot be opened, because something in it is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatError {
    /// The file that is wrong.
    pub path: PathBuf,
    /// The tensor concerned, if it is one.
    pub tensor: Option<String>,
    /// Where in the file, in bytes.
    pub offset: Option<u64>,
    /// What is wrong.
    pub reason: String,
}

impl FormatError {
    pub(crate) fn new(path: &Path, reason: impl Into<String>) -> Self {
        FormatError { path: path.to_owned(), tensor: None, offset: None, reason: reason.into() }
    }

    pub(crate) fn tensor(mut self, name: &str) -> Self {
        self.tensor = Some(name.to_owned());
        self
    }

    pub(crate) fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(tensor) = &self.tensor {
            write!(f, ": tensor {tensor:?}")?;
        }
        if let Some(offset) = self.offset {
            write!(f, ": at byte {offset}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

impl std::error::Error for FormatError {}

/// A chunk whose bytes are not those that were stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CorruptChunk {
    /// The data file.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// The chunk's number in that file.
    pub chunk: u64,
    /// Its first byte in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The CRC-64/NVME that the manifest gives; 16 hexadecimal digits in JSON.
    #[serde(serialize_with = "hex")]
    pub expected: u64,
    /// The CRC-64/NVME of the bytes that were read; 16 hexadecimal digits in JSON.
    #[serde(serialize_with = "hex")]
    pub found: u64,
    /// Names of tensors that have bytes in it, 16 at most.
    pub tensors: Vec<String>,
    /// How many more tensors have bytes in it.
    pub more_tensors: usize,
}

/// Names of a corrupt chunk's tensors that are kept, and bytes of each: any number of names may be tied to one place, and any number
/// of chunks be corrupt.
const MAX_NAMES: usize = 16;
const MAX_NAME_LEN: usize = 1024;

impl CorruptChunk {
    /// Notes a tensor that has bytes in it.
    pub(crate) fn add_tensor(&mut self, name: &str) {
        if self.tensors.len() < MAX_NAMES && name.len() <= MAX_NAME_LEN {
            self.tensors.push(name.to_owned());
        } else {
            self.more_tensors += 1;
        }
    }
}

fn hex<S: Serializer>(crc: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{crc:016x}"))
}

impl fmt::Display for CorruptChunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: chunk {} (bytes {}..{}) is corrupt: its checksum is {:016x}, the manifest says {:016x}",
            self.path.display(),
            self.chunk,
            self.offset,
            self.offset + self.len,
            self.found,
            self.expected
        )?;
        match (self.tensors.as_slice(), self.more_tensors) {
            ([], 0) => write!(f, "; it holds only padding"),
            ([], more) => write!(f, "; it holds tensors of long names ({more})"),
            ([one], 0) => write!(f, "; it holds tensor {one:?}"),
            ([first, rest @ ..], more) => write!(f, "; it holds tensor {first:?} and {} more", rest.len() + more),
        }
    }
}

/// Any failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused an operation on a file.
    #[error("{path}: cannot {what}", path = path.display())]
    Io {
        /// What was tried, such as `open`.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// A checkpoint is not what its format allows.
    #[error("invalid checkpoint: {0}")]
    Format(Box<FormatError>), // no source: the message is the whole of it

    /// There is no checkpoint at this path or under this name.
    #[error("no checkpoint at {path}: {reason}", path = path.display())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
        /// What was looked for, and what to do.
        reason: String,
    },

    /// A file ended before bytes that its checkpoint says are there.
    #[error(
        "{path}: the file ends at byte {end}, but bytes {offset}..{until} were wanted: it was truncated after it was opened",
        path = path.display(), until = offset + len
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// First byte wanted.
        offset: u64,
        /// Number of bytes wanted.
        len: u64,
        /// Where it ends now.
        end: u64,
    },

    /// A file was written to after its checkpoint was opened.
    #[error("{path}: it was changed while it was read; start again", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },

    /// Stored bytes changed.
    #[error("{0}")]
    Corrupt(Box<CorruptChunk>),

    /// The checkpoint has no such tensor, or a pattern matches none.
    #[error("no tensor {name:?} in {path}", path = path.display())]
    NoSuchTensor {
        /// The name or pattern.
        name: String,
        /// The checkpoint.
        path: PathBuf,
    },

    /// The target of a conversion is there already.
    #[error(
        "{path} exists already: choose another path, or remove it; convert and save_dict replace a store there with \
         --overwrite (overwrite=True)",
        path = path.display()
    )]
    Exists {
        /// The target.
        path: PathBuf,
    },

    /// Too little room for what is to be written.
    #[error("{path}: {need} bytes are needed and {free} are free", path = path.display())]
    NoSpace {
        /// The directory to be written to.
        path: PathBuf,
        /// Bytes needed.
        need: u64,
        /// Bytes free.
        free: u64,
    },

    /// A device refused something.
    #[error(transparent)]
    Device(#[from] DeviceError),

    /// A way of reading that was asked for does not work here.
    #[error("the {engine} engine cannot be used here: {reason}")]
    Engine {
        /// The engine asked for.
        engine: &'static str,
        /// Why it cannot be used.
        reason: String,
    },

    /// An argument makes no sense.
    #[error("{0}")]
    Invalid(String),

    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,

    /// The caller's deadline passed.
    #[error("the time that the caller gave is over")]
    TimedOut,
}

/// What an error is about, for exit codes and exception classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The system refused an operation, or a file ended early.
    Io,
    /// Permission denied.
    Permission,
    /// A checkpoint is invalid, or was changed while it was read.
    Format,
    /// No checkpoint, or no such tensor.
    NotFound,
    /// A checksum differs.
    Corrupt,
    /// The target exists.
    Exists,
    /// The disk is full, or its user's quota is used up.
    NoSpace,
    /// A device failed or is not there.
    Device,
    /// Too little device memory.
    DeviceMemory,
    /// An argument or a forced choice that cannot be used here.
    Invalid,
    /// Stopped on request, or out of time.
    Cancelled,
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { what, path, source }
    }

    /// What the error is about.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => ErrorKind::Permission,
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
                _ => ErrorKind::Io,
            },
            Error::Truncated { .. } => ErrorKind::Io,
            // What was read of it is no checkpoint.
            Error::Format(_) | Error::Changed { .. } => ErrorKind::Format,
            Error::NotFound { .. } | Error::NoSuchTensor { .. } => ErrorKind::NotFound,
            Error::Corrupt(_) => ErrorKind::Corrupt,
            Error::Exists { .. } => ErrorKind::Exists,
            Error::NoSpace { .. } => ErrorKind::NoSpace,
            Error::Device(e) if e.is_out_of_memory() => ErrorKind::DeviceMemory,
            Error::Device(_) => ErrorKind::Device,
            Error::Engine { .. } | Error::Invalid(_) => ErrorKind::Invalid,
            Error::Cancelled | Error::TimedOut => ErrorKind::Cancelled,
        }
    }

    /// The message with every cause after it, as one line.
    pub fn chain(&self) -> String {
        let mut out = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(e) = cause {
            out.push_str(": ");
            out.push_str(&e.to_string());
            cause = e.source();
        }
        out
    }
}

impl From<FormatError> for Error {
    fn from(e: FormatError) -> Self {
        Error::Format(Box::new(e))
    }
}

impl From<Box<FormatError>> for Error {
    fn from(e: Box<FormatError>) -> Self {
        Error::Format(e)
    }
}

/// A path in JSON, which has no other text than UTF-8: what is not has a replacement character.
pub(crate) fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// As [`lossy`], of a path that may be none.
pub(crate) fn lossy_if_any<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.to_string_lossy()).serialize(serializer)
}

/// As [`lossy`], of several.
pub(crate) fn lossy_all<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corrupt_chunk() -> CorruptChunk {
        let (tensors, more_tensors) = (Vec::new(), 0);
        CorruptChunk { path: "/m".into(), chunk: 0, offset: 0, len: 1, expected: 0, found: 1, tensors, more_tensors }
    }

    #[test]
    fn few_names_of_a_corrupt_chunk_are_kept_and_the_others_counted() {
        let told = |names: &[String]| {
            let mut chunk = corrupt_chunk();
            names.iter().for_each(|name| chunk.add_tensor(name));
            let text = chunk.to_string();
            (chunk.tensors, chunk.more_tensors, text.split_once("; it holds ").unwrap().1.to_owned())
        };
        let names: Vec<String> = (0..100_000).map(|i| format!("t{i}")).collect();
        assert_eq!(told(&[]), (vec![], 0, "only padding".into()));
        assert_eq!(told(&names[..1]), (names[..1].to_vec(), 0, "tensor \"t0\"".into()));
        assert_eq!(told(&names[..16]), (names[..16].to_vec(), 0, "tensor \"t0\" and 15 more".into()));
        assert_eq!(told(&names), (names[..16].to_vec(), 99_984, "tensor \"t0\" and 99999 more".into()));
        let long = ["x".repeat(MAX_NAME_LEN), "y".repeat(MAX_NAME_LEN + 1)];
        assert_eq!(told(&long).0, long[..1]);
        assert_eq!(told(&long[1..]), (vec![], 1, "tensors of long names (1)".into()));
    }

    /// What has a message of its own and a source besides would be told twice.
    #[test]
    fn a_chain_says_nothing_twice() {
        let path = PathBuf::from("/m");
        let corrupt = corrupt_chunk();
        for error in [
            Error::from(FormatError::new(&path, "THE REASON").tensor("t").at(7)),
            Error::from(Box::new(FormatError::new(&path, "THE REASON"))),
            Error::io("open", &path)(io::Error::other("THE REASON")),
            Error::Invalid("THE REASON".into()),
            Error::NotFound { path: path.clone(), reason: "THE REASON".into() },
            Error::Engine { engine: "uring", reason: "THE REASON".into() },
            Error::Device(DeviceError::PagesRefused("THE REASON".into())),
        ] {
            assert_eq!(error.chain().matches("THE REASON").count(), 1, "{}", error.chain());
        }
        assert_eq!(Error::Corrupt(Box::new(corrupt)).chain().matches("is corrupt").count(), 1);
    }
}
