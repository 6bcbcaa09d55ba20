//! `droveway network`: create, ls, inspect, rm.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use ipnet::IpNet;
use model::{Driver, Endpoint, HostId, Name, Network, NetworkSpec};

use super::connection::{Connection, each, suggest};
use super::exit::Failure;
use super::output::Output;
use super::table::{Details, Table};
use super::{parse, text};
use crate::client::Client;

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
    /// The vxlan driver sends packets from host to host in the clear: NOT encrypted. Use it where you trust what is
    /// between your hosts.
    #[command(after_help = "Examples:
  droveway network create backend --subnet 10.43.0.0/16
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
    /// How packets travel between hosts. vxlan: the kernel's VXLAN, in the clear, NOT encrypted
    #[arg(long, default_value = "vxlan")]
    driver: String,
    /// VXLAN network identifier, 1 to 16777215 [default: the next free one]
    #[arg(long, value_name = "N")]
    vni: Option<u32>,
    /// UDP port between hosts [default: 4789]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// MTU inside, in bytes [default: worked out from the hosts' interfaces, 1450 on 1500]
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
            Verb::Inspect { names } => inspect(&client, &names, output).await,
            Verb::Rm { names } => {
                let (_, result) = each(&names, async |name| match client.remove_network(name).await {
                    Ok(()) => output.done(name),
                    Err(error) => Err(suggest(error, "network", name, async || known(&client).await).await),
                })
                .await;
                result
            }
        }
    }
}

async fn known(client: &Client) -> Result<Vec<String>, crate::client::Error> {
    Ok(client.networks().await?.iter().map(|network| network.name.to_string()).collect())
}

async fn inspect(client: &Client, names: &[String], output: Output) -> Result<(), Failure> {
    let (networks, result) = each(names, async |name| match client.network(name).await {
        Ok(network) => Ok(network),
        Err(error) => Err(suggest(error, "network", name, async || known(client).await).await),
    })
    .await;
    if !networks.is_empty() {
        let use_ = Use {
            blocks: client.blocks().await?,
            endpoints: client.endpoints().await?,
            hosts: client.hosts().await?.into_iter().map(|view| (view.host.id, view.host.name)).collect(),
        };
        output.inspect(&networks, |network| details(network, &use_))?;
    }
    result
}

/// Who uses networks.
struct Use {
    blocks: Vec<model::Block>,
    endpoints: Vec<Endpoint>,
    hosts: BTreeMap<HostId, Name>,
}

fn details(network: &Network, use_: &Use) -> Details {
    let blocks: Vec<String> = use_
        .blocks
        .iter()
        .filter(|block| block.network == network.id)
        .map(|block| {
            let host = use_.hosts.get(&block.host).map_or_else(|| block.host.to_string(), Name::to_string);
            format!("{} on {host}", block.cidr)
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
        Driver::Vxlan { vni, port } => details.add("VNI", vni.to_string()).add("UDP port", port.to_string()),
    };
    details
        .add("MTU", network.mtu.map_or_else(|| "worked out by each host".to_owned(), |mtu| mtu.to_string()))
        .add("Internal", if network.internal { "yes: no way out" } else { "no" })
        .add("Labels", text::labels(&network.labels))
        .add("Created", text::utc(network.created))
        .add("Block size", format!("/{}", network.block_prefix))
        .add("Blocks", if blocks.is_empty() { "none leased".to_owned() } else { blocks.join("\n") })
        .add("Endpoints", endpoints.to_string());
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
        "Created network {} ({}, {}).\n",
        network.name,
        text::list(&network.cidrs),
        network.driver.name()
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

    fn network() -> Network {
        NetworkSpec::new("red".parse().unwrap(), "10.43.0.0/16".parse().unwrap())
            .validate(model::NetworkId::from_random([1; 8]), 7, 0)
            .unwrap()
    }

    #[test]
    fn create_ls_and_inspect_say_that_vxlan_is_not_encrypted() {
        assert!(created(&network()).contains("in the clear: they are NOT encrypted"));
        let ls = table(&[network()]).render(Some(80));
        assert!(ls.contains("ENCRYPTED") && ls.contains("no (clear)"), "{ls}");
        let use_ = Use { blocks: vec![], endpoints: vec![], hosts: BTreeMap::new() };
        assert!(details(&network(), &use_).render().contains("Encrypted:   no (clear)"));
    }

    #[test]
    fn inspect_names_the_hosts_of_blocks() {
        let host = HostId::from_random([2; 8]);
        let block = model::Block {
            network: network().id,
            cidr: "10.43.16.0/26".parse().unwrap(),
            host: host.clone(),
            leased: model::Revision(1),
        };
        let use_ = Use {
            blocks: vec![block],
            endpoints: vec![],
            hosts: BTreeMap::from([(host, "h1".parse().unwrap())]),
        };
        assert!(details(&network(), &use_).render().contains("10.43.16.0/26 on h1"));
    }
}
