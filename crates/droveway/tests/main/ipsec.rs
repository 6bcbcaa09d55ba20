//! Encrypted networks: what containers see is the same walk, what the underlay sees is ESP, and tunnels come back.

use std::time::Duration;

use droveway::lab::{Daemon, Lab, LabSpec, boxes};
use model::agent_api::TunnelState;

use crate::charon::{Charon, Connection, Proof, Settings};
use crate::red::{Red, ask, create, drop_incoming, drop_nothing, lost, tunnel, tunnels, up};
use crate::support::{LIMIT, Look, idle_in, meet, router_words, says, spec, succeeds, ttl, until};

#[test]
fn the_walk_over_an_encrypted_network_is_three_hops_and_no_inner_byte_is_seen_outside() {
    let red = Red::new(2).met();
    assert_eq!(ttl(&red.lab, &red.near.path(), &red.far.ip().to_string()), Some(62));
    assert_eq!(
        red.hops(&red.near, &red.far),
        [red.router_of("h1"), red.router_of("h2"), red.far.ip().to_string()]
    );
    assert_eq!(
        red.hops(&red.far, &red.near),
        [red.router_of("h2"), red.router_of("h1"), red.near.ip().to_string()]
    );
    let far_router = red.router_of("h2");
    let ping = router_words("red", &["ping", "-n", "-c", "1", "-W", "2", &far_router]);
    assert!(
        succeeds(&red.lab, "h1", &ping.iter().map(String::as_str).collect::<Vec<_>>()),
        "router to router"
    );

    // Large packets arrive whole, and carry what must not be seen.
    let far = red.far.ip().to_string();
    let big = ["ping", "-n", "-c", "3", "-i", "0.1", "-M", "do", "-s", "1410", &far];
    let text = says(&red.lab, &red.near.path(), &big);
    assert!(text.contains(" 0% packet loss"), "{text}");
    let status = tunnel(&red.lab, "h1", "h2");
    let child = &status.children[0];
    assert!(child.packets_in >= 4 && child.packets_out >= 4, "{status:#?}");
    assert!(child.suite.contains("AES_GCM_16_256") && child.suite.contains("ESN"), "{}", child.suite);
    // An agent that is killed has nothing in clear on its way out, and one that ends says farewell.
    red.lab.kill_agent("h1").unwrap();
    assert!(!red.reaches(), "no agent, no packet");
    red.lab.start_agent("h1").unwrap();
    until(LIMIT, "traffic is back", || red.reaches());
    red.lab.stop_daemon("h1", Daemon::Agent).unwrap();
    until(Duration::from_secs(2), "the other side was told", || {
        tunnel(&red.lab, "h2", "h1").children.is_empty()
    });
    assert!(!red.reaches_back(), "no tunnel, no packet");
}

