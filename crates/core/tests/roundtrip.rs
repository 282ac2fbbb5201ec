//! What is converted is read back, and exported again, to the bit.

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{
    Made, assert_holds, bytes_of, entries, every_dtype, noise, read_safetensors, write_safetensors, write_sharded,
};
use proptest::prelude::*;
use sllm_core::{
    Cancel, Checkpoint, Control, ConvertOptions, ConvertReport, Dtype, Error, ErrorKind, Layout, MemoryTensor, Shape,
    WorkOptions, convert, export, save, verify,
};
use tempfile::tempdir;

fn convert_new(source: &Path, target: &Path) -> ConvertReport {
    convert(&Checkpoint::open(source).unwrap(), target, &ConvertOptions::new()).unwrap()
}

/// Converts a directory of safetensors files, exports the store, and compares all three by the library's reading.
fn assert_round_trip(source: &Path) {
    let dir = tempdir().unwrap();
    let (target, back) = (dir.path().join("store"), dir.path().join("back"));
    let report = convert_new(source, &target);
    let store = Checkpoint::open(&target).unwrap();
    assert_eq!(store.layout(), Layout::Store);
    assert_eq!(store.identity(), Some(report.identity.as_str()));
    assert_eq!((report.tensors, report.files), (store.tensors().len(), store.files().len()));
    assert_eq!(report.bytes, store.files().iter().map(|file| file.len()).sum::<u64>());
    assert!(verify(&store, &WorkOptions::new()).unwrap().corrupt.is_empty());

    let exported = export(&store, &back, &WorkOptions::new()).unwrap();
    assert_eq!(exported.tensors, store.tensors().len());
    assert_eq!(entries(&back), entries(source));
    let mut made = Vec::new();
    for name in entries(source) {
        if name.ends_with(".safetensors") {
            let oracle = read_safetensors(&source.join(&name));
            assert_eq!(read_safetensors(&back.join(&name)), oracle, "{name}");
            made.extend(oracle.1.into_values());
        } else {
            let parse = |dir: &Path| -> serde_json::Value {
                serde_json::from_slice(&fs::read(dir.join(&name)).unwrap()).unwrap()
            };
            assert_eq!(parse(&back), parse(source), "{name}");
        }
    }
    assert_holds(&store, &made);
    assert_eq!(entries(dir.path()), ["back", "store"], "nothing else is left");
}

#[test]
fn every_dtype_in_one_file_comes_back() {
    let source = tempdir().unwrap();
    write_safetensors(&source.path().join("model.safetensors"), &every_dtype(), None);
    assert_round_trip(source.path());
}

#[test]
fn shards_come_back_with_their_names_metadata_and_index() {
    let source = tempdir().unwrap();
    let all = every_dtype();
    let (one, two) = all.split_at(all.len() / 2);
    write_sharded(source.path(), &[("z-1.safetensors", one), ("a-2.safetensors", two)]);
    fs::write(source.path().join("config.json"), "{\"a\": 1}").unwrap();
    assert_round_trip(source.path());
}

#[test]
fn shards_without_an_index_come_back_without_one() {
    let source = tempdir().unwrap();
    write_safetensors(&source.path().join("one.safetensors"), &[Made::new("a", Dtype::F32, &[5])], Some(&[("k", "v")]));
    write_safetensors(&source.path().join("two.safetensors"), &[Made::new("b", Dtype::F4, &[6])], None);
    write_safetensors(&source.path().join("none.safetensors"), &[], Some(&[("only", "metadata")]));
    assert_round_trip(source.path());
}

#[test]
fn a_checkpoint_of_no_tensors_comes_back() {
    let source = tempdir().unwrap();
    write_safetensors(&source.path().join("model.safetensors"), &[], None);
    assert_round_trip(source.path());
}

#[test]
fn chunks_larger_and_smaller_than_tensors_come_back() {
    let source = tempdir().unwrap();
    let chunk = 4 << 20;
    let tensors: Vec<Made> = [3 * chunk + 5, 100, chunk, chunk - 1, 1, 70_001, 2 * chunk]
        .into_iter()
        .enumerate()
        .map(|(i, len)| Made::new(&format!("t{i}"), Dtype::U8, &[len]))
        .collect();
    write_safetensors(&source.path().join("model.safetensors"), &tensors, None);
    assert_round_trip(source.path());
}

