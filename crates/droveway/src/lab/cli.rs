//! `droveway lab …`: the lab's verbs as people type them.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use model::{Name, Protocol, PublishedPort};
use serde::Serialize;

use super::process::exit_code;
use super::spec::{DEFAULT, verb};
use super::underlay::Share;
use super::{Daemon, Kind, Lab, LabSpec, Node, RunSpec, Together, boxes, default_dir, nat};
use crate::cli::{Exit, Failure, Format, Output, Table, warn, write};

/// Several hosts on this one machine, as namespaces, to try things
///
/// A lab is a server and some hosts, each with its own network, processes and agent. Nothing of the machine is
/// changed: `droveway lab down` leaves nothing, after a crash too.
#[derive(Debug, Args)]
pub struct LabCommand {
    /// Which lab: several can be up at once
    #[arg(
        long = "lab",
        global = true,
        value_name = "NAME",
        default_value = DEFAULT,
        env = "DROVEWAY_LAB",
        hide_env_values = true,
        display_order = 901
    )]
    lab: Name,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Bring a lab up: a server and some hosts, each with an agent of its own
    #[command(after_help = "Without --docker it needs no root where the kernel allows user namespaces.

Examples:
  droveway lab up --hosts 3
  droveway lab up --docker                     # as root: with Docker Engines
  droveway lab up --servers 2   # `lab kill server`: agents go on at the other
  droveway lab up --lab jumbo --mtu 9000
  droveway lab up --nat h2                     # h2 is behind a NAT box, nat1
  droveway lab up --nat h2,h3                  # each behind its own: nat1, nat2
  droveway lab up --nat h2+h3                  # both behind one")]
    Up(Up),
    /// Run a program as a container without an engine: with namespaces and an address of its own
    #[command(
        after_help = "It prints the address. What the program says goes to HOST/run/NAME.log in the lab's directory (as root \
/run/droveway-lab/lab), unless -it is given.

Examples:
  droveway lab run h1 --name web -- python3 -m http.server 80
  droveway lab run h2 --name db1 --stack shop --service db -- sleep 1h
  droveway lab run h2 --name me -it -- bash"
    )]
    Run(Run),
    /// Run a command on a host, or in a container of it
    #[command(
        after_help = "The exit status is passed on. On the node `server`, and on hosts, droveway's own verbs need no options. \
`underlay` is where the hosts' cables end.

Examples:
  droveway lab exec h1 -- ip route
  droveway lab exec underlay -- tcpdump -ni ul-h1
  droveway lab exec h1/web -- ping -c 3 db
  droveway lab exec server -- droveway host ls"
    )]
    Exec {
        /// HOST, or HOST/NAME for a container (the lab's own or Docker's)
        #[arg(value_name = "HOST[/NAME]")]
        target: String,
        /// The command
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// List hosts, and the containers on them
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway lab ls
  droveway lab ls -o json | jq -r '.[].address'"
    )]
    Ls,
    /// Let no packet pass between two hosts, in either direction
    #[command(after_help = "Examples:
  droveway lab cut h1 h2
  droveway lab cut h1 server")]
    Cut {
        /// A host, or `server`
        #[arg(value_name = "HOST")]
        one: String,
        /// Another
        #[arg(value_name = "HOST")]
        other: String,
    },
    /// Lose a share of the packets between two hosts, in both directions
    #[command(after_help = "Examples:
  droveway lab loss h1 h2 1%
  droveway lab loss h1 h2 0%                   # ends it")]
    Loss {
        /// A host, or `server`
        #[arg(value_name = "HOST")]
        one: String,
        /// Another
        #[arg(value_name = "HOST")]
        other: String,
        /// How many are lost: 0% to 100%
        #[arg(value_name = "PERCENT%")]
        share: Share,
    },
    /// End every cut and every loss
    #[command(after_help = "Examples:
  droveway lab heal")]
    Heal,
    /// Run a command, and say what was on the underlay meanwhile
    #[command(
        after_help = "Everything that a host sends is looked at, whatever it is and whomever it is for. If one of the texts is in \
it, the exit status is 1.

