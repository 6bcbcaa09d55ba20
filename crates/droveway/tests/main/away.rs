//! Losing the server loses changes, never traffic.

use std::collections::BTreeSet;

use droveway::lab::Lab;
use model::agent_api::Connection;

use crate::doctor::well;
use crate::steady::Steady;
use crate::support::{LIMIT, Look, idle, idle_in, lab, meet, says, ttl, until};

fn names(lab: &Lab, host: &str) -> BTreeSet<String> {
    lab.endpoints(host).unwrap().into_iter().map(|endpoint| endpoint.name.unwrap().to_string()).collect()
}

fn resolves(lab: &Lab, at: &str, name: &str) -> String {
    let name = format!("{name}.droveway.internal");
    says(lab, at, &["dig", "+short", "+time=1", "+tries=1", &name]).trim().to_owned()
}

#[test]
fn without_the_server_traffic_attachments_names_and_restarts_go_on_and_it_learns_all_when_it_is_back() {
    let lab = lab(2);
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    let goes = lab.run("h1", &idle("goes")).unwrap();
    meet(&lab, &near, &far);
    let steady = Steady::start(&lab, &far, &near);
    lab.kill_server().unwrap();
    until(LIMIT, "the agents notice", || {
        ["h1", "h2"]
            .iter()
            .all(|host| matches!(lab.agent_status(host).unwrap().connection, Connection::Down { .. }))
    });

    // Attach and detach, from the block that the host has.
    let new = lab.run("h1", &idle("new")).unwrap();
    assert!(ttl(&lab, &new.path(), &far.ip().to_string()).is_some(), "to the other host");
    assert!(ttl(&lab, &far.path(), &new.ip().to_string()).is_some(), "and from there");
    lab.kill_container("h1", "goes").unwrap();
    assert_eq!(names(&lab, "h1"), ["near", "new"].map(str::to_owned).into());
    // Names of this host, and of the other as it was.
    assert_eq!(resolves(&lab, "h1/near", "new"), new.ip().to_string());
    assert_eq!(resolves(&lab, "h1/near", "goes"), "");
    assert_eq!(resolves(&lab, "h1/near", "far"), far.ip().to_string());
    // What needs the server says so.
    let error = lab.run("h1", &idle_in("nosuch", "x")).unwrap_err().to_string();
    assert!(error.contains("nosuch"), "{error}");
    let wish = droveway::lab::RunSpec { address: Some("10.42.0.9".parse().unwrap()), ..idle("x") };
    let error = lab.run("h1", &wish).unwrap_err().to_string();
    assert!(error.contains("10.0.0.2:7443"), "the server is named: {error}");
    assert_eq!(names(&lab, "h1"), ["near", "new"].map(str::to_owned).into());

    let (sent, received) = steady.end(&lab, &far);
    assert_eq!(sent, received, "pings all the while");
    assert!(sent > 5);

    // The agent starts anew. It agrees on new keys with the other host: they never were on a disk.
    lab.kill_agent("h1").unwrap();
    assert_eq!(ttl(&lab, &new.path(), &far.ip().to_string()), None, "no keys, no packet");
    assert!(ttl(&lab, &new.path(), &near.ip().to_string()).is_some(), "on one host it is not needed");
    lab.start_agent("h1").unwrap();
    assert_eq!(names(&lab, "h1"), ["near", "new"].map(str::to_owned).into());
    let last = lab.run("h1", &idle("last")).unwrap();
    assert_ne!(last.ip(), goes.ip(), "a released address rests");
    meet(&lab, &last, &far);
    until(LIMIT, "names are answered again", || {
        resolves(&lab, "h1/near", "last") == last.ip().to_string()
            && resolves(&lab, "h1/near", "far") == far.ip().to_string()
    });

    lab.start_server().unwrap();
    for host in ["h1", "h2"] {
        lab.wait_connected(host).unwrap();
    }
    until(LIMIT, "the server knows what happened", || {
        let text = says(&lab, "server", &["droveway", "endpoint", "ls", "-o", "json"]);
        let list: Vec<model::Endpoint> = serde_json::from_str(&text).unwrap();
        let names: BTreeSet<String> =
            list.into_iter().map(|endpoint| endpoint.name.unwrap().to_string()).collect();
        names == ["near", "new", "last", "far"].map(str::to_owned).into()
    });
    until(LIMIT, "and so does the other host", || {
        resolves(&lab, "h2/far", "last") == last.ip().to_string()
            && resolves(&lab, "h2/far", "goes").is_empty()
    });
    well(&lab);
}
