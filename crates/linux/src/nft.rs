//! nftables: our table of a namespace, its skeleton and its elements.
//!
//! The skeleton is text that the `nft` program loads, whole and in one transaction. Elements come and go by netlink.
//! What a skeleton became in the kernel is remembered as the handles of its chains, rules and sets ([`Fingerprint`]):
//! as long as they are the same, nobody changed it.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};

use model::Mac;
use netlink_packet_core::{Emitable, NLM_F_CREATE, NetlinkPayload, NlasIterator, parse_string};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage,
    SetAttribute, SetElementAttribute, SetElementList, SetElementMessage, SetMessage, TableAttribute,
    TableMessage,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use nix::errno::Errno;
use nix::libc;
use plan::object::{Family, Field, FieldType, Ifname, Set, TABLE, Table};
use plan::{Key, Object};

use crate::error::Error;
use crate::mirror::{Mirror, Shown};
use crate::netlink::{Answer, Incoming, Refusal, Request, Requests, request, unread};
use crate::netns::Netns;

/// The name of the table: the same attribute in messages about tables, chains, rules, sets, elements and objects.
const NFTA_TABLE_NAME: u16 = 1;
/// The comment, in a table's user data (libnftnl `udata.h`).
const NFTNL_UDATA_TABLE_COMMENT: u8 = 0;

/// What `observe` shows as the digest of a table that someone else changed.
pub(crate) const ALTERED: &str = "altered";

/// The families that we have tables in.
pub(crate) const FAMILIES: [Family; 2] = [Family::Inet, Family::Bridge];

/// The parts of a table in the kernel, by their handles. Elements are no part of it.
pub(crate) type Fingerprint = BTreeSet<Part>;

/// A part of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    Table { handle: u64, flags: u32 },
    Chain { handle: u64, policy: Option<u32> },
    Rule { handle: u64 },
    Set { handle: u64 },
}

/// Loads the skeleton in place of the one that is there.
pub(crate) fn load(ns: &Netns, family: Family, table: &Table) -> Result<(), Error> {
    let family = family.as_str();
    let script = format!("add table {family} {TABLE}\ndelete table {family} {TABLE}\n{}\n", table.text);
    let attempted = || format!("load nft table {family} {TABLE}");
    let output = ns
        .run(|| -> io::Result<_> {
            let mut child = Command::new("nft")
                .args(["-f", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()?;
            if let Some(mut input) = child.stdin.take() {
                // A program that stops reading says on its other end why.
                let _ = input.write_all(script.as_bytes());
            }
            child.wait_with_output()
        })?
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::words(attempted(), "the nft program is not there")
                .with_remedy("install nftables (Debian: apt-get install nftables)"),
            _ => Error::io(attempted(), &error),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().take(4).map(str::trim).collect::<Vec<_>>().join(" ");
    Err(Error::words(attempted(), said))
}

/// Removes the table; not being there is fine.
pub(crate) fn unload(requests: &mut Requests<NetfilterMessage>, family: Family) -> Result<(), Error> {
    let delete = NfTablesMessage::DeleteTable(TableMessage { attributes: vec![named()] });
    match requests.transaction(vec![of(family, delete, 0)]) {
        Ok(()) => Ok(()),
        Err(refusal) if refusal.errno == Errno::ENOENT => Ok(()),
        Err(refusal) => Err(refusal.to_error(format!("delete nft table {} {TABLE}", family.as_str()))),
    }
}

/// Adds an element, in place of one with the same key and the value `old`.
pub(crate) fn add(
    requests: &mut Requests<NetfilterMessage>,
    set: Set,
    key: &[Field],
    value: &[Field],
    replace: bool,
) -> Result<(), Refusal> {
    let new = of(set.family(), NfTablesMessage::NewSetElement(element(set, key, value)), NLM_F_CREATE);
    if !replace {
        return requests.transaction(vec![new]);
    }
    match requests.transaction(vec![removal(set, key), new.clone()]) {
        Err(refusal) if refusal.errno == Errno::ENOENT => requests.transaction(vec![new]),
        outcome => outcome,
    }
}

/// Removes an element; not being there is fine.
pub(crate) fn remove(
    requests: &mut Requests<NetfilterMessage>,
    set: Set,
    key: &[Field],
) -> Result<(), Refusal> {
    match requests.transaction(vec![removal(set, key)]) {
        Err(refusal) if refusal.errno == Errno::ENOENT => Ok(()),
        outcome => outcome,
    }
}

/// Takes in an event. Those about other tables are passed over. What cannot be read, or is about more than elements,
/// means that the table is to be read anew.
pub(crate) fn take(mirror: &mut Mirror, shown: &mut Shown, message: &Incoming<'_>) {
    let Some(family) = concerns(message.payload()) else { return };
    match message.read::<NetfilterMessage>() {
        Ok(NetlinkPayload::InnerMessage(read)) => match read.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(elements)) => {
                take_elements(mirror, shown, family, &elements, true);
            }
            NetfilterMessageInner::NfTables(NfTablesMessage::DeleteSetElement(elements)) => {
                take_elements(mirror, shown, family, &elements, false);
            }
            _ => drop(mirror.stale.tables.insert(family)),
        },
        Ok(_) => {}
        Err(error) => {
            unread(message.header, &error);
            mirror.stale.tables.insert(family);
        }
    }
}

