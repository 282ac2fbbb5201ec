//! Conversions and exports that cannot end: what they leave is taken up by the next run, or is not left.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Made, assert_holds, entries, refuse_syscall, write_safetensors, write_sharded};
use sllm_core::{Checkpoint, Control, ConvertOptions, Dtype, ErrorKind, WorkOptions, convert, export, interrupted};
use tempfile::tempdir;

/// A directory `model` below `dir` with a shard of two chunks and side files, all in a directory `sub`.
fn model_in_sub(dir: &Path) -> (PathBuf, Vec<Made>) {
    let source = dir.join("model");
    fs::create_dir_all(source.join("sub")).unwrap();
    let tensors = vec![Made::new("w", Dtype::U8, &[6 << 20])];
    write_sharded(&source, &[("sub/w.safetensors", &tensors)]);
    for name in ["sub/a.json", "sub/z.json"] {
        fs::write(source.join(name), name).unwrap();
    }
    (source, tensors)
}

#[test]
fn an_export_goes_on_where_side_files_lie_beside_a_shard() {
    let dir = tempdir().unwrap();
    let (source, tensors) = model_in_sub(dir.path());
    let (store, back) = (dir.path().join("store"), dir.path().join("back"));
    convert(&Checkpoint::open(source).unwrap(), &store, &ConvertOptions::new()).unwrap();
    let store_opened = Checkpoint::open(&store).unwrap();
    let z = store.join("sub/z.json");
    let gone = z.clone();
    let control = Control::new().on_progress(move |_| drop(fs::remove_file(&gone)));
    let error = export(&store_opened, &back, &WorkOptions::new().control(control)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let partial = interrupted(&back).unwrap();
    assert_eq!(entries(&partial.join("sub")), ["a.json", "w.safetensors"]);

    // What no run of this program left goes too.
    fs::write(&z, "put back").unwrap();
    fs::create_dir(partial.join("sub/deep")).unwrap();
    fs::write(partial.join("sub/deep/x"), "").unwrap();
    std::os::unix::fs::symlink("w.safetensors", partial.join("sub/z.json")).unwrap();
    let report = export(&store_opened, &back, &WorkOptions::new()).unwrap();
    assert_eq!(report.resumed_bytes, report.bytes);
    assert_holds(&Checkpoint::open(&back).unwrap(), &tensors);
    assert_eq!(entries(&back), ["model.safetensors.index.json", "sub"]);
    assert_eq!(entries(&back.join("sub")), ["a.json", "w.safetensors", "z.json"]);
    assert_eq!(fs::read_to_string(back.join("sub/z.json")).unwrap(), "put back");
    assert_eq!(entries(dir.path()), ["back", "model", "store"]);
}

#[test]
fn names_that_are_taken_are_told_before_anything_is_written() {
    let dir = tempdir().unwrap();
    let (source, store) = (dir.path().join("model"), dir.path().join("store"));
    fs::create_dir(&source).unwrap();
    write_safetensors(&source.join("model.safetensors"), &[Made::new("w", Dtype::U8, &[9])], None);
    let nothing = |_| panic!("bytes were written");
    let options = WorkOptions::new().control(Control::new().on_progress(nothing));

    // A directory of side files with the name of a data file.
    fs::create_dir(source.join("tensor.data_0")).unwrap();
    fs::write(source.join("tensor.data_0/x.json"), "").unwrap();
    let convert_options = ConvertOptions::new().control(Control::new().on_progress(nothing));
    let error = convert(&Checkpoint::open(&source).unwrap(), &store, &convert_options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Format);
    let message = error.to_string();
    assert!(message.contains("\"tensor.data_0/x.json\" cannot be written: \"tensor.data_0\""), "{message}");
    assert_eq!(entries(dir.path()), ["model"]);
    fs::remove_dir_all(source.join("tensor.data_0")).unwrap();

    // Shards with names of side files and of what the writer adds: a manifest may say so.
    fs::create_dir(source.join("sub")).unwrap();
    fs::write(source.join("sub/config.json"), "").unwrap();
    convert(&Checkpoint::open(&source).unwrap(), &store, &ConvertOptions::new()).unwrap();
    let manifest = fs::read_to_string(store.join("manifest.json")).unwrap();
    let named = "\"files\":[{\"name\":\"model.safetensors\",\"metadata\"";
    assert_eq!(manifest.matches(named).count(), 1);
    for name in [
        "sub",
        "sub/config.json",
        "sub/config.json/w",
        "manifest.json",
        "tensor_index.json",
        "tensor_index.json/w",
        "model.safetensors.index.json",
        ".sllm-journal",
        ".sllm-journal/w",
    ] {
        fs::write(store.join("manifest.json"), manifest.replace(named, &named.replace("model.safetensors", name)))
            .unwrap();
        let error = export(&Checkpoint::open(&store).unwrap(), &dir.path().join("back"), &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Format, "{error}");
        assert!(error.to_string().contains("cannot be written: "), "{error}");
        assert_eq!(entries(dir.path()), ["model", "store"], "{name}");
    }
}

#[test]
fn a_store_is_replaced_where_directories_cannot_be_exchanged_and_old_ones_are_left() {
    let dir = tempdir().unwrap();
    let store = dir.path().join("store");
    let make = |name: &str| {
        let (path, made) = (dir.path().join(format!("{name}.safetensors")), vec![Made::new(name, Dtype::U8, &[9])]);
        write_safetensors(&path, &made, None);
        (Checkpoint::open(&path).unwrap(), made)
    };
    let models = [make("one"), make("two")];
    let options = ConvertOptions::new().overwrite(true);
    // What a run left that was killed, what one left that could not remove it, and what nobody can.
    for (name, leave) in [
        (
            ".store.sllm-old",
            &(|path: &Path| fs::create_dir(path).and_then(|()| fs::write(path.join("x"), "")).unwrap())
                as &dyn Fn(&Path),
        ),
        (".store.sllm-old", &|path| fs::write(path, "").unwrap()),
    ] {
        let _ = fs::remove_dir_all(&store);
        convert(&models[0].0, &store, &options).unwrap();
        leave(&dir.path().join(name));
        std::thread::scope(|scope| {
            let replace = || {
                refuse_syscall(libc::SYS_renameat2, libc::EINVAL);
                for (model, made) in models.iter().rev() {
                    convert(model, &store, &options).unwrap();
                    assert_holds(&Checkpoint::open(&store).unwrap(), made);
                }
            };
            scope.spawn(replace).join().unwrap();
        });
        let left = if dir.path().join(name).exists() { vec![name] } else { vec![] };
        assert_eq!(entries(dir.path()), [left, vec!["one.safetensors", "store", "two.safetensors"]].concat());
    }
}

#[test]
fn a_target_that_appears_meanwhile_costs_no_work() {
    let dir = tempdir().unwrap();
    let (path, store) = (dir.path().join("model.safetensors"), dir.path().join("store"));
    let tensors = [Made::new("w", Dtype::U8, &[6 << 20])];
    write_safetensors(&path, &tensors, None);
    let source = Checkpoint::open(&path).unwrap();
    let appear = store.clone();
    let control = Control::new().on_progress(move |_| drop(fs::create_dir(&appear)));
    let error = convert(&source, &store, &ConvertOptions::new().control(control)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    assert!(interrupted(&store).is_some());
    fs::remove_dir(&store).unwrap();
    let report = convert(&source, &store, &ConvertOptions::new()).unwrap();
    assert_eq!(report.resumed_bytes, report.bytes);
    assert_holds(&Checkpoint::open(&store).unwrap(), &tensors);
}

#[test]
fn a_renaming_that_is_refused_costs_no_work() {
    let dir = tempdir().unwrap();
    let (path, store) = (dir.path().join("model.safetensors"), dir.path().join("store"));
    let tensors = [Made::new("w", Dtype::U8, &[6 << 20])];
    write_safetensors(&path, &tensors, None);
    let (source, options) = (Checkpoint::open(&path).unwrap(), ConvertOptions::new().overwrite(true));
    // First where nothing stands, then over a store.
    for errno in [libc::EIO, libc::EPERM, libc::EBUSY] {
        let before = entries(dir.path());
        std::thread::scope(|scope| {
            let refused = || {
                refuse_syscall(libc::SYS_renameat2, errno);
                convert(&source, &store, &options).unwrap_err()
            };
            let error = scope.spawn(refused).join().unwrap();
            assert!(error.to_string().contains("rename the finished directory"), "{error}");
        });
        assert_eq!(entries(dir.path()), [vec![".store.sllm-partial".to_owned()], before].concat());
        assert!(interrupted(&store).is_some());
        let report = convert(&source, &store, &options).unwrap();
        assert_eq!((report.resumed_bytes, report.not_removed), (report.bytes, None));
        assert_holds(&Checkpoint::open(&store).unwrap(), &tensors);
        assert_eq!(entries(&store), ["manifest.json", "tensor.data_0", "tensor_index.json"]);
        assert_eq!(entries(dir.path()), ["model.safetensors", "store"]);
    }
}

#[test]
fn an_old_store_that_cannot_be_removed_is_named_and_in_nobodys_way() {
    let dir = tempdir().unwrap();
    let (path, store) = (dir.path().join("model.safetensors"), dir.path().join("store"));
    let tensors = [Made::new("w", Dtype::U8, &[9])];
    write_safetensors(&path, &tensors, None);
    let (source, options) = (Checkpoint::open(&path).unwrap(), ConvertOptions::new().overwrite(true));
    convert(&source, &store, &options).unwrap();
    std::thread::scope(|scope| {
        let replace = || {
            // What is below a directory is removed so.
            refuse_syscall(libc::SYS_unlinkat, libc::EACCES);
            for old in [".store.sllm-old", ".store.sllm-old-1"] {
                let report = convert(&source, &store, &options).unwrap();
                assert_eq!(report.not_removed, Some(dir.path().canonicalize().unwrap().join(old)));
                assert_holds(&Checkpoint::open(&store).unwrap(), &tensors);
            }
        };
        scope.spawn(replace).join().unwrap();
    });
    assert_eq!(entries(dir.path()), [".store.sllm-old", ".store.sllm-old-1", "model.safetensors", "store"]);
    // The next replacement that can, removes all.
    assert_eq!(convert(&source, &store, &options).unwrap().not_removed, None);
    assert_eq!(entries(dir.path()), ["model.safetensors", "store"]);
}

/// Where the processes of the last tests find an overlay, or what is mounted.
const MOUNTED: &str = "SLLM_TEST_INTERRUPTED_MOUNTED";

/// Runs a test that is none by itself, in a process that has mounts of its own, which `mount` makes in `dir`. What it said; `None`
/// where nothing can be mounted.
fn with_mounts(dir: &Path, mount: &str, test: &str) -> Option<String> {
    let script = format!("cd \"$0\" && {mount} || exit 77; exec \"$@\" --exact {test} --ignored --nocapture");
    let mut command = Command::new("unshare");
    command.args(["-r", "-m", "sh", "-c", &script]).arg(dir).arg(std::env::current_exe().unwrap());
    let output = command.env(MOUNTED, dir).output();
    let output = output.ok().filter(|output| output.status.success() || output.status.code() == Some(101))?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    Some(said.into_owned())
}

/// Not a test: what the test below runs, in a process that sees `store` as a mount point.
#[test]
#[ignore = "run by the test below, as a process of its own"]
fn on_mount_point() {
    let dir = PathBuf::from(std::env::var_os(MOUNTED).unwrap());
    let (source, store) = (Checkpoint::open(dir.join("model.safetensors")).unwrap(), dir.join("store"));
    let control = Control::new().on_progress(|_| panic!("bytes were written"));
    let options = ConvertOptions::new().overwrite(true);
    let error = convert(&source, &store, &options.clone().control(control)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("store is a mount point") && error.to_string().contains("below it"), "{error}");
    assert_eq!(entries(&dir), ["model.safetensors", "store"]);
    for _ in 0..2 {
        convert(&source, &store.join("below"), &options).unwrap();
    }
    assert_eq!(entries(&store), ["below"]);
    println!("refused on the mount point");
}

#[test]
fn a_mount_point_is_not_replaced_and_that_is_told_before_anything_is_written() {
    let dir = tempdir().unwrap();
    fs::create_dir(dir.path().join("store")).unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), &[Made::new("w", Dtype::U8, &[9])], None);
    match with_mounts(dir.path(), "mount -t tmpfs tmpfs store", "on_mount_point") {
        Some(said) => assert!(said.contains("refused on the mount point"), "{said}"),
        None => eprintln!("skipped: nothing can be mounted here"),
    }
}

