//! `droveway tunnel`: ls, inspect, rekey, reset, capture. The agent of this machine is asked: a tunnel is what a host sees
//! of a peer.

mod show;

pub(super) use show::summary;

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use model::agent_api::TunnelStatus;

use super::connection::LocalAgent;
use super::exit::{Exit, Failure};
use super::kind::{do_each, or_meant, show_each};
use super::output::Output;
use super::{parse, text};
use crate::client::{AgentSocket, Capture, Error};

/// Tunnels of this host: to other hosts, and to foreign peers
#[derive(Debug, Args)]
pub(super) struct TunnelArgs {
    #[command(flatten)]
    agent: LocalAgent,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List tunnels, with why below those that are not up
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway tunnel ls
  droveway tunnel ls -o json | jq -e 'all(.[]; .state.state == \"up\")'

STATE is what probes through the tunnel say, not what was agreed once:
  up          keys are agreed, and traffic passes
  silent      keys are agreed, but no traffic passes; it is begun anew by itself
  connecting  an attempt is under way
  waiting     the peer has to begin, or there is nothing that can be tried
  failed      the last attempt failed; the next comes by itself
RTT and LOSS are those of probes from router to router."
    )]
    Ls,
    /// Show all that is known of tunnels: keys' ages, SPIs, suites, bytes, path, loss, last failure
    #[command(after_help = "Examples:
  droveway tunnel inspect h2
  droveway tunnel inspect h2 office -o yaml")]
    Inspect {
        /// Names or ids of hosts or foreign peers
        #[arg(required = true, value_name = "PEER", value_parser = parse::reference)]
        names: Vec<String>,
    },
    /// Agree on new keys now; no packet is lost
    #[command(after_help = "Keys change by themselves, after a time and after many packets.

Examples:
  droveway tunnel rekey h2")]
    Rekey {
        /// Names or ids of hosts or foreign peers
        #[arg(required = true, value_name = "PEER", value_parser = parse::reference)]
        names: Vec<String>,
    },
    /// Close tunnels and begin anew; packets wait or are lost meanwhile
    #[command(
        after_help = "A tunnel that dies comes back by itself; this is for when you do not want to wait.

Examples:
  droveway tunnel reset h2"
    )]
    Reset {
        /// Names or ids of hosts or foreign peers
        #[arg(required = true, value_name = "PEER", value_parser = parse::reference)]
        names: Vec<String>,
    },
    /// Write the packets inside a tunnel, before and after encryption, as pcapng for Wireshark
    ///
    /// It goes on until it is interrupted. Root only, and the agent logs it. Keys are never written.
    #[command(after_help = "Examples:
  droveway tunnel capture h2 -w h2.pcapng
  droveway tunnel capture h2 | tcpdump -nr -
  ssh root@h1 droveway tunnel capture h2 | wireshark -k -i -")]
    Capture {
        /// Name or id of the host or foreign peer
        #[arg(value_name = "PEER", value_parser = parse::reference)]
        name: String,
        /// The file; standard output, if left out and no terminal
        #[arg(short, long, value_name = "FILE")]
        write: Option<PathBuf>,
    },
}

impl TunnelArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let agent = self.agent.open()?;
        match self.verb {
            Verb::Ls => {
                let tunnels = agent.tunnels().await?;
                output.list(
                    &tunnels,
                    |tunnels| show::table(tunnels, text::now()),
                    "There is no tunnel: no other host shares an encrypted network with this one.",
                )
            }
            Verb::Inspect { names } => {
                let one = async |name: &str| explained(&agent, name, agent.tunnel(name).await).await;
                let details = |tunnel: &TunnelStatus| show::details(tunnel, text::now());
                show_each(output, &names, one, async || Ok(details)).await
            }
            Verb::Rekey { names } => {
                do_each(output, &names, async |name| explained(&agent, name, agent.rekey(name).await).await)
                    .await
            }
            Verb::Reset { names } => {
                do_each(output, &names, async |name| explained(&agent, name, agent.reset(name).await).await)
                    .await
            }
            Verb::Capture { name, write } => capture(&agent, output, &name, write.as_deref()).await,
        }
    }
}

/// What came of a request to the agent about the tunnel to `name`: where there is none, with those there are.
async fn explained<T>(agent: &AgentSocket, name: &str, outcome: Result<T, Error>) -> Result<T, Failure> {
    or_meant(outcome, "tunnel", name, async || {
        Ok(agent.tunnels().await?.iter().map(|tunnel| tunnel.peer.to_string()).collect())
    })
    .await
}

async fn capture(
    agent: &AgentSocket,
    output: Output,
    name: &str,
    write: Option<&Path>,
) -> Result<(), Failure> {
    if write.is_none() && io::stdout().is_terminal() {
        let message = "a capture is not for a terminal to show";
        let remedy = format!("-w {name}.pcapng, or pipe it: | tcpdump -nr -");
        return Err(Failure::new(Exit::Usage, message).remedy(remedy));
    }
    let pieces = explained(agent, name, agent.capture(name).await).await?;
    let (mut to, place) = destination(write)?;
    let written = until_interrupted(pieces, &mut to).await.map_err(|why| match why {
        Broken::Agent(error) => error.into(),
        Broken::Write(error) => Failure::new(Exit::Internal, format!("cannot write to {place}: {error}")),
    })?;
    output.remark(&format!("Wrote {written} bytes to {place}."));
    Ok(())
}

/// Where a capture goes, and what that is called. What travels inside a tunnel is nobody else's to read.
fn destination(file: Option<&Path>) -> Result<(Box<dyn Write>, String), Failure> {
    let Some(path) = file.filter(|path| *path != Path::new("-")) else {
        return Ok((Box::new(io::stdout()), "standard output".to_owned()));
    };
    let place = path.display().to_string();
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let file =
        file.map_err(|error| Failure::new(Exit::Usage, format!("cannot write to {place}: {error}")))?;
    Ok((Box::new(file), place))
}

/// Why a capture ended early.
enum Broken {
    Agent(Error),
    Write(io::Error),
}

/// Copies until the agent ends, the reader has enough, or a person interrupts. How many bytes.
async fn until_interrupted(mut pieces: Capture, to: &mut dyn Write) -> Result<u64, Broken> {
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    let mut written = 0;
    loop {
        let piece = tokio::select! {
            piece = pieces.next() => piece.map_err(Broken::Agent)?,
            interrupted = &mut interrupted => {
                interrupted.map_err(Broken::Write)?;
                None
            }
        };
        let Some(piece) = piece else { return Ok(written) };
        match to.write_all(&piece).and_then(|()| to.flush()) {
            Ok(()) => written += piece.len() as u64,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(written),
            Err(error) => return Err(Broken::Write(error)),
        }
    }
}
