//! Round trips of every type, garbage, and the rules of RFC 7296 about what to refuse.

use std::net::IpAddr;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::error::Misbehaved;

fn octets(max: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..max)
}

fn attribute() -> impl Strategy<Value = Attribute> {
    let value =
        prop_oneof![any::<u16>().prop_map(AttributeValue::Short), octets(20).prop_map(AttributeValue::Long)];
    (0_u16..0x8000, value).prop_map(|(kind, value)| Attribute { kind, value })
}

fn transform() -> impl Strategy<Value = Transform> {
    (any::<u8>(), any::<u16>(), vec(attribute(), 0..4)).prop_map(|(kind, id, attributes)| Transform {
        kind: kind.into(),
        id,
        attributes,
    })
}

fn proposal() -> impl Strategy<Value = Proposal> {
    (any::<u8>(), any::<u8>(), octets(10), vec(transform(), 0..12)).prop_map(
        |(number, protocol, spi, transforms)| Proposal { number, protocol: protocol.into(), spi, transforms },
    )
}

fn selector() -> impl Strategy<Value = TrafficSelector> {
    prop_oneof![
        (any::<u8>(), any::<[u16; 2]>(), any::<[[u8; 4]; 2]>()).prop_map(|(protocol, ports, ends)| {
            let [start, end] = ends.map(IpAddr::from);
            let [start_port, end_port] = ports;
            TrafficSelector::Ip(IpSelector { protocol, start_port, end_port, start, end })
        }),
        (any::<u8>(), any::<[u16; 2]>(), any::<[[u8; 16]; 2]>()).prop_map(|(protocol, ports, ends)| {
            let [start, end] = ends.map(IpAddr::from);
            let [start_port, end_port] = ports;
            TrafficSelector::Ip(IpSelector { protocol, start_port, end_port, start, end })
        }),
        vec(any::<u8>(), 1..40).prop_map(|l| TrafficSelector::Label(SecurityLabel::new(l).unwrap())),
        (11_u8.., any::<u8>(), octets(40)).prop_map(|(kind, protocol, body)| TrafficSelector::Other {
            kind,
            protocol,
            body
        }),
    ]
}

fn delete() -> impl Strategy<Value = Delete> {
    prop_oneof![
        Just(Delete::Ike),
        vec(any::<u32>().prop_map(EspSpi), 0..6).prop_map(Delete::Esp),
        (0_u16..5, 1_u8..9).prop_map(|(count, spi_len)| Delete::Other {
            protocol: Protocol::Ah,
            spi_len,
            spis: vec![7; usize::from(count) * usize::from(spi_len)],
        }),
    ]
}

fn identification() -> impl Strategy<Value = Identification> {
    (any::<u8>(), any::<[u8; 3]>(), octets(60)).prop_map(|(kind, reserved, data)| Identification {
        kind: kind.into(),
        reserved,
        data,
    })
}

fn payload() -> impl Strategy<Value = Payload> {
    prop_oneof![
        vec(proposal(), 1..4).prop_map(|proposals| Payload::Sa(SaPayload { proposals })),
        (any::<u16>(), octets(100)).prop_map(|(group, data)| Payload::Ke(KeyExchange { group, data })),
        identification().prop_map(Payload::IdInitiator),
        identification().prop_map(Payload::IdResponder),
        (any::<u8>(), octets(500))
            .prop_map(|(e, data)| Payload::Cert(Certificate { encoding: e.into(), data })),
        (any::<u8>(), octets(60))
            .prop_map(|(e, authorities)| Payload::CertReq(CertRequest { encoding: e.into(), authorities })),
        (any::<u8>(), octets(100))
            .prop_map(|(m, data)| Payload::Auth(Authentication { method: m.into(), data })),
        vec(any::<u8>(), 16..=256).prop_map(|n| Payload::Nonce(Nonce::new(n).unwrap())),
        (any::<u8>(), octets(10), any::<u16>(), octets(60)).prop_map(|(protocol, spi, kind, data)| {
            Payload::Notify(Notify { protocol: protocol.into(), spi, kind: kind.into(), data })
        }),
        delete().prop_map(Payload::Delete),
        octets(40).prop_map(Payload::VendorId),
        vec(selector(), 1..6).prop_map(|ts| Payload::TsInitiator(TrafficSelectors(ts))),
        vec(selector(), 1..6).prop_map(|ts| Payload::TsResponder(TrafficSelectors(ts))),
        octets(40).prop_map(Payload::Configuration),
        octets(40).prop_map(Payload::Eap),
    ]
}

