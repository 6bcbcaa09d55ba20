//! Two containers in an encrypted network under a capture, and what their hosts' agents say of the tunnel.

use droveway::lab::{Container, Lab, LabSpec};
use model::agent_api::{TunnelState, TunnelStatus};

use crate::steady::Steady;
use crate::support::{LIMIT, Look, idle_in, router, spec, until};
use crate::watch::{Watch, pattern};

/// Two hosts with a container each in an encrypted network, and a capture of the underlay from before the network was
/// made until the test has ended: whatever a test does to them, its canary is never seen.
pub struct Red {
    // Before the lab: it has to end first.
    pub watch: Watch,
    pub lab: Lab,
    pub near: Container,
    pub far: Container,
}

impl Drop for Red {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.watch.sealed();
        }
    }
}

impl Red {
    pub fn in_lab(lab: Lab) -> Self {
        let watch = Watch::begin(&lab);
        create(&lab, "red", "10.43.0.0/16");
        let near = lab.run("h1", &idle_in("red", "near")).unwrap();
        let far = lab.run("h2", &idle_in("red", "far")).unwrap();
        Self { watch, lab, near, far }
    }

    pub fn new(hosts: u32) -> Self {
        Self::in_lab(Lab::up(spec(hosts)).unwrap())
    }

    pub fn with_agents(hosts: u32, args: &[&str]) -> Self {
        let agent_args = args.iter().map(|&arg| arg.to_owned()).collect();
        Self::in_lab(Lab::up(LabSpec { agent_args, ..spec(hosts) }).unwrap())
    }

    /// Waits until the two reach each other.
    pub fn met(self) -> Self {
        until(LIMIT, "the two reach each other", || self.reaches());
        self
    }

    /// Whether a ping with the canary in it is answered.
    pub fn reaches(&self) -> bool {
        self.watch.pings(&self.lab, &self.near.path(), &self.far.ip().to_string())
    }

    /// The same from the other side.
    pub fn reaches_back(&self) -> bool {
        self.watch.pings(&self.lab, &self.far.path(), &self.near.ip().to_string())
    }

    /// Pings with the canary in them, from the near one to the far one.
    pub fn steady(&self) -> Steady {
        let pattern = pattern();
        let options = ["-s", "200", "-p", &pattern, &self.far.ip().to_string()].map(str::to_owned);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Steady::start_saying(&self.lab, &self.near.path(), &options)
    }

    pub fn hops(&self, from: &Container, to: &Container) -> Vec<String> {
        let to = to.ip().to_string();
        let text = self.lab.check(&from.path(), &["traceroute", "-n", "-q", "1", "-w", "2", &to]).unwrap();
        text.lines().skip(1).map(|line| line.split_whitespace().nth(1).unwrap().to_owned()).collect()
    }

    pub fn router_of(&self, host: &str) -> String {
        router(&self.lab, host, "red").address.unwrap().to_string()
    }
}

pub fn create(lab: &Lab, network: &str, subnet: &str) {
    let program = env!("CARGO_BIN_EXE_droveway");
    lab.check("server", &[program, "network", "create", network, "--subnet", subnet, "--driver", "ipsec"])
        .unwrap();
}

/// What a host's agent answers, as text, and the status before it.
pub fn ask(lab: &Lab, host: &str, method: &str, path: &str) -> (u16, String) {
    let url = format!("http://agent{path}");
    let socket = model::agent_api::SOCKET;
    let words =
        ["curl", "-s", "-m", "5", "-X", method, "-w", "\n%{http_code}", "--unix-socket", socket, &url];
    let text = lab.check(host, &words).unwrap();
    let (body, code) = text.trim_end().rsplit_once('\n').unwrap();
    (code.parse().unwrap(), body.to_owned())
}

pub fn tunnels(lab: &Lab, host: &str) -> Vec<TunnelStatus> {
    serde_json::from_str(&ask(lab, host, "GET", "/v1/tunnels").1).unwrap()
}

pub fn tunnel(lab: &Lab, host: &str, peer: &str) -> TunnelStatus {
    serde_json::from_str(&ask(lab, host, "GET", &format!("/v1/tunnels/{peer}")).1).unwrap()
}

/// How many packets a tunnel lost, but for those that came before the router that they were for.
pub fn lost(status: &TunnelStatus) -> u64 {
    status.drops.iter().filter(|(reason, _)| *reason != "no_device").map(|(_, count)| count).sum()
}

pub fn up(lab: &Lab, host: &str, peer: &str) -> bool {
    tunnels(lab, host).iter().any(|it| it.peer.as_str() == peer && matches!(it.state, TunnelState::Up { .. }))
}

/// A rule of a host's own firewall, for what comes in.
pub fn drop_incoming(lab: &Lab, host: &str, rule: &str) {
    let script = format!(
        "nft add table inet fault; nft add chain inet fault in '{{ type filter hook input priority 0; }}'
         nft add rule inet fault in '{rule} drop'"
    );
    lab.check(host, &["sh", "-ec", &script]).unwrap();
}

pub fn drop_nothing(lab: &Lab, host: &str) {
    lab.check(host, &["nft", "delete", "table", "inet", "fault"]).unwrap();
}
