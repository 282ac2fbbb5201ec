//! Changed, shortened and edited stores are told from good ones.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{Made, write_safetensors};
use sllm_core::{
    Cancel, Checkpoint, Control, ConvertOptions, Dtype, Error, ErrorKind, MemoryTensor, Progress, WorkOptions, convert,
    export, save, verify,
};
use tempfile::{TempDir, tempdir};

const CHUNK: u64 = 4 << 20;

/// Three chunks and a bit: `large` over chunks 0 to 2, then small tensors and padding in chunk 2.
fn store() -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let tensors = [
        Made::new("large", Dtype::U8, &[2 * CHUNK + 1000]),
        Made::new("small", Dtype::F16, &[50]),
        Made::new("none", Dtype::F16, &[0]),
        Made::new("last", Dtype::U8, &[10]),
        Made::new("other file's worth", Dtype::U8, &[CHUNK]),
    ];
    write_safetensors(&dir.path().join("m.safetensors"), &tensors, None);
    let target = dir.path().join("store");
    convert(&Checkpoint::open(dir.path().join("m.safetensors")).unwrap(), &target, &ConvertOptions::new()).unwrap();
    (dir, target)
}

fn flip(path: &Path, offset: u64, bit: u8) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << bit)], offset).unwrap();
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let (_dir, path) = store();
    let data = path.join("tensor.data_0");
    let store = Checkpoint::open(&path).unwrap();
    let place = |name: &str| store.tensor(name).unwrap().offset;
    let len = store.files()[0].len();
    // F16 is sorted before U8 by the safetensors library, so `small` comes first.
    let all_of_the_first = vec!["small", "large"];
    let cases = [
        ("the first byte", place("small"), all_of_the_first.clone()),
        ("padding between tensors", place("small") + 100, all_of_the_first.clone()),
        ("the end of the first chunk", CHUNK - 1, all_of_the_first),
        ("the beginning of the second", CHUNK, vec!["large"]),
        ("the last tensor", place("last") + 9, Vec::new()),
        ("padding at the end", len - 1, Vec::new()),
    ];
    for (i, (what, offset, tensors)) in cases.into_iter().enumerate() {
        let bit = u8::try_from(i).unwrap();
        flip(&data, offset, bit);
        let report = verify(&Checkpoint::open(&path).unwrap(), &WorkOptions::new()).unwrap();
        assert_eq!(report.corrupt.len(), 1, "{what}");
        let fault = &report.corrupt[0];
        assert_eq!((fault.chunk, fault.offset), (offset / CHUNK, offset / CHUNK * CHUNK), "{what}");
        assert_eq!(fault.path, data);
        let expected: Vec<&str> = if tensors.is_empty() {
            let end = fault.offset + fault.len;
            let inside = |t: &&sllm_core::TensorInfo| t.len > 0 && t.offset < end && t.offset + t.len > fault.offset;
            store.tensors().iter().filter(inside).map(|t| t.name.as_str()).collect()
        } else {
            tensors
        };
        assert_eq!(fault.tensors, expected, "{what}");
        assert!(fault.expected != fault.found);
        let message = fault.to_string();
        assert!(message.contains(&format!("chunk {}", fault.chunk)) && message.contains(expected[0]), "{message}");
        flip(&data, offset, bit);
    }
    let report = verify(&Checkpoint::open(&path).unwrap(), &WorkOptions::new()).unwrap();
    assert_eq!((report.corrupt.len(), report.chunks, report.bytes), (0, len.div_ceil(CHUNK), len));
}

#[test]
fn a_corrupt_store_is_neither_converted_nor_exported() {
    let (dir, path) = store();
    let left = |dir: &Path| fs::read_dir(dir).unwrap().count();
    let before = left(dir.path());
    flip(&path.join("tensor.data_0"), CHUNK + 7, 3);
    let store = Checkpoint::open(&path).unwrap();
    for target in ["again", "out"] {
        let target = dir.path().join(target);
        let options = ConvertOptions::new();
        let error = match target.ends_with("again") {
            true => convert(&store, &target, &options).map(drop).unwrap_err(),
            false => export(&store, &target, &WorkOptions::new()).map(drop).unwrap_err(),
        };
        let Error::Corrupt(fault) = &error else { panic!("{error}") };
        assert_eq!((fault.chunk, fault.tensors.as_slice()), (1, &["large".to_owned()][..]));
    }
    assert_eq!(left(dir.path()), before, "nothing is left of either");

    flip(&path.join("tensor.data_0"), CHUNK + 7, 3);
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let see = std::sync::Arc::clone(&seen);
    let control = Control::new().on_progress(move |progress| see.lock().unwrap().push(progress));
    let store = Checkpoint::open(&path).unwrap();
    export(&store, &dir.path().join("out"), &WorkOptions::new().threads(1).control(control)).unwrap();
    let seen = seen.lock().unwrap();
    let total = store.files()[0].len() + fs::metadata(dir.path().join("out/m.safetensors")).unwrap().len();
    assert!(seen.iter().all(|progress| progress.total == total) && seen.is_sorted_by_key(|progress| progress.done));
    assert_eq!(seen.last(), Some(&Progress { done: total, total }), "reading and writing are one progress");
}

