//! The arguments as they are typed.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use sllm_core::{Checkpoint, EngineChoice, Error, OpenOptions};

use crate::client::ClientCommand;
use crate::size;

const EXIT_CODES: &str = "\
Exit codes:
    0  all is well
    1  stored bytes are corrupt
    2  an argument is wrong, or a choice cannot be used here
    3  there is no such checkpoint, file or tensor
    4  a checkpoint is invalid
    5  a file cannot be read or written
    6  permission denied
    7  the target exists
    8  no space is left
    9  a device failed or is not there
   10  too little device memory
   11  no store server answers, or it failed
  130  cancelled";

/// Converts, exports, inspects, verifies and loads checkpoints of large models.
#[derive(Debug, Parser)]
#[command(name = "sllm-store", bin_name = "sllm-store", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Converts a checkpoint to a store
    Convert(ConvertArgs),
    /// Writes a store as the safetensors files it was converted from
    Export(ExportArgs),
    /// Shows what a checkpoint holds
    Inspect(InspectArgs),
    /// Compares every chunk of a store with its checksum
    Verify(VerifyArgs),
    /// Loads a checkpoint to a device and measures it
    Load(LoadArgs),
    /// Reads a checkpoint into the page cache, out of others' way
    Prefetch(PrefetchArgs),
    #[command(flatten)]
    Client(ClientCommand),
    /// Prints a completion script for a shell
    Completions(CompletionsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Checkpoint: a directory, a safetensors file, or a repository in the Hugging Face cache (org/name)
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) source: PathBuf,
    /// Directory of the store to be made
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) target: PathBuf,
    /// Replace the store that stands at TARGET; nothing but a store is ever replaced
    #[arg(long)]
    pub(crate) overwrite: bool,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) revision: Revision,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Store (or a checkpoint of another layout)
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) store: PathBuf,
    /// Directory to be made
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) revision: Revision,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Checkpoint: a directory, a safetensors file, or a repository in the Hugging Face cache (org/name)
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) tensors: Tensors,
    #[command(flatten)]
    pub(crate) revision: Revision,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Store
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) store: PathBuf,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) revision: Revision,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Checkpoint: a directory, a safetensors file, or a repository in the Hugging Face cache (org/name)
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) path: PathBuf,
    /// Where to: host, cuda, cuda:N, or auto (the first CUDA device if there is one, else the host)
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// What reads; auto goes by what is cached
    #[arg(long, default_value = "auto", value_parser = engines())]
    pub(crate) engine: EngineChoice,
    /// Whether reads pass the page cache; auto: those of uncached bytes
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub(crate) direct: Direct,
    /// Compare every chunk with its checksum (of a store)
    #[arg(long)]
    pub(crate) verify: bool,
    /// Load N times, and tell the median
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) repeat: u16,
    /// Reader threads, 1 to 256 [default: as the engine needs]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Staging memory at most, such as 32MB or 4GiB [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) pinned: Option<u64>,
    /// Have a store server move the bytes; without ADDRESS, the one of SLLM_STORE_ADDRESS or at a default socket. Where
    /// it fails, files are read, and a note says why
    #[arg(long, value_name = "ADDRESS", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(crate) server: Option<String>,
    /// A file that holds the token that the server wants over TCP [default: the token in SLLM_STORE_TOKEN]
    #[arg(long, value_name = "FILE", requires = "server", value_hint = ValueHint::FilePath)]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tensors: Tensors,
    #[command(flatten)]
    pub(crate) revision: Revision,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct PrefetchArgs {
    /// Checkpoint: a directory, a safetensors file, or a repository in the Hugging Face cache (org/name)
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) path: PathBuf,
    /// Return at once, and read in a process of its own
    #[arg(long, conflicts_with = "json")]
    pub(crate) background: bool,
    /// Do not pause while others read from the disks
    #[arg(long)]
    pub(crate) eager: bool,
    /// Page cache at most, such as 32GB or 4GiB [default: nine tenths of the memory that is free]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) limit: Option<u64>,
    #[command(flatten)]
    pub(crate) revision: Revision,
    #[command(flatten)]
    pub(crate) output: Output,
}

fn engines() -> impl TypedValueParser<Value = EngineChoice> {
    PossibleValuesParser::new(["auto", "uring", "pread", "mapped"]).try_map(|name| name.parse::<EngineChoice>())
}

/// Whether reads pass the page cache.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Direct {
    Auto,
    On,
    Off,
}

impl Direct {
    pub(crate) fn resolve(self) -> Option<bool> {
        match self {
            Direct::Auto => None,
            Direct::On => Some(true),
            Direct::Off => Some(false),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: Shell,
}

/// What is written where.
#[derive(Debug, Args)]
pub(crate) struct Output {
    /// Print one JSON object on standard output, and nothing else there
    #[arg(long)]
    pub(crate) json: bool,
    /// Print no progress and no summary, only errors (and what --json asks for)
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Threads {
    /// Threads that read, check and write, 1 to 256 [default: 8]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Threads {
    pub(crate) fn get(&self) -> Option<usize> {
        self.threads
    }
}

#[derive(Debug, Args)]
pub(crate) struct Tensors {
    /// Only tensors of this name or glob (*, ?, [abc]); may be given several times
    #[arg(long = "tensors", value_name = "GLOB")]
    globs: Vec<String>,
}

impl Tensors {
    pub(crate) fn resolve(&self) -> sllm_core::Result<sllm_core::Filter> {
        if self.globs.is_empty() { Ok(sllm_core::Filter::all()) } else { sllm_core::Filter::globs(&self.globs) }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Revision {
    /// Branch, tag or commit of a repository in the Hugging Face cache [default: main]
    #[arg(long)]
    revision: Option<String>,
}

impl Revision {
    /// Opens a checkpoint at this revision. Only a repository has revisions.
    pub(crate) fn open(&self, path: &std::path::Path) -> sllm_core::Result<Checkpoint> {
        match &self.revision {
            None => Checkpoint::open(path),
            Some(_) if path.exists() => {
                let path = path.display();
                Err(Error::Invalid(format!(
                    "{path} is a path on disk, which has no revisions: --revision goes with a repository id"
                )))
            }
            Some(revision) => OpenOptions::new().revision(revision).open(path),
        }
    }
}
