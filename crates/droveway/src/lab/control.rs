//! The lab as its users hold it: the command line and tests.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use model::agent_api::Attached;
use model::api::ApiError;
use nix::sys::signal::Signal;

use super::daemons::{DEATH_LIMIT, Daemon, outer_pin};
use super::enter::Door;
use super::place::{claim, clear, remove_dir};
use super::process::{tail, wait_for, wait_gone};
use super::shim::{Answer, Record, RunSpec};
use super::spec::verb;
use super::state::{Supervisor, lock, write_json};
use super::{Kind, LabSpec, Node, Pin, State, UNDERLAY, nat, supervisor};
use crate::cli::{Exit, Failure};
use crate::client;

/// A lab that is up. Dropping the one that [`Lab::up`] gave takes the lab down, unless [`Lab::keep`] was called.
#[derive(Debug)]
pub struct Lab {
    spec: LabSpec,
    owned: Option<Owned>,
}

/// The outermost process. If we die, whatever the way, the pipe to it closes and the lab ends.
#[derive(Debug)]
struct Owned {
    child: Child,
    tie: ChildStdin,
}

/// A container of the lab that runs.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its host.
    pub host: String,
    /// Its name.
    pub name: String,
    /// What the agent said of it.
    pub attached: Attached,
}

impl Container {
    /// Its name as [`Lab::exec`] takes it.
    pub fn path(&self) -> String {
        format!("{}/{}", self.host, self.name)
    }

    /// Its first address.
    pub fn address(&self) -> Option<IpAddr> {
        self.attached.endpoint.addresses.first().copied()
    }
}

impl Lab {
    /// Brings a lab up and waits until all of it works. If anything fails, nothing is left.
    pub fn up(spec: LabSpec) -> Result<Self> {
        Self::up_with(spec, &mut |line| tracing::info!("{line}"))
    }

    /// [`Lab::up`], telling how far it is.
    pub fn up_with(spec: LabSpec, progress: &mut dyn FnMut(&str)) -> Result<Self> {
        spec.validate()?;
        let held = claim(&spec)?;
        clear(&spec)?;
        write_json(&spec.dir.join("spec.json"), &spec)?;
        fs::create_dir(spec.bin_dir())?;
        symlink(&spec.program, spec.bin_dir().join("droveway"))?;
        let mut state = State::new(spec.clone());
        state.save()?;
        let owned = launch(&spec)?;
        let mut lab = Self { spec, owned: Some(owned) };
        lab.wait_supervisor(&mut state)?;
        drop(held);
        lab.populate(progress)?;
        Ok(lab)
    }

    /// The lab whose things are in that directory.
    pub fn open(dir: &Path) -> Result<Self> {
        let up = Supervisor::load(dir)?.is_some_and(|supervisor| supervisor.up());
        match State::load(dir)?.filter(|_| up) {
            Some(state) => Ok(Self { spec: state.spec, owned: None }),
            None => bail!(Failure::new(Exit::NotFound, not_up(dir))),
        }
    }

    /// Lets the lab outlive this value and this process.
    pub fn keep(mut self) -> Result<()> {
        if let Some(mut owned) = self.owned.take() {
            let supervisor = Supervisor::load(&self.spec.dir)?.context("the lab is gone")?;
            Supervisor { caller: None, ..supervisor }.save(&self.spec.dir)?;
            owned.tie.write_all(supervisor::KEEP).context("the lab is gone")?;
        }
        Ok(())
    }

    /// Takes the lab down: nothing of it is left.
    pub fn down(mut self) -> Result<()> {
        self.take_down()
    }

