//! The plugin's protocol against bodies as Docker 20.10 sends them, and the follower against an engine in the test. The
//! reconciler's part is played by a thread.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Json;
use axum::extract::{Path as Segment, State as Shared};
use axum::response::IntoResponse;
use axum::routing::{any, delete, get, post};
use model::agent_api::DockerStatus;
use model::api::{ApiError, ErrorCode};
use model::{
    Catalog, Endpoint, EndpointKind, HostId, Mac, Name, Network, NetworkId, NetworkSpec, Object,
    PublishedPort,
};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::state::State;
use super::{Config, plugin};
use crate::control::tests::Blocks;
use crate::control::{Command, Description, Handed, LocalEndpoint, Reply};
use crate::{Control, View};

/// What the fake reconciler holds.
#[derive(Default)]
pub(super) struct World {
    pub(super) endpoints: BTreeMap<String, LocalEndpoint>,
    pub(super) reserved: BTreeSet<(NetworkId, IpAddr)>,
    pub(super) described: BTreeMap<String, Description>,
    pub(super) busy_ports: BTreeSet<u16>,
    /// Makes the device that Docker is to move.
    pub(super) device: Option<fn(&str)>,
}

/// A control whose other side is `world`, and the sender of its views.
pub(super) fn control(world: Arc<Mutex<World>>, view: View) -> (Control, watch::Sender<Arc<View>>) {
    let (commands, inbox) = mpsc::channel();
    let (views, seen) = watch::channel(Arc::new(view));
    std::thread::spawn(move || {
        while let Ok(command) = inbox.recv() {
            world.lock().unwrap().take(command);
        }
    });
    let full = || Err(ApiError::new(ErrorCode::Unavailable, "no server in this test"));
    (Control::new(commands, Arc::new(|| {}), seen, Arc::new(Blocks(full))), views)
}

fn answer<T>(reply: Reply<T>, result: Result<T, ApiError>) {
    drop(reply.send(result.map_err(Into::into)));
}

impl World {
    fn used(&self, network: &NetworkId, address: IpAddr) -> bool {
        let mut all = self.endpoints.values();
        all.any(|local| local.endpoint.network == *network && local.endpoint.addresses.contains(&address))
    }

    fn take(&mut self, command: Command) {
        let conflict = |what: String| ApiError::new(ErrorCode::Conflict, what);
        match command {
            Command::Reserve { network, wish, reply } => {
                let taken =
                    |a: IpAddr| self.reserved.contains(&(network.clone(), a)) || self.used(&network, a);
                let second = if network == NetworkId::from_random([2; 8]) { 43 } else { 42 };
                let mut pool = (10..250u8).map(|last| IpAddr::from([10, second, 16, last]));
                let found = wish.or_else(|| pool.find(|a| !taken(*a)));
                let result = found.ok_or_else(|| conflict("the pool is full".to_owned()));
                if let Ok(address) = result
                    && !self.used(&network, address)
                {
                    self.reserved.insert((network, address));
                }
                answer(reply, result);
            }
            Command::Unreserve { network, address, reply } => {
                self.reserved.remove(&(network, address));
                answer(reply, Ok(()));
            }
            Command::Create { network, foreign, address, mac, reply } => {
                if !self.reserved.remove(&(network.clone(), address)) {
                    return answer(reply, Err(conflict(format!("{address} is not reserved"))));
                }
                let endpoint = endpoint(&network, address, mac);
                let local = LocalEndpoint {
                    endpoint: endpoint.clone(),
                    foreign: Some(foreign.clone()),
                    sandbox: None,
                };
                self.endpoints.insert(foreign, local);
                answer(reply, Ok(endpoint));
            }
            Command::Join { foreign, sandbox, reply } => {
                let Some(local) = self.endpoints.get_mut(&foreign) else {
                    return answer(reply, Err(ApiError::new(ErrorCode::NotFound, "no such endpoint")));
                };
                local.sandbox = Some(sandbox);
                let ifname = format!("dw{}", local.endpoint.id.short());
                if let Some(device) = self.device {
                    device(&ifname);
                }
                answer(
                    reply,
                    Ok(Handed {
                        ifname,
                        gateway: Some([10, 42, 0, 1].into()),
                        on_link: vec!["169.254.169.250/32".parse().unwrap()],
                    }),
                );
            }
            Command::Leave { foreign, reply } => {
                if let Some(local) = self.endpoints.get_mut(&foreign) {
                    local.sandbox = None;
                }
                answer(reply, Ok(()));
            }
            Command::Delete { foreign, reply } => {
                if let Some(local) = self.endpoints.remove(&foreign) {
                    self.reserved.insert((local.endpoint.network, local.endpoint.addresses[0]));
                }
                answer(reply, Ok(()));
            }
            Command::Publish { foreign, ports, reply } => {
                let busy = ports.iter().find(|port| self.busy_ports.contains(&port.host_port));
                let result = match (busy, self.endpoints.get_mut(&foreign)) {
                    (Some(busy), _) => Err(conflict(format!("host port {} is in use", busy.host_port))),
                    (None, None) => Err(ApiError::new(ErrorCode::NotFound, "no such endpoint")),
                    (None, Some(local)) => {
                        local.endpoint.ports.clone_from(&ports);
                        Ok(ports)
                    }
                };
                answer(reply, result);
            }
            Command::Describe { foreign, description, reply } => {
                let Some(local) = self.endpoints.get_mut(&foreign) else {
                    return answer(reply, Err(ApiError::new(ErrorCode::NotFound, "no such endpoint")));
                };
                local.endpoint.stack.clone_from(&description.stack);
                local.endpoint.service.clone_from(&description.service);
                self.described.insert(foreign, *description);
                answer(reply, Ok(()));
            }
            Command::List { reply } => answer(reply, Ok(self.endpoints.values().cloned().collect())),
            Command::Reservations { reply } => answer(reply, Ok(self.reserved.iter().cloned().collect())),
            Command::Attach { .. }
            | Command::Detach { .. }
            | Command::Leased { .. }
            | Command::Claimed { .. }
            | Command::Watch(_)
            | Command::Underlay(_)
            | Command::Certified { .. }
            | Command::Begin { .. }
            | Command::Begun { .. }
            | Command::Settled
            | Command::Counts { .. }
            | Command::Takes { .. }
            | Command::Copied { .. }
            | Command::EngineFirewall
            | Command::LetGo { .. }
            | Command::Consent { .. }
            | Command::Leaving { .. }
            | Command::Books { .. }
            | Command::Stop => {}
        }
    }
}

