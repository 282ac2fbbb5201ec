//! `sllm-store verify`.

use serde::Serialize;
use sllm_core::{CorruptChunk, ErrorKind, Result, VerifyReport, WorkOptions};

use crate::args::VerifyArgs;
use crate::output::{Answer, ErrorObject, Fault, Session, printable_path};
use crate::size::{count, human};

/// The report, and the error that it amounts to.
#[derive(Serialize)]
struct Found<'a> {
    #[serde(flatten)]
    report: &'a VerifyReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorObject>,
}

pub(crate) fn run(args: &VerifyArgs, session: &Session) -> Result<Answer> {
    let store = args.revision.open(&args.store)?;
    let progress = session.progress("verify");
    let options = WorkOptions::new().threads(args.threads.get()).control(progress.control());
    let report = sllm_core::verify(&store, &options)?;
    drop(progress);
    let fault = fault(&report);
    let found = Found { report: &report, error: fault.as_ref().map(Fault::object) };
    let answer = session.answer(&found, || text(&report))?;
    Ok(Answer { fault, ..answer })
}

fn fault(report: &VerifyReport) -> Option<Fault> {
    let corrupt = report.corrupt.len();
    let message = || {
        let verb = if corrupt == 1 { "is" } else { "are" };
        format!("{}: {corrupt} of {} {verb} corrupt", report.path.display(), count(report.chunks, "chunk"))
    };
    (corrupt > 0).then(|| Fault::new(ErrorKind::Corrupt, message()))
}

fn text(report: &VerifyReport) -> String {
    let mut text: String = report.corrupt.iter().map(chunk_text).collect();
    if report.corrupt.is_empty() {
        text += &format!(
            "{}: {} as stored, {} in {:.2} s ({:.2} GB/s)\nidentity {}\n",
            printable_path(&report.path),
            count(report.chunks, "chunk"),
            human(report.bytes),
            report.seconds,
            report.gb_per_s,
            report.identity,
        );
    }
    text
}

fn chunk_text(chunk: &CorruptChunk) -> String {
    let mut text = format!(
        "{}: chunk {} (offset {}, {} bytes) is corrupt: checksum {:016x}, stored {:016x}\n",
        printable_path(&chunk.path),
        chunk.chunk,
        chunk.offset,
        chunk.len,
        chunk.found,
        chunk.expected,
    );
    for tensor in &chunk.tensors {
        text += &format!("  tensor {tensor:?}\n");
    }
    match chunk.more_tensors {
        0 if chunk.tensors.is_empty() => text += "  only padding\n",
        0 => {}
        more => text += &format!("  and {}\n", count(more, "more tensor")),
    }
    text
}
