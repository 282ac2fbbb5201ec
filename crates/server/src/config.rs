//! What a server is told: flags and the configuration file give [`Settings`], which resolve to a [`Config`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use sllm_core::{Error, Result, parse_size, read_small_file};
use sllm_proto::{Address, TOKEN_VARIABLE};

use crate::listen::default_socket;
use crate::token::Token;

/// Bytes that a chunk of the pool is a multiple of: the chunk of a store.
const CHUNK_UNIT: u64 = 4 << 20;
/// Bytes of a chunk unless given: one copy of so many keeps a link busy while the next is issued.
const CHUNK_LEN: u64 = 16 << 20;
/// Pools smaller than this have chunks of [`CHUNK_UNIT`] unless given, so that there are enough of them.
const SMALL_POOL: u64 = 1 << 30;
/// Bytes of a chunk at most: what every driver registers at once.
const MAX_CHUNK: u64 = 1 << 30;
/// Bytes of a configuration file at most.
const MAX_FILE: u64 = 1 << 20;
/// The original's port.
const PORT: u16 = 8073;

/// What a server is told, all of it known.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// The directory below which models lie.
    pub storage_path: PathBuf,
    /// Bytes of the pool.
    pub pool_len: u64,
    /// Bytes of one of its chunks.
    pub chunk_len: u64,
    /// Threads for each of up to three shares of a load (pool, page cache, disks); `None`: as the engine needs.
    pub threads: Option<usize>,
    /// Whether only registered models are loaded.
    pub registration_required: bool,
    /// Where to listen.
    pub listen: Vec<Address>,
    /// A Unix socket to listen at too, unless another server does.
    pub listen_if_free: Option<PathBuf>,
    /// Where metrics are served, as text over HTTP.
    pub metrics_listen: Option<Address>,
    /// Models to be read into the pool at the start.
    pub preload: Vec<String>,
    /// Models to be read into the pool at the start, and kept there.
    pub pin: Vec<String>,
    /// How long an unused model stays in the pool; `None`: until its room is wanted.
    pub ttl: Option<Duration>,
    /// Limits of groups of models.
    pub quotas: Vec<Quota>,
    /// Whether checksums of stores are compared as they are read.
    pub verify: bool,
    /// Loads that run at once; others wait.
    pub max_loads: usize,
    /// How long running loads may go on after the signal to stop.
    pub drain: Duration,
    /// How long the context of a GPU is kept without loads to it, and the pool page-locked without loads to any.
    pub gpu_idle: Duration,
    /// What TCP clients must show.
    pub token: Option<Token>,
}

/// Room in the pool of all models whose names begin with a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quota {
    /// The prefix.
    pub prefix: String,
    /// Bytes at most.
    pub len: u64,
}

impl std::str::FromStr for Quota {
    type Err = String;

    fn from_str(text: &str) -> Result<Quota, String> {
        let (prefix, len) = text.rsplit_once('=').ok_or("a quota is PREFIX=SIZE, such as team-a/=32GB")?;
        if prefix.is_empty() {
            return Err("a quota needs a prefix before the =".into());
        }
        Ok(Quota { prefix: prefix.to_owned(), len: parse_size(len).map_err(|e| e.to_string())? })
    }
}

impl<'de> Deserialize<'de> for Quota {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Quota, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A size in a configuration file: a string as on the command line ([`parse_size`]), or a number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Typed {
            Bytes(u64),
            Text(String),
        }
        match Typed::deserialize(deserializer)? {
            Typed::Bytes(bytes) => Ok(Size(bytes)),
            Typed::Text(text) => parse_size(&text).map(Size).map_err(serde::de::Error::custom),
        }
    }
}

fn address<E: serde::de::Error>(text: String) -> Result<Address, E> {
    text.parse().map_err(|reason: String| E::custom(format!("{text:?} is no address: {reason}")))
}

fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Address>, D::Error> {
    Vec::<String>::deserialize(deserializer)?.into_iter().map(address).collect()
}

fn some_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Address>, D::Error> {
    String::deserialize(deserializer).and_then(address).map(Some)
}

/// What was typed, as flags or as a file; everything may be left out.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// See [`Config::storage_path`]; `~/models` unless given.
    pub storage_path: Option<PathBuf>,
    /// See [`Config::pool_len`]; 4 GiB unless given.
    pub mem_pool_size: Option<Size>,
    /// See [`Config::chunk_len`]; 16 MiB unless given, 4 MiB in a pool below 1 GiB.
    pub chunk_size: Option<Size>,
    /// See [`Config::threads`].
    pub num_thread: Option<usize>,
    /// See [`Config::registration_required`]; no unless given.
    pub registration_required: Option<bool>,
    /// The host of one more address to listen at.
    pub host: Option<String>,
    /// Its port, on the loopback interface where no host is given.
    pub port: Option<u16>,
    /// See [`Config::listen`]; a Unix socket unless given.
    #[serde(deserialize_with = "addresses")]
    pub listen: Vec<Address>,
    /// See [`Config::metrics_listen`].
    #[serde(deserialize_with = "some_address")]
    pub metrics_listen: Option<Address>,
    /// See [`Config::preload`].
    pub preload: Vec<String>,
    /// See [`Config::pin`].
    pub pin: Vec<String>,
    /// See [`Config::ttl`], in seconds.
    pub ttl: Option<u64>,
    /// See [`Config::quotas`].
    pub quota: Vec<Quota>,
    /// See [`Config::verify`]; yes unless given.
    pub verify: Option<bool>,
    /// See [`Config::max_loads`]; 16 unless given.
    pub max_loads: Option<usize>,
    /// See [`Config::drain`], in seconds; 30 unless given.
    pub drain_seconds: Option<u64>,
    /// See [`Config::gpu_idle`], in seconds; 300 unless given.
    pub gpu_idle_seconds: Option<u64>,
    /// A file that holds the token of TCP clients.
    pub token_file: Option<PathBuf>,
}

