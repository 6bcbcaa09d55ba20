//! Random schedules: whatever the network and the two sides do to each other, once it calms down there is one IKE SA
//! with the right children. `IKE_SEED=n` runs one schedule again, `IKE_SCHEDULES=n` another number of them.

use std::time::{Duration, Instant};

use ike::Timing;

use crate::harness::{Dice, FAIR, PEER, Pair, Weather, child};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn schedule(seed: u64) {
    let mut dice = Dice(seed);
    let timing = Timing {
        // Now and then so short that they meet by themselves.
        child_rekey: Duration::from_secs([3600, 20, 7][dice.below(3) as usize]),
        ike_rekey: Duration::from_secs([14400, 40, 11][dice.below(3) as usize]),
        fragment: [1200, 300][dice.below(2) as usize],
        ..Timing::default()
    };
    let calm = Timing::default();
    let both = dice.percent(30);
    let mut pair = Pair::with(seed, timing, |_, config| {
        if both {
            config.initiate = ike::Initiate::First;
        }
    });
    let mut children: Vec<u64> = vec![1];
    let nat = dice.percent(30);
    if nat {
        pair.hosts[0].public = Some("198.51.100.1:1024".parse().unwrap());
        pair.act(1, |it, now| it.set_paths(PEER, vec![], ike::Initiate::Never, now));
    }
    pair.weather = Weather { loss: dice.below(61), repeat: dice.below(30), delay: (1, 1 + dice.below(400)) };
    for _ in 0..dice.below(14) {
        pair.run_with_traffic(Duration::from_millis(dice.below(6000)), Duration::from_millis(500));
        let host = dice.below(2) as usize;
        let act = dice.below(16);
        if number("IKE_SEED").is_some() {
            eprintln!("{:?}: {act} by {host}", pair.now - pair.begun);
        }
        match act {
            0..=2 => pair.act(host, |it, now| it.rekey_children(PEER, now)),
            3..=4 => pair.act(host, |it, now| it.rekey_ike(PEER, now)),
            5 => {
                pair.act(0, |it, now| it.rekey_ike(PEER, now));
                pair.act(1, |it, now| it.rekey_ike(PEER, now));
            }
            6 => {
                pair.act(0, |it, now| it.rekey_children(PEER, now));
                pair.act(1, |it, now| it.rekey_children(PEER, now));
            }
            7 => {
                pair.act(host, |it, now| it.rekey_children(PEER, now));
                pair.act(1 - host, |it, now| it.rekey_ike(PEER, now));
            }
            8 => pair.act(host, |it, now| it.reauthenticate(PEER, now)),
            9 => pair.act(host, |it, now| it.reset(PEER, now)),
            10 if !nat => pair.restart(host, &children),
            11 if nat => {
                let port = 1024 + dice.below(60000) as u16;
                pair.hosts[0].public.as_mut().unwrap().set_port(port);
            }
            12 => pair.jump(Duration::from_secs(dice.below(120))),
            13 => {
                children.clone_from(&[vec![1], vec![1, 2], vec![2], vec![1, 2, 3]][dice.below(4) as usize]);
                for host in [host, 1 - host] {
                    let wanted = children.iter().map(|id| child(host, *id, None)).collect();
                    pair.act(host, |it, now| it.set_children(PEER, wanted, now));
                    pair.run(Duration::from_millis(dice.below(500)));
                }
            }
            14 => pair.act(host, |it, now| it.poke(PEER, now)),
            // The weather changes.
            _ => pair.weather.loss = dice.below(61),
        }
    }
    // Calm: the network is fair, and nothing is due for a while.
    pair.weather = FAIR;
    for host in 0..2 {
        pair.act(host, |it, _| it.set_timing(calm.clone()));
    }
    for host in 0..2 {
        pair.act(host, |it, now| it.rekey_children(PEER, now));
        pair.act(host, |it, now| it.rekey_ike(PEER, now));
    }
    pair.run(Duration::from_secs(150));
    pair.expect_settled(&children);
}

#[test]
fn whatever_happens_there_is_one_ike_sa_with_the_right_children_in_the_end() {
    if let Some(seed) = number("IKE_SEED") {
        return schedule(seed);
    }
    let begun = Instant::now();
    let first = number("IKE_FIRST_SEED").unwrap_or(0x0d07_e3a1);
    let count = number("IKE_SCHEDULES").unwrap_or(2000);
    println!("{count} schedules from seed {first}");
    for seed in first..first + count {
        if let Err(panic) = std::panic::catch_unwind(|| schedule(seed)) {
            eprintln!("IKE_SEED={seed} runs this schedule again");
            std::panic::resume_unwind(panic);
        }
    }
    println!("took {:?}", begun.elapsed());
}
