//! Bad input: a clear error that says what to do, a documented exit code, and nothing changed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use droveway::lab::{Container, LabSpec};

use crate::probe;
use crate::support::{LIMIT, Look, idle, kernel, meet, says, spec, until};
use crate::watch::Watched;

/// One lab for all refusals: none may change it. It ends with this process.
struct Town {
    lab: Watched,
    near: Container,
}

static TOWN: LazyLock<Town> = LazyLock::new(|| {
    let agent_args = vec!["--label".into(), "town=1".into()];
    let lab = Watched::up(LabSpec { agent_args, ..spec(2) });
    crate::support::network_in_clear(&lab, "clear", "10.61.0.0/16");
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &near, &far);
    // One that nobody has attached.
    lab.check("h1", &["ip", "netns", "add", "spare"]).unwrap();
    until(LIMIT, "the server knows both", || {
        let text = says(&lab, "server", &["droveway", "endpoint", "ls"]);
        text.contains("near") && text.contains("far")
    });
    Town { lab, near }
});

/// One refusal at a time: each test looks at all there is before and after.
static TURN: Mutex<()> = Mutex::new(());

impl Town {
    /// All that must stay: what the server has, what the agents hold, what the kernel has.
    fn everything(&self) -> String {
        let lab = &self.lab;
        let mut text = String::new();
        for kind in ["network", "endpoint"] {
            text += &lab.check("server", &["droveway", kind, "ls", "-o", "json"]).unwrap();
        }
        text += &lab.check("server", &["droveway", "host", "ls", "-o", "json"]).unwrap();
        // When they were last seen is no state.
        let mut lines: Vec<String> =
            text.lines().filter(|line| !line.contains("\"seen\"")).map(str::to_owned).collect();
        for host in lab.hosts() {
            let status = lab.agent_status(&host).unwrap();
            // Not its revision: a heartbeat may tell of what others did before.
            lines.push(format!("{:?} {:?}", status.routers, status.troubles));
            lines.push(format!("{:?}", lab.endpoints(&host).unwrap()));
            lines.push(kernel(lab, &host, "managed"));
        }
        lines.join("\n")
    }

    #[track_caller]
    fn unchanged(&self, by: impl FnOnce()) {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.everything();
        by();
        assert_eq!(self.everything(), before);
        self.lab.unseen();
    }

    /// `droveway lab … words`, as a person types it.
    fn lab_verb(&self, words: &[&str]) -> (Option<i32>, String) {
        let mut command = std::process::Command::new(&self.lab.spec().program);
        let output =
            command.args(["lab", "--lab", self.lab.spec().name.as_str()]).args(words).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "", "{words:?}");
        (output.status.code(), text)
    }

    #[track_caller]
    fn refuses(&self, at: &str, words: &[&str], exit: i32, says: &[&str]) {
        let command: Vec<&str> = ["droveway"].iter().chain(words).copied().collect();
        let output = self.lab.exec(at, &command).unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        check(words, (output.status.code(), text), exit, says);
    }
}

#[track_caller]
fn check(words: &[&str], (code, text): (Option<i32>, String), exit: i32, says: &[&str]) {
    assert_eq!(code, Some(exit), "{words:?}: {text}");
    assert!(text.starts_with("error: "), "{words:?}: {text}");
    for part in says {
        assert!(text.contains(part), "{words:?} does not say {part:?}: {text}");
    }
    assert!(!text.contains("panicked") && !text.contains("unexpected error"), "{text}");
}

