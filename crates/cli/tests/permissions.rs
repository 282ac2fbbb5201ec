//! What a user without the right to read or to write is told. Root has every right: there the command runs as another.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Fixture, model, sllm};

/// `nobody` and `nogroup`, who own nothing.
const NOBODY: u32 = 65534;

/// The command, run by somebody who is not root.
struct User {
    program: PathBuf,
    root: bool,
}

impl User {
    /// `None`, and a word why, where no other user can run it. The fixture's directory is opened to others.
    fn of(fixture: &Fixture) -> Option<User> {
        set_mode(fixture.dir.path(), 0o755);
        let root = fs::metadata("/proc/self").unwrap().uid() == 0;
        // The build folder may lie where only root may look. Copied by a process of its own: a file that this one
        // has open for writing, or a child that another test is just starting, cannot be run.
        let program = fixture.path("sllm-store");
        assert!(Command::new("cp").arg(sllm([""; 0]).get_program()).arg(&program).status().unwrap().success());
        set_mode(&program, 0o755);
        set_mode(&fixture.model.join("model.safetensors"), 0o644);
        let user = User { program, root };
        match user.command("--version").output() {
            Ok(output) if output.status.success() => Some(user),
            refused => {
                eprintln!("skipped: the command cannot be run as another user here: {refused:?}");
                None
            }
        }
    }

    fn command(&self, word: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(word)
            .current_dir("/")
            .env("HF_HUB_CACHE", "/nonexistent")
            .env("XDG_CACHE_HOME", "/proc/nonexistent");
        if self.root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    /// Asserts that the command is refused because of `named`.
    #[track_caller]
    fn refused(&self, word: &str, paths: &[&Path], named: &Path) {
        let Output { status, stdout, stderr } = self.command(word).args(paths).arg("--json").output().unwrap();
        let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
        assert_eq!(status.code(), Some(6), "{word}: {stdout}{stderr}");
        let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(json["error"]["kind"], "permission", "{stdout}");
        assert!(stderr.contains(named.to_str().unwrap()), "{word}: {stderr} does not name {named:?}");
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_directory_that_may_not_be_opened_is_6_and_named() {
    let fixture = model();
    let store = fixture.store();
    let Some(user) = User::of(&fixture) else { return };
    for (path, words) in [(&fixture.model, &["convert", "inspect", "load"][..]), (&store, &["verify", "export"][..])] {
        set_mode(path, if user.root { 0o700 } else { 0 });
        for &word in words {
            let target = fixture.path("target");
            let paths = if matches!(word, "convert" | "export") { vec![&**path, &*target] } else { vec![&**path] };
            user.refused(word, &paths, path);
            assert!(!target.exists());
        }
        // A path below it: whether it is there is not known, so that "not found" would be a guess.
        user.refused("inspect", &[&path.join("below")], &path.join("below"));
        set_mode(path, 0o755);
    }
}

#[test]
fn a_file_that_may_not_be_read_is_6_and_named() {
    let fixture = model();
    let store = fixture.store();
    let Some(user) = User::of(&fixture) else { return };
    for (path, file) in [(&fixture.model, "model.safetensors"), (&store, "manifest.json"), (&store, "tensor.data_0")] {
        let file = path.join(file);
        set_mode(&file, if user.root { 0o600 } else { 0 });
        user.refused("load", &[path], &file);
        set_mode(&file, 0o644);
    }
    // A file beside the weights is read when it is copied.
    let (config, target) = (fixture.model.join("config.json"), fixture.path("open/target"));
    fs::create_dir(fixture.path("open")).unwrap();
    set_mode(&fixture.path("open"), 0o777);
    set_mode(&config, if user.root { 0o600 } else { 0 });
    user.refused("convert", &[&fixture.model, &target], &config);
    assert!(!target.exists());
}

#[test]
fn a_place_that_may_not_be_written_to_is_6_and_named() {
    let fixture = model();
    let store = fixture.store();
    let Some(user) = User::of(&fixture) else { return };
    let closed = fixture.path("closed");
    fs::create_dir(&closed).unwrap();
    set_mode(&closed, if user.root { 0o755 } else { 0o555 });
    for (word, source) in [("convert", &fixture.model), ("export", &store)] {
        user.refused(word, &[source, &closed.join("target")], &closed);
        assert_eq!(fs::read_dir(&closed).unwrap().count(), 0);
    }
    set_mode(&closed, 0o755);
}
