//! One thing at a time: what the standard asks of an endpoint, told as a story of two.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ike::auth::{Credential, Trust};
use ike::crypto::{Group, Secret};
use ike::proposal::{IkeOffer, Pfs};
use ike::wire::IpSelector;
use ike::{
    ChildConfig, ChildId, Config, Endpoint, Failure, Initiate, Limits, Path, PeerKind, Slot, Status, Timing,
};

use crate::harness::{FAIR, Host, PEER, Pair, address, child, peer_config};

const SECOND: Duration = Duration::from_secs(1);
const GAP: Duration = Duration::from_millis(10);

fn no_tune(_: usize, _: &mut ike::PeerConfig) {}

#[test]
fn a_lost_datagram_is_sent_again_and_costs_no_more_than_the_wait() {
    for nth in 0..4 {
        let mut pair = Pair::new(1);
        let mut count = 0;
        pair.filter = Some(Box::new(move |_, _| {
            count += 1;
            count == nth + 1
        }));
        // The first was already on its way.
        pair.run(2 * SECOND);
        pair.expect_settled(&[1]);
    }
}

#[test]
fn at_sixty_per_cent_loss_the_two_still_find_each_other() {
    for seed in 0..20 {
        let mut pair = Pair::new(seed);
        pair.weather.loss = 60;
        pair.run(120 * SECOND);
        pair.weather = FAIR;
        pair.run(60 * SECOND);
        pair.expect_settled(&[1]);
    }
}

#[test]
fn a_peer_that_does_not_answer_is_tried_again_for_ever_with_growing_waits() {
    let mut pair = Pair::new(2);
    pair.filter = Some(Box::new(|_, _| true));
    pair.run(600 * SECOND);
    let it = &pair.hosts[0];
    assert!(it.failures.len() > 10 && it.failures.iter().all(|why| *why == Failure::Silent));
    match it.endpoint.status(PEER) {
        Some(Status::Failed { why: Failure::Silent, retry_at }) => assert!(retry_at > pair.now),
        Some(Status::Connecting) => {}
        other => panic!("{other:?}"),
    }
    pair.filter = None;
    // Traffic for it cuts the wait short.
    pair.act(0, |it, now| it.poke(PEER, now));
    pair.run(2 * SECOND);
    pair.expect_settled(&[1]);
}

#[test]
fn a_dead_peer_is_noticed_and_found_again_when_it_is_back() {
    let mut pair = Pair::new(3);
    pair.up();
    pair.filter = Some(Box::new(|_, _| true));
    pair.run(60 * SECOND);
    assert!(pair.hosts.iter().all(|it| !it.up && it.inbound.is_empty()), "fail closed");
    pair.filter = None;
    pair.act(0, |it, now| it.poke(PEER, now));
    pair.run(2 * SECOND);
    pair.expect_settled(&[1]);
}

#[test]
fn a_host_that_lost_its_memory_is_back_at_once_whichever_it_is() {
    for host in [0, 1] {
        let mut pair = Pair::new(4);
        pair.up();
        pair.restart(host, &[1]);
        pair.run(Duration::from_millis(1500));
        assert!(pair.hosts.iter().all(|it| it.up && it.outbound.len() == 1), "{}", pair.story());
        pair.run(20 * SECOND);
        pair.expect_settled(&[1]);
    }
}

#[test]
fn both_hosts_restarted_at_once_find_each_other() {
    let mut pair = Pair::new(5);
    pair.up();
    pair.restart(0, &[1]);
    pair.restart(1, &[1]);
    pair.run(3 * SECOND);
    pair.expect_settled(&[1]);
}

