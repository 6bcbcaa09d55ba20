use model::api::{ApiError, ErrorCode, HostReport, HostRoute, HostView};
use model::{Candidate, Driver, Network};
use serde_json::json;

use crate::harness::{Client, DEFAULT, Server, candidate};

async fn names(client: &Client) -> Vec<String> {
    let networks: Vec<Network> = client.get(&format!("{DEFAULT}/networks")).await.unwrap();
    networks.iter().map(|network| network.name.to_string()).collect()
}

#[tokio::test]
async fn a_network_is_made_looked_at_and_removed() {
    let server = Server::start().await;
    let admin = server.admin();
    let red = admin.make_network(json!({ "name": "red", "cidrs": ["10.50.0.0/16"] })).await.unwrap();
    assert_eq!(red.driver, Driver::Ipsec, "encrypted unless someone says otherwise");
    let clear = json!({ "name": "clear", "cidrs": ["10.52.0.0/16"], "driver": "vxlan" });
    let clear = admin.make_network(clear).await.unwrap();
    assert_eq!(clear.driver, Driver::Vxlan { vni: 1, port: 4789 });
    let twin = json!({
        "name": "twin", "cidrs": ["10.50.0.0/16"], "internal": true, "mtu": 1400, "driver": "vxlan", "port": 9999,
    });
    let twin = admin.make_network(twin).await.unwrap();
    assert_eq!(
        twin.driver,
        Driver::Vxlan { vni: 1, port: 9999 },
        "networks are isolated: equal pools are fine"
    );
    assert_eq!(names(&admin).await, ["clear", "managed", "red", "twin"]);
    for id in ["red", red.id.as_str()] {
        assert_eq!(admin.get::<Network>(&format!("{DEFAULT}/networks/{id}")).await.unwrap(), red);
    }
    let host = server.host("h1").await;
    host.lease("red", 0).await.unwrap();
    admin.delete(&format!("{DEFAULT}/networks/red")).await.unwrap();
    admin.delete(&format!("{DEFAULT}/networks/{}", twin.id)).await.unwrap();
    admin.delete(&format!("{DEFAULT}/networks/managed")).await.unwrap();
    admin.delete(&format!("{DEFAULT}/networks/clear")).await.unwrap();
    assert!(names(&admin).await.is_empty());
    assert!(admin.get::<Vec<serde_json::Value>>(&format!("{DEFAULT}/blocks")).await.unwrap().is_empty());
    let again = admin
        .make_network(json!({ "name": "red", "cidrs": ["10.51.0.0/16"], "driver": "vxlan" }))
        .await
        .unwrap();
    assert_ne!(again.id, red.id);
    assert_eq!(again.driver, Driver::Vxlan { vni: 1, port: 4789 }, "a name and a VNI are free again");
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_the_remedy_and_nothing_changes() {
    let server = Server::start().await;
    let admin = server.admin();
    let clear = json!({ "name": "clear", "cidrs": ["10.52.0.0/16"], "driver": "vxlan" });
    admin.make_network(clear).await.unwrap();
    let host = server.host("h2").await;
    let route = HostRoute { cidr: "10.60.8.0/24".parse().unwrap(), device: "eth1".into() };
    let default = HostRoute { cidr: "0.0.0.0/0".parse().unwrap(), device: "eth0".into() };
    let report = HostReport {
        candidates: vec![Candidate { port: Some(4501), ..candidate(7) }],
        routes: vec![default, route],
        version: "0.1.0".into(),
    };
    host.client.put::<serde_json::Value>(&format!("{DEFAULT}/hosts/self"), &report).await.unwrap();
    let before: model::api::ServerInfo = admin.get("/v1/info").await.unwrap();
    let red = |cidr: &str| json!({ "name": "red", "cidrs": [cidr] });
    let cases = [
        (
            red("10.60.0.0/16"),
            ErrorCode::Conflict,
            "network \"red\": pool 10.60.0.0/16 overlaps route 10.60.8.0/24 dev eth1 on host h2; choose another --subnet",
        ),
        (red("10.60.8.0/22"), ErrorCode::Conflict, "overlaps route"),
        (red("10.43.3.0/16"), ErrorCode::Invalid, "did you mean 10.43.0.0/16"),
        (red("10.43.0.0/25"), ErrorCode::Invalid, "room for"),
        (red("127.0.0.0/16"), ErrorCode::Invalid, "loopback"),
        (red("10.43.0.0/40"), ErrorCode::Invalid, "line 1 column"),
        (red("ten.dot.nine"), ErrorCode::Invalid, "line 1 column"),
        (red("fd00::/64"), ErrorCode::Invalid, "IPv4"),
        (json!({ "name": "red", "cidrs": [] }), ErrorCode::Invalid, "exactly one"),
        (json!({ "name": "red" }), ErrorCode::Invalid, "cidrs"),
        (
            json!({ "name": "no good", "cidrs": ["10.43.0.0/16"] }),
            ErrorCode::Invalid,
            "begin with a letter or digit",
        ),
        (
            json!({ "name": "n-abcdefghij", "cidrs": ["10.43.0.0/16"] }),
            ErrorCode::Invalid,
            "looks like an id",
        ),
        (json!({ "name": "managed", "cidrs": ["10.43.0.0/16"] }), ErrorCode::Conflict, "choose another name"),
        (
            json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "driver": "vxlan", "vni": 1 }),
            ErrorCode::Conflict,
            "choose another --vni",
        ),
        (
            json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "driver": "vxlan", "vni": 0 }),
            ErrorCode::Invalid,
            "VNI",
        ),
        (json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "driver": "gre" }), ErrorCode::Invalid, "vxlan"),
        (
            json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "driver": "ipsec", "vni": 7 }),
            ErrorCode::Invalid,
            "--vni belongs to --driver vxlan",
        ),
        (
            json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "driver": "ipsec", "port": 4500 }),
            ErrorCode::Invalid,
            "--tunnel-port",
        ),
        (
            json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "driver": "vxlan", "port": 4500 }),
            ErrorCode::Invalid,
            "UDP port 4500 is that of encrypted tunnels; choose another --port",
        ),
        (
            json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "driver": "vxlan", "port": 4501 }),
            ErrorCode::Conflict,
            "UDP port 4501 is that of the tunnels of host h2",
        ),
        (json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "mtu": 100 }), ErrorCode::Invalid, "576"),
        (json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "colour": "red" }), ErrorCode::Invalid, "colour"),
        (
            json!({ "name": "red", "cidrs": ["10.43.0.0/16"], "labels": { "": "x" } }),
            ErrorCode::Invalid,
            "label",
        ),
    ];
    for (spec, code, expected) in cases {
        let error = admin.make_network(spec.clone()).await.unwrap_err();
        assert_eq!(error.code, code, "{spec}: {error}");
        assert!(error.message.contains(expected), "{spec}: {error}");
    }
    for path in ["networks/none", "networks/n-abcdefghij", "hosts/none", "endpoints/e-abcdefghij"] {
        let error = admin.get::<serde_json::Value>(&format!("{DEFAULT}/{path}")).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
        assert!(error.message.contains("ls` lists"), "{error}");
    }
    let error = admin.delete(&format!("{DEFAULT}/networks/none")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    let after: model::api::ServerInfo = admin.get("/v1/info").await.unwrap();
    assert_eq!(after.revision, before.revision);
}

