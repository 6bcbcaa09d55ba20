//! An `IKE_AUTH` of somebody whom nobody here knows yet.
//!
//! Two hosts hear of each other at different moments: whoever hears first asks one that has not. A refusal would be an error
//! on both sides that mends itself; so the request is kept for [`crate::Timing::patience`] and answered as soon as its
//! sender is known. The sender repeats it meanwhile, as it does whenever an answer takes its time (RFC 7296 §2.1).
//!
//! Invariant: one request is kept for each half-open SA, and of those there is a bounded number.

use std::time::Instant;

use super::{Body, Cx, Phase, Sa, auth};
use crate::error::Error;
use crate::wire::{ExchangeType, Header};

/// A request that came before its sender was known.
pub(super) struct Early {
    header: Header,
    body: Body,
    /// When it is refused.
    until: Instant,
}

impl Sa {
    /// Keeps a request that comes too early, and gives back all others.
    pub(super) fn keep_early(
        &mut self,
        header: &Header,
        body: Result<Body, Error>,
        cx: &Cx<'_>,
    ) -> Option<Result<Body, Error>> {
        match body {
            Ok(body)
                if self.phase == Phase::HalfOpen
                    && header.exchange == ExchangeType::IkeAuth
                    && auth::is_stranger(&body, cx) =>
            {
                let until = cx.now + cx.config.timing.patience;
                self.early = Some(Early { header: *header, body, until });
                None
            }
            other => Some(other),
        }
    }

    /// Answers the request that was kept, if its sender is known now or its time is over.
    pub(crate) fn answer_early(&mut self, cx: &mut Cx<'_>) {
        let ripe = |it: &mut Early| it.until <= cx.now || !auth::is_stranger(&it.body, cx);
        if let Some(Early { header, body, .. }) = self.early.take_if(ripe) {
            self.handle_request(&header, Ok(body), cx);
        }
    }

    /// When it is refused.
    pub(super) fn early_until(&self) -> Option<Instant> {
        self.early.as_ref().map(|it| it.until)
    }
}
