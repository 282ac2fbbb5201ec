//! Files that were written to, and hide it: they are as long as before, and their time of change is the old one.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use common::{Made, entries};
use sllm_core::{Cache, Cancel, Checkpoint, Control, ConvertOptions, Dtype, Error, Loader, convert};
use tempfile::tempdir;

/// Writes a file in place, or a new one if `remade`, of one tensor whose bytes depend on `name`, last changed at `time`.
/// It returns once the system's clock has gone on, so that the file's status has another time than before.
fn write(path: &Path, name: &str, len: u64, time: SystemTime, remade: bool) -> Vec<u8> {
    let status = |path: &Path| path.metadata().ok().map(|m| (m.ctime(), m.ctime_nsec()));
    let before = status(path);
    let bytes = Made::new(name, Dtype::U8, &[len]).bytes;
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{len}],"data_offsets":[0,{len}]}}}}"#);
    loop {
        if remade {
            let _ = fs::remove_file(path);
        }
        fs::write(path, test_support::safetensors(&header, &bytes)).unwrap();
        File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
        if status(path) != before {
            return bytes;
        }
    }
}

fn load(loader: &Loader, path: &Path) -> Vec<u8> {
    loader.load(&Checkpoint::open(path).unwrap()).unwrap().tensor("w").unwrap().to_vec().unwrap()
}

#[test]
fn a_cache_gives_no_bytes_of_what_a_file_was() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let (len, time) = (100_000, SystemTime::UNIX_EPOCH);
    for remade in [false, true] {
        let loader = Loader::builder().cache(Cache::new(8192, 40 * 8192, None).unwrap()).build().unwrap();
        let old = write(&path, "old", len, time, false);
        let opened = Checkpoint::open(&path).unwrap();
        assert!(load(&loader, &path) == old);
        assert!(opened.is_current());
        // While it is open its inode is not used again.
        let opened = Some(opened).filter(|_| !remade);
        let new = write(&path, "new", len, time, remade);
        assert!(load(&loader, &path) == new, "remade: {remade}");
        assert!(opened.is_none_or(|opened| !opened.is_current()));
    }
}

#[test]
fn new_rights_and_names_do_not_fail_a_conversion() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let expected = write(&path, "old", 9 << 20, SystemTime::UNIX_EPOCH, false);
    let (source, link) = (path.clone(), dir.path().join("link"));
    let control = Control::new().on_progress(move |_| drop(fs::hard_link(&source, &link)));
    let options = ConvertOptions::new().threads(1).control(control);
    let target = dir.path().join("store");
    convert(&Checkpoint::open(&path).unwrap(), &target, &options).unwrap();
    assert!(dir.path().join("link").exists());
    assert!(load(&Loader::builder().verify(true).build().unwrap(), &target) == expected);
    // The store still knows its source.
    Checkpoint::open(&target).unwrap().check_source().unwrap();
}

#[test]
fn an_interrupted_conversion_does_not_go_on_from_another_model() {
    let dir = tempdir().unwrap();
    let (path, target) = (dir.path().join("model.safetensors"), dir.path().join("store"));
    let (len, time) = (40 << 20, SystemTime::UNIX_EPOCH);
    for remade in [false, true] {
        write(&path, "old", len, time, false);
        let cancel = Cancel::new();
        let stop = cancel.clone();
        let control = Control::new().cancelled_by(cancel).on_progress(move |p| {
            if p.done >= 16 << 20 {
                stop.cancel();
            }
        });
        let options = ConvertOptions::new().threads(1);
        let error = convert(&Checkpoint::open(&path).unwrap(), &target, &options.clone().control(control)).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        let new = write(&path, "new", len, time, remade);
        let report = convert(&Checkpoint::open(&path).unwrap(), &target, &options).unwrap();
        assert_eq!(report.resumed_bytes, 0, "remade: {remade}");
        assert!(load(&Loader::builder().verify(true).build().unwrap(), &target) == new, "remade: {remade}");
        fs::remove_dir_all(&target).unwrap();
    }
    assert_eq!(entries(dir.path()), ["model.safetensors"]);
}
