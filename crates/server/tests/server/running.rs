//! What those see who look after a server: health, metrics, request ids, pages, keys, the audit log, certificates.

use std::collections::BTreeSet;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use model::api::{
    ApiError, AuditEntry, ClaimRequest, ErrorCode, HostView, KeyCreated, KeyView, Outcome, Readiness,
    ReleaseClaim, RenewAnswer, Role, ServerInfo, TokenRequest,
};
use model::{Claim, EndpointId, Network, exposition};
use rcgen::KeyPair;
use reqwest::Method;
use serde_json::json;
use server::{Config, Lives};

use crate::harness::{Client, DEFAULT, Server};

const ENOUGH: Duration = Duration::from_secs(30);

fn millis() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(ENOUGH, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

async fn key(server: &Server, spec: serde_json::Value) -> Client {
    let made: KeyCreated = server.admin().post(&format!("{DEFAULT}/keys"), &spec).await.unwrap();
    Client { key: Some(made.key), ..server.nobody() }
}

#[tokio::test]
async fn anyone_may_ask_whether_it_lives_and_is_ready_and_a_server_that_cannot_write_is_not() {
    let server = Server::start().await;
    let nobody = server.nobody();
    let (status, text) = nobody.raw(Method::GET, "/healthz", "").await;
    assert_eq!((status.as_u16(), text.as_str()), (200, "ok\n"));
    // Nothing can be made there any more, as on a full disk.
    let (data, away) = (server.dir.path().join("data"), server.dir.path().join("away"));
    std::fs::rename(&data, &away).unwrap();
    let (status, text) = nobody.raw(Method::GET, "/readyz", "").await;
    std::fs::rename(&away, &data).unwrap();
    let readiness: Readiness = serde_json::from_str(&text).unwrap();
    assert_eq!(status, 503, "{text}");
    assert!(!readiness.ready && readiness.checks["disk"].contains("cannot write"), "{text}");
    assert_eq!((readiness.checks["store"].as_str(), readiness.checks["ca"].as_str()), ("ok", "ok"));
    until("ready again", async || nobody.raw(Method::GET, "/readyz", "").await.0 == 200).await;
}

#[tokio::test]
async fn metrics_need_a_key_that_may_look_and_keep_to_the_conventions() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let mut watch = host.watch().await;
    watch.snapshot().await;
    host.lease("managed", 0).await.unwrap();
    let reader = key(&server, json!({ "name": "prometheus", "role": "read" })).await;
    for client in [server.nobody(), host.client.clone()] {
        let status = client.raw(Method::GET, "/metrics", "").await.0;
        assert!(status == 401 || status == 403, "{status}");
    }
    let response = reader.request(Method::GET, "/metrics").send().await.unwrap();
    assert_eq!(response.headers()["content-type"], exposition::CONTENT_TYPE);
    let text = response.text().await.unwrap();
    assert_eq!(exposition::faults(&text), [""; 0], "{text}");
    for line in [
        "droveway_hosts{environment=\"default\",state=\"up\"} 1",
        "droveway_watchers{environment=\"default\"} 1",
        "droveway_leases{environment=\"default\",kind=\"block\"} 1",
        "droveway_tokens{environment=\"default\",state=\"spent\"} 1",
        "droveway_requests_total{method=\"POST\",route=\"/v1/environments/{environment}/join\",code=\"201\"} 1",
        "droveway_requests_total{method=\"GET\",route=\"/metrics\",code=\"401\"} 1",
        "droveway_request_duration_seconds_count{route=\"/v1/environments/{environment}/join\"} 1",
        "droveway_rate_limited_total 0",
    ] {
        assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
    }
    for name in [
        "droveway_store_transaction_duration_seconds_count",
        "droveway_store_size_bytes",
        "droveway_store_revision",
        "droveway_certificate_expiry_timestamp_seconds{certificate=\"ca\"}",
    ] {
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in\n{text}"));
        assert!(line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() > 0.0, "{line}");
    }
}

