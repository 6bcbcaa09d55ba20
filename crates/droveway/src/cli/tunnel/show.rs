//! How tunnels look to people.

use std::collections::BTreeMap;

use model::UnixMillis;
use model::agent_api::{ChildStatus, IkeStatus, TunnelState, TunnelStatus};

use crate::cli::table::{Details, Table};
use crate::cli::text;

/// A row for each tunnel, and below it why it is not as it should be.
pub(super) fn table(tunnels: &[TunnelStatus], now: UnixMillis) -> Table {
    let mut table =
        Table::new(["PEER", "STATE", "ADDRESS", "RTT", "LOSS", "NETWORKS"], &["PEER", "STATE", "ADDRESS"]);
    for tunnel in tunnels {
        let since = match &tunnel.state {
            TunnelState::Up { since } | TunnelState::Silent { since } => {
                format!(" {}", text::age(*since, now))
            }
            TunnelState::Waiting { .. } | TunnelState::Connecting | TunnelState::Failed { .. } => {
                String::new()
            }
        };
        table.row([
            tunnel.peer.to_string(),
            format!("{}{since}", word(&tunnel.state)),
            tunnel.path.map(|(_, theirs)| theirs.to_string()).unwrap_or_default(),
            tunnel.rtt_us.map(milliseconds).unwrap_or_default(),
            tunnel.loss_permille.map(percent).unwrap_or_default(),
            text::list(networks(tunnel)),
        ]);
        for note in notes(tunnel, now) {
            table.note(&note);
        }
    }
    table
}

/// `3 up, 1 failed`, for the status of the host.
pub(in crate::cli) fn summary(tunnels: &[TunnelStatus]) -> String {
    if tunnels.is_empty() {
        return "none: no other host shares an encrypted network with this one".to_owned();
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for tunnel in tunnels {
        *counts.entry(word(&tunnel.state)).or_default() += 1;
    }
    let counts: Vec<String> =
        STATES.iter().filter_map(|state| counts.get(state).map(|count| format!("{count} {state}"))).collect();
    let troubled: Vec<&str> =
        tunnels.iter().filter(|it| !is_up(&it.state)).map(|it| it.peer.as_str()).take(5).collect();
    let troubled = if troubled.is_empty() {
        String::new()
    } else {
        format!(" ({}: `droveway tunnel ls` says why)", troubled.join(", "))
    };
    format!("{}{troubled}", counts.join(", "))
}

/// The words for states, best first.
const STATES: [&str; 5] = ["up", "silent", "connecting", "waiting", "failed"];

fn word(state: &TunnelState) -> &'static str {
    match state {
        TunnelState::Up { .. } => STATES[0],
        TunnelState::Silent { .. } => STATES[1],
        TunnelState::Connecting => STATES[2],
        TunnelState::Waiting { .. } => STATES[3],
        TunnelState::Failed { .. } => STATES[4],
    }
}

fn is_up(state: &TunnelState) -> bool {
    match state {
        TunnelState::Up { .. } => true,
        TunnelState::Silent { .. }
        | TunnelState::Connecting
        | TunnelState::Waiting { .. }
        | TunnelState::Failed { .. } => false,
    }
}

/// The networks inside, each once.
fn networks(tunnel: &TunnelStatus) -> Vec<String> {
    let mut names: Vec<String> = tunnel.children.iter().map(|child| child.network.to_string()).collect();
    names.sort();
    names.dedup();
    names
}

/// What a person has to know of a tunnel that is not as it should be.
fn notes(tunnel: &TunnelStatus, now: UnixMillis) -> Vec<String> {
    let mut notes = Vec::new();
    match &tunnel.state {
        TunnelState::Up { .. } => {}
        TunnelState::Silent { .. } => {
            notes.push("keys are agreed, but probes are not answered: no traffic passes".to_owned());
        }
        TunnelState::Connecting => {
            if let Some((at, why)) = &tunnel.last_failure {
                notes.push(format!("failed {} ago: {why}", text::age(*at, now)));
            }
        }
        TunnelState::Waiting { why } => notes.push(why.clone()),
        TunnelState::Failed { why, retry_at } => notes.push(format!("{why} ({})", retry(*retry_at, now))),
    }
    if tunnel.black_hole {
        notes.push(black_hole(tunnel));
    }
    notes
}

fn retry(at: UnixMillis, now: UnixMillis) -> String {
    if at <= now {
        "next attempt now".to_owned()
    } else {
        format!("next attempt in {}", text::until(at, now))
    }
}

