//! The client: one connection, and the calls that are answered at once.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sllm_core::{Control, Progress};
use sllm_proto::store as pb;
use sllm_proto::store::store_client::StoreClient as Rpc;
use sllm_proto::{Address, MAX_MESSAGE_LEN, TOKEN_VARIABLE};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::address::find_address;
use crate::error::{Error, Result, innermost};
use crate::events::Events;
use crate::runtime::Runtime;
use crate::types::{Model, Status};

/// How long the server may take to be there, unless asked otherwise.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long a short call may take, unless asked otherwise.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// How long a stream may say nothing, unless asked otherwise. A load may wait for others to end.
const SILENCE_LIMIT: Duration = Duration::from_secs(600);
/// Over TCP a server's machine may go without a word: it is asked so often whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// What is longer is taken for this, ten years: every clock can count so far.
pub(crate) const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How to reach a server.
#[derive(Clone)]
pub struct ClientOptions {
    address: Option<String>,
    token: Option<String>,
    connect_limit: Duration,
    call_limit: Duration,
    silence_limit: Duration,
}

impl ClientOptions {
    /// The server of `SLLM_STORE_ADDRESS` or at a default socket, with the token of `SLLM_STORE_TOKEN`, if any.
    pub fn new() -> ClientOptions {
        let (connect_limit, call_limit, silence_limit) = (CONNECT_LIMIT, CALL_LIMIT, SILENCE_LIMIT);
        ClientOptions { address: None, token: None, connect_limit, call_limit, silence_limit }
    }

    /// Its address; `None`: see [`ClientOptions::new`].
    pub fn address(mut self, address: impl Into<Option<String>>) -> ClientOptions {
        self.address = address.into();
        self
    }

    /// The token that the server wants of TCP clients; `None`: that of the environment.
    pub fn token(mut self, token: impl Into<Option<String>>) -> ClientOptions {
        self.token = token.into();
        self
    }

    /// How long connecting may take; 2 seconds unless given.
    pub fn connect_limit(mut self, limit: Duration) -> ClientOptions {
        self.connect_limit = limit.min(LONGEST);
        self
    }

    /// How long a call may take that moves no bytes; 10 seconds unless given.
    pub fn call_limit(mut self, limit: Duration) -> ClientOptions {
        self.call_limit = limit.min(LONGEST);
        self
    }

    /// How long a preload may tell of no progress, as while it waits for other loads; 10 minutes unless given.
    pub fn silence_limit(mut self, limit: Duration) -> ClientOptions {
        self.silence_limit = limit.min(LONGEST);
        self
    }
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions::new()
    }
}

impl std::fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is a secret.
        f.debug_struct("ClientOptions").field("address", &self.address).finish_non_exhaustive()
    }
}

/// A connection to a store server. Clones are the same one; any thread may use it. It is made anew where it was lost.
#[derive(Clone)]
pub struct StoreClient {
    shared: Arc<Shared>,
}

struct Shared {
    // Dropped first: what it sends goes by the runtime.
    channel: Channel,
    runtime: Runtime,
    address: Address,
    token: Option<MetadataValue<Ascii>>,
    options: ClientOptions,
}

impl std::fmt::Debug for StoreClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreClient").field("address", &self.shared.address).finish_non_exhaustive()
    }
}

impl StoreClient {
    /// Connects to a server.
    pub fn connect(options: &ClientOptions) -> Result<StoreClient> {
        let address = find_address(options.address.as_deref())?;
        let token = options.token.clone().or_else(|| std::env::var(TOKEN_VARIABLE).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let token = token.map(|token| format!("Bearer {token}").parse().map_err(|_| Error::Token)).transpose()?;
        let uri = match &address {
            Address::Unix(path) => {
                let reason = || "the path is not UTF-8".to_owned();
                let wrong = || Error::Address { address: path.display().to_string(), reason: reason() };
                format!("unix://{}", path.to_str().ok_or_else(wrong)?)
            }
            Address::Tcp { .. } => format!("http://{address}"),
        };
        let endpoint = Endpoint::from_shared(uri)
            .map_err(|e| Error::Address { address: address.to_string(), reason: innermost(&e) })?;
        let endpoint = endpoint.connect_timeout(options.connect_limit).tcp_nodelay(true);
        let endpoint = match address {
            Address::Unix(_) => endpoint,
            Address::Tcp { .. } => endpoint.http2_keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE),
        };
        let runtime = Runtime::start()?;
        let named = address.to_string();
        let not_there = |reason| Error::NotThere { address: named, reason };
        let connect = async move { endpoint.connect().await.map_err(|e| not_there(innermost(&e))) };
        let channel = runtime.run("connect", options.connect_limit, connect).map_err(|e| match e {
            Error::TimedOut { limit, .. } => {
                let reason = format!("no connection within {} s", limit.as_secs_f64());
                Error::NotThere { address: address.to_string(), reason }
            }
            e => e,
        })?;
        Ok(StoreClient { shared: Arc::new(Shared { channel, runtime, address, token, options: options.clone() }) })
    }

