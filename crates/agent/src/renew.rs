//! Keeps this host's certificate fresh: asks the server for the next one when two thirds of its life are over.
//!
//! The key stays: it is what the server and the other hosts know this host by, so nobody has to learn anything. New
//! connections to the server show the new certificate; the watch that is open goes on. Tunnels go on too: only foreign peers
//! look at the certificate's dates, and they are shown the new one when next they ask.
//!
//! Invariant: a certificate that ran out while the server was away stops nothing here. It is shown, and renewed when the
//! server is back.

use std::time::Duration;

use model::UnixMillis;
use tokio::sync::watch;

use crate::ledger::Identity;
use crate::link::Backoff;
use crate::server::Server;
use crate::tunnels::Tunnels;
use crate::{Control, now_millis, random, tls};

/// How often it is looked whether it is time: a clock that was set is noticed.
const LOOK: Duration = Duration::from_mins(10);

/// When a certificate runs out; 0 if it cannot be read.
pub(crate) fn expires(identity: &Identity) -> UnixMillis {
    tls::expires(&identity.certificate).unwrap_or_default()
}

/// When to ask for the next one: after two thirds of its life, or up to a tenth of it sooner, so that hosts which joined
/// together do not come together.
fn due(identity: &Identity, jitter: u8) -> UnixMillis {
    let life = expires(identity).saturating_sub(identity.certified);
    let sooner = life / 10 * u64::from(jitter) / 256;
    identity.certified.saturating_add(life / 3 * 2).saturating_sub(sooner)
}

/// Renews for ever.
pub(crate) async fn keep(
    server: Server,
    control: Control,
    tunnels: Tunnels,
    identity: watch::Sender<Identity>,
) {
    let mut backoff = Backoff::new();
    let [mut jitter] = random::<1>();
    let mut warned = false;
    loop {
        let (due, expires) = {
            let identity = identity.borrow();
            // A certificate of the future is one of a clock that was wrong.
            let wrong = identity.certified > now_millis();
            (if wrong { 0 } else { due(&identity, jitter) }, expires(&identity))
        };
        let now = now_millis();
        if due > now {
            tokio::time::sleep(Duration::from_millis(due - now).min(LOOK)).await;
            continue;
        }
        if expires <= now && !warned {
            tracing::warn!(
                "this host's certificate has run out; all goes on, and it is renewed when the server answers"
            );
            warned = true;
        }
        match renew(&server, &control, &tunnels, &identity).await {
            Ok(()) => {
                (backoff, warned) = (Backoff::new(), false);
                [jitter] = random::<1>();
            }
            Err(why) => {
                tracing::debug!("the certificate is not renewed yet: {why}");
                tokio::time::sleep(backoff.next()).await;
            }
        }
    }
}

async fn renew(
    server: &Server,
    control: &Control,
    tunnels: &Tunnels,
    identity: &watch::Sender<Identity>,
) -> Result<(), String> {
    let old = identity.borrow().clone();
    let certificate = server.renew(&old.key).await.map_err(|error| error.message)?;
    let new = Identity { certificate, certified: now_millis(), ..old };
    if expires(&new) <= now_millis() {
        return Err("the server sent a certificate that has run out; is a clock wrong?".to_owned());
    }
    // It fails where certificate and key do not belong together; then the old one stays.
    server.reconnect(&new).map_err(|error| error.to_string())?;
    tunnels.certified(&new).await?;
    if let Err(error) = control.certified(&new).await {
        tracing::warn!("{}; the new certificate is used, and after a restart the old one", error.message);
    }
    identity.send_replace(new);
    tracing::info!("this host's certificate was renewed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use model::{EnvironmentId, HostId};

    use super::*;

    #[test]
    fn it_is_time_after_two_thirds_of_the_life_or_somewhat_sooner() {
        let key = rcgen::KeyPair::generate().unwrap();
        let certified = now_millis();
        let mut params = rcgen::CertificateParams::default();
        params.not_after = (std::time::SystemTime::now() + Duration::from_secs(3000)).into();
        let identity = Identity {
            host: HostId::from_random([1; 8]),
            name: "h1".parse().unwrap(),
            environment: EnvironmentId::default(),
            server: String::new(),
            servers: Vec::new(),
            ca: String::new(),
            certificate: params.self_signed(&key).unwrap().pem(),
            key: key.serialize_pem(),
            certified,
        };
        let after = |jitter| due(&identity, jitter).saturating_sub(certified) / 1000;
        assert!((1998..=2001).contains(&after(0)), "{}", after(0));
        assert!((1699..=1703).contains(&after(255)), "{}", after(255));
        assert_eq!(due(&Identity { certificate: String::new(), ..identity.clone() }, 0), certified);
        let unknown = Identity { certified: 0, ..identity };
        assert!(due(&unknown, 0) < now_millis(), "a ledger of an older version does not say when: now");
    }
}
