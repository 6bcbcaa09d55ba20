//! What becomes of DSCP and ECN in a tunnel: RFC 6040 for ECN, RFC 4301 §5.1.2 for DSCP.
//!
//! The byte is IPv4's TOS or IPv6's traffic class: six bits of DSCP, then two of ECN (RFC 3168 §5).

use crate::{Malformed, checksum, field};

/// The two ECN bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ecn {
    /// 00: the transport does not take part.
    NotEct,
    /// 01.
    Ect1,
    /// 10.
    Ect0,
    /// 11: congestion experienced.
    Ce,
}

impl Ecn {
    /// The bits of a TOS or traffic class byte.
    pub fn of(tos: u8) -> Self {
        match tos & 3 {
            0 => Self::NotEct,
            1 => Self::Ect1,
            2 => Self::Ect0,
            _ => Self::Ce,
        }
    }

    /// As bits.
    pub fn bits(self) -> u8 {
        match self {
            Self::NotEct => 0,
            Self::Ect1 => 1,
            Self::Ect0 => 2,
            Self::Ce => 3,
        }
    }
}

/// Which DSCP the outer header gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dscp {
    /// The inner packet's: the underlay sees its class.
    #[default]
    Copy,
    /// Always this one (six bits): the underlay sees nothing.
    Fixed(u8),
}

/// The TOS byte of the outer header for an inner one, ingress in normal mode (RFC 6040 §4.1): ECN is copied.
pub fn encapsulate(inner_tos: u8, dscp: Dscp) -> u8 {
    match dscp {
        Dscp::Copy => inner_tos,
        Dscp::Fixed(class) => (class << 2) | (inner_tos & 3),
    }
}

/// What the egress does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Egress {
    /// The ECN of the forwarded packet, or `None` to drop it.
    pub ecn: Option<Ecn>,
    /// How much a combination deserves attention.
    pub alarm: Alarm,
}

/// Marks in the table of RFC 6040.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alarm {
    /// A combination that is to be expected.
    None,
    /// (!) in the table: currently unused, may mean something one day.
    Unusual,
    /// (!!!) in the table: dangerous, should be logged.
    Dangerous,
}

/// The egress of RFC 6040 §4.2, figure 4.
pub fn decapsulate(inner: Ecn, outer: Ecn) -> Egress {
    use Alarm::{Dangerous, None as Quiet, Unusual};
    use Ecn::{Ce, Ect0, Ect1, NotEct};
    let (ecn, alarm) = match (inner, outer) {
        (NotEct, NotEct) => (Some(NotEct), Quiet),
        (NotEct, Ect0 | Ect1) => (Some(NotEct), Dangerous),
        (NotEct, Ce) => (None, Dangerous),
        (Ect0, NotEct | Ect0) => (Some(Ect0), Quiet),
        (Ect0, Ect1) | (Ect1, NotEct | Ect1) => (Some(Ect1), Quiet),
        (Ect1, Ect0) => (Some(Ect1), Unusual),
        (Ect0 | Ect1, Ce) | (Ce, NotEct | Ect0 | Ce) => (Some(Ce), Quiet),
        (Ce, Ect1) => (Some(Ce), Dangerous),
    };
    Egress { ecn, alarm }
}

/// Does [`decapsulate`] to the inner packet itself and keeps its IPv4 header checksum right. The inner DSCP stays.
///
/// Returns the egress; with `ecn` of `None` the packet is untouched and to be dropped.
pub fn decapsulate_packet(packet: &mut [u8], outer: Ecn) -> Result<Egress, Malformed> {
    let tos = tos(packet)?;
    let egress = decapsulate(Ecn::of(tos), outer);
    if let Some(ecn) = egress.ecn
        && ecn != Ecn::of(tos)
    {
        let new = (tos & !3) | ecn.bits();
        if packet[0] >> 4 == 4 {
            let old_word = field::be16(packet, 0);
            packet[1] = new;
            let sum = checksum::adjust(field::be16(packet, 10), old_word, field::be16(packet, 0));
            field::put16(packet, 10, sum);
        } else {
            packet[0] = (packet[0] & 0xf0) | (new >> 4);
            packet[1] = (packet[1] & 0x0f) | (new << 4);
        }
    }
    Ok(egress)
}

