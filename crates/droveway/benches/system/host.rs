//! A host of a lab, as the benches use it: fresh network namespaces, and its agent's socket.
//!
//! A namespace is a file below `/run/netns` of the host, as `ip netns` makes it. Requests go to the socket over a
//! connection of their own each, as a container engine's plugin sends them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use droveway::lab::Lab;
use model::EndpointId;
use model::agent_api::{AttachRequest, Attached, path};

/// Namespaces made so far: each has a name of its own.
static MADE: AtomicUsize = AtomicUsize::new(1);
/// Longer than anything that is measured.
const LIMIT: Duration = Duration::from_secs(30);

/// A host with what the bench attached on it.
pub struct Host<'a> {
    lab: &'a Lab,
    name: String,
    socket: PathBuf,
    fresh: Vec<String>,
    attached: Vec<EndpointId>,
}

impl<'a> Host<'a> {
    pub fn new(lab: &'a Lab, name: &str) -> Result<Self> {
        let socket = lab.agent_socket(name)?;
        let (fresh, attached) = (Vec::new(), Vec::new());
        Ok(Self { lab, name: name.to_owned(), socket, fresh, attached })
    }

    /// What it is called in the lab.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many endpoints there are.
    pub fn attached(&self) -> usize {
        self.attached.len()
    }

    /// Makes sure that so many namespaces wait to be attached.
    pub fn prepare(&mut self, count: usize) -> Result<()> {
        let mut script = String::new();
        while self.fresh.len() < count {
            let name = format!("c{}", MADE.fetch_add(1, Ordering::Relaxed));
            script.push_str("netns add ");
            script.push_str(&name);
            script.push('\n');
            self.fresh.push(name);
        }
        batch(self.lab, &self.name, &script)
    }

    /// Attaches a fresh namespace to network `managed`. Says its name, its endpoint, and how long the agent took.
    pub fn attach(&mut self) -> Result<(String, Attached, Duration)> {
        self.attach_to("managed")
    }

    /// The same to any network.
    pub fn attach_to(&mut self, network: &str) -> Result<(String, Attached, Duration)> {
        if self.fresh.is_empty() {
            self.prepare(1)?;
        }
        let netns = self.fresh.pop().context("no namespace was made")?;
        let request = AttachRequest {
            network: network.to_owned(),
            netns: format!("/run/netns/{netns}").into(),
            ifname: "eth0".to_owned(),
            name: Some(format!("{}-{netns}", self.name).parse()?),
            stack: None,
            service: None,
            aliases: Vec::new(),
            address: None,
            labels: [("bench".to_owned(), "yes".to_owned())].into(),
            ports: Vec::new(),
            routes: None,
        };
        let body = serde_json::to_vec(&request)?;
        let start = Instant::now();
        let answer = self.exchange("POST", path::ENDPOINTS, &body)?;
        let took = start.elapsed();
        let attached: Attached = serde_json::from_slice(&answer)?;
        self.attached.push(attached.endpoint.id.clone());
        Ok((netns, attached, took))
    }

    /// Attaches until there are so many.
    pub fn fill(&mut self, count: usize) -> Result<()> {
        self.prepare(count.saturating_sub(self.attached.len()))?;
        while self.attached.len() < count {
            self.attach()?;
        }
        Ok(())
    }

    /// Detaches the endpoint that was attached last, and says how long the agent took.
    pub fn detach(&mut self) -> Result<Duration> {
        let id = self.attached.pop().context("nothing is attached")?;
        let start = Instant::now();
        self.exchange("DELETE", &path::ENDPOINT.replace("{id}", id.as_str()), &[])?;
        Ok(start.elapsed())
    }

    /// A request without a body; what the agent answers.
    pub fn ask(&self, method: &str, path: &str) -> Result<Vec<u8>> {
        self.exchange(method, path, &[])
    }

    fn exchange(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        stream.write_all(&request)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
        let body = answer.split_off(end.context("the agent gave no answer")? + 4);
        if !answer.starts_with(b"HTTP/1.1 2") {
            bail!("{}: the agent refused: {}", self.name, String::from_utf8_lossy(&body));
        }
        Ok(body)
    }
}

/// Waits until the server knows exactly so many endpoints, and no agent has anything left to tell.
pub fn settle(lab: &Lab, hosts: &[&Host<'_>]) -> Result<()> {
    let expected: usize = hosts.iter().map(|host| host.attached()).sum();
    let deadline = Instant::now() + 2 * LIMIT;
    loop {
        let program = lab.spec().program.display().to_string();
        let text = lab.check("server", &[program.as_str(), "endpoint", "ls", "--output", "json"])?;
        let known: Vec<serde_json::Value> = serde_json::from_str(&text)?;
        if known.len() == expected {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the server knows {} endpoints, not {expected}", known.len());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Commands of `ip` on a node, in one process.
pub fn batch(lab: &Lab, node: &str, script: &str) -> Result<()> {
    if script.is_empty() {
        return Ok(());
    }
    let mut command = lab.command(node, &["ip", "-batch", "-"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("there is no pipe")?;
    stdin.write_all(script.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "on {node}: ip failed: {}in: {script}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
