//! Metrics over HTTP.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::store::Store;

/// Connections at once.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to ask.
const ASKING: Duration = Duration::from_secs(10);
const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers `GET /metrics` as long as it is polled.
pub(crate) async fn serve(listener: TcpListener, store: Arc<Store>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            answer(stream, &store).await;
            drop(place);
        });
    }
}

async fn answer(stream: TcpStream, store: &Store) {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let response = match (request.method(), request.uri().path()) {
            (&Method::GET, "/metrics") => text(StatusCode::OK, TYPE, store.metrics_text()),
            _ => text(StatusCode::NOT_FOUND, "text/plain", "metrics are at /metrics\n".into()),
        };
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(ASKING).keep_alive(false);
    // Who hangs up is of no interest.
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