fn endpoint(network: &NetworkId, address: IpAddr, mac: Option<Mac>) -> Endpoint {
    Endpoint {
        id: crate::random_endpoint_id(),
        network: network.clone(),
        host: host(),
        name: None,
        stack: None,
        service: None,
        aliases: vec![],
        addresses: vec![address],
        mac: mac.unwrap_or(Mac([2, 0, 0, 0, 0, 7])),
        kind: EndpointKind::Docker,
        container: None,
        labels: BTreeMap::new(),
        ports: vec![],
        healthy: true,
        created: 0,
    }
}

fn host() -> HostId {
    HostId::from_random([9; 8])
}

pub(super) fn network(name: &str, cidr: &str, id: u8) -> Network {
    let spec = NetworkSpec::new(name.parse().unwrap(), cidr.parse().unwrap());
    spec.validate(NetworkId::from_random([id; 8]), 7, 0).unwrap()
}

pub(super) fn view(networks: impl IntoIterator<Item = Network>) -> View {
    View {
        host: host(),
        host_name: "h1".parse().unwrap(),
        domain: "droveway.internal".to_owned(),
        epoch: Some(model::Epoch::from_random([1; 8])),
        revision: model::Revision(1),
        catalog: Catalog::from_objects(networks.into_iter().map(Object::Network)),
        local: BTreeMap::new(),
        routers: BTreeMap::new(),
        tunnels: Arc::default(),
        no_shortcut: None,
        troubles: vec![],
        moves: 0,
    }
}

