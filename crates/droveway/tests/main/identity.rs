//! Who hosts are: certificates that are renewed, or run out while the server is away; a host that is removed.

use std::time::Duration;

use droveway::lab::{Lab, LabSpec};
use model::UnixMillis;
use model::agent_api::{AgentStatus, Connection, TunnelState, TunnelStatus};
use model::api::{HostView, Readiness};
use model::exposition;

use crate::steady::Steady;
use crate::support::{LIMIT, Look, idle, lab, meet, says, spec, ttl, until};

/// How long certificates are good for in these tests: renewed about every six seconds.
const LIFE: &str = "10";

fn status(lab: &Lab, host: &str) -> AgentStatus {
    lab.agent_status(host).unwrap()
}

fn now() -> UnixMillis {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64
}

fn ask(lab: &Lab, host: &str, path: &str) -> String {
    let url = format!("http://agent{path}");
    lab.check(host, &["curl", "-s", "-m", "5", "--unix-socket", model::agent_api::SOCKET, &url]).unwrap()
}

fn tunnels(lab: &Lab, host: &str) -> Vec<TunnelStatus> {
    serde_json::from_str(&ask(lab, host, "/v1/tunnels")).unwrap()
}

#[test]
fn certificates_are_renewed_under_traffic_and_one_that_ran_out_while_the_server_was_away_stops_nothing() {
    let server_args = ["--certificate-life", LIFE].map(str::to_owned).to_vec();
    let lab = Lab::up(LabSpec { server_args, ..spec(2) }).unwrap();
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &near, &far);
    let steady = Steady::start(&lab, &far, &near);
    let (connected, first) = (status(&lab, "h1").connection, status(&lab, "h1").certificate_expires);
    let handshakes = tunnels(&lab, "h1")[0].handshakes;
    until(Duration::from_secs(40), "two certificates later", || {
        status(&lab, "h1").certificate_expires >= first + 10_000
    });
    assert!(now() > first, "the first one has run out");
    assert_eq!(status(&lab, "h1").connection, connected, "the watch is the one that was opened at first");
    assert_eq!(tunnels(&lab, "h1")[0].handshakes, handshakes, "and so is the tunnel");
    let (sent, received) = steady.end(&lab, &far);
    assert_eq!(sent, received, "pings all the while");
    assert!(sent > 5);
    let text = says(&lab, "server", &["droveway", "host", "inspect", "h1"]);
    assert!(text.contains("good until"), "{text}");

    // Without the server they run out.
    lab.kill_server().unwrap();
    until(Duration::from_secs(40), "the certificates run out", || {
        ["h1", "h2"].iter().all(|host| status(&lab, host).certificate_expires < now())
    });
    let text = says(&lab, "h1", &["droveway", "status"]);
    assert!(text.contains("has RUN OUT on") && text.contains("nothing stops"), "{text}");
    let steady = Steady::start(&lab, &far, &near);
    let (sent, received) = steady.end(&lab, &far);
    assert_eq!(sent, received);
    // A tunnel that begins anew is made with them.
    says(&lab, "h1", &["droveway", "tunnel", "reset", "h2"]);
    until(LIMIT, "the tunnel is back", || {
        let tunnel = &tunnels(&lab, "h1")[0];
        tunnel.handshakes > handshakes && matches!(tunnel.state, TunnelState::Up { .. })
    });
    meet(&lab, &near, &far);
    assert!(status(&lab, "h1").certificate_expires < now(), "still with the old one");

    lab.start_server().unwrap();
    until(Duration::from_secs(60), "they are renewed when the server is back", || {
        ["h1", "h2"].iter().all(|host| {
            let status = status(&lab, host);
            status.certificate_expires > now() && matches!(status.connection, Connection::Up { .. })
        })
    });
    assert!(ttl(&lab, &near.path(), &far.ip().to_string()).is_some());
}

