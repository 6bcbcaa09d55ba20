//! Connections: accepted, proven by TLS, bounded in number and time, and served over HTTP/2 or HTTP/1.1.

use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use model::{Fingerprint, UnixMillis};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use crate::app::App;
use crate::limits::{Place, told};
use crate::{api, ca, tls};

/// How often HTTP/2 asks whether the other side is there, and how long it waits.
const PING: Duration = Duration::from_secs(10);
/// How long open requests may take when the server stops.
const STOP: Duration = Duration::from_secs(5);

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// SHA-256 of the key that it proved to hold, if it showed a certificate of our CA.
    pub(crate) key: Option<Fingerprint>,
    pub(crate) address: SocketAddr,
    /// Our own address on the connection.
    pub(crate) local: Option<IpAddr>,
    /// When the certificate runs out that it showed.
    pub(crate) expires: Option<UnixMillis>,
    /// Its place among the connections.
    pub(crate) place: Option<Arc<Place>>,
}

impl Peer {
    /// Whether it showed who it is, on this connection.
    pub(crate) fn is_known(&self) -> bool {
        self.place.as_ref().is_some_and(|place| place.is_known())
    }

    /// Where the other side comes from, as far as that says how it is reached: not from this very machine, and not by
    /// an address that means nothing elsewhere.
    pub(crate) fn outside(&self) -> Option<IpAddr> {
        let from = self.address.ip().to_canonical();
        let near = match from {
            IpAddr::V4(from) => from.is_loopback() || from.is_link_local(),
            IpAddr::V6(from) => from.is_loopback() || from.is_unicast_link_local(),
        };
        let ourselves = self.local.is_some_and(|local| local.to_canonical() == from);
        (!near && !ourselves).then_some(from)
    }
}

/// Serves until `shutdown` is ready, and then ends what is open.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: ServerConfig,
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
) {
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let router = api::router(app.clone());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener) => accepted,
        };
        if let Some((stream, address)) = accepted {
            let (place, go) = app.upkeep.doors.enter(address.ip());
            let serving =
                connection(app.clone(), acceptor.clone(), stream, address, router.clone(), Arc::new(place));
            connections.spawn(async move {
                tokio::select! {
                    () = serving => {}
                    () = told(go) => tracing::debug!(%address, "a connection made room for newer ones"),
                }
            });
        }
    }
    drop(listener);
    app.stopping.send_replace(true);
    let ended = tokio::time::timeout(STOP, async { while connections.join_next().await.is_some() {} }).await;
    if ended.is_err() {
        connections.shutdown().await;
    }
}

async fn accept(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            // Out of descriptors or memory: what would follow at once is the same error.
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

async fn connection(
    app: Arc<App>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    router: Router,
    place: Arc<Place>,
) {
    let (limits, mut stopping) = (&app.upkeep.limits, app.stopping.subscribe());
    let begun = Instant::now();
    let local = stream.local_addr().ok().map(|local| local.ip());
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%address, %error, "no TCP_NODELAY");
    }
    let stream = match tokio::time::timeout(limits.handshake, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            app.upkeep.metrics.handshake_failed();
            return tracing::debug!(%address, %error, "a TLS handshake failed");
        }
        Err(_) => {
            app.upkeep.metrics.handshake_failed();
            return tracing::debug!(%address, "a TLS handshake took too long");
        }
    };
    let session = stream.get_ref().1;
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let key = certificate.and_then(tls::key_of);
    let expires = certificate.and_then(ca::expires);
    if key.is_some_and(|key| {
        app.shared.read().environments.values().any(|env| env.by_key.contains_key(&key.to_string()))
    }) {
        place.introduce();
    }
    let http2 = session.alpn_protocol() == Some(b"h2");
    let peer = Peer { key, address, local, expires, place: Some(place.clone()) };
    let asked = Arc::new(AtomicBool::new(false));
    let service = TowerToHyperService::new(router);
    let service = service_fn({
        let asked = asked.clone();
        move |mut request: Request<Incoming>| {
            asked.store(true, Ordering::Relaxed);
            request.extensions_mut().insert(peer.clone());
            let service = service.clone();
            async move { answer(service, request).await }
        }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.header);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .max_concurrent_streams(128)
        .initial_stream_window_size(64 << 10)
        .initial_connection_window_size(128 << 10)
        .max_send_buf_size(64 << 10)
        .max_header_list_size(16 << 10);
    let builder = if http2 { builder.http2_only() } else { builder.http1_only() };
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let served = tokio::select! {
        served = serving.as_mut() => served,
        () = silent(&asked, limits.handshake) => return tracing::debug!(%address, "a connection asked for nothing"),
        () = outstayed(&place, begun + limits.stranger_stays) => {
            return tracing::debug!(%address, "a connection did not show in time who it is");
        }
        () = stopped(&mut stopping) => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%address, %error, "a connection ended");
    }
}

/// Ready when the server stops.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, and the server with it.
    drop(stopping.wait_for(|stopping| *stopping).await);
}

async fn answer(
    service: TowerToHyperService<Router>,
    request: Request<Incoming>,
) -> Result<hyper::Response<Body>, Infallible> {
    service.call(request).await
}

/// Ready when the first request is late.
async fn silent(asked: &AtomicBool, may: Duration) {
    tokio::time::sleep(may).await;
    if asked.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

/// Ready when a stranger has been here for as long as strangers may.
async fn outstayed(place: &Place, until: Instant) {
    tokio::time::sleep_until(until).await;
    if place.is_known() {
        std::future::pending::<()>().await;
    }
}
