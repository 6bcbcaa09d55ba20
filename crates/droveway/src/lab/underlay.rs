//! What happens to the underlay: packets between two nodes are lost, a node takes another address, a NAT box forgets.
//!
//! Each node drops what it should not get, in a table of its own, before connection tracking and before any DNAT, so
//! that forwarded packets are lost like local ones. Of a host behind a NAT the others see the box's address, which is not
//! its own alone: there the host drops both ways, and the other nothing. The table is replaced whole.

use std::fmt::Write;
use std::net::IpAddr;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

use super::enter::Door;
use super::process::tool;
use super::state::lock;
use super::{Fault, Kind, Lab, State, nat};

/// All packets, in units of [`Fault::lost`].
pub(super) const ALL: u32 = 10_000;

/// A share of packets, as people write it: `1%`, `0.25%`, `100%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share(pub(super) u32);

impl FromStr for Share {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a share of packets; write 0% to 100%, as in 1% or 0.25%");
        let number = text.strip_suffix('%').ok_or_else(bad)?;
        let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let percent: f64 = number.parse().ok().filter(|_| plain).ok_or_else(bad)?;
        if !(0.0..=100.0).contains(&percent) {
            return Err(bad());
        }
        #[expect(clippy::cast_sign_loss, reason = "the range is checked above")]
        Ok(Self((percent * 100.0).round() as u32))
    }
}

impl Lab {
    /// From now on no packet gets from one node to the other, in either direction.
    pub fn cut(&self, one: &str, other: &str) -> Result<()> {
        self.lose(one, other, ALL)
    }

    /// From now on that share of packets between two nodes is lost (0.01 is 1 %).
    pub fn loss(&self, one: &str, other: &str, share: f64) -> Result<()> {
        let share: Share = format!("{}%", share * 100.0).parse().map_err(anyhow::Error::msg)?;
        self.lose(one, other, share.0)
    }

    pub(super) fn lose(&self, one: &str, other: &str, lost: u32) -> Result<()> {
        let _lock = lock(self.dir())?;
        let mut state = self.state()?;
        state.node(one)?;
        state.node(other)?;
        ensure!(one != other, "{one} cannot be cut off from itself; name two nodes");
        state.set_fault(one, other, lost);
        state.save()?;
        self.apply_tables(&state, one)?;
        self.apply_tables(&state, other)
    }

    /// Nothing is lost any more.
    pub fn heal(&self) -> Result<()> {
        let _lock = lock(self.dir())?;
        let mut state = self.state()?;
        state.faults.clear();
        state.save()?;
        state.nodes.keys().try_for_each(|node| self.apply_tables(&state, node))
    }

    /// Gives a node another address on its net, as when a lease changed: the old one is gone at once, connections that
    /// used it are dead. Switched off and on, the node has its first address again.
    pub fn readdress(&self, node: &str, address: IpAddr) -> Result<()> {
        let _lock = lock(self.dir())?;
        let mut state = self.state()?;
        let init = state.running(node)?;
        let (spec, planned) = (self.spec(), self.spec().node(node)?);
        ensure!(
            !matches!(planned.kind, Kind::Server | Kind::Store),
            "{node} is known to all by its address {}; give another to a host",
            planned.address
        );
        let (net, gateway) = match planned.behind {
            Some(nat) => (spec.nats[nat].lan.into(), spec.nats[nat].gateway()),
            None => (spec.underlay, spec.gateway()),
        };
        let taken =
            state.nodes.iter().find(|(_, other)| other.address == address).map(|(name, _)| name.as_str());
        let taken = taken.or((address == gateway).then_some("the gateway"));
        ensure!(taken.is_none(), "{address} is {}'s; give {node} another", taken.unwrap_or_default());
        let usable = net.contains(&address) && address != net.network() && address != net.broadcast();
        ensure!(usable, "{address} is not in {net}, where {node} is; give another");
        let script = format!(
            "addr flush dev eth0 scope global\n{}route replace default via {gateway}\n",
            spec.add_address(address, "eth0")
        );
        let mut command = self.enter(&Door::of(init));
        command.args(["lab-stage", "--", "ip", "-batch", "-"]);
        tool(command, &script).with_context(|| format!("cannot give {node} the address {address}"))?;
        if let Some(entry) = state.nodes.get_mut(node) {
            entry.address = address;
        }
        state.save()?;
        state.at_fault_with(node).try_for_each(|other| self.apply_tables(&state, other))
    }

    /// A NAT box, given by its name or by that of a host behind it, forgets all its flows and takes other ports for new
    /// ones.
    pub fn rebind(&self, node: &str) -> Result<()> {
        let _lock = lock(self.dir())?;
        let mut state = self.state()?;
        let planned = self.spec().node(node)?;
        let name = planned.behind.map(nat::name).or((planned.kind == Kind::Nat).then_some(planned.name));
        let name = name
            .with_context(|| format!("{node} is behind no NAT; `droveway lab up --nat {node}` puts it so"))?;
        state.running(&name)?;
        if let Some(entry) = state.nodes.get_mut(&name) {
            entry.rebinds = entry.rebinds.wrapping_add(1);
        }
        state.save()?;
        self.apply_tables(&state, &name)
    }

    /// Gives a node the tables that are the lab's.
    pub(super) fn apply_tables(&self, state: &State, node: &str) -> Result<()> {
        let entry = state.node(node)?;
        let Some(init) = entry.running() else { return Ok(()) };
        let mut tables = state.fault_table(node);
        if self.spec().node(node)?.kind == Kind::Nat {
            tables.push_str(&nat::table(entry.rebinds));
        }
        let mut command = self.enter(&Door::of(init));
        command.args(["lab-stage", "--", "nft", "-f", "-"]);
        tool(command, &tables).with_context(|| format!("cannot change what {node} lets through"))
    }
}