/// A plugin with the networks `managed` and `inside`, the latter internal.
struct Rig {
    world: Arc<Mutex<World>>,
    managed: Network,
    client: reqwest::Client,
    dir: tempfile::TempDir,
    _views: watch::Sender<Arc<View>>,
    _server: tokio::task::JoinHandle<()>,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let world = Arc::new(Mutex::new(World::default()));
        let managed = network("managed", "10.42.0.0/16", 1);
        let inside = Network { internal: true, ..network("inside", "10.43.0.0/16", 2) };
        let (control, views) = control(world.clone(), view([managed.clone(), inside]));
        let state = Arc::new(State::open(dir.path()).unwrap());
        let path = dir.path().join("plugins/droveway.sock");
        let socket = plugin::Socket::bind(&path).unwrap();
        let plugin = plugin::Plugin::new(control, state);
        let server = tokio::spawn(async move { match socket.serve(plugin).await {} });
        Self { world, managed, client: client(&path), dir, _views: views, _server: server }
    }

    async fn raw(&self, method: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
        let answer = self.client.post(format!("http://plugin/{method}")).body(body).send().await.unwrap();
        let status = answer.status().as_u16();
        (status, serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap())
    }

    async fn ok(&self, method: &str, body: Value) -> Value {
        let (status, answer) = self.raw(method, body.to_string()).await;
        assert_eq!((status, &answer["Err"]), (200, &Value::Null), "{method} {body}: {answer}");
        answer
    }

    async fn refused(&self, method: &str, body: Value) -> String {
        let (status, answer) = self.raw(method, body.to_string()).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["Err"], answer["Error"], "both kinds of driver find their key");
        answer["Err"].as_str().unwrap_or_else(|| panic!("{method} was not refused: {answer}")).to_owned()
    }

    /// As `docker network create -d droveway --ipam-driver droveway -o … --ipam-opt …`.
    async fn network_create(&self, docker: &str, name: &str, cidr: &str) {
        self.ok("NetworkDriver.CreateNetwork", create_network(docker, name, cidr)).await;
    }

    /// As `docker run --network`, up to the start of the container.
    async fn run(&self, docker: &str, pool: &str, endpoint: &str) -> String {
        let asked = json!({ "PoolID": pool, "Address": "", "Options": null });
        let address =
            self.ok("IpamDriver.RequestAddress", asked).await["Address"].as_str().unwrap().to_owned();
        self.ok("NetworkDriver.CreateEndpoint", create_endpoint(docker, endpoint, &address, "")).await;
        address
    }
}

fn client(path: &Path) -> reqwest::Client {
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
    reqwest::Client::builder().no_proxy().unix_socket(path).build().unwrap()
}

fn create_network(docker: &str, name: &str, cidr: &str) -> Value {
    json!({
        "NetworkID": docker,
        "Options": { "com.docker.network.enable_ipv6": false, "com.docker.network.generic": { "droveway.network": name } },
        "IPv4Data": [{ "AddressSpace": "droveway", "Gateway": "10.42.0.1/16", "Pool": cidr }],
        "IPv6Data": []
    })
}

fn create_endpoint(docker: &str, endpoint: &str, address: &str, mac: &str) -> Value {
    json!({
        "NetworkID": docker, "EndpointID": endpoint,
        "Interface": { "Address": address, "AddressIPv6": "", "MacAddress": mac },
        "Options": { "com.docker.network.endpoint.exposedports": [], "com.docker.network.portmap": [] }
    })
}

fn portmap(endpoint: &str, bindings: &Value) -> Value {
    json!({
        "NetworkID": "d1", "EndpointID": endpoint,
        "Options": {
            "com.docker.network.endpoint.exposedports": [{ "Proto": 6, "Port": 80 }],
            "com.docker.network.portmap": bindings
        }
    })
}

