//! nftables: our table of a namespace, its skeleton and its elements.
//!
//! The skeleton is text that the `nft` program loads, whole and in one transaction. Elements come and go by netlink.
//! What a skeleton became in the kernel is remembered as the handles of its chains, rules and sets ([`Fingerprint`]):
//! as long as they are the same, nobody changed it.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use model::Mac;
use nix::errno::Errno;
use plan::object::{Family, Field, FieldType, Ifname, Set, TABLE, Table};
use plan::{Key, Object};

use crate::error::Error;
use crate::message::{Message, Request, attribute, attributes, text};
use crate::mirror::{Mirror, Shown};
use crate::netlink::{Answer, Refusal, Requests};
use crate::netns::Netns;
use crate::uapi::{
    NFNL_SUBSYS_NFTABLES, NFPROTO_BRIDGE, NFPROTO_INET, NFT_MSG_DELSETELEM, NFT_MSG_DELTABLE,
    NFT_MSG_GETCHAIN, NFT_MSG_GETRULE, NFT_MSG_GETSET, NFT_MSG_GETSETELEM, NFT_MSG_GETTABLE, NFT_MSG_NEWGEN,
    NFT_MSG_NEWSETELEM, NFTA_CHAIN_HANDLE, NFTA_CHAIN_POLICY, NFTA_DATA_VALUE, NFTA_LIST_ELEM,
    NFTA_RULE_HANDLE, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_LIST_ELEMENTS,
    NFTA_SET_ELEM_LIST_SET, NFTA_SET_HANDLE, NFTA_TABLE_FLAGS, NFTA_TABLE_HANDLE, NFTA_TABLE_NAME,
    NFTA_TABLE_USERDATA, NFTNL_UDATA_TABLE_COMMENT, NLM_F_CREATE,
};

/// What `observe` shows as the digest of a table that someone else changed.
pub(crate) const ALTERED: &str = "altered";

/// The families that we have tables in.
pub(crate) const FAMILIES: [Family; 2] = [Family::Inet, Family::Bridge];

/// The parts of a table in the kernel: kind, name or handle, policy. Elements are no part of it.
pub(crate) type Fingerprint = BTreeSet<(u8, Vec<u8>, Vec<u8>)>;

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
pub(crate) fn unload(requests: &mut Requests, family: Family) -> Result<(), Error> {
    let request = request(NFT_MSG_DELTABLE, 0, family).put_text(NFTA_TABLE_NAME, TABLE);
    match requests.transaction(vec![request]) {
        Ok(()) => Ok(()),
        Err(refusal) if refusal.errno == Errno::ENOENT => Ok(()),
        Err(refusal) => Err(refusal.to_error(format!("delete nft table {} {TABLE}", family.as_str()))),
    }
}

/// Adds an element, in place of one with the same key and the value `old`.
pub(crate) fn add(
    requests: &mut Requests,
    set: Set,
    key: &[Field],
    value: &[Field],
    replace: bool,
) -> Result<(), Refusal> {
    let new = element(NFT_MSG_NEWSETELEM, NLM_F_CREATE, set, key, Some(value));
    if !replace {
        return requests.transaction(vec![new]);
    }
    let old = element(NFT_MSG_DELSETELEM, 0, set, key, None);
    match requests.transaction(vec![old, new.clone()]) {
        Err(refusal) if refusal.errno == Errno::ENOENT => requests.transaction(vec![new]),
        outcome => outcome,
    }
}

/// Removes an element; not being there is fine.
pub(crate) fn remove(requests: &mut Requests, set: Set, key: &[Field]) -> Result<(), Refusal> {
    match requests.transaction(vec![element(NFT_MSG_DELSETELEM, 0, set, key, None)]) {
        Err(refusal) if refusal.errno == Errno::ENOENT => Ok(()),
        outcome => outcome,
    }
}

/// Takes in an event. Those about other tables are passed over.
pub(crate) fn take(mirror: &mut Mirror, shown: &mut Shown, message: &Message<'_>) {
    let [subsystem, kind] = message.kind.to_be_bytes();
    if u16::from(subsystem) != NFNL_SUBSYS_NFTABLES || kind == NFT_MSG_NEWGEN {
        return;
    }
    let Some(family) = message.payload.first().copied().and_then(family) else { return };
    let rest = message.payload.get(4..).unwrap_or_default();
    if attribute(rest, NFTA_TABLE_NAME).map(text).as_deref() != Some(TABLE) {
        return;
    }
    match kind {
        NFT_MSG_NEWSETELEM => take_elements(mirror, shown, family, rest, true),
        NFT_MSG_DELSETELEM => take_elements(mirror, shown, family, rest, false),
        _ => {
            mirror.stale.tables.insert(family);
        }
    }
}

/// Reads a table anew: whether it is there and as we made it, and all its elements.
///
/// `ours`: we have just loaded it, so it is what it should be.
pub(crate) fn reread(
    requests: &mut Requests,
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
        let request = request(NFT_MSG_GETSETELEM, 0, family)
            .put_text(NFTA_TABLE_NAME, TABLE)
            .put_text(NFTA_SET_ELEM_LIST_SET, set.name());
        let replies =
            absent_is_empty(requests.dump(&request)).map_err(|refusal| refusal.to_error(attempted()))?;
        for reply in replies {
            take_elements(mirror, shown, family, reply.payload.get(4..).unwrap_or_default(), true);
        }
    }
    Ok(())
}