/// The TOS or traffic class byte of an IP packet.
#[inline]
pub fn tos(packet: &[u8]) -> Result<u8, Malformed> {
    match packet {
        [first, tos, ..] if first >> 4 == 4 && packet.len() >= 20 => Ok(*tos),
        [first, second, ..] if first >> 4 == 6 && packet.len() >= 40 => Ok((first << 4) | (second >> 4)),
        [first, ..] if !matches!(first >> 4, 4 | 6) => Err(Malformed::Version("IP")),
        _ => Err(Malformed::Truncated("IP header")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ipv4, ipv6};
    use Ecn::{Ce, Ect0, Ect1, NotEct};

    /// RFC 6040 §4.2, figure 4, row by row: inner Not-ECT, ECT(0), ECT(1), CE; columns outer in the same order.
    const FIGURE_4: [[&str; 4]; 4] = [
        ["Not-ECT", "Not-ECT(!!!)", "Not-ECT(!!!)", "drop(!!!)"],
        ["ECT(0)", "ECT(0)", "ECT(1)", "CE"],
        ["ECT(1)", "ECT(1) (!)", "ECT(1)", "CE"],
        ["CE", "CE", "CE(!!!)", "CE"],
    ];
    const ORDER: [Ecn; 4] = [NotEct, Ect0, Ect1, Ce];

    #[test]
    fn the_egress_is_figure_4_of_rfc_6040() {
        for (row, inner) in FIGURE_4.iter().zip(ORDER) {
            for (cell, outer) in row.iter().zip(ORDER) {
                let egress = decapsulate(inner, outer);
                let ecn = match cell.split(['(', ' ']).next().unwrap() {
                    "Not-ECT" => Some(NotEct),
                    "ECT" if cell.starts_with("ECT(0)") => Some(Ect0),
                    "ECT" => Some(Ect1),
                    "CE" => Some(Ce),
                    _ => None,
                };
                let alarm = if cell.contains("(!!!)") {
                    Alarm::Dangerous
                } else if cell.contains("(!)") {
                    Alarm::Unusual
                } else {
                    Alarm::None
                };
                assert_eq!(egress, Egress { ecn, alarm }, "inner {inner:?} outer {outer:?}");
            }
        }
    }

    #[test]
    fn the_ingress_copies_ecn_whatever_becomes_of_dscp() {
        for tos in 0..=255u8 {
            assert_eq!(encapsulate(tos, Dscp::Copy), tos);
            let fixed = encapsulate(tos, Dscp::Fixed(46));
            assert_eq!((fixed >> 2, Ecn::of(fixed)), (46, Ecn::of(tos)));
        }
    }

    #[test]
    fn a_packet_marked_on_the_way_arrives_marked_with_its_dscp_and_a_right_checksum() {
        let mut packet = [0; 20];
        let repr = ipv4::Repr { tos: (46 << 2) | 2, ..ipv4::Repr::default() };
        repr.emit(&mut packet);
        decapsulate_packet(&mut packet, Ce).unwrap();
        let view = ipv4::Packet::new_checked(&packet[..]).unwrap();
        assert_eq!(view.tos(), (46 << 2) | 3);
        assert!(view.verify_checksum());

        let mut packet = [0; 40];
        let repr = ipv6::Repr { traffic_class: (46 << 2) | 2, flow_label: 0xabcde, ..ipv6::Repr::default() };
        repr.emit(&mut packet);
        decapsulate_packet(&mut packet, Ce).unwrap();
        let view = ipv6::Packet::new_checked(&packet[..]).unwrap();
        assert_eq!((view.traffic_class(), view.flow_label()), ((46 << 2) | 3, 0xabcde));
    }

    #[test]
    fn a_packet_that_does_not_do_ecn_is_dropped_when_marked_and_else_left_alone() {
        let mut packet = [0; 20];
        ipv4::Repr::default().emit(&mut packet);
        let before = packet;
        assert_eq!(decapsulate_packet(&mut packet, Ce).unwrap().ecn, None);
        assert_eq!(decapsulate_packet(&mut packet, Ect0).unwrap().ecn, Some(NotEct));
        assert_eq!(packet, before);
        assert_eq!(decapsulate_packet(&mut [0x45; 19], Ce), Err(Malformed::Truncated("IP header")));
        assert_eq!(decapsulate_packet(&mut [0x55; 40], Ce), Err(Malformed::Version("IP")));
    }
}
