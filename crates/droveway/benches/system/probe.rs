//! Pings from a container, by a raw ICMP socket (RFC 792) that was opened in its namespace.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use droveway::lab::Lab;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, socket,
};

const LIMIT: Duration = Duration::from_secs(10);
const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;

/// A socket in a container.
pub struct Probe {
    socket: OwnedFd,
    sequence: u16,
}

impl Probe {
    /// Opens it in a namespace that is bound below `/run/netns` of that host.
    pub fn open(lab: &Lab, host: &str, netns: &str) -> Result<Self> {
        let path = format!("/proc/{}/root/run/netns/{netns}", lab.pid_of(host)?);
        let there = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        // A socket stays where it was opened; the thread that went there ends.
        let opener = std::thread::spawn(move || -> Result<OwnedFd> {
            setns(there.as_fd(), CloneFlags::CLONE_NEWNET)?;
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            Ok(socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Icmp)?)
        });
        let Ok(socket) = opener.join() else { bail!("the thread in {netns} of {host} panicked") };
        Ok(Self { socket: socket?, sequence: 0 })
    }

    /// Pings each millisecond until an answer comes; says how many pings came before the one that was answered.
    pub fn until_answered(&mut self, address: IpAddr) -> Result<u32> {
        let IpAddr::V4(address) = address else { bail!("{address} is no IPv4 address") };
        let deadline = Instant::now() + LIMIT;
        let mut lost = 0;
        loop {
            self.sequence = self.sequence.wrapping_add(1);
            let to = SockaddrIn::from(SocketAddrV4::new(address, 0));
            // Refused while the way is not known yet.
            let _ = sendto(self.socket.as_raw_fd(), &echo(self.sequence), &to, MsgFlags::empty());
            let next = Instant::now() + Duration::from_millis(1);
            while Instant::now() < next {
                if self.answer(address)? {
                    return Ok(lost);
                }
            }
            lost += 1;
            ensure!(Instant::now() < deadline, "{address} did not answer a ping in 10 s");
        }
    }

    fn answer(&self, from: Ipv4Addr) -> Result<bool> {
        poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(1_u8))?;
        let mut packet = [0; 256];
        let Ok(length) = recv(self.socket.as_raw_fd(), &mut packet, MsgFlags::empty()) else {
            return Ok(false);
        };
        // A raw socket shows the IP header (RFC 791): its length, and the source from byte 12 on.
        let packet = packet.get(..length).unwrap_or_default();
        let header = packet.first().map_or(0, |first| usize::from(first & 15) * 4);
        Ok(packet.get(12..16) == Some(&from.octets()) && packet.get(header) == Some(&ECHO_REPLY))
    }
}

fn echo(sequence: u16) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = ECHO;
    packet[4..6].copy_from_slice(b"dw");
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    let mut sum: u32 = packet.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}
