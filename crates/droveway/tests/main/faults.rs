//! What a machine does to its daemons: a disk that is full. What people do to networks that are still in use somewhere.

use agent::doctor::Kind;
use droveway::client::ask_agent;
use droveway::lab::{Daemon, Lab, SERVER};

use crate::doctor::{findings, well};
use crate::steady::Steady;
use crate::support::{
    LIMIT, Look, converged, idle, idle_in, lab, meet, run_soon, says, succeeds, ttl, until,
};

/// A directory of a node that is on a disk of its own, which is small.
struct SmallDisk<'a> {
    lab: &'a Lab,
    node: &'static str,
    dir: String,
}

impl<'a> SmallDisk<'a> {
    /// Puts a daemon's directory on a small disk, with all that is in it.
    fn below(lab: &'a Lab, node: &'static str, daemon: Daemon, name: &str) -> Self {
        let dir = lab.dir().join(node).join(name).display().to_string();
        let script = "set -e; mkdir /run/kept; cp -a \"$1/.\" /run/kept/; mount -t tmpfs -o size=1m,mode=700 small \"$1\"
            cp -a /run/kept/. \"$1\"/; rm -r /run/kept";
        lab.stop_daemon(node, daemon).unwrap();
        lab.check(node, &["sh", "-c", script, "sh", &dir]).unwrap();
        lab.start_daemon(node, daemon).unwrap();
        Self { lab, node, dir }
    }

