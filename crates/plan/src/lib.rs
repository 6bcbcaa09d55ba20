//! What the kernel should look like. Pure: no kernel types, no input or output, no clock.
//!
//! [`desired()`] turns the snapshot and the agent's own record into [`object`]s; [`diff()`] compares them with what was
//! observed and gives [`Step`]s, removals first. The room `linux` observes and applies; only the agent's reconciler
//! calls it.
//!
//! Invariant: applying a diff and diffing again yields nothing.

mod bridge;
mod desired;
mod diff;
mod firewall;
pub mod object;
mod shortcut;
pub mod transit;
mod tunnels;

pub use bridge::Bridge;
pub use desired::{
    Attachment, End, Local, ROUTER_PREFIX, TUN, desired, desired_attachment, desired_bridge, endpoint_mac,
    gateway_mac, handed_name, network_mtu, overlay_mac, port_name,
};
pub use diff::{Scope, Step, diff};
pub use object::{Key, Object, Place, State};
pub use tunnels::{Begins, Far, Inside, Proof, Tunnel, tunnels};

/// FNV-1a, 64 bits: a stable spread for device addresses and digests; nothing that security rests on.
pub(crate) fn hash(parts: &[&str]) -> u64 {
    let mut value = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in part.bytes().chain([0xff]) {
            value = (value ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    value
}
