//! `droveway status`: how the agent on this machine is.

use clap::Args;
use model::agent_api::{AgentStatus, Connection, DockerStatus, RouterStatus};

use super::connection::LocalAgent;
use super::exit::{Exit, Failure};
use super::host::addresses;
use super::output::Output;
use super::table::Details;
use super::{text, tunnel};

/// How the agent on this machine is: its server, its routers, its tunnels, Docker, troubles
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  droveway status
  droveway status --ready          # ends with 0 if containers can attach
  droveway status -o json | jq -e '.connection.state == \"up\"'

Without a server the agent goes on: what runs, runs; new containers attach.")]
pub(super) struct StatusArgs {
    #[command(flatten)]
    agent: LocalAgent,
    /// Only say whether containers can attach, part by part, and end with 1 if not
    #[arg(long)]
    ready: bool,
}

impl StatusArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let agent = self.agent.open()?;
        if self.ready {
            let readiness = agent.readiness().await?;
            output.object(&readiness, |readiness| {
                readiness
                    .checks
                    .iter()
                    .map(|(part, how)| text::printable(&format!("{part}: {how}")) + "\n")
                    .collect()
            })?;
            let not = || Failure::new(Exit::Internal, "the agent is not ready; `droveway status` says more");
            return if readiness.ready { Ok(()) } else { Err(not()) };
        }
        let (status, tunnels) = (agent.status().await?, agent.tunnels().await);
        let tunnels = tunnels.map_or_else(|error| format!("not told: {error}"), |all| tunnel::summary(&all));
        output.object(&status, |status| details(status, tunnels, text::now()).render())
    }
}

fn details(status: &AgentStatus, tunnels: String, now: model::UnixMillis) -> Details {
    let server = match &status.connection {
        Connection::Up { since } => format!("{}, connected for {}", status.server, text::age(*since, now)),
        Connection::Down { since, why } => {
            format!("{}, NOT connected for {}: {why}", status.server, text::age(*since, now))
        }
    };
    let snapshot = match &status.epoch {
        Some(epoch) => format!("revision {} of epoch {epoch}", status.revision),
        None => "none yet".to_owned(),
    };
    let docker = match &status.docker {
        DockerStatus::Off => "not asked for".to_owned(),
        DockerStatus::Waiting { why } => format!("waiting for it: {why}"),
        DockerStatus::Up { version } => format!("up, {version}"),
    };
    let routers: Vec<String> = status.routers.iter().map(router).collect();
    let mut details = Details::default();
    details
        .add("Host", format!("{} ({})", status.name, status.host))
        .add("Agent", status.version.clone())
        .add("Server", server)
        .add("Snapshot", snapshot)
        .add("Addresses", addresses(&status.candidates))
        .add("Certificate", certificate(status.certificate_expires, now))
        .add("Docker", docker)
        .add(
            "Routers",
            if routers.is_empty() {
                "none: no container is attached here".to_owned()
            } else {
                routers.join("\n")
            },
        )
        .add("Tunnels", tunnels)
        .add(
            "Troubles",
            if status.troubles.is_empty() { "none".to_owned() } else { status.troubles.join("\n") },
        );
    details
}

/// How long this host's certificate is good for.
fn certificate(expires: model::UnixMillis, now: model::UnixMillis) -> String {
    if expires == 0 {
        "not told: the agent is of an older version".to_owned()
    } else if expires > now {
        format!("good until {}", text::utc(expires))
    } else {
        format!(
            "has RUN OUT on {}: nothing stops for that; it is renewed when the server answers",
            text::utc(expires)
        )
    }
}

fn router(router: &RouterStatus) -> String {
    let address = router.address.map_or_else(|| "no address yet".to_owned(), |address| address.to_string());
    format!(
        "{} in {}: {address}, MTU {}, {}, blocks {}{}{}",
        router.name,
        router.netns,
        router.mtu,
        text::count(router.endpoints.len(), "endpoint"),
        if router.blocks.is_empty() { "none".to_owned() } else { text::list(&router.blocks) },
        if router.converged {
            ""
        } else {
            ", NOT CONVERGED: the kernel does not show all that should be there"
        },
        router.no_shortcut.as_ref().map_or_else(String::new, |why| format!(", no shortcut ({why})")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(connection: serde_json::Value) -> AgentStatus {
        serde_json::from_value(serde_json::json!({
            "version": "0.1.0", "host": "h-aaaaaaaaaa", "name": "h1", "server": "https://10.0.0.5:7443",
            "connection": connection, "epoch": null, "revision": 0, "candidates": [],
            "routers": [{"network": "n-aaaaaaaaaa", "name": "managed", "netns": "droveway-managed",
                "address": "10.42.64.65", "blocks": ["10.42.64.64/26"], "endpoints": ["e-aaaaaaaaaa"], "mtu": 1450,
                "converged": false, "no_shortcut": "the kernel takes no such programs"}],
            "docker": {"state": "off"}, "troubles": [],
        }))
        .unwrap()
    }

    #[test]
    fn a_lost_server_and_an_unfinished_router_stand_out() {
        let down = status(serde_json::json!({"state": "down", "since": 0, "why": "connection refused"}));
        let text = details(&down, "1 up".to_owned(), 300_000).render();
        assert!(text.contains("NOT connected for 5m: connection refused"), "{text}");
        assert!(text.contains("managed in droveway-managed: 10.42.64.65, MTU 1450, 1 endpoint"), "{text}");
        assert!(text.contains(", no shortcut (the kernel takes no such programs)"), "{text}");
        assert!(text.contains("NOT CONVERGED") && text.contains("Tunnels:      1 up"), "{text}");
        assert!(certificate(100_000, 300_000).contains("RUN OUT on 1970-01-01"));
        assert!(certificate(400_000, 300_000).contains("good until 1970-01-01"));
        let up = status(serde_json::json!({"state": "up", "since": 0}));
        assert!(
            details(&up, String::new(), 300_000).render().contains("https://10.0.0.5:7443, connected for 5m")
        );
    }
}
