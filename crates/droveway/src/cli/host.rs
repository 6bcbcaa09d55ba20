//! `droveway host`: ls, inspect, label, rm.

use clap::{Args, Subcommand};
use model::api::{HostPatch, HostView, RefusedCopy, path};
use model::{Candidate, Host, Source};

use super::connection::Connection;
use super::exit::Failure;
use super::kind::{Kind, explained, inspect, remove};
use super::names::Names;
use super::output::Output;
use super::table::{Details, Table};
use super::{parse, text};

/// How long before its end the CA's is remarked: three years, in milliseconds.
const CA_REMARK: u64 = 3 * 365 * 86_400_000;
/// For how long a refused copy is remarked: a week, in milliseconds.
const COPY_REMARK: u64 = 7 * 86_400_000;

/// Hosts: the machines that run the agent
#[derive(Debug, Args)]
pub(super) struct HostArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List hosts
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway host ls
  droveway host ls -o json | jq -r '.[] | select(.connected | not) | .name'

ADDRESS is where other hosts reach it. \"behind NAT (A)\": the server sees it come from A, which is none of its own \
addresses. It then begins its tunnels itself; networks of --driver vxlan do not reach it.

STATE is whether the host's agent is connected to the server, or to another that shares its store. What runs on a host that \
is away goes on. SEEN is when it was last heard of: to two minutes, if the server itself was killed meanwhile."
    )]
    Ls,
    /// Show all that is known of hosts
    #[command(after_help = "Examples:
  droveway host inspect h1
  droveway host inspect h1 h2 -o yaml")]
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "HOST", value_parser = parse::reference)]
        names: Vec<String>,
    },
    /// Set and remove labels of a host
    #[command(after_help = "Examples:
  droveway host label h1 zone=north rack=7
  droveway host label h1 rack-               # removes it")]
    Label {
        /// Name or id
        #[arg(value_name = "HOST", value_parser = parse::reference)]
        name: String,
        /// KEY=VALUE sets, KEY- removes
        #[arg(required = true, value_name = "CHANGE", value_parser = parse::label_change)]
        changes: Vec<(String, Option<String>)>,
    },
    /// Remove hosts: their certificates, blocks and endpoints are no longer good
    #[command(aliases = ["remove", "delete"], after_help = "Stop the agent there first. The machine can join again with a new token, as a new host. Refused while it is the \
gateway of foreign peers: `droveway peer ls`.

Examples:
  droveway host rm h3")]
    Rm {
        /// Names or ids
        #[arg(required = true, value_name = "HOST", value_parser = parse::reference)]
        names: Vec<String>,
    },
}

impl HostArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let client = self.connection.open()?;
        match self.verb {
            Verb::Ls => {
                let hosts = client.hosts().await?;
                output.list(
                    &hosts,
                    table,
                    "There is no host yet; `droveway token create` prints how to join one.",
                )?;
                for remark in hosts.iter().filter_map(|view| copied(view, text::now())) {
                    output.remark(&remark);
                }
                if let Some(remark) = ca_ends(client.info().await?.ca_expires, text::now()) {
                    output.remark(&remark);
                }
                Ok(())
            }
            Verb::Inspect { names } => {
                let described = async || {
                    let known = Names::fetch(&client).await?;
                    Ok(move |view: &HostView| details(view, &known))
                };
                inspect::<HostView, _>(&client, output, &names, described).await
            }
            Verb::Label { name, changes } => {
                let patch = HostPatch { labels: changes.into_iter().collect() };
                let patched = client.patch_host(&name, &patch).await;
                explained::<HostView, _>(&client, &name, patched).await?;
                let host = client.host(&name).await?;
                output.object(&host, labelled)
            }
            Verb::Rm { names } => remove::<HostView>(&client, output, &names).await,
        }
    }
}

impl Kind for HostView {
    const WHAT: &'static str = "host";
    const PATH: &'static str = path::HOSTS;

    fn name(&self) -> &str {
        self.host.name.as_str()
    }
}

