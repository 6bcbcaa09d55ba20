//! `droveway peer`: create, ls, inspect, rm.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use ipnet::IpNet;
use model::api::path;
use model::{Name, Peer, PeerProof, PeerSpec};

use super::connection::Connection;
use super::exit::{Exit, Failure};
use super::kind::{Kind, inspect, remove};
use super::names::Names;
use super::output::Output;
use super::table::{Details, Table};
use super::{parse, text};

/// The largest file that is read for a secret or a certificate, in bytes.
const FILE_MAX: u64 = 256 << 10;

/// Foreign peers: boxes of another make that a network is joined to by IPsec
#[derive(Debug, Args)]
pub(super) struct PeerArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Join a foreign peer to a network
    ///
    /// A foreign peer is a box that speaks IKEv2 and ESP: strongSwan, a router, a cloud's VPN gateway. One host, the
    /// gateway, keeps a tunnel to it; containers on all hosts reach what is behind it, by way of that host.
    ///
    /// On the other side, set up: IKEv2 to the gateway's address; its own traffic selector what --remote-cidr says,
    /// the remote one the network's subnet; AES-GCM. docs/tunnels.md has an example for strongSwan. UDP 500 and 4500 have
    /// to be open at the gateway.
    #[command(after_help = "Examples:
  (umask 077; openssl rand -base64 33 > psk)      # makes a secret
  droveway peer create office --address 198.51.100.1 --psk-file psk \\
    --remote-cidr 192.168.7.0/24
  droveway peer create cloud --address 198.51.100.2 --ca ca.pem \\
    --id vpn.example --remote-cidr 10.99.0.0/16 --host h1 --network backend")]
    Create(Create),
    /// List foreign peers; their secrets are not shown
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway peer ls
  droveway peer ls -o json | jq -r '.[].name'

How the tunnel to a peer is, its gateway knows: `droveway tunnel ls` there."
    )]
    Ls,
    /// Show all that is known of foreign peers; their secrets are not shown
    #[command(after_help = "Examples:
  droveway peer inspect office
  droveway peer inspect office cloud -o yaml")]
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "PEER", value_parser = parse::reference)]
        names: Vec<String>,
    },
    /// Take foreign peers away: their tunnels close
    #[command(aliases = ["remove", "delete"], after_help = "Examples:
  droveway peer rm office")]
    Rm {
        /// Names or ids
        #[arg(required = true, value_name = "PEER", value_parser = parse::reference)]
        names: Vec<String>,
    },
}

/// How both sides prove themselves: one of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Proof {
    /// File with the secret that both sides have; must be readable by you alone
    #[arg(long, value_name = "FILE")]
    psk_file: Option<PathBuf>,
    /// File with the certificate, PEM, of the CA that signed the peer's
    #[arg(long, value_name = "FILE", requires = "id")]
    ca: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Create {
    /// Its name
    name: Name,
    /// Its address on the underlay
    #[arg(long)]
    address: IpAddr,
    /// Its UDP port for IKE [default: 500, then 4500]
    #[arg(long)]
    port: Option<u16>,
    #[command(flatten)]
    proof: Proof,
    /// The identity that it proves: a name, or an address [default: its address]
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// The identity that the gateway proves to it [default: its address; with --ca, its certificate's subject]
    #[arg(long, value_name = "ID")]
    local_id: Option<String>,
    /// The network that it is joined to, of driver ipsec: name or id
    #[arg(long, default_value = model::MANAGED_NETWORK, value_parser = parse::reference)]
    network: String,
    /// The host that speaks to it: name or id [default: the only one]
    #[arg(long, value_parser = parse::reference)]
    host: Option<String>,
    /// What is behind it; may be repeated
    #[arg(long = "remote-cidr", required = true, value_name = "CIDR", value_parser = parse::subnet)]
    remote_cidrs: Vec<IpNet>,
}

