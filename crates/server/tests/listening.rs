//! Who can connect to a server, what it says of itself, and how memory is passed to it.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use common::{SEALED, Served, memory, pass, send};
use rustix::fs::SealFlags;
use sllm_proto::PASS_MEMORY;
use sllm_proto::storage::GetServerConfigRequest;
use sllm_proto::storage::storage_client::StorageClient;
use sllm_proto::store::StatusRequest;
use sllm_server::{Address, Server, Token};
use tonic::transport::Endpoint;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

async fn health(served: &Served, service: &str) -> Result<i32, Code> {
    let mut client = HealthClient::new(served.channel().await);
    let answer = client.check(HealthCheckRequest { service: service.into() }).await;
    answer.map(|answer| answer.into_inner().status).map_err(|e| e.code())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_says_that_it_serves_and_how_large_its_pool_is() {
    let served = Served::start(|_| (), |config| config.chunk_len = 8 << 20);
    for service in ["", "storage.Storage", "sllm.v1.Store"] {
        assert_eq!(health(&served, service).await, Ok(ServingStatus::Serving.into()), "{service}");
    }
    assert_eq!(health(&served, "other").await, Err(Code::NotFound));
    let config = served.storage().await.get_server_config(GetServerConfigRequest {}).await.unwrap().into_inner();
    assert_eq!((config.mem_pool_size, config.chunk_size), (64 << 20, 8 << 20));
    let status = served.store().await.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.storage_path, served.models().canonicalize().unwrap().display().to_string());
    assert!(status.clients >= 1);
    let (socket, dir) = (served.socket(), served.stop().await);
    assert!(!socket.exists(), "the socket is left");
    drop(dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_wants_the_token_for_every_request_and_a_socket_does_not() {
    let token = "0123456789abcdef0123";
    let change = |config: &mut sllm_server::Config| {
        config.listen.push(Address::tcp("127.0.0.1", 0).unwrap());
        config.token = Some(Token::new(token).unwrap());
    };
    let served = Served::start(|_| (), change);
    let [_, port @ Address::Tcp { .. }] = served.addresses.as_slice() else { panic!("{:?}", served.addresses) };
    let channel = Endpoint::from_shared(format!("http://{port}")).unwrap().connect().await.unwrap();
    let mut client = StorageClient::new(channel.clone());
    let with = |shown: Option<&str>| {
        let mut request = Request::new(GetServerConfigRequest {});
        if let Some(shown) = shown {
            request.metadata_mut().insert("authorization", shown.parse().unwrap());
        }
        request
    };
    for wrong in [None, Some("Bearer 0123456789abcdef0124"), Some(token), Some("Bearer "), Some("Basic x")] {
        assert_eq!(client.get_server_config(with(wrong)).await.unwrap_err().code(), Code::Unauthenticated, "{wrong:?}");
    }
    client.get_server_config(with(Some(&format!("Bearer {token}")))).await.unwrap();
    // A probe has no token.
    HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await.unwrap();
    served.storage().await.get_server_config(with(None)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_memory_is_taken_and_anything_else_is_refused_with_a_reason() {
    let served = Served::start(|_| (), |_| ());
    let socket = served.socket();
    let told = tokio::task::spawn_blocking(move || {
        let sealed = memory(4096, SEALED);
        pass(&socket, [1; 16], &sealed).unwrap();
        assert!(pass(&socket, [1; 16], &memory(4096, SEALED)).unwrap_err().contains("ticket is taken"));
        assert!(pass(&socket, [2; 16], &memory(4096, SealFlags::empty())).unwrap_err().contains("F_SEAL_SHRINK"));
        assert!(pass(&socket, [3; 16], &memory(0, SEALED)).unwrap_err().contains("empty"));
        let unwritable = SEALED | SealFlags::WRITE;
        assert!(pass(&socket, [4; 16], &memory(4096, unwritable)).unwrap_err().contains("mapped for writing"));
        assert!(pass(&socket, [5; 16], &tempfile::tempfile().unwrap()).unwrap_err().contains("memory file"));
        let pipe = File::from(rustix::pipe::pipe().unwrap().0);
        assert!(pass(&socket, [6; 16], &pipe).unwrap_err().contains("memory file"));

        let text = |bytes: &[u8], files: &[&OwnedFd]| String::from_utf8(send(&socket, bytes, files)).unwrap();
        let fd = OwnedFd::from(sealed);
        let whole = [&PASS_MEMORY[..], &[7; 16]].concat();
        assert!(text(&whole, &[]).contains("no descriptor"));
        assert!(text(&whole, &[&fd, &fd, &fd]).contains("one descriptor"));
        assert!(text(&whole[..20], &[&fd]).contains("within the ticket"));
    });
    told.await.unwrap();
    assert_eq!(health(&served, "").await, Ok(ServingStatus::Serving.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_say_nothing_or_go_at_once_hinder_nobody() {
    let served = Served::start(|_| (), |_| ());
    let socket = served.socket();
    let connect = || std::os::unix::net::UnixStream::connect(&socket).unwrap();
    let silent: Vec<_> = (0..100).map(|_| connect()).collect();
    (0..100).for_each(|_| drop(connect()));
    let _ = connect().write_all(b"PRI");
    assert_eq!(health(&served, "").await, Ok(ServingStatus::Serving.into()));
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_at_the_same_socket_is_refused_and_the_first_goes_on() {
    let served = Served::start(|_| (), |_| ());
    let error = Server::bind(common::config(served.dir.path())).unwrap_err().to_string();
    assert!(error.contains("already"), "{error}");
    assert_eq!(health(&served, "").await, Ok(ServingStatus::Serving.into()));
    // After it is gone, its place is free.
    let dir = served.stop().await;
    let config = common::config(dir.path());
    Served::of(dir, config).stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_path_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = common::config(dir.path());
    config.storage_path = dir.path().join("missing");
    assert!(Server::bind(config.clone()).unwrap_err().to_string().contains("missing"));
    config.storage_path = dir.path().join("file");
    File::create(&config.storage_path).unwrap();
    assert!(Server::bind(config).unwrap_err().to_string().contains("directory"));
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_text_over_http() {
    let served = Served::start(|_| (), |config| config.metrics_listen = Some("localhost:0".parse().unwrap()));
    let address = served.metrics.unwrap();
    let get = move |path: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let (metrics, other) = tokio::task::spawn_blocking(move || (get("/metrics"), get("/"))).await.unwrap();
    assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("\nsllm_clients 0\n"), "{metrics}");
    assert!(other.starts_with("HTTP/1.1 404"), "{other}");
}