/// That the CA runs out, long before it does.
fn ca_ends(expires: model::UnixMillis, now: model::UnixMillis) -> Option<String> {
    (expires < now + CA_REMARK).then(|| {
        format!(
            "The CA's certificate runs out on {}. All hosts have to join a new environment before that: see docs/operations.md.",
            text::utc(expires)
        )
    })
}

/// That somebody came with a copy of the host's state directory, lately.
fn copied(view: &HostView, now: model::UnixMillis) -> Option<String> {
    let copy = view.copy.as_ref().filter(|copy| now.saturating_sub(copy.at) < COPY_REMARK)?;
    let (host, from, age) = (&view.host.name, copy.from, text::age(copy.at, now));
    Some(format!(
        "{host}: an agent with a copy of its state directory came from {from} {age} ago, and was refused. Look for a machine \
         that was copied, or put back from a backup: see docs/operations.md."
    ))
}

fn labelled(view: &HostView) -> String {
    let labels = text::labels(&view.host.labels);
    let labels = if labels.is_empty() { "no labels" } else { &labels };
    text::printable(&format!("{}: {labels}", view.host.name)) + "\n"
}

fn table(hosts: &[HostView]) -> Table {
    let now = text::now();
    let mut table = Table::new(
        ["NAME", "STATE", "SEEN", "ADDRESS", "BLOCKS", "ENDPOINTS", "VERSION", "LABELS"],
        &["NAME", "STATE", "ADDRESS"],
    );
    for view in hosts {
        table.row([
            view.host.name.to_string(),
            state(view).to_owned(),
            if view.connected { "now".to_owned() } else { seen(view, now) },
            behind_nat(&view.host).unwrap_or_else(|| {
                view.host.underlay().map(|candidate| candidate.address.to_string()).unwrap_or_default()
            }),
            view.blocks.len().to_string(),
            view.endpoints.to_string(),
            view.version.clone().unwrap_or_default(),
            text::labels(&view.host.labels),
        ]);
    }
    table
}

/// That a host is behind a NAT, and which.
pub(super) fn behind_nat(host: &Host) -> Option<String> {
    let outside = host.outside().filter(|_| host.behind_nat())?;
    Some(format!("behind NAT ({})", outside.address))
}

/// Until when the certificate is good that the host's agent showed last.
fn certificate(expires: model::UnixMillis) -> String {
    let until = text::utc(expires);
    if expires > text::now() {
        format!("good until {until}")
    } else {
        format!("ran out on {until}: shown, not enforced")
    }
}

fn seen(view: &HostView, now: model::UnixMillis) -> String {
    view.seen.map(|seen| format!("{} ago", text::age(seen, now))).unwrap_or_default()
}

fn state(view: &HostView) -> &'static str {
    if view.connected { "up" } else { "away" }
}

fn details(view: &HostView, names: &Names) -> Details {
    let host = &view.host;
    let blocks: Vec<String> = view
        .blocks
        .iter()
        .map(|block| format!("{} of {}", block.cidr, names.network(&block.network)))
        .collect();
    let mut details = Details::default();
    details
        .add("Name", host.name.to_string())
        .add("Id", host.id.to_string())
        .add("State", state(view))
        .add("Seen", view.seen.map(text::utc).unwrap_or_default())
        .add("Agent", view.version.clone().unwrap_or_default())
        .add("Certificate", view.certificate_expires.map(certificate).unwrap_or_default())
        .add("Starts", view.incarnation.map(|number| number.to_string()).unwrap_or_default())
        .add("Copies", view.copy.as_ref().map(refused).unwrap_or_default())
        .add("Addresses", addresses(&host.candidates))
        .add(
            "Reached",
            behind_nat(host).map(|nat| format!("{nat}: it begins its tunnels itself")).unwrap_or_default(),
        )
        .add("Labels", text::labels(&host.labels))
        .add("Joined", text::utc(host.joined))
        .add("Key", format!("SHA-256 {}", host.key))
        .add("Blocks", if blocks.is_empty() { "none leased".to_owned() } else { blocks.join("\n") })
        .add("Endpoints", view.endpoints.to_string());
    details
}

