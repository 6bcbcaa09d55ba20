//! `droveway server`: its options and what it says when it is ready.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use model::Fingerprint;
use model::api::UnreportedHost;
use reqwest::Url;
use server::{EtcdConfig, EtcdUrl, StoreChoice};

use super::connection::{Connection, DATA_DIR, KEY_FILE, PORT, SERVER};
use super::exit::{Exit, Failure};
use super::kind::do_each;
use super::local;
use super::log::LogArgs;
use super::output::{Output, write};
use super::parse;
use super::table::Table;
use super::text;

/// Run the server: API, certificate authority and store in one process
///
/// One machine runs it. At first start it makes, in its data directory, the CA, its certificate, the environment
/// `default`, the network `managed` (10.42.0.0/16) and an admin key, and prints what to do next.
///
/// Losing the server loses changes, never traffic: hosts go on with what they know.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  droveway server                              # as root
  droveway server --data-dir ./dw --listen 127.0.0.1:7443   # to try it: anyone
  droveway server --name vpn.example.org       # a name in its certificate, too
  droveway server --store etcd://10.0.0.8:2379,10.0.0.9:2379 \\
    --url https://10.0.0.5:7443                # one of several

Keep the data directory safe: admin.key in it may do everything, and the CA's key is there.")]
pub(super) struct ServerArgs {
    /// Where all that the server has is kept
    #[arg(long, value_name = "DIR", default_value = DATA_DIR)]
    pub(super) data_dir: PathBuf,
    /// Address and port for people, agents and programs alike
    #[arg(long, value_name = "ADDRESS:PORT", default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)), value_parser = parse::socket_address)]
    pub(super) listen: SocketAddr,
    /// Another name or address for the server's certificate, for programs that check it; may be repeated
    #[arg(long = "name", value_name = "NAME")]
    pub(super) names: Vec<String>,
    /// The domain under which containers have names
    #[arg(long, value_name = "DOMAIN", default_value = model::DEFAULT_DOMAIN)]
    pub(super) domain: String,
    /// For how long an address is kept for a container of label droveway.retain=true that is gone
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = parse::ttl)]
    pub(super) retain: u64,
    /// How agents reach this server, where there are several: each agent learns the URLs of all; may be repeated
    #[arg(long = "url", value_name = "URL", value_parser = parse::server_url)]
    pub(super) urls: Vec<Url>,
    #[command(flatten)]
    pub(super) store: StoreArgs,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    #[command(flatten)]
    pub(super) lives: LifeArgs,
    #[command(flatten)]
    pub(super) log: LogArgs,
    #[command(subcommand)]
    pub(super) verb: Option<Verb>,
}

/// What else can be done with what a server has.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Write all that the server has to one file
    ///
    /// The server may run meanwhile: the file has the state of one moment. It holds the CA's key and the admin key: keep it
    /// as secret as the data directory.
    #[command(after_help = "Examples:
  droveway server backup /var/backups/droveway-monday
  droveway server backup --store etcd://10.0.0.8:2379 /var/backups/droveway")]
    Backup {
        /// The file, which is not there yet; it is made with mode 0600
        file: PathBuf,
        #[command(flatten)]
        place: Place,
    },
    /// Make the data directory, and the store, from a backup
    ///
    /// A restored store begins a new life. The backup is older than what hosts hold, so hosts say what they hold when they
    /// connect, and no address is leased before all have: `droveway server adopt` shows for which it waits. All traffic, and
    /// what attaches to addresses that hosts hold, goes on.
    #[command(after_help = "Examples:
  droveway server restore /var/backups/droveway-monday
  droveway server restore --force /var/backups/droveway-monday")]
    Restore {
        /// What `droveway server backup` wrote
        file: PathBuf,
        #[command(flatten)]
        place: Place,
        /// Replace what is there. A file that was the store stays beside the new one, under another name
        #[arg(long)]
        force: bool,
    },
    /// After a restore: show which hosts have not said what they hold
    ///
    /// Nothing is leased before all have. Hosts say it when their agents connect. Remove hosts that are gone with `droveway
    /// host rm`.
    #[command(after_help = "Examples:
  droveway server adopt
  droveway server adopt --without h7

