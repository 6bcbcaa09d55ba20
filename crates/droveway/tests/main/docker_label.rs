//! A label on a plain `docker run` brings the container onto a network. Needs root and a Docker Engine; without, these pass
//! over.

use droveway::lab::{Daemon, Lab};
use model::EndpointKind;

use crate::docker::{IMAGE, address, docker, harbour, nothing_is_left, reaches, run};
use crate::probe;
use crate::support::{LIMIT, says, until};

const LABEL: &str = "--label=droveway.network=managed";
const RANCHERS: &str = "--label=io.rancher.container.network=true";

/// `docker run -d --name NAME MORE IMAGE sleep`: on no network of ours.
fn plain(lab: &Lab, host: &str, name: &str, more: &[&str]) {
    let command =
        [&["run", "-d", "--stop-timeout=0", "--name", name], more, &[IMAGE, "sleep", "1000"]].concat();
    docker(lab, host, &command);
}

fn inside(lab: &Lab, host: &str, name: &str, words: &[&str]) -> String {
    docker(lab, host, &[&["exec", name], words].concat())
}

/// The container's endpoint, once it has one that is described.
fn endpoint(lab: &Lab, host: &str, name: &str) -> model::Endpoint {
    let find = || {
        let mut all = lab.endpoints(host).unwrap().into_iter();
        all.find(|one| one.name.as_ref().is_some_and(|known| known.as_str() == name))
    };
    until(LIMIT, &format!("{name} is attached"), || find().is_some());
    find().unwrap()
}

#[test]
fn a_plain_container_with_the_label_has_the_network_beside_dockers_own_until_it_ends() {
    let Some(lab) = harbour() else { return };
    run(&lab, "h2", "far", &["--label", "droveway.stack=shop", "--label", "droveway.service=till"]);
    let words = ["run", "-d", "--stop-timeout=0", "--name", "plain", LABEL, "--label", "droveway.stack=shop"];
    let serve = ["-p", "8080:80", IMAGE, "httpd", "-f", "-p", "80", "-h", "/www"];
    docker(&lab, "h1", &[&words[..], &serve].concat());
    for end in
        [&["stop", "plain"][..], &["kill", "plain"], &["restart", "-t", "0", "plain"], &["rm", "-f", "plain"]]
    {
        let it = endpoint(&lab, "h1", "plain");
        assert_eq!(it.kind, EndpointKind::Label);
        assert_eq!(it.stack.unwrap().as_str(), "shop");
        let own = inside(&lab, "h1", "plain", &["ip", "-o", "-4", "addr"]);
        assert!(own.contains(&format!("dw0    inet {}/16", it.addresses[0])), "{own}");
        assert!(own.contains("eth0    inet 172."), "Docker's own stays: {own}");
        let routes = inside(&lab, "h1", "plain", &["ip", "route"]);
        assert!(routes.contains("default via 172."), "{routes}");
        assert!(routes.contains("169.254.169.250 dev dw0"), "{routes}");
        until(LIMIT, "resolv.conf names the router", || {
            let text = inside(&lab, "h1", "plain", &["cat", "/etc/resolv.conf"]);
            text.contains("nameserver 169.254.169.250\n".trim()) && text.contains("shop.droveway.internal")
        });
        for name in ["far", "till", "till.shop.droveway.internal"] {
            until(LIMIT, &format!("it reaches {name}"), || reaches(&lab, "h1", "plain", name));
        }
        until(LIMIT, "and is reached by name", || reaches(&lab, "h2", "far", "plain"));
        until(LIMIT, "its published port leads to it", || {
            probe::page(&lab, "server", "10.0.0.5:8080").contains("served")
        });
        docker(&lab, "h1", end);
        until(LIMIT, "it has lost it", || lab.endpoints("h1").unwrap().iter().all(|now| now.id != it.id));
        if matches!(end[0], "stop" | "kill") {
            docker(&lab, "h1", &["start", "plain"]);
        }
    }
    docker(&lab, "h2", &["rm", "-f", "far"]);
    nothing_is_left(&lab, "h1");
}

