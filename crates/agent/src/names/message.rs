//! DNS messages: what to do with a query, and the reply in bytes.
//!
//! Parsing and emitting is hickory's; before it sees a query, the counts in its header are checked, so that twelve bytes
//! cannot ask for megabytes. What is forwarded stays the bytes that came (RFC 5625 §3), so `Raw` reads just enough of
//! a message to tell whether a reply belongs to a query.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};

use super::zone::{Outcome, TTL, Zone};

/// The length of a header (RFC 1035 §4.1.1).
pub(super) const HEADER: usize = 12;
/// What every client takes over UDP (RFC 1035 §4.2.1).
const UDP_MIN: usize = 512;
/// What we send over UDP at most of our own: it passes an IPv6 link of least MTU in one piece.
const UDP_MAX: u16 = 1232;

/// How a client came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// One datagram each way.
    Udp,
    /// A stream of messages, each after its length.
    Tcp,
}

/// What to do with a query.
#[derive(Debug)]
pub(super) enum Reaction {
    /// Nothing: it is no query.
    Ignore,
    /// Send this.
    Reply(Vec<u8>),
    /// Ask others.
    Forward(Box<Forward>),
}

/// A query for others.
#[derive(Debug)]
pub(super) struct Forward {
    /// The bytes that came.
    pub(super) query: Vec<u8>,
    /// How they came.
    pub(super) transport: Transport,
    asked: Message,
    limit: usize,
}

/// Decides about the bytes of one message. `turn` rotates the records of an answer.
pub(super) fn react(bytes: &[u8], asker: IpAddr, transport: Transport, zone: &Zone, turn: usize) -> Reaction {
    let Some(raw) = Raw::new(bytes) else { return Reaction::Ignore };
    if raw.is_response() {
        // Two servers that answer each other's answers never stop.
        return Reaction::Ignore;
    }
    if raw.opcode() != u8::from(OpCode::Query) {
        return Reaction::Reply(raw.refusal(ResponseCode::NotImp));
    }
    let asked = match raw.counts() {
        // At most an OPT and a signature are additional.
        [1, 0, 0, 0..=2] if raw.question().is_some() => Message::from_vec(bytes).ok(),
        _ => None,
    };
    let Some(asked) = asked else { return Reaction::Reply(raw.refusal(ResponseCode::FormErr)) };
    let Some(question) = asked.queries.first() else {
        return Reaction::Reply(raw.refusal(ResponseCode::FormErr));
    };

    if asked.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return reply(failure(&asked, ResponseCode::BADVERS), transport, &asked);
    }
    let transfer = matches!(question.query_type(), RecordType::AXFR | RecordType::IXFR);
    if transfer || question.query_class() != DNSClass::IN {
        return reply(failure(&asked, ResponseCode::Refused), transport, &asked);
    }
    let mut message = failure(&asked, ResponseCode::NoError);
    message.metadata.authoritative = true;
    let soa = |apex| Record::from_rdata(apex, TTL, RData::SOA(zone.soa().clone()));
    match zone.answer(question, asker) {
        Outcome::Records(mut records) => {
            let turn = turn.checked_rem(records.len()).unwrap_or_default();
            records.rotate_left(turn);
            let owner = question.name();
            message.add_answers(records.into_iter().map(|data| Record::from_rdata(owner.clone(), TTL, data)));
        }
        Outcome::NoData { apex } => drop(message.add_authority(soa(apex))),
        Outcome::NxDomain { apex } => {
            message.metadata.response_code = ResponseCode::NXDomain;
            message.add_authority(soa(apex));
        }
        Outcome::NotOurs if zone.is_internal() => {
            return reply(failure(&asked, ResponseCode::Refused), transport, &asked);
        }
        Outcome::NotOurs => {
            let limit = match transport {
                Transport::Udp => usize::from(asked.max_payload()),
                Transport::Tcp => usize::from(u16::MAX),
            };
            return Reaction::Forward(Box::new(Forward { query: bytes.to_vec(), transport, asked, limit }));
        }
    }
    reply(message, transport, &asked)
}

impl Forward {
    /// The most bytes that the client takes.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// What to send when others replied with these bytes: they, unless the client takes less.
    pub(super) fn relay(&self, answer: Vec<u8>) -> Vec<u8> {
        if answer.len() <= self.limit {
            return answer;
        }
        match Raw::new(&answer) {
            Some(raw) => raw.truncated(),
            None => self.fail(),
        }
    }

