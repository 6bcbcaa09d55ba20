//! Digital signatures as RFC 7427 §3 has them in AUTH: the DER of an AlgorithmIdentifier, then the signature.
//!
//! Signed with: ECDSA P-256 and P-384, Ed25519. Verified besides: RSA, PKCS #1 v1.5 and PSS, of 2048 bits and more.

use std::fmt;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    self, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey, VerificationAlgorithm,
};
use x509_parser::oid_registry::asn1_rs::{Any, FromDer, Oid, oid};
use x509_parser::signature_algorithm::RsaSsaPssParams;
use x509_parser::x509::{AlgorithmIdentifier, SubjectPublicKeyInfo};

use crate::error::{AuthFailure, Error, Incompatible, Misuse, syntax};
use crate::wire::HashAlgorithm;

/// What SIGNATURE_HASH_ALGORITHMS says that this host verifies. SHA-1 is not among them.
pub const SUPPORTED_HASHES: [HashAlgorithm; 4] =
    [HashAlgorithm::Sha256, HashAlgorithm::Sha384, HashAlgorithm::Sha512, HashAlgorithm::Identity];

/// A kind of key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeyKind {
    P256,
    P384,
    Ed25519,
    Rsa,
}

/// A way to sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// ECDSA with this hash.
    Ecdsa(HashAlgorithm),
    /// Ed25519 (RFC 8420).
    Ed25519,
    /// RSASSA-PKCS1-v1_5 with this hash.
    RsaPkcs1(HashAlgorithm),
    /// RSASSA-PSS with this hash for message and mask, and a salt as long as the hash.
    RsaPss(HashAlgorithm),
}

const ED25519: Oid<'static> = oid!(1.3.101.112);
const EC_PUBLIC_KEY: Oid<'static> = oid!(1.2.840.10045.2.1);
const P256: Oid<'static> = oid!(1.2.840.10045.3.1.7);
const P384: Oid<'static> = oid!(1.3.132.0.34);
const RSA: Oid<'static> = oid!(1.2.840.113549.1.1.1);
const RSA_PSS: Oid<'static> = oid!(1.2.840.113549.1.1.10);
const MGF1: Oid<'static> = oid!(1.2.840.113549.1.1.8);

