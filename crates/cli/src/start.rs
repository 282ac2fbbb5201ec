//! `sllm-store start`.

use std::path::PathBuf;

use sllm_core::Result;
use sllm_server::{Settings, Size, TOKEN_VARIABLE, log_to_stderr, serve};

use crate::args::StartArgs;
use crate::output::Answer;

pub(crate) fn run(args: &StartArgs) -> Result<Answer> {
    let file = args.config.as_deref().map(Settings::from_file).transpose()?.unwrap_or_default();
    // A secret has no place in a command line, which all users of a machine can read.
    let token = std::env::var(TOKEN_VARIABLE).ok().filter(|token| !token.is_empty());
    let config = settings(args).or(file).resolve(token)?;
    let _log = log_to_stderr(args.log_format)?;
    if args.disk_size.is_some() {
        tracing::info!("--disk-size is not used: models stay where they are");
    }
    serve(config)?;
    Ok(Answer { body: String::new(), fault: None })
}

/// Goes before a file, as flags do; empty is not given.
fn path_of_environment() -> Option<PathBuf> {
    std::env::var_os("STORAGE_PATH").filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn settings(args: &StartArgs) -> Settings {
    Settings {
        storage_path: args.storage_path.clone().or_else(path_of_environment),
        mem_pool_size: args.mem_pool_size.map(Size),
        chunk_size: args.chunk_size.map(Size),
        num_thread: args.num_thread,
        registration_required: args.registration_required,
        host: args.host.clone(),
        port: args.port,
        listen: args.listen.clone(),
        metrics_listen: args.metrics_listen.clone(),
        preload: args.preload.clone(),
        pin: args.pin.clone(),
        ttl: args.ttl,
        quota: args.quota.clone(),
        verify: args.verify(),
        max_loads: args.max_loads,
        drain_seconds: args.drain_seconds,
        gpu_idle_seconds: args.gpu_idle_seconds,
        token_file: args.token_file.clone(),
    }
}
