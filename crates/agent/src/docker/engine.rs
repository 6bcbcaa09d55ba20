//! A client of the engine's API: the few calls that the follower makes, over the engine's Unix socket.
//!
//! Versions: the lowest that has all that is used (1.41, Docker 20.10), or the oldest that the engine still speaks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{Client, Method, StatusCode};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;

use super::Error;

/// The version that the calls here are written for.
const VERSION: (u32, u32) = (1, 41);
/// An inspection waits for the container's lock, which a slow start holds.
const TIMEOUT: Duration = Duration::from_mins(1);
/// The longest event that is read, in bytes.
const EVENT_MAX: usize = 1 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum EngineError {
    /// Nobody answers.
    #[error("Docker's engine at {socket}: {why}")]
    Unreachable { socket: PathBuf, why: String },
    /// It refused.
    #[error("Docker's engine refused {what}: {message} (HTTP {status})")]
    Refused { what: String, status: StatusCode, message: String },
    /// It said something that is not known.
    #[error("Docker's engine answered {what} with something else than expected: {why}")]
    Strange { what: String, why: String },
}

/// The client.
#[derive(Clone)]
pub(super) struct Engine {
    socket: PathBuf,
    client: Client,
    prefix: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Version {
    #[serde(rename = "Version")]
    pub(super) engine: String,
    #[serde(rename = "ApiVersion")]
    pub(super) newest: String,
    #[serde(default, rename = "MinAPIVersion")]
    pub(super) oldest: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Network {
    pub(super) name: String,
    pub(super) id: String,
    #[serde(default)]
    pub(super) driver: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) options: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_default", rename = "IPAM")]
    pub(super) ipam: Ipam,
    /// Only where the network was inspected by itself: the endpoints, by container or, where they have none, by `ep-ID`.
    #[serde(default, deserialize_with = "or_default")]
    pub(super) containers: BTreeMap<String, NetworkContainer>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Ipam {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) config: Vec<IpamConfig>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct IpamConfig {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) auxiliary_addresses: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NetworkContainer {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default, rename = "EndpointID")]
    pub(super) endpoint_id: String,
    #[serde(default, rename = "IPv4Address")]
    pub(super) ipv4_address: String,
}

/// One line of `/containers/json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Summary {
    pub(super) id: String,
    /// `running`, `exited` and so on.
    #[serde(default)]
    pub(super) state: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) network_settings: NetworkSettings,
}

/// An inspected container.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Container {
    pub(super) id: String,
    pub(super) name: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) state: ContainerState,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) config: ContainerConfig,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) host_config: HostConfig,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) network_settings: NetworkSettings,
    #[serde(default)]
    pub(super) resolv_conf_path: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ContainerState {
    #[serde(default)]
    pub(super) running: bool,
    #[serde(default)]
    pub(super) health: Option<Health>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Health {
    #[serde(default)]
    pub(super) status: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ContainerConfig {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct HostConfig {
    /// `default`, `bridge`, `none`, `host`, `container:ID`, or a network's name.
    #[serde(default)]
    pub(super) network_mode: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) dns: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NetworkSettings {
    /// The file of the container's network namespace, while it runs.
    #[serde(default)]
    pub(super) sandbox_key: PathBuf,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) networks: BTreeMap<String, Attachment>,
}

/// A container's part of a network.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Attachment {
    #[serde(default, rename = "NetworkID")]
    pub(super) network_id: String,
    /// Empty while the container does not run.
    #[serde(default, rename = "EndpointID")]
    pub(super) endpoint_id: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) aliases: Vec<String>,
}

/// One line of `/events`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Event {
    pub(super) r#type: String,
    pub(super) action: String,
    pub(super) actor: Actor,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Actor {
    #[serde(rename = "ID")]
    pub(super) id: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) attributes: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
struct Message {
    message: String,
}

impl Engine {
    pub(super) fn new(socket: &Path) -> Result<Self, Error> {
        // No TLS is spoken on a Unix socket, but the client wants to know how it would be.
        let tls = crate::tls::nobody().map_err(|why| Error::Client(why.to_string()))?;
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .unix_socket(socket)
            .build()
            .map_err(|why| Error::Client(why.to_string()))?;
        Ok(Self { socket: socket.to_owned(), client, prefix: String::new() })
    }

    /// Asks who it is and speaks its language from then on.
    pub(super) async fn connect(&mut self) -> Result<Version, EngineError> {
        self.prefix.clear();
        let version: Version = self.get("/version").await?;
        let (major, minor) = choose(&version);
        self.prefix = format!("/v{major}.{minor}");
        Ok(version)
    }

    pub(super) async fn networks(&self) -> Result<Vec<Network>, EngineError> {
        self.get("/networks").await
    }

    pub(super) async fn network(&self, id: &str) -> Result<Option<Network>, EngineError> {
        gone(self.get(&format!("/networks/{id}")).await)
    }

