//! Where the server listens, and the connections that come from there.

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Access, FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use sllm_core::{Error, Result};
use sllm_proto::Address;

/// Who may use a socket: its owner and group.
const SOCKET_MODE: u32 = 0o660;
/// How long a server that starts waits for another one to find out whether a socket is in use.
const TURN: Duration = Duration::from_secs(5);
/// How often it asks.
const ASK: Duration = Duration::from_millis(10);

/// The socket where nothing else is asked for: in the user's runtime directory, else in `/run`, else in `/tmp`.
pub fn default_socket() -> PathBuf {
    let writable = |dir: &Path| rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK).is_ok();
    let user = rustix::process::getuid().as_raw();
    let mut sockets = sllm_proto::default_sockets(std::env::var_os("XDG_RUNTIME_DIR"), user);
    // The last one is for when none is known to do.
    let place = sockets.iter().position(|path| path.parent().is_some_and(writable)).unwrap_or(sockets.len() - 1);
    sockets.swap_remove(place)
}

/// Sockets that listen.
#[derive(Debug)]
pub(crate) enum Listener {
    Unix(SocketFile, UnixListener),
    Tcp(TcpListener, SocketAddr),
}

/// A socket's place in the file system, removed when dropped unless somebody else took it. It goes before its listener does:
/// while that listens, no server takes the place over, and it cannot be another's that is removed.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        #[cfg(test)]
        tests::removing(&self.path);
        if self.path.symlink_metadata().is_ok_and(|now| (now.dev(), now.ino()) == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Listens at an address; `secret`: clients from elsewhere must show a token.
    pub(crate) fn bind(address: &Address, secret: bool) -> Result<Vec<Listener>> {
        match address {
            Address::Unix(path) => match bind_unix(path)? {
                Some(listener) => Ok(vec![listener]),
                None => {
                    let path = path.display();
                    let reason = "stop it, or give --listen (or --port) another address";
                    Err(Error::Invalid(format!("a server listens on {path} already: {reason}")))
                }
            },
            Address::Tcp { host, port } => {
                let addresses = resolve(host, *port)?;
                if let Some(open) = addresses.iter().find(|address| !address.ip().is_loopback())
                    && !secret
                {
                    return Err(Error::Invalid(format!(
                        "{open} can be reached from other machines, who may then read every model: give --token-file (or \
                         SLLM_STORE_TOKEN), or listen on 127.0.0.1"
                    )));
                }
                Ok(bind_all(addresses)?.into_iter().map(|(tcp, got)| Listener::Tcp(tcp, got)).collect())
            }
        }
    }

    /// Its address, with the port that it got.
    pub(crate) fn address(&self) -> Address {
        match self {
            Listener::Unix(file, _) => Address::Unix(file.path.clone()),
            Listener::Tcp(_, address) => (*address).into(),
        }
    }
}

/// The addresses that a name stands for, at least one.
fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>> {
    let name = || format!("{host}:{port}");
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(cannot("resolve", name()))?.collect();
    if addresses.is_empty() {
        return Err(Error::Invalid(format!("{} names no address", name())));
    }
    Ok(addresses)
}

/// Listens for those who ask for metrics.
pub(crate) fn bind_metrics(address: &Address) -> Result<Vec<TcpListener>> {
    match address {
        Address::Tcp { host, port } => Ok(bind_all(resolve(host, *port)?)?.into_iter().map(|(tcp, _)| tcp).collect()),
        Address::Unix(_) => {
            Err(Error::Invalid(format!("metrics are served by TCP: --metrics-listen takes HOST:PORT, not {address}")))
        }
    }
}

/// Listens on the TCP addresses of one name. Of several, those are left out that this machine does not have, such as
/// `::1` of `localhost` where IPv6 is off.
fn bind_all(mut addresses: Vec<SocketAddr>) -> Result<Vec<(TcpListener, SocketAddr)>> {
    addresses.sort_unstable();
    addresses.dedup();
    let (mut bound, mut missing) = (Vec::new(), None);
    for address in addresses {
        match bind_tcp(address) {
            Err(Error::Io { source, what, path }) if source.kind() == io::ErrorKind::AddrNotAvailable => {
                missing = Some(Error::Io { source, what, path });
            }
            result => bound.push(result?),
        }
    }
    match missing {
        Some(error) if bound.is_empty() => Err(error),
        _ => Ok(bound),
    }
}

/// Listens on a TCP address; also the address with the port that it got.
pub(crate) fn bind_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).map_err(cannot("listen on", address.to_string()))?;
    listener.set_nonblocking(true).map_err(cannot("listen on", address.to_string()))?;
    let got = listener.local_addr().map_err(cannot("listen on", address.to_string()))?;
    Ok((listener, got))
}

/// Listens at a Unix socket; `None` where somebody else does.
pub(crate) fn bind_unix(path: &Path) -> Result<Option<Listener>> {
    let fail = |e: rustix::io::Errno| cannot("listen on", path)(e.into());
    let dir = path.parent().unwrap_or(Path::new("/"));
    let _turn = take_turn(dir, TURN)?;
    if is_live(path)? {
        return Ok(None);
    }
    let (socket, address) = unix_socket(path).map_err(fail)?;
    // The file gets the socket's mode, less the umask: nobody else can connect before it is set below.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(SOCKET_MODE)).map_err(fail)?;
    rustix::net::bind(&socket, &address).map_err(fail)?;
    let made = path.symlink_metadata().map_err(cannot("inspect", path))?;
    let file = SocketFile { path: path.to_owned(), inode: (made.dev(), made.ino()) };
    std::fs::set_permissions(path, PermissionsExt::from_mode(SOCKET_MODE)).map_err(cannot("set the mode of", path))?;
    rustix::net::listen(&socket, 1024).map_err(fail)?;
    Ok(Some(Listener::Unix(file, socket.into())))
}

