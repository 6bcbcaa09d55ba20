//! Where the store is, as its operator says.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Which store a server uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum StoreChoice {
    /// A file in the data directory.
    #[default]
    Embedded,
    /// An etcd, which several servers may share.
    Etcd(EtcdConfig),
}

impl fmt::Display for StoreChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("the embedded store"),
            Self::Etcd(config) => config.url.fmt(f),
        }
    }
}

/// An etcd and how to be let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// Its members and the prefix of all keys.
    pub url: EtcdUrl,
    /// The CA of its members' certificates; without it, TLS is not used.
    pub ca: Option<PathBuf>,
    /// Our certificate, where etcd wants one.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// The user to log in as, where etcd's authentication is on.
    pub user: Option<String>,
    /// The file with that user's password.
    pub password_file: Option<PathBuf>,
}

/// `etcd://HOST:PORT[,HOST:PORT]…[/PREFIX]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdUrl {
    /// `HOST:PORT` of each member.
    pub members: Vec<String>,
    /// Before every key: empty, or `/…` without a slash at its end.
    pub prefix: String,
}

/// A text that names no etcd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a store; write etcd://HOST:PORT, more members after commas, and perhaps /PREFIX")]
pub struct BadStore(String);

impl FromStr for EtcdUrl {
    type Err = BadStore;

    fn from_str(text: &str) -> Result<Self, BadStore> {
        let bad = || BadStore(text.chars().take(200).collect());
        let rest = text.strip_prefix("etcd://").ok_or_else(bad)?;
        let (members, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        // A password has no business on a command line.
        let good = |member: &str| {
            member.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty()
                    && !host.contains(['@', '?', '#', ' '])
                    && port.parse::<u16>().is_ok_and(|port| port > 0)
            })
        };
        let members: Vec<String> = members.split(',').map(str::to_owned).collect();
        let prefix = prefix.trim_end_matches('/');
        if !members.iter().all(|member| good(member)) || prefix.contains(['?', '#', ' ']) {
            return Err(bad());
        }
        let prefix = if prefix.is_empty() { String::new() } else { format!("/{prefix}") };
        Ok(Self { members, prefix })
    }
}

impl fmt::Display for EtcdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd://{}{}", self.members.join(","), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etcd_is_named_by_its_members_and_a_prefix() {
        let url: EtcdUrl = "etcd://10.0.0.1:2379,[fd00::1]:2379/blue/".parse().unwrap();
        assert_eq!(url.members, ["10.0.0.1:2379", "[fd00::1]:2379"]);
        assert_eq!(url.prefix, "/blue");
        assert_eq!(url.to_string(), "etcd://10.0.0.1:2379,[fd00::1]:2379/blue");
        assert_eq!("etcd://a:1".parse::<EtcdUrl>().unwrap().prefix, "");
        for bad in [
            "http://a:1",
            "etcd://",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:1,",
            "etcd://u:p@a:1",
            "etcd://a:1/x?y",
        ] {
            assert!(bad.parse::<EtcdUrl>().is_err(), "{bad}");
        }
    }
}