#[tokio::test]
async fn a_container_goes_through_its_whole_life_and_nothing_is_left() {
    let rig = Rig::new();
    let pool = rig.managed.id.to_string();
    let activated = rig.raw("Plugin.Activate", "").await;
    assert_eq!(activated, (200, json!({ "Implements": ["NetworkDriver", "IpamDriver"] })));
    let capabilities = rig.raw("NetworkDriver.GetCapabilities", "").await.1;
    assert_eq!(
        (&capabilities["Scope"], &capabilities["ConnectivityScope"]),
        (&json!("local"), &json!("global"))
    );

    let request = json!({ "AddressSpace": "droveway", "Pool": "10.42.0.0/16", "SubPool": "",
        "Options": { "droveway.network": "managed" }, "V6": false });
    for _ in 0..2 {
        assert_eq!(
            rig.ok("IpamDriver.RequestPool", request.clone()).await,
            json!({ "PoolID": pool, "Pool": "10.42.0.0/16", "Data": { "com.docker.network.gateway": "10.42.0.1/16" } })
        );
        let gateway = json!({ "PoolID": pool, "Address": "10.42.0.1",
            "Options": { "RequestAddressType": "com.docker.network.gateway" } });
        assert_eq!(rig.ok("IpamDriver.RequestAddress", gateway).await, json!({ "Address": "10.42.0.1/16" }));
        rig.network_create("d1", "managed", "10.42.0.0/16").await;
    }
    assert!(rig.world.lock().unwrap().reserved.is_empty(), "the gateway is nobody's");

    assert_eq!(rig.run("d1", &pool, "e1").await, "10.42.16.10/16");
    let made = create_endpoint("d1", "e1", "10.42.16.10/16", "");
    assert_eq!(
        rig.ok("NetworkDriver.CreateEndpoint", made).await,
        json!({ "Interface": { "MacAddress": "02:00:00:00:00:07" } }),
        "the same request again has the same answer"
    );
    let join = json!({ "NetworkID": "d1", "EndpointID": "e1", "SandboxKey": "/var/run/docker/netns/1", "Options": {} });
    let joined = rig.ok("NetworkDriver.Join", join).await;
    assert!(joined["InterfaceName"]["SrcName"].as_str().unwrap().starts_with("dw"));
    assert_eq!(joined["InterfaceName"]["DstPrefix"], "eth");
    assert_eq!((&joined["Gateway"], &joined["DisableGatewayService"]), (&json!("10.42.0.1"), &json!(false)));
    assert_eq!(
        joined["StaticRoutes"],
        json!([{ "Destination": "169.254.169.250/32", "RouteType": 1, "NextHop": "" }])
    );
    let only = json!({ "NetworkID": "d1", "EndpointID": "e1" });
    for _ in 0..2 {
        rig.ok("NetworkDriver.RevokeExternalConnectivity", only.clone()).await;
        rig.ok("NetworkDriver.Leave", only.clone()).await;
        rig.ok("NetworkDriver.DeleteEndpoint", only.clone()).await;
        rig.ok("IpamDriver.ReleaseAddress", json!({ "PoolID": pool, "Address": "10.42.16.10" })).await;
        rig.ok("IpamDriver.ReleaseAddress", json!({ "PoolID": pool, "Address": "10.42.0.1" })).await;
        rig.ok("NetworkDriver.DeleteNetwork", json!({ "NetworkID": "d1" })).await;
        rig.ok("IpamDriver.ReleasePool", json!({ "PoolID": pool })).await;
    }
    let world = rig.world.lock().unwrap();
    assert!(world.endpoints.is_empty() && world.reserved.is_empty());
}

#[tokio::test]
async fn an_internal_network_has_no_gateway_and_gets_no_bridge_of_dockers_instead() {
    let rig = Rig::new();
    rig.network_create("d2", "inside", "10.43.0.0/16").await;
    rig.run("d2", NetworkId::from_random([2; 8]).as_str(), "e1").await;
    let join = json!({ "NetworkID": "d2", "EndpointID": "e1", "SandboxKey": "/x", "Options": null });
    let joined = rig.ok("NetworkDriver.Join", join).await;
    assert_eq!((&joined["Gateway"], &joined["DisableGatewayService"]), (&json!(""), &json!(true)));
}

#[tokio::test]
async fn of_a_containers_endpoints_one_brings_the_on_link_routes() {
    let rig = Rig::new();
    rig.network_create("d1", "managed", "10.42.0.0/16").await;
    rig.network_create("d2", "inside", "10.43.0.0/16").await;
    rig.run("d1", rig.managed.id.as_str(), "e1").await;
    rig.run("d2", NetworkId::from_random([2; 8]).as_str(), "e2").await;
    rig.run("d1", rig.managed.id.as_str(), "other").await;
    let join = async |docker: &str, endpoint: &str, sandbox: &str| {
        let join = json!({ "NetworkID": docker, "EndpointID": endpoint, "SandboxKey": sandbox });
        rig.ok("NetworkDriver.Join", join).await["StaticRoutes"].as_array().unwrap().len()
    };
    assert_eq!(join("d1", "e1", "/ns/a").await, 1);
    assert_eq!(join("d2", "e2", "/ns/a").await, 0, "the kernel would refuse the same route twice");
    assert_eq!(join("d1", "e1", "/ns/a").await, 1, "the same request again");
    assert_eq!(join("d1", "other", "/ns/b").await, 1, "another container");
    rig.ok("NetworkDriver.Leave", json!({ "NetworkID": "d1", "EndpointID": "e1" })).await;
    assert_eq!(join("d1", "e1", "/ns/a").await, 1, "its routes had left with it");
}

#[tokio::test]
async fn a_given_mac_is_used_and_not_answered() {
    let rig = Rig::new();
    rig.network_create("d1", "managed", "10.42.0.0/16").await;
    let wish = json!({ "PoolID": rig.managed.id, "Address": "10.42.0.7", "Options": {} });
    for _ in 0..2 {
        assert_eq!(rig.ok("IpamDriver.RequestAddress", wish.clone()).await["Address"], "10.42.0.7/16");
    }
    let request = create_endpoint("d1", "e1", "10.42.0.7/16", "02:42:0a:2a:00:07");
    assert_eq!(rig.ok("NetworkDriver.CreateEndpoint", request).await, json!({ "Interface": {} }));
    let world = rig.world.lock().unwrap();
    assert_eq!(world.endpoints["e1"].endpoint.mac.to_string(), "02:42:0a:2a:00:07");
}

