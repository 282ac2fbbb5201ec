//! Where a store server listens.

use std::fmt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result};

/// The environment's address.
const VARIABLE: &str = "SLLM_STORE_ADDRESS";

/// The address of a store server.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl Address {
    /// The address that was given, else that of `SLLM_STORE_ADDRESS`, else the first default socket that is there.
    pub fn find(given: Option<&str>) -> Result<Address> {
        match given {
            Some(text) => text.parse(),
            None => match std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) {
                Some(text) => text.to_string_lossy().parse(),
                None => Self::default_socket().ok_or_else(|| {
                    let places = default_sockets().iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
                    let reason = format!("there is no socket, and {VARIABLE} is not set");
                    Error::NotThere { address: places.join(", "), reason }
                }),
            },
        }
    }

    /// The first default socket that is there and belongs to this user or to root: one that somebody else put into a
    /// directory that all may write to is not trusted.
    pub fn default_socket() -> Option<Address> {
        let user = rustix::process::getuid().as_raw();
        default_sockets().into_iter().find(|path| is_socket_of(path, user)).map(Address::Unix)
    }
}

/// Where a server listens that was not told where, best first.
fn default_sockets() -> Vec<PathBuf> {
    sllm_proto::default_sockets(std::env::var_os("XDG_RUNTIME_DIR"), rustix::process::getuid().as_raw())
}

fn is_socket_of(path: &Path, user: u32) -> bool {
    path.symlink_metadata().is_ok_and(|there| there.file_type().is_socket() && [0, user].contains(&there.uid()))
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address> {
        let wrong = |reason: &str| Error::Address { address: text.to_owned(), reason: reason.to_owned() };
        if let Some(path) = text.strip_prefix("unix:") {
            // `unix:///path` as URLs have it.
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') {
                Ok(Address::Unix(path.into()))
            } else {
                Err(wrong("the path of a socket begins with /"))
            };
        }
        if text.starts_with(['/', '.']) {
            let path = std::path::absolute(text).map_err(|e| wrong(&e.to_string()))?;
            return Ok(Address::Unix(path));
        }
        if text.starts_with("https://") {
            return Err(wrong("the server does not speak TLS: reach it by its Unix socket or through a tunnel"));
        }
        let bare = text.strip_prefix("http://").map_or(text, |rest| rest.trim_end_matches('/'));
        let (host, port) = bare.rsplit_once(':').ok_or_else(|| wrong("give unix:/PATH, /PATH or HOST:PORT"))?;
        let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if !bracketed && (host.is_empty() || !host.chars().all(plain)) {
            return Err(wrong("it names no host before the port"));
        }
        if !port.parse::<u16>().is_ok_and(|port| port > 0) {
            return Err(wrong("the port is a number from 1 to 65535"));
        }
        Ok(Address::Tcp(bare.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(address) => f.write_str(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<Address> {
        text.parse().ok()
    }

    #[test]
    fn sockets_and_ports_are_told_apart() {
        let unix = |path: &str| Some(Address::Unix(path.into()));
        let tcp = |address: &str| Some(Address::Tcp(address.into()));
        assert_eq!(parse("unix:/run/a.sock"), unix("/run/a.sock"));
        assert_eq!(parse("unix:///run/a.sock"), unix("/run/a.sock"));
        assert_eq!(parse("/run/a:80"), unix("/run/a:80"));
        assert_eq!(parse("./a.sock"), unix(std::env::current_dir().unwrap().join("a.sock").to_str().unwrap()));
        assert_eq!(parse("localhost:8073"), tcp("localhost:8073"));
        assert_eq!(parse("http://10.0.0.1:8073/"), tcp("10.0.0.1:8073"));
        assert_eq!(parse("[::1]:8073"), tcp("[::1]:8073"));
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for wrong in
            ["", "unix:", "unix:a", "host", ":80", "host:", "host:0", "host:99999", "ho st:80", "a/b:80", "::1:80"]
        {
            assert!(matches!(wrong.parse::<Address>(), Err(Error::Address { .. })), "{wrong:?}");
        }
        assert!("https://host:80".parse::<Address>().unwrap_err().to_string().contains("TLS"));
    }

    #[test]
    fn default_sockets_are_those_of_the_server_in_its_order() {
        let sockets = sllm_proto::default_sockets;
        let user = "/tmp/sllm-store-1000.sock";
        let with = sockets(Some("/run/user/1000".into()), 1000);
        assert_eq!(with, ["/run/user/1000/sllm-store.sock", "/run/sllm-store.sock", user].map(PathBuf::from));
        assert_eq!(sockets(Some("relative".into()), 1000), ["/run/sllm-store.sock", user].map(PathBuf::from));
    }

    #[test]
    fn a_default_socket_must_be_a_socket_of_this_user_or_of_root() {
        let dir = tempfile::tempdir().unwrap();
        let (path, file) = (dir.path().join("s"), dir.path().join("f"));
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::fs::write(&file, "").unwrap();
        let owner = path.symlink_metadata().unwrap().uid();
        assert!(is_socket_of(&path, owner) && !is_socket_of(&file, owner));
        assert_eq!(is_socket_of(&path, owner + 1), owner == 0);
    }
}
