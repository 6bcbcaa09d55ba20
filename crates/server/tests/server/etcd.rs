//! A real etcd on a loopback address of its own. Included by the tests of the store, too.
#![allow(dead_code, reason = "each of the two uses its part")]

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use server::{EtcdConfig, EtcdUrl};
use tempfile::TempDir;

const CLIENT: u16 = 2379;
const PEER: u16 = 2380;
/// How long etcd may take to answer on a busy machine.
const START: Duration = Duration::from_secs(60);

/// An etcd of some members; they end with it.
pub struct Etcd {
    pub members: Vec<Member>,
    dir: TempDir,
}

/// One member.
pub struct Member {
    pub address: IpAddr,
    name: String,
    cluster: String,
    extra: Vec<String>,
    process: Option<Child>,
}

impl Etcd {
    /// Starts one of so many members, and waits until all answer.
    pub fn start(members: usize) -> Self {
        Self::start_with(members, &[])
    }

    /// The same with options.
    pub fn start_with(members: usize, extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Nobody else is on such an address, so the ports are free.
        let addresses: Vec<IpAddr> = (0..members)
            .map(|_| {
                let [a, b, c, ..] = RandomState::new().build_hasher().finish().to_be_bytes();
                Ipv4Addr::new(127, a | 1, b, c.clamp(1, 254)).into()
            })
            .collect();
        let name = |n: usize| format!("m{n}");
        let peers: Vec<String> = addresses
            .iter()
            .enumerate()
            .map(|(n, address)| format!("{}=http://{address}:{PEER}", name(n)))
            .collect();
        let members = addresses.iter().enumerate().map(|(n, &address)| Member {
            address,
            name: name(n),
            cluster: peers.join(","),
            extra: extra.iter().map(|&word| word.to_owned()).collect(),
            process: None,
        });
        let mut etcd = Self { members: members.collect(), dir };
        for n in 0..etcd.members.len() {
            etcd.start_member(n);
        }
        for member in &etcd.members {
            member.wait();
        }
        etcd
    }

    /// Starts a member that does not run.
    pub fn start_member(&mut self, n: usize) {
        let log = std::fs::File::create(self.dir.path().join(format!("{n}.log"))).unwrap();
        let member = &mut self.members[n];
        let (client, peer) =
            (format!("http://{}:{CLIENT}", member.address), format!("http://{}:{PEER}", member.address));
        let mut command = Command::new("etcd");
        command
            .args(["--name", &member.name, "--data-dir"])
            .arg(self.dir.path().join(&member.name))
            .args(["--initial-cluster", &member.cluster])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args([
                "--heartbeat-interval=50",
                "--election-timeout=500",
                "--max-txn-ops=10000",
                "--unsafe-no-fsync",
            ]);
        if !member.extra.iter().any(|word| word.starts_with("--listen-client-urls")) {
            command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        }
        command.args(&member.extra).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process =
            command.spawn().expect("etcd cannot be started; `scripts/deps.sh test` installs etcd-server");
        member.process = Some(process);
    }

    /// Kills a member: nothing of it says goodbye.
    pub fn kill(&mut self, n: usize) {
        self.members[n].kill();
    }

    /// Its members, and the prefix, as a server is told of them.
    pub fn config(&self, prefix: &str) -> EtcdConfig {
        let members: Vec<String> =
            self.members.iter().map(|member| format!("{}:{CLIENT}", member.address)).collect();
        let url: EtcdUrl = format!("etcd://{}{prefix}", members.join(",")).parse().unwrap();
        EtcdConfig { url, ca: None, certificate: None, key: None, user: None, password_file: None }
    }

    /// A verb of etcd's gateway, at one member.
    pub async fn ask(&self, n: usize, path: &str, body: serde_json::Value) -> serde_json::Value {
        let url = format!("http://{}:{CLIENT}{path}", self.members[n].address);
        let client =
            reqwest::Client::builder().no_proxy().tls_backend_preconfigured(plain()).build().unwrap();
        client.post(url).json(&body).send().await.unwrap().json().await.unwrap()
    }
}

/// No TLS is spoken with it; reqwest wants to be told how it would be.
fn plain() -> rustls::ClientConfig {
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth()
}

impl Member {
    fn wait(&self) {
        let begun = Instant::now();
        while TcpStream::connect_timeout(&SocketAddr::new(self.address, CLIENT), Duration::from_secs(1))
            .is_err()
        {
            assert!(begun.elapsed() < START, "etcd at {} does not answer", self.address);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            drop(process.kill());
            drop(process.wait());
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}
