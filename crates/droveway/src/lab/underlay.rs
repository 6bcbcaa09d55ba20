//! What can go wrong with the underlay: packets between two nodes are lost, some or all.
//!
//! Each node drops what it should not get, in a table of its own, before connection tracking and before any DNAT, so
//! that forwarded packets are lost like local ones. The table is replaced whole.

use std::fmt::Write;
use std::str::FromStr;

use super::{Fault, State};

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

    /// The table that makes `node` lose what it should.
    pub(super) fn fault_table(&self, node: &str) -> String {
        let mut text = "table inet droveway-lab {}\ndelete table inet droveway-lab\n".to_owned();
        let mut rules = String::new();
        for fault in &self.faults {
            let other = match (fault.a == node, fault.b == node) {
                (true, _) => &fault.b,
                (_, true) => &fault.a,
                (false, false) => continue,
            };
            let Some(other) = self.nodes.get(other) else { continue };
            let chance = if fault.lost >= ALL {
                String::new()
            } else {
                format!("numgen random mod {ALL} < {} ", fault.lost)
            };
            // Writing to a String does not fail.
            let _ = writeln!(rules, "    ip saddr {} {chance}counter drop", other.address);
        }
        if !rules.is_empty() {
            let _ = write!(
                text,
                "table inet droveway-lab {{\n  chain lost {{\n    type filter hook prerouting priority -450; policy accept;\n{rules}  }}\n}}\n"
            );
        }
        text
    }
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
}
