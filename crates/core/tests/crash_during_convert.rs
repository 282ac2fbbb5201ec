//! A conversion that is killed leaves the old store or the whole new one, and the next run goes on.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Made, assert_holds, entries, write_safetensors};
use sllm_core::{Checkpoint, Control, ConvertOptions, Dtype, WorkOptions, convert, verify};
use tempfile::tempdir;

const SOURCE: &str = "SLLM_TEST_CONVERT_SOURCE";
const TARGET: &str = "SLLM_TEST_CONVERT_TARGET";
const CHUNK_MS: &str = "SLLM_TEST_CONVERT_CHUNK_MS";

/// Not a test: what the children of the tests below run. Says `chunk` after every chunk, and takes its time.
#[test]
#[ignore = "run by the other tests, as a process of its own"]
fn child() {
    let var = |name: &str| std::env::var(name).unwrap();
    let pause = Duration::from_millis(var(CHUNK_MS).parse().unwrap());
    let control = Control::new().on_progress(move |_| {
        println!("chunk");
        std::thread::sleep(pause);
    });
    let options = ConvertOptions::new().threads(2).overwrite(true).control(control);
    convert(&Checkpoint::open(var(SOURCE)).unwrap(), Path::new(&var(TARGET)), &options).unwrap();
}

fn spawn(source: &Path, target: &Path, chunk_ms: u32) -> Child {
    command(source, target, chunk_ms, None).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn command(source: &Path, target: &Path, chunk_ms: u32, launcher: Option<&str>) -> Command {
    let program = std::env::current_exe().unwrap();
    let mut command = match launcher {
        Some(script) => {
            let mut command = Command::new("sh");
            command.args(["-c", script]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.args(["--exact", "child", "--ignored", "--nocapture"]);
    command.env(SOURCE, source).env(TARGET, target).env(CHUNK_MS, chunk_ms.to_string());
    command
}

/// A checkpoint of ten chunks whose bytes depend on its name.
fn model(dir: &Path, name: &str) -> (std::path::PathBuf, Vec<Made>) {
    let tensors: Vec<Made> = (0..4).map(|i| Made::new(&format!("{name}{i}"), Dtype::U8, &[(10 << 20) - i])).collect();
    let path = dir.join(name);
    fs::create_dir(&path).unwrap();
    write_safetensors(&path.join("model.safetensors"), &tensors, None);
    fs::write(path.join("config.json"), name).unwrap();
    (path, tensors)
}

/// What stands at `target` is one of `models`, whole; says which.
fn assert_whole(target: &Path, models: &[&[Made]]) -> usize {
    let store = Checkpoint::open(target).unwrap();
    let mut names = entries(target);
    // Left where it was killed right after the renaming.
    names.retain(|name| name != ".sllm-journal");
    assert_eq!(names, ["config.json", "manifest.json", "tensor.data_0", "tensor_index.json"]);
    assert!(verify(&store, &WorkOptions::new()).unwrap().corrupt.is_empty());
    let which = models.iter().position(|tensors| store.tensor(&tensors[0].name).is_ok()).unwrap();
    assert_holds(&store, models[which]);
    which
}

/// Kills a child once it has lived for `delay`. Whether that was before its end.
fn kill_after(mut child: Child, delay: Duration) -> bool {
    std::thread::sleep(delay);
    child.kill().unwrap();
    child.wait().unwrap().signal() == Some(9)
}

/// Moments from 0 to `longest`, in an order in which early and late ones alternate.
fn moment(i: u32, longest: Duration) -> Duration {
    longest * (i * 37 % 50) / 50
}

#[test]
fn killed_at_any_moment_there_is_no_target_or_the_whole_store() {
    let dir = tempdir().unwrap();
    let (source, tensors) = model(dir.path(), "new");
    let target = dir.path().join("store");
    let start = Instant::now();
    assert!(spawn(&source, &target, 8).wait().unwrap().success());
    let longest = start.elapsed() * 5 / 4;
    fs::remove_dir_all(&target).unwrap();

    let (mut killed, mut whole) = (0, 0);
    for i in 0.. {
        killed += u32::from(kill_after(spawn(&source, &target, 8), moment(i, longest)));
        if target.exists() {
            assert_whole(&target, &[&tensors]);
            fs::remove_dir_all(&target).unwrap();
            whole += 1;
        }
        if killed == 50 {
            break;
        }
        assert!(i < 500, "the conversion is too fast to be killed: {killed} of 50, {whole} whole");
    }

    let partial = dir.path().join(".store.sllm-partial");
    let _ = fs::remove_dir_all(partial);

    // Killed once more, for certain after a chunk was noted and before the end: the last run goes on from there.
    let mut child = command(&source, &target, 200, None).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.map_while(Result::ok).filter(|line| line.contains("chunk")).take(3).count(), 3);
    child.kill().unwrap();
    child.wait().unwrap();
    let report = convert(&Checkpoint::open(&source).unwrap(), &target, &ConvertOptions::new()).unwrap();
    assert!(report.resumed_bytes > 0 && report.resumed_bytes < report.bytes, "{report:?}");
    assert_whole(&target, &[&tensors]);
    assert_eq!(entries(dir.path()), ["new", "store"]);
}

#[test]
fn killed_at_any_moment_there_is_the_old_store_or_the_new_one() {
    let dir = tempdir().unwrap();
    let (one, two) = (model(dir.path(), "one"), model(dir.path(), "two"));
    let models = [&one.1[..], &two.1[..]];
    let sources = [&one.0, &two.0];
    let target = dir.path().join("store");
    let start = Instant::now();
    for source in sources {
        assert!(spawn(source, &target, 8).wait().unwrap().success());
    }
    let longest = start.elapsed() * 5 / 8;

    let (mut killed, mut current) = (0, 1);
    for i in 0.. {
        killed += u32::from(kill_after(spawn(sources[1 - current], &target, 8), moment(i, longest)));
        current = assert_whole(&target, &models);
        if killed == 50 {
            break;
        }
        assert!(i < 500, "the conversion is too fast to be killed: {killed} of 50");
    }
    let options = ConvertOptions::new().overwrite(true);
    convert(&Checkpoint::open(sources[1 - current]).unwrap(), &target, &options).unwrap();
    assert_eq!(assert_whole(&target, &models), 1 - current);
    assert_eq!(entries(dir.path()), ["one", "store", "two"]);
}

#[test]
fn a_write_that_the_system_refuses_leaves_the_old_store() {
    let dir = tempdir().unwrap();
    let (one, two) = (model(dir.path(), "one"), model(dir.path(), "two"));
    let target = dir.path().join("store");
    convert(&Checkpoint::open(&one.0).unwrap(), &target, &ConvertOptions::new()).unwrap();
    // No file over 20 MB, and an error instead of a signal for it.
    let launcher = "trap '' XFSZ; ulimit -f 40000; exec \"$0\" \"$@\"";
    let output = command(&two.0, &target, 0, Some(launcher)).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && message.contains("FileTooLarge"), "{message}");
    assert_whole(&target, &[&one.1]);
    convert(&Checkpoint::open(&two.0).unwrap(), &target, &ConvertOptions::new().overwrite(true)).unwrap();
    assert_whole(&target, &[&two.1]);
    assert_eq!(entries(dir.path()), ["one", "store", "two"]);
}
