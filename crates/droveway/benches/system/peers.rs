//! Other implementations, each between two hosts of its own: user-space WireGuard (gotatun, boringtun, wireguard-go; this is
//! not the kernel's), and strongSwan with the ESP of its own, `kernel-libipsec`.
//!
//! ```text
//! netns host1: und1 192.0.2.1 ── veth ── und2 192.0.2.2 :netns host2
//!              its device, 10.50.1.1                  10.50.2.1
//! ```
//! Sockets of control and devices go by names of their own, since all share one `/run`, the caller's.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use linux::netns::Netns;

use crate::measure::Ends;
use crate::rig;
use crate::sandbox::sh;

/// How long one may take until it answers a ping.
const LIMIT: Duration = Duration::from_secs(15);
const WIREGUARD_PORT: u16 = 51820;
/// What WireGuard adds to a packet over IPv4: IP, UDP, its header and tag.
const WIREGUARD_ADDS: u32 = 20 + 8 + 16 + 16;

/// How one is started.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// A program that takes the name of its device, after these words.
    WireGuard(&'static [&'static str]),
    Libipsec,
}

/// One that may be measured.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    pub name: &'static str,
    kind: Kind,
}

pub const KNOWN: [Known; 4] = [
    Known {
        name: "gotatun",
        kind: Kind::WireGuard(&["gotatun", "--foreground", "--disable-drop-privileges"]),
    },
    Known {
        name: "boringtun",
        kind: Kind::WireGuard(&["boringtun-cli", "--foreground", "--disable-drop-privileges"]),
    },
    Known { name: "wireguard-go", kind: Kind::WireGuard(&["wireguard-go", "--foreground"]) },
    Known { name: "strongSwan libipsec", kind: Kind::Libipsec },
];

/// One that runs, on two hosts.
pub struct Peer {
    pub name: &'static str,
    kind: Kind,
    hosts: [Netns; 2],
    daemons: Vec<Daemon>,
}

/// Ends with its owner.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Known {
    /// Starts it between two new hosts, whose files are in `dir`. `tools` is where cargo put programs.
    pub fn start(self, dir: &Path, tools: &Path) -> Result<Peer, String> {
        fs::create_dir(dir).map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
        let hosts = rig::hosts(dir).map(|(host, _)| host);
        let mut peer = Peer { name: self.name, kind: self.kind, hosts, daemons: Vec::new() };
        match self.kind {
            Kind::WireGuard(words) => peer.wireguard(words, dir, tools)?,
            Kind::Libipsec => peer.libipsec(dir)?,
        }
        let ping = || Command::new("ping").args(["-n", "-c", "1", "-W", "0.3", "10.50.2.1"]).output();
        let begun = Instant::now();
        while !inside(&peer.hosts[0], ping)?.is_ok_and(|output| output.status.success()) {
            peer.check(begun, dir)?;
        }
        Ok(peer)
    }
}

