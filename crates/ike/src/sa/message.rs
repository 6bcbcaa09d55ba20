//! Messages of one IKE SA, in and out: who may be heard, in which order, and what an error is answered with.

use super::window::Seen;
use super::{Body, Cx, Effect, Phase, Sa, Task};
use crate::config::PeerKind;
use crate::error::{Error, Misbehaved};
use crate::event::{Failure, Path};
use crate::wire::{
    Datagram, Delete, Encrypted, ExchangeType, Flags, Fragment, Header, MAX_MESSAGE, Message, Notify,
    NotifyType, Payload,
};

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        match error {
            Error::PeerMisbehaved(how) => Failure::Misbehaved(how.to_string()),
            Error::PeerIncompatible(how) => match how {
                crate::Incompatible::TrafficSelectors => Failure::NoSelectors,
                crate::Incompatible::NoProposal | crate::Incompatible::WrongGroup { .. } => {
                    Failure::NoProposal
                }
                crate::Incompatible::Signature(_)
                | crate::Incompatible::SinglePair
                | crate::Incompatible::NoAdditionalSas => Failure::Refused(how.to_string()),
            },
            Error::Unauthenticated(how) => Failure::RefusedPeer(how.to_string()),
            Error::PeerRefused(notify) => Failure::from(*notify),
            Error::Misuse(how) => Failure::Ours(how.to_string()),
        }
    }
}

impl From<NotifyType> for Failure {
    fn from(notify: NotifyType) -> Self {
        match notify {
            NotifyType::NoProposalChosen => Failure::NoProposal,
            NotifyType::TsUnacceptable => Failure::NoSelectors,
            NotifyType::AuthenticationFailed => Failure::RefusedUs,
            other => Failure::PeerError(other),
        }
    }
}

impl Sa {
    /// A datagram for this SA came by `path`. True: it is to be handled again, after the effects of this.
    pub(crate) fn handle(
        &mut self,
        datagram: &Datagram<'_>,
        bytes: &[u8],
        path: Path,
        cx: &mut Cx<'_>,
    ) -> bool {
        let header = *datagram.header();
        // The sender's role must be the other than ours (RFC 7296 §3.1).
        if header.flags.initiator == self.opener || matches!(self.phase, Phase::Dead(_)) {
            return false;
        }
        let seen = match (header.flags.response, self.window.outstanding() == Some(header.message_id)) {
            (true, true) => Seen::New,
            (true, false) => Seen::Outside,
            (false, _) => self.window.seen(header.message_id),
        };
        if seen == Seen::Outside {
            return false;
        }
        // It asks again what is kept until it is known.
        if self.early.is_some() && !header.flags.response {
            return false;
        }
        let opened = match datagram {
            Datagram::Clear(message) => {
                self.handle_clear(message, bytes, path, cx);
                return false;
            }
            Datagram::Encrypted(encrypted) => self.open_whole(encrypted),
            Datagram::Fragment(fragment) if seen == Seen::Again => self.open_first(fragment),
            Datagram::Fragment(fragment) => self.open_part(fragment),
        };
        let opened = match opened {
            // Nobody knows who sent it (RFC 7296 §2.21.4).
            Ok(None) | Err(Error::PeerMisbehaved(Misbehaved::Integrity)) => return false,
            Ok(Some(message)) => Ok(message),
            Err(error) => Err(error),
        };
        if seen == Seen::Again {
            // The same answer, to wherever the question came from; a repetition moves nobody (RFC 7296 §2.1).
            for datagram in self.window.last_answer() {
                cx.shared.send(path, datagram);
            }
            return false;
        }
        // Until we know who it is, we only hear its answer; it will ask again (RFC 7296 §2.1).
        if self.phase == Phase::Gone || (self.phase == Phase::Auth && !header.flags.response) {
            return false;
        }
        self.heard(cx.now);
        self.seen_from = Some(path);
        self.follow(path, cx);
        let body = opened.and_then(|message| Body::sort(message.payloads));
        if let (Some(from), Ok(asked)) = (self.undecided, &body)
            && !header.flags.response
            && !asked.deletes.contains(&Delete::Ike)
        {
            // A collision about this SA is not decided here, but the peer uses it: there it is (RFC 7296 §2.25.2).
            // The children must be here before the answer.
            self.undecided = None;
            let to = self.local_spi();
            cx.effect(Effect::Inherit { from, to });
            return true;
        }
        if header.flags.response {
            self.handle_response(&header, body, bytes, cx);
        } else if let Some(body) = self.keep_early(&header, body, cx) {
            self.handle_request(&header, body, cx);
        }
        self.begin_next(cx);
        false
    }