#[tokio::test]
async fn an_address_in_use_is_refused_unless_the_engine_lost_its_holder_in_a_crash() {
    let rig = Rig::new();
    rig.network_create("d1", "managed", "10.42.0.0/16").await;
    rig.run("d1", rig.managed.id.as_str(), "e1").await;
    let wish = json!({ "PoolID": rig.managed.id, "Address": "10.42.16.10", "Options": {} });
    assert!(
        rig.refused("IpamDriver.RequestAddress", wish.clone()).await.contains("10.42.16.10 is in use by e-")
    );
    // An endpoint of the ledger that this engine has not shown yet, with no namespace left.
    let address = "10.42.16.99".parse().unwrap();
    let lost = endpoint(&rig.managed.id, address, None);
    let sandbox = Some(rig.dir.path().to_owned());
    let lost = LocalEndpoint { endpoint: lost, foreign: Some("lost".into()), sandbox };
    rig.world.lock().unwrap().endpoints.insert("lost".into(), lost);
    let wish = json!({ "PoolID": rig.managed.id, "Address": "10.42.16.99", "Options": {} });
    let refusal = rig.refused("IpamDriver.RequestAddress", wish.clone()).await;
    assert!(refusal.contains("in use"), "its namespace is there: {refusal}");
    rig.world.lock().unwrap().endpoints.get_mut("lost").unwrap().sandbox = Some("/nonexistent/ns".into());
    assert_eq!(rig.ok("IpamDriver.RequestAddress", wish).await["Address"], "10.42.16.99/16");
    assert!(!rig.world.lock().unwrap().endpoints.contains_key("lost"));
}

#[tokio::test]
async fn ports_are_published_ranges_are_walked_and_what_cannot_be_kept_private_is_refused() {
    let rig = Rig::new();
    rig.network_create("d1", "managed", "10.42.0.0/16").await;
    rig.run("d1", rig.managed.id.as_str(), "e1").await;
    let program = "NetworkDriver.ProgramExternalConnectivity";
    let binding = |proto: u8, host_ip: &str, from: u16, to: u16| json!({ "Proto": proto, "IP": "", "Port": 80, "HostIP": host_ip, "HostPort": from, "HostPortEnd": to });
    let published =
        || -> Vec<PublishedPort> { rig.world.lock().unwrap().endpoints["e1"].endpoint.ports.clone() };

    // Both families of "everywhere" are one port.
    let both =
        json!([binding(6, "0.0.0.0", 8080, 8080), binding(6, "::", 8080, 8080), binding(17, "", 0, 0)]);
    rig.ok(program, portmap("e1", &both)).await;
    assert_eq!(published().len(), 2);
    let info =
        rig.ok("NetworkDriver.EndpointOperInfo", json!({ "NetworkID": "d1", "EndpointID": "e1" })).await;
    let shown = &info["Value"]["com.docker.network.portmap"][0];
    assert_eq!(
        (&shown["HostPort"], &shown["Port"], &shown["IP"]),
        (&json!(8080), &json!(80), &json!("10.42.16.10"))
    );

    rig.world.lock().unwrap().busy_ports = [8000, 8001].into();
    rig.ok(program, portmap("e1", &json!([binding(6, "", 8000, 8005)]))).await;
    assert_eq!(published()[0].host_port, 8002);
    let taken = rig.refused(program, portmap("e1", &json!([binding(6, "", 8000, 8001)]))).await;
    assert!(taken.contains("8001 is in use"), "{taken}");
    let local = rig.refused(program, portmap("e1", &json!([binding(6, "127.0.0.1", 5432, 5432)]))).await;
    assert!(local.contains("not on 127.0.0.1 alone"), "{local}");
    assert!(
        rig.refused(program, portmap("e1", &json!([binding(132, "", 1, 1)])))
            .await
            .contains("only tcp and udp")
    );
    rig.ok(program, portmap("e1", &Value::Null)).await;
    assert!(published().is_empty());
}