#[tokio::test]
async fn every_answer_has_an_id_and_a_refusal_names_it() {
    let server = Server::start().await;
    let admin = server.admin();
    let response =
        admin.request(Method::GET, "/v1/info").header("x-request-id", "deploy-7").send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "deploy-7");
    let mut seen = BTreeSet::new();
    for (method, path) in [
        (Method::GET, "/v1/info"),
        (Method::GET, "/nowhere"),
        (Method::DELETE, "/v1/info"),
        (Method::GET, "/v1/environments/default/networks/none"),
        (Method::GET, "/v1/environments/none/networks"),
    ] {
        let response = admin.request(method, path).header("x-request-id", "two words").send().await.unwrap();
        let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        let good = response.status().is_success();
        let text = response.text().await.unwrap();
        assert!(id != "two words" && seen.insert(id.clone()), "{id}");
        if !good {
            assert_eq!(serde_json::from_str::<ApiError>(&text).unwrap().request, Some(id), "{text}");
        }
    }
}

#[tokio::test]
async fn a_list_comes_page_by_page_each_object_once_whatever_changes_meanwhile() {
    let server = Server::start().await;
    let admin = server.admin();
    for i in 0..7 {
        let spec = json!({ "name": format!("n{i}"), "cidrs": [format!("10.{}.0.0/16", 100 + i)] });
        admin.make_network(spec).await.unwrap();
    }
    let networks = format!("{DEFAULT}/networks");
    let whole: Vec<Network> = admin.get(&networks).await.unwrap();
    let (mut found, mut pages, mut place) = (Vec::new(), 0, String::new());
    let mut next = Some(format!("{networks}?limit=3"));
    while let Some(path) = next {
        let response = admin.request(Method::GET, &path).send().await.unwrap();
        let link = response.headers().get("link").map(|link| link.to_str().unwrap().to_owned());
        let page: Vec<Network> = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        assert!(page.len() <= 3);
        found.extend(page.into_iter().map(|network| network.name));
        pages += 1;
        next = link
            .map(|link| link.strip_prefix('<').unwrap().split_once(">; rel=\"next\"").unwrap().0.to_owned());
        if let Some(next) = &next {
            next.split_once("continue=").unwrap().1.clone_into(&mut place);
        }
        if pages == 1 {
            // Before what was told, and after: neither moves what is there all the while.
            admin.delete(&format!("{networks}/n0")).await.unwrap();
            admin.make_network(json!({ "name": "aaa", "cidrs": ["10.120.0.0/16"] })).await.unwrap();
        }
    }
    let names: Vec<_> = whole.into_iter().map(|network| network.name).collect();
    assert_eq!((found, pages), (names, 3));

    let good: serde_json::Value =
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(&place).unwrap()).unwrap();
    let forged = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut forged = good.clone();
        change(&mut forged);
        BASE64_URL_SAFE_NO_PAD.encode(forged.to_string())
    };
    let future = forged(&|it| it["revision"] = json!(1_000_000_000));
    let restored = forged(&|it| it["epoch"] = json!("s-aaaaaaaaaa"));
    for (query, code, expected) in [
        ("limit=0".to_owned(), ErrorCode::Invalid, "limit is 0"),
        ("limit=5000".to_owned(), ErrorCode::Invalid, "use 1 to 1000"),
        ("limit=many".to_owned(), ErrorCode::Invalid, "query"),
        ("continue=rubbish!".to_owned(), ErrorCode::Invalid, "begin the list again"),
        (format!("continue={future}"), ErrorCode::Invalid, "of revision 1000000000, the state is at"),
        (format!("continue={restored}"), ErrorCode::Compacted, "older life of the store"),
    ] {
        let error = admin.get::<Vec<Network>>(&format!("{networks}?{query}")).await.unwrap_err();
        // An epoch that is none is not understood at all.
        let epoch = query.contains(&restored) && error.code == ErrorCode::Invalid;
        assert!(epoch || (error.code == code && error.message.contains(expected)), "{query}: {error:?}");
    }
}

