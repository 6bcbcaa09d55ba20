//! `lab-capture`: takes the frames and answers what is asked on standard input, until that ends.

use std::collections::{BTreeMap, VecDeque};
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, SystemTime};
use std::{fs, io};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg,
    setsockopt, socket, sockopt,
};

use super::look::{Ports, Seen, Side, What, look};
use super::search::{Search, unhex};
use super::{Flow, Found, Report};
use crate::lab::supervisor::say;

/// What is said after a file was written.
pub(super) const WRITTEN: &str = "written";
/// The largest frame: a superpacket and its headers.
const FRAME_MAX: usize = 1 << 17;
/// Bytes of frames that wait in the kernel.
const BACKLOG: usize = 64 << 20;
/// How many different flows are told apart.
const FLOWS_MAX: usize = 8192;
/// How many frames with a text in them are kept.
const FOUND_MAX: usize = 32;
/// How many bytes of other frames are kept, the last ones, and how much of each.
const KEPT_MAX: usize = 16 << 20;
const KEPT_OF_EACH: usize = 2048;
/// `PACKET_OUTGOING` of packet(7).
const OUTGOING: u8 = 4;

/// A frame's place: the number of the device, and the frame's ends and kind.
type Key = (usize, Side, Side, What);

struct Sniffer {
    socket: OwnedFd,
    buffer: Vec<u8>,
    devices: BTreeMap<usize, Device>,
    ports: Ports,
    search: Search,
    flows: BTreeMap<Key, (u64, u64)>,
    report: Report,
    /// Frames with a text in them.
    evidence: Vec<Kept>,
    last: VecDeque<Kept>,
    last_bytes: usize,
}

/// A device of the underlay, and which of its frames are counted: of a node's port what comes in, of a bridge what its
/// own system sends. So each frame is counted once, where it leaves a node.
#[derive(Debug, Clone)]
struct Device {
    node: Option<String>,
    outgoing: bool,
}

struct Kept {
    at: Duration,
    length: usize,
    bytes: Vec<u8>,
}

