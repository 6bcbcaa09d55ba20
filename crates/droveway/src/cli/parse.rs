//! Values of options: text in, words of the model out. An error says what to write instead.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use reqwest::Url;

/// `KEY=VALUE`.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) => Ok((label_key(key)?, value.to_owned())),
        None => Err("write KEY=VALUE, for example zone=north".to_owned()),
    }
}

/// `KEY=VALUE` to set, `KEY-` to remove.
pub(super) fn label_change(text: &str) -> Result<(String, Option<String>), String> {
    match (text.split_once('='), text.strip_suffix('-')) {
        (Some((key, value)), _) => Ok((label_key(key)?, Some(value.to_owned()))),
        (None, Some(key)) => Ok((label_key(key)?, None)),
        (None, None) => Err("write KEY=VALUE to set a label, KEY- to remove it".to_owned()),
    }
}

fn label_key(key: &str) -> Result<String, String> {
    if key.is_empty() || key.contains(|c: char| c.is_whitespace() || c.is_control()) {
        Err("a label's key is at least one character and has no spaces".to_owned())
    } else {
        Ok(key.to_owned())
    }
}

/// A span of time in seconds: `90s`, `30m`, `24h`, `7d`, `2w`, or several in a row.
pub(super) fn ttl(text: &str) -> Result<u64, String> {
    let wrong = || "write a number and a unit of s, m, h, d or w, for example 24h or 1h30m".to_owned();
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let mut after = rest[digits..].chars();
        let unit = match after.next() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3_600,
            Some('d') => 86_400,
            Some('w') => 604_800,
            Some(_) | None => return Err(wrong()),
        };
        total = number.checked_mul(unit).and_then(|seconds| total.checked_add(seconds)).ok_or_else(wrong)?;
        rest = after.as_str();
    }
    if total == 0 { Err(wrong()) } else { Ok(total) }
}

/// A block's prefix length: `/26` or `26`.
pub(super) fn block_size(text: &str) -> Result<u8, String> {
    match text.strip_prefix('/').unwrap_or(text).parse() {
        Ok(prefix @ 20..=29) => Ok(prefix),
        Ok(_) | Err(_) => {
            Err("write a prefix length from /20 to /29; /26 is 64 addresses, /24 is 256".to_owned())
        }
    }
}

/// The port of tunnels. On port 500 IKE has no marker that would tell it from ESP (RFC 7296 §2.23).
pub(super) fn tunnel_port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(500) => {
            Err("500 is IKE's own port, where ESP cannot be; write another, for example 4501".to_owned())
        }
        Ok(port @ 1..) => Ok(port),
        Ok(0) | Err(_) => Err("write a port from 1 to 65535".to_owned()),
    }
}

/// How many pairs of threads the packet path has.
pub(super) fn workers(text: &str) -> Result<usize, String> {
    let most = agent::dataplane::WORKERS_MAX;
    let count = text.parse().ok().filter(|count| (1..=most).contains(count));
    count.ok_or_else(|| format!("write a number from 1 to {most}"))
}

/// Where to listen: an address and a port.
pub(super) fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "write ADDRESS:PORT, for example 0.0.0.0:7443 or [::]:7443".to_owned())
}

/// An address with a prefix length.
pub(super) fn subnet(text: &str) -> Result<IpNet, String> {
    text.parse().map_err(|_| match text.parse::<IpAddr>() {
        Ok(_) => format!("write it with a prefix length, for example {text}/16"),
        Err(_) => "write an address and a prefix length, for example 10.43.0.0/16".to_owned(),
    })
}

