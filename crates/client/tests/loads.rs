//! Loads to host memory: what arrives, and what happens when something goes wrong.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Fault, TestServer, bytes_of, host_block, model};
use sllm_client::{ClientOptions, Error, Refusal, RemoteOptions, StoreRemote};
use sllm_core::{Cancel, Checkpoint, Control, LoadReport, Loader, Progress, Segment};

/// Loads by a server with this fault, and gives the error.
fn fails(fault: Fault) -> (Error, TestServer) {
    let server = TestServer::start();
    server.fault(fault);
    let model = model(12 << 20);
    let (block, _) = host_block(12 << 20);
    let segments = [Segment::contiguous(0, 0, 12 << 20, 0, 0)];
    let remote = StoreRemote::new(
        server.client(),
        RemoteOptions::new().staging_bytes(4 << 20).patience(Duration::from_millis(300)),
    );
    let error = remote.fill(&model.checkpoint, &segments, &[block], &Control::new()).unwrap_err();
    (error, server)
}

#[test]
fn rows_of_one_and_two_dimensions_arrive_where_they_belong() {
    let server = TestServer::start();
    let model = model(20_000_000);
    let (segments, lens) = model.segments();
    let (blocks, files): (Vec<_>, Vec<_>) = lens.iter().map(|&len| host_block(len)).unzip();
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    let control = Control::new().on_progress(move |progress| telling.lock().unwrap().push(progress));
    let moved = server.remote().fill(&model.checkpoint, &segments, &blocks, &control).unwrap();
    let expected = model.expected(&segments, &lens);
    for (file, expected) in files.iter().zip(expected) {
        assert!(bytes_of(file) == expected);
    }
    let total: u64 = segments.iter().map(Segment::len).sum();
    assert_eq!((moved.bytes, moved.staged, moved.from_pool), (total, total, total));
    let log = server.log();
    // Halves of 2 MiB.
    assert_eq!((log.opens.len(), log.attached), (1, 1));
    assert!(log.batches.len() as u64 >= total / (2 << 20), "{:?}", log.batches);
    assert_eq!(log.opens[0].model, model.path.canonicalize().unwrap().to_str().unwrap());
    let file = &log.opens[0].files[0];
    assert_eq!((file.name.as_str(), file.len), ("model.safetensors", model.bytes.len() as u64));
    assert!(file.modified_s > 1_000_000_000 && log.timeouts.iter().all(|&ms| (60_000..61_000).contains(&ms)));
    let told = told.lock().unwrap();
    assert_eq!(told.last(), Some(&Progress { done: total, total }));
    assert!(told.is_sorted_by_key(|progress| progress.done) && told.len() > log.batches.len());
}

#[test]
fn what_passes_a_file_or_a_block_is_refused_before_the_server_is_asked() {
    let server = TestServer::start();
    let model = model(1000);
    let (block, _) = host_block(100);
    for segment in [
        Segment::contiguous(0, 0, 100, 0, 1),
        Segment::contiguous(0, u64::MAX, 2, 0, 0),
        Segment::contiguous(1, 0, 1, 0, 0),
        Segment::contiguous(0, 0, 1, 1, 0),
    ] {
        let result = server.remote().fill(&model.checkpoint, &[segment], std::slice::from_ref(&block), &Control::new());
        assert!(matches!(result, Err(Error::Core(sllm_core::Error::Invalid(_)))), "{segment:?}: {result:?}");
    }
    assert!(server.log().opens.is_empty());
}

#[test]
fn batches_of_one_checkpoint_go_by_one_stream() {
    let server = TestServer::start();
    let model = model(1 << 20);
    let remote = StoreRemote::new(server.client(), RemoteOptions::new().linger(Duration::from_secs(1000)));
    for round in 1..=5u64 {
        let (block, file) = host_block(1000);
        let segment = Segment::contiguous(0, round * 1000, 1000, 0, 0);
        remote.fill(&model.checkpoint, &[segment], &[block], &Control::new()).unwrap();
        assert!(bytes_of(&file) == model.bytes[round as usize * 1000..][..1000]);
    }
    let log = server.log();
    assert_eq!((log.opens.len(), log.attached, log.batches.len(), log.ended), (1, 1, 5, 0));
}