impl Create {
    fn spec(self) -> Result<PeerSpec, Failure> {
        let proof = match (self.proof.psk_file, self.proof.ca) {
            (Some(file), _) => PeerProof::Psk { secret: Some(secret(&file)?) },
            (None, Some(file)) => PeerProof::Ca { ca: read(&file, open(&file)?)? },
            (None, None) => return Err(Failure::new(Exit::Usage, "give --psk-file or --ca")),
        };
        Ok(PeerSpec {
            name: self.name,
            network: self.network,
            host: self.host,
            address: self.address,
            port: self.port,
            identity: self.id,
            local_identity: self.local_id,
            proof,
            remote_cidrs: self.remote_cidrs,
        })
    }
}

impl PeerArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        match self.verb {
            Verb::Create(create) => {
                // What is wrong with a file is told before the server is asked.
                let spec = create.spec()?;
                let client = self.connection.open()?;
                let peer = client.create_peer(&spec).await?;
                let names = Names::fetch(&client).await?;
                output.object(&peer, |peer| created(peer, &names))
            }
            Verb::Ls => {
                let client = self.connection.open()?;
                let (peers, names) = (client.peers().await?, Names::fetch(&client).await?);
                output.list(
                    &peers,
                    |peers| table(peers, &names),
                    "There is no foreign peer; `droveway peer create --help` shows how to join one.",
                )
            }
            Verb::Inspect { names } => {
                let client = self.connection.open()?;
                inspect::<Peer, _>(&client, output, &names, async || {
                    let names = Names::fetch(&client).await?;
                    Ok(move |peer: &Peer| details(peer, &names))
                })
                .await
            }
            Verb::Rm { names } => remove::<Peer>(&self.connection.open()?, output, &names).await,
        }
    }
}

impl Kind for Peer {
    const WHAT: &'static str = "peer";
    const PATH: &'static str = path::PEERS;

    fn name(&self) -> &str {
        self.name.as_str()
    }
}

/// The secret in a file that nobody else can read.
fn secret(path: &Path) -> Result<String, Failure> {
    let file = open(path)?;
    let meta = file.metadata().map_err(|error| unusable(path, &error))?;
    let mode = meta.permissions().mode() & 0o777;
    if meta.is_file() && mode & 0o077 != 0 {
        let message =
            format!("{} can be read or written by others than its owner (mode {mode:04o})", path.display());
        let remedy =
            format!("chmod 600 {}; and make a new secret, if somebody may have read it", path.display());
        return Err(Failure::new(Exit::Usage, message).remedy(remedy));
    }
    Ok(read(path, file)?.trim().to_owned())
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|error| unusable(path, &error))
}

/// The text of a small file.
fn read(path: &Path, file: File) -> Result<String, Failure> {
    let mut text = String::new();
    file.take(FILE_MAX).read_to_string(&mut text).map_err(|error| unusable(path, &error))?;
    Ok(text)
}

fn unusable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Exit::Usage, format!("cannot read {}: {error}", path.display()))
}

fn created(peer: &Peer, names: &Names) -> String {
    let (network, host) = (names.network(&peer.network), names.host(&peer.host));
    let cidrs = text::list(&peer.remote_cidrs);
    text::printable(&format!(
        "Joined {} ({}) to network {network}: {cidrs} by way of host {host}.\n\
         `droveway tunnel inspect {}` on {host} shows how the tunnel is.\n",
        peer.name, peer.address, peer.name
    ))
}

fn table(peers: &[Peer], names: &Names) -> Table {
    let now = text::now();
    let mut table = Table::new(
        ["NAME", "ADDRESS", "NETWORK", "HOST", "BEHIND IT", "PROOF", "AGE"],
        &["NAME", "ADDRESS", "BEHIND IT"],
    );
    for peer in peers {
        table.row([
            peer.name.to_string(),
            peer.address.to_string(),
            names.network(&peer.network),
            names.host(&peer.host),
            text::list(&peer.remote_cidrs),
            match &peer.proof {
                PeerProof::Psk { .. } => "secret",
                PeerProof::Ca { .. } => "certificate",
            }
            .to_owned(),
            text::age(peer.created, now),
        ]);
    }
    table
}

