//! A real etcd on a loopback address of its own. Included by the tests of the store, too.
#![allow(dead_code, reason = "each of the two uses its part")]

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
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
    /// Whether it speaks TLS, wants certificates of its clients, and knows users.
    secure: bool,
}

/// A user who may do all under a prefix, and the password.
pub const USER: &str = "drover";
pub const PASSWORD: &str = "a-dog-and-a-stick";

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
        Self::start_as(members, extra, false)
    }

    /// One member with TLS that wants certificates of its clients, and with a user who may do all under `prefix`. A session
    /// that is not used ends within two seconds.
    pub async fn start_secure(prefix: &str) -> Self {
        let etcd = Self::start_as(1, &["--auth-token-ttl=1", "--bcrypt-cost=4"], true);
        let ask = async |path: &str, body| {
            let answer = etcd.ask(0, path, body).await;
            assert!(answer["error"].is_null(), "{path}: {answer}");
        };
        for user in [USER, "root", "stranger"] {
            ask("/v3/auth/user/add", json!({ "name": user, "password": PASSWORD })).await;
        }
        let base64 = |text: &str| base64::prelude::BASE64_STANDARD.encode(text);
        let end = format!("{}0", prefix.trim_end_matches('/'));
        let all = json!({ "permType": "READWRITE", "key": base64(prefix), "range_end": base64(&end) });
        for (role, user) in [("root", "root"), ("droveway", USER)] {
            ask("/v3/auth/role/add", json!({ "name": role })).await;
            ask("/v3/auth/user/grant", json!({ "user": user, "role": role })).await;
        }
        ask("/v3/auth/role/grant", json!({ "name": "droveway", "perm": all })).await;
        ask("/v3/auth/enable", json!({})).await;
        etcd
    }

    fn start_as(members: usize, extra: &[&str], secure: bool) -> Self {
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
        let mut etcd = Self { members: members.collect(), dir, secure };
        if secure {
            etcd.make_certificates();
        }
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
        let (client, peer) = (self.url(n), format!("http://{}:{PEER}", self.members[n].address));
        let member = &mut self.members[n];
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
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        if self.secure {
            for (option, file) in
                [("cert-file", "member.pem"), ("key-file", "member.key"), ("trusted-ca-file", "ca.pem")]
            {
                command.arg(format!("--{option}")).arg(self.dir.path().join(file));
            }
            command.arg("--client-cert-auth");
        }
        command.args(&member.extra).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = command
            .spawn()
            .map_err(|error| format!("{error}; `scripts/deps.sh test` installs etcd-server"))
            .unwrap();
        member.process = Some(process);
    }

    /// Kills a member: nothing of it says goodbye.
    pub fn kill(&mut self, n: usize) {
        self.members[n].kill();
    }

    /// Lets a member hang, or go on: its connections stay.
    pub fn hang(&self, n: usize, hang: bool) {
        let process = self.members[n].process.as_ref().unwrap();
        let signal = if hang { Signal::SIGSTOP } else { Signal::SIGCONT };
        kill(Pid::from_raw(process.id().cast_signed()), signal).unwrap();
    }

    /// Kills a member and starts it again.
    pub fn restart(&mut self, n: usize) {
        self.kill(n);
        self.start_member(n);
        self.members[n].wait();
    }

    /// What a member holds now, to be put back later. It is started again.
    pub fn save(&mut self, n: usize) -> PathBuf {
        self.kill(n);
        let saved = self.file("saved");
        copy(&self.file(&self.members[n].name), &saved);
        self.restart(n);
        saved
    }

    /// Starts a member again with what it held before.
    pub fn put_back(&mut self, n: usize, saved: &Path) {
        self.kill(n);
        let directory = self.file(&self.members[n].name);
        std::fs::remove_dir_all(&directory).unwrap();
        copy(saved, &directory);
        self.restart(n);
    }

    /// Its members, and the prefix, as a server is told of them.
    pub fn config(&self, prefix: &str) -> EtcdConfig {
        let members: Vec<String> =
            self.members.iter().map(|member| format!("{}:{CLIENT}", member.address)).collect();
        let url: EtcdUrl = format!("etcd://{}{prefix}", members.join(",")).parse().unwrap();
        let file = |name: &str| self.secure.then(|| self.file(name));
        EtcdConfig {
            url,
            ca: file("ca.pem"),
            certificate: file("client.pem"),
            key: file("client.key"),
            user: self.secure.then(|| USER.to_owned()),
            password_file: file("password"),
        }
    }

    /// A file of one that is secure: certificates, keys, and the password. Those of another CA begin with `other-`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn url(&self, n: usize) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}:{CLIENT}", self.members[n].address)
    }

    /// etcd's gateway is a client of the member that it is in: its certificate has to be good for both.
    fn make_certificates(&self) {
        use rcgen::{
            BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
        };
        for before in ["", "other-"] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let ca = params.self_signed(&key).unwrap();
            std::fs::write(self.file(&format!("{before}ca.pem")), ca.pem()).unwrap();
            let issuer = Issuer::new(params, key);
            for name in ["member", "client", "named"] {
                let key = KeyPair::generate().unwrap();
                let mut params = CertificateParams::default();
                if name == "client" {
                    // By its gateway, etcd takes no name of a client for a user, and refuses it.
                    params.distinguished_name = rcgen::DistinguishedName::new();
                }
                params.subject_alt_names =
                    self.members.iter().map(|member| SanType::IpAddress(member.address)).collect();
                params.extended_key_usages =
                    vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
                let certificate = params.signed_by(&key, &issuer).unwrap();
                std::fs::write(self.file(&format!("{before}{name}.pem")), certificate.pem()).unwrap();
                std::fs::write(self.file(&format!("{before}{name}.key")), key.serialize_pem()).unwrap();
            }
        }
        std::fs::write(self.file("password"), format!("{PASSWORD}\n")).unwrap();
        std::fs::write(self.file("other-password"), "guessed\n").unwrap();
    }

    /// A verb of etcd's gateway, at one member.
    pub async fn ask(&self, n: usize, path: &str, body: Value) -> Value {
        self.ask_with("", n, path, body).await
    }

    /// The same in a session.
    pub async fn ask_with(&self, session: &str, n: usize, path: &str, body: Value) -> Value {
        let client =
            reqwest::Client::builder().no_proxy().tls_backend_preconfigured(self.tls()).build().unwrap();
        let mut request = client.post(format!("{}{path}", self.url(n)));
        if !session.is_empty() {
            request = request.header("Authorization", session);
        }
        request.json(&body).send().await.unwrap().json().await.unwrap()
    }

    /// Where no TLS is spoken, reqwest wants to be told all the same how it would be.
    fn tls(&self) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        if self.secure {
            roots.add(CertificateDer::from_pem_file(self.file("ca.pem")).unwrap()).unwrap();
        }
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        if !self.secure {
            return builder.with_no_client_auth();
        }
        let certificate = CertificateDer::from_pem_file(self.file("client.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.file("client.key")).unwrap();
        builder.with_client_auth_cert(vec![certificate], key).unwrap()
    }
}

/// A directory with all that is in it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    std::fs::set_permissions(to, std::fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
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
