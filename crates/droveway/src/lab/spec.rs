//! What a lab shall be, and where its things are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net};
use model::Name;
use serde::{Deserialize, Serialize};

use super::nat::Nat;

/// The most hosts a lab can have.
pub const HOSTS_MAX: u32 = 50;
/// The lab that is meant where none is named.
pub(super) const DEFAULT: &str = "lab";
/// The node on which the server runs.
pub const SERVER: &str = "server";
/// Where the nodes' cables end: no node, but commands run there, captures for example.
pub const UNDERLAY: &str = "underlay";
/// The node on which the second of two servers runs.
pub const SECOND: &str = "server2";
/// The node on which their store runs.
pub const STORE: &str = "etcd";
/// Port of a server.
pub(super) const SERVER_PORT: u16 = 7443;
/// Port of the store that two servers share.
pub(super) const STORE_PORT: u16 = 2379;
/// Below it, dockerd keeps images and containers: it cannot on a tmpfs.
const DOCKER_ROOT: &str = "/var/lib/droveway-lab";

/// The longest name that a node's port can carry (`IFNAMSIZ` less `ul-`).
const NODE_NAME_MAX: usize = 12;

/// What a node is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Runs a server.
    Server,
    /// Runs the etcd that two servers share.
    Store,
    /// Runs an agent.
    Host,
    /// Is between the underlay and those behind it, and gives its address for theirs.
    Nat,
    /// Runs nothing of Droveway.
    Other,
}

/// A node as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub kind: Kind,
    /// The address of its `eth0`.
    pub address: IpAddr,
    /// The NAT box that it is behind, by its number from 0.
    pub(super) behind: Option<usize>,
}

/// What a lab shall be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabSpec {
    /// Its name: several labs may be up at once.
    pub name: Name,
    /// How many hosts, from 1 to [`HOSTS_MAX`]: `h1`, `h2` and so on.
    pub hosts: u32,
    /// How many servers, 1 or 2. Two share an etcd, on a node of its own.
    #[serde(default = "one")]
    pub servers: u32,
    /// Whether each host has a Docker Engine of its own. Needs root.
    pub docker: bool,
    /// Only nodes and the underlay: no server, no agents.
    pub bare: bool,
    /// MTU of the underlay in bytes.
    pub mtu: u32,
    /// Where the lab keeps its state, logs and disks. Made by `up`, removed by `down`.
    pub dir: PathBuf,
    /// The droveway program.
    pub program: PathBuf,
    /// The underlay, of either family. `.1` is the bridge, `.2` the server, `.3` a second one, `.4` its etcd, `.5` host `h1`, `.101` the NAT box `nat1`,
    /// `.201` the first of `others`.
    pub underlay: IpNet,
    /// NAT boxes, `nat1` and so on, each with those who are behind it.
    #[serde(default)]
    pub nats: Vec<Nat>,
    /// Names of more nodes, on which nothing of Droveway runs: for gateways of another make.
    #[serde(default)]
    pub others: Vec<Name>,
    /// Text of `/etc/resolv.conf` on each node; a nameserver that refuses quickly if left out.
    #[serde(default)]
    pub resolv_conf: Option<String>,
    /// More arguments for each agent.
    #[serde(default)]
    pub agent_args: Vec<String>,
    /// More arguments for each Docker Engine.
    #[serde(default)]
    pub docker_args: Vec<String>,
    /// More arguments for the server.
    #[serde(default)]
    pub server_args: Vec<String>,
}

impl LabSpec {
    /// A lab of that name with three hosts, run by this program, in the default directory.
    pub fn new(name: &str) -> Result<Self> {
        let name: Name = name.parse()?;
        Ok(Self {
            hosts: 3,
            servers: 1,
            docker: false,
            bare: false,
            mtu: 1500,
            dir: default_dir(&name),
            program: std::env::current_exe().context("cannot find the droveway program")?,
            underlay: Ipv4Net::new(Ipv4Addr::new(10, 0, 0, 0), 24)?.into(),
            nats: Vec::new(),
            others: Vec::new(),
            resolv_conf: None,
            agent_args: Vec::new(),
            docker_args: Vec::new(),
            server_args: Vec::new(),
            name,
        })
    }

