//! Keys that change each second and after so many bytes, under load: not a packet is lost to it.
//!
//! A machine loses packets too, where a buffer is full while who should empty it does not run. So each rate is tried without
//! rekeys first, and halved until nothing is lost; and whatever is lost has to be found in a counter of the kernel's, or it
//! is a failure of ours.
//!
//! By itself it is over in seconds. `make soak` runs it for a minute, with a program that is made to be fast, at
//! `SOAK_MBITS`.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::load::{Load, Outcome, Rate};
use crate::red::{Red, ask};
use crate::support::{LIMIT, number, router_words, until};

/// How a run is made.
struct Form {
    /// How long keys change, and how long the control is.
    length: Duration,
    control: Duration,
    rate: Rate,
    /// Bytes after which keys change, if a second is not over.
    bytes: &'static str,
}

const MBIT: u64 = 1_000_000;
/// So often the rate is halved at most.
const TRIES: u32 = 6;

fn form() -> Form {
    match number("SOAK_REKEY_SECONDS") {
        Some(seconds) => {
            let mbits = number("SOAK_MBITS").unwrap_or(500);
            let length = Duration::from_secs(seconds);
            let rate = Rate { tcp: mbits * MBIT, udp: mbits * MBIT / 10 };
            Form { length, control: length, rate, bytes: "50000000" }
        }
        None => Form {
            length: Duration::from_secs(10),
            control: Duration::from_secs(4),
            rate: Rate { tcp: 80 * MBIT, udp: 16 * MBIT },
            bytes: "5000000",
        },
    }
}

#[test]
fn keys_that_change_each_second_and_after_so_many_bytes_lose_nothing_under_load() {
    let form = form();
    let control = Red::new(2).met();
    let rekeyed = Red::with_agents(2, &["--rekey-every", "1", "--rekey-bytes", form.bytes]).met();
    let mut rate = form.rate;
    for _ in 0..TRIES {
        println!("{} Mbit/s of TCP and {} of UDP", rate.tcp / MBIT, rate.udp / MBIT);
        let run = Run::of(&control, rate, form.control);
        run.tell("without rekeys");
        run.blames_no_key();
        assert_eq!(run.rekeys, [0, 0]);
        if run.is_whole() {
            let run = Run::of(&rekeyed, rate, form.length);
            run.tell("with rekeys");
            run.blames_no_key();
            let least = form.length.as_secs() / 2;
            assert!(run.rekeys.iter().all(|rekeys| *rekeys >= least), "{least} at least");
            if run.is_whole() {
                return;
            }
        }
        rate = rate.halved();
    }
    panic!("there is no rate at which this machine loses nothing");
}

/// What was counted at both ends while a load flowed.
struct Run {
    outcome: Outcome,
    rekeys: [u64; 2],
    /// Packets that the one sent and the other did not receive, from h1 to h2 and back.
    missing: [u64; 2],
    /// Those that the packet paths say they dropped, by host and reason.
    drops: BTreeMap<String, u64>,
    /// Those that the kernel says it dropped, by place, and TCP's repetitions.
    kernel: BTreeMap<String, u64>,
}

impl Run {
    fn of(red: &Red, rate: Rate, length: Duration) -> Self {
        let before = Counts::settled(red);
        let outcome = Load::start(red, rate, length).end();
        let after = Counts::settled(red);
        let grown = |after: &BTreeMap<String, u64>, before: &BTreeMap<String, u64>| {
            let one = |(name, count): (&String, &u64)| {
                (name.clone(), count - before.get(name).copied().unwrap_or_default())
            };
            after.iter().map(one).filter(|(_, count)| *count > 0).collect()
        };
        Self {
            outcome,
            rekeys: [0, 1].map(|host| after.rekeys[host] - before.rekeys[host]),
            missing: [0, 1].map(|way| after.missing[way] - before.missing[way]),
            drops: grown(&after.drops, &before.drops),
            kernel: grown(&after.kernel, &before.kernel),
        }
    }

    fn tell(&self, what: &str) {
        let Outcome { sent, doubled, tcp, .. } = self.outcome;
        println!(
            "{what}: {} of {sent} UDP packets lost, {doubled} doubled, {} of {} TCP bytes came, {:?} rekeys, {:?} packets \
             missing between the ends, dropped: {:?}, by the kernel: {:?}",
            self.outcome.lost(),
            tcp.1,
            tcp.0,
            self.rekeys,
            self.missing,
            self.drops,
            self.kernel
        );
    }

    fn is_whole(&self) -> bool {
        self.outcome.lost() == 0 && self.missing == [0, 0]
    }