/// Not a test: what the test below runs, in a process that sees an overlay, `store` in its lower layer.
#[test]
#[ignore = "run by the test below, as a process of its own"]
fn on_overlay() {
    let merged = PathBuf::from(std::env::var_os(MOUNTED).unwrap()).join("merged");
    let (source, options) = (Checkpoint::open(merged.join("model.safetensors")).unwrap(), ConvertOptions::new());
    let error = convert(&source, &merged.join("store"), &options.clone().overwrite(true)).unwrap_err();
    assert!(error.kind() == ErrorKind::Io && error.chain().contains("remove it first"), "{}", error.chain());
    assert_holds(&Checkpoint::open(merged.join("store")).unwrap(), &[Made::new("old", Dtype::U8, &[9])]);
    fs::remove_dir_all(merged.join("store")).unwrap();
    let report = convert(&source, &merged.join("store"), &options).unwrap();
    assert_eq!(report.resumed_bytes, report.bytes);
    // What lies in the upper layer is replaced.
    for _ in 0..2 {
        convert(&source, &merged.join("upper"), &options.clone().overwrite(true)).unwrap();
    }
    assert_holds(&Checkpoint::open(merged.join("upper")).unwrap(), &[Made::new("new", Dtype::U8, &[9])]);
    assert_eq!(entries(&merged), ["model.safetensors", "old.safetensors", "store", "upper"]);
    println!("replaced on the overlay");
}

#[test]
fn a_store_in_a_lower_layer_of_an_overlay_is_not_replaced_and_the_error_says_why() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let lower = dir.path().join("lower");
    for (file, name) in [("old.safetensors", "old"), ("model.safetensors", "new")] {
        write_safetensors(&lower.join(file), &[Made::new(name, Dtype::U8, &[9])], None);
    }
    let old = Checkpoint::open(lower.join("old.safetensors")).unwrap();
    convert(&old, &lower.join("store"), &ConvertOptions::new()).unwrap();
    let mount = "mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work,userxattr overlay merged";
    match with_mounts(dir.path(), mount, "on_overlay") {
        Some(said) => assert!(said.contains("replaced on the overlay"), "{said}"),
        None => eprintln!("skipped: no overlay can be mounted here"),
    }
}