Examples:
  droveway lab capture -- droveway lab exec h2/me -- ping -c 3 web
  droveway lab capture --find secret -- \\
    droveway lab exec h2/me -- wget -qO- http://web/secret"
    )]
    Capture {
        /// A text that should not be seen; may be repeated
        #[arg(long, value_name = "TEXT")]
        find: Vec<String>,
        /// The command, on this machine
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Give a host another address on the underlay, as if its lease had changed
    #[command(after_help = "Examples:
  droveway lab move h2 10.0.0.77")]
    Move {
        /// The host
        host: String,
        /// Its new address; the old one is gone at once
        #[arg(value_name = "ADDRESS")]
        address: std::net::IpAddr,
    },
    /// Have a NAT box forget its flows and take other ports for new ones
    #[command(after_help = "Examples:
  droveway lab rebind h2                       # the box that h2 is behind
  droveway lab rebind nat1")]
    Rebind {
        /// A host behind it, or the box
        #[arg(value_name = "HOST")]
        host: String,
    },
    /// Switch a host off, as if its plug were pulled; or kill one container of it
    #[command(after_help = "Examples:
  droveway lab kill h2                  # `droveway lab start h2` brings it back
  droveway lab kill h1/web")]
    Kill {
        /// HOST, or HOST/NAME for a container
        #[arg(value_name = "HOST[/NAME]")]
        target: String,
    },
    /// Switch a host on again: its disk is as it was
    #[command(after_help = "Examples:
  droveway lab start h2")]
    Start {
        /// The host
        host: String,
    },
    /// Take the lab down: nothing is left, after a crash too
    #[command(after_help = "Examples:
  droveway lab down
  droveway lab down --lab jumbo")]
    Down,
}

#[derive(Debug, Args)]
struct Up {
    /// How many hosts: h1, h2 and so on
    #[arg(long, default_value_t = 3, value_name = "N")]
    hosts: u32,
    /// How many servers, 1 or 2: `server`, and `server2` which shares an etcd with it (needs etcd)
    #[arg(long, default_value_t = 1, value_name = "N")]
    servers: u32,
    /// Give each host a Docker Engine of its own (needs root and dockerd)
    #[arg(long)]
    docker: bool,
    /// MTU of the underlay, in bytes
    #[arg(long, default_value_t = 1500, value_name = "BYTES")]
    mtu: u32,
    /// Only hosts and the underlay between them: no server, no agents
    #[arg(long)]
    bare: bool,
    /// Put hosts behind NAT boxes: `h2,h3` each behind its own, `h2+h3` both behind one
    #[arg(long, value_name = "HOST[+HOST][,HOST]", value_delimiter = ',')]
    nat: Vec<Together>,
    /// The underlay's addresses, IPv4 or IPv6 (fd00::/64) [default: 10.0.0.0/24]
    #[arg(long, value_name = "CIDR")]
    underlay: Option<ipnet::IpNet>,
}