With --without, what that host was leased after the backup may be leased to others.")]
    Adopt {
        #[command(flatten)]
        connection: Connection,
        /// Wait no longer for this host, by name or id; may be repeated
        #[arg(long = "without", value_name = "HOST", value_parser = parse::reference)]
        without: Vec<String>,
    },
}

/// Where a server's data is.
#[derive(Debug, Args)]
pub(super) struct Place {
    /// The server's data directory
    #[arg(long, value_name = "DIR", default_value = DATA_DIR)]
    data_dir: PathBuf,
    #[command(flatten)]
    store: StoreArgs,
}

impl Verb {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let fault = |error: server::Error| Failure::new(Exit::Conflict, error.to_string());
        match self {
            Self::Backup { file, place: Place { data_dir, store } } => {
                let made = server::backup(&data_dir, &store.choice(), &file).await.map_err(fault)?;
                write(&format!(
                    "{}: {} keys of {} hosts at revision {}. Keep it secret: it holds the CA's key.\n",
                    file.display(),
                    made.keys,
                    made.hosts,
                    made.revision
                ))
            }
            Self::Restore { file, place: Place { data_dir, store }, force } => {
                let made = server::restore(&file, &data_dir, &store.choice(), force).await.map_err(fault)?;
                write(&format!(
                    "{}: restored {} keys of revision {}; epoch {} begins. {}\n",
                    data_dir.display(),
                    made.keys,
                    made.revision,
                    made.epoch,
                    match made.hosts {
                        0 => "It knows no host.".to_owned(),
                        hosts => format!(
                            "Start the server: {hosts} hosts have to say what they hold before anything is leased \
                             (droveway server adopt)."
                        ),
                    }
                ))
            }
            Self::Adopt { connection, without } => {
                let client = connection.open()?;
                do_each(output, &without, async |name| Ok(client.remove_unreported(name).await?)).await?;
                if !without.is_empty() {
                    return Ok(());
                }
                let hosts = client.unreported().await?;
                output.list(&hosts, unreported, "All hosts have said what they hold.")
            }
        }
    }
}

fn unreported(hosts: &[UnreportedHost]) -> Table {
    let now = text::now();
    let mut table = Table::new(["HOST", "WAITED FOR", "ID"], &[]);
    for host in hosts {
        table.row([host.name.to_string(), text::age(host.since, now), host.host.to_string()]);
    }
    table
}

/// Where the state is.
#[derive(Debug, Args)]
pub(super) struct StoreArgs {
    /// An etcd in place of the file in the data directory, for several servers: `etcd://HOST:PORT,HOST:PORT/PREFIX`; one member is enough, and no prefix too
    #[arg(long = "store", value_name = "URL", help_heading = "Store")]
    url: Option<EtcdUrl>,
    /// The CA of etcd's certificates, PEM; without it, TLS is not used
    #[arg(long = "store-ca", value_name = "FILE", requires = "url", help_heading = "Store")]
    ca: Option<PathBuf>,
    /// The certificate to show to etcd, PEM
    #[arg(long = "store-cert", value_name = "FILE", requires_all = ["key", "ca"], help_heading = "Store")]
    certificate: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long = "store-key", value_name = "FILE", requires = "certificate", help_heading = "Store")]
    key: Option<PathBuf>,
    /// The user of etcd, where its authentication is on
    #[arg(long = "store-user", value_name = "NAME", requires = "password_file", help_heading = "Store")]
    user: Option<String>,
    /// The file with that user's password
    #[arg(long = "store-password-file", value_name = "FILE", requires = "user", help_heading = "Store")]
    password_file: Option<PathBuf>,
}

impl StoreArgs {
    /// The store that is meant.
    pub(super) fn choice(self) -> StoreChoice {
        let Self { url, ca, certificate, key, user, password_file } = self;
        match url {
            None => StoreChoice::Embedded,
            Some(url) => StoreChoice::Etcd(EtcdConfig { url, ca, certificate, key, user, password_file }),
        }
    }
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
