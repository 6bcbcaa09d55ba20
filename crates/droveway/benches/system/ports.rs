//! Ports of a bridge made by hand, in a namespace of their own on a host of a lab: what of an attach the kernel takes by itself.
//!
//! One `ip` makes them all, so that no start of a program is measured.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use droveway::lab::Lab;

use crate::host::batch;

/// The namespace of the bridge.
const NETNS: &str = "byhand";

/// A bridge with pairs of devices, each with its other end in a namespace as a container's.
pub struct Ports<'a> {
    lab: &'a Lab,
    node: String,
    ip: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    count: usize,
    /// Namespaces made.
    made: usize,
}

impl<'a> Ports<'a> {
    /// A bridge without ports, made as an agent's router has it.
    pub fn new(lab: &'a Lab, node: &str) -> Result<Self> {
        batch(lab, node, &format!("netns add {NETNS}\n"))?;
        let off = |which| format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        for which in ["default", "all"] {
            let write = format!("echo 1 > {}", off(which));
            lab.check(node, &["ip", "netns", "exec", NETNS, "sh", "-c", &write])?;
        }
        let mut command = lab.command(node, &["ip", "-oneline", "-netns", NETNS, "-batch", "-"])?;
        let mut ip = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = ip.stdin.take().context("there is no pipe")?;
        let stdout = BufReader::new(ip.stdout.take().context("there is no pipe")?);
        let mut this = Self { lab, node: node.to_owned(), ip, stdin, stdout, count: 0, made: 0 };
        this.run(
            "link add br0 address 02:00:00:00:00:01 type bridge forward_delay 0 mcast_snooping 0\nlink set br0 mtu 1450 up\n",
        )?;
        Ok(this)
    }

    /// Makes sure that there are namespaces for so many ports.
    pub fn prepare(&mut self, count: usize) -> Result<()> {
        let mut names = String::new();
        while self.made < count {
            self.made += 1;
            writeln!(names, "netns add {NETNS}-{}", self.made)?;
        }
        batch(self.lab, &self.node, &names)
    }

    /// Adds ports until there are so many.
    pub fn fill(&mut self, count: usize) -> Result<()> {
        self.prepare(count)?;
        while self.count < count {
            self.add()?;
        }
        Ok(())
    }

    /// Adds a port, and says how long that took.
    pub fn add(&mut self) -> Result<Duration> {
        self.count += 1;
        let n = self.count;
        self.run(&format!(
            "link add v{n} type veth peer name eth0 netns {NETNS}-{n}\nlink set v{n} master br0 up\n"
        ))
    }

    /// Removes the last port.
    pub fn remove(&mut self) -> Result<()> {
        let n = self.count;
        self.count -= 1;
        self.run(&format!("link del v{n}\n")).map(drop)
    }

    /// Has `ip` do that, and then something that is told on one line.
    fn run(&mut self, lines: &str) -> Result<Duration> {
        let start = Instant::now();
        self.stdin.write_all(format!("{lines}link show dev lo\n").as_bytes())?;
        let mut answer = String::new();
        self.stdout.read_line(&mut answer)?;
        ensure!(answer.contains("LOOPBACK"), "ip on {} did not do {lines:?}", self.node);
        Ok(start.elapsed())
    }
}

impl Drop for Ports<'_> {
    fn drop(&mut self) {
        // Its namespaces go with the lab's host.
        drop(self.ip.kill());
        drop(self.ip.wait());
    }
}
