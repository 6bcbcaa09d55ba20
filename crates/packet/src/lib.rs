//! IP, UDP, TCP, ICMP and ESP as views over bytes: checksums, TCP split and merge.
//!
//! Each format has a view (`Packet`, `Segment`, `Datagram`) that is checked for length once and then read and
//! written in place, and a plain `Repr` whose `parse`, `emit` and `buffer_len` are inverses. [`split`] cuts the
//! superpackets that a TUN device with virtio offloads hands out, [`merge`] puts received segments together again.
//!
//! Invariant: nothing here does input or output, and nothing panics on bytes that passed their length check.
//! Invariant: functions that run per packet do not allocate.

pub mod checksum;
pub mod ecn;
pub mod encap;
pub mod esp;
mod field;
pub mod icmp;
pub mod ip;
pub mod ipv4;
pub mod ipv6;
pub mod merge;
pub mod split;
pub mod tcp;
pub mod udp;
pub mod vnet;

/// Protocol and next-header numbers (IANA) that this room knows by name.
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// IPv4 in a tunnel (the next header of ESP tunnel mode, RFC 4303 §2.6).
    pub const IPV4: u8 = 4;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 in a tunnel.
    pub const IPV6: u8 = 41;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Encapsulating security payload.
    pub const ESP: u8 = 50;
    /// Authentication header.
    pub const AH: u8 = 51;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// No next header; in ESP, a dummy packet (RFC 4303 §2.6).
    pub const NONE: u8 = 59;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
}

/// Why bytes are not what they should be.
#[derive(thiserror::Error, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Fewer bytes than the fixed header has.
    #[error("{0}: cut short")]
    Truncated(&'static str),
    /// The version nibble is not the one expected.
    #[error("{0}: wrong version")]
    Version(&'static str),
    /// A length field that its own header or the bytes at hand contradict.
    #[error("{0}: impossible length field")]
    Length(&'static str),
    /// A checksum that does not hold.
    #[error("{0}: wrong checksum")]
    Checksum(&'static str),
    /// A type, code or chain of headers that this room does not read.
    #[error("{0}: not a kind that is read here")]
    Unsupported(&'static str),
}
