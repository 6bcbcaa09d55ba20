//! A guest on a lab's underlay: Debian's own kernel in qemu, without acceleration, for what needs another kernel's ESP.
//!
//! The kernel is unpacked by `scripts/deps.sh`, the rest is made on the spot. It has strongSwan's charon with
//! `kernel-netlink`, and `ip`. Commands go in, and what they say comes out, by a serial line.

mod image;
pub mod peer;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use droveway::lab::Lab;

use crate::support::{LIMIT, until};
use image::Image;

/// The guest's address on the underlay: that of no node.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 180);
const QEMU: &str = "qemu-system-x86_64";
/// How long a guest may take to boot on a machine that does much else.
const BOOT: Duration = Duration::from_mins(1);
/// How long a command may take in it.
const ANSWER: Duration = Duration::from_secs(30);

/// The network, what may be tunnelled, and what AES-GCM is made of in a kernel: its counter of IVs begins at random,
/// which takes a generator (`drbg`) of its own.
const MODULES: [&str; 13] = [
    "virtio_pci",
    "virtio_net",
    "dummy",
    "xfrm_user",
    "esp4",
    "esp6",
    "aesni_intel",
    "ghash_generic",
    "ctr",
    "sha512_generic",
    "drbg",
    "seqiv",
    "gcm",
];
const PLUGINS: [&str; 11] = [
    "random",
    "nonce",
    "aes",
    "gcm",
    "sha1",
    "sha2",
    "hmac",
    "kdf",
    "curve25519",
    "kernel-netlink",
    "socket-default",
];
const CHARON: &str = "/usr/sbin/charon-systemd";

/// What runs first. The shell would take its own `ip`, which knows nothing of xfrm, before any in the path.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
MODULES
ip() { IP "$@"; }
ip link set lo up
ip addr add ADDRESS/24 dev eth0
ip link set eth0 up
exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty raw -echo
echo READY
while IFS= read -r line; do
    echo "$line" | base64 -d >/tmp/command
    ( . /tmp/command ) >/tmp/said 2>&1 </dev/null
    status=$?
    base64 /tmp/said
    echo "END $status"
done
"#;

/// A kernel that runs in qemu. It ends with this value, and with the lab.
pub struct Guest {
    qemu: Child,
    console: PathBuf,
    to: UnixStream,
    from: BufReader<UnixStream>,
}

/// What a guest is made of, on this machine.
pub struct Parts {
    kernel: PathBuf,
    qemu: String,
}

impl Parts {
    /// All that a guest needs, or in words what there is not: a test that cannot be made says so and is counted.
    pub fn find() -> Result<Self, String> {
        let missing = |what: &str| Err(format!("{what} is not here; scripts/deps.sh test"));
        if !nix::unistd::geteuid().is_root() {
            return Err("this test enters a node's namespace and needs root".to_owned());
        }
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
        let kernel = target.join("guest-kernel");
        if !kernel.join("vmlinuz").exists() {
            return missing("the kernel of linux-image-cloud-amd64");
        }
        // Installed, or unpacked beside the kernel.
        let runs = |qemu: &String| Command::new(qemu).arg("--version").stdout(Stdio::null()).status().is_ok();
        let beside = kernel.join(QEMU).display().to_string();
        let Some(qemu) = [QEMU.to_owned(), beside].into_iter().find(runs) else {
            return missing(QEMU);
        };
        if !Path::new(CHARON).exists() {
            return missing("charon-systemd");
        }
        Ok(Self { kernel, qemu })
    }

    fn image(&self) -> Result<Image, String> {
        let mut image = Image::default();
        image.program(Path::new("/bin/busybox"))?;
        let ip = which("ip")?;
        image.program(&ip)?;
        image.program(&which("swanctl")?)?;
        image.program(Path::new(CHARON))?;
        // Loaded by name when a thread is cancelled, so that nothing is linked with it; it is where the C library is.
        let libgcc = image.beside("libc.so.6", "libgcc_s.so.1")?;
        image.program(&libgcc)?;
        for plugin in PLUGINS.iter().chain(&["vici"]) {
            image.program(&PathBuf::from(format!("/usr/lib/ipsec/plugins/libstrongswan-{plugin}.so")))?;
        }
        for module in MODULES {
            image.module(&self.kernel.join("modules"), module)?;
        }
        let plugins = PLUGINS.join(" ");
        // What the journal would get goes to the file.
        image.file(
            "/etc/strongswan.conf",
            0o644,
            format!(
                "charon-systemd {{\n load = {plugins} vici\n journal {{ default = -1 }}\n \
                 filelog {{ log {{ path = /var/log/charon.log\n default = 1\n ike = 2\n cfg = 2\n knl = 2\n flush_line = yes }} }}\n}}\n\
                 swanctl {{ load = random }}\n"
            ),
        );
        let modules: Vec<String> =
            image.modules().iter().map(|module| format!("insmod /modules/{module}.ko")).collect();
        let init = INIT.replace("MODULES", &modules.join("\n")).replace("IP", &ip.display().to_string());
        let init = init.replace("ADDRESS", &ADDRESS.to_string());
        image.file("/init", 0o755, init);
        Ok(image)
    }
}

