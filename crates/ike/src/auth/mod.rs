//! Who speaks: the AUTH payload (RFC 7296 §2.15), by pre-shared key or by signature (RFC 7427, RFC 8420), and the
//! certificates behind a signature.
//!
//! Authority over another Droveway host is the key in the snapshot ([`Trust::Key`]): its certificate is only how the
//! key travels, and what the certificate says of time is shown, not enforced. Foreign peers are held to a CA
//! ([`Trust::Authority`]) or a pre-shared key.
//!
//! Invariant: nothing here returns success without a proof over this very exchange: both nonces, the first message
//! of the prover, its identity, and a key of this IKE SA.

mod certificate;
mod identity;
mod signature;

use std::sync::Arc;

pub use certificate::{Anchors, CertInfo, Expiry, SpkiHash};
pub use identity::{Identity, InvalidIdentity};
pub use signature::{PublicKey, SUPPORTED_HASHES, Scheme, SigningKey};

use crate::crypto::{Prf, Secret};
use crate::error::{AuthFailure, Error, Incompatible};
use crate::wire::{
    AuthMethod, Authentication, CertEncoding, CertRequest, Certificate, HashAlgorithm, Identification, Nonce,
};

/// Seconds since the Unix epoch.
pub type UnixSeconds = u64;

/// What an AUTH payload signs (RFC 7296 §2.15), for the side whose identity is `id`.
#[derive(Debug, Clone, Copy)]
pub struct SignedOctets<'a> {
    /// The negotiated PRF.
    pub prf: Prf,
    /// SK_pi if `id` is the initiator, SK_pr if it is the responder.
    pub sk_p: &'a Secret,
    /// The IKE_SA_INIT message that this side sent, whole: for the initiator the *last* request, with its COOKIE.
    pub message: &'a [u8],
    /// The nonce of the *other* side.
    pub nonce: &'a Nonce,
    /// Its identification, as on the wire.
    pub id: &'a Identification,
    /// IntAuth of RFC 9242, empty without IKE_INTERMEDIATE.
    pub int_auth: &'a [u8],
}

impl SignedOctets<'_> {
    /// The octets.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut id = Vec::with_capacity(self.id.len());
        self.id.emit(&mut id);
        let maced_id = self.prf.compute(self.sk_p.expose(), &[&id]);
        [self.message, self.nonce.as_bytes(), maced_id.expose(), self.int_auth].concat()
    }

    /// AUTH = prf(prf(secret, "Key Pad for IKEv2"), octets).
    fn shared_key_mac(&self, psk: &Secret) -> Secret {
        let key = self.prf.compute(psk.expose(), &[b"Key Pad for IKEv2"]);
        self.prf.compute(key.expose(), &[&self.to_bytes()])
    }
}

/// How this host proves itself.
#[derive(Debug, Clone)]
pub enum Credential {
    /// By a secret that both sides know.
    Psk(Secret),
    /// By a private key.
    Key {
        /// The key.
        key: Arc<SigningKey>,
        /// Its certificate and those above it, in DER, without the root. May be empty if the peer knows the key.
        chain: Vec<Vec<u8>>,
    },
}

impl Credential {
    /// The CERT payloads to send.
    pub fn certificates(&self) -> Vec<Certificate> {
        match self {
            Credential::Psk(_) => Vec::new(),
            Credential::Key { chain, .. } => chain.iter().cloned().map(Certificate::x509).collect(),
        }
    }

    /// The AUTH payload. `peer_hashes` is from the peer's SIGNATURE_HASH_ALGORITHMS, empty if it sent none.
    ///
    /// # Errors
    /// [`Incompatible::Signature`] if the peer does not verify what our key can sign.
    pub fn prove(
        &self,
        octets: &SignedOctets<'_>,
        peer_hashes: &[HashAlgorithm],
    ) -> Result<Authentication, Error> {
        match self {
            Credential::Psk(psk) => Ok(Authentication {
                method: AuthMethod::SharedKey,
                data: octets.shared_key_mac(psk).expose().to_vec(),
            }),
            Credential::Key { key, .. } => {
                if !peer_hashes.contains(&key.scheme().hash()) {
                    return Err(Incompatible::Signature(
                        "the peer does not verify the kind of this host's key",
                    )
                    .into());
                }
                let data = key.sign(&octets.to_bytes())?;
                Ok(Authentication { method: AuthMethod::DigitalSignature, data })
            }
        }
    }
}

/// How a peer must prove itself.
#[derive(Debug, Clone)]
pub enum Trust {
    /// By a secret that both sides know.
    Psk(Secret),
    /// By the one key whose SubjectPublicKeyInfo has this hash, whatever a certificate says.
    Key(SpkiHash),
    /// By a certificate that names it and chains to one of these CAs.
    Authority {
        /// The CAs.
        anchors: Arc<Anchors>,
        /// What an expired certificate means.
        expiry: Expiry,
    },
}

/// A proof that held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// By which signature; `None` for a pre-shared key.
    pub scheme: Option<Scheme>,
    /// The certificate that came with it.
    pub certificate: Option<CertInfo>,
}

impl Trust {
    /// The CERTREQ payload that gets the peer to send what is needed; strongSwan sends certificates only if asked.
    pub fn cert_request(&self) -> Option<CertRequest> {
        let authorities = match self {
            Trust::Psk(_) => return None,
            Trust::Key(_) => Vec::new(),
            Trust::Authority { anchors, .. } => anchors.key_ids(),
        };
        Some(CertRequest { encoding: CertEncoding::X509Signature, authorities })
    }

    /// Checks the peer's AUTH payload, and its certificates where they matter. That `octets.id` is the identity
    /// wanted is the caller's to check: here it is only held against the certificate.
    ///
    /// # Errors
    /// [`AuthFailure`], whose Notify tells the peer nothing but AUTHENTICATION_FAILED.
    pub fn verify(
        &self,
        octets: &SignedOctets<'_>,
        auth: &Authentication,
        certificates: &[Certificate],
        now: UnixSeconds,
    ) -> Result<Verified, Error> {
        match self {
            Trust::Psk(psk) => {
                if auth.method != AuthMethod::SharedKey {
                    return Err(AuthFailure::Method(auth.method.into()).into());
                }
                let got = Secret::from(auth.data.as_slice());
                if octets.shared_key_mac(psk) != got {
                    return Err(AuthFailure::PreSharedKey.into());
                }
                Ok(Verified { scheme: None, certificate: None })
            }
            Trust::Key(hash) => {
                let (key, certificate) = certificate::pinned_key(certificates, hash, now)?;
                let scheme = verify_signature(&key, octets, auth)?;
                Ok(Verified { scheme: Some(scheme), certificate })
            }
            Trust::Authority { anchors, expiry } => {
                let id = Identity::try_from(octets.id)?;
                let (key, info) = anchors.check(certificates, &id, *expiry, now)?;
                let scheme = verify_signature(&key, octets, auth)?;
                Ok(Verified { scheme: Some(scheme), certificate: Some(info) })
            }
        }
    }
}

fn verify_signature(
    key: &PublicKey,
    octets: &SignedOctets<'_>,
    auth: &Authentication,
) -> Result<Scheme, Error> {
    if auth.method != AuthMethod::DigitalSignature {
        return Err(AuthFailure::Method(auth.method.into()).into());
    }
    key.verify(&octets.to_bytes(), &auth.data)
}
