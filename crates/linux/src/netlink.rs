//! Netlink sockets: requests with their answers, dumps, and events (RFC 3549; `linux/netlink.h`).
//!
//! A socket stays bound to the network namespace it was opened in, whatever thread uses it. Requests may be sent in a
//! row: the kernel carries them out in order and answers each, also after one that failed.
//!
//! Invariant: only what the kernel itself sent is looked at. Whoever is root in a container's namespace could send to
//! our sockets there too.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    DecodeError, Emitable, ErrorMessage, NLM_F_ACK, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR,
    NLM_F_MULTIPART, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable, NlasIterator, Parseable, ParseableParametrized, parse_string,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkHeader, LinkMessage};
use netlink_sys::constants::NLMSGERR_ATTR_MSG;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use crate::error::Error;

/// What one read takes at most. The kernel fills dumps up to this size.
const BUFFER: usize = 64 << 10;
/// `IFLA_GSO_IPV4_MAX_SIZE`, which libc does not know for every system.
const IFLA_GSO_IPV4_MAX_SIZE: u16 = 63;
/// How many bytes of events may wait to be read before the kernel drops them and says so.
const EVENT_BUFFER: usize = 16 << 20;
/// How often an interrupted dump is asked for again.
const DUMP_ATTEMPTS: usize = 16;

/// The messages that one kind of netlink socket carries.
pub(crate) trait Protocol: NetlinkSerializable + NetlinkDeserializable {
    /// The kind's number.
    const NUMBER: isize;
    /// The kind in words.
    const NAME: &str;

    /// Reads what is needed of a message that is longer than that; `None` for one that is to be read whole.
    fn read_needed(_header: &NetlinkHeader, _payload: &[u8]) -> Option<Result<Self, DecodeError>> {
        None
    }
}

impl Protocol for RouteNetlinkMessage {
    const NUMBER: isize = NETLINK_ROUTE;
    const NAME: &str = "route";

    fn read_needed(header: &NetlinkHeader, payload: &[u8]) -> Option<Result<Self, DecodeError>> {
        match header.message_type {
            libc::RTM_NEWLINK => Some(link(payload).map(Self::NewLink)),
            libc::RTM_DELLINK => Some(link(payload).map(Self::DelLink)),
            _ => None,
        }
    }
}

/// A device's message has some sixty attributes, most of them about what others do with devices. Those that nobody here
/// asks for cost nothing, and may be of any shape.
fn link(payload: &[u8]) -> Result<LinkMessage, DecodeError> {
    const NEEDED: [u16; 9] = [
        libc::IFLA_IFNAME,
        libc::IFLA_ADDRESS,
        libc::IFLA_MTU,
        libc::IFLA_MASTER,
        libc::IFLA_PROTINFO,
        libc::IFLA_LINKINFO,
        libc::IFLA_IFALIAS,
        libc::IFLA_GSO_MAX_SIZE,
        IFLA_GSO_IPV4_MAX_SIZE,
    ];
    let mut message = LinkMessage::default();
    message.header = LinkHeader::parse(payload)?;
    for attribute in NlasIterator::new(&payload[message.header.buffer_len()..]) {
        let attribute = attribute?;
        if NEEDED.contains(&attribute.kind()) {
            let family = message.header.interface_family;
            message.attributes.push(LinkAttribute::parse_with_param(&attribute, family)?);
        }
    }
    Ok(message)
}

impl Protocol for NetfilterMessage {
    const NUMBER: isize = NETLINK_NETFILTER;
    const NAME: &str = "netfilter";
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

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        errno(&error).into()
    }
}

/// A request: what is asked, and the flags of its header.
pub(crate) type Request<M> = NetlinkMessage<M>;

/// The answer to one request: the messages that came, or a refusal.
pub(crate) type Answer<M> = Result<Vec<M>, Refusal>;

/// What came of a request so far.
type Pending<M> = (Vec<M>, Option<Result<(), Refusal>>);

/// A request with those header flags; `NLM_F_REQUEST` is added.
pub(crate) fn request<M>(message: M, flags: u16) -> Request<M> {
    let mut header = NetlinkHeader::default();
    header.flags = flags | NLM_F_REQUEST;
    NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message))
}

/// A message that came in, not yet read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Incoming<'a> {
    pub(crate) header: NetlinkHeader,
    bytes: &'a [u8],
}

impl<'a> Incoming<'a> {
    /// What follows the header.
    pub(crate) fn payload(&self) -> &'a [u8] {
        NetlinkBuffer::new(self.bytes).payload()
    }

    /// Reads it.
    pub(crate) fn read<M: Protocol>(&self) -> Result<NetlinkPayload<M>, DecodeError> {
        match M::read_needed(&self.header, self.payload()) {
            Some(read) => read.map(NetlinkPayload::InnerMessage),
            None => NetlinkMessage::deserialize(self.bytes).map(|message| message.payload),
        }
    }
}

