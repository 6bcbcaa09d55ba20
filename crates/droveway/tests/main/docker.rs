//! `docker run --network managed …` is all it takes. Needs root and a Docker Engine; without, these pass over.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::LazyLock;

use droveway::lab::{Daemon, Lab, LabSpec};

use crate::probe;
use crate::steady::Steady;
use crate::support::{LIMIT, converged, in_router, lines, says, spec, succeeds, ttl, ttl_of, until};
use crate::watch::{Watched, canary, carried};

pub const IMAGE: &str = "app:test";

/// An image of nothing but Debian's static busybox, as a tar archive.
static ARCHIVE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let root = tempfile::tempdir().unwrap();
    let script =
        "cd \"$1\" && mkdir -p bin www etc tmp proc sys && cp \"$(command -v busybox)\" bin/busybox &&
        for name in sh sleep ping wget httpd ip cat nslookup; do ln -s busybox bin/$name; done &&
        echo served >www/index.html && tar -c .";
    let output = std::process::Command::new("sh")
        .args(["-c", script, "sh", root.path().to_str().unwrap()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
});

/// A lab of two hosts with engines that have the image; nothing where there can be none.
pub fn harbour() -> Option<Watched> {
    harbour_with(&[])
}

/// The same with more arguments for the engines.
fn harbour_with(docker_args: &[&str]) -> Option<Watched> {
    let engine = std::process::Command::new("dockerd").arg("--version").stdout(Stdio::null()).status();
    if !nix::unistd::geteuid().is_root() || !engine.is_ok_and(|status| status.success()) {
        println!("passed over: this needs root and dockerd");
        return None;
    }
    let docker_args = lines(&docker_args.join("\n"));
    let lab = Watched::up(LabSpec { docker: true, docker_args, ..spec(2) });
    for host in lab.hosts() {
        let mut import = lab.spawn(&host, &["docker", "import", "-", IMAGE]).unwrap();
        import.stdin.take().unwrap().write_all(&ARCHIVE).unwrap();
        let output = import.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    Some(lab)
}

pub fn docker(lab: &Lab, host: &str, words: &[&str]) -> String {
    let command: Vec<&str> = ["docker"].iter().chain(words).copied().collect();
    lab.check(host, &command).unwrap().trim().to_owned()
}

/// `docker run -d --network managed --name NAME MORE IMAGE sleep`.
pub fn run(lab: &Lab, host: &str, name: &str, more: &[&str]) {
    let command =
        [&["run", "-d", "--network", "managed", "--name", name], more, &[IMAGE, "sleep", "1000"]].concat();
    docker(lab, host, &command);
}

pub fn address(lab: &Lab, host: &str, name: &str, network: &str) -> Ipv4Addr {
    let form = format!("{{{{(index .NetworkSettings.Networks {network:?}).IPAddress}}}}");
    let text = docker(lab, host, &["inspect", "-f", &form, name]);
    text.parse().unwrap_or_else(|_| panic!("docker inspect of {name} shows {text:?}"))
}

/// Whether a ping from a container of an engine arrives. After it goes the canary, to a port where nobody is: busybox's
/// ping cannot carry it.
pub fn reaches(lab: &Lab, host: &str, name: &str, to: &str) -> bool {
    let script = "ping -c 1 -W 1 \"$1\" && { echo \"$2\" | busybox nc -u -w 1 \"$1\" 9; true; }";
    let text = says(lab, host, &["docker", "exec", name, "sh", "-c", script, "sh", to, canary()]);
    let ttl = ttl_of(&text);
    if ttl == Some(62) {
        carried(lab);
    }
    ttl.is_some()
}

fn server_knows(lab: &Lab) -> Vec<model::Endpoint> {
    let text = lab.check("server", &["droveway", "endpoint", "ls", "-o", "json"]).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Devices of the host that a container's could be left among.
fn devices(lab: &Lab, host: &str) -> Vec<String> {
    let text = lab.check(host, &["ls", "/sys/class/net"]).unwrap();
    lines(&text).into_iter().filter(|name| name.starts_with("dv") || name.starts_with("veth")).collect()
}

/// Nothing of any container is left: not with the agent, the server, the router, the host.
#[track_caller]
pub fn nothing_is_left(lab: &Lab, host: &str) {
    until(LIMIT, "the agent has no endpoint", || lab.endpoints(host).unwrap().is_empty());
    until(LIMIT, "the server has none", || server_knows(lab).is_empty());
    until(LIMIT, "the router has no port", || {
        !in_router(lab, host, "managed", &["ls", "/sys/class/net"]).contains("p-")
    });
    let elements = in_router(lab, host, "managed", &["nft", "list", "table", "bridge", "droveway"]);
    assert!(!elements.contains("elements"), "{elements}");
    let published = lab.check(host, &["nft", "list", "map", "inet", "droveway", "publish"]).unwrap();
    assert!(!published.contains("elements"), "{published}");
    assert_eq!(devices(lab, host), Vec::<String>::new());
}

#[test]
fn docker_run_on_the_managed_network_is_all_it_takes() {
    let Some(lab) = harbour() else { return };
    run(
        &lab,
        "h1",
        "db",
        &["--label", "com.docker.compose.project=shop", "--label", "com.docker.compose.service=data"],
    );
    run(&lab, "h2", "web", &[]);
    let (db, web) = (address(&lab, "h1", "db", "managed"), address(&lab, "h2", "web", "managed"));
    for (host, name, address) in [("h1", "db", db), ("h2", "web", web)] {
        assert!(address.octets().starts_with(&[10, 42]), "{name}: {address}");
        let own = docker(&lab, host, &["exec", name, "ip", "-o", "-4", "addr"]);
        assert!(own.contains(&format!("inet {address}/16")), "{own}");
        assert_eq!(own.lines().count(), 2, "loopback and one address: {own}");
        let endpoint = &lab.endpoints(host).unwrap()[0];
        assert_eq!(endpoint.addresses, [std::net::IpAddr::V4(address)]);
        let mac =
            docker(&lab, host, &["inspect", "-f", "{{.NetworkSettings.Networks.managed.MacAddress}}", name]);
        assert_eq!(endpoint.mac.to_string(), mac);
    }
    for name in ["db", "db.droveway.internal", "data.shop.droveway.internal", "db.h1.droveway.internal"] {
        until(LIMIT, &format!("web reaches {name} by name"), || reaches(&lab, "h2", "web", name));
    }
    until(LIMIT, "and db reaches web", || reaches(&lab, "h1", "db", "web"));
    let text = says(&lab, "h2", &["docker", "exec", "web", "ping", "-c", "1", "db"]);
    assert!(text.contains("ttl=62"), "{text}");

    // A requested address is a claim; one that is taken or impossible is refused, and nothing is left of it.
    run(&lab, "h1", "wish", &["--ip", "10.42.0.50"]);
    assert_eq!(address(&lab, "h1", "wish", "managed").to_string(), "10.42.0.50");
    until(LIMIT, "it is reached there", || reaches(&lab, "h2", "web", "10.42.0.50"));
    for (host, taken) in
        [("h2", "10.42.0.50"), ("h1", "10.42.0.50"), ("h2", "10.42.0.1"), ("h2", "10.99.0.1")]
    {
        let words = ["docker", "run", "--rm", "--network", "managed", "--ip", taken, IMAGE, "sleep", "1"];
        assert!(!succeeds(&lab, host, &words), "--ip {taken}");
    }
    assert_eq!(lab.endpoints("h2").unwrap().len(), 1);
}

#[test]
fn a_published_port_is_reached_from_everywhere() {
    let Some(lab) = harbour() else { return };
    let words = ["run", "-d", "--network", "managed", "--name", "site", "-p", "8080:80", IMAGE];
    docker(&lab, "h1", &[&words[..], &["httpd", "-f", "-p", "80", "-h", "/www"]].concat());
    run(&lab, "h1", "near", &[]);
    run(&lab, "h2", "far", &[]);
    let served = |from: &str, at: &str| {
        until(LIMIT, &format!("{from} reaches {at}"), || probe::page(&lab, from, at).contains("served"));
    };
    for (from, at) in [
        ("h2", "10.0.0.5:8080"),
        ("server", "10.0.0.5:8080"),
        ("h1", "127.0.0.1:8080"),
        ("h1", "10.0.0.5:8080"),
    ] {
        served(from, at);
    }
    let site = address(&lab, "h1", "site", "managed");
    until(LIMIT, "across hosts", || reaches(&lab, "h2", "far", &site.to_string()));
    for (host, name) in [("h1", "near"), ("h1", "site"), ("h2", "far")] {
        for at in ["10.0.0.5:8080".to_owned(), format!("{site}:80")] {
            let url = format!("http://{at}/");
            until(LIMIT, &format!("{name} reaches {url}"), || {
                says(&lab, host, &["docker", "exec", name, "wget", "-q", "-O", "-", &url]).contains("served")
            });
        }
    }
    // Of containers on the engine's own bridges, only what is published there: also on a bridge that is made now.
    docker(&lab, "h1", &["network", "create", "theirs"]);
    for (network, port) in [("bridge", "8081"), ("theirs", "8082")] {
        let published = format!("{port}:80");
        let words = ["run", "-d", "--network", network, "--name", network, "-p", &published, IMAGE];
        docker(&lab, "h1", &[&words[..], &["httpd", "-f", "-p", "80", "-h", "/www"]].concat());
        let url = format!("http://10.0.0.5:{port}/");
        until(LIMIT, &format!("near reaches {url}"), || {
            says(&lab, "h1", &["docker", "exec", "near", "wget", "-q", "-O", "-", &url]).contains("served")
        });
        let own = address(&lab, "h1", network, network).to_string();
        assert!(ttl(&lab, "h1", &own).is_some(), "the host reaches it");
        until(LIMIT, &format!("Docker's rules keep near from {own}"), || !reaches(&lab, "h1", "near", &own));
    }
    docker(&lab, "h1", &["rm", "-f", "bridge", "theirs"]);
    docker(&lab, "h1", &["rm", "-f", "site", "near"]);
    docker(&lab, "h2", &["rm", "-f", "far"]);
    nothing_is_left(&lab, "h1");
    assert!(probe::page(&lab, "h2", "10.0.0.5:8080").is_empty(), "nobody answers any more");
}

#[test]
fn stop_start_kill_and_rm_leave_nothing_behind() {
    let Some(lab) = harbour() else { return };
    run(&lab, "h2", "other", &[]);
    let other = address(&lab, "h2", "other", "managed").to_string();
    run(&lab, "h1", "it", &["--stop-timeout", "0"]);
    until(LIMIT, "across hosts", || reaches(&lab, "h1", "it", &other));
    for end in [&["stop", "it"][..], &["kill", "it"], &["restart", "-t", "0", "it"]] {
        until(LIMIT, "it reaches the other", || reaches(&lab, "h1", "it", &other));
        docker(&lab, "h1", end);
        if end[0] != "restart" {
            until(LIMIT, "nothing is attached", || lab.endpoints("h1").unwrap().is_empty());
            assert_eq!(devices(&lab, "h1"), Vec::<String>::new(), "after {end:?}");
            docker(&lab, "h1", &["start", "it"]);
        }
    }
    until(LIMIT, "it reaches the other", || reaches(&lab, "h1", "it", &other));
    docker(&lab, "h1", &["rm", "-f", "it"]);
    docker(&lab, "h1", &["run", "--rm", "--network", "managed", IMAGE, "ping", "-c", "1", "-W", "5", &other]);
    let words = ["docker", "run", "--rm", "--network", "managed", IMAGE, "/no/such/program"];
    assert!(!succeeds(&lab, "h1", &words));
    docker(&lab, "h2", &["rm", "-f", "other"]);
    nothing_is_left(&lab, "h1");
    nothing_is_left(&lab, "h2");
}

#[test]
fn networks_appear_on_the_engines_and_go_and_can_be_made_by_hand() {
    let Some(lab) = harbour() else { return };
    let shown = |host: &str| lines(&docker(&lab, host, &["network", "ls", "--format", "{{.Name}}"]));
    lab.check("server", &["droveway", "network", "create", "red", "--subnet", "10.50.0.0/16"]).unwrap();
    for host in ["h1", "h2"] {
        until(LIMIT, "red appears", || shown(host).contains(&"red".to_owned()));
        docker(&lab, host, &["run", "-d", "--network", "red", "--name", "one", IMAGE, "sleep", "1000"]);
    }
    let far = address(&lab, "h2", "one", "red");
    assert!(far.octets().starts_with(&[10, 50]));
    until(LIMIT, "across hosts", || reaches(&lab, "h1", "one", &far.to_string()));
    let error = says(&lab, "server", &["droveway", "network", "rm", "red"]);
    assert!(error.contains("in use by 2 endpoints"), "{error}");
    for host in ["h1", "h2"] {
        docker(&lab, host, &["rm", "-f", "one"]);
    }
    until(LIMIT, "red is free", || succeeds(&lab, "server", &["droveway", "network", "rm", "red"]));
    for host in ["h1", "h2"] {
        until(LIMIT, "red is gone", || !shown(host).contains(&"red".to_owned()));
        assert!(shown(host).contains(&"managed".to_owned()));
    }

    let of = [
        "--ipam-driver",
        "droveway",
        "--ipam-opt",
        "droveway.network=managed",
        "-o",
        "droveway.network=managed",
    ];
    docker(&lab, "h1", &[&["network", "create", "-d", "droveway"][..], &of, &["mine"]].concat());
    docker(&lab, "h1", &["run", "-d", "--network", "mine", "--name", "by-hand", IMAGE, "sleep", "1000"]);
    run(&lab, "h2", "other", &[]);
    let other = address(&lab, "h2", "other", "managed").to_string();
    until(LIMIT, "it is the same network", || reaches(&lab, "h1", "by-hand", &other));
    docker(&lab, "h1", &["rm", "-f", "by-hand"]);
    docker(&lab, "h1", &["network", "rm", "mine"]);
    for (words, remedy) in [
        (&["-d", "droveway", "x"][..], "droveway.network"),
        (
            &[
                "-d",
                "droveway",
                "--ipam-driver",
                "droveway",
                "--ipam-opt",
                "droveway.network=nosuch",
                "-o",
                "droveway.network=nosuch",
                "x",
            ],
            "nosuch",
        ),
    ] {
        let words = [&["docker", "network", "create"], words].concat();
        let text = says(&lab, "h1", &words);
        assert!(text.contains("Error") && text.contains(remedy), "{text}");
        assert!(!shown("h1").contains(&"x".to_owned()));
    }
}

#[test]
fn agent_and_engine_come_back_in_either_order_and_traffic_on_a_host_never_stops() {
    let Some(lab) = harbour() else { return };
    run(&lab, "h1", "near", &["--stop-timeout", "1"]);
    run(&lab, "h1", "beside", &["--stop-timeout", "1"]);
    run(&lab, "h2", "far", &[]);
    let far = address(&lab, "h2", "far", "managed").to_string();
    let beside = address(&lab, "h1", "beside", "managed").to_string();
    until(LIMIT, "across hosts", || reaches(&lab, "h1", "near", &far));

    // The pings go out of the container's namespace, by the host's own ping.
    let pid = docker(&lab, "h1", &["inspect", "-f", "{{.State.Pid}}", "near"]);
    let inside = ["nsenter", "-t", &pid, "-n"];
    let steady = Steady::start_with(&lab, "h1", &inside, &beside);
    lab.kill_agent("h1").unwrap();
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    until(LIMIT, "the router is as it should be", || converged(&lab, "h1"));
    let (sent, received) = steady.end_at(&lab, "h1");
    assert_eq!(sent, received, "while the agent was killed and started");
    assert!(sent > 3);
    until(LIMIT, "across hosts again", || reaches(&lab, "h1", "near", &far));
    docker(&lab, "h1", &["rm", "-f", "beside"]);
    assert_eq!(lab.endpoints("h1").unwrap()[0].name.as_ref().unwrap().as_str(), "near");

    // The engine again, then the agent; and the other way round. What ran ended with the engine.
    for order in [[Daemon::Docker, Daemon::Agent], [Daemon::Agent, Daemon::Docker]] {
        lab.stop_daemon("h1", Daemon::Docker).unwrap();
        lab.kill_agent("h1").unwrap();
        for daemon in order {
            lab.start_daemon("h1", daemon).unwrap();
        }
        let name = format!("after-{}", order[0]);
        until(LIMIT, "docker run works again", || {
            let _ = lab.exec("h1", &["docker", "rm", "-f", &name]).unwrap();
            succeeds(
                &lab,
                "h1",
                &[
                    "docker",
                    "run",
                    "-d",
                    "--network",
                    "managed",
                    "--name",
                    &name,
                    "--stop-timeout",
                    "1",
                    IMAGE,
                    "sleep",
                    "1000",
                ],
            )
        });
        until(LIMIT, "and it reaches the other host", || reaches(&lab, "h1", &name, &far));
        until(LIMIT, "what ended is gone", || {
            let names = lab.endpoints("h1").unwrap();
            names.len() == 1 && names[0].name.as_ref().is_some_and(|known| known.as_str() == name)
        });
        docker(&lab, "h1", &["rm", "-f", &name]);
    }
    nothing_is_left_but(&lab, "far");
    assert!(ttl(&lab, "h1", "10.0.0.6").is_some());
}

#[test]
fn an_engine_that_is_killed_and_keeps_its_containers_alive_finds_them_attached() {
    let Some(lab) = harbour_with(&["--live-restore"]) else { return };
    run(&lab, "h1", "near", &["--stop-timeout", "1"]);
    run(&lab, "h1", "beside", &["--stop-timeout", "1"]);
    run(&lab, "h2", "far", &[]);
    let (near, far) = (address(&lab, "h1", "near", "managed"), address(&lab, "h2", "far", "managed"));
    until(LIMIT, "across hosts", || reaches(&lab, "h1", "near", &far.to_string()));
    let pid = docker(&lab, "h1", &["inspect", "-f", "{{.State.Pid}}", "near"]);
    let inside = ["nsenter", "-t", &pid, "-n"];
    let steady =
        Steady::start_with(&lab, "h1", &inside, &address(&lab, "h1", "beside", "managed").to_string());
    for order in [[Daemon::Docker, Daemon::Agent], [Daemon::Agent, Daemon::Docker]] {
        lab.kill_daemon("h1", Daemon::Docker).unwrap();
        lab.kill_agent("h1").unwrap();
        for daemon in order {
            lab.start_daemon("h1", daemon).unwrap();
        }
        lab.wait_connected("h1").unwrap();
        let name = format!("after-{}", order[0]);
        until(LIMIT, "docker run works again", || {
            let _ = lab.exec("h1", &["docker", "rm", "-f", &name]).unwrap();
            let words =
                ["docker", "run", "-d", "--network", "managed", "--name", &name, "--stop-timeout", "1"];
            succeeds(&lab, "h1", &[&words[..], &[IMAGE, "sleep", "1000"]].concat())
        });
        until(LIMIT, "by name", || reaches(&lab, "h1", &name, "near") && reaches(&lab, "h1", &name, "far"));
        docker(&lab, "h1", &["rm", "-f", &name]);
    }
    let (sent, received) = steady.end_at(&lab, "h1");
    assert_eq!(sent, received, "while engine and agent were killed and started");
    assert_eq!(address(&lab, "h1", "near", "managed"), near);
    assert_eq!(lab.endpoints("h1").unwrap().len(), 2);
    docker(&lab, "h1", &["rm", "-f", "near", "beside"]);
    nothing_is_left_but(&lab, "far");
}

#[test]
fn containers_of_an_engine_that_was_killed_are_started_again_and_attached_anew() {
    let Some(lab) = harbour() else { return };
    run(&lab, "h1", "near", &["--stop-timeout", "1", "--restart", "always"]);
    run(&lab, "h1", "once", &["--stop-timeout", "1"]);
    run(&lab, "h2", "far", &[]);
    lab.kill_daemon("h1", Daemon::Docker).unwrap();
    lab.start_daemon("h1", Daemon::Docker).unwrap();
    until(LIMIT, "it reaches the other host again", || reaches(&lab, "h1", "near", "far"));
    until(LIMIT, "and is reached", || reaches(&lab, "h2", "far", "near"));
    until(LIMIT, "what was not started again is gone", || lab.endpoints("h1").unwrap().len() == 1);
    docker(&lab, "h1", &["rm", "-f", "near", "once"]);
    nothing_is_left_but(&lab, "far");
}

#[test]
fn names_resolve_on_an_internal_network_and_nothing_else_does() {
    let Some(lab) = harbour() else { return };
    let create = ["droveway", "network", "create", "vault", "--subnet", "10.50.0.0/16", "--internal"];
    lab.check("server", &create).unwrap();
    for (host, name) in [("h1", "near"), ("h2", "far")] {
        until(LIMIT, "vault appears", || docker(&lab, host, &["network", "ls"]).contains("vault"));
        docker(&lab, host, &["run", "-d", "--network", "vault", "--name", name, IMAGE, "sleep", "1000"]);
    }
    until(LIMIT, "by name", || reaches(&lab, "h1", "near", "far") && reaches(&lab, "h2", "far", "near"));
    let outside = says(&lab, "h1", &["docker", "exec", "near", "nslookup", "example.com"]);
    assert!(outside.contains("REFUSED"), "{outside}");
    // Elsewhere Docker's own resolver stays.
    run(&lab, "h1", "plain", &[]);
    assert!(docker(&lab, "h1", &["exec", "plain", "cat", "/etc/resolv.conf"]).contains("127.0.0.11"));
}

#[test]
fn a_container_on_two_networks_asks_the_first_ones_router_and_the_others_by_its_gateway() {
    let Some(lab) = harbour() else { return };
    lab.check("server", &["droveway", "network", "create", "red", "--subnet", "10.50.0.0/16"]).unwrap();
    for host in ["h1", "h2"] {
        until(LIMIT, "red appears", || docker(&lab, host, &["network", "ls"]).contains("red"));
    }
    run(&lab, "h1", "both", &[]);
    docker(&lab, "h1", &["network", "connect", "red", "both"]);
    run(&lab, "h2", "first", &[]);
    docker(&lab, "h2", &["run", "-d", "--network", "red", "--name", "second", IMAGE, "sleep", "1000"]);
    let looked_up =
        |words: &[&str]| says(&lab, "h1", &[&["docker", "exec", "both", "nslookup"], words].concat());
    let (first, second) = (
        address(&lab, "h2", "first", "managed").to_string(),
        address(&lab, "h2", "second", "red").to_string(),
    );
    until(LIMIT, "a name of the first", || looked_up(&["first.droveway.internal"]).contains(&first));
    until(LIMIT, "a name of the other, asked there", || {
        looked_up(&["second.droveway.internal", "10.50.0.1"]).contains(&second)
    });
    assert!(!looked_up(&["second.droveway.internal"]).contains(&second), "docs/names.md says otherwise");
    until(LIMIT, "both are reached", || {
        reaches(&lab, "h1", "both", &first) && reaches(&lab, "h1", "both", &second)
    });
}

#[track_caller]
fn nothing_is_left_but(lab: &Lab, name: &str) {
    until(LIMIT, "the server knows", || {
        let known = server_knows(lab);
        known.len() == 1 && known[0].name.as_ref().is_some_and(|known| known.as_str() == name)
    });
    assert_eq!(devices(lab, "h1"), Vec::<String>::new());
}