#[test]
fn a_peer_that_asks_for_ever_more_children_gets_so_many_and_no_more() {
    let limits = Limits { children_per_wanted: 6, ..Limits::default() };
    let mut pair = Pair::with_limits(8, limits, |host, config| {
        let wanted = if host == 0 { 40 } else { 1 };
        config.children = (0..wanted).map(|worker| child(host, 1, Some(worker))).collect();
    });
    pair.run(10 * SECOND);
    for it in &pair.hosts {
        assert!(it.up, "refusing a child ends nothing; {}", pair.story());
        assert_eq!(it.inbound.len(), 6, "{}", pair.story());
    }
    let log = &pair.hosts[0].log;
    assert!(log.iter().any(|line| line.contains("NO_ADDITIONAL_SAS")), "the peer is told why: {log:?}");
    // What is there goes on, and a place that becomes free can be had again.
    let fewer = (0..4).map(|worker| child(0, 1, Some(worker))).collect();
    pair.act(0, |it, now| it.set_children(PEER, fewer, now));
    pair.run(5 * SECOND);
    assert!(pair.hosts.iter().all(|it| it.up && it.inbound.len() == 4), "{}", pair.story());
    pair.act(0, |it, now| it.rekey_children(PEER, now));
    pair.run(20 * SECOND);
    assert!(pair.hosts.iter().all(|it| it.up && it.inbound.len() == 4), "{}", pair.story());
}

#[test]
fn a_peer_with_many_more_workers_gets_a_child_for_each_and_may_renew_them_all_at_once() {
    let mut pair = Pair::with(11, Timing::default(), |host, config| {
        let workers = if host == 0 { 64 } else { 1 };
        config.children = (0..workers).map(|worker| child(host, 1, Some(worker))).collect();
    });
    pair.run(10 * SECOND);
    for renewal in 0..2 {
        assert!(pair.hosts.iter().all(|it| it.up && it.inbound.len() == 64), "{renewal} {}", pair.story());
        pair.act(0, |it, now| it.rekey_children(PEER, now));
        pair.act(1, |it, now| it.rekey_children(PEER, now));
        pair.run(60 * SECOND);
    }
    assert!(pair.hosts.iter().all(|it| it.up && it.inbound.len() == 64), "{}", pair.story());
    let refused = |it: &Host| it.log.iter().any(|line| line.contains("NO_ADDITIONAL_SAS"));
    assert!(!pair.hosts.iter().any(refused));
}

#[test]
fn a_network_that_the_other_host_hears_of_a_moment_later_is_no_failure() {
    for first in [0, 1] {
        let mut pair = Pair::new(9);
        pair.up();
        let both = |host| vec![child(host, 1, None), child(host, 2, None)];
        pair.act(first, |it, now| it.set_children(PEER, both(first), now));
        // Longer than the host that did not open the IKE SA waits for the other to begin.
        pair.run(2 * SECOND);
        pair.act(1 - first, |it, now| it.set_children(PEER, both(1 - first), now));
        pair.run(4 * SECOND);
        pair.expect_settled(&[1, 2]);
        for it in &pair.hosts {
            assert!(
                it.failures.is_empty() && !it.log.iter().any(|line| line.contains("fail")),
                "{:?}",
                it.log
            );
        }
    }
}

#[test]
fn each_network_and_worker_has_its_own_child() {
    let mut pair = Pair::with(6, Timing::default(), |host, config| {
        config.children = vec![child(host, 1, None), child(host, 2, None), child(host, 3, None)];
    });
    pair.run(5 * SECOND);
    pair.expect_settled(&[1, 2, 3]);
    let mut pair = Pair::with(7, Timing::default(), |host, config| {
        config.children = (0..4).map(|worker| child(host, 1, Some(worker))).collect();
    });
    pair.run(10 * SECOND);
    for it in &pair.hosts {
        let workers: Vec<_> = it.outbound.keys().map(|slot| (slot.child.0, slot.worker)).collect();
        assert_eq!(workers, (0..4).map(|it| (100 + it, Some(it as u32))).collect::<Vec<_>>());
        assert_eq!(it.inbound.len(), 4);
    }
}

