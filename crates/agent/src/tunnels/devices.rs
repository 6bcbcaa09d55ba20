//! The TUN devices of this host's routers, opened for the packet path as the view shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use linux::netns::Netns;
use linux::tun::Queues;
use model::NetworkId;

use crate::NETNS_DIR;
use crate::dataplane::{Closing, Dataplane, DeviceIndex, PeerIndex};
use crate::view::View;

/// The packet path's threads let go of a device's queues in much less than this; if not, it is tried again later.
const CLOSE_WAIT: Duration = Duration::from_millis(20);

/// Devices by network. A network keeps its number.
#[derive(Default)]
pub(super) struct Devices {
    all: BTreeMap<NetworkId, Device>,
    next: u32,
}

struct Device {
    index: DeviceIndex,
    opened: Option<Opened>,
    /// What was open before.
    closing: Closing,
    routes: Vec<(IpNet, PeerIndex)>,
    onward: bool,
    /// It could not be opened, and that was logged.
    told: bool,
}

/// What it takes for an open queue to be the right one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Opened {
    netns: String,
    generation: u64,
    tun: u64,
}

impl Devices {
    /// The number of a network's device, whether it is there or not.
    pub(super) fn index(&mut self, network: &NetworkId) -> DeviceIndex {
        let next = &mut self.next;
        let device = self.all.entry(network.clone()).or_insert_with(|| {
            *next += 1;
            Device {
                index: DeviceIndex(*next),
                opened: None,
                closing: Closing::default(),
                routes: Vec::new(),
                onward: false,
                told: false,
            }
        });
        device.index
    }

    /// Opens, closes and opens again what the view shows otherwise than before. False: something could not be opened
    /// yet, and is to be tried again.
    pub(super) fn apply(&mut self, view: &View, dataplane: &Dataplane) -> bool {
        let wanted: BTreeMap<&NetworkId, Opened> = view
            .routers
            .iter()
            .filter_map(|(network, router)| {
                let opened =
                    Opened { netns: router.netns.clone(), generation: router.generation, tun: router.tun? };
                Some((network, opened))
            })
            .collect();
        for (network, device) in &mut self.all {
            if device.opened.is_some() && device.opened.as_ref() != wanted.get(network) {
                device.opened = None;
                device.routes.clear();
                device.onward = false;
                device.closing = dataplane.remove_device(device.index);
            }
        }
        let mut all = true;
        for (network, opened) in wanted {
            let index = self.index(network);
            let Some(device) = self.all.get_mut(network).filter(|device| device.opened.is_none()) else {
                continue;
            };
            let until = Instant::now() + CLOSE_WAIT;
            while !device.closing.is_over() && Instant::now() < until {
                std::thread::yield_now();
            }
            if !device.closing.is_over() {
                all = false;
                continue;
            }
            match queues(&opened.netns, dataplane.workers()) {
                Ok(queues) => {
                    if let Some(why) = &queues.unsteered {
                        tracing::info!("flows that send little wait behind those that send much: {why}");
                    }
                    dataplane.add_device(index, queues);
                    device.opened = Some(opened);
                    device.told = false;
                }
                Err(error) => {
                    all = false;
                    if !device.told {
                        tracing::warn!(
                            netns = opened.netns,
                            "the tunnel device cannot be opened yet: {error}"
                        );
                        device.told = true;
                    }
                }
            }
        }
        all
    }

    /// Sets which peer each destination goes to, and which networks hand on from one peer to another; only for devices that are
    /// open.
    pub(super) fn route(
        &mut self,
        routes: &BTreeMap<NetworkId, Vec<(IpNet, PeerIndex)>>,
        onward: &BTreeSet<NetworkId>,
        dataplane: &Dataplane,
    ) {
        for (network, device) in self.all.iter_mut().filter(|(_, device)| device.opened.is_some()) {
            let routes = routes.get(network).map(Vec::as_slice).unwrap_or_default();
            let onward = onward.contains(network);
            if device.routes != routes || device.onward != onward {
                device.routes = routes.to_vec();
                device.onward = onward;
                dataplane.set_routes(device.index, routes.to_vec(), onward);
            }
        }
    }
}

fn queues(netns: &str, workers: usize) -> Result<Queues, linux::Error> {
    let netns = Netns::open(&Path::new(NETNS_DIR).join(netns))?;
    Queues::open(&netns, plan::TUN, u32::try_from(workers).unwrap_or(u32::MAX))
}
