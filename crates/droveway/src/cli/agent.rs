//! `droveway agent`: its options, and what they come to.
//!
//! Invariant: a token that cannot be read is never quoted.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::dataplane::Tuning;
use clap::Args;
use model::{JoinToken, Name, agent_api};
use reqwest::Url;

use super::exit::{Exit, Failure};
use super::log::LogArgs;
use super::parse;

/// The variable that may hold the token.
/// Where the agent keeps what outlives it.
pub(super) const STATE_DIR: &str = "/var/lib/droveway/agent";
const TOKEN_VARIABLE: &str = "DROVEWAY_TOKEN";
/// Longer than any token.
const TOKEN_MAX: u64 = 4096;

/// Run the agent: makes this machine a host, on every machine that runs containers
///
/// The first time it needs a server and a token (`droveway token create`); it then keeps its own key and certificate
/// in the state directory and needs neither. It must be root: it makes network namespaces and devices.
///
/// Each Droveway network appears on the machine's Docker Engine: `docker run --network managed …`.
#[derive(Args)]
#[command(after_help = "Examples:
  droveway agent --server https://10.0.0.5:7443 --token-file /etc/droveway/token
  droveway agent                                        # once it has joined
  droveway agent --interface eth1 --label zone=north
  droveway agent --no-docker                            # attach by the socket

Prefer --token-file, or DROVEWAY_TOKEN: all users of a machine can see its command lines.")]
pub(super) struct AgentArgs {
    /// Where the server is; kept after joining. Of several servers any will do: repeat it, or put commas between them
    #[arg(long = "server", env = "DROVEWAY_SERVER", hide_env_values = true, value_name = "URL", value_delimiter = ',', value_parser = parse::server_url)]
    servers: Vec<Url>,
    /// The join token itself. All users of the machine can read it in the list of processes: prefer --token-file
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// File with the join token; - is standard input. Without it and --token, DROVEWAY_TOKEN is used
    #[arg(long, env = "DROVEWAY_TOKEN_FILE", hide_env_values = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// This machine's address as other hosts reach it [default: found, and all of them tried]
    #[arg(long, value_name = "ADDRESS", conflicts_with = "interface")]
    address: Option<IpAddr>,
    /// Use the addresses of this interface, and follow them
    #[arg(long, value_name = "INTERFACE")]
    interface: Option<String>,
    /// The host's name in Droveway [default: this machine's host name]
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// What you want to say of this host when it joins; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse::label)]
    labels: Vec<(String, String)>,
    /// Where the agent keeps its key, certificate and ledger
    #[arg(long, env = "DROVEWAY_STATE_DIR", hide_env_values = true, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// Where the agent listens for attach, detach and status
    #[arg(long, env = "DROVEWAY_SOCKET", hide_env_values = true, value_name = "PATH", default_value = agent_api::SOCKET)]
    socket: PathBuf,
    /// Docker's socket; the engine may start later
    #[arg(long, value_name = "SOCKET", default_value = "unix:///run/docker.sock", value_parser = parse::docker_socket)]
    docker: PathBuf,
    /// Leave Docker alone
    #[arg(long, conflicts_with = "docker")]
    no_docker: bool,
    /// Forward names outside Droveway to this resolver; may be repeated [default: those of this machine]
    #[arg(long = "dns", value_name = "ADDRESS")]
    forwarders: Vec<IpAddr>,
    /// The UDP port of this host's tunnels, for IKE and ESP together; open it in firewalls
    #[arg(long, value_name = "PORT", default_value_t = model::TUNNEL_PORT, value_parser = parse::tunnel_port)]
    tunnel_port: u16,
    /// Pairs of threads that encrypt and decrypt [default: one for every two processors, at most 8]
    #[arg(long, value_name = "COUNT", value_parser = parse::workers)]
    workers: Option<usize>,
    /// For tests and measurements: how the packet path works, as in `spin=0,no-gso`; see docs/tuning.md
    #[arg(long, hide = true, env = "DROVEWAY_TUNING", value_name = "WORDS", default_value = "")]
    tuning: Tuning,
    /// Let every packet between containers and other hosts take the kernel's whole stack, and load no eBPF programs
    #[arg(long, env = "DROVEWAY_NO_SHORTCUT", hide_env_values = true, value_parser = clap::builder::BoolishValueParser::new())]
    no_shortcut: bool,
    /// For tests: new keys for a tunnel's traffic after so many seconds [default: an hour]
    #[arg(long, hide = true, env = "DROVEWAY_REKEY_EVERY", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    rekey_every: Option<u64>,
    /// For tests: new keys for a tunnel's traffic after so many bytes [default: 1 TiB]
    #[arg(long, hide = true, env = "DROVEWAY_REKEY_BYTES", value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    rekey_bytes: Option<u64>,
    /// For tests: a new IKE SA after so many seconds [default: four hours]
    #[arg(long, hide = true, env = "DROVEWAY_REKEY_IKE_EVERY", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    rekey_ike_every: Option<u64>,
    /// Also answer /metrics, /healthz and /readyz at this address, over HTTP without TLS; nothing secret is told, but let
    /// only those reach it who should look [default: at the socket alone]
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = parse::socket_address)]
    metrics: Option<SocketAddr>,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