/// The messages of a datagram; one that is cut short, and what follows it, is not there.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Incoming<'_>> {
    std::iter::from_fn(move || {
        let buffer = NetlinkBuffer::new_checked(datagram).ok()?;
        let header = NetlinkHeader::parse(&buffer).ok()?;
        let length = header.length as usize;
        let bytes = datagram.get(..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Incoming { header, bytes })
    })
}

/// A message that the library cannot read is passed over, and that is logged.
pub(crate) fn unread(header: NetlinkHeader, error: &DecodeError) {
    tracing::debug!(kind = header.message_type, %error, "passing over a netlink message that cannot be read");
}

/// A socket for requests.
#[derive(Debug)]
pub(crate) struct Requests<M> {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    speaks: PhantomData<fn(M)>,
}

impl<M: Protocol> Requests<M> {
    /// Opens a socket in the namespace of the calling thread.
    pub(crate) fn open() -> Result<Self, Error> {
        Ok(Self { socket: open::<M>()?, sequence: 0, buffer: vec![0; BUFFER], speaks: PhantomData })
    }

    /// Sends one request and waits for its answer.
    pub(crate) fn request(&mut self, request: Request<M>) -> Answer<M> {
        self.requests(vec![request]).pop().unwrap_or(Err(Errno::EIO.into()))
    }

    /// Sends requests in a row; one answer for each, in order.
    pub(crate) fn requests(&mut self, requests: Vec<Request<M>>) -> Vec<Answer<M>> {
        let first = self.sequence.wrapping_add(1);
        let count = requests.len();
        let mut datagram = Vec::new();
        for request in requests {
            self.append(&mut datagram, request, NLM_F_ACK);
        }
        match self.send(&datagram) {
            Ok(()) => self.collect(first, count, None),
            Err(refusal) => (0..count).map(|_| Err(refusal.clone())).collect(),
        }
    }

    /// All objects that answer a dump request, consistent: one that was changed meanwhile is asked for again.
    pub(crate) fn dump(&mut self, request: &Request<M>) -> Answer<M>
    where
        M: Clone,
    {
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

    fn dump_once(&mut self, request: Request<M>) -> Result<(Vec<M>, bool), Refusal> {
        let mut datagram = Vec::new();
        let sequence = self.append(&mut datagram, request, NLM_F_DUMP);
        self.send(&datagram)?;
        let mut replies = Vec::new();
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            for message in messages(&self.buffer[..length]) {
                let header = message.header;
                if header.sequence_number != sequence {
                    continue;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                let ended = match message.read::<M>() {
                    Ok(NetlinkPayload::Done(done)) => refusal(done.code, &done.extended_ack),
                    Ok(NetlinkPayload::Error(error)) => acknowledgement(&error, header.flags),
                    Ok(NetlinkPayload::Overrun(_)) => {
                        interrupted = true;
                        continue;
                    }
                    Ok(NetlinkPayload::InnerMessage(message)) => {
                        replies.push(message);
                        if header.flags & NLM_F_MULTIPART != 0 {
                            continue;
                        }
                        Ok(())
                    }
                    Ok(_) => continue,
                    Err(error) => {
                        unread(header, &error);
                        continue;
                    }
                };
                return match ended {
                    Ok(()) => Ok((replies, interrupted)),
                    Err(refusal) if refusal.errno == Errno::EINTR => Ok((replies, true)),
                    Err(refusal) => Err(refusal),
                };
            }
        }
    }

    /// Reads until each of `count` requests from `first` on was answered, or the one numbered `begin` was refused.
    fn collect(&mut self, first: u32, count: usize, begin: Option<u32>) -> Vec<Answer<M>> {
        let mut answers: Vec<Pending<M>> = (0..count).map(|_| (Vec::new(), None)).collect();
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
                let header = message.header;
                let payload = message.read::<M>();
                if Some(header.sequence_number) == begin
                    && let Ok(NetlinkPayload::Error(error)) = &payload
                    && let Err(refusal) = acknowledgement(error, header.flags)
                {
                    return (0..count).map(|_| Err(refusal.clone())).collect();
                }
                let Some(answer) = answers.get_mut(header.sequence_number.wrapping_sub(first) as usize)
                else {
                    continue;
                };
                match payload {
                    Ok(NetlinkPayload::InnerMessage(message)) => answer.0.push(message),
                    Ok(NetlinkPayload::Error(error)) if answer.1.is_none() => {
                        answer.1 = Some(acknowledgement(&error, header.flags));
                        open -= 1;
                    }
                    Ok(_) => {}
                    Err(error) => unread(header, &error),
                }
            }
        }
        answers
            .into_iter()
            .map(|(replies, outcome)| outcome.unwrap_or(Err(Errno::EIO.into())).map(|()| replies))
            .collect()
    }

    /// Appends the request under the next sequence number, which is returned.
    fn append(&mut self, datagram: &mut Vec<u8>, mut request: Request<M>, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        request.header.flags |= flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let start = datagram.len();
        let end = start + request.buffer_len();
        datagram.resize(end.next_multiple_of(4), 0);
        request.serialize(&mut datagram[start..end]);
        self.sequence
    }

    fn send(&self, datagram: &[u8]) -> Result<(), Refusal> {
        retry(|| self.socket.send(datagram, 0)).map(drop).map_err(Refusal::from)
    }

    fn receive(&mut self) -> Result<usize, Refusal> {
        Ok(receive(&self.socket, &mut self.buffer, 0)?)
    }
}