#[tokio::test]
async fn a_network_that_cannot_be_is_refused_with_the_remedy() {
    let rig = Rig::new();
    let create = "NetworkDriver.CreateNetwork";
    let refusal = rig.refused(create, create_network("d1", "red", "10.42.0.0/16")).await;
    assert!(refusal.contains("droveway network create red"), "{refusal}");
    let mut foreign = create_network("d1", "managed", "10.42.0.0/16");
    foreign["IPv4Data"][0]["AddressSpace"] = json!("LocalDefault");
    assert!(rig.refused(create, foreign).await.contains("--ipam-driver droveway"));
    let bare = json!({ "NetworkID": "d1", "Options": null, "IPv4Data": null, "IPv6Data": null });
    assert!(rig.refused(create, bare).await.contains("-o droveway.network=NAME"));

    let pool = |pool: &str, sub: &str, v6: bool| json!({ "AddressSpace": "", "Pool": pool, "SubPool": sub, "Options": { "droveway.network": "managed" }, "V6": v6 });
    let request = "IpamDriver.RequestPool";
    assert!(
        rig.refused(request, pool("10.9.0.0/16", "", false)).await.contains("has the addresses 10.42.0.0/16")
    );
    assert!(rig.refused(request, pool("", "10.42.1.0/24", false)).await.contains("--ip-range"));
    assert!(rig.refused(request, pool("", "", true)).await.contains("--ipv6"));
    assert_eq!(rig.ok(request, pool("", "", false)).await["Pool"], "10.42.0.0/16");
    let gateway = json!({ "PoolID": rig.managed.id, "Address": "10.42.9.9",
        "Options": { "RequestAddressType": "com.docker.network.gateway" } });
    assert!(rig.refused("IpamDriver.RequestAddress", gateway).await.contains("gateway 10.42.0.1"));
    let unknown = create_endpoint("d9", "e1", "10.42.16.10/16", "");
    assert!(rig.refused("NetworkDriver.CreateEndpoint", unknown).await.contains("try again"));
    let nobodys = json!({ "PoolID": "garbage", "Address": "", "Options": {} });
    assert!(rig.refused("IpamDriver.RequestAddress", nobodys).await.contains("no Droveway network"));
}

#[tokio::test]
async fn garbage_and_oversized_bodies_are_refused_cleanly_and_the_next_request_is_answered() {
    let rig = Rig::new();
    for garbage in ["", "{", "null", "[]", "\u{0}\u{1}", r#"{"NetworkID": 7}"#] {
        let (status, answer) = rig.raw("NetworkDriver.Join", garbage).await;
        assert_eq!(status, 200);
        assert!(
            answer["Err"].as_str().unwrap().contains("Docker's plugin protocol"),
            "{garbage:?}: {answer}"
        );
    }
    let (status, answer) = rig.raw("NetworkDriver.Join", vec![b' '; (64 << 10) + 1]).await;
    assert_eq!(status, 413);
    assert!(answer["Err"].as_str().unwrap().contains("larger than 65536 bytes"), "{answer}");
    let (status, answer) = rig.raw("NetworkDriver.GwAllocCheck", "{}").await;
    assert_eq!(status, 404, "{answer}");
    assert_eq!(rig.raw("Plugin.Activate", "{").await.0, 200);
}

#[tokio::test]
async fn the_socket_is_roots_alone_replaces_an_old_file_and_goes_with_the_agent() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("droveway.sock");
    std::fs::write(&path, "stale").unwrap();
    let first = plugin::Socket::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let second = plugin::Socket::bind(&path).unwrap();
    drop(first);
    assert!(path.exists(), "a newer agent's socket stays");
    drop(second);
    assert!(!path.exists());
}

#[test]
fn the_record_of_networks_survives_a_restart_and_damage_is_learned_anew() {
    let dir = tempfile::tempdir().unwrap();
    let id = NetworkId::from_random([1; 8]);
    let state = State::open(dir.path()).unwrap();
    let before = state.networks();
    state.put_network("d1", &id).unwrap();
    state.learn_networks(&before, &BTreeMap::new()).unwrap();
    assert_eq!(state.network("d1"), Some(id.clone()), "it was made while the engine was asked");
    assert_eq!(State::open(dir.path()).unwrap().network("d1"), Some(id.clone()));
    state.learn_networks(&state.networks(), &[("d2".to_owned(), id.clone())].into()).unwrap();
    let again = State::open(dir.path()).unwrap();
    assert_eq!((again.network("d1"), again.network("d2")), (None, Some(id)));
    std::fs::write(dir.path().join("docker-networks.json"), "{\"networks").unwrap();
    assert!(State::open(dir.path()).unwrap().networks().is_empty());
}

