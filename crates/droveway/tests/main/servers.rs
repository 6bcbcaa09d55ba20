//! From one server with a file to two on etcd, by a backup that is older than what hosts hold; then one of the two dies.

use std::process::Child;

use droveway::lab::Lab;
use model::agent_api::Connection;

use crate::steady::Steady;
use crate::support::{LIMIT, Look, idle, lab, meet, says, until};

/// What runs on the server's node besides what the lab started; it ends with the lab at the latest.
struct Aside(Child);

impl Drop for Aside {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Nobody reads what it says.
fn aside(lab: &Lab, words: &[&str]) -> Aside {
    let quietly = ["sh", "-c", "exec \"$@\" >/dev/null 2>&1", "sh"];
    Aside(lab.spawn("server", &[&quietly, words].concat()).unwrap())
}

fn server(lab: &Lab, name: &str, port: u16) -> Aside {
    let (data, address) = (lab.dir().join(name).display().to_string(), format!("10.0.0.2:{port}"));
    let url = format!("https://{address}");
    let store = ["--store", "etcd://127.0.0.1:2379/lab", "--url", &url];
    aside(lab, &[&["droveway", "server", "--data-dir", &data, "--listen", &address], &store[..]].concat())
}

/// Whether both agents are connected to a server of that port.
fn connected(lab: &Lab, port: u16) -> bool {
    ["h1", "h2"].iter().all(|host| {
        let status = lab.agent_status(host).unwrap();
        matches!(status.connection, Connection::Up { .. }) && status.server.ends_with(&format!(":{port}"))
    })
}

#[test]
fn two_servers_on_etcd_take_over_from_an_old_backup_and_one_of_them_from_the_other_while_traffic_goes_on() {
    let lab = lab(2);
    let near = lab.run("h1", &idle("near")).unwrap();
    let path = |name: &str| lab.dir().join(name).display().to_string();
    let data = says(&lab, "server", &["sh", "-c", "dirname $DROVEWAY_KEY_FILE"]).trim().to_owned();
    lab.check("server", &["droveway", "server", "backup", "--data-dir", &data, &path("backup")]).unwrap();
    // The backup does not know of this host's block.
    let far = lab.run("h2", &idle("far")).unwrap();
    meet(&lab, &near, &far);
    let before = lab.agent_status("h1").unwrap().epoch;
    let steady = Steady::start(&lab, &near, &far);

    lab.kill_server().unwrap();
    let _etcd =
        aside(&lab, &["etcd", "--data-dir", &path("etcd"), "--max-txn-ops=10000", "--unsafe-no-fsync"]);
    let store = ["--store", "etcd://127.0.0.1:2379/lab"];
    let restore = ["droveway", "server", "restore", "--data-dir", &path("one"), &path("backup")];
    let restore = [&restore[..], &store].concat();
    until(LIMIT, "etcd answers", || lab.exec("server", &restore).unwrap().status.success());
    lab.check("server", &["install", "-D", "-m", "600", &path("one/ca.key"), &path("two/ca.key")]).unwrap();
    let (_one, _two) = (server(&lab, "one", 7443), server(&lab, "two", 7444));
    // They have waited for a server for a while, and pause for longer and longer.
    until(LIMIT * 4, "both agents are back, in another life", || {
        connected(&lab, 7443) && lab.agent_status("h1").unwrap().epoch != before
    });
    let adopted = lab.check("server", &["droveway", "server", "adopt"]).unwrap();
    assert!(!adopted.contains("h1") && !adopted.contains("h2"), "still waited for: {adopted}");
    let blocks = lab.agent_status("h2").unwrap().routers[0].blocks.clone();
    assert!(
        !blocks.is_empty() && blocks.iter().any(|block| block.contains(&std::net::IpAddr::from(far.ip())))
    );

    // The one that all speak to dies; what happens then they hear from the other.
    lab.check("server", &["pkill", "-9", "-f", &path("one")]).unwrap();
    until(LIMIT, "both agents are at the other", || connected(&lab, 7444));
    let late = lab.run("h2", &idle("late")).unwrap();
    assert_ne!(late.ip(), far.ip());
    until(LIMIT, "the other host hears of it", || {
        let answer = ["dig", "+short", "+time=1", "+tries=1", "late.droveway.internal"];
        says(&lab, "h1/near", &answer).trim() == late.ip().to_string()
    });
    let (sent, received) = steady.end(&lab, &near);
    assert_eq!(sent, received, "pings all the while");
}
