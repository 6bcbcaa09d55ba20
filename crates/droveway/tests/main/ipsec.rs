//! Encrypted networks: what containers see is the same walk, what the underlay sees is ESP, and tunnels come back.

use std::time::{Duration, Instant};

use droveway::lab::{Container, Daemon, Lab, LabSpec, boxes};
use model::agent_api::{TunnelState, TunnelStatus};

use crate::charon::{Charon, Connection, Proof, Settings};
use crate::steady::Steady;
use crate::support::{LIMIT, Look, idle_in, meet, router, router_words, says, spec, succeeds, ttl, until};
use crate::watch::{Watch, pattern};

/// Two hosts with a container each in an encrypted network, and a capture of the underlay from before the network was
/// made until the test has ended: whatever a test does to them, its canary is never seen.
struct Red {
    // Before the lab: it has to end first.
    watch: Watch,
    lab: Lab,
    near: Container,
    far: Container,
}

impl Drop for Red {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.watch.sealed();
        }
    }
}

impl Red {
    fn in_lab(lab: Lab) -> Self {
        let watch = Watch::begin(&lab);
        create(&lab, "red", "10.43.0.0/16");
        let near = lab.run("h1", &idle_in("red", "near")).unwrap();
        let far = lab.run("h2", &idle_in("red", "far")).unwrap();
        Self { watch, lab, near, far }
    }

    fn new(hosts: u32) -> Self {
        Self::in_lab(Lab::up(spec(hosts)).unwrap())
    }

    fn with_agents(hosts: u32, args: &[&str]) -> Self {
        let agent_args = args.iter().map(|&arg| arg.to_owned()).collect();
        Self::in_lab(Lab::up(LabSpec { agent_args, ..spec(hosts) }).unwrap())
    }

    /// Waits until the two reach each other.
    fn met(self) -> Self {
        until(LIMIT, "the two reach each other", || self.reaches());
        self
    }

    /// Whether a ping with the canary in it is answered.
    fn reaches(&self) -> bool {
        self.watch.pings(&self.lab, &self.near.path(), &self.far.ip().to_string())
    }

    /// The same from the other side.
    fn reaches_back(&self) -> bool {
        self.watch.pings(&self.lab, &self.far.path(), &self.near.ip().to_string())
    }

    /// Pings with the canary in them, from the near one to the far one.
    fn steady(&self) -> Steady {
        let pattern = pattern();
        let options = ["-s", "200", "-p", &pattern, &self.far.ip().to_string()].map(str::to_owned);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Steady::start_saying(&self.lab, &self.near.path(), &options)
    }

    fn hops(&self, from: &Container, to: &Container) -> Vec<String> {
        let to = to.ip().to_string();
        let text = self.lab.check(&from.path(), &["traceroute", "-n", "-q", "1", "-w", "2", &to]).unwrap();
        text.lines().skip(1).map(|line| line.split_whitespace().nth(1).unwrap().to_owned()).collect()
    }

    fn router_of(&self, host: &str) -> String {
        router(&self.lab, host, "red").address.unwrap().to_string()
    }
}

fn create(lab: &Lab, network: &str, subnet: &str) {
    let program = env!("CARGO_BIN_EXE_droveway");
    lab.check("server", &[program, "network", "create", network, "--subnet", subnet, "--driver", "ipsec"])
        .unwrap();
}

/// What a host's agent answers, as text, and the status before it.
fn ask(lab: &Lab, host: &str, method: &str, path: &str) -> (u16, String) {
    let url = format!("http://agent{path}");
    let socket = model::agent_api::SOCKET;
    let words =
        ["curl", "-s", "-m", "5", "-X", method, "-w", "\n%{http_code}", "--unix-socket", socket, &url];
    let text = lab.check(host, &words).unwrap();
    let (body, code) = text.trim_end().rsplit_once('\n').unwrap();
    (code.parse().unwrap(), body.to_owned())
}

fn tunnels(lab: &Lab, host: &str) -> Vec<TunnelStatus> {
    serde_json::from_str(&ask(lab, host, "GET", "/v1/tunnels").1).unwrap()
}

fn tunnel(lab: &Lab, host: &str, peer: &str) -> TunnelStatus {
    serde_json::from_str(&ask(lab, host, "GET", &format!("/v1/tunnels/{peer}")).1).unwrap()
}

