//! What runs on the nodes: server, agents, Docker Engines. Nobody restarts them; tests and people do.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use model::Endpoint;
use model::agent_api::{AgentStatus, Connection, SOCKET};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::enter::{Door, root_of};
use super::process::{tail, wait_for, wait_gone};
use super::spec::{SECOND, SERVER, SERVER_PORT, STORE_PORT};
use super::state::lock;
use super::{Lab, LabSpec, Pin};
use crate::client::ask_agent;

/// How long something may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a process may take to die.
pub(super) const DEATH_LIMIT: Duration = Duration::from_secs(10);

/// What runs on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Daemon {
    /// `droveway server`.
    Server,
    /// `droveway agent`.
    Agent,
    /// `dockerd`.
    Docker,
    /// `etcd`.
    Etcd,
}

impl Daemon {
    /// The name of its log, without `.log`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Agent => "agent",
            Self::Docker => "dockerd",
            Self::Etcd => "etcd",
        }
    }

    /// How it is started on that node.
    fn command(self, spec: &LabSpec, node: &str) -> Result<Vec<String>> {
        let program = spec.program.display().to_string();
        let path = |path: PathBuf| path.display().to_string();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        Ok(match self {
            Self::Server => {
                let server = spec.node(node)?;
                let listen = SocketAddr::new(server.address, SERVER_PORT).to_string();
                let data = path(spec.server_dir(node));
                let mut command = words(&[&program, "server", "--data-dir", &data, "--listen", &listen]);
                command.extend(spec.store_args(&server));
                command.extend_from_slice(&spec.server_args);
                command
            }
            Self::Etcd => {
                let url = format!("http://{}", SocketAddr::new(spec.node(node)?.address, STORE_PORT));
                let data = path(spec.node_dir(node).join("store"));
                // What a lab stores need not outlive the machine.
                words(&[
                    "etcd",
                    "--data-dir",
                    &data,
                    "--listen-client-urls",
                    &url,
                    "--advertise-client-urls",
                    &url,
                    "--max-txn-ops=10000",
                    "--unsafe-no-fsync",
                ])
            }
            Self::Agent => {
                let (url, token) = (spec.server_urls(), path(spec.token_file()));
                let state = path(spec.agent_dir(node));
                let mut command = words(&[&program, "agent", "--server", &url, "--token-file", &token]);
                command.extend(words(&["--name", node, "--state-dir", &state]));
                // All hosts of a lab share one machine's processors.
                let said = spec.agent_args.iter().any(|word| word.starts_with("--workers"));
                if !said && std::env::var_os("DROVEWAY_TUNING").is_none() {
                    command.extend(words(&["--workers", "1"]));
                }
                command.extend_from_slice(&spec.agent_args);
                command
            }
            Self::Docker => {
                let mut command = words(&[
                    "dockerd",
                    "--data-root",
                    &path(spec.docker_root().join(node)),
                    "--exec-root=/run/docker-exec",
                    "--pidfile=/run/dockerd.pid",
                    "--host=unix:///run/docker.sock",
                    &format!("--cgroup-parent={}/{node}", spec.cgroup()),
                    "--exec-opt=native.cgroupdriver=cgroupfs",
                    "--log-level=warn",
                ]);
                command.extend_from_slice(&spec.docker_args);
                command
            }
        })
    }
}

impl fmt::Display for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Lab {
    /// Starts a daemon and waits until it answers. An agent answers before it is connected: see
    /// [`Lab::wait_connected`].
    pub fn start_daemon(&self, node: &str, daemon: Daemon) -> Result<()> {
        self.launch(node, daemon)?;
        self.wait_answers(node, daemon)
    }

    /// Kills a daemon (`SIGKILL`) and waits until it is gone. One that does not run is left so.
    pub fn kill_daemon(&self, node: &str, daemon: Daemon) -> Result<()> {
        self.signal_daemon(node, daemon, Signal::SIGKILL)
    }

    /// Asks a daemon to end (`SIGTERM`) and waits until it has.
    pub fn stop_daemon(&self, node: &str, daemon: Daemon) -> Result<()> {
        self.signal_daemon(node, daemon, Signal::SIGTERM)
    }

    fn signal_daemon(&self, node: &str, daemon: Daemon, signal: Signal) -> Result<()> {
        let state = self.state()?;
        let Some(&pin) = state.node(node)?.daemons.get(&daemon) else { return Ok(()) };
        pin.signal(signal)?;
        wait_gone(pin, DEATH_LIMIT).with_context(|| format!("{daemon} of {node}"))
    }

    /// [`Lab::kill_daemon`] for a host's agent.
    pub fn kill_agent(&self, host: &str) -> Result<()> {
        self.kill_daemon(host, Daemon::Agent)
    }

