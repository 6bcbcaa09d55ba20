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
    /// `POST` [`super::RenewRequest`] → [`super::RenewAnswer`]; agents only: a new certificate for the host's own key.
    pub const CERTIFICATE: &str = "/hosts/self/certificate";
    /// `PUT` [`crate::Step`]; agents only: another life of the host's ledger begins.
    pub const INCARNATION: &str = "/hosts/self/incarnation";
    /// `PUT` [`super::Held`] → [`super::HeldAnswer`]; agents only: what the host holds, after a restore.
    pub const HELD: &str = "/hosts/self/held";
    /// `GET` → list of [`super::UnreportedHost`]; `DELETE` on `/{name or id}`.
    pub const UNREPORTED: &str = "/unreported";
    /// `GET` → list of [`crate::Endpoint`]. `GET` on `/{id}`. `PUT`, `DELETE` on `/{id}`: the agent of its host only.
    pub const ENDPOINTS: &str = "/endpoints";
    /// `GET` → list of [`crate::Block`]. `POST` [`super::LeaseRequest`] → [`crate::Block`]; `DELETE` [`super::GiveBack`]: agents only.
    pub const BLOCKS: &str = "/blocks";
    /// `POST` [`super::ClaimRequest`] → [`crate::Claim`]; `DELETE` [`super::ReleaseClaim`]; `PUT` [`super::Consent`]: agents
    /// only.
    pub const CLAIMS: &str = "/claims";
    /// `DELETE` [`super::ReleaseClaim`]; people only: a retained address is not retained any more.
    pub const RETAINED: &str = "/retained";
    /// `GET` → [`super::IpamView`].
    pub const IPAM: &str = "/ipam";
    /// `PUT` [`super::Heard`]; agents only.
    pub const HEARD: &str = "/hosts/self/heard";
    /// `GET` → list of [`crate::Peer`], without secrets; `POST` [`crate::PeerSpec`] → [`crate::Peer`]. `GET`, `DELETE` on
    /// `/{name or id}`.
    pub const PEERS: &str = "/peers";
    /// `GET` → list of [`super::TokenView`]; `POST` [`super::TokenRequest`] → [`super::TokenCreated`]. `DELETE` on `/{id}`.
    pub const TOKENS: &str = "/tokens";
    /// `GET` → list of [`super::KeyView`]; `POST` [`super::KeyRequest`] → [`super::KeyCreated`]. `DELETE` on `/{name}`.
    pub const KEYS: &str = "/keys";
    /// `GET` → lines of [`super::AuditEntry`]. `?since=MILLISECONDS`; `&follow=true` goes on with what comes.
    pub const AUDIT: &str = "/audit";
    /// `GET` → 200 while the process answers at all; needs no credentials.
    pub const HEALTH: &str = "/healthz";
    /// `GET` → [`super::Readiness`], 200 or 503; needs no credentials.
    pub const READY: &str = "/readyz";
    /// `GET` → metrics in Prometheus' text format; needs a key.
    pub const METRICS: &str = "/metrics";
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
    /// Which request it was: the server's log has it, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// After how many seconds it may be tried again, where waiting helps. It is `Retry-After`, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<u64>,
}

/// The header that carries a request's id, in and out.
pub const REQUEST_ID: &str = "x-request-id";
/// The header by which an agent says which life of its host's ledger asks.
pub const INCARNATION: &str = "x-droveway-incarnation";

impl ApiError {
    /// A refusal of that kind.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), request: None, retry_after: None }
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
    /// 408: the request took too long to arrive.
    TooSlow,
    /// 413: the body is too large.
    TooLarge,
    /// 429: more requests than one may send; try again after [`ApiError::retry_after`].
    TooMany,
    /// 507: no address or block is free.
    Exhausted,
    /// 507: the disk has no room.
    Full,
    /// 410: the revision asked for is gone; take a snapshot.
    Compacted,
    /// 409: the store was restored, and the host has to say first what it holds.
    Unreported,
    /// 409: the host's state directory is a copy, or an old backup: another agent went on with it.
    Copied,
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
            Self::Conflict | Self::InUse | Self::Unreported | Self::Copied => 409,
            Self::Compacted => 410,
            Self::TooSlow => 408,
            Self::TooLarge => 413,
            Self::TooMany => 429,
            Self::Internal => 500,
            Self::Unavailable => 503,
            Self::Exhausted | Self::Full => 507,
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
    /// When the CA's certificate runs out. All hosts have to join anew before that.
    pub ca_expires: UnixMillis,
    /// When the server's own certificate runs out; it renews it long before.
    pub certificate_expires: UnixMillis,
}

