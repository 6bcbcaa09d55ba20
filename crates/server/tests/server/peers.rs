use model::api::{ApiError, ErrorCode, HostReport, HostRoute};
use model::{Change, Key, Object, Peer, PeerProof};
use serde_json::{Value, json};

use crate::harness::{Agent, Client, DEFAULT, Server, candidate};

const SECRET: &str = "a secret that is long enough";

fn spec(name: &str) -> Value {
    json!({
        "name": name, "network": "safe", "address": "198.51.100.1",
        "proof": { "by": "psk", "secret": SECRET }, "remote_cidrs": ["192.168.7.0/24"],
    })
}

/// `spec` with these fields instead.
fn with(name: &str, fields: Value) -> Value {
    let mut spec = spec(name);
    let (Value::Object(all), Value::Object(fields)) = (&mut spec, fields) else { panic!("not objects") };
    all.extend(fields);
    spec
}

async fn make(client: &Client, spec: &Value) -> Result<Peer, ApiError> {
    client.post(&format!("{DEFAULT}/peers"), spec).await
}

async fn start() -> (Server, Agent, Agent) {
    let server = Server::start().await;
    let safe = json!({ "name": "safe", "cidrs": ["10.50.0.0/16"], "driver": "ipsec" });
    server.admin().make_network(safe).await.unwrap();
    let clear = json!({ "name": "clear", "cidrs": ["10.51.0.0/16"], "driver": "vxlan" });
    server.admin().make_network(clear).await.unwrap();
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    (server, one, two)
}