fn black_hole(tunnel: &TunnelStatus) -> String {
    let above =
        tunnel.mtu.map_or_else(|| "large packets".to_owned(), |mtu| format!("packets above {mtu} bytes"));
    format!(
        "{above} vanish on the way without a word, so smaller ones are sent; let ICMP \"fragmentation needed\" and \
         \"packet too big\" through, or make the network with a smaller --mtu"
    )
}

/// All that is known of a tunnel.
pub(super) fn details(tunnel: &TunnelStatus, now: UnixMillis) -> Details {
    let ago = |at: UnixMillis| format!("{} ago ({})", text::age(at, now), text::utc(at));
    let mut details = Details::default();
    details
        .add("Peer", format!("{} ({})", tunnel.peer, tunnel.id))
        .add("Kind", if tunnel.foreign { "foreign peer" } else { "host" })
        .add("State", state(tunnel, now))
        .add("Path", tunnel.path.map(|(ours, theirs)| format!("{ours} to {theirs}")).unwrap_or_default())
        .add("NAT", if tunnel.path.is_some() { nat(tunnel.nat) } else { "" })
        .add("It proves", tunnel.identity.clone())
        .add("IKE SA", tunnel.ike.as_ref().map_or_else(|| "none".to_owned(), |ike| ike_sa(ike, now)))
        .add("ESP SAs", children(&tunnel.children, now))
        .add("RTT", tunnel.rtt_us.map(milliseconds).unwrap_or_default())
        .add("Loss", tunnel.loss_permille.map(percent).unwrap_or_default())
        .add("MTU inside", mtu(tunnel))
        .add("Last seen", tunnel.last_seen.map(ago).unwrap_or_default())
        .add(
            "Last failure",
            tunnel.last_failure.as_ref().map(|(at, why)| format!("{}: {why}", ago(*at))).unwrap_or_default(),
        )
        .add("Handshakes", tunnel.handshakes.to_string())
        .add("Rekeys", tunnel.rekeys.to_string())
        .add("Dropped", drops(&tunnel.drops))
        .add("Slower way", tunnel.slower.join("\n"));
    details
}

fn state(tunnel: &TunnelStatus, now: UnixMillis) -> String {
    let said = word(&tunnel.state);
    match &tunnel.state {
        TunnelState::Up { since } | TunnelState::Silent { since } => {
            let line = format!("{said} for {}, since {}", text::age(*since, now), text::utc(*since));
            let notes = notes(tunnel, now);
            if is_up(&tunnel.state) { line } else { format!("{line}\n{}", notes.join("\n")) }
        }
        TunnelState::Connecting => said.to_owned(),
        TunnelState::Waiting { why } => format!("{said}: {why}"),
        TunnelState::Failed { why, retry_at } => format!("{said}: {why} ({})", retry(*retry_at, now)),
    }
}

fn nat((ours, theirs): (bool, bool)) -> &'static str {
    match (ours, theirs) {
        (false, false) => "none on the way",
        (true, false) => "before this host",
        (false, true) => "before the peer",
        (true, true) => "before this host and before the peer",
    }
}

fn ike_sa(ike: &IkeStatus, now: UnixMillis) -> String {
    let (ours, theirs) = if ike.initiator { ("this host", "peer") } else { ("peer", "this host") };
    format!(
        "IKEv2, SPIs {} ({ours}, initiator), {} ({theirs}, responder)\n{}\n{}",
        ike.initiator_spi,
        ike.responder_spi,
        ike.suite,
        times("established", ike.established, ike.rekey_at, now)
    )
}

/// A paragraph for each, the live one of each network first.
fn children(children: &[ChildStatus], now: UnixMillis) -> String {
    if children.is_empty() {
        return "none".to_owned();
    }
    let one = |child: &ChildStatus| {
        format!(
            "{}{}: tunnel mode in UDP, {}\n  {}\n  in  {}  {}, {}\n  out {}  {}, {}",
            child.network,
            if child.live { "" } else { " (on its way in or out)" },
            child.suite,
            times("installed", child.installed, child.rekey_at, now),
            child.inbound_spi,
            bytes(child.bytes_in),
            packets(child.packets_in),
            child.outbound_spi,
            bytes(child.bytes_out),
            packets(child.packets_out),
        )
    };
    children.iter().map(one).collect::<Vec<_>>().join("\n")
}

/// `established 524s ago, rekeyed in 3h`
fn times(made: &str, at: Option<UnixMillis>, rekey_at: Option<UnixMillis>, now: UnixMillis) -> String {
    let at = at.map_or_else(|| format!("{made} just now"), |at| format!("{made} {} ago", text::age(at, now)));
    match rekey_at {
        None => at,
        Some(then) if then <= now => format!("{at}, rekeyed now"),
        Some(then) => format!("{at}, rekeyed in {}", text::until(then, now)),
    }
}

