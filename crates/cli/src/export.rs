//! `sllm-store export`.

use sllm_core::{ExportReport, WorkOptions};

use crate::args::ExportArgs;
use crate::output::{Answer, Fault, Session, printable_path};
use crate::size::{count, human};

pub(crate) fn run(args: &ExportArgs, session: &Session) -> Result<Answer, Fault> {
    let store = args.revision.open(&args.store)?;
    let progress = session.progress("export");
    let options = WorkOptions::new().threads(args.threads.get()).control(progress.control());
    let report = sllm_core::export(&store, &args.dir, &options);
    drop(progress);
    let report = report.map_err(|e| Fault::of_writing(e, &args.dir))?;
    Ok(session.answer(&report, || text(&report))?)
}

fn text(report: &ExportReport) -> String {
    let mut text = format!(
        "{}: {}, {} in {}, {}, in {:.2} s ({:.2} GB/s)\n",
        printable_path(&report.path),
        count(report.tensors, "tensor"),
        human(report.bytes),
        count(report.files, "file"),
        count(report.other_files, "other file"),
        report.seconds,
        report.gb_per_s,
    );
    if report.resumed_bytes > 0 {
        text += &format!("resumed: {} were there from an interrupted run\n", human(report.resumed_bytes));
    }
    for path in &report.skipped {
        text += &format!("not copied: {}\n", printable_path(path));
    }
    text
}
