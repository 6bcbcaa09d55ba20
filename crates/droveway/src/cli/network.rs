//! `droveway network`: create, ls, inspect, rm.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use ipnet::IpNet;
use model::api::path;
use model::{Driver, Endpoint, Host, HostId, Name, Network, NetworkSpec, Peer};

use super::connection::Connection;
use super::exit::Failure;
use super::host::behind_nat;
use super::kind::{Kind, inspect, remove};
use super::output::Output;
use super::table::{Details, Table};
use super::{parse, text};
use crate::client::{Client, Error};

/// Networks: named, isolated address spaces that span all hosts
#[derive(Debug, Args)]
pub(super) struct NetworkArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a network
    ///
    /// Networks are isolated from one another by the kernel, also where their subnets are equal. Each host gets a
    /// block of the subnet when its first container attaches.
    ///
    /// The ipsec driver encrypts what travels between hosts: ESP, with keys that the hosts agree on by IKEv2. It passes
    /// NAT.
    ///
    /// The vxlan driver sends packets from host to host in the clear, NOT encrypted: anyone on the way can read them, and
    /// send others. It passes no NAT. Use it only where you trust all that is between your hosts.
    #[command(after_help = "Examples:
  droveway network create backend --subnet 10.43.0.0/16 --driver ipsec
  droveway network create fast --subnet 10.45.0.0/16 --driver vxlan # in clear
  droveway network create small --subnet 192.168.40.0/24 --block-size /28
  droveway network create vault --subnet 10.44.0.0/16 --internal --label team=db
  docker run -d --network backend --name db redis     # on any host")]
    Create(Create),
    /// List networks
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway network ls
  droveway network ls -o json | jq -r '.[].name'

ENCRYPTED \"no (clear)\" means that packets travel between hosts as they are: anyone on the way can read them."
    )]
    Ls,
    /// Show all that is known of networks
    #[command(after_help = "Examples:
  droveway network inspect managed
  droveway network inspect managed backend -o yaml")]
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "NAME", value_parser = parse::reference)]
        names: Vec<String>,
    },
    /// Remove networks; refused while containers are attached
    #[command(aliases = ["remove", "delete"], after_help = "Examples:
  droveway network rm backend
  droveway endpoint ls --network backend     # who uses it")]
    Rm {
        /// Names or ids
        #[arg(required = true, value_name = "NAME", value_parser = parse::reference)]
        names: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct Create {
    /// Its name: what `docker run --network` takes
    name: Name,
    /// The addresses it uses; must not overlap with routes of the hosts
    #[arg(long, value_name = "CIDR", value_parser = parse::subnet)]
    subnet: IpNet,
    /// Size of the block that each host gets at a time, as a prefix length from /20 to /29 [default: /26, 64 addresses]
    #[arg(long, value_name = "PREFIX", value_parser = parse::block_size)]
    block_size: Option<u8>,
    /// How packets travel between hosts: ipsec, encrypted; or vxlan, in the clear, NOT encrypted
    #[arg(long, value_name = "ipsec|vxlan", hide_possible_values = true, default_value = model::DRIVER_DEFAULT, value_parser = ["ipsec", "vxlan"])]
    driver: String,
    /// With vxlan: its network identifier, 1 to 16777215 [default: the next free one]
    #[arg(long, value_name = "N")]
    vni: Option<u32>,
    /// With vxlan: its UDP port between hosts [default: 4789]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// MTU inside, in bytes [default: worked out from the hosts' interfaces, on 1500: ipsec 1438, vxlan 1450]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u32>,
    /// No way out: containers reach each other and nothing else
    #[arg(long)]
    internal: bool,
    /// What you want to say of it; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse::label)]
    labels: Vec<(String, String)>,
}

impl Create {
    fn spec(self) -> NetworkSpec {
        NetworkSpec {
            name: self.name,
            cidrs: vec![self.subnet],
            block_prefix: self.block_size,
            driver: Some(self.driver),
            vni: self.vni,
            port: self.port,
            mtu: self.mtu,
            internal: self.internal,
            labels: self.labels.into_iter().collect(),
        }
    }
}

impl NetworkArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let client = self.connection.open()?;
        match self.verb {
            Verb::Create(create) => {
                let network = client.create_network(&create.spec()).await?;
                output.object(&network, created)
            }
            Verb::Ls => {
                let networks = client.networks().await?;
                output.list(
                    &networks,
                    table,
                    "There is no network yet; `droveway network create --help` shows how to make one.",
                )
            }
            Verb::Inspect { names } => {
                inspect::<Network, _>(&client, output, &names, async || {
                    let use_ = Use::fetch(&client).await?;
                    Ok(move |network: &Network| details(network, &use_))
                })
                .await
            }
            Verb::Rm { names } => remove::<Network>(&client, output, &names).await,
        }
    }
}