fn which(program: &str) -> Result<PathBuf, String> {
    let found = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(|it| Path::new(it).join(program));
    found
        .into_iter()
        .find(|it| it.exists())
        .ok_or_else(|| format!("{program} is not here; scripts/deps.sh test"))
}

impl Guest {
    /// Boots one on the lab's underlay, and comes back when it takes commands.
    pub fn boot(lab: &Lab, parts: &Parts) -> Self {
        let at = |name: &str| lab.dir().join(name);
        let (initrd, console, line) = (at("guest.cpio"), at("guest.console"), at("guest.line"));
        fs::write(&initrd, parts.image().unwrap().archive()).unwrap();
        let tap = "ip tuntap add dev guest mode tap && ip link set guest master ul0 up";
        lab.check("underlay", &["sh", "-c", tap]).unwrap();
        let text = |path: &Path| path.display().to_string();
        let words = [
            parts.qemu.as_str(),
            "-M",
            "pc",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-smp",
            "1",
            "-m",
            "256",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-kernel",
            &text(&parts.kernel.join("vmlinuz")),
            "-initrd",
            &text(&initrd),
            "-append",
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check random.trust_cpu=on",
            "-netdev",
            "tap,id=net,ifname=guest,script=no,downscript=no",
            "-device",
            "virtio-net-pci,netdev=net,mac=02:00:0a:00:00:b4,romfile=",
            "-serial",
            &format!("file:{}", text(&console)),
            "-chardev",
            &format!("socket,id=line,path={},server=on,wait=off", text(&line)),
            "-serial",
            "chardev:line",
        ];
        let mut qemu = lab.command("underlay", &words).unwrap();
        let mut qemu =
            qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
        let mut to = None;
        until(LIMIT, "qemu listens", || {
            assert!(qemu.try_wait().unwrap().is_none(), "qemu has ended");
            to = UnixStream::connect(&line).ok();
            to.is_some()
        });
        let to = to.unwrap();
        to.set_read_timeout(Some(BOOT)).unwrap();
        let mut guest = Self { qemu, console, from: BufReader::new(to.try_clone().unwrap()), to };
        while guest.line() != "READY" {}
        guest.to.set_read_timeout(Some(ANSWER)).unwrap();
        guest
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        match self.from.read_line(&mut line) {
            Ok(1..) => line.trim().to_owned(),
            end => {
                let console = fs::read_to_string(&self.console).unwrap_or_default();
                panic!("the guest says nothing: {end:?}; its console:\n{console}")
            }
        }
    }

    /// Runs a script: whether it succeeded, and all that it said.
    pub fn run(&mut self, script: &str) -> (bool, String) {
        self.to.write_all(format!("{}\n", STANDARD.encode(script)).as_bytes()).unwrap();
        let mut said = String::new();
        loop {
            let line = self.line();
            if let Some(status) = line.strip_prefix("END ") {
                let said = STANDARD.decode(said).unwrap();
                return (status == "0", String::from_utf8_lossy(&said).into_owned());
            }
            said += &line;
        }
    }

    /// Runs a script that must succeed.
    #[track_caller]
    pub fn check(&mut self, script: &str) -> String {
        let (done, said) = self.run(script);
        assert!(done, "in the guest, {script}: {said}");
        said
    }

    /// Starts charon with this `swanctl.conf`.
    pub fn charon(&mut self, config: &str) {
        self.check(&format!("mkdir -p /etc/swanctl; cat >/etc/swanctl/swanctl.conf <<'END'\n{config}\nEND"));
        // Its own log is on the file; it must not hold the serial line.
        self.check(&format!("{CHARON} </dev/null >/tmp/charon.out 2>&1 &"));
        let begin = Instant::now();
        loop {
            let (done, said) = self.run("swanctl --stats");
            if done {
                break;
            }
            assert!(begin.elapsed() < LIMIT, "charon does not answer: {said}\n{}", self.charon_log());
        }
        if !config.is_empty() {
            self.check("swanctl --load-all --noprompt");
        }
    }

    pub fn charon_log(&mut self) -> String {
        self.run("cat /var/log/charon.log").1
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
