//! Where a store server listens: one grammar for whoever listens and whoever connects.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// The address of a store server.
///
/// As text it is `unix:/PATH` (also `unix:///PATH`), `/PATH`, a path that begins with a dot, or `HOST:PORT` (also
/// `http://HOST:PORT`), where an IPv6 address is best written in brackets: `[::1]:8073`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket, by its absolute path.
    Unix(PathBuf),
    /// A port.
    Tcp {
        /// A name or an IP address, without brackets.
        host: String,
        /// 0: any free port, for a server that is to listen.
        port: u16,
    },
}

impl Address {
    /// A port of a host, which is a name or an IP address, in brackets or not. An error says what is wrong with it.
    pub fn tcp(host: &str, port: u16) -> Result<Address, String> {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_host = match bare {
            Some(bare) => is_ipv6(bare),
            None => is_word(host) || is_ipv6(host),
        };
        if !is_host {
            return Err(format!("{host:?} is no host: give a name or an IP address, such as localhost or [::1]"));
        }
        Ok(Address::Tcp { host: bare.unwrap_or(host).to_owned(), port })
    }
}

/// What names and IPv4 addresses are made of.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

/// An IPv6 address, with or without a zone.
fn is_ipv6(text: &str) -> bool {
    let (address, zone) = text.split_once('%').map_or((text, None), |(address, zone)| (address, Some(zone)));
    address.parse::<Ipv6Addr>().is_ok() && zone.is_none_or(is_word)
}

impl FromStr for Address {
    /// What is wrong, and what to give.
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            // `unix:///path` as URLs have it.
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') {
                Ok(Address::Unix(path.into()))
            } else {
                Err("the path of a socket begins with /, as in unix:/run/sllm-store.sock".into())
            };
        }
        if text.starts_with(['/', '.']) {
            return std::path::absolute(text).map(Address::Unix).map_err(|e| e.to_string());
        }
        if text.starts_with("https://") {
            return Err("the server does not speak TLS: reach it by its Unix socket or through a tunnel".into());
        }
        let bare = text.strip_prefix("http://").map_or(text, |rest| rest.trim_end_matches('/'));
        let (host, port) = bare.rsplit_once(':').ok_or("give unix:/PATH, /PATH or HOST:PORT")?;
        let port =
            port.parse().map_err(|_| format!("{port:?} is no port: give HOST:PORT, with a number up to 65535"))?;
        Address::tcp(host, port)
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        let zone = match address {
            SocketAddr::V6(address) if address.scope_id() != 0 => format!("%{}", address.scope_id()),
            _ => String::new(),
        };
        Address::Tcp { host: format!("{}{zone}", address.ip()), port: address.port() }
    }
}

/// As it is parsed.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, String> {
        text.parse()
    }

    #[test]
    fn sockets_and_ports_are_told_apart_and_printed_as_they_are_parsed() {
        let here = std::env::current_dir().unwrap();
        for (text, path) in [
            ("unix:/run/a.sock", "/run/a.sock".into()),
            ("unix:///run/a.sock", "/run/a.sock".into()),
            ("/run/a:80", "/run/a:80".into()),
            ("./a.sock", here.join("a.sock")),
        ] {
            assert_eq!(parse(text), Ok(Address::Unix(path.clone())), "{text}");
            assert_eq!(parse(&format!("unix:{}", path.display())), Ok(Address::Unix(path)));
        }
        for (text, host, port, printed) in [
            ("localhost:8073", "localhost", 8073, "localhost:8073"),
            ("my_host-1.net:0", "my_host-1.net", 0, "my_host-1.net:0"),
            ("http://10.0.0.1:8073/", "10.0.0.1", 8073, "10.0.0.1:8073"),
            ("[::1]:8073", "::1", 8073, "[::1]:8073"),
            ("::1:80", "::1", 80, "[::1]:80"),
            ("[fe80::1%eth0]:80", "fe80::1%eth0", 80, "[fe80::1%eth0]:80"),
        ] {
            let address = parse(text).unwrap();
            assert_eq!(address, Address::Tcp { host: host.into(), port }, "{text}");
            assert_eq!(address.to_string(), printed);
            assert_eq!(parse(printed), Ok(address));
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_what_to_give() {
        for (wrong, give) in [
            ("", "unix:/PATH, /PATH or HOST:PORT"),
            ("host", "unix:/PATH, /PATH or HOST:PORT"),
            ("8073", "unix:/PATH, /PATH or HOST:PORT"),
            ("unix:", "unix:/run"),
            ("unix:a.sock", "unix:/run"),
            ("unix://host/a", "unix:/run"),
            (":80", "localhost or [::1]"),
            ("[]:80", "localhost or [::1]"),
            ("[host]:80", "localhost or [::1]"),
            ("[::1:80", "localhost or [::1]"),
            ("::1%:80", "localhost or [::1]"),
            ("ho st:80", "localhost or [::1]"),
            ("a/b:80", "localhost or [::1]"),
            ("tcp:host:80", "localhost or [::1]"),
            ("host:", "65535"),
            ("host:port", "65535"),
            ("host:99999", "65535"),
            ("host:-1", "65535"),
            ("http://host:80/path", "65535"),
            ("https://host:80", "TLS"),
        ] {
            let reason = parse(wrong).unwrap_err();
            assert!(reason.contains(give), "{wrong:?}: {reason}");
        }
    }

    #[test]
    fn a_bound_port_is_an_address() {
        for text in ["127.0.0.1:80", "[::1]:80", "[fe80::1%3]:80"] {
            assert_eq!(Address::from(text.parse::<SocketAddr>().unwrap()), parse(text).unwrap());
        }
    }
}
