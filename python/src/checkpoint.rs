//! An opened checkpoint, as Python sees it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList, PyTuple};
use sllm_core::{Error, OpenOptions, Result};

use crate::error::raise;
use crate::load::{Placed, placed_at};
use crate::wait::{self, Call};

/// Opens a model directory, a safetensors file, or a repository id that the Hugging Face cache holds.
#[pyfunction]
#[pyo3(signature = (path, *, revision=None))]
pub(crate) fn open(py: Python<'_>, path: PathBuf, revision: Option<String>) -> PyResult<Checkpoint> {
    let opened = wait::call(py, move || open_options(revision).open(path))?;
    Ok(Checkpoint { inner: Arc::new(opened) })
}

fn open_options(revision: Option<String>) -> OpenOptions {
    let options = OpenOptions::new();
    if let Some(revision) = revision { options.revision(revision) } else { options }
}

/// A checkpoint that a thread opens while the caller does something else.
#[pyclass(frozen, module = "serverless_llm._native")]
pub(crate) struct Opening {
    /// Until it was asked for.
    call: Mutex<Option<Call<Result<sllm_core::Checkpoint>>>>,
}

#[pymethods]
impl Opening {
    #[new]
    #[pyo3(signature = (path, *, revision=None))]
    fn new(py: Python<'_>, path: PathBuf, revision: Option<String>) -> PyResult<Opening> {
        let options = open_options(revision);
        let call = Call::start(py, move || options.open(path))?;
        Ok(Opening { call: Mutex::new(Some(call)) })
    }

    /// Waits for it; what opening raises is raised here. It is given once.
    fn checkpoint(&self, py: Python<'_>) -> PyResult<Checkpoint> {
        let call = self.call.lock().unwrap_or_else(PoisonError::into_inner).take();
        let call = call.ok_or_else(|| raise(py, &Error::Invalid("the checkpoint was given already".into())))?;
        Ok(Checkpoint { inner: Arc::new(call.wait(py)?.map_err(|e| raise(py, &e))?) })
    }
}

/// An opened checkpoint: a mapping of names to `TensorInfo`, in the order of the files.
#[pyclass(frozen, mapping, module = "serverless_llm")]
pub(crate) struct Checkpoint {
    pub(crate) inner: Arc<sllm_core::Checkpoint>,
}

impl Checkpoint {
    fn info(&self, tensor: &sllm_core::TensorInfo) -> TensorInfo {
        TensorInfo { tensor: tensor.clone(), file: self.inner.files()[tensor.file].name().to_owned() }
    }
}

