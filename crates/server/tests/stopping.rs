//! A server that is told to stop: what it waits for, and what not.

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::session::load;
use common::{Served, models};
use cuda::Driver;
use gpu::Owner;
use sllm_proto::storage::{
    ConfirmModelRequest, DeviceType, LoadModelRequest, MemCopyChunk, MemCopyChunkList, MemCopyHandle, MemCopyHandleList,
};
use sllm_proto::store::StatusRequest;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const PAUSE: Duration = Duration::from_millis(5);
const HOUR: Duration = Duration::from_secs(3600);
/// Far more than anything takes here that does not wait for ever.
const LIMIT: Duration = Duration::from_secs(120);

/// Not a test of its own: the other process.
#[test]
fn owner() {
    gpu::own();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_loads_ends_at_once_whoever_is_connected() {
    let mut served = Served::start(|_| (), |config| config.drain = HOUR);
    let watch = HealthCheckRequest { service: String::new() };
    let mut health = HealthClient::new(served.channel().await).watch(watch).await.unwrap().into_inner();
    let mut told = async || health.message().await.unwrap().map(|told| told.status);
    assert_eq!(told().await, Some(ServingStatus::Serving.into()));
    let mut says_little = UnixStream::connect(served.socket()).unwrap();
    says_little.write_all(b"P").unwrap();
    served.signal();
    tokio::time::timeout(LIMIT, served.ended()).await.expect("it waits for connections");
    assert_eq!((told().await, told().await), (Some(ServingStatus::NotServing.into()), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_ends_that_nobody_waits_for_and_who_asks_is_told_its_end() {
    let driver = Driver::load();
    for asks in [false, true] {
        driver.set_bandwidth(0);
        let fill = |models: &std::path::Path| models::safetensors(models, "plain", 1, 9_000_123);
        let mut served = Served::start(fill, |config| config.drain = HOUR);
        let source = models::bytes(&served.models().join("plain"));
        let len = source.len() as u64;
        let mut owner = Owner::start(0, len);
        load(&served, "plain").await.unwrap();
        // Some seconds for the whole.
        driver.set_bandwidth(3_000_000);
        let chunks = vec![MemCopyChunk { size: len, ..Default::default() }];
        let handles = vec![MemCopyHandle { cuda_ipc_handle: owner.handle.clone() }];
        let asked = LoadModelRequest {
            model_path: "plain".into(),
            replica_uuid: "r".into(),
            chunks: HashMap::from([(owner.uuid.clone(), MemCopyChunkList { chunks })]),
            handles: HashMap::from([(owner.uuid.clone(), MemCopyHandleList { handles })]),
            target_device_type: DeviceType::Gpu.into(),
        };
        let (mut client, mut store) = (served.storage().await, served.store().await);
        client.load_model_async(asked.clone()).await.unwrap();
        while store.status(StatusRequest {}).await.unwrap().into_inner().jobs.is_empty() {
            tokio::time::sleep(PAUSE).await;
        }
        let socket = served.socket();
        served.signal();
        if asks {
            while socket.exists() {
                tokio::time::sleep(PAUSE).await;
            }
            let error = client.load_model_async(asked).await.unwrap_err();
            assert_eq!(error.code(), Code::Unavailable, "{error}");
            let (model_path, replica_uuid) = ("plain".into(), "r".into());
            let target_device_type = DeviceType::Gpu.into();
            client.confirm_model(ConfirmModelRequest { model_path, replica_uuid, target_device_type }).await.unwrap();
        }
        drop((client, store));
        let dir = tokio::time::timeout(LIMIT, served.ended()).await.unwrap();
        assert_eq!(driver.get("imports"), 0, "it ended while it copied");
        assert!(owner.bytes(dir.path()) == source);
    }
}
