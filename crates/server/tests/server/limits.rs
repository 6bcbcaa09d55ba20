//! What those meet who ask too much, too slowly, or for nothing; and that others do not notice.

use std::sync::Arc;
use std::time::Duration;

use model::api::{ApiError, ErrorCode, KeyCreated, TokenRequest};
use model::{Change, Network, Watch};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use reqwest::Method;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use server::{Config, Limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::harness::{Client, DEFAULT, Server};

/// Nothing here takes this long.
const ENOUGH: Duration = Duration::from_secs(30);

async fn impatient(limits: Limits) -> Server {
    let dir = tempfile::tempdir().unwrap();
    Server::start_with(dir, |config| Config { limits, ..config }).await.unwrap()
}

async fn tls(server: &Server) -> TlsStream<TcpStream> {
    let ca = PemObject::from_pem_slice(server.file("ca.pem").as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca).unwrap();
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
    let stream = TcpStream::connect(server.ready.address).await.unwrap();
    let name = "drove.example".try_into().unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

/// Sends a byte now and then until the other side ends it; what it said.
async fn drip(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite,
    bytes: impl Iterator<Item = u8>,
) -> Vec<u8> {
    let (mut read, mut write) = tokio::io::split(stream);
    let sending = async {
        for byte in bytes {
            if write.write_all(&[byte]).await.is_err() || write.flush().await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        std::future::pending::<()>().await;
    };
    let mut answer = Vec::new();
    let reading = async {
        // It may end by a reset, after the answer.
        let _ = read.read_to_end(&mut answer).await;
    };
    let ended = async {
        tokio::select! {
            () = sending => {}
            () = reading => {}
        }
    };
    tokio::time::timeout(ENOUGH, ended).await.expect("the server holds on to who sends a byte now and then");
    answer
}

#[tokio::test]
async fn a_body_that_comes_a_byte_at_a_time_is_refused_by_name_and_others_join_meanwhile() {
    let server = impatient(Limits { body: Duration::from_secs(1), ..Limits::default() }).await;
    let token = server.token(&TokenRequest { uses: None, ttl_seconds: None }).await.token;
    let host = server.host("h1").await;
    let mut watch = host.watch().await;
    watch.snapshot().await;
    // More than the bodies of strangers that are read at a time, whatever they announce.
    let slow = futures_util::future::join_all((0..80).map(|i| {
        let server = &server;
        async move {
            let mut stream = tls(server).await;
            let length = if i % 2 == 0 { 5_000 } else { 300_000 };
            let head = format!(
                "POST {DEFAULT}/join HTTP/1.1\r\nHost: drove.example\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            drip(stream, std::iter::repeat(b' ')).await
        }
    }));
    let normal = async {
        server.join("h2", &token, &[]).await.unwrap();
        server.admin().make_network(json!({ "name": "red", "cidrs": ["10.9.0.0/16"] })).await.unwrap();
        server.admin().get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap();
        host.lease("red", 0).await.unwrap();
        while !matches!(watch.next().await, Some(Watch::Delta { changes, .. })
            if changes.iter().any(|change| matches!(change, Change::Put(model::Object::Block(_)))))
        {}
    };
    let (answers, ()) = tokio::join!(slow, normal);
    let mut named = 0;
    for answer in &answers {
        let text = String::from_utf8_lossy(answer);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let error: ApiError = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {text}"));
        match error.code {
            ErrorCode::TooSlow => {
                assert!(head.starts_with("HTTP/1.1 408"), "{head}");
                assert!(error.message.contains("too long to arrive") && error.request.is_some(), "{error}");
                named += 1;
            }
            // There was no room for its large body.
            ErrorCode::Unavailable => assert!(error.message.contains("try again"), "{error}"),
            _ => panic!("{error:?}"),
        }
    }
    assert!(named >= 40, "{named}");
}

#[tokio::test]
async fn a_head_or_a_handshake_that_comes_a_byte_at_a_time_is_ended() {
    let short = Duration::from_millis(500);
    let server = impatient(Limits { header: short, handshake: short, ..Limits::default() }).await;
    let head = format!("GET {DEFAULT}/networks HTTP/1.1\r\nHost: drove.example\r\nX-Long: ");
    let head = head.bytes().chain(std::iter::repeat(b'x'));
    let hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3].into_iter().chain(std::iter::repeat(7));
    let tcp = TcpStream::connect(server.ready.address).await.unwrap();
    let silent = TcpStream::connect(server.ready.address).await.unwrap();
    let quiet = tls(&server).await;
    let answers = tokio::join!(
        drip(tls(&server).await, head),
        drip(tcp, hello),
        drip(silent, [].into_iter()),
        drip(quiet, [].into_iter())
    );
    assert!(!answers.0.starts_with(b"HTTP/1.1 2"));
    assert!(answers.2.is_empty() && answers.3.is_empty());
    server.admin().get::<serde_json::Value>("/v1/info").await.unwrap();
}

#[tokio::test]
async fn a_stranger_may_not_stay_and_who_is_known_may() {
    let server = impatient(Limits { stranger_stays: Duration::from_secs(1), ..Limits::default() }).await;
    let host = server.host("h1").await;
    let mut watch = host.watch().await;
    watch.snapshot().await;
    let mut stranger = tls(&server).await;
    stranger.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let answer = drip(stranger, [].into_iter()).await;
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    // Longer than strangers may: the watch is still the one that was opened.
    server.admin().make_network(json!({ "name": "red", "cidrs": ["10.9.0.0/16"] })).await.unwrap();
    host.lease("red", 0).await.unwrap();
    assert!(!watch.delta().await.is_empty());
}

/// What the server counts under that name.
async fn counted(server: &Server, name: &str) -> u64 {
    let (status, text) = server.admin().raw(Method::GET, "/metrics", "").await;
    assert_eq!(status, 200);
    let line =
        text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn ten_thousand_half_open_connections_keep_nobody_out() {
    const FLOOD: usize = 10_000;
    let server = Server::start().await;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let needed = (FLOOD + 4000) as u64;
    if soft < needed && setrlimit(Resource::RLIMIT_NOFILE, needed, hard.max(needed)).is_err() {
        println!("skipped: this machine allows {hard} open files, and {needed} are needed");
        return;
    }
    let host = server.host("h1").await;
    let mut watch = host.watch().await;
    watch.snapshot().await;
    let mut flood = Vec::new();
    for batch in 0..FLOOD / 500 {
        // Half of them say nothing, half begin a handshake.
        let opened = futures_util::future::join_all((0..500).map(|i| {
            let address = server.ready.address;
            async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                if i % 2 == 0 {
                    let _ = stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252]).await;
                }
                stream
            }
        }))
        .await;
        flood.extend(opened);
        // Connections of their own, from the very address that the flood comes from.
        let name = format!("n{batch}");
        let spec = json!({ "name": name, "cidrs": [format!("10.{}.0.0/16", 100 + batch)] });
        server.admin().make_network(spec).await.unwrap();
        host.lease(&name, 0).await.unwrap();
        while watch.delta().await.is_empty() {}
    }
    let strangers = counted(&server, "droveway_connections{peer=\"stranger\"}").await;
    assert!(strangers <= Limits::default().strangers_of_source as u64, "{strangers}");
    // The others made room, or had not shaken hands in time; some may still wait in the kernel's queue.
    let ended = counted(&server, "droveway_connections_evicted_total").await
        + counted(&server, "droveway_handshake_failures_total").await;
    assert!(ended >= FLOOD as u64 / 2, "{ended}");
    server.host("h2").await;
    assert_eq!(flood.len(), FLOOD);
}

#[tokio::test]
async fn who_asks_too_often_is_told_when_to_come_again_and_others_are_served() {
    let server = impatient(Limits { rate: Some(3), ..Limits::default() }).await;
    let host = server.host("h1").await;
    let made: KeyCreated = server
        .admin()
        .post(&format!("{DEFAULT}/keys"), &json!({ "name": "busy", "role": "read" }))
        .await
        .unwrap();
    let busy = Client { key: Some(made.key), ..server.nobody() };
    let networks = format!("{DEFAULT}/networks");
    let refused = loop {
        let response = busy.request(Method::GET, &networks).send().await.unwrap();
        if response.status() != 200 {
            break response;
        }
    };
    assert_eq!(refused.status(), 429);
    let after: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    let error: ApiError = serde_json::from_str(&refused.text().await.unwrap()).unwrap();
    assert_eq!((error.code, error.retry_after), (ErrorCode::TooMany, Some(after)));
    assert!(error.message.contains("key \"busy\"") && error.message.contains("--rate-limit"), "{error}");
    server.admin().get::<Vec<Network>>(&networks).await.unwrap();
    host.client.get::<Vec<Network>>(&networks).await.unwrap();
    let strangers = server.nobody();
    let error = loop {
        if let Err(error) = strangers.get::<serde_json::Value>("/v1/info").await {
            break error;
        }
    };
    assert_eq!(error.code, ErrorCode::TooMany);
    assert!(error.message.contains("127.0.0.1"), "{error}");
    host.client.get::<Vec<Network>>(&networks).await.unwrap();
    assert!(counted(&server, "droveway_rate_limited_total").await >= 2);
    // Who guesses keys is a stranger, too.
    let guess = Client { key: Some("dwk1.guess".into()), ..server.nobody() };
    let error = guess.get::<Vec<Network>>(&networks).await.unwrap_err();
    assert!(matches!(error.code, ErrorCode::TooMany | ErrorCode::Unauthenticated), "{error}");
    tokio::time::timeout(ENOUGH, async {
        while busy.get::<Vec<Network>>(&networks).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .expect("waiting helps");
}
