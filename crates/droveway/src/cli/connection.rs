//! How the verbs find the server, and what they say when it does not know a name.

use std::path::{Path, PathBuf};

use clap::Args;
use model::EnvironmentId;
use model::agent_api::SOCKET;
use reqwest::Url;

use super::exit::{Exit, Failure};
use super::{parse, text};
use crate::client::{AgentSocket, Client, Settings};

/// The port the server listens on unless told otherwise.
pub(super) const PORT: u16 = 7443;
/// Where the server keeps what it has, unless told otherwise.
pub(super) const DATA_DIR: &str = "/var/lib/droveway/server";
/// Where the verbs look for the server.
pub(super) const SERVER: &str = "https://127.0.0.1:7443";
/// Where the verbs look for the key: where the server leaves it.
pub(super) const KEY_FILE: &str = "/var/lib/droveway/server/admin.key";

/// How to reach the server. On the server's own machine nothing need be given.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub(super) struct Connection {
    /// Where the server is
    #[arg(long, global = true, env = "DROVEWAY_SERVER", hide_env_values = true, value_name = "URL", default_value = SERVER, value_parser = parse::server_url)]
    pub(super) server: Url,
    /// File with the API key; the server makes admin.key in its --data-dir at first start
    #[arg(long, global = true, env = "DROVEWAY_KEY_FILE", hide_env_values = true, value_name = "FILE", default_value = KEY_FILE)]
    pub(super) key_file: PathBuf,
    /// File with the CA's certificate that the server must prove itself by [default: ca.pem beside the key file]
    #[arg(long, global = true, env = "DROVEWAY_CA_FILE", hide_env_values = true, value_name = "FILE")]
    pub(super) ca_file: Option<PathBuf>,
    /// The environment: a set of hosts and networks that trust one CA
    #[arg(
        long,
        global = true,
        env = "DROVEWAY_ENVIRONMENT",
        hide_env_values = true,
        value_name = "NAME",
        default_value = "default"
    )]
    pub(super) environment: EnvironmentId,
}

impl Connection {
    /// A client of that server.
    pub(super) fn open(self) -> Result<Client, Failure> {
        let ca_file = self.ca_file.unwrap_or_else(|| beside(&self.key_file, "ca.pem"));
        let settings =
            Settings { server: self.server, key_file: self.key_file, ca_file, environment: self.environment };
        Ok(Client::open(settings)?)
    }
}

/// How to reach the agent of this machine.
#[derive(Debug, Clone, Args)]
pub(super) struct LocalAgent {
    /// The agent's socket
    #[arg(long, global = true, env = "DROVEWAY_SOCKET", hide_env_values = true, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
}

impl LocalAgent {
    /// A client of that agent.
    pub(super) fn open(&self) -> Result<AgentSocket, Failure> {
        Ok(AgentSocket::open(&self.socket)?)
    }
}

fn beside(file: &Path, name: &str) -> PathBuf {
    file.with_file_name(name)
}

/// Does `act` for each name, goes on after a failure, and ends with the first one; the others are printed.
pub(super) async fn each<T>(
    names: &[String],
    mut act: impl AsyncFnMut(&str) -> Result<T, Failure>,
) -> (Vec<T>, Result<(), Failure>) {
    let mut done = Vec::new();
    let mut first: Option<Failure> = None;
    for name in names {
        match (act(name).await, &first) {
            (Ok(answer), _) => done.push(answer),
            (Err(failure), None) => first = Some(failure),
            (Err(failure), Some(_)) => super::output::warn(&failure.render()),
        }
    }
    (done, first.map_or(Ok(()), Err))
}

/// That there is no `what` called `wanted`, and which one may have been meant.
pub(super) fn unknown<'a>(what: &str, wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Failure {
    let remedy = match text::closest(wanted, known) {
        Some(meant) => format!("did you mean {meant:?}?"),
        None => format!("`droveway {what} ls` shows what is there"),
    };
    Failure::new(Exit::NotFound, format!("there is no {what} {wanted:?}")).remedy(remedy)
}

/// Adds to a "not found" of the server what may have been meant. `known` is asked only then; where it fails, the
/// server's own words have to do.
pub(super) async fn suggest(
    error: crate::client::Error,
    what: &str,
    wanted: &str,
    known: impl AsyncFnOnce() -> Result<Vec<String>, crate::client::Error>,
) -> Failure {
    let failure = Failure::from(error);
    if failure.exit != Exit::NotFound {
        return failure;
    }
    match known().await {
        Ok(names) => unknown(what, wanted, names.iter().map(String::as_str)),
        Err(_) => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_is_looked_for_beside_the_key() {
        assert_eq!(beside(Path::new(KEY_FILE), "ca.pem"), Path::new(DATA_DIR).join("ca.pem"));
        assert_eq!(beside(Path::new("admin.key"), "ca.pem"), Path::new("ca.pem"));
    }

    #[test]
    fn an_unknown_name_gets_a_suggestion_or_the_way_to_look() {
        let failure = unknown("network", "mangaed", ["managed", "red"]);
        assert_eq!(failure.exit, Exit::NotFound);
        assert_eq!(
            failure.render(),
            "error: there is no network \"mangaed\"\n  try: did you mean \"managed\"?\n"
        );
        assert!(unknown("network", "blue", ["managed"]).render().contains("droveway network ls"));
    }

    #[tokio::test]
    async fn one_bad_name_does_not_stop_the_others() {
        let names = ["a", "bad", "c"].map(str::to_owned);
        let (done, result) =
            each(
                &names,
                async |name| {
                    if name == "bad" { Err(unknown("network", name, [])) } else { Ok(name.to_owned()) }
                },
            )
            .await;
        assert_eq!(done, ["a", "c"]);
        assert_eq!(result.unwrap_err().exit, Exit::NotFound);
    }
}
