//! For fuzz targets alone: see `endpoint/forge.rs`.

use super::Sa;
use crate::wire::{ExchangeType, Flags, Header, PayloadType};

impl Sa {
    pub(crate) fn ids(&self) -> (u32, Option<u32>) {
        (self.window.expected(), self.window.outstanding())
    }

    pub(crate) fn plight(&self) -> String {
        format!(
            "undecided {:?}, heir {:?}, replaces {:?}, gives up {:?}, does {:?}, then {:?} and {:?}",
            self.undecided, self.heir, self.replaces, self.give_up_at, self.current, self.tasks, self.later
        )
    }

    pub(crate) fn forge(
        &mut self,
        (exchange, message_id, response): (ExchangeType, u32, bool),
        fragment: Option<(u16, u16)>,
        (first, content): (PayloadType, &[u8]),
    ) -> Option<Vec<u8>> {
        let flags = Flags { initiator: self.opener, version: false, response };
        let header = Header { spis: self.spis, exchange, flags, message_id };
        self.crypt.as_mut()?.sealer.seal_content(&header, first, fragment, content).ok()
    }
}
