//! Many agents on one server: the agent's own client, without a kernel. How long a change takes until all have seen it,
//! what it costs the server, and how long it takes until all are back when the server was killed. Server and agents are on
//! this machine, and share its cores.

#![expect(clippy::cast_precision_loss, reason = "figures for people: counts and bytes far below 2^52")]

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use agent::Identity;
use agent::control::Lessor;
use agent::server::{Join, Server, WatchStream, join};
use anyhow::{Context, Result, ensure};
use droveway::client::{Client, Settings};
use model::api::{ApiError, ErrorCode, TokenRequest};
use model::{
    Block, Change, Endpoint, EndpointId, EndpointKind, EnvironmentId, Epoch, Mac, NetworkSpec, Object,
    Revision, Watch,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::task::JoinSet;

use crate::figures::{Report, Samples};

/// Changes a second.
const RATE: u64 = 100;
/// How many endpoints a host may have: each change is one of its own, so that none is told together with a later one.
const ADDRESSES: usize = 60;
/// How often an agent asks again before it is given up.
const TRIES: u64 = 10;
/// How often agents asked again.
static AGAIN: AtomicU64 = AtomicU64::new(0);
/// How many join at a time.
const JOINING: usize = 32;
/// How long all may take for one step.
const LIMIT: Duration = Duration::from_secs(300);

struct Process {
    program: PathBuf,
    child: Child,
    // Removed after the process has ended.
    dir: tempfile::TempDir,
    port: u16,
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Process {
    fn start(program: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let child = spawn(program, dir.path(), port)?;
        Ok(Self { program: program.to_owned(), child, dir, port })
    }

    /// Kills it, and starts it anew with what is on its disk.
    fn restart(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(&self.program, self.dir.path(), self.port)?;
        Ok(())
    }

    fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    async fn client(&self) -> Result<Client> {
        let data = self.dir.path().join("data");
        let settings = Settings {
            server: self.url().parse()?,
            key_file: data.join("admin.key"),
            ca_file: data.join("ca.pem"),
            environment: EnvironmentId::default(),
        };
        let begun = Instant::now();
        loop {
            if let Ok(client) = Client::open(settings.clone())
                && client.info().await.is_ok()
            {
                return Ok(client);
            }
            ensure!(begun.elapsed() < LIMIT, "the server does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// CPU seconds used so far.
    fn cpu(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("no stat")?.1.split_whitespace().collect();
        let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(ticks / 100.0)
    }

    /// Resident memory and its peak, MiB.
    fn memory(&self) -> Result<(f64, f64)> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
            line.split_whitespace().next().unwrap_or("0").parse::<f64>().unwrap_or(0.0) / 1024.0
        };
        Ok((of("VmRSS:"), of("VmHWM:")))
    }
}

fn spawn(program: &Path, dir: &Path, port: u16) -> Result<Child> {
    let mut command = Command::new(program);
    command.args(["server", "--listen", &format!("127.0.0.1:{port}"), "--data-dir"]).arg(dir.join("data"));
    Ok(command.env("DROVEWAY_LOG", "warn").stdout(Stdio::null()).spawn()?)
}

/// What all agents saw.
struct Seen {
    begun: Instant,
    /// When each change was sent, microseconds.
    sent: Vec<AtomicU64>,
    /// How many agents saw it, and when the last of them did.
    seen: Vec<(AtomicUsize, AtomicU64)>,
    messages: AtomicU64,
    bytes: AtomicU64,
}

/// One agent of many.
struct Agent {
    identity: Identity,
    server: Server,
    block: Block,
    stream: Option<WatchStream>,
    at: Option<(Epoch, Revision)>,
}

pub fn measure(program: &Path, count: usize, seconds: u64, report: &mut Report) -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(agents(program, count, seconds, report))
}

async fn agents(program: &Path, count: usize, seconds: u64, report: &mut Report) -> Result<()> {
    let mut process = Process::start(program)?;
    let admin = process.client().await?;
    ensure!(RATE * seconds <= (count * ADDRESSES) as u64, "{count} hosts have too few addresses");
    admin.create_network(&NetworkSpec::new("many".parse()?, "10.64.0.0/12".parse()?)).await?;
    let token = admin.create_token(&TokenRequest { uses: None, ttl_seconds: None }).await?.token;
    let mut agents = Vec::new();
    let mut joining = JoinSet::new();
    let mut next = 0;
    while agents.len() < count {
        while joining.len() < JOINING && next < count {
            joining.spawn(joined(process.url(), token.clone(), next));
            next += 1;
        }
        agents.push(joining.join_next().await.context("nobody joins")???);
    }
    println!("  {count} hosts joined");

    let (cpu, begun) = (process.cpu()?, Instant::now());
    let (mut agents, bytes) = connect(agents, false).await?;
    let (took, used) = (begun.elapsed().as_secs_f64(), process.cpu()? - cpu);
    report.told(
        "agents: snapshot to all",
        format!(
            "{count} in {took:.2} s, {:.0} KiB each, {used:.2} s of CPU",
            bytes as f64 / 1024.0 / count as f64
        ),
    );

    let (resident, cpu) = (process.memory()?.0, process.cpu()?);
    let (latencies, seen) = changes(&mut agents, seconds).await?;
    let used = (process.cpu()? - cpu) / seconds as f64;
    let samples = Samples::of(latencies);
    report.judged(
        "agents: a change seen by all, ms",
        format!("p50 {:.0}, p99 {:.0}, max {:.0}", samples.median(), samples.p99(), samples.max()),
        "p99 <= 500 ms",
        samples.p99() <= 500.0,
    );
    report.keep("agents", &samples)?;
    let total = (RATE * seconds) as f64;
    report.told(
        "agents: server while changing",
        format!("{:.0} % of a core, {resident:.0} MiB resident", used * 100.0),
    );
    report.told(
        "agents: told of a change",
        format!(
            "{:.0} bytes an agent, {:.1} changes a message",
            seen.bytes.load(Ordering::Relaxed) as f64 / count as f64 / total,
            total * count as f64 / seen.messages.load(Ordering::Relaxed) as f64
        ),
    );

    for (name, how) in [
        ("agents: all resume at once", How::Resume),
        ("agents: all begin anew at once", How::Anew),
        ("agents: all back, server killed and started", How::Killed),
    ] {
        let begun = Instant::now();
        let started = match how {
            How::Killed => {
                process.restart()?;
                process.client().await?;
                format!(", of which {:.2} s until it answers", begun.elapsed().as_secs_f64())
            }
            How::Resume | How::Anew => String::new(),
        };
        for agent in &mut agents {
            agent.stream = None;
            agent.server.reconnect(&agent.identity)?;
        }
        let cpu = process.cpu()?;
        (agents, _) = connect(agents, how != How::Anew).await?;
        let (took, used) = (begun.elapsed().as_secs_f64(), process.cpu()? - cpu);
        report.told(
            name,
            format!(
                "{took:.2} s{started}, {used:.2} s of CPU, peak {:.0} MiB, {} asked again",
                process.memory()?.1,
                AGAIN.swap(0, Ordering::Relaxed)
            ),
        );
    }
    Ok(())
}

/// How agents come back, each by a connection of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Resume,
    Anew,
    Killed,
}

async fn joined(url: String, token: String, n: usize) -> Result<Agent> {
    let key = rcgen::KeyPair::generate()?;
    let identity = join(Join {
        key: &key,
        url: &url,
        token: &token.parse()?,
        environment: &EnvironmentId::default(),
        name: &format!("h{n}").parse()?,
        candidates: Vec::new(),
        labels: std::collections::BTreeMap::new(),
        routes: Vec::new(),
    })
    .await?;
    let server = Server::of(&identity, &[])?;
    let networks: Vec<model::NetworkId> = {
        let mut stream = server.watch(None).await?;
        loop {
            if let Watch::Snapshot { objects, .. } = stream.next().await? {
                break objects
                    .into_iter()
                    .filter_map(|object| match object {
                        Object::Network(network) if network.name.as_str() == "many" => Some(network.id),
                        _ => None,
                    })
                    .collect();
            }
        }
    };
    let block = server.lease(networks.first().context("no network")?.clone(), 0).await?;
    // What is measured begins with connections of its own.
    let server = Server::of(&identity, &[])?;
    Ok(Agent { identity, server, block, stream: None, at: None })
}

/// All connect at once; the bytes that came.
async fn connect(agents: Vec<Agent>, resume: bool) -> Result<(Vec<Agent>, u64)> {
    let mut connecting = JoinSet::new();
    for mut agent in agents {
        connecting.spawn(async move {
            let at = agent.at.clone().filter(|_| resume);
            let mut at = at.as_ref().map(|(epoch, revision)| (epoch, *revision));
            // As agents do: who is not let in at once asks again after a while, and who is too far behind for a snapshot.
            let mut tried = 0;
            let (stream, first) = loop {
                let attempt = async {
                    let mut stream = agent.server.watch(at).await?;
                    let first = stream.next().await?;
                    Ok::<_, ApiError>((stream, first))
                };
                match attempt.await {
                    Ok(begun) => break begun,
                    Err(error) if tried == TRIES => return Err(error.into()),
                    Err(error) if error.code == ErrorCode::Compacted => {
                        at = None;
                        continue;
                    }
                    Err(_) => tried += 1,
                }
                tokio::time::sleep(Duration::from_millis(100 * tried)).await;
            };
            AGAIN.fetch_add(tried, Ordering::Relaxed);
            match first {
                Watch::Snapshot { epoch, revision, .. } => agent.at = Some((epoch, revision)),
                Watch::Delta { revision, .. } => agent.at = agent.at.map(|(epoch, _)| (epoch, revision)),
                Watch::Servers { .. } | Watch::Heartbeat { .. } | Watch::Prove => {
                    anyhow::bail!("neither snapshot nor delta")
                }
            }
            let bytes = stream.received();
            agent.stream = Some(stream);
            Ok((agent, bytes))
        });
    }
    let (mut agents, mut bytes) = (Vec::new(), 0);
    let all = async {
        while let Some(done) = connecting.join_next().await {
            let (agent, received) = done??;
            agents.push(agent);
            bytes += received;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(LIMIT, all).await.context("not all agents connect")??;
    Ok((agents, bytes))
}

/// Changes at a steady rate; milliseconds until each was seen by all.
async fn changes(agents: &mut [Agent], seconds: u64) -> Result<(Vec<f64>, Arc<Seen>)> {
    let total = (RATE * seconds) as usize;
    let seen = Arc::new(Seen {
        begun: Instant::now(),
        sent: (0..total).map(|_| AtomicU64::new(0)).collect(),
        seen: (0..total).map(|_| (AtomicUsize::new(0), AtomicU64::new(0))).collect(),
        messages: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
    });
    let mut watching = JoinSet::new();
    for (n, agent) in agents.iter_mut().enumerate() {
        let (stream, seen) = (agent.stream.take().context("not connected")?, seen.clone());
        let at = agent.at.clone();
        watching.spawn(async move { watch(n, stream, at, seen).await });
    }
    let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
    let mut putting = JoinSet::new();
    for n in 0..total {
        tick.tick().await;
        let agent = &agents[n % agents.len()];
        let (server, endpoint) = (agent.server.clone(), endpoint(&agent.block, n, agents.len())?);
        let seen = seen.clone();
        putting.spawn(async move {
            seen.sent[n].store(seen.begun.elapsed().as_micros() as u64, Ordering::Relaxed);
            server.put_endpoint(&endpoint).await
        });
        while let Some(done) = putting.try_join_next() {
            done??;
        }
    }
    while let Some(done) = putting.join_next().await {
        done??;
    }
    let all = async {
        while let Some(done) = watching.join_next().await {
            let (n, stream, at) = done??;
            agents[n].stream = Some(stream);
            agents[n].at = at;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(LIMIT, all).await.context("not all agents see all changes")??;
    let load = |value: &AtomicU64| value.load(Ordering::Relaxed) as f64;
    let latencies = seen.sent.iter().zip(&seen.seen);
    Ok((latencies.map(|(sent, (_, last))| (load(last) - load(sent)) / 1000.0).collect(), seen))
}

/// One agent: until it has seen every change.
async fn watch(
    n: usize,
    mut stream: WatchStream,
    mut at: Option<(Epoch, Revision)>,
    seen: Arc<Seen>,
) -> Result<(usize, WatchStream, Option<(Epoch, Revision)>)> {
    let (mut left, before) = (seen.sent.len(), stream.received());
    while left > 0 {
        let Watch::Delta { revision, changes } = stream.next().await? else { continue };
        seen.messages.fetch_add(1, Ordering::Relaxed);
        at = at.map(|(epoch, _)| (epoch, revision));
        let now = seen.begun.elapsed().as_micros() as u64;
        for change in changes {
            let Change::Put(Object::Endpoint(endpoint)) = change else { continue };
            let number = endpoint.created as usize;
            let (count, last) = &seen.seen[number];
            count.fetch_add(1, Ordering::Relaxed);
            last.fetch_max(now, Ordering::Relaxed);
            left -= 1;
        }
    }
    seen.bytes.fetch_add(stream.received() - before, Ordering::Relaxed);
    Ok((n, stream, at))
}

/// The change of that number: an endpoint of its own, which says when it was made.
fn endpoint(block: &Block, n: usize, hosts: usize) -> Result<Endpoint> {
    let base = match block.cidr.network() {
        std::net::IpAddr::V4(base) => u32::from(base),
        std::net::IpAddr::V6(_) => anyhow::bail!("not IPv4"),
    };
    // Past the network's address and the gateway's, which the first block has.
    let address = Ipv4Addr::from(base + 2 + (n / hosts) as u32);
    Ok(Endpoint {
        id: EndpointId::from_random((n as u64).to_be_bytes()),
        network: block.network.clone(),
        host: block.host.clone(),
        name: Some(format!("c{n}").parse()?),
        stack: None,
        service: None,
        aliases: Vec::new(),
        addresses: vec![address.into()],
        mac: Mac::from_random([0, 1, 2, 3, 4, 5]),
        kind: EndpointKind::Socket,
        container: Some(format!("{n:064x}")),
        labels: std::collections::BTreeMap::from([("io.droveway.bench".to_owned(), n.to_string())]),
        ports: Vec::new(),
        healthy: true,
        created: n as u64,
    })
}
