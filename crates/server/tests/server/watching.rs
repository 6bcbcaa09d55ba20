use std::collections::BTreeSet;

use model::api::{ClaimRequest, GiveBack, ServerInfo};
use model::{Catalog, Change, EndpointId, Key, Object, Watch};
use serde_json::json;

use crate::harness::{DEFAULT, Server, Watching};

/// What an agent would hold: the catalog, and the revision it is of.
async fn catch_up(watch: &mut Watching, catalog: &mut Catalog, info: &ServerInfo) {
    let mut at = 0;
    while at < info.revision.0 {
        match watch.next().await.expect("the watch ended") {
            Watch::Snapshot { objects, revision, .. } => {
                *catalog = Catalog::from_objects(objects);
                at = revision.0;
            }
            Watch::Delta { revision, changes } => {
                for change in changes {
                    catalog.apply(change);
                }
                at = revision.0;
            }
            Watch::Heartbeat { revision } => at = revision.0,
            other @ (Watch::Servers { .. } | Watch::Prove) => panic!("nobody said so: {other:?}"),
        }
    }
}

fn keys(changes: &[Change]) -> Vec<(bool, Key)> {
    changes
        .iter()
        .map(|change| match change {
            Change::Put(object) => (true, object.key()),
            Change::Delete(key) => (false, key.clone()),
        })
        .collect()
}

#[tokio::test]
async fn a_snapshot_has_the_host_all_networks_and_nothing_of_networks_it_is_not_in() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let block = two.lease("managed", 0).await.unwrap();
    two.put(&two.endpoint(&block, "db", 2)).await.unwrap();
    let mut watch = one.watch().await;
    let Some(Watch::Snapshot { epoch, environment, host, domain, objects, revision }) = watch.next().await
    else {
        panic!("no snapshot")
    };
    let info: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    assert_eq!((epoch, revision), (info.epoch, info.revision));
    assert_eq!((environment.as_str(), &host, domain.as_str()), ("default", &one.id, "droveway.internal"));
    let catalog = Catalog::from_objects(objects);
    assert_eq!(catalog.hosts.keys().collect::<Vec<_>>(), [&one.id]);
    assert_eq!(catalog.networks.len(), 1);
    assert!(catalog.blocks.is_empty() && catalog.endpoints.is_empty());
}

#[tokio::test]
async fn a_host_sees_a_network_whole_when_it_takes_part_and_no_more_when_it_stops() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let far = two.lease("managed", 0).await.unwrap();
    let db = two.endpoint(&far, "db", 2);
    two.put(&db).await.unwrap();
    let mut watch = one.watch().await;
    watch.snapshot().await;

    let near = one.lease("managed", 0).await.unwrap();
    let network = near.network.clone();
    let mut expected = [
        (true, Key::Host(two.id.clone())),
        (true, Key::Block(network.clone(), near.cidr)),
        (true, Key::Block(network.clone(), far.cidr)),
        (true, Key::Endpoint(db.id.clone())),
    ];
    expected.sort();
    let changes = watch.delta().await;
    assert_eq!(keys(&changes), expected, "in one delta, what belongs to something after it");
    assert!(
        changes.contains(&Change::Put(Object::Block(near.clone()))),
        "with its place in the order of leases"
    );

    let named = model::Endpoint { healthy: false, ..db.clone() };
    two.put(&named).await.unwrap();
    assert_eq!(watch.delta().await, [Change::Put(Object::Endpoint(named))]);
    two.client.delete(&format!("{DEFAULT}/endpoints/{}", db.id)).await.unwrap();
    assert_eq!(watch.delta().await, [Change::Delete(Key::Endpoint(db.id.clone()))]);

    let give_back = GiveBack { network: "managed".into(), cidr: far.cidr, leased: None };
    two.client.delete_with(&format!("{DEFAULT}/blocks"), &give_back).await.unwrap();
    let gone = [(false, Key::Block(network.clone(), far.cidr)), (false, Key::Host(two.id.clone()))];
    assert_eq!(keys(&watch.delta().await), gone, "the last block of a host takes the host along");

    let request = ClaimRequest {
        network: "managed".into(),
        address: Some("10.42.0.9".parse().unwrap()),
        endpoint: db.id.clone(),
        router: false,
        retain: None,
    };
    two.client.post::<serde_json::Value>(&format!("{DEFAULT}/claims"), &request).await.unwrap();
    let claim = Key::Claim(network.clone(), request.address.unwrap());
    assert_eq!(keys(&watch.delta().await), [(true, Key::Host(two.id.clone())), (true, claim.clone())]);

    let give_back = GiveBack { network: "managed".into(), cidr: near.cidr, leased: None };
    one.client.delete_with(&format!("{DEFAULT}/blocks"), &give_back).await.unwrap();
    let gone =
        [(false, claim), (false, Key::Block(network.clone(), near.cidr)), (false, Key::Host(two.id.clone()))];
    assert_eq!(keys(&watch.delta().await), gone);

    let red = server.admin().make_network(json!({ "name": "red", "cidrs": ["10.50.0.0/16"] })).await.unwrap();
    assert_eq!(watch.delta().await, [Change::Put(Object::Network(red.clone()))]);
    server.admin().delete(&format!("{DEFAULT}/networks/red")).await.unwrap();
    assert_eq!(watch.delta().await, [Change::Delete(Key::Network(red.id))]);
}

