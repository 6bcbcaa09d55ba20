//! The plugin: HTTP/1.1 on a Unix socket, answering the engine's remote driver and remote IPAM calls.
//!
//! A refusal is a JSON object whose `Err` (network driver) or `Error` (IPAM driver) is a sentence for the person who
//! typed the docker command. libnetwork repeats a call when the connection broke before the answer, so each call may
//! come twice: the second time it changes nothing.
//!
//! Invariant: nothing here calls the engine.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State as Shared};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use ipnet::IpNet;
use model::api::{ApiError, ErrorCode};
use model::{EndpointKind, Mac, Network, NetworkId, Protocol, PublishedPort};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use super::state::State;
use super::{DRIVER, Error, NETWORK_KEY, wire};
use crate::Control;
use crate::accept::accept;
use crate::control::LocalEndpoint;

/// The largest body that is read, in bytes. The largest that an engine sends is a container's options: a few KiB.
const BODY_MAX: usize = 64 << 10;
/// What the engine calls the content.
const CONTENT_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// The listening socket; its file goes with it.
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Listens. An old file is replaced in one step, so the engine never finds none.
    pub(super) fn bind(path: &Path) -> Result<Self, Error> {
        let error = |source| Error::Socket { path: path.to_owned(), source };
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(error)?;
        }
        // The engine takes for a plugin only what ends in `.sock`.
        let next = path.with_extension("new");
        match std::fs::remove_file(&next) {
            Ok(()) => {}
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => {}
            Err(why) => return Err(error(why)),
        }
        let listener = UnixListener::bind(&next).map_err(error)?;
        std::fs::set_permissions(&next, std::fs::Permissions::from_mode(0o600)).map_err(error)?;
        let inode = std::fs::metadata(&next).map_err(error)?.ino();
        std::fs::rename(&next, path).map_err(error)?;
        Ok(Self { listener, path: path.to_owned(), inode })
    }

    /// Serves until dropped, connections included.
    pub(super) async fn serve(&self, plugin: Plugin) -> Infallible {
        let router = axum::Router::new()
            .fallback(answer)
            .layer(DefaultBodyLimit::max(BODY_MAX))
            .with_state(Arc::new(plugin));
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = tokio::select! {
                accepted = accept("Docker's plugin socket", || self.listener.accept()) => accepted,
                Some(_) = connections.join_next() => continue,
            };
            let service = TowerToHyperService::new(router.clone());
            connections.spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                if let Err(why) = builder.serve_connection(TokioIo::new(stream), service).await {
                    tracing::debug!(why = %why, "a connection to Docker's plugin socket ended");
                }
            });
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Unless another agent has put its own there.
        if std::fs::metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            drop(std::fs::remove_file(&self.path));
        }
    }
}

/// What answers.
pub(super) struct Plugin {
    control: Control,
    state: Arc<State>,
}

async fn answer(
    Shared(plugin): Shared<Arc<Plugin>>,
    uri: Uri,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let method = uri.path().trim_start_matches('/').to_owned();
    let answer = match body {
        Ok(body) => plugin.call(&method, &body).await,
        Err(why) if why.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(Refused {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            why: format!("{method}: the request is larger than {BODY_MAX} bytes, which no engine sends"),
        }),
        Err(why) => Err(Refused { status: StatusCode::BAD_REQUEST, why: format!("{method}: {why}") }),
    };
    let (status, body) = match answer {
        Ok(value) => {
            tracing::debug!(method, answer = %value, "Docker asked");
            (StatusCode::OK, value)
        }
        Err(Refused { status, why }) => {
            tracing::warn!(method, why, "Docker was refused");
            // The network driver reads `Err`, the IPAM driver `Error`, and the plugin client itself `Err`.
            (status, json!({ "Err": why, "Error": why }))
        }
    };
    (status, [(header::CONTENT_TYPE, CONTENT_TYPE)], body.to_string()).into_response()
}

/// A refusal. With 200 the engine prints the sentence as it is; anything else is for requests that are no requests.
struct Refused {
    status: StatusCode,
    why: String,
}

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self { status: StatusCode::OK, why: error.message }
    }
}

impl Plugin {
    pub(super) fn new(control: Control, state: Arc<State>) -> Self {
        Self { control, state }
    }

