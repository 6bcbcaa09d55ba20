//! Accepting connections, for as long as there is a listener.

use std::io;
use std::time::Duration;

use tracing::warn;

/// Until it is tried again. Where accepting fails, no file descriptor is left, and nothing tells when one is.
const PAUSE: Duration = Duration::from_millis(100);

/// What `accept` gives, once it succeeds; `what` is served there. To be dropped and called again is no loss.
pub(crate) async fn accept<T, F: Future<Output = io::Result<T>>>(what: &str, accept: impl Fn() -> F) -> T {
    loop {
        match accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                warn!(%error, "{what}: accepting failed");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