#[tokio::test]
async fn a_key_may_do_what_its_role_says_until_it_ends() {
    let server = Server::start().await;
    let (admin, keys) = (server.admin(), format!("{DEFAULT}/keys"));
    let networks = format!("{DEFAULT}/networks");
    let alice = key(&server, json!({ "name": "alice" })).await;
    alice.make_network(json!({ "name": "red", "cidrs": ["10.9.0.0/16"] })).await.unwrap();
    let reader = key(&server, json!({ "name": "reader", "role": "read", "ttl_seconds": 3600 })).await;
    reader.get::<Vec<Network>>(&networks).await.unwrap();
    for (method, path) in
        [(Method::POST, "/networks"), (Method::DELETE, "/networks/red"), (Method::POST, "/keys")]
    {
        let (status, text) = reader.raw(method, &format!("{DEFAULT}{path}"), "{}").await;
        assert_eq!(status, 403);
        assert!(text.contains("may only look"), "{text}");
    }
    let listed: Vec<KeyView> = reader.get(&keys).await.unwrap();
    let listed: Vec<_> =
        listed.iter().map(|key| (key.name.as_str(), key.role, key.expires.is_some())).collect();
    assert_eq!(
        listed,
        [("admin", Role::Admin, false), ("alice", Role::Admin, false), ("reader", Role::Read, true)]
    );
    let text = admin.raw(Method::GET, &keys, "").await.1;
    assert!(!text.contains(alice.key.as_ref().unwrap()) && !text.contains("hash"), "{text}");

    let twice = admin.post::<KeyCreated>(&keys, &json!({ "name": "alice" })).await.err().unwrap();
    assert_eq!(twice.code, ErrorCode::Conflict);
    admin.delete(&format!("{keys}/alice")).await.unwrap();
    let gone = alice.get::<Vec<Network>>(&networks).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::Unauthenticated);
    assert_eq!(admin.delete(&format!("{keys}/alice")).await.unwrap_err().code, ErrorCode::NotFound);
    let own = admin.delete(&format!("{keys}/admin")).await.unwrap_err();
    assert_eq!(own.code, ErrorCode::InUse);
    assert!(own.message.contains("admin.key"), "{own}");

    let brief = key(&server, json!({ "name": "brief", "ttl_seconds": 1 })).await;
    until("the key expires", async || brief.get::<Vec<Network>>(&networks).await.is_err()).await;
    let error = brief.get::<Vec<Network>>(&networks).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unauthenticated);
    assert!(error.message.contains("\"brief\" expired") && error.message.contains("key create"), "{error}");
    key(&server, json!({ "name": "brief" })).await;
    for bad in [
        json!({ "name": "" }),
        json!({ "name": "x", "role": "king" }),
        json!({ "name": "x", "ttl_seconds": 0 }),
    ] {
        let error = admin.post::<KeyCreated>(&keys, &bad).await.err().unwrap();
        assert_eq!(error.code, ErrorCode::Invalid, "{bad}");
    }
}

