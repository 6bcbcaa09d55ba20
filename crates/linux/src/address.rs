//! Addresses of devices.

use ipnet::IpNet;

use crate::message::{Request, family};
use crate::uapi::{
    IFA_ADDRESS, IFA_F_NODAD, IFA_FLAGS, IFA_LOCAL, NLM_F_CREATE, NLM_F_REPLACE, RTM_DELADDR, RTM_NEWADDR,
};

/// Adds an address with those flags; no duplicate address detection.
pub(crate) fn request(index: u32, address: IpNet, flags: u32) -> Request {
    let nodad = if address.addr().is_ipv6() { IFA_F_NODAD } else { 0 };
    message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, address).put_u32(IFA_FLAGS, flags | nodad)
}

/// Removes an address.
pub(crate) fn removal(index: u32, address: IpNet) -> Request {
    message(RTM_DELADDR, 0, index, address)
}

/// `struct ifaddrmsg`.
fn message(kind: u16, flags: u16, index: u32, address: IpNet) -> Request {
    let mut header = [0; 8];
    header[0] = family(address.addr());
    header[1] = address.prefix_len();
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    Request::new(kind, flags, &header).put_ip(IFA_LOCAL, address.addr()).put_ip(IFA_ADDRESS, address.addr())
}
