//! Notify payloads (RFC 7296 §3.10).

use super::code::codes;
use super::{EspSpi, Protocol, Reader};
use crate::error::{Error, syntax};

codes! {
    /// What is notified. Numbers below 16384 are errors.
    pub enum NotifyType: u16 {
        UnsupportedCriticalPayload = 1 => "UNSUPPORTED_CRITICAL_PAYLOAD",
        InvalidIkeSpi = 4 => "INVALID_IKE_SPI",
        InvalidMajorVersion = 5 => "INVALID_MAJOR_VERSION",
        InvalidSyntax = 7 => "INVALID_SYNTAX",
        InvalidMessageId = 9 => "INVALID_MESSAGE_ID",
        InvalidSpi = 11 => "INVALID_SPI",
        NoProposalChosen = 14 => "NO_PROPOSAL_CHOSEN",
        InvalidKePayload = 17 => "INVALID_KE_PAYLOAD",
        AuthenticationFailed = 24 => "AUTHENTICATION_FAILED",
        SinglePairRequired = 34 => "SINGLE_PAIR_REQUIRED",
        NoAdditionalSas = 35 => "NO_ADDITIONAL_SAS",
        InternalAddressFailure = 36 => "INTERNAL_ADDRESS_FAILURE",
        FailedCpRequired = 37 => "FAILED_CP_REQUIRED",
        TsUnacceptable = 38 => "TS_UNACCEPTABLE",
        InvalidSelectors = 39 => "INVALID_SELECTORS",
        UnacceptableAddresses = 40 => "UNACCEPTABLE_ADDRESSES",
        UnexpectedNatDetected = 41 => "UNEXPECTED_NAT_DETECTED",
        TemporaryFailure = 43 => "TEMPORARY_FAILURE",
        ChildSaNotFound = 44 => "CHILD_SA_NOT_FOUND",
        StateNotFound = 47 => "STATE_NOT_FOUND",
        TsMaxQueue = 48 => "TS_MAX_QUEUE",
        InitialContact = 16384 => "INITIAL_CONTACT",
        SetWindowSize = 16385 => "SET_WINDOW_SIZE",
        AdditionalTsPossible = 16386 => "ADDITIONAL_TS_POSSIBLE",
        IpcompSupported = 16387 => "IPCOMP_SUPPORTED",
        NatDetectionSourceIp = 16388 => "NAT_DETECTION_SOURCE_IP",
        NatDetectionDestinationIp = 16389 => "NAT_DETECTION_DESTINATION_IP",
        Cookie = 16390 => "COOKIE",
        UseTransportMode = 16391 => "USE_TRANSPORT_MODE",
        HttpCertLookupSupported = 16392 => "HTTP_CERT_LOOKUP_SUPPORTED",
        RekeySa = 16393 => "REKEY_SA",
        EspTfcPaddingNotSupported = 16394 => "ESP_TFC_PADDING_NOT_SUPPORTED",
        NonFirstFragmentsAlso = 16395 => "NON_FIRST_FRAGMENTS_ALSO",
        MobikeSupported = 16396 => "MOBIKE_SUPPORTED",
        AdditionalIp4Address = 16397 => "ADDITIONAL_IP4_ADDRESS",
        AdditionalIp6Address = 16398 => "ADDITIONAL_IP6_ADDRESS",
        NoAdditionalAddresses = 16399 => "NO_ADDITIONAL_ADDRESSES",
        UpdateSaAddresses = 16400 => "UPDATE_SA_ADDRESSES",
        Cookie2 = 16401 => "COOKIE2",
        NoNatsAllowed = 16402 => "NO_NATS_ALLOWED",
        AuthLifetime = 16403 => "AUTH_LIFETIME",
        MultipleAuthSupported = 16404 => "MULTIPLE_AUTH_SUPPORTED",
        Redirect = 16407 => "REDIRECT",
        EapOnlyAuthentication = 16417 => "EAP_ONLY_AUTHENTICATION",
        ChildlessIkev2Supported = 16418 => "CHILDLESS_IKEV2_SUPPORTED",
        Ikev2MessageIdSyncSupported = 16420 => "IKEV2_MESSAGE_ID_SYNC_SUPPORTED",
        FragmentationSupported = 16430 => "IKEV2_FRAGMENTATION_SUPPORTED",
        SignatureHashAlgorithms = 16431 => "SIGNATURE_HASH_ALGORITHMS",
        UsePpk = 16435 => "USE_PPK",
        IntermediateExchangeSupported = 16438 => "INTERMEDIATE_EXCHANGE_SUPPORTED",
        AdditionalKeyExchange = 16441 => "ADDITIONAL_KEY_EXCHANGE",
        SaResourceInfo = 16444 => "SA_RESOURCE_INFO",
    }
}