#[pymethods]
impl Checkpoint {
    /// The directory or file that was opened.
    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path().to_owned()
    }

    /// `"store"`, `"safetensors"` or `"original"`.
    #[getter]
    fn layout(&self) -> &'static str {
        self.inner.layout().name()
    }

    /// A store's identity, 64 hexadecimal digits; `None` for other layouts.
    #[getter]
    fn identity(&self) -> Option<&str> {
        self.inner.identity()
    }

    /// Bytes of all tensors, tied ones counted once.
    #[getter]
    fn total_bytes(&self) -> u64 {
        self.inner.total_len()
    }

    /// The data files and their lengths in bytes.
    #[getter]
    fn files(&self) -> Vec<(String, u64)> {
        self.inner.files().iter().map(|file| (file.name().to_owned(), file.len())).collect()
    }

    /// Raises `FormatError` where the files that this store was converted from are still in their place and were changed
    /// since.
    fn check_source(&self, py: Python<'_>) -> PyResult<()> {
        let inner = Arc::clone(&self.inner);
        wait::call(py, move || inner.check_source())
    }

    /// Descriptors of the data files, valid as long as the checkpoint.
    #[getter]
    fn descriptors(&self) -> Vec<i32> {
        self.inner.files().iter().map(|file| file.as_fd().as_raw_fd()).collect()
    }

    /// Last change of each data file when it was opened, in nanoseconds since 1970.
    #[getter]
    fn modified(&self) -> Vec<i128> {
        let nanoseconds = |(seconds, rest): (i64, i64)| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        self.inner.files().iter().map(|file| nanoseconds(file.modified())).collect()
    }

    /// The tensors, each at its place in a file, which is told by its number in `files`.
    #[getter]
    fn placed<'py>(&self, py: Python<'py>) -> PyResult<Vec<Placed<'_, 'py>>> {
        self.inner.tensors().iter().map(|info| placed_at(py, info, info.file, info.offset)).collect()
    }

    /// Names of the tensors.
    #[getter]
    fn names(&self) -> Vec<&str> {
        self.inner.tensors().iter().map(|tensor| tensor.name.as_str()).collect()
    }

    /// The tensors.
    #[getter]
    fn tensors(&self) -> Vec<TensorInfo> {
        self.inner.tensors().iter().map(|tensor| self.info(tensor)).collect()
    }

    /// Names of the tensors.
    fn keys(&self) -> Vec<&str> {
        self.names()
    }

    /// The tensors.
    fn values(&self) -> Vec<TensorInfo> {
        self.tensors()
    }

    /// Names and tensors.
    fn items(&self) -> Vec<(&str, TensorInfo)> {
        self.inner.tensors().iter().map(|tensor| (tensor.name.as_str(), self.info(tensor))).collect()
    }

    /// The tensor of this name, or `default`.
    #[pyo3(signature = (name, default=None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        default: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.inner.tensor(name) {
            Ok(tensor) => Ok(Some(Bound::new(py, self.info(tensor))?.into_any())),
            Err(_) => Ok(default),
        }
    }

    fn __len__(&self) -> usize {
        self.inner.tensors().len()
    }

    fn __contains__(&self, name: &Bound<'_, PyAny>) -> bool {
        name.extract::<&str>().is_ok_and(|name| self.inner.position(name).is_some())
    }

    fn __getitem__(&self, py: Python<'_>, name: &str) -> PyResult<TensorInfo> {
        self.inner.tensor(name).map(|tensor| self.info(tensor)).map_err(|e| raise(py, &e))
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, self.names())?.try_iter()
    }

    fn __repr__(&self) -> String {
        let (tensors, bytes) = (self.inner.tensors().len(), self.inner.total_len());
        format!("<Checkpoint {:?}: {}, {tensors} tensors, {bytes} bytes>", self.inner.path(), self.layout())
    }
}

/// One tensor of a checkpoint, and the place of its bytes.
#[pyclass(frozen, eq, module = "serverless_llm")]
#[derive(Clone, PartialEq)]
pub(crate) struct TensorInfo {
    tensor: sllm_core::TensorInfo,
    file: String,
}

#[pymethods]
impl TensorInfo {
    /// Its name.
    #[getter]
    fn name(&self) -> &str {
        &self.tensor.name
    }

    /// Its dtype by safetensors' name, such as `"BF16"`.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.tensor.dtype.name()
    }

    /// Its dimensions.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &*self.tensor.shape)
    }

    /// Strides in elements, or `None` where the elements are contiguous.
    #[getter]
    fn strides<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        self.tensor.strides.as_deref().map(|strides| PyTuple::new(py, &**strides)).transpose()
    }

    /// Its bytes in the file.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.tensor.len
    }

    /// Name of its file.
    #[getter]
    fn file(&self) -> &str {
        &self.file
    }

    /// Its first byte in that file.
    #[getter]
    fn offset(&self) -> u64 {
        self.tensor.offset
    }

    /// Of its name and place: equal ones have the same.
    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.name(), self.file(), self.offset()).hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self) -> String {
        let sllm_core::TensorInfo { name, dtype, shape, len, offset, .. } = &self.tensor;
        format!("<TensorInfo {name:?}: {dtype} {shape:?}, {len} bytes at {offset} of {}>", self.file)
    }
}