    /// To the last byte.
    fn fill(&self) {
        let script =
            "head -c 2m /dev/zero >\"$1/filling\"; [ \"$(df --output=avail \"$1\" | tail -n1)\" -eq 0 ]";
        let output = self.lab.exec(self.node, &["sh", "-c", script, "sh", &self.dir]).unwrap();
        assert!(output.status.success(), "the disk is not full: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn empty(&self) {
        self.lab.check(self.node, &["rm", &format!("{}/filling", self.dir)]).unwrap();
    }
}

#[test]
fn an_agent_whose_disk_is_full_refuses_and_changes_nothing_and_goes_on_when_there_is_space() {
    let lab = lab(2);
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    let goes = lab.run("h1", &idle("goes")).unwrap();
    meet(&lab, &near, &far);
    let disk = SmallDisk::below(&lab, "h1", Daemon::Agent, "agent");
    lab.wait_connected("h1").unwrap();
    let steady = Steady::start(&lab, &far, &near);
    disk.fill();

    // What the ledger has taken already may be written over: it takes a little more.
    let mut taken = Vec::new();
    let error = loop {
        match lab.run("h1", &idle(&format!("late-{}", taken.len()))) {
            Ok(container) => taken.push(container),
            Err(error) => break error.to_string(),
        }
        assert!(taken.len() < 200, "nothing is refused");
    };
    for part in ["ledger", "full", "nothing was changed", "make room on this host's disk"] {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
    assert!(!error.contains("defect"), "{error}");
    let ready = || lab.exec("h1", &["droveway", "status", "--ready"]).unwrap();
    until(LIMIT, "it says that it is not ready, and what to do", || {
        let said = ready();
        let text =
            String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
        !said.status.success() && text.contains("make room on")
    });
    let names = || -> Vec<String> {
        let list = lab.endpoints("h1").unwrap();
        let mut names: Vec<String> = list.into_iter().map(|one| one.name.unwrap().to_string()).collect();
        names.sort();
        names
    };
    let mut expected: Vec<String> = taken.iter().map(|container| container.name.clone()).collect();
    expected.extend(["goes".to_owned(), "near".to_owned()]);
    expected.sort();
    assert_eq!(names(), expected);
    let id = &goes.attached.endpoint.id;
    let detach = || ask_agent(&lab.agent_socket("h1").unwrap(), async |agent| agent.detach(id).await);
    let error = detach().unwrap_err().to_string();
    assert!(error.contains("ledger") && error.contains("full"), "{error}");
    assert!(ttl(&lab, &far.path(), &goes.ip().to_string()).is_some(), "it is attached still");

    let (sent, received) = steady.end(&lab, &far);
    assert_eq!(sent, received, "pings all the while");

    // Neither a restart nor what the server says needs the disk.
    lab.kill_agent("h1").unwrap();
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    assert_eq!(names(), expected);
    let new = lab.run("h2", &idle("new")).unwrap();
    meet(&lab, &near, &new);
    until(LIMIT, "and its name is known", || {
        says(&lab, &near.path(), &["dig", "+short", "new.droveway.internal"]).trim() == new.ip().to_string()
    });

    disk.empty();
    until(LIMIT, "it is ready again, though nothing was attached", || ready().status.success());
    let after = lab.run("h1", &idle("after")).unwrap();
    meet(&lab, &far, &after);
    detach().unwrap();
    well(&lab);
}

#[test]
fn a_server_whose_disk_is_full_refuses_and_changes_nothing_and_goes_on_when_there_is_space() {
    let lab = lab(2);
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &near, &far);
    let disk = SmallDisk::below(&lab, SERVER, Daemon::Server, "data");
    for host in ["h1", "h2"] {
        lab.wait_connected(host).unwrap();
    }
    disk.fill();

    let mut made = Vec::new();
    let error = loop {
        let name = format!("net{}", made.len());
        let subnet = format!("10.{}.0.0/16", 60 + made.len());
        let create = ["droveway", "network", "create", &name, "--subnet", &subnet];
        let output = lab.exec(SERVER, &create).unwrap();
        if !output.status.success() {
            break String::from_utf8(output.stderr).unwrap();
        }
        made.push(name);
        assert!(made.len() < 100, "nothing is refused");
    };
    for part in ["error: ", "full", "nothing was changed"] {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
    let shown = || says(&lab, SERVER, &["droveway", "network", "ls", "-o", "json"]);
    let networks: Vec<model::Network> = serde_json::from_str(&shown()).unwrap();
    assert_eq!(networks.len(), 1 + made.len(), "{networks:?}");

    // The hosts go on by themselves, and the server starts again.
    let new = lab.run("h1", &idle("new")).unwrap();
    meet(&lab, &new, &far);
    lab.kill_server().unwrap();
    lab.start_server().unwrap();
    for host in ["h1", "h2"] {
        lab.wait_connected(host).unwrap();
    }
    assert_eq!(serde_json::from_str::<Vec<model::Network>>(&shown()).unwrap(), networks);

    disk.empty();
    lab.check(SERVER, &["droveway", "network", "create", "after", "--subnet", "10.200.0.0/16"]).unwrap();
    until(LIMIT, "it hears of what happened meanwhile", || {
        says(&lab, SERVER, &["droveway", "endpoint", "ls"]).contains("new")
    });
    well(&lab);
    a_backup_comes_back_whole_or_not_at_all(&lab, &disk.dir);
}

/// However small the disk is that it is put back to.
fn a_backup_comes_back_whole_or_not_at_all(lab: &Lab, data: &str) {
    let backup = lab.dir().join("backup").display().to_string();
    lab.check(SERVER, &["droveway", "server", "backup", "--data-dir", data, &backup]).unwrap();
    let keys = |said: &str| {
        said.split_once(" keys of ").map(|(before, _)| before.rsplit(' ').next().unwrap().to_owned())
    };
    let (mut whole, mut refused) = (0, 0);
    for kib in (32..=768).step_by(32) {
        let mount = format!("mkdir -p /run/tiny && mount -t tmpfs -o size={kib}k,mode=700 tiny /run/tiny");
        lab.check(SERVER, &["sh", "-c", &mount]).unwrap();
        let restore = ["droveway", "server", "restore", "--data-dir", "/run/tiny", &backup];
        let output = lab.exec(SERVER, &restore).unwrap();
        let there = lab.exec(SERVER, &["test", "-e", "/run/tiny/store.sqlite"]).unwrap().status.success();
        assert_eq!(output.status.success(), there, "{kib} KiB: {output:?}");
        if there {
            whole += 1;
            let copy = "rm -f /run/copy; exec droveway server backup --data-dir /run/tiny /run/copy";
            let copied = lab.check(SERVER, &["sh", "-c", copy]).unwrap();
            let restored = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(keys(&copied).is_some() && keys(&copied) == keys(&restored), "{restored} {copied}");
        } else {
            refused += 1;
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            let says = ["full", "No space", "no room"].iter().any(|why| error.contains(why));
            assert!(error.starts_with("error: ") && says, "{error}");
        }
        lab.check(SERVER, &["umount", "/run/tiny"]).unwrap();
    }
    assert!(whole > 0 && refused > 0, "{whole} restored, {refused} refused");
}

#[test]
fn what_the_server_refuses_of_one_endpoint_is_in_no_others_way() {
    let lab = lab(1);
    let goes = lab.run("h1", &idle("goes")).unwrap();
    until(LIMIT, "the server knows it", || {
        says(&lab, SERVER, &["droveway", "endpoint", "ls"]).contains("goes")
    });
    // More names than the server takes, which an agent refuses too: so they are written to its books by hand.
    lab.run("h1", &idle("odd")).unwrap();
    lab.kill_agent("h1").unwrap();
    let ledger = rusqlite::Connection::open(lab.dir().join("h1/agent/ledger.sqlite")).unwrap();
    let names: Vec<String> = (0..65).map(|i| format!("odd-{i}")).collect();
    let changed = ledger.execute(
        "UPDATE record SET value = json_set(value, '$.endpoint.aliases', json(?1)) WHERE value ->> '$.endpoint.name' = 'odd'",
        [serde_json::to_string(&names).unwrap()],
    );
    assert_eq!(changed, Ok(1));
    drop(ledger);
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    lab.run("h1", &idle("after")).unwrap();
    lab.kill_container("h1", &goes.name).unwrap();
    until(LIMIT, "the server knows the others as they are", || {
        let text = says(&lab, SERVER, &["droveway", "endpoint", "ls"]);
        text.contains("after") && !text.contains("goes")
    });
    let text = says(&lab, SERVER, &["droveway", "endpoint", "ls", "-o", "json"]);
    assert!(!text.contains("odd-0"), "it was to be refused: {text}");
    let log = std::fs::read_to_string(lab.daemon_log("h1", Daemon::Agent)).unwrap();
    assert!(log.contains("it has 65 aliases; at most 64"), "{log}");
}

#[test]
fn a_container_whose_network_was_removed_while_its_host_was_away_is_named() {
    let lab = lab(1);
    lab.check(SERVER, &["droveway", "network", "create", "red", "--subnet", "10.62.0.0/16"]).unwrap();
    let first = run_soon(&lab, "h1", &idle_in("red", "first"));
    lab.kill_container("h1", &first.name).unwrap();
    let listed = || says(&lab, SERVER, &["droveway", "endpoint", "ls"]);
    until(LIMIT, "the server knows that nobody is on it", || !listed().contains("first"));
    lab.cut("h1", SERVER).unwrap();
    lab.run("h1", &idle_in("red", "second")).unwrap();
    lab.check(SERVER, &["droveway", "network", "rm", "red"]).unwrap();
    lab.heal().unwrap();
    let troubles = || lab.agent_status("h1").unwrap().troubles;
    until(LIMIT, "its host says so", || {
        troubles().iter().any(|why| why.starts_with("second (e-") && why.contains("is cut off"))
    });
    let kinds: Vec<Kind> = findings(&lab, "h1", 5).iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [Kind::NetworkGone]);
    lab.kill_container("h1", "second").unwrap();
    until(LIMIT, "all is well again", || troubles().is_empty());
    well(&lab);
}

#[test]
fn what_an_agent_without_descriptors_cannot_mend_it_mends_when_it_has_some_though_nothing_else_happens() {
    let lab = lab(1);
    let near = lab.run("h1", &idle("near")).unwrap();
    let agent = lab.check("h1", &["pgrep", "-o", "-f", "droveway agent "]).unwrap();
    let limit = |files: &str| {
        let words = ["prlimit", "--pid", agent.trim(), &format!("--nofile={files}:")];
        lab.check("h1", &words).unwrap();
    };
    // Fewer than it has open, and as many as it waits for.
    limit("16");
    lab.check("h1", &["ip", "netns", "del", "droveway-managed"]).unwrap();
    let log = || std::fs::read_to_string(lab.daemon_log("h1", Daemon::Agent)).unwrap();
    until(LIMIT, "it says what it lacks", || {
        log().contains("Too many open files") || log().contains("EMFILE")
    });
    assert!(!succeeds(&lab, &near.path(), &["ping", "-n", "-c", "1", "-W", "0.3", "10.42.0.1"]));
    limit("1024");
    until(LIMIT, "the router is back", || {
        succeeds(&lab, &near.path(), &["ping", "-n", "-c", "1", "-W", "0.3", "10.42.0.1"])
    });
    until(LIMIT, "and the agent answers", || converged(&lab, "h1"));
    let lines = log().lines().filter(|line| line.contains("open files") || line.contains("EMFILE")).count();
    assert!(lines < 50, "{lines} lines: it is to pause between its tries, and to say the same once");
}

#[test]
fn a_router_whose_last_container_vanished_without_a_word_lingers_like_any_other() {
    let lab = lab(1);
    lab.check("h1", &["ip", "netns", "add", "odd"]).unwrap();
    let request = model::agent_api::AttachRequest {
        network: "managed".to_owned(),
        netns: "/run/netns/odd".into(),
        ifname: "eth0".to_owned(),
        name: Some("odd".parse().unwrap()),
        stack: None,
        service: None,
        aliases: Vec::new(),
        address: None,
        labels: [].into(),
        ports: Vec::new(),
        routes: None,
    };
    let socket = lab.agent_socket("h1").unwrap();
    ask_agent(&socket, async |agent| agent.attach(&request).await).unwrap();
    lab.check("h1", &["ip", "netns", "del", "odd"]).unwrap();
    // What follows from it in the kernel is done when it shows.
    until(LIMIT, "it is gone", || lab.endpoints("h1").unwrap().is_empty());
    assert!(lab.check("h1", &["ls", "/run/netns"]).unwrap().contains("droveway-managed"), "it lingers");
}

#[test]
fn a_network_that_is_removed_and_made_again_while_its_router_lingers_is_a_new_one() {
    let lab = lab(2);
    let create = ["droveway", "network", "create", "red", "--subnet", "10.50.0.0/16"];
    let mut ids = Vec::new();
    for subnet in ["10.50.0.0/16", "10.51.0.0/16", "10.50.0.0/16"] {
        let create = [&create[..5], &[subnet]].concat();
        lab.check(SERVER, &create).unwrap();
        until(LIMIT, "both hosts know it", || {
            ["h1", "h2"].iter().all(|host| says(&lab, host, &["droveway", "status"]).contains("red"))
                || lab.run("h1", &idle_in("red", "first")).is_ok()
        });
        if !lab.endpoints("h1").unwrap().iter().any(|one| one.name.as_ref().unwrap().as_str() == "first") {
            lab.run("h1", &idle_in("red", "first")).unwrap();
        }
        let one = lab.run("h1", &idle_in("red", "one")).unwrap();
        let other = lab.run("h2", &idle_in("red", "other")).unwrap();
        assert!(one.ip().to_string().starts_with(&subnet[..6]), "{}", one.ip());
        meet(&lab, &one, &other);
        assert!(!ids.contains(&one.attached.endpoint.network));
        ids.push(one.attached.endpoint.network.clone());
        for (host, name) in [("h1", "first"), ("h1", "one"), ("h2", "other")] {
            lab.kill_container(host, name).unwrap();
        }
        assert!(lab.check("h1", &["ls", "/run/netns"]).unwrap().contains("droveway-red"), "it lingers");
        until(LIMIT, "the server lets it go", || {
            succeeds(&lab, SERVER, &["droveway", "network", "rm", "red"])
        });
    }
    until(LIMIT, "its routers are gone", || {
        ["h1", "h2"].iter().all(|host| !says(&lab, host, &["ls", "/run/netns"]).contains("red"))
    });
}