    async fn call(&self, method: &str, body: &[u8]) -> Result<Value, Refused> {
        let nothing = || Ok(json!({}));
        let answer: Result<Value, ApiError> = match method {
            "Plugin.Activate" => Ok(json!({ "Implements": ["NetworkDriver", "IpamDriver"] })),
            "NetworkDriver.GetCapabilities" => {
                Ok(json!({ "Scope": "local", "ConnectivityScope": "global", "GwAllocChecker": false }))
            }
            "NetworkDriver.CreateNetwork" => {
                self.create_network(parse(method, body)?).and_then(|()| nothing())
            }
            "NetworkDriver.DeleteNetwork" => {
                self.delete_network(parse(method, body)?).and_then(|()| nothing())
            }
            // Swarm's managers allocate for global networks; ours are local, so these two never decide anything.
            "NetworkDriver.AllocateNetwork" => Ok(json!({ "Options": {} })),
            "NetworkDriver.FreeNetwork"
            | "NetworkDriver.DiscoverNew"
            | "NetworkDriver.DiscoverDelete"
            | "IpamDriver.ReleasePool" => nothing(),
            "NetworkDriver.CreateEndpoint" => to_value(self.create_endpoint(parse(method, body)?).await?),
            "NetworkDriver.DeleteEndpoint" => {
                self.delete_endpoint(parse(method, body)?).await.and_then(|()| nothing())
            }
            "NetworkDriver.EndpointOperInfo" => self.endpoint_info(parse(method, body)?).await,
            "NetworkDriver.Join" => to_value(self.join(parse(method, body)?).await?),
            "NetworkDriver.Leave" => self.leave(parse(method, body)?).await.and_then(|()| nothing()),
            "NetworkDriver.ProgramExternalConnectivity" => {
                self.publish(parse(method, body)?).await.and_then(|()| nothing())
            }
            "NetworkDriver.RevokeExternalConnectivity" => {
                self.revoke(parse(method, body)?).await.and_then(|()| nothing())
            }
            // The agent's ledger survives the engine's restarts, so nothing has to be asked for again.
            "IpamDriver.GetCapabilities" => {
                Ok(json!({ "RequiresMACAddress": false, "RequiresRequestReplay": false }))
            }
            "IpamDriver.GetDefaultAddressSpaces" => {
                Ok(json!({ "LocalDefaultAddressSpace": DRIVER, "GlobalDefaultAddressSpace": DRIVER }))
            }
            "IpamDriver.RequestPool" => to_value(self.request_pool(&parse(method, body)?)?),
            "IpamDriver.RequestAddress" => to_value(self.request_address(parse(method, body)?).await?),
            "IpamDriver.ReleaseAddress" => {
                self.release_address(parse(method, body)?).await.and_then(|()| nothing())
            }
            // The engine takes 404 for "does not have that method" and goes on without it.
            other => {
                let why = format!("{other:.64}: this plugin has no such method");
                return Err(Refused { status: StatusCode::NOT_FOUND, why });
            }
        };
        Ok(answer?)
    }

    fn create_network(&self, request: wire::CreateNetwork) -> Result<(), ApiError> {
        let generic = request.options.as_ref().and_then(|options| options.get(wire::GENERIC));
        let named = generic.and_then(|generic| generic.get(NETWORK_KEY)).and_then(Value::as_str);
        let network = self.named(named, "-o")?;
        if request.ipv6.is_some_and(|data| !data.is_empty()) {
            return Err(invalid(format!(
                "network {:?} has no IPv6 addresses; leave --ipv6 out",
                network.name.as_str()
            )));
        }
        for data in request.ipv4.iter().flatten() {
            let pool = data.pool.parse::<IpNet>().ok().map(|pool| pool.trunc());
            if data.address_space != DRIVER || pool != Some(network.pool()) {
                return Err(invalid(format!(
                    "network {:?} gets its addresses from Droveway; add --ipam-driver {DRIVER} --ipam-opt {NETWORK_KEY}={}",
                    network.name.as_str(),
                    network.name
                )));
            }
        }
        self.state.put_network(&request.network_id, &network.id).map_err(internal)
    }

    fn delete_network(&self, request: wire::NetworkOnly) -> Result<(), ApiError> {
        self.state.delete_network(&request.network_id).map_err(internal)
    }