fn header() -> impl Strategy<Value = Header> {
    (any::<[u64; 2]>(), any::<u8>(), any::<[bool; 3]>(), any::<u32>()).prop_map(
        |([i, r], exchange, [initiator, version, response], message_id)| Header {
            spis: IkeSpis { initiator: IkeSpi(i), responder: IkeSpi(r) },
            exchange: exchange.into(),
            flags: Flags { initiator, version, response },
            message_id,
        },
    )
}

proptest! {
    #[test]
    fn a_message_in_clear_reads_back_as_it_was(header in header(), payloads in vec(payload(), 0..8)) {
        let message = Message { header, payloads };
        let bytes = message.emit_clear().unwrap();
        prop_assert_eq!(Datagram::parse(&bytes), Ok(Datagram::Clear(message)));
    }

    #[test]
    fn a_payload_is_as_long_as_it_says(payload in payload()) {
        let mut out = Vec::new();
        emit_chain(std::slice::from_ref(&payload), &mut out).unwrap();
        prop_assert_eq!(out.len(), payload.len());
    }

    #[test]
    fn garbage_never_panics(bytes in octets(300)) {
        crate::fuzzing::datagram(&bytes);
        crate::fuzzing::sa_payload(&bytes);
        crate::fuzzing::ts_payload(&bytes);
        crate::fuzzing::cert_payload(&bytes);
        crate::fuzzing::auth_payload(&bytes);
        crate::fuzzing::authenticated(&bytes);
        for kind in 0..=u8::MAX {
            let _ = parse_chain(kind.into(), &bytes);
        }
    }

    #[test]
    fn a_damaged_message_never_panics(
        header in header(),
        payloads in vec(payload(), 1..6),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = Message { header, payloads }.emit_clear().unwrap();
        for (at, octet) in damage {
            let at = at.index(bytes.len());
            bytes[at] = octet;
        }
        crate::fuzzing::datagram(&bytes);
        crate::fuzzing::authenticated(&[&bytes[16..17], &bytes[HEADER_LEN..]].concat());
        let cut = cut.index(bytes.len());
        crate::fuzzing::datagram(&bytes[..cut]);
        // The same, with a length in the header that fits.
        if cut >= HEADER_LEN {
            bytes[24..28].copy_from_slice(&(cut as u32).to_be_bytes());
            crate::fuzzing::datagram(&bytes[..cut]);
        }
    }

    #[test]
    fn two_selectors_intersect_alike_from_either_side_and_within_both(
        a in selector(), b in selector(),
    ) {
        if let (TrafficSelector::Ip(a), TrafficSelector::Ip(b)) = (a, b) {
            prop_assert_eq!(a.intersection(&b), b.intersection(&a));
            if let Some(both) = a.intersection(&b) {
                prop_assert!(a.contains(&both) && b.contains(&both));
            }
        }
    }
}

fn init_header() -> Header {
    Header {
        spis: IkeSpis { initiator: IkeSpi(0x0102_0304_0506_0708), responder: IkeSpi::ZERO },
        exchange: ExchangeType::IkeSaInit,
        flags: Flags { initiator: true, ..Flags::default() },
        message_id: 0,
    }
}

/// A datagram whose first payload has type `first` and these octets after the header.
fn datagram(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    init_header().emit(&mut out, first.into(), (HEADER_LEN + body.len()) as u32);
    out.extend_from_slice(body);
    out
}

#[test]
fn the_header_is_laid_out_as_in_rfc_7296() {
    let mut out = Vec::new();
    init_header().emit(&mut out, PayloadType::Sa, 0x0123);
    let golden =
        [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 33, 0x20, 34, 0x08, 0, 0, 0, 0, 0, 0, 0x01, 0x23];
    assert_eq!(out, golden);
}

