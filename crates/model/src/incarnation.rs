//! Which life of a host's ledger speaks: each start of an agent begins another.
//!
//! The ledger keeps the incarnation that the server took last, and the next one from before it is told until it is taken.
//! The server takes an incarnation only from the holder of the one before: of two machines with the same ledger one goes
//! on, and the other is found out, whenever it comes. What each start draws and keeps in its memory alone tells the one
//! that has been running from all that have its ledger.
//!
//! Invariant: what a server may have taken is in the ledger: an agent that ends at any point knows what to go on from.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Fingerprint;

/// One life of a ledger: how many there were, and what tells it from another that is counted alike.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Incarnation {
    /// How many there were, this one included.
    pub number: u64,
    random: u64,
}

/// Text that is not an incarnation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an incarnation is a number, a hyphen and 16 hexadecimal digits")]
pub struct InvalidIncarnation;

/// From one incarnation to the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The one that the server is known to have taken; none at a host's first start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub from: Option<Incarnation>,
    /// The one that begins. The same again where a disk takes nothing: this start goes by the one before.
    #[schema(value_type = String, example = "7-00c0ffee00c0ffee")]
    pub to: Incarnation,
    /// What only this start knows. None where `to` was made by an earlier start, and nobody goes by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub secret: Option<StartSecret>,
}

/// What a start of an agent draws, and keeps in its memory alone: no copy of its state directory has it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StartSecret([u8; 32]);

/// Text that is not the secret of a start. It never quotes the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the secret of a start is 64 hexadecimal digits")]
pub struct InvalidStartSecret;

/// What a ledger knows of its lives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The one that the server took last, as far as is known.
    #[serde(default)]
    pub last: Option<Incarnation>,
    /// The one that it was told, or is about to be; it may have taken it.
    #[serde(default)]
    pub next: Option<Incarnation>,
}

impl Incarnation {
    /// The one after `last`.
    pub fn after(last: Option<&Self>, random: [u8; 8]) -> Self {
        let number = last.map_or(0, |last| last.number).saturating_add(1);
        Self { number, random: u64::from_be_bytes(random) }
    }
}

impl Lineage {
    /// What to tell the server: what it was told before and may have taken, else a new one.
    #[must_use]
    pub fn begin(&mut self, random: [u8; 8]) -> Step {
        let last = &self.last;
        let to = self.next.get_or_insert_with(|| Incarnation::after(last.as_ref(), random)).clone();
        Step { from: self.last.clone(), to, secret: None }
    }

    /// The server took it.
    pub fn taken(&mut self, to: &Incarnation) {
        self.last = Some(to.clone());
        if self.next.as_ref() == Some(to) {
            self.next = None;
        }
    }
}

impl StartSecret {
    /// Of fresh random bytes.
    pub fn from_random(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// What is kept of it is a digest of these.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for StartSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StartSecret(..)")
    }
}

impl TryFrom<String> for StartSecret {
    type Error = InvalidStartSecret;
    fn try_from(text: String) -> Result<Self, InvalidStartSecret> {
        let Fingerprint(bytes) = text.parse().map_err(|_| InvalidStartSecret)?;
        Ok(Self(bytes))
    }
}

impl From<StartSecret> for String {
    fn from(secret: StartSecret) -> Self {
        Fingerprint(secret.0).to_string()
    }
}

impl FromStr for Incarnation {
    type Err = InvalidIncarnation;
    fn from_str(text: &str) -> Result<Self, InvalidIncarnation> {
        let (number, random) = text.split_once('-').ok_or(InvalidIncarnation)?;
        let plain = number.bytes().all(|b| b.is_ascii_digit())
            && random.len() == 16
            && random.bytes().all(|b| b.is_ascii_hexdigit());
        let number = number.parse().ok().filter(|_| plain).ok_or(InvalidIncarnation)?;
        Ok(Self { number, random: u64::from_str_radix(random, 16).map_err(|_| InvalidIncarnation)? })
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.number, self.random)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Incarnation {
    type Error = InvalidIncarnation;
    fn try_from(text: String) -> Result<Self, InvalidIncarnation> {
        text.parse()
    }
}

impl From<Incarnation> for String {
    fn from(incarnation: Incarnation) -> Self {
        incarnation.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incarnation_reads_back_and_other_text_is_refused() {
        let first = Incarnation::after(None, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(first.to_string(), "1-0001020304050607");
        assert_eq!(first.to_string().parse(), Ok(first.clone()));
        assert_eq!(Incarnation::after(Some(&first), [255; 8]).to_string(), "2-ffffffffffffffff");
        for bad in ["", "1", "1-", "-1-0001020304050607", "1-+001020304050607", "x-0001020304050607", "1-0"] {
            assert_eq!(bad.parse::<Incarnation>(), Err(InvalidIncarnation), "{bad}");
        }
    }

    #[test]
    fn the_secret_of_a_start_is_written_in_full_on_the_wire_and_nowhere_else() {
        let secret = StartSecret::from_random([0xc0; 32]);
        assert_eq!(format!("{secret:?}"), "StartSecret(..)");
        let text = serde_json::to_string(&secret).unwrap();
        assert_eq!(text, format!("\"{}\"", "c0".repeat(32)));
        assert_eq!(serde_json::from_str::<StartSecret>(&text).unwrap(), secret);
        for bad in ["c0".repeat(31), "g0".repeat(32), "é".repeat(32)] {
            let error = StartSecret::try_from(bad.clone()).unwrap_err();
            assert!(!error.to_string().contains(&bad));
        }
    }

    #[test]
    fn what_was_told_is_told_again_until_it_is_taken() {
        let mut lineage = Lineage::default();
        let step = lineage.begin([1; 8]);
        assert_eq!((step.from.as_ref(), step.to.number), (None, 1));
        assert_eq!(lineage.begin([2; 8]), step);
        lineage.taken(&step.to);
        let second = lineage.begin([3; 8]);
        assert_eq!((second.from.as_ref(), second.to.number), (Some(&step.to), 2));
    }
}
