//! The command line: verbs in, answers on stdout, remarks and errors on stderr, an exit code that means something.
//!
//! Invariant: a verb reaches the server only by its API and the agent only by its socket.

mod agent;
mod audit;
mod completion;
mod connection;
mod doctor;
mod endpoint;
mod exit;
mod host;
mod ipam;
mod key;
mod kind;
mod local;
mod log;
mod names;
mod network;
mod output;
mod parse;
mod peer;
mod run;
mod server;
mod status;
mod table;
mod text;
mod token;
mod tunnel;

use std::future::Future;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::lab;

pub use exit::{Exit, Failure};
pub use output::Format;
pub(crate) use output::{Output, warn, write};
pub(crate) use table::Table;

/// One private network for the containers of many Linux hosts
///
/// `droveway server` runs on one machine, `droveway agent` on every host; containers on one network then reach each
/// other by address and by name, whichever hosts they are on. All other verbs ask the server, or the agent of this
/// machine.
#[derive(Debug, Parser)]
#[command(
    name = "droveway",
    version,
    arg_required_else_help = true,
    max_term_width = 100,
    after_help = "`droveway VERB --help` explains a verb and gives examples; `droveway --help` also lists the exit codes.",
    after_long_help = long_help(),
)]
pub struct Cli {
    /// How answers are printed: a table for people, or the API's objects as JSON or YAML
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "table|json|yaml",
        hide_possible_values = true,
        display_order = OUTPUT_ORDER
    )]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

/// Below the options that are a verb's own, above --help.
const OUTPUT_ORDER: usize = 900;

#[derive(Debug, Subcommand)]
enum Command {
    Server(Box<server::ServerArgs>),
    Agent(agent::AgentArgs),
    Status(status::StatusArgs),
    Network(network::NetworkArgs),
    Host(host::HostArgs),
    Endpoint(endpoint::EndpointArgs),
    Tunnel(tunnel::TunnelArgs),
    Peer(peer::PeerArgs),
    Token(token::TokenArgs),
    Key(key::KeyArgs),
    Audit(audit::AuditArgs),
    Ipam(ipam::IpamArgs),
    Doctor(doctor::DoctorArgs),
    Completion(completion::CompletionArgs),
    Lab(lab::cli::LabCommand),
    #[command(flatten)]
    Hidden(lab::hidden::Hidden),
}

fn long_help() -> String {
    format!(
        "Examples:
  droveway server                # on one machine; prints what to do next
  droveway token create          # prints what to type on each host
  droveway agent --server https://10.0.0.5:7443 --token-file /etc/droveway/token
  docker run -d --network managed --name db redis
  droveway endpoint ls           # what is attached, where
  droveway tunnel ls             # on a host: how its tunnels are
  droveway doctor                # on a host: what is not as it should be

{}
Environment:
  DROVEWAY_SERVER, DROVEWAY_KEY_FILE, DROVEWAY_CA_FILE, DROVEWAY_ENVIRONMENT
                   how verbs reach the server
  DROVEWAY_TOKEN   the agent's join token
  DROVEWAY_SOCKET  the agent's socket
  DROVEWAY_STATE_DIR
                   the agent's ledger
  DROVEWAY_LOG     how much server and agent log: debug, or info,agent=debug",
        exit::help()
    )
}

/// Does what the command line says. The process ends with the code that this gives.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.run() {
        Ok(code) => code,
        Err(failure) => {
            output::warn(&failure.render());
            failure.exit.into()
        }
    }
}

impl Cli {
    fn run(self) -> Result<ExitCode, Failure> {
        let output = output::Output::new(self.output);
        let done = match self.command {
            Command::Lab(command) => return Ok(lab::cli::main(command, self.output)?),
            Command::Hidden(verb) => return Ok(lab::hidden::main(verb)?),
            Command::Server(args) => match *args {
                server::ServerArgs { verb: Some(verb), .. } => short_lived(verb.run(output)),
                args => run::server(args),
            },
            Command::Agent(args) => run::agent(args),
            Command::Status(args) => short_lived(args.run(output)),
            Command::Network(args) => short_lived(args.run(output)),
            Command::Host(args) => short_lived(args.run(output)),
            Command::Endpoint(args) => short_lived(args.run(output)),
            Command::Tunnel(args) => short_lived(args.run(output)),
            Command::Peer(args) => short_lived(args.run(output)),
            Command::Token(args) => short_lived(args.run(output)),
            Command::Key(args) => short_lived(args.run(output)),
            Command::Audit(args) => short_lived(args.run(output)),
            Command::Ipam(args) => short_lived(args.run(output)),
            Command::Doctor(args) => short_lived(args.run(output)),
            Command::Completion(args) => args.run(),
        };
        done.map(|()| Exit::Ok.into())
    }
}