/// An engine that holds networks and containers, and tells of events.
#[derive(Default)]
struct FakeEngine {
    networks: Vec<Value>,
    containers: BTreeMap<String, Value>,
    events: Vec<tokio::sync::mpsc::UnboundedSender<String>>,
}

type SharedEngine = Arc<Mutex<FakeEngine>>;

impl FakeEngine {
    fn event(&mut self, event: &Value) {
        self.events.retain(|to| to.send(format!("{event}\n")).is_ok());
    }

    fn names(&self) -> Vec<String> {
        self.networks.iter().map(|network| network["Name"].as_str().unwrap().to_owned()).collect()
    }
}

fn serve_engine(path: &Path, engine: SharedEngine) -> tokio::task::JoinHandle<()> {
    let version = json!({ "Version": "20.10.24", "ApiVersion": "1.41", "MinAPIVersion": "1.12" });
    let find = |engine: &FakeEngine, id: &str| engine.networks.iter().find(|n| n["Id"] == id).cloned();
    let router = axum::Router::new()
        .route("/version", any(|| async { Json(version) }))
        .route(
            "/v1.41/networks",
            get(|Shared(e): Shared<SharedEngine>| async move { Json(e.lock().unwrap().networks.clone()) }),
        )
        .route(
            "/v1.41/networks/create",
            post(|Shared(e): Shared<SharedEngine>, Json(mut network): Json<Value>| async move {
                let mut engine = e.lock().unwrap();
                network["Id"] = json!(format!("made{}", engine.networks.len()));
                engine.networks.push(network);
                Json(json!({ "Id": "x", "Warning": "" }))
            }),
        )
        .route(
            "/v1.41/networks/{id}",
            get(move |Shared(e): Shared<SharedEngine>, Segment(id): Segment<String>| async move {
                match find(&e.lock().unwrap(), &id) {
                    Some(network) => Json(network).into_response(),
                    None => axum::http::StatusCode::NOT_FOUND.into_response(),
                }
            }),
        )
        .route(
            "/v1.41/networks/{id}",
            delete(|Shared(e): Shared<SharedEngine>, Segment(id): Segment<String>| async move {
                e.lock().unwrap().networks.retain(|network| network["Id"] != id);
                axum::http::StatusCode::NO_CONTENT
            }),
        )
        .route(
            "/v1.41/containers/json",
            get(|Shared(e): Shared<SharedEngine>| async move {
                Json(e.lock().unwrap().containers.values().cloned().collect::<Vec<_>>())
            }),
        )
        .route(
            "/v1.41/containers/{id}/json",
            get(|Shared(e): Shared<SharedEngine>, Segment(id): Segment<String>| async move {
                match e.lock().unwrap().containers.get(&id) {
                    Some(container) => Json(container.clone()).into_response(),
                    None => axum::http::StatusCode::NOT_FOUND.into_response(),
                }
            }),
        )
        .route(
            "/v1.41/events",
            get(|Shared(e): Shared<SharedEngine>| async move {
                let (to, from) = tokio::sync::mpsc::unbounded_channel();
                e.lock().unwrap().events.push(to);
                axum::body::Body::from_stream(futures_util::stream::unfold(from, |mut from| async {
                    let line = from.recv().await?;
                    Some((Ok::<_, std::convert::Infallible>(line), from))
                }))
            }),
        )
        .with_state(engine);
    drop(std::fs::remove_file(path));
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() })
}

/// Looks again and again until it is so; a minute is for ever.
async fn until(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came to be that {what}");
}

