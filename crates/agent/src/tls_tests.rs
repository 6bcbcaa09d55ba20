use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ClientConnection, ServerConfig, ServerConnection};

use super::*;

/// A CA and a server's certificate of it for `name`.
pub(crate) struct Ca {
    pub(crate) pem: String,
    der: CertificateDer<'static>,
    pub(crate) leaf_pem: String,
    leaf: CertificateDer<'static>,
    pub(crate) key_pem: String,
    key: PrivateKeyDer<'static>,
}

impl Ca {
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.der)
    }
}

pub(crate) fn ca(name: &str) -> Ca {
    let (key, mut params) = (KeyPair::generate().unwrap(), CertificateParams::default());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap();
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new([name.to_owned()]).unwrap();
    let leaf = leaf.signed_by(&leaf_key, &Issuer::new(params, key)).unwrap();
    let key = PrivateKeyDer::Pkcs8(leaf_key.serialize_der().into());
    Ca {
        pem: root.pem(),
        der: root.into(),
        leaf_pem: leaf.pem(),
        leaf: leaf.into(),
        key_pem: leaf_key.serialize_pem(),
        key,
    }
}

/// The URL of a server that takes two connections with that certificate.
pub(crate) fn serve_two(ca: &Ca) -> String {
    let config = Arc::new(server_config(vec![ca.leaf.clone(), ca.der.clone()], ca));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().take(2) {
            let mut connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            // Who does not believe it goes away in the middle.
            drop(connection.complete_io(&mut stream.unwrap()));
        }
    });
    url
}

fn server_config(chain: Vec<CertificateDer<'static>>, ca: &Ca) -> ServerConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, ca.key.clone_key())
        .unwrap()
}

/// A handshake in memory between a client that believes `trust` and a server that sends `chain`.
fn handshake(trust: Trust, chain: Vec<CertificateDer<'static>>, server: &Ca) -> Result<(), Untrusted> {
    let mut server = ServerConnection::new(Arc::new(server_config(chain, server))).unwrap();
    let name = "192.0.2.1".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::new(client_config(trust, None).unwrap()), name).unwrap();
    while client.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets().unwrap();
        bytes.clear();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            if let Err(error) = client.process_new_packets() {
                return Err(untrusted(&io::Error::other(error)).unwrap());
            }
        }
    }
    Ok(())
}

#[test]
fn the_ca_may_be_known_by_its_certificate_or_by_a_tokens_fingerprint() {
    let ours = ca(SERVER_NAME);
    let sent = || vec![ours.leaf.clone(), ours.der.clone()];
    let trust = Trust::ca(ours.pem.as_bytes()).unwrap();
    handshake(Trust::Fingerprint(trust.fingerprint()), sent(), &ours).unwrap();
    handshake(trust.clone(), sent(), &ours).unwrap();
    handshake(trust, vec![ours.leaf.clone()], &ours).unwrap();
}

#[test]
fn another_servers_ca_is_refused_with_both_fingerprints() {
    let (ours, other) = (ca(SERVER_NAME), ca(SERVER_NAME));
    let (expected, presented) = (fingerprint(&ours.der), fingerprint(&other.der));
    for trust in [Trust::Ca(ours.der.clone()), Trust::Fingerprint(expected)] {
        let by_token = matches!(trust, Trust::Fingerprint(_));
        let refusal = handshake(trust, vec![other.leaf.clone(), other.der.clone()], &other).unwrap_err();
        assert!(refusal.other_ca && refusal.is_ca);
        assert_eq!((refusal.expected, refusal.presented), (expected, presented));
        let text = refusal.to_string();
        assert!(text.contains(&expected.to_string()) && text.contains(&presented.to_string()), "{text}");
        assert_eq!(text.contains("check --server, or make a new token there"), by_token, "{text}");
    }
}

#[test]
fn the_right_ca_sent_along_makes_no_stranger_believed() {
    let (ours, other) = (ca(SERVER_NAME), ca(SERVER_NAME));
    let expected = fingerprint(&ours.der);
    for trust in [Trust::Ca(ours.der.clone()), Trust::Fingerprint(expected)] {
        let refusal = handshake(trust, vec![other.leaf.clone(), ours.der.clone()], &other).unwrap_err();
        assert!(refusal.other_ca && !refusal.is_ca);
        assert_eq!(refusal.presented, fingerprint(&other.leaf));
    }
}

#[test]
fn a_certificate_of_our_ca_for_another_name_is_no_servers() {
    let ours = ca("192.0.2.1");
    for trust in [Trust::Ca(ours.der.clone()), Trust::Fingerprint(fingerprint(&ours.der))] {
        let refusal = handshake(trust, vec![ours.leaf.clone(), ours.der.clone()], &ours).unwrap_err();
        assert!(!refusal.other_ca && refusal.to_string().contains(SERVER_NAME), "{refusal}");
    }
}

#[test]
fn what_is_no_certificate_is_no_ca() {
    assert!(matches!(Trust::ca(b"not a certificate"), Err(TlsError::Ca(_))));
    let garbage = Trust::Ca(CertificateDer::from(vec![1, 2, 3]));
    assert!(matches!(client_config(garbage, None), Err(TlsError::Ca(_))));
}

#[test]
fn other_failures_are_no_refusals() {
    assert_eq!(untrusted(&io::Error::other("reset")), None);
    let expired = rustls::Error::InvalidCertificate(CertificateError::Expired);
    assert_eq!(untrusted(&io::Error::new(io::ErrorKind::InvalidData, expired)), None);
}

#[test]
fn a_connection_that_ends_is_said_to_end_and_else_the_system_has_the_word() {
    let ended =
        io::Error::new(io::ErrorKind::UnexpectedEof, "peer closed connection: https://docs.rs/rustls");
    assert_eq!(root_cause(&ended), "it ended the connection");
    assert_eq!(root_cause(&io::Error::other("no route")), "no route");
}
