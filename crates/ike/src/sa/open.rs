//! `IKE_SA_INIT`, both roles (RFC 7296 §1.2, §2.6, §2.7, §2.23).
//!
//! ```text
//!   HDR, [N(COOKIE)], SAi1, KEi, Ni, N(NAT…)  -->
//!                          <--  HDR, N(COOKIE)  |  N(INVALID_KE_PAYLOAD)  |  SAr1, KEr, Nr, N(NAT…), [CERTREQ]
//! ```
//!
//! Nothing in this exchange is authenticated. A refusal is therefore a hint: it is believed only when no better
//! answer has come by the time of the next retransmission (RFC 7296 §2.21.1).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use super::auth::Auth;
use super::body::need;
use super::{Body, Cx, IKE_PORT, Opening, Phase, Sa, Task};
use crate::auth::{SUPPORTED_HASHES, Trust};
use crate::config::{ESP_PORT, PeerConfig, PeerId, PeerKind};
use crate::crypto::{Group, IkeKeys, KeyPair, nat_detection_hash};
use crate::error::{Error, Incompatible, Misbehaved};
use crate::event::{Failure, Path};
use crate::proposal::IkeOffer;
use crate::wire::{
    CertRequest, ExchangeType, Flags, Header, IkeSpi, IkeSpis, Message, Nonce, Notify, NotifyType, Payload,
    PayloadType,
};

/// How often a responder may make us begin anew before it is no use: cookie, group, and each once more.
const RESTARTS: u32 = 4;

/// Our `IKE_SA_INIT`.
#[derive(Debug)]
pub(crate) struct Open {
    nonce: Nonce,
    group: Option<Group>,
    pair: Option<KeyPair>,
    cookie: Option<Vec<u8>>,
    restarts: u32,
    /// The request as sent, which AUTH covers.
    request: Vec<u8>,
}

impl Sa {
    /// A new IKE SA that we open.
    pub(crate) fn initiate(peer: PeerId, path: Path, cx: &mut Cx<'_>) -> Self {
        let spis = IkeSpis { initiator: cx.shared.ike_spi(), responder: IkeSpi::ZERO };
        let mut sa = Self::new(spis, true, path, Phase::Init, cx);
        sa.peer = Some(peer);
        let nonce = Nonce::random(&mut cx.shared.random);
        let open = Open { nonce, group: None, pair: None, cookie: None, restarts: 0, request: Vec::new() };
        sa.push(Task::Open(Box::new(open)));
        sa
    }

    pub(super) fn build_open(&mut self, mut task: Box<Open>, cx: &mut Cx<'_>) -> Result<(), Error> {
        let config =
            self.config(cx).ok_or(crate::Misuse::Config("the peer is no longer configured"))?.clone();
        let group = task.group.or(config.ike.groups.first().copied());
        let group = group.ok_or(crate::Misuse::Config("no group is set for the key exchange"))?;
        // The same key pair goes with a cookie: only a new group asks for another (RFC 7296 §2.6.1).
        let pair = match task.pair.take().filter(|pair| pair.group() == group) {
            Some(pair) => pair,
            None => KeyPair::generate(group, &mut cx.shared.random)?,
        };
        let mut payloads = Vec::new();
        payloads.extend(
            task.cookie.iter().map(|it| Payload::Notify(Notify::with_data(NotifyType::Cookie, it.clone()))),
        );
        payloads.push(Payload::Sa(config.ike.request(None)));
        payloads.push(Payload::Ke(pair.ke()));
        payloads.push(Payload::Nonce(task.nonce.clone()));
        payloads.extend(nat_notifies(&self.spis, self.path, config.kind == PeerKind::Foreign));
        payloads.extend(capabilities());
        let header = Header {
            spis: self.spis,
            exchange: ExchangeType::IkeSaInit,
            flags: Flags { initiator: true, version: false, response: false },
            message_id: 0,
        };
        let request = Message { header, payloads }.emit_clear()?;
        cx.shared.send(self.path, &request);
        self.window.sent(vec![request.clone()], &cx.config.timing, cx.now);
        task.pair = Some(pair);
        task.request = request;
        self.current = Some(Task::Open(task));
        Ok(())
    }

