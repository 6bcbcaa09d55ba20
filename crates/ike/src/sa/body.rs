//! The payloads of one message, sorted by type.

use crate::error::{Error, Misbehaved};
use crate::wire::{
    Authentication, CertRequest, Certificate, Delete, Identification, KeyExchange, Nonce, Notify, NotifyType,
    Payload, PayloadType, SaPayload, TrafficSelectors,
};

/// What a message says. A payload that may be there once and is there twice is refused when it is sorted.
#[derive(Debug, Default)]
pub(crate) struct Body {
    pub(crate) sa: Option<SaPayload>,
    pub(crate) ke: Option<KeyExchange>,
    pub(crate) nonce: Option<Nonce>,
    pub(crate) id_i: Option<Identification>,
    pub(crate) id_r: Option<Identification>,
    pub(crate) auth: Option<Authentication>,
    pub(crate) ts_i: Option<TrafficSelectors>,
    pub(crate) ts_r: Option<TrafficSelectors>,
    pub(crate) certs: Vec<Certificate>,
    pub(crate) cert_requests: Vec<CertRequest>,
    pub(crate) notifies: Vec<Notify>,
    pub(crate) deletes: Vec<Delete>,
}

fn once<T>(place: &mut Option<T>, value: T, kind: PayloadType) -> Result<(), Error> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Misbehaved::Unexpected(kind).into()),
    }
}

/// The payload, or the error that it is missing.
pub(crate) fn need<T>(place: Option<T>, kind: PayloadType) -> Result<T, Error> {
    place.ok_or_else(|| Misbehaved::Missing(kind).into())
}

impl Body {
    /// Sorts the payloads of a message.
    pub(crate) fn sort(payloads: Vec<Payload>) -> Result<Self, Error> {
        let mut body = Self::default();
        for payload in payloads {
            let kind = payload.kind();
            match payload {
                Payload::Sa(it) => once(&mut body.sa, it, kind)?,
                Payload::Ke(it) => once(&mut body.ke, it, kind)?,
                Payload::Nonce(it) => once(&mut body.nonce, it, kind)?,
                Payload::IdInitiator(it) => once(&mut body.id_i, it, kind)?,
                Payload::IdResponder(it) => once(&mut body.id_r, it, kind)?,
                Payload::Auth(it) => once(&mut body.auth, it, kind)?,
                Payload::TsInitiator(it) => once(&mut body.ts_i, it, kind)?,
                Payload::TsResponder(it) => once(&mut body.ts_r, it, kind)?,
                Payload::Cert(it) => body.certs.push(it),
                Payload::CertReq(it) => body.cert_requests.push(it),
                Payload::Notify(it) => body.notifies.push(it),
                Payload::Delete(it) => body.deletes.push(it),
                // Software names mean nothing, and configuration and EAP are not spoken here.
                Payload::VendorId(_) | Payload::Configuration(_) | Payload::Eap(_) => {}
            }
        }
        Ok(body)
    }

    /// The notification of this type.
    pub(crate) fn notify(&self, kind: NotifyType) -> Option<&Notify> {
        self.notifies.iter().find(|notify| notify.kind == kind)
    }

    /// Whether there is a notification of this type.
    pub(crate) fn says(&self, kind: NotifyType) -> bool {
        self.notify(kind).is_some()
    }

    /// The first notification of an error.
    pub(crate) fn error(&self) -> Option<&Notify> {
        self.notifies.iter().find(|notify| notify.kind.is_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_nonce_is_refused_and_a_second_notification_is_not() {
        let nonce = || Payload::Nonce(Nonce::new(vec![1; 32]).unwrap());
        let notify = || Payload::Notify(Notify::status(NotifyType::MobikeSupported));
        assert!(Body::sort(vec![nonce(), notify(), notify()]).is_ok());
        let twice = Body::sort(vec![nonce(), nonce()]).unwrap_err();
        assert_eq!(twice, Misbehaved::Unexpected(PayloadType::Nonce).into());
    }
}
