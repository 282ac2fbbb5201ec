//! The commands that ask a store server.

mod common;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Ran, model, sllm};

/// A server of a directory, killed when this is dropped.
struct Server(Child, String);

impl Server {
    fn start(models: &Path) -> Server {
        let socket = models.join("socket");
        let address = format!("unix:{}", socket.display());
        let mut command = Command::new(assert_cmd::cargo::cargo_bin("sllm-store"));
        command.args(["start", "--mem-pool-size", "64MB", "--storage-path"]).arg(models);
        command.arg("--listen").arg(&socket);
        let mut server = Server(command.stderr(Stdio::null()).spawn().unwrap(), address);
        while UnixStream::connect(&socket).is_err() {
            assert!(server.0.try_wait().unwrap().is_none(), "the server ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// What a command says of it, which must succeed.
    fn asked(&self, args: &[&str]) -> Ran {
        let ran = ran(&[args, &["--address", &self.1]].concat());
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
        ran
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ran(args: &[&str]) -> Ran {
    let mut command = sllm(args);
    let output = command.env("XDG_RUNTIME_DIR", "/proc/nonexistent").env_remove("SLLM_STORE_ADDRESS").output().unwrap();
    Ran {
        code: output.status.code().expect("the command was killed"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn without_a_server_every_command_says_where_it_looked_and_what_to_do() {
    for words in [&["list"][..], &["status"], &["preload", "m"], &["pin", "m"], &["unpin", "m"], &["evict", "m"]] {
        let args = [words, &["--address", "/nonexistent/s", "--json"]].concat();
        let ran = ran(&args);
        assert_eq!(ran.code, 11, "{words:?}: {}", ran.stderr);
        let error = &ran.json()["error"];
        assert_eq!(error["kind"], "server");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("unix:/nonexistent/s") && message.contains("sllm-store start"), "{message}");
        assert!(ran.stderr.starts_with("error: no store server answers at "), "{}", ran.stderr);
    }
    // As where the variable is empty.
    assert_eq!(ran(&["list", "--address", ""]).code, 11);
}

#[test]
fn arguments_that_make_no_sense_are_refused_before_a_server_is_asked() {
    for args in [
        &["preload", "--address", "/nonexistent/s"][..],
        &["pin"],
        &["evict"],
        &["evict", "m", "--all"],
        &["status", "--watch", "--json"],
        &["status", "--watch", "--quiet"],
        &["list", "--address", "https://host:1"],
        &["list", "--address", "no-port"],
    ] {
        let ran = ran(args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.stderr);
    }
    let evict = ran(&["evict", "--json"]);
    assert_eq!(evict.json()["error"]["message"], "the following required arguments were not provided: <MODEL|--all>");
}

#[test]
fn a_token_file_that_cannot_be_read_is_named() {
    let ran = ran(&["list", "--address", "localhost:1", "--token-file", "/nonexistent/token"]);
    assert_eq!(ran.code, 3);
    assert!(ran.stderr.contains("/nonexistent/token"), "{}", ran.stderr);
}

#[test]
fn a_token_file_without_an_end_is_refused() {
    let ran = ran(&["list", "--address", "localhost:1", "--token-file", "/dev/zero"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("/dev/zero has more than the 65536 bytes"), "{}", ran.stderr);
}

#[test]
fn a_load_goes_on_from_files_where_no_server_is_and_notes_it() {
    let fixture = model();
    let path = fixture.model.to_str().unwrap();
    for server in ["--server=/nonexistent/s", "--server"] {
        let ran = ran(&["load", path, "--device", "host", "--json", server]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let note = ran.json()["runs"][0]["notes"][0].as_str().unwrap().to_owned();
        assert!(note.contains("no store server answers") && note.ends_with("files are read"), "{note}");
    }
    assert_eq!(ran(&["load", path, "--server=nothing"]).code, 2);
}

#[test]
fn a_server_is_asked_and_told() {
    let fixture = model();
    let server = Server::start(fixture.dir.path());
    let preloaded = server.asked(&["preload", "model", "--pin", "--json"]).json();
    let len = preloaded["models"][0]["bytes"].as_u64().unwrap();
    assert!(len > 70_000 && preloaded["models"][0]["pinned"] == true);
    let listed = server.asked(&["list", "--json"]).json();
    assert_eq!((&listed["models"][0]["name"], &listed["models"][0]["pinned"]), (&"model".into(), &true.into()));
    let text = server.asked(&["list"]).stdout;
    let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert!(row.contains(&"yes") && row.contains(&"100") && row.ends_with(&["safetensors", "model"]), "{text}");
    let status = server.asked(&["status", "--json"]).json();
    assert!(status["pool"]["pinned"].as_u64().unwrap() >= len && status["models"][0]["name"] == "model");
    let text = server.asked(&["status"]).stdout;
    assert!(text.contains(&server.1) && text.contains("of it pinned") && text.contains("safetensors"), "{text}");
    assert_eq!(server.asked(&["unpin", "model", "--json"]).json()["pinned"], false);
    assert!(server.asked(&["pin", "model"]).stdout.starts_with("model: pinned, "));
    server.asked(&["unpin", "model"]);
    assert!(server.asked(&["evict", "model", "--json"]).json()["bytes"].as_u64().unwrap() >= len);
    assert_eq!(server.asked(&["evict", "--all"]).stdout, "0 B evicted\n");
    let error = ran(&["pin", "none", "--address", &server.1]);
    assert_eq!(error.code, 3, "{}", error.stderr);
    let (path, server_at) = (fixture.model.to_str().unwrap(), format!("--server={}", server.1));
    let loaded = ran(&["load", path, "--device", "host", "--repeat", "2", "--json", &server_at]).json();
    for run in loaded["runs"].as_array().unwrap() {
        assert_eq!((&run["engines"][0]["engine"], run["notes"].as_array().unwrap().len()), (&"server".into(), 0));
    }
}

#[test]
fn a_preload_says_how_much_of_a_model_stays() {
    let fixture = model();
    let large = fixture.path("large.safetensors");
    let len = 80u64 << 20; // the pool has 64 MiB
    let head = test_support::safetensors(test_support::header(len), &[]);
    std::fs::write(&large, &head).unwrap();
    std::fs::OpenOptions::new().write(true).open(&large).unwrap().set_len(head.len() as u64 + len).unwrap();
    let server = Server::start(fixture.dir.path());
    for name in ["large.safetensors", "./large.safetensors", large.to_str().unwrap()] {
        let told = server.asked(&["preload", name, "--json"]).json();
        assert_eq!(told["models"][0]["bytes"], head.len() as u64 + len);
        let resident = told["models"][0]["resident"].as_u64().unwrap();
        assert!(resident > 0 && resident < len, "{name}: {told}");
        let text = server.asked(&["preload", name]).stdout;
        assert!(text.contains(" of 80.00 MiB in the server's memory"), "{text}");
    }
    let told = server.asked(&["preload", "model", "--json"]).json();
    assert_eq!(told["models"][0]["bytes"], told["models"][0]["resident"]);
}

#[test]
fn a_watched_status_is_shown_until_ctrl_c() {
    use std::io::{BufRead, BufReader};
    let fixture = model();
    let server = Server::start(fixture.dir.path());
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("sllm-store"));
    let mut child = command.args(["status", "--watch", "--address", &server.1]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // Twice, and once without its server.
    assert_eq!(lines.by_ref().filter(|line| line.as_ref().unwrap().starts_with("server ")).take(2).count(), 2);
    drop(server);
    assert!(lines.any(|line| line.unwrap().contains("store server")));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_watched_status_that_cannot_be_written_is_8() {
    let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") else { return };
    let fixture = model();
    let server = Server::start(fixture.dir.path());
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("sllm-store"));
    let output = command.args(["status", "--watch", "--address", &server.1]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(8));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write to standard output"), "{output:?}");
}
