//! Where the system refuses io_uring, as default containers do, loads go on by threads and say so.

mod common;

use common::refuse_syscall;
use sllm_core::{Checkpoint, EngineChoice, Error, Loader};

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
