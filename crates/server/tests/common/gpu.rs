//! A process with memory on a GPU of the test double: this test binary again.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::Path;

use cuda::Driver;
use cudarc::driver::{result, sys};
use sllm_core::{Block, Device, format_uuid};
use sllm_proto::store::load_request::Kind as Asked;
use sllm_proto::store::{Attach, CudaMemory, Pool, StatusRequest, attach};
use test_support::{Other, hex, unhex};
use tonic::Status;

use crate::common::session::{Loading, all_of, load, open_message};
use crate::common::{Served, models};

/// Set in the processes that tests start: the device's ordinal and the bytes of its memory.
const OWNER: &str = "SLLM_TEST_OWNER";

/// A process that owns device memory and has exported it.
pub(crate) struct Owner {
    process: Other,
    pub(crate) handle: Vec<u8>,
    /// As the original writes it.
    pub(crate) uuid: String,
    pub(crate) uuid_bytes: Vec<u8>,
    pub(crate) buffer_id: u64,
}

impl Owner {
    pub(crate) fn start(device: usize, len: u64) -> Owner {
        let mut process = Other::start("owner", |command| {
            command.env(OWNER, format!("{device} {len}")).env("FAKE_CUDA_DEVICES", "2");
            command.env("LD_LIBRARY_PATH", Driver::find().parent().unwrap());
        });
        let uuid = process.answer("uuid");
        let uuid_bytes = unhex(&uuid.replace('-', ""));
        let handle = unhex(&process.answer("handle"));
        let buffer_id = process.answer("buffer").parse().unwrap();
        Owner { process, handle, uuid, uuid_bytes, buffer_id }
    }

    /// Its memory for a server, without what tells it from memory that is made again.
    pub(crate) fn untold(&self) -> CudaMemory {
        let (device, handle) = (self.uuid_bytes.clone(), self.handle.clone());
        CudaMemory { device, handle, ..CudaMemory::default() }
    }

    /// Its memory for a server, with that.
    pub(crate) fn told(&self) -> CudaMemory {
        CudaMemory { buffer_id: Some(self.buffer_id), process: vec![7; 16], ..self.untold() }
    }

    /// Frees its memory and makes it again, with the same handle.
    pub(crate) fn remake(&mut self) {
        self.process.tell("remake");
        assert_eq!(self.handle, unhex(&self.process.answer("handle")));
        let before = std::mem::replace(&mut self.buffer_id, self.process.answer("buffer").parse().unwrap());
        assert_ne!(self.buffer_id, before);
    }

    /// All bytes of its memory, as it sees them.
    pub(crate) fn bytes(&mut self, scratch: &Path) -> Vec<u8> {
        let path = scratch.join("bytes");
        self.process.tell(path.to_str().unwrap());
        self.process.answer("written");
        std::fs::read(path).unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }
}

/// What the server tells of its pool.
pub(crate) async fn pool(served: &Served) -> Pool {
    served.store().await.status(StatusRequest {}).await.unwrap().into_inner().pool.unwrap()
}

/// Loads into host memory, and compares every byte.
pub(crate) async fn load_to_host(served: &Served, name: &str) {
    assert!(load(served, name).await.unwrap().0 == models::bytes(&served.models().join(name)));
}

/// Loads into another process's memory on a GPU, and compares every byte.
pub(crate) async fn load_to_gpu(served: &Served, name: &str, device: usize) -> Result<(), Status> {
    let path = served.models().join(name);
    let (open, source) = (open_message(name, &path), models::bytes(&path));
    let mut owner = Owner::start(device, source.len() as u64);
    let (mut loading, opened) = Loading::open(&mut served.store().await, open.clone()).await?;
    let memory = Some(attach::Memory::Cuda(owner.told()));
    loading.ask(Asked::Attach(Attach { len: opened.total, offset: 0, memory })).await;
    loading.batch(all_of(&open)).await;
    loading.done().await?;
    assert!(owner.bytes(served.dir.path()) == source);
    Ok(())
}

/// What an owner fills its memory with.
pub(crate) const UNTOUCHED: u8 = 0x5C;

/// What the other process does: the test `owner` of a binary calls it.
pub(crate) fn own() {
    let Ok(told) = std::env::var(OWNER) else { return };
    let (ordinal, len) = told.split_once(' ').unwrap();
    let device = Device::cuda(ordinal.parse().unwrap()).unwrap();
    let len: usize = len.parse().unwrap();
    // SAFETY: the device exists; its context is kept until the process ends.
    unsafe { result::ctx::set_current(result::primary_ctx::retain(ordinal.parse().unwrap()).unwrap()).unwrap() };
    println!("uuid: {}", format_uuid(&device.uuid().unwrap().unwrap()));
    let make = || {
        let memory = Block::alloc(&device, len as u64).unwrap();
        // SAFETY: the block has so many bytes.
        unsafe { sys::cuMemsetD8_v2(memory.addr(), UNTOUCHED, len) }.result().unwrap();
        let shared = memory.export().unwrap();
        println!("handle: {}", hex(&shared.handle));
        println!("buffer: {}", shared.buffer_id.unwrap());
        memory
    };
    let mut memory = make();
    for path in std::io::stdin().lines() {
        let path = path.unwrap();
        if path == "remake" {
            drop(memory);
            memory = make();
            continue;
        }
        let mut bytes = vec![0; len];
        // SAFETY: the driver checks the range.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, memory.addr()) }.unwrap();
        std::fs::write(path, bytes).unwrap();
        println!("written: all");
    }
}