#[derive(Debug, Args)]
struct Run {
    /// The host
    host: String,
    /// Its name: in DNS, and its hostname
    #[arg(long)]
    name: Name,
    /// The network it is attached to
    #[arg(long, default_value = "managed", value_name = "NET")]
    network: String,
    /// The stack that it belongs to
    #[arg(long)]
    stack: Option<Name>,
    /// The service of that stack
    #[arg(long, requires = "stack")]
    service: Option<Name>,
    /// Another name of it in DNS; may be repeated
    #[arg(long = "alias", value_name = "NAME")]
    aliases: Vec<Name>,
    /// A label; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Ask for this address, from the pool's first sixteenth or the host's own blocks
    #[arg(long, value_name = "ADDRESS")]
    address: Option<IpAddr>,
    /// Publish a port on the host; may be repeated
    #[arg(long = "publish", short = 'p', value_name = "HOSTPORT:PORT[/udp]", value_parser = port)]
    ports: Vec<PublishedPort>,
    /// Stay in the foreground with this terminal until the program ends; also as -it
    #[arg(long, short = 'i', short_alias = 't', overrides_with = "attach")]
    attach: bool,
    /// The program
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Does what was typed.
pub fn main(command: LabCommand, format: Format) -> Result<ExitCode> {
    let dir = default_dir(&command.lab);
    let open = || Lab::open(&dir);
    match command.verb {
        Verb::Up(up) => bring_up(command.lab.as_str(), up)?,
        Verb::Run(run) => return run_container(&open()?, run),
        Verb::Exec { target, command } => {
            let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
            return become_that(open()?.command_at(&target, &command, terminal)?);
        }
        Verb::Ls => list(&open()?, format)?,
        Verb::Cut { one, other } => open()?.cut(&one, &other)?,
        Verb::Loss { one, other, share } => open()?.lose(&one, &other, share.0)?,
        Verb::Heal => open()?.heal()?,
        Verb::Capture { find, command } => return capture(&open()?, &find, &command, format),
        Verb::Move { host, address } => open()?.readdress(&host, address)?,
        Verb::Rebind { host } => open()?.rebind(&host)?,
        Verb::Kill { target } => match target.split_once('/') {
            Some((host, name)) => open()?.kill_container(host, name)?,
            None => open()?.kill(&target)?,
        },
        Verb::Start { host } => open()?.start(&host)?,
        Verb::Down => {
            let lab = &command.lab;
            write(&if Lab::down_dir(&dir)? {
                format!("Lab {lab} is down: nothing of it is left.\n")
            } else {
                format!("Lab {lab} is not up: there is nothing to take down.\n")
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Nothing is left for us to do: signals, terminal and exit status are the other's.
fn become_that(mut command: Command) -> Result<ExitCode> {
    Err(command.exec()).with_context(|| format!("cannot run {}", command.get_program().display()))
}

fn bring_up(name: &str, up: Up) -> Result<()> {
    let mut spec = LabSpec::new(name)?;
    spec.hosts = up.hosts;
    spec.servers = up.servers;
    spec.docker = up.docker;
    spec.mtu = up.mtu;
    spec.bare = up.bare;
    spec.nats = boxes(up.nat);
    spec.underlay = up.underlay.unwrap_or(spec.underlay);
    spec.validate().map_err(|error| Failure::new(Exit::Usage, format!("{error:#}")))?;
    let lab = Lab::up_with(spec, &mut |line| warn(&format!("{line}\n")))?;
    let (bare, hosts) = (lab.spec().bare, lab.hosts());
    lab.keep()?;
    write(&go_on(&verb(name), &hosts, bare))?;
    Ok(())
}

/// What can be typed next.
fn go_on(lab: &str, hosts: &[String], bare: bool) -> String {
    let (first, last) = (hosts.first().map_or("", String::as_str), hosts.last().map_or("", String::as_str));
    let middle = if bare {
        format!("  {lab} exec {first} -- ping -c 3 {last}\n")
    } else {
        format!(
            "  {lab} run {first} --name web -- sleep 1h\n  {lab} run {last} --name me -it -- ping -c 3 web\n  \
             {lab} exec server -- droveway endpoint ls\n"
        )
    };
    format!("The lab is up. Go on with:\n{middle}  {lab} down\n")
}

fn run_container(lab: &Lab, run: Run) -> Result<ExitCode> {
    ensure!(
        !lab.spec().bare,
        "the lab is bare: it has no agents to attach a container; bring it up without --bare"
    );
    let spec = RunSpec {
        name: run.name,
        network: run.network,
        stack: run.stack,
        service: run.service,
        aliases: run.aliases,
        labels: run.labels.into_iter().collect::<BTreeMap<_, _>>(),
        address: run.address,
        ports: run.ports,
        command: run.command,
    };
    if run.attach {
        return become_that(lab.shim(&run.host, &spec, true)?);
    }
    let container = lab.run(&run.host, &spec)?;
    let addresses: Vec<String> =
        container.attached.endpoint.addresses.iter().map(ToString::to_string).collect();
    write(&(addresses.join(" ") + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the command with a capture around it.
fn capture(lab: &Lab, texts: &[String], command: &[String], format: Format) -> Result<ExitCode> {
    ensure!(
        !texts.iter().any(String::is_empty),
        "an empty text is in everything; give --find one that says something"
    );
    let (program, args) = command.split_first().context("there is no command to run")?;
    let mut capture = lab.capture(texts)?;
    let status = Command::new(program).args(args).env("DROVEWAY_LAB", lab.spec().name.as_str()).status();
    let status = status.with_context(|| format!("cannot run {program}"))?;
    let report = capture.report()?;
    Output::new(format).object(&report, |report| {
        let lines = texts.iter().enumerate().map(|(i, text)| {
            let first = report.found.iter().find(|found| found.text == i);
            let all = format!("is in none of {} frames ({} bytes)", report.frames, report.bytes);
            let outcome = first.map_or(all, |found| format!("IS SEEN, first in {found}"));
            format!("{text:?} {outcome}\n")
        });
        std::iter::once(report.to_string()).chain(lines).collect()
    })?;
    report.clean()?;
    Ok(ExitCode::from(exit_code(status)))
}

/// A row of `lab ls`.
#[derive(Debug, Serialize)]
struct HostRow {
    name: String,
    kind: Kind,
    state: &'static str,
    /// Of its `eth0`.
    address: String,
    /// The NAT box that it is behind.
    behind: Option<String>,
    pid: Option<u32>,
    /// What runs on it; in a `table`, by name.
    daemons: Vec<Daemon>,
    containers: Vec<ContainerRow>,
    /// What it loses of packets from others, in percent.
    lost: BTreeMap<String, f64>,
}

#[derive(Debug, Serialize)]
struct ContainerRow {
    name: String,
    addresses: Vec<String>,
    docker: bool,
}

fn list(lab: &Lab, format: Format) -> Result<()> {
    let state = lab.state()?;
    let mut rows = Vec::new();
    for Node { name, kind, behind, .. } in lab.spec().nodes() {
        let node = state.node(&name)?;
        let running = node.running();
        let mut containers: Vec<ContainerRow> = lab
            .containers(&name)?
            .into_iter()
            .map(|(name, addresses)| ContainerRow {
                name,
                addresses: addresses.iter().map(ToString::to_string).collect(),
                docker: false,
            })
            .collect();
        if running.is_some() && lab.spec().docker && kind == Kind::Host {
            containers.extend(docker_containers(lab, &name)?);
        }
        let others = state.faults.iter().filter_map(|fault| {
            let other = if fault.a == name { &fault.b } else { &fault.a };
            (fault.a == name || fault.b == name).then(|| (other.clone(), f64::from(fault.lost) / 100.0))
        });
        rows.push(HostRow {
            state: if running.is_some() { "up" } else { "off" },
            address: node.address.to_string(),
            kind,
            behind: behind.map(nat::name),
            pid: running.map(|pin| pin.pid),
            daemons: node.daemons.iter().filter(|(_, pin)| pin.alive()).map(|(daemon, _)| *daemon).collect(),
            containers,
            lost: others.collect(),
            name,
        });
    }
    Output::new(format).list(&rows, table, "")?;
    Ok(())
}

/// The engine's own containers, with the addresses that it shows for them.
fn docker_containers(lab: &Lab, host: &str) -> Result<Vec<ContainerRow>> {
    let ids = lab.exec(host, &["docker", "ps", "-q"])?;
    let ids = String::from_utf8_lossy(&ids.stdout).into_owned();
    if ids.trim().is_empty() {
        return Ok(Vec::new());
    }
    let show = "{{.Name}}{{range .NetworkSettings.Networks}} {{.IPAddress}}{{end}}";
    let mut command = vec!["docker", "inspect", "--format", show];
    command.extend(ids.split_ascii_whitespace());
    let output = lab.exec(host, &command)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let row = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let name = words.next()?.trim_start_matches('/').to_owned();
        Some(ContainerRow { name, addresses: words.map(str::to_owned).collect(), docker: true })
    };
    Ok(text.lines().filter_map(row).collect())
}

/// A line for each container; what is said of its host stands in the first of them.
fn table(rows: &[HostRow]) -> Table {
    let mut table = Table::new(
        ["HOST", "STATE", "UNDERLAY", "BEHIND", "RUNS", "CONTAINER", "ADDRESS", "LOSES"],
        &["HOST", "STATE", "UNDERLAY", "CONTAINER", "ADDRESS"],
    );
    for row in rows {
        let daemons = match row.kind {
            Kind::Nat => "nat".to_owned(),
            Kind::Server | Kind::Store | Kind::Host | Kind::Other => {
                row.daemons.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
            }
        };
        let lost: Vec<String> =
            row.lost.iter().map(|(from, share)| format!("{share}% from {from}")).collect();
        let [host, state, underlay, behind, runs] = [
            row.name.clone(),
            row.state.to_owned(),
            row.address.clone(),
            row.behind.clone().unwrap_or_default(),
            daemons,
        ];
        let (first, more) =
            row.containers.split_first().map_or((None, &[][..]), |(first, more)| (Some(first), more));
        let (name, addresses) = first.map(named).unwrap_or_default();
        table.row([host, state, underlay, behind, runs, name, addresses, lost.join(", ")]);
        for container in more {
            let same = || " ".to_owned();
            let (name, addresses) = named(container);
            table.row([same(), same(), same(), same(), same(), name, addresses, same()]);
        }
    }
    table
}

fn named(container: &ContainerRow) -> (String, String) {
    (container.name.clone(), container.addresses.join(" "))
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() {
        return Err(format!("{text:?} is no label; write KEY=VALUE"));
    }
    Ok((key.to_owned(), value.to_owned()))
}

fn port(text: &str) -> Result<PublishedPort, String> {
    let bad = || format!("{text:?} is no published port; write HOSTPORT:PORT or HOSTPORT:PORT/udp");
    let (ports, protocol) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.split('/').next().unwrap_or(text), Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return Err(bad()),
    };
    let (host, port) = ports.split_once(':').ok_or_else(bad)?;
    let number = |text: &str| text.parse().ok().filter(|&port: &u16| port != 0).ok_or_else(bad);
    Ok(PublishedPort { protocol, host_port: number(host)?, port: number(port)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_port_is_a_pair_with_a_protocol() {
        let tcp = PublishedPort { protocol: Protocol::Tcp, host_port: 8080, port: 80 };
        assert_eq!(port("8080:80").unwrap(), tcp);
        assert_eq!(port("8080:80/tcp").unwrap(), tcp);
        assert_eq!(port("53:53/udp").unwrap().protocol, Protocol::Udp);
        for bad in ["80", "0:80", "80:0", "80:80/icmp", "a:b", ""] {
            assert!(port(bad).unwrap_err().contains("HOSTPORT:PORT"), "{bad}");
        }
    }
}
