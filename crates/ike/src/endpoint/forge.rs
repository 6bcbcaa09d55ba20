//! For fuzz targets alone: what a peer that holds the keys may say.

use super::{Endpoint, Sa};
use crate::wire::{ExchangeType, IkeSpis, PayloadType};

impl Endpoint {
    /// The id that the peer's next request has to have, and that of ours under way.
    pub(crate) fn ids(&self, spis: &IkeSpis) -> Option<(u32, Option<u32>)> {
        self.sas.values().find(|sa| sa.spis == *spis).map(|sa| sa.ids())
    }

    /// Where all IKE SAs stand, to be printed.
    pub(crate) fn story(&self) -> String {
        let line = |sa: &Sa| format!("{:?} {:?} {}\n", sa.spis, sa.phase, sa.plight());
        self.sas.values().map(|sa| line(sa)).collect()
    }

    /// Any content under the keys of an IKE SA: exchange, message id, whether it answers; which fragment of how many.
    pub(crate) fn forge(
        &mut self,
        spis: &IkeSpis,
        what: (ExchangeType, u32, bool),
        fragment: Option<(u16, u16)>,
        content: (PayloadType, &[u8]),
    ) -> Option<Vec<u8>> {
        self.sas.values_mut().find(|sa| sa.spis == *spis)?.forge(what, fragment, content)
    }
}