    pub(super) fn process_open(
        &mut self,
        mut task: Box<Open>,
        body: Body,
        bytes: &[u8],
        cx: &mut Cx<'_>,
    ) -> Result<(), Error> {
        let config =
            self.config(cx).ok_or(crate::Misuse::Config("the peer is no longer configured"))?.clone();
        let answer = match (body.notify(NotifyType::Cookie), body.error()) {
            (Some(cookie), _) => Answer::Again { cookie: Some(cookie.data.clone()), group: None },
            (None, Some(refusal)) => match wanted_group(refusal, &config.ike) {
                Some(group) if task.group != Some(group) => {
                    Answer::Again { cookie: None, group: Some(group) }
                }
                Some(_) | None => Answer::Refused(Failure::from(refusal.kind)),
            },
            (None, None) => Answer::Agreed,
        };
        match answer {
            Answer::Again { cookie, group } if task.restarts < RESTARTS => {
                task.restarts += 1;
                task.cookie = cookie.or(task.cookie);
                task.group = group.or(task.group);
                self.window.restart();
                self.push(Task::Open(task));
                Ok(())
            }
            Answer::Again { .. } => {
                self.hint = Some(Failure::Misbehaved("it asks for cookies or groups without end".into()));
                self.current = Some(Task::Open(task));
                Ok(())
            }
            Answer::Refused(why) => {
                self.hint = Some(why);
                self.current = Some(Task::Open(task));
                Ok(())
            }
            Answer::Agreed => {
                // What is wrong in a message without proof is nobody's fault for certain: wait for a right one.
                match self.agree(&mut task, body, bytes, &config) {
                    Ok(()) => {
                        self.hint = None;
                        self.window.answered(0);
                        self.float(cx);
                        self.phase = Phase::Auth;
                        self.push(Task::Auth(Box::<Auth>::default()));
                    }
                    Err(error) => {
                        self.hint = Some(Failure::from(&error));
                        self.current = Some(Task::Open(task));
                    }
                }
                Ok(())
            }
        }
    }

    fn agree(&mut self, task: &mut Open, body: Body, bytes: &[u8], config: &PeerConfig) -> Result<(), Error> {
        let (header, _, _) = Header::parse(bytes)?;
        if header.spis.responder.is_zero() {
            return Err(Misbehaved::Protocol("the responder's SPI is zero").into());
        }
        let spis = IkeSpis { initiator: self.spis.initiator, responder: header.spis.responder };
        self.learn(&body, &spis)?;
        let answer = need(body.sa, PayloadType::Sa)?;
        let ke = need(body.ke, PayloadType::Ke)?;
        let nr = need(body.nonce, PayloadType::Nonce)?;
        let selected = config.ike.accept(&config.ike.request(None), &answer)?;
        let pair = task.pair.as_ref().ok_or(Misbehaved::Missing(PayloadType::Ke))?;
        if selected.suite.group != pair.group() || ke.group != pair.group().id() {
            return Err(Misbehaved::NotOffered.into());
        }
        let shared = pair.agree(&ke.data)?;
        self.spis = spis;
        self.set_keys(selected.suite, IkeKeys::initial(&selected.suite, &shared, &task.nonce, &nr, &spis))?;
        self.set_nonces(&task.nonce, &nr);
        self.opening = Some(Opening {
            request: std::mem::take(&mut task.request),
            response: bytes.to_vec(),
            ni: task.nonce.clone(),
            nr,
        });
        Ok(())
    }

    /// What began at port 500 goes on where ESP goes too (RFC 7296 §2.23).
    fn float(&mut self, cx: &mut Cx<'_>) {
        let Path { mut local, mut remote } = self.path;
        if local.port() == IKE_PORT {
            local.set_port(cx.config.port);
            if remote.port() == IKE_PORT {
                remote.set_port(ESP_PORT);
            }
            self.set_path(Path { local, remote }, cx);
        }
    }

    /// What the peer's first message says of it.
    fn learn(&mut self, body: &Body, spis: &IkeSpis) -> Result<(), Error> {
        // In the request the responder's SPI is still zero, and the hash covers it so (RFC 7296 §2.23).
        let spis = if self.opener { *spis } else { IkeSpis { responder: IkeSpi::ZERO, ..*spis } };
        let differs = |kind, address| {
            let hash = nat_detection_hash(&spis, address);
            let mut said = body.notifies.iter().filter(|it| it.kind == kind).peekable();
            said.peek().is_some() && said.all(|it| it.data != hash)
        };
        self.facts.nat_there = differs(NotifyType::NatDetectionSourceIp, self.path.remote);
        self.facts.nat_here = differs(NotifyType::NatDetectionDestinationIp, self.path.local);
        self.facts.fragments = body.says(NotifyType::FragmentationSupported);
        if let Some(hashes) = body.notify(NotifyType::SignatureHashAlgorithms) {
            self.facts.hashes = hashes.parse_hash_algorithms()?;
        }
        Ok(())
    }
}

