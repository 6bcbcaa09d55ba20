//! What travels over the server's API: requests, answers and errors. Objects themselves are in the room's root.
//!
//! All paths begin with [`path::PREFIX`]. People send `Authorization: Bearer KEY`; agents show a client certificate.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    Block, Candidate, Claim, EndpointId, EnvironmentId, Epoch, Fingerprint, Host, HostId, Name, Network,
    Revision, UnixMillis, Withdrawn,
};

/// Where things are.
pub mod path {
    /// Before every path that belongs to an environment: `/v1/environments/{environment}`.
    pub const PREFIX: &str = "/v1/environments";
    /// `GET` → [`super::ServerInfo`]; needs no credentials.
    pub const INFO: &str = "/v1/info";
    /// `POST` [`super::JoinRequest`] → [`super::JoinAnswer`]; the token in it is the credential.
    pub const JOIN: &str = "/join";
    /// `GET` → lines of [`crate::Watch`]; agents only. `?epoch=&revision=` resumes.
    pub const WATCH: &str = "/watch";
    /// `GET` → list of [`crate::Network`]; `POST` [`crate::NetworkSpec`] → [`crate::Network`]. `GET`, `DELETE` on `/{name or id}`.
    pub const NETWORKS: &str = "/networks";
    /// `GET` → list of [`super::HostView`]. `GET`, `DELETE`, `PATCH` [`super::HostPatch`] on `/{name or id}`.
    pub const HOSTS: &str = "/hosts";
    /// `PUT` [`super::HostReport`]; agents only: what the host says of itself.
    pub const SELF: &str = "/hosts/self";
    /// `GET` → list of [`crate::Endpoint`]. `GET` on `/{id}`. `PUT`, `DELETE` on `/{id}`: the agent of its host only.
    pub const ENDPOINTS: &str = "/endpoints";
    /// `GET` → list of [`crate::Block`]. `POST` [`super::LeaseRequest`] → [`crate::Block`]; `DELETE` [`super::GiveBack`]: agents only.
    pub const BLOCKS: &str = "/blocks";
    /// `POST` [`super::ClaimRequest`] → [`crate::Claim`]; `DELETE` [`super::ReleaseClaim`]; `PUT` [`super::Consent`]: agents
    /// only.
    pub const CLAIMS: &str = "/claims";
    /// `GET` → [`super::IpamView`].
    pub const IPAM: &str = "/ipam";
    /// `PUT` [`super::Heard`]; agents only.
    pub const HEARD: &str = "/hosts/self/heard";
    /// `GET` → list of [`crate::Peer`], without secrets; `POST` [`crate::PeerSpec`] → [`crate::Peer`]. `GET`, `DELETE` on
    /// `/{name or id}`.
    pub const PEERS: &str = "/peers";
    /// `GET` → list of [`super::TokenView`]; `POST` [`super::TokenRequest`] → [`super::TokenCreated`]. `DELETE` on `/{id}`.
    pub const TOKENS: &str = "/tokens";
}

/// The largest body the server reads, in bytes.
pub const BODY_MAX: usize = 1 << 20;

/// Every refusal, whatever its HTTP status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind of refusal.
    pub code: ErrorCode,
    /// What happened, to what, and what to do: for a person.
    pub message: String,
}

impl ApiError {
    /// A refusal of that kind.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Kinds of refusal; each has one HTTP status and one exit code of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// 400: the request cannot be understood or cannot be true.
    Invalid,
    /// 401: no valid key, certificate or token.
    Unauthenticated,
    /// 403: valid credentials, but not for this.
    Forbidden,
    /// 404: no such thing.
    NotFound,
    /// 409: it clashes with what is there.
    Conflict,
    /// 409: it is in use.
    InUse,
    /// 413: the body is too large.
    TooLarge,
    /// 507: no address or block is free.
    Exhausted,
    /// 410: the revision asked for is gone; take a snapshot.
    Compacted,
    /// 500: a fault of ours.
    Internal,
    /// 503: not now; try again.
    Unavailable,
}

impl ErrorCode {
    /// The HTTP status.
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::Conflict | Self::InUse => 409,
            Self::Compacted => 410,
            Self::TooLarge => 413,
            Self::Internal => 500,
            Self::Unavailable => 503,
            Self::Exhausted => 507,
        }
    }
}

/// What anyone may know of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ServerInfo {
    /// The version of the program.
    pub version: String,
    /// SHA-256 of the CA certificate: compare it with the one in the token.
    pub ca: Fingerprint,
    /// The life of the store.
    pub epoch: Epoch,
    /// The state's number.
    pub revision: Revision,
}