impl Kind for Network {
    const WHAT: &'static str = "network";
    const PATH: &'static str = path::NETWORKS;

    fn name(&self) -> &str {
        self.name.as_str()
    }
}

/// Who uses networks.
struct Use {
    blocks: Vec<model::Block>,
    endpoints: Vec<Endpoint>,
    peers: Vec<Peer>,
    hosts: BTreeMap<HostId, Host>,
}

impl Use {
    async fn fetch(client: &Client) -> Result<Self, Error> {
        Ok(Self {
            blocks: client.blocks().await?,
            endpoints: client.endpoints().await?,
            peers: client.peers().await?,
            hosts: client.hosts().await?.into_iter().map(|view| (view.host.id.clone(), view.host)).collect(),
        })
    }

    fn host(&self, id: &HostId) -> String {
        self.hosts.get(id).map_or_else(|| id.to_string(), |host| host.name.to_string())
    }

    /// The hosts that a network in clear does not reach, a line each.
    fn behind_nat(&self) -> String {
        let hosts = self.hosts.values().filter_map(|host| Some((&host.name, behind_nat(host)?)));
        let lines: Vec<String> = hosts.map(|(name, nat)| format!("{name} is {nat}")).collect();
        if lines.is_empty() {
            return String::new();
        }
        format!(
            "{}\nvxlan passes no NAT: use a network of --driver ipsec there, or run the agent with an --address\nat which the others reach it",
            lines.join("\n")
        )
    }
}

fn details(network: &Network, use_: &Use) -> Details {
    let blocks: Vec<String> = use_
        .blocks
        .iter()
        .filter(|block| block.network == network.id)
        .map(|block| format!("{} on {}", block.cidr, use_.host(&block.host)))
        .collect();
    let peers: Vec<String> = use_
        .peers
        .iter()
        .filter(|peer| peer.network == network.id)
        .map(|peer| {
            format!("{}: {} by way of {}", peer.name, text::list(&peer.remote_cidrs), use_.host(&peer.host))
        })
        .collect();
    let endpoints = use_.endpoints.iter().filter(|endpoint| endpoint.network == network.id).count();
    let mut details = Details::default();
    details
        .add("Name", network.name.to_string())
        .add("Id", network.id.to_string())
        .add("Subnet", text::list(&network.cidrs))
        .add("Gateway", network.gateway().to_string())
        .add("Driver", network.driver.name())
        .add("Encrypted", encrypted(&network.driver));
    match network.driver {
        Driver::Ipsec => &mut details,
        Driver::Vxlan { vni, port } => details
            .add("VNI", vni.to_string())
            .add("UDP port", port.to_string())
            .add("Not reached", use_.behind_nat()),
    };
    details
        .add("MTU", network.mtu.map_or_else(|| "worked out by each host".to_owned(), |mtu| mtu.to_string()))
        .add("Internal", if network.internal { "yes: no way out" } else { "no" })
        .add("Labels", text::labels(&network.labels))
        .add("Created", text::utc(network.created))
        .add("Block size", format!("/{}", network.block_prefix))
        .add("Blocks", if blocks.is_empty() { "none leased".to_owned() } else { blocks.join("\n") })
        .add("Endpoints", endpoints.to_string())
        .add("Foreign peers", peers.join("\n"));
    details
}

fn table(networks: &[Network]) -> Table {
    let now = text::now();
    let mut table = Table::new(
        ["NAME", "SUBNET", "DRIVER", "ENCRYPTED", "VNI", "PORT", "MTU", "INTERNAL", "AGE"],
        &["NAME", "SUBNET", "ENCRYPTED"],
    );
    for network in networks {
        let (vni, port) = match network.driver {
            Driver::Ipsec => ("-".to_owned(), "-".to_owned()),
            Driver::Vxlan { vni, port } => (vni.to_string(), port.to_string()),
        };
        table.row([
            network.name.to_string(),
            text::list(&network.cidrs),
            network.driver.name().to_owned(),
            encrypted(&network.driver).to_owned(),
            vni,
            port,
            network.mtu.map_or_else(|| "auto".to_owned(), |mtu| mtu.to_string()),
            if network.internal { "yes" } else { "no" }.to_owned(),
            text::age(network.created, now),
        ]);
    }
    table
}