#[test]
fn a_network_that_only_one_side_knows_yet_is_made_once_the_other_does() {
    let mut pair = Pair::new(8);
    pair.up();
    pair.act(0, |it, now| it.set_children(PEER, vec![child(0, 1, None), child(0, 2, None)], now));
    // It asks again for a while before that is a failure.
    pair.run(4 * SECOND);
    assert!(pair.hosts[0].failures.is_empty());
    pair.run(2 * SECOND);
    assert!(pair.hosts[0].failures.contains(&Failure::NoSelectors));
    pair.act(1, |it, now| it.set_children(PEER, vec![child(1, 1, None), child(1, 2, None)], now));
    pair.run(3 * SECOND);
    pair.expect_settled(&[1, 2]);
}

#[test]
fn under_load_a_cookie_is_asked_for_and_given() {
    let limits = Limits { cookie_threshold: 0, ..Limits::default() };
    let mut pair = Pair::with_limits(9, limits, no_tune);
    pair.run(SECOND);
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[0].datagrams, 3, "once more with the cookie");
}

#[test]
fn a_wrong_guess_of_the_group_costs_one_more_round_trip() {
    let mut pair = Pair::with(10, Timing::default(), |host, config| {
        let groups = [vec![Group::X25519, Group::P384, Group::P256], vec![Group::P256]][host].clone();
        config.ike = IkeOffer { groups: groups.clone(), ..IkeOffer::default() };
        for child in &mut config.children {
            child.esp.groups = groups.clone();
            child.esp.pfs = Pfs::Required;
        }
    });
    pair.run(SECOND);
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[0].datagrams, 3);
    for host in [0, 1] {
        pair.act(host, |it, now| it.rekey_children(PEER, now));
        pair.act(host, |it, now| it.rekey_ike(PEER, now));
        pair.run(20 * SECOND);
        pair.expect_settled(&[1]);
    }
    let suite = pair.hosts[0].outbound.values().next().unwrap().suite;
    assert_eq!(suite.group, Some(Group::P256));
}

#[test]
fn without_a_common_suite_the_reason_is_said_and_it_is_tried_again() {
    let mut pair = Pair::with(11, Timing::default(), |host, config| {
        config.ike.groups = vec![[Group::X25519, Group::P256][host]];
    });
    pair.run(5 * SECOND);
    assert!(pair.hosts[0].failures.contains(&Failure::NoProposal), "{}", pair.story());
    assert!(
        pair.hosts[1].failures.contains(&Failure::NoProposal),
        "the one asked says it too: {}",
        pair.story()
    );
    assert!(!pair.hosts[1].up);
}

#[test]
fn selectors_are_narrowed_to_what_both_sides_have() {
    let wide = |ip: &str, len| vec![IpSelector::prefix(ip.parse().unwrap(), len)];
    let mut pair = Pair::with(12, Timing::default(), |host, config| {
        let child = &mut config.children[0];
        if host == 0 {
            child.remote = wide("10.0.0.0", 8);
        } else {
            child.remote = wide("10.42.0.0", 16);
        }
    });
    pair.run(SECOND);
    for (host, it) in pair.hosts.iter().enumerate() {
        let sa = it.outbound.values().next().unwrap();
        assert_eq!(sa.remote, crate::harness::net(1 - host), "narrowed");
    }
    let mut pair = Pair::with(13, Timing::default(), |_, config| {
        config.children[0].remote = wide("172.16.0.0", 16);
    });
    pair.run(3 * SECOND);
    assert!(pair.hosts.iter().all(|it| it.up), "the IKE SA stands");
    assert!(pair.hosts[0].failures.contains(&Failure::NoSelectors));
}

