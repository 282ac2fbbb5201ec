//! The threads of clients. Alone in its process, so that it can count them.

mod common;

use common::{TestServer, host_block, model};
use sllm_core::{Control, Segment};

fn client_threads() -> usize {
    let name =
        |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(entry.ok()?.path().join("comm")).ok();
    std::fs::read_dir("/proc/self/task").unwrap().filter_map(name).filter(|name| name.trim() == "sllm-client").count()
}

#[test]
fn a_clients_thread_ends_with_its_last_clone() {
    let server = TestServer::start();
    let model = model(1000);
    assert_eq!(client_threads(), 0);
    let remote = server.remote();
    let client = remote.client().unwrap();
    let (block, _) = host_block(1000);
    remote.fill(&model.checkpoint, &[Segment::contiguous(0, 0, 1000, 0, 0)], &[block], &Control::new()).unwrap();
    assert_eq!(client_threads(), 1);
    drop(remote);
    assert!(client.pin("m").unwrap().pinned);
    drop(client);
    assert_eq!(client_threads(), 0);
}
