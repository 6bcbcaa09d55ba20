//! What happens to a tunnel with charon while it is used: NATs, fragments, cookies, new keys, deaths and deletions.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use droveway::lab::capture::{Report, What};
use droveway::lab::{LabSpec, boxes};
use ike::wire::NotifyType;

use super::{BOX, BOX_ID, Field, GATEWAY, INNER, SECRET, Trust, proved};
use crate::charon::{Authority, Charon, Connection, Key, Proof, Settings};
use crate::frame::{ipv4, mac, packet, udp};
use crate::probe;
use crate::steady::Steady;
use crate::support::{LIMIT, spec, until};
use crate::watch::{Watch, pattern};

/// Something that asks for new keys, whether of the IKE SA, whether of the child, and what it is.
type Ask<'a> = (&'static str, bool, bool, &'a dyn Fn(&Charon<'_>));

/// `IKE_SA_INIT` that a charon once sent.
const FIRST_REQUEST: &str = include_str!("../../../../ike/tests/charon/init-request.txt");

fn behind_nat(node: &str) -> LabSpec {
    LabSpec { nats: boxes(vec![node.parse().unwrap()]), ..spec(1) }
}

/// Messages of `IKE_SA_INIT` with a cookie, by who sends them.
fn cookies(seen: &Report, node: &str, response: bool) -> u64 {
    let cookie = What::Ike { exchange: 34, response, notify: Some(NotifyType::Cookie.into()) };
    seen.count(|flow| flow.node == node && flow.what == cookie)
}

