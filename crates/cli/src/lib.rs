//! The `sllm-store` command: convert, export, inspect, verify, load, prefetch and serve checkpoints, and ask a server.
//!
//! [`run`] is the whole command, from arguments to exit code. What was typed is parsed in `args`; a module a
//! subcommand resolves it (opens the checkpoint, names the device), runs it and gives an `Answer`; `output` writes
//! answers and errors, as text or as JSON.
//!
//! Only answers go to standard output; progress and errors go to standard error. The exit code says what went wrong;
//! `sllm-store --help` and `docs/cli.md` list the codes.
#![forbid(unsafe_code)]

mod args;
mod client;
mod completions;
mod convert;
mod export;
mod inspect;
mod interrupt;
mod load;
mod output;
mod prefetch;
mod progress;
mod size;
mod start;
mod verify;

use std::ffi::OsString;

use clap::Parser;

use args::{Cli, Command};
use output::{Answer, Fault, Session};

/// Runs the command with these arguments, the first of which is the program's name, and gives its exit code.
///
/// While it runs, Ctrl-C stops it in good order, and a second one ends the process.
pub fn run(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    match Cli::try_parse_from(&args) {
        Ok(cli) => dispatch(&cli.command, &args),
        Err(error) => output::tell_usage(&error, args.iter().any(|arg| arg == "--json")),
    }
}

/// `typed` is the whole command line.
fn dispatch(command: &Command, typed: &[OsString]) -> u8 {
    match command {
        Command::Convert(args) => with_session(&args.output, |session| convert::run(args, session)),
        Command::Export(args) => with_session(&args.output, |session| export::run(args, session)),
        Command::Inspect(args) => with_session(&args.output, |session| inspect::run(args, session)),
        Command::Verify(args) => with_session(&args.output, |session| verify::run(args, session)),
        Command::Load(args) => with_session(&args.output, |session| load::run(args, session)),
        Command::Prefetch(args) => with_session(&args.output, |session| prefetch::run(args, typed, session)),
        Command::Start(args) => output::finish(start::run(args).map_err(Fault::from), false),
        Command::Client(command) => with_session(command.output(), |session| command.run(session)),
        Command::Completions(args) => output::finish(Ok(completions::run(args)), false),
    }
}

fn with_session<E: Into<Fault>>(typed: &args::Output, work: impl FnOnce(&Session) -> Result<Answer, E>) -> u8 {
    let session = Session::new(typed, interrupt::watch());
    let result = work(&session).map_err(E::into);
    interrupt::unwatch();
    output::finish(result, typed.json)
}
