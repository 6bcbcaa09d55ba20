//! What is on the underlay while a test runs: a canary that must not be there, and packets that may.

use std::path::PathBuf;
use std::process::Command;

use droveway::lab::capture::{Capture, Report, What};
use droveway::lab::{Container, Lab, LabSpec};
use rustls::crypto::aws_lc_rs;

use crate::support::{LIMIT, Look, idle, lab, meet, spec, succeeds, until};

/// A capture of the whole underlay, with a canary made for this run: it begins before the canary exists, so nothing with
/// the canary in it can come before. If the test fails, the last packets are left in a pcap file.
pub struct Watch {
    capture: Capture,
    canary: String,
    file: PathBuf,
}

impl Watch {
    pub fn begin(lab: &Lab) -> Self {
        let mut random = [0; 8];
        aws_lc_rs::default_provider().secure_random.fill(&mut random).unwrap();
        let canary = hex(&random);
        let capture = lab.capture(&[&canary]).unwrap();
        let file =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("underlay-{}.pcap", lab.spec().name));
        Self { capture, canary, file }
    }

    /// Sixteen letters and digits that are nowhere but in what this test sends.
    pub fn canary(&self) -> &str {
        &self.canary
    }

    /// So many bytes of nothing but the canary: any 31 of them on end have a whole one in them, however they are cut.
    pub fn payload(&self, length: usize) -> Vec<u8> {
        self.canary.bytes().cycle().take(length).collect()
    }

    /// A ping whose payload is the canary.
    pub fn pings(&self, lab: &Lab, from: &str, to: &str) -> bool {
        let pattern = hex(self.canary.as_bytes());
        succeeds(lab, from, &["ping", "-n", "-c", "1", "-W", "1", "-s", "200", "-p", &pattern, to])
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
    meet(&lab, &one, &other);
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
    let canary = watch.canary().to_owned();
    let shown = Command::new("tcpdump").args(["-A", "-n", "-r"]).arg(file.path()).output().unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains(&canary), "{shown:?}");
}

#[test]
fn each_packet_is_counted_once_by_the_node_that_sends_it_also_behind_a_nat() {
    let nats = droveway::lab::boxes(vec!["h2".parse().unwrap()]);
    let lab = Lab::up(LabSpec { bare: true, nats, ..spec(2) }).unwrap();
    let mut watch = Watch::begin(&lab);
    let begin = watch.report();
    assert!(watch.pings(&lab, "h2", "10.0.0.5"));
    let report = watch.report().since(&begin);
    let icmp = |node: &str| {
        report.count(|flow| flow.what == What::Icmp && flow.node == node && flow.source.address.is_ipv4())
    };
    assert_eq!(["h2", "nat1", "nat1 inside", "h1", "underlay"].map(icmp), [1, 1, 1, 1, 0], "{report}");
    assert_eq!(report.finds, 4);
}

#[test]
fn a_canary_is_found_across_the_segments_of_a_stream_and_the_fragments_of_a_packet() {
    let lab = Lab::up(LabSpec { bare: true, ..spec(2) }).unwrap();
    let mut watch = Watch::begin(&lab);
    let (half, rest) = watch.canary().split_at(7);
    let script = format!("(printf {half}; sleep 0.3; printf {rest}) | busybox nc -w 2 10.0.0.6 99");
    let mut listener = lab.spawn("h2", &["busybox", "nc", "-l", "-p", "99"]).unwrap();
    until(LIMIT, "a stream arrives", || {
        succeeds(&lab, "h1", &["sh", "-c", &script]) && watch.report().finds == 1
    });
    listener.kill().unwrap();
    listener.wait().unwrap();
    // Larger than the underlay: it comes in fragments, each with many canaries.
    let pattern = hex(watch.canary().as_bytes());
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
        report.count(|flow| flow.node == "h2" && flow.what == What::Icmp && flow.source.address.is_ipv4()),
        1
    );
}

#[test]
fn the_verb_says_what_was_on_the_underlay_and_fails_if_a_text_is_seen() {
    let lab = lab(2);
    let (one, other) = pair(&lab);
    let verb = |find: &str, words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_droveway"));
        command.args(["lab", "capture", "--lab", lab.spec().name.as_str(), "--find", find, "--"]);
        command.args([env!("CARGO_BIN_EXE_droveway"), "lab", "exec", &one.path(), "--"]).args(words);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let to = other.ip().to_string();
    let (code, text) = verb("canary", &["ping", "-n", "-c", "2", "-p", "63616e617279", &to]);
    assert!(text.contains("10.0.0.6"), "{text}");
    assert_eq!(text.contains("IS SEEN"), code == Some(1), "{text}");
    let (code, text) = verb("absent", &["ping", "-n", "-c", "1", &to]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("\"absent\" is in none of "), "{text}");
    assert_eq!(verb("absent", &["sh", "-c", "exit 7"]).0, Some(7));
}