/// The family of our table that the message is about. Others' are not read further: they may be of any shape.
fn concerns(payload: &[u8]) -> Option<Family> {
    let header = NetfilterHeader::parse(payload).ok()?;
    let family = FAMILIES.into_iter().find(|family| number(*family) == header.family)?;
    NlasIterator::new(payload.get(header.buffer_len()..)?)
        .flatten()
        .find(|attribute| attribute.kind() == NFTA_TABLE_NAME)
        .and_then(|attribute| parse_string(attribute.value()).ok())
        .filter(|name| name == TABLE)
        .map(|_| family)
}

/// Reads a table anew: whether it is there and as we made it, and all its elements.
///
/// `ours`: we have just loaded it, so it is what it should be.
pub(crate) fn reread(
    requests: &mut Requests<NetfilterMessage>,
    mirror: &mut Mirror,
    shown: &mut Shown,
    family: Family,
    ours: bool,
) -> Result<(), Error> {
    mirror.drop_from(shown, |key| match key {
        Key::Table(other) => *other == family,
        Key::Element(set, _) => set.family() == family,
        _ => false,
    });
    let attempted = || format!("read nft table {} {TABLE}", family.as_str());
    let Some((digest, fingerprint)) =
        read(requests, family).map_err(|refusal| refusal.to_error(attempted()))?
    else {
        mirror.fingerprints.remove(&family);
        return Ok(());
    };
    let known = if ours { None } else { mirror.fingerprints.get(&family) };
    let digest = match known {
        Some(known) if *known != fingerprint => ALTERED.to_owned(),
        Some(_) => digest,
        None => {
            mirror.fingerprints.insert(family, fingerprint);
            digest
        }
    };
    mirror.set(shown, Key::Table(family), Some(Object::Table(Table { text: String::new(), digest })));
    for set in Set::ALL.into_iter().filter(|set| set.family() == family) {
        let attributes =
            vec![SetElementList::Table(TABLE.to_owned()), SetElementList::Set(set.name().to_owned())];
        let query = NfTablesMessage::GetSetElement(SetElementMessage { attributes });
        let replies = absent_is_empty(requests.dump(&of(family, query, 0)))
            .map_err(|refusal| refusal.to_error(attempted()))?;
        for reply in replies {
            if let NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(elements)) = reply.inner {
                take_elements(mirror, shown, family, &elements, true);
            }
        }
    }
    Ok(())
}

/// What the table has in its comment, and what it is made of.
fn read(
    requests: &mut Requests<NetfilterMessage>,
    family: Family,
) -> Result<Option<(String, Fingerprint)>, Refusal> {
    let query = NfTablesMessage::GetTable(TableMessage { attributes: vec![named()] });
    let replies = absent_is_empty(requests.request(of(family, query, 0)))?;
    let Some(attributes) = replies.into_iter().find_map(|reply| match reply.inner {
        NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) => Some(table.attributes),
        _ => None,
    }) else {
        return Ok(None);
    };
    let (mut handle, mut flags, mut digest) = (0, 0, String::new());
    for attribute in attributes {
        match attribute {
            TableAttribute::Handle(number) => handle = number,
            TableAttribute::Flags(bits) => flags = bits.bits(),
            TableAttribute::UserData(data) => digest = comment(&data),
            _ => {}
        }
    }
    let mut fingerprint = Fingerprint::from([Part::Table { handle, flags }]);
    let chains = ChainMessage { attributes: vec![ChainAttribute::Table(TABLE.to_owned())] };
    let rules = RuleMessage { attributes: vec![RuleAttribute::Table(TABLE.to_owned())] };
    let sets = SetMessage { attributes: vec![SetAttribute::Table(TABLE.to_owned())] };
    for query in
        [NfTablesMessage::GetChain(chains), NfTablesMessage::GetRule(rules), NfTablesMessage::GetSet(sets)]
    {
        let replies = absent_is_empty(requests.dump(&of(family, query, 0)))?;
        fingerprint.extend(replies.iter().filter_map(|reply| match &reply.inner {
            NetfilterMessageInner::NfTables(message) => part(message),
            _ => None,
        }));
    }
    Ok(Some((digest, fingerprint)))
}

