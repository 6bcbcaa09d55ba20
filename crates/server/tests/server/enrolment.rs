use model::api::{ErrorCode, HostView, TokenRequest, TokenView};
use model::{JoinToken, Network};
use rcgen::KeyPair;

use crate::harness::{DEFAULT, Server, join_request};

/// A token for a day and any number of hosts.
const ANY: TokenRequest = TokenRequest { uses: None, ttl_seconds: None };

#[tokio::test]
async fn a_host_joins_with_a_token_and_is_seen() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    assert_eq!(host.answer.environment.as_str(), "default");
    assert_eq!(host.answer.ca, server.file("ca.pem"));
    let hosts: Vec<HostView> = server.admin().get(&format!("{DEFAULT}/hosts")).await.unwrap();
    assert_eq!(hosts.len(), 1);
    assert_eq!((&hosts[0].host.id, hosts[0].host.name.as_str()), (&host.id, "h1"));
    assert!(!hosts[0].connected);
    let watch = host.watch().await;
    let view: HostView = server.admin().get(&format!("{DEFAULT}/hosts/h1")).await.unwrap();
    assert!(view.connected && view.seen.is_some());
    drop(watch);
}

#[tokio::test]
async fn bad_tokens_are_refused_with_the_remedy_and_without_being_quoted() {
    let (server, other) = (Server::start().await, Server::start().await);
    let used = server.token(&TokenRequest { uses: Some(1), ttl_seconds: None }).await.token;
    server.join("h1", &used, &[]).await.unwrap();
    let short = server.token(&TokenRequest { uses: None, ttl_seconds: Some(1) }).await;
    let foreign = other.token(&ANY).await.token;
    let good: JoinToken = server.token(&ANY).await.token.parse().unwrap();
    let revoked = server.token(&ANY).await;
    server.admin().delete(&format!("{DEFAULT}/tokens/{}", revoked.view.id)).await.unwrap();
    let forged = JoinToken { secret: "c2VjcmV0LXRoYXQtaXMtd3Jvbmc".into(), ..good }.reveal();
    while std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64 <= short.view.expires {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    for (token, code, expected) in [
        (used.as_str(), ErrorCode::Unauthenticated, "used up"),
        (&short.token, ErrorCode::Unauthenticated, "expired"),
        (&foreign, ErrorCode::Unauthenticated, "another server"),
        (&forged, ErrorCode::Unauthenticated, "not valid"),
        (&revoked.token, ErrorCode::Unauthenticated, "revoked"),
        ("opensesame", ErrorCode::Invalid, "dwj1.ID.SECRET.FINGERPRINT"),
        ("", ErrorCode::Invalid, "dwj1.ID.SECRET.FINGERPRINT"),
    ] {
        let error = server.join("h2", token, &[]).await.err().unwrap();
        assert_eq!(error.code, code, "{error}");
        assert!(
            error.message.contains(expected) && error.message.contains("droveway token create"),
            "{error}"
        );
        let secret = token.split('.').nth(2);
        assert!(secret.is_none_or(|secret| !error.message.contains(secret)), "{error}");
    }
    let hosts: Vec<HostView> = server.admin().get(&format!("{DEFAULT}/hosts")).await.unwrap();
    assert_eq!(hosts.len(), 1);
}

#[tokio::test]
async fn a_token_for_one_host_lets_in_one_of_many_that_come_at_once() {
    let server = Server::start().await;
    let token = server.token(&TokenRequest { uses: Some(1), ttl_seconds: None }).await;
    let names: Vec<String> = (0..8).map(|i| format!("h{i}")).collect();
    let joins = names.iter().map(|name| server.join(name, &token.token, &[]));
    let joined = futures_util::future::join_all(joins).await;
    assert_eq!(joined.iter().filter(|join| join.is_ok()).count(), 1);
    let tokens: Vec<TokenView> = server.admin().get(&format!("{DEFAULT}/tokens")).await.unwrap();
    assert_eq!((tokens[0].uses_left, tokens[0].used), (Some(0), 1));
}

#[tokio::test]
async fn a_host_whose_answer_was_lost_asks_again_and_is_the_same_host() {
    let server = Server::start().await;
    let token = server.token(&TokenRequest { uses: Some(1), ttl_seconds: None }).await;
    let key = KeyPair::generate().unwrap();
    let copy = KeyPair::from_pem(&key.serialize_pem()).unwrap();
    let first = server.join_with(key, "h1", &token.token, &[]).await.unwrap();
    let second = server.join_with(copy, "h1", &token.token, &[]).await.unwrap();
    assert_eq!(first.id, second.id);
    second.client.get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap();
    let tokens: Vec<TokenView> = server.admin().get(&format!("{DEFAULT}/tokens")).await.unwrap();
    assert_eq!(tokens[0].used, 1);
}

#[tokio::test]
async fn a_name_a_key_and_a_route_that_clash_are_refused_and_cost_no_use() {
    let server = Server::start().await;
    let first = server.host("h1").await;
    let token = server.token(&TokenRequest { uses: Some(1), ttl_seconds: None }).await;
    let refused = |error: Option<model::api::ApiError>, code, words: &[&str]| {
        let error = error.unwrap();
        assert_eq!(error.code, code, "{error}");
        assert!(words.iter().all(|word| error.message.contains(word)), "{error}");
    };
    let conflict = ErrorCode::Conflict;
    refused(server.join("h1", &token.token, &[]).await.err(), conflict, &["\"h1\"", "choose another --name"]);
    let copy = KeyPair::from_pem(&first.key.serialize_pem()).unwrap();
    refused(server.join_with(copy, "h2", &token.token, &[]).await.err(), conflict, &["joined as \"h1\""]);
    let routes = [("0.0.0.0/0", "eth0"), ("10.42.8.0/24", "eth1")];
    let words = [
        "network \"managed\": pool 10.42.0.0/16 overlaps route 10.42.8.0/24 dev eth1 on host h2",
        "--subnet",
    ];
    refused(server.join("h2", &token.token, &routes).await.err(), conflict, &words);
    refused(
        server.join("H1", &token.token, &[]).await.err(),
        conflict,
        &["host \"H1\"", "a host \"h1\" already", "--name"],
    );
    refused(server.join("self", &token.token, &[]).await.err(), ErrorCode::Invalid, &["reserved"]);
    let id = first.id.as_str().to_owned();
    refused(server.join(&id, &token.token, &[]).await.err(), ErrorCode::Invalid, &["reserved"]);
    server.join("h2", &token.token, &routes[..1]).await.unwrap();
}

#[tokio::test]
async fn a_signing_request_that_does_not_prove_its_key_is_refused() {
    let server = Server::start().await;
    let token = server.token(&ANY).await.token;
    let mut request = join_request(&KeyPair::generate().unwrap(), "h1", &token, &[]);
    for csr in ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
        request["csr"] = csr.into();
        let error = server.nobody().post::<()>(&format!("{DEFAULT}/join"), &request).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Invalid);
        assert!(error.message.contains("csr"), "{error}");
    }
}

