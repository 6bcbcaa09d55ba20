//! A load between two containers that counts: a UDP stream whose packets are numbered and a TCP stream beside it, both at a
//! rate and both full of the canary.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use crate::red::Red;
use crate::support::{LIMIT, Look, until};
use crate::watch::canary;

/// The port of both streams.
const PORT: u16 = 5201;
/// Bytes of each UDP packet's payload.
const DATAGRAM: usize = 1200;
/// Bytes that are written to TCP at once.
const CHUNK: usize = 16 << 10;
/// Packets that are sent at once, after the sender had to wait: it does not catch up on more.
const BURST: u32 = 8;
/// Socket buffers of the receiver: what it loses is to be nobody's fault.
const BUFFER: usize = 8 << 20;
/// How long nothing comes before the receiver believes that nothing will.
const QUIET: Duration = Duration::from_secs(1);
/// How often the receiver says that packets come, while they do.
const BEAT: Duration = Duration::from_millis(50);
/// For how long after a fault a packet may come that was on its way before.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// Bits per second of both streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub tcp: u64,
    pub udp: u64,
}

impl Rate {
    pub fn halved(self) -> Self {
        Self { tcp: self.tcp / 2, udp: self.udp / 2 }
    }
}

/// What became of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// UDP packets sent.
    pub sent: u64,
    /// Of those, how many came.
    pub received: u64,
    /// How many came twice.
    pub doubled: u64,
    /// TCP bytes that were sent and that came.
    pub tcp: (u64, u64),
}

impl Outcome {
    pub fn lost(&self) -> u64 {
        self.sent - self.received
    }
}

/// A load from the near container to the far one.
pub struct Load {
    sink: Speaker,
    source: Speaker,
}

/// A probe and what it has said so far, each line with when it came.
struct Speaker {
    child: Child,
    lines: Arc<Mutex<Vec<(Instant, String)>>>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Begins; it ends by itself after so long.
    pub fn start(red: &Red, rate: Rate, length: Duration) -> Self {
        let at = SocketAddr::new(red.far.ip().into(), PORT);
        let sink = Speaker::start(red, &red.far.path(), &format!("sink {at}"));
        until(LIMIT, "the receiver listens", || sink.find(|line| line == "LISTENS").is_some());
        let (tcp, udp, millis) = (rate.tcp, rate.udp, length.as_millis());
        let role = format!("source {at} {tcp} {udp} {millis} {}", canary());
        let source = Speaker::start(red, &red.near.path(), &role);
        let load = Self { sink, source };
        until(LIMIT, "the load flows", || load.sink.find(|line| line == "FLOWS").is_some());
        load
    }

    /// When UDP packets came again after that moment, if they have: somewhat late where there was hardly a break.
    pub fn back_after(&self, moment: Instant) -> Option<Instant> {
        let lines = self.sink.lines.lock().unwrap();
        lines.iter().find(|(at, line)| *at > moment + ON_ITS_WAY && line == "BEAT").map(|(at, _)| *at)
    }

    /// Waits for its end.
    pub fn end(mut self) -> Outcome {
        self.source.child.wait().unwrap();
        self.sink.child.wait().unwrap();
        let numbers = |speaker: &mut Speaker, word: &str| -> Vec<u64> {
            speaker.thread.take().unwrap().join().unwrap();
            let line = speaker.find(|line| line.starts_with(word));
            let line = line.unwrap_or_else(|| panic!("{:#?}", speaker.lines.lock().unwrap()));
            line.split_whitespace().skip(1).map(|it| it.parse().unwrap()).collect()
        };
        let sent = numbers(&mut self.source, "SENT ");
        let came = numbers(&mut self.sink, "CAME ");
        Outcome { sent: sent[0], received: came[0], doubled: came[1], tcp: (sent[1], came[2]) }
    }
}

