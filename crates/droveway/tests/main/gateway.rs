//! The gateway to a foreign peer, before a packet flows: its part in the network, and what others may know of the peer.

use droveway::lab::Lab;
use model::agent_api::RouterStatus;

use crate::support::{LIMIT, idle_in, lab, says, ttl, until};

const SECRET: &str = "a secret of the two sides alone";

fn router(lab: &Lab, host: &str) -> Option<RouterStatus> {
    let routers = lab.agent_status(host).unwrap().routers;
    routers.into_iter().find(|router| router.name.as_str() == "safe" && router.address.is_some())
}

#[test]
fn a_gateway_has_a_router_with_an_address_and_others_a_route_to_what_is_behind_its_peer() {
    let lab = lab(2);
    let server = |words: &str| {
        let words: Vec<&str> = words.split_whitespace().collect();
        lab.check("server", &words).unwrap()
    };
    server("droveway network create safe --subnet 10.50.0.0/16 --driver ipsec");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), SECRET).unwrap();
    let create = format!(
        "droveway peer create office --address 10.0.0.99 --psk-file {} --network safe --host h1 --remote-cidr 192.168.77.0/24",
        file.path().display()
    );
    server(&create);
    until(LIMIT, "the gateway has a router without a container", || {
        router(&lab, "h1").is_some_and(|router| router.converged && router.endpoints.is_empty())
    });

    // Another host of the network sends there what is behind the peer.
    let web = lab.run("h2", &idle_in("safe", "web")).unwrap();
    let gateway = router(&lab, "h1").unwrap().address.unwrap().to_string();
    until(LIMIT, "the gateway is reached from there", || ttl(&lab, &web.path(), &gateway) == Some(63));
    let routes = ["ip", "netns", "exec", "droveway-safe", "ip", "route", "get", "192.168.77.1"];
    until(LIMIT, "the other host has the route", || says(&lab, "h2", &routes).contains("tun0"));
    let shown = server("droveway peer inspect office -o json") + &server("droveway network inspect safe");
    assert!(shown.contains("192.168.77.0/24 by way of h1"), "{shown}");
    assert!(!shown.contains(SECRET) && shown.contains("\"by\": \"psk\""), "{shown}");

    server("droveway peer rm office");
    until(LIMIT, "the router goes, and its block", || {
        router(&lab, "h1").is_none() && !server("droveway network inspect safe").contains("on h1")
    });
}
