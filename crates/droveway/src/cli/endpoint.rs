//! `droveway endpoint`: ls, inspect.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use model::{Endpoint, Name, Protocol};

use super::connection::Connection;
use super::exit::Failure;
use super::kind::{each, unknown};
use super::names::Names;
use super::output::Output;
use super::table::{Details, Table};
use super::{parse, text};

/// Endpoints: the attachments of containers to networks
#[derive(Debug, Args)]
pub(super) struct EndpointArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List endpoints
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway endpoint ls
  droveway endpoint ls --network backend --host h1
  droveway endpoint ls -o json | jq -r '.[] | [.name, .addresses[0]] | @tsv'"
    )]
    Ls {
        /// Only of this network: name or id
        #[arg(long, value_name = "NETWORK")]
        network: Option<String>,
        /// Only on this host: name or id
        #[arg(long, value_name = "HOST")]
        host: Option<String>,
    },
    /// Show all that is known of endpoints
    #[command(after_help = "Examples:
  droveway endpoint inspect db
  droveway endpoint inspect 10.42.64.98 -o yaml

A container's name may be there on several hosts; then all of them are shown.")]
    Inspect {
        /// Ids, container names, container ids (their beginning will do) or addresses
        #[arg(required = true, value_name = "ENDPOINT", value_parser = parse::reference)]
        names: Vec<String>,
    },
}

impl EndpointArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let client = self.connection.open()?;
        let names = Names::fetch(&client).await?;
        let mut endpoints = client.endpoints().await?;
        match self.verb {
            Verb::Ls { network, host } => {
                let network = network.map(|wanted| find("network", &wanted, &names.networks)).transpose()?;
                let host = host.map(|wanted| find("host", &wanted, &names.hosts)).transpose()?;
                endpoints.retain(|endpoint| {
                    network.as_ref().is_none_or(|id| *id == endpoint.network)
                        && host.as_ref().is_none_or(|id| *id == endpoint.host)
                });
                endpoints.sort_by_cached_key(|endpoint| order(endpoint, &names));
                output.list(
                    &endpoints,
                    |endpoints| table(endpoints, &names),
                    "No endpoint is attached; on any host, try: docker run --rm -it --network managed busybox",
                )
            }
            Verb::Inspect { names: wanted } => {
                let (found, result) = each(&wanted, async |wanted| matching(&endpoints, wanted)).await;
                let found: Vec<&Endpoint> = found.into_iter().flatten().collect();
                if !found.is_empty() {
                    output.inspect(&found, |endpoint| details(endpoint, &names))?;
                }
                result
            }
        }
    }
}

/// By network, then by address: neighbours stand together.
fn order(endpoint: &Endpoint, names: &Names) -> (String, Option<std::net::IpAddr>) {
    (names.network(&endpoint.network), endpoint.addresses.first().copied())
}

/// The id of what is called `wanted`, or whose id that is.
fn find<I: Clone + Ord + ToString>(
    what: &str,
    wanted: &str,
    known: &BTreeMap<I, Name>,
) -> Result<I, Failure> {
    known
        .iter()
        .find(|(id, name)| name.as_str() == wanted || id.to_string() == wanted)
        .map(|(id, _)| id.clone())
        .ok_or_else(|| unknown(what, wanted, known.values().map(Name::as_str)))
}

/// The endpoints that `wanted` can mean: an id or an address, else a name, else the beginning of a container's id.
fn matching<'a>(endpoints: &'a [Endpoint], wanted: &str) -> Result<Vec<&'a Endpoint>, Failure> {
    let all = |test: &dyn Fn(&Endpoint) -> bool| {
        endpoints.iter().filter(|endpoint| test(endpoint)).collect::<Vec<_>>()
    };
    let named = |endpoint: &Endpoint| {
        endpoint.name.iter().chain(&endpoint.aliases).any(|name| name.as_str() == wanted)
    };
    let tests: [&dyn Fn(&Endpoint) -> bool; 4] = [
        &|endpoint| endpoint.id.as_str() == wanted,
        &|endpoint| endpoint.addresses.iter().any(|address| address.to_string() == wanted),
        &named,
        &|endpoint| {
            wanted.len() >= 4
                && endpoint.container.as_ref().is_some_and(|container| container.starts_with(wanted))
        },
    ];
    tests.into_iter().map(all).find(|found| !found.is_empty()).ok_or_else(|| {
        unknown(
            "endpoint",
            wanted,
            endpoints.iter().filter_map(|endpoint| endpoint.name.as_ref()).map(Name::as_str),
        )
    })
}