#[test]
fn a_server_whose_store_cannot_be_reached_or_is_half_described_ends_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (data, none) = (dir.path().join("data").display().to_string(), "/nonexistent/password");
    for (words, exit, says) in [
        (&["--store", "etcd://127.0.0.1:9,127.0.0.1:10"][..], 1, "127.0.0.1:10: Connection refused"),
        (&["--store", "etcd://drover:secret@127.0.0.1:9"], 2, "write etcd://HOST:PORT"),
        (&["--store", "http://127.0.0.1:9"], 2, "write etcd://HOST:PORT"),
        (&["--store", "etcd://127.0.0.1:9", "--store-user", "drover"], 2, "--store-password-file"),
        (
            &["--store", "etcd://127.0.0.1:9", "--store-user", "drover", "--store-password-file", none],
            1,
            "/nonexistent/password for etcd: No such file",
        ),
        (&["--store", "etcd://127.0.0.1:9", "--store-cert", none, "--store-key", none], 2, "--store-ca"),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_droveway"));
        command.args(["server", "--listen", "127.0.0.1:0", "--data-dir", &data]).args(words);
        let output = command.env("DROVEWAY_LOG", "off").output().unwrap();
        check(words, (output.status.code(), String::from_utf8(output.stderr).unwrap()), exit, &[says]);
    }
}

#[test]
fn a_network_that_cannot_be_is_refused_with_the_remedy() {
    let town = &*TOWN;
    town.unchanged(|| {
        for (subnet, exit, says) in [
            ("10.0.0.0/16", 4, &["overlaps route 10.0.0.0/24 dev eth0 on host h", "another --subnet"][..]),
            ("10.0.0.0/8", 4, &["overlaps", "another --subnet"]),
            ("10.60.0.0/28", 2, &["has room for 0 blocks", "larger --subnet"]),
            ("10.60.0.0/25", 2, &["at least 4", "--block-size"]),
            ("10.60.1.0/16", 2, &["did you mean 10.60.0.0/16"]),
            ("127.0.0.0/16", 2, &["loopback", "another --subnet"]),
            ("169.254.0.0/16", 2, &["link-local", "another --subnet"]),
            ("224.0.0.0/8", 2, &["multicast", "another --subnet"]),
            ("0.0.0.0/0", 2, &["another --subnet"]),
            ("fd00::/64", 2, &["IPv4"]),
            ("banana", 2, &["for example 10.43.0.0/16"]),
            ("10.60.0.0/33", 2, &["for example 10.43.0.0/16"]),
            ("10.60.0.0", 2, &["for example 10.60.0.0/16"]),
            ("", 2, &["--subnet"]),
        ] {
            town.refuses("server", &["network", "create", "red", "--subnet", subnet], exit, says);
        }
        let create = |more: &[&str], exit, says: &[&str]| {
            let words: Vec<&str> = ["network", "create"].iter().chain(more).copied().collect();
            town.refuses("server", &words, exit, says);
        };
        create(
            &["red", "--subnet", "10.60.0.0/16", "--driver", "vxlan", "--port", "4500"],
            2,
            &["UDP port 4500", "another --port"],
        );
        create(
            &["managed", "--subnet", "10.60.0.0/16"],
            4,
            &["\"managed\" is there already", "another name"],
        );
        create(&["Bad Name", "--subnet", "10.60.0.0/16"], 2, &["use 1 to 63 of"]);
        create(&[&"x".repeat(40), "--subnet", "10.60.0.0/16"], 2, &["shorter"]);
        create(&["red"], 2, &["--subnet"]);
        let clear = |vni| ["red", "--subnet", "10.60.0.0/16", "--driver", "vxlan", "--vni", vni];
        create(&clear("16777216"), 2, &["choose 1 to 16777215"]);
        create(&clear("1"), 4, &["VNI 1", "clear"]);
        create(&["red", "--subnet", "10.60.0.0/16", "--vni", "7"], 2, &["--driver vxlan"]);
        create(&["red", "--subnet", "10.60.0.0/16", "--driver", "gre"], 2, &["vxlan"]);
        create(&["red", "--subnet", "10.60.0.0/16", "--mtu", "100"], 2, &["576"]);
        create(&["red", "--subnet", "10.60.0.0/16", "--block-size", "31"], 2, &["--block-size"]);
    });
}