    /// [`Lab::down`] for whatever is in a lab's directory, also after a crash. Says whether there was anything.
    pub fn down_dir(dir: &Path) -> Result<bool> {
        // One that is being brought up at this moment is let come so far that its processes are known.
        let begins = dir.exists() && Supervisor::load(dir)?.is_none();
        let _held = begins.then(|| lock(dir).ok());
        let spec = State::load(dir).ok().flatten().map(|state| state.spec);
        let Some(spec) = spec.or_else(|| supervisor::spec(dir).ok()) else {
            let there = dir.exists();
            if there {
                remove_dir(dir)?;
            }
            return Ok(there);
        };
        Self { spec, owned: None }.take_down()?;
        Ok(true)
    }

    /// What was asked for.
    pub fn spec(&self) -> &LabSpec {
        &self.spec
    }

    /// Where its things are.
    pub fn dir(&self) -> &Path {
        &self.spec.dir
    }

    /// What it is now.
    pub fn state(&self) -> Result<State> {
        let state = State::load(&self.spec.dir)?;
        state.with_context(|| format!("lab {} is not up", self.spec.name))
    }

    /// Names of its hosts.
    pub fn hosts(&self) -> Vec<String> {
        self.spec.nodes().filter(|node| node.kind == Kind::Host).map(|node| node.name).collect()
    }

    /// The process id of a node's pid 1 (`h1`, `server`) or of a container (`h1/web`), as the caller's machine sees it:
    /// `/proc/PID/ns` and `/proc/PID/root` lead into it.
    pub fn pid_of(&self, target: &str) -> Result<u32> {
        let (node, container) = split(target);
        let init = self.init_of(node)?;
        let Some(name) = container else { return Ok(init.pid) };
        let pin = self.container_init(node, init, name)?;
        let pin = pin.ok_or_else(|| no_container(node, name))?;
        Ok(outer_pin(init, pin.pid)?.ok_or_else(|| no_container(node, name))?.pid)
    }

    /// Pid 1 of a node, or, for [`UNDERLAY`], of the lab.
    pub(super) fn init_of(&self, node: &str) -> Result<Pin> {
        let state = self.state()?;
        if node == UNDERLAY { state.init.context("the lab has no pid 1") } else { state.running(node) }
    }

    /// A command that runs on a node (`h1`) or in a container (`h1/web`), with its exit status; killing it kills what
    /// it runs. Its standard streams are the caller's to set.
    pub fn command<S: AsRef<str>>(&self, target: &str, words: &[S]) -> Result<Command> {
        self.command_at(target, words, false)
    }

    /// [`Lab::command`], at a terminal or not: Docker has to be told.
    pub(super) fn command_at<S: AsRef<str>>(
        &self,
        target: &str,
        words: &[S],
        terminal: bool,
    ) -> Result<Command> {
        ensure!(!words.is_empty(), "give a command after --, as in `droveway lab exec {target} -- ip addr`");
        let (node, container) = split(target);
        let init = self.init_of(node)?;
        let mut prefix = Vec::new();
        let door = match container {
            None => Door::of(init),
            Some(name) => match self.container_init(node, init, name)? {
                Some(pin) => Door::inside(init, pin),
                None if self.spec.docker && self.spec.is_host(node) => {
                    prefix = ["docker", "exec", if terminal { "-it" } else { "-i" }, name]
                        .map(str::to_owned)
                        .to_vec();
                    Door::of(init)
                }
                None => bail!(no_container(node, name)),
            },
        };
        let mut command = self.enter(&door);
        if self.spec.is_host(node) && !self.spec.bare {
            command.env("DROVEWAY_STATE_DIR", self.spec.agent_dir(node));
        }
        command.args(["lab-stage", "--"]).args(prefix).args(words.iter().map(AsRef::as_ref));
        Ok(command)
    }

    /// Runs a command to its end and gives what it said.
    pub fn exec<S: AsRef<str>>(&self, target: &str, words: &[S]) -> Result<Output> {
        let mut command = self.command(target, words)?;
        Ok(command.stdin(Stdio::null()).output()?)
    }

    /// Runs a command that must succeed, and gives its standard output.
    pub fn check<S: AsRef<str>>(&self, target: &str, words: &[S]) -> Result<String> {
        let output = self.exec(target, words)?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "on {target}: {} failed ({}): {said}{}",
            words.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(said.into_owned())
    }

