//! A process with memory on a GPU of the test double: this test binary again.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use cuda::Driver;
use cudarc::driver::{result, sys};
use sllm_core::{Block, Device, format_uuid};

/// Set in the processes that tests start: the device's ordinal and the bytes of its memory.
const OWNER: &str = "SLLM_TEST_OWNER";

/// A process that owns device memory and has exported it.
pub(crate) struct Owner {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub(crate) handle: Vec<u8>,
    /// As the original writes it.
    pub(crate) uuid: String,
    pub(crate) uuid_bytes: Vec<u8>,
}

impl Owner {
    pub(crate) fn start(device: usize, len: u64) -> Owner {
        let folder = Driver::find().parent().unwrap().to_owned();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "owner", "--nocapture", "--test-threads=1"]).env(OWNER, format!("{device} {len}"));
        command.env("LD_LIBRARY_PATH", folder).env("FAKE_CUDA_DEVICES", "2");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut owner = Owner { child, input, output, handle: Vec::new(), uuid: String::new(), uuid_bytes: Vec::new() };
        owner.uuid = owner.answer("uuid");
        owner.uuid_bytes = unhex(&owner.uuid.replace('-', ""));
        owner.handle = unhex(&owner.answer("handle"));
        owner
    }

    fn answer(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the owner ended");
            // The harness may have begun the line.
            if let Some((_, rest)) = line.trim_end().split_once(&format!("{word}: ")) {
                return rest.to_owned();
            }
        }
    }

    /// All bytes of its memory, as it sees them.
    pub(crate) fn bytes(&mut self, scratch: &Path) -> Vec<u8> {
        let path = scratch.join("bytes");
        writeln!(self.input, "{}", path.display()).unwrap();
        self.answer("written");
        std::fs::read(path).unwrap()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What an owner fills its memory with.
pub(crate) const UNTOUCHED: u8 = 0x5C;

/// What the other process does: the test `owner` of a binary calls it.
pub(crate) fn own() {
    let Ok(told) = std::env::var(OWNER) else { return };
    let (ordinal, len) = told.split_once(' ').unwrap();
    let device = Device::cuda(ordinal.parse().unwrap()).unwrap();
    let memory = Block::alloc(&device, len.parse().unwrap()).unwrap();
    let len = usize::try_from(memory.len()).unwrap();
    // SAFETY: the device exists; its context is kept until the process ends.
    unsafe { result::ctx::set_current(result::primary_ctx::retain(ordinal.parse().unwrap()).unwrap()).unwrap() };
    // SAFETY: the block has so many bytes.
    unsafe { sys::cuMemsetD8_v2(memory.addr(), UNTOUCHED, len) }.result().unwrap();
    let shared = memory.export().unwrap();
    println!("uuid: {}", format_uuid(&device.uuid().unwrap().unwrap()));
    println!("handle: {}", hex(&shared.handle));
    for path in std::io::stdin().lines() {
        let mut bytes = vec![0; len];
        // SAFETY: the driver checks the range.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, memory.addr()) }.unwrap();
        std::fs::write(path.unwrap(), bytes).unwrap();
        println!("written: all");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}
