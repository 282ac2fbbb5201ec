//! `sllm-store load`.

use std::path::Path;

use serde::Serialize;
use sllm_client::{RemoteOptions, StoreRemote, find_address};
use sllm_core::{Device, EngineChoice, Error, LoadReport, Loader, LoaderBuilder, Result};

use crate::args::LoadArgs;
use crate::client;
use crate::output::{Answer, Fault, Session, printable_lines};

/// One load's report, with the rate that people compare.
#[derive(Serialize)]
struct Run {
    #[serde(flatten)]
    report: LoadReport,
    gb_per_s: f64,
}

/// All loads.
#[derive(Serialize)]
struct Measured {
    runs: Vec<Run>,
    median: Median,
}

/// The middle run, by each figure.
#[derive(Serialize)]
struct Median {
    seconds: f64,
    gb_per_s: f64,
}

pub(crate) fn run(args: &LoadArgs, session: &Session) -> Result<Answer, Fault> {
    let checkpoint = args.revision.open(&args.path)?;
    let filter = args.tensors.resolve()?;
    let (device, failed) = if args.device == "auto" { Device::auto()? } else { (Device::parse(&args.device)?, None) };
    let mut builder = builder(args, device.clone())?;
    if let Some(address) = &args.server {
        builder = builder.remote(Box::new(remote(address, args.token_file.as_deref(), args.pinned)?));
    }
    let mut runs = Vec::new();
    for _ in 0..args.repeat {
        let progress = session.progress("load");
        let loader = builder.clone().control(progress.control()).build()?;
        // What was loaded goes before the next run, which finds the same free memory.
        let report = loader.load_filtered(&checkpoint, &filter)?.report().clone();
        runs.push(Run { gb_per_s: report.gb_per_s(), report });
    }
    if let (Some(run), Some(error)) = (runs.first_mut(), failed) {
        run.report.notes.push(format!("{}; --device auto takes the host's memory", error.chain()));
    }
    add_link(&device, &mut runs);
    let median = Median {
        seconds: median(runs.iter().map(|run| run.report.seconds)),
        gb_per_s: median(runs.iter().map(|run| run.gb_per_s)),
    };
    let measured = Measured { runs, median };
    Ok(session.answer(&measured, || measured.text())?)
}

/// The server that moves bytes; an empty address is that of the environment or of a default socket.
fn remote(address: &str, token_file: Option<&Path>, staging: Option<u64>) -> Result<StoreRemote, Fault> {
    let given = Some(address).filter(|address| !address.is_empty());
    // What is no address is an error of the call, not of the server.
    if let Some(text) = given {
        find_address(Some(text))?;
    }
    let options = client::options(given.map(str::to_owned), token_file)?;
    let mut remote = RemoteOptions::new();
    if let Some(len) = staging {
        remote = remote.staging_bytes(len);
    }
    Ok(StoreRemote::at(options, remote))
}

/// Sets the runs beside the peak of the device's link, which is measured, if it must be, when all loads are over.
fn add_link(device: &Device, runs: &mut [Run]) {
    let fastest = runs.iter().map(|run| run.gb_per_s).fold(0.0, f64::max);
    match device.link_peak(fastest) {
        Ok(Some(peak)) => runs.iter_mut().for_each(|run| run.report.add_link(&peak)),
        Ok(None) => {}
        // The loads are done and well: that there is nothing to compare them with is only noted.
        Err(e) => runs.iter_mut().for_each(|run| run.report.notes.push(e.chain())),
    }
}

/// The loader that was asked for, but for its progress.
fn builder(args: &LoadArgs, device: Device) -> Result<LoaderBuilder> {
    if args.engine == EngineChoice::Mapped && args.direct.resolve() == Some(true) {
        let reason = "--engine mapped copies the page cache's own pages: it does not go with --direct on";
        return Err(Error::Invalid(reason.into()));
    }
    Ok(Loader::builder()
        .device(device)
        .engine(args.engine)
        .direct(args.direct.resolve())
        .verify(args.verify)
        .threads(args.threads)
        .pinned_bytes(args.pinned))
}

impl Measured {
    fn text(&self) -> String {
        let mut text: String = self.runs.iter().map(|run| printable_lines(&run.report.to_string())).collect();
        if self.runs.len() > 1 {
            let Median { seconds, gb_per_s } = self.median;
            text += &format!("median of {} runs: {seconds:.3} s, {gb_per_s:.2} GB/s\n", self.runs.len());
        }
        text
    }
}

/// The middle value, or the mean of the two middle ones; 0 of none.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    match values.as_slice() {
        [] => 0.0,
        sorted if sorted.len() % 2 == 1 => sorted[sorted.len() / 2],
        sorted => f64::midpoint(sorted[sorted.len() / 2 - 1], sorted[sorted.len() / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let of = |values: &[f64]| median(values.iter().copied());
        assert_eq!(of(&[]).to_bits(), 0.0_f64.to_bits());
        assert_eq!(of(&[7.0]).to_bits(), 7.0_f64.to_bits());
        assert_eq!(of(&[9.0, 1.0, 2.0]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(of(&[4.0, 1.0, 2.0, 90.0]).to_bits(), 3.0_f64.to_bits());
    }
}
