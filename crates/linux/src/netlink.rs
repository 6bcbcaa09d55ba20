//! Netlink sockets: requests with their answers, dumps, and events.
//!
//! A socket stays bound to the network namespace it was opened in, whatever thread uses it. Requests may be sent in a
//! row: the kernel carries them out in order and answers each, also after one that failed.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sockopt,
};

use crate::error::Error;
use crate::message::{Request, attribute, messages, text, u32_at};
use crate::uapi::{
    NETLINK_CAP_ACK, NETLINK_EXT_ACK, NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_SUBSYS_NFTABLES,
    NLM_F_ACK, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_MULTI, NLMSG_DONE, NLMSG_ERROR,
    NLMSG_OVERRUN, NLMSGERR_ATTR_MSG, SOL_NETLINK,
};

/// What one read takes at most. The kernel fills dumps up to this size.
const BUFFER: usize = 64 << 10;
/// How many bytes of events may wait to be read before the kernel drops them and says so.
const EVENT_BUFFER: usize = 16 << 20;
/// How often an interrupted dump is asked for again.
const DUMP_ATTEMPTS: usize = 16;

/// Which netlink family a socket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Devices, addresses, routes, rules, neighbours.
    Route,
    /// nftables.
    Netfilter,
}

/// Why the kernel refused a request.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) errno: Errno,
    pub(crate) words: Option<String>,
}

impl Refusal {
    pub(crate) fn to_error(&self, attempted: impl Into<String>) -> Error {
        Error::kernel(attempted, self.errno, self.words.clone())
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { errno, words: None }
    }
}

/// The answer to one request: the messages that came, or a refusal.
pub(crate) type Answer = Result<Vec<Reply>, Refusal>;

/// What came of a request so far.
type Pending = (Vec<Reply>, Option<Result<(), Refusal>>);

/// A message that answers a request.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) kind: u16,
    pub(crate) payload: Vec<u8>,
}

