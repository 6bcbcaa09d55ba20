//! Tunnels as metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use ike::ChildUse;
use model::agent_api::{TunnelState, TunnelStatus};
use model::exposition::{Exposition, Kind, Value};

/// The states that a tunnel can be in, as the label has them.
const STATES: [&str; 5] = ["waiting", "connecting", "up", "silent", "failed"];

/// A tunnel, and what went over it since the agent began.
pub(super) type Tunnel = (TunnelStatus, ChildUse);

/// All metrics. `drops` are those of the packet path as a whole.
pub(super) fn text(tunnels: &[Tunnel], drops: &BTreeMap<&'static str, u64>) -> String {
    let mut out = Text { tunnels, out: Exposition::default() };
    out.each(
        "droveway_tunnel_state",
        Kind::Gauge,
        "1 for the state that the tunnel is in, 0 for all others.",
        |(it, _)| {
            let now = state(&it.state);
            STATES
                .iter()
                .map(|state| (Some(("state", *state)), Value::Count(u64::from(*state == now))))
                .collect()
        },
    );
    out.each("droveway_tunnel_bytes_total", Kind::Counter, "Bytes of inner packets.", |(_, used)| {
        both_ways(used.bytes_in, used.bytes_out)
    });
    out.each("droveway_tunnel_packets_total", Kind::Counter, "Inner packets.", |(_, used)| {
        both_ways(used.packets_in, used.packets_out)
    });
    out.each(
        "droveway_tunnel_drops_total",
        Kind::Counter,
        "Packets of the tunnel that got no further.",
        |(it, _)| {
            it.drops
                .iter()
                .map(|(reason, count)| (Some(("reason", reason.as_str())), Value::Count(*count)))
                .collect()
        },
    );
    out.each("droveway_tunnel_handshakes_total", Kind::Counter, "IKE SAs made with the peer.", |(it, _)| {
        only(Value::Count(it.handshakes))
    });
    out.each(
        "droveway_tunnel_rekeys_total",
        Kind::Counter,
        "CHILD_SAs made in the place of others.",
        |(it, _)| only(Value::Count(it.rekeys)),
    );
    out.each(
        "droveway_tunnel_rtt_seconds",
        Kind::Gauge,
        "Median round-trip time of the last probes.",
        |(it, _)| {
            it.rtt_us.map(|us| only(Value::Real(Duration::from_micros(us).as_secs_f64()))).unwrap_or_default()
        },
    );
    out.each(
        "droveway_tunnel_loss_ratio",
        Kind::Gauge,
        "Of the last probes, how many were not answered.",
        |(it, _)| it.loss_permille.map(|loss| only(Value::Real(f64::from(loss) / 1e3))).unwrap_or_default(),
    );
    out.each(
        "droveway_tunnel_mtu_bytes",
        Kind::Gauge,
        "The largest inner packet that is known to pass.",
        |(it, _)| it.mtu.map(|mtu| only(Value::Count(mtu.into()))).unwrap_or_default(),
    );
    out.each(
        "droveway_tunnel_black_hole",
        Kind::Gauge,
        "1 where large packets vanish without a word.",
        |(it, _)| only(Value::Count(it.black_hole.into())),
    );
    out.out.family(
        "droveway_drops_total",
        Kind::Counter,
        "Packets that got no further, of all tunnels and of none.",
    );
    for (reason, count) in drops {
        out.out.sample("droveway_drops_total", &[("reason", reason)], Value::Count(*count));
    }
    out.out.finish()
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
    out: Exposition,
}

impl<'a> Text<'a> {
    /// A metric of tunnels, each with the peer's name and at most one label more.
    fn each(&mut self, name: &str, kind: Kind, help: &str, samples: impl Fn(&'a Tunnel) -> Samples<'a>) {
        self.out.family(name, kind, help);
        for tunnel in self.tunnels {
            for (label, value) in samples(tunnel) {
                let labels: Vec<_> = [("peer", tunnel.0.peer.as_str())].into_iter().chain(label).collect();
                self.out.sample(name, &labels, value);
            }
        }
    }
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
        assert_eq!(model::exposition::faults(&text), [""; 0]);
    }
}