    /// Whatever was lost, it was not for want of a key.
    #[track_caller]
    fn blames_no_key(&self) {
        // A full queue is the machine's, and nothing else that the packet path drops is.
        let full = |reason: &str| reason.ends_with(" device_full") || reason.ends_with(" socket_full");
        let ours: Vec<_> = self.drops.keys().filter(|reason| !full(reason)).collect();
        assert!(ours.is_empty(), "{ours:?}");
        assert_eq!((self.outcome.doubled, self.outcome.tcp.0), (0, self.outcome.tcp.1));
        let found = |place: &dyn Fn(&str) -> bool| -> u64 {
            let all = self.kernel.iter().chain(&self.drops);
            all.filter(|(name, _)| place(name)).map(|(_, count)| count).sum()
        };
        let between = ["h1 udp", "h1 eth0", "h2 udp", "h2 eth0", "cpu"];
        let missing: u64 = self.missing.iter().sum();
        assert!(
            missing <= found(&|name| between.iter().any(|place| name.starts_with(place))),
            "between the ends"
        );
        assert!(self.outcome.lost() <= found(&|name| !name.ends_with("again")), "{}", self.outcome.lost());
    }
}

/// What both hosts count.
struct Counts {
    rekeys: [u64; 2],
    missing: [u64; 2],
    drops: BTreeMap<String, u64>,
    kernel: BTreeMap<String, u64>,
}

impl Counts {
    /// Once the load is over; probes and new keys go on.
    fn settled(red: &Red) -> Self {
        let missing = [("h1", "h2"), ("h2", "h1")].map(|(from, to)| missing(red, from, to));
        let pages = ["h1", "h2"].map(|host| page(red, host));
        let mut drops = BTreeMap::new();
        for (page, host) in pages.iter().zip(["h1", "h2"]) {
            for (labels, count) in samples(page, "droveway_drops_total{reason=\"") {
                drops.insert(format!("{host} {}", labels.trim_end_matches("\"}")), count);
            }
        }
        let rekeys = pages.map(|page| sum(&page, "droveway_tunnel_rekeys_total{", ""));
        Self { rekeys, missing, drops, kernel: kernel(red) }
    }
}

/// How many packets one host has sealed and the other has not opened. A packet on its way looks like one that is missing: so
/// this is the least of some looks, each at a moment when nothing was sent.
fn missing(red: &Red, from: &str, to: &str) -> u64 {
    const PACKETS: &str = "droveway_tunnel_packets_total{";
    let look = || {
        let mut found = None;
        until(4 * LIMIT, "nothing is sent between two looks", || {
            let sent = sum(&page(red, from), PACKETS, "\"out\"");
            let came = sum(&page(red, to), PACKETS, "\"in\"");
            found = (sum(&page(red, from), PACKETS, "\"out\"") == sent).then(|| sent - came);
            found.is_some()
        });
        found.unwrap()
    };
    look().min(look())
}

/// All that a host's agent counts.
fn page(red: &Red, host: &str) -> String {
    ask(&red.lab, host, "GET", "/metrics").1
}

fn samples<'a>(page: &'a str, metric: &str) -> Vec<(&'a str, u64)> {
    let lines = page.lines().filter_map(|line| line.strip_prefix(metric)?.rsplit_once(' '));
    lines.map(|(labels, count)| (labels, count.parse().unwrap())).collect()
}

fn sum(page: &str, metric: &str, label: &str) -> u64 {
    let all = samples(page, metric);
    all.iter().filter(|(labels, _)| labels.contains(label)).map(|(_, count)| count).sum()
}

/// All that the kernel dropped on the way, by place: full buffers of sockets, full queues of devices, a processor that was
/// busy elsewhere.
fn kernel(red: &Red) -> BTreeMap<String, u64> {
    const SCRIPT: &str = "
        awk 'NR > 2 { print $1 \" rx\", $5; print $1 \" tx\", $13 }' /proc/net/dev
        awk '/^Udp: / { if (n++) print \"udp rx\", $6 + 0; else next }' /proc/net/snmp
        awk '/^Tcp: / { if (n++) print \"tcp again\", $13; else next }' /proc/net/snmp";
    let mut all = BTreeMap::new();
    let mut take = |place: &str, target: &str, words: &[String]| {
        for line in red.lab.check(target, words).unwrap().lines() {
            let (name, count) = line.rsplit_once(' ').unwrap();
            all.insert(format!("{place} {name}"), count.parse().unwrap());
        }
    };
    let script = ["sh", "-ec", SCRIPT];
    let plain = script.map(str::to_owned);
    for host in ["h1", "h2"] {
        take(host, host, &plain);
        take(&format!("{host} router"), host, &router_words("red", &script));
    }
    take("near", &red.near.path(), &plain);
    take("far", &red.far.path(), &plain);
    // In hexadecimal: packets, and those for which a processor's queue had no room.
    let softnet = red.lab.check("h1", &["cat", "/proc/net/softnet_stat"]).unwrap();
    let dropped =
        softnet.lines().filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok());
    all.insert("cpu".to_owned(), dropped.sum());
    all
}
