//! What the kernel should look like. Pure: no kernel types, no input or output, no clock.
//!
//! [`desired`] turns the snapshot and the agent's own record into [`object`]s; [`diff`] compares them with what was
//! observed and gives [`Step`]s, removals first. The room `linux` observes and applies; only the agent's reconciler
//! calls it.
//!
//! Invariant: applying a diff and diffing again yields nothing.

mod diff;
pub mod object;

pub use diff::{Scope, Step, diff};
pub use object::{Key, Object, Place, State};