#[test]
fn a_peer_with_another_key_is_refused_and_both_sides_say_so() {
    let mut pair = Pair::with(14, Timing::default(), |host, config| {
        if host == 0 {
            config.credential = Credential::Psk(Secret::new(b"wrong".to_vec()));
        }
    });
    pair.run(10 * SECOND);
    assert!(pair.hosts[0].failures.contains(&Failure::RefusedUs));
    assert!(matches!(pair.hosts[1].failures[0], Failure::RefusedPeer(_)));
    assert!(!pair.hosts[0].up && !pair.hosts[1].up);
    assert!(pair.hosts[1].endpoint.half_open() <= 16);
    // And the other way: the responder is not who it should be.
    let mut pair = Pair::with(15, Timing::default(), |host, config| {
        if host == 0 {
            config.trust = Trust::Psk(Secret::new(b"secret".to_vec()));
        }
    });
    pair.run(SECOND);
    // Half a second, then a second, either shortened by chance to no less than its half.
    assert!((2..=3).contains(&pair.hosts[0].failures.len()), "it waits between attempts: {}", pair.story());
    pair.run(4 * SECOND);
    assert!(matches!(pair.hosts[0].failures[0], Failure::RefusedPeer(_)), "{}", pair.story());
    assert!(!pair.hosts[0].up && !pair.hosts[1].up, "told by a DELETE");
    assert!(pair.hosts[1].failures.contains(&Failure::RefusedUs), "and why: {}", pair.story());
}

#[test]
fn a_host_that_is_asked_before_it_has_heard_of_the_asker_answers_when_it_has() {
    let stranger = |timing: Timing| {
        let mut pair = Pair::with(20, timing, no_tune);
        pair.act(1, |it, now| it.remove_peer(PEER, now));
        pair
    };
    let known = peer_config(1, [address(0), address(1)], &[1]);
    // Also when the question comes in pieces, and again while it waits.
    for timing in [Timing::default(), Timing { fragment: 200, ..Timing::default() }] {
        let mut pair = stranger(timing);
        pair.run(Duration::from_millis(700));
        assert_eq!(pair.hosts[0].endpoint.status(PEER), Some(Status::Connecting), "{}", pair.story());
        pair.act(1, |it, now| it.add_peer(PEER, known.clone(), now));
        pair.run(Duration::from_millis(20));
        pair.expect_settled(&[1]);
        assert!(pair.hosts.iter().all(|it| it.failures.is_empty()), "{}", pair.story());
    }
    // Whom it does not hear of in a while it refuses, and both know why.
    let mut pair = stranger(Timing::default());
    pair.run(Timing::default().patience.mul_f64(0.9));
    assert!(pair.hosts.iter().all(|it| it.failures.is_empty()), "{}", pair.story());
    pair.run(Duration::from_millis(200));
    assert_eq!(pair.hosts[0].failures, [Failure::RefusedUs], "{}", pair.story());
    assert!(matches!(&pair.hosts[1].failures[..], [Failure::RefusedPeer(why)] if why.contains("not a peer")));
    pair.act(1, |it, now| it.add_peer(PEER, known, now));
    pair.run(3 * SECOND);
    pair.expect_settled(&[1]);
}

#[test]
fn a_removed_peer_is_told_and_cannot_come_back() {
    let mut pair = Pair::new(16);
    pair.up();
    pair.act(0, |it, now| it.remove_peer(PEER, now));
    pair.run(20 * SECOND);
    assert!(!pair.hosts[0].up && !pair.hosts[1].up);
    assert!(pair.hosts.iter().all(|it| it.inbound.is_empty()));
    assert_eq!(pair.hosts[0].endpoint.status(PEER), None);
    assert!(pair.hosts[1].failures.contains(&Failure::RefusedUs), "{}", pair.story());
}

#[test]
fn pre_shared_keys_work_and_differ_when_they_differ() {
    let psk = |text: &str| Secret::new(text.as_bytes().to_vec());
    for (mine, works) in [("same", true), ("other", false)] {
        let mut pair = Pair::with(17, Timing::default(), |host, config| {
            let own = psk(if host == 0 { mine } else { "same" });
            config.trust = Trust::Psk(own.clone());
            config.credential = Credential::Psk(own);
        });
        pair.run(3 * SECOND);
        assert_eq!(pair.settled(&[1]).is_ok(), works);
    }
}