/// The name or id of something that is there.
pub(super) fn reference(text: &str) -> Result<String, String> {
    match text {
        "" | "." | ".." => Err("write a name or an id".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// Where the server is: `https://HOST:PORT`; `https://` may be left out.
pub(super) fn server_url(text: &str) -> Result<Url, String> {
    let wrong = || "write https://HOST:PORT, for example https://10.0.0.5:7443".to_owned();
    let full = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let url: Url = full.parse().map_err(|_| wrong())?;
    let bare = url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none();
    if url.scheme() == "https" && url.has_host() && bare { Ok(url) } else { Err(wrong()) }
}

/// Docker's socket: `unix:///run/docker.sock` or the path alone.
pub(super) fn docker_socket(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    if path.starts_with('/') {
        Ok(path.into())
    } else {
        Err("only a Unix socket can be used: write unix:///run/docker.sock".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_a_key_and_a_value_which_may_be_empty_or_hold_an_equals_sign() {
        assert_eq!(label("zone=a").unwrap(), ("zone".into(), "a".into()));
        assert_eq!(label("q=a=b").unwrap(), ("q".into(), "a=b".into()));
        assert_eq!(label("flag=").unwrap(), ("flag".into(), String::new()));
        for bad in ["zone", "=a", "two words=a", ""] {
            assert!(label(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_minus_at_the_end_removes_a_label() {
        assert_eq!(label_change("old-").unwrap(), ("old".into(), None));
        assert_eq!(label_change("a=b-").unwrap(), ("a".into(), Some("b-".into())));
        assert!(label_change("old").unwrap_err().contains("KEY-"));
        assert!(label_change("-").is_err());
    }

    #[test]
    fn a_ttl_is_numbers_with_units() {
        for (text, seconds) in [
            ("90s", 90),
            ("30m", 1_800),
            ("24h", 86_400),
            ("7d", 604_800),
            ("2w", 1_209_600),
            ("1h30m", 5_400),
        ] {
            assert_eq!(ttl(text), Ok(seconds), "{text}");
        }
        for bad in
            ["", "24", "h", "0s", "1.5h", "-1h", "24 h", "1y", "99999999999999999999s", "30500568904944w"]
        {
            assert!(ttl(bad).unwrap_err().contains("24h"), "{bad}");
        }
    }

    #[test]
    fn a_block_size_is_a_prefix_length_and_64_gets_an_explanation() {
        assert_eq!((block_size("/26"), block_size("24")), (Ok(26), Ok(24)));
        for bad in ["64", "/30", "/19", "", "/", "//26", "-26"] {
            assert!(block_size(bad).unwrap_err().contains("/26 is 64 addresses"), "{bad}");
        }
    }

    #[test]
    fn a_subnet_without_prefix_is_explained() {
        assert!(subnet("10.43.0.0/16").is_ok());
        assert!(subnet("10.43.0.0").unwrap_err().contains("10.43.0.0/16"));
        assert!(subnet("ten").is_err());
    }

    #[test]
    fn a_place_to_listen_is_an_address_and_a_port() {
        assert!(socket_address("0.0.0.0:7443").is_ok() && socket_address("[::]:7443").is_ok());
        for bad in ["7443", ":7443", "localhost:7443", "10.0.0.5", "::7443"] {
            assert!(socket_address(bad).unwrap_err().contains("[::]:7443"), "{bad}");
        }
    }

    #[test]
    fn nothing_is_called_nothing() {
        assert_eq!(reference("managed").as_deref(), Ok("managed"));
        assert!(["", ".", ".."].into_iter().all(|bad| reference(bad).is_err()));
    }

    #[test]
    fn a_server_is_https_and_nothing_more() {
        assert_eq!(server_url("10.0.0.5:7443").unwrap().as_str(), "https://10.0.0.5:7443/");
        assert_eq!(server_url("https://[fd00::5]:7443").unwrap().as_str(), "https://[fd00::5]:7443/");
        for bad in ["http://h:7443", "https://u:p@h", "https://h/path", "https://h?x", "", "unix:///x"] {
            assert!(server_url(bad).unwrap_err().contains("https://10.0.0.5:7443"), "{bad}");
        }
    }

    #[test]
    fn dockers_socket_is_a_unix_socket() {
        assert_eq!(docker_socket("unix:///run/docker.sock").unwrap(), PathBuf::from("/run/docker.sock"));
        assert_eq!(docker_socket("/run/d.sock").unwrap(), PathBuf::from("/run/d.sock"));
        assert!(docker_socket("tcp://127.0.0.1:2375").is_err());
    }
}
