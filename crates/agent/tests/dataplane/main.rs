//! The packet path between two hosts in namespaces, over real TUN devices and UDP sockets.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod offloads;
mod relay;
mod rig;
#[allow(dead_code, reason = "shared with the tests of the kernel's room")]
#[path = "../../../linux/tests/sandbox/mod.rs"]
mod sandbox;
mod traffic;
mod trouble;
