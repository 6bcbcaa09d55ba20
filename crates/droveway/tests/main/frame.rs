//! Frames as an attacker makes them, byte by byte: Ethernet, ARP (RFC 826), IPv4 (RFC 791), UDP (RFC 768), ICMP (RFC 792),
//! VXLAN (RFC 7348), IEEE 802.1Q; and what a router of IPv6 says (RFC 4443).

use std::net::{Ipv4Addr, Ipv6Addr};

pub type Mac = [u8; 6];

pub const BROADCAST: Mac = [0xff; 6];
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;

pub fn mac(text: &str) -> Mac {
    let mut octets = text.trim().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap());
    std::array::from_fn(|_| octets.next().unwrap())
}

pub fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// The same frame with a VLAN's tag.
pub fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    [&frame[..12], &[0x81, 0], &vlan.to_be_bytes(), &frame[12..]].concat()
}

/// ARP, with the frame's own source apart from what it claims inside.
pub struct Arp {
    pub operation: u16,
    pub sender: (Mac, Ipv4Addr),
    pub target: (Mac, Ipv4Addr),
}

impl Arp {
    pub fn frame(&self, to: Mac, from: Mac) -> Vec<u8> {
        let head = [0, 1, 8, 0, 6, 4];
        let (sender, target) = (self.sender.1.octets(), self.target.1.octets());
        let operation = self.operation.to_be_bytes();
        let body = [&head[..], &operation, &self.sender.0, &sender, &self.target.0, &target].concat();
        ethernet(to, from, ARP, &body)
    }
}

pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len() as u16).to_be_bytes();
    let mut head = vec![0x45, 0, length[0], length[1], 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
    head.extend(from.octets());
    head.extend(to.octets());
    let sum = checksum(&head).to_be_bytes();
    head[10..12].copy_from_slice(&sum);
    head.extend(payload);
    head
}

/// "Packet too big" (RFC 4443 §3.2): of the UDP datagrams between two, on one port at both, no more than `mtu` bytes pass.
pub fn icmpv6_too_big(by: Ipv6Addr, (from, to): (Ipv6Addr, Ipv6Addr), port: u16, mtu: u32) -> Vec<u8> {
    let header = |length: u16, next: u8, from: Ipv6Addr, to: Ipv6Addr| {
        let length = length.to_be_bytes();
        [&[0x60, 0, 0, 0, length[0], length[1], next, 64], &from.octets()[..], &to.octets()].concat()
    };
    let quoted = [header(1400, 17, from, to), udp(port, port, &[0; 64])].concat();
    let mut body = [&[2, 0, 0, 0], &mtu.to_be_bytes()[..], &quoted].concat();
    let pseudo =
        [&by.octets()[..], &from.octets(), &(body.len() as u32).to_be_bytes(), &[0, 0, 0, 58]].concat();
    let sum = checksum(&[pseudo, body.clone()].concat()).to_be_bytes();
    body[2..4].copy_from_slice(&sum);
    [header(body.len() as u16, 58, by, from), body].concat()
}

/// An IPv4 packet in a frame.
pub fn packet(to: Mac, from: Mac, ip: &[u8]) -> Vec<u8> {
    ethernet(to, from, IPV4, ip)
}

/// Without checksum, which IPv4 allows.
pub fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len() as u16).to_be_bytes();
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &length, &[0, 0], payload].concat()
}

/// A connection's first segment.
pub fn tcp_syn(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Vec<u8> {
    let mut segment = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [&from.0.octets()[..], &to.0.octets(), &[0, 6, 0, 20], &segment].concat();
    let sum = checksum(&pseudo).to_be_bytes();
    segment[16..18].copy_from_slice(&sum);
    segment
}

/// An echo request, which its receiver answers.
pub fn echo(payload: &[u8]) -> Vec<u8> {
    icmp(8, payload)
}

/// An echo reply that nobody asked for: its receiver says nothing to it.
pub fn echo_reply(payload: &[u8]) -> Vec<u8> {
    icmp(0, payload)
}

fn icmp(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, 0, 0, 0, 0x5e, 0xed, 0, 1][..], payload].concat();
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

pub fn vxlan(vni: u32, frame: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0][..], &(vni << 8).to_be_bytes(), frame].concat()
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