#[test]
fn padding_is_zero_and_everything_is_aligned() {
    let dir = tempdir().unwrap();
    write_safetensors(&dir.path().join("m.safetensors"), &every_dtype(), None);
    let target = dir.path().join("store");
    convert_new(&dir.path().join("m.safetensors"), &target);
    let store = Checkpoint::open(&target).unwrap();
    let mut bytes = fs::read(target.join("tensor.data_0")).unwrap();
    assert_eq!(bytes.len() % 4096, 0);
    for tensor in store.tensors() {
        assert_eq!(tensor.offset % if tensor.len >= 65536 { 4096 } else { 256 }, 0);
        let start = usize::try_from(tensor.offset).unwrap();
        bytes[start..start + usize::try_from(tensor.len).unwrap()].fill(0);
    }
    assert!(bytes.iter().all(|&b| b == 0), "bytes that belong to no tensor are zero");
}

#[test]
fn the_identity_depends_on_the_model_alone() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let mut tensors = every_dtype();
    write_safetensors(&path, &tensors, None);
    let first = convert_new(&path, &dir.path().join("one"));
    let options = ConvertOptions::new().threads(1);
    let second = convert(&Checkpoint::open(&path).unwrap(), &dir.path().join("two"), &options).unwrap();
    let of_store = convert_new(&dir.path().join("one"), &dir.path().join("three"));
    assert_eq!((&first.identity, &first.identity), (&second.identity, &of_store.identity));
    tensors[0].bytes[3] ^= 1;
    write_safetensors(&path, &tensors, None);
    assert_ne!(convert_new(&path, &dir.path().join("four")).identity, first.identity);
}

#[test]
fn a_store_with_20_000_tensors_is_made_and_exported() {
    let source = tempdir().unwrap();
    let tensors: Vec<Made> = (0..20_000u64).map(|i| Made::new(&format!("layer.{i}"), Dtype::U8, &[i % 7])).collect();
    write_safetensors(&source.path().join("model.safetensors"), &tensors, None);
    assert_round_trip(source.path());
}

#[test]
fn saved_tensors_are_read_back_and_the_same_slice_is_tied() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("store");
    let bytes = noise(1, 70_000);
    let other = bytes.clone();
    let tensor = |name, bytes, shape, strides| MemoryTensor { name, dtype: Dtype::U8, shape, strides, bytes };
    let tensors = [
        tensor("embed", &bytes[..], &[700, 100], None),
        tensor("equal but apart", &other, &[70_000], None),
        tensor("head", &bytes[..], &[100, 700], None),
        tensor("transposed", &bytes[..], &[100, 700], Some(&[1, 100])),
        tensor("contiguous after all", &bytes[..600], &[2, 300], Some(&[300, 1])),
        tensor("none", &bytes[..0], &[0], None),
        tensor("none too", &bytes[..0], &[4, 0], None),
    ];
    let report = save(&tensors, &target, &ConvertOptions::new()).unwrap();
    let store = Checkpoint::open(&target).unwrap();
    assert_eq!(report.tensors, 7);
    for saved in &tensors {
        let tensor = store.tensor(saved.name).unwrap();
        assert_eq!(bytes_of(&store, tensor), saved.bytes, "{}", saved.name);
        assert_eq!(*tensor.shape, *saved.shape);
    }
    let tied = |a: &str, b: &str| store.tensor(a).unwrap().is_tied_with(store.tensor(b).unwrap());
    assert!(tied("embed", "head") && tied("embed", "transposed"));
    assert!(!tied("embed", "equal but apart") && !tied("none", "none too"));
    assert_eq!(store.tensor("transposed").unwrap().strides.as_deref(), Some(&Shape::from(&[1, 100][..])));
    assert_eq!(store.tensor("contiguous after all").unwrap().strides, None);
    assert_eq!(store.total_len(), 140_600);
    assert!(verify(&store, &WorkOptions::new()).unwrap().corrupt.is_empty());

    let refused = |name: &str| {
        let store = Checkpoint::open(&target).unwrap();
        let error = export(&store, &dir.path().join("back"), &WorkOptions::new()).unwrap_err();
        assert!(matches!(&error, Error::Invalid(reason) if reason.contains(name)), "{error}");
        assert_eq!(entries(dir.path()), ["store"]);
    };
    refused("\"transposed\"");
    // A store may have this name; in a safetensors file it is none of a tensor's.
    save(&[tensor("__metadata__", &bytes[..6], &[6], None)], &target, &ConvertOptions::new().overwrite(true)).unwrap();
    refused("\"__metadata__\"");

    // Ties are part of the store: they survive a conversion of it, and an export gives each name its bytes.
    let plain = [tensors[0], tensors[2]];
    let options = ConvertOptions::new().overwrite(true);
    save(&plain, &target, &options).unwrap();
    export(&Checkpoint::open(&target).unwrap(), &dir.path().join("back"), &WorkOptions::new()).unwrap();
    let exported = read_safetensors(&dir.path().join("back/model.safetensors")).1;
    assert_eq!((exported["embed"].bytes == bytes, exported["head"].bytes == bytes), (true, true));
    convert_new(&target, &dir.path().join("again"));
    assert_eq!(Checkpoint::open(dir.path().join("again")).unwrap().total_len(), 70_000);
}

