//! What is on the underlay while a test runs: a canary that must not be there, and packets that may.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

use droveway::lab::capture::{Capture, Flow, Report, What};
use droveway::lab::{Container, Lab, LabSpec};
use rustls::crypto::aws_lc_rs;

use crate::support::{LIMIT, Look, idle, meet, spec, succeeds, until};

/// Sixteen letters and digits, made for this run of the tests, that are nowhere but in what containers send each other.
pub fn canary() -> &'static str {
    static CANARY: LazyLock<String> = LazyLock::new(|| {
        let mut random = [0; 8];
        aws_lc_rs::default_provider().secure_random.fill(&mut random).unwrap();
        hex(&random)
    });
    &CANARY
}

/// The canary as `ping -p` takes it.
pub fn pattern() -> String {
    hex(canary().as_bytes())
}

/// The labs in which a packet with the canary in it has gone from host to host.
static CARRIED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// A packet with the canary in it has gone from a host of this lab to another.
pub fn carried(lab: &Lab) {
    CARRIED.lock().unwrap_or_else(PoisonError::into_inner).insert(lab.spec().name.to_string());
}

/// A lab whose networks are encrypted, and a capture of its underlay from before the first container until the lab
/// ends: whatever a test does, the canary that its traffic carries is not seen there.
pub struct Watched {
    // Before the lab: it has to end first.
    watch: Option<Mutex<Watch>>,
    lab: Lab,
}

impl Watched {
    pub fn up(spec: LabSpec) -> Self {
        let lab = Lab::up(spec).unwrap();
        Self { watch: Some(Mutex::new(Watch::begin(&lab))), lab }
    }

    /// Where a network is in clear there is nothing to watch.
    pub fn in_clear(spec: LabSpec) -> Self {
        Self { watch: None, lab: Lab::up(spec).unwrap() }
    }

    /// All that was on the underlay until now.
    pub fn report(&self) -> Report {
        self.watch.as_ref().unwrap().lock().unwrap_or_else(PoisonError::into_inner).report()
    }

    /// Asserts that until now the canary has gone from host to host, if anything has, and was never seen.
    #[track_caller]
    pub fn unseen(&self) {
        if self.watch.is_none() {
            return;
        }
        let report = self.report();
        if let Err(error) = report.clean() {
            panic!("{error}\n{report}");
        }
        let carried = CARRIED.lock().unwrap_or_else(PoisonError::into_inner);
        let none = report.count(|flow| matches!(flow.what, What::Esp { .. })) == 0;
        let name = self.lab.spec().name.as_str();
        assert!(
            none || carried.contains(name),
            "of what went from host to host nothing had the canary in it"
        );
    }
}

impl Deref for Watched {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.unseen();
        }
    }
}

/// A capture of the whole underlay. If the test fails, the last packets are left in a pcap file.
pub struct Watch {
    capture: Capture,
    pattern: String,
    file: PathBuf,
}

impl Watch {
    pub fn begin(lab: &Lab) -> Self {
        let capture = lab.capture(&[canary()]).unwrap();
        let file =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("underlay-{}.pcap", lab.spec().name));
        Self { capture, pattern: pattern(), file }
    }

    /// A ping whose payload is the canary.
    pub fn pings(&self, lab: &Lab, from: &str, to: &str) -> bool {
        self.ping(lab, from, &[to])
    }

    /// [`Watch::pings`] from one of the pinger's addresses.
    pub fn pings_from(&self, lab: &Lab, from: &str, address: &str, to: &str) -> bool {
        self.ping(lab, from, &["-I", address, to])
    }

    fn ping(&self, lab: &Lab, from: &str, words: &[&str]) -> bool {
        let ping = ["ping", "-n", "-c", "1", "-W", "1", "-s", "200", "-p", &self.pattern];
        succeeds(lab, from, &[&ping[..], words].concat())
    }

    /// All until now.
    pub fn report(&mut self) -> Report {
        self.capture.report().unwrap()
    }

    /// Asserts that until now nothing was seen but what an encrypted network may show, and that the canary was not.
    #[track_caller]
    pub fn sealed(&mut self) -> Report {
        let report = self.report();
        if let Err(error) = report.clean() {
            panic!("{error}\n{report}");
        }
        let strange = report.flows.iter().filter(|flow| !allowed(flow.what)).collect::<Vec<_>>();
        assert!(strange.is_empty(), "not of an encrypted network: {strange:#?}");
        assert_eq!(report.unlisted, 0);
        report
    }
}

/// What encrypted networks show of themselves, and what any host shows.
fn allowed(what: What) -> bool {
    match what {
        What::Esp { .. } | What::Ike { .. } | What::Keepalive | What::Control | What::Arp | What::Icmp => {
            true
        }
        What::Vxlan | What::Fragment | What::Other { .. } => false,
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let told = match self.capture.write(&self.file) {
                Ok(()) => format!("the last packets of the underlay are in {}", self.file.display()),
                Err(error) => format!("the packets of the underlay are not kept: {error:#}"),
            };
            eprintln!("{told}");
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from_digit(digit.into(), 16).unwrap()).collect()
}

fn pair(lab: &Lab) -> (Container, Container) {
    let pair = (lab.run("h1", &idle("one")).unwrap(), lab.run("h2", &idle("other")).unwrap());
    meet(lab, &pair.0, &pair.1);
    pair
}