    /// Starts a command with piped standard streams.
    pub fn spawn<S: AsRef<str>>(&self, target: &str, words: &[S]) -> Result<Child> {
        let mut command = self.command(target, words)?;
        Ok(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    /// Runs a program in an endpoint of its own, and comes back when it is attached and has begun.
    pub fn run(&self, host: &str, run: &RunSpec) -> Result<Container> {
        let mut shim = self.shim(host, run, false)?;
        let mut child = shim.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        child.wait()?;
        let answer = serde_json::from_str(&line).with_context(|| {
            format!("{host}: the shim of {} gave no answer{}", run.name, tail(&self.shim_log(host)))
        })?;
        match answer {
            Answer::Runs(attached) => {
                Ok(Container { host: host.to_owned(), name: run.name.to_string(), attached: *attached })
            }
            Answer::Failed { code: Some(code), why } => {
                let refusal = ApiError::new(code, format!("{host}/{}: {why}", run.name));
                Err(client::Error::Refused(refusal).into())
            }
            Answer::Failed { code: None, why } => bail!("{host}/{}: {why}", run.name),
        }
    }

    /// Runs a program in an endpoint of its own, with the caller's standard streams, to its end.
    pub fn run_foreground(&self, host: &str, run: &RunSpec) -> Result<ExitStatus> {
        Ok(self.shim(host, run, true)?.status()?)
    }

    pub(super) fn shim(&self, host: &str, run: &RunSpec, foreground: bool) -> Result<Command> {
        ensure!(
            !run.command.is_empty(),
            "give a command after --, as in `droveway lab run h1 --name web -- sleep 60`"
        );
        let state = self.state()?;
        let init = state.running(host)?;
        ensure!(self.spec.is_host(host), "{host} has no agent; run it on one of {}", self.hosts().join(", "));
        let mut command = self.enter(&Door::of(init));
        if foreground {
            command.args(["lab-stage", "--"]).arg(&self.spec.program);
        } else {
            command.args(["lab-daemon", "--log"]).arg(self.shim_log(host)).args(["--", "droveway"]);
        }
        command
            .arg("lab-shim")
            .arg(self.spec.containers_dir(host))
            .args(foreground.then_some("--foreground"));
        command.arg(serde_json::to_string(run)?);
        Ok(command)
    }

    fn shim_log(&self, host: &str) -> PathBuf {
        self.spec.log(host, "shim")
    }

    /// The containers of a host: name and addresses.
    pub fn containers(&self, host: &str) -> Result<Vec<(String, Vec<IpAddr>)>> {
        let state = self.state()?;
        let Some(init) = state.node(host)?.running() else { return Ok(Vec::new()) };
        let mut records = Record::all(&self.spec.containers_dir(host))?;
        records
            .retain(|record| record.init.is_some_and(|pin| pin.alive_at(&Door::inside(init, pin).proc_dir)));
        Ok(records.into_iter().map(|record| (record.spec.name.to_string(), record.addresses)).collect())
    }

    fn container_init(&self, node: &str, init: Pin, name: &str) -> Result<Option<Pin>> {
        // A name that is none would be a path elsewhere.
        let name: model::Name = name.parse()?;
        let record = Record::load(&self.spec.containers_dir(node), name.as_str())?;
        let pin = record.and_then(|record| record.init);
        Ok(pin.filter(|pin| pin.alive_at(&Door::inside(init, *pin).proc_dir)))
    }

    /// Kills a container and waits until it is detached.
    pub fn kill_container(&self, host: &str, name: &str) -> Result<()> {
        let init = self.state()?.running(host)?;
        let pin = self.container_init(host, init, name)?.ok_or_else(|| no_container(host, name))?;
        outer_pin(init, pin.pid)?.map(|pin| pin.signal(Signal::SIGKILL)).transpose()?;
        let record = Record::path(&self.spec.containers_dir(host), name);
        let gone = wait_for(DEATH_LIMIT * 2, || Ok((!record.exists()).then_some(())))?;
        gone.with_context(|| {
            format!("{host}/{name} was killed but not detached{}", tail(&self.shim_log(host)))
        })
    }

    /// Switches a node off: all that runs on it is gone at once. Its disk stays.
    pub fn kill(&self, node: &str) -> Result<()> {
        let _lock = lock(self.dir())?;
        let mut state = self.state()?;
        let init = state.running(node)?;
        init.signal(Signal::SIGKILL)?;
        wait_gone(init, DEATH_LIMIT).with_context(|| node.to_owned())?;
        if let Some(entry) = state.nodes.get_mut(node) {
            entry.init = None;
            entry.daemons.clear();
        }
        state.save()
    }

    /// Switches a node on again, with what runs on it, and waits until it works.
    pub fn start(&self, node: &str) -> Result<()> {
        ensure!(self.state()?.node(node)?.running().is_none(), "{node} is powered on already");
        self.power_on(node)?;
        for daemon in self.daemons_of(node) {
            self.start_daemon(node, daemon)?;
        }
        Ok(())
    }

    fn daemons_of(&self, node: &str) -> Vec<Daemon> {
        let kind = self.spec.node(node).map_or(Kind::Other, |node| node.kind);
        match (kind, self.spec.bare, self.spec.docker) {
            (Kind::Nat | Kind::Other, _, _)
            | (Kind::Server | Kind::Store, true, _)
            | (Kind::Host, true, false) => vec![],
            (Kind::Host, true, true) => vec![Daemon::Docker],
            (Kind::Server, false, _) => vec![Daemon::Server],
            (Kind::Store, false, _) => vec![Daemon::Etcd],
            (Kind::Host, false, false) => vec![Daemon::Agent],
            (Kind::Host, false, true) => vec![Daemon::Docker, Daemon::Agent],
        }
    }

    fn power_on(&self, node: &str) -> Result<()> {
        let _lock = lock(self.dir())?;
        let mut state = self.state()?;
        let lab_init = state.init.context("the lab has no pid 1")?;
        // What was recorded there ended with the node.
        let containers = self.spec.containers_dir(node);
        if containers.exists() {
            fs::remove_dir_all(&containers)?;
        }
        fs::create_dir_all(&containers)?;
        let log = self.spec.log(node, "node");
        let mut command = self.enter(&Door::of(lab_init));
        command.args(["lab-daemon", "--log"]).arg(&log).args(["--", "droveway", "lab-node"]);
        command.arg(self.dir()).arg(node);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        child.wait()?;
        let inner: Option<u32> = line.trim().parse().ok();
        let pin = inner.map(|inner| outer_pin(lab_init, inner)).transpose()?.flatten();
        let pin = pin.with_context(|| format!("{node} does not start{}", tail(&log)))?;
        if let Some(entry) = state.nodes.get_mut(node) {
            entry.init = Some(pin);
            entry.address = self.spec.node(node)?.address;
            entry.daemons.clear();
        }
        state.save()?;
        self.apply_tables(&state, node)?;
        // Its address may be another than before.
        state.at_fault_with(node).try_for_each(|other| self.apply_tables(&state, other))
    }

    /// What goes through the given namespaces; the verb that is to run there has to be added.
    pub(super) fn enter(&self, door: &Door) -> Command {
        let mut command = Command::new(&self.spec.program);
        command.args(door.args()).arg("--").envs(self.spec.environment());
        command
    }

    fn wait_supervisor(&mut self, state: &mut State) -> Result<()> {
        let log = self.spec.dir.join("lab.log");
        let out = self.owned.as_mut().and_then(|owned| owned.child.stdout.take());
        let mut line = String::new();
        if let Some(out) = out {
            BufReader::new(out).read_line(&mut line)?;
        }
        ensure!(line.trim() == supervisor::READY, "lab {} does not start{}", self.spec.name, tail(&log));
        // The inner process may be ready before the outer one has written down which it is.
        let written = || Ok(Supervisor::load(&self.spec.dir)?.and_then(|supervisor| supervisor.init));
        state.init = wait_for(DEATH_LIMIT, written)?;
        state.save()
    }

    fn populate(&self, progress: &mut dyn FnMut(&str)) -> Result<()> {
        let spec = &self.spec;
        for Node { name, address, behind, .. } in spec.nodes() {
            self.power_on(&name)?;
            progress(&match behind {
                None => format!("{name}: {address} on the underlay"),
                Some(nat) => format!("{name}: {address} behind {}", nat::name(nat)),
            });
        }
        let hosts = self.hosts();
        if spec.docker {
            for host in &hosts {
                self.launch(host, Daemon::Docker)?;
            }
        }
        if !spec.bare {
            for store in spec.nodes().filter(|node| node.kind == Kind::Store) {
                self.start_daemon(&store.name, Daemon::Etcd)?;
                progress(&format!("{}: answers", store.name));
            }
            for server in spec.nodes().filter(|node| node.kind == Kind::Server) {
                self.start_daemon(&server.name, Daemon::Server)?;
                progress(&format!("{}: answers at {}", server.name, LabSpec::server_url(server.address)));
            }
            self.make_token()?;
        }
        if spec.docker {
            for host in &hosts {
                self.wait_answers(host, Daemon::Docker)?;
                progress(&format!("{host}: its Docker Engine answers"));
            }
        }
        if !spec.bare {
            for host in &hosts {
                self.launch(host, Daemon::Agent)?;
            }
            for host in &hosts {
                self.wait_connected(host)?;
                progress(&format!("{host}: its agent is connected"));
            }
            for host in hosts.iter().filter(|_| spec.docker) {
                self.wait_network_shown(host)?;
                progress(&format!("{host}: its engine shows the network managed"));
            }
        }
        Ok(())
    }

    fn take_down(&mut self) -> Result<()> {
        let processes = Supervisor::load(&self.spec.dir)?;
        for pin in processes.iter().flat_map(|known| [Some(known.supervisor), known.init]).flatten() {
            pin.signal(Signal::SIGKILL)?;
            wait_gone(pin, DEATH_LIMIT)?;
        }
        if let Some(mut owned) = self.owned.take() {
            // It died a moment ago, or before it could write down who it is.
            super::process::put_down(&mut owned.child);
        }
        clear(&self.spec)?;
        remove_dir(&self.spec.dir)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned.is_some()
            && let Err(error) = self.take_down()
        {
            eprintln!(
                "lab {0}: something is left: {error:#}; `{1} down` takes it away",
                self.spec.name,
                verb(self.spec.name.as_str())
            );
        }
    }
}

/// Why there is no lab to be had in that directory.
fn not_up(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let verb = verb(&name);
    if dir.exists() {
        format!("lab {name} is not up yet, or was interrupted; `{verb} down` takes away what there is of it")
    } else {
        format!("lab {name} is not up; `{verb} up` brings it up")
    }
}

fn launch(spec: &LabSpec) -> Result<Owned> {
    let log = fs::File::create(spec.dir.join("lab.log"))?;
    let mut command = Command::new(&spec.program);
    command.args(["lab-init", "--tied", &std::process::id().to_string()]).arg(&spec.dir);
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn();
    let mut child = spawned.with_context(|| format!("cannot run {}", spec.program.display()))?;
    let tie = child.stdin.take().context("the pipe to the lab is not there")?;
    Ok(Owned { child, tie })
}

fn split(target: &str) -> (&str, Option<&str>) {
    target.split_once('/').map_or((target, None), |(node, container)| (node, Some(container)))
}

fn no_container(host: &str, name: &str) -> Failure {
    Failure::new(
        Exit::NotFound,
        format!("no container {name:?} runs on {host}; `droveway lab ls` shows those that do"),
    )
}
