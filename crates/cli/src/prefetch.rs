//! `sllm-store prefetch`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use sllm_core::{Error, PrefetchEnd, PrefetchOptions, PrefetchReport, Result};

use crate::args::PrefetchArgs;
use crate::output::{Answer, Session, printable, printable_path};
use crate::size::human;

/// `typed` is the whole command line, the program first.
pub(crate) fn run(args: &PrefetchArgs, typed: &[OsString], session: &Session) -> Result<Answer> {
    let checkpoint = args.revision.open(&args.path)?;
    if args.background {
        let id = in_background(typed)?;
        let path = printable_path(checkpoint.path());
        return session.answer(&id, || format!("{path}: being read into the page cache by process {id}\n"));
    }
    let progress = session.progress("prefetch");
    let options = PrefetchOptions::new().limit(args.limit).yields(!args.eager).control(progress.control());
    let report = sllm_core::prefetch(&checkpoint, &options)?;
    drop(progress);
    session.answer(&report, || text(&report))
}

/// Runs the same command, without `--background`, in a process that outlives this one and its terminal.
fn in_background(typed: &[OsString]) -> Result<u32> {
    let Some((program, rest)) = typed.split_first() else {
        return Err(Error::Invalid("the program's name is not known: run it without --background".into()));
    };
    let rest = rest.iter().filter(|arg| *arg != "--background");
    let mut command = Command::new(program);
    command.args(rest).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().map_err(|source| Error::Io { what: "start", path: program.into(), source })?;
    Ok(child.id())
}

fn text(report: &PrefetchReport) -> String {
    let end = match report.end {
        PrefetchEnd::Complete => "all of it is in the page cache",
        PrefetchEnd::Loading => "ended, since a load of it began",
        PrefetchEnd::Limit => "ended at the limit",
        _ => "ended",
    };
    format!(
        "{}: {end}; {} of {} read in {:.2} s ({:.2} GB/s), {} were there, {:.2} s paused for others\n",
        printable(&report.path),
        human(report.read_bytes),
        human(report.bytes),
        report.seconds,
        report.gb_per_s,
        human(report.cached_bytes),
        report.paused_s,
    )
}