/// Without the token.
impl fmt::Debug for AgentArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentArgs")
            .field("servers", &self.servers)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// What the options come to: the words of `agent::Config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) servers: Vec<String>,
    pub(super) token: Option<JoinToken>,
    pub(super) address: Option<IpAddr>,
    pub(super) interface: Option<String>,
    pub(super) name: Option<Name>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) state_dir: PathBuf,
    pub(super) socket: PathBuf,
    pub(super) docker: Option<PathBuf>,
    pub(super) forwarders: Vec<IpAddr>,
    pub(super) tunnels: agent::tunnels::Settings,
    pub(super) metrics: Option<SocketAddr>,
    pub(super) shortcut: bool,
}

impl AgentArgs {
    /// Reads the token. `variable` is what DROVEWAY_TOKEN holds.
    pub(super) fn settle(self, variable: Option<String>) -> Result<Settings, Failure> {
        // A host that has joined needs no token: its file, named in a unit or a variable, may be gone since.
        let joined = self.state_dir.join(agent::LEDGER).exists();
        let file =
            self.token_file.as_deref().filter(|file| !joined || *file == Path::new("-") || file.exists());
        let token = read_token(self.token, file, variable)?;
        Ok(Settings {
            servers: self.servers.iter().map(|url| url.as_str().trim_end_matches('/').to_owned()).collect(),
            token,
            address: self.address,
            interface: self.interface,
            name: self.name,
            labels: self.labels.into_iter().collect(),
            state_dir: self.state_dir,
            socket: self.socket,
            docker: (!self.no_docker).then_some(self.docker),
            forwarders: self.forwarders,
            tunnels: agent::tunnels::Settings {
                port: self.tunnel_port,
                rekey_every: self.rekey_every.map(Duration::from_secs),
                rekey_bytes: self.rekey_bytes,
                rekey_ike_every: self.rekey_ike_every.map(Duration::from_secs),
                tuning: Tuning { workers: self.workers.or(self.tuning.workers), ..self.tuning },
            },
            metrics: self.metrics,
            shortcut: !self.no_shortcut,
        })
    }
}

/// What DROVEWAY_TOKEN holds; an empty one counts as none.
pub(super) fn token_variable() -> Option<String> {
    std::env::var(TOKEN_VARIABLE).ok().filter(|text| !text.trim().is_empty())
}

fn read_token(
    given: Option<String>,
    file: Option<&Path>,
    variable: Option<String>,
) -> Result<Option<JoinToken>, Failure> {
    let (text, from) = match (given, file, variable) {
        (Some(text), _, _) => (text, "--token".to_owned()),
        (None, Some(file), _) => {
            let stdin = file == Path::new("-");
            let from = if stdin { "standard input".to_owned() } else { file.display().to_string() };
            let text = read_file(file).map_err(|error| {
                Failure::new(Exit::Usage, format!("cannot read the join token in {from}: {error}"))
                    .remedy("put what `droveway token create` printed there")
            })?;
            (text, from)
        }
        (None, None, Some(text)) => (text, TOKEN_VARIABLE.to_owned()),
        (None, None, None) => return Ok(None),
    };
    match text.parse() {
        Ok(token) => Ok(Some(token)),
        Err(error) => Err(Failure::new(Exit::Usage, format!("{from}: {error}"))),
    }
}

