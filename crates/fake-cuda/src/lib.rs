//! A test double of the NVIDIA driver: `libcuda.so.1` over host memory.
//!
//! It lets code that speaks to the driver run where there is no GPU, and makes the usual mistakes visible:
//!
//! - An asynchronous copy is late. It reads its source some hundred microseconds after the call, so that a host
//!   buffer reused before its event is done gives wrong bytes.
//! - Every address is checked: a copy must lie in one allocation and in one registered range.
//! - Device memory is limited, and fresh memory is filled with [`POISON`].
//! - Any call can be made to fail, and the device can be lost after some copies.
//!
//! The crate is built twice. The `cdylib` is the driver itself. The `rlib` holds [`Driver`], by which a test loads
//! the `cdylib` and sets it up:
//!
//! ```no_run
//! let driver = cuda::Driver::load();
//! driver.fail("cuMemAlloc_v2", 1, 2);
//! // ... code under test ...
//! assert_eq!(driver.count("cuMemAlloc_v2"), 1);
//! ```
//!
//! # How a program finds it
//!
//! cudarc asks the loader for `libcuda.so` first and for `libcuda.so.1` last. The file is `target/<profile>/deps/
//! libcuda.so` and carries the name `libcuda.so.1`, so that both lead to it: the first when its folder is on
//! `LD_LIBRARY_PATH`, the second once [`Driver::load`] has run. `cargo test` puts that folder on the path: there every
//! program finds the double, even one that does not load it, and even where a real driver is installed. A test that
//! wants the real driver runs its binary without cargo.
//!
//! cudarc looks a function up at its first call and panics if it is missing.
//!
//! # Environment
//!
//! Read at the first `cuInit`, unless a [`Driver`] was loaded before.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `FAKE_CUDA_DEVICES` | devices; 0 makes `cuInit` return `CUDA_ERROR_NO_DEVICE` | 1 |
//! | `FAKE_CUDA_MEMORY` | bytes of each device | 1 GiB |
//! | `FAKE_CUDA_DELAY_US` | microseconds from a call to its copy | 300 |
//! | `FAKE_CUDA_BANDWIDTH` | bytes per second of a device in each direction, 0 = no limit | 0 |
//! | `FAKE_CUDA_FAIL` | `symbol:nth[:code]`, comma separated: the nth call fails once, code 999 if none is given | |
//! | `FAKE_CUDA_LOST_AFTER` | copies that succeed before the device is lost | never |
//! | `FAKE_CUDA_REGISTER_LIMIT` | bytes of the largest registration, larger ones get `CUDA_ERROR_INVALID_VALUE` | 1 GiB |
//! | `FAKE_CUDA_REGISTERED_TOTAL` | bytes registered at once, more gets `CUDA_ERROR_OUT_OF_MEMORY` | no limit |
//! | `FAKE_CUDA_NO_IPC` | not 0: memory cannot be exported, as with torch's expandable segments | 0 |
//! | `FAKE_CUDA_REPORT` | a JSON file written at exit; `%p` stands for the process id | |
//!
//! # A lost device
//!
//! Copies of all devices count, fills do not. The copy that loses its device is accepted; the loss shows when it would
//! have run. From then on every call that needs the device returns `CUDA_ERROR_ECC_UNCORRECTABLE` (214). Calls that free things still free them.
//!
//! # Other processes
//!
//! A handle of `cuIpcGetMemHandle` opens the same bytes in another process of the same user, by the exporter's
//! `/proc/PID/fd`. Nothing is left when an exporter is killed; its handles then give `CUDA_ERROR_MAP_FAILED`, as do those
//! of memory that was freed. What was opened before stays valid, and counts against the exporter's device only. A device
//! has the same UUID in all processes. Each exported allocation costs a file descriptor.
//!
//! Memory is made where memory of its length was freed last. It has the handle of what was there, so that only
//! `CU_POINTER_ATTRIBUTE_BUFFER_ID` tells the two; and a process that has the old one open gets the old one again when it
//! opens that handle.
//!
//! # What it does not do
//!
//! No kernels, modules, graphs, memory pools, arrays or handles of events: those symbols are absent. A handle opens on the
//! device of its memory only, not on a peer. Memory of a device is limited in each process for itself.

mod api;
mod codes;
mod control;
mod engine;
mod handle;
mod mapping;
mod report;
mod settings;
mod share;
mod state;

pub use handle::Driver;
pub use state::POISON;
