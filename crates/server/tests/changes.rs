//! Models whose files change while the server knows them.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;

use common::session::{Loading, all_of, load, open_message, ticket};
use common::{SEALED, Served, memory, models};
use serde_json::json;
use sllm_proto::storage::{ConfirmModelRequest, DeviceType, LoadModelRequest, RegisterModelRequest};
use sllm_proto::store::{ListRequest, Model, Open, PinRequest};
use sllm_server::Config;
use tonic::{Code, Status};

const LEN: usize = 1_000_123;

async fn listed(served: &Served, name: &str) -> Model {
    let list = served.store().await.list(ListRequest {}).await.unwrap().into_inner();
    list.models.into_iter().find(|model| model.name == name).unwrap()
}

async fn open(served: &Served, open: Open) -> Result<(), Status> {
    Loading::open(&mut served.store().await, open).await.map(drop)
}

async fn load_and_compare(served: &Served, name: &str) {
    assert!(load(served, name).await.unwrap().0 == models::bytes(&served.models().join(name)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_and_a_registration_outlive_files_that_cannot_be_opened() {
    let fill = |models: &Path| models::safetensors(models, "a", 1, LEN);
    let served = Served::start(fill, |config| config.registration_required = true);
    let register = RegisterModelRequest { model_path: "a".into() };
    served.storage().await.register_model(register).await.unwrap();
    served.store().await.pin(PinRequest { model: "a".into() }).await.unwrap();
    load_and_compare(&served, "a").await;
    let before = open_message("a", &served.models().join("a"));

    let file = served.models().join("a/model.safetensors");
    fs::write(&file, b"half").unwrap();
    for _ in 0..2 {
        assert_eq!(open(&served, before.clone()).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let now = listed(&served, "a").await;
    assert_eq!((now.pinned, now.resident), (true, 0), "what was read of the old file is of no use");
    fs::remove_file(&file).unwrap();
    assert_eq!(open(&served, before.clone()).await.unwrap_err().code(), Code::NotFound);
    // A link out of the storage path, as somebody may make by mistake.
    let outside = served.dir.path().join("outside");
    models::safetensors(&outside, "m", 2, LEN);
    std::os::unix::fs::symlink(outside.join("m/model.safetensors"), &file).unwrap();
    assert_eq!(open(&served, before).await.unwrap_err().code(), Code::InvalidArgument);
    fs::remove_file(&file).unwrap();

    models::safetensors(&served.models(), "a", 3, LEN + 5);
    load_and_compare(&served, "a").await;
    let now = listed(&served, "a").await;
    assert_eq!((now.pinned, now.resident), (true, now.len));
}

/// A safetensors file of one tensor of its own.
fn shard(model: &Path, name: &str, tensor: &str, seed: u64) {
    let header = json!({ tensor: {"dtype": "U8", "shape": [LEN], "data_offsets": [0, LEN]} });
    fs::create_dir_all(model).unwrap();
    fs::write(model.join(name), test_support::safetensors(header.to_string(), &models::noise(seed, LEN))).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_gains_and_loses_files_is_opened_anew_and_what_stayed_is_not_read_again() {
    let fill = |models: &Path| shard(&models.join("m"), "model-1.safetensors", "one", 1);
    let served = Served::start(fill, |_| ());
    let dir = served.models().join("m");
    // Half of a download, which somebody asks for.
    load_and_compare(&served, "m").await;
    served.store().await.pin(PinRequest { model: "m".into() }).await.unwrap();
    let half = listed(&served, "m").await.len;

    shard(&dir, "model-2.safetensors", "two", 2);
    let whole = models::bytes(&dir);
    let (bytes, done) = load(&served, "m").await.unwrap();
    assert!(bytes == whole);
    assert_eq!((done.from_pool, done.from_files), (half, half), "one of two files of one length was there");
    let now = listed(&served, "m").await;
    assert_eq!((now.pinned, now.resident, now.len), (true, 2 * half, 2 * half));

    // What changes no data file drops nothing.
    fs::write(dir.join("README.md"), "words").unwrap();
    let map = json!({ "one": "model-1.safetensors", "two": "model-2.safetensors" });
    fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    let (bytes, done) = load(&served, "m").await.unwrap();
    assert!(bytes == whole);
    assert_eq!(done.from_files, 0);

    for name in ["model.safetensors.index.json", "model-1.safetensors"] {
        fs::remove_file(dir.join(name)).unwrap();
    }
    let (bytes, done) = load(&served, "m").await.unwrap();
    assert!(bytes == models::bytes(&dir));
    assert_eq!(done.from_files, 0);
    let now = listed(&served, "m").await;
    assert_eq!((now.pinned, now.resident, now.len), (true, half, half));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preload_is_confirmed_though_the_directory_changed_and_not_after_its_files_did() {
    let fill = |models: &Path| shard(&models.join("m"), "model-1.safetensors", "one", 1);
    let served = Served::start(fill, |_| ());
    let dir = served.models().join("m");
    let (model_path, target_device_type) = ("m".to_owned(), DeviceType::Cpu.into());
    let (chunks, handles, replica_uuid) = Default::default();
    let request = LoadModelRequest { model_path, replica_uuid, chunks, handles, target_device_type };
    served.storage().await.load_model_async(request).await.unwrap();
    let confirm = async || {
        let (model_path, replica_uuid) = ("m".into(), String::new());
        let request = ConfirmModelRequest { model_path, replica_uuid, target_device_type };
        served.storage().await.confirm_model(request).await
    };
    let map = json!({ "one": "model-1.safetensors" });
    fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    open(&served, open_message("m", &dir)).await.unwrap();
    confirm().await.unwrap();
    // Another file, whatever the clock says: the server has the first one open.
    fs::remove_file(dir.join("model-1.safetensors")).unwrap();
    shard(&dir, "model-1.safetensors", "one", 2);
    open(&served, open_message("m", &dir)).await.unwrap();
    assert_eq!(confirm().await.unwrap_err().code(), Code::NotFound);
}

/// What a server tells those who watch it.
fn scrape(served: &Served) -> String {
    let mut stream = std::net::TcpStream::connect(served.metrics.unwrap()).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_or_is_cut_under_a_load_is_counted_as_changed() {
    let metrics = |config: &mut Config| config.metrics_listen = Some("localhost:0".parse().unwrap());
    let fill = |models: &Path| ["grows", "is-cut"].map(|name| models::safetensors(models, name, 1, LEN));
    let served = Served::start(|models| _ = fill(models), metrics);
    for (name, len, words) in [("grows", 2 * LEN, "was changed while it was read"), ("is-cut", LEN / 2, "truncated")] {
        let path = served.models().join(name);
        let open = open_message(name, &path);
        let segments = all_of(&open);
        let (mut loading, opened) = Loading::open(&mut served.store().await, open).await.unwrap();
        loading.attach_host(&served.socket(), ticket(), &memory(opened.total, SEALED)).await;
        let file = fs::File::options().write(true).open(path.join("model.safetensors")).unwrap();
        file.set_len(len as u64).unwrap();
        loading.batch(segments).await;
        let error = loading.error().await;
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        assert!(error.message().contains(words), "{error}");
    }
    let text = tokio::task::block_in_place(|| scrape(&served));
    assert!(text.contains("\nsllm_loads_total{kind=\"host\",outcome=\"changed\"} 2\n"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_moves_nothing_is_no_load_that_runs() {
    let served = Served::start(|models| models::safetensors(models, "a", 1, LEN), |_| ());
    let open = open_message("a", &served.models().join("a"));
    let (loading, _) = Loading::open(&mut served.store().await, open).await.unwrap();
    assert_eq!(listed(&served, "a").await.loads, 0);
    drop(loading);
}