#[test]
fn a_tunnel_says_all_of_itself_and_is_rekeyed_and_reset_when_asked() {
    let red = Red::new(2).met();
    until(LIMIT, "the path is measured", || tunnel(&red.lab, "h1", "h2").mtu == Some(1438));
    let status = tunnel(&red.lab, "h1", "h2");
    assert!(matches!(status.state, TunnelState::Up { .. }), "{status:#?}");
    assert!(status.rtt_us.is_some() && status.loss_permille == Some(0), "{status:#?}");
    assert_eq!(status.path.unwrap().1, "10.0.0.6:4500".parse().unwrap());
    assert_eq!((status.nat, status.black_hole), ((false, false), false));
    let ike = status.ike.clone().unwrap();
    assert!(ike.suite.starts_with("AES_GCM_16_256/"), "{}", ike.suite);
    assert_eq!(status.children.len(), 1);
    let other = tunnel(&red.lab, "h2", "h1");
    assert_eq!(other.children[0].outbound_spi, status.children[0].inbound_spi);
    assert_eq!(other.ike.as_ref().unwrap().initiator_spi, ike.initiator_spi);
    assert_eq!((lost(&status), lost(&other)), (0, 0), "{:?} {:?}", status.drops, other.drops);

    // New keys, and not a packet lost.
    let steady = red.steady();
    assert_eq!(ask(&red.lab, "h1", "POST", "/v1/tunnels/h2/rekey").0, 204);
    until(LIMIT, "both SAs are new", || {
        let now = tunnel(&red.lab, "h1", "h2");
        let child = now.children.iter().find(|it| it.live);
        now.ike.is_some_and(|it| it.initiator_spi != ike.initiator_spi)
            && child.is_some_and(|it| it.inbound_spi != status.children[0].inbound_spi)
    });
    assert!(tunnel(&red.lab, "h2", "h1").rekeys > 0);
    let (sent, received) = steady.end(&red.lab, &red.near);
    assert_eq!(sent, received);

    assert_eq!(ask(&red.lab, "h2", "POST", "/v1/tunnels/h1/reset").0, 204);
    until(LIMIT, "it is up again", || up(&red.lab, "h1", "h2") && up(&red.lab, "h2", "h1") && red.reaches());
    let (code, text) = ask(&red.lab, "h1", "POST", "/v1/tunnels/nobody/reset");
    assert!(code == 404 && text.contains("nobody") && text.contains("h2"), "{code} {text}");
    let metrics = ask(&red.lab, "h1", "GET", "/metrics").1;
    assert!(metrics.contains("droveway_tunnel_state{peer=\"h2\",state=\"up\"} 1"), "{metrics}");
    assert!(metrics.contains("droveway_tunnel_handshakes_total{peer=\"h2\"} "), "{metrics}");
    // It is logged who asked.
    let log = std::fs::read_to_string(red.lab.daemon_log("h2", Daemon::Agent)).unwrap();
    assert!(log.lines().any(|it| it.contains("made anew, as asked") && it.contains("uid 0")), "{log}");
}

#[test]
fn two_networks_with_the_same_peer_stay_apart_and_a_network_that_ends_takes_its_child_along() {
    let red = Red::new(2).met();
    create(&red.lab, "blue", "10.44.0.0/16");
    let near = red.lab.run("h1", &idle_in("blue", "bluenear")).unwrap();
    let far = red.lab.run("h2", &idle_in("blue", "bluefar")).unwrap();
    meet(&red.lab, &near, &far);
    let networks = |host: &str| -> Vec<String> {
        let all = tunnels(&red.lab, host);
        assert_eq!(all.len(), 1, "one IKE SA for a pair of hosts");
        all[0].children.iter().filter(|it| it.live).map(|it| it.network.to_string()).collect()
    };
    until(LIMIT, "a child for each", || networks("h1") == ["blue", "red"]);
    // Without the canary: to blue, an address of red is one of the outside.
    let other = red.far.ip().to_string();
    let ping = ["ping", "-n", "-c", "1", "-W", "1", &other];
    assert!(!succeeds(&red.lab, &near.path(), &ping), "from one into the other");
    assert!(red.reaches());
    for (host, name) in [("h1", "bluenear"), ("h2", "bluefar")] {
        red.lab.kill_container(host, name).unwrap();
    }
    let program = env!("CARGO_BIN_EXE_droveway");
    until(LIMIT, "the network is removed", || {
        succeeds(&red.lab, "server", &[program, "network", "rm", "blue"])
    });
    until(LIMIT, "its child is gone", || networks("h1") == ["red"] && networks("h2") == ["red"]);
    assert!(red.reaches());
}

#[test]
fn a_host_that_is_removed_is_cut_off_at_once() {
    let red = Red::new(2).met();
    let program = env!("CARGO_BIN_EXE_droveway");
    red.lab.check("server", &[program, "host", "rm", "h2"]).unwrap();
    until(Duration::from_secs(2), "the tunnel is gone", || tunnels(&red.lab, "h1").is_empty());
    assert!(!red.reaches());
}

#[test]
fn a_tunnel_port_of_ones_own_works() {
    let red = Red::with_agents(2, &["--tunnel-port", "4777"]).met();
    let path = tunnel(&red.lab, "h1", "h2").path.unwrap();
    assert_eq!((path.0.port(), path.1.port()), (4777, 4777));
}

