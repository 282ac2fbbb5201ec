//! A server from its first socket to its last load.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sllm_core::{Error, Result};
use sllm_proto::storage::storage_server::StorageServer;
use sllm_proto::store::store_server::StoreServer;
use sllm_proto::{Address, MAX_MESSAGE_LEN, MAX_ORIGINAL_LEN, storage, store as store_proto};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};
use tonic_health::ServingStatus;

use crate::config::Config;
use crate::connection::{FIRST_WORD, Peer, Reception};
use crate::listen::{Listener, bind_metrics, bind_unix};
use crate::rpc::{StorageRpc, StoreRpc};
use crate::scrape;
use crate::store::Store;
use crate::token::Token;

/// Connections that were taken and not yet served.
const TAKEN: usize = 64;
/// How often the peer is asked whether it is still there, and how long it may take to say so.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Requests of a connection that are answered at once; later ones wait. Each may have memory of the server.
const STREAMS: u32 = 128;
/// How long what is left may take after the drain: loads to stop, and clients to hear how theirs ended.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often what is no longer wanted is let go.
const SWEEP: Duration = Duration::from_secs(5);

/// A store server that listens.
#[derive(Debug)]
pub struct Server {
    store: Arc<Store>,
    listeners: Vec<Listener>,
    metrics: Vec<std::net::TcpListener>,
}

impl Server {
    /// Checks the configuration and listens. Clients can connect from now on; [`Server::run`] answers them.
    pub fn bind(config: Config) -> Result<Server> {
        config.check()?;
        let store = Store::new(config)?;
        let mut listeners = Vec::new();
        for address in &store.config.listen {
            listeners.extend(Listener::bind(address, store.config.token.is_some())?);
        }
        if let Some(path) = &store.config.listen_if_free {
            let socket = path.display();
            match bind_unix(path) {
                Ok(Some(listener)) => listeners.push(listener),
                Ok(None) => tracing::warn!(
                    %socket,
                    "another server listens at the default socket: clients find that one unless they are given an address"
                ),
                Err(error) => tracing::warn!(
                    %socket, error = error.chain(),
                    "the default socket cannot be had: clients find this server only by its address"
                ),
            }
        }
        let metrics = match &store.config.metrics_listen {
            Some(address) => bind_metrics(address)?,
            None => Vec::new(),
        };
        Ok(Server { store: Arc::new(store), listeners, metrics })
    }

    /// Where it listens, with the ports that it got.
    pub fn addresses(&self) -> Vec<Address> {
        self.listeners.iter().map(Listener::address).collect()
    }

    /// Where its metrics are.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.first()?.local_addr().ok()
    }

    /// Answers until `shutdown` is ready. Then no load begins any more, running ones may end within
    /// [`Config::drain`], whoever waits for them, and the rest is stopped.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let Server { store, listeners, metrics } = self;
        let (grpc, incoming) = mpsc::channel(TAKEN);
        let mut tasks = JoinSet::new();
        for listener in listeners {
            let (clients, tickets) = (Arc::clone(&store.clients), Arc::clone(&store.tickets));
            let (grpc, first_word) = (grpc.clone(), FIRST_WORD);
            let (reception, address) = (Reception { grpc, tickets, clients, first_word }, listener.address());
            tasks.spawn(async move {
                if let Err(error) = reception.accept(listener).await {
                    tracing::error!(%address, %error, "cannot listen any more");
                }
            });
        }
        for listener in metrics {
            let broken = |source| Error::Io { what: "listen for", path: "metrics".into(), source };
            let listener = tokio::net::TcpListener::from_std(listener).map_err(broken)?;
            tasks.spawn(scrape::serve(listener, Arc::clone(&store)));
        }
        tasks.spawn(sweep(Arc::clone(&store)));
        tasks.spawn(Arc::clone(&store).preload());

        let (mut health, health_service) = tonic_health::server::health_reporter();
        // The empty name stands for all.
        let names = ["", storage::storage_server::SERVICE_NAME, store_proto::store_server::SERVICE_NAME];
        for name in names {
            health.set_service_status(name, ServingStatus::Serving).await;
        }
        let check = Check(store.config.token.clone());
        let storage = StorageServer::new(StorageRpc(Arc::clone(&store)));
        let storage = storage.max_decoding_message_size(MAX_ORIGINAL_LEN);
        let ours = StoreServer::new(StoreRpc(Arc::clone(&store)));
        let ours = ours.max_decoding_message_size(MAX_MESSAGE_LEN).max_encoding_message_size(MAX_MESSAGE_LEN);
        let router = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .max_concurrent_streams(Some(STREAMS))
            // Who asks for health shows no token: probes cannot, and learn nothing.
            .add_service(health_service)
            .add_service(InterceptedService::new(storage, check.clone()))
            .add_service(InterceptedService::new(ours, check));
        let (stop, stopped) = watch::channel(false);
        let serving = router.serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
            let mut stopped = stopped;
            let _ = stopped.wait_for(|stopped| *stopped).await;
        });
        tokio::pin!(serving);
        let broken = |e| Error::Invalid(format!("the server ended: {e}"));
        tokio::select! {
            ended = &mut serving => return ended.map_err(broken),
            () = shutdown => {}
        }

        tracing::info!(loads = store.jobs.running().len(), "shutting down");
        store.jobs.close();
        for name in names {
            health.set_service_status(name, ServingStatus::NotServing).await;
        }
        // Listeners go, and with them their sockets.
        tasks.shutdown().await;
        // Who is connected is answered until the last load has ended: he may ask what became of it.
        let drained = tokio::select! {
            ended = &mut serving => return ended.map_err(broken),
            drained = tokio::time::timeout(store.config.drain, store.jobs.idle()) => drained.is_ok(),
        };
        let until = tokio::time::Instant::now() + LAST_WORDS;
        if !drained {
            tracing::warn!(loads = store.jobs.running().len(), "stopping the loads that are left");
            store.jobs.stop_all();
            let _ = tokio::time::timeout_at(until, store.jobs.idle()).await;
        }
        // Who watches the health would do so for ever.
        for name in names {
            health.clear_service_status(name).await;
        }
        let _ = stop.send(true);
        let _ = tokio::time::timeout_at(until, &mut serving).await;
        drop(grpc);
        tracing::info!("shut down");
        Ok(())
    }
}

/// Lets go of what waited or lay idle too long, as long as it is polled.
async fn sweep(store: Arc<Store>) {
    let mut clock = tokio::time::interval(SWEEP);
    loop {
        clock.tick().await;
        let store = Arc::clone(&store);
        let _ = tokio::task::spawn_blocking(move || store.sweep()).await;
    }
}

/// Lets in who comes by a Unix socket, whose mode says who may, and who shows the token, where there is one.
#[derive(Clone)]
struct Check(Option<Token>);

impl tonic::service::Interceptor for Check {
    fn call(&mut self, request: Request<()>) -> std::result::Result<Request<()>, Status> {
        let by_socket = request.extensions().get::<Peer>() == Some(&Peer::Unix);
        match &self.0 {
            Some(token) if !by_socket && !token.is_shown(request.metadata()) => Err(Status::unauthenticated(
                "the token is missing or wrong: send `authorization: Bearer TOKEN` (sllm-store sends that of --token-file or \
                 SLLM_STORE_TOKEN)",
            )),
            _ => Ok(request),
        }
    }
}