    async fn create_endpoint(
        &self,
        request: wire::CreateEndpoint,
    ) -> Result<wire::EndpointCreated, ApiError> {
        let network = self.known(&request.network_id)?;
        let interface = request.interface.unwrap_or_default();
        if !interface.address_ipv6.is_empty() {
            return Err(invalid(format!(
                "{}: IPv6 addresses are not supported yet; leave --ip6 out",
                interface.address_ipv6
            )));
        }
        let address = address(&interface.address)?;
        let mac = match interface.mac_address.as_str() {
            "" => None,
            text => Some(text.parse::<Mac>().map_err(|why| invalid(why.to_string()))?),
        };
        let foreign = &request.endpoint_id;
        let made = match self.control.create(&network, foreign, address, mac).await {
            Ok(endpoint) => endpoint,
            // The same request again: what was made then is the answer now.
            Err(why) => match self.endpoint(foreign).await? {
                Some(local)
                    if local.endpoint.network == network && local.endpoint.addresses.contains(&address) =>
                {
                    local.endpoint
                }
                Some(_) | None => return Err(why),
            },
        };
        self.state.confirm(foreign);
        // libnetwork takes a MAC only where it gave none.
        let mac_address = if mac.is_none() { made.mac.to_string() } else { String::new() };
        Ok(wire::EndpointCreated { interface: wire::Interface { mac_address, ..wire::Interface::default() } })
    }

    async fn delete_endpoint(&self, request: wire::EndpointOnly) -> Result<(), ApiError> {
        gone_is_fine(self.control.delete(&request.endpoint_id).await)?;
        self.state.forget(&request.endpoint_id);
        Ok(())
    }

    /// For people and for engines to come: today's read ports only of drivers that are built in.
    async fn endpoint_info(&self, request: wire::EndpointOnly) -> Result<Value, ApiError> {
        let Some(local) = self.endpoint(&request.endpoint_id).await? else {
            return Ok(json!({ "Value": {} }));
        };
        let address = local.endpoint.addresses.first().map(ToString::to_string).unwrap_or_default();
        let ports: Vec<_> = local
            .endpoint
            .ports
            .iter()
            .map(|port| wire::PortBinding {
                proto: port.protocol.number(),
                ip: address.clone(),
                port: port.port,
                host_ip: "0.0.0.0".to_owned(),
                host_port: port.host_port,
                host_port_end: port.host_port,
            })
            .collect();
        Ok(json!({ "Value": { wire::PORTMAP: ports, "droveway.endpoint": local.endpoint.id } }))
    }

    async fn join(&self, request: wire::Join) -> Result<wire::Joined, ApiError> {
        let network = self.known(&request.network_id)?;
        let sandbox = PathBuf::from(request.sandbox_key);
        let handed = self.control.join(&request.endpoint_id, sandbox.clone()).await?;
        let others = self.control.list().await?.into_iter();
        let others = others.filter(|local| local.foreign.as_deref() != Some(&request.endpoint_id));
        let others: BTreeSet<PathBuf> = others.filter_map(|local| local.sandbox).collect();
        let brings = self.state.brings_on_link(&sandbox, &request.endpoint_id, &others);
        let internal =
            self.control.view().catalog.networks.get(&network).is_some_and(|network| network.internal);
        let gateway = handed.gateway.filter(|_| !internal);
        Ok(wire::Joined {
            interface_name: wire::InterfaceName { src_name: handed.ifname, dst_prefix: "eth" },
            // Without a gateway libnetwork would add docker_gwbridge: a way out that an internal network must not have.
            disable_gateway_service: gateway.is_none(),
            gateway: gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
            static_routes: handed
                .on_link
                .into_iter()
                .filter(|_| brings)
                .map(|destination| wire::StaticRoute {
                    destination: destination.to_string(),
                    route_type: wire::ROUTE_CONNECTED,
                    next_hop: "",
                })
                .collect(),
        })
    }

    async fn leave(&self, request: wire::EndpointOnly) -> Result<(), ApiError> {
        gone_is_fine(self.control.leave(&request.endpoint_id).await)?;
        self.state.left(&request.endpoint_id);
        Ok(())
    }

    async fn publish(&self, request: wire::ExternalConnectivity) -> Result<(), ApiError> {
        let bindings = match request.options.as_ref().and_then(|options| options.get(wire::PORTMAP)) {
            None | Some(Value::Null) => Vec::new(),
            Some(list) => serde_json::from_value::<Vec<wire::PortBinding>>(list.clone())
                .map_err(|why| invalid(format!("{}: {why}", wire::PORTMAP)))?,
        };
        let wishes = bindings.iter().map(wish).collect::<Result<Vec<_>, _>>()?;
        // A range is a wish for any port in it. All ranges advance together: who asks for one asks for one port.
        let longest = wishes.iter().map(|(port, last)| last - port.host_port).max().unwrap_or(0);
        let mut step = 0;
        loop {
            let ports: BTreeSet<PublishedPort> = wishes
                .iter()
                .map(|(port, last)| PublishedPort {
                    host_port: port.host_port.saturating_add(step).min(*last),
                    ..port.clone()
                })
                .collect();
            match self.control.publish(&request.endpoint_id, ports.into_iter().collect()).await {
                Err(why) if why.code == ErrorCode::Conflict && step < longest => step += 1,
                Err(why) => return Err(why),
                Ok(_) => return Ok(()),
            }
        }
    }