    /// Refuses what cannot be made.
    pub(super) fn validate(&self) -> Result<()> {
        let name = &self.name;
        ensure!(
            (1..=HOSTS_MAX).contains(&self.hosts),
            "lab {name}: {} hosts are not possible; ask for 1 to {HOSTS_MAX} with --hosts",
            self.hosts
        );
        ensure!(
            (1..=2).contains(&self.servers),
            "lab {name}: {} servers are not possible; ask for 1 or 2 with --servers",
            self.servers
        );
        ensure!(
            (576..=65_000).contains(&self.mtu),
            "lab {name}: an underlay MTU of {} is not possible; ask for 576 to 65000 with --mtu",
            self.mtu
        );
        ensure!(
            self.underlay.max_prefix_len() - self.underlay.prefix_len() >= 8,
            "lab {name}: underlay {} is too small; give a /24 or larger, with IPv6 a /120 or larger",
            self.underlay
        );
        ensure!(
            self.mtu >= 1280 || matches!(self.underlay, IpNet::V4(_)),
            "lab {name}: IPv6 needs an MTU of 1280 or more; ask for that with --mtu"
        );
        if self.docker {
            self.validate_docker()?;
        }
        ensure!(
            self.dir.is_absolute(),
            "lab {name}: directory {} is not an absolute path",
            self.dir.display()
        );
        self.validate_others()?;
        self.validate_nats()
    }

    fn validate_docker(&self) -> Result<()> {
        let name = &self.name;
        if !nix::unistd::geteuid().is_root() {
            bail!("lab {name}: Docker Engines need root; run it with sudo, or leave --docker out");
        }
        let path = super::process::search_path();
        ensure!(
            std::env::split_paths(&path).any(|dir| dir.join("dockerd").exists()),
            "lab {name}: dockerd is not installed; apt-get install docker.io, or leave --docker out"
        );
        let cgroups = Path::new("/sys/fs/cgroup");
        ensure!(
            cgroups.read_dir().is_ok_and(|mut entries| entries.next().is_some()),
            "lab {name}: Docker Engines need cgroups, and there are none at {}; mount them (for a chroot: mount --rbind \
             /sys DIR/sys), or leave --docker out",
            cgroups.display()
        );
        Ok(())
    }

    fn validate_others(&self) -> Result<()> {
        let name = &self.name;
        ensure!(
            self.others.len() <= HOSTS_MAX as usize,
            "lab {name}: {} other nodes are not possible; ask for at most {HOSTS_MAX}",
            self.others.len()
        );
        for other in &self.others {
            let same = self.nodes().filter(|node| node.name == other.as_str()).count();
            ensure!(
                same == 1 && other.as_str() != UNDERLAY,
                "lab {name}: the name {other} is taken; give that node another"
            );
            ensure!(
                other.as_str().len() <= NODE_NAME_MAX,
                "lab {name}: the name {other} is too long for a device; give one of at most {NODE_NAME_MAX} characters"
            );
        }
        Ok(())
    }

    fn validate_nats(&self) -> Result<()> {
        let lab = &self.name;
        ensure!(
            self.nats.is_empty() || matches!(self.underlay, IpNet::V4(_)),
            "lab {lab}: NAT boxes are for IPv4; leave out --nat, or give an --underlay of IPv4"
        );
        ensure!(
            self.nats.len() <= HOSTS_MAX as usize,
            "lab {lab}: {} NAT boxes are not possible; ask for at most {HOSTS_MAX}",
            self.nats.len()
        );
        let mut seen = std::collections::BTreeSet::new();
        for (i, nat) in self.nats.iter().enumerate() {
            let lan = nat.lan;
            let before = self.nats[..i].iter().map(|nat| IpNet::V4(nat.lan));
            let (lan, others) = (IpNet::V4(lan), before.chain([self.underlay]));
            for other in others {
                ensure!(
                    !lan.contains(&other) && !other.contains(&lan),
                    "lab {lab}: {lan} behind a NAT box overlaps {other}; choose another"
                );
            }
            ensure!(
                lan.prefix_len() <= 24,
                "lab {lab}: {lan} behind a NAT box is too small; give a /24 or larger"
            );
            for name in &nat.behind {
                let known = self
                    .nodes()
                    .any(|node| node.name == *name && matches!(node.kind, Kind::Host | Kind::Other));
                ensure!(
                    known,
                    "lab {lab}: there is no host {name} to put behind a NAT; it has h1 to h{}",
                    self.hosts
                );
                ensure!(
                    seen.insert(name),
                    "lab {lab}: {name} is to be behind two NATs; write each host once, as in --nat h2,h3 (a NAT \
                     each) or --nat h2+h3 (both behind one)"
                );
            }
        }
        Ok(())
    }