#[test]
fn a_host_that_is_removed_is_told_why_and_joins_again_as_another() {
    let lab = lab(3);
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &near, &far);
    let before = status(&lab, "h2").host;
    lab.check("server", &["droveway", "host", "rm", "h2"]).unwrap();
    until(Duration::from_secs(2), "its peers have no tunnel to it", || {
        !tunnels(&lab, "h1").iter().any(|tunnel| tunnel.peer.as_str() == "h2")
    });
    until(LIMIT, "it is told why", || match status(&lab, "h2").connection {
        Connection::Down { why, .. } => why.contains("removed") && why.contains("droveway token create"),
        Connection::Up { .. } => false,
    });
    assert_eq!(ttl(&lab, &near.path(), &far.ip().to_string()), None);
    let text = says(&lab, "server", &["droveway", "audit", "ls", "--since", "1h", "-o", "json"]);
    let entries: Vec<model::api::AuditEntry> = serde_json::from_str(&text).unwrap();
    let removal = entries.iter().find(|entry| entry.what.ends_with("/hosts/h2")).unwrap();
    assert_eq!((removal.who.as_str(), removal.what.split(' ').next()), ("key admin", Some("DELETE")));

    lab.kill_agent("h2").unwrap();
    lab.start_agent("h2").unwrap();
    lab.wait_connected("h2").unwrap();
    let after = status(&lab, "h2").host;
    assert_ne!(before, after);
    let hosts: Vec<HostView> =
        serde_json::from_str(&says(&lab, "server", &["droveway", "host", "ls", "-o", "json"])).unwrap();
    assert_eq!(
        hosts
            .iter()
            .filter(|view| view.host.name.as_str() == "h2")
            .map(|view| &view.host.id)
            .collect::<Vec<_>>(),
        [&after]
    );
    let again = lab.run("h2", &idle("again")).unwrap();
    meet(&lab, &near, &again);
}

#[test]
fn an_agent_says_whether_it_is_ready_and_counts_what_it_does_at_its_socket_and_its_port() {
    let agent_args = ["--metrics", "127.0.0.1:9473"].map(str::to_owned).to_vec();
    let lab = Lab::up(LabSpec { agent_args, ..spec(1) }).unwrap();
    let near = lab.run("h1", &idle("near")).unwrap();
    let other = lab.run("h1", &idle("other")).unwrap();
    meet(&lab, &near, &other);
    says(&lab, &near.path(), &["dig", "+short", "+time=2", "other.droveway.internal"]);
    assert_eq!(ask(&lab, "h1", "/healthz"), "ok\n");
    let mut readiness = None;
    until(LIMIT, "it is ready", || {
        readiness = serde_json::from_str::<Readiness>(&ask(&lab, "h1", "/readyz")).ok();
        readiness.as_ref().is_some_and(|readiness| readiness.ready)
    });
    assert_eq!(
        readiness.unwrap().checks.keys().collect::<Vec<_>>(),
        ["kernel", "ledger", "reconciler", "snapshot"]
    );
    let ready = says(&lab, "h1", &["droveway", "status", "--ready"]);
    assert!(ready.contains("reconciler: ok"), "{ready}");
    let port = lab.check("h1", &["curl", "-s", "-m", "5", "http://127.0.0.1:9473/metrics"]).unwrap();
    for text in [ask(&lab, "h1", "/metrics"), port] {
        assert_eq!(exposition::faults(&text), [""; 0], "{text}");
        for line in [
            "droveway_connected 1",
            "droveway_local_endpoints{network=\"managed\"} 2",
            "droveway_routers{state=\"converged\"} 1",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
        }
        for name in [
            "droveway_reconcile_duration_seconds_count",
            "droveway_watch_messages_total",
            "droveway_dns_queries_total{outcome=\"answered\"}",
            "droveway_ledger_size_bytes",
            "droveway_certificate_expiry_timestamp_seconds{certificate=\"host\"}",
        ] {
            let line = text
                .lines()
                .find(|line| line.starts_with(name))
                .unwrap_or_else(|| panic!("{name} in\n{text}"));
            assert!(line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() > 0.0, "{line}");
        }
    }
    let elsewhere = says(&lab, "h1", &["curl", "-s", "-m", "5", "http://127.0.0.1:9473/v1/status"]);
    assert!(!elsewhere.contains("version"), "the port shows metrics and health alone: {elsewhere}");
}
