//! `droveway key`: create, ls, rm.

use clap::{Args, Subcommand, ValueEnum};
use model::Name;
use model::api::{KeyRequest, KeyView, Role, path};

use super::connection::Connection;
use super::exit::Failure;
use super::kind::{Kind, remove};
use super::output::Output;
use super::table::Table;
use super::{parse, text};

/// API keys: what people and programs prove themselves with
#[derive(Debug, Args)]
pub(super) struct KeyArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a key and print it
    ///
    /// It is printed this once; the server keeps a hash of it. Its name stands in the audit log beside what is done with it:
    /// give each person and each program one of their own.
    #[command(after_help = "Examples:
  droveway key create alice > alice.key
  DROVEWAY_KEY_FILE=alice.key droveway host ls     # where ca.pem is beside it
  droveway key create ci --expires 90d > ci.key
  droveway key create prometheus --role read > prometheus.key

The name of a key that has expired may be given anew.")]
    Create {
        /// What it is called
        #[arg(value_name = "NAME")]
        name: Name,
        /// admin: everything. read: look at everything, metrics and the audit log too; change nothing
        #[arg(long, value_enum, default_value_t, value_name = "admin|read", hide_possible_values = true)]
        role: RoleArg,
        /// For how long it is good: a number and s, m, h, d or w [default: without end]
        #[arg(long, value_name = "TIME", value_parser = parse::ttl)]
        expires: Option<u64>,
    },
    /// List keys; their texts are not shown
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway key ls

\"admin\" is the key in the server's admin.key file."
    )]
    Ls,
    /// End keys: at once, nothing can be done with them any more
    #[command(aliases = ["remove", "delete"], after_help = "To have another admin key, remove admin.key from the server's --data-dir and start the server again.

Examples:
  droveway key rm alice")]
    Rm {
        /// Names
        #[arg(required = true, value_name = "NAME", value_parser = parse::reference)]
        names: Vec<String>,
    },
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum RoleArg {
    #[default]
    Admin,
    Read,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Admin => Self::Admin,
            RoleArg::Read => Self::Read,
        }
    }
}

impl KeyArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let client = self.connection.open()?;
        match self.verb {
            Verb::Create { name, role, expires } => {
                let request = KeyRequest { name, role: role.into(), ttl_seconds: expires };
                let created = client.create_key(&request).await?;
                // The key alone, so that it can be sent to a file.
                output.object(&created, |created| format!("{}\n", created.key))?;
                output.remark(&format!("{} It is shown this once.", told(&created.view)));
                Ok(())
            }
            Verb::Ls => output.list(&client.keys().await?, table, "There is no key."),
            Verb::Rm { names } => remove::<KeyView>(&client, output, &names).await,
        }
    }
}

impl Kind for KeyView {
    const WHAT: &'static str = "key";
    const PATH: &'static str = path::KEYS;

    fn name(&self) -> &str {
        &self.name
    }
}

fn told(key: &KeyView) -> String {
    let until = key.expires.map_or_else(|| "without end".to_owned(), |at| format!("until {}", text::utc(at)));
    format!("Key {}, role {}, is good {until}.", key.name, key.role.as_str())
}

fn table(keys: &[KeyView]) -> Table {
    let now = text::now();
    let mut table = Table::new(["NAME", "ROLE", "EXPIRES IN", "AGE"], &["NAME", "ROLE"]);
    for key in keys {
        table.row([
            key.name.clone(),
            key.role.as_str().to_owned(),
            key.expires.map_or_else(|| "never".to_owned(), |at| text::until(at, now)),
            text::age(key.created, now),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_shows_its_role_and_its_end() {
        let key = KeyView { name: "ci".into(), role: Role::Read, created: 0, expires: Some(86_400_000) };
        assert_eq!(told(&key), "Key ci, role read, is good until 1970-01-02 00:00:00 UTC.");
        let endless = KeyView { expires: None, ..key };
        assert!(told(&endless).contains("without end"));
        let row = table(&[endless]).render(None);
        assert!(row.lines().nth(1).unwrap().contains("never"), "{row}");
    }
}
