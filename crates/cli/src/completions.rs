//! `sllm-store completions`.

use clap::CommandFactory;

use crate::args::{Cli, CompletionsArgs};
use crate::output::Answer;

pub(crate) fn run(args: &CompletionsArgs) -> Answer {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "sllm-store", &mut script);
    let script = String::from_utf8_lossy(&script);
    // clap_complete's script for bash (4.6.11) takes the hyphen of the program's name for the start of a subcommand in
    // one of two places, and so finds no options of any.
    Answer { body: script.replace("sllm__subcmd__store", "sllm__store"), fault: None }
}
