//! Bodies of the fuzz targets in `fuzz/`: each must return for any input.

use crate::wire::{Certificate, Datagram, SaPayload};

/// A datagram from anybody.
pub fn datagram(bytes: &[u8]) {
    if let Ok(Datagram::Clear(message)) = Datagram::parse(bytes) {
        // What parses can be said again, and reads back as the same.
        if let Ok(again) = message.emit_clear() {
            assert_eq!(Datagram::parse(&again), Ok(Datagram::Clear(message)));
        }
    }
}

/// The body of an SA payload.
pub fn sa_payload(bytes: &[u8]) {
    if let Ok(sa) = SaPayload::parse(bytes) {
        let mut again = Vec::new();
        sa.emit(&mut again);
        assert_eq!(again.len(), sa.len());
        assert_eq!(SaPayload::parse(&again), Ok(sa));
    }
}

/// The body of a CERT payload.
pub fn cert_payload(bytes: &[u8]) {
    let _ = Certificate::parse(bytes);
}
