//! How fast the packet path is, beside the kernel's VXLAN over the same underlay: `cargo run --release -p agent --example
//! path [ROUNDS] [SECONDS] [MEASURE]`. Needs root and iperf3.
//!
//! Two hosts in namespaces; rounds are interleaved, since machines differ from minute to minute. What is printed are
//! medians, and ratios to VXLAN.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that fails has no result")]
#![allow(clippy::cast_precision_loss, reason = "figures")]

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rig::{Host, Pair, pair};

#[allow(dead_code, reason = "shared with the tests")]
#[path = "../tests/dataplane/rig.rs"]
mod rig;
#[allow(dead_code, reason = "shared with the tests")]
#[path = "../../linux/tests/sandbox/mod.rs"]
mod sandbox;

/// What is measured: a name, a unit, and how.
type Measure = (&'static str, &'static str, fn(&Pair, &str, u32) -> f64);

const MEASURES: [Measure; 6] = [
    ("one TCP stream", "Gb/s", |pair, to, seconds| tcp(pair, to, seconds, "-P 1")),
    ("four TCP streams", "Gb/s", |pair, to, seconds| tcp(pair, to, seconds, "-P 4")),
    ("both directions", "Gb/s", |pair, to, seconds| tcp(pair, to, seconds, "--bidir")),
    ("UDP of 64 bytes", "kpps", udp),
    ("request and response", "µs", request),
    ("one TCP stream, CPU of the machine", "ms/Gb", cpu),
];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |otherwise: u32| arguments.next().map_or(otherwise, |text| text.parse().unwrap());
    let (rounds, seconds) = (number(5), number(2));
    let only = arguments.next().unwrap_or_default();
    sandbox::run("path", move |dir| {
        let pair = pair(dir);
        vxlan(&pair, dir);
        let _servers = [&pair.b, &pair.a].map(Server::start);
        let mut results: BTreeMap<(usize, &str), Vec<f64>> = BTreeMap::new();
        for _ in 0..rounds {
            for (index, (_, _, measure)) in
                MEASURES.iter().enumerate().filter(|(_, (name, ..))| name.contains(&only))
            {
                for (what, to) in [("path", "10.42.2.1"), ("vxlan", "10.43.2.1")] {
                    results.entry((index, what)).or_default().push(measure(&pair, to, seconds));
                }
            }
        }
        for (index, (name, unit, _)) in MEASURES.iter().enumerate() {
            if !name.contains(&only) {
                continue;
            }
            let [path, vxlan] = ["path", "vxlan"].map(|what| median(&results[&(index, what)]));
            println!("{name:36} {path:8.2} {unit:6} vxlan {vxlan:8.2}   {:.2} x", path / vxlan);
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

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// An iperf3 server in a router.
struct Server(std::process::Child);

impl Server {
    fn start(host: &Host) -> Self {
        let child = host
            .router
            .run(|| Command::new("iperf3").args(["-s"]).stdout(std::process::Stdio::null()).spawn());
        Self(child.unwrap().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn iperf(pair: &Pair, to: &str, seconds: u32, how: &str) -> serde_json::Value {
    let command = format!(
        "for n in 1 2 3 4 5; do iperf3 -J -c {to} -t {seconds} -O 0.5 {how} && exit; sleep 0.2; done"
    );
    serde_json::from_str(&pair.a.sh(&command)).unwrap()
}

fn tcp(pair: &Pair, to: &str, seconds: u32, how: &str) -> f64 {
    let said = iperf(pair, to, seconds, how);
    let bits = |key: &str| said["end"][key]["bits_per_second"].as_f64().unwrap_or(0.0);
    (bits("sum_received") + bits("sum_received_bidir_reverse")) / 1e9
}

/// Thousands of datagrams a second that arrive while one program sends as many as it can.
fn udp(pair: &Pair, to: &str, seconds: u32) -> f64 {
    let receiver =
        pair.b.router.run(|| linux::udp::Socket::bind(linux::udp::Family::V4, 0).unwrap()).unwrap();
    let sender = pair.a.router.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    sender.connect((to, receiver.port())).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                for _ in 0..64 {
                    // Refused while the device's queue is full: then it is tried again.
                    let _ = sender.send(&[0x5a; 64]);
                }
            }
        });
        let (mut buffers, mut received) = (vec![vec![0; 65_536]; 16], Vec::new());
        let (mut count, start) = (0, Instant::now());
        let mut fds = [nix::poll::PollFd::new(receiver.as_fd(), nix::poll::PollFlags::POLLIN)];
        while start.elapsed() < Duration::from_secs(seconds.into()) {
            nix::poll::poll(&mut fds, 10u8).unwrap();
            receiver.receive(&mut buffers, &mut received).unwrap();
            count += received.iter().map(|message| message.len.div_ceil(message.stride)).sum::<usize>();
        }
        let rate = count as f64 / start.elapsed().as_secs_f64() / 1e3;
        stop.store(true, Relaxed);
        rate
    })
}

/// Microseconds from a request of one byte to its response, the median of as many as there are one after another.
fn request(pair: &Pair, to: &str, seconds: u32) -> f64 {
    let server = pair.b.router.run(|| UdpSocket::bind((to, 0)).unwrap()).unwrap();
    let client = pair.a.router.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    client.connect(server.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut byte = [0];
            while let Ok((_, from)) = server.recv_from(&mut byte)
                && byte != [0]
            {
                let _ = server.send_to(&byte, from);
            }
        });
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < Duration::from_secs(seconds.into()) {
            let sent = Instant::now();
            client.send(&[1]).unwrap();
            client.recv(&mut [0]).unwrap();
            times.push(sent.elapsed().as_secs_f64() * 1e6);
        }
        client.send(&[0]).unwrap();
        median(&times)
    })
}

/// CPU time of the whole machine for what one stream carries.
fn cpu(pair: &Pair, to: &str, seconds: u32) -> f64 {
    let before = busy();
    let said = iperf(pair, to, seconds, "-P 1");
    let bits = said["end"]["sum_received"]["bytes"].as_f64().unwrap() * 8.0;
    (busy() - before) * 1e3 / (bits / 1e9)
}

/// Seconds in which the machine's processors did something.
fn busy() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let fields: Vec<f64> =
        stat.lines().next().unwrap().split_whitespace().skip(1).map(|field| field.parse().unwrap()).collect();
    // All but idle, waiting for disks, and what guests counted twice.
    (fields.iter().take(8).sum::<f64>() - fields[3] - fields[4]) / 100.0
}