impl State {
    /// From now on that many of 10,000 packets between the two are lost.
    pub(super) fn set_fault(&mut self, one: &str, other: &str, lost: u32) {
        let (a, b) = if one < other { (one, other) } else { (other, one) };
        self.faults.retain(|fault| fault.a != a || fault.b != b);
        if lost > 0 {
            self.faults.push(Fault { a: a.to_owned(), b: b.to_owned(), lost });
            self.faults.sort();
        }
    }

    /// Those between whom and `node` something is lost.
    pub(super) fn at_fault_with<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a str> {
        self.faults.iter().filter_map(move |fault| match (fault.a == node, fault.b == node) {
            (true, _) => Some(fault.b.as_str()),
            (_, true) => Some(fault.a.as_str()),
            (false, false) => None,
        })
    }

    /// The table that makes `node` lose what it should.
    pub(super) fn fault_table(&self, node: &str) -> String {
        let mut text = "table inet droveway-lab {}\ndelete table inet droveway-lab\n".to_owned();
        let (mut from, mut to) = (String::new(), String::new());
        for fault in &self.faults {
            let other = match (fault.a == node, fault.b == node) {
                (true, _) => &fault.b,
                (_, true) => &fault.a,
                (false, false) => continue,
            };
            let chance = if fault.lost >= ALL {
                String::new()
            } else {
                format!("numgen random mod {ALL} < {} ", fault.lost)
            };
            let Some(seen) = self.seen(node, other) else { continue };
            let ip = if seen.address.is_ipv6() { "ip6" } else { "ip" };
            // Writing to a String does not fail.
            let _ = writeln!(from, "    {ip} saddr {} {chance}counter drop", seen.address);
            if seen.both_ways {
                let _ = writeln!(to, "    {ip} daddr {} {chance}counter drop", seen.address);
            }
        }
        if from.is_empty() {
            return text;
        }
        text.push_str("table inet droveway-lab {\n");
        let chains =
            [("lost", "prerouting priority -450", from), ("lost-too", "postrouting priority 450", to)];
        for (chain, hook, rules) in chains.iter().filter(|(_, _, rules)| !rules.is_empty()) {
            let head = format!("type filter hook {hook}; policy accept;");
            let _ = write!(text, "  chain {chain} {{\n    {head}\n{rules}  }}\n");
        }
        text.push_str("}\n");
        text
    }

    /// How `node` knows `other`, if it can tell its packets from those of its neighbours.
    fn seen(&self, node: &str, other: &str) -> Option<Seen> {
        let own = self.nodes.get(other)?.address;
        let behind = |name: &str| self.spec.node(name).ok().and_then(|node| node.behind);
        match (behind(node), behind(other)) {
            (here, there) if here == there => Some(Seen { address: own, both_ways: false }),
            (None, Some(_)) => None,
            (_, None) => Some(Seen { address: own, both_ways: true }),
            (Some(_), Some(there)) => {
                let address = self.nodes.get(&nat::name(there))?.address;
                Some(Seen { address, both_ways: true })
            }
        }
    }
}

/// The address by which one node knows another.
struct Seen {
    address: IpAddr,
    /// Whether the other does not know this one.
    both_ways: bool,
}

#[cfg(test)]
mod tests {
    use super::super::LabSpec;
    use super::*;

    #[test]
    fn a_share_is_a_percentage() {
        for (text, share) in [("1%", 100), ("0.25%", 25), ("100%", 10_000), ("0%", 0)] {
            assert_eq!(text.parse::<Share>().unwrap(), Share(share));
        }
        for bad in ["1", "-1%", "101%", "%", "x%", "nan%", "inf%", "1e1%"] {
            assert!(bad.parse::<Share>().unwrap_err().contains("as in 1%"), "{bad}");
        }
    }

    #[test]
    fn a_fault_is_on_both_its_nodes_and_on_no_other() {
        let mut state = State::new(LabSpec::new("t").unwrap());
        state.set_fault("h2", "h1", ALL);
        state.set_fault("h1", "h2", ALL);
        state.set_fault("h1", "server", 25);
        assert_eq!(state.faults.len(), 2);
        let table = state.fault_table("h1");
        assert!(table.contains("ip saddr 10.0.0.6 counter drop"), "{table}");
        assert!(table.contains("ip saddr 10.0.0.2 numgen random mod 10000 < 25 counter drop"), "{table}");
        assert!(state.fault_table("h2").contains("ip saddr 10.0.0.5 counter drop"));
        assert!(!state.fault_table("h3").contains("chain"));
        state.set_fault("h1", "h2", 0);
        assert!(!state.fault_table("h2").contains("chain"));
    }

    #[test]
    fn a_host_behind_a_nat_loses_both_ways_since_others_know_only_the_box() {
        let nats = nat::boxes(vec!["h2+h3".parse().unwrap()]);
        let mut state = State::new(LabSpec { nats, ..LabSpec::new("t").unwrap() });
        state.set_fault("h1", "h2", ALL);
        let table = state.fault_table("h2");
        assert!(table.contains("ip saddr 10.0.0.5 ") && table.contains("ip daddr 10.0.0.5 "), "{table}");
        assert!(!state.fault_table("h1").contains("chain"));
        state.set_fault("h3", "h2", ALL);
        assert!(state.fault_table("h3").contains("ip saddr 192.168.101.6 "));
        assert!(!state.fault_table("h3").contains("daddr"));
    }
}
