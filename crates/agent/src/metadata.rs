//! What a container may ask about itself and its neighbours: HTTP on `169.254.169.250` in its router, as Rancher's
//! metadata service answered it.
//!
//! ```text
//! /latest/self/{container,service,stack,host,network}     of whoever asks, told by the source address
//! /latest/{containers,services,stacks,hosts,networks}     of the asker's network
//! ```
//!
//! A path walks down a tree of JSON: maps by key, lists by index or by the name of what is in them. With
//! `Accept: application/json` the answer is that part of the tree. Otherwise a leaf is its text, a map lists its keys, one a
//! line with `/` behind those that lead further, and a list its indices, with `=NAME` behind those that have one.
//!
//! Invariant: nothing of another network shows.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{ACCEPT, ALLOW, CONTENT_TYPE};
use axum::http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use model::{Endpoint, HostId, NetworkId};
use serde_json::{Map, Value, json};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::View;
use crate::accept::accept;
use crate::names::Budget;

/// Connections, in all and for one asker.
const CONNECTIONS: (usize, usize) = (128, 16);
/// How long a client may take for a request's head, a new request on an old connection included.
const HEAD: Duration = Duration::from_secs(10);
/// How long one connection may last.
const LIFE: Duration = Duration::from_mins(5);
/// The largest head, in bytes.
const HEAD_MAX: usize = 16 << 10;
/// The versions of the tree.
const VERSIONS: [&str; 1] = ["latest"];

/// Answers on this socket for as long as it is polled. It returns only if the socket cannot be used at all.
pub async fn serve(
    listener: TcpListener,
    network: NetworkId,
    views: watch::Receiver<Arc<View>>,
) -> io::Result<Infallible> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let budget = Budget::new(CONNECTIONS.0, CONNECTIONS.1);
    let mut connections = JoinSet::new();
    loop {
        let (stream, from) = tokio::select! {
            accepted = accept("metadata", || listener.accept()) => accepted,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    warn!(%error, "a metadata connection's task failed");
                }
                continue;
            }
        };
        let Some(permit) = budget.take(from.ip().to_canonical()) else {
            debug!(%from, "too many connections");
            continue;
        };
        let (network, views) = (network.clone(), views.clone());
        connections.spawn(async move {
            serve_connection(stream, from, network, views).await;
            drop(permit);
        });
    }
}

async fn serve_connection(
    stream: TcpStream,
    from: SocketAddr,
    network: NetworkId,
    views: watch::Receiver<Arc<View>>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let view = Arc::clone(&views.borrow());
        let response = respond(&request, &view, &network, from.ip().to_canonical());
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(LIFE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%from, %error, "metadata connection ended"),
        Err(_) => debug!(%from, "metadata connection lasted too long"),
    }
}

fn respond<B>(request: &Request<B>, view: &View, network: &NetworkId, asker: IpAddr) -> Response<Body> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".to_owned());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let Some(found) = Tree { view, network, asker }.walk(request.uri().path()) else {
        return text(StatusCode::NOT_FOUND, "not found\n".to_owned());
    };
    let wants_json = request
        .headers()
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("application/json"));
    if wants_json {
        with_type(StatusCode::OK, "application/json", found.to_string())
    } else {
        text(StatusCode::OK, plain(&found))
    }
}

fn text(status: StatusCode, body: String) -> Response<Body> {
    with_type(status, "text/plain; charset=utf-8", body)
}

fn with_type(status: StatusCode, kind: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// The text of a part of the tree.
fn plain(value: &Value) -> String {
    let further = |value: &Value| if value.is_object() || value.is_array() { "/" } else { "" };
    let mut lines = String::new();
    match value {
        Value::Null => {}
        Value::Bool(value) => return value.to_string(),
        Value::Number(value) => return value.to_string(),
        Value::String(value) => return value.clone(),
        Value::Array(values) => {
            for (i, value) in values.iter().enumerate() {
                match value.get("name").and_then(Value::as_str) {
                    Some(name) => lines.extend([&i.to_string(), "=", name, "\n"]),
                    None => lines.extend([&i.to_string(), further(value), "\n"]),
                }
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                lines.extend([key, further(value), "\n"]);
            }
        }
    }
    lines
}

/// The tree, of which only what a path leads to is made.
struct Tree<'a> {
    view: &'a View,
    network: &'a NetworkId,
    asker: IpAddr,
}

