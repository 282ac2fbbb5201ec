//! Numbers that callers give: one that cannot be is an argument that makes no sense, whatever the number's size.

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use crate::error::named;

/// A number of bytes, or None.
pub(crate) fn bytes_of(value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    value.extract().map_err(|e: PyErr| refused(value, "bytes", e))
}

/// A number of threads, or None.
pub(crate) fn threads_of(value: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    value.extract().map_err(|e: PyErr| refused(value, "threads", e))
}

fn refused(value: &Bound<'_, PyAny>, what: &str, error: PyErr) -> PyErr {
    let py = value.py();
    if error.is_instance_of::<PyOverflowError>(py) {
        named(py, "InvalidError", &format!("{value} is no number of {what}"))
    } else {
        error
    }
}
