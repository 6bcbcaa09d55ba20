//! The server as its clients meet it: over TLS, on a port of its own.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod addresses;
mod edges;
mod enrolment;
mod etcd;
mod harness;
mod incarnations;
mod limits;
mod networks;
mod peers;
mod restoring;
mod running;
mod several;
mod starting;
mod watching;
