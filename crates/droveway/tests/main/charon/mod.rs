//! strongSwan's charon on a node of the lab: the other implementation.
//!
//! It runs with `kernel-libipsec`, its own ESP in user space, as not every kernel has ESP. That says to every peer that a
//! NAT is in between, so ESP is always in UDP; and it sends its certificate only to who asks for one. Each box has a
//! `/run` of its own, as every node has, so several can run at once.

mod certs;
mod vici;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use droveway::lab::Lab;

pub use self::certs::{Authority, Certified, Key};
use self::vici::{Section, Vici};
use crate::support::{LIMIT, succeeds, until};

/// How long charon may take to bring an SA up, or to take it down.
const SA_LIMIT: Duration = Duration::from_secs(20);
/// In the order in which charon asks them for an algorithm.
const PLUGINS: &str = "random nonce aes gcm sha1 sha2 hmac kdf openssl x509 pubkey pkcs1 pkcs8 pem revocation \
                       constraints kernel-libipsec kernel-netlink socket-default vici";

/// What is set for all of a charon's connections, as `strongswan.conf` calls it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The largest IKE datagram that is not cut.
    pub fragment_size: u32,
    /// From this many half-open IKE SAs on, it asks for cookies.
    pub cookie_threshold: u32,
    /// Seconds until a request is sent again the first time.
    pub retransmit_timeout: f32,
    /// How often at most.
    pub retransmit_tries: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { fragment_size: 1280, cookie_threshold: 10, retransmit_timeout: 1.0, retransmit_tries: 4 }
    }
}

/// How one of the two proves itself.
#[derive(Clone)]
pub enum Proof {
    /// By a secret that both have.
    Psk(String),
    /// By a certificate: charon's own.
    Certificate(Certified),
    /// By any certificate of that CA (DER): the other's.
    SignedBy(Vec<u8>),
}

/// What charon does with a connection that it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Waits.
    Nothing,
    /// Begins, and begins again when it was closed.
    Always,
}

/// A connection, as `swanctl.conf` calls it.
#[derive(Clone)]
pub struct Connection {
    pub name: String,
    /// The other's address, or `%any`.
    pub remote: String,
    /// The other's port for IKE.
    pub remote_port: u16,
    /// The identity that charon proves, and how.
    pub ours: (String, Proof),
    /// The identity that the other has to prove, and how.
    pub theirs: (String, Proof),
    /// As `aes128gcm16-prfsha256-x25519`.
    pub ike: String,
    /// As `aes128gcm16`, with a group for rekeying: `aes128gcm16-x25519`.
    pub esp: String,
    pub local_ts: Vec<String>,
    pub remote_ts: Vec<String>,
    pub start: Start,
    /// 0: never.
    pub ike_rekey: Duration,
    /// 0: never.
    pub child_rekey: Duration,
    /// Silence after which it asks whether the other lives; 0: never.
    pub liveness: Duration,
    pub mobike: bool,
    /// `yes`, `accept`, `force` or `no`.
    pub fragmentation: &'static str,
}

impl Connection {
    /// With a pre-shared key, X25519 and AES-128-GCM; charon waits to be begun with.
    pub fn new(name: &str, remote: &str, ours: (&str, Proof), theirs: (&str, Proof)) -> Self {
        Self {
            name: name.to_owned(),
            remote: remote.to_owned(),
            remote_port: 500,
            ours: (ours.0.to_owned(), ours.1),
            theirs: (theirs.0.to_owned(), theirs.1),
            ike: "aes128gcm16-prfsha256-x25519".to_owned(),
            esp: "aes128gcm16-x25519".to_owned(),
            local_ts: Vec::new(),
            remote_ts: Vec::new(),
            start: Start::Nothing,
            ike_rekey: Duration::ZERO,
            child_rekey: Duration::ZERO,
            liveness: Duration::ZERO,
            mobike: true,
            fragmentation: "yes",
        }
    }