/// Two servers that start at once take turns at finding out whether a socket is in use. An error where it is never this
/// one's turn: anybody may lock a directory that he may open.
fn take_turn(dir: &Path, limit: Duration) -> Result<std::fs::File> {
    let turn = std::fs::File::open(dir).map_err(cannot("open", dir))?;
    let until = Instant::now() + limit;
    loop {
        match rustix::fs::flock(&turn, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(turn),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(ASK),
            Err(Errno::WOULDBLOCK) => {
                let dir = dir.display();
                return Err(Error::Invalid(format!(
                    "{dir} is locked by another process (see lslocks), so that no socket can be made there: end that \
                     process, or give --listen another directory"
                )));
            }
            Err(e) => return Err(cannot("lock", dir)(e.into())),
        }
    }
}

/// A socket for this path, by which nothing waits.
fn unix_socket(path: &Path) -> rustix::io::Result<(OwnedFd, SocketAddrUnix)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok((rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?, SocketAddrUnix::new(path)?))
}

/// Whether somebody answers at a socket; where nobody does, it is removed. An error where something else is there.
fn is_live(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(cannot("inspect", path)(e)),
        Ok(there) if !there.file_type().is_socket() => {
            let path = path.display();
            return Err(Error::Invalid(format!("{path} is there and is no socket: choose another path")));
        }
        Ok(_) => {}
    }
    match unix_socket(path).and_then(|(socket, address)| rustix::net::connect(&socket, &address)) {
        Err(Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(cannot("remove the left socket", path)).map(|()| false)
        }
        Err(Errno::NOENT) => Ok(false),
        // It listens, and has more connections waiting than it takes.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(e) => Err(cannot("ask who listens on", path)(e.into())),
    }
}

fn cannot(what: &'static str, on: impl Into<OsString>) -> impl FnOnce(io::Error) -> Error {
    let path = PathBuf::from(on.into());
    move |source| Error::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;
    use crate::connection::{FIRST_WORD, Reception};

    thread_local! {
        /// Whether somebody listened at the socket that was removed last by this thread.
        static LISTENED: Cell<Option<bool>> = const { Cell::new(None) };
    }

    pub(super) fn removing(path: &Path) {
        LISTENED.set(Some(UnixStream::connect(path).is_ok()));
    }

    #[tokio::test]
    async fn a_socket_is_removed_while_it_listens() {
        let dir = tempfile::tempdir().unwrap();
        let bind = |name: &str| bind_unix(&dir.path().join(name)).unwrap().unwrap();
        drop(bind("unused"));
        assert_eq!(LISTENED.take(), Some(true));
        let (grpc, _) = tokio::sync::mpsc::channel(1);
        let (tickets, clients) = (Arc::default(), Arc::default());
        let reception = Reception { grpc, tickets, clients, first_word: FIRST_WORD };
        let accepting = tokio::spawn(reception.accept(bind("used")));
        tokio::task::yield_now().await;
        accepting.abort();
        assert!(accepting.await.unwrap_err().is_cancelled());
        assert_eq!(LISTENED.take(), Some(true));
    }

    #[test]
    fn of_a_names_addresses_those_are_taken_that_are_here() {
        // 192.0.2.0/24 is nobody's (RFC 5737).
        let (here, twice, away) = ("127.0.0.1:0", "127.0.0.1:0", "192.0.2.1:0");
        let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(bind_all(addresses(&[away, here, twice])).unwrap().len(), 1);
        let error = bind_all(addresses(&[away])).unwrap_err();
        assert!(error.chain().contains("192.0.2.1"), "{}", error.chain());
    }

    #[test]
    fn a_left_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bind = || Listener::bind(&Address::Unix(path.clone()), false);
        // As a server leaves it that was killed.
        drop(UnixListener::bind(&path).unwrap());
        let live = bind().unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, SOCKET_MODE);
        assert!(bind().unwrap_err().to_string().contains("already"));
        UnixStream::connect(&path).unwrap();
        drop(live);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(bind().unwrap_err().to_string().contains("no socket"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_another_server_took_over_is_left_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = bind_unix(&path).unwrap().unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = bind_unix(&path).unwrap().unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_server_that_takes_no_connections_is_there_and_nobody_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (socket, address) = unix_socket(&path).unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let connect = || unix_socket(&path).and_then(|(to, address)| rustix::net::connect(&to, &address).map(|()| to));
        let mut waiting = Vec::new();
        while let Ok(connection) = connect() {
            waiting.push(connection);
        }
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || tell.send(bind_unix(&path).map(|bound| bound.is_some())));
        let bound = told.recv_timeout(Duration::from_secs(30)).expect("it waits to be let in");
        assert!(!bound.unwrap());
    }

    #[test]
    fn a_locked_directory_is_told_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let turn = take_turn(dir.path(), Duration::ZERO).unwrap();
        let error = take_turn(dir.path(), ASK).unwrap_err();
        assert!(error.to_string().contains("locked by another process"), "{error}");
        drop(turn);
        take_turn(dir.path(), Duration::ZERO).unwrap();
    }

    #[test]
    fn addresses_that_others_reach_need_a_token() {
        let anywhere = "0.0.0.0:0".parse().unwrap();
        assert!(Listener::bind(&anywhere, false).unwrap_err().to_string().contains("token"));
        assert_eq!(Listener::bind(&anywhere, true).unwrap().len(), 1);
        assert_eq!(Listener::bind(&"127.0.0.1:0".parse().unwrap(), false).unwrap().len(), 1);
    }
}
