//! `droveway`: server, agent and command line in one binary.

fn main() -> std::process::ExitCode {
    droveway::cli::main()
}
