//! Loads into memory that Python objects own.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use sllm_core::{
    Block, Control, Device, DeviceError, Dtype, EngineChoice, Filter, LoaderBuilder, TensorName, free_memory,
};

use crate::checkpoint::Checkpoint;
use crate::error::raise;
use crate::memory::HostBytes;
use crate::number::{bytes_of, threads_of};
use crate::server;
use crate::wait;
use crate::work::json;

/// Places, in the order of the files, of the tensors that names or globs want; of all without any.
#[pyfunction]
#[pyo3(signature = (checkpoint, globs))]
pub(crate) fn select(py: Python<'_>, checkpoint: &Checkpoint, globs: Option<Vec<String>>) -> PyResult<Vec<usize>> {
    let filter = match globs {
        Some(globs) => Filter::globs(globs),
        None => Ok(Filter::all()),
    };
    filter.and_then(|filter| filter.select(&checkpoint.inner)).map_err(|e| raise(py, &e))
}

/// Blocks of memory, and the place of every wanted tensor in them.
#[pyclass(frozen, module = "serverless_llm._native")]
pub(crate) struct Placement {
    checkpoint: Arc<sllm_core::Checkpoint>,
    pub(crate) inner: sllm_core::Placement,
    /// The first tensor of each dtype.
    dtypes: Vec<(TensorName, Dtype)>,
}

#[pymethods]
impl Placement {
    /// Places the selected tensors, `None` for all; each goes to the device whose number stands at its place in `devices`,
    /// to the first one without it.
    #[new]
    #[pyo3(signature = (checkpoint, selected, devices=None))]
    fn new(
        py: Python<'_>,
        checkpoint: &Checkpoint,
        selected: Option<Vec<usize>>,
        devices: Option<Vec<usize>>,
    ) -> PyResult<Self> {
        let checkpoint = Arc::clone(&checkpoint.inner);
        let mut devices = devices.map(Vec::into_iter);
        let mut dtypes = Vec::new();
        let device_of = |tensor: &sllm_core::TensorInfo| {
            if !dtypes.iter().any(|(_, dtype)| *dtype == tensor.dtype) {
                dtypes.push((tensor.name.clone(), tensor.dtype));
            }
            devices.as_mut().map_or(0, |devices| devices.next().unwrap_or(usize::MAX))
        };
        let placed = match selected {
            Some(selected) => sllm_core::Placement::new(&checkpoint, selected, device_of),
            None => sllm_core::Placement::new(&checkpoint, 0..checkpoint.tensors().len(), device_of),
        };
        let inner = placed.map_err(|e| raise(py, &e))?;
        Ok(Placement { checkpoint, inner, dtypes })
    }

    /// Device number and bytes of each block.
    #[getter]
    fn blocks(&self) -> Vec<(usize, u64)> {
        self.inner.blocks.iter().map(|block| (block.device, block.len)).collect()
    }

    /// The name of the first tensor of each dtype, and the dtype.
    #[getter]
    fn dtypes(&self) -> Vec<(&str, &'static str)> {
        self.dtypes.iter().map(|(name, dtype)| (name.as_str(), dtype.name())).collect()
    }

    /// The tensors, each at its place in a block.
    #[getter]
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Vec<Placed<'_, 'py>>> {
        let row = |placed: &sllm_core::Placed| {
            placed_at(py, &self.checkpoint.tensors()[placed.tensor], placed.block, placed.offset)
        };
        self.inner.tensors.iter().map(row).collect()
    }
}

/// A tensor's name, dtype, shape, strides, bytes, block (or file), and first byte in it.
pub(crate) type Placed<'a, 'py> =
    (&'a str, &'static str, Bound<'py, PyTuple>, Option<Bound<'py, PyTuple>>, u64, usize, u64);

pub(crate) fn placed_at<'a, 'py>(
    py: Python<'py>,
    info: &'a sllm_core::TensorInfo,
    block: usize,
    offset: u64,
) -> PyResult<Placed<'a, 'py>> {
    let strides = info.strides.as_deref().map(|strides| PyTuple::new(py, &**strides)).transpose()?;
    Ok((&info.name, info.dtype.name(), PyTuple::new(py, &*info.shape)?, strides, info.len, block, offset))
}

/// Loads to these devices by these settings.
#[pyclass(frozen, module = "serverless_llm._native")]
pub(crate) struct Loader {
    pub(crate) devices: Vec<Device>,
    builder: LoaderBuilder,
}

impl Loader {
    pub(crate) fn with(&self, control: Control) -> sllm_core::Result<sllm_core::Loader> {
        self.builder.clone().control(control).build()
    }
}

