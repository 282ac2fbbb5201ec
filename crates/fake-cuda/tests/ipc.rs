//! Device memory of one process in another. The other process is this binary again, which does what it is told.

mod common;

use common::{Context, Pages, code, read, stream, upload};
use cuda::{Driver, POISON};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Set in the exporters that these tests start: the ordinal of the device.
const EXPORTER: &str = "FAKE_CUDA_TEST_EXPORTER";
/// Bytes of the exported allocation. No multiple of a page.
const LEN: usize = 10_000;
const LAZY: u32 = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;

type Handle = sys::CUipcMemHandle;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}

fn handle_of(bytes: [u8; 64]) -> Handle {
    Handle { reserved: bytes.map(|byte| std::ffi::c_char::from_le_bytes([byte])) }
}

fn bytes_of(handle: &Handle) -> [u8; 64] {
    handle.reserved.map(|byte| byte.to_le_bytes()[0])
}

fn get(pointer: u64) -> Result<Handle, DriverError> {
    let mut handle = handle_of([0; 64]);
    // SAFETY: the driver writes one handle.
    unsafe { sys::cuIpcGetMemHandle(&raw mut handle, pointer) }.result().map(|()| handle)
}

fn open(handle: &Handle, flags: u32) -> Result<u64, DriverError> {
    let mut pointer = 0;
    // SAFETY: the driver checks the handle and writes one pointer.
    unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut pointer, *handle, flags) }.result().map(|()| pointer)
}

fn close(pointer: u64) -> u32 {
    // SAFETY: the driver checks the pointer.
    code(unsafe { sys::cuIpcCloseMemHandle(pointer) }.result())
}

fn range(pointer: u64) -> Result<(u64, usize), DriverError> {
    let (mut base, mut len) = (0, 0);
    // SAFETY: the driver writes two numbers.
    unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut len, pointer) }.result().map(|()| (base, len))
}

/// What tells an allocation from all others of its process.
fn buffer_id(pointer: u64) -> u64 {
    let mut id = 0u64;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID;
    // SAFETY: the driver writes one number of 64 bits.
    unsafe { sys::cuPointerGetAttribute((&raw mut id).cast(), attribute, pointer) }.result().unwrap();
    id
}