/// The part of our table that a message shows.
fn part(message: &NfTablesMessage) -> Option<Part> {
    let (mut ours, mut handle, mut policy) = (false, 0, None);
    match message {
        NfTablesMessage::NewChain(chain) => {
            for attribute in &chain.attributes {
                match attribute {
                    ChainAttribute::Table(name) => ours = name == TABLE,
                    ChainAttribute::Handle(number) => handle = *number,
                    ChainAttribute::Policy(number) => policy = Some(*number),
                    _ => {}
                }
            }
            ours.then_some(Part::Chain { handle, policy })
        }
        NfTablesMessage::NewRule(rule) => {
            for attribute in &rule.attributes {
                match attribute {
                    RuleAttribute::Table(name) => ours = name == TABLE,
                    RuleAttribute::Handle(number) => handle = *number,
                    _ => {}
                }
            }
            ours.then_some(Part::Rule { handle })
        }
        NfTablesMessage::NewSet(set) => {
            for attribute in &set.attributes {
                match attribute {
                    SetAttribute::Table(name) => ours = name == TABLE,
                    SetAttribute::Handle(number) => handle = *number,
                    _ => {}
                }
            }
            ours.then_some(Part::Set { handle })
        }
        _ => None,
    }
}

/// The comment in a table's user data: type, length, text with NUL.
fn comment(mut data: &[u8]) -> String {
    while let [kind, length, rest @ ..] = data {
        let (value, next) = rest.split_at_checked(usize::from(*length)).unwrap_or((rest, &[]));
        if *kind == NFTNL_UDATA_TABLE_COMMENT {
            return text(value);
        }
        data = next;
    }
    String::new()
}

fn absent_is_empty(answer: Answer<NetfilterMessage>) -> Answer<NetfilterMessage> {
    match answer {
        // No such table or set; or a kernel without nftables, which has none either.
        Err(refusal) if matches!(refusal.errno, Errno::ENOENT | Errno::EOPNOTSUPP) => Ok(Vec::new()),
        answer => answer,
    }
}

fn take_elements(
    mirror: &mut Mirror,
    shown: &mut Shown,
    family: Family,
    message: &SetElementMessage,
    present: bool,
) {
    let Some(set) = message.attributes.iter().find_map(|attribute| match attribute {
        SetElementList::Set(name) => {
            Set::ALL.into_iter().find(|set| set.family() == family && set.name() == name)
        }
        _ => None,
    }) else {
        return;
    };
    let elements = message.attributes.iter().filter_map(|attribute| match attribute {
        SetElementList::Elements(elements) => Some(elements),
        _ => None,
    });
    for element in elements.flatten() {
        let ListAttribute::Element(element) = element else { continue };
        let (mut key, mut value) = (None, Some(Vec::new()));
        for attribute in element {
            match attribute {
                SetElementAttribute::Key(data) => key = fields(set.key(), data),
                SetElementAttribute::Data(data) => value = fields(set.value(), data),
                _ => {}
            }
        }
        if let (Some(key), Some(value)) = (key, value) {
            mirror.set(shown, Key::Element(set, key), present.then_some(Object::Element(value)));
        }
    }
}

fn fields(types: &[FieldType], data: &DataAttribute) -> Option<Vec<Field>> {
    match data {
        DataAttribute::Value(bytes) => decode(types, bytes),
        _ => None,
    }
}

fn element(set: Set, key: &[Field], value: &[Field]) -> SetElementMessage {
    let mut element = vec![SetElementAttribute::Key(DataAttribute::Value(encode(key)))];
    if !value.is_empty() {
        element.push(SetElementAttribute::Data(DataAttribute::Value(encode(value))));
    }
    SetElementMessage {
        attributes: vec![
            SetElementList::Table(TABLE.to_owned()),
            SetElementList::Set(set.name().to_owned()),
            SetElementList::Elements(vec![ListAttribute::Element(element)]),
        ],
    }
}

fn removal(set: Set, key: &[Field]) -> Request<NetfilterMessage> {
    of(set.family(), NfTablesMessage::DeleteSetElement(element(set, key, &[])), 0)
}

fn named() -> TableAttribute {
    TableAttribute::Name(TABLE.to_owned())
}

