//! The `sllm-store` command. All of it is in the library, which the Python package calls too.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(sllm_cli::run(std::env::args_os()))
}