fn encrypted(driver: &Driver) -> &'static str {
    match driver {
        Driver::Ipsec => "yes",
        Driver::Vxlan { .. } => "no (clear)",
    }
}

fn created(network: &Network) -> String {
    let mut text = format!(
        "Created network {} ({}, driver {}, encrypted {}).\n",
        network.name,
        text::list(&network.cidrs),
        network.driver.name(),
        encrypted(&network.driver)
    );
    match network.driver {
        Driver::Ipsec => {}
        Driver::Vxlan { .. } => text.push_str(
            "Its packets travel between hosts in the clear: they are NOT encrypted, and anyone on the way can read them.\n",
        ),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(driver: &str) -> Network {
        let mut spec = NetworkSpec::new("red".parse().unwrap(), "10.43.0.0/16".parse().unwrap());
        spec.driver = Some(driver.to_owned());
        spec.validate(model::NetworkId::from_random([1; 8]), 7, 0).unwrap()
    }

    fn nobody() -> Use {
        Use { blocks: vec![], endpoints: vec![], peers: vec![], hosts: BTreeMap::new() }
    }

    fn host(candidates: &serde_json::Value) -> Host {
        let id = HostId::from_random([2; 8]);
        let host =
            serde_json::json!({"id": id, "name": "h1", "key": "", "joined": 0, "candidates": candidates});
        serde_json::from_value(host).unwrap()
    }

    #[test]
    fn create_ls_and_inspect_say_that_vxlan_is_not_encrypted_and_that_ipsec_is() {
        let said = |driver| {
            let network = network(driver);
            let details = details(&network, &nobody()).render();
            [created(&network), table(&[network]).render(Some(80)), details]
        };
        let [created, ls, inspect] = said("vxlan");
        assert!(
            created.contains("encrypted no (clear)") && created.contains("are NOT encrypted"),
            "{created}"
        );
        assert!(ls.contains("ENCRYPTED") && ls.contains("no (clear)"), "{ls}");
        assert!(inspect.contains("Encrypted:   no (clear)"), "{inspect}");
        let [created, ls, inspect] = said("ipsec");
        assert_eq!(created, "Created network red (10.43.0.0/16, driver ipsec, encrypted yes).\n");
        assert!(ls.contains("  yes  ") && inspect.contains("Encrypted:   yes"), "{ls}{inspect}");
        assert!(!inspect.contains("VNI"), "{inspect}");
    }

    #[test]
    fn a_network_in_clear_names_the_hosts_that_it_does_not_reach_and_an_encrypted_one_none() {
        let own = serde_json::json!({"address": "192.168.1.5", "mtu": 1500, "source": "route"});
        let seen = serde_json::json!({"address": "203.0.113.7", "mtu": 1500, "source": "observed"});
        let hosts = |candidates| {
            let host = host(&candidates);
            Use { hosts: BTreeMap::from([(host.id.clone(), host)]), ..nobody() }
        };
        let natted = hosts(serde_json::json!([own, seen]));
        let text = details(&network("vxlan"), &natted).render();
        assert!(text.contains("h1 is behind NAT (203.0.113.7)\n") && text.contains("--address"), "{text}");
        assert!(!details(&network("ipsec"), &natted).render().contains("NAT"));
        assert!(!details(&network("vxlan"), &hosts(serde_json::json!([own]))).render().contains("NAT"));
    }

    #[test]
    fn inspect_names_the_hosts_of_blocks_and_of_foreign_peers() {
        let (network, host) = (network("ipsec"), host(&serde_json::json!([])));
        let block = model::Block {
            network: network.id.clone(),
            cidr: "10.43.16.0/26".parse().unwrap(),
            host: host.id.clone(),
            leased: model::Revision(1),
        };
        let peer = serde_json::json!({
            "id": model::PeerId::from_random([3; 8]), "name": "office", "network": network.id, "host": host.id,
            "address": "192.0.2.1", "proof": {"by": "psk"}, "remote_cidrs": ["192.168.7.0/24"], "created": 0,
        });
        let use_ = Use {
            blocks: vec![block],
            peers: vec![serde_json::from_value(peer).unwrap()],
            hosts: BTreeMap::from([(host.id.clone(), host)]),
            ..nobody()
        };
        let text = details(&network, &use_).render();
        assert!(text.contains("10.43.16.0/26 on h1"), "{text}");
        assert!(text.contains("office: 192.168.7.0/24 by way of h1"), "{text}");
    }
}