impl Requests<NetfilterMessage> {
    /// Sends nftables requests as one transaction: all take effect, or none and the first refusal is returned.
    pub(crate) fn transaction(&mut self, requests: Vec<Request<NetfilterMessage>>) -> Result<(), Refusal> {
        let control = |message| {
            let header =
                NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, libc::NFNL_SUBSYS_NFTABLES as u16);
            request(NetfilterMessage::new(header, message), 0)
        };
        let count = requests.len();
        let mut datagram = Vec::new();
        let begin = self.append(&mut datagram, control(ControlMessage::BatchBegin), 0);
        for request in requests {
            self.append(&mut datagram, request, NLM_F_ACK);
        }
        self.append(&mut datagram, control(ControlMessage::BatchEnd), 0);
        self.send(&datagram)?;
        self.collect(begin.wrapping_add(1), count, Some(begin))
            .into_iter()
            .try_for_each(|answer| answer.map(drop))
    }
}

/// A socket for events.
#[derive(Debug)]
pub(crate) struct Events {
    socket: Socket,
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
    pub(crate) fn open<M: Protocol>(groups: &[u32]) -> Result<Self, Error> {
        let mut socket = open::<M>()?;
        if setsockopt(&socket, sockopt::RcvBufForce, &EVENT_BUFFER).is_err() {
            // Without CAP_NET_ADMIN in the first user namespace the system's limit holds; overflow is handled.
            let _ = setsockopt(&socket, sockopt::RcvBuf, &EVENT_BUFFER);
        }
        // In this order: binding would end memberships.
        socket
            .bind_auto()
            .and_then(|_| groups.iter().try_for_each(|group| socket.add_membership(*group)))
            .map_err(|error| Error::io(format!("subscribe to netlink events ({})", M::NAME), &error))?;
        Ok(Self { socket, buffer: vec![0; BUFFER] })
    }

