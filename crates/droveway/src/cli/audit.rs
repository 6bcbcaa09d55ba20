//! `droveway audit`: who changed what.

use clap::{Args, Subcommand};
use model::api::{AuditEntry, Outcome};

use super::connection::Connection;
use super::exit::{Exit, Failure};
use super::output::{Format, Output, write};
use super::table::Table;
use super::{parse, text};

/// The audit log: who changed what, from where, and how it ended
#[derive(Debug, Args)]
pub(super) struct AuditArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List what was asked to be changed, the oldest first
    ///
    /// Each line is a request of somebody who was known: a person's key, a host, a join token. What was refused is there,
    /// too. Secrets never are.
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway audit ls --since 1h
  droveway audit ls --follow
  droveway audit ls --follow -o json | jq 'select(.outcome == \"refused\")'

With --follow, -o json prints an object a line. Each server keeps its own log, of 128 MiB at most: the oldest goes first."
    )]
    Ls {
        /// Not what is older: a number and s, m, h, d or w [default: all there is]
        #[arg(long, value_name = "TIME", value_parser = parse::ttl)]
        since: Option<u64>,
        /// Go on with what comes, until interrupted
        #[arg(long, short)]
        follow: bool,
    },
}

impl AuditArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let client = self.connection.open()?;
        let Verb::Ls { since, follow } = self.verb;
        let since = since.map_or(0, |seconds| text::now().saturating_sub(seconds.saturating_mul(1000)));
        let mut log = client.audit(since, follow).await?;
        if follow {
            while let Some(entry) = log.next().await? {
                write(&line(&entry, output.format())?)?;
            }
            return Err(
                Failure::new(Exit::Unreachable, "the server ended the log").remedy("again in a moment")
            );
        }
        let mut entries = Vec::new();
        while let Some(entry) = log.next().await? {
            entries.push(entry);
        }
        output.list(&entries, table, "Nothing was asked to be changed.")
    }
}

/// One entry as it comes.
fn line(entry: &AuditEntry, format: Format) -> Result<String, Failure> {
    let failed = |error: String| Failure::new(Exit::Internal, format!("cannot print the answer: {error}"));
    match format {
        Format::Table => Ok(text::printable(&cells(entry).join("  ")) + "\n"),
        Format::Json => Ok(serde_json::to_string(entry).map_err(|error| failed(error.to_string()))? + "\n"),
        Format::Yaml => {
            let text = serde_yaml_ng::to_string(entry).map_err(|error| failed(error.to_string()))?;
            Ok(format!("---\n{text}"))
        }
    }
}

fn table(entries: &[AuditEntry]) -> Table {
    let mut table = Table::new(
        ["TIME", "WHO", "WHAT", "ABOUT", "OUTCOME", "REVISION", "FROM", "REQUEST"],
        &["TIME", "WHO", "WHAT", "OUTCOME"],
    );
    for entry in entries {
        table.row(cells(entry));
    }
    table
}

fn cells(entry: &AuditEntry) -> [String; 8] {
    let outcome = match entry.outcome {
        Outcome::Done => "done",
        Outcome::Refused => "refused",
        Outcome::Failed => "failed",
    };
    // The environment is the one that was asked about.
    let what = match entry.what.split_once("/v1/environments/") {
        Some((method, rest)) => format!("{method}{}", rest.find('/').map_or("", |at| &rest[at..])),
        None => entry.what.clone(),
    };
    [
        text::utc(entry.at),
        entry.who.clone(),
        what,
        entry.about.clone().unwrap_or_default(),
        outcome.to_owned(),
        entry.revision.map(|revision| revision.to_string()).unwrap_or_default(),
        entry.from.clone(),
        entry.request.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_who_what_and_how_it_ended() {
        let entry: AuditEntry = serde_json::from_value(serde_json::json!({
            "number": 7, "at": 0, "request": "ab12", "who": "key alice", "from": "10.0.0.9:41234",
            "what": "DELETE /v1/environments/default/hosts/h3", "outcome": "done", "revision": 42,
        }))
        .unwrap();
        assert_eq!(
            cells(&entry),
            [
                "1970-01-01 00:00:00 UTC",
                "key alice",
                "DELETE /hosts/h3",
                "",
                "done",
                "42",
                "10.0.0.9:41234",
                "ab12"
            ]
        );
        let json = line(&entry, Format::Json).unwrap();
        assert_eq!(serde_json::from_str::<AuditEntry>(&json).unwrap(), entry);
        assert_eq!(json.lines().count(), 1);
    }
}
