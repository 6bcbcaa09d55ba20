//! A namespace on several networks, attached by the agent's socket.

use droveway::client::ask_agent;
use droveway::lab::Lab;
use model::agent_api::{AttachRequest, Attached, Routes};

use crate::support::{LIMIT, Look, idle, idle_in, lab, run_soon, says, succeeds, until};
use crate::watch::{carried, pattern};

const BOX: &str = "/run/netns/box";

fn attach(lab: &Lab, network: &str, ifname: &str, routes: Option<Routes>) -> Result<Attached, String> {
    let request = AttachRequest {
        network: network.to_owned(),
        netns: BOX.into(),
        ifname: ifname.to_owned(),
        name: Some("box".parse().unwrap()),
        stack: None,
        service: None,
        aliases: Vec::new(),
        address: None,
        labels: [].into(),
        ports: Vec::new(),
        routes,
    };
    let socket = lab.agent_socket("h1").unwrap();
    ask_agent(&socket, async |agent| agent.attach(&request).await).map_err(|error| error.to_string())
}

fn inside(lab: &Lab, words: &[&str]) -> String {
    says(lab, "h1", &[&["ip", "netns", "exec", "box"], words].concat())
}

#[test]
fn of_a_namespaces_networks_the_first_has_the_default_route_and_the_names_and_all_are_reached() {
    let lab = lab(2);
    lab.check("server", &["droveway", "network", "create", "red", "--subnet", "10.50.0.0/16"]).unwrap();
    let first = lab.run("h2", &idle("first")).unwrap();
    let second = run_soon(&lab, "h2", &idle_in("red", "second"));
    lab.check("h1", &["ip", "netns", "add", "box"]).unwrap();
    let one = attach(&lab, "managed", "eth0", None).unwrap();
    assert_eq!(one.gateway.unwrap().to_string(), "10.42.0.1");
    let mut two = None;
    until(LIMIT, "red is known", || {
        two = two.take().or_else(|| attach(&lab, "red", "eth1", None).ok());
        two.is_some()
    });
    let two = two.unwrap();
    assert_eq!(two.gateway, None, "it does not say that it is what it is not");
    let routes = inside(&lab, &["ip", "route"]);
    for route in ["default via 10.42.0.1 dev eth0", "169.254.169.250 dev eth0", "10.50.0.0/16 dev eth1"] {
        assert!(routes.contains(route), "{route} in {routes}");
    }
    let pattern = pattern();
    let words = ["ip", "netns", "exec", "box", "ping", "-p", &pattern, "-c", "1", "-W", "1"];
    let pings = |to: &str| succeeds(&lab, "h1", &[&words[..], &[to]].concat());
    for container in [&first, &second] {
        until(LIMIT, "it is reached", || pings(&container.ip().to_string()));
    }
    carried(&lab);
    let dig = |words: &[&str]| inside(&lab, &[&["dig", "+short", "+time=1", "+tries=1"], words].concat());
    until(LIMIT, "a name of the first", || {
        dig(&["@169.254.169.250", "first.droveway.internal"]).trim() == first.ip().to_string()
    });
    assert_eq!(
        dig(&["@169.254.169.250", "second.droveway.internal"]),
        "",
        "docs/agent-socket.md says otherwise"
    );
    until(LIMIT, "a name of the second, of its gateway", || {
        dig(&["@10.50.0.1", "second.droveway.internal"]).trim() == second.ip().to_string()
    });

    // The same again, and with routes that are there: refused with the remedy, and nothing changes.
    for (network, ifname, routes, says) in [
        ("red", "eth1", None, "already; detach that, or choose another ifname"),
        ("red", "eth2", Some(Routes::All), "which routes to bring"),
        ("red", "eth2", Some(Routes::Names), "which routes to bring"),
    ] {
        let why = attach(&lab, network, ifname, routes).unwrap_err();
        assert!(why.contains(says), "{why}");
    }
    assert_eq!(inside(&lab, &["ip", "route"]), routes);
    assert_eq!(lab.endpoints("h1").unwrap().len(), 2);

    // What is lost is made again as it was.
    for ifname in ["eth0", "eth1"] {
        inside(&lab, &["ip", "link", "del", ifname]);
    }
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    until(LIMIT, "both are back", || sorted(&inside(&lab, &["ip", "route"])) == sorted(&routes));
    for attached in [one, two] {
        let socket = lab.agent_socket("h1").unwrap();
        ask_agent(&socket, async |agent| agent.detach(&attached.endpoint.id).await).unwrap();
    }
    assert_eq!(inside(&lab, &["ip", "route"]), "");
    lab.check("h1", &["ip", "netns", "del", "box"]).unwrap();
}
