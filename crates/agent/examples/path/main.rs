//! How fast the packet path is, beside the kernel's VXLAN over the same underlay:
//!
//! ```sh
//! cargo run --release -p agent --example path -- [--rounds 5] [--seconds 2] [--measure TEXT] [--only path|vxlan]
//! ```
//!
//! Needs root and iperf3. Two hosts in namespaces; rounds are interleaved, since machines differ from minute to minute.
//! What is printed are medians, quartiles, and the median of the rounds' ratios to VXLAN.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that fails has no result")]
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "figures")]

mod measure;
#[allow(dead_code, reason = "shared with the tests")]
#[path = "../../tests/dataplane/rig.rs"]
mod rig;
#[allow(dead_code, reason = "shared with the tests")]
#[path = "../../../linux/tests/sandbox/mod.rs"]
mod sandbox;

use std::path::Path;

use measure::{MEASURES, Rig};
use rig::{Pair, pair};

/// What the command line asks for.
struct Wanted {
    rounds: usize,
    seconds: u32,
    measure: String,
    only: Option<String>,
}

impl Wanted {
    fn parse() -> Self {
        let mut wanted = Self { rounds: 5, seconds: 2, measure: String::new(), only: None };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let value = arguments.next().unwrap_or_else(|| panic!("{name} wants a value"));
            match name.as_str() {
                "--rounds" => wanted.rounds = value.parse().unwrap(),
                "--seconds" => wanted.seconds = value.parse().unwrap(),
                "--measure" => wanted.measure = value,
                "--only" => wanted.only = Some(value),
                _ => panic!("no such option: {name}; see the top of examples/path/main.rs"),
            }
        }
        wanted
    }
}

/// The two ways, and the address of the second host by each.
const WAYS: [(&str, &str); 2] = [("path", "10.42.2.1"), ("vxlan", "10.43.2.1")];

fn main() {
    let wanted = Wanted::parse();
    sandbox::run("path", move |dir| {
        let pair = pair(dir);
        vxlan(&pair, dir);
        let rig = Rig::new(&pair);
        let ways: Vec<_> =
            WAYS.iter().filter(|(way, _)| wanted.only.as_ref().is_none_or(|only| only == way)).collect();
        for measure in MEASURES.iter().filter(|it| it.name.contains(&wanted.measure)) {
            let mut figures = vec![Vec::new(); ways.len()];
            for _ in 0..wanted.rounds {
                for ((_, to), figures) in ways.iter().zip(&mut figures) {
                    figures.push((measure.run)(&rig, to, wanted.seconds));
                }
            }
            let all: Vec<String> = ways
                .iter()
                .zip(&figures)
                .map(|((way, _), figures)| format!("{way} {}", spread(figures)))
                .collect();
            print!("{:36} {:6} {}", measure.name, measure.unit, all.join("   "));
            if let [path, vxlan] = &figures[..] {
                let ratios: Vec<f64> = path.iter().zip(vxlan).map(|(path, vxlan)| path / vxlan).collect();
                print!("   ratio {} ({})", spread(&ratios), measure.bar);
            }
            println!();
        }
        println!("drops: {:?} {:?}", pair.a.path.total_drops(), pair.b.path.total_drops());
    });
}

/// The kernel's VXLAN between the same routers, over the same underlay.
fn vxlan(pair: &Pair, dir: &Path) {
    for host in [&pair.a, &pair.b] {
        let (side, other) = (host.side, 3 - host.side);
        host.host
            .run(|| {
                sandbox::sh(&format!(
                    "ip link add vxlan0 type vxlan id 7 remote 192.0.2.{other} dstport 4789 dev und{side}; \
                     ip link set vxlan0 netns {}",
                    dir.join(format!("router{side}")).display()
                ))
            })
            .unwrap();
        host.sh(&format!("ip link set vxlan0 mtu 1450 up; ip addr add 10.43.{side}.1/16 dev vxlan0"));
    }
}

/// The median, and between which values half of all are.
fn spread(values: &[f64]) -> String {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    format!("{:7.2} ({:.2} to {:.2})", at(0.5), at(0.25), at(0.75))
}
