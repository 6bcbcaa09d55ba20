//! Addresses of devices.

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage::{self, DelAddress, NewAddress};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};

use crate::netlink::{Request, request};
use crate::route::family;

/// Adds an address with those flags; no duplicate address detection.
pub(crate) fn addition(index: u32, address: IpNet, flags: AddressFlags) -> Request<RouteNetlinkMessage> {
    let nodad = if address.addr().is_ipv6() { AddressFlags::Nodad } else { AddressFlags::empty() };
    let mut message = message(index, address);
    message.attributes.push(AddressAttribute::Flags(flags | nodad));
    request(NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Removes an address.
pub(crate) fn removal(index: u32, address: IpNet) -> Request<RouteNetlinkMessage> {
    request(DelAddress(message(index, address)), 0)
}

fn message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes =
        vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
    message
}
