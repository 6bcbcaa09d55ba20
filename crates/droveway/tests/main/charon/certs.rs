//! Certificate authorities and certificates made for one test.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PKCS_RSA_SHA256,
};

/// A kind of key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    EcdsaP256,
    Ed25519,
    Rsa,
}

impl Key {
    fn generate(self) -> KeyPair {
        let algorithm = match self {
            Self::EcdsaP256 => &PKCS_ECDSA_P256_SHA256,
            Self::Ed25519 => &PKCS_ED25519,
            Self::Rsa => &PKCS_RSA_SHA256,
        };
        KeyPair::generate_for(algorithm).unwrap()
    }
}

/// A CA.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate, those above it, and its key.
#[derive(Clone)]
pub struct Certified {
    /// DER, the end's own first, without the root.
    pub chain: Vec<Vec<u8>>,
    /// PKCS #8, PEM.
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        Self(CertifiedIssuer::self_signed(authority(name), Key::EcdsaP256.generate()).unwrap())
    }

    /// One below this.
    pub fn below(&self, name: &str) -> Self {
        Self(CertifiedIssuer::signed_by(authority(name), Key::EcdsaP256.generate(), &self.0).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    pub fn der(&self) -> Vec<u8> {
        self.0.der().to_vec()
    }

    /// For a peer of that name, valid now.
    pub fn certify(&self, name: &str, key: Key) -> Certified {
        self.certify_with(name, key, |_| {})
    }

    /// [`Authority::certify`], with something special.
    pub fn certify_with(
        &self,
        name: &str,
        key: Key,
        special: impl FnOnce(&mut CertificateParams),
    ) -> Certified {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        special(&mut params);
        let key = key.generate();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Certified { chain: vec![certificate.der().to_vec()], key: key.serialize_pem() }
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}