    /// [`Lab::start_daemon`] for a host's agent.
    pub fn start_agent(&self, host: &str) -> Result<()> {
        self.start_daemon(host, Daemon::Agent)
    }

    /// [`Lab::kill_daemon`] for the server.
    pub fn kill_server(&self) -> Result<()> {
        self.kill_daemon(SERVER, Daemon::Server)
    }

    /// [`Lab::start_daemon`] for the server.
    pub fn start_server(&self) -> Result<()> {
        self.start_daemon(SERVER, Daemon::Server)
    }

    /// The process id of a daemon, as the caller's machine sees it.
    pub fn daemon_pid(&self, node: &str, daemon: Daemon) -> Result<Option<u32>> {
        let state = self.state()?;
        let pin = state.node(node)?.daemons.get(&daemon).copied();
        Ok(pin.filter(|pin| pin.alive()).map(|pin| pin.pid))
    }

    /// Where a daemon writes what it has to say.
    pub fn daemon_log(&self, node: &str, daemon: Daemon) -> PathBuf {
        self.spec().log(node, daemon.as_str())
    }

    /// The agent's socket, as it can be connected to from outside.
    pub fn agent_socket(&self, host: &str) -> Result<PathBuf> {
        let init = self.state()?.running(host)?;
        Ok(root_of(init).join(SOCKET.trim_start_matches('/')))
    }

    /// What an agent says of itself.
    pub fn agent_status(&self, host: &str) -> Result<AgentStatus> {
        Ok(ask_agent(&self.agent_socket(host)?, async |agent| agent.status().await)?)
    }

    /// What an agent has attached.
    pub fn endpoints(&self, host: &str) -> Result<Vec<Endpoint>> {
        Ok(ask_agent(&self.agent_socket(host)?, async |agent| agent.endpoints().await)?)
    }

    /// Waits until a host's agent is connected to the server.
    pub fn wait_connected(&self, host: &str) -> Result<()> {
        let mut why = String::new();
        let done = wait_for(START_LIMIT, || {
            self.still_alive(host, Daemon::Agent)?;
            match self.agent_status(host).map(|status| status.connection) {
                Ok(Connection::Up { .. }) => return Ok(Some(())),
                Ok(Connection::Down { why: reason, .. }) => why = reason,
                Err(error) => why = format!("{error:#}"),
            }
            Ok(None)
        })?;
        let log = || tail(&self.daemon_log(host, Daemon::Agent));
        done.with_context(|| format!("the agent of {host} does not connect to the server: {why}{}", log()))
    }

    /// Starts it and does not wait.
    pub(super) fn launch(&self, node: &str, daemon: Daemon) -> Result<()> {
        let _lock = lock(self.dir())?;
        let mut state = self.state()?;
        let init = state.running(node)?;
        let known = state.node(node)?.daemons.get(&daemon);
        ensure!(!known.is_some_and(|pin| pin.alive()), "{daemon} of {node} runs already");
        self.prepare(node, daemon)?;
        let log = self.daemon_log(node, daemon);
        let command = daemon.command(&state.spec, node)?;
        let pin = self.spawn_daemon(init, &log, &command).with_context(|| format!("{daemon} of {node}"))?;
        if let Some(entry) = state.nodes.get_mut(node) {
            entry.daemons.insert(daemon, pin);
        }
        state.save()
    }

    fn prepare(&self, node: &str, daemon: Daemon) -> Result<()> {
        let dir = match daemon {
            Daemon::Server => self.spec().server_dir(node),
            Daemon::Agent => self.spec().node_dir(node).join("agent"),
            Daemon::Docker => self.spec().docker_root().join(node),
            Daemon::Etcd => self.spec().node_dir(node).join("store"),
        };
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let key = dir.join("ca.key");
        if node == SECOND && !key.exists() {
            // As its operator would.
            let first = self.spec().server_dir(SERVER).join("ca.key");
            fs::copy(&first, &key).with_context(|| format!("cannot copy {}", first.display()))?;
        }
        Ok(())
    }

    /// A process below a node's pid 1, named as the caller's machine sees it.
    fn spawn_daemon(&self, init: Pin, log: &Path, command: &[String]) -> Result<Pin> {
        let mut verb = self.enter(&Door::of(init));
        verb.args(["lab-daemon", "--report", "--log"]).arg(log).arg("--").args(command);
        let output = verb.stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        let inner: u32 =
            String::from_utf8(output.stdout)?.trim().parse().context("no process id came back")?;
        let pin = outer_pin(init, inner)?;
        pin.with_context(|| format!("{} ended as soon as it was started{}", command[0], tail(log)))
    }