impl Tree<'_> {
    fn walk(&self, path: &str) -> Option<Value> {
        let segments: Vec<String> =
            path.split('/').filter(|segment| !segment.is_empty()).map(decoded).collect::<Option<_>>()?;
        let Some((version, segments)) = segments.split_first() else {
            return Some(VERSIONS.iter().map(|version| ((*version).to_owned(), self.whole())).collect());
        };
        if !VERSIONS.contains(&version.as_str()) {
            return None;
        }
        let (mut value, rest) = match segments.split_first() {
            None => (self.whole(), segments),
            Some((first, rest)) => (self.branch(first)?, rest),
        };
        for segment in rest {
            value = step(value, segment)?;
        }
        Some(value)
    }

    fn whole(&self) -> Value {
        ["self", "containers", "services", "stacks", "hosts", "networks"]
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.branch(name)?)))
            .collect()
    }

    fn branch(&self, name: &str) -> Option<Value> {
        match name {
            "self" => Some(self.own()),
            "containers" => Some(self.endpoints().iter().map(|endpoint| self.container(endpoint)).collect()),
            "services" => Some(self.services(|_| true)),
            "stacks" => Some(self.stacks(|_| true)),
            "hosts" => Some(self.hosts()),
            "networks" => Some(self.network().into_iter().collect()),
            _ => None,
        }
    }

    /// What belongs to whoever asks. A stranger has a host and a network.
    fn own(&self) -> Value {
        let mut own = Map::new();
        let endpoints = self.endpoints();
        let asker = endpoints.iter().find(|endpoint| endpoint.addresses.contains(&self.asker));
        let host = asker.map_or(&self.view.host, |endpoint| &endpoint.host);
        own.extend(self.host(host).map(|host| ("host".to_owned(), host)));
        own.extend(self.network().map(|network| ("network".to_owned(), network)));
        if let Some(asker) = asker {
            own.insert("container".to_owned(), self.container(asker));
            let first = |list: Value| step(list, "0");
            if let Some(stack) = &asker.stack {
                let stack = first(self.stacks(|endpoint| endpoint.stack.as_ref() == Some(stack)));
                own.extend(stack.map(|stack| ("stack".to_owned(), stack)));
                let service =
                    first(self.services(|endpoint| {
                        endpoint.stack == asker.stack && endpoint.service == asker.service
                    }));
                own.extend(service.map(|service| ("service".to_owned(), service)));
            }
        }
        Value::Object(own)
    }

    /// The network's endpoints, by name; those without one last.
    fn endpoints(&self) -> Vec<&Endpoint> {
        let mut endpoints: Vec<&Endpoint> = self.view.endpoints_of(self.network).collect();
        endpoints.sort_by_key(|endpoint| (endpoint.name.is_none(), &endpoint.name, &endpoint.id));
        endpoints
    }

    fn container(&self, endpoint: &Endpoint) -> Value {
        let ports: Vec<String> = endpoint
            .ports
            .iter()
            .map(|port| {
                let protocol = match port.protocol {
                    model::Protocol::Tcp => "tcp",
                    model::Protocol::Udp => "udp",
                };
                format!("{}:{}/{protocol}", port.host_port, port.port)
            })
            .collect();
        json!({
            "name": endpoint.name,
            "uuid": endpoint.id,
            "external_id": endpoint.container,
            "primary_ip": endpoint.addresses.first(),
            "ips": endpoint.addresses,
            "primary_mac_address": endpoint.mac,
            "stack_name": endpoint.stack,
            "service_name": endpoint.service,
            "aliases": endpoint.aliases,
            "labels": endpoint.labels,
            "ports": ports,
            "health_state": if endpoint.healthy { "healthy" } else { "unhealthy" },
            "host": self.view.host_name(&endpoint.host),
            "host_uuid": endpoint.host,
            "network_uuid": endpoint.network,
            "created": endpoint.created,
        })
    }

    /// The services of the endpoints that are wanted, by stack and name, with their containers.
    fn services(&self, wanted: impl Fn(&Endpoint) -> bool) -> Value {
        let mut services: Vec<(&model::Name, &model::Name, Vec<Value>)> = Vec::new();
        let mut endpoints = self.endpoints();
        endpoints.sort_by_key(|endpoint| (&endpoint.stack, &endpoint.service));
        for endpoint in endpoints.into_iter().filter(|endpoint| wanted(endpoint)) {
            let (Some(stack), Some(service)) = (&endpoint.stack, &endpoint.service) else { continue };
            let container = self.container(endpoint);
            match services.last_mut() {
                Some(last) if (last.0, last.1) == (stack, service) => last.2.push(container),
                Some(_) | None => services.push((stack, service, vec![container])),
            }
        }
        services
            .into_iter()
            .map(|(stack, service, containers)| {
                json!({
                    "name": service,
                    "stack_name": stack,
                    "scale": containers.len(),
                    "containers": containers,
                })
            })
            .collect()
    }

    /// The stacks of the endpoints that are wanted, by name, with their services.
    fn stacks(&self, wanted: impl Fn(&Endpoint) -> bool) -> Value {
        let mut stacks: BTreeMap<&str, Vec<Value>> = self
            .view
            .endpoints_of(self.network)
            .filter(|endpoint| wanted(endpoint))
            .filter_map(|endpoint| Some((endpoint.stack.as_ref()?.as_str(), Vec::new())))
            .collect();
        if let Value::Array(services) = self.services(wanted) {
            for service in services {
                let stack = service.get("stack_name").and_then(Value::as_str).unwrap_or_default();
                if let Some(services) = stacks.get_mut(stack) {
                    services.push(service);
                }
            }
        }
        stacks.into_iter().map(|(name, services)| json!({ "name": name, "services": services })).collect()
    }

    /// The hosts that have a part in the network, by name, this one among them.
    fn hosts(&self) -> Value {
        let of_blocks = self.view.catalog.blocks_of(self.network).map(|block| &block.host);
        let of_endpoints = self.view.endpoints_of(self.network).map(|endpoint| &endpoint.host);
        let hosts: BTreeSet<_> = of_blocks
            .chain(of_endpoints)
            .chain([&self.view.host])
            .filter_map(|host| Some((self.view.host_name(host)?, host)))
            .collect();
        hosts.into_iter().filter_map(|(_, host)| self.host(host)).collect()
    }

    fn host(&self, id: &HostId) -> Option<Value> {
        let name = self.view.host_name(id)?;
        let host = self.view.catalog.hosts.get(id);
        Some(json!({
            "name": name,
            "hostname": name,
            "uuid": id,
            "agent_ip": host.and_then(model::Host::underlay).map(|underlay| underlay.address),
            "labels": host.map(|host| &host.labels),
        }))
    }

    fn network(&self) -> Option<Value> {
        let network = self.view.catalog.networks.get(self.network)?;
        Some(json!({
            "name": network.name,
            "uuid": network.id,
            "cidrs": network.cidrs,
            "gateway": network.gateway(),
            "driver": network.driver.name(),
            "internal": network.internal,
            "labels": network.labels,
        }))
    }
}

/// One step down: into a map by key, into a list by index or by name.
fn step(value: Value, segment: &str) -> Option<Value> {
    match value {
        Value::Object(mut map) => map.remove(segment),
        Value::Array(mut values) => {
            let named = |value: &Value| value.get("name").and_then(Value::as_str) == Some(segment);
            let at = values
                .iter()
                .position(named)
                .or_else(|| segment.parse().ok().filter(|at| *at < values.len()))?;
            Some(values.swap_remove(at))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

/// A path's segment without its percent-encoding (RFC 3986 §2.1): a label's key may hold a slash.
fn decoded(segment: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_first_chunk::<2>()?;
            let value = digits
                .iter()
                .try_fold(0, |value, digit| Some(value * 16 + (*digit as char).to_digit(16)?))?;
            bytes.push(value as u8);
            rest = after;
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