    /// A fresh, authenticated message came by this path: the peer is there now (RFC 7296 §2.23). A foreign peer that
    /// is not behind a NAT moves by MOBIKE alone, except from port 500 to 4500.
    pub(crate) fn follow(&mut self, path: Path, cx: &mut Cx<'_>) {
        if self.path == path {
            return;
        }
        let free = match self.config(cx).map(|config| config.kind) {
            None | Some(PeerKind::Native) => true,
            Some(PeerKind::Foreign) => {
                self.facts.nat_there || path.remote.ip() == self.path.remote.ip() || !self.is_up()
            }
        };
        if free {
            self.set_path(path, cx);
        }
    }

    fn open_whole(&self, encrypted: &Encrypted<'_>) -> Result<Option<Message>, Error> {
        self.crypt.as_ref().map(|crypt| crypt.opener.open(encrypted)).transpose()
    }

    /// Of a repeated request the first fragment alone is answered (RFC 7383 §2.6.1).
    fn open_first(&self, fragment: &Fragment<'_>) -> Result<Option<Message>, Error> {
        match &self.crypt {
            Some(crypt) if fragment.number == 1 => {
                crypt.opener.open_fragment(fragment)?;
                Ok(Some(Message { header: fragment.header, payloads: Vec::new() }))
            }
            Some(_) | None => Ok(None),
        }
    }

    fn open_part(&mut self, fragment: &Fragment<'_>) -> Result<Option<Message>, Error> {
        let Some(crypt) = &self.crypt else { return Ok(None) };
        let held = &mut self.reassembly[usize::from(fragment.header.flags.response)];
        if !held.wants(fragment) {
            return Ok(None);
        }
        held.add(crypt.opener.open_fragment(fragment)?)
    }

    /// The peer's first request came again: our answer was lost.
    pub(crate) fn repeat_first(&mut self, bytes: &[u8], path: Path, cx: &mut Cx<'_>) {
        let same = self.opening.as_ref().is_some_and(|opening| opening.request == bytes);
        if self.phase == Phase::HalfOpen && same {
            for datagram in self.window.last_answer() {
                cx.shared.send(path, datagram);
            }
        }
    }

    /// A message in clear means something only while there are no keys.
    fn handle_clear(&mut self, message: &Message, bytes: &[u8], path: Path, cx: &mut Cx<'_>) {
        if !message.header.flags.response {
            return;
        }
        let Ok(body) = Body::sort(message.payloads.clone()) else { return };
        match self.phase {
            Phase::Init if message.header.exchange == ExchangeType::IkeSaInit => {
                let open = self.current.take();
                let Some(Task::Open(task)) = open else { return };
                self.set_remote(path);
                if let Err(error) = self.process_open(task, body, bytes, cx) {
                    self.die(Failure::from(&error), cx);
                }
                self.begin_next(cx);
            }
            // A hint without proof (RFC 7296 §2.21.4): it costs a new attempt beside this SA, no more.
            Phase::Up if body.says(NotifyType::InvalidIkeSpi) => {
                let spi = self.local_spi();
                cx.effect(Effect::Forgotten(spi));
            }
            Phase::Init
            | Phase::Auth
            | Phase::HalfOpen
            | Phase::Up
            | Phase::Replaced
            | Phase::Redundant
            | Phase::Closing(_)
            | Phase::Gone
            | Phase::Dead(_) => {}
        }
    }

    fn set_remote(&mut self, path: Path) {
        self.path = path;
    }

    fn handle_response(&mut self, header: &Header, body: Result<Body, Error>, bytes: &[u8], cx: &mut Cx<'_>) {
        self.window.answered(header.message_id);
        if let Err(error) = body.and_then(|body| self.process(body, bytes, cx)) {
            // Authenticated and wrong: the two do not agree on the protocol, and the SA ends (RFC 7296 §2.21.3). What could
            // not even be read was nobody's answer, and no other will come.
            self.forget_current(cx);
            self.fail(&error, cx);
        }
    }

