//! From the underlay to the devices: receive, tell IKE from ESP, open, check, merge, write.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use esp::{Entry, Opened, SaTable};
use linux::udp::{self, Received};
use nix::errno::Errno;
use packet::ecn::{self, Ecn};
use packet::encap::{self, Kind};
use packet::merge::{Merged, Merger, Offloads};
use packet::{ip, protocol, vnet};

use crate::dataplane::count::{Counts, Reason};
use crate::dataplane::limit::PerSource;
use crate::dataplane::state::{Device, Origin, Peer, Shared, State};
use crate::dataplane::watch::{Waker, Watch, Work};
use crate::dataplane::{Direction, Error, Signal};

/// Messages for one call, and the bytes of each: as much as UDP GRO puts together.
const MESSAGES: usize = 4;
const MESSAGE: usize = 65_536;
/// Packets that are merged at once.
const BATCH: usize = 512;
/// Pieces of most superpackets, and of all: the header and what [`packet::merge`] joins.
const PIECES: usize = 66;
const PIECES_MAX: usize = 514;
/// IKE datagrams a second from one address: many hosts behind one NAT may come back at once.
const IKE_EACH: u32 = 256;
/// ICMP echo replies (RFC 792, RFC 4443 §4.2), and the bytes before their data.
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REPLY_V6: u8 = 129;
const ECHO_LEN: usize = 8;

/// The receiving thread.
pub(super) struct Receiver {
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    watch: Watch<Source>,
    buffers: Vec<Vec<u8>>,
    received: Vec<Received>,
    inner: Inner,
}

/// What does not depend on the buffers.
struct Inner {
    merger: Merger,
    ike: PerSource,
    unknown: PerSource,
}

/// One of the shared sockets.
struct Source {
    shared: Arc<Shared>,
    pick: fn(&Shared) -> Option<&udp::Socket>,
    /// IKE alone comes here, without a marker.
    ike: bool,
}
