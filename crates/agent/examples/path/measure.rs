//! What is measured, each by one function of a rig, the second host's address and some seconds.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::rig::{Host, Pair};
use crate::sandbox::sh;

/// Something that is measured.
pub struct Measure {
    pub name: &'static str,
    pub unit: &'static str,
    /// What its ratio to VXLAN must be, and is hoped to be.
    pub bar: &'static str,
    pub run: fn(&Rig<'_>, &str, u32) -> f64,
}

pub const MEASURES: [Measure; 8] = [
    Measure { name: "one TCP stream", unit: "Gb/s", bar: "must 0.5, aim 0.7", run: one },
    Measure {
        name: "four TCP streams",
        unit: "Gb/s",
        bar: "must 0.5, aim 0.8",
        run: |rig, to, seconds| rig.tcp(to, seconds, "-P 4"),
    },
    Measure {
        name: "both directions",
        unit: "Gb/s",
        bar: "must 0.5, aim 0.8",
        run: |rig, to, seconds| rig.tcp(to, seconds, "--bidir"),
    },
    Measure { name: "UDP of 64 bytes", unit: "kpps", bar: "must 2, aim 3", run: udp },
    Measure {
        name: "request and response",
        unit: "µs",
        bar: "p50; must 1.6, aim 1.1",
        run: |rig, to, seconds| request(rig.pair, to, seconds),
    },
    Measure { name: "ping under full load", unit: "ms", bar: "p50; must be 1 ms, aim 0.3 ms", run: loaded },
    Measure { name: "CPU of a stream", unit: "ms/Gb", bar: "must 2.5, aim 2.0", run: cpu },
    Measure { name: "stream at 9000 underlay", unit: "Gb/s", bar: "must 0.5, aim 0.7", run: jumbo },
];

/// Two hosts, and iperf3 servers on both.
pub struct Rig<'a> {
    pair: &'a Pair,
    servers: [Server; 2],
}

impl<'a> Rig<'a> {
    pub fn new(pair: &'a Pair) -> Self {
        Self { pair, servers: [&pair.a, &pair.b].map(Server::start) }
    }

    fn tcp(&self, to: &str, seconds: u32, how: &str) -> f64 {
        let said = iperf(self.pair, to, seconds, how);
        let bits = |key: &str| said["end"][key]["bits_per_second"].as_f64().unwrap_or(0.0);
        (bits("sum_received") + bits("sum_received_bidir_reverse")) / 1e9
    }

    /// Seconds of processors that this program, the programs that it ran to their end, its servers and the kernel's
    /// threads for packets have had.
    fn spent(&self) -> f64 {
        let servers = self.servers.iter().map(|server| seconds_of(&format!("/proc/{}/stat", server.0.id())));
        let softirq = sh("pgrep -x 'ksoftirqd/[0-9]+'");
        let softirq = softirq.lines().map(|pid| seconds_of(&format!("/proc/{pid}/stat")));
        seconds_of("/proc/self/stat") + servers.chain(softirq).sum::<f64>()
    }
}

/// An iperf3 server in a router.
struct Server(Child);

impl Server {
    fn start(host: &Host) -> Self {
        let child = host.router.run(|| Command::new("iperf3").args(["-s"]).stdout(Stdio::null()).spawn());
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
        "for n in 1 2 3 4 5; do iperf3 -J -c {to} -t {seconds} -O 0.5 -C cubic {how} && exit; sleep 0.2; done"
    );
    serde_json::from_str(&pair.a.sh(&command)).unwrap()
}

fn one(rig: &Rig<'_>, to: &str, seconds: u32) -> f64 {
    rig.tcp(to, seconds, "-P 1")
}

/// Thousands of datagrams a second that arrive while one program sends as many as it can.
fn udp(rig: &Rig<'_>, to: &str, seconds: u32) -> f64 {
    let (a, b) = (&rig.pair.a, &rig.pair.b);
    let receiver = b.router.run(|| linux::udp::Socket::bind(linux::udp::Family::V4, 0).unwrap()).unwrap();
    let sender = a.router.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
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
            // One that was lost is none.
            if client.recv(&mut [0]).is_ok() {
                times.push(sent.elapsed().as_secs_f64() * 1e6);
            }
        }
        client.send(&[0]).unwrap();
        median(times)
    })
}

/// Milliseconds of a ping while four streams take what they can.
fn loaded(rig: &Rig<'_>, to: &str, seconds: u32) -> f64 {
    std::thread::scope(|scope| {
        let load = scope.spawn(|| iperf(rig.pair, to, seconds + 1, "-P 4"));
        std::thread::sleep(Duration::from_secs(1));
        let said = rig.pair.a.sh(&format!("ping -n -i 0.01 -w {seconds} {to} || true"));
        load.join().unwrap();
        let times =
            said.lines().filter_map(|line| line.split_once("time=")?.1.split(' ').next()?.parse().ok());
        median(times.collect())
    })
}

/// Milliseconds of processors for each Gbit of one stream.
fn cpu(rig: &Rig<'_>, to: &str, seconds: u32) -> f64 {
    let before = rig.spent();
    let said = iperf(rig.pair, to, seconds, "-P 1 -O 0");
    let bits = said["end"]["sum_received"]["bytes"].as_f64().unwrap() * 8.0;
    (rig.spent() - before) * 1e3 / (bits / 1e9)
}

/// As [`one`], on an underlay of 9,000 bytes.
fn jumbo(rig: &Rig<'_>, to: &str, seconds: u32) -> f64 {
    let set = |underlay: u32, path: u32, vxlan: u32| {
        for host in [&rig.pair.a, &rig.pair.b] {
            host.host.run(|| sh(&format!("ip link set und{} mtu {underlay}", host.side))).unwrap();
            host.sh(&format!("ip link set tun0 mtu {path}; ip link set vxlan0 mtu {vxlan}"));
        }
    };
    set(9000, 8938, 8950);
    let rate = one(rig, to, seconds);
    set(1500, 1438, 1450);
    rate
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// User and system time of a process and of its children that have ended.
pub fn seconds_of(stat: &str) -> f64 {
    let stat = std::fs::read_to_string(stat).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(4);
    fields.map(|field| field.parse::<f64>().unwrap()).sum::<f64>() / 100.0
}