impl Speaker {
    fn start(red: &Red, target: &str, role: &str) -> Self {
        let mut child = red.lab.spawn(target, &crate::probe::words(role)).unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (out, to) = (BufReader::new(child.stdout.take().unwrap()), Arc::clone(&lines));
        let thread = std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                to.lock().unwrap().push((Instant::now(), line));
            }
        });
        Self { child, lines, thread: Some(thread) }
    }

    fn find(&self, fits: impl Fn(&str) -> bool) -> Option<String> {
        let lines = self.lines.lock().unwrap();
        lines.iter().map(|(_, line)| line.clone()).find(|line| fits(line))
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The receiving end, in a container.
pub fn sink(at: &str) {
    let udp = UdpSocket::bind(at).unwrap();
    if setsockopt(&udp, sockopt::RcvBufForce, &BUFFER).is_err() {
        setsockopt(&udp, sockopt::RcvBuf, &BUFFER).unwrap();
    }
    udp.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let listener = TcpListener::bind(at).unwrap();
    say("LISTENS");
    let stream = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = vec![0; 1 << 20];
        let mut all = 0;
        loop {
            match stream.read(&mut bytes).unwrap() {
                0 => return all,
                length => all += length as u64,
            }
        }
    });
    let mut packet = [0; 2048];
    let (mut seen, mut doubled) = (Numbers::default(), 0);
    let (mut last, mut told) = (None::<Instant>, None::<Instant>);
    loop {
        if udp.recv(&mut packet).is_ok() {
            let now = Instant::now();
            if last.is_none() {
                say("FLOWS");
            }
            last = Some(now);
            if told.is_none_or(|told| now - told >= BEAT) {
                told = Some(now);
                say("BEAT");
            }
            let number = u64::from_be_bytes(packet[..8].try_into().unwrap());
            doubled += u64::from(!seen.add(number));
        } else if stream.is_finished() && last.is_none_or(|last| last.elapsed() > QUIET) {
            break;
        }
    }
    say(&format!("CAME {} {doubled} {}", seen.count(), stream.join().unwrap()));
}

/// The sending end, in a container: both streams for so many milliseconds.
pub fn source(to: &str, tcp: &str, udp: &str, millis: &str, canary: &str) {
    let rate = Rate { tcp: tcp.parse().unwrap(), udp: udp.parse().unwrap() };
    let until = Instant::now() + Duration::from_millis(millis.parse().unwrap());
    let mut stream = TcpStream::connect(to).unwrap();
    let chunk = canary.as_bytes().repeat(CHUNK / canary.len());
    let writer = std::thread::spawn(move || {
        let mut all = 0;
        pace(rate.tcp, chunk.len(), until, || {
            stream.write_all(&chunk).unwrap();
            all += chunk.len() as u64;
        });
        all
    });
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut packet = [&[0; 8], canary.as_bytes()].concat();
    packet.extend(canary.bytes().cycle().take(DATAGRAM - packet.len()));
    let mut sent: u64 = 0;
    pace(rate.udp, DATAGRAM, until, || {
        packet[..8].copy_from_slice(&sent.to_be_bytes());
        // While there is no way, the kernel may say so: then nothing was sent.
        sent += u64::from(socket.send_to(&packet, to).is_ok());
    });
    say(&format!("SENT {sent} {}", writer.join().unwrap()));
}

/// Does something that sends so many bytes as often as makes so many bits a second, evenly.
fn pace(rate: u64, bytes: usize, until: Instant, mut act: impl FnMut()) {
    let gap = Duration::from_nanos(8_000_000_000 * bytes as u64 / rate);
    let mut due = Instant::now();
    loop {
        let now = Instant::now();
        if now >= until {
            return;
        }
        if now < due {
            std::thread::sleep(due - now);
            continue;
        }
        due = due.max(now.checked_sub(gap * BURST).unwrap_or(now)) + gap;
        act();
    }
}

fn say(line: &str) {
    println!("{line}");
    io::stdout().flush().unwrap();
}

/// Numbers that were seen, mostly in their order.
#[derive(Default)]
struct Numbers {
    /// All below.
    whole: u64,
    beyond: BTreeSet<u64>,
}

impl Numbers {
    /// False: it was there.
    fn add(&mut self, number: u64) -> bool {
        if number < self.whole || !self.beyond.insert(number) {
            return false;
        }
        while self.beyond.remove(&self.whole) {
            self.whole += 1;
        }
        true
    }

    fn count(&self) -> u64 {
        self.whole + self.beyond.len() as u64
    }
}

#[test]
fn each_number_counts_once_in_whatever_order_they_come() {
    let mut seen = Numbers::default();
    assert_eq!([0, 2, 2, 1, 0, 5].map(|it| seen.add(it)), [true, true, false, true, false, true]);
    assert_eq!(seen.count(), 4);
}