/// A request about tables of that family.
fn of(family: Family, message: NfTablesMessage, flags: u16) -> Request<NetfilterMessage> {
    const VERSION: u8 = libc::NFNETLINK_V0 as u8;
    request(NetfilterMessage::new(NetfilterHeader::new(number(family), VERSION, 0), message), flags)
}

fn number(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::Inet => NetfilterProtoFamily::Inet,
        Family::Bridge => NetfilterProtoFamily::Bridge,
    }
}

/// Text up to its NUL.
fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Fields as the registers hold them: concatenated, each filled up to four bytes.
fn encode(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in fields {
        match field {
            Field::Ifname(name) => {
                let end = bytes.len() + 16;
                bytes.extend_from_slice(name.as_str().as_bytes());
                bytes.resize(end, 0);
            }
            Field::Mac(mac) => bytes.extend_from_slice(&mac.0),
            Field::Ipv4(address) => bytes.extend_from_slice(&address.octets()),
            Field::Ipv6(address) => bytes.extend_from_slice(&address.octets()),
            Field::Port(port) => bytes.extend_from_slice(&port.to_be_bytes()),
            Field::Protocol(protocol) => bytes.push(*protocol),
        }
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// The inverse of [`encode`].
fn decode(types: &[FieldType], mut bytes: &[u8]) -> Option<Vec<Field>> {
    types
        .iter()
        .map(|kind| {
            let length: usize = match kind {
                FieldType::Ifname => 16,
                FieldType::Mac => 6,
                FieldType::Ipv4 => 4,
                FieldType::Ipv6 => 16,
                FieldType::Port => 2,
                FieldType::Protocol => 1,
            };
            let value = bytes.get(..length)?;
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
            match kind {
                FieldType::Ifname => Some(Field::Ifname(Ifname::new(&text(value)))),
                FieldType::Mac => value.try_into().ok().map(|mac| Field::Mac(Mac(mac))),
                FieldType::Ipv4 => {
                    <[u8; 4]>::try_from(value).ok().map(|octets| Field::Ipv4(Ipv4Addr::from(octets)))
                }
                FieldType::Ipv6 => {
                    <[u8; 16]>::try_from(value).ok().map(|octets| Field::Ipv6(Ipv6Addr::from(octets)))
                }
                FieldType::Port => value.try_into().ok().map(|port| Field::Port(u16::from_be_bytes(port))),
                FieldType::Protocol => value.first().map(|protocol| Field::Protocol(*protocol)),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_elements_fields_are_filled_up_to_registers_and_read_back() {
        let fields = [
            Field::Ifname(Ifname::new("dw1")),
            Field::Mac(Mac([2, 1, 2, 3, 4, 5])),
            Field::Ipv4(Ipv4Addr::new(10, 42, 0, 9)),
            Field::Port(4789),
            Field::Protocol(17),
        ];
        let bytes = encode(&fields);
        assert_eq!(bytes.len(), 16 + 8 + 4 + 4 + 4);
        assert_eq!(&bytes[16..], [2, 1, 2, 3, 4, 5, 0, 0, 10, 42, 0, 9, 0x12, 0xb5, 0, 0, 17, 0, 0, 0]);
        let types =
            [FieldType::Ifname, FieldType::Mac, FieldType::Ipv4, FieldType::Port, FieldType::Protocol];
        assert_eq!(decode(&types, &bytes).unwrap(), fields);
        assert_eq!(decode(&types, &bytes[..30]), None, "what is cut short is no element");
    }

    #[test]
    fn an_event_about_our_table_that_cannot_be_read_makes_it_be_read_anew_and_others_are_passed_over() {
        const NEW_ELEMENT: u16 = u16::from_be_bytes([10, 12]);
        let attribute = |kind: u16, value: &[u8]| {
            let length = u16::try_from(value.len() + 4).unwrap();
            let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
            bytes.extend_from_slice(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        for (table, stale) in [("droveway", true), ("docker", false)] {
            let mut mirror = Mirror::new(plan::Place::Host);
            mirror.stale.tables.clear();
            let name = attribute(NFTA_TABLE_NAME, format!("{table}\0").as_bytes());
            // A name of a set that is no text.
            let body = [&[1, 0, 0, 0][..], &name, &attribute(2, &[0xff, 0xff, 0])].concat();
            let mut bytes = u32::try_from(16 + body.len()).unwrap().to_ne_bytes().to_vec();
            bytes.extend(NEW_ELEMENT.to_ne_bytes());
            bytes.resize(16, 0);
            bytes.extend(body);
            let message = crate::netlink::messages(&bytes).next().unwrap();
            take(&mut mirror, &mut Shown::new(), &message);
            assert_eq!(mirror.stale.tables.contains(&Family::Inet), stale, "{table}");
        }
    }
}
