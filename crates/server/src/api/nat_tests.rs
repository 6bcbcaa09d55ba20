//! What the server makes of the addresses that agents come from: requests with chosen ones, without sockets.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::body::Body;
use futures_util::StreamExt;
use http_body_util::BodyExt;
use hyper::service::Service;
use hyper::{Request, StatusCode};
use hyper_util::service::TowerToHyperService;
use model::api::{ApiError, HostView, Role};
use model::{
    Candidate, EnvironmentId, Epoch, Fingerprint, Host, HostId, Network, NetworkSpec, Object, Source, Watch,
};
use serde::de::DeserializeOwned;
use serde_json::json;
use tempfile::TempDir;

use super::hosts::reached_at;
use super::router;
use crate::app::{App, put};
use crate::ca::{Ca, Lives};
use crate::feed::{Shared, feed};
use crate::files::DataDir;
use crate::keys::{ApiKey, Keys};
use crate::limits::Limits;
use crate::secret;
use crate::serve::Peer;
use crate::state::State;
use crate::store::{SqliteStore, Store, Txn};
use crate::tls::ServerCertificate;
use crate::upkeep::Upkeep;

const BASE: &str = "/v1/environments/default";
const SERVER: &str = "192.0.2.100";

/// An API with one host in it, `h1` at 192.168.1.5, and two networks: `clear` is vxlan, `safe` is ipsec.
pub(crate) struct Api {
    pub(crate) app: Arc<App>,
    _dir: TempDir,
}

fn network(seed: u8, name: &str, driver: &str) -> Network {
    let mut spec = NetworkSpec::new(name.parse().unwrap(), "10.50.0.0/16".parse().unwrap());
    spec.driver = Some(driver.to_owned());
    spec.validate(model::NetworkId::from_random([seed; 8]), 1, 0).unwrap()
}

fn candidate(address: &str, source: Source) -> Candidate {
    Candidate { address: address.parse().unwrap(), port: None, mtu: 1400, source }
}

impl Api {
    pub(crate) async fn open() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(&dir.path().join("data")).unwrap();
        let ca = Ca::load_or_make(&data, false, None, Lives::default()).unwrap();
        let store = SqliteStore::open(&dir.path().join("store"), Epoch::from_random([1; 8])).unwrap();
        let environment = EnvironmentId::default();
        let keys = Keys(&environment);
        let host = Host {
            id: HostId::from_random([1; 8]),
            name: "h1".parse().unwrap(),
            candidates: vec![candidate("192.168.1.5", Source::Route)],
            labels: std::collections::BTreeMap::new(),
            key: Fingerprint([1; 32]).to_string(),
            joined: 0,
        };
        let mut puts = vec![
            put(keys.environment(), &json!({})).unwrap(),
            put(keys.host(&host.id), &host).unwrap(),
            put(
                keys.api_key("admin"),
                &ApiKey { hash: secret::sha256(b"key"), created: 0, role: Role::Admin, expires: None },
            )
            .unwrap(),
        ];
        for network in [network(1, "clear", "vxlan"), network(2, "safe", "ipsec")] {
            puts.push(put(keys.network(&network.id), &network).unwrap());
        }
        store.txn(Txn::new(vec![], puts)).await.unwrap();
        let store: Arc<dyn Store> = Arc::new(store);
        let shared = Arc::new(Shared::new(State::load(&*store).await.unwrap()));
        tokio::spawn(feed(store.clone(), shared.clone()));
        let certificate = Arc::new(ServerCertificate::new(ca.server(&data, &[], &[]).unwrap()).unwrap());
        let upkeep = Upkeep::open(Limits::default(), dir.path(), None, certificate).unwrap();
        let app = Arc::new(App::new(
            store,
            shared,
            ca,
            (model::DEFAULT_DOMAIN.to_owned(), crate::RETAIN),
            (String::new(), false),
            upkeep,
            crate::outbox::Outbox::new("s"),
        ));
        Self { app, _dir: dir }
    }

    async fn send(&self, request: Request<Body>) -> hyper::Response<Body> {
        TowerToHyperService::new(router(self.app.clone())).call(request).await.unwrap()
    }

    fn from(from: &str, method: &str, path: &str, body: &serde_json::Value) -> Request<Body> {
        let address = SocketAddr::new(from.parse().unwrap(), 40_000);
        let local: IpAddr = SERVER.parse().unwrap();
        let peer =
            Peer { key: Some(Fingerprint([1; 32])), address, local: Some(local), expires: None, place: None };
        let request = Request::builder().method(method).uri(format!("{BASE}{path}")).extension(peer);
        request.body(Body::from(body.to_string())).unwrap()
    }

    async fn answer<T: DeserializeOwned>(&self, request: Request<Body>) -> (StatusCode, T) {
        let answer = self.send(request).await;
        let status = answer.status();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    async fn report(&self, from: &str, candidates: &[Candidate]) -> Host {
        let body = json!({ "candidates": candidates, "version": "1" });
        let (status, host) = self.answer(Self::from(from, "PUT", "/hosts/self", &body)).await;
        assert_eq!(status, StatusCode::OK);
        host
    }

    /// The host as its own watch shows it, begun from that address.
    async fn watch(&self, from: &str) -> Host {
        let answer = self.send(Self::from(from, "GET", "/watch", &json!(null))).await;
        let mut lines = answer.into_body().into_data_stream();
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            line.extend(lines.next().await.unwrap().unwrap());
        }
        let Watch::Snapshot { objects, .. } = serde_json::from_slice(&line).unwrap() else {
            panic!("not a snapshot")
        };
        let mut hosts = objects.into_iter().filter_map(|object| match object {
            Object::Host(host) => Some(host),
            _ => None,
        });
        hosts.next().unwrap()
    }

    /// Asks, from outside.
    async fn ask(&self, path: &str, body: &serde_json::Value) -> Result<(), ApiError> {
        let request = Self::from("203.0.113.7", "POST", path, body);
        let (status, answer): (_, serde_json::Value) = self.answer(request).await;
        if status.is_success() { Ok(()) } else { Err(serde_json::from_value(answer).unwrap()) }
    }

    async fn lease(&self, network: &str) -> Result<(), ApiError> {
        self.ask("/blocks", &json!({ "network": network, "held": 0 })).await
    }

    async fn claim(&self, network: &str) -> Result<(), ApiError> {
        let endpoint = model::EndpointId::from_random([5; 8]);
        self.ask("/claims", &json!({ "network": network, "address": "10.50.0.9", "endpoint": endpoint }))
            .await
    }
}

