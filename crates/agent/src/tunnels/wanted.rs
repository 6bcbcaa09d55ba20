//! From a tunnel that the plan wants to what IKE is told of its peer: who must prove what, by which paths, and which
//! children. Pure but for the question which of our addresses leads where, which is passed in.
//!
//! Invariant: another host is believed for the key that the snapshot has of it and for nothing else; secrets of foreign
//! peers go to IKE and nowhere else.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ike::auth::{Anchors, Credential, Expiry, Identity, SigningKey, SpkiHash, Trust};
use ike::crypto::Secret;
use ike::proposal::{EspOffer, IkeOffer};
use ike::wire::{IpSelector, SecurityLabel};
use ike::{ChildConfig, ChildId, Initiate, Path, PeerConfig, PeerKind};
pub(super) use model::IKE_PORT;
use model::{HostId, Peer, PeerProof};
use plan::{Begins, Far, Inside, Proof, Tunnel};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::peer::Slot;
use crate::ledger;

/// Who we are.
pub(super) struct Own {
    host: HostId,
    key: Arc<SigningKey>,
    chain: Vec<Vec<u8>>,
}

impl Own {
    /// By the key and certificate that this host has for TLS.
    pub(super) fn of(identity: &ledger::Identity) -> Result<Self, String> {
        let key =
            PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).map_err(|error| error.to_string())?;
        let PrivateKeyDer::Pkcs8(key) = key else { return Err("this host's key is not PKCS #8".to_owned()) };
        let key = SigningKey::from_pkcs8(key.secret_pkcs8_der()).map_err(|error| error.to_string())?;
        let chain = certificates(&identity.certificate)?;
        Ok(Self { host: identity.host.clone(), key: Arc::new(key), chain })
    }

    fn credential(&self) -> Credential {
        Credential::Key { key: self.key.clone(), chain: self.chain.clone() }
    }
}

/// Everything of a peer but its paths and children, which change while SAs stay.
#[derive(Debug)]
pub(super) struct Who {
    /// The identity that it must prove.
    pub(super) id: Identity,
    our_id: Identity,
    trust: Trust,
    credential: Credential,
    kind: PeerKind,
}

/// Who is at the other end, and how both prove it. `ours` is the address that we reach it from.
///
/// # Errors
/// Why there can be no such tunnel, and what to do.
pub(super) fn who(own: &Own, far: &Far, tunnel: &Tunnel, ours: Option<IpAddr>) -> Result<Who, String> {
    match (far, &tunnel.proof) {
        (Far::Host(host), Proof::Key(key)) => Ok(Who {
            id: name_of(host),
            our_id: name_of(&own.host),
            trust: Trust::Key(spki_hash(key).ok_or_else(|| {
                format!(
                    "the server's record of host {} has no usable key; let that host join anew",
                    tunnel.name
                )
            })?),
            credential: own.credential(),
            kind: PeerKind::Native,
        }),
        (Far::Peer(_), Proof::Foreign(peer)) => foreign(own, peer, ours),
        (Far::Host(_), Proof::Foreign(_)) | (Far::Peer(_), Proof::Key(_)) => {
            Err(format!("the plan of the tunnel to {} contradicts itself; please report this", tunnel.name))
        }
    }
}

fn foreign(own: &Own, peer: &Peer, ours: Option<IpAddr>) -> Result<Who, String> {
    let identity =
        |text: &str| text.parse::<Identity>().map_err(|error| format!("peer {}: {error}", peer.name));
    let id = identity(&peer.expected_identity())?;
    let (trust, credential, default) = match &peer.proof {
        PeerProof::Psk { secret: Some(secret) } => {
            let secret = Secret::from(secret.trim().as_bytes());
            (Trust::Psk(secret.clone()), Credential::Psk(secret), ours.map(Identity::Address))
        }
        PeerProof::Psk { secret: None } => {
            return Err(format!(
                "the secret of peer {} has not come to this host; make the peer anew with `droveway peer create`",
                peer.name
            ));
        }
        PeerProof::Ca { ca } => {
            let unusable =
                |why: String| format!("peer {}: its CA certificate cannot be used: {why}", peer.name);
            let anchors = Anchors::new(&certificates(ca).map_err(unusable)?)
                .map_err(|error| unusable(error.to_string()))?;
            let trust = Trust::Authority { anchors: Arc::new(anchors), expiry: Expiry::Enforced };
            // The subject of this host's certificate.
            (trust, own.credential(), identity(&format!("CN={}", own.host)).ok())
        }
    };
    let our_id = match &peer.local_identity {
        Some(text) => identity(text)?,
        None => default
            .ok_or_else(|| format!("this host has no route to peer {} at {}", peer.name, peer.address))?,
    };
    Ok(Who { id, our_id, trust, credential, kind: PeerKind::Foreign })
}

