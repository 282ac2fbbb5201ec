//! The store server's client.

use std::time::Duration;

use pyo3::prelude::*;
use sllm_client::{ClientOptions, Error, RemoteOptions, Result, StoreRemote, find_address};
use sllm_core::LoaderBuilder;

use crate::error::{Raise, raise};
use crate::wait;
use crate::work::json;

/// A connection to a store server.
#[pyclass(frozen, module = "serverless_llm._native")]
pub(crate) struct StoreClient {
    inner: sllm_client::StoreClient,
}

impl StoreClient {
    fn call<T: Send + 'static>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&sllm_client::StoreClient) -> Result<T> + Send + 'static,
    ) -> PyResult<T> {
        let client = self.inner.clone();
        wait::call(py, move || call(&client))
    }
}

#[pymethods]
impl StoreClient {
    /// Connects; a short call may take `timeout` seconds.
    #[new]
    #[pyo3(signature = (address, *, token, timeout))]
    fn new(py: Python<'_>, address: Option<String>, token: Option<String>, timeout: f64) -> PyResult<StoreClient> {
        let limit = Duration::try_from_secs_f64(timeout).ok().filter(|limit| !limit.is_zero());
        let wrong = || sllm_core::Error::Invalid(format!("a timeout of {timeout} s cannot be waited for"));
        let limit = limit.ok_or_else(|| raise(py, &wrong()))?;
        let options = ClientOptions::new().address(address).token(token).call_limit(limit);
        let inner = wait::call(py, move || sllm_client::StoreClient::connect(&options))?;
        Ok(StoreClient { inner })
    }

    /// The server's address.
    #[getter]
    fn address(&self) -> String {
        self.inner.address().to_string()
    }

    /// Whether the server says that it serves.
    fn health(&self, py: Python<'_>) -> PyResult<bool> {
        self.call(py, |client| client.health())
    }

    /// The models that the server knows of, as JSON.
    fn list(&self, py: Python<'_>) -> PyResult<String> {
        json(py, &self.call(py, |client| client.list())?)
    }

    /// What the server does, as JSON.
    fn status(&self, py: Python<'_>) -> PyResult<String> {
        json(py, &self.call(py, |client| client.status())?)
    }

    /// Reads a model into the server's memory, and waits; its bytes.
    #[pyo3(signature = (model, *, pin, progress))]
    fn preload(&self, py: Python<'_>, model: &str, pin: bool, progress: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        wait::run(py, progress, |control| self.inner.preload(model, pin, &control).map(|progress| progress.total))
    }

    /// Keeps a model in the server's memory; its state as JSON.
    fn pin(&self, py: Python<'_>, model: String) -> PyResult<String> {
        json(py, &self.call(py, move |client| client.pin(&model))?)
    }

    /// Lets a model go when its room is wanted; its state as JSON.
    fn unpin(&self, py: Python<'_>, model: String) -> PyResult<String> {
        json(py, &self.call(py, move |client| client.unpin(&model))?)
    }

    /// Drops a model, or all of them, from the server's memory; how many bytes that were.
    #[pyo3(signature = (model))]
    fn evict(&self, py: Python<'_>, model: Option<String>) -> PyResult<u64> {
        self.call(py, move |client| model.map_or_else(|| client.evict_all(), |model| client.evict(&model)))
    }
}

/// A loader that asks a server first: the one at an address, or with `auto` the one that the environment names or that
/// listens at a default socket, if any, with this token, or that of the environment. Where the server fails, the loader reads
/// files, and its report notes why.
pub(crate) fn asked(
    builder: LoaderBuilder,
    server: Option<&str>,
    token: Option<String>,
) -> sllm_core::Result<LoaderBuilder> {
    let address = match server {
        None => return Ok(builder),
        Some("auto") => match find_address(None) {
            Err(Error::NotThere { .. }) => return Ok(builder),
            found => found?,
        },
        Some(text) => find_address(Some(text))?,
    };
    let options = ClientOptions::new().address(address.to_string()).token(token);
    Ok(builder.remote(Box::new(StoreRemote::at(options, RemoteOptions::new()))))
}

impl Raise for Error {
    fn raise(&self, py: Python<'_>) -> PyErr {
        use sllm_client::Refusal;
        let class = match self {
            Error::Core(error) => return raise(py, error),
            Error::Cancelled => "CancelledError",
            Error::Address { .. } | Error::Token | Error::MemoryOverTcp { .. } => "InvalidError",
            Error::Refused { refusal, .. } => match refusal {
                Refusal::NotFound => "NotFoundError",
                Refusal::Invalid | Refusal::OtherFiles => "InvalidError",
                Refusal::Denied => "AccessError",
                Refusal::Corrupt => "CorruptError",
                _ => "StoreServerError",
            },
            _ => "StoreServerError",
        };
        crate::error::named(py, class, &self.chain())
    }
}
