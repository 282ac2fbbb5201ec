//! Where a client finds a store server.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sllm_proto::Address;

use crate::error::{Error, Result};

/// The environment's address.
const VARIABLE: &str = "SLLM_STORE_ADDRESS";

/// The address that was given, else that of `SLLM_STORE_ADDRESS`, else the first default socket that is there.
pub fn find_address(given: Option<&str>) -> Result<Address> {
    match given {
        Some(text) => parse(text),
        None => match std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) {
            Some(text) => match text.to_str() {
                Some(text) => parse(text),
                None => Err(Error::Address {
                    address: text.to_string_lossy().into_owned(),
                    reason: format!("{VARIABLE} is not UTF-8"),
                }),
            },
            None => default_socket().ok_or_else(|| {
                let places = default_sockets().iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
                let reason = format!("there is no socket, and {VARIABLE} is not set");
                Error::NotThere { address: places.join(", "), reason }
            }),
        },
    }
}

/// An address that one can connect to.
fn parse(text: &str) -> Result<Address> {
    let wrong = |reason| Error::Address { address: text.to_owned(), reason };
    match text.parse().map_err(wrong)? {
        Address::Tcp { port: 0, .. } => Err(wrong("port 0 is any free port, which only a server can ask for".into())),
        address => Ok(address),
    }
}

/// The first default socket that is there and belongs to this user or to root: one that somebody else put into a
/// directory that all may write to is not trusted.
fn default_socket() -> Option<Address> {
    let user = rustix::process::getuid().as_raw();
    default_sockets().into_iter().find(|path| is_socket_of(path, user)).map(Address::Unix)
}

/// Where a server listens that was not told where, best first.
fn default_sockets() -> Vec<PathBuf> {
    sllm_proto::default_sockets(std::env::var_os("XDG_RUNTIME_DIR"), rustix::process::getuid().as_raw())
}

fn is_socket_of(path: &Path, user: u32) -> bool {
    path.symlink_metadata().is_ok_and(|there| there.file_type().is_socket() && [0, user].contains(&there.uid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_cannot_connect_to_is_refused_with_what_was_given() {
        assert_eq!(find_address(Some("[::1]:80")).unwrap(), Address::Tcp { host: "::1".into(), port: 80 });
        for wrong in ["host:0", "host", ""] {
            let error = find_address(Some(wrong)).unwrap_err();
            assert!(matches!(&error, Error::Address { address, .. } if address == wrong), "{error}");
        }
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
