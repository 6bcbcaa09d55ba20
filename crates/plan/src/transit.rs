//! The addresses between a host and its routers: a /31 (RFC 3021) for each, from link-local space (RFC 3927), so they
//! clash with nobody's networks and are never routed beyond the host.

use std::net::Ipv4Addr;

/// What the pairs are cut from.
pub const RANGE: &str = "169.254.240.0/20";
/// How many routers a host can have.
pub const SLOTS: u16 = 2048;

/// The host's and the router's address of slot number `slot`, which is less than [`SLOTS`].
pub fn pair(slot: u16) -> (Ipv4Addr, Ipv4Addr) {
    let base = u32::from(Ipv4Addr::new(169, 254, 240, 0)) + 2 * u32::from(slot % SLOTS);
    (Ipv4Addr::from(base), Ipv4Addr::from(base + 1))
}
