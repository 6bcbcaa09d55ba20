//! Random values, digests, and comparison of secrets.

use aws_lc_rs::{constant_time, digest, rand};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use model::Fingerprint;

use crate::Error;

/// Fresh random bytes from the operating system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| Error::Random)?;
    Ok(bytes)
}

/// A new secret of 256 bits, as text.
pub(crate) fn secret() -> Result<String, Error> {
    Ok(BASE64_URL_SAFE_NO_PAD.encode(random::<32>()?))
}

/// SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> Fingerprint {
    let mut octets = [0; 32];
    octets.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    Fingerprint(octets)
}

/// Whether two digests are equal, in a time that does not depend on where they differ.
pub(crate) fn same(a: &Fingerprint, b: &Fingerprint) -> bool {
    constant_time::verify_slices_are_equal(&a.0, &b.0).is_ok()
}