#[test]
fn long_messages_travel_in_fragments_when_both_sides_can() {
    let timing = Timing { fragment: 200, ..Timing::default() };
    let mut pair = Pair::with(18, timing, no_tune);
    pair.weather = crate::harness::Weather { loss: 20, repeat: 20, delay: (1, 30) };
    pair.run(20 * SECOND);
    pair.weather = FAIR;
    pair.run(20 * SECOND);
    pair.expect_settled(&[1]);
    pair.hosts[0].largest = 0;
    pair.act(0, |it, now| it.rekey_children(PEER, now));
    pair.act(0, |it, now| it.rekey_ike(PEER, now));
    pair.run(20 * SECOND);
    pair.expect_settled(&[1]);
    assert!(pair.hosts[0].largest <= 200 + 4, "{} with the marker", pair.hosts[0].largest);
}

fn behind_nat(seed: u64, kind: PeerKind) -> Pair {
    let mut pair = Pair::with(seed, Timing::default(), |host, config| {
        config.kind = kind;
        if host == 1 {
            config.initiate = Initiate::Never;
            config.paths.clear();
        }
    });
    pair.hosts[0].public = Some("198.51.100.9:1024".parse().unwrap());
    // What went out before the NAT was there is forgotten.
    pair.restart(0, &[1]);
    pair.run(5 * SECOND);
    pair.expect_settled(&[1]);
    pair
}

#[test]
fn a_host_behind_a_nat_notices_and_keeps_the_mapping_alive() {
    let mut pair = behind_nat(19, PeerKind::Native);
    let (here, there) = (pair.hosts[0].endpoint.sas(PEER), pair.hosts[1].endpoint.sas(PEER));
    assert_eq!(here[0].nat, (true, false));
    assert_eq!(there[0].nat, (false, true));
    // Liveness does it between native peers; keepalives fill what gaps there are.
    pair.run(300 * SECOND);
    assert!(pair.hosts[0].datagrams > 14);
    pair.expect_settled(&[1]);
}

#[test]
fn when_a_nat_changes_its_mapping_the_peer_follows_the_next_authenticated_packet() {
    let mut pair = behind_nat(20, PeerKind::Native);
    let new: SocketAddr = "198.51.100.9:2048".parse().unwrap();
    pair.hosts[0].public = Some(new);
    pair.run(60 * SECOND);
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[1].endpoint.sas(PEER)[0].path.remote, new);
    assert_eq!(
        (pair.hosts[1].moves, pair.hosts[1].downs, pair.hosts[0].downs),
        (1, 0, 0),
        "{}",
        pair.story()
    );
}

#[test]
fn a_foreign_peer_is_told_when_a_nat_changes_its_mapping() {
    let mut pair = behind_nat(23, PeerKind::Foreign);
    let new: SocketAddr = "198.51.100.9:2048".parse().unwrap();
    pair.hosts[0].public = Some(new);
    let before = pair.hosts[0].datagrams;
    pair.run(11 * SECOND);
    assert_eq!(pair.hosts[1].endpoint.sas(PEER)[0].path.remote, new);
    assert_eq!(pair.hosts[0].datagrams - before, 2, "whether it lives, and the move: {}", pair.story());
    pair.run(40 * SECOND);
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[1].downs + pair.hosts[0].downs, 0);
}

#[test]
fn a_host_that_moves_tells_its_peer_at_once() {
    let mut pair = Pair::new(21);
    pair.up();
    let new: SocketAddr = "203.0.113.7:4500".parse().unwrap();
    pair.hosts[0].address = new;
    pair.act(0, |it, now| it.set_local(PEER, new, now));
    pair.run(SECOND);
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[1].endpoint.sas(PEER)[0].path.remote, new);
    assert_eq!(pair.hosts[0].downs + pair.hosts[1].downs, 0);
}