    /// What to send when nobody replied.
    pub(super) fn fail(&self) -> Vec<u8> {
        encode(failure(&self.asked, ResponseCode::ServFail), self.limit).unwrap_or_default()
    }
}

/// The bytes of a message that are read without a parser. At least a header long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw<'a>(&'a [u8]);

impl<'a> Raw<'a> {
    /// `None` where there is no header.
    pub(super) fn new(bytes: &'a [u8]) -> Option<Self> {
        (bytes.len() >= HEADER).then_some(Self(bytes))
    }

    fn is_response(self) -> bool {
        self.0[2] & 0x80 != 0
    }

    fn opcode(self) -> u8 {
        (self.0[2] >> 3) & 0x0f
    }

    /// Whether the answer did not fit.
    pub(super) fn is_truncated(self) -> bool {
        self.0[2] & 0x02 != 0
    }

    /// The lower four bits of the response code.
    pub(super) fn rcode(self) -> u8 {
        self.0[3] & 0x0f
    }

    /// Questions, answers, authorities, additionals.
    fn counts(self) -> [u16; 4] {
        let at = |i: usize| u16::from_be_bytes([self.0[i], self.0[i + 1]]);
        [at(4), at(6), at(8), at(10)]
    }

    /// The first question's bytes: a name without compression, type and class.
    fn question(self) -> Option<&'a [u8]> {
        let mut at = HEADER;
        loop {
            match *self.0.get(at)? {
                0 => break,
                length @ 1..=63 => at += 1 + usize::from(length),
                // There is nothing before it that it could point to.
                _ => return None,
            }
        }
        self.0.get(HEADER..at + 5)
    }

    /// Whether this is a response to that query: same id, same question. The name's case may differ.
    pub(super) fn answers(self, query: Raw<'_>) -> bool {
        let same_question = match (self.question(), query.question()) {
            (Some(mine), Some(theirs)) if mine.len() == theirs.len() => {
                let (name, kind) = mine.split_at(mine.len() - 4);
                let (their_name, their_kind) = theirs.split_at(theirs.len() - 4);
                name.eq_ignore_ascii_case(their_name) && kind == their_kind
            }
            (_, _) => false,
        };
        self.is_response() && self.0[..2] == query.0[..2] && self.counts()[0] == 1 && same_question
    }

    /// A reply to what cannot be understood: a header alone.
    fn refusal(self, code: ResponseCode) -> Vec<u8> {
        // QR, and of the query its opcode and RD.
        let flags = 0x80 | (self.0[2] & 0x79);
        vec![self.0[0], self.0[1], flags, code.low(), 0, 0, 0, 0, 0, 0, 0, 0]
    }

    /// The same response without records, marked as truncated.
    fn truncated(self) -> Vec<u8> {
        let question = self.question().unwrap_or_default();
        let mut bytes = self.0[..HEADER].to_vec();
        bytes[2] |= 0x02;
        bytes[4..].fill(0);
        bytes[5] = u8::from(!question.is_empty());
        bytes.extend_from_slice(question);
        bytes
    }
}

/// A response without records. RFC 6891 §6.1.1: it has an OPT if the query has one.
fn failure(asked: &Message, code: ResponseCode) -> Message {
    let mut message = Message::response(asked.id, asked.op_code);
    message.metadata.recursion_desired = asked.recursion_desired;
    message.metadata.checking_disabled = asked.checking_disabled;
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message.add_queries(asked.queries.iter().cloned());
    if let Some(theirs) = &asked.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_MAX).set_version(0);
        edns.set_dnssec_ok(theirs.flags().dnssec_ok);
        message.set_edns(edns);
    }
    message
}

fn reply(message: Message, transport: Transport, asked: &Message) -> Reaction {
    let limit = match transport {
        Transport::Udp => usize::from(asked.max_payload().min(UDP_MAX)).max(UDP_MIN),
        Transport::Tcp => usize::from(u16::MAX),
    };
    match encode(message, limit) {
        Some(bytes) => Reaction::Reply(bytes),
        None => Reaction::Ignore,
    }
}

