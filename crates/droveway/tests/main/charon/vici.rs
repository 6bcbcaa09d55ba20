//! charon's control protocol (strongSwan's `src/libcharon/plugins/vici/README.md`): messages over a Unix socket, each a
//! tree of texts, lists and sections, the same that `swanctl.conf` is written in.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const CMD_REQUEST: u8 = 0;
const CMD_RESPONSE: u8 = 1;
const EVENT_REGISTER: u8 = 3;
const EVENT_CONFIRM: u8 = 5;
const EVENT: u8 = 7;

const SECTION_START: u8 = 1;
const SECTION_END: u8 = 2;
const KEY_VALUE: u8 = 3;
const LIST_START: u8 = 4;
const LIST_ITEM: u8 = 5;
const LIST_END: u8 = 6;

/// What a key has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Text(Vec<u8>),
    List(Vec<Vec<u8>>),
    Section(Section),
}

/// Keys and what they have, in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Section(Vec<(String, Value)>);

impl Section {
    pub fn text(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.0.push((key.to_owned(), Value::Text(value.as_ref().to_vec())));
        self
    }

    pub fn list<T: AsRef<[u8]>>(mut self, key: &str, values: impl IntoIterator<Item = T>) -> Self {
        let values = values.into_iter().map(|value| value.as_ref().to_vec()).collect();
        self.0.push((key.to_owned(), Value::List(values)));
        self
    }

    pub fn section(mut self, key: &str, value: Section) -> Self {
        self.0.push((key.to_owned(), Value::Section(value)));
        self
    }

    /// A text; empty if there is none.
    pub fn get(&self, key: &str) -> String {
        match self.find(key) {
            Some(Value::Text(text)) => String::from_utf8_lossy(text).into_owned(),
            Some(Value::List(_) | Value::Section(_)) | None => String::new(),
        }
    }

    /// A number; 0 if there is none.
    pub fn number(&self, key: &str) -> u64 {
        self.get(key).parse().unwrap_or_default()
    }

    pub fn texts(&self, key: &str) -> Vec<String> {
        match self.find(key) {
            Some(Value::List(list)) => {
                list.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect()
            }
            Some(Value::Text(_) | Value::Section(_)) | None => Vec::new(),
        }
    }

    /// The sections in it.
    pub fn sections(&self) -> impl Iterator<Item = (&str, &Section)> {
        self.0.iter().filter_map(|(key, value)| match value {
            Value::Section(section) => Some((key.as_str(), section)),
            Value::Text(_) | Value::List(_) => None,
        })
    }

    fn find(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    fn emit(&self, out: &mut Vec<u8>) {
        let name = |out: &mut Vec<u8>, kind: u8, key: &str| {
            out.extend([kind, u8::try_from(key.len()).unwrap()]);
            out.extend(key.as_bytes());
        };
        let value = |out: &mut Vec<u8>, value: &[u8]| {
            out.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
            out.extend(value);
        };
        for (key, found) in &self.0 {
            match found {
                Value::Text(text) => {
                    name(out, KEY_VALUE, key);
                    value(out, text);
                }
                Value::List(list) => {
                    name(out, LIST_START, key);
                    for item in list {
                        out.push(LIST_ITEM);
                        value(out, item);
                    }
                    out.push(LIST_END);
                }
                Value::Section(section) => {
                    name(out, SECTION_START, key);
                    section.emit(out);
                    out.push(SECTION_END);
                }
            }
        }
    }

    fn parse(from: &mut &[u8]) -> io::Result<Self> {
        let mut section = Self::default();
        while let Some((kind, rest)) = from.split_first() {
            *from = rest;
            let entry = match *kind {
                SECTION_END => break,
                KEY_VALUE => (name(from)?, Value::Text(value(from)?)),
                SECTION_START => (name(from)?, Value::Section(Self::parse(from)?)),
                LIST_START => {
                    let (key, mut list) = (name(from)?, Vec::new());
                    while take(from, 1)?[0] == LIST_ITEM {
                        list.push(value(from)?);
                    }
                    (key, Value::List(list))
                }
                _ => return Err(io::ErrorKind::InvalidData.into()),
            };
            section.0.push(entry);
        }
        Ok(section)
    }
}

fn take<'a>(from: &mut &'a [u8], length: usize) -> io::Result<&'a [u8]> {
    let (head, rest) = from.split_at_checked(length).ok_or(io::ErrorKind::UnexpectedEof)?;
    *from = rest;
    Ok(head)
}

