//! Calls, deadlines and threads of a client.

mod common;

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{TestServer, host_block, model};
use sllm_client::{ClientOptions, Error, Refusal, RemoteOptions, StoreClient, StoreRemote};
use sllm_core::{Cancel, Control, Progress, Segment};

fn at(address: &str) -> ClientOptions {
    ClientOptions::new().address(address.to_owned())
}

#[test]
fn calls_are_answered() {
    let server = TestServer::start();
    let client = server.client();
    let models = client.list().unwrap();
    assert_eq!((models.len(), models[1].pinned, models[2].len), (60_000, true, 2));
    assert!(client.pin("m").unwrap().pinned);
    assert_eq!((client.evict("m").unwrap(), client.evict_all().unwrap()), (10, 1000));
    // Never by an empty name.
    assert!(matches!(client.evict(""), Err(Error::Refused { refusal: Refusal::Invalid, .. })));
    let error = client.unpin("m").unwrap_err();
    assert!(matches!(error, Error::Refused { refusal: Refusal::NotFound, .. }));
    assert_eq!(error.to_string(), "the store server refused to unpin the model: there is no such model");
}

#[test]
fn preloads_tell_progress_and_their_end() {
    let server = TestServer::start();
    let client = server.client();
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    let control = Control::new().on_progress(move |progress: Progress| telling.lock().unwrap().push(progress.done));
    assert_eq!(client.preload("m", false, &control).unwrap(), Progress { done: 10, total: 10 });
    assert_eq!(*told.lock().unwrap(), (0..=10).collect::<Vec<_>>());
    let error = client.preload("broken", false, &Control::new()).unwrap_err();
    assert!(matches!(error, Error::Refused { refusal: Refusal::Corrupt, .. }), "{error}");
    assert!(matches!(client.preload("short", false, &Control::new()), Err(Error::Protocol(_))));
}

#[test]
fn preloads_are_cancelled_and_timed() {
    let server = TestServer::start();
    let cancel = Cancel::new();
    let stop = cancel.clone();
    let control = Control::new().cancelled_by(cancel).on_progress(move |_| stop.cancel());
    assert!(matches!(server.client().preload("slow", false, &control), Err(Error::Cancelled)));
    let client = StoreClient::connect(&at(&server.address).silence_limit(Duration::from_millis(200))).unwrap();
    assert!(matches!(client.preload("slow", false, &Control::new()), Err(Error::TimedOut { .. })));
}

#[test]
fn a_call_that_is_not_answered_ends_at_its_deadline() {
    let server = TestServer::start();
    let client = StoreClient::connect(&at(&server.address).call_limit(Duration::from_millis(200))).unwrap();
    assert!(matches!(client.status(), Err(Error::TimedOut { .. })));
    // And others go on.
    assert!(client.pin("m").unwrap().pinned);
}

#[test]
fn where_no_server_is_the_error_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none");
    let error = StoreClient::connect(&at(path.to_str().unwrap())).unwrap_err();
    assert!(matches!(error, Error::NotThere { .. }));
    let message = error.to_string();
    assert!(message.contains(path.to_str().unwrap()) && message.contains("sllm-store start"), "{message}");
    assert!(message.contains("No such file"), "{message}");
    // A socket that a killed server left.
    drop(UnixListener::bind(&path).unwrap());
    let message = StoreClient::connect(&at(path.to_str().unwrap())).unwrap_err().to_string();
    assert!(message.contains("refused"), "{message}");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(matches!(StoreClient::connect(&at(&port.to_string())), Err(Error::NotThere { .. })));
}

#[test]
fn what_listens_and_is_no_server_is_found_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    // Nobody accepts: the connection stands, and no call is answered.
    let client = StoreClient::connect(&at(path.to_str().unwrap()).call_limit(Duration::from_millis(300))).unwrap();
    assert!(matches!(client.list(), Err(Error::TimedOut { .. })));
    let talk = std::thread::spawn(move || {
        for stream in listener.incoming().take(2) {
            let _ = stream.unwrap().write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let client = StoreClient::connect(&at(path.to_str().unwrap()).call_limit(Duration::from_secs(5)));
    let error = client.and_then(|client| client.list()).unwrap_err();
    assert!(matches!(error, Error::Lost { .. } | Error::NotThere { .. }), "{error:?}");
    talk.join().unwrap();
}

#[test]
fn host_memory_does_not_go_over_tcp_and_the_error_says_so() {
    // A listener is enough: nothing is asked before the memory is passed.
    let server = TestServer::start();
    let model = model(1000);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let socket = server.address.strip_prefix("unix:").unwrap().to_owned();
    // A TCP port that leads to the server.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut client, mut server) = (stream.unwrap(), std::os::unix::net::UnixStream::connect(&socket).unwrap());
            let (mut back, mut forth) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut client, &mut forth));
            std::thread::spawn(move || std::io::copy(&mut server, &mut back));
        }
    });
    let options = at(&address.to_string()).token("0123456789abcdef\n".to_owned());
    let remote = StoreRemote::new(StoreClient::connect(&options).unwrap(), RemoteOptions::new());
    let (block, _) = host_block(1000);
    let segment = Segment::contiguous(0, 0, 1000, 0, 0);
    let error = remote.fill(&model.checkpoint, &[segment], &[block], &Control::new()).unwrap_err();
    assert!(matches!(error, Error::MemoryOverTcp { .. }), "{error}");
    remote.client().unwrap().list().unwrap();
    assert_eq!(server.log().tokens, ["Bearer 0123456789abcdef"]);
}

#[test]
fn a_token_is_no_part_of_what_is_printed() {
    let options = ClientOptions::new().token("0123456789abcdef".to_owned());
    assert!(!format!("{options:?}").contains("0123"));
    let wrong = at("/nowhere").token("line\nline".to_owned());
    assert!(matches!(StoreClient::connect(&wrong), Err(Error::Token)));
}

#[test]
fn a_client_works_within_anybodys_runtime() {
    let server = TestServer::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = server.client();
        assert!(client.pin("m").unwrap().pinned);
        drop(client);
    });
}

#[test]
fn a_lost_connection_is_made_anew() {
    let server = TestServer::start();
    let client = server.client();
    assert!(client.pin("m").is_ok());
    // The same address, another server.
    let path = server.address.strip_prefix("unix:").unwrap().to_owned();
    let next = TestServer::start();
    let other = next.address.strip_prefix("unix:").unwrap();
    let aside = format!("{path}.old");
    std::fs::rename(&path, &aside).unwrap();
    std::os::unix::fs::symlink(other, &path).unwrap();
    server.die();
    // The first call may find out that the connection is gone.
    let again = (0..20).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        client.pin("m").is_ok()
    });
    assert!(again);
}
