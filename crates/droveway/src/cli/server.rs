//! `droveway server`: its options and what it says when it is ready.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use model::Fingerprint;

use super::connection::{DATA_DIR, KEY_FILE, PORT, SERVER};
use super::local;
use super::log::LogArgs;

/// Run the server: API, certificate authority and store in one process
///
/// One machine runs it. At first start it makes, in its data directory, the CA, its certificate, the environment
/// `default`, the network `managed` (10.42.0.0/16) and an admin key, and prints what to do next.
///
/// Losing the server loses changes, never traffic: hosts go on with what they know.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  droveway server                                        # as root
  droveway server --data-dir ./dw --listen 127.0.0.1:7443   # to try it, as anyone
  droveway server --name vpn.example.org                 # reached by that name too

Keep the data directory safe: admin.key in it may do everything, and the CA's key is there.")]
pub(super) struct ServerArgs {
    /// Where all that the server has is kept
    #[arg(long, value_name = "DIR", default_value = DATA_DIR)]
    pub(super) data_dir: PathBuf,
    /// Address and port for people, agents and programs alike
    #[arg(long, value_name = "ADDRESS:PORT", default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)))]
    pub(super) listen: SocketAddr,
    /// Another name or address for the server's certificate, for programs that check it; may be repeated
    #[arg(long = "name", value_name = "NAME")]
    pub(super) names: Vec<String>,
    /// The domain under which containers have names
    #[arg(long, value_name = "DOMAIN", default_value = model::DEFAULT_DOMAIN)]
    pub(super) domain: String,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    #[command(flatten)]
    pub(super) lives: LifeArgs,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

/// How much the server takes on.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// How many requests a second one key, one host, or one address without either may send; ten times as many at once. 0
    /// is no limit
    #[arg(long, value_name = "N", default_value_t = 200)]
    rate_limit: u32,
    /// How many connections may be open; the system has to allow as many open files
    #[arg(long, value_name = "N", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(64..=1_000_000))]
    connections: u32,
    /// How many connections of one address (IPv6: one /64) may be open that have not shown a valid key or certificate; the
    /// oldest makes room for the newest
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(8..=1_000_000))]
    strangers_per_address: u32,
}

impl LimitArgs {
    pub(super) fn settle(&self) -> server::Limits {
        let strangers_of_source = self.strangers_per_address as usize;
        let default = server::Limits::default();
        server::Limits {
            connections: self.connections as usize,
            strangers: default.strangers.max(strangers_of_source),
            strangers_of_source,
            rate: Some(self.rate_limit).filter(|rate| *rate > 0),
            ..default
        }
    }
}

/// How long certificates are good for.
#[derive(Debug, Args)]
pub(super) struct LifeArgs {
    /// For tests: certificates of hosts and of the server for so many seconds [default: 90 days]
    #[arg(long, hide = true, env = "DROVEWAY_CERTIFICATE_LIFE", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(3..))]
    certificate_life: Option<u64>,
    /// For tests: a new CA for so many seconds [default: 50 years]
    #[arg(long, hide = true, env = "DROVEWAY_CA_LIFE", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(3..))]
    ca_life: Option<u64>,
}

impl LifeArgs {
    pub(super) fn settle(&self) -> server::Lives {
        let default = server::Lives::default();
        server::Lives {
            ca: self.ca_life.map_or(default.ca, Duration::from_secs),
            leaf: self.certificate_life.map_or(default.leaf, Duration::from_secs),
        }
    }
}

/// What is known when the server is ready.
#[derive(Debug, Clone)]
pub(super) struct Ready {
    /// Where it listens; the port is a real one even when 0 was asked for.
    pub(super) address: SocketAddr,
    /// The CA.
    pub(super) ca: Fingerprint,
    /// Whether everything was made just now.
    pub(super) first_start: bool,
    /// Where the admin key is.
    pub(super) admin_key_file: PathBuf,
}

/// What the server prints when it is ready; after its first start, what to do next.
pub(super) fn greeting(ready: &Ready, own: Option<IpAddr>) -> String {
    let listens = local::url(ready.address.ip(), ready.address.port());
    let mut text =
        format!("The server listens on {listens}; its CA has the fingerprint (SHA-256)\n  {}\n", ready.ca);
    if !ready.first_start {
        return text;
    }
    let (here, far) = urls(ready.address, own);
    let mut options = String::new();
    if here != SERVER {
        let _ = write!(options, " --server {here}");
    }
    if ready.admin_key_file != Path::new(KEY_FILE) {
        let _ = write!(options, " --key-file {}", ready.admin_key_file.display());
    }
    let _ = write!(
        text,
        "\n\
         First start: made the environment \"default\", the network \"managed\" ({}) and the admin key\n  {}\n\
         \n\
         What to do next:\n  \
         droveway token create{options}\n      \
         # prints what to type on each host; it ends with\n  \
         droveway agent --server {far} --token-file /etc/droveway/token\n  \
         docker run -d --network {network} --name db redis\n      \
         # on any host; every container on that network, on every host, can reach it\n",
        model::MANAGED_CIDR,
        ready.admin_key_file.display(),
        network = model::MANAGED_NETWORK,
    );
    text
}

/// How this machine, and how other hosts, reach the server.
fn urls(listen: SocketAddr, own: Option<IpAddr>) -> (String, String) {
    let port = listen.port();
    if !listen.ip().is_unspecified() {
        let url = local::url(listen.ip(), port);
        return (url.clone(), url);
    }
    let far = own.map_or_else(|| format!("https://THIS-MACHINE:{port}"), |address| local::url(address, port));
    (local::url(Ipv4Addr::LOCALHOST.into(), port), far)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(address: &str, key: &str, first_start: bool) -> Ready {
        Ready {
            address: address.parse().unwrap(),
            ca: Fingerprint([7; 32]),
            first_start,
            admin_key_file: key.into(),
        }
    }

    #[test]
    fn after_the_first_start_the_next_steps_can_be_typed_as_they_stand() {
        let own = Some("10.0.0.5".parse().unwrap());
        let text = greeting(&ready("0.0.0.0:7443", KEY_FILE, true), own);
        assert!(text.contains("\n  droveway token create\n"), "defaults need no options:\n{text}");
        assert!(text.contains("droveway agent --server https://10.0.0.5:7443 --token-file"), "{text}");

        let text = greeting(&ready("127.0.0.1:9000", "/tmp/x/admin.key", true), own);
        let line = "\n  droveway token create --server https://127.0.0.1:9000 --key-file /tmp/x/admin.key\n";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn later_starts_print_only_where_and_who() {
        let text = greeting(&ready("0.0.0.0:7443", KEY_FILE, false), None);
        assert!(text.contains(&"07".repeat(32)) && !text.contains("token create"), "{text}");
    }
}
