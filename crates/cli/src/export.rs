//! `sllm-store export`.

use sllm_core::{ExportReport, Result, WorkOptions};

use crate::args::ExportArgs;
use crate::output::{Answer, Session};
use crate::size::{count, human};

pub(crate) fn run(args: &ExportArgs, session: &Session) -> Result<Answer> {
    let store = args.revision.open(&args.store)?;
    let progress = session.progress("export");
    let options = WorkOptions::new().threads(args.threads.get()).control(progress.control());
    let report = sllm_core::export(&store, &args.dir, &options)?;
    drop(progress);
    session.answer(&report, || text(&report))
}

fn text(report: &ExportReport) -> String {
    let mut text = format!(
        "{}: {}, {} in {}, {}, in {:.2} s ({:.2} GB/s)\n",
        report.path.display(),
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
    text
}
