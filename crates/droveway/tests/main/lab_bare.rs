//! The lab itself: nodes and the underlay, without server and agents. As root and as anyone.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;

use droveway::lab::{Lab, LabSpec, Pin, RunSpec};
use nix::sys::signal::Signal;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::support::{self, LIMIT, succeeds};

const PROGRAM: &str = env!("CARGO_BIN_EXE_droveway");

fn bare(hosts: u32) -> LabSpec {
    LabSpec { bare: true, ..support::spec(hosts) }
}

fn until(what: &str, done: impl FnMut() -> bool) {
    support::until(LIMIT, what, done);
}

fn pings(lab: &Lab, from: &str, to: &str) -> bool {
    succeeds(lab, from, &["ping", "-c", "1", "-W", "1", to])
}

/// All processes of a lab. Numbers of namespaces are given again at once, those of processes with their start are not.
fn inhabitants(lab: &Lab) -> Vec<Pin> {
    let state = lab.state().unwrap();
    let mut roots: Vec<u32> = state.nodes.keys().map(|node| lab.pid_of(node).unwrap()).collect();
    roots.push(state.init.unwrap().pid);
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid"));
    let theirs: BTreeSet<PathBuf> = roots.into_iter().map(|pid| namespace(pid).unwrap()).collect();
    let pids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let there = pids.filter(|&pid| namespace(pid).is_ok_and(|at| theirs.contains(&at)));
    there.filter_map(|pid| Pin::of(pid).ok()).collect()
}

fn gone(pins: &[Pin]) -> bool {
    !pins.iter().any(|pin| pin.alive())
}

fn devices() -> String {
    fs::read_to_string("/proc/net/dev").unwrap().lines().filter_map(|line| line.split(':').next()).collect()
}

#[test]
fn two_hosts_and_the_server_reach_one_another_by_name() {
    let lab = Lab::up(bare(2)).unwrap();
    for (from, to) in [("h1", "h2"), ("h2", "h1"), ("h1", "server"), ("server", "h2")] {
        assert!(pings(&lab, from, to), "{from} to {to}");
    }
    assert_eq!(lab.check("h1", &["hostname"]).unwrap().trim(), "h1");
    assert!(lab.check("h2", &["ip", "-4", "addr", "show", "eth0"]).unwrap().contains("10.0.0.6/24"));
    lab.down().unwrap();
}

#[test]
fn each_node_has_its_own_run_and_resolv_conf_and_the_underlays_mtu() {
    let spec = LabSpec { mtu: 9000, resolv_conf: Some("nameserver 192.0.2.1\n".to_owned()), ..bare(2) };
    let machine = fs::read("/etc/resolv.conf").ok();
    let lab = Lab::up(spec).unwrap();
    lab.check("h1", &["touch", "/run/mine"]).unwrap();
    assert!(!lab.exec("h2", &["test", "-e", "/run/mine"]).unwrap().status.success());
    assert!(!Path::new("/run/mine").exists());
    assert_eq!(lab.check("h1", &["cat", "/etc/resolv.conf"]).unwrap(), "nameserver 192.0.2.1\n");
    assert_eq!(fs::read("/etc/resolv.conf").ok(), machine);
    lab.check("h1", &["ping", "-c", "1", "-W", "1", "-M", "do", "-s", "8972", "h2"]).unwrap();
}