impl Peer {
    /// From one host to the other.
    pub fn ends(&self) -> Result<Ends<'_>, String> {
        let ends = Ends::new(&self.hosts[0], &self.hosts[1], "10.50.2.1")?;
        let ends = ends.with_daemons(self.daemons.iter().map(|daemon| daemon.0.id()).collect());
        Ok(match self.kind {
            Kind::WireGuard(_) => ends.with_underlay(|mtu| self.set_mtu(mtu)),
            // The size of its buffers is that of its device when it began.
            Kind::Libipsec => ends,
        })
    }

    fn set_mtu(&self, underlay: u32) {
        let inner = underlay - WIREGUARD_ADDS;
        for (host, side) in self.hosts.iter().zip(1..) {
            let device = self.device(side);
            let script =
                format!("ip link set und{side} mtu {underlay}; ip link set {device} mtu {inner} || true");
            let _ = host.run(|| sh(&script));
        }
    }

    /// Names of devices have at most 15 bytes.
    fn device(&self, side: usize) -> String {
        format!("{}{side}", self.name.get(..7).unwrap_or(self.name))
    }

    fn wireguard(&mut self, words: &[&str], dir: &Path, tools: &Path) -> Result<(), String> {
        let program = tools.join(words[0]);
        let program = if program.exists() { program } else { PathBuf::from(words[0]) };
        for side in [1, 2] {
            let device = self.device(side);
            let mut command = Command::new(&program);
            command.args(&words[1..]).arg(&device).env("LOG_LEVEL", "error");
            self.spawn(side, &mut command, dir)?;
            let key = dir.join(format!("key{side}")).display().to_string();
            tool(&format!("umask 77; wg genkey >{key}; wg pubkey <{key} >{key}.public"))?;
        }
        let begun = Instant::now();
        for side in [1, 2] {
            let (device, other) = (self.device(side), 3 - side);
            while !Path::new("/run/wireguard").join(format!("{device}.sock")).exists() {
                self.check(begun, dir)?;
            }
            let at = dir.display();
            let script = format!(
                "wg set {device} listen-port {WIREGUARD_PORT} private-key {at}/key{side} \
                   peer $(cat {at}/key{other}.public) allowed-ips 10.50.{other}.0/24 endpoint 192.0.2.{other}:{WIREGUARD_PORT}; \
                 ip addr add 10.50.{side}.1/32 dev {device}; ip link set {device} mtu {} up; \
                 ip route add 10.50.{other}.0/24 dev {device} src 10.50.{side}.1",
                1500 - WIREGUARD_ADDS
            );
            inside(&self.hosts[side - 1], || tool(&script))??;
        }
        Ok(())
    }

    fn libipsec(&mut self, dir: &Path) -> Result<(), String> {
        for side in [1, 2] {
            let (at, other) = (dir.display(), 3 - side);
            let conf = dir.join(format!("strongswan{side}.conf"));
            write(&conf, &strongswan_conf(dir, side))?;
            write(&dir.join(format!("swanctl{side}.conf")), &swanctl_conf(side, other))?;
            let script = format!(
                "ip link add in0 type bridge; ip addr add 10.50.{side}.1/24 dev in0; ip link set in0 up"
            );
            inside(&self.hosts[side - 1], || tool(&script))??;
            self.spawn(side, Command::new("/usr/sbin/charon-systemd").env("STRONGSWAN_CONF", &conf), dir)?;
            let begun = Instant::now();
            let load = format!(
                "SWANCTL_DIR={at} swanctl --load-all --file {at}/swanctl{side}.conf --uri unix://{at}/vici{side}"
            );
            while inside(&self.hosts[side - 1], || tool(&load))?.is_err() {
                self.check(begun, dir)?;
            }
        }
        let begin =
            format!("swanctl --initiate --child net --timeout 10 --uri unix://{}/vici1", dir.display());
        inside(&self.hosts[0], || tool(&begin))?
    }

    fn spawn(&mut self, side: usize, command: &mut Command, dir: &Path) -> Result<(), String> {
        let log = File::create(dir.join(format!("log{side}"))).map_err(|error| error.to_string())?;
        let also = log.try_clone().map_err(|error| error.to_string())?;
        command.stdin(Stdio::null()).stdout(log).stderr(also);
        let program = command.get_program().display().to_string();
        let child = inside(&self.hosts[side - 1], || command.spawn())?;
        let child =
            child.map_err(|error| format!("cannot start {program}: {error}; `make bench` installs it"))?;
        self.daemons.push(Daemon(child));
        Ok(())
    }

    /// That it still runs, and that there is time. Waits a moment.
    fn check(&mut self, begun: Instant, dir: &Path) -> Result<(), String> {
        let name = self.name;
        let said =
            || [1, 2].map(|side| fs::read_to_string(dir.join(format!("log{side}"))).unwrap_or_default());
        for daemon in &mut self.daemons {
            if let Ok(Some(status)) = daemon.0.try_wait() {
                return Err(format!("{name} ended ({status}): {}", said().concat()));
            }
        }
        if begun.elapsed() > LIMIT {
            return Err(format!("{name} is not ready in {LIMIT:?}: {}", said().concat()));
        }
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }
}

fn strongswan_conf(dir: &Path, side: usize) -> String {
    format!(
        "charon-systemd {{
  load = random nonce aes gcm sha1 sha2 hmac kdf openssl kernel-libipsec kernel-netlink socket-default vici
  plugins {{ vici {{ socket = unix://{}/vici{side} }} }}
  journal {{ default = -1 }}
  filelog {{ stderr {{ default = 0 }} }}
}}
",
        dir.display()
    )
}

fn swanctl_conf(side: usize, other: usize) -> String {
    format!(
        "connections {{ bench {{
  version = 2
  local_addrs = 192.0.2.{side}
  remote_addrs = 192.0.2.{other}
  proposals = aes256gcm16-prfsha256-x25519
  local {{ auth = psk\n id = host{side} }}
  remote {{ auth = psk\n id = host{other} }}
  children {{ net {{
    local_ts = 10.50.{side}.0/24
    remote_ts = 10.50.{other}.0/24
    esp_proposals = aes256gcm16
  }} }}
}} }}
secrets {{ ike {{ id-1 = host1\n id-2 = host2\n secret = \"for a benchmark in namespaces of its own\" }} }}
"
    )
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

fn inside<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> Result<T, String> {
    netns.run(work).map_err(|error| error.to_string())
}

/// A shell command that must succeed.
fn tool(script: &str) -> Result<(), String> {
    let output = Command::new("sh").args(["-ec", script]).output().map_err(|error| error.to_string())?;
    let said =
        || format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(()) } else { Err(format!("{script}: {}", said().trim())) }
}