fn details(peer: &Peer, names: &Names) -> Details {
    let own = || match &peer.proof {
        PeerProof::Psk { .. } => "the gateway's address".to_owned(),
        PeerProof::Ca { .. } => format!("the subject of the gateway's certificate, CN={}", peer.host),
    };
    let mut details = Details::default();
    details
        .add("Name", peer.name.to_string())
        .add("Id", peer.id.to_string())
        .add("Address", peer.address.to_string())
        .add("UDP port", peer.port.map_or_else(|| "500, then 4500".to_owned(), |port| port.to_string()))
        .add("Network", format!("{} ({})", names.network(&peer.network), peer.network))
        .add("Gateway", format!("{} ({})", names.host(&peer.host), peer.host))
        .add("Behind it", text::list(&peer.remote_cidrs))
        .add("It proves", format!("{}, by {}", peer.expected_identity(), proof(&peer.proof)))
        .add("We prove", peer.local_identity.clone().unwrap_or_else(own))
        .add("Created", text::utc(peer.created));
    details
}

fn proof(proof: &PeerProof) -> &'static str {
    match proof {
        PeerProof::Psk { .. } => "the secret that both have (not shown)",
        PeerProof::Ca { .. } => "a certificate of its CA",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        create: Create,
    }

    fn line(rest: &str) -> Result<Create, String> {
        let line = format!("create office --address 198.51.100.1 --remote-cidr 192.168.7.0/24 {rest}");
        let parsed = Line::try_parse_from(line.split_whitespace());
        parsed.map(|line| line.create).map_err(|error| error.to_string())
    }

    fn peer(proof: &serde_json::Value) -> Peer {
        serde_json::from_value(serde_json::json!({
            "id": model::PeerId::from_random([1; 8]), "name": "office",
            "network": model::NetworkId::from_random([2; 8]), "host": model::HostId::from_random([3; 8]),
            "address": "198.51.100.1", "proof": proof, "remote_cidrs": ["192.168.7.0/24"], "created": 0,
        }))
        .unwrap()
    }

    fn names() -> Names {
        Names {
            networks: BTreeMap::from([(model::NetworkId::from_random([2; 8]), "managed".parse().unwrap())]),
            hosts: BTreeMap::from([(model::HostId::from_random([3; 8]), "h1".parse().unwrap())]),
        }
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused_with_the_remedy_and_never_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("psk");
        std::fs::write(&file, "a secret of some length\n").unwrap();
        for mode in [0o644, 0o640, 0o620, 0o604] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            let failure = secret(&file).unwrap_err();
            let text = failure.render();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(text.contains(&format!("(mode {mode:04o})")) && text.contains("chmod 600"), "{text}");
            assert!(!text.contains("of some length"), "{text}");
        }
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(secret(&file).unwrap(), "a secret of some length", "without the line's end");
        let create = line(&format!("--psk-file {}", file.display())).unwrap();
        let spec = create.spec().unwrap();
        assert_eq!(spec.network, "managed");
        assert!(!format!("{spec:?}").contains("of some length"));
        assert!(secret(&dir.path().join("none")).unwrap_err().render().contains("none"));
    }

    #[test]
    fn one_proof_is_needed_and_a_certificate_needs_the_identity_that_is_in_it() {
        assert!(line("--psk-file /f").is_ok());
        assert!(line("--ca /f --id vpn.example").is_ok());
        assert!(line("").unwrap_err().contains("--psk-file"));
        assert!(line("--ca /f").unwrap_err().contains("--id"));
        assert!(line("--psk-file /f --ca /f --id x").unwrap_err().contains("cannot be used with"));
    }

    #[test]
    fn a_peer_shows_what_is_behind_it_and_by_which_host_and_fits_a_terminal() {
        let peer = peer(&serde_json::json!({"by": "psk"}));
        let ls = table(std::slice::from_ref(&peer), &names()).render(Some(80));
        for part in ["office", "198.51.100.1", "managed", "h1", "192.168.7.0/24", "secret"] {
            assert!(ls.contains(part), "{part}: {ls}");
        }
        let inspect = details(&peer, &names()).render();
        assert!(inspect.contains("198.51.100.1, by the secret that both have (not shown)"), "{inspect}");
        assert!(created(&peer, &names()).contains("192.168.7.0/24 by way of host h1"));
    }
}
