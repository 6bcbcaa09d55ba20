//! The lab: a server and several hosts as namespaces on one machine, to try Droveway, to test it and to measure it.
//!
//! ```text
//! caller ── lab-init ── lab-init --inner     pid 1 of the lab: underlay bridge ul0 10.0.0.1
//!                         ├─ lab-node ── lab-node --inner   pid 1 of "server", eth0 10.0.0.2
//!                         │                ├─ droveway server
//!                         └─ lab-node ── lab-node --inner   pid 1 of "h1", eth0 10.0.0.5
//!                                          ├─ droveway agent, dockerd
//!                                          └─ lab-shim ── CMD     an endpoint: namespaces of its own
//! ```
//! Each node has its own process, mount, network, UTS and IPC namespaces, its own `/run`, and its own directory below
//! the lab's. Nobody restarts what dies: tests kill and start things themselves.
//!
//! Invariant: all processes, mounts, devices and namespaces of a lab live below one process id. Killing it, by whatever
//! signal, makes the kernel take away everything; what is left are cgroups and files, which [`Lab::down`] removes.
//!
//! No step forks by hand: a namespace of process ids is unshared and the program starts itself in it, by the verbs in
//! [`hidden`], which therefore must run in a process that has one thread.

pub mod capture;
pub mod cli;
mod control;
mod daemons;
mod enter;
pub mod hidden;
mod mounts;
mod nat;
mod node;
mod place;
mod process;
mod shim;
mod spec;
mod state;
mod supervisor;
mod underlay;

pub use control::{Container, Lab};
pub use daemons::Daemon;
pub use nat::{Nat, Together, boxes};
pub use shim::RunSpec;
pub use spec::{HOSTS_MAX, Kind, LabSpec, Node, SECOND, SERVER, STORE, UNDERLAY, default_dir};
pub use state::{Fault, NodeState, Pin, State};
