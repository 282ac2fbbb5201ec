//! The operations that move no bytes to a device. Each gives its report as JSON.

use std::ffi::OsString;
use std::path::PathBuf;

use pyo3::prelude::*;
use serde::Serialize;
use sllm_core::{ConvertOptions, Dtype, Error, MemoryTensor, PrefetchOptions, WorkOptions};

use crate::checkpoint::Checkpoint;
use crate::error::named;
use crate::memory::HostBytes;
use crate::number::{bytes_of, threads_of};
use crate::wait;

/// A tensor in host memory: name, torch's dtype name, shape, address, bytes.
type Saved = (String, String, Vec<u64>, u64, u64);

pub(crate) fn json(py: Python<'_>, report: &impl Serialize) -> PyResult<String> {
    serde_json::to_string(report).map_err(|e| named(py, "SllmError", &e.to_string()))
}

/// Every dtype: safetensors' name, torch's name, bits an element.
#[pyfunction]
pub(crate) fn dtypes() -> Vec<(&'static str, &'static str, u64)> {
    Dtype::all().map(|dtype| (dtype.name(), dtype.torch_name(), dtype.bits())).collect()
}

/// Bytes of a size such as `4GiB`.
#[pyfunction]
pub(crate) fn parse_size(py: Python<'_>, text: &str) -> PyResult<u64> {
    sllm_core::parse_size(text).map_err(|e| crate::error::raise(py, &e))
}

/// Runs the `sllm-store` command and gives its exit code. The first argument is the program's name.
#[pyfunction]
pub(crate) fn run_cli(py: Python<'_>, args: Vec<OsString>) -> u8 {
    py.detach(|| sllm_cli::run(args))
}

/// Converts a checkpoint to a store.
#[pyfunction]
#[pyo3(signature = (source, target, *, overwrite, threads, progress))]
pub(crate) fn convert(
    py: Python<'_>,
    source: &Checkpoint,
    target: PathBuf,
    overwrite: bool,
    #[pyo3(from_py_with = threads_of)] threads: Option<usize>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<String> {
    let source = &source.inner;
    let report = wait::run(py, progress, |control| {
        let options = ConvertOptions::new().overwrite(overwrite).threads(threads).control(control);
        sllm_core::convert(source, &target, &options)
    })?;
    json(py, &report)
}

/// Saves tensors in host memory as a store. The caller keeps them alive and unchanged until it returns.
#[pyfunction]
#[pyo3(signature = (tensors, target, *, overwrite, threads, progress))]
pub(crate) fn save(
    py: Python<'_>,
    tensors: Vec<Saved>,
    target: PathBuf,
    overwrite: bool,
    #[pyo3(from_py_with = threads_of)] threads: Option<usize>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<String> {
    let report = wait::run(py, progress, |control| {
        let mut memory = Vec::with_capacity(tensors.len());
        for (name, dtype, shape, address, len) in &tensors {
            let dtype = Dtype::from_torch_name(dtype)
                .ok_or_else(|| Error::Invalid(format!("tensor {name:?}: {dtype} cannot be stored")))?;
            let bytes = HostBytes::new(*address, *len)?;
            // SAFETY: `serverless_llm.save_dict` holds the arrays for as long as this call runs, and its documentation
            // says that they must not be changed meanwhile.
            let bytes = unsafe { bytes.as_slice() };
            memory.push(MemoryTensor { name, dtype, shape, strides: None, bytes });
        }
        let options = ConvertOptions::new().overwrite(overwrite).threads(threads).control(control);
        sllm_core::save(&memory, &target, &options)
    })?;
    json(py, &report)
}

/// Compares every chunk of a store with its checksum.
#[pyfunction]
#[pyo3(signature = (store, *, threads, progress))]
pub(crate) fn verify(
    py: Python<'_>,
    store: &Checkpoint,
    #[pyo3(from_py_with = threads_of)] threads: Option<usize>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<String> {
    let store = &store.inner;
    let report = wait::run(py, progress, |control| {
        let options = WorkOptions::new().threads(threads).control(control);
        sllm_core::verify(store, &options)
    })?;
    json(py, &report)
}

/// Writes a checkpoint as safetensors files.
#[pyfunction]
#[pyo3(signature = (store, target, *, threads, progress))]
pub(crate) fn export(
    py: Python<'_>,
    store: &Checkpoint,
    target: PathBuf,
    #[pyo3(from_py_with = threads_of)] threads: Option<usize>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<String> {
    let store = &store.inner;
    let report = wait::run(py, progress, |control| {
        let options = WorkOptions::new().threads(threads).control(control);
        sllm_core::export(store, &target, &options)
    })?;
    json(py, &report)
}

/// Reads a checkpoint into the page cache.
#[pyfunction]
#[pyo3(signature = (checkpoint, *, limit, yields, progress))]
pub(crate) fn prefetch(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    #[pyo3(from_py_with = bytes_of)] limit: Option<u64>,
    yields: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<String> {
    let checkpoint = &checkpoint.inner;
    let report = wait::run(py, progress, |control| {
        let options = PrefetchOptions::new().limit(limit).yields(yields).control(control);
        sllm_core::prefetch(checkpoint, &options)
    })?;
    json(py, &report)
}
