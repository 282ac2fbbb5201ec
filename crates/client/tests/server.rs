//! The client and the real server, in one process: the host's road.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{Model, bytes_of, host_block, model};
use sllm_client::{ClientOptions, Error, Refusal, RemoteOptions, StoreClient, StoreRemote};
use sllm_core::{Cancel, Checkpoint, Control, ConvertOptions, Loader, Segment, convert};
use sllm_server::{Address, Config, Server};
use tokio::sync::oneshot;

const TOKEN: &str = "0123456789abcdef";

/// A server of the directory in which a model lies.
struct Served {
    addresses: Vec<Address>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Served {
    fn start(storage: &Path, change: impl FnOnce(&mut Config)) -> Served {
        let mut config = Config::new(storage);
        config.listen = vec![Address::Unix(storage.join("socket")), Address::tcp("127.0.0.1", 0).unwrap()];
        config.pool_len = 64 << 20;
        config.chunk_len = 4 << 20;
        config.token = Some(sllm_server::Token::new(TOKEN).unwrap());
        config.drain = Duration::ZERO;
        change(&mut config);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let server = runtime.block_on(async { Server::bind(config).unwrap() });
        let addresses = server.addresses();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || {
            let stopped = async {
                let _ = stopped.await;
            };
            runtime.block_on(server.run(stopped)).unwrap();
        };
        Served { addresses, stop: Some(stop), thread: Some(std::thread::spawn(run)) }
    }

    fn options(&self, place: usize) -> ClientOptions {
        ClientOptions::new().address(self.addresses[place].to_string())
    }

    fn client(&self) -> StoreClient {
        StoreClient::connect(&self.options(0)).unwrap()
    }

    fn remote(&self) -> StoreRemote {
        StoreRemote::new(self.client(), RemoteOptions::new().staging_bytes(8 << 20))
    }

    fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A model as a store beside itself.
fn store(model: &Model) -> Checkpoint {
    let path = model.dir.path().join("store");
    convert(&model.checkpoint, &path, &ConvertOptions::new()).unwrap();
    Checkpoint::open(&path).unwrap()
}

#[test]
fn rows_arrive_out_of_files_and_then_out_of_the_pool() {
    let model = model(20_000_000);
    let served = Served::start(model.dir.path(), |_| {});
    let (segments, lens) = model.segments();
    let remote = served.remote();
    for round in 0..2 {
        let (blocks, files): (Vec<_>, Vec<_>) = lens.iter().map(|&len| host_block(len)).unzip();
        let moved = remote.fill(&model.checkpoint, &segments, &blocks, &Control::new()).unwrap();
        for (file, expected) in files.iter().zip(model.expected(&segments, &lens)) {
            assert!(bytes_of(file) == expected);
        }
        assert_eq!(moved.bytes, segments.iter().map(Segment::len).sum::<u64>());
        if round == 1 {
            assert_eq!(moved.from_files, 0);
        } else {
            assert!(moved.from_files > 0);
        }
    }
}

#[test]
fn limits_of_any_length_can_be_waited_for() {
    let model = model(9_000_001);
    let served = Served::start(model.dir.path(), |_| {});
    let forever = Duration::MAX;
    let options = served.options(0).connect_limit(forever).call_limit(forever).silence_limit(forever);
    let client = StoreClient::connect(&options).unwrap();
    client.preload("model", false, &Control::new()).unwrap();
    let remote = RemoteOptions::new().patience(forever).linger(forever);
    let remote = StoreRemote::new(client.clone(), remote);
    let loader = Loader::builder().remote(Box::new(remote)).build().unwrap();
    for _ in 0..2 {
        let loaded = loader.load(&model.checkpoint).unwrap();
        assert_eq!((loaded.report().engines[0].engine, loaded.report().notes.len()), ("server", 0));
    }
    assert_eq!(client.list().unwrap().len(), 1);
}

#[test]
fn a_verified_load_of_a_store_is_left_to_the_server() {
    let model = model(9_000_001);
    let store = store(&model);
    let served = Served::start(model.dir.path(), |_| {});
    let loader = Loader::builder().remote(Box::new(served.remote())).verify(true).build().unwrap();
    for _ in 0..2 {
        let loaded = loader.load(&store).unwrap();
        assert!(model.bytes.ends_with(&loaded.tensor("w").unwrap().to_vec().unwrap()));
        let report = loaded.report();
        assert_eq!((report.engines[0].engine, report.verified, report.notes.len()), ("server", true, 0));
    }
}

#[test]
fn a_model_larger_than_the_pool_streams_through_it() {
    let model = model(50_000_000);
    let served = Served::start(model.dir.path(), |config| (config.pool_len, config.chunk_len) = (16 << 20, 4 << 20));
    let loader = Loader::builder().remote(Box::new(served.remote())).build().unwrap();
    let loaded = loader.load(&model.checkpoint).unwrap();
    assert!(model.bytes.ends_with(&loaded.tensor("w").unwrap().to_vec().unwrap()));
    assert_eq!((loaded.report().engines[0].engine, loaded.report().notes.len()), ("server", 0));
}

#[test]
fn the_commands_of_a_client_change_what_the_server_holds() {
    let model = model(9_000_000);
    let served = Served::start(model.dir.path(), |_| {});
    let client = served.client();
    assert!(client.health().unwrap());
    let len = model.bytes.len() as u64;
    let progress = client.preload("model", true, &Control::new()).unwrap();
    assert_eq!((progress.done, progress.total), (len, len));
    let models = client.list().unwrap();
    assert_eq!((models.len(), models[0].name.as_str(), models[0].len), (1, "model", len));
    assert!(models[0].pinned && models[0].resident >= len, "{models:?}");
    let status = client.status().unwrap();
    assert!(status.pool.resident >= len && status.pool.pinned >= len && status.pool.capacity == 64 << 20, "{status:?}");
    assert_eq!(status.clients, 1);
    // By its whole path, too.
    assert!(!client.unpin(model.path.canonicalize().unwrap().to_str().unwrap()).unwrap().pinned);
    assert!(client.evict("model").unwrap() >= len);
    assert_eq!(client.evict_all().unwrap(), 0);
    for error in [client.pin("none").unwrap_err(), client.preload("none", false, &Control::new()).unwrap_err()] {
        assert!(matches!(error, Error::Refused { refusal: Refusal::NotFound, .. }), "{error}");
    }
}

#[test]
fn a_path_that_the_server_must_not_serve_is_refused_and_files_are_read() {
    let (inside, outside) = (model(1000), model(2000));
    let served = Served::start(inside.dir.path(), |_| {});
    let loader = Loader::builder().remote(Box::new(served.remote())).build().unwrap();
    let loaded = loader.load(&outside.checkpoint).unwrap();
    assert!(outside.bytes.ends_with(&loaded.tensor("w").unwrap().to_vec().unwrap()));
    assert!(loaded.report().notes[0].contains("refused to load the model"), "{:?}", loaded.report().notes);
}

#[test]
fn a_model_of_the_same_lengths_and_times_is_not_taken_for_the_clients() {
    let mine = model(70_000);
    let other = mine.dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let file = std::fs::File::create(other.join("model.safetensors")).unwrap();
    let mut bytes = mine.bytes.clone();
    bytes[50_000] ^= 2;
    std::io::Write::write_all(&mut &file, &bytes).unwrap();
    let time = mine.path.join("model.safetensors").metadata().unwrap().modified().unwrap();
    file.set_modified(time).unwrap();
    let served = Served::start(mine.dir.path(), |_| {});
    // As a server sees it that has another directory under the client's path.
    let remote = StoreRemote::new(served.client(), RemoteOptions::new().model("other".to_owned()));
    let loader = Loader::builder().remote(Box::new(remote)).build().unwrap();
    let loaded = loader.load(&mine.checkpoint).unwrap();
    assert!(mine.bytes.ends_with(&loaded.tensor("w").unwrap().to_vec().unwrap()), "the other model's bytes came");
    assert!(loaded.report().notes[0].contains("another file"), "{:?}", loaded.report().notes);
}

#[test]
fn files_that_changed_since_the_client_opened_them_are_not_loaded() {
    let old = model(5000);
    let served = Served::start(old.dir.path(), |_| {});
    let (block, _) = host_block(1000);
    let segment = [Segment::contiguous(0, 4000, 1000, 0, 0)];
    served.remote().fill(&old.checkpoint, &segment, std::slice::from_ref(&block), &Control::new()).unwrap();
    // Another model of the same length takes its place.
    let file = old.path.join("model.safetensors");
    let mut bytes = old.bytes.clone();
    bytes[4500] ^= 2;
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, &bytes).unwrap();
    let error = served.remote().fill(&old.checkpoint, &segment, std::slice::from_ref(&block), &Control::new());
    assert!(matches!(error, Err(Error::Refused { refusal: Refusal::OtherFiles, .. })), "{error:?}");
    let (block, to) = host_block(1000);
    let new = Checkpoint::open(&old.path).unwrap();
    served.remote().fill(&new, &segment, &[block], &Control::new()).unwrap();
    assert!(bytes_of(&to) == bytes[4000..5000]);
}

#[test]
fn a_file_that_was_written_over_and_given_its_old_time_is_not_loaded_for_who_opened_it_before() {
    use std::os::unix::fs::MetadataExt;

    let old = model(5000);
    let file = old.path.join("model.safetensors");
    let was = file.metadata().unwrap();
    let mut bytes = old.bytes.clone();
    bytes[4500] ^= 2;
    let now = loop {
        // The system's clock of files may stand still for some milliseconds.
        let open = std::fs::File::options().write(true).open(&file).unwrap();
        std::io::Write::write_all(&mut &open, &bytes).unwrap();
        open.set_modified(was.modified().unwrap()).unwrap();
        let now = file.metadata().unwrap();
        if (now.ctime(), now.ctime_nsec()) != (was.ctime(), was.ctime_nsec()) {
            break now;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    let known = |of: &std::fs::Metadata| (of.dev(), of.ino(), of.len(), of.mtime(), of.mtime_nsec());
    assert_eq!(known(&now), known(&was));
    let served = Served::start(old.dir.path(), |_| {});
    let segment = [Segment::contiguous(0, 4000, 1000, 0, 0)];
    let (block, _) = host_block(1000);
    let error = served.remote().fill(&old.checkpoint, &segment, &[block], &Control::new()).unwrap_err();
    assert!(matches!(error, Error::Refused { refusal: Refusal::OtherFiles, .. }), "{error}");
    assert!(error.to_string().contains("not as the client opened it"), "{error}");
    let (block, to) = host_block(1000);
    served.remote().fill(&Checkpoint::open(&old.path).unwrap(), &segment, &[block], &Control::new()).unwrap();
    assert!(bytes_of(&to) == bytes[4000..5000]);
}

#[test]
fn a_cancelled_load_has_ended_at_the_server_when_it_returns() {
    let model = model(60_000_000);
    let served = Served::start(model.dir.path(), |config| (config.pool_len, config.chunk_len) = (16 << 20, 4 << 20));
    let (block, _) = host_block(60_000_000);
    let segment = Segment::contiguous(0, 0, 60_000_000, 0, 0);
    let cancel = Cancel::new();
    let stop = cancel.clone();
    let control = Control::new().cancelled_by(cancel).on_progress(move |_| stop.cancel());
    let remote = served.remote();
    let result = remote.fill(&model.checkpoint, &[segment], &[block], &control);
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    assert_eq!(remote.client().unwrap().status().unwrap().jobs, []);
}

#[test]
fn over_tcp_a_token_is_needed_and_host_memory_does_not_go() {
    let model = model(1000);
    let served = Served::start(model.dir.path(), |_| {});
    let at = |token: &str| StoreClient::connect(&served.options(1).token(token.to_owned())).unwrap();
    for wrong in ["", "0123456789abcdeF"] {
        let error = at(wrong).list().unwrap_err();
        assert!(matches!(error, Error::Refused { refusal: Refusal::Denied, .. }), "{error}");
    }
    let client = at(TOKEN);
    client.list().unwrap();
    let (block, _) = host_block(100);
    let segment = Segment::contiguous(0, 0, 100, 0, 0);
    let result =
        StoreRemote::new(client, RemoteOptions::new()).fill(&model.checkpoint, &[segment], &[block], &Control::new());
    assert!(matches!(result, Err(Error::MemoryOverTcp { .. })), "{result:?}");
}

#[test]
fn a_server_that_stops_is_missed_by_nobody() {
    let model = model(1_000_000);
    let mut served = Served::start(model.dir.path(), |_| {});
    let loader = Loader::builder().remote(Box::new(served.remote())).build().unwrap();
    assert_eq!(loader.load(&model.checkpoint).unwrap().report().engines[0].engine, "server");
    served.stop();
    for notes in [1, 0] {
        let loaded = loader.load(&model.checkpoint).unwrap();
        assert!(model.bytes.ends_with(&loaded.tensor("w").unwrap().to_vec().unwrap()));
        assert_eq!(loaded.report().notes.len(), notes, "{:?}", loaded.report().notes);
    }
}

#[test]
fn many_clients_load_at_once() {
    let model = model(3_000_000);
    let served = Served::start(model.dir.path(), |_| {});
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                let loader = Loader::builder().remote(Box::new(served.remote())).build().unwrap();
                let loaded = loader.load(&model.checkpoint).unwrap();
                assert!(model.bytes.ends_with(&loaded.tensor("w").unwrap().to_vec().unwrap()));
                assert_eq!(loaded.report().notes, [] as [&str; 0]);
            });
        }
    });
}
