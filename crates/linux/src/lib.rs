//! The kernel: the only room that touches it.
//!
//! [`Kernel`] shows what there is as a [`plan::State`] and applies one [`plan::Step`] after the other. It holds no
//! policy: it neither decides what should be nor tries again.
//!
//! Invariant: only what is in the scope of [`plan::State`] is observed, and only what a step names is touched.
#![allow(unsafe_code)]

mod address;
mod arp;
mod bpf;
mod cmsg;
mod container;
mod error;
pub mod forward;
pub mod host;
mod kernel;
mod link;
pub mod look;
mod mirror;
mod namespace;
mod netlink;
pub mod netns;
mod nft;
mod parse;
mod route;
mod sysctl;
pub mod tun;
pub mod udp;
mod watch;

pub use error::{Error, StepError, name_of};
pub use kernel::{Kernel, NETNS_PREFIX, Waker, Woken};
