//! The pseudo-random function, prf+ (RFC 7296 §2.13), and the two hashes that IKEv2 fixes to SHA-1.

use std::net::SocketAddr;

use aws_lc_rs::{digest, hmac};

use super::{Prf, Secret};
use crate::wire::IkeSpis;

impl Prf {
    fn algorithm(self) -> hmac::Algorithm {
        match self {
            Prf::HmacSha256 => hmac::HMAC_SHA256,
            Prf::HmacSha384 => hmac::HMAC_SHA384,
            Prf::HmacSha512 => hmac::HMAC_SHA512,
        }
    }

    /// prf(key, the parts one after the other).
    pub fn compute(self, key: &[u8], parts: &[&[u8]]) -> Secret {
        let mut context = hmac::Context::with_key(&hmac::Key::new(self.algorithm(), key));
        for part in parts {
            context.update(part);
        }
        Secret::from(context.sign().as_ref())
    }

    /// The first `len` octets of prf+(key, the parts one after the other). `len` is at most 255 outputs.
    pub fn plus(self, key: &[u8], parts: &[&[u8]], len: usize) -> Secret {
        let key = hmac::Key::new(self.algorithm(), key);
        // The capacity is final, so that no copy is left behind by growth.
        let mut out = Vec::with_capacity(len.next_multiple_of(self.len()));
        let mut last = Secret::new(Vec::new());
        for n in 1..=u8::MAX {
            if out.len() >= len {
                break;
            }
            let mut context = hmac::Context::with_key(&key);
            context.update(last.expose());
            for part in parts {
                context.update(part);
            }
            context.update(&[n]);
            last = Secret::from(context.sign().as_ref());
            out.extend_from_slice(last.expose());
        }
        out.truncate(len);
        Secret::new(out)
    }
}

/// The data of NAT_DETECTION_SOURCE_IP and NAT_DETECTION_DESTINATION_IP (RFC 7296 §2.23), fixed to SHA-1 there. It
/// hides nothing and proves nothing: it only tells whether an address was changed on the way.
pub fn nat_detection_hash(spis: &IkeSpis, address: SocketAddr) -> [u8; 20] {
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(&spis.initiator.to_bytes());
    context.update(&spis.responder.to_bytes());
    match address {
        SocketAddr::V4(a) => context.update(&a.ip().octets()),
        SocketAddr::V6(a) => context.update(&a.ip().octets()),
    }
    context.update(&address.port().to_be_bytes());
    array(context.finish().as_ref())
}

/// How CERTREQ names a CA: the SHA-1 of its SubjectPublicKeyInfo (RFC 7296 §3.7). A hint, never a proof.
pub fn spki_sha1(spki: &[u8]) -> [u8; 20] {
    array(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, spki).as_ref())
}

fn array(digest: &[u8]) -> [u8; 20] {
    let mut out = [0; 20];
    out.copy_from_slice(digest);
    out
}