/// What a responder's answer amounts to.
enum Answer {
    Again { cookie: Option<Vec<u8>>, group: Option<Group> },
    Refused(Failure),
    Agreed,
}

/// The group that a refusal asks for, if we offered it.
pub(super) fn wanted_group(refusal: &Notify, offer: &IkeOffer) -> Option<Group> {
    refusal.wanted_group().and_then(Group::from_id).filter(|group| offer.groups.contains(group))
}

/// A stranger's `IKE_SA_INIT`: the half-open SA, whose answer is on its way, or the error to answer with. `config` is
/// that of the peer with this address, if one has it.
pub(crate) fn respond_init(
    message: &Message,
    bytes: &[u8],
    path: Path,
    config: Option<&Arc<PeerConfig>>,
    cx: &mut Cx<'_>,
) -> Result<Sa, Error> {
    let body = Body::sort(message.payloads.clone())?;
    let spis = IkeSpis { initiator: message.header.spis.initiator, responder: cx.shared.ike_spi() };
    let mut sa = Sa::new(spis, false, path, Phase::HalfOpen, cx);
    sa.learn(&body, &spis)?;
    let offered = need(body.sa, PayloadType::Sa)?;
    let ke = need(body.ke, PayloadType::Ke)?;
    let ni = need(body.nonce, PayloadType::Nonce)?;
    let offer = config.map_or(&cx.config.ike, |config| &config.ike);
    let selected = offer.select(&offered, ke.group)?;
    let group = selected.suite.group;
    if group.id() != ke.group {
        return Err(Incompatible::WrongGroup { wanted: group }.into());
    }
    let pair = KeyPair::generate(group, &mut cx.shared.random)?;
    let shared = pair.agree(&ke.data)?;
    let nr = Nonce::random(&mut cx.shared.random);
    let foreign = config.is_some_and(|config| config.kind == PeerKind::Foreign);
    let mut payloads =
        vec![Payload::Sa(selected.answer(None)), Payload::Ke(pair.ke()), Payload::Nonce(nr.clone())];
    payloads.extend(nat_notifies(&spis, path, foreign || path.local.port() == IKE_PORT));
    payloads.extend(cert_request(config, cx).map(Payload::CertReq));
    payloads.extend(capabilities());
    let flags = Flags { initiator: false, version: false, response: true };
    let header = Header { spis, flags, ..message.header };
    let response = Message { header, payloads }.emit_clear()?;
    cx.shared.send(path, &response);
    sa.window.reply(vec![response.clone()]);
    sa.set_keys(selected.suite, IkeKeys::initial(&selected.suite, &shared, &ni, &nr, &spis))?;
    sa.set_nonces(&ni, &nr);
    sa.opening = Some(Opening { request: bytes.to_vec(), response, ni, nr });
    sa.give_up_at = Some(cx.now + cx.config.timing.half_open);
    Ok(sa)
}

/// Which certificates a stranger should bring: those of the peer with its address, or of all that need any.
fn cert_request(config: Option<&Arc<PeerConfig>>, cx: &Cx<'_>) -> Option<CertRequest> {
    if let Some(config) = config {
        return config.trust.cert_request();
    }
    let with_ca = |trust: &Trust| matches!(trust, Trust::Authority { .. });
    let mut requests =
        cx.peers.values().filter(|it| with_ca(&it.trust)).filter_map(|it| it.trust.cert_request());
    let mut request = requests.next()?;
    for other in requests.take(15) {
        for hash in other.authorities.chunks(20) {
            if !request.authorities.chunks(20).any(|it| it == hash) {
                request.authorities.extend_from_slice(hash);
            }
        }
    }
    Some(request)
}

fn capabilities() -> [Payload; 2] {
    [
        Payload::Notify(Notify::status(NotifyType::FragmentationSupported)),
        Payload::Notify(Notify::hash_algorithms(&SUPPORTED_HASHES)),
    ]
}

/// `NAT_DETECTION_*_IP` (RFC 7296 §2.23). A foreign peer encapsulates in UDP only if it believes in a NAT, so to it
/// we claim an address that no one has.
pub(super) fn nat_notifies(spis: &IkeSpis, path: Path, feign: bool) -> [Payload; 2] {
    let nowhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
    let source = nat_detection_hash(spis, if feign { nowhere } else { path.local });
    let destination = nat_detection_hash(spis, path.remote);
    [
        Payload::Notify(Notify::with_data(NotifyType::NatDetectionSourceIp, source.to_vec())),
        Payload::Notify(Notify::with_data(NotifyType::NatDetectionDestinationIp, destination.to_vec())),
    ]
}
