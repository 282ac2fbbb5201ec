//! The commands that ask a store server.

mod common;

use common::{Ran, model, sllm};

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
}

#[test]
fn arguments_that_make_no_sense_are_refused_before_a_server_is_asked() {
    for args in [
        &["preload", "--address", "/nonexistent/s"][..],
        &["pin"],
        &["evict"],
        &["evict", "m", "--all"],
        &["status", "--watch", "--json"],
        &["list", "--address", "https://host:1"],
        &["list", "--address", "no-port"],
    ] {
        let ran = ran(args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.stderr);
    }
}

#[test]
fn a_token_file_that_cannot_be_read_is_named() {
    let ran = ran(&["list", "--address", "localhost:1", "--token-file", "/nonexistent/token"]);
    assert_eq!(ran.code, 3);
    assert!(ran.stderr.contains("/nonexistent/token"), "{}", ran.stderr);
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
