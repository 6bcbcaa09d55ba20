//! Droveway as a whole, in labs: server, agents and containers on several hosts.
//!
//! Needs no root where the kernel allows user namespaces; what needs Docker Engines says so and is passed over without.
#![allow(clippy::unwrap_used, reason = "these are tests: clippy takes only functions marked so for tests")]
#![allow(clippy::large_stack_arrays, reason = "bodies that are too large")]

mod api;
mod away;
mod bogus;
mod charon;
mod clock;
mod copied;
mod docker;
mod docker_label;
mod doctor;
mod drift;
mod faults;
mod foreign_charon;
mod foreign_kernel;
mod frame;
mod gateway;
mod guest;
mod identity;
mod interop;
mod ipsec;
mod ipv6;
mod isolation;
mod killed_server;
mod lab;
mod lab_bare;
mod leaves;
mod load;
mod mended;
mod nat;
mod outside;
mod probe;
mod put_back;
mod red;
mod refused;
mod rekeys;
mod retained;
mod servers;
mod several;
mod spoof;
mod steady;
mod support;
mod table;
mod walk;
mod watch;
