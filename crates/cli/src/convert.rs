//! `sllm-store convert`.

use sllm_core::{ConvertOptions, ConvertReport};

use crate::args::ConvertArgs;
use crate::output::{Answer, Fault, Session, printable_path};
use crate::size::{count, human};

pub(crate) fn run(args: &ConvertArgs, session: &Session) -> Result<Answer, Fault> {
    let source = args.revision.open(&args.source)?;
    let progress = session.progress("convert");
    let options =
        ConvertOptions::new().overwrite(args.overwrite).threads(args.threads.get()).control(progress.control());
    let report = sllm_core::convert(&source, &args.target, &options);
    drop(progress);
    let report = report.map_err(|e| Fault::of_writing(e, &args.target))?;
    Ok(session.answer(&report, || text(&report))?)
}

fn text(report: &ConvertReport) -> String {
    let mut text = format!(
        "{}: {}, {} in {}, {}, in {:.2} s ({:.2} GB/s)\nidentity {}\n",
        printable_path(&report.path),
        count(report.tensors, "tensor"),
        human(report.bytes),
        count(report.files, "file"),
        count(report.other_files, "other file"),
        report.seconds,
        report.gb_per_s,
        report.identity,
    );
    if report.resumed_bytes > 0 {
        text += &format!("resumed: {} were there from an interrupted run\n", human(report.resumed_bytes));
    }
    for path in &report.skipped {
        text += &format!("not copied: {}\n", printable_path(path));
    }
    if let Some(path) = &report.not_removed {
        text += &format!("not removed: {}, the store that was replaced\n", printable_path(path));
    }
    text
}