fn outside(host: &Host) -> Option<String> {
    host.outside().map(|candidate| candidate.address.to_string())
}

#[tokio::test]
async fn a_host_that_comes_from_no_address_of_its_own_is_behind_a_nat_until_it_does() {
    let api = Api::open().await;
    let own = [candidate("192.168.1.5", Source::Route), candidate("192.168.9.5", Source::Interface)];
    let host = api.report("203.0.113.7", &own).await;
    assert!(host.behind_nat());
    assert_eq!(host.candidates[..2], own, "its own addresses come first, as it gave them");
    assert_eq!(host.candidates[2], candidate("203.0.113.7", Source::Observed), "with the MTU of the first");
    assert_eq!(outside(&api.report("203.0.113.8", &own).await).as_deref(), Some("203.0.113.8"), "one only");
    assert_eq!(outside(&api.report("192.168.9.5", &own).await), None, "another address of its own is no NAT");
}

#[tokio::test]
async fn a_watch_from_elsewhere_is_noticed_without_a_report_and_is_in_its_own_snapshot() {
    let api = Api::open().await;
    assert_eq!(outside(&api.watch("203.0.113.7").await).as_deref(), Some("203.0.113.7"));
    assert_eq!(outside(&api.watch("203.0.113.9").await).as_deref(), Some("203.0.113.9"));
    assert_eq!(outside(&api.watch("192.168.1.5").await), None);
}

#[tokio::test]
async fn an_address_that_says_nothing_is_no_nat() {
    let api = Api::open().await;
    let own = [candidate("192.168.1.5", Source::Route)];
    for near in ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.1.1", "fe80::1", SERVER] {
        assert_eq!(outside(&api.report(near, &own).await), None, "{near}");
    }
    assert_eq!(outside(&api.report("::ffff:192.168.1.5", &own).await), None, "the same address, mapped");
    let given = [candidate("198.51.100.9", Source::Given), candidate("192.168.1.5", Source::Route)];
    assert_eq!(outside(&api.report("203.0.113.7", &given).await), None, "its owner said where it is reached");
}

#[test]
fn what_an_agent_says_was_observed_is_not_believed() {
    let lie = [candidate("192.168.1.5", Source::Route), candidate("198.51.100.1", Source::Observed)];
    assert_eq!(reached_at(&lie, None), lie[..1]);
}

#[tokio::test]
async fn vxlan_is_refused_behind_a_nat_with_the_way_out_and_ipsec_is_not() {
    let api = Api::open().await;
    let own = [candidate("192.168.1.5", Source::Route)];
    api.report("203.0.113.7", &own).await;
    for refused in [api.lease("clear").await, api.claim("clear").await] {
        let error = refused.unwrap_err();
        assert_eq!(error.code, super::ErrorCode::Conflict);
        for part in ["network \"clear\" is vxlan", "host h1", "203.0.113.7", "--driver ipsec", "--address"] {
            assert!(error.message.contains(part), "{part}: {error}");
        }
    }
    api.lease("safe").await.unwrap();
    api.report("192.168.1.5", &own).await;
    api.lease("clear").await.unwrap();
    api.report("203.0.113.7", &own).await;
    api.lease("clear").await.expect("what a host holds it keeps, and may ask for again");
    api.claim("clear").await.unwrap_err();
}

#[tokio::test]
async fn people_see_where_a_host_comes_from() {
    let api = Api::open().await;
    api.report("203.0.113.7", &[candidate("192.168.1.5", Source::Route)]).await;
    let request = Request::builder().uri(format!("{BASE}/hosts/h1")).header("authorization", "Bearer key");
    let (_, view): (_, HostView) = api.answer(request.body(Body::empty()).unwrap()).await;
    assert!(view.host.behind_nat());
}