#[test]
fn a_peer_that_forgot_everything_is_found_out_as_soon_as_its_silence_is_doubted() {
    let mut pair = Pair::new(31);
    pair.up();
    pair.restart(1, &[1]);
    pair.act(0, |it, now| it.doubt(PEER, now));
    // Neither liveness nor the other side's patience is over by then.
    pair.run(SECOND / 2);
    assert!(pair.hosts[1].up, "{}", pair.story());
    pair.run(60 * SECOND);
    pair.expect_settled(&[1]);
    pair.act(0, |it, now| it.doubt(PEER, now));
    pair.run(SECOND);
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[1].downs, 0, "doubt alone does no harm");
}

#[test]
fn what_begins_at_port_500_goes_on_at_the_port_that_esp_shares() {
    let at =
        |host: usize, port: u16| -> SocketAddr { format!("192.0.2.{}:{port}", host + 1).parse().unwrap() };
    let now = std::time::Instant::now();
    let mut ends: Vec<Endpoint> = (0..2)
        .map(|host| {
            let mut config = peer_config(host, [at(0, 500), at(1, 500)], &[1]);
            config.kind = PeerKind::Foreign;
            if host == 1 {
                config.initiate = Initiate::Never;
            }
            let ours = Config { port: if host == 0 { 4501 } else { 4500 }, ..Config::default() };
            let mut endpoint = Endpoint::new(ours, &[host as u8; 32], now, 0);
            endpoint.add_peer(PEER, config, now);
            endpoint
        })
        .collect();
    let mut paths = Vec::new();
    loop {
        let mut quiet = true;
        for host in 0..2 {
            while let Some(transmit) = ends[host].poll_transmit() {
                quiet = false;
                let Path { local, remote } = transmit.path;
                paths.push((local, remote));
                let there = Path { local: remote, remote: local };
                ends[1 - host].handle_datagram(&transmit.bytes, there, now);
            }
        }
        if quiet {
            break;
        }
    }
    assert_eq!(paths[..2], [(at(0, 500), at(1, 500)), (at(1, 500), at(0, 500))]);
    assert_eq!(paths[2..], [(at(0, 4501), at(1, 4500)), (at(1, 4500), at(0, 4501))]);
    for (host, end) in ends.iter().enumerate() {
        assert_eq!(end.sas(PEER)[0].children.len(), 1, "host {host}");
    }
}

#[test]
fn a_foreign_peer_moves_by_mobike_alone() {
    let mut pair = Pair::with(22, Timing::default(), |_, config| config.kind = PeerKind::Foreign);
    pair.up();
    let new: SocketAddr = "203.0.113.7:4500".parse().unwrap();
    pair.hosts[0].address = new;
    pair.act(0, |it, now| it.set_local(PEER, new, now));
    pair.run(SECOND);
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[1].endpoint.sas(PEER)[0].path.remote, new);
}

#[test]
fn a_packet_from_elsewhere_moves_nobody_unless_it_is_fresh_and_authenticated() {
    let mut pair = Pair::new(23);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let tap = seen.clone();
    pair.filter = Some(Box::new(move |host, bytes| {
        if host == 0 {
            tap.lock().unwrap().push(bytes.to_vec());
        }
        false
    }));
    pair.up();
    pair.act(0, |it, now| it.rekey_children(PEER, now));
    pair.run(SECOND);
    let from: SocketAddr = "203.0.113.66:666".parse().unwrap();
    let packets = seen.lock().unwrap().clone();
    assert!(packets.len() >= 3);
    let before = pair.hosts[1].endpoint.sas(PEER);
    for mut packet in packets {
        for flip in [false, true] {
            if flip {
                let last = packet.len() - 1;
                packet[last] ^= 1;
            }
            let path = ike::Path { local: address(1), remote: from };
            pair.hosts[1].endpoint.handle_datagram(&packet, path, pair.now);
        }
    }
    pair.drain();
    pair.run(SECOND);
    assert_eq!(pair.hosts[1].endpoint.sas(PEER), before);
    assert_eq!(pair.hosts[1].moves, 0);
}

