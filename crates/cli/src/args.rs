//! The arguments as they are typed.

use std::path::PathBuf;

use clap::builder::{BoolishValueParser, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use sllm_core::{Checkpoint, EngineChoice, OpenOptions, parse_size};
use sllm_server::{Address, LogFormat, Quota};

use crate::client::ClientCommand;

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

/// Converts, exports, inspects, verifies, loads and serves checkpoints of large models.
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
    /// Runs the store server, which keeps checkpoints in pinned memory for the engines of this machine
    Start(Box<StartArgs>),
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
    /// Staging memory at most, such as 32MB or 4GiB: pinned, or on the device where a server loads [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
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
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) limit: Option<u64>,
    #[command(flatten)]
    pub(crate) revision: Revision,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct StartArgs {
    /// Directory below which the models lie [default: that of STORAGE_PATH, else ~/models]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) storage_path: Option<PathBuf>,
    /// Pinned memory at most, such as 64GB, which is 64GiB [default: 4GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) mem_pool_size: Option<u64>,
    /// Threads for each of up to three shares of a load (pool, page cache, disks), 1 to 256 [default: as the engine needs]
    #[arg(long, value_name = "N")]
    pub(crate) num_thread: Option<usize>,
    /// A chunk of the pool: a multiple of 4MB up to 1GB [default: 16MB; 4MB in a pool below 1GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) chunk_size: Option<u64>,
    /// Taken as the original takes it, and not used
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) disk_size: Option<u64>,
    /// Listen on TCP too, on this host [default with --port: 127.0.0.1]
    #[arg(long)]
    pub(crate) host: Option<String>,
    /// Listen on TCP too, on this port [default with --host: 8073]
    #[arg(long)]
    pub(crate) port: Option<u16>,
    /// Load only models that were registered
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
          value_parser = BoolishValueParser::new())]
    pub(crate) registration_required: Option<bool>,
    /// Listen here: unix:/PATH, /PATH or HOST:PORT; may be given several times [default: a socket in $XDG_RUNTIME_DIR, /run or /tmp]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Vec<Address>,
    /// Give metrics for Prometheus here, at http://ADDR/metrics
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics_listen: Option<Address>,
    /// Read these models into memory at the start
    #[arg(long, value_name = "MODEL", num_args = 1..)]
    pub(crate) preload: Vec<String>,
    /// Read these models into memory at the start, and keep them there
    #[arg(long, value_name = "MODEL", num_args = 1..)]
    pub(crate) pin: Vec<String>,
    /// TOML file with any of these settings; flags go before it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
    /// Drop a model from memory when it was not used for so many seconds [default: when its room is wanted]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) ttl: Option<u64>,
    /// Memory at most of all models whose names begin with PREFIX; may be given several times
    #[arg(long, value_name = "PREFIX=SIZE")]
    pub(crate) quota: Vec<Quota>,
    /// Compare chunks of stores with their checksums as they are read (the default)
    #[arg(long, overrides_with = "no_verify")]
    verify: bool,
    /// Do not compare checksums
    #[arg(long, overrides_with = "verify")]
    no_verify: bool,
    /// Loads that run at once, 1 to 256; others wait [default: 16]
    #[arg(long, value_name = "N")]
    pub(crate) max_loads: Option<usize>,
    /// How long running loads may go on after SIGTERM [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) drain_seconds: Option<u64>,
    /// Give a GPU's context back when nothing was loaded there for so long, and unpin the pool when nothing was loaded to
    /// any GPU [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) gpu_idle_seconds: Option<u64>,
    /// File with the token that TCP clients must show; or give it in SLLM_STORE_TOKEN
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) token_file: Option<PathBuf>,
    /// How log lines look, on standard error: text or json
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
}

impl StartArgs {
    /// Whether checksums are compared; `None` where nothing was said.
    pub(crate) fn verify(&self) -> Option<bool> {
        match (self.verify, self.no_verify) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }
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
    /// Opens a checkpoint at this revision.
    pub(crate) fn open(&self, path: &std::path::Path) -> sllm_core::Result<Checkpoint> {
        match &self.revision {
            None => Checkpoint::open(path),
            Some(revision) => OpenOptions::new().revision(revision).open(path),
        }
    }
}
