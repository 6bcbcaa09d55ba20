//! The library part of the `droveway` program.

pub mod lab;
