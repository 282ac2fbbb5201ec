//! Errors as the exceptions of `serverless_llm.errors`.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyModule;
use sllm_core::{Error, ErrorKind};

static CLASSES: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

/// The exception class of an error.
fn class(error: &Error) -> &'static str {
    if let Error::NoSuchTensor { .. } = error {
        return "TensorNotFoundError";
    }
    match error.kind() {
        ErrorKind::Io => "ReadWriteError",
        ErrorKind::Permission => "AccessError",
        ErrorKind::Format => "FormatError",
        ErrorKind::NotFound => "NotFoundError",
        ErrorKind::Corrupt => "CorruptError",
        ErrorKind::Exists => "ExistsError",
        ErrorKind::NoSpace => "NoSpaceError",
        ErrorKind::Device => "DeviceError",
        ErrorKind::DeviceMemory => "DeviceMemoryError",
        ErrorKind::Invalid => "InvalidError",
        ErrorKind::Cancelled => "CancelledError",
        _ => "SllmError",
    }
}

/// An error that has an exception.
pub(crate) trait Raise {
    /// The exception; its message holds every cause.
    fn raise(&self, py: Python<'_>) -> PyErr;
}

impl Raise for Error {
    fn raise(&self, py: Python<'_>) -> PyErr {
        raise(py, self)
    }
}

/// The error as an exception; its message holds every cause.
pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    named(py, class(error), &error.chain())
}

/// An exception of the class `name` of `serverless_llm.errors`.
pub(crate) fn named(py: Python<'_>, name: &str, message: &str) -> PyErr {
    let make = || {
        let module = CLASSES.get_or_try_init(py, || py.import("serverless_llm.errors").map(Bound::unbind))?;
        module.bind(py).getattr(name)?.call1((message,))
    };
    match make() {
        Ok(exception) => PyErr::from_value(exception),
        Err(e) => e,
    }
}
