//! A server as a process: until a signal says stop.

use rustix::process::{Resource, getrlimit, setrlimit};
use sllm_core::{Error, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::server::Server;

/// Threads that answer requests. Loads have threads of their own.
const ANSWERING: usize = 4;
/// Threads that may block at once: opening checkpoints, loads, closing.
const BLOCKING: usize = 512;

/// Runs a server until SIGTERM or SIGINT; a second signal ends it without waiting for loads.
pub fn serve(config: Config) -> Result<()> {
    raise_descriptor_limit();
    let broken = |source| Error::Io { what: "start", path: "the server's threads".into(), source };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(ANSWERING);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(BLOCKING)
        .thread_name("sllm-server")
        .enable_all()
        .build()
        .map_err(broken)?;
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(broken)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(broken)?;
        let mut told = async move || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let pool = config.pool_len;
        let server = Server::bind(config)?;
        if let Some(free) = sllm_core::free_memory().filter(|free| pool > *free) {
            tracing::warn!(
                pool,
                free,
                "the pool may take more memory than is free here, or in this control group: lower --mem-pool-size"
            );
        }
        let addresses = server.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        // Its port may have been any that is free.
        let metrics = server.metrics_address().map(tracing::field::display);
        tracing::info!(%addresses, metrics, "listening");
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let run = server.run(async move {
            let _ = stopped.await;
        });
        tokio::pin!(run);
        tokio::select! {
            result = &mut run => return result,
            () = told() => drop(stop),
        }
        tokio::select! {
            result = &mut run => result,
            () = told() => {
                tracing::warn!("stopped by a second signal");
                Ok(())
            }
        }
    });
    // A thread that hangs in the kernel does not keep the process.
    runtime.shutdown_background();
    result
}

/// Takes all descriptors that the system allows: every client has some, and every model keeps its files open.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}