#[test]
fn the_exit_status_and_the_output_of_a_command_come_back() {
    let lab = Lab::up(bare(1)).unwrap();
    let run = |script| lab.exec("h1", &["sh", "-c", script]).unwrap();
    let output = run("echo out; echo err >&2; exit 7");
    assert_eq!(
        (output.status.code(), &output.stdout[..], &output.stderr[..]),
        (Some(7), &b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(run("kill -9 $$").status.code(), Some(137));
    assert_eq!(lab.exec("h1", &["/no/such/program"]).unwrap().status.code(), Some(127));
}

#[test]
fn what_a_killed_caller_ran_dies_with_it() {
    let lab = Lab::up(bare(1)).unwrap();
    let mut child = lab.spawn("h1", &["sh", "-c", "echo begun; exec sleep 1000"]).unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(lab.exec("h1", &["pgrep", "-x", "sleep"]).unwrap().status.success());
    child.kill().unwrap();
    child.wait().unwrap();
    until("sleep is gone", || !lab.exec("h1", &["pgrep", "-x", "sleep"]).unwrap().status.success());
}

#[test]
fn a_cut_is_both_ways_and_between_those_two_only_until_it_is_healed() {
    let lab = Lab::up(bare(3)).unwrap();
    lab.cut("h2", "h1").unwrap();
    lab.cut("h1", "h2").unwrap();
    assert!(!pings(&lab, "h1", "h2"));
    assert!(!pings(&lab, "h2", "h1"));
    assert!(pings(&lab, "h1", "h3"));
    assert!(pings(&lab, "h2", "server"));
    lab.heal().unwrap();
    lab.heal().unwrap();
    assert!(pings(&lab, "h1", "h2"));
}

#[test]
fn a_loss_takes_about_its_share_of_the_packets() {
    let lab = Lab::up(bare(2)).unwrap();
    lab.loss("h1", "h2", 0.2).unwrap();
    let text = lab.exec("h1", &["ping", "-q", "-c", "400", "-i", "0.002", "-W", "1", "h2"]).unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    let received: u32 = text.split(" received").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    // 0.8 of 0.8 of 400 is 256; the deviation is 9.6.
    assert!((190..320).contains(&received), "{text}");
    lab.loss("h1", "h2", 0.0).unwrap();
    assert!(!lab.check("h1", &["nft", "list", "ruleset"]).unwrap().contains("numgen"));
}

#[test]
fn a_host_that_is_switched_off_and_on_keeps_its_disk_and_its_faults() {
    let lab = Lab::up(bare(2)).unwrap();
    let disk = lab.dir().join("h2").join("disk");
    lab.check("h2", &["touch", disk.to_str().unwrap(), "/run/volatile"]).unwrap();
    lab.cut("h2", "server").unwrap();
    lab.kill("h2").unwrap();
    // The kernel takes its namespaces away a moment after its last process.
    until("it does not answer any more", || !pings(&lab, "h1", "h2"));
    assert!(lab.exec("h2", &["true"]).unwrap_err().to_string().contains("lab start h2"));
    lab.start("h2").unwrap();
    assert!(pings(&lab, "h1", "h2"));
    assert!(!pings(&lab, "h2", "server"));
    lab.check("h2", &["test", "-e", disk.to_str().unwrap()]).unwrap();
    assert!(!lab.exec("h2", &["test", "-e", "/run/volatile"]).unwrap().status.success());
}

#[test]
fn nothing_is_left_when_the_supervisor_is_killed() {
    let before = devices();
    let lab = Lab::up(bare(2)).unwrap();
    let dir = lab.dir().to_owned();
    lab.check("h1", &["sh", "-c", "ip netns add red && (setsid sleep 1000 >/dev/null 2>&1 &)"]).unwrap();
    let inhabitants = inhabitants(&lab);
    assert!(inhabitants.len() >= 8, "{inhabitants:?}");
    let supervisor = fs::read(dir.join("supervisor.json")).unwrap();
    let supervisor: serde_json::Value = serde_json::from_slice(&supervisor).unwrap();
    let supervisor: Pin = serde_json::from_value(supervisor["supervisor"].clone()).unwrap();
    supervisor.signal(Signal::SIGKILL).unwrap();
    until("all processes are gone", || gone(&inhabitants));
    assert!(lab.exec("h1", &["true"]).is_err());
    assert_eq!(devices(), before);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()));
    lab.down().unwrap();
    assert!(!dir.exists());
    assert!(!Lab::down_dir(&dir).unwrap(), "there is nothing to take down any more");
}