#[pymethods]
impl Loader {
    #[new]
    #[pyo3(signature = (devices, *, engine, direct, verify, threads, pinned_bytes, server=None, token=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        devices: Vec<String>,
        engine: &str,
        direct: Option<bool>,
        verify: bool,
        #[pyo3(from_py_with = threads_of)] threads: Option<usize>,
        #[pyo3(from_py_with = bytes_of)] pinned_bytes: Option<u64>,
        server: Option<&str>,
        token: Option<String>,
    ) -> PyResult<Loader> {
        let build = || {
            let devices = devices.iter().map(|id| Device::parse(id)).collect::<sllm_core::Result<Vec<_>>>()?;
            let builder = server::asked(sllm_core::Loader::builder(), server, token)?
                .devices(devices.clone())
                .engine(engine.parse::<EngineChoice>()?)
                .direct(direct)
                .verify(verify)
                .threads(threads)
                .pinned_bytes(pinned_bytes);
            builder.clone().build()?;
            Ok(Loader { devices, builder })
        };
        py.detach(build).map_err(|e| raise(py, &e))
    }

    /// Begins to pin what the next load of the checkpoint is staged by, while the caller allocates what it loads to.
    fn prepare(&self, py: Python<'_>, checkpoint: &Checkpoint) -> PyResult<()> {
        let prepare = || self.with(Control::new()).map(|loader| loader.prepare(&checkpoint.inner));
        py.detach(prepare).map_err(|e| raise(py, &e))
    }

    /// Fills the blocks of a placement, which lie at `addresses`, and gives the report as JSON and as text.
    ///
    /// `alloc_s` is the time that allocating them took, for the report. The caller keeps every block allocated, and does not
    /// touch it, until this returns. The iterator `meanwhile` is taken to its end in this
    /// thread while the bytes move; what a step raises stops the load.
    #[pyo3(signature = (placement, addresses, *, alloc_s, progress, meanwhile=None))]
    fn fill(
        &self,
        py: Python<'_>,
        placement: &Placement,
        addresses: Vec<u64>,
        alloc_s: f64,
        progress: Option<&Bound<'_, PyAny>>,
        meanwhile: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(String, String)> {
        let mut report = wait::run_beside(py, progress, meanwhile, |control| {
            let invalid = |what: &str| sllm_core::Error::Invalid(what.into());
            if addresses.len() != placement.inner.blocks.len() {
                return Err(invalid("there is not one address a block"));
            }
            let mut blocks = Vec::with_capacity(addresses.len());
            for (spec, &address) in placement.inner.blocks.iter().zip(&addresses) {
                let device = self.devices.get(spec.device);
                let device = device.ok_or_else(|| invalid("a block names a device that is not given"))?;
                HostBytes::new(address, spec.len)?;
                // SAFETY: `serverless_llm.loading` allocated as many bytes there, on that device, waited for what was queued
                // on them, and holds them until this call returns.
                blocks.push(unsafe { Block::from_raw(device, address, spec.len) });
            }
            self.with(control)?.fill(&placement.checkpoint, &placement.inner, blocks)
        })?;
        report.add_alloc(alloc_s);
        Ok((json(py, &report)?, report.to_string()))
    }
}

/// Raises where the system, or the limit of the control group, leaves fewer bytes of the host's memory: who takes more is
/// killed when it is filled.
#[pyfunction]
pub(crate) fn check_room(py: Python<'_>, nbytes: u64) -> PyResult<()> {
    match free_memory().filter(|&free| nbytes > free) {
        Some(free) => {
            Err(raise(py, &DeviceError::OutOfMemory { device: Device::host().id(), need: nbytes, free }.into()))
        }
        None => Ok(()),
    }
}

/// What a CUDA driver that is there and fails says; None where there is none, or no device, or all is well.
#[pyfunction]
pub(crate) fn driver_failure(py: Python<'_>) -> Option<String> {
    py.detach(Device::try_cuda_count).err().map(|e| e.chain())
}

/// The peak of a device's link in GB/s, and the day on which it was measured; None for the host. It is measured where it
/// is not known, or where `seen`, what a load reached, is more.
#[pyfunction]
pub(crate) fn link_peak(py: Python<'_>, device: &str, seen: f64) -> PyResult<Option<(f64, String)>> {
    let peak = py.detach(|| Device::parse(device).and_then(|device| device.link_peak(seen)));
    Ok(peak.map_err(|e| raise(py, &e))?.map(|peak| (peak.gb_per_s, peak.date())))
}
