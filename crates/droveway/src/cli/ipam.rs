//! `droveway ipam`: ls, check, release.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use agent::doctor::server::View;
use agent::doctor::{self, Books};
use clap::{Args, Subcommand};
use ipnet::IpNet;
use model::{HostId, NetworkId};
use serde::Serialize;

use super::connection::{Connection, LocalAgent};
use super::doctor::{persistent, tell, view};
use super::exit::Failure;
use super::output::Output;
use super::parse;
use super::table::Table;
use super::text;
use crate::client::Error;

/// For how long to look again before something is called a finding.
const SETTLE: Duration = Duration::from_secs(5);

/// Addresses: pools, blocks leased to hosts, claimed addresses, and whether all agree on them
#[derive(Debug, Args)]
pub(super) struct IpamArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    agent: LocalAgent,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List pools, and what of them is leased, claimed or on its way back
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway ipam ls
  droveway ipam ls -o json | jq '.[] | select(.kind == \"withdrawn\")'

USED counts endpoints, as the server knows them. RESTING, addresses that were released a moment ago, is known of this \
machine's own blocks only. A withdrawn block was given back, and is leased to another host when those named have heard of \
it."
    )]
    Ls,
    /// Give up addresses that are retained for containers that are gone
    #[command(
        after_help = "An address is retained where its container has the label droveway.retain=true: the next one of that name gets it, on \
whichever host. `droveway ipam ls` shows those that are, and for whom. A container that has it keeps it.

Examples:
  droveway ipam release managed 10.42.15.192"
    )]
    Release {
        /// Name or id of the network
        #[arg(value_name = "NETWORK", value_parser = parse::reference)]
        network: String,
        /// The addresses
        #[arg(required = true, value_name = "ADDRESS")]
        addresses: Vec<IpAddr>,
    },
    /// Check that the server's leases, this host's ledger and the endpoints agree
    #[command(after_help = "Examples:
  droveway ipam check
  droveway ipam check -o json

On a host, its agent's ledger is checked too. Ends with 8 if anything was found; each line says what to do.")]
    Check,
}

impl IpamArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let client = self.connection.open()?;
        let agent = self.agent.open()?;
        let books = async || match agent.books().await {
            Ok(books) => Ok(Some(books)),
            Err(Error::NoAgent { .. } | Error::Unreachable { .. } | Error::File { .. }) => Ok(None),
            Err(error) => Err(Failure::from(error)),
        };
        match self.verb {
            Verb::Ls => {
                let rows = rows(&view(&client).await?, books().await?.as_ref());
                output.list(&rows, table, "There is no network.")
            }
            Verb::Release { network, addresses } => {
                for address in addresses {
                    client.retain_no_more(&network, address).await?;
                    output.remark(&format!("{address} is not retained any more."));
                }
                Ok(())
            }
            Verb::Check => {
                let look = async || {
                    let view = view(&client).await?;
                    let mut found = doctor::server::addresses(&view);
                    if let Some(books) = books().await? {
                        found.extend(doctor::books(&books));
                        found.extend(doctor::server::host(&books, &view));
                    }
                    Ok(found)
                };
                tell(output, &persistent(SETTLE, look).await?, "all agree on who has which addresses")
            }
        }
    }
}

/// A pool, or a part of it that is somebody's.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    network: String,
    kind: &'static str,
    range: String,
    host: Option<String>,
    used: usize,
    size: usize,
    resting: Option<usize>,
    note: String,
}

fn rows(view: &View, books: Option<&Books>) -> Vec<Row> {
    let host = |id: &HostId| {
        let found = view.hosts.iter().find(|view| view.host.id == *id);
        Some(found.map_or_else(|| id.to_string(), |view| view.host.name.to_string()))
    };
    let used = |network: &NetworkId, cidr: IpNet| {
        let of_network = view.endpoints.iter().filter(|endpoint| endpoint.network == *network);
        of_network.flat_map(|endpoint| &endpoint.addresses).filter(|address| cidr.contains(*address)).count()
    };
    let mut resting: BTreeMap<&NetworkId, Vec<IpAddr>> = BTreeMap::new();
    for (network, address) in books.iter().flat_map(|books| &books.resting) {
        resting.entry(network).or_default().push(*address);
    }
    let rest = |network: &NetworkId, cidr: IpNet| {
        resting.get(network).map_or(0, |all| all.iter().filter(|address| cidr.contains(*address)).count())
    };
    let mut rows = Vec::new();
    for network in &view.ipam.networks {
        let (geometry, id) = (network.geometry(), &network.id);
        let name = network.name.to_string();
        let blocks: Vec<_> = view.ipam.blocks.iter().filter(|block| block.network == *id).collect();
        let (first, last) = geometry.claims();
        let total = geometry.blocks() - geometry.claim_blocks();
        rows.push(Row {
            network: name.clone(),
            kind: "pool",
            range: network.pool().to_string(),
            host: None,
            used: used(id, network.pool()),
            size: geometry.addresses(network.pool()).count(),
            resting: None,
            note: format!("{} of {total} blocks leased, {first} to {last} for claims", blocks.len()),
        });
        rows.extend(blocks.iter().map(|block| Row {
            network: name.clone(),
            kind: "block",
            range: block.cidr.to_string(),
            host: host(&block.host),
            used: used(id, block.cidr),
            size: geometry.addresses(block.cidr).count(),
            resting: books.filter(|books| books.host == block.host).map(|_| rest(id, block.cidr)),
            note: String::new(),
        }));
        let withdrawn = view.ipam.withdrawn.iter().filter(|withdrawn| withdrawn.network == *id);
        rows.extend(withdrawn.map(|withdrawn| {
            let waits = text::list(withdrawn.waits_for.iter().filter_map(host));
            Row {
                network: name.clone(),
                kind: "withdrawn",
                range: withdrawn.cidr.to_string(),
                host: host(&withdrawn.host),
                used: used(id, withdrawn.cidr),
                size: geometry.addresses(withdrawn.cidr).count(),
                resting: None,
                note: format!("waits for {waits}"),
            }
        }));
        let claims = view.ipam.claims.iter().filter(|claim| claim.network == *id);
        rows.extend(claims.map(|claim| Row {
            network: name.clone(),
            kind: "claim",
            range: claim.address.to_string(),
            host: host(&claim.host),
            used: used(id, claim.address.into()),
            size: 1,
            resting: None,
            note: match (claim.asked, claim.router, &claim.retained) {
                (true, _, _) => "asked for; its block's host has not let go of it".to_owned(),
                (false, true, _) => "for the router".to_owned(),
                (false, false, Some(retained)) => format!("retained for {}", retained.owner),
                (false, false, None) => String::new(),
            },
        }));
    }
    rows
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(
        ["NETWORK", "KIND", "RANGE", "HOST", "USED", "SIZE", "RESTING", "NOTE"],
        &["NETWORK", "RANGE", "HOST"],
    );
    for row in rows {
        table.row([
            row.network.clone(),
            row.kind.to_owned(),
            row.range.clone(),
            row.host.clone().unwrap_or_default(),
            row.used.to_string(),
            row.size.to_string(),
            row.resting.map(|resting| resting.to_string()).unwrap_or_default(),
            row.note.clone(),
        ]);
    }
    table
}
