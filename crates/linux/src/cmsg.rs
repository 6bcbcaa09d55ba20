//! What sendmsg(2) and recvmsg(2) are called with: addresses, control messages (cmsg(3)), options.

use std::mem::zeroed;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc::{self, c_int};

use crate::udp::Family;

/// A socket address as the kernel has it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) union Name {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    pub(crate) fn zero() -> Self {
        // SAFETY: zeroes are valid for both: plain numbers.
        unsafe { zeroed() }
    }

    /// The address, and how many bytes of it count.
    pub(crate) fn of(address: SocketAddr) -> (Self, libc::socklen_t) {
        let mut name = Self::zero();
        match address {
            SocketAddr::V4(address) => {
                name.v4.sin_family = libc::AF_INET as libc::sa_family_t;
                name.v4.sin_port = address.port().to_be();
                name.v4.sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
                (name, size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(address) => {
                name.v6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                name.v6.sin6_port = address.port().to_be();
                name.v6.sin6_addr.s6_addr = address.ip().octets();
                name.v6.sin6_scope_id = address.scope_id();
                (name, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    pub(crate) fn read(&self, family: Family) -> SocketAddr {
        match family {
            Family::V4 => {
                // SAFETY: plain numbers, whatever was written; a socket of this family writes this one.
                let name = unsafe { self.v4 };
                let address = Ipv4Addr::from(name.sin_addr.s_addr.to_ne_bytes());
                SocketAddrV4::new(address, u16::from_be(name.sin_port)).into()
            }
            Family::V6 => {
                // SAFETY: as above.
                let name = unsafe { self.v6 };
                let address = Ipv6Addr::from(name.sin6_addr.s6_addr);
                SocketAddrV6::new(address, u16::from_be(name.sin6_port), 0, name.sin6_scope_id).into()
            }
        }
    }
}

/// Room for what travels beside a datagram: pktinfo, class and segment length are 88 bytes at most, and the kernel adds
/// nothing else.
pub(crate) const CONTROL: usize = 128;

/// Control messages (cmsg(3)).
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(crate) struct Control([u8; CONTROL]);

/// Where a control message's value begins.
const VALUE: usize = length_of(0);

/// A control message's length without padding.
const fn length_of(value: usize) -> usize {
    // SAFETY: arithmetic.
    unsafe { libc::CMSG_LEN(value as libc::c_uint) as usize }
}

/// A control message's length with padding.
const fn space_of(value: usize) -> usize {
    // SAFETY: arithmetic.
    unsafe { libc::CMSG_SPACE(value as libc::c_uint) as usize }
}

impl Control {
    pub(crate) fn new() -> Self {
        Self([0; CONTROL])
    }

    /// Puts a message at `at`; where the next one goes.
    pub(crate) fn put<T: Plain>(&mut self, at: usize, level: c_int, kind: c_int, value: T) -> usize {
        let end = at + space_of(size_of::<T>());
        let Some(room) = self.0.get_mut(at..end) else { return at };
        // SAFETY: zeroes are a valid `cmsghdr`: plain numbers.
        let mut header: libc::cmsghdr = unsafe { zeroed() };
        header.cmsg_len = length_of(size_of::<T>()) as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        // SAFETY: the room is that of a header and, from `VALUE` on, of the value; neither needs to be aligned.
        unsafe {
            room.as_mut_ptr().cast::<libc::cmsghdr>().write_unaligned(header);
            room.as_mut_ptr().add(VALUE).cast::<T>().write_unaligned(value);
        }
        end
    }

    /// Puts where to send from, unless the kernel is to choose.
    pub(crate) fn put_source(&mut self, at: usize, local: SocketAddr) -> usize {
        if local.ip().is_unspecified() {
            return at;
        }
        match local {
            SocketAddr::V4(local) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(local.ip().octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                self.put(at, libc::IPPROTO_IP, libc::IP_PKTINFO, info)
            }
            SocketAddr::V6(local) => {
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: local.ip().octets() },
                    ipi6_ifindex: local.scope_id() as _,
                };
                self.put(at, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info)
            }
        }
    }

    /// Level, kind and value of each message in the first `length` bytes.
    pub(crate) fn iter(&self, length: usize) -> impl Iterator<Item = (c_int, c_int, &[u8])> {
        let mut rest = self.0.get(..length).unwrap_or_default();
        std::iter::from_fn(move || {
            let header = read::<libc::cmsghdr>(rest)?;
            #[allow(clippy::unnecessary_cast, reason = "its type is another with other C libraries")]
            let length = header.cmsg_len as usize;
            let value = rest.get(VALUE..length)?;
            rest = rest.get(space_of(value.len())..).unwrap_or_default();
            Some((header.cmsg_level, header.cmsg_type, value))
        })
    }
}

/// A number, or a C struct of numbers.
///
/// # Safety
/// Any bytes of its size are a value of it.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: all are numbers, or C structs of them.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for c_int {}
// SAFETY: as above.
unsafe impl Plain for libc::in_pktinfo {}
// SAFETY: as above.
unsafe impl Plain for libc::in6_pktinfo {}
// SAFETY: as above.
unsafe impl Plain for libc::cmsghdr {}

/// A value from the first bytes; `None` if there are too few.
pub(crate) fn read<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: as many bytes are there, and any are a value.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

pub(crate) fn message(
    name: &mut Name,
    name_length: libc::socklen_t,
    part: &mut libc::iovec,
    control: &mut Control,
    control_length: usize,
) -> libc::msghdr {
    // SAFETY: zeroes are a valid `msghdr`: null pointers and lengths of 0.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = (&raw mut *name).cast();
    message.msg_namelen = name_length;
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut *control).cast();
    message.msg_controllen = control_length as _;
    message
}

pub(crate) fn set(fd: &impl AsRawFd, level: c_int, option: c_int, value: c_int) -> Result<(), Errno> {
    let length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads one int, which outlives the call.
    let outcome =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    Errno::result(outcome).map(drop)
}

pub(crate) fn get(fd: &impl AsRawFd, level: c_int, option: c_int) -> Result<c_int, Errno> {
    let mut value: c_int = 0;
    let mut length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one int and its length, which outlive the call.
    let outcome =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut length) };
    Errno::result(outcome).map(|_| value)
}