#[test]
fn a_black_hole_is_found_shown_and_got_around() {
    let red = Red::new(2).met();
    until(LIMIT, "the path is measured", || tunnel(&red.lab, "h1", "h2").mtu == Some(1438));
    let reset = || assert_eq!(ask(&red.lab, "h1", "POST", "/v1/tunnels/h2/reset").0, 204);
    // 1300 bytes of UDP, header included: 1260 for ESP, and what of that is not padding or trailer.
    drop_incoming(&red.lab, "h2", "udp dport 4500 udp length > 1300");
    reset();
    until(2 * LIMIT, "it is found", || tunnel(&red.lab, "h1", "h2").black_hole);
    let mtu = tunnel(&red.lab, "h1", "h2").mtu.unwrap();
    assert!((1250..=1258).contains(&mtu), "{mtu}");
    // Whoever may not be cut is told, and gets through with what fits.
    let ping = |size: u32| {
        let size = (size - 28).to_string();
        let to = red.far.ip().to_string();
        says(&red.lab, &red.near.path(), &["ping", "-n", "-c", "1", "-W", "1", "-M", "do", "-s", &size, &to])
    };
    assert!(ping(mtu).contains(" 0% packet loss"), "{}", ping(mtu));
    // The packet path hears of it a moment after it is shown.
    until(LIMIT, "a packet that is too large is answered with what fits", || {
        let text = ping(1400);
        text.contains(&format!("mtu = {mtu}")) || text.contains(&format!("mtu={mtu}"))
    });
    let log = std::fs::read_to_string(red.lab.daemon_log("h1", Daemon::Agent)).unwrap();
    assert!(log.contains("vanish on the way without a word"), "{log}");
    drop_nothing(&red.lab, "h2");
}

#[test]
fn an_underlay_that_says_how_little_it_takes_is_believed() {
    let red = Red::new(2).met();
    until(LIMIT, "the path is measured", || tunnel(&red.lab, "h1", "h2").mtu == Some(1438));
    red.lab.check("h1", &["ip", "route", "add", "10.0.0.6/32", "dev", "eth0", "mtu", "1400"]).unwrap();
    let to = red.far.ip().to_string();
    until(LIMIT, "the tunnel takes no more than that leaves", || {
        let big = ["ping", "-n", "-c", "1", "-W", "0.3", "-M", "do", "-s", "1400", &to];
        says(&red.lab, &red.near.path(), &big);
        tunnel(&red.lab, "h1", "h2").mtu == Some(1338)
    });
    assert!(!tunnel(&red.lab, "h1", "h2").black_hole);
}