#[test]
fn a_stream_ends_when_no_batch_follows() {
    let server = TestServer::start();
    let model = model(1 << 20);
    let remote = StoreRemote::new(server.client(), RemoteOptions::new().linger(Duration::from_millis(1)));
    for opens in 1..=2 {
        let (block, _) = host_block(1000);
        remote.fill(&model.checkpoint, &[Segment::contiguous(0, 0, 1000, 0, 0)], &[block], &Control::new()).unwrap();
        while server.log().ended < opens {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(server.log().opens.len(), opens);
    }
}

#[test]
fn staging_memory_grows_with_what_is_wanted() {
    let server = TestServer::start();
    let model = model(9 << 20);
    let options = RemoteOptions::new().staging_bytes(64 << 20).linger(Duration::from_secs(1000));
    let remote = StoreRemote::new(server.client(), options);
    for len in [1000, 9 << 20, 1000] {
        let (block, file) = host_block(len);
        let segment = Segment::contiguous(0, 0, len, 0, 0);
        remote.fill(&model.checkpoint, &[segment], &[block], &Control::new()).unwrap();
        assert!(bytes_of(&file) == model.bytes[..len as usize]);
    }
    let log = server.log();
    assert_eq!((log.opens.len(), log.attached, log.batches.as_slice()), (1, 2, &[1, 1, 1][..]));
}

#[test]
fn two_hundred_thousand_segments_arrive() {
    let server = TestServer::start();
    let model = model(4_000_000);
    let segments: Vec<Segment> =
        (0..200_000).map(|i| Segment::contiguous(0, i * 20, 9, 0, (199_999 - i) * 9)).collect();
    let (block, file) = host_block(1_800_000);
    let remote = StoreRemote::new(server.client(), RemoteOptions::new());
    remote.fill(&model.checkpoint, &segments, &[block], &Control::new()).unwrap();
    assert!(bytes_of(&file) == model.expected(&segments, &[1_800_000])[0]);
    assert_eq!(server.log().batches.iter().sum::<usize>(), 200_000);
}

#[test]
fn threads_load_at_once_by_one_remote() {
    let server = TestServer::start();
    let model = model(5 << 20);
    let remote = server.remote();
    std::thread::scope(|scope| {
        for number in 0..8u64 {
            let (model, remote) = (&model, &remote);
            scope.spawn(move || {
                let (block, file) = host_block(4 << 20);
                let segment = Segment::contiguous(0, number * 1000, 4 << 20, 0, 0);
                remote.fill(&model.checkpoint, &[segment], &[block], &Control::new()).unwrap();
                assert!(bytes_of(&file) == model.bytes[number as usize * 1000..][..4 << 20]);
            });
        }
    });
}

#[test]
fn a_refusal_is_told_in_the_servers_words() {
    let (error, _server) = fails(Fault::Refuse);
    assert!(matches!(&error, Error::Refused { refusal: Refusal::OtherFiles, .. }), "{error}");
    assert!(error.to_string().ends_with("model.safetensors has another length here"), "{error}");
    let (error, _server) = fails(Fault::RefuseSecond);
    assert!(
        matches!(&error, Error::Refused { refusal: Refusal::Failed, message, .. } if message == "the disk is on fire")
    );
}

#[test]
fn a_server_that_dies_in_the_middle_is_told_from_one_that_fails() {
    let (error, _server) = fails(Fault::Die);
    assert!(matches!(error, Error::Lost { .. }), "{error}");
}

#[test]
fn a_server_that_ends_in_the_middle_has_not_loaded() {
    let (error, _server) = fails(Fault::End);
    assert!(matches!(error, Error::Lost { .. }), "{error}");
}

#[test]
fn a_server_that_says_nothing_is_given_up_after_the_deadline() {
    let (error, server) = fails(Fault::Silent);
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert!(server.log().timeouts[1] < 400);
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    for fault in [Fault::Short, Fault::Unopened] {
        let (error, _server) = fails(fault);
        assert!(matches!(error, Error::Protocol(_)), "{fault:?}: {error}");
    }
}

#[test]
fn after_a_failed_load_a_new_one_succeeds() {
    let server = TestServer::start();
    let model = model(12 << 20);
    let (block, file) = host_block(12 << 20);
    let segments = [Segment::contiguous(0, 0, 12 << 20, 0, 0)];
    let remote = server.remote();
    server.fault(Fault::RefuseSecond);
    remote.fill(&model.checkpoint, &segments, std::slice::from_ref(&block), &Control::new()).unwrap_err();
    server.fault(Fault::None);
    remote.fill(&model.checkpoint, &segments, &[block], &Control::new()).unwrap();
    assert!(bytes_of(&file) == model.bytes[..12 << 20]);
}

#[test]
fn a_cancelled_load_returns_when_the_server_has_stopped_writing() {
    let server = TestServer::start();
    server.fault(Fault::Slow);
    let model = model(12 << 20);
    let (block, _) = host_block(12 << 20);
    let segments = [Segment::contiguous(0, 0, 12 << 20, 0, 0)];
    let cancel = Cancel::new();
    let control = Control::new().cancelled_by(cancel.clone());
    let remote = server.remote();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| remote.fill(&model.checkpoint, &segments, &[block], &control));
        while server.rows() < 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!load.is_finished() && server.is_writing());
        cancel.cancel();
        assert!(matches!(load.join().unwrap(), Err(Error::Cancelled)));
    });
    let rows = server.rows();
    assert!(!server.is_writing(), "the server still writes");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(server.rows(), rows);
}