fn mtu(tunnel: &TunnelStatus) -> String {
    let known = tunnel.mtu.map(|mtu| format!("{mtu} bytes pass")).unwrap_or_default();
    if tunnel.black_hole { format!("{known}\nBLACK HOLE: {}", black_hole(tunnel)) } else { known }
}

fn drops(drops: &BTreeMap<String, u64>) -> String {
    let lines: Vec<String> =
        drops.iter().filter(|(_, count)| **count > 0).map(|(why, count)| format!("{count}: {why}")).collect();
    if lines.is_empty() { "none".to_owned() } else { lines.join("\n") }
}

/// Microseconds as milliseconds with as many digits as matter.
fn milliseconds(microseconds: u64) -> String {
    match microseconds {
        0..10_000 => format!("{}.{:02} ms", microseconds / 1000, microseconds % 1000 / 10),
        10_000..100_000 => format!("{}.{} ms", microseconds / 1000, microseconds % 1000 / 100),
        _ => format!("{} ms", microseconds / 1000),
    }
}

fn percent(permille: u16) -> String {
    match (permille / 10, permille % 10) {
        (whole, 0) => format!("{whole}%"),
        (whole, tenth) => format!("{whole}.{tenth}%"),
    }
}

fn bytes(count: u64) -> String {
    format!("{count} byte{}", if count == 1 { "" } else { "s" })
}