    pub(super) async fn create_network(&self, network: &model::Network) -> Result<(), EngineError> {
        let id = [(super::NETWORK_KEY, network.id.as_str())];
        let id: BTreeMap<_, _> = id.into();
        let body = json!({
            "Name": network.name,
            "CheckDuplicate": true,
            "Driver": super::DRIVER,
            "Internal": network.internal,
            "EnableIPv6": false,
            "IPAM": {
                "Driver": super::DRIVER,
                "Config": [{ "Subnet": network.pool(), "Gateway": network.gateway() }],
                "Options": id,
            },
            "Options": id,
            "Labels": id,
        });
        let what = format!("to create network {:?}", network.name.as_str());
        self.send::<IgnoredAny>(Method::POST, "/networks/create", Some(&body), what).await.map(drop)
    }

    pub(super) async fn remove_network(&self, id: &str) -> Result<(), EngineError> {
        let what = format!("to remove network {id:.12}");
        gone(self.bytes(Method::DELETE, &format!("/networks/{id}"), None::<&()>, what).await).map(drop)
    }

    pub(super) async fn containers(&self) -> Result<Vec<Summary>, EngineError> {
        self.get("/containers/json?all=1").await
    }

    pub(super) async fn container(&self, id: &str) -> Result<Option<Container>, EngineError> {
        gone(self.get(&format!("/containers/{id}/json")).await)
    }

    /// What happens from now on.
    pub(super) async fn events(&self) -> Result<Events, EngineError> {
        let filters = json!({
            "type": ["container", "network"],
            "event": ["start", "die", "destroy", "rename", "health_status", "connect", "disconnect", "create"],
        });
        let request = self
            .client
            .request(Method::GET, format!("http://docker{}/events", self.prefix))
            .query(&[("filters", filters.to_string())]);
        let response = request.send().await.map_err(|why| self.unreachable(&why))?;
        if !response.status().is_success() {
            return Err(refused("to tell of events".to_owned(), response).await);
        }
        Ok(Events { response, buffer: Vec::new() })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, EngineError> {
        self.send(Method::GET, path, None::<&()>, format!("GET {path}")).await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        what: String,
    ) -> Result<T, EngineError> {
        let bytes = self.bytes(method, path, body, what.clone()).await?;
        serde_json::from_slice(&bytes).map_err(|why| EngineError::Strange { what, why: why.to_string() })
    }

    async fn bytes(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        what: String,
    ) -> Result<Vec<u8>, EngineError> {
        let mut request =
            self.client.request(method, format!("http://docker{}{path}", self.prefix)).timeout(TIMEOUT);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|why| self.unreachable(&why))?;
        if !response.status().is_success() {
            return Err(refused(what, response).await);
        }
        Ok(response.bytes().await.map_err(|why| self.unreachable(&why))?.to_vec())
    }

    fn unreachable(&self, why: &dyn std::error::Error) -> EngineError {
        // The first cause says what happened; those above it say "error sending request".
        let mut cause = why;
        while let Some(source) = cause.source() {
            cause = source;
        }
        EngineError::Unreachable { socket: self.socket.clone(), why: cause.to_string() }
    }
}

/// The stream of events.
pub(super) struct Events {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Events {
    /// The next one, or `None` when the engine has gone. May be dropped and called again: nothing is lost.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, EngineError> {
        let strange = |why: String| EngineError::Strange { what: "GET /events".to_owned(), why };
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map(Some).map_err(|why| strange(why.to_string()));
            }
            if self.buffer.len() > EVENT_MAX {
                return Err(strange(format!("an event is longer than {EVENT_MAX} bytes")));
            }
            match self.response.chunk().await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                // A reset and an end are the same here: it is gone.
                Ok(None) | Err(_) => return Ok(None),
            }
        }
    }
}

/// The version to speak.
fn choose(version: &Version) -> (u32, u32) {
    let parse = |text: &str| {
        let (major, minor) = text.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    };
    let newest = parse(&version.newest).unwrap_or(VERSION);
    let oldest = parse(&version.oldest).unwrap_or((1, 12));
    VERSION.min(newest).max(oldest)
}

fn gone<T>(result: Result<T, EngineError>) -> Result<Option<T>, EngineError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(EngineError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
        Err(why) => Err(why),
    }
}

async fn refused(what: String, response: reqwest::Response) -> EngineError {
    let status = response.status();
    let body = response.bytes().await.unwrap_or_default();
    let message = serde_json::from_slice::<Message>(&body)
        .map_or_else(|_| String::from_utf8_lossy(&body).chars().take(300).collect(), |body| body.message);
    EngineError::Refused { what, status, message }
}

/// Go writes an empty list or map as `null`.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(from).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_ours_unless_the_engine_is_older_or_has_dropped_it() {
        let chosen = |api: &str, min: &str| {
            choose(&Version { engine: String::new(), newest: api.into(), oldest: min.into() })
        };
        assert_eq!(chosen("1.41", "1.12"), (1, 41), "Docker 20.10");
        assert_eq!(chosen("1.50", "1.24"), (1, 41), "Docker 28");
        assert_eq!(chosen("1.52", "1.44"), (1, 44), "Docker 29");
        assert_eq!(chosen("1.39", ""), (1, 39));
    }
}