async fn audit(client: &Client, query: &str) -> Vec<AuditEntry> {
    let (status, text) = client.raw(Method::GET, &format!("{DEFAULT}/audit{query}"), "").await;
    assert_eq!(status, 200, "{text}");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn the_audit_log_says_who_asked_for_what_and_how_it_ended_and_no_secret() {
    let server = Server::start().await;
    let admin = server.admin();
    let host = server.host("h1").await;
    let block = host.lease("managed", 0).await.unwrap();
    let endpoint = host.endpoint(&block, "web", 5);
    host.put(&endpoint).await.unwrap();
    // What changes nothing is not written down again.
    host.put(&endpoint).await.unwrap();
    let alice = key(&server, json!({ "name": "alice" })).await;
    let red = admin
        .request(Method::POST, &format!("{DEFAULT}/networks"))
        .header("x-request-id", "make-red")
        .json(&json!({ "name": "red", "cidrs": ["10.9.0.0/16"] }));
    assert_eq!(red.send().await.unwrap().status(), 201);
    alice.delete(&format!("{DEFAULT}/networks/none")).await.unwrap_err();
    let peer = json!({ "name": "office", "network": "managed", "host": "h1", "address": "192.0.2.77",
        "proof": { "psk": { "secret": "a-very-secret-secret" } }, "remote_cidrs": ["192.168.7.0/24"] });
    // Whether it is as the API has it or not, its secret is nowhere.
    let _ = admin.raw(Method::POST, &format!("{DEFAULT}/peers"), peer.to_string()).await;
    let revoked = server.token(&TokenRequest { uses: None, ttl_seconds: None }).await;
    admin.delete(&format!("{DEFAULT}/tokens/{}", revoked.view.id)).await.unwrap();
    server.join("h9", &revoked.token, &[]).await.err().unwrap();
    // Strangers cannot fill the log.
    server.nobody().raw(Method::DELETE, &format!("{DEFAULT}/networks/red"), "").await;

    let entries = audit(&admin, "").await;
    assert!(entries.windows(2).all(|pair| pair[1].number == pair[0].number + 1), "{entries:?}");
    let find = |what: &str| {
        let found: Vec<_> = entries.iter().filter(|entry| entry.what.contains(what)).collect();
        assert!(!found.is_empty(), "{what} in {entries:?}");
        found
    };
    let joins = find("POST /v1/environments/default/join");
    assert!(
        joins[0].who.starts_with("token ") && joins[0].about.as_deref() == Some("host \"h1\""),
        "{joins:?}"
    );
    assert_eq!((joins[0].outcome, joins[0].revision.is_some()), (Outcome::Done, true));
    assert_eq!(joins[1].who, format!("token {}", revoked.view.id));
    assert_eq!((joins[1].outcome, joins[1].code), (Outcome::Refused, Some(ErrorCode::Unauthenticated)));
    let made = find("POST /v1/environments/default/networks")[0];
    assert_eq!((made.who.as_str(), made.request.as_str()), ("key admin", "make-red"));
    assert_eq!(made.about.as_deref(), Some("network \"red\""));
    assert!(made.from.starts_with("127.0.0.1:"), "{made:?}");
    let refused = find("DELETE /v1/environments/default/networks/none")[0];
    assert_eq!((refused.who.as_str(), refused.code), ("key alice", Some(ErrorCode::NotFound)));
    assert_eq!(find("PUT /v1/environments/default/endpoints").len(), 1);
    assert!(find("POST /v1/environments/default/blocks")[0].who.starts_with("host h1 (h-"));
    assert!(!entries.iter().any(|entry| entry.what.ends_with("networks/red")));

    let text = server.file("audit.jsonl");
    let token_secret = revoked.token.split('.').nth(2).unwrap().to_owned();
    for secret in
        [alice.key.as_deref().unwrap(), &server.file("admin.key"), &token_secret, "a-very-secret-secret"]
    {
        assert!(!text.contains(secret.trim()));
    }

    let last = entries.last().unwrap();
    let since = audit(&admin, &format!("?since={}", last.at)).await;
    assert!(since.iter().all(|entry| entry.at >= last.at) && since.last() == Some(last));
    assert_eq!(host.client.raw(Method::GET, &format!("{DEFAULT}/audit"), "").await.0, 403);

    let from = millis() + 1;
    let follow = admin.request(Method::GET, &format!("{DEFAULT}/audit?follow=true&since={from}"));
    let mut follow = follow.send().await.unwrap();
    until("the clock goes on", async || millis() >= from).await;
    alice.delete(&format!("{DEFAULT}/networks/red")).await.unwrap();
    let line = tokio::time::timeout(ENOUGH, follow.chunk()).await.unwrap().unwrap().unwrap();
    let entry: AuditEntry = serde_json::from_slice(&line).unwrap();
    assert_eq!((entry.who.as_str(), entry.number), ("key alice", last.number + 1));

    let count = audit(&admin, "").await.len();
    let server = Server::start_in(server.stop().await).await;
    assert_eq!(audit(&server.admin(), "").await.len(), count, "it is there after a restart");
}

#[tokio::test]
async fn the_lines_of_addresses_say_of_which_whether_they_were_given_or_refused() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let ask = |seed: u8, address: Option<&str>| ClaimRequest {
        network: "managed".into(),
        address: address.map(|text| text.parse().unwrap()),
        endpoint: EndpointId::from_random([seed; 8]),
        router: false,
        retain: Some("shop/db".into()).filter(|_| address.is_none()),
    };
    let (claims, retained) = (format!("{DEFAULT}/claims"), format!("{DEFAULT}/retained"));
    let claim: Claim = one.client.post(&claims, &ask(1, None)).await.unwrap();
    two.client.post::<Claim>(&claims, &ask(2, None)).await.unwrap_err();
    two.client.post::<Claim>(&claims, &ask(3, Some("10.43.0.7"))).await.unwrap_err();
    let release = ReleaseClaim { network: "managed".into(), address: claim.address, endpoint: None };
    server.admin().delete_with(&retained, &release).await.unwrap();
    let about = |address: &str| Some(format!("address {address} of network \"managed\""));
    let given = about(&claim.address.to_string());
    until("all are written", async || audit(&server.admin(), "").await.len() >= 8).await;
    let entries = audit(&server.admin(), "").await;
    let told: Vec<_> = entries.iter().filter(|entry| entry.what.contains(&claims)).collect();
    let told: Vec<_> = told.iter().map(|entry| (&entry.about, entry.revision.is_some())).collect();
    assert_eq!(told, [(&given, true), (&given, false), (&about("10.43.0.7"), false)]);
    let released = entries.iter().find(|entry| entry.what.contains(&retained)).unwrap();
    assert_eq!((&released.about, released.revision.is_some()), (&given, true));
}