    fn message(&self) -> Section {
        let seconds = |time: Duration| format!("{}s", time.as_secs());
        let child = Section::default()
            .list("local_ts", &self.local_ts)
            .list("remote_ts", &self.remote_ts)
            .list("esp_proposals", [&self.esp])
            .text("rekey_time", seconds(self.child_rekey))
            .text("start_action", if self.start == Start::Always { "start" } else { "none" })
            .text("close_action", if self.start == Start::Always { "start" } else { "none" })
            .text("dpd_action", if self.start == Start::Always { "restart" } else { "clear" });
        let connection = Section::default()
            .text("version", "2")
            .list("remote_addrs", [&self.remote])
            .text("remote_port", self.remote_port.to_string())
            .list("proposals", [&self.ike])
            .text("rekey_time", seconds(self.ike_rekey))
            .text("over_time", "60s")
            .text("rand_time", "0s")
            .text("dpd_delay", seconds(self.liveness))
            .text("mobike", if self.mobike { "yes" } else { "no" })
            .text("fragmentation", self.fragmentation)
            .text("unique", "replace")
            .section("local", party(&self.ours))
            .section("remote", party(&self.theirs))
            .section("children", Section::default().section(&self.name, child));
        Section::default().section(&self.name, connection)
    }
}

fn party((id, proof): &(String, Proof)) -> Section {
    let section = Section::default().text("id", id);
    match proof {
        Proof::Psk(_) => section.text("auth", "psk"),
        Proof::Certificate(certified) => {
            section.text("auth", "pubkey").list("certs", certified.chain.first())
        }
        Proof::SignedBy(ca) => section.text("auth", "pubkey").list("cacerts", [ca]),
    }
}

/// An IKE SA, as charon shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IkeSa {
    pub name: String,
    /// Its number here.
    pub unique: u64,
    /// `ESTABLISHED`, `CONNECTING`, and so on.
    pub state: String,
    pub initiator: bool,
    /// SPIs in hexadecimal.
    pub spis: (String, String),
    /// As `AES_GCM_16-128/PRF_HMAC_SHA2_256/CURVE_25519`.
    pub suite: String,
    /// Where it sees itself and the other.
    pub local: String,
    pub remote: String,
    /// Seconds since it was made.
    pub age: u64,
    pub children: Vec<ChildSa>,
}

/// A CHILD_SA, as charon shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildSa {
    pub name: String,
    pub unique: u64,
    /// `INSTALLED`, `REKEYING`, and so on.
    pub state: String,
    pub spi_in: u32,
    pub spi_out: u32,
    /// As `AES_GCM_16-128`, with the group of its own exchange if it had one.
    pub suite: String,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub packets_in: u64,
    pub packets_out: u64,
    pub local_ts: Vec<String>,
    pub remote_ts: Vec<String>,
    /// Seconds since it was made.
    pub age: u64,
}

/// charon on a node, until it is dropped.
pub struct Charon<'a> {
    lab: &'a Lab,
    node: String,
    child: Option<Child>,
    settings: Settings,
    given: Vec<Connection>,
}

impl<'a> Charon<'a> {
    /// Starts it on a node that runs nothing else, and waits until it answers. `inner` is its own address, as
    /// `192.168.77.1/24`, on a bridge of its own.
    pub fn start(lab: &'a Lab, node: &str, inner: &str, settings: Settings) -> Self {
        let script =
            format!("ip link add in0 type bridge && ip addr add {inner} dev in0 && ip link set in0 up");
        lab.check(node, &["sh", "-c", &script]).unwrap();
        let mut charon = Self { lab, node: node.to_owned(), child: None, settings, given: Vec::new() };
        charon.launch();
        charon
    }

    fn dir(&self) -> PathBuf {
        self.lab.dir().join(&self.node)
    }