    /// The server's address.
    pub fn address(&self) -> &Address {
        &self.shared.address
    }

    /// Whether the server says that it serves.
    pub fn health(&self) -> Result<bool> {
        let request = self.request(HealthCheckRequest { service: String::new() });
        let mut rpc = HealthClient::new(self.shared.channel.clone());
        let answer = self.call("tell its health", async move { rpc.check(request).await })?;
        Ok(answer.status() == ServingStatus::Serving)
    }

    /// The models that the server knows of.
    pub fn list(&self) -> Result<Vec<Model>> {
        let (mut rpc, request) = (self.rpc(), self.request(pb::ListRequest {}));
        let answer = self.call("list its models", async move { rpc.list(request).await })?;
        Ok(answer.models.into_iter().map(Model::from).collect())
    }

    /// What the server does.
    pub fn status(&self) -> Result<Status> {
        let (mut rpc, request) = (self.rpc(), self.request(pb::StatusRequest {}));
        Ok(self.call("tell its status", async move { rpc.status(request).await })?.into())
    }

    /// Reads a model into the server's pool, and waits until it is there; the server stops when `control` is cancelled.
    pub fn preload(&self, model: &str, pin: bool, control: &Control) -> Result<Progress> {
        const WHAT: &str = "preload the model";
        let limit = self.shared.options.silence_limit;
        let mut request = Request::new(pb::PreloadRequest { model: model.to_owned(), pin });
        self.show_token(&mut request);
        let mut rpc = self.rpc();
        let started = async move {
            rpc.preload(request).await.map(Response::into_inner).map_err(|status| Error::of(WHAT, limit, &status))
        };
        let stream = self.shared.runtime.run(WHAT, self.shared.options.call_limit, started)?;
        let mut events = Events::read(&self.shared.runtime, stream, ())?;
        let mut last = None;
        let result = loop {
            match events.next(WHAT, (limit, Instant::now() + limit), control) {
                Ok(Some(pb::PreloadEvent { done, total })) => {
                    let progress = Progress { done, total };
                    control.tell(progress);
                    last = Some(progress);
                }
                Ok(None) => match last {
                    Some(progress) if progress.done == progress.total => break Ok(progress),
                    _ => break Err(Error::Protocol("a preload ended before its end".into())),
                },
                Err(e) => break Err(e),
            }
        };
        events.abort();
        result
    }

    /// Keeps a model in the server's pool: what is there of it, and what comes.
    pub fn pin(&self, model: &str) -> Result<Model> {
        let (mut rpc, request) = (self.rpc(), self.request(pb::PinRequest { model: model.to_owned() }));
        Ok(self.call("pin the model", async move { rpc.pin(request).await })?.into())
    }

    /// Lets a model go when its room is wanted.
    pub fn unpin(&self, model: &str) -> Result<Model> {
        let (mut rpc, request) = (self.rpc(), self.request(pb::UnpinRequest { model: model.to_owned() }));
        Ok(self.call("unpin the model", async move { rpc.unpin(request).await })?.into())
    }

    /// Drops a model from the server's pool; how many bytes that were.
    pub fn evict(&self, model: &str) -> Result<u64> {
        if model.is_empty() {
            let message = "no model is named".into();
            return Err(Error::Refused { what: "evict the model", refusal: crate::Refusal::Invalid, message });
        }
        self.evict_named(model)
    }

    /// Drops all models from the server's pool; how many bytes that were.
    pub fn evict_all(&self) -> Result<u64> {
        self.evict_named("")
    }

    fn evict_named(&self, model: &str) -> Result<u64> {
        let (mut rpc, request) = (self.rpc(), self.request(pb::EvictRequest { model: model.to_owned() }));
        Ok(self.call("evict the model", async move { rpc.evict(request).await })?.bytes)
    }

    pub(crate) fn rpc(&self) -> Rpc<Channel> {
        let rpc = Rpc::new(self.shared.channel.clone());
        rpc.max_encoding_message_size(MAX_MESSAGE_LEN).max_decoding_message_size(MAX_MESSAGE_LEN)
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.shared.runtime
    }

    pub(crate) fn call_limit(&self) -> Duration {
        self.shared.options.call_limit
    }

    /// Adds the token to a request.
    pub(crate) fn show_token<T>(&self, request: &mut Request<T>) {
        if let Some(token) = &self.shared.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
    }

    /// A request for a short call.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        // For the server, should it not notice that we have gone; ours comes first.
        request.set_timeout(self.shared.options.call_limit.saturating_add(Duration::from_secs(1)));
        self.show_token(&mut request);
        request
    }

    fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl Future<Output = std::result::Result<Response<T>, tonic::Status>> + Send + 'static,
    ) -> Result<T> {
        let limit = self.shared.options.call_limit;
        let answer = async move { work.await.map(Response::into_inner).map_err(|e| Error::of(what, limit, &e)) };
        self.shared.runtime.run(what, limit, answer)
    }
}