fn name(from: &mut &[u8]) -> io::Result<String> {
    let length = take(from, 1)?[0].into();
    Ok(String::from_utf8_lossy(take(from, length)?).into_owned())
}

fn value(from: &mut &[u8]) -> io::Result<Vec<u8>> {
    let length = take(from, 2)?;
    Ok(take(from, u16::from_be_bytes([length[0], length[1]]).into())?.to_vec())
}

/// A connection to charon.
pub struct Vici(UnixStream);

impl Vici {
    /// `limit` is how long charon may take for an answer.
    pub fn connect(socket: &Path, limit: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(limit))?;
        Ok(Self(stream))
    }

    /// Asks for something; a refusal is an error with charon's own words.
    pub fn ask(&mut self, command: &str, message: &Section) -> io::Result<Section> {
        self.send(CMD_REQUEST, command, message)?;
        loop {
            if let (CMD_RESPONSE, _, answer) = self.receive()? {
                let refused = answer.get("success") == "no";
                return if refused { Err(io::Error::other(answer.get("errmsg"))) } else { Ok(answer) };
            }
        }
    }

    /// Asks for a list that comes as events.
    pub fn list(&mut self, command: &str, event: &str) -> io::Result<Vec<Section>> {
        self.send(EVENT_REGISTER, event, &Section::default())?;
        while self.receive()?.0 != EVENT_CONFIRM {}
        self.send(CMD_REQUEST, command, &Section::default())?;
        let mut events = Vec::new();
        loop {
            match self.receive()? {
                (EVENT, _, message) => events.push(message),
                (CMD_RESPONSE, _, _) => return Ok(events),
                _ => {}
            }
        }
    }

    fn send(&mut self, kind: u8, name: &str, message: &Section) -> io::Result<()> {
        let mut packet = vec![kind, u8::try_from(name.len()).unwrap()];
        packet.extend(name.as_bytes());
        message.emit(&mut packet);
        let length = u32::try_from(packet.len()).unwrap();
        self.0.write_all(&[&length.to_be_bytes()[..], &packet].concat())
    }

    fn receive(&mut self) -> io::Result<(u8, String, Section)> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length)?;
        let mut packet = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut packet)?;
        let mut rest = &packet[..];
        let kind = take(&mut rest, 1)?[0];
        let event = if kind == EVENT { name(&mut rest)? } else { String::new() };
        Ok((kind, event, Section::parse(&mut rest)?))
    }
}

#[test]
fn a_message_comes_back_as_it_was() {
    let inner = Section::default().text("id", "b").list("ts", ["10.0.0.0/8", "11.0.0.0/8"]);
    let message =
        Section::default().section("c", inner.clone()).text("version", "2").list::<&str>("none", []);
    let mut bytes = Vec::new();
    message.emit(&mut bytes);
    assert_eq!(Section::parse(&mut &bytes[..]).unwrap(), message);
    assert_eq!(message.number("version"), 2);
    assert_eq!(message.sections().collect::<Vec<_>>(), [("c", &inner)]);
    assert_eq!(inner.texts("ts"), ["10.0.0.0/8", "11.0.0.0/8"]);
    // The example of its documentation.
    let example = b"\x03\x04key1\x00\x06value1\x01\x08section1\x03\x05key21\x00\x07value21\x02";
    let section = Section::default().text("key21", "value21");
    let example_says = Section::default().text("key1", "value1").section("section1", section);
    assert_eq!(Section::parse(&mut &example[..]).unwrap(), example_says);
    assert!(Section::parse(&mut &example[..10]).is_err());
}
