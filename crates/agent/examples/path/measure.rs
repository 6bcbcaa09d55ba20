//! What is measured between two namespaces, each by one function of [`Ends`] and some seconds. Used by this example, and by
//! `make bench` (`crates/droveway/benches/system`) for containers and for other implementations.
//!
//! Everything is bounded in time: a way that carries nothing gives an error, and a slow one a small figure.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use linux::netns::Netns;

/// Something that is measured.
pub struct Measure {
    pub name: &'static str,
    pub unit: &'static str,
    /// Whether larger figures are the better ones.
    pub more_is_better: bool,
    pub run: fn(&Ends<'_>, u32) -> Outcome,
}

/// A figure, or why there is none.
pub type Outcome = Result<f64, String>;

pub const MEASURES: [Measure; 8] = [
    measure("one TCP stream", "Gb/s", true, |ends, seconds| tcp(ends, seconds, "-P 1")),
    measure("four TCP streams", "Gb/s", true, |ends, seconds| tcp(ends, seconds, "-P 4")),
    measure("both directions", "Gb/s", true, |ends, seconds| tcp(ends, seconds, "--bidir")),
    measure("UDP of 64 bytes", "kpps", true, udp),
    measure("request and response", "µs", false, request),
    measure("ping under full load", "ms", false, loaded),
    measure("CPU of a stream", "ms/Gb", false, cpu),
    measure("stream at 9000 underlay", "Gb/s", true, jumbo),
];

const fn measure(
    name: &'static str,
    unit: &'static str,
    more_is_better: bool,
    run: fn(&Ends<'_>, u32) -> Outcome,
) -> Measure {
    Measure { name, unit, more_is_better, run }
}

/// Between which ends a way goes.
pub struct Ends<'a> {
    from: &'a Netns,
    to: &'a Netns,
    /// The second end's, by this way.
    address: String,
    /// Processes beside this one that move its packets.
    daemons: Vec<u32>,
    /// Sets the MTU of the underlay, and of what lies on it.
    underlay: Option<Box<dyn Fn(u32) + Sync + 'a>>,
    server: Server,
}

impl<'a> Ends<'a> {
    /// With an iperf3 server at the second. Takes pacing away at both: a socket made where the default algorithm paces (bbr) goes
    /// on doing so, whatever algorithm it is told to use.
    pub fn new(from: &'a Netns, to: &'a Netns, address: &str) -> Result<Self, String> {
        for netns in [from, to] {
            let unpaced = || std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno");
            inside(netns, unpaced)?.map_err(|error| format!("cannot take pacing away: {error}"))?;
        }
        let server = Server::start(to, address)?;
        Ok(Self { from, to, address: address.to_owned(), daemons: Vec::new(), underlay: None, server })
    }

    pub fn with_daemons(self, daemons: Vec<u32>) -> Self {
        Self { daemons, ..self }
    }

    pub fn with_underlay(self, set: impl Fn(u32) + Sync + 'a) -> Self {
        Self { underlay: Some(Box::new(set)), ..self }
    }