fn first_request() -> Vec<u8> {
    let digits: Vec<u8> =
        FIRST_REQUEST.trim().bytes().map(|it| (it as char).to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

#[test]
fn a_gateway_behind_a_nat_keeps_its_tunnel_when_the_nat_forgets_it() {
    let field = Field::of(behind_nat("h1"));
    let mut watch = Watch::begin(&field.lab);
    let mut charon = field.charon(Settings::default());
    let mut connection = field.connection(&Trust::Psk);
    connection.remote = "%any".to_owned();
    connection.theirs.0 = "gateway.example".to_owned();
    charon.load(&connection);
    field.join_with(&Trust::Psk, &["--local-id", "gateway.example"]);
    let before = charon.up(BOX);
    let tunnel = field.up();
    assert!(tunnel.nat.0, "IKE has found the NAT before us: {tunnel:#?}");
    assert!(before.remote.starts_with("10.0.0.101:2"), "{before:#?}");
    let begin = watch.report();
    assert!(field.both_ways(&watch));
    proved(&before, &charon.up(BOX), &watch.sealed().since(&begin), 2);

    field.lab.rebind("h1").unwrap();
    let back = until(LIMIT * 2, "traffic is back", || field.both_ways(&watch));
    println!("back {back:?} after the NAT forgot");
    let after = charon.up(BOX);
    assert_eq!(after.unique, before.unique, "the same IKE SA");
    assert_ne!(after.remote, before.remote);
    watch.sealed();
}

#[test]
fn a_peer_behind_a_nat_begins_itself_and_is_followed_when_the_nat_forgets_it() {
    let field = Field::of(behind_nat(BOX));
    let mut watch = Watch::begin(&field.lab);
    let mut charon = field.charon(Settings::default());
    charon.load(&field.connection(&Trust::Psk));
    field.join_at("10.0.0.101", &Trust::Psk, &[]);
    until(LIMIT, "the gateway knows the peer", || field.tunnel().is_some());
    charon.initiate(BOX).unwrap();
    let before = charon.up(BOX);
    let path = field.up().path.unwrap();
    assert_eq!(path.1.ip(), Ipv4Addr::new(10, 0, 0, 101));
    let begin = watch.report();
    assert!(field.both_ways(&watch));
    proved(&before, &charon.up(BOX), &watch.sealed().since(&begin), 2);

    field.lab.rebind(BOX).unwrap();
    // The first packet from there tells where it is now; its answer may still go where it was.
    let limit = Duration::from_secs(2);
    until(limit, "traffic is back", || watch.pings_from(&field.lab, BOX, INNER, &field.address()));
    assert!(field.both_ways(&watch));
    let moved = field.up().path.unwrap();
    assert!(moved.1.ip() == path.1.ip() && moved.1.port() != path.1.port(), "{path:?} {moved:?}");
    assert_eq!(charon.up(BOX).unique, before.unique);
    watch.sealed();
}

#[test]
fn a_long_chain_of_certificates_comes_in_fragments_of_ike_and_not_of_ip() {
    let field = Field::new();
    let mut watch = Watch::begin(&field.lab);
    let mut charon = field.charon(Settings { fragment_size: 576, ..Settings::default() });
    let root = Authority::new("Root");
    let upper = root.below("Upper CA");
    let lower = upper.below("Lower CA");
    let mut certified = lower.certify_with(BOX_ID, Key::EcdsaP256, |params| {
        let more = (0..40).map(|i| format!("a-long-name-of-the-box-{i}.example").try_into().unwrap());
        params.subject_alt_names.extend(more.map(rcgen::SanType::DnsName));
    });
    certified.chain.extend([lower.der(), upper.der()]);
    let trust = Trust::Certificates(Box::new((root, certified)));
    charon.load(&field.connection(&trust));
    field.join(&trust);
    let before = charon.up(BOX);
    field.up();
    assert!(field.both_ways(&watch));
    let seen = watch.sealed();
    proved(&before, &charon.up(BOX), &seen, 2);
    let answer = What::Ike { exchange: 35, response: true, notify: None };
    let pieces = seen.count(|flow| flow.node == BOX && flow.what == answer);
    assert!(pieces >= 5, "{seen}");
}

#[test]
fn a_charon_under_load_gets_its_cookie_back_and_so_does_a_gateway() {
    let field = Field::new();
    let mut watch = Watch::begin(&field.lab);
    let mut charon = field.charon(Settings { cookie_threshold: 1, ..Settings::default() });
    let anyone = || ("nobody.example", Proof::Psk(SECRET.to_owned()));
    charon.load(&Connection::new("anyone", "%any", (BOX_ID, anyone().1), anyone()));
    charon.load(&field.connection(&Trust::Psk));
    // Someone begins and leaves it at that.
    let since = charon.log().len();
    probe::send_udp(
        &field.lab,
        "server",
        SocketAddr::from((Ipv4Addr::new(10, 0, 0, 201), 500)),
        &first_request(),
    );
    charon.says(since, "generating IKE_SA_INIT response");
    field.join(&Trust::Psk);
    let before = charon.up(BOX);
    field.up();
    assert!(field.both_ways(&watch));
    let seen = watch.sealed();
    proved(&before, &charon.up(BOX), &seen, 2);
    assert!(cookies(&seen, BOX, true) > 0 && cookies(&seen, "h1", false) > 0, "{seen}");

    // Many do so with the gateway, from as many addresses as it takes.
    charon.terminate(BOX).unwrap();
    let at = |node: &str| {
        let address = field.lab.check(node, &["cat", "/sys/class/net/eth0/address"]).unwrap();
        mac(address.trim())
    };
    let (to, from) = (at("h1"), at("server"));
    let frames: Vec<Vec<u8>> = (0..80_u8)
        .map(|i| {
            let mut request = first_request();
            request[0] = i;
            let source = Ipv4Addr::new(10, 0, 0, 150 + i / 10);
            packet(to, from, &ipv4(source, GATEWAY.parse().unwrap(), 17, &udp(500, 500, &request)))
        })
        .collect();
    let addresses = "for i in 0 1 2 3 4 5 6 7; do ip addr add 10.0.0.15$i/32 dev eth0; done";
    field.lab.check("server", &["sh", "-c", addresses]).unwrap();
    let begin = watch.report();
    for some in frames.chunks(16) {
        probe::send_by(&field.lab, "server", "eth0", some);
    }
    until(LIMIT, "the gateway asks strangers for cookies", || {
        cookies(&watch.report().since(&begin), "h1", true) > 0
    });
    let strangers = watch.report();
    // The gateway begins anew by itself: it must not be what makes the tunnel.
    field.lab.check(BOX, &["nft", super::matrix::DEAF]).unwrap();
    field.lab.check("h1", &["droveway", "tunnel", "reset", BOX]).unwrap();
    until(LIMIT, "the old one is gone", || charon.sas(BOX).is_empty());
    charon.initiate(BOX).unwrap();
    assert!(charon.up(BOX).initiator);
    field.up();
    assert!(field.both_ways(&watch));
    let seen = watch.report().since(&strangers);
    assert!(cookies(&seen, "h1", true) > 0 && cookies(&seen, BOX, false) > 0, "{seen}");
    watch.report().clean().unwrap();
}

#[test]
fn new_keys_by_either_side_lose_no_packet_and_leave_no_old_ones() {
    let field = Field::new();
    let mut watch = Watch::begin(&field.lab);
    let mut charon = field.charon(Settings::default());
    charon.load(&field.connection(&Trust::Psk));
    field.join(&Trust::Psk);
    let mut sa = charon.up(BOX);
    field.up();
    let steady = Steady::start_saying(&field.lab, &field.web.path(), &["-s", "200", "-p", &pattern(), INNER]);
    let by_gateway = |_: &Charon<'_>| {
        field.lab.check("h1", &["droveway", "tunnel", "rekey", BOX]).unwrap();
    };
    let asks: [Ask<'_>; 5] = [
        ("child, by charon", false, true, &|charon| charon.rekey_child(BOX).unwrap()),
        ("IKE SA, by charon", true, false, &|charon| charon.rekey_ike(BOX).unwrap()),
        ("both, by the gateway", true, true, &by_gateway),
        ("child, by charon, once more", false, true, &|charon| charon.rekey_child(BOX).unwrap()),
        ("both, by the gateway, once more", true, true, &by_gateway),
    ];
    for (what, ike, child, ask) in asks {
        ask(&charon);
        let mut now = charon.up(BOX);
        until(LIMIT, &format!("new keys: {what}"), || {
            now = charon.up(BOX);
            let fresh = now.spis != sa.spis && now.children[0].spi_in != sa.children[0].spi_in;
            let half = now.spis != sa.spis || now.children[0].spi_in != sa.children[0].spi_in;
            if ike && child { fresh } else { half }
        });
        assert_eq!(
            (now.spis != sa.spis, now.children[0].spi_in != sa.children[0].spi_in),
            (ike, child),
            "{what}"
        );
        sa = now;
    }
    let (sent, received) = steady.end(&field.lab, &field.web);
    assert_eq!(sent, received, "pings meanwhile");
    assert!(sent > 10);
    let mut tunnel = field.up();
    until(LIMIT, "old children are gone at the gateway", || {
        tunnel = field.up();
        tunnel.children.len() == 1
    });
    assert!(tunnel.drops.is_empty(), "{tunnel:#?}");
    assert_eq!(tunnel.children[0].outbound_spi, format!("{:08x}", sa.children[0].spi_in));
    assert_eq!(charon.log().matches("parsed IKE_AUTH request").count(), 1, "never authenticated anew");
    let (begin, before) = (watch.sealed(), charon.up(BOX));
    assert_eq!(before.spis, sa.spis);
    assert!(field.both_ways(&watch));
    proved(&before, &charon.up(BOX), &watch.sealed().since(&begin), 2);
}

#[test]
fn what_either_side_deletes_is_made_anew() {
    let field = Field::new();
    let mut watch = Watch::begin(&field.lab);
    let mut charon = field.charon(Settings::default());
    charon.load(&field.connection(&Trust::Psk));
    field.join(&Trust::Psk);
    let mut sa = charon.up(BOX);
    let anew = |charon: &Charon<'_>, watch: &Watch, old: &crate::charon::IkeSa, what: &str| {
        let mut now = old.clone();
        until(LIMIT, &format!("it is there again after {what}"), || {
            now = charon.up(BOX);
            now.children[0].spi_in != old.children[0].spi_in
        });
        field.up();
        assert!(field.both_ways(watch), "after {what}");
        now
    };
    charon.terminate(BOX).unwrap();
    let next = anew(&charon, &watch, &sa, "charon deleted the IKE SA");
    assert_ne!(next.spis, sa.spis);
    sa = next;
    charon.terminate_child(BOX).unwrap();
    let next = anew(&charon, &watch, &sa, "charon deleted the child");
    assert_eq!(next.spis, sa.spis, "the IKE SA stays");
    sa = next;
    let since = charon.log().len();
    field.lab.check("h1", &["droveway", "tunnel", "reset", BOX]).unwrap();
    charon.says(since, "received DELETE for IKE_SA");
    let next = anew(&charon, &watch, &sa, "the gateway began anew");
    assert_ne!(next.spis, sa.spis);
    let since = charon.log().len();
    field.part(&charon);
    charon.says(since, "received DELETE for IKE_SA");
    watch.sealed();
}

