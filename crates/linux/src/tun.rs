//! TUN devices: made to stay, and their queues, through which IP packets come and go with their offload header
//! (`Documentation/networking/tuntap.rst`, `struct virtio_net_hdr`).
//!
//! A device lives in its namespace without a queue: it is then without carrier and drops what is sent into it. Packets
//! of many segments pass whole both ways, which is what makes it fast; before each stands a header of [`HEADER`] bytes
//! in host order.
//!
//! Invariant: a queue belongs to a device that stays. Opening one makes none.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use netlink_packet_route::link::LinkAttribute;
use nix::errno::Errno;
use nix::libc;

use plan::object::Ifname;

use crate::bpf::steer;
use crate::error::Error;
use crate::namespace::get_link;
use crate::netlink::Requests;
use crate::netns::Netns;

/// The length of the header before each packet (`struct virtio_net_hdr`), in bytes.
pub const HEADER: usize = HEADER_LENGTH as usize;
const HEADER_LENGTH: u8 = 10;

const CLONE_DEVICE: &str = "/dev/net/tun";
/// What a device of ours is: IP packets with the offload header, by as many queues as want.
const FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
const TSO: libc::c_uint = libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// All queues of a TUN device: each worker has its own.
#[derive(Debug)]
pub struct Queues {
    /// What flows that send much wait in; where nobody steers, all flows.
    pub bulk: Vec<Queue>,
    /// What flows that send little wait in; none where nobody steers.
    pub sparse: Vec<Queue>,
    /// Why nobody steers.
    pub unsteered: Option<Error>,
}

impl Queues {
    /// Attaches to the device of that name with queues for so many workers, as [`Queue::open`], and has the kernel tell flows
    /// that send little from those that send much, where it does.
    pub fn open(netns: &Netns, name: &str, workers: u32) -> Result<Self, Error> {
        let open = |_| Queue::open(netns, name);
        let bulk = (0..workers).map(open).collect::<Result<Vec<_>, _>>()?;
        let mut queues = Self { bulk, sparse: Vec::new(), unsteered: None };
        let Some(first) = queues.bulk.first() else { return Ok(queues) };
        // The kernel counts queues in the order in which they are opened.
        let sparse = (0..workers).map(open).collect::<Result<Vec<_>, _>>()?;
        match steer::steer(first.as_fd(), workers) {
            Ok(()) => queues.sparse = sparse,
            Err(error) => {
                steer::leave(first.as_fd());
                queues.unsteered = Some(error);
            }
        }
        Ok(queues)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Queue> {
        self.bulk.iter().chain(&self.sparse)
    }

    /// [`Queue::restrict`] of all.
    pub fn restrict(&mut self, to: Offloads) -> Result<(), Error> {
        self.bulk.iter_mut().chain(&mut self.sparse).try_for_each(|queue| queue.restrict(to))
    }
}

/// One queue of a TUN device. It does not block.
#[derive(Debug)]
pub struct Queue {
    file: File,
    offloads: Offloads,
    long: bool,
}

/// What the kernel may leave to the reader of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// Transport checksums to be computed.
    pub checksum: bool,
    /// TCP to be cut into segments, of IPv4 and IPv6, with ECN.
    pub tso: bool,
    /// UDP to be cut into datagrams, of IPv4 and IPv6 (since Linux 6.2).
    pub uso: bool,
}

impl Queue {
    /// Attaches to the device of that name, which stays when the queue is closed. The kernel spreads flows over all
    /// queues that are open.
    ///
    /// Fails if there is no such device, or it is not one that stays.
    pub fn open(netns: &Netns, name: &str) -> Result<Self, Error> {
        let attempted = || format!("open a queue of device {name}");
        let (file, long) = netns.run(|| {
            let file = attach(name)?;
            // With its first queue the device has a carrier, but sends only once the kernel has taken note of that, which
            // it does by and by, or before it answers.
            let told = get_link(&mut Requests::open()?, &Ifname::new(name));
            let told = told.map_err(|refusal| refusal.to_error(attempted()))?;
            let is_limit = |it: &LinkAttribute| matches!(it, LinkAttribute::GsoIpv4MaxSize(_));
            let long = told.is_some_and(|device| device.attributes.iter().any(is_limit));
            Ok::<_, Error>((file, long))
        })??;
        if flags(&file).map_err(|errno| Error::errno(attempted(), errno))? & libc::IFF_PERSIST == 0 {
            // Attaching has just made it. It goes with the file.
            return Err(Error::kernel(attempted(), Errno::ENODEV, None));
        }
        let offloads = offload(&file).map_err(|errno| Error::errno(attempted(), errno))?;
        Ok(Self { file, offloads, long })
    }