    /// Runs a shell command at the first end, for so long at most.
    fn sh(&self, command: &str, seconds: u32) -> Result<String, String> {
        let limit = format!("{seconds}");
        let run = || Command::new("timeout").args([&limit, "sh", "-c", command]).output();
        let output = inside(self.from, run)?.map_err(|error| error.to_string())?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What iperf3 says of a test.
    fn iperf(&self, seconds: u32, how: &str) -> Result<serde_json::Value, String> {
        let to = &self.address;
        let command = format!(
            "for n in 1 2 3 4 5; do \
               said=$(iperf3 -J -c {to} -t {seconds} -O 0.5 -C cubic --connect-timeout 2000 {how}) && break; sleep 0.2; \
             done; echo \"$said\""
        );
        let said = self.sh(&command, seconds + 15)?;
        let json: serde_json::Value =
            serde_json::from_str(&said).map_err(|_| format!("iperf3 to {to} did not end in time"))?;
        match json["error"].as_str() {
            Some(error) => Err(format!("iperf3 to {to}: {error}")),
            None => Ok(json),
        }
    }

    /// Seconds of processors that this program, the programs that it ran to their end, the server, the daemons and the
    /// kernel's threads for packets have had. What the kernel does for packets in between is in these too: it counts as the
    /// time of whoever was running.
    fn spent(&self) -> f64 {
        let known = self.daemons.iter().copied().chain([self.server.0.id()]).chain(softirq());
        seconds_of("self") + known.map(|pid| seconds_of(&pid.to_string())).sum::<f64>()
    }
}

/// An iperf3 server.
struct Server(Child);

impl Server {
    fn start(at: &Netns, address: &str) -> Result<Self, String> {
        let mut command = Command::new("iperf3");
        command.args(["-s", "-B", address]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        inside(at, || command.spawn())?.map(Self).map_err(|error| format!("cannot start iperf3: {error}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn tcp(ends: &Ends<'_>, seconds: u32, how: &str) -> Outcome {
    let said = ends.iperf(seconds, how)?;
    let bits = |key: &str| said["end"][key]["bits_per_second"].as_f64().unwrap_or(0.0);
    positive((bits("sum_received") + bits("sum_received_bidir_reverse")) / 1e9)
}

/// Thousands of datagrams a second that arrive while one program sends as many as it can.
fn udp(ends: &Ends<'_>, seconds: u32) -> Outcome {
    let open = || linux::udp::Socket::bind(linux::udp::Family::V4, 0);
    let receiver = inside(ends.to, open)?.map_err(|error| error.to_string())?;
    let sender = bound(ends.from, "0.0.0.0")?;
    sender.connect((ends.address.as_str(), receiver.port())).map_err(|error| error.to_string())?;
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
            // Interrupted, or nothing came: the next turn sees.
            let _ = nix::poll::poll(&mut fds, 10u8);
            if receiver.receive(&mut buffers, &mut received).is_ok() {
                count += received.iter().map(|message| message.len.div_ceil(message.stride)).sum::<usize>();
            }
        }
        let rate = count as f64 / start.elapsed().as_secs_f64() / 1e3;
        stop.store(true, Relaxed);
        positive(rate)
    })
}

/// Microseconds from a request of one byte to its response, the median of as many as there are one after another.
fn request(ends: &Ends<'_>, seconds: u32) -> Outcome {
    let failed = |error: std::io::Error| error.to_string();
    let server = bound(ends.to, &ends.address)?;
    let client = bound(ends.from, "0.0.0.0")?;
    client.connect(server.local_addr().map_err(failed)?).map_err(failed)?;
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(Duration::from_millis(200))).map_err(failed)?;
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut byte = [0];
            while !stop.load(Relaxed) {
                if let Ok((_, from)) = server.recv_from(&mut byte) {
                    let _ = server.send_to(&byte, from);
                }
            }
        });
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < Duration::from_secs(seconds.into()) {
            let sent = Instant::now();
            // One that was lost is none.
            if client.send(&[1]).is_ok() && client.recv(&mut [0]).is_ok() {
                times.push(sent.elapsed().as_secs_f64() * 1e6);
            }
        }
        stop.store(true, Relaxed);
        median(times)
    })
}

/// Milliseconds of a ping while four streams take what they can.
fn loaded(ends: &Ends<'_>, seconds: u32) -> Outcome {
    std::thread::scope(|scope| {
        let load = scope.spawn(|| ends.iperf(seconds + 1, "-P 4"));
        std::thread::sleep(Duration::from_secs(1));
        let said = ends.sh(&format!("ping -n -i 0.01 -w {seconds} {}", ends.address), seconds + 5);
        load.join().map_err(|_| "the load panicked".to_owned())??;
        let said = said?;
        let time = |line: &str| line.split_once("time=")?.1.split(' ').next()?.parse().ok();
        median(said.lines().filter_map(time).collect())
    })
}

/// Milliseconds of processors for each Gbit of one stream.
fn cpu(ends: &Ends<'_>, seconds: u32) -> Outcome {
    let before = ends.spent();
    let said = ends.iperf(seconds, "-P 1 -O 0")?;
    let bits = positive(said["end"]["sum_received"]["bytes"].as_f64().unwrap_or(0.0) * 8.0)?;
    Ok((ends.spent() - before) * 1e3 / (bits / 1e9))
}

/// One stream on an underlay of 9,000 bytes.
fn jumbo(ends: &Ends<'_>, seconds: u32) -> Outcome {
    let set = ends.underlay.as_ref().ok_or("the MTU of its underlay cannot be changed while it runs")?;
    set(9000);
    let rate = tcp(ends, seconds, "-P 1");
    set(1500);
    rate
}

fn inside<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> Result<T, String> {
    netns.run(work).map_err(|error| error.to_string())
}

fn bound(netns: &Netns, address: &str) -> Result<UdpSocket, String> {
    inside(netns, || UdpSocket::bind((address, 0)))?.map_err(|error| error.to_string())
}

fn positive(figure: f64) -> Outcome {
    if figure > 0.0 { Ok(figure) } else { Err("nothing came through".to_owned()) }
}

fn median(mut values: Vec<f64>) -> Outcome {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().ok_or_else(|| "nothing was answered".to_owned())
}

/// The kernel's threads that handle packets when nobody else's time is taken for it.
fn softirq() -> Vec<u32> {
    let said = Command::new("pgrep").args(["-x", "ksoftirqd/[0-9]+"]).output().map(|it| it.stdout);
    String::from_utf8_lossy(&said.unwrap_or_default()).lines().filter_map(|pid| pid.parse().ok()).collect()
}

/// User and system time of a process and of its children that have ended; 0 if it is gone.
pub fn seconds_of(process: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').unwrap_or_default().1.split_whitespace().skip(11).take(4);
    fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}