/// A pair that works, with a charon that soon misses its peer.
fn watchful<'a>(field: &'a Field, watch: &Watch) -> Charon<'a> {
    let settings = Settings { retransmit_timeout: 0.5, retransmit_tries: 2, ..Settings::default() };
    let mut charon = field.charon(settings);
    // With MOBIKE it would have something else to ask first.
    let good = field.connection(&Trust::Psk);
    charon.load(&Connection { liveness: Duration::from_secs(2), mobike: false, ..good });
    field.join(&Trust::Psk);
    charon.up(BOX);
    field.up();
    assert!(field.both_ways(watch));
    charon
}

#[test]
fn a_gateway_that_is_killed_is_missed_by_charon_and_is_back_as_soon_as_it_is_started() {
    let field = Field::new();
    let mut watch = Watch::begin(&field.lab);
    let charon = watchful(&field, &watch);
    let since = charon.log().len();
    field.lab.kill_agent("h1").unwrap();
    let missed = until(LIMIT, "charon misses the gateway", || charon.sas(BOX).is_empty());
    charon.says(since, "sending DPD request");
    println!("charon lets go {missed:?} after the agent's death");
    field.lab.start_agent("h1").unwrap();
    let back = until(LIMIT, "traffic is back", || field.both_ways(&watch));
    println!("traffic is back {back:?} after the agent's start");

    // So soon that charon has missed nothing: the new keys are in the place of the old.
    let old = charon.up(BOX);
    field.lab.kill_agent("h1").unwrap();
    field.lab.start_agent("h1").unwrap();
    until(LIMIT, "charon has the new SA alone", || charon.up(BOX).unique != old.unique);
    until(LIMIT, "traffic is back", || field.both_ways(&watch));
    watch.sealed();
}

