//! Programs that tests run inside containers and on nodes: this very binary, started there with a role in its environment.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use droveway::lab::Lab;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, socket,
};

use crate::{api, bogus, load};

const ROLE: &str = "DROVEWAY_TEST_PROBE";

/// Not a test: what the functions below run elsewhere.
#[test]
fn a_probe() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let words: Vec<&str> = role.split(' ').collect();
    match words[..] {
        ["raw", interface, ref frames @ ..] => raw(interface, frames),
        ["capture", interface] => capture(interface),
        ["udp", to, payload] => {
            let to: SocketAddr = to.parse().unwrap();
            UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })
                .unwrap()
                .send_to(&unhex(payload), to)
                .unwrap();
        }
        ["get", path] => println!("{}", get("169.254.169.250:80", path).unwrap()),
        ["page", at] => println!("PAGE {}", get(at, "/").unwrap_or_default()),
        ["abuse-api", data] => api::abuse(Path::new(data)),
        ["resolver", at] => resolver(&UdpSocket::bind(at).unwrap()),
        ["mirror", at] => mirror(&UdpSocket::bind(at).unwrap()),
        ["look", from, to] => look(from, to),
        ["flood", to, rate] => {
            let (to, rate) = (to.parse().unwrap(), rate.parse().unwrap());
            bogus::flood(to, rate, &AtomicBool::new(false), || println!("FLOODS"));
        }
        ["sink", at] => load::sink(at),
        ["source", to, tcp, udp, millis, canary] => load::source(to, tcp, udp, millis, canary),
        _ => panic!("no such role: {role}"),
    }
    println!("PROBE DONE");
}

/// The words that run a role.
pub fn words(role: &str) -> Vec<String> {
    let binary = std::env::current_exe().unwrap().display().to_string();
    let role = format!("{ROLE}={role}");
    ["env", &role, &binary, "--exact", "probe::a_probe", "--nocapture"].map(str::to_owned).to_vec()
}

fn run(lab: &Lab, target: &str, role: &str) {
    let said = lab.check(target, &words(role)).unwrap();
    assert!(said.contains("PROBE DONE"), "{said}");
}

/// Sends frames as they are, from a container's interface.
pub fn send(lab: &Lab, target: &str, frames: &[Vec<u8>]) {
    send_by(lab, target, "eth0", frames);
}

/// [`send`] by another interface.
pub fn send_by(lab: &Lab, target: &str, interface: &str, frames: &[Vec<u8>]) {
    let frames: Vec<String> = frames.iter().map(|frame| hex(frame)).collect();
    run(lab, target, &format!("raw {interface} {}", frames.join(" ")));
}

/// What writes all frames of an interface to its standard error, as a pcap file; the first bytes when it has begun.
pub fn capture_words(interface: &str) -> Vec<String> {
    words(&format!("capture {interface}"))
}

/// Sends a datagram by the ordinary way.
pub fn send_udp(lab: &Lab, target: &str, to: SocketAddr, payload: &[u8]) {
    run(lab, target, &format!("udp {to} {}", hex(payload)));
}

/// What the metadata service answers with at that path.
pub fn metadata(lab: &Lab, target: &str, path: &str) -> String {
    let said = lab.check(target, &words(&format!("get {path}"))).unwrap();
    assert!(said.contains("HTTP/1.1 200") && said.contains("PROBE DONE"), "{said}");
    let (_, body) = said.split_once("\r\n\r\n").unwrap();
    body.split("PROBE DONE").next().unwrap().trim().to_owned()
}

/// What an HTTP server answers with, if anybody does.
pub fn page(lab: &Lab, target: &str, at: &str) -> String {
    let said = lab.check(target, &words(&format!("page {at}"))).unwrap();
    said.split("PAGE ").nth(1).unwrap().split("PROBE DONE").next().unwrap().trim().to_owned()
}

/// Sends the server's API all that it should refuse.
pub fn abuse_api(lab: &Lab, target: &str, data: &Path) {
    run(lab, target, &format!("abuse-api {}", data.display()));
}

/// A name server that knows `www.example.com` and `intranet.lab.example` as 192.0.2.7, until the child is killed.
pub fn resolver_at(lab: &Lab, target: &str, at: SocketAddr) -> Child {
    lab.spawn(target, &words(&format!("resolver {at}"))).unwrap()
}

