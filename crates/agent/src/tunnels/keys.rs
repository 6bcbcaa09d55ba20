//! The one seam that traffic keys cross: from IKE's child event to the ESP engine's security association.
//!
//! Invariant: each key becomes one association and no second: a sequence number must never come again under it.

use esp::{BadKey, Inbound, KeyMaterial, Limits, Outbound, Sequence, Spi, Suite};
use ike::crypto::{Encr, Secret};
use ike::{ChildSa, wire::EspSpi};

/// Why a child cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    /// The engine takes no such key.
    #[error(transparent)]
    Key(#[from] BadKey),
    /// An SPI that is never on the wire.
    #[error("SPI {0:08x} is reserved")]
    Spi(u32),
}

/// The association to open with.
pub(super) fn inbound(sa: &ChildSa) -> Result<Inbound, Unusable> {
    Ok(Inbound::new(spi(sa.spi)?, &material(sa)?, sequence(sa))?)
}

/// The association to seal with.
pub(super) fn outbound(sa: &ChildSa) -> Result<Outbound, Unusable> {
    let sequence = sequence(sa);
    Ok(Outbound::new(spi(sa.spi)?, &material(sa)?, sequence, Limits::of(sequence))?)
}

/// IKE's SPI as the engine's.
pub(super) fn spi(spi: EspSpi) -> Result<Spi, Unusable> {
    Spi::new(spi.0).ok_or(Unusable::Spi(spi.0))
}

fn sequence(sa: &ChildSa) -> Sequence {
    if sa.suite.esn { Sequence::Extended } else { Sequence::Short }
}

/// Key, then salt (RFC 4106 §8.1). The copy wipes itself.
fn material(sa: &ChildSa) -> Result<KeyMaterial, BadKey> {
    let suite = match sa.key.encr {
        Encr::Aes128Gcm16 => Suite::Aes128Gcm16,
        Encr::Aes256Gcm16 => Suite::Aes256Gcm16,
    };
    let (key, salt) = (sa.key.key.expose(), sa.key.salt);
    let mut bytes = Vec::with_capacity(key.len() + salt.len());
    bytes.extend_from_slice(key);
    bytes.extend_from_slice(&salt);
    let bytes = Secret::new(bytes);
    KeyMaterial::new(suite, bytes.expose())
}
