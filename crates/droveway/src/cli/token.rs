//! `droveway token`: create, ls, rm.

use std::net::IpAddr;

use clap::{Args, Subcommand};
use model::api::{TokenCreated, TokenRequest, TokenView, path};
use reqwest::Url;

use super::connection::{Connection, PORT};
use super::exit::Failure;
use super::kind::{Kind, remove};
use super::output::{Output, write};
use super::table::Table;
use super::{local, parse, text};

/// Join tokens: what a new host proves itself with
#[derive(Debug, Args)]
pub(super) struct TokenArgs {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a token and print the command that joins a host
    ///
    /// The token carries the CA's fingerprint, so that a joining host knows whom it talks to. Its secret is shown
    /// this once; the server keeps a hash of it.
    #[command(after_help = "Examples:
  droveway token create                       # any number of hosts, for a day
  droveway token create --uses 1 --expires 1h # one host, within the hour
  droveway token create --quiet > token       # the token alone, for a script
  droveway token create -o json | jq -r .token")]
    Create {
        /// How many hosts may join with it [default: no limit]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        uses: Option<u32>,
        /// For how long it is good: a number and s, m, h, d or w
        #[arg(long = "expires", visible_alias = "ttl", value_name = "TIME", default_value = "24h", value_parser = parse::ttl)]
        ttl: u64,
        /// Print the token alone
        #[arg(long, short)]
        quiet: bool,
    },
    /// List tokens; their secrets are not shown
    #[command(
        alias = "list",
        after_help = "Examples:
  droveway token ls"
    )]
    Ls,
    /// End tokens; hosts that joined with them stay
    #[command(aliases = ["remove", "delete"], after_help = "Examples:
  droveway token rm ab3d9k")]
    Rm {
        /// Ids, as `droveway token ls` shows them
        #[arg(required = true, value_name = "ID", value_parser = parse::reference)]
        ids: Vec<String>,
    },
}

impl TokenArgs {
    pub(super) async fn run(self, output: Output) -> Result<(), Failure> {
        let client = self.connection.open()?;
        match self.verb {
            Verb::Create { uses, ttl, quiet } => {
                let created = client.create_token(&TokenRequest { uses, ttl_seconds: Some(ttl) }).await?;
                if quiet {
                    return write(&format!("{}\n", created.token));
                }
                let (url, guessed) = reachable(&client.settings().server, local::address());
                output.object(&created, |created| instructions(created, &url))?;
                if let Some(remark) = guessed {
                    output.remark(&remark);
                }
                Ok(())
            }
            Verb::Ls => {
                let tokens = client.tokens().await?;
                output.list(&tokens, table, "There is no token; `droveway token create` makes one.")
            }
            Verb::Rm { ids } => remove::<TokenView>(&client, output, &ids).await,
        }
    }
}

impl Kind for TokenView {
    const WHAT: &'static str = "token";
    const PATH: &'static str = path::TOKENS;

    fn name(&self) -> &str {
        &self.id
    }
}

/// The server's URL as other hosts can use it. Where this machine knows it by a loopback address, the machine's own
/// address is a guess, and said to be one.
fn reachable(server: &Url, own: Option<IpAddr>) -> (String, Option<String>) {
    let host = server.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let trimmed = server.as_str().trim_end_matches('/');
    if !loopback {
        return (trimmed.to_owned(), None);
    }
    let port = server.port_or_known_default().unwrap_or(PORT);
    match own {
        Some(address) => (
            local::url(address, port),
            Some(format!(
                "{address} is this machine's address on its default route; use another one if your hosts reach it by that."
            )),
        ),
        None => (
            format!("https://SERVER:{port}"),
            Some("Put an address of this machine, by which your hosts reach it, for SERVER.".to_owned()),
        ),
    }
}

/// What to type on a new host. The token goes into a file by a here-document, so that it shows in no list of processes.
fn instructions(created: &TokenCreated, url: &str) -> String {
    let TokenCreated { token, view } = created;
    let hosts = view
        .uses_left
        .map_or_else(|| "any number of hosts".to_owned(), |uses| text::count(uses as usize, "host"));
    format!(
        "Token {id} lets {hosts} join until {expires}. It is shown this once.\n\
         \n\
         On each new host, as root:\n\
         \n\
         install -D -m 600 /dev/stdin /etc/droveway/token <<'EOF'\n\
         {token}\n\
         EOF\n\
         droveway agent --server {url} --token-file /etc/droveway/token\n",
        id = view.id,
        expires = text::utc(view.expires),
    )
}

fn table(tokens: &[TokenView]) -> Table {
    let now = text::now();
    let mut table = Table::new(["ID", "STATE", "USED", "USES LEFT", "EXPIRES IN", "AGE"], &["ID", "STATE"]);
    for token in tokens {
        table.row([
            token.id.clone(),
            state(token, now).to_owned(),
            token.used.to_string(),
            token.uses_left.map_or_else(|| "no limit".to_owned(), |left| left.to_string()),
            text::until(token.expires, now),
            text::age(token.created, now),
        ]);
    }
    table
}

/// Whether a token still lets a host in, and if not, why.
fn state(token: &TokenView, now: model::UnixMillis) -> &'static str {
    if token.revoked.is_some() {
        "revoked"
    } else if token.expires <= now {
        "expired"
    } else if token.uses_left == Some(0) {
        "used up"
    } else {
        "good"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_join_command_keeps_the_token_off_the_command_line() {
        let created = TokenCreated {
            token: "dwj1.ab3.s3cret.00".to_owned(),
            view: TokenView {
                id: "ab3".into(),
                created: 0,
                expires: 86_400_000,
                uses_left: Some(1),
                used: 0,
                revoked: None,
            },
        };
        let text = instructions(&created, "https://10.0.0.5:7443");
        assert!(text.contains("lets 1 host join until 1970-01-02"), "{text}");
        assert!(text.contains("droveway agent --server https://10.0.0.5:7443 --token-file"), "{text}");
        let with_secret: Vec<&str> = text.lines().filter(|line| line.contains("s3cret")).collect();
        assert_eq!(
            with_secret,
            [created.token.as_str()],
            "the secret stands on a line of its own: no command's argument"
        );
    }

    #[test]
    fn the_list_says_why_a_token_lets_nobody_in() {
        let good =
            TokenView { id: "a".into(), created: 0, expires: 10, uses_left: Some(1), used: 0, revoked: None };
        assert_eq!(state(&good, 5), "good");
        assert_eq!(state(&good, 10), "expired");
        assert_eq!(state(&TokenView { uses_left: Some(0), ..good.clone() }, 5), "used up");
        assert_eq!(state(&TokenView { revoked: Some(3), ..good }, 5), "revoked");
    }

    #[test]
    fn a_loopback_url_is_replaced_by_one_that_hosts_can_use() {
        let url = |text: &str| text.parse::<Url>().unwrap();
        let own = Some("10.0.0.5".parse().unwrap());
        for loopback in ["https://127.0.0.1:7443", "https://localhost:7443", "https://[::1]:7443"] {
            let (text, remark) = reachable(&url(loopback), own);
            assert_eq!(text, "https://10.0.0.5:7443");
            assert!(remark.unwrap().contains("default route"));
        }
        assert_eq!(reachable(&url("https://127.0.0.1:1"), None).0, "https://SERVER:1");
        assert_eq!(reachable(&url("https://h:7443"), own), ("https://h:7443".to_owned(), None));
    }
}
