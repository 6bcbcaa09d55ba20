//! Two servers on one etcd: put back from a backup that is older than what hosts hold; then one of them loses its power, and
//! etcd comes and goes.

use droveway::lab::{Daemon, LabSpec, SECOND, SERVER, STORE};
use model::agent_api::Connection;

use crate::steady::Steady;
use crate::support::{LIMIT, Look, idle, meet, says, spec, until};
use crate::watch::Watched;

/// Whether both agents are connected to a server of that address.
fn connected(lab: &Watched, address: &str) -> bool {
    ["h1", "h2"].iter().all(|host| {
        let status = lab.agent_status(host).unwrap();
        matches!(status.connection, Connection::Up { .. }) && status.server.contains(address)
    })
}

#[test]
fn two_servers_go_on_from_an_old_backup_and_one_without_the_other_while_traffic_goes_on() {
    let lab = Watched::up(LabSpec { servers: 2, ..spec(2) });
    let near = lab.run("h1", &idle("near")).unwrap();
    let data = says(&lab, SERVER, &["sh", "-c", "dirname $DROVEWAY_KEY_FILE"]).trim().to_owned();
    let backup = lab.dir().join("backup").display().to_string();
    let place = ["--data-dir", &data, "--store", "etcd://10.0.0.4:2379", &backup];
    lab.check(SERVER, &[&["droveway", "server", "backup"], &place[..]].concat()).unwrap();
    // The backup does not know of this host's block.
    let far = lab.run("h2", &idle("far")).unwrap();
    meet(&lab, &near, &far);
    let before = lab.agent_status("h1").unwrap().epoch;
    let steady = Steady::start(&lab, &near, &far);

    for node in [SERVER, SECOND] {
        lab.kill_daemon(node, Daemon::Server).unwrap();
    }
    lab.check(SERVER, &[&["droveway", "server", "restore", "--force"], &place[..]].concat()).unwrap();
    for node in [SERVER, SECOND] {
        lab.start_daemon(node, Daemon::Server).unwrap();
    }
    // They have waited for a server for a while, and pause for longer and longer.
    until(LIMIT * 4, "both agents are back, in another life", || {
        ["h1", "h2"].iter().all(|host| {
            let status = lab.agent_status(host).unwrap();
            matches!(status.connection, Connection::Up { .. }) && status.epoch != before
        })
    });
    let adopted = lab.check(SERVER, &["droveway", "server", "adopt"]).unwrap();
    assert!(!adopted.contains("h1") && !adopted.contains("h2"), "still waited for: {adopted}");
    let blocks = lab.agent_status("h2").unwrap().routers[0].blocks.clone();
    assert!(
        !blocks.is_empty() && blocks.iter().any(|block| block.contains(&std::net::IpAddr::from(far.ip())))
    );

    // One dies; what happens then all hear from the other, though their store goes away and comes back.
    lab.kill(SERVER).unwrap();
    until(LIMIT * 4, "both agents are at the other", || connected(&lab, "10.0.0.3"));
    lab.kill(STORE).unwrap();
    let late = lab.run("h2", &idle("late")).unwrap();
    assert_ne!(late.ip(), far.ip());
    lab.start(STORE).unwrap();
    until(LIMIT * 4, "the other host hears of it", || {
        let answer = ["dig", "+short", "+time=1", "+tries=1", "late.droveway.internal"];
        says(&lab, "h1/near", &answer).trim() == late.ip().to_string()
    });
    let (sent, received) = steady.end(&lab, &near);
    assert_eq!(sent, received, "pings all the while");
}
