//! Where the system refuses io_uring, as default containers do, loads go on by threads and say so. Where it refuses more
//! threads, as a limit of processes does, what threads share is done by the one that there is.

mod common;

use common::refuse_syscall;
use sllm_core::{
    Checkpoint, ConvertOptions, EngineChoice, Error, Loader, PrefetchOptions, WorkOptions, convert, export, prefetch,
    verify,
};

#[test]
fn loads_go_on_without_io_uring() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.safetensors");
    let file = test_support::safetensors(test_support::header(9000), &test_support::noise(1, 9000));
    std::fs::write(&path, &file).unwrap();
    std::thread::spawn(move || {
        refuse_syscall(libc::SYS_io_uring_setup, libc::EPERM);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let loaded = Loader::builder().direct(Some(true)).build().unwrap().load(&checkpoint).unwrap();
        assert!(loaded.tensor("w").unwrap().to_vec().unwrap() == file[file.len() - 9000..]);
        let engine = &loaded.report().engines[0];
        assert_eq!(engine.engine, "pread");
        assert!(engine.reason.contains("io_uring is refused"), "{}", engine.reason);

        let forced = Loader::builder().engine(EngineChoice::Uring).build().unwrap().load(&checkpoint).unwrap_err();
        assert!(matches!(forced, Error::Engine { engine: "uring", .. }), "{forced}");
    })
    .join()
    .unwrap();
}

#[test]
fn conversions_and_loads_go_on_without_more_threads() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let len = 9 << 20; // three chunks
    let (path, store, back) = (dir.path().join("model.safetensors"), dir.path().join("store"), dir.path().join("back"));
    let file = test_support::safetensors(test_support::header(len), &test_support::noise(1, 9 << 20));
    std::fs::write(&path, &file).unwrap();
    std::thread::spawn(move || {
        for call in [libc::SYS_clone, libc::SYS_clone3] {
            refuse_syscall(call, libc::EAGAIN);
        }
        assert!(std::thread::Builder::new().spawn(|| ()).is_err());
        let checkpoint = Checkpoint::open(&path).unwrap();
        convert(&checkpoint, &store, &ConvertOptions::new().threads(8)).unwrap();
        let store = Checkpoint::open(&store).unwrap();
        assert_eq!(verify(&store, &WorkOptions::new()).unwrap().chunks, 3);
        export(&store, &back, &WorkOptions::new()).unwrap();
        let tensor = |bytes: &[u8]| bytes[bytes.len() - (9 << 20)..].to_vec();
        assert!(tensor(&std::fs::read(back.join("model.safetensors")).unwrap()) == tensor(&file));
        let report = prefetch(&checkpoint, &PrefetchOptions::new().yields(false)).unwrap();
        assert_eq!(report.bytes, file.len() as u64);
        for direct in [Some(true), Some(false)] {
            for (checkpoint, verify) in [(&checkpoint, false), (&store, true)] {
                let loader = Loader::builder().direct(direct).verify(verify).threads(8).build().unwrap();
                let loaded = loader.load(checkpoint).unwrap();
                assert!(loaded.tensors().all(|loaded| loaded.to_vec().unwrap() == tensor(&file)));
                let report = loaded.report();
                assert_eq!(report.engines[0].threads, 1);
                assert!(report.notes.iter().any(|note| note.contains("fewer threads")), "{:?}", report.notes);
            }
        }
    })
    .join()
    .unwrap();
}
