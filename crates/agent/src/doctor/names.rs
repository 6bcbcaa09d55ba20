//! What the routers' DNS answers, against the endpoints there are.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use linux::netns::Netns;
use model::{Endpoint, NetworkId, SERVICE_ADDRESS};

use super::{Books, Finding, Kind};

/// How long an answer may take, and how often it is asked for.
const WAIT: (Duration, usize) = (Duration::from_millis(700), 3);
/// The most names that are asked for in one network: a look shall be over soon.
const MOST: usize = 512;

/// Asks each router of this host for the names of the endpoints of its network. `others` are those of other hosts, as the
/// server has them now; without it, as the last snapshot has them.
pub fn examine(books: &Books, netns_dir: &Path, others: Option<&[Endpoint]>) -> Vec<Finding> {
    let catalog = books.catalog();
    let networks: BTreeSet<&NetworkId> =
        books.records.iter().map(|record| &record.endpoint.network).collect();
    let mut findings = Vec::new();
    for network in networks {
        let Some(known) = catalog.networks.get(network) else { continue };
        let own = books.records.iter().map(|record| &*record.endpoint);
        let of_network = |endpoint: &&Endpoint| endpoint.network == *network;
        let remote = |endpoint: &&Endpoint| endpoint.host != books.host;
        let endpoints: Vec<&Endpoint> = match others {
            Some(others) => own.chain(others.iter().filter(remote)).filter(of_network).collect(),
            None => own.chain(catalog.endpoints().filter(remote)).filter(of_network).collect(),
        };
        let place = format!("{}, names of {}", books.name, known.name);
        let netns = netns_dir.join(format!("{}{}", plan::ROUTER_PREFIX, known.name));
        let opened = Netns::open(&netns).and_then(|netns| netns.run(open));
        let socket = match opened {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => {
                findings.push(Finding::new(Kind::NameUnanswered, place, error.to_string()));
                continue;
            }
            Err(error) => {
                findings.push(Finding::new(Kind::NameUnanswered, place, error.to_string()));
                continue;
            }
        };
        for (name, expected) in expected(&endpoints).into_iter().take(MOST) {
            let name = format!("{name}.{}", books.domain);
            let finding = match ask(&socket, &name) {
                Ok(Answer { addresses, whole }) => {
                    let right = addresses.is_subset(&expected) && (!whole || addresses == expected);
                    if right && !addresses.is_empty() {
                        continue;
                    }
                    let what = format!("{name} is answered with {}", list(&addresses));
                    Finding::new(Kind::NameWrong, &place, format!("{what} in place of {}", list(&expected)))
                }
                Err(error) => Finding::new(Kind::NameUnanswered, &place, format!("{name}: {error}")),
            };
            let unanswered = finding.kind == Kind::NameUnanswered;
            findings.push(finding);
            if unanswered {
                // The others would not be answered either.
                break;
            }
        }
    }
    findings
}

/// The names of endpoints, with the addresses that should come: of the healthy ones, or of all if none is.
fn expected(endpoints: &[&Endpoint]) -> BTreeMap<String, BTreeSet<IpAddr>> {
    let mut named: BTreeMap<String, Vec<&Endpoint>> = BTreeMap::new();
    for endpoint in endpoints {
        let names: BTreeSet<String> =
            endpoint.name.iter().chain(&endpoint.aliases).map(|name| name.as_str().to_lowercase()).collect();
        for name in names {
            named.entry(name).or_default().push(endpoint);
        }
    }
    let addresses = |of: Vec<&Endpoint>| {
        let any = of.iter().any(|endpoint| endpoint.healthy);
        let chosen = of.iter().filter(|endpoint| endpoint.healthy || !any);
        chosen.flat_map(|endpoint| endpoint.addresses.iter().copied()).filter(IpAddr::is_ipv4).collect()
    };
    named.into_iter().map(|(name, of)| (name, addresses(of))).collect()
}

struct Answer {
    addresses: BTreeSet<IpAddr>,
    whole: bool,
}

fn open() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((SERVICE_ADDRESS, 53))?;
    socket.set_read_timeout(Some(WAIT.0))?;
    Ok(socket)
}

fn ask(socket: &UdpSocket, name: &str) -> io::Result<Answer> {
    let broken = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    let mut message = Message::query();
    let name = Name::from_str(&format!("{name}.")).map_err(|error| broken(&error))?;
    message.add_query(Query::query(name, RecordType::A));
    let query = message.to_vec().map_err(|error| broken(&error))?;
    let mut buffer = [0; 4096];
    let mut last = io::Error::new(io::ErrorKind::TimedOut, "no answer");
    for _ in 0..WAIT.1 {
        let received = socket.send(&query).and_then(|_| socket.recv(&mut buffer));
        let answer = match received {
            Ok(length) => Message::from_vec(&buffer[..length]).map_err(|error| broken(&error))?,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                continue;
            }
            Err(error) => {
                last = error;
                continue;
            }
        };
        if answer.id != message.id {
            continue;
        }
        let addresses = answer.answers.iter().filter_map(|record| match &record.data {
            RData::A(address) => Some(IpAddr::V4(address.0)),
            _ => None,
        });
        return Ok(Answer { addresses: addresses.collect(), whole: !answer.truncation });
    }
    Err(last)
}

fn list(addresses: &BTreeSet<IpAddr>) -> String {
    if addresses.is_empty() {
        return "nothing".to_owned();
    }
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
