//! Both sides begin at once: every pair of exchanges that RFC 7296 §2.8 and §2.25 speak of, with packets every ten
//! milliseconds each way, of which none may be lost to it.

use std::time::Duration;

use ike::Endpoint;

use crate::harness::{FAIR, PEER, Pair, Weather, child};

const SECOND: Duration = Duration::from_secs(1);
const GAP: Duration = Duration::from_millis(10);

fn pair(seed: u64) -> Pair {
    let mut pair = Pair::new(seed);
    pair.up();
    pair.run_with_traffic(SECOND, GAP);
    pair
}

/// Packets flow for a while, none is lost, and all is as it should be.
fn expect_no_loss(pair: &mut Pair) {
    pair.run_with_traffic(10 * SECOND, GAP);
    pair.run(60 * SECOND);
    pair.expect_settled(&[1]);
    for host in &pair.hosts {
        assert_eq!(host.lost, 0, "{}", pair.story());
        assert_eq!(host.downs, 0);
        assert!(host.received > 1000);
    }
}

fn rekey_child(it: &mut Endpoint, now: std::time::Instant) {
    it.rekey_children(PEER, now);
}

fn rekey_ike(it: &mut Endpoint, now: std::time::Instant) {
    it.rekey_ike(PEER, now);
}

/// Loses the next datagrams of a host.
fn lose(pair: &mut Pair, of: usize, mut count: usize) {
    pair.filter = Some(Box::new(move |host, _| {
        let lost = host == of && count > 0;
        count -= usize::from(lost);
        lost
    }));
}

#[test]
fn a_child_rekeyed_by_either_side_is_replaced_without_losing_a_packet() {
    for host in [0, 1] {
        let mut pair = pair(10 + host as u64);
        let old = [pair.spis(0), pair.spis(1)];
        pair.act(host, rekey_child);
        expect_no_loss(&mut pair);
        for side in [0, 1] {
            assert!(pair.spis(side).is_disjoint(&old[side]), "a new child took its place");
            assert_eq!(pair.hosts[side].made, 2);
        }
    }
}

#[test]
fn a_child_that_both_replace_again_and_again_loses_no_packet_that_is_late() {
    for seed in 400..412 {
        let mut pair = pair(seed);
        pair.weather = Weather { delay: (1, 60), ..FAIR };
        for round in 0..200 {
            pair.act(round % 2, rekey_child);
            pair.run_with_traffic(GAP, GAP / 2);
        }
        expect_no_loss(&mut pair);
        assert!(pair.hosts[0].made > 10, "rekeyed many times: {}", pair.hosts[0].made);
    }
}

#[test]
fn an_ike_sa_rekeyed_by_either_side_passes_its_children_on_as_they_are() {
    for host in [0, 1] {
        let mut pair = pair(20 + host as u64);
        let (old, children) = (pair.ike_spis(), pair.spis(0));
        pair.act(host, rekey_ike);
        expect_no_loss(&mut pair);
        assert_ne!(pair.ike_spis(), old);
        assert_eq!(pair.spis(0), children);
    }
}

#[test]
fn when_both_rekey_a_child_one_of_the_two_new_ones_stays() {
    for seed in 30..50 {
        let mut pair = pair(seed);
        pair.act(0, rekey_child);
        pair.act(1, rekey_child);
        expect_no_loss(&mut pair);
        assert!(pair.hosts.iter().map(|it| it.made).sum::<usize>() > 4, "both made one");
    }
}

#[test]
fn when_both_rekey_a_child_and_one_request_is_late_the_other_rekey_stands() {
    for host in [0, 1] {
        let mut pair = pair(50 + host as u64);
        lose(&mut pair, host, 1);
        pair.act(host, rekey_child);
        pair.act(1 - host, rekey_child);
        expect_no_loss(&mut pair);
        assert_eq!(pair.hosts[0].made + pair.hosts[1].made, 4, "the late one was refused");
    }
}

#[test]
fn when_both_rekey_a_child_and_an_answer_is_late_the_nonces_decide_all_the_same() {
    for seed in 60..80 {
        let mut pair = pair(seed);
        pair.act(0, rekey_child);
        pair.act(1, rekey_child);
        // The requests are under way; the first answer of one side is lost.
        lose(&mut pair, (seed % 2) as usize, 1);
        expect_no_loss(&mut pair);
    }
}

#[test]
fn when_both_rekey_the_ike_sa_one_of_the_two_new_ones_stays() {
    for seed in 80..100 {
        let mut pair = pair(seed);
        let children = pair.spis(0);
        pair.act(0, rekey_ike);
        pair.act(1, rekey_ike);
        expect_no_loss(&mut pair);
        assert_eq!(pair.spis(0), children);
    }
}