#[tokio::test]
async fn a_peer_is_made_looked_at_and_removed_and_its_secret_is_never_shown() {
    let (server, one, _) = start().await;
    let admin = server.admin();
    let made =
        make(&admin, &with("office", json!({ "host": "h1", "identity": "office.example" }))).await.unwrap();
    assert_eq!((&made.host, made.proof.clone()), (&one.id, PeerProof::Psk { secret: None }));
    let (status, text) = admin.raw(reqwest::Method::GET, &format!("{DEFAULT}/peers"), "").await;
    assert!(status.is_success() && text.contains("office") && !text.contains("secret"), "{text}");
    for id in ["office", made.id.as_str()] {
        assert_eq!(admin.get::<Peer>(&format!("{DEFAULT}/peers/{id}")).await.unwrap(), made);
    }
    let error = one.client.get::<Value>(&format!("{DEFAULT}/peers")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Forbidden, "agents learn of peers by the watch");
    admin.delete(&format!("{DEFAULT}/peers/office")).await.unwrap();
    let error = admin.delete(&format!("{DEFAULT}/peers/office")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    make(&admin, &with("office", json!({ "host": "h1" }))).await.expect("the name is free again");
}

#[tokio::test]
async fn the_secret_goes_to_the_gateway_alone_and_the_gateway_takes_part_without_a_block() {
    let (server, one, two) = start().await;
    two.lease("safe", 0).await.unwrap();
    let (mut at_one, mut at_two) = (one.watch().await, two.watch().await);
    at_one.snapshot().await;
    at_two.snapshot().await;
    let made = make(&server.admin(), &with("office", json!({ "host": "h1" }))).await.unwrap();
    let peer_of = |changes: &[Change]| {
        changes
            .iter()
            .find_map(|change| match change {
                Change::Put(Object::Peer(peer)) => Some(peer.clone()),
                _ => None,
            })
            .unwrap()
    };
    let secret = PeerProof::Psk { secret: Some(SECRET.to_owned()) };
    let at_gateway = at_one.delta().await;
    assert_eq!(peer_of(&at_gateway), Peer { proof: secret.clone(), ..made.clone() });
    let keys: Vec<Key> = at_gateway
        .iter()
        .map(|change| match change {
            Change::Put(object) => object.key(),
            Change::Delete(key) => panic!("{key:?} is gone"),
        })
        .collect();
    assert!(keys.contains(&Key::Host(two.id.clone())), "the network is its business now: {keys:?}");
    assert!(keys.iter().any(|key| matches!(key, Key::Block(..))), "{keys:?}");
    let elsewhere = at_two.delta().await;
    assert_eq!(peer_of(&elsewhere), made, "without the secret");
    let sees = |change: &Change| matches!(change, Change::Put(Object::Host(host)) if host.id == one.id);
    assert!(elsewhere.iter().any(sees), "{elsewhere:?}");

    let snapshot = one.watch().await.snapshot().await;
    assert!(snapshot.contains(&Object::Peer(Peer { proof: secret, ..made.clone() })));
    let snapshot = two.watch().await.snapshot().await;
    assert!(snapshot.contains(&Object::Peer(made.clone())));
    let outsider = server.host("h3").await;
    let snapshot = outsider.watch().await.snapshot().await;
    assert!(!snapshot.iter().any(|object| matches!(object, Object::Peer(_))), "it is not in the network");

    server.admin().delete(&format!("{DEFAULT}/peers/office")).await.unwrap();
    assert!(at_one.delta().await.contains(&Change::Delete(Key::Peer(made.id.clone()))));
    let gone = at_two.delta().await;
    assert!(gone.contains(&Change::Delete(Key::Peer(made.id))), "{gone:?}");
    assert!(gone.contains(&Change::Delete(Key::Host(one.id.clone()))), "h1 takes part no more: {gone:?}");
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_the_remedy() {
    let (server, one, _) = start().await;
    let admin = server.admin();
    make(&admin, &with("office", json!({ "host": "h1" }))).await.unwrap();
    let route = HostRoute { cidr: "10.60.8.0/24".parse().unwrap(), device: "eth1".into() };
    let default = HostRoute { cidr: "0.0.0.0/0".parse().unwrap(), device: "eth0".into() };
    let report =
        HostReport { candidates: vec![candidate(9)], routes: vec![default, route], version: "1".into() };
    one.client.put::<Value>(&format!("{DEFAULT}/hosts/self"), &report).await.unwrap();
    let free = json!({ "host": "h2", "address": "198.51.100.2", "remote_cidrs": ["192.168.8.0/24"] });
    let but = |fields: Value| {
        let (Value::Object(mut all), Value::Object(fields)) = (free.clone(), fields) else { panic!() };
        all.extend(fields);
        with("branch", Value::Object(all))
    };
    let cases = [
        (but(json!({ "host": null })), ErrorCode::Invalid, "Give --host with one of h1, h2"),
        (but(json!({ "host": "h9" })), ErrorCode::NotFound, "droveway host ls"),
        (but(json!({ "network": "none" })), ErrorCode::NotFound, "droveway network ls"),
        (but(json!({ "network": "clear" })), ErrorCode::Invalid, "\"clear\" is vxlan"),
        (but(json!({ "name": "office" })), ErrorCode::Conflict, "there already"),
        (but(json!({ "name": "h2" })), ErrorCode::Conflict, "a host is called so"),
        (but(json!({ "name": "h-abcdefghij" })), ErrorCode::Invalid, "looks like an id"),
        (
            but(json!({ "remote_cidrs": ["10.50.8.0/24"] })),
            ErrorCode::Invalid,
            "the network's own 10.50.0.0/16",
        ),
        (but(json!({ "remote_cidrs": ["192.168.0.0/16"] })), ErrorCode::Conflict, "behind peer \"office\""),
        (
            but(json!({ "remote_cidrs": ["10.60.0.0/16"] })),
            ErrorCode::Conflict,
            "overlaps route 10.60.8.0/24 dev eth1 on host h1; choose another --remote-cidr",
        ),
        (but(json!({ "address": "198.51.100.1", "host": "h1" })), ErrorCode::Conflict, "as peer \"office\""),
        (but(json!({ "address": "192.0.2.9" })), ErrorCode::Conflict, "is host \"h1\""),
        (but(json!({ "proof": { "by": "psk", "secret": "short" } })), ErrorCode::Invalid, "openssl rand"),
        (but(json!({ "proof": { "by": "ca", "ca": "no PEM" } })), ErrorCode::Invalid, "PEM"),
    ];
    for (spec, code, expected) in cases {
        let error = make(&admin, &spec).await.unwrap_err();
        assert_eq!(error.code, code, "{spec}: {error}");
        assert!(error.message.contains(expected), "{spec}: {error}");
    }
    let ca = server.file("ca.pem");
    make(&admin, &but(json!({ "proof": { "by": "ca", "ca": ca } }))).await.expect("all else is well");
    let token = server.token(&model::api::TokenRequest { uses: None, ttl_seconds: None }).await.token;
    let error = server.join("office", &token, &[]).await.err().unwrap();
    assert!(error.message.contains("a foreign peer is called so"), "{error}");
}

#[tokio::test]
async fn a_body_that_cannot_be_understood_is_refused_without_a_word_of_it() {
    let (server, ..) = start().await;
    for body in [
        with("office", json!({ "proof": "my secret text" })),
        with("office", json!({ "proof": { "by": "my secret text" } })),
        with("office", json!({ "my secret text": 1 })),
    ] {
        let error = make(&server.admin(), &body).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Invalid);
        assert!(error.message.contains("PeerSpec") && !error.message.contains("my secret"), "{error}");
    }
}

#[tokio::test]
async fn the_only_host_is_the_gateway_and_neither_it_nor_the_network_goes_before_the_peer() {
    let server = Server::start().await;
    let admin = server.admin();
    let safe = json!({ "name": "safe", "cidrs": ["10.50.0.0/16"], "driver": "ipsec" });
    admin.make_network(safe).await.unwrap();
    let error = make(&admin, &spec("office")).await.unwrap_err();
    assert!(error.message.contains("droveway token create"), "{error}");
    let host = server.host("h1").await;
    assert_eq!(make(&admin, &spec("office")).await.unwrap().host, host.id);
    for (path, whose) in
        [("hosts/h1", "host \"h1\" speaks to"), ("networks/safe", "network \"safe\" is joined to")]
    {
        let error = admin.delete(&format!("{DEFAULT}/{path}")).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InUse);
        let rest = "foreign peer office; remove it first with `droveway peer rm office`";
        assert_eq!(error.message, format!("{whose} {rest}"));
    }
    admin.delete(&format!("{DEFAULT}/peers/office")).await.unwrap();
    admin.delete(&format!("{DEFAULT}/networks/safe")).await.unwrap();
    admin.delete(&format!("{DEFAULT}/hosts/h1")).await.unwrap();
}

#[tokio::test]
async fn of_peers_made_at_once_that_overlap_only_one_is_there() {
    let (server, ..) = start().await;
    let admin = server.admin();
    let specs: Vec<Value> = (0..6)
        .map(|i| with(&format!("p{i}"), json!({ "host": "h1", "address": format!("198.51.100.{}", i + 1) })))
        .collect();
    let made = futures_util::future::join_all(specs.iter().map(|spec| make(&admin, spec))).await;
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1, "{made:?}");
}
