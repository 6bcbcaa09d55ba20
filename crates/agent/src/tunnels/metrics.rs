//! Tunnels as metrics, in Prometheus' text format 0.0.4.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::Duration;

use ike::ChildUse;
use model::agent_api::{TunnelState, TunnelStatus};

/// The states that a tunnel can be in, as the label has them.
const STATES: [&str; 5] = ["waiting", "connecting", "up", "silent", "failed"];

/// A tunnel, and what went over it since the agent began.
pub(super) type Tunnel = (TunnelStatus, ChildUse);

/// All metrics. `drops` are those of the packet path as a whole.
pub(super) fn text(tunnels: &[Tunnel], drops: &BTreeMap<&'static str, u64>) -> String {
    let mut out = Text { tunnels, text: String::new() };
    out.each(
        "droveway_tunnel_state",
        "gauge",
        "1 for the state that the tunnel is in, 0 for all others.",
        |(it, _)| {
            let now = state(&it.state);
            STATES
                .iter()
                .map(|state| (Some(("state", *state)), Value::Count(u64::from(*state == now))))
                .collect()
        },
    );
    out.each("droveway_tunnel_bytes_total", "counter", "Bytes of inner packets.", |(_, used)| {
        both_ways(used.bytes_in, used.bytes_out)
    });
    out.each("droveway_tunnel_packets_total", "counter", "Inner packets.", |(_, used)| {
        both_ways(used.packets_in, used.packets_out)
    });
    out.each(
        "droveway_tunnel_drops_total",
        "counter",
        "Packets of the tunnel that got no further.",
        |(it, _)| {
            it.drops
                .iter()
                .map(|(reason, count)| (Some(("reason", reason.as_str())), Value::Count(*count)))
                .collect()
        },
    );
    out.each("droveway_tunnel_handshakes_total", "counter", "IKE SAs made with the peer.", |(it, _)| {
        only(Value::Count(it.handshakes))
    });
    out.each(
        "droveway_tunnel_rekeys_total",
        "counter",
        "CHILD_SAs made in the place of others.",
        |(it, _)| only(Value::Count(it.rekeys)),
    );
    out.each(
        "droveway_tunnel_rtt_seconds",
        "gauge",
        "Median round-trip time of the last probes.",
        |(it, _)| {
            it.rtt_us.map(|us| only(Value::Real(Duration::from_micros(us).as_secs_f64()))).unwrap_or_default()
        },
    );
    out.each(
        "droveway_tunnel_loss_ratio",
        "gauge",
        "Of the last probes, how many were not answered.",
        |(it, _)| it.loss_permille.map(|loss| only(Value::Real(f64::from(loss) / 1e3))).unwrap_or_default(),
    );
    out.each(
        "droveway_tunnel_mtu_bytes",
        "gauge",
        "The largest inner packet that is known to pass.",
        |(it, _)| it.mtu.map(|mtu| only(Value::Count(mtu.into()))).unwrap_or_default(),
    );
    out.each(
        "droveway_tunnel_black_hole",
        "gauge",
        "1 where large packets vanish without a word.",
        |(it, _)| only(Value::Count(it.black_hole.into())),
    );
    out.family("droveway_drops_total", "counter", "Packets that got no further, of all tunnels and of none.");
    for (reason, count) in drops {
        out.sample("droveway_drops_total", &[("reason", reason)], Value::Count(*count));
    }
    out.text
}

/// A sample's value: counts are whole, whatever their size.
#[derive(Clone, Copy)]
enum Value {
    Count(u64),
    Real(f64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Real(real) => write!(f, "{real}"),
        }
    }
}

type Samples<'a> = Vec<(Option<(&'static str, &'a str)>, Value)>;

fn only(value: Value) -> Samples<'static> {
    vec![(None, value)]
}

fn both_ways(inward: u64, outward: u64) -> Samples<'static> {
    [("in", inward), ("out", outward)]
        .map(|(way, count)| (Some(("direction", way)), Value::Count(count)))
        .to_vec()
}

struct Text<'a> {
    tunnels: &'a [Tunnel],
    text: String,
}

impl<'a> Text<'a> {
    /// A metric of tunnels, each with the peer's name and at most one label more.
    fn each(&mut self, name: &str, kind: &str, help: &str, samples: impl Fn(&'a Tunnel) -> Samples<'a>) {
        self.family(name, kind, help);
        for tunnel in self.tunnels {
            for (label, value) in samples(tunnel) {
                let labels: Vec<_> = [("peer", tunnel.0.peer.as_str())].into_iter().chain(label).collect();
                self.sample(name, &labels, value);
            }
        }
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: Value) {
        let labels: Vec<String> =
            labels.iter().map(|(key, text)| format!("{key}=\"{}\"", escaped(text))).collect();
        let _ = writeln!(self.text, "{name}{{{}}} {value}", labels.join(","));
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn state(state: &TunnelState) -> &'static str {
    match state {
        TunnelState::Waiting { .. } => "waiting",
        TunnelState::Connecting => "connecting",
        TunnelState::Up { .. } => "up",
        TunnelState::Silent { .. } => "silent",
        TunnelState::Failed { .. } => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tunnel_has_its_state_its_traffic_and_its_drops() {
        let tunnel = TunnelStatus {
            peer: "h2".parse().unwrap(),
            id: "host-2".to_owned(),
            foreign: false,
            state: TunnelState::Silent { since: 5 },
            path: None,
            nat: (false, false),
            identity: String::new(),
            ike: None,
            children: Vec::new(),
            rtt_us: Some(1500),
            loss_permille: None,
            mtu: Some(1438),
            black_hole: true,
            last_seen: None,
            last_failure: None,
            handshakes: 3,
            rekeys: 7,
            drops: BTreeMap::from([("replayed".to_owned(), 2)]),
            slower: Vec::new(),
        };
        let used = ChildUse { bytes_in: 1 << 40, packets_in: 9, bytes_out: 8, packets_out: 1 };
        let text = text(&[(tunnel, used)], &BTreeMap::from([("unknown_spi", 4)]));
        for line in [
            "# TYPE droveway_tunnel_state gauge",
            "droveway_tunnel_state{peer=\"h2\",state=\"silent\"} 1",
            "droveway_tunnel_state{peer=\"h2\",state=\"up\"} 0",
            "droveway_tunnel_bytes_total{peer=\"h2\",direction=\"in\"} 1099511627776",
            "droveway_tunnel_packets_total{peer=\"h2\",direction=\"out\"} 1",
            "droveway_tunnel_drops_total{peer=\"h2\",reason=\"replayed\"} 2",
            "droveway_tunnel_handshakes_total{peer=\"h2\"} 3",
            "droveway_tunnel_rekeys_total{peer=\"h2\"} 7",
            "droveway_tunnel_rtt_seconds{peer=\"h2\"} 0.0015",
            "droveway_tunnel_mtu_bytes{peer=\"h2\"} 1438",
            "droveway_tunnel_black_hole{peer=\"h2\"} 1",
            "droveway_drops_total{reason=\"unknown_spi\"} 4",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
        }
        assert!(!text.contains("loss_ratio{"), "what is not known is not told");
    }

    #[test]
    fn a_label_cannot_break_out_of_its_quotes() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
