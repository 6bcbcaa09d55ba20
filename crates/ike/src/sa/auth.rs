//! `IKE_AUTH`, both roles (RFC 7296 §1.2, §2.15, §2.21.2): who speaks, and the first child.
//!
//! ```text
//!   HDR, SK {IDi, [CERT…], [N(INITIAL_CONTACT)], [CERTREQ], IDr, AUTH, SAi2, TSi, TSr}  -->
//!                                      <--  HDR, SK {IDr, [CERT…], AUTH, SAr2, TSi, TSr}
//! ```
//!
//! Invariant: an IKE SA is up only after the peer's AUTH was verified against the identity that the configuration
//! names; what goes wrong with the first child does not undo that.

use std::sync::Arc;
use std::time::Duration;

use super::body::need;
use super::create::{self, Offer};
use super::{Body, Cx, Effect, Opening, Phase, Sa, Task};
use crate::auth::{Credential, Identity, SignedOctets};
use crate::config::{PeerConfig, PeerId, PeerKind};
use crate::error::{AuthFailure, Error, Misuse};
use crate::event::Failure;
use crate::proposal::ChildExchange;
use crate::wire::{
    Authentication, CertEncoding, Certificate, ExchangeType, Identification, Nonce, Notify, NotifyType,
    Payload, PayloadType,
};

/// Our `IKE_AUTH`.
#[derive(Debug, Default)]
pub(crate) struct Auth {
    offer: Option<Offer>,
}

impl Auth {
    pub(super) fn offer(&self) -> Option<&Offer> {
        self.offer.as_ref()
    }
}

/// Whose proof.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Initiator,
    Responder,
}

impl Sa {
    pub(super) fn build_auth(&mut self, mut task: Box<Auth>, cx: &mut Cx<'_>) -> Result<(), Error> {
        let config = self.config(cx).ok_or(Misuse::Config("the peer is no longer configured"))?.clone();
        let id = config.our_id.to_wire();
        let auth = self.prove(&config.credential, Side::Initiator, &id)?;
        let mut payloads = vec![Payload::IdInitiator(id)];
        payloads.extend(certificates(&config.credential).into_iter().map(Payload::Cert));
        if self.replaces.is_none() {
            // There is no other with this peer, or this one would have been given up (RFC 7296 §2.4).
            payloads.push(Payload::Notify(Notify::status(NotifyType::InitialContact)));
        }
        payloads.extend(config.trust.cert_request().map(Payload::CertReq));
        payloads.push(Payload::IdResponder(config.id.to_wire()));
        payloads.push(Payload::Auth(auth));
        if let Some(child) = config.children.first() {
            let (offer, wanted) = create::offer(child, child.worker, ChildExchange::Auth, cx);
            task.offer = Some(offer);
            payloads.extend(wanted);
        }
        if config.kind == PeerKind::Foreign {
            payloads.push(Payload::Notify(Notify::status(NotifyType::MobikeSupported)));
        }
        self.send_request(ExchangeType::IkeAuth, &payloads, cx)?;
        self.current = Some(Task::Auth(task));
        Ok(())
    }

    pub(super) fn process_auth(&mut self, task: Auth, body: Body, cx: &mut Cx<'_>) -> Result<(), Error> {
        let config = self.config(cx).ok_or(Misuse::Config("the peer is no longer configured"))?.clone();
        let Some(auth) = &body.auth else {
            create::forget(task.offer.as_ref(), cx);
            // Refused; the peer has forgotten the SA already.
            let why = body.error().map_or(Failure::Misbehaved("no AUTH payload".into()), |it| it.kind.into());
            self.die(why, cx);
            return Ok(());
        };
        let id = need(body.id_r.clone(), PayloadType::IdResponder)?;
        let got = Identity::try_from(&id)?;
        if !config.id.matches(&got) {
            let (got, expected) = (got.to_string(), config.id.to_string());
            return Err(AuthFailure::Identity { got, expected }.into());
        }
        self.verify(&config, Side::Responder, &id, auth, &body.certs, cx)?;
        self.facts.mobike = config.kind == PeerKind::Foreign && body.says(NotifyType::MobikeSupported);
        // RFC 4478: the responder wants to see our proof again in time.
        let lifetime = body
            .notify(NotifyType::AuthLifetime)
            .and_then(|it| <[u8; 4]>::try_from(it.data.as_slice()).ok())
            .map(|it| Duration::from_secs(u64::from(u32::from_be_bytes(it)) / 10 * 9));
        self.reauth_at = lifetime.into_iter().chain(cx.config.timing.reauth).min().map(|age| cx.now + age);
        self.established(false, cx);
        let Some(offer) = task.offer else { return Ok(()) };
        let opening = self.opening.take().ok_or(Misuse::Config("AUTH without IKE_SA_INIT"))?;
        self.accept_child(&offer, (&opening.ni, &opening.nr), &body, cx)
    }

