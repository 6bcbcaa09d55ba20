//! Why a packet was dropped.

/// Why a packet was not sealed or not opened. Each is counted ([`crate::Counters`]).
#[derive(thiserror::Error, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum Reason {
    /// No room for header, trailer and ICV.
    #[error("too short to be ESP")]
    TooShort,
    /// No SA has this SPI.
    #[error("unknown SPI")]
    UnknownSpi,
    /// The SA was stopped; its worker has not yet seen the new table.
    #[error("SA was removed")]
    Stopped,
    /// The sequence number was received before.
    #[error("replayed")]
    Replayed,
    /// The sequence number is left of the window.
    #[error("older than the replay window")]
    TooOld,
    /// The ICV does not hold.
    #[error("authentication failed")]
    Authentication,
    /// Authentic, but the padding does not count 1, 2, 3.
    #[error("bad padding")]
    BadPadding,
    /// Authentic, but not IPv4, IPv6 or a dummy.
    #[error("next header is no tunnel's")]
    BadNextHeader,
    /// The inner IP header does not hold.
    #[error("malformed inner packet")]
    BadInner,
    /// The peer may not send from this address.
    #[error("inner source is not the peer's")]
    InnerSource,
    /// The peer may not send to this address.
    #[error("inner destination is not of this network")]
    InnerDestination,
    /// No sequence number is left: the SA must be replaced.
    #[error("sequence numbers are used up")]
    Exhausted,
    /// Our misuse: the buffer has no room for the ESP packet.
    #[error("buffer too small for the ESP packet")]
    NoRoom,
}

impl Reason {
    /// All reasons, in the order in which they are counted.
    pub const ALL: [Self; 13] = [
        Self::TooShort,
        Self::UnknownSpi,
        Self::Stopped,
        Self::Replayed,
        Self::TooOld,
        Self::Authentication,
        Self::BadPadding,
        Self::BadNextHeader,
        Self::BadInner,
        Self::InnerSource,
        Self::InnerDestination,
        Self::Exhausted,
        Self::NoRoom,
    ];

    /// A short word for metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::TooShort => "too_short",
            Self::UnknownSpi => "unknown_spi",
            Self::Stopped => "stopped",
            Self::Replayed => "replayed",
            Self::TooOld => "too_old",
            Self::Authentication => "authentication",
            Self::BadPadding => "bad_padding",
            Self::BadNextHeader => "bad_next_header",
            Self::BadInner => "bad_inner",
            Self::InnerSource => "inner_source",
            Self::InnerDestination => "inner_destination",
            Self::Exhausted => "exhausted",
            Self::NoRoom => "no_room",
        }
    }
}
