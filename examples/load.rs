//! Loads a checkpoint to a device and prints the report: `cargo run --example load -- MODEL [DEVICE]`.

use std::process::ExitCode;

use sllm_core::{Checkpoint, Device, Loader, Result};

fn run(model: &str, device: &str) -> Result<()> {
    let loader = Loader::builder().device(Device::parse(device)?).build()?;
    let loaded = loader.load(&Checkpoint::open(model)?)?;
    print!("{}", loaded.report());
    for tensor in loaded.tensors().take(5) {
        println!("{:#x}  {} {:?}  {}", tensor.addr(), tensor.info().dtype, tensor.info().shape, tensor.info().name);
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(model) = args.first() else {
        eprintln!("usage: load MODEL [DEVICE]");
        return ExitCode::from(2);
    };
    match run(model, args.get(1).map_or("auto", String::as_str)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", e.chain());
            ExitCode::FAILURE
        }
    }
}
