//! Facts about the host, and room in its iptables: in real namespaces.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod sandbox;

use std::process::Command;

use linux::forward::{self, Forwarding};
use linux::{Kernel, host};
use sandbox::{converge, desired, ip, sh, underlay};

#[test]
fn the_hosts_addresses_and_routes_are_told_without_our_own() {
    sandbox::run("the_hosts_addresses_and_routes_are_told_without_our_own", |dir| {
        underlay();
        sh("ip route add 10.8.0.0/16 via 10.9.0.254; ip link set und0 mtu 1400");
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &desired());
        let addresses = host::addresses().unwrap();
        let found: Vec<_> =
            addresses.iter().map(|a| (a.ifname.as_str(), a.address, a.prefix, a.mtu, a.up)).collect();
        assert_eq!(found, [("und0", ip("10.9.0.1"), 24, 1400, true)]);
        let mut routes: Vec<_> =
            host::routes().unwrap().iter().map(|r| format!("{} {}", r.destination, r.dev)).collect();
        routes.sort();
        assert_eq!(routes, ["10.8.0.0/16 und0", "10.9.0.0/24 und0"]);
        assert_eq!(host::source_for(ip("10.8.0.1")), Some(ip("10.9.0.1")));
        assert_eq!(host::source_for(ip("203.0.113.1")), None);
    });
}

#[test]
fn forwarding_is_let_through_where_iptables_would_drop_it_and_left_alone_elsewhere() {
    sandbox::run("forwarding_is_let_through_where_iptables_would_drop_it_and_left_alone_elsewhere", |_| {
        if Command::new("iptables").arg("-S").output().is_err() {
            assert_eq!(forward::ensure("dw+").unwrap(), Forwarding::Open, "no iptables, nothing in the way");
            return;
        }
        assert_eq!(forward::ensure("dw+").unwrap(), Forwarding::Open);
        sh("iptables -P FORWARD DROP");
        for _ in 0..2 {
            assert_eq!(forward::ensure("dw+").unwrap(), Forwarding::Accepted("FORWARD"));
        }
        assert_eq!(sh("iptables -S FORWARD | grep -c droveway").trim(), "2", "once each way");
        sh("iptables -N DOCKER-USER");
        assert_eq!(forward::ensure("dw+").unwrap(), Forwarding::Accepted("DOCKER-USER"));
        assert_eq!(sh("iptables -S DOCKER-USER | grep -c droveway").trim(), "2");
        // As the engine guards the containers on its bridges.
        sh("iptables -N DOCKER; for b in docker0 br-1; do iptables -A FORWARD -o $b -j DOCKER; done");
        forward::ensure("dw+").unwrap();
        let rules = || {
            sh(
                "iptables -S DOCKER-USER | grep -o '[-]i dw.*\\|[-]o dw.*' | sed 's/-m comment --comment droveway //'",
            )
        };
        let (returned, accepted) = ("-i dw+ -o docker0 -j RETURN\n", "-i dw+ -j ACCEPT\n-o dw+ -j ACCEPT\n");
        let another = "-i dw+ -o br-1 -j RETURN\n";
        assert_eq!(
            rules(),
            format!("{another}{returned}{accepted}"),
            "Docker judges before we let it through"
        );
        sh(
            "iptables -D FORWARD -o br-1 -j DOCKER; iptables -I DOCKER-USER -i dw+ -m comment --comment droveway -j ACCEPT",
        );
        sh("iptables -A DOCKER-USER -s 192.0.2.1 -j DROP");
        forward::ensure("dw+").unwrap();
        assert_eq!(rules(), format!("{returned}{accepted}"), "as the bridges are now, and in their order");
        forward::remove().unwrap();
        let left = sh("iptables -S");
        assert!(!left.contains("droveway") && left.contains("192.0.2.1"), "{left}");
    });
}
