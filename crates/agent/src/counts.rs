//! What the agent counts as it happens. All else that its metrics tell is looked up when somebody asks: see [`crate::metrics`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::exposition::Histogram;

/// What happened since the start.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    reconciled: Mutex<Histogram>,
    pub(crate) reconcile_failures: AtomicU64,
    pub(crate) watch_messages: AtomicU64,
    /// When the watch last said something, in milliseconds since 1970; 0 if never.
    pub(crate) heard: AtomicU64,
    pub(crate) docker_events: Arc<AtomicU64>,
}

impl Counts {
    /// The kernel was made what it should be, or that failed.
    pub(crate) fn reconciled(&self, took: Duration, good: bool) {
        self.reconciled.lock().unwrap_or_else(PoisonError::into_inner).observe(took.as_secs_f64());
        if !good {
            self.reconcile_failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn reconcile_durations(&self) -> Histogram {
        self.reconciled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