    pub(super) fn wait_answers(&self, node: &str, daemon: Daemon) -> Result<()> {
        let init = self.state()?.running(node)?;
        let root = root_of(init);
        let mut why = String::new();
        let done = wait_for(START_LIMIT, || {
            self.still_alive(node, daemon)?;
            let answers = match daemon {
                Daemon::Server => {
                    listens(init, SERVER_PORT) && self.spec().server_dir(SERVER).join("admin.key").exists()
                }
                Daemon::Etcd => listens(init, STORE_PORT),
                Daemon::Agent => match self.agent_status(node) {
                    Ok(_) => true,
                    Err(error) => {
                        why = format!(": {error:#}");
                        false
                    }
                },
                Daemon::Docker => {
                    root.join("run/docker.sock").exists()
                        && self.exec(node, &["docker", "version"])?.status.success()
                }
            };
            Ok(answers.then_some(()))
        })?;
        done.with_context(|| {
            format!("{daemon} of {node} does not answer{why}{}", tail(&self.daemon_log(node, daemon)))
        })
    }

    fn still_alive(&self, node: &str, daemon: Daemon) -> Result<()> {
        if self.daemon_pid(node, daemon)?.is_none() {
            bail!("{daemon} of {node} ended{}", tail(&self.daemon_log(node, daemon)));
        }
        Ok(())
    }

    /// A join token, in a file that only we can read: it is never on a command line.
    pub(super) fn make_token(&self) -> Result<()> {
        let program = self.spec().program.display().to_string();
        let output = self.exec(SERVER, &[&program, "token", "create", "-o", "json"])?;
        ensure!(
            output.status.success(),
            "the server gives no join token: {}{}",
            String::from_utf8_lossy(&output.stderr).trim(),
            tail(&self.daemon_log(SERVER, Daemon::Server))
        );
        let created: model::api::TokenCreated =
            serde_json::from_slice(&output.stdout).context("`droveway token create` gave no token")?;
        let path = self.spec().token_file();
        let mut file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        writeln!(file, "{}", created.token)?;
        Ok(())
    }

    /// Waits until a host's engine shows the network that is there from the beginning.
    pub(super) fn wait_network_shown(&self, host: &str) -> Result<()> {
        let show = ["docker", "network", "ls", "--filter", "name=^managed$", "--format", "{{.Name}}"];
        let done = wait_for(START_LIMIT, || {
            self.still_alive(host, Daemon::Agent)?;
            let output = self.exec(host, &show)?;
            Ok((output.stdout.trim_ascii() == b"managed").then_some(()))
        })?;
        let log = || tail(&self.daemon_log(host, Daemon::Agent));
        done.with_context(|| format!("the engine of {host} does not show the network managed{}", log()))
    }
}

/// Whether somebody listens on that TCP port in a node (proc_net_tcp: state `0A`).
fn listens(init: Pin, port: u16) -> bool {
    let wanted = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|table| {
        let text = fs::read_to_string(Pin::dir(init.pid).join("net").join(table)).unwrap_or_default();
        text.lines().any(|line| {
            let mut fields = line.split_ascii_whitespace();
            fields.nth(1).is_some_and(|local| local.ends_with(&wanted)) && fields.nth(1) == Some("0A")
        })
    })
}

/// A process of a node, found by its number there among those of this machine (`NSpid` in proc_pid_status(5)).
pub(super) fn outer_pin(node: Pin, inner: u32) -> Result<Option<Pin>> {
    let node_dir = Pin::dir(node.pid);
    let depth = ns_pids(&node_dir).map(|pids| pids.len()).unwrap_or_default();
    let ours = fs::read_link(node_dir.join("ns/pid"))?;
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let dir = Pin::dir(pid);
        let fits = ns_pids(&dir).is_some_and(|pids| depth > 0 && pids.get(depth - 1) == Some(&inner));
        // A container's pid 1 is one level deeper: there its parent, the shim, is the node's.
        let of_node = |dir: &Path| fs::read_link(dir.join("ns/pid")).is_ok_and(|there| there == ours);
        if fits && (of_node(&dir) || parent(&dir).is_some_and(|parent| of_node(&Pin::dir(parent)))) {
            return Ok(Pin::of(pid).ok().filter(|pin| pin.alive()));
        }
    }
    Ok(None)
}

fn ns_pids(proc_dir: &Path) -> Option<Vec<u32>> {
    let pids = status_field(proc_dir, "NSpid:")?;
    pids.split_ascii_whitespace().map(|pid| pid.parse().ok()).collect()
}

fn parent(proc_dir: &Path) -> Option<u32> {
    status_field(proc_dir, "PPid:")?.trim().parse().ok()
}

fn status_field(proc_dir: &Path, field: &str) -> Option<String> {
    let file = BufReader::new(fs::File::open(proc_dir.join("status")).ok()?);
    file.lines().map_while(Result::ok).find_map(|line| line.strip_prefix(field).map(str::to_owned))
}