/// The verb. `texts` are in hexadecimal.
pub(in crate::lab) fn main(control_port: u16, texts: &[String]) -> Result<()> {
    let texts: Option<Vec<Vec<u8>>> = texts.iter().map(|text| unhex(text)).collect();
    let mut sniffer = Sniffer::new(control_port, &texts.context("a text is not in hexadecimal")?)?;
    let mut asked = Vec::new();
    loop {
        let stdin = io::stdin();
        let mut fds = [
            PollFd::new(sniffer.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let told = fds[1].any().unwrap_or(false);
        // First what had come when we were asked.
        sniffer.drain()?;
        if told {
            let mut some = [0; 4096];
            let read = io::stdin().read(&mut some)?;
            if read == 0 {
                return Ok(());
            }
            asked.extend(&some[..read]);
            while let Some(end) = asked.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = asked.drain(..=end).collect();
                say(&sniffer.answer(String::from_utf8_lossy(&line).trim())?)?;
            }
        }
    }
}

impl Sniffer {
    fn new(control_port: u16, texts: &[Vec<u8>]) -> Result<Self> {
        let all = Some(SockProtocol::EthAll);
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all)
            .context("cannot capture on the underlay")?;
        // The larger one takes a privilege that root in a user namespace has not.
        if setsockopt(&socket, sockopt::RcvBufForce, &BACKLOG).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &BACKLOG)?;
        }
        setsockopt(&socket, sockopt::RxqOvfl, &1)?;
        Ok(Self {
            socket,
            buffer: vec![0; FRAME_MAX],
            devices: BTreeMap::new(),
            ports: Ports::new(control_port),
            search: Search::new(texts),
            flows: BTreeMap::new(),
            report: Report::default(),
            evidence: Vec::new(),
            last: VecDeque::new(),
            last_bytes: 0,
        })
    }

    /// Takes all frames that are there.
    fn drain(&mut self) -> Result<()> {
        loop {
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let mut control = nix::cmsg_space!(u32);
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
            let received =
                recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), flags);
            let (length, from) = match received {
                Ok(message) => {
                    for control in message.cmsgs()? {
                        if let ControlMessageOwned::RxqOvfl(dropped) = control {
                            self.report.missed = u64::from(dropped);
                        }
                    }
                    (message.bytes, message.address)
                }
                Err(Errno::EAGAIN) => return Ok(()),
                // A port went down: a node was switched off.
                Err(Errno::EINTR | Errno::ENETDOWN) => continue,
                Err(error) => return Err(error).context("cannot capture on the underlay"),
            };
            let Some(from) = from else { continue };
            let device = self.device(from.ifindex());
            if device.node.is_some() && device.outgoing == (from.pkttype() == OUTGOING) {
                self.take(from.ifindex(), length);
            }
        }
    }

    /// Numbers are never given again in a namespace; a node that is switched on has another port.
    fn device(&mut self, index: usize) -> Device {
        let known = self.devices.entry(index).or_insert_with(|| {
            let name = u32::try_from(index).ok().and_then(|index| nix::net::if_::if_indextoname(index).ok());
            let name = name.and_then(|name| name.into_string().ok()).unwrap_or_default();
            let node = match (name.strip_prefix("ul-"), name.strip_prefix("ln-")) {
                (Some(node), _) => Some(node.to_owned()),
                (_, Some(nat)) => Some(format!("{nat} inside")),
                (None, None) => (name != "lo" && !name.is_empty()).then(|| "underlay".to_owned()),
            };
            let outgoing = !name.starts_with("ul-") && !name.starts_with("ln-");
            Device { node, outgoing }
        });
        known.clone()
    }

    fn take(&mut self, index: usize, length: usize) {
        let frame = &self.buffer[..length.min(FRAME_MAX)];
        let seen = look(frame, &mut self.ports);
        let Seen { source, destination, what, .. } = seen;
        let found = self.search.find(frame, &seen);
        self.report.frames += 1;
        self.report.bytes += length as u64;
        let key = (index, source, destination, what);
        if self.flows.len() < FLOWS_MAX || self.flows.contains_key(&key) {
            let (frames, bytes) = self.flows.entry(key).or_default();
            *frames += 1;
            *bytes += length as u64;
        } else {
            self.report.unlisted += 1;
        }
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if let Some(text) = found {
            self.report.finds += 1;
            if self.evidence.len() < FOUND_MAX {
                self.evidence.push(Kept { at, length, bytes: frame.to_vec() });
                let node =
                    self.devices.get(&index).and_then(|device| device.node.clone()).unwrap_or_default();
                self.report.found.push(Found { text, node, source, destination, what });
                return;
            }
        }
        let bytes = frame[..frame.len().min(KEPT_OF_EACH)].to_vec();
        self.last_bytes += bytes.len();
        self.last.push_back(Kept { at, length, bytes });
        while self.last_bytes > KEPT_MAX
            && let Some(oldest) = self.last.pop_front()
        {
            self.last_bytes -= oldest.bytes.len();
        }
    }

    fn answer(&self, asked: &str) -> Result<String> {
        Ok(match asked.strip_prefix("write ") {
            Some(file) => match self.write(Path::new(file)) {
                Ok(()) => WRITTEN.to_owned(),
                Err(error) => error.to_string(),
            },
            None => serde_json::to_string(&self.report())?,
        })
    }

    fn report(&self) -> Report {
        let mut report = self.report.clone();
        let node = |index| self.devices.get(index).and_then(|device| device.node.clone()).unwrap_or_default();
        for ((index, source, destination, what), (frames, bytes)) in &self.flows {
            let flow = Flow {
                node: node(index),
                source: *source,
                destination: *destination,
                what: *what,
                frames: *frames,
                bytes: *bytes,
            };
            // A node that was switched off and on had two ports.
            let same = |other: &&mut Flow| {
                (&other.node, other.source, other.destination, other.what)
                    == (&flow.node, flow.source, flow.destination, flow.what)
            };
            match report.flows.iter_mut().find(same) {
                Some(other) => {
                    other.frames += flow.frames;
                    other.bytes += flow.bytes;
                }
                None => report.flows.push(flow),
            }
        }
        report.flows.sort();
        report
    }

    /// draft-ietf-opsawg-pcap, with microseconds and link type Ethernet.
    fn write(&self, file: &Path) -> io::Result<()> {
        let mut out = io::BufWriter::new(fs::File::create(file)?);
        let head = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 0x0004_0000, 1];
        out.write_all(&head.map(u32::to_le_bytes).concat())?;
        let mut frames: Vec<&Kept> = self.evidence.iter().chain(&self.last).collect();
        frames.sort_by_key(|kept| kept.at);
        for Kept { at, length, bytes } in frames {
            let head = [at.as_secs() as u32, at.subsec_micros(), bytes.len() as u32, *length as u32];
            out.write_all(&head.map(u32::to_le_bytes).concat())?;
            out.write_all(bytes)?;
        }
        out.flush()
    }
}