/// The control: were anything of a container in clear, it would be found.
#[test]
fn on_a_network_in_clear_the_canary_is_found_and_the_packet_kept() {
    let lab = Lab::up(spec(2)).unwrap();
    lab.check(
        "server",
        &["droveway", "network", "create", "clear", "--driver", "vxlan", "--subnet", "10.60.0.0/16"],
    )
    .unwrap();
    let mut watch = Watch::begin(&lab);
    let run = |host: &str, name: &str| {
        let run = crate::support::idle_in("clear", name);
        let mut made = lab.run(host, &run);
        until(LIMIT, "the host has heard of the network", || {
            if made.is_err() {
                made = lab.run(host, &run);
            }
            made.is_ok()
        });
        made.unwrap()
    };
    let (one, other) = (run("h1", "one"), run("h2", "other"));
    // Without the canary.
    let ping = ["ping", "-n", "-c", "1", "-W", "1", &other.ip().to_string()].map(str::to_owned);
    until(LIMIT, "the one reaches the other", || {
        succeeds(&lab, &one.path(), &ping.each_ref().map(String::as_str))
    });
    watch.report().clean().unwrap();
    assert!(watch.pings(&lab, &one.path(), &other.ip().to_string()));
    let report = watch.report();
    assert_eq!(report.finds, 2, "a ping and its answer: {report}");
    assert!(report.found.iter().all(|found| found.what == What::Vxlan), "{report}");
    assert_eq!(report.found[0].node, "h1");
    let error = report.clean().unwrap_err().to_string();
    assert!(error.contains("2 frames have a text in clear") && error.contains("VXLAN"), "{error}");
    // What is kept can be read by others.
    let file = tempfile::NamedTempFile::new().unwrap();
    watch.capture.write(file.path()).unwrap();
    let shown = Command::new("tcpdump").args(["-A", "-n", "-r"]).arg(file.path()).output().unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains(canary()), "{shown:?}");
}

#[test]
fn each_packet_is_counted_once_by_the_node_that_sends_it_also_behind_a_nat() {
    let nats = droveway::lab::boxes(vec!["h2".parse().unwrap()]);
    let lab = Lab::up(LabSpec { bare: true, nats, ..spec(2) }).unwrap();
    let mut watch = Watch::begin(&lab);
    let begin = watch.report();
    assert!(watch.pings(&lab, "h2", "10.0.0.5"));
    let report = watch.report().since(&begin);
    // Not what nodes tell all about their groups.
    let icmp = |node: &str| {
        let to = |flow: &Flow| flow.destination.address.is_ipv4() && !flow.destination.address.is_multicast();
        report.count(|flow| flow.what == What::Icmp && flow.node == node && to(flow))
    };
    assert_eq!(["h2", "nat1", "nat1 inside", "h1", "underlay"].map(icmp), [1, 1, 1, 1, 0], "{report}");
    assert_eq!(report.finds, 4);
}

#[test]
fn a_canary_is_found_across_the_segments_of_a_stream_and_the_fragments_of_a_packet() {
    let lab = Lab::up(LabSpec { bare: true, ..spec(2) }).unwrap();
    let mut watch = Watch::begin(&lab);
    let (half, rest) = canary().split_at(7);
    let script = format!("(printf {half}; sleep 0.3; printf {rest}) | busybox nc -w 2 10.0.0.6 99");
    let mut listener = lab.spawn("h2", &["busybox", "nc", "-l", "-p", "99"]).unwrap();
    until(LIMIT, "a stream arrives", || {
        succeeds(&lab, "h1", &["sh", "-c", &script]) && watch.report().finds == 1
    });
    listener.kill().unwrap();
    listener.wait().unwrap();
    // Larger than the underlay: it comes in fragments, each with many canaries.
    let pattern = pattern();
    lab.check("h1", &["ping", "-c", "1", "-W", "1", "-s", "4000", "-p", &pattern, "10.0.0.6"]).unwrap();
    let report = watch.report();
    assert_eq!(report.finds, 1 + 6, "three fragments each way: {report}");
    assert_eq!(report.count(|flow| flow.what == What::Fragment), 4, "{report}");
}

#[test]
fn the_capture_outlives_a_node_that_is_switched_off_and_on() {
    let lab = Lab::up(LabSpec { bare: true, ..spec(2) }).unwrap();
    let mut watch = Watch::begin(&lab);
    lab.kill("h2").unwrap();
    lab.start("h2").unwrap();
    assert!(watch.pings(&lab, "h1", "10.0.0.6"));
    let report = watch.report();
    assert_eq!((report.finds, report.missed), (2, 0), "{report}");
    assert_eq!(
        report.count(|flow| {
            let to = flow.destination.address;
            flow.node == "h2" && flow.what == What::Icmp && to.is_ipv4() && !to.is_multicast()
        }),
        1
    );
}

#[test]
fn the_verb_says_what_was_on_the_underlay_and_fails_if_a_text_is_seen() {
    let lab = Watched::up(spec(2));
    let (one, other) = pair(&lab);
    let verb = |find: &str, at: &str, words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_droveway"));
        command.args(["lab", "capture", "--lab", lab.spec().name.as_str(), "--find", find, "--"]);
        command.args([env!("CARGO_BIN_EXE_droveway"), "lab", "exec", at, "--"]).args(words);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // The text is "canary". Between containers it is not seen, between hosts it is.
    let ping = |to: &'static str| ["ping", "-n", "-c", "2", "-p", "63616e617279", to];
    let address = other.ip().to_string().leak();
    let (code, text) = verb("canary", &one.path(), &ping(address));
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("10.0.0.6:4500") && text.contains("ESP "), "{text}");
    assert!(text.contains("\"canary\" is in none of "), "{text}");
    let (code, text) = verb("canary", "h1", &ping("10.0.0.6"));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("\"canary\" IS SEEN, first in ICMP of h1, 10.0.0.5 to 10.0.0.6"), "{text}");
    assert_eq!(verb("absent", "h1", &["sh", "-c", "exit 7"]).0, Some(7));
}