    fn launch(&mut self) {
        let Settings { fragment_size, cookie_threshold, retransmit_timeout, retransmit_tries } =
            self.settings;
        let (conf, log) = (self.dir().join("strongswan.conf"), self.dir().join("charon.log"));
        let text = format!(
            "charon-systemd {{
  load = {PLUGINS}
  fragment_size = {fragment_size}
  cookie_threshold = {cookie_threshold}
  retransmit_timeout = {retransmit_timeout}
  retransmit_tries = {retransmit_tries}
  retransmit_base = 1.5
  journal {{ default = -1 }}
  filelog {{ all {{ path = {}
      default = 1
      cfg = 1
      ike = 2
      time_format = %H:%M:%S
      time_add_ms = yes
      append = yes
      flush_line = yes }} }}
}}
",
            log.display()
        );
        fs::write(&conf, text).unwrap();
        let variable = format!("STRONGSWAN_CONF={}", conf.display());
        let mut command =
            self.lab.command(&self.node, &["env", &variable, "/usr/sbin/charon-systemd"]).unwrap();
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        self.child = Some(child);
        until(LIMIT, &format!("charon answers; its log: {}", self.log()), || {
            let ended = self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_some());
            assert!(
                !ended,
                "charon ended; is charon-systemd installed? (scripts/deps.sh test) {}",
                self.log()
            );
            self.vici().is_ok_and(|mut vici| vici.ask("version", &Section::default()).is_ok())
        });
    }

    fn vici(&self) -> std::io::Result<Vici> {
        let pid = self.lab.pid_of(&self.node).unwrap();
        Vici::connect(&PathBuf::from(format!("/proc/{pid}/root/run/charon.vici")), SA_LIMIT)
    }

    fn ask(&self, command: &str, message: &Section) -> Result<Section, String> {
        self.vici().and_then(|mut vici| vici.ask(command, message)).map_err(|error| error.to_string())
    }

    /// Gives it a connection, in the place of one with that name.
    #[track_caller]
    pub fn load(&mut self, connection: &Connection) {
        self.tell(connection);
        self.given.retain(|given| given.name != connection.name);
        self.given.push(connection.clone());
    }

    #[track_caller]
    fn tell(&self, connection: &Connection) {
        let done = |answer: Result<Section, String>| {
            answer.unwrap_or_else(|error| {
                panic!("charon takes {} not: {error}\n{}", connection.name, self.log())
            });
        };
        let both = [&connection.ours, &connection.theirs];
        for (_, proof) in both {
            match proof {
                Proof::Psk(secret) => {
                    let owners = both.map(|(id, _)| id);
                    let shared = Section::default().text("id", &connection.name).text("type", "IKE");
                    done(self.ask("load-shared", &shared.text("data", secret).list("owners", owners)));
                }
                Proof::Certificate(Certified { chain, key }) => {
                    done(self.ask("load-key", &Section::default().text("type", "any").text("data", key)));
                    for above in chain.iter().skip(1) {
                        let above =
                            Section::default().text("type", "X509").text("flag", "CA").text("data", above);
                        done(self.ask("load-cert", &above));
                    }
                }
                Proof::SignedBy(ca) => {
                    let ca = Section::default().text("type", "X509").text("flag", "CA").text("data", ca);
                    done(self.ask("load-cert", &ca));
                }
            }
        }
        done(self.ask("load-conn", &connection.message()));
    }

    /// Takes a connection away, with its SAs.
    pub fn unload(&mut self, name: &str) {
        self.given.retain(|given| given.name != name);
        let _ = self.ask("unload-conn", &Section::default().text("name", name));
        let _ = self.terminate(name);
    }

    /// Has it begin, and waits until the child is there; an error is in charon's words.
    pub fn initiate(&self, name: &str) -> Result<(), String> {
        let limit = SA_LIMIT.as_millis().to_string();
        let message = Section::default().text("child", name).text("ike", name).text("timeout", limit);
        self.ask("initiate", &message).map(drop)
    }

    /// Has it delete the IKE SA, and waits until it is gone.
    pub fn terminate(&self, name: &str) -> Result<(), String> {
        self.ask("terminate", &Section::default().text("ike", name)).map(drop)
    }

    /// Has it delete the child alone.
    pub fn terminate_child(&self, name: &str) -> Result<(), String> {
        self.ask("terminate", &Section::default().text("child", name)).map(drop)
    }

    /// Has it begin to rekey the child; does not wait.
    pub fn rekey_child(&self, name: &str) -> Result<(), String> {
        self.ask("rekey", &Section::default().text("child", name)).map(drop)
    }

    /// Has it begin to rekey the IKE SA; does not wait.
    pub fn rekey_ike(&self, name: &str) -> Result<(), String> {
        self.ask("rekey", &Section::default().text("ike", name)).map(drop)
    }

    /// All SAs of a connection.
    pub fn sas(&self, name: &str) -> Vec<IkeSa> {
        let events = self.vici().and_then(|mut vici| vici.list("list-sas", "list-sa")).unwrap_or_default();
        let sas = events.iter().flat_map(Section::sections);
        sas.filter(|(found, _)| *found == name).map(|(found, section)| ike_sa(found, section)).collect()
    }

    /// The one IKE SA of a connection with one child, once it is there.
    #[track_caller]
    pub fn up(&self, name: &str) -> IkeSa {
        let mut found = Vec::new();
        let begin = std::time::Instant::now();
        while begin.elapsed() < SA_LIMIT {
            found = self.sas(name);
            if let [sa] = &found[..]
                && sa.state == "ESTABLISHED"
                && let [child] = &sa.children[..]
                && child.state == "INSTALLED"
            {
                return sa.clone();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("charon does not show one SA of {name}: {found:#?}\n{}", self.log());
    }

    /// Kills it, by `SIGKILL`: it says goodbye to nobody.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        until(LIMIT, "charon is gone", || self.vici().is_err());
    }

    /// Starts it again after [`Charon::kill`], with the same connections.
    pub fn restart(&mut self) {
        self.launch();
        for connection in self.given.clone() {
            self.tell(&connection);
        }
    }

    /// All that it wrote.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir().join("charon.log")).unwrap_or_default()
    }

    /// Waits until it wrote this, after the first `since` bytes of its log.
    #[track_caller]
    pub fn says(&self, since: usize, what: &str) {
        let begin = std::time::Instant::now();
        while !self.log().get(since..).unwrap_or_default().contains(what) {
            assert!(begin.elapsed() < SA_LIMIT, "charon does not say {what:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether an address answers a ping from its inner address.
    pub fn pings(&self, from: &str, to: &str) -> bool {
        succeeds(self.lab, &self.node, &["ping", "-n", "-c", "1", "-W", "1", "-I", from, to])
    }
}

impl Drop for Charon<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("charon on {}:\n{}", self.node, self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ike_sa(name: &str, sa: &Section) -> IkeSa {
    let children =
        sa.sections().filter(|(key, _)| *key == "child-sas").flat_map(|(_, children)| children.sections());
    IkeSa {
        name: name.to_owned(),
        unique: sa.number("uniqueid"),
        state: sa.get("state"),
        initiator: sa.get("initiator") == "yes",
        spis: (sa.get("initiator-spi"), sa.get("responder-spi")),
        suite: format!("{}/{}/{}", algorithm(sa), sa.get("prf-alg"), sa.get("dh-group")),
        local: format!("{}:{}", sa.get("local-host"), sa.get("local-port")),
        remote: format!("{}:{}", sa.get("remote-host"), sa.get("remote-port")),
        age: sa.number("established"),
        children: children.map(|(_, child)| child_sa(child)).collect(),
    }
}

fn child_sa(child: &Section) -> ChildSa {
    let spi = |key| u32::from_str_radix(&child.get(key), 16).unwrap_or_default();
    let group = child.get("dh-group");
    let group = if group.is_empty() { group } else { format!("/{group}") };
    ChildSa {
        name: child.get("name"),
        unique: child.number("uniqueid"),
        state: child.get("state"),
        spi_in: spi("spi-in"),
        spi_out: spi("spi-out"),
        suite: format!("{}{group}", algorithm(child)),
        bytes_in: child.number("bytes-in"),
        bytes_out: child.number("bytes-out"),
        packets_in: child.number("packets-in"),
        packets_out: child.number("packets-out"),
        local_ts: child.texts("local-ts"),
        remote_ts: child.texts("remote-ts"),
        age: child.number("install-time"),
    }
}

fn algorithm(sa: &Section) -> String {
    format!("{}-{}", sa.get("encr-alg"), sa.get("encr-keysize"))
}