#[test]
fn children_and_ike_sas_are_renewed_by_age_without_losing_a_packet() {
    let timing = Timing {
        child_rekey: 20 * SECOND,
        ike_rekey: 45 * SECOND,
        reauth: Some(70 * SECOND),
        ..Timing::default()
    };
    let mut pair = Pair::with(24, timing, no_tune);
    pair.up();
    let (ike, children) = (pair.ike_spis(), pair.spis(0));
    pair.run_with_traffic(200 * SECOND, GAP);
    assert_ne!(pair.ike_spis(), ike);
    assert!(pair.spis(0).is_disjoint(&children));
    for it in &pair.hosts {
        assert_eq!((it.lost, it.downs), (0, 0), "{}", pair.story());
        assert!(it.made > 8);
    }
    for host in [0, 1] {
        pair.act(host, |it, _| it.set_timing(Timing::default()));
        pair.act(host, |it, now| it.rekey_children(PEER, now));
        pair.act(host, |it, now| it.rekey_ike(PEER, now));
    }
}

#[test]
fn a_child_is_renewed_after_so_many_packets_or_bytes() {
    for timing in [
        Timing { child_packets: 500, ..Timing::default() },
        Timing { child_bytes: 500_000, ..Timing::default() },
    ] {
        let mut pair = Pair::with(25, timing, no_tune);
        pair.up();
        pair.run_with_traffic(30 * SECOND, GAP);
        for it in &pair.hosts {
            assert_eq!(it.lost, 0, "{}", pair.story());
            assert!((6..=20).contains(&it.made), "{}", it.made);
        }
    }
}

#[test]
fn authentication_anew_makes_the_new_sa_before_it_breaks_the_old_one() {
    for host in [0, 1] {
        let mut pair = Pair::with(26, Timing::default(), |host, config| {
            config.children = vec![child(host, 1, None), child(host, 2, None)];
        });
        pair.run(5 * SECOND);
        let ike = pair.ike_spis();
        pair.act(host, |it, now| it.reauthenticate(PEER, now));
        pair.run_with_traffic(10 * SECOND, GAP);
        pair.run(20 * SECOND);
        pair.expect_settled(&[1, 2]);
        assert_ne!(pair.ike_spis(), ike);
        for it in &pair.hosts {
            assert_eq!((it.lost, it.downs), (0, 0), "{}", pair.story());
        }
    }
}

#[test]
fn after_a_jump_of_the_clock_all_that_is_overdue_is_done_once() {
    let mut pair = Pair::new(27);
    pair.up();
    for jump in [100, 3600, 86_400] {
        pair.jump(jump * SECOND);
        pair.run(120 * SECOND);
        pair.expect_settled(&[1]);
    }
}

#[test]
fn strangers_cannot_make_an_endpoint_hold_more_than_its_limits() {
    let mut pair = Pair::new(28);
    pair.up();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let tap = seen.clone();
    let mut other = Pair::new(29);
    other.filter = Some(Box::new(move |host, bytes| {
        if host == 0 {
            tap.lock().unwrap().push(bytes.to_vec());
        }
        true
    }));
    other.restart(0, &[1]);
    let first = seen.lock().unwrap()[0].clone();
    for source in 0..3000u32 {
        let mut packet = first.clone();
        // Another SPI each time.
        packet[8..12].copy_from_slice(&(source + 1).to_be_bytes());
        let remote = SocketAddr::new(std::net::Ipv4Addr::from_bits(0x0a00_0000 + source / 20).into(), 4500);
        pair.hosts[1].endpoint.handle_datagram(&packet, ike::Path { local: address(1), remote }, pair.now);
    }
    let held = pair.hosts[1].endpoint.half_open();
    assert!((16..=64).contains(&held), "{held} half-open without a cookie");
    while pair.hosts[1].endpoint.poll_transmit().is_some() {}
    pair.run(30 * SECOND);
    assert_eq!(pair.hosts[1].endpoint.half_open(), 0, "and in the end none");
    pair.expect_settled(&[1]);
}