#[test]
fn a_container_without_any_network_gets_the_labels_as_its_only_one() {
    let Some(lab) = harbour() else { return };
    run(&lab, "h2", "far", &[]);
    let wish = "--label=io.rancher.container.requested_ip=10.42.0.60";
    plain(&lab, "h1", "bare", &["--network", "none", RANCHERS, wish]);
    let it = endpoint(&lab, "h1", "bare");
    assert_eq!(it.addresses[0].to_string(), "10.42.0.60");
    let own = inside(&lab, "h1", "bare", &["ip", "-o", "-4", "addr"]);
    assert!(own.contains("eth0    inet 10.42.0.60/16") && own.lines().count() == 2, "{own}");
    let routes = inside(&lab, "h1", "bare", &["ip", "route"]);
    assert!(routes.contains("default via 10.42.0.1 dev eth0"), "{routes}");
    until(LIMIT, "it reaches the other by name", || reaches(&lab, "h1", "bare", "far"));
    until(LIMIT, "and the outside", || reaches(&lab, "h1", "bare", "10.0.0.2"));
    until(LIMIT, "and is reached", || reaches(&lab, "h2", "far", "bare"));
    docker(&lab, "h1", &["rm", "-f", "bare"]);
    docker(&lab, "h2", &["rm", "-f", "far"]);
    nothing_is_left(&lab, "h1");
}

#[test]
fn what_happened_to_containers_with_a_label_while_agent_or_engine_was_away_is_made_up_for() {
    let Some(lab) = harbour() else { return };
    run(&lab, "h2", "far", &[]);
    let far = address(&lab, "h2", "far", "managed").to_string();
    for name in ["stays", "again", "goes"] {
        plain(&lab, "h1", name, &[LABEL]);
    }
    let (stays, again) = (endpoint(&lab, "h1", "stays"), endpoint(&lab, "h1", "again"));
    endpoint(&lab, "h1", "goes");
    lab.kill_agent("h1").unwrap();
    docker(&lab, "h1", &["rm", "-f", "goes"]);
    docker(&lab, "h1", &["restart", "-t", "0", "again"]);
    plain(&lab, "h1", "comes", &[LABEL]);
    plain(&lab, "h1", "bare", &["--network", "none", LABEL]);
    lab.start_agent("h1").unwrap();
    for name in ["stays", "again", "comes", "bare"] {
        until(LIMIT, &format!("{name} reaches the other host"), || reaches(&lab, "h1", name, &far));
        until(LIMIT, &format!("{name} is reached by name"), || reaches(&lab, "h2", "far", name));
    }
    until(LIMIT, "what has gone is forgotten", || lab.endpoints("h1").unwrap().len() == 4);
    assert_eq!(endpoint(&lab, "h1", "stays"), stays, "nothing happened to it");
    assert_ne!(endpoint(&lab, "h1", "again").id, again.id);

    // Containers end with their engine, and it has no time to say so.
    lab.kill_daemon("h1", Daemon::Docker).unwrap();
    lab.start_daemon("h1", Daemon::Docker).unwrap();
    until(LIMIT, "all are gone", || lab.endpoints("h1").unwrap().is_empty());
    docker(&lab, "h1", &["start", "bare"]);
    until(LIMIT, "one comes back", || reaches(&lab, "h1", "bare", "far"));
    docker(&lab, "h1", &["rm", "-f", "stays", "again", "comes", "bare"]);
    docker(&lab, "h2", &["rm", "-f", "far"]);
    nothing_is_left(&lab, "h1");
}

#[test]
fn a_label_that_cannot_be_is_told_and_one_for_a_network_to_come_is_kept() {
    let Some(lab) = harbour() else { return };
    let log = || std::fs::read_to_string(lab.daemon_log("h1", Daemon::Agent)).unwrap();
    plain(&lab, "h1", "early", &["--label=droveway.network=red"]);
    plain(&lab, "h1", "odd", &[LABEL, "--label=droveway.address=banana"]);
    plain(&lab, "h1", "host", &[LABEL, "--network=host"]);
    run(&lab, "h1", "both", &["--label=droveway.network=red"]);
    for told in [
        "container /early: it is not attached as its label asks: network \"red\" does not exist",
        "container /odd: its label droveway.address=banana is no address",
        "container /host: its label asks for network \"managed\"",
        "container /both: its label asks for network \"red\"",
    ] {
        until(LIMIT, told, || log().replace("\\\"", "\"").contains(told));
    }
    assert_eq!(lab.endpoints("h1").unwrap().len(), 1, "what Docker attached itself");
    lab.check("server", &["droveway", "network", "create", "red", "--subnet", "10.50.0.0/16"]).unwrap();
    until(LIMIT, "early is on red", || {
        says(&lab, "h1", &["docker", "exec", "early", "ip", "-o", "-4", "addr"])
            .contains("dw0    inet 10.50.")
    });
}