/// A socket for requests.
#[derive(Debug)]
pub(crate) struct Requests {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Requests {
    /// Opens a socket in the namespace of the calling thread.
    pub(crate) fn open(protocol: Protocol) -> Result<Self, Error> {
        Ok(Self { fd: open(protocol, 0)?, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Sends one request and waits for its answer.
    pub(crate) fn request(&mut self, request: Request) -> Answer {
        self.requests(vec![request]).pop().unwrap_or(Err(Errno::EIO.into()))
    }

    /// Sends requests in a row; one answer for each, in order.
    pub(crate) fn requests(&mut self, requests: Vec<Request>) -> Vec<Answer> {
        let first = self.sequence.wrapping_add(1);
        let count = requests.len();
        let mut datagram = Vec::new();
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            datagram.extend(request.with_flags(NLM_F_ACK).finish(self.sequence));
        }
        match self.send(&datagram) {
            Ok(()) => self.collect(first, count, None),
            Err(errno) => (0..count).map(|_| Err(errno.into())).collect(),
        }
    }

    /// Sends nftables requests as one transaction: all take effect, or none and the first refusal is returned.
    pub(crate) fn transaction(&mut self, requests: Vec<Request>) -> Result<(), Refusal> {
        let header = [0, 0, NFNL_SUBSYS_NFTABLES.to_be_bytes()[0], NFNL_SUBSYS_NFTABLES.to_be_bytes()[1]];
        let count = requests.len();
        self.sequence = self.sequence.wrapping_add(1);
        let begin = self.sequence;
        let mut datagram = Request::new(NFNL_MSG_BATCH_BEGIN, 0, &header).finish(begin);
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            datagram.extend(request.with_flags(NLM_F_ACK).finish(self.sequence));
        }
        self.sequence = self.sequence.wrapping_add(1);
        datagram.extend(Request::new(NFNL_MSG_BATCH_END, 0, &header).finish(self.sequence));
        self.send(&datagram)?;
        self.collect(begin.wrapping_add(1), count, Some(begin))
            .into_iter()
            .try_for_each(|answer| answer.map(drop))
    }

    /// All objects that answer a dump request, consistent: one that was changed meanwhile is asked for again.
    pub(crate) fn dump(&mut self, request: &Request) -> Answer {
        let mut found = Vec::new();
        for _ in 0..DUMP_ATTEMPTS {
            let (replies, interrupted) = self.dump_once(request.clone())?;
            if !interrupted {
                return Ok(replies);
            }
            found = replies;
        }
        // The events that follow will correct what changed while it was read.
        Ok(found)
    }

    fn dump_once(&mut self, request: Request) -> Result<(Vec<Reply>, bool), Refusal> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        self.send(&request.with_flags(NLM_F_DUMP).finish(sequence))?;
        let mut replies = Vec::new();
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            for message in messages(&self.buffer[..length]).filter(|message| message.sequence == sequence) {
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_DONE => {
                        return match refusal(message.payload, 4) {
                            Some(refusal) if refusal.errno == Errno::EINTR => Ok((replies, true)),
                            Some(refusal) => Err(refusal),
                            None => Ok((replies, interrupted)),
                        };
                    }
                    NLMSG_ERROR => {
                        return match acknowledgement(message.payload, message.flags) {
                            Err(refusal) if refusal.errno == Errno::EINTR => Ok((replies, true)),
                            Err(refusal) => Err(refusal),
                            Ok(()) => Ok((replies, interrupted)),
                        };
                    }
                    NLMSG_OVERRUN => interrupted = true,
                    kind => {
                        replies.push(Reply { kind, payload: message.payload.to_vec() });
                        if message.flags & NLM_F_MULTI == 0 {
                            return Ok((replies, interrupted));
                        }
                    }
                }
            }
        }
    }

    /// Reads until each of `count` requests from `first` on was answered, or the one numbered `begin` was refused.
    fn collect(&mut self, first: u32, count: usize, begin: Option<u32>) -> Vec<Answer> {
        let mut answers: Vec<Pending> = (0..count).map(|_| (Vec::new(), None)).collect();
        let mut open = count;
        while open > 0 {
            let length = match self.receive() {
                Ok(length) => length,
                Err(refusal) => {
                    for answer in &mut answers {
                        answer.1.get_or_insert_with(|| Err(refusal.clone()));
                    }
                    break;
                }
            };
            for message in messages(&self.buffer[..length]) {
                if message.kind == NLMSG_ERROR
                    && Some(message.sequence) == begin
                    && let Err(refusal) = acknowledgement(message.payload, message.flags)
                {
                    return (0..count).map(|_| Err(refusal.clone())).collect();
                }
                let Some(answer) = answers.get_mut(message.sequence.wrapping_sub(first) as usize) else {
                    continue;
                };
                if message.kind != NLMSG_ERROR {
                    answer.0.push(Reply { kind: message.kind, payload: message.payload.to_vec() });
                } else if answer.1.is_none() {
                    answer.1 = Some(acknowledgement(message.payload, message.flags));
                    open -= 1;
                }
            }
        }
        answers
            .into_iter()
            .map(|(replies, outcome)| outcome.unwrap_or(Err(Errno::EIO.into())).map(|()| replies))
            .collect()
    }

    fn send(&self, datagram: &[u8]) -> Result<(), Errno> {
        loop {
            match socket::send(self.fd.as_raw_fd(), datagram, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn receive(&mut self) -> Result<usize, Refusal> {
        loop {
            match socket::recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => return Ok(length),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// A socket for events.
#[derive(Debug)]
pub(crate) struct Events {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// What a look at the event socket found.
#[derive(Debug)]
pub(crate) enum Seen<'a> {
    /// A datagram of messages.
    Datagram(&'a [u8]),
    /// Nothing waits.
    Nothing,
    /// The kernel dropped events: what is known must be read anew.
    Lost,
}

impl Events {
    /// Subscribes to the groups, in the namespace of the calling thread.
    pub(crate) fn open(protocol: Protocol, groups: &[u32]) -> Result<Self, Error> {
        let mask = groups.iter().fold(0, |mask, group| mask | 1 << (group - 1));
        let fd = open(protocol, mask)?;
        if socket::setsockopt(&fd, sockopt::RcvBufForce, &EVENT_BUFFER).is_err() {
            // Without CAP_NET_ADMIN in the first user namespace the system's limit holds; overflow is handled.
            let _ = socket::setsockopt(&fd, sockopt::RcvBuf, &EVENT_BUFFER);
        }
        Ok(Self { fd, buffer: vec![0; BUFFER] })
    }

    /// The next datagram, without waiting.
    pub(crate) fn next(&mut self) -> Result<Seen<'_>, Errno> {
        loop {
            match socket::recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => return Ok(Seen::Datagram(&self.buffer[..length])),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Seen::Nothing),
                Err(Errno::ENOBUFS) => return Ok(Seen::Lost),
                Err(errno) => return Err(errno),
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open(protocol: Protocol, groups: u32) -> Result<OwnedFd, Error> {
    let number = match protocol {
        Protocol::Route => SockProtocol::NetlinkRoute,
        Protocol::Netfilter => SockProtocol::NetlinkNetFilter,
    };
    let attempted = || format!("open a netlink socket ({protocol:?})");
    let fd = socket::socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, number)
        .map_err(|errno| Error::errno(attempted(), errno))?;
    socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))
        .map_err(|errno| Error::errno(attempted(), errno))?;
    // Both only make refusals shorter and clearer; kernels before 4.12 do without.
    set_flag(&fd, NETLINK_CAP_ACK);
    set_flag(&fd, NETLINK_EXT_ACK);
    Ok(fd)
}

fn set_flag(fd: &OwnedFd, option: i32) {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open for the whole call, and the value is an int of the length that is given.
    unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            SOL_NETLINK,
            option,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}

/// The outcome in an `NLMSG_ERROR` message (`struct nlmsgerr`).
fn acknowledgement(payload: &[u8], flags: u16) -> Result<(), Refusal> {
    // After the error number comes the request: its header alone, or all of it.
    let request = if flags & NLM_F_CAPPED != 0 {
        crate::message::HEADER
    } else {
        u32_at(payload, 4).map_or(crate::message::HEADER, |length| length as usize).next_multiple_of(4)
    };
    refusal(payload, 4 + request).map_or(Ok(()), Err)
}

/// The refusal in a payload that begins with an error number and has its words from `words_at` on.
fn refusal(payload: &[u8], words_at: usize) -> Option<Refusal> {
    let number = u32_at(payload, 0).unwrap_or(0).cast_signed();
    if number >= 0 {
        return None;
    }
    let words = attribute(payload.get(words_at..).unwrap_or_default(), NLMSGERR_ATTR_MSG).map(text);
    Some(Refusal { errno: Errno::from_raw(number.wrapping_neg()), words })
}