/// A host asks to be let in. It makes its own key and sends only a signing request.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// [`crate::JoinToken`] as text.
    pub token: String,
    /// Certificate signing request (RFC 2986), PEM. Its subject is ignored.
    pub csr: String,
    /// The name it would like.
    pub name: Name,
    /// Where it may be reached.
    pub candidates: Vec<Candidate>,
    /// What its owner says of it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its own routes: an environment whose networks collide with them is refused.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub routes: Vec<HostRoute>,
}

/// A route that a host has outside Droveway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostRoute {
    /// Where to.
    #[schema(value_type = String)]
    pub cidr: IpNet,
    /// By which interface.
    pub device: String,
}

/// A host is let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JoinAnswer {
    /// Who it is now.
    pub host: HostId,
    /// Which environment it belongs to.
    pub environment: EnvironmentId,
    /// Its certificate, PEM.
    pub certificate: String,
    /// The environment's CA certificate, PEM.
    pub ca: String,
}

/// What a host says of itself, whenever it changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostReport {
    /// Where it may be reached, best first.
    pub candidates: Vec<Candidate>,
    /// Its own routes.
    #[serde(default)]
    pub routes: Vec<HostRoute>,
    /// The version of its agent.
    pub version: String,
}

/// A host, with what the server knows of its connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostView {
    /// The host.
    #[serde(flatten)]
    pub host: Host,
    /// Whether its agent watches now.
    pub connected: bool,
    /// When its agent was last heard of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<UnixMillis>,
    /// The version of its agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Its blocks.
    pub blocks: Vec<Block>,
    /// How many endpoints it has.
    pub endpoints: usize,
}

/// Changes what an owner says of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostPatch {
    /// Labels to set (`Some`) or to remove (`None`).
    #[serde(default)]
    pub labels: BTreeMap<String, Option<String>>,
}

/// A host asks for one more block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseRequest {
    /// Name or id of the network.
    pub network: String,
    /// How many blocks of it the host has already. A repeated request with the same number gets the same block, so a
    /// lost answer leaks nothing.
    pub held: usize,
}

/// A host gives a block back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GiveBack {
    /// Name or id of the network.
    pub network: String,
    /// The block.
    #[schema(value_type = String)]
    pub cidr: IpNet,
    /// Which lease of it is meant: one that comes late takes no later one away. Whichever there is, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leased: Option<Revision>,
}

/// A host asks for one given address outside its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClaimRequest {
    /// Name or id of the network.
    pub network: String,
    /// The address; any that is in no block, where no block is free, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub address: Option<IpAddr>,
    /// The endpoint it is for.
    pub endpoint: EndpointId,
    /// It is for the router of a host that holds no block.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub router: bool,
}

/// A host lets go of an address in one of its blocks that another host asked for, or does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Consent {
    /// Name or id of the network.
    pub network: String,
    /// The address.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// The endpoint that it is asked for.
    pub endpoint: EndpointId,
    /// Whether it lets go: from now on it gives the address to nobody.
    pub consents: bool,
}

/// A host has taken in all that was up to a revision: nothing on it leads to a block that was withdrawn before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Heard {
    /// The life of the store that the revision is of.
    pub epoch: Epoch,
    /// The revision.
    pub revision: Revision,
}

/// Who may give which addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct IpamView {
    /// The networks.
    pub networks: Vec<Network>,
    /// The leased blocks.
    pub blocks: Vec<Block>,
    /// The blocks that were given back and are not free yet.
    pub withdrawn: Vec<Withdrawn>,
    /// The claimed addresses.
    pub claims: Vec<Claim>,
}

/// A host gives a claimed address back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleaseClaim {
    /// Name or id of the network.
    pub network: String,
    /// The address.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// The endpoint it was claimed for: one that comes late takes no later claim away. Whichever there is, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<EndpointId>,
}

/// Asks for a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// How many hosts may join with it; no limit if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses: Option<u32>,
    /// For how long, in seconds; a day if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
}

/// A token, this once with its secret.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenCreated {
    /// The token as text: what `--token` takes.
    pub token: String,
    /// What can be seen of it later.
    #[serde(flatten)]
    pub view: TokenView,
}

/// What can be seen of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenView {
    /// Its id.
    pub id: String,
    /// When it was made.
    pub created: UnixMillis,
    /// When it ends.
    pub expires: UnixMillis,
    /// How often it may still be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses_left: Option<u32>,
    /// How often it was used.
    pub used: u32,
}