#[test]
fn tensors_that_make_no_sense_are_not_saved() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("store");
    let bytes = [0u8; 8];
    let tensor = |name, shape, strides| MemoryTensor { name, dtype: Dtype::F32, shape, strides, bytes: &bytes };
    let huge = [u64::MAX, 2];
    for (tensors, expected) in [
        (vec![tensor("w", &[2], None), tensor("w", &[2], None)], "two tensors have the name \"w\""),
        (vec![tensor("w", &[3], None)], "its 8 bytes are not the 12"),
        (vec![tensor("w", &huge, None)], "overflows"),
        (vec![tensor("w", &[2, 2], Some(&[1, 2]))], "reach byte 16 of 8"),
        (vec![tensor("w", &[2], Some(&[1, 1]))], "strides as dimensions"),
        (vec![MemoryTensor { dtype: Dtype::F4, ..tensor("w", &[4, 4], Some(&[1, 4])) }], "4 bits in pairs"),
    ] {
        let error = save(&tensors, &target, &ConvertOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn other_files_are_copied_and_foreign_weights_are_not() {
    let dir = tempdir().unwrap();
    let (source, target, back) = (dir.path().join("source"), dir.path().join("store"), dir.path().join("back"));
    fs::create_dir_all(source.join("1_Pooling/deep")).unwrap();
    fs::create_dir_all(source.join(".git")).unwrap();
    fs::create_dir_all(source.join(".x.sllm-partial")).unwrap();
    let tensors = [Made::new("w", Dtype::F32, &[3])];
    write_safetensors(&source.join("model.safetensors"), &tensors, None);
    for copied in
        ["config.json", "tokenizer.model", "1_Pooling/config.json", "1_Pooling/deep/x y", "journal", ".gitattributes"]
    {
        fs::write(source.join(copied), copied).unwrap();
    }
    std::os::unix::fs::symlink("config.json", source.join("link.json")).unwrap();
    for left in ["manifest.json", "tensor_index.json.safetensors", "pytorch_model.bin", "1_Pooling/w.gguf", ".git/HEAD"]
    {
        fs::write(source.join(left), left).unwrap();
    }
    std::os::unix::fs::symlink("1_Pooling", source.join("loop")).unwrap();

    let report = convert_new(&source, &target);
    assert_eq!(report.other_files, 7);
    let skipped: Vec<_> = report.skipped.iter().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(skipped, ["1_Pooling/w.gguf", "loop", "pytorch_model.bin", "tensor_index.json.safetensors"]);
    for copied in
        ["config.json", "tokenizer.model", "1_Pooling/config.json", "1_Pooling/deep/x y", "journal", ".gitattributes"]
    {
        assert_eq!(fs::read_to_string(target.join(copied)).unwrap(), copied);
    }
    assert!(!target.join("link.json").is_symlink());
    assert_eq!(fs::read_to_string(target.join("link.json")).unwrap(), "config.json");
    assert!(!target.join("pytorch_model.bin").exists() && !target.join(".git").exists());
    assert_holds(&Checkpoint::open(&target).unwrap(), &tensors);

    // What somebody put into the store.
    fs::write(target.join("1_Pooling/w.gguf"), "").unwrap();
    let report = export(&Checkpoint::open(&target).unwrap(), &back, &WorkOptions::new()).unwrap();
    assert_eq!((report.other_files, report.skipped), (7, vec!["1_Pooling/w.gguf".into()]));
    let expected =
        [".gitattributes", "1_Pooling", "config.json", "journal", "link.json", "model.safetensors", "tokenizer.model"];
    assert_eq!(entries(&back), expected);

    // A single file is a checkpoint of its own: what lies beside it is not its business.
    let report = convert_new(&source.join("model.safetensors"), &source.join("store"));
    assert_eq!((report.other_files, report.skipped.len()), (0, 0));
}

#[test]
fn a_link_out_of_the_source_is_not_followed() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    write_safetensors(&source.join("model.safetensors"), &[], None);
    fs::write(dir.path().join("secret"), "secret").unwrap();
    std::os::unix::fs::symlink("../secret", source.join("config.json")).unwrap();
    let error =
        convert(&Checkpoint::open(&source).unwrap(), &dir.path().join("t"), &ConvertOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Format);
    assert!(error.to_string().contains("config.json") && error.to_string().contains("link out of"), "{error}");
    assert_eq!(entries(dir.path()), ["secret", "source"]);
}

#[test]
fn targets_that_must_not_be_written_are_refused() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("a/source");
    fs::create_dir_all(&source).unwrap();
    write_safetensors(&source.join("model.safetensors"), &[Made::new("w", Dtype::U8, &[9])], None);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let (plain, over) = (ConvertOptions::new(), ConvertOptions::new().overwrite(true));
    let kind = |target: &Path, options: &ConvertOptions| convert(&checkpoint, target, options).unwrap_err().kind();

    let occupied = dir.path().join("occupied");
    fs::create_dir(&occupied).unwrap();
    fs::write(occupied.join("thesis.txt"), "ten years").unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    std::os::unix::fs::symlink("occupied", dir.path().join("link")).unwrap();
    let before = entries(dir.path());
    for name in ["occupied", "file", "link"] {
        assert_eq!(kind(&dir.path().join(name), &plain), ErrorKind::Exists, "{name}");
        assert_eq!(kind(&dir.path().join(name), &over), ErrorKind::Invalid, "{name}");
    }
    for target in
        [&source, &source.join("store"), &dir.path().join("a"), &source.join("../source/x"), &source.join("..")]
    {
        assert_eq!(kind(target, &over), ErrorKind::Invalid, "{target:?}");
    }
    assert_eq!(kind(&dir.path().join("missing/store"), &plain), ErrorKind::NotFound);
    assert_eq!(kind(&dir.path().join("file/store"), &plain), ErrorKind::Io);
    assert_eq!(entries(dir.path()), before);
    assert_eq!(entries(&source), ["model.safetensors"]);
    assert_eq!(entries(&occupied), ["thesis.txt"]);

    // Permission: the kernel's own file systems let not even root make a directory.
    let error = convert(&checkpoint, Path::new("/sys/store"), &plain).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Permission | ErrorKind::Io), "{}", error.chain());
    assert!(error.to_string().contains("/sys/.store"), "{error}");

    fs::create_dir(dir.path().join("empty")).unwrap();
    convert(&checkpoint, &dir.path().join("empty"), &over).unwrap();
    convert(&checkpoint, &dir.path().join("empty"), &over).unwrap();
    assert_eq!(kind(&dir.path().join("empty"), &plain), ErrorKind::Exists);
    let store = Checkpoint::open(dir.path().join("empty")).unwrap();
    let error = export(&store, &occupied, &WorkOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
}

