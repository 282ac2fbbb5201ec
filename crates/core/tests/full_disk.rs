//! A file system that gets full in the middle of a conversion: the old store stays, and nothing half-made.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Made, assert_holds, entries, read_safetensors, refuse_syscall, write_safetensors};
use sllm_core::{Checkpoint, Control, ConvertOptions, Dtype, Error, ErrorKind, WorkOptions, convert, verify};

const SOURCES: &str = "SLLM_TEST_FULL_SOURCES";
const MOUNT: &str = "SLLM_TEST_FULL_MOUNT";
const RESERVES: &str = "SLLM_TEST_FULL_RESERVES";

/// The file system's size: enough for the old store, the new one and some more, as it says at the start.
const SIZE_MIB: u32 = 64;

/// Not a test: what the tests below run, in a process that sees a small file system at `MOUNT`.
#[test]
#[ignore = "run by the other tests, as a process of its own"]
fn child() {
    let path = |name: &str| PathBuf::from(std::env::var_os(name).unwrap());
    let (sources, mount) = (path(SOURCES), path(MOUNT));
    let reserves = std::env::var(RESERVES).unwrap() == "true";
    if !reserves {
        // As on file systems that do not reserve space: the writes themselves meet the full disk.
        refuse_syscall(libc::SYS_fallocate, libc::EOPNOTSUPP);
    }
    let target = mount.join("store");
    convert(&Checkpoint::open(sources.join("old")).unwrap(), &target, &ConvertOptions::new()).unwrap();
    let old = Checkpoint::open(&target).unwrap().identity().unwrap().to_owned();

    // Another writer takes all that is left once the first chunk is written.
    let filler = mount.join("filler");
    let (at, options) = (filler.clone(), ConvertOptions::new().threads(1).overwrite(true));
    let fill = Control::new().on_progress(move |_| {
        if !at.exists() {
            fill_up(&at)
        }
    });
    let source = Checkpoint::open(sources.join("new")).unwrap();
    let error = convert(&source, &target, &options.clone().control(fill)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
    // In the middle of the work, and not what was asked of the file system beforehand.
    let Error::Io { path, .. } = &error else { panic!("{error}") };
    assert_eq!(path.ends_with("tensor.data_0"), !reserves, "{error}");
    assert!(error.to_string().contains(mount.to_str().unwrap()), "{error}");

    assert_eq!(entries(&mount), ["filler", "store"], "something half-made is left");
    let store = Checkpoint::open(&target).unwrap();
    assert_eq!(store.identity(), Some(old.as_str()));
    assert!(verify(&store, &WorkOptions::new()).unwrap().corrupt.is_empty());
    drop(store);

    fs::remove_file(&filler).unwrap();
    convert(&source, &target, &options).unwrap();
    assert_ne!(Checkpoint::open(&target).unwrap().identity(), Some(old.as_str()));
    assert_eq!(entries(&mount), ["store"]);
    println!("the disk was full: {}", error.chain());
}

/// Writes until nothing is left.
fn fill_up(path: &Path) {
    let mut file = File::create(path).unwrap();
    for len in [1 << 20, 4096] {
        let error = loop {
            if let Err(error) = file.write_all(&vec![7; len]) {
                break error;
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }
}

/// Runs a program with a small file system of its own at `mount`; `None` where that is refused.
fn on_a_small_disk(mount: &Path, program: &Path, set_up: impl Fn(&mut Command)) -> Option<Output> {
    // The second way needs no root: a user is one in a name space of its own.
    for unshare in [&["-m"][..], &["-r", "-m"][..]] {
        let script = format!("mount -t tmpfs -o size={SIZE_MIB}m tmpfs \"$1\" || exit 77; shift; exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(unshare).args(["sh", "-c", &script, "sh"]).arg(mount);
        if !command.args(["true"]).output().is_ok_and(|output| output.status.success()) {
            continue;
        }
        let mut command = Command::new("unshare");
        command.args(unshare).args(["sh", "-c", &script, "sh"]).arg(mount).arg(program);
        set_up(&mut command);
        return Some(command.output().unwrap());
    }
    None
}

fn fills_up(reserves: bool) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (sources, mount) = (dir.path().join("sources"), dir.path().join("mount"));
    let mut made = Vec::new();
    for (name, len) in [("old", 5 << 20), ("new", 20 << 20)] {
        let tensors = vec![Made::new(name, Dtype::U8, &[len])];
        fs::create_dir_all(sources.join(name)).unwrap();
        write_safetensors(&sources.join(name).join("model.safetensors"), &tensors, None);
        // What is copied last, and not reserved.
        fs::write(sources.join(name).join("tokenizer.json"), vec![b' '; 1 << 20]).unwrap();
        made.push(tensors);
    }
    fs::create_dir(&mount).unwrap();
    let output = on_a_small_disk(&mount, &std::env::current_exe().unwrap(), |command| {
        command.args(["--exact", "child", "--ignored", "--nocapture"]);
        command.env(SOURCES, &sources).env(MOUNT, &mount).env(RESERVES, reserves.to_string());
    });
    let Some(output) = output else {
        eprintln!("skipped: no file system can be mounted here (unshare -m, mount -t tmpfs)");
        return;
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("the disk was full: "), "{said}");
    for (name, tensors) in ["old", "new"].iter().zip(&made) {
        assert_eq!(entries(&sources.join(name)), ["model.safetensors", "tokenizer.json"]);
        assert_holds(&Checkpoint::open(sources.join(name)).unwrap(), tensors);
        let (_, read) = read_safetensors(&sources.join(name).join("model.safetensors"));
        assert_eq!(read.len(), 1);
    }
}

#[test]
fn a_disk_that_fills_up_under_reserved_files_leaves_the_old_store() {
    fills_up(true);
}

#[test]
fn a_disk_that_fills_up_under_the_writes_leaves_the_old_store() {
    fills_up(false);
}