/// Tells each who sends it a datagram from where that came, until the child is killed. Comes back when it listens.
pub fn mirror_at(lab: &Lab, target: &str, at: SocketAddr) -> Child {
    let mut child = lab.spawn(target, &words(&format!("mirror {at}"))).unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("LISTENS")), "the mirror ended");
    child
}

/// Has a node send bogus requests to begin IKE to a host, so many a second, until the child is killed. Comes back when it has
/// begun. The host answers to where they seem to come from.
pub fn flood_from(lab: &Lab, node: &str, host: &str, to: SocketAddr, rate: u32) -> Child {
    let sources = bogus::SOURCES;
    let via = lab.check(node, &["sh", "-c", "hostname -I"]).unwrap();
    lab.check(node, &["ip", "route", "add", "local", sources, "dev", "lo"]).unwrap();
    lab.check(host, &["ip", "route", "add", sources, "via", via.split_whitespace().next().unwrap()]).unwrap();
    let mut child = lab.spawn(node, &words(&format!("flood {to} {rate}"))).unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("FLOODS")), "the flood ended");
    child
}

/// As which address and port a [`mirror_at`] sees a socket of that local port; none if no answer comes back.
pub fn seen_as(lab: &Lab, target: &str, from: u16, mirror: SocketAddr) -> Option<SocketAddr> {
    let said = lab.check(target, &words(&format!("look 0.0.0.0:{from} {mirror}"))).unwrap();
    said.split("SEEN ").nth(1).unwrap().split_whitespace().next().unwrap().parse().ok()
}

fn raw(interface: &str, frames: &[&str]) {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).unwrap();
    let mut interfaces = getifaddrs().unwrap().filter(|found| found.interface_name == interface);
    let address = interfaces.find_map(|found| found.address?.as_link_addr().copied()).unwrap();
    for frame in frames {
        sendto(socket.as_raw_fd(), &unhex(frame), &address, MsgFlags::empty()).unwrap();
    }
}

/// draft-ietf-opsawg-pcap, with microseconds; link type Ethernet, or, for a TUN device, raw IP.
fn capture(interface: &str) {
    let all = Some(SockProtocol::EthAll);
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), all).unwrap();
    let index = if_nametoindex(interface).unwrap() as usize;
    let mut out = io::stderr().lock();
    let link_type = if interface.starts_with("tun") { 101 } else { 1 };
    let head = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 0x0001_0000, link_type];
    out.write_all(&head.map(u32::to_le_bytes).concat()).unwrap();
    let mut frame = vec![0; 1 << 16];
    loop {
        let (length, from) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame).unwrap();
        if from.is_none_or(|from| from.ifindex() != index) {
            continue;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let head = [now.as_secs() as u32, now.subsec_micros(), length as u32, length as u32];
        out.write_all(&[&head.map(u32::to_le_bytes).concat(), &frame[..length]].concat()).unwrap();
    }
}

fn get(at: &str, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&at.parse().unwrap(), Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn resolver(socket: &UdpSocket) {
    let mut query = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut query).unwrap();
        // The question ends after its name, type and class; what comes behind it (EDNS) is not answered.
        let name_end = 12 + query[12..length].iter().position(|&octet| octet == 0).unwrap();
        let known = [&b"\x03www\x07example\x03com"[..], b"\x08intranet\x03lab\x07example"];
        let known = known.contains(&query[12..name_end].to_ascii_lowercase().as_slice());
        let mut answer = query[..name_end + 5].to_vec();
        answer[2] |= 0x80;
        answer[3] = if known { 0 } else { 3 };
        answer[6..12].copy_from_slice(&[0, u8::from(known), 0, 0, 0, 0]);
        if known {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
        }
        socket.send_to(&answer, from).unwrap();
    }
}

fn mirror(socket: &UdpSocket) {
    println!("LISTENS");
    let mut some = [0; 64];
    loop {
        let (_, from) = socket.recv_from(&mut some).unwrap();
        socket.send_to(from.to_string().as_bytes(), from).unwrap();
    }
}

fn look(from: &str, to: &str) {
    let socket = UdpSocket::bind(from).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket.send_to(b"who am I", to).unwrap();
    let mut answer = [0; 64];
    let seen = socket.recv(&mut answer).map(|length| String::from_utf8_lossy(&answer[..length]).into_owned());
    println!("SEEN {} .", seen.unwrap_or_else(|_| "nothing".to_owned()));
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)]))
        .collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).unwrap() as u8;
    text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}