fn read_file(file: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().lock().take(TOKEN_MAX).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(file)?.take(TOKEN_MAX).read_to_string(&mut text)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        agent: AgentArgs,
    }

    fn settle(args: &[&str], variable: Option<&str>) -> Result<Settings, Failure> {
        let args = ["agent", "--name", "h1"].iter().chain(args);
        Alone::try_parse_from(args).unwrap().agent.settle(variable.map(str::to_owned))
    }

    #[test]
    fn a_lost_token_file_matters_only_to_a_host_that_has_not_joined() {
        let state = tempfile::tempdir().unwrap();
        let args = ["--state-dir", state.path().to_str().unwrap(), "--token-file", "/nowhere/token"];
        assert_eq!(settle(&args, None).unwrap_err().exit, Exit::Usage);
        std::fs::write(state.path().join(agent::LEDGER), "").unwrap();
        assert_eq!(settle(&args, None).unwrap().token, None);
    }

    fn token(id: &str) -> String {
        format!("dwj1.{id}.s3cret.{}", "ab".repeat(32))
    }

    #[test]
    fn the_command_line_goes_before_the_file_and_the_file_before_the_variable() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), token("file") + "\n").unwrap();
        let path = file.path().to_str().unwrap();
        let id = |args: &[&str]| settle(args, Some(&token("variable"))).unwrap().token.unwrap().id;
        assert_eq!(id(&["--token", &token("given")]), "given");
        assert_eq!(id(&["--token-file", path]), "file");
        assert_eq!(id(&[]), "variable");
        assert_eq!(settle(&[], None).unwrap().token, None);
    }

    #[test]
    fn a_token_that_cannot_be_read_is_not_quoted() {
        for failure in [
            settle(&["--token", "dwj1.a.s3cret"], None).unwrap_err(),
            settle(&[], Some("dwj1.a.s3cret")).unwrap_err(),
        ] {
            assert_eq!(failure.exit, Exit::Usage);
            assert!(!failure.render().contains("s3cret"), "{}", failure.render());
        }
        let args = Alone::try_parse_from(["agent", "--token", "s3cret"]).unwrap().agent;
        assert!(!format!("{args:?}").contains("s3cret"));
    }

    #[test]
    fn docker_is_followed_unless_refused() {
        assert_eq!(settle(&[], None).unwrap().docker, Some("/run/docker.sock".into()));
        assert_eq!(settle(&["--docker", "unix:///x.sock"], None).unwrap().docker, Some("/x.sock".into()));
        assert_eq!(settle(&["--no-docker"], None).unwrap().docker, None);
        assert!(Alone::try_parse_from(["agent", "--no-docker", "--docker", "/x"]).is_err());
        assert!(Alone::try_parse_from(["agent", "--address", "10.0.0.1", "--interface", "eth0"]).is_err());
    }

    #[test]
    fn the_rest_is_passed_on() {
        let args = [
            "--server",
            "h:7443,g:7443",
            "--label",
            "zone=a",
            "--label",
            "rack=7",
            "--dns",
            "9.9.9.9",
            "--state-dir",
            "/s",
            "--tunnel-port",
            "4501",
        ];
        let settings = settle(&args, None).unwrap();
        assert_eq!(settings.servers, ["https://h:7443", "https://g:7443"]);
        assert_eq!(settings.tunnels.port, 4501);
        assert!(Alone::try_parse_from(["agent", "--tunnel-port", "500"]).is_err());
        assert_eq!(settings.labels.len(), 2);
        assert_eq!(settings.forwarders, ["9.9.9.9".parse::<IpAddr>().unwrap()]);
        assert_eq!((settings.name.unwrap().as_str(), settings.state_dir), ("h1", "/s".into()));
    }
}