    /// Ends the SA because of an error of either side; the peer is told by a DELETE if it believes the SA is up, and
    /// what was wrong with its proof by a notification beside it (RFC 7296 §2.21.2).
    pub(super) fn fail(&mut self, error: &Error, cx: &mut Cx<'_>) {
        let why = Failure::from(error);
        match self.phase {
            Phase::Up => self.close(why, cx),
            Phase::Auth => {
                self.parting = error.notify();
                self.phase = Phase::Up;
                self.close(why, cx);
            }
            Phase::Init
            | Phase::HalfOpen
            | Phase::Replaced
            | Phase::Redundant
            | Phase::Closing(_)
            | Phase::Gone
            | Phase::Dead(_) => self.die(why, cx),
        }
    }

    pub(super) fn handle_request(&mut self, header: &Header, body: Result<Body, Error>, cx: &mut Cx<'_>) {
        let answer = body.and_then(|body| self.answer(header.exchange, body, cx));
        let payloads = match &answer {
            Ok(payloads) => payloads.clone(),
            Err(error) => error.notify().map(Payload::Notify).into_iter().collect(),
        };
        if let Err(error) = self.send_answer(header, &payloads, cx) {
            return self.die(Failure::from(&error), cx);
        }
        match answer {
            Ok(_) => {}
            // Not possible here, or not understood and not to be: the exchange failed, the SA goes on (§2.5).
            Err(
                Error::PeerIncompatible(_)
                | Error::PeerRefused(_)
                | Error::PeerMisbehaved(Misbehaved::CriticalPayload(_)),
            ) if self.is_up() => {}
            Err(error) => self.linger(Failure::from(&error), cx),
        }
    }

    /// Does what the peer asks and says what to answer.
    fn answer(&mut self, exchange: ExchangeType, body: Body, cx: &mut Cx<'_>) -> Result<Vec<Payload>, Error> {
        match (exchange, &self.phase) {
            (ExchangeType::IkeAuth, Phase::HalfOpen) => self.respond_auth(body, cx),
            (ExchangeType::CreateChildSa, Phase::Up) => self.respond_create_child_sa(body, cx),
            // On its way out, or replaced (RFC 7296 §2.25.2).
            (
                ExchangeType::CreateChildSa,
                Phase::Replaced | Phase::Redundant | Phase::Closing(_) | Phase::Gone,
            ) => Ok(vec![Payload::Notify(Notify::status(NotifyType::TemporaryFailure))]),
            (
                ExchangeType::Informational,
                Phase::Up | Phase::Replaced | Phase::Redundant | Phase::Closing(_),
            ) => Ok(self.respond_inform(&body, cx)),
            _ => Err(Misbehaved::Protocol("an exchange that has no place here").into()),
        }
    }

    /// Sends the next request, under the next message id.
    pub(super) fn send_request(
        &mut self,
        exchange: ExchangeType,
        payloads: &[Payload],
        cx: &mut Cx<'_>,
    ) -> Result<(), Error> {
        let header = Header {
            spis: self.spis,
            exchange,
            flags: Flags { initiator: self.opener, version: false, response: false },
            message_id: self.window.next_id(),
        };
        let datagrams = self.seal(&header, payloads, cx)?;
        self.last_sent = cx.now;
        for datagram in &datagrams {
            cx.shared.send(self.path, datagram);
        }
        self.window.sent(datagrams, &cx.config.timing, cx.now);
        Ok(())
    }

    fn send_answer(&mut self, request: &Header, payloads: &[Payload], cx: &mut Cx<'_>) -> Result<(), Error> {
        let flags = Flags { initiator: self.opener, version: false, response: true };
        let header = Header { spis: self.spis, flags, ..*request };
        let datagrams = self.seal(&header, payloads, cx)?;
        self.last_sent = cx.now;
        for datagram in self.window.reply(datagrams) {
            cx.shared.send(self.path, datagram);
        }
        Ok(())
    }

    fn seal(&mut self, header: &Header, payloads: &[Payload], cx: &Cx<'_>) -> Result<Vec<Vec<u8>>, Error> {
        let max = if self.facts.fragments { cx.config.timing.fragment } else { MAX_MESSAGE };
        match &mut self.crypt {
            Some(crypt) => crypt.sealer.seal_fragments(header, payloads, max),
            None => Err(crate::Misuse::Config("a message before there are keys").into()),
        }
    }
}
