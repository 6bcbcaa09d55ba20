//! A copy of inner packets for somebody who looks on.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::SystemTime;

use crate::dataplane::count::{Counts, Reason};
use crate::dataplane::{Captured, DeviceIndex, Direction};

/// Where copies of one peer's packets go. Nobody waits for it.
#[derive(Debug, Clone)]
pub(super) struct Tap(pub SyncSender<Captured>);

impl Tap {
    #[cold]
    pub fn copy(&self, direction: Direction, device: DeviceIndex, packet: &[u8], counts: &Counts) {
        let captured = Captured { at: SystemTime::now(), direction, device, packet: packet.to_vec() };
        match self.0.try_send(captured) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => counts.add(Reason::CaptureFull, 1),
            // Who looked has gone; control takes the tap away.
            Err(TrySendError::Disconnected(_)) => {}
        }
    }
}