#[test]
fn a_corrupt_store_is_read_to_its_first_corrupt_chunk_before_it_is_refused() {
    let (dir, path) = store();
    let data = path.join("tensor.data_0");
    for chunk in [1, 2] {
        flip(&data, chunk * CHUNK + 7, 3);
    }
    let store = Checkpoint::open(&path).unwrap();
    // Whoever reads the last chunk is told of that.
    let file = File::options().write(true).open(&data).unwrap();
    file.set_len(3 * CHUNK).unwrap();
    let refused = |threads| {
        let options = WorkOptions::new().threads(threads);
        match export(&store, &dir.path().join("out"), &options).map(drop).unwrap_err() {
            Error::Corrupt(fault) => fault.chunk,
            other => panic!("{other}"),
        }
    };
    assert_eq!(refused(1), 1);
    assert!(matches!(verify(&store, &WorkOptions::new().threads(1)), Err(Error::Truncated { .. })));
    for _ in 0..20 {
        assert_eq!(refused(2), 1, "chunk 2 was found before");
    }
}

#[test]
fn all_corrupt_chunks_are_listed_in_order() {
    let (_dir, path) = store();
    for chunk in [3, 0, 2] {
        flip(&path.join("tensor.data_0"), chunk * CHUNK + 5, 0);
    }
    let report = verify(&Checkpoint::open(&path).unwrap(), &WorkOptions::new().threads(3)).unwrap();
    assert_eq!(report.corrupt.iter().map(|fault| fault.chunk).collect::<Vec<_>>(), [0, 2, 3]);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["corrupt"][0]["found"].as_str().map(str::len), Some(16));
}

#[test]
fn few_of_many_tied_tensors_of_a_corrupt_chunk_are_named() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("store");
    let names: Vec<String> = (0..100).map(|i| format!("t{i:02}")).collect();
    let bytes = vec![7; 5000];
    let tied =
        names.iter().map(|name| MemoryTensor { name, dtype: Dtype::U8, shape: &[5000], strides: None, bytes: &bytes });
    save(&tied.collect::<Vec<_>>(), &path, &ConvertOptions::new()).unwrap();
    flip(&path.join("tensor.data_0"), 4000, 0);
    let report = verify(&Checkpoint::open(&path).unwrap(), &WorkOptions::new()).unwrap();
    assert_eq!(report.corrupt.len(), 1);
    assert_eq!((&report.corrupt[0].tensors[..], report.corrupt[0].more_tensors), (&names[..16], 84));
    assert!(report.corrupt[0].to_string().ends_with("it holds tensor \"t00\" and 99 more"), "{}", report.corrupt[0]);
    assert_eq!(serde_json::to_value(&report).unwrap()["corrupt"][0]["more_tensors"], 84);
}

#[test]
fn a_verification_can_be_cancelled_and_a_file_cut_under_it_is_told() {
    let (_dir, path) = store();
    let store = Checkpoint::open(&path).unwrap();
    let cancel = Cancel::new();
    cancel.cancel();
    let options = WorkOptions::new().control(Control::new().cancelled_by(cancel));
    assert!(matches!(verify(&store, &options), Err(Error::Cancelled)));
    File::options().write(true).open(path.join("tensor.data_0")).unwrap().set_len(CHUNK).unwrap();
    assert!(matches!(verify(&store, &WorkOptions::new()), Err(Error::Truncated { .. })));
}

fn open_error(path: &Path) -> String {
    let error = Checkpoint::open(path).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Format | ErrorKind::NotFound), "{error}");
    error.chain()
}

#[test]
fn data_files_that_are_not_as_the_manifest_says_are_not_opened() {
    let (_dir, path) = store();
    let data = path.join("tensor.data_0");
    let len = fs::metadata(&data).unwrap().len();
    for wrong in [len - 1, len - 4096, len + 4096, 0] {
        File::options().write(true).open(&data).unwrap().set_len(wrong).unwrap();
        let message = open_error(&path);
        assert!(message.contains(&format!("it has {wrong} bytes, but the manifest says {len}")), "{message}");
    }
    fs::remove_file(&data).unwrap();
    assert!(open_error(&path).contains("tensor.data_0"));
    fs::create_dir(&data).unwrap();
    assert!(open_error(&path).contains("not a regular file"));
}

#[test]
fn an_edited_manifest_is_not_opened() {
    let (_dir, path) = store();
    let manifest = path.join("manifest.json");
    let good = fs::read_to_string(&manifest).unwrap();
    for (from, to, expected) in [
        ("\"small\"", "\"smell\"", "identity"),
        ("\"F16\"", "\"BF16\"", "identity"),
        ("\"version\":1", "\"version\":9", "version 9"),
        ("\"chunk_len\":4194304", "\"chunk_len\":8388608", "checksums"),
        ("\"len\":10,", "\"len\":11,", "\"last\""),
        ("{", "", "not a valid manifest"),
    ] {
        assert!(good.contains(from), "{from} in {good}");
        fs::write(&manifest, good.replacen(from, to, 1)).unwrap();
        let message = open_error(&path);
        assert!(message.contains("manifest.json") && message.contains(expected), "{message}");
    }
    fs::write(&manifest, &good[..good.len() / 2]).unwrap();
    open_error(&path);
    fs::write(&manifest, &good).unwrap();
    Checkpoint::open(&path).unwrap();
    // A store whose manifest is lost is still the original's directory, but no longer verified.
    fs::remove_file(&manifest).unwrap();
    let error = verify(&Checkpoint::open(&path).unwrap(), &WorkOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