#[tokio::test]
async fn a_removed_host_loses_its_watch_at_once_and_is_refused_whatever_its_certificate_says() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let block = host.lease("managed", 0).await.unwrap();
    host.put(&host.endpoint(&block, "web", 2)).await.unwrap();
    let mut watch = host.watch().await;
    watch.snapshot().await;
    server.admin().delete(&format!("{DEFAULT}/hosts/h1")).await.unwrap();
    while let Some(message) = watch.next().await {
        assert!(matches!(message, model::Watch::Heartbeat { .. }), "{message:?}");
    }
    let error = host.client.get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unauthenticated);
    assert!(error.message.contains("removed"), "{error}");
    let left: Vec<serde_json::Value> = server.admin().get(&format!("{DEFAULT}/endpoints")).await.unwrap();
    assert!(left.is_empty());
    let left: Vec<serde_json::Value> = server.admin().get(&format!("{DEFAULT}/blocks")).await.unwrap();
    assert!(left.is_empty());
    let error = server.admin().delete(&format!("{DEFAULT}/hosts/h1")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    let again = server.host("h1").await;
    assert_ne!(again.id, host.id, "a host that joins again is another");
}

#[tokio::test]
async fn a_certificate_of_another_ca_does_not_get_through_the_handshake() {
    let (server, other) = (Server::start().await, Server::start().await);
    let stranger = other.host("h1").await;
    let client = server.client(&server.file("ca.pem"), Some((&stranger.answer.certificate, &stranger.key)));
    let error = client.get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
}

#[tokio::test]
async fn a_certificate_that_ran_out_locks_nobody_out() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let ca_key = KeyPair::from_pem(&server.file("ca.key")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&server.file("ca.pem"), ca_key).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let expired = params.signed_by(&host.key, &issuer).unwrap().pem();
    let client = server.client(&server.file("ca.pem"), Some((&expired, &host.key)));
    client.get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap();
}
