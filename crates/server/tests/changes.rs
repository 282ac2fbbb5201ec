//! Models whose files change while the server knows them.

mod common;

use std::fs;

use common::session::{Loading, load, open_message};
use common::{Served, models};
use sllm_proto::storage::RegisterModelRequest;
use sllm_proto::store::{ListRequest, Model, Open, PinRequest};
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
    let fill = |models: &std::path::Path| models::safetensors(models, "a", 1, LEN);
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