impl Settings {
    /// Reads a configuration file, of 1 MiB at most.
    pub fn from_file(path: &Path) -> Result<Settings> {
        let text = read_small_file(path, MAX_FILE)?;
        toml::from_str(&text).map_err(|e| Error::Invalid(format!("{}: {e}", path.display())))
    }

    /// These settings, and those of a file where these say nothing.
    pub fn or(self, file: Settings) -> Settings {
        fn list<T>(mine: Vec<T>, file: Vec<T>) -> Vec<T> {
            if mine.is_empty() { file } else { mine }
        }
        // Who types an address wants that one, whatever way the file has to say where.
        let addressed = self.host.is_some() || self.port.is_some() || !self.listen.is_empty();
        let (host, port, listen) =
            if addressed { (self.host, self.port, self.listen) } else { (file.host, file.port, file.listen) };
        Settings {
            storage_path: self.storage_path.or(file.storage_path),
            mem_pool_size: self.mem_pool_size.or(file.mem_pool_size),
            chunk_size: self.chunk_size.or(file.chunk_size),
            num_thread: self.num_thread.or(file.num_thread),
            registration_required: self.registration_required.or(file.registration_required),
            host,
            port,
            listen,
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            preload: list(self.preload, file.preload),
            pin: list(self.pin, file.pin),
            ttl: self.ttl.or(file.ttl),
            quota: list(self.quota, file.quota),
            verify: self.verify.or(file.verify),
            max_loads: self.max_loads.or(file.max_loads),
            drain_seconds: self.drain_seconds.or(file.drain_seconds),
            gpu_idle_seconds: self.gpu_idle_seconds.or(file.gpu_idle_seconds),
            token_file: self.token_file.or(file.token_file),
        }
    }

    /// Fills in what was left out, and checks all. `token` is the one that the environment gives; a file goes before it.
    pub fn resolve(self, token: Option<String>) -> Result<Config> {
        let storage_path = match self.storage_path {
            Some(path) => path,
            None => home_models()?,
        };
        let mut config = Config::new(storage_path);
        config.pool_len = self.mem_pool_size.map_or(config.pool_len, |size| size.0);
        let usual = if config.pool_len < SMALL_POOL { CHUNK_UNIT } else { config.chunk_len };
        config.chunk_len = self.chunk_size.map_or(usual, |size| size.0);
        config.threads = self.num_thread;
        config.registration_required = self.registration_required.unwrap_or(config.registration_required);
        config.listen = self.listen;
        let told = !config.listen.is_empty();
        if self.host.is_some() || self.port.is_some() {
            let host = self.host.unwrap_or_else(|| "127.0.0.1".into());
            config.listen.push(
                Address::tcp(&host, self.port.unwrap_or(PORT)).map_err(|e| Error::Invalid(format!("--host: {e}")))?,
            );
            // With the original's flags alone the socket is there too: our clients find the server without being told.
            // A second server at another port does without.
            config.listen_if_free = (!told).then(default_socket);
        } else if !told {
            config.listen.push(Address::Unix(default_socket()));
        }
        config.metrics_listen = self.metrics_listen;
        config.preload = self.preload;
        config.pin = self.pin;
        config.ttl = self.ttl.map(Duration::from_secs);
        config.quotas = self.quota;
        config.verify = self.verify.unwrap_or(config.verify);
        config.max_loads = self.max_loads.unwrap_or(config.max_loads);
        config.drain = self.drain_seconds.map_or(config.drain, Duration::from_secs);
        config.gpu_idle = self.gpu_idle_seconds.map_or(config.gpu_idle, Duration::from_secs);
        config.token = match (self.token_file, token) {
            (Some(file), _) => Some(Token::from_file(&file)?),
            (None, Some(token)) => Some(Token::of(&token, TOKEN_VARIABLE)?),
            (None, None) => None,
        };
        config.check()?;
        Ok(config)
    }
}

impl Config {
    /// The defaults, for models below this directory: a socket that [`Config::listen`] must be given.
    pub fn new(storage_path: impl Into<PathBuf>) -> Config {
        Config {
            storage_path: storage_path.into(),
            pool_len: 4 << 30,
            chunk_len: CHUNK_LEN,
            threads: None,
            registration_required: false,
            listen: Vec::new(),
            listen_if_free: None,
            metrics_listen: None,
            preload: Vec::new(),
            pin: Vec::new(),
            ttl: None,
            quotas: Vec::new(),
            verify: true,
            max_loads: 16,
            drain: Duration::from_secs(30),
            gpu_idle: Duration::from_secs(300),
            token: None,
        }
    }