#[test]
fn too_little_space_is_said_before_anything_is_written() {
    let dir = tempdir().unwrap();
    let source = dir.path().join("model.safetensors");
    let len = 8u64 << 40;
    common::write_raw(&source, &format!(r#"{{"w":{{"dtype":"U8","shape":[{len}],"data_offsets":[0,{len}]}}}}"#), len);
    let error =
        convert(&Checkpoint::open(&source).unwrap(), &dir.path().join("t"), &ConvertOptions::new()).unwrap_err();
    assert!(matches!(error, Error::NoSpace { need, free, .. } if need >= len && free < len), "{error}");
    assert_eq!(entries(dir.path()), ["model.safetensors"]);
}

/// A checkpoint of a dozen chunks.
fn large(dir: &Path) -> (std::path::PathBuf, Vec<Made>) {
    let tensors: Vec<Made> = (0..5).map(|i| Made::new(&format!("t{i}"), Dtype::U8, &[10 << 20])).collect();
    let path = dir.join("model.safetensors");
    write_safetensors(&path, &tensors, None);
    (path, tensors)
}

#[test]
fn a_cancelled_conversion_leaves_no_target_and_goes_on_later() {
    let dir = tempdir().unwrap();
    let (path, tensors) = large(dir.path());
    let (target, source) = (dir.path().join("store"), Checkpoint::open(&path).unwrap());
    let cancel = Cancel::new();
    let stop = cancel.clone();
    let control = Control::new().cancelled_by(cancel).on_progress(move |p| {
        if p.done > p.total / 2 {
            stop.cancel()
        }
    });
    let error = convert(&source, &target, &ConvertOptions::new().threads(2).control(control)).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
    assert!(!target.exists());
    let report = convert(&source, &target, &ConvertOptions::new()).unwrap();
    assert!(report.resumed_bytes > report.bytes / 2 && report.resumed_bytes < report.bytes, "{report:?}");
    assert_holds(&Checkpoint::open(&target).unwrap(), &tensors);
    assert_eq!(entries(dir.path()), ["model.safetensors", "store"]);
}

#[test]
fn a_partial_store_is_not_trusted() {
    let dir = tempdir().unwrap();
    let (path, mut tensors) = large(dir.path());
    let target = dir.path().join("store");
    let interrupt = || {
        let source = Checkpoint::open(&path).unwrap();
        let stop = Cancel::new();
        let stopper = stop.clone();
        let control = Control::new().cancelled_by(stop).on_progress(move |p| {
            if p.done > p.total / 2 {
                stopper.cancel()
            }
        });
        convert(&source, &target, &ConvertOptions::new().control(control)).unwrap_err();
    };
    let partial = dir.path().join(".store.sllm-partial");

    // Bytes that changed under the journal are written again.
    interrupt();
    let data = File::options().write(true).open(partial.join("tensor.data_0")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&data, b"junk", 5 << 20).unwrap();
    fs::write(partial.join("config.json"), "stale").unwrap();
    let report = convert_new(&path, &target);
    assert!(report.resumed_bytes > 0);
    assert_holds(&Checkpoint::open(&target).unwrap(), &tensors);
    assert!(!target.join("config.json").exists());
    fs::remove_dir_all(&target).unwrap();

    // Another source under the same name starts anew, though it is as long.
    interrupt();
    tensors[0].bytes[7] ^= 1;
    std::thread::sleep(std::time::Duration::from_millis(20));
    write_safetensors(&path, &tensors, None);
    assert_eq!(convert_new(&path, &target).resumed_bytes, 0);
    assert_holds(&Checkpoint::open(&target).unwrap(), &tensors);
}

#[test]
fn a_second_conversion_to_the_same_target_is_refused() {
    let dir = tempdir().unwrap();
    let (path, tensors) = large(dir.path());
    let target = dir.path().join("store");
    let (second_path, second_target) = (path.clone(), target.clone());
    let refused = std::sync::Arc::new(AtomicU64::new(0));
    let count = refused.clone();
    let control = Control::new().on_progress(move |_| {
        let error =
            convert(&Checkpoint::open(&second_path).unwrap(), &second_target, &ConvertOptions::new()).unwrap_err();
        assert!(error.to_string().contains("another conversion"), "{error}");
        count.fetch_add(1, Ordering::Relaxed);
    });
    convert(&Checkpoint::open(&path).unwrap(), &target, &ConvertOptions::new().control(control)).unwrap();
    assert!(refused.load(Ordering::Relaxed) > 0);
    assert_holds(&Checkpoint::open(&target).unwrap(), &tensors);
}

#[test]
fn a_source_that_shrinks_or_changes_meanwhile_is_an_error() {
    let dir = tempdir().unwrap();
    let (path, _) = large(dir.path());
    let source = Checkpoint::open(&path).unwrap();
    let once = AtomicU64::new(0);
    let file = File::options().write(true).open(&path).unwrap();
    let shrink = move |_| {
        if once.fetch_add(1, Ordering::Relaxed) == 0 {
            file.set_len(1000).unwrap();
        }
    };
    let options = ConvertOptions::new().threads(1).control(Control::new().on_progress(shrink));
    let error = convert(&source, &dir.path().join("store"), &options).unwrap_err();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
    assert!(!dir.path().join("store").exists());

    let (path, _) = large(dir.path());
    let source = Checkpoint::open(&path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let touch = move |_| std::os::unix::fs::FileExt::write_all_at(&file, b"x", 20 << 20).unwrap();
    let options = ConvertOptions::new().control(Control::new().on_progress(touch));
    let error = convert(&source, &dir.path().join("store"), &options).unwrap_err();
    assert!(error.to_string().contains("changed while it was read"), "{error}");
    assert!(!dir.path().join("store").exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn random_tables_come_back(
        table in prop::collection::btree_map(
            "\\PC{0,12}",
            (0..22usize, prop::collection::vec(0..9u64, 0..4), prop::option::weighted(0.1, 60_000..90_000u64), 0..3usize),
            0..25,
        ),
    ) {
        let mut shards: [Vec<Made>; 3] = Default::default();
        for (name, (dtype, mut shape, large, shard)) in table {
            prop_assume!(name != "__metadata__");
            // Four elements are whole bytes in every dtype.
            shape.push(4);
            shape.extend(large);
            let dtype = Dtype::all().nth(dtype).unwrap();
            if dtype.byte_len(&shape).unwrap() < 8 << 20 {
                shards[shard].push(Made::new(&name, dtype, &shape));
            }
        }
        let source = tempdir().unwrap();
        for (k, tensors) in shards.iter().enumerate() {
            write_safetensors(&source.path().join(format!("s{k}.safetensors")), tensors, None);
        }
        assert_round_trip(source.path());
    }
}

#[test]
fn a_store_tells_when_its_source_was_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (source, store) = (dir.path().join("model"), dir.path().join("store"));
    fs::create_dir(&source).unwrap();
    let file = source.join("model.safetensors");
    write_safetensors(&file, &[Made::new("w", Dtype::U8, &[1000])], None);
    convert(&Checkpoint::open(&source).unwrap(), &store, &ConvertOptions::new()).unwrap();
    let check = |path: &Path| Checkpoint::open(path).unwrap().check_source();
    check(&source).unwrap();
    check(&store).unwrap();

    // Other weights of the same length, as another fine-tune has.
    let old = fs::metadata(&file).unwrap().modified().unwrap();
    write_safetensors(&file, &[Made::new("v", Dtype::U8, &[1000])], None);
    File::options().write(true).open(&file).unwrap().set_modified(old + Duration::from_nanos(1)).unwrap();
    let error = check(&store).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Format);
    assert!(
        error.to_string().contains("model.safetensors") && error.to_string().contains("convert it again"),
        "{error}"
    );

    // A copy of the store was made of the same source.
    let copy = dir.path().join("copy");
    convert(&Checkpoint::open(&store).unwrap(), &copy, &ConvertOptions::new()).unwrap();
    check(&copy).unwrap_err();
    convert(&Checkpoint::open(&source).unwrap(), &store, &ConvertOptions::new().overwrite(true)).unwrap();
    check(&store).unwrap();

    fs::remove_dir_all(&source).unwrap();
    check(&store).unwrap();
}

#[test]
fn a_source_that_is_a_link_to_a_file_is_known_by_the_place_of_the_link() {
    let dir = tempfile::tempdir().unwrap();
    let (blobs, links, store) = (dir.path().join("blobs"), dir.path().join("links"), dir.path().join("store"));
    fs::create_dir(&blobs).unwrap();
    fs::create_dir(&links).unwrap();
    let (blob, link) = (blobs.join("aa11"), links.join("model.safetensors"));
    write_safetensors(&blob, &[Made::new("w", Dtype::U8, &[1000])], None);
    std::os::unix::fs::symlink("../blobs/aa11", &link).unwrap();
    // Another file, which has the link's name where the blob lies.
    write_safetensors(&blobs.join("model.safetensors"), &[Made::new("w", Dtype::U8, &[2000])], None);
    convert(&Checkpoint::open(&link).unwrap(), &store, &ConvertOptions::new()).unwrap();
    let check = || Checkpoint::open(&store).unwrap().check_source();
    check().unwrap();
    write_safetensors(&blob, &[Made::new("w", Dtype::U8, &[1001])], None);
    let error = check().unwrap_err().to_string();
    assert!(error.contains(link.to_str().unwrap()), "{error}");
}
