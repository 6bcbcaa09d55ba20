//! Keys of an IKE SA (RFC 7296 §2.14, §2.18) and of a CHILD_SA (§2.17).
//!
//! With AEAD there are no integrity keys: SK_ai and SK_ar are empty and have no field here (RFC 5282 §7).

use zeroize::ZeroizeOnDrop;

use super::{Encr, Prf, Secret};
use crate::proposal::IkeSuite;
use crate::wire::{IkeSpis, Nonce};

/// Octets of salt after each AES-GCM key (RFC 4106 §8.1, RFC 5282 §7.1).
pub(super) const SALT_LEN: usize = 4;

/// The keys of an IKE SA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IkeKeys {
    /// From which CHILD_SA keys and the next IKE SA's keys come.
    pub sk_d: Secret,
    /// Encrypts what the original initiator sends: key, then salt.
    pub sk_ei: Secret,
    /// Encrypts what the original responder sends.
    pub sk_er: Secret,
    /// Binds the initiator's identity into AUTH.
    pub sk_pi: Secret,
    /// Binds the responder's identity into AUTH.
    pub sk_pr: Secret,
}

impl IkeKeys {
    /// After IKE_SA_INIT: SKEYSEED = prf(Ni | Nr, g^ir).
    pub fn initial(suite: &IkeSuite, shared: &Secret, ni: &Nonce, nr: &Nonce, spis: &IkeSpis) -> Self {
        let nonces = [ni.as_bytes(), nr.as_bytes()].concat();
        let skeyseed = suite.prf.compute(&nonces, &[shared.expose()]);
        Self::expand(suite, &skeyseed, ni, nr, spis)
    }

    /// After a rekey: SKEYSEED = prf(SK_d (old), SK(0) | Ni | Nr | SK(1) | …), computed with the *old* SA's PRF. With
    /// one secret that is RFC 7296 §2.18; more are RFC 9370 §2.2.4; called within one SA with its own PRF, SK_d and
    /// SPIs it is the update after an additional key exchange (RFC 9370 §2.2.2).
    pub fn rekeyed(
        old: (Prf, &Secret),
        suite: &IkeSuite,
        shared: &[Secret],
        ni: &Nonce,
        nr: &Nonce,
        spis: &IkeSpis,
    ) -> Self {
        let (first, more) = split(shared);
        let mut parts = vec![first, ni.as_bytes(), nr.as_bytes()];
        parts.extend(more);
        let skeyseed = old.0.compute(old.1.expose(), &parts);
        Self::expand(suite, &skeyseed, ni, nr, spis)
    }

    fn expand(suite: &IkeSuite, skeyseed: &Secret, ni: &Nonce, nr: &Nonce, spis: &IkeSpis) -> Self {
        let (prf_len, encr_len) = (suite.prf.len(), suite.encr.key_len() + SALT_LEN);
        let keymat = suite.prf.plus(
            skeyseed.expose(),
            &[ni.as_bytes(), nr.as_bytes(), &spis.initiator.to_bytes(), &spis.responder.to_bytes()],
            3 * prf_len + 2 * encr_len,
        );
        let mut rest = keymat.expose();
        let mut take = |len| {
            let (taken, tail) = rest.split_at(len);
            rest = tail;
            Secret::from(taken)
        };
        IkeKeys {
            sk_d: take(prf_len),
            sk_ei: take(encr_len),
            sk_er: take(encr_len),
            sk_pi: take(prf_len),
            sk_pr: take(prf_len),
        }
    }
}

/// The key of one direction of a CHILD_SA.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct TrafficKey {
    /// The cipher.
    #[zeroize(skip)]
    pub encr: Encr,
    /// The AES key.
    pub key: Secret,
    /// The first four octets of each nonce.
    pub salt: [u8; SALT_LEN],
}

impl std::fmt::Debug for TrafficKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TrafficKey({})", self.encr)
    }
}

/// The keys of a CHILD_SA, by who sends with them: the initiator of the *exchange* that made it, or its responder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildKeys {
    /// For traffic from the initiator.
    pub initiator: TrafficKey,
    /// For traffic from the responder.
    pub responder: TrafficKey,
}

impl ChildKeys {
    /// KEYMAT = prf+(SK_d, SK(0) | Ni | Nr | SK(1) | …); `shared` is empty without a key exchange of its own.
    pub fn derive(prf: Prf, sk_d: &Secret, shared: &[Secret], ni: &Nonce, nr: &Nonce, encr: Encr) -> Self {
        let (first, more) = split(shared);
        let mut parts = vec![first, ni.as_bytes(), nr.as_bytes()];
        parts.extend(more);
        let one = encr.key_len() + SALT_LEN;
        let keymat = prf.plus(sk_d.expose(), &parts, 2 * one);
        let direction = |octets: &[u8]| {
            let (key, tail) = octets.split_at(encr.key_len());
            let mut salt = [0; SALT_LEN];
            salt.copy_from_slice(tail);
            TrafficKey { encr, key: Secret::from(key), salt }
        };
        let (initiator, responder) = keymat.expose().split_at(one);
        ChildKeys { initiator: direction(initiator), responder: direction(responder) }
    }
}

/// SK(0), or nothing, and SK(1) … SK(n).
fn split(shared: &[Secret]) -> (&[u8], impl Iterator<Item = &[u8]>) {
    (shared.first().map_or(&[][..], Secret::expose), shared.iter().skip(1).map(Secret::expose))
}