fn table(endpoints: &[Endpoint], names: &Names) -> Table {
    let now = text::now();
    let mut table = Table::new(
        ["ID", "NAME", "NETWORK", "HOST", "ADDRESS", "MAC", "SERVICE", "KIND", "AGE"],
        &["ID", "NAME", "ADDRESS"],
    );
    for endpoint in endpoints {
        table.row([
            endpoint.id.to_string(),
            endpoint.name.as_ref().map(Name::to_string).unwrap_or_default(),
            names.network(&endpoint.network),
            names.host(&endpoint.host),
            text::list(&endpoint.addresses),
            endpoint.mac.to_string(),
            service(endpoint),
            endpoint.kind.to_string(),
            text::age(endpoint.created, now),
        ]);
    }
    table
}

/// `stack/service`, or the one that there is.
fn service(endpoint: &Endpoint) -> String {
    let parts = endpoint.stack.iter().chain(&endpoint.service);
    parts.map(Name::to_string).collect::<Vec<_>>().join("/")
}

fn details(endpoint: &Endpoint, names: &Names) -> Details {
    let ports = endpoint.ports.iter().map(|port| {
        let protocol = match port.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        format!("{} → {}/{protocol}", port.host_port, port.port)
    });
    let mut details = Details::default();
    details
        .add("Id", endpoint.id.to_string())
        .add("Name", endpoint.name.as_ref().map(Name::to_string).unwrap_or_default())
        .add("Stack", endpoint.stack.as_ref().map(Name::to_string).unwrap_or_default())
        .add("Service", endpoint.service.as_ref().map(Name::to_string).unwrap_or_default())
        .add("Aliases", text::list(&endpoint.aliases))
        .add("Network", format!("{} ({})", names.network(&endpoint.network), endpoint.network))
        .add("Host", format!("{} ({})", names.host(&endpoint.host), endpoint.host))
        .add("Address", text::list(&endpoint.addresses))
        .add("MAC", endpoint.mac.to_string())
        .add("Kind", endpoint.kind.to_string())
        .add("Container", endpoint.container.clone().unwrap_or_default())
        .add("Ports", text::list(ports))
        .add(
            "Healthy",
            if endpoint.healthy { "yes" } else { "no: names do not answer with it while others are" },
        )
        .add("Labels", text::labels(&endpoint.labels).replace(',', "\n"))
        .add("Created", text::utc(endpoint.created));
    details
}

#[cfg(test)]
mod tests {
    use model::{HostId, NetworkId};

    use super::*;
    use crate::cli::exit::Exit;

    fn endpoint(seed: u8, name: &str, address: &str) -> Endpoint {
        serde_json::from_value(serde_json::json!({
            "id": model::EndpointId::from_random([seed; 8]), "network": NetworkId::from_random([1; 8]),
            "host": HostId::from_random([seed; 8]), "name": name, "stack": "shop", "service": "db",
            "addresses": [address], "mac": "02:00:00:00:00:01", "kind": "docker",
            "container": format!("{seed}cafe0123"), "created": 0,
        }))
        .unwrap()
    }

    #[test]
    fn an_endpoint_is_found_by_id_address_name_and_container_and_a_name_may_mean_several() {
        let all = [
            endpoint(1, "db", "10.42.64.2"),
            endpoint(2, "db", "10.42.64.3"),
            endpoint(3, "web", "10.42.64.4"),
        ];
        let count = |wanted: &str| matching(&all, wanted).map(|found| found.len());
        assert_eq!(count(all[0].id.as_str()), Ok(1));
        assert_eq!(count("10.42.64.3"), Ok(1));
        assert_eq!(count("db"), Ok(2));
        assert_eq!(count("3cafe"), Ok(1));
        let failure = count("wbe").unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
        assert!(failure.render().contains("\"web\""), "{}", failure.render());
    }

    #[test]
    fn names_stand_for_ids_where_they_are_known() {
        let names = Names {
            networks: BTreeMap::from([(NetworkId::from_random([1; 8]), "managed".parse().unwrap())]),
            hosts: BTreeMap::new(),
        };
        let text = table(&[endpoint(1, "db", "10.42.64.2")], &names).render(None);
        assert!(text.contains("managed") && text.contains("h-") && text.contains("shop/db"), "{text}");
        assert_eq!(find("network", "managed", &names.networks), Ok(NetworkId::from_random([1; 8])));
        assert!(
            find("network", "manage", &names.networks)
                .unwrap_err()
                .render()
                .contains("did you mean \"managed\"")
        );
    }
}
