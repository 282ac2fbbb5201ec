//! The native half of the Python package `serverless_llm`.
//!
//! It is thin: arguments come in, a call of `sllm_core` runs without the interpreter's lock (`wait`), and a report goes
//! out as JSON, which the package shows as an object. Exceptions are the classes of `serverless_llm.errors`
//! (`error`). Memory that outlives a call belongs to NumPy or torch and comes in as an address (`memory`).

mod checkpoint;
mod error;
mod load;
mod memory;
mod number;
mod server;
mod session;
mod views;
mod wait;
mod work;

/// The module `serverless_llm._native`.
#[pyo3::pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::checkpoint::{Checkpoint, Opening, TensorInfo, open};
    #[pymodule_export]
    use crate::load::{Loader, Placement, check_room, driver_failure, link_peak, select};
    #[pymodule_export]
    use crate::server::StoreClient;
    #[pymodule_export]
    use crate::session::{Session, open_files};
    #[pymodule_export]
    use crate::views::ViewsFirst;
    #[pymodule_export]
    use crate::work::{convert, dtypes, export, parse_size, prefetch, run_cli, save, verify};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