#[test]
fn a_capture_shows_inner_packets_and_who_asked_is_logged() {
    let red = Red::new(2).met();
    let file = tempfile::NamedTempFile::new().unwrap();
    let url = "http://agent/v1/tunnels/h2/capture";
    let socket = model::agent_api::SOCKET;
    let command = ["curl", "-s", "-N", "--unix-socket", socket, url];
    let mut capture = red.lab.command("h1", &command).unwrap();
    capture.stdout(file.reopen().unwrap());
    let mut capture = capture.spawn().unwrap();
    until(LIMIT, "it has begun", || file.as_file().metadata().unwrap().len() > 0);
    assert_eq!(ask(&red.lab, "h1", "GET", "/v1/tunnels/h2/capture").0, 409, "one at a time");
    let shown = || {
        let path = file.path().display().to_string();
        let output = std::process::Command::new("tcpdump").args(["-n", "-r", &path]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (near, far) = (red.near.ip(), red.far.ip());
    until(LIMIT, "both directions are in it", || {
        red.reaches();
        let text = shown();
        text.contains(&format!("{near} > {far}: ICMP echo request"))
            && text.contains(&format!("{far} > {near}: ICMP echo reply"))
    });
    capture.kill().unwrap();
    capture.wait().unwrap();
    until(LIMIT, "another can begin", || {
        let url = "http://agent/v1/tunnels/h2/capture";
        let code =
            ["curl", "-s", "-m", "1", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", socket, url];
        says(&red.lab, "h1", &code).contains("200")
    });
    let log = std::fs::read_to_string(red.lab.daemon_log("h1", Daemon::Agent)).unwrap();
    assert!(log.lines().any(|it| it.contains("being captured") && it.contains("uid 0")), "{log}");
}

#[test]
fn a_host_behind_a_nat_begins_is_followed_and_two_behind_different_ones_say_why_they_wait() {
    let nats = boxes("h2,h3".split(',').map(|it| it.parse().unwrap()).collect());
    let red = Red::in_lab(Lab::up(LabSpec { nats, ..spec(3) }).unwrap()).met();
    let third = red.lab.run("h3", &idle_in("red", "third")).unwrap();
    meet(&red.lab, &red.near, &third);
    let (here, there) = (tunnel(&red.lab, "h1", "h2"), tunnel(&red.lab, "h2", "h1"));
    assert_eq!((here.nat, there.nat), ((false, true), (true, false)));
    assert!(there.ike.unwrap().initiator, "the one behind the NAT begins");
    let between = tunnel(&red.lab, "h2", "h3");
    let TunnelState::Waiting { why } = between.state else { panic!("{between:#?}") };
    assert!(why.contains("different NATs") && why.contains("--address"), "{why}");

    // The box takes another port: by the next packet from inside the other side knows.
    let path = here.path.unwrap().1;
    red.lab.rebind("h2").unwrap();
    let took = until(LIMIT, "traffic is back", || red.reaches_back());
    println!("rebound: back after {took:?}");
    let now = tunnel(&red.lab, "h1", "h2");
    assert!(now.path.unwrap().1 != path && now.handshakes == here.handshakes, "{now:#?}");
    // The public side loses all that it knew: it cannot begin, and is begun with.
    red.lab.kill_agent("h1").unwrap();
    red.lab.start_agent("h1").unwrap();
    let took = until(LIMIT, "traffic is back", || red.reaches());
    println!("the public side began anew: back after {took:?}");
}

#[test]
fn what_is_behind_a_foreign_peer_is_reached_from_all_hosts_whoever_begins() {
    let others = vec!["office".parse().unwrap()];
    let lab = Lab::up(LabSpec { others, ..spec(2) }).unwrap();
    let red = Red::in_lab(lab).met();
    let mut office = Charon::start(&red.lab, "office", "192.168.77.1/24", Settings::default());
    let address = "10.0.0.201".to_owned();
    let secret = "a secret of the two sides alone";
    let psk = || Proof::Psk(secret.to_owned());
    office.load(&Connection {
        local_ts: vec!["192.168.77.0/24".to_owned()],
        remote_ts: vec!["10.43.0.0/16".to_owned()],
        ..Connection::new("c", "10.0.0.5", (&address, psk()), ("10.0.0.5", psk()))
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), secret).unwrap();
    let psk_file = file.path().display().to_string();
    let words = [
        "droveway",
        "peer",
        "create",
        "office",
        "--address",
        &address,
        "--psk-file",
        &psk_file,
        "--network",
        "red",
        "--host",
        "h1",
        "--remote-cidr",
        "192.168.77.0/24",
    ];
    red.lab.check("server", &words).unwrap();
    let behind = "192.168.77.1";
    for from in [&red.near, &red.far] {
        until(LIMIT, "the office answers", || red.watch.pings(&red.lab, &from.path(), behind));
    }
    let status = tunnel(&red.lab, "h1", "office");
    assert!(status.foreign && matches!(status.state, TunnelState::Up { .. }), "{status:#?}");
    assert_eq!(status.path.map(|(ours, theirs)| (ours.port(), theirs.port())), Some((4500, 4500)));
    assert!(office.pings(behind, &red.far.ip().to_string()), "and the office reaches all hosts");
    assert!(!tunnels(&red.lab, "h2").iter().any(|it| it.foreign), "by way of one host");

    // It begins itself, at port 500.
    office.terminate("c").unwrap();
    until(LIMIT, "it is up again", || {
        drop(office.initiate("c"));
        office.pings(behind, &red.near.ip().to_string())
    });
    red.lab.check("server", &["droveway", "peer", "rm", "office"]).unwrap();
    until(LIMIT, "the peer is gone, and port 500 is closed", || {
        !tunnels(&red.lab, "h1").iter().any(|it| it.foreign)
            && !says(&red.lab, "h1", &["ss", "-uln"]).contains(":500 ")
    });
}
