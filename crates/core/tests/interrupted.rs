//! Conversions and exports that cannot end: what they leave is taken up by the next run, or is not left.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Made, assert_holds, entries, write_safetensors, write_sharded};
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