#[test]
fn an_unknown_payload_is_skipped_unless_it_is_critical() {
    // Type 200, then a Vendor ID.
    let skipped = datagram(200, &[43, 0, 0, 5, 9, 0, 0, 0, 5, b'x']);
    match Datagram::parse(&skipped).unwrap() {
        Datagram::Clear(message) => assert_eq!(message.payloads, [Payload::VendorId(b"x".to_vec())]),
        other => panic!("{other:?}"),
    }
    let refused = datagram(200, &[43, 0x80, 0, 5, 9, 0, 0, 0, 5, b'x']);
    let error = Datagram::parse(&refused).unwrap_err();
    assert_eq!(error, Misbehaved::CriticalPayload(200).into());
    let notify = error.notify().unwrap();
    assert_eq!((notify.kind, notify.data), (NotifyType::UnsupportedCriticalPayload, vec![200]));
}

#[test]
fn the_critical_bit_of_a_known_payload_is_ignored() {
    assert!(Datagram::parse(&datagram(43, &[0, 0x80, 0, 5, b'x'])).is_ok());
}

#[test]
fn a_higher_major_version_is_refused_and_a_higher_minor_one_is_not() {
    let mut bytes = datagram(0, &[]);
    bytes[17] = 0x2f;
    assert!(Datagram::parse(&bytes).is_ok());
    bytes[17] = 0x30;
    let error = Datagram::parse(&bytes).unwrap_err();
    assert_eq!(error.notify().map(|n| n.kind), Some(NotifyType::InvalidMajorVersion));
    assert_eq!(Header::peek(&bytes), Some(init_header()), "whom to tell is known");
    assert_eq!(Header::peek(&bytes[..27]), None);
}

#[test]
fn a_length_that_is_not_the_datagrams_is_refused() {
    for length in [0, 27, 29, u32::MAX] {
        let mut bytes = datagram(0, &[]);
        bytes[24..28].copy_from_slice(&length.to_be_bytes());
        assert!(Datagram::parse(&bytes).is_err(), "{length}");
    }
}

#[test]
fn a_chain_of_too_many_payloads_is_refused() {
    let chain = [43, 0, 0, 4].repeat(MAX_PAYLOADS + 1);
    assert_eq!(Datagram::parse(&datagram(43, &chain)), Err(Misbehaved::Limit("payloads").into()));
    // Unknown ones count as well.
    let chain = [200, 0, 0, 4].repeat(MAX_PAYLOADS + 1);
    assert_eq!(Datagram::parse(&datagram(200, &chain)), Err(Misbehaved::Limit("payloads").into()));
}

#[test]
fn nothing_may_follow_an_encrypted_payload() {
    let good = datagram(46, &[33, 0, 0, 8, 1, 2, 3, 4]);
    assert!(matches!(
        Datagram::parse(&good),
        Ok(Datagram::Encrypted(Encrypted { first: PayloadType::Sa, body: [1, 2, 3, 4], .. }))
    ));
    assert!(Datagram::parse(&datagram(46, &[33, 0, 0, 8, 1, 2, 3, 4, 0, 0, 0, 4])).is_err());
}

#[test]
fn fragments_count_from_one_to_their_total() {
    let fragment = |number: u8, total: u8| datagram(53, &[0, 0, 0, 9, 0, number, 0, total, 77]);
    assert!(matches!(
        Datagram::parse(&fragment(2, 3)),
        Ok(Datagram::Fragment(Fragment { number: 2, total: 3, body: [77], .. }))
    ));
    for (number, total) in [(0, 3), (4, 3), (0, 0), (1, 0)] {
        assert!(Datagram::parse(&fragment(number, total)).is_err(), "{number} of {total}");
    }
}

#[test]
fn an_encrypted_payload_inside_another_is_refused() {
    for kind in [PayloadType::Encrypted, PayloadType::EncryptedFragment] {
        assert_eq!(parse_chain(kind, &[0, 0, 0, 4]), Err(Misbehaved::Unexpected(kind).into()));
    }
}

#[test]
fn nonces_have_sixteen_to_256_octets() {
    for (len, good) in [(15, false), (16, true), (256, true), (257, false)] {
        assert_eq!(Nonce::new(vec![0; len]).is_ok(), good, "{len}");
    }
}

