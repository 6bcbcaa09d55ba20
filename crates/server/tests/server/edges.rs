use model::api::{ApiError, BODY_MAX, ErrorCode};
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Client, DEFAULT, Server};

fn error(text: &str) -> ApiError {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[tokio::test]
async fn garbage_bodies_are_refused_and_the_place_is_said() {
    let server = Server::start().await;
    let admin = server.admin();
    let networks = format!("{DEFAULT}/networks");
    for (body, expected) in [
        (&b""[..], "EOF"),
        (b"{", "EOF"),
        (b"\xff\xfe\x00", "line 1 column 1"),
        (b"[]", "NetworkSpec"),
        (b"null", "NetworkSpec"),
        (br#"{"name": "red", "cidrs": "10.0.0.0/8"}"#, "expected a sequence"),
        (br#"{"name": "red", "cidrs": ["10.0.0.0/8"]} trailing"#, "trailing"),
    ] {
        let (status, text) = admin.raw(Method::POST, &networks, body).await;
        let error = error(&text);
        assert_eq!((status.as_u16(), error.code), (400, ErrorCode::Invalid));
        assert!(error.message.contains(expected), "{error}");
    }
    let deep = "[".repeat(100_000);
    let (status, text) = admin.raw(Method::POST, &networks, deep).await;
    assert_eq!((status.as_u16(), error(&text).code), (400, ErrorCode::Invalid));
}

#[tokio::test]
async fn an_oversized_body_is_refused_with_and_without_a_length() {
    let server = Server::start().await;
    let networks = format!("{DEFAULT}/networks");
    let (status, text) = server.admin().raw(Method::POST, &networks, vec![b'x'; BODY_MAX + 1]).await;
    assert_eq!((status.as_u16(), error(&text).code), (413, ErrorCode::TooLarge));
    let chunks =
        futures_util::stream::iter((0..40).map(|_| Ok::<_, std::io::Error>(vec![b' '; BODY_MAX / 20])));
    let (status, text) =
        server.admin().raw(Method::POST, &networks, reqwest::Body::wrap_stream(chunks)).await;
    assert_eq!((status.as_u16(), error(&text).code), (413, ErrorCode::TooLarge));
    server.admin().get::<serde_json::Value>(&networks).await.unwrap();
}

#[tokio::test]
async fn who_has_no_or_wrong_credentials_sees_nothing() {
    let server = Server::start().await;
    let nobody = server.nobody();
    let wrong = Client { key: Some("dwk1.wrong".into()), ..server.nobody() };
    let empty = Client { key: Some(String::new()), ..server.nobody() };
    for client in [&nobody, &wrong, &empty] {
        for (method, path) in [
            (Method::GET, "/networks"),
            (Method::POST, "/networks"),
            (Method::GET, "/hosts"),
            (Method::GET, "/endpoints"),
            (Method::GET, "/blocks"),
            (Method::GET, "/tokens"),
            (Method::POST, "/tokens"),
            (Method::GET, "/watch"),
            (Method::PUT, "/hosts/self"),
        ] {
            let (status, text) = client.raw(method.clone(), &format!("{DEFAULT}{path}"), "").await;
            assert_eq!(
                (status.as_u16(), error(&text).code),
                (401, ErrorCode::Unauthenticated),
                "{method} {path}"
            );
            let (status, _) = client.raw(method, &format!("/v1/environments/none{path}"), "").await;
            assert_eq!(status, 401, "not even which environments there are");
        }
    }
    nobody.get::<serde_json::Value>("/v1/info").await.unwrap();
    let document: serde_json::Value = nobody.get("/openapi.json").await.unwrap();
    assert!(
        document["paths"][format!("{}/networks", DEFAULT.replace("default", "{environment}"))].is_object()
    );
}

#[tokio::test]
async fn agents_and_people_each_have_their_own_paths() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    for (method, path) in [
        (Method::POST, "/networks"),
        (Method::DELETE, "/networks/managed"),
        (Method::GET, "/hosts"),
        (Method::DELETE, "/hosts/h1"),
        (Method::PATCH, "/hosts/h1"),
        (Method::GET, "/endpoints"),
        (Method::GET, "/tokens"),
        (Method::POST, "/tokens"),
    ] {
        let (status, text) = host.client.raw(method.clone(), &format!("{DEFAULT}{path}"), "{}").await;
        assert_eq!((status.as_u16(), error(&text).code), (403, ErrorCode::Forbidden), "{method} {path}");
    }
    host.client.get::<serde_json::Value>(&format!("{DEFAULT}/networks")).await.unwrap();
    for (method, path) in [
        (Method::GET, "/watch"),
        (Method::PUT, "/hosts/self"),
        (Method::PUT, "/endpoints/e-abcdefghij"),
        (Method::DELETE, "/endpoints/e-abcdefghij"),
        (Method::POST, "/blocks"),
        (Method::POST, "/claims"),
    ] {
        let (status, text) = server.admin().raw(method.clone(), &format!("{DEFAULT}{path}"), "{}").await;
        assert_eq!((status.as_u16(), error(&text).code), (403, ErrorCode::Forbidden), "{method} {path}");
    }
    let other = server.admin().get::<serde_json::Value>("/v1/environments/none/networks").await.unwrap_err();
    assert_eq!(other.code, ErrorCode::NotFound);
    assert!(other.message.contains("\"none\""), "{other}");
}

#[tokio::test]
async fn unknown_paths_and_methods_are_refused_in_json() {
    let server = Server::start().await;
    for path in ["/", "/v1", "/v2/info", "/v1/environments/default/nothing", "/v1/environments//networks"] {
        let (status, text) = server.admin().raw(Method::GET, path, "").await;
        assert_eq!((status.as_u16(), error(&text).code), (404, ErrorCode::NotFound), "{path}");
    }
    let (status, text) = server.admin().raw(Method::DELETE, "/v1/info", "").await;
    assert_eq!((status.as_u16(), error(&text).code), (405, ErrorCode::Invalid));
    let (status, text) = server.admin().raw(Method::GET, &format!("{DEFAULT}/networks/%ff%fe"), "").await;
    assert_eq!((status.as_u16(), error(&text).code), (400, ErrorCode::Invalid));
    let host = server.host("h1").await;
    let (status, text) = host.client.raw(Method::GET, &format!("{DEFAULT}/watch?revision=minus"), "").await;
    assert_eq!((status.as_u16(), error(&text).code), (400, ErrorCode::Invalid));
}

#[tokio::test]
async fn bad_token_requests_are_refused() {
    let server = Server::start().await;
    let tokens = format!("{DEFAULT}/tokens");
    for (body, expected) in [
        (json!({ "uses": 0 }), "uses is 0"),
        (json!({ "uses": -1 }), "-1"),
        (json!({ "ttl_seconds": 0 }), "ttl_seconds is 0"),
        (json!({ "ttl_seconds": u64::MAX }), "ttl_seconds is"),
        (json!({ "for": "me" }), "for"),
    ] {
        let error = server.admin().post::<serde_json::Value>(&tokens, &body).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Invalid);
        assert!(error.message.contains(expected), "{error}");
    }
    let made: serde_json::Value = server.admin().post(&tokens, &json!({})).await.unwrap();
    let listed = server.admin().raw(Method::GET, &tokens, "").await.1;
    let secret = made["token"].as_str().unwrap().split('.').nth(2).unwrap();
    assert!(!listed.contains(secret), "a secret is shown once");
    let error = server.admin().delete(&format!("{tokens}/none")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn bytes_that_are_not_tls_hurt_nobody() {
    let server = Server::start().await;
    let mut stream = tokio::net::TcpStream::connect(server.ready.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // It is closed or reset; either way no HTTP comes back.
    let _ = stream.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"));
    server.admin().get::<serde_json::Value>("/v1/info").await.unwrap();
}

#[tokio::test]
async fn http_1_works_too() {
    let server = Server::start().await;
    let ca = rustls::pki_types::pem::PemObject::from_pem_slice(server.file("ca.pem").as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(server.ready.address).await.unwrap();
    let name = "drove.example".try_into().unwrap();
    let mut tls =
        tokio_rustls::TlsConnector::from(std::sync::Arc::new(config)).connect(name, stream).await.unwrap();
    tls.write_all(b"GET /v1/info HTTP/1.1\r\nHost: drove.example\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    tls.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
}
