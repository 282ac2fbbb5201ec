//! Checkpoints that are broken, or made to do harm: each gives an error that says what is wrong and where.

mod common;

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::{Made, assert_holds, entries, write_raw, write_safetensors, write_sharded};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use sllm_core::{Checkpoint, ConvertOptions, Dtype, ErrorKind, OpenOptions, WorkOptions, convert, export};
use tempfile::{TempDir, tempdir};

/// Opening `path` fails as `kind`, and the message has all `parts`.
fn assert_refused(path: &Path, kind: ErrorKind, parts: &[&str]) {
    let error = Checkpoint::open(path).unwrap_err();
    let message = error.chain();
    assert_eq!(error.kind(), kind, "{message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

fn tensor(name: &str) -> Made {
    Made::new(name, Dtype::F32, &[10])
}

/// Two shards, `1.safetensors` with `a` and `2.safetensors` with `b`, and their index.
fn sharded() -> TempDir {
    let dir = tempdir().unwrap();
    write_sharded(dir.path(), &[("1.safetensors", &[tensor("a")]), ("2.safetensors", &[tensor("b")])]);
    dir
}

fn write_index(dir: &Path, weight_map: &str) {
    fs::write(dir.join("model.safetensors.index.json"), format!(r#"{{"weight_map":{weight_map}}}"#)).unwrap();
}

#[test]
fn a_truncated_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    write_safetensors(&path, &[tensor("a"), tensor("b")], None);
    let len = fs::metadata(&path).unwrap().len();
    let cut = |len: u64| File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
    cut(len - 1);
    assert_refused(dir.path(), ErrorKind::Format, &["model.safetensors", "\"b\"", "at byte", "truncated"]);
    cut(len - 41);
    assert_refused(dir.path(), ErrorKind::Format, &["model.safetensors", "\"a\"", "truncated"]);
    cut(20);
    assert_refused(dir.path(), ErrorKind::Format, &["model.safetensors", "the file has only 20"]);
    for short in [7, 0] {
        cut(short);
        assert_refused(dir.path(), ErrorKind::Format, &["model.safetensors", "too short"]);
    }
}

#[test]
fn a_header_longer_than_the_file_or_the_limit() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for (claim, part) in
        [(1000u64, "claims 1000 bytes"), (100_000_001, "more than the 100000000"), (u64::MAX, "claims")]
    {
        fs::write(&path, [&claim.to_le_bytes()[..], b"{}      "].concat()).unwrap();
        assert_refused(&path, ErrorKind::Format, &["model.safetensors", part]);
    }
}

#[test]
fn a_header_of_the_largest_length_is_read() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let json = r#"{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;
    write_raw(&path, &(json.to_owned() + &" ".repeat(100_000_000 - json.len())), 3);
    assert_eq!(Checkpoint::open(&path).unwrap().tensor("w").unwrap().offset, 100_000_008);
}

#[test]
fn an_index_that_does_not_fit_its_shards() {
    let dir = sharded();
    write_index(dir.path(), r#"{"a": "1.safetensors", "b": "3.safetensors"}"#);
    assert_refused(dir.path(), ErrorKind::Format, &["index.json", "\"3.safetensors\"", "not there"]);
    write_index(dir.path(), r#"{"a": "2.safetensors", "b": "2.safetensors"}"#);
    assert_refused(dir.path(), ErrorKind::Format, &["index.json", "\"a\"", "\"2.safetensors\"", "but it is not"]);
    write_index(dir.path(), r#"{"a": "1.safetensors", "b": "1.safetensors"}"#);
    assert_refused(dir.path(), ErrorKind::Format, &["\"b\"", "but it is not"]);
    write_index(dir.path(), r#"{"a": "1.safetensors", "a": "1.safetensors"}"#);
    assert_refused(dir.path(), ErrorKind::Format, &["\"a\"", "twice"]);
    fs::write(dir.path().join("model.safetensors.index.json"), "[").unwrap();
    assert_refused(dir.path(), ErrorKind::Format, &["index.json", "not a valid index"]);
}

#[test]
fn an_index_that_cannot_be_followed_is_not_passed_over() {
    let dir = sharded();
    let index = dir.path().join("model.safetensors.index.json");
    fs::remove_file(&index).unwrap();
    for with_shards in [true, false] {
        if !with_shards {
            fs::remove_file(dir.path().join("1.safetensors")).unwrap();
            fs::remove_file(dir.path().join("2.safetensors")).unwrap();
        }
        symlink("blob-that-was-not-downloaded", &index).unwrap();
        assert_refused(dir.path(), ErrorKind::NotFound, &["model.safetensors.index.json"]);
        fs::remove_file(&index).unwrap();
        symlink("model.safetensors.index.json", &index).unwrap();
        assert_refused(dir.path(), ErrorKind::Io, &["model.safetensors.index.json"]);
        fs::remove_file(&index).unwrap();
        fs::create_dir(&index).unwrap();
        assert_refused(dir.path(), ErrorKind::Format, &["model.safetensors.index.json", "not a regular file"]);
        fs::remove_dir(&index).unwrap();
    }
}

#[test]
fn of_many_broken_shards_the_first_is_named() {
    let dir = tempdir().unwrap();
    let names: Vec<String> = (0..40).map(|number| format!("model-{number:02}.safetensors")).collect();
    // So long that threads share them.
    let spaces = " ".repeat(64 << 10);
    for (number, name) in names.iter().enumerate() {
        let json = format!(r#"{{"t{number}":{{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}}}{spaces}"#);
        write_raw(&dir.path().join(name), &json, 3);
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for number in 0..40 {
        assert_eq!(checkpoint.tensor(&format!("t{number}")).unwrap().file, number);
    }
    for name in &names[7..] {
        write_raw(&dir.path().join(name), &format!("{{{spaces}"), 3);
    }
    assert_refused(dir.path(), ErrorKind::Format, &["model-07.safetensors", "not valid"]);
}

#[test]
fn a_tensor_in_two_shards() {
    let dir = sharded();
    write_safetensors(&dir.path().join("2.safetensors"), &[tensor("a"), tensor("b")], None);
    assert_refused(dir.path(), ErrorKind::Format, &["\"a\"", "two files", "1.safetensors", "2.safetensors"]);
    fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    assert_refused(dir.path(), ErrorKind::Format, &["\"a\"", "two files"]);
}

#[test]
fn shards_outside_their_directory() {
    let outside = sharded();
    let dir = tempdir().unwrap();
    let absolute = outside.path().join("1.safetensors");
    for shard in ["../1.safetensors", "x/../../1.safetensors", "/etc/passwd", absolute.to_str().unwrap(), ".", ""] {
        write_index(dir.path(), &format!(r#"{{"a": {shard:?}}}"#));
        assert_refused(dir.path(), ErrorKind::Format, &["index.json", "\"a\"", "not a path inside"]);
    }
}

#[test]
fn links_out_of_the_directory() {
    let outside = sharded();
    let dir = tempdir().unwrap();
    let link = dir.path().join("model.safetensors");
    symlink(outside.path().join("1.safetensors"), &link).unwrap();
    assert_refused(
        dir.path(),
        ErrorKind::Format,
        &["model.safetensors", "a link out of its directory", "1.safetensors"],
    );
    // A link that the user names himself is followed.
    Checkpoint::open(&link).unwrap();
    symlink(outside.path(), dir.path().join("sub")).unwrap();
    fs::remove_file(&link).unwrap();
    write_index(dir.path(), r#"{"a": "sub/1.safetensors"}"#);
    assert_refused(dir.path(), ErrorKind::Format, &["sub/1.safetensors", "a link out of its directory"]);
    // Within the directory a link is no harm.
    fs::remove_file(dir.path().join("sub")).unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    write_safetensors(&dir.path().join("file"), &[tensor("a")], None);
    symlink("../file", dir.path().join("sub/1.safetensors")).unwrap();
    Checkpoint::open(dir.path()).unwrap();
}

/// A cache that holds `org/model` with a commit, a branch and a tag, as huggingface_hub lays it out.
fn hub_cache() -> (TempDir, PathBuf) {
    let cache = tempdir().unwrap();
    let repo = cache.path().join("models--org--model");
    let snapshot = repo.join("snapshots/c0ffee");
    for dir in ["blobs", "refs/pr", "snapshots/c0ffee/sub"] {
        fs::create_dir_all(repo.join(dir)).unwrap();
    }
    write_safetensors(&repo.join("blobs/aa11"), &[tensor("a")], None);
    fs::write(repo.join("blobs/bb22"), "{}").unwrap();
    symlink("../../blobs/aa11", snapshot.join("model.safetensors")).unwrap();
    symlink("../../blobs/bb22", snapshot.join("config.json")).unwrap();
    symlink("../../../blobs/bb22", snapshot.join("sub/config.json")).unwrap();
    fs::write(repo.join("refs/main"), "c0ffee").unwrap();
    fs::write(repo.join("refs/pr/1"), "c0ffee\n").unwrap();
    fs::write(repo.join("refs/lost"), "deadbeef").unwrap();
    fs::write(repo.join("refs/evil"), "../../..").unwrap();
    fs::write(repo.join("refs/long"), format!("c0ffee{}", "\n".repeat(5000))).unwrap();
    (cache, snapshot)
}

#[test]
fn a_hub_snapshot_is_opened_by_path_and_by_name_and_converted() {
    let (cache, snapshot) = hub_cache();
    assert_holds(&Checkpoint::open(&snapshot).unwrap(), &[tensor("a")]);
    let options = OpenOptions::new().cache_dir(cache.path());
    for revision in [None, Some("main"), Some("pr/1"), Some("c0ffee")] {
        let options = revision.map_or(options.clone(), |revision| options.clone().revision(revision));
        let checkpoint = options.open("org/model").unwrap();
        assert_eq!(checkpoint.path(), snapshot);
        assert_holds(&checkpoint, &[tensor("a")]);
    }
    let target = cache.path().join("store");
    let report = convert(&options.open("org/model").unwrap(), &target, &ConvertOptions::new()).unwrap();
    assert_eq!(report.other_files, 2);
    assert!(fs::symlink_metadata(target.join("sub/config.json")).unwrap().is_file());
}

#[test]
fn a_directory_of_a_hub_snapshot_has_links_to_the_blobs_of_its_repository() {
    let (cache, snapshot) = hub_cache();
    let sub = snapshot.join("sub");
    symlink("../../../blobs/aa11", sub.join("model.safetensors")).unwrap();
    assert_holds(&Checkpoint::open(&sub).unwrap(), &[tensor("a")]);
    let report =
        convert(&Checkpoint::open(&sub).unwrap(), &cache.path().join("store"), &ConvertOptions::new()).unwrap();
    assert_eq!(report.other_files, 1);
    fs::remove_file(sub.join("model.safetensors")).unwrap();
    write_safetensors(&cache.path().join("stolen"), &[tensor("a")], None);
    symlink("../../../../stolen", sub.join("model.safetensors")).unwrap();
    assert_refused(&sub, ErrorKind::Format, &["model.safetensors", "a link out of its directory"]);
}

#[test]
fn what_the_hub_cache_does_not_hold() {
    let (cache, snapshot) = hub_cache();
    let refused = |id: &str, revision: &str, kind: ErrorKind, part: &str| {
        let error = OpenOptions::new().cache_dir(cache.path()).revision(revision).open(id).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };
    refused("org/model", "v9", ErrorKind::NotFound, "revision \"v9\" is not in");
    refused("org/model", "lost", ErrorKind::NotFound, "download it first");
    refused("org/model", "evil", ErrorKind::NotFound, "download it first");
    refused("org/model", "long", ErrorKind::Invalid, "more than the 4096 bytes");
    refused("org/other", "main", ErrorKind::NotFound, "does not hold it");
    refused("../model", "main", ErrorKind::NotFound, "no such file");
    refused("org/model", "../../x", ErrorKind::Invalid, "is not a revision");
    // A blob that was not downloaded, and a link out of the repository.
    fs::remove_file(snapshot.join("../../blobs/aa11")).unwrap();
    refused("org/model", "main", ErrorKind::NotFound, "model.safetensors");
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    write_safetensors(&cache.path().join("stolen"), &[tensor("a")], None);
    symlink("../../../stolen", snapshot.join("model.safetensors")).unwrap();
    refused("org/model", "main", ErrorKind::Format, "a link out of its directory");
}

/// A store of one tensor.
fn store() -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    write_safetensors(&dir.path().join("m.safetensors"), &[tensor("a")], Some(&[("k", "v")]));
    let target = dir.path().join("store");
    convert(&Checkpoint::open(dir.path().join("m.safetensors")).unwrap(), &target, &ConvertOptions::new()).unwrap();
    (dir, target)
}

#[test]
fn a_store_whose_source_files_are_one_is_not_exported() {
    let dir = tempdir().unwrap();
    let (source, path) = (dir.path().join("source"), dir.path().join("store"));
    fs::create_dir(&source).unwrap();
    write_sharded(&source, &[("one.safetensors", &[tensor("a")]), ("two.safetensors", &[tensor("b")])]);
    convert(&Checkpoint::open(&source).unwrap(), &path, &ConvertOptions::new()).unwrap();
    let manifest = fs::read_to_string(path.join("manifest.json")).unwrap();
    let before = entries(dir.path());
    for name in ["s/x.safetensors", "s//x.safetensors", "s/./x.safetensors", "s/x.safetensors/"] {
        let changed = manifest.replace("one.safetensors", "s/x.safetensors").replace("two.safetensors", name);
        assert_ne!(changed, manifest);
        fs::write(path.join("manifest.json"), changed).unwrap();
        let store = Checkpoint::open(&path).unwrap();
        let error = export(&store, &dir.path().join("back"), &WorkOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Format, "{error}");
        assert!(error.to_string().contains(&format!("{name:?} cannot be written")), "{error}");
        assert_eq!(entries(dir.path()), before);
    }
}

#[test]
fn a_store_of_links() {
    for name in ["tensor.data_0", "manifest.json"] {
        let (_dir, path) = store();
        fs::rename(path.join(name), path.join("moved")).unwrap();
        symlink("moved", path.join(name)).unwrap();
        assert_refused(&path, ErrorKind::Format, &[name, "it is a link"]);
    }
}

fn make_fifo(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

#[test]
fn things_that_are_not_files() {
    let (_dir, path) = store();
    fs::remove_file(path.join("tensor.data_0")).unwrap();
    make_fifo(&path.join("tensor.data_0"));
    assert_refused(&path, ErrorKind::Format, &["tensor.data_0", "not a regular file"]);
    let dir = tempdir().unwrap();
    make_fifo(&dir.path().join("model.safetensors"));
    assert_refused(dir.path(), ErrorKind::Format, &["model.safetensors", "not a regular file"]);
    assert_refused(&dir.path().join("model.safetensors"), ErrorKind::Format, &["not a regular file"]);
    assert_refused(Path::new("/dev/zero"), ErrorKind::Format, &["/dev/zero", "not a regular file"]);
}

#[test]
fn files_and_tensors_that_add_up_to_more_than_63_bits() {
    // Memory's file system has files of this length, others have not.
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return eprintln!("skipped: no /dev/shm") };
    let len = (1u64 << 61) - 1;
    let name = |number: u64| dir.path().join(format!("{number}.safetensors"));
    for number in 0..9 {
        let data = len - 8 - 80;
        let json = format!(r#"{{"t{number}":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
        write_raw(&name(number), &format!("{json:80}"), data);
    }
    assert_refused(dir.path(), ErrorKind::Format, &["add up to 2^63 bytes"]);
    (3..9).for_each(|number| fs::remove_file(name(number)).unwrap());
    let few = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(few.total_len(), 3 * (len - 88));
    // What is beside the weights counts too.
    for number in 0..3 {
        File::create(dir.path().join(number.to_string())).unwrap().set_len((1 << 63) - 4096).unwrap();
    }
    let target = dir.path().with_extension("store");
    let error = convert(&few, &target, &ConvertOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");

    // One file, whose bytes many tensors of the original's layout share.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    File::create(dir.path().join("tensor.data_0")).unwrap().set_len(len).unwrap();
    for (many, fits) in [(8, false), (3, true)] {
        let entry = |n: u64| {
            let len = len - n;
            format!(r#""t{n}":[0,{len},[{len}],[1],"torch.uint8"]"#)
        };
        let entries = (0..many).map(entry).collect::<Vec<_>>().join(",");
        fs::write(dir.path().join("tensor_index.json"), format!("{{{entries}}}")).unwrap();
        match Checkpoint::open(dir.path()) {
            Ok(checkpoint) => assert!(fits && checkpoint.total_len() > len),
            Err(error) => assert!(!fits && error.to_string().contains("add up to 2^63 bytes"), "{error}"),
        }
    }
}

#[test]
fn directories_without_a_checkpoint() {
    let dir = tempdir().unwrap();
    assert_refused(dir.path(), ErrorKind::NotFound, &["no manifest.json"]);
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert_refused(dir.path(), ErrorKind::NotFound, &["pytorch_model.bin", "safetensors first"]);
    fs::create_dir(dir.path().join("rank_0")).unwrap();
    assert_refused(dir.path(), ErrorKind::NotFound, &["open rank_0"]);
    assert_refused(&dir.path().join("missing"), ErrorKind::NotFound, &["no such"]);
}

#[test]
fn a_header_of_200_000_tensors_is_read_and_their_overlap_is_found() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let entry =
        |i: u64, start: u64| format!(r#""t{i}":{{"dtype":"U8","shape":[2],"data_offsets":[{start},{}]}}"#, start + 2);
    let mut entries: Vec<String> = (0..200_000).map(|i| entry(i, 2 * i)).collect();
    write_raw(&path, &format!("{{{}}}", entries.join(",")), 400_000);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!((checkpoint.tensors().len(), checkpoint.total_len()), (200_000, 400_000));
    let report = convert(&checkpoint, &dir.path().join("store"), &ConvertOptions::new()).unwrap();
    assert_eq!(report.tensors, 200_000);
    assert_eq!(Checkpoint::open(dir.path().join("store")).unwrap().tensors().len(), 200_000);
    entries[150_000] = entry(150_000, 299_999);
    write_raw(&path, &format!("{{{}}}", entries.join(",")), 400_000);
    assert_refused(&path, ErrorKind::Format, &["\"t150000\"", "overlaps"]);
}

/// A header with each kind of thing in it, much of it such as may be changed, and the bytes of its tensors.
const HEADER: &str = r#"{"__metadata__":{"format":"pt"},"a\n\u00e9":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F4","shape":[2],"data_offsets":[12,13]},"model.layers.0.mlp.experts.0.down_proj.weight":{"dtype":"I64","shape":[1],"data_offsets":[13,21]}}                        "#;
const HEADER_DATA: u64 = 21;

static STORE: LazyLock<(TempDir, PathBuf, Vec<u8>)> = LazyLock::new(|| {
    let (dir, path) = store();
    let manifest = fs::read(path.join("manifest.json")).unwrap();
    (dir, path, manifest)
});

/// Changes a few bytes of a text, removes or repeats a piece.
fn mutate(text: &mut Vec<u8>, changes: &[(prop::sample::Index, u8, u8)]) {
    for (at, kind, byte) in changes {
        if text.is_empty() {
            return;
        }
        let at = at.index(text.len());
        match kind {
            0 => text[at] = *byte,
            1 => drop(text.remove(at)),
            2 => text.insert(at, b"0123456789\"\\{}[],:-e"[usize::from(*byte) % 20]),
            3 => text.truncate(at),
            _ => text.extend_from_within(at.saturating_sub(usize::from(*byte))..at),
        }
    }
}

#[test]
fn a_mutated_header_gives_an_error_or_tensors_inside_the_file() {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), 0..5u8, any::<u8>()), 0..4);
    let data = prop_oneof![3 => Just(HEADER_DATA), 1 => 0..40u64];
    // Those opened that were not changed, and that were.
    let accepted = [Cell::new(0), Cell::new(0)];
    let config = ProptestConfig { source_file: Some(file!()), ..ProptestConfig::with_cases(2000) };
    let ran = TestRunner::new(config).run(&(changes, data), |(changes, data)| {
        let mut json = HEADER.as_bytes().to_vec();
        mutate(&mut json, &changes);
        let is_changed = json != HEADER.as_bytes();
        let dir = tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let file = test_support::safetensors(json, &vec![0; usize::try_from(data).unwrap()]);
        fs::write(&path, &file).unwrap();
        match Checkpoint::open(&path) {
            Ok(checkpoint) => {
                for tensor in checkpoint.tensors() {
                    prop_assert_eq!(tensor.dtype.byte_len(&tensor.shape), Ok(tensor.len));
                    prop_assert!(tensor.offset + tensor.len <= file.len() as u64);
                }
                let count = &accepted[usize::from(is_changed)];
                count.set(count.get() + 1);
            }
            Err(error) => {
                prop_assert!(is_changed || data != HEADER_DATA, "{}", error);
                prop_assert_eq!(error.kind(), ErrorKind::Format);
            }
        }
        Ok(())
    });
    ran.unwrap();
    let accepted = accepted.map(Cell::into_inner);
    assert!(accepted[0] >= 100 && accepted[1] >= 10, "{accepted:?} of 2000 were opened");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_mutated_manifest_gives_an_error_or_the_same_store(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..5u8, any::<u8>()), 1..4),
    ) {
        let (_, path, manifest) = &*STORE;
        let mut json = manifest.clone();
        mutate(&mut json, &changes);
        fs::write(path.join("manifest.json"), json).unwrap();
        let opened = Checkpoint::open(path);
        fs::write(path.join("manifest.json"), manifest).unwrap();
        match opened {
            Ok(checkpoint) => assert_holds(&checkpoint, &[tensor("a")]),
            Err(error) => prop_assert_eq!(error.kind(), ErrorKind::Format),
        }
    }
}