    /// The next datagram, without waiting.
    pub(crate) fn next(&mut self) -> Result<Seen<'_>, Errno> {
        match receive(&self.socket, &mut self.buffer, libc::MSG_DONTWAIT).map_err(|error| errno(&error)) {
            Ok(length) => Ok(Seen::Datagram(&self.buffer[..length])),
            Err(Errno::EAGAIN) => Ok(Seen::Nothing),
            Err(Errno::ENOBUFS) => Ok(Seen::Lost),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn open<M: Protocol>() -> Result<Socket, Error> {
    let socket = Socket::new(M::NUMBER)
        .map_err(|error| Error::io(format!("open a netlink socket ({})", M::NAME), &error))?;
    // Both only make refusals shorter and clearer; kernels before 4.12 do without.
    let _ = socket.set_cap_ack(true);
    let _ = socket.set_ext_ack(true);
    Ok(socket)
}

/// The next datagram from the kernel.
fn receive(socket: &Socket, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    const KERNEL: u32 = 0;
    loop {
        let (length, from) = retry(|| socket.recv_from(&mut &mut *buffer, flags))?;
        if SocketAddr::port_number(&from) == KERNEL {
            return Ok(length.min(buffer.len()));
        }
    }
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The outcome in an `NLMSG_ERROR` message (`struct nlmsgerr`).
fn acknowledgement(error: &ErrorMessage, flags: u16) -> Result<(), Refusal> {
    // After the error number comes the request, its header alone or all of it; then the kernel's words.
    let request = match NetlinkBuffer::new_checked(&error.header) {
        Ok(request) if flags & NLM_F_CAPPED == 0 => request.length() as usize,
        _ => size_of::<libc::nlmsghdr>(),
    };
    refusal(error.raw_code(), error.header.get(request.next_multiple_of(4)..).unwrap_or_default())
}

/// The outcome with that code, 0 or a negative error number, and those attributes.
fn refusal(code: i32, attributes: &[u8]) -> Result<(), Refusal> {
    if code >= 0 {
        return Ok(());
    }
    let words = NlasIterator::new(attributes)
        .flatten()
        .find(|attribute| i32::from(attribute.kind()) == NLMSGERR_ATTR_MSG)
        .and_then(|attribute| parse_string(attribute.value()).ok());
    Err(Refusal { errno: Errno::from_raw(code.wrapping_neg()), words })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::DefaultNla;
    use netlink_packet_netfilter::nftables::{
        DataAttribute, ListAttribute, NfTablesMessage, SetElementAttribute, SetElementList, SetElementMessage,
    };
    use netlink_packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkInfo};
    use netlink_sys::protocols::NETLINK_USERSOCK;

    use super::*;

    fn bytes<M: Protocol>(message: M) -> Vec<u8> {
        let mut request = request(message, NLM_F_ACK);
        request.header.sequence_number = 42;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        bytes
    }

    fn link() -> RouteNetlinkMessage {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName("vxlan0".to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vxlan),
                LinkInfo::Data(InfoData::Vxlan(vec![InfoVxlan::Id(77), InfoVxlan::Port(4789)])),
            ]),
        ];
        RouteNetlinkMessage::NewLink(link)
    }

    fn element() -> NetfilterMessage {
        let key = SetElementAttribute::Key(DataAttribute::Value(vec![1, 2, 3, 4]));
        let attributes = vec![
            SetElementList::Set("vtep".to_owned()),
            SetElementList::Elements(vec![ListAttribute::Element(vec![key])]),
        ];
        let header = NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0);
        NetfilterMessage::new(header, NfTablesMessage::NewSetElement(SetElementMessage { attributes }))
    }

    #[test]
    fn messages_in_a_row_are_read_back() {
        let mut datagram = bytes(link());
        datagram.resize(datagram.len().next_multiple_of(4), 0);
        datagram.extend(bytes(link()));
        let read: Vec<_> = messages(&datagram).collect();
        assert_eq!(read.len(), 2);
        for message in read {
            assert_eq!(
                (message.header.sequence_number, message.header.flags),
                (42, NLM_F_ACK | NLM_F_REQUEST)
            );
            assert_eq!(message.read().unwrap(), NetlinkPayload::InnerMessage(link()));
        }
    }

    #[test]
    fn of_a_device_only_what_is_needed_is_read_whatever_the_rest_is_like() {
        let mut message = LinkMessage::default();
        let name = LinkAttribute::IfName("br0".to_owned());
        let odd = DefaultNla::new(libc::IFLA_OPERSTATE, vec![1, 2, 3]);
        message.attributes = vec![LinkAttribute::Other(odd), name.clone(), LinkAttribute::GroMaxSize(1)];
        let bytes = bytes(RouteNetlinkMessage::NewLink(message));
        let read = messages(&bytes).next().unwrap().read().unwrap();
        let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(read)) = read else {
            panic!("{read:?}")
        };
        assert_eq!(read.attributes, [name]);
    }

    #[test]
    fn bytes_cut_anywhere_are_refused_without_panic() {
        fn check<M: Protocol>(whole: &[u8]) {
            for end in 0..whole.len() {
                let mut cut = whole[..end].to_vec();
                assert_eq!(messages(&cut).count(), 0, "a message that is not all there is not there");
                if cut.len() >= 4 {
                    cut[..4].copy_from_slice(&(end as u32).to_ne_bytes());
                    for message in messages(&cut) {
                        let _ = message.read::<M>();
                    }
                }
            }
        }
        check::<RouteNetlinkMessage>(&bytes(link()));
        check::<NetfilterMessage>(&bytes(element()));
        assert_eq!(messages(&[0; 64]).count(), 0, "a message of no length ends the walk");
    }

    #[test]
    fn what_another_process_sends_is_not_looked_at() {
        // Of this kind anybody may send to anybody.
        let mut ours = Socket::new(NETLINK_USERSOCK).unwrap();
        let address = ours.bind_auto().unwrap();
        let theirs = Socket::new(NETLINK_USERSOCK).unwrap();
        theirs.send_to(&bytes(link()), &address, 0).unwrap();
        let outcome = receive(&ours, &mut [0; 4096], libc::MSG_DONTWAIT);
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_refusal_has_the_kernels_words_whether_the_request_is_repeated_or_not() {
        let request = bytes(link());
        let words = [&11_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), b"no way\0\0"].concat();
        for (repeated, flags) in [(&request[..16], NLM_F_CAPPED), (&request[..], 0)] {
            let mut error = ErrorMessage::default();
            error.code = std::num::NonZeroI32::new(-17);
            error.header = [repeated, &words].concat();
            let refusal = acknowledgement(&error, flags).unwrap_err();
            assert_eq!((refusal.errno, refusal.words.as_deref()), (Errno::EEXIST, Some("no way")));
        }
        assert!(acknowledgement(&ErrorMessage::default(), NLM_F_CAPPED).is_ok());
    }
}