#[test]
fn a_charon_that_is_killed_is_missed_and_tried_until_it_is_back() {
    let field = Field::new();
    let mut watch = Watch::begin(&field.lab);
    let mut charon = watchful(&field, &watch);
    charon.kill();
    let told = field.log().len();
    let down = || field.log().get(told..).unwrap_or_default().contains("tunnel down");
    // By what is sent to it and not answered; without traffic it would be twice as long.
    let missed = until(LIMIT, "the gateway misses charon", || {
        field.both_ways(&watch);
        down()
    });
    println!("the gateway misses charon {missed:?} after its death");
    assert!(!field.both_ways(&watch));
    charon.restart();
    let back = until(LIMIT * 3, "traffic is back", || field.both_ways(&watch));
    println!("traffic is back {back:?} after charon's start");
    watch.sealed();
}

#[test]
fn a_charon_that_has_forgotten_all_is_found_out_and_begun_with_anew() {
    let field = Field::new();
    let mut watch = Watch::begin(&field.lab);
    let mut charon = watchful(&field, &watch);
    charon.kill();
    charon.restart();
    let back = until(LIMIT * 4, "traffic is back", || field.both_ways(&watch));
    println!("traffic is back {back:?} after charon was gone for a moment");
    charon.up(BOX);
    watch.sealed();
}