/// What the exporter fills its memory with.
fn pattern() -> Vec<u8> {
    (0..LEN).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

/// A process that has exported memory.
struct Exporter {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    handle: Handle,
}

impl Exporter {
    fn start() -> Self {
        Self::start_on(0)
    }

    fn start_on(device: i32) -> Self {
        let folder = Driver::find().parent().unwrap().to_owned();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "exporter", "--nocapture", "--test-threads=1"]).env(EXPORTER, device.to_string());
        command.env("LD_LIBRARY_PATH", folder).env("FAKE_CUDA_DEVICES", "2");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut exporter = Self { child, input, output, handle: handle_of([0; 64]) };
        exporter.handle = handle_of(exporter.answer("handle").try_into().unwrap());
        exporter
    }

    /// The bytes of the next line that begins so.
    fn answer(&mut self, word: &str) -> Vec<u8> {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the exporter ended");
            // The harness may have begun the line.
            if let Some((_, rest)) = line.trim_end().split_once(&format!("{word}:")) {
                return unhex(rest);
            }
        }
    }

    fn ask(&mut self, word: &str) -> Vec<u8> {
        writeln!(self.input, "{word}").unwrap();
        self.answer(word)
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test of its own: the other process.
#[test]
fn exporter() {
    let Ok(device) = std::env::var(EXPORTER) else { return };
    let _context = Context::new(device.parse().unwrap()).unwrap();
    // SAFETY: the driver checks the ranges.
    let mut pointer = unsafe { result::malloc_sync(LEN) }.unwrap();
    // SAFETY: as above.
    unsafe { result::memcpy_htod_sync(pointer, &pattern()) }.unwrap();
    println!("handle:{}", hex(&bytes_of(&get(pointer + 5000).unwrap())));
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "read" => println!("read:{}", hex(&read(pointer, LEN))),
            "free" => {
                // SAFETY: allocated above, not used again.
                unsafe { result::free_sync(pointer) }.unwrap();
                println!("free:");
            }
            "remake" => {
                let before = (pointer, bytes_of(&get(pointer).unwrap()), buffer_id(pointer));
                // SAFETY: allocated above; what is allocated now takes its place.
                pointer = unsafe { result::free_sync(pointer).and_then(|()| result::malloc_sync(LEN)) }.unwrap();
                let after = (pointer, bytes_of(&get(pointer).unwrap()), buffer_id(pointer + 1));
                assert!(before.0 == after.0 && before.1 == after.1 && before.2 != after.2);
                println!("remake:");
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn what_one_process_writes_the_other_sees() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(5));
    let _context = Context::new(0).unwrap();
    let mut exporter = Exporter::start();
    let pointer = open(&exporter.handle, LAZY).unwrap();
    assert_eq!(read(pointer, LEN), pattern());
    assert_eq!(range(pointer + 77).unwrap(), (pointer, LEN));
    assert_eq!((driver.device_bytes_now(0), driver.get("imports")), (0, 1), "it counts against its own device");

    let pages = Pages::new(4096);
    pages.fill(0xEE);
    pages.register(0, 4096, 0).unwrap();
    let stream = stream();
    upload(pointer + 3000, &pages, 0, 4096, stream).unwrap();
    // The last close waits for the copy.
    assert_eq!(close(pointer), 0);
    assert_eq!(driver.get("imports"), 0);
    let mut expected = pattern();
    expected[3000..3000 + 4096].fill(0xEE);
    assert!(exporter.ask("read") == expected);
    pages.unregister(0).unwrap();
    // SAFETY: made above, not used again.
    unsafe { result::stream::destroy(stream) }.unwrap();
}

#[test]
fn copies_that_leave_opened_memory_are_refused() {
    let _driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let exporter = Exporter::start();
    let pointer = open(&exporter.handle, LAZY).unwrap();
    // SAFETY: the driver checks the range.
    let fill = |at: u64, len: usize| code(unsafe { sys::cuMemsetD8_v2(at, 1, len) }.result());
    assert_eq!(fill(pointer + 1, LEN), 1);
    assert_eq!(fill(pointer, LEN), 0);
    assert_eq!(close(pointer), 0);
    assert_eq!(fill(pointer, 1), 1, "it is closed");
    assert_eq!(code(range(pointer)), 500);
}

#[test]
fn a_handle_opened_twice_has_one_address_and_is_closed_twice() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let exporter = Exporter::start();
    let pointer = open(&exporter.handle, LAZY).unwrap();
    assert_eq!(open(&exporter.handle, LAZY).unwrap(), pointer);
    assert_eq!((driver.get("imports"), close(pointer)), (2, 0));
    assert_eq!(read(pointer, LEN), pattern());
    assert_eq!((close(pointer), close(pointer)), (0, 1));
    assert_eq!(driver.get("imports"), 0);
}

#[test]
fn opened_memory_stays_when_its_exporter_frees_it_or_is_killed() {
    let _driver = Driver::load();
    let _context = Context::new(0).unwrap();
    for kill in [false, true] {
        let mut exporter = Exporter::start();
        let handle = exporter.handle;
        let pointer = open(&handle, LAZY).unwrap();
        if kill {
            exporter.kill();
        } else {
            exporter.ask("free");
        }
        assert_eq!(read(pointer, LEN), pattern());
        // SAFETY: the driver checks the range.
        assert_eq!(code(unsafe { sys::cuMemsetD8_v2(pointer, 1, LEN) }.result()), 0);
        assert_eq!(close(pointer), 0);
        assert_eq!(code(open(&handle, LAZY)), 205, "there is nothing to open any more");
    }
}

#[test]
fn memory_that_is_made_again_has_its_handle_and_what_is_open_is_still_the_old_memory() {
    let _driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let mut exporter = Exporter::start();
    let stale = open(&exporter.handle, LAZY).unwrap();
    exporter.ask("remake");
    assert_eq!(open(&exporter.handle, LAZY).unwrap(), stale);
    assert_eq!(read(stale, LEN), pattern());
    assert_eq!((close(stale), close(stale)), (0, 0));
    let fresh = open(&exporter.handle, LAZY).unwrap();
    assert_eq!(read(fresh, LEN), [POISON; LEN]);
    // SAFETY: the driver checks the range.
    assert_eq!(code(unsafe { sys::cuMemsetD8_v2(fresh, 1, LEN) }.result()), 0);
    assert_eq!(exporter.ask("read"), [1; LEN]);
    assert_eq!(close(fresh), 0);
}

