//! `droveway doctor`: what is not as it should be on this host, and what to do about it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent::doctor::{self, Books, Finding, Kind, server::View};
use clap::Args;
use model::agent_api::Connection as Link;

use super::connection::{Connection, LocalAgent};
use super::exit::{Exit, Failure};
use super::output::Output;
use super::text;
use crate::client::{AgentSocket, Client, Error};

/// How long to wait between two looks.
const AGAIN: Duration = Duration::from_millis(300);

/// What is not as it should be on this host: the kernel, containers, names, tunnels, leases
///
/// Looks for itself, and changes nothing: what the agent has written down against what the kernel has, inside of the
/// containers too, what the routers' DNS answers, and how the tunnels are. While the agent is away its ledger is read
/// instead. Each finding is one line: where, what, what it means, what to do.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  droveway doctor                  # as root, on a host
  droveway doctor --consistency    # what the server says of all hosts, too
  droveway doctor -o json | jq -r '.[].kind'

Ends with 8 if anything was found. What is on its way is no finding: for up to --settle seconds it looks again, and tells \
what was there each time.")]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    agent: LocalAgent,
    #[command(flatten)]
    connection: Connection,
    /// Ask the server too: who may give which addresses, which endpoints it knows, which hosts are away
    #[arg(long)]
    consistency: bool,
    /// For how long to look again before something is called a finding
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    settle: u64,
    /// Where the agent keeps its ledger, which is read while it is away
    #[arg(long, env = "DROVEWAY_STATE_DIR", hide_env_values = true, value_name = "DIR", default_value = super::agent::STATE_DIR)]
    state_dir: PathBuf,
}

impl DoctorArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let agent = self.agent.open()?;
        let server = self.consistency.then(|| self.connection.open()).transpose()?;
        let patience = Duration::from_secs(self.settle);
        let found =
            persistent(patience, async || look(&agent, server.as_ref(), &self.state_dir).await).await?;
        tell(output, &found, "nothing is found: all is as it should be")
    }
}

/// What is found each time, for as long as anything is and patience lasts.
pub(super) async fn persistent(
    patience: Duration,
    mut look: impl AsyncFnMut() -> Result<Vec<Finding>, Failure>,
) -> Result<Vec<Finding>, Failure> {
    let begin = Instant::now();
    let mut found = look().await?;
    while !found.is_empty() && begin.elapsed() < patience {
        tokio::time::sleep(AGAIN).await;
        let now = look().await?;
        let before: BTreeSet<(Kind, String)> =
            found.into_iter().map(|finding| (finding.kind, finding.place)).collect();
        let still = |finding: &Finding| before.contains(&(finding.kind, finding.place.clone()));
        let new = now.iter().any(|finding| !still(finding));
        found = now.into_iter().filter(still).collect();
        if found.is_empty() && new {
            // Other things each time: it is at work. Once more from the beginning, if there is time.
            found = look().await?;
            if begin.elapsed() >= patience {
                found.clear();
            }
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Prints findings, and fails if there are any.
pub(super) fn tell(output: Output, found: &[Finding], none: &str) -> Result<(), Failure> {
    output.object(&found, |found| {
        let lines =
            found.iter().map(|finding| text::printable(&finding.to_string()).replace('\n', " ") + "\n");
        if found.is_empty() { format!("{none}\n") } else { lines.collect() }
    })?;
    if found.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Exit::Unwell, format!("{} found", text::count(found.len(), "thing"))))
}

async fn look(
    agent: &AgentSocket,
    server: Option<&Client>,
    state_dir: &Path,
) -> Result<Vec<Finding>, Failure> {
    let netns_dir = Path::new(agent::NETNS_DIR);
    let view = match server {
        Some(server) => Some(view(server).await),
        None => None,
    };
    let (view, mut found) = match view {
        Some(Ok(view)) => (Some(view), Vec::new()),
        Some(Err(error @ Error::Unreachable { .. })) => {
            (None, vec![Finding::new(Kind::ServerAway, "server", error.to_string())])
        }
        Some(Err(error)) => return Err(error.into()),
        None => (None, Vec::new()),
    };
    if let Some(view) = &view {
        found.extend(doctor::server::environment(view));
    }
    let (books, there) = match agent.books().await {
        Ok(books) => (Some(books), true),
        Err(error @ (Error::NoAgent { .. } | Error::Unreachable { .. })) => {
            let books = Books::of_ledger(state_dir)
                .map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
            found.push(Finding::new(Kind::AgentAway, "agent", away(&error, books.is_some(), state_dir)));
            (books, false)
        }
        Err(error) => return Err(error.into()),
    };
    let Some(books) = books else { return Ok(found) };
    found.extend(doctor::books(&books));
    let kernel = doctor::kernel::examine(&books, netns_dir);
    found.extend(kernel.map_err(|error| Failure::new(Exit::Internal, error.to_string()))?);
    if let Some(view) = &view {
        found.extend(doctor::server::host(&books, view));
    }
    if there {
        if let Link::Down { why, .. } = agent.status().await?.connection {
            found.push(Finding::new(Kind::ServerAway, books.name.to_string(), why));
        }
        found.extend(doctor::tunnels(&books, &agent.tunnels().await?));
        let others = view.as_ref().map(|view| &view.endpoints[..]);
        found.extend(doctor::names::examine(&books, netns_dir, others));
    }
    Ok(found)
}

/// That the agent does not answer, and whether there is anything to look at without it.
fn away(error: &Error, known: bool, state_dir: &Path) -> String {
    if known {
        return error.to_string();
    }
    format!(
        "{error}, and {} has no ledger of a host that has joined, so nothing else was looked at (--state-dir or \
         DROVEWAY_STATE_DIR says where it is)",
        state_dir.display()
    )
}

/// What the server says of the environment.
pub(super) async fn view(server: &Client) -> Result<View, Error> {
    Ok(View {
        hosts: server.hosts().await?,
        endpoints: server.endpoints().await?,
        ipam: server.ipam().await?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_there_each_time_is_found_and_what_passes_is_not() {
        let mut times = 0;
        let found = persistent(Duration::from_millis(700), async || {
            times += 1;
            let stays = Finding::new(Kind::Missing, "h1", "route");
            let passes = Finding::new(Kind::Leftover, format!("h{times}"), "route");
            Ok(vec![stays, passes])
        })
        .await
        .unwrap();
        assert_eq!(found, [Finding::new(Kind::Missing, "h1", "route")]);
        assert!(times > 2);
    }
}
