//! The server as a process: how it starts, what it says, and how it ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use assert_cmd::cargo::cargo_bin;

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Dir {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir(dir.path().join("models")).unwrap();
        Dir(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(cargo_bin("sllm-store"));
        command.arg("start").env_remove("SLLM_STORE_TOKEN").env("STORAGE_PATH", self.path("models"));
        command.arg("--listen").arg(format!("unix:{}", self.path("s").display()));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a server, and waits until it can be connected to by its socket.
    fn start(&self, command: &mut Command) -> Server {
        let mut server = Server(Some(command.spawn().unwrap()));
        server.wait_for(|| UnixStream::connect(self.path("s")).is_ok());
        server
    }
}

/// A server, killed at the end of a test.
struct Server(Option<Child>);

impl Server {
    /// Waits while it runs.
    fn wait_for(&mut self, done: impl Fn() -> bool) {
        while !done() {
            assert!(self.0.as_mut().unwrap().try_wait().unwrap().is_none(), "it ended");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until it can be connected to by a port: a server listens at one address after the other.
    fn wait_for_port(&mut self, port: u16) {
        self.wait_for(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
    }

    fn signal(&self, signal: &str) {
        let pid = self.0.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
    }

    /// What it logs up to the first line that has `says`, and that line. Of what follows nothing is kept.
    fn log_until(&mut self, says: &str) -> (String, String) {
        let mut before = String::new();
        let stderr = self.0.as_mut().unwrap().stderr.take().unwrap();
        for line in BufReader::new(stderr).lines().map(Result::unwrap) {
            if line.contains(says) {
                return (before, line);
            }
            before += &line;
        }
        panic!("it ended: {before}");
    }

    fn end(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn refused(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// A port that was free a moment ago.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn metrics(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_signal_ends_it_well_and_its_socket_is_gone() {
    for signal in ["TERM", "INT"] {
        let dir = Dir::new();
        let server = dir.start(dir.command().args(["--log-format", "json", "--metrics-listen", "127.0.0.1:0"]));
        server.signal(signal);
        let output = server.end();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stdout.is_empty() && !dir.path("s").exists());
        let lines: Vec<serde_json::Value> = output
            .stderr
            .split(|&b| b == b'\n')
            .filter(|l| !l.is_empty())
            .map(|l| serde_json::from_slice(l).unwrap())
            .collect();
        let listening = lines.iter().find(|line| line["message"] == "listening").unwrap();
        assert_eq!(listening["addresses"], format!("unix:{}", dir.path("s").display()));
        let metrics: std::net::SocketAddr = listening["metrics"].as_str().unwrap().parse().unwrap();
        assert_ne!(metrics.port(), 0);
    }
}

#[test]
fn after_a_kill_it_starts_again_and_two_do_not_run_at_one_socket() {
    let dir = Dir::new();
    let first = dir.start(&mut dir.command());
    first.signal("KILL");
    first.end();
    assert!(dir.path("s").exists(), "a killed server leaves its socket");
    let second = dir.start(&mut dir.command());
    let (code, text) = refused(&mut dir.command());
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("listens") && text.contains("already"), "{text}");
    UnixStream::connect(dir.path("s")).unwrap();
    drop(second);
}

#[test]
fn a_second_server_at_another_port_leaves_the_default_socket_to_the_first() {
    let dir = Dir::new();
    let socket = dir.path("sllm-store.sock");
    let start = |port: u16| {
        let mut command = Command::new(cargo_bin("sllm-store"));
        command.args(["start", "--port", &port.to_string()]).env_remove("SLLM_STORE_TOKEN");
        command.env("STORAGE_PATH", dir.path("models")).env("XDG_RUNTIME_DIR", dir.0.path());
        let mut server = Server(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()));
        server.wait_for_port(port);
        server
    };
    let first = start(port());
    // The socket comes after the port.
    while UnixStream::connect(&socket).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let second_port = port();
    let second = start(second_port);
    UnixStream::connect(&socket).unwrap();
    let status = |address: &str| {
        let mut command = Command::new(cargo_bin("sllm-store"));
        command.args(["status", "--quiet", "--address", address]).status().unwrap().success()
    };
    assert!(status(&format!("127.0.0.1:{second_port}")));
    second.signal("TERM");
    let output = second.end();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && text.contains("another server listens at the default socket"), "{text}");
    assert!(status(socket.to_str().unwrap()), "the first one's socket went with the second");
    // One that would have no other address does not start.
    let mut alone = Command::new(cargo_bin("sllm-store"));
    alone.arg("start").env("STORAGE_PATH", dir.path("models")).env("XDG_RUNTIME_DIR", dir.0.path());
    let (code, text) = refused(&mut alone);
    assert!(code == Some(2) && text.contains("already"), "{text}");
    first.signal("TERM");
    first.end();
    assert!(!socket.exists());
}

#[test]
fn logs_that_cannot_be_written_do_not_end_it() {
    for broken in [Some("/dev/full"), None] {
        let dir = Dir::new();
        let mut command = dir.command();
        let port = port();
        command.arg("--metrics-listen").arg(format!("127.0.0.1:{port}"));
        match broken {
            Some(full) => drop(command.stderr(File::options().write(true).open(full).unwrap())),
            // A pipe whose reader is gone.
            None => drop(command.stderr(unread_pipe())),
        }
        let server = dir.start(&mut command);
        // A refused ticket is logged.
        for _ in 0..3 {
            let mut stream = UnixStream::connect(dir.path("s")).unwrap();
            stream.write_all(b"sllm-mem").unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("ticket"), "{answer}");
        }
        assert!(metrics(port).contains("sllm_clients"));
        server.signal("TERM");
        assert_eq!(server.end().status.code(), Some(0));
    }
}

/// The writing end of a pipe that nobody reads.
fn unread_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let dir = Dir::new();
    let write = |name: &str, text: &str| -> PathBuf {
        fs::write(dir.path(name), text).unwrap();
        dir.path(name)
    };
    let refuse = |args: &[&str], word: &str| {
        let (code, text) = refused(dir.command().args(args));
        assert_eq!(code, Some(2), "{args:?}: {text}");
        assert!(text.contains(word), "{args:?}: {text}");
    };
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    refuse(&["--chunk-size", "6MB"], "multiple of 4 MiB");
    refuse(&["--chunk-size", "2GB"], "1 GiB");
    refuse(&["--mem-pool-size", "4MB"], "--mem-pool-size");
    refuse(&["--mem-pool-size", "4 apples"], "size is");
    refuse(&["--num-thread", "0"], "--num-thread");
    refuse(&["--max-loads", "0"], "--max-loads");
    refuse(&["--host", "0.0.0.0", "--port", "0"], "token");
    refuse(&["--listen", "somewhere"], "unix:/PATH");
    refuse(&["--host", "some where"], "--host");
    refuse(&["--quota", "32GB"], "PREFIX=SIZE");
    refuse(&["--log-format", "xml"], "json");
    refuse(&["--config", &path(&write("bad.toml", "mem_pool = 1"))], "mem_pool");
    refuse(&["--metrics-listen", "9473"], "HOST:PORT");
    refuse(&["--metrics-listen", "/run/metrics.sock"], "HOST:PORT");
    let short = path(&write("token", "short"));
    refuse(&["--token-file", &short], &format!("{short} is no token"));
    refuse(&["--token-file", &path(&write("long", &"t".repeat((64 << 10) + 1)))], "more than the 65536 bytes");
    // Files without an end.
    refuse(&["--token-file", "/dev/zero"], "/dev/zero has more than the 65536 bytes");
    refuse(&["--config", "/dev/zero"], "/dev/zero has more than the 1048576 bytes");
    let (code, text) = refused(dir.command().env("SLLM_STORE_TOKEN", "short"));
    assert!(code == Some(2) && text.contains("SLLM_STORE_TOKEN is no token"), "{text}");
    let (code, text) = refused(dir.command().env("STORAGE_PATH", "").env("HOME", "/missing"));
    assert!(code == Some(3) && text.contains("/missing/models") && text.contains("--storage-path"), "{text}");
    let (code, text) = refused(dir.command().args(["--config", "/missing.toml"]));
    assert_eq!(code, Some(3), "{text}");
    let (code, text) = refused(dir.command().args(["--storage-path", "/missing"]));
    assert_eq!(code, Some(3), "{text}");
}