#[test]
fn a_load_that_is_out_of_time_returns_when_the_server_has_stopped_writing() {
    let (error, server) = fails(Fault::Slow);
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert!(server.rows() > 0 && !server.is_writing(), "the server still writes");
}

#[test]
fn a_cancelled_control_starts_nothing() {
    let server = TestServer::start();
    let model = model(1000);
    let (block, _) = host_block(1000);
    let cancel = Cancel::new();
    cancel.cancel();
    let control = Control::new().cancelled_by(cancel);
    let segment = Segment::contiguous(0, 0, 1000, 0, 0);
    let result = server.remote().fill(&model.checkpoint, &[segment], &[block], &control);
    assert!(matches!(result, Err(Error::Cancelled)));
    assert!(server.log().opens.is_empty());
}

#[test]
fn a_model_can_be_named_as_the_server_knows_it() {
    let server = TestServer::start();
    let model = model(1000);
    let (block, _) = host_block(1000);
    let link = model.dir.path().join("link");
    std::os::unix::fs::symlink(&model.path, &link).unwrap();
    let options = RemoteOptions::new().model(link.to_str().unwrap().to_owned());
    let remote = StoreRemote::new(server.client(), options);
    remote.fill(&model.checkpoint, &[Segment::contiguous(0, 0, 9, 0, 0)], &[block], &Control::new()).unwrap();
    assert_eq!(server.log().opens[0].model, link.to_str().unwrap());
}

/// Loads a model by a loader that asks this server first, and compares what arrived.
fn load_by(remote: StoreRemote, model: &common::Model) -> LoadReport {
    let loader = Loader::builder().remote(Box::new(remote)).build().unwrap();
    let checkpoint = Checkpoint::open(&model.path).unwrap();
    let loaded = loader.load(&checkpoint).unwrap();
    let bytes = loaded.tensor("w").unwrap().to_vec().unwrap();
    assert!(model.bytes.ends_with(&bytes) && !bytes.is_empty());
    loaded.report().clone()
}

#[test]
fn a_loader_goes_on_from_files_when_the_server_fails_and_says_why_once() {
    let model = model(12 << 20);
    for (fault, words) in [
        (Fault::None, ""),
        (Fault::Refuse, "model.safetensors has another length here"),
        (Fault::RefuseSecond, "the disk is on fire"),
        (Fault::Die, "the connection to the store server was lost"),
        (Fault::End, "the connection to the store server was lost"),
        (Fault::Silent, "did not load the model within"),
        (Fault::Short, "what it must not"),
    ] {
        let server = TestServer::start();
        server.fault(fault);
        let options = RemoteOptions::new().staging_bytes(4 << 20).patience(Duration::from_millis(300));
        let report = load_by(StoreRemote::new(server.client(), options), &model);
        if fault == Fault::None {
            assert_eq!((report.engines[0].engine, report.notes.len()), ("server", 0));
            assert!(report.engines[0].reason.contains(&server.address), "{}", report.engines[0].reason);
        } else {
            assert_ne!(report.engines[0].engine, "server");
            assert_eq!(report.notes.len(), 1, "{fault:?}: {:?}", report.notes);
            assert!(report.notes[0].contains(words), "{fault:?}: {:?}", report.notes);
        }
    }
}

#[test]
fn a_loader_goes_on_from_files_where_no_server_is() {
    let model = model(1000);
    let at = ClientOptions::new().address("/nonexistent/s".to_owned());
    let report = load_by(StoreRemote::at(at, RemoteOptions::new()), &model);
    assert!(report.notes[0].contains("no store server answers at unix:/nonexistent/s"), "{:?}", report.notes);
}
