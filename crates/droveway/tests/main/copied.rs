//! A machine that was copied with its state directory, and one that was put back from an old backup.

use std::path::PathBuf;

use droveway::lab::{Lab, SERVER};
use model::agent_api::{Connection, TunnelStatus};
use model::api::{AuditEntry, HostView, Outcome};

use crate::steady::Steady;
use crate::support::{LIMIT, idle, lab, meet, says, succeeds, until};

fn state(lab: &Lab, host: &str) -> PathBuf {
    lab.dir().join(host).join("agent")
}

fn copy(lab: &Lab, from: PathBuf, to: PathBuf) {
    let script = format!("rm -rf {1} && cp -a {0} {1}", from.display(), to.display());
    lab.check(SERVER, &["sh", "-c", &script]).unwrap();
}

fn view(lab: &Lab, host: &str) -> HostView {
    let text = lab.check(SERVER, &["droveway", "host", "inspect", host, "-o", "json"]).unwrap();
    serde_json::from_str::<Vec<HostView>>(&text).unwrap().remove(0)
}

/// Waits until a host's agent says that its state directory does not count, and looks at what that means.
#[track_caller]
fn is_refused(lab: &Lab, host: &str) {
    let mut why = String::new();
    until(LIMIT, "it is refused, with the remedy", || {
        if let Connection::Down { why: said, .. } = lab.agent_status(host).unwrap().connection {
            why = said;
        }
        why.contains("delete the state directory") && why.contains("droveway host rm h1")
    });
    let socket = ["curl", "-s", "--unix-socket", model::agent_api::SOCKET, "http://agent/v1/tunnels"];
    let tunnels = || serde_json::from_str::<Vec<TunnelStatus>>(&says(lab, host, &socket)).unwrap();
    until(LIMIT, "it has no tunnels", || tunnels().is_empty());
    let error = format!("{:#}", lab.run(host, &idle("refused")).unwrap_err());
    assert!(error.contains("is a copy of that of host \"h1\""), "{error}");
    assert!(!succeeds(lab, host, &["droveway", "status", "--ready"]));
}

#[test]
fn a_copied_machine_is_refused_and_an_old_backup_too_while_the_original_goes_on() {
    let lab = lab(3);
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &near, &far);
    let backup = lab.dir().join("backup");
    copy(&lab, state(&lab, "h1"), backup.clone());
    let (id, connected) = (view(&lab, "h1").host.id, lab.agent_status("h1").unwrap().connection);
    assert!(matches!(connected, Connection::Up { .. }));

    // A copy of the disk of one that runs, on another machine.
    let steady = Steady::start(&lab, &near, &far);
    lab.kill_agent("h3").unwrap();
    copy(&lab, backup.clone(), state(&lab, "h3"));
    lab.start_agent("h3").unwrap();
    is_refused(&lab, "h3");
    assert_eq!(lab.agent_status("h3").unwrap().host, id, "it has the same identity");
    lab.wait_connected("h1").unwrap();
    let (sent, received) = steady.end(&lab, &near);
    assert_eq!(sent, received, "pings of the original");
    let said = view(&lab, "h1");
    let copied = said.copy.unwrap();
    assert_eq!((copied.from.to_string().as_str(), copied.times), ("10.0.0.7", 1));
    let ls = says(&lab, SERVER, &["droveway", "host", "ls"]);
    assert!(ls.contains("h1: an agent with a copy of its state directory came from 10.0.0.7"), "{ls}");
    let text = says(&lab, SERVER, &["droveway", "audit", "ls", "--since", "1h", "-o", "json"]);
    let entries: Vec<AuditEntry> = serde_json::from_str(&text).unwrap();
    let about = Some("a copy of the state directory of host \"h1\"");
    let line = entries.iter().find(|entry| entry.about.as_deref() == about).unwrap();
    assert_eq!(line.outcome, Outcome::Refused);

    // The original is started again, also while the server is away; the server too. It goes on, and it alone.
    lab.kill_agent("h1").unwrap();
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    lab.kill_server().unwrap();
    lab.kill_agent("h1").unwrap();
    lab.start_agent("h1").unwrap();
    lab.start_server().unwrap();
    lab.wait_connected("h1").unwrap();
    meet(&lab, &near, &far);
    is_refused(&lab, "h3");
    assert_eq!(view(&lab, "h1").copy.unwrap().times, 1, "it asked no more");

    // The copy becomes a host of its own.
    lab.check(SERVER, &["droveway", "host", "rm", "h3"]).unwrap();
    lab.kill_agent("h3").unwrap();
    lab.start_agent("h3").unwrap();
    lab.wait_connected("h3").unwrap();
    assert_ne!(lab.agent_status("h3").unwrap().host, id);
    let third = lab.run("h3", &idle("third")).unwrap();
    meet(&lab, &near, &third);

    // An old disk in the original's place: what was attached since, it does not know.
    lab.kill_agent("h1").unwrap();
    copy(&lab, backup, state(&lab, "h1"));
    lab.start_agent("h1").unwrap();
    is_refused(&lab, "h1");
    lab.check(SERVER, &["droveway", "host", "rm", "h1"]).unwrap();
    lab.kill_agent("h1").unwrap();
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    let again = lab.run("h1", &idle("again")).unwrap();
    meet(&lab, &again, &far);
}

#[test]
fn an_original_that_was_cut_off_while_a_copy_came_goes_on_when_it_is_back() {
    let lab = lab(3);
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &near, &far);
    lab.cut("h1", SERVER).unwrap();
    // The server knows of nobody that it is there.
    lab.kill_server().unwrap();
    lab.kill_agent("h3").unwrap();
    copy(&lab, state(&lab, "h1"), state(&lab, "h3"));
    lab.start_server().unwrap();
    lab.start_agent("h3").unwrap();
    lab.wait_connected("h3").unwrap();
    let id = lab.agent_status("h3").unwrap().host;
    assert_eq!(lab.agent_status("h1").unwrap().host, id, "it was taken for h1");

    lab.heal().unwrap();
    is_refused(&lab, "h3");
    lab.wait_connected("h1").unwrap();
    meet(&lab, &near, &far);
    until(LIMIT, "h1 is where the original is", || {
        view(&lab, "h1").host.candidates.first().is_some_and(|it| it.address.to_string() == "10.0.0.5")
    });
    let third = lab.run("h1", &idle("third")).unwrap();
    meet(&lab, &third, &far);
    assert_eq!(view(&lab, "h1").copy.unwrap().from.to_string(), "10.0.0.7");
    lab.check("h1", &["droveway", "doctor"]).unwrap();
}
