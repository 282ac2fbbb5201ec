//! Loads that grow while an engine asks for tensor after tensor.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use sllm_core::{Block, Control, Device, Error, Result, Strided};

use crate::checkpoint::Checkpoint;
use crate::error::raise;
use crate::load::{Loader, Placement};
use crate::memory::HostBytes;
use crate::wait;
use crate::work::json;

/// Opens safetensors files that the caller chose, found below `root`.
#[pyfunction]
pub(crate) fn open_files(py: Python<'_>, root: PathBuf, files: Vec<PathBuf>) -> PyResult<Checkpoint> {
    let opened = wait::call(py, move || sllm_core::Checkpoint::open_files(root, &files))?;
    Ok(Checkpoint { inner: Arc::new(opened) })
}

/// A load to which copies are added while it runs.
#[pyclass(frozen, module = "serverless_llm._native")]
pub(crate) struct Session {
    loader: Py<Loader>,
    /// Taken when it is finished or closed.
    inner: Mutex<Option<Inner>>,
}

struct Inner {
    session: Arc<sllm_core::Session>,
    /// Destinations by device and address.
    blocks: HashMap<(usize, u64), Block>,
}

impl Inner {
    fn block(&mut self, devices: &[Device], number: usize, addr: u64, len: u64) -> Result<&Block> {
        let device =
            devices.get(number).ok_or_else(|| Error::Invalid(format!("there is no device number {number}")))?;
        HostBytes::new(addr, len)?;
        // SAFETY: as `Session.copy` demands, the memory stays allocated until the copy has arrived or the session is closed.
        let make = || unsafe { Block::from_raw(device, addr, len) };
        let block = self.blocks.entry((number, addr)).or_insert_with(make);
        if block.len() != len {
            *block = make();
        }
        Ok(block)
    }
}

impl Session {
    fn with<T>(&self, call: impl FnOnce(&mut Inner) -> Result<T>) -> Result<T> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        call(inner.as_mut().ok_or_else(|| Error::Invalid("the session is closed".into()))?)
    }
}

#[pymethods]
impl Session {
    #[new]
    fn new(py: Python<'_>, checkpoint: &Checkpoint, loader: Py<Loader>) -> PyResult<Session> {
        let start = || loader.get().with(Control::new())?.session(Arc::clone(&checkpoint.inner));
        let session = Arc::new(py.detach(start).map_err(|e| raise(py, &e))?);
        Ok(Session { loader, inner: Mutex::new(Some(Inner { session, blocks: HashMap::new() })) })
    }

    /// Adds an elementwise copy of a strided view of file bytes to a view of the same shape in memory that begins at
    /// `base` of a device; `offset` and `dst_offset` are in bytes, strides in elements.
    ///
    /// False where it is no copy of rows that are worth moving so: then nothing was added. The caller keeps the
    /// memory allocated, and does not use it, until `wait` or `close` returns.
    #[allow(clippy::too_many_arguments)]
    fn copy(
        &self,
        py: Python<'_>,
        file: usize,
        offset: u64,
        item_len: u64,
        shape: Vec<u64>,
        src_strides: Vec<u64>,
        dst_strides: Vec<u64>,
        device: usize,
        base: u64,
        len: u64,
        dst_offset: u64,
    ) -> PyResult<bool> {
        let (shape, src_strides, dst_strides) = (&shape, &src_strides, &dst_strides);
        let strided = Strided { file, offset, dst_offset, item_len, shape, src_strides, dst_strides };
        let Some(segments) = strided.segments() else { return Ok(false) };
        let added = self.with(|inner| {
            let block = inner.block(&self.loader.get().devices, device, base, len)?.clone();
            inner.session.add(&block, segments)
        });
        added.map(|()| true).map_err(|e| raise(py, &e))
    }

    /// Adds a placement's copies; its blocks lie at `addresses` of the first device. The caller's duty is as in `copy`.
    fn place(&self, py: Python<'_>, placement: &Placement, addresses: Vec<u64>) -> PyResult<()> {
        let placed = &placement.inner;
        let add = |inner: &mut Inner| {
            if addresses.len() != placed.blocks.len() {
                return Err(Error::Invalid("there is not one address a block".into()));
            }
            for (number, (spec, &address)) in placed.blocks.iter().zip(&addresses).enumerate() {
                let block = inner.block(&self.loader.get().devices, 0, address, spec.len)?.clone();
                inner.session.add(&block, placed.segments.iter().filter(|s| s.block == number).copied())?;
            }
            Ok(())
        };
        self.with(add).map_err(|e| raise(py, &e))
    }

    /// Waits until all that was added has arrived, or for so many seconds; whether it has arrived.
    fn wait(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let limit = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        let session = self.with(|inner| Ok(Arc::clone(&inner.session))).map_err(|e| raise(py, &e))?;
        let arrived = py.detach(|| session.wait_for(limit)).map_err(|e| raise(py, &e))?;
        if arrived {
            // Their memory may be another's from now on.
            let forget = |inner: &mut Inner| {
                inner.blocks.clear();
                Ok(())
            };
            self.with(forget).map_err(|e| raise(py, &e))?;
        }
        Ok(arrived)
    }

    /// Bytes read so far.
    fn read_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(|inner| Ok(inner.session.read_len())).map_err(|e| raise(py, &e))
    }

    /// Gives the report of what has arrived as JSON and as text, None where nothing was added, and closes the session.
    fn finish(&self, py: Python<'_>) -> PyResult<Option<(String, String)>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Only `wait` in another thread could hold another reference.
        let session = inner.and_then(|inner| Arc::into_inner(inner.session));
        let session = session.ok_or_else(|| raise(py, &Error::Invalid("the session is closed, or in use".into())))?;
        let report = py.detach(|| session.finish()).map_err(|e| raise(py, &e))?;
        report.map(|report| Ok((json(py, &report)?, report.to_string()))).transpose()
    }

    /// Stops the session: nothing is written after this, if no other thread is in `wait`.
    fn close(&self, py: Python<'_>) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(inner));
    }
}