impl NotifyType {
    /// Whether the request that it answers has failed (RFC 7296 §3.10.1).
    pub fn is_error(self) -> bool {
        u16::from(self) < 16384
    }
}

codes! {
    /// Hashes that a signature may use (RFC 7427 §7), the data of SIGNATURE_HASH_ALGORITHMS.
    pub enum HashAlgorithm: u16 {
        Sha1 = 1 => "SHA-1",
        Sha256 = 2 => "SHA-256",
        Sha384 = 3 => "SHA-384",
        Sha512 = 4 => "SHA-512",
        Identity = 5 => "Identity",
    }
}

/// A Notify payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notify {
    /// The protocol of `spi`; zero (`Other(0)`) where no SPI is given.
    pub protocol: Protocol,
    /// The SPI that is spoken of; empty where none is.
    pub spi: Vec<u8>,
    /// What is notified.
    pub kind: NotifyType,
    /// Data that belongs to it.
    pub data: Vec<u8>,
}

impl Notify {
    /// A notification of nothing but its type.
    pub fn status(kind: NotifyType) -> Self {
        Self::with_data(kind, Vec::new())
    }

    /// A notification with data.
    pub fn with_data(kind: NotifyType, data: Vec<u8>) -> Self {
        Notify { protocol: Protocol::Other(0), spi: Vec::new(), kind, data }
    }

    /// A notification about an ESP SA, as REKEY_SA and CHILD_SA_NOT_FOUND are.
    pub fn about_esp(kind: NotifyType, spi: EspSpi) -> Self {
        Notify { protocol: Protocol::Esp, spi: spi.0.to_be_bytes().to_vec(), kind, data: Vec::new() }
    }

    /// Which hashes this host verifies (RFC 7427 §4).
    pub fn hash_algorithms(hashes: &[HashAlgorithm]) -> Self {
        let data = hashes.iter().flat_map(|h| u16::from(*h).to_be_bytes()).collect();
        Self::with_data(NotifyType::SignatureHashAlgorithms, data)
    }

    /// The hashes of a SIGNATURE_HASH_ALGORITHMS.
    ///
    /// # Errors
    /// Data that is not a list of 16-bit numbers.
    pub fn parse_hash_algorithms(&self) -> Result<Vec<HashAlgorithm>, Error> {
        let (pairs, rest) = self.data.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(syntax("SIGNATURE_HASH_ALGORITHMS"));
        }
        Ok(pairs.iter().map(|p| HashAlgorithm::from(u16::from_be_bytes(*p))).collect())
    }

    /// The ESP SPI that is spoken of, if one is.
    pub fn esp_spi(&self) -> Option<EspSpi> {
        match (self.protocol, <[u8; 4]>::try_from(self.spi.as_slice())) {
            (Protocol::Esp, Ok(spi)) => Some(EspSpi(u32::from_be_bytes(spi))),
            _ => None,
        }
    }

    /// The group that an INVALID_KE_PAYLOAD asks for.
    pub fn wanted_group(&self) -> Option<u16> {
        match (self.kind, <[u8; 2]>::try_from(self.data.as_slice())) {
            (NotifyType::InvalidKePayload, Ok(group)) => Some(u16::from_be_bytes(group)),
            _ => None,
        }
    }

    /// Octets of the body.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        4 + self.spi.len() + self.data.len()
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        out.push(self.protocol.into());
        out.push(self.spi.len() as u8);
        out.extend_from_slice(&u16::from(self.kind).to_be_bytes());
        out.extend_from_slice(&self.spi);
        out.extend_from_slice(&self.data);
    }

    /// Reads a body.
    ///
    /// # Errors
    /// Shorter than its fixed part and SPI.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let protocol = Protocol::from(r.u8("Notify payload")?);
        let spi_len = usize::from(r.u8("Notify payload")?);
        let kind = NotifyType::from(r.u16("Notify payload")?);
        let spi = r.take(spi_len, "Notify payload")?.to_vec();
        Ok(Notify { protocol, spi, kind, data: r.rest().to_vec() })
    }
}