/// Whether a process can do its work, part by part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Readiness {
    /// Whether all parts can.
    pub ready: bool,
    /// Each part: `ok`, or why not.
    pub checks: BTreeMap<String, String>,
}

impl Readiness {
    /// Of its parts: `Err` says why one cannot work.
    pub fn of(parts: impl IntoIterator<Item = (&'static str, Result<(), String>)>) -> Self {
        let parts: Vec<_> = parts.into_iter().collect();
        let ready = parts.iter().all(|(_, part)| part.is_ok());
        let told = |part: Result<(), String>| part.err().unwrap_or_else(|| "ok".to_owned());
        Self { ready, checks: parts.into_iter().map(|(name, part)| (name.to_owned(), told(part))).collect() }
    }
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

/// A host asks for a new certificate for the key that it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenewRequest {
    /// Certificate signing request (RFC 2986), PEM, signed with the key the host joined with.
    pub csr: String,
}

/// A new certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RenewAnswer {
    /// The certificate, PEM.
    pub certificate: String,
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

/// What a host holds: all blocks and claims in its ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Held {
    /// Its blocks, each with the revision of its lease.
    pub blocks: Vec<Block>,
    /// Its claims.
    pub claims: Vec<Claim>,
}

/// What became of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HeldAnswer {
    /// What the host cannot keep, for a person.
    pub conflicts: Vec<String>,
}

/// A host that has not said what it holds since the store was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct UnreportedHost {
    /// Its id.
    pub host: HostId,
    /// Its name.
    pub name: Name,
    /// When the store was restored.
    pub since: UnixMillis,
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
    /// When the certificate runs out that its agent showed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_expires: Option<UnixMillis>,
    /// How often its agent was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<u64>,
    /// That a copy of its state directory came, and was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<RefusedCopy>,
    /// Its blocks.
    pub blocks: Vec<Block>,
    /// How many endpoints it has.
    pub endpoints: usize,
}

/// An agent that came with a copy of a host's state directory, or with an old one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RefusedCopy {
    /// When it was refused last.
    pub at: UnixMillis,
    /// From where it came.
    #[schema(value_type = String)]
    pub from: IpAddr,
    /// How often that happened.
    pub times: u64,
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
    /// For whom it is retained ([`crate::Retained::owner`]): the address that is, or a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain: Option<String>,
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
    /// Which request for a retained address is meant ([`crate::Wanted::at`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Revision>,
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
    /// When it was revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<UnixMillis>,
}

/// What the holder of a key may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Everything.
    #[default]
    Admin,
    /// Look at everything, metrics and the audit log included; change nothing.
    Read,
}

impl Role {
    /// As the API has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Read => "read",
        }
    }
}

/// Asks for an API key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyRequest {
    /// What it is called, in lists and in the audit log.
    pub name: Name,
    /// What its holder may do.
    #[serde(default)]
    pub role: Role,
    /// For how long, in seconds; without end if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
}

/// A key, this once with its text.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct KeyCreated {
    /// The key as text: what `Authorization: Bearer` takes.
    pub key: String,
    /// What can be seen of it later.
    #[serde(flatten)]
    pub view: KeyView,
}

/// What can be seen of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct KeyView {
    /// Its name.
    pub name: String,
    /// What its holder may do.
    pub role: Role,
    /// When it was made.
    pub created: UnixMillis,
    /// When it ends, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<UnixMillis>,
}

/// One line of the audit log: somebody who was known asked for a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditEntry {
    /// Its number in this server's log, without gaps.
    pub number: u64,
    /// When it was done or refused.
    pub at: UnixMillis,
    /// The request's id: the server's log has it, too.
    pub request: String,
    /// Who asked: `key NAME`, `host NAME (ID)` or `token ID`.
    pub who: String,
    /// From which address and port.
    pub from: String,
    /// What was asked: the method and the path.
    pub what: String,
    /// What it was about, where the path does not say it: `network "red"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it was not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<ErrorCode>,
    /// The revision that it made, if it changed anything. A request that made several has a line for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<Revision>,
}

/// How a request for a change ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is done, or was so already.
    Done,
    /// It may not or cannot be.
    Refused,
    /// A fault of ours; whether it is done has to be looked at.
    Failed,
}