    /// What the kernel leaves to this side.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Whether the kernel knows TCP superpackets of IPv4 that are longer than their header can say, with a length of 0 there
    /// (since Linux 6.3, which is told by a limit that devices have for them). Before 6.6 a device still refuses them.
    pub fn takes_long(&self) -> bool {
        self.long
    }

    /// Leaves no more to this side than that. It belongs to the device: all its queues are told the same.
    pub fn restrict(&mut self, to: Offloads) -> Result<(), Error> {
        let both = |a, b| a && b;
        let now = self.offloads;
        let wanted = Offloads {
            checksum: both(now.checksum, to.checksum),
            tso: both(now.tso, to.tso),
            uso: both(now.uso, to.uso),
        };
        let told = set_offload(&self.file, wanted);
        told.map_err(|errno| Error::errno("restrict the offloads of a TUN device".to_owned(), errno))?;
        self.offloads = wanted;
        Ok(())
    }

    /// Reads one packet with its header; how many bytes that was. `None` if none waits. A packet larger than the buffer
    /// is cut: one of 64 KB and a header is enough.
    ///
    /// `EBADFD` if the device was removed: the queue is then good for nothing.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        ready(|| (&self.file).read(buffer))
    }

    /// Writes one packet, header first, gathered from pieces (1,024 at most). `false` if it has to wait.
    ///
    /// `EIO` while the device is down, `EINVAL` for a header that does not fit the packet, `EBADFD` if the device was
    /// removed.
    pub fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<bool> {
        ready(|| (&self.file).write_vectored(pieces)).map(|written| written.is_some())
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether an error of a queue says that its device is down or removed, whatever is read or written.
pub fn is_gone(error: &io::Error) -> bool {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
    matches!(errno, Errno::EIO | Errno::EBADFD | Errno::EBADF | Errno::ENODEV)
}

/// Makes a device that stays, down and without queues, in the namespace. `EEXIST` if the name is taken.
pub(crate) fn make(netns: &Netns, name: &str) -> Result<(), Error> {
    let attempted = || format!("make TUN device {name}");
    netns.run(|| {
        if nix::net::if_::if_nametoindex(name).is_ok() {
            return Err(Error::errno(attempted(), Errno::EEXIST));
        }
        let file = attach(name)?;
        // SAFETY: the request takes its argument by value.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1) })
            .map(drop)
            .map_err(|errno| Error::errno(attempted(), errno))
    })?
}

/// Attaches to the device, or makes one that lasts as long as the file.
fn attach(name: &str) -> Result<File, Error> {
    let attempted = || format!("open TUN device {name}");
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(CLONE_DEVICE);
    let file = file.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::io(format!("open {CLONE_DEVICE}"), &error)
            .with_remedy("load the module tun, or give this container the device /dev/net/tun"),
        Some(_) | None => Error::io(format!("open {CLONE_DEVICE}"), &error),
    })?;
    let mut request = request();
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(Error::errno(attempted(), Errno::EINVAL));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed() as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    // SAFETY: the request is a whole `ifreq` that outlives the call, its name ended by a NUL.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
        .map_err(|errno| Error::errno(attempted(), errno))?;
    Ok(file)
}

/// `IFF_*` of the device that a file is attached to.
fn flags(file: &File) -> Result<libc::c_int, Errno> {
    let mut request = request();
    // SAFETY: the kernel writes one `ifreq`, which outlives the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: the request fills in the flags.
    Ok(libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }))
}

fn request() -> libc::ifreq {
    // SAFETY: zeroes are a valid `ifreq`: plain numbers.
    unsafe { std::mem::zeroed() }
}

/// Sets the header's length and takes on as much work as the kernel will leave to us. Both belong to the device.
fn offload(file: &File) -> Result<Offloads, Errno> {
    let length = libc::c_int::from(HEADER_LENGTH);
    // SAFETY: the kernel reads one int, which outlives the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) })?;
    let all = Offloads { checksum: true, tso: true, uso: true };
    let no_uso = Offloads { uso: false, ..all };
    let none = Offloads { checksum: false, tso: false, uso: false };
    for offloads in [all, no_uso, none] {
        match set_offload(file, offloads) {
            Ok(()) => return Ok(offloads),
            Err(Errno::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::EINVAL)
}

fn set_offload(file: &File, offloads: Offloads) -> Result<(), Errno> {
    let bit = |on: bool, bits: libc::c_uint| if on { bits } else { 0 };
    let features = bit(offloads.checksum, libc::TUN_F_CSUM) | bit(offloads.tso, TSO) | bit(offloads.uso, USO);
    let features = libc::c_ulong::from(features);
    // SAFETY: the request takes its argument by value.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, features) }).map(drop)
}

/// What a call that does not block did; `None` if it would have waited.
fn ready(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(length) => return Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
