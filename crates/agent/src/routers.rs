//! Names and metadata in each router: opens their sockets inside the router's namespace when it appears, and drops
//! them when it goes or is made anew.
//!
//! Invariant: a changed zone never closes a socket.

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use linux::netns::Netns;
use model::{NetworkId, SERVICE_ADDRESS};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::names::{Forwarder, Zones};
use crate::view::View;
use crate::{Control, NETNS_DIR, metadata, names};

/// Sockets that could not be opened are tried again after this.
const RETRY: Duration = Duration::from_secs(1);
/// How often tasks that ended by themselves are looked for.
const CHECK: Duration = Duration::from_secs(5);

/// Serves names and metadata in every router until dropped.
pub(crate) async fn serve(control: Control, forwarder: Arc<Forwarder>) {
    let mut views = control.views();
    let mut running: BTreeMap<NetworkId, Running> = BTreeMap::new();
    loop {
        let view = views.borrow_and_update().clone();
        running.retain(|id, one| {
            let same = view.routers.get(id).is_some_and(|router| router.generation == one.generation);
            same && !one.tasks.iter().any(JoinHandle::is_finished)
        });
        let mut failed = false;
        for (id, router) in &view.routers {
            if running.contains_key(id) {
                continue;
            }
            match Running::start(id, router.generation, &router.netns, &forwarder, &views) {
                Ok(one) => drop(running.insert(id.clone(), one)),
                Err(error) => {
                    // The namespace may be half made still; the next look is soon.
                    tracing::debug!(netns = router.netns, "names: {error}");
                    failed = true;
                }
            }
        }
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(if failed { RETRY } else { CHECK }) => {}
        }
    }
}

struct Running {
    generation: u64,
    tasks: Vec<JoinHandle<()>>,
}

impl Running {
    fn start(
        id: &NetworkId,
        generation: u64,
        netns: &str,
        forwarder: &Arc<Forwarder>,
        views: &watch::Receiver<Arc<View>>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let netns = Netns::open(&std::path::Path::new(NETNS_DIR).join(netns))?;
        // Queries to other addresses come here too, by the router's NAT.
        let udp = netns.run(|| UdpSocket::bind((SERVICE_ADDRESS, 53)))??;
        let tcp = netns.run(|| TcpListener::bind((SERVICE_ADDRESS, 53)))??;
        let http = netns.run(|| TcpListener::bind((SERVICE_ADDRESS, 80)))??;
        let zones = Arc::new(Zones::new(views.clone(), id.clone()));
        let names = names::serve(udp, tcp, zones, forwarder.clone());
        let metadata = metadata::serve(http, id.clone(), views.clone());
        let tasks = vec![
            tokio::spawn(async move {
                let Err(error) = names.await;
                tracing::warn!("names: {error}");
            }),
            tokio::spawn(async move {
                let Err(error) = metadata.await;
                tracing::warn!("metadata: {error}");
            }),
        ];
        Ok(Self { generation, tasks })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