#[tokio::test]
async fn a_change_that_the_audit_log_did_not_get_before_the_server_died_is_in_it_after_its_next_start_once() {
    let server = Server::start().await;
    let mut made = Vec::new();
    for name in ["red", "green", "blue"] {
        let second = made.len();
        let spec = json!({ "name": name, "cidrs": [format!("10.{}.0.0/16", 60 + second)] });
        server.admin().make_network(spec).await.unwrap();
        made.push(name);
    }
    let whole = audit(&server.admin(), "").await;
    let mut dir = server.crash().await;
    let file = dir.path().join("data/audit.jsonl");
    let text = std::fs::read_to_string(&file).unwrap();
    // Killed before the last line, within it, and after it.
    let last = text.trim_end().rfind('\n').unwrap() + 1;
    for kept in [last, last + 20, text.len() - 1, text.len()] {
        std::fs::write(&file, &text[..kept]).unwrap();
        for _ in 0..2 {
            let server = Server::start_in(dir).await;
            until("the line is there", async || audit(&server.admin(), "").await.len() >= whole.len()).await;
            assert_eq!(audit(&server.admin(), "").await, whole, "{kept} of {} bytes", text.len());
            dir = server.crash().await;
        }
    }
    // What the log has is taken out of the store by what comes next.
    let server = Server::start_in(dir).await;
    for name in &made {
        server.admin().delete(&format!("{DEFAULT}/networks/{name}")).await.unwrap();
    }
    let data = server.stop().await;
    let store = rusqlite::Connection::open(data.path().join("data/store.sqlite")).unwrap();
    let left: i64 = store
        .query_row("SELECT count(*) FROM kv WHERE key LIKE '/droveway/default/audit/%'", [], |row| row.get(0))
        .unwrap();
    assert_eq!(left, 1, "the last change's alone");
}

/// A server whose certificates are good for so many seconds.
async fn short_lived(dir: tempfile::TempDir, seconds: u64) -> Server {
    let lives = Lives { leaf: Duration::from_secs(seconds), ..Lives::default() };
    Server::start_with(dir, |config| Config { lives, ..config }).await.unwrap()
}

fn certificate_expires(pem: &str) -> u64 {
    let der = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap().1.contents;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
    certificate.validity().not_after.timestamp().try_into().unwrap()
}

