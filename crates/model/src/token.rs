//! The join token: what a new host needs to prove itself and to know whom it talks to.
//!
//! ```text
//! dwj1.<id>.<secret>.<SHA-256 of the CA certificate, hexadecimal>
//! ```
//! The fingerprint makes trust on first use needless: the agent talks to nobody whose certificate this CA did not sign.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const VERSION: &str = "dwj1";

/// A SHA-256 digest, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct Fingerprint(pub [u8; 32]);

/// What a host joins with. Its secret is shown by nothing but [`JoinToken::reveal`].
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Names the token at the server.
    pub id: String,
    /// Proves that its holder may join.
    pub secret: String,
    /// The environment's CA.
    pub ca: Fingerprint,
}

/// Text that is not a join token, or not a fingerprint. It never quotes the text: that may be a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// Not of the form of a token.
    #[error(
        "the join token is not of the form dwj1.ID.SECRET.FINGERPRINT ({0}); copy it whole from `droveway token create`"
    )]
    Form(&'static str),
    /// Not a fingerprint.
    #[error("a fingerprint is 64 hexadecimal digits (SHA-256)")]
    Fingerprint,
}

impl JoinToken {
    /// The token as text, secret included.
    pub fn reveal(&self) -> String {
        format!("{VERSION}.{}.{}.{}", self.id, self.secret, self.ca)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, ..)", self.id)
    }
}

impl FromStr for JoinToken {
    type Err = InvalidToken;
    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [version, id, secret, ca] = parts[..] else {
            return Err(InvalidToken::Form("four parts are expected"));
        };
        if version != VERSION {
            return Err(InvalidToken::Form("it does not begin with dwj1"));
        }
        let plain = |part: &str, max| {
            (1..=max).contains(&part.len())
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        };
        if !plain(id, 32) || !plain(secret, 128) {
            return Err(InvalidToken::Form("a part is empty, too long, or has a foreign character"));
        }
        let ca =
            ca.parse().map_err(|_| InvalidToken::Form("its fingerprint is not 64 hexadecimal digits"))?;
        Ok(Self { id: id.to_owned(), secret: secret.to_owned(), ca })
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidToken;
    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(InvalidToken::Fingerprint);
        }
        let mut digest = [0; 32];
        for (octet, pair) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| InvalidToken::Fingerprint)?;
            *octet = u8::from_str_radix(pair, 16).map_err(|_| InvalidToken::Fingerprint)?;
        }
        Ok(Self(digest))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = InvalidToken;
    fn try_from(text: String) -> Result<Self, InvalidToken> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_and_hides_its_secret_from_debug() {
        let token = JoinToken { id: "ab3".into(), secret: "s3cret-x_y".into(), ca: Fingerprint([0xa5; 32]) };
        assert_eq!(token.reveal().parse::<JoinToken>().unwrap(), token);
        assert_eq!(format!(" {}\n", token.reveal()).parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains("s3cret"));
    }

    #[test]
    fn garbage_is_refused_without_being_quoted() {
        for bad in ["", "dwj1.a.b", "dwj2.a.b.c", "dwj1.a.SECRETSECRET.zz", "dwj1..b.c", "dwj1.a.b.c.d"] {
            let error = bad.parse::<JoinToken>().unwrap_err().to_string();
            assert!(error.contains("droveway token create") && !error.contains("SECRETSECRET"), "{error}");
        }
        assert!("+f".repeat(32).parse::<Fingerprint>().is_err());
    }
}