#[test]
fn an_sa_payload_whose_counts_lie_is_refused() {
    let sa = SaPayload {
        proposals: vec![Proposal {
            number: 1,
            protocol: Protocol::Esp,
            spi: vec![1, 2, 3, 4],
            transforms: vec![
                Transform::with_key_len(TransformType::Encryption, 20, 256),
                Transform::new(TransformType::Esn, 1),
            ],
        }],
    };
    let mut bytes = Vec::new();
    sa.emit(&mut bytes);
    let golden = [
        0, 0, 0, 32, 1, 3, 4, 2, 1, 2, 3, 4, // proposal
        3, 0, 0, 12, 1, 0, 0, 20, 0x80, 14, 1, 0, // ENCR_AES_GCM_16, 256
        0, 0, 0, 8, 5, 0, 0, 1, // ESN
    ];
    assert_eq!(bytes, golden);
    for (at, octet) in [(0, 2), (0, 1), (3, 31), (3, 33), (6, 5), (7, 1), (7, 3), (12, 0), (15, 11), (24, 3)]
    {
        let mut bad = golden;
        bad[at] = octet;
        assert!(SaPayload::parse(&bad).is_err(), "octet {at} as {octet}");
    }
    assert!(SaPayload::parse(&[]).is_err(), "no proposal at all");
}

#[test]
fn a_security_label_travels_as_in_rfc_9478_and_is_never_empty() {
    let ts = TrafficSelectors(vec![TrafficSelector::Label(SecurityLabel::new(b"red".to_vec()).unwrap())]);
    let mut bytes = Vec::new();
    ts.emit(&mut bytes);
    assert_eq!(bytes, [1, 0, 0, 0, 10, 0, 0, 7, b'r', b'e', b'd']);
    assert!(TrafficSelectors::parse(&[1, 0, 0, 0, 10, 0, 0, 4]).is_err());
}

#[test]
fn selectors_intersect_by_address_protocol_and_port() {
    let net = |text: &str, len| IpSelector::prefix(text.parse().unwrap(), len);
    let wide = net("10.42.0.0", 16);
    let block = net("10.42.64.99", 26);
    assert_eq!(block.start, "10.42.64.64".parse::<IpAddr>().unwrap());
    assert_eq!(block.end, "10.42.64.127".parse::<IpAddr>().unwrap());
    assert_eq!(wide.intersection(&block), Some(block));
    assert_eq!(block.intersection(&net("10.43.0.0", 16)), None);
    assert_eq!(wide.intersection(&net("fd00::", 8)), None);
    assert_eq!(net("0.0.0.0", 0).intersection(&wide), Some(wide));
    assert_eq!(net("::", 0).end, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".parse::<IpAddr>().unwrap());
    let tcp = IpSelector { protocol: 6, ..wide };
    let udp = IpSelector { protocol: 17, ..block };
    assert_eq!(tcp.intersection(&udp), None);
    assert_eq!(tcp.intersection(&block), Some(IpSelector { protocol: 6, ..block }));
    let web = IpSelector { start_port: 80, end_port: 443, ..tcp };
    let high = IpSelector { start_port: 400, end_port: 65535, ..tcp };
    assert_eq!(web.intersection(&high), Some(IpSelector { start_port: 400, end_port: 443, ..tcp }));
    let opaque = IpSelector { start_port: 65535, end_port: 0, ..tcp };
    assert!(opaque.is_opaque());
    assert_eq!(opaque.intersection(&opaque), Some(opaque));
    assert_eq!(opaque.intersection(&web), None);
}

#[test]
fn a_delete_names_what_it_deletes() {
    assert_eq!(Delete::parse(&[1, 0, 0, 0]), Ok(Delete::Ike));
    assert_eq!(Delete::parse(&[3, 4, 0, 1, 0, 0, 0, 9]), Ok(Delete::Esp(vec![EspSpi(9)])));
    for bad in [&[3, 4, 0, 2, 0, 0, 0, 9][..], &[3, 8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9], &[1, 8, 0, 0], &[3, 4]]
    {
        assert!(Delete::parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_rather_than_cut() {
    let selector = TrafficSelector::Ip(IpSelector::prefix("10.0.0.0".parse().unwrap(), 8));
    let too_many = Payload::TsInitiator(TrafficSelectors(vec![selector; 256]));
    let too_long = Payload::Cert(Certificate::x509(vec![0; 65_535]));
    let spi = Payload::Notify(Notify { spi: vec![0; 256], ..Notify::status(NotifyType::Cookie) });
    for payload in [too_many, too_long, spi] {
        let error = emit_chain(&[payload], &mut Vec::new()).unwrap_err();
        assert!(matches!(error, crate::Error::Misuse(_)), "{error}");
    }
}