impl Who {
    /// All that IKE is told.
    pub(super) fn config(self, paths: Vec<Path>, begins: &Begins, children: Vec<ChildConfig>) -> PeerConfig {
        PeerConfig {
            id: self.id,
            our_id: self.our_id,
            trust: self.trust,
            credential: self.credential,
            paths,
            initiate: initiate(begins),
            kind: self.kind,
            ike: IkeOffer::default(),
            children,
        }
    }
}

/// Who begins, in IKE's words.
pub(super) fn initiate(begins: &Begins) -> Initiate {
    match begins {
        Begins::We => Initiate::First,
        Begins::PeerFirst => Initiate::Second,
        Begins::PeerOnly { .. } | Begins::Nobody { .. } => Initiate::Never,
    }
}

/// The ways to where a peer may be, each from the address of ours that leads there: `source` says which. Addresses
/// without a route are left out. `port` is our tunnels' port; to port 500 we speak from 500.
pub(super) fn paths(
    addresses: &[SocketAddr],
    port: u16,
    source: impl Fn(IpAddr) -> Option<IpAddr>,
) -> Vec<Path> {
    let path = |remote: &SocketAddr| {
        let ours = if remote.port() == IKE_PORT { IKE_PORT } else { port };
        Some(Path { local: SocketAddr::new(source(remote.ip())?, ours), remote: *remote })
    };
    addresses.iter().filter_map(path).collect()
}

/// The children of a network: the first for whoever asks, each next one for a worker of its own (RFC 9611).
pub(super) fn children<'a>(
    far: &'a Far,
    slot: &'a Slot,
) -> impl Iterator<Item = Result<ChildConfig, String>> + 'a {
    let more = slot.more.iter().zip(1..).map(|(id, worker)| (*id, Some(worker)));
    std::iter::once((slot.child, None))
        .chain(more)
        .map(move |(id, worker)| child(id, worker, far, &slot.inside))
}

/// One wanted child. Between hosts everything may be inside as far as IKE is concerned: what the peer may send is
/// checked packet by packet, and what is at which host changes with every claim.
fn child(id: ChildId, worker: Option<u32>, far: &Far, inside: &Inside) -> Result<ChildConfig, String> {
    let label = inside.label.as_ref().map(|label| SecurityLabel::new(label.clone().into_bytes()));
    let label = label.transpose().map_err(|error| error.to_string())?;
    let (local, remote) = match far {
        Far::Host(_) => {
            let everything = vec![IpSelector::prefix(Ipv4Addr::UNSPECIFIED.into(), 0)];
            (everything.clone(), everything)
        }
        Far::Peer(_) => (selectors(&inside.ours), selectors(&inside.theirs)),
    };
    Ok(ChildConfig { id, label, worker, local, remote, esp: EspOffer::default() })
}

/// Whether a child for the one is a child for the other too.
pub(super) fn same_child(far: &Far, a: &Inside, b: &Inside) -> bool {
    match far {
        Far::Host(_) => a.label == b.label,
        Far::Peer(_) => a == b,
    }
}

fn selectors(nets: &[ipnet::IpNet]) -> Vec<IpSelector> {
    nets.iter().map(|net| IpSelector::prefix(net.addr(), net.prefix_len())).collect()
}