const ECDSA_SCHEMES: [(Oid<'static>, HashAlgorithm); 3] = [
    (oid!(1.2.840.10045.4.3.2), HashAlgorithm::Sha256),
    (oid!(1.2.840.10045.4.3.3), HashAlgorithm::Sha384),
    (oid!(1.2.840.10045.4.3.4), HashAlgorithm::Sha512),
];
const RSA_PKCS1_SCHEMES: [(Oid<'static>, HashAlgorithm); 3] = [
    (oid!(1.2.840.113549.1.1.11), HashAlgorithm::Sha256),
    (oid!(1.2.840.113549.1.1.12), HashAlgorithm::Sha384),
    (oid!(1.2.840.113549.1.1.13), HashAlgorithm::Sha512),
];
const HASHES: [(Oid<'static>, HashAlgorithm); 3] = [
    (oid!(2.16.840.1.101.3.4.2.1), HashAlgorithm::Sha256),
    (oid!(2.16.840.1.101.3.4.2.2), HashAlgorithm::Sha384),
    (oid!(2.16.840.1.101.3.4.2.3), HashAlgorithm::Sha512),
];

/// AlgorithmIdentifiers of what is signed here (RFC 7427 appendix A.3, RFC 8420 appendix A.1).
const ECDSA_SHA256_DER: &[u8] = &[0x30, 0x0a, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
const ECDSA_SHA384_DER: &[u8] = &[0x30, 0x0a, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3];
const ED25519_DER: &[u8] = &[0x30, 5, 6, 3, 0x2b, 0x65, 0x70];

impl Scheme {
    /// The hash that the peer must support.
    pub fn hash(self) -> HashAlgorithm {
        match self {
            Scheme::Ecdsa(hash) | Scheme::RsaPkcs1(hash) | Scheme::RsaPss(hash) => hash,
            Scheme::Ed25519 => HashAlgorithm::Identity,
        }
    }

    /// The scheme that an AlgorithmIdentifier names.
    fn parse(der: &[u8]) -> Option<Self> {
        let (rest, algorithm) = AlgorithmIdentifier::from_der(der).ok()?;
        if !rest.is_empty() {
            return None;
        }
        let find = |table: &[(Oid<'static>, HashAlgorithm)]| {
            table.iter().find(|(oid, _)| *oid == algorithm.algorithm).map(|(_, hash)| *hash)
        };
        if algorithm.algorithm == RSA_PSS {
            return pss_hash(algorithm.parameters.as_ref()?).map(Scheme::RsaPss);
        }
        // Parameters are absent, or NULL: nothing else has a meaning for these.
        if algorithm.parameters.as_ref().is_some_and(|p| !p.data.is_empty()) {
            return None;
        }
        if algorithm.algorithm == ED25519 {
            return Some(Scheme::Ed25519);
        }
        find(&ECDSA_SCHEMES).map(Scheme::Ecdsa).or_else(|| find(&RSA_PKCS1_SCHEMES).map(Scheme::RsaPkcs1))
    }

    /// How to verify it with a key of this kind.
    fn algorithm(self, kind: KeyKind) -> Option<&'static dyn VerificationAlgorithm> {
        use HashAlgorithm::{Identity, Other, Sha1, Sha256, Sha384, Sha512};
        Some(match (self, kind) {
            (Scheme::Ecdsa(Sha256), KeyKind::P256) => &signature::ECDSA_P256_SHA256_ASN1,
            (Scheme::Ecdsa(Sha384), KeyKind::P256) => &signature::ECDSA_P256_SHA384_ASN1,
            (Scheme::Ecdsa(Sha512), KeyKind::P256) => &signature::ECDSA_P256_SHA512_ASN1,
            (Scheme::Ecdsa(Sha256), KeyKind::P384) => &signature::ECDSA_P384_SHA256_ASN1,
            (Scheme::Ecdsa(Sha384), KeyKind::P384) => &signature::ECDSA_P384_SHA384_ASN1,
            (Scheme::Ecdsa(Sha512), KeyKind::P384) => &signature::ECDSA_P384_SHA512_ASN1,
            (Scheme::Ed25519, KeyKind::Ed25519) => &signature::ED25519,
            (Scheme::RsaPkcs1(Sha256), KeyKind::Rsa) => &signature::RSA_PKCS1_2048_8192_SHA256,
            (Scheme::RsaPkcs1(Sha384), KeyKind::Rsa) => &signature::RSA_PKCS1_2048_8192_SHA384,
            (Scheme::RsaPkcs1(Sha512), KeyKind::Rsa) => &signature::RSA_PKCS1_2048_8192_SHA512,
            (Scheme::RsaPss(Sha256), KeyKind::Rsa) => &signature::RSA_PSS_2048_8192_SHA256,
            (Scheme::RsaPss(Sha384), KeyKind::Rsa) => &signature::RSA_PSS_2048_8192_SHA384,
            (Scheme::RsaPss(Sha512), KeyKind::Rsa) => &signature::RSA_PSS_2048_8192_SHA512,
            (
                Scheme::Ecdsa(Sha1 | Sha256 | Sha384 | Sha512 | Identity | Other(_))
                | Scheme::RsaPkcs1(Sha1 | Sha256 | Sha384 | Sha512 | Identity | Other(_))
                | Scheme::RsaPss(Sha1 | Sha256 | Sha384 | Sha512 | Identity | Other(_))
                | Scheme::Ed25519,
                KeyKind::P256 | KeyKind::P384 | KeyKind::Ed25519 | KeyKind::Rsa,
            ) => return None,
        })
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scheme::Ecdsa(hash) => write!(f, "ECDSA with {hash}"),
            Scheme::Ed25519 => f.write_str("Ed25519"),
            Scheme::RsaPkcs1(hash) => write!(f, "RSA PKCS #1 v1.5 with {hash}"),
            Scheme::RsaPss(hash) => write!(f, "RSA PSS with {hash}"),
        }
    }
}

/// The one hash of RSASSA-PSS parameters, if they are of the usual kind.
fn pss_hash(parameters: &Any<'_>) -> Option<HashAlgorithm> {
    let params = RsaSsaPssParams::try_from(parameters).ok()?;
    let hash = HASHES.iter().find(|(oid, _)| oid == params.hash_algorithm_oid()).map(|(_, hash)| *hash)?;
    let len = match hash {
        HashAlgorithm::Sha256 => 32,
        HashAlgorithm::Sha384 => 48,
        HashAlgorithm::Sha512 => 64,
        HashAlgorithm::Sha1 | HashAlgorithm::Identity | HashAlgorithm::Other(_) => return None,
    };
    let mgf = params.mask_gen_algorithm().ok()?;
    let usual = mgf.mgf == MGF1
        && mgf.hash == *params.hash_algorithm_oid()
        && params.salt_length() == len
        && params.trailer_field() == 1;
    usual.then_some(hash)
}

/// A public key to verify signatures with.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    kind: KeyKind,
    /// The subjectPublicKey without its wrapping.
    key: Vec<u8>,
    spki: Vec<u8>,
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?})", self.kind)
    }
}

