//! Where the system refuses io_uring, as default containers do, loads go on by threads and say so.

use sllm_core::{Checkpoint, EngineChoice, Error, Loader};

/// Makes `io_uring_setup` fail with EPERM in this thread and those that it starts.
fn refuse_io_uring() {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let io_uring_setup = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let mut program = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, io_uring_setup),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: the program lives for the call; the filter concerns this thread alone.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    };
    assert!(refused, "{}", std::io::Error::last_os_error());
}

#[test]
fn loads_go_on_without_io_uring() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.safetensors");
    let json = br#"{"w":{"dtype":"U8","shape":[9000],"data_offsets":[0,9000]}}"#;
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json);
    file.extend((0..9000u32).map(|i| i.to_le_bytes()[0]));
    std::fs::write(&path, &file).unwrap();
    std::thread::spawn(move || {
        refuse_io_uring();
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