#[test]
fn the_log_says_where_a_preload_went_and_that_a_pool_is_too_large() {
    let dir = Dir::new();
    fs::write(dir.path("models/m.safetensors"), test_support::safetensors(test_support::header(4), b"data")).unwrap();
    // What it says until the preload ended, well or not, and what it says of that.
    let log = |size: &str| {
        let mut server = dir.start(dir.command().args(["--mem-pool-size", size, "--preload", "m.safetensors"]));
        server.log_until("model=m.safetensors")
    };
    let (before, loaded) = log("32MB");
    assert!(loaded.contains("loaded") && loaded.contains("target=pool"), "{loaded}");
    assert!(!before.contains("--mem-pool-size"), "{before}");
    let (before, failed) = log("1000TB");
    assert!(failed.contains("failed") && failed.contains("target=pool"), "{failed}");
    assert!(before.contains("lower --mem-pool-size"), "{before}");
}

#[test]
fn flags_of_the_original_are_taken_and_go_before_the_file() {
    let dir = Dir::new();
    let (port, scrape) = (port(), port());
    let file = format!("mem_pool_size = '8MB'\nmetrics_listen = '127.0.0.1:{scrape}'\npin = ['missing']\n");
    fs::write(dir.path("c.toml"), file).unwrap();
    let mut command = dir.command();
    command.args(["--host", "127.0.0.1", "--port", &port.to_string(), "--registration-required", "False"]);
    command.args(["--mem-pool-size", "32MB", "--chunk-size", "8MB", "--num-thread", "4", "--disk-size", "128GB"]);
    command.arg("--config").arg(dir.path("c.toml"));
    let mut server = dir.start(&mut command);
    server.wait_for_port(port);
    server.wait_for_port(scrape);
    let capacity = format!("sllm_pool_bytes{{state=\"capacity\"}} {}", 32 << 20);
    assert!(metrics(scrape).contains(&capacity));
    // It pins what the file says in the background.
    let (before, _) = server.log_until("cannot be preloaded");
    assert!(before.contains("--disk-size is not used"), "{before}");
    server.signal("TERM");
    server.end();
}
