//! A ping that goes on, and must lose nothing.

use std::process::Child;
use std::time::{Duration, Instant};

use droveway::lab::{Container, Lab};

use crate::support::{LIMIT, Look, until};
use crate::watch::pattern;

/// It goes on for so long at least: what it is to survive may be over in no time.
const LEAST: Duration = Duration::from_millis(500);

pub struct Steady {
    child: Child,
    begun: Instant,
}

impl Steady {
    /// Begins, twenty times a second, with the canary.
    pub fn start(lab: &Lab, from: &Container, to: &Container) -> Self {
        Self::start_saying(lab, &from.path(), &["-p", &pattern(), &to.ip().to_string()])
    }

    /// The same from anywhere, by some words before.
    pub fn start_with(lab: &Lab, from: &str, words: &[&str], to: &str) -> Self {
        let ping = ["ping", "-n", "-i", "0.05", "-W", "1", to];
        let command: Vec<&str> = words.iter().chain(&ping).copied().collect();
        Self { child: lab.spawn(from, &command).unwrap(), begun: Instant::now() }
    }

    /// The same with options of ping, the address among them.
    pub fn start_saying(lab: &Lab, from: &str, options: &[&str]) -> Self {
        let command = [&["ping", "-n", "-i", "0.05", "-W", "1"], options].concat();
        Self { child: lab.spawn(from, &command).unwrap(), begun: Instant::now() }
    }

    /// How many were sent and received.
    pub fn end(self, lab: &Lab, from: &Container) -> (u32, u32) {
        self.end_at(lab, &from.path())
    }

    /// The same from anywhere.
    pub fn end_at(self, lab: &Lab, from: &str) -> (u32, u32) {
        until(LIMIT, "pings went on for a while", || self.begun.elapsed() > LEAST);
        lab.check(from, &["pkill", "-INT", "-x", "ping"]).unwrap();
        let output = self.child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|line| line.contains("packets transmitted")).unwrap().to_owned();
        let mut numbers = line.split_whitespace().filter_map(|word| word.parse().ok());
        let (sent, received): (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
        let last = text
            .lines()
            .rev()
            .find_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok());
        // The very last was perhaps still on its way.
        (if last == Some(sent - 1) { sent - 1 } else { sent }, received)
    }
}
