//! The agent of one host: reconcile, attach, names, metadata, ledger, Docker.

pub mod control;
pub mod metadata;
pub mod names;
pub mod view;

pub use control::Control;
pub use view::View;

/// A new endpoint's id.
pub(crate) fn random_endpoint_id() -> model::EndpointId {
    model::EndpointId::from_random(random())
}

/// Random bytes from the operating system by way of the crypto library.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // The library's generator is seeded at start and cannot fail afterwards; were it to, ids would collide and the
    // server refuse them.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    bytes
}
