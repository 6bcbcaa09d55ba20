//! NAT boxes: between the underlay and the hosts behind them.
//!
//! ```text
//! ul0 ── eth0 nat1 10.0.0.101     lan0 192.168.101.1 ── lan1 ─┬─ eth0 h2 192.168.101.6
//!        masquerade, new ports ──▶                            └─ eth0 h3 192.168.101.7
//! ```
//! A box is of the unkind sort: it gives each flow a random port of its own, other for every destination, lets nothing in
//! that nobody behind it began, and drops the rest without a word.
//!
//! Invariant: a box remembers its flows in a conntrack zone numbered by how often it was told to forget, and takes ports
//! of a range numbered so as well: after [`Lab::rebind`](super::Lab::rebind) no flow keeps its port.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::spec::nth;

/// How many ranges of ports a box goes round in, and how large each is.
const RANGES: u32 = 40;
const RANGE: u32 = 1000;
const FIRST_PORT: u32 = 20_000;

/// A NAT box.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nat {
    /// The addresses behind it: `.1` is the box.
    pub lan: Ipv4Net,
    /// Names of the hosts behind it.
    pub behind: Vec<String>,
}

impl Nat {
    /// The box's address on its inside.
    pub(super) fn gateway(&self) -> IpAddr {
        nth(self.lan.into(), 1)
    }
}

/// Hosts that are behind one box, as people write them: `h2`, or `h2+h3`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Together(Vec<String>);

impl FromStr for Together {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let hosts: Vec<String> = text.split('+').map(str::to_owned).collect();
        if hosts.iter().any(String::is_empty) {
            return Err(format!("{text:?} names no hosts; write h2, or h2+h3 for two behind one NAT"));
        }
        Ok(Self(hosts))
    }
}

/// A box for each of these, with the addresses 192.168.101.0/24 and so on behind it.
pub fn boxes(wanted: Vec<Together>) -> Vec<Nat> {
    let net = |i: u8| Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 100_u8.saturating_add(i), 0), 24);
    (1..).zip(wanted).map(|(i, Together(behind))| Nat { lan: net(i), behind }).collect()
}

/// The name of box number `i` from 0.
pub(super) fn name(i: usize) -> String {
    format!("nat{}", i + 1)
}

/// The bridge between box number `i` from 0 and those behind it.
pub(super) fn bridge(i: usize) -> String {
    format!("lan{}", i + 1)
}

/// The table that makes a node such a box, after it was told to forget so many times.
pub(super) fn table(rebinds: u16) -> String {
    let first = FIRST_PORT + u32::from(rebinds) % RANGES * RANGE;
    let (last, zone) = (first + RANGE - 1, u32::from(rebinds) + 1);
    let mut text = "table ip droveway-nat {}\ndelete table ip droveway-nat\n".to_owned();
    // Writing to a String does not fail.
    let _ = write!(
        text,
        "table ip droveway-nat {{
  chain zone {{ type filter hook prerouting priority raw; policy accept; ct zone set {zone}; }}
  chain zone-own {{ type filter hook output priority raw; policy accept; ct zone set {zone}; }}
  chain in {{
    type filter hook input priority filter; policy accept;
    iifname eth0 meta l4proto {{ tcp, udp }} ct state new drop
  }}
  chain through {{
    type filter hook forward priority filter; policy drop;
    iifname lan0 accept
    ct state established,related accept
  }}
  chain out {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname eth0 meta l4proto {{ tcp, udp }} masquerade to :{first}-{last} random
    oifname eth0 masquerade
  }}
}}
"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_behind_a_box_each_or_together() {
        let nats = boxes(["h2", "h3+h4"].map(|text| text.parse().unwrap()).to_vec());
        assert_eq!(nats[0].behind, ["h2"]);
        assert_eq!(nats[1].behind, ["h3", "h4"]);
        assert_eq!(
            (nats[0].lan.to_string(), nats[1].gateway().to_string()),
            ("192.168.101.0/24".into(), "192.168.102.1".into())
        );
        for bad in ["", "h2+", "+"] {
            assert!(bad.parse::<Together>().unwrap_err().contains("h2+h3"));
        }
    }

    #[test]
    fn a_box_that_forgets_takes_other_ports_and_another_zone() {
        let (one, next) = (table(0), table(1));
        assert!(one.contains("to :20000-20999 random") && one.contains("ct zone set 1;"), "{one}");
        assert!(next.contains("to :21000-21999 random") && next.contains("ct zone set 2;"), "{next}");
    }
}
