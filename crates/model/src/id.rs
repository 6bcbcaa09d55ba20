//! Identifiers and names. Each is a newtype that can only be made from valid text.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Length of the random part of an id, in base-32 characters (50 bits).
pub const RANDOM_LEN: usize = 10;
/// Length of what an id begins with.
const PREFIX_LEN: usize = 2;
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";

/// Text that is not an id or a name of the kind that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {text:?} is not valid: {rule}")]
pub struct InvalidId {
    what: &'static str,
    text: String,
    rule: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String)]
        pub struct $name(IdText);

        impl $name {
            /// What every id of this kind begins with.
            pub const PREFIX: &'static str = $prefix;

            /// An id from eight random bytes.
            pub fn from_random(random: [u8; 8]) -> Self {
                Self(IdText::from_random($prefix, random))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The random part alone: short enough for a device name.
            pub fn short(&self) -> &str {
                &self.as_str()[$prefix.len()..]
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                IdText::parse($prefix, text).map(Self).ok_or_else(|| InvalidId {
                    what: $what,
                    text: shorten(text),
                    rule: concat!("it is \"", $prefix, "\" and ten characters of a-z and 2-9"),
                })
            }
        }

        id!(@text $name);
    };
    (@text $name:ident) => {
        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A machine that runs the agent.
    HostId, "h-", "host id"
);
id!(
    /// A network.
    NetworkId, "n-", "network id"
);
id!(
    /// One attachment of a container to a network.
    EndpointId, "e-", "endpoint id"
);

id!(
    /// A foreign peer: a box of another make that a network is joined to.
    PeerId, "p-", "peer id"
);

/// The text of an id, in place: ids are the keys of everything, and copying one asks for no memory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct IdText([u8; PREFIX_LEN + RANDOM_LEN]);

impl IdText {
    fn from_random(prefix: &str, random: [u8; 8]) -> Self {
        let mut text = [0; PREFIX_LEN + RANDOM_LEN];
        for (to, from) in text.iter_mut().zip(prefix.bytes().chain(random_part(random))) {
            *to = from;
        }
        Self(text)
    }

    fn parse(prefix: &str, text: &str) -> Option<Self> {
        let random = text.strip_prefix(prefix)?;
        let good = random.bytes().all(|byte| ALPHABET.contains(&byte));
        text.as_bytes().try_into().ok().filter(|_| good).map(Self)
    }
}

impl Deref for IdText {
    type Target = str;
    fn deref(&self) -> &str {
        // It was made of ASCII.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl From<IdText> for String {
    fn from(text: IdText) -> String {
        String::from(&*text)
    }
}

/// A name of a host, network, container, stack or service: what people type and DNS answers.
///
/// 1 to 63 characters of `a-z A-Z 0-9 _ . -`, the first a letter or digit (Docker's rule for containers).
/// Comparison is exact; DNS compares without case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct Name(Box<str>);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let first_good = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let rest_good = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if first_good && rest_good && text.len() <= 63 {
            Ok(Self(text.into()))
        } else {
            Err(InvalidId {
                what: "name",
                text: shorten(text),
                rule: "use 1 to 63 of a-z A-Z 0-9 _ . - and begin with a letter or digit",
            })
        }
    }
}
id!(@text Name);

/// An environment: hosts, networks and stacks that trust one CA. Written like a lower-case [`Name`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct EnvironmentId(Box<str>);

impl EnvironmentId {
    /// The environment as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for EnvironmentId {
    fn default() -> Self {
        Self("default".into())
    }
}

impl FromStr for EnvironmentId {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let good = !text.is_empty()
            && text.len() <= 32
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !text.starts_with('-');
        if good {
            Ok(Self(text.into()))
        } else {
            Err(InvalidId {
                what: "environment",
                text: shorten(text),
                rule: "use 1 to 32 of a-z 0-9 - and begin with a letter or digit",
            })
        }
    }
}
id!(@text EnvironmentId);

/// The life of a store: a restored store begins a new one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct Epoch(Box<str>);

impl Epoch {
    /// A new epoch from eight random bytes.
    pub fn from_random(random: [u8; 8]) -> Self {
        Self(random_part(random).map(char::from).collect::<String>().into())
    }
}

impl FromStr for Epoch {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        if text.len() == RANDOM_LEN && text.bytes().all(|b| ALPHABET.contains(&b)) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidId { what: "epoch", text: shorten(text), rule: "it is ten characters of a-z and 2-9" })
        }
    }
}
id!(@text Epoch);

/// The number of the store's state: it grows by one with each transaction that changes something.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "02:1f:00:aa:bb:cc")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A unicast, locally administered address from random bytes (IEEE 802, bits 0 and 1 of the first octet).
    pub fn from_random(mut random: [u8; 6]) -> Self {
        random[0] = (random[0] & 0xfc) | 0x02;
        Self(random)
    }
}

impl FromStr for Mac {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let bad = || InvalidId {
            what: "MAC address",
            text: shorten(text),
            rule: "write six hexadecimal octets, as in 02:1f:00:aa:bb:cc",
        };
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts
                .next()
                .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
                .ok_or_else(bad)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(octets)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.map(|octet| format!("{octet:02x}")).join(":"))
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn random_part(random: [u8; 8]) -> impl Iterator<Item = u8> {
    let bits = u64::from_be_bytes(random);
    (0..RANDOM_LEN).map(move |digit| ALPHABET[(bits >> (5 * digit) & 31) as usize])
}

/// Bad text is quoted in errors: never more of it than a person needs to recognise it.
fn shorten(text: &str) -> String {
    if text.chars().count() <= 64 {
        text.to_owned()
    } else {
        text.chars().take(61).chain("...".chars()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_its_prefix_and_ten_characters_and_parses_back() {
        let id = NetworkId::from_random([1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(id.as_str().len(), 12);
        assert_eq!(id.as_str().parse::<NetworkId>().unwrap(), id);
        assert!(id.as_str().parse::<HostId>().is_err(), "an id of another kind is refused");
    }

    #[test]
    fn names_follow_dockers_rule_and_an_error_says_it() {
        for good in ["db", "a", "rocket-chat", "my_app.1", "9lives"] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "a b", "a/b", "é", &"a".repeat(64)] {
            let error = bad.parse::<Name>().unwrap_err().to_string();
            assert!(error.contains("begin with a letter or digit"), "{error}");
        }
    }

    #[test]
    fn a_random_mac_is_unicast_and_locally_administered() {
        for first in 0..=255 {
            let mac = Mac::from_random([first, 1, 2, 3, 4, 5]);
            assert_eq!(mac.0[0] & 3, 2);
            assert_eq!(mac.to_string().parse::<Mac>().unwrap(), mac);
        }
        assert!("02:00:00:00:00".parse::<Mac>().is_err());
        assert!("02:00:00:00:00:00:00".parse::<Mac>().is_err());
        assert!("+2:00:00:00:00:00".parse::<Mac>().is_err());
    }
}
