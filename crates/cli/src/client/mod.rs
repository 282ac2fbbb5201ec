//! What asks a running store server: `list`, `status`, `preload`, `pin`, `unpin`, `evict`.

mod evict;
mod list;
mod pin;
mod preload;
mod status;

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand, ValueHint};
use sllm_client::{ClientOptions, MAX_TOKEN_FILE, StoreClient};
use sllm_core::read_small_file;

use crate::args::Output;
use crate::output::{Answer, Fault, Session};

/// A subcommand that talks to a server.
#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Lists the models of a running store server
    List(ListArgs),
    /// Shows what a running store server does
    Status(StatusArgs),
    /// Reads models into a store server's memory
    Preload(PreloadArgs),
    /// Keeps a model in a store server's memory
    Pin(PinArgs),
    /// Lets a model go when its room is wanted
    Unpin(PinArgs),
    /// Drops models from a store server's memory
    Evict(EvictArgs),
}

/// Which server, and how to be let in.
#[derive(Debug, Args)]
pub(crate) struct Server {
    /// The server: unix:/PATH, /PATH or HOST:PORT [default: the socket where `sllm-store start` listens]
    #[arg(long, env = "SLLM_STORE_ADDRESS", value_hint = ValueHint::AnyPath)]
    pub(crate) address: Option<String>,
    /// A file that holds the token that the server wants over TCP [default: the token in SLLM_STORE_TOKEN]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) token_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) server: Server,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Show it again every second, until Ctrl-C
    #[arg(long, conflicts_with_all = ["json", "quiet"])]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) server: Server,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct PreloadArgs {
    /// Models: paths below the server's storage path, or absolute ones inside it
    #[arg(required = true, value_name = "MODEL")]
    pub(crate) models: Vec<String>,
    /// Keep them there
    #[arg(long)]
    pub(crate) pin: bool,
    #[command(flatten)]
    pub(crate) server: Server,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct PinArgs {
    /// Its path below the server's storage path, or an absolute one inside it
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) server: Server,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").args(["model", "all"]).required(true)))]
pub(crate) struct EvictArgs {
    /// Its path below the server's storage path, or an absolute one inside it
    pub(crate) model: Option<String>,
    /// All models
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) server: Server,
    #[command(flatten)]
    pub(crate) output: Output,
}

impl ClientCommand {
    pub(crate) fn output(&self) -> &Output {
        match self {
            ClientCommand::List(args) => &args.output,
            ClientCommand::Status(args) => &args.output,
            ClientCommand::Preload(args) => &args.output,
            ClientCommand::Pin(args) | ClientCommand::Unpin(args) => &args.output,
            ClientCommand::Evict(args) => &args.output,
        }
    }

    pub(crate) fn run(&self, session: &Session) -> Result<Answer, Fault> {
        match self {
            ClientCommand::List(args) => list::run(args, session),
            ClientCommand::Status(args) => status::run(args, session),
            ClientCommand::Preload(args) => preload::run(args, session),
            ClientCommand::Pin(args) => pin::run(args, true, session),
            ClientCommand::Unpin(args) => pin::run(args, false, session),
            ClientCommand::Evict(args) => evict::run(args, session),
        }
    }
}

impl Server {
    pub(crate) fn connect(&self) -> Result<StoreClient, Fault> {
        Ok(StoreClient::connect(&options(self.address.clone(), self.token_file.as_deref())?)?)
    }
}

/// How to reach a server, with a token out of a file.
pub(crate) fn options(address: Option<String>, token_file: Option<&Path>) -> Result<ClientOptions, Fault> {
    let token = token_file.map(|path| read_small_file(path, MAX_TOKEN_FILE)).transpose()?;
    // As where the variable is read that may hold it: empty is not given.
    Ok(ClientOptions::new().address(address.filter(|address| !address.is_empty())).token(token))
}

/// Rows below their heads, each column as wide as it must be; the last one, of names, is at the left.
fn table<const N: usize>(heads: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = heads.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in std::iter::once(&heads.map(str::to_owned)).chain(rows) {
        for (at, (cell, width)) in row.iter().zip(widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count().min(width));
            let last = at + 1 == N;
            text += &if last { format!("{cell}\n") } else { format!("{pad}{cell}  ") };
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_a_table_are_as_wide_as_their_longest_cell() {
        let rows = [["1".to_owned(), "ä".to_owned()], ["1000".to_owned(), "b c".to_owned()]];
        assert_eq!(table(["LEN", "NAME"], &rows), " LEN  NAME\n   1  ä\n1000  b c\n");
    }
}