    /// All nodes, in the order in which they start.
    pub(super) fn nodes(&self) -> impl Iterator<Item = Node> + '_ {
        let node = |name: String, kind, number: u32| {
            let behind = self.nats.iter().position(|nat| nat.behind.contains(&name));
            let net = behind.map_or(self.underlay, |nat| self.nats[nat].lan.into());
            Node { name, kind, address: nth(net, number), behind }
        };
        let nats =
            (0..).zip(&self.nats).map(move |(i, _)| node(super::nat::name(i as usize), Kind::Nat, 101 + i));
        let hosts = (1..=self.hosts).map(move |i| node(format!("h{i}"), Kind::Host, 4 + i));
        let others = (201..).zip(&self.others).map(move |(i, name)| node(name.to_string(), Kind::Other, i));
        let mut servers = vec![node(SERVER.to_owned(), Kind::Server, 2)];
        if self.servers > 1 {
            let store = node(STORE.to_owned(), Kind::Store, 4);
            servers.extend([node(SECOND.to_owned(), Kind::Server, 3), store]);
        }
        servers.into_iter().chain(nats).chain(hosts).chain(others)
    }

    /// A node by name.
    pub(super) fn node(&self, name: &str) -> Result<Node> {
        let found = self.nodes().find(|node| node.name == name);
        found.with_context(|| {
            let known: Vec<String> = self.nodes().map(|node| node.name).collect();
            format!("lab {} has no host {name:?}; it has {}", self.name, known.join(", "))
        })
    }

    /// Whether it is a node that runs an agent.
    pub(super) fn is_host(&self, name: &str) -> bool {
        self.node(name).is_ok_and(|node| node.kind == Kind::Host)
    }

    /// Address number `n` of the underlay.
    pub(super) fn address(&self, n: u32) -> IpAddr {
        nth(self.underlay, n)
    }

    /// The bridge's address: the nodes' default gateway, behind which nothing is.
    pub(super) fn gateway(&self) -> IpAddr {
        self.address(1)
    }

    /// An address with the prefix length of the net that it is in.
    pub(super) fn on_link(&self, address: IpAddr) -> IpNet {
        let mut nets = self.nats.iter().map(|nat| IpNet::V4(nat.lan));
        let net = nets.find(|lan| lan.contains(&address)).unwrap_or(self.underlay);
        IpNet::new_assert(address, net.prefix_len())
    }

    /// A line for `ip -batch` that gives a device an address. One of IPv6 is there at once: nobody else has it.
    pub(super) fn add_address(&self, address: IpAddr, device: &str) -> String {
        let at_once = if address.is_ipv6() { " nodad" } else { "" };
        format!("addr add {} dev {device}{at_once}\n", self.on_link(address))
    }

    pub(super) fn node_dir(&self, node: &str) -> PathBuf {
        self.dir.join(node)
    }

    /// Where the shims of a node keep a record and a log of each container.
    pub(super) fn containers_dir(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("run")
    }

    pub(super) fn log(&self, node: &str, what: &str) -> PathBuf {
        self.node_dir(node).join(format!("{what}.log"))
    }

    pub(super) fn docker_root(&self) -> PathBuf {
        Path::new(DOCKER_ROOT).join(self.name.as_str())
    }

    /// The cgroup below which all containers of the lab's engines are.
    pub(super) fn cgroup(&self) -> String {
        format!("/droveway-lab/{}", self.name)
    }

    /// Where a server's data is.
    pub(super) fn server_dir(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("data")
    }

    /// Where a host's agent keeps its ledger.
    pub(super) fn agent_dir(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("agent")
    }

    pub(super) fn token_file(&self) -> PathBuf {
        self.dir.join("join.token")
    }

    /// The URL of a server.
    pub(super) fn server_url(address: IpAddr) -> String {
        format!("https://{}", SocketAddr::new(address, SERVER_PORT))
    }

    /// The URLs of all servers, as agents take them.
    pub(super) fn server_urls(&self) -> String {
        let servers = self.nodes().filter(|node| node.kind == Kind::Server);
        servers.map(|node| Self::server_url(node.address)).collect::<Vec<_>>().join(",")
    }

    /// What two servers are told of their store, and how they are reached.
    pub(super) fn store_args(&self, server: &Node) -> Vec<String> {
        if self.servers < 2 {
            return Vec::new();
        }
        let store = format!("etcd://{}", SocketAddr::new(self.address(4), STORE_PORT));
        vec!["--store".to_owned(), store, "--url".to_owned(), Self::server_url(server.address)]
    }

    pub(super) fn resolv_conf(&self) -> String {
        let default = || format!("nameserver {}\nsearch lab.example\n", self.gateway());
        self.resolv_conf.clone().unwrap_or_else(default)
    }

    /// `/etc/hosts` of every node: they know one another by name.
    pub(super) fn hosts_file(&self) -> String {
        let mut lines = vec!["127.0.0.1 localhost".to_owned(), "::1 localhost ip6-localhost".to_owned()];
        lines.extend(self.nodes().map(|node| format!("{} {}", node.address, node.name)));
        lines.join("\n") + "\n"
    }

    /// What a program on a node finds in its environment, so that `droveway host ls` needs no flags there.
    pub(super) fn environment(&self) -> Vec<(&'static str, String)> {
        let data = self.server_dir(SERVER);
        let mut variables = vec![("PATH", self.search_path())];
        if !self.bare {
            variables.extend([
                ("DROVEWAY_SERVER", Self::server_url(self.address(2))),
                ("DROVEWAY_KEY_FILE", data.join("admin.key").display().to_string()),
                ("DROVEWAY_CA_FILE", data.join("ca.pem").display().to_string()),
            ]);
        }
        variables
    }

    /// `droveway` is the lab's program, whatever is installed on the machine; then the caller's `PATH`.
    fn search_path(&self) -> String {
        format!("{}:{}", self.bin_dir().display(), super::process::search_path())
    }

    /// Where the program is found by its name.
    pub(super) fn bin_dir(&self) -> PathBuf {
        self.dir.join("bin")
    }
}