impl PublicKey {
    /// The key of a SubjectPublicKeyInfo in DER.
    ///
    /// # Errors
    /// [`AuthFailure::BadCertificate`], or [`Incompatible::Signature`] for a kind of key that is not verified here.
    pub fn from_spki(spki: &[u8]) -> Result<Self, Error> {
        let (rest, parsed) = SubjectPublicKeyInfo::from_der(spki).map_err(|_| AuthFailure::BadCertificate)?;
        if !rest.is_empty() {
            return Err(AuthFailure::BadCertificate.into());
        }
        let curve = parsed.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
        let kind = if parsed.algorithm.algorithm == ED25519 {
            KeyKind::Ed25519
        } else if parsed.algorithm.algorithm == RSA {
            KeyKind::Rsa
        } else if parsed.algorithm.algorithm == EC_PUBLIC_KEY && curve.as_ref() == Some(&P256) {
            KeyKind::P256
        } else if parsed.algorithm.algorithm == EC_PUBLIC_KEY && curve.as_ref() == Some(&P384) {
            KeyKind::P384
        } else {
            return Err(
                Incompatible::Signature("the peer's key is none of P-256, P-384, Ed25519, RSA").into()
            );
        };
        Ok(PublicKey { kind, key: parsed.subject_public_key.data.to_vec(), spki: spki.to_vec() })
    }

    /// The SubjectPublicKeyInfo in DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// Checks the authentication data of RFC 7427 §3 over `message`; gives the scheme that was used.
    ///
    /// # Errors
    /// [`AuthFailure::Signature`], [`Incompatible::Signature`].
    pub fn verify(&self, message: &[u8], data: &[u8]) -> Result<Scheme, Error> {
        let (len, rest) = data.split_first().ok_or_else(|| syntax("digital signature"))?;
        let (der, value) =
            rest.split_at_checked(usize::from(*len)).ok_or_else(|| syntax("digital signature"))?;
        let unknown = Incompatible::Signature("the peer signed in a way that is not verified here");
        let scheme = Scheme::parse(der).ok_or_else(|| unknown.clone())?;
        let algorithm = scheme.algorithm(self.kind).ok_or(unknown)?;
        UnparsedPublicKey::new(algorithm, &self.key)
            .verify(message, value)
            .map_err(|_| AuthFailure::Signature)?;
        Ok(scheme)
    }
}

/// This host's private key.
pub struct SigningKey {
    inner: Inner,
    public: PublicKey,
}

enum Inner {
    Ecdsa(EcdsaKeyPair, HashAlgorithm),
    Ed25519(Ed25519KeyPair),
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.scheme())
    }
}

impl SigningKey {
    /// The key of a PKCS #8 document in DER: P-256, P-384 or Ed25519.
    ///
    /// # Errors
    /// [`Misuse::Key`].
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, Error> {
        let ecdsa = [
            (&signature::ECDSA_P256_SHA256_ASN1_SIGNING, HashAlgorithm::Sha256),
            (&signature::ECDSA_P384_SHA384_ASN1_SIGNING, HashAlgorithm::Sha384),
        ];
        let inner = ecdsa
            .into_iter()
            .find_map(|(algorithm, hash)| {
                EcdsaKeyPair::from_pkcs8(algorithm, der).ok().map(|key| Inner::Ecdsa(key, hash))
            })
            .or_else(|| Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).ok().map(Inner::Ed25519))
            .ok_or(Misuse::Key("the private key is not PKCS #8 of P-256, P-384 or Ed25519"))?;
        let failed = |_| Misuse::Crypto("compute a public key");
        let spki = match &inner {
            Inner::Ecdsa(key, _) => key.public_key().as_der().map_err(failed)?.as_ref().to_vec(),
            Inner::Ed25519(key) => key.public_key().as_der().map_err(failed)?.as_ref().to_vec(),
        };
        Ok(SigningKey { inner, public: PublicKey::from_spki(&spki)? })
    }

    /// Its public half.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// How it signs.
    pub fn scheme(&self) -> Scheme {
        match &self.inner {
            Inner::Ecdsa(_, hash) => Scheme::Ecdsa(*hash),
            Inner::Ed25519(_) => Scheme::Ed25519,
        }
    }

    /// The authentication data of RFC 7427 §3 over `message`. ECDSA takes its nonce from the library, so its
    /// signatures differ each time, and in length; no test may depend on their bytes.
    ///
    /// # Errors
    /// [`Misuse::Crypto`].
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let (der, value) = match &self.inner {
            Inner::Ecdsa(key, hash) => {
                let der = if *hash == HashAlgorithm::Sha384 { ECDSA_SHA384_DER } else { ECDSA_SHA256_DER };
                let value =
                    key.sign(&SystemRandom::new(), message).map_err(|_| Misuse::Crypto("sign with ECDSA"))?;
                (der, value)
            }
            Inner::Ed25519(key) => (ED25519_DER, key.sign(message)),
        };
        Ok([&[der.len() as u8], der, value.as_ref()].concat())
    }
}