/// That copies of its state directory came.
fn refused(copy: &RefusedCopy) -> String {
    let times = if copy.times == 1 { "once".to_owned() } else { format!("{} times", copy.times) };
    format!("refused {times}, last on {} from {}", text::utc(copy.at), copy.from)
}

/// Underlay addresses, one a line, best first.
pub(super) fn addresses(candidates: &[Candidate]) -> String {
    let line = |candidate: &Candidate| {
        let how = match candidate.source {
            Source::Given => "given",
            Source::Route => "on the route to the server",
            Source::Interface => "on an interface",
            Source::Observed => "where the server sees it come from",
        };
        let port = candidate.port.map(|port| format!(" port {port}")).unwrap_or_default();
        format!("{}{port}, MTU {}, {how}", candidate.address, candidate.mtu)
    };
    candidates.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_shows_its_state_address_and_labels() {
        let view: HostView = serde_json::from_value(serde_json::json!({
            "id": "h-aaaaaaaaaa", "name": "h1", "key": "00", "joined": 0, "labels": {"zone": "a"},
            "candidates": [{"address": "10.0.0.6", "mtu": 1500, "source": "route"}],
            "connected": true, "blocks": [], "endpoints": 3, "version": "0.1.0"
        }))
        .unwrap();
        let ls = table(std::slice::from_ref(&view)).render(None);
        let row: Vec<&str> = ls.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["h1", "up", "now", "10.0.0.6", "0", "3", "0.1.0", "zone=a"]);
        assert!(
            details(&view, &Names::default())
                .render()
                .contains("10.0.0.6, MTU 1500, on the route to the server")
        );
        assert_eq!(labelled(&view), "h1: zone=a\n");
    }

    #[test]
    fn a_copy_that_was_refused_is_remarked_for_a_week_and_shown_for_ever() {
        let view: HostView = serde_json::from_value(serde_json::json!({
            "id": "h-aaaaaaaaaa", "name": "h1", "key": "00", "joined": 0, "connected": true, "blocks": [],
            "endpoints": 0, "incarnation": 7, "copy": {"at": 0, "from": "10.0.0.9", "times": 2}
        }))
        .unwrap();
        let remark = copied(&view, 60_000).unwrap();
        assert!(remark.contains("h1") && remark.contains("from 10.0.0.9"), "{remark}");
        assert_eq!(copied(&view, 8 * 86_400_000), None);
        let inspect = details(&view, &Names::default()).render();
        assert!(inspect.contains("refused 2 times, last on 1970-01-01"), "{inspect}");
    }

    #[test]
    fn the_end_of_the_ca_is_remarked_three_years_before() {
        let year = 365 * 86_400_000;
        assert_eq!(ca_ends(50 * year, 0), None);
        assert!(ca_ends(2 * year, 0).unwrap().contains("runs out on 1972-01-01"));
    }

    #[test]
    fn a_host_behind_a_nat_says_so_and_where_it_comes_from() {
        let view: HostView = serde_json::from_value(serde_json::json!({
            "id": "h-aaaaaaaaaa", "name": "h1", "key": "00", "joined": 0,
            "candidates": [
                {"address": "192.168.1.5", "mtu": 1500, "source": "route"},
                {"address": "203.0.113.7", "mtu": 1500, "source": "observed"},
            ],
            "connected": true, "blocks": [], "endpoints": 3, "version": "0.1.0"
        }))
        .unwrap();
        let ls = table(std::slice::from_ref(&view)).render(Some(80));
        assert!(ls.contains("behind NAT (203.0.113.7)"), "{ls}");
        let inspect = details(&view, &Names::default()).render();
        assert!(inspect.contains("behind NAT (203.0.113.7): it begins its tunnels itself"), "{inspect}");
        assert!(inspect.contains("203.0.113.7, MTU 1500, where the server sees it come from"), "{inspect}");
    }
}
