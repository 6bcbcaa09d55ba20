//! Interoperation with strongSwan's charon: it is a foreign peer, `box`, of a network whose gateway is `h1`.

mod events;
mod failures;
mod harness;
mod matrix;

use std::fs;
use std::path::PathBuf;

use droveway::lab::capture::{Report, What};
use droveway::lab::{Container, Lab, LabSpec};
use model::agent_api::{TunnelState, TunnelStatus};

use crate::charon::{Authority, Certified, Charon, Connection, IkeSa, Proof, Settings};
use crate::support::{LIMIT, Look, idle_in, spec, until};
use crate::watch::Watch;

/// What both have, where they have a secret.
const SECRET: &str = "correct horse battery staple";
/// The node on which charon runs, its address there, and the peer's name.
const BOX: &str = "box";
const BOX_ADDRESS: &str = "10.0.0.201";
/// The identity that it proves.
const BOX_ID: &str = "box.example";
/// What is behind it.
const BEHIND: &str = "192.168.77.0/24";
const INNER: &str = "192.168.77.1";
/// What it reaches.
const POOL: &str = "10.50.0.0/16";
const GATEWAY: &str = "10.0.0.5";

/// How the two prove themselves.
enum Trust {
    Psk,
    /// By certificate: the box by this one, which that CA signed.
    Certificates(Box<(Authority, Certified)>),
}

/// A lab with a gateway, a container on it, and a node for charon.
struct Field {
    lab: Lab,
    web: Container,
}

impl Field {
    fn new() -> Self {
        Self::of(spec(1))
    }

    fn of(spec: LabSpec) -> Self {
        let lab = Lab::up(LabSpec { others: vec![BOX.parse().unwrap()], ..spec }).unwrap();
        let create = ["droveway", "network", "create", "safe", "--subnet", POOL, "--driver", "ipsec"];
        lab.check("server", &create).unwrap();
        let mut web = lab.run("h1", &idle_in("safe", "web"));
        until(LIMIT, "the host has heard of the network", || {
            if web.is_err() {
                web = lab.run("h1", &idle_in("safe", "web"));
            }
            web.is_ok()
        });
        Self { web: web.unwrap(), lab }
    }

    fn charon(&self, settings: Settings) -> Charon<'_> {
        Charon::start(&self.lab, BOX, &format!("{INNER}/24"), settings)
    }

    /// The connection that a charon needs to get on with the gateway. It waits to be begun with.
    fn connection(&self, trust: &Trust) -> Connection {
        let host = self.lab.agent_status("h1").unwrap().host;
        let (ours, theirs) = match trust {
            Trust::Psk => {
                let secret = Proof::Psk(SECRET.to_owned());
                ((BOX_ID.to_owned(), secret.clone()), (GATEWAY.to_owned(), secret))
            }
            Trust::Certificates(both) => {
                let ca = fs::read(self.lab.dir().join("server/data/ca.pem")).unwrap();
                let own = Proof::Certificate(both.1.clone());
                ((BOX_ID.to_owned(), own), (format!("CN={host}"), Proof::SignedBy(ca)))
            }
        };
        let (ours, theirs) = ((ours.0.as_str(), ours.1), (theirs.0.as_str(), theirs.1));
        Connection {
            local_ts: vec![BEHIND.to_owned()],
            remote_ts: vec![POOL.to_owned()],
            ..Connection::new(BOX, GATEWAY, ours, theirs)
        }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.lab.dir().join(name);
        let mut file =
            fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&path).unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        path
    }

    /// Joins the peer at that address to the network; `options` are more of `peer create`.
    fn join_at(&self, address: &str, trust: &Trust, options: &[&str]) {
        let (option, file) = match trust {
            Trust::Psk => ("--psk-file", self.file("psk", SECRET)),
            Trust::Certificates(both) => ("--ca", self.file("ca.pem", &both.0.pem())),
        };
        let file = file.display().to_string();
        let words =
            ["droveway", "peer", "create", BOX, "--address", address, "--network", "safe", "--host", "h1"];
        let more = ["--remote-cidr", BEHIND, "--id", BOX_ID, option, &file];
        self.lab.check("server", &[&words[..], &more[..], options].concat()).unwrap();
    }

    fn join_with(&self, trust: &Trust, options: &[&str]) {
        self.join_at(BOX_ADDRESS, trust, options);
    }

    fn join(&self, trust: &Trust) {
        self.join_with(trust, &[]);
    }

    /// The container's address.
    fn address(&self) -> String {
        self.web.ip().to_string()
    }

    /// Takes the peer away, and waits until both have forgotten it.
    fn part(&self, charon: &Charon<'_>) {
        self.lab.check("server", &["droveway", "peer", "rm", BOX]).unwrap();
        until(LIMIT, "charon has no SA any more", || charon.sas(BOX).is_empty());
        until(LIMIT, "the gateway has no tunnel any more", || self.tunnel().is_none());
    }

    /// The tunnel as the gateway tells of it.
    fn tunnel(&self) -> Option<TunnelStatus> {
        let words = ["droveway", "tunnel", "ls", "-o", "json"];
        let text = self.lab.check("h1", &words).unwrap();
        let tunnels: Vec<TunnelStatus> = serde_json::from_str(&text).unwrap();
        tunnels.into_iter().find(|tunnel| tunnel.peer.as_str() == BOX)
    }

    /// Waits until it is up there, and gives it.
    #[track_caller]
    fn up(&self) -> TunnelStatus {
        let mut last = None;
        until(LIMIT, "the tunnel is up at the gateway", || {
            last = self.tunnel();
            last.as_ref().is_some_and(|tunnel| matches!(tunnel.state, TunnelState::Up { .. }))
        });
        last.unwrap()
    }

    /// What the gateway's agent wrote.
    fn log(&self) -> String {
        let file = self.lab.daemon_log("h1", droveway::lab::Daemon::Agent);
        String::from_utf8_lossy(&fs::read(file).unwrap()).into_owned()
    }

    /// A ping from each side, with the canary in it.
    fn both_ways(&self, watch: &Watch) -> bool {
        watch.pings(&self.lab, &self.web.path(), INNER)
            && watch.pings_from(&self.lab, BOX, INNER, &self.address())
    }
}

impl Drop for Field {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent on h1:\n{}", self.log());
        }
    }
}

/// Asserts what makes traffic proved: charon's own counters moved, and on the underlay were ESP packets of its SPIs.
#[track_caller]
fn proved(before: &IkeSa, after: &IkeSa, seen: &Report, pings: u64) {
    let ([old], [new]) = (&before.children[..], &after.children[..]) else {
        panic!("{before:#?} {after:#?}")
    };
    assert_eq!((old.spi_in, old.spi_out), (new.spi_in, new.spi_out), "the same SA before and after");
    assert_eq!(
        (new.packets_in - old.packets_in, new.packets_out - old.packets_out),
        (pings, pings),
        "{after:#?}"
    );
    assert!(new.bytes_in - old.bytes_in >= pings * 200, "{after:#?}");
    assert!(new.bytes_out - old.bytes_out >= pings * 200, "{after:#?}");
    let esp = |node: &str, spi: u32| seen.count(|flow| flow.node == node && flow.what == What::Esp { spi });
    assert_eq!((esp("h1", new.spi_in), esp(BOX, new.spi_out)), (pings, pings), "ESP on the underlay: {seen}");
}