fn read(requests: &mut Requests, family: Family) -> Result<Option<(String, Fingerprint)>, Refusal> {
    let table = request(NFT_MSG_GETTABLE, 0, family).put_text(NFTA_TABLE_NAME, TABLE);
    let Some(table) = absent_is_empty(requests.request(table))?.pop() else { return Ok(None) };
    let table = table.payload.get(4..).unwrap_or_default();
    let mut fingerprint = Fingerprint::new();
    let part = |kind: u8, bytes: &[u8], name: u16, policy: u16| {
        let value = |wanted| attribute(bytes, wanted).unwrap_or_default().to_vec();
        (kind, value(name), value(policy))
    };
    fingerprint.insert(part(NFT_MSG_GETTABLE, table, NFTA_TABLE_HANDLE, NFTA_TABLE_FLAGS));
    for (kind, name, policy) in [
        (NFT_MSG_GETCHAIN, NFTA_CHAIN_HANDLE, NFTA_CHAIN_POLICY),
        (NFT_MSG_GETRULE, NFTA_RULE_HANDLE, u16::MAX),
        (NFT_MSG_GETSET, NFTA_SET_HANDLE, u16::MAX),
    ] {
        let request = request(kind, 0, family).put_text(NFTA_TABLE_NAME, TABLE);
        for reply in absent_is_empty(requests.dump(&request))? {
            let rest = reply.payload.get(4..).unwrap_or_default();
            if attribute(rest, NFTA_TABLE_NAME).map(text).as_deref() == Some(TABLE) {
                fingerprint.insert(part(kind, rest, name, policy));
            }
        }
    }
    Ok(Some((comment(table), fingerprint)))
}

/// The comment in a table's user data: type, length, text with NUL (libnftnl `udata.h`).
fn comment(table: &[u8]) -> String {
    let mut data = attribute(table, NFTA_TABLE_USERDATA).unwrap_or_default();
    while let [kind, length, rest @ ..] = data {
        let (value, next) = rest.split_at_checked(usize::from(*length)).unwrap_or((rest, &[]));
        if *kind == NFTNL_UDATA_TABLE_COMMENT {
            return text(value);
        }
        data = next;
    }
    String::new()
}

fn absent_is_empty(answer: Answer) -> Answer {
    match answer {
        // No such table or set; or a kernel without nftables, which has none either.
        Err(refusal) if matches!(refusal.errno, Errno::ENOENT | Errno::EOPNOTSUPP) => Ok(Vec::new()),
        answer => answer,
    }
}

fn take_elements(mirror: &mut Mirror, shown: &mut Shown, family: Family, message: &[u8], present: bool) {
    let name = attribute(message, NFTA_SET_ELEM_LIST_SET).map(text).unwrap_or_default();
    let Some(set) = Set::ALL.into_iter().find(|set| set.family() == family && set.name() == name) else {
        return;
    };
    let elements = attribute(message, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    for (_, element) in attributes(elements) {
        let fields = |kind, types| {
            attribute(element, kind)
                .and_then(|data| attribute(data, NFTA_DATA_VALUE))
                .map_or(Some(Vec::new()), |bytes| decode(types, bytes))
        };
        let Some(key) = fields(NFTA_SET_ELEM_KEY, set.key()).filter(|key| !key.is_empty()) else { continue };
        let Some(value) = fields(NFTA_SET_ELEM_DATA, set.value()) else { continue };
        mirror.set(shown, Key::Element(set, key), present.then_some(Object::Element(value)));
    }
}

fn element(kind: u8, flags: u16, set: Set, key: &[Field], value: Option<&[Field]>) -> Request {
    let value = value.filter(|value| !value.is_empty());
    request(kind, flags, set.family())
        .put_text(NFTA_TABLE_NAME, TABLE)
        .put_text(NFTA_SET_ELEM_LIST_SET, set.name())
        .nest(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
            list.nest(NFTA_LIST_ELEM, |element| {
                let element = element.nest(NFTA_SET_ELEM_KEY, |data| data.put(NFTA_DATA_VALUE, &encode(key)));
                match value {
                    Some(value) => {
                        element.nest(NFTA_SET_ELEM_DATA, |data| data.put(NFTA_DATA_VALUE, &encode(value)))
                    }
                    None => element,
                }
            })
        })
}

fn request(kind: u8, flags: u16, family: Family) -> Request {
    let number = match family {
        Family::Inet => NFPROTO_INET,
        Family::Bridge => NFPROTO_BRIDGE,
    };
    Request::new(NFNL_SUBSYS_NFTABLES << 8 | u16::from(kind), flags, &[number, 0, 0, 0])
}

fn family(number: u8) -> Option<Family> {
    match number {
        NFPROTO_INET => Some(Family::Inet),
        NFPROTO_BRIDGE => Some(Family::Bridge),
        _ => None,
    }
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
}