fn name_of(host: &HostId) -> Identity {
    Identity::KeyId(host.as_str().as_bytes().to_vec())
}

fn certificates(pem: &str) -> Result<Vec<Vec<u8>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let all = all.map_err(|error| error.to_string())?;
    if all.is_empty() {
        return Err("there is no certificate in it".to_owned());
    }
    Ok(all.into_iter().map(|der| der.to_vec()).collect())
}

fn spki_hash(hex: &str) -> Option<SpkiHash> {
    let mut hash = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    for (octet, digits) in hash.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *octet = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(SpkiHash(hash))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn own() -> Own {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        Own::of(&ledger::Identity {
            host: HostId::from_random([1; 8]),
            name: "h1".parse().unwrap(),
            environment: model::EnvironmentId::default(),
            server: String::new(),
            servers: Vec::new(),
            ca: String::new(),
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            certified: 0,
        })
        .unwrap()
    }

    fn tunnel(proof: Proof) -> Tunnel {
        Tunnel {
            name: "h2".parse().unwrap(),
            addresses: vec!["192.0.2.2:4500".parse().unwrap()],
            begins: Begins::We,
            proof,
            inside: BTreeMap::new(),
        }
    }

    fn office(proof: PeerProof) -> Peer {
        Peer {
            id: model::PeerId::from_random([7; 8]),
            name: "office".parse().unwrap(),
            network: model::NetworkId::from_random([2; 8]),
            host: HostId::from_random([1; 8]),
            address: "192.0.2.9".parse().unwrap(),
            port: None,
            identity: None,
            local_identity: None,
            proof,
            remote_cidrs: vec!["192.168.7.0/24".parse().unwrap()],
            created: 0,
        }
    }

    fn foreign_tunnel(peer: Peer) -> (Far, Tunnel) {
        (Far::Peer(peer.id.clone()), tunnel(Proof::Foreign(Box::new(peer))))
    }

    fn inside(label: Option<&str>, theirs: &str) -> Inside {
        Inside {
            label: label.map(str::to_owned),
            theirs: vec![theirs.parse().unwrap()],
            ours: vec!["10.42.0.0/16".parse().unwrap()],
        }
    }

    #[test]
    fn what_the_server_takes_for_an_identity_this_agent_does_too() {
        for text in [
            "192.0.2.1",
            "2001:db8::1",
            "gw.example",
            "@gw",
            "me@gw",
            "me@",
            "@",
            "two words",
            "keyid:a b",
            "keyid:",
            "keyid:0x",
            "keyid:0x0a",
            "keyid:0x0",
            "keyid:0xzz",
            "CN=gw",
            "CN=",
            "=gw",
            "C=CH, CN=a\\, b",
            "C=CH,",
            "X=y",
            "cn = gw , emailaddress=me@gw",
            "CN=a=b",
            "CN=\\,",
            "CN=a\\\\,O=b",
            "DC=a,DC=b,UID=c",
        ] {
            assert_eq!(model::Peer::is_identity(text), text.parse::<Identity>().is_ok(), "{text}");
        }
    }

    #[test]
    fn another_host_is_believed_for_the_key_of_the_snapshot_alone() {
        let far = Far::Host(HostId::from_random([2; 8]));
        let found = who(&own(), &far, &tunnel(Proof::Key("ab".repeat(32))), None).unwrap();
        assert!(matches!(found.trust, Trust::Key(SpkiHash(hash)) if hash == [0xab; 32]));
        assert_eq!(found.id, Identity::KeyId(far.as_str().into()));
        for bad in ["", "ab", &"xy".repeat(32), &"é".repeat(32)] {
            let why = who(&own(), &far, &tunnel(Proof::Key(bad.to_owned())), None).unwrap_err();
            assert!(why.contains("h2") && why.contains("join anew"), "{why}");
        }
    }

    #[test]
    fn a_foreign_peer_is_held_to_what_was_agreed_with_it() {
        let (far, wanted) =
            foreign_tunnel(office(PeerProof::Psk { secret: Some("a long secret \n".into()) }));
        let found = who(&own(), &far, &wanted, Some("192.0.2.1".parse().unwrap())).unwrap();
        assert_eq!(found.id, "192.0.2.9".parse().unwrap());
        assert_eq!(found.our_id, "192.0.2.1".parse().unwrap());
        assert!(matches!(&found.trust, Trust::Psk(secret) if secret.expose() == b"a long secret"));
        assert!(who(&own(), &far, &wanted, None).unwrap_err().contains("no route"));
        assert!(!format!("{found:?}").contains("long"));

        let (far, wanted) = foreign_tunnel(office(PeerProof::Psk { secret: None }));
        assert!(who(&own(), &far, &wanted, None).unwrap_err().contains("droveway peer create"));

        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).unwrap().pem();
        let mut peer = office(PeerProof::Ca { ca });
        peer.identity = Some("vpn.example.org".to_owned());
        let (far, wanted) = foreign_tunnel(peer.clone());
        let found = who(&own(), &far, &wanted, None).unwrap();
        assert!(matches!(found.trust, Trust::Authority { .. }));
        assert_eq!(found.id, Identity::Fqdn("vpn.example.org".to_owned()));
        assert!(matches!(found.our_id, Identity::DistinguishedName(_)), "the subject of our certificate");
        peer.local_identity = Some("gw@example.org".to_owned());
        let (far, wanted) = foreign_tunnel(peer);
        assert_eq!(who(&own(), &far, &wanted, None).unwrap().our_id, "gw@example.org".parse().unwrap());

        let (far, wanted) = foreign_tunnel(office(PeerProof::Ca { ca: "nothing".to_owned() }));
        assert!(who(&own(), &far, &wanted, None).unwrap_err().contains("no certificate"));
    }

    #[test]
    fn a_path_leaves_from_the_address_that_leads_there_and_port_500_is_spoken_to_from_500() {
        let addresses = ["192.0.2.2:4500", "[2001:db8::2]:7000", "198.51.100.2:4500", "192.0.2.9:500"];
        let addresses = addresses.map(|it| it.parse().unwrap());
        let source = |to: IpAddr| match to.to_string().as_str() {
            "198.51.100.2" => None,
            text if text.contains(':') => Some("2001:db8::1".parse().unwrap()),
            _ => Some("192.0.2.1".parse().unwrap()),
        };
        let found: Vec<String> =
            paths(&addresses, 4501, source).iter().map(|it| format!("{} {}", it.local, it.remote)).collect();
        assert_eq!(
            found,
            [
                "192.0.2.1:4501 192.0.2.2:4500",
                "[2001:db8::1]:4501 [2001:db8::2]:7000",
                "192.0.2.1:500 192.0.2.9:500"
            ]
        );
    }

    #[test]
    fn between_hosts_a_child_is_for_everything_of_its_network_and_with_a_foreign_peer_for_what_was_agreed() {
        let host = Far::Host(HostId::from_random([2; 8]));
        let red = inside(Some("net-red"), "10.42.64.0/26");
        let made = child(ChildId(1), None, &host, &red).unwrap();
        assert_eq!(made.local, [IpSelector::prefix(Ipv4Addr::UNSPECIFIED.into(), 0)]);
        assert_eq!(made.local, made.remote);
        assert_eq!(made.label.unwrap().as_bytes(), b"net-red");
        assert!(same_child(&host, &red, &inside(Some("net-red"), "10.42.128.0/26")), "one more block");
        assert!(!same_child(&host, &red, &inside(None, "10.42.64.0/26")));

        let peer = Far::Peer(model::PeerId::from_random([7; 8]));
        let office = inside(None, "192.168.7.0/24");
        let made = child(ChildId(2), None, &peer, &office).unwrap();
        assert_eq!(made.remote, [IpSelector::prefix("192.168.7.0".parse().unwrap(), 24)]);
        assert_eq!(made.local, [IpSelector::prefix("10.42.0.0".parse().unwrap(), 16)]);
        assert!(!same_child(&peer, &office, &inside(None, "192.168.8.0/24")));
    }
}