#[test]
fn what_is_not_there_or_is_in_use_is_not_removed() {
    let town = &*TOWN;
    town.unchanged(|| {
        for (kind, verb) in [
            ("network", "rm"),
            ("network", "inspect"),
            ("host", "rm"),
            ("host", "inspect"),
            ("endpoint", "inspect"),
            ("token", "rm"),
            ("key", "rm"),
        ] {
            let look = format!("droveway {kind} ls");
            town.refuses("server", &[kind, verb, "nosuch"], 3, &["there is no", "\"nosuch\"", &look]);
        }
        town.refuses(
            "server",
            &["network", "rm", "managed"],
            4,
            &["in use by 2 endpoints", "near (h1)", "far (h2)"],
        );
        town.refuses("server", &["network", "rm", "../hosts"], 3, &["there is no"]);
        town.refuses("server", &["no-such-verb"], 2, &["--help"]);
    });
}

#[test]
fn a_container_that_cannot_be_attached_is_refused_with_the_remedy() {
    let town = &*TOWN;
    let taken = town.near.ip().to_string();
    town.unchanged(|| {
        for (host, more, exit, says) in [
            (
                "h1",
                &["--network", "nosuch"][..],
                3,
                &["\"nosuch\" does not exist", "droveway network ls"][..],
            ),
            ("h1", &["--address", "10.99.0.1"], 2, &["not in the pool 10.42.0.0/16", "choose one that is"]),
            ("h1", &["--address", "10.42.0.0"], 2, &["network's, broadcast or gateway", "choose another"]),
            ("h1", &["--address", "10.42.0.1"], 2, &["gateway", "choose another"]),
            ("h1", &["--address", "10.42.255.255"], 2, &["broadcast", "choose another"]),
            ("h1", &["--address", &taken], 4, &["in use by container near", "choose another"]),
            (
                "h2",
                &["--address", &taken],
                4,
                &["taken by endpoint near on host h1", "choose one from 10.42.0.2"],
            ),
            ("h1", &["--address", "banana"], 2, &["--address"]),
            ("h1", &["--address", "fd00::1"], 2, &["not in the pool", "choose one that is"]),
        ] {
            let words = [&["run", host, "--name", "x"][..], more, &["--", "true"]].concat();
            check(&words, town.lab_verb(&words), exit, says);
        }
        let run = |host, name| ["run", host, "--name", name, "--", "true"];
        check(&["name"], town.lab_verb(&run("h1", "near")), 4, &["\"near\"", "another --name"]);
        check(&["name"], town.lab_verb(&run("h1", "Bad!Name")), 2, &["use 1 to 63 of"]);
        check(&["host"], town.lab_verb(&run("h9", "x")), 3, &["no host \"h9\"", "h1, h2"]);
    });
}

#[test]
fn a_host_that_may_not_join_is_refused_with_the_remedy() {
    let town = &*TOWN;
    let text = town.lab.check("server", &["droveway", "token", "create", "-o", "json"]).unwrap();
    let token: serde_json::Value = serde_json::from_str(&text).unwrap();
    let token = token["token"].as_str().unwrap().to_owned();
    let parts: Vec<&str> = token.split('.').collect();
    let state = town.lab.dir().join("nobody").display().to_string();
    let join = |name: &str, token: &str, exit: i32, says: &[&str]| {
        let url = "https://10.0.0.2:7443";
        let words = [
            "agent",
            "--server",
            url,
            "--token",
            token,
            "--name",
            name,
            "--state-dir",
            &state,
            "--socket",
            "/run/none.sock",
        ];
        town.refuses("server", &words, exit, says);
    };
    town.unchanged(|| {
        join("h1", &token, 4, &["host \"h1\" is there already", "another --name", "droveway host rm h1"]);
        let other_ca = format!("{}.{}.{}.{}", parts[0], parts[1], parts[2], "ab".repeat(32));
        join("h3", &other_ca, 5, &[&"ab".repeat(32), parts[3], "check --server", "new token"]);
        let guessed = format!("{}.{}.{}.{}", parts[0], parts[1], "A".repeat(parts[2].len()), parts[3]);
        join("h3", &guessed, 5, &["token is not valid", "droveway token create"]);
        join("h3", "dwj1.nonsense", 2, &["dwj1.ID.SECRET.FINGERPRINT", "droveway token create"]);
        join("bad name", &token, 2, &["use 1 to 63 of"]);
    });
}