#[test]
fn noise_is_dropped() {
    let mut pair = Pair::new(30);
    pair.up();
    let mut dice = crate::harness::Dice(30);
    let before = pair.hosts[0].endpoint.sas(PEER);
    for _ in 0..2000 {
        let mut noise: Vec<u8> = (0..dice.below(200)).map(|_| dice.next() as u8).collect();
        if let Some(marker) = noise.get_mut(..4) {
            marker.fill(0);
        }
        if dice.percent(50) && noise.len() > 40 {
            noise[4..12].copy_from_slice(&before[0].spis.initiator.to_bytes());
            noise[12..20].copy_from_slice(&before[0].spis.responder.to_bytes());
            noise[20..24].copy_from_slice(&[46, 0x20, 37, 0x20]);
            let len = noise.len() as u32 - 4;
            noise[28..32].copy_from_slice(&len.to_be_bytes());
        }
        let path = ike::Path { local: address(0), remote: address(1) };
        pair.hosts[0].endpoint.handle_datagram(&noise, path, pair.now);
    }
    pair.drain();
    pair.run(SECOND);
    pair.expect_settled(&[1]);
    assert_eq!(pair.hosts[0].endpoint.sas(PEER), before);
}

#[test]
fn a_child_nobody_configured_is_refused_and_one_without_label_does_not_serve_a_labelled_network() {
    let mut pair = Pair::with(31, Timing::default(), |host, config| {
        if host == 0 {
            config.children = vec![ChildConfig { id: ChildId(200), ..child(0, 2, None) }];
        }
    });
    pair.run(3 * SECOND);
    assert!(pair.hosts.iter().all(|it| it.up && it.inbound.is_empty()), "{}", pair.story());
    let slot = Slot { child: ChildId(200), worker: None };
    assert!(!pair.hosts[0].outbound.contains_key(&slot));
}

#[test]
fn waiting_traffic_makes_even_the_second_begin_at_once() {
    let mut pair = Pair::with(32, Timing::default(), |host, config| {
        config.initiate = if host == 0 { Initiate::Never } else { Initiate::Second };
    });
    pair.act(1, |it, now| it.poke(PEER, now));
    pair.run(Duration::from_millis(100));
    pair.expect_settled(&[1]);
}

#[test]
fn a_forged_word_that_the_sa_is_forgotten_costs_a_new_one_and_no_packet() {
    let mut pair = Pair::new(33);
    pair.up();
    let ike = pair.ike_spis();
    // The peer's answer to a question of ours does not come, but someone answers INVALID_IKE_SPI.
    let ask = Arc::new(std::sync::Mutex::new(None));
    let tap = ask.clone();
    pair.filter = Some(Box::new(move |host, bytes| {
        let mut held = tap.lock().unwrap();
        let first = host == 0 && held.is_none();
        if first {
            *held = Some(bytes.to_vec());
        }
        first
    }));
    pair.act(0, |it, now| it.rekey_children(PEER, now));
    let asked = ask.lock().unwrap().clone().unwrap();
    let mut forged = asked[..32].to_vec();
    forged[20] = 41;
    forged[23] = 0x20;
    forged.extend_from_slice(&[0, 0, 0, 8, 0, 0, 0, 4]);
    forged[28..32].copy_from_slice(&36u32.to_be_bytes());
    let path = ike::Path { local: address(0), remote: address(1) };
    pair.hosts[0].endpoint.handle_datagram(&forged, path, pair.now);
    pair.drain();
    pair.run_with_traffic(10 * SECOND, GAP);
    pair.run(60 * SECOND);
    pair.expect_settled(&[1]);
    assert_ne!(pair.ike_spis(), ike, "the hint was taken");
    for it in &pair.hosts {
        assert_eq!((it.lost, it.downs), (0, 0), "{}", pair.story());
    }
}