#[test]
fn a_handle_that_no_driver_made_is_refused() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let exporter = Exporter::start();
    let good = bytes_of(&exporter.handle);
    let mut cut = good;
    cut[40..].fill(0);
    for bytes in [[0; 64], [0xFF; 64], cut] {
        assert_eq!(code(open(&handle_of(bytes), LAZY)), 1);
    }
    assert_eq!(code(open(&exporter.handle, 0)), 1, "flags");
    assert_eq!(driver.get("imports"), 0);
    close(open(&exporter.handle, LAZY).unwrap());
}

#[test]
fn a_handle_of_another_device_is_refused() {
    let driver = Driver::load();
    driver.set_devices(2);
    let exporter = Exporter::start_on(1);
    {
        let _context = Context::new(0).unwrap();
        assert_eq!(code(open(&exporter.handle, LAZY)), 101);
    }
    let _context = Context::new(1).unwrap();
    assert_eq!(read(open(&exporter.handle, LAZY).unwrap(), LEN), pattern());
    drop(_context);
    assert_eq!((driver.get("imports"), driver.get("abandoned_imports")), (0, 1), "closed with its context");
}

#[test]
fn a_process_does_not_open_its_own_handle() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    // SAFETY: the memory is freed once, below.
    let pointer = unsafe { result::malloc_sync(100) }.unwrap();
    let handle = get(pointer).unwrap();
    assert_eq!(bytes_of(&handle), bytes_of(&get(pointer + 99).unwrap()), "one handle an allocation");
    assert_eq!(code(open(&handle, LAZY)), 201);
    assert_eq!(close(pointer), 1, "it was not opened");
    // SAFETY: allocated above.
    unsafe { result::free_sync(pointer) }.unwrap();
    assert_eq!(driver.device_bytes_now(0), 0);
}

#[test]
fn only_device_memory_of_the_process_itself_is_exported() {
    let driver = Driver::load();
    let _context = Context::new(0).unwrap();
    let exporter = Exporter::start();
    let pointer = open(&exporter.handle, LAZY).unwrap();
    assert_eq!(code(get(pointer)), 1, "another process's");
    // SAFETY: the driver checks the pointer.
    assert_eq!(code(unsafe { result::free_sync(pointer) }), 1, "it is closed, not freed");
    assert_eq!(close(pointer), 0);
    let pages = Pages::new(4096);
    assert_eq!(code(get(pages.at.expose_provenance() as u64)), 1);
    // SAFETY: the memory is freed once, below.
    let pointer = unsafe { result::malloc_sync(LEN) }.unwrap();
    driver.set_no_ipc(true);
    assert_eq!(code(get(pointer)), 1);
    driver.set_no_ipc(false);
    assert_eq!(code(get(pointer)), 0);
    // SAFETY: allocated above.
    unsafe { result::free_sync(pointer) }.unwrap();
}

#[test]
fn exporting_waits_for_copies_and_keeps_address_and_bytes() {
    let driver = Driver::load();
    driver.set_delay(Duration::from_millis(5));
    let _context = Context::new(0).unwrap();
    let pages = Pages::new(4 * 4096);
    pages.fill(7);
    pages.register(0, pages.len, 0).unwrap();
    // SAFETY: the memory is freed once, below.
    let pointer = unsafe { result::malloc_sync(pages.len) }.unwrap();
    let stream = stream();
    upload(pointer, &pages, 0, pages.len, stream).unwrap();
    get(pointer).unwrap();
    assert_eq!(driver.bytes_h2d(), pages.len as u64, "the copy was not waited for");
    upload(pointer, &pages, 0, 100, stream).unwrap();
    assert_eq!(read(pointer, pages.len), pages.bytes());
    pages.unregister(0).unwrap();
    // SAFETY: made above, not used again.
    unsafe { (result::stream::destroy(stream).unwrap(), result::free_sync(pointer).unwrap()) };
}