fn packets(count: u64) -> String {
    format!("{count} packet{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tunnel as an agent tells it.
    fn tunnel(peer: &str, state: &serde_json::Value) -> TunnelStatus {
        serde_json::from_value(serde_json::json!({
            "peer": peer, "id": "h-aaaaaaaaaa", "foreign": false, "state": state,
            "path": ["10.0.0.5:4500", "10.0.0.6:4500"], "nat": [true, false], "identity": "h-aaaaaaaaaa",
            "ike": {
                "initiator_spi": "6d0bf2ee9b2bf2c6", "responder_spi": "0102030405060708", "initiator": true,
                "suite": "AES_GCM_16_256/PRF_HMAC_SHA2_256/X25519", "established": 1_000, "rekey_at": 14_525_000,
            },
            "children": [
                {"network": "managed", "live": true, "inbound_spi": "c0ffee01", "outbound_spi": "c0ffee02",
                 "suite": "AES_GCM_16_256", "installed": 1_000, "rekey_at": 600_000, "bytes_in": 8400,
                 "packets_in": 100, "bytes_out": 84, "packets_out": 1},
                {"network": "managed", "live": false, "inbound_spi": "c0ffee03", "outbound_spi": "c0ffee04",
                 "suite": "AES_GCM_16_256", "installed": null, "rekey_at": null, "bytes_in": 0,
                 "packets_in": 0, "bytes_out": 0, "packets_out": 0},
                {"network": "backend", "live": true, "inbound_spi": "c0ffee05", "outbound_spi": "c0ffee06",
                 "suite": "AES_GCM_16_256", "installed": 1_000, "rekey_at": 600_000, "bytes_in": 0,
                 "packets_in": 0, "bytes_out": 0, "packets_out": 0},
            ],
            "rtt_us": 412, "loss_permille": 15, "mtu": 1438, "black_hole": false, "last_seen": 524_000,
            "last_failure": [500_000, "no answer from 10.0.0.6:4500"], "handshakes": 2, "rekeys": 7,
            "drops": {"replayed": 3, "no SA": 0},
        }))
        .unwrap()
    }

    fn bare(peer: &str, state: &serde_json::Value) -> TunnelStatus {
        let none = serde_json::Value::Null;
        let full = tunnel(peer, state);
        let path = serde_json::from_value(none).unwrap();
        TunnelStatus { path, ike: None, children: vec![], rtt_us: None, loss_permille: None, ..full }
    }

    fn all() -> Vec<TunnelStatus> {
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        vec![
            tunnel("h2", &json(r#"{"state": "up", "since": 1000}"#)),
            tunnel("h3", &json(r#"{"state": "silent", "since": 520000}"#)),
            bare(
                "h4",
                &json(
                    r#"{"state": "waiting", "why": "this host (203.0.113.7) and host h4 (198.51.100.9) are behind different NATs, so neither can reach the other"}"#,
                ),
            ),
            bare(
                "h5",
                &json(
                    r#"{"state": "failed", "why": "no answer from 192.0.2.5:4500; let UDP 4500 through", "retry_at": 530000}"#,
                ),
            ),
            bare("h6", &json(r#"{"state": "connecting"}"#)),
        ]
    }

    const NOW: UnixMillis = 525_000;

    #[test]
    fn the_table_fits_80_columns_and_says_below_a_row_why_it_is_not_up() {
        let text = table(&all(), NOW).render(Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "PEER  STATE       ADDRESS        RTT      LOSS  NETWORKS");
        assert_eq!(lines[1], "h2    up 8m       10.0.0.6:4500  0.41 ms  1.5%  backend,managed");
        assert!(lines[2].starts_with("h3    silent 5s"), "{text}");
        assert!(lines[3].contains("no traffic passes"), "{text}");
        assert!(lines[4].starts_with("h4    waiting     -"), "{text}");
        assert!(lines[5].starts_with("  this host (203.0.113.7) and host h4"), "{text}");
        assert!(text.contains("let UDP 4500 through (next attempt in 5s)"), "{text}");
        assert!(lines.last().unwrap().contains("failed 25s ago: no answer"), "{text}");
        let wide = "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff";
        let mut far = all();
        far[0].path = serde_json::from_str(&format!(r#"["[{wide}]:4500", "[{wide}]:4500"]"#)).unwrap();
        let text = table(&far, NOW).render(Some(80));
        assert!(text.contains(&format!("[{wide}]:4500")), "an address is not cut: {text}");
    }

    #[test]
    fn inspect_tells_what_swanctl_list_sas_tells_and_path_loss_mtu_and_last_failure() {
        let text = details(&all()[0], NOW).render();
        for part in [
            "up for 8m, since 1970-01-01 00:00:01 UTC",
            "10.0.0.5:4500 to 10.0.0.6:4500",
            "before this host",
            "IKEv2, SPIs 6d0bf2ee9b2bf2c6 (this host, initiator), 0102030405060708 (peer, responder)",
            "AES_GCM_16_256/PRF_HMAC_SHA2_256/X25519",
            "established 8m ago, rekeyed in 3h",
            "managed: tunnel mode in UDP, AES_GCM_16_256",
            "installed 8m ago, rekeyed in 75s",
            "in  c0ffee01  8400 bytes, 100 packets",
            "out c0ffee02  84 bytes, 1 packet\n",
            "managed (on its way in or out)",
            "backend: tunnel mode",
            "0.41 ms",
            "1.5%",
            "1438 bytes pass",
            "1s ago (1970-01-01 00:08:44 UTC)",
            "25s ago (1970-01-01 00:08:20 UTC): no answer from 10.0.0.6:4500",
            "3: replayed",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
        assert!(!text.contains("no SA"), "what did not happen is not listed:\n{text}");
        let text = details(&all()[3], NOW).render();
        assert!(text.contains("failed: no answer from 192.0.2.5:4500"), "{text}");
        assert!(text.contains("IKE SA:        none") && text.contains("ESP SAs:       none"), "{text}");
    }

    #[test]
    fn a_black_hole_stands_out_in_both() {
        let tunnel = TunnelStatus { black_hole: true, ..all().swap_remove(0) };
        assert!(details(&tunnel, NOW).render().contains("BLACK HOLE: packets above 1438 bytes vanish"));
        assert!(table(&[tunnel], NOW).render(None).contains("packets above 1438 bytes vanish"));
    }

    #[test]
    fn what_is_refused_is_told_and_nothing_where_all_is_fast() {
        let tunnel = all().swap_remove(0);
        assert!(!details(&tunnel, NOW).render().contains("Slower way"));
        let slower = vec!["UDP segmentation: every datagram is sent alone".to_owned()];
        let text = details(&TunnelStatus { slower, ..tunnel }, NOW).render();
        assert!(text.contains("Slower way:    UDP segmentation: every datagram"), "{text}");
    }

    #[test]
    fn the_summary_counts_states_and_names_those_that_are_not_up() {
        let said = summary(&all());
        assert_eq!(
            said,
            "1 up, 1 silent, 1 connecting, 1 waiting, 1 failed (h3, h4, h5, h6: `droveway tunnel ls` says why)"
        );
        assert_eq!(summary(&all()[..1]), "1 up");
        assert!(summary(&[]).starts_with("none"));
    }

    #[test]
    fn figures_have_the_digits_that_matter() {
        let times = [0, 412, 9_999, 12_345, 123_456].map(milliseconds);
        assert_eq!(times, ["0.00 ms", "0.41 ms", "9.99 ms", "12.3 ms", "123 ms"]);
        assert_eq!([0, 5, 10, 1000].map(percent), ["0%", "0.5%", "1%", "100%"]);
    }
}