/// The bytes of a message, with as many answers as fit: some clients never come back over TCP.
fn encode(mut message: Message, limit: usize) -> Option<Vec<u8>> {
    /// An A record whose name is a pointer.
    const SMALLEST: usize = 16;
    let most = limit / SMALLEST;
    if message.answers.len() > most {
        message.answers.truncate(most);
        message.metadata.truncation = true;
    }
    loop {
        let bytes = message.to_vec().ok()?;
        let Some(excess) = bytes.len().checked_sub(limit).filter(|excess| *excess > 0) else {
            return Some(bytes);
        };
        // Names after the first few hundred are not compressed, so records differ in length.
        let each = bytes.len().checked_div(message.answers.len())?;
        let keep = message.answers.len() - (excess / each).max(1);
        message.answers.truncate(keep);
        message.metadata.truncation = true;
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::op::{MessageType, Query};
    use hickory_proto::rr::Name;
    use proptest::prelude::*;

    use super::*;
    use crate::names::fixtures::{endpoint, network, view, walk};

    const ASKER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 42, 0, 2));

    fn zone() -> Zone {
        Zone::new(&view("droveway.internal", walk()), &network())
    }

    fn many(count: u8) -> Zone {
        let endpoints = (0..count)
            .map(|i| endpoint(i, &format!("web-{i}"), "shop", "web", &format!("10.42.{i}.2")))
            .collect();
        Zone::new(&view("droveway.internal", endpoints), &network())
    }

    fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn with_edns(mut message: Message, payload: u16) -> Message {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.set_edns(edns);
        message
    }

    fn replied(zone: &Zone, bytes: &[u8], transport: Transport, turn: usize) -> Message {
        match react(bytes, ASKER, transport, zone, turn) {
            Reaction::Reply(bytes) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn answer(zone: &Zone, message: &Message) -> Message {
        let reply = replied(zone, &message.to_vec().unwrap(), Transport::Udp, 0);
        assert_eq!(reply.id, message.id);
        assert_eq!(reply.message_type, MessageType::Response);
        reply
    }

    #[test]
    fn an_answer_is_authoritative_short_lived_and_under_the_name_that_was_asked() {
        let reply = answer(&zone(), &query("HuBot.", RecordType::A));
        assert!(reply.authoritative && reply.recursion_available && reply.recursion_desired);
        let [record] = &reply.answers[..] else { panic!("{reply}") };
        assert_eq!((record.name.to_ascii(), record.ttl), ("HuBot.".to_owned(), 5));
        assert_eq!(record.data.to_string(), "10.42.64.3");
        assert!(reply.edns.is_none(), "none was in the query");
    }

    #[test]
    fn an_internal_network_asks_nobody_outside() {
        let mut view = view("droveway.internal", walk());
        view.catalog.networks.get_mut(&network()).unwrap().internal = true;
        let zone = Zone::new(&view, &network());
        assert_eq!(
            answer(&zone, &query("secret.example.com.", RecordType::A)).response_code,
            ResponseCode::Refused
        );
        assert_eq!(answer(&zone, &query("hubot.", RecordType::A)).answers.len(), 1);
    }

    #[test]
    fn a_negative_answer_carries_the_soa_with_the_short_ttl() {
        for (name, kind, code) in [
            ("nothere.droveway.internal.", RecordType::A, ResponseCode::NXDomain),
            ("hubot.droveway.internal.", RecordType::AAAA, ResponseCode::NoError),
            ("hubot.", RecordType::AAAA, ResponseCode::NoError),
            ("9.9.42.10.in-addr.arpa.", RecordType::PTR, ResponseCode::NXDomain),
        ] {
            let reply = answer(&zone(), &query(name, kind));
            assert_eq!(reply.response_code, code, "{name}");
            assert!(reply.answers.is_empty());
            let [soa] = &reply.authorities[..] else { panic!("{reply}") };
            assert!(soa.name.zone_of(&Name::from_str(name).unwrap()), "{} for {name}", soa.name);
            let RData::SOA(data) = &soa.data else { panic!("{soa}") };
            assert_eq!((soa.ttl, data.minimum, data.serial), (5, 5, 9));
        }
    }

    #[test]
    fn records_rotate_from_query_to_query() {
        let bytes = query("web.shop.droveway.internal.", RecordType::A).to_vec().unwrap();
        let zone = many(3);
        let first = |turn| replied(&zone, &bytes, Transport::Udp, turn).answers[0].data.to_string();
        assert_eq!([first(0), first(1), first(2)], ["10.42.0.2", "10.42.1.2", "10.42.2.2"]);
        assert_eq!(first(3), first(0));
    }

    #[test]
    fn what_does_not_fit_a_datagram_is_cut_and_says_so() {
        let zone = many(200);
        let plain = query("web.shop.droveway.internal.", RecordType::A);
        let cases = [
            (plain.clone(), 512),
            (with_edns(plain.clone(), 100), 512),
            (with_edns(plain.clone(), 900), 900),
        ];
        for (message, limit) in cases.into_iter().chain([(with_edns(plain.clone(), 4096), 1232)]) {
            let bytes = message.to_vec().unwrap();
            let Reaction::Reply(reply) = react(&bytes, ASKER, Transport::Udp, &zone, 0) else { panic!() };
            assert!(reply.len() <= limit && reply.len() + 16 > limit, "{} of {limit}", reply.len());
            let reply = Message::from_vec(&reply).unwrap();
            assert!(reply.truncation && !reply.answers.is_empty());
            assert_eq!(reply.edns.is_some(), message.edns.is_some());
        }
        let whole = replied(&zone, &plain.to_vec().unwrap(), Transport::Tcp, 0);
        assert!(!whole.truncation);
        assert_eq!(whole.answers.len(), 200);
    }

    #[test]
    fn a_negative_answer_to_the_longest_name_fits_the_smallest_datagram() {
        let label = "x".repeat(63);
        let name = format!("{label}.{label}.{label}.{}.droveway.internal.", "x".repeat(43));
        assert_eq!(Name::from_ascii(&name).unwrap().len(), 254, "and its end");
        let reply = answer(&zone(), &with_edns(query(&name, RecordType::A), 512));
        assert_eq!(reply.response_code, ResponseCode::NXDomain);
        assert!(!reply.truncation && reply.authorities.len() == 1 && reply.edns.is_some());
    }

    #[test]
    fn edns_is_answered_with_edns_and_an_unknown_version_with_badvers() {
        let reply = answer(&zone(), &with_edns(query("hubot.", RecordType::A), 4096));
        assert_eq!(reply.edns.as_ref().unwrap().max_payload(), 1232);
        let mut future = with_edns(query("hubot.", RecordType::A), 4096);
        future.edns.as_mut().unwrap().set_version(1);
        let reply = answer(&zone(), &future);
        assert_eq!(u16::from(reply.response_code), 16);
        assert_eq!(reply.edns.unwrap().version(), 0);
        assert!(reply.answers.is_empty());
    }

    #[test]
    fn other_opcodes_classes_and_transfers_are_turned_down() {
        for opcode in [OpCode::Status, OpCode::Notify, OpCode::Update] {
            let mut message = query("hubot.", RecordType::A);
            message.metadata.op_code = opcode;
            let reply = answer(&zone(), &message);
            assert_eq!((reply.response_code, reply.op_code), (ResponseCode::NotImp, opcode));
        }
        let mut chaos = query("version.bind.", RecordType::TXT);
        chaos.queries[0].set_query_class(DNSClass::CH);
        assert_eq!(answer(&zone(), &chaos).response_code, ResponseCode::Refused);
        for kind in [RecordType::AXFR, RecordType::IXFR] {
            let reply = answer(&zone(), &query("droveway.internal.", kind));
            assert_eq!(reply.response_code, ResponseCode::Refused);
        }
    }

    #[test]
    fn what_is_malformed_is_said_to_be_and_a_response_is_not_answered() {
        let good = query("hubot.", RecordType::A).to_vec().unwrap();
        let zone = zone();
        let formerr = |bytes: &[u8]| {
            let reply = replied(&zone, bytes, Transport::Udp, 0);
            assert_eq!(
                (reply.response_code, reply.id),
                (ResponseCode::FormErr, u16::from_be_bytes([good[0], good[1]]))
            );
        };
        formerr(&good[..good.len() - 1]);
        formerr(&good[..HEADER]);
        for (at, value) in [(4, 0xff), (5, 0), (5, 2), (6, 0xff), (8, 0xff), (10, 0xff), (11, 3), (12, 0xc0)]
        {
            let mut bad = good.clone();
            bad[at] = value;
            formerr(&bad);
        }
        let mut response = good.clone();
        response[2] |= 0x80;
        assert!(matches!(react(&response, ASKER, Transport::Udp, &zone, 0), Reaction::Ignore));
        assert!(matches!(react(&good[..HEADER - 1], ASKER, Transport::Udp, &zone, 0), Reaction::Ignore));
    }

    #[test]
    fn what_is_not_ours_is_forwarded_as_it_came() {
        let bytes = with_edns(query("example.com.", RecordType::A), 1400).to_vec().unwrap();
        let Reaction::Forward(forward) = react(&bytes, ASKER, Transport::Udp, &zone(), 0) else { panic!() };
        assert_eq!((forward.query.as_slice(), forward.limit()), (bytes.as_slice(), 1400));
        let failed = Message::from_vec(&forward.fail()).unwrap();
        assert_eq!(failed.response_code, ResponseCode::ServFail);
        assert_eq!(failed.queries.len(), 1);
        assert!(failed.edns.is_some());
    }

    #[test]
    fn a_forwarded_answer_larger_than_the_client_takes_is_cut() {
        let asked = query("example.com.", RecordType::TXT);
        let bytes = asked.to_vec().unwrap();
        let Reaction::Forward(forward) = react(&bytes, ASKER, Transport::Udp, &zone(), 0) else { panic!() };
        let mut large = bytes.clone();
        large[2] |= 0x80;
        large.resize(600, 0);
        let cut = Message::from_vec(&forward.relay(large)).unwrap();
        assert!(cut.truncation);
        assert_eq!(cut.queries, asked.queries);
    }

    #[test]
    fn a_reply_belongs_to_its_query_by_id_and_question() {
        let ask = query("Example.com.", RecordType::A).to_vec().unwrap();
        let mut reply = ask.to_ascii_lowercase();
        reply[..2].copy_from_slice(&ask[..2]);
        reply[2] |= 0x80;
        let belongs = |reply: &[u8]| Raw::new(reply).unwrap().answers(Raw::new(&ask).unwrap());
        assert!(belongs(&reply), "names compare without case");
        for at in [0, 2, 5, 14, reply.len() - 3, reply.len() - 1] {
            let mut other = reply.clone();
            other[at] ^= 0x80;
            assert!(!belongs(&other), "byte {at}");
        }
    }

    /// Queries that are right but for some bytes.
    fn nearly() -> impl Strategy<Value = Vec<u8>> {
        let names =
            prop::sample::select(vec!["hubot.", "mongo.rocket-chat.droveway.internal.", "example.com."]);
        let bent = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        (names, bent, prop_oneof![Just(0), 0..20_usize]).prop_map(|(name, bent, cut)| {
            let mut bytes = with_edns(query(name, RecordType::A), 4096).to_vec().unwrap();
            for (at, value) in bent {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(bytes.len() - cut);
            bytes
        })
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_never_makes_two_servers_talk_to_each_other(
            bytes in prop_oneof![prop::collection::vec(any::<u8>(), 0..300), nearly()],
            udp in any::<bool>(),
            turn in any::<usize>(),
        ) {
            let zone = zone();
            let transport = if udp { Transport::Udp } else { Transport::Tcp };
            match react(&bytes, ASKER, transport, &zone, turn) {
                Reaction::Ignore => prop_assert!(bytes.len() < HEADER || bytes[2] & 0x80 != 0),
                Reaction::Reply(reply) => {
                    prop_assert!(bytes[2] & 0x80 == 0);
                    prop_assert_eq!(&reply[..2], &bytes[..2]);
                    prop_assert!(Message::from_vec(&reply).is_ok());
                    let again = react(&reply, ASKER, transport, &zone, turn);
                    prop_assert!(matches!(again, Reaction::Ignore), "a reply was answered");
                }
                Reaction::Forward(forward) => {
                    prop_assert_eq!(forward.query.as_slice(), bytes.as_slice());
                    prop_assert!(Message::from_vec(&forward.fail()).is_ok());
                }
            }
        }

        #[test]
        fn a_reply_of_any_bytes_is_checked_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Some(raw) = Raw::new(&bytes) {
                let _ = (raw.answers(raw), raw.truncated(), raw.rcode());
            }
        }
    }
}