fn up(lab: &Lab, host: &str, peer: &str) -> bool {
    tunnels(lab, host).iter().any(|it| it.peer.as_str() == peer && matches!(it.state, TunnelState::Up { .. }))
}

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
    assert_eq!(other.ike.unwrap().initiator_spi, ike.initiator_spi);
    assert!(status.drops.is_empty() && other.drops.is_empty(), "{:?} {:?}", status.drops, other.drops);

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
fn an_agent_killed_under_load_has_its_traffic_back_in_half_a_second() {
    let red = Red::new(2).met();
    for host in ["h1", "h2"] {
        red.lab.kill_agent(host).unwrap();
        assert!(!red.reaches(), "no agent, no packet");
        let begun = Instant::now();
        red.lab.start_agent(host).unwrap();
        until(LIMIT, "traffic is back", || red.reaches());
        println!("{host}: back {:?} after its start", begun.elapsed());
    }
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
fn keys_changed_every_second_lose_nothing() {
    let red = Red::with_agents(2, &["--rekey-every", "1"]).met();
    let steady = red.steady();
    until(Duration::from_secs(30), "ten rekeys", || tunnel(&red.lab, "h1", "h2").rekeys >= 10);
    let (sent, received) = steady.end(&red.lab, &red.near);
    let drops = ["h1", "h2"].map(|host| ask(&red.lab, host, "GET", "/metrics").1);
    let drops: Vec<&str> =
        drops.iter().flat_map(|it| it.lines()).filter(|it| it.contains("drops_total{")).collect();
    assert_eq!((sent, drops), (received, Vec::new()));
}

/// A rule of a host's own firewall, for what comes in.
fn drop_incoming(lab: &Lab, host: &str, rule: &str) {
    let script = format!(
        "nft add table inet fault; nft add chain inet fault in '{{ type filter hook input priority 0; }}'
         nft add rule inet fault in '{rule} drop'"
    );
    lab.check(host, &["sh", "-ec", &script]).unwrap();
}

fn drop_nothing(lab: &Lab, host: &str) {
    lab.check(host, &["nft", "delete", "table", "inet", "fault"]).unwrap();
}

#[test]
fn a_pair_that_is_dead_while_others_work_is_seen_begun_anew_and_mended() {
    let red = Red::new(3).met();
    let third = red.lab.run("h3", &idle_in("red", "third")).unwrap();
    meet(&red.lab, &red.near, &third);
    until(LIMIT, "all is well", || up(&red.lab, "h1", "h2") && up(&red.lab, "h1", "h3"));
    let before = tunnel(&red.lab, "h1", "h2");
    // IKE passes, ESP does not: its first word is not zero.
    drop_incoming(&red.lab, "h2", "ip saddr 10.0.0.5 udp dport 4500 @th,64,32 != 0");
    until(LIMIT, "it is seen that nothing passes", || {
        matches!(tunnel(&red.lab, "h1", "h2").state, TunnelState::Silent { .. })
    });
    assert!(up(&red.lab, "h1", "h3"), "the others are well");
    assert!(ttl(&red.lab, &red.near.path(), &third.ip().to_string()).is_some());
    until(LIMIT, "the tunnel is made anew", || {
        let now = tunnel(&red.lab, "h1", "h2");
        now.handshakes > before.handshakes
    });
    drop_nothing(&red.lab, "h2");
    until(LIMIT, "and it is well again", || up(&red.lab, "h1", "h2") && red.reaches());
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
fn a_host_whose_address_changes_is_followed() {
    let red = Red::new(2).met();
    until(LIMIT, "all is well", || up(&red.lab, "h1", "h2"));
    let since = tunnel(&red.lab, "h1", "h2").handshakes;
    for (host, address) in [("h2", "10.0.0.77"), ("h1", "10.0.0.78")] {
        red.lab.readdress(host, address.parse().unwrap()).unwrap();
        let took = until(LIMIT, "traffic is back", || red.reaches());
        assert!(took < Duration::from_secs(4), "{host} moved: back after {took:?}");
        println!("{host} moved: back after {took:?}");
    }
    assert_eq!(tunnel(&red.lab, "h1", "h2").handshakes, since, "by the same IKE SA");
    assert_eq!(tunnel(&red.lab, "h1", "h2").path.unwrap().1, "10.0.0.77:4500".parse().unwrap());
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
