//! The `droveway` program. Only the lab's verbs so far.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use droveway::lab;

#[derive(Parser)]
#[command(name = "droveway", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Several hosts on this one machine.
    Lab(lab::cli::LabCommand),
    #[command(flatten)]
    Hidden(lab::hidden::Hidden),
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Lab(command) => lab::cli::main(command, lab::cli::Format::Table),
        Verb::Hidden(verb) => lab::hidden::main(verb),
    };
    done.unwrap_or_else(|error| {
        eprintln!("droveway: {error:#}");
        ExitCode::FAILURE
    })
}
