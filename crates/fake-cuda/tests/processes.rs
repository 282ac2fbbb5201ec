//! How the library is found, what it takes from the environment, and what it does in other processes.

mod common;

use common::{Context, code};
use cuda::Driver;
use cudarc::driver::{result, sys};
use std::process::Command;

/// Set in the processes that these tests start.
const CHILD: &str = "FAKE_CUDA_TEST_CHILD";

/// Runs one test of this binary in a process of its own, with the driver on its library path.
fn run(test: &str, variables: &[(&str, &str)]) {
    let folder = Driver::find().parent().unwrap().to_owned();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD, "1").env("LD_LIBRARY_PATH", folder);
    let output = command.envs(variables.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "the child ran no test");
}

fn in_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

#[test]
fn cudarc_finds_the_loaded_library() {
    let driver = Driver::load();
    // SAFETY: it opens and closes libraries only.
    assert!(unsafe { sys::is_culib_present() });
    result::init().unwrap();
    assert_eq!(driver.count("cuInit"), 1);
    // SAFETY: as above; the library is kept open.
    let found = unsafe { sys::culib().get::<unsafe extern "C" fn()>(b"fake_cuda_reset") };
    assert!(found.is_ok(), "cudarc opened another driver");
}

#[test]
fn the_name_of_the_real_driver_is_enough() {
    if !in_child() {
        // Without a library path, the loaded library is found by the name it carries.
        return run("the_name_of_the_real_driver_is_enough", &[("LD_LIBRARY_PATH", "")]);
    }
    let driver = Driver::load();
    // SAFETY: the name ends in a NUL; nothing is loaded anew.
    let again = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
    assert!(!again.is_null());
    result::init().unwrap();
    assert_eq!(driver.count("cuInit"), 1);
}

#[test]
fn the_environment_sets_the_driver_up() {
    if !in_child() {
        return run(
            "the_environment_sets_the_driver_up",
            &[
                ("FAKE_CUDA_DEVICES", "2"),
                ("FAKE_CUDA_MEMORY", "1048576"),
                ("FAKE_CUDA_FAIL", "cuMemAlloc_v2:2:700,cuStreamCreate:1"),
            ],
        );
    }
    let _context = Context::new(1).unwrap();
    assert_eq!(result::device::get_count().unwrap(), 2);
    assert_eq!(result::mem_get_info().unwrap(), (1 << 20, 1 << 20));
    // SAFETY: the memory is not read.
    let alloc = || unsafe { result::malloc_sync(1) };
    assert_eq!(code(alloc()), 0);
    assert_eq!(code(alloc()), 700);
    assert_eq!(code(alloc()), 0);
    assert_eq!(code(result::stream::create(result::stream::StreamKind::NonBlocking)), 999);
}

#[test]
fn no_devices_means_no_device() {
    if !in_child() {
        return run("no_devices_means_no_device", &[("FAKE_CUDA_DEVICES", "0")]);
    }
    assert_eq!(code(result::device::get_count()), 3, "not initialised");
    assert_eq!(code(result::init()), 100);
    assert_eq!(code(result::device::get_count()), 3);
}

#[test]
fn a_report_is_left_at_exit() {
    if in_child() {
        let _context = Context::new(0).unwrap();
        // SAFETY: the memory is leaked on purpose and not read.
        let device = unsafe { result::malloc_sync(1000) }.unwrap();
        // SAFETY: the driver checks the range.
        unsafe { result::memcpy_htod_sync(device, &[1u8; 100]) }.unwrap();
        let _leaked = common::stream();
        return std::mem::forget(_context);
    }
    let path = std::env::temp_dir().join(format!("fake-cuda-report-{}.json", std::process::id()));
    run("a_report_is_left_at_exit", &[("FAKE_CUDA_REPORT", path.to_str().unwrap())]);
    let report = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    for line in [
        "\"bytes_h2d\": 100,",
        "\"pageable_copies\": 1,",
        "\"streams\": 1,",
        "\"device_bytes\": {\"0\": 1024},",
        "\"cuMemAlloc_v2\": 1",
    ] {
        assert!(report.contains(line), "{line} in {report}");
    }
}

#[test]
fn a_forked_child_has_no_driver() {
    let _driver = Driver::load();
    let _context = Context::new(0).unwrap();
    // SAFETY: the child calls the driver, which takes no lock there, and ends without running anything else.
    unsafe {
        // Both functions are looked up before the fork, which leaves the child no loader lock to wait for.
        assert_eq!(code(result::device::get_count()), 0);
        assert_eq!(code(result::init()), 0);
        let child = libc::fork();
        if child == 0 {
            let refused = code(result::device::get_count()) == 3 && code(result::init()) == 3;
            libc::_exit(if refused { 0 } else { 1 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        assert_eq!(status, 0);
    }
}
