//! The server killed at any moment of its transactions: what it answered is there, nothing is half done, and each change
//! has its line in the audit log.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent::control::Lessor;
use agent::server::{Join, Server, join};
use droveway::client::{Client, Settings};
use model::api::{AuditEntry, ErrorCode, TokenRequest};
use model::{Block, Endpoint, EndpointId, EndpointKind, EnvironmentId, Mac, NetworkId, Object, Watch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const KILLS: usize = 50;
const HOSTS: usize = 4;

struct Process {
    child: Child,
    data: PathBuf,
    port: u16,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Process {
    fn start(data: &Path, port: u16) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_droveway"))
            .args(["server", "--listen", &format!("127.0.0.1:{port}"), "--data-dir"])
            .arg(data)
            .env("DROVEWAY_LOG", "warn")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, data: data.to_owned(), port }
    }

    /// `SIGKILL`: it finishes nothing.
    fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// `SIGTERM`: it finishes what it does.
    fn stop(&mut self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }

    async fn client(&mut self) -> Client {
        let settings = Settings {
            server: format!("https://127.0.0.1:{}", self.port).parse().unwrap(),
            key_file: self.data.join("admin.key"),
            ca_file: self.data.join("ca.pem"),
            environment: EnvironmentId::default(),
        };
        let begun = Instant::now();
        loop {
            if let Ok(client) = Client::open(settings.clone())
                && client.info().await.is_ok()
            {
                return client;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "the server does not come back");
            assert!(self.child.try_wait().unwrap().is_none(), "the server does not start");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A host that always changes something, and what it was answered.
struct Host {
    server: Server,
    network: NetworkId,
    blocks: Vec<Block>,
    /// Endpoints that are there, or are not, as the server answered; one that it did not answer for is not in it.
    known: BTreeMap<EndpointId, bool>,
    random: u32,
}

impl Host {
    async fn join(url: &str, token: &str, n: usize) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let identity = join(Join {
            key: &key,
            url,
            token: &token.parse().unwrap(),
            environment: &EnvironmentId::default(),
            name: &format!("h{n}").parse().unwrap(),
            candidates: Vec::new(),
            labels: BTreeMap::new(),
            routes: Vec::new(),
        })
        .await
        .unwrap();
        let server = Server::of(&identity, &[]).unwrap();
        let Watch::Snapshot { objects, .. } = server.watch(None).await.unwrap().next().await.unwrap() else {
            panic!("no snapshot")
        };
        let network = objects.into_iter().find_map(|object| match object {
            Object::Network(network) => Some(network.id),
            _ => None,
        });
        Self {
            server,
            network: network.unwrap(),
            blocks: Vec::new(),
            known: BTreeMap::new(),
            random: n as u32 + 1,
        }
    }

    fn random(&mut self, below: u32) -> u32 {
        self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.random >> 16) % below
    }

    async fn storm(mut self, stop: Arc<AtomicBool>) -> Self {
        while !stop.load(Ordering::Relaxed) {
            if let Err(error) = self.step().await {
                assert_eq!(error.code, ErrorCode::Unavailable, "only being away is an excuse: {error}");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        self
    }

    async fn step(&mut self) -> Result<(), model::api::ApiError> {
        if self.blocks.is_empty() || (self.blocks.len() < 20 && self.random(8) == 0) {
            let block = self.server.lease(self.network.clone(), self.blocks.len()).await?;
            assert!(self.blocks.iter().all(|held| held.cidr != block.cidr), "{} twice", block.cidr);
            self.blocks.push(block);
            return Ok(());
        }
        let at = self.random(self.blocks.len() as u32) as usize;
        let block = self.blocks[at].clone();
        let n = 2 + self.random(50);
        let endpoint = endpoint(&block, n);
        // Until it is answered, either is possible.
        let before = self.known.remove(&endpoint.id);
        if before == Some(true) && self.random(2) == 0 {
            self.server.delete_endpoint(&endpoint.id).await?;
            self.known.insert(endpoint.id, false);
        } else {
            self.server.put_endpoint(&endpoint).await?;
            self.known.insert(endpoint.id, true);
        }
        Ok(())
    }
}

fn endpoint(block: &Block, n: u32) -> Endpoint {
    let std::net::IpAddr::V4(base) = block.cidr.network() else { panic!("not IPv4") };
    let address = Ipv4Addr::from(u32::from(base) + n);
    let mut id = [0; 8];
    id[..4].copy_from_slice(&address.octets());
    Endpoint {
        id: EndpointId::from_random(id),
        network: block.network.clone(),
        host: block.host.clone(),
        name: None,
        stack: None,
        service: None,
        aliases: Vec::new(),
        addresses: vec![address.into()],
        mac: Mac::from_random([0, 1, 2, 3, 4, 5]),
        kind: EndpointKind::Socket,
        container: None,
        labels: BTreeMap::new(),
        ports: Vec::new(),
        healthy: true,
        created: 1,
    }
}

#[test]
fn a_server_killed_at_fifty_moments_of_its_transactions_loses_nothing_it_answered_and_leaves_nothing_half_done()
 {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let mut process = Process::start(&data, port);
        let client = process.client().await;
        let token = client.create_token(&TokenRequest { uses: None, ttl_seconds: None }).await.unwrap().token;
        let stop = Arc::new(AtomicBool::new(false));
        let mut storms = Vec::new();
        for n in 0..HOSTS {
            let host = Host::join(&format!("https://127.0.0.1:{port}"), &token, n).await;
            storms.push(tokio::spawn(host.storm(stop.clone())));
        }
        let epoch = client.info().await.unwrap().epoch;
        let mut revision = model::Revision::default();
        let mut seed = std::process::id();
        for _ in 0..KILLS {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            tokio::time::sleep(Duration::from_millis(u64::from(seed >> 16) % 60)).await;
            process.kill();
            process = Process::start(&data, port);
            let info = process.client().await.info().await.unwrap();
            assert_eq!(info.epoch, epoch);
            assert!(info.revision >= revision, "the store went back");
            revision = info.revision;
        }
        stop.store(true, Ordering::Relaxed);
        let mut hosts = Vec::new();
        for storm in storms {
            hosts.push(storm.await.unwrap());
        }
        let client = process.client().await;
        let blocks = client.blocks().await.unwrap();
        let endpoints = client.endpoints().await.unwrap();
        let there: BTreeSet<&EndpointId> = endpoints.iter().map(|endpoint| &endpoint.id).collect();
        let mut answered = 0;
        for host in &hosts {
            for held in &host.blocks {
                assert!(blocks.contains(held), "{held:?} was leased and is lost");
            }
            for (id, known) in &host.known {
                assert_eq!(there.contains(id), *known, "{id}");
            }
            answered += host.known.len();
        }
        assert!(answered > 20, "{answered} answers are too few to show anything");
        for endpoint in &endpoints {
            let inside = |block: &&Block| {
                block.host == endpoint.host
                    && endpoint.addresses.iter().all(|address| block.cidr.contains(address))
            };
            assert!(blocks.iter().any(|block| inside(&block)), "{} has no block", endpoint.id);
        }
        process.stop();
        each_change_has_one_line(&data);
    });
}

/// By the store's own account of what changed.
fn each_change_has_one_line(data: &Path) {
    let store = rusqlite::Connection::open(data.join("store.sqlite")).unwrap();
    let mut log = store.prepare("SELECT revision, group_concat(key) FROM log GROUP BY revision").unwrap();
    let changes = log.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))).unwrap();
    // What a first start makes nobody asked for, nor what a server notes of who was there.
    let own = |keys: &str| ["/environment", "/keys/admin", "/presence/"].iter().any(|key| keys.contains(key));
    let asked: BTreeSet<u64> =
        changes.map(Result::unwrap).filter(|(_, keys)| !own(keys)).map(|(at, _)| at.unsigned_abs()).collect();
    let text = std::fs::read_to_string(data.join("audit.jsonl")).unwrap();
    let lines: Vec<AuditEntry> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.windows(2).all(|pair| pair[1].number == pair[0].number + 1), "numbers have gaps");
    let written: Vec<u64> = lines.iter().filter_map(|line| Some(line.revision?.0)).collect();
    let once: BTreeSet<u64> = written.iter().copied().collect();
    assert_eq!(once.len(), written.len(), "a change has two lines");
    assert_eq!(once, asked, "missing: {:?}, too much: {:?}", &asked - &once, &once - &asked);
}