    pub(super) fn respond_auth(&mut self, body: Body, cx: &mut Cx<'_>) -> Result<Vec<Payload>, Error> {
        let refused = |sa: &Self, error: Error, cx: &mut Cx<'_>| {
            let why = Failure::from(&error);
            cx.shared.events.push_back(crate::event::Event::Refused { path: sa.path, why });
            error
        };
        let (peer, config) = whose(&body, cx).map_err(|error| refused(self, error, cx))?;
        let id = need(body.id_i.clone(), PayloadType::IdInitiator)?;
        let auth = need(body.auth.clone(), PayloadType::Auth)?;
        self.verify(&config, Side::Initiator, &id, &auth, &body.certs, cx)
            .map_err(|error| refused(self, error, cx))?;
        let id = config.our_id.to_wire();
        let auth = self.prove(&config.credential, Side::Responder, &id)?;
        let mut payloads = vec![Payload::IdResponder(id)];
        payloads.extend(certificates(&config.credential).into_iter().map(Payload::Cert));
        payloads.push(Payload::Auth(auth));
        if config.kind == PeerKind::Foreign && body.says(NotifyType::MobikeSupported) {
            self.facts.mobike = true;
            payloads.push(Payload::Notify(Notify::status(NotifyType::MobikeSupported)));
        }
        self.peer = Some(peer);
        let initial_contact = body.says(NotifyType::InitialContact);
        self.established(initial_contact, cx);
        let Some(Opening { ni, nr, .. }) = self.opening.take() else {
            return Err(Misuse::Config("AUTH without IKE_SA_INIT").into());
        };
        if body.sa.is_some() {
            match self.respond_child(&config, &body, ChildExchange::Auth, (&ni, &nr), None, cx) {
                Ok((_, answer)) => payloads.extend(answer),
                // The child failed, the IKE SA did not (RFC 7296 §1.2).
                Err(error) => payloads.extend(error.notify().map(Payload::Notify)),
            }
        }
        Ok(payloads)
    }

    fn established(&mut self, initial_contact: bool, cx: &mut Cx<'_>) {
        self.phase = Phase::Up;
        self.give_up_at = None;
        self.established = cx.shared.next_ordinal();
        let spi = self.local_spi();
        cx.effect(Effect::Established { spi, initial_contact });
    }

    fn prove(
        &self,
        credential: &Credential,
        side: Side,
        id: &Identification,
    ) -> Result<Authentication, Error> {
        self.with_octets(side, id, |octets| credential.prove(octets, &self.facts.hashes))
    }

    fn verify(
        &self,
        config: &PeerConfig,
        side: Side,
        id: &Identification,
        auth: &Authentication,
        certs: &[Certificate],
        cx: &Cx<'_>,
    ) -> Result<(), Error> {
        self.with_octets(side, id, |octets| config.trust.verify(octets, auth, certs, cx.unix).map(|_| ()))
    }

    fn with_octets<T>(
        &self,
        side: Side,
        id: &Identification,
        then: impl FnOnce(&SignedOctets<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (Some(crypt), Some(opening)) = (&self.crypt, &self.opening) else {
            return Err(Misuse::Config("AUTH without IKE_SA_INIT").into());
        };
        let (sk_p, message, nonce): (_, _, &Nonce) = match side {
            Side::Initiator => (&crypt.keys.sk_pi, &opening.request, &opening.nr),
            Side::Responder => (&crypt.keys.sk_pr, &opening.response, &opening.ni),
        };
        then(&SignedOctets { prf: crypt.suite.prf, sk_p, message, nonce, id, int_auth: &[] })
    }
}

/// Whether nobody here knows who the initiator claims to be.
pub(super) fn is_stranger(body: &Body, cx: &Cx<'_>) -> bool {
    matches!(whose(body, cx), Err(Error::Unauthenticated(AuthFailure::Unknown(_))))
}

/// Which of our peers the initiator claims to be, of those that know us by the name it calls us.
fn whose(body: &Body, cx: &Cx<'_>) -> Result<(PeerId, Arc<PeerConfig>), Error> {
    let id = body.id_i.as_ref().ok_or(crate::Misbehaved::Missing(PayloadType::IdInitiator))?;
    let claimed = Identity::try_from(id)?;
    let called = body.id_r.as_ref().map(Identity::try_from).transpose()?;
    let fits = |config: &PeerConfig| {
        config.id.matches(&claimed) && called.as_ref().is_none_or(|called| config.our_id.matches(called))
    };
    let found = cx.peers.iter().find(|(_, config)| fits(config));
    found
        .map(|(peer, config)| (*peer, config.clone()))
        .ok_or_else(|| AuthFailure::Unknown(claimed.to_string()).into())
}

/// The CERT payloads; a key without a certificate travels bare (RFC 7670).
fn certificates(credential: &Credential) -> Vec<Certificate> {
    match credential {
        Credential::Key { key, chain } if chain.is_empty() => {
            vec![Certificate { encoding: CertEncoding::RawPublicKey, data: key.public().spki().to_vec() }]
        }
        Credential::Key { .. } | Credential::Psk(_) => credential.certificates(),
    }
}
