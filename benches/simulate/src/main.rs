//! Predicts the seconds of a load on hosts that are not at hand: a discrete-event simulation of the pipeline.
//!
//! The plan is the code's own ([`LoadPlan`](sllm_core::LoadPlan) over a sparse file with the model's header), and so
//! are the sizes of pieces, lanes and buffers. A [`Host`](host::Host) is rates that were each measured alone: what a
//! thread reads, what the link moves, what the disk gives. Lanes take pieces, wait for buffers, read, verify and issue
//! copies in the order that the engines do ([`pipeline`]).
//!
//! ```text
//! cargo run --release -p sllm-simulate                      the table of docs/benchmarks.md
//! cargo run --release -p sllm-simulate -- OUT.json          a peers' run: its limits against its own figures
//! ```

mod host;
mod model;
mod outbox;
mod peers;
mod pipeline;
mod resource;
mod table;
mod way;

use std::process::ExitCode;

fn run(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    match args {
        [] => table::markdown(),
        [path] if !path.starts_with('-') => peers::markdown(path.as_ref()),
        _ => Err("usage: sllm-simulate [OUT.json]".into()),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(table) => {
            print!("{table}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}