    async fn revoke(&self, request: wire::EndpointOnly) -> Result<(), ApiError> {
        gone_is_fine(self.control.publish(&request.endpoint_id, Vec::new()).await.map(drop))
    }

    fn request_pool(&self, request: &wire::RequestPool) -> Result<wire::Pool, ApiError> {
        let named =
            request.options.as_ref().and_then(|options| options.get(NETWORK_KEY)).and_then(Value::as_str);
        let network = self.named(named, "--ipam-opt")?;
        let name = network.name.as_str();
        if request.v6 {
            return Err(invalid(format!("network {name:?} has no IPv6 addresses; leave --ipv6 out")));
        }
        if !request.sub_pool.is_empty() {
            return Err(invalid(format!(
                "network {name:?}: which addresses this host gives out is Droveway's choice; leave --ip-range out"
            )));
        }
        let pool = network.pool();
        if !request.pool.is_empty()
            && request.pool.parse::<IpNet>().ok().map(|wish| wish.trunc()) != Some(pool)
        {
            return Err(invalid(format!(
                "network {name:?} has the addresses {pool}, not {:.64}; leave --subnet out or give that one",
                request.pool
            )));
        }
        let gateway = with_prefix(network.gateway(), &network);
        let data = [(wire::GATEWAY.to_owned(), gateway)].into();
        Ok(wire::Pool { id: network.id.to_string(), cidr: pool.to_string(), data })
    }

    async fn request_address(&self, request: wire::RequestAddress) -> Result<wire::Address, ApiError> {
        let network = self.pool(&request.pool_id)?;
        let wish = match request.address.as_str() {
            "" => None,
            text => Some(address(text)?),
        };
        let what = request.options.as_ref().and_then(|options| options.get(wire::REQUEST_ADDRESS_TYPE));
        if what.and_then(Value::as_str) == Some(wire::GATEWAY) {
            let gateway = network.gateway();
            if wish.is_some_and(|wish| wish != gateway) {
                return Err(invalid(format!(
                    "network {:?} has the gateway {gateway} on each host; leave --gateway out",
                    network.name.as_str()
                )));
            }
            return Ok(wire::Address { address: with_prefix(gateway, &network) });
        }
        if let Some(wish) = wish {
            self.free_of_the_dead(&network.id, wish).await?;
        }
        let address = self.control.reserve(&network.id, wish).await?;
        self.state.asked(&network.id, address);
        Ok(wire::Address { address: with_prefix(address, &network) })
    }

    async fn release_address(&self, request: wire::ReleaseAddress) -> Result<(), ApiError> {
        // A pool that is gone has no addresses; its gateway was never reserved.
        let Ok(network) = request.pool_id.parse::<NetworkId>() else { return Ok(()) };
        if request.address.is_empty() {
            return Ok(());
        }
        let address = address(&request.address)?;
        let view = self.control.view();
        if view.catalog.networks.get(&network).is_some_and(|network| network.gateway() == address) {
            return Ok(());
        }
        gone_is_fine(self.control.unreserve(&network, address).await)
    }

