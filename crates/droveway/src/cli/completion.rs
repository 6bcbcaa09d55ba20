//! `droveway completion`: scripts that complete verbs and options in a shell.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use super::exit::Failure;
use super::output::write;

/// Print a script that completes verbs and options in a shell
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  source <(droveway completion bash)                  # this shell only
  droveway completion bash > /etc/bash_completion.d/droveway
  droveway completion zsh > \"${fpath[1]}/_droveway\"
  droveway completion fish > ~/.config/fish/completions/droveway.fish")]
pub(super) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl CompletionArgs {
    pub(super) fn run(self) -> Result<(), Failure> {
        write(&script(self.shell))
    }
}

fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "droveway", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_shell_gets_a_script_that_knows_the_verbs() {
        for shell in Shell::value_variants() {
            let script = script(*shell);
            for word in ["droveway", "network", "create", "block-size", "inspect", "token-file"] {
                assert!(script.contains(word), "{shell} lacks {word}");
            }
        }
    }

    #[test]
    fn bash_accepts_its_script() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), script(Shell::Bash)).unwrap();
        let checked = std::process::Command::new("bash").arg("-n").arg(file.path()).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    }
}