    /// An error where something cannot be as it is.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |reason: String| Err(Error::Invalid(reason));
        let chunk = self.chunk_len;
        if chunk == 0 || !chunk.is_multiple_of(CHUNK_UNIT) || chunk > MAX_CHUNK {
            return refuse(format!(
                "a chunk of the pool cannot have {chunk} bytes: --chunk-size takes a multiple of 4 MiB up to 1 GiB"
            ));
        }
        if self.pool_len / chunk < 2 {
            return refuse(format!(
                "the pool's {} bytes are fewer than two chunks of {chunk}: raise --mem-pool-size or lower --chunk-size",
                self.pool_len
            ));
        }
        if self.threads.is_some_and(|threads| !(1..=256).contains(&threads)) {
            return refuse("--num-thread takes 1 to 256 threads".into());
        }
        if !(1..=256).contains(&self.max_loads) {
            return refuse("--max-loads takes 1 to 256 loads".into());
        }
        if self.listen.is_empty() {
            return refuse("there is no address to listen at: give --listen".into());
        }
        Ok(())
    }
}

/// The original's default for models.
fn home_models() -> Result<PathBuf> {
    match std::env::var_os("HOME").filter(|home| !home.is_empty()) {
        Some(home) => Ok(PathBuf::from(home).join("models")),
        None => Err(Error::Invalid("there is no home directory: give --storage-path".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Settings {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn flags_go_before_the_file() {
        let file = settings("mem_pool_size = '8GB'\nchunk_size = 8388608\nlisten = ['unix:/a']\npin = ['m']\nport = 1");
        let flags = Settings { chunk_size: Some(Size(4 << 20)), port: Some(0), ..Settings::default() };
        let config = flags.or(file).resolve(None).unwrap();
        assert_eq!((config.pool_len, config.chunk_len), (8 << 30, 4 << 20));
        assert_eq!(config.pin, ["m"]);
        // A typed port is where to listen; the file's addresses are not added to it.
        assert_eq!(config.listen, [Address::tcp("127.0.0.1", 0).unwrap()]);
    }

    #[test]
    fn the_default_socket_is_needed_only_where_no_other_address_is() {
        let socket = || default_socket();
        let of = |change: &dyn Fn(&mut Settings)| {
            let mut settings = Settings { storage_path: Some("/".into()), ..Settings::default() };
            change(&mut settings);
            let config = settings.resolve(None).unwrap();
            (config.listen, config.listen_if_free)
        };
        let (unix, tcp) = (Address::Unix("/a".into()), Address::tcp("127.0.0.1", 1).unwrap());
        assert_eq!(of(&|_| ()), (vec![Address::Unix(socket())], None));
        assert_eq!(of(&|s| s.port = Some(1)), (vec![tcp.clone()], Some(socket())));
        assert_eq!(of(&|s| s.listen = vec![unix.clone()]), (vec![unix.clone()], None));
        let both = |s: &mut Settings| (s.listen, s.port) = (vec![unix.clone()], Some(1));
        assert_eq!(of(&both), (vec![unix.clone(), tcp.clone()], None));
    }

    #[test]
    fn a_file_with_an_unknown_key_or_a_wrong_value_is_refused() {
        for text in ["chunk = 1", "chunk_size = '4 apples'", "quota = ['x']", "listen = ['nowhere']", "port = 70000"] {
            assert!(toml::from_str::<Settings>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn metrics_are_at_a_name_or_a_number_and_not_at_a_socket() {
        let of = |text: &str| Settings { storage_path: Some("/".into()), ..settings(text) }.resolve(None);
        let config = of("metrics_listen = 'localhost:9473'").unwrap();
        assert_eq!(config.metrics_listen, Some(Address::tcp("localhost", 9473).unwrap()));
        assert!(of("metrics_listen = '[::1]:0'").is_ok());
        assert!(toml::from_str::<Settings>("metrics_listen = 'localhost'").is_err());
    }

    #[test]
    fn chunks_and_pools_that_cannot_be_are_refused() {
        let with = |chunk, pool| Settings {
            chunk_size: Some(Size(chunk)),
            mem_pool_size: Some(Size(pool)),
            storage_path: Some("/".into()),
            ..Settings::default()
        };
        for (chunk, pool) in [(0, 1 << 30), (1 << 20, 1 << 30), (6 << 20, 1 << 30), (2 << 30, 8 << 30), (32 << 20, 1)] {
            assert!(with(chunk, pool).resolve(None).is_err(), "{chunk} {pool}");
        }
        assert!(with(1 << 30, 2 << 30).resolve(None).is_ok());
        let of = |pool| Settings { chunk_size: None, ..with(0, pool) }.resolve(None).unwrap().chunk_len;
        assert_eq!((of(1 << 30), of((1 << 30) - 1), of(8 << 20)), (16 << 20, 4 << 20, 4 << 20));
    }
}
