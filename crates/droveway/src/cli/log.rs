//! What server and agent write of their work, on stderr.

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use super::exit::{Exit, Failure};

/// The variable that says how much is logged.
const VARIABLE: &str = "DROVEWAY_LOG";

/// How the log looks. DROVEWAY_LOG says how much of it: info, debug, or per part, as in `info,agent=debug`.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Log")]
pub(super) struct LogArgs {
    /// Form of the log on stderr; DROVEWAY_LOG says how much of it: info, debug, or info,agent=debug
    #[arg(long, value_enum, default_value_t, value_name = "text|json", hide_possible_values = true)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object a line, for programs.
    Json,
}

impl LogArgs {
    /// Begins to log. Once in a process.
    pub(super) fn start(self) -> Result<(), Failure> {
        let wanted = std::env::var(VARIABLE).unwrap_or_default();
        let wanted = if wanted.trim().is_empty() { "info" } else { wanted.trim() };
        let filter = EnvFilter::try_new(wanted).map_err(|error| {
            Failure::new(Exit::Usage, format!("{VARIABLE}={wanted:?}: {error}"))
                .remedy("DROVEWAY_LOG=info, or info,agent=debug")
        })?;
        let ansi =
            std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
        let log =
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
        match self.log_format {
            LogFormat::Text => log.try_init(),
            LogFormat::Json => log.json().flatten_event(true).try_init(),
        }
        .map_err(|error| Failure::new(Exit::Internal, format!("cannot start the log: {error}")))
    }
}