#[test]
fn a_lab_is_refused_while_it_is_up_and_replaces_one_that_crashed() {
    let spec = bare(1);
    let lab = Lab::up(spec.clone()).unwrap();
    let error = Lab::up(spec.clone()).unwrap_err().to_string();
    assert!(error.contains("is up already") && error.contains(" down`"), "{error}");
    assert!(pings(&lab, "h1", "server"), "the refusal does not touch it");
    lab.state().unwrap().init.unwrap().signal(Signal::SIGKILL).unwrap();
    until("it is gone", || Lab::open(&spec.dir).is_err());
    let again = Lab::up(spec).unwrap();
    assert!(pings(&again, "h1", "server"));
    std::mem::forget(lab);
}

/// `droveway lab` for a lab of that name.
fn verb(name: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["lab", "--lab", name]);
    command
}

#[test]
fn a_lab_whose_up_is_interrupted_takes_itself_away_and_can_be_brought_up_at_once() {
    let name = bare(2).name;
    let up = || {
        let mut command = verb(name.as_str());
        command.args(["up", "--bare", "--hosts", "2"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut first = up();
    let mut said = BufReader::new(first.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("on the underlay")), "its nodes begin to come");
    first.kill().unwrap();
    first.wait().unwrap();
    let second = up().wait_with_output().unwrap();
    assert!(second.status.success(), "{}", String::from_utf8_lossy(&second.stderr));
    let next = String::from_utf8(second.stdout).unwrap();
    assert!(next.contains(&format!("droveway lab --lab {name} exec h1 --")), "{next}");
    for says in ["is down: nothing of it is left", "is not up: there is nothing to take down"] {
        let down = verb(name.as_str()).arg("down").output().unwrap();
        assert!(down.status.success(), "to take away what is not there is no fault");
        assert!(String::from_utf8(down.stdout).unwrap().contains(says));
    }
    let ls = verb(name.as_str()).arg("ls").output().unwrap();
    assert_eq!(ls.status.code(), Some(3), "there is no such lab");
    let error = String::from_utf8(ls.stderr).unwrap();
    assert!(error.contains(&format!("`droveway lab --lab {name} up` brings it up")), "{error}");
}

/// What a chroot that was made by hand has: a root that is no mount, on which the rest is mounted.
const CHROOT: &str = r#"
    set -e
    mount -t tmpfs none "$1" && mkdir "$1/root" && cd "$1/root"
    for dir in /*; do
        if [ -L "$dir" ]; then cp -P "$dir" .; continue; fi
        case $dir in /run | /proc | /sys | /dev | /etc | /usr | /lib* | /bin | /sbin) ;; *) continue ;; esac
        [ -d "$dir" ] && mkdir ".$dir" && mount --rbind "$dir" ".$dir"
    done
    mkdir program tmp && mount --bind "$(dirname "$2")" program
    lab="chroot . /program/$(basename "$2") lab --lab $3"
    trap '$lab down' EXIT
    $lab up --bare --hosts 2 >&2
    $lab exec h1 -- ping -c 1 -W 2 h2 >&2
    $lab exec h1 -- sh -c 'ls -d /program && mkdir /run/seen'
    # As an engine does it for a container.
    $lab exec h1 -- unshare -m sh -c 'mount --rbind /usr /usr && cd /usr && pivot_root . /usr/share && echo pivots'
"#;

#[test]
fn a_lab_works_in_a_chroot_whose_root_is_no_mount() {
    if !nix::unistd::geteuid().is_root() {
        // Whoever is in a chroot gets no user namespace.
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let name = bare(2).name;
    let output = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", CHROOT, "chroot"])
        .arg(dir.path())
        .args([PROGRAM, name.as_str()])
        .output()
        .unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("/program\n") && said.contains("pivots\n") && said.contains("is down"), "{said}");
    assert!(!Path::new("/run/seen").exists(), "nothing came out of it");
}

#[test]
fn a_lab_that_cannot_start_says_why_and_leaves_nothing() {
    let spec = LabSpec { program: "/bin/false".into(), ..bare(1) };
    let error = Lab::up(spec.clone()).unwrap_err().to_string();
    assert!(error.contains("does not start"), "{error}");
    assert!(!spec.dir.exists());
}

/// Not a test of its own: the process that the next one kills.
#[test]
fn a_caller_that_waits() {
    let Ok(name) = std::env::var("LAB_CALLER") else { return };
    let spec = LabSpec { dir: droveway::lab::default_dir(&name.parse().unwrap()), ..bare(1) };
    let spec = LabSpec { name: name.parse().unwrap(), ..spec };
    let _lab = Lab::up(spec).unwrap();
    println!("LAB UP");
    // Until it is killed, or the one that started it is gone.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
fn a_lab_ends_with_the_process_that_holds_it_even_if_that_is_killed() {
    let name = format!("held-{}", std::process::id());
    let dir = droveway::lab::default_dir(&name.parse().unwrap());
    let mut caller = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "lab_bare::a_caller_that_waits", "--nocapture"])
        .env("LAB_CALLER", &name)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(caller.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("LAB UP")));
    let inhabitants = inhabitants(&Lab::open(&dir).unwrap());
    caller.kill().unwrap();
    caller.wait().unwrap();
    until("all processes are gone", || gone(&inhabitants));
    until("its directory is gone", || !dir.exists());
}

/// What an agent was asked for.
struct Asked {
    line: String,
    body: String,
    /// How many threads the asker had meanwhile.
    threads: String,
}

/// An agent that gives every request the same answer, in the place of `host`'s; what was asked for comes out.
fn fake_agent(lab: &Lab, host: &str, answer: &'static str) -> mpsc::Receiver<Asked> {
    let socket = lab.agent_socket(host).unwrap();
    fs::create_dir_all(socket.parent().unwrap()).unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let (mut head, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                    length = value.trim().parse().unwrap();
                }
                if line.trim().is_empty() {
                    break;
                }
                head.push_str(&line);
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let mut stream = reader.into_inner();
            let asked = Asked {
                line: head.lines().next().unwrap().to_owned(),
                body: String::from_utf8(body).unwrap(),
                threads: threads_of(getsockopt(&stream, PeerCredentials).unwrap().pid()),
            };
            stream.write_all(answer.as_bytes()).unwrap();
            if tell.send(asked).is_err() {
                break;
            }
        }
    });
    told
}

fn threads_of(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("Threads:")).unwrap().trim().to_owned()
}

const ATTACHED: &str = concat!(
    "HTTP/1.1 200 OK\r\n\r\n",
    r#"{"endpoint":{"id":"e-aaaaaaaaaa","network":"n-aaaaaaaaaa","host":"h-aaaaaaaaaa","name":"web","#,
    r#""addresses":["10.42.7.2"],"mac":"02:00:00:00:00:07","kind":"socket","created":0},"#,
    r#""addresses":["10.42.7.2/16"],"gateway":"10.42.0.1","mtu":1450,"#,
    r#""resolv_conf":"nameserver 169.254.169.250\n"}"#
);
const REFUSED: &str = concat!(
    "HTTP/1.1 404 Not Found\r\n\r\n",
    r#"{"code":"not_found","message":"there is no network \"red\"; `droveway network create red`"}"#
);

#[test]
fn a_container_begins_once_it_is_attached_and_is_detached_when_it_is_killed() {
    let lab = Lab::up(bare(1)).unwrap();
    let asked = fake_agent(&lab, "h1", ATTACHED);
    let web =
        lab.run("h1", &RunSpec::new("web", &["sh", "-c", "echo begun; exec sleep 1000"]).unwrap()).unwrap();
    let Asked { line, body, threads } = asked.recv().unwrap();
    assert_eq!(line, "POST /v1/endpoints HTTP/1.1");
    assert!(body.contains(r#""name":"web""#) && body.contains("/ns/net"), "{body}");
    assert_eq!(threads, "1", "the kernel lets no process with several change its namespaces");
    assert_eq!(web.address(), Some("10.42.7.2".parse().unwrap()));

    let see = |words: &[&str]| lab.check(&web.path(), words).unwrap();
    assert_eq!(see(&["hostname"]), "web\n");
    assert_eq!(see(&["cat", "/etc/resolv.conf"]), "nameserver 169.254.169.250\n");
    assert!(see(&["cat", "/etc/hosts"]).contains("10.42.7.2 web"));
    assert_eq!(see(&["cat", "/proc/1/comm"]), "sleep\n");
    assert!(!see(&["ls", "/run"]).contains("droveway/"), "the host's /run is not the container's");
    assert!(!see(&["ip", "-o", "link"]).contains("eth0"), "its network namespace is its own");
    assert!(fs::read_link(format!("/proc/{}/ns/net", lab.pid_of("h1/web").unwrap())).is_ok());

    let again = lab.run("h1", &RunSpec::new("web", &["true"]).unwrap()).unwrap_err().to_string();
    assert!(again.contains("runs on this host already"), "{again}");
    lab.kill_container("h1", "web").unwrap();
    assert_eq!(asked.recv().unwrap().line, "DELETE /v1/endpoints/e-aaaaaaaaaa HTTP/1.1");
    assert!(lab.containers("h1").unwrap().is_empty());
    assert!(lab.exec("h1/web", &["true"]).unwrap_err().to_string().contains("no container"));
}

#[test]
fn a_container_that_the_agent_refuses_never_begins_and_leaves_nothing() {
    let lab = Lab::up(bare(1)).unwrap();
    let mark = lab.dir().join("mark");
    let run = RunSpec {
        network: "red".to_owned(),
        ..RunSpec::new("web", &["touch", mark.to_str().unwrap()]).unwrap()
    };
    let none = lab.run("h1", &run).unwrap_err().to_string();
    assert!(none.contains("no agent answers"), "{none}");
    let _asked = fake_agent(&lab, "h1", REFUSED);
    let error = lab.run("h1", &run).unwrap_err().to_string();
    assert!(error.contains("h1/web") && error.contains("droveway network create red"), "{error}");
    assert!(!mark.exists());
    assert!(!lab.exec("h1", &["pgrep", "-f", "lab-box"]).unwrap().status.success());
    assert_eq!(
        fs::read_dir(lab.dir().join("h1/run"))
            .unwrap()
            .filter(|e| is_json(&e.as_ref().unwrap().path()))
            .count(),
        0
    );
}

fn is_json(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

#[test]
fn a_program_that_is_not_there_is_an_error_and_is_detached() {
    let lab = Lab::up(bare(1)).unwrap();
    let asked = fake_agent(&lab, "h1", ATTACHED);
    let error = lab.run("h1", &RunSpec::new("web", &["/no/such"]).unwrap()).unwrap_err().to_string();
    assert!(error.contains("cannot run /no/such"), "{error}");
    assert!(asked.recv().unwrap().line.starts_with("POST"));
    assert!(asked.recv().unwrap().line.starts_with("DELETE"));
}

#[test]
fn a_container_in_the_foreground_has_our_streams_and_gives_its_status() {
    let lab = Lab::up(bare(1)).unwrap();
    let _asked = fake_agent(&lab, "h1", ATTACHED);
    let status = lab.run_foreground("h1", &RunSpec::new("fg", &["sh", "-c", "exit 9"]).unwrap()).unwrap();
    assert_eq!(status.code(), Some(9));
    assert!(lab.containers("h1").unwrap().is_empty());
}

#[test]
fn unknown_hosts_are_named_with_those_that_there_are() {
    let lab = Lab::up(bare(1)).unwrap();
    for error in [
        lab.exec("h9", &["true"]).map(drop).unwrap_err(),
        lab.cut("h1", "h9").unwrap_err(),
        lab.kill("h9").unwrap_err(),
        lab.start("h9").unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains("no host \"h9\"") && error.contains("h1, server"), "{error}");
    }
    assert!(lab.exec("h1/../h1", &["true"]).is_err());
    assert!(lab.cut("h1", "h1").is_err());
    assert!(lab.start("h1").unwrap_err().to_string().contains("powered on already"));
}

#[test]
fn an_engine_that_is_killed_leaves_no_container_cgroup_or_disk() {
    if !nix::unistd::geteuid().is_root() {
        // A Docker Engine needs root.
        return;
    }
    let lab = Lab::up(LabSpec { docker: true, ..bare(1) }).unwrap();
    let (name, dir) = (lab.spec().name.to_string(), lab.dir().to_owned());
    // An image of one file that needs nothing else.
    let script =
        "cd $(mktemp -d) && cp \"$(command -v busybox)\" busybox && tar c busybox | docker import - lab-test";
    lab.check("h1", &["sh", "-c", script]).unwrap();
    lab.check("h1", &["docker", "run", "-d", "--name", "c1", "lab-test", "/busybox", "sleep", "1000"])
        .unwrap();
    assert_eq!(lab.check("h1/c1", &["/busybox", "echo", "hello"]).unwrap(), "hello\n");
    let cgroups = || {
        let roots = fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path());
        roots
            .chain(["/sys/fs/cgroup".into()])
            .filter(|root| root.join("droveway-lab").join(&name).exists())
            .count()
    };
    assert!(cgroups() > 0);
    let inhabitants = inhabitants(&lab);
    lab.state().unwrap().init.unwrap().signal(Signal::SIGKILL).unwrap();
    until("all processes are gone", || gone(&inhabitants));
    lab.down().unwrap();
    assert_eq!(cgroups(), 0);
    assert!(!dir.exists());
    assert!(!Path::new("/var/lib/droveway-lab").join(&name).exists());
}

/// A user who may do nothing, with the program where that user can read it.
struct Anyone {
    uid: u32,
    home: PathBuf,
}

impl Anyone {
    fn lab(&self, words: &[&str]) -> Output {
        let program = self.home.join("droveway");
        let uid = self.uid;
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()]);
        command.arg(program).args(["lab", "--lab", "anyone"]).args(words);
        command.env_remove("XDG_RUNTIME_DIR").current_dir("/").output().unwrap()
    }
}

#[test]
fn anyone_can_have_a_lab_without_being_root() {
    if !nix::unistd::geteuid().is_root() {
        // Then every test here shows it.
        return;
    }
    let uid = 60_000 + std::process::id() % 5_000;
    let home = tempfile::tempdir().unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(PROGRAM, home.path().join("droveway")).unwrap();
    let anyone = Anyone { uid, home: home.path().to_owned() };
    let succeeds = |words: &[&str]| {
        let output = anyone.lab(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    succeeds(&["up", "--bare", "--hosts", "2"]);
    let dir = PathBuf::from(format!("/tmp/droveway-lab-{uid}/anyone"));
    let lab = Lab::open(&dir).unwrap();
    let inhabitants = inhabitants(&lab);
    assert_eq!(succeeds(&["exec", "h1", "--", "id", "-u"]), "0\n");
    succeeds(&["exec", "h1", "--", "ping", "-c", "1", "-W", "1", "h2"]);
    succeeds(&["cut", "h1", "h2"]);
    assert_eq!(anyone.lab(&["exec", "h1", "--", "ping", "-c", "1", "-W", "1", "h2"]).status.code(), Some(1));
    succeeds(&["heal"]);
    succeeds(&["loss", "h1", "h2", "0.5%"]);
    succeeds(&["kill", "h2"]);
    succeeds(&["start", "h2"]);
    assert!(succeeds(&["ls"]).contains("0.5% from h1"));
    let refused = anyone.lab(&["up", "--docker"]);
    assert!(String::from_utf8(refused.stderr).unwrap().contains("need root"));
    succeeds(&["down"]);
    assert!(gone(&inhabitants));
    assert!(!dir.exists());
    assert!(!dir.parent().unwrap().exists());
}
