//! How fast the packet path is, beside the kernel's VXLAN over the same underlay:
//!
//! ```sh
//! cargo run --release -p agent --example path -- [--rounds 5] [--seconds 2] [--measure TEXT] \
//!     [--queue LENGTH] [--tuning WORDS]... [--ablation] [--no-vxlan] [--peers N]
//! ```
//!
//! Needs root and iperf3. Two hosts in namespaces; rounds are interleaved, since machines differ from minute to minute.
//! What is printed are medians and quartiles of figures, and of the rounds' ratios to VXLAN. `--tuning` measures the path
//! with settings (docs/tuning.md), beside the others if given more than once; `--ablation` takes each technique away;
//! `--peers` measures the path once more with as many other peers that are silent, and says what they cost.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that fails has no result")]
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "figures")]

mod layout;
#[allow(dead_code, reason = "shared with a bench")]
mod measure;
#[allow(dead_code, reason = "shared with the tests")]
#[path = "../../tests/dataplane/rig.rs"]
mod rig;
#[allow(dead_code, reason = "shared with the tests")]
#[path = "../../../linux/tests/sandbox/mod.rs"]
mod sandbox;

use measure::{Ends, MEASURES};
use rig::{Pair, tuned};

/// What the command line asks for.
struct Wanted {
    rounds: usize,
    seconds: u32,
    measure: String,
    vxlan: bool,
    queue: u32,
    /// Other peers, on a way of its own.
    peers: Option<u32>,
    /// Settings of the path, each a way of its own.
    tunings: Vec<String>,
}

/// Each technique off, on its own: what it is worth here.
const ABLATION: [&str; 16] = [
    "",
    "no-tso",
    "no-uso",
    "no-gso",
    "no-gro",
    "no-merge",
    "no-long",
    "no-sparse",
    "no-tso,no-gso,no-gro,no-merge",
    "spin=0",
    "spin=100",
    "flush=65536",
    "turn=1",
    "receive=1",
    "receive=4",
    "receive=16",
];

impl Wanted {
    fn parse() -> Self {
        let mut wanted = Self {
            rounds: 5,
            seconds: 2,
            measure: String::new(),
            vxlan: true,
            // As the agent makes its devices.
            queue: 32,
            peers: None,
            tunings: Vec::new(),
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_else(|| panic!("{name} wants a value"));
            match name.as_str() {
                "--rounds" => wanted.rounds = value().parse().unwrap(),
                "--seconds" => wanted.seconds = value().parse().unwrap(),
                "--measure" => wanted.measure = value(),
                "--queue" => wanted.queue = value().parse().unwrap(),
                "--peers" => wanted.peers = Some(value().parse().unwrap()),
                "--tuning" => wanted.tunings.push(value()),
                "--no-vxlan" => wanted.vxlan = false,
                "--ablation" => wanted.tunings = ABLATION.map(str::to_owned).to_vec(),
                _ => panic!("no such option: {name}; see the top of examples/path/main.rs"),
            }
        }
        if wanted.tunings.is_empty() {
            wanted.tunings.push(String::new());
        }
        wanted
    }
}

fn main() {
    let wanted = Wanted::parse();
    sandbox::run("path", move |dir| {
        let pairs: Vec<(&str, Pair)> = wanted
            .tunings
            .iter()
            .zip(0..)
            .map(|(tuning, number)| {
                let dir = dir.join(format!("pair{number}"));
                std::fs::create_dir(&dir).unwrap();
                let pair = tuned(&dir, &tuning.parse().unwrap());
                layout::vxlan(&pair, &dir);
                for host in [&pair.a, &pair.b] {
                    host.sh(&format!("ip link set tun0 txqueuelen {}", wanted.queue));
                }
                (tuning.as_str(), pair)
            })
            .collect();
        let crowded = wanted.peers.map(|count| {
            let dir = dir.join("crowd");
            std::fs::create_dir(&dir).unwrap();
            let pair = tuned(&dir, &wanted.tunings[0].parse().unwrap());
            let (before, begun) = (resident(), std::time::Instant::now());
            for host in [&pair.a, &pair.b] {
                host.crowd(count);
            }
            println!("{count} peers on both sides: all there in {:.2?}", begun.elapsed());
            println!("  {:.1} KB each", (resident() - before) / 2.0 / f64::from(count));
            let spent = measure::seconds_of("self");
            std::thread::sleep(std::time::Duration::from_secs(5));
            let spent = measure::seconds_of("self") - spent;
            println!("  {:.2} % of a processor while nothing is sent", spent / 5.0 * 100.0);
            pair
        });
        let pairs: Vec<(&str, Pair)> =
            pairs.into_iter().chain(crowded.map(|pair| ("with other peers", pair))).collect();
        let mut ways: Vec<(&str, Ends<'_>)> =
            pairs.iter().map(|(tuning, pair)| (*tuning, layout::by_path(pair))).collect();
        if wanted.vxlan {
            // Between the hosts of the first.
            ways.push(("vxlan", layout::by_vxlan(&pairs[0].1)));
        }
        for measure in MEASURES.iter().filter(|it| it.name.contains(&wanted.measure)) {
            let mut figures = vec![Vec::new(); ways.len()];
            for _ in 0..wanted.rounds {
                for ((_, ends), figures) in ways.iter().zip(&mut figures) {
                    figures.push((measure.run)(ends, wanted.seconds).unwrap());
                }
            }
            println!("{}, {}, and of the last", measure.name, measure.unit);
            let last = figures.last().unwrap();
            for ((way, ..), figures) in ways.iter().zip(&figures) {
                let way = if way.is_empty() { "as it is" } else { way };
                let ratios: Vec<f64> =
                    figures.iter().zip(last).map(|(figure, vxlan)| figure / vxlan).collect();
                println!("  {way:32} {}   {}", spread(figures), spread(&ratios));
            }
        }
        for (tuning, pair) in &pairs {
            println!("drops {tuning}: {:?} {:?}", pair.a.path.total_drops(), pair.b.path.total_drops());
        }
    });
}

/// Memory of this program, KB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// The median, and between which values half of all are.
fn spread(values: &[f64]) -> String {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    format!("{:7.2} ({:.2} to {:.2})", at(0.5), at(0.25), at(0.75))
}
