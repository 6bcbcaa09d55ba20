//! The one binary's rooms.

pub mod cli;
pub mod client;
pub mod lab;