fn one() -> u32 {
    1
}

/// How the verbs of that lab begin when they are typed.
pub(super) fn verb(lab: &str) -> String {
    if lab == DEFAULT { "droveway lab".to_owned() } else { format!("droveway lab --lab {lab}") }
}

/// Address number `n` of a net.
pub(super) fn nth(net: IpNet, n: u32) -> IpAddr {
    match net {
        IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) + n).into(),
        IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()) + u128::from(n)).into(),
    }
}

/// Where a lab keeps its things unless told otherwise: gone after a reboot, and private to the user.
pub fn default_dir(name: &Name) -> PathBuf {
    let uid = nix::unistd::geteuid();
    let base = if uid.is_root() {
        PathBuf::from("/run/droveway-lab")
    } else if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_dir()) {
        PathBuf::from(dir).join("droveway-lab")
    } else {
        PathBuf::from(format!("/tmp/droveway-lab-{uid}"))
    };
    base.join(name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_numbered_from_address_five_and_the_server_is_two() {
        let mut spec = LabSpec::new("t").unwrap();
        spec.hosts = 2;
        let nodes: Vec<_> = spec.nodes().map(|node| format!("{} {}", node.name, node.address)).collect();
        assert_eq!(nodes, ["server 10.0.0.2", "h1 10.0.0.5", "h2 10.0.0.6"]);
    }

    #[test]
    fn two_servers_share_a_store_and_agents_are_told_of_both() {
        let spec = LabSpec { hosts: 1, servers: 2, ..LabSpec::new("t").unwrap() };
        spec.validate().unwrap();
        let nodes: Vec<_> = spec.nodes().map(|node| format!("{} {}", node.name, node.address)).collect();
        assert_eq!(nodes, ["server 10.0.0.2", "server2 10.0.0.3", "etcd 10.0.0.4", "h1 10.0.0.5"]);
        assert_eq!(spec.server_urls(), "https://10.0.0.2:7443,https://10.0.0.3:7443");
        let args = spec.store_args(&spec.node(SECOND).unwrap()).join(" ");
        assert_eq!(args, "--store etcd://10.0.0.4:2379 --url https://10.0.0.3:7443");
    }

    #[test]
    fn an_underlay_of_ipv6_is_numbered_alike() {
        let spec = LabSpec { underlay: "fd00::/64".parse().unwrap(), ..LabSpec::new("t").unwrap() };
        spec.validate().unwrap();
        assert_eq!(spec.node("h1").unwrap().address.to_string(), "fd00::5");
        assert_eq!(spec.server_urls(), "https://[fd00::2]:7443");
        assert_eq!(spec.add_address(spec.address(5), "eth0"), "addr add fd00::5/64 dev eth0 nodad\n");
    }

    fn boxes(text: &str) -> Vec<Nat> {
        let together = text.split(',').map(|together| together.parse().unwrap());
        super::super::nat::boxes(together.collect())
    }

    #[test]
    fn those_behind_a_nat_keep_their_number_in_a_net_of_its_own() {
        let mut spec = LabSpec::new("t").unwrap();
        spec.nats = boxes("h2,h1+gw");
        spec.others = vec!["gw".parse().unwrap()];
        spec.validate().unwrap();
        let nodes: Vec<_> = spec.nodes().map(|node| format!("{} {}", node.name, node.address)).collect();
        assert_eq!(
            nodes,
            [
                "server 10.0.0.2",
                "nat1 10.0.0.101",
                "nat2 10.0.0.102",
                "h1 192.168.102.5",
                "h2 192.168.101.6",
                "h3 10.0.0.7",
                "gw 192.168.102.201"
            ]
        );
        assert_eq!(spec.on_link("192.168.102.5".parse().unwrap()).to_string(), "192.168.102.5/24");
    }

    #[test]
    fn a_lab_that_cannot_be_made_is_refused_with_a_remedy() {
        let good = LabSpec::new("t").unwrap();
        good.validate().unwrap();
        for (bad, says) in [
            (LabSpec { hosts: 0, ..good.clone() }, "1 to 50"),
            (LabSpec { hosts: 51, ..good.clone() }, "1 to 50"),
            (LabSpec { servers: 3, ..good.clone() }, "1 or 2"),
            (LabSpec { mtu: 100, ..good.clone() }, "576"),
            (LabSpec { others: vec!["h1".parse().unwrap()], ..good.clone() }, "is taken"),
            (LabSpec { others: vec!["underlay".parse().unwrap()], ..good.clone() }, "is taken"),
            (LabSpec { others: vec!["much-too-long".parse().unwrap()], ..good.clone() }, "12 characters"),
            (LabSpec { nats: boxes("h9"), ..good.clone() }, "no host h9"),
            (LabSpec { nats: boxes("server"), ..good.clone() }, "no host server"),
            (LabSpec { nats: boxes("h1,h1+h2"), ..good.clone() }, "write each host once"),
            (
                LabSpec { underlay: "192.168.0.0/16".parse().unwrap(), nats: boxes("h1"), ..good.clone() },
                "overlaps",
            ),
            (LabSpec { underlay: "10.0.0.0/28".parse().unwrap(), ..good.clone() }, "/24"),
            (LabSpec { underlay: "fd00::/124".parse().unwrap(), ..good.clone() }, "/120"),
            (LabSpec { underlay: "fd00::/64".parse().unwrap(), mtu: 1000, ..good.clone() }, "1280"),
            (LabSpec { underlay: "fd00::/64".parse().unwrap(), nats: boxes("h1"), ..good.clone() }, "IPv4"),
        ] {
            let error = bad.validate().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(LabSpec::new("no/slash").is_err());
    }
}
