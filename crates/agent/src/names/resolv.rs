//! `/etc/resolv.conf`: the host's is read, the containers' is written (resolv.conf(5)).

use std::net::{IpAddr, Ipv4Addr};

use model::{Endpoint, SERVICE_ADDRESS};

use crate::View;

/// The text of a container's `/etc/resolv.conf`: the host's own search domains, then those of the endpoint.
///
/// `ndots` and the like are left at the resolver's defaults.
pub fn resolv_conf(view: &View, endpoint: &Endpoint, host_search: &[String]) -> String {
    let mut search: Vec<String> = Vec::new();
    for domain in host_search.iter().cloned().chain(view.search_list(endpoint)) {
        if !search.iter().any(|known| known.eq_ignore_ascii_case(&domain)) {
            search.push(domain);
        }
    }
    format!("search {}\nnameserver {SERVICE_ADDRESS}\n", search.join(" "))
}

/// What matters to us of a `resolv.conf`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolv {
    /// The search list: of the last `search` or `domain` line, without dots at the ends.
    pub search: Vec<String>,
    /// The name servers in their order. The local host's if the text names none, as resolv.conf(5) has it.
    pub nameservers: Vec<IpAddr>,
}

impl Resolv {
    /// Reads the text. What it does not understand it leaves out: the host's own resolver does the same.
    pub fn parse(text: &str) -> Self {
        let mut resolv = Self { search: Vec::new(), nameservers: nameservers(text) };
        for line in text.lines() {
            let mut words = words(line);
            match words.next() {
                Some("search") => resolv.search = words.filter_map(domain).collect(),
                Some("domain") => resolv.search = words.take(1).filter_map(domain).collect(),
                Some(_) | None => {}
            }
        }
        if resolv.nameservers.is_empty() {
            resolv.nameservers.push(Ipv4Addr::LOCALHOST.into());
        }
        resolv
    }
}

/// The name servers that the text names, in their order.
pub(crate) fn nameservers(text: &str) -> Vec<IpAddr> {
    let lines = text.lines().map(words);
    let named =
        lines.filter_map(|mut line| line.next().filter(|word| *word == "nameserver").and(line.next()));
    named.filter_map(nameserver).collect()
}

/// A line's words, without a comment.
fn words(line: &str) -> std::str::SplitAsciiWhitespace<'_> {
    line.split(['#', ';']).next().unwrap_or_default().split_ascii_whitespace()
}

/// A name server's address. One with a zone (`fe80::1%eth0`) is left out: it needs an interface as well.
fn nameserver(word: &str) -> Option<IpAddr> {
    let address: IpAddr = word.parse().ok()?;
    if address.is_unspecified() {
        // The resolver takes it for the local host.
        return Some(match address {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    Some(address)
}

fn domain(word: &str) -> Option<String> {
    // systemd-resolved writes "search ." for none.
    let domain = word.trim_matches('.');
    (!domain.is_empty()).then(|| domain.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::fixtures::{endpoint, view};

    #[test]
    fn a_container_searches_the_hosts_domains_then_stack_service_and_domain() {
        let view =
            view("rancher.internal", vec![endpoint(1, "mongo", "rocket-chat", "rocketchat", "10.42.0.2")]);
        let endpoint = view.local.values().next().unwrap();
        assert_eq!(
            resolv_conf(&view, endpoint, &["us-west-2.compute.internal".to_owned()]),
            "search us-west-2.compute.internal rocket-chat.rancher.internal \
             rocketchat.rocket-chat.rancher.internal rancher.internal\nnameserver 169.254.169.250\n"
        );
    }

    #[test]
    fn a_domain_is_searched_once() {
        let view = view("corp.example", vec![endpoint(1, "db", "", "", "10.42.0.2")]);
        let endpoint = view.local.values().next().unwrap();
        let text = resolv_conf(&view, endpoint, &["Corp.Example".to_owned()]);
        assert_eq!(text, "search Corp.Example\nnameserver 169.254.169.250\n");
    }

    #[test]
    fn the_hosts_file_is_read_as_its_own_resolver_reads_it() {
        let resolv = Resolv::parse(
            "# made by hand\ndomain old.example\nsearch a.example. b.example ; two\n\
             nameserver 127.0.0.53\n  nameserver 2001:db8::53 # six\nnameserver fe80::1%eth0\nnameserver nonsense\n\
             nameserver 0.0.0.0\noptions ndots:2 edns0\n",
        );
        assert_eq!(resolv.search, ["a.example", "b.example"]);
        let expected: Vec<IpAddr> =
            ["127.0.0.53", "2001:db8::53", "127.0.0.1"].iter().map(|a| a.parse().unwrap()).collect();
        assert_eq!(resolv.nameservers, expected);
        assert_eq!(Resolv::parse("search a.example\ndomain b.example").search, ["b.example"]);
        assert!(Resolv::parse("search .\n").search.is_empty());
    }

    #[test]
    fn a_file_without_name_servers_means_the_local_host() {
        assert_eq!(Resolv::parse("").nameservers, [IpAddr::from([127, 0, 0, 1])]);
    }
}
