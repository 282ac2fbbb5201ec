//! How soon a large pool of pinned buffers is there: `pool [GIB] [THREADS] [DEVICE] [STEP_MIB]`, by default 32, 8,
//! `cuda:0` and 64. A step is touched and pinned at a time: threads share the steps, and the first buffer waits for one.
//!
//! Prints the seconds to the first buffer, to all of them, and to the release. On the host device nothing is pinned.

use std::process::ExitCode;
use std::time::Instant;

use sllm_core::{BufferPool, Device, Error, Result};

/// Bytes of one buffer: a chunk of a store.
const BUFFER_LEN: usize = 4 << 20;

fn number(arg: Option<&String>, default: usize) -> Result<usize> {
    arg.map_or(Ok(default), |arg| arg.parse().map_err(|_| Error::Invalid(format!("{arg:?} is not a number"))))
}

fn run(args: &[String]) -> Result<()> {
    let (gib, threads) = (number(args.first(), 32)?, number(args.get(1), 8)?);
    let device = Device::parse(args.get(2).map_or("cuda:0", String::as_str))?;
    let step_len = number(args.get(3), 64)?.saturating_mul(1 << 20);
    let too_large = || Error::Invalid(format!("{gib} GiB do not fit the address space"));
    let buffers = gib.checked_mul((1 << 30) / BUFFER_LEN).ok_or_else(too_large)?;

    let started = Instant::now();
    let pool = BufferPool::new(BUFFER_LEN, buffers, step_len, Some(&device))?;
    let (first_s, all_s) = std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let buffer = pool.try_acquire();
            buffer.map(|_| started.elapsed().as_secs_f64())
        });
        pool.prepare_all(threads);
        let all = started.elapsed().as_secs_f64();
        (first.join().ok().flatten(), all)
    });
    let pinned = pool.pinned_len() as f64 / (1u64 << 30) as f64;
    if let Some(refusal) = pool.refusal() {
        println!("not all of it is pinned: {refusal}");
    }
    let releasing = Instant::now();
    drop(pool);
    let released_s = releasing.elapsed().as_secs_f64();
    let first_s = first_s.ok_or_else(|| Error::Invalid("no buffer came".into()))?;
    println!(
        "{gib} GiB for {}, {pinned:.1} GiB pinned, {threads} threads: first buffer {:.1} ms, all {all_s:.3} s \
         ({:.1} GiB/s), released in {released_s:.3} s",
        device.id(),
        first_s * 1e3,
        gib as f64 / all_s
    );
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", e.chain());
            ExitCode::FAILURE
        }
    }
}