#[tokio::test]
async fn deltas_lead_to_what_a_fresh_snapshot_says_whatever_happens_meanwhile() {
    let server = Server::start().await;
    let admin = server.admin();
    for name in ["red", "blue"] {
        admin.make_network(json!({ "name": name, "cidrs": ["10.50.0.0/16"] })).await.unwrap();
    }
    let mut hosts = Vec::new();
    for i in 0..3 {
        hosts.push(server.host(&format!("h{i}")).await);
    }
    let mut watch = hosts[0].watch().await;
    let mut catalog = Catalog::default();
    // A fixed, lively sequence: leases, endpoints, departures and returns, in all three networks.
    let mut seed = 7u32;
    let mut next = |n: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % n
    };
    for round in 0..120 {
        let host = &hosts[next(3) as usize];
        let network = ["managed", "red", "blue"][next(3) as usize];
        match next(4) {
            0 | 1 => {
                let block = host.lease(network, 0).await.unwrap();
                host.put(&host.endpoint(&block, "c", 2 + next(8))).await.unwrap();
            }
            2 => {
                let block = host.lease(network, 0).await.unwrap();
                let id = host.endpoint(&block, "c", 2 + next(8)).id;
                host.client.delete(&format!("{DEFAULT}/endpoints/{id}")).await.unwrap();
            }
            _ => {
                let block = host.lease(network, 0).await.unwrap();
                let give_back = GiveBack { network: network.into(), cidr: block.cidr, leased: None };
                // Refused while an endpoint is in it: that is part of the life here.
                let _ = host.client.delete_with(&format!("{DEFAULT}/blocks"), &give_back).await;
            }
        }
        if round % 10 == 9 {
            let info: ServerInfo = admin.get("/v1/info").await.unwrap();
            catch_up(&mut watch, &mut catalog, &info).await;
            let fresh = Catalog::from_objects(hosts[0].watch().await.snapshot().await);
            assert_eq!(catalog, fresh, "after {round} rounds");
        }
    }
    assert_eq!(catalog.networks.len(), 3);
    assert!(!catalog.endpoints.is_empty());
}

#[tokio::test]
async fn an_agent_resumes_with_the_changes_since_and_one_of_another_epoch_with_a_snapshot() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let info: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    let mut watch = host.watch_from(Some((&info.epoch, info.revision))).await;
    assert!(watch.delta().await.is_empty());
    let block = host.lease("managed", 0).await.unwrap();
    assert_eq!(watch.delta().await, [Change::Put(Object::Block(block.clone()))]);
    let mut behind = host.watch_from(Some((&info.epoch, info.revision))).await;
    let changes = behind.delta().await;
    assert!(changes.contains(&Change::Put(Object::Block(block))), "{changes:?}");
    let now: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    let other = model::Epoch::from_random([5; 8]);
    let mut foreign = host.watch_from(Some((&other, now.revision))).await;
    assert_eq!(foreign.snapshot().await.len(), 3);
}

#[tokio::test]
async fn resuming_from_any_moment_leads_to_what_a_fresh_snapshot_says() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    let mut moments: Vec<(model::Epoch, model::Revision, Catalog)> = Vec::new();
    let mut moment = async || {
        let Some(Watch::Snapshot { epoch, revision, objects, .. }) = one.watch().await.next().await else {
            panic!("no snapshot")
        };
        moments.push((epoch, revision, Catalog::from_objects(objects)));
        moments.clone()
    };
    let give_back = async |host: &crate::harness::Agent, block: &model::Block| {
        let body = GiveBack { network: block.network.to_string(), cidr: block.cidr, leased: None };
        host.client.delete_with(&format!("{DEFAULT}/blocks"), &body).await.unwrap();
    };
    moment().await;
    let far = two.lease("managed", 0).await.unwrap();
    let db = two.endpoint(&far, "db", 2);
    two.put(&db).await.unwrap();
    moment().await;
    let near = one.lease("managed", 0).await.unwrap();
    moment().await;
    two.client.delete(&format!("{DEFAULT}/endpoints/{}", db.id)).await.unwrap();
    give_back(&two, &far).await;
    moment().await;
    let three = server.host("h3").await;
    three.lease("managed", 0).await.unwrap();
    moment().await;
    server.admin().delete(&format!("{DEFAULT}/hosts/h3")).await.unwrap();
    moment().await;
    give_back(&one, &near).await;
    moment().await;
    one.lease("managed", 0).await.unwrap();
    two.lease("managed", 0).await.unwrap();
    let all = moment().await;
    let (_, _, now) = all.last().unwrap();
    for (epoch, revision, mut catalog) in all.clone() {
        let mut watch = one.watch_from(Some((&epoch, revision))).await;
        for change in watch.delta().await {
            catalog.apply(change);
        }
        assert_eq!(catalog, *now, "from {revision}");
    }
}

