//! resolv.conf of containers where the engine's own resolver is a loopback one (DESIGN §8).
//!
//! Docker's resolver (127.0.0.11 in the container) forwards unknown names from the container's namespace, where the
//! router captures them; but to a loopback resolver of the host it forwards from the engine's own namespace, past the
//! router. Then the container's file is made to name the router itself.
//!
//! Invariant: the file keeps its inode. It is a bind mount in the container, which would not see another file.

use std::fs::OpenOptions;
use std::io::{self, Read, Seek, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::names::nameservers;

/// The stub of systemd-resolved, and the file of its upstreams, which the engine reads instead.
const STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));
/// See [`STUB`].
const STUB_UPSTREAMS: &str = "/run/systemd/resolve/resolv.conf";
/// A resolv.conf larger than this is none.
const FILE_MAX: u64 = 64 << 10;

/// Whether the engine would send queries from its own namespace, given the host's resolv.conf.
pub(super) fn bypasses_containers(resolv_conf: &Path) -> bool {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let servers = match nameservers(&read(resolv_conf))[..] {
        [STUB] => nameservers(&read(Path::new(STUB_UPSTREAMS))),
        ref servers => servers.to_vec(),
    };
    // The first server is asked first, and what it says counts.
    servers.first().is_some_and(IpAddr::is_loopback)
}

/// Makes a container's file name the router and search `ours` after the host's own domains.
pub(super) fn rewrite(path: &Path, ours: &[String]) -> io::Result<()> {
    let mut file =
        OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOFOLLOW).open(path)?;
    let mut text = String::new();
    Read::by_ref(&mut file).take(FILE_MAX).read_to_string(&mut text)?;
    let new = rewritten(&text, ours);
    if new != text {
        // Shorter files are read whole or not at all by resolvers; the window between the two calls is theirs to retry.
        file.rewind()?;
        file.write_all(new.as_bytes())?;
        file.set_len(new.len() as u64)?;
    }
    Ok(())
}

fn rewritten(text: &str, ours: &[String]) -> String {
    let mut search: Vec<&str> = Vec::new();
    let mut rest = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("search" | "domain") => search = words.collect(),
            Some("nameserver") | None => {}
            Some(_) => rest.push(line),
        }
    }
    for domain in ours {
        if !search.contains(&domain.as_str()) {
            search.push(domain);
        }
    }
    let mut new = String::new();
    if !search.is_empty() {
        new.push_str("search ");
        new.push_str(&search.join(" "));
        new.push('\n');
    }
    new.push_str("nameserver ");
    new.push_str(&model::SERVICE_ADDRESS.to_string());
    new.push('\n');
    for line in rest {
        new.push_str(line);
        new.push('\n');
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn only_a_loopback_resolver_first_bypasses_the_containers_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        for (text, bypasses) in [
            ("nameserver 127.0.0.1\n", true),
            ("# local\nsearch a\nnameserver ::1\nnameserver 8.8.8.8\n", true),
            ("nameserver 192.0.2.1\nnameserver 127.0.0.1\n", false),
            ("search a\n", false),
            ("", false),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(bypasses_containers(&path), bypasses, "{text:?}");
        }
        assert!(!bypasses_containers(&dir.path().join("none")));
    }

    #[test]
    fn the_file_keeps_its_inode_its_options_and_the_hosts_domains_and_a_second_time_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        std::fs::write(&path, "search corp.example\nnameserver 127.0.0.11\noptions ndots:0\n").unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        let ours = ["chat.droveway.internal".to_owned(), "droveway.internal".to_owned()];
        for _ in 0..2 {
            rewrite(&path, &ours).unwrap();
            assert_eq!(
                std::fs::read_to_string(&path).unwrap(),
                "search corp.example chat.droveway.internal droveway.internal\nnameserver 169.254.169.250\noptions ndots:0\n"
            );
        }
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
    }

    #[test]
    fn a_link_in_the_files_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("resolv.conf"));
        std::fs::write(&target, "precious").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(rewrite(&link, &[]).is_err());
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
    }
}