/// One request over a socket; the status and the body of the answer, if there is one.
fn ask(socket: &Path, bytes: &[u8]) -> Option<(u16, String)> {
    exchange(socket, bytes, false)
}

/// What is no request and ends in the middle: an answer is no must, a welcome would be wrong.
fn babble(socket: &Path, bytes: &[u8]) {
    if let Some((status, body)) = exchange(socket, bytes, true) {
        assert!((400..500).contains(&status), "{status} {body}");
    }
}

fn exchange(socket: &Path, bytes: &[u8], end: bool) -> Option<(u16, String)> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // It may refuse before it has read all.
    let _ = stream.write_all(bytes);
    if end {
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    Some((status, body))
}

fn request(method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn is_refusal((status, body): &(u16, String), among: std::ops::RangeInclusive<u16>) {
    assert!(among.contains(status), "{status} {body}");
    let error: model::api::ApiError =
        serde_json::from_str(body).unwrap_or_else(|_| panic!("{status} {body:?}"));
    assert!(error.message.len() > 10, "{error:?}");
}

#[test]
fn the_agents_socket_refuses_garbage_and_goes_on() {
    let town = &*TOWN;
    let socket = town.lab.agent_socket("h1").unwrap();
    let attach = |body: &str| ask(&socket, &request("POST", "/v1/endpoints", body.as_bytes())).unwrap();
    town.unchanged(|| {
        for bytes in [
            &b"\x00\xff\xfe\x16\x03\x01"[..],
            &[b'A'; 100_000],
            b"GET",
            b"POST /v1/endpoints HTTP/1.1\r\nContent-Length: 99999\r\n\r\n{}",
        ] {
            babble(&socket, bytes);
        }
        for body in [
            "",
            "{",
            "null",
            "[]",
            "{}",
            "\"x\"",
            r#"{"network":"managed"}"#,
            r#"{"network":"managed","netns":"/run/netns/spare","surprise":1}"#,
            r#"{"network":7,"netns":"/run/netns/spare"}"#,
            r#"{"network":"managed","netns":"/run/netns/spare","address":"10.42"}"#,
            r#"{"network":"managed","netns":"/run/netns/spare","name":"Bad Name"}"#,
            &"[".repeat(100_000),
        ] {
            is_refusal(&attach(body), 400..=422);
        }
        for (what, body) in [
            ("no such network", r#"{"network":"nosuch","netns":"/run/netns/spare"}"#),
            ("no such namespace", r#"{"network":"managed","netns":"/no/such"}"#),
            ("a file that is none", r#"{"network":"managed","netns":"/etc/passwd"}"#),
            ("another kind of namespace", r#"{"network":"managed","netns":"/proc/1/ns/uts"}"#),
            (
                "a name that is too long",
                r#"{"network":"managed","netns":"/run/netns/spare","ifname":"eth0123456789abcdef"}"#,
            ),
            ("a path for a name", r#"{"network":"managed","netns":"/run/netns/spare","ifname":"../x"}"#),
            ("no name", r#"{"network":"managed","netns":"/run/netns/spare","ifname":""}"#),
            ("one that is there", r#"{"network":"managed","netns":"/run/netns/spare","ifname":"lo"}"#),
            ("the gateway", r#"{"network":"managed","netns":"/run/netns/spare","address":"10.42.0.1"}"#),
        ] {
            let answer = attach(body);
            println!("{what}: {answer:?}");
            is_refusal(&answer, 400..=499);
        }
        for (netns, whose) in [
            ("/proc/1/ns/net", "this host's own network namespace"),
            ("/run/netns/droveway-managed", "a router of Droveway"),
        ] {
            let (status, text) = attach(&format!(r#"{{"network":"managed","netns":"{netns}"}}"#));
            assert_eq!(status, 400, "{text}");
            assert!(
                text.contains(netns) && text.contains(whose) && text.contains("attach a container's"),
                "{text}"
            );
        }
        // What the server would not keep, too many of anything: refused here, before anything is made.
        let names: Vec<String> = (0..65).map(|i| format!("\"name-{i}\"")).collect();
        let labels: Vec<String> = (0..257).map(|i| format!("\"label-{i}\":\"\"")).collect();
        for (what, many) in [
            ("65 aliases; at most 64", format!("\"aliases\":[{}]", names.join(","))),
            ("257 labels; at most 256", format!("\"labels\":{{{}}}", labels.join(","))),
        ] {
            let (status, text) =
                attach(&format!(r#"{{"network":"managed","netns":"/run/netns/spare",{many}}}"#));
            assert!(status == 400 && text.contains(what), "{status} {text}");
        }
        let large = format!(r#"{{"network":"{}"}}"#, "x".repeat(300 << 10));
        is_refusal(&attach(&large), 413..=413);
        is_refusal(&ask(&socket, &request("DELETE", "/v1/endpoints/e-nosuch", b"")).unwrap(), 400..=404);
        is_refusal(&ask(&socket, &request("GET", "/v1/nothing", b"")).unwrap(), 404..=404);
        is_refusal(&ask(&socket, &request("PUT", "/v1/status", b"")).unwrap(), 400..=405);
        assert_eq!(ask(&socket, &request("GET", "/v1/status", b"")).unwrap().0, 200);
    });
}

#[test]
fn the_docker_plugins_socket_refuses_garbage_and_goes_on() {
    let town = &*TOWN;
    let init = town.lab.pid_of("h1").unwrap();
    let socket = Path::new("/proc").join(init.to_string()).join("root/run/docker/plugins/droveway.sock");
    let verbs = [
        "IpamDriver.RequestPool",
        "IpamDriver.RequestAddress",
        "IpamDriver.ReleaseAddress",
        "NetworkDriver.CreateNetwork",
        "NetworkDriver.DeleteNetwork",
        "NetworkDriver.CreateEndpoint",
        "NetworkDriver.EndpointOperInfo",
        "NetworkDriver.DeleteEndpoint",
        "NetworkDriver.Join",
        "NetworkDriver.ProgramExternalConnectivity",
    ];
    town.unchanged(|| {
        for bytes in [&b"\x00\xff\xfe\x16\x03\x01"[..], &[b'A'; 100_000], b"POST"] {
            babble(&socket, bytes);
        }
        let post =
            |verb: &str, body: &[u8]| ask(&socket, &request("POST", &format!("/{verb}"), body)).unwrap();
        for verb in verbs {
            for body in [&b""[..], b"{", b"null", b"[]", b"7", &[0xff; 64], &[b'['; 50_000]] {
                let (status, text) = post(verb, body);
                let error: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert!(error["Err"].as_str().is_some_and(|why| why.len() > 10), "{verb}: {status} {text}");
            }
            let (status, text) = post(verb, &[b' '; 100 << 10]);
            assert!(status == 413 && text.contains("larger than"), "{verb}, oversized: {status} {text}");
        }
        for (verb, body) in [
            ("IpamDriver.RequestPool", r#"{"AddressSpace":"x","Pool":"10.9.0.0/16"}"#),
            ("IpamDriver.RequestAddress", r#"{"PoolID":"nosuch","Address":""}"#),
            (
                "NetworkDriver.CreateEndpoint",
                r#"{"NetworkID":"nosuch","EndpointID":"e","Interface":{"Address":"10.42.0.9/16"}}"#,
            ),
            ("NetworkDriver.Join", r#"{"NetworkID":"nosuch","EndpointID":"nosuch","SandboxKey":"/no/such"}"#),
        ] {
            let (status, text) = post(verb, body.as_bytes());
            let error: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert!(error["Err"].as_str().is_some_and(|why| why.len() > 10), "{verb}: {status} {text}");
        }
        let (status, text) = post("Plugin.Activate", b"");
        assert!(status == 200 && text.contains("NetworkDriver") && text.contains("IpamDriver"), "{text}");
    });
}

#[test]
fn the_api_refuses_garbage_oversized_bodies_and_strangers_and_goes_on() {
    let town = &*TOWN;
    let data = town.lab.dir().join("server/data");
    town.unchanged(|| probe::abuse_api(&town.lab, "server", &data));
}