#[tokio::test]
async fn the_follower_waits_for_the_engine_shows_each_network_and_learns_what_containers_are_called() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("docker.sock");
    let world = Arc::new(Mutex::new(World::default()));
    let managed = network("managed", "10.42.0.0/16", 1);
    let bridge = network("bridge", "10.44.0.0/16", 4);
    let (control, views) = control(world.clone(), view([managed.clone(), bridge.clone()]));
    let (status, seen) = watch::channel(DockerStatus::Off);
    let config = Config {
        engine: path.clone(),
        plugin_socket: dir.path().join("plugins/droveway.sock"),
        resolv_conf: dir.path().join("host-resolv.conf"),
        state_dir: dir.path().join("state"),
    };
    std::fs::write(&config.resolv_conf, "nameserver 127.0.0.1\n").unwrap();
    let agent = tokio::spawn(super::run(config.clone(), control, status, Arc::default()));
    until("the agent waits", || matches!(*seen.borrow(), DockerStatus::Waiting { .. })).await;

    // The engine comes: it has a network of somebody else's with the name of one of ours, and a leftover of ours.
    let engine = SharedEngine::default();
    let label = json!({ "droveway.network": NetworkId::from_random([7; 8]) });
    engine.lock().unwrap().networks = vec![
        json!({ "Name": "bridge", "Id": "b", "Driver": "bridge", "Labels": {}, "Options": null, "IPAM": { "Config": null } }),
        json!({ "Name": "old", "Id": "o", "Driver": "droveway", "Labels": label, "Options": label }),
    ];
    let server = serve_engine(&path, engine.clone());
    until("the network appears", || engine.lock().unwrap().names() == ["bridge", "managed"]).await;
    until("it is up", || *seen.borrow() == DockerStatus::Up { version: "20.10.24".into() }).await;
    let made = engine.lock().unwrap().networks[1].clone();
    assert_eq!(made["Options"]["droveway.network"], managed.id.as_str());
    assert_eq!(made["IPAM"]["Config"][0], json!({ "Subnet": "10.42.0.0/16", "Gateway": "10.42.0.1" }));
    let record = config.state_dir.join("docker-networks.json");
    let docker = made["Id"].as_str().unwrap().to_owned();
    until("the record holds it", || {
        std::fs::read_to_string(&record).is_ok_and(|text| text.contains(&docker))
    })
    .await;

    // A container starts.
    let address = "10.42.16.10".parse().unwrap();
    let local = LocalEndpoint {
        endpoint: endpoint(&managed.id, address, None),
        foreign: Some("e1".into()),
        sandbox: None,
    };
    world.lock().unwrap().endpoints.insert("e1".into(), local);
    let file = dir.path().join("resolv.conf");
    std::fs::write(&file, "nameserver 127.0.0.11\noptions ndots:0\n").unwrap();
    let mut container = json!({
        "Id": "c1", "Name": "/db", "State": {}, "HostConfig": { "Dns": [] }, "ResolvConfPath": file,
        "Config": { "Labels": { "com.docker.compose.project": "shop", "com.docker.compose.service": "db" } },
        "NetworkSettings": { "Networks": { "managed": {
            "NetworkID": docker, "EndpointID": "e1", "Aliases": ["cache"] } } }
    });
    engine.lock().unwrap().containers.insert("c1".into(), container.clone());
    let connect = json!({ "Type": "network", "Action": "connect", "Actor": { "ID": docker,
        "Attributes": { "container": "c1", "name": "managed", "type": "droveway" } } });
    engine.lock().unwrap().event(&connect);
    let called = || world.lock().unwrap().described.get("e1").and_then(|d| d.name.clone());
    until("it is described", || called().is_some_and(|name| name.as_str() == "db")).await;
    let aliases: Vec<Name> = world.lock().unwrap().described["e1"].aliases.clone();
    assert_eq!(aliases, ["cache".parse().unwrap()]);
    let expected = "search shop.droveway.internal db.shop.droveway.internal droveway.internal\nnameserver 169.254.169.250\noptions ndots:0\n";
    until("its resolv.conf names the router", || std::fs::read_to_string(&file).unwrap() == expected).await;

    // It is renamed; then a network comes and one goes.
    container["Name"] = json!("/store");
    engine.lock().unwrap().containers.insert("c1".into(), container);
    let rename =
        json!({ "Type": "container", "Action": "rename", "Actor": { "ID": "c1", "Attributes": {} } });
    engine.lock().unwrap().event(&rename);
    until("the new name is known", || called().is_some_and(|name| name.as_str() == "store")).await;
    let red = network("red", "10.45.0.0/16", 5);
    views.send_replace(Arc::new(view([red.clone(), bridge])));
    until("networks follow", || engine.lock().unwrap().names() == ["bridge", "red"]).await;

    // A person removes it by hand: it comes back. The engine goes away and comes back without any network.
    engine.lock().unwrap().networks.clear();
    engine.lock().unwrap().event(&json!({ "Type": "network", "Action": "destroy", "Actor": { "ID": "x" } }));
    until("they are back", || engine.lock().unwrap().names() == ["bridge", "red"]).await;
    server.abort();
    *engine.lock().unwrap() = FakeEngine::default();
    let server = serve_engine(&path, engine.clone());
    until("they are back again", || engine.lock().unwrap().names() == ["bridge", "red"]).await;

    agent.abort();
    server.abort();
    assert!(agent.await.unwrap_err().is_cancelled());
    assert!(!config.plugin_socket.exists(), "the plugin's socket goes with it");
}