#[tokio::test]
async fn a_revision_that_never_was_is_refused_by_name() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let info: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    let path = format!("{DEFAULT}/watch?epoch={}&revision={}", info.epoch, info.revision.0 + 1000);
    let error = host.client.get::<serde_json::Value>(&path).await.unwrap_err();
    assert_eq!(error.code, model::api::ErrorCode::Conflict);
    assert!(error.message.contains("droveway server restore"), "{error}");
    let path = format!("{DEFAULT}/watch?epoch={}&revision=-7", info.epoch);
    let error = host.client.get::<serde_json::Value>(&path).await.unwrap_err();
    assert_eq!(error.code, model::api::ErrorCode::Invalid);
}

#[tokio::test]
async fn a_watch_is_compressed_for_those_who_take_it_and_every_message_comes_at_once() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let block = host.lease("managed", 0).await.unwrap();
    for n in 2..60 {
        host.put(&host.endpoint(&block, "some-name", n)).await.unwrap();
    }
    let request = host.client.request(reqwest::Method::GET, &format!("{DEFAULT}/watch"));
    let mut response = request.header("Accept-Encoding", "br, gzip;q=0.5").send().await.unwrap();
    assert_eq!(response.headers()["content-encoding"], "gzip");
    let (mut packed, mut text) = (0, flate2::write::MultiGzDecoder::new(Vec::new()));
    let mut lines = async |count: usize| {
        while text.get_ref().split(|byte| *byte == b'\n').count() <= count {
            let chunk = response.chunk().await.unwrap().unwrap();
            packed += chunk.len();
            std::io::Write::write_all(&mut text, &chunk).unwrap();
            std::io::Write::flush(&mut text).unwrap();
        }
        (packed, String::from_utf8(text.get_ref().clone()).unwrap())
    };
    let (packed, text) = lines(1).await;
    let Watch::Snapshot { objects, .. } = serde_json::from_str(text.trim()).unwrap() else {
        panic!("{text}")
    };
    assert_eq!(objects.len(), 3 + 58);
    assert!(packed * 4 < text.len(), "{packed} bytes for {}", text.len());
    // No other message follows that would push this one out.
    host.put(&host.endpoint(&block, "late", 61)).await.unwrap();
    let (_, text) = lines(2).await;
    assert!(text.lines().nth(1).unwrap().contains("late"));
}

#[tokio::test]
async fn a_quiet_watch_says_that_it_lives() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let mut watch = host.watch().await;
    watch.snapshot().await;
    let info: ServerInfo = server.nobody().get("/v1/info").await.unwrap();
    assert_eq!(watch.next().await, Some(Watch::Heartbeat { revision: info.revision }));
}

#[tokio::test]
async fn a_reader_that_sleeps_gets_one_large_delta_in_place_of_many() {
    let server = Server::start().await;
    let (one, two) = (server.host("h1").await, server.host("h2").await);
    one.lease("managed", 0).await.unwrap();
    let block = two.lease("managed", 0).await.unwrap();
    let mut watch = one.watch().await;
    watch.snapshot().await;
    let mut ids: BTreeSet<EndpointId> = BTreeSet::new();
    let puts = (2..60).map(|n| two.endpoint(&block, "c", n)).map(|endpoint| {
        ids.insert(endpoint.id.clone());
        let two = &two;
        async move { two.put(&endpoint).await.unwrap() }
    });
    futures_util::future::join_all(puts.collect::<Vec<_>>()).await;
    let mut messages = 0;
    while !ids.is_empty() {
        messages += 1;
        for (put, key) in keys(&watch.delta().await) {
            assert!(put);
            if let Key::Endpoint(id) = key {
                ids.remove(&id);
            }
        }
    }
    assert!(messages <= 58, "never more messages than changes: {messages}");
}

#[tokio::test]
async fn a_server_that_stops_ends_its_watches_and_leaves_the_directory_to_the_next() {
    let server = Server::start().await;
    let host = server.host("h1").await;
    let mut watch = host.watch().await;
    watch.snapshot().await;
    let (dir, end) = tokio::join!(server.stop(), watch.next());
    assert_eq!(end, None);
    let server = Server::start_in(dir).await;
    let again = server.client(&host.answer.ca, Some((&host.answer.certificate, &host.key)));
    let agent = crate::harness::Agent { client: again, ..host };
    assert_eq!(agent.watch().await.snapshot().await.len(), 2);
}