#[tokio::test]
async fn a_network_in_use_is_not_removed_and_its_users_are_named() {
    let server = Server::start().await;
    let admin = server.admin();
    admin.make_network(json!({ "name": "red", "cidrs": ["10.50.0.0/16"] })).await.unwrap();
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let web = one.endpoint(&one.lease("red", 0).await.unwrap(), "web", 2);
    let db = two.endpoint(&two.lease("red", 0).await.unwrap(), "db", 2);
    one.put(&web).await.unwrap();
    two.put(&db).await.unwrap();
    let error = admin.delete(&format!("{DEFAULT}/networks/red")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InUse);
    assert!(error.message.starts_with("network \"red\" is in use by 2 endpoints: "), "{error}");
    assert!(error.message.contains("web (h1)") && error.message.contains("db (h2)"), "{error}");
    assert!(error.message.ends_with("; remove them first"), "{error}");
    one.client.delete(&format!("{DEFAULT}/endpoints/{}", web.id)).await.unwrap();
    two.client.delete(&format!("{DEFAULT}/endpoints/{}", db.id)).await.unwrap();
    admin.delete(&format!("{DEFAULT}/networks/red")).await.unwrap();
}

#[tokio::test]
async fn only_one_of_two_that_make_the_same_network_at_once_gets_it() {
    let server = Server::start().await;
    let admin = server.admin();
    let makes = (0..8)
        .map(|i| admin.make_network(json!({ "name": "red", "cidrs": [format!("10.{}.0.0/16", 50 + i)] })));
    let made: Vec<Result<Network, ApiError>> = futures_util::future::join_all(makes).await;
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1);
    let makes = (0..8).map(|i| {
        admin.make_network(json!({ "name": format!("n{i}"), "cidrs": ["10.50.0.0/16"], "driver": "vxlan" }))
    });
    let mut vnis: Vec<u32> = futures_util::future::join_all(makes)
        .await
        .into_iter()
        .filter_map(|made| match made.unwrap().driver {
            Driver::Ipsec => None,
            Driver::Vxlan { vni, .. } => Some(vni),
        })
        .collect();
    vnis.sort_unstable();
    assert_eq!(vnis, (1..9).collect::<Vec<u32>>());
}

#[tokio::test]
async fn labels_are_set_and_removed_and_candidates_follow_the_report() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let path = format!("{DEFAULT}/hosts/h1");
    let view: HostView =
        server.admin().patch(&path, &json!({ "labels": { "rack": "7", "disk": "ssd" } })).await.unwrap();
    assert_eq!(view.host.labels["rack"], "7");
    let view: HostView = server.admin().patch(&path, &json!({ "labels": { "rack": null } })).await.unwrap();
    assert_eq!(view.host.labels.keys().collect::<Vec<_>>(), ["disk"]);
    let report = json!({ "candidates": [candidate(9)], "version": "0.1.0" });
    let own = format!("{DEFAULT}/hosts/self");
    host.client.put::<serde_json::Value>(&own, &report).await.unwrap();
    let before: model::api::ServerInfo = server.admin().get("/v1/info").await.unwrap();
    host.client.put::<serde_json::Value>(&own, &report).await.unwrap();
    let after: model::api::ServerInfo = server.admin().get("/v1/info").await.unwrap();
    assert_eq!(before.revision, after.revision, "the same report again changes nothing");
    let view: HostView = server.admin().get(&path).await.unwrap();
    assert_eq!((view.host.candidates, view.version.as_deref()), (vec![candidate(9)], Some("0.1.0")));
    let routes =
        json!({ "candidates": [], "version": "1", "routes": [{ "cidr": "10.42.0.0/24", "device": "eth1" }] });
    host.client
        .put::<serde_json::Value>(&own, &routes)
        .await
        .expect("a colliding route is kept, not refused");
    let bad =
        json!({ "candidates": [{ "address": "0.0.0.0", "mtu": 1500, "source": "given" }], "version": "1" });
    let error = host.client.put::<serde_json::Value>(&own, &bad).await.unwrap_err();
    assert!(error.message.contains("0.0.0.0"), "{error}");
}