#[test]
fn when_both_rekey_the_ike_sa_and_one_request_is_late_the_other_rekey_stands() {
    for host in [0, 1] {
        let mut pair = pair(100 + host as u64);
        lose(&mut pair, host, 1);
        pair.act(host, rekey_ike);
        pair.act(1 - host, rekey_ike);
        expect_no_loss(&mut pair);
    }
}

#[test]
fn when_both_rekey_the_ike_sa_and_an_answer_is_late_the_nonces_decide_all_the_same() {
    for seed in 110..130 {
        let mut pair = pair(seed);
        pair.act(0, rekey_ike);
        pair.act(1, rekey_ike);
        lose(&mut pair, (seed % 2) as usize, 1);
        // What the winner asks on its new SA meanwhile is answered by the loser as by one who knows.
        pair.run(Duration::from_millis(30));
        pair.act(0, rekey_child);
        pair.act(1, rekey_child);
        expect_no_loss(&mut pair);
    }
}

#[test]
fn a_child_rekey_that_meets_an_ike_rekey_waits_and_both_succeed() {
    for host in [0, 1] {
        let mut pair = pair(130 + host as u64);
        let (ike, children) = (pair.ike_spis(), pair.spis(0));
        pair.act(host, rekey_child);
        pair.act(1 - host, rekey_ike);
        expect_no_loss(&mut pair);
        assert_ne!(pair.ike_spis(), ike);
        assert!(pair.spis(0).is_disjoint(&children));
    }
}

#[test]
fn a_child_deleted_by_one_side_while_the_other_rekeys_it_is_gone_or_made_anew_as_both_want() {
    for host in [0, 1] {
        let mut pair = pair(140 + host as u64);
        let both = |side: usize| vec![child(side, 1, None), child(side, 2, None)];
        for side in [0, 1] {
            pair.act(side, |it, now| it.set_children(PEER, both(side), now));
        }
        pair.run(5 * SECOND);
        pair.expect_settled(&[1, 2]);
        let keep = |side: usize| vec![child(side, 1, None)];
        pair.act(host, |it, now| it.set_children(PEER, keep(host), now));
        pair.act(1 - host, rekey_child);
        pair.run(Duration::from_millis(20));
        pair.act(1 - host, |it, now| it.set_children(PEER, keep(1 - host), now));
        expect_no_loss(&mut pair);
    }
}

#[test]
fn a_child_deleted_by_both_sides_at_once_is_gone() {
    let mut pair = pair(150);
    for side in [0, 1] {
        let both = vec![child(side, 1, None), child(side, 2, None)];
        pair.act(side, |it, now| it.set_children(PEER, both, now));
    }
    pair.run(5 * SECOND);
    pair.expect_settled(&[1, 2]);
    for side in [0, 1] {
        pair.act(side, |it, now| it.set_children(PEER, vec![child(side, 1, None)], now));
    }
    pair.run(10 * SECOND);
    pair.expect_settled(&[1]);
}

#[test]
fn an_ike_sa_closed_by_both_sides_or_while_the_other_rekeys_it_comes_back() {
    for (seed, what) in
        [(160, None), (161, Some(rekey_ike as fn(&mut _, _))), (162, Some(rekey_child as fn(&mut _, _)))]
    {
        for host in [0, 1] {
            let mut pair = pair(seed);
            pair.act(host, |it, now| it.reset(PEER, now));
            match what {
                None => pair.act(1 - host, |it, now| it.reset(PEER, now)),
                Some(what) => pair.act(1 - host, what),
            }
            pair.run(5 * SECOND);
            pair.expect_settled(&[1]);
            assert!(pair.hosts.iter().all(|it| it.downs == 1), "{}", pair.story());
        }
    }
}

#[test]
fn two_hosts_that_begin_at_once_end_with_one_sa() {
    for seed in 170..200 {
        let mut pair =
            Pair::with(seed, ike::Timing::default(), |_, config| config.initiate = ike::Initiate::First);
        pair.weather.delay = (1, 60);
        pair.run(10 * SECOND);
        pair.expect_settled(&[1]);
        assert!(pair.hosts.iter().all(|it| it.downs == 0), "{}", pair.story());
    }
}

#[test]
fn rekeys_every_second_by_both_sides_lose_no_packet() {
    let mut pair = pair(200);
    pair.weather.delay = (1, 12);
    for round in 0..60u64 {
        for host in [0, 1] {
            if round % 3 != host {
                pair.act(host as usize, rekey_child);
            }
            if round % 7 == host {
                pair.act(host as usize, rekey_ike);
            }
        }
        pair.run_with_traffic(SECOND, GAP);
    }
    pair.weather = crate::harness::FAIR;
    expect_no_loss(&mut pair);
    assert!(pair.hosts[0].made > 60);
}