    /// Refuses an address that an endpoint of this host has, unless the engine lost that endpoint in a crash and its
    /// container is gone: then the endpoint gives it up.
    async fn free_of_the_dead(&self, network: &NetworkId, address: IpAddr) -> Result<(), ApiError> {
        let holder =
            self.control.list().await?.into_iter().find(|local| {
                local.endpoint.network == *network && local.endpoint.addresses.contains(&address)
            });
        let Some(LocalEndpoint { endpoint, foreign, sandbox }) = holder else { return Ok(()) };
        let gone = sandbox.is_none_or(|sandbox| std::fs::symlink_metadata(sandbox).is_err());
        let lost = foreign.filter(|foreign| {
            endpoint.kind == EndpointKind::Docker && gone && !self.state.is_confirmed(foreign)
        });
        let Some(foreign) = lost else {
            let name = endpoint.name.as_ref().map_or(endpoint.id.as_str(), |name| name.as_str());
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "address {address} is in use by {name} on this host; choose another --ip or leave it out"
                ),
            ));
        };
        tracing::info!(%network, %address, endpoint = foreign, "an endpoint that the engine lost gives up its address");
        self.control.leave(&foreign).await?;
        self.control.delete(&foreign).await
    }

    async fn endpoint(&self, foreign: &str) -> Result<Option<LocalEndpoint>, ApiError> {
        let all = self.control.list().await?;
        Ok(all.into_iter().find(|local| local.foreign.as_deref() == Some(foreign)))
    }

    /// The network that a person or the follower named.
    fn named(&self, name: Option<&str>, flag: &str) -> Result<Network, ApiError> {
        let view = self.control.view();
        let Some(name) = name else {
            return Err(invalid(format!(
                "say which network: -o {NETWORK_KEY}=NAME and --ipam-driver {DRIVER} --ipam-opt {NETWORK_KEY}=NAME ({flag} is missing)"
            )));
        };
        if let Some(network) = view.network(name) {
            return Ok(network.clone());
        }
        let why = if view.epoch.is_none() {
            "the agent has not heard from its server yet; try again when `droveway network ls` shows it"
                .to_owned()
        } else {
            format!("`droveway network create {name:.64} --subnet CIDR` makes one")
        };
        Err(ApiError::new(
            ErrorCode::NotFound,
            format!("there is no Droveway network {:?}; {why}", short(name)),
        ))
    }

    fn pool(&self, id: &str) -> Result<Network, ApiError> {
        let view = self.control.view();
        id.parse::<NetworkId>().ok().and_then(|id| view.catalog.networks.get(&id).cloned()).ok_or_else(|| {
            ApiError::new(
                ErrorCode::NotFound,
                format!(
                    "there is no Droveway network {:?} any more; `docker network rm` its Docker network",
                    short(id)
                ),
            )
        })
    }

    fn known(&self, docker: &str) -> Result<NetworkId, ApiError> {
        self.state.network(docker).ok_or_else(|| {
            ApiError::new(
                ErrorCode::Unavailable,
                format!("the agent does not know Docker's network {docker:.12} yet; it is asking the engine, try again"),
            )
        })
    }
}

/// The port and the last host port that will do.
fn wish(binding: &wire::PortBinding) -> Result<(PublishedPort, u16), ApiError> {
    let protocol = match binding.proto {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        other => {
            return Err(invalid(format!(
                "port {}: only tcp and udp can be published on a Droveway network, not IP protocol {other}",
                binding.port
            )));
        }
    };
    // To publish on all addresses what was meant for one would open it to those it was kept from.
    if !matches!(binding.host_ip.as_str(), "" | "0.0.0.0" | "::") {
        return Err(invalid(format!(
            "port {}: a Droveway network publishes on all of the host's addresses, not on {:.64} alone; leave the address out",
            binding.port, binding.host_ip
        )));
    }
    let port = PublishedPort { protocol, host_port: binding.host_port, port: binding.port };
    Ok((port, binding.host_port_end.max(binding.host_port)))
}

/// An address with or without prefix.
fn address(text: &str) -> Result<IpAddr, ApiError> {
    let bare = text.split_once('/').map_or(text, |(address, _)| address);
    bare.parse().map_err(|_| invalid(format!("{:?} is not an IP address", short(text))))
}

/// Enough of a text for a person to recognise it.
fn short(text: &str) -> &str {
    text.char_indices().nth(64).map_or(text, |(end, _)| &text[..end])
}

fn with_prefix(address: IpAddr, network: &Network) -> String {
    format!("{address}/{}", network.pool().prefix_len())
}

fn gone_is_fine(result: Result<(), ApiError>) -> Result<(), ApiError> {
    match result {
        Err(why) if why.code == ErrorCode::NotFound => Ok(()),
        other => other,
    }
}

fn invalid(message: String) -> ApiError {
    ApiError::new(ErrorCode::Invalid, message)
}

fn internal(error: Error) -> ApiError {
    ApiError::new(ErrorCode::Internal, error.to_string())
}

fn parse<T: DeserializeOwned>(method: &str, body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|why| {
        invalid(format!("{method}: the request is not what Docker's plugin protocol says: {why}"))
    })
}

fn to_value(answer: impl Serialize) -> Result<Value, ApiError> {
    serde_json::to_value(answer).map_err(|why| ApiError::new(ErrorCode::Internal, why.to_string()))
}
