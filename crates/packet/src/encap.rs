//! IKE and ESP on one UDP port (RFC 3948).

/// Four zero bytes, where an SPI would be, before each IKE message (RFC 3948 §2.2).
pub const NON_ESP_MARKER: [u8; 4] = [0; 4];
/// The payload that keeps a NAT's mapping alive (RFC 3948 §2.3).
pub const KEEPALIVE: [u8; 1] = [0xff];

/// What a datagram to the tunnel port holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// Keeps a NAT's mapping; to be ignored.
    Keepalive,
    /// An IKE message, without its marker.
    Ike(&'a [u8]),
    /// An ESP packet with this SPI (never 0).
    Esp(u32),
    /// Shorter than any of these.
    Runt,
}

/// Tells IKE, ESP and keepalives apart.
#[inline]
pub fn classify(datagram: &[u8]) -> Kind<'_> {
    match datagram.split_first_chunk::<4>() {
        Some((&NON_ESP_MARKER, ike)) => Kind::Ike(ike),
        Some((spi, _)) => Kind::Esp(u32::from_be_bytes(*spi)),
        None if datagram == KEEPALIVE => Kind::Keepalive,
        None => Kind::Runt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_known_by_its_first_bytes() {
        assert_eq!(classify(&[0xff]), Kind::Keepalive);
        assert_eq!(classify(&[0, 0, 0, 0, 7, 8]), Kind::Ike(&[7, 8]));
        assert_eq!(classify(&[0, 0, 0, 1, 7, 8]), Kind::Esp(1));
        assert_eq!(classify(&[0xff, 0xff, 0xff, 0xff]), Kind::Esp(0xffff_ffff));
        assert_eq!(classify(&[]), Kind::Runt);
        assert_eq!(classify(&[0xfe]), Kind::Runt);
        assert_eq!(classify(&[0, 0, 0]), Kind::Runt);
    }
}
