//! `sllm-store completions`.

use clap::CommandFactory;

use crate::args::{Cli, CompletionsArgs};
use crate::output::Answer;

pub(crate) fn run(args: &CompletionsArgs) -> Answer {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "sllm-store", &mut script);
    Answer { body: String::from_utf8_lossy(&script).into_owned(), fault: None }
}
