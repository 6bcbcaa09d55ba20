//! What a lab shall be, and where its things are.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net};
use model::Name;
use serde::{Deserialize, Serialize};

/// The most hosts a lab can have.
pub const HOSTS_MAX: u32 = 50;
/// The node on which the server runs.
pub const SERVER: &str = "server";
/// Port of the server.
pub(super) const SERVER_PORT: u16 = 7443;
/// Below it, dockerd keeps images and containers: it cannot on a tmpfs.
const DOCKER_ROOT: &str = "/var/lib/droveway-lab";

/// What a lab shall be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabSpec {
    /// Its name: several labs may be up at once.
    pub name: Name,
    /// How many hosts, from 1 to [`HOSTS_MAX`]: `h1`, `h2` and so on.
    pub hosts: u32,
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
    /// The underlay. `.1` is the bridge, `.2` the server, `.5` host `h1`.
    pub underlay: Ipv4Net,
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
            docker: false,
            bare: false,
            mtu: 1500,
            dir: default_dir(&name),
            program: std::env::current_exe().context("cannot find the droveway program")?,
            underlay: Ipv4Net::new(Ipv4Addr::new(10, 0, 0, 0), 24)?,
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
            (576..=65_000).contains(&self.mtu),
            "lab {name}: an underlay MTU of {} is not possible; ask for 576 to 65000 with --mtu",
            self.mtu
        );
        ensure!(
            self.underlay.prefix_len() <= 24,
            "lab {name}: underlay {} is too small; give one of /24 or larger",
            self.underlay
        );
        if self.docker && !nix::unistd::geteuid().is_root() {
            bail!("lab {name}: Docker Engines need root; run it with sudo, or leave --docker out");
        }
        ensure!(
            self.dir.is_absolute(),
            "lab {name}: directory {} is not an absolute path",
            self.dir.display()
        );
        Ok(())
    }

    /// The names of all nodes, in the order in which they start.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (String, Ipv4Addr)> + '_ {
        let server = (SERVER.to_owned(), self.address(2));
        let hosts = (1..=self.hosts).map(|i| (format!("h{i}"), self.address(4 + i)));
        std::iter::once(server).chain(hosts)
    }

    /// Address number `n` of the underlay.
    pub(super) fn address(&self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.underlay.network()) + n)
    }

    /// The bridge's address: the nodes' default gateway, behind which nothing is.
    pub(super) fn gateway(&self) -> Ipv4Addr {
        self.address(1)
    }

    /// An address with the underlay's prefix length.
    pub(super) fn on_link(&self, address: Ipv4Addr) -> IpNet {
        IpNet::new_assert(IpAddr::V4(address), self.underlay.prefix_len())
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

    pub(super) fn server_dir(&self) -> PathBuf {
        self.node_dir(SERVER).join("data")
    }

    pub(super) fn token_file(&self) -> PathBuf {
        self.dir.join("join.token")
    }

    pub(super) fn server_url(&self) -> String {
        format!("https://{}:{SERVER_PORT}", self.address(2))
    }

    pub(super) fn resolv_conf(&self) -> String {
        let default = || format!("nameserver {}\nsearch lab.example\n", self.gateway());
        self.resolv_conf.clone().unwrap_or_else(default)
    }

    /// `/etc/hosts` of every node: they know one another by name.
    pub(super) fn hosts_file(&self) -> String {
        let mut lines = vec!["127.0.0.1 localhost".to_owned(), "::1 localhost ip6-localhost".to_owned()];
        lines.extend(self.nodes().map(|(name, address)| format!("{address} {name}")));
        lines.join("\n") + "\n"
    }

    /// What a program on a node finds in its environment, so that `droveway host ls` needs no flags there.
    pub(super) fn environment(&self) -> Vec<(&'static str, String)> {
        let data = self.server_dir();
        let mut variables = vec![("PATH", self.search_path())];
        if !self.bare {
            variables.extend([
                ("DROVEWAY_SERVER", self.server_url()),
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
        let nodes: Vec<_> = spec.nodes().map(|(name, address)| format!("{name} {address}")).collect();
        assert_eq!(nodes, ["server 10.0.0.2", "h1 10.0.0.5", "h2 10.0.0.6"]);
    }

    #[test]
    fn a_lab_that_cannot_be_made_is_refused_with_a_remedy() {
        let good = LabSpec::new("t").unwrap();
        good.validate().unwrap();
        for (bad, says) in [
            (LabSpec { hosts: 0, ..good.clone() }, "1 to 50"),
            (LabSpec { hosts: 51, ..good.clone() }, "1 to 50"),
            (LabSpec { mtu: 100, ..good.clone() }, "576"),
            (LabSpec { underlay: "10.0.0.0/28".parse().unwrap(), ..good.clone() }, "/24"),
        ] {
            let error = bad.validate().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(LabSpec::new("no/slash").is_err());
    }
}