/// Runs a verb that asks and answers: one thread is enough.
fn short_lived(verb: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    on(tokio::runtime::Builder::new_current_thread(), verb)
}

fn on(
    mut runtime: tokio::runtime::Builder,
    verb: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let runtime = runtime
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Internal, format!("cannot start the runtime: {error}")))?;
    runtime.block_on(verb)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// `visit` for a command and all below it, with its words.
    fn walk(command: &mut clap::Command, words: &str, visit: &mut impl FnMut(&mut clap::Command, &str)) {
        visit(command, words);
        for below in
            command.get_subcommands_mut().filter(|below| below.get_name() != "help" && !below.is_hide_set())
        {
            let words = format!("{words} {}", below.get_name());
            walk(below, &words, visit);
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_explains_itself_and_every_leaf_gives_examples() {
        let mut command = Cli::command();
        command.build();
        let mut seen = Vec::new();
        walk(&mut command, "droveway", &mut |command, words| {
            let leaf = command.get_subcommands().next().is_none();
            let help = command.render_long_help().to_string();
            assert!(command.get_about().is_some(), "{words} says nothing of itself");
            assert!(!leaf || help.contains("Example"), "{words} gives no examples:\n{help}");
            assert!(help.contains("--output"), "{words} lacks -o");
            seen.push(words.to_owned());
        });
        for verb in [
            "network create",
            "network rm",
            "host label",
            "endpoint inspect",
            "token create",
            "key create",
            "audit ls",
            "tunnel ls",
            "tunnel capture",
            "ipam ls",
            "doctor",
            "peer create",
            "status",
            "completion",
        ] {
            assert!(seen.contains(&format!("droveway {verb}")), "{verb} is missing of {seen:?}");
        }
    }

    #[test]
    fn no_line_of_a_help_is_broken_where_a_terminal_of_80_columns_would_not() {
        let mut command = Cli::command();
        command.build();
        walk(&mut command, "droveway", &mut |command, words| {
            let said = [command.get_after_help(), command.get_after_long_help()];
            let said = said.into_iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join("\n\n");
            let lines: Vec<&str> = said.lines().collect();
            for line in lines.iter().filter(|line| line.starts_with(' ')) {
                assert!(line.chars().count() <= 80, "{words}: an example is too long: {line}");
            }
            let prose = |line: &str| !line.is_empty() && !line.starts_with(' ') && !line.ends_with(':');
            let broken = lines.windows(2).find(|pair| prose(pair[0]) && prose(pair[1]));
            assert_eq!(broken, None, "{words}: a paragraph is broken by hand");
        });
    }

    #[test]
    fn every_example_that_is_one_plain_command_parses() {
        let mut command = Cli::command();
        command.build();
        let mut checked = 0;
        walk(&mut command, "droveway", &mut |command, words| {
            let help = command.render_long_help().to_string().replace("\\\n", " ");
            let examples = help.lines().map(str::trim).filter(|line| line.starts_with("droveway "));
            for line in examples {
                let plain = line.split(['|', '>', '#']).next().unwrap_or_default();
                if let Err(error) = Cli::try_parse_from(plain.split_whitespace()) {
                    panic!("in the help of {words}: {line}\n{error}");
                }
                checked += 1;
            }
        });
        assert!(checked > 25, "only {checked} examples were found");
    }

    #[test]
    fn options_of_the_connection_and_the_output_stand_before_or_after_the_verb() {
        for line in [
            "droveway -o json network --server https://h:1 ls",
            "droveway network ls --server h:1 -o json",
            "droveway network --key-file /k create n --subnet 10.0.0.0/16 -o yaml --environment other",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }

    #[test]
    fn the_top_level_help_lists_exit_codes_and_the_version_is_known() {
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains("Exit codes:") && help.contains("3  no such network"), "{help}");
        assert_eq!(Cli::command().render_version(), format!("droveway {}\n", env!("CARGO_PKG_VERSION")));
    }
}
