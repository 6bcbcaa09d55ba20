//! What goes wrong in IKEv2, by who is guilty; the Notify that the peer is told follows from that.
//!
//! Invariant: no error holds or prints key material, and [`Error::notify`] is the only place where an error
//! becomes a Notify (RFC 7296 §2.21, §3.10.1).

use thiserror::Error;

use crate::crypto::Group;
use crate::wire::{Notify, NotifyType, PayloadType};

/// Why an exchange, or a part of it, failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    PeerMisbehaved(#[from] Misbehaved),
    /// Both sides are right, but they have nothing in common.
    #[error("the peer is not compatible with this host: {0}")]
    PeerIncompatible(#[from] Incompatible),
    /// The peer did not prove that it is who it must be.
    #[error("the peer is not authenticated: {0}")]
    Unauthenticated(#[from] AuthFailure),
    /// The peer answered with this error.
    #[error("the peer refused: {0}")]
    PeerRefused(NotifyType),
    /// This host used the library wrongly, or its own settings cannot work.
    #[error("this host is at fault: {0}")]
    Misuse(#[from] Misuse),
}

/// How a peer broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Misbehaved {
    /// Bytes that do not parse; what did not.
    #[error("malformed {0}")]
    Syntax(&'static str),
    /// A higher major version than 2 (RFC 7296 §2.5).
    #[error("it speaks version {0} of IKE; only version 2 is spoken here")]
    MajorVersion(u8),
    /// An unknown payload with the critical bit (RFC 7296 §2.5).
    #[error("payload type {0} is marked critical and is not known here")]
    CriticalPayload(u8),
    /// More of something than this host accepts.
    #[error("too many or too large {0}")]
    Limit(&'static str),
    /// The integrity check of an encrypted message failed: forged, damaged, or made with other keys.
    #[error("an encrypted message does not verify")]
    Integrity,
    /// A payload that the exchange requires is absent.
    #[error("payload {0} is missing")]
    Missing(PayloadType),
    /// A payload that has no place in this exchange, or is there twice.
    #[error("payload {0} is not expected here")]
    Unexpected(PayloadType),
    /// The responder selected what was never offered.
    #[error("it selected a proposal that was not offered")]
    NotOffered,
    /// A public value that is no point of the group, or yields zero.
    #[error("its public value is not valid for {0}")]
    PublicValue(Group),
    /// A step out of order or against the rules of the exchange.
    #[error("{0}")]
    Protocol(&'static str),
}

/// What two right peers lack in common.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Incompatible {
    /// No common proposal.
    #[error("no proposal is acceptable to both; compare the suites of both sides")]
    NoProposal,
    /// The KE payload is for another group than the one wanted.
    #[error("the key exchange must be made with {wanted}")]
    WrongGroup {
        /// The group that the peer must use.
        wanted: Group,
    },
    /// No common traffic selector.
    #[error("the traffic selectors have nothing in common")]
    TrafficSelectors,
    /// The peer cannot verify, or did not use, a kind of signature known here.
    #[error("no signature method in common: {0}")]
    Signature(&'static str),
    /// A single pair of addresses is wanted per CHILD_SA.
    #[error("the peer wants one pair of addresses per CHILD_SA")]
    SinglePair,
    /// The peer, or this host, wants no further CHILD_SA.
    #[error("no additional CHILD_SA is accepted")]
    NoAdditionalSas,
}

/// Why the peer is not authenticated. The peer is told only AUTHENTICATION_FAILED.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AuthFailure {
    /// The AUTH payload does not verify: wrong pre-shared key, wrong private key, or tampering.
    #[error("its AUTH payload does not verify (another key, or a message was changed on the way)")]
    Signature,
    /// The pre-shared key does not match.
    #[error("the pre-shared keys differ")]
    PreSharedKey,
    /// Not the method this host wants of that peer.
    #[error("it uses authentication method {0}, which is not the one agreed for it")]
    Method(u8),
    /// Another identity than the one expected.
    #[error("it calls itself {got}, expected {expected}")]
    Identity {
        /// What it called itself.
        got: String,
        /// What it should be.
        expected: String,
    },
    /// Nobody here knows this identity.
    #[error("{0} is not a peer of this host")]
    Unknown(String),
    /// The certificate does not carry the identity.
    #[error("its certificate does not name {0}")]
    IdentityNotInCertificate(String),
    /// The key is not that of this peer.
    #[error("its key is not the one this host knows for it")]
    WrongKey,
    /// No certificate, and the key is not known otherwise.
    #[error("it sent no certificate")]
    NoCertificate,
    /// A certificate that does not parse.
    #[error("its certificate is malformed")]
    BadCertificate,
    /// The chain does not end at a trusted CA.
    #[error("its certificate does not chain to the CA set for it: {0}")]
    Chain(String),
    /// A certificate of the chain has expired.
    #[error("its certificate, or one above it, has expired")]
    Expired,
    /// A certificate of the chain is not valid yet.
    #[error("its certificate, or one above it, is not valid yet; compare the clocks")]
    NotYetValid,
}

/// What this host did wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Misuse {
    /// A value that the wire cannot carry.
    #[error("{0} does not fit on the wire")]
    TooLong(&'static str),
    /// A key that is not usable.
    #[error("unusable key: {0}")]
    Key(&'static str),
    /// The crypto library refused.
    #[error("the crypto library refused to {0}")]
    Crypto(&'static str),
    /// A setting that cannot work.
    #[error("{0}")]
    Config(&'static str),
    /// The counter of a sealing key has ended: rekey.
    #[error("the sealing key has been used up")]
    KeyExhausted,
}

impl Error {
    /// The Notify that the peer is told, or `None` where the protocol wants silence.
    pub fn notify(&self) -> Option<Notify> {
        match self {
            Error::PeerMisbehaved(m) => match m {
                Misbehaved::MajorVersion(_) => Some(Notify::status(NotifyType::InvalidMajorVersion)),
                Misbehaved::CriticalPayload(kind) => {
                    Some(Notify::with_data(NotifyType::UnsupportedCriticalPayload, vec![*kind]))
                }
                // Whoever cannot make the check pass is not told why (RFC 7296 §2.21.4).
                Misbehaved::Integrity => None,
                Misbehaved::Syntax(_)
                | Misbehaved::Limit(_)
                | Misbehaved::Missing(_)
                | Misbehaved::Unexpected(_)
                | Misbehaved::NotOffered
                | Misbehaved::PublicValue(_)
                | Misbehaved::Protocol(_) => Some(Notify::status(NotifyType::InvalidSyntax)),
            },
            Error::PeerIncompatible(i) => Some(match i {
                Incompatible::NoProposal => Notify::status(NotifyType::NoProposalChosen),
                Incompatible::WrongGroup { wanted } => {
                    Notify::with_data(NotifyType::InvalidKePayload, wanted.id().to_be_bytes().to_vec())
                }
                Incompatible::TrafficSelectors => Notify::status(NotifyType::TsUnacceptable),
                Incompatible::Signature(_) => Notify::status(NotifyType::AuthenticationFailed),
                Incompatible::SinglePair => Notify::status(NotifyType::SinglePairRequired),
                Incompatible::NoAdditionalSas => Notify::status(NotifyType::NoAdditionalSas),
            }),
            Error::Unauthenticated(_) => Some(Notify::status(NotifyType::AuthenticationFailed)),
            Error::PeerRefused(_) | Error::Misuse(_) => None,
        }
    }
}

/// Shorthand used all over the parsers.
pub(crate) fn syntax(what: &'static str) -> Error {
    Misbehaved::Syntax(what).into()
}