#[tokio::test]
async fn a_host_gets_a_new_certificate_for_its_own_key_and_for_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let server = short_lived(dir, 100).await;
    let host = server.host("h1").await;
    let first = certificate_expires(&host.answer.certificate);
    let path = format!("{DEFAULT}/hosts/self/certificate");
    let csr = |key: &KeyPair| {
        let csr = rcgen::CertificateParams::default().serialize_request(key).unwrap().pem().unwrap();
        json!({ "csr": csr })
    };
    let mut renewed = host.client.post::<RenewAnswer>(&path, &csr(&host.key)).await.unwrap();
    while certificate_expires(&renewed.certificate) == first {
        tokio::time::sleep(Duration::from_millis(100)).await;
        renewed = host.client.post(&path, &csr(&host.key)).await.unwrap();
    }
    assert!(certificate_expires(&renewed.certificate) > first);
    let client = server.client(&host.answer.ca, Some((&renewed.certificate, &host.key)));
    client.get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap();
    let view: HostView = server.admin().get(&format!("{DEFAULT}/hosts/h1")).await.unwrap();
    assert_eq!(view.certificate_expires, Some(certificate_expires(&renewed.certificate) * 1000));

    let other =
        host.client.post::<RenewAnswer>(&path, &csr(&KeyPair::generate().unwrap())).await.unwrap_err();
    assert_eq!(other.code, ErrorCode::Forbidden);
    assert!(other.message.contains("joins anew"), "{other}");
    let bad = host.client.post::<RenewAnswer>(&path, &json!({ "csr": "x" })).await.unwrap_err();
    assert_eq!(bad.code, ErrorCode::Invalid);
    server.admin().delete(&format!("{DEFAULT}/hosts/h1")).await.unwrap();
    let removed = client.post::<RenewAnswer>(&path, &csr(&host.key)).await.unwrap_err();
    assert_eq!(removed.code, ErrorCode::Unauthenticated);
    assert!(removed.message.contains("join again with a token"), "{removed}");
}

#[tokio::test]
async fn a_host_whose_certificate_was_made_while_the_clock_was_ahead_is_let_in_all_the_same() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let ca = rcgen::Issuer::from_ca_cert_pem(
        &server.file("ca.pem"),
        KeyPair::from_pem(&server.file("ca.key")).unwrap(),
    )
    .unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.not_before = rcgen::date_time_ymd(2070, 1, 1);
    params.not_after = rcgen::date_time_ymd(2071, 1, 1);
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let early = params.signed_by(&host.key, &ca).unwrap().pem();
    let client = server.client(&host.answer.ca, Some((&early, &host.key)));
    client.get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap();
    // So it can have one that is good.
    let csr = rcgen::CertificateParams::default().serialize_request(&host.key).unwrap().pem().unwrap();
    let path = format!("{DEFAULT}/hosts/self/certificate");
    client.post::<RenewAnswer>(&path, &json!({ "csr": csr })).await.unwrap();
    let key = KeyPair::generate().unwrap();
    let other = params.signed_by(&key, &ca).unwrap().pem();
    let stranger = server.client(&host.answer.ca, Some((&other, &key)));
    let refused = stranger.get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unauthenticated, "the key is that of no host");
}

#[tokio::test]
async fn the_server_renews_its_own_certificate_and_open_watches_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = short_lived(dir, 4).await;
    let host = server.host("h1").await;
    let mut watch = host.watch().await;
    watch.snapshot().await;
    let info: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    assert!(info.ca_expires > millis() + 40 * 365 * 86_400_000);
    until("the first certificate runs out", async || millis() > info.certificate_expires + 1000).await;
    // Whoever comes new believes the server still.
    let now: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    assert!(now.certificate_expires > millis(), "{now:?}");
    // The host's own has run out, too: that is shown, not enforced.
    let late = server.client(&host.answer.ca, Some((&host.answer.certificate, &host.key)));
    late.get::<Vec<Network>>(&format!("{DEFAULT}/networks")).await.unwrap();
    let text = server.admin().raw(Method::GET, "/metrics", "").await.1;
    assert!(text.contains("droveway_host_certificates_expired{environment=\"default\"} 1\n"), "{text}");
    host.lease("managed", 0).await.unwrap();
    assert!(!watch.delta().await.is_empty());
}
